//! The distribution's packages: which there are, which are needed, and the files. Done by this
//! machine's apt with directories of our own, so its proxies and keys serve and its state is left
//! alone. Nothing is downloaded inside a tree, and nothing by root: apt's own user does it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::BuildError;
use super::sandbox::{APT_DIR, Sandbox};
use crate::types::Hash;

/// Resolved packages: name and version, sorted.
pub type Packages = Vec<(String, String)>;

#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
    architecture: String,
    /// What the lists said when they were last fetched.
    fingerprint: Hash,
}

impl Apt {
    /// Prepares the directories for `suite` and fetches the package lists. Lists that could not be
    /// brought up to date, or whose `Release` has expired, are an error: packages with known holes
    /// would go into every VM.
    pub fn prepare(
        cache: &Path,
        suite: &str,
        architecture: &str,
        sandbox: &Sandbox,
    ) -> Result<Self, BuildError> {
        let dir = cache.join("apt").join(format!("{suite}-{architecture}"));
        super::make_dir(&cache.join("apt"))?;
        super::make_dir(&dir)?;
        // Others look into these: apt's user, and it writes its `partial` directories.
        for part in ["lists", "lists/partial", "archives", "archives/partial", "archives/single", "resolved"]
        {
            super::make_dir(&dir.join(part))?;
        }
        let dir = fs::canonicalize(&dir).map_err(BuildError::read(&dir))?;
        let mut apt = Self { dir, architecture: architecture.to_owned(), fingerprint: Hash::of(b"") };
        let sources = sources::for_suite(suite)?;
        crate::durable::write(&apt.sources(), sources.as_bytes())
            .map_err(BuildError::write(apt.sources()))?;
        apt.verify()?;
        let update = ["-o", "APT::Update::Error-Mode=any", "update"].map(str::to_owned);
        let command = apt.get(None, Path::new(APT_DIR), &update, sandbox);
        let updated = sandbox.command("fetching the package lists", "sh", "dash", command);
        updated.map_err(|source| BuildError::Lists { suite: suite.to_owned(), source: Box::new(source) })?;
        apt.fingerprint = apt.fingerprint_of_lists()?;
        Ok(apt)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn sources(&self) -> PathBuf {
        self.dir.join("distribution.sources")
    }

    pub fn lists(&self) -> PathBuf {
        self.dir.join("lists")
    }

    /// Where downloaded packages lie.
    pub fn archives(&self) -> PathBuf {
        self.dir.join("archives")
    }

    /// The packages that installing `wanted` would add to a system with this dpkg status file.
    /// Asked once for a state of the lists.
    pub fn resolve(
        &self,
        status: &[u8],
        wanted: &[String],
        sandbox: &Sandbox,
    ) -> Result<Packages, BuildError> {
        let mut question = self.fingerprint.as_bytes().to_vec();
        question.extend_from_slice(Hash::of(status).as_bytes());
        question.extend_from_slice(wanted.join(" ").as_bytes());
        let answer = self.dir.join("resolved").join(Hash::of(&question).to_string());
        let text = match super::own_file(&answer) {
            Ok(text) => text,
            Err(_) => {
                let text = self.simulate(status, wanted, sandbox)?;
                crate::durable::write(&answer, text.as_bytes()).map_err(BuildError::write(&answer))?;
                text
            }
        };
        let mut packages: Packages = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, version)| (name.to_owned(), version.to_owned()))
            .collect();
        packages.sort();
        Ok(packages)
    }

    /// Lines of `NAME VERSION`.
    fn simulate(&self, status: &[u8], wanted: &[String], sandbox: &Sandbox) -> Result<String, BuildError> {
        let output = sandbox.path("simulation");
        let mut arguments = vec!["--simulate".to_owned(), "install".to_owned()];
        arguments.extend_from_slice(wanted);
        let status = self.status_file(status, sandbox)?;
        let inner = self.get(Some(&status), Path::new("/"), &arguments, sandbox);
        let mut command = Command::new("sh");
        // The shell's part is to keep apt's answer apart from its warnings.
        command.args(["-c", r#"umask 077; out=$1; shift; exec "$@" >"$out""#, "sh"]).arg(&output);
        command.arg(inner.get_program()).args(inner.get_args());
        command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        sandbox.command("finding out which packages are needed", "sh", "dash", command)?;
        let text = fs::read_to_string(&output).map_err(BuildError::read(&output))?;
        Ok(text.lines().filter_map(installed).map(|(name, version)| format!("{name} {version}\n")).collect())
    }

    /// Downloads what installing `wanted` needs.
    pub fn download(&self, status: &[u8], wanted: &[String], sandbox: &Sandbox) -> Result<(), BuildError> {
        self.verify()?;
        let mut arguments = ["--yes", "--download-only", "install"].map(str::to_owned).to_vec();
        arguments.extend_from_slice(wanted);
        let status = self.status_file(status, sandbox)?;
        let command = self.get(Some(&status), Path::new(APT_DIR), &arguments, sandbox);
        sandbox.command("downloading packages", "sh", "dash", command)?;
        self.note(&self.archives())
    }

    /// The packages of this name and version alone, without what they depend on, downloaded unless
    /// they are here. Their files.
    pub fn single(&self, package: &str, sandbox: &Sandbox) -> Result<Vec<PathBuf>, BuildError> {
        let target = self.archives().join("single").join(package);
        self.verify_debs(&target)?;
        let debs = debs_in(&target);
        if !debs.is_empty() {
            return Ok(debs);
        }
        super::make_dir(&target)?;
        // apt downloads into the directory it is in, as its own user, which has to own it meanwhile.
        let script = r#"chown _apt . && "$@" && chown -R 0:0 . && chmod 0755 ."#;
        let mut tool = ["sh", "-euc", script, "sh", "apt-get"].map(str::to_owned).to_vec();
        tool.extend(self.options(None));
        tool.extend(["download".to_owned(), package.to_owned()]);
        let inside = Path::new(APT_DIR).join("archives/single").join(package);
        let command = sandbox.with_network(&self.dir, &inside, &tool);
        sandbox.command("downloading packages", "sh", "dash", command)?;
        self.note(&target)?;
        Ok(debs_in(&target))
    }

    /// The lists and the downloaded packages are ours to use: of no other user, no links, and the
    /// packages are what was downloaded.
    fn verify(&self) -> Result<(), BuildError> {
        for dir in [self.lists(), self.archives()] {
            for item in fs::read_dir(&dir).map_err(BuildError::read(&dir))? {
                let path = item.map_err(BuildError::read(&dir))?.path();
                let meta = fs::symlink_metadata(&path).map_err(BuildError::read(&path))?;
                if !meta.is_dir() && (!meta.is_file() || meta.uid() != 0 || meta.nlink() != 1) {
                    return Err(BuildError::Planted { path });
                }
            }
        }
        self.verify_debs(&self.archives())
    }

    /// Removes each package whose noted digest is not its own, for apt to fetch it anew.
    fn verify_debs(&self, dir: &Path) -> Result<(), BuildError> {
        for path in debs_in(dir) {
            let noted = super::own_file(&digest_of(&path)).ok();
            if noted.is_none_or(|noted| hash_file(&path).is_ok_and(|now| now.to_string() != noted)) {
                fs::remove_file(&path).map_err(BuildError::write(&path))?;
            }
        }
        Ok(())
    }

    /// Notes the digests of packages that apt has just checked against the signed lists.
    fn note(&self, dir: &Path) -> Result<(), BuildError> {
        for path in debs_in(dir) {
            let noted = digest_of(&path);
            if super::own_file(&noted).is_err() || super::own_file(&noted).is_ok_and(|n| n.is_empty()) {
                let text = hash_file(&path).map_err(BuildError::read(&path))?.to_string();
                crate::durable::write_secret(&noted, text.as_bytes()).map_err(BuildError::write(&noted))?;
            }
        }
        Ok(())
    }

    fn get(&self, status: Option<&Path>, chdir: &Path, arguments: &[String], sandbox: &Sandbox) -> Command {
        let mut tool = vec!["apt-get".to_owned()];
        tool.extend(self.options(status));
        tool.extend_from_slice(arguments);
        sandbox.with_network(&self.dir, chdir, &tool)
    }

    fn options(&self, status: Option<&Path>) -> Vec<String> {
        let dir = APT_DIR;
        let status = status.unwrap_or(Path::new("/dev/null")).display();
        [
            format!("Dir::State={dir}"),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::State::status={status}"),
            format!("Dir::Cache={dir}"),
            format!("Dir::Cache::archives={dir}/archives"),
            format!("Dir::Etc::sourcelist={dir}/distribution.sources"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("APT::Architecture={}", self.architecture),
            "APT::Install-Recommends=false".to_owned(),
            "APT::Sandbox::User=_apt".to_owned(),
            // Whatever this machine's configuration says: nothing unsigned, nothing expired.
            "APT::Get::AllowUnauthenticated=false".to_owned(),
            "Acquire::AllowInsecureRepositories=false".to_owned(),
            "Acquire::AllowDowngradeToInsecureRepositories=false".to_owned(),
            "Acquire::Check-Valid-Until=true".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ]
        .into_iter()
        .flat_map(|option| ["-o".to_owned(), option])
        .collect()
    }

    fn status_file(&self, status: &[u8], sandbox: &Sandbox) -> Result<PathBuf, BuildError> {
        let path = sandbox.path("status");
        fs::write(&path, status).map_err(BuildError::write(&path))?;
        Ok(path)
    }

    /// The hash of nothing if there are no lists.
    fn fingerprint_of_lists(&self) -> Result<Hash, BuildError> {
        let lists = self.lists();
        let mut releases = Vec::new();
        for item in fs::read_dir(&lists).map_err(BuildError::read(&lists))? {
            let path = item.map_err(BuildError::read(&lists))?.path();
            if path.file_name().is_some_and(|n| n.to_string_lossy().ends_with("Release")) {
                releases.push(path);
            }
        }
        releases.sort();
        let mut all = Vec::new();
        for path in releases {
            all.extend(fs::read(&path).map_err(BuildError::read(&path))?);
        }
        Ok(Hash::of(&all))
    }
}

pub fn debs_in(dir: &Path) -> Vec<PathBuf> {
    let items = fs::read_dir(dir).into_iter().flatten().flatten().map(|i| i.path());
    items.filter(|p| p.extension().is_some_and(|e| e == "deb")).collect()
}

/// Where the digest of a downloaded package is noted.
fn digest_of(deb: &Path) -> PathBuf {
    deb.with_extension("deb-digest")
}

fn hash_file(path: &Path) -> std::io::Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(super::open_no_follow(path)?)?;
    Ok(hasher.finalize().into())
}

/// Name and version of a line `Inst NAME [OLD] (VERSION ORIGIN [ARCHITECTURE])` of a simulation.
fn installed(line: &str) -> Option<(&str, &str)> {
    let rest = line.strip_prefix("Inst ")?;
    let name = rest.split(' ').next()?;
    let version = rest.split_once('(')?.1.split(' ').next()?;
    Some((name, version))
}

/// Which package sources of this machine serve a suite.
pub mod sources {
    use std::path::{Path, PathBuf};

    use super::{BuildError, fs};

    /// One-line or deb822 sources for `suite`, its updates and security fixes, as this machine has
    /// them; where it runs another release, the same archives with the suite's name put in.
    pub fn for_suite(suite: &str) -> Result<String, BuildError> {
        let all = read_all(Path::new("/etc/apt"))?;
        let own = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let codename = own.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME=")).unwrap_or(suite);
        [suite, codename]
            .into_iter()
            .map(|from| all.iter().filter_map(|s| select(s, from, suite)).collect::<Vec<_>>().join("\n"))
            .find(|text| !text.is_empty())
            .ok_or_else(|| BuildError::NoSources { suite: suite.to_owned() })
    }

    /// deb822 stanzas; one-line entries are turned into such.
    fn read_all(dir: &Path) -> Result<Vec<String>, BuildError> {
        let mut files: Vec<PathBuf> = vec![dir.join("sources.list")];
        let parts = dir.join("sources.list.d");
        if parts.is_dir() {
            for item in fs::read_dir(&parts).map_err(BuildError::read(&parts))? {
                files.push(item.map_err(BuildError::read(&parts))?.path());
            }
        }
        files.sort();
        let mut stanzas = Vec::new();
        for path in files.iter().filter(|p| p.is_file()) {
            let text = fs::read_to_string(path).map_err(BuildError::read(path))?;
            match path.extension().and_then(|e| e.to_str()) {
                Some("list") => stanzas.extend(text.lines().filter_map(stanza_of_line)),
                Some("sources") => stanzas.extend(stanzas_of(&text)),
                _ => {}
            }
        }
        Ok(stanzas)
    }

    fn stanzas_of(text: &str) -> Vec<String> {
        let lines = text.lines().filter(|l| !l.starts_with('#'));
        let text: String = lines.map(|l| format!("{l}\n")).collect();
        text.split("\n\n").map(|s| format!("{}\n", s.trim_matches('\n'))).filter(|s| s.len() > 1).collect()
    }

    /// `deb [signed-by=KEY] URI SUITE COMPONENT…` as a stanza.
    pub(super) fn stanza_of_line(line: &str) -> Option<String> {
        let line = line.split('#').next()?.trim();
        let rest = line.strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(bracket) => bracket.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        let components: Vec<&str> = words.collect();
        let mut out =
            format!("Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {}\n", components.join(" "));
        for option in options.split_whitespace() {
            match option.split_once('=')? {
                ("signed-by", key) => out += &format!("Signed-By: {key}\n"),
                ("trusted", yes) => out += &format!("Trusted: {yes}\n"),
                _ => {}
            }
        }
        Some(out)
    }

    /// The stanza restricted to release `from` and its updates and security suites, renamed to `to`.
    pub(super) fn select(stanza: &str, from: &str, to: &str) -> Option<String> {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':').map(str::trim))
                .unwrap_or_default()
        };
        let has = |value: &str, word: &str| value.split_whitespace().any(|w| w == word);
        if !has(field("Types"), "deb") || !has(field("Components"), "main") || field("Enabled") == "no" {
            return None;
        }
        let suites: Vec<String> = field("Suites")
            .split_whitespace()
            .filter_map(|s| s.strip_prefix(from))
            .filter(|rest| ["", "-updates", "-security"].contains(rest))
            .map(|rest| format!("{to}{rest}"))
            .collect();
        if suites.is_empty() {
            return None;
        }
        let lines = stanza.lines().map(|line| match line.split(':').next() {
            Some("Suites") => format!("Suites: {}\n", suites.join(" ")),
            Some("Types") => "Types: deb\n".to_owned(),
            Some("Components") => "Components: main\n".to_owned(),
            _ => format!("{line}\n"),
        });
        Some(lines.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_simulation() {
        assert_eq!(
            installed("Inst redis-tools (5:7.0.15-1~deb12u7 Debian:12.11/stable [amd64])"),
            Some(("redis-tools", "5:7.0.15-1~deb12u7"))
        );
        assert_eq!(
            installed("Inst libc6 [2.36-8] (2.36-9 Debian:12/stable [amd64]) []"),
            Some(("libc6", "2.36-9"))
        );
        assert_eq!(installed("Conf libc6 (2.36-9 Debian:12/stable [amd64])"), None);
    }

    #[test]
    fn takes_the_suite_out_of_any_form_of_sources() {
        let line =
            "deb [arch=amd64 signed-by=/k.gpg] http://archive.invalid/debian bookworm main contrib # x";
        let stanza = sources::stanza_of_line(line).unwrap();
        let selected = sources::select(&stanza, "bookworm", "bookworm").unwrap();
        assert_eq!(
            selected,
            "Types: deb\nURIs: http://archive.invalid/debian\nSuites: bookworm\nComponents: main\nSigned-By: /k.gpg\n"
        );
        assert!(sources::select(&stanza, "trixie", "bookworm").is_none());
        let many =
            "Types: deb deb-src\nURIs: x\nSuites: trixie trixie-updates trixie-backports\nComponents: main\n";
        let selected = sources::select(many, "trixie", "bookworm").unwrap();
        assert!(selected.contains("Suites: bookworm bookworm-updates\n"), "{selected}");
        assert!(sources::select(&format!("{many}Enabled: no\n"), "trixie", "trixie").is_none());
        assert!(sources::stanza_of_line("deb-src http://archive.invalid/debian bookworm main").is_none());
    }
}
