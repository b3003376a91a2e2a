//! The last step to other hypervisors: a composition in their disk format.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use command_fds::{CommandFdExt, FdMapping};

use super::error::ComposeError;

/// Formats `qemu-img` writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageFormat {
    Raw,
    Qcow2,
    Vmdk,
    Vhdx,
    Vpc,
    Vdi,
}

impl ImageFormat {
    pub const ALL: [ImageFormat; 6] = [
        ImageFormat::Raw,
        ImageFormat::Qcow2,
        ImageFormat::Vmdk,
        ImageFormat::Vhdx,
        ImageFormat::Vpc,
        ImageFormat::Vdi,
    ];
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Vmdk => "vmdk",
            ImageFormat::Vhdx => "vhdx",
            ImageFormat::Vpc => "vpc",
            ImageFormat::Vdi => "vdi",
        })
    }
}

impl FromStr for ImageFormat {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        ImageFormat::ALL
            .into_iter()
            .find(|f| f.to_string() == s)
            .ok_or_else(|| format!("'{s}' is not one of raw, qcow2, vmdk, vhdx, vpc, vdi"))
    }
}

/// Why nothing can be written at `output`: what is there is never replaced, nor what is being written.
pub fn occupied(output: &Path) -> Option<&'static str> {
    let unfinished = || part_of(output).symlink_metadata().ok();
    taken(output).or_else(|| {
        unfinished().map(|_| {
            "has a .part beside it, which is being written or was cut off: name another file, or remove that if \
             nothing writes it"
        })
    })
}

/// What is written until it has its name.
pub fn part_of(output: &Path) -> PathBuf {
    let mut part = output.as_os_str().to_owned();
    part.push(".part");
    part.into()
}

fn taken(output: &Path) -> Option<&'static str> {
    let kind = output.metadata().or_else(|_| output.symlink_metadata()).ok()?.file_type();
    Some(if kind.is_block_device() || kind.is_char_device() {
        "is a device, and only files are written: write to a file, and copy that to the device with 'dd'"
    } else if kind.is_dir() {
        "is a directory: name a file in it"
    } else {
        "is there already: name another file"
    })
}

/// Gives what was written its name, unless something has that name by now.
pub fn place(part: &Path, output: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, part, CWD, output, RenameFlags::NOREPLACE) {
        // A file system that cannot.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if taken(output).is_none() => {
            std::fs::rename(part, output)
        }
        placed => Ok(placed?),
    }
}

/// Where a file is written.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// At a path where nothing is yet.
    New(&'a Path),
    /// Into an empty file that whoever asked for it made, and names when it is whole.
    Given(&'a Path, &'a File),
}

impl<'a> Output<'a> {
    /// Where it lies, or will.
    pub fn path(&self) -> &'a Path {
        match self {
            Output::New(path) | Output::Given(path, _) => path,
        }
    }

    /// See [`occupied`].
    pub fn occupied(&self) -> Option<&'static str> {
        match self {
            Output::New(path) => occupied(path),
            Output::Given(..) => None,
        }
    }

    /// What was written; 0 if that cannot be told.
    pub fn size_bytes(&self) -> u64 {
        let meta = match self {
            Output::New(path) => path.metadata(),
            Output::Given(_, file) => file.metadata(),
        };
        meta.map_or(0, |meta| meta.len())
    }
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for Output<'a> {
    fn from(path: &'a P) -> Self {
        Output::New(path.as_ref())
    }
}

/// The descriptor of a file that a tool is handed, and its path there.
const HANDED_FD: i32 = 3;
pub const HANDED: &str = "/proc/self/fd/3";

/// `qemu-img`, to which `file` is [`HANDED`]: the very file, wherever it lies. It is opened once more, by the
/// rights of this process.
pub fn qemu_img_with(file: &File) -> io::Result<Command> {
    let mut command = Command::new("qemu-img");
    let mapping = FdMapping { parent_fd: file.try_clone()?.into(), child_fd: HANDED_FD };
    command.fd_mappings(vec![mapping]).map_err(io::Error::other)?;
    Ok(command)
}

/// Writes an image to `output` in `format`; `input` is how `qemu-img` is told of it, its format included,
/// so that it need not guess. On failure nothing is left at a new `output`; what is there is not replaced.
pub fn convert<'a>(
    input: &[&OsStr],
    output: impl Into<Output<'a>>,
    format: ImageFormat,
) -> Result<(), ComposeError> {
    let output = output.into();
    let path = output.path();
    let io = |what, path: &Path, source| ComposeError::Io { what, path: path.to_owned(), source };
    let output = match output {
        Output::New(output) => output,
        Output::Given(_, file) => {
            let command = qemu_img_with(file).map_err(|e| io("write", path, e))?;
            run(command, input, Path::new(HANDED), format, path)?;
            return file.sync_all().map_err(|e| io("write", path, e));
        }
    };
    if let Some(reason) = occupied(output) {
        return Err(ComposeError::Occupied { path: output.to_owned(), reason });
    }
    let part = &*part_of(output);
    // What the system has against it is said by the system, not by the tool.
    File::create_new(part).map_err(|e| io("create", part, e))?;
    let done = run(Command::new("qemu-img"), input, part, format, part)
        .and_then(|()| place(part, output).map_err(|e| io("create", output, e)));
    if done.is_err() {
        let _ = std::fs::remove_file(part);
    }
    done
}

/// Has `qemu-img` write to a file that is there, which messages call by another name.
fn run(
    mut command: Command,
    input: &[&OsStr],
    to: &Path,
    format: ImageFormat,
    name: &Path,
) -> Result<(), ComposeError> {
    command.args(["convert", "-O"]).arg(format.to_string());
    if format == ImageFormat::Vpc {
        // Without it the size is rounded up to what old geometry can express.
        command.args(["-o", "force_size=on"]);
    }
    match command.args(input).arg(to).stdin(Stdio::null()).output() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(ComposeError::NoQemuImg),
        Err(e) => Err(ComposeError::Convert(e.to_string())),
        Ok(o) if !o.status.success() => {
            let said = String::from_utf8_lossy(&o.stderr).trim().replace(HANDED, &name.display().to_string());
            Err(failure(name, &said))
        }
        Ok(_) => Ok(()),
    }
}

/// What the tool says of a full disk is a full disk, as when we write ourselves.
fn failure(path: &Path, said: &str) -> ComposeError {
    let full = io::Error::from(rustix::io::Errno::NOSPC);
    match said.ends_with("No space left on device") {
        true => ComposeError::Io { what: "write", path: path.to_owned(), source: full },
        false => ComposeError::Convert(said.to_owned()),
    }
}
