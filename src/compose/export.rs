//! The last step to other hypervisors: a composition in their disk format.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

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
pub fn place(part: &Path, output: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, part, CWD, output, RenameFlags::NOREPLACE) {
        // A file system that cannot.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if taken(output).is_none() => {
            std::fs::rename(part, output)
        }
        placed => Ok(placed?),
    }
}

/// Writes an image to `output` in `format`; `input` is how `qemu-img` is told of it, its format included,
/// so that it need not guess. On failure nothing is left at `output`; what is there is not replaced.
pub fn convert(input: &[&OsStr], output: &Path, format: ImageFormat) -> Result<(), ComposeError> {
    let part = &*part_of(output);
    if let Some(reason) = occupied(output) {
        return Err(ComposeError::Occupied { path: output.to_owned(), reason });
    }
    // What the system has against it is said by the system, not by the tool.
    let io = |source| ComposeError::Io { what: "create", path: part.to_owned(), source };
    std::fs::File::create_new(part).map_err(io)?;
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-O"]).arg(format.to_string());
    if format == ImageFormat::Vpc {
        // Without it the size is rounded up to what old geometry can express.
        command.args(["-o", "force_size=on"]);
    }
    let result = command.args(input).arg(part).output();
    let done = match result {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(ComposeError::NoQemuImg),
        Err(e) => Err(ComposeError::Convert(e.to_string())),
        Ok(o) if !o.status.success() => Err(failure(part, String::from_utf8_lossy(&o.stderr).trim())),
        Ok(_) => place(part, output).map_err(|source| ComposeError::Io {
            what: "create",
            path: output.to_owned(),
            source,
        }),
    };
    if done.is_err() {
        let _ = std::fs::remove_file(part);
    }
    done
}

/// What the tool says of a full disk is a full disk, as when we write ourselves.
fn failure(path: &Path, said: &str) -> ComposeError {
    let full = std::io::Error::from(rustix::io::Errno::NOSPC);
    match said.ends_with("No space left on device") {
        true => ComposeError::Io { what: "write", path: path.to_owned(), source: full },
        false => ComposeError::Convert(said.to_owned()),
    }
}
