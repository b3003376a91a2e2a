//! VM disks end to end: what a guest (here `qemu-io`) wrote is scanned, staged elsewhere and must
//! read the same there, by our reader and by QEMU's; a second pass brings only the differences.

mod again;
mod live;
mod qemu;
mod round_trip;
mod staging;

use std::path::{Path, PathBuf};

/// A repeatable stream of odd numbers and bytes.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.roll() >> 32) as u8).collect()
    }
}

/// A composition's stand-in: data, zeros, and repeated blocks.
pub fn make_base(dir: &Path, size: u64, seed: u64) -> PathBuf {
    let mut dice = Dice::new(seed);
    let repeated = dice.bytes(4096);
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        match dice.below(3) {
            0 => bytes.resize(bytes.len() + 4096 * (1 + dice.below(40) as usize), 0),
            1 => bytes.extend(&repeated),
            _ => bytes.extend(dice.bytes(4096)),
        }
    }
    bytes.truncate(size as usize);
    let path = dir.join("base.raw");
    std::fs::write(&path, bytes).unwrap();
    path
}
