//! Durations, rates and choices as people write them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::types::ByteSize;

/// A duration of whole units: `500ms`, `90s`, `10m`, `24h`, `7d`, or several: `1h30m`. At most 100 years.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HumanDuration(pub Duration);

/// Bytes per second. Reads `100Mbit` (powers of 1000, per second) and sizes such as `12M` (bytes
/// per second).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rate {
    pub bytes_per_s: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseValueError {
    #[error(
        "'{0}' is not a duration: write a number and a unit, such as \"90s\", \"10m\", \"24h\" or \"7d\""
    )]
    Duration(String),
    #[error(
        "'{0}' is not a rate: write bits such as \"100Mbit\" or bytes such as \"12M\", per second, not zero"
    )]
    Rate(String),
}

/// `host:port`, `host`, and an IPv6 address in brackets if a port follows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostPort {
    /// Without brackets.
    pub host: String,
    pub port: Option<u16>,
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = |reason: &str| Err(format!("'{}' {reason}", text.escape_default()));
        let port = |digits: &str| match digits.parse::<u16>() {
            Ok(port) if port > 0 && digits.bytes().all(|b| b.is_ascii_digit()) => Ok(Some(port)),
            _ => Err(format!("'{}' has no port from 1 to 65535 after its colon", text.escape_default())),
        };
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let Some((host, after)) = rest.split_once(']') else { return bad("lacks the closing bracket") };
            if host.parse::<Ipv6Addr>().is_err() {
                return bad("has no IPv6 address in its brackets");
            }
            match after.strip_prefix(':') {
                Some(digits) => (host, port(digits)?),
                None if after.is_empty() => (host, None),
                None => return bad("has something else than a port after its bracket"),
            }
        } else if text.parse::<Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((_, rest)) if rest.contains(':') => return bad("is no IPv6 address"),
                Some((host, digits)) => (host, port(digits)?),
                None => (text, None),
            }
        };
        match host.parse::<IpAddr>() {
            // What is listened at, or heard by many.
            Ok(ip) if ip.is_unspecified() || ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) => {
                return bad("is not the address of one host");
            }
            Err(_) if !is_host_name(host) => return bad("is no address and no name of a host"),
            _ => {}
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

/// The form that is looked up and dialled.
impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') && self.port.is_some() {
            true => write!(f, "[{}]", self.host)?,
            false => f.write_str(&self.host)?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// RFC 1123, with the underscore that many have. A last label of digits would be an IPv4 address, and is none.
fn is_host_name(text: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let name = text.strip_suffix('.').unwrap_or(text);
    let last = name.rsplit('.').next().unwrap_or_default();
    name.len() <= 253 && name.split('.').all(label) && !last.bytes().all(|b| b.is_ascii_digit())
}

/// An enum whose values are words; another word is refused with the list of possible ones.
macro_rules! words {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$vmeta:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($(#[$vmeta])* $variant,)+ }

        impl $name {
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word,)+ }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                match String::deserialize(d)?.as_str() {
                    $($word => Ok($name::$variant),)+
                    other => Err(serde::de::Error::unknown_variant(other, &[$($word),+])),
                }
            }
        }
    };
}
pub(super) use words;

const UNITS_MS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
const DURATION_MS_MAX: u64 = 100 * 366 * 86_400_000;
const BIT_UNITS: [(&str, u64); 4] =
    [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1000), ("bit", 1)];

impl HumanDuration {
    pub const fn from_secs(s: u64) -> Self {
        Self(Duration::from_secs(s))
    }
}

impl FromStr for HumanDuration {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseValueError::Duration(text.chars().take(40).collect());
        let mut rest = text.trim();
        let mut total_ms = 0u64;
        if rest.is_empty() {
            return Err(bad());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
            let n: u64 = rest[..digits].parse().map_err(|_| bad())?;
            rest = rest[digits..].trim_start();
            let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
            let unit = UNITS_MS.iter().find(|(name, _)| *name == &rest[..letters]).ok_or_else(bad)?;
            rest = rest[letters..].trim_start();
            total_ms = total_ms.saturating_add(n.saturating_mul(unit.1));
        }
        if total_ms > DURATION_MS_MAX {
            return Err(bad());
        }
        Ok(Self(Duration::from_millis(total_ms)))
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ms = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if ms == 0 {
            return f.write_str("0s");
        }
        for (unit, size) in UNITS_MS {
            if ms >= size {
                write!(f, "{}{unit}", ms / size)?;
                ms %= size;
            }
        }
        Ok(())
    }
}

impl FromStr for Rate {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseValueError::Rate(text.chars().take(40).collect());
        let lower = text.trim().to_ascii_lowercase();
        let plain = lower.strip_suffix("/s").unwrap_or(&lower).trim_end();
        let bytes_per_s = match BIT_UNITS.iter().find_map(|(u, n)| Some((plain.strip_suffix(u)?, n))) {
            Some((number, unit)) => {
                let n: u64 = number.trim_end().parse().map_err(|_| bad())?;
                n.checked_mul(*unit).ok_or_else(bad)? / 8
            }
            None => plain.parse::<ByteSize>().map_err(|_| bad())?.0,
        };
        if bytes_per_s == 0 { Err(bad()) } else { Ok(Self { bytes_per_s }) }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from(self.bytes_per_s) * 8;
        let unit = BIT_UNITS.iter().find(|(_, n)| bits.is_multiple_of(u128::from(*n)));
        let (name, n) = unit.unwrap_or(&BIT_UNITS[3]);
        write!(f, "{}{name}", bits / u128::from(*n))
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_and_show_themselves() {
        for (text, ms) in
            [("0s", 0), ("500ms", 500), ("90s", 90_000), ("1h30m", 5_400_000), (" 7d ", 604_800_000)]
        {
            let d: HumanDuration = text.parse().unwrap();
            assert_eq!(d.0.as_millis(), ms, "{text}");
            assert_eq!(d.to_string().parse::<HumanDuration>().unwrap(), d);
        }
        for bad in ["", "10", "h", "1x", "-1s", "1.5h", "99999999999d", "1 0s", "18446744073709551616s"] {
            assert!(bad.parse::<HumanDuration>().is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_whole_or_refused() {
        for (text, host, port) in [
            ("xmpp.example.org:5223", "xmpp.example.org", Some(5223)),
            ("192.0.2.1", "192.0.2.1", None),
            ("localhost:1", "localhost", Some(1)),
            ("2001:db8::1", "2001:db8::1", None),
            ("::1", "::1", None),
            ("[::1]", "::1", None),
            ("[2001:db8::1]:7420", "2001:db8::1", Some(7420)),
        ] {
            let read: HostPort = text.parse().unwrap();
            assert_eq!((read.host.as_str(), read.port), (host, port), "{text}");
            assert_eq!(read.to_string().parse::<HostPort>().unwrap(), read, "{text}");
        }
        for bad in [
            "",
            ":5223",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a:x",
            "[::1",
            "[::1]5223",
            "[::1]:",
            "[a]:1",
            "::1:x:5223",
            "192.0.2.1.9",
            "192.0.2.256",
            "-a.example",
            "a..b",
            "a b",
            "[192.0.2.1]:1",
            "0.0.0.0:7420",
            "[::]:7420",
            "224.0.0.1",
            "255.255.255.255:1",
            "ff02::1",
        ] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_read_bits_and_bytes() {
        for (text, n) in [
            ("100Mbit", 12_500_000),
            ("10 Mbit/s", 1_250_000),
            ("12M", 12 << 20),
            ("8bit", 1),
            ("1000", 1000),
        ] {
            let r: Rate = text.parse().unwrap();
            assert_eq!(r.bytes_per_s, n, "{text}");
            assert_eq!(r.to_string().parse::<Rate>().unwrap(), r);
        }
        for bad in ["", "0", "7bit", "fast", "-5M", "99999999999999999999Gbit"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }
}
