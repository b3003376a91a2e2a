//! Ids that `/etc/subuid` and `/etc/subgid` lend to this process's user: for building without root, and
//! for VMs that each run as a user of their own.

use std::fs;

/// Where ids are lent, for messages.
pub const FILES: [&str; 2] = ["/etc/subuid", "/etc/subgid"];

/// Ids in one row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ids {
    pub first: u32,
    pub count: u32,
}

impl Ids {
    /// The last one; there is at least one.
    pub fn last(self) -> u32 {
        self.first.saturating_add(self.count.saturating_sub(1))
    }

    pub fn contains(self, id: u32) -> bool {
        (self.first..=self.last()).contains(&id)
    }

    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last() && other.first <= self.last()
    }
}

/// The largest rows of user and of group ids that are lent to this user.
pub fn lent() -> [Option<Ids>; 2] {
    let (user, uid) = (user_name(), rustix::process::geteuid().as_raw());
    FILES.map(|file| largest(&fs::read_to_string(file).unwrap_or_default(), &user, uid))
}

/// All that is lent to anybody.
pub fn lent_to_all() -> Vec<Ids> {
    let texts = FILES.map(|file| fs::read_to_string(file).unwrap_or_default());
    texts.iter().flat_map(|text| text.lines()).filter_map(row).map(|(_, ids)| ids).collect()
}

/// Who this process is, in words: a name where there is one, else the number.
pub fn user() -> String {
    let name = user_name();
    if name.is_empty() { rustix::process::geteuid().as_raw().to_string() } else { name }
}

/// The program that is missing to make use of lent ids without root, if one is.
pub fn missing_tool() -> Option<&'static str> {
    ["newuidmap", "newgidmap"].into_iter().find(|tool| !on_path(tool))
}

fn on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(tool).is_file())
}

/// Empty if the user has no name.
fn user_name() -> String {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let line = users.lines().find(|l| l.split(':').nth(2) == Some(uid.as_str()));
    line.and_then(|l| l.split(':').next()).unwrap_or_default().to_owned()
}

/// A line `USER:FIRST:COUNT`, if it says anything.
fn row(line: &str) -> Option<(&str, Ids)> {
    let mut fields = line.split(':');
    let who = fields.next().filter(|w| !w.is_empty())?;
    let first = fields.next()?.trim().parse().ok()?;
    let count = fields.next()?.trim().parse().ok().filter(|count| *count > 0)?;
    Some((who, Ids { first, count }))
}

/// The largest row a file lends to a user, by name or number.
fn largest(text: &str, user: &str, uid: u32) -> Option<Ids> {
    let number = uid.to_string();
    let rows = text.lines().filter_map(row).filter(|(who, _)| *who == user || *who == number);
    rows.map(|(_, ids)| ids).max_by_key(|ids| ids.count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lent_ids_are_found_by_name_and_number() {
        let text = "other:100000:65536\nme:165536:65536\n1234:300000:9\n:1:70000\nme:x:y\nme:1:0\nbad\n";
        assert_eq!(largest(text, "me", 1), Some(Ids { first: 165_536, count: 65_536 }));
        assert_eq!(largest(text, "", 1234), Some(Ids { first: 300_000, count: 9 }));
        assert_eq!(largest(text, "nobody", 7), None);
    }

    #[test]
    fn rows_know_what_is_in_them() {
        let ids = Ids { first: 10, count: 5 };
        assert!(ids.contains(10) && ids.contains(14) && !ids.contains(15) && !ids.contains(9));
        let beside = [Ids { first: 15, count: 5 }, Ids { first: 0, count: 10 }];
        assert!(beside.into_iter().all(|other| !ids.overlaps(other) && !other.overlaps(ids)));
        assert!(ids.overlaps(Ids { first: 14, count: 100 }) && ids.overlaps(ids));
    }
}
