//! qcow2 files a hypervisor or a guest left behind.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cicada::disk::{OverlayWriter, Qcow2, scan_root};

use crate::work_dir;

/// The base and the disk that writers expect.
const DISK_BYTES: u64 = 256 << 10;
/// Files are sparse, so any offset below can lie within.
const FILE_BYTES_MAX: u64 = 1 << 42;
const READ_RUNS_MAX: usize = 10_000;

/// Four bytes of file length in units of 512, then pieces of the file: offset in units of 8 (three
/// bytes), length (one byte), bytes.
pub fn qcow2(data: &[u8]) {
    let Some((units, rest)) = data.split_first_chunk::<4>() else { return };
    let (base, overlay) = files();
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(overlay);
    let file = file.expect("the work directory can be written");
    let len = (u64::from(u32::from_le_bytes(*units)) * 512).min(FILE_BYTES_MAX);
    write_pieces(&file, rest);
    file.set_len(len).expect("a sparse file can be long");
    drop(file);
    use_it(overlay, base);
}

fn write_pieces(file: &File, mut rest: &[u8]) {
    while let [a, b, c, len, after @ ..] = rest {
        let (bytes, after) = after.split_at(after.len().min(usize::from(*len)));
        let at = u64::from(u32::from_le_bytes([*a, *b, *c, 0])) * 8;
        file.write_all_at(bytes, at).expect("the work directory can be written");
        rest = after;
    }
}

fn files() -> &'static (PathBuf, PathBuf) {
    static FILES: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    FILES.get_or_init(|| {
        let dir = work_dir();
        fs::create_dir_all(&dir).expect("the work directory can be written");
        let base = dir.join("base");
        fs::write(&base, vec![3; DISK_BYTES as usize]).expect("the work directory can be written");
        (base, dir.join("overlay"))
    })
}

fn use_it(overlay: &Path, base: &Path) {
    if let Ok(image) = Qcow2::open(overlay) {
        let size = image.virtual_size_bytes();
        let mut end = 0;
        let mut held = 0;
        let mut ended = false;
        for run in image.allocated().take(READ_RUNS_MAX) {
            assert!(!ended, "reading ends with the first error");
            match run {
                Ok(run) => {
                    assert!(run.len_bytes > 0 && run.offset_bytes >= end, "runs ascend");
                    end = run.offset_bytes + run.len_bytes;
                    assert!(end <= size, "a run ends within the disk");
                    held += run.len_bytes;
                }
                Err(_) => ended = true,
            }
        }
        let mut buf = [0; 5000];
        for offset in [0, 511, size / 2, size.saturating_sub(1), size, u64::MAX - 4999] {
            let _ = image.read_at(offset, &mut buf, |_, part| {
                part.fill(0);
                Ok(())
            });
        }
        // A disk of terabytes of zeros is sound, only long.
        if held < 1 << 22 && size < 1 << 32 {
            let _ = scan_root(overlay, base);
        }
    }
    if let Ok(mut writer) = OverlayWriter::open_or_create(overlay, base, DISK_BYTES) {
        let wrote = [0, 5, DISK_BYTES / 4096 - 1].map(|n| writer.write_block(n, &[7; 4096]).is_ok());
        let _ = writer.write_zero(3);
        let _ = writer.discard(4);
        assert!(writer.write_block(DISK_BYTES / 4096, &[7; 4096]).is_err(), "beyond the disk");
        if writer.finish().is_ok() && wrote.iter().all(|w| *w) {
            let image = Qcow2::open(overlay).expect("what was written can be read");
            let mut block = [0; 4096];
            image.read_at(5 * 4096, &mut block, |_, _| Ok(())).expect("what was written can be read");
            assert_eq!(block, [7; 4096]);
        }
    }
}
