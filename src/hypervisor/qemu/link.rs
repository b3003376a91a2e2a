//! What stands between a guest's card of a `user` network and the outside: a process for each card,
//! `cicada guest-link`, which runs passt and hands it only frames that may leave.
//!
//! ```text
//! QEMU <== socket pair ==> guest-link <== socket pair ==> passt <-- sockets --> outside
//! ```
//!
//! passt makes connections of the guest's packets, as any program of this host would make them. To
//! whom they go is decided here, for passt itself has no rule against packets that a guest addresses
//! to 127.0.0.1 by hand. Both sockets carry frames behind their length, 32 bits in network order, as
//! QEMU's `stream` network does.
//!
//! Nobody supervises the two: when QEMU ends, its end of the socket pair closes, guest-link ends at
//! that, and passt when guest-link does. They need no broker and leave no file.

use std::collections::HashSet;
use std::io::{self, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Behind the Ethernet header stands at most one IPv4 packet.
const FRAME_BYTES_MAX: usize = ETHERNET_BYTES + (1 << 16);
const ETHERNET_BYTES: usize = 14;
const IPV4_BYTES_MIN: usize = 20;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Addresses come and go; they are looked at again when the guest sends after this time.
const ADDRESSES_FRESH: Duration = Duration::from_secs(1);
/// Every address of this host, as the kernel's routing table has them.
const ROUTES: &str = "/proc/net/fib_trie";
/// Where the host's resolvers are written; the second is where systemd-resolved has those it asks.
const RESOLVERS: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/// As QEMU's own user network has it, so that guests find what they are used to.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Where the guest finds the host's resolver, wherever that listens.
const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

/// Whether a frame of a guest may leave: ARP, and IPv4 to anywhere but this host (`own`), the
/// unspecified address, and the link-local range, where clouds serve their machines' credentials
/// (RFC 3927). IPv6 and VLANs do not leave.
pub fn may_leave(frame: &[u8], own: &HashSet<Ipv4Addr>) -> bool {
    let Some((header, packet)) = frame.split_at_checked(ETHERNET_BYTES) else { return false };
    let kind = [header[12], header[13]];
    if kind == TYPE_ARP {
        return true;
    }
    if kind != TYPE_IPV4 || packet.len() < IPV4_BYTES_MIN || packet[0] >> 4 != 4 {
        return false;
    }
    let to = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
    // All of 0.0.0.0/8 is "this host on this network", RFC 1122 section 3.2.1.3.
    !(to.is_loopback() || to.octets()[0] == 0 || to.is_link_local() || own.contains(&to))
}

/// The host's own addresses in the kernel's text: an address line is followed by what it is.
fn own_addresses(routes: &str) -> HashSet<Ipv4Addr> {
    let mut own = HashSet::new();
    let mut last: Option<Ipv4Addr> = None;
    for line in routes.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if line.ends_with("host LOCAL") {
            own.extend(last);
        }
    }
    own
}

/// Resolvers in the text of a `resolv.conf` that a guest can ask itself.
fn resolvers(text: &str, own: &HashSet<Ipv4Addr>) -> Vec<Ipv4Addr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok());
    servers.filter(|s: &Ipv4Addr| !s.is_loopback() && !s.is_unspecified() && !own.contains(s)).collect()
}

/// This host's addresses, as of a moment ago.
struct Own {
    addresses: HashSet<Ipv4Addr>,
    read: Instant,
}

impl Own {
    fn read() -> io::Result<Self> {
        let addresses = own_addresses(&std::fs::read_to_string(ROUTES)?);
        Ok(Self { addresses, read: Instant::now() })
    }

    /// Where they cannot be read any more, nothing is known to be safe.
    fn fresh(&mut self) -> io::Result<&HashSet<Ipv4Addr>> {
        if self.read.elapsed() > ADDRESSES_FRESH {
            *self = Self::read()?;
        }
        Ok(&self.addresses)
    }
}

/// Links the card whose socket is standard input to the outside, until either end closes.
pub fn run(passt: &Path) -> io::Result<()> {
    let qemu = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let own = Own::read()?;
    let (outside, theirs) = UnixStream::pair()?;
    let mut child = command(passt, &own.addresses)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()?;
    let (mut from_outside, mut to_qemu) = (outside.try_clone()?, qemu.try_clone()?);
    let closing = outside.try_clone()?;
    let back = std::thread::spawn(move || {
        let copied = io::copy(&mut from_outside, &mut to_qemu);
        // The other direction waits for QEMU, which is to see that the cable is out.
        let _ = to_qemu.shutdown(std::net::Shutdown::Both);
        copied
    });
    let sent = forward(qemu, outside, own);
    // Seen as the end of its client by passt, and by the thread.
    let _ = closing.shutdown(std::net::Shutdown::Both);
    let _ = back.join();
    let status = child.wait()?;
    sent?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{}: {status}", passt.display()))) }
}

/// passt for one card. The template interface only names defaults that are given here; `lo` is
/// always there, so that passt also starts on a host that has no default route yet.
fn command(passt: &Path, own: &HashSet<Ipv4Addr>) -> Command {
    let mut command = Command::new(passt);
    command
        .args(["--foreground", "--stderr", "--quiet", "--fd", "0", "--ipv4-only", "--interface", "lo"])
        .args(["--address", &GUEST.to_string(), "--netmask", "255.255.255.0", "--mtu", "1500"])
        .args(["--gateway", &GATEWAY.to_string(), "--mac-addr", "52:55:0a:00:02:02", "--no-map-gw"])
        .args(["--dns-forward", &RESOLVER.to_string(), "--tcp-ports", "none", "--udp-ports", "none"]);
    let known = RESOLVERS.iter().map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let first = known.map(|text| resolvers(&text, own)).find(|found| !found.is_empty());
    for resolver in first.unwrap_or_default() {
        command.args(["--dns", &resolver.to_string()]);
    }
    command
}

/// Hands on what may leave, until the guest's side ends.
fn forward(from: impl Read, mut to: impl Write, mut own: Own) -> io::Result<()> {
    let mut from = BufReader::with_capacity(2 * FRAME_BYTES_MAX, from);
    let mut message = Vec::with_capacity(4 + FRAME_BYTES_MAX);
    loop {
        let mut length = [0; 4];
        match from.read_exact(&mut length) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let bytes = u32::from_be_bytes(length) as usize;
        if bytes > FRAME_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {bytes} bytes")));
        }
        message.clear();
        message.extend_from_slice(&length);
        message.resize(4 + bytes, 0);
        from.read_exact(&mut message[4..])?;
        if may_leave(&message[4..], own.fresh()?) {
            to.write_all(&message)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES_SAMPLE: &str = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     \
        +-- 192.0.2.0/24 2 0 2\n        |-- 192.0.2.0\n           /24 link UNICAST\n        |-- 192.0.2.2\n           \
        /32 host LOCAL\n        |-- 192.0.2.255\n           /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n";

    fn own() -> HashSet<Ipv4Addr> {
        own_addresses(ROUTES_SAMPLE)
    }

    fn frame(kind: [u8; 2], to: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET_BYTES + IPV4_BYTES_MIN];
        frame[12..14].copy_from_slice(&kind);
        frame[14] = 0x45;
        frame[30..34].copy_from_slice(&to);
        frame
    }

    #[test]
    fn the_hosts_addresses_are_read_from_the_kernels_text() {
        assert_eq!(own(), HashSet::from([[192, 0, 2, 2].into(), [127, 0, 0, 1].into()]));
        assert!(Own::read().unwrap().addresses.contains(&Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn frames_leave_for_anywhere_but_this_host() {
        for to in [[192, 0, 2, 1], [198, 51, 100, 7], [10, 0, 2, 3], [255, 255, 255, 255]] {
            assert!(may_leave(&frame(TYPE_IPV4, to), &own()), "{to:?}");
        }
        for to in
            [[127, 0, 0, 1], [127, 9, 9, 9], [0, 0, 0, 0], [0, 1, 2, 3], [169, 254, 169, 254], [192, 0, 2, 2]]
        {
            assert!(!may_leave(&frame(TYPE_IPV4, to), &own()), "{to:?}");
        }
        assert!(may_leave(&frame(TYPE_ARP, [0; 4]), &own()));
        for kind in [[0x86, 0xdd], [0x81, 0x00], [0x88, 0xa8], [0, 0]] {
            assert!(!may_leave(&frame(kind, [198, 51, 100, 7]), &own()), "{kind:?}");
        }
        let whole = frame(TYPE_IPV4, [198, 51, 100, 7]);
        for cut in 0..whole.len() {
            assert!(!may_leave(&whole[..cut], &own()), "{cut} bytes");
        }
    }

    #[test]
    fn what_may_not_leave_is_left_out_and_senseless_lengths_end_the_link() {
        let (good, bad) = (frame(TYPE_IPV4, [198, 51, 100, 7]), frame(TYPE_IPV4, [127, 0, 0, 1]));
        let sent = |f: &[u8]| [&(f.len() as u32).to_be_bytes(), f].concat();
        let input = [sent(&good), sent(&bad), sent(&[]), sent(&good)].concat();
        let mut output = Vec::new();
        forward(&input[..], &mut output, Own { addresses: own(), read: Instant::now() }).unwrap();
        assert_eq!(output, [sent(&good), sent(&good)].concat());
        let long = (FRAME_BYTES_MAX as u32 + 1).to_be_bytes();
        assert!(forward(&long[..], &mut output, Own { addresses: own(), read: Instant::now() }).is_err());
    }

    #[test]
    fn resolvers_on_this_host_are_not_for_the_guest_to_ask() {
        let text =
            "# c\nnameserver 127.0.0.53\nnameserver 192.0.2.2\nnameserver fd00::1\nnameserver\t9.9.9.9\n";
        assert_eq!(resolvers(text, &own()), [Ipv4Addr::new(9, 9, 9, 9)]);
    }
}
