//! Files whose file system keeps account of their holes.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::Content;

/// Where a file's data lies, as far as that was asked for.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Holes {
    /// What was asked for last: data up to its end, and a hole before it from where it was asked for.
    data: Range<u64>,
    from: u64,
}

impl Holes {
    /// How long the hole is that `offset` lies in; 0 where data is, or may be.
    pub fn len_at(&mut self, file: &File, offset: u64) -> io::Result<u64> {
        if !(self.from..self.data.end).contains(&offset) {
            self.data = next_data(file, offset)?;
            self.from = offset;
        }
        Ok(self.data.start.saturating_sub(offset))
    }
}

/// The data that ends behind `at`, up to the next hole. Without any, and where the file system keeps no account,
/// all from there, or from the end, on.
fn next_data(file: &File, at: u64) -> io::Result<Range<u64>> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(begin) => begin..rustix::fs::seek(file, SeekFrom::Hole(begin)).unwrap_or(u64::MAX),
        // No data any more: a hole up to the end.
        Err(Errno::NXIO) => file.metadata()?.len().max(at)..u64::MAX,
        Err(_) => at..u64::MAX,
    };
    // Files of /proc and the like know of no data, and have some.
    Ok(if data.end <= at { at..u64::MAX } else { data })
}

/// The runs of a range of a file that are not holes, ascending.
pub fn data_runs(file: &File, range: Range<u64>) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let data = match next_data(file, at) {
            Ok(data) => data.start.max(at)..data.end.min(range.end),
            Err(e) => {
                at = range.end;
                return Some(Err(e));
            }
        };
        at = data.end.max(at + 1);
        (data.start < data.end).then_some(Ok(data))
    })
}

/// Gives the bytes of a file; where the file system knows of a hole, zeros without asking it for them.
pub struct SparseFile {
    file: File,
    at: u64,
    holes: Holes,
}

impl SparseFile {
    pub fn new(file: File) -> Self {
        Self { file, at: 0, holes: Holes::default() }
    }
}

impl Read for SparseFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let hole = self.skip_hole(buffer.len() as u64)?;
        if hole > 0 {
            buffer[..hole as usize].fill(0);
            return Ok(hole as usize);
        }
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Content for SparseFile {
    fn skip_hole(&mut self, most_bytes: u64) -> io::Result<u64> {
        let hole = self.holes.len_at(&self.file, self.at)?.min(most_bytes);
        self.at += hole;
        Ok(hole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[7; 5000], 1 << 20).unwrap();
        file.write_all_at(b"end", (3 << 20) - 3).unwrap();
        file.set_len((4 << 20) + 5).unwrap();
        file
    }

    #[test]
    fn holes_are_zeros_and_data_is_itself() {
        let mut file = sparse();
        let mut expected = Vec::new();
        file.read_to_end(&mut expected).unwrap();
        let mut found = Vec::new();
        SparseFile::new(file).read_to_end(&mut found).unwrap();
        assert!(found == expected);
        let mut nothing = Vec::new();
        SparseFile::new(tempfile::tempfile().unwrap()).read_to_end(&mut nothing).unwrap();
        assert!(nothing.is_empty());
        let mut proc = String::new();
        SparseFile::new(File::open("/proc/self/status").unwrap()).read_to_string(&mut proc).unwrap();
        assert!(proc.contains("Pid:"));
    }

    #[test]
    fn holes_are_passed_over_as_far_as_is_asked_for() {
        let mut file = SparseFile::new(sparse());
        assert_eq!(file.skip_hole(1000).unwrap(), 1000);
        assert_eq!(file.skip_hole(u64::MAX).unwrap(), (1 << 20) - 1000);
        assert_eq!(file.skip_hole(u64::MAX).unwrap(), 0);
        let mut byte = [0];
        file.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn runs_of_data_lie_in_the_range_and_hold_all_of_it() {
        let file = sparse();
        let runs = |range| data_runs(&file, range).collect::<io::Result<Vec<_>>>().unwrap();
        let all = runs(0..(4 << 20) + 5);
        assert!(
            all.iter().all(|r| r.start % 4096 == 0) && all.windows(2).all(|w| w[0].end <= w[1].start),
            "{all:?}"
        );
        for byte in [1 << 20, (1 << 20) + 4999, (3 << 20) - 1] {
            assert!(all.iter().any(|r| r.contains(&byte)), "{all:?}");
        }
        let within = (1 << 20) + 10..(1 << 20) + 20;
        assert_eq!(runs(within.clone()), vec![within]);
        assert_eq!(runs(10..20), []);
        assert_eq!(runs(7..7), []);
    }
}
