//! Level 4: the broker's local API.
