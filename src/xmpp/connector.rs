//! Getting a stream: TCP, TLS with our own roots, SASL. The crate's own connectors can neither take
//! a private CA nor report a wrong password.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use sasl::common::{ChannelBinding, Credentials};
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

use super::shallow::Shallow;

/// Where the system keeps its certificate authorities (Debian's ca-certificates).
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
const PORT_STARTTLS: u16 = 5222;
/// XEP-0368.
const PORT_DIRECT_TLS: u16 = 5223;

/// How the connection to the server is protected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Security {
    DirectTls,
    Starttls,
    /// Only to a server on this machine.
    Plain,
}

pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

type Buffered<T> = BufStream<Shallow<T>>;
type Stream = XmppStream<Buffered<Box<dyn Io>>>;

/// From dialling to the login's end, a second try without channel binding included.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// Trying again helps only after an operator changed something.
    #[error("{0}")]
    Refused(String),
    #[error("no session with the XMPP server {address}: {cause}")]
    Failed { address: String, cause: Error },
    #[error("the XMPP server {address} did not answer within {} s", LOGIN_TIMEOUT.as_secs())]
    Timeout { address: String },
}

/// How to reach one server.
#[derive(Clone)]
pub struct Connector {
    address: String,
    security: Security,
    tls: Arc<ClientConfig>,
}

impl Connector {
    /// `server` is `host` or `host:port`; without it the account's domain is the host.
    pub fn new(
        domain: &str,
        server: Option<&str>,
        security: Security,
        ca_file: Option<&Path>,
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
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { address, security, tls: Arc::new(tls) })
    }

    /// Connects and logs in, within [`LOGIN_TIMEOUT`].
    pub async fn login(&self, jid: &Jid, password: &str) -> Result<(StreamFeatures, Stream), LoginError> {
        let attempt = async {
            match self.attempt(jid, password, true).await {
                // Some servers offer channel binding and then fail it (ejabberd 23.01).
                Err((e, true)) if is_refusal(&e) => self.attempt(jid, password, false).await,
                result => result,
            }
        };
        match tokio::time::timeout(LOGIN_TIMEOUT, attempt).await {
            Ok(Ok(link)) => Ok(link),
            Ok(Err((e, _))) => Err(self.explain(e, jid)),
            Err(_) => Err(LoginError::Timeout { address: self.address.clone() }),
        }
    }

    /// One connection. Nothing but SCRAM is used, whatever the server offers. An error comes with
    /// whether channel binding was used.
    async fn attempt(
        &self,
        jid: &Jid,
        password: &str,
        bind_channel: bool,
    ) -> Result<(StreamFeatures, Stream), (Error, bool)> {
        let domain = jid.domain().as_str();
        let (stream, binding) = self.open(domain).await.map_err(|e| (e, false))?;
        let (features, stream) = stream.recv_features().await.map_err(|e| (e.into(), false))?;
        let mut mechanisms = features.sasl_mechanisms;
        mechanisms.retain(|m| m.starts_with("SCRAM-"));
        // Given a binding, the library tries only -PLUS mechanisms.
        let bound = bind_channel
            && matches!(binding, ChannelBinding::TlsExporter(_))
            && mechanisms.iter().any(|m| m.ends_with("-PLUS"));
        let binding = if bound { binding } else { ChannelBinding::None };
        let user = jid.node().map(|n| n.as_str().to_owned()).unwrap_or_default();
        let credentials = Credentials::default()
            .with_username(user)
            .with_password(password.to_owned())
            .with_channel_binding(binding);
        let stream =
            tokio_xmpp::client_login(stream, mechanisms, credentials).await.map_err(|e| (e, bound))?;
        let stream = stream.send_header(header(domain)).await.map_err(|e| (e.into(), false))?;
        stream.recv_features().await.map_err(|e| (e.into(), false))
    }

    /// A protected stream, before the login.
    async fn open(
        &self,
        domain: &str,
    ) -> Result<(PendingFeaturesRecv<Buffered<Box<dyn Io>>>, ChannelBinding), Error> {
        let timeouts = Timeouts::tight();
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let (io, binding): (Box<dyn Io>, _) = match self.security {
            Security::Plain if !tcp.peer_addr()?.ip().is_loopback() => {
                return Err(io::Error::other(
                    "an unprotected session is possible only to a server on this machine",
                )
                .into());
            }
            Security::Plain => (Box::new(tcp), ChannelBinding::None),
            Security::DirectTls => self.tls(tcp, domain).await?,
            Security::Starttls => {
                let stream =
                    initiate_stream(buffered(tcp), ns::JABBER_CLIENT, header(domain), timeouts).await?;
                let (features, stream) = stream.recv_features().await?;
                self.starttls(features, stream, domain).await?
            }
        };
        let stream = initiate_stream(buffered(io), ns::JABBER_CLIENT, header(domain), timeouts).await?;
        Ok((stream, binding))
    }

    fn explain(&self, error: Error, jid: &Jid) -> LoginError {
        let account = jid.to_bare();
        match error {
            Error::Auth(AuthError::Fail(Condition::AccountDisabled | Condition::CredentialsExpired)) => {
                LoginError::Refused(format!("the account {account} is disabled or its password expired"))
            }
            Error::Auth(AuthError::Fail(Condition::NotAuthorized)) => {
                LoginError::Refused(format!("the server refuses the password of {account}"))
            }
            Error::Auth(AuthError::Fail(ref condition)) if is_refusal(&error) => {
                LoginError::Refused(format!("the server refuses the login of {account}: {condition:?}"))
            }
            Error::Auth(AuthError::NoMechanism) => {
                LoginError::Refused(format!("the server {} offers no login by SCRAM", self.address))
            }
            cause => LoginError::Failed { address: self.address.clone(), cause },
        }
    }

    async fn starttls(
        &self,
        features: StreamFeatures,
        mut stream: XmppStream<Buffered<TcpStream>>,
        domain: &str,
    ) -> Result<(Box<dyn Io>, ChannelBinding), Error> {
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

    async fn tls(&self, tcp: TcpStream, domain: &str) -> Result<(Box<dyn Io>, ChannelBinding), Error> {
        let name = ServerName::try_from(domain.to_owned()).map_err(io::Error::other)?;
        let stream = TlsConnector::from(self.tls.clone()).connect(name, tcp).await?;
        let connection = stream.get_ref().1;
        // RFC 9266; with TLS 1.2 there is no exporter binding worth having.
        let binding = match connection.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => ChannelBinding::TlsExporter(
                connection
                    .export_keying_material(vec![0u8; 32], b"EXPORTER-Channel-Binding", None)
                    .map_err(io::Error::other)?,
            ),
            _ => ChannelBinding::None,
        };
        Ok((Box::new(stream), binding))
    }
}

fn buffered<T: Io>(io: T) -> Buffered<T> {
    BufStream::new(Shallow::new(io))
}

fn header(domain: &str) -> StreamHeader<'static> {
    StreamHeader { to: Some(Cow::Owned(domain.to_owned())), from: None, id: None }
}

/// Whether the server said no to who we are, as opposed to not now.
fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Auth(AuthError::Fail(c)) if *c != Condition::TemporaryAuthFailure && *c != Condition::Aborted)
}
