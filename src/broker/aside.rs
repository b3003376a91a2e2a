//! VMs set aside: their record is damaged, or forbids them to run. They are listed, never run, nothing
//! arrives over them, and their disks stay as they are.

use crate::clock::UnixMillis;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{VmOwnership, VmView};
use crate::migration::records::Autostart;
use crate::types::{ByteSize, RecipeId, VmId, VmName};
use crate::vm::{DiskBus, Firmware, PowerState};

use super::Broker;
use super::book::Damaged;

/// What an operator is told of it.
pub fn problem(d: &Damaged) -> Problem {
    let object = format!("VM {}", d.vm);
    let dir = d.path.parent().unwrap_or(&d.path).display();
    Problem::new(ProblemKind::Damaged, object, format!("is set aside: {}", d.reason)).next(format!(
        "stop the broker, restore {} from a backup and start it again; or, if the VM is not needed, remove \
         {dir}. Its disks there are untouched",
        d.path.display()
    ))
}

/// While it is not known what a VM consists of, nothing may be removed that it could need.
pub fn gc_problem(d: &Damaged) -> Problem {
    Problem::new(
        ProblemKind::Conflict,
        "repository",
        format!("what VM {} needs is not known: {}", d.vm, d.reason),
    )
    .next(problem(d).next_step)
}

impl Broker {
    /// A VM set aside, by its id or by what it is called.
    pub(super) fn find_aside(&self, text: &str) -> Option<&Damaged> {
        let by_id = text.parse::<VmId>().ok();
        self.aside.values().find(|d| by_id == Some(d.vm) || VmName::unknown(d.vm).as_str() == text)
    }

    pub(super) fn put_aside(&mut self, vm: VmId, reason: String) {
        self.vms.remove(&vm);
        let path = self.book.record_path(vm);
        self.aside.insert(vm, Damaged { vm, path, reason });
    }

    pub(super) fn aside_views(&self) -> impl Iterator<Item = VmView> + '_ {
        self.aside.values().map(view)
    }
}

fn view(d: &Damaged) -> VmView {
    let none = ByteSize(0);
    VmView {
        id: d.vm,
        name: VmName::unknown(d.vm),
        power: PowerState::Stopped,
        ownership: VmOwnership::Damaged,
        owner: None,
        epoch: 0,
        created: UnixMillis(0),
        cpus: 0,
        memory: none,
        root_size: none,
        user_data_size: none,
        nics: Vec::new(),
        recipe: RecipeId::from_bytes([0; 32]),
        components: Vec::new(),
        root_delta_bytes: 0,
        user_data_bytes: 0,
        console_socket: String::new(),
        console_log: String::new(),
        migration: None,
        problem: Some(problem(d)),
        description: String::new(),
        autostart: Autostart::default(),
        stop_timeout_s: None,
        runs_as: None,
        architecture: String::new(),
        cpu_model: String::new(),
        firmware: Firmware::default(),
        disk_bus: DiskBus::default(),
        system_uuid: d.vm.into(),
    }
}
