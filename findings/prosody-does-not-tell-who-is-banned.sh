#!/usr/bin/env bash
# Prosody 0.12 and 13: an account that is banned from a members-only room is told that it is no member.
#
# Expected: <forbidden/> for who is banned (XEP-0045, section 7.2.7), <registration-required/> for who is no member
# (section 7.2.6). ejabberd does so.
# Seen: <registration-required/> for both; <forbidden/> only in an open room.
# Cicada: `config check --online` says that on Prosody it may be either; `federation add` helps against both
# (`tests/online.rs: each_fault_of_a_room_is_found_with_what_helps`).
#
# Usage: prosody-does-not-tell-who-is-banned.sh [prosody|prosody-debian-13|ejabberd|ejabberd-debian-13]
. "$(dirname "$0")/xmpp.bash"
begin "${1:-prosody}" eve
login root admin; login eve eve
room=lobby@$service
enter root "$room" owner
wait_for root "<status code=.201." >/dev/null
configure root "$room" membersonly=1 persistentroom=1 >/dev/null
affiliate root "$room" outcast eve >/dev/null
enter eve "$room" eve
seen=$(wait_for eve '<error')
[[ $seen == *registration-required* ]] || not_shown "it says $(grep -oE '<(forbidden|[a-z-]+) xmlns=.urn:ietf:params:xml:ns:xmpp-stanzas' <<<"$seen" | head -n 1)"
shown "who is banned is told to register"
