//! `cicada members` and `cicada status`

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;

use crate::federation::MemberPolicy;
use crate::interface::{
    CloudRequest, LinkState, MemberTrust, MemberView, Message, Predecessor, Reply, Request, StatusView,
};
use crate::migration::envelope::SKEW;
use crate::types::PublicKey;

use super::context::Context;
use super::format::{ago, bytes, resource};
use super::printer::{Outcome, Printer, unexpected};
use super::table::{Table, card};

const WATCH_EVERY: Duration = Duration::from_secs(2);
/// A clock that is off by less is nobody's trouble.
const CLOCK_WORTH_A_WORD: Duration = Duration::from_secs(30);

#[derive(Args)]
pub struct Members {
    /// Print the list again whenever it changes, until stopped
    #[arg(long)]
    watch: bool,
}

pub async fn run(ctx: &Context, args: Members) -> Outcome {
    if !args.watch {
        let offline = offline_unless_json(ctx).await?;
        return ctx
            .read(&Request::Cloud(CloudRequest::Members), |printer, reply| {
                print_members(printer, reply, offline.as_deref())
            })
            .await;
    }
    let mut last = None;
    loop {
        let reply = ctx.ask(&Request::Cloud(CloudRequest::Members)).await?;
        let seen = without_moments(&reply);
        if last.as_ref() != Some(&seen) {
            if last.is_some() && !ctx.printer.json {
                ctx.printer.line("")?;
            }
            last = Some(seen);
            if ctx.printer.json {
                ctx.printer.json_message(&Message::Reply(Box::new(reply)))?
            } else {
                let offline = offline_unless_json(ctx).await?;
                print_members(&ctx.printer, reply, offline.as_deref())?
            }
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// Says whose link is down, where nobody may be seen for that reason.
pub(super) fn note_link(printer: &Printer, offline: Option<&str>) {
    if let Some(link) = offline {
        printer.note(format!("this broker is not in the room itself, so what it shows is old: {link}"));
    }
}

/// Why this broker is not in the room, for people; programs ask for the status.
pub(super) async fn offline_unless_json(ctx: &Context) -> Outcome<Option<String>> {
    if ctx.printer.json {
        return Ok(None);
    }
    match ctx.ask(&Request::Cloud(CloudRequest::Status)).await? {
        Reply::Status(status) => Ok(Some(status.link_problem).filter(|_| status.link == LinkState::Offline)),
        other => Err(unexpected(&other)),
    }
}

/// The members without what changes at every look.
fn without_moments(reply: &Reply) -> Reply {
    let mut reply = reply.clone();
    if let Reply::Members(members) = &mut reply {
        members.iter_mut().for_each(|m| m.last_seen = m.since);
    }
    reply
}

fn print_members(printer: &Printer, reply: Reply, offline: Option<&str>) -> Outcome {
    let Reply::Members(members) = reply else { return Err(unexpected(&reply)) };
    let mut table = Table::new([
        "CLOUD", "MEMBER", "STATE", "SINCE", "TRUST", ">CPUS", ">MEMORY", ">STORAGE", ">LOAD", "REGION",
    ]);
    for m in &members {
        table.row([
            m.cloud.as_ref().map_or("-".into(), ToString::to_string),
            m.jid.to_string(),
            m.state.to_string(),
            ago(m.since),
            m.trust.to_string(),
            resource(m.cpus, |n| n.to_string()),
            resource(m.memory_bytes, bytes),
            resource(m.storage_bytes, bytes),
            format!("{:.0} %", m.load_percent),
            m.region.to_string(),
        ]);
    }
    table.print(printer)?;
    if table.is_empty() {
        printer.note("no other member has been seen");
    }
    note_link(printer, offline);
    for (m, ahead_ms) in members.iter().filter_map(|m| Some((m, m.clock_ahead_ms?))) {
        if ahead_ms.unsigned_abs() > CLOCK_WORTH_A_WORD.as_millis() as u64 {
            printer.note(format!(
                "the clock of {} is {}; beyond {} s no request is understood: set both by NTP",
                m.jid,
                clock(ahead_ms),
                SKEW.as_secs()
            ));
        }
    }
    if printer.verbose {
        for m in &members {
            printer.line("")?;
            details(printer, m)?;
        }
    }
    for m in members.iter().filter(|m| m.trust != MemberTrust::Trusted) {
        if let Some(key) = m.key {
            printer.note(distrust(m, &key));
        }
    }
    for m in members.iter().filter(|m| !m.outdated_pin.is_empty()) {
        printer.note(format!(
            "trust.pinned in the configuration names the key {} of {}, which gave way to another; write that one there (members --verbose shows it)",
            m.outdated_pin, m.jid
        ));
    }
    for m in members.iter().filter(|m| !m.refused.is_empty()) {
        printer.note(format!("refused to {}: {}", m.jid, counts(&m.refused)));
    }
    Ok(())
}

/// Why a member's key is not believed, and what to do about it.
fn distrust(m: &MemberView, key: &PublicKey) -> String {
    let shown = key.fingerprint();
    let next = format!("If its operator confirms that: cicada identity trust {} {key}", m.jid);
    match m.trust {
        MemberTrust::Changed => format!(
            "{} shows the key {shown}, but {} is pinned: it was set up anew, or somebody else uses its account. {next}",
            m.jid, m.pinned_fingerprint
        ),
        MemberTrust::Superseded => format!(
            "{} shows the key {shown}, which gave way to {}: it was restored from an old backup, or somebody has its old key. It must not be trusted",
            m.jid, m.pinned_fingerprint
        ),
        MemberTrust::Forked => format!(
            "ALARM: {} shows the key {shown} as a second successor of a key of its; {} came first and is trusted. One of the two is a thief's. Ask its operator which one is right; if it is {shown}: cicada identity trust {} {key}; if in doubt: cicada identity revoke {}",
            m.jid, m.pinned_fingerprint, m.jid, m.jid
        ),
        MemberTrust::Revoked => format!("{} shows the key {shown}; its trust was revoked. {next}", m.jid),
        _ => format!("{} shows the key {shown}, which is not trusted. {next}", m.jid),
    }
}

fn details(printer: &Printer, m: &MemberView) -> Outcome {
    card(
        printer,
        &[
            ("member", m.jid.to_string()),
            ("key", m.key.map(|k| k.to_string()).unwrap_or_default()),
            ("fingerprint", m.fingerprint.clone()),
            ("earlier keys", earlier_keys(m)),
            ("clock", m.clock_ahead_ms.map(clock).unwrap_or_default()),
            ("software", m.software.to_string()),
            ("features", m.features.join(", ")),
            ("power", m.power.to_string()),
            ("carbon", m.carbon_g_per_kwh.map(|c| format!("{c} g/kWh")).unwrap_or_default()),
            ("price", m.price_per_hour.map(|p| format!("{p} per CPU and hour")).unwrap_or_default()),
            ("may", m.policy.as_ref().map(may).unwrap_or_default()),
            ("its VMs here", used(m)),
            ("refused", counts(&m.refused)),
            ("last seen", ago(m.last_seen)),
        ],
    )
}

/// Where a clock is against ours.
fn clock(ahead_ms: i64) -> String {
    let seconds = ahead_ms.unsigned_abs() as f64 / 1000.0;
    match ahead_ms {
        0.. => format!("{seconds:.1} s ahead of ours"),
        _ => format!("{seconds:.1} s behind ours"),
    }
}

/// The keys that the believed one followed, the newest last.
fn earlier_keys(m: &MemberView) -> String {
    let one = |p: &Predecessor| format!("{} until {}", p.fingerprint, p.until);
    m.predecessors.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// What a member may do here.
fn may(p: &MemberPolicy) -> String {
    let yes = |allowed: bool, what: &str| format!("{}{what}", if allowed { "" } else { "not " });
    let cap = p.bandwidth_bytes_per_s.map(|b| format!("be served {}/s", bytes(b)));
    let words = [
        Some(yes(p.accept_vms, "send VMs here")),
        Some(yes(p.share_components, "fetch components")),
        cap,
        Some(format!("ask {} times a minute", p.requests_per_minute)),
    ];
    words.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// What a member's VMs take here, of what they may.
fn used(m: &MemberView) -> String {
    let of =
        |used: String, most: Option<String>| most.map_or(used.clone(), |most| format!("{used} of {most}"));
    let p = m.policy.as_ref();
    let count = |n: u32| n.to_string();
    [
        format!("{} VMs", of(count(m.used.vms), p.and_then(|p| p.vms_max).map(count))),
        format!("{} CPUs", of(m.used.cpus.to_string(), p.and_then(|p| p.cpus_max).map(count))),
        format!(
            "memory {}",
            of(bytes(m.used.memory_bytes), p.and_then(|p| p.memory_max).map(|s| bytes(s.0)))
        ),
        format!(
            "storage {}",
            of(bytes(m.used.storage_bytes), p.and_then(|p| p.storage_max).map(|s| bytes(s.0)))
        ),
    ]
    .join(", ")
}

/// Refusals, the most frequent first; empty if there are none.
fn counts(by_kind: &BTreeMap<String, u64>) -> String {
    let mut all: Vec<_> = by_kind.iter().collect();
    all.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    all.iter().map(|(kind, n)| format!("{n} {kind}")).collect::<Vec<_>>().join(", ")
}

pub async fn status(ctx: &Context) -> Outcome {
    ctx.read(&Request::Cloud(CloudRequest::Status), |printer, reply| match reply {
        Reply::Status(status) => print_status(printer, &status),
        other => Err(unexpected(&other)),
    })
    .await
}

fn print_status(printer: &Printer, s: &StatusView) -> Outcome {
    let free = |text: String| format!("{text} free");
    let link = match s.link {
        LinkState::Online => printer.good(s.link.as_str()),
        LinkState::Offline => printer.bad(&s.link_problem),
    };
    card(
        printer,
        &[
            ("cloud", s.cloud.to_string()),
            ("member", s.jid.to_string()),
            ("key", format!("{} ({})", s.key, s.fingerprint)),
            ("room", format!("{} ({link})", s.room)),
            ("version", s.version.clone()),
            ("hypervisor", format!("{} ({})", s.driver, s.accelerator)),
            ("VMs run as", if s.own_users { "a user each" } else { "the broker's user" }.into()),
            ("CPUs", free(resource(s.cpus, |n| n.to_string()))),
            ("memory", free(resource(s.memory_bytes, bytes))),
            ("storage", free(resource(s.storage_bytes, bytes))),
            ("for VMs", format!("{} not promised yet", resource(s.storage_promised_bytes, bytes))),
            ("transfer", s.transfer_addresses.join(", ")),
            ("VMs running", s.vms_running.to_string()),
            ("moves running", s.migrations_running.to_string()),
            ("refused", if s.refusals.total == 0 { "nothing".into() } else { counts(&s.refusals.by_kind) }),
            ("broker's memory", bytes(s.resident_bytes)),
        ],
    )
}
