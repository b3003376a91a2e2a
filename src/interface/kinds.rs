//! Kinds that are told: each an identifier, the same in the API, in records, in logs and on paper.

use crate::types::kinds;

kinds! {
    /// A broker's part in a migration.
    MigrationRole {
        Source = "source",
        Target = "target",
    }

    /// How far a migration has come.
    MigrationPhase {
        Negotiate = "negotiate",
        /// Content travels while the VM is as it is.
        Stage = "stage",
        /// The VM stands still, and what changed travels.
        SwitchOver = "switch-over",
        Start = "start",
        /// The VM is the target's and did not start there.
        HandedOver = "handed-over",
        Completed = "completed",
        Cancelled = "cancelled",
        Failed = "failed",
        /// It is not known whether the VM is the target's.
        InDoubt = "in-doubt",
        /// A restart cut it short; it begins again.
        Waiting = "waiting",
        /// One that an earlier release recorded.
        #[serde(other)]
        Other = "other",
    }

    /// Whose a VM is, as its cloud's records say.
    VmOwnership {
        Here = "here",
        /// Now in another cloud; its copy is kept for the grace period.
        GivenUp = "given-up",
        InDoubt = "in-doubt",
        /// Here, and in another cloud too.
        Contested = "contested",
        /// Its record cannot be used; only its id is known.
        Damaged = "damaged",
    }

    /// Whether a member is in the room.
    MemberState {
        Online = "online",
        Gone = "gone",
        /// The room's owner took it off the list.
        Removed = "removed",
    }

    /// Whether a member's key is believed.
    MemberTrust {
        Trusted = "trusted",
        /// Never confirmed.
        Unknown = "unknown",
        /// Another key than the pinned one.
        Changed = "changed",
        /// A key that the believed one followed.
        Superseded = "superseded",
        /// A second successor of a key of its.
        Forked = "forked",
        Revoked = "revoked",
        NoKey = "no-key",
    }

    /// Whether a broker is in the room.
    LinkState {
        Online = "online",
        Offline = "offline",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_is_what_is_written_and_a_phase_of_before_is_read() {
        let written = |kind: MigrationPhase| serde_json::to_value(kind).unwrap();
        assert_eq!(written(MigrationPhase::InDoubt), MigrationPhase::InDoubt.as_str());
        assert_eq!(
            serde_json::from_value::<MigrationPhase>("release".into()).unwrap(),
            MigrationPhase::Other
        );
        assert_eq!(serde_json::to_value(MemberTrust::NoKey).unwrap(), "no-key");
        assert!(serde_json::from_value::<VmOwnership>("mine".into()).is_err());
        assert_eq!(format!("{:>8}", MemberState::Gone), "    gone");
    }
}
