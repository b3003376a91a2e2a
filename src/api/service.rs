//! How everything above talks to a broker, whether it is in this process or a stand-in.

use std::io;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::sync::mpsc;

use crate::interface::{Event, ObjectKind, Problem, Reply, Request};
use crate::runner::Given;
use crate::types::Hash;

/// Anything that answers requests.
pub trait Service: Send + Sync + 'static {
    /// Sends events, then returns the reply. Dropping the future does not undo what was begun
    /// (moves go on), except where the request says so. A reader that is slow or gone must not
    /// hold up work: progress that does not fit into `events` is left out.
    fn call(
        &self,
        request: Request,
        given: Given,
        events: mpsc::Sender<Event>,
    ) -> BoxFuture<'static, Result<Reply, Problem>>;

    /// Puts one object (stored form for packs) into the repository, verified. Says whether it was
    /// new.
    fn put_object(
        &self,
        kind: ObjectKind,
        id: Hash,
        size_bytes: u64,
        body: BoxStream<'static, io::Result<Bytes>>,
    ) -> BoxFuture<'static, Result<bool, Problem>>;

    /// Which of `ids` the repository holds, in their order.
    fn has_objects(&self, kind: ObjectKind, ids: Vec<Hash>)
    -> BoxFuture<'static, Result<Vec<bool>, Problem>>;
}
