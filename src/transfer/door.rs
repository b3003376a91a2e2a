//! Who is let as far as a handshake: at most so many dials at once, and so many from one address in
//! a while. Pure; fed with the time.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::endpoint::Settings;
use crate::clock::UnixMillis;
use crate::federation::rate::{Allowance, Buckets};

/// Addresses told apart; beyond it dials share one allowance.
const ADDRESSES_MAX: usize = 4096;

/// What to do with a dial.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    Welcome,
    /// It must first prove that it receives at its address.
    Prove,
    Refuse(Crowd),
}

/// Why a dial is refused unheard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crowd {
    Connections,
    Handshakes,
    Address,
}

impl Crowd {
    pub fn as_str(self) -> &'static str {
        match self {
            Crowd::Connections => "too many connections",
            Crowd::Handshakes => "too many handshakes under way",
            Crowd::Address => "too many dials from this address",
        }
    }
}

/// One dial, as it comes in.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    pub address: IpAddr,
    /// It proved its address.
    pub proven: bool,
    /// It can be asked to.
    pub may_prove: bool,
}

pub struct Door {
    /// What an address may do that anybody could have written on a datagram is counted apart from
    /// what it proved, so that nobody is locked out in another's name.
    dials: Buckets<(bool, IpAddr)>,
}

impl Default for Door {
    fn default() -> Self {
        Self { dials: Buckets::new(ADDRESSES_MAX) }
    }
}

impl Door {
    pub fn enter(
        &mut self,
        dial: Dial,
        connections: usize,
        handshakes: usize,
        limits: &Settings,
        now: UnixMillis,
    ) -> Entry {
        if connections >= limits.connections_max {
            return Entry::Refuse(Crowd::Connections);
        }
        if handshakes >= limits.handshakes_max {
            return Entry::Refuse(Crowd::Handshakes);
        }
        let crowded = connections >= limits.connections_max / 2 || handshakes >= limits.handshakes_max / 2;
        if crowded && dial.may_prove {
            return Entry::Prove;
        }
        let allowance = Allowance::new(limits.dials_burst.into(), limits.dials_per_s.into());
        match self.dials.take(&(dial.proven, site(dial.address)), &allowance, now) {
            Ok(()) => Entry::Welcome,
            Err(_) if dial.may_prove => Entry::Prove,
            Err(_) => Entry::Refuse(Crowd::Address),
        }
    }
}

/// One site has a whole /64 of IPv6 addresses at least (RFC 6177).
pub fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

/// Time for the door: milliseconds since any fixed start.
pub fn moment(since: Duration) -> UnixMillis {
    UnixMillis::default().plus(since)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Settings {
        Settings {
            connections_max: 100,
            handshakes_max: 20,
            dials_burst: 10,
            dials_per_s: 2,
            ..Settings::default()
        }
    }

    fn dial(address: &str, proven: bool) -> Dial {
        Dial { address: address.parse().unwrap(), proven, may_prove: !proven }
    }

    #[test]
    fn one_address_dials_no_more_often_than_allowed_and_others_go_on() {
        let (mut door, limits) = (Door::default(), limits());
        let mut enter = |d: Dial, s: u64| door.enter(d, 0, 0, &limits, moment(Duration::from_secs(1000 + s)));
        let eve = dial("192.0.2.1", true);
        assert_eq!((0..50).filter(|_| enter(eve, 0) == Entry::Welcome).count(), 10);
        assert_eq!(enter(eve, 0), Entry::Refuse(Crowd::Address));
        assert_eq!(enter(dial("192.0.2.2", true), 0), Entry::Welcome);
        assert_eq!(enter(eve, 1), Entry::Welcome);
        let near = (0..50).filter(|n| enter(dial(&format!("2001:db8::{n}"), true), 0) == Entry::Welcome);
        assert_eq!(near.count(), 10, "a site is one address");
    }

    #[test]
    fn nobody_is_locked_out_in_anothers_name() {
        let (mut door, limits, now) = (Door::default(), limits(), moment(Duration::from_secs(1000)));
        for _ in 0..1000 {
            door.enter(dial("192.0.2.1", false), 0, 0, &limits, now);
        }
        assert_eq!(door.enter(dial("192.0.2.1", false), 0, 0, &limits, now), Entry::Prove);
        assert_eq!(door.enter(dial("192.0.2.1", true), 0, 0, &limits, now), Entry::Welcome);
    }

    #[test]
    fn a_crowd_must_prove_itself_and_then_waits_outside() {
        let (mut door, limits, now) = (Door::default(), limits(), moment(Duration::from_secs(1000)));
        let (stranger, proven) = (dial("192.0.2.1", false), dial("192.0.2.1", true));
        assert_eq!(door.enter(stranger, 49, 9, &limits, now), Entry::Welcome);
        assert_eq!(door.enter(stranger, 50, 0, &limits, now), Entry::Prove);
        assert_eq!(door.enter(stranger, 0, 10, &limits, now), Entry::Prove);
        assert_eq!(door.enter(proven, 99, 19, &limits, now), Entry::Welcome);
        assert_eq!(door.enter(proven, 100, 0, &limits, now), Entry::Refuse(Crowd::Connections));
        assert_eq!(door.enter(proven, 0, 20, &limits, now), Entry::Refuse(Crowd::Handshakes));
    }
}
