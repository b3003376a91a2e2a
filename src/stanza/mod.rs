//! Level 1: XMPP payloads and namespaces; parse and build, no sockets.
