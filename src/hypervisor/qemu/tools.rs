//! Finding QEMU's programs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::config::QemuConfig;
use super::lack::QemuLack;
use crate::hypervisor::DriverError;

/// QEMU's version, compared as numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct QemuVersion {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

/// What every feature this driver relies on exists in.
pub const VERSION_MIN: QemuVersion = QemuVersion { major: 7, minor: 2, micro: 0 };

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QemuTools {
    /// `qemu-system-x86_64`.
    pub system: PathBuf,
    /// `qemu-img`, which lives in a package of its own and is not needed to run VMs.
    img: Option<PathBuf>,
    pub version: QemuVersion,
}

impl QemuTools {
    pub fn img(&self) -> Result<&Path, DriverError> {
        self.img.as_deref().ok_or(DriverError::MissingTool { tool: "qemu-img", package: "qemu-utils" })
    }
}

/// Finds QEMU in PATH and asks its version. Runs it, so it takes some milliseconds.
pub fn find_qemu() -> Result<QemuTools, DriverError> {
    find_configured(&QemuConfig::default())
}

/// As [`find_qemu`], with the paths an operator has set.
pub fn find_configured(config: &QemuConfig) -> Result<QemuTools, DriverError> {
    let set_or_found = |set: &Option<PathBuf>, name| match set {
        Some(path) => path.is_file().then(|| path.clone()),
        None => in_path(name),
    };
    let system = set_or_found(&config.system, "qemu-system-x86_64")
        .ok_or(DriverError::MissingTool { tool: "qemu-system-x86_64", package: "qemu-system-x86" })?;
    let output = Command::new(&system)
        .arg("--version")
        .output()
        .map_err(|source| DriverError::Run { path: system.clone(), source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = parse_version(&text).ok_or_else(|| QemuLack::Probe {
        detail: format!("{} --version said '{}'", system.display(), text.trim().escape_debug()),
    })?;
    if version < VERSION_MIN {
        return Err(QemuLack::Version { path: system, found: version.to_string(), need: "7.2" }.into());
    }
    Ok(QemuTools { system, img: set_or_found(&config.img, "qemu-img"), version })
}

/// passt, where it is installed.
pub fn find_passt(config: &QemuConfig) -> Option<PathBuf> {
    match &config.passt {
        Some(path) => path.is_file().then(|| path.clone()),
        None => in_path("passt"),
    }
}

fn in_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn parse_version(text: &str) -> Option<QemuVersion> {
    let rest = text.strip_prefix("QEMU emulator version ")?;
    let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let mut parts = number.split('.').map(|part| part.parse().ok());
    Some(QemuVersion {
        major: parts.next()??,
        minor: parts.next()??,
        micro: parts.next().unwrap_or(Some(0))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_versions_distributions_print() {
        let v = |major, minor, micro| Some(QemuVersion { major, minor, micro });
        for (text, version) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", v(7, 2, 22)),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", v(10, 0, 2)),
            ("QEMU emulator version 9.1", v(9, 1, 0)),
            ("QEMU emulator version x", None),
            ("", None),
        ] {
            assert_eq!(parse_version(text), version, "{text}");
        }
    }
}
