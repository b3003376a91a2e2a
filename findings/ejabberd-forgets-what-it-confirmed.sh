#!/usr/bin/env bash
# ejabberd 23.01 and 24.12: a persistent room and its members, both confirmed by a result, are gone if the process is
# killed within about two seconds.
#
# Expected: what is confirmed and persistent survives the end of the process (only a loss of power could take what the
# system had not written yet). Prosody's is there after a kill at once.
# Seen: killed at once, after 0.5 or 1 s: room and member are gone, or the member alone; after 2 s they are there
# (Mnesia's log is written out then).
# Cicada: brokers that are members ask again, at once and then up to every 15 seconds, and enter when the room is there; after a
# crash of ejabberd the owner looks at `cicada federation list`.
#
# Usage: ejabberd-forgets-what-it-confirmed.sh [ejabberd|ejabberd-debian-13|prosody|prosody-debian-13]
. "$(dirname "$0")/xmpp.bash"
begin "${1:-ejabberd}" alpine
login root admin
room=lobby@$service
enter root "$room" owner
wait_for root "<status code=.201." >/dev/null
confirmed=$(configure root "$room" membersonly=1 persistentroom=1)$(affiliate root "$room" member alpine)
kill -9 "$(cat "$work/xmpp/server.pid")"
[[ $confirmed != *"type='error'"* && $confirmed != *'type="error"'* ]] || not_shown "nothing was confirmed: $confirmed"
sleep 1
"$server" restart "$work/xmpp" >/dev/null
sleep 1
login again admin
after=$(ask again get "$room" "$disco")
[[ $after != *item-not-found* ]] || shown "a persistent room that was confirmed is gone"
# It may have been written out just before the member was added.
[[ $(members again "$room") == *alpine@* ]] || shown "a member that was confirmed is none"
not_shown "room and member are there"
