//! What never enters a component. Secrets and identity are born at a VM's first boot; leftovers of
//! the package tools differ from build to build and mean nothing to a guest.

use super::scan::{NodeKind, TreePath};
use crate::component::definition::matches;

/// Kept as an empty file, for systemd to fill at first boot.
pub const MACHINE_ID: &[u8] = b"etc/machine-id";
/// Files larger than this are not searched for keys.
pub const SEARCHED_BYTES_MAX: u64 = 256 << 10;

/// Secrets and identity by path, with what they are.
const SECRETS: &[(&str, &str)] = &[
    ("etc/ssh/ssh_host_*", "an SSH host key"),
    ("etc/ssl/private/**", "a private TLS key"),
    ("etc/ssl/certs/ssl-cert-snakeoil.pem", "the certificate of a key made on one machine"),
    ("etc/pki/tls/private/**", "a private TLS key"),
    ("etc/letsencrypt/archive/**", "a private TLS key"),
    ("etc/wireguard/*", "a private network key"),
    ("etc/krb5.keytab", "a Kerberos key"),
    ("etc/machine-id", "a machine id"),
    ("var/lib/dbus/machine-id", "a machine id"),
    ("var/lib/systemd/random-seed", "a random seed"),
    ("var/lib/urandom/random-seed", "a random seed"),
    ("boot/efi/loader/random-seed", "a random seed"),
    ("var/lib/systemd/credential.secret", "the machine's credential key"),
    ("var/cache/debconf/passwords.dat", "the debconf password store"),
    ("root/.ssh/**", "a person's SSH file"),
    ("home/*/.ssh/**", "a person's SSH file"),
    ("root/.gnupg/**", "a person's keyring"),
    ("home/*/.gnupg/**", "a person's keyring"),
    ("root/.*_history", "a shell history"),
    ("home/*/.*_history", "a shell history"),
];

/// What building leaves lying about. Directories stay: services need their log directories.
const LEFTOVERS: &[&str] = &[
    "dev/**",
    "proc/**",
    "run/**",
    "sys/**",
    "tmp/**",
    "var/tmp/**",
    "etc/.pwd.lock",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "etc/hostname",
    // The build machine's name servers, as systemd-resolved found and kept them.
    "etc/.resolv.conf.systemd-resolved.bak",
    // Depends on every library in the composition; the OS writes it at first boot.
    "etc/ld.so.cache",
    "var/cache/ldconfig/aux-cache",
    "var/cache/apt/*.bin",
    "var/cache/apt/archives/**",
    "var/lib/apt/lists/**",
    "var/lib/apt/extended_states",
    "var/cache/debconf/*-old",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/triggers/Lock",
    "var/backups/**",
];

/// Whether an entry is secret or identity, and of what sort. Directories and links are neither.
pub fn secret(path: &TreePath, kind: &NodeKind) -> Option<&'static str> {
    match kind {
        // There is nothing to tell in an empty file; systemd fills an empty machine id at first boot.
        NodeKind::File { size_bytes: 0 } => None,
        NodeKind::File { .. } | NodeKind::HardLink { .. } | NodeKind::Fifo | NodeKind::Socket => {
            SECRETS.iter().find(|(pattern, _)| matches(pattern.as_bytes(), &path.0)).map(|(_, what)| *what)
        }
        _ => None,
    }
}

/// What a running system fills anew at every start; importing does not enter it.
const PASSING_DIRECTORIES: [&[u8]; 6] = [b"dev", b"proc", b"run", b"sys", b"tmp", b"var/tmp"];
pub const PASSING: &str = "what a running system makes anew";

/// Whether nothing in the directory is kept.
pub fn is_passing(path: &[u8]) -> bool {
    PASSING_DIRECTORIES.contains(&path)
}

/// What a leftover is, for people.
pub fn leftover(path: &TreePath, kind: &NodeKind) -> &'static str {
    let path = &path.0[..];
    let is_below = |directory: &[u8]| path.strip_prefix(directory).is_some_and(|rest| rest.starts_with(b"/"));
    match kind {
        _ if PASSING_DIRECTORIES.iter().any(|d| is_below(d)) => PASSING,
        NodeKind::Socket => "a socket, which its program makes anew",
        _ if is_below(b"var/log") => "a log",
        _ if is_below(b"var/backups") => "a backup of one machine's settings",
        _ if path.starts_with(b"etc/hostname") || path.starts_with(b"etc/resolv.conf") => {
            "a setting of one machine, which the VM gets at its first boot"
        }
        _ => "what package tools leave behind and make anew",
    }
}

/// Whether an entry is left over from building.
pub fn is_leftover(path: &TreePath, kind: &NodeKind) -> bool {
    let path = &path.0[..];
    match kind {
        NodeKind::Whiteout | NodeKind::Socket => {
            matches!(kind, NodeKind::Socket) || LEFTOVERS.iter().any(|p| matches(p.as_bytes(), path))
        }
        // mkdir in /run or /tmp is as passing as a file there; elsewhere directories stay.
        NodeKind::Directory { .. } => ["dev/**", "proc/**", "run/**", "sys/**", "tmp/**", "var/tmp/**"]
            .iter()
            .any(|p| matches(p.as_bytes(), path)),
        NodeKind::File { .. } | NodeKind::HardLink { .. } => {
            path == b"etc/resolv.conf"
                || matches(b"var/log/**", path)
                || LEFTOVERS.iter().any(|p| matches(p.as_bytes(), path))
        }
        _ => LEFTOVERS.iter().any(|p| matches(p.as_bytes(), path)),
    }
}

/// Whether a file of this place is searched for private keys: where machines and people keep
/// theirs. What packages ship elsewhere (examples, test data) is public.
pub fn is_searched(path: &TreePath, size_bytes: u64) -> bool {
    let first = path.0.split(|b| *b == b'/').next().unwrap_or_default();
    size_bytes <= SEARCHED_BYTES_MAX
        && [&b"etc"[..], b"root", b"home", b"srv", b"opt", b"var"].contains(&first)
}

/// What secret a file's content is, if it looks like one.
pub fn secret_content(path: &TreePath, content: &[u8]) -> Option<String> {
    let has = |needle: &[u8]| content.windows(needle.len()).any(|w| w == needle);
    if has(b"-----BEGIN ") && has(b"PRIVATE KEY-----") {
        return Some("a private key".into());
    }
    if path.0 == b"etc/shadow" || path.0 == b"etc/gshadow" {
        return password_of(content).map(|name| format!("the password of '{name}'"));
    }
    None
}

/// The first account in a `shadow` file with a real password: neither locked nor empty.
fn password_of(shadow: &[u8]) -> Option<String> {
    shadow.split(|b| *b == b'\n').find_map(|line| {
        let mut fields = line.split(|b| *b == b':');
        let (name, password) = (fields.next()?, fields.next()?);
        let locked = password.is_empty() || matches!(password[0], b'*' | b'!' | b'x');
        // A locked password that is kept (`!$y$…`) is still a password.
        let hashed = password.contains(&b'$');
        (!locked || hashed).then(|| String::from_utf8_lossy(name).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> TreePath {
        TreePath(text.as_bytes().to_vec())
    }
    const FILE: NodeKind = NodeKind::File { size_bytes: 9 };
    const DIRECTORY: NodeKind = NodeKind::Directory { opaque: false };

    #[test]
    fn secrets_are_known_by_path() {
        for p in [
            "etc/ssh/ssh_host_ed25519_key",
            "etc/ssl/private/ssl-cert-snakeoil.key",
            "etc/machine-id",
            "var/lib/systemd/random-seed",
            "root/.ssh/authorized_keys",
            "root/.bash_history",
        ] {
            assert!(secret(&path(p), &FILE).is_some(), "{p}");
        }
        assert!(secret(&path("etc/machine-id"), &NodeKind::File { size_bytes: 0 }).is_none());
        assert!(secret(&path("etc/ssl/private"), &DIRECTORY).is_none());
        let link = NodeKind::Symlink { target: b"/etc/machine-id".to_vec() };
        assert!(secret(&path("var/lib/dbus/machine-id"), &link).is_none());
        assert!(secret(&path("etc/ssh/sshd_config"), &FILE).is_none());
    }

    #[test]
    fn secrets_are_known_by_content() {
        let of = |p: &str, c: &str| secret_content(&path(p), c.as_bytes());
        assert!(of("etc/x.pem", "-----BEGIN EC PRIVATE KEY-----\n").is_some());
        assert!(of("etc/x.pem", "-----BEGIN CERTIFICATE-----\n").is_none());
        assert!(of("etc/shadow", "root:*:1:0\nredis:!:1\nx::1\n").is_none());
        assert_eq!(of("etc/shadow", "root:*:1\nme:$y$j9T$a:1\n").unwrap(), "the password of 'me'");
        assert!(of("etc/shadow", "me:!$6$a:1\n").is_some(), "locked, but still a password");
        assert!(of("etc/gshadow", "adm:*::\nme:!::\n").is_none());
    }

    #[test]
    fn leftovers_go_and_directories_stay() {
        for p in ["var/log/dpkg.log", "var/log/apt/term.log", "etc/passwd-", "var/lib/dpkg/status-old"] {
            assert!(is_leftover(&path(p), &FILE), "{p}");
        }
        assert!(!is_leftover(&path("var/log/redis"), &DIRECTORY));
        assert!(!is_leftover(&path("run"), &DIRECTORY));
        assert!(is_leftover(&path("run/lock"), &DIRECTORY));
        assert!(!is_leftover(&path("etc/passwd"), &FILE));
        let link = NodeKind::Symlink { target: b"../run/systemd/resolve/stub-resolv.conf".to_vec() };
        assert!(is_leftover(&path("etc/resolv.conf"), &FILE));
        assert!(!is_leftover(&path("etc/resolv.conf"), &link));
    }
}
