//! `cicada receipt verify` and `cicada migration receipt`: the doubly signed records of hand-overs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;

use crate::clock::UnixMillis;
use crate::config::{identity_path, load_identity};
use crate::durable;
use crate::federation::{Keyring, Revoked};
use crate::interface::problem::{Problem, ProblemKind, chain};
use crate::interface::{MoveRequest, Reply, Request};
use crate::migration::Lineage;
use crate::migration::evidence::{Evidence, FILE_BYTES_MAX, Kind};
use crate::migration::handover::{HandOver, HandOverError};
use crate::runner::Records;
use crate::types::{MapId, MemberJid, MigrationId, PublicKey, RecipeId, Successions, VmId};

use super::context::Context;
use super::printer::{Outcome, Printer, unexpected};
use super::table::card;

#[derive(Subcommand)]
pub enum Command {
    /// Check both signatures of a record (works without a broker, and without a configuration)
    ///
    /// Without keys, those trusted by the configuration are used, if there is one. A key that nobody here
    /// vouches for is said to be so: then the record only shows that whoever holds the keys it names signed it.
    Verify {
        /// The file, or - for standard input
        file: PathBuf,
        /// The source's public key, as 'cicada identity show' prints it there
        #[arg(long, value_name = "KEY")]
        source_key: Option<PublicKey>,
        /// The target's public key
        #[arg(long, value_name = "KEY")]
        target_key: Option<PublicKey>,
    },
}

/// Who vouches for a party's key.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Vouched {
    /// The command line.
    Given,
    /// The configuration, or an operator with 'cicada identity trust'.
    Trusted,
    /// As before, of a key that followed this one.
    TrustedSince,
    /// Nobody but the record itself.
    Nobody,
}

#[derive(Serialize)]
struct Party {
    #[serde(rename = "member")]
    jid: MemberJid,
    key: PublicKey,
    fingerprint: String,
    vouched: Vouched,
}

#[derive(Serialize)]
struct History {
    /// This record included.
    links: usize,
    /// Whether it begins where the VM was made.
    from_birth: bool,
}

/// What a good record says.
#[derive(Serialize)]
struct Verified {
    kind: Kind,
    #[serde(rename = "vm_id")]
    vm: VmId,
    migration: MigrationId,
    epoch: u64,
    source: Party,
    target: Party,
    recipe: RecipeId,
    root_delta: MapId,
    user_data: MapId,
    #[serde(with = "crate::clock::rfc3339")]
    issued: UnixMillis,
    /// The verified way of the VM up to this record; none if the file does not hold it.
    history: Option<History>,
    /// Signed by nobody.
    remarks: Vec<String>,
}

pub fn run(ctx: &Context, command: Command) -> Outcome {
    let Command::Verify { file, source_key, target_key } = command;
    let object = format!("receipt {}", file.display());
    let evidence = Evidence::parse(&read(&file, &object)?).map_err(|e| {
        Problem::new(ProblemKind::BadRequest, object.clone(), chain(&e))
            .next("give it a file that 'cicada migration receipt' wrote")
    })?;
    let h = evidence.verify().map_err(|e| {
        let kind = match e {
            HandOverError::Malformed(_) | HandOverError::NotHex => ProblemKind::BadRequest,
            HandOverError::Signature(_) | HandOverError::Mismatch(_) => ProblemKind::Damaged,
        };
        Problem::new(kind, object.clone(), chain(&e))
            .next("it proves nothing; ask either cloud for its own copy")
    })?;
    let history = evidence.verify_history().map_err(|e| {
        Problem::new(ProblemKind::Damaged, object.clone(), chain(&e)).next(
            "its record is signed, and the history in the file is none; ask a cloud on the way for its own",
        )
    })?;
    let trusted = trusted(ctx);
    let party = |what: &str, jid: &MemberJid, key: PublicKey, given: Option<PublicKey>| {
        let known = trusted.get(jid);
        let (expected, vouched) = match (given, known) {
            (Some(given), _) => (given, Vouched::Given),
            (None, Some(known)) => (known.key, Vouched::Trusted),
            (None, None) => (key, Vouched::Nobody),
        };
        // A record stays what it is when the key that signed it gives way to another.
        let earlier = known.is_some_and(|k| k.successions.leads(&key, &expected));
        let vouched = if expected != key && earlier { Vouched::TrustedSince } else { vouched };
        if expected != key && !earlier {
            let reason = format!(
                "the {what} {jid} signed it with the key {}, which is not {}: {}",
                key.fingerprint(),
                if vouched == Vouched::Given { "the one given" } else { "the one trusted here" },
                expected.fingerprint()
            );
            return Err(Problem::new(ProblemKind::Damaged, object.clone(), reason)
                .next("compare fingerprints with its operator; the key may have changed since"));
        }
        Ok(Party { jid: jid.clone(), key, fingerprint: key.fingerprint(), vouched })
    };
    let source = party("source", &h.source, h.source_key, source_key)?;
    let target = party("target", &h.target, h.target_key, target_key)?;
    print(&ctx.printer, verified(evidence, h, source, target, history.as_ref()))
}

fn verified(
    evidence: Evidence,
    h: HandOver,
    source: Party,
    target: Party,
    history: Option<&Lineage>,
) -> Verified {
    Verified {
        kind: evidence.kind,
        vm: h.vm,
        migration: h.migration,
        epoch: h.epoch,
        source,
        target,
        recipe: h.recipe,
        root_delta: h.root_delta,
        user_data: h.user_data,
        issued: h.issued,
        history: history
            .map(|known| History { links: known.links().len(), from_birth: known.is_from_birth() }),
        remarks: evidence.remarks,
    }
}

/// The whole input, if it is not longer than any record.
fn read(file: &Path, object: &str) -> Result<Vec<u8>, Problem> {
    let failed = |e: io::Error| Problem::from_path(object, &e);
    let mut bytes = Vec::new();
    let limit = FILE_BYTES_MAX as u64 + 1;
    if file == Path::new("-") {
        io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        File::open(file).and_then(|f| f.take(limit).read_to_end(&mut bytes)).map_err(failed)?;
    }
    Ok(bytes)
}

/// A key that is trusted here, and how it came to be its member's.
struct Known {
    key: PublicKey,
    successions: Successions,
}

/// The keys the operator of this machine trusts: its cloud's own, pinned ones, confirmed ones.
fn trusted(ctx: &Context) -> BTreeMap<MemberJid, Known> {
    let config = match ctx.config() {
        Ok(config) => config,
        Err(p) if p.kind == ProblemKind::Missing => return BTreeMap::new(),
        Err(p) => {
            ctx.printer.note(format!("the configuration is not used: {p}"));
            return BTreeMap::new();
        }
    };
    let kept = Records::trust_in(&config.cloud.data_dir).unwrap_or_else(|e| {
        ctx.printer.note(format!("confirmed keys are not used: {}", chain(&e)));
        BTreeMap::new()
    });
    let pinned: BTreeMap<_, _> = config.trust.pinned.iter().map(|p| (p.jid.clone(), p.key)).collect();
    let ring = Keyring::new(pinned.clone(), kept.clone(), Revoked::default(), false);
    let known = |jid: &MemberJid| {
        let successions = kept.get(jid).map(|k| k.successions.clone()).unwrap_or_default();
        Some((jid.clone(), Known { key: ring.trusted(jid)?, successions }))
    };
    let mut keys: BTreeMap<_, _> = kept.keys().chain(pinned.keys()).filter_map(known).collect();
    // Only looked at: a key that is not there is not made.
    if identity_path(&config.cloud.data_dir).exists() {
        match load_identity(&config.cloud.data_dir) {
            Ok(own) => {
                let known = Known { key: own.key.public(), successions: own.successions };
                keys.insert(config.xmpp.jid.clone(), known);
            }
            Err(e) => ctx.printer.note(format!("this cloud's own key is not used: {}", chain(&e))),
        }
    }
    keys
}

fn print(printer: &Printer, v: Verified) -> Outcome {
    if printer.json {
        return printer.json_value(&v);
    }
    let says = match v.kind {
        Kind::Receipt => "receipt: the source gave the VM up, and the target took it over",
        Kind::Return => {
            "return: the target never ran the VM under this epoch and never will; it is the source's"
        }
    };
    let party = |p: &Party| {
        let vouched = match p.vouched {
            Vouched::Given => printer.good("the key given"),
            Vouched::Trusted => printer.good("a key trusted here"),
            Vouched::TrustedSince => printer.good("an earlier key of one trusted here"),
            Vouched::Nobody => printer.bad("a key NOT KNOWN here, named by the record alone"),
        };
        format!("{}, key {} ({}), {vouched}", p.jid, p.key, p.fingerprint)
    };
    let history = match &v.history {
        Some(History { links, from_birth: true }) => {
            printer.good(&format!("unbroken from where the VM was made, {links} links"))
        }
        Some(History { links, .. }) => {
            format!("unbroken, {links} links; it begins with a record that names none before it")
        }
        None => "what came before this record is not in the file".into(),
    };
    card(
        printer,
        &[
            ("record", says.into()),
            ("signatures", printer.good("both good")),
            ("history", history),
            ("VM", v.vm.to_string()),
            ("epoch", v.epoch.to_string()),
            ("source", party(&v.source)),
            ("target", party(&v.target)),
            ("given on", format!("{} by the source's clock", v.issued)),
            ("migration", v.migration.to_string()),
            ("recipe", v.recipe.to_string()),
            ("root delta", v.root_delta.to_string()),
            ("user data", v.user_data.to_string()),
        ],
    )?;
    for remark in &v.remarks {
        printer.line(format!("{}  {remark}", printer.bold("remark, signed by nobody:")))?;
    }
    for p in [&v.source, &v.target].into_iter().filter(|p| p.vouched == Vouched::Nobody) {
        printer.note(format!(
            "WARNING: nothing here says that the key {} is really {}'s. Compare the fingerprint with its \
             operator, or give the key with --source-key and --target-key",
            p.fingerprint, p.jid
        ));
    }
    Ok(())
}

/// `cicada migration receipt`
pub async fn fetch(ctx: &Context, id: String, output: Option<PathBuf>) -> Outcome {
    let evidence = match ctx.ask(&Request::Move(MoveRequest::Receipt { id })).await? {
        Reply::Receipt(evidence) => evidence,
        other => return Err(unexpected(&other)),
    };
    let Some(output) = output else { return ctx.printer.json_value(&evidence) };
    let object = output.display().to_string();
    if output.exists() {
        return Err(Problem::new(ProblemKind::Conflict, object, "is there already")
            .next("name another file")
            .into());
    }
    let failed =
        |e: &(dyn std::error::Error + 'static)| Problem::from_error(ProblemKind::Failed, object.clone(), e);
    let mut json = serde_json::to_vec_pretty(&evidence).map_err(|e| failed(&e))?;
    json.push(b'\n');
    durable::write(&output, &json).map_err(|e| failed(&e))?;
    ctx.printer.note(format!("the {} is in {}", evidence.kind, output.display()));
    Ok(())
}
