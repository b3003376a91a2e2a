//! Who could replace what lies at a path. A file's own mode says little while another user
//! owns, or may write to, a directory above it: that user renames the directory away and puts another
//! in its place.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// Links of one path that are followed, as Linux counts them.
const LINKS_MAX: usize = 40;
const STICKY: u32 = 0o1000;
const FULL: u32 = 0o7777;

/// A directory, link or file that lies on a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    pub path: PathBuf,
    pub owner: u32,
    /// Permission bits.
    pub mode: u32,
    pub is_directory: bool,
    pub is_link: bool,
}

/// What somebody else could replace, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Exposure {
    #[error(
        "{} belongs to user {owner} (mode {mode:03o}), who could put something else in its place",
        path.display()
    )]
    Owner { path: PathBuf, owner: u32, mode: u32, wanted: u32 },
    #[error(
        "{} (owner {owner}, mode {mode:03o}) can be written to by others, who could replace what is in it",
        path.display()
    )]
    Writable { path: PathBuf, owner: u32, mode: u32 },
}

impl Exposure {
    pub fn path(&self) -> &Path {
        match self {
            Self::Owner { path, .. } | Self::Writable { path, .. } => path,
        }
    }

    /// The command that mends it.
    pub fn next_step(&self) -> String {
        match self {
            Self::Owner { path, wanted, .. } => format!("chown -h {wanted} {}", path.display()),
            Self::Writable { path, .. } => format!("chmod go-w {}", path.display()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PathError {
    #[error("{}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Exposed(#[from] Exposure),
}

/// Whether only `trusted` users could replace what is on the way. In a directory with the sticky
/// bit, such as `/tmp`, others add entries but take away none of ours; a path must not end in one.
pub fn judge(steps: &[Step], trusted: &[u32]) -> Result<(), Exposure> {
    for (number, step) in steps.iter().enumerate() {
        let (path, owner, mode) = (step.path.clone(), step.owner, step.mode);
        if !trusted.contains(&owner) {
            let wanted = trusted.first().copied().unwrap_or(0);
            return Err(Exposure::Owner { path, owner, mode, wanted });
        }
        let shared_on_purpose = step.is_directory && mode & STICKY != 0 && number + 1 < steps.len();
        if mode & 0o022 != 0 && !step.is_link && !shared_on_purpose {
            return Err(Exposure::Writable { path, owner, mode });
        }
    }
    Ok(())
}

/// Every directory and link on the way to `path`, the root first, and `path` itself, as far as they
/// are there. What a link names is looked at from where it lies.
pub fn steps_to(path: &Path) -> io::Result<Vec<Step>> {
    let mut rest: Vec<PathBuf> = parts(&std::path::absolute(path)?);
    let mut at = PathBuf::from("/");
    let mut steps = vec![step(&at)?];
    let mut links = 0;
    while let Some(part) = rest.pop() {
        if part == Path::new("..") {
            at.pop();
            continue;
        }
        let next = at.join(part);
        let found = match step(&next) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => break,
            Err(e) => return Err(e),
        };
        let is_link = found.is_link;
        steps.push(found);
        if !is_link {
            at = next;
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(rustix::io::Errno::LOOP.into());
        }
        let target = fs::read_link(&next)?;
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        rest.extend(parts(&target));
    }
    Ok(steps)
}

/// Checks all that is on the way to `path` and `path` itself: it must belong to `ourselves` or root,
/// and nobody else may write to it. What is not there yet is no fault.
pub fn check(path: &Path, ourselves: u32) -> Result<(), PathError> {
    let mut trusted = vec![ourselves, 0];
    // In a user namespace all users that are not mapped, the machine's root among them, look alike.
    if let Some(unmapped) = unmapped_user() {
        trusted.push(unmapped);
    }
    let steps = steps_to(path).map_err(|source| PathError::Read { path: path.to_owned(), source })?;
    Ok(judge(&steps, &trusted)?)
}

/// Whether this process is in a user namespace of its own, where user 0 is not the machine's root.
pub fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn unmapped_user() -> Option<u32> {
    let text = in_user_namespace().then(|| fs::read_to_string("/proc/sys/kernel/overflowuid"))?;
    text.ok()?.trim().parse().ok()
}

/// The parts of a path in the order of a stack: the last first.
fn parts(path: &Path) -> Vec<PathBuf> {
    let named = path.components().rev().filter_map(|c| match c {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        _ => None,
    });
    named.collect()
}

fn step(path: &Path) -> io::Result<Step> {
    let meta = fs::symlink_metadata(path)?;
    Ok(Step {
        path: path.to_owned(),
        owner: meta.uid(),
        mode: meta.mode() & FULL,
        is_directory: meta.is_dir(),
        is_link: meta.is_symlink(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn steps(list: &[(&str, u32, u32)]) -> Vec<Step> {
        let step = |(path, owner, mode): &(&str, u32, u32)| Step {
            path: path.into(),
            owner: *owner,
            mode: *mode,
            is_directory: true,
            is_link: false,
        };
        list.iter().map(step).collect()
    }

    #[test]
    fn every_ancestor_counts_by_owner_and_by_mode() {
        let good = steps(&[("/", 0, 0o755), ("/srv", 0, 0o755), ("/srv/c", 900, 0o700)]);
        judge(&good, &[900, 0]).unwrap();
        // The data directory is the user's: root must not build in it.
        let e = judge(&good, &[0, 0]).unwrap_err();
        assert_eq!(e.next_step(), "chown -h 0 /srv/c");
        let e = judge(&steps(&[("/", 0, 0o755), ("/srv", 33, 0o755), ("/srv/c", 900, 0o700)]), &[900, 0]);
        let e = e.unwrap_err();
        assert_eq!(
            (e.to_string().as_str(), e.next_step().as_str()),
            (
                "/srv belongs to user 33 (mode 755), who could put something else in its place",
                "chown -h 900 /srv"
            )
        );
        for mode in [0o775, 0o757, 0o777] {
            let e = judge(&steps(&[("/", 0, 0o755), ("/srv", 0, mode), ("/srv/c", 900, 0o700)]), &[900, 0]);
            let e = e.unwrap_err();
            assert!(e.to_string().contains(&format!("/srv (owner 0, mode {mode:03o})")), "{e}");
            assert_eq!(e.next_step(), "chmod go-w /srv");
        }
    }

    #[test]
    fn a_sticky_directory_may_lie_on_the_way_but_not_at_the_end() {
        judge(&steps(&[("/", 0, 0o755), ("/tmp", 0, 0o1777), ("/tmp/x", 900, 0o700)]), &[900, 0]).unwrap();
        judge(&steps(&[("/", 0, 0o755), ("/tmp", 0, 0o1777)]), &[900, 0]).unwrap_err();
        // Whoever owns the entry in it has it in hand.
        judge(&steps(&[("/tmp", 0, 0o1777), ("/tmp/x", 33, 0o700)]), &[900, 0]).unwrap_err();
    }

    #[test]
    fn links_are_looked_at_and_so_is_the_way_to_what_they_name() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::create_dir_all(open.join("real")).unwrap();
        symlink("open/real", dir.path().join("link")).unwrap();
        let ourselves = rustix::process::geteuid().as_raw();
        let path = dir.path().join("link/not-yet/file");
        check(&path, ourselves).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        match check(&path, ourselves).unwrap_err() {
            PathError::Exposed(e) => assert_eq!(e.path(), open),
            other => panic!("{other}"),
        }
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(matches!(check(&dir.path().join("loop"), ourselves), Err(PathError::Read { .. })));
    }
}
