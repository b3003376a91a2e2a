//! Level 3: the one task that owns all state, and its effect runners.
