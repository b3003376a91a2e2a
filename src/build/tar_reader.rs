//! Tar archives, header by header: v7, ustar, GNU and star as far as they agree, and pax. What would
//! make a member something else than was packed is honoured or refuses the archive.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::component::manifest::limit;

use super::pax::{self, Extended};

const BLOCK_BYTES: u64 = 512;
type Block = [u8; BLOCK_BYTES as usize];

/// What a member is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// Where a file's content lies in the archive.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Place {
    pub size_bytes: u64,
    /// Offset in the file, length, offset in the archive; ascending. What is between them are holes.
    pub runs: Vec<(u64, u64, u64)>,
}

/// One member with all that headers said of it.
#[derive(Clone, Debug)]
pub struct Member {
    pub path: Vec<u8>,
    pub kind: Type,
    pub link: Vec<u8>,
    pub mode: u16,
    pub uid: u64,
    pub gid: u64,
    /// Names of the user and the group, empty if it does not say.
    pub owner_names: (Vec<u8>, Vec<u8>),
    pub mtime_s: i64,
    pub device: (u32, u32),
    pub extended: Extended,
    pub place: Place,
}

/// Why the next member cannot be read; with its path, as far as that is known.
pub struct Refused {
    pub path: Vec<u8>,
    pub reason: String,
    /// There are fewer bytes than the archive says.
    pub is_cut: bool,
}

/// Reads the members one after the other.
pub struct Members<'a> {
    file: &'a File,
    length_bytes: u64,
    at: u64,
    global: Extended,
    /// For refusals that concern no member yet.
    last_path: Vec<u8>,
    /// More was to be read than there is.
    ran_out: bool,
}

/// Whether this can be the first block of an archive: a header, or the end of an empty archive.
pub fn is_archive(first: &[u8]) -> bool {
    match Block::try_from(first) {
        Ok(block) => is_zero(&block) || checksum_fits(&block),
        Err(_) => false,
    }
}

impl<'a> Members<'a> {
    pub fn new(file: &'a File) -> io::Result<Self> {
        let length_bytes = file.metadata()?.len();
        Ok(Self {
            file,
            length_bytes,
            at: 0,
            global: Extended::default(),
            last_path: Vec::new(),
            ran_out: false,
        })
    }

    /// The next member, `None` at the end of the archive.
    pub fn next(&mut self) -> Result<Option<Member>, Refused> {
        self.read_next().map_err(|reason| Refused {
            path: self.last_path.clone(),
            reason,
            is_cut: self.ran_out,
        })
    }

    fn read_next(&mut self) -> Result<Option<Member>, String> {
        let mut extended = self.global.clone();
        let (mut long_path, mut long_link) = (None, None);
        // A header that is about the member behind it.
        let mut is_announced = false;
        loop {
            let block = self.block().map_err(|_| {
                "the archive has no end behind this: it was cut short, get it again as a whole".to_owned()
            })?;
            if is_zero(&block) {
                if is_announced {
                    return Err(
                        "a header that is of a member stands at the end: make the archive again".into()
                    );
                }
                return self.end().map(|()| None);
            }
            if !checksum_fits(&block) {
                return Err("what follows is no header: the archive is damaged, make it again".into());
            }
            let size_bytes = unsigned(&block[124..136])?;
            is_announced |= matches!(block[156], b'x' | b'L' | b'K');
            match block[156] {
                b'x' => {
                    let bytes = self.content(size_bytes, pax::HEADER_BYTES_MAX)?;
                    let taken = extended.take(&bytes, false);
                    // Whose header it is says the header itself, or the one behind it.
                    match &extended.path {
                        Some(path) => self.last_path.clone_from(path),
                        None if taken.is_err() => {
                            let next = self.block().unwrap_or(block);
                            self.last_path = header_path(&next);
                        }
                        None => {}
                    }
                    taken?;
                }
                b'g' => {
                    let bytes = self.content(size_bytes, pax::HEADER_BYTES_MAX)?;
                    self.global.take(&bytes, true)?;
                    extended.take(&bytes, true)?;
                }
                kind @ (b'L' | b'K') => {
                    let mut name = self.content(size_bytes, 2 * limit::PATH_BYTES)?;
                    while name.last() == Some(&0) {
                        name.pop();
                    }
                    if kind == b'L' {
                        self.last_path.clone_from(&name);
                        long_path = Some(name);
                    } else {
                        long_link = Some(name);
                    }
                }
                // The label of a volume.
                b'V' => self.skip(size_bytes)?,
                _ => return self.member(&block, size_bytes, extended, long_path, long_link).map(Some),
            }
        }
    }

    fn member(
        &mut self,
        block: &Block,
        header_size_bytes: u64,
        extended: Extended,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Member, String> {
        let sparse_name = extended.sparse.as_ref().and_then(|s| s.name.clone());
        let path = sparse_name.or_else(|| extended.path.clone()).or(long_path);
        let path = path.unwrap_or_else(|| header_path(block));
        self.last_path.clone_from(&path);
        let kind = match block[156] {
            // The oldest archives have no type of directories.
            0 | b'0' if path.last() == Some(&b'/') => Type::Directory,
            0 | b'0' | b'7' => Type::File,
            b'S' if is_gnu(block) => Type::File,
            b'1' => Type::HardLink,
            b'2' => Type::Symlink,
            b'3' => Type::CharDevice,
            b'4' => Type::BlockDevice,
            b'5' => Type::Directory,
            b'6' => Type::Fifo,
            b'D' | b'N' => {
                return Err(
                    "it is of an incremental backup: make the archive without --listed-incremental".into()
                );
            }
            b'M' => return Err("it goes on from another volume: make the archive in one piece".into()),
            other => {
                return Err(format!(
                    "members of type '{}' are not supported: make the archive with 'tar --format=posix'",
                    other.escape_ascii()
                ));
            }
        };
        if extended.sparse.is_some() && !(kind == Type::File && block[156] != b'S') {
            return Err("it is sparse in two ways, or no file: make the archive again".into());
        }
        let stored_bytes = extended.size_bytes.unwrap_or(header_size_bytes);
        let place = match kind {
            Type::File => self.place(block, stored_bytes, &extended)?,
            // Only files have content; some writers note a size with others, none stores it.
            _ if extended.size_bytes.unwrap_or(0) > 0 => {
                return Err("it has content, but is no file: make the archive again".into());
            }
            _ => Place::default(),
        };
        let link = extended.link.clone().or(long_link).unwrap_or_else(|| text(&block[157..257]));
        let has_names = &block[257..262] == b"ustar";
        let owner = |field: &[u8]| if has_names { text(field) } else { Vec::new() };
        let device = |field: &[u8], given: Option<u32>| match given {
            Some(number) => Ok(number),
            None => u32::try_from(unsigned(field)?).map_err(|_| "its device number is too large".to_owned()),
        };
        let device = match kind {
            // The oldest format has no such fields.
            Type::CharDevice | Type::BlockDevice if &block[257..262] == b"ustar" => {
                (device(&block[329..337], extended.device.0)?, device(&block[337..345], extended.device.1)?)
            }
            Type::CharDevice | Type::BlockDevice => return Err("it is a device without a number".into()),
            _ => (0, 0),
        };
        Ok(Member {
            path,
            kind,
            link,
            mode: (unsigned(&block[100..108])? & 0o7777) as u16,
            uid: extended.uid.map_or_else(|| unsigned(&block[108..116]), Ok)?,
            gid: extended.gid.map_or_else(|| unsigned(&block[116..124]), Ok)?,
            owner_names: (
                extended.uname.clone().unwrap_or_else(|| owner(&block[265..297])),
                extended.gname.clone().unwrap_or_else(|| owner(&block[297..329])),
            ),
            mtime_s: extended.mtime_s.map_or_else(|| number(&block[136..148]), Ok)?,
            device,
            extended,
            place,
        })
    }

    /// Where a file's content lies; moves on behind it.
    fn place(&mut self, block: &Block, stored_bytes: u64, extended: &Extended) -> Result<Place, String> {
        let (size_bytes, runs) = if block[156] == b'S' {
            let runs = self.old_map(block)?;
            (unsigned(&block[483..495])?, runs)
        } else if let Some(sparse) = &extended.sparse {
            let size_bytes = sparse.size_bytes.ok_or("it is sparse without a size")?;
            if sparse.map_is_in_content() {
                let end = self.at.checked_add(stored_bytes).ok_or_else(cut)?;
                let runs = self.map_in_content(end)?;
                return self.sparse_place(size_bytes, end - self.at.min(end), runs);
            }
            (size_bytes, sparse.runs()?)
        } else {
            let place = Place { size_bytes: stored_bytes, runs: vec![(0, stored_bytes, self.at)] };
            self.skip(stored_bytes)?;
            return Ok(place);
        };
        self.sparse_place(size_bytes, stored_bytes, runs)
    }

    fn sparse_place(
        &mut self,
        size_bytes: u64,
        stored_bytes: u64,
        runs: Vec<(u64, u64)>,
    ) -> Result<Place, String> {
        let bad = || "its map of a sparse file does not fit its content: make the archive again".to_owned();
        let mut place = Place { size_bytes, runs: Vec::new() };
        let (mut reached, mut used) = (0, 0u64);
        for (offset, length) in runs {
            if offset < reached || offset.checked_add(length).is_none_or(|end| end > size_bytes) {
                return Err(bad());
            }
            reached = offset + length;
            if length > 0 {
                place.runs.push((offset, length, self.at.checked_add(used).ok_or_else(bad)?));
                used = used.checked_add(length).ok_or_else(bad)?;
            }
        }
        if used != stored_bytes {
            return Err(bad());
        }
        self.skip(stored_bytes)?;
        Ok(place)
    }

    /// The map of GNU tar's own format: four runs in the header, 21 in each block behind it.
    fn old_map(&mut self, block: &Block) -> Result<Vec<(u64, u64)>, String> {
        const RUNS_MAX: usize = 1 << 20;
        let mut runs = Vec::new();
        let take = |entries: &[u8], runs: &mut Vec<(u64, u64)>| -> Result<(), String> {
            for entry in entries.chunks_exact(24).take_while(|e| e[0] != 0) {
                runs.push((unsigned(&entry[..12])?, unsigned(&entry[12..])?));
            }
            Ok(())
        };
        take(&block[386..482], &mut runs)?;
        let mut goes_on = block[482] != 0;
        while goes_on {
            let more = self.block().map_err(|_| cut())?;
            take(&more[..504], &mut runs)?;
            goes_on = more[504] != 0;
            if runs.len() > RUNS_MAX {
                return Err(format!("its map of a sparse file has more than {RUNS_MAX} runs"));
            }
        }
        Ok(runs)
    }

    /// The map that precedes the content, padded to whole blocks.
    fn map_in_content(&mut self, end: u64) -> Result<Vec<(u64, u64)>, String> {
        let mut buffer: VecDeque<u8> = VecDeque::new();
        pax::map_of_content(&mut || {
            let mut line = Vec::new();
            loop {
                match buffer.pop_front() {
                    Some(b'\n') => return Ok(line),
                    Some(_) if line.len() >= 20 => return Err("its map of a sparse file is malformed".into()),
                    Some(byte) => line.push(byte),
                    None if self.at >= end => return Err("its map of a sparse file has no end".into()),
                    None => buffer.extend(self.block().map_err(|_| cut())?),
                }
            }
        })
    }

    fn block(&mut self) -> io::Result<Block> {
        let mut block = [0; BLOCK_BYTES as usize];
        if self.length_bytes.saturating_sub(self.at) < BLOCK_BYTES {
            self.ran_out = true;
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(&mut block, self.at)?;
        self.at += BLOCK_BYTES;
        Ok(block)
    }

    /// The content of a header's own member.
    fn content(&mut self, size_bytes: u64, limit_bytes: u64) -> Result<Vec<u8>, String> {
        if size_bytes > limit_bytes {
            return Err(format!("an extended header of {size_bytes} bytes is too long"));
        }
        if self.length_bytes.saturating_sub(self.at) < size_bytes {
            self.ran_out = true;
            return Err(cut());
        }
        let mut bytes = vec![0; size_bytes as usize];
        self.file.read_exact_at(&mut bytes, self.at).map_err(|e| e.to_string())?;
        self.skip(size_bytes)?;
        Ok(bytes)
    }

    fn skip(&mut self, size_bytes: u64) -> Result<(), String> {
        let end = self.at.checked_add(size_bytes).filter(|end| *end <= self.length_bytes);
        self.ran_out |= end.is_none();
        let end = end.ok_or_else(cut)?;
        self.at = end.checked_next_multiple_of(BLOCK_BYTES).ok_or_else(cut)?;
        Ok(())
    }

    /// Behind the end there is only padding: archives that follow would be left out in silence.
    fn end(&mut self) -> Result<(), String> {
        let mut buffer = vec![0; 1 << 20];
        let mut at = self.at;
        while at < self.length_bytes {
            let take = buffer.len().min((self.length_bytes - at) as usize);
            self.file.read_exact_at(&mut buffer[..take], at).map_err(|e| e.to_string())?;
            if buffer[..take].iter().any(|b| *b != 0) {
                return Err("something follows the end of the archive: if that is another archive, import \
                            it as a component of its own"
                    .into());
            }
            at += take as u64;
        }
        Ok(())
    }
}

fn cut() -> String {
    "the archive ends before its content: it was cut short, get it again as a whole".into()
}

fn is_zero(block: &Block) -> bool {
    block.iter().all(|b| *b == 0)
}

fn is_gnu(block: &Block) -> bool {
    &block[257..265] == b"ustar  \0"
}

/// The sum of all bytes, the field of the sum itself counting as blanks. Some old writers summed
/// signed bytes.
fn checksum_fits(block: &Block) -> bool {
    let Ok(said) = number(&block[148..156]) else { return false };
    let (mut unsigned, mut signed) = (0i64, 0i64);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    said == unsigned || said == signed
}

/// Name and prefix of a header, where it has the latter.
fn header_path(block: &Block) -> Vec<u8> {
    let name = text(&block[..100]);
    // star ends its shorter prefix with times, and says so at the end of the block.
    let prefix = match &block[257..263] {
        b"ustar\0" if &block[508..512] == b"tar\0" => text(&block[345..476]),
        b"ustar\0" => text(&block[345..500]),
        _ => Vec::new(),
    };
    if prefix.is_empty() { name } else { [&prefix[..], b"/", &name].concat() }
}

/// What precedes the first NUL.
fn text(field: &[u8]) -> Vec<u8> {
    field.split(|b| *b == 0).next().unwrap_or_default().to_vec()
}

fn unsigned(field: &[u8]) -> Result<u64, String> {
    u64::try_from(number(field)?).map_err(|_| "its header has a negative number".to_owned())
}

/// Octal digits, or GNU tar's two's complement in base 256.
fn number(field: &[u8]) -> Result<i64, String> {
    let too_large = || "its header has a number that is too large".to_owned();
    match field.first() {
        Some(first @ (0x80..)) => {
            let is_negative = first & 0x40 != 0;
            let mut value = i128::from(if is_negative { *first } else { first & 0x7f });
            if is_negative {
                value -= 0x100;
            }
            for byte in &field[1..] {
                value = value << 8 | i128::from(*byte);
            }
            i64::try_from(value).map_err(|_| too_large())
        }
        _ => {
            let digits = text(field);
            let digits = digits.trim_ascii();
            if digits.is_empty() {
                return Ok(0);
            }
            if !digits.iter().all(|b| (b'0'..=b'7').contains(b)) {
                return Err("its header has a number that is none".into());
            }
            let digits = str::from_utf8(digits).unwrap_or_default();
            i64::from_str_radix(digits, 8).map_err(|_| too_large())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_in_base_256() {
        assert_eq!(number(b"0000644\0").unwrap(), 0o644);
        assert_eq!(number(b"   644 \0").unwrap(), 0o644);
        assert_eq!(number(b"\0\0\0\0\0\0\0\0").unwrap(), 0);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]).unwrap(), 65536);
        // 1960-01-01, as GNU tar writes it.
        let before = (-315_619_200i64).to_be_bytes();
        assert_eq!(number(&[&[0xff; 4][..], &before].concat()).unwrap(), -315_619_200);
        assert!(number(b"0000648\0").is_err());
        assert!(number(&[0xbf; 12]).is_err());
        assert!(unsigned(&[0xff; 12]).is_err());
    }
}
