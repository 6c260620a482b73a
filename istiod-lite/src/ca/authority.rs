//! The signing half of the certificate authority: a CA key, the chain above it and the roots below which it is
//! trusted. Pure: no Kubernetes, no clock (time is an argument), no network.
//!
//! Invariant: a certificate leaves here only for a name the caller of [`Authority::sign`] decided on; of a CSR nothing
//! but its (proven) public key is used.

use std::time::Duration;

use rand::Rng as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use time::OffsetDateTime;
use x509_parser::oid_registry::{OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};

/// Validity of the root this authority makes for itself.
const SELF_SIGNED_ROOT_TTL: Duration = Duration::from_secs(87_600 * 3600);
/// A certificate starts this much in the past, so that a peer whose clock is a little behind takes it.
const CLOCK_SKEW: Duration = Duration::from_secs(120);

/// How long leaves live: what a request without a wish gets, and the most that is granted.
#[derive(Clone, Copy, Debug)]
pub struct LeafLifetime {
    pub default: Duration,
    pub max: Duration,
}

impl Default for LeafLifetime {
    /// Istio's defaults: 24 h and 90 days.
    fn default() -> Self {
        Self { default: Duration::from_secs(24 * 3600), max: Duration::from_secs(2160 * 3600) }
    }
}

/// CA material as PEM, as it lies in a Secret.
#[derive(Clone)]
pub struct CaMaterial {
    /// The signing certificate; more certificates after it are its chain.
    pub certificate: String,
    pub key: String,
    /// Certificates between the signing certificate and the root. May be empty, may repeat the signing certificate.
    pub chain: String,
    /// Trusted roots; empty means the signing certificate is the root.
    pub roots: String,
}

/// Why CA material cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MaterialError {
    #[error("{what}: {reason}")]
    Unreadable { what: &'static str, reason: String },
    #[error("the private key does not belong to the CA certificate")]
    KeyMismatch,
    #[error("the CA certificate may not sign certificates (basic constraints, key usage)")]
    NotACa,
    #[error("the CA certificate does not chain to one of the roots")]
    Unanchored,
}

/// Why a certificate was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error("the certificate signing request cannot be parsed: {0}")]
    Unparsable(String),
    #[error("the signature of the certificate signing request is not by the key in it")]
    BadSignature,
    #[error("the key of the certificate signing request is of an unsupported type")]
    UnsupportedKey,
    #[error("requested validity of {requested} s exceeds the maximum of {max} s")]
    LifetimeTooLong { requested: u64, max: u64 },
    #[error("the CA certificate has expired")]
    CaExpired,
    #[error("signing: {0}")]
    Signing(#[from] rcgen::Error),
}

/// A signed leaf with what the holder needs to use it, all PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    pub leaf: String,
    /// Each certificate between leaf and root, nearest first; the root is not among them.
    pub intermediates: Vec<String>,
    pub roots: String,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Issued {
    /// The layout of `IstioCertificateResponse.cert_chain`: leaf, intermediates one each, the root bundle last.
    pub fn into_cert_chain(self) -> Vec<String> {
        let mut chain = Vec::with_capacity(self.intermediates.len() + 2);
        chain.push(self.leaf);
        chain.extend(self.intermediates);
        chain.push(self.roots);
        chain
    }
}

/// What a leaf is for.
pub enum Subject<'a> {
    /// A workload identity, `spiffe://…`.
    Spiffe(&'a str),
    /// A server in the control plane.
    Dns(&'a [String]),
}

/// A certificate authority ready to sign.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    intermediates: Vec<String>,
    roots: String,
    not_after: OffsetDateTime,
}

impl Authority {
    /// Makes a new ECDSA P-256 root for `trust_domain`, valid ten years.
    ///
    /// # Errors
    /// Only if the crypto library does.
    pub fn self_signed(trust_domain: &str, now: OffsetDateTime) -> Result<CaMaterial, rcgen::Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        params.serial_number = Some(serial());
        params.not_before = now - CLOCK_SKEW;
        params.not_after = now + SELF_SIGNED_ROOT_TTL;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?.pem();
        Ok(CaMaterial { certificate, key: key.serialize_pem(), chain: String::new(), roots: String::new() })
    }

    /// Reads CA material and checks that it can work: the key is the certificate's, the certificate may sign and chains
    /// to a root.
    ///
    /// # Errors
    /// [`MaterialError`] says which of these does not hold.
    pub fn from_material(material: &CaMaterial) -> Result<Self, MaterialError> {
        let own = certificates("CA certificate", &material.certificate)?;
        let signer = own
            .first()
            .ok_or(MaterialError::Unreadable { what: "CA certificate", reason: "no certificate in it".into() })?;
        let mut roots = certificates("root certificates", &material.roots)?;
        if roots.is_empty() {
            roots.push(signer.clone());
        }
        let mut chain = vec![signer.clone()];
        for certificate in own.iter().skip(1).cloned().chain(certificates("certificate chain", &material.chain)?) {
            if !chain.contains(&certificate) {
                chain.push(certificate);
            }
        }
        chain.retain(|certificate| !roots.contains(certificate));

        let key = PrivateKeyDer::from_pem_slice(material.key.as_bytes())
            .map_err(|error| MaterialError::Unreadable { what: "CA key", reason: error.to_string() })?;
        let key = KeyPair::try_from(&key)
            .map_err(|error| MaterialError::Unreadable { what: "CA key", reason: error.to_string() })?;
        let parsed = parse(signer)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(MaterialError::KeyMismatch);
        }
        if !may_sign(&parsed) {
            return Err(MaterialError::NotACa);
        }
        check_anchored(signer, &chain, &roots)?;
        let not_after = [signer]
            .into_iter()
            .chain(&chain)
            .map(|certificate| Ok(parse(certificate)?.validity().not_after.to_datetime()))
            .collect::<Result<Vec<_>, MaterialError>>()?
            .into_iter()
            .min()
            .expect("the signer is in the list");

        let issuer = Issuer::from_ca_cert_der(signer, key)
            .map_err(|error| MaterialError::Unreadable { what: "CA certificate", reason: error.to_string() })?;
        Ok(Self {
            issuer,
            intermediates: chain.iter().map(to_pem).collect(),
            roots: roots.iter().map(to_pem).collect(),
            not_after,
        })
    }

    /// The roots every workload and proxy trusts, PEM; goes to the ConfigMap `istio-ca-root-cert`.
    pub fn root_bundle_pem(&self) -> String {
        self.roots.clone()
    }

    /// When the first certificate of the signing chain ends; no leaf outlives it.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// Signs the public key of `csr` (PEM) for `spiffe`. A `validity` of zero or less asks for the default.
    ///
    /// # Errors
    /// [`SignError`]: the request is malformed, does not prove possession of its key, or asks for too long.
    pub fn sign(
        &self,
        csr: &str,
        spiffe: &str,
        validity_seconds: i64,
        lifetime: LeafLifetime,
        now: OffsetDateTime,
    ) -> Result<Issued, SignError> {
        let ttl = match u64::try_from(validity_seconds) {
            Err(_) | Ok(0) => lifetime.default,
            Ok(requested) if requested > lifetime.max.as_secs() => {
                return Err(SignError::LifetimeTooLong { requested, max: lifetime.max.as_secs() });
            }
            Ok(requested) => Duration::from_secs(requested),
        };
        let key = proven_key(csr)?;
        self.issue(&key, &Subject::Spiffe(spiffe), ttl, now)
    }

    /// Signs a leaf for a key this process made itself.
    ///
    /// # Errors
    /// The CA has expired, or the crypto library refuses.
    pub fn issue(
        &self,
        key: &impl PublicKeyData,
        subject: &Subject<'_>,
        ttl: Duration,
        now: OffsetDateTime,
    ) -> Result<Issued, SignError> {
        if now >= self.not_after {
            return Err(SignError::CaExpired);
        }
        let mut params = CertificateParams::default();
        // An empty subject makes the alternative name critical (RFC 5280 section 4.2.1.6), as peers expect.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = match subject {
            Subject::Spiffe(uri) => vec![SanType::URI((*uri).try_into()?)],
            Subject::Dns(names) => names
                .iter()
                .map(|name| Ok(SanType::DnsName(name.as_str().try_into()?)))
                .collect::<Result<_, rcgen::Error>>()?,
        };
        params.serial_number = Some(serial());
        params.not_before = now - CLOCK_SKEW;
        params.not_after = (now + ttl).min(self.not_after);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let (not_before, not_after) = (params.not_before, params.not_after);
        let leaf = params.signed_by(key, &self.issuer)?.pem();
        Ok(Issued { leaf, intermediates: self.intermediates.clone(), roots: self.roots.clone(), not_before, not_after })
    }
}

/// The public key of a CSR whose signature proves that the requester holds the private half.
fn proven_key(csr: &str) -> Result<SubjectPublicKeyInfo, SignError> {
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes())
        .map_err(|error| SignError::Unparsable(error.to_string()))?;
    let (rest, request) =
        X509CertificationRequest::from_der(&der).map_err(|error| SignError::Unparsable(error.to_string()))?;
    if !rest.is_empty() {
        return Err(SignError::Unparsable("bytes after the request".into()));
    }
    // SHA-1 can be forged, and its verifier would take RSA keys of 1024 bits.
    if [OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA].contains(&request.signature_algorithm.algorithm) {
        return Err(SignError::UnsupportedKey);
    }
    request.verify_signature().map_err(|error| match error {
        x509_parser::error::X509Error::SignatureUnsupportedAlgorithm => SignError::UnsupportedKey,
        _ => SignError::BadSignature,
    })?;
    SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
        .map_err(|_| SignError::UnsupportedKey)
}

fn certificates(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .map(|item| item.map_err(|error| MaterialError::Unreadable { what, reason: error.to_string() }))
        .collect()
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, MaterialError> {
    X509Certificate::from_der(der)
        .map(|(_, certificate)| certificate)
        .map_err(|error| MaterialError::Unreadable { what: "certificate", reason: error.to_string() })
}

fn may_sign(certificate: &X509Certificate<'_>) -> bool {
    certificate.is_ca() && certificate.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign())
}

/// Walks from `signer` over `chain` until a root has signed. Bounded by the length of the chain.
fn check_anchored(
    signer: &CertificateDer<'_>,
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
) -> Result<(), MaterialError> {
    let mut current = signer;
    for _ in 0..=chain.len() {
        if roots.iter().any(|root| root == current) {
            return Ok(());
        }
        let below = parse(current)?;
        let signed_below = |above: &&CertificateDer<'_>| {
            parse(above).is_ok_and(|above| {
                above.subject() == below.issuer()
                    && may_sign(&above)
                    && below.verify_signature(Some(above.public_key())).is_ok()
            })
        };
        if roots.iter().any(|root| signed_below(&root)) {
            return Ok(());
        }
        match chain.iter().find(signed_below) {
            Some(above) => current = above,
            None => return Err(MaterialError::Unanchored),
        }
    }
    Err(MaterialError::Unanchored)
}

fn to_pem(der: &CertificateDer<'_>) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::with_capacity(text.len() + text.len() / 64 + 64);
    pem.push_str("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// 128 random bits, positive.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::rng().random();
    // The top bit is the sign; a set second bit keeps the length fixed and the number non-zero.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from(bytes.to_vec())
}

#[cfg(test)]
mod tests;
