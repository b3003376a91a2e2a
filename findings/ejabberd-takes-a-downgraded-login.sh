#!/usr/bin/env bash
# ejabberd 23.01: offers SCRAM-SHA-1-PLUS, and lets in a client that says it can bind but saw no such offer.
#
# Expected: "If the flag is set to y and the server supports channel binding, the server MUST fail authentication",
# since somebody took the offer away (RFC 5802, section 6). ejabberd 24.12 and Prosody 13 refuse.
# Seen: a login that begins with `y,,n=…` succeeds. 24.12 refuses it at its last message ("Invalid channel binding").
# Cicada: with xmpp.channel_binding = "require" nobody stands between; with "prefer" this server cannot tell
# (`tests/xmpp.rs: who_holds_the_servers_certificate_does_not_come_between_where_binding_is_required`).
#
# Usage: ejabberd-takes-a-downgraded-login.sh [ejabberd|ejabberd-debian-13|prosody-debian-13]      Needs python3.
. "$(dirname "$0")/xmpp.bash"
command -v python3 >/dev/null || { echo "SKIPPED: python3 is not installed"; exit 77; }
begin "${1:-ejabberd}" alpine
seen=$(python3 - "$tls" "$domain" "$(cat "$work/xmpp/accounts/alpine.password")" <<'PYTHON'
import base64, hashlib, hmac, re, socket, ssl, sys
port, domain, password = int(sys.argv[1]), sys.argv[2], sys.argv[3]
tls = ssl._create_unverified_context().wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname=domain)
tls.settimeout(5)
def until(pattern):
    text = ""
    while not re.search(pattern, text):
        text += tls.recv(65536).decode()
    return text
def say(element, text, more=""):
    body = base64.b64encode(text.encode()).decode()
    tls.sendall(f"<{element} xmlns='urn:ietf:params:xml:ns:xmpp-sasl'{more}>{body}</{element}>".encode())
tls.sendall(f"<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='{domain}'>".encode())
offers = until("</stream:features>")
print("offers", *re.findall("<mechanism>(.*?)<", offers))
bare = "n=alpine,r=fyko"
say("auth", "y,," + bare, " mechanism='SCRAM-SHA-1'")
answer = until("</challenge>|</failure>")
if "challenge" in answer:
    challenge = base64.b64decode(re.search("<challenge[^>]*>(.*?)<", answer).group(1)).decode()
    part = dict(x.split("=", 1) for x in challenge.split(","))
    salted = hashlib.pbkdf2_hmac("sha1", password.encode(), base64.b64decode(part["s"]), int(part["i"]))
    mac = lambda key, text: hmac.new(key, text, hashlib.sha1).digest()
    key = mac(salted, b"Client Key")
    last = "c=" + base64.b64encode(b"y,,").decode() + ",r=" + part["r"]
    signed = mac(hashlib.sha1(key).digest(), f"{bare},{challenge},{last}".encode())
    proof = base64.b64encode(bytes(a ^ b for a, b in zip(key, signed))).decode()
    say("response", last + ",p=" + proof)
    answer = until("</success>|<success[^>]*/>|</failure>")
print("success" if "<success" in answer else re.sub(" xmlns='[^']*'", "", answer))
PYTHON
)
echo "$seen"
[[ $seen == *-PLUS* ]] || not_shown "it offers no channel binding"
[[ $seen == *success ]] || not_shown "it refuses"
shown "logged in, though the client was shown no offer of what the server offers"
