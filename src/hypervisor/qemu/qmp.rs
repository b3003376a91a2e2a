//! A client of the QEMU Machine Protocol: JSON lines over a Unix socket.
//!
//! One task owns the socket. Replies are matched to commands by id, so several can be under way;
//! events go to a function, called in stream order: whoever has the reply to a command may rely on
//! every event QEMU sent before it having been seen.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio_util::codec::{FramedRead, LinesCodec};

use crate::unix_socket;

/// The longest line QEMU sends is the answer to `query-qmp-schema`, some 300 KiB.
pub const LINE_BYTES_MAX: usize = 8 << 20;
/// An idle QEMU answers in a millisecond; one on an overloaded host may need much longer.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QMP {command} was refused: {class}: {desc}")]
    Refused { command: &'static str, class: String, desc: String },
    #[error("QMP {command} was not answered within {} s", after.as_secs_f32())]
    Timeout { command: &'static str, after: Duration },
    #[error("the QMP connection ended before {command} was answered")]
    Closed { command: &'static str },
    #[error("the answer to QMP {command} makes no sense: {what}")]
    Malformed { command: &'static str, what: String },
    #[error("cannot reach the QMP socket")]
    Connect(#[source] io::Error),
}

/// Something QEMU said unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct QmpEvent {
    pub name: String,
    pub data: Value,
}

/// A connection after capability negotiation. It closes when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Qmp {
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
struct Command {
    execute: &'static str,
    arguments: Option<Value>,
    /// Goes with the command.
    fd: Option<OwnedFd>,
    reply: oneshot::Sender<Result<Value, QmpError>>,
}

impl Qmp {
    /// Connects and negotiates; QEMU serves one connection at a time, and a second one waits here.
    pub async fn connect(
        path: &Path,
        on_event: impl FnMut(QmpEvent) + Send + 'static,
    ) -> Result<Self, QmpError> {
        let stream = unix_socket::connect_async(path).await.map_err(QmpError::Connect)?;
        let socket = stream.as_fd().try_clone_to_owned().map_err(QmpError::Connect)?;
        Self::begin(stream, Some(socket), on_event).await
    }

    /// As [`Qmp::connect`] over any stream, by which no descriptors can be sent.
    pub async fn over<S>(stream: S, on_event: impl FnMut(QmpEvent) + Send + 'static) -> Result<Self, QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        Self::begin(stream, None, on_event).await
    }

    async fn begin<S>(
        stream: S,
        socket: Option<OwnedFd>,
        on_event: impl FnMut(QmpEvent) + Send + 'static,
    ) -> Result<Self, QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        const NEGOTIATE: &str = "qmp_capabilities";
        let (read, write) = tokio::io::split(stream);
        let lines = FramedRead::new(read, LinesCodec::new_with_max_length(LINE_BYTES_MAX));
        let mut link = Link { lines, write, socket };
        let negotiation = async {
            match link.next().await {
                Some(Message::Greeting) => {}
                Some(other) => {
                    return Err(QmpError::Malformed {
                        command: NEGOTIATE,
                        what: format!("no greeting but {other:?}"),
                    });
                }
                None => return Err(QmpError::Closed { command: NEGOTIATE }),
            }
            link.send(0, NEGOTIATE, None, None).await.map_err(|_| QmpError::Closed { command: NEGOTIATE })?;
            match link.next().await {
                Some(Message::Return { .. }) => Ok(()),
                Some(Message::Error { error, .. }) => Err(error.into_qmp(NEGOTIATE)),
                Some(other) => {
                    Err(QmpError::Malformed { command: NEGOTIATE, what: format!("unexpected {other:?}") })
                }
                None => Err(QmpError::Closed { command: NEGOTIATE }),
            }
        };
        match tokio::time::timeout(COMMAND_TIMEOUT, negotiation).await {
            Ok(done) => done?,
            Err(_) => return Err(QmpError::Timeout { command: NEGOTIATE, after: COMMAND_TIMEOUT }),
        }
        let (commands, receiver) = mpsc::channel(16);
        tokio::spawn(serve(link, receiver, on_event));
        Ok(Self { commands })
    }

    /// Runs a command to its return value.
    pub async fn execute(&self, command: &'static str, arguments: Option<Value>) -> Result<Value, QmpError> {
        self.execute_within(COMMAND_TIMEOUT, command, arguments, None).await
    }

    /// Gives QEMU a descriptor, which the next command that says `name` takes.
    pub async fn hand_over(&self, name: &str, fd: OwnedFd) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        self.execute_within(COMMAND_TIMEOUT, "getfd", Some(arguments), Some(fd)).await.map(drop)
    }

    async fn execute_within(
        &self,
        limit: Duration,
        command: &'static str,
        arguments: Option<Value>,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let closed = || QmpError::Closed { command };
            let command = Command { execute: command, arguments, fd, reply };
            self.commands.send(command).await.map_err(|_| closed())?;
            answer.await.map_err(|_| closed())?
        };
        tokio::time::timeout(limit, exchange)
            .await
            .unwrap_or(Err(QmpError::Timeout { command, after: limit }))
    }

    /// Runs a command and reads its return value as `T`.
    pub async fn query<T: serde::de::DeserializeOwned>(&self, command: &'static str) -> Result<T, QmpError> {
        self.ask(command, None).await
    }

    /// As [`Qmp::query`], of a command that takes arguments.
    pub async fn query_with<T: serde::de::DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Value,
    ) -> Result<T, QmpError> {
        self.ask(command, Some(arguments)).await
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        command: &'static str,
        arguments: Option<Value>,
    ) -> Result<T, QmpError> {
        let value = self.execute(command, arguments).await?;
        serde_json::from_value(value).map_err(|e| QmpError::Malformed { command, what: e.to_string() })
    }

    /// Waits until the connection has ended and every event on it was handed over.
    pub async fn closed(&self) {
        self.commands.closed().await;
    }

    pub fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }
}

struct Link<R, W> {
    lines: FramedRead<R, LinesCodec>,
    write: W,
    /// What `write` writes to, if descriptors can go there.
    socket: Option<OwnedFd>,
}

/// One line from QEMU. The variants are told apart by the fields they have.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Message {
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
    Return {
        #[serde(rename = "return")]
        value: Value,
        id: Option<u64>,
    },
    Error {
        error: Refusal,
        id: Option<u64>,
    },
    Greeting,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

impl Refusal {
    fn into_qmp(self, command: &'static str) -> QmpError {
        QmpError::Refused { command, class: self.class, desc: self.desc }
    }
}

impl Message {
    fn parse(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        if value.get("QMP").is_some() {
            return Some(Message::Greeting);
        }
        match serde_json::from_value(value) {
            Ok(Message::Greeting) | Err(_) => None,
            Ok(message) => Some(message),
        }
    }
}

impl<R: AsyncRead + Unpin, W: AsyncWrite + Unpin> Link<R, W> {
    /// The next message, or None at the end: of the stream, or of sense.
    async fn next(&mut self) -> Option<Message> {
        let line = match self.lines.next().await? {
            Ok(line) => line,
            Err(error) => {
                tracing::debug!(%error, "QMP connection failed");
                return None;
            }
        };
        let message = Message::parse(&line);
        if message.is_none() {
            let start: String = line.chars().take(200).collect();
            tracing::warn!(line = %start.escape_debug(), "QMP connection closed: a line makes no sense");
        }
        message
    }

    async fn send(
        &mut self,
        id: u64,
        command: &str,
        arguments: Option<Value>,
        fd: Option<OwnedFd>,
    ) -> io::Result<()> {
        if let Some(fd) = fd {
            // With a blank before the command; whole lines were written before, so it hits none.
            let socket = self.socket.as_ref().ok_or(io::ErrorKind::Unsupported)?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&fds));
            sendmsg(socket, &[IoSlice::new(b" ")], &mut control, SendFlags::NOSIGNAL)?;
        }
        let mut message = json!({ "execute": command, "id": id });
        if let Some(arguments) = arguments {
            message["arguments"] = arguments;
        }
        let mut line = message.to_string();
        line.push('\n');
        self.write.write_all(line.as_bytes()).await?;
        self.write.flush().await
    }
}

/// Ends, and with it the connection, at the end of the stream or when no handle is left.
async fn serve<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    mut link: Link<R, W>,
    mut commands: mpsc::Receiver<Command>,
    mut on_event: impl FnMut(QmpEvent),
) {
    type Waiting = (&'static str, oneshot::Sender<Result<Value, QmpError>>);
    let mut waiting: HashMap<u64, Waiting> = HashMap::new();
    let mut id = 0;
    loop {
        tokio::select! {
            message = link.next() => match message {
                Some(Message::Event { event, data }) => on_event(QmpEvent { name: event, data }),
                Some(Message::Return { value, id: Some(id) }) => {
                    if let Some((_, reply)) = waiting.remove(&id) {
                        let _ = reply.send(Ok(value));
                    }
                }
                Some(Message::Error { error, id: Some(id) }) => {
                    if let Some((command, reply)) = waiting.remove(&id) {
                        let _ = reply.send(Err(error.into_qmp(command)));
                    }
                }
                // Only a line QEMU could not parse is answered without an id, and we send none.
                Some(_) => {}
                None => return,
            },
            command = commands.recv() => {
                let Some(Command { execute, arguments, fd, reply }) = command else { return };
                id += 1;
                // Those that gave up waiting take no room.
                waiting.retain(|_, (_, reply)| !reply.is_closed());
                if link.send(id, execute, arguments, fd).await.is_err() {
                    // What QEMU said before it hung up is still to be read.
                    continue;
                }
                waiting.insert(id, (execute, reply));
            }
        }
    }
}

/// Whether a line of QMP makes sense.
#[cfg(fuzzing)]
pub fn is_message(line: &str) -> bool {
    Message::parse(line).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::io::{AsyncBufReadExt, BufReader, DuplexStream};

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

    struct Server(BufReader<DuplexStream>);

    impl Server {
        async fn line(&mut self) -> Value {
            let mut line = String::new();
            self.0.read_line(&mut line).await.unwrap();
            serde_json::from_str(&line).unwrap()
        }
        /// Byte by byte, so that every read is a split one.
        async fn say(&mut self, text: &str) {
            for byte in text.as_bytes().iter().chain(b"\r\n") {
                self.0.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
        }
    }

    async fn pair() -> (Qmp, Server, Arc<Mutex<Vec<QmpEvent>>>) {
        let (ours, theirs) = tokio::io::duplex(64);
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = events.clone();
        let mut server = Server(BufReader::new(theirs));
        let negotiate = async {
            server.say(GREETING).await;
            assert_eq!(server.line().await["execute"], "qmp_capabilities");
            server.say(r#"{"return": {}, "id": 0}"#).await;
        };
        let (qmp, ()) = tokio::join!(Qmp::over(ours, move |e| seen.lock().unwrap().push(e)), negotiate);
        (qmp.unwrap(), server, events)
    }

    #[tokio::test]
    async fn replies_find_their_command_in_any_order_and_after_events() {
        let (qmp, mut server, events) = pair().await;
        let serve = async {
            let first = server.line().await;
            let second = server.line().await;
            server.say(r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#).await;
            server.say(&json!({"return": {"status": "paused"}, "id": second["id"]}).to_string()).await;
            server
                .say(
                    &json!({"error": {"class": "GenericError", "desc": "no"}, "id": first["id"]}).to_string(),
                )
                .await;
        };
        let (a, b, ()) = tokio::join!(
            qmp.execute("device_del", Some(json!({"id": "x"}))),
            async {
                let reply = qmp.execute("query-status", None).await;
                assert_eq!(events.lock().unwrap()[0].name, "STOP");
                reply
            },
            serve
        );
        assert_eq!(a.unwrap_err().to_string(), "QMP device_del was refused: GenericError: no");
        assert_eq!(b.unwrap()["status"], "paused");
    }

    #[tokio::test]
    async fn the_end_of_the_stream_fails_what_waits() {
        let (qmp, mut server, _) = pair().await;
        let (reply, ()) = tokio::join!(qmp.execute("quit", None), async move {
            server.line().await;
            drop(server);
        });
        assert!(matches!(reply, Err(QmpError::Closed { command: "quit" })));
        qmp.closed().await;
        assert!(matches!(qmp.execute("quit", None).await, Err(QmpError::Closed { .. })));
    }

    #[tokio::test]
    async fn silence_is_a_timeout_and_a_late_reply_is_ignored() {
        let (qmp, mut server, _) = pair().await;
        assert!(matches!(
            qmp.execute_within(Duration::from_millis(20), "query-status", None, None).await,
            Err(QmpError::Timeout { command: "query-status", .. })
        ));
        let late = server.line().await;
        server.say(&json!({"return": {}, "id": late["id"]}).to_string()).await;
        let (reply, ()) = tokio::join!(qmp.query::<bool>("query-kvm"), async {
            let asked = server.line().await;
            server.say(&json!({"return": 7, "id": asked["id"]}).to_string()).await;
        });
        assert!(matches!(reply, Err(QmpError::Malformed { .. })));
    }

    #[tokio::test]
    async fn nonsense_and_endless_lines_close_the_connection() {
        for nonsense in ["{", "[]", r#"{"return": {}, "id": "text"}"#, r#"{"hello": 1}"#] {
            let (qmp, mut server, _) = pair().await;
            server.say(nonsense).await;
            qmp.closed().await;
        }
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let flood = tokio::spawn(async move {
            let chunk = vec![b' '; 1 << 20];
            while theirs.write_all(&chunk).await.is_ok() {}
        });
        assert!(matches!(Qmp::over(ours, |_| ()).await, Err(QmpError::Closed { .. })));
        flood.await.unwrap();
    }
}
