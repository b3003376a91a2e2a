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
use crate::xmpp::RequestError;
use crate::xmpp::admin::{Admin, AdminError};

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
    Create {
        /// The room's title
        #[arg(long, default_value = "Cicada federation")]
        title: String,
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
            Command::Create { title, .. } => {
                self.step(self.admin.create_room(&title)).await?;
                let me = &config.xmpp.jid;
                if *me != self.owner {
                    self.step(self.admin.add_member(me)).await?;
                }
                done(format!("{} is ready; {me} may be in it", self.room));
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
            }
            Command::Remove { member, .. } => {
                self.step(self.admin.remove_member(&member)).await?;
                done(format!("{member} may no longer be in {}", self.room));
            }
            Command::List { .. } => return print_list(ctx, self.step(self.admin.list_members()).await?),
        }
        Ok(())
    }

    async fn step<T>(&self, work: impl Future<Output = Result<T, AdminError>>) -> Result<T, Problem> {
        step(&self.room, &self.owner, work).await
    }
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
    let object = format!("room {room}");
    match tokio::time::timeout(STEP_TIMEOUT, work).await {
        Ok(result) => result.map_err(|e| admin_problem(object, owner, &e)),
        Err(_) => {
            let reason =
                format!("the XMPP server did not answer {owner} within {} s", STEP_TIMEOUT.as_secs());
            Err(Problem::new(ProblemKind::Unavailable, object, reason)
                .next("check [xmpp] server, security and ca_file, and the account's password"))
        }
    }
}

fn admin_problem(object: String, owner: &MemberJid, e: &AdminError) -> Problem {
    let (kind, next) = match e {
        AdminError::Connect(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            (ProblemKind::Forbidden, format!("check the password of {owner}, and the section [xmpp]"))
        }
        AdminError::Connect(_) => (
            ProblemKind::Unavailable,
            "check [xmpp] server, security and ca_file, and the account's password".to_owned(),
        ),
        AdminError::Room(_) => (ProblemKind::BadRequest, "correct [xmpp] room".to_owned()),
        AdminError::NotTaken(_) => {
            (ProblemKind::Refused, "use a room service that allows it; deploy/ has a sample".to_owned())
        }
        AdminError::Request { source: RequestError::Refused { condition, .. }, .. }
            if condition == "item-not-found" =>
        {
            (ProblemKind::NotFound, "make the room with: cicada federation create".to_owned())
        }
        AdminError::Request { source: RequestError::Refused { .. }, .. } => (
            ProblemKind::Forbidden,
            format!(
                "{owner} may not do this: name the room's owner with --owner-jid and --owner-password-file"
            ),
        ),
        AdminError::Request { .. } => {
            (ProblemKind::Unavailable, "try again when the server answers".to_owned())
        }
    };
    Problem::from_error(kind, object, e).next(next)
}
