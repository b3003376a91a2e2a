//! `cicada federation`: the room and its list of members, with the account that owns the room.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::config::Config;
use crate::config::secrets::read_password;
use crate::daemon::xmpp_settings;
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::types::MemberJid;
use crate::xmpp::admin::{Admin, AdminError, Created, Owners};
use crate::xmpp::probe::RoomMaking;
use crate::xmpp::{Refusal, RequestError, Server};

use super::context::Context;
use super::printer::Outcome;
use super::table::Table;

/// For each step with the server, its connection included.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// For another server to show that it is there.
const DOMAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// All of them work without a broker, with the account that owns the room.
#[derive(Subcommand)]
pub enum Command {
    /// Make the room as a federation needs it, and this cloud a member (works without a broker)
    ///
    /// A room that is there is made what a federation needs. What the server did not take is told, and so is
    /// whether every account may make rooms there, which is tried with this cloud's account.
    Create {
        /// The room's title
        #[arg(long, default_value = "Cicada federation")]
        title: String,
        /// Another account that owns the room or is to; can be given several times. A room that is somebody
        /// else's as well is refused
        #[arg(long, value_name = "JID")]
        co_owner: Vec<MemberJid>,
        /// Take the room from all owners and administrators that are not named
        #[arg(long)]
        evict_owners: bool,
        #[command(flatten)]
        owner: Owner,
    },
    /// Add a cloud's account (works without a broker)
    Add {
        /// name@domain
        member: MemberJid,
        #[command(flatten)]
        owner: Owner,
    },
    /// Remove a cloud's account; it is thrown out of the room (works without a broker)
    Remove {
        member: MemberJid,
        #[command(flatten)]
        owner: Owner,
    },
    /// List the accounts that may be in the room (works without a broker)
    List {
        #[command(flatten)]
        owner: Owner,
    },
}

#[derive(Args)]
pub struct Owner {
    /// The account that owns the room; this cloud's own if not given
    #[arg(long, value_name = "JID", requires = "owner_password_file")]
    owner_jid: Option<MemberJid>,
    /// A file with its password, readable by its owner only
    #[arg(long, value_name = "FILE", requires = "owner_jid")]
    owner_password_file: Option<PathBuf>,
}

#[derive(Serialize)]
struct Affiliation {
    member: MemberJid,
    affiliation: String,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    let config = ctx.config()?;
    let (Command::Create { owner, .. }
    | Command::Add { owner, .. }
    | Command::Remove { owner, .. }
    | Command::List { owner }) = &command;
    let session = Session::open(&config, owner).await?;
    let result = session.run(ctx, &config, command).await;
    session.tell_claim(ctx);
    session.admin.close().await;
    result
}

struct Session {
    admin: Admin,
    room: String,
    owner: MemberJid,
}

impl Session {
    async fn open(config: &Config, owner: &Owner) -> Result<Self, Problem> {
        let (jid, password_file) = match (&owner.owner_jid, &owner.owner_password_file) {
            (Some(jid), Some(file)) => (jid, file),
            _ => (&config.xmpp.jid, &config.xmpp.password_file),
        };
        let password = read_password(password_file).map_err(|e| {
            let problem = Problem::from_config(&e);
            match problem.kind {
                // The command line names it, not the configuration.
                ProblemKind::Missing if owner.owner_password_file.is_some() => {
                    Problem { kind: ProblemKind::NotFound, ..problem }.next("check --owner-password-file")
                }
                _ => problem,
            }
        })?;
        let mut settings = xmpp_settings(config, password.expose().to_owned());
        settings.jid = jid.clone();
        let room = config.xmpp.room.clone();
        let admin = step(&room, jid, Admin::open(settings)).await?;
        Ok(Self { admin, room, owner: jid.clone() })
    }

    async fn run(&self, ctx: &Context, config: &Config, command: Command) -> Outcome {
        let done = |text: String| ctx.printer.note(text);
        match command {
            Command::Create { title, co_owner, evict_owners, .. } => {
                let owners = Owners { others: co_owner, evict: evict_owners };
                let created = self.step(self.admin.create_room(&title, &owners)).await?;
                let me = &config.xmpp.jid;
                if *me != self.owner {
                    self.step(self.admin.add_member(me)).await?;
                }
                let verb = if created.made { "is made" } else { "is ready" };
                done(format!("{} {verb}; {me} may be in it", self.room));
                let server = self.admin.server().await;
                for warning in shortcomings(&created, &server, self.admin.service()) {
                    ctx.printer.aloud().note(warning);
                }
                if let Some(warning) = self.room_making(config, &server).await {
                    ctx.printer.aloud().note(warning);
                }
            }
            Command::Add { member, .. } => {
                let reachable = self.admin.answers(domain_of(&member));
                let served = tokio::time::timeout(DOMAIN_TIMEOUT, reachable);
                let foreign = domain_of(&member) != domain_of(&config.xmpp.jid);
                let silent = match foreign {
                    true => served
                        .await
                        .map_or(Some("it does not answer".into()), |answer| answer.err().map(|e| chain(&e))),
                    false => None,
                };
                self.step(self.admin.add_member(&member)).await?;
                done(format!("{member} may be in {}", self.room));
                if let Some(reason) = silent {
                    ctx.printer.aloud().note(format!(
                        "warning: this account's server does not reach an XMPP server of {}: {reason}. If the name \
                         is right, the two servers must let each other in (s2s); until then {member} cannot enter",
                        domain_of(&member)
                    ));
                }
                match self.admin.look().await {
                    Ok(lacks) if !lacks.is_empty() => ctx.printer.aloud().note(format!(
                        "warning: {lacks}. 'cicada federation create' makes it what a federation needs"
                    )),
                    _ => {}
                }
            }
            Command::Remove { member, .. } => {
                self.step(self.admin.remove_member(&member)).await?;
                done(format!("{member} may no longer be in {}", self.room));
            }
            Command::List { .. } => {
                let members = self.step(self.admin.list_members()).await?;
                return print_list(ctx, members);
            }
        }
        Ok(())
    }

    /// Nobody is made an owner without a word, whatever came of the rest.
    fn tell_claim(&self, ctx: &Context) {
        if self.admin.has_claimed() {
            ctx.printer.aloud().note(format!(
                "{} administers the server, and was made an owner of {} for this",
                self.owner, self.room
            ));
        }
    }

    /// Whether every account may make rooms there: tried with this cloud's own, which is like any other.
    async fn room_making(&self, config: &Config, server: &Server) -> Option<String> {
        if config.xmpp.jid == self.owner {
            return room_making_told(&self.admin.room_making().await, &self.admin, server);
        }
        let unseen = |reason: String| {
            Some(format!(
                "warning: whether every account may make rooms at {} was not seen, since {} could not be asked: {reason}",
                self.admin.service(),
                config.xmpp.jid
            ))
        };
        let password = match config.xmpp.password() {
            Ok(password) => password,
            Err(e) => return unseen(e.to_string()),
        };
        let settings = xmpp_settings(config, password.expose().to_owned());
        let member = match step(&self.room, &config.xmpp.jid, Admin::open(settings)).await {
            Ok(member) => member,
            Err(problem) => return unseen(problem.reason),
        };
        let making = member.room_making().await;
        member.close().await;
        room_making_told(&making, &self.admin, server)
    }

    async fn step<T>(&self, work: impl Future<Output = Result<T, AdminError>>) -> Result<T, Problem> {
        match tokio::time::timeout(STEP_TIMEOUT, work).await {
            Ok(Err(e)) => {
                let advice =
                    match e.is_denied() || matches!(e, AdminError::MayNotMake(_) | AdminError::NotOwner(_)) {
                        true => Some(self.admin.server().await),
                        false => None,
                    };
                Err(admin_problem(&self.room, &self.owner, &e, advice.as_ref()))
            }
            Ok(done) => done.map_err(|e| admin_problem(&self.room, &self.owner, &e, None)),
            Err(_) => Err(silent_server(&self.room, &self.owner)),
        }
    }
}

/// What a room that was made lacks, each with what helps.
fn shortcomings(created: &Created, server: &Server, service: &str) -> Vec<String> {
    let mut told = Vec::new();
    if created.began_open {
        told.push(format!(
            "warning: until it was configured, a moment ago, the room was open to every account; {}",
            server.begin_closed(service)
        ));
    }
    for flaw in &created.flaws {
        told.push(format!("warning: the room stays {}: {server} did not take what was set", flaw.lacking()));
    }
    if !created.not_taken.is_empty() {
        told.push(format!(
            "warning: {server} did not take these options of the room: {}",
            created.not_taken.join(", ")
        ));
    }
    told
}

fn room_making_told(making: &RoomMaking, admin: &Admin, server: &Server) -> Option<String> {
    let problem = room_making_problem(making, admin.service(), server)?;
    Some(format!("warning: {problem}; {}", problem.next_step))
}

/// What is wrong with who may make rooms; `None` if nothing is, or can be seen.
pub fn room_making_problem(making: &RoomMaking, service: &str, server: &Server) -> Option<Problem> {
    let reason = match making {
        RoomMaking::Restricted | RoomMaking::Administrator => return None,
        RoomMaking::Anybody => {
            "every account may make rooms there: a stranger could take the name of a federation's first"
                .to_owned()
        }
        RoomMaking::ThisAccount => {
            "this account may make rooms there: unless it was chosen to, every account may, \
             and a stranger could take the name of a federation's first"
                .to_owned()
        }
        RoomMaking::Unclear(refusal) => format!("who may make rooms there was not seen: {refusal}"),
    };
    let object = format!("service {service} ({server})");
    Some(Problem::new(ProblemKind::Refused, object, reason).next(server.restrict_room_making(service)))
}

fn domain_of(jid: &MemberJid) -> &str {
    jid.as_str().rsplit('@').next().unwrap_or_default()
}

fn print_list(ctx: &Context, members: Vec<(MemberJid, String)>) -> Outcome {
    if ctx.printer.json {
        let list = members.into_iter().map(|(member, affiliation)| Affiliation { member, affiliation });
        return ctx.printer.json_value(&list.collect::<Vec<_>>());
    }
    let mut table = Table::new(["MEMBER", "AFFILIATION"]);
    members.into_iter().for_each(|(member, affiliation)| table.row([member.to_string(), affiliation]));
    table.print(&ctx.printer)
}

async fn step<T>(
    room: &str,
    owner: &MemberJid,
    work: impl Future<Output = Result<T, AdminError>>,
) -> Result<T, Problem> {
    match tokio::time::timeout(STEP_TIMEOUT, work).await {
        Ok(result) => result.map_err(|e| admin_problem(room, owner, &e, None)),
        Err(_) => Err(silent_server(room, owner)),
    }
}

fn silent_server(room: &str, owner: &MemberJid) -> Problem {
    let reason = format!("the XMPP server did not answer {owner} within {} s", STEP_TIMEOUT.as_secs());
    Problem::new(ProblemKind::Unavailable, format!("room {room}"), reason)
        .next("check [xmpp] server, security and ca_file, and the account's password")
}

/// The class of what a room, or its service, answers.
pub fn kind_of(refusal: &Refusal) -> ProblemKind {
    match refusal {
        Refusal::NotMember | Refusal::Banned | Refusal::MayNotMake | Refusal::Password => {
            ProblemKind::Forbidden
        }
        Refusal::NoRoom | Refusal::Destroyed | Refusal::Made => ProblemKind::NotFound,
        Refusal::NickTaken => ProblemKind::Conflict,
        Refusal::Full | Refusal::Other(_) => ProblemKind::Refused,
        Refusal::Unreachable | Refusal::NoService(_) | Refusal::Silent => ProblemKind::Unavailable,
    }
}

fn admin_problem(room: &str, owner: &MemberJid, e: &AdminError, server: Option<&Server>) -> Problem {
    let unknown = Server::unknown();
    let server = server.unwrap_or(&unknown);
    let (kind, next) = match e {
        AdminError::Connect(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            (ProblemKind::Forbidden, format!("check the password of {owner}, and the section [xmpp]"))
        }
        AdminError::Connect(_) => (
            ProblemKind::Unavailable,
            "check [xmpp] server, security and ca_file, and the account's password".to_owned(),
        ),
        AdminError::Room(_) => (ProblemKind::BadRequest, "correct [xmpp] room".to_owned()),
        AdminError::Refused(refusal) => (kind_of(refusal), refusal.next_step(owner)),
        AdminError::MayNotMake(_) => (ProblemKind::Forbidden, server.who_makes_rooms().to_owned()),
        AdminError::NotOwner(_) => (ProblemKind::Forbidden, server.become_owner(room, owner.as_str())),
        AdminError::OtherOwners(_) => (
            ProblemKind::Refused,
            "if they are meant to own it, name them with --co-owner; if not, who took the name first may be among \
             its members too: take the room with --evict-owners, and look at 'cicada federation list'"
                .to_owned(),
        ),
        AdminError::NotTaken(_) => {
            (ProblemKind::Refused, "use a room service that allows it; deploy/xmpp has samples".to_owned())
        }
        AdminError::Request { source: RequestError::Refused { condition, .. }, .. }
            if condition == "item-not-found" =>
        {
            (ProblemKind::NotFound, "make the room with: cicada federation create".to_owned())
        }
        AdminError::Request { .. } if e.is_denied() => {
            (ProblemKind::Forbidden, server.become_owner(room, owner.as_str()))
        }
        AdminError::Request { source: RequestError::Refused { .. }, .. } => {
            (ProblemKind::Refused, "see the XMPP server's log".to_owned())
        }
        AdminError::Request { .. } => {
            (ProblemKind::Unavailable, "try again when the server answers".to_owned())
        }
    };
    Problem::from_error(kind, format!("room {room}"), e).next(next)
}
