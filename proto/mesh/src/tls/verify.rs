//! What a peer's certificate must satisfy.

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use crate::{
    identity::{Identity, identities},
    text::Text,
};

/// The two AES suites of TLS 1.3, and post-quantum key exchange where the peer has it.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    PROVIDER.clone()
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider().signature_verification_algorithms
}

/// Carried through rustls as the reason of a refusal; see [`super::TlsError`] for what each means.
#[derive(Debug)]
pub(super) enum PeerError {
    NoIdentity,
    WrongTrustDomain { expected: Text, got: Vec<Identity> },
    Mismatch { expected: Vec<Identity>, got: Vec<Identity> },
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for PeerError {}

impl From<PeerError> for rustls::Error {
    fn from(error: PeerError) -> Self {
        CertificateError::Other(OtherError(Arc::new(error))).into()
    }
}

fn identities_of(certificate: &CertificateDer<'_>) -> Result<Vec<Identity>, rustls::Error> {
    let found = identities(certificate).map_err(|_| CertificateError::BadEncoding)?;
    if found.is_empty() { Err(PeerError::NoIdentity.into()) } else { Ok(found) }
}

/// Accepts clients of one trust domain.
#[derive(Debug)]
pub(super) struct TrustedClient {
    trust_domain: Text,
    /// Chain, validity and the clientAuth usage are checked by rustls.
    inner: Arc<dyn ClientCertVerifier>,
}

impl TrustedClient {
    pub(super) fn new(trust_domain: Text, roots: Arc<RootCertStore>) -> Self {
        let inner = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .clear_root_hint_subjects()
            .build()
            .expect("a workload certificate comes with at least one root");
        Self { trust_domain, inner }
    }
}

impl ClientCertVerifier for TrustedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(leaf, intermediates, now)?;
        let got = identities_of(leaf)?;
        if got.iter().any(|identity| *identity.trust_domain() == self.trust_domain) {
            Ok(verified)
        } else {
            Err(PeerError::WrongTrustDomain { expected: self.trust_domain.clone(), got }.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

/// Accepts servers that prove one of a set of identities.
#[derive(Debug)]
pub(super) struct TrustedServer {
    expected: Vec<Identity>,
    roots: Arc<RootCertStore>,
}

impl TrustedServer {
    pub(super) fn new(expected: Vec<Identity>, roots: Arc<RootCertStore>) -> Self {
        Self { expected, roots }
    }
}

impl ServerCertVerifier for TrustedServer {
    /// The name is whatever the interface demanded; identity is decided by the SPIFFE ID alone.
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        // Checks chain, validity and the serverAuth usage.
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms().all)?;
        let got = identities_of(leaf)?;
        if got.iter().any(|identity| self.expected.contains(identity)) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(PeerError::Mismatch { expected: self.expected.clone(), got }.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}
