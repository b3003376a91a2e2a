//! Level 5: wiring, signals and shutdown order.
