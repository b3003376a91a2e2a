//! Level 2: the XMPP session.
