//! A cloud without a broker.

use std::os::unix::fs::PermissionsExt;

/// A directory with a good configuration.
pub fn cloud() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = "[cloud]\nname = \"cloud-a\"\ndata_dir = \"data\"\n[xmpp]\njid = \"a@example.org\"\n\
                password_file = \"password\"\nroom = \"fed@rooms.example.org\"\n";
    std::fs::write(dir.path().join("federation.toml"), text).unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, "secret\n").unwrap();
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600)).unwrap();
    dir
}
