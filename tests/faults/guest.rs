//! A guest that looks after its root disk itself.
//!
//! It is a boot sector. At every start it reads the whole disk: its 32-bit words add up to zero.
//! Then it counts the start in the last sector, the sum with it, says that it is ready, and waits
//! for the power button. Damage it says as well. Its user data it has no driver for; the firmware
//! only knows the disk it boots from.

pub const DAMAGED: &str = "the disk is damaged";
pub const SECTOR_BYTES: usize = 512;
/// Where the last sector keeps the count; behind it is the word that makes the sum zero.
const COUNT_FROM_END: usize = 8;

/// A disk full of noise that boots the program, before its first start. Sizes are multiples of
/// 32 KiB.
pub fn root_disk(size_bytes: usize) -> Vec<u8> {
    let mut disk = noise("root", size_bytes);
    let code = [CODE, &data()].concat();
    disk[..SECTOR_BYTES].fill(0);
    disk[..code.len()].copy_from_slice(&code);
    disk[SECTOR_BYTES - 2..SECTOR_BYTES].copy_from_slice(&[0x55, 0xaa]);
    let count = disk.len() - COUNT_FROM_END;
    disk[count..].fill(0);
    let rest = 0u32.wrapping_sub(sum(&disk));
    disk[count + 4..].copy_from_slice(&rest.to_le_bytes());
    disk
}

/// How often the guest of this disk has started.
pub fn starts(root: &[u8]) -> u32 {
    let at = root.len() - COUNT_FROM_END;
    u32::from_le_bytes(root[at..at + 4].try_into().unwrap())
}

/// What the guest checks.
pub fn is_whole(root: &[u8]) -> bool {
    sum(root) == 0
}

fn sum(disk: &[u8]) -> u32 {
    disk.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).fold(0, u32::wrapping_add)
}

pub fn noise(seed: &str, size_bytes: usize) -> Vec<u8> {
    let mut out = vec![0; size_bytes];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut out);
    out
}

/// 16-bit code, loaded at 0x7c00 by the firmware, whose disk services it uses. Ports: 0x3f8 is the
/// serial port (status at 0x3fd), 0x600 the ACPI power management of q35: status, enable, and at
/// 0x604 control.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0x31, 0xc0,                                      // entry: xor ax, ax
    0x8e, 0xd8,                                      // mov ds, ax
    0x8e, 0xd0,                                      // mov ss, ax
    0xbc, 0x00, 0x7c,                                // mov sp, 0x7c00
    0xb8, 0x00, 0x10,                                // mov ax, 0x1000
    0x8e, 0xc0,                                      // mov es, ax (the buffer, 32 KiB)
    0xb2, 0x80,                                      // mov dl, 0x80 (the disk it came from)
    0xbe, 0x00, 0x06,                                // mov si, 0x600
    0xc7, 0x04, 0x1e, 0x00,                          // mov word ptr [si], 30
    0xb4, 0x48,                                      // mov ah, 0x48 (what disk it is)
    0xcd, 0x13,                                      // int 0x13
    0x72, 0x5c,                                      // jc bad
    0x66, 0x8b, 0x6c, 0x10,                          // mov ebp, [si+16] (its sectors)
    0x66, 0x31, 0xdb,                                // xor ebx, ebx (the sum)
    0x66, 0x31, 0xff,                                // xor edi, edi (the next sector)
    0x66, 0x89, 0x3e, 0xb3, 0x7c,                    // read: mov [0x7c00+packet+8-entry], edi
    0xbe, 0xab, 0x7c,                                // mov si, 0x7c00+packet-entry
    0xb4, 0x42,                                      // mov ah, 0x42
    0xcd, 0x13,                                      // int 0x13
    0x72, 0x44,                                      // jc bad
    0x31, 0xf6,                                      // xor si, si
    0xb9, 0x00, 0x20,                                // mov cx, 8192
    0x26, 0x66, 0x03, 0x1c,                          // add: add ebx, es:[si]
    0x83, 0xc6, 0x04,                                // add si, 4
    0xe2, 0xf7,                                      // loop add
    0x66, 0x83, 0xc7, 0x40,                          // add edi, 64
    0x66, 0x39, 0xef,                                // cmp edi, ebp
    0x72, 0xdb,                                      // jb read
    0x66, 0x85, 0xdb,                                // test ebx, ebx
    0x75, 0x28,                                      // jnz bad
    0x26, 0x66, 0xff, 0x06, 0xf8, 0x7f,              // inc dword ptr es:[0x7ff8] (one start more)
    0x26, 0x66, 0xff, 0x0e, 0xfc, 0x7f,              // dec dword ptr es:[0x7ffc] (the sum stays zero)
    0x66, 0x4f,                                      // dec edi
    0xbe, 0xab, 0x7c,                                // mov si, 0x7c00+packet-entry
    0xc7, 0x44, 0x02, 0x01, 0x00,                    // mov word ptr [si+2], 1
    0xc6, 0x44, 0x05, 0x7e,                          // mov byte ptr [si+5], 0x7e
    0x66, 0x89, 0x7c, 0x08,                          // mov [si+8], edi
    0xb8, 0x00, 0x43,                                // mov ax, 0x4300 (write the last sector)
    0xcd, 0x13,                                      // int 0x13
    0xbe, 0xd1, 0x7c,                                // mov si, 0x7c00+ready-entry
    0x73, 0x03,                                      // jnc greet
    0xbe, 0xbb, 0x7c,                                // bad: mov si, 0x7c00+damaged-entry
    0xfa,                                            // greet: cli
    0xba, 0x02, 0x06,                                // mov dx, 0x602
    0xb8, 0x00, 0x01,                                // mov ax, 0x100 (power button enable)
    0xef,                                            // out dx, ax
    0xac,                                            // next: lodsb
    0x84, 0xc0,                                      // test al, al
    0x74, 0x10,                                      // jz wait
    0x50,                                            // push ax
    0xba, 0xfd, 0x03,                                // mov dx, 0x3fd
    0xec,                                            // full: in al, dx
    0xa8, 0x20,                                      // test al, 0x20 (room to send)
    0x74, 0xfb,                                      // jz full
    0x58,                                            // pop ax
    0xba, 0xf8, 0x03,                                // mov dx, 0x3f8
    0xee,                                            // out dx, al
    0xeb, 0xeb,                                      // jmp next
    0xba, 0x00, 0x06,                                // wait: mov dx, 0x600
    0xed,                                            // in ax, dx
    0xf6, 0xc4, 0x01,                                // test ah, 1 (power button status)
    0x74, 0xf7,                                      // jz wait
    0xba, 0x04, 0x06,                                // mov dx, 0x604
    0xb8, 0x00, 0x20,                                // mov ax, 0x2000 (sleep type 5)
    0xef,                                            // out dx, ax
    0xeb, 0xee,                                      // jmp wait
];

/// What the code finds behind itself, at fixed places: the request for 64 sectors, and two lines to
/// say.
fn data() -> Vec<u8> {
    let mut out = vec![16, 0, 64, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0];
    out.extend(format!("{DAMAGED}\r\n\0{}\r\n\0", cicada::broker::READY_LINE).bytes());
    out
}
