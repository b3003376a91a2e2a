//! `cicada identity`

use clap::Subcommand;
use serde::Serialize;

use crate::broker::interface::{Predecessor, Request};
use crate::broker::problem::{Problem, ProblemKind};
use crate::broker::records::Records;
use crate::broker::rotation;
use crate::clock::{Clock, SystemClock, UnixMillis};
use crate::config::{self, identity_path, load_identity, rotate_identity};
use crate::types::{MemberJid, PublicKey};

use super::context::Context;
use super::printer::Outcome;
use super::table::card;
use super::target::Target;

#[derive(Subcommand)]
pub enum Command {
    /// Print this cloud's address and public key, which other operators trust, and the keys it followed
    /// (works without a broker; makes the key if there is none)
    Show,
    /// Give this cloud a new key that the old one vouches for (while its broker is stopped; VMs run on)
    ///
    /// Members that trust the old key follow to the new one when they see this cloud in the room again. The
    /// old secret key is overwritten. Refused while a move, or a hand-over in doubt, is open.
    Rotate,
    /// Trust a member's key. Compare its fingerprint over another channel first
    Trust {
        /// The member's address, name@domain
        member: MemberJid,
        /// The key as 'cicada identity show' prints it there
        key: PublicKey,
    },
    /// Trust a member's key no longer, nor those that followed it or that it followed
    Revoke { member: MemberJid },
}

#[derive(Serialize)]
struct Identity {
    jid: MemberJid,
    key: PublicKey,
    fingerprint: String,
    since: UnixMillis,
    /// The keys before it, the newest last.
    predecessors: Vec<Predecessor>,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::Show => show(ctx),
        Command::Rotate => rotate(ctx).await,
        Command::Trust { member, key } => {
            ctx.ask(&Request::IdentityTrust { member: member.clone(), key }).await?;
            ctx.printer.note(format!("{member} is trusted with the key {}", key.fingerprint()));
            Ok(())
        }
        Command::Revoke { member } => {
            ctx.ask(&Request::IdentityRevoke { member: member.clone() }).await?;
            ctx.printer
                .note(format!("{member} is not trusted any more, by none of the keys known to be its"));
            Ok(())
        }
    }
}

fn show(ctx: &Context) -> Outcome {
    let config = ctx.config()?;
    let own = load_identity(&config.cloud.data_dir).map_err(|e| Problem::from_config(&e))?;
    print(ctx, config.xmpp.jid, &own)
}

fn print(ctx: &Context, jid: MemberJid, own: &config::Identity) -> Outcome {
    let key = own.key.public();
    let predecessors: Vec<_> = own.successions.iter().map(Predecessor::of).collect();
    let identity = Identity { jid, key, fingerprint: key.fingerprint(), since: own.since, predecessors };
    if ctx.printer.json {
        return ctx.printer.json_value(&identity);
    }
    let earlier = |p: &Predecessor| format!("{} until {}", p.fingerprint, p.until);
    let earlier = identity.predecessors.iter().map(earlier).collect::<Vec<_>>().join(", ");
    let mut lines = vec![
        ("member", identity.jid.to_string()),
        ("key", identity.key.to_string()),
        ("fingerprint", identity.fingerprint),
        ("since", identity.since.to_string()),
    ];
    if !earlier.is_empty() {
        lines.push(("before it", earlier));
    }
    card(&ctx.printer, &lines)
}

async fn rotate(ctx: &Context) -> Outcome {
    let config = ctx.config()?;
    let conflict = |reason: &str| Problem::new(ProblemKind::Conflict, "identity", reason);
    match ctx.client().await {
        Ok(_) => {
            return Err(conflict("the broker runs, and signs with the key")
                .next("stop it (VMs run on), rotate, and start it again")
                .into());
        }
        Err(p) if p.kind == ProblemKind::Unavailable => {}
        Err(p) => return Err(p.into()),
    }
    if !identity_path(&config.cloud.data_dir).exists() {
        return Err(conflict("there is no key yet").next("see 'cicada identity show'").into());
    }
    // While it is open no broker can start.
    let lock = Target::offline(&config)?;
    let failed = |e: &(dyn std::error::Error + 'static)| Problem::from_error(ProblemKind::Failed, "records", e);
    let records = Records::open(&config.cloud.data_dir).map_err(|e| failed(&e))?;
    rotation::open_business(&records)?;
    let succession =
        rotate_identity(&config.cloud.data_dir, SystemClock.now()).map_err(|e| Problem::from_config(&e))?;
    drop(lock);
    let own = load_identity(&config.cloud.data_dir).map_err(|e| Problem::from_config(&e))?;
    print(ctx, config.xmpp.jid, &own)?;
    ctx.printer.note(format!(
        "{} gave way to {}. Start the broker: members that trust the one follow to the other when they see it. \
         Who has the key in a configuration file should write the new one there",
        succession.old.fingerprint(),
        succession.new.fingerprint()
    ));
    Ok(())
}
