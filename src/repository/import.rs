//! Importing an archive: every object is held against its hash before it is kept, whatever the
//! archive says. Names are not bound here: content needs no trust, names do.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::archive::{
    ArchiveError, ArchiveIndex, Header, INDEX_BYTES_MAX, INDEX_NAME, entry_name, padding, read_full,
    read_header,
};
use super::error::{ObjectId, RepositoryError};
use super::export::{ArchiveContent, GoOn, io_error};
use super::{Repository, records};
use crate::types::{ComponentId, PackId};

const PIECE_BYTES: usize = 256 << 10;
/// Refused objects listed one by one.
const REFUSED_MAX: usize = 1000;

type Result<T, E = ArchiveError> = std::result::Result<T, E>;

/// What an import did, up to its end or to where it failed.
#[derive(Debug, Default)]
pub struct ImportReport {
    pub content: ArchiveContent,
    pub stored: u64,
    pub stored_bytes: u64,
    /// Objects that were held already.
    pub skipped: u64,
    pub skipped_bytes: u64,
    /// Objects whose bytes are not what their id says, with the reason; nothing of them was kept.
    pub refused: Vec<(ObjectId, String)>,
    /// Refused objects beyond those listed.
    pub refused_more: u64,
    /// Components the archive calls by a name, and the name it gives them.
    pub names: Vec<(ComponentId, String)>,
}

/// Where the archive's bytes are.
enum Source {
    Tar {
        path: PathBuf,
        file: File,
        /// What is not wanted is passed over without reading.
        seekable: bool,
    },
    Tree {
        dir: PathBuf,
    },
}

struct Import<'a> {
    repository: &'a Repository,
    report: ImportReport,
    go_on: GoOn<'a>,
    done_bytes: u64,
    total_bytes: u64,
}

impl Repository {
    /// Takes what the archive at `path` (a tar file, a pipe that brings one, or a directory) holds
    /// and this repository lacks. A damaged object is refused and the rest taken; an archive of
    /// another shape than its index says ends the import there. What was stored stays.
    pub fn import(&self, path: &Path, go_on: GoOn<'_>) -> (ImportReport, Result<()>) {
        self.import_opened(path, None, go_on)
    }

    /// As [`Repository::import`], from what whoever asked has opened at `path`.
    pub fn import_opened(
        &self,
        path: &Path,
        opened: Option<&File>,
        go_on: GoOn<'_>,
    ) -> (ImportReport, Result<()>) {
        let mut import = Import {
            repository: self,
            report: ImportReport::default(),
            go_on,
            done_bytes: 0,
            total_bytes: 0,
        };
        let result = import.run(path, opened);
        (import.report, result)
    }
}

impl Import<'_> {
    fn run(&mut self, path: &Path, opened: Option<&File>) -> Result<()> {
        let mut source = Source::open(path, opened)?;
        let index = source.index()?;
        self.report.content = ArchiveContent::of(&index);
        self.report.names = index.names.clone();
        self.total_bytes = index.stored_bytes();
        let repository = self.repository;
        let _pin = repository.pin(index.objects.iter().map(|(object, _)| *object).collect());
        // What the manifests say of the packs, which come after them.
        let mut plain_sizes: HashMap<PackId, u64> = HashMap::new();
        let total = index.objects.len();
        for ((object, size), done) in index.objects.iter().zip(0..) {
            source.begin(object, *size, done, total)?;
            let file = repository.layout().object_path(object);
            if repository.renew(object, &file)? {
                source.pass_over(*size)?;
                self.report.skipped += 1;
                self.report.skipped_bytes += size;
            } else {
                self.take(&mut source, object, *size, &plain_sizes, (done, total))?;
            }
            if let ObjectId::Manifest(id) = object
                && let Some(summary) = repository.summary(id)?
            {
                plain_sizes.extend(summary.packs);
            }
            self.done_bytes += size;
            self.tell(0)?;
        }
        source.end(total)
    }

    fn take(
        &mut self,
        source: &mut Source,
        object: &ObjectId,
        size: u64,
        plain_sizes: &HashMap<PackId, u64>,
        (done, total): (usize, usize),
    ) -> Result<()> {
        let repository = self.repository;
        let mut entry = source.entry(object, size)?;
        let cut = |source: &Source| source.ended(object.to_string(), done, total);
        let stored = match object {
            ObjectId::Pack(id) => {
                let mut buffer = vec![0; PIECE_BYTES];
                let mut left = size;
                let mut receiver = Ok(repository.pack_receiver(*id, size)?);
                if let Some(plain) = plain_sizes.get(id) {
                    receiver = receiver.map(|r| r.expect_plain_size(*plain));
                }
                while left > 0 {
                    let n = left.min(PIECE_BYTES as u64) as usize;
                    if read_full(&mut entry, &mut buffer[..n]).map_err(|e| source.failed(e))? < n {
                        return Err(cut(source));
                    }
                    left -= n as u64;
                    receiver = receiver.and_then(|mut r| r.write(&buffer[..n]).map(|()| r));
                    self.tell(size - left)?;
                }
                receiver.and_then(|r| r.finish())
            }
            _ => {
                // The index states no more than a record may have; only what comes is allocated.
                let mut stored = Vec::new();
                (&mut entry).take(size).read_to_end(&mut stored).map_err(|e| source.failed(e))?;
                if (stored.len() as u64) < size {
                    return Err(cut(source));
                }
                match records::unpack(object, &stored) {
                    Ok(plain) => match object {
                        ObjectId::Manifest(id) => repository.put_manifest_bytes(id, &plain),
                        ObjectId::Recipe(id) => repository.put_recipe_bytes(id, &plain),
                        ObjectId::Pack(_) | ObjectId::Node(_) => Ok(()),
                    },
                    Err(reason) => Err(RepositoryError::Refused { object: *object, reason }),
                }
            }
        };
        drop(entry);
        source.end_of_entry(size)?;
        match stored {
            Ok(()) => {
                self.report.stored += 1;
                self.report.stored_bytes += size;
            }
            Err(e) if e.is_content_fault() => {
                tracing::warn!(%object, error = %e, "an archive's object was refused");
                if self.report.refused.len() < REFUSED_MAX {
                    self.report.refused.push((*object, reason_of(e)));
                } else {
                    self.report.refused_more += 1;
                }
            }
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    fn tell(&mut self, of_this_bytes: u64) -> Result<()> {
        match (self.go_on)(self.done_bytes + of_this_bytes, self.total_bytes) {
            true => Ok(()),
            false => Err(ArchiveError::Stopped),
        }
    }
}

impl Source {
    fn open(path: &Path, opened: Option<&File>) -> Result<Self> {
        let failed = |source| io_error("read", path, source);
        if opened.is_none() && path.is_dir() {
            return Ok(Source::Tree { dir: path.to_owned() });
        }
        let file = opened.map_or_else(|| File::open(path), File::try_clone).map_err(failed)?;
        let seekable = file.metadata().map_err(failed)?.is_file();
        Ok(Source::Tar { path: path.to_owned(), file, seekable })
    }

    fn path(&self) -> &Path {
        match self {
            Source::Tar { path, .. } => path,
            Source::Tree { dir } => dir,
        }
    }

    fn failed(&self, source: io::Error) -> ArchiveError {
        io_error("read", self.path(), source)
    }

    fn ended(&self, at: String, done: usize, total: usize) -> ArchiveError {
        ArchiveError::Ended { path: self.path().to_owned(), at, done, total }
    }

    fn index(&mut self) -> Result<ArchiveIndex> {
        let path = self.path().to_owned();
        let not_one = |reason: String| ArchiveError::NotAnArchive { path: path.clone(), reason };
        let (bytes, size) = match self {
            Source::Tree { dir } => {
                let file = dir.join(INDEX_NAME);
                let opened = match open_plain(&file) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        return Err(not_one(format!(
                            "'{INDEX_NAME}' is not in it; an export that was not finished has none"
                        )));
                    }
                    other => other.map_err(|e| io_error("read", &file, e))?,
                };
                let size = opened.metadata().map_err(|e| io_error("read", &file, e))?.len();
                let mut bytes = Vec::new();
                let read = opened.take(INDEX_BYTES_MAX).read_to_end(&mut bytes);
                read.map_err(|e| io_error("read", &file, e))?;
                (bytes, size)
            }
            Source::Tar { file, .. } => {
                let header = read_header(file).map_err(|e| io_error("read", &path, e))?;
                let size_bytes = match header {
                    Header::File { name, size_bytes } if name == INDEX_NAME => size_bytes,
                    Header::Eof => return Err(not_one("it is too short".into())),
                    _ => return Err(not_one(format!("it does not begin with '{INDEX_NAME}'"))),
                };
                let mut bytes = Vec::new();
                let read = file.take(size_bytes.min(INDEX_BYTES_MAX)).read_to_end(&mut bytes);
                read.map_err(|e| io_error("read", &path, e))?;
                (bytes, size_bytes)
            }
        };
        if size > INDEX_BYTES_MAX {
            return Err(not_one(format!("its index has {size} bytes, at most {INDEX_BYTES_MAX} are read")));
        }
        if (bytes.len() as u64) < size {
            return Err(self.ended("its index".into(), 0, 0));
        }
        self.end_of_entry(size)?;
        ArchiveIndex::decode(&bytes).map_err(|e| not_one(format!("its index is malformed: {e}")))
    }

    /// The object must come now, with this size.
    fn begin(&mut self, object: &ObjectId, size: u64, done: usize, total: usize) -> Result<()> {
        let Source::Tar { path, file, .. } = self else { return Ok(()) };
        let header = read_header(file).map_err(|e| io_error("read", path, e))?;
        let name = entry_name(object);
        let found = match header {
            Header::File { name: found, size_bytes } if found == name && size_bytes == size => return Ok(()),
            Header::File { name: found, size_bytes } => {
                format!("'{}' of {size_bytes} bytes", found.escape_debug())
            }
            Header::Other(what) => what,
            Header::End | Header::Eof => return Err(self.ended(object.to_string(), done, total)),
        };
        Err(ArchiveError::Unexpected {
            path: path.clone(),
            found,
            expected: format!("'{name}' of {size} bytes"),
        })
    }

    /// The object's bytes. A file of a directory must be plain and have the stated size.
    fn entry(&self, object: &ObjectId, size: u64) -> Result<Box<dyn Read>> {
        match self {
            Source::Tar { file, .. } => Ok(Box::new(file.try_clone().map_err(|e| self.failed(e))?)),
            Source::Tree { dir } => {
                let path = dir.join(entry_name(object));
                let file = open_plain(&path).map_err(|e| io_error("read", &path, e))?;
                let found_bytes = file.metadata().map_err(|e| io_error("read", &path, e))?.len();
                if found_bytes > size {
                    let (found, expected) =
                        (format!("{found_bytes} bytes"), format!("{size} bytes of {object}"));
                    return Err(ArchiveError::Unexpected { path, found, expected });
                }
                Ok(Box::new(file))
            }
        }
    }

    fn pass_over(&mut self, size: u64) -> Result<()> {
        let Source::Tar { path, file, seekable } = self else { return Ok(()) };
        let bytes = size + padding(size);
        let passed = match seekable {
            true => i64::try_from(bytes)
                .map_err(io::Error::other)
                .and_then(|n| file.seek(SeekFrom::Current(n)).map(drop)),
            // An end that comes too early is noticed at the next header.
            false => io::copy(&mut file.take(bytes), &mut io::sink()).map(drop),
        };
        passed.map_err(|e| io_error("read", path, e))
    }

    fn end_of_entry(&mut self, size: u64) -> Result<()> {
        let Source::Tar { path, file, .. } = self else { return Ok(()) };
        let mut rest = [0; 512];
        let n = padding(size) as usize;
        read_full(file, &mut rest[..n]).map(drop).map_err(|e| io_error("read", path, e))
    }

    /// Nothing may follow.
    fn end(&mut self, total: usize) -> Result<()> {
        let Source::Tar { path, file, .. } = self else { return Ok(()) };
        let found = match read_header(file).map_err(|e| io_error("read", path, e))? {
            Header::End => {
                // A writer at the other end of a pipe is let finish.
                return io::copy(&mut file.take(1 << 20), &mut io::sink())
                    .map(drop)
                    .map_err(|e| io_error("read", path, e));
            }
            Header::Eof => return Err(self.ended("its end marker".into(), total, total)),
            Header::File { name, .. } => format!("'{}'", name.escape_debug()),
            Header::Other(what) => what,
        };
        Err(ArchiveError::Unexpected { path: path.clone(), found, expected: "the end".into() })
    }
}

/// Opens a plain file: no links, and nothing that could block.
fn open_plain(path: &Path) -> io::Result<File> {
    use rustix::fs::OFlags;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags.cast_signed()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no plain file"));
    }
    Ok(file)
}

/// The object is named beside it.
fn reason_of(e: RepositoryError) -> String {
    match e {
        RepositoryError::Refused { reason, .. } => reason,
        RepositoryError::Codec { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}
