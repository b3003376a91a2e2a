//! The VMs that move, what their disks must hold, and whether everything is in order.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cicada::client::Client;
use cicada::interface::{MigrationView, VmAdopt, VmView};
use cicada::interface::{MoveRequest, Problem, ProblemKind, Reply, Request, VmRequest};
use cicada::types::ByteSize;
use cicada::vm::{Firmware, PowerState};

use crate::mischief::Mischief;
use crate::watcher::processes;
use crate::world::World;
use crate::{CLOUDS, Random, guest};

const ROOT_BYTES: u64 = 16 << 20;
const USER_DATA_BYTES: usize = 12 << 20;
const MOVES_AT_ONCE: usize = 2;

struct Machine {
    name: &'static str,
    id: String,
    runs: bool,
    root: Vec<u8>,
    user_data: Vec<u8>,
    moving: bool,
}

pub struct Fleet {
    machines: Vec<Machine>,
    ended: (mpsc::Sender<Ended>, mpsc::Receiver<Ended>),
    completed: u64,
    not_moved: u64,
    /// Moves whose operator lost sight of them: their broker was killed.
    unwatched: u64,
    started_by_hand: u64,
    pub checks: u64,
}

struct Ended {
    vm: &'static str,
    result: Result<Reply, Problem>,
}

fn noise(seed: &str, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut out);
    out
}

fn ask(world: &World, cloud: usize, request: &Request) -> Reply {
    world.call(cloud, request).unwrap_or_else(|p| panic!("{request:?}: {p}\n{}", world.log(cloud)))
}

fn vms(world: &World, cloud: usize) -> Option<Vec<VmView>> {
    match world.call(cloud, &Request::Vm(VmRequest::List)) {
        Ok(Reply::Vms(vms)) => Some(vms),
        _ => None,
    }
}

fn migrations(world: &World, cloud: usize) -> Option<Vec<MigrationView>> {
    match world.call(cloud, &Request::Move(MoveRequest::List)) {
        Ok(Reply::Migrations(all)) => Some(all),
        _ => None,
    }
}

impl Fleet {
    /// Two VMs that run and one that does not, each with user data.
    pub fn create(world: &World, random: &mut Random) -> Self {
        let mut machines = Vec::new();
        for (name, runs) in [("north", true), ("south", true), ("archive", false)] {
            let path = |kind: &str| world.dir.path().join(format!("{name}-{kind}.raw"));
            let root = guest::disk(ROOT_BYTES);
            let user_data = noise(name, USER_DATA_BYTES);
            std::fs::write(path("root"), &root).unwrap();
            std::fs::write(path("data"), &user_data).unwrap();
            let adopt = VmAdopt {
                name: name.parse().unwrap(),
                disk: path("root").display().to_string(),
                user_data: Some(path("data").display().to_string()),
                format: "raw".into(),
                architecture: "amd64".into(),
                firmware: Firmware::Uefi,
                memory: ByteSize::mib(64),
                cpus: 1,
                networks: vec!["lan".into()],
                share: false,
                dry_run: false,
                start: runs,
                hardware: Default::default(),
                nvram: None,
            };
            let home = random.below(CLOUDS.len());
            let Reply::Adopted(adopted) = ask(world, home, &Request::Vm(VmRequest::Adopt(adopt))) else {
                panic!()
            };
            let id = adopted.vm.unwrap().id.to_string();
            machines.push(Machine { name, id, runs, root, user_data, moving: false });
        }
        Self {
            machines,
            ended: mpsc::channel(),
            completed: 0,
            not_moved: 0,
            unwatched: 0,
            started_by_hand: 0,
            checks: 0,
        }
    }

    pub fn ids(&self) -> Vec<String> {
        self.machines.iter().map(|m| m.id.clone()).collect()
    }

    pub fn tally(&self) -> String {
        format!(
            "{} moves done, {} called off, {} lost from sight",
            self.completed, self.not_moved, self.unwatched
        )
    }

    pub fn collect(&mut self) {
        while let Ok(Ended { vm, result }) = self.ended.1.try_recv() {
            self.machines.iter_mut().filter(|m| m.name == vm).for_each(|m| m.moving = false);
            match result {
                Ok(_) => self.completed += 1,
                Err(p) if p.kind == ProblemKind::Unavailable => self.unwatched += 1,
                Err(_) => self.not_moved += 1,
            }
        }
    }

    /// Begins a move or two, if there are VMs at rest.
    pub fn move_some(&mut self, world: &World, mischief: &Mischief, random: &mut Random) {
        let under_way = self.machines.iter().filter(|m| m.moving).count();
        if under_way >= MOVES_AT_ONCE {
            return;
        }
        let at = random.below(self.machines.len());
        let to = CLOUDS[random.below(CLOUDS.len())];
        let machine = &mut self.machines[at];
        if machine.moving {
            return;
        }
        let here = |v: &VmView| {
            v.id.to_string() == machine.id
                && v.ownership == cicada::interface::VmOwnership::Here
                && v.migration.is_none()
        };
        let well = (0..CLOUDS.len()).filter(|c| mischief.is_well(*c));
        let owner = well.into_iter().find(|c| vms(world, *c).is_some_and(|all| all.iter().any(here)));
        let Some(owner) = owner.filter(|o| CLOUDS[*o] != to) else { return };
        machine.moving = true;
        let (socket, name, ended) = (world.socket(owner), machine.name, self.ended.0.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let request = Request::Move(MoveRequest::Begin {
                vm: name.into(),
                to: Some(to.into()),
                dry_run: false,
                force_stop: false,
            });
            let result =
                runtime.block_on(async { Client::connect(&socket).await?.call(&request, |_| {}).await });
            let _ = ended.send(Ended { vm: name, result });
        });
    }

    /// Whether nothing is under way and each VM is in one cloud. Only a cloud that answers counts.
    pub fn at_rest(&self, world: &World) -> bool {
        let clouds = 0..CLOUDS.len();
        let all: Option<Vec<_>> =
            clouds.map(|c| vms(world, c).zip(migrations(world, c)).map(|(v, m)| (c, v, m))).collect();
        let Some(all) = all else { return false };
        let still = all.iter().all(|(_, vms, migrations)| {
            migrations.iter().all(|m| m.progress.ended) && vms.iter().all(|v| v.migration.is_none())
        });
        let acknowledged = all
            .iter()
            .all(|(_, vms, _)| vms.iter().all(|v| v.ownership != cicada::interface::VmOwnership::InDoubt));
        still && acknowledged && self.machines.iter().all(|m| self.owners(&m.id, &all).len() == 1)
    }

    fn owners<T>(&self, id: &str, all: &[(usize, Vec<VmView>, T)]) -> Vec<usize> {
        let has = |vms: &[VmView]| {
            vms.iter().any(|v| v.id.to_string() == id && v.ownership == cicada::interface::VmOwnership::Here)
        };
        all.iter().filter(|(_, vms, _)| has(vms)).map(|(c, _, _)| *c).collect()
    }

    /// Everything that must hold of clouds at rest.
    pub fn check(&mut self, world: &World, mischief: &mut Mischief) {
        let all: Vec<_> = (0..CLOUDS.len()).map(|c| (c, vms(world, c).unwrap(), ())).collect();
        let mut owners = Vec::new();
        for m in &self.machines {
            let found = self.owners(&m.id, &all);
            assert_eq!(found.len(), 1, "{} is owned by {found:?}", m.name);
            owners.push(found[0]);
        }
        for (at, &owner) in owners.iter().enumerate() {
            let m = &self.machines[at];
            let (name, runs, id) = (m.name, m.runs, m.id.clone());
            if runs {
                self.assert_runs(world, owner, name, &id, mischief);
                ask(
                    world,
                    owner,
                    &Request::Vm(VmRequest::Stop {
                        vm: name.into(),
                        force: false,
                        timeout_s: Some(60),
                        for_host: false,
                    }),
                );
            }
            let m = &self.machines[at];
            assert!(exported(world, owner, name, false) == m.root, "the root disk of {name} is another");
            assert!(exported(world, owner, name, true) == m.user_data, "the user data of {name} is other");
            if runs {
                ask(
                    world,
                    owner,
                    &Request::Vm(VmRequest::Start { vm: name.into(), unconfirmed: false, by_uid: None }),
                );
            }
            self.checks += 4;
        }
        // Copies that were given up, staged disks and reservations go by themselves.
        let ids = self.ids();
        let kept = |cloud: usize, path: &Path| {
            let of = |at: usize| path.to_string_lossy().contains(&ids[at]) && owners[at] == cloud;
            (0..ids.len()).any(of) && path.extension().is_none_or(|e| e != "tmp")
        };
        let strays = || -> Vec<PathBuf> {
            let files = (0..CLOUDS.len()).flat_map(|c| world.vm_files(c).into_iter().map(move |p| (c, p)));
            files.filter(|(c, p)| !kept(*c, p)).map(|(_, p)| p).collect()
        };
        let begun = Instant::now();
        while !strays().is_empty() {
            let logs: Vec<_> = (0..CLOUDS.len()).map(|c| world.log(c)).collect();
            let late = begun.elapsed() > Duration::from_secs(120);
            assert!(!late, "left where a VM is not: {:?}\n{}", strays(), logs.join("\n---\n"));
            std::thread::sleep(Duration::from_millis(200));
        }
        world.wait("all resources but those of the VMs are free", 60, |w| {
            (0..CLOUDS.len()).all(|c| {
                let running = (0..ids.len()).filter(|at| owners[*at] == c && self.machines[*at].runs).count();
                let status = w.status(c);
                status.cpus.total - status.cpus.free == running as u64
            })
        });
        for (at, id) in ids.iter().enumerate() {
            let dirs: Vec<_> = std::fs::read_dir(world.clouds[owners[at]].dir.join("data/vms").join(id))
                .unwrap()
                .flatten()
                .filter(|e| e.path().is_dir() && e.file_name().to_string_lossy().starts_with("disks"))
                .collect();
            assert_eq!(dirs.len(), 1, "{dirs:?}");
        }
        self.checks += 2 + ids.len() as u64;
    }

    /// A VM that should run does, in its owner's cloud alone; unless its hypervisor was killed, after
    /// which it must start.
    fn assert_runs(&mut self, world: &World, owner: usize, name: &str, id: &str, mischief: &mut Mischief) {
        let power = world.vm(owner, name).power;
        if power != PowerState::Running {
            assert!(
                mischief.killed.remove(id),
                "{name} is {power} though nobody killed it\n{}",
                world.log(owner)
            );
            ask(
                world,
                owner,
                &Request::Vm(VmRequest::Start { vm: name.into(), unconfirmed: false, by_uid: None }),
            );
            self.started_by_hand += 1;
        }
        mischief.killed.remove(id);
        let places: Vec<_> = processes(world.dir.path()).into_iter().filter(|p| p.vm == id).collect();
        assert!(places.iter().all(|p| p.cloud == CLOUDS[owner]) && !places.is_empty(), "{places:?}");
        // It can be stopped by its power button only once it is up.
        let log = world.vm(owner, name).console_log;
        world.wait("the guest greets", 120, |_| {
            std::fs::read_to_string(&log).is_ok_and(|text| text.contains(guest::GREETING.trim()))
        });
    }

    /// The owner of the VM at rest writes to it, so that each round has something new to lose.
    pub fn change_content(&mut self, world: &World, random: &mut Random) {
        for m in self.machines.iter_mut().filter(|m| !m.runs) {
            let is_data = |path: &PathBuf| {
                path.to_string_lossy().contains(&m.id)
                    && std::fs::metadata(path).is_ok_and(|meta| meta.len() == USER_DATA_BYTES as u64)
            };
            let mut disks = (0..CLOUDS.len()).flat_map(|c| world.vm_files(c)).filter(is_data);
            let disk = disks.next().expect("no user-data disk");
            assert!(disks.next().is_none(), "two user-data disks");
            let file = std::fs::OpenOptions::new().write(true).open(disk).unwrap();
            for _ in 0..8 {
                let piece = noise(&random.draw().to_string(), 64 << 10);
                let at = random.below((USER_DATA_BYTES - piece.len()) >> 9) << 9;
                file.write_all_at(&piece, at as u64).unwrap();
                m.user_data[at..at + piece.len()].copy_from_slice(&piece);
            }
        }
    }
}

fn exported(world: &World, cloud: usize, vm: &str, user_data: bool) -> Vec<u8> {
    let output = world.dir.path().join("exported.raw");
    let request = Request::Vm(VmRequest::Export {
        vm: vm.into(),
        output: output.display().to_string(),
        format: "raw".into(),
        user_data,
    });
    ask(world, cloud, &request);
    let content = std::fs::read(&output).unwrap();
    std::fs::remove_file(&output).unwrap();
    content
}
