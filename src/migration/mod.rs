//! Level 1: negotiation and hand-over machines and their messages. Pure.
