//! What a peer's certificate must satisfy.

use std::{
    cell::Cell,
    fmt,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::{EndEntityCert, KeyUsage};

use super::suites::{Suites, suites};
use crate::{
    identity::{Identity, KeyExchange, Path, PeerRole, Revocations, identities},
    text::Text,
};

/// The two AES suites of TLS 1.3, and post-quantum key exchange where the peer has it, or always. A hundred and twenty-eight
/// bits come first, as they cost a third less; whoever asks for safety from quantum computers gets two hundred and fifty-six.
pub(super) fn provider(key_exchange: KeyExchange) -> Arc<CryptoProvider> {
    static PREFERRED: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let Suites { aes128, aes256 } = suites();
        Arc::new(CryptoProvider {
            cipher_suites: vec![aes128, aes256],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    static ONLY: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let Suites { aes128, aes256 } = suites();
        Arc::new(CryptoProvider {
            cipher_suites: vec![aes256, aes128],
            kx_groups: vec![aws_lc_rs::kx_group::X25519MLKEM768],
            ..(**PREFERRED).clone()
        })
    });
    match key_exchange {
        KeyExchange::PostQuantumPreferred => PREFERRED.clone(),
        KeyExchange::PostQuantumOnly => ONLY.clone(),
    }
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    provider(KeyExchange::default()).signature_verification_algorithms
}

/// Where the verifier of one handshake leaves the path it has accepted.
#[derive(Clone, Default)]
pub(super) struct Proven(Arc<Mutex<Option<Path>>>);

impl Proven {
    pub(super) fn take(&self) -> Option<Path> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What a path is checked against: the roots, and the lists of the revoked where there are any.
#[derive(Clone)]
pub(super) struct Trust {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) revocations: Option<(Revocations, Proven)>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("roots", &self.roots.len()).finish_non_exhaustive()
    }
}

impl Trust {
    /// Chain, validity, usage and revocation.
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        role: PeerRole,
    ) -> Result<(), rustls::Error> {
        let usage = match role {
            PeerRole::Client => KeyUsage::client_auth(),
            PeerRole::Server => KeyUsage::server_auth(),
        };
        let found = Cell::new(None);
        // Asked for every path that is good otherwise: one without a revoked certificate may be left.
        let examine = |path: &webpki::VerifiedPath<'_>| match &self.revocations {
            Some((revocations, _)) => revocations.examine(path, role).map(|path| found.set(Some(path))),
            None => Ok(()),
        };
        let leaf = EndEntityCert::try_from(leaf).map_err(refusal)?;
        leaf.verify_for_usage(algorithms().all, &self.roots.roots, intermediates, now, usage, None, Some(&examine))
            .map_err(refusal)?;
        if let Some((_, proven)) = &self.revocations {
            *proven.0.lock().unwrap_or_else(PoisonError::into_inner) = found.take();
        }
        Ok(())
    }
}

/// What a client's path must satisfy, for who makes its handshakes itself. Whoever the client is: its names are the caller's
/// to look at.
#[derive(Clone, Debug)]
pub struct ClientPaths(Trust);

impl ClientPaths {
    /// Paths to `roots` without a certificate that `revocations` name.
    pub fn new(roots: RootCertStore, revocations: Option<Revocations>) -> Self {
        let revocations = revocations.map(|lists| (lists, Proven::default()));
        Self(Trust { roots: Arc::new(roots), revocations })
    }

    /// # Errors
    /// In the words of rustls, by which it chooses the alert.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.0.verify(leaf, intermediates, now, PeerRole::Client)
    }
}

/// In the words of rustls, by which it chooses the alert.
fn refusal(error: webpki::Error) -> rustls::Error {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::InvalidCertValidity => CertificateError::Expired,
        E::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        E::CertRevoked => CertificateError::Revoked,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
    .into()
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
    trust: Trust,
}

impl TrustedClient {
    pub(super) fn new(trust_domain: Text, trust: Trust) -> Self {
        Self { trust_domain, trust }
    }
}

impl ClientCertVerifier for TrustedClient {
    /// None: clients have one certificate and need no hint.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.trust.verify(leaf, intermediates, now, PeerRole::Client)?;
        let got = identities_of(leaf)?;
        if got.iter().any(|identity| *identity.trust_domain() == self.trust_domain) {
            Ok(ClientCertVerified::assertion())
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
    trust: Trust,
}

impl TrustedServer {
    pub(super) fn new(expected: Vec<Identity>, trust: Trust) -> Self {
        Self { expected, trust }
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
        self.trust.verify(leaf, intermediates, now, PeerRole::Server)?;
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
