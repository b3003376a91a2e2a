//! Which addresses another cloud may send us to. A member names where it serves, by address or by
//! name; without a rule it could make this broker dial services of this machine, or of networks that
//! only this machine reaches.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use ipnet::IpNet;

/// Networks that are not the Internet's, with what they are: the special-purpose registries of IANA
/// (RFC 6890), and what lies in 2000::/3 but leads into IPv4 (6to4, Teredo).
const SPECIAL: [(&str, &str); 21] = [
    ("0.0.0.0/8", "this network"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared by a provider's customers"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "for protocols"),
    ("192.0.2.0/24", "for documentation"),
    ("192.88.99.0/24", "a 6to4 relay"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "for benchmarks"),
    ("198.51.100.0/24", "for documentation"),
    ("203.0.113.0/24", "for documentation"),
    ("240.0.0.0/4", "reserved"),
    ("::1/128", "loopback"),
    ("fc00::/7", "private"),
    ("fe80::/10", "link-local"),
    ("2001::/23", "for protocols"),
    ("2001:db8::/32", "for documentation"),
    ("2002::/16", "6to4"),
    ("3fff::/20", "for documentation"),
];

static SPECIAL_NETWORKS: LazyLock<Vec<(IpNet, &'static str)>> = LazyLock::new(|| {
    SPECIAL.iter().filter_map(|(network, what)| Some((network.parse().ok()?, *what))).collect()
});

/// Why an address is not dialled: what it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Barred {
    /// Whatever is configured: nobody can be there.
    Always(&'static str),
    /// Unless its network is configured.
    Unlisted(&'static str),
}

/// The addresses that are dialled: global ones, and those in configured networks.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    networks: Vec<IpNet>,
}

impl Reach {
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self { networks }
    }

    /// Whether `ip` is dialled. An IPv4 address that is written as an IPv6 one is what it means.
    pub fn check(&self, ip: IpAddr) -> Result<(), Barred> {
        let ip = ip.to_canonical();
        if ip.is_unspecified() {
            // The kernel takes it for loopback.
            return Err(Barred::Always("unspecified"));
        }
        if ip.is_multicast() {
            return Err(Barred::Always("multicast"));
        }
        if ip == Ipv4Addr::BROADCAST {
            return Err(Barred::Always("broadcast"));
        }
        if self.networks.iter().any(|network| network.contains(&ip)) {
            return Ok(());
        }
        let special = SPECIAL_NETWORKS.iter().find(|(network, _)| network.contains(&ip));
        match (special, ip) {
            (Some((_, what)), _) => Err(Barred::Unlisted(what)),
            (None, IpAddr::V6(ip)) if !is_global_unicast(ip) => Err(Barred::Unlisted("not global")),
            (None, _) => Ok(()),
        }
    }
}

/// 2000::/3 (RFC 4291, section 2.4); the rest is not assigned, or maps IPv4 such as 64:ff9b::/96.
fn is_global_unicast(ip: Ipv6Addr) -> bool {
    ip.segments()[0] >> 13 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(networks: &[&str]) -> Reach {
        Reach::new(networks.iter().map(|n| n.parse().unwrap()).collect())
    }

    #[test]
    fn only_global_addresses_are_dialled_unless_their_network_is_listed() {
        assert_eq!(SPECIAL_NETWORKS.len(), SPECIAL.len(), "each line of the table is a network");
        let unlisted = [
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.7",
            "240.0.0.1",
            "255.255.255.254",
            "::1",
            "fc00::1",
            "fdff::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "2001::1",
            "2001:1ff::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "3fff:1::1",
            "64:ff9b::7f00:1",
            "::7f00:1",
            "100::1",
            "4000::1",
            "::ffff:127.0.0.1",
            "::ffff:10.1.2.3",
            "::ffff:169.254.169.254",
        ];
        let all = reach(&["0.0.0.0/0", "::/0"]);
        for text in unlisted {
            let ip: IpAddr = text.parse().unwrap();
            assert!(matches!(reach(&[]).check(ip), Err(Barred::Unlisted(_))), "{text}");
            assert_eq!(all.check(ip), Ok(()), "{text}");
        }
        for text in
            ["0.0.0.0", "::", "::ffff:0.0.0.0", "224.0.0.1", "239.1.1.1", "ff02::1", "255.255.255.255"]
        {
            let ip: IpAddr = text.parse().unwrap();
            for reach in [reach(&[]), all.clone()] {
                assert!(matches!(reach.check(ip), Err(Barred::Always(_))), "{text}");
            }
        }
        for text in [
            "1.1.1.1",
            "9.255.255.255",
            "100.63.0.1",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.169.0.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2001:200::1",
            "2606:4700::1",
            "3fff:ffff::1",
            "::ffff:9.9.9.9",
        ] {
            assert_eq!(reach(&[]).check(text.parse().unwrap()), Ok(()), "{text}");
        }
    }

    #[test]
    fn a_listed_network_opens_itself_alone_in_either_writing() {
        let lab = reach(&["10.1.0.0/16", "fd00:1::/32"]);
        for text in ["10.1.2.3", "::ffff:10.1.2.3", "fd00:1::5", "8.8.8.8"] {
            assert_eq!(lab.check(text.parse().unwrap()), Ok(()), "{text}");
        }
        for text in ["10.2.0.1", "127.0.0.1", "::ffff:10.2.0.1", "fd00:2::5", "::1"] {
            assert!(lab.check(text.parse().unwrap()).is_err(), "{text}");
        }
    }
}
