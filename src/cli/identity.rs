//! `cicada identity`

use std::str::FromStr;

use clap::Subcommand;
use serde::Serialize;

use crate::broker::rotation;
use crate::clock::{Clock, SystemClock, UnixMillis};
use crate::config::{self, identity_path, load_identity, rotate_identity};
use crate::interface::problem::{Problem, ProblemKind};
use crate::interface::{CloudRequest, MemberView, Predecessor, Reply, Request};
use crate::runner::{RecordBook, Records};
use crate::types::{MemberJid, PublicKey};

use super::context::Context;
use super::members;
use super::printer::{Outcome, Printer, unexpected};
use super::table::{Table, card};
use super::target::Target;
use super::whose;

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
        /// The member's address, name@domain, or the name of its cloud
        member: String,
        /// The key, or its fingerprint, as 'cicada identity show' prints it there; a fingerprint is enough for a
        /// member that shows that key in the room
        key: KeyWord,
    },
    /// Trust a member's key no longer, nor those that followed it or that it followed
    Revoke {
        /// The member's address, name@domain, or the name of its cloud
        member: String,
    },
    /// List the keys of members: those shown in the room, and whether they are trusted
    List,
}

/// A key, or the short form of one.
#[derive(Clone, Debug)]
pub enum KeyWord {
    Key(PublicKey),
    Fingerprint(String),
}

impl FromStr for KeyWord {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(key) = text.parse() {
            return Ok(KeyWord::Key(key));
        }
        let group = |g: &str| g.len() == 4 && g.bytes().all(|b| b.is_ascii_hexdigit());
        match text.split('-').count() == FINGERPRINT_GROUPS && text.split('-').all(group) {
            true => Ok(KeyWord::Fingerprint(text.to_ascii_lowercase())),
            false => Err("neither a public key (base64 of 32 bytes) nor a fingerprint such as \
                          0123-4567-89ab-cdef-0123"
                .into()),
        }
    }
}

const FINGERPRINT_GROUPS: usize = 5;

#[derive(Serialize)]
struct Identity {
    #[serde(rename = "member")]
    jid: MemberJid,
    key: PublicKey,
    fingerprint: String,
    #[serde(with = "crate::clock::rfc3339")]
    since: UnixMillis,
    /// The keys before it, the newest last.
    predecessors: Vec<Predecessor>,
}

pub async fn run(ctx: &Context, command: Command) -> Outcome {
    match command {
        Command::Show => show(ctx),
        Command::Rotate => rotate(ctx).await,
        Command::List => {
            let offline = members::offline_unless_json(ctx).await?;
            ctx.read(&Request::Cloud(CloudRequest::Members), |printer, reply| {
                print_keys(printer, reply, offline.as_deref())
            })
            .await
        }
        Command::Trust { member, key } => {
            let (member, key) = named(ctx, &member, &key).await?;
            ctx.ask(&Request::Cloud(CloudRequest::IdentityTrust { member: member.clone(), key })).await?;
            ctx.printer.note(format!("{member} is trusted with the key {}", key.fingerprint()));
            Ok(())
        }
        Command::Revoke { member } => {
            let member = find(&members(ctx).await?, &member)?;
            ctx.ask(&Request::Cloud(CloudRequest::IdentityRevoke { member: member.clone() })).await?;
            ctx.printer
                .note(format!("{member} is not trusted any more, by none of the keys known to be its"));
            Ok(())
        }
    }
}

async fn members(ctx: &Context) -> Outcome<Vec<MemberView>> {
    match ctx.ask(&Request::Cloud(CloudRequest::Members)).await? {
        Reply::Members(members) => Ok(members),
        other => Err(unexpected(&other)),
    }
}

/// A member by its address, seen or not, or by the name of its cloud.
fn find(members: &[MemberView], text: &str) -> Result<MemberJid, Problem> {
    let named = |m: &&MemberView| m.cloud.as_ref().is_some_and(|cloud| cloud.as_str() == text);
    if let Ok(jid) = text.parse() {
        return Ok(jid);
    }
    let mut found = members.iter().filter(named);
    match (found.next(), found.next()) {
        (Some(m), None) => Ok(m.jid.clone()),
        (Some(_), Some(_)) => Err(Problem::new(
            ProblemKind::BadRequest,
            format!("member {text}"),
            "is the name of several clouds",
        )
        .next("write the member's address: see 'cicada identity list'")),
        (None, _) => Err(Problem::new(
            ProblemKind::NotFound,
            format!("member {text}"),
            "is no address, and no cloud of that name was seen in the room",
        )
        .next("write name@domain, or see 'cicada identity list'")),
    }
}

/// The member and the whole key that are meant.
async fn named(ctx: &Context, member: &str, key: &KeyWord) -> Outcome<(MemberJid, PublicKey)> {
    let members = match (member.parse::<MemberJid>(), key) {
        // Nobody needs to be seen for it.
        (Ok(jid), KeyWord::Key(key)) => return Ok((jid, *key)),
        _ => members(ctx).await?,
    };
    let jid = find(&members, member)?;
    let fingerprint = match key {
        KeyWord::Key(key) => return Ok((jid, *key)),
        KeyWord::Fingerprint(fingerprint) => fingerprint,
    };
    let shown = members.iter().find(|m| m.jid == jid).and_then(|m| m.key);
    match shown {
        Some(key) if key.fingerprint() == *fingerprint => Ok((jid, key)),
        Some(key) => {
            let reason = format!("shows the key {}, not {fingerprint}", key.fingerprint());
            Err(Problem::new(ProblemKind::Forbidden, format!("member {jid}"), reason)
                .next("ask its operator over another channel which key is right; do not trust this one")
                .into())
        }
        None => {
            Err(Problem::new(ProblemKind::NotFound, format!("member {jid}"), "has shown no key in the room")
                .next("write the whole key, as 'cicada identity show' prints it there")
                .into())
        }
    }
}

fn print_keys(printer: &Printer, reply: Reply, offline: Option<&str>) -> Outcome {
    let Reply::Members(members) = reply else { return Err(unexpected(&reply)) };
    let mut table = Table::new(["CLOUD", "MEMBER", "TRUST", "FINGERPRINT", "KEY"]);
    for m in &members {
        table.row([
            m.cloud.as_ref().map_or("-".into(), ToString::to_string),
            m.jid.to_string(),
            m.trust.to_string(),
            m.fingerprint.clone(),
            m.key.map(|key| key.to_string()).unwrap_or_default(),
        ]);
    }
    if table.is_empty() {
        printer.note("no other member has been seen");
    }
    members::note_link(printer, offline);
    table.print(printer)
}

fn show(ctx: &Context) -> Outcome {
    let config = ctx.config()?;
    whose::not_as_root(&config)?;
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
    whose::not_as_root(&config)?;
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
    let failed =
        |e: &(dyn std::error::Error + 'static)| Problem::from_error(ProblemKind::Failed, "records", e);
    let records = Records::open(&config.cloud.data_dir).map_err(|e| failed(&e))?;
    rotation::open_business(&RecordBook::at_rest(records))?;
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
