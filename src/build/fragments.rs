//! Aggregated files, which many packages write together: a component holds its share of each. The
//! rules are [`crate::component::fragment`]'s; which file follows which is said here.

use super::error::BuildError;
use crate::component::fragment;
use crate::component::manifest::{Fragment, FragmentRule, Manifest, Meta, show};

/// The rule of an aggregated file, by its path.
pub fn rule_of(path: &[u8]) -> Option<FragmentRule> {
    // dpkg keeps one file of interested packages for each named trigger.
    let trigger = path.strip_prefix(b"var/lib/dpkg/triggers/");
    Some(match path {
        b"etc/passwd" => FragmentRule::Accounts,
        b"etc/group" => FragmentRule::Groups,
        b"etc/shadow" | b"etc/subuid" | b"etc/subgid" => FragmentRule::Lines,
        b"etc/gshadow" => FragmentRule::GroupShadow,
        b"etc/shells" | b"var/lib/dpkg/statoverride" => FragmentRule::Set,
        b"var/lib/dpkg/diversions" => FragmentRule::Triples,
        b"var/lib/dpkg/status" | b"var/cache/debconf/config.dat" | b"var/cache/debconf/templates.dat" => {
            FragmentRule::Stanzas
        }
        _ if trigger.is_some_and(|name| name != b"Unincorp" && name != b"Lock") => FragmentRule::Set,
        _ => return None,
    })
}

/// What of `content` the base does not have yet; `None` if that is nothing.
pub fn share(
    path: Vec<u8>,
    rule: FragmentRule,
    meta: Meta,
    content: &[u8],
    base: Option<&Manifest>,
) -> Result<Option<Fragment>, BuildError> {
    let fail = |source| BuildError::Fragment { path: show(&path), source };
    let full = fragment::parse(rule, content).map_err(fail)?;
    let Some(before) = base.and_then(|b| b.fragments.iter().find(|f| f.path == path)) else {
        return Ok(Some(Fragment { path, rule, meta, records: full }));
    };
    let records = fragment::difference(rule, &before.records, &full).map_err(fail)?;
    // The OS's owner and mode stand for all shares.
    Ok((!records.is_empty()).then_some(Fragment { path, rule, meta: before.meta, records }))
}

/// The file that a single fragment stands for.
pub fn render(fragment: &Fragment) -> Vec<u8> {
    fragment::render(fragment.rule, &fragment.records)
}
