//! `[[member]]`: rules of single members, on top of those for all.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

use crate::federation::MemberPolicy;
use crate::types::MemberJid;

use super::error::ConfigError;
use super::file::{File, Member};

/// Sections told apart; a room has no more members.
const MEMBERS_MAX: usize = 10_000;

/// Refuses members that are there twice, and rules that rule nothing. `text` is the file's, for line
/// numbers.
pub fn check(members: &[Member], text: &str) -> Result<(), ConfigError> {
    if members.len() > MEMBERS_MAX {
        return Err(ConfigError::field("member", format!("there are more than {MEMBERS_MAX}")));
    }
    let lines = lines_of(text);
    let mut seen = BTreeMap::new();
    for (i, member) in members.iter().enumerate() {
        if let Some(first) = seen.insert(&member.jid, i) {
            let places = match (lines.get(first), lines.get(i)) {
                (Some(a), Some(b)) => format!(": in line {a} and in line {b}"),
                _ => String::new(),
            };
            let reason = format!("{} has two sections{places}", member.jid);
            return Err(ConfigError::field("member.jid", reason).next("make one section of them"));
        }
        if member.requests_per_minute == Some(0) {
            let reason = format!("must be more than zero for {}", member.jid);
            return Err(ConfigError::field("member.requests_per_minute", reason)
                .next("to end all dealings with a member, revoke its key or remove it from the room"));
        }
    }
    Ok(())
}

/// The lines in which the sections' `jid`s stand, in their order.
fn lines_of(text: &str) -> Vec<usize> {
    #[derive(Deserialize)]
    struct Section {
        jid: Spanned<String>,
    }
    #[derive(Deserialize)]
    struct Sections {
        #[serde(default)]
        member: Vec<Section>,
    }
    let sections = toml::from_str::<Sections>(text).map(|s| s.member).unwrap_or_default();
    let line = |at: usize| text.as_bytes().iter().take(at).filter(|b| **b == b'\n').count() + 1;
    sections.iter().map(|section| line(section.jid.span().start)).collect()
}

pub fn policies(file: &File) -> BTreeMap<MemberJid, MemberPolicy> {
    file.member.iter().map(|m| (m.jid.clone(), policy(file, &m.jid, Some(m)))).collect()
}

/// What `jid` may do: its own section's settings, and those for all for the rest.
pub fn policy(file: &File, jid: &MemberJid, own: Option<&Member>) -> MemberPolicy {
    let for_all = MemberPolicy {
        accept_vms: file.migration.accept_from.accepts(jid),
        share_components: file.repository.share_with.accepts(jid),
        share: file.members.share,
        vms_max: Some(file.members.vms_max),
        cpus_max: None,
        memory_max: None,
        storage_max: None,
        bandwidth_bytes_per_s: None,
        requests_per_minute: file.migration.requests_per_minute,
    };
    let Some(own) = own else { return capped(file, for_all) };
    let policy = MemberPolicy {
        accept_vms: own.accept_vms.unwrap_or(for_all.accept_vms),
        share_components: own.share_components.unwrap_or(for_all.share_components),
        share: own.share.unwrap_or(for_all.share),
        vms_max: own.vms_max.or(for_all.vms_max),
        cpus_max: own.cpus_max,
        memory_max: own.memory_max,
        storage_max: own.storage_max,
        bandwidth_bytes_per_s: own.bandwidth_limit.map(|r| r.bytes_per_s),
        requests_per_minute: own.requests_per_minute.unwrap_or(for_all.requests_per_minute),
    };
    capped(file, policy)
}

/// With the member's share of what may be sent at all, where there is such a limit.
fn capped(file: &File, policy: MemberPolicy) -> MemberPolicy {
    let share = |rate: super::Rate| ((rate.bytes_per_s as f64 * policy.share) as u64).max(1);
    let of_all = file.transfer.bandwidth_limit.filter(|_| policy.share < 1.0).map(share);
    MemberPolicy { bandwidth_bytes_per_s: policy.bandwidth_bytes_per_s.or(of_all), ..policy }
}
