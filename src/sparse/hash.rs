//! The BLAKE3 hash of content with holes: that of the plain bytes, without going over the zeros.
//!
//! BLAKE3 is a tree: a piece of 2^n KiB has a chaining value, which follows from its bytes and from where it
//! lies, and two neighbours' values give that of both. So what zeros give at a place is always the same: it is
//! looked up, and where it is not in the table, worked out once.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use super::{Content, Run, ZEROS, is_zero};
use crate::types::Hash;

/// What is hashed in one go.
const PIECE_BYTES: u64 = 1 << 20;
/// Level of the table: pieces of 1 GiB.
const TABLE_LEVEL: u32 = 10;
/// Chaining values of zeros, 32 bytes each: number n is that of the GiB that begins at n GiB.
static TABLE: &[u8] = include_bytes!("zeros.bin");
/// From this level on, pieces of 64 MiB, what was worked out is kept: no pack has more than 65,536 of them.
const KEPT_LEVEL: u32 = 6;

/// Hashes as `blake3::Hasher` does, holes at the cost of a look.
pub struct SparseHasher {
    /// Whole pieces that others follow: level and chaining value, the largest first, no two of a level.
    whole: Vec<(u32, ChainingValue)>,
    /// Where the piece under way begins.
    begin_bytes: u64,
    /// It is not empty unless everything is.
    piece: blake3::Hasher,
    /// Zeros at the end that are not hashed yet.
    zeros_bytes: u64,
}

impl Default for SparseHasher {
    fn default() -> Self {
        Self { whole: Vec::new(), begin_bytes: 0, piece: blake3::Hasher::new(), zeros_bytes: 0 }
    }
}

impl SparseHasher {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn update(&mut self, mut bytes: &[u8]) {
        self.take_zeros();
        while !bytes.is_empty() {
            let room = self.room_bytes();
            let (now, later) = bytes.split_at(bytes.len().min(room as usize));
            self.piece.update(now);
            bytes = later;
        }
    }

    pub fn update_zeros(&mut self, len_bytes: u64) {
        self.zeros_bytes += len_bytes;
    }

    pub fn update_run(&mut self, run: Run<'_>) {
        match run {
            Run::Data(bytes) => self.update(bytes),
            Run::Zeros(len) => self.update_zeros(len),
        }
    }

    /// All of it up to its end.
    pub fn update_content(&mut self, content: &mut dyn Content) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES as usize];
        loop {
            self.update_zeros(content.skip_hole(u64::MAX)?);
            match content.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(n) if is_zero(&piece[..n]) => self.update_zeros(n as u64),
                Ok(n) => self.update(&piece[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    pub fn finalize(mut self) -> Hash {
        self.take_zeros();
        let Some((_, first)) = self.whole.first().copied() else { return self.piece.finalize().into() };
        let mut right = self.piece.finalize_non_root();
        for (_, left) in self.whole.drain(1..).rev() {
            right = merge_subtrees_non_root(&left, &right, Mode::Hash);
        }
        merge_subtrees_root(&first, &right, Mode::Hash).into()
    }

    /// What the piece under way still takes; it is ended if it is full. Asked only when more comes.
    fn room_bytes(&mut self) -> u64 {
        if self.piece.count() == PIECE_BYTES {
            let value = self.piece.finalize_non_root();
            self.add(0, value);
        }
        PIECE_BYTES - self.piece.count()
    }

    fn take_zeros(&mut self) {
        let mut left = std::mem::take(&mut self.zeros_bytes);
        while left > 0 {
            let room = self.room_bytes();
            // The last piece stays one under way: only then is it known not to be the root.
            if room == PIECE_BYTES && left > PIECE_BYTES {
                let aligned = (self.begin_bytes / PIECE_BYTES).trailing_zeros();
                let level = aligned.min(((left - 1) / PIECE_BYTES).ilog2());
                let value = zeros(self.begin_bytes, level);
                self.add(level, value);
                left -= PIECE_BYTES << level;
            } else {
                let take = left.min(room);
                update_zeros(&mut self.piece, take);
                left -= take;
            }
        }
    }

    /// Adds a whole piece of `2^level` MiB that something follows.
    fn add(&mut self, mut level: u32, mut value: ChainingValue) {
        self.begin_bytes += PIECE_BYTES << level;
        while let Some((_, left)) = self.whole.pop_if(|(other, _)| *other == level) {
            value = merge_subtrees_non_root(&left, &value, Mode::Hash);
            level += 1;
        }
        self.whole.push((level, value));
        self.piece = blake3::Hasher::new();
        self.piece.set_input_offset(self.begin_bytes);
    }
}

fn update_zeros(hasher: &mut blake3::Hasher, mut len_bytes: u64) {
    while len_bytes > 0 {
        let take = len_bytes.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..take as usize]);
        len_bytes -= take;
    }
}

/// The chaining value of `2^level` MiB of zeros that begin at `offset_bytes`, a multiple of that.
fn zeros(offset_bytes: u64, level: u32) -> ChainingValue {
    static KEPT: Mutex<Option<HashMap<(u64, u32), ChainingValue>>> = Mutex::new(None);
    if level == TABLE_LEVEL
        && let (values, _) = TABLE.as_chunks::<{ blake3::OUT_LEN }>()
        && let Some(value) = values.get((offset_bytes / (PIECE_BYTES << TABLE_LEVEL)) as usize)
    {
        return *value;
    }
    let kept = || KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (offset_bytes, level);
    if let Some(value) = kept().as_ref().and_then(|k| k.get(&key)) {
        return *value;
    }
    let value = worked_out(offset_bytes, level);
    if level >= KEPT_LEVEL {
        kept().get_or_insert_default().insert(key, value);
    }
    value
}

fn worked_out(offset_bytes: u64, level: u32) -> ChainingValue {
    if level == 0 {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(offset_bytes);
        update_zeros(&mut hasher, PIECE_BYTES);
        return hasher.finalize_non_root();
    }
    let half = level - 1;
    let middle = offset_bytes + (PIECE_BYTES << half);
    let (left, right) = rayon::join(|| zeros(offset_bytes, half), || zeros(middle, half));
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(runs: &[Run<'_>]) -> Hash {
        let mut hasher = blake3::Hasher::new();
        for run in runs {
            match run {
                Run::Data(bytes) => drop(hasher.update(bytes)),
                Run::Zeros(len) => update_zeros(&mut hasher, *len),
            }
        }
        hasher.finalize().into()
    }

    fn sparse(runs: &[Run<'_>]) -> Hash {
        let mut hasher = SparseHasher::new();
        runs.iter().for_each(|run| hasher.update_run(*run));
        hasher.finalize()
    }

    #[test]
    fn whatever_is_a_hole_the_hash_is_that_of_the_bytes() {
        let mib = 1 << 20;
        for len in
            [0, 1, 1023, 1024, 1025, mib - 1, mib, mib + 1, 2 * mib, 3 * mib, 4 * mib, 4 * mib + 1, 37 * mib]
        {
            for runs in [
                vec![Run::Zeros(len)],
                vec![Run::Data(b"x"), Run::Zeros(len)],
                vec![Run::Zeros(len), Run::Data(b"x")],
                vec![Run::Zeros(len), Run::Zeros(len), Run::Data(&[7; 5000]), Run::Zeros(len)],
            ] {
                assert_eq!(sparse(&runs), plain(&runs), "{len}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_mixture_hashes_as_its_bytes(lens in prop::collection::vec((any::<bool>(), 0u64..6 << 20), 0..6)) {
            let bytes: Vec<u8> = (0..6 << 20).map(|n: u32| (n % 251) as u8).collect();
            let runs: Vec<_> = lens
                .iter()
                .map(|(hole, len)| if *hole { Run::Zeros(*len) } else { Run::Data(&bytes[..*len as usize]) })
                .collect();
            prop_assert_eq!(sparse(&runs), plain(&runs));
        }
    }

    /// The chaining value of entry `n`, by the library alone.
    fn entry(n: u64) -> ChainingValue {
        let gib = PIECE_BYTES << TABLE_LEVEL;
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(n * gib);
        update_zeros(&mut hasher, gib);
        hasher.finalize_non_root()
    }

    #[test]
    fn the_table_has_what_zeros_give() {
        let (values, rest) = TABLE.as_chunks::<{ blake3::OUT_LEN }>();
        assert_eq!((values.len(), rest.len()), (1024, 0));
        for n in [0, 1, 777, 1023] {
            assert_eq!(values[n as usize], entry(n), "{n}");
        }
        // Two holes beyond a gigabyte, as the library hashes them.
        let runs = [Run::Zeros((2 << 30) + 5), Run::Data(b"between"), Run::Zeros(1 << 30)];
        assert_eq!(sparse(&runs), plain(&runs));
    }

    /// Writes the table anew: `cargo test --release --lib the_table_is_made -- --ignored`.
    #[test]
    #[ignore = "hashes a tebibyte of zeros"]
    fn the_table_is_made() {
        use rayon::prelude::*;
        let table: Vec<u8> = (0..1024u64).into_par_iter().flat_map_iter(entry).collect();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/sparse/zeros.bin");
        std::fs::write(path, &table).unwrap();
    }
}
