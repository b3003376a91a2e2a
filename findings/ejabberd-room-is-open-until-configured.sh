#!/usr/bin/env bash
# ejabberd 23.01 and 24.12: anybody may enter a new room, before its maker has configured it.
#
# Expected: "the service MUST (…) prohibit anyone other than the owner from entering" a room until its owner has
# configured it or accepted the defaults (XEP-0045, section 10.1.2, the room is "locked"). Prosody answers item-not-found.
# Seen: with the defaults of mod_muc a second account is in the room before the maker's form arrives, sees the
# maker, and everything that is said.
# Cicada: `federation create` tells when a room began open, and deploy/xmpp/ejabberd.yml.in sets default_room_options
# so that it begins as it will be (`tests/room.rs: who_may_make_rooms_is_seen_and_nothing_is_left_behind`).
#
# Usage: ejabberd-room-is-open-until-configured.sh [ejabberd|ejabberd-debian-13|prosody|prosody-debian-13]
. "$(dirname "$0")/xmpp.bash"
begin "${1:-ejabberd}" alpine eve
change '/default_room_options/,$d; /muc_room_locking/d; /muc_room_default/d'
login root admin; login eve eve
room=lobby@$service
enter root "$room" owner
wait_for root "<status code=.201." >/dev/null
enter eve "$room" eve
seen=$(wait_for eve "lobby@$service/eve.*(<status code=.110.|<error)")
[[ $seen != *item-not-found* ]] || not_shown "the room is closed until it is configured"
[[ $seen == *"/owner"* ]] || not_shown "the second account sees nobody"
shown "a stranger was in the room, and saw its maker, before it was configured"
