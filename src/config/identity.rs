//! This cloud's identity key, and the ones it followed.
//!
//! A rotation writes the new secret beside the old one, then the succession, then puts the new secret in
//! the old one's place. Each step is durable before the next, so that there is one usable key at any
//! instant: without the succession the old one, with it the new one, wherever that lies.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::clock::UnixMillis;
use crate::durable;
use crate::fault;
use crate::types::{IdentityKey, Succession, Successions};

use super::error::ConfigError;
use super::secrets::{private_dir, read_secret};

/// Version of `successions.json`.
const VERSION: u32 = 1;

/// A cloud's key, and how it came to be its.
#[derive(Clone, Debug)]
pub struct Identity {
    pub key: IdentityKey,
    /// From the first key on.
    pub successions: Successions,
    /// When the key became this cloud's, as far as it can be told: the first one's file has the time.
    pub since: UnixMillis,
}

#[derive(Serialize, Deserialize)]
struct Recorded {
    version: u32,
    successions: Successions,
}

/// Where the identity key lies: base64 of its 32 secret bytes and a line end.
pub fn identity_path(data_dir: &Path) -> PathBuf {
    data_dir.join("identity.key")
}

/// Where the next one lies until its succession is recorded.
fn next_path(data_dir: &Path) -> PathBuf {
    data_dir.join("identity.next")
}

fn successions_path(data_dir: &Path) -> PathBuf {
    data_dir.join("successions.json")
}

/// The cloud's identity key; made at the first call, with the data directory if it is not there.
pub fn load_or_create_identity(data_dir: &Path) -> Result<IdentityKey, ConfigError> {
    load_identity(data_dir).map(|identity| identity.key)
}

/// As [`load_or_create_identity`], with the keys before it. A rotation that was cut short is ended, or
/// was none.
pub fn load_identity(data_dir: &Path) -> Result<Identity, ConfigError> {
    let path = identity_path(data_dir);
    let key = match read_secret(&path) {
        Ok(text) => parse_identity(&path, &text)?,
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            create_identity(data_dir, &path)?
        }
        Err(e) => return Err(e),
    };
    let successions = recorded(data_dir)?;
    let key = match successions.of(&key.public()) {
        Some(succession) => take_next(data_dir, succession)?,
        None => key,
    };
    let since = match successions.iter().find(|s| s.new == key.public()) {
        Some(succession) => succession.issued,
        None => fs::metadata(&path)
            .map(|m| UnixMillis(u64::try_from(m.mtime()).unwrap_or_default() * 1000))
            .map_err(|source| ConfigError::Read { path, source })?,
    };
    Ok(Identity { key, successions, since })
}

/// Makes a new identity key and lets the old one give way to it. The broker must not run, and nothing it
/// began under the old key may be open.
pub fn rotate_identity(data_dir: &Path, now: UnixMillis) -> Result<Succession, ConfigError> {
    let Identity { key: old, mut successions, .. } = load_identity(data_dir)?;
    let (path, next_path) = (successions_path(data_dir), next_path(data_dir));
    let new = create_identity(data_dir, &next_path)?;
    let succession = Succession::sign(&old, &new, now);
    let full = |_| ConfigError::Secret {
        path: path.clone(),
        reason: "holds as many successions as there may be",
        next_step: "move identity.key and successions.json elsewhere, and have all members trust the new key",
    };
    successions.add(succession.clone()).map_err(full)?;
    fault::point("identity-made");
    let failed = |source| ConfigError::Write { path: path.clone(), source };
    let json = serde_json::to_vec_pretty(&Recorded { version: VERSION, successions });
    durable::write(&path, &json.map_err(|e| failed(e.into()))?).map_err(failed)?;
    fault::point("identity-succeeded");
    take_next(data_dir, &succession)?;
    Ok(succession)
}

/// The key that a recorded succession leads to, put in the old one's place.
fn take_next(data_dir: &Path, succession: &Succession) -> Result<IdentityKey, ConfigError> {
    let (path, next) = (identity_path(data_dir), next_path(data_dir));
    let lost = || ConfigError::Secret {
        path: next.clone(),
        reason: "does not hold the key that successions.json says follows the one in identity.key",
        next_step: "restore identity.key, identity.next and successions.json from one backup",
    };
    let text = match read_secret(&next) {
        Ok(text) => text,
        Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            // Another process that looked at the same time may have put it there.
            let key = parse_identity(&path, &read_secret(&path)?)?;
            return if key.public() == succession.new { Ok(key) } else { Err(lost()) };
        }
        Err(e) => return Err(e),
    };
    let key = parse_identity(&next, &text)?;
    if key.public() != succession.new {
        return Err(lost());
    }
    fs::rename(&next, &path)
        .and_then(|()| durable::sync_dir_of(&path))
        .map_err(|source| ConfigError::Write { path, source })?;
    Ok(key)
}

fn recorded(data_dir: &Path) -> Result<Successions, ConfigError> {
    let path = successions_path(data_dir);
    let json = match fs::read(&path) {
        Ok(json) => json,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Successions::default()),
        Err(source) => return Err(ConfigError::Read { path, source }),
    };
    match serde_json::from_slice::<Recorded>(&json) {
        Ok(recorded) if recorded.version == VERSION => Ok(recorded.successions),
        _ => Err(ConfigError::Secret {
            path,
            reason: "is not the list of this cloud's keys that this build writes",
            next_step: "restore it from a backup, or use the build that wrote it",
        }),
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

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
    #[test]
    fn a_key_gives_way_to_another_and_the_successions_stay() {
        let dir = tempfile::tempdir().unwrap();
        let first = load_identity(dir.path()).unwrap();
        assert!(first.successions.is_empty() && first.since > UnixMillis(0));
        let one = rotate_identity(dir.path(), UnixMillis(10)).unwrap();
        let two = rotate_identity(dir.path(), UnixMillis(20)).unwrap();
        assert_eq!((one.old, one.new), (first.key.public(), two.old));
        let now = load_identity(dir.path()).unwrap();
        assert_eq!((now.key.public(), now.since), (two.new, UnixMillis(20)));
        assert!(now.successions.leads(&first.key.public(), &two.new));
        let mode = fs::metadata(identity_path(dir.path())).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode, next_path(dir.path()).exists()), (0o600, false));
    }

    /// Whatever of the three steps was reached when the machine died, there is one key, the right one.
    #[test]
    fn a_rotation_cut_short_leaves_one_usable_key() {
        let dir = tempfile::tempdir().unwrap();
        let old = load_or_create_identity(dir.path()).unwrap();
        // The new key is there, and nothing says that it follows.
        let new = create_identity(dir.path(), &next_path(dir.path())).unwrap();
        assert_eq!(load_or_create_identity(dir.path()).unwrap().public(), old.public());
        // The succession is recorded: the old key is none any more.
        let mut successions = Successions::default();
        successions.add(Succession::sign(&old, &new, UnixMillis(1))).unwrap();
        let recorded = Recorded { version: VERSION, successions };
        fs::write(successions_path(dir.path()), serde_json::to_vec(&recorded).unwrap()).unwrap();
        assert_eq!(load_or_create_identity(dir.path()).unwrap().public(), new.public());
        assert_eq!(load_or_create_identity(dir.path()).unwrap().public(), new.public(), "and again");
        // What was left by the first case does not become the next key.
        create_identity(dir.path(), &next_path(dir.path())).unwrap();
        let succession = rotate_identity(dir.path(), UnixMillis(2)).unwrap();
        assert_eq!(load_or_create_identity(dir.path()).unwrap().public(), succession.new);
        assert_eq!(succession.old, new.public());
        // An old key out of a backup beside newer successions is not used.
        let text = Zeroizing::new(BASE64.encode(old.secret_bytes()));
        fs::write(identity_path(dir.path()), text.as_bytes()).unwrap();
        let e = load_or_create_identity(dir.path()).unwrap_err();
        assert!(e.next_step().contains("from one backup"), "{e}");
    }
}
