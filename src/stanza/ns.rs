//! Every namespace, with where it is specified.

/// Ours, `stanza/PROTOCOL.md`: what a cloud offers, in its room presence.
pub const CLOUD: &str = "urn:cicada:cloud:1";
/// Ours, `stanza/PROTOCOL.md`: sealed negotiation messages.
pub const NEGOTIATION: &str = "urn:cicada:negotiation:1";
/// XEP-0045: multi-user chat.
pub const MUC: &str = "http://jabber.org/protocol/muc";
pub const MUC_USER: &str = "http://jabber.org/protocol/muc#user";
pub const MUC_OWNER: &str = "http://jabber.org/protocol/muc#owner";
pub const MUC_ADMIN: &str = "http://jabber.org/protocol/muc#admin";
/// XEP-0045, section 15.5: the form that configures a room.
pub const MUC_ROOM_CONFIG: &str = "http://jabber.org/protocol/muc#roomconfig";
/// XEP-0030: service discovery.
pub const DISCO_INFO: &str = "http://jabber.org/protocol/disco#info";
/// XEP-0050: ad-hoc commands.
pub const COMMANDS: &str = "http://jabber.org/protocol/commands";
/// XEP-0092: software version.
pub const VERSION: &str = "jabber:iq:version";
/// XEP-0115: entity capabilities; the node that names this software.
pub const CAPS_NODE: &str = "urn:cicada:broker";
/// XEP-0199: ping.
pub const PING: &str = "urn:xmpp:ping";
