//! Sizes, times and rates for people.

use crate::clock::{Clock, SystemClock, UnixMillis};
use crate::interface::Resource;
use crate::types::ByteSize;

pub fn bytes(n: u64) -> String {
    ByteSize(n).to_string()
}

/// `free/total`.
pub fn resource(r: Resource, show: impl Fn(u64) -> String) -> String {
    format!("{}/{}", show(r.free), show(r.total))
}

pub fn seconds(s: f64) -> String {
    match s {
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 119.5 => format!("{s:.0} s"),
        // Rounded before it is taken apart: there is no minute of 60 s.
        s if s.round() < 7200.0 => {
            let s = s.round() as u64;
            format!("{} min {} s", s / 60, s % 60)
        }
        s => {
            let minutes = (s / 60.0).round() as u64;
            format!("{} h {} min", minutes / 60, minutes % 60)
        }
    }
}

pub fn millis(ms: u64) -> String {
    if ms < 1000 { format!("{ms} ms") } else { seconds(ms as f64 / 1000.0) }
}

/// How long ago, roughly.
pub fn ago(then: UnixMillis) -> String {
    if then.0 == 0 {
        return String::new();
    }
    let s = SystemClock.now().since(then).as_secs();
    match s {
        0..=1 => "now".into(),
        2..=119 => format!("{s} s ago"),
        120..=7199 => format!("{} min ago", s / 60),
        7200..=172_799 => format!("{} h ago", s / 3600),
        _ => format!("{} d ago", s / 86_400),
    }
}

/// `2026-11-21 07:19:51 UTC`.
pub fn utc(t: UnixMillis) -> String {
    t.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_people_expect() {
        assert_eq!(utc(UnixMillis(0)), "1970-01-01 00:00:00 UTC");
        assert_eq!(UnixMillis(1_700_000_000_042).rfc3339(), "2023-11-14T22:13:20.042Z");
        assert_eq!(utc(UnixMillis(951_782_400_000)), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(UnixMillis(1_700_000_000_000)), "2023-11-14 22:13:20 UTC");
        assert_eq!(utc(UnixMillis(4_107_542_399_000)), "2100-02-28 23:59:59 UTC");
        for (s, text) in [
            (0.04, "0.0 s"),
            (9.9, "9.9 s"),
            (42.4, "42 s"),
            (179.7, "3 min 0 s"),
            (200.0, "3 min 20 s"),
            (7199.7, "2 h 0 min"),
            (7260.0, "2 h 1 min"),
        ] {
            assert_eq!(seconds(s), text);
        }
    }
}
