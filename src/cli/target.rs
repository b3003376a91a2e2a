//! Content is asked of the running broker, or of its repository while no broker runs.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use tokio::sync::mpsc;

use crate::broker::aside;
use crate::broker::book::Damaged;
use crate::client::Client;
use crate::compose::Composer;
use crate::config::Config;
use crate::interface::ObjectKind;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{ContentRequest, Event, Reply, Request};
use crate::repository::Repository;
use crate::runner::content::catalogue;
use crate::runner::{Given, Records};
use crate::types::{Hash, RecipeId};

use super::files::Files;
use super::whose;

const PIECE_BYTES: usize = 256 << 10;

pub enum Target {
    Broker(Client),
    Offline(Box<Offline>),
}

/// A repository opened by a command. While it is open no broker can start on it.
pub struct Offline {
    repository: Repository,
    composer: Composer,
    gc_grace: Duration,
    /// What VMs here are made of, and must stay.
    vm_recipes: Vec<RecipeId>,
    /// A VM of which that is not known.
    damaged: Option<Damaged>,
}

/// One object as it is stored and sent.
pub enum Object {
    Bytes(Vec<u8>),
    File(fs::File, u64),
}

impl Target {
    /// Opens the repository of a cloud whose broker does not run.
    pub fn offline(config: &Config) -> Result<Self, Problem> {
        whose::not_as_root(config)?;
        same_owner(&config.repository.dir)?;
        let repository = Repository::open_or_create(&config.repository.dir).map_err(|e| {
            let problem = catalogue::repository_problem(&e);
            Problem { object: format!("repository {}", config.repository.dir.display()), ..problem }
                .next("if its broker runs, name its socket with --socket")
        })?;
        let failed =
            |e: &(dyn std::error::Error + 'static)| Problem::from_error(ProblemKind::Failed, "records", e);
        let records = Records::open(&config.cloud.data_dir).map_err(|e| failed(&e))?;
        let (vms, damaged) = records.vms().map_err(|e| failed(&e))?;
        Ok(Target::Offline(Box::new(Offline {
            composer: Composer::new(repository.clone()),
            repository,
            gc_grace: config.repository.gc_grace,
            damaged: damaged.into_iter().next(),
            vm_recipes: vms.iter().map(|vm| vm.spec.recipe).collect(),
        })))
    }

    /// Asks; files that the request names are opened by whoever runs this.
    pub async fn call(&self, request: &Request, on_event: impl FnMut(Event)) -> Result<Reply, Problem> {
        let files = match self {
            Target::Broker(client) if !request.files().is_empty() => {
                Files::open(request, client.broker_uid().await?)?
            }
            // Its work is done by this very process.
            _ => Files::default(),
        };
        let mut files = files;
        let descriptors = std::mem::take(&mut files.descriptors);
        let reply = self.call_giving(request, descriptors, on_event).await?;
        files.keep()?;
        Ok(reply)
    }

    /// Asks, and hands over what is open already instead of the files that the request names.
    pub async fn call_giving(
        &self,
        request: &Request,
        descriptors: Vec<OwnedFd>,
        on_event: impl FnMut(Event),
    ) -> Result<Reply, Problem> {
        match self {
            Target::Broker(client) => client.call_giving(request, descriptors, on_event).await,
            Target::Offline(offline) => {
                offline.call(request, Given::with(request, descriptors)?, on_event).await
            }
        }
    }

    pub async fn has_objects(&self, kind: ObjectKind, ids: &[Hash]) -> Result<Vec<bool>, Problem> {
        match self {
            Target::Broker(client) => client.has_objects(kind, ids).await,
            Target::Offline(o) => {
                Ok(ids.iter().map(|id| catalogue::holds(&o.repository, kind, *id)).collect())
            }
        }
    }

    pub async fn put_object(&self, kind: ObjectKind, id: Hash, object: Object) -> Result<(), Problem> {
        match self {
            Target::Broker(client) => match object {
                Object::Bytes(bytes) => {
                    let size = bytes.len() as u64;
                    let body = stream::once(async move { Ok(Bytes::from(bytes)) }).boxed();
                    client.put_object(kind, id, size, body).await.map(drop)
                }
                Object::File(file, size) => {
                    let file = tokio::fs::File::from_std(file);
                    let body = tokio_util::io::ReaderStream::with_capacity(file, PIECE_BYTES).boxed();
                    client.put_object(kind, id, size, body).await.map(drop)
                }
            },
            Target::Offline(o) => {
                let repository = o.repository.clone();
                blocking(move || put_offline(&repository, kind, id, object)).await?
            }
        }
    }
}

impl Offline {
    async fn call(
        &self,
        request: &Request,
        given: Given,
        mut on_event: impl FnMut(Event),
    ) -> Result<Reply, Problem> {
        let request = match request {
            Request::Content(request) => request.clone(),
            Request::Vm(_) | Request::Move(_) | Request::Cloud(_) => {
                return Err(Problem::new(ProblemKind::Unavailable, "broker", "is not running")
                    .next("start it with: cicada broker"));
            }
        };
        if let (ContentRequest::RepoGc { .. }, Some(damaged)) = (&request, &self.damaged) {
            return Err(aside::gc_problem(damaged));
        }
        let (events, mut seen) = mpsc::unbounded_channel();
        let (repository, composer) = (self.repository.clone(), self.composer.clone());
        let (grace, recipes) = (self.gc_grace, self.vm_recipes.clone());
        let work = tokio::task::spawn_blocking(move || {
            let mut report = |event| drop(events.send(event));
            // Interrupting the command ends this process, and the work with it.
            let files = (&request, &given);
            catalogue::call(&repository, &composer, grace, &recipes, files, &|| false, &mut report)
        });
        while let Some(event) = seen.recv().await {
            on_event(event);
        }
        work.await.map_err(|e| Problem::from_error(ProblemKind::Failed, "repository", &e))?
    }
}

/// Runs blocking work off the runtime's own thread.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|e| Problem::from_error(ProblemKind::Failed, "this command", &e))
}

fn put_offline(repository: &Repository, kind: ObjectKind, id: Hash, object: Object) -> Result<(), Problem> {
    match object {
        Object::Bytes(bytes) => {
            let size = bytes.len() as u64;
            let mut once = Some(Bytes::from(bytes));
            catalogue::put_object(repository, kind, id, size, &mut || once.take())
        }
        Object::File(mut file, size) => {
            let mut failure = None;
            let mut piece = || {
                let mut buffer = vec![0; PIECE_BYTES];
                match file.read(&mut buffer) {
                    Ok(0) => None,
                    Ok(n) => {
                        buffer.truncate(n);
                        Some(Bytes::from(buffer))
                    }
                    Err(e) => {
                        failure = Some(e);
                        None
                    }
                }
            };
            let result = catalogue::put_object(repository, kind, id, size, &mut piece);
            match failure {
                Some(e) => Err(Problem::from_error(ProblemKind::Failed, format!("pack {}", id.short()), &e)),
                None => result,
            }
        }
    }
}

/// Files that root makes in the repository of another user's broker would lock that broker out.
fn same_owner(dir: &Path) -> Result<(), Problem> {
    let Some(meta) = dir.ancestors().find_map(|d| fs::metadata(d).ok()) else { return Ok(()) };
    let me = rustix::process::geteuid().as_raw();
    // A directory of root's is where the first use makes the data directory.
    if meta.uid() == me || meta.uid() == 0 {
        return Ok(());
    }
    let reason =
        format!("belongs to the user with id {}, and no broker runs to take content for it", meta.uid());
    Err(Problem::new(ProblemKind::Forbidden, format!("repository {}", dir.display()), reason)
        .next("start it as that user with: cicada broker"))
}
