//! Component definitions: the TOML from which a component is built out of the distribution's
//! packages. Pure: parsing and validation; reading included files is the builder's work.
//! `components/README.md` describes every field.

use std::collections::HashSet;

use serde::Deserialize;

use super::manifest::{Kind, limit};

/// A definition as written, every field checked by [`Definition::parse`].
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    pub name: String,
    pub kind: Kind,
    pub version: VersionRule,
    #[serde(default = "default_architecture")]
    pub architecture: String,
    /// For people: where the content comes from.
    pub origin: String,
    pub method: Method,
    /// The distribution's release name; only for [`Method::Bootstrap`].
    pub suite: Option<String>,
    /// Name of the OS component this one is built on and only composes with.
    pub os: Option<String>,
    /// Packages as `name` or `name=version`.
    #[serde(default)]
    pub packages: Vec<Package>,
    /// Name patterns of packages the listed ones depend on that are unpacked too, for
    /// [`Method::Unpack`].
    #[serde(default)]
    pub unpack_also: Vec<String>,
    #[serde(default)]
    pub licences: Vec<String>,
    /// Names of components this one refuses to share a disk with.
    #[serde(default)]
    pub conflicts: Vec<String>,
    /// Switches that `[[file]]` and `[[run]]` sections may depend on.
    #[serde(default)]
    pub options: Vec<String>,
    /// Paths, relative to the root, that never enter the component. `*` stays within a path part,
    /// `**` does not.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Path patterns `dpkg` shall not unpack, for [`Method::Bootstrap`]; kept in the guest's
    /// configuration so later upgrades leave them out too.
    #[serde(default)]
    pub leave_out: Vec<String>,
    #[serde(default, rename = "group")]
    pub groups: Vec<Group>,
    #[serde(default, rename = "user")]
    pub users: Vec<User>,
    #[serde(default, rename = "directory")]
    pub directories: Vec<Directory>,
    #[serde(default, rename = "file")]
    pub files: Vec<File>,
    #[serde(default, rename = "link")]
    pub links: Vec<Link>,
    #[serde(default, rename = "run")]
    pub runs: Vec<Run>,
    pub initrd: Option<Initrd>,
}

/// How the packages become a file tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// A new root file system from `suite` with the packages in it.
    Bootstrap,
    /// Installed on a copy of the component `os`; what changed is the component.
    Install,
    /// Packages are only unpacked, beside the tree; `[[file]]` and `[initrd]` pick from them.
    Unpack,
}

/// A component's version: written out, or that of one of its packages.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub enum VersionRule {
    Explicit(String),
    FromPackage(String),
}

impl TryFrom<String> for VersionRule {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("from-package:") {
            Some(package) if is_package_name(package) => Ok(Self::FromPackage(package.to_owned())),
            Some(package) => Err(format!("'{package}' is no package name")),
            None if text.is_empty() || text.bytes().any(|b| b <= b' ' || b == b'/' || b >= 0x7f) => {
                Err(format!("version '{text}' is empty or has spaces, '/' or non-ASCII characters"))
            }
            None => Ok(Self::Explicit(text)),
        }
    }
}

/// A package to have, at a version if that matters.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Package {
    pub name: String,
    pub version: Option<String>,
}

impl TryFrom<String> for Package {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let (name, version) = match text.split_once('=') {
            Some((name, version)) => (name, Some(version)),
            None => (text.as_str(), None),
        };
        let version_fits = |v: &str| {
            v.starts_with(|c: char| c.is_ascii_digit())
                && v.bytes().all(|b| b.is_ascii_alphanumeric() || b".+-:~".contains(&b))
        };
        if !is_package_name(name) || version.is_some_and(|v| !version_fits(v)) {
            return Err(format!("'{text}' is no package: NAME or NAME=VERSION expected"));
        }
        Ok(Self { name: name.to_owned(), version: version.map(str::to_owned) })
    }
}

impl Package {
    /// As `apt-get install` takes it.
    pub fn argument(&self) -> String {
        match &self.version {
            Some(version) => format!("{}={version}", self.name),
            None => self.name.clone(),
        }
    }
}

/// A group made before the packages are installed, so its id does not depend on what else is there.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    pub name: String,
    pub gid: u32,
}

/// A user made before the packages are installed.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub group: String,
    /// Further groups.
    #[serde(default)]
    pub groups: Vec<String>,
    pub home: String,
    /// What the package's own scripts would give it.
    #[serde(default = "default_shell")]
    pub shell: String,
    #[serde(default)]
    pub comment: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    pub path: String,
    #[serde(default = "default_directory_mode")]
    pub mode: Mode,
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
}

/// A file of the component; exactly one of `content`, `source` and `unpacked`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub path: String,
    pub content: Option<String>,
    /// A file beside the definition.
    pub source: Option<String>,
    /// A file of the unpacked packages; `*` stands for any text within a path part and must
    /// match once.
    pub unpacked: Option<String>,
    #[serde(default = "default_file_mode")]
    pub mode: Mode,
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
    /// Only with this option on.
    pub option: Option<String>,
    /// Placed before the packages are installed, for configuration their scripts read.
    #[serde(default)]
    pub before_packages: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    pub path: String,
    pub target: String,
}

/// A shell script run as root inside the tree after everything else is in place.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub script: String,
    pub option: Option<String>,
}

/// A small initial RAM disk of our own making: a static busybox, an init script, kernel modules.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Initrd {
    pub path: String,
    /// The init script, a file beside the definition.
    pub init: String,
    /// A static busybox among the unpacked packages.
    pub busybox: String,
    /// Module names in the order of loading, found among the unpacked packages.
    pub modules: Vec<String>,
}

/// Permission bits, written as an octal string.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Mode(pub u16);

impl TryFrom<String> for Mode {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match u16::from_str_radix(&text, 8) {
            Ok(mode) if mode <= 0o7777 => Ok(Self(mode)),
            _ => Err(format!("'{text}' is no octal mode such as \"0644\"")),
        }
    }
}

fn default_architecture() -> String {
    "amd64".into()
}
fn default_shell() -> String {
    "/usr/sbin/nologin".into()
}
fn default_file_mode() -> Mode {
    Mode(0o644)
}
fn default_directory_mode() -> Mode {
    Mode(0o755)
}

/// Why a definition is refused.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    #[error("not a component definition")]
    Toml(#[from] toml::de::Error),
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
}

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> DefinitionError {
    DefinitionError::Invalid { field: field.into(), reason: reason.into() }
}

/// Ids a definition may claim: below Debian's dynamic system range there are static allocations,
/// above it people.
const ACCOUNT_IDS: std::ops::RangeInclusive<u32> = 100..=999;
const TEXT_BYTES_MAX: usize = 1 << 20;

impl Definition {
    /// Parses and checks a definition; nothing of it is trusted before.
    pub fn parse(text: &str) -> Result<Self, DefinitionError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(invalid("definition", format!("longer than {TEXT_BYTES_MAX} bytes")));
        }
        let definition: Self = toml::from_str(text)?;
        definition.check()?;
        Ok(definition)
    }

    pub fn has_option(&self, option: Option<&str>) -> bool {
        option.is_none_or(|o| self.options.iter().any(|on| on == o))
    }

    fn check(&self) -> Result<(), DefinitionError> {
        if !super::manifest::is_component_name(&self.name) {
            return Err(invalid("name", format!("'{}' is not 1 to 100 of a-z 0-9 . + -", self.name)));
        }
        for (field, text) in [("origin", &self.origin), ("architecture", &self.architecture)] {
            if text.len() as u64 > limit::TEXT_BYTES || text.is_empty() {
                return Err(invalid(field, "is empty or too long"));
            }
        }
        self.check_method()?;
        self.check_accounts()?;
        self.check_files()?;
        for run in &self.runs {
            self.check_option("run", run.option.as_deref())?;
        }
        if let Some(os) = &self.os
            && !super::manifest::is_component_name(os)
        {
            return Err(invalid("os", format!("'{os}' is no component name")));
        }
        Ok(())
    }

    fn check_method(&self) -> Result<(), DefinitionError> {
        let os_expected = match self.kind {
            Kind::Kernel | Kind::Program => Some(true),
            Kind::Os => Some(false),
            Kind::Format => None,
        };
        match os_expected {
            Some(true) if self.os.is_none() => {
                return Err(invalid("os", format!("a {} names the OS it is built on", self.kind)));
            }
            Some(false) if self.os.is_some() => {
                return Err(invalid("os", "an OS is built on no other OS"));
            }
            _ => {}
        }
        match self.method {
            Method::Install if self.os.is_none() => Err(invalid("method", "'install' needs 'os'")),
            Method::Bootstrap if self.os.is_some() => {
                Err(invalid("method", "'bootstrap' begins without 'os'"))
            }
            Method::Bootstrap if !self.suite.as_deref().is_some_and(is_suite_name) => {
                Err(invalid("suite", "'bootstrap' needs the release's name, for example \"bookworm\""))
            }
            Method::Install | Method::Unpack if self.suite.is_some() => {
                Err(invalid("suite", "only 'bootstrap' names a release"))
            }
            Method::Install | Method::Unpack if !self.leave_out.is_empty() => {
                Err(invalid("leave_out", "only 'bootstrap' configures dpkg; use 'exclude'"))
            }
            Method::Bootstrap | Method::Install if !self.unpack_also.is_empty() => {
                Err(invalid("unpack_also", "only with method 'unpack': dependencies are installed anyway"))
            }
            Method::Bootstrap | Method::Install if self.initrd.is_some() => {
                Err(invalid("initrd", "only with method 'unpack': packages make their own"))
            }
            Method::Bootstrap | Method::Install if self.files.iter().any(|f| f.unpacked.is_some()) => {
                Err(invalid("file.unpacked", "only with method 'unpack'"))
            }
            _ => Ok(()),
        }
    }

    fn check_accounts(&self) -> Result<(), DefinitionError> {
        let mut seen = HashSet::new();
        let mut ids = HashSet::new();
        for g in &self.groups {
            if !is_account_name(&g.name) || !ACCOUNT_IDS.contains(&g.gid) {
                return Err(invalid("group", format!("'{}' with id {}: ids are 100 to 999", g.name, g.gid)));
            }
            if !seen.insert(g.name.as_str()) || !ids.insert(g.gid) {
                return Err(invalid("group", format!("'{}' or id {} appears twice", g.name, g.gid)));
            }
        }
        let (mut seen, mut ids) = (HashSet::new(), HashSet::new());
        for u in &self.users {
            if !is_account_name(&u.name) || !ACCOUNT_IDS.contains(&u.uid) {
                return Err(invalid("user", format!("'{}' with id {}: ids are 100 to 999", u.name, u.uid)));
            }
            if !seen.insert(u.name.as_str()) || !ids.insert(u.uid) {
                return Err(invalid("user", format!("'{}' or id {} appears twice", u.name, u.uid)));
            }
            let groups = u.groups.iter().chain([&u.group]);
            if let Some(bad) = groups.into_iter().find(|g| !is_account_name(g)) {
                return Err(invalid("user", format!("'{}': '{bad}' is no group name", u.name)));
            }
            for text in [&u.home, &u.shell, &u.comment] {
                if text.contains([':', '\n']) {
                    return Err(invalid("user", format!("'{}': ':' or a line break in '{text}'", u.name)));
                }
            }
        }
        Ok(())
    }

    fn check_files(&self) -> Result<(), DefinitionError> {
        let mut seen = HashSet::new();
        let mut claim = |field: &str, path: &'_ str| {
            check_path(field, path)?;
            if !seen.insert(path.to_owned()) {
                return Err(invalid(field, format!("{path} appears twice")));
            }
            Ok(())
        };
        for f in &self.files {
            let sources = [&f.content, &f.source, &f.unpacked].into_iter().flatten().count();
            if sources != 1 {
                let reason = format!("{}: exactly one of content, source and unpacked", f.path);
                return Err(invalid("file", reason));
            }
            if let Some(unpacked) = &f.unpacked {
                check_path("file.unpacked", unpacked)?;
            }
            if let Some(source) = &f.source {
                check_path("file.source", source)?;
            }
            self.check_option("file", f.option.as_deref())?;
            // Two files of one path may exclude each other by option; without one they may not.
            match f.option {
                None => claim("file", &f.path)?,
                Some(_) => check_path("file", &f.path)?,
            }
        }
        for d in &self.directories {
            claim("directory", &d.path)?;
        }
        for l in &self.links {
            claim("link", &l.path)?;
            if l.target.is_empty() || l.target.contains('\0') {
                return Err(invalid("link", format!("{} has no target", l.path)));
            }
        }
        if let Some(initrd) = &self.initrd {
            claim("initrd", &initrd.path)?;
            check_path("initrd.init", &initrd.init)?;
            check_path("initrd.busybox", &initrd.busybox)?;
            let name = |m: &&String| !m.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
            if let Some(bad) = initrd.modules.iter().find(name) {
                return Err(invalid("initrd.modules", format!("'{bad}' is no module name")));
            }
        }
        for pattern in &self.exclude {
            check_path("exclude", pattern)?;
        }
        Ok(())
    }

    fn check_option(&self, field: &str, option: Option<&str>) -> Result<(), DefinitionError> {
        match option {
            Some(o) if o.is_empty() || o.contains(char::is_whitespace) => {
                Err(invalid(format!("{field}.option"), format!("'{o}' is no option name")))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a path matches a pattern: `*` is any text without `/`, `**` any text.
pub fn matches(pattern: &[u8], path: &[u8]) -> bool {
    let plain = pattern.iter().position(|b| *b == b'*').unwrap_or(pattern.len());
    let (Some(path), mut pattern) = (path.strip_prefix(&pattern[..plain]), &pattern[plain..]) else {
        return false;
    };
    // Which beginnings of the path the pattern so far stands for. Trying each `*` in turn instead
    // would take a time that doubles with every one of them.
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    while let [first, rest @ ..] = pattern {
        pattern = match (first, rest) {
            (b'*', [b'*', rest @ ..]) => spread(&mut reached, path, |_| true, rest),
            (b'*', rest) => spread(&mut reached, path, |b| b != b'/', rest),
            (byte, rest) => {
                for n in (0..path.len()).rev() {
                    reached[n + 1] = reached[n] && path[n] == *byte;
                }
                reached[0] = false;
                rest
            }
        };
    }
    reached[path.len()]
}

/// Goes on from every beginning that was reached over the bytes that pass; returns `rest`.
fn spread<'a>(reached: &mut [bool], path: &[u8], passes: impl Fn(u8) -> bool, rest: &'a [u8]) -> &'a [u8] {
    for (n, byte) in path.iter().enumerate() {
        if reached[n] && passes(*byte) {
            reached[n + 1] = true;
        }
    }
    rest
}

fn check_path(field: &str, path: &str) -> Result<(), DefinitionError> {
    let parts_fit =
        path.split('/').all(|p| !p.is_empty() && p != "." && p != ".." && p.len() <= limit::NAME_BYTES);
    // Paths are handed to a shell script line by line.
    if !parts_fit || path.len() as u64 > limit::PATH_BYTES || path.contains(['\0', '\n']) {
        return Err(invalid(field, format!("'{path}' is not a plain relative path")));
    }
    Ok(())
}

fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
}

fn is_account_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && matches!(name.as_bytes()[0], b'a'..=b'z' | b'_')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b))
}

fn is_suite_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const REDIS: &str = r#"
        name = "redis"
        kind = "program"
        version = "from-package:redis-server"
        origin = "Debian 12"
        method = "install"
        os = "debian-12-minimal"
        packages = ["redis-server", "redis-tools=5:7.0.15-1~deb12u7"]
        exclude = ["var/log/**.log"]
        [[group]]
        name = "redis"
        gid = 200
        [[user]]
        name = "redis"
        uid = 200
        group = "redis"
        home = "/var/lib/redis"
        [[file]]
        path = "etc/redis/x.conf"
        content = "port 0\n"
        mode = "0640"
    "#;

    #[test]
    fn reads_what_it_should() {
        let d = Definition::parse(REDIS).unwrap();
        assert_eq!(d.version, VersionRule::FromPackage("redis-server".into()));
        assert_eq!(d.packages[1].argument(), "redis-tools=5:7.0.15-1~deb12u7");
        assert_eq!(d.files[0].mode, Mode(0o640));
        assert_eq!(d.users[0].shell, "/usr/sbin/nologin");
    }

    #[test]
    fn refuses_what_it_must() {
        let spoilt = |from: &str, to: &str| {
            let text = REDIS.replace(from, to);
            assert_ne!(text, REDIS, "{from} is in the sample");
            Definition::parse(&text).expect_err(to).to_string()
        };
        for (from, to) in [
            ("name = \"redis\"\n        kind", "nmae = \"redis\"\n        kind"),
            ("kind = \"program\"", "kind = \"appliance\""),
            ("os = \"debian-12-minimal\"", ""),
            ("os = \"debian-12-minimal\"", "os = \"De bian\""),
            ("method = \"install\"", "method = \"bootstrap\""),
            ("\"redis-server\", ", "\"-o Foo=bar\", "),
            ("\"redis-server\", ", "\"redis-server=;x\", "),
            ("uid = 200", "uid = 0"),
            ("gid = 200", "gid = 1000"),
            ("group = \"redis\"", "group = \"red is\""),
            ("home = \"/var/lib/redis\"", "home = \"/a:0:0\""),
            ("path = \"etc/redis/x.conf\"", "path = \"/etc/redis/x.conf\""),
            ("path = \"etc/redis/x.conf\"", "path = \"etc/../../x\""),
            ("content = \"port 0\\n\"", "content = \"\"\nsource = \"b\""),
            ("mode = \"0640\"", "mode = \"0999\""),
            ("mode = \"0640\"", "unpacked = \"x\""),
            ("exclude = [\"var/log/**.log\"]", "exclude = [\"/var/log\"]"),
            ("version = \"from-package:redis-server\"", "version = \"\""),
        ] {
            spoilt(from, to);
        }
        assert!(spoilt("uid = 200", "uid = 99").contains("redis"), "the message names the user");
    }

    #[test]
    fn patterns_match_within_a_part_or_across() {
        for (pattern, path, expected) in [
            ("var/log/*.log", "var/log/dpkg.log", true),
            ("var/log/*.log", "var/log/apt/term.log", false),
            ("var/log/**.log", "var/log/apt/term.log", true),
            ("**/__pycache__/**", "usr/lib/__pycache__/a", true),
            ("etc/*-", "etc/passwd-", true),
            ("etc/*-", "etc/passwd", false),
            ("boot/vmlinuz-*", "boot/vmlinuz-6.1", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), path.as_bytes()), expected, "{pattern} {path}");
        }
        // 2^50 ways to share the letters out among the stars, all of them in vain.
        assert!(!matches("**a".repeat(50).as_bytes(), [[b'a'; 90].as_slice(), b"b"].concat().as_slice()));
    }
}
