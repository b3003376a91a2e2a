//! Whose identity keys are believed. A member's key is confirmed by the configuration, by the operator,
//! or on first use; where it gave way to another by a succession both signed, the other is believed in
//! its place. What was once seen of a key is kept: a second successor of it is a thief's, or the thief
//! came first, and operators must find out.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::types::{MemberJid, PublicKey, Succession, Successions};

use super::members::Trust;

/// Members whose keys are kept at most.
const MEMBERS_MAX: usize = 10_000;

/// What is kept for good of one member's keys.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub struct Kept {
    /// Confirmed by the operator or on first use; `None` where the configuration alone confirms one.
    pub key: Option<PublicKey>,
    /// How it, or the configured one, gave way to those that followed.
    pub successions: Successions,
}

/// Where nothing followed, a key is written as text alone, as it was before keys could give way.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Key(PublicKey),
    Full { key: Option<PublicKey>, successions: Successions },
}

impl From<PublicKey> for Kept {
    fn from(key: PublicKey) -> Self {
        Self { key: Some(key), successions: Successions::default() }
    }
}

impl From<Form> for Kept {
    fn from(form: Form) -> Self {
        match form {
            Form::Key(key) => key.into(),
            Form::Full { key, successions } => Self { key, successions },
        }
    }
}

impl From<Kept> for Form {
    fn from(kept: Kept) -> Self {
        match kept {
            Kept { key: Some(key), successions } if successions.is_empty() => Form::Key(key),
            Kept { key, successions } => Form::Full { key, successions },
        }
    }
}

/// Members whose keys the operator revoked, with all keys that were known to be theirs.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(from = "RevokedForm", into = "RevokedForm")]
pub struct Revoked(pub BTreeMap<MemberJid, BTreeSet<PublicKey>>);

/// An earlier build kept the members alone.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RevokedForm {
    Members(BTreeSet<MemberJid>),
    Keys(BTreeMap<MemberJid, BTreeSet<PublicKey>>),
}

impl From<RevokedForm> for Revoked {
    fn from(form: RevokedForm) -> Self {
        match form {
            RevokedForm::Members(list) => Self(list.into_iter().map(|jid| (jid, BTreeSet::new())).collect()),
            RevokedForm::Keys(map) => Self(map),
        }
    }
}

impl From<Revoked> for RevokedForm {
    fn from(revoked: Revoked) -> Self {
        RevokedForm::Keys(revoked.0)
    }
}

/// What a member's presence changed in what is believed, or tried to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KeyNews {
    /// To be kept: its first key was confirmed by being shown.
    FirstUse(PublicKey),
    /// To be kept: its key gave way to another. Dealings under the earlier one end.
    Followed { from: PublicKey, to: PublicKey, configured: bool },
    /// A key of it would give way to a second one; nothing changed.
    Fork { old: PublicKey, known: PublicKey, other: PublicKey },
}

/// All that is believed of members' keys.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Keyring {
    configured: BTreeMap<MemberJid, PublicKey>,
    kept: BTreeMap<MemberJid, Kept>,
    revoked: Revoked,
    trust_on_first_use: bool,
}

impl Keyring {
    pub fn new(
        configured: BTreeMap<MemberJid, PublicKey>,
        kept: BTreeMap<MemberJid, Kept>,
        revoked: Revoked,
        trust_on_first_use: bool,
    ) -> Self {
        Self { configured, kept, revoked, trust_on_first_use }
    }

    /// The key that was confirmed: its successors are believed.
    fn confirmed(&self, jid: &MemberJid) -> Option<PublicKey> {
        self.configured.get(jid).copied().or_else(|| self.kept.get(jid)?.key)
    }

    /// Members of whom a key is believed.
    pub fn believed(&self) -> impl Iterator<Item = &MemberJid> + '_ {
        let kept =
            self.kept.iter().filter(|(jid, kept)| kept.key.is_some() && !self.configured.contains_key(*jid));
        let all = self.configured.keys().chain(kept.map(|(jid, _)| jid));
        all.filter(|jid| !self.revoked.0.contains_key(*jid))
    }

    /// Whether it is one of [`Keyring::believed`].
    pub fn believes(&self, jid: &MemberJid) -> bool {
        self.confirmed(jid).is_some() && !self.revoked.0.contains_key(jid)
    }

    /// The key that is believed now.
    pub fn trusted(&self, jid: &MemberJid) -> Option<PublicKey> {
        let confirmed = self.confirmed(jid)?;
        Some(self.kept.get(jid).map_or(confirmed, |kept| kept.successions.newest(&confirmed)))
    }

    /// The key in the configuration, where another followed it.
    pub fn outdated(&self, jid: &MemberJid) -> Option<PublicKey> {
        self.configured.get(jid).copied().filter(|key| self.trusted(jid) != Some(*key))
    }

    /// Whether `to` is `from`, or followed it, as far as `jid`'s keys are known.
    pub fn leads(&self, jid: &MemberJid, from: &PublicKey, to: &PublicKey) -> bool {
        from == to || self.kept.get(jid).is_some_and(|kept| kept.successions.leads(from, to))
    }

    /// The keys that the believed one followed, the newest last.
    pub fn predecessors(&self, jid: &MemberJid) -> Vec<Succession> {
        let (Some(kept), Some(trusted)) = (self.kept.get(jid), self.trusted(jid)) else { return Vec::new() };
        let ours = |s: &&Succession| kept.successions.leads(&s.new, &trusted);
        kept.successions.iter().filter(ours).cloned().collect()
    }

    fn is_revoked(&self, key: &PublicKey) -> bool {
        self.revoked.0.values().any(|keys| keys.contains(key))
    }

    /// Looks at the key a member shows, and at what it shows to lead there.
    pub fn see(&mut self, jid: &MemberJid, shown: PublicKey, proofs: &[Succession]) -> Option<KeyNews> {
        let Some(trusted) = self.trusted(jid) else { return self.first_use(jid, shown, proofs) };
        // Signatures cost time: they are looked at only where they could matter.
        if shown == trusted || proofs.is_empty() {
            return None;
        }
        let proofs = Successions::try_from(proofs.to_vec()).ok()?;
        let history = self.kept.get(jid).map(|kept| kept.successions.clone()).unwrap_or_default();
        let fork = |s: &Succession| {
            let known = history.of(&s.old).filter(|known| known.new != s.new)?.new;
            Some(KeyNews::Fork { old: s.old, known, other: s.new })
        };
        if let Some(fork) = proofs.iter().find_map(fork) {
            return Some(fork);
        }
        if !proofs.leads(&trusted, &shown) {
            return None;
        }
        let (mut next, mut at) = (history, trusted);
        for step in proofs.after(&trusted) {
            if at == shown {
                break;
            }
            if self.is_revoked(&step.new) || next.add(step.clone()).is_err() {
                return None;
            }
            at = step.new;
        }
        self.kept.entry(jid.clone()).or_default().successions = next;
        let configured = self.configured.contains_key(jid);
        Some(KeyNews::Followed { from: trusted, to: shown, configured })
    }

    fn first_use(&mut self, jid: &MemberJid, shown: PublicKey, proofs: &[Succession]) -> Option<KeyNews> {
        let revoked = self.revoked.0.contains_key(jid)
            || self.is_revoked(&shown)
            || proofs.iter().any(|s| self.is_revoked(&s.old) || self.is_revoked(&s.new));
        if !self.trust_on_first_use || revoked || self.kept.len() >= MEMBERS_MAX {
            return None;
        }
        self.kept.entry(jid.clone()).or_default().key = Some(shown);
        Some(KeyNews::FirstUse(shown))
    }

    /// What is to be thought of a member that shows this key. `forks` tells that it came with a second
    /// succession of a key.
    pub fn trust_of(&self, jid: &MemberJid, shown: &PublicKey, forks: bool) -> Trust {
        match self.trusted(jid) {
            Some(trusted) if trusted == *shown => Trust::Trusted,
            Some(trusted) if self.leads(jid, shown, &trusted) => Trust::Superseded { by: trusted },
            Some(trusted) if forks => Trust::Forked { pinned: trusted },
            Some(trusted) => Trust::Changed { pinned: trusted },
            None if self.revoked.0.contains_key(jid) || self.is_revoked(shown) => Trust::Revoked,
            None => Trust::Unknown,
        }
    }

    /// Confirms a key. What was said to follow it is taken for a thief's from now on.
    pub fn pin(&mut self, jid: &MemberJid, key: PublicKey) -> Result<(), String> {
        if self.configured.contains_key(jid) {
            return match self.trusted(jid) {
                Some(trusted) if trusted == key => Ok(()),
                _ => Err(format!("the configuration pins another key for {jid}; change trust.pinned there")),
            };
        }
        let kept = self.kept.entry(jid.clone()).or_default();
        let disowned: BTreeSet<_> = kept.successions.after(&key).map(|s| s.new).collect();
        let mut stays = Successions::default();
        for s in kept.successions.iter().filter(|s| !disowned.contains(&s.new)) {
            // A part of what fits together fits together.
            let _ = stays.add(s.clone());
        }
        *kept = Kept { key: Some(key), successions: stays };
        let revoked = self.revoked.0.entry(jid.clone()).or_default();
        revoked.extend(disowned);
        revoked.remove(&key);
        if revoked.is_empty() {
            self.revoked.0.remove(jid);
        }
        Ok(())
    }

    /// Believes none of a member's keys any more: not the confirmed one, none that followed it, none that
    /// it followed, whoever shows them.
    pub fn revoke(&mut self, jid: &MemberJid) -> Result<(), String> {
        if self.configured.contains_key(jid) {
            return Err(format!(
                "the configuration pins the key of {jid}; remove it from trust.pinned there"
            ));
        }
        let none = || format!("no key of {jid} was confirmed");
        let kept = self.kept.get(jid).ok_or_else(none)?;
        let linked = kept.successions.linked(&kept.key.ok_or_else(none)?);
        self.kept.remove(jid);
        self.revoked.0.entry(jid.clone()).or_default().extend(linked);
        Ok(())
    }

    /// To be kept.
    pub fn kept(&self) -> &BTreeMap<MemberJid, Kept> {
        &self.kept
    }

    /// To be kept.
    pub fn revoked(&self) -> &Revoked {
        &self.revoked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;
    use crate::types::IdentityKey;

    fn secret(n: u8) -> IdentityKey {
        IdentityKey::from_secret_bytes(&[n; 32])
    }

    fn key(n: u8) -> PublicKey {
        secret(n).public()
    }

    fn step(old: u8, new: u8) -> Succession {
        Succession::sign(&secret(old), &secret(new), UnixMillis(7))
    }

    fn jid(text: &str) -> MemberJid {
        text.parse().unwrap()
    }

    fn pinned(n: u8) -> Keyring {
        let mut ring = Keyring::default();
        ring.pin(&jid("a@x"), key(n)).unwrap();
        ring
    }

    /// As it is after a restart.
    fn reread(ring: &Keyring) -> Keyring {
        let kept = serde_json::from_str(&serde_json::to_string(ring.kept()).unwrap()).unwrap();
        let revoked = serde_json::from_str(&serde_json::to_string(ring.revoked()).unwrap()).unwrap();
        Keyring::new(ring.configured.clone(), kept, revoked, ring.trust_on_first_use)
    }

    #[test]
    fn who_pinned_a_key_follows_it_however_many_steps_it_missed() {
        let a = jid("a@x");
        let mut ring = pinned(1);
        let followed = |from, to| Some(KeyNews::Followed { from: key(from), to: key(to), configured: false });
        assert_eq!(ring.see(&a, key(2), &[step(1, 2)]), followed(1, 2));
        // Away for two rotations; what came before is told as well.
        assert_eq!(ring.see(&a, key(4), &[step(1, 2), step(2, 3), step(3, 4)]), followed(2, 4));
        assert_eq!(ring.see(&a, key(4), &[step(1, 2), step(2, 3), step(3, 4)]), None, "no news");
        let mut ring = reread(&ring);
        assert_eq!(ring.trusted(&a), Some(key(4)));
        assert_eq!(ring.predecessors(&a).iter().map(|s| s.old).collect::<Vec<_>>(), [key(1), key(2), key(3)]);
        assert!(ring.leads(&a, &key(1), &key(4)) && !ring.leads(&a, &key(4), &key(1)));
        // A copy of an old key, or a restored backup.
        assert_eq!(ring.see(&a, key(2), &[step(1, 2)]), None);
        assert_eq!(ring.trust_of(&a, &key(2), false), Trust::Superseded { by: key(4) });
        assert_eq!(ring.trust_of(&a, &key(9), false), Trust::Changed { pinned: key(4) });
    }

    #[test]
    fn nothing_but_the_pinned_keys_own_word_is_followed() {
        let a = jid("a@x");
        let mut ring = pinned(1);
        let forged = Succession { by_old: step(3, 2).by_old, ..step(1, 2) };
        let taken = Succession { by_new: step(3, 4).by_new, ..step(1, 2) };
        let forks_itself = [step(1, 2), step(1, 3)];
        for (shown, proofs) in [
            (2, vec![forged]),
            (2, vec![taken]),
            (2, vec![step(3, 2)]),
            (3, vec![step(1, 2)]),
            (2, vec![]),
            (2, forks_itself.to_vec()),
        ] {
            assert_eq!(ring.see(&a, key(shown), &proofs), None, "{proofs:?}");
        }
        assert_eq!((ring.trusted(&a), ring.kept()[&a].successions.len()), (Some(key(1)), 0));
        // What leads elsewhere is not kept: nobody fills the history with rubbish.
        assert!(ring.see(&a, key(2), &[step(1, 2), step(2, 3), step(8, 9)]).is_some());
        assert_eq!(ring.kept()[&a].successions.len(), 1);
    }

    #[test]
    fn a_thief_of_a_superseded_key_cannot_fork() {
        let a = jid("a@x");
        let mut ring = pinned(1);
        ring.see(&a, key(2), &[step(1, 2)]);
        let mut ring = reread(&ring);
        let fork = Some(KeyNews::Fork { old: key(1), known: key(2), other: key(6) });
        assert_eq!(ring.see(&a, key(6), &[step(1, 6)]), fork);
        assert_eq!(ring.see(&a, key(7), &[step(1, 6), step(6, 7)]), fork, "nor with more steps");
        assert_eq!(ring.trusted(&a), Some(key(2)));
        assert_eq!(ring.trust_of(&a, &key(6), true), Trust::Forked { pinned: key(2) });
        // The thief was first: the operator asks its colleague, and trusts whom that one names.
        ring.pin(&a, key(6)).unwrap();
        assert_eq!(ring.trust_of(&a, &key(6), false), Trust::Trusted);
        ring.pin(&a, key(1)).unwrap();
        let mut ring = reread(&ring);
        assert_eq!(ring.trusted(&a), Some(key(1)), "what followed it is disowned");
        assert_eq!(ring.see(&a, key(2), &[step(1, 2)]), None, "and is not followed again");
    }

    #[test]
    fn revocation_covers_all_keys_of_a_member_and_what_they_introduce() {
        let (a, b) = (jid("a@x"), jid("b@x"));
        let mut ring = Keyring { trust_on_first_use: true, ..pinned(1) };
        ring.see(&a, key(2), &[step(1, 2)]);
        ring.revoke(&a).unwrap();
        let mut ring = reread(&ring);
        for n in [1, 2] {
            assert_eq!(ring.trust_of(&a, &key(n), false), Trust::Revoked);
            assert_eq!(ring.see(&b, key(n), &[]), None, "not from another account either");
            assert_eq!(ring.trust_of(&b, &key(n), false), Trust::Revoked);
        }
        for (member, shown, proofs) in
            [(&a, 3, vec![step(2, 3)]), (&a, 3, vec![step(1, 3)]), (&a, 3, vec![]), (&b, 3, vec![step(2, 3)])]
        {
            assert_eq!(ring.see(member, key(shown), &proofs), None, "{proofs:?}");
        }
        // A key that leads to a revoked one is not followed there.
        ring.pin(&a, key(4)).unwrap();
        assert_eq!(ring.see(&a, key(2), &[step(4, 2)]), None);
        assert_eq!(ring.trusted(&a), Some(key(4)));
        // The operator's word lifts it.
        ring.pin(&a, key(2)).unwrap();
        assert_eq!(ring.trusted(&a), Some(key(2)));
    }

    #[test]
    fn a_configured_key_is_followed_until_the_configuration_says_otherwise() {
        let a = jid("a@x");
        let configured = |n| BTreeMap::from([(a.clone(), key(n))]);
        let mut ring = Keyring { configured: configured(1), ..Keyring::default() };
        let news = ring.see(&a, key(2), &[step(1, 2)]);
        assert_eq!(news, Some(KeyNews::Followed { from: key(1), to: key(2), configured: true }));
        assert_eq!((ring.trusted(&a), ring.outdated(&a)), (Some(key(2)), Some(key(1))));
        assert!(ring.pin(&a, key(1)).is_err() && ring.pin(&a, key(2)).is_ok() && ring.revoke(&a).is_err());
        let mut ring = reread(&ring);
        assert!(matches!(ring.see(&a, key(3), &[step(1, 3)]), Some(KeyNews::Fork { .. })), "after a restart");
        ring.configured = configured(2);
        assert_eq!((ring.trusted(&a), ring.outdated(&a)), (Some(key(2)), None));
        // Taken out of the configuration, nothing is left that would be believed.
        ring.configured.clear();
        assert_eq!(ring.trust_of(&a, &key(2), false), Trust::Unknown);
    }

    #[test]
    fn what_an_earlier_build_kept_is_read() {
        let kept: BTreeMap<MemberJid, Kept> =
            serde_json::from_str(&format!("{{\"a@x\": \"{}\"}}", key(1))).unwrap();
        assert_eq!(kept[&jid("a@x")], Kept::from(key(1)));
        assert_eq!(serde_json::to_value(&kept).unwrap()["a@x"], key(1).to_string(), "and written the same");
        let revoked: Revoked = serde_json::from_str("[\"a@x\"]").unwrap();
        assert_eq!(revoked.0, BTreeMap::from([(jid("a@x"), BTreeSet::new())]));
        assert_eq!(serde_json::from_str::<Revoked>("[]").unwrap(), Revoked::default());
        let forged = Succession { by_old: step(3, 2).by_old, ..step(1, 2) };
        let list = serde_json::to_string(&[forged]).unwrap();
        let file = format!("{{\"a@x\": {{\"key\": \"{}\", \"successions\": {list}}}}}", key(1));
        assert!(serde_json::from_str::<BTreeMap<MemberJid, Kept>>(&file).is_err());
    }
}
