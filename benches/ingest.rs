//! How fast a repository takes content in and gives it back, against BLAKE3 and zstd -3 over the
//! same bytes on the same number of threads, in the same rounds. The limit is twice as long.
//!
//! `cargo bench --bench ingest [-- PATH…]`: files, or directories with all below them; /usr/lib
//! without any. CICADA_BENCH_MB bounds what is read (600). The repository is made in the current
//! directory and removed.

use std::io;
use std::path::PathBuf;

use cicada::cli::bench::{Content, median, timed};
use cicada::repository::Repository;
use rayon::prelude::*;

const FRAME_BYTES: usize = 1 << 20;
const ROUNDS: usize = 5;
const LIMIT: f64 = 2.0;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let megabytes = std::env::var("CICADA_BENCH_MB").map_or(Ok(600), |m| m.parse::<usize>())?;
    let mut paths: Vec<PathBuf> =
        std::env::args_os().skip(1).filter(|a| a != "--bench").map(Into::into).collect();
    if paths.is_empty() {
        paths.push("/usr/lib".into());
    }
    let mut content = Content::default();
    for path in &paths {
        content.read(path, megabytes * 1_000_000)?;
    }
    println!(
        "{:.0} MB in {} files, {} threads",
        content.bytes.len() as f64 / 1e6,
        content.files.len(),
        rayon::current_num_threads()
    );
    let mut ratios = [Vec::new(), Vec::new(), Vec::new()];
    for round in 1..=ROUNDS {
        let dir = tempfile::tempdir_in(".")?;
        let repository = Repository::create(dir.path())?;
        let (hash_s, ()) = timed(|| {
            content.bytes.par_chunks(FRAME_BYTES).for_each(|c| {
                std::hint::black_box(blake3::hash(c));
            });
            io::Result::Ok(())
        })?;
        let pack = |c: &[u8]| zstd::bulk::compress(c, 3).map(drop);
        let (zstd_s, ()) = timed(|| content.bytes.par_chunks(FRAME_BYTES).try_for_each(pack))?;
        let (ingest_s, pack) = timed(|| content.ingest(&repository))?;
        let id = pack.ok_or("there is no content")?;
        let (read_s, ()) = timed(|| repository.read_pack(&id, &mut |_, _| Ok(())))?;
        println!(
            "round {round}: blake3 {hash_s:.2} s, zstd -3 {zstd_s:.2} s, ingest {ingest_s:.2} s, verified read {read_s:.2} s"
        );
        ratios[0].push(ingest_s / (hash_s + zstd_s));
        ratios[1].push(ingest_s / zstd_s);
        ratios[2].push(read_s / hash_s);
    }
    let [sum, zstd, read] = ratios.map(median);
    let verdict = if sum <= LIMIT { "holds" } else { "BROKEN" };
    println!("ingest / (blake3 + zstd -3): median {sum:.2}, limit {LIMIT}: {verdict}");
    println!("ingest / zstd -3 alone: median {zstd:.2}");
    println!("verified read / blake3 alone: median {read:.2}");
    Ok(())
}
