//! Getting a stream: TCP, TLS with our own roots, SASL ([`super::scram`]). The crate's own connectors can
//! neither take a private CA nor report a wrong password.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, BufStream};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};
use tokio_xmpp::Error;
use tokio_xmpp::error::AuthError;
use tokio_xmpp::xmlstream::{
    PendingFeaturesRecv, StreamHeader, Timeouts, XmppStream, XmppStreamElement, initiate_stream,
};
use xmpp_parsers::jid::Jid;
use xmpp_parsers::sasl::DefinedCondition as Condition;
use xmpp_parsers::stream_features::StreamFeatures;
use xmpp_parsers::{ns, starttls};

use super::scram::{BindingRule, Choice, Fault, ScramError, authenticate};
use super::shallow::Shallow;

/// Where the system keeps its certificate authorities (Debian's ca-certificates).
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
const PORT_STARTTLS: u16 = 5222;
/// XEP-0368.
const PORT_DIRECT_TLS: u16 = 5223;

const TLS_1_3_ALONE: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// How the connection to the server is protected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Security {
    DirectTls,
    Starttls,
    /// Only to a server on this machine.
    Plain,
}

/// The oldest TLS that is spoken with a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TlsMin {
    V1_2,
    #[default]
    V1_3,
}

/// What is asked of a server before it is logged in to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LoginRules {
    /// [`BindingRule::Require`] needs TLS 1.3, whatever this says.
    pub tls_min: TlsMin,
    pub channel_binding: BindingRule,
}

pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// RFC 9266's keying material of a TLS 1.3 connection.
type Exporter = Option<Vec<u8>>;

/// Why an attempt failed, and how far binding had come by then.
struct Failed {
    error: ScramError,
    bound: bool,
    saw_no_offer: bool,
}

impl<E: Into<ScramError>> From<E> for Failed {
    fn from(e: E) -> Self {
        Self { error: e.into(), bound: false, saw_no_offer: false }
    }
}

type Buffered<T> = BufStream<Shallow<T>>;
type Stream = XmppStream<Buffered<Box<dyn Io>>>;

/// From dialling to the login's end, a second try without channel binding included.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// Trying again helps only after an operator changed something.
    #[error("{0}")]
    Refused(String),
    /// It is not the account's server, or not one that is safe to log in to.
    #[error("the XMPP server {address} {fault}")]
    Untrusted { address: String, fault: Fault },
    #[error(
        "the XMPP server {address} does not speak TLS 1.3, the oldest that xmpp.tls_min and xmpp.channel_binding allow; with xmpp.tls_min = \"1.2\" it is logged in to all the same"
    )]
    OldTls { address: String },
    #[error("the XMPP server {address} shows a certificate that is not believed: {reason}; {next_step}")]
    Certificate { address: String, reason: String, next_step: String },
    /// What answers is not what `xmpp.security` says is there.
    #[error("the XMPP server {address} {reason}; {next_step}")]
    OtherPort { address: String, reason: &'static str, next_step: &'static str },
    #[error("no session with the XMPP server {address}: {cause}")]
    Failed { address: String, cause: Error },
    #[error("the XMPP server {address} did not answer within {} s", LOGIN_TIMEOUT.as_secs())]
    Timeout { address: String },
}

impl LoginError {
    /// Whether trying again soon cannot help.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Untrusted { .. } | Self::OldTls { .. })
    }
}

/// How to reach one server.
#[derive(Clone)]
pub struct Connector {
    address: String,
    security: Security,
    rules: LoginRules,
    tls: Arc<ClientConfig>,
}

impl Connector {
    /// `server` is `host` or `host:port`; without it the account's domain is the host.
    pub fn new(
        domain: &str,
        server: Option<&str>,
        security: Security,
        ca_file: Option<&Path>,
        rules: LoginRules,
    ) -> io::Result<Self> {
        let port = if security == Security::DirectTls { PORT_DIRECT_TLS } else { PORT_STARTTLS };
        let host = server.unwrap_or(domain);
        let has_port = host.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok());
        let address = if has_port { host.to_owned() } else { format!("{host}:{port}") };
        let mut roots = RootCertStore::empty();
        if security != Security::Plain {
            let file = ca_file.map_or_else(|| PathBuf::from(SYSTEM_ROOTS), Path::to_owned);
            let named = |e: &dyn std::fmt::Display| {
                io::Error::other(format!("certificate authorities in {}: {e}", file.display()))
            };
            for certificate in CertificateDer::pem_file_iter(&file).map_err(|e| named(&e))? {
                let added = roots.add(certificate.map_err(|e| named(&e))?);
                // A system's bundle may hold a root this library does not read.
                if ca_file.is_some() {
                    added.map_err(|e| named(&e))?;
                }
            }
            if roots.is_empty() {
                return Err(named(&"there are none"));
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(match rules {
                LoginRules { tls_min: TlsMin::V1_2, channel_binding: BindingRule::Prefer } => {
                    rustls::DEFAULT_VERSIONS
                }
                _ => TLS_1_3_ALONE,
            })
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { address, security, rules, tls: Arc::new(tls) })
    }

    /// Connects and logs in, within [`LOGIN_TIMEOUT`].
    pub async fn login(&self, jid: &Jid, password: &str) -> Result<(StreamFeatures, Stream), LoginError> {
        let attempt = async {
            match self.attempt(jid, password, true).await {
                // Some servers offer channel binding and then fail it (ejabberd 23.01).
                Err(e) if e.bound && is_refusal(&e.error) && self.may_go_unbound() => {
                    let link = self.attempt(jid, password, false).await?;
                    tracing::warn!(
                        server = self.address,
                        "the server fails the channel binding it offers, or somebody stands between: logged in without; xmpp.channel_binding = \"require\" would not"
                    );
                    Ok(link)
                }
                result => result,
            }
        };
        match tokio::time::timeout(LOGIN_TIMEOUT, attempt).await {
            Ok(result) => result.map_err(|e| self.explain(e, jid)),
            Err(_) => Err(LoginError::Timeout { address: self.address.clone() }),
        }
    }

    fn may_go_unbound(&self) -> bool {
        self.rules.channel_binding == BindingRule::Prefer
    }

    /// One connection. Nothing but SCRAM is used, whatever the server offers.
    async fn attempt(
        &self,
        jid: &Jid,
        password: &str,
        bind_channel: bool,
    ) -> Result<(StreamFeatures, Stream), Failed> {
        let domain = jid.domain().as_str();
        let (stream, exporter) = self.open(domain).await?;
        let (features, stream) = stream.recv_features().await?;
        let choice = if bind_channel {
            Choice::among(&features, exporter, self.rules.channel_binding)?
        } else {
            Choice::without_binding(&features)?
        };
        let user = jid.node().map(|n| n.as_str()).unwrap_or_default();
        let login = authenticate(stream, &choice, user, password).await;
        let stream = login.map_err(|error| Failed {
            error,
            bound: choice.is_bound(),
            saw_no_offer: choice.saw_no_offer(),
        })?;
        tracing::debug!(server = self.address, mechanism = choice.mechanism(), "logged in");
        let stream = stream.send_header(header(domain)).await?;
        Ok(stream.recv_features().await?)
    }

    /// A protected stream, before the login, with what it can be bound to.
    async fn open(
        &self,
        domain: &str,
    ) -> Result<(PendingFeaturesRecv<Buffered<Box<dyn Io>>>, Exporter), Error> {
        let timeouts = Timeouts::tight();
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let (io, exporter): (Box<dyn Io>, _) = match self.security {
            Security::Plain if !tcp.peer_addr()?.ip().is_loopback() => {
                return Err(io::Error::other(
                    "an unprotected session is possible only to a server on this machine",
                )
                .into());
            }
            Security::Plain => (Box::new(tcp), None),
            Security::DirectTls => self.tls(tcp, domain).await?,
            Security::Starttls => {
                let stream = initiate_stream(buffered(tcp), ns::JABBER_CLIENT, header(domain), timeouts);
                let (features, stream) = stream.await.map_err(no_xmpp)?.recv_features().await?;
                self.starttls(features, stream, domain).await?
            }
        };
        let stream = initiate_stream(buffered(io), ns::JABBER_CLIENT, header(domain), timeouts).await?;
        Ok((stream, exporter))
    }

    fn explain(&self, failed: Failed, jid: &Jid) -> LoginError {
        let (account, address) = (jid.to_bare(), self.address.clone());
        let error = match failed.error {
            ScramError::Fault(fault) => return LoginError::Untrusted { address, fault },
            ScramError::Xmpp(error) => error,
        };
        match error {
            Error::Io(ref e) if is_old_tls(e) => LoginError::OldTls { address },
            Error::Io(ref e) if certificate_fault(e).is_some() => {
                let (reason, next_step) = certificate_fault(e).unwrap_or_default();
                LoginError::Certificate { address, reason, next_step }
            }
            Error::Io(ref e) if self.security == Security::DirectTls && is_no_tls(e) => {
                LoginError::OtherPort {
                    address,
                    reason: "does not begin with TLS at that port",
                    next_step: "it is as a rule the port of StartTLS: set xmpp.security = \"starttls\", or name the \
                            port of direct TLS (5223) in xmpp.server",
                }
            }
            Error::Io(ref e) if self.security != Security::DirectTls && (is_cut(e) || is_no_xmpp(e)) => {
                self.silent()
            }
            Error::Disconnected if self.security != Security::DirectTls => self.silent(),
            Error::Auth(AuthError::Fail(Condition::NotAuthorized | Condition::MalformedRequest))
                if failed.bound && !self.may_go_unbound() =>
            {
                LoginError::Untrusted { address, fault: Fault::BindingRefused }
            }
            // What servers say to a client that saw no offer of what they offer.
            Error::Auth(AuthError::Fail(Condition::MalformedRequest)) if failed.saw_no_offer => {
                LoginError::Untrusted { address, fault: Fault::Stripped }
            }
            Error::Auth(AuthError::Fail(Condition::AccountDisabled | Condition::CredentialsExpired)) => {
                LoginError::Refused(format!("the account {account} is disabled or its password expired"))
            }
            Error::Auth(AuthError::Fail(Condition::NotAuthorized)) => {
                LoginError::Refused(format!("the server refuses the password of {account}"))
            }
            Error::Auth(AuthError::Fail(ref condition))
                if !matches!(condition, Condition::TemporaryAuthFailure | Condition::Aborted) =>
            {
                LoginError::Refused(format!("the server refuses the login of {account}: {condition:?}"))
            }
            Error::Auth(AuthError::NoMechanism) => {
                LoginError::Refused(format!("the server {} offers no login by SCRAM", self.address))
            }
            cause => LoginError::Failed { address, cause },
        }
    }

    /// It ended the connection at the first word of XMPP.
    fn silent(&self) -> LoginError {
        LoginError::OtherPort {
            address: self.address.clone(),
            reason: "ended the connection before it said anything, or said what is no XMPP",
            next_step: "at a port of direct TLS (5223) it wants TLS from the beginning: set xmpp.security = \
                        \"direct-tls\", or name the port of StartTLS (5222) in xmpp.server",
        }
    }

    async fn starttls(
        &self,
        features: StreamFeatures,
        mut stream: XmppStream<Buffered<TcpStream>>,
        domain: &str,
    ) -> Result<(Box<dyn Io>, Exporter), Error> {
        if !features.can_starttls() {
            return Err(tokio_xmpp::error::ProtocolError::NoTls.into());
        }
        stream.send(&XmppStreamElement::Starttls(starttls::Nonza::Request(starttls::Request))).await?;
        match stream.next().await.map(|v| v.map(|v| v.into_read_error()).and_then(|x| x)) {
            Some(Ok(XmppStreamElement::Starttls(starttls::Nonza::Proceed(_)))) => {}
            Some(Ok(_)) => return Err(io::Error::other("the server does not proceed with TLS").into()),
            Some(Err(e)) => return Err(io::Error::other(format!("{e:?}")).into()),
            None => return Err(Error::Disconnected),
        }
        self.tls(stream.into_inner().into_inner().into_inner(), domain).await
    }

    async fn tls(&self, tcp: TcpStream, domain: &str) -> Result<(Box<dyn Io>, Exporter), Error> {
        let name = ServerName::try_from(domain.to_owned()).map_err(io::Error::other)?;
        let stream = TlsConnector::from(self.tls.clone()).connect(name, tcp).await?;
        let connection = stream.get_ref().1;
        // RFC 9266; with TLS 1.2 there is no exporter binding worth having.
        let exporter = match connection.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => Some(
                connection
                    .export_keying_material(vec![0u8; 32], b"EXPORTER-Channel-Binding", None)
                    .map_err(io::Error::other)?,
            ),
            _ => None,
        };
        Ok((Box::new(stream), exporter))
    }
}

fn buffered<T: Io>(io: T) -> Buffered<T> {
    BufStream::new(Shallow::new(io))
}

fn header(domain: &str) -> StreamHeader<'static> {
    StreamHeader { to: Some(Cow::Owned(domain.to_owned())), from: None, id: None }
}

/// Whether the server said no to who we are, as opposed to not now.
fn is_refusal(error: &ScramError) -> bool {
    matches!(error, ScramError::Xmpp(Error::Auth(AuthError::Fail(c)))
        if *c != Condition::TemporaryAuthFailure && *c != Condition::Aborted)
}

/// What is wrong with the server's certificate, and what to do about that.
fn certificate_fault(error: &io::Error) -> Option<(String, String)> {
    use rustls::{CertificateError as C, Error as Tls};
    let Tls::InvalidCertificate(fault) = error.get_ref()?.downcast_ref::<Tls>()? else { return None };
    let next_step = match fault {
        // An authority of the same name has another key.
        C::UnknownIssuer | C::BadSignature => {
            "if the server has an authority of its own, name that authority's certificate in xmpp.ca_file"
        }
        C::NotValidForName | C::NotValidForNameContext { .. } => {
            "it must be made for the domain of xmpp.jid, whatever host xmpp.server names"
        }
        C::Expired | C::ExpiredContext { .. } => {
            "the server needs a new one, or this machine's clock is wrong"
        }
        C::NotValidYet | C::NotValidYetContext { .. } => "this machine's clock or the server's is wrong",
        _ => "see the server's certificate with 'openssl s_client'",
    };
    Some((fault.to_string(), next_step.to_owned()))
}

/// Whether what came is no TLS at all.
fn is_no_tls(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidMessage(_)))
}

/// What came first is no stream header: a TLS alert, or nothing.
#[derive(Debug, thiserror::Error)]
#[error("no XMPP: {0}")]
struct NoXmpp(io::Error);

fn no_xmpp(error: io::Error) -> Error {
    Error::Io(io::Error::new(error.kind(), NoXmpp(error)))
}

fn is_no_xmpp(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|e| e.is::<NoXmpp>())
}

fn is_cut(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof)
}

/// Whether the handshake failed for want of a version that both sides speak.
fn is_old_tls(error: &io::Error) -> bool {
    use rustls::{AlertDescription, Error as Tls, PeerIncompatible};
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<Tls>());
    matches!(
        inner,
        Some(
            Tls::AlertReceived(AlertDescription::ProtocolVersion)
                | Tls::PeerIncompatible(
                    PeerIncompatible::ServerDoesNotSupportTls12Or13
                        | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                )
        )
    )
}
