//! A simulated broker is recorded, and its recording read whole, cut, altered and of other formats.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::broker::ids::Ids;
use crate::broker::memory_book::MemoryBook;
use crate::broker::{Beginning, Broker, CallId, Input, RoomInput};
use crate::clock::SystemClock;
use crate::clock::UnixMillis;
use crate::config::Config;
use crate::federation::Members;
use crate::hypervisor::{Driver, FakeDriver};
use crate::interface::{MoveRequest, Request, Side, VmRequest};
use crate::migration::Law;
use crate::types::{ByteSize, IdentityKey, MemberJid};

use super::*;

const BEGUN: UnixMillis = UnixMillis(1_700_000_000_000);

fn key_of(name: &str) -> IdentityKey {
    IdentityKey::from_secret_bytes(Hash::of(name.as_bytes()).as_bytes())
}

fn jid_of(name: &str) -> MemberJid {
    format!("{name}@sim.example").parse().unwrap()
}

fn record(path: &Path, limit: ByteSize, steps: u64) {
    let text = "[cloud]\nname = \"a\"\ndata_dir = \"/a\"\n[xmpp]\njid = \"a@sim.example\"\npassword_file = \"/p\"\n\
                room = \"fed@rooms.sim.example\"\n";
    let beginning = Beginning {
        config: Config::of_text(text, Path::new("/")).unwrap(),
        key: Arc::new(key_of("a")),
        features: FakeDriver::new(Arc::new(SystemClock)).features().clone(),
        transfer_addresses: vec!["192.0.2.1:7420".into()],
        vms_dir: PathBuf::from("/a/vms"),
        disk_dirs: BTreeMap::new(),
        marks: Default::default(),
        ids: Ids::new([9; 32]),
        now: BEGUN,
        law: Law::WHOLE,
    };
    let trusted = BTreeMap::from([(jid_of("b"), key_of("b").public())]);
    let members = Members::new(trusted, BTreeMap::new(), false).seen_by("a".parse().unwrap());
    let mut recorder = Recorder::create(path, limit).unwrap();
    let (beginning, book) =
        recorder.wrap(beginning, Box::new(MemoryBook::default()), members.keyring().clone());
    let mut broker = Broker::open(book, members, beginning).unwrap();
    let mut step = |at: u64, input: Input| {
        let now = UnixMillis(BEGUN.0 + at);
        let before = recorder.before(&input);
        let effects = broker.step(now, input);
        recorder.after(now, before, &effects);
    };
    step(1, Input::Machines(Vec::new()));
    step(2, Input::Room(RoomInput::Joined));
    step(3, Input::Asked(crate::broker::AskId(1), jid_of("b"), b"no envelope".to_vec()));
    for at in 0..steps {
        step(4 + at, Input::Call(CallId(at), Request::Vm(VmRequest::List)));
    }
    step(1000, Input::Shutdown);
    recorder.end(End::Stopped);
}

fn replay(path: &Path) -> Result<(u64, Vec<Difference>, Option<End>), RecordingError> {
    let mut replay = Replay::open(path)?;
    let (mut steps, mut differences) = (0, Vec::new());
    while let Some(step) = replay.step()? {
        steps = step.number;
        differences.extend(step.differences);
    }
    Ok((steps, differences, replay.end))
}

#[test]
fn a_core_decides_again_what_it_decided() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recording");
    record(&path, ByteSize::mib(1), 3);
    assert_eq!(replay(&path).unwrap(), (7, Vec::new(), Some(End::Stopped)));
    let text = fs::read_to_string(&path).unwrap();
    for secret in [key_of("a").secret_bytes(), [9; 32]] {
        let hex = crate::types::hex::encode(&secret);
        use base64::Engine as _;
        let base64 = base64::engine::general_purpose::STANDARD.encode(secret);
        assert!(!text.contains(&hex) && !text.contains(&base64), "a secret is in it");
    }
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(Recorder::create(&path, ByteSize(1)), Err(RecordingError::Io { action: "create", .. })));
}

#[test]
fn it_ends_where_it_is_as_large_as_it_may_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recording");
    record(&path, ByteSize(4096), 500);
    let (steps, differences, end) = replay(&path).unwrap();
    assert!(steps < 100 && differences.is_empty() && end == Some(End::Limit), "{steps} {end:?}");
    assert!(fs::metadata(&path).unwrap().len() < 16 << 10);
}

#[test]
fn what_was_cut_altered_or_is_of_another_format_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recording");
    record(&path, ByteSize::mib(1), 3);
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let with = |text: String| {
        fs::write(&path, text).unwrap();
        replay(&path)
    };
    // Cut in the middle of a line: what was whole is read.
    assert_eq!(with(whole[..whole.len() - 30].into()).unwrap(), (7, Vec::new(), None));
    let line = |n: usize, from: &str, to: &str| {
        let mut lines: Vec<String> = lines.iter().map(|l| (*l).to_owned()).collect();
        assert!(lines[n].contains(from), "{}", lines[n]);
        lines[n] = lines[n].replace(from, to);
        lines.join("\n") + "\n"
    };
    let altered = with(line(4, "vm-list", "status"));
    assert!(matches!(altered, Err(RecordingError::Altered { line: 5 })), "{altered:?}");
    let without = [&lines[..2], &lines[3..]].concat().join("\n") + "\n";
    assert!(matches!(with(without), Err(RecordingError::Altered { line: 3 })));
    for foreign in ["", "hello\n", "{\"format\":1}\n", "\u{0}\u{1}"] {
        assert!(matches!(with(foreign.into()), Err(RecordingError::Foreign)), "{foreign:?}");
    }
    let sealed =
        |json: &str| format!("{} {json}\n", digits(&["0".repeat(CHECK_DIGITS).as_bytes(), json.as_bytes()]));
    assert!(matches!(with(sealed("{\"format\":7}")), Err(RecordingError::Format { found: 7 })));
    assert!(matches!(with(sealed("{\"format\":1}")), Err(RecordingError::Malformed { line: 1, .. })));
}

/// What the API notes of a request is part of what the core took in.
#[test]
fn who_asked_is_recorded() {
    let asked = [
        Request::Vm(VmRequest::Start { vm: "web".into(), unconfirmed: true, by_uid: Some(7) }),
        Request::Move(MoveRequest::Resolve {
            id: "0123".into(),
            owner: Side::Here,
            confirmed: true,
            by_uid: Some(7),
        }),
    ];
    for request in asked {
        let recorded = serde_json::to_value(Input::Call(CallId(1), request.clone())).unwrap();
        match serde_json::from_value(recorded).unwrap() {
            Input::Call(_, again) => assert_eq!(again, request),
            other => panic!("{other:?}"),
        }
    }
}

/// With other checks an altered recording can be made, as by a release that decides otherwise.
#[test]
fn a_core_that_decides_otherwise_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recording");
    record(&path, ByteSize::mib(1), 1);
    let mut check = "0".repeat(CHECK_DIGITS);
    let whole = fs::read_to_string(&path).unwrap();
    let altered: String = whole
        .lines()
        .map(|line| {
            let json = line[CHECK_DIGITS + 1..].replace("vm-list", "status");
            check = digits(&[check.as_bytes(), json.as_bytes()]);
            format!("{check} {json}\n")
        })
        .collect();
    fs::write(&path, altered).unwrap();
    let (_, differences, _) = replay(&path).unwrap();
    assert!(
        differences.iter().any(|d| matches!(d, Difference::Effect { recorded: Some(_), now: Some(_), .. })),
        "{differences:?}"
    );
}
