//! Real clouds for tests: an XMPP server, broker processes, QEMU guests and components built from the
//! distribution's packages, all below one directory that goes away with the test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cicada::build::{BuildOptions, build};
use cicada::client::Client;
use cicada::interface::ObjectKind;
use cicada::interface::{CloudRequest, ContentRequest, MoveRequest, Problem, Reply, Request, VmRequest};
use cicada::interface::{Event, MemberView, MigrationView, PlanView, StatusView, VmAdopt, VmCreate, VmView};
use cicada::repository::Repository;
use cicada::types::{ByteSize, ComponentId};
use cicada::vm::Firmware;
use cicada::xmpp::admin::{Admin, Owners};
use futures::StreamExt;

#[path = "../support/xmpp.rs"]
pub mod support;

use support::{Kind, ROOM, Server};

/// Says loudly why a test cannot run here.
pub fn missing_tool() -> bool {
    if !Kind::usual().is_there("the test") {
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: building components needs root");
        return true;
    }
    lacks(&["qemu-system-x86_64", "qemu-img", "mmdebstrap"])
}

/// Whether a program is missing, which is said loudly.
pub fn lacks(tools: &[&str]) -> bool {
    let found = |tool: &&str| {
        let mut look = Command::new("sh");
        look.args(["-c", &format!("command -v {tool}")]).stdout(Stdio::null());
        look.status().is_ok_and(|s| s.success())
    };
    let missing: Vec<_> = tools.iter().filter(|t| !found(t)).copied().collect();
    if !missing.is_empty() {
        let missing = missing.join(", ");
        let _ =
            writeln!(std::io::stderr(), "SKIPPED: not installed: {missing} (deploy/install installs them)");
    }
    !missing.is_empty()
}

/// Configuration of a broker that sends this slowly.
pub fn capped(bandwidth_limit: &str) -> String {
    format!(
        "[transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\nbandwidth_limit = \"{bandwidth_limit}\"\n"
    )
}

/// Guests run in software emulation on few cores: one world at a time.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// The components of these definition files, built once a test run and kept between runs.
pub struct Built {
    pub repository: Repository,
    pub ids: Vec<ComponentId>,
}

pub fn components(files: &[&str]) -> Built {
    static OPEN: OnceLock<Repository> = OnceLock::new();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("components");
    let repository =
        OPEN.get_or_init(|| Repository::open_or_create(&dir.join("repository")).unwrap()).clone();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("components");
    let files: Vec<PathBuf> = files.iter().map(|f| root.join(format!("{f}.toml"))).collect();
    let options = BuildOptions { cache_dir: dir.join("cache"), keep_failed: false, rebuild: false };
    let built = build(&repository, &files, &options, &mut |event| eprintln!("  {event:?}"))
        .expect("components build");
    Built { repository, ids: built.into_iter().map(|b| b.id).collect() }
}

impl Built {
    /// Stored bytes of a component: what its worst case costs on the wire, manifest included.
    pub fn stored_bytes(&self, id: &ComponentId) -> u64 {
        let m = self.repository.manifest(id).unwrap();
        let packs: u64 =
            m.packs.iter().map(|p| self.repository.pack_stored(&p.id).unwrap().stored_size_bytes).sum();
        packs + self.repository.manifest_stored_bytes(id).unwrap()
    }

    pub fn name(&self, id: &ComponentId) -> String {
        let m = self.repository.manifest(id).unwrap();
        format!("{}@{}", m.name, m.version)
    }
}

/// Everything of one test: a directory, an XMPP server and some clouds.
pub struct World {
    /// Stopped before its directory goes.
    pub xmpp: Server,
    pub dir: tempfile::TempDir,
    pub clouds: Vec<Cloud>,
    runtime: tokio::runtime::Runtime,
}

pub struct Cloud {
    pub name: String,
    pub dir: PathBuf,
    broker: Option<Child>,
    /// Where its broker finds the XMPP server.
    pub xmpp_port: u16,
    /// What its broker has in its environment, beside ours.
    pub environment: Vec<(String, PathBuf)>,
    /// More arguments of its broker.
    pub arguments: Vec<String>,
}

impl World {
    /// Starts a server and brokers of these names, all members of one room that trust each other.
    pub fn start(names: &[&str]) -> Self {
        Self::start_with(names, &[], "")
    }

    /// As `start`, with accounts that are members too and whose sessions the test plays itself, and
    /// with settings beside the usual ones.
    pub fn start_with(names: &[&str], played: &[&str], extra: &str) -> Self {
        let mut world = Self::prepare(names, played, 30);
        for cloud in 0..names.len() {
            world.configure(cloud, extra);
            world.start_broker(cloud);
        }
        world.wait_online();
        world
    }

    /// The server and the room for brokers that are to be configured and started.
    pub fn prepare(names: &[&str], played: &[&str], hibernation_s: u32) -> Self {
        let dir = tempfile::Builder::new().prefix("cicada-").tempdir().unwrap();
        let accounts = [names, played, &["outsider"]].concat();
        let hibernation = Duration::from_secs(hibernation_s.into());
        let xmpp = Server::start(Kind::usual(), dir.path().join("xmpp"), &accounts, hibernation);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut world = Self { xmpp, clouds: Vec::new(), runtime, dir };
        world.runtime.block_on(async {
            let admin = Admin::open(world.account("admin")).await.unwrap();
            admin.create_room("lobby", &Owners::default()).await.unwrap();
            for name in names.iter().chain(played) {
                admin.add_member(&format!("{name}@federation.test").parse().unwrap()).await.unwrap();
            }
            admin.close().await;
        });
        for name in names {
            let dir = world.dir.path().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            let environment = Vec::new();
            world.clouds.push(Cloud {
                name: (*name).into(),
                dir,
                broker: None,
                xmpp_port: world.xmpp.port,
                environment,
                arguments: Vec::new(),
            });
        }
        world
    }

    pub fn account(&self, name: &str) -> cicada::xmpp::Settings {
        self.xmpp.settings(name)
    }

    /// Writes a cloud's configuration, with `extra` appended.
    pub fn configure(&self, cloud: usize, extra: &str) {
        let c = &self.clouds[cloud];
        let (name, port) = (&c.name, c.xmpp_port);
        // The server's directory is its user's, who could put something else in a file's place.
        let password = c.dir.join("password");
        if let Ok(text) = std::fs::read(self.xmpp.password_file(name)) {
            use std::os::unix::fs::PermissionsExt;
            std::fs::write(&password, text).unwrap();
            std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let password = password.display();
        let (data, ca) = (c.dir.join("data").display().to_string(), self.xmpp.ca_file());
        let ca = ca.display();
        let text = format!(
            "[cloud]\nname = \"{name}\"\ndata_dir = \"{data}\"\n\
             [xmpp]\njid = \"{name}@federation.test\"\npassword_file = \"{password}\"\n\
             server = \"127.0.0.1:{port}\"\nca_file = \"{ca}\"\nroom = \"{ROOM}\"\n\
             [hypervisor]\ncpus = 4\ncpu_overcommit = 1\nmemory = \"2G\"\nstorage_overcommit = 4\nstorage_floor = \"16M\"\n[members]\nshare = 1\n[[network]]\nname = \"lan\"\nkind = \"user\"\n\
             [trust]\ntrust_on_first_use = true\n{extra}\n"
        );
        let transfer = if extra.contains("[transfer]") {
            ""
        } else {
            "[transfer]\nlisten = \"127.0.0.1:0\"\npeer_networks = [\"127.0.0.0/8\"]\n"
        };
        std::fs::write(c.dir.join("federation.toml"), text + transfer).unwrap();
    }

    pub fn spawn_broker(&self, cloud: usize) -> Child {
        let c = &self.clouds[cloud];
        let log = std::fs::OpenOptions::new().create(true).append(true).open(c.dir.join("log")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_cicada"))
            .args(["--config", &c.dir.join("federation.toml").display().to_string(), "broker"])
            .args(&c.arguments)
            .envs(c.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    pub fn start_broker(&mut self, cloud: usize) {
        self.clouds[cloud].broker = Some(self.spawn_broker(cloud));
        self.wait("the broker answers", 30, |w| w.call(cloud, &Request::Cloud(CloudRequest::Status)).is_ok());
    }

    /// Ends a broker: with TERM, or as a crash.
    pub fn stop_broker(&mut self, cloud: usize, crash: bool) {
        let Some(mut child) = self.clouds[cloud].broker.take() else { return };
        if crash {
            child.kill().unwrap();
        } else {
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        }
        child.wait().unwrap();
    }

    /// Waits until a broker ends by itself.
    pub fn wait_end(&mut self, cloud: usize) -> Result<(), String> {
        let Some(mut child) = self.clouds[cloud].broker.take() else { return Err("it does not run".into()) };
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            if child.try_wait().unwrap().is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.clouds[cloud].broker = Some(child);
        Err("the broker goes on".into())
    }

    /// Starts a broker anew with `extra` in its configuration.
    pub fn reconfigure(&mut self, cloud: usize, extra: &str) {
        self.stop_broker(cloud, false);
        self.configure(cloud, extra);
        self.start_broker(cloud);
        self.wait_online();
    }

    /// Waits until all members see and trust each other.
    pub fn wait_online(&self) {
        let sees = |w: &Self, cloud: usize, other: &Cloud| {
            let is_there = |m: &MemberView| {
                m.state == cicada::interface::MemberState::Online
                    && m.trust == cicada::interface::MemberTrust::Trusted
            };
            w.members(cloud).iter().any(|m| m.jid.as_str().starts_with(&other.name) && is_there(m))
        };
        self.wait("all members see each other", 60, |w| {
            let clouds = || w.clouds.iter().enumerate();
            clouds().all(|(i, _)| clouds().all(|(j, other)| i == j || sees(w, i, other)))
        });
    }

    /// To a broker that runs, such as STOP and CONT.
    pub fn signal_broker(&self, cloud: usize, signal: rustix::process::Signal) {
        let child = self.clouds[cloud].broker.as_ref().expect("no broker runs");
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
    }

    pub fn socket(&self, cloud: usize) -> PathBuf {
        self.clouds[cloud].dir.join("data/cicada.sock")
    }

    pub fn log(&self, cloud: usize) -> String {
        std::fs::read_to_string(self.clouds[cloud].dir.join("log")).unwrap_or_default()
    }

    pub fn call(&self, cloud: usize, request: &Request) -> Result<Reply, Problem> {
        self.call_with(cloud, request, |_| {})
    }

    pub fn call_with(
        &self,
        cloud: usize,
        request: &Request,
        on_event: impl FnMut(Event),
    ) -> Result<Reply, Problem> {
        let socket = self.socket(cloud);
        self.runtime.block_on(async { Client::connect(&socket).await?.call(request, on_event).await })
    }

    pub fn members(&self, cloud: usize) -> Vec<MemberView> {
        match self.call(cloud, &Request::Cloud(CloudRequest::Members)) {
            Ok(Reply::Members(m)) => m,
            other => panic!("{other:?}"),
        }
    }

    pub fn status(&self, cloud: usize) -> StatusView {
        match self.call(cloud, &Request::Cloud(CloudRequest::Status)) {
            Ok(Reply::Status(s)) => *s,
            other => panic!("{other:?}"),
        }
    }

    pub fn vms(&self, cloud: usize) -> Vec<VmView> {
        match self.call(cloud, &Request::Vm(VmRequest::List)) {
            Ok(Reply::Vms(v)) => v,
            other => panic!("{other:?}"),
        }
    }

    pub fn vm(&self, cloud: usize, name: &str) -> VmView {
        match self.call(cloud, &Request::Vm(VmRequest::Show { vm: name.into() })) {
            Ok(Reply::Vm(v)) => *v,
            other => panic!("{other:?}"),
        }
    }

    pub fn plan(&self, cloud: usize, vm: &str) -> PlanView {
        match self.call(cloud, &Request::Move(MoveRequest::Plan { vm: vm.into(), to: None, all: false })) {
            Ok(Reply::Plan(p)) => p,
            other => panic!("{other:?}"),
        }
    }

    /// Moves a VM and returns the account.
    pub fn move_vm(&self, cloud: usize, vm: &str, to: &str) -> MigrationView {
        let request = Request::Move(MoveRequest::Begin {
            vm: vm.into(),
            to: Some(to.into()),
            dry_run: false,
            force_stop: false,
        });
        match self.call(cloud, &request) {
            Ok(Reply::Migration(m)) => *m,
            other => panic!("{other:?}\n--- source log\n{}", self.log(cloud)),
        }
    }

    /// Begins a move in the background; the thread ends with it.
    pub fn begin_move(&self, cloud: usize, vm: &str, to: Option<&str>) -> JoinHandle<Result<Reply, Problem>> {
        let socket = self.socket(cloud);
        let request = Request::Move(MoveRequest::Begin {
            vm: vm.into(),
            to: to.map(Into::into),
            dry_run: false,
            force_stop: false,
        });
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { Client::connect(&socket).await?.call(&request, |_| {}).await })
        })
    }

    pub fn migrations(&self, cloud: usize) -> Vec<MigrationView> {
        match self.call(cloud, &Request::Move(MoveRequest::List)) {
            Ok(Reply::Migrations(all)) => all,
            other => panic!("{other:?}"),
        }
    }

    /// Puts components into a cloud's repository, as `component build` does.
    pub fn push(&self, cloud: usize, built: &Built, ids: &[ComponentId]) {
        let socket = self.socket(cloud);
        self.runtime.block_on(async {
            let client = Client::connect(&socket).await.unwrap();
            for id in ids {
                let manifest = built.repository.manifest(id).unwrap();
                for pack in &manifest.packs {
                    let stored = built.repository.pack_stored(&pack.id).unwrap();
                    let file = tokio::fs::File::from_std(stored.file);
                    let body = tokio_util::io::ReaderStream::with_capacity(file, 256 << 10).boxed();
                    client
                        .put_object(ObjectKind::Pack, pack.id.0, stored.stored_size_bytes, body)
                        .await
                        .unwrap();
                }
                let bytes = built.repository.manifest_bytes(id).unwrap();
                let size = bytes.len() as u64;
                let body = futures::stream::iter([Ok(bytes.into())]).boxed();
                client.put_object(ObjectKind::Manifest, id.0, size, body).await.unwrap();
                client
                    .call(&Request::Content(ContentRequest::ComponentBind { id: *id }), |_| {})
                    .await
                    .unwrap();
            }
        });
    }

    pub fn create_vm(
        &self,
        cloud: usize,
        name: &str,
        ids: &[ComponentId],
        user_data_mib: u64,
        start: bool,
    ) -> VmView {
        let request = Request::Vm(VmRequest::Create(VmCreate {
            name: name.parse().unwrap(),
            components: ids.iter().map(ToString::to_string).collect(),
            ordered: false,
            root_size: ByteSize::mib(512),
            user_data_size: ByteSize::mib(user_data_mib),
            memory: ByteSize::mib(256),
            cpus: 1,
            networks: vec!["lan".into()],
            kernel_command_line: "console=ttyS0 quiet".into(),
            start,
            hardware: Default::default(),
        }));
        match self.call(cloud, &request) {
            Ok(Reply::Vm(v)) => *v,
            other => panic!("{other:?}\n{}", self.log(cloud)),
        }
    }

    /// Waits for the guest's own ready line.
    /// A VM of a small disk of noise, which nothing boots from, and which differs by its name; stopped and
    /// without cards unless `change` says otherwise.
    pub fn noise_vm(
        &self,
        cloud: usize,
        name: &str,
        len: usize,
        change: impl FnOnce(&mut VmAdopt),
    ) -> VmView {
        match self.try_noise_vm(cloud, name, len, change) {
            Ok(Reply::Adopted(adopted)) => *adopted.vm.unwrap(),
            other => panic!("{other:?}\n{}", self.log(cloud)),
        }
    }

    /// As [`World::noise_vm`], with the answer.
    pub fn try_noise_vm(
        &self,
        cloud: usize,
        name: &str,
        len: usize,
        change: impl FnOnce(&mut VmAdopt),
    ) -> Result<Reply, Problem> {
        let disk = self.clouds[cloud].dir.join(format!("{name}.raw"));
        let mut noise = vec![0; len];
        blake3::Hasher::new().update(name.as_bytes()).finalize_xof().fill(&mut noise);
        std::fs::write(&disk, noise).unwrap();
        let mut adopt = VmAdopt {
            name: name.parse().unwrap(),
            disk: disk.display().to_string(),
            user_data: None,
            format: "raw".into(),
            architecture: "amd64".into(),
            firmware: Firmware::Bios,
            memory: ByteSize::mib(64),
            cpus: 1,
            networks: Vec::new(),
            share: false,
            dry_run: false,
            start: false,
            hardware: Default::default(),
            nvram: None,
        };
        change(&mut adopt);
        self.call(cloud, &Request::Vm(VmRequest::Adopt(adopt)))
    }

    pub fn wait_booted(&self, cloud: usize, vm: &str, seconds: u64) {
        let log = self.vm(cloud, vm).console_log;
        self.wait("the guest is ready", seconds, |_| {
            std::fs::read(&log).is_ok_and(|text| {
                text.windows(cicada::broker::READY_LINE.len())
                    .any(|w| w == cicada::broker::READY_LINE.as_bytes())
            })
        });
    }

    pub fn wait(&self, what: &str, seconds: u64, condition: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !condition(self) {
            if begun.elapsed() > Duration::from_secs(seconds) {
                let logs: Vec<_> = (0..self.clouds.len()).map(|i| self.log(i)).collect();
                panic!("not within {seconds} s: {what}\n{}", logs.join("\n---\n"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Types a command at the guest's console and returns what it printed until the marker.
    pub fn guest(&self, cloud: usize, vm: &str, command: &str) -> String {
        let mut console = UnixStream::connect(self.vm(cloud, vm).console_socket).unwrap();
        console.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        // The echo of the command must not look like its end.
        console.write_all(format!("\n{command}; echo mark''er-$?\n").as_bytes()).unwrap();
        let (mut seen, begun) = (Vec::new(), Instant::now());
        while begun.elapsed() < Duration::from_secs(60) {
            let mut buffer = [0; 4096];
            if let Ok(n) = console.read(&mut buffer) {
                seen.extend_from_slice(&buffer[..n]);
            }
            let text = String::from_utf8_lossy(&seen).into_owned();
            if let Some(end) = text.find("marker-") {
                let Some(code) = text[end..].strip_prefix("marker-").and_then(|t| t.chars().next()) else {
                    continue;
                };
                assert_eq!(code, '0', "failed in the guest: {text}");
                return text[..end].to_owned();
            }
        }
        panic!("the guest does not answer: {}", String::from_utf8_lossy(&seen));
    }

    /// Files below a cloud's VM directories, without what a running VM has.
    pub fn vm_files(&self, cloud: usize) -> Vec<PathBuf> {
        let mut out = Vec::new();
        let mut todo = vec![self.clouds[cloud].dir.join("data/vms")];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.path().is_dir() { todo.push(entry.path()) } else { out.push(entry.path()) }
            }
        }
        out
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for cloud in 0..self.clouds.len() {
            for vm in self.clouds[cloud]
                .broker
                .is_some()
                .then(|| self.call(cloud, &Request::Vm(VmRequest::List)))
                .into_iter()
                .flatten()
            {
                let Reply::Vms(vms) = vm else { continue };
                for vm in vms.iter().filter(|v| v.ownership == cicada::interface::VmOwnership::Here) {
                    let _ = self.call(
                        cloud,
                        &Request::Vm(VmRequest::Stop {
                            vm: vm.name.to_string(),
                            force: true,
                            timeout_s: Some(5),
                            for_host: false,
                        }),
                    );
                }
            }
            self.stop_broker(cloud, false);
        }
        // Guests of a test that failed half-way.
        let _ = Command::new("pkill").args(["-9", "-f", &self.dir.path().display().to_string()]).status();
    }
}
