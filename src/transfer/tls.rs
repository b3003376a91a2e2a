//! TLS 1.3 with raw public keys (RFC 7250): no certificates, each side proves its ed25519
//! identity key. Whether a proven key is welcome is decided after the handshake, so that the
//! refusal can say why.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible};
use rustls::{SignatureScheme, version::TLS13};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};

use super::ALPN;
use crate::types::{IdentityKey, PublicKey};

/// TLS alert numbers (RFC 8446, section 6) a refused handshake ends with.
pub mod alert {
    pub const ACCESS_DENIED: u8 = 49;
    pub const NO_APPLICATION_PROTOCOL: u8 = 120;
}

/// Our own side of every handshake.
#[derive(Debug)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    provider: Arc<CryptoProvider>,
    pub protocol: &'static [u8],
}

impl Identity {
    pub fn new(identity: &IdentityKey) -> Result<Self, Error> {
        let secret = identity.pkcs8_der();
        let secret = PrivatePkcs8KeyDer::from(secret.as_slice());
        let key = rustls::crypto::ring::sign::any_eddsa_type(&secret)?;
        let public = CertificateDer::from(identity.public().spki_der());
        Ok(Self {
            key: Arc::new(CertifiedKey::new(vec![public], key)),
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            protocol: ALPN,
        })
    }

    /// Answers dials: any proven ed25519 key gets through the handshake.
    pub fn server(&self) -> Result<QuicServerConfig, Error> {
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(Verifier::new(&self.provider, None)))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(self.key.clone())));
        config.alpn_protocols = vec![self.protocol.to_vec()];
        // No resumption: each connection proves its keys afresh.
        config.send_tls13_tickets = 0;
        config.try_into().map_err(|_| Error::General("no QUIC cipher suite".into()))
    }

    /// Dials a broker that must hold the key `expect`. Whatever key it shows instead is left in
    /// the returned cell, and our own key is not shown to it.
    pub fn client(&self, expect: PublicKey) -> Result<(QuicClientConfig, Arc<OnceLock<PublicKey>>), Error> {
        let verifier = Verifier::new(&self.provider, Some(expect));
        let found = verifier.found.clone();
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(self.key.clone())));
        config.alpn_protocols = vec![self.protocol.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        let config = config.try_into().map_err(|_| Error::General("no QUIC cipher suite".into()))?;
        Ok((config, found))
    }
}

/// The key the other side proved, and whether it speaks our protocol.
pub fn peer_of(connection: &quinn::Connection) -> Option<PublicKey> {
    let data = connection.handshake_data()?.downcast::<HandshakeData>().ok()?;
    if data.protocol.as_deref() != Some(ALPN) {
        return None;
    }
    let identity: Box<dyn Any> = connection.peer_identity()?;
    let certificates = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    PublicKey::from_spki_der(certificates.first()?).ok()
}

/// Checks that the other side's raw key is a sound ed25519 key, the expected one where one is
/// expected, and that it signed this very handshake.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    expect: Option<PublicKey>,
    found: Arc<OnceLock<PublicKey>>,
}

impl Verifier {
    fn new(provider: &Arc<CryptoProvider>, expect: Option<PublicKey>) -> Self {
        Self { provider: provider.clone(), expect, found: Arc::default() }
    }

    fn check(&self, raw_key: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<(), Error> {
        let found =
            PublicKey::from_spki_der(raw_key).map_err(|_| Error::from(CertificateError::BadEncoding))?;
        if !more.is_empty() {
            return Err(CertificateError::UnknownIssuer.into());
        }
        if self.expect.is_some_and(|expect| expect != found) {
            let _ = self.found.set(found);
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(())
    }

    fn signature(
        &self,
        message: &[u8],
        raw_key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(raw_key.as_ref());
        verify_tls13_signature_with_raw_key(
            message,
            &key,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
