//! Level 0: time. Policy and protocol code gets the time from here, so tests and the simulation
//! can turn the clock by hand.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(d.as_millis() as u64))
    }
    /// Time since `earlier`, zero if it lies in the future.
    pub fn since(self, earlier: UnixMillis) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl UnixMillis {
    /// RFC 3339, for programs: `2026-11-21T07:19:51.042Z`.
    pub fn rfc3339(self) -> String {
        let (date, time) = (civil(self.0 / 86_400_000), self.0 / 1000);
        let (h, m, s, ms) = (time / 3600 % 24, time / 60 % 60, time % 60, self.0 % 1000);
        format!("{:04}-{:02}-{:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z", date.0, date.1, date.2)
    }
}

/// Moments as programs read them in what this cloud tells of itself: RFC 3339, `null` where there is none. What
/// earlier releases wrote, milliseconds, is read as well.
pub mod rfc3339 {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::UnixMillis;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(String),
        Millis(u64),
    }

    pub fn serialize<S: Serializer>(t: &UnixMillis, s: S) -> Result<S::Ok, S::Error> {
        (t.0 > 0).then(|| t.rfc3339()).serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<UnixMillis, D::Error> {
        match Option::<Form>::deserialize(d)? {
            None => Ok(UnixMillis(0)),
            Some(Form::Millis(ms)) => Ok(UnixMillis(ms)),
            Some(Form::Text(text)) => super::from_rfc3339(&text).ok_or_else(|| {
                serde::de::Error::custom("a moment such as 2026-11-21T07:19:51.042Z is expected")
            }),
        }
    }
}

/// A moment as [`UnixMillis::rfc3339`] writes it.
fn from_rfc3339(text: &str) -> Option<UnixMillis> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let number = |s: &str, digits: usize| match s.len() == digits && s.bytes().all(|b| b.is_ascii_digit()) {
        true => s.parse::<u64>().ok(),
        false => None,
    };
    let mut date = date.split('-');
    let (year, month, day) = (number(date.next()?, 4)?, number(date.next()?, 2)?, number(date.next()?, 2)?);
    let mut time = time.split([':', '.']);
    let mut next = |digits| number(time.next()?, digits);
    let (h, m, s, ms) = (next(2)?, next(2)?, next(2)?, next(3)?);
    // The day is found by what `civil` says of it: one way of counting is enough.
    let near = year.checked_sub(1970)? * 365 + (month.checked_sub(1)?) * 28;
    let days = near..near + 31 * 12 + (year - 1970) / 4 + 62;
    let day = days.into_iter().find(|d| civil(*d) == (year, month, day))?;
    (h < 24 && m < 60 && s < 60).then_some(UnixMillis(((day * 24 + h) * 60 + m) * 60_000 + s * 1000 + ms))
}

/// `2026-11-21 07:19:51 UTC`.
impl fmt::Display for UnixMillis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0 / 1000;
        let (year, month, day) = civil(s / 86_400);
        let (h, m, s) = (s / 3600 % 24, s / 60 % 60, s % 60);
        write!(f, "{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02} UTC")
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar: years are
/// taken from March on, in eras of 400 of them (146,097 days).
fn civil(day: u64) -> (u64, u64, u64) {
    let shifted = day + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

pub trait Clock: Send + Sync {
    fn now(&self) -> UnixMillis;
}

/// The machine's own clock.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> UnixMillis {
        let d = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        UnixMillis(d.as_millis() as u64)
    }
}

/// A clock that moves only when told.
#[derive(Debug, Default, Clone)]
pub struct ManualClock(Arc<AtomicU64>);

impl ManualClock {
    pub fn new(start: UnixMillis) -> Self {
        Self(Arc::new(AtomicU64::new(start.0)))
    }
    pub fn advance(&self, d: Duration) {
        self.0.fetch_add(d.as_millis() as u64, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Seen(#[serde(with = "rfc3339")] UnixMillis);

    #[test]
    fn a_moment_is_text_and_read_again() {
        for ms in [1, 951_782_400_000, 1_700_000_000_042, 4_107_542_399_999, 253_402_300_799_999] {
            let text = serde_json::to_value(Seen(UnixMillis(ms))).unwrap();
            assert!(text.as_str().is_some_and(|t| t.ends_with('Z')), "{text}");
            assert_eq!(serde_json::from_value::<Seen>(text).unwrap(), Seen(UnixMillis(ms)));
            assert_eq!(serde_json::from_value::<Seen>(ms.into()).unwrap(), Seen(UnixMillis(ms)));
        }
        for day in (0..60_000).step_by(7) {
            let t = UnixMillis(day * 86_400_000 + 1);
            assert_eq!(from_rfc3339(&t.rfc3339()), Some(t));
        }
        assert_eq!(serde_json::to_value(Seen(UnixMillis(0))).unwrap(), serde_json::Value::Null);
        for bad in [
            "",
            "2026-02-30T00:00:00.000Z",
            "2026-11-21 07:19:51",
            "2026-11-21T24:00:00.000Z",
            "1969-01-01T00:00:00.000Z",
            "2026-00-01T00:00:00.000Z",
        ] {
            assert_eq!(from_rfc3339(bad), None, "{bad}");
        }
    }
}
