//! What is still to happen in a simulated federation, and in which order it may.

use std::cmp::Ordering;
use std::rc::Rc;
use std::time::Duration;

use crate::broker::Token;
use crate::broker::effect::{Done, Input};
use crate::clock::UnixMillis;
use crate::federation::Presence;
use crate::migration::records::VmRecord;
use crate::types::{MemberJid, VmId};
use crate::vm::hypervisor::StopMode;

use super::cloud::Answered;
use super::helper::Order;

/// A request as it travels, kept so that it can be said again.
#[derive(Clone, Debug)]
pub struct Said {
    pub from: MemberJid,
    pub to: usize,
    pub payload: Rc<Vec<u8>>,
}

/// What a hypervisor is to do with a VM.
#[derive(Clone)]
pub(super) enum Work {
    Start(Box<VmRecord>),
    Stop(StopMode),
    Pause,
    Resume,
    Undefine,
}

#[derive(Clone)]
pub(super) enum Event {
    Input(u32, Box<Input>),
    /// A hypervisor does something, for the broker of this life.
    Host {
        life: u32,
        vm: VmId,
        work: Work,
        token: Option<Token>,
        took: Duration,
        fails: bool,
    },
    /// A member's presence reaches one cloud.
    Shown {
        presence: Rc<Presence>,
        /// What it takes as the room sends it to one member.
        bytes: u64,
    },
    /// A member's presence goes round, and reached all clouds before this one.
    GoesRound {
        next: usize,
        presence: Rc<Presence>,
        /// What it takes as the room sends it to one member.
        bytes: u64,
    },
    Tick(u32),
    /// A sealed request arrives.
    Request {
        said: Said,
        answered: Answered,
        /// It is sealed meanwhile.
        sealing: Option<Order>,
    },
    /// A sealed answer arrives, or none does.
    Answer {
        answered: Answered,
        sealed: Option<Vec<u8>>,
        /// It is opened meanwhile.
        opening: Option<Order>,
    },
    Announce(u32),
    /// One that was asked too much at once is asked again.
    AskAgain {
        life: u32,
        talk: u64,
        asked: u64,
    },
    Restart,
}

#[derive(Clone)]
pub(super) struct Scheduled {
    pub at: UnixMillis,
    pub seq: u64,
    /// What it is, whatever happened elsewhere in the meantime.
    pub id: u64,
    /// To whom it happens.
    pub cloud: usize,
    pub event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

/// Of what kind something is that may happen next.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    Request,
    Answer,
    /// Nothing was answered in time.
    Silence,
    /// A host or repository is done with something.
    Outcome,
    Room,
    /// A wait is over.
    Due,
    Tick,
    Announce,
    Restart,
}

impl Kind {
    /// Whether it comes of itself, and not by waiting.
    pub fn is_news(self) -> bool {
        matches!(self, Kind::Request | Kind::Answer | Kind::Outcome | Kind::Room | Kind::Restart)
    }
}

/// Something that may happen next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pending {
    pub seq: u64,
    pub id: u64,
    /// Not before this time.
    pub at: UnixMillis,
    pub cloud: usize,
    pub kind: Kind,
}

impl Scheduled {
    pub(super) fn kind(&self) -> Kind {
        match &self.event {
            Event::Input(_, input) => match **input {
                Input::Done(_, Done::Due) => Kind::Due,
                _ => Kind::Outcome,
            },
            Event::AskAgain { .. } => Kind::Due,
            Event::Host { .. } => Kind::Outcome,
            Event::Shown { .. } | Event::GoesRound { .. } => Kind::Room,
            Event::Tick(_) => Kind::Tick,
            Event::Request { .. } => Kind::Request,
            Event::Answer { sealed: Some(_), .. } => Kind::Answer,
            Event::Answer { sealed: None, .. } => Kind::Silence,
            Event::Announce(_) => Kind::Announce,
            Event::Restart => Kind::Restart,
        }
    }

    /// What a hypervisor does with one VM it does in the order in which it was told.
    pub(super) fn lane(&self) -> Option<VmId> {
        match &self.event {
            Event::Host { vm, .. } => Some(*vm),
            _ => None,
        }
    }
}
