//! The distribution's packages: which there are, which are needed, and the files. Done by this
//! machine's apt with directories of our own, so its proxies and keys serve and its state is left
//! alone. Nothing is downloaded inside a tree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::BuildError;
use super::sandbox::Sandbox;
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
    /// Prepares the directories for `suite` and fetches the package lists; without a network the
    /// lists of last time serve, and the second value says why.
    pub fn prepare(
        cache: &Path,
        suite: &str,
        architecture: &str,
        sandbox: &Sandbox,
    ) -> Result<(Self, Option<BuildError>), BuildError> {
        let dir = cache.join("apt").join(format!("{suite}-{architecture}"));
        for part in ["lists/partial", "archives/partial", "resolved"] {
            let part = dir.join(part);
            fs::create_dir_all(&part).map_err(BuildError::write(&part))?;
        }
        let dir = fs::canonicalize(&dir).map_err(BuildError::read(&dir))?;
        let mut apt = Self { dir, architecture: architecture.to_owned(), fingerprint: Hash::of(b"") };
        let sources = sources::for_suite(suite)?;
        crate::durable::write(&apt.sources(), sources.as_bytes())
            .map_err(BuildError::write(apt.sources()))?;
        let mut command = apt.get(None)?;
        command.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        let updated = sandbox.command("fetching the package lists", "apt-get", "apt", command);
        apt.fingerprint = apt.fingerprint_of_lists()?;
        match updated {
            Ok(()) => Ok((apt, None)),
            Err(failure) if apt.fingerprint == Hash::of(b"") => Err(failure),
            Err(stale) => Ok((apt, Some(stale))),
        }
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
        let text = match fs::read_to_string(&answer) {
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
        let mut command = Command::new("sh");
        // The shell's part is to keep apt's answer apart from its warnings.
        command.args(["-c", r#"out=$1; shift; exec "$@" >"$out""#, "sh"]).arg(&output).arg("apt-get");
        command.args(self.options(Some(&self.status_file(status, sandbox)?)));
        command.args(["--simulate", "install"]).args(wanted);
        sandbox.command("finding out which packages are needed", "apt-get", "apt", command)?;
        let text = fs::read_to_string(&output).map_err(BuildError::read(&output))?;
        Ok(text.lines().filter_map(installed).map(|(name, version)| format!("{name} {version}\n")).collect())
    }

    /// Downloads what installing `wanted` needs.
    pub fn download(&self, status: &[u8], wanted: &[String], sandbox: &Sandbox) -> Result<(), BuildError> {
        let mut command = self.get(Some(&self.status_file(status, sandbox)?))?;
        command.args(["--yes", "--download-only", "install"]).args(wanted);
        sandbox.command("downloading packages", "apt-get", "apt", command)
    }

    /// Downloads just these packages into `target`, without what they depend on.
    pub fn download_only(
        &self,
        wanted: &[String],
        target: &Path,
        sandbox: &Sandbox,
    ) -> Result<(), BuildError> {
        fs::create_dir_all(target).map_err(BuildError::write(target))?;
        let mut command = self.get(None)?;
        command.arg("download").args(wanted).current_dir(target);
        sandbox.command("downloading packages", "apt-get", "apt", command)
    }

    fn get(&self, status: Option<&Path>) -> Result<Command, BuildError> {
        let mut command = Command::new("apt-get");
        command.args(self.options(status));
        Ok(command)
    }

    fn options(&self, status: Option<&Path>) -> Vec<String> {
        let dir = self.dir.display();
        let status = status.unwrap_or(Path::new("/dev/null")).display();
        [
            format!("Dir::State={dir}"),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::State::status={status}"),
            format!("Dir::Cache={dir}"),
            format!("Dir::Cache::archives={dir}/archives"),
            format!("Dir::Etc::sourcelist={}", self.sources().display()),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferences=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("APT::Architecture={}", self.architecture),
            "APT::Install-Recommends=false".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
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
