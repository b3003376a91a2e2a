//! The API's Unix socket: one broker, one user.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use crate::interface::{Problem, ProblemKind};

/// Listens at `path` with mode 0600. A socket nobody answers at is a leftover and is replaced;
/// missing parent directories are made, for the owner only.
pub async fn bind(path: &Path) -> Result<UnixListener, Problem> {
    let object = format!("socket {}", path.display());
    let failed = |e| {
        Problem::from_error(ProblemKind::Failed, object.clone(), &e)
            .next("check api.socket and the owner of its directory")
    };
    let refused = |reason, next| Err(Problem::new(ProblemKind::Conflict, object.clone(), reason).next(next));
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return refused("there is something else of that name", "move it away, or set api.socket");
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return refused(
                "another broker answers there",
                "stop it, or set another cloud.data_dir or api.socket",
            );
        }
        _ => {}
    }
    // Bound under another name first, so nobody can connect before the mode is right, and so the
    // old socket is replaced in one step.
    let mut name = path.as_os_str().to_owned();
    name.push(".n");
    let new = PathBuf::from(name);
    let _ = fs::remove_file(&new);
    let listener = UnixListener::bind(&new).map_err(failed)?;
    let placed =
        fs::set_permissions(&new, Permissions::from_mode(0o600)).and_then(|()| fs::rename(&new, path));
    if let Err(source) = placed {
        let _ = fs::remove_file(&new);
        return Err(failed(source));
    }
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_leftover_is_replaced_and_a_live_broker_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/a.sock");
        let first = bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bind(&path).await.unwrap_err().reason, "another broker answers there");
        drop(first);
        assert!(path.exists(), "a dead broker leaves its socket");
        drop(bind(&path).await.unwrap());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert_eq!(bind(&path).await.unwrap_err().kind, ProblemKind::Conflict);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
