//! The UDP socket of an endpoint, with the bandwidth cap built in: below congestion control, so
//! every connection, stream and retransmission is counted, and nothing is dropped to hold it.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, UdpPoller};
use rustix::net::sockopt;
use tokio::time::{Instant, Sleep, sleep_until};

use super::limiter::Limiter;

/// 30 ms at 1 Gbit/s: what may arrive while the process does not get to run.
const BUFFER_BYTES: usize = 4 << 20;
/// Below this rate datagrams go one by one; a batch would keep the link for too long.
const BATCHING_BYTES_PER_S: u64 = 512 << 10;
/// How soon a changed rate reaches a sender that waits under the old one.
const RECHECK: Duration = Duration::from_millis(50);

/// Binds `address`. The system may grant less buffer than we ask for; that is no error.
pub fn bind(address: SocketAddr, limiter: Limiter, runtime: &dyn Runtime) -> io::Result<LimitedSocket> {
    let socket = UdpSocket::bind(address)?;
    if sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, BUFFER_BYTES);
    }
    if sockopt::set_socket_send_buffer_size_force(&socket, BUFFER_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(&socket, BUFFER_BYTES);
    }
    Ok(LimitedSocket { inner: runtime.wrap_udp_socket(socket)?, limiter })
}

#[derive(Debug)]
pub struct LimitedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    limiter: Limiter,
}

impl AsyncUdpSocket for LimitedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(LimitedPoller {
            inner: self.inner.clone().create_io_poller(),
            limiter: self.limiter.clone(),
            sleep: Box::pin(sleep_until(Instant::now())),
        })
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.inner.try_send(transmit)?;
        self.limiter.spend(transmit.contents.len());
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        match self.limiter.rate_bytes_per_s() {
            Some(rate) if rate < BATCHING_BYTES_PER_S => 1,
            _ => self.inner.max_transmit_segments(),
        }
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[derive(Debug)]
struct LimitedPoller {
    inner: Pin<Box<dyn UdpPoller>>,
    limiter: Limiter,
    sleep: Pin<Box<Sleep>>,
}

impl UdpPoller for LimitedPoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        while let Some(wait) = self.limiter.wait() {
            self.sleep.as_mut().reset(Instant::now() + wait.min(RECHECK));
            if self.sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        self.inner.as_mut().poll_writable(cx)
    }
}
