//! Small guests on FAT disks.
//!
//! The one made by [`disk`] is a UEFI program of a hundred bytes. It greets on the serial port,
//! answers each character with its case changed, and switches the machine off when the power
//! button is pressed. The one made by [`writing_disk`] is a script for the firmware's own shell.

use std::io::{Cursor, Read, Write};

pub const GREETING: &str = "the guest is up\r\n";

/// A disk that boots the program.
pub fn disk(size_bytes: u64) -> Vec<u8> {
    fat(size_bytes, &["EFI", "EFI/BOOT"], "EFI/BOOT/BOOTX64.EFI", &program())
}

pub const WRITTEN: &str = "written by the guest";

/// A disk whose guest writes a file to it and then says [`GREETING`].
pub fn writing_disk(size_bytes: u64) -> Vec<u8> {
    // The greeting is put together by the shell: the command is echoed as well.
    script_disk(size_bytes, "set g up\r\necho the guest is %g%\r\n")
}

/// A disk whose guest writes a file to it and then switches itself off.
pub fn passing_disk(size_bytes: u64) -> Vec<u8> {
    script_disk(size_bytes, "reset -s\r\n")
}

/// Whether the guest's file is there already and whole, on a disk it may be writing to.
pub fn has_written(image: Vec<u8>) -> bool {
    let Ok(volume) = fatfs::FileSystem::new(Cursor::new(image), fatfs::FsOptions::new()) else {
        return false;
    };
    let mut text = String::new();
    let file = volume.root_dir().open_file("out.txt");
    file.is_ok_and(|mut file| file.read_to_string(&mut text).is_ok()) && text.trim() == WRITTEN
}

fn script_disk(size_bytes: u64, then: &str) -> Vec<u8> {
    let script = format!("@echo -off\r\necho {WRITTEN} >a fs0:\\out.txt\r\n{then}");
    fat(size_bytes, &[], "startup.nsh", script.as_bytes())
}

/// What the guest of a [`writing_disk`] wrote.
pub fn read_back(image: Vec<u8>) -> String {
    let volume = fatfs::FileSystem::new(Cursor::new(image), fatfs::FsOptions::new()).unwrap();
    let mut text = String::new();
    volume.root_dir().open_file("out.txt").unwrap().read_to_string(&mut text).unwrap();
    text
}

fn fat(size_bytes: u64, dirs: &[&str], file: &str, content: &[u8]) -> Vec<u8> {
    let mut image = Cursor::new(vec![0; size_bytes as usize]);
    fatfs::format_volume(&mut image, fatfs::FormatVolumeOptions::new()).unwrap();
    let volume = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
    for dir in dirs {
        volume.root_dir().create_dir(dir).unwrap();
    }
    volume.root_dir().create_file(file).unwrap().write_all(content).unwrap();
    volume.unmount().unwrap();
    image.into_inner()
}

/// Position-independent x86-64 code. Ports: 0x3f8 is the serial port (status at 0x3fd), 0x600 the
/// ACPI power management of q35 under OVMF: status, enable, and at 0x604 control.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfa,                               // 00       cli: the firmware would take the input away
    0x66, 0xba, 0x02, 0x06,             // 01       mov dx, 0x602
    0x66, 0xb8, 0x00, 0x01,             // 05       mov ax, 0x100 (power button enable)
    0x66, 0xef,                         // 09       out dx, ax
    0x48, 0x8d, 0x35, 0x4b, 0, 0, 0,    // 0b       lea rsi, [greeting]
    0xac,                               // 12 next: lodsb
    0x84, 0xc0,                         // 13       test al, al
    0x74, 0x07,                         // 15       jz loop
    0xe8, 0x30, 0, 0, 0,                // 17       call send
    0xeb, 0xf4,                         // 1c       jmp next
    0xf3, 0x90,                         // 1e loop: pause
    0x66, 0xba, 0xfd, 0x03,             // 20       mov dx, 0x3fd
    0xec,                               // 24       in al, dx
    0xa8, 0x01,                         // 25       test al, 1 (a character is there)
    0x74, 0x0c,                         // 27       jz button
    0x66, 0xba, 0xf8, 0x03,             // 29       mov dx, 0x3f8
    0xec,                               // 2d       in al, dx
    0x34, 0x20,                         // 2e       xor al, 0x20
    0xe8, 0x17, 0, 0, 0,                // 30       call send
    0x66, 0xba, 0x00, 0x06,             // 35 button: mov dx, 0x600
    0x66, 0xed,                         // 39       in ax, dx
    0xf6, 0xc4, 0x01,                   // 3b       test ah, 1 (power button status)
    0x74, 0xde,                         // 3e       jz loop
    0x66, 0xba, 0x04, 0x06,             // 40       mov dx, 0x604
    0x66, 0xb8, 0x00, 0x20,             // 44       mov ax, 0x2000 (sleep type 5, enable)
    0x66, 0xef,                         // 48       out dx, ax
    0xeb, 0xd2,                         // 4a       jmp loop
    0x50,                               // 4c send: push rax
    0x66, 0xba, 0xfd, 0x03,             // 4d       mov dx, 0x3fd
    0xec,                               // 51 full: in al, dx
    0xa8, 0x20,                         // 52       test al, 0x20 (room to send)
    0x74, 0xfb,                         // 54       jz full
    0x58,                               // 56       pop rax
    0x66, 0xba, 0xf8, 0x03,             // 57       mov dx, 0x3f8
    0xee,                               // 5b       out dx, al
    0xc3,                               // 5c       ret
]; // 5d greeting

/// The code as a PE32+ image with one section, see the PE/COFF specification.
fn program() -> Vec<u8> {
    const FILE_ALIGN: usize = 0x200;
    let mut pe = vec![0u8; FILE_ALIGN];
    let mut put = |at: usize, bytes: &[u8]| pe[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x3c, &0x40u32.to_le_bytes());
    put(0x40, b"PE\0\0");
    put(0x44, &0x8664u16.to_le_bytes()); // machine: x86-64
    put(0x46, &1u16.to_le_bytes()); // sections
    put(0x54, &240u16.to_le_bytes()); // size of the optional header
    put(0x56, &0x22u16.to_le_bytes()); // executable, large addresses
    let optional = 0x58;
    put(optional, &0x20bu16.to_le_bytes()); // PE32+
    for (offset, value) in [
        (4, FILE_ALIGN as u32),  // size of code
        (16, 0x1000),            // entry point
        (20, 0x1000),            // base of code
        (32, 0x1000),            // section alignment
        (36, FILE_ALIGN as u32), // file alignment
        (56, 0x2000),            // size of image
        (60, FILE_ALIGN as u32), // size of headers
        (68, 10),                // subsystem: EFI application
        (108, 16),               // data directories, all empty
    ] {
        put(optional + offset, &value.to_le_bytes());
    }
    let section = optional + 240;
    put(section, b".text");
    for (offset, value) in [
        (8, FILE_ALIGN as u32),
        (12, 0x1000),
        (16, FILE_ALIGN as u32),
        (20, FILE_ALIGN as u32),
        (36, 0x6000_0020),
    ] {
        put(section + offset, &u32::to_le_bytes(value));
    }
    pe.extend_from_slice(CODE);
    pe.extend_from_slice(GREETING.as_bytes());
    pe.resize(2 * FILE_ALIGN, 0);
    pe
}
