//! Level 2: QUIC with raw public keys; objects between brokers.
