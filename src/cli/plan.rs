//! `cicada plan`

use clap::Args;

use crate::interface::{Candidate, MoveRequest, PlanView, Reason, Reply, Request, Verdict};
use crate::types::MemberJid;

use super::context::Context;
use super::format::{bytes, seconds};
use super::printer::{Outcome, Printer, unexpected};
use super::table::Table;

/// Members that were not asked for one reason are summed up beyond so many.
const NOT_ASKED_SHOWN: usize = 3;

#[derive(Args)]
pub struct Plan {
    /// The VM's name or UUID
    vm: String,
    /// Ask only this member: a cloud's name or an address
    #[arg(long, value_name = "CLOUD")]
    to: Option<String>,
    /// Ask every member that may be able to take it; else of many only the 8 that seem fittest are asked
    #[arg(long, conflicts_with = "to")]
    all: bool,
}

pub async fn run(ctx: &Context, args: Plan) -> Outcome {
    ctx.read(&Request::Move(MoveRequest::Plan { vm: args.vm, to: args.to, all: args.all }), print_reply).await
}

pub fn print_reply(printer: &Printer, reply: Reply) -> Outcome {
    match reply {
        Reply::Plan(plan) => print_plan(printer, &plan),
        other => Err(unexpected(&other)),
    }
}

fn print_plan(printer: &Printer, plan: &PlanView) -> Outcome {
    let mut table = Table::new([
        "CLOUD",
        "ANSWER",
        ">HELD",
        ">COMPONENTS",
        ">ROOT DELTA",
        ">USER DATA",
        ">TIME",
        ">ANSWERED IN",
    ]);
    let summed = summed_up(plan);
    for c in plan.candidates.iter().filter(|c| !summed.iter().any(|(_, all)| all.contains(&&c.jid))) {
        table.row([
            name(c),
            word(&c.verdict).into(),
            format!("{}/{}", c.components_held, c.components_needed),
            component_bytes(c),
            bytes(c.root_delta_bytes_missing),
            bytes(c.user_data_bytes_missing),
            duration(c),
            format!("{:.0} ms", c.answer_ms),
        ]);
    }
    table.print(printer)?;
    if table.is_empty() && summed.is_empty() {
        printer.note(format!("no other member is there to take {}", plan.vm));
    }
    plan.notes.iter().try_for_each(|note| printer.line(note))?;
    for c in &plan.candidates {
        about(c).iter().try_for_each(|line| printer.line(format!("{}: {line}", name(c))))?;
        for r in reasons(&c.verdict) {
            if !summed.iter().any(|(why, all)| *why == r && all.contains(&&c.jid)) {
                printer.line(format!("{}: {}", name(c), reason_text(r)))?;
            }
        }
    }
    for (why, all) in summed {
        printer.line(format!("{} more members were not asked: {}", all.len(), reason_text(why)))?;
    }
    Ok(())
}

/// Members that were not asked for the same reason, where they are many: in a large federation they would hide
/// the others.
fn summed_up(plan: &PlanView) -> Vec<(&Reason, Vec<&MemberJid>)> {
    let mut all: Vec<(&Reason, Vec<&MemberJid>)> = Vec::new();
    for c in &plan.candidates {
        let Verdict::NotAsked { reasons } = &c.verdict else { continue };
        let [reason] = reasons.as_slice() else { continue };
        match all.iter_mut().find(|(why, _)| *why == reason) {
            Some((_, members)) => members.push(&c.jid),
            None => all.push((reason, vec![&c.jid])),
        }
    }
    all.retain(|(_, members)| members.len() > NOT_ASKED_SHOWN);
    all
}

/// The plan in a line, where to, what travels, how long, and a line for each difference.
pub fn lines(plan: &PlanView, c: &Candidate) -> Vec<String> {
    let missing = match c.component_bytes_missing {
        0 => "all components are there".into(),
        n => {
            let (about, less) = match c.deltas_unknown {
                true => ("about ", ", less by differences that are still to be made"),
                false => ("", ""),
            };
            let (held, needed) = (c.components_held, c.components_needed);
            format!("{held} of {needed} components are there, {about}{} are missing{less}", bytes(n))
        }
    };
    let time = duration(c);
    let time = if time == "?" { String::new() } else { format!("; {time}") };
    let line = format!(
        "plan: {} to {}: {missing}, {} of root delta and {} of user data{time}",
        plan.vm,
        name(c),
        bytes(c.root_delta_bytes_missing),
        bytes(c.user_data_bytes_missing),
    );
    let differences = reasons(&c.verdict).iter().map(|r| format!("  with a difference: {}", reason_text(r)));
    let notes = plan.notes.iter().chain(&about(c)).map(|note| format!("  note: {note}")).collect::<Vec<_>>();
    [line].into_iter().chain(differences).chain(notes).collect()
}

/// What else is to be known of a candidate.
fn about(c: &Candidate) -> Vec<String> {
    let kept = (c.kept_s > 0).then(|| {
        format!(
            "has kept what an earlier try brought, which counts as there; for {} more",
            seconds(c.kept_s as f64)
        )
    });
    let held = (c.forecasts_told > 0 && c.seconds_low.is_some()).then(|| {
        format!("{} of the last {} moves there took the time foretold", c.forecasts_held, c.forecasts_told)
    });
    kept.into_iter().chain(held).collect()
}

fn component_bytes(c: &Candidate) -> String {
    // No bound: a difference that is ready now may be gone by then.
    let about = if c.deltas_unknown { "~ " } else { "" };
    format!("{about}{}", bytes(c.component_bytes_missing))
}

fn name(c: &Candidate) -> String {
    c.cloud.as_ref().map_or_else(|| c.jid.to_string(), ToString::to_string)
}

fn word(v: &Verdict) -> &'static str {
    match v {
        Verdict::Yes => "yes",
        Verdict::WithDifferences { .. } => "yes, with differences",
        Verdict::No { .. } => "no",
        Verdict::NotAsked { .. } => "not asked",
    }
}

fn reasons(v: &Verdict) -> &[Reason] {
    match v {
        Verdict::Yes => &[],
        Verdict::WithDifferences { differences } => differences,
        Verdict::No { reasons } | Verdict::NotAsked { reasons } => reasons,
    }
}

fn reason_text(r: &Reason) -> String {
    match &*r.next_step {
        "" => format!("{} [{}]", r.text, r.code),
        next => format!("{} [{}]; {next}", r.text, r.code),
    }
}

fn duration(c: &Candidate) -> String {
    match (c.seconds_low, c.seconds_high) {
        (Some(low), Some(high)) => format!("{} to {}", seconds(low), seconds(high)),
        _ => "?".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate() -> Candidate {
        serde_json::from_value(serde_json::json!({
            "cloud": "boreal", "jid": "boreal@x", "verdict": { "verdict": "yes" },
            "component_bytes_missing": 98_304, "components_needed": 4, "components_held": 3, "packs_missing": 1,
            "root_delta_bytes_missing": 0, "user_data_bytes_missing": 8 << 20, "seconds_low": 59.6,
            "seconds_high": 179.6, "answer_ms": 1.0
        }))
        .unwrap()
    }

    fn plan(candidate: Candidate) -> PlanView {
        PlanView {
            vm: "web".parse().unwrap(),
            candidates: vec![candidate],
            notes: vec!["the guest runs".into()],
        }
    }

    #[test]
    fn a_plan_says_no_bound_that_is_none() {
        let c = Candidate { deltas_unknown: true, ..candidate() };
        assert_eq!(component_bytes(&c), "~ 96 KiB");
        assert_eq!(
            lines(&plan(c.clone()), &c),
            [
                "plan: web to boreal: 3 of 4 components are there, about 96 KiB are missing, less by differences \
                 that are still to be made, 0 B of root delta and 8 MiB of user data; 60 s to 3 min 0 s",
                "  note: the guest runs",
            ]
        );
        assert_eq!(component_bytes(&candidate()), "96 KiB");
    }

    #[test]
    fn a_plan_says_what_is_kept_and_how_often_forecasts_held() {
        let c = Candidate { kept_s: 95, forecasts_held: 18, forecasts_told: 20, ..candidate() };
        assert_eq!(
            about(&c),
            [
                "has kept what an earlier try brought, which counts as there; for 95 s more",
                "18 of the last 20 moves there took the time foretold",
            ]
        );
        // Nothing is foretold: how often that held says nothing of it.
        let untold = Candidate { seconds_low: None, seconds_high: None, kept_s: 0, ..c };
        assert_eq!((about(&untold), duration(&untold)), (Vec::new(), "?".to_owned()));
    }
}
