//! A component out of a directory or a tar archive that somebody has, instead of packages.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::component::manifest::show;
use crate::component::tree::{self as united, Member};
use crate::component::{Kind, Manifest};
use crate::compose;
use crate::repository::Repository;
use crate::types::ComponentId;
use crate::types::codec::CodecError;

use super::acl::{self, Names};
use super::archive::Archive;
use super::error::BuildError;
use super::fragments;
use super::layer::{Contents, Identity, Layer, Secrets, Times};
use super::onto::{self, Moved};
use super::owner::Owners;
use super::scan::{LeftOut, NodeKind, Root, Tree, TreePath};

/// Who the imported component shall be.
#[derive(Clone, Debug)]
pub struct ImportIdentity {
    pub name: String,
    pub version: String,
    pub kind: Kind,
    /// Debian architecture name, for example `amd64`.
    pub architecture: String,
    /// The components it was built on; what the first of them already has is left out.
    pub requires: Vec<ComponentId>,
}

/// How to import.
#[derive(Clone, Copy, Default, Debug)]
pub struct ImportOptions {
    /// Take the tree as it is: its directories replace links, owners and modes of what it requires.
    pub as_is: bool,
}

/// As [`import_reporting`], reporting nothing.
pub fn import(
    repository: &Repository,
    source: &Path,
    identity: ImportIdentity,
) -> Result<ComponentId, BuildError> {
    import_reporting(repository, source, identity, ImportOptions::default(), &mut |_| {})
}

/// Stores a directory or a `.tar` or `.tar.zst` archive as a component and binds its name. Owners,
/// modes, attributes and times (whole seconds) are kept. A tree with secrets or identity in it is
/// refused, and so is what no disk could be composed with; what is left out is told.
pub fn import_reporting(
    repository: &Repository,
    source: &Path,
    identity: ImportIdentity,
    options: ImportOptions,
    left_out: &mut dyn FnMut(LeftOut),
) -> Result<ComponentId, BuildError> {
    check_identity(&identity)?;
    let base = Base::of(repository, &identity.requires)?;
    let metadata = fs::metadata(source).map_err(BuildError::read(source))?;
    let mut noted = Vec::new();
    let id = if metadata.is_dir() {
        let root = Root::open(source)?;
        let tree = root.scan_kept(&mut noted)?;
        store(repository, tree, &root, source, identity, &base, options, &mut noted)
    } else {
        let archive = Archive::open(source, repository.temporary_dir())?;
        let tree = archive.scan(base.names(), &mut noted)?;
        store(repository, tree, &archive, source, identity, &base, options, &mut noted)
    }?;
    noted.into_iter().for_each(left_out);
    Ok(id)
}

/// Whether name, version and the rest can be a component's, which is better known before the work.
pub fn check_identity(identity: &ImportIdentity) -> Result<(), BuildError> {
    let empty = Manifest {
        name: identity.name.clone(),
        version: identity.version.clone(),
        kind: identity.kind,
        architecture: identity.architecture.clone(),
        origin: String::new(),
        licences: Vec::new(),
        requires: identity.requires.clone(),
        conflicts: Vec::new(),
        packs: Vec::new(),
        entries: Vec::new(),
        fragments: Vec::new(),
    };
    Manifest::decode(&empty.encode())?;
    let architecture = &identity.architecture;
    if architecture.is_empty() || !architecture.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
    {
        let rule = format!("'{}' is no Debian architecture such as amd64", architecture.escape_debug());
        return Err(CodecError::Invalid { what: "component architecture", rule }.into());
    }
    Ok(())
}

/// Refuses an image of a container as it is stored, in layers, and a layer of one: what would come of it
/// is not what the image is.
fn check_no_layers(tree: &Tree, source: &Path) -> Result<(), BuildError> {
    const HINT: &str = "import the image as a whole, as 'docker export' or 'podman export' give it";
    let refuse = |path: &[u8], what: &str| {
        let reason = format!("{what}: {HINT}");
        Err(BuildError::Archive { archive: source.to_owned(), path: show(path), reason })
    };
    for path in tree.keys() {
        if path.0.rsplit(|b| *b == b'/').next().is_some_and(|name| name.starts_with(b".wh.")) {
            return refuse(&path.0, "it removes what another layer of a container image has");
        }
    }
    let has = |path: &[u8]| tree.contains_key(&TreePath(path.to_vec()));
    let has_layers = || has(b"repositories") || tree.keys().any(|p| p.0.ends_with(b"/layer.tar"));
    if has(b"oci-layout") && has(b"index.json") || has(b"manifest.json") && has_layers() {
        return refuse(b"", "it is a container image in layers, as 'docker save' gives it");
    }
    Ok(())
}

/// What the component is laid onto.
#[derive(Default)]
struct Base {
    /// All that it requires, directly or through others.
    members: Vec<Member>,
    /// The first of `requires`.
    first: Option<Arc<Manifest>>,
    tree: united::Tree,
}

impl Base {
    fn of(repository: &Repository, requires: &[ComponentId]) -> Result<Self, BuildError> {
        let mut members: Vec<Member> = Vec::new();
        let mut open: Vec<ComponentId> = requires.iter().rev().copied().collect();
        while let Some(id) = open.pop() {
            if members.iter().all(|(known, _)| *known != id) {
                let manifest = repository.manifest(&id)?;
                open.extend(manifest.requires.iter().rev());
                members.push((id, manifest));
            }
        }
        let first = requires.first().and_then(|id| members.iter().find(|(known, _)| known == id));
        let first = first.map(|(_, manifest)| manifest.clone());
        let tree = united::unite(&members, false).map_err(BuildError::Required)?;
        Ok(Self { members, first, tree })
    }

    /// Its accounts, and this machine's, on which the archive may have been packed.
    fn names(&self) -> Names {
        let mut names = Names::default();
        for (path, of) in [("/etc/passwd", &mut names.users), ("/etc/group", &mut names.groups)] {
            acl::add_names(of, &fs::read(path).unwrap_or_default());
        }
        for (_, manifest) in &self.members {
            for fragment in &manifest.fragments {
                let of = match &fragment.path[..] {
                    b"etc/passwd" => &mut names.users,
                    b"etc/group" => &mut names.groups,
                    _ => continue,
                };
                acl::add_names(of, &fragments::render(fragment));
            }
        }
        names
    }

    /// Refuses what the composer would refuse, in its words.
    fn check(&self, manifest: &Manifest) -> Result<(), BuildError> {
        let mut members = self.members.clone();
        members.push((manifest.id(), Arc::new(manifest.clone())));
        compose::check(&members).map_err(BuildError::Compose)
    }
}

#[allow(clippy::too_many_arguments)]
fn store(
    repository: &Repository,
    mut tree: Tree,
    contents: &dyn Contents,
    source: &Path,
    identity: ImportIdentity,
    base: &Base,
    options: ImportOptions,
    noted: &mut Vec<LeftOut>,
) -> Result<ComponentId, BuildError> {
    check_no_layers(&tree, source)?;
    if identity.kind != Kind::Os {
        tree.remove(&TreePath(Vec::new()));
    }
    if base.members.is_empty() {
        let removals = tree.iter().filter(|(_, n)| n.kind == NodeKind::Whiteout);
        let what = "a removal, and the component requires nothing that could have it";
        noted.extend(removals.map(|(path, _)| LeftOut::new(&path.0, what)));
    }
    let (tree, origins) = match options.as_is || base.members.is_empty() {
        true => (tree, Default::default()),
        false => onto::lay(tree, &base.tree)?,
    };
    let contents = Moved { contents, origins };
    let origin = source.file_name().unwrap_or_default().to_string_lossy();
    let origin = format!("imported from {}", origin.chars().take(200).collect::<String>());
    let identity = Identity {
        name: identity.name,
        version: identity.version,
        kind: identity.kind,
        architecture: identity.architecture,
        origin,
        licences: Vec::new(),
        requires: identity.requires,
        conflicts: Vec::new(),
    };
    let owners = Owners::read(&tree, &contents)?;
    let layer = Layer {
        tree,
        contents: &contents,
        base: base.first.as_deref(),
        owners,
        exclude: &[],
        secrets: Secrets::Refuse,
        times: Times::Keep,
    };
    let check = |draft: &Manifest| base.check(draft);
    let manifest = layer.store(repository, identity, &check, &mut |path, what| {
        noted.push(LeftOut { path, what: what.to_owned() });
    })?;
    // What cannot be read again must not be stored.
    Manifest::decode(&manifest.encode())?;
    let id = repository.put_manifest(&manifest)?;
    repository.bind_component(&manifest, id)?;
    Ok(id)
}
