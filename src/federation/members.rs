//! Who is in the federation, what they offer, and whether their key is trusted.
//!
//! A member is its account's bare JID, which the room's service stamps; nicks and payloads prove
//! nothing. Whether its key is believed is [`super::trust`]'s to say.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::stanza::Cloud;
use crate::types::{CloudName, MemberJid, PublicKey};

use super::refusals::Refused;
use super::trust::{Kept, KeyNews, Keyring, Revoked};

/// Members remembered at most; beyond it those gone longest are forgotten.
const MEMBERS_MAX: usize = 10_000;

/// One presence stanza of the room, reduced to what counts.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Presence {
    /// The real bare JID, from `muc#user`.
    pub jid: MemberJid,
    /// Its resource; a member's broker is the one that sends `<cloud/>`.
    pub resource: String,
    pub available: bool,
    /// Shared by all that keep it: a room's members are many, and most of what they show never changes.
    #[serde(with = "payload")]
    pub cloud: Option<Arc<Cloud>>,
}

/// A payload is written as if nobody shared it.
mod payload {
    use super::{Arc, Cloud};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(cloud: &Option<Arc<Cloud>>, to: S) -> Result<S::Ok, S::Error> {
        cloud.as_deref().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Arc<Cloud>>, D::Error> {
        Ok(Option::<Cloud>::deserialize(from)?.map(Arc::new))
    }
}

/// What is known of one member.
#[derive(Clone, PartialEq, Debug)]
pub struct Member {
    pub jid: MemberJid,
    /// The resource its broker is online with; requests go to it.
    pub resource: Option<String>,
    pub since: UnixMillis,
    pub last_seen: UnixMillis,
    pub name: Option<CloudName>,
    pub key: Option<PublicKey>,
    pub cloud: Option<Arc<Cloud>>,
    /// The room's owner took it off the list.
    pub removed: bool,
    /// The key it shows came with a second succession of a key that has a successor.
    pub forks: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    Trusted,
    /// Never confirmed.
    Unknown,
    /// Another key than the pinned one.
    Changed {
        pinned: PublicKey,
    },
    /// A key that the believed one followed.
    Superseded {
        by: PublicKey,
    },
    /// A second successor of a key of its: one of the two is a thief's.
    Forked {
        pinned: PublicKey,
    },
    /// The operator trusts it no longer.
    Revoked,
    /// It showed no usable key.
    NoKey,
}

/// Why a member is not listened to.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Distrust {
    #[error("is not a member that was seen in the room")]
    NotSeen,
    #[error("was removed from the federation")]
    Removed,
    #[error("shows the key {} where {} is pinned", shown.fingerprint(), pinned.fingerprint())]
    Changed { shown: PublicKey, pinned: PublicKey },
    #[error("shows the key {}, which gave way to {}", shown.fingerprint(), by.fingerprint())]
    Superseded { shown: PublicKey, by: PublicKey },
    #[error(
        "shows the key {} as a second successor where {} is trusted: one of the two is a thief's",
        shown.fingerprint(), pinned.fingerprint()
    )]
    Forked { shown: PublicKey, pinned: PublicKey },
    #[error("its key {} is not confirmed", .0.fingerprint())]
    Unconfirmed(PublicKey),
    #[error("its key {} was revoked", .0.fingerprint())]
    Revoked(PublicKey),
    #[error("shows no identity key")]
    NoKey,
}

impl Distrust {
    pub fn refused(&self) -> Refused {
        match self {
            Distrust::NotSeen | Distrust::Removed => Refused::NotMember,
            Distrust::Changed { .. } | Distrust::Superseded { .. } | Distrust::Forked { .. } => {
                Refused::ChangedKey
            }
            Distrust::Unconfirmed(_) | Distrust::Revoked(_) | Distrust::NoKey => Refused::UntrustedKey,
        }
    }
}

impl Member {
    pub fn is_online(&self) -> bool {
        self.resource.is_some()
    }
}

/// The member table. The room itself is the roster; this is what it showed.
#[derive(Clone, Debug)]
pub struct Members {
    members: BTreeMap<MemberJid, Member>,
    keys: Keyring,
    /// This cloud's own name: nobody else has it.
    own_name: Option<CloudName>,
}

impl Members {
    pub fn new(
        configured: BTreeMap<MemberJid, PublicKey>,
        pinned: BTreeMap<MemberJid, PublicKey>,
        trust_on_first_use: bool,
    ) -> Self {
        let kept = pinned.into_iter().map(|(jid, key)| (jid, Kept::from(key))).collect();
        Self::believing(Keyring::new(configured, kept, Revoked::default(), trust_on_first_use))
    }

    pub fn believing(keys: Keyring) -> Self {
        Self { members: BTreeMap::new(), keys, own_name: None }
    }

    /// Whose keys are believed.
    pub fn keyring(&self) -> &Keyring {
        &self.keys
    }

    /// The members as the cloud of this name sees them.
    pub fn seen_by(self, own_name: CloudName) -> Self {
        Self { own_name: Some(own_name), ..self }
    }

    /// Takes in a presence, and tells what it means for the member's key.
    pub fn presence(&mut self, p: Presence, now: UnixMillis) -> Option<KeyNews> {
        let cloud = p.cloud.filter(|c| c.is_bounded());
        let member = self.members.entry(p.jid.clone()).or_insert_with(|| Member {
            jid: p.jid.clone(),
            resource: None,
            since: now,
            last_seen: now,
            name: None,
            key: None,
            cloud: None,
            removed: false,
            forks: false,
        });
        member.last_seen = now;
        if !p.available {
            if member.resource.as_deref() == Some(&p.resource) {
                member.resource = None;
                member.since = now;
            }
            return None;
        }
        // Only brokers send the payload: an operator watching the room with a chat client does not.
        let cloud = cloud?;
        if !member.is_online() {
            member.since = now;
        }
        member.resource = Some(p.resource);
        member.removed = false;
        // Most presences of a room show the key they did before, and reading one takes longer than all the rest.
        if member.cloud.as_ref().is_none_or(|before| before.key != cloud.key) {
            member.key = cloud.key.parse().ok();
        }
        let (name, proofs) = (cloud.name.parse().ok(), cloud.successions());
        member.cloud = Some(cloud);
        let news = member.key.and_then(|shown| self.keys.see(&p.jid, shown, &proofs));
        member.forks = matches!(news, Some(KeyNews::Fork { .. }));
        self.bind_name(&p.jid, name.filter(|name| self.own_name.as_ref() != Some(name)));
        self.forget_oldest();
        news
    }

    /// A name stays with the member that had it first, gone or not, so that nobody takes another's
    /// place while it is away. Only a trusted member gets a name that an untrusted one holds.
    fn bind_name(&mut self, jid: &MemberJid, name: Option<CloudName>) {
        if name.is_some() && self.members.get(jid).is_some_and(|m| m.name == name) {
            return;
        }
        let holder = self.members.values().find(|m| m.jid != *jid && m.name.is_some() && m.name == name);
        let holder = holder.map(|m| m.jid.clone());
        let is_trusted = |jid: &MemberJid| self.trust_of(jid) == Trust::Trusted;
        let yields = holder.as_ref().is_some_and(|h| is_trusted(jid) && !is_trusted(h));
        let bound = if holder.is_some() && !yields { None } else { name };
        if let Some(loser) = holder.filter(|_| yields).and_then(|h| self.members.get_mut(&h)) {
            loser.name = None;
        }
        if let Some(member) = self.members.get_mut(jid) {
            member.name = bound;
        }
    }

    /// The room's owner removed a member: until it is in the room again, it is none.
    pub fn removed(&mut self, jid: &MemberJid, now: UnixMillis) {
        if let Some(member) = self.members.get_mut(jid) {
            (member.resource, member.since, member.removed) = (None, now, true);
        }
    }

    /// The session is down: nobody can be said to be here.
    pub fn disconnected(&mut self, now: UnixMillis) {
        for member in self.members.values_mut().filter(|m| m.resource.is_some()) {
            member.resource = None;
            member.since = now;
        }
    }

    pub fn trust_of(&self, jid: &MemberJid) -> Trust {
        match self.members.get(jid).and_then(|m| Some((m.key?, m.forks))) {
            Some((shown, forks)) => self.keys.trust_of(jid, &shown, forks),
            None => Trust::NoKey,
        }
    }

    /// What is believed of their keys.
    pub fn keys(&self) -> &Keyring {
        &self.keys
    }

    /// The key requests of a member must be signed with, or why it is not listened to.
    pub fn trusted_key(&self, jid: &MemberJid) -> Result<PublicKey, Distrust> {
        let member = self.members.get(jid).ok_or(Distrust::NotSeen)?;
        let shown = member.key.ok_or(Distrust::NoKey)?;
        match self.trust_of(jid) {
            _ if member.removed => Err(Distrust::Removed),
            Trust::Trusted => Ok(shown),
            Trust::Changed { pinned } => Err(Distrust::Changed { shown, pinned }),
            Trust::Superseded { by } => Err(Distrust::Superseded { shown, by }),
            Trust::Forked { pinned } => Err(Distrust::Forked { shown, pinned }),
            Trust::Unknown => Err(Distrust::Unconfirmed(shown)),
            Trust::Revoked => Err(Distrust::Revoked(shown)),
            Trust::NoKey => Err(Distrust::NoKey),
        }
    }

    /// Keys of trusted members that are online.
    pub fn trusted_keys(&self) -> impl Iterator<Item = PublicKey> + '_ {
        self.trusted().map(|(_, key)| key)
    }

    /// Trusted members that are online, with their keys.
    pub fn trusted(&self) -> impl Iterator<Item = (&MemberJid, PublicKey)> + '_ {
        let online = self.members.values().filter(|m| m.is_online());
        online.filter_map(|m| Some((&m.jid, self.trusted_key(&m.jid).ok()?)))
    }

    /// Whether this member may connect: it is online, and its key is trusted. That key.
    pub fn admitted(&self, jid: &MemberJid) -> Option<PublicKey> {
        self.trusted_key(jid).ok().filter(|_| self.is_online(jid))
    }

    /// Members whose key is believed, online or not, and whether or not they were seen.
    pub fn believed(&self) -> impl Iterator<Item = &MemberJid> + '_ {
        self.keys.believed().filter(|jid| !self.members.get(*jid).is_some_and(|m| m.removed))
    }

    /// Whether it is one of [`Members::believed`].
    pub fn believes(&self, jid: &MemberJid) -> bool {
        self.keys.believes(jid) && !self.members.get(jid).is_some_and(|m| m.removed)
    }

    /// Confirms a member's key.
    pub fn pin(&mut self, jid: &MemberJid, key: PublicKey) -> Result<(), String> {
        self.keys.pin(jid, key)
    }

    /// Believes none of a member's keys any more.
    pub fn revoke(&mut self, jid: &MemberJid) -> Result<(), String> {
        self.keys.revoke(jid)
    }

    /// All that were seen, in order of their JIDs.
    pub fn all(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    pub fn get(&self, jid: &MemberJid) -> Option<&Member> {
        self.members.get(jid)
    }

    pub fn online(&self) -> impl Iterator<Item = &MemberJid> {
        self.members.values().filter(|m| m.is_online()).map(|m| &m.jid)
    }

    pub fn is_online(&self, jid: &MemberJid) -> bool {
        self.members.get(jid).is_some_and(Member::is_online)
    }

    pub fn cloud_of(&self, jid: &MemberJid) -> Option<CloudName> {
        self.members.get(jid).and_then(|m| m.name.clone())
    }

    /// The negotiation versions a member says it speaks; empty if it is not online.
    pub fn versions_of(&self, jid: &MemberJid) -> &str {
        self.members.get(jid).and_then(|m| m.cloud.as_ref()).map_or("", |c| &c.versions)
    }

    /// A member by cloud name or bare JID.
    pub fn find(&self, text: &str) -> Option<MemberJid> {
        let by_name = || self.members.values().find(|m| m.name.as_ref().is_some_and(|n| n.as_str() == text));
        let by_jid = text.parse::<MemberJid>().ok().and_then(|jid| self.members.get(&jid));
        by_jid.or_else(by_name).map(|m| m.jid.clone())
    }

    pub fn memory_bytes_free(&self, jid: &MemberJid) -> u64 {
        self.members.get(jid).and_then(|m| m.cloud.as_ref()?.capacity).map_or(0, |c| c.memory_free)
    }

    fn forget_oldest(&mut self) {
        while self.members.len() > MEMBERS_MAX {
            let oldest = self
                .members
                .values()
                .filter(|m| !m.is_online())
                .min_by_key(|m| m.last_seen)
                .map(|m| m.jid.clone());
            match oldest {
                Some(jid) => drop(self.members.remove(&jid)),
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{IdentityKey, Succession};

    fn key(n: u8) -> PublicKey {
        IdentityKey::from_secret_bytes(&[n; 32]).public()
    }

    fn jid(text: &str) -> MemberJid {
        text.parse().unwrap()
    }

    fn presence(member: &str, name: &str, key: PublicKey) -> Presence {
        let cloud = Cloud {
            name: name.into(),
            key: key.to_string().into(),
            versions: "1".into(),
            power: "on".into(),
            ..Cloud::default()
        };
        Presence {
            jid: jid(member),
            resource: "broker".into(),
            available: true,
            cloud: Some(Arc::new(cloud)),
        }
    }

    #[test]
    fn a_member_comes_and_goes_with_the_time() {
        let mut m = Members::new(BTreeMap::new(), BTreeMap::new(), false);
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(10));
        assert!(m.is_online(&jid("a@x")));
        let gone = Presence { available: false, cloud: None, ..presence("a@x", "alpine", key(1)) };
        m.presence(Presence { resource: "chat".into(), ..gone.clone() }, UnixMillis(15));
        assert!(m.is_online(&jid("a@x")), "another client of the account left");
        m.presence(gone, UnixMillis(20));
        let member = m.get(&jid("a@x")).unwrap();
        assert_eq!((member.is_online(), member.since), (false, UnixMillis(20)));
        assert_eq!(m.find("alpine"), Some(jid("a@x")));
    }

    #[test]
    fn keys_are_pinned_by_the_operator_or_on_first_use_only() {
        let mut m = Members::new(BTreeMap::new(), BTreeMap::new(), false);
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(1));
        assert_eq!(m.trust_of(&jid("a@x")), Trust::Unknown);
        m.pin(&jid("a@x"), key(1)).unwrap();
        assert_eq!(m.trusted_key(&jid("a@x")), Ok(key(1)));
        m.presence(presence("a@x", "alpine", key(2)), UnixMillis(2));
        assert_eq!(m.trust_of(&jid("a@x")), Trust::Changed { pinned: key(1) });
        assert_eq!(m.trusted_keys().count(), 0);

        let mut m = Members::new(BTreeMap::new(), BTreeMap::new(), true);
        assert!(m.presence(presence("a@x", "alpine", key(1)), UnixMillis(1)).is_some());
        assert!(m.presence(presence("a@x", "alpine", key(2)), UnixMillis(2)).is_none());
        assert!(matches!(m.trust_of(&jid("a@x")), Trust::Changed { .. }));
    }

    #[test]
    fn the_configuration_has_the_last_word() {
        let mut m = Members::new(BTreeMap::from([(jid("a@x"), key(1))]), BTreeMap::new(), true);
        assert!(m.pin(&jid("a@x"), key(2)).is_err());
        assert!(m.revoke(&jid("a@x")).is_err());
        assert!(m.presence(presence("a@x", "alpine", key(2)), UnixMillis(1)).is_none());
        assert!(m.trusted_key(&jid("a@x")).unwrap_err().to_string().contains("is pinned"));
    }

    #[test]
    fn who_was_revoked_is_not_believed_on_first_use() {
        let mut m = Members::new(BTreeMap::new(), BTreeMap::new(), true);
        assert!(m.presence(presence("a@x", "alpine", key(1)), UnixMillis(1)).is_some());
        m.revoke(&jid("a@x")).unwrap();
        assert!(m.presence(presence("a@x", "alpine", key(1)), UnixMillis(2)).is_none());
        assert_eq!(m.trusted_key(&jid("a@x")), Err(Distrust::Revoked(key(1))));
        let keys = m.keys();
        let keys = Keyring::new(BTreeMap::new(), keys.kept().clone(), keys.revoked().clone(), true);
        let mut again = Members::believing(keys);
        assert_eq!(
            again.presence(presence("a@x", "alpine", key(1)), UnixMillis(1)),
            None,
            "not after a restart either"
        );
        again.pin(&jid("a@x"), key(1)).unwrap();
        assert_eq!((again.trusted_key(&jid("a@x")), again.keys().revoked().0.len()), (Ok(key(1)), 0));
    }

    #[test]
    fn a_member_whose_key_gave_way_is_listened_to_by_its_new_key_alone() {
        let secret = |n: u8| IdentityKey::from_secret_bytes(&[n; 32]);
        let showing = |n: u8, steps: &[(u8, u8)]| {
            let mut p = presence("a@x", "alpine", key(n));
            let signed = steps.iter().map(|(a, b)| Succession::sign(&secret(*a), &secret(*b), UnixMillis(1)));
            p.cloud = p.cloud.map(|c| Arc::new((*c).clone().with_successions(signed)));
            p
        };
        let a = jid("a@x");
        let mut m = Members::new(BTreeMap::new(), BTreeMap::from([(a.clone(), key(1))]), false);
        assert_eq!(m.presence(showing(2, &[]), UnixMillis(1)), None);
        assert_eq!(m.trusted_key(&a), Err(Distrust::Changed { shown: key(2), pinned: key(1) }));
        assert!(m.presence(showing(2, &[(1, 2)]), UnixMillis(2)).is_some());
        assert_eq!(m.trusted_key(&a), Ok(key(2)));
        m.presence(showing(1, &[]), UnixMillis(3));
        assert_eq!(m.trusted_key(&a), Err(Distrust::Superseded { shown: key(1), by: key(2) }));
        m.presence(showing(3, &[(1, 3)]), UnixMillis(4));
        let forked = Distrust::Forked { shown: key(3), pinned: key(2) };
        assert_eq!((m.trusted_key(&a), forked.refused()), (Err(forked), Refused::ChangedKey));
        m.presence(showing(2, &[(1, 2)]), UnixMillis(5));
        assert_eq!(m.trusted_key(&a), Ok(key(2)));
    }

    #[test]
    fn who_was_removed_is_no_member_until_the_room_shows_it_again() {
        let mut m = Members::new(BTreeMap::new(), BTreeMap::new(), true);
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(1));
        let gone = Presence { available: false, cloud: None, ..presence("a@x", "alpine", key(1)) };
        m.presence(gone, UnixMillis(2));
        assert_eq!(m.trusted_key(&jid("a@x")), Ok(key(1)), "it is only away");
        m.removed(&jid("a@x"), UnixMillis(3));
        assert_eq!(m.trusted_key(&jid("a@x")), Err(Distrust::Removed));
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(4));
        assert_eq!(m.trusted_key(&jid("a@x")), Ok(key(1)));
    }

    #[test]
    fn nobody_takes_over_a_name() {
        let mut m = Members::new(BTreeMap::from([(jid("c@x"), key(3))]), BTreeMap::new(), false);
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(1));
        m.presence(presence("b@x", "alpine", key(2)), UnixMillis(2));
        assert_eq!(m.find("alpine"), Some(jid("a@x")));
        assert_eq!(m.cloud_of(&jid("b@x")), None);
        m.disconnected(UnixMillis(3));
        m.presence(presence("b@x", "alpine", key(2)), UnixMillis(4));
        assert_eq!(m.find("alpine"), Some(jid("a@x")), "it is only away");
        m.presence(presence("c@x", "alpine", key(3)), UnixMillis(5));
        assert_eq!(m.find("alpine"), Some(jid("c@x")), "a squatter yields to a trusted member");
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(6));
        assert_eq!((m.find("alpine"), m.cloud_of(&jid("a@x"))), (Some(jid("c@x")), None));
        m.presence(presence("c@x", "other", key(3)), UnixMillis(7));
        assert_eq!(m.find("alpine"), None, "a payload is needed to take a name");
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(8));
        assert_eq!(m.find("alpine"), Some(jid("a@x")));
    }

    #[test]
    fn nobody_takes_this_clouds_own_name() {
        let trusting = Members::new(BTreeMap::new(), BTreeMap::new(), true);
        let mut m = trusting.seen_by("alpine".parse().unwrap());
        m.presence(presence("a@x", "alpine", key(1)), UnixMillis(1));
        assert_eq!((m.find("alpine"), m.cloud_of(&jid("a@x"))), (None, None));
        assert!(m.is_online(&jid("a@x")));
    }

    #[test]
    fn a_payload_without_measure_is_not_looked_at() {
        let mut m = Members::new(BTreeMap::new(), BTreeMap::new(), true);
        let mut p = presence("a@x", "alpine", key(1));
        p.cloud = p.cloud.map(|c| Arc::new(Cloud { carbon: Some(f32::INFINITY), ..(*c).clone() }));
        assert!(m.presence(p, UnixMillis(1)).is_none());
        assert!(!m.is_online(&jid("a@x")));
        assert_eq!(m.trust_of(&jid("a@x")), Trust::NoKey);
    }
}
