# What the findings about XMPP servers share. A client is an `openssl s_client`; stanzas are sent to it, and what
# comes is gathered in a file.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
server=$here/../deploy/xmpp/server
work=$(mktemp -d)
chmod 755 "$work"
clients=()

clean_up() {
  for pid in "${clients[@]}"; do kill "$pid" 2>/dev/null || true; done
  [ ! -d "$work/xmpp" ] || "$server" stop "$work/xmpp" 2>/dev/null || true
  rm -rf "$work"
}
trap clean_up EXIT

shown() { echo "SHOWN: $1"; exit 0; }
not_shown() { echo "NOT SHOWN: $1"; exit 1; }

# begin SERVER[-debian-13] ACCOUNT…: a server with these accounts and `admin`, as deploy/xmpp configures it.
begin() {
  local kind=$1 tree=(); shift
  [[ $kind != *-debian-13 ]] || tree=(--debian-13)
  local port; port=$((20000 + RANDOM % 10000))
  "$server" start "$work/xmpp" --server "${kind%-debian-13}" "${tree[@]}" --accounts "$(IFS=,; echo "$*")" \
    --port "$port" >"$work/start" 2>&1 || { cat "$work/start"; echo "SKIPPED: no $kind here"; exit 77; }
  starttls=$((port - 1)) tls=$port domain=federation.test service=rooms.federation.test
}

# change SED-EXPRESSION: the server goes on with a changed configuration.
change() {
  sed -i "$1" "$work"/xmpp/prosody.cfg.lua "$work"/xmpp/ejabberd.yml 2>/dev/null || true
  "$server" restart "$work/xmpp" >/dev/null
}

# login NAME ACCOUNT: a session called NAME. NAME.out gathers what comes.
login() {
  local name=$1 account=$2 password
  password=$(cat "$work/xmpp/accounts/$account.password")
  mkfifo "$work/$name.in"
  openssl s_client -quiet -connect "127.0.0.1:$tls" -servername "$domain" <"$work/$name.in" >"$work/$name.out" 2>/dev/null &
  clients+=($!)
  exec {fd}>"$work/$name.in"
  declare -g "fd_$name=$fd"
  local header="<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='$domain'>"
  send "$name" "$header"
  wait_for "$name" '</stream:features>' >/dev/null
  send "$name" "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>$(printf '\0%s\0%s' "$account" "$password" | base64 -w 0)</auth>"
  wait_for "$name" '<success' >/dev/null
  send "$name" "$header"
  wait_for "$name" '<bind' >/dev/null
  ask "$name" set '' "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>" >/dev/null
}

send() { local fd=fd_$1; printf '%s' "$2" >&"${!fd}"; }

# wait_for NAME PATTERN: until it has come, 10 seconds at most. Prints all that came so far.
wait_for() {
  for _ in $(seq 200); do
    if tr '\n' ' ' <"$work/$1.out" | grep -aqE "$2"; then tr '\n' ' ' <"$work/$1.out"; return; fi
    sleep 0.05
  done
  echo "$1 never saw $2 in: $(cat "$work/$1.out")" >&2
  exit 2
}

# ask NAME get|set TO PAYLOAD: the answer.
ask() {
  local id=q$RANDOM$RANDOM to=
  [ -z "$3" ] || to="to='$3'"
  send "$1" "<iq type='$2' $to id='$id'>$4</iq>"
  # The attributes come in any order, and an answer may hold the question.
  wait_for "$1" "<iq[^>]* id=.$id.[^>]*(/>|>.*</iq>)" | grep -aoE "<iq[^>]* id=.$id.[^>]*(/>|>.*)" | tail -n 1
}

enter() { send "$1" "<presence to='$2/$3'><x xmlns='http://jabber.org/protocol/muc'/></presence>"; }

disco="<query xmlns='http://jabber.org/protocol/disco#info'/>"
options="<query xmlns='http://jabber.org/protocol/muc#owner'/>"
# configure NAME ROOM VAR=VALUE…
configure() {
  local name=$1 room=$2 fields= option; shift 2
  for option in "$@"; do fields+="<field var='muc#roomconfig_${option%%=*}'><value>${option#*=}</value></field>"; done
  ask "$name" set "$room" "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'><field var='FORM_TYPE'><value>http://jabber.org/protocol/muc#roomconfig</value></field>$fields</x></query>"
}
# affiliate NAME ROOM AFFILIATION ACCOUNT…
affiliate() {
  local name=$1 room=$2 affiliation=$3 items= account; shift 3
  for account in "$@"; do items+="<item affiliation='$affiliation' jid='$account@$domain'/>"; done
  ask "$name" set "$room" "<query xmlns='http://jabber.org/protocol/muc#admin'>$items</query>"
}
members() { ask "$1" get "$2" "<query xmlns='http://jabber.org/protocol/muc#admin'><item affiliation='member'/></query>"; }
