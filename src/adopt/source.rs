//! A disk from elsewhere, opened: raw as it lies, other formats unpacked to a raw temporary file.
//! Such a file is a stranger's: nothing it says may lead to another file of this machine.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tempfile::TempPath;

use crate::compose::{HANDED, ImageFormat};
use crate::types::ByteSize;
use crate::vm::spec::limit::DISK_BYTES;

use super::disk_file::DiskFile;
use super::error::io_error;
use super::formats::Head;
use super::recognise::{self, Disk};
use super::{AdoptError, Job, SIZE_UNIT_BYTES, Segments, damage};

/// Unpacking ends before less than this is free: others write to the repository too.
const FREE_BYTES_MIN: u64 = 256 << 20;
/// Names of snapshots that are told.
const SNAPSHOTS_MAX: usize = 100;
const POLL: Duration = Duration::from_millis(50);

/// A disk that can be read.
pub struct Source {
    given: DiskFile,
    format: ImageFormat,
    disk_bytes: u64,
    /// The raw temporary file of a disk in another format; removed when dropped.
    unpacked: Option<TempPath>,
    stamp: Stamp,
    /// Names of states inside the file, which stay behind.
    snapshots: Vec<String>,
    disk: Disk,
}

/// By what a change of the given file is noticed. Its content is compared as well, later.
#[derive(PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl Source {
    /// Opens `path`; `temporary` takes what has to be unpacked.
    pub fn open(
        path: &Path,
        format: Option<ImageFormat>,
        temporary: &Path,
        job: Job<'_>,
    ) -> Result<Self, AdoptError> {
        Self::of(DiskFile::open(path)?, format, temporary, job)
    }

    /// As [`Source::open`], of what somebody else opened at `path`.
    pub fn opened(
        path: &Path,
        file: &File,
        format: Option<ImageFormat>,
        temporary: &Path,
        job: Job<'_>,
    ) -> Result<Self, AdoptError> {
        Self::of(DiskFile::opened(path, file)?, format, temporary, job)
    }

    fn of(
        given: DiskFile,
        format: Option<ImageFormat>,
        temporary: &Path,
        job: Job<'_>,
    ) -> Result<Self, AdoptError> {
        let (path, mut file) = (given.path(), given.file());
        let not_one =
            |reason: &str| AdoptError::NotADisk { path: path.to_owned(), reason: reason.to_owned() };
        if !path.is_absolute() {
            return Err(not_one("its path must be absolute"));
        }
        let meta = file.metadata().map_err(io_error("inspect", path))?;
        let len = file.seek(SeekFrom::End(0)).map_err(io_error("measure", path))?;
        let stamp = Stamp { len, modified: meta.modified().ok() };
        let head = Head::read(file, len).map_err(io_error("read", path))?;
        let is_named = format.is_some();
        let format = format.unwrap_or_else(|| head.format());
        if format == ImageFormat::Raw
            && !is_named
            && let Some((what, hint)) = recognise::foreign(file, len).map_err(io_error("read", path))?
        {
            return Err(not_one(&format!("it is {what}; {hint}")));
        }
        if !head.bears(format) {
            return Err(not_one(&format!("it does not begin as a file of format {format} does")));
        }
        if let Some(other) = head.refers_to(format) {
            return Err(AdoptError::RefersElsewhere { path: path.to_owned(), other: other.to_owned() });
        }
        let damaged = |reason: String| AdoptError::Damaged { path: path.to_owned(), reason };
        if head.is_marked_corrupt(format) {
            return Err(damaged("it is marked as corrupt; 'qemu-img check -r all' may repair a copy".into()));
        }
        if head.is_open(format) {
            let reason = "it was not closed: 'qemu-img check -r all' makes its counts right again";
            return Err(damaged(reason.into()));
        }
        let (disk_bytes, unpacked, snapshots) = match format {
            ImageFormat::Raw => (len, None, Vec::new()),
            _ => {
                let disk = given.for_tools(temporary, job)?;
                let (size_bytes, snapshots) = inspect(&disk, format)?;
                check_size(path, size_bytes)?;
                damage::check(&disk, format, len, job)?;
                (size_bytes, Some(unpack(&disk, format, size_bytes, temporary, job)?), snapshots)
            }
        };
        check_size(path, disk_bytes)?;
        if disk_bytes == 0 {
            return Err(not_one("it is empty"));
        }
        let plain = match &unpacked {
            Some(unpacked) => &File::open(unpacked).map_err(io_error("open", unpacked))?,
            None => file,
        };
        let disk = recognise::disk(plain, disk_bytes).map_err(io_error("read", path))?;
        if disk.end_bytes > disk_bytes {
            return Err(damaged(format!(
                "it was cut short: it ends at byte {disk_bytes}, but what is on it at {} ({})",
                disk.end_bytes, disk.what
            )));
        }
        Ok(Self { given, format, disk_bytes, unpacked, stamp, snapshots, disk })
    }

    /// What the disk is, as far as it says.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    pub fn snapshots(&self) -> &[String] {
        &self.snapshots
    }

    /// Refuses what only its operator can know to be a disk, unless its format was named.
    pub fn check_plausible(&self) -> Result<(), AdoptError> {
        let reason = match recognise::broken_promise(self.path(), self.format) {
            Some(promised) => format!("its name ends in .{promised}, but it is no such file"),
            None if self.disk.is_known || self.format != ImageFormat::Raw => return Ok(()),
            None => "it has no partition table and no file system".into(),
        };
        let reason = format!("{reason}; if it is a raw disk nevertheless, say --format raw");
        Err(AdoptError::NotADisk { path: self.path().to_owned(), reason })
    }

    /// The file as it was given.
    pub fn path(&self) -> &Path {
        self.given.path()
    }

    pub fn format(&self) -> ImageFormat {
        self.format
    }

    /// Size of the disk as it was given.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// The disk for reading, padded to what a VM's disk may have.
    pub fn segments(&self) -> Result<Segments, AdoptError> {
        self.check_unchanged()?;
        match &self.unpacked {
            Some(unpacked) => Segments::of_file(unpacked),
            None => Segments::of_open(self.path(), self.given.file()),
        }
    }

    /// Refuses when the given file is not what it was when it was opened.
    pub fn check_unchanged(&self) -> Result<(), AdoptError> {
        let path = self.path();
        let meta = self.given.file().metadata().map_err(io_error("inspect", path))?;
        let len = if meta.is_file() { meta.len() } else { self.stamp.len };
        if (Stamp { len, modified: meta.modified().ok() }) == self.stamp {
            return Ok(());
        }
        Err(AdoptError::Changed { path: path.to_owned() })
    }
}

fn check_size(path: &Path, disk_bytes: u64) -> Result<(), AdoptError> {
    if disk_bytes <= DISK_BYTES && disk_bytes.next_multiple_of(SIZE_UNIT_BYTES) <= DISK_BYTES {
        return Ok(());
    }
    let (size, limit) = (ByteSize(disk_bytes), ByteSize(DISK_BYTES));
    Err(AdoptError::TooLarge { path: path.to_owned(), size, limit })
}

/// Asks `qemu-img` for the virtual size and the snapshots inside, refusing everything that names other
/// files.
fn inspect(disk: &DiskFile, format: ImageFormat) -> Result<(u64, Vec<String>), AdoptError> {
    let path = disk.path();
    let info = |sharing: &[&str]| {
        let format = format.to_string();
        let words = [&["info", "--output=json", "-f", &format], sharing].concat();
        let mut command = disk.qemu_img(&words)?;
        command.stdin(Stdio::null()).output().map_err(|e| not_run(path, &e))
    };
    let output = info(&[])?;
    let failed = |reason: String| AdoptError::Convert { path: path.to_owned(), reason };
    if !output.status.success() {
        // What can be read only beside a writer has one.
        if info(&["--force-share"])?.status.success() {
            return Err(AdoptError::InUse { path: path.to_owned() });
        }
        return Err(unreadable(path, said(path, &output)));
    }
    let info: Value = serde_json::from_slice(&output.stdout).map_err(|e| failed(e.to_string()))?;
    let data = &info["format-specific"]["data"];
    let refers = |other: String| AdoptError::RefersElsewhere { path: path.to_owned(), other };
    for name in ["backing-filename", "full-backing-filename"] {
        if let Some(other) = info[name].as_str() {
            return Err(refers(format!("the backing file '{}'", other.escape_debug())));
        }
    }
    if let Some(other) = data["data-file"].as_str() {
        return Err(refers(format!("the data file '{}'", other.escape_debug())));
    }
    for extent in data["extents"].as_array().into_iter().flatten() {
        match extent["filename"].as_str() {
            Some(HANDED) => {}
            other => {
                return Err(refers(format!("the extent '{}'", other.unwrap_or_default().escape_debug())));
            }
        }
    }
    if info["encrypted"].as_bool() == Some(true) {
        return Err(failed("it is encrypted: decrypt it where it came from".into()));
    }
    let snapshots = info["snapshots"].as_array().into_iter().flatten();
    let snapshots = snapshots.map(|s| s["name"].as_str().unwrap_or_default().escape_debug().to_string());
    let size = info["virtual-size"].as_u64();
    let size = size.ok_or_else(|| failed("it did not tell the size of the disk".into()))?;
    Ok((size, snapshots.take(SNAPSHOTS_MAX).collect()))
}

/// Unpacks into a sparse raw file.
fn unpack(
    disk: &DiskFile,
    format: ImageFormat,
    size_bytes: u64,
    temporary: &Path,
    job: Job<'_>,
) -> Result<TempPath, AdoptError> {
    let path = disk.path();
    let output = tempfile::Builder::new().prefix("adopt-").suffix(".raw").tempfile_in(temporary);
    let output = output.map_err(io_error("create a file in", temporary))?.into_temp_path();
    let mut command = disk.qemu_img(&["convert", "-f", &format.to_string(), "-O", "raw", "-S", "4k"])?;
    command.arg(&output).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Running(command.spawn().map_err(|e| not_run(path, &e))?);
    let status = loop {
        if let Some(status) = child.0.try_wait().map_err(io_error("wait for qemu-img reading", path))? {
            break status;
        }
        job.check()?;
        let made = fs::metadata(&output).map_or(0, |m| m.blocks() * 512);
        (job.progress)("unpack", made.min(size_bytes), size_bytes);
        require_room(temporary)?;
        thread::sleep(POLL);
    };
    if status.success() {
        return Ok(output);
    }
    let mut stderr = Vec::new();
    if let Some(pipe) = child.0.stderr.take() {
        let _ = pipe.take(4096).read_to_end(&mut stderr);
    }
    Err(unreadable(path, said(path, &Output { status, stdout: Vec::new(), stderr })))
}

/// Ends what writes to `dir` before it is full.
pub(super) fn require_room(dir: &Path) -> Result<(), AdoptError> {
    let free = rustix::fs::statvfs(dir).map_or(u64::MAX, |s| s.f_bavail * s.f_frsize);
    if free < FREE_BYTES_MIN {
        return Err(AdoptError::NoSpace { dir: dir.to_owned(), need_bytes: FREE_BYTES_MIN });
    }
    Ok(())
}

/// What `qemu-img` says of a file that lacks something, and of one it does not know to read.
fn unreadable(path: &Path, reason: String) -> AdoptError {
    const DAMAGE: [&str; 3] = ["truncated", "after end of file", "error while reading"];
    let path = path.to_owned();
    if reason.ends_with("No space left on device") {
        return AdoptError::Io { what: "unpack", path, source: rustix::io::Errno::NOSPC.into() };
    }
    match DAMAGE.iter().any(|words| reason.contains(words)) {
        true => AdoptError::Damaged { path, reason },
        false => AdoptError::Convert { path, reason },
    }
}

/// A child that does not outlive our interest in it.
pub(super) struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

pub(super) fn not_run(path: &Path, e: &std::io::Error) -> AdoptError {
    match e.kind() {
        std::io::ErrorKind::NotFound => AdoptError::NoQemuImg,
        _ => AdoptError::Convert { path: path.to_owned(), reason: e.to_string() },
    }
}

fn said(path: &Path, output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).replace(HANDED, &path.display().to_string());
    text.lines().next().unwrap_or("it failed without a word").escape_debug().to_string()
}
