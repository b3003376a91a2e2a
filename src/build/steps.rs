//! The steps from a definition to a tree: bootstrap, install or unpack, then files and scripts.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::apt::{Apt, Packages};
use super::error::BuildError;
use super::initrd;
use super::sandbox::{Sandbox, quoted};
use super::source::Source;
use crate::component::definition::{Definition, Method, matches};

/// apt inside the tree sees the packages that were downloaded outside, and nothing else.
const INSTALL: &str = r#"
mkdir -p "$ROOT/var/lib/apt/lists" "$ROOT/var/cache/apt/archives"
mount --bind "$LISTS" "$ROOT/var/lib/apt/lists"
mount --bind "$ARCHIVES" "$ROOT/var/cache/apt/archives"
policy="$ROOT/usr/sbin/policy-rc.d"
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"
in_tree apt-get -o Dir::Etc::sourcelist=/run/cicada/distribution.sources -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root \
    --yes --no-download --no-install-recommends install "$@"
rm "$policy"
"#;

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
    let archives = apt.archives();
    let names: Vec<String> = definition.packages.iter().map(|p| p.argument()).collect();
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=apt", "--format=directory", "--mode=root"])
        .arg(format!("--architectures={}", definition.architecture))
        .arg(format!("--include={}", names.join(",")))
        // A merged /usr from the start: the conversion would bring in perl.
        .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
        .arg(r#"--setup-hook=mkdir -p "$1/var/cache/apt/archives""#)
        .arg(format!(
            r#"--setup-hook=find {} -maxdepth 1 -name '*.deb' -exec cp -t "$1/var/cache/apt/archives" {{}} +"#,
            quoted(&archives.display().to_string())
        ))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg("--aptopt=APT::Sandbox::User \"root\"");
    // The first pattern may be one that takes back what an exclusion took; dpkg's last match wins.
    for pattern in &definition.leave_out {
        let option = match pattern.strip_prefix('!') {
            Some(kept) => format!("--dpkgopt=path-include=/{kept}"),
            None => format!("--dpkgopt=path-exclude=/{pattern}"),
        };
        command.arg(option);
    }
    command.arg(definition.suite.as_deref().unwrap_or_default()).arg(sandbox.upper()).arg(apt.sources());
    sandbox.command("bootstrapping with mmdebstrap", "mmdebstrap", "mmdebstrap", command)
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
    fs::copy(apt.sources(), &sources).map_err(BuildError::write(&sources))?;
    let arguments: Vec<String> = wanted.iter().map(|w| quoted(w)).collect();
    let script = format!("set -- {}\n{INSTALL}", arguments.join(" "));
    let (lists, archives) = (apt.lists().display().to_string(), apt.archives().display().to_string());
    sandbox.run("installing packages", &script, &[("LISTS", &lists), ("ARCHIVES", &archives)])
}

fn unpack(sandbox: &Sandbox, apt: &Apt, packages: &Packages) -> Result<Unpacked, BuildError> {
    let mut unpacked = Unpacked::default();
    for (name, version) in packages {
        let downloads = apt.archives().join("single").join(format!("{name}={version}"));
        let mut debs = debs_in(&downloads);
        if debs.is_empty() {
            apt.download_only(&[format!("{name}={version}")], &downloads, sandbox)?;
            debs = debs_in(&downloads);
        }
        let dir = sandbox.path("unpacked").join(name);
        fs::create_dir_all(&dir).map_err(BuildError::write(&dir))?;
        for deb in debs {
            let mut command = Command::new("dpkg-deb");
            command.arg("--extract").arg(deb).arg(&dir);
            sandbox.command(&format!("unpacking {name}"), "dpkg-deb", "dpkg", command)?;
        }
        unpacked.dirs.push((name.clone(), dir));
    }
    Ok(unpacked)
}

fn debs_in(dir: &Path) -> Vec<PathBuf> {
    let items = fs::read_dir(dir).into_iter().flatten().flatten().map(|i| i.path());
    items.filter(|p| p.extension().is_some_and(|e| e == "deb")).collect()
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
                "t=$(inside {})\ninstall -d -m {:o} -o {} -g {} -- \"$t\"\n",
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
            "t=$(inside {})\ninstall -m {:o} -o {} -g {} -- {} \"$t\"\n",
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
                "t=$(inside {})\ninstall -m 644 -- {} \"$t\"\n",
                quoted(&definition.initrd.as_ref().map(|i| i.path.clone()).unwrap_or_default()),
                quoted(&path.display().to_string())
            );
        }
    }
    if script.is_empty() { Ok(()) } else { sandbox.run("placing the definition's files", &script, &[]) }
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
