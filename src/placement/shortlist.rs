//! Which members are asked whether they could take a VM: to ask tells them of it. Those that say in the
//! room already that they cannot are spared the question, and of many only some are asked, so that what a plan
//! costs follows from their number and not from the federation's.

use crate::federation::Member;
use crate::migration::{Denial, DenialCode};
use crate::types::ByteSize;
use crate::vm::VmSpec;

use super::storage::Needed;

/// Members that one plan asks, unless all are wanted.
pub const ASKED_MAX: usize = 8;
/// Of them, those that earlier answers speak for: the others may have learnt since, and are found this way.
const KNOWN_MAX: usize = 6;
/// Presence is rounded down to this.
const STORAGE_ROUNDING_BYTES: u64 = 1 << 30;

/// What a member answered about the VM a while ago.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Earlier {
    /// It could not, or would not, take it.
    No,
    /// It could, and lacked so much of it.
    Lacks { bytes: u64 },
}

/// A member that may be asked.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// As the room shows it.
    pub member: Option<&'a Member>,
    pub earlier: Option<Earlier>,
}

/// For each of `members`: why it is not asked about `spec`, or `None` if it is. At most `most` are asked.
pub fn shortlist(spec: &VmSpec, members: &[Choice<'_>], most: usize) -> Vec<Option<Denial>> {
    let mut left_out: Vec<_> =
        members.iter().map(|choice| choice.member.and_then(|member| obstacle(spec, member))).collect();
    let possible: Vec<usize> = (0..members.len()).filter(|at| left_out[*at].is_none()).collect();
    let mut known: Vec<(u64, usize)> = possible
        .iter()
        .filter_map(|at| match members[*at].earlier {
            Some(Earlier::Lacks { bytes }) => Some((bytes, *at)),
            _ => None,
        })
        .collect();
    known.sort_unstable();
    known.truncate(KNOWN_MAX);
    let free =
        |at: usize| members[at].member.and_then(|m| m.cloud.as_ref()?.capacity).map_or(0, |c| c.memory_free);
    let mut others: Vec<usize> =
        possible.into_iter().filter(|at| known.iter().all(|(_, known)| known != at)).collect();
    others.sort_by_key(|at| (members[*at].earlier == Some(Earlier::No), std::cmp::Reverse(free(*at))));
    for at in others.into_iter().skip(most.saturating_sub(known.len())) {
        let text = match members[at].earlier {
            Some(Earlier::No) => "it said no a while ago, and others are asked".to_owned(),
            _ => format!("{most} members that seem fitter are asked"),
        };
        left_out[at] =
            Some(Denial::new(DenialCode::Other, text).next("name it with --to, or ask everyone with --all"));
    }
    left_out
}

/// What a member says in the room that keeps the VM from it.
fn obstacle(spec: &VmSpec, member: &Member) -> Option<Denial> {
    let cloud = member.cloud.as_ref()?;
    let no = |code, text: String| Some(Denial::new(code, text).next("name it with --to if you know better"));
    if cloud.power.as_str() == "off" {
        return no(DenialCode::Busy, "it says that its hosts are off".into());
    }
    let networks = || cloud.features.iter().filter_map(|f| f.as_str().strip_prefix("network:"));
    // One that names none does not say.
    if networks().next().is_some()
        && let Some(nic) = spec.nics.iter().find(|nic| networks().all(|name| name != nic.network))
    {
        return no(DenialCode::Network, format!("it says that it has no network named {}", nic.network));
    }
    let capacity = cloud.capacity?;
    if capacity.cpus_free < u64::from(spec.cpus) {
        let text = format!("it says that {} CPUs are free, and {} are needed", capacity.cpus_free, spec.cpus);
        return no(DenialCode::Cpus, text);
    }
    if capacity.memory_free < spec.memory.0 {
        let free = ByteSize(capacity.memory_free);
        return no(
            DenialCode::Memory,
            format!("it says that {free} of memory are free, and {} are needed", spec.memory),
        );
    }
    let needed = Needed::by(spec, true).at_once_bytes;
    if capacity.storage_free.saturating_add(STORAGE_ROUNDING_BYTES) < needed {
        let (free, needed) = (ByteSize(capacity.storage_free), ByteSize(needed));
        return no(
            DenialCode::Storage,
            format!("it says that {free} of storage are free, and {needed} are needed"),
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;
    use crate::stanza::Cloud;
    use crate::stanza::cloud::Capacity;
    use crate::types::{RecipeId, VmId};
    use crate::vm::spec::Nic;
    use crate::vm::{Firmware, Mac};

    fn spec() -> VmSpec {
        let id = VmId::random();
        VmSpec {
            id,
            name: "web".parse().unwrap(),
            cpus: 2,
            memory: ByteSize::mib(512),
            recipe: RecipeId::of(b"r"),
            root_size: ByteSize::gib(2),
            user_data_size: ByteSize::gib(4),
            nics: vec![Nic { network: "lan".into(), mac: Mac::derived(id, 0), model: Default::default() }],
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: Firmware::Uefi,
            disk_bus: Default::default(),
            system_uuid: None,
        }
    }

    fn member(name: &str) -> Member {
        let capacity = Capacity {
            cpus: 8,
            cpus_free: 8,
            memory: 8 << 30,
            memory_free: 4 << 30,
            storage: 100 << 30,
            storage_free: 50 << 30,
        };
        let cloud = Cloud {
            power: "on".into(),
            capacity: Some(capacity),
            features: vec!["driver:qemu".into(), "network:lan".into()],
            ..Cloud::default()
        };
        Member {
            jid: format!("{name}@x").parse().unwrap(),
            resource: Some("r".into()),
            since: UnixMillis(0),
            last_seen: UnixMillis(0),
            name: None,
            key: None,
            cloud: Some(std::sync::Arc::new(cloud)),
            removed: false,
            forks: false,
        }
    }

    #[test]
    fn who_says_that_it_cannot_is_not_asked_and_the_reason_is_named() {
        let of = |spoil: &dyn Fn(&mut Cloud)| {
            let mut member = member("b");
            spoil(std::sync::Arc::make_mut(member.cloud.as_mut().unwrap()));
            let choice = Choice { member: Some(&member), earlier: None };
            shortlist(&spec(), &[choice], ASKED_MAX).remove(0).map(|denial| denial.code)
        };
        assert_eq!(of(&|_| ()), None);
        assert_eq!(of(&|c| c.power = "off".into()), Some(DenialCode::Busy));
        assert_eq!(of(&|c| c.features = vec!["network:wan".into()]), Some(DenialCode::Network));
        assert_eq!(of(&|c| c.capacity.as_mut().unwrap().cpus_free = 1), Some(DenialCode::Cpus));
        assert_eq!(of(&|c| c.capacity.as_mut().unwrap().memory_free = 511 << 20), Some(DenialCode::Memory));
        assert_eq!(of(&|c| c.capacity.as_mut().unwrap().storage_free = 3 << 30), Some(DenialCode::Storage));
        assert_eq!(of(&|c| c.features.clear()), None, "who does not say is asked");
        assert_eq!(of(&|c| c.capacity = None), None);
        assert_eq!(shortlist(&spec(), &[Choice { member: None, earlier: None }], 1), [None]);
    }

    #[test]
    fn of_many_only_some_are_asked() {
        let mut members: Vec<_> = (0..20).map(|n| member(&format!("m{n}"))).collect();
        for (n, member) in (0..).zip(&mut members) {
            std::sync::Arc::make_mut(member.cloud.as_mut().unwrap()).capacity.as_mut().unwrap().memory_free =
                (1 + n) << 30;
        }
        let mut all: Vec<_> =
            members.iter().map(|member| Choice { member: Some(member), earlier: None }).collect();
        let left_out = shortlist(&spec(), &all, ASKED_MAX);
        assert_eq!(left_out.iter().filter(|l| l.is_none()).count(), ASKED_MAX);
        assert!(left_out[12..].iter().all(Option::is_none), "those with the most room");
        let denial = left_out[0].as_ref().unwrap();
        assert!(denial.text.as_str().contains("8 members"), "{}", denial.text);
        assert!(denial.next_step.as_str().contains("--all"));
        assert_eq!(shortlist(&spec(), &all, usize::MAX), vec![None; 20]);

        // Whoever has most of the VM is asked first, whoever refused it last, and new ones still get a turn.
        for (at, choice) in all.iter_mut().enumerate().take(10) {
            choice.earlier = Some(Earlier::Lacks { bytes: 1000 - at as u64 });
        }
        all[19].earlier = Some(Earlier::No);
        let left_out = shortlist(&spec(), &all, ASKED_MAX);
        let asked: Vec<usize> = (0..20).filter(|at| left_out[*at].is_none()).collect();
        assert_eq!(asked, [4, 5, 6, 7, 8, 9, 17, 18]);
        assert!(left_out[19].as_ref().unwrap().text.as_str().contains("said no"));
    }
}
