use std::path::{Path, PathBuf};

use super::*;

const GOOD: &str = r#"
[cloud]
name = "a"
data_dir = "data"
[xmpp]
jid = "cloud-a@example.org"
password_file = "password"
room = "federation@conference.example.org"
"#;

/// Every setting there is.
const FULL: &str = r#"
[cloud]
name = "a"
region = "eu north"
data_dir = "/d"
carbon_g_per_kwh = 40
price_per_hour = 0.02
[xmpp]
jid = "a@localhost"
password_file = "/p"
server = "[::1]:5222"
security = "plain"
ca_file = "/ca"
room = "r@c"
[transfer]
listen = "127.0.0.1:1"
advertise = []
peer_networks = ["10.0.0.0/8", "fd00::/8"]
bandwidth_limit = "100Mbit"
[hypervisor]
driver = "qemu"
accelerator = "tcg"
cpus = 4
memory = "2G"
cpu_overcommit = 2.5
storage_overcommit = 1
storage_floor = "256M"
cpu_model = "qemu64"
machine_type = "pc-q35-7.2"
firmware_code = "/c"
firmware_vars = "/v"
[[network]]
name = "lan"
kind = "bridge"
bridge = "br0"
[repository]
dir = "/r"
hot_cache_size = 0
gc_grace = "1h"
optimize_after = "0s"
[trust]
pinned = [{ jid = "b@x", key = "iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w=" }]
trust_on_first_use = true
[migration]
grace_period = "7d"
accept_from = ["b@x"]
requests_per_minute = 600
concurrency_per_member = 1
[members]
share = 0.25
vms_max = 5
[[member]]
jid = "b@x"
accept_vms = false
share_components = true
share = 1
vms_max = 0
cpus_max = 8
memory_max = "16G"
storage_max = 1073741824
bandwidth_limit = "10Mbit"
requests_per_minute = 60
[api]
socket = "/run/s"
"#;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("federation.toml"), text).unwrap();
        Self { dir }
    }
    fn path(&self) -> PathBuf {
        self.dir.path().join("federation.toml")
    }
    fn load(&self, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let own = |list: &[(&str, &str)]| {
            list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<Vec<_>>()
        };
        Config::load_with(Some(&self.path()), own(environment), &own(flags))
    }
}

/// `object: reason (next step)` with the temporary directory and the sample's name left out.
fn complaint(place: &Place, e: &ConfigError) -> String {
    let dir = format!("{}/", place.dir.path().display());
    format!("{}: {e} ({})", e.object(), e.next_step()).replace(&dir, "").replace(SAMPLE, "sample")
}

#[test]
fn defaults_are_filled_in_and_paths_absolute() {
    let place = Place::new(GOOD);
    let c = place.load(&[], &[]).unwrap();
    let data = place.dir.path().join("data");
    assert_eq!(c.cloud.data_dir, data);
    assert_eq!(c.repository.dir, data.join("repository"));
    assert_eq!(c.api.socket, data.join("cicada.sock"));
    assert_eq!(c.xmpp.password_file, place.dir.path().join("password"));
    assert_eq!(c.xmpp.security, Security::DirectTls);
    assert_eq!((c.xmpp.tls_min, c.xmpp.channel_binding), (TlsVersion::V1_3, ChannelBinding::Prefer));
    assert_eq!(c.transfer.listen.port(), 7420);
    assert_eq!(c.networks, [Network { name: "default".into(), kind: NetworkKind::User, foreign: false }]);
    assert_eq!(c.migration.grace_period, Duration::from_secs(86_400));
    assert!(c.migration.accept_from.accepts(&"x@y".parse().unwrap()));
    assert!(c.hypervisor.cpus > 0 && c.hypervisor.memory > ByteSize::mib(64));
}

#[test]
fn a_login_that_must_be_bound_has_something_to_be_bound_to() {
    let place = Place::new(GOOD);
    let of = |flags: &[(&str, &str)]| place.load(&[], flags).map_err(|e| complaint(&place, &e));
    let c = of(&[("xmpp.channel_binding", "require")]).unwrap();
    assert_eq!(c.xmpp.channel_binding, ChannelBinding::Require);
    assert_eq!(of(&[("xmpp.tls_min", "1.2")]).unwrap().xmpp.tls_min, TlsVersion::V1_2);
    let e = of(&[("xmpp.channel_binding", "require"), ("xmpp.tls_min", "1.2")]).unwrap_err();
    assert!(e.contains("xmpp.tls_min") && e.contains("leave xmpp.tls_min out"), "{e}");
    let plain =
        [("xmpp.security", "plain"), ("xmpp.server", "127.0.0.1:5222"), ("xmpp.channel_binding", "require")];
    let e = of(&plain).unwrap_err();
    assert!(e.contains("xmpp.channel_binding") && e.contains("needs TLS"), "{e}");
    let e = of(&[("xmpp.tls_min", "1.1")]).unwrap_err();
    assert!(e.contains("'1.1' is not possible"), "{e}");
}

#[test]
fn flags_win_over_environment_over_file() {
    let place =
        Place::new(&format!("{GOOD}\n[migration]\nconcurrency = 1\nlease_s = 10\nstop_timeout_s = 11\n"));
    let environment = [
        ("CICADA_MIGRATION__CONCURRENCY", "2"),
        ("CICADA_MIGRATION__LEASE_S", "20"),
        ("CICADA_TRANSFER__ADVERTISE", "192.0.2.1,cloud-a.example.org:1"),
        ("CICADA_LOG", "debug"),
        ("OTHER", "x"),
    ];
    let c = place
        .load(&environment, &[("migration.concurrency", "3"), ("migration.accept_from", "b@x,c@x")])
        .unwrap();
    assert_eq!(c.migration.concurrency, 3);
    assert_eq!(c.migration.lease, Duration::from_secs(20));
    assert_eq!(c.migration.stop_timeout, Duration::from_secs(11));
    assert_eq!(c.transfer.addresses(None), ["192.0.2.1:7420", "cloud-a.example.org:1"]);
    assert!(c.migration.accept_from.accepts(&"b@x".parse().unwrap()));
    assert!(!c.migration.accept_from.accepts(&"d@x".parse().unwrap()));
    let flags = [("repository.share_with", "b@x,c@x")];
    let c = place.load(&environment, &flags).unwrap();
    assert!(c.repository.share_with.accepts(&"c@x".parse().unwrap()));
    assert!(!c.repository.share_with.accepts(&"d@x".parse().unwrap()));
    let flags = [("cloud.region", "north, west"), ("migration.accept_from", "members")];
    let c = place.load(&[], &flags).unwrap();
    assert_eq!(c.cloud.region, "north, west");
    assert_eq!(c.migration.accept_from, AcceptFrom::Members);
}

#[test]
fn every_field_can_be_set() {
    let place = Place::new(FULL);
    let c = place.load(&[], &[]).unwrap();
    assert_eq!(c.xmpp.server, Some(("::1".into(), 5222)));
    assert_eq!(c.transfer.bandwidth_limit_bytes_per_s, Some(12_500_000));
    assert_eq!(c.transfer.addresses(None), ["127.0.0.1:1"]);
    assert_eq!(c.networks[0].kind, NetworkKind::Bridge("br0".into()));
    assert_eq!(c.trust.pinned[0].jid.as_str(), "b@x");
    assert_eq!(c.repository.gc_grace, Duration::from_secs(3600));
    assert!(c.repository.optimize_after.is_zero());
    // What is shown can be read again and means the same.
    let shown = toml::to_string(c.effective()).unwrap();
    let again = Place::new(&shown).load(&[], &[]).unwrap();
    assert_eq!(toml::to_string(again.effective()).unwrap(), shown);
}

#[test]
fn the_sample_is_valid_and_complete() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("federation.toml");
    Config::load_with(Some(&path), [], &[]).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let full = Place::new(FULL).load(&[], &[]).unwrap();
    let all = toml::Table::try_from(full.effective()).unwrap();
    for (section, fields) in &all {
        assert!(text.contains(&format!("[{section}]")), "the sample lacks [{section}]");
        for field in fields.as_table().into_iter().flat_map(toml::Table::keys) {
            assert!(text.contains(&format!("{field} =")), "the sample lacks {section}.{field}");
        }
    }
}

/// Each bad file, and all an operator is told about it.
#[test]
fn bad_input_is_named_with_reason_and_next_step() {
    let with = |more: &str| format!("{GOOD}{more}\n");
    let replaced = |from: &str, to: &str| {
        assert!(GOOD.contains(from));
        GOOD.replace(from, to)
    };
    let cases = [
        (with("rom = 1"), r#"xmpp.rom in federation.toml: is not a known setting (did you mean 'room'?)"#),
        (with("[clod]"), r#"clod in federation.toml: is not a known setting (did you mean 'cloud'?)"#),
        (
            with("[hypervisor]\nbogus_and_odd = 1"),
            r#"hypervisor.bogus_and_odd in federation.toml: is not a known setting (known are: driver, accelerator, cpus, memory, cpu_overcommit, storage_overcommit, storage_floor, cpu_model, machine_type, firmware_code, firmware_vars, vm_uids)"#,
        ),
        (
            with("[hypervisor]\ncpus = \"many\""),
            r#"hypervisor.cpus in federation.toml: an integer expected, not string "many" (sample)"#,
        ),
        (
            with("[hypervisor]\ncpus = -1"),
            r#"hypervisor.cpus in federation.toml: a number that is not negative expected, not 64-bit integer `-1` (sample)"#,
        ),
        (
            with("[hypervisor]\nmemory = \"lots\""),
            r#"hypervisor.memory in federation.toml: 'lots' is not a size: write bytes, or a number with K, M, G or T, at most 1024P (sample)"#,
        ),
        (
            with("[hypervisor]\nmemory = true"),
            r#"hypervisor.memory in federation.toml: invalid type: boolean `true`, expected a size such as "256M" or a number of bytes (sample)"#,
        ),
        (
            with("[hypervisor]\naccelerator = \"kwm\""),
            r#"hypervisor.accelerator in federation.toml: 'kwm' is not possible (did you mean 'kvm'?)"#,
        ),
        (
            with("[migration]\ngrace_period = \"soon\""),
            r#"migration.grace_period in federation.toml: 'soon' is not a duration: write a number and a unit, such as "90s", "10m", "24h" or "7d" (sample)"#,
        ),
        (
            with("[hypervisor]\nvm_uids = \"0-9\""),
            r#"hypervisor.vm_uids in federation.toml: '0-9' is not possible: write "auto", "off" or a range such as "200000-200999" (sample)"#,
        ),
        (
            with("[hypervisor]\nstorage_overcommit = 0.5"),
            r#"hypervisor.storage_overcommit in federation.toml: must be from 1 to 1000 (write 1.0 for none)"#,
        ),
        (
            with("[members]\nshare = 0"),
            r#"members.share in federation.toml: must be more than 0 and at most 1 (write 1.0 for all; whose VMs are not taken is said by accept_vms and accept_from)"#,
        ),
        (
            with("[transfer]\npeer_networks = [\"10.0.0.0/33\"]"),
            r#"transfer.peer_networks in federation.toml: '10.0.0.0/33' is not a network such as "10.0.0.0/8" (sample)"#,
        ),
        (
            with("[migration]\nlease_s = 0"),
            r#"migration.lease_s in federation.toml: must be more than zero ()"#,
        ),
        (
            with("[migration]\naccept_from = \"all\""),
            r#"migration.accept_from in federation.toml: invalid value: string "all", expected "members" or a list of member addresses (sample)"#,
        ),
        (
            with("[migration]\naccept_from = [\"nobody\"]"),
            r#"migration.accept_from[0] in federation.toml: 'nobody' is not a valid member address: a bare JID 'name@domain' is expected (sample)"#,
        ),
        (
            with("[transfer]\nlisten = \"here\""),
            r#"transfer.listen in federation.toml: 'here' is not an address and port such as "0.0.0.0:7420" (sample)"#,
        ),
        (
            with("[transfer]\nbandwidth_limit = \"fast\""),
            r#"transfer.bandwidth_limit in federation.toml: 'fast' is not a rate: write bits such as "100Mbit" or bytes such as "12M", per second, not zero (sample)"#,
        ),
        (
            with("[[network]]\nname = \"lan\"\nkind = \"bridge\""),
            r#"network in federation.toml: 'lan' needs bridge = "NAME" ()"#,
        ),
        (
            with("[[network]]\nname = \"lan\"\nkind = \"vlan\""),
            r#"network[0].kind in federation.toml: 'vlan' is not possible (known are: user, bridge, none)"#,
        ),
        (
            with("[trust]\npinned = [{ jid = \"b@x\", key = \"abc\" }]"),
            r#"trust.pinned[0].key in federation.toml: 'abc' is not a public key: base64 of 32 bytes expected (sample)"#,
        ),
        (
            with("security = \"plain\""),
            r#"xmpp.security in federation.toml: "plain" would send the password unprotected to example.org (use "direct-tls" or "starttls"; "plain" is for a server on this machine only)"#,
        ),
        (
            with("server = \"xmpp.example.org\""),
            r#"xmpp.server in federation.toml: 'xmpp.example.org' is not host:port (write for example "xmpp.example.org:5223")"#,
        ),
        (
            replaced("name = \"a\"", "name = \"A b\""),
            r#"cloud.name in federation.toml: 'A b' is not a valid cloud name: 1 to 63 characters of a-z 0-9 . _ - beginning with a letter or digit (sample)"#,
        ),
        (replaced("name = \"a\"\n", ""), r#"cloud.name in federation.toml: is missing (sample)"#),
        (
            replaced("name = \"a\"", "name = "),
            r#"federation.toml: is not TOML: at line 3, column 8: string values must be quoted, expected literal string (sample)"#,
        ),
        (
            replaced("cloud-a@example.org", "example.org"),
            r#"xmpp.jid in federation.toml: 'example.org' is not a valid member address: a bare JID 'name@domain' is expected (sample)"#,
        ),
        (
            replaced("federation@conference", "conference"),
            r#"xmpp.room in federation.toml: 'conference.example.org' names no room (write for example "federation@conference.example.org")"#,
        ),
        (
            replaced("\"data\"", &format!("\"/{}\"", "d".repeat(120))),
            r#"api.socket in federation.toml: the path has 133 bytes; a Unix socket's has at most 107 (set a shorter one, for example in /run)"#,
        ),
        (
            replaced("[xmpp]", "[xmpp"),
            r#"federation.toml: is not TOML: at line 5, column 6: unclosed table, expected `]` (sample)"#,
        ),
    ];
    for (text, expected) in cases {
        let place = Place::new(&text);
        let e = place.load(&[], &[]).unwrap_err();
        assert_eq!(complaint(&place, &e), expected, "\n{text}");
    }
}

#[test]
fn names_that_are_expressions_are_refused() {
    for name in ["network[99999999].name", "cloud[-1]", &"a.".repeat(100_000)] {
        let refused = Place::new(GOOD).load(&[], &[(name, "x")]).unwrap_err();
        assert!(refused.to_string().contains("is not a known setting"), "{refused}");
    }
}

#[test]
fn a_member_has_its_own_rules_and_those_for_all_for_the_rest() {
    let text = format!(
        "{GOOD}\n[migration]\naccept_from = [\"b@x\", \"c@x\"]\n[repository]\nshare_with = []\n\
         [[member]]\njid = \"B@x\"\naccept_vms = false\nmemory_max = \"2G\"\nbandwidth_limit = \"8Mbit\"\n\
         [[member]]\njid = \"d@x\"\naccept_vms = true\nshare_components = true\nrequests_per_minute = 60\n"
    );
    let c = Place::new(&text).load(&[], &[]).unwrap();
    let policy = |jid: &str| c.policy_of(&jid.parse().unwrap());
    let (b, other, d) = (policy("b@x"), policy("c@x"), policy("d@x"));
    assert_eq!((b.accept_vms, b.share_components, b.requests_per_minute), (false, false, 6000));
    assert_eq!((b.memory_max, b.bandwidth_bytes_per_s), (Some(ByteSize::gib(2)), Some(1_000_000)));
    assert_eq!((other.accept_vms, other.share_components, other.memory_max), (true, false, None));
    assert_eq!((d.accept_vms, d.share_components, d.requests_per_minute), (true, true, 60));
    assert!(!policy("e@x").accept_vms);
}

#[test]
fn one_member_has_a_share_of_the_cloud_unless_it_is_lifted() {
    let limited =
        format!("{GOOD}\n[transfer]\nbandwidth_limit = \"8Mbit\"\n[[member]]\njid = \"b@x\"\nshare = 1\n");
    let c = Place::new(&limited).load(&[], &[]).unwrap();
    let policy = |jid: &str| c.policy_of(&jid.parse().unwrap());
    let (b, other) = (policy("b@x"), policy("c@x"));
    assert_eq!((other.share, other.vms_max, other.bandwidth_bytes_per_s), (0.5, Some(50), Some(500_000)));
    assert_eq!((b.share, b.vms_max, b.bandwidth_bytes_per_s), (1.0, Some(50), None));
    assert_eq!((c.migration.concurrency, c.migration.concurrency_per_member), (4, 2));
    assert_eq!((c.hypervisor.cpu_overcommit, c.hypervisor.storage_overcommit), (4.0, 1.0));
    assert!(c.transfer.peer_networks.is_empty(), "only global addresses are dialled");
    let networks = Place::new(GOOD).load(&[], &[("transfer.peer_networks", "10.0.0.0/8,fd00::/8")]).unwrap();
    assert_eq!(networks.transfer.peer_networks.len(), 2);
}

#[test]
fn a_member_with_two_sections_is_refused_with_both_lines() {
    let two = "[[member]]\njid = \"b@x\"\n[[member]]\nvms_max = 1\njid = \"B@X\"\n";
    let place = Place::new(&format!("{GOOD}{two}"));
    assert_eq!(
        complaint(&place, &place.load(&[], &[]).unwrap_err()),
        "member.jid in federation.toml: b@x has two sections: in line 10 and in line 13 (make one section of them)"
    );
    let place = Place::new(&format!("{GOOD}[[member]]\njid = \"b@x\"\nvm_max = 1\n"));
    let complaint = complaint(&place, &place.load(&[], &[]).unwrap_err());
    assert!(complaint.contains("vm_max") && complaint.contains("did you mean 'vms_max'?"), "{complaint}");
    let place = Place::new(&format!("{GOOD}[[member]]\njid = \"b@x\"\nrequests_per_minute = 0\n"));
    assert!(place.load(&[], &[]).is_err());
}
