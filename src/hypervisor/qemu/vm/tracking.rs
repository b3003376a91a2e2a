//! Change tracking of one VM, see [`bitmaps`].
//!
//! While changes are tracked, the process outlives its guest: QEMU stays paused when the guest has
//! switched itself off, with everything written to the disks. Then what the guest changed is read
//! and QEMU is told to quit; to everybody else it looks as if it had ended with its guest, as ever.
//! The same is done for a process found in that state, whose driver died before it came to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{FLUSH_TIMEOUT, Run, Vm, has_ended};
use crate::hypervisor::qemu::args::{file, node};
use crate::hypervisor::qemu::bitmaps::{self, BitmapError};
use crate::hypervisor::qemu::qmp::Qmp;
use crate::hypervisor::{DiskChanges, DriverError, Machine, Period};
use crate::vm::PowerState;

/// Periods begun, of all VMs, so that no name is ever used twice.
static PERIODS: AtomicU64 = AtomicU64::new(0);

/// What is known of a VM's changes. Whatever is not certain is forgotten.
#[derive(Default)]
pub(super) struct Tracking {
    /// The period under way.
    period: Option<u64>,
    /// The period in which the guest switched itself off, and what it held.
    kept: Option<(u64, DiskChanges)>,
}

impl Tracking {
    /// The process has ended, and its bitmaps with it.
    pub fn end(&mut self) {
        self.period = None;
    }

    pub fn forget(&mut self) {
        self.period = None;
        self.kept = None;
    }
}

impl Vm {
    /// Called with `verbs` held, as [`Self::end_tracking`].
    pub async fn track_changes(
        self: &Arc<Self>,
        since: Option<Period>,
    ) -> Result<(Period, Option<DiskChanges>), DriverError> {
        let (Some(machine), Some(run), PowerState::Running | PowerState::Paused) =
            (self.machine(), self.run(), self.state())
        else {
            return Err(self.wrong_state("watched for changes"));
        };
        let qmp = self.qmp(&run).await?;
        let ending = self.inner().tracking.period.take();
        let period = PERIODS.fetch_add(1, Ordering::Relaxed) + 1;
        let begun = async {
            if ending.is_none() {
                bitmaps::clear(&qmp, None).await?;
            }
            bitmaps::outlive_guest(&qmp, true).await?;
            bitmaps::begin(&qmp, nodes(&machine), period, ending).await
        };
        if let Err(error) = begun.await {
            // What did happen is not known: no period is better than a doubtful one.
            self.stop_tracking(&qmp).await;
            return Err(self.qmp_failed(&run, error));
        }
        self.inner().tracking.period = Some(period);
        let changes = match ending {
            Some(ending) if since == Some(Period(ending)) => {
                self.read_changes(&qmp, &machine, ending).await.map(Some)
            }
            Some(_) => Ok(None),
            None => return Ok((Period(period), None)),
        };
        if let Err(error) = bitmaps::clear(&qmp, Some(period)).await {
            tracing::warn!(vm = %self.id, %error, "a bitmap is left behind in QEMU");
        }
        Ok((Period(period), changes?))
    }

    pub async fn end_tracking(
        self: &Arc<Self>,
        since: Option<Period>,
    ) -> Result<Option<DiskChanges>, DriverError> {
        let Some(run) = self.run() else {
            let kept = self.inner().tracking.kept.take();
            return Ok(kept.filter(|(period, _)| since == Some(Period(*period))).map(|(_, changes)| changes));
        };
        if self.inner().tracking.period.take().is_some() {
            let qmp = self.qmp(&run).await?;
            self.stop_tracking(&qmp).await;
        }
        Ok(None)
    }

    /// Leaves the process as if nothing had ever been tracked, if it can be reached.
    pub(super) async fn stop_tracking(&self, qmp: &Qmp) {
        let cleared = bitmaps::clear(qmp, None).await;
        let restored = bitmaps::outlive_guest(qmp, false).await;
        if let Err(error) = cleared.and(restored) {
            tracing::warn!(vm = %self.id, %error, "cannot end tracking the VM's changes");
        }
    }

    async fn read_changes(
        &self,
        qmp: &Qmp,
        machine: &Machine,
        period: u64,
    ) -> Result<DiskChanges, DriverError> {
        let missing = || DriverError::MissingTool { tool: "qemu-img", package: "qemu-utils" };
        let img = self.img.as_deref().ok_or_else(missing)?;
        let socket = machine.state_dir.join(file::NBD);
        let read = bitmaps::read(qmp, nodes(machine), period, &socket, img).await;
        let mut disks = read.map_err(|error| self.changes_failed(&error))?.into_iter();
        let mut next = || disks.next().unwrap_or_default();
        Ok(DiskChanges { root: next(), user_data: next() })
    }

    fn changes_failed(&self, error: &BitmapError) -> DriverError {
        let mut reason = error.to_string();
        if let Some(source) = std::error::Error::source(error) {
            reason = format!("{reason}: {source}");
        }
        DriverError::Changes { vm: self.id, reason }
    }

    /// Sees a process off whose guest has switched itself off, in a task of its own.
    pub(super) fn see_off_soon(self: &Arc<Self>) {
        tokio::spawn(self.clone().see_off());
    }

    async fn see_off(self: Arc<Self>) {
        let _turn = self.verbs.lock().await;
        if let Some(run) = self.run() {
            self.await_quit(&run).await;
        }
    }

    /// Called with `verbs` held; returns when the process has ended or will not.
    pub(super) async fn await_quit(self: &Arc<Self>, run: &Run) {
        if *run.ended.borrow() {
            return;
        }
        let period = self.inner().tracking.period.take();
        if let Some(period) = period {
            let kept = self.last_changes(run, period).await;
            if let Err(error) = &kept {
                tracing::warn!(vm = %self.id, %error, "what the guest changed last is not known");
            }
            self.inner().tracking.kept = kept.ok().map(|changes| (period, changes));
        }
        let asked = self.execute(run, "quit").await;
        if !has_ended(run, FLUSH_TIMEOUT).await {
            tracing::warn!(vm = %self.id, ?asked, "QEMU does not quit after its guest; stop it by force");
        }
    }

    async fn last_changes(self: &Arc<Self>, run: &Run, period: u64) -> Result<DiskChanges, DriverError> {
        let Some(machine) = self.machine() else { return Err(DriverError::UnknownVm { vm: self.id }) };
        let qmp = self.qmp(run).await?;
        bitmaps::freeze(&qmp, nodes(&machine), period).await.map_err(|e| self.qmp_failed(run, e))?;
        self.read_changes(&qmp, &machine, period).await
    }
}

fn nodes(machine: &Machine) -> &'static [&'static str] {
    if machine.user_data_disk.is_some() { &[node::ROOT, node::USER_DATA] } else { &[node::ROOT] }
}
