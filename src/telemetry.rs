//! Level 2: log set-up.
