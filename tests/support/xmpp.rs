//! Real XMPP servers for tests, started by `deploy/xmpp/server` as the demo does: this system's Prosody and
//! ejabberd, and those of Debian 13 in the tree that `deploy/debian-13` makes. Suites about XMPP run against all
//! that are there ([`on_every_server`]), the rest against one: Prosody, or what `CICADA_XMPP_SERVER` names.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use cicada::xmpp::{Security, Settings};

pub const DOMAIN: &str = "federation.test";
pub const ROOM: &str = "lobby@rooms.federation.test";
/// Exit code of `deploy/xmpp/server` when another program has the port.
const PORT_TAKEN: i32 = 7;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Software {
    Prosody,
    Ejabberd,
}

/// A server that tests can run against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kind {
    pub software: Software,
    /// Debian 13's, beside this system's own.
    pub debian_13: bool,
}

impl Kind {
    pub const PROSODY: Self = Self { software: Software::Prosody, debian_13: false };
    pub const EJABBERD: Self = Self { software: Software::Ejabberd, debian_13: false };
    pub const DEBIAN_13_PROSODY: Self = Self { software: Software::Prosody, debian_13: true };
    pub const DEBIAN_13_EJABBERD: Self = Self { software: Software::Ejabberd, debian_13: true };
    const ALL: [Self; 4] = [Self::PROSODY, Self::EJABBERD, Self::DEBIAN_13_PROSODY, Self::DEBIAN_13_EJABBERD];

    pub fn name(self) -> String {
        let software = self.software_name();
        if self.debian_13 { format!("debian-13-{software}") } else { software.to_owned() }
    }

    fn software_name(self) -> &'static str {
        match self.software {
            Software::Prosody => "prosody",
            Software::Ejabberd => "ejabberd",
        }
    }

    /// The one that suites which are not about XMPP use.
    pub fn usual() -> Self {
        let Ok(name) = std::env::var("CICADA_XMPP_SERVER") else { return Self::PROSODY };
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.unwrap_or_else(|| {
            let names: Vec<_> = Self::ALL.into_iter().map(Self::name).collect();
            panic!("CICADA_XMPP_SERVER is {name}, and none of {}", names.join(", "))
        })
    }

    /// Why it cannot run here; `None` if it can.
    pub fn missing(self) -> Option<String> {
        for tool in ["openssl", "setpriv"] {
            if !has_program(tool) {
                return Some(format!("{tool} is not installed (deploy/install installs it)"));
            }
        }
        let program = match self.software {
            Software::Prosody => "prosodyctl",
            Software::Ejabberd => "ejabberdctl",
        };
        if !self.debian_13 {
            let missing = !has_program(program);
            return missing
                .then(|| format!("{} is not installed (deploy/install installs it)", self.software_name()));
        }
        let tree = tree_of_debian_13();
        if !["bin", "sbin"].iter().any(|dir| tree.join("usr").join(dir).join(program).exists()) {
            let tree = tree.display();
            return Some(format!("there is no Debian 13 in {tree} (deploy/debian-13 servers makes it)"));
        }
        let root = rustix::process::geteuid().is_root();
        (!root).then(|| "running a server of Debian 13 needs root".to_owned())
    }

    /// Whether it can run here. Where it cannot, that is said loudly.
    pub fn is_there(self, test: &str) -> bool {
        // On Debian 13 they are this system's own.
        if self.debian_13 && is_debian_13() {
            return false;
        }
        let missing = self.missing();
        if let Some(reason) = &missing {
            // Past the runner's capture.
            let line = format!("SKIPPED: {test} against {}: {reason}\n", self.name());
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
        missing.is_none()
    }
}

fn has_program(name: &str) -> bool {
    let mut look = Command::new("sh");
    look.args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin; command -v {name}")]).stdout(Stdio::null());
    look.status().is_ok_and(|s| s.success())
}

fn is_debian_13() -> bool {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    release.lines().any(|l| l == "VERSION_ID=\"13\"")
}

fn tree_of_debian_13() -> &'static Path {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let output = Command::new(script("deploy/debian-13")).arg("where").output().unwrap();
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
    })
}

fn script(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A server of its own in a directory, stopped with it.
pub struct Server {
    pub kind: Kind,
    pub dir: PathBuf,
    /// Of direct TLS; StartTLS is one below.
    pub port: u16,
}

impl Server {
    /// `dir` is its own; others must be able to enter what is above it. The accounts, beside `admin`, may not make
    /// rooms.
    pub fn start(kind: Kind, dir: PathBuf, accounts: &[&str], hibernation: Duration) -> Self {
        let (accounts, hibernation) = (accounts.join(","), hibernation.as_secs().to_string());
        // Another test may take the port between the look and the start.
        for _ in 0..5 {
            let port = free_port();
            let number = port.to_string();
            let mut start = Command::new(script("deploy/xmpp/server"));
            start.arg("start").arg(&dir).args(["--server", kind.software_name(), "--accounts", &accounts]);
            start.args(["--port", &number, "--hibernation", &hibernation]);
            if kind.debian_13 {
                start.arg("--debian-13");
            }
            let status = start.status().unwrap();
            if status.success() {
                return Self { kind, dir, port };
            }
            assert_eq!(status.code(), Some(PORT_TAKEN), "{} does not start", kind.name());
        }
        panic!("no port is free for {}", kind.name());
    }

    pub fn stop(&self) {
        self.run("stop");
    }

    pub fn restart(&self) {
        self.run("restart");
    }

    fn run(&self, verb: &str) {
        let status = Command::new(script("deploy/xmpp/server")).arg(verb).arg(&self.dir).status().unwrap();
        assert!(status.success(), "server {verb}");
    }

    /// As a crash of the server. What it confirmed is there afterwards: ejabberd writes rooms and members down up
    /// to two seconds later.
    pub fn kill(&self) {
        if self.kind.software == Software::Ejabberd {
            std::thread::sleep(Duration::from_secs(3));
        }
        let pid = std::fs::read_to_string(self.dir.join("server.pid")).unwrap();
        assert!(Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
    }

    pub fn ca_file(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    pub fn password_file(&self, account: &str) -> PathBuf {
        self.dir.join(format!("accounts/{account}.password"))
    }

    pub fn settings(&self, account: &str) -> Settings {
        Settings {
            jid: format!("{account}@{DOMAIN}").parse().unwrap(),
            password: std::fs::read_to_string(self.password_file(account)).unwrap().trim().to_owned(),
            server: Some(format!("127.0.0.1:{}", self.port)),
            security: Security::DirectTls,
            ca_file: Some(self.ca_file()),
            rules: Default::default(),
            room: Some(ROOM.into()),
            nick: account.parse().unwrap(),
        }
    }

    /// From now on with a changed configuration.
    pub fn reconfigure(&self, change: impl Fn(&str) -> String) {
        let file = match self.kind.software {
            Software::Prosody => self.dir.join("prosody.cfg.lua"),
            Software::Ejabberd => self.dir.join("ejabberd.yml"),
        };
        let before = std::fs::read_to_string(&file).unwrap();
        let after = change(&before);
        assert_ne!(before, after, "nothing was changed in {}", file.display());
        std::fs::write(&file, after).unwrap();
        self.restart();
    }

    /// From now on every account may make rooms, and a new room is as the server makes it by itself.
    pub fn let_everybody_make_rooms(&self) {
        self.reconfigure(|text| match self.kind.software {
            Software::Prosody => {
                let keep =
                    |line: &&str| !line.contains("muc_room_default") && !line.contains("muc_room_locking");
                let lines: Vec<_> = text.lines().filter(keep).collect();
                // What 0.12 knows as a restriction is none from 13 on, so it is left out.
                lines.join("\n").replace("restrict_room_creation = true", "restrict_room_creation = false")
            }
            Software::Ejabberd => {
                let end = text.find("    default_room_options").unwrap();
                text[..end].replace("access_create: administrators", "access_create: all")
            }
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new(script("deploy/xmpp/server")).arg("stop").arg(&self.dir).status();
    }
}

/// One whose neighbour below is free as well.
fn free_port() -> u16 {
    let bind = |port| std::net::TcpListener::bind(("127.0.0.1", port));
    loop {
        let port = bind(0).unwrap().local_addr().unwrap().port();
        if bind(port - 1).is_ok() {
            return port;
        }
    }
}

/// Makes each `async fn name(kind: Kind)` a test against every server, called `prosody::name` and so on. Those
/// that are not there are said to be skipped.
#[allow(unused_macros)]
macro_rules! on_every_server {
    ($($name:ident),* $(,)?) => {
        on_every_server!(@of prosody PROSODY $($name)*);
        on_every_server!(@of ejabberd EJABBERD $($name)*);
        on_every_server!(@of debian_13_prosody DEBIAN_13_PROSODY $($name)*);
        on_every_server!(@of debian_13_ejabberd DEBIAN_13_EJABBERD $($name)*);
    };
    (@of $module:ident $kind:ident $($name:ident)*) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let kind = super::support::Kind::$kind;
                    if kind.is_there(stringify!($name)) {
                        super::$name(kind).await;
                    }
                }
            )*
        }
    };
}
#[allow(unused_imports)]
pub(crate) use on_every_server;
