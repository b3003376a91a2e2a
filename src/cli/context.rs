//! What every command has at hand: configuration, the broker, the printer.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::client::Client;
use crate::config::Config;
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{Event, Message, Reply, Request};

use super::Globals;
use super::printer::{Outcome, Printer};
use super::progress::Progress;
use super::target::Target;

pub struct Context {
    globals: Globals,
    pub printer: Printer,
}

impl Context {
    pub fn new(globals: Globals, printer: Printer) -> Self {
        Self { globals, printer }
    }

    pub fn config(&self) -> Result<Config, Problem> {
        let mut overrides = self.globals.set.clone();
        if let Some(socket) = &self.globals.socket {
            // A path on the command line is relative to where it was typed.
            let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.clone());
            overrides.push(("api.socket".into(), socket.display().to_string()));
        }
        Config::load(self.globals.config.as_deref(), &overrides).map_err(|e| Problem::from_config(&e))
    }

    /// The broker's socket: named, or found in the configuration.
    fn socket(&self) -> Result<PathBuf, Problem> {
        match &self.globals.socket {
            Some(socket) => Ok(socket.clone()),
            None => Ok(self.config()?.api.socket),
        }
    }

    /// The running broker.
    pub async fn client(&self) -> Result<Client, Problem> {
        Client::connect(&self.socket()?).await
    }

    /// The running broker, or its repository while none runs.
    pub async fn target(&self) -> Result<Target, Problem> {
        match self.client().await {
            Ok(client) => Ok(Target::Broker(client)),
            Err(p) if p.kind == ProblemKind::Unavailable => Target::offline(&self.config()?),
            Err(p) => Err(p),
        }
    }

    /// Asks for something that is there at once.
    pub async fn ask(&self, request: &Request) -> Result<Reply, Problem> {
        let target = self.target_for(request).await?;
        target.call(request, |_| ()).await
    }

    /// Asks, and prints the answer for programs or with `people`.
    pub async fn read(&self, request: &Request, people: impl FnOnce(&Printer, Reply) -> Outcome) -> Outcome {
        let reply = self.ask(request).await?;
        if self.printer.json { self.printer.json_reply(&reply) } else { people(&self.printer, reply) }
    }

    /// Asks for something that takes long, shows how it goes on, and prints its end.
    pub async fn work(&self, request: &Request, people: impl FnOnce(&Printer, Reply) -> Outcome) -> Outcome {
        let result = self.follow(request).await;
        self.end(result, people)
    }

    /// Asks for something that takes long and shows how it goes on.
    pub async fn follow(&self, request: &Request) -> Result<Reply, Problem> {
        let target = self.target_for(request).await?;
        let mut progress = Progress::new(&self.printer);
        let result = target.call(request, |event| progress.event(&event)).await;
        progress.end();
        result
    }

    /// As [`Context::follow`], handing over what is open instead of the file that the request names.
    pub async fn follow_giving(&self, request: &Request, file: OwnedFd) -> Result<Reply, Problem> {
        let target = self.target_for(request).await?;
        let mut progress = Progress::new(&self.printer);
        let result = target.call_giving(request, vec![file], |event| progress.event(&event)).await;
        progress.end();
        result
    }

    /// Prints the end of long work: the last line of the stream, or for people.
    pub fn end(
        &self,
        result: Result<Reply, Problem>,
        people: impl FnOnce(&Printer, Reply) -> Outcome,
    ) -> Outcome {
        if !self.printer.json {
            return people(&self.printer, result?);
        }
        self.printer.json_message(&Message::Reply(Box::new(result?)))
    }

    /// A step of a command's own work.
    pub fn step(&self, text: impl Into<String>) -> Outcome {
        let text = text.into();
        if self.printer.json {
            return self.printer.json_message(&Message::Event(Event::Note { text }));
        }
        self.printer.note(text);
        Ok(())
    }

    async fn target_for(&self, request: &Request) -> Result<Target, Problem> {
        match request {
            Request::Content(_) => self.target().await,
            Request::Vm(_) | Request::Move(_) | Request::Cloud(_) => Ok(Target::Broker(self.client().await?)),
        }
    }
}
