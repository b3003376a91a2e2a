//! SCRAM (RFC 5802, RFC 7677) over an XMPP stream, with what the XMPP library leaves out: the server
//! proves that it knows the password, too, asks for no more and no less work than is reasonable, and
//! cannot talk us out of channel binding unseen.

use std::collections::BTreeSet;

use futures::{SinkExt, StreamExt};
use sasl::client::mechanisms::Scram;
use sasl::client::{Mechanism, MechanismError};
use sasl::common::scram::{Sha1, Sha256};
use sasl::common::{ChannelBinding, Credentials};
use tokio::io::{AsyncBufRead, AsyncWrite};
use tokio_xmpp::Error;
use tokio_xmpp::error::AuthError;
use tokio_xmpp::xmlstream::{InitiatingStream, ReadError, XmppStream, XmppStreamElement};
use xmpp_parsers::sasl::{Abort, Auth, Failure, Mechanism as Name, Nonza, Response};
use xmpp_parsers::sasl_cb::Type;
use xmpp_parsers::stream_features::StreamFeatures;

/// RFC 7677, section 4: fewer make a stolen answer cheap to guess the password from.
pub const ITERATIONS_MIN: u32 = 4096;
/// About a second of work. A server that wants more wants to keep us busy.
pub const ITERATIONS_MAX: u32 = 1_000_000;
/// No server's first message is longer.
const CHALLENGE_BYTES_MAX: usize = 4096;

/// Why a server is not logged in to, though it would.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error(
        "does not prove that it knows the account's password: it is not the account's server, or one that breaks RFC 5802"
    )]
    NotProven,
    #[error("proves another password than the account's: it is not the account's server")]
    WrongProof,
    #[error(
        "asks for {0} iterations of the password's hash, fewer than {ITERATIONS_MIN}; let its operator set them higher (and the password anew)"
    )]
    TooFewIterations(u32),
    #[error("asks for {0} iterations of the password's hash, more than {ITERATIONS_MAX}")]
    TooManyIterations(u64),
    #[error("answers with a nonce that is not made from ours")]
    Nonce,
    #[error("sends no proper SCRAM message: {0}")]
    Malformed(&'static str),
    #[error(
        "offers no channel binding over TLS 1.3 (SCRAM-…-PLUS with tls-exporter), which xmpp.channel_binding = \"require\" asks for"
    )]
    NoBinding,
    #[error(
        "refuses the login bound to this TLS connection, which xmpp.channel_binding = \"require\" asks for: somebody stands between, the password is wrong, or the server fails what it offers"
    )]
    BindingRefused,
    #[error("binds logins to the TLS connection, and we were told that it does not: somebody stands between")]
    Stripped,
}

/// Whether a login must be bound to its TLS connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum BindingRule {
    /// Where the server offers it and it works.
    #[default]
    Prefer,
    Require,
}

#[derive(Debug)]
pub enum ScramError {
    Xmpp(Error),
    Fault(Fault),
}

impl<E: Into<Error>> From<E> for ScramError {
    fn from(e: E) -> Self {
        Self::Xmpp(e.into())
    }
}

/// One way of logging in.
#[derive(Clone, PartialEq, Debug)]
pub struct Choice {
    name: Name,
    binding: ChannelBinding,
}

impl Choice {
    /// The best that `features` offer, nothing but SCRAM. `exporter` is RFC 9266's keying material of the
    /// TLS connection, where it has some.
    pub fn among(
        features: &StreamFeatures,
        exporter: Option<Vec<u8>>,
        rule: BindingRule,
    ) -> Result<Self, ScramError> {
        let offers = |name: &str| features.sasl_mechanisms.contains(name);
        let types = features.sasl_cb.as_ref().map(|cb| cb.types.as_slice());
        let exports = types.is_none_or(|types| types.contains(&Type::TlsExporter));
        let bindable = exporter.is_some() && exports;
        let bound = match () {
            () if bindable && offers("SCRAM-SHA-256-PLUS") => Some(Name::ScramSha256Plus),
            () if bindable && offers("SCRAM-SHA-1-PLUS") => Some(Name::ScramSha1Plus),
            () => None,
        };
        match (bound, exporter) {
            (Some(name), Some(key)) => Ok(Self { name, binding: ChannelBinding::TlsExporter(key) }),
            _ if rule == BindingRule::Require => Err(ScramError::Fault(Fault::NoBinding)),
            (_, exporter) => {
                // Tells the server that we could, and saw no offer: if it made one, it ends the login.
                let saw_none = types.is_none() && !is_bound_offered(&features.sasl_mechanisms);
                let binding = match exporter {
                    Some(_) if saw_none => ChannelBinding::Unsupported,
                    _ => ChannelBinding::None,
                };
                Self::unbound(&features.sasl_mechanisms, binding)
            }
        }
    }

    /// Without binding, to a server that fails the one it offers.
    pub fn without_binding(features: &StreamFeatures) -> Result<Self, ScramError> {
        Self::unbound(&features.sasl_mechanisms, ChannelBinding::None)
    }

    fn unbound(offered: &BTreeSet<String>, binding: ChannelBinding) -> Result<Self, ScramError> {
        let name = match () {
            () if offered.contains("SCRAM-SHA-256") => Name::ScramSha256,
            () if offered.contains("SCRAM-SHA-1") => Name::ScramSha1,
            () => return Err(AuthError::NoMechanism.into()),
        };
        Ok(Self { name, binding })
    }

    pub fn is_bound(&self) -> bool {
        matches!(self.binding, ChannelBinding::TlsExporter(_))
    }

    /// Whether the server is told that we saw no offer of a binding.
    pub fn saw_no_offer(&self) -> bool {
        self.binding == ChannelBinding::Unsupported
    }

    pub fn mechanism(&self) -> String {
        self.name.to_string()
    }
}

fn is_bound_offered(mechanisms: &BTreeSet<String>) -> bool {
    mechanisms.iter().any(|m| m.ends_with("-PLUS"))
}

/// Our side of one exchange.
struct Exchange {
    mechanism: Box<dyn Mechanism + Send>,
    nonce: String,
    answered: bool,
}

impl Exchange {
    /// With the client's first message.
    fn begin(choice: &Choice, user: &str, password: &str) -> Result<(Self, Vec<u8>), Fault> {
        // RFC 5802, section 5.1; the library writes the name as it is.
        let user = user.replace('=', "=3D").replace(',', "=2C");
        let credentials = Credentials::default()
            .with_username(user)
            .with_password(password)
            .with_channel_binding(choice.binding.clone());
        let failed = |_| Fault::Malformed("none can be begun");
        let mut mechanism: Box<dyn Mechanism + Send> = match choice.name {
            Name::ScramSha1 | Name::ScramSha1Plus => {
                Box::new(Scram::<Sha1>::from_credentials(credentials).map_err(failed)?)
            }
            _ => Box::new(Scram::<Sha256>::from_credentials(credentials).map_err(failed)?),
        };
        let first = mechanism.initial();
        let nonce = std::str::from_utf8(&first).ok().and_then(|text| text.rsplit_once(",r="));
        let nonce = nonce.map(|(_, nonce)| nonce.to_owned()).ok_or(Fault::Nonce)?;
        Ok((Self { mechanism, nonce, answered: false }, first))
    }

    /// The client's final message. Takes as long as the server's iterations do.
    fn answer(&mut self, challenge: &[u8]) -> Result<Vec<u8>, Fault> {
        if std::mem::replace(&mut self.answered, true) {
            return Err(Fault::Malformed("a second challenge"));
        }
        check_challenge(challenge, &self.nonce)?;
        self.mechanism.response(challenge).map_err(|_| Fault::Malformed("the challenge"))
    }

    /// Whether the server knows the password.
    fn end(&mut self, data: &[u8]) -> Result<(), Fault> {
        self.mechanism.success(data).map_err(|e| match e {
            MechanismError::InvalidSignatureInSuccessResponse => Fault::WrongProof,
            _ => Fault::NotProven,
        })
    }
}

/// The library takes the last of several attributes of one name, any number of iterations and any
/// nonce, so the server's first message is looked at before.
fn check_challenge(challenge: &[u8], nonce: &str) -> Result<(), Fault> {
    let text = Some(challenge).filter(|c| c.len() <= CHALLENGE_BYTES_MAX);
    let text = text.and_then(|c| std::str::from_utf8(c).ok()).ok_or(Fault::Malformed("the challenge"))?;
    let mut parts = text.split(',');
    let mut next = |name: &'static str, what| {
        parts
            .next()
            .and_then(|p| p.strip_prefix(name))
            .filter(|v| !v.is_empty())
            .ok_or(Fault::Malformed(what))
    };
    let theirs = next("r=", "no nonce")?;
    next("s=", "no salt")?;
    let iterations: u64 =
        next("i=", "no iterations")?.parse().map_err(|_| Fault::Malformed("the iterations"))?;
    if parts.any(|p| ["r=", "s=", "i=", "m="].iter().any(|known| p.starts_with(known))) {
        return Err(Fault::Malformed("an attribute twice, or one that is not known"));
    }
    if !theirs.starts_with(nonce) || theirs.len() == nonce.len() {
        return Err(Fault::Nonce);
    }
    match u32::try_from(iterations) {
        Ok(n) if n < ITERATIONS_MIN => Err(Fault::TooFewIterations(n)),
        Ok(n) if n <= ITERATIONS_MAX => Ok(()),
        _ => Err(Fault::TooManyIterations(iterations)),
    }
}

/// Logs in on a stream, and returns it when the server has proven itself.
pub async fn authenticate<S: AsyncBufRead + AsyncWrite + Unpin>(
    mut stream: XmppStream<S>,
    choice: &Choice,
    user: &str,
    password: &str,
) -> Result<InitiatingStream<S>, ScramError> {
    let (mut exchange, data) = Exchange::begin(choice, user, password).map_err(ScramError::Fault)?;
    stream.send(&XmppStreamElement::Sasl(Nonza::Auth(Auth { mechanism: choice.name.clone(), data }))).await?;
    loop {
        match receive(&mut stream).await? {
            Nonza::Challenge(challenge) => {
                let work = tokio::task::spawn_blocking(move || {
                    let answer = exchange.answer(&challenge.data);
                    (exchange, answer)
                });
                let (back, answer) = work.await.map_err(std::io::Error::other)?;
                exchange = back;
                match answer {
                    Ok(data) => {
                        stream.send(&XmppStreamElement::Sasl(Nonza::Response(Response { data }))).await?;
                    }
                    Err(fault) => {
                        let _ = stream.send(&XmppStreamElement::Sasl(Nonza::Abort(Abort))).await;
                        return Err(ScramError::Fault(fault));
                    }
                }
            }
            Nonza::Success(success) => {
                exchange.end(&success.data).map_err(ScramError::Fault)?;
                return Ok(stream.initiate_reset());
            }
            Nonza::Failure(failure) if choice.saw_no_offer() && blames_binding(&failure) => {
                return Err(ScramError::Fault(Fault::Stripped));
            }
            Nonza::Failure(failure) => return Err(AuthError::Fail(failure.defined_condition).into()),
            _ => return Err(ScramError::Fault(Fault::Malformed("a message that only clients send"))),
        }
    }
}

/// ejabberd has one condition for all that is wrong with a login, and tells this in words only.
fn blames_binding(failure: &Failure) -> bool {
    failure.texts.values().any(|text| text.to_ascii_lowercase().contains("channel binding"))
}

async fn receive<S: AsyncBufRead + AsyncWrite + Unpin>(
    stream: &mut XmppStream<S>,
) -> Result<Nonza, ScramError> {
    loop {
        match stream.next().await.map(|v| v.map(|v| v.into_read_error()).and_then(|x| x)) {
            Some(Ok(XmppStreamElement::Sasl(nonza))) => return Ok(nonza),
            Some(Ok(_)) => return Err(ScramError::Fault(Fault::Malformed("something else"))),
            Some(Err(ReadError::HardError(e))) => return Err(e.into()),
            Some(Err(ReadError::ParseError(e))) => {
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, e).into());
            }
            // The whole login has a time limit.
            Some(Err(ReadError::SoftTimeout)) => {}
            Some(Err(ReadError::StreamFooterReceived)) | None => return Err(Error::Disconnected.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xmpp_parsers::sasl_cb::SaslChannelBinding;

    fn features(mechanisms: &[&str], types: Option<&[Type]>) -> StreamFeatures {
        StreamFeatures {
            sasl_mechanisms: mechanisms.iter().map(|m| (*m).to_owned()).collect(),
            sasl_cb: types.map(|types| SaslChannelBinding { types: types.to_vec() }),
            ..StreamFeatures::default()
        }
    }

    fn among(mechanisms: &[&str], exporter: bool, rule: BindingRule) -> Result<Choice, ScramError> {
        Choice::among(&features(mechanisms, None), exporter.then(|| vec![7; 32]), rule)
    }

    const ALL: &[&str] =
        &["PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS", "X-OAUTH2"];

    #[test]
    fn the_best_that_is_offered_is_chosen() {
        use BindingRule::{Prefer, Require};
        let bound = ChannelBinding::TlsExporter(vec![7; 32]);
        for (mechanisms, exporter, name, binding) in [
            (ALL, true, Name::ScramSha256Plus, bound.clone()),
            (&ALL[..4], true, Name::ScramSha1Plus, bound),
            // Told to the server, which knows whether it made an offer that somebody took out.
            (&["SCRAM-SHA-1", "SCRAM-SHA-256"], true, Name::ScramSha256, ChannelBinding::Unsupported),
            (&["SCRAM-SHA-1"], true, Name::ScramSha1, ChannelBinding::Unsupported),
            (ALL, false, Name::ScramSha256, ChannelBinding::None),
        ] {
            assert_eq!(
                among(mechanisms, exporter, Prefer).unwrap(),
                Choice { name, binding },
                "{mechanisms:?}"
            );
        }
        for (mechanisms, exporter) in [(ALL, false), (&["SCRAM-SHA-256"], true), (&["PLAIN"], true)] {
            let error = among(mechanisms, exporter, Require).unwrap_err();
            assert!(matches!(error, ScramError::Fault(Fault::NoBinding)), "{error:?}");
        }
        assert!(matches!(
            among(&["PLAIN", "ANONYMOUS"], true, Prefer),
            Err(ScramError::Xmpp(Error::Auth(AuthError::NoMechanism)))
        ));
    }

    #[test]
    fn a_server_that_binds_otherwise_is_not_taken_for_one_that_does_not() {
        let only = features(ALL, Some(&[Type::TlsServerEndPoint]));
        let choice = Choice::among(&only, Some(vec![7; 32]), BindingRule::Prefer).unwrap();
        assert_eq!(choice, Choice { name: Name::ScramSha256, binding: ChannelBinding::None });
        assert!(Choice::among(&only, Some(vec![7; 32]), BindingRule::Require).is_err());
        let both = features(ALL, Some(&[Type::TlsServerEndPoint, Type::TlsExporter]));
        assert!(Choice::among(&both, Some(vec![7; 32]), BindingRule::Require).unwrap().is_bound());
    }

    #[test]
    fn the_servers_first_message_is_looked_at_before_work_is_done_for_it() {
        let check = |text: &str| check_challenge(text.as_bytes(), "abc");
        assert_eq!(check("r=abcdef,s=QSXCR+Q6sek8bf92,i=4096"), Ok(()));
        assert_eq!(check("r=abcdef,s=QSXCR+Q6sek8bf92,i=1000000,x=later"), Ok(()));
        for (text, fault) in [
            ("r=abcdef,s=QQ==,i=4095", Fault::TooFewIterations(4095)),
            ("r=abcdef,s=QQ==,i=0", Fault::TooFewIterations(0)),
            ("r=abcdef,s=QQ==,i=1000001", Fault::TooManyIterations(1_000_001)),
            ("r=abcdef,s=QQ==,i=18446744073709551615", Fault::TooManyIterations(u64::MAX)),
            ("r=abc,s=QQ==,i=4096", Fault::Nonce),
            ("r=xyzabc,s=QQ==,i=4096", Fault::Nonce),
        ] {
            assert_eq!(check(text), Err(fault), "{text}");
        }
        for text in [
            "",
            "r=abcdef",
            "r=abcdef,s=,i=4096",
            "r=abcdef,s=QQ==,i=-1",
            "s=QQ==,r=abcdef,i=4096",
            "m=x,r=abcdef,s=QQ==,i=4096",
            "r=abcdef,s=QQ==,i=4096,i=2000000000",
            "e=other-error",
            &format!("r=abc{},s=QQ==,i=4096", "x".repeat(CHALLENGE_BYTES_MAX)),
        ] {
            assert!(matches!(check(text), Err(Fault::Malformed(_))), "{text}");
        }
        assert!(check_challenge(b"r=abc\xff,s=QQ==,i=4096", "abc").is_err());
    }

    #[test]
    fn the_password_is_proven_by_both_sides() {
        use sasl::common::Password;
        use sasl::common::scram::ScramProvider;
        let choice = Choice { name: Name::ScramSha256, binding: ChannelBinding::None };
        let begin = || Exchange::begin(&choice, "a=b,c", "pencil").unwrap();
        let (mut exchange, first) = begin();
        let first = String::from_utf8(first).unwrap();
        assert!(first.starts_with("n,,n=a=3Db=2Cc,r="), "{first}");
        let challenge = format!("r={}more,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", exchange.nonce);
        let last = String::from_utf8(exchange.answer(challenge.as_bytes()).unwrap()).unwrap();
        let (bare, _) = last.rsplit_once(",p=").unwrap();
        // As a server that knows the password has it (RFC 5802, section 3).
        let signature = |password: &str| {
            use base64::Engine as _;
            let base64 = base64::engine::general_purpose::STANDARD;
            let salt = base64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
            let salted = Sha256::derive(&Password::from(password), &salt, 4096).unwrap();
            let key = Sha256::hmac(b"Server Key", &salted).unwrap();
            let message = format!("{},{challenge},{bare}", first.strip_prefix("n,,").unwrap());
            format!("v={}", base64.encode(Sha256::hmac(message.as_bytes(), &key).unwrap()))
        };
        assert_eq!(exchange.end(signature("pencil").as_bytes()), Ok(()));
        assert_eq!(exchange.end(signature("pen").as_bytes()), Err(Fault::WrongProof));
        assert_eq!(exchange.end(b""), Err(Fault::NotProven));
        assert_eq!(exchange.end(b"e=other-error"), Err(Fault::NotProven));
        assert!(matches!(exchange.answer(challenge.as_bytes()), Err(Fault::Malformed(_))), "once only");
        assert_eq!(begin().0.end(signature("pencil").as_bytes()), Err(Fault::NotProven), "too soon");
    }
}
