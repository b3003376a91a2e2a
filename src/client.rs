//! Level 4: the typed client of the local API.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::api::Held;
use crate::broker::handle::ObjectKind;
use crate::broker::interface::Message;
use crate::broker::{Event, Problem, ProblemKind, Reply, Request};
use crate::types::Hash;

/// The longest line an answer may have.
const LINE_BYTES_MAX: usize = 64 << 20;

type Body = BoxBody<Bytes, io::Error>;

/// Talks to the broker behind one socket. Every request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Whether a broker answers.
    pub async fn is_up(&self) -> bool {
        UnixStream::connect(&self.socket).await.is_ok()
    }

    /// Sends a request and waits for its reply; events go to `on_event` as they come.
    pub async fn call(&self, request: &Request, on_event: &mut dyn FnMut(Event)) -> Result<Reply, Problem> {
        let json = serde_json::to_vec(request).map_err(|e| self.broken(&e))?;
        let body = Full::new(Bytes::from(json)).map_err(|e| match e {}).boxed();
        let mut incoming = self.send("POST", "/v1/request", None, body).await?.into_body();
        let mut buffer = Vec::new();
        while let Some(frame) = incoming.frame().await {
            let frame = frame.map_err(|e| self.broken(&e))?;
            let Ok(data) = frame.into_data() else { continue };
            buffer.extend_from_slice(&data);
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                match serde_json::from_slice(&line).map_err(|e| self.broken(&e))? {
                    Message::Event(event) => on_event(event),
                    Message::Reply(reply) => return Ok(*reply),
                    Message::Problem(problem) => return Err(problem),
                }
            }
            if buffer.len() > LINE_BYTES_MAX {
                return Err(self.broken(&io::Error::other("an answer without end")));
            }
        }
        Err(self.broken(&io::Error::new(io::ErrorKind::UnexpectedEof, "the broker closed the connection"))
            .next("see its log; a move goes on without us: cicada migration list"))
    }

    /// Which objects the broker's repository holds.
    pub async fn held(&self, kind: ObjectKind, ids: Vec<Hash>) -> Result<Vec<bool>, Problem> {
        let json = serde_json::to_vec(&Held { kind, ids }).map_err(|e| self.broken(&e))?;
        let body = Full::new(Bytes::from(json)).map_err(|e| match e {}).boxed();
        self.json(self.send("POST", "/v1/objects/held", None, body).await?).await
    }

    /// Puts an object into the broker's repository; true if it was new.
    pub async fn put_object(
        &self,
        kind: ObjectKind,
        id: Hash,
        size_bytes: u64,
        body: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<bool, Problem> {
        let body = BodyExt::boxed(StreamBody::new(SyncStream(std::sync::Mutex::new(body)).map_ok(Frame::data)));
        let path = format!("/v1/object/{}/{id}", kind.as_str());
        self.json(self.send("PUT", &path, Some(size_bytes), body).await?).await
    }

    async fn send(&self, method: &str, path: &str, size: Option<u64>, body: Body) -> Result<hyper::Response<Incoming>, Problem> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| {
            Problem::new(ProblemKind::Unavailable, "broker", format!("does not answer at {}: {e}", self.socket.display()))
                .next("start it with: cicada broker")
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(&e))?;
        tokio::spawn(connection);
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "broker")
            .header("content-type", "application/json");
        if let Some(size) = size {
            request = request.header("content-length", size);
        }
        let request = request.body(body).map_err(|e| self.broken(&e))?;
        let response = sender.send_request(request).await.map_err(|e| self.broken(&e))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let text = response.into_body().collect().await.map_err(|e| self.broken(&e))?.to_bytes();
        Err(serde_json::from_slice(&text).unwrap_or_else(|_| {
            Problem::new(ProblemKind::Failed, "broker", String::from_utf8_lossy(&text).into_owned())
        }))
    }

    async fn json<T: for<'de> serde::Deserialize<'de>>(&self, response: hyper::Response<Incoming>) -> Result<T, Problem> {
        let text = response.into_body().collect().await.map_err(|e| self.broken(&e))?.to_bytes();
        serde_json::from_slice(&text).map_err(|e| self.broken(&e))
    }

    fn broken(&self, e: &dyn std::error::Error) -> Problem {
        Problem::from_error(ProblemKind::Unavailable, "broker", e)
    }
}

/// A boxed body must be `Sync`, which boxed streams are not; it is only ever polled by one owner.
struct SyncStream(std::sync::Mutex<BoxStream<'static, io::Result<Bytes>>>);

impl futures::Stream for SyncStream {
    type Item = io::Result<Bytes>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let inner = self.get_mut().0.get_mut().unwrap_or_else(|e| e.into_inner());
        inner.as_mut().poll_next(cx)
    }
}
