//! What was tried and what the broker did about it: printed, and kept as `TABLE.md` when
//! `CICADA_WRITE_TABLE=1`.

use std::fmt::Write as _;
use std::path::Path;

#[derive(Default)]
pub struct Table(Vec<[String; 3]>);

impl Table {
    pub fn row(&mut self, step: &str, misbehaviour: &str, did: impl Into<String>) {
        let did = did.into();
        eprintln!("{step:<24} | {misbehaviour:<60} | {did}");
        self.0.push([step.into(), misbehaviour.into(), did]);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn keep(&self) {
        if std::env::var_os("CICADA_WRITE_TABLE").is_none() {
            return;
        }
        let mut text = String::from(
            "# A broker against a hostile member\n\nWritten by `tests/hostile_peer` with `CICADA_WRITE_TABLE=1`: \
             a peer keeps to the protocol until the\nstep, then misbehaves. After each row the broker answers, \
             what it owns and has free is as before,\nand nothing staged is left.\n\n\
             | step | what the peer does | what the broker does |\n|---|---|---|\n",
        );
        for [step, misbehaviour, did] in &self.0 {
            let _ = writeln!(text, "| {step} | {misbehaviour} | {} |", did.replace('|', "\\|"));
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile_peer/TABLE.md");
        std::fs::write(path, text).unwrap();
    }
}
