//! Level 2: the configuration of one cloud.
//!
//! Precedence: `--set` and other flags, then environment variables, then `federation.toml`. A
//! variable's name is `CICADA_`, the section, two underscores and the field, for example
//! `CICADA_XMPP__PASSWORD_FILE`; lists are separated by commas.

mod error;
pub mod file;
mod identity;
mod members;
mod problem;
pub mod secrets;
mod value;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use crate::federation::MemberPolicy;
use crate::types::{ByteSize, MemberJid};

pub use error::ConfigError;
pub use file::{
    Accelerator, AcceptFrom, ChannelBinding, Cloud, DriverKind, Pin, Security, TlsVersion, Trust, VmUids,
};
pub use identity::{Identity, identity_path, load_identity, load_or_create_identity, rotate_identity};
pub use secrets::{Password, private_dir, unreplaceable};
pub use value::{HostPort, HumanDuration, Rate};

use error::nearest;
use file::{File, NetworkWord};

/// Looked for in this order when none is named.
pub const DEFAULT_PATHS: [&str; 2] = ["federation.toml", "/etc/cicada/federation.toml"];
/// Lists of members, or the word for all of them.
const MEMBER_LISTS: [&str; 2] = ["migration.accept_from", "repository.share_with"];
const SAMPLE: &str = "compare with the annotated sample federation.toml";
/// No setting's name is longer.
const NAME_BYTES_MAX: usize = 64;
/// `sun_path` less its terminator, `unix(7)`.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A configuration that was checked: paths are absolute, defaults are filled in.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it came from.
    pub path: PathBuf,
    pub cloud: Cloud,
    pub xmpp: Xmpp,
    pub transfer: Transfer,
    pub hypervisor: Hypervisor,
    pub networks: Vec<Network>,
    pub repository: Repository,
    pub trust: Trust,
    pub migration: Migration,
    /// Rules of the members that have some of their own; see [`Config::policy_of`].
    members: BTreeMap<MemberJid, MemberPolicy>,
    pub api: Api,
    effective: File,
}

/// See [`file::Xmpp`].
#[derive(Clone, Debug)]
pub struct Xmpp {
    pub jid: MemberJid,
    pub password_file: PathBuf,
    /// Host and port, if not to be found by the domain's name.
    pub server: Option<(String, u16)>,
    pub security: Security,
    pub ca_file: Option<PathBuf>,
    pub tls_min: TlsVersion,
    pub channel_binding: ChannelBinding,
    /// The room's bare JID.
    pub room: String,
}

/// See [`file::Transfer`].
#[derive(Clone, Debug)]
pub struct Transfer {
    pub listen: SocketAddr,
    pub advertise: Vec<String>,
    pub peer_networks: Vec<IpNet>,
    pub bandwidth_limit_bytes_per_s: Option<u64>,
}

/// See [`file::Hypervisor`].
#[derive(Clone, Debug)]
pub struct Hypervisor {
    pub driver: DriverKind,
    pub accelerator: Accelerator,
    pub cpus: u32,
    pub memory: ByteSize,
    /// Virtual CPUs for each of `cpus`, 1 or more.
    pub cpu_overcommit: f64,
    /// 1 or more.
    pub storage_overcommit: f64,
    pub storage_floor: ByteSize,
    pub cpu_model: String,
    pub machine_type: Option<String>,
    pub firmware_code: Option<PathBuf>,
    pub firmware_vars: Option<PathBuf>,
    pub vm_uids: VmUids,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Network {
    pub name: String,
    pub kind: NetworkKind,
    /// See [`file::Network::foreign`].
    pub foreign: bool,
}

/// How a network is reached from this host. `Display` is the word other clouds see.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NetworkKind {
    User,
    /// The name of the host's bridge.
    Bridge(String),
    None,
}

/// See [`file::Repository`].
#[derive(Clone, Debug)]
pub struct Repository {
    pub dir: PathBuf,
    pub hot_cache_size: ByteSize,
    pub gc_grace: Duration,
    /// Zero for never.
    pub optimize_after: Duration,
    pub share_with: AcceptFrom,
}

/// See [`file::Migration`].
#[derive(Clone, Debug)]
pub struct Migration {
    pub grace_period: Duration,
    pub lease: Duration,
    /// How long members that may own VMs by now are waited for before an operator is told what to do.
    pub confirm_patience: Duration,
    pub stop_timeout: Duration,
    pub concurrency: usize,
    pub concurrency_per_member: usize,
    pub accept_from: AcceptFrom,
    pub requests_per_minute: u32,
    pub steered_by_target: bool,
}

#[derive(Clone, Debug)]
pub struct Api {
    pub socket: PathBuf,
}

/// Settings from the command line: `section.field` and its text.
pub type Overrides = [(String, String)];

impl Config {
    /// Reads and checks a configuration. `path` is what the operator named; without it the
    /// default places are searched.
    pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let environment =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        Self::load_with(path, environment, overrides)
    }

    /// As [`Config::load`], with the environment given.
    pub fn load_with(
        path: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        overrides: &Overrides,
    ) -> Result<Self, ConfigError> {
        let path = find(path)?;
        let path = std::path::absolute(&path).map_err(|source| ConfigError::Read { path, source })?;
        let sources = Sources { environment: settings_of(environment), overrides };
        sources.check_names().map_err(|e| sources.with_origin(e, &path))?;
        let file = sources.read(&path).map_err(|e| sources.with_origin(e, &path))?;
        let base = path.parent().unwrap_or(Path::new("/")).to_owned();
        resolve(file, &base, path.clone()).map_err(|e| sources.with_origin(e, &path))
    }

    /// As a file with this text would say, in a directory that need not be there.
    pub fn of_text(text: &str, base: &Path) -> Result<Self, ConfigError> {
        let path = base.join("federation.toml");
        let sources = Sources { environment: BTreeMap::new(), overrides: &[] };
        resolve(sources.parse(text, &path)?, base, path)
    }

    /// Checks what the broker will need from this machine beyond the file itself.
    pub fn check_files(&self) -> Result<(), ConfigError> {
        self.check_owners()?;
        self.xmpp.password()?;
        let named = [&self.xmpp.ca_file, &self.hypervisor.firmware_code, &self.hypervisor.firmware_vars];
        for path in named.into_iter().flatten() {
            std::fs::File::open(path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        }
        Ok(())
    }

    /// Refuses places that another user of this machine could put something else in.
    pub fn check_owners(&self) -> Result<(), ConfigError> {
        for path in [&self.path, &self.cloud.data_dir, &self.repository.dir] {
            unreplaceable(path)?;
        }
        // A socket's own mode is set when it is made.
        unreplaceable(self.api.socket.parent().unwrap_or(&self.api.socket))
    }

    /// What a member may do here: its own `[[member]]`, and the settings for all for the rest.
    pub fn policy_of(&self, member: &MemberJid) -> MemberPolicy {
        self.members.get(member).cloned().unwrap_or_else(|| members::policy(&self.effective, member, None))
    }

    /// The settings in effect, defaults included, in the form of the file.
    pub fn effective(&self) -> &File {
        &self.effective
    }
}

impl Xmpp {
    /// Reads the password file, which only its owner may read.
    pub fn password(&self) -> Result<Password, ConfigError> {
        secrets::read_password(&self.password_file)
    }
}

impl Transfer {
    /// Where others can dial this broker, `host:port`: what is advertised, else what it listens
    /// at (`local`), else the address of the default route.
    pub fn addresses(&self, local: Option<SocketAddr>) -> Vec<String> {
        let local = local.unwrap_or(self.listen);
        if !self.advertise.is_empty() {
            return self.advertise.iter().map(|a| with_port(a, local.port())).collect();
        }
        let ip = if local.ip().is_unspecified() { outgoing_ip() } else { Some(local.ip()) };
        ip.map(|ip| SocketAddr::new(ip, local.port()).to_string()).into_iter().collect()
    }
}

impl fmt::Display for NetworkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NetworkKind::User => "user",
            NetworkKind::Bridge(_) => "bridge",
            NetworkKind::None => "none",
        })
    }
}

fn with_port(address: &str, port: u16) -> String {
    match address.parse::<HostPort>() {
        Ok(HostPort { host, port: named }) => HostPort { host, port: named.or(Some(port)) }.to_string(),
        // Refused when it was read.
        Err(_) => address.to_owned(),
    }
}

/// The address the kernel would send from; nothing is sent to find out (192.0.2.1 is RFC 5737's).
fn outgoing_ip() -> Option<IpAddr> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    socket.connect(("192.0.2.1", 9)).ok()?;
    socket.local_addr().ok().map(|a| a.ip()).filter(|ip| !ip.is_unspecified())
}

fn find(named: Option<&Path>) -> Result<PathBuf, ConfigError> {
    match named {
        Some(path) => Ok(path.to_owned()),
        None => {
            let searched = DEFAULT_PATHS.map(PathBuf::from);
            let found = searched.iter().find(|p| p.exists()).cloned();
            found.ok_or(ConfigError::NotFound { searched: searched.to_vec() })
        }
    }
}

/// Environment variables that are settings: key to (variable, text).
fn settings_of(
    environment: impl IntoIterator<Item = (String, String)>,
) -> BTreeMap<String, (String, String)> {
    let setting = |(name, text): (String, String)| {
        let (section, field) = name.strip_prefix("CICADA_")?.split_once("__")?;
        let key = format!("{}.{}", section.to_lowercase(), field.to_lowercase().replace("__", "."));
        Some((key, (name, text)))
    };
    environment.into_iter().filter_map(setting).collect()
}

struct Sources<'a> {
    environment: BTreeMap<String, (String, String)>,
    overrides: &'a Overrides,
}

impl Sources<'_> {
    /// The config crate reads a name as an expression: `a[99999999]` makes a list of so many, and a
    /// name of many parts as many tables in each other.
    fn check_names(&self) -> Result<(), ConfigError> {
        let mut names = self.environment.keys().chain(self.overrides.iter().map(|(name, _)| name));
        match names.find(|name| name.len() > NAME_BYTES_MAX || name.contains(['[', ']'])) {
            None => Ok(()),
            Some(name) => Err(ConfigError::field(name.clone(), "is not a known setting").next(SAMPLE)),
        }
    }

    fn read(&self, path: &Path) -> Result<File, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        self.parse(&text, path)
    }

    fn parse(&self, text: &str, path: &Path) -> Result<File, ConfigError> {
        let environment = self.environment.iter().map(|(k, (_, v))| (k.clone(), v.clone()));
        let merged = config::Config::builder()
            .add_source(config::File::from_str(text, config::FileFormat::Toml))
            .add_source(texts(environment.collect()))
            .add_source(texts(self.overrides.iter().cloned().collect()))
            .build();
        let file: File =
            merged.and_then(config::Config::try_deserialize).map_err(|e| self.explain(e, path))?;
        members::check(&file.member, text)?;
        Ok(file)
    }

    /// Turns the config crate's error into one that names place, reason and next step.
    fn explain(&self, error: config::ConfigError, path: &Path) -> ConfigError {
        use config::ConfigError as E;
        let (key, reason) = match error {
            E::FileParse { cause, .. } => {
                // The parser's text is a position, a picture of the line, and what is wrong.
                let text = cause.to_string();
                let mut lines = text.lines().map(str::trim);
                let place = lines.next().unwrap_or_default().trim_start_matches("TOML parse error ");
                let reason = format!("{place}: {}", lines.next_back().unwrap_or_default());
                return ConfigError::Syntax { path: path.to_owned(), reason };
            }
            E::NotFound(key) => (key, "is missing".to_owned()),
            E::Type { unexpected, expected, key, .. } => {
                let expected =
                    if expected.contains("unsigned") { "a number that is not negative" } else { expected };
                (key.unwrap_or_default(), format!("{expected} expected, not {unexpected}"))
            }
            E::At { error, key, .. } => (key.unwrap_or_default(), error.to_string()),
            other => (String::new(), other.to_string()),
        };
        // The crate writes `network[0]kind`.
        self.with_origin(spelled_out(key.replace(']', "].").trim_end_matches('.').into(), reason), path)
    }

    /// Says from which source the field's value came.
    fn with_origin(&self, mut error: ConfigError, path: &Path) -> ConfigError {
        if let ConfigError::Field { origin, field, .. } = &mut error {
            *origin = if self.overrides.iter().any(|(k, _)| k == field) {
                "the command line".into()
            } else if let Some((variable, _)) = self.environment.get(field) {
                format!("the environment variable {variable}")
            } else {
                path.display().to_string()
            };
        }
        error
    }
}

/// Serde's message about `key`, in an operator's words.
fn spelled_out(key: String, reason: String) -> ConfigError {
    let quoted: Vec<&str> = reason.split('`').skip(1).step_by(2).collect();
    let Some((wrong, known)) = quoted.split_first() else {
        return ConfigError::field(key, reason).next(SAMPLE);
    };
    let next_step = match nearest(wrong, known.iter().copied()) {
        Some(near) => format!("did you mean '{near}'?"),
        None => format!("known are: {}", known.join(", ")),
    };
    if reason.starts_with("unknown field") {
        let field = if key.is_empty() { (*wrong).to_owned() } else { format!("{key}.{wrong}") };
        ConfigError::field(field, "is not a known setting").next(next_step)
    } else if reason.starts_with("unknown variant") {
        ConfigError::field(key, format!("'{wrong}' is not possible")).next(next_step)
    } else {
        ConfigError::field(key, reason).next(SAMPLE)
    }
}

/// Settings given as text. The lists among them must be named, or all would be read as lists.
fn texts(settings: HashMap<String, String>) -> config::Environment {
    let source = config::Environment::default()
        .separator(".")
        .try_parsing(true)
        .list_separator(",")
        .with_list_parse_key("transfer.advertise")
        .with_list_parse_key("transfer.peer_networks");
    let lists = MEMBER_LISTS.into_iter().filter(|key| settings.get(*key).is_some_and(|t| t != "members"));
    let source = lists.fold(source, |source, key| source.with_list_parse_key(key));
    source.source(Some(settings))
}

/// Gives a file its meaning, or names the first rule it breaks.
fn resolve(mut file: File, base: &Path, path: PathBuf) -> Result<Config, ConfigError> {
    resolve_paths(&mut file, base)?;
    let server = match &file.xmpp.server {
        Some(text) => Some(host_port(text)?),
        None => None,
    };
    check_cloud(&file)?;
    check_xmpp(&mut file, server.as_ref().map(|(host, _)| host.as_str()))?;
    check_limits(&file)?;
    let networks = networks(&mut file)?;
    let cpus = *file.hypervisor.cpus.get_or_insert_with(machine_cpus);
    let memory = *file.hypervisor.memory.get_or_insert_with(machine_memory);
    let f = file.clone();
    let seconds = |s: u32| Duration::from_secs(s.into());
    Ok(Config {
        path,
        xmpp: Xmpp {
            jid: f.xmpp.jid,
            password_file: f.xmpp.password_file,
            server,
            security: f.xmpp.security,
            ca_file: f.xmpp.ca_file,
            tls_min: f.xmpp.tls_min,
            channel_binding: f.xmpp.channel_binding,
            room: f.xmpp.room,
        },
        transfer: Transfer {
            listen: f.transfer.listen,
            advertise: f.transfer.advertise,
            peer_networks: f.transfer.peer_networks,
            bandwidth_limit_bytes_per_s: f.transfer.bandwidth_limit.map(|r| r.bytes_per_s),
        },
        hypervisor: Hypervisor {
            driver: f.hypervisor.driver,
            accelerator: f.hypervisor.accelerator,
            cpus,
            memory,
            cpu_overcommit: f.hypervisor.cpu_overcommit,
            storage_overcommit: f.hypervisor.storage_overcommit,
            storage_floor: f.hypervisor.storage_floor,
            cpu_model: f.hypervisor.cpu_model,
            machine_type: f.hypervisor.machine_type,
            firmware_code: f.hypervisor.firmware_code,
            firmware_vars: f.hypervisor.firmware_vars,
            vm_uids: f.hypervisor.vm_uids,
        },
        networks,
        repository: Repository {
            dir: f.repository.dir.unwrap_or_else(|| f.cloud.data_dir.join("repository")),
            hot_cache_size: f.repository.hot_cache_size,
            gc_grace: f.repository.gc_grace.0,
            optimize_after: f.repository.optimize_after.0,
            share_with: f.repository.share_with,
        },
        trust: f.trust,
        migration: Migration {
            grace_period: f.migration.grace_period.0,
            lease: seconds(f.migration.lease_s),
            confirm_patience: seconds(f.migration.confirm_patience_s),
            stop_timeout: seconds(f.migration.stop_timeout_s),
            concurrency: f.migration.concurrency as usize,
            concurrency_per_member: f
                .migration
                .concurrency_per_member
                .unwrap_or(f.migration.concurrency.div_ceil(2)) as usize,
            accept_from: f.migration.accept_from,
            requests_per_minute: f.migration.requests_per_minute,
            steered_by_target: f.migration.steered_by_target,
        },
        members: members::policies(&file),
        api: Api { socket: f.api.socket.unwrap_or_else(|| f.cloud.data_dir.join("cicada.sock")) },
        cloud: f.cloud,
        effective: file,
    })
}

fn resolve_paths(file: &mut File, base: &Path) -> Result<(), ConfigError> {
    for (field, path) in
        [("cloud.data_dir", &file.cloud.data_dir), ("xmpp.password_file", &file.xmpp.password_file)]
    {
        if path.as_os_str().is_empty() {
            return Err(ConfigError::field(field, "is empty"));
        }
    }
    let data_dir = base.join(&file.cloud.data_dir);
    file.repository.dir.get_or_insert_with(|| data_dir.join("repository"));
    file.api.socket.get_or_insert_with(|| data_dir.join("cicada.sock"));
    let required = [&mut file.cloud.data_dir, &mut file.xmpp.password_file];
    let optional = [
        &mut file.xmpp.ca_file,
        &mut file.hypervisor.firmware_code,
        &mut file.hypervisor.firmware_vars,
        &mut file.repository.dir,
        &mut file.api.socket,
    ];
    for path in required.into_iter().chain(optional.into_iter().flatten()) {
        *path = base.join(&*path);
    }
    Ok(())
}

fn host_port(text: &str) -> Result<(String, u16), ConfigError> {
    let example = match text.matches(':').count() {
        0 | 1 => "write for example \"xmpp.example.org:5223\"",
        _ => "write for example \"[2001:db8::1]:5223\"",
    };
    let wrong = |reason: String| Err(ConfigError::field("xmpp.server", reason).next(example));
    match text.parse::<HostPort>() {
        Ok(HostPort { host, port: Some(port) }) => Ok((host, port)),
        Ok(_) => wrong(format!("'{}' is not host:port", text.escape_default())),
        Err(reason) => wrong(reason),
    }
}

fn check_cloud(file: &File) -> Result<(), ConfigError> {
    let cloud = &file.cloud;
    for (field, value) in
        [("cloud.carbon_g_per_kwh", cloud.carbon_g_per_kwh), ("cloud.price_per_hour", cloud.price_per_hour)]
    {
        if value.is_some_and(|v| !v.is_finite() || v < 0.0) {
            return Err(ConfigError::field(field, "must be a number that is not negative"));
        }
    }
    if cloud.region.len() > 100 || cloud.region.chars().any(char::is_control) {
        return Err(ConfigError::field("cloud.region", "must be one line of at most 100 bytes"));
    }
    let socket = file.api.socket.as_ref().map_or(0, |s| s.as_os_str().len());
    if socket > SOCKET_PATH_BYTES_MAX {
        let reason =
            format!("the path has {socket} bytes; a Unix socket's has at most {SOCKET_PATH_BYTES_MAX}");
        return Err(ConfigError::field("api.socket", reason).next("set a shorter one, for example in /run"));
    }
    Ok(())
}

fn check_xmpp(file: &mut File, host: Option<&str>) -> Result<(), ConfigError> {
    // A room's address has the same form as an account's.
    let room = file.xmpp.room.parse::<MemberJid>().map_err(|_| {
        ConfigError::field("xmpp.room", format!("'{}' names no room", file.xmpp.room.escape_default()))
            .next("write for example \"federation@conference.example.org\"")
    })?;
    file.xmpp.room = room.to_string();
    if file.xmpp.security == Security::Plain {
        let domain = file.xmpp.jid.as_str().rsplit('@').next().unwrap_or_default();
        let host = host.unwrap_or(domain);
        let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if !loopback {
            let reason = format!("\"plain\" would send the password unprotected to {host}");
            return Err(ConfigError::field("xmpp.security", reason)
                .next("use \"direct-tls\" or \"starttls\"; \"plain\" is for a server on this machine only"));
        }
    }
    if file.xmpp.channel_binding == ChannelBinding::Require {
        if file.xmpp.security == Security::Plain {
            let reason = "\"require\" needs TLS, and xmpp.security is \"plain\"";
            return Err(ConfigError::field("xmpp.channel_binding", reason)
                .next("use \"direct-tls\" or \"starttls\", or \"prefer\" here"));
        }
        if file.xmpp.tls_min == TlsVersion::V1_2 {
            let reason = "\"1.2\" allows what xmpp.channel_binding = \"require\" cannot be bound to";
            return Err(ConfigError::field("xmpp.tls_min", reason).next("leave xmpp.tls_min out"));
        }
    }
    Ok(())
}

fn check_limits(file: &File) -> Result<(), ConfigError> {
    let positive = [
        ("hypervisor.cpus", file.hypervisor.cpus.map(u64::from)),
        ("hypervisor.memory", file.hypervisor.memory.map(|m| m.0)),
        ("migration.lease_s", Some(file.migration.lease_s.into())),
        ("migration.stop_timeout_s", Some(file.migration.stop_timeout_s.into())),
        ("migration.concurrency", Some(file.migration.concurrency.into())),
        ("migration.concurrency_per_member", file.migration.concurrency_per_member.map(u64::from)),
        ("migration.requests_per_minute", Some(file.migration.requests_per_minute.into())),
    ];
    for (field, value) in positive {
        if value == Some(0) {
            return Err(ConfigError::field(field, "must be more than zero"));
        }
    }
    let h = &file.hypervisor;
    for (field, value) in [
        ("hypervisor.cpu_overcommit", h.cpu_overcommit),
        ("hypervisor.storage_overcommit", h.storage_overcommit),
    ] {
        if !(1.0..=1000.0).contains(&value) {
            return Err(ConfigError::field(field, "must be from 1 to 1000").next("write 1.0 for none"));
        }
    }
    let shares = file.member.iter().filter_map(|m| m.share).map(|share| ("member.share", share));
    for (field, value) in shares.chain([("members.share", file.members.share)]) {
        if !(value > 0.0 && value <= 1.0) {
            return Err(ConfigError::field(field, "must be more than 0 and at most 1")
                .next("write 1.0 for all; whose VMs are not taken is said by accept_vms and accept_from"));
        }
    }
    for address in &file.transfer.advertise {
        if let Err(reason) = address.parse::<HostPort>() {
            return Err(ConfigError::field("transfer.advertise", reason).next(
                "write for example \"192.0.2.1:7420\", \"[2001:db8::1]:7420\" or \"cloud-a.example.org\"",
            ));
        }
    }
    for (i, pin) in file.trust.pinned.iter().enumerate() {
        if file.trust.pinned[..i].iter().any(|p| p.jid == pin.jid) {
            return Err(ConfigError::field("trust.pinned", format!("{} is there twice", pin.jid)));
        }
    }
    Ok(())
}

fn networks(file: &mut File) -> Result<Vec<Network>, ConfigError> {
    if file.network.is_empty() {
        let default =
            file::Network { name: "default".into(), kind: NetworkWord::User, bridge: None, foreign: false };
        file.network.push(default);
    }
    let mut networks: Vec<Network> = Vec::new();
    for n in &file.network {
        let plain = |s: &str| {
            (1..=63).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        let wrong = |reason: String| Err(ConfigError::field("network", reason));
        if !plain(&n.name) {
            return wrong(format!("'{}' is no name: 1 to 63 of a-z A-Z 0-9 . _ -", n.name.escape_default()));
        }
        if networks.iter().any(|other| other.name == n.name) {
            return wrong(format!("'{}' is there twice", n.name));
        }
        let kind = match (n.kind, &n.bridge) {
            (NetworkWord::User, None) => NetworkKind::User,
            (NetworkWord::None, None) => NetworkKind::None,
            (NetworkWord::Bridge, Some(bridge)) if plain(bridge) => NetworkKind::Bridge(bridge.clone()),
            (NetworkWord::Bridge, _) => return wrong(format!("'{}' needs bridge = \"NAME\"", n.name)),
            (_, Some(_)) => return wrong(format!("'{}' names a bridge but its kind is another", n.name)),
        };
        networks.push(Network { name: n.name.clone(), kind, foreign: n.foreign });
    }
    Ok(networks)
}

fn machine_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

fn machine_memory() -> ByteSize {
    let info = rustix::system::sysinfo();
    ByteSize((info.totalram as u64).saturating_mul(info.mem_unit.into()))
}

#[cfg(test)]
mod tests;
