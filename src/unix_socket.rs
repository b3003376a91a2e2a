//! Level 0: Unix sockets at paths of any length. An address holds 107 bytes of path (unix(7)); a longer one
//! is reached through a descriptor of its directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// What fits into `sockaddr_un` with its closing zero.
const ADDRESS_BYTES_MAX: usize = 107;

/// A path that fits, good for as long as this lives.
struct Address {
    path: PathBuf,
    _dir: Option<File>,
}

fn address_of(path: &Path) -> io::Result<Address> {
    if path.as_os_str().as_bytes().len() <= ADDRESS_BYTES_MAX {
        return Ok(Address { path: path.to_owned(), _dir: None });
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no file name"));
    };
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let dir = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(parent)?;
    let path = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    Ok(Address { path, _dir: Some(dir) })
}

/// As [`UnixListener::bind`].
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    UnixListener::bind(address_of(path)?.path)
}

/// As [`UnixStream::connect`].
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(address_of(path)?.path)
}

/// As [`connect`], for tasks.
pub async fn connect_async(path: &Path) -> io::Result<tokio::net::UnixStream> {
    let address = address_of(path)?;
    tokio::net::UnixStream::connect(&address.path).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_path_of_any_length_is_bound_and_reached() {
        let dir = tempfile::tempdir().unwrap();
        for length in [10, 107, 108, 200, 1000] {
            let mut deep = dir.path().join(length.to_string());
            while deep.as_os_str().len() + 12 < length {
                deep = deep.join("d".repeat(60.min(length - deep.as_os_str().len() - 12).max(1)));
            }
            std::fs::create_dir_all(&deep).unwrap();
            let path = deep.join("some.sock");
            let listener = bind(&path).unwrap();
            assert!(path.exists(), "{length}");
            let mut there = connect(&path).unwrap();
            there.write_all(b"x").unwrap();
            let mut byte = [0];
            listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
            assert_eq!(byte, *b"x");
        }
        assert!(connect(&dir.path().join("nobody")).is_err());
    }
}
