//! Which member to choose: fewest bytes first, then free memory, then the name, so that equal
//! snapshots always give the same order.

use crate::types::MemberJid;

/// What one member answered, reduced to what matters for the choice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    pub member: MemberJid,
    pub possible: bool,
    pub differences: usize,
    pub bytes_missing: u64,
    pub memory_bytes_free: u64,
}

/// Positions of `offers`, best first; those that cannot take the VM come last.
pub fn rank(offers: &[Offer]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..offers.len()).collect();
    order.sort_by(|a, b| {
        let key = |i: usize| {
            let o = &offers[i];
            (!o.possible, o.differences, o.bytes_missing, u64::MAX - o.memory_bytes_free, &o.member)
        };
        key(*a).cmp(&key(*b))
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewest_bytes_win_and_refusals_come_last() {
        let offer = |m: &str, possible, bytes_missing, memory_bytes_free| Offer {
            member: m.parse().unwrap(),
            possible,
            differences: 0,
            bytes_missing,
            memory_bytes_free,
        };
        let offers = [
            offer("a@x", false, 0, 9),
            offer("b@x", true, 5, 1),
            offer("c@x", true, 5, 2),
            offer("d@x", true, 1, 1),
        ];
        assert_eq!(rank(&offers), [3, 2, 1, 0]);
    }
}
