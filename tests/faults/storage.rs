//! A small file system of its own for a cloud's data, which can be full, or turn read-only as it
//! does after an error of its disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FallocateFlags, fallocate};

/// A target asks for more than it will need.
const SIZE_MIB: u64 = 384;

pub struct Storage {
    image: PathBuf,
    at: PathBuf,
}

impl Storage {
    /// None where nothing can be mounted.
    pub fn mount(image: &Path, at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        File::create(image).unwrap().set_len(SIZE_MIB << 20).unwrap();
        let storage = Self { image: image.to_owned(), at: at.to_owned() };
        // No part of it is kept for root.
        (run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(image)) && storage.attach())
            .then_some(storage)
    }

    fn attach(&self) -> bool {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.at))
    }

    pub fn fill(&self) {
        let file = File::create(self.filler()).unwrap();
        let mut at = 0;
        for step in [64 << 20, 1 << 20, 4096] {
            while fallocate(&file, FallocateFlags::empty(), at, step).is_ok() {
                at += step;
            }
        }
        file.sync_all().unwrap();
    }

    pub fn free(&self) {
        let _ = fs::remove_file(self.filler());
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }

    /// What the kernel does when it no longer trusts the disk; open files are no hindrance.
    pub fn turn_read_only(&self) {
        assert!(run(Command::new("mount").args(["-o", "remount,abort"]).arg(&self.at)));
        assert!(File::create(self.filler()).is_err(), "it can still be written");
    }

    /// Whoever had files open was killed, and may still be on its way out: until the last of them is gone the
    /// loop device stays, and a mount of the same image would be the same distrusted file system again.
    pub fn repair(&self) {
        let unmounted = crate::pair::comes(20, || run(Command::new("umount").arg(&self.at)));
        assert!(unmounted, "{} is in use", self.at.display());
        assert!(
            crate::pair::comes(20, || !self.has_loop()),
            "the loop device of {} stays",
            self.image.display()
        );
        let _ = run(Command::new("e2fsck").arg("-fp").arg(&self.image));
        assert!(self.attach());
        File::create(self.filler()).expect("a repaired file system can be written");
        self.free();
    }

    fn has_loop(&self) -> bool {
        let listed = Command::new("losetup").arg("-j").arg(&self.image).output().unwrap();
        assert!(listed.status.success(), "losetup: {}", String::from_utf8_lossy(&listed.stderr));
        !listed.stdout.is_empty()
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-l").arg(&self.at));
    }
}

fn run(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}
