//! The steps from a definition to a tree: bootstrap, install or unpack, then files and scripts.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::apt::{Apt, Packages};
use super::error::BuildError;
use super::initrd;
use super::sandbox::{Sandbox, quoted};
use super::source::Source;
use crate::component::definition::{Definition, Method, matches};

/// apt inside the tree sees the packages that were downloaded outside, and nothing else. Neither it
/// nor what it runs can change them, so apt takes no lock there.
const INSTALL: &str = r##"
IN_TREE="--ro-bind $LISTS /var/lib/apt/lists --ro-bind $ARCHIVES /var/cache/apt/archives"
in_tree /bin/sh -euc "printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d"
in_tree apt-get -o Debug::NoLocking=1 -o Dir::Etc::sourcelist=/run/cicada/distribution.sources -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root \
    --yes --no-download --no-install-recommends install "$@"
in_tree rm /usr/sbin/policy-rc.d
"##;

/// What a tree is made from.
pub struct Inputs<'a> {
    pub source: &'a Source,
    /// `None` for a definition without packages.
    pub apt: Option<&'a Apt>,
    /// dpkg's status file in the OS.
    pub os_status: &'a [u8],
    pub packages: &'a Packages,
}

/// Makes the tree of a definition in the sandbox.
pub fn make_tree(
    inputs: &Inputs<'_>,
    sandbox: &Sandbox,
    note: &mut dyn FnMut(&str),
) -> Result<Unpacked, BuildError> {
    let source = inputs.source;
    let definition = &source.definition;
    let mut unpacked = Unpacked::default();
    match definition.method {
        Method::Bootstrap => {
            note("bootstrapping");
            if let Some(apt) = inputs.apt {
                bootstrap(definition, sandbox, apt)?;
            }
        }
        Method::Install => {
            note("making accounts");
            make_accounts(definition, sandbox)?;
            place(source, sandbox, true, &mut unpacked)?;
            note("installing packages");
            if let Some(apt) = inputs.apt {
                install(definition, sandbox, apt, inputs.os_status)?;
            }
        }
        Method::Unpack => {
            note("unpacking packages");
            if let Some(apt) = inputs.apt {
                unpacked = unpack(sandbox, apt, inputs.packages)?;
            }
        }
    }
    note("placing files");
    place(source, sandbox, false, &mut unpacked)?;
    for run in definition.runs.iter().filter(|r| definition.has_option(r.option.as_deref())) {
        note("running the definition's script");
        sandbox.run(
            "the definition's script",
            &format!("in_tree /bin/sh -euc {}", quoted(&run.script)),
            &[],
        )?;
    }
    Ok(unpacked)
}

/// What unpacking left beside the tree, and which files of the component came from it.
#[derive(Default, Debug)]
pub struct Unpacked {
    /// Package and its directory.
    dirs: Vec<(String, PathBuf)>,
    pub files: Vec<(Vec<u8>, String)>,
}

impl Unpacked {
    /// The one file that matches a pattern, with its package.
    fn find(&self, component: &str, pattern: &str) -> Result<(PathBuf, String), BuildError> {
        let mut found = Vec::new();
        for (package, dir) in &self.dirs {
            walk(dir, &mut |path| {
                let inside = path.strip_prefix(dir).unwrap_or(path).as_os_str().as_bytes();
                if matches(pattern.as_bytes(), inside) {
                    found.push((path.to_owned(), package.clone()));
                }
            })
            .map_err(BuildError::read(dir))?;
        }
        match found.len() {
            1 => Ok(found.remove(0)),
            count => Err(BuildError::UnpackedMatch {
                component: component.to_owned(),
                pattern: pattern.to_owned(),
                count,
            }),
        }
    }
}

fn walk(dir: &Path, found: &mut dyn FnMut(&Path)) -> std::io::Result<()> {
    for item in fs::read_dir(dir)? {
        let item = item?;
        match item.file_type()? {
            t if t.is_dir() => walk(&item.path(), found)?,
            t if t.is_file() => found(&item.path()),
            _ => {}
        }
    }
    Ok(())
}

fn bootstrap(definition: &Definition, sandbox: &Sandbox, apt: &Apt) -> Result<(), BuildError> {
    let wanted = wanted(definition);
    apt.download(b"", &wanted, sandbox)?;
    let names: Vec<String> = definition.packages.iter().map(|p| p.argument()).collect();
    let mut arguments: Vec<String> = [
        "mmdebstrap",
        "--variant=apt",
        "--format=directory",
        "--mode=root",
        // Lists and packages are here already, and mounts need rights that package scripts must not have.
        "--skip=update,check/empty,chroot/mount,cleanup/apt/lists",
        // A merged /usr from the start: the conversion would bring in perl.
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        r#"--setup-hook=mkdir -p "$1/var/cache/apt/archives" "$1/var/lib/apt/lists""#,
        r#"--setup-hook=find /apt/archives -maxdepth 1 -name '*.deb' -exec cp -t "$1/var/cache/apt/archives" {} +"#,
        r#"--setup-hook=find /apt/lists -maxdepth 1 -type f ! -name lock -exec cp -p -t "$1/var/lib/apt/lists" {} +"#,
        "--aptopt=APT::Install-Recommends \"false\"",
        "--aptopt=APT::Sandbox::User \"root\"",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.push(format!("--architectures={}", definition.architecture));
    arguments.push(format!("--include={}", names.join(",")));
    // The first pattern may be one that takes back what an exclusion took; dpkg's last match wins.
    for pattern in &definition.leave_out {
        arguments.push(match pattern.strip_prefix('!') {
            Some(kept) => format!("--dpkgopt=path-include=/{kept}"),
            None => format!("--dpkgopt=path-exclude=/{pattern}"),
        });
    }
    let suite = definition.suite.clone().unwrap_or_default();
    arguments.extend([suite, "/tree".to_owned(), "/apt/distribution.sources".to_owned()]);
    // The base packages bring the directory of /proc, which they could not unpack onto a mount, and
    // their scripts need what is in it. mmdebstrap has no right to mount; the shell around it has.
    arguments.insert(
        1,
        r#"--extract-hook=: >"$1/.extracted"; while [ -e "$1/.extracted" ]; do sleep 0.1; done"#.to_owned(),
    );
    let quoted: Vec<String> = arguments.iter().map(|a| quoted(a)).collect();
    let script = format!(
        r#"mount --make-rshared "$ROOT"
(
    while [ ! -e "$ROOT/.extracted" ]; do sleep 0.1; done
    [ -L "$ROOT/proc" ] || mount -t proc proc "$ROOT/proc"
    rm "$ROOT/.extracted"
) &
beside_tree env DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true {}"#,
        quoted.join(" ")
    );
    let mut view = format!("--ro-bind {} /apt --perms 0755 --tmpfs /tree/dev", apt.dir().display());
    for node in ["null", "zero", "full", "random", "urandom", "tty"] {
        view += &format!(" --dev-bind /dev/{node} /tree/dev/{node}");
    }
    sandbox.run("bootstrapping with mmdebstrap", &script, &[("BESIDE", &view)])
}

/// What a new root file system consists of, as `apt-get` takes it.
pub fn wanted(definition: &Definition) -> Vec<String> {
    let packages = definition.packages.iter().map(|p| p.argument());
    match definition.method {
        Method::Bootstrap => {
            ["?essential".to_owned(), "apt".to_owned()].into_iter().chain(packages).collect()
        }
        Method::Install | Method::Unpack => packages.collect(),
    }
}

/// Users and groups with the ids of the definition, before any package script takes the next free one.
fn make_accounts(definition: &Definition, sandbox: &Sandbox) -> Result<(), BuildError> {
    let mut script = String::new();
    for g in &definition.groups {
        script += &format!("in_tree groupadd --system --gid {} {}\n", g.gid, quoted(&g.name));
    }
    for u in &definition.users {
        script += &format!(
            "in_tree useradd --system --no-create-home --uid {} --gid {} --home-dir {} --shell {} --comment {} {} {}\n",
            u.uid,
            quoted(&u.group),
            quoted(&u.home),
            quoted(&u.shell),
            quoted(&u.comment),
            if u.groups.is_empty() {
                String::new()
            } else {
                format!("--groups {}", quoted(&u.groups.join(",")))
            },
            quoted(&u.name)
        );
    }
    if script.is_empty() { Ok(()) } else { sandbox.run("making accounts", &script, &[]) }
}

fn install(
    definition: &Definition,
    sandbox: &Sandbox,
    apt: &Apt,
    os_status: &[u8],
) -> Result<(), BuildError> {
    let wanted = wanted(definition);
    apt.download(os_status, &wanted, sandbox)?;
    let sources = sandbox.shared().join("distribution.sources");
    // Ours and new: no link can stand here.
    fs::copy(apt.sources(), &sources).map_err(BuildError::write(&sources))?;
    let arguments: Vec<String> = wanted.iter().map(|w| quoted(w)).collect();
    let script = format!("set -- {}\n{INSTALL}", arguments.join(" "));
    let (lists, archives) = (apt.lists().display().to_string(), apt.archives().display().to_string());
    sandbox.run("installing packages", &script, &[("LISTS", &lists), ("ARCHIVES", &archives)])
}

fn unpack(sandbox: &Sandbox, apt: &Apt, packages: &Packages) -> Result<Unpacked, BuildError> {
    let mut unpacked = Unpacked::default();
    let all = sandbox.path("unpacked");
    super::make_dir(&all)?;
    let mut script = String::new();
    for (name, version) in packages {
        let debs = apt.single(&format!("{name}={version}"), sandbox)?;
        for deb in debs {
            let inside = deb.strip_prefix(apt.dir()).unwrap_or(&deb).display().to_string();
            script += &format!(
                "mkdir -p -- /unpacked/{0}\ndpkg-deb --extract {1} /unpacked/{0}\n",
                quoted(name),
                quoted(&format!("/apt/{inside}"))
            );
        }
        unpacked.dirs.push((name.clone(), all.join(name)));
    }
    if script.is_empty() {
        return Ok(unpacked);
    }
    let view = format!("--ro-bind {} /apt --bind {} /unpacked", apt.dir().display(), all.display());
    let script = format!("beside_tree /bin/sh -euc {}", quoted(&format!("umask 022\n{script}")));
    sandbox.run("unpacking packages", &script, &[("BESIDE", &view)])?;
    Ok(unpacked)
}

/// Puts the definition's directories, files, links and initial RAM disk into the tree.
fn place(
    source: &Source,
    sandbox: &Sandbox,
    before_packages: bool,
    unpacked: &mut Unpacked,
) -> Result<(), BuildError> {
    let definition = &source.definition;
    let mut script = String::new();
    let staged = sandbox.path(if before_packages { "early" } else { "files" });
    fs::create_dir_all(&staged).map_err(BuildError::write(&staged))?;
    let stage = |number: usize, bytes: &[u8]| {
        let path = staged.join(number.to_string());
        fs::write(&path, bytes).map_err(BuildError::write(&path)).map(|()| path)
    };
    if !before_packages {
        for d in &definition.directories {
            script += &format!(
                "t=$(inside {})\ndirectory \"$t\"\ninstall -d -m {:o} -o {} -g {} -- \"$t\"\n",
                quoted(&d.path),
                d.mode.0,
                d.uid,
                d.gid
            );
        }
    }
    let chosen = definition
        .files
        .iter()
        .filter(|f| f.before_packages == before_packages && definition.has_option(f.option.as_deref()));
    for (number, f) in chosen.enumerate() {
        let path = match (&f.content, &f.source, &f.unpacked) {
            (Some(content), ..) => stage(number, content.as_bytes())?,
            (_, Some(name), _) => stage(number, source.included(name)?)?,
            (.., Some(pattern)) => {
                let (path, package) = unpacked.find(&definition.name, pattern)?;
                unpacked.files.push((f.path.clone().into_bytes(), package));
                path
            }
            (None, None, None) => continue,
        };
        script += &format!(
            "t=$(inside {})\ninstall -T -m {:o} -o {} -g {} -- {} \"$t\"\n",
            quoted(&f.path),
            f.mode.0,
            f.uid,
            f.gid,
            quoted(&path.display().to_string())
        );
    }
    if !before_packages {
        for l in &definition.links {
            script += &format!("t=$(inside {})\nln -sfn -- {} \"$t\"\n", quoted(&l.path), quoted(&l.target));
        }
        if let Some(path) = make_initrd(source, unpacked, &staged)? {
            script += &format!(
                "t=$(inside {})\ninstall -T -m 644 -- {} \"$t\"\n",
                quoted(&definition.initrd.as_ref().map(|i| i.path.clone()).unwrap_or_default()),
                quoted(&path.display().to_string())
            );
        }
    }
    if script.is_empty() { Ok(()) } else { sandbox.run_beside("placing the definition's files", &script) }
}

fn make_initrd(source: &Source, unpacked: &Unpacked, staged: &Path) -> Result<Option<PathBuf>, BuildError> {
    let Some(initrd) = &source.definition.initrd else { return Ok(None) };
    let name = &source.definition.name;
    let read = |path: PathBuf| fs::read(&path).map_err(BuildError::read(&path));
    let busybox = read(unpacked.find(name, &initrd.busybox)?.0)?;
    let mut modules = Vec::new();
    for module in &initrd.modules {
        let pattern = format!("lib/modules/**/{module}.ko");
        modules.push((module.clone(), read(unpacked.find(name, &pattern)?.0)?));
    }
    let path = staged.join("initrd");
    let archive = initrd::build(&busybox, source.included(&initrd.init)?, &modules);
    fs::write(&path, archive).map_err(BuildError::write(&path))?;
    Ok(Some(path))
}
