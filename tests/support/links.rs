//! Links that can be cut: one for an XMPP connection, one for the data between brokers.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// A way to a port of this machine, by another port.
pub struct Wire {
    pub port: u16,
    cut: watch::Sender<bool>,
}

impl Wire {
    /// Cut, its connections break at once and without a farewell, and new ones are refused.
    pub fn tcp(runtime: &Runtime, to: u16) -> Self {
        let (cut, is_cut) = watch::channel(false);
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut is_cut = is_cut.clone();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = is_cut.wait_for(|cut| *cut) => {
                            let _ = near.set_zero_linger();
                            let _ = far.set_zero_linger();
                        }
                    }
                });
            }
        });
        Self { port, cut }
    }

    /// Cut, its datagrams are lost.
    pub fn udp(runtime: &Runtime, to: u16) -> Self {
        let (cut, is_cut) = watch::channel(false);
        let near = Arc::new(runtime.block_on(UdpSocket::bind("127.0.0.1:0")).unwrap());
        let port = near.local_addr().unwrap().port();
        runtime.spawn(async move {
            let mut callers: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut datagram = vec![0; 1 << 16];
            loop {
                let Ok((n, caller)) = near.recv_from(&mut datagram).await else { continue };
                if *is_cut.borrow() {
                    continue;
                }
                if let Entry::Vacant(place) = callers.entry(caller) {
                    let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                    far.connect(("127.0.0.1", to)).await.unwrap();
                    place.insert(far.clone());
                    tokio::spawn(answers(far, near.clone(), caller, is_cut.clone()));
                }
                let _ = callers[&caller].send(&datagram[..n]).await;
            }
        });
        Self { port, cut }
    }

    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    pub fn mend(&self) {
        self.cut.send_replace(false);
    }
}

async fn answers(
    far: Arc<UdpSocket>,
    near: Arc<UdpSocket>,
    caller: SocketAddr,
    is_cut: watch::Receiver<bool>,
) {
    let mut datagram = vec![0; 1 << 16];
    loop {
        // A port that nobody listens at is told as an error, once for each datagram sent there.
        let Ok(n) = far.recv(&mut datagram).await else { continue };
        if !*is_cut.borrow() {
            let _ = near.send_to(&datagram[..n], caller).await;
        }
    }
}

pub fn free_udp_port() -> u16 {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
