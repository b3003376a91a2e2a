//! `<cloud/>`: what a cloud says of itself in the room. Compact, since every member receives it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use xmpp_parsers::presence::PresencePayload;
use xso::{AsXml, FromXml};

use crate::types::PeerText;
use crate::types::Succession;
use crate::types::codec::{Reader, Writer};
use crate::types::succession::SUCCESSION_BYTES;

use super::ns;

/// Limits of what is taken from a stranger's presence.
pub mod limit {
    pub const TEXT_BYTES: usize = 256;
    pub const FEATURES: usize = 64;
    /// The newest ones; who missed more is told the new key by its operator.
    pub const SUCCESSIONS: usize = 8;
    pub const LOAD_PERCENT: u32 = 100;
    /// Of carbon intensity and price.
    pub const RATE: f32 = 1e6;
}

#[derive(FromXml, AsXml, Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[xml(namespace = ns::CLOUD, name = "cloud")]
pub struct Cloud {
    /// The cloud's name in the federation.
    #[xml(attribute)]
    pub name: PeerText,
    /// Public identity key, base64 of 32 bytes.
    #[xml(attribute)]
    pub key: PeerText,
    /// Negotiation versions spoken, comma-separated, newest first.
    #[xml(attribute)]
    pub versions: PeerText,
    #[xml(attribute(default))]
    pub software: Option<PeerText>,
    #[xml(attribute(default))]
    pub region: Option<PeerText>,
    /// `on`, `saving` or `off`.
    #[xml(attribute)]
    pub power: PeerText,
    /// Load of the hosts in percent of what may be given to VMs.
    #[xml(attribute(default))]
    pub load: Option<u32>,
    /// Carbon intensity, gCO2e per kWh.
    #[xml(attribute(default))]
    pub carbon: Option<f32>,
    /// Price of a CPU hour, in the federation's unit.
    #[xml(attribute(default))]
    pub price: Option<f32>,
    #[xml(child(default))]
    pub capacity: Option<Capacity>,
    #[xml(extract(n = .., name = "feature", fields(text(type_ = PeerText))))]
    pub features: Vec<PeerText>,
    /// How earlier keys gave way to this one: base64 of canonical successions, the newest last.
    #[xml(extract(n = .., name = "succession", fields(text(type_ = String))))]
    pub successions: Vec<String>,
}

impl PresencePayload for Cloud {}

/// What VMs may use in all, and what of it is free.
#[derive(FromXml, AsXml, Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[xml(namespace = ns::CLOUD, name = "capacity")]
pub struct Capacity {
    #[xml(attribute)]
    pub cpus: u64,
    #[xml(attribute(name = "cpus-free"))]
    pub cpus_free: u64,
    /// Bytes.
    #[xml(attribute)]
    pub memory: u64,
    #[xml(attribute(name = "memory-free"))]
    pub memory_free: u64,
    #[xml(attribute)]
    pub storage: u64,
    #[xml(attribute(name = "storage-free"))]
    pub storage_free: u64,
}

/// Of one in base64.
const SUCCESSION_DIGITS: usize = SUCCESSION_BYTES.div_ceil(3) * 4;

impl Cloud {
    /// With these successions, the newest last; of more than are allowed the newest are taken.
    pub fn with_successions(mut self, all: impl IntoIterator<Item = Succession>) -> Self {
        let text = |s: Succession| {
            let mut w = Writer::new();
            s.encode(&mut w);
            BASE64.encode(w.into_bytes())
        };
        self.successions = all.into_iter().map(text).collect();
        self.successions.drain(..self.successions.len().saturating_sub(limit::SUCCESSIONS));
        self
    }

    /// Those of its successions that can be read. Nothing is verified.
    pub fn successions(&self) -> Vec<Succession> {
        let read = |text: &String| {
            let bytes = BASE64.decode(text).ok()?;
            let mut r = Reader::new(&bytes);
            let succession = Succession::decode(&mut r).ok()?;
            r.end().ok().map(|()| succession)
        };
        self.successions.iter().take(limit::SUCCESSIONS).filter_map(read).collect()
    }

    /// Whether texts, counts and numbers keep within what `PROTOCOL.md` allows. What is not bounded
    /// is not looked at.
    pub fn is_bounded(&self) -> bool {
        let texts = [&self.name, &self.key, &self.versions, &self.power];
        let optional = [&self.software, &self.region].into_iter().flatten();
        texts.into_iter().chain(optional).chain(&self.features).all(|t| t.len() <= limit::TEXT_BYTES)
            && self.features.len() <= limit::FEATURES
            && self.successions.len() <= limit::SUCCESSIONS
            && self.successions.iter().all(|s| s.len() == SUCCESSION_DIGITS)
            && self.load.is_none_or(|l| l <= limit::LOAD_PERCENT)
            && [self.carbon, self.price].into_iter().flatten().all(|n| (0.0..=limit::RATE).contains(&n))
            && self.capacity.is_none_or(|c| c.is_possible())
    }
}

impl Capacity {
    /// No more is free than there is.
    fn is_possible(&self) -> bool {
        self.cpus_free <= self.cpus && self.memory_free <= self.memory && self.storage_free <= self.storage
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::minidom::Element;

    const TEXT: &str = "<cloud xmlns='urn:cicada:cloud:1' name='alpine' key='AAAA' versions='1' power='on' \
         load='7' later='x'>\
         <capacity cpus='4' cpus-free='3' memory='1024' memory-free='512' storage='9' storage-free='8'/>\
         <feature>tcg</feature><feature>network:lan</feature><later xmlns='urn:x'/></cloud>";

    fn parse(text: &str) -> Option<Cloud> {
        Cloud::try_from(text.parse::<Element>().unwrap()).ok()
    }

    #[test]
    fn reads_what_it_writes_and_ignores_what_it_does_not_know() {
        let cloud = parse(TEXT).unwrap();
        assert_eq!((cloud.load, cloud.carbon), (Some(7), None));
        assert_eq!(cloud.capacity.unwrap().memory_free, 512);
        assert_eq!(cloud.features, ["tcg", "network:lan"]);
        assert!(cloud.is_bounded());
        assert_eq!(Cloud::try_from(Element::from(cloud.clone())).unwrap(), cloud);
    }

    /// Every attribute and every text of the payload, in turn.
    #[test]
    fn no_text_of_a_presence_acts_or_hides() {
        let whole = TEXT.replace(" load", " software='s' region='r' load");
        let mut places = 0;
        for (i, (at, _)) in whole.match_indices(['\'', '>']).enumerate() {
            let Some(hostile) = whole.get(..at + 1).zip(whole.get(at + 1..)) else { continue };
            let hostile = format!("{}&#x9b;2J\u{202e}&#x85;b yes{}", hostile.0, hostile.1);
            let Some(cloud) = hostile.parse::<Element>().ok().and_then(|e| Cloud::try_from(e).ok()) else {
                continue;
            };
            if cloud == parse(&whole).unwrap() {
                continue;
            }
            places += 1;
            let shown = format!("{cloud:?}");
            assert!(shown.contains("\u{fffd}2J\u{fffd} b yes"), "{i}: {shown}");
            assert!(shown.chars().all(crate::types::text::is_plain), "{i}: {shown}");
        }
        // Before and after each of six attributes' values, and two features.
        assert!(places >= 8, "{places}");
    }

    #[test]
    fn the_newest_successions_travel() {
        use crate::clock::UnixMillis;
        use crate::types::IdentityKey;
        let key = |n| IdentityKey::from_secret_bytes(&[n; 32]);
        let all: Vec<_> = (1..=10).map(|n| Succession::sign(&key(n), &key(n + 1), UnixMillis(1))).collect();
        let cloud = parse(TEXT).unwrap().with_successions(all.clone());
        assert!(cloud.is_bounded());
        assert_eq!(cloud.successions(), all[2..]);
        assert_eq!(Cloud::try_from(Element::from(cloud.clone())).unwrap(), cloud);
        let cloud = Cloud { successions: vec!["!".repeat(SUCCESSION_DIGITS)], ..cloud };
        assert_eq!(cloud.successions(), []);
    }

    #[test]
    fn absurd_texts_and_numbers_are_not_taken() {
        let cloud = parse(TEXT).unwrap();
        for absurd in [
            Cloud { region: Some("x".repeat(300).into()), ..cloud.clone() },
            Cloud { features: vec!["f".into(); 65], ..cloud.clone() },
            Cloud { successions: vec!["AAAA".into()], ..cloud.clone() },
            Cloud { successions: vec!["A".repeat(SUCCESSION_DIGITS); 9], ..cloud.clone() },
            Cloud { load: Some(101), ..cloud.clone() },
            Cloud { carbon: Some(f32::NAN), ..cloud.clone() },
            Cloud { price: Some(-1.0), ..cloud.clone() },
            Cloud { capacity: Some(Capacity { cpus: 1, cpus_free: 2, ..Capacity::default() }), ..cloud },
        ] {
            assert!(!absurd.is_bounded(), "{absurd:?}");
        }
        assert!(parse(&TEXT.replace("load='7'", "load='-1'")).is_none());
        assert!(parse(&TEXT.replace("name='alpine'", "")).is_none());
    }
}
