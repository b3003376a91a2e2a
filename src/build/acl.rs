//! POSIX ACLs have two forms: the one programs read and write (version 2, eight bytes an entry) and
//! the one ext4 stores (version 1, four bytes, eight where a user or group is named). Manifests hold
//! the stored form; `getxattr` on a file system that stored the other fails.
//! Sources: `linux/posix_acl_xattr.h`, `fs/ext4/acl.h`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub const ACCESS: &str = "system.posix_acl_access";
pub const DEFAULT: &str = "system.posix_acl_default";

const PROGRAM_VERSION: u32 = 2;
const DISK_VERSION: u32 = 1;
const TAG_OWNER: u16 = 0x01;
const TAG_USER: u16 = 0x02;
const TAG_OWNING_GROUP: u16 = 0x04;
const TAG_GROUP: u16 = 0x08;
const TAG_MASK: u16 = 0x10;
const TAG_OTHER: u16 = 0x20;
const UNDEFINED_ID: u32 = u32::MAX;

pub fn is_acl(name: &str) -> bool {
    matches!(name, ACCESS | DEFAULT)
}

/// The stored form of a value that `getxattr` gave; `None` if it is no ACL.
pub fn to_disk(value: &[u8]) -> Option<Vec<u8>> {
    let entries = value.strip_prefix(&PROGRAM_VERSION.to_le_bytes())?.chunks_exact(8);
    if !entries.remainder().is_empty() {
        return None;
    }
    let mut out = DISK_VERSION.to_le_bytes().to_vec();
    for e in entries {
        out.extend_from_slice(&e[..4]);
        if names_somebody(e) {
            out.extend_from_slice(&e[4..]);
        }
    }
    Some(out)
}

/// The form `setxattr` takes; `None` if the stored value is no ACL.
pub fn from_disk(value: &[u8]) -> Option<Vec<u8>> {
    let mut rest = value.strip_prefix(&DISK_VERSION.to_le_bytes())?;
    let mut out = PROGRAM_VERSION.to_le_bytes().to_vec();
    while !rest.is_empty() {
        let (head, after) = rest.split_at_checked(4)?;
        out.extend_from_slice(head);
        if names_somebody(head) {
            let (id, after) = after.split_at_checked(4)?;
            out.extend_from_slice(id);
            rest = after;
        } else {
            out.extend_from_slice(&UNDEFINED_ID.to_le_bytes());
            rest = after;
        }
    }
    Some(out)
}

/// Ids by name; several where account files disagree.
type Ids = HashMap<Vec<u8>, BTreeSet<u32>>;

/// Ids of users and groups by their names, of which ACLs in archives may have nothing else.
#[derive(Clone, Default, Debug)]
pub struct Names {
    pub users: NameIds,
    pub groups: NameIds,
}

#[derive(Clone, Default, Debug)]
pub struct NameIds {
    /// As the archive's headers pair them: those of the machine it was packed on, as the ACLs' are.
    packed: Ids,
    /// As account files say which that machine may have had.
    known: Ids,
}

impl NameIds {
    /// Takes up a name and an id of one header.
    pub fn add_packed(&mut self, name: &[u8], id: u32) {
        if !name.is_empty() && !self.packed.get(name).is_some_and(|ids| ids.contains(&id)) {
            self.packed.entry(name.to_vec()).or_default().insert(id);
        }
    }

    fn id_of(&self, name: &[u8]) -> Option<u32> {
        let ids = self.packed.get(name).or_else(|| self.known.get(name))?;
        // Where they disagree, any choice could give somebody else the right.
        ids.first().copied().filter(|_| ids.len() == 1)
    }
}

/// Adds what a file in the form of `passwd` or `group` says.
pub fn add_names(of: &mut NameIds, content: &[u8]) {
    for line in content.split(|b| *b == b'\n') {
        let mut fields = line.split(|b| *b == b':');
        if let (Some(name), _, Some(id)) = (fields.next(), fields.next(), fields.next())
            && let Some(id) = number(id)
        {
            of.known.entry(name.to_vec()).or_default().insert(id);
        }
    }
}

/// A whole ACL: one entry for the owner, the group and all others, and a mask where somebody is named.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Acl {
    /// Permissions by tag and id, in the order file systems keep them.
    entries: BTreeMap<(u16, u32), u16>,
}

impl Acl {
    fn new(entries: BTreeMap<(u16, u32), u16>) -> Option<Self> {
        let has = |tag| entries.contains_key(&(tag, UNDEFINED_ID));
        let is_extended = entries.keys().any(|(tag, _)| matches!(*tag, TAG_USER | TAG_GROUP));
        let is_whole = has(TAG_OWNER) && has(TAG_OWNING_GROUP) && has(TAG_OTHER);
        (is_whole && (has(TAG_MASK) || !is_extended)).then_some(Self { entries })
    }

    /// Of the stored form.
    pub fn of_disk(value: &[u8]) -> Option<Self> {
        let program = from_disk(value)?;
        let mut entries = BTreeMap::new();
        for e in program[4..].chunks_exact(8) {
            let tag = u16::from_le_bytes([e[0], e[1]]);
            let permissions = u16::from_le_bytes([e[2], e[3]]);
            let id = u32::from_le_bytes([e[4], e[5], e[6], e[7]]);
            let is_known =
                matches!(tag, TAG_OWNER | TAG_USER | TAG_OWNING_GROUP | TAG_GROUP | TAG_MASK | TAG_OTHER);
            if !is_known || permissions > 7 || entries.insert((tag, id), permissions).is_some() {
                return None;
            }
        }
        Self::new(entries)
    }

    pub fn to_disk(&self) -> Vec<u8> {
        let mut out = DISK_VERSION.to_le_bytes().to_vec();
        for ((tag, id), permissions) in &self.entries {
            out.extend_from_slice(&tag.to_le_bytes());
            out.extend_from_slice(&permissions.to_le_bytes());
            if matches!(*tag, TAG_USER | TAG_GROUP) {
                out.extend_from_slice(&id.to_le_bytes());
            }
        }
        out
    }

    /// Whether a mode says as much.
    pub fn is_minimal(&self) -> bool {
        self.entries.len() == 3
    }

    /// The permission bits that go with it; those of the group are the mask's.
    pub fn mode(&self) -> u16 {
        let of = |tag| self.entries.get(&(tag, UNDEFINED_ID)).copied();
        let bits = |tag| of(tag).unwrap_or_default();
        bits(TAG_OWNER) << 6 | of(TAG_MASK).unwrap_or(bits(TAG_OWNING_GROUP)) << 3 | bits(TAG_OTHER)
    }
}

/// Reads the text form that tars hold: entries such as `user:redis:rw-`, with an id behind it or instead
/// of the name, by comma or line. `None` for an empty one.
pub fn of_text(text: &[u8], names: &Names) -> Result<Option<Acl>, String> {
    let mut entries = BTreeMap::new();
    for entry in text.split(|b| matches!(b, b',' | b'\n' | 0)) {
        // A comment says what the mask leaves of it.
        let entry = entry.split(|b| *b == b'#').next().unwrap_or_default().trim_ascii();
        if entry.is_empty() {
            continue;
        }
        let bad = || format!("'{}' is no entry of an ACL", entry.escape_ascii());
        let mut fields: Vec<&[u8]> = entry.split(|b| *b == b':').map(<[u8]>::trim_ascii).collect();
        if matches!(fields[0], b"default" | b"d") {
            fields.remove(0);
        }
        // `mask:rwx` and `other:r--` may lack the empty name.
        if fields.len() == 2 && matches!(fields[0], b"mask" | b"m" | b"other" | b"o") {
            fields.insert(1, b"");
        }
        let (3 | 4, [kind, name, permissions, id @ ..]) = (fields.len(), &fields[..]) else {
            return Err(bad());
        };
        let permissions = permission_bits(permissions).ok_or_else(bad)?;
        let named = |known: &NameIds, what: &str| {
            let id = id.first().and_then(|id| number(id)).or_else(|| number(name));
            let id = id.or_else(|| known.id_of(name)).or((*name == b"root").then_some(0));
            id.filter(|id| *id != UNDEFINED_ID).ok_or_else(|| {
                format!(
                    "it names the {what} '{}', whose id the archive, what it requires and this machine do not \
                     say, or not alike: make the archive with bsdtar, which writes ids too, or import the \
                     directory itself",
                    name.escape_ascii()
                )
            })
        };
        let key = match (*kind, name.is_empty()) {
            (b"user" | b"u", true) => (TAG_OWNER, UNDEFINED_ID),
            (b"user" | b"u", false) => (TAG_USER, named(&names.users, "user")?),
            (b"group" | b"g", true) => (TAG_OWNING_GROUP, UNDEFINED_ID),
            (b"group" | b"g", false) => (TAG_GROUP, named(&names.groups, "group")?),
            (b"mask" | b"m", true) => (TAG_MASK, UNDEFINED_ID),
            (b"other" | b"o", true) => (TAG_OTHER, UNDEFINED_ID),
            _ => return Err(bad()),
        };
        if entries.insert(key, permissions).is_some() {
            return Err(format!("'{}' is in it twice", entry.escape_ascii()));
        }
    }
    if entries.is_empty() {
        return Ok(None);
    }
    Acl::new(entries)
        .map(Some)
        .ok_or_else(|| "it lacks the owner, the group, all others or the mask".to_owned())
}

/// `rwx` with `-` for what is not there, or the digit.
fn permission_bits(text: &[u8]) -> Option<u16> {
    if let [digit @ b'0'..=b'7'] = text {
        return Some(u16::from(digit - b'0'));
    }
    let mut bits = 0;
    for byte in text {
        bits |= match byte {
            b'r' => 4,
            b'w' => 2,
            b'x' => 1,
            b'-' => 0,
            _ => return None,
        };
    }
    (!text.is_empty() && text.len() <= 3).then_some(bits)
}

fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

fn names_somebody(entry: &[u8]) -> bool {
    matches!(u16::from_le_bytes([entry[0], entry[1]]), TAG_USER | TAG_GROUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_convert_into_each_other() {
        let entry = |tag: u16, permission: u16, id: u32| {
            [tag.to_le_bytes(), permission.to_le_bytes()]
                .concat()
                .into_iter()
                .chain(id.to_le_bytes())
                .collect::<Vec<_>>()
        };
        let program = [
            2u32.to_le_bytes().to_vec(),
            entry(0x01, 7, UNDEFINED_ID),
            entry(0x08, 5, 4),
            entry(0x10, 5, UNDEFINED_ID),
        ]
        .concat();
        let disk = to_disk(&program).unwrap();
        assert_eq!(disk, [1, 0, 0, 0, 1, 0, 7, 0, 8, 0, 5, 0, 4, 0, 0, 0, 16, 0, 5, 0]);
        assert_eq!(from_disk(&disk).unwrap(), program);
        for broken in [&program[..7], &disk[..], b"", &program[..program.len() - 1]] {
            assert!(to_disk(broken).is_none());
        }
        assert!(from_disk(&disk[..18]).is_none());
    }

    #[test]
    fn the_text_form_gives_what_the_kernel_would_store() {
        let mut names = Names::default();
        add_names(&mut names.users, b"root:x:0:0::/:/bin/sh\nredis:x:110:1::/:/x\nbroken\n");
        add_names(&mut names.groups, b"adm:x:4:me\n");
        let acl = |text: &[u8]| of_text(text, &names).map(|a| a.unwrap());
        let tar = acl(
            b"user::rwx\nuser:redis:r--\ngroup::r-x\ngroup:adm:rwx\t#effective:r-x\nmask::r-x\nother::---\n",
        );
        let star = acl(b"user::rwx,user:whoever:r--:110,group::r-x,group:4:rwx,mask:r-x,other:---");
        let tar = tar.unwrap();
        assert_eq!(tar, star.unwrap());
        assert_eq!(tar.mode(), 0o750);
        assert!(!tar.is_minimal());
        let disk = tar.to_disk();
        assert_eq!(disk[4..8], [1, 0, 7, 0]);
        assert_eq!(disk[8..16], [2, 0, 4, 0, 110, 0, 0, 0]);
        assert_eq!(Acl::of_disk(&disk).unwrap(), tar);
        assert!(acl(b"user::rw-,group::r--,other::r--").unwrap().is_minimal());
        assert!(of_text(b"\n", &names).unwrap().is_none());
        for bad in [
            &b"user::rwx"[..],
            b"user::rwx,user:5:r--,group::r-x,other::---",
            b"user::rwx,user:5:r--,user:5:r--,group::r-x,mask::rwx,other::---",
            b"user::rwz,group::r-x,other::---",
            b"user:4294967295:rwx,user::rwx,group::r-x,mask::rwx,other::---",
            b"\xff:::",
            b":",
        ] {
            assert!(of_text(bad, &names).is_err(), "{}", bad.escape_ascii());
        }
        let unknown = of_text(b"user::rwx,user:nobody-here:r--,group::r-x,mask::rwx,other::---", &names);
        assert!(unknown.unwrap_err().contains("bsdtar"));
        add_names(&mut names.users, b"redis:x:111:1::/:/x\n");
        let text = b"user::rwx,user:redis:r--,group::r-x,mask::rwx,other::---";
        assert!(of_text(text, &names).is_err(), "two account files disagree");
        names.users.add_packed(b"redis", 111);
        assert_eq!(of_text(text, &names).unwrap().unwrap().to_disk()[12..16], [111, 0, 0, 0]);
    }
}
