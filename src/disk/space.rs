//! Is there room for what is to come?

use std::path::Path;

use super::DiskError;
use super::error::io_error;

/// Refuses when the file system of `dir` has fewer than `need_bytes` left for unprivileged writers.
/// Others may use the room meanwhile, so a write can still fail.
pub fn require_space(dir: &Path, need_bytes: u64) -> Result<(), DiskError> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| io_error("ask the free space of", dir)(e.into()))?;
    let have_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    if have_bytes < need_bytes {
        return Err(DiskError::NoSpace { need_bytes, have_bytes, dir: dir.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_needed_and_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        require_space(dir.path(), 1).unwrap();
        let refused = require_space(dir.path(), u64::MAX).unwrap_err();
        assert!(
            matches!(&refused, DiskError::NoSpace { need_bytes: u64::MAX, have_bytes, .. } if *have_bytes > 0)
        );
        assert!(refused.to_string().contains(&dir.path().display().to_string()));
        let missing = require_space(&dir.path().join("none"), 1).unwrap_err();
        assert!(matches!(missing, DiskError::Io { .. }));
    }
}
