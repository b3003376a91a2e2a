//! Which package a file belongs to, from dpkg's own records.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;

use super::error::BuildError;
use super::layer::Contents;
use super::scan::{NodeKind, Tree, TreePath};
use crate::component::manifest::show;

const INFO: &[u8] = b"var/lib/dpkg/info/";
const STATUS: &[u8] = b"var/lib/dpkg/status";
/// A package list or status file larger than this is not read.
const RECORD_BYTES_MAX: u64 = 64 << 20;

/// Owners of paths and versions of packages.
#[derive(Clone, Default, Debug)]
pub struct Owners {
    package_of: HashMap<Vec<u8>, String>,
    versions: BTreeMap<String, String>,
}

impl Owners {
    /// Reads `info/*.list` and `status` as they lie in the tree. A tree without them has no owners.
    pub fn read(tree: &Tree, contents: &dyn Contents) -> Result<Self, BuildError> {
        let mut owners = Self::default();
        for (path, node) in tree {
            let (Some(name), NodeKind::File { size_bytes }) = (path.0.strip_prefix(INFO), &node.kind) else {
                continue;
            };
            let Some(package) = package_of_record(name) else { continue };
            // dpkg's own records about a package belong to the package.
            owners.package_of.insert(path.0.clone(), package.clone());
            if name.ends_with(b".list") {
                for line in read(contents, &path.0, *size_bytes)?.split(|b| *b == b'\n') {
                    let Some(listed) = line.strip_prefix(b"/").filter(|l| !l.is_empty()) else { continue };
                    // Packages may still list /bin/x where /bin is a link to usr/bin.
                    let merged = [b"usr/", listed].concat();
                    let there = |p: &[u8]| tree.contains_key(&TreePath(p.to_vec()));
                    let place = if !there(listed) && there(&merged) { merged } else { listed.to_vec() };
                    owners.package_of.entry(place).or_insert_with(|| package.clone());
                }
            }
        }
        if let Some(NodeKind::File { size_bytes }) = tree.get(&TreePath(STATUS.to_vec())).map(|n| &n.kind) {
            owners.versions = versions(&read(contents, STATUS, *size_bytes)?);
        }
        Ok(owners)
    }

    /// Owners for a tree that dpkg does not know: the files picked from unpacked packages.
    pub fn of_unpacked(files: Vec<(Vec<u8>, String)>, versions: BTreeMap<String, String>) -> Self {
        Self { package_of: files.into_iter().collect(), versions }
    }

    pub fn of(&self, path: &[u8]) -> Option<&str> {
        self.package_of.get(path).map(String::as_str)
    }

    pub fn version_of(&self, package: &str) -> Option<&str> {
        self.versions.get(package).map(String::as_str)
    }
}

fn read(contents: &dyn Contents, path: &[u8], size_bytes: u64) -> Result<Vec<u8>, BuildError> {
    if size_bytes > RECORD_BYTES_MAX {
        return Err(BuildError::TooMuch { what: "bytes in a package record", object: show(path) });
    }
    let mut out = Vec::new();
    contents.open(path)?.take(size_bytes).read_to_end(&mut out).map_err(BuildError::read(show(path)))?;
    Ok(out)
}

/// `libc6` of `libc6:amd64.list`.
fn package_of_record(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let (stem, _) = name.rsplit_once('.')?;
    Some(stem.split(':').next()?.to_owned())
}

/// Package versions of a dpkg status file.
pub fn versions(status: &[u8]) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    let mut package = None;
    for line in String::from_utf8_lossy(status).lines() {
        if let Some(name) = line.strip_prefix("Package: ") {
            package = Some(name.to_owned());
        } else if let Some(version) = line.strip_prefix("Version: ")
            && let Some(package) = package.take()
        {
            out.insert(package, version.to_owned());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::scan::Root;
    use super::*;

    #[test]
    fn owners_come_from_the_lists_and_see_through_merged_directories() {
        let dir = tempfile::tempdir().unwrap();
        let put = |p: &str, c: &str| {
            let path = dir.path().join(p);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, c).unwrap();
        };
        put("usr/bin/ls", "x");
        put("etc/ls.conf", "x");
        put("etc/made-by-script", "x");
        put("var/lib/dpkg/info/coreutils:amd64.list", "/.\n/bin\n/bin/ls\n/etc/ls.conf\n");
        put("var/lib/dpkg/info/coreutils:amd64.postinst", "#!/bin/sh\n");
        put(
            "var/lib/dpkg/status",
            "Package: coreutils\nStatus: x\nVersion: 9.1-1\n\nPackage: a\nVersion: 2\n",
        );
        let root = Root::open(dir.path()).unwrap();
        let owners = Owners::read(&root.scan().unwrap(), &root).unwrap();
        for p in ["usr/bin/ls", "etc/ls.conf", "var/lib/dpkg/info/coreutils:amd64.postinst"] {
            assert_eq!(owners.of(p.as_bytes()), Some("coreutils"), "{p}");
        }
        assert_eq!(owners.of(b"etc/made-by-script"), None);
        assert_eq!(owners.version_of("coreutils"), Some("9.1-1"));
        assert_eq!(owners.version_of("a"), Some("2"));
    }
}
