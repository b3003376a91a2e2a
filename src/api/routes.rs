//! HTTP on one side, a [`Service`] on the other.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{post, put};
use axum::serve::IncomingStream;
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

use crate::interface::Message;
use crate::interface::ObjectKind;
use crate::interface::{Problem, ProblemKind, Request};
use crate::runner::Given;
use crate::types::Hash;

use super::Service;
use super::descriptors::{Listener, Received};
use super::{HELD_IDS_MAX, HeldAnswer, HeldRequest, JSON_BYTES_MAX, PutAnswer, status_of};

/// Events that wait for a reader; a service leaves out progress beyond it.
const EVENTS_QUEUED_MAX: usize = 256;
/// What running requests get to end by themselves once the broker stops.
const DRAIN: Duration = Duration::from_secs(2);
const EXIT_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Api {
    service: Arc<dyn Service>,
    stop: watch::Receiver<bool>,
}

/// Answers until `stop` is true or its sender gone, then ends what still runs within a few seconds.
pub async fn serve(
    listener: UnixListener,
    service: Arc<dyn Service>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/request", post(request))
        .route("/v1/object/{kind}/{id}", put(put_object))
        .route("/v1/objects/held", post(held))
        .with_state(Api { service, stop: stop.clone() });
    let deadline = after_stop(stop.clone(), EXIT_DEADLINE);
    tokio::select! {
        result = axum::serve(Listener(listener), router.into_make_service_with_connect_info::<Caller>())
            .with_graceful_shutdown(after_stop(stop, Duration::ZERO)) => result,
        () = deadline => Ok(()),
    }
}

/// Who is at the other end of a connection.
#[derive(Clone)]
struct Caller {
    /// Where the system tells.
    uid: Option<u32>,
    received: Received,
}

impl Connected<IncomingStream<'_, Listener>> for Caller {
    fn connect_info(connection: IncomingStream<'_, Listener>) -> Self {
        let io = connection.io();
        Self { uid: io.stream.peer_cred().ok().map(|c| c.uid()), received: io.received.clone() }
    }
}

async fn after_stop(mut stop: watch::Receiver<bool>, wait: Duration) {
    // An error means that the sender is gone, which is a stop too.
    let _ = stop.wait_for(|stopped| *stopped).await;
    tokio::time::sleep(wait).await;
}

async fn request(State(api): State<Api>, ConnectInfo(caller): ConnectInfo<Caller>, body: Body) -> Response {
    let mut request: Request = match read_json(body).await {
        Ok(request) => request,
        Err(problem) => return problem_response(problem),
    };
    request.asked_by(caller.uid);
    let given = match Given::with(&request, caller.received.take()) {
        Ok(given) => given,
        Err(problem) => return problem_response(problem),
    };
    let (out, mut messages) = mpsc::channel(1);
    tokio::spawn(answer(api, request, given, out));
    // The first message decides the status.
    let status = match messages.recv().await {
        Some(first) => (status(&first), first),
        None => return problem_response(stopping()),
    };
    let (status, first) = status;
    let rest = stream::unfold(messages, |mut m| async move { m.recv().await.map(|message| (message, m)) });
    ndjson(status, stream::iter([first]).chain(rest))
}

/// Runs one request until it ends, its client is gone, or the broker stops.
async fn answer(api: Api, request: Request, given: Given, out: mpsc::Sender<Message>) {
    let (events_in, mut events) = mpsc::channel(EVENTS_QUEUED_MAX);
    let mut call = api.service.call(request, given, events_in);
    let stopped = after_stop(api.stop, DRAIN);
    tokio::pin!(stopped);
    let result = loop {
        tokio::select! {
            biased;
            () = out.closed() => {
                tracing::debug!("an API client went away before its answer");
                return;
            }
            Some(event) = events.recv() => {
                // A failure is a client that left, which the next round notices.
                let _ = out.send(Message::Event(event)).await;
            }
            result = &mut call => break result,
            () = &mut stopped => break Err(stopping()),
        }
    };
    while let Ok(event) = events.try_recv() {
        let _ = out.send(Message::Event(event)).await;
    }
    let last = match result {
        Ok(reply) => Message::Reply(Box::new(reply)),
        Err(problem) => Message::Problem(problem),
    };
    let _ = out.send(last).await;
}

async fn put_object(
    State(api): State<Api>,
    Path((kind, id)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let object = format!("{kind} {id}");
    let bad = |reason: &str| problem_response(Problem::new(ProblemKind::BadRequest, object.clone(), reason));
    let kinds = [ObjectKind::Manifest, ObjectKind::Pack, ObjectKind::Recipe];
    let Some(kind) = kinds.into_iter().find(|k| k.as_str() == kind) else {
        return bad("no such kind of object: manifest, pack and recipe are known");
    };
    let Ok(id) = id.parse::<Hash>() else { return bad("the id is not a hash: 64 hex digits expected") };
    let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let Some(size_bytes) = length else { return bad("Content-Length is needed") };
    let body = body.into_data_stream().map_err(io::Error::other).boxed();
    match api.service.put_object(kind, id, size_bytes, body).await {
        Ok(new) => json(&PutAnswer { new }),
        Err(problem) => problem_response(problem),
    }
}

async fn held(State(api): State<Api>, body: Body) -> Response {
    let answer = async {
        let HeldRequest { kind, ids } = read_json(body).await?;
        if ids.len() > HELD_IDS_MAX {
            let reason = format!("{} ids: at most {HELD_IDS_MAX} may be asked at once", ids.len());
            return Err(Problem::new(ProblemKind::BadRequest, "request", reason));
        }
        api.service.has_objects(kind, ids).await
    };
    match answer.await {
        Ok(held) => json(&HeldAnswer { held }),
        Err(problem) => problem_response(problem),
    }
}

async fn read_json<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    let bad = |reason: String| Problem::new(ProblemKind::BadRequest, "request", reason);
    let bytes = to_bytes(body, JSON_BYTES_MAX)
        .await
        .map_err(|_| bad(format!("cannot be read, or is larger than {JSON_BYTES_MAX} bytes")))?;
    serde_json::from_slice(&bytes).map_err(|e| bad(format!("is not understood: {e}")))
}

fn stopping() -> Problem {
    Problem::new(ProblemKind::Unavailable, "broker", "is stopping").next("start it again with: cicada broker")
}

fn status(message: &Message) -> StatusCode {
    match message {
        Message::Event(_) | Message::Reply(_) => StatusCode::OK,
        Message::Problem(p) => {
            StatusCode::from_u16(status_of(p.kind)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

fn problem_response(problem: Problem) -> Response {
    let message = Message::Problem(problem);
    ndjson(status(&message), stream::iter([message]))
}

fn ndjson(status: StatusCode, messages: impl Stream<Item = Message> + Send + 'static) -> Response {
    let lines = messages.map(|m| Ok::<_, Infallible>(line(&m)));
    (status, [(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn json(value: &impl Serialize) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], Body::from(line(value))).into_response()
}

fn line(value: &impl Serialize) -> Bytes {
    // Only a map with keys that are not text, or a failing Serialize, can fail: we have neither.
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes.into()
}
