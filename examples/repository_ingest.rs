//! How fast a repository takes content in and gives it back, against plain BLAKE3 and zstd on the
//! same bytes with the same threads in the same run.
//!
//! `cargo run --release --example repository_ingest -- FILE…`: the files' bytes, or without files
//! 256 MiB of half-compressible ones; the repository is made in the current directory and removed.

use std::io;
use std::time::{Duration, Instant};

use cicada::repository::Repository;
use rayon::prelude::*;

const SAMPLE_BYTES: usize = 256 << 20;
const FRAME_BYTES: usize = 1 << 20;
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut content = Vec::new();
    for file in std::env::args_os().skip(1) {
        content.extend(std::fs::read(file)?);
    }
    if content.is_empty() {
        content = sample();
    }
    let mut ratios = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let dir = tempfile::tempdir_in(".")?;
        let repository = Repository::create(dir.path())?;
        let hash = timed(|| {
            std::hint::black_box(blake3::hash(&content));
            Ok(())
        })?;
        let zstd = timed(|| {
            let frames: io::Result<Vec<Vec<u8>>> =
                content.par_chunks(FRAME_BYTES).map(|frame| zstd::bulk::compress(frame, 3)).collect();
            frames.map(drop)
        })?;
        let mut pack = None;
        let ingest = timed(|| {
            let mut writer = repository.pack_writer().map_err(io::Error::other)?;
            writer.append(&mut content.as_slice(), content.len() as u64).map_err(io::Error::other)?;
            pack = writer.finish().map_err(io::Error::other)?;
            Ok(())
        })?;
        let (id, _) = pack.ok_or("no pack")?;
        let read = timed(|| repository.read_pack(&id, &mut |_, _| Ok(())).map_err(io::Error::other))?;
        let (hash_s, zstd_s, ingest_s, read_s) =
            (hash.as_secs_f64(), zstd.as_secs_f64(), ingest.as_secs_f64(), read.as_secs_f64());
        println!(
            "blake3 {hash_s:.3} s, zstd -3 on all cores {zstd_s:.3} s, ingest {ingest_s:.3} s, verified read {read_s:.3} s"
        );
        ratios[0].push(ingest_s / (hash_s + zstd_s));
        ratios[1].push(ingest_s / zstd_s);
        ratios[2].push(read_s / hash_s);
    }
    let names = ["ingest / (blake3 + zstd)", "ingest / zstd alone", "verified read / blake3 alone"];
    for (name, mut ratios) in names.into_iter().zip(ratios) {
        ratios.sort_by(f64::total_cmp);
        println!("{name}: median {:.2}", ratios[ROUNDS / 2]);
    }
    Ok(())
}

fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// Words from a small vocabulary between stretches of noise: zstd about halves it.
fn sample() -> Vec<u8> {
    let mut noise = blake3::Hasher::new().finalize_xof();
    let mut out = Vec::with_capacity(SAMPLE_BYTES);
    let mut bytes = [0; 4096];
    while out.len() < SAMPLE_BYTES {
        noise.fill(&mut bytes);
        out.extend(bytes.iter().map(|b| b"the federation of clouds"[usize::from(b % 24)]));
        out.extend_from_slice(&bytes[..1500]);
    }
    out
}
