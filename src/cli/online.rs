//! `cicada config check --online`: what a broker will need beyond the file, tried one after the other. A broker that
//! runs is not disturbed, and nothing is changed but for a moment: the account is in the room, and a room of a
//! random name is there, where the server lets the account make one.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::config::{Config, HostPort, NetworkKind};
use crate::daemon;
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::types::kinds;
use crate::xmpp::admin::{Admin, AdminError};

use super::context::Context;
use super::room_check;

const SERVER_TIMEOUT: Duration = Duration::from_secs(30);
/// Which bridges QEMU's helper may use.
const BRIDGE_CONF: &str = "/etc/qemu/bridge.conf";

kinds! {
    /// What is tried.
    CheckKind {
        Broker = "broker",
        XmppServer = "xmpp-server",
        Room = "room",
        Membership = "membership",
        Nick = "nick",
        RoomOwners = "room-owners",
        MakingRooms = "making-rooms",
        TransferPort = "transfer-port",
        TransferAddresses = "transfer-addresses",
        Hypervisor = "hypervisor",
        Bridge = "bridge",
    }
}

/// One thing that was tried.
#[derive(Serialize)]
pub struct Check {
    pub check: CheckKind,
    /// What was found.
    pub detail: String,
    pub problem: Option<Problem>,
    /// What a broker can do with, but should not have to.
    pub warning: Option<Problem>,
}

impl Check {
    pub fn warning(check: CheckKind, warning: Problem) -> Self {
        Self { check, detail: warning.reason.clone(), problem: None, warning: Some(warning) }
    }
}

pub fn check(kind: CheckKind, result: Result<String, Problem>) -> Check {
    let (detail, problem) = match result {
        Ok(detail) => (detail, None),
        Err(problem) => (problem.reason.clone(), Some(problem)),
    };
    Check { check: kind, detail, problem, warning: None }
}

pub async fn run(ctx: &Context, config: &Config) -> Vec<Check> {
    let mut checks = Vec::new();
    let runs = ctx.client().await.is_ok();
    checks.push(check(CheckKind::Broker, Ok(if runs { "runs" } else { "does not run" }.into())));
    match login(config).await {
        Ok(admin) => {
            let server = admin.server().await;
            let detail = format!("{} is logged in; rooms are kept by {server}", config.xmpp.jid);
            checks.push(check(CheckKind::XmppServer, Ok(detail)));
            checks.extend(room_check::run(config, &admin, &server, runs).await);
            admin.close().await;
        }
        Err(problem) => checks.push(check(CheckKind::XmppServer, Err(problem))),
    }
    checks.push(check(CheckKind::TransferPort, port(config, runs)));
    checks.push(check(CheckKind::TransferAddresses, addresses(config).await));
    checks.push(check(CheckKind::Hypervisor, hypervisor(config).await));
    for network in &config.networks {
        if let NetworkKind::Bridge(bridge) = &network.kind {
            checks.push(check(CheckKind::Bridge, bridge_is_there(bridge)));
        }
    }
    checks
}

async fn login(config: &Config) -> Result<Admin, Problem> {
    let object = format!("account {}", config.xmpp.jid);
    let password = config.xmpp.password().map_err(|e| Problem::from_config(&e))?;
    let settings = daemon::xmpp_settings(config, password.expose().to_owned());
    let next = "check [xmpp] server, security and ca_file, and the account's password";
    match tokio::time::timeout(SERVER_TIMEOUT, Admin::open(settings)).await {
        Ok(opened) => opened.map_err(|e| match e {
            AdminError::Connect(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                Problem::new(ProblemKind::Forbidden, object, chain(&e)).next(next)
            }
            AdminError::Connect(e) => Problem::new(ProblemKind::Unavailable, object, chain(&e)).next(next),
            e => Problem::from_error(ProblemKind::BadRequest, object, &e).next("correct [xmpp] room"),
        }),
        Err(_) => {
            let reason = format!("the server did not answer within {} s", SERVER_TIMEOUT.as_secs());
            Err(Problem::new(ProblemKind::Unavailable, object, reason).next(next))
        }
    }
}

fn port(config: &Config, runs: bool) -> Result<String, Problem> {
    let listen = config.transfer.listen;
    match UdpSocket::bind(listen) {
        Ok(_) => Ok(format!("UDP {listen} is free; others must reach it, through a firewall too")),
        Err(e) if runs && e.kind() == std::io::ErrorKind::AddrInUse => {
            Ok(format!("UDP {listen} is in use, as it is by a broker that runs"))
        }
        Err(e) => Err(Problem::from_error(ProblemKind::Failed, format!("UDP {listen}"), &e)
            .next("set transfer.listen to an address and a free port of this machine")),
    }
}

async fn addresses(config: &Config) -> Result<String, Problem> {
    let addresses = config.transfer.addresses(None);
    if addresses.is_empty() {
        return Err(Problem::new(
            ProblemKind::Unavailable,
            "transfer.advertise",
            "this machine has no address",
        )
        .next("connect it, or set transfer.advertise"));
    }
    // Those of this machine need no looking up.
    for address in &config.transfer.advertise {
        let Ok(HostPort { host, .. }) = address.parse() else { continue };
        let found = tokio::net::lookup_host((host.as_str(), 0)).await.map(|mut found| found.next().is_some());
        let problem = |reason: String| {
            Problem::new(ProblemKind::Unavailable, format!("transfer.advertise {address}"), reason)
                .next("correct the name, or write an address")
        };
        if !found.map_err(|e| problem(e.to_string()))? {
            return Err(problem("the name has no address".into()));
        }
    }
    Ok(format!("other clouds are told {}", addresses.join(", ")))
}

pub async fn hypervisor(config: &Config) -> Result<String, Problem> {
    let driver = daemon::open_driver(config).await?;
    let f = driver.features();
    Ok(format!(
        "{} {} with {}, machine type {}, starts a VM as it is configured",
        f.driver, f.version, f.accelerator, f.machine_type
    ))
}

fn bridge_is_there(bridge: &str) -> Result<String, Problem> {
    let object = format!("bridge {bridge}");
    let device = Path::new("/sys/class/net").join(bridge);
    if !device.exists() {
        return Err(Problem::new(ProblemKind::Missing, object, "is not on this machine")
            .next(format!("make it: ip link add {bridge} type bridge, or correct its [[network]]")));
    }
    if !device.join("bridge").exists() {
        return Err(Problem::new(ProblemKind::BadRequest, object, "is a network device, and no bridge")
            .next("correct its [[network]]"));
    }
    // Others it may include are not followed: what is allowed there is not denied here.
    let rules = fs::read_to_string(BRIDGE_CONF).unwrap_or_default();
    let allowed = rules
        .lines()
        .map(str::trim)
        .any(|line| line.starts_with("include") || line == format!("allow {bridge}") || line == "allow all");
    match allowed {
        true => Ok(format!("{bridge} is there, and QEMU's helper may use it")),
        false => Err(Problem::new(ProblemKind::Forbidden, object, "QEMU's helper may not use it")
            .next(format!("add the line 'allow {bridge}' to {BRIDGE_CONF}"))),
    }
}
