//! A machine as QEMU's command line. Pure.
//!
//! What the guest sees (machine type, CPU, devices and their PCI slots) depends on the machine
//! alone, never on the host: it stays the same wherever the VM runs, and when a disk is added.
//!
//! The command line names no file of the VM. What QEMU needs of them it inherits open, so that it can be
//! a user who may open none of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::config::NetworkBackend;
use crate::hypervisor::error::list;
use crate::hypervisor::{Accelerator, DiskFormat, DriverError, Machine};
use crate::types::VmId;
use crate::vm::hypervisor::Lack;
use crate::vm::spec::Nic;
use crate::vm::{CardModel, DiskBus, Firmware};

/// Names inside a VM's state directory: see `STATE.md`.
pub mod file {
    pub const QMP: &str = "qmp.sock";
    pub const CONSOLE: &str = "con.sock";
    pub const AGENT: &str = "qga.sock";
    pub const NBD: &str = "nbd.sock";
    pub const CONSOLE_LOG: &str = "console.log";
    pub const STDERR_LOG: &str = "qemu.log";
    pub const RECORD: &str = "qemu.pid";
}

/// Names of the disks' block nodes, which take the guest's requests.
pub mod node {
    pub const ROOT: &str = "root";
    pub const USER_DATA: &str = "user-data";
}

/// PCI slots. Linux names network cards by theirs.
mod slot {
    pub const ROOT: usize = 0x02;
    pub const USER_DATA: usize = 0x03;
    pub const RNG: usize = 0x04;
    pub const SERIAL: usize = 0x05;
    pub const SCSI: usize = 0x06;
    pub const NIC_FIRST: usize = 0x08;
}

/// What the host adds to a machine.
#[derive(Clone, Debug)]
pub struct Host {
    pub accelerator: Accelerator,
    pub machine_type: String,
    pub firmware_code: PathBuf,
    pub networks: BTreeMap<String, NetworkBackend>,
    /// Whether cards of user networks get a process of their own (`link.rs`), or QEMU's built-in
    /// address translation, from which this host's own services can be reached.
    pub isolates: bool,
    /// Whether QEMU can confine itself by seccomp here.
    pub sandbox: bool,
}

/// What the driver opens and QEMU inherits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Handed {
    /// Connections to a socket made at this path.
    Listen(PathBuf),
    Append(PathBuf),
    Read(PathBuf),
    Write(PathBuf),
    /// The other end of a card.
    Card(Link),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Link {
    /// See `link.rs`.
    Isolated,
    /// A tap device in the bridge of this name.
    Bridge(String),
}

/// Opens something and gives the number of its descriptor, which QEMU is to inherit.
type Open<'o> = &'o mut dyn FnMut(Handed) -> Result<i32, DriverError>;

/// The command line, without the program's name.
pub fn argv(machine: &Machine, host: &Host, open: Open) -> Result<Vec<String>, DriverError> {
    let vm = machine.spec.id;
    let mut a = Args { vm, open, out: Vec::new() };
    a.general(machine, host);
    if machine.spec.firmware == Firmware::Uefi {
        a.firmware(machine, host)?;
    }
    a.control(machine)?;
    // Without this QEMU would look for the base where the overlay's header says it lies.
    let base = machine.base.as_deref().filter(|_| machine.root_format == DiskFormat::Qcow2);
    let bus = machine.spec.disk_bus;
    if bus == DiskBus::Scsi {
        a.device(SCSI_CONTROLLER, slot::SCSI, json!({"id": "scsi"}));
    }
    a.disk(node::ROOT, slot::ROOT, machine.root_format.name(), &machine.root_disk, base, bus)?;
    if let Some(path) = &machine.user_data_disk {
        a.disk(node::USER_DATA, slot::USER_DATA, "raw", path, None, bus)?;
    }
    a.json("-object", json!({"qom-type": "rng-random", "id": "rng", "filename": "/dev/urandom"}));
    a.device("virtio-rng-pci", slot::RNG, json!({"id": "rng0", "rng": "rng"}));
    a.console_and_agent(machine)?;
    for (i, nic) in machine.spec.nics.iter().enumerate() {
        a.nic(i, nic, host)?;
    }
    Ok(a.out)
}

struct Args<'o> {
    vm: VmId,
    open: Open<'o>,
    out: Vec<String>,
}

impl Args<'_> {
    fn arg(&mut self, flag: &str, value: impl Into<String>) {
        self.out.extend([flag.to_owned(), value.into()]);
    }

    fn json(&mut self, flag: &str, value: Value) {
        self.arg(flag, value.to_string());
    }

    fn device(&mut self, driver: &str, slot: usize, mut rest: Value) {
        rest["driver"] = driver.into();
        rest["bus"] = "pcie.0".into();
        rest["addr"] = format!("{slot:#x}").into();
        self.json("-device", rest);
    }

    /// Hands over a file; gives the name by which QEMU opens what it inherited. The real one stands
    /// beside it for whoever reads the command line.
    fn file(&mut self, path: &Path, how: fn(PathBuf) -> Handed) -> Result<String, DriverError> {
        let Some(text) = path.to_str() else {
            return Err(DriverError::PathNotUtf8 { vm: self.vm, path: path.to_owned() });
        };
        let opaque = opaque(text);
        let fd = (self.open)(how(path.to_owned()))?;
        self.arg("-add-fd", format!("fd={fd},set={fd}{opaque}"));
        Ok(format!("/dev/fdset/{fd}"))
    }

    fn general(&mut self, machine: &Machine, host: &Host) {
        let spec = &machine.spec;
        self.arg("-name", format!("guest={},debug-threads=on", spec.name));
        self.arg("-uuid", spec.id.to_string());
        self.out.extend(["-nodefaults", "-no-user-config"].map(String::from));
        self.arg("-display", "none");
        let firmware = match spec.firmware {
            Firmware::Uefi => "pflash0=firmware-code,pflash1=firmware-vars",
            // There is no graphics card: SeaBIOS then talks over the serial port.
            Firmware::Bios => "graphics=off",
        };
        self.arg(
            "-machine",
            format!("{},smm=off,vmport=off,dump-guest-core=off,{firmware}", host.machine_type),
        );
        self.arg(
            "-accel",
            match host.accelerator {
                Accelerator::Kvm => "kvm",
                Accelerator::Tcg | Accelerator::Simulated => "tcg,thread=multi",
            },
        );
        // A guest must find what its model promises, or it cannot move.
        self.arg("-cpu", format!("{},enforce", spec.cpu_model));
        self.arg("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", spec.cpus));
        self.arg("-m", format!("size={}M", spec.memory.mib_ceil()));
        self.arg("-rtc", "base=utc");
        self.arg("-boot", "strict=on");
        self.arg("-smbios", format!("type=11,value=cicada.name={}", spec.name));
        if let Some(uuid) = spec.system_uuid {
            // Instead of that of `-uuid`, which stays a mark of this process.
            self.arg("-smbios", format!("type=1,uuid={uuid}"));
        }
        if host.sandbox {
            self.arg("-sandbox", SANDBOX);
        }
    }

    fn firmware(&mut self, machine: &Machine, host: &Host) -> Result<(), DriverError> {
        let code = self.file(&host.firmware_code, Handed::Read)?;
        let vars = self.file(&machine.firmware_vars, Handed::Write)?;
        self.json(
            "-blockdev",
            json!({"driver": "raw", "node-name": "firmware-code", "read-only": true,
                   "file": {"driver": "file", "filename": code}}),
        );
        self.json(
            "-blockdev",
            json!({"driver": "raw", "node-name": "firmware-vars",
                   "file": {"driver": "file", "filename": vars}}),
        );
        Ok(())
    }

    fn socket(&mut self, id: &str, machine: &Machine, name: &str, more: &str) -> Result<(), DriverError> {
        let fd = (self.open)(Handed::Listen(machine.state_dir.join(name)))?;
        self.arg("-chardev", format!("socket,id={id},fd={fd},server=on,wait=off{more}"));
        Ok(())
    }

    fn control(&mut self, machine: &Machine) -> Result<(), DriverError> {
        self.socket("qmp", machine, file::QMP, "")?;
        self.arg("-mon", "chardev=qmp,mode=control");
        Ok(())
    }

    fn disk(
        &mut self,
        name: &str,
        slot: usize,
        format: &str,
        path: &Path,
        base: Option<&Path>,
        bus: DiskBus,
    ) -> Result<(), DriverError> {
        let name_inherited = self.file(path, Handed::Write)?;
        let mut disk = json!({"driver": format, "node-name": name, "discard": "unmap",
                              "detect-zeroes": "unmap",
                              "file": {"driver": "file", "filename": name_inherited, "discard": "unmap"}});
        if let Some(base) = base {
            let base = self.file(base, Handed::Read)?;
            disk["backing"] = json!({"driver": "raw", "read-only": true,
                                     "file": {"driver": "file", "filename": base}});
        }
        self.json("-blockdev", disk);
        let mut device = json!({"id": format!("{name}-disk"), "drive": name, "serial": name});
        if name == node::ROOT {
            device["bootindex"] = 1.into();
        }
        let driver = disk_driver(bus);
        match bus {
            DiskBus::Virtio | DiskBus::Nvme => self.device(driver, slot, device),
            DiskBus::Scsi | DiskBus::Sata => {
                let port = slot - slot::ROOT;
                device["driver"] = driver.into();
                match bus {
                    // Ports of the controller that every q35 has.
                    DiskBus::Sata => device["bus"] = format!("ide.{port}").into(),
                    _ => (device["bus"], device["scsi-id"]) = ("scsi.0".into(), port.into()),
                }
                self.json("-device", device);
            }
        }
        Ok(())
    }

    fn console_and_agent(&mut self, machine: &Machine) -> Result<(), DriverError> {
        let log = self.file(&machine.state_dir.join(file::CONSOLE_LOG), Handed::Append)?;
        self.socket("console", machine, file::CONSOLE, &format!(",logfile={log},logappend=on"))?;
        self.json("-device", json!({"driver": "isa-serial", "id": "serial0", "chardev": "console"}));
        self.socket("agent", machine, file::AGENT, "")?;
        self.device("virtio-serial-pci", slot::SERIAL, json!({"id": "ports"}));
        self.json(
            "-device",
            json!({"driver": "virtserialport", "id": "agent0", "bus": "ports.0", "chardev": "agent",
                   "name": "org.qemu.guest_agent.0"}),
        );
        Ok(())
    }

    fn nic(&mut self, index: usize, nic: &Nic, host: &Host) -> Result<(), DriverError> {
        let network = nic.network.as_str();
        let backend = host.networks.get(network).ok_or_else(|| {
            let offered = list(host.networks.keys());
            let lack = Lack { what: "network", asked: network.to_owned(), offered };
            DriverError::not_offered(self.vm, lack)
        })?;
        let netdev = format!("net{index}");
        // No option ROM: guests boot from their disk, and the ROM would have to travel.
        let mut device = json!({"id": format!("nic{index}"), "mac": nic.mac.to_string(), "romfile": ""});
        match backend {
            NetworkBackend::User if host.isolates => {
                let fd = (self.open)(Handed::Card(Link::Isolated))?.to_string();
                let address = json!({"type": "fd", "str": fd});
                self.json(
                    "-netdev",
                    json!({"type": "stream", "id": netdev, "server": false, "addr": address}),
                );
            }
            NetworkBackend::User => self.json("-netdev", json!({"type": "user", "id": netdev})),
            NetworkBackend::Bridge(bridge) => {
                let fd = (self.open)(Handed::Card(Link::Bridge(bridge.clone())))?.to_string();
                self.json("-netdev", json!({"type": "tap", "id": netdev, "fd": fd}));
            }
            NetworkBackend::None => {}
        }
        if *backend != NetworkBackend::None {
            device["netdev"] = netdev.into();
        }
        self.device(card_driver(nic.model), slot::NIC_FIRST + index, device);
        Ok(())
    }
}

const SCSI_CONTROLLER: &str = "virtio-scsi-pci";

fn disk_driver(bus: DiskBus) -> &'static str {
    match bus {
        DiskBus::Virtio => "virtio-blk-pci",
        DiskBus::Scsi => "scsi-hd",
        DiskBus::Sata => "ide-hd",
        DiskBus::Nvme => "nvme",
    }
}

fn card_driver(model: CardModel) -> &'static str {
    match model {
        CardModel::Virtio => "virtio-net-pci",
        CardModel::E1000e => "e1000e",
        CardModel::E1000 => "e1000",
        CardModel::Rtl8139 => "rtl8139",
        CardModel::Vmxnet3 => "vmxnet3",
    }
}

/// What disks can be attached to where QEMU has these types of devices.
pub fn disk_buses(devices: &BTreeSet<String>) -> BTreeSet<DiskBus> {
    let has = |bus: &DiskBus| {
        devices.contains(disk_driver(*bus))
            && (*bus != DiskBus::Scsi || devices.contains(SCSI_CONTROLLER))
            && (*bus != DiskBus::Sata || devices.contains("ich9-ahci"))
    };
    DiskBus::ALL.iter().copied().filter(has).collect()
}

/// The models of cards among these types of devices.
pub fn card_models(devices: &BTreeSet<String>) -> BTreeSet<CardModel> {
    CardModel::ALL.iter().copied().filter(|model| devices.contains(card_driver(*model))).collect()
}

/// No child processes, no other privileges: the same for every machine.
pub const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The part of `-add-fd` that QEMU makes nothing of.
fn opaque(path: &str) -> String {
    format!(",opaque={}", escape_commas(path))
}

/// Whether a command line is that of the QEMU of one VM in one state directory: the same VM may well run
/// on this host for another broker.
pub fn is_of(args: &[&[u8]], vm: VmId, state_dir: &Path) -> bool {
    let log = opaque(&state_dir.join(file::CONSOLE_LOG).to_string_lossy());
    let handed = |arg: &&[u8]| arg.starts_with(b"fd=") && arg.ends_with(log.as_bytes());
    // As brokers up to 0.1.0 started QEMU, which then made its sockets itself.
    let socket = escape_commas(&state_dir.join(file::QMP).to_string_lossy());
    let made = format!("socket,id=qmp,path={socket},server=on,wait=off");
    args.contains(&vm.to_string().as_bytes()) && args.iter().any(|arg| handed(arg) || *arg == made.as_bytes())
}

/// In QEMU's older option syntax a comma in a value is written twice.
fn escape_commas(text: &str) -> String {
    text.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ByteSize, RecipeId};
    use crate::vm::{Mac, VmSpec};

    fn machine() -> Machine {
        let id: VmId = "7f3c2a10-52d4-4b7e-9a37-0c1d2e3f4a5b".parse().unwrap();
        let nic = |network: &str, n| Nic {
            network: network.into(),
            mac: Mac([0x52, 0x54, 0, 0, 0, n]),
            model: Default::default(),
        };
        Machine {
            spec: VmSpec {
                id,
                name: "web-1".parse().unwrap(),
                cpus: 2,
                memory: ByteSize::mib(512),
                recipe: RecipeId::of(b""),
                root_size: ByteSize::gib(2),
                user_data_size: ByteSize::mib(256),
                nics: vec![nic("default", 1), nic("lan", 2), nic("lab", 3)],
                architecture: "amd64".into(),
                cpu_model: "qemu64".into(),
                firmware: Firmware::Uefi,
                disk_bus: Default::default(),
                system_uuid: None,
            },
            root_disk: "/srv/vm/web,1/root.qcow2".into(),
            root_format: DiskFormat::Qcow2,
            base: Some("/srv/compositions/1".into()),
            user_data_disk: Some("/srv/vm/web,1/user-data.raw".into()),
            firmware_vars: "/srv/vm/web,1/vars.fd".into(),
            state_dir: "/run/vm/web,1".into(),
        }
    }

    fn host() -> Host {
        Host {
            accelerator: Accelerator::Tcg,
            machine_type: "pc-q35-7.2".into(),
            firmware_code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            networks: [
                ("default".into(), NetworkBackend::User),
                ("lan".into(), NetworkBackend::Bridge("br0".into())),
                ("lab".into(), NetworkBackend::None),
            ]
            .into(),
            isolates: true,
            sandbox: true,
        }
    }

    /// The command line where descriptors are numbered from 3 on, and what they are.
    fn opened(machine: &Machine, host: &Host) -> Result<(Vec<String>, Vec<Handed>), DriverError> {
        let mut handed = Vec::new();
        let mut open = |what| {
            handed.push(what);
            Ok(2 + handed.len() as i32)
        };
        let args = super::argv(machine, host, &mut open)?;
        Ok((args, handed))
    }

    fn argv(machine: &Machine, host: &Host) -> Result<Vec<String>, DriverError> {
        opened(machine, host).map(|(args, _)| args)
    }

    /// Without the numbers of descriptors, which say nothing to the guest.
    fn unnumbered(args: &[String]) -> Vec<String> {
        let numbers = regex::Regex::new(r#"(fd=|set=|fdset/|"str":"|"fd":")\d+"#).unwrap();
        args.iter().map(|arg| numbers.replace_all(arg, "$1").into_owned()).collect()
    }

    #[test]
    fn the_whole_command_line_is_as_recorded() {
        let args = argv(&machine(), &host()).unwrap();
        let lines: String = args
            .iter()
            .enumerate()
            .map(|(i, a)| match (i, a.starts_with('-')) {
                (0, _) => a.clone(),
                (_, true) => format!("\n{a}"),
                (_, false) => format!(" {a}"),
            })
            .collect();
        assert_eq!(lines + "\n", include_str!("../../../fixtures/hypervisor/argv.txt"));
    }

    #[test]
    fn the_guest_sees_the_same_slots_without_the_second_disk() {
        let mut machine = machine();
        let with = unnumbered(&argv(&machine, &host()).unwrap());
        machine.user_data_disk = None;
        let without = unnumbered(&argv(&machine, &host()).unwrap());
        let gone: Vec<_> = with.iter().filter(|a| !without.contains(a)).collect();
        assert_eq!(gone.len(), 3, "the open file, the disk and the device: {gone:?}");
        assert!(without.iter().all(|a| with.contains(a)));
    }

    #[test]
    fn a_bios_machine_differs_by_its_firmware_alone() {
        let mut machine = machine();
        let uefi = unnumbered(&argv(&machine, &host()).unwrap());
        machine.spec.firmware = Firmware::Bios;
        let bios = unnumbered(&argv(&machine, &host()).unwrap());
        let new: Vec<_> = bios.iter().filter(|a| !uefi.contains(a)).collect();
        assert_eq!(new, ["pc-q35-7.2,smm=off,vmport=off,dump-guest-core=off,graphics=off"]);
        assert_eq!(uefi.len(), bios.len() + 8, "two open files and two pflash drives less");
    }

    #[test]
    fn chosen_devices_are_in_the_places_of_the_others() {
        let plain = unnumbered(&argv(&machine(), &host()).unwrap());
        let new = |change: fn(&mut VmSpec)| {
            let mut machine = machine();
            change(&mut machine.spec);
            let args = unnumbered(&argv(&machine, &host()).unwrap());
            args.into_iter().filter(|arg| !plain.contains(arg)).collect::<Vec<_>>()
        };
        for (change, expected) in [
            (
                (|s| s.disk_bus = DiskBus::Nvme) as fn(&mut VmSpec),
                &[
                    r#"{"addr":"0x2","bootindex":1,"bus":"pcie.0","drive":"root","driver":"nvme","id":"root-disk","serial":"root"}"#,
                    r#"{"addr":"0x3","bus":"pcie.0","drive":"user-data","driver":"nvme","id":"user-data-disk","serial":"user-data"}"#,
                ][..],
            ),
            (
                |s| s.disk_bus = DiskBus::Sata,
                &[
                    r#"{"bootindex":1,"bus":"ide.0","drive":"root","driver":"ide-hd","id":"root-disk","serial":"root"}"#,
                    r#"{"bus":"ide.1","drive":"user-data","driver":"ide-hd","id":"user-data-disk","serial":"user-data"}"#,
                ],
            ),
            (
                |s| s.disk_bus = DiskBus::Scsi,
                &[
                    r#"{"addr":"0x6","bus":"pcie.0","driver":"virtio-scsi-pci","id":"scsi"}"#,
                    r#"{"bootindex":1,"bus":"scsi.0","drive":"root","driver":"scsi-hd","id":"root-disk","scsi-id":0,"serial":"root"}"#,
                    r#"{"bus":"scsi.0","drive":"user-data","driver":"scsi-hd","id":"user-data-disk","scsi-id":1,"serial":"user-data"}"#,
                ],
            ),
            (
                |s| s.nics[2].model = CardModel::E1000e,
                &[
                    r#"{"addr":"0xa","bus":"pcie.0","driver":"e1000e","id":"nic2","mac":"52:54:00:00:00:03","romfile":""}"#,
                ],
            ),
            (
                |s| s.system_uuid = Some(VmId(uuid::Uuid::from_u128(7)).into()),
                &["type=1,uuid=00000000-0000-0000-0000-000000000007"],
            ),
        ] {
            assert_eq!(new(change), expected);
        }
    }

    #[test]
    fn a_command_line_bears_its_marks() {
        let machine = machine();
        let (vm, dir) = (machine.spec.id, &machine.state_dir);
        let args = argv(&machine, &host()).unwrap();
        let args: Vec<_> = args.iter().map(String::as_bytes).collect();
        assert!(is_of(&args, vm, dir));
        assert!(!is_of(&args, VmId::random(), dir));
        assert!(!is_of(&args, vm, Path::new("/run/vm/web")));
        let id = vm.to_string();
        let older: [&[u8]; 2] =
            [id.as_bytes(), b"socket,id=qmp,path=/run/vm/web,,1/qmp.sock,server=on,wait=off"];
        assert!(is_of(&older, vm, dir));
        assert!(!is_of(&older[..1], vm, dir));
    }

    /// Each file is named once, beside the descriptor it is handed over by; nothing is left to open.
    #[test]
    fn no_argument_opens_a_file_of_the_vm() {
        let (args, handed) = opened(&machine(), &host()).unwrap();
        let named = |arg: &&String| ["/srv/", "/run/", "OVMF"].iter().any(|place| arg.contains(place));
        for arg in args.iter().filter(named) {
            assert!(arg.starts_with("fd=") && arg.contains(",opaque=/"), "{arg}");
        }
        let path = |name: &str| PathBuf::from("/srv/vm/web,1").join(name);
        let run = |name: &str| PathBuf::from("/run/vm/web,1").join(name);
        let expected = [
            Handed::Read("/usr/share/OVMF/OVMF_CODE_4M.fd".into()),
            Handed::Write(path("vars.fd")),
            Handed::Listen(run("qmp.sock")),
            Handed::Write(path("root.qcow2")),
            Handed::Read("/srv/compositions/1".into()),
            Handed::Write(path("user-data.raw")),
            Handed::Append(run("console.log")),
            Handed::Listen(run("con.sock")),
            Handed::Listen(run("qga.sock")),
            Handed::Card(Link::Isolated),
            Handed::Card(Link::Bridge("br0".into())),
        ];
        assert_eq!(handed, expected);
    }

    #[test]
    fn every_card_keeps_the_whole_sandbox_and_has_its_own_descriptor() {
        let (machine, mut host) = (machine(), host());
        let cards = |host: &Host| {
            let handed = opened(&machine, host).unwrap().1.into_iter();
            handed.filter(|what| matches!(what, Handed::Card(_))).collect::<Vec<_>>()
        };
        let (own, bridged) = (Handed::Card(Link::Isolated), Handed::Card(Link::Bridge("br0".into())));
        assert_eq!(cards(&host), [own, bridged.clone()]);
        assert!(
            argv(&machine, &host).unwrap().contains(&SANDBOX.to_owned()) && SANDBOX.contains("spawn=deny")
        );
        host.isolates = false;
        assert_eq!(cards(&host), [bridged]);
        assert!(argv(&machine, &host).unwrap().contains(&r#"{"id":"net0","type":"user"}"#.to_owned()));
    }

    #[test]
    fn an_unknown_network_is_refused_by_name() {
        let mut machine = machine();
        machine.spec.nics[0].network = "dmz".into();
        let error = argv(&machine, &host()).unwrap_err().to_string();
        assert!(error.contains("'dmz'") && error.contains("default, lab, lan"), "{error}");
    }
}
