//! Level 2: federation.toml, read, checked and documented.
