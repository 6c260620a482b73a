//! One revocation list, and how lists are read.

use std::{
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateRevocationListDer, SignatureVerificationAlgorithm, pem::PemObject},
};
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::{asn1_rs::Any, prelude::FromDer, revocation_list::CertificateRevocationList};

use super::{Issuer, RevocationError, lock};

/// As a block of PEM begins.
const PEM: &[u8] = b"-----BEGIN ";

pub(super) struct List {
    der: Box<[u8]>,
    parsed: CertRevocationList<'static>,
    /// For people.
    issuer: String,
    next_update: Option<SystemTime>,
    /// Whose signature was looked at, and whether it was theirs.
    signers: Mutex<Vec<(Arc<Issuer>, bool)>>,
}

/// All lists of a text in PEM, or of one or more in DER.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<List>, RevocationError> {
    if bytes.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    let malformed = |number, reason: String| RevocationError::Malformed { number, reason };
    let mut ders = Vec::new();
    if bytes.windows(PEM.len()).any(|window| window == PEM) {
        for (at, der) in CertificateRevocationListDer::pem_slice_iter(bytes).enumerate() {
            ders.push(der.map_err(|error| malformed(at + 1, format!("PEM: {error}")))?.to_vec());
        }
        if ders.is_empty() {
            return Err(RevocationError::NoList("PEM of another kind"));
        }
    } else {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (after, one) = CertificateRevocationList::from_der(rest)
                .map_err(|error| malformed(ders.len() + 1, format!("neither PEM nor DER: {error}")))?;
            ders.push(one.as_raw().to_vec());
            rest = after;
        }
    }
    let lists = ders.into_iter().enumerate();
    lists.map(|(at, der)| List::new(der).map_err(|reason| malformed(at + 1, reason))).collect()
}

impl List {
    /// Version 2 with what RFC 5280 demands. Delta lists, and lists that speak of other issuers' certificates, are not
    /// understood, and what is critical and not understood must not be ignored.
    fn new(der: Vec<u8>) -> Result<Self, String> {
        let parsed = OwnedCertRevocationList::from_der(&der).map_err(|error| error.to_string())?;
        let (_, seen) = CertificateRevocationList::from_der(&der).map_err(|error| error.to_string())?;
        let issuer = seen.issuer().to_string();
        if !Signed::of(&der).is_some_and(|signed| signed.is_known()) {
            return Err("it is signed by an algorithm that is not accepted of certificates either".to_owned());
        }
        let seconds = |at: i64| UNIX_EPOCH + Duration::from_secs(at.max(0).cast_unsigned());
        let next_update = seen.next_update().map(|at| seconds(at.timestamp()));
        let entries = seen.iter_revoked_certificates().count();
        tracing::debug!(%issuer, this_update = %seen.last_update(), entries, "revocation list");
        Ok(Self { parsed: parsed.into(), issuer, next_update, der: der.into(), signers: Mutex::default() })
    }

    /// DER of the issuer's name, without tag and length.
    pub(super) fn issuer(&self) -> &[u8] {
        self.parsed.issuer()
    }

    pub(super) fn der(&self) -> &[u8] {
        &self.der
    }

    pub(super) fn next_update(&self) -> Option<SystemTime> {
        self.next_update
    }

    /// Entries on it.
    pub(super) fn len(&self) -> usize {
        CertificateRevocationList::from_der(&self.der).map_or(0, |(_, list)| list.iter_revoked_certificates().count())
    }

    pub(super) fn names(&self, serial: &[u8]) -> bool {
        matches!(self.parsed.find_serial(serial), Ok(Some(_)))
    }

    /// Authorities with one name and different keys are common: a list of the one says nothing about the other's.
    pub(super) fn is_signed_by(&self, issuer: &Arc<Issuer>) -> bool {
        let mut signers = lock(&self.signers);
        if let Some((_, signed)) = signers.iter().find(|(known, _)| known == issuer) {
            return *signed;
        }
        let signed = Signed::of(&self.der).zip(Keyed::of(&issuer.key)).is_some_and(|(list, key)| list.is_by(&key));
        if !signed {
            tracing::warn!(issuer = %self.issuer,
                "a revocation list names a certificate, but its signature is not of the key that issued it: not counted");
        }
        signers.push((issuer.clone(), signed));
        signed
    }
}

/// Signatures that handshakes accept of certificates.
fn algorithms() -> &'static [&'static dyn SignatureVerificationAlgorithm] {
    static ALL: LazyLock<WebPkiSupportedAlgorithms> =
        LazyLock::new(|| aws_lc_rs::default_provider().signature_verification_algorithms);
    ALL.all
}

/// A signed structure of X.509, as the three parts that all of them have.
struct Signed<'a> {
    content: &'a [u8],
    /// DER of the AlgorithmIdentifier, without tag and length.
    algorithm: &'a [u8],
    signature: &'a [u8],
}

impl<'a> Signed<'a> {
    fn of(der: &'a [u8]) -> Option<Self> {
        let (_, whole) = Any::from_der(der).ok()?;
        let (rest, _) = Any::from_der(whole.data).ok()?;
        let content = &whole.data[..whole.data.len() - rest.len()];
        let (rest, algorithm) = Any::from_der(rest).ok()?;
        let (_, signature) = Any::from_der(rest).ok()?;
        Some(Self { content, algorithm: algorithm.data, signature: bits(signature.data)? })
    }

    fn is_known(&self) -> bool {
        algorithms().iter().any(|known| known.signature_alg_id().as_ref() == self.algorithm)
    }

    /// With what verifies certificates, so that no authority is trusted whose lists are not.
    fn is_by(&self, key: &Keyed<'_>) -> bool {
        let fits = |known: &&&dyn SignatureVerificationAlgorithm| {
            known.signature_alg_id().as_ref() == self.algorithm && known.public_key_alg_id().as_ref() == key.algorithm
        };
        let mut fitting = algorithms().iter().filter(fits);
        fitting.any(|known| known.verify_signature(key.key, self.content, self.signature).is_ok())
    }
}

/// A SubjectPublicKeyInfo.
struct Keyed<'a> {
    algorithm: &'a [u8],
    key: &'a [u8],
}

impl<'a> Keyed<'a> {
    fn of(der: &'a [u8]) -> Option<Self> {
        let (_, whole) = Any::from_der(der).ok()?;
        let (rest, algorithm) = Any::from_der(whole.data).ok()?;
        let (_, key) = Any::from_der(rest).ok()?;
        Some(Self { algorithm: algorithm.data, key: bits(key.data)? })
    }
}

/// The bytes of a BIT STRING that has no odd bits.
fn bits(content: &[u8]) -> Option<&[u8]> {
    content.split_first().filter(|(odd, _)| **odd == 0).map(|(_, bytes)| bytes)
}

/// `content` as a DER SEQUENCE.
pub(super) fn sequence(content: &[u8]) -> Vec<u8> {
    const SEQUENCE: u8 = 0x30;
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().position(|byte| *byte != 0).unwrap_or(length.len() - 1)..];
    let mut der = vec![SEQUENCE];
    if content.len() >= 0x80 {
        der.push(0x80 | u8::try_from(significant.len()).expect("a length has eight bytes at most"));
    }
    der.extend_from_slice(significant);
    der.extend_from_slice(content);
    der
}
