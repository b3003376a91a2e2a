//! Root working for a cloud that belongs to another user: what it made there the broker could not read.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::config::{Config, identity_path};
use crate::interface::problem::{Problem, ProblemKind};

/// Refuses to do as root what is the broker's user's to do.
pub fn not_as_root(config: &Config) -> Result<(), Problem> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let data_dir = &config.cloud.data_dir;
    let (data, password) = (owner(data_dir), owner(&config.xmpp.password_file));
    let (uid, path, what) = match (data, password) {
        (Some(uid), _) if uid != 0 => (uid, data_dir, "belongs to"),
        // Before the first use there is nothing but the password to tell whose cloud it is.
        (None, Some(uid)) if uid != 0 => (uid, data_dir, "would be root's, and the password belongs to"),
        // One that root's broker already uses is root's.
        (Some(0), Some(uid)) if uid != 0 && !identity_path(data_dir).exists() => {
            let user = name_of(uid);
            let reason = format!("belongs to root, and the password to {user}: the broker could not use it");
            return Err(Problem::new(ProblemKind::Forbidden, data_dir.display().to_string(), reason)
                .next(format!("chown -R {user}: {}; then run this as {user}", data_dir.display())));
        }
        // Nor the password: then whom the configuration was made readable for, as 'cicada setup' does.
        (None | Some(0), _) if !identity_path(data_dir).exists() => match reader_of(&config.path) {
            Some(uid) => (uid, data_dir, "would be root's, and the configuration is there for"),
            None => return Ok(()),
        },
        _ => return Ok(()),
    };
    let user = name_of(uid);
    let reason = format!("{what} {user}, who could not use what root makes there");
    Err(Problem::new(ProblemKind::Forbidden, path.display().to_string(), reason)
        .next(format!("run it as that user: runuser -u {user} -- cicada …")))
}

fn owner(path: &Path) -> Option<u32> {
    fs::metadata(path).ok().map(|m| m.uid())
}

/// The user whose own group a file of root's belongs to.
fn reader_of(path: &Path) -> Option<u32> {
    let group = fs::metadata(path).ok().map(|m| m.gid()).filter(|gid| *gid != 0)?;
    users().into_iter().find(|(_, _, primary)| *primary == group).map(|(_, uid, _)| uid)
}

/// A user's name, or its number where it has none.
fn name_of(uid: u32) -> String {
    let known = users().into_iter().find(|(_, id, _)| *id == uid);
    known.map_or_else(|| uid.to_string(), |(name, ..)| name)
}

/// Name, id and own group of the users of this machine.
fn users() -> Vec<(String, u32, u32)> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let user = |line: &str| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?);
        Some((name.to_owned(), uid.parse().ok()?, fields.next()?.parse().ok()?))
    };
    passwd.lines().filter_map(user).collect()
}
