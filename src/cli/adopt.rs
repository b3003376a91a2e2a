//! `cicada vm adopt` and `cicada vm export`

use std::path::{Path, PathBuf};

use clap::Args;

use crate::compose::ImageFormat;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{AdoptedView, ExportedView, Reply, Request, VmAdopt, VmRequest};
use crate::types::VmName;
use crate::vm::Firmware;

use super::context::Context;
use super::format::{bytes, millis};
use super::hardware::{Hardware, one_of};
use super::printer::{Outcome, Printer, unexpected};
use super::table::{Table, card};

#[derive(Args)]
pub struct Adopt {
    /// 1 to 63 of a-z 0-9 . _ -
    name: VmName,
    /// The disk, a file or block device on the broker's machine; it is only read
    disk: PathBuf,
    /// auto, raw, qcow2, vmdk, vhdx, vpc or vdi; name it if the disk's guest is not trusted
    ///
    /// A raw disk without partition table and file system, or whose name promises another format, is
    /// only adopted with --format raw.
    #[arg(long, default_value = "auto", value_name = "FORMAT", value_parser = format_or_auto)]
    format: String,
    /// A second disk, copied as the VM's user data
    #[arg(long, value_name = "DISK")]
    user_data: Option<PathBuf>,
    /// What starts the disk's operating system
    #[arg(long, default_value_t, value_name = "FIRMWARE", value_parser = one_of::<Firmware>(Firmware::WORDS))]
    firmware: Firmware,
    /// Debian's name of the processor architecture
    #[arg(long, default_value = "amd64", value_name = "ARCHITECTURE")]
    architecture: String,
    #[command(flatten)]
    hardware: Hardware,
    /// The variables of the old machine's UEFI firmware: a file on the broker's machine, of this
    /// cloud's firmware or one that keeps them in the same way
    #[arg(long, value_name = "FILE")]
    nvram: Option<PathBuf>,
    /// Put what is not known into a component too, for other disks like this one. It is then shared
    /// content: never of a disk with secrets
    #[arg(long)]
    share: bool,
    /// Only tell what would be known
    #[arg(long, conflicts_with = "start")]
    dry_run: bool,
    /// Start it at once
    #[arg(long)]
    start: bool,
}

#[derive(Args)]
pub struct Export {
    /// Its name or UUID; it must be stopped
    vm: String,
    /// The file to write, with your own rights; it must not be there yet
    file: PathBuf,
    /// raw, qcow2, vmdk, vhdx, vpc or vdi
    #[arg(long, default_value = "raw", value_name = "FORMAT")]
    format: ImageFormat,
    /// The user-data disk instead of the root disk
    #[arg(long)]
    user_data: bool,
}

pub async fn adopt(ctx: &Context, args: Adopt) -> Outcome {
    let request = Request::Vm(VmRequest::Adopt(VmAdopt {
        name: args.name,
        disk: absolute(&args.disk, "DISK")?,
        user_data: args.user_data.map(|path| absolute(&path, "--user-data")).transpose()?,
        format: args.format,
        architecture: args.architecture,
        firmware: args.firmware,
        memory: args.hardware.memory,
        cpus: args.hardware.cpus,
        networks: args.hardware.networks.clone(),
        share: args.share,
        dry_run: args.dry_run,
        start: args.start,
        hardware: args.hardware.chosen(),
        nvram: args.nvram.map(|path| absolute(&path, "--nvram")).transpose()?,
    }));
    ctx.work(&request, |printer, reply| match reply {
        Reply::Adopted(view) => print_adopted(printer, &view),
        other => Err(unexpected(&other)),
    })
    .await
}

pub async fn export(ctx: &Context, args: Export) -> Outcome {
    let request = Request::Vm(VmRequest::Export {
        vm: args.vm,
        output: absolute(&args.file, "FILE")?,
        format: args.format.to_string(),
        user_data: args.user_data,
    });
    ctx.work(&request, |printer, reply| match reply {
        Reply::Exported(view) => print_exported(printer, &view),
        other => Err(unexpected(&other)),
    })
    .await
}

fn format_or_auto(text: &str) -> Result<String, String> {
    match text {
        "auto" => Ok(text.to_owned()),
        _ => text.parse::<ImageFormat>().map(|f| f.to_string()).map_err(|e| format!("{e}, auto")),
    }
}

/// The broker has another working directory.
fn absolute(path: &Path, object: &str) -> Result<String, Problem> {
    let path =
        std::path::absolute(path).map_err(|e| Problem::from_error(ProblemKind::BadRequest, object, &e))?;
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Problem::new(ProblemKind::BadRequest, object, "the path is not UTF-8"))
}

fn print_adopted(printer: &Printer, a: &AdoptedView) -> Outcome {
    if a.packs_left_out > 0 {
        printer.note(format!(
            "the repository holds too many blocks: its {} oldest packs were not looked into",
            a.packs_left_out
        ));
    }
    if a.size_bytes != a.disk_bytes {
        printer.note(format!(
            "the disk's size is no multiple of 1 MiB: {} bytes of zeros were added at its end",
            a.size_bytes - a.disk_bytes
        ));
    }
    a.notes.iter().for_each(|note| printer.note(note));
    let content = a.known_bytes + a.residue_bytes;
    let percent = (a.known_bytes * 100).checked_div(content).unwrap_or(0);
    let vm = a.vm.as_ref().map_or("none, a dry run".to_owned(), |vm| format!("{} ({})", vm.name, vm.id));
    let mut rows = vec![("VM", vm), ("disk", format!("{}, {}", bytes(a.disk_bytes), a.format))];
    if !a.boots.is_empty() {
        let what = if a.what.is_empty() { "no partition table and no file system" } else { &a.what };
        rows.extend([("content", what.to_owned()), ("boots by", a.boots.clone())]);
    }
    rows.extend([
        ("known", format!("{}, {percent} % of its content", bytes(a.known_bytes))),
        ("residue", bytes(a.residue_bytes)),
        ("zeros", bytes(a.zero_bytes)),
        ("extents", format!("{} in {} packs", a.extents, a.packs)),
        ("base", a.component.clone().unwrap_or_default()),
        ("image digest", a.digest.to_string()),
        ("time", millis(a.elapsed_ms)),
    ]);
    card(printer, &rows)?;
    if a.known_from.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(["KNOWN FROM", ">PACKS", ">BYTES"]);
    for k in &a.known_from {
        table.row([k.component.clone(), k.packs.to_string(), bytes(k.bytes)]);
    }
    printer.line("")?;
    table.print(printer)
}

fn print_exported(printer: &Printer, e: &ExportedView) -> Outcome {
    card(
        printer,
        &[
            ("output", e.output.clone()),
            ("format", e.format.clone()),
            ("disk", bytes(e.size_bytes)),
            ("time", millis(e.elapsed_ms)),
        ],
    )
}
