//! One simulated cloud: a broker's core as it ships, its book, and models of what its runner, hosts and
//! repository do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::broker::continuity::Marks;
use crate::broker::effect::{Checked, Holdings};
use crate::broker::ids::Ids;
use crate::broker::memory_book::MemoryBook;
use crate::broker::talks::{AskingOwners, Reserving};
use crate::broker::{AskId, Beginning, Broker, CallId, Matter, Peer, Token};
use crate::clock::UnixMillis;
use crate::config::Config;
use crate::federation::Members;
use crate::interface::{Candidate, Problem, Reply};
use crate::migration::{Law, RequestBody};
use crate::stanza::Cloud as Presence;
use crate::types::{ByteSize, Hash, IdentityKey, MemberJid, MigrationId, PackId, PublicKey, RecipeId, VmId};
use crate::vm::hypervisor::{Ability, Accelerator, DiskFormat, Features};
use crate::vm::{CardModel, DiskBus, PowerState, VmSpec};

use super::counts::Subject;
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
    pub announced: Option<Arc<Presence>>,
    /// What its presence took when it was sent last.
    pub(super) announced_bytes: u64,
    pub versions: BTreeMap<MemberJid, u32>,
    /// Tickets under which content is served.
    pub serving: BTreeMap<MigrationId, Hash>,
    pub staged: BTreeSet<MigrationId>,
    pub replies: BTreeMap<CallId, Result<Reply, Problem>>,
    pub next_id: u64,
    pub awaited: BTreeMap<AskId, Answered>,
    /// The rules of ownership it goes by.
    pub law: Law,
    /// What others are shown of the versions it speaks, if not what its broker says.
    pub versions_shown: Option<String>,
    /// Its machine's mark of who owned each VM, if it was not booted since.
    pub mark: Option<BTreeMap<VmId, Hash>>,
    /// Its records were put back from a backup, and those that may know more were not all asked.
    pub restored: bool,
    /// How far its clock is ahead.
    pub ahead_ms: u64,
    /// The time of what happened here last.
    pub clock: UnixMillis,
    /// Directories of disks, the one that was changed last at the end, with the guest's state that they hold.
    pub(super) disks: BTreeMap<VmId, Vec<(String, u64)>>,
    pub(super) talks: BTreeMap<u64, Talking>,
    pub(super) plans: BTreeMap<u64, Planning>,
    pub(super) announcing: bool,
    /// A hash of all that ever happened here, and how much came of it.
    pub(super) chain: u64,
    pub(super) made: u64,
}

/// A cloud in the same state, with a book of its own.
impl Clone for Cloud {
    fn clone(&self) -> Self {
        let book = self.book.copy();
        Self {
            jid: self.jid.clone(),
            key: self.key.clone(),
            shape: self.shape.clone(),
            broker: self.broker.clone().map(|broker| broker.over(Box::new(book.clone()))),
            life: self.life,
            book,
            power: self.power.clone(),
            packs: self.packs.clone(),
            stored_bytes: self.stored_bytes,
            composed: self.composed.clone(),
            composed_anew: self.composed_anew,
            components: self.components.clone(),
            announced: self.announced.clone(),
            announced_bytes: self.announced_bytes,
            versions: self.versions.clone(),
            serving: self.serving.clone(),
            staged: self.staged.clone(),
            replies: self.replies.clone(),
            next_id: self.next_id,
            awaited: self.awaited.clone(),
            law: self.law,
            versions_shown: self.versions_shown.clone(),
            mark: self.mark.clone(),
            restored: self.restored,
            ahead_ms: self.ahead_ms,
            clock: self.clock,
            disks: self.disks.clone(),
            talks: self.talks.clone(),
            plans: self.plans.clone(),
            announcing: self.announcing,
            chain: self.chain,
            made: self.made,
        }
    }
}

/// A conversation under way, with what it is for.
#[derive(Clone)]
pub(super) enum Talk {
    One,
    Reserve(Box<Reserving>),
    Owners(Box<AskingOwners>),
    Check(Box<Checking>),
}

#[derive(Clone)]
pub(super) struct Talking {
    pub job: Job,
    pub to: Peer,
    pub about: Matter,
    /// The request whose answer it waits for.
    pub asked: u64,
    pub nonce: String,
    /// What was asked, and how often it may still be asked again of one that was asked too much at once.
    pub body: Option<Box<RequestBody>>,
    pub patience: u32,
    pub talk: Talk,
    /// It is one row of this plan.
    pub plan: Option<u64>,
}

/// A check as the model asks it: whether the VM fits, then which components and packs are lacking.
#[derive(Clone)]
pub(super) struct Checking {
    pub spec: VmSpec,
    pub checked: Checked,
    pub begun: UnixMillis,
    pub asks: Asks,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Asks {
    Fit,
    Components,
    Packs,
}

/// A plan whose members are asked.
#[derive(Clone)]
pub(super) struct Planning {
    pub job: Job,
    pub rows: Vec<Candidate>,
    pub awaited: usize,
}

/// Whom an answer goes to.
#[derive(Clone, Debug)]
pub struct Answered {
    pub cloud: usize,
    pub life: u32,
    pub talk: u64,
    /// Which of the conversation's requests.
    pub asked: u64,
    pub about: Subject,
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
            announced_bytes: 0,
            versions: BTreeMap::new(),
            serving: BTreeMap::new(),
            staged: BTreeSet::new(),
            replies: BTreeMap::new(),
            next_id: 0,
            awaited: BTreeMap::new(),
            law: Law::WHOLE,
            versions_shown: None,
            mark: None,
            restored: false,
            ahead_ms: 0,
            clock: UnixMillis(0),
            disks: BTreeMap::new(),
            talks: BTreeMap::new(),
            plans: BTreeMap::new(),
            announcing: false,
            chain: 0,
            made: 0,
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
            disk_dirs: self.dirs(),
            marks: Marks {
                has_place: true,
                of_this_boot: self.mark.is_some(),
                found: self.mark.clone().unwrap_or_default(),
            },
            ids: Ids::new(*seed.as_bytes()),
            now,
            law: self.law,
        };
        let others = trusted.iter().filter(|(jid, _)| **jid != self.jid);
        let others = others.map(|(jid, key)| (jid.clone(), *key)).collect();
        let members = Members::new(others, BTreeMap::new(), false);
        let broker =
            Broker::open(Box::new(self.book.clone()), members, beginning).map_err(|e| e.to_string())?;
        let broker = if after_restore { broker.after_restore().map_err(|e| e.to_string())? } else { broker };
        self.broker = Some(broker);
        self.announced = None;
        self.announcing = false;
        Ok(())
    }

    /// The broker ends, as by a signal that nobody can catch. VMs run on.
    pub fn crash(&mut self) {
        self.broker = None;
        self.life += 1;
        self.awaited.clear();
        self.serving.clear();
        self.staged.clear();
        self.talks.clear();
        self.plans.clear();
    }

    fn dirs(&self) -> BTreeMap<VmId, Vec<String>> {
        let names = |dirs: &Vec<(String, u64)>| dirs.iter().map(|(name, _)| name.clone()).collect();
        self.disks.iter().map(|(vm, dirs)| (*vm, names(dirs))).collect()
    }

    /// Directories of disks, of all VMs.
    pub fn all_disks(&self) -> impl Iterator<Item = (VmId, &str)> {
        self.disks.iter().flat_map(|(vm, dirs)| dirs.iter().map(|(name, _)| (*vm, name.as_str())))
    }

    /// Which state of the guest these disks hold.
    pub fn content(&self, vm: VmId, disks: &str) -> Option<u64> {
        let (_, content) = self.disks.get(&vm)?.iter().find(|(name, _)| name == disks)?;
        Some(*content)
    }

    pub(super) fn keep_disks(&mut self, vm: VmId, disks: &str, content: u64) {
        self.remove_disks(vm, disks);
        self.disks.entry(vm).or_default().push((disks.to_owned(), content));
    }

    pub(super) fn remove_disks(&mut self, vm: VmId, disks: &str) {
        if let Some(dirs) = self.disks.get_mut(&vm) {
            dirs.retain(|(name, _)| name != disks);
            if dirs.is_empty() {
                self.disks.remove(&vm);
            }
        }
    }

    /// Whether a conversation waits for the answer to this request.
    pub(super) fn waits_for(&self, talk: u64, asked: u64) -> bool {
        self.talks.get(&talk).is_some_and(|talking| talking.asked == asked)
    }

    /// Whether it owns the VM by its record, and knows that the record is not older than what others know.
    pub fn owns(&self, vm: VmId) -> bool {
        let knows = || match &self.broker {
            Some(broker) => broker.is_confirmed(vm),
            None => false,
        };
        self.book.is_here(vm) == Some(true) && (!self.restored || knows())
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
        for (pack, size) in &made.packs {
            if self.packs.insert(*pack) {
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

fn features() -> Features {
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
