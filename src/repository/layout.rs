//! Where everything lies in a repository's directory, how files get there, and who may open it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::{IoContext, ObjectId, ObjectKind, RepositoryError, Result};
use crate::durable::{self, PendingFile};
use crate::types::Hash;

/// The file that says this is a repository, and of which version.
const MARKER: &str = "cicada-repository";
const MARKER_VERSION: &str = "cicada-repository 1";
const LOCK: &str = "lock";
/// There while a process has the repository open; found at open, the index may be out of step.
const UNCLEAN: &str = "unclean";
/// What the index must bear to be believed.
const INDEX_SEAL: &str = "index-seal";
const DIRECTORIES: [&str; 12] = [
    "packs",
    "manifests",
    "recipes",
    "nodes",
    "refs",
    "hot",
    "blocks",
    "deltas",
    "incoming",
    "compositions",
    "temporary",
    "quarantine",
];

/// The paths of a repository.
#[derive(Debug)]
pub(super) struct Layout {
    pub root: PathBuf,
    pub compositions: PathBuf,
    pub temporary: PathBuf,
}

/// Who opened it before, and how that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LastUse {
    Clean,
    /// A process died; what it wrote to the page cache is still there.
    Killed,
    /// The machine went down: files not synced may hold anything.
    Rebooted,
}

/// The held lock of an open repository; closing the file releases it.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Layout {
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            compositions: root.join("compositions"),
            temporary: root.join("temporary"),
        }
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn marker_exists(&self) -> bool {
        self.root.join(MARKER).exists()
    }

    /// Makes an empty repository. The marker comes last: without it nothing was created yet, and
    /// an interrupted creation can be repeated.
    pub fn create(&self) -> Result<()> {
        let root = &self.root;
        DirBuilder::new().recursive(true).mode(0o700).create(root).at("create", root)?;
        for entry in fs::read_dir(root).at("list", root)? {
            let entry = entry.at("list", root)?;
            if !is_leftover_of_creation(&entry).at("inspect", &entry.path())? {
                let name = entry.file_name().to_string_lossy().into_owned();
                let reason = format!("it is not empty: it holds '{name}'; choose an empty directory");
                return Err(RepositoryError::NotARepository { dir: root.clone(), reason });
            }
        }
        fs::set_permissions(root, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .at("set the mode of", root)?;
        self.make_directories()?;
        let marker = root.join(MARKER);
        durable::write(&marker, format!("{MARKER_VERSION}\n").as_bytes()).at("write", &marker)
    }

    pub fn make_directories(&self) -> Result<()> {
        DIRECTORIES.into_iter().try_for_each(|name| make_dir(&self.dir(name)))
    }

    /// Refuses a directory that is no repository, or one with a version or a required feature that
    /// is not known here.
    pub fn check_marker(&self) -> Result<()> {
        let path = self.root.join(MARKER);
        let not_one = |reason: &str| RepositoryError::NotARepository {
            dir: self.root.clone(),
            reason: reason.to_owned(),
        };
        let mut text = String::new();
        match File::open(&path).and_then(|f| f.take(4096).read_to_string(&mut text)) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(not_one(
                    "it has no file 'cicada-repository'; a broker makes one in an empty directory",
                ));
            }
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                return Err(not_one("its marker is not text"));
            }
            Err(e) => return Err(RepositoryError::io("read", &path, 0, e)),
        }
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        if first.split(' ').next() != Some(MARKER) {
            return Err(not_one("its marker does not begin with 'cicada-repository'"));
        }
        let unknown = |found: String| RepositoryError::Version { dir: self.root.clone(), found };
        if first != MARKER_VERSION {
            return Err(unknown(format!("the format '{first}'")));
        }
        match lines.find_map(|l| l.strip_prefix("requires ")) {
            Some(feature) => Err(unknown(format!("the feature '{feature}'"))),
            None => Ok(()),
        }
    }

    /// Takes the exclusive lock, or says who holds it.
    pub fn lock(&self) -> Result<Lock> {
        let path = self.root.join(LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .at("open", &path)?;
        match durable::lock_exclusive(&file) {
            Ok(true) => {}
            Ok(false) => {
                let mut text = String::new();
                let pid =
                    (&file).take(20).read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(RepositoryError::Locked { dir: self.root.clone(), pid });
            }
            Err(e) => return Err(RepositoryError::io("lock", &path, 0, e)),
        }
        // The number is for people only; the lock itself is the kernel's and ends with the process.
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).at("write", &path)?;
        Ok(Lock { _file: file })
    }

    /// Marks the repository as open and tells how the last use ended.
    pub fn begin_use(&self) -> Result<LastUse> {
        let path = self.root.join(UNCLEAN);
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let last = match fs::read_to_string(&path) {
            Ok(text) if !boot.is_empty() && text == boot => LastUse::Killed,
            Ok(_) => LastUse::Rebooted,
            Err(e) if e.kind() == io::ErrorKind::NotFound => LastUse::Clean,
            Err(_) => LastUse::Rebooted,
        };
        self.write(&path, boot.as_bytes())?;
        Ok(last)
    }

    /// The seal the index bore when it was closed last.
    pub fn index_seal(&self) -> Option<Vec<u8>> {
        fs::read(self.root.join(INDEX_SEAL)).ok()
    }

    pub fn remember_index_seal(&self, seal: &[u8]) -> Result<()> {
        self.write(&self.root.join(INDEX_SEAL), seal)
    }

    pub fn end_use(&self) -> Result<()> {
        let path = self.root.join(UNCLEAN);
        durable::remove(&path).at("remove", &path)
    }

    /// Empties a directory of leftovers or of derived data.
    pub fn empty_dir(&self, name: &str) -> Result<()> {
        let dir = self.dir(name);
        make_dir(&dir)?;
        for entry in fs::read_dir(&dir).at("list", &dir)? {
            let entry = entry.at("list", &dir)?;
            let path = entry.path();
            let is_dir = entry.file_type().at("inspect", &path)?.is_dir();
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.at("remove", &path)?;
        }
        Ok(())
    }

    /// The file of a pack, manifest or recipe. Nodes have no file of their own.
    pub fn object_path(&self, object: &ObjectId) -> PathBuf {
        self.root.join(relative_path(object))
    }

    pub fn quarantine_path(&self, object: &ObjectId) -> PathBuf {
        let hash = Hash::from_bytes(*object.hash_bytes());
        self.dir("quarantine").join(format!("{}-{hash}", object.kind()))
    }

    /// A new file in `temporary/`; dropped without [`Layout::publish`], it is gone.
    pub fn pending(&self, name: &str) -> Result<PendingFile> {
        let path = self.temporary.join(name);
        PendingFile::create(&path).at("create", &path)
    }

    /// Makes a finished temporary file durable under its final name, replacing what is there.
    pub fn publish(&self, mut pending: PendingFile, target: &Path) -> Result<()> {
        let need_bytes = pending.file().metadata().map_or(0, |m| m.len());
        pending.file().sync_all().map_err(|e| RepositoryError::io("write", target, need_bytes, e))?;
        rename_into(pending.temporary_path(), target).at("create", target)?;
        durable::sync_dir_of(target).at("make durable", target)
    }

    /// Writes a small file durably.
    pub fn write(&self, target: &Path, bytes: &[u8]) -> Result<()> {
        let mut pending = self.pending("record")?;
        let written = pending.file().write_all(bytes);
        written.map_err(|e| RepositoryError::io("write", target, bytes.len() as u64, e))?;
        self.publish(pending, target)
    }

    /// Sets a damaged object aside and returns the error that reports it. `opened` is the file the
    /// damage was seen in: when another has taken its place meanwhile, that one stays.
    pub fn quarantine(&self, object: ObjectId, opened: &File, reason: String) -> RepositoryError {
        let from = self.object_path(&object);
        let path = self.quarantine_path(&object);
        let same = match (opened.metadata(), fs::metadata(&from)) {
            (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
            _ => false,
        };
        if same {
            let moved = fs::rename(&from, &path)
                .and_then(|()| durable::sync_dir_of(&from))
                .and_then(|()| durable::sync_dir_of(&path));
            if let Err(e) = moved {
                return RepositoryError::io("set aside", &from, 0, e);
            }
        }
        tracing::error!(%object, path = %path.display(), reason, "damaged object set aside");
        RepositoryError::Damaged { object, path, reason }
    }
}

/// The path of a pack, manifest or recipe below the repository's directory.
pub(super) fn relative_path(object: &ObjectId) -> PathBuf {
    let name = Hash::from_bytes(*object.hash_bytes()).to_string();
    let (dir, extension) = place_of(object.kind());
    Path::new(dir).join(&name[..2]).join(format!("{name}.{extension}"))
}

/// The directory and file name extension of an object kind that has files.
pub(super) fn place_of(kind: ObjectKind) -> (&'static str, &'static str) {
    match kind {
        ObjectKind::Pack => ("packs", "pack"),
        ObjectKind::Manifest => ("manifests", "manifest"),
        ObjectKind::Recipe => ("recipes", "recipe"),
        ObjectKind::Node => ("nodes", "nodes"),
    }
}

/// Calls `each` with every object file of a kind (for nodes: every bundle) and its hash. Files of
/// other names are returned: they do not belong here.
pub(super) fn walk_objects(
    layout: &Layout,
    kind: ObjectKind,
    mut each: impl FnMut([u8; 32], &Path, &fs::Metadata) -> Result<()>,
) -> Result<Vec<PathBuf>> {
    let (dir, extension) = place_of(kind);
    let dir = layout.dir(dir);
    let mut strays = Vec::new();
    for fan in fs::read_dir(&dir).at("list", &dir)? {
        let fan = fan.at("list", &dir)?.path();
        let files = match fs::read_dir(&fan) {
            Ok(files) => files,
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
                strays.push(fan);
                continue;
            }
            Err(e) => return Err(RepositoryError::io("list", &fan, 0, e)),
        };
        for file in files {
            let file = file.at("list", &fan)?;
            let path = file.path();
            let hash = hash_in(&file.file_name(), extension)
                .filter(|h| fan.file_name().is_some_and(|f| f == &h.to_string()[..2]));
            let meta = match file.metadata() {
                Ok(meta) => meta,
                // Removed since the directory was read.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(RepositoryError::io("inspect", &path, 0, e)),
            };
            match hash {
                Some(hash) if meta.is_file() => each(*hash.as_bytes(), &path, &meta)?,
                _ => strays.push(path),
            }
        }
    }
    Ok(strays)
}

/// The hashes of a kind's objects that begin with the byte `fan`, as the directory has them, and
/// what does not belong there. Unlike [`walk_objects`] it looks at no file.
pub(super) fn list_fan(layout: &Layout, kind: ObjectKind, fan: u8) -> Result<(Vec<[u8; 32]>, Vec<PathBuf>)> {
    let (dir, extension) = place_of(kind);
    let dir = layout.dir(dir).join(format!("{fan:02x}"));
    let (mut held, mut strays) = (Vec::new(), Vec::new());
    let files = match fs::read_dir(&dir) {
        Ok(files) => files,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok((held, strays));
        }
        Err(e) => return Err(RepositoryError::io("list", &dir, 0, e)),
    };
    for file in files {
        let file = file.at("list", &dir)?;
        let hash = hash_in(&file.file_name(), extension).filter(|h| h.as_bytes()[0] == fan);
        match hash {
            Some(hash) if file.file_type().is_ok_and(|t| t.is_file()) => held.push(*hash.as_bytes()),
            _ => strays.push(file.path()),
        }
    }
    Ok((held, strays))
}

/// What lies beside the fan-out directories of a kind.
pub(super) fn list_strays(layout: &Layout, kind: ObjectKind) -> Result<Vec<PathBuf>> {
    let dir = layout.dir(place_of(kind).0);
    let mut strays = Vec::new();
    for entry in fs::read_dir(&dir).at("list", &dir)? {
        let entry = entry.at("list", &dir)?;
        let name = entry.file_name();
        let is_fan = name.len() == 2
            && name.as_encoded_bytes().iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            && entry.file_type().is_ok_and(|t| t.is_dir());
        if !is_fan {
            strays.push(entry.path());
        }
    }
    Ok(strays)
}

/// The hash in an object's file name.
fn hash_in(name: &std::ffi::OsStr, extension: &str) -> Option<Hash> {
    name.to_str()?.strip_suffix(extension)?.strip_suffix('.')?.parse().ok()
}

/// Renews a file's time, from which the grace period of the garbage collector counts.
pub(super) fn touch(path: &Path) -> io::Result<()> {
    File::open(path)?.set_modified(SystemTime::now())
}

fn make_dir(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Ok(()) => durable::sync_dir_of(path).at("make durable", path),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(RepositoryError::io("create", path, 0, e)),
    }
}

/// Fan-out directories come into being with the first file in them.
fn rename_into(from: &Path, target: &Path) -> io::Result<()> {
    match fs::rename(from, target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let dir = target.parent().unwrap_or(target);
            fs::create_dir_all(dir)?;
            durable::sync_dir_of(dir)?;
            fs::rename(from, target)
        }
        other => other,
    }
}

fn is_leftover_of_creation(entry: &fs::DirEntry) -> io::Result<bool> {
    let name = entry.file_name();
    let name = name.to_string_lossy();
    if name.starts_with(MARKER) && name.ends_with(durable::TEMPORARY_SUFFIX) {
        return Ok(true);
    }
    Ok(DIRECTORIES.contains(&&*name)
        && entry.file_type()?.is_dir()
        && fs::read_dir(entry.path())?.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PackId;

    #[test]
    fn a_foreign_directory_is_not_made_a_repository_but_an_interrupted_creation_is() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        fs::create_dir(dir.path().join("packs")).unwrap();
        fs::write(dir.path().join("photo.jpg"), b"x").unwrap();
        let e = layout.create().unwrap_err().to_string();
        assert!(e.contains("photo.jpg"), "{e}");
        fs::remove_file(dir.path().join("photo.jpg")).unwrap();
        assert!(matches!(layout.check_marker(), Err(RepositoryError::NotARepository { .. })));
        layout.create().unwrap();
        layout.check_marker().unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_later_version_or_an_unknown_feature_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        layout.create().unwrap();
        let marker = dir.path().join(MARKER);
        for (text, readable) in [
            ("cicada-repository 1\n", true),
            ("cicada-repository 1\nnote of a later version\n", true),
            ("cicada-repository 2\n", false),
            ("cicada-repository 1\nrequires sha3\n", false),
            ("", false),
            ("something else", false),
        ] {
            fs::write(&marker, text).unwrap();
            assert_eq!(layout.check_marker().is_ok(), readable, "{text:?}");
        }
    }

    #[test]
    fn the_lock_names_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        let held = layout.lock().unwrap();
        match layout.lock() {
            Err(RepositoryError::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(held);
        layout.lock().unwrap();
    }

    #[test]
    fn quarantine_leaves_a_fresh_copy_alone() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        layout.create().unwrap();
        let object = ObjectId::Pack(PackId::of(b"p"));
        let path = layout.object_path(&object);
        layout.write(&path, b"bad").unwrap();
        let opened = File::open(&path).unwrap();
        layout.write(&path, b"good").unwrap();
        layout.quarantine(object, &opened, "test".into());
        assert_eq!(fs::read(&path).unwrap(), b"good");
        layout.quarantine(object, &File::open(&path).unwrap(), "test".into());
        assert!(!path.exists() && layout.quarantine_path(&object).exists());
    }
}
