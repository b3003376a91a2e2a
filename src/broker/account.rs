//! What a move costs: views, progress and the comparison with a monolithic move.

use crate::clock::UnixMillis;
use crate::interface::{Account, MigrationPhase, MigrationProgress, MigrationRole, MigrationView};
use crate::migration::Pass;
use crate::migration::message::{Progress, StageAccount};
use crate::types::{CloudName, MemberJid, MigrationId};
use crate::vm::VmSpec;

pub fn new_view(
    id: MigrationId,
    spec: &VmSpec,
    role: MigrationRole,
    peer: &MemberJid,
    peer_cloud: Option<CloudName>,
    now: UnixMillis,
) -> MigrationView {
    MigrationView {
        progress: MigrationProgress {
            id,
            vm: spec.name.clone(),
            vm_id: spec.id,
            role,
            peer: peer.clone(),
            peer_cloud,
            phase: MigrationPhase::Negotiate,
            detail: String::new(),
            bytes_done: 0,
            bytes_total: 0,
            rate_bytes_per_s: 0,
            eta_s: None,
            fraction: 0.0,
            started: now,
            updated: now,
            ended: false,
            epoch: 0,
            handed_over: false,
            attempt: 0,
        },
        account: Account::default(),
        problem: None,
        remarks: Vec::new(),
    }
}

/// How far a move has come: it never falls, and as long as something is to be carried there is way left for it,
/// whichever pass carries it and whenever it is found that more is to come.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Advance {
    /// What was carried before the target began to count anew.
    before_bytes: u64,
    fraction: f64,
    /// What had been carried when that was worked out.
    carried_bytes: u64,
    /// Both, when it last became known how much is to come.
    from: (f64, u64),
    /// What is to be carried, and how far the move will be then.
    until: (u64, f64),
}

impl Advance {
    /// The target counts anew: it restarted, or had forgotten the move.
    pub fn counts_anew(&mut self, view: &MigrationProgress) {
        self.before_bytes = view.bytes_done;
    }

    /// Takes in what the target reports. Bytes never fall; the rate is smoothed over a few reports.
    pub fn report(&mut self, view: &mut MigrationProgress, p: &Progress, now: UnixMillis) {
        if p.step == "compose" {
            view.detail = "the target composes the disk image".into();
        }
        // Nothing is known yet.
        if (p.bytes_done, p.bytes_total) == (0, 0) {
            return;
        }
        let done = self.before_bytes.saturating_add(p.bytes_done).max(view.bytes_done);
        let elapsed = now.since(view.updated).as_secs_f64();
        if elapsed > 0.05 {
            let rate = (done - view.bytes_done) as f64 / elapsed;
            view.rate_bytes_per_s = (0.7 * view.rate_bytes_per_s as f64 + 0.3 * rate) as u64;
            view.updated = now;
        }
        view.bytes_done = done;
        // It falls when some of it turns out to be there already.
        view.bytes_total = self.before_bytes.saturating_add(p.bytes_total).max(done);
        view.eta_s = match view.rate_bytes_per_s {
            0 => None,
            rate => Some((view.bytes_total - view.bytes_done).div_ceil(rate)),
        };
    }

    /// The share of the move that is done while a pass is under way.
    pub fn in_pass(&mut self, pass: &Pass, ran: bool, view: &MigrationProgress) -> f64 {
        let until = (view.bytes_total, end_of(pass, ran));
        if until != self.until {
            self.from = (self.fraction.max(STAGING_FROM), self.carried_bytes);
            self.until = until;
        }
        let (at, carried) = self.from;
        let gone = match until.0.saturating_sub(carried) {
            0 => 0.0,
            way => view.bytes_done.saturating_sub(carried) as f64 / way as f64,
        };
        self.carried_bytes = view.bytes_done;
        self.fraction = self.fraction.max(at + (until.1 - at).max(0.0) * gone.min(1.0));
        self.fraction
    }
}

/// How far a move is when the first pass begins, and when the last one ends.
const STAGING_FROM: f64 = 0.03;
const STAGING_UNTIL: f64 = 0.93;

/// How far a move is at the end of a pass. Where the VM runs the next ones need their share as well.
fn end_of(pass: &Pass, ran: bool) -> f64 {
    match ran && !pass.last {
        true => STAGING_UNTIL - 0.15 / f64::from(pass.number.max(1)),
        false => STAGING_UNTIL,
    }
}

/// A pass was completed: what it was to carry has come. One that took no time was never reported.
pub fn carried(view: &mut MigrationView) {
    let (p, a) = (&mut view.progress, &view.account);
    let counted = [a.component_bytes, a.root_delta_bytes, a.user_data_bytes].into_iter();
    p.bytes_done = counted.fold(0, u64::saturating_add).max(p.bytes_total).max(p.bytes_done);
    p.bytes_total = p.bytes_done;
}

/// Takes in what was counted here, as a target.
pub fn came(account: &mut Account, s: &StageAccount) {
    stage(account, s);
    account.components_held = account.components_needed.saturating_sub(s.components_fetched);
}

/// Takes over the target's count; it is cumulative over all passes.
pub fn stage(account: &mut Account, s: &StageAccount) {
    // A target that restarted has forgotten its count.
    if s.wire_bytes < account.wire_bytes {
        return;
    }
    account.components_fetched = s.components_fetched;
    account.packs_needed = account.packs_needed.max(s.packs_needed);
    account.packs_fetched = s.packs_fetched;
    account.fetched = s.fetched.clone();
    account.component_bytes = s.component_bytes;
    account.root_delta_bytes = s.root_delta_bytes;
    account.user_data_bytes = s.user_data_bytes;
    account.wire_bytes = s.wire_bytes;
    account.fetch_ms = s.fetch_ms;
    // Another cloud's figures: they may be anything.
    let payload = s.component_bytes.saturating_add(s.root_delta_bytes).saturating_add(s.user_data_bytes);
    account.control_bytes = s.map_bytes.max(s.wire_bytes.saturating_sub(payload));
    account.phase_ms.insert("compose".into(), s.compose_ms);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::MapRef;

    fn spec() -> VmSpec {
        serde_json::from_value(serde_json::json!({
            "id": uuid::Uuid::nil(), "name": "web", "cpus": 1, "memory": 1 << 27, "recipe": "0".repeat(64),
            "root_size": 0, "user_data_size": 0, "nics": [], "architecture": "amd64", "cpu_model": "qemu64",
        }))
        .unwrap()
    }

    fn progress() -> MigrationProgress {
        new_view(
            MigrationId::random(),
            &spec(),
            MigrationRole::Source,
            &"b@x".parse().unwrap(),
            None,
            UnixMillis(0),
        )
        .progress
    }

    fn pass(number: u32, last: bool) -> Pass {
        let map = MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 20, root: None };
        Pass { number, last, root_delta: map, user_data: map }
    }

    fn report(done: u64, total: u64) -> Progress {
        Progress { step: "fetch".into(), bytes_done: done, bytes_total: total }
    }

    /// Reports of passes, and how far the move is after each, in percent.
    fn course(ran: bool, reports: &[(Pass, u64, u64)]) -> Vec<u32> {
        let (mut view, mut advance) = (progress(), Advance::default());
        let mut at = 0;
        let percent = reports.iter().map(|(pass, done, total)| {
            at += 1000;
            advance.report(&mut view, &report(*done, *total), UnixMillis(at));
            (advance.in_pass(pass, ran, &view) * 100.0).round() as u32
        });
        percent.collect()
    }

    #[test]
    fn bytes_never_run_backwards() {
        let (mut view, mut advance) = (progress(), Advance::default());
        advance.report(&mut view, &report(100, 1000), UnixMillis(1000));
        advance.report(&mut view, &report(50, 900), UnixMillis(2000));
        assert_eq!((view.bytes_done, view.bytes_total), (100, 900), "less is to come than was thought");
        advance.report(&mut view, &report(2000, 1500), UnixMillis(3000));
        assert_eq!((view.bytes_done, view.bytes_total, view.eta_s), (2000, 2000, Some(0)));
        // Each pass begins with an answer that says nothing yet.
        advance.report(&mut view, &report(0, 0), UnixMillis(4000));
        assert_eq!((view.bytes_done, view.bytes_total), (2000, 2000));
        // A target that restarted has what came, and counts what is still to come.
        advance.counts_anew(&view);
        advance.report(&mut view, &report(10, 500), UnixMillis(5000));
        assert_eq!((view.bytes_done, view.bytes_total), (2010, 2500));
        advance.report(&mut view, &report(u64::MAX, u64::MAX), UnixMillis(6000));
        assert_eq!((view.bytes_done, view.bytes_total), (u64::MAX, u64::MAX));
    }

    #[test]
    fn what_is_done_follows_what_was_carried_whichever_pass_carries_it() {
        // A VM that stands still: half of its bytes are half of the way.
        let (first, last) = (pass(1, false), pass(1, true));
        assert_eq!(course(false, &[(last, 0, 1000), (last, 500, 1000), (last, 1000, 1000)]), [3, 48, 93]);
        // One that runs: a last pass that carries most of it has its way, too.
        let course_of_one_that_writes = course(
            true,
            &[
                (first, 1000, 1000),
                (pass(2, false), 2000, 2000),
                (pass(3, true), 2000, 10_000),
                (pass(3, true), 6000, 10_000),
                (pass(3, true), 10_000, 10_000),
            ],
        );
        assert_eq!(course_of_one_that_writes, [78, 86, 86, 89, 93]);
    }

    #[test]
    fn what_is_found_later_has_its_way_as_well() {
        // Components were all that was known of; then the user data of ten times as much.
        let last = pass(1, true);
        let found = course(
            false,
            &[(last, 0, 100), (last, 50, 100), (last, 50, 1000), (last, 620, 1000), (last, 1000, 1000)],
        );
        assert_eq!(found, [3, 48, 48, 75, 93]);
        // Most of it turned out to be there.
        assert_eq!(course(false, &[(last, 0, 1000), (last, 10, 20), (last, 20, 20)]), [3, 48, 93]);
    }
}
