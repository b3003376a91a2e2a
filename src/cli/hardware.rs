//! What `vm create` and `vm adopt` take of a new VM's hardware.

use std::str::FromStr;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::types::ByteSize;
use crate::vm::{self, CardModel, DiskBus, Mac, SystemUuid};

#[derive(Args)]
pub struct Hardware {
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    pub memory: ByteSize,
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u32,
    /// A network of the configuration to plug it into; may be repeated
    #[arg(long = "network", value_name = "NAME")]
    pub networks: Vec<String>,
    /// The MAC address of a network's card, as the guest knows it; for each --network one, in order
    #[arg(long = "mac", value_name = "MAC", requires = "networks")]
    macs: Vec<Mac>,
    /// What the network cards are: once for all of them, or for each --network in order; virtio if not given
    #[arg(long = "card-model", value_name = "MODEL", requires = "networks", value_parser = one_of::<CardModel>(CardModel::WORDS))]
    card_models: Vec<CardModel>,
    /// What the disks are attached to
    #[arg(long, default_value_t, value_name = "BUS", value_parser = one_of::<DiskBus>(DiskBus::WORDS))]
    disk_bus: DiskBus,
    /// The UUID the guest shall find in its firmware's tables (SMBIOS); the VM's own id if not given
    #[arg(long = "uuid", value_name = "UUID")]
    system_uuid: Option<SystemUuid>,
    /// The CPU the guest shall see, as QEMU calls it; the configuration's if not given
    #[arg(long, value_name = "MODEL")]
    cpu_model: Option<String>,
}

/// The words of a kind, which help texts and completions list.
pub fn one_of<T>(words: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = String> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(words).try_map(|word| word.parse::<T>())
}

impl Hardware {
    /// Without what every VM has.
    pub fn chosen(self) -> Box<vm::Hardware> {
        Box::new(vm::Hardware {
            macs: self.macs,
            card_models: self.card_models,
            disk_bus: self.disk_bus,
            system_uuid: self.system_uuid,
            cpu_model: self.cpu_model,
        })
    }
}
