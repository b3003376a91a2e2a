//! Files only the broker's user may read: the account's password, and what [`super::identity`] keeps.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use zeroize::Zeroizing;

use crate::path_owner::{self, PathError};

use super::error::ConfigError;

const SECRET_BYTES_MAX: u64 = 4096;

/// A password. `Debug` hides it, it cannot be shown by accident, and its memory is wiped.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Zeroizing<String>);

impl Password {
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Password(…)")
    }
}

/// Reads a password file: its first line, without the line end.
pub fn read_password(path: &Path) -> Result<Password, ConfigError> {
    let text = read_secret(path)?;
    // Files from other systems end lines with CR LF, or the last one with CR alone, and may begin with a mark.
    let first = text.trim_start_matches('\u{feff}').split(['\r', '\n']).next();
    match first {
        Some(line) if !line.is_empty() => Ok(Password(Zeroizing::new(line.to_owned()))),
        _ => Err(ConfigError::Secret {
            path: path.to_owned(),
            reason: "is empty",
            next_step: "write the account's password into it",
        }),
    }
}

/// Makes a directory for its owner only. One that is there is left as it is, unless others own it or
/// may write to it, or to a directory above it: they could put another key or another VM's record
/// into it.
pub fn private_dir(path: &Path) -> Result<(), ConfigError> {
    unreplaceable(path)?;
    let failed = |source| ConfigError::Write { path: path.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    unreplaceable(path)
}

/// Refuses a path that another user could put something else in the place of, now or once it is
/// made: each directory and link on the way belongs to this user or root and is closed to others.
pub fn unreplaceable(path: &Path) -> Result<(), ConfigError> {
    path_owner::check(path, rustix::process::geteuid().as_raw()).map_err(|e| match e {
        PathError::Read { path, source } => ConfigError::Read { path, source },
        PathError::Exposed(exposure) => ConfigError::Replaceable { path: path.to_owned(), exposure },
    })
}

pub(super) fn read_secret(path: &Path) -> Result<Zeroizing<String>, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    unreplaceable(path.parent().unwrap_or(path))?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(ConfigError::Exposed { path: path.to_owned(), mode });
    }
    check_owner(path, metadata.uid(), rustix::process::geteuid().as_raw())?;
    // As large as it may be from the beginning, so that no copy is left behind when it grows.
    let mut text = Zeroizing::new(String::with_capacity(SECRET_BYTES_MAX as usize + 1));
    file.take(SECRET_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

/// Whoever owns a secret may read and change it: only ourselves and root may.
fn check_owner(path: &Path, owner: u32, ourselves: u32) -> Result<(), ConfigError> {
    if owner == ourselves || owner == 0 || ourselves == 0 {
        return Ok(());
    }
    Err(ConfigError::Secret {
        path: path.to_owned(),
        reason: "belongs to another user",
        next_step: "give it to the broker's user with chown",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable;
    use std::io::Write as _;
    use std::path::PathBuf;

    fn file(mode: u32, content: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn passwords_are_private_and_hidden() {
        let (_dir, path) = file(0o600, "s3cret \nmore\n");
        let password = read_password(&path).unwrap();
        assert_eq!(password.expose(), "s3cret ");
        assert!(!format!("{password:?}").contains("s3cret"));
        for mode in [0o640, 0o604, 0o644] {
            let (_dir, path) = file(mode, "s3cret");
            let e = read_password(&path).unwrap_err();
            assert!(e.to_string().contains("can be read by others"), "{e}");
            assert_eq!(e.next_step(), format!("chmod 600 {}", path.display()));
        }
        for text in ["s3cret\r\n", "s3cret\r", "\u{feff}s3cret\r\nmore"] {
            let (_dir, path) = file(0o600, text);
            assert_eq!(read_password(&path).unwrap().expose(), "s3cret", "{text:?}");
        }
        let (_dir, path) = file(0o600, "\n");
        assert_eq!(read_password(&path).unwrap_err().to_string(), "is empty");
    }

    #[test]
    fn a_secret_of_another_user_is_none() {
        let path = Path::new("/p");
        for (owner, ourselves) in [(1000, 1000), (0, 1000), (1000, 0)] {
            check_owner(path, owner, ourselves).unwrap();
        }
        let e = check_owner(path, 1001, 1000).unwrap_err();
        assert_eq!(
            (e.to_string().as_str(), e.next_step().contains("chown")),
            ("belongs to another user", true)
        );
    }

    #[test]
    fn a_directory_above_that_others_may_write_to_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let above = dir.path().join("above");
        let secret = above.join("keys/secret");
        fs::create_dir_all(secret.parent().unwrap()).unwrap();
        durable::write_secret(&secret, b"s3cret\n").unwrap();
        read_password(&secret).unwrap();
        fs::set_permissions(&above, fs::Permissions::from_mode(0o777)).unwrap();
        for refused in [
            read_password(&secret).unwrap_err(),
            private_dir(&above.join("data")).unwrap_err(),
            unreplaceable(&above.join("run/cicada.sock")).unwrap_err(),
        ] {
            assert_eq!(refused.next_step(), format!("chmod go-w {}", above.display()));
            assert!(refused.to_string().contains("mode 777"), "{refused}");
        }
        assert!(!above.join("data").exists(), "nothing is made there");
    }

    #[test]
    fn a_directory_above_of_another_user_is_refused_by_name() {
        if !rustix::process::geteuid().is_root() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: giving a directory to another user needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let above = dir.path().join("above");
        fs::create_dir(&above).unwrap();
        std::os::unix::fs::chown(&above, Some(12345), Some(12345)).unwrap();
        let e = private_dir(&above.join("data")).unwrap_err();
        assert_eq!(e.next_step(), format!("chown -h 0 {}", above.display()));
        assert!(e.to_string().contains("belongs to user 12345 (mode 755)"), "{e}");
    }
}
