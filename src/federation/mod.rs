//! Level 1: members, presence, capabilities and trust rules. Pure.
