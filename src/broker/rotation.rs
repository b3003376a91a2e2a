//! When identity keys give way to others: this cloud's own, and those of members.

use crate::federation::{KeyNews, Refused};
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::types::{MemberJid, PublicKey, Successions};

use super::Broker;
use super::book::Book;
use super::effect::Peer;
use super::resolving::Outcome;

/// Why this cloud's key must not change now: something that was begun under it is not over, and would be
/// refused under another. For a cloud whose broker does not run.
pub fn open_business(book: &dyn Book) -> Result<(), Problem> {
    let failed = |e: super::book::RecordError| Problem::from_error(ProblemKind::Failed, "records", &e);
    let open = |object: String, reason: String, next: &str| {
        Err(Problem::new(ProblemKind::Conflict, object, reason).next(next))
    };
    let (vms, damaged) = book.vms().map_err(failed)?;
    if let Some(d) = damaged.first() {
        let reason = format!("is set aside, so that nobody knows what it waits for: {}", d.reason);
        return open(format!("VM {}", d.vm), reason, "restore or remove its record, then rotate");
    }
    for record in &vms {
        let Some(given) = record.given_up().filter(|g| g.receipt.is_none()) else { continue };
        let reason = format!(
            "was handed over to {} in migration {}, without a receipt yet",
            given.to, given.migration
        );
        let next = format!(
            "start the broker and wait for it, or decide with 'cicada migration resolve {}'",
            given.migration
        );
        return open(format!("VM {}", record.spec.name), reason, &next);
    }
    let resolutions = book.resolutions().map_err(failed)?;
    let undecided = |o: &Outcome| matches!(o, Outcome::Awaited | Outcome::Contested { .. });
    if let Some(r) = resolutions.iter().find(|r| undecided(&r.outcome)) {
        let reason = format!("what was decided about {} is not confirmed by {} yet", r.name, r.peer);
        return open(format!("migration {}", r.migration), reason, "start the broker and wait for it");
    }
    if let Some(record) = book.migrations().map_err(failed)?.iter().find(|r| !r.course.ended) {
        let reason = format!("has not ended: {}", record.course.phase);
        let next = "start the broker, and wait for its end or cancel it; then stop the broker and rotate";
        return open(format!("migration {}", record.course.id), reason, next);
    }
    Ok(())
}

impl Broker {
    /// How earlier keys of this cloud gave way to the one it has, the newest last.
    pub fn successions(&self) -> &Successions {
        &self.successions
    }

    pub(super) fn take_key_news(&mut self, member: &MemberJid, news: &KeyNews) {
        if let KeyNews::Fork { old, known, other } = news {
            let reason = format!(
                "the key {} was succeeded by {}, and now by {} as well: one of the two is a thief's",
                old.fingerprint(),
                known.fingerprint(),
                other.fingerprint()
            );
            return self.refuse(member, Refused::ChangedKey, &reason);
        }
        if let Err(e) = self.book.save_trust(self.members.keys().kept()) {
            tracing::error!(%member, error = chain(&e), "the member's key is believed, but that is not recorded");
        }
        if let KeyNews::Followed { from, to, configured } = news {
            let (from_key, to_key) = (from.fingerprint(), to.fingerprint());
            tracing::warn!(%member, from = from_key, to = to_key, "the member's key gave way to another, signed by both: followed");
            if *configured {
                tracing::warn!(%member, key = %to, "trust.pinned in the configuration still names the earlier key: write this one there");
            }
            self.part_with(member, Some(*from));
        }
    }

    /// The key a member is to be asked by that was known by `key`: what followed that, if it is believed.
    pub(super) fn by_its_key_now(&self, peer: &Peer) -> Peer {
        let keys = self.members.keys();
        let now = keys.trusted(&peer.jid).filter(|now| keys.leads(&peer.jid, &peer.key, now));
        Peer { jid: peer.jid.clone(), key: now.unwrap_or(peer.key) }
    }

    /// Whether `key` is this cloud's, or was.
    pub(super) fn is_or_was_ours(&self, key: &PublicKey) -> bool {
        self.successions.leads(key, &self.key.public())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;
    use crate::migration::message::Seed;
    use crate::migration::records::{GivenUp, Ownership, VmRecord};
    use crate::runner::{RecordBook, Records};
    use crate::types::{ByteSize, IdentityKey, MigrationId, RecipeId, VmId};
    use crate::vm::chunk_map::MapRef;
    use crate::vm::{Firmware, VmSpec};

    #[test]
    fn a_key_stays_while_something_it_signed_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        open_business(&RecordBook::at_rest(records.clone())).unwrap();
        let spec = VmSpec {
            id: VmId::random(),
            name: "web".parse().unwrap(),
            cpus: 1,
            memory: ByteSize::mib(64),
            recipe: RecipeId::of(b"r"),
            root_size: ByteSize::mib(1),
            user_data_size: ByteSize(0),
            nics: Vec::new(),
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: Firmware::Bios,
            disk_bus: Default::default(),
            system_uuid: None,
        };
        let mut record = VmRecord::new(spec, Vec::new(), "disks-1", UnixMillis(1));
        records.save_vm(&record).unwrap();
        open_business(&RecordBook::at_rest(records.clone())).unwrap();
        let migration = MigrationId::random();
        let empty = MapRef { block_size_bytes: 4096, disk_size_bytes: 1 << 20, root: None };
        let given = GivenUp {
            migration,
            to: "b@x".parse().unwrap(),
            to_key: IdentityKey::from_secret_bytes(&[2; 32]).public(),
            record: String::new(),
            was_running: false,
            since: UnixMillis(2),
            seed: Some(Seed { root_delta: empty, user_data: empty }),
            receipt: None,
            scrub_after: None,
        };
        record.ownership = Ownership::GivenUp(Box::new(given.clone()));
        records.save_vm(&record).unwrap();
        let p = open_business(&RecordBook::at_rest(records.clone())).unwrap_err();
        assert_eq!((p.kind, p.object.as_str()), (ProblemKind::Conflict, "VM web"));
        assert!(p.reason.contains("b@x") && p.to_string().contains(&migration.to_string()), "{p}");
        // Left to the other by an operator, who has not heard from it: it is asked still.
        record.ownership =
            Ownership::GivenUp(Box::new(GivenUp { scrub_after: Some(UnixMillis(9)), ..given }));
        records.save_vm(&record).unwrap();
        open_business(&RecordBook::at_rest(records.clone())).unwrap_err();
        std::fs::write(records.vm_dir(record.spec.id).join("record.json"), b"{").unwrap();
        assert!(
            open_business(&RecordBook::at_rest(records.clone())).unwrap_err().reason.contains("set aside")
        );
    }
}
