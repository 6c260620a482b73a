//! Who a workload is: its SPIFFE ID, the certificate that proves it, and how certificates are fetched and kept fresh.

use std::{fmt, str::FromStr, time::SystemTime};

use crate::text::Text;

mod ca;
mod certificate;
mod file_ca;
mod manager;
mod revocation;

pub use ca::{CaClient, CaConfig, Csr, new_csr};
pub(crate) use certificate::identities;
pub use certificate::{CertificateInfo, IssuedCertificate, WorkloadCertificate};
pub use file_ca::FileCa;
pub use futures_util::future::BoxFuture;
pub use manager::{CertificateManager, CertificateSource, CertificateStatus, Rotation};
pub use revocation::{Loaded, RevocationError, RevocationFile, Revocations, Standing};
pub(crate) use revocation::{Path, PeerRole, Revoked};

/// Which key exchanges handshakes may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KeyExchange {
    /// The post-quantum hybrid where the peer has it, else elliptic curves.
    #[default]
    PostQuantumPreferred,
    /// The hybrid X25519MLKEM768 and nothing else.
    PostQuantumOnly,
}

/// What a certificate's handshakes demand beyond what every handshake does.
#[derive(Clone, Debug, Default)]
pub struct HandshakeRules {
    pub key_exchange: KeyExchange,
    /// Peers are looked for here; `None`: nobody is ever revoked.
    pub revocations: Option<Revocations>,
}

/// A SPIFFE ID of the form the mesh uses: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    trust_domain: Text,
    namespace: Text,
    service_account: Text,
}

/// A text that is no mesh identity.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
pub struct IdentityParseError(String);

impl Identity {
    /// Refuses parts that are empty or contain what separates parts.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, IdentityParseError> {
        let parts = [trust_domain, namespace, service_account];
        let well_formed = |part: &&str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '/' | '?' | '#' | ','))
        };
        if !parts.iter().all(well_formed) {
            return Err(IdentityParseError(format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")));
        }
        let [trust_domain, namespace, service_account] = parts.map(Text::from);
        Ok(Self { trust_domain, namespace, service_account })
    }

    pub fn trust_domain(&self) -> &Text {
        &self.trust_domain
    }

    pub fn namespace(&self) -> &Text {
        &self.namespace
    }

    pub fn service_account(&self) -> &Text {
        &self.service_account
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Identity {
    type Err = IdentityParseError;

    fn from_str(text: &str) -> Result<Self, IdentityParseError> {
        let malformed = || IdentityParseError(text.chars().take(256).collect());
        let path = text.strip_prefix("spiffe://").ok_or_else(malformed)?;
        let mut segments = path.split('/');
        let mut next = || segments.next();
        match (next(), next(), next(), next(), next(), next()) {
            (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) => {
                Self::new(trust_domain, namespace, service_account).map_err(|_| malformed())
            }
            _ => Err(malformed()),
        }
    }
}

impl serde::Serialize for Identity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Identity {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <std::borrow::Cow<'de, str>>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Why there is no certificate. Kept as text where the cause is another crate's, so that one failed fetch can be told to
/// everyone who waited for it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("certificate for {identity}: signing request: {reason}")]
    Request { identity: Identity, reason: String },
    #[error("certificate for {identity}: the certificate authority answered: {reason}")]
    Refused { identity: Identity, reason: String },
    #[error("certificate for {identity}: the certificate authority is not reachable: {reason}")]
    Unreachable { identity: Identity, reason: String },
    #[error("certificate: {0}")]
    Malformed(String),
    #[error("certificate is for {got}, but {expected} was asked for")]
    WrongIdentity { expected: Identity, got: Identity },
    #[error("certificate for {identity} expired at {}", certificate::rfc3339(*.at))]
    Expired { identity: Identity, at: SystemTime },
    #[error("certificate authority in {path}: {reason}")]
    CaFiles { path: String, reason: String },
    #[error("certificate for {0}: no workload here has it any more")]
    Forgotten(Identity),
    #[error("certificate for {0}: rotation has ended")]
    Stopped(Identity),
}

impl IdentityError {
    /// Every one of these means that we have nothing to speak with.
    pub fn flag(&self) -> crate::telemetry::ResponseFlag {
        crate::telemetry::ResponseFlag::IdentityError
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_survive_text() {
        let text = "spiffe://cluster.local/ns/shop/sa/cart";
        let identity: Identity = text.parse().unwrap();
        assert_eq!(identity.to_string(), text);
        assert_eq!(&**identity.namespace(), "shop");
    }

    #[test]
    fn malformed_identities_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td/ns/a/sa",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/NS/a/sa/b",
            "https://td/ns/a/sa/b",
            "SPIFFE://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/a b/sa/b",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
        assert!(Identity::new("td", "a/sa", "b").is_err());
    }
}
