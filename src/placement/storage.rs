//! What storage may still be promised to VMs. Their disks are sparse: what a VM was promised and has not
//! written yet looks free, and is not.

use crate::types::ByteSize;
use crate::vm::VmSpec;

/// The file system that VMs' disks lie on, at one instant, with what was promised of it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Storage {
    /// Free for the broker, as the file system says.
    pub free_bytes: u64,
    /// Of that: never given to VMs, so that records can be written when guests have filled the rest.
    pub floor_bytes: u64,
    /// What disks of VMs here, and of those on their way here, take up already.
    pub allocated_bytes: u64,
    /// The sizes of all these disks as their guests see them.
    pub promised_bytes: u64,
    /// What VMs on their way here will still write before they are here.
    pub arriving_bytes: u64,
    /// How many bytes are promised for each that is there, 1 or more.
    pub overcommit: f64,
}

/// What one VM needs of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Needed {
    /// At most, to bring it here: its composition unless it is there, its delta and user data.
    pub at_once_bytes: u64,
    /// The sizes of its disks.
    pub promised_bytes: u64,
}

/// Room a root delta is given beside everything else.
const OVERLAY_RESERVE_BYTES: u64 = 256 << 20;

impl Needed {
    /// By `spec`, which may not have been found sound yet; `composed` says whether its composition is here.
    pub fn by(spec: &VmSpec, composed: bool) -> Self {
        let composition = if composed { 0 } else { spec.root_size.0 / 2 };
        Self {
            at_once_bytes: composition
                .saturating_add(spec.user_data_size.0)
                .saturating_add(OVERLAY_RESERVE_BYTES),
            promised_bytes: promised(spec),
        }
    }
}

/// The sizes of a VM's disks together.
pub fn promised(spec: &VmSpec) -> u64 {
    spec.root_size.0.saturating_add(spec.user_data_size.0)
}

impl Storage {
    /// Most that may be promised to all VMs together.
    pub fn promisable_bytes(&self) -> u64 {
        let there = self.free_bytes.saturating_sub(self.floor_bytes).saturating_add(self.allocated_bytes);
        (there as f64 * self.overcommit) as u64
    }

    /// What of that is not promised yet.
    pub fn unpromised_bytes(&self) -> u64 {
        self.promisable_bytes().saturating_sub(self.promised_bytes)
    }

    /// What one more VM may write on its way here.
    pub fn at_hand_bytes(&self) -> u64 {
        self.free_bytes.saturating_sub(self.floor_bytes).saturating_sub(self.arriving_bytes)
    }

    /// Why there is not enough: which limit, what is promised and what is free; and what to do.
    pub fn lacks(&self, needed: &Needed) -> Option<(String, &'static str)> {
        if needed.at_once_bytes > self.at_hand_bytes() {
            let text = format!(
                "needs up to {} of storage to come; {} are free, of which {} are kept for records and {} for VMs on \
                 their way",
                ByteSize(needed.at_once_bytes),
                ByteSize(self.free_bytes),
                ByteSize(self.floor_bytes),
                ByteSize(self.arriving_bytes),
            );
            return Some((text, "free storage there or choose another member"));
        }
        if needed.promised_bytes > self.unpromised_bytes() {
            let text = format!(
                "its disks may grow to {}; {} of {} are promised to other VMs already (storage_overcommit {}), {} \
                 are free",
                ByteSize(needed.promised_bytes),
                ByteSize(self.promised_bytes),
                ByteSize(self.promisable_bytes()),
                self.overcommit,
                ByteSize(self.free_bytes),
            );
            let next = "move or delete VMs there, let its operator raise hypervisor.storage_overcommit, or choose \
                        another member";
            return Some((text, next));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn disk() -> Storage {
        Storage {
            free_bytes: 60 * GIB,
            floor_bytes: GIB,
            allocated_bytes: 41 * GIB,
            promised_bytes: 80 * GIB,
            arriving_bytes: 10 * GIB,
            overcommit: 1.0,
        }
    }

    #[test]
    fn what_guests_were_promised_is_not_promised_again() {
        let s = disk();
        assert_eq!(
            (s.promisable_bytes(), s.unpromised_bytes(), s.at_hand_bytes()),
            (100 * GIB, 20 * GIB, 49 * GIB)
        );
        let needs =
            |at_once, promised| Needed { at_once_bytes: at_once * GIB, promised_bytes: promised * GIB };
        assert_eq!(s.lacks(&needs(49, 20)), None, "both limits may be reached");
        let (text, next) = s.lacks(&needs(1, 21)).unwrap();
        let expected = "its disks may grow to 21 GiB; 80 GiB of 100 GiB are promised to other VMs already \
                        (storage_overcommit 1), 60 GiB are free";
        assert_eq!(text, expected);
        assert!(next.contains("hypervisor.storage_overcommit"), "{next}");
        let (text, _) = s.lacks(&needs(50, 1)).unwrap();
        let expected = "needs up to 50 GiB of storage to come; 60 GiB are free, of which 1 GiB are kept for records \
                        and 10 GiB for VMs on their way";
        assert_eq!(text, expected);
        let generous = Storage { overcommit: 1.5, ..s };
        assert_eq!(generous.unpromised_bytes(), 70 * GIB);
        assert!(
            generous.lacks(&needs(50, 1)).is_some(),
            "what must be written at once is never over-committed"
        );
    }

    #[test]
    fn a_guest_that_writes_what_it_was_promised_changes_nothing() {
        let before = disk();
        let after = Storage {
            free_bytes: before.free_bytes - 7 * GIB,
            allocated_bytes: before.allocated_bytes + 7 * GIB,
            ..before
        };
        assert_eq!(after.unpromised_bytes(), before.unpromised_bytes());
    }

    #[test]
    fn absurd_sizes_do_not_wrap() {
        let all = Needed { at_once_bytes: u64::MAX, promised_bytes: u64::MAX };
        assert!(disk().lacks(&all).is_some());
        let full = Storage { free_bytes: 1, promised_bytes: u64::MAX, arriving_bytes: u64::MAX, ..disk() };
        assert_eq!((full.unpromised_bytes(), full.at_hand_bytes()), (0, 0));
    }
}
