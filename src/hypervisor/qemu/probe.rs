//! What QEMU can really do on this host, found out by running it.
//!
//! A `/dev/kvm` that opens proves little: under some hosts' nested virtualisation it opens, creates
//! VMs and then fails in their first kilobytes. So a guest is run, whose success only a KVM that
//! works can bring about.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;

use super::args::SANDBOX;
use super::config::AcceleratorChoice;
use super::lack::QemuLack;
use super::qmp::Qmp;
use crate::hypervisor::{Accelerator, DriverError};

/// Under KVM the probe guest takes a tenth of a second, in software emulation even less.
const GUEST_TIMEOUT: Duration = Duration::from_secs(5);
const ASK_TIMEOUT: Duration = Duration::from_secs(30);

/// The probe guest: 16-bit code at the reset vector, the last 16 bytes below 4 GiB. It uses the
/// floating-point unit, where a crippled KVM gives up, and reports through the debug-exit port.
const GUEST_CODE: [u8; 12] = [
    0x9b, // fwait
    0xdb, 0xe3, // fninit
    0xba, 0xf4, 0x00, // mov dx, 0xf4
    0xb0, 0x21, // mov al, 0x21
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to hlt
];
/// The device makes `2 n + 1` of the byte written: nothing else makes QEMU exit so.
const GUEST_EXIT: i32 = 0x21 * 2 + 1;
const ROM_BYTES: usize = 64 << 10;

/// Decides what will run guests. With [`AcceleratorChoice::Auto`] a KVM that does not work is
/// logged with the reason, not an error.
pub async fn accelerator(
    system: &Path,
    machine_type: &str,
    choice: AcceleratorChoice,
) -> Result<Accelerator, DriverError> {
    if choice == AcceleratorChoice::Tcg {
        return Ok(Accelerator::Tcg);
    }
    let outcome = match kvm_is_plausible() {
        Ok(()) => run_guest(system, machine_type, "kvm").await,
        Err(reason) => Err(reason),
    };
    match (outcome, choice) {
        (Ok(()), _) => Ok(Accelerator::Kvm),
        (Err(reason), AcceleratorChoice::Kvm) => Err(QemuLack::Kvm { reason }.into()),
        (Err(reason), _) => {
            tracing::info!(%reason, "no KVM: VMs run in software emulation");
            Ok(Accelerator::Tcg)
        }
    }
}

/// What must be there before trying is worth while.
pub fn kvm_is_plausible() -> Result<(), String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(|e| format!("/proc/cpuinfo: {e}"))?;
    if !has_virtualisation(&cpuinfo) {
        return Err("the processor shows neither vmx nor svm".into());
    }
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .map_err(|e| format!("/dev/kvm cannot be opened: {e}; is this user in the group kvm?"))
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Runs the probe guest to its end.
async fn run_guest(system: &Path, machine_type: &str, accelerator: &str) -> Result<(), String> {
    let rom = tokio::task::spawn_blocking(|| {
        let mut rom = vec![0xf4; ROM_BYTES];
        rom[ROM_BYTES - 16..][..GUEST_CODE.len()].copy_from_slice(&GUEST_CODE);
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(&rom)?;
        Ok::<_, std::io::Error>(file)
    })
    .await
    .map_err(|e| e.to_string())?
    .map_err(|e| format!("the probe guest cannot be written: {e}"))?;
    let child = Command::new(system)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-m", "32M"])
        .args(["-machine", machine_type, "-accel", accelerator, "-cpu", "qemu64,enforce"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios"])
        .arg(rom.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("{} cannot be run: {e}", system.display()))?;
    match tokio::time::timeout(GUEST_TIMEOUT, child.wait_with_output()).await {
        Err(_) => Err(format!("a probe guest hung for {} s", GUEST_TIMEOUT.as_secs())),
        Ok(Err(e)) => Err(format!("the probe guest was lost: {e}")),
        Ok(Ok(output)) if output.status.code() == Some(GUEST_EXIT) => Ok(()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or("nothing said").escape_debug();
            Err(format!("a probe guest failed, {}: {last}", output.status))
        }
    }
}

/// What a QEMU with the accelerator given has to offer.
#[derive(Debug)]
pub struct Offer {
    pub machine_types: BTreeSet<String>,
    pub cpu_models: BTreeSet<String>,
    /// Types of devices.
    pub devices: BTreeSet<String>,
    /// Whether QEMU can confine itself.
    pub sandbox: bool,
}

pub async fn ask(system: &Path, accelerator: Accelerator) -> Result<Offer, DriverError> {
    match ask_with(system, accelerator, true).await {
        Ok(offer) => Ok(offer),
        // A kernel or build without seccomp.
        Err(confined) => ask_with(system, accelerator, false).await.map_err(|plain| {
            QemuLack::Probe { detail: format!("{plain} (with -sandbox: {confined})") }.into()
        }),
    }
}

#[derive(Deserialize)]
struct TypeInfo {
    name: String,
}

#[derive(Deserialize)]
struct MachineInfo {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CpuDefinition {
    name: String,
    #[serde(default)]
    migration_safe: bool,
    /// Features of the model which this host cannot give.
    #[serde(default)]
    unavailable_features: Vec<String>,
}

async fn ask_with(system: &Path, accelerator: Accelerator, sandbox: bool) -> Result<Offer, String> {
    let mut command = Command::new(system);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-qmp", "stdio"])
        .args(["-accel", if accelerator == Accelerator::Kvm { "kvm" } else { "tcg" }])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if sandbox {
        command.args(["-sandbox", SANDBOX]);
    }
    let mut child = command.spawn().map_err(|e| format!("{} cannot be run: {e}", system.display()))?;
    let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err("QEMU has no standard input and output".into());
    };
    let talk = async {
        let qmp = Qmp::over(tokio::io::join(output, input), |_| ()).await?;
        let machines: Vec<MachineInfo> = qmp.query("query-machines").await?;
        let cpus: Vec<CpuDefinition> = qmp.query("query-cpu-definitions").await?;
        let types = json!({"implements": "device", "abstract": false});
        let devices: Vec<TypeInfo> = qmp.query_with("qom-list-types", types).await?;
        qmp.execute("quit", None).await?;
        let usable = |c: &CpuDefinition| c.migration_safe && c.unavailable_features.is_empty();
        Ok(Offer {
            machine_types: machines.into_iter().map(|m| m.name).collect(),
            // `base` is a CPU without any feature, for other programs to build on.
            cpu_models: cpus.into_iter().filter(usable).map(|c| c.name).filter(|n| n != "base").collect(),
            devices: devices.into_iter().map(|t| t.name).collect(),
            sandbox,
        })
    };
    let offer = tokio::time::timeout(ASK_TIMEOUT, talk)
        .await
        .map_err(|_| "no answer in time".to_owned())?
        .map_err(|e: super::qmp::QmpError| e.to_string())?;
    let _ = tokio::time::timeout(ASK_TIMEOUT, child.wait()).await;
    Ok(offer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualisation_is_a_whole_flag() {
        assert!(has_virtualisation("processor: 0\nflags\t\t: fpu vme vmx ssse3\n"));
        assert!(has_virtualisation("flags : svm\n"));
        assert!(!has_virtualisation("flags : fpu svme avmx\nvmx flags : vnmi\nbugs: vmx\n"));
    }

    #[tokio::test]
    async fn the_probe_guest_reports_from_inside() {
        match super::super::find_qemu() {
            Ok(tools) => run_guest(&tools.system, super::super::config::MACHINE_TYPE, "tcg").await.unwrap(),
            Err(error) => drop(writeln!(std::io::stderr(), "SKIPPED: {error}")),
        }
    }
}
