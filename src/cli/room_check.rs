//! The room's part of `cicada config check --online`: what it is, whether this account may enter it under this
//! cloud's nick, whose it is, and who may make others. A broker of the same account that is in the room stays
//! there: the check is a session of its own under a nick of its own, and takes the cloud's only while nobody has it.

use std::time::Duration;

use crate::config::Config;
use crate::interface::problem::{Problem, ProblemKind};
use crate::xmpp::admin::Admin;
use crate::xmpp::probe::RoomMaking;
use crate::xmpp::{Occupant, RESOURCE, Refusal, Server, Software, Visit};

use super::federation::{kind_of, room_making_problem};
use super::online::{Check, CheckKind, check};

/// For all that is asked of one room.
const ROOM_TIMEOUT: Duration = Duration::from_secs(60);

/// All checks in order, as far as each lets the next one be made.
pub async fn run(config: &Config, admin: &Admin, server: &Server, broker_runs: bool) -> Vec<Check> {
    let mut checks = Vec::new();
    let room = Room { config, admin, server, broker_runs };
    if tokio::time::timeout(ROOM_TIMEOUT, room.look_and_enter(&mut checks)).await.is_err() {
        let problem =
            Problem::new(ProblemKind::Unavailable, room.object(), "the service for rooms does not answer");
        checks.push(check(CheckKind::Room, Err(problem.next("see the XMPP server's log"))));
    }
    checks
}

struct Room<'a> {
    config: &'a Config,
    admin: &'a Admin,
    server: &'a Server,
    /// On this machine, by this configuration.
    broker_runs: bool,
}

impl Room<'_> {
    fn object(&self) -> String {
        format!("room {}", self.config.xmpp.room)
    }

    fn refused(&self, refusal: &Refusal) -> Problem {
        let prosody = matches!(self.server.software, Software::Prosody | Software::Prosody13);
        let reason = match refusal {
            Refusal::NotMember if prosody => {
                format!("{refusal}, or banned from it, which Prosody tells in the same way")
            }
            refusal => refusal.to_string(),
        };
        let next = refusal.next_step(&self.config.xmpp.jid);
        Problem::new(kind_of(refusal), self.object(), reason).next(next)
    }

    async fn look_and_enter(&self, checks: &mut Vec<Check>) {
        let lacks = match self.admin.look().await {
            Ok(lacks) => lacks,
            Err(refusal) => {
                checks.push(check(CheckKind::Room, Err(self.refused(&refusal))));
                // Who could have taken the name, or may yet.
                if matches!(refusal, Refusal::NoRoom | Refusal::Destroyed) {
                    checks.push(self.room_making().await);
                }
                return;
            }
        };
        let mend = "let the room's owner run: cicada federation create";
        if let Some(fault) = lacks.fault() {
            checks.push(check(
                CheckKind::Room,
                Err(Problem::new(ProblemKind::Refused, self.object(), fault).next(mend)),
            ));
            return;
        }
        checks.push(check(
            CheckKind::Room,
            Ok(format!("{} is there, for members only", self.config.xmpp.room)),
        ));
        for flaw in lacks.flaws() {
            let reason = format!("the room is {}", flaw.lacking());
            checks.push(Check::warning(
                CheckKind::Room,
                Problem::new(ProblemKind::Refused, self.object(), reason).next(mend),
            ));
        }
        self.enter(checks).await;
        if let Some(owners) = self.admin.owners().await.filter(|owners| !owners.is_empty()) {
            let owners: Vec<_> = owners.iter().map(|o| o.as_str()).collect();
            checks.push(check(CheckKind::RoomOwners, Ok(owners.join(", "))));
        }
        checks.push(self.room_making().await);
    }

    async fn enter(&self, checks: &mut Vec<Check>) {
        let own_nick = self.config.cloud.name.as_str();
        let nick = format!("check-{}", uuid::Uuid::new_v4().simple());
        let entered = self.admin.enter(&nick).await;
        let mut last = nick.as_str();
        match entered {
            // It went away since, or was never one to stay.
            Ok(Visit { made: true, .. }) => {
                checks.push(check(CheckKind::Membership, Err(self.refused(&Refusal::Made))))
            }
            Ok(visit) => {
                checks.push(check(
                    CheckKind::Membership,
                    Ok(format!("{} may enter the room", self.config.xmpp.jid)),
                ));
                let holders = visit.others.iter().filter(|o| o.nick == own_nick);
                let checked = match self.nick(&holders.collect::<Vec<_>>()) {
                    Some(checked) => checked,
                    // Nobody has it, so to take it for a moment disturbs nobody; it may be reserved for another.
                    None => match self.admin.enter(own_nick).await {
                        Ok(_) => {
                            last = own_nick;
                            check(
                                CheckKind::Nick,
                                Ok(format!("{own_nick} is free; no broker of this cloud is in the room")),
                            )
                        }
                        Err(refusal) => check(CheckKind::Nick, Err(self.refused(&refusal))),
                    },
                };
                checks.push(checked);
            }
            Err(refusal) => checks.push(check(CheckKind::Membership, Err(self.refused(&refusal)))),
        }
        self.admin.leave(last).await;
    }

    /// What it means that these have this cloud's nick; `None` if nobody has.
    fn nick(&self, holders: &[&Occupant]) -> Option<Check> {
        let me = self.config.xmpp.jid.as_str();
        let is_ours = |o: &&Occupant| o.jid.as_ref().is_some_and(|jid| jid.to_bare().as_str() == me);
        let name = &self.config.cloud.name;
        if let Some(other) = holders.iter().find(|o| !is_ours(o)) {
            let holder = other.jid.as_ref().map_or("somebody".to_owned(), |jid| jid.to_bare().to_string());
            let reason = format!("the nick is in use by {holder}");
            let problem = Problem::new(ProblemKind::Conflict, format!("nick {name}"), reason);
            return Some(check(
                CheckKind::Nick,
                Err(problem.next(Refusal::NickTaken.next_step(&self.config.xmpp.jid))),
            ));
        }
        let is_broker = |o: &&Occupant| {
            o.jid
                .as_ref()
                .and_then(|jid| jid.resource())
                .is_some_and(|resource| resource.as_str() == RESOURCE)
        };
        holders.first()?;
        if holders.iter().any(is_broker) && !self.broker_runs {
            let reason = format!(
                "a broker of {me} is in the room as {name}, and none runs by this configuration; two brokers of one \
                 account throw each other out. One that ended without a word stays in the room for a while"
            );
            let problem = Problem::new(ProblemKind::Conflict, format!("account {me}"), reason);
            return Some(Check::warning(
                CheckKind::Nick,
                problem.next("stop the other, or give this cloud an account of its own"),
            ));
        }
        Some(check(CheckKind::Nick, Ok(format!("{me} is in the room as {name} and was left alone"))))
    }

    async fn room_making(&self) -> Check {
        let making = self.admin.room_making().await;
        match room_making_problem(&making, self.admin.service(), self.server) {
            Some(problem) => Check::warning(CheckKind::MakingRooms, problem),
            None if making == RoomMaking::Restricted => check(
                CheckKind::MakingRooms,
                Ok(format!("{} may make none at {}", self.config.xmpp.jid, self.admin.service())),
            ),
            None => check(
                CheckKind::MakingRooms,
                Ok(format!("{} administers the server: what others may was not seen", self.config.xmpp.jid)),
            ),
        }
    }
}
