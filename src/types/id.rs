//! Names and ids of things that are not content.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::text::{self, PeerText};

/// A name or id that breaks the rules of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a valid {kind}: {rule}")]
pub struct ParseIdError {
    pub kind: &'static str,
    /// What was read, as it may be printed.
    pub text: PeerText,
    pub rule: &'static str,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A fresh random id.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
            /// The first eight hex digits, for people.
            pub fn short(&self) -> String {
                self.0.simple().to_string()[..8].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(s).map(Self).map_err(|_| ParseIdError {
                    kind: $kind,
                    text: s.into(),
                    rule: "a UUID is expected",
                })
            }
        }
    };
}

uuid_id!(
    /// A VM's UUID: the same in every cloud it ever runs in.
    VmId,
    "VM id"
);
uuid_id!(
    /// One attempt to move one VM.
    MigrationId,
    "migration id"
);
uuid_id!(
    /// A reservation at a target, while it lasts. Random: one that has ended never comes again.
    ReservationId,
    "reservation id"
);

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        ///
        /// 1 to 63 characters of `a-z 0-9 . _ -`, beginning with a letter or digit.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                if is_name(s) {
                    Ok(Self(s.to_owned()))
                } else {
                    Err(ParseIdError {
                        kind: $kind,
                        text: s.into(),
                        rule: "1 to 63 characters of a-z 0-9 . _ - beginning with a letter or digit",
                    })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(s: String) -> Result<Self, Self::Error> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(n: $name) -> String {
                n.0
            }
        }
    };
}

fn is_name(s: &str) -> bool {
    (1..=63).contains(&s.len())
        && s.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
        && s.as_bytes()[0].is_ascii_alphanumeric()
}

name_type!(
    /// A cloud's name in its federation; also its nick in the room.
    CloudName,
    "cloud name"
);
name_type!(
    /// A VM's name, unique within one cloud.
    VmName,
    "VM name"
);

impl VmName {
    /// What a VM is called here whose name is not known.
    pub fn unknown(vm: VmId) -> Self {
        Self(format!("unknown-{}", vm.short()))
    }
}

/// The bare JID of a member's account, `local@domain`, the identity an XMPP server vouches for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemberJid(String);

impl MemberJid {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MemberJid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for MemberJid {
    type Err = ParseIdError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let err = || ParseIdError {
            kind: "member address",
            text: s.into(),
            rule: "a bare JID 'name@domain' is expected",
        };
        // The parser normalises case, so equal addresses compare equal.
        let jid = xmpp_parsers::jid::BareJid::new(s).map_err(|_| err())?;
        // Its rules are of Unicode 3.2, and know not all that is invisible.
        if jid.node().is_none() || !jid.as_str().chars().all(text::is_plain) {
            return Err(err());
        }
        Ok(Self(jid.to_string()))
    }
}

impl TryFrom<String> for MemberJid {
    type Error = ParseIdError;
    fn try_from(s: String) -> Result<Self, Self::Error> {
        s.parse()
    }
}

impl From<MemberJid> for String {
    fn from(j: MemberJid) -> String {
        j.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_plain() {
        for good in ["a", "web-1", "cloud.a_b", &"a".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "A", "a b", "a/b", "é", &"a".repeat(64)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn member_addresses_are_bare_and_normal() {
        assert_eq!("A@Example.org".parse::<MemberJid>().unwrap().as_str(), "a@example.org");
        for bad in ["", "example.org", "a@b/res", "@b"] {
            assert!(bad.parse::<MemberJid>().is_err(), "{bad}");
        }
    }
}
