//! Byte sizes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes. Reads `256M`, `2GiB`, `1048576`; units are powers of 1024, at most 2^60 bytes.
/// Shows itself in the largest unit that fits. In JSON it is a plain number; in TOML text or number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size: write bytes, or a number with K, M, G or T, at most 1024P")]
pub struct ParseSizeError(pub String);

impl ByteSize {
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
    pub const fn bytes(self) -> u64 {
        self.0
    }
    /// Whole MiB, rounded up.
    pub const fn mib_ceil(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut unit = 0;
        // As it is shown, so that rounding makes no 1024 of one unit, and no "10.0".
        let shown = |unit: usize| match unit {
            0 => self.0 as f64,
            _ => (self.0 as f64 / 1024f64.powi(unit as i32) * 10.0).round() / 10.0,
        };
        while shown(unit) >= 1024.0 && unit < UNITS.len() - 1 {
            unit += 1;
        }
        let value = shown(unit);
        let text = if value.fract() == 0.0 {
            format!("{value:.0} {}", UNITS[unit])
        } else {
            format!("{value:.1} {}", UNITS[unit])
        };
        f.pad(&text)
    }
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let err = || ParseSizeError(s.chars().take(40).collect());
        let t = s.trim();
        let digits = t.find(|c: char| !c.is_ascii_digit()).unwrap_or(t.len());
        let n: u64 = t[..digits].parse().map_err(|_| err())?;
        let shift = match t[digits..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(err()),
        };
        if n > (1u64 << 60) >> shift {
            return Err(err());
        }
        Ok(Self(n << shift))
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl serde::de::Visitor<'_> for V {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"256M\" or a number of bytes")
            }
            fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(n))
            }
            fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<ByteSize, E> {
                u64::try_from(n).map(ByteSize).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: serde::de::Error>(self, s: &str) -> Result<ByteSize, E> {
                s.parse().map_err(E::custom)
            }
        }
        d.deserialize_any(V)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, n) in
            [("0", 0), ("256M", 256 << 20), ("2GiB", 2 << 30), ("1 k", 1024), ("1048576T", 1 << 60)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(n)), "{text}");
        }
        for bad in ["", "M", "-1", "1.5G", "1X", "1048577T", "99999999999999999999"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteSize(1 << 20).to_string(), "1 MiB");
    }

    #[test]
    fn is_shown_as_it_is_rounded() {
        for (n, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            ((1 << 20) - 1, "1 MiB"),
            ((1 << 20) - 60, "1023.9 KiB"),
            ((10 << 20) - 1, "10 MiB"),
            ((1 << 30) - 1, "1 GiB"),
            ((3 << 30) + (1 << 28), "3.3 GiB"),
        ] {
            assert_eq!(ByteSize(n).to_string(), text, "{n}");
        }
    }
}
