//! Mutual TLS between workloads: rustls settings from a workload's certificate, and proof of who is at the other end.
//!
//! TLS 1.3 only, ALPN `h2` required, no SNI, no resumption. A peer is who its certificate's SPIFFE ID says, once that
//! chains to the roots that came with our own certificate; host names play no part. Both sides refuse what they were not
//! told to expect. Where there are lists of revoked certificates a peer on them is refused, and an open connection breaks
//! once its peer is ([`crate::identity::Revocations`]).

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::{CertificateError, client::Resumption, pki_types::ServerName, sign::SingleCertAndKey};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    identity::{Identity, PeerRole, Revoked, Standing, WorkloadCertificate},
    net::ReadAhead,
    telemetry::ResponseFlag,
};

mod revocable;
mod suites;
mod verify;

pub use revocable::Revocable;
pub use verify::ClientPaths;
use verify::{PeerError, Proven, Trust, TrustedClient, TrustedServer, provider};

/// A TLS session over `S`.
pub type TlsStream<S> = tokio_rustls::TlsStream<Revocable<ReadAhead<S>>>;

/// From the first byte of the handshake to the last.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Plaintext that may wait for the socket: enough that one write to it carries several records.
const WRITE_BUFFER: usize = 256 * 1024;
const ALPN: &[u8] = b"h2";

/// Who is at the other end, as the handshake has proved. There is no other way to make one.
#[derive(Clone, Debug)]
pub struct VerifiedPeer {
    identity: Identity,
    addr: SocketAddr,
    session: SessionName,
    standing: Option<Arc<Standing>>,
}

/// What both ends of a session can say of it and nobody else can: keying material exported for this purpose (RFC 8446, section 7.5).
pub type SessionName = [u8; 32];

const SESSION_LABEL: &[u8] = b"EXPORTER-mesh-session-name";

impl VerifiedPeer {
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The far end of the TCP connection that carries the session.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The session itself.
    pub fn session(&self) -> SessionName {
        self.session
    }

    /// Whether it is still who it was; `None` where nobody can be revoked.
    pub fn standing(&self) -> Option<&Arc<Standing>> {
        self.standing.as_ref()
    }

    /// Has its certificate been revoked since the handshake?
    pub fn is_revoked(&self) -> bool {
        self.standing.as_ref().is_some_and(|standing| standing.is_revoked())
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("tls: the peer's certificate does not chain to a root we trust")]
    UntrustedRoot,
    #[error("tls: the peer is of another trust domain: expected {expected}, got {}", list(.got))]
    WrongTrustDomain { expected: String, got: Vec<Identity> },
    #[error("tls: the peer is not who was expected: expected {}, got {}", list(.expected), list(.got))]
    IdentityMismatch { expected: Vec<Identity>, got: Vec<Identity> },
    #[error("tls: the peer's certificate has no SPIFFE identity")]
    NoIdentity,
    #[error("tls: the peer's certificate has expired")]
    Expired,
    #[error("tls: the peer's certificate is not valid yet")]
    NotYetValid,
    #[error("tls: the peer's certificate has been revoked")]
    Revoked,
    #[error("tls: the peer sent no certificate")]
    NoCertificate,
    #[error("tls: the peer's certificate is not acceptable: {0}")]
    BadCertificate(String),
    #[error("tls: the peer has no key exchange in common with us")]
    NoKeyExchange,
    #[error("tls: the peer does not speak h2")]
    NoAlpn,
    #[error("tls: the peer refused us: {0}")]
    Rejected(String),
    #[error("tls: the peer broke the protocol: {0}")]
    Protocol(String),
    #[error("tls: {0}")]
    Io(#[source] io::Error),
    #[error("tls: the handshake took too long")]
    Timeout,
}

fn list(identities: &[Identity]) -> String {
    if identities.is_empty() {
        return "none".into();
    }
    identities.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl TlsError {
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::UntrustedRoot
            | Self::WrongTrustDomain { .. }
            | Self::IdentityMismatch { .. }
            | Self::NoIdentity
            | Self::Expired
            | Self::NotYetValid
            | Self::NoCertificate
            | Self::BadCertificate(_)
            | Self::NoKeyExchange
            | Self::NoAlpn
            | Self::Rejected(_)
            | Self::Protocol(_)
            | Self::Io(_) => ResponseFlag::TlsFailure,
            Self::Revoked => ResponseFlag::CertRevoked,
            Self::Timeout => ResponseFlag::Timeout,
        }
    }

    fn from_io(error: io::Error) -> Self {
        if error.get_ref().is_some_and(|inner| inner.is::<Revoked>()) {
            return Self::Revoked;
        }
        let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).cloned();
        cause.map_or(Self::Io(error), Self::from)
    }
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        use rustls::Error as E;
        match error {
            E::InvalidCertificate(reason) => match reason {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UntrustedRoot,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
                CertificateError::Revoked => Self::Revoked,
                CertificateError::Other(other) => match other.0.downcast_ref::<PeerError>() {
                    Some(PeerError::NoIdentity) => Self::NoIdentity,
                    Some(PeerError::WrongTrustDomain { expected, got }) => {
                        Self::WrongTrustDomain { expected: expected.to_string(), got: got.clone() }
                    }
                    Some(PeerError::Mismatch { expected, got }) => {
                        Self::IdentityMismatch { expected: expected.clone(), got: got.clone() }
                    }
                    None => Self::BadCertificate(other.to_string()),
                },
                other => Self::BadCertificate(other.to_string()),
            },
            E::NoCertificatesPresented => Self::NoCertificate,
            E::NoApplicationProtocol => Self::NoAlpn,
            E::PeerIncompatible(rustls::PeerIncompatible::NoKxGroupsInCommon) => Self::NoKeyExchange,
            E::AlertReceived(alert) => Self::Rejected(format!("{alert:?}")),
            other => Self::Protocol(other.to_string()),
        }
    }
}

impl WorkloadCertificate {
    /// For accepting: the client must prove an identity of our own trust domain.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        self.server_config.get_or_init(|| self.accepting(&Proven::default())).clone()
    }

    /// For connecting: the server must prove one of the `expected` identities. With none expected, none will do.
    pub fn client_config(&self, expected: &[Identity]) -> Arc<rustls::ClientConfig> {
        self.connecting(expected, &Proven::default())
    }

    fn trust(&self, proven: &Proven) -> Trust {
        let revocations = self.rules.revocations.clone().map(|revocations| (revocations, proven.clone()));
        Trust { roots: self.root_store.clone(), revocations }
    }

    fn accepting(&self, proven: &Proven) -> Arc<rustls::ServerConfig> {
        let verifier = TrustedClient::new(self.identity().trust_domain().clone(), self.trust(proven));
        let provider = provider(self.rules.key_exchange);
        let mut config = rustls::ServerConfig::builder_with_details(provider, Arc::new(self.clock.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has TLS 1.3 suites")
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Arc::new(config)
    }

    fn connecting(&self, expected: &[Identity], proven: &Proven) -> Arc<rustls::ClientConfig> {
        let verifier = TrustedServer::new(expected.to_vec(), self.trust(proven));
        let provider = provider(self.rules.key_exchange);
        let mut config = rustls::ClientConfig::builder_with_details(provider, Arc::new(self.clock.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider has TLS 1.3 suites")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    /// The peer's standing after a handshake that has `proven` its path. A load of lists in between counts.
    fn admit(&self, proven: &Proven, role: PeerRole) -> Result<Option<Arc<Standing>>, TlsError> {
        let Some(revocations) = &self.rules.revocations else { return Ok(None) };
        let path = proven.take().ok_or(TlsError::NoCertificate)?;
        revocations.admit(path, role).map(Some).ok_or(TlsError::Revoked)
    }
}

/// The server's half of a handshake.
pub async fn accept<S>(
    cert: &WorkloadCertificate,
    stream: S,
    peer: SocketAddr,
) -> Result<(TlsStream<S>, VerifiedPeer), TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let proven = Proven::default();
    // One for all, unless the verifier has something to tell of just this handshake.
    let config = if cert.rules.revocations.is_some() { cert.accepting(&proven) } else { cert.server_config() };
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let stream = Revocable::new(ReadAhead::new(stream));
    let handshake = acceptor.accept_with(stream, |session| session.set_buffer_limit(Some(WRITE_BUFFER)));
    let mut stream = Box::pin(tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake))
        .await
        .map_err(|_| TlsError::Timeout)?
        .map_err(TlsError::from_io)?;
    let own = cert.identity().trust_domain();
    let identity = peer_identity(&stream.get_ref().1.peer_certificates(), stream.get_ref().1.alpn_protocol(), |id| {
        id.trust_domain() == own
    })?;
    let session = stream.get_ref().1.export_keying_material([0; 32], SESSION_LABEL, None)?;
    let standing = cert.admit(&proven, PeerRole::Client)?;
    stream.get_mut().0.watch(standing.clone());
    Ok((stream.into(), VerifiedPeer { identity, addr: peer, session, standing }))
}

/// The client's half of a handshake. `peer` is the address that was dialled.
///
/// TLS 1.3 lets this end before the server has looked at our certificate: its refusal then shows at the first read.
pub async fn connect<S>(
    cert: &WorkloadCertificate,
    expected: &[Identity],
    stream: S,
    peer: SocketAddr,
) -> Result<(TlsStream<S>, VerifiedPeer), TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let proven = Proven::default();
    let connector = tokio_rustls::TlsConnector::from(cert.connecting(expected, &proven));
    // Never sent and never checked, but the interface wants one.
    let name = ServerName::IpAddress(peer.ip().into());
    let stream = Revocable::new(ReadAhead::new(stream));
    let handshake = connector.connect_with(name, stream, |session| session.set_buffer_limit(Some(WRITE_BUFFER)));
    let mut stream = Box::pin(tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake))
        .await
        .map_err(|_| TlsError::Timeout)?
        .map_err(TlsError::from_io)?;
    let identity = peer_identity(&stream.get_ref().1.peer_certificates(), stream.get_ref().1.alpn_protocol(), |id| {
        expected.contains(id)
    })?;
    let session = stream.get_ref().1.export_keying_material([0; 32], SESSION_LABEL, None)?;
    let standing = cert.admit(&proven, PeerRole::Server)?;
    stream.get_mut().0.watch(standing.clone());
    Ok((stream.into(), VerifiedPeer { identity, addr: peer, session, standing }))
}

/// The identity that made the verifier accept. Peers that skip ALPN get this far, and no further.
fn peer_identity(
    certificates: &Option<&[rustls::pki_types::CertificateDer<'_>]>,
    alpn: Option<&[u8]>,
    accepted: impl Fn(&Identity) -> bool,
) -> Result<Identity, TlsError> {
    if alpn != Some(ALPN) {
        return Err(TlsError::NoAlpn);
    }
    let leaf = certificates.and_then(<[_]>::first).ok_or(TlsError::NoCertificate)?;
    let identities = crate::identity::identities(leaf).map_err(|e| TlsError::BadCertificate(e.to_string()))?;
    identities.into_iter().find(accepted).ok_or(TlsError::NoIdentity)
}

#[cfg(test)]
mod tests;
