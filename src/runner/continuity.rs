//! The mark outside the data directory that tells a broker that starts again from one that starts from a
//! backup: where it lies, and how it is written. What it means: `broker/continuity.rs`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::broker::continuity::Marks;
use crate::types::{Hash, VmId};

/// The mark of one data directory.
pub struct Continuity {
    /// `None` where the system has no place for it.
    path: Option<PathBuf>,
    boot: String,
    /// As it was found at start.
    found: BTreeMap<VmId, Hash>,
    of_this_boot: bool,
}

impl Continuity {
    pub fn of(data_dir: &Path) -> Self {
        let whole = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        let name = Hash::of(whole.as_os_str().as_encoded_bytes()).short();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self::at(directory().filter(|_| !boot.is_empty()).map(|dir| dir.join(name)), boot.trim())
    }

    fn at(path: Option<PathBuf>, boot: &str) -> Self {
        let text = path.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let mut lines = text.lines();
        let of_this_boot = lines.next() == Some(boot);
        let line = |line: &str| {
            let (vm, digest) = line.split_once(' ')?;
            Some((vm.parse().ok()?, digest.parse().ok()?))
        };
        let found = lines.filter(|_| of_this_boot).filter_map(line).collect();
        Self { path, boot: boot.to_owned(), found, of_this_boot }
    }

    pub fn found(&self) -> Marks {
        Marks { has_place: self.path.is_some(), of_this_boot: self.of_this_boot, found: self.found.clone() }
    }

    /// Marks these records. It is evidence of this boot alone, so it need not survive a crash of the machine.
    pub fn note(&self, marks: &[(VmId, Hash)]) {
        let Some(path) = &self.path else { return };
        let mut text = format!("{}\n", self.boot);
        marks.iter().for_each(|(vm, digest)| text.push_str(&format!("{vm} {digest}\n")));
        let temporary = path.with_extension("new");
        let noted = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path));
        if let Err(e) = noted {
            tracing::warn!(path = %path.display(), error = %e, "the next start will ask the other members before VMs run");
            let _ = fs::remove_file(path);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::continuity::{Mark, digest_of};
    use crate::clock::UnixMillis;
    use crate::migration::records::VmRecord;
    use crate::types::{ByteSize, RecipeId};
    use crate::vm::{Firmware, VmSpec};

    fn record(n: u128, epoch: u64) -> VmRecord {
        let spec = VmSpec {
            id: VmId(uuid::Uuid::from_u128(n)),
            name: "web".parse().unwrap(),
            cpus: 1,
            memory: ByteSize::mib(64),
            recipe: RecipeId::of(b"r"),
            root_size: ByteSize::mib(1),
            user_data_size: ByteSize(0),
            nics: Vec::new(),
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: Firmware::Bios,
            disk_bus: Default::default(),
            system_uuid: None,
        };
        VmRecord { epoch, ..VmRecord::new(spec, Vec::new(), "disks-1", UnixMillis(1)) }
    }

    #[test]
    fn each_record_is_known_only_as_it_was_left_in_the_same_boot() {
        let dir = tempfile::tempdir().unwrap();
        let mark = |boot: &str| Continuity::at(Some(dir.path().join("mark")), boot);
        let found = |boot: &str| mark(boot).found();
        assert_eq!(found("a").mark(&record(1, 1)), Mark::Unknown);
        let left = [record(1, 1), record(2, 5)].map(|r| (r.spec.id, digest_of(&r)));
        mark("a").note(&left);
        assert_eq!(found("a").mark(&record(1, 1)), Mark::Same);
        assert_eq!(found("a").mark(&record(2, 3)), Mark::Other, "put back from a backup");
        assert_eq!(found("a").mark(&record(3, 1)), Mark::Unknown);
        assert_eq!(found("b").mark(&record(1, 1)), Mark::Unknown, "another boot says nothing");
        std::fs::write(dir.path().join("mark"), "a\nrubbish\n").unwrap();
        assert_eq!(found("a").mark(&record(1, 1)), Mark::Unknown);
    }
}
