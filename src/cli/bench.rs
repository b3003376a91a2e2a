//! `cicada bench`: what this machine and this disk make of a repository's work, as ratios to what
//! the same run found possible.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use rayon::prelude::*;
use serde::Serialize;

use crate::interface::problem::{Problem, ProblemKind};
use crate::repository::{RECORD_LEVEL, Repository, RepositoryError};
use crate::runner::content::catalogue::repository_problem;
use crate::types::{ByteSize, PackId};

use super::context::Context;
use super::printer::Outcome;
use super::table::Table;

/// Rounds, of which the median counts: a shared machine has moods.
const ROUNDS: usize = 3;
const PIECE_BYTES: usize = 1 << 20;

/// A name in words as programs know it: `xmpp-server`.
fn identifier<S: serde::Serializer>(words: &str, s: S) -> Result<S::Ok, S::Error> {
    let plain = words.to_ascii_lowercase();
    let parts = plain.split(|c: char| !c.is_ascii_alphanumeric()).filter(|part| !part.is_empty());
    s.serialize_str(&parts.collect::<Vec<_>>().join("-"))
}

#[derive(Args)]
pub struct Bench {
    /// Files, or directories with all below them, to work on
    #[arg(value_name = "PATH", default_value = "/usr/lib")]
    paths: Vec<PathBuf>,
    /// Where to make a repository for the time of the run; use the disk the real one is on
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// How much of the content to read at most
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    size: ByteSize,
}

/// One line of the result.
#[derive(Serialize)]
struct Row {
    #[serde(serialize_with = "identifier")]
    name: &'static str,
    /// Plain bytes a second, the median of the rounds.
    bytes_per_s: f64,
    /// Time taken, against the time of what is named.
    ratio: Option<f64>,
    #[serde(serialize_with = "identifier")]
    against: &'static str,
}

pub fn run(ctx: &Context, bench: &Bench) -> Outcome {
    let failed = |e: io::Error| Problem::from_error(ProblemKind::Failed, "bench", &e);
    let mut content = Content::default();
    for path in &bench.paths {
        content.read(path, bench.size.0 as usize).map_err(failed)?;
    }
    if content.bytes.is_empty() {
        let reason = "there is nothing to read in the paths given";
        return Err(Problem::new(ProblemKind::BadRequest, "bench", reason)
            .next("name files or directories with some content")
            .into());
    }
    ctx.printer.note(format!(
        "{} in {} files, {ROUNDS} rounds",
        ByteSize(content.bytes.len() as u64),
        content.files.len()
    ));
    let mut times: [Vec<f64>; 6] = Default::default();
    for _ in 0..ROUNDS {
        let round = round(&content, &bench.dir)?;
        times.iter_mut().zip(round).for_each(|(all, one)| all.push(one));
    }
    let [hash_s, zstd_s, write_s, ingest_s, read_s, strong_s] = times.map(median);
    let row = |name, seconds: f64, against: &'static str, other_s: Option<f64>| Row {
        name,
        bytes_per_s: content.bytes.len() as f64 / seconds,
        ratio: other_s.map(|other| seconds / other),
        against,
    };
    let rows = [
        row("BLAKE3, all cores", hash_s, "", None),
        row("zstd at the quick level, all cores", zstd_s, "", None),
        row("write and sync", write_s, "", None),
        row("ingest into a pack", ingest_s, "BLAKE3 + zstd", Some(hash_s + zstd_s)),
        row("verified read of a pack", read_s, "BLAKE3", Some(hash_s)),
        row("optimise a pack", strong_s, "zstd at the quick level", Some(zstd_s)),
    ];
    if ctx.printer.json {
        return ctx.printer.json_value(&rows);
    }
    let mut table = Table::new(["", ">PLAIN BYTES", ">TIME", ""]);
    for row in &rows {
        table.row([
            row.name.to_owned(),
            format!("{}/s", ByteSize(row.bytes_per_s as u64)),
            row.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2} ×")),
            row.against.to_owned(),
        ]);
    }
    table.print(&ctx.printer)
}

/// Seconds of each step.
fn round(content: &Content, dir: &Path) -> Outcome<[f64; 6]> {
    let failed = |e: io::Error| Problem::from_error(ProblemKind::Failed, "bench", &e);
    let refused = |e: RepositoryError| repository_problem(&e);
    let dir = tempfile::tempdir_in(dir).map_err(failed)?;
    let repository = Repository::create(&dir.path().join("repository")).map_err(refused)?;
    let hashed = timed(|| {
        content.bytes.par_chunks(PIECE_BYTES).for_each(|c| {
            std::hint::black_box(blake3::hash(c));
        });
        Ok(())
    });
    let (hash_s, ()) = hashed.map_err(failed)?;
    let pack = |c: &[u8]| zstd::bulk::compress(c, RECORD_LEVEL).map(drop);
    let packed = timed(|| content.bytes.par_chunks(PIECE_BYTES).try_for_each(pack));
    let (zstd_s, ()) = packed.map_err(failed)?;
    let written = timed(|| write(&dir.path().join("written"), &content.bytes));
    let (write_s, ()) = written.map_err(failed)?;
    let (ingest_s, pack) = timed(|| content.ingest(&repository)).map_err(refused)?;
    let Some(id) = pack else {
        return Err(Problem::new(ProblemKind::Failed, "bench", "no pack was made").into());
    };
    let read = timed(|| repository.read_pack(&id, &mut |_, _| Ok(())));
    let (read_s, ()) = read.map_err(refused)?;
    let (strong_s, _) = timed(|| repository.optimize_pack(&id, &|| false)).map_err(refused)?;
    Ok([hash_s, zstd_s, write_s, ingest_s, read_s, strong_s])
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// File contents, one after the other.
#[derive(Debug, Default)]
pub struct Content {
    pub bytes: Vec<u8>,
    /// The length of each file.
    pub files: Vec<usize>,
}

impl Content {
    /// Adds a file, or all below a directory, until there are `bytes_max`.
    pub fn read(&mut self, path: &Path, bytes_max: usize) -> io::Result<()> {
        let meta = path.symlink_metadata()?;
        if meta.is_dir() {
            let inside = path.read_dir()?.map(|e| e.map(|e| e.path()));
            let mut inside: Vec<_> = inside.collect::<Result<_, _>>()?;
            inside.sort();
            return inside.iter().try_for_each(|p| self.read(p, bytes_max));
        }
        let room = bytes_max.saturating_sub(self.bytes.len());
        if meta.is_file() && meta.len() > 0 && room > 0 {
            let read = File::open(path)?.take(room as u64).read_to_end(&mut self.bytes)?;
            self.files.push(read);
        }
        Ok(())
    }

    /// Makes a pack of all files.
    pub fn ingest(&self, repository: &Repository) -> Result<Option<PackId>, RepositoryError> {
        let mut writer = repository.pack_writer()?;
        let mut rest = self.bytes.as_slice();
        for len in &self.files {
            writer.append(&mut rest, *len as u64)?;
        }
        Ok(writer.finish()?.map(|(id, _)| id))
    }
}

/// The seconds that `work` takes, and what it gives.
pub fn timed<T, E>(work: impl FnOnce() -> Result<T, E>) -> Result<(f64, T), E> {
    let begun = Instant::now();
    let result = work()?;
    Ok((begun.elapsed().as_secs_f64().max(1e-9), result))
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
