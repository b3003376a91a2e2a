//! Writes the seeds of `corpus/`: real objects, made by the code under test or taken from the
//! repository, and hand-made malicious ones. `deploy/fuzz --seeds` runs it.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use cicada::broker::book::ReturnRecord;
use cicada::clock::UnixMillis;
use cicada::component::manifest::Meta;
use cicada::component::{
    BlockExtent, DiskParameters, Entry, EntryKind, ExtentList, Fragment, FragmentRule, Kind, Manifest,
    PackRef, Recipe,
};
use cicada::disk::OverlayWriter;
use cicada::interface::{CloudRequest, ContentRequest, MoveRequest, Request};
use cicada::migration::envelope::{LIFETIME, VERSION};
use cicada::migration::message::{CheckAnswer, Initialization, Pass, Seed, StageAccount};
use cicada::migration::records::{Arrival, GivenUp, Ownership, VmRecord};
use cicada::migration::{AnswerBody, Denial, DenialCode, Envelope, HandOver, RequestBody};
use cicada::repository::RefKind;
use cicada::repository::fuzzing as files;
use cicada::stanza::{self, Cloud, cloud::Capacity};
use cicada::transfer::fuzzing::{Frame, Request as Fetch};
use cicada::transfer::{Encoding, ObjectKey, PackRange, PackWish, Refusal, Ticket};
use cicada::types::{
    BlockHash, ByteSize, ComponentId, Hash, IdentityKey, ImageDigest, MapId, MigrationId, PackId, RecipeId,
    VmId,
};
use cicada::vm::chunk_map::Block;
use cicada::vm::{ChunkMap, Firmware, MapRef, VmSpec};
use serde::Serialize;
use uuid::Uuid;
use xmpp_parsers::minidom::Element;

use crate::control::{NOW, parties};
use crate::{pack, work_dir};

/// Of a recording that is a seed.
const RECORDED_LINES: usize = 24;

struct Corpus<'a> {
    dir: &'a Path,
}

impl Corpus<'_> {
    fn put(&self, target: &str, name: &str, bytes: &[u8]) {
        let dir = self.dir.join(target);
        fs::create_dir_all(&dir).expect("the corpus can be written");
        fs::write(dir.join(format!("seed-{name}")), bytes).expect("the corpus can be written");
    }
    /// With the byte that selects a format in front.
    fn pick(&self, target: &str, name: &str, selector: u8, bytes: &[u8]) {
        self.put(target, name, &[&[selector], bytes].concat());
    }
}

pub fn write(dir: &Path) {
    fs::create_dir_all(work_dir()).expect("the work directory can be written");
    let corpus = Corpus { dir };
    content(&corpus);
    packs(&corpus);
    deltas(&corpus);
    maps(&corpus);
    extents(&corpus);
    disks(&corpus);
    texts(&corpus);
    control(&corpus);
    journal(&corpus);
    recording(&corpus);
    edges(&corpus);
    machines(&corpus);
}

fn manifest() -> Manifest {
    let meta = Meta { mode: 0o755, uid: 0, gid: 7, mtime_s: 1_700_000_000 };
    let entry = |path: &str, kind| Entry { path: path.into(), meta, xattrs: vec![], kind };
    let file = |size_bytes, offset_bytes| EntryKind::File {
        size_bytes,
        hash: Hash::of(b"x"),
        pack: 0,
        offset_bytes,
    };
    let mut entries = vec![
        entry("", EntryKind::Directory),
        entry("a", EntryKind::Directory),
        entry("a/b", file(5000, 4096)),
        entry("a/c", EntryKind::HardLink { target: b"a/b".to_vec() }),
        entry("a/e", EntryKind::File { size_bytes: 0, hash: Hash::of(b""), pack: 0, offset_bytes: 0 }),
        entry("a/l", EntryKind::Symlink { target: b"../..".to_vec() }),
        entry("dev", EntryKind::Directory),
        entry("dev/fifo", EntryKind::Fifo),
        entry("dev/null", EntryKind::CharDevice { major: 1, minor: 3 }),
        entry("dev/sda", EntryKind::BlockDevice { major: 8, minor: 0 }),
        entry("dev/sock", EntryKind::Socket),
        entry("etc", EntryKind::Directory),
        entry("gone", EntryKind::Whiteout),
    ];
    entries[2].xattrs = vec![("security.capability".into(), vec![1; 20]), ("user.a".into(), vec![])];
    let fragment = |path: &str, rule, records: &[(&str, &str)]| Fragment {
        path: path.into(),
        rule,
        meta,
        records: records.iter().map(|(k, r)| (k.as_bytes().to_vec(), r.as_bytes().to_vec())).collect(),
    };
    Manifest {
        name: "redis".into(),
        version: "7.0.15-1".into(),
        kind: Kind::Program,
        architecture: "amd64".into(),
        origin: "Debian 12".into(),
        licences: vec!["BSD-3-Clause".into(), "MIT".into()],
        requires: vec![ComponentId::of(b"os")],
        conflicts: vec!["valkey".into()],
        packs: vec![PackRef {
            id: PackId::of(b"p"),
            size_bytes: 12288,
            package: "redis-server".into(),
            package_version: "5:7.0.15-1".into(),
        }],
        entries,
        fragments: vec![
            fragment(
                "etc/group",
                FragmentRule::Groups,
                &[("adm", "adm:x:4:redis"), ("redis", "redis:x:120:")],
            ),
            fragment(
                "etc/passwd",
                FragmentRule::Accounts,
                &[("redis", "redis:x:120:120:Redis:/var/lib/redis:/usr/sbin/nologin")],
            ),
        ],
    }
}

fn recipe() -> Recipe {
    let components = vec![ComponentId::of(b"a"), ComponentId::of(b"b")];
    let disk = DiskParameters::derived(&components, 2 << 30, 32 << 20, "console=ttyS0");
    Recipe {
        composer: "cicada-ext4/1".into(),
        components,
        ordered: true,
        disk,
        image_digest: ImageDigest::of(b"i"),
    }
}

type Spoil = fn(&mut Manifest);

/// What a hostile builder would try; none of them decodes.
const SPOILT: [(&str, Spoil); 9] = [
    ("traversal", |m| m.entries[12].path = b"../x".to_vec()),
    ("absolute", |m| m.entries[12].path = b"/x".to_vec()),
    ("duplicate", |m| m.entries[12] = m.entries[11].clone()),
    ("below-a-link", |m| m.entries[5].path = b"a/b/c".to_vec()),
    ("hard-link-to-nothing", |m| m.entries[3].kind = EntryKind::HardLink { target: b"zz".to_vec() }),
    ("outside-its-pack", |m| m.packs[0].size_bytes = 4096),
    ("whole-and-part", |m| m.fragments[0].path = b"a".to_vec()),
    ("smuggled-record", |m| m.fragments[1].records[0].1 = b"redis:x:1:1:::\nroot::0:0:::".to_vec()),
    ("offset-overflows", |m| {
        m.entries[2].kind =
            EntryKind::File { size_bytes: u64::MAX, hash: Hash::of(b""), pack: 0, offset_bytes: 4096 };
    }),
];

fn content(corpus: &Corpus<'_>) {
    let sound = manifest();
    corpus.put("manifest", "program", &sound.encode());
    let mut os = manifest();
    (os.kind, os.requires, os.fragments) = (Kind::Os, vec![], vec![]);
    corpus.put("manifest", "os", &os.encode());
    for (name, spoil) in SPOILT {
        let mut m = sound.clone();
        spoil(&mut m);
        corpus.put("manifest", name, &m.encode());
    }
    let mut claims = sound.encode();
    claims.truncate(40);
    claims.extend([0xff; 9]);
    corpus.put("manifest", "counts-that-lie", &claims);

    let recipe = recipe().encode();
    corpus.pick("records", "recipe", 0, &recipe);
    corpus.pick("records", "record", 1, &files::write_record(&recipe).expect("memory is written to"));
    let bomb = files::write_record(&vec![0; 8 << 20]).expect("memory is written to");
    corpus.pick("records", "record-bomb", 1, &bomb);
    corpus.pick("records", "record-window", 1, &wide_window(b"CICZST\0\x01", 64));
    let sealed = files::write_ref(RefKind::Vm, "web-1", b"value");
    corpus.pick("records", "ref-sealed", 2, &[&[1], &sealed[..]].concat());
    corpus.pick("records", "ref", 2, &[&[1], &sealed[..sealed.len() - 32]].concat());
    let (_, nodes) = map().to_tree();
    let mut bundle = b"CICNDB\0\x01".to_vec();
    for (hash, bytes) in &nodes {
        bundle.extend((bytes.len() as u32).to_le_bytes());
        bundle.extend(hash.as_bytes());
        bundle.extend(bytes);
    }
    corpus.pick("records", "bundle", 3, &bundle);
    corpus.pick("records", "hand-over", 4, &hand_over().encode());
    corpus.pick("records", "map", 5, &[&4096u32.to_le_bytes()[..], &(1u64 << 44).to_le_bytes()].concat());
    fragments(corpus);
}

fn fragments(corpus: &Corpus<'_>) {
    let files: [(&str, u8, [&str; 3]); 7] = [
        (
            "passwd",
            0,
            ["root:x:0:0:root:/root:/bin/bash\n", "redis:x:120:120::/:/bin/false\n", "pg:x:120:1:::\n"],
        ),
        ("group", 1, ["adm:x:4:\nroot:x:0:\n", "adm:x:4:redis\nroot:x:0:\nredis:x:120:\n", "adm:x:4:b,a\n"]),
        ("subuid", 2, ["a:100000:65536\na:200000:65536\n", "b:1:2\n", "b:1:3\n"]),
        ("gshadow", 3, ["adm:*::\n", "adm:*::redis\n", "adm:!::\n"]),
        ("triggers", 4, ["/usr/lib x\n", "/usr/lib x\n/etc y\n", "\n"]),
        ("diversions", 5, ["/a\n/b\ndash\n", "/c\n/d\n:\n", "/a\n"]),
        (
            "status",
            6,
            [
                "Package: a\nStatus: ok\n\nPackage: b\nStatus: ok\n\n",
                "Name: q/x\nTemplate: q/x\nOwners: a, b\n\n",
                "Name: q/x\nTemplate: q/x\nOwners: c\n\n",
            ],
        ),
    ];
    for (name, rule, parts) in files {
        corpus.pick("fragments", name, rule, &parts.map(str::as_bytes).join(&0xff));
    }
}

/// A zstd frame whose header asks for a window of 128 MiB, behind `magic` and a size.
fn wide_window(magic: &[u8], size_bytes: u64) -> Vec<u8> {
    // Magic, no content size and no checksum, window descriptor 2^(10+17), a last raw block.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3];
    frame.extend([(64 << 3) as u8 | 1, (64u32 << 3 >> 8) as u8, 0]);
    frame.extend([7; 64]);
    [magic, &size_bytes.to_le_bytes(), &frame].concat()
}

fn packs(corpus: &Corpus<'_>) {
    let header =
        |size: u64| [&b"CICPAK\0\x02"[..], &size.to_le_bytes(), &(1u64 << 20).to_le_bytes()].concat();
    let framed = |size: u64, frames: &[&[u8]]| {
        let mut out = header(size);
        for frame in frames {
            out.extend((frame.len() as u32).to_le_bytes());
            out.extend(*frame);
        }
        out
    };
    let zeros = |len: usize| zstd::bulk::compress(&vec![0; len], 3).expect("memory is written to");
    let text = zstd::bulk::compress(&b"lorem ipsum ".repeat(342)[..4096], 3).expect("memory is written to");
    corpus.pick("pack", "plain", 9, &framed(4096, &[&[5; 4096]]));
    corpus.pick("pack", "packed", 1, &framed(4096, &[&text]));
    corpus.pick("pack", "two-frames", 255, &framed((1 << 20) + 4096, &[&zeros(1 << 20), &text]));
    corpus.pick("pack", "bomb", 3, &framed(4096, &[&zeros(64 << 20)]));
    corpus.pick("pack", "short-frame", 3, &framed(8192, &[&text]));
    corpus.pick("pack", "giant", 3, &framed(1 << 42, &[&text]));
    let mut lies = framed(4096, &[&text]);
    lies[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    corpus.pick("pack", "length-that-lies", 3, &lies);
    corpus.pick("pack", "more-after-the-end", 3, &[framed(4096, &[&text]), vec![0]].concat());
    corpus.pick("pack", "window", 3, &framed(4096, &[&wide_window(b"", 0)[8..]]));
}

fn deltas(corpus: &Corpus<'_>) {
    let base = pack::delta_base(3);
    let version = [&base[..4096], &[7; 4096], &base[4096..]].concat();
    let good = cicada::repository::fuzzing::make_delta(&version, &base);
    corpus.pick("delta", "version", 3, &good);
    corpus.pick("delta", "another-base", 4, &good);
    corpus.pick("delta", "cut", 3, &good[..good.len() - 9]);
    for (name, at) in
        [("size-that-lies", 8), ("length-that-lies", 56), ("offset-that-lies", 60), ("region-that-lies", 68)]
    {
        let mut lies = good.clone();
        lies[at..at + 4].copy_from_slice(&0x7fff_f000u32.to_le_bytes());
        corpus.pick("delta", name, 3, &lies);
    }
}

fn map() -> ChunkMap {
    let blocks =
        [(0, Block::Zero), (7, Block::Data(BlockHash::of(b"7"))), (300, Block::Data(BlockHash::of(b"300")))];
    ChunkMap { block_size_bytes: 4096, disk_size_bytes: 4 << 20, blocks: blocks.to_vec() }
}

fn maps(corpus: &Corpus<'_>) {
    for (i, (_, bytes)) in map().to_tree().1.iter().enumerate() {
        corpus.pick("chunk-map", &format!("node-{i}"), 1, bytes);
    }
    // Blocks of 4 KiB are 2^(24/2).
    let tree = |bits: u8, size: u64, nodes: &[&[u8]]| {
        let mut out = vec![bits];
        out.extend(size.to_le_bytes());
        nodes.iter().for_each(|n| out.extend(*n));
        out
    };
    corpus.put("chunk-map", "leaf", &tree(24, 1 << 20, &[&[0, 1, 3, 0, 9, 1]]));
    corpus.put("chunk-map", "two-levels", &tree(24, 4 << 20, &[&[0, 0, 3, 1], &[1, 1, 0, 0, 3, 0]]));
    corpus.put("chunk-map", "level-255", &tree(24, 4 << 20, &[&[0, 0, 3, 1], &[255, 0, 0, 0]]));
    corpus.put(
        "chunk-map",
        "wrong-child",
        &tree(24, 4 << 20, &[&[0, 0, 3, 1], &[1, 0, 0, 0], &[1, 0, 0, 1]]),
    );
    corpus.put("chunk-map", "beyond-the-disk", &tree(24, 4096, &[&[0, 0, 3, 1]]));
    // One leaf, named 256 times by one node, that 256 times by the next: a disk of 16 TiB in 2 KiB.
    let mut full: Vec<Vec<u8>> = vec![vec![0, 255]];
    (0..=255u8).for_each(|p| full[0].extend([p, 1]));
    for level in 1..4u8 {
        let mut node = vec![level, 255];
        (0..=255u8).for_each(|p| node.extend([p, level - 1]));
        full.push(node);
    }
    let full: Vec<&[u8]> = full.iter().map(Vec::as_slice).collect();
    corpus.put("chunk-map", "one-leaf-everywhere", &tree(24, 1 << 44, &full));
}

fn extents(corpus: &Corpus<'_>) {
    let run = |disk_block, pack, pack_block, blocks| BlockExtent { disk_block, pack, pack_block, blocks };
    let put = |name: &str, extents: &[BlockExtent]| {
        let list = ExtentList { disk_size_bytes: 16 << 20, extents: extents.to_vec() };
        corpus.pick("extents", name, 64, &list.encode());
    };
    put("none", &[]);
    put("runs", &[run(0, 3, 7, 1), run(1, 1, 63, 1), run(9, 1, 0, 63), run(500, 3, 999_000, 1000)]);
    put("overlap", &[run(5, 1, 0, 10), run(3, 1, 0, 10)]);
    put("beyond-the-disk", &[run(4090, 1, 0, 10)]);
    put("beyond-the-pack", &[run(0, 1, 60, 10)]);
    put("its-own-pack", &[run(0, 0, 0, 1)]);
    put("around-the-end", &[run(u64::MAX - 3, 1, 0, 8), run(0, 1, u64::MAX - 3, 8)]);
    let many: Vec<BlockExtent> = (0..2000).map(|i| run(2 * i, 3, 999 * i % 100_000, 1)).collect();
    put("many", &many);
}

fn disks(corpus: &Corpus<'_>) {
    let (base, overlay) = (work_dir().join("base"), work_dir().join("overlay"));
    fs::write(&base, vec![3; 256 << 10]).expect("the work directory can be written");
    let mut writer =
        OverlayWriter::open_or_create(&overlay, &base, 256 << 10).expect("an overlay can be made");
    for number in (0..60).step_by(9) {
        writer.write_block(number, &[0; 4096]).expect("an overlay can be written");
        writer.write_zero(number + 1).expect("an overlay can be written");
    }
    writer.finish().expect("an overlay can be written");
    let honest = fs::read(&overlay).expect("an overlay can be read");
    corpus.put("disk", "overlay", &pieces(&honest));
    // Clusters of 512 bytes: header, L1 at 512, L2 at 1024, data at 1536.
    let mut small = vec![0; 2048];
    for (at, bytes) in [
        (0, &b"QFI\xfb\0\0\0\x03"[..]),
        (20, &9u32.to_be_bytes()),
        (24, &(8u64 << 10).to_be_bytes()),
        (36, &1u32.to_be_bytes()),
        (40, &512u64.to_be_bytes()),
        (96, &4u32.to_be_bytes()),
        (100, &104u32.to_be_bytes()),
        (512, &(1024u64 | 1 << 63).to_be_bytes()),
        (1024, &(1536u64 | 1 << 63).to_be_bytes()),
        (1032, &1u64.to_be_bytes()),
        (1536, &[7; 8]),
    ] {
        small[at..at + bytes.len()].copy_from_slice(bytes);
    }
    corpus.put("disk", "small-clusters", &pieces(&small));
    for (name, at, number) in [
        ("table-beyond", 512, 1u64 << 50),
        ("data-beyond", 1024, 1 << 50),
        ("giant", 24, 1 << 44),
        ("table-is-itself", 512, 512),
        ("header-as-table", 40, 0),
    ] {
        let mut bent = small.clone();
        bent[at..at + 8].copy_from_slice(&number.to_be_bytes());
        corpus.put("disk", name, &pieces(&bent));
    }
}

/// As the target `disk` puts it together again.
fn pieces(file: &[u8]) -> Vec<u8> {
    let mut out = (file.len().div_ceil(512) as u32).to_le_bytes().to_vec();
    let units: Vec<&[u8]> = file.chunks(8).collect();
    let mut at = 0;
    while at < units.len() {
        if units[at].iter().all(|b| *b == 0) {
            at += 1;
            continue;
        }
        let bytes: Vec<u8> = units[at..]
            .iter()
            .take(31)
            .copied()
            .take_while(|u| u.iter().any(|b| *b != 0))
            .flatten()
            .copied()
            .collect();
        out.extend(&(at as u32).to_le_bytes()[..3]);
        out.push(bytes.len() as u8);
        at += bytes.len().div_ceil(8);
        out.extend(bytes);
    }
    out
}

fn texts(corpus: &Corpus<'_>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| fs::read(root.join(path)).expect("it is in the repository");
    for name in
        ["format-uefi-gpt", "kernel-tiny", "os-debian-12-minimal", "program-redis", "program-tiny-httpd"]
    {
        corpus.put("definition", name, &read(&format!("components/{name}.toml")));
    }
    let stars = b"name='a'\nkind='os'\nversion='1'\norigin='x'\nmethod='bootstrap'\nsuite='s'\n\
                  exclude=['**a**a**a**a**a**a**a**b']\n";
    corpus.put("definition", "stars", stars);
    let sample = String::from_utf8(read("federation.toml")).expect("it is text");
    let plain: String = sample
        .lines()
        .map(|l| l.trim_start_matches("# "))
        .filter(|l| l.contains('=') || l.starts_with('['))
        .fold(String::new(), |text, line| text + line.split(" #").next().unwrap_or(line) + "\n");
    corpus.put("config", "sample", sample.as_bytes());
    corpus.put("config", "everything", plain.as_bytes());
    let least = "[cloud]\nname='a'\n[xmpp]\njid='a@b'\npassword_file='p'\nroom='r@c'\n";
    let environment = "CICADA_TRANSFER__ADVERTISE=a,b:1\nCICADA_XMPP__ROOM=x@y\nmigration.accept_from=c@d,e@f\nhypervisor.cpus=3\n";
    corpus.put("config", "environment", format!("{least}\n#env\n{environment}").as_bytes());
    corpus.put("config", "nested", format!("{least}x={}", "[".repeat(300)).as_bytes());
}

fn hand_over() -> HandOver {
    let (key, from, to) = parties();
    HandOver {
        vm: VmId(Uuid::from_bytes([1; 16])),
        migration: MigrationId(Uuid::from_bytes([2; 16])),
        epoch: 2,
        source: from.clone(),
        source_key: key.public(),
        target: to.clone(),
        target_key: IdentityKey::from_secret_bytes(&[2; 32]).public(),
        recipe: recipe().id(),
        root_delta: MapId::of(b"d"),
        user_data: MapId::of(b"u"),
        issued: NOW,
        provenance: None,
    }
}

fn spec() -> VmSpec {
    let nic = r#"{"network":"lan","mac":"52:54:00:0a:0b:0c"}"#;
    VmSpec {
        id: VmId(Uuid::from_bytes([1; 16])),
        name: "web-1".parse().expect("a name"),
        cpus: 2,
        memory: ByteSize::gib(1),
        recipe: recipe().id(),
        root_size: ByteSize::gib(2),
        user_data_size: ByteSize::mib(64),
        nics: vec![serde_json::from_str(nic).expect("a card")],
        architecture: "amd64".into(),
        cpu_model: "qemu64".into(),
        firmware: Firmware::Uefi,
        disk_bus: Default::default(),
        system_uuid: None,
    }
}

fn seed() -> Seed {
    let root_delta = map().to_tree().0;
    Seed {
        root_delta,
        user_data: MapRef { block_size_bytes: 16 << 10, disk_size_bytes: 64 << 20, root: None },
    }
}

fn control(corpus: &Corpus<'_>) {
    let target_key = IdentityKey::from_secret_bytes(&[2; 32]);
    let signed = hand_over().sign(&parties().0);
    let init = Initialization {
        spec: spec(),
        recipe: BASE64.encode(recipe().encode()),
        component_names: vec!["a@1".into(), "b@2".into()],
        component_bytes: 9,
        pass: Pass { number: 1, last: true, root_delta: seed().root_delta, user_data: seed().user_data },
        addresses: vec!["192.0.2.1:7420".into()],
        source_key: parties().0.public(),
        ticket: "07".repeat(32),
        firmware: Some(BASE64.encode(zstd::bulk::compress(&[0; 500], 3).expect("memory is written to"))),
    };
    let requests = [
        (
            "configuration",
            RequestBody::Configuration { spec: spec(), components: recipe().components, packs: vec![] },
        ),
        ("reservation", RequestBody::Reservation { spec: spec() }),
        ("initialization", RequestBody::Initialization(Box::new(init))),
        ("start", RequestBody::Start { hand_over: signed.clone(), run: true }),
        ("cancel", RequestBody::Cancel { reason: "x".into() }),
        ("delete", RequestBody::Delete { boot_ms: Some(7) }),
    ];
    let denial = Denial::new(DenialCode::Busy, "later").next("wait");
    let lacking = CheckAnswer {
        differences: vec![denial.clone()],
        blockers: vec![],
        components_lacking: vec![0, 7],
        packs_lacking: vec![],
        seed: Some(seed()),
        kept: None,
        composed: true,
        reads_devices: true,
    };
    let receipt = signed.clone().accept(&target_key);
    let account = StageAccount::default();
    let answers = [
        ("checked", AnswerBody::Configuration(lacking)),
        ("staged", AnswerBody::Staged { pass: 1, account: account.clone() }),
        ("started", AnswerBody::Started { receipt, running: false, problem: Some("p".into()), account }),
        (
            "returned",
            AnswerBody::Returned { back: signed.clone().give_back(&target_key), denial: denial.clone() },
        ),
        ("stopping", AnswerBody::Stopping),
        ("suspended", AnswerBody::Suspended),
        ("denied", AnswerBody::Denied(denial)),
    ];
    fn enveloped<T: Serialize>(body: T) -> Vec<u8> {
        let (_, from, to) = parties();
        let envelope = Envelope {
            version: VERSION,
            from: from.clone(),
            to: to.clone(),
            migration: MigrationId(Uuid::from_bytes([2; 16])),
            vm: VmId(Uuid::from_bytes([1; 16])),
            epoch: 1,
            nonce: "0".repeat(32),
            issued: NOW,
            expires: NOW.plus(LIFETIME),
            body,
        };
        serde_json::to_vec(&envelope).expect("a message can be written")
    }
    requests.into_iter().for_each(|(name, body)| corpus.pick("negotiation", name, 0, &enveloped(body)));
    answers.into_iter().for_each(|(name, body)| corpus.pick("negotiation", name, 1, &enveloped(body)));
    let mut other_spelling = signed.clone();
    other_spelling.record = other_spelling.record.replacen("00", "+0", 1);
    let start = RequestBody::Start { hand_over: other_spelling, run: true };
    corpus.pick("negotiation", "hand-over-spelt-otherwise", 0, &enveloped(start));
    corpus.pick("negotiation", "nested", 0, "[".repeat(2000).as_bytes());
    corpus.pick("negotiation", "forged", 2, &[&[9; 64], &enveloped(RequestBody::Stop)[..]].concat());

    let cloud = Cloud {
        name: "alpine".into(),
        key: parties().0.public().to_string().into(),
        versions: "1".into(),
        software: Some("cicada 0.1.0".into()),
        region: Some("eu".into()),
        power: "on".into(),
        load: Some(7),
        carbon: Some(40.5),
        price: Some(0.02),
        capacity: Some(Capacity {
            cpus: 4,
            cpus_free: 3,
            memory: 9,
            memory_free: 8,
            storage: 7,
            storage_free: 6,
        }),
        features: vec!["tcg".into(), "network:lan".into()],
        successions: Vec::new(),
    };
    let xml = |element: &Element| String::from(element);
    let cloud = xml(&Element::from(cloud));
    let presence = format!(
        "<presence xmlns='jabber:client' from='r@c/b' to='a@example.org/cicada' id='p'>{cloud}\
         <x xmlns='http://jabber.org/protocol/muc#user'><item affiliation='member' role='participant' \
         jid='b@example.org/cicada'/><status code='100'/></x></presence>"
    );
    let sealed = vec![7; 100];
    let request = xml(&Element::from(stanza::Request { sealed: sealed.clone() }));
    for (name, text) in [
        ("cloud", cloud),
        ("presence", presence),
        ("removed", "<presence xmlns='jabber:client' type='unavailable' from='r@c/a'><x xmlns='http://jabber.org/protocol/muc#user'><item affiliation='none' role='none'/><status code='110'/><status code='321'/></x></presence>".into()),
        ("refused", "<presence xmlns='jabber:client' type='error' from='r@c/a'><error type='auth'><registration-required xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></presence>".into()),
        ("message", "<message xmlns='jabber:client' type='groupchat' from='r@c'><x xmlns='http://jabber.org/protocol/muc#user'><status code='104'/></x></message>".into()),
        ("iq", format!("<iq xmlns='jabber:client' type='set' id='1' from='b@example.org/cicada'>{request}</iq>")),
        ("request", request),
        ("answer", xml(&Element::from(stanza::Answer { sealed }))),
        ("admin", "<query xmlns='http://jabber.org/protocol/muc#admin'><item affiliation='owner' jid='a@b'/></query>".into()),
        ("owner", "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='form'><field var='a' type='boolean'><value>1</value></field></x></query>".into()),
        ("error", "<error xmlns='jabber:client' type='wait'><resource-constraint xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/><text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas' xml:lang='en'>busy</text></error>".into()),
        ("deep", format!("<presence xmlns='jabber:client'>{}{}</presence>", "<a>".repeat(400), "</a>".repeat(400))),
        ("entities", "<!DOCTYPE a [<!ENTITY b 'bb'>]><a>&b;</a>".into()),
    ] {
        corpus.put("stanzas", name, text.as_bytes());
    }

    let keys = vec![
        ObjectKey::Block(BlockHash::of(b"b")),
        ObjectKey::Pack(PackId::of(b"p")),
        ObjectKey::Manifest(ComponentId::of(b"m")),
        ObjectKey::Recipe(RecipeId::of(b"r")),
    ];
    let wish = PackWish { bases: vec![PackId::of(b"base")], begun: Some(([3; 16], 70_000)) };
    let request = Fetch { ticket: Ticket::from_bytes([1; 32]), keys, wishes: vec![wish] };
    corpus.pick("frames", "request", 0, &request.encode());
    let range = PackRange { tag: [3; 16], offset_bytes: 70_000, stored_size_bytes: 100_000 };
    let packed = |len: usize| zstd::bulk::compress(&vec![0; len], 1).expect("memory is written to");
    for (name, frame) in [
        ("refused", Frame::Refused { reason: Refusal::NotHeld, count: 3 }),
        ("small", Frame::Small { zstd: false, sizes_bytes: vec![3, 0, 2], payload: b"abcde"[..].into() }),
        ("packed", Frame::Small { zstd: true, sizes_bytes: vec![4096, 4096], payload: packed(8192).into() }),
        ("bomb", Frame::Small { zstd: true, sizes_bytes: vec![200_000], payload: packed(32 << 20).into() }),
        ("large", Frame::Large { encoding: Encoding::Zstd { plain_size_bytes: 9 }, size_bytes: 7 }),
        ("pack", Frame::Large { encoding: Encoding::StoredPack(range), size_bytes: 1 << 42 }),
        ("delta", Frame::Large { encoding: Encoding::PackDelta(range), size_bytes: 900 }),
        ("working", Frame::Working),
    ] {
        corpus.pick("frames", name, 1, &frame.encode());
    }
    corpus.pick("frames", "length-that-lies", 1, &[2, 255, 255, 255, 255]);
    corpus.pick("frames", "object", 32 * 3 + 2, &packed((32 * 3 + 2) << 8));
    corpus.pick("frames", "object-window", 2, &wide_window(b"", 0)[8..]);
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("a record can be written")
}

fn journal(corpus: &Corpus<'_>) {
    let (_, from, to) = parties();
    let target_key = IdentityKey::from_secret_bytes(&[2; 32]);
    let signed = hand_over().sign(&parties().0);
    let receipt = signed.clone().accept(&target_key);
    let migration = MigrationId(Uuid::from_bytes([2; 16]));
    let mut record = VmRecord::new(spec(), vec!["a@1".into()], "disks", UnixMillis(5));
    record.arrival = Some(Arrival {
        migration,
        from: from.clone(),
        from_key: parties().0.public(),
        receipt: receipt.clone(),
        acknowledged: false,
        contested: None,
    });
    let put = |name: &str, selector, json: Vec<u8>| corpus.pick("journal", name, selector, &json);
    put("vm", 0, json(&record));
    record.ownership = Ownership::GivenUp(Box::new(GivenUp {
        migration,
        to: to.clone(),
        to_key: target_key.public(),
        record: signed.record.clone(),
        was_running: true,
        since: NOW,
        seed: Some(seed()),
        receipt: Some(receipt),
        scrub_after: None,
    }));
    put("vm-given-up", 0, json(&record));
    put("return", 2, json(&ReturnRecord { vm: spec().id, epoch: 2, hand_over: Some(signed) }));
    let migration =
        include_bytes!("../../fixtures/before/data/migrations/1b41a807-3ebf-4616-a98c-cedca7aedc28.json");
    put("migration", 1, migration.to_vec());
    for (name, request) in [
        ("status", Request::Cloud(CloudRequest::Status)),
        (
            "component-show",
            Request::Content(ContentRequest::ComponentShow { component: "redis".into(), entries: true }),
        ),
        (
            "recipe-create",
            Request::Content(ContentRequest::RecipeCreate {
                components: vec!["a".into()],
                ordered: false,
                root_size: ByteSize::gib(2),
                kernel_command_line: "quiet".into(),
            }),
        ),
        (
            "move",
            Request::Move(MoveRequest::Begin {
                vm: "web-1".into(),
                to: Some("b".into()),
                dry_run: true,
                force_stop: false,
            }),
        ),
        (
            "trust",
            Request::Cloud(CloudRequest::IdentityTrust { member: from.clone(), key: target_key.public() }),
        ),
    ] {
        put(name, 3, json(&request));
    }
    let create = r#"{"op":"vm-create","name":"web-1","components":["a"],"ordered":false,"root_size":"2G","user_data_size":0,"memory":"1G","cpus":1,"networks":["lan"],"kernel_command_line":"","start":true}"#;
    put("vm-create", 3, create.into());
    put("held", 4, format!(r#"{{"kind":"pack","ids":["{}"]}}"#, Hash::of(b"x")).into());
    put("problem", 5, br#"{"problem":{"kind":"bad-request","object":"o","reason":"r"}}"#.to_vec());
    put("event", 5, br#"{"event":{"event":"note","text":"t"}}"#.to_vec());
    put("nested", 3, "[".repeat(2000).into());
}

/// The beginning of a recording, as it is and without its checks, and one of each kind of line.
fn recording(corpus: &Corpus<'_>) {
    let whole = include_str!("../../fixtures/before/alpine.recording");
    let some: Vec<&str> = whole.lines().take(RECORDED_LINES).collect();
    corpus.pick("recording", "begun", 0, (some.join("\n") + "\n").as_bytes());
    let bare = some.iter().filter_map(|line| line.split_once(' ')).map(|(_, json)| json);
    let end = r#"{"end":"stopped"}"#;
    corpus.pick("recording", "bare", 1, bare.chain([end]).collect::<Vec<_>>().join("\n").as_bytes());
    corpus.pick("recording", "format", 1, br#"{"format":7}"#);
    corpus.pick("recording", "nested", 1, "[".repeat(2000).as_bytes());
}

fn edges(corpus: &Corpus<'_>) {
    let key = parties().0.public();
    let put = |name: &str, selector: u8, bytes: &[u8]| corpus.pick("edges", name, selector, bytes);
    put("key", 0, &parties().0.public().spki_der());
    let small_order = [&parties().0.public().spki_der()[..12], &[0; 32]].concat();
    put("key-small-order", 0, &small_order);
    put("jid", 1, "Ä.b@Example.org".as_bytes());
    put("key-text", 1, key.to_string().as_bytes());
    put("ticket", 1, "07".repeat(32).as_bytes());
    put("odd", 2, b"<s><iq a='/>'><![CDATA[<a>]]><b/>t</iq><!-- x --></s>");
    put("deep", 2, format!("<s>{}{}</s>", "<a>".repeat(200), "</a>".repeat(200)).as_bytes());
    put("long-tag", 2, format!("<s><m><a b='{}'>x</a></m><iq c='{0}'/></s>", "y".repeat(8001)).as_bytes());
    put(
        "greeting",
        3,
        br#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": []}}"#,
    );
    put("return", 3, br#"{"return": {"status": "running"}, "id": 7}"#);
    put("refusal", 3, br#"{"id": 7, "error": {"class": "GenericError", "desc": "no"}}"#);
    put(
        "event",
        3,
        br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true}}"#,
    );
    let extents =
        br#"[{"start": 0, "length": 65536, "data": false}, {"start": 65536, "length": 65536, "data": true}]"#;
    put("map", 4, &[&131_072u64.to_le_bytes()[..], &[16, 1], extents].concat());
    let trust = std::collections::BTreeMap::from([(parties().1.clone(), key)]);
    put("trust", 5, &json(&trust));
    let receipt = hand_over().sign(&parties().0).accept(&IdentityKey::from_secret_bytes(&[2; 32]));
    put("receipt", 5, &json(&receipt));
}

/// Pairs of bytes: see `machines.rs`.
fn machines(corpus: &Corpus<'_>) {
    let put = |name: &str, steps: &[u8]| corpus.put("machines", name, steps);
    put("target", &[0, 0, 0, 1, 1, 9, 0, 1, 6, 9, 0, 2, 1, 2, 1, 11, 0, 2, 0, 12, 0, 13, 0, 2, 0, 4, 0]);
    put("target-refuses", &[0, 0, 0, 1, 5, 9, 0, 3, 1, 3, 3, 3, 5, 3, 4, 2, 0]);
    put("target-not-recorded", &[0, 1, 5, 9, 0, 2, 0, 11, 1, 2, 0, 15, 0]);
    put("target-cancelled", &[0, 1, 5, 9, 1, 1, 5, 4, 0, 4, 0, 0, 0]);
    // Staged answers name the pass: `what ^ (kind >> 3)` is its number in the low bits.
    put("source", &[1, 0, 0, 1, 0, 2, 0, 9, 1, 2, 26, 12, 0, 2, 1, 14, 0, 2, 4]);
    put(
        "source-running",
        &[3, 0, 0, 1, 0, 2, 0, 9, 1, 2, 26, 11, 0, 9, 1, 2, 2, 12, 0, 8, 0, 14, 0, 2, 5, 13, 0],
    );
    put("source-cancelled", &[3, 0, 0, 1, 0, 2, 0, 9, 1, 2, 26, 15, 0, 11, 0]);
}
