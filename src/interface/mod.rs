//! What can be asked of a broker, and what it answers: the vocabulary that the API, the client
//! and the CLI share. Every request is one JSON value; long work reports [`Event`]s before its
//! [`Reply`].

use serde::{Deserialize, Serialize};

use crate::migration::Evidence;

mod cloud;
mod content;
mod kinds;
mod moves;
pub mod problem;
mod request;
mod vms;

pub use cloud::*;
pub use content::*;
pub use kinds::*;
pub use moves::*;
pub use problem::{Problem, ProblemKind, chain};
pub use request::{FileUse, Request};
pub use vms::*;

/// The answer to a request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", content = "value", rename_all = "kebab-case")]
pub enum Reply {
    Done,
    Status(Box<StatusView>),
    Members(Vec<MemberView>),
    Components(Vec<ComponentView>),
    Component(Box<ComponentDetail>),
    ComponentDiff(ComponentDiff),
    Recipe(RecipeView),
    Recipes(Vec<RecipeView>),
    Composed(ComposedView),
    /// Repository reports are tables of name and value, in a fixed order.
    Report(Vec<ReportLine>),
    Vm(Box<VmView>),
    Adopted(Box<AdoptedView>),
    Exported(ExportedView),
    Vms(Vec<VmView>),
    Deleted(DeletedView),
    Plan(PlanView),
    Migration(Box<MigrationView>),
    Migrations(Vec<MigrationView>),
    Receipt(Box<Evidence>),
    Resolution(Box<ResolutionView>),
}

/// One line of progress of a long request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A step of plain text.
    Note {
        text: String,
    },
    /// Work with a known size; `done` never falls while `phase` stays the same.
    Progress {
        phase: String,
        done: u64,
        total: u64,
        unit: String,
    },
    Migration(MigrationProgress),
    /// Something of an imported tree that did not enter the component.
    LeftOut {
        path: String,
        what: String,
    },
}

/// What travels over the API's stream: events, then exactly one end.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Message {
    Event(Event),
    Reply(Box<Reply>),
    Problem(Problem),
}

/// Objects an operator can put into a repository.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectKind {
    Manifest,
    Pack,
    Recipe,
}

impl ObjectKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            ObjectKind::Manifest => "manifest",
            ObjectKind::Pack => "pack",
            ObjectKind::Recipe => "recipe",
        }
    }
}
