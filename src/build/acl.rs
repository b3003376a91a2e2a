//! POSIX ACLs have two forms: the one programs read and write (version 2, eight bytes an entry) and
//! the one ext4 stores (version 1, four bytes, eight where a user or group is named). Manifests hold
//! the stored form; `getxattr` on a file system that stored the other fails.
//! Sources: `linux/posix_acl_xattr.h`, `fs/ext4/acl.h`.

const PROGRAM_VERSION: u32 = 2;
const DISK_VERSION: u32 = 1;
const TAG_USER: u16 = 0x02;
const TAG_GROUP: u16 = 0x08;
const UNDEFINED_ID: u32 = u32::MAX;

pub fn is_acl(name: &str) -> bool {
    matches!(name, "system.posix_acl_access" | "system.posix_acl_default")
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
}
