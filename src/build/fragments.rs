//! Aggregated files, which many packages write together: a component holds its share of each.

use super::error::BuildError;
use crate::component::manifest::{Fragment, FragmentRule, Manifest, Meta, show};

/// The rule of an aggregated file, by its path.
pub fn rule_of(path: &[u8]) -> Option<FragmentRule> {
    Some(match path {
        b"etc/passwd" => FragmentRule::Accounts,
        b"etc/group" => FragmentRule::Groups,
        b"etc/shadow" | b"etc/subuid" | b"etc/subgid" => FragmentRule::Lines,
        b"etc/gshadow" => FragmentRule::GroupShadow,
        b"var/lib/dpkg/status" => FragmentRule::Stanzas,
        b"var/lib/dpkg/statoverride" | b"var/lib/dpkg/triggers/File" => FragmentRule::Set,
        b"var/lib/dpkg/diversions" => FragmentRule::Triples,
        b"var/cache/debconf/config.dat" | b"var/cache/debconf/templates.dat" => FragmentRule::Stanzas,
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
    let mut records = parse(rule, content).map_err(|reason| BuildError::Fragment { path: show(&path), reason })?;
    if let Some(base) = base.and_then(|b| b.fragments.iter().find(|f| f.path == path)) {
        records.retain(|r| base.records.binary_search(r).is_err());
        if records.is_empty() && base.meta == meta {
            return Ok(None);
        }
    }
    Ok(Some(Fragment { path, rule, meta, records }))
}

type Records = Vec<(Vec<u8>, Vec<u8>)>;

fn parse(rule: FragmentRule, content: &[u8]) -> Result<Records, String> {
    let lines = || content.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let mut records: Records = match rule {
        FragmentRule::Stanzas => {
            let text = String::from_utf8(content.to_vec()).map_err(|e| e.to_string())?;
            text.split("\n\n").map(|s| s.trim_matches('\n')).filter(|s| !s.is_empty())
                .map(|s| (s.lines().next().unwrap_or_default().as_bytes().to_vec(), s.as_bytes().to_vec())).collect()
        }
        FragmentRule::Set => lines().map(|l| (l.to_vec(), l.to_vec())).collect(),
        FragmentRule::Triples => lines().collect::<Vec<_>>().chunks(3).map(|c| (c[0].to_vec(), c.join(&b'\n'))).collect(),
        _ => lines().map(|l| (l.split(|b| *b == b':').next().unwrap_or_default().to_vec(), l.to_vec())).collect(),
    };
    records.sort();
    Ok(records)
}

/// The file that a single fragment stands for.
pub fn render(fragment: &Fragment) -> Result<Vec<u8>, BuildError> {
    let end: &[u8] = if fragment.rule == FragmentRule::Stanzas { b"\n\n" } else { b"\n" };
    let mut records: Vec<&[u8]> = fragment.records.iter().map(|(_, r)| &r[..]).collect();
    if matches!(fragment.rule, FragmentRule::Accounts | FragmentRule::Groups) {
        records.sort_by_key(|r| r.split(|b| *b == b':').nth(2).and_then(|n| std::str::from_utf8(n).ok()?.parse::<u32>().ok()));
    }
    Ok(records.into_iter().flat_map(|r| [r, end].concat()).collect())
}
