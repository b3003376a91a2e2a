#!/usr/bin/env bash
# Prosody 13: restrict_room_creation = "admin", which in 0.12 lets administrators alone make rooms, lets every account.
#
# Expected: what a setting restricts stays restricted over an upgrade, or the server does not start.
# Seen: one line in the log ("not in set of allowed values"), and the default, false, is taken. `true` restricts in both.
# Cicada: tells it (`config check --online`, `federation create`, the broker's log), and its samples say `true`
# (`tests/room.rs: who_may_make_rooms_is_seen_and_nothing_is_left_behind`).
#
# Usage: prosody-13-lets-everybody-make-rooms.sh [prosody-debian-13|prosody]
. "$(dirname "$0")/xmpp.bash"
begin "${1:-prosody-debian-13}" eve
change 's/restrict_room_creation = true/restrict_room_creation = "admin"/'
grep -a restrict_room_creation "$work/xmpp/server.log" || true
login eve eve
enter eve "lobby@$service" eve
seen=$(wait_for eve "<status code=.110.|<error")
[[ $seen == *"201"* ]] || not_shown "it does not let her"
shown "an account that is no administrator made a room"
