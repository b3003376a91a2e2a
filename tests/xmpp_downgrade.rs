//! An XMPP server, or somebody on the way to it, that would have the password without TLS or in the
//! clear, or that does not know it: it gets nothing, and no session comes about. The servers here are
//! scripts of a few lines.

use std::io::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use cicada::xmpp::{BindingRule, LoginRules, Security, Settings, TlsMin, XmppEvent, connect};
use sasl::common::Password;
use sasl::common::scram::{ScramProvider, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

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
        let reason = failure(settings(&self.address, security)).await;
        let heard = self.heard.lock().unwrap().clone();
        (reason, String::from_utf8_lossy(&heard).into_owned())
    }
}

fn settings(address: &str, security: Security) -> Settings {
    Settings {
        jid: "alpine@localhost".parse().unwrap(),
        password: PASSWORD.into(),
        server: Some(address.into()),
        security,
        ca_file: None,
        rules: LoginRules::default(),
        room: None,
        nick: "alpine".parse().unwrap(),
    }
}

/// Why no session comes about.
async fn failure(settings: Settings) -> String {
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
    println!("{reason}");
    reason
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
        let _ = writeln!(std::io::stderr(), "SKIPPED: ca-certificates is not installed");
    }
    missing
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_stripped_of_starttls_is_not_logged_in_to() {
    if no_authorities() {
        return;
    }
    let server = Fake::start(SCRAM_ONLY).await;
    let (_, heard) = server.meets(Security::Starttls).await;
    told_nothing(&heard);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_speaks_plainly_where_tls_is_expected_is_not_answered_plainly() {
    if no_authorities() {
        return;
    }
    let server = Fake::start(SCRAM_ONLY).await;
    let (_, heard) = server.meets(Security::DirectTls).await;
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

/// What a server that plays SCRAM-SHA-256 does when it is logged in to.
#[derive(Clone, Copy)]
struct Script {
    /// The password it believes the account has.
    password: &'static str,
    iterations: u64,
    proof: Proof,
}

#[derive(Clone, Copy, PartialEq)]
enum Proof {
    Made,
    Missing,
    /// It says yes to the first message.
    Skipped,
}

const HONEST: Script = Script { password: PASSWORD, iterations: 4096, proof: Proof::Made };

/// One login by the script, over whatever protects it; false if the client went away before it was
/// over. Whatever the client proves is taken for good: an impostor would.
async fn log_in(socket: &mut TcpStream, script: Script) -> Option<()> {
    let header = "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
         xmlns:stream='http://etherx.jabber.org/streams' version='1.0' id='1' from='localhost'>";
    let features = "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>\
         <mechanism>SCRAM-SHA-256</mechanism></mechanisms></stream:features>";
    until(socket, ">", 1).await?;
    socket.write_all(format!("{header}{features}").as_bytes()).await.ok()?;
    let first = sasl_text(&until(socket, "</auth>", 1).await?);
    if script.proof != Proof::Skipped {
        let (_, bare) = first.split_once(",,").unwrap();
        let (_, nonce) = bare.split_once(",r=").unwrap();
        let challenge = format!("r={nonce}theirs,s=W22ZaJ0SNY7soEsUEjb6gQ==,i={}", script.iterations);
        say(socket, "challenge", &challenge).await?;
        let last = sasl_text(&until(socket, "</response>", 1).await?);
        let (without_proof, _) = last.rsplit_once(",p=").unwrap();
        let salt = BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let iterations = script.iterations.try_into().unwrap();
        let salted = Sha256::derive(&Password::from(script.password), &salt, iterations).unwrap();
        let key = Sha256::hmac(b"Server Key", &salted).unwrap();
        let message = format!("{bare},{challenge},{without_proof}");
        let proof = BASE64.encode(Sha256::hmac(message.as_bytes(), &key).unwrap());
        let proof = if script.proof == Proof::Made { format!("v={proof}") } else { String::new() };
        say(socket, "success", &proof).await?;
    } else {
        say(socket, "success", "").await?;
    }
    // Only who believes in the login begins the stream anew.
    until(socket, "<stream:stream", 1).await.map(drop)
}

async fn say(socket: &mut TcpStream, element: &str, text: &str) -> Option<()> {
    let text = BASE64.encode(text);
    let xml = format!("<{element} xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>{text}</{element}>");
    socket.write_all(xml.as_bytes()).await.ok()
}

/// Reads until `end` came; `None` if the other side goes away before.
async fn until(socket: &mut (impl AsyncRead + Unpin), end: &str, times: usize) -> Option<String> {
    let mut text = String::new();
    while text.matches(end).count() < times {
        text.push(char::from(socket.read_u8().await.ok()?));
    }
    Some(text)
}

fn sasl_text(xml: &str) -> String {
    let inner = xml.rsplit_once("</").unwrap().0.rsplit_once('>').unwrap().1;
    String::from_utf8(BASE64.decode(inner).unwrap()).unwrap()
}

/// Whether the client believed in a login by the script, and why not.
async fn plays(script: Script) -> Result<(), String> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (believed, mut was_believed) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            if log_in(&mut socket, script).await.is_some() {
                let _ = believed.send(()).await;
            }
        }
    });
    tokio::select! {
        reason = failure(settings(&address, Security::Plain)) => Err(reason),
        _ = was_believed.recv() => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_must_prove_that_it_knows_the_password() {
    plays(HONEST).await.expect("the server knows it");
    let impostor = plays(Script { password: "123456", ..HONEST }).await.unwrap_err();
    assert!(impostor.contains("proves another password than the account's"), "{impostor}");
    for proof in [Proof::Missing, Proof::Skipped] {
        let impostor = plays(Script { proof, ..HONEST }).await.unwrap_err();
        assert!(impostor.contains("does not prove that it knows the account's password"), "{impostor}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_asks_for_neither_too_little_work_nor_too_much() {
    let weak = plays(Script { iterations: 4095, ..HONEST }).await.unwrap_err();
    assert!(weak.contains("asks for 4095 iterations") && weak.contains("fewer than 4096"), "{weak}");
    let begun = std::time::Instant::now();
    for iterations in [1_000_001, 4_000_000_000, u64::MAX] {
        let hostile = plays(Script { iterations, ..HONEST }).await.unwrap_err();
        assert!(hostile.contains(&format!("asks for {iterations} iterations")), "{hostile}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "no work was done for it: {:?}", begun.elapsed());
    plays(Script { iterations: 20_000, ..HONEST }).await.expect("more than usual");
}

/// A certificate for localhost by an authority of its own; `None` if no openssl is there.
fn certificate(dir: &std::path::Path) -> bool {
    let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test \
         -addext basicConstraints=critical,CA:TRUE -keyout ca.key -out ca.crt && \
         openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost \
         -keyout server.key -out server.csr && printf 'subjectAltName=DNS:localhost\n' >ext && \
         openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -set_serial 1 -days 2 -extfile ext \
         -out server.crt";
    let output = std::process::Command::new("sh").args(["-c", script]).current_dir(dir).output();
    let made = output.is_ok_and(|o| o.status.success());
    if !made {
        let _ = writeln!(std::io::stderr(), "SKIPPED: openssl is not installed (deploy/install installs it)");
    }
    made
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_1_2_is_spoken_only_where_the_operator_says_so() {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let dir = tempfile::tempdir().unwrap();
    if !certificate(dir.path()) {
        return;
    }
    let old = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(dir.path().join("server.crt")).unwrap()],
            PrivateKeyDer::from_pem_file(dir.path().join("server.key")).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(old));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(socket).await else { return };
                let _ = until(&mut tls, "<stream:stream", 1).await;
                let _ = tls.write_all(b"<not-xmpp/>").await;
            });
        }
    });
    let with = |rules| Settings {
        ca_file: Some(dir.path().join("ca.crt")),
        rules,
        ..settings(&address, Security::DirectTls)
    };
    let reason = failure(with(LoginRules::default())).await;
    assert!(
        reason.contains("does not speak TLS 1.3") && reason.contains("xmpp.tls_min = \"1.2\""),
        "{reason}"
    );
    // Binding has a word, too.
    let both = LoginRules { tls_min: TlsMin::V1_2, channel_binding: BindingRule::Require };
    let reason = failure(with(both)).await;
    assert!(reason.contains("does not speak TLS 1.3"), "{reason}");
    let reason = failure(with(LoginRules { tls_min: TlsMin::V1_2, ..LoginRules::default() })).await;
    assert!(!reason.contains("TLS"), "the handshake came about: {reason}");
}
