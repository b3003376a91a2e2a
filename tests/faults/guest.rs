//! A guest that looks after its disks itself.
//!
//! It is a UEFI program of half a kilobyte. At every boot it reads all of both disks: the 64-bit
//! words of each add up to zero. Then it counts the boot in the last block of its user data, the
//! sum with it, says that it is ready, and waits for the power button. Damage it says as well.

use std::io::{Cursor, Write};

pub const DAMAGED: &str = "the disks are damaged";

/// What the first bytes of a user-data disk are: how the guest tells its disks apart.
const MAGIC: &[u8; 8] = b"userdata";
/// Where the last block keeps the count of boots, and the word that makes the sum zero.
const COUNT_FROM_END: usize = 16;
pub const BLOCK_BYTES: usize = 512;

/// A root disk that boots the program, beside a file of noise.
pub fn root_disk(size_bytes: usize) -> Vec<u8> {
    let mut image = Cursor::new(vec![0; size_bytes]);
    fatfs::format_volume(&mut image, fatfs::FormatVolumeOptions::new()).unwrap();
    let volume = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
    let root = volume.root_dir();
    root.create_dir("EFI").unwrap();
    root.create_dir("EFI/BOOT").unwrap();
    root.create_file("EFI/BOOT/BOOTX64.EFI").unwrap().write_all(&program()).unwrap();
    root.create_file("noise.bin").unwrap().write_all(&noise(b"root", size_bytes / 4)).unwrap();
    drop(root);
    volume.unmount().unwrap();
    balanced(image.into_inner())
}

/// A user-data disk full of noise, at its zeroth boot.
pub fn user_data(size_bytes: usize) -> Vec<u8> {
    let mut disk = noise(b"user data", size_bytes);
    disk[..MAGIC.len()].copy_from_slice(MAGIC);
    let count = disk.len() - COUNT_FROM_END;
    disk[count..].fill(0);
    balanced(disk)
}

/// How often the guest of this user-data disk has booted.
pub fn boots(user_data: &[u8]) -> u64 {
    let at = user_data.len() - COUNT_FROM_END;
    u64::from_le_bytes(user_data[at..at + 8].try_into().unwrap())
}

/// What the guest checks.
pub fn is_whole(disk: &[u8]) -> bool {
    sum(disk) == 0
}

fn sum(disk: &[u8]) -> u64 {
    disk.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).fold(0, u64::wrapping_add)
}

/// The last word, which must be free, takes the sum to zero.
fn balanced(mut disk: Vec<u8>) -> Vec<u8> {
    let at = disk.len() - 8;
    assert_eq!(disk[at..], [0; 8]);
    let rest = 0u64.wrapping_sub(sum(&disk));
    disk[at..].copy_from_slice(&rest.to_le_bytes());
    disk
}

fn noise(seed: &[u8], size_bytes: usize) -> Vec<u8> {
    let mut out = vec![0; size_bytes];
    blake3::Hasher::new().update(seed).finalize_xof().fill(&mut out);
    out
}

/// Position-independent x86-64 code, called as every UEFI application is. Offsets into the boot
/// services and the block protocol are those of the UEFI specification. Ports: 0x3f8 is the serial
/// port (status at 0x3fd), 0x600 the ACPI power management of q35 under OVMF.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x55,                                            // entry: push rbp
    0x48, 0x89, 0xe5,                                // mov rbp, rsp
    0x48, 0x81, 0xec, 0xa0, 0x00, 0x00, 0x00,        // sub rsp, 0xa0
    0x48, 0x83, 0xe4, 0xf0,                          // and rsp, -16
    0x4c, 0x8b, 0x62, 0x60,                          // mov r12, [rdx+0x60] (boot services)
    0xb9, 0x02, 0x00, 0x00, 0x00,                    // mov ecx, 2
    0x48, 0x8d, 0x15, 0xb0, 0x01, 0x00, 0x00,        // lea rdx, [rip+guid]
    0x45, 0x31, 0xc0,                                // xor r8d, r8d
    0x4c, 0x8d, 0x4d, 0xf8,                          // lea r9, [rbp-8]
    0x48, 0x8d, 0x45, 0xf0,                          // lea rax, [rbp-16]
    0x48, 0x89, 0x44, 0x24, 0x20,                    // mov [rsp+0x20], rax
    0x41, 0xff, 0x94, 0x24, 0x38, 0x01, 0x00, 0x00,  // call [r12+0x138] (LocateHandleBuffer)
    0x48, 0x85, 0xc0,                                // test rax, rax
    0x0f, 0x85, 0x3e, 0x01, 0x00, 0x00,              // jnz bad
    0xb9, 0x02, 0x00, 0x00, 0x00,                    // mov ecx, 2
    0xba, 0x00, 0x00, 0x10, 0x00,                    // mov edx, 0x100000
    0x4c, 0x8d, 0x45, 0xe8,                          // lea r8, [rbp-24]
    0x41, 0xff, 0x54, 0x24, 0x40,                    // call [r12+0x40] (AllocatePool)
    0x48, 0x85, 0xc0,                                // test rax, rax
    0x0f, 0x85, 0x22, 0x01, 0x00, 0x00,              // jnz bad
    0x45, 0x31, 0xf6,                                // xor r14d, r14d (disks seen)
    0x48, 0x83, 0x7d, 0xf8, 0x00,                    // handle: cmp qword ptr [rbp-8], 0
    0x0f, 0x84, 0x1d, 0x01, 0x00, 0x00,              // je done
    0x48, 0xff, 0x4d, 0xf8,                          // dec qword ptr [rbp-8]
    0x48, 0x8b, 0x45, 0xf8,                          // mov rax, [rbp-8]
    0x48, 0x8b, 0x4d, 0xf0,                          // mov rcx, [rbp-16]
    0x48, 0x8b, 0x0c, 0xc1,                          // mov rcx, [rcx+rax*8]
    0x48, 0x8d, 0x15, 0x4e, 0x01, 0x00, 0x00,        // lea rdx, [rip+guid]
    0x4c, 0x8d, 0x45, 0xe0,                          // lea r8, [rbp-32]
    0x41, 0xff, 0x94, 0x24, 0x98, 0x00, 0x00, 0x00,  // call [r12+0x98] (HandleProtocol)
    0x48, 0x85, 0xc0,                                // test rax, rax
    0x75, 0xcd,                                      // jnz handle
    0x48, 0x8b, 0x5d, 0xe0,                          // mov rbx, [rbp-32] (block IO)
    0x48, 0x8b, 0x73, 0x08,                          // mov rsi, [rbx+8] (media)
    0x80, 0x7e, 0x05, 0x00,                          // cmp byte ptr [rsi+5], 0 (present)
    0x74, 0xbf,                                      // je handle
    0x80, 0x7e, 0x06, 0x00,                          // cmp byte ptr [rsi+6], 0 (a partition)
    0x75, 0xb9,                                      // jne handle
    0x80, 0x7e, 0x07, 0x00,                          // cmp byte ptr [rsi+7], 0 (read-only)
    0x75, 0xb3,                                      // jne handle
    0x41, 0xff, 0xc6,                                // inc r14d
    0x31, 0xff,                                      // xor edi, edi (sum)
    0x45, 0x31, 0xed,                                // xor r13d, r13d (next block)
    0x48, 0xc7, 0x45, 0xd8, 0x00, 0x00, 0x00, 0x00,  // mov qword ptr [rbp-40], 0 (first word of disk)
    0x44, 0x8b, 0x7e, 0x0c,                          // read: mov r15d, [rsi+12] (block size)
    0x41, 0xb9, 0x00, 0x00, 0x10, 0x00,              // mov r9d, 0x100000
    0x48, 0x8b, 0x46, 0x18,                          // mov rax, [rsi+24]
    0x48, 0xff, 0xc0,                                // inc rax
    0x4c, 0x29, 0xe8,                                // sub rax, r13 (blocks left)
    0x49, 0x0f, 0xaf, 0xc7,                          // imul rax, r15
    0x4c, 0x39, 0xc8,                                // cmp rax, r9
    0x4c, 0x0f, 0x42, 0xc8,                          // cmovb r9, rax
    0x4c, 0x89, 0x4d, 0xd0,                          // mov [rbp-48], r9 (bytes)
    0x48, 0x89, 0xd9,                                // mov rcx, rbx
    0x8b, 0x16,                                      // mov edx, [rsi]
    0x4d, 0x89, 0xe8,                                // mov r8, r13
    0x48, 0x8b, 0x45, 0xe8,                          // mov rax, [rbp-24]
    0x48, 0x89, 0x44, 0x24, 0x20,                    // mov [rsp+0x20], rax
    0xff, 0x53, 0x18,                                // call [rbx+24] (ReadBlocks)
    0x48, 0x85, 0xc0,                                // test rax, rax
    0x0f, 0x85, 0x82, 0x00, 0x00, 0x00,              // jnz bad
    0x48, 0x8b, 0x45, 0xe8,                          // mov rax, [rbp-24]
    0x4d, 0x85, 0xed,                                // test r13, r13
    0x75, 0x07,                                      // jnz sum
    0x48, 0x8b, 0x08,                                // mov rcx, [rax]
    0x48, 0x89, 0x4d, 0xd8,                          // mov [rbp-40], rcx
    0x48, 0x8b, 0x4d, 0xd0,                          // sum: mov rcx, [rbp-48]
    0x48, 0xc1, 0xe9, 0x03,                          // shr rcx, 3
    0x48, 0x03, 0x38,                                // add: add rdi, [rax]
    0x48, 0x83, 0xc0, 0x08,                          // add rax, 8
    0x48, 0xff, 0xc9,                                // dec rcx
    0x75, 0xf4,                                      // jnz add
    0x49, 0x89, 0xc0,                                // mov r8, rax (end of the bytes)
    0x48, 0x8b, 0x45, 0xd0,                          // mov rax, [rbp-48]
    0x31, 0xd2,                                      // xor edx, edx
    0x49, 0xf7, 0xf7,                                // div r15
    0x49, 0x01, 0xc5,                                // add r13, rax
    0x4c, 0x3b, 0x6e, 0x18,                          // cmp r13, [rsi+24]
    0x76, 0x87,                                      // jbe read
    0x48, 0x85, 0xff,                                // test rdi, rdi
    0x75, 0x44,                                      // jnz bad
    0x48, 0x8b, 0x05, 0x9e, 0x00, 0x00, 0x00,        // mov rax, [rip+magic]
    0x48, 0x3b, 0x45, 0xd8,                          // cmp rax, [rbp-40]
    0x0f, 0x85, 0x14, 0xff, 0xff, 0xff,              // jne handle
    0x49, 0xff, 0x40, 0xf0,                          // inc qword ptr [r8-16] (one boot more)
    0x49, 0xff, 0x48, 0xf8,                          // dec qword ptr [r8-8] (the sum stays zero)
    0x4d, 0x29, 0xf8,                                // sub r8, r15
    0x4c, 0x89, 0x44, 0x24, 0x20,                    // mov [rsp+0x20], r8
    0x48, 0x89, 0xd9,                                // mov rcx, rbx
    0x8b, 0x16,                                      // mov edx, [rsi]
    0x4c, 0x8b, 0x46, 0x18,                          // mov r8, [rsi+24]
    0x4d, 0x89, 0xf9,                                // mov r9, r15
    0xff, 0x53, 0x20,                                // call [rbx+32] (WriteBlocks)
    0x48, 0x85, 0xc0,                                // test rax, rax
    0x75, 0x0f,                                      // jnz bad
    0x48, 0x89, 0xd9,                                // mov rcx, rbx
    0xff, 0x53, 0x28,                                // call [rbx+40] (FlushBlocks)
    0x48, 0x85, 0xc0,                                // test rax, rax
    0x0f, 0x84, 0xe1, 0xfe, 0xff, 0xff,              // jz handle
    0x48, 0x8d, 0x35, 0x62, 0x00, 0x00, 0x00,        // bad: lea rsi, [rip+damaged]
    0xeb, 0x0d,                                      // jmp greet
    0x48, 0x8d, 0x35, 0x71, 0x00, 0x00, 0x00,        // done: lea rsi, [rip+greeting]
    0x41, 0x83, 0xfe, 0x02,                          // cmp r14d, 2
    0x75, 0xea,                                      // jne bad
    0xfa,                                            // greet: cli
    0x66, 0xba, 0x02, 0x06,                          // mov dx, 0x602
    0x66, 0xb8, 0x00, 0x01,                          // mov ax, 0x100
    0x66, 0xef,                                      // out dx, ax
    0xac,                                            // next: lodsb
    0x84, 0xc0,                                      // test al, al
    0x74, 0x12,                                      // jz loop
    0x50,                                            // push rax
    0x66, 0xba, 0xfd, 0x03,                          // mov dx, 0x3fd
    0xec,                                            // full: in al, dx
    0xa8, 0x20,                                      // test al, 0x20
    0x74, 0xfb,                                      // jz full
    0x58,                                            // pop rax
    0x66, 0xba, 0xf8, 0x03,                          // mov dx, 0x3f8
    0xee,                                            // out dx, al
    0xeb, 0xe9,                                      // jmp next
    0xf3, 0x90,                                      // loop: pause
    0x66, 0xba, 0x00, 0x06,                          // mov dx, 0x600
    0x66, 0xed,                                      // in ax, dx
    0xf6, 0xc4, 0x01,                                // test ah, 1
    0x74, 0xf3,                                      // jz loop
    0x66, 0xba, 0x04, 0x06,                          // mov dx, 0x604
    0x66, 0xb8, 0x00, 0x20,                          // mov ax, 0x2000
    0x66, 0xef,                                      // out dx, ax
    0xeb, 0xe7,                                      // jmp loop
];

/// What the code finds behind itself: the block protocol's name, the magic, two lines to say.
fn data() -> Vec<u8> {
    const BLOCK_IO: [u8; 16] = [
        0x21, 0x5b, 0x4e, 0x96, 0x59, 0x64, 0xd2, 0x11, 0x8e, 0x39, 0x00, 0xa0, 0xc9, 0x69, 0x72, 0x3b,
    ];
    let mut out = [&BLOCK_IO[..], MAGIC].concat();
    out.extend(format!("{DAMAGED}\r\n\0{}\r\n\0", cicada::broker::READY_LINE).bytes());
    out
}

/// The code as a PE32+ image with one section, see the PE/COFF specification.
fn program() -> Vec<u8> {
    const FILE_ALIGN: usize = 0x200;
    let content = [CODE, &data()].concat();
    let size = content.len().next_multiple_of(FILE_ALIGN);
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
        (4, size as u32),        // size of code
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
    for (offset, value) in
        [(8, size as u32), (12, 0x1000), (16, size as u32), (20, FILE_ALIGN as u32), (36, 0x6000_0020)]
    {
        put(section + offset, &u32::to_le_bytes(value));
    }
    pe.extend_from_slice(&content);
    pe.resize(FILE_ALIGN + size, 0);
    pe
}
