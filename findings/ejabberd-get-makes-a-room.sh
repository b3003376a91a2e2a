#!/usr/bin/env bash
# ejabberd 23.01 and 24.12: who asks for the options of a room that is not there (an IQ of type get) makes it, and with
# default_room_options.persistent it stays.
#
# Expected: item-not-found. A get reads (RFC 6120, section 8.2.3), and a room begins with presence (XEP-0045, section
# 10.1). Prosody answers item-not-found.
# Seen: the form, as of any room, and the room is there afterwards. The same for a set; `destroy` of a room that
# never was succeeds.
# Cicada: asks every room what it is (XEP-0030) before it asks for anything else (`xmpp/admin.rs: create_room`;
# `tests/room.rs: why_a_room_lets_nobody_in_is_told`).
#
# Usage: ejabberd-get-makes-a-room.sh [ejabberd|ejabberd-debian-13]
. "$(dirname "$0")/xmpp.bash"
begin "${1:-ejabberd}" alpine
login root admin
room=typo@$service
before=$(ask root get "$room" "$disco")
[[ $before == *item-not-found* ]] || not_shown "the room was there before"
ask root get "$room" "$options" >/dev/null
after=$(ask root get "$room" "$disco")
echo "$after" | grep -aoE 'muc_[a-z]+' | tr '\n' ' '; echo
[[ $after == *muc_persistent* ]] || not_shown "the question made no room"
shown "a question made the persistent room $room"
