//! The local API and its client over a real Unix socket, with a service made for the test.

use std::fs::File;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use cicada::api;
use cicada::api::Service;
use cicada::client::Client;
use cicada::interface::ObjectKind;
use cicada::interface::{
    CloudRequest, ContentRequest, Event, MoveRequest, Reply, ReportLine, Request, VmRequest,
};
use cicada::interface::{Problem, ProblemKind};
use cicada::runner::Given;
use cicada::types::Hash;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

#[derive(Default)]
struct Stand {
    dropped: Arc<AtomicUsize>,
}

struct CountDrop(Arc<AtomicUsize>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn failed(e: io::Error) -> Problem {
    Problem::from_error(ProblemKind::Failed, "file", &e)
}

fn note(n: u64) -> Event {
    Event::Progress { phase: "check".into(), done: n, total: 100, unit: "objects".into() }
}

impl Service for Stand {
    fn call(
        &self,
        request: Request,
        given: Given,
        events: mpsc::Sender<Event>,
    ) -> BoxFuture<'static, Result<Reply, Problem>> {
        let guard = CountDrop(self.dropped.clone());
        Box::pin(async move {
            let _guard = guard;
            match request {
                Request::Content(ContentRequest::RepoStats) => {
                    for n in 0..100 {
                        let _ = events.try_send(note(n));
                    }
                    let line = ReportLine {
                        name: "packs".into(),
                        value: 3,
                        unit: "objects".into(),
                        detail: "x".repeat(3 << 20),
                    };
                    Ok(Reply::Report(vec![line]))
                }
                Request::Content(ContentRequest::RepoCheck) => {
                    let _ = events.send(note(1)).await;
                    Err(Problem::new(ProblemKind::Damaged, "pack ab", "does not match")
                        .next("fetch it again"))
                }
                Request::Vm(VmRequest::Show { vm }) => {
                    Err(Problem::new(ProblemKind::NotFound, format!("VM {vm}"), "is not known"))
                }
                Request::Move(MoveRequest::Watch { .. }) => {
                    let _ = events.send(note(1)).await;
                    std::future::pending().await
                }
                // As the broker does: by what was handed over, whatever lies at the path.
                Request::Content(ContentRequest::RepoImport { input, .. }) => {
                    let mut text = String::new();
                    let mut file = given.file(&input).expect("it came with the request");
                    file.read_to_string(&mut text).unwrap();
                    Err(Problem::new(ProblemKind::NotFound, input, text))
                }
                Request::Vm(VmRequest::Export { output, .. }) => match given.file(&output) {
                    Some(mut file) => file.write_all(b"a disk").map(|()| Reply::Done).map_err(failed),
                    None => Err(Problem::new(ProblemKind::BadRequest, output, "nothing was handed over")),
                },
                _ => Ok(Reply::Done),
            }
        })
    }

    fn put_object(
        &self,
        kind: ObjectKind,
        id: Hash,
        size_bytes: u64,
        mut body: BoxStream<'static, io::Result<Bytes>>,
    ) -> BoxFuture<'static, Result<bool, Problem>> {
        Box::pin(async move {
            if kind == ObjectKind::Recipe {
                return Err(Problem::new(ProblemKind::NoSpace, "repository", "is full"));
            }
            let mut content = Vec::new();
            while let Some(part) = body.next().await {
                content.extend_from_slice(
                    &part.map_err(|e| Problem::from_error(ProblemKind::Failed, "object", &e))?,
                );
            }
            if content.len() as u64 != size_bytes || Hash::of(&content) != id {
                return Err(Problem::new(ProblemKind::Damaged, "object", "does not match its id"));
            }
            Ok(true)
        })
    }

    fn has_objects(&self, _: ObjectKind, ids: Vec<Hash>) -> BoxFuture<'static, Result<Vec<bool>, Problem>> {
        Box::pin(async move { Ok(ids.iter().map(|id| id.as_bytes()[0] & 1 == 0).collect()) })
    }
}

struct Place {
    dir: tempfile::TempDir,
    dropped: Arc<AtomicUsize>,
    stop: watch::Sender<bool>,
    server: tokio::task::JoinHandle<io::Result<()>>,
}

impl Place {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = api::bind(&dir.path().join("s")).await.unwrap();
        let stand = Stand::default();
        let dropped = stand.dropped.clone();
        let (stop, stopped) = watch::channel(false);
        let server = tokio::spawn(api::serve(listener, Arc::new(stand), stopped));
        Self { dir, dropped, stop, server }
    }

    async fn client(&self) -> Client {
        Client::connect(&self.dir.path().join("s")).await.unwrap()
    }

    /// Sends raw bytes and returns what comes back until the end of the connection.
    async fn raw(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join("s")).await.unwrap();
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }
}

#[tokio::test]
async fn events_come_before_the_reply_and_all_of_it_arrives() {
    let place = Place::new().await;
    let mut seen = Vec::new();
    let reply = place
        .client()
        .await
        .call(&Request::Content(ContentRequest::RepoStats), |e| seen.push(e))
        .await
        .unwrap();
    assert_eq!(seen, (0..100).map(note).collect::<Vec<_>>());
    let Reply::Report(lines) = reply else { panic!("{reply:?}") };
    assert_eq!(lines[0].detail.len(), 3 << 20);
}

#[tokio::test]
async fn problems_keep_their_class_before_and_after_events() {
    let place = Place::new().await;
    let client = place.client().await;
    let e = client.call(&Request::Vm(VmRequest::Show { vm: "web".into() }), |_| ()).await.unwrap_err();
    assert_eq!(e, Problem::new(ProblemKind::NotFound, "VM web", "is not known"));
    let e = client.call(&Request::Content(ContentRequest::RepoCheck), |_| ()).await.unwrap_err();
    assert_eq!((e.kind, e.next_step.as_str()), (ProblemKind::Damaged, "fetch it again"));

    let post = |body: &str| {
        let n = body.len();
        format!(
            "POST /v1/request HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {n}\r\n\r\n{body}"
        )
    };
    let answer = place.raw(&post(r#"{"op":"vm-show","vm":"web"}"#)).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    for bad in [r#"{"op":"vm-show","vm":"web","x":1}"#, r#"{"op":"fly"}"#, "", "[", &" ".repeat(2 << 20)] {
        let answer = place.raw(&post(bad)).await;
        // The server may end the connection while an oversized body is still being sent.
        assert!(answer.starts_with("HTTP/1.1 400 ") || bad.len() > 1 << 20, "{answer}");
    }
}

#[tokio::test]
async fn objects_go_in_whole_and_refusals_come_back() {
    let place = Place::new().await;
    let client = place.client().await;
    let content = Bytes::from(vec![7u8; 5 << 20]);
    let parts = |c: &Bytes| -> BoxStream<'static, io::Result<Bytes>> {
        let parts: Vec<_> = c.chunks(60_000).map(|p| Ok(Bytes::copy_from_slice(p))).collect();
        stream::iter(parts).boxed()
    };
    let size = content.len() as u64;
    let id = Hash::of(&content);
    assert!(client.put_object(ObjectKind::Pack, id, size, parts(&content)).await.unwrap());
    let e = client.put_object(ObjectKind::Pack, Hash::of(b"other"), size, parts(&content)).await.unwrap_err();
    assert_eq!(e.kind, ProblemKind::Damaged);
    // A refusal that comes before the body was read.
    for _ in 0..20 {
        let e = client.put_object(ObjectKind::Recipe, id, size, parts(&content)).await.unwrap_err();
        assert_eq!(e.kind, ProblemKind::NoSpace, "{e}");
    }
    let ids: Vec<Hash> = (0u32..25_000).map(|n| Hash::of(&n.to_le_bytes())).collect();
    let held = client.has_objects(ObjectKind::Pack, &ids).await.unwrap();
    assert!(ids.iter().zip(&held).all(|(id, held)| (id.as_bytes()[0] & 1 == 0) == *held));
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_request() {
    let place = Place::new().await;
    let client = place.client().await;
    let watch = Request::Move(MoveRequest::Watch { id: "x".into() });
    let mut seen = 0;
    let call = client.call(&watch, |_| seen += 1);
    assert!(tokio::time::timeout(Duration::from_millis(200), call).await.is_err());
    assert_eq!(seen, 1);
    for _ in 0..100 {
        if place.dropped.load(Ordering::SeqCst) == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the request is still running");
}

#[tokio::test]
async fn a_stopping_broker_says_so_to_those_who_wait() {
    let place = Place::new().await;
    let client = place.client().await;
    let watch = Request::Move(MoveRequest::Watch { id: "x".into() });
    let (e, ()) = tokio::join!(client.call(&watch, |_| ()), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        place.stop.send(true).unwrap();
    });
    let e = e.unwrap_err();
    assert_eq!((e.kind, e.reason.as_str()), (ProblemKind::Unavailable, "is stopping"));
    tokio::time::timeout(Duration::from_secs(10), place.server).await.unwrap().unwrap().unwrap();
    let e = Client::connect(&place.dir.path().join("s")).await.unwrap_err();
    assert_eq!(e.kind, ProblemKind::Unavailable);
    assert_eq!(e.next_step, "start it with: cicada broker");
}

fn export_to(output: &str) -> Request {
    let output = output.into();
    Request::Vm(VmRequest::Export { vm: "web".into(), output, format: "raw".into(), user_data: false })
}

#[tokio::test]
async fn files_are_handed_over_opened_and_their_paths_are_words() {
    let place = Place::new().await;
    let client = place.client().await;
    let path = place.dir.path().join("secret");
    std::fs::write(&path, "of the operator").unwrap();
    let open: OwnedFd = File::open(&path).unwrap().into();
    std::fs::remove_file(&path).unwrap();
    let import =
        Request::Content(ContentRequest::RepoImport { input: "/nowhere/at all".into(), bind: false });
    let read = client.call_giving(&import, vec![open], |_| ()).await.unwrap_err();
    assert_eq!((read.object.as_str(), read.reason.as_str()), ("/nowhere/at all", "of the operator"));

    let written = tempfile::tempfile().unwrap();
    let descriptor = written.try_clone().unwrap().into();
    client.call_giving(&export_to("/nowhere"), vec![descriptor], |_| ()).await.unwrap();
    assert_eq!(written.metadata().unwrap().len(), 6);
    // Without any the paths count, as they did before.
    let none = client.call(&export_to("/nowhere"), |_| ()).await.unwrap_err();
    assert_eq!(none.reason, "nothing was handed over");
}

/// A descriptor opens no more than it was opened for, and there is one for each file that is named.
#[tokio::test]
async fn what_does_not_fit_the_request_is_refused_and_closed() {
    let place = Place::new().await;
    let client = place.client().await;
    let dev_null = |write: bool| -> OwnedFd {
        std::fs::OpenOptions::new().read(!write).write(write).open("/dev/null").unwrap().into()
    };
    for (request, files) in [
        (export_to("/x"), vec![dev_null(false)]),
        (export_to("/x"), vec![dev_null(true), dev_null(true)]),
        (
            Request::Content(ContentRequest::RepoImport { input: "/x".into(), bind: false }),
            vec![dev_null(true)],
        ),
        (Request::Cloud(CloudRequest::Status), vec![dev_null(false)]),
    ] {
        let refused = client.call_giving(&request, files, |_| ()).await.unwrap_err();
        assert_eq!(refused.kind, ProblemKind::BadRequest, "{refused}");
    }
    // A flood of them ends its connection, and the next one is served.
    let stream = std::os::unix::net::UnixStream::connect(place.dir.path().join("s")).unwrap();
    let null = dev_null(false);
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    for _ in 0..50 {
        let many = [null.as_fd(); 64];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&many)));
        let flags = rustix::net::SendFlags::NOSIGNAL;
        let sent = rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(b"POST ")], &mut control, flags);
        tokio::time::sleep(Duration::from_millis(2)).await;
        if sent.is_err() {
            break;
        }
    }
    drop(stream);
    client.call(&Request::Cloud(CloudRequest::Status), |_| ()).await.unwrap();
    for _ in 0..100 {
        if std::fs::read_dir("/proc/self/fd").unwrap().count() <= before + 4 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("descriptors stay open");
}
