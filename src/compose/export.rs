//! The last step to other hypervisors: a composition in their disk format.

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
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

/// Writes an image to `output` in `format`; `input` is how `qemu-img` is told of it, its format included,
/// so that it need not guess. On failure nothing is left at `output`.
pub fn convert(input: &[&OsStr], output: &Path, format: ImageFormat) -> Result<(), ComposeError> {
    let mut part = output.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-O"]).arg(format.to_string());
    if format == ImageFormat::Vpc {
        // Without it the size is rounded up to what old geometry can express.
        command.args(["-o", "force_size=on"]);
    }
    let result = command.args(input).arg(part).output();
    let done = match result {
        Err(e) => Err(ComposeError::Convert(format!("{e}; install the package qemu-utils"))),
        Ok(o) if !o.status.success() => {
            Err(ComposeError::Convert(String::from_utf8_lossy(&o.stderr).trim().to_owned()))
        }
        Ok(_) => std::fs::rename(part, output).map_err(|source| ComposeError::Io {
            what: "rename to",
            path: output.to_owned(),
            source,
        }),
    };
    if done.is_err() {
        let _ = std::fs::remove_file(part);
    }
    done
}
