//! What a guest's card of a user network reaches, said in Ethernet frames to the very process that
//! stands behind the card, with real passt, real servers on this host, and one in a namespace of
//! its own for the outside.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);

/// A card whose guest is the test.
pub struct Card {
    socket: UnixStream,
    pub process: Child,
    port: u16,
}

impl Card {
    pub fn plug(passt: &Path) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_cicada"))
            .arg("guest-link")
            .arg(passt)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        socket.set_read_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        let mut card = Self { socket, process, port: 40_000 };
        // Answers as soon as it is there: ARP for the gateway.
        card.send([0x08, 0x06], &arp_request([10, 0, 2, 2]));
        card.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        card.receive().expect("passt answers ARP");
        card.socket.set_read_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        card
    }

    fn send(&mut self, kind: [u8; 2], packet: &[u8]) {
        let header = [&[0x52, 0x55, 0x0a, 0, 2, 2, 0x52, 0x54, 0, 0, 0, 1][..], &kind].concat();
        let frame = [header.as_slice(), packet].concat();
        self.socket.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
        self.socket.write_all(&frame).unwrap();
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut length = [0; 4];
        self.socket.read_exact(&mut length).ok()?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.socket.read_exact(&mut frame).ok()?;
        Some(frame)
    }

    /// Whether a connection to the address is accepted.
    pub fn connects(&mut self, to: Ipv4Addr, port: u16) -> bool {
        self.port += 1;
        let mine = self.port;
        let mut tcp = vec![0; 20];
        tcp[0..2].copy_from_slice(&mine.to_be_bytes());
        tcp[2..4].copy_from_slice(&port.to_be_bytes());
        tcp[12] = 5 << 4;
        tcp[13] = 0x02; // SYN
        tcp[14..16].copy_from_slice(&[0xff, 0xff]);
        self.send([0x08, 0x00], &ipv4(6, to, tcp));
        let start = Instant::now();
        while start.elapsed() < ANSWER_TIMEOUT {
            let Some(frame) = self.receive() else { return false };
            let is_tcp = frame.len() >= 54 && frame[12..14] == [0x08, 0x00] && frame[23] == 6;
            if is_tcp && frame[36..38] == mine.to_be_bytes() {
                return frame[47] == 0x12; // SYN and ACK
            }
        }
        false
    }

    pub fn says(&mut self, to: Ipv4Addr, port: u16) {
        let mut udp = [41_000u16.to_be_bytes(), port.to_be_bytes(), 12u16.to_be_bytes(), [0; 2]].concat();
        udp.extend(b"ping");
        self.send([0x08, 0x00], &ipv4(17, to, udp));
    }

    /// Ends the guest; tells whether the process behind the card ended by that.
    pub fn unplug(self) -> bool {
        let Self { socket, mut process, .. } = self;
        drop(socket);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            if process.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = process.kill();
        let _ = process.wait();
        false
    }
}

fn arp_request(of: [u8; 4]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0, 0, 1];
    arp.extend(GUEST.octets());
    arp.extend([0; 6]);
    arp.extend(of);
    arp
}

/// An IPv4 packet, with the checksums of its header and of TCP.
fn ipv4(protocol: u8, to: Ipv4Addr, mut body: Vec<u8>) -> Vec<u8> {
    if protocol == 6 {
        let mut pseudo = [GUEST.octets(), to.octets(), [0, protocol, 0, body.len() as u8]].concat();
        pseudo.extend(&body);
        body[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    }
    let mut packet = vec![0x45, 0, 0, (20 + body.len()) as u8, 0, 1, 0, 0, 64, protocol, 0, 0];
    packet.extend(GUEST.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(body);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Services of this host, on all its addresses.
pub struct Services {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Services {
    pub fn open() -> Self {
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        udp.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        Self { tcp: TcpListener::bind("0.0.0.0:0").unwrap(), udp }
    }
    pub fn tcp_port(&self) -> u16 {
        self.tcp.local_addr().unwrap().port()
    }
    pub fn udp_port(&self) -> u16 {
        self.udp.local_addr().unwrap().port()
    }
    pub fn hears(&self) -> bool {
        self.udp.recv(&mut [0; 64]).is_ok()
    }
}

/// A namespace with a server on port 7: what is outside. None, said loudly, without the privilege.
pub struct Outside {
    name: String,
    server: Child,
    pub address: Ipv4Addr,
    /// The address of this host in the network between.
    pub ours: Ipv4Addr,
}

impl Outside {
    pub fn make() -> Option<Self> {
        let n = std::process::id();
        let (name, veth) = (format!("cicada-{n}"), format!("cic{n}"));
        let net = [10, 213, (n >> 6) as u8, ((n & 0x3f) << 2) as u8];
        let at = |last: u8| Ipv4Addr::new(net[0], net[1], net[2], net[3] + last);
        let (ours, address) = (at(1), at(2));
        let steps = [
            format!("netns add {name}"),
            format!("link add {veth} type veth peer name eth0 netns {name}"),
            format!("addr add {ours}/30 dev {veth}"),
            format!("link set {veth} up"),
            format!("-n {name} addr add {address}/30 dev eth0"),
            format!("-n {name} link set eth0 up"),
        ];
        for step in steps {
            let output = Command::new("ip").args(step.split(' ')).output();
            if !output.as_ref().is_ok_and(|o| o.status.success()) {
                let _ = writeln!(
                    std::io::stderr(),
                    "SKIPPED: no network namespace can be made: ip {step}: {output:?}"
                );
                let _ = Command::new("ip").args(["netns", "del", &name]).output();
                return None;
            }
        }
        let mut serve = Command::new("ip");
        serve.args(["netns", "exec", &name, "busybox", "nc", "-ll", "-p", "7", "-e", "cat"]);
        let Ok(server) = serve.stdin(Stdio::null()).spawn() else {
            let _ = writeln!(std::io::stderr(), "SKIPPED: busybox is missing: install busybox-static");
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
            return None;
        };
        let outside = Self { name, server, address, ours };
        let start = Instant::now();
        while std::net::TcpStream::connect((address, 7)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "the server outside does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(outside)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}
