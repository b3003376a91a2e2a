//! `federation.toml` as it is written. [`super::Config`] is what it means.
//!
//! Relative paths are relative to the directory of the file. Sizes are numbers of bytes or text
//! such as `"512M"`; durations are text such as `"90s"`, `"10m"`, `"24h"`, `"7d"`.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::types::{ByteSize, CloudName, MemberJid, PublicKey};

use super::value::{HumanDuration, Rate, words};

/// The whole file. Unknown sections and fields are refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub cloud: Cloud,
    pub xmpp: Xmpp,
    #[serde(default)]
    pub transfer: Transfer,
    #[serde(default)]
    pub hypervisor: Hypervisor,
    /// Networks VMs can be plugged into. Without any there is one, `default`, of kind `user`.
    #[serde(default)]
    pub network: Vec<Network>,
    #[serde(default)]
    pub repository: Repository,
    #[serde(default)]
    pub trust: Trust,
    #[serde(default)]
    pub migration: Migration,
    /// What every member may take, where its own `[[member]]` says nothing.
    #[serde(default)]
    pub members: Members,
    /// What single members may do, where it is other than for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub member: Vec<Member>,
    #[serde(default)]
    pub api: Api,
}

/// `[cloud]`: who this cloud is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cloud {
    /// Name in the federation and nick in its room: `a-z 0-9 . _ -`, at most 63.
    pub name: CloudName,
    /// Where it stands, in words other members understand.
    #[serde(default)]
    pub region: String,
    /// Everything the broker keeps: identity key, repository, VMs.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// Carbon intensity of its power, grams CO₂e per kWh.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub carbon_g_per_kwh: Option<f32>,
    /// Price of a CPU for an hour, in the federation's unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<f32>,
}

/// `[xmpp]`: the account and the room.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Xmpp {
    /// The cloud's account, `name@domain`.
    pub jid: MemberJid,
    /// A file that holds the account's password; only its owner may read it.
    pub password_file: PathBuf,
    /// `host:port` of the server, where the domain's own name does not lead there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// How the connection is protected.
    #[serde(default)]
    pub security: Security,
    /// PEM certificates to trust instead of the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The oldest TLS that is spoken with the server.
    #[serde(default)]
    pub tls_min: TlsVersion,
    /// Whether the login must be bound to the TLS connection.
    #[serde(default)]
    pub channel_binding: ChannelBinding,
    /// The federation's room, `room@conference.domain`.
    pub room: String,
}

words! {
    /// How the connection to the XMPP server is protected.
    #[derive(Default)]
    pub enum Security {
        /// TLS from the first byte (XEP-0368), port 5223.
        #[default]
        DirectTls = "direct-tls",
        /// TLS negotiated in the stream (RFC 6120), port 5222.
        Starttls = "starttls",
        /// No TLS; only to a server on this machine.
        Plain = "plain",
    }
}

words! {
    #[derive(Default)]
    pub enum TlsVersion {
        V1_2 = "1.2",
        #[default]
        V1_3 = "1.3",
    }
}

words! {
    /// Whether a login that somebody between us and the server relays fails (RFC 5802, RFC 9266).
    #[derive(Default)]
    pub enum ChannelBinding {
        /// Where the server offers it; a server that then fails it is logged in to without.
        #[default]
        Prefer = "prefer",
        /// No login without. Needs TLS 1.3 and a server that offers SCRAM-…-PLUS with `tls-exporter`.
        Require = "require",
    }
}

/// `[transfer]`: the data link between brokers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Transfer {
    /// UDP address to listen at.
    #[serde(deserialize_with = "socket_address")]
    pub listen: SocketAddr,
    /// Addresses, with or without a port, at which other clouds reach it. Needed where `listen` names none
    /// that others can dial.
    pub advertise: Vec<String>,
    /// Networks of other clouds, such as `10.0.0.0/8`, that are dialled although they are not the Internet's:
    /// private, link-local, loopback. Without any only global addresses are.
    #[serde(deserialize_with = "peer_networks")]
    pub peer_networks: Vec<IpNet>,
    /// Most that is sent, over all streams: `"100Mbit"` per second, or bytes such as `"12M"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<Rate>,
}

/// `[hypervisor]`: what runs the VMs, and how much of this machine it may use.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hypervisor {
    pub driver: DriverKind,
    pub accelerator: Accelerator,
    /// CPUs of this machine that VMs run on; all if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Memory that VMs may use together; the machine's if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// Virtual CPUs that VMs may have for each of `cpus`; memory is never over-committed.
    pub cpu_overcommit: f64,
    /// Bytes of disks that VMs may be promised for each that is there: what they wrote and what is free.
    pub storage_overcommit: f64,
    /// Storage that VMs never get, beside `cloud.data_dir`'s own, so that records can always be written.
    pub storage_floor: ByteSize,
    /// CPU model of new VMs: a baseline that every member has.
    pub cpu_model: String,
    /// A versioned machine type; the driver's own if not set. Members that exchange VMs need the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    /// UEFI firmware and the template of its variables, of one build; the distribution's if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware_code: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware_vars: Option<PathBuf>,
    /// Users that VMs run as, each as one of its own: `"auto"`, `"off"` or a range `"FIRST-LAST"`.
    pub vm_uids: VmUids,
}

/// `hypervisor.vm_uids`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum VmUids {
    /// Those lent to the broker's user; where that is not possible, the broker's user.
    #[default]
    Auto,
    /// The broker's user.
    Off,
    Range {
        first: u32,
        last: u32,
    },
}

impl TryFrom<String> for VmUids {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let range = || {
            let (first, last) = text.split_once('-')?;
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            // Zero is root, and the largest number is no user.
            (0 < first && first <= last && last < u32::MAX).then_some(Self::Range { first, last })
        };
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => range().ok_or_else(|| {
                format!(
                    "'{}' is not possible: write \"auto\", \"off\" or a range such as \"200000-200999\"",
                    text.escape_debug()
                )
            }),
        }
    }
}

impl From<VmUids> for String {
    fn from(uids: VmUids) -> Self {
        match uids {
            VmUids::Auto => "auto".into(),
            VmUids::Off => "off".into(),
            VmUids::Range { first, last } => format!("{first}-{last}"),
        }
    }
}

words! {
    #[derive(Default)]
    pub enum DriverKind {
        #[default]
        Qemu = "qemu",
    }
}

words! {
    #[derive(Default)]
    pub enum Accelerator {
        /// KVM where it works, else software emulation.
        #[default]
        Auto = "auto",
        Kvm = "kvm",
        /// Software emulation.
        Tcg = "tcg",
    }
}

/// `[[network]]`: a network of this cloud. A VM can only move to a cloud that has one of the same name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub name: String,
    pub kind: NetworkWord,
    /// The bridge of this host, with kind `bridge`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Whether VMs that come from other clouds are plugged in even where their guests then reach the
    /// services of this host: kind `user` without passt. Networks that are isolated need no leave.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub foreign: bool,
}

words! {
    pub enum NetworkWord {
        /// Address translation, outgoing connections only, no privileges needed: by passt, and not to this
        /// host; without passt by QEMU itself, and to this host's own services, too.
        User = "user",
        /// A bridge of this host.
        Bridge = "bridge",
        /// A card without a cable.
        None = "none",
    }
}

/// `[repository]`: components and everything else that is kept by content.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Repository {
    /// `<data_dir>/repository` if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Most that is kept uncompressed to compose from.
    pub hot_cache_size: ByteSize,
    /// How old unused content must be before it is collected.
    pub gc_grace: HumanDuration,
    /// How long no VM must have moved before what is kept is compressed strongly, at the lowest
    /// priority; zero for never.
    pub optimize_after: HumanDuration,
    /// Who may fetch components that have a name here.
    pub share_with: AcceptFrom,
}

/// `[trust]`: whose identity keys are believed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trust {
    /// Keys known in advance; `cicada identity show` prints a cloud's own.
    pub pinned: Vec<Pin>,
    /// Whether the first key a member of the room shows is believed without asking an operator.
    pub trust_on_first_use: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    pub jid: MemberJid,
    pub key: PublicKey,
}

/// `[migration]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Migration {
    /// How long the source keeps its copy of a VM that moved away.
    pub grace_period: HumanDuration,
    /// How long a reservation at the target lives without being extended, seconds.
    pub lease_s: u32,
    /// Seconds a broker that may run on old records waits for silent members before it tells its operator
    /// how to start VMs all the same.
    pub confirm_patience_s: u32,
    /// How long a guest may take to shut down before the move is called off, seconds.
    pub stop_timeout_s: u32,
    /// Migrations that may arrive at once.
    pub concurrency: u32,
    /// And those from one member; half of them, rounded up, if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency_per_member: Option<u32>,
    /// `"members"`, or the list of members whose VMs are taken.
    pub accept_from: AcceptFrom,
    /// Whether the target of a move may have a guest here held still, and ask to switch over.
    pub steered_by_target: bool,
    /// Requests that one member may make a minute; ten seconds' worth of them at once.
    pub requests_per_minute: u32,
}

/// `[members]`: what VMs of one member may take of this cloud.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Members {
    /// Part of this cloud's virtual CPUs, memory, storage and `transfer.bandwidth_limit`: more than 0; 1 lifts
    /// these limits.
    pub share: f64,
    pub vms_max: u32,
}

/// `[[member]]`: what one member may do here, where it is other than for all.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    pub jid: MemberJid,
    /// Whether its VMs are taken; `migration.accept_from` says so if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accept_vms: Option<bool>,
    /// Whether it may fetch named components; `repository.share_with` says so if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_components: Option<bool>,
    /// `members.share` if not set: the limits below that are not set follow from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// What VMs from it may take here together, those on their way counted in; `members.vms_max` if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vms_max: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus_max: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<ByteSize>,
    /// Of their virtual disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_max: Option<ByteSize>,
    /// Most that is served to it, over all streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<Rate>,
    /// `migration.requests_per_minute` if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
}

/// Whose VMs are taken.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum AcceptFrom {
    /// Every trusted member of the room.
    #[default]
    Members,
    These(Vec<MemberJid>),
}

/// `[api]`: how this broker's operator talks to it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Api {
    /// The Unix socket; `<data_dir>/cicada.sock` if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl AcceptFrom {
    pub fn accepts(&self, source: &MemberJid) -> bool {
        match self {
            AcceptFrom::Members => true,
            AcceptFrom::These(list) => list.contains(source),
        }
    }
}

fn default_data_dir() -> PathBuf {
    "/var/lib/cicada".into()
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 7420)),
            advertise: Vec::new(),
            peer_networks: Vec::new(),
            bandwidth_limit: None,
        }
    }
}

impl Default for Hypervisor {
    fn default() -> Self {
        Self {
            driver: DriverKind::Qemu,
            accelerator: Accelerator::Auto,
            cpus: None,
            memory: None,
            cpu_overcommit: 4.0,
            storage_overcommit: 1.0,
            storage_floor: ByteSize::gib(1),
            cpu_model: "qemu64".into(),
            machine_type: None,
            firmware_code: None,
            firmware_vars: None,
            vm_uids: VmUids::Auto,
        }
    }
}

impl Default for Repository {
    fn default() -> Self {
        Self {
            dir: None,
            hot_cache_size: ByteSize::gib(4),
            gc_grace: HumanDuration::from_secs(600),
            optimize_after: HumanDuration::from_secs(300),
            share_with: AcceptFrom::Members,
        }
    }
}

impl Default for Migration {
    fn default() -> Self {
        Self {
            grace_period: HumanDuration::from_secs(24 * 3600),
            lease_s: 120,
            confirm_patience_s: 60,
            stop_timeout_s: 90,
            concurrency: 4,
            concurrency_per_member: None,
            accept_from: AcceptFrom::Members,
            requests_per_minute: 6000,
            steered_by_target: true,
        }
    }
}

impl Default for Members {
    fn default() -> Self {
        Self { share: 0.5, vms_max: 50 }
    }
}

impl Serialize for AcceptFrom {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            AcceptFrom::Members => s.serialize_str("members"),
            AcceptFrom::These(list) => list.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for AcceptFrom {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Words;
        impl<'de> Visitor<'de> for Words {
            type Value = AcceptFrom;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"members\" or a list of member addresses")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<AcceptFrom, E> {
                match text {
                    "members" => Ok(AcceptFrom::Members),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<AcceptFrom, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = list.next_element()? {
                    members.push(member);
                }
                Ok(AcceptFrom::These(members))
            }
        }
        d.deserialize_any(Words)
    }
}

fn peer_networks<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<IpNet>, D::Error> {
    let bad = |text: &str| {
        de::Error::custom(format!("'{}' is not a network such as \"10.0.0.0/8\"", text.escape_default()))
    };
    let texts = Vec::<String>::deserialize(d)?;
    texts.iter().map(|text| text.parse().map_err(|_| bad(text))).collect()
}

fn socket_address<'de, D: Deserializer<'de>>(d: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(d)?;
    let bad = || {
        de::Error::custom(format!(
            "'{}' is not an address and port such as \"0.0.0.0:7420\"",
            text.escape_default()
        ))
    };
    text.parse().map_err(|_| bad())
}
