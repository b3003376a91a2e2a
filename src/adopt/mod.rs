//! Level 3: existing disks become VMs of known content and residue, and VMs' disks become files again.
//!
//! A disk that was not composed here is read in blocks of 4 KiB, which are looked up in all packs the
//! repository holds ([`matching`]). What is known becomes a base that any cloud composes from those
//! packs ([`base`]); what differs from it becomes the root delta ([`residue`]), as if the guest had
//! written it. The whole is read back and compared with the disk before it counts.
//!
//! All functions block, tell how far they are, and end early when they are told to.

mod base;
mod damage;
mod disk_file;
mod error;
mod fat;
mod formats;
mod matching;
mod reader;
mod recognise;
mod residue;
mod segments;
mod source;
mod whole;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::component::extents::BLOCK_BYTES;
use crate::compose::{Composer, ImageFormat, Output, convert};
use crate::repository::{BlockPlaces, PLACES_MAX_DEFAULT, Repository};
use crate::types::{ImageDigest, RecipeId};

pub use base::Base;
pub use error::AdoptError;
pub use matching::{Matcher, Matching};
pub use recognise::Disk;
pub use segments::{DiskBlocks, Segments};
pub use source::Source;

/// Disks become a multiple of this, as every VM's are.
pub const SIZE_UNIT_BYTES: u64 = 1 << 20;

/// What runs an adoption: where it reports to, and whether it shall go on.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Gets the phase, bytes done and bytes to do, from any thread.
    pub progress: &'a (dyn Fn(&'static str, u64, u64) + Sync),
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl Job<'_> {
    fn check(&self) -> Result<(), AdoptError> {
        if (self.cancelled)() { Err(AdoptError::Cancelled) } else { Ok(()) }
    }
}

/// A disk that was read and held against the repository; nothing was kept of it yet.
pub struct Examined {
    source: Source,
    segments: Segments,
    blocks: DiskBlocks,
    places: BlockPlaces,
    matching: Matching,
}

/// What an adoption found. All byte counts are of whole blocks but `disk_bytes`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Findings {
    pub format: ImageFormat,
    /// Size of the disk as it was found.
    pub disk_bytes: u64,
    /// Size it has as a VM's: a multiple of [`SIZE_UNIT_BYTES`].
    pub size_bytes: u64,
    /// The image digest of the disk at that size.
    pub digest: ImageDigest,
    pub known_bytes: u64,
    pub residue_bytes: u64,
    pub zero_bytes: u64,
    pub extents: u64,
    /// Where the known part comes from, most first.
    pub known_from: Vec<KnownFrom>,
    /// Packs the repository holds that were too many to be looked into.
    pub packs_left_out: usize,
    /// What the disk is, and names of the states inside its file that stay behind.
    pub disk: Disk,
    pub snapshots: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KnownFrom {
    /// `name@version`, or the pack's id where no component has it.
    pub component: String,
    pub packs: u64,
    pub bytes: u64,
}

/// Reads the disk at `path` and finds what of it is known. `format` of `None` is told by the first
/// bytes; a disk its guest wrote to can lie there, so operators name it where they can.
pub fn examine(
    repository: &Repository,
    path: &Path,
    format: Option<ImageFormat>,
    job: Job<'_>,
) -> Result<Examined, AdoptError> {
    examine_source(repository, Source::open(path, format, repository.temporary_dir(), job)?, job)
}

/// As [`examine`], of a disk that is open.
pub fn examine_source(repository: &Repository, source: Source, job: Job<'_>) -> Result<Examined, AdoptError> {
    let segments = source.segments()?;
    let blocks = DiskBlocks::read(&segments, job)?;
    let progress = |done, total| (job.progress)("index", done, total);
    let places = repository.block_places(PLACES_MAX_DEFAULT, &progress, job.cancelled)?;
    let matching = Matcher::new(&places).run(&blocks, job)?;
    Ok(Examined { source, segments, blocks, places, matching })
}

impl Examined {
    pub fn findings(&self) -> Findings {
        let known = self.matching.known_blocks();
        let (nonzero, all) = (self.blocks.nonzero_count(), self.blocks.count());
        let mut known_from: Vec<KnownFrom> = Vec::new();
        for (number, blocks) in self.matching.blocks_of_packs() {
            let pack = &self.places.packs[number as usize];
            let component = pack.component.clone().unwrap_or_else(|| format!("pack {}", pack.id.short()));
            let bytes = blocks * BLOCK_BYTES;
            match known_from.iter_mut().find(|k| k.component == component) {
                Some(k) => (k.packs, k.bytes) = (k.packs + 1, k.bytes + bytes),
                None => known_from.push(KnownFrom { component, packs: 1, bytes }),
            }
        }
        known_from.sort_by(|a, b| (b.bytes, &a.component).cmp(&(a.bytes, &b.component)));
        Findings {
            format: self.source.format(),
            disk_bytes: self.source.disk_bytes(),
            size_bytes: self.segments.size_bytes(),
            digest: self.blocks.digest().digest,
            known_bytes: known * BLOCK_BYTES,
            residue_bytes: (nonzero - known) * BLOCK_BYTES,
            zero_bytes: (all - nonzero) * BLOCK_BYTES,
            extents: self.matching.extents.len() as u64,
            known_from,
            packs_left_out: self.places.packs_left_out,
            disk: self.source.disk().clone(),
            snapshots: self.source.snapshots().to_vec(),
        }
    }

    /// Makes the base of the known part: component, recipe and composition. With `share` the residue
    /// goes into the component as well, which is then bound to its name.
    pub fn make_base(
        &self,
        repository: &Repository,
        composer: &Composer,
        architecture: &str,
        share: bool,
        job: Job<'_>,
    ) -> Result<Base, AdoptError> {
        base::make(self, repository, composer, architecture, share, job)
    }

    /// Writes the root delta over the base to `overlay`, reads the whole back and compares. Returns
    /// the bytes of blocks the overlay holds.
    pub fn write_root(&self, overlay: &Path, base: &Path, job: Job<'_>) -> Result<u64, AdoptError> {
        let written = residue::write(&self.segments, overlay, base, job)?;
        if !residue::is_same(&self.blocks, overlay, base, job)? {
            return Err(AdoptError::Changed { path: self.source.path().to_owned() });
        }
        Ok(written)
    }
}

/// Reads the disk at `path` into a raw sparse file `output`, a VM's user-data disk; returns its size.
pub fn take_user_data(
    path: &Path,
    format: Option<ImageFormat>,
    temporary: &Path,
    output: &Path,
    job: Job<'_>,
) -> Result<u64, AdoptError> {
    take_user_data_of(&Source::open(path, format, temporary, job)?, output, job)
}

/// As [`take_user_data`], of a disk that is open.
pub fn take_user_data_of(source: &Source, output: &Path, job: Job<'_>) -> Result<u64, AdoptError> {
    let segments = source.segments()?;
    segments.write_raw(output.into(), "user data", job)?;
    source.check_unchanged()?;
    Ok(segments.size_bytes())
}

/// A VM's disk to be written out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VmDisk {
    Root { overlay: PathBuf, base: PathBuf },
    UserData(PathBuf),
}

/// Writes a VM's whole disk to `output`. No hypervisor may run the disk meanwhile. Returns the size of the
/// disk.
pub fn export<'a>(
    disk: &VmDisk,
    output: impl Into<Output<'a>>,
    format: ImageFormat,
    job: Job<'_>,
) -> Result<u64, AdoptError> {
    let output = output.into();
    if let Some(reason) = output.occupied() {
        return Err(AdoptError::Occupied { path: output.path().to_owned(), reason });
    }
    let segments = match disk {
        VmDisk::Root { overlay, base } => Segments::of_vm(overlay, base)?,
        VmDisk::UserData(path) => Segments::of_file(path)?,
    };
    if format == ImageFormat::Raw {
        segments.write_raw(output, "export", job)?;
    } else {
        let input = formats::described(disk)?;
        convert(&[input.as_ref()], output, format)?;
        if let Output::New(path) = output {
            if (job.cancelled)() {
                let _ = std::fs::remove_file(path);
                return Err(AdoptError::Cancelled);
            }
            // As private as the disk it was.
            let private = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(path, private).map_err(error::io_error("set the mode of", path))?;
        }
    }
    Ok(segments.size_bytes())
}

/// Undoes what [`Examined::make_base`] left, for an adoption that comes to nothing: the composition
/// goes, what is in the repository without a name is the collector's.
pub fn abandon(composer: &Composer, recipe: &RecipeId) {
    if let Err(error) = composer.remove(recipe) {
        tracing::warn!(%recipe, %error, "the composition of an abandoned adoption stays");
    }
}
