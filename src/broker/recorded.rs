//! What is recorded of a migration and what the API shows of it: either is made of the other here, and nowhere
//! else. All fields are named, so that one which is new in either has its say.

use crate::interface::{
    Account, Foretold, MigrationPhase, MigrationProgress, MigrationRole, MigrationView, MoveWork, Problem,
    ProblemKind,
};
use crate::migration::move_record::{
    Failure, FailureKind, MoveCost, MoveCourse, MoveForetold, MovePhase, MoveRecord, MoveRole,
};

/// Either way between words of records and words of the API.
macro_rules! same_words {
    ($($recorded:ident as $told:ident { $($variant:ident),+ })+) => {$(
        impl From<$recorded> for $told {
            fn from(recorded: $recorded) -> Self {
                match recorded { $($recorded::$variant => $told::$variant,)+ }
            }
        }

        impl From<$told> for $recorded {
            fn from(told: $told) -> Self {
                match told { $($told::$variant => $recorded::$variant,)+ }
            }
        }
    )+};
}
same_words! {
    MoveRole as MigrationRole { Source, Target }
    MovePhase as MigrationPhase {
        Negotiate, Stage, SwitchOver, Start, HandedOver, Completed, Cancelled, Failed, InDoubt, Waiting, Other
    }
    FailureKind as ProblemKind {
        BadRequest, NotFound, Conflict, Refused, Forbidden, Unavailable, Damaged, NoSpace, Missing, Cancelled,
        Failed
    }
}

impl From<MoveRecord> for MigrationView {
    fn from(recorded: MoveRecord) -> Self {
        let MoveRecord { remarks, course, cost, failure } = recorded;
        Self { remarks, progress: course.into(), account: cost.into(), problem: failure.map(Into::into) }
    }
}

impl From<MigrationView> for MoveRecord {
    fn from(told: MigrationView) -> Self {
        let MigrationView { remarks, progress, account, problem } = told;
        Self { remarks, course: progress.into(), cost: account.into(), failure: problem.map(Into::into) }
    }
}

impl From<MoveCourse> for MigrationProgress {
    fn from(recorded: MoveCourse) -> Self {
        let MoveCourse {
            id,
            vm,
            vm_id,
            peer,
            peer_cloud,
            detail,
            bytes_done,
            bytes_total,
            rate_bytes_per_s,
            eta_s,
            fraction,
            started,
            updated,
            ended,
            epoch,
            handed_over,
            attempt,
            role,
            phase,
        } = recorded;
        Self {
            id,
            vm,
            vm_id,
            peer,
            peer_cloud,
            detail,
            bytes_done,
            bytes_total,
            rate_bytes_per_s,
            eta_s,
            fraction,
            started,
            updated,
            ended,
            epoch,
            handed_over,
            attempt,
            role: role.into(),
            phase: phase.into(),
        }
    }
}

impl From<MigrationProgress> for MoveCourse {
    fn from(told: MigrationProgress) -> Self {
        let MigrationProgress {
            id,
            vm,
            vm_id,
            peer,
            peer_cloud,
            detail,
            bytes_done,
            bytes_total,
            rate_bytes_per_s,
            eta_s,
            fraction,
            started,
            updated,
            ended,
            epoch,
            handed_over,
            attempt,
            role,
            phase,
        } = told;
        Self {
            id,
            vm,
            vm_id,
            peer,
            peer_cloud,
            detail,
            bytes_done,
            bytes_total,
            rate_bytes_per_s,
            eta_s,
            fraction,
            started,
            updated,
            ended,
            epoch,
            handed_over,
            attempt,
            role: role.into(),
            phase: phase.into(),
        }
    }
}

impl From<Failure> for Problem {
    fn from(recorded: Failure) -> Self {
        let Failure { object, reason, next_step, kind } = recorded;
        Self { object, reason, next_step, kind: kind.into() }
    }
}

impl From<Problem> for Failure {
    fn from(told: Problem) -> Self {
        let Problem { object, reason, next_step, kind } = told;
        Self { object, reason, next_step, kind: kind.into() }
    }
}

impl From<MoveCost> for Account {
    fn from(recorded: MoveCost) -> Self {
        let MoveCost {
            components_needed,
            components_held,
            components_fetched,
            packs_needed,
            packs_fetched,
            fetched,
            component_bytes,
            root_delta_bytes,
            user_data_bytes,
            control_bytes,
            wire_bytes,
            fetch_ms,
            looking_ms,
            shutdown_ms,
            carried_bytes,
            monolithic_zstd_bytes,
            monolithic_raw_bytes,
            last_scan_bytes,
            phase_ms,
            downtime_ms,
            boot_ms,
            foretold,
        } = recorded;
        Self {
            components_needed,
            components_held,
            components_fetched,
            packs_needed,
            packs_fetched,
            fetched,
            component_bytes,
            root_delta_bytes,
            user_data_bytes,
            control_bytes,
            wire_bytes,
            fetch_ms,
            looking_ms,
            shutdown_ms,
            carried_bytes,
            monolithic_zstd_bytes,
            monolithic_raw_bytes,
            last_scan_bytes,
            phase_ms,
            downtime_ms,
            boot_ms,
            foretold: foretold.map(Into::into),
        }
    }
}

impl From<Account> for MoveCost {
    fn from(told: Account) -> Self {
        let Account {
            components_needed,
            components_held,
            components_fetched,
            packs_needed,
            packs_fetched,
            fetched,
            component_bytes,
            root_delta_bytes,
            user_data_bytes,
            control_bytes,
            wire_bytes,
            fetch_ms,
            looking_ms,
            shutdown_ms,
            carried_bytes,
            monolithic_zstd_bytes,
            monolithic_raw_bytes,
            last_scan_bytes,
            phase_ms,
            downtime_ms,
            boot_ms,
            foretold,
        } = told;
        Self {
            components_needed,
            components_held,
            components_fetched,
            packs_needed,
            packs_fetched,
            fetched,
            component_bytes,
            root_delta_bytes,
            user_data_bytes,
            control_bytes,
            wire_bytes,
            fetch_ms,
            looking_ms,
            shutdown_ms,
            carried_bytes,
            monolithic_zstd_bytes,
            monolithic_raw_bytes,
            last_scan_bytes,
            phase_ms,
            downtime_ms,
            boot_ms,
            foretold: foretold.map(Into::into),
        }
    }
}

impl From<MoveForetold> for Foretold {
    fn from(recorded: MoveForetold) -> Self {
        let MoveForetold {
            bytes,
            base_bytes,
            disk_bytes,
            runs,
            patience_s,
            ignores,
            low_s,
            high_s,
            disturbed,
        } = recorded;
        let work = MoveWork { bytes, base_bytes, disk_bytes, runs, patience_s, ignores };
        Self { work, low_s, high_s, disturbed }
    }
}

impl From<Foretold> for MoveForetold {
    fn from(told: Foretold) -> Self {
        let Foretold { work, low_s, high_s, disturbed } = told;
        let MoveWork { bytes, base_bytes, disk_bytes, runs, patience_s, ignores } = work;
        Self { bytes, base_bytes, disk_bytes, runs, patience_s, ignores, low_s, high_s, disturbed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::book::MigrationRecord;

    const SOURCE: &str =
        include_str!("../../fixtures/before/data/migrations/1b41a807-3ebf-4616-a98c-cedca7aedc28.json");
    const TARGET: &str =
        include_str!("../../fixtures/before/data/migrations/116dfebe-dc8b-41a6-bd6d-fdb1680889ec.json");

    const FAILURE: &str = r#""problem": {
      "kind": "no-space",
      "object": "move of web",
      "reason": "full",
      "next_step": "make room"
    }"#;

    /// Through what the API shows and back.
    fn written_again(json: &str) -> String {
        let MigrationRecord { version, record } = serde_json::from_str(json).unwrap();
        let record = MigrationView::from(record).into();
        serde_json::to_string_pretty(&MigrationRecord { version, record }).unwrap()
    }

    /// Whatever the API shows of a migration beyond this stays out of records, or needs a field of theirs that
    /// older ones may lack.
    #[test]
    fn records_stay_what_they_are_byte_for_byte() {
        for json in [SOURCE, TARGET] {
            assert_eq!(written_again(json), json);
        }
    }

    /// One in which nothing is left out, zero or empty.
    #[test]
    fn all_that_is_recorded_is_shown_and_recorded_again() {
        let replaced = |json: &str, from: &str, to: &str| {
            assert!(json.contains(from), "{from}");
            json.replace(from, to)
        };
        let mut json = SOURCE.to_owned();
        for (from, to) in [
            ("\"eta_s\": null", "\"eta_s\": 7"),
            ("\"attempt\": 0", "\"attempt\": 2"),
            ("\"rate_bytes_per_s\": 0", "\"rate_bytes_per_s\": 9"),
            ("\"phase\": \"completed\"", "\"phase\": \"failed\""),
            ("\"runs\": false", "\"runs\": true"),
            ("\"ignores\": false", "\"ignores\": true"),
            ("\"disturbed\": false", "\"disturbed\": true"),
            ("\"low_s\": null", "\"low_s\": 1.5"),
            ("\"high_s\": null", "\"high_s\": 2.5"),
            ("\"shutdown_ms\": null", "\"shutdown_ms\": 11"),
            ("\"downtime_ms\": null", "\"downtime_ms\": 12"),
            ("\"boot_ms\": null", "\"boot_ms\": 13"),
            ("\"components_held\": 0", "\"components_held\": 3"),
            ("\"user_data_bytes\": 0", "\"user_data_bytes\": 5"),
            ("\"problem\": null", FAILURE),
            ("\"remarks\": []", "\"remarks\": [\n      \"decided\"\n    ]"),
        ] {
            json = replaced(&json, from, to);
        }
        assert_eq!(written_again(&json), json);
    }

    #[test]
    fn records_that_call_a_field_as_the_api_does_are_read() {
        let json = SOURCE.replace("\"bytes\": 4194540", "\"carried_bytes\": 4194540");
        assert_ne!(json, SOURCE);
        assert_eq!(written_again(&json), SOURCE);
    }

    #[test]
    fn words_are_the_same_in_records_and_in_the_api() {
        for phase in MovePhase::ALL {
            assert_eq!(phase.as_str(), MigrationPhase::from(*phase).as_str());
        }
        for role in MoveRole::ALL {
            assert_eq!(role.as_str(), MigrationRole::from(*role).as_str());
        }
    }
}
