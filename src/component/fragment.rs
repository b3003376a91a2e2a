//! Files that many packages write together: how they split into records and merge again.

use std::collections::BTreeMap;

use super::manifest::{FragmentRule, show};

type Record = (Vec<u8>, Vec<u8>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FragmentError {
    #[error("'{line}' does not fit the form of an aggregated file of rule {rule:?}")]
    Malformed { rule: FragmentRule, line: String },
    #[error("record '{key}' appears twice")]
    Twice { key: String },
    #[error("record '{key}' of the component built on was removed; declare it in the definition instead")]
    Removed { key: String },
}

/// Two components whose records cannot stand in one file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("components {left} and {right} disagree about {path}: {what}")]
pub struct Conflict {
    pub left: String,
    pub right: String,
    pub path: String,
    pub what: String,
}

/// One component's share of a file.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub component: &'a str,
    /// The component's number in the set, for `overrides`.
    pub number: usize,
    pub records: &'a [Record],
}

/// Splits a file into keyed records, sorted by key.
pub fn parse(rule: FragmentRule, bytes: &[u8]) -> Result<Vec<Record>, FragmentError> {
    let malformed = |line: &[u8]| FragmentError::Malformed { rule, line: line.escape_ascii().to_string() };
    let lines = || bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let mut out: Vec<Record> = Vec::new();
    match rule {
        FragmentRule::Accounts | FragmentRule::Groups | FragmentRule::Lines | FragmentRule::GroupShadow => {
            let fields_min = if rule == FragmentRule::Lines { 2 } else { 4 };
            for line in lines() {
                let fields: Vec<_> = line.split(|b| *b == b':').collect();
                let bad_id =
                    matches!(rule, FragmentRule::Accounts | FragmentRule::Groups) && id_of(line).is_none();
                if fields.len() < fields_min || fields[0].is_empty() || bad_id {
                    return Err(malformed(line));
                }
                out.push((fields[0].to_vec(), line.to_vec()));
            }
        }
        FragmentRule::Set => out.extend(lines().map(|l| (l.to_vec(), l.to_vec()))),
        FragmentRule::Triples => {
            let all: Vec<_> = lines().collect();
            for triple in all.chunks(3) {
                match triple {
                    [first, _, _] => out.push((first.to_vec(), triple.join(&b'\n'))),
                    _ => return Err(malformed(triple[0])),
                }
            }
        }
        FragmentRule::Stanzas => {
            let mut stanza: Vec<&[u8]> = Vec::new();
            for line in bytes.split(|b| *b == b'\n').chain([&b""[..]]) {
                if !line.is_empty() {
                    stanza.push(line);
                } else if let Some(first) = stanza.first() {
                    out.push((first.to_vec(), stanza.join(&b'\n')));
                    stanza.clear();
                }
            }
        }
    }
    out.sort();
    out.dedup();
    match out.windows(2).find(|w| w[0].0 == w[1].0) {
        Some(w) => Err(FragmentError::Twice { key: w[0].0.escape_ascii().to_string() }),
        None => Ok(out),
    }
}

/// The records a component added to, or changed in, what it was built on.
pub fn difference(base: &[Record], full: &[Record]) -> Result<Vec<Record>, FragmentError> {
    let new: BTreeMap<_, _> = full.iter().map(|(k, r)| (k, r)).collect();
    if let Some((key, _)) = base.iter().find(|(k, _)| !new.contains_key(k)) {
        return Err(FragmentError::Removed { key: key.escape_ascii().to_string() });
    }
    let old: BTreeMap<_, _> = base.iter().map(|(k, r)| (k, r)).collect();
    Ok(full.iter().filter(|(k, r)| old.get(k) != Some(&r)).cloned().collect())
}

/// Unites the parts of one file and renders it. `parts` come with required components first;
/// `overrides(a, b)` tells whether component `a` was built on `b`. Two others that disagree about
/// a record are a conflict, unless `ordered`: then the later one wins.
pub fn merge(
    rule: FragmentRule,
    path: &[u8],
    parts: &[Part<'_>],
    overrides: &dyn Fn(usize, usize) -> bool,
    ordered: bool,
) -> Result<Vec<u8>, Conflict> {
    let conflict = |left: &Part<'_>, right: &Part<'_>, what: String| Conflict {
        left: left.component.into(),
        right: right.component.into(),
        path: show(path),
        what,
    };
    let mut all: BTreeMap<&[u8], (&Part<'_>, Vec<u8>)> = BTreeMap::new();
    for part in parts {
        for (key, record) in part.records {
            let Some((owner, held)) = all.get_mut(key.as_slice()) else {
                all.insert(key, (part, record.clone()));
                continue;
            };
            if held == record {
                continue;
            }
            if let Some(united) = unite_members(rule, held, record) {
                *held = united;
            } else if overrides(part.number, owner.number) || ordered {
                (*owner, *held) = (part, record.clone());
            } else {
                return Err(conflict(owner, part, format!("'{}'", key.escape_ascii())));
            }
        }
    }
    if matches!(rule, FragmentRule::Accounts | FragmentRule::Groups) {
        let mut ids: BTreeMap<u32, (&Part<'_>, &[u8])> = BTreeMap::new();
        for (key, (owner, record)) in &all {
            let Some(id) = id_of(record) else { continue };
            if let Some((other, name)) = ids.insert(id, (owner, key)) {
                // One component may know what it does when it gives two names one id.
                if other.number != owner.number {
                    let what =
                        format!("id {id} is both '{}' and '{}'", name.escape_ascii(), key.escape_ascii());
                    return Err(conflict(other, owner, what));
                }
            }
        }
    }
    Ok(render(rule, all.into_iter().map(|(k, (_, r))| (k, r)).collect()))
}

fn render(rule: FragmentRule, mut records: Vec<(&[u8], Vec<u8>)>) -> Vec<u8> {
    if matches!(rule, FragmentRule::Accounts | FragmentRule::Groups) {
        records.sort_by(|a, b| (id_of(&a.1), a.0).cmp(&(id_of(&b.1), b.0)));
    }
    let end: &[u8] = if rule == FragmentRule::Stanzas { b"\n\n" } else { b"\n" };
    let mut out = Vec::new();
    for (_, record) in records {
        out.extend_from_slice(&record);
        out.extend_from_slice(end);
    }
    out
}

/// The numeric third field.
fn id_of(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line.split(|b| *b == b':').nth(2)?).ok()?.parse().ok()
}

/// Two records of a group that differ only in their members, united.
fn unite_members(rule: FragmentRule, a: &[u8], b: &[u8]) -> Option<Vec<u8>> {
    if !matches!(rule, FragmentRule::Groups | FragmentRule::GroupShadow) {
        return None;
    }
    let split = |line: &[u8]| {
        line.iter().rposition(|c| *c == b':').map(|i| (line[..=i].to_vec(), line[i + 1..].to_vec()))
    };
    let ((head_a, members_a), (head_b, members_b)) = (split(a)?, split(b)?);
    if head_a != head_b {
        return None;
    }
    let mut members: Vec<&[u8]> = members_a
        .split(|c| *c == b',')
        .chain(members_b.split(|c| *c == b','))
        .filter(|m| !m.is_empty())
        .collect();
    members.sort_unstable();
    members.dedup();
    Some([head_a, members.join(&b',')].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: usize, _: usize) -> bool {
        false
    }

    fn merged(
        rule: FragmentRule,
        files: &[&str],
        overrides: &dyn Fn(usize, usize) -> bool,
    ) -> Result<String, Conflict> {
        let records: Vec<_> = files.iter().map(|f| parse(rule, f.as_bytes()).unwrap()).collect();
        let names = ["os", "redis", "nginx"];
        let parts: Vec<_> = records
            .iter()
            .enumerate()
            .map(|(number, records)| Part { component: names[number], number, records })
            .collect();
        merge(rule, b"etc/x", &parts, overrides, false).map(|b| String::from_utf8(b).unwrap())
    }

    #[test]
    fn accounts_sort_by_id_and_clash_by_name() {
        let os = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
        let text = merged(FragmentRule::Accounts, &[os, "redis:x:120:120::/:/bin/false\n"], &none).unwrap();
        assert_eq!(
            text.lines().map(|l| l.split(':').next().unwrap()).collect::<Vec<_>>(),
            ["root", "redis", "nobody"]
        );
        let clash =
            merged(FragmentRule::Accounts, &[os, "redis:x:120:1::/:/s", "nginx:x:120:1::/:/s"], &none);
        assert!(clash.unwrap_err().to_string().contains("id 120 is both 'nginx' and 'redis'"));
    }

    #[test]
    fn group_members_unite() {
        let text = merged(
            FragmentRule::Groups,
            &["ssl:x:110:\n", "ssl:x:110:postgres\n", "ssl:x:110:redis\n"],
            &none,
        );
        assert_eq!(text.unwrap(), "ssl:x:110:postgres,redis\n");
    }

    #[test]
    fn stanzas_merge_and_a_component_overrides_what_it_was_built_on() {
        let os = "Package: base\nVersion: 1\n\nPackage: libc6\nVersion: 1\n\n";
        let built_on = |a: usize, b: usize| a == 1 && b == 0;
        let redis = "Package: libc6\nVersion: 2\n\nPackage: redis\n";
        let text = merged(FragmentRule::Stanzas, &[os, redis], &built_on).unwrap();
        assert_eq!(text, "Package: base\nVersion: 1\n\nPackage: libc6\nVersion: 2\n\nPackage: redis\n\n");
        let error = merged(FragmentRule::Stanzas, &[os, redis], &none).unwrap_err();
        assert!(error.to_string().starts_with("components os and redis disagree about /etc/x"), "{error}");
    }

    #[test]
    fn differences_are_what_was_added_or_changed() {
        let base = parse(FragmentRule::Set, b"a\nb\n").unwrap();
        let full = parse(FragmentRule::Set, b"b\na\nc\n").unwrap();
        assert_eq!(difference(&base, &full).unwrap(), [(b"c".to_vec(), b"c".to_vec())]);
        assert!(matches!(difference(&full, &base), Err(FragmentError::Removed { .. })));
    }

    #[test]
    fn odd_files_are_errors() {
        for (rule, text) in [
            (FragmentRule::Accounts, "no colons"),
            (FragmentRule::Accounts, "a:x:abc:0:::"),
            (FragmentRule::Triples, "a\nb\n"),
            (FragmentRule::Lines, "a:1\na:2\n"),
        ] {
            assert!(parse(rule, text.as_bytes()).is_err(), "{text}");
        }
    }
}
