//! What this cloud tells the room of itself.

use crate::migration::envelope::VERSIONS;
use crate::stanza::Cloud;
use crate::stanza::cloud::{Capacity, limit};
use crate::types::PeerText;

use super::Broker;

impl Broker {
    /// This cloud's presence payload. Quantities are rounded so that small changes do not go round the
    /// whole room.
    pub(super) fn presence(&self) -> Cloud {
        let (s, config) = (self.status(), &self.config);
        let coarse = |bytes: u64| bytes & !((64 << 20) - 1);
        let load = 100 - (s.cpus.free * 100).checked_div(s.cpus.total).unwrap_or(100).min(100);
        let mut features = vec![format!("driver:{}", s.driver)];
        features.extend(self.hardware());
        features.extend(config.networks.iter().map(|n| format!("network:{}", n.name)));
        features.extend(self.network_kinds());
        // The rest would make all of it unreadable to others.
        features.truncate(limit::FEATURES);
        Cloud {
            name: s.cloud.to_string().into(),
            key: s.key.to_string().into(),
            versions: VERSIONS.map(|v| v.to_string()).join(",").into(),
            software: Some(format!("cicada {}", s.version).into()),
            region: Some(PeerText::from(&config.cloud.region)).filter(|r| !r.is_empty()),
            power: "on".into(),
            load: Some(load as u32),
            carbon: config.cloud.carbon_g_per_kwh,
            price: config.cloud.price_per_hour,
            capacity: Some(Capacity {
                cpus: s.cpus.total,
                cpus_free: s.cpus.free,
                memory: s.memory_bytes.total,
                memory_free: s.memory_bytes.free,
                storage: coarse(s.storage_bytes.total),
                // What a VM could have, not what happens to be unwritten.
                storage_free: s.storage_promised_bytes.free & !((1 << 30) - 1),
            }),
            features: features.into_iter().map(Into::into).collect(),
            successions: Vec::new(),
        }
        .with_successions(self.successions().iter().cloned())
    }
}
