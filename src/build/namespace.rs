//! Who builds, and where: a user without root in a user namespace, with the ids that
//! `/etc/subuid` and `/etc/subgid` lend to them; root only where nobody else can write.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::error::BuildError;
use crate::path_owner::{self, PathError};

/// Ids that packages use: Debian's static, dynamic and `nobody`'s.
const IDS_NEEDED: u64 = 65_536;

/// Refuses a directory that another user could replace or write to, whatever part of it is there yet.
pub fn check_dir(path: &Path) -> Result<(), BuildError> {
    let ourselves = rustix::process::geteuid().as_raw();
    path_owner::check(path, ourselves).map_err(|e| match e {
        PathError::Read { path, source } => BuildError::Read { path, source },
        PathError::Exposed(source) => BuildError::Exposed { path: path.to_owned(), source },
    })
}

/// This very command again, as root of a user namespace: files get the owners packages want, as far
/// as this user's lent ids reach, and nothing of the machine can be touched that the user could not.
pub fn command_without_root() -> Result<Command, BuildError> {
    let user = user_name();
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = fs::read_to_string(file).unwrap_or_default();
        let uid = rustix::process::geteuid().as_raw();
        if lent(&text, &user, uid) < IDS_NEEDED - 1 {
            let user = if user.is_empty() { uid.to_string() } else { user };
            return Err(BuildError::NoNamespace {
                what: "65536 ids lent to this user in /etc/subuid and /etc/subgid",
                next_step: format!(
                    "as root: usermod --add-subuids 1000000-1065535 --add-subgids 1000000-1065535 {user} \
                     (any range no other line there has)"
                ),
            });
        }
    }
    for tool in ["newuidmap", "newgidmap"] {
        if !on_path(tool) {
            return Err(BuildError::NoNamespace {
                what: "newuidmap and newgidmap",
                next_step: "install the package uidmap; deploy/install does".into(),
            });
        }
    }
    let executable = std::env::current_exe().map_err(BuildError::read("/proc/self/exe"))?;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-auto", "--map-root-user", "--"]).arg(executable);
    command.args(std::env::args_os().skip(1));
    Ok(command)
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

/// Empty if the user has no name.
fn user_name() -> String {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let line = users.lines().find(|l| l.split(':').nth(2) == Some(uid.as_str()));
    line.and_then(|l| l.split(':').next()).unwrap_or_default().to_owned()
}

/// The largest range of ids a file lends to a user, by name or number: lines `USER:FIRST:COUNT`.
fn lent(text: &str, user: &str, uid: u32) -> u64 {
    let number = uid.to_string();
    let counts = text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let who = fields.next().filter(|w| !w.is_empty())?;
        (who == user || who == number).then(|| fields.nth(1)?.trim().parse::<u64>().ok())?
    });
    counts.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn lent_ids_are_found_by_name_and_number() {
        let text = "other:100000:65536\nme:165536:65536\n1234:300000:9\n:1:70000\nme:x:y\nbad\n";
        assert_eq!(lent(text, "me", 1), 65536);
        assert_eq!(lent(text, "", 1234), 9);
        assert_eq!(lent(text, "nobody", 7), 0);
    }

    #[test]
    fn a_directory_others_write_to_is_no_place_to_build_in() {
        let dir = tempfile::tempdir().unwrap();
        check_dir(&dir.path().join("new/build")).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let e = check_dir(&dir.path().join("new/build")).unwrap_err();
        assert!(matches!(e, BuildError::Exposed { .. }), "{e}");
    }
}
