//! `cicada identity`

use clap::Subcommand;
use serde::Serialize;

use crate::broker::interface::Request;
use crate::config::load_or_create_identity;
use crate::types::{MemberJid, PublicKey};

use super::context::{Context, config_problem};
use super::printer::Outcome;
use super::table::card;

#[derive(Subcommand)]
pub enum Command {
    /// Print this cloud's address and public key, which other operators trust (works without a
    /// broker; makes the key if there is none)
    Show,
    /// Trust a member's key. Compare its fingerprint over another channel first
    Trust {
        /// The member's address, name@domain
        member: MemberJid,
        /// The key as 'cicada identity show' prints it there
        key: PublicKey,
    },
    /// Trust a member's key no longer
    Revoke { member: MemberJid },
}

#[derive(Serialize)]
struct Identity {
    jid: MemberJid,
    key: PublicKey,
    fingerprint: String,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::Show => show(ctx),
        Command::Trust { member, key } => {
            ctx.ask(&Request::IdentityTrust { member: member.clone(), key }).await?;
            ctx.printer.note(format!("{member} is trusted with the key {}", key.fingerprint()));
            Ok(())
        }
        Command::Revoke { member } => {
            ctx.ask(&Request::IdentityRevoke { member: member.clone() }).await?;
            ctx.printer.note(format!("{member} is not trusted any more"));
            Ok(())
        }
    }
}

fn show(ctx: &Context) -> Outcome {
    let config = ctx.config()?;
    let key = load_or_create_identity(&config.cloud.data_dir).map_err(|e| config_problem(&e))?.public();
    let identity = Identity { jid: config.xmpp.jid, key, fingerprint: key.fingerprint() };
    if ctx.printer.json {
        return ctx.printer.json_value(&identity);
    }
    card(
        &ctx.printer,
        &[
            ("member", identity.jid.to_string()),
            ("key", identity.key.to_string()),
            ("fingerprint", identity.fingerprint),
        ],
    )
}
