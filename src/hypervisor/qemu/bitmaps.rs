//! QEMU's dirty bitmaps: where a guest wrote to its disks.
//!
//! A period of tracking is one bitmap on each disk's block node, named by the period's number and
//! kept in memory only. QEMU finishes all requests before it begins or ends a period, on all disks
//! at once. The bits of a period that ended are read as any NBD client reads them: exported on a
//! private Unix socket, as the metadata of a read-only disk, and listed by `qemu-img map`.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

use super::qmp::{Qmp, QmpError};
use crate::durable;
use crate::unix_socket;

/// Bytes of a disk one bit stands for. Coarse enough that the bits of 16 TiB take 32 MiB.
const GRANULARITY: u64 = 64 << 10;
const PREFIX: &str = "cicada-";
/// For `qemu-img` to list a bitmap; it takes some hundredths of a second.
const LIST_TIMEOUT: Duration = Duration::from_secs(20);
/// Some hundred thousand ranges. A disk written to in more places may as well be read whole.
const LIST_BYTES_MAX: u64 = 64 << 20;
const COMPLAINT_BYTES_MAX: u64 = 4096;
/// What the socket is called while it is QEMU's and nothing's.
const SOCKET_NAME: &str = "cicada-nbd";

#[derive(Debug, thiserror::Error)]
pub enum BitmapError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("cannot run {}", path.display())]
    Run {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot make the socket {}", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("qemu-img cannot list the changes of disk '{node}': {reason}")]
    List { node: &'static str, reason: String },
    #[error("the listed changes of disk '{node}' make no sense: {reason}")]
    Senseless { node: &'static str, reason: String },
}

fn name(period: u64) -> String {
    format!("{PREFIX}{period}")
}

fn action(kind: &str, node: &str, bitmap: &str) -> Value {
    json!({"type": kind, "data": {"node": node, "name": bitmap}})
}

async fn transaction(qmp: &Qmp, actions: Vec<Value>) -> Result<(), QmpError> {
    qmp.execute("transaction", Some(json!({ "actions": actions }))).await.map(drop)
}

/// Begins a period and ends the one before, if there is one, at one instant between two requests
/// of the guest. All or nothing, except that a timeout leaves open which.
pub async fn begin(
    qmp: &Qmp,
    nodes: &[&'static str],
    period: u64,
    ending: Option<u64>,
) -> Result<(), QmpError> {
    let mut actions = Vec::new();
    for node in nodes {
        let mut add = action("block-dirty-bitmap-add", node, &name(period));
        add["data"]["granularity"] = GRANULARITY.into();
        actions.extend(ending.map(|ending| action("block-dirty-bitmap-disable", node, &name(ending))));
        actions.push(add);
    }
    transaction(qmp, actions).await
}

/// Ends a period without beginning another.
pub async fn freeze(qmp: &Qmp, nodes: &[&'static str], period: u64) -> Result<(), QmpError> {
    let disable = |node: &&str| action("block-dirty-bitmap-disable", node, &name(period));
    transaction(qmp, nodes.iter().map(disable).collect()).await
}

/// Removes the bitmaps of all periods but `keep`, whoever made them, and the way they are read.
pub async fn clear(qmp: &Qmp, keep: Option<u64>) -> Result<(), QmpError> {
    let keep = keep.map(name);
    let mut actions = Vec::new();
    let nodes = query(qmp).await?;
    let is_left = |bitmap: &&Bitmap| bitmap.name.starts_with(PREFIX) && Some(&bitmap.name) != keep.as_ref();
    for node in &nodes {
        for bitmap in node.dirty_bitmaps.iter().filter(is_left) {
            actions.push(action("block-dirty-bitmap-remove", &node.node_name, &bitmap.name));
        }
    }
    if actions.is_empty() {
        return Ok(());
    }
    // One that is exported cannot be removed.
    stop_serving(qmp).await?;
    transaction(qmp, actions).await
}

/// Whether the process goes on, paused, when the guest has switched itself off: what a bitmap
/// holds is lost with the process.
pub async fn outlive_guest(qmp: &Qmp, outlive: bool) -> Result<(), QmpError> {
    let action = if outlive { "pause" } else { "poweroff" };
    qmp.execute("set-action", Some(json!({ "shutdown": action }))).await.map(drop)
}

/// Where the guest wrote in a period that has ended, by node, in their order.
pub async fn read(
    qmp: &Qmp,
    nodes: &[&'static str],
    period: u64,
    socket: &Path,
    img: &Path,
) -> Result<Vec<Vec<Range<u64>>>, BitmapError> {
    let bitmap = name(period);
    let known = query(qmp).await?;
    // Left by a reader that did not come to its end.
    stop_serving(qmp).await?;
    // QEMU may make no sockets: it gets one.
    let listener =
        fresh_socket(socket).map_err(|source| BitmapError::Socket { path: socket.to_owned(), source })?;
    qmp.hand_over(SOCKET_NAME, listener).await?;
    let address = json!({"addr": {"type": "fd", "data": {"str": SOCKET_NAME}}});
    qmp.execute("nbd-server-start", Some(address)).await?;
    let listed = async {
        let mut all = Vec::new();
        for node in nodes {
            let senseless = |reason: String| BitmapError::Senseless { node, reason };
            let of_node = known.iter().find(|known| known.node_name == *node);
            let of_node = of_node.ok_or_else(|| senseless("QEMU has no such disk".into()))?;
            let known = of_node.dirty_bitmaps.iter().find(|known| known.name == bitmap);
            let known = known.ok_or_else(|| senseless(format!("there is no bitmap {bitmap}")))?;
            if known.recording || known.inconsistent {
                return Err(senseless(format!("{known:?} has not ended")));
            }
            let export = json!({"type": "nbd", "id": format!("{PREFIX}{node}"), "node-name": node,
                                "name": node, "writable": false, "bitmaps": [bitmap]});
            qmp.execute("block-export-add", Some(export)).await?;
            let extents = list(img, socket, node, &bitmap).await?;
            let ranges = dirty_ranges(&extents, of_node.image.virtual_size, known.granularity, known.count);
            all.push(ranges.map_err(senseless)?);
        }
        Ok(all)
    };
    let listed = listed.await;
    stop_serving(qmp).await?;
    let _ = std::fs::remove_file(socket);
    listed
}

fn fresh_socket(path: &Path) -> io::Result<OwnedFd> {
    durable::remove(path)?;
    unix_socket::bind(path).map(OwnedFd::from)
}

/// Closes the NBD server and with it its exports, if there is one.
async fn stop_serving(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp.execute("nbd-server-stop", None).await {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Node {
    node_name: String,
    image: Image,
    #[serde(default)]
    dirty_bitmaps: Vec<Bitmap>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    virtual_size: u64,
}

#[derive(Debug, Deserialize)]
struct Bitmap {
    #[serde(default)]
    name: String,
    recording: bool,
    granularity: u64,
    /// Bytes marked, in whole granules.
    count: u64,
    #[serde(default)]
    inconsistent: bool,
}

async fn query(qmp: &Qmp) -> Result<Vec<Node>, QmpError> {
    const COMMAND: &str = "query-named-block-nodes";
    let nodes: Vec<Value> = serde_json::from_value(qmp.execute(COMMAND, Some(json!({"flat": true}))).await?)
        .map_err(|e| QmpError::Malformed { command: COMMAND, what: e.to_string() })?;
    nodes
        .into_iter()
        // Nodes of other kinds are described otherwise; ours have an image and bitmaps.
        .filter(|node| node.get("dirty-bitmaps").is_some())
        .map(|node| {
            serde_json::from_value(node)
                .map_err(|e| QmpError::Malformed { command: COMMAND, what: e.to_string() })
        })
        .collect()
}

/// One stretch of a disk as `qemu-img map` tells it. Where a bitmap takes the place of the
/// allocation, what is marked is shown as not data.
#[derive(Clone, Debug, Deserialize)]
struct Extent {
    start: u64,
    length: u64,
    data: bool,
}

async fn list(
    img: &Path,
    socket: &Path,
    node: &'static str,
    bitmap: &str,
) -> Result<Vec<Extent>, BitmapError> {
    let failed = |reason: String| BitmapError::List { node, reason };
    // Named from within its directory: the whole path may be longer than a socket's address holds.
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name().and_then(|name| name.to_str())) else {
        return Err(failed("the socket has no name".into()));
    };
    let disk = json!({"driver": "nbd", "export": node, "server": {"type": "unix", "path": name},
                      "x-dirty-bitmap": format!("qemu:dirty-bitmap:{bitmap}")});
    let mut child = Command::new(img)
        .args(["map", "--output=json", &format!("json:{disk}")])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| BitmapError::Run { path: img.to_owned(), source })?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let work = async {
        let (out, err) = tokio::join!(bounded(out, LIST_BYTES_MAX), bounded(err, COMPLAINT_BYTES_MAX));
        (child.wait().await, out, err)
    };
    let (status, out, err) = tokio::time::timeout(LIST_TIMEOUT, work)
        .await
        .map_err(|_| failed(format!("it took longer than {} s", LIST_TIMEOUT.as_secs())))?;
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => {
            return Err(failed(format!("{status}: {}", String::from_utf8_lossy(&err).escape_debug())));
        }
        Err(error) => return Err(failed(error.to_string())),
    }
    if out.len() as u64 > LIST_BYTES_MAX {
        return Err(failed(format!("the list has more than {LIST_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(&out).map_err(|e| failed(e.to_string()))
}

/// Reads a stream to its end and keeps one byte more than `limit` of it at most.
async fn bounded(stream: Option<impl AsyncRead + Unpin>, limit: u64) -> Vec<u8> {
    let mut kept = Vec::new();
    if let Some(mut stream) = stream {
        let _ = (&mut stream).take(limit + 1).read_to_end(&mut kept).await;
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    }
    kept
}

/// What is marked, if the list covers the disk without a gap and marks as many granules as QEMU
/// itself counts: a list that was misunderstood must not be taken for an unchanged disk.
fn dirty_ranges(
    extents: &[Extent],
    disk_bytes: u64,
    granularity: u64,
    count: u64,
) -> Result<Vec<Range<u64>>, String> {
    if !granularity.is_power_of_two() {
        return Err(format!("a granularity of {granularity}"));
    }
    let mut at: u64 = 0;
    let mut ranges: BTreeMap<u64, u64> = BTreeMap::new();
    for extent in extents {
        let end = at.checked_add(extent.length).filter(|end| extent.start == at && *end <= disk_bytes);
        let end = end.ok_or_else(|| format!("{extent:?} follows byte {at} of {disk_bytes}"))?;
        if !extent.data && end > at {
            match ranges.last_entry() {
                Some(mut last) if *last.get() == at => *last.get_mut() = end,
                _ => drop(ranges.insert(at, end)),
            }
        }
        at = end;
    }
    if at != disk_bytes {
        return Err(format!("it ends at byte {at} of {disk_bytes}"));
    }
    let granules = |(start, end): (&u64, &u64)| {
        (end.div_ceil(granularity) - start / granularity).saturating_mul(granularity)
    };
    let listed = ranges.iter().map(granules).fold(0, u64::saturating_add);
    if listed != count {
        return Err(format!("{listed} bytes are listed, {count} were counted"));
    }
    Ok(ranges.into_iter().map(|(start, end)| start..end).collect())
}

/// What `qemu-img map` said, as ranges.
#[cfg(fuzzing)]
pub fn ranges_in(json: &[u8], disk_bytes: u64, granularity: u64, count: u64) -> Option<Vec<Range<u64>>> {
    let extents: Vec<Extent> = serde_json::from_slice(json).ok()?;
    dirty_ranges(&extents, disk_bytes, granularity, count).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(list: &[(u64, u64, bool)]) -> Vec<Extent> {
        list.iter()
            .map(|(start, length, data)| Extent { start: *start, length: *length, data: *data })
            .collect()
    }

    #[test]
    fn a_list_is_taken_only_if_it_adds_up() {
        const G: u64 = 64 << 10;
        let disk = 10 * G + 512;
        let good = extents(&[
            (0, G, true),
            (G, G, false),
            (2 * G, G, false),
            (3 * G, 7 * G, true),
            (10 * G, 512, false),
        ]);
        assert_eq!(dirty_ranges(&good, disk, G, 3 * G).unwrap(), [G..3 * G, 10 * G..disk]);
        assert_eq!(dirty_ranges(&extents(&[(0, disk, true)]), disk, G, 0).unwrap(), []);
        for (list, count) in [
            (good.clone(), 2 * G),
            (good[..4].to_vec(), 2 * G),
            (good[1..].to_vec(), 3 * G),
            (extents(&[(0, disk, true)]), G),
            (extents(&[(0, disk + 1, true)]), 0),
            (extents(&[(0, G, true), (G, u64::MAX, false)]), G),
            (Vec::new(), 0),
        ] {
            assert!(dirty_ranges(&list, disk, G, count).is_err(), "{list:?}");
        }
    }
}
