//! An XMPP server, or somebody on the way to it, that would have the password without TLS or in the
//! clear: it gets nothing. The servers here are scripts of a few lines.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use cicada::xmpp::{Security, Settings, XmppEvent, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const PASSWORD: &str = "correct horse battery staple";
const SOON: Duration = Duration::from_secs(60);

/// Answers whatever comes first with a stream header and these features, and keeps what it is told.
struct Fake {
    address: String,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Fake {
    async fn start(features: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heard: Arc<Mutex<Vec<u8>>> = Arc::default();
        let hears = heard.clone();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let hears = hears.clone();
                tokio::spawn(async move {
                    let header = format!(
                        "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
                         xmlns:stream='http://etherx.jabber.org/streams' version='1.0' id='1' \
                         from='localhost'><stream:features>{features}</stream:features>"
                    );
                    let (mut buffer, mut answered) = ([0; 4096], false);
                    while let Ok(n @ 1..) = socket.read(&mut buffer).await {
                        hears.lock().unwrap().extend_from_slice(&buffer[..n]);
                        if !std::mem::replace(&mut answered, true) {
                            let _ = socket.write_all(header.as_bytes()).await;
                        }
                    }
                });
            }
        });
        Self { address, heard }
    }

    /// Why a session with it does not come about, and everything it was sent.
    async fn meets(&self, security: Security) -> (String, String) {
        let settings = Settings {
            jid: "alpine@localhost".parse().unwrap(),
            password: PASSWORD.into(),
            server: Some(self.address.clone()),
            security,
            ca_file: None,
            room: None,
            nick: "alpine".parse().unwrap(),
        };
        let (handle, mut events) = connect(settings).unwrap();
        let reason = loop {
            match tokio::time::timeout(SOON, events.recv()).await.expect("no word in time") {
                Some(XmppEvent::Down(reason)) => break reason,
                Some(XmppEvent::Joined) => panic!("a session came about"),
                Some(_) => {}
                None => panic!("the session's task ended"),
            }
        };
        handle.close().await;
        let heard = self.heard.lock().unwrap().clone();
        (reason, String::from_utf8_lossy(&heard).into_owned())
    }
}

/// Nothing that helps to log in was sent: no mechanism begun, no account, no password in any form.
fn told_nothing(heard: &str) {
    assert!(!heard.is_empty(), "it was not even spoken to");
    for secret in ["<auth", "<authenticate", "alpine", PASSWORD, "AGFscGluZQ"] {
        assert!(!heard.contains(secret), "{secret} was sent: {heard}");
    }
}

const SCRAM_ONLY: &str =
    "<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>SCRAM-SHA-1</mechanism></mechanisms>";

/// With TLS, authorities are wanted, though nothing comes as far as a certificate here.
fn no_authorities() -> bool {
    let missing = !std::path::Path::new("/etc/ssl/certs/ca-certificates.crt").exists();
    if missing {
        eprintln!("SKIPPED: ca-certificates is not installed");
    }
    missing
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_stripped_of_starttls_is_not_logged_in_to() {
    if no_authorities() {
        return;
    }
    let server = Fake::start(SCRAM_ONLY).await;
    let (reason, heard) = server.meets(Security::Starttls).await;
    println!("{reason}");
    told_nothing(&heard);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_speaks_plainly_where_tls_is_expected_is_not_answered_plainly() {
    if no_authorities() {
        return;
    }
    let server = Fake::start(SCRAM_ONLY).await;
    let (reason, heard) = server.meets(Security::DirectTls).await;
    println!("{reason}");
    told_nothing(&heard);
    assert!(!heard.contains("<stream"), "{heard}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_scram_is_used_whatever_the_server_offers() {
    let server = Fake::start(
        "<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>PLAIN</mechanism>\
         <mechanism>ANONYMOUS</mechanism><mechanism>X-OAUTH2</mechanism></mechanisms>",
    )
    .await;
    let (reason, heard) = server.meets(Security::Plain).await;
    assert!(reason.contains("offers no login by SCRAM"), "{reason}");
    told_nothing(&heard);
}
