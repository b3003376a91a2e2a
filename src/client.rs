//! Level 4: a typed client of the local API.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::stream::{BoxStream, TryStreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::{HELD_IDS_MAX, HeldAnswer, HeldRequest, PutAnswer, Sending};
use crate::interface::ObjectKind;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Event, Message, Reply, Request};
use crate::types::Hash;

/// A line of an answer may not be longer; the longest are lists of a component's entries.
const LINE_BYTES_MAX: usize = 256 << 20;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A broker at its socket. Every request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Finds out whether a broker answers at `socket`.
    pub async fn connect(socket: &Path) -> Result<Self, Problem> {
        let client = Self { socket: socket.to_owned() };
        client.open().await?;
        Ok(client)
    }

    /// The user the broker runs as, where the system tells.
    pub async fn broker_uid(&self) -> Result<Option<u32>, Problem> {
        Ok(self.open().await?.peer_cred().ok().map(|broker| broker.uid()))
    }

    /// Sends a request, hands on its events and returns its end. Dropping the future leaves the
    /// request to the broker.
    pub async fn call(&self, request: &Request, on_event: impl FnMut(Event)) -> Result<Reply, Problem> {
        self.call_giving(request, Vec::new(), on_event).await
    }

    /// As [`Client::call`], with the files the request names, opened, in the order of [`Request::files`].
    pub async fn call_giving(
        &self,
        request: &Request,
        files: Vec<OwnedFd>,
        mut on_event: impl FnMut(Event),
    ) -> Result<Reply, Problem> {
        let response = self.send(Method::POST, "/v1/request", json_body(request), None, files).await?;
        let mut lines = Lines::new(response);
        while let Some(line) = lines.next().await? {
            match parse(&line)? {
                Message::Event(event) => on_event(event),
                Message::Reply(reply) => return Ok(*reply),
                Message::Problem(problem) => return Err(problem),
            }
        }
        Err(self.cut())
    }

    /// Puts one object, packs in stored form; says whether it was new to the broker.
    pub async fn put_object(
        &self,
        kind: ObjectKind,
        id: Hash,
        size_bytes: u64,
        body: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<bool, Problem> {
        let path = format!("/v1/object/{}/{id}", kind.as_str());
        let body = StreamBody::new(body.map_ok(Frame::data)).boxed_unsync();
        let response = self.send(Method::PUT, &path, body, Some(size_bytes), Vec::new()).await?;
        let answer: PutAnswer = self.one(response).await?;
        Ok(answer.new)
    }

    /// Which of `ids` the broker's repository holds, in their order.
    pub async fn has_objects(&self, kind: ObjectKind, ids: &[Hash]) -> Result<Vec<bool>, Problem> {
        let mut held = Vec::with_capacity(ids.len());
        for ids in ids.chunks(HELD_IDS_MAX) {
            let request = HeldRequest { kind, ids: ids.to_vec() };
            let body = json_body(&request);
            let response = self.send(Method::POST, "/v1/objects/held", body, None, Vec::new()).await?;
            let answer: HeldAnswer = self.one(response).await?;
            if answer.held.len() != ids.len() {
                return Err(not_understood("another number of answers than questions"));
            }
            held.extend(answer.held);
        }
        Ok(held)
    }

    async fn open(&self) -> Result<UnixStream, Problem> {
        UnixStream::connect(&self.socket).await.map_err(|e| {
            let at = format!("broker at {}", self.socket.display());
            match e.kind() {
                io::ErrorKind::PermissionDenied => {
                    Problem::new(ProblemKind::Forbidden, at, "its socket belongs to another user")
                        .next("run this as the broker's user")
                }
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    Problem::new(ProblemKind::Unavailable, at, "is not running")
                        .next("start it with: cicada broker")
                }
                _ => {
                    Problem::from_error(ProblemKind::Unavailable, at, &e).next("start it with: cicada broker")
                }
            }
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Body,
        length: Option<u64>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Response<Incoming>, Problem> {
        let stream = TokioIo::new(Sending { stream: self.open().await?, descriptors });
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(stream).await.map_err(|e| self.broken(&e))?;
        // Ends with the response's body; what goes wrong is seen there.
        tokio::spawn(connection);
        let mut request = hyper::Request::builder().method(method).uri(path).header(header::HOST, "cicada");
        request = match length {
            Some(length) => request.header(header::CONTENT_LENGTH, length),
            None => request.header(header::CONTENT_TYPE, "application/json"),
        };
        let request = request.body(body).map_err(|e| self.broken(&e))?;
        sender.send_request(request).await.map_err(|e| self.broken(&e))
    }

    /// Reads an answer of one line, which a problem's status says is a problem.
    async fn one<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, Problem> {
        let ok = response.status() == StatusCode::OK;
        let Some(line) = Lines::new(response).next().await? else { return Err(self.cut()) };
        if ok {
            return parse(&line);
        }
        match parse(&line)? {
            Message::Problem(problem) => Err(problem),
            _ => Err(not_understood("no problem where one was announced")),
        }
    }

    fn broken(&self, e: &(dyn std::error::Error + 'static)) -> Problem {
        let at = format!("broker at {}", self.socket.display());
        Problem::from_error(ProblemKind::Unavailable, at, e).next("see the broker's log")
    }

    fn cut(&self) -> Problem {
        let at = format!("broker at {}", self.socket.display());
        Problem::new(ProblemKind::Unavailable, at, "ended the connection before its answer")
            .next("see the broker's log; what was begun goes on when it runs again")
    }
}

fn json_body(value: &impl Serialize) -> Body {
    // Our own requests always have a JSON form.
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync()
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(line).map_err(|e| not_understood(&e.to_string()))
}

fn not_understood(why: &str) -> Problem {
    Problem::new(ProblemKind::Failed, "broker", format!("its answer is not understood: {why}"))
        .next("use the same version of cicada for the broker and its commands")
}

/// The lines of a response as they arrive.
struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
    /// Bytes of `buffer` known to hold no line end.
    searched: usize,
    ended: bool,
}

impl Lines {
    fn new(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new(), searched: 0, ended: false }
    }

    /// The next line without its end; `None` after the last. A line cut short is left out: its
    /// absence is noticed by whoever waits for it.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, Problem> {
        loop {
            if let Some(i) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
                let rest = self.buffer.split_off(self.searched + i + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.ended {
                return Ok(None);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                // A connection that breaks ends the answer; the caller says what is missing.
                Some(Err(_)) | None => self.ended = true,
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(not_understood("a line is too long"));
            }
        }
    }
}
