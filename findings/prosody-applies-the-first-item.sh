#!/usr/bin/env bash
# Prosody 0.12 and 13: of several members added by one request the first is added, and success is told.
#
# Expected: all, or an error: a list may be changed by several items at once (XEP-0045, section 9.5, example 128).
# ejabberd adds all.
# Seen: a result, and the first of two in the list.
# Cicada: one request for a member (`xmpp/admin.rs: affiliate`).
#
# Usage: prosody-applies-the-first-item.sh [prosody|prosody-debian-13|ejabberd|ejabberd-debian-13]
. "$(dirname "$0")/xmpp.bash"
begin "${1:-prosody}" alpine boreal
login root admin
room=lobby@$service
enter root "$room" owner
wait_for root "<status code=.201." >/dev/null
configure root "$room" membersonly=1 persistentroom=1 >/dev/null
answer=$(affiliate root "$room" member alpine boreal)
[[ $answer != *error* ]] || not_shown "it answers $answer"
list=$(members root "$room" | grep -aoE '(alpine|boreal)@' | sort -u | tr '\n' ' ')
echo "added: $list"
[ "$list" != "alpine@ boreal@ " ] || not_shown "both were added"
shown "success was told, and one of two is in the list"
