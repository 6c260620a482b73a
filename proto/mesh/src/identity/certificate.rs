//! A workload's certificate, its private key, and the roots it verifies peers with. The key never leaves this type.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{HandshakeRules, Identity, IdentityError};
use crate::clock::Clock;

/// A certificate that can authenticate as one identity.
pub struct WorkloadCertificate {
    identity: Identity,
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) root_store: Arc<RootCertStore>,
    pub(crate) clock: Clock,
    pub(crate) rules: HandshakeRules,
    /// Built at first use: most certificates of a client-only workload never serve.
    pub(crate) server_config: OnceLock<Arc<rustls::ServerConfig>>,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
}

/// A certificate as `/config_dump` shows it. No secrets.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateInfo {
    /// Leaf first.
    pub cert_chain: Vec<IssuedCertificate>,
    pub root_certs: Vec<IssuedCertificate>,
}

/// One X.509 certificate.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IssuedCertificate {
    /// Base64 of the PEM text, as Istio has it.
    pub pem: String,
    /// Decimal.
    pub serial_number: String,
    /// RFC 3339.
    pub valid_from: String,
    pub expiration_time: String,
}

impl WorkloadCertificate {
    /// From PEM texts: the leaf followed by its intermediates, the private key, and the roots peers are checked against.
    /// The identity is the leaf's first SPIFFE URI.
    pub fn from_pem(chain: &str, key: &str, roots: &str, clock: &Clock) -> Result<Self, IdentityError> {
        let chain = certificates_from_pem(chain)?;
        let roots = certificates_from_pem(roots)?;
        let leaf = chain.first().ok_or_else(|| malformed("the chain is empty"))?;
        let parsed = parse(leaf)?;
        let named = identities(leaf)?.into_iter().next();
        let identity = named.ok_or_else(|| malformed("the leaf has no SPIFFE identity"))?;
        let (not_before, not_after) = validity(&parsed);
        let serial = parsed.tbs_certificate.serial.to_string();

        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| malformed(format!("private key: {e}")))?;
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)
            .map_err(|e| malformed(format!("private key: {e}")))?;
        let key = CertifiedKey::new(chain.clone(), key);
        key.keys_match().map_err(|e| malformed(format!("the private key is not the certificate's: {e}")))?;

        let mut root_store = RootCertStore::empty();
        for root in &roots {
            root_store.add(root.clone()).map_err(|e| malformed(format!("root certificate: {e}")))?;
        }
        if root_store.is_empty() {
            return Err(malformed("there is no root certificate"));
        }
        Ok(Self {
            identity,
            chain,
            roots,
            key: Arc::new(key),
            root_store: Arc::new(root_store),
            clock: clock.clone(),
            rules: HandshakeRules::default(),
            server_config: OnceLock::new(),
            not_before,
            not_after,
            serial,
        })
    }

    /// The same for handshakes by `rules`.
    #[must_use]
    pub fn with_rules(self, rules: HandshakeRules) -> Self {
        Self { rules, server_config: OnceLock::new(), ..self }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Leaf first; without root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Of the leaf, decimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Of the leaf, big-endian.
    #[cfg(test)]
    pub(crate) fn serial_bytes(&self) -> Vec<u8> {
        parse(&self.chain[0]).expect("it was parsed before").tbs_certificate.serial.to_bytes_be()
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub fn is_expired(&self, now: SystemTime) -> bool {
        now >= self.not_after
    }

    pub fn describe(&self) -> CertificateInfo {
        let describe = |list: &[CertificateDer<'_>]| list.iter().filter_map(describe).collect();
        CertificateInfo { cert_chain: describe(&self.chain), root_certs: describe(&self.roots) }
    }
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The SPIFFE identities among the URI names of a certificate, in order. Names that are no mesh identity are skipped. Read by
/// what verifies the path, so that nobody is taken for a name which that has not seen.
pub(crate) fn identities(certificate: &CertificateDer<'_>) -> Result<Vec<Identity>, IdentityError> {
    let certificate = webpki::EndEntityCert::try_from(certificate).map_err(|e| malformed(format!("X.509: {e}")))?;
    Ok(certificate.valid_uri_names().filter_map(|name| name.parse().ok()).collect())
}

pub(super) fn certificates_from_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|e| malformed(format!("PEM: {e}")))
}

pub(super) fn malformed(reason: impl ToString) -> IdentityError {
    IdentityError::Malformed(reason.to_string())
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    X509Certificate::from_der(certificate).map(|(_, parsed)| parsed).map_err(|e| malformed(format!("X.509: {e}")))
}

fn validity(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(seconds.max(0) as u64);
    (time(certificate.validity().not_before.timestamp()), time(certificate.validity().not_after.timestamp()))
}

fn describe(certificate: &CertificateDer<'_>) -> Option<IssuedCertificate> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let parsed = parse(certificate).ok()?;
    let (from, to) = validity(&parsed);
    let body = STANDARD.encode(certificate);
    let lines: Vec<_> = body.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
    let pem = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"));
    Some(IssuedCertificate {
        pem: STANDARD.encode(pem),
        serial_number: parsed.tbs_certificate.serial.to_string(),
        valid_from: rfc3339(from),
        expiration_time: rfc3339(to),
    })
}

pub(super) fn rfc3339(at: SystemTime) -> String {
    OffsetDateTime::from(at).format(&Rfc3339).unwrap_or_default()
}
