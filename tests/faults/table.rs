//! The table of all cells: what came of each fault at each point, and how soon.

use std::fmt::{self, Write};
use std::path::Path;

/// What happens to the world while a broker waits at a point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    SourceBroker,
    TargetBroker,
    SourceQemu,
    TargetQemu,
    Server,
    SourceXmpp,
    TargetXmpp,
    Data,
    SourceFull,
    TargetFull,
    SourceReadOnly,
    TargetReadOnly,
}

impl Fault {
    pub const ALL: [Fault; 12] = [
        Fault::SourceBroker,
        Fault::TargetBroker,
        Fault::SourceQemu,
        Fault::TargetQemu,
        Fault::Server,
        Fault::SourceXmpp,
        Fault::TargetXmpp,
        Fault::Data,
        Fault::SourceFull,
        Fault::TargetFull,
        Fault::SourceReadOnly,
        Fault::TargetReadOnly,
    ];

    fn title(self) -> &'static str {
        match self {
            Fault::SourceBroker => "source broker killed",
            Fault::TargetBroker => "target broker killed",
            Fault::SourceQemu => "source QEMU killed",
            Fault::TargetQemu => "target QEMU killed",
            Fault::Server => "XMPP server killed",
            Fault::SourceXmpp => "source's XMPP link cut",
            Fault::TargetXmpp => "target's XMPP link cut",
            Fault::Data => "data link cut",
            Fault::SourceFull => "source's disk full",
            Fault::TargetFull => "target's disk full",
            Fault::SourceReadOnly => "source's disk read-only",
            Fault::TargetReadOnly => "target's disk read-only",
        }
    }

    /// Whether what it hits exists at a point.
    pub fn is_possible_at(self, point: &str) -> bool {
        match self {
            Fault::SourceQemu => at(point) < at("source-stopped"),
            Fault::TargetQemu => at(point) >= at("target-started"),
            _ if self.is_of_storage() => WRITING.contains(&point),
            _ => true,
        }
    }

    pub fn is_of_storage(self) -> bool {
        matches!(self, Fault::SourceFull | Fault::TargetFull | Fault::SourceReadOnly | Fault::TargetReadOnly)
    }

    /// Until the source gives the VM up, a move may be called off. From then on there is one way
    /// only: back if the target has forgotten what it staged and has not taken over, else on.
    pub fn may_end(self, point: &str, outcome: Outcome) -> bool {
        let forgets = self == Fault::TargetBroker && at(point) < at("target-taken-over");
        match at(point) {
            n if n < at("source-giving-up") => outcome != Outcome::Returned,
            _ if forgets => outcome == Outcome::Returned,
            // A take-over that cannot be recorded is given back.
            n if self.is_of_storage() && n < at("target-taken-over") => true,
            _ => outcome == Outcome::Moved,
        }
    }
}

/// Points of `cicada::fault`, in the order in which a move reaches them.
pub const POINTS: [&str; 20] = [
    "source-checked",
    "target-reserving",
    "source-reserved",
    "source-scanned",
    "target-staging",
    "target-composed",
    "target-staged",
    "source-staged",
    "source-stopped",
    "target-staged-last",
    "source-giving-up",
    "source-given-up",
    "target-taking-over",
    "target-taken-over",
    "target-starting",
    "target-started",
    "source-start-answered",
    "source-releasing",
    "source-released",
    "target-telling",
];

/// Where something is about to be written.
const WRITING: [&str; 8] = [
    "source-checked",
    "target-staging",
    "target-composed",
    "source-stopped",
    "source-giving-up",
    "target-taking-over",
    "target-starting",
    "source-releasing",
];

fn at(point: &str) -> usize {
    POINTS.iter().position(|p| *p == point).expect("a point of the table")
}

/// Who has the VM in the end, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The move went on and ended.
    Moved,
    /// It was called off, and the VM runs at its source.
    Abandoned,
    /// It was handed over and handed back.
    Returned,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Outcome::Moved => "moved",
            Outcome::Abandoned => "stays",
            Outcome::Returned => "returned",
        })
    }
}

#[derive(Clone, Debug)]
pub struct Recovery {
    pub outcome: Outcome,
    /// From the fault until the guest is ready and nothing moves.
    pub seconds: f64,
    /// Whether somebody had to say `vm start`.
    pub by_hand: bool,
}

pub struct Row {
    pub point: &'static str,
    pub fault: Fault,
    pub result: Result<Recovery, String>,
}

pub fn markdown(rows: &[Row]) -> String {
    let mut out = String::from("| point |");
    Fault::ALL.iter().for_each(|f| write!(out, " {} |", f.title()).unwrap());
    out += "\n|---|";
    Fault::ALL.iter().for_each(|_| out += "---|");
    out += "\n";
    for point in POINTS {
        write!(out, "| {point} |").unwrap();
        for fault in Fault::ALL {
            let row = rows.iter().find(|r| r.point == point && r.fault == fault);
            match row.map(|r| &r.result) {
                Some(Ok(r)) => {
                    let by_hand = if r.by_hand { ", by hand" } else { "" };
                    write!(out, " {}{by_hand}, {:.0} s |", r.outcome, r.seconds.max(1.0)).unwrap();
                }
                Some(Err(_)) => out += " FAILED |",
                None if fault.is_possible_at(point) => out += " not run |",
                None => out += " |",
            }
        }
        out += "\n";
    }
    out
}

/// Puts the table into the repository's copy, after the text that explains it.
pub fn keep(rows: &[Row]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/TABLE.md");
    let old = std::fs::read_to_string(&path).unwrap();
    let text = old.split("\n| point |").next().unwrap();
    std::fs::write(&path, format!("{}\n{}", text.trim_end_matches('\n').to_owned() + "\n", markdown(rows)))
        .unwrap();
}
