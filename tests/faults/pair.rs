//! Two clouds with one VM, and everything that can be done to them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cicada::broker::READY_LINE;
use cicada::broker::book::MigrationRecord;
use cicada::client::Client;
use cicada::interface::{Event, VmAdopt, VmView};
use cicada::interface::{MoveRequest, Problem, Reply, Request, VmRequest};
use cicada::migration::records::VmRecord;
use cicada::types::ByteSize;
use cicada::vm::{Firmware, PowerState};

use crate::guest;
use crate::links::{Wire, free_udp_port};
use crate::storage::Storage;
use crate::world::support::Kind;
use crate::world::{self, World};

/// Says loudly why there can be no clouds here.
pub fn missing_tool() -> bool {
    !Kind::usual().is_there("faults") || world::lacks(&["qemu-system-x86_64", "qemu-img"])
}

pub const VM: &str = "web";
const ROOT_BYTES: usize = 4 << 20;
const USER_DATA_BYTES: usize = 6 << 20;
/// Short, so that what is left over for a while is gone soon.
const LEASE_S: u32 = 8;
const GRACE_S: u32 = 1;
const HIBERNATION_S: u32 = 5;
const CPUS: u64 = 4;

pub struct Pair {
    /// File systems of the clouds' data, where asked for. Gone before the directories below.
    pub storage: Vec<Storage>,
    pub world: World,
    pub xmpp: [Wire; 2],
    pub data: [Wire; 2],
    /// But for the last sector, which counts.
    root: blake3::Hash,
    user_data: blake3::Hash,
    starts: u32,
    runtime: tokio::runtime::Runtime,
}

impl Pair {
    /// With `own_storage`, each cloud's data has a small file system; None if none can be mounted.
    pub fn start(own_storage: bool) -> Option<Self> {
        let mut world = World::prepare(&["alpine", "boreal"], &[], HIBERNATION_S);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (mut wires, mut storage) = (Vec::new(), Vec::new());
        for cloud in 0..2 {
            let xmpp = Wire::tcp(&runtime, world.clouds[cloud].xmpp_port);
            let listen = free_udp_port();
            let data = Wire::udp(&runtime, listen);
            let c = &mut world.clouds[cloud];
            if own_storage {
                storage.push(Storage::mount(&c.dir.join("data.img"), &c.dir.join("data"))?);
            }
            c.xmpp_port = xmpp.port;
            c.environment.push((cicada::fault::VARIABLE.into(), c.dir.join("fault")));
            world.configure(
                cloud,
                &format!(
                    "[transfer]\npeer_networks = [\"127.0.0.0/8\"]\nlisten = \"127.0.0.1:{listen}\"\nadvertise = [\"127.0.0.1:{}\"]\n\
                     [migration]\nlease_s = {LEASE_S}\ngrace_period = \"{GRACE_S}s\"\n",
                    data.port
                ),
            );
            wires.push((xmpp, data));
            world.start_broker(cloud);
        }
        world.wait_online();
        let [(x0, d0), (x1, d1)]: [(Wire, Wire); 2] =
            wires.try_into().unwrap_or_else(|_| unreachable!("two clouds"));
        let (root, user_data) = (guest::root_disk(ROOT_BYTES), guest::noise("user data", USER_DATA_BYTES));
        let pair = Self {
            storage,
            world,
            xmpp: [x0, x1],
            data: [d0, d1],
            root: blake3::hash(&root[..ROOT_BYTES - guest::SECTOR_BYTES]),
            user_data: blake3::hash(&user_data),
            starts: 0,
            runtime,
        };
        let path = |name: &str, bytes: &[u8]| {
            let path = pair.world.dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path.display().to_string()
        };
        let adopt = VmAdopt {
            name: VM.parse().unwrap(),
            disk: path("root.img", &root),
            user_data: Some(path("user-data.img", &user_data)),
            format: "raw".into(),
            architecture: "amd64".into(),
            firmware: Firmware::Bios,
            memory: ByteSize::mib(128),
            cpus: 1,
            networks: Vec::new(),
            share: false,
            dry_run: false,
            start: true,
            hardware: Default::default(),
            nvram: None,
        };
        let adopted = pair.world.call(0, &Request::Vm(VmRequest::Adopt(adopt)));
        assert!(matches!(adopted, Ok(Reply::Adopted(_))), "{adopted:?}");
        Some(pair)
    }

    fn hold_file(&self, cloud: usize) -> PathBuf {
        self.world.clouds[cloud].dir.join("hold")
    }

    /// A cloud's broker will wait at this point.
    pub fn hold_at(&self, cloud: usize, point: &str) {
        self.instruct(cloud, &format!("{point}=hold:{}", self.hold_file(cloud).display()));
    }

    fn instruct(&self, cloud: usize, instruction: &str) {
        // Never read half-written.
        let dir = &self.world.clouds[cloud].dir;
        fs::write(dir.join("fault.new"), instruction).unwrap();
        fs::rename(dir.join("fault.new"), dir.join("fault")).unwrap();
    }

    /// Lets the broker of `held` go on once that of `next` has another instruction.
    pub fn let_go_after(&self, held: usize, next: usize, instruction: &str) {
        self.instruct(next, instruction);
        fs::remove_file(self.hold_file(held)).unwrap();
    }

    pub fn is_held(&self, cloud: usize) -> bool {
        self.hold_file(cloud).exists()
    }

    /// Nobody waits, and nobody will.
    pub fn let_go(&self) {
        for cloud in 0..2 {
            let _ = fs::remove_file(self.world.clouds[cloud].dir.join("fault"));
            let _ = fs::remove_file(self.hold_file(cloud));
        }
    }

    pub fn begin_move(&self, source: usize) -> tokio::task::JoinHandle<Result<Reply, Problem>> {
        let (socket, to) = (self.world.socket(source), self.world.clouds[1 - source].name.clone());
        self.runtime.spawn(async move {
            let request = Request::Move(MoveRequest::Begin {
                vm: VM.into(),
                to: Some(to),
                dry_run: false,
                force_stop: false,
            });
            Client::connect(&socket).await?.call(&request, |_: Event| {}).await
        })
    }

    pub fn kill_server(&self) {
        self.world.xmpp.kill();
    }

    /// QEMU processes of a cloud.
    pub fn qemus(&self, cloud: usize) -> Vec<i32> {
        let dir = self.world.clouds[cloud].dir.join("data/vms").display().to_string();
        let numbers = fs::read_dir("/proc").unwrap().flatten();
        let numbers = numbers.filter_map(|e| e.file_name().to_str()?.parse().ok());
        numbers
            .filter(|pid: &i32| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line);
                line.split('\0').next().is_some_and(|program| program.contains("qemu-system"))
                    && line.contains(&dir)
            })
            .collect()
    }

    pub fn kill_qemu(&self, cloud: usize) -> bool {
        let all = self.qemus(cloud);
        all.iter().for_each(|pid| kill(*pid));
        !all.is_empty()
    }

    pub fn record(&self, cloud: usize) -> Option<VmRecord> {
        let vms = fs::read_dir(self.world.clouds[cloud].dir.join("data/vms")).ok()?;
        let record = vms.flatten().find_map(|dir| fs::read(dir.path().join("record.json")).ok())?;
        serde_json::from_slice(&record).ok()
    }

    fn view(&self, cloud: usize) -> Option<VmView> {
        match self.world.call(cloud, &Request::Vm(VmRequest::List)) {
            Ok(Reply::Vms(vms)) => vms.into_iter().find(|vm| vm.name.as_str() == VM),
            _ => None,
        }
    }

    /// The cloud that owns the VM, if all is quiet: nothing moves, waits or is in doubt.
    pub fn owner_at_rest(&self) -> Result<usize, String> {
        let mut owners = Vec::new();
        for cloud in 0..2 {
            let name = &self.world.clouds[cloud].name;
            match self.world.call(cloud, &Request::Move(MoveRequest::List)) {
                Ok(Reply::Migrations(all)) => {
                    if let Some(m) = all.iter().find(|m| !m.progress.ended) {
                        return Err(format!("{name} moves: {} {}", m.progress.phase, m.progress.detail));
                    }
                }
                other => return Err(format!("{name} does not answer: {:?}", other.err())),
            }
            let unfinished = self.records_of_moves(cloud).into_iter().any(|m| !m.record.course.ended);
            if unfinished {
                return Err(format!("{name} has a move to take up again"));
            }
            match self.view(cloud) {
                Some(vm)
                    if vm.ownership == cicada::interface::VmOwnership::Here && vm.migration.is_none() =>
                {
                    owners.push(cloud)
                }
                Some(vm) if vm.ownership == cicada::interface::VmOwnership::GivenUp => {}
                Some(vm) => return Err(format!("{name}: {} {:?}", vm.ownership, vm.migration)),
                None => {}
            }
        }
        match owners[..] {
            [owner] => Ok(owner),
            _ => Err(format!("owners: {owners:?}")),
        }
    }

    fn records_of_moves(&self, cloud: usize) -> Vec<MigrationRecord> {
        let dir = self.world.clouds[cloud].dir.join("data/migrations");
        let files = fs::read_dir(dir).into_iter().flatten().flatten();
        files.filter_map(|f| serde_json::from_slice(&fs::read(f.path()).ok()?).ok()).collect()
    }

    pub fn power(&self, cloud: usize) -> PowerState {
        self.view(cloud).map_or(PowerState::Stopped, |vm| vm.power)
    }

    /// Whether the guest said since its last start that its disk is whole.
    pub fn is_ready(&self, cloud: usize) -> bool {
        let Some(vm) = self.view(cloud) else { return false };
        let text = fs::read_to_string(&vm.console_log).unwrap_or_default();
        assert!(!text.contains(guest::DAMAGED), "the guest says that its disk is damaged");
        let written = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        let started = written(&Path::new(&vm.console_log).with_file_name("qemu.pid"));
        let boot = text.rfind("SeaBIOS").unwrap_or(0);
        started < written(Path::new(&vm.console_log)) && text[boot..].contains(READY_LINE)
    }

    /// Everything that must hold at rest, the VM running at `owner`.
    pub fn check(&mut self, owner: usize) -> Result<(), String> {
        let running: Vec<_> = (0..2).map(|c| self.qemus(c).len()).collect();
        let expected: Vec<_> = (0..2).map(|c| usize::from(c == owner)).collect();
        if running != expected {
            return Err(format!("QEMU processes: {running:?}, the owner is {owner}"));
        }
        for cloud in 0..2 {
            let used = u64::from(cloud == owner);
            let free = self.world.status(cloud).cpus.free;
            if free != CPUS - used {
                return Err(format!("{free} CPUs are free at {cloud}"));
            }
            let left = self.leftovers(cloud, cloud == owner);
            if !left.is_empty() {
                return Err(format!("left over at {cloud}: {left:?}"));
            }
        }
        self.check_disks(owner)
    }

    fn check_disks(&mut self, owner: usize) -> Result<(), String> {
        let record = self.record(owner).ok_or("the owner has no record")?;
        let dir = self.world.clouds[owner].dir.join("data/vms").join(record.spec.id.to_string());
        let dir = dir.join(&record.disks);
        let user_data = fs::read(dir.join("user-data.raw")).map_err(|e| e.to_string())?;
        let raw = self.world.dir.path().join("read-back.raw");
        let output = Command::new("qemu-img")
            .args(["convert", "-U", "-O", "raw"])
            .args([&dir.join("root.qcow2"), &raw])
            .output()
            .map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let root = fs::read(&raw).map_err(|e| e.to_string())?;
        if blake3::hash(&root[..ROOT_BYTES - guest::SECTOR_BYTES]) != self.root || !guest::is_whole(&root) {
            return Err("the root disk has other content".into());
        }
        if blake3::hash(&user_data) != self.user_data {
            return Err("the user data has other content".into());
        }
        let starts = guest::starts(&root);
        if starts < self.starts {
            return Err(format!(
                "the guest counted {} starts, and now {starts}: writes were lost",
                self.starts
            ));
        }
        self.starts = starts;
        Ok(())
    }

    /// What does not belong to a cloud that owns the VM, or does not.
    fn leftovers(&self, cloud: usize, owns: bool) -> BTreeSet<String> {
        let data = self.world.clouds[cloud].dir.join("data");
        let mut files = BTreeSet::new();
        walk(&data, &mut files);
        let disks = self.record(cloud).filter(|_| owns).map(|r| format!("vms/{}/{}/", r.spec.id, r.disks));
        let record = self.record(cloud).filter(|_| owns).map(|r| format!("vms/{}/", r.spec.id));
        files.retain(|path| {
            let path = path.strip_prefix(&format!("{}/", data.display())).unwrap_or(path);
            let temporary = path.ends_with(cicada::durable::TEMPORARY_SUFFIX)
                || ["repository/temporary/", "repository/incoming/"].iter().any(|d| path.starts_with(d));
            let own = |prefix: &Option<String>| prefix.as_ref().is_some_and(|p| path.starts_with(p));
            let foreign = path.starts_with("vms/") && !own(&record);
            let staged = path.contains("/disks-") && !own(&disks);
            temporary || foreign || staged
        });
        files
    }
}

fn walk(dir: &Path, out: &mut BTreeSet<String>) {
    for path in fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()) {
        if path.is_dir() {
            walk(&path, out);
        } else {
            out.insert(path.display().to_string());
        }
    }
}

pub fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process number");
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Whether `condition` came to hold in time.
pub fn comes(seconds: u64, mut condition: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !condition() {
        if begun.elapsed() > Duration::from_secs(seconds) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    true
}
