//! Level 1: choice of target, a pure function of a snapshot.
