//! Conversations of more than one request, as machines: what is asked next, and what it comes to. Who carries
//! the requests, over a network or in a simulation, only repeats what is said here.

use std::collections::BTreeMap;

use crate::migration::lineage::{LINKS_MAX, LineageError, PAGE_LINKS_MAX};
use crate::migration::message::{CLAIMS_MAX, Claim};
use crate::migration::{AnswerBody, Denial, DenialCode, Lineage, Link, Links, RequestBody};
use crate::types::{LinkId, Successions, VmId};
use crate::vm::VmSpec;

/// Times in a row that a target may come no further with a history.
const STANDSTILLS_MAX: u32 = 3;

/// What comes after an answer.
#[derive(Clone, PartialEq, Debug)]
pub enum Next {
    Ask(Box<RequestBody>),
    End(Box<AnswerBody>),
}

/// Reserves room at a target and shows it the VM's history. It ends with the answer to the reservation, or the
/// denial that the history met.
#[derive(Clone, Debug)]
pub struct Reserving {
    lineage: Lineage,
    /// The answer to the reservation, once it is there, and the link after which the history is shown.
    reserved: Option<(AnswerBody, Option<LinkId>)>,
    at: usize,
    standstills: u32,
}

impl Reserving {
    pub fn begin(spec: VmSpec, lineage: Lineage) -> (Self, RequestBody) {
        let reserving = Self { lineage, reserved: None, at: 0, standstills: 0 };
        (reserving, RequestBody::Reservation { spec })
    }

    pub fn answered(&mut self, answer: AnswerBody) -> Next {
        let Some((reserved, after)) = self.reserved.clone() else {
            let AnswerBody::Reserved { reservation: Some(_), known, .. } = &answer else {
                return Next::End(Box::new(answer));
            };
            let after = known.filter(|id| self.lineage.position(id).is_some());
            self.reserved = Some((answer, after));
            return self.page(after);
        };
        let total = self.lineage.since(after.as_ref()).len();
        let refuse =
            |text: &str| Next::End(Box::new(AnswerBody::Denied(Denial::new(DenialCode::Other, text))));
        match answer {
            AnswerBody::Lineage { links: held } if held as usize == total => Next::End(Box::new(reserved)),
            AnswerBody::Lineage { links: held } if (held as usize) < total => {
                // A target that comes no further is not asked for ever.
                self.standstills += u32::from(held as usize <= self.at);
                self.at = held as usize;
                match self.standstills > STANDSTILLS_MAX {
                    true => refuse("the target does not take the VM's history"),
                    false => self.page(after),
                }
            }
            AnswerBody::Lineage { .. } => refuse("the target counts more of the VM's history than there is"),
            other => Next::End(Box::new(other)),
        }
    }

    fn page(&self, after: Option<LinkId>) -> Next {
        let all = self.lineage.since(after.as_ref());
        let links = Links(all[self.at..].iter().take(PAGE_LINKS_MAX).cloned().collect());
        Next::Ask(Box::new(RequestBody::Lineage {
            at: self.at as u32,
            total: all.len() as u32,
            after,
            links,
            successions: self.lineage.successions().clone(),
        }))
    }
}

/// What a member showed of one VM beyond what was claimed; nothing of it is verified.
#[derive(Clone, Debug)]
pub struct Shown {
    pub claim: Claim,
    links: Vec<Link>,
    keys: Successions,
}

impl Shown {
    /// The history it makes: it goes on from what is `kept`, or stands for itself.
    ///
    /// # Errors
    /// If it is none.
    pub fn verified(&self, kept: &Lineage) -> Result<Lineage, LineageError> {
        let goes_on = kept.tip().map(|tip| tip.id) == self.claim.tip;
        let whole = || Lineage::empty(self.claim.vm).with(&self.keys).continued(self.links.clone());
        let verified =
            if goes_on { kept.clone().with(&self.keys).continued(self.links.clone()) } else { whole() };
        verified.or_else(|_| whole())
    }
}

/// Asks a member what it knows of our VMs beyond our claims: page by page, and about each VM again of which one
/// answer did not say all.
#[derive(Clone, Debug)]
pub struct AskingOwners {
    waiting: Vec<Vec<Claim>>,
    /// What is asked at this moment.
    asked: BTreeMap<VmId, Claim>,
    so_far: BTreeMap<VmId, (Claim, Vec<Link>)>,
    keys: Successions,
}

impl AskingOwners {
    pub fn begin(claims: Vec<Claim>) -> Self {
        // Nothing claimed is told as well: what was disputed is not any more.
        let mut waiting = match claims.is_empty() {
            true => vec![Vec::new()],
            false => claims.chunks(CLAIMS_MAX).map(<[Claim]>::to_vec).collect(),
        };
        waiting.reverse();
        Self { waiting, asked: BTreeMap::new(), so_far: BTreeMap::new(), keys: Successions::default() }
    }

    /// The next question, if there is one.
    pub fn next_question(&mut self) -> Option<RequestBody> {
        let claims = self.waiting.pop()?;
        self.asked = claims.iter().map(|c| (c.vm, *c)).collect();
        Some(RequestBody::Owners { claims })
    }

    /// What was shown completely by now.
    pub fn answered(&mut self, answer: AnswerBody) -> Vec<Shown> {
        let AnswerBody::Owners { known } = answer else { return Vec::new() };
        let mut complete = Vec::new();
        for k in known {
            let Some(claim) = self.asked.get(&k.vm).copied() else { continue };
            for succession in k.successions.iter() {
                let _ = self.keys.add(succession.clone());
            }
            let (_, links) = self.so_far.entry(k.vm).or_insert((claim, Vec::new()));
            let news = !k.links.0.is_empty();
            links.extend(k.links.0);
            let too_many = links.len() > LINKS_MAX;
            match (k.more && news && !too_many, links.last().map(Link::id)) {
                (true, tip) => self.waiting.push(vec![Claim { tip, ..claim }]),
                // The budget of that answer was used up by others.
                (false, _) if k.more && !news && self.asked.len() > 1 => self.waiting.push(vec![claim]),
                _ => {
                    if let Some((claim, links)) = self.so_far.remove(&k.vm) {
                        complete.push(Shown { claim, links, keys: self.keys.clone() });
                    }
                }
            }
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ByteSize, RecipeId, ReservationId};
    use crate::vm::Firmware;

    fn spec() -> VmSpec {
        VmSpec {
            id: VmId(uuid::Uuid::from_u128(1)),
            name: "web".parse().unwrap(),
            cpus: 1,
            memory: ByteSize::mib(64),
            recipe: RecipeId::of(b"r"),
            root_size: ByteSize::mib(1),
            user_data_size: ByteSize(0),
            nics: Vec::new(),
            architecture: "amd64".into(),
            cpu_model: "qemu64".into(),
            firmware: Firmware::Bios,
            disk_bus: Default::default(),
            system_uuid: None,
        }
    }

    fn reserved() -> AnswerBody {
        let reservation = Some(ReservationId(uuid::Uuid::from_u128(2)));
        AnswerBody::Reserved { expires_in_s: 60, reservation, known: None }
    }

    #[test]
    fn a_history_is_shown_until_the_target_has_it_or_comes_no_further() {
        let empty = Lineage::empty(spec().id);
        let (mut talk, first) = Reserving::begin(spec(), empty.clone());
        assert!(matches!(first, RequestBody::Reservation { .. }));
        // A history without links is shown as such: the target says that it believes it.
        let Next::Ask(page) = talk.answered(reserved()) else { panic!() };
        assert!(matches!(*page, RequestBody::Lineage { at: 0, total: 0, .. }));
        assert_eq!(talk.answered(AnswerBody::Lineage { links: 0 }), Next::End(Box::new(reserved())));
        let (mut talk, _) = Reserving::begin(spec(), empty.clone());
        let no = AnswerBody::Denied(Denial::new(DenialCode::Memory, "full"));
        assert_eq!(talk.answered(no.clone()), Next::End(Box::new(no)));
        let (mut talk, _) = Reserving::begin(spec(), empty);
        let _ = talk.answered(reserved());
        let Next::End(end) = talk.answered(AnswerBody::Lineage { links: 7 }) else { panic!() };
        assert!(matches!(*end, AnswerBody::Denied(d) if d.text.as_str().contains("counts more")));
    }

    #[test]
    fn owners_are_asked_page_by_page_and_nothing_claimed_is_told_as_well() {
        let claim =
            |n: u128| Claim { vm: VmId(uuid::Uuid::from_u128(n)), tip: None, epoch: 1, running: true };
        let mut talk = AskingOwners::begin((0..CLAIMS_MAX as u128 + 1).map(claim).collect());
        let pages: Vec<usize> = std::iter::from_fn(|| match talk.next_question()? {
            RequestBody::Owners { claims } => Some(claims.len()),
            _ => None,
        })
        .collect();
        assert_eq!(pages, [CLAIMS_MAX, 1]);
        let mut talk = AskingOwners::begin(Vec::new());
        assert!(matches!(talk.next_question(), Some(RequestBody::Owners { claims }) if claims.is_empty()));
        assert!(talk.answered(AnswerBody::Owners { known: Vec::new() }).is_empty());
        assert!(talk.next_question().is_none());
    }
}
