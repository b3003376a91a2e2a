//! One simulated cloud: a broker's core as it ships, its book, and models of what its runner, hosts and
//! repository do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::broker::effect::Holdings;
use crate::broker::ids::Ids;
use crate::broker::memory_book::MemoryBook;
use crate::broker::{AskId, Beginning, Broker, CallId, Peer, Token};
use crate::clock::UnixMillis;
use crate::config::Config;
use crate::federation::Members;
use crate::interface::{Problem, Reply};
use crate::stanza::Cloud as Presence;
use crate::types::{ByteSize, Hash, IdentityKey, MemberJid, MigrationId, PackId, PublicKey, RecipeId, VmId};
use crate::vm::hypervisor::{Ability, Accelerator, DiskFormat, Features};
use crate::vm::{CardModel, DiskBus, PowerState};

use super::model::{Catalogue, Made};

/// What a cloud is like.
#[derive(Clone, PartialEq, Debug)]
pub struct Shape {
    pub cpus: u32,
    pub memory: ByteSize,
    /// More settings, as in `federation.toml`.
    pub settings: String,
}

pub struct Cloud {
    pub jid: MemberJid,
    pub key: IdentityKey,
    pub shape: Shape,
    /// `None` while the broker is down.
    pub broker: Option<Broker>,
    /// How often it was started: what was under way before is nobody's any more.
    pub life: u32,
    pub book: MemoryBook,
    /// Hypervisors outlive their broker.
    pub power: BTreeMap<VmId, PowerState>,
    /// Packs in the repository, and recipes that were composed.
    pub packs: BTreeSet<PackId>,
    pub stored_bytes: u64,
    pub composed: BTreeSet<RecipeId>,
    /// The broker was not told yet what is composed.
    pub composed_anew: bool,
    pub components: BTreeSet<crate::types::ComponentId>,
    pub announced: Option<Presence>,
    pub versions: BTreeMap<MemberJid, u32>,
    /// Tickets under which content is served.
    pub serving: BTreeMap<MigrationId, Hash>,
    pub staged: BTreeSet<MigrationId>,
    pub replies: BTreeMap<CallId, Result<Reply, Problem>>,
    pub next_id: u64,
    pub awaited: BTreeMap<AskId, Answered>,
}

/// Whom an answer goes to.
#[derive(Clone, Debug)]
pub struct Answered {
    pub cloud: usize,
    pub life: u32,
    pub talk: u64,
}

/// A name's key, the same in every run.
pub fn key_of(name: &str) -> IdentityKey {
    IdentityKey::from_secret_bytes(Hash::of(name.as_bytes()).as_bytes())
}

pub fn jid_of(name: &str) -> MemberJid {
    match format!("{name}@sim.example").parse() {
        Ok(jid) => jid,
        Err(e) => unreachable!("names of simulated clouds are plain: {e}"),
    }
}

impl Cloud {
    pub fn new(name: &str, shape: Shape) -> Self {
        Self {
            jid: jid_of(name),
            key: key_of(name),
            shape,
            broker: None,
            life: 0,
            book: MemoryBook::default(),
            power: BTreeMap::new(),
            packs: BTreeSet::new(),
            stored_bytes: 0,
            composed: BTreeSet::new(),
            composed_anew: true,
            components: BTreeSet::new(),
            announced: None,
            versions: BTreeMap::new(),
            serving: BTreeMap::new(),
            staged: BTreeSet::new(),
            replies: BTreeMap::new(),
            next_id: 0,
            awaited: BTreeMap::new(),
        }
    }

    pub fn name(&self) -> &str {
        self.jid.as_str().split('@').next().unwrap_or_default()
    }

    pub fn peer(&self) -> Peer {
        Peer { jid: self.jid.clone(), key: self.key.public() }
    }

    pub fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Opens the broker on its book, as after a crash.
    ///
    /// # Errors
    /// If the shape's settings are none.
    pub fn open(
        &mut self,
        trusted: &BTreeMap<MemberJid, PublicKey>,
        now: UnixMillis,
        after_restore: bool,
    ) -> Result<(), String> {
        self.life += 1;
        self.composed_anew = true;
        let text = format!(
            "[cloud]\nname = \"{}\"\ndata_dir = \"/sim/{0}\"\n[xmpp]\njid = \"{}\"\npassword_file = \"/p\"\n\
             room = \"fed@rooms.sim.example\"\n[hypervisor]\ncpus = {}\nmemory = \"{}\"\n{}",
            self.name(),
            self.jid,
            self.shape.cpus,
            self.shape.memory.0,
            self.shape.settings
        );
        let config = Config::of_text(&text, Path::new("/sim")).map_err(|e| e.to_string())?;
        let seed = Hash::of(format!("{} {}", self.jid, self.life).as_bytes());
        let beginning = Beginning {
            config,
            key: Arc::new(self.key.clone()),
            features: features(),
            transfer_addresses: vec!["192.0.2.1:7420".into()],
            vms_dir: PathBuf::from("/sim"),
            disk_dirs: BTreeMap::new(),
            marks: Default::default(),
            ids: Ids::new(*seed.as_bytes()),
            now,
        };
        let others = trusted.iter().filter(|(jid, _)| **jid != self.jid);
        let others = others.map(|(jid, key)| (jid.clone(), *key)).collect();
        let members = Members::new(others, BTreeMap::new(), false);
        let broker =
            Broker::open(Box::new(self.book.clone()), members, beginning).map_err(|e| e.to_string())?;
        let broker = if after_restore { broker.after_restore().map_err(|e| e.to_string())? } else { broker };
        self.broker = Some(broker);
        self.awaited.clear();
        self.announced = None;
        Ok(())
    }

    /// The broker ends, as by a signal that nobody can catch. VMs run on.
    pub fn crash(&mut self) {
        self.broker = None;
        self.life += 1;
        self.awaited.clear();
        self.serving.clear();
        self.staged.clear();
    }

    /// What is held of a VM's needs.
    pub fn holdings(
        &self,
        recipe: &RecipeId,
        components: &[crate::types::ComponentId],
        packs: &[PackId],
    ) -> Holdings {
        let lacking = |held: Vec<bool>| {
            (0u32..).zip(held).filter(|(_, held)| !held).map(|(at, _)| at).collect::<Vec<u32>>()
        };
        Holdings {
            composed: self.composed.contains(recipe),
            refusal: None,
            components_lacking: lacking(components.iter().map(|c| self.components.contains(c)).collect()),
            packs_lacking: lacking(packs.iter().map(|p| self.packs.contains(p)).collect()),
        }
    }

    /// Takes a recipe's components in; bytes of what was not held.
    pub fn learn(&mut self, catalogue: &Catalogue, made: &Made) -> u64 {
        let mut bytes = 0;
        for (pack, size) in catalogue.packs_of(made) {
            if self.packs.insert(pack) {
                bytes += size;
            }
        }
        self.stored_bytes += bytes;
        self.components.extend(made.components.iter().map(|at| catalogue.components[*at].id));
        self.composed_anew |= self.composed.insert(made.id);
        bytes
    }

    pub fn running(&self, vm: VmId) -> bool {
        matches!(self.power.get(&vm), Some(PowerState::Running | PowerState::Paused | PowerState::Starting))
    }
}

/// What is kept of an effect that is worked on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Job {
    pub token: Token,
    pub life: u32,
}

pub fn features() -> Features {
    Features {
        driver: "simulated".into(),
        version: "1".into(),
        accelerator: Accelerator::Simulated,
        machine_type: "simulated-1".into(),
        firmware: "0".into(),
        architectures: BTreeSet::from(["amd64".into()]),
        cpu_models: BTreeSet::from(["qemu64".into()]),
        disk_buses: DiskBus::ALL.iter().copied().collect(),
        card_models: CardModel::ALL.iter().copied().collect(),
        root_formats: BTreeSet::from([DiskFormat::Qcow2]),
        networks: BTreeSet::new(),
        exposing_networks: BTreeSet::new(),
        own_users: false,
        abilities: BTreeSet::from([Ability::Pause, Ability::TrackChanges]),
    }
}
