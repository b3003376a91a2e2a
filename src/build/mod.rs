//! Level 3: components out of the distribution's packages, directories and archives.

mod acl;
mod apt;
mod archive;
mod error;
mod filter;
mod fragments;
mod import;
mod initrd;
mod layer;
mod materialise;
mod namespace;
mod onto;
mod owner;
mod pax;
mod sandbox;
mod scan;
mod source;
mod steps;
mod tar_reader;
mod withhold;

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

pub use error::BuildError;
pub use import::{ImportIdentity, ImportOptions, check_identity, import, import_reporting};
pub use materialise::materialise;
pub use namespace::{check_dir, command_without_root};
pub use scan::LeftOut;

use crate::component::definition::{Definition, Method, VersionRule, matches};
use crate::component::{Kind, Manifest};
use crate::repository::Repository;
use crate::types::{ComponentId, Hash};
use apt::{Apt, Packages};
use layer::{Identity, Layer, Secrets, Times};
use owner::Owners;
use sandbox::Sandbox;
use scan::Root;
use source::Source;

/// Names what this module makes of a definition: with another builder, equal definitions and
/// packages may give another component, so nothing built by the other is reused.
const BUILDER: &str = "cicada-build/3";
/// Whose packages are unpacked where a definition is built on no OS.
const SUITE_DEFAULT: &str = "bookworm";

/// How to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Package lists, packages, OS trees and work in progress; may be removed at any time no build
    /// runs. Gigabytes.
    pub cache_dir: PathBuf,
    /// Leave a failed build's tree in `failed/NAME` of the cache for inspection.
    pub keep_failed: bool,
    /// Build even what an earlier build of the same inputs made.
    pub rebuild: bool,
}

/// What a build reports while it runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BuildEvent {
    Begun {
        component: String,
        number: usize,
        total: usize,
    },
    Step {
        component: String,
        step: String,
    },
    /// Something secret that the package tools made was left out.
    LeftOut {
        component: String,
        path: String,
        what: String,
    },
    Finished {
        component: String,
        id: ComponentId,
        reused: bool,
    },
}

/// A component that was built, or found built.
#[derive(Clone, PartialEq, Debug)]
pub struct Built {
    pub id: ComponentId,
    pub name: String,
    pub version: String,
    pub kind: Kind,
    /// Same definition, same OS and same package versions as an earlier build's.
    pub reused: bool,
    pub plain_bytes: u64,
    /// Spent in the distribution's tools, and in reading, hashing and packing what they made.
    pub seconds_tools: f64,
    pub seconds_ingest: f64,
}

/// Builds components from definition files, each OS before what is built on it, stores them and
/// binds their names. Needs root, this machine's or that of a user namespace (see
/// [`command_without_root`]), and the tools of [`BuildError::ToolMissing`].
pub fn build(
    repository: &Repository,
    definitions: &[PathBuf],
    options: &BuildOptions,
    progress: &mut dyn FnMut(BuildEvent),
) -> Result<Vec<Built>, BuildError> {
    let sources = source::read_in_order(definitions)?;
    if !rustix::process::geteuid().is_root() {
        return Err(BuildError::NotRoot);
    }
    let _lock = lock_cache(&options.cache_dir)?;
    let mut builder = Builder { repository, options, progress, apts: HashMap::new(), os_ids: HashMap::new() };
    let total = sources.len();
    let mut out = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let component = source.definition.name.clone();
        builder.report(BuildEvent::Begun { component: component.clone(), number: index + 1, total });
        let built = builder.build(source)?;
        builder.report(BuildEvent::Finished { component, id: built.id, reused: built.reused });
        out.push(built);
    }
    Ok(out)
}

/// Makes the cache this build's alone until the file is closed, and clears what a killed one left.
fn lock_cache(cache: &Path) -> Result<fs::File, BuildError> {
    check_dir(cache)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(cache).map_err(BuildError::write(cache))?;
    check_dir(cache)?;
    for part in ["apt", "trees", "logs", "failed"] {
        make_dir(&cache.join(part))?;
    }
    let path = cache.join("lock");
    let file = open_lock(&path).map_err(BuildError::write(&path))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let reason = "another build is using it: wait for it, or give another directory";
        BuildError::CacheDirectory { path: cache.to_owned(), reason }
    })?;
    let work = sandbox::work_dir(cache);
    make_dir(&work)?;
    fs::remove_dir_all(&work).map_err(BuildError::write(&work))?;
    Ok(file)
}

fn open_lock(path: &Path) -> std::io::Result<fs::File> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    fs::File::options().create(true).truncate(false).write(true).mode(0o600).custom_flags(flags).open(path)
}

/// A directory of the cache: made, or there already as ours and no link.
fn make_dir(path: &Path) -> Result<(), BuildError> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        // Other users' programs (apt's) look into some, whatever the umask is.
        Ok(()) => {
            return fs::set_permissions(path, fs::Permissions::from_mode(0o755))
                .map_err(BuildError::write(path));
        }
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(BuildError::write(path)(e)),
    }
    let meta = fs::symlink_metadata(path).map_err(BuildError::read(path))?;
    let name = path.file_name().unwrap_or_default();
    let of_apt = name == "partial" && meta.is_dir();
    if !of_apt && (!meta.is_dir() || meta.uid() != 0 || meta.mode() & 0o022 != 0) {
        return Err(BuildError::Planted { path: path.to_owned() });
    }
    Ok(())
}

/// Opens a file for reading; a link is an error.
fn open_no_follow(path: &Path) -> std::io::Result<fs::File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    fs::File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path)
}

/// What an earlier build noted in the cache. A file of another user, or one that has names elsewhere,
/// was not noted by a build.
fn own_file(path: &Path) -> std::io::Result<String> {
    let mut file = open_no_follow(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() || meta.uid() != rustix::process::geteuid().as_raw() || meta.nlink() != 1 {
        return Err(std::io::ErrorKind::PermissionDenied.into());
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

struct Builder<'a> {
    repository: &'a Repository,
    options: &'a BuildOptions,
    progress: &'a mut dyn FnMut(BuildEvent),
    /// By suite and architecture; lists are fetched once a call.
    apts: HashMap<(String, String), Rc<Apt>>,
    /// What this call built, by name: goes before what the repository has bound.
    os_ids: HashMap<String, ComponentId>,
}

/// The OS a component is built on.
struct Base {
    id: ComponentId,
    manifest: Manifest,
}

impl Builder<'_> {
    fn report(&mut self, event: BuildEvent) {
        (self.progress)(event);
    }

    fn build(&mut self, source: &Source) -> Result<Built, BuildError> {
        let definition = &source.definition;
        let begun = Instant::now();
        let base = self.base_of(definition)?;
        let mut sandbox = Sandbox::new(&definition.name, &self.options.cache_dir)?;
        let apt = self.apt_of(definition, &sandbox)?;
        let status = base.as_ref().map_or(Vec::new(), |b| status_of(&b.manifest));
        let packages = match &apt {
            Some(apt) => resolve(definition, apt, &status, &sandbox)?,
            None => Packages::new(),
        };
        let record = self.record_of(source, base.as_ref(), &packages);
        if let Some(built) = self.reuse(&record, begun)? {
            self.note(definition, built.id);
            return Ok(built);
        }
        // What is only unpacked needs the OS for its scripts alone.
        if let Some(base) = &base {
            sandbox.set_lower(materialise::cached(self.repository, &self.options.cache_dir, &base.id)?);
        }
        let inputs = steps::Inputs { source, apt: apt.as_deref(), os_status: &status, packages: &packages };
        let result = self.make(&inputs, base, &sandbox, begun);
        if result.is_err() && self.options.keep_failed {
            sandbox.keep(&self.options.cache_dir.join("failed").join(&definition.name))?;
        }
        let built = result?;
        let text = format!("{}\n", built.id);
        crate::durable::write(&record, text.as_bytes()).map_err(BuildError::write(&record))?;
        self.note(definition, built.id);
        Ok(built)
    }

    fn make(
        &mut self,
        inputs: &steps::Inputs<'_>,
        base: Option<Base>,
        sandbox: &Sandbox,
        begun: Instant,
    ) -> Result<Built, BuildError> {
        let definition = &inputs.source.definition;
        let component = definition.name.clone();
        let mut note = |step: &str| {
            (self.progress)(BuildEvent::Step { component: component.clone(), step: step.to_owned() })
        };
        let unpacked = steps::make_tree(inputs, sandbox, &mut note)?;
        note("packing");
        let seconds_tools = begun.elapsed().as_secs_f64();

        let root = Root::open(&sandbox.upper())?;
        let mut tree = root.scan()?;
        if definition.kind != Kind::Os {
            // The root directory is the OS's.
            tree.remove(&scan::TreePath(Vec::new()));
        }
        let owners = match definition.method {
            Method::Unpack => Owners::of_unpacked(unpacked.files, inputs.packages.iter().cloned().collect()),
            Method::Bootstrap | Method::Install => Owners::read(&tree, &root)?,
        };
        let identity = Identity {
            name: component.clone(),
            version: version_of(definition, &owners)?,
            kind: definition.kind,
            architecture: definition.architecture.clone(),
            origin: definition.origin.clone(),
            licences: definition.licences.clone(),
            requires: base.iter().map(|b| b.id).collect(),
            conflicts: definition.conflicts.clone(),
        };
        let layer = Layer {
            tree,
            contents: &root,
            base: base.as_ref().map(|b| &b.manifest),
            owners,
            exclude: &definition.exclude,
            secrets: Secrets::LeaveOut,
            times: Times::Normalise,
        };
        let manifest = layer.store(self.repository, identity, &|_| Ok(()), &mut |path, what| {
            let (component, what) = (component.clone(), what.to_owned());
            (self.progress)(BuildEvent::LeftOut { component, path, what })
        })?;
        let id = self.repository.put_manifest(&manifest)?;
        self.repository.bind_component(&manifest, id)?;
        let seconds_ingest = begun.elapsed().as_secs_f64() - seconds_tools;
        Ok(built_of(id, &manifest, false, seconds_tools, seconds_ingest))
    }

    fn note(&mut self, definition: &Definition, id: ComponentId) {
        if definition.kind == Kind::Os {
            self.os_ids.insert(definition.name.clone(), id);
        }
    }

    fn base_of(&self, definition: &Definition) -> Result<Option<Base>, BuildError> {
        let Some(os) = &definition.os else { return Ok(None) };
        let id = match self.os_ids.get(os) {
            Some(id) => *id,
            None => self.repository.resolve_component(os).map_err(|error| match error {
                crate::repository::RepositoryError::UnknownComponent { .. } => {
                    BuildError::OsMissing { component: definition.name.clone(), os: os.clone() }
                }
                other => other.into(),
            })?,
        };
        let manifest = (*self.repository.manifest(&id)?).clone();
        if manifest.kind != Kind::Os {
            return Err(BuildError::OsOfOtherKind {
                component: definition.name.clone(),
                os: os.clone(),
                kind: manifest.kind.to_string(),
            });
        }
        Ok(Some(Base { id, manifest }))
    }

    /// `None` for a definition without packages.
    fn apt_of(&mut self, definition: &Definition, sandbox: &Sandbox) -> Result<Option<Rc<Apt>>, BuildError> {
        if definition.packages.is_empty() && definition.method != Method::Bootstrap {
            return Ok(None);
        }
        let suite = definition.suite.as_deref().unwrap_or(SUITE_DEFAULT);
        let key = (suite.to_owned(), definition.architecture.clone());
        if let Some(apt) = self.apts.get(&key) {
            return Ok(Some(apt.clone()));
        }
        let apt = Apt::prepare(&self.options.cache_dir, suite, &definition.architecture, sandbox)?;
        let apt = Rc::new(apt);
        self.apts.insert(key, apt.clone());
        Ok(Some(apt))
    }

    /// Where the outcome of these very inputs is noted: the builder, the definition with all it
    /// includes, the OS, and every package with its version.
    fn record_of(&self, source: &Source, base: Option<&Base>, packages: &Packages) -> PathBuf {
        let mut inputs = format!("{BUILDER}\n{}\n", source.hash());
        if let Some(base) = base {
            inputs += &format!("{}\n", base.id);
        }
        for (name, version) in packages {
            inputs += &format!("{name} {version}\n");
        }
        let name = Hash::of(inputs.as_bytes()).to_string();
        self.options.cache_dir.join(format!("built-{name}"))
    }

    fn reuse(&self, record: &Path, begun: Instant) -> Result<Option<Built>, BuildError> {
        if self.options.rebuild {
            return Ok(None);
        }
        let id: Option<ComponentId> = own_file(record).ok().and_then(|t| t.trim().parse().ok());
        let Some(id) = id.filter(|id| self.repository.has_manifest(id)) else { return Ok(None) };
        if !self.repository.missing_packs(&[id])?.is_complete() {
            return Ok(None);
        }
        let manifest = self.repository.manifest(&id)?;
        self.repository.bind_component(&manifest, id)?;
        Ok(Some(built_of(id, &manifest, true, begun.elapsed().as_secs_f64(), 0.0)))
    }
}

fn built_of(
    id: ComponentId,
    manifest: &Manifest,
    reused: bool,
    seconds_tools: f64,
    seconds_ingest: f64,
) -> Built {
    Built {
        id,
        name: manifest.name.clone(),
        version: manifest.version.clone(),
        kind: manifest.kind,
        reused,
        plain_bytes: manifest.plain_bytes(),
        seconds_tools,
        seconds_ingest,
    }
}

/// Every package the component will have been made of.
fn resolve(
    definition: &Definition,
    apt: &Apt,
    os_status: &[u8],
    sandbox: &Sandbox,
) -> Result<Packages, BuildError> {
    let wanted = steps::wanted(definition);
    match definition.method {
        Method::Bootstrap => apt.resolve(b"", &wanted, sandbox),
        Method::Install => apt.resolve(os_status, &wanted, sandbox),
        Method::Unpack => {
            let mut packages = apt.resolve(b"", &wanted, sandbox)?;
            packages.retain(|(name, _)| {
                definition.packages.iter().any(|p| p.name == *name)
                    || definition.unpack_also.iter().any(|p| matches(p.as_bytes(), name.as_bytes()))
            });
            Ok(packages)
        }
    }
}

/// dpkg's status file as it is in the OS.
fn status_of(manifest: &Manifest) -> Vec<u8> {
    let status = manifest.fragments.iter().find(|f| f.path == b"var/lib/dpkg/status");
    status.map_or(Vec::new(), fragments::render)
}

fn version_of(definition: &Definition, owners: &Owners) -> Result<String, BuildError> {
    match &definition.version {
        VersionRule::Explicit(version) => Ok(version.clone()),
        VersionRule::FromPackage(package) => owners.version_of(package).map(str::to_owned).ok_or_else(|| {
            BuildError::VersionUnknown { component: definition.name.clone(), package: package.clone() }
        }),
    }
}
