//! A small initial RAM disk of our own making, for test guests: a static busybox, an init script and
//! the kernel modules it loads. Every byte follows from the inputs.
//! Format: the "newc" archive of `Documentation/driver-api/early-userspace/buffer-format.rst`.

/// A newc archive being written.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const SYMBOLIC_LINK: u32 = 0o120_000;
/// Archives are padded to this, as cpio does.
const BLOCK_BYTES: usize = 512;

impl Archive {
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, &[], (0, 0));
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, REGULAR | mode, content, (0, 0));
    }

    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, SYMBOLIC_LINK | 0o777, target.as_bytes(), (0, 0));
    }

    pub fn character_device(&mut self, path: &str, mode: u32, device: (u32, u32)) {
        self.entry(path, CHARACTER_DEVICE | mode, &[], device);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.header("TRAILER!!!", 0, 0, (0, 0));
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.inode += 1;
        self.header(path, mode, content.len() as u32, device);
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn header(&mut self, path: &str, mode: u32, size_bytes: u32, (major, minor): (u32, u32)) {
        let (inode, links, name_bytes) = (self.inode, 1, path.len() as u32 + 1);
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device of the file (2), of the node (2), name, checksum
        for field in [inode, mode, 0, 0, links, 0, size_bytes, 0, 0, major, minor, name_bytes, 0] {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The archive of an initial RAM disk. Modules are loaded by number, so their order is kept.
pub fn build(busybox: &[u8], init: &[u8], modules: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Archive::default();
    for path in ["bin", "dev", "modules", "proc", "root", "sys"] {
        archive.directory(path);
    }
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.file("bin/busybox", 0o755, busybox);
    archive.link("bin/sh", "busybox");
    archive.file("init", 0o755, init);
    for (number, (name, content)) in modules.iter().enumerate() {
        archive.file(&format!("modules/{number:02}-{name}.ko"), 0o644, content);
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_the_same_every_time_and_well_formed() {
        let modules = vec![("virtio".to_owned(), vec![1, 2, 3])];
        let bytes = build(b"busybox", b"#!/bin/sh\n", &modules);
        assert_eq!(bytes, build(b"busybox", b"#!/bin/sh\n", &modules));
        assert_eq!(bytes.len() % BLOCK_BYTES, 0);
        let mut names = Vec::new();
        let mut at = 0;
        while names.last().is_none_or(|n| n != "TRAILER!!!") {
            let header = &bytes[at..at + 110];
            assert_eq!(&header[..6], b"070701");
            let field = |n: usize| {
                usize::from_str_radix(std::str::from_utf8(&header[6 + 8 * n..14 + 8 * n]).unwrap(), 16)
                    .unwrap()
            };
            let content = (at + 110 + field(11)).next_multiple_of(4);
            names.push(String::from_utf8(bytes[at + 110..at + 109 + field(11)].to_vec()).unwrap());
            at = (content + field(6)).next_multiple_of(4);
        }
        assert_eq!(names[6..10], ["dev/console", "bin/busybox", "bin/sh", "init"]);
        assert_eq!(names[10], "modules/00-virtio.ko");
    }
}
