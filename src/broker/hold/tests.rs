//! The table, cell by cell: every verb, owner and hold, with and without a guest that is up.

use super::*;
use crate::clock::UnixMillis;
use crate::types::{ByteSize, MigrationId, RecipeId};
use crate::vm::{Firmware, VmSpec};

/// `.` may be. A letter says why not: `h` something holds it, `c` contested, `q` not all were asked, `u` it is up,
/// `o` it is off, `y` it is here, `d` in doubt, `g` given up, `a` set aside, `r` being removed, `n` there is none.
/// Two of them: while it is off, and while it is up.
const TABLE: &str = "\
start               free    queued  starting  stopping exporting  resizing    moving    coming
  here                 .         .         h         h         h         h         h         h
  unconfirmed          q         q         h         h         h         h         h         h
  contested            c         c         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

start by word       free    queued  starting  stopping exporting  resizing    moving    coming
  here                 .         .         h         h         h         h         h         h
  unconfirmed          .         .         h         h         h         h         h         h
  contested            c         c         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

start itself        free    queued  starting  stopping exporting  resizing    moving    coming
  here                 .         .         h         h         h         h         h         h
  unconfirmed          q         q         h         h         h         h         h         h
  contested            c         c         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

stop                free    queued  starting  stopping exporting  resizing    moving    coming
  here                 .         .         .         h         h         h         h         h
  unconfirmed          .         .         .         h         h         h         h         h
  contested            .         .         .         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

reboot              free    queued  starting  stopping exporting  resizing    moving    coming
  here               o/.       o/.         h         h         h         h         h         h
  unconfirmed          q         q         h         h         h         h         h         h
  contested            c         c         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

set                 free    queued  starting  stopping exporting  resizing    moving    coming
  here                 .         .         h         h         h         h         h         h
  unconfirmed          .         .         h         h         h         h         h         h
  contested            .         .         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

export              free    queued  starting  stopping exporting  resizing    moving    coming
  here               ./u       ./u         h         h         h         h         h         h
  unconfirmed        ./u       ./u         h         h         h         h         h         h
  contested          ./u       ./u         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

resize              free    queued  starting  stopping exporting  resizing    moving    coming
  here               ./u       ./u         h         h         h         h         h         h
  unconfirmed        ./u       ./u         h         h         h         h         h         h
  contested          ./u       ./u         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

delete              free    queued  starting  stopping exporting  resizing    moving    coming
  here               ./u       ./u         h         h         h         h         h         h
  unconfirmed        ./u       ./u         h         h         h         h         h         h
  contested          ./u       ./u         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             .         .         h         h         h         h         h         h
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

scrub               free    queued  starting  stopping exporting  resizing    moving    coming
  here                 y         y         y         y         y         y         y         y
  unconfirmed          y         y         y         y         y         y         y         y
  contested            y         y         y         y         y         y         y         y
  in-doubt             d         d         d         d         d         d         d         d
  given-up             .         .         h         h         h         h         h         h
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

move                free    queued  starting  stopping exporting  resizing    moving    coming
  here                 .         .         h         h         h         h         h         h
  unconfirmed          q         q         h         h         h         h         h         h
  contested            c         c         h         h         h         h         h         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

give up             free    queued  starting  stopping exporting  resizing    moving    coming
  here                 h         h         h         h         h         h       ./u         h
  unconfirmed          h         h         h         h         h         h       ./u         h
  contested            h         h         h         h         h         h         c         h
  in-doubt             d         d         d         d         d         d         d         d
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n

arrive              free    queued  starting  stopping exporting  resizing    moving    coming
  here                 y         y         y         y         y         y         y         y
  unconfirmed          y         y         y         y         y         y         y         y
  contested            y         y         y         y         y         y         y         y
  in-doubt             d         d         d         d         d         d         d         d
  given-up             .         .         h         h         h         h         h         .
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              .         .         h         h         h         h         h         .

let go              free    queued  starting  stopping exporting  resizing    moving    coming
  here               ./u       ./u         h         h         h         h         h         h
  unconfirmed        ./u       ./u         h         h         h         h         h         h
  contested          ./u       ./u         h         h         h         h         h         h
  in-doubt           ./u       ./u         h         h         h         h       ./u         h
  given-up             g         g         g         g         g         g         g         g
  aside                a         a         a         a         a         a         a         a
  removed              r         r         r         r         r         r         r         r
  unknown              n         n         n         n         n         n         n         n
";

fn letter(answer: Result<(), No>) -> char {
    match answer {
        Ok(()) => '.',
        Err(No::Held(_)) => 'h',
        Err(No::Contested) => 'c',
        Err(No::Unconfirmed) => 'q',
        Err(No::Up) => 'u',
        Err(No::Off) => 'o',
        Err(No::Here) => 'y',
        Err(No::InDoubt) => 'd',
        Err(No::GivenUp) => 'g',
        Err(No::Aside) => 'a',
        Err(No::Removed) => 'r',
        Err(No::Unknown) => 'n',
    }
}

/// As in `GiveUp`: give up.
fn words(name: &str, between: char) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push(between);
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

fn holds() -> [(&'static str, Hold); 8] {
    let moving = Hold::Moving(MigrationId(uuid::Uuid::from_u128(7)));
    // Whoever adds one adds a column.
    match moving {
        Hold::Free | Hold::Queued | Hold::Starting | Hold::Stopping => {}
        Hold::Exporting | Hold::Resizing | Hold::Moving(_) | Hold::Coming => {}
    }
    [
        ("free", Hold::Free),
        ("queued", Hold::Queued),
        ("starting", Hold::Starting),
        ("stopping", Hold::Stopping),
        ("exporting", Hold::Exporting),
        ("resizing", Hold::Resizing),
        ("moving", moving),
        ("coming", Hold::Coming),
    ]
}

/// Whoever adds a verb or an owner adds a row.
#[test]
fn all_are_in_the_table() {
    assert_eq!(Verb::ALL[Verb::LetGo as usize], Verb::LetGo);
    assert_eq!(Verb::ALL.len(), Verb::LetGo as usize + 1);
    assert_eq!(Owner::ALL[Owner::Unknown as usize], Owner::Unknown);
    assert_eq!(Owner::ALL.len(), Owner::Unknown as usize + 1);
}

fn table(law: Law) -> String {
    let mut out = String::new();
    for verb in Verb::ALL {
        out += &format!("{:14}", words(&format!("{verb:?}"), ' '));
        holds().iter().for_each(|(name, _)| out += &format!("{name:>10}"));
        out.push('\n');
        for owner in Owner::ALL {
            out += &format!("  {:12}", words(&format!("{owner:?}"), '-'));
            for (_, hold) in holds() {
                let [off, up] = [false, true].map(|up| letter(may(law, verb, owner, hold, up)));
                let cell = if off == up { off.to_string() } else { format!("{off}/{up}") };
                out += &format!("{cell:>10}");
            }
            out.push('\n');
        }
        out.push('\n');
    }
    out
}

#[test]
fn who_may_do_what_is_what_the_table_says() {
    let now = table(Law::WHOLE);
    let differs = now.lines().zip(TABLE.lines()).find(|(now, said)| now != said);
    assert!(now.trim_end() == TABLE.trim_end(), "first difference: {differs:#?}\n{now}");
}

fn record() -> VmRecord {
    let spec = VmSpec {
        id: VmId(uuid::Uuid::from_u128(5)),
        name: "web".parse().unwrap(),
        cpus: 1,
        memory: ByteSize::mib(64),
        recipe: RecipeId::of(b"r"),
        root_size: ByteSize::mib(1),
        user_data_size: ByteSize(0),
        nics: Vec::new(),
        architecture: "amd64".into(),
        cpu_model: "qemu64".into(),
        firmware: Firmware::Bios,
        disk_bus: Default::default(),
        system_uuid: None,
    };
    VmRecord::new(spec, Vec::new(), "disks-1", UnixMillis(1))
}

/// What else says who may do what says the same.
#[test]
fn the_law_says_of_moves_what_the_table_says() {
    for (_, hold) in holds() {
        for (owner, confirmed) in [(Owner::Here, true), (Owner::Unconfirmed, false)] {
            let by_law = Law::WHOLE.may_move(&record(), hold, confirmed);
            let by_table = may(Law::WHOLE, Verb::Move, owner, hold, false);
            assert_eq!(by_law.is_ok(), by_table.is_ok(), "{owner:?} {hold:?}: {by_law:?} and {by_table:?}");
        }
    }
}

#[cfg(debug_assertions)]
#[test]
fn a_rule_that_is_off_opens_its_cells_and_no_other() {
    let opened = |rule: Rule| {
        let (whole, without) = (table(Law::WHOLE), table(Law::without(rule)));
        let mut verb = "";
        let mut opened = std::collections::BTreeSet::new();
        for (line, (was, is)) in whole.lines().zip(without.lines()).enumerate() {
            if !was.starts_with(' ') && !was.is_empty() {
                verb = TABLE.lines().nth(line).unwrap().split("  ").next().unwrap();
            }
            if was != is {
                opened.insert(verb);
            }
        }
        opened.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(opened(Rule::HeldIsNotMoved), ["give up", "move"]);
    assert_eq!(opened(Rule::RunsWhereOwned), ["move", "reboot", "start", "start by word", "start itself"]);
    assert_eq!(opened(Rule::NotTwice), ["arrive"]);
    assert_eq!(opened(Rule::NotWhileInDoubt), ["arrive"]);
    assert_eq!(opened(Rule::OwnerGivesUp), ["give up"]);
    for rule in Rule::ALL {
        let known = [
            Rule::HeldIsNotMoved,
            Rule::RunsWhereOwned,
            Rule::NotTwice,
            Rule::NotWhileInDoubt,
            Rule::OwnerGivesUp,
        ];
        assert!(known.contains(&rule) || opened(rule).is_empty(), "{rule:?}");
    }
}
