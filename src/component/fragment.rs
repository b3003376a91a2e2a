//! Files that many packages write together (`/etc/passwd`, `/var/lib/dpkg/status` …): how they fall
//! into keyed records, what a program adds to them, and how the records of several components become
//! one file again. The rules are those of [`FragmentRule`]; the result never depends on the order in
//! which components are named, except where a recipe says that order settles conflicts.

use std::collections::{BTreeMap, BTreeSet};

use super::FragmentRule;
use super::manifest::show;

/// A record's key and its bytes without the terminator.
pub type Record = (Vec<u8>, Vec<u8>);

/// A file that does not follow its rule, or a change that records cannot express.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FragmentError {
    #[error("line {line}: {reason}")]
    Malformed { line: usize, reason: &'static str },
    #[error("'{key}' appears twice")]
    Duplicate { key: String },
    #[error("records of what it was built on were removed: {}", keys.join(", "))]
    Removed { keys: Vec<String> },
    #[error("members of '{key}' were removed: {}", members.join(", "))]
    MembersRemoved { key: String, members: Vec<String> },
}

/// Why the shares of several components do not make one file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    #[error("{first} and {second} both claim '{key}' in {path}, with different content")]
    Content { path: String, key: String, first: String, second: String },
    #[error("{path}: {first} gives id {id} to '{first_name}' and {second} gives it to '{second_name}'")]
    SharedId { path: String, id: u32, first: String, first_name: String, second: String, second_name: String },
    #[error("{component} brings a record '{key}' for {path} that does not follow the file's rule")]
    BadRecord { component: String, path: String, key: String },
}

/// One component's share of an aggregated file.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// For people.
    pub component: &'a str,
    /// The component's number in the set, for `overrides`.
    pub number: usize,
    /// As in a manifest: sorted by key, unique.
    pub records: &'a [Record],
}

/// Takes a file apart into records, sorted by key. Blank lines are dropped, member lists sorted;
/// several lines of one key under [`FragmentRule::Lines`] (`subuid`) are one record.
pub fn parse(rule: FragmentRule, bytes: &[u8]) -> Result<Vec<Record>, FragmentError> {
    let mut records: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    for (key, record) in split(rule, bytes)? {
        match records.get_mut(&key) {
            None => {
                records.insert(key, record);
            }
            Some(held) if rule == FragmentRule::Lines => {
                held.push(b'\n');
                held.extend_from_slice(&record);
            }
            Some(_) if rule == FragmentRule::Set => {}
            Some(_) => return Err(FragmentError::Duplicate { key: text(&key) }),
        }
    }
    Ok(records.into_iter().collect())
}

/// The records that `full` adds to or changes in `base`: what a program built on `base` brings. Where
/// only a member list grew, the record names the new members alone. Removals cannot be expressed,
/// since another program may need what is gone, and are refused by name.
pub fn difference(
    rule: FragmentRule,
    base: &[Record],
    full: &[Record],
) -> Result<Vec<Record>, FragmentError> {
    let base: BTreeMap<&[u8], &[u8]> = base.iter().map(|(k, r)| (&k[..], &r[..])).collect();
    let kept: BTreeSet<&[u8]> = full.iter().map(|(k, _)| &k[..]).collect();
    let removed: Vec<String> = base.keys().filter(|k| !kept.contains(*k)).map(|k| text(k)).collect();
    if !removed.is_empty() {
        return Err(FragmentError::Removed { keys: removed });
    }
    let mut out = Vec::new();
    for (key, record) in full {
        match base.get(&key[..]) {
            Some(old) if old == record => {}
            Some(old) => out.push((key.clone(), change(rule, key, old, record)?)),
            None => out.push((key.clone(), record.clone())),
        }
    }
    Ok(out)
}

/// Unites the shares of several components and renders the file.
///
/// Of several claims to one key those of components that another claimant was built on, which
/// `overrides(claimant, other)` tells, step back. If the remaining ones differ that is a conflict,
/// unless `ordered`: then the highest number wins.
/// Member lists are united over all claims. An id belongs to one name, again unless `ordered`; but
/// id 0 may have several names if the same components bring all of them.
pub fn merge(
    rule: FragmentRule,
    path: &[u8],
    parts: &[Part<'_>],
    overrides: &dyn Fn(usize, usize) -> bool,
    ordered: bool,
) -> Result<Vec<u8>, MergeError> {
    let mut claims: BTreeMap<&[u8], Vec<Claim<'_>>> = BTreeMap::new();
    for part in parts {
        for (key, record) in part.records {
            check_record(rule, path, part, key, record)?;
            claims.entry(key).or_default().push((*part, record));
        }
    }
    let mut merged = Vec::with_capacity(claims.len());
    for (key, claims) in &claims {
        let winner = resolve(claims, rule, overrides, ordered).map_err(|(first, second)| {
            let (first, second) = (first.component.to_owned(), second.component.to_owned());
            MergeError::Content { path: show(path), key: text(key), first, second }
        })?;
        let record = with_all_members(rule, winner.1, claims);
        let mut claimants: Vec<usize> = claims.iter().map(|(part, _)| part.number).collect();
        claimants.sort_unstable();
        merged.push(Merged { key, id: id_of(rule, &record), record, owner: winner.0, claimants });
    }
    merged.sort_by(|a, b| (a.id, a.key).cmp(&(b.id, b.key)));
    if !ordered {
        check_ids(path, &merged)?;
    }
    Ok(lines_of(rule, merged.iter().map(|m| &m.record[..])))
}

/// The file that one component's records make alone.
pub fn render(rule: FragmentRule, records: &[Record]) -> Vec<u8> {
    let mut sorted: Vec<_> = records.iter().map(|(key, record)| (id_of(rule, record), key, record)).collect();
    sorted.sort();
    lines_of(rule, sorted.into_iter().map(|(_, _, record)| &record[..]))
}

struct Merged<'a> {
    key: &'a [u8],
    record: Vec<u8>,
    owner: Part<'a>,
    /// Numbers of all components that bring the record, ascending.
    claimants: Vec<usize>,
    /// Only under the rules that have ids.
    id: Option<u32>,
}

type Claim<'a> = (Part<'a>, &'a [u8]);

/// The claim that stands, or the two components that disagree.
fn resolve<'a>(
    claims: &[Claim<'a>],
    rule: FragmentRule,
    overrides: &dyn Fn(usize, usize) -> bool,
    ordered: bool,
) -> Result<Claim<'a>, (Part<'a>, Part<'a>)> {
    let is_overridden =
        |part: &Part<'_>| claims.iter().any(|(other, _)| overrides(other.number, part.number));
    let standing: Vec<Claim<'a>> = claims.iter().filter(|(part, _)| !is_overridden(part)).copied().collect();
    // Components cannot require each other in a ring: an id is the hash of what it requires.
    let Some((first, rest)) = standing.split_first() else { return Ok(claims[0]) };
    match rest.iter().find(|(_, record)| !same_but_members(rule, first.1, record)) {
        None => Ok(*first),
        Some(_) if ordered => {
            Ok(standing.iter().max_by_key(|(part, _)| part.number).copied().unwrap_or(*first))
        }
        Some((second, _)) => Err((first.0, *second)),
    }
}

fn with_all_members(rule: FragmentRule, record: &[u8], claims: &[Claim<'_>]) -> Vec<u8> {
    let Some(mut united) = Membered::of(rule, record) else { return record.to_vec() };
    for (_, record) in claims {
        united.members.extend(Membered::of(rule, record).into_iter().flat_map(|m| m.members));
    }
    united.render()
}

/// One id, one name. `merged` is sorted by id.
fn check_ids(path: &[u8], merged: &[Merged<'_>]) -> Result<(), MergeError> {
    for pair in merged.windows(2) {
        let [a, b] = pair else { continue };
        let (Some(id), true) = (a.id, a.id == b.id) else { continue };
        // Whose record stands may depend on the order of components; who brings it does not.
        if id == 0 && a.claimants == b.claimants {
            continue;
        }
        return Err(MergeError::SharedId {
            path: show(path),
            id,
            first: a.owner.component.to_owned(),
            first_name: text(a.key),
            second: b.owner.component.to_owned(),
            second_name: text(b.key),
        });
    }
    Ok(())
}

/// A record from a manifest was written by others: it must be what parsing it alone would give, or
/// it could smuggle a second record (`root` with another password) past the rules above.
fn check_record(
    rule: FragmentRule,
    path: &[u8],
    part: &Part<'_>,
    key: &[u8],
    record: &[u8],
) -> Result<(), MergeError> {
    let bytes = lines_of(rule, std::iter::once(record));
    match parse(rule, &bytes).as_deref() {
        Ok([(k, r)]) if k == key && r == record => Ok(()),
        _ => Err(MergeError::BadRecord {
            component: part.component.to_owned(),
            path: show(path),
            key: text(key),
        }),
    }
}

/// The file's bytes. Stanzas are each followed by a blank line, as dpkg and debconf write them.
fn lines_of<'a>(rule: FragmentRule, records: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for record in records {
        out.extend_from_slice(record);
        out.extend_from_slice(if rule == FragmentRule::Stanzas { b"\n\n" } else { b"\n" });
    }
    out
}

/// The part of a changed record that a program brings.
fn change(rule: FragmentRule, key: &[u8], old: &[u8], new: &[u8]) -> Result<Vec<u8>, FragmentError> {
    let (Some(old_list), Some(mut new_list)) = (Membered::of(rule, old), Membered::of(rule, new)) else {
        return Ok(new.to_vec());
    };
    let lost: Vec<String> = old_list.members.difference(&new_list.members).map(|m| text(m)).collect();
    if !lost.is_empty() {
        return Err(FragmentError::MembersRemoved { key: text(key), members: lost });
    }
    new_list.members.retain(|m| !old_list.members.contains(m));
    Ok(new_list.render())
}

fn same_but_members(rule: FragmentRule, a: &[u8], b: &[u8]) -> bool {
    match (Membered::of(rule, a), Membered::of(rule, b)) {
        (Some(a), Some(b)) => (a.before, a.after) == (b.before, b.after),
        _ => a == b,
    }
}

/// A record that holds a list which unites: the members of a group, or the packages that own a
/// debconf question or template.
struct Membered<'a> {
    before: &'a [u8],
    members: BTreeSet<&'a [u8]>,
    after: &'a [u8],
    separator: &'static [u8],
}

impl<'a> Membered<'a> {
    fn of(rule: FragmentRule, record: &'a [u8]) -> Option<Self> {
        let (start, end, separator): (_, _, &[u8]) = match rule {
            FragmentRule::Groups | FragmentRule::GroupShadow => {
                (record.iter().rposition(|b| *b == b':')? + 1, record.len(), b",")
            }
            FragmentRule::Stanzas if record.starts_with(b"Name: ") => {
                const OWNERS: &[u8] = b"\nOwners: ";
                let start = record.windows(OWNERS.len()).position(|w| w == OWNERS)? + OWNERS.len();
                let length = record[start..].iter().position(|b| *b == b'\n');
                (start, length.map_or(record.len(), |n| start + n), b", ")
            }
            _ => return None,
        };
        let members = record[start..end]
            .split(|b| *b == b',')
            .map(|m| m.trim_ascii())
            .filter(|m| !m.is_empty())
            .collect();
        Some(Self { before: &record[..start], members, after: &record[end..], separator })
    }

    fn render(&self) -> Vec<u8> {
        let members: Vec<&[u8]> = self.members.iter().copied().collect();
        [self.before, &members.join(self.separator), self.after].concat()
    }
}

/// Records in file order, each with its key, members sorted.
fn split(rule: FragmentRule, bytes: &[u8]) -> Result<Vec<Record>, FragmentError> {
    let lines = || {
        let whole = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        whole.split(|b| *b == b'\n').enumerate().map(|(i, line)| (i + 1, line))
    };
    let filled = || lines().filter(|(_, line)| !line.is_empty());
    let records: Vec<Record> = match rule {
        FragmentRule::Set => filled().map(|(_, l)| (l.to_vec(), l.to_vec())).collect(),
        FragmentRule::Triples => triples(filled())?,
        FragmentRule::Stanzas => lines()
            .map(|(_, line)| line)
            .collect::<Vec<_>>()
            .split(|line| line.is_empty())
            .filter(|stanza| !stanza.is_empty())
            .map(|stanza| (stanza[0].to_vec(), stanza.join(&b'\n')))
            .collect(),
        FragmentRule::Accounts | FragmentRule::Groups | FragmentRule::Lines | FragmentRule::GroupShadow => {
            filled().map(|(n, line)| colon_line(rule, n, line)).collect::<Result<_, _>>()?
        }
    };
    Ok(records
        .into_iter()
        .map(|(key, record)| match Membered::of(rule, &record) {
            Some(list) => {
                let normal = list.render();
                (key, normal)
            }
            None => (key, record),
        })
        .collect())
}

fn colon_line(rule: FragmentRule, line: usize, bytes: &[u8]) -> Result<Record, FragmentError> {
    let malformed = |reason| Err(FragmentError::Malformed { line, reason });
    let fields: Vec<&[u8]> = bytes.split(|b| *b == b':').collect();
    if fields[0].is_empty() || fields.len() < 2 {
        return malformed("no name before a ':'");
    }
    let (count, has_id) = match rule {
        FragmentRule::Accounts => (7, true),
        FragmentRule::Groups => (4, true),
        FragmentRule::GroupShadow => (4, false),
        _ => return Ok((fields[0].to_vec(), bytes.to_vec())),
    };
    if fields.len() != count {
        return malformed("wrong number of fields");
    }
    if has_id && id_of(rule, bytes).is_none() {
        return malformed("the third field is no id");
    }
    Ok((fields[0].to_vec(), bytes.to_vec()))
}

fn triples<'a>(lines: impl Iterator<Item = (usize, &'a [u8])>) -> Result<Vec<Record>, FragmentError> {
    let lines: Vec<_> = lines.collect();
    lines
        .chunks(3)
        .map(|triple| match triple {
            [(_, a), (_, b), (_, c)] => Ok((a.to_vec(), [*a, b, c].join(&b'\n'))),
            rest => Err(FragmentError::Malformed {
                line: rest.last().map_or(0, |(n, _)| *n),
                reason: "the last record has less than three lines",
            }),
        })
        .collect()
}

/// The numeric id of a `passwd` or `group` line.
fn id_of(rule: FragmentRule, record: &[u8]) -> Option<u32> {
    if !matches!(rule, FragmentRule::Accounts | FragmentRule::Groups) {
        return None;
    }
    let id = record.split(|b| *b == b':').nth(2)?;
    str::from_utf8(id).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

fn text(key: &[u8]) -> String {
    key.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use FragmentRule::*;

    /// Merges files as if each were a whole component: `(name, requires, file)`.
    fn unite(
        rule: FragmentRule,
        files: &[(&str, &[usize], &str)],
        ordered: bool,
    ) -> Result<String, MergeError> {
        let records: Vec<_> = files.iter().map(|f| parse(rule, f.2.as_bytes()).unwrap()).collect();
        let parts: Vec<_> = files
            .iter()
            .enumerate()
            .map(|(number, f)| Part { component: f.0, number, records: &records[number] })
            .collect();
        let overrides = |a: usize, b: usize| files[a].1.contains(&b);
        merge(rule, b"etc/file", &parts, &overrides, ordered).map(|b| String::from_utf8(b).unwrap())
    }

    #[test]
    fn two_programs_join_one_os() {
        let table: [(FragmentRule, &str, &str, &str, &str); 7] = [
            (
                Accounts,
                "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/x\n",
                "redis:x:120:120::/:/x\n",
                "postgres:x:90:90::/:/x\n",
                "root:x:0:0:root:/root:/bin/bash\npostgres:x:90:90::/:/x\nredis:x:120:120::/:/x\n\
                 nobody:x:65534:65534::/:/x\n",
            ),
            (
                Groups,
                "ssl-cert:x:104:x\n",
                "ssl-cert:x:104:b\n",
                "ssl-cert:x:104:a\n",
                "ssl-cert:x:104:a,b,x\n",
            ),
            (GroupShadow, "adm:*::\n", "adm:*::b,c\n", "adm:*::a\n", "adm:*::a,b,c\n"),
            (
                Lines,
                "root:*:1::::::\n",
                "redis:1:2\nredis:5:6\n",
                "a:!::\n",
                "a:!::\nredis:1:2\nredis:5:6\nroot:*:1::::::\n",
            ),
            (Set, "b x\na x\n", "c x\na x\n", "", "a x\nb x\nc x\n"),
            (Triples, "/b\n/b.d\np\n", "/a\n/a.d\nq\n", "", "/a\n/a.d\nq\n/b\n/b.d\np\n"),
            (
                Stanzas,
                "Package: b\nStatus: ok\n\nPackage: c\nDescription: x\n .\n y\n\n",
                "Name: q\nOwners: z, b\nFlags: seen\n",
                "\n\nName: q\nOwners: a\nFlags: seen\n\n\n",
                "Name: q\nOwners: a, b, z\nFlags: seen\n\nPackage: b\nStatus: ok\n\n\
                 Package: c\nDescription: x\n .\n y\n\n",
            ),
        ];
        for (rule, os, one, two, expected) in table {
            let forth = unite(rule, &[("os", &[], os), ("one", &[0], one), ("two", &[0], two)], false);
            assert_eq!(forth.as_deref(), Ok(expected), "{rule:?}");
            let back = unite(rule, &[("two", &[2], two), ("one", &[2], one), ("os", &[], os)], false);
            assert_eq!(back, forth, "{rule:?}: order must not matter");
            // What was merged comes apart into the same again.
            let again = unite(rule, &[("all", &[], expected)], false);
            assert_eq!(again.as_deref(), Ok(expected), "{rule:?}");
            assert_eq!(render(rule, &parse(rule, expected.as_bytes()).unwrap()), expected.as_bytes());
        }
    }

    #[test]
    fn what_a_program_adds_and_the_base_make_the_whole() {
        let table = [
            (Accounts, "root:x:0:0::/:/x\n", "root:x:0:0::/:/x\nredis:x:1:1::/:/x\n", "redis:x:1:1::/:/x"),
            (Groups, "adm:x:4:a,b\n", "adm:x:4:b,a,c\n", "adm:x:4:c"),
            (GroupShadow, "adm:*::\n", "adm:*::c\n", "adm:*::c"),
            (Groups, "adm:x:4:a\n", "adm:x:5:a\n", "adm:x:5:"),
            (Stanzas, "Package: a\nV: 1\n", "Package: a\nV: 2\n\n", "Package: a\nV: 2"),
            (Stanzas, "Name: a\nOwners: x\n", "Name: a\nOwners: x, y\n\n", "Name: a\nOwners: y"),
        ];
        for (rule, base, full, expected) in table {
            let base_records = parse(rule, base.as_bytes()).unwrap();
            let full_records = parse(rule, full.as_bytes()).unwrap();
            let added = difference(rule, &base_records, &full_records).unwrap();
            assert_eq!(added.len(), 1);
            assert_eq!(text(&added[0].1), text(expected.as_bytes()));
            let merged = unite(rule, &[("os", &[], base), ("program", &[0], expected)], false).unwrap();
            assert_eq!(parse(rule, merged.as_bytes()).unwrap(), full_records, "{rule:?} {merged}");
        }
    }

    #[test]
    fn removals_are_refused_by_name() {
        let of = |text: &str| parse(Groups, text.as_bytes()).unwrap();
        let base = of("adm:x:4:a,b\nsudo:x:27:\n");
        let gone = difference(Groups, &base, &of("adm:x:4:a,b\n")).unwrap_err();
        assert_eq!(gone, FragmentError::Removed { keys: vec!["sudo".into()] });
        let left = difference(Groups, &base, &of("adm:x:4:b\nsudo:x:27:\n")).unwrap_err();
        assert_eq!(left, FragmentError::MembersRemoved { key: "adm".into(), members: vec!["a".into()] });
    }

    #[test]
    fn conflicts_name_both_sides_unless_order_settles_them() {
        let a = ("redis", &[][..], "x:!:1\n");
        let b = ("nginx", &[][..], "x:!:2\n");
        let conflict = unite(Lines, &[a, b], false).unwrap_err().to_string();
        assert_eq!(conflict, "redis and nginx both claim 'x' in /etc/file, with different content");
        assert_eq!(unite(Lines, &[a, b], true).unwrap(), "x:!:2\n");
        assert_eq!(unite(Lines, &[b, a], true).unwrap(), "x:!:1\n");
        assert_eq!(unite(Lines, &[a, ("nginx", &[0], "x:!:2\n")], false).unwrap(), "x:!:2\n");
    }

    #[test]
    fn one_id_has_one_name() {
        let a = ("redis", &[][..], "redis:x:120:120::/:/x\n");
        let b = ("postgres", &[][..], "postgres:x:120:121::/:/x\n");
        let conflict = unite(Accounts, &[a, b], false).unwrap_err().to_string();
        assert_eq!(conflict, "/etc/file: postgres gives id 120 to 'postgres' and redis gives it to 'redis'");
        assert!(unite(Accounts, &[a, b], true).is_ok());
        let roots = "root:x:0:0::/:/x\ntoor:x:0:0::/:/x\n";
        assert!(unite(Accounts, &[("os", &[], roots)], false).is_ok());
        assert!(unite(Accounts, &[("os", &[], roots), ("p", &[0], "evil:x:0:0::/:/x\n")], false).is_err());
        // Nor does repeating `root` make an id of its own for another, in whatever order.
        let (os, evil) = ("root:x:0:0::/:/x\n", "evil:x:0:0::/:/x\nroot:x:0:0::/:/x\n");
        assert!(unite(Accounts, &[("os", &[], os), ("p", &[], evil)], false).is_err());
        assert!(unite(Accounts, &[("p", &[], evil), ("os", &[], os)], false).is_err());
        assert!(unite(Accounts, &[("os", &[], os), ("p", &[0], evil)], false).is_err());
    }

    #[test]
    fn malformed_files_say_which_line() {
        let table = [
            (Accounts, "root:x:0:0::/:/x\nbad\n", 2),
            (Accounts, "root:x:zero:0::/:/x\n", 1),
            (Accounts, "root:x:+1:0::/:/x\n", 1),
            (Accounts, "root:x:4294967296:0::/:/x\n", 1),
            (Groups, "adm:x:4\n", 1),
            (Lines, "\n\n:x\n", 3),
            (Triples, "a\nb\nc\nd\n", 4),
        ];
        for (rule, file, expected) in table {
            match parse(rule, file.as_bytes()) {
                Err(FragmentError::Malformed { line, .. }) => assert_eq!(line, expected, "{file}"),
                other => panic!("{file}: {other:?}"),
            }
        }
        for (rule, file) in [(Accounts, "a:x:1:1::/:/x\na:x:2:2::/:/x\n"), (Stanzas, "P: a\n\nP: a\nB\n")] {
            assert!(matches!(parse(rule, file.as_bytes()), Err(FragmentError::Duplicate { .. })));
        }
    }

    #[test]
    fn a_record_cannot_smuggle_another() {
        let table: [(FragmentRule, &str, &str); 6] = [
            (Lines, "redis", "redis:!:\nroot::1"),
            (Accounts, "redis", "root:x:0:0::/:/x"),
            (Accounts, "redis", "redis:x:1:1::/:/x\nroot::0:0::/:/x"),
            (Stanzas, "Package: a", "Package: a\n\nPackage: b"),
            (Triples, "/a", "/a\n/b"),
            (Set, "a", "a\nb"),
        ];
        for (rule, key, record) in table {
            let records = vec![(key.as_bytes().to_vec(), record.as_bytes().to_vec())];
            let part = Part { component: "stranger", number: 0, records: &records };
            let refused = merge(rule, b"etc/file", &[part], &|_, _| false, false);
            assert!(matches!(refused, Err(MergeError::BadRecord { .. })), "{record}");
        }
    }
}
