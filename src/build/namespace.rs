//! Who builds, and where: a user without root in a user namespace, with the ids that
//! `/etc/subuid` and `/etc/subgid` lend to them; root only where nobody else can write.

use std::path::Path;
use std::process::Command;

use super::error::BuildError;
use crate::lent_ids;
use crate::path_owner::{self, PathError};

/// Ids that packages use: Debian's static, dynamic and `nobody`'s.
const IDS_NEEDED: u32 = 65_536;

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
    if lent_ids::lent().iter().any(|ids| ids.is_none_or(|ids| ids.count < IDS_NEEDED - 1)) {
        return Err(BuildError::NoNamespace {
            what: "65536 ids lent to this user in /etc/subuid and /etc/subgid",
            next_step: format!(
                "as root: usermod --add-subuids 1000000-1065535 --add-subgids 1000000-1065535 {} \
                 (any range no other line there has)",
                lent_ids::user()
            ),
        });
    }
    if lent_ids::missing_tool().is_some() {
        return Err(BuildError::NoNamespace {
            what: "newuidmap and newgidmap",
            next_step: "install the package uidmap; deploy/install does".into(),
        });
    }
    let executable = std::env::current_exe().map_err(BuildError::read("/proc/self/exe"))?;
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-auto", "--map-root-user", "--"]).arg(executable);
    command.args(std::env::args_os().skip(1));
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_others_write_to_is_no_place_to_build_in() {
        let dir = tempfile::tempdir().unwrap();
        check_dir(&dir.path().join("new/build")).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let e = check_dir(&dir.path().join("new/build")).unwrap_err();
        assert!(matches!(e, BuildError::Exposed { .. }), "{e}");
    }
}
