//! Files only the broker's user may read: the account's password and the identity key.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use zeroize::Zeroizing;

use crate::durable;
use crate::path_owner::{self, PathError};
use crate::types::IdentityKey;

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
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Password(Zeroizing::new(line.to_owned()))),
        _ => Err(ConfigError::Secret {
            path: path.to_owned(),
            reason: "is empty",
            next_step: "write the account's password into it",
        }),
    }
}

/// Where the identity key lies: base64 of its 32 secret bytes and a line end.
pub fn identity_path(data_dir: &Path) -> PathBuf {
    data_dir.join("identity.key")
}

/// The cloud's identity key; made at the first call, with the data directory if it is not there.
pub fn load_or_create_identity(data_dir: &Path) -> Result<IdentityKey, ConfigError> {
    let path = identity_path(data_dir);
    match read_secret(&path) {
        Ok(text) => parse_identity(&path, &text),
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            create_identity(data_dir, &path)
        }
        Err(e) => Err(e),
    }
}

fn create_identity(data_dir: &Path, path: &Path) -> Result<IdentityKey, ConfigError> {
    let failed = |source| ConfigError::Write { path: path.to_owned(), source };
    private_dir(data_dir)?;
    let mut secret = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *secret).map_err(|e| failed(io::Error::other(e)))?;
    let mut text = Zeroizing::new(BASE64.encode(*secret));
    text.push('\n');
    durable::write_secret(path, text.as_bytes()).map_err(failed)?;
    Ok(IdentityKey::from_secret_bytes(&secret))
}

fn parse_identity(path: &Path, text: &str) -> Result<IdentityKey, ConfigError> {
    let bytes = BASE64.decode(text.trim()).map(Zeroizing::new).ok();
    let secret = bytes.as_ref().and_then(|b| <&[u8; 32]>::try_from(b.as_slice()).ok());
    secret.map(IdentityKey::from_secret_bytes).ok_or_else(|| ConfigError::Secret {
        path: path.to_owned(),
        reason: "is not an identity key: base64 of 32 bytes expected",
        next_step: "restore it from a backup; with a new key the other members must trust this cloud anew",
    })
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

fn read_secret(path: &Path) -> Result<Zeroizing<String>, ConfigError> {
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
    fn the_data_directory_is_private_and_nobody_else_may_write_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let data = dir.path().join("a/b");
        load_or_create_identity(&data).unwrap();
        assert_eq!((mode(&data), mode(&identity_path(&data))), (0o700, 0o600));
        fs::set_permissions(&data, fs::Permissions::from_mode(0o755)).unwrap();
        private_dir(&data).unwrap();
        fs::set_permissions(&data, fs::Permissions::from_mode(0o775)).unwrap();
        let e = private_dir(&data).unwrap_err();
        assert_eq!(e.next_step(), format!("chmod go-w {}", data.display()));
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
            println!("SKIPPED: giving a directory to another user needs root");
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

    #[test]
    fn the_identity_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("a/b");
        let key = load_or_create_identity(&data).unwrap();
        assert_eq!(load_or_create_identity(&data).unwrap().public(), key.public());
        let path = identity_path(&data);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(load_or_create_identity(&data), Err(ConfigError::Exposed { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "nonsense").unwrap();
        assert!(matches!(load_or_create_identity(&data), Err(ConfigError::Secret { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "nonsense", "a damaged key is never replaced");
    }
}
