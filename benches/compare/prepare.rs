//! Cicada's part of `benches/compare/run`: makes disks, and moves one between two processes.
//!
//! `cargo bench --bench compare -- VERB …`, or the binary itself:
//!
//! | verb | does |
//! |---|---|
//! | `image SCRATCH DEFINITIONS OUT` | builds the components (files, with commas) into SCRATCH/repository and composes them; writes their state to OUT |
//! | `delta IMAGE RAW OVERLAY` | an overlay over IMAGE that reads as RAW |
//! | `adopt SCRATCH RAW OVERLAY OUT` | adopts the disk RAW by what SCRATCH/repository holds; writes its state to OUT |
//! | `seed SCRATCH STATE TARGET` | makes TARGET, a repository that holds what belongs to STATE |
//! | `serve SCRATCH STATE OFFER ADDRESS` | serves a state; writes OFFER, says `READY`, ends with its standard input |
//! | `fetch TARGET OFFER HELD DISKS ADDRESS` | makes the offered disks in DISKS with what TARGET and the disks of the state HELD have; prints `key value` lines |

#[path = "link.rs"]
mod link;
#[path = "state.rs"]
mod state;

use std::path::{Path, PathBuf};

use cicada::adopt::Job;
use cicada::build::{BuildEvent, BuildOptions, build};
use cicada::compose::{Composer, ImageFormat};
use cicada::disk::{OverlayWriter, ROOT_BLOCK_BYTES};
use cicada::repository::Repository;
use cicada::types::{ByteSize, ComponentId};

use state::State;

/// Room for every corpus; holes cost nothing.
const IMAGE_BYTES: ByteSize = ByteSize(1 << 30);
const COMMAND_LINE: &str = "console=ttyS0 quiet";

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let path = |text: &str| std::path::absolute(text);
    match arguments.as_slice() {
        ["image", scratch, definitions, out] => image(&path(scratch)?, definitions, &path(out)?),
        ["delta", image, raw, overlay] => delta(&path(image)?, &path(raw)?, &path(overlay)?),
        ["adopt", scratch, raw, overlay, out] => {
            adopt(&path(scratch)?, &path(raw)?, &path(overlay)?, &path(out)?)
        }
        ["seed", scratch, state, target] => {
            let source = Repository::open(&path(scratch)?.join("repository"))?;
            link::seed(&source, &State::read(&path(state)?)?, &path(target)?)
        }
        ["serve", scratch, state, offer, address] => {
            let source = Repository::open(&path(scratch)?.join("repository"))?;
            link::serve(&source, &State::read(&path(state)?)?, &path(offer)?, address.parse()?)
        }
        ["fetch", target, offer, held, disks, address] => {
            let target = Repository::open(&path(target)?)?;
            let held = State::read(&path(held)?)?;
            let report = link::fetch(&target, &path(offer)?, &held, &path(disks)?, address.parse()?)?;
            report.print();
            Ok(())
        }
        _ => {
            println!("compare: run benches/compare/run");
            Ok(())
        }
    }
}

fn image(scratch: &Path, definitions: &str, out: &Path) -> Result<()> {
    let repository = Repository::open_or_create(&scratch.join("repository"))?;
    let files: Vec<PathBuf> = definitions.split(',').map(PathBuf::from).collect();
    let options = BuildOptions { cache_dir: scratch.join("cache"), keep_failed: false, rebuild: false };
    let built = build(&repository, &files, &options, &mut |event| match event {
        BuildEvent::Begun { component, number, total } => eprintln!("{component} ({number} of {total})"),
        BuildEvent::Step { step, .. } => eprintln!("  {step}"),
        _ => {}
    })?;
    for component in &built {
        println!("component {} {} {}", component.name, component.version, component.id);
    }
    let components: Vec<ComponentId> = built.into_iter().map(|b| b.id).collect();
    // What a broker does when it is idle; OPTIMIZE=0 measures packs as they were made.
    if std::env::var_os("OPTIMIZE").is_none_or(|v| v != "0") {
        let names: Vec<String> = components.iter().map(ToString::to_string).collect();
        cicada::runner::content::optimize::optimize(&repository, &names, true, &|| false, &mut |_| ())
            .map_err(|p| p.to_string())?;
    }
    let composer = Composer::new(repository);
    let (recipe, _) = composer.make_recipe(&components, false, IMAGE_BYTES, COMMAND_LINE)?;
    State { recipe: Some(recipe), image: Some(composer.path_of(&recipe)), ..State::default() }.write(out)
}

/// As `cicada vm adopt` makes a VM of a disk from elsewhere.
fn adopt(scratch: &Path, raw: &Path, overlay: &Path, out: &Path) -> Result<()> {
    let repository = Repository::open(&scratch.join("repository"))?;
    let composer = Composer::new(repository.clone());
    let job = Job { progress: &|_, _, _| (), cancelled: &|| false };
    let examined = cicada::adopt::examine(&repository, raw, Some(ImageFormat::Raw), job)?;
    let found = examined.findings();
    println!("known {} residue {} extents {}", found.known_bytes, found.residue_bytes, found.extents);
    let base = examined.make_base(&repository, &composer, "amd64", false, job)?;
    let image = composer.path_of(&base.recipe);
    examined.write_root(overlay, &image, job)?;
    let state = State {
        recipe: Some(base.recipe),
        image: Some(image),
        overlay: Some(overlay.to_owned()),
        ..State::default()
    };
    state.write(out)
}

/// What a root delta of a disk that was made elsewhere is: every block that differs from the one
/// at its place.
fn delta(image: &Path, raw: &Path, overlay: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;

    let (below, above) = (std::fs::File::open(image)?, std::fs::File::open(raw)?);
    let size = below.metadata()?.len();
    if above.metadata()?.len() != size {
        return Err(format!("{} is not of the size of {}", raw.display(), image.display()).into());
    }
    let mut writer = OverlayWriter::open_or_create(overlay, image, size)?;
    let block = ROOT_BLOCK_BYTES as usize;
    let (mut a, mut b) = (vec![0; 256 * block], vec![0; 256 * block]);
    let mut at = 0;
    while at < size {
        let len = (size - at).min(a.len() as u64) as usize;
        below.read_exact_at(&mut a[..len], at)?;
        above.read_exact_at(&mut b[..len], at)?;
        for (n, (old, new)) in a[..len].chunks(block).zip(b[..len].chunks(block)).enumerate() {
            let number = at / block as u64 + n as u64;
            if old == new {
                continue;
            }
            if new.iter().all(|byte| *byte == 0) {
                writer.write_zero(number)?;
            } else {
                writer.write_block(number, new)?;
            }
        }
        at += len as u64;
    }
    Ok(writer.finish()?)
}
