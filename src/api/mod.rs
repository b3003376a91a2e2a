<<<<<<< HEAD
//! Level 4: the local API of a broker, HTTP/1.1 over a Unix socket that only its user may open.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /v1/request` | one `interface::Request`, JSON | `interface::Message` lines: events, then one reply or problem |
//! | `PUT /v1/object/{kind}/{id}` | the object, packs in stored form | [`PutAnswer`] or a problem line |
//! | `POST /v1/objects/held` | [`HeldRequest`] | [`HeldAnswer`] or a problem line |
//!
//! The status says how a request ended if it ended at once; a stream that began with an event has
//! status 200, and its last line says how it ended.

mod routes;
mod socket;

use serde::{Deserialize, Serialize};

use crate::broker::ProblemKind;
use crate::broker::handle::ObjectKind;
use crate::types::Hash;

pub use routes::serve;
pub use socket::{BindError, bind};

/// JSON bodies may not be larger.
pub const JSON_BYTES_MAX: usize = 1 << 20;
/// Ids in one [`HeldRequest`].
pub const HELD_IDS_MAX: usize = 10_000;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldRequest {
=======
//! Level 4: the local API, HTTP on a Unix socket.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `POST /v1/request` | one `Request` as JSON, at most 1 MiB | lines of JSON: any number of `event`, then one `reply` or `problem` |
//! | `POST /v1/objects/held` | `{"kind": "pack", "ids": […]}` | JSON list of booleans |
//! | `PUT /v1/object/{kind}/{id}` | the object as it is stored | `true` if it was new |
//!
//! Whoever may open the socket is an operator: it belongs to the broker's user, mode 0600.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{post, put};
use axum::{Json, Router};
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

use crate::broker::handle::{ObjectKind, Service};
use crate::broker::interface::Message;
use crate::broker::{Problem, ProblemKind, Request};
use crate::types::Hash;

const REQUEST_BYTES_MAX: usize = 1 << 20;
const IDS_MAX: usize = 100_000;
const EVENTS_KEPT: usize = 256;

/// Which objects are held.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
>>>>>>> main
    pub kind: ObjectKind,
    pub ids: Vec<Hash>,
}

<<<<<<< HEAD
/// One answer per id, in the request's order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeldAnswer {
    pub held: Vec<bool>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PutAnswer {
    /// False if the repository held the object already.
    pub new: bool,
}

/// The HTTP status of a problem.
pub const fn status_of(kind: ProblemKind) -> u16 {
    match kind {
        ProblemKind::BadRequest => 400,
        ProblemKind::Forbidden => 403,
        ProblemKind::NotFound => 404,
        ProblemKind::Conflict => 409,
        ProblemKind::Refused => 422,
        ProblemKind::Cancelled => 410,
        ProblemKind::Failed => 500,
        ProblemKind::Damaged => 502,
        ProblemKind::Unavailable => 503,
        ProblemKind::Missing => 501,
        ProblemKind::NoSpace => 507,
=======
type Broker = State<Arc<dyn Service>>;

/// Takes the socket. One that a dead broker left is replaced; one that is answered is refused.
pub async fn bind(path: &Path) -> Result<UnixListener, Problem> {
    let object = format!("socket {}", path.display());
    let failed = |e: &io::Error| Problem::from_error(ProblemKind::Failed, object.clone(), e);
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|e| failed(&e))?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(Problem::new(ProblemKind::Conflict, object, "another broker answers there")
            .next("stop it, or set api.socket to another path"));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(&e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(|e| failed(&e))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(|e| failed(&e))?;
    Ok(listener)
}

/// Serves until `stop` becomes true.
pub async fn serve(listener: UnixListener, service: Arc<dyn Service>, mut stop: watch::Receiver<bool>) -> io::Result<()> {
    let held = Router::new().route("/v1/objects/held", post(objects_held)).layer(DefaultBodyLimit::max(16 << 20));
    let requests = Router::new().route("/v1/request", post(request)).layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX));
    let objects = Router::new().route("/v1/object/{kind}/{id}", put(put_object)).layer(DefaultBodyLimit::disable());
    let router = requests.merge(held).merge(objects).with_state(service);
    let stopped = async move {
        let _ = stop.wait_for(|s| *s).await;
    };
    axum::serve(listener, router).with_graceful_shutdown(stopped).await
}

async fn request(State(service): Broker, body: Bytes) -> Response {
    let request: Request = match serde_json::from_slice(&body) {
        Ok(request) => request,
        Err(e) => return refuse(&Problem::new(ProblemKind::BadRequest, "request", e.to_string())),
    };
    let (events, mut seen) = mpsc::channel(EVENTS_KEPT);
    let mut work = tokio::spawn(service.call(request, events));
    let (lines, out) = mpsc::channel::<Result<Bytes, io::Error>>(16);
    tokio::spawn(async move {
        let result = loop {
            tokio::select! {
                biased;
                Some(event) = seen.recv() => {
                    // Nobody listens any more: what was begun goes on by itself.
                    if lines.send(Ok(line(&Message::Event(event)))).await.is_err() {
                        return;
                    }
                }
                result = &mut work => break result,
            }
        };
        while let Ok(event) = seen.try_recv() {
            let _ = lines.send(Ok(line(&Message::Event(event)))).await;
        }
        let last = match result {
            Ok(Ok(reply)) => Message::Reply(Box::new(reply)),
            Ok(Err(problem)) => Message::Problem(problem),
            Err(e) => Message::Problem(Problem::new(ProblemKind::Failed, "broker", e.to_string())),
        };
        let _ = lines.send(Ok(line(&last))).await;
    });
    let stream = futures::stream::unfold(out, |mut out| async { out.recv().await.map(|item| (item, out)) });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(stream)).into_response()
}

fn line(message: &Message) -> Bytes {
    let mut text = serde_json::to_vec(message).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

async fn objects_held(State(service): Broker, Json(held): Json<Held>) -> Response {
    if held.ids.len() > IDS_MAX {
        return refuse(&Problem::new(ProblemKind::BadRequest, "objects", format!("more than {IDS_MAX} ids at once")));
    }
    match service.has_objects(held.kind, held.ids).await {
        Ok(list) => Json(list).into_response(),
        Err(problem) => refuse(&problem),
    }
}

async fn put_object(
    State(service): Broker,
    UrlPath((kind, id)): UrlPath<(ObjectKind, Hash)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let size = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    let Some(size_bytes) = size else {
        return refuse(&Problem::new(ProblemKind::BadRequest, "object", "Content-Length is missing"));
    };
    let body = body.into_data_stream().map_err(io::Error::other).boxed();
    match service.put_object(kind, id, size_bytes, body).await {
        Ok(new) => Json(new).into_response(),
        Err(problem) => refuse(&problem),
    }
}

fn refuse(problem: &Problem) -> Response {
    (status(problem.kind), Json(problem.clone())).into_response()
}

fn status(kind: ProblemKind) -> StatusCode {
    match kind {
        ProblemKind::BadRequest => StatusCode::BAD_REQUEST,
        ProblemKind::NotFound => StatusCode::NOT_FOUND,
        ProblemKind::Conflict | ProblemKind::Cancelled => StatusCode::CONFLICT,
        ProblemKind::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        ProblemKind::Forbidden => StatusCode::FORBIDDEN,
        ProblemKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ProblemKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        ProblemKind::Damaged | ProblemKind::Missing | ProblemKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
>>>>>>> main
    }
}
