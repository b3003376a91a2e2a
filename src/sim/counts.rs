//! What a simulated federation counts: messages by what they are about, and what goes through the room.

use std::collections::BTreeMap;

use serde::Serialize;
use xmpp_parsers::minidom::Element;

use crate::federation::Presence;
use crate::migration::RequestBody;
use crate::types::kinds;

kinds! {
    /// What a request, and its answer, are about.
    Subject {
        /// Does it fit, and what of it is held?
        Configuration = "configuration",
        Reservation = "reservation",
        /// Pages of a VM's history.
        Lineage = "lineage",
        /// Who owns which VM, as far as is known.
        Owners = "owners",
        /// A copy is brought up to date.
        Initialization = "initialization",
        /// The VM changes hands.
        Start = "start",
        /// The source may forget its copy.
        Delete = "delete",
        Other = "other",
    }
}

impl Subject {
    pub(super) fn of(body: &RequestBody) -> Self {
        match body {
            RequestBody::Configuration { .. } => Subject::Configuration,
            RequestBody::Reservation { .. } => Subject::Reservation,
            RequestBody::Lineage { .. } => Subject::Lineage,
            RequestBody::Owners { .. } => Subject::Owners,
            RequestBody::Initialization(_) => Subject::Initialization,
            RequestBody::Start { .. } => Subject::Start,
            RequestBody::Delete { .. } => Subject::Delete,
            _ => Subject::Other,
        }
    }
}

/// So many messages, with so many bytes sealed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Tally {
    pub messages: u64,
    #[serde(rename = "message_bytes")]
    pub bytes: u64,
}

/// What was counted.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Counts {
    /// Requests and answers, whether or not they arrive; bytes of those that do.
    pub messages: BTreeMap<Subject, Tally>,
    /// Of clouds to the room, and of the room to each cloud.
    pub presences: u64,
    pub presences_delivered: u64,
    pub presence_bytes_delivered: u64,
    /// Requests that were put off: too much was asked at once.
    pub put_off: u64,
    pub component_bytes: u64,
    pub own_bytes: u64,
    pub steps: u64,
    pub crashes: u64,
}

impl Counts {
    pub(super) fn sent(&mut self, about: Subject) {
        self.messages.entry(about).or_default().messages += 1;
    }

    pub(super) fn carried(&mut self, about: Subject, bytes: usize) {
        self.messages.entry(about).or_default().bytes += bytes as u64;
    }

    pub(super) fn presence_delivered(&mut self, bytes: u64) {
        self.presences_delivered += 1;
        self.presence_bytes_delivered += bytes;
    }

    /// All messages together.
    pub fn all(&self) -> Tally {
        let sum = |a: Tally, b: &Tally| Tally { messages: a.messages + b.messages, bytes: a.bytes + b.bytes };
        self.messages.values().fold(Tally::default(), sum)
    }
}

/// What a presence takes as a room sends it to one member: its payload, and what the room puts around it.
pub(super) fn stanza_bytes(presence: &Presence) -> u64 {
    let payload = presence.cloud.as_deref().map(|cloud| String::from(&Element::from(cloud.clone())).len());
    let kind = if presence.available { "" } else { " type='unavailable'" };
    let around = format!(
        "<presence from='fed@rooms.sim.example/{0}' to='{0}/broker'{kind}><x \
         xmlns='http://jabber.org/protocol/muc#user'><item affiliation='member' role='participant' \
         jid='{0}/{1}'/></x></presence>",
        presence.jid, presence.resource
    );
    (payload.unwrap_or(0) + around.len()) as u64
}
