//! Whether the records are the newest: a mark outside the data directory, in memory only, tells a
//! broker that starts again from one that starts from a backup. It holds a digest of who owns what, and
//! which boot of this machine it is of. No mark, or another one, proves nothing: then others are asked.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::types::Hash;
use crate::types::codec::Writer;

use super::records::VmRecord;

/// The mark of one data directory.
pub struct Continuity {
    /// `None` where the system has no place for it.
    path: Option<PathBuf>,
    boot: String,
}

impl Continuity {
    pub fn of(data_dir: &Path) -> Self {
        let whole = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        let name = Hash::of(whole.as_os_str().as_encoded_bytes()).short();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { path: directory().filter(|_| !boot.is_empty()).map(|dir| dir.join(name)), boot }
    }

    /// Whether ownership is as this machine last left it, since it was booted.
    pub fn is_unbroken(&self, digest: Hash) -> bool {
        let kept = self.path.as_ref().and_then(|path| fs::read_to_string(path).ok());
        kept.is_some_and(|kept| kept == self.text(digest))
    }

    /// Whether there is a mark, and it is of other records.
    pub fn is_broken(&self, digest: Hash) -> bool {
        let kept = self.path.as_ref().and_then(|path| fs::read_to_string(path).ok());
        kept.is_some_and(|kept| kept.starts_with(self.boot.trim()) && kept != self.text(digest))
    }

    /// The mark is evidence of this boot alone, so it need not survive a crash of the machine.
    pub fn note(&self, digest: Hash) {
        let Some(path) = &self.path else { return };
        let temporary = path.with_extension("new");
        let noted = fs::write(&temporary, self.text(digest)).and_then(|()| fs::rename(&temporary, path));
        if let Err(e) = noted {
            tracing::warn!(path = %path.display(), error = %e, "the next start will ask the other members before VMs run");
            self.forget();
        }
    }

    pub fn forget(&self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }

    fn text(&self, digest: Hash) -> String {
        format!("{}\n{digest}\n", self.boot.trim())
    }
}

/// Where systemd, or the system, keeps what does not outlive a boot.
fn directory() -> Option<PathBuf> {
    let given = std::env::var_os("RUNTIME_DIRECTORY").map(PathBuf::from);
    let user = || {
        let dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
        dir.or_else(|| Some(PathBuf::from("/run")).filter(|_| rustix::process::geteuid().is_root()))
    };
    let dir = given.or_else(|| Some(user()?.join("cicada")))?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).ok()?;
    Some(dir)
}

/// Who owns what, by these records.
pub fn digest<'a>(records: impl Iterator<Item = &'a VmRecord>) -> Hash {
    let mut w = Writer::new();
    for record in records {
        w.fixed(record.spec.id.0.as_bytes());
        w.u64(record.epoch);
        w.u8(u8::from(record.is_here()));
        if let Some(given) = record.given_up() {
            w.fixed(given.migration.0.as_bytes());
        }
    }
    Hash::of(&w.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_records_in_the_same_boot_are_unbroken() {
        let dir = tempfile::tempdir().unwrap();
        let mark = |boot: &str| Continuity { path: Some(dir.path().join("mark")), boot: boot.into() };
        let (one, other) = (Hash::of(b"1"), Hash::of(b"2"));
        assert!(!mark("a").is_unbroken(one) && !mark("a").is_broken(one));
        mark("a").note(one);
        assert!(mark("a").is_unbroken(one) && !mark("a").is_broken(one));
        assert!(!mark("a").is_unbroken(other) && mark("a").is_broken(other));
        assert!(!mark("b").is_unbroken(one) && !mark("b").is_broken(one), "another boot says nothing");
        mark("a").forget();
        assert!(!mark("a").is_unbroken(one));
    }
}
