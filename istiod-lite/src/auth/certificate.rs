//! Who a caller is by the certificate of its connection, where it has brought no token.
//!
//! The handshake has looked at the certificate once, and it is looked at again for each request: what has ended or was
//! taken back since must not renew itself over a connection from before.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh::identity::Identity;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use tonic::Extensions;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{AuthError, Caller, Proof};

/// What a caller has shown in its handshake, the leaf first.
pub type Chain = Arc<Vec<CertificateDer<'static>>>;

/// The certificates of a request's connection, if it has any.
pub(super) fn shown(extensions: &Extensions) -> Option<Chain> {
    extensions.get::<TlsConnectInfo<TcpConnectInfo>>()?.peer_certs().filter(|chain| !chain.is_empty())
}

/// Makes callers of certificates.
#[derive(Clone)]
pub struct Certificates {
    verifier: Arc<dyn ClientCertVerifier>,
    /// Ours. Its aliases are for policies, not for certificates.
    trust_domain: Arc<str>,
}

/// Why a certificate says nothing of a caller.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum Unusable {
    #[error("X.509: {0}")]
    Malformed(String),
    #[error("{0} URI names; an identity is the only one")]
    NotOneName(usize),
    #[error("{0}")]
    NoIdentity(String),
    #[error("{0} is of another trust domain")]
    ForeignTrustDomain(Identity),
}

impl Certificates {
    /// `verifier` as handshakes have it.
    pub fn new(verifier: Arc<dyn ClientCertVerifier>, trust_domain: Arc<str>) -> Self {
        Self { verifier, trust_domain }
    }

    /// The holder of a certificate.
    ///
    /// # Errors
    /// It is good no longer, or names nobody of this mesh.
    pub fn caller(&self, chain: Chain) -> Result<Caller, AuthError> {
        let leaf = self.check(&chain)?;
        let (identity, expires) =
            read(leaf, &self.trust_domain).map_err(|reason| AuthError::Certificate(reason.to_string()))?;
        Ok(Caller {
            namespace: Arc::clone(identity.namespace()),
            service_account: Arc::clone(identity.service_account()),
            pod: None,
            expires: Some(expires),
            proof: Proof::Certificate(chain),
        })
    }

    /// Looks whether a chain is good now. Returns its leaf.
    pub(super) fn check<'a>(
        &self,
        chain: &'a [CertificateDer<'static>],
    ) -> Result<&'a CertificateDer<'static>, AuthError> {
        let refused = AuthError::Certificate;
        let (leaf, intermediates) = chain.split_first().ok_or_else(|| refused("there is none".to_owned()))?;
        let verified = self.verifier.verify_client_cert(leaf, intermediates, UnixTime::now());
        verified.map(|_| leaf).map_err(|error| refused(error.to_string()))
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

/// The identity of a leaf, and its end.
fn read(leaf: &CertificateDer<'_>, trust_domain: &str) -> Result<(Identity, SystemTime), Unusable> {
    let malformed = |error: &dyn fmt::Display| Unusable::Malformed(error.to_string());
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| malformed(&error))?;
    let names = parsed.subject_alternative_name().map_err(|error| malformed(&error))?;
    let uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uris: Vec<&str> = uris.collect();
    let [uri] = uris[..] else { return Err(Unusable::NotOneName(uris.len())) };
    let identity = uri.parse::<Identity>().map_err(|error| Unusable::NoIdentity(error.to_string()))?;
    if **identity.trust_domain() != *trust_domain {
        return Err(Unusable::ForeignTrustDomain(identity));
    }
    let end = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default();
    Ok((identity, UNIX_EPOCH + Duration::from_secs(end)))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn leaf(names: Vec<SanType>) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().into()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn an_identity_is_the_only_uri_and_of_our_trust_domain() {
        let cart = || uri("spiffe://cluster.local/ns/shop/sa/cart");
        let dns = || SanType::DnsName("cart.shop.svc".try_into().unwrap());
        let identity = |names| read(&leaf(names), "cluster.local").map(|(identity, _)| identity.to_string());
        for names in [vec![cart()], vec![dns(), cart()]] {
            assert_eq!(identity(names), Ok("spiffe://cluster.local/ns/shop/sa/cart".to_owned()));
        }
        assert_eq!(identity(vec![]), Err(Unusable::NotOneName(0)));
        assert_eq!(identity(vec![dns()]), Err(Unusable::NotOneName(0)));
        assert_eq!(identity(vec![cart(), uri("https://shop.example")]), Err(Unusable::NotOneName(2)));
        for other in
            ["spiffe://cluster.local/ns/shop", "spiffe://cluster.local/ns/shop/sa/cart/x", "https://a/ns/b/sa/c"]
        {
            assert!(matches!(identity(vec![uri(other)]), Err(Unusable::NoIdentity(_))), "{other}");
        }
        for other in ["other", "Cluster.local", "cluster.local.example"] {
            let named = identity(vec![uri(&format!("spiffe://{other}/ns/shop/sa/cart"))]);
            assert!(matches!(named, Err(Unusable::ForeignTrustDomain(_))), "{other}");
        }
        let garbage = CertificateDer::from(vec![0x30, 0]);
        assert!(matches!(read(&garbage, "cluster.local"), Err(Unusable::Malformed(_))));
    }
}
