//! The signing half of the certificate authority: a CA key, the chain above it and the roots below which it is
//! trusted. Pure: no Kubernetes, no clock (time is an argument), no network.
//!
//! Invariant: a certificate leaves here only for a name the caller of [`Authority::sign`] decided on; of a CSR nothing
//! but its (proven) public key is used.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use time::OffsetDateTime;
use x509_parser::asn1_rs::Tag;
use x509_parser::extensions::ParsedExtension;
use x509_parser::oid_registry::{OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509CertificationRequest};
use x509_parser::x509::X509Name;

/// Validity of a root that is made here, unless an operator chooses another: Istio's, ten years.
pub const SELF_SIGNED_ROOT_TTL: Duration = Duration::from_secs(87_600 * 3600);
/// Of what is wrong with a request, in bytes.
const LONGEST_REASON: usize = 256;
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

impl LeafLifetime {
    /// How long a leaf lives for which `validity_seconds` were asked for; zero or less asks for the default.
    ///
    /// # Errors
    /// More than the maximum.
    pub fn grant(&self, validity_seconds: i64) -> Result<Duration, SignError> {
        match u64::try_from(validity_seconds) {
            Err(_) | Ok(0) => Ok(self.default),
            Ok(requested) if requested > self.max.as_secs() => {
                Err(SignError::LifetimeTooLong { requested, max: self.max.as_secs() })
            }
            Ok(requested) => Ok(Duration::from_secs(requested)),
        }
    }
}

/// CA material as PEM, as it lies in a Secret.
#[derive(Clone, PartialEq, Eq)]
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
    #[error("proxies would not accept what it signs: {0}")]
    Unacceptable(String),
}

/// Why a root was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error(transparent)]
    Material(#[from] MaterialError),
    #[error("the CA certificate is not its own root")]
    NotARoot,
    #[error("the name {0} of the CA certificate cannot be written again as it is")]
    Name(String),
    #[error("signing: {0}")]
    Signing(#[from] rcgen::Error),
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

/// A certificate authority ready to sign. Cheap to clone.
#[derive(Clone)]
pub struct Authority {
    issuer: Arc<Issuer<'static, KeyPair>>,
    /// A leaf that nobody has: what a peer says of it, it says of all.
    trial: CertificateDer<'static>,
    /// What is sent along with a leaf, the same in both forms.
    chain: Arc<[CertificateDer<'static>]>,
    intermediates: Arc<[String]>,
    /// The roots of its material, one PEM text each.
    own_roots: Arc<[String]>,
    /// The roots it hands out.
    roots: Arc<str>,
    /// From when on, and until when, all that its certificates stand on is valid.
    validity: (OffsetDateTime, OffsetDateTime),
}

impl Authority {
    /// Makes a new ECDSA P-256 root for `trust_domain`, valid for `ttl`.
    ///
    /// # Errors
    /// Only if the crypto library does.
    pub fn self_signed(trust_domain: &str, ttl: Duration, now: OffsetDateTime) -> Result<CaMaterial, rcgen::Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, trust_domain);
        let certificate = root(&key, name, KeyIdMethod::Sha256, ttl, now)?;
        Ok(CaMaterial { certificate, key: key.serialize_pem(), chain: String::new(), roots: String::new() })
    }

    /// A root's successor with the same key and name, valid for `ttl` from now on: what either signs is accepted by who
    /// trusts the other.
    ///
    /// # Errors
    /// [`RenewError`]: the material is unusable, or no root of that kind.
    pub fn renewed(material: &CaMaterial, ttl: Duration, now: OffsetDateTime) -> Result<CaMaterial, RenewError> {
        let old = certificates("CA certificate", &material.certificate)?;
        let [old] = old.as_slice() else { return Err(RenewError::NotARoot) };
        let roots = certificates("root certificates", &material.roots)?;
        let parsed = parse(old)?;
        if parsed.subject().as_raw() != parsed.issuer().as_raw() || roots.iter().any(|root| root != old) {
            return Err(RenewError::NotARoot);
        }
        let unwritable = || RenewError::Name(parsed.subject().to_string());
        let name = repeat(parsed.subject()).ok_or_else(unwritable)?;
        // Leaves name their signer by this identifier, and some clients do not look beyond it.
        let identifier = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(identifier) => Some(KeyIdMethod::PreSpecified(identifier.0.to_vec())),
            _ => None,
        });
        let certificate = root(&key(material)?, name, identifier.unwrap_or(KeyIdMethod::Sha256), ttl, now)?;
        let new = certificates("CA certificate", &certificate)?;
        if parse(&new[0])?.subject().as_raw() != parsed.subject().as_raw() {
            return Err(unwritable());
        }
        let roots = if roots.is_empty() { String::new() } else { certificate.clone() };
        Ok(CaMaterial { certificate, key: material.key.clone(), chain: String::new(), roots })
    }

    /// Reads CA material and checks that it can work: the key is the certificate's, the certificate may sign and chains
    /// to a root, and what it signs is accepted.
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

        let key = key(material)?;
        let parsed = parse(signer)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(MaterialError::KeyMismatch);
        }
        if !may_sign(&parsed) {
            return Err(MaterialError::NotACa);
        }
        let validity = common_validity(signer, &chain, &roots)?;

        let issuer = Issuer::from_ca_cert_der(signer, key)
            .map_err(|error| MaterialError::Unreadable { what: "CA certificate", reason: error.to_string() })?;
        let own_roots: Arc<[String]> = roots.iter().map(to_pem).collect();
        let mut authority = Self {
            issuer: Arc::new(issuer),
            trial: signer.clone(),
            chain: chain.iter().cloned().collect(),
            intermediates: chain.iter().map(to_pem).collect(),
            roots: own_roots.concat().into(),
            own_roots,
            validity,
        };
        let unacceptable = |error: &dyn fmt::Display| MaterialError::Unacceptable(error.to_string());
        let trial = authority.sign_trial().map_err(|error| unacceptable(&error))?;
        authority.trial = CertificateDer::from_pem_slice(trial.as_bytes()).map_err(|error| unacceptable(&error))?;
        authority.accepted_below(roots).map_err(|error| unacceptable(&error))?;
        Ok(authority)
    }

    /// A leaf from the first moment at which it can be one.
    fn sign_trial(&self) -> Result<String, SignError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let subject = Subject::Spiffe("spiffe://trial/ns/trial/sa/trial");
        Ok(self.issue(&key, &subject, CLOCK_SKEW, self.validity.0 + CLOCK_SKEW)?.leaf)
    }

    /// Looks at what is signed here as a peer does that trusts no more than `roots`.
    fn accepted_below(&self, roots: Vec<CertificateDer<'_>>) -> Result<(), rustls::Error> {
        let mut anchors = RootCertStore::empty();
        for root in roots {
            anchors.add(root)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let peer = WebPkiClientVerifier::builder_with_provider(Arc::new(anchors), provider)
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let start = u64::try_from((self.validity.0 + CLOCK_SKEW).unix_timestamp()).unwrap_or_default();
        let start = UnixTime::since_unix_epoch(Duration::from_secs(start));
        peer.verify_client_cert(&self.trial, &self.chain, start).map(drop)
    }

    /// The same authority, handing out `roots` (PEM) in place of its own.
    #[must_use]
    pub fn handing_out(&self, roots: &str) -> Self {
        Self { roots: roots.into(), ..self.clone() }
    }

    /// The roots every workload and proxy trusts, PEM; goes to the ConfigMap `istio-ca-root-cert`.
    pub fn root_bundle_pem(&self) -> String {
        self.roots.to_string()
    }

    /// The roots that came with its key, one PEM text each, however they were written.
    pub fn own_roots(&self) -> &[String] {
        &self.own_roots
    }

    /// When the first certificate of the signing chain ends, or its root; no leaf outlives it.
    pub fn not_after(&self) -> OffsetDateTime {
        self.validity.1
    }

    /// First and last moment at which all of the signing chain and a root are valid.
    pub fn validity(&self) -> (OffsetDateTime, OffsetDateTime) {
        self.validity
    }

    /// Whether the signing chain is that of `other`, whatever roots they hand out.
    pub fn signs_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.issuer, &other.issuer)
    }

    /// Whether who trusts no more than `roots` (PEM) accepts what is signed here, by what is sent along with it.
    pub fn is_trusted_below<'a>(&self, roots: impl IntoIterator<Item = &'a str>) -> bool {
        let roots = roots.into_iter().filter_map(|pem| certificates("root", pem).ok()).flatten().collect();
        self.accepted_below(roots).is_ok()
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
        let ttl = lifetime.grant(validity_seconds)?;
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
        if now >= self.not_after() {
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
        params.not_after = (now + ttl).min(self.not_after());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let (not_before, not_after) = (params.not_before, params.not_after);
        let leaf = params.signed_by(key, &*self.issuer)?.pem();
        let (intermediates, roots) = (self.intermediates.to_vec(), self.root_bundle_pem());
        Ok(Issued { leaf, intermediates, roots, not_before, not_after })
    }
}

/// When the last of the certificates in `pem` ends; `None` for what is no certificate.
pub fn end_of(pem: &str) -> Option<OffsetDateTime> {
    let ends = certificates("certificate", pem).ok()?.iter().map(|der| Some(validity(der).ok()?.1)).collect::<Vec<_>>();
    ends.into_iter().flatten().max()
}

fn root(
    key: &KeyPair,
    name: DistinguishedName,
    identifier: KeyIdMethod,
    ttl: Duration,
    now: OffsetDateTime,
) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    params.key_identifier_method = identifier;
    params.serial_number = Some(serial());
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + ttl;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params.self_signed(key)?.pem())
}

/// `name` with each text in the type it has there: a name in another type is another name to who compares bytes.
fn repeat(name: &X509Name<'_>) -> Option<DistinguishedName> {
    let mut repeated = DistinguishedName::new();
    for attribute in name.iter_attributes() {
        let kind = DnType::from_oid(&attribute.attr_type().iter()?.collect::<Vec<_>>());
        let text = std::str::from_utf8(attribute.attr_value().data).ok()?;
        let value = match attribute.attr_value().header.tag() {
            Tag::Utf8String => DnValue::Utf8String(text.to_owned()),
            Tag::PrintableString => DnValue::PrintableString(text.try_into().ok()?),
            Tag::Ia5String => DnValue::Ia5String(text.try_into().ok()?),
            _ => return None,
        };
        repeated.push(kind, value);
    }
    Some(repeated)
}

fn key(material: &CaMaterial) -> Result<KeyPair, MaterialError> {
    let unreadable = |reason: String| MaterialError::Unreadable { what: "CA key", reason };
    let key = PrivateKeyDer::from_pem_slice(material.key.as_bytes()).map_err(|error| unreadable(error.to_string()))?;
    KeyPair::try_from(&key).map_err(|error| unreadable(error.to_string()))
}

/// With the beginning of a reason that may repeat all that was to be parsed: it goes into a header of the answer.
fn unparsable(reason: &dyn fmt::Display) -> SignError {
    let reason = reason.to_string();
    SignError::Unparsable(reason[..reason.floor_char_boundary(LONGEST_REASON)].to_owned())
}

/// The public key of a CSR whose signature proves that the requester holds the private half.
fn proven_key(csr: &str) -> Result<SubjectPublicKeyInfo, SignError> {
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).map_err(|error| unparsable(&error))?;
    let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|error| unparsable(&error))?;
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

fn validity(der: &CertificateDer<'_>) -> Result<(OffsetDateTime, OffsetDateTime), MaterialError> {
    let parsed = parse(der)?;
    Ok((parsed.validity().not_before.to_datetime(), parsed.validity().not_after.to_datetime()))
}

/// When all of `signer`, its chain and one of the roots are valid. There are clients that look at a root's dates, too.
///
/// # Errors
/// No root has signed any of them.
fn common_validity(
    signer: &CertificateDer<'_>,
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
) -> Result<(OffsetDateTime, OffsetDateTime), MaterialError> {
    let (mut start, mut end) = validity(signer)?;
    for certificate in chain {
        let (from, until) = validity(certificate)?;
        (start, end) = (start.max(from), end.min(until));
    }
    let mut anchors = Vec::new();
    for root in roots {
        if check_anchored(signer, chain, std::slice::from_ref(root)).is_ok() {
            anchors.push(validity(root)?);
        }
    }
    let from = anchors.iter().map(|(from, _)| *from).min().ok_or(MaterialError::Unanchored)?;
    let until = anchors.iter().map(|(_, until)| *until).max().ok_or(MaterialError::Unanchored)?;
    Ok((start.max(from), end.min(until)))
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
