//! A certificate authority in a directory (or in memory), for meshes without a control plane, for tests and benches.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};

use super::{
    BoxFuture, CertificateSource, HandshakeRules, Identity, IdentityError, WorkloadCertificate, certificate::malformed,
};
use crate::clock::Clock;

/// Leaves are valid from a little before now: clocks of nodes differ.
const BACKDATE: Duration = Duration::from_secs(120);
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Signs for any identity it is asked for.
pub struct FileCa {
    issuer: Issuer<'static, KeyPair>,
    /// Sent after each leaf.
    intermediates_pem: String,
    root_pem: String,
    ttl: Duration,
    clock: Clock,
    rules: HandshakeRules,
}

impl FileCa {
    /// From `ca-cert.pem` and `ca-key.pem` in `dir`; also `cert-chain.pem` (intermediates) and `root-cert.pem` where the
    /// CA certificate is not itself the root. `ttl` is the lifetime of what it signs.
    pub fn open(dir: &Path, ttl: Duration, clock: Clock) -> Result<Self, IdentityError> {
        let fail =
            |name: &str, reason: String| IdentityError::CaFiles { path: dir.join(name).display().to_string(), reason };
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).map_err(|e| fail(name, e.to_string()));
        let optional = |name: &str| match std::fs::read_to_string(dir.join(name)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some).map_err(|e| fail(name, e.to_string())),
        };
        let certificate = read("ca-cert.pem")?;
        let key = KeyPair::from_pem(&read("ca-key.pem")?).map_err(|e| fail("ca-key.pem", e.to_string()))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(|e| fail("ca-cert.pem", e.to_string()))?;
        let intermediates_pem = optional("cert-chain.pem")?.unwrap_or_default();
        let root_pem = optional("root-cert.pem")?.unwrap_or(certificate);
        Ok(Self { issuer, intermediates_pem, root_pem, ttl, clock, rules: HandshakeRules::default() })
    }

    /// A new self-signed CA that lives as long as this value.
    pub fn generate(trust_domain: &str, ttl: Duration, clock: Clock) -> Result<Self, IdentityError> {
        let key = new_key()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (clock.now() - BACKDATE).into();
        params.not_after = (clock.now() + ROOT_LIFETIME).into();
        let root_pem = params.self_signed(&key).map_err(malformed)?.pem();
        let issuer = Issuer::new(params, key);
        let (intermediates_pem, rules) = (String::new(), HandshakeRules::default());
        Ok(Self { issuer, intermediates_pem, root_pem, ttl, clock, rules })
    }

    /// Handshakes with what it signs go by `rules`.
    #[must_use]
    pub fn with_rules(self, rules: HandshakeRules) -> Self {
        Self { rules, ..self }
    }

    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// A fresh key and certificate.
    pub fn sign(&self, identity: &Identity) -> Result<WorkloadCertificate, IdentityError> {
        let now = self.clock.now();
        self.sign_valid(identity, now - BACKDATE, now + self.ttl)
    }

    /// As [`FileCa::sign`], for a validity of the caller's choice.
    pub fn sign_valid(
        &self,
        identity: &Identity,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<WorkloadCertificate, IdentityError> {
        let (chain, key) = self.issue(identity, not_before, not_after)?;
        let certificate = WorkloadCertificate::from_pem(&chain, &key, &self.root_pem, &self.clock)?;
        Ok(certificate.with_rules(self.rules.clone()))
    }

    /// As [`FileCa::sign`], as PEM texts: the chain and the private key.
    pub fn sign_pem(&self, identity: &Identity) -> Result<(String, String), IdentityError> {
        let now = self.clock.now();
        self.issue(identity, now - BACKDATE, now + self.ttl)
    }

    /// The chain for somebody else's key, in PEM: of the request `csr` only the key counts, the name is `identity`.
    pub fn sign_csr_pem(&self, csr: &str, identity: &Identity) -> Result<String, IdentityError> {
        let request = CertificateSigningRequestParams::from_pem(csr).map_err(malformed)?;
        let now = self.clock.now();
        let params = Self::params(identity, now - BACKDATE, now + self.ttl)?;
        let leaf = params.signed_by(&request.public_key, &self.issuer).map_err(malformed)?.pem();
        Ok(leaf + &self.intermediates_pem)
    }

    /// A revocation list of this authority, in PEM, valid for an hour.
    #[cfg(test)]
    pub(crate) fn list_pem(&self, serials: &[Vec<u8>]) -> String {
        let now = self.clock.now();
        let revoked = serials.iter().map(|serial| rcgen::RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let list = rcgen::CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).expect("it may sign lists").pem().expect("a list is PEM")
    }

    #[cfg(test)]
    pub(super) fn now(&self) -> SystemTime {
        self.clock.now()
    }

    fn issue(
        &self,
        identity: &Identity,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<(String, String), IdentityError> {
        let key = new_key()?;
        let params = Self::params(identity, not_before, not_after)?;
        let leaf = params.signed_by(&key, &self.issuer).map_err(malformed)?.pem();
        Ok((leaf + &self.intermediates_pem, key.serialize_pem()))
    }

    fn params(
        identity: &Identity,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<CertificateParams, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().map_err(malformed)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.is_ca = IsCa::ExplicitNoCa;
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.serial_number = Some(SerialNumber::from_slice(&rand::random::<[u8; 16]>()));
        Ok(params)
    }
}

pub(super) fn new_key() -> Result<KeyPair, IdentityError> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(malformed)
}

impl CertificateSource for FileCa {
    fn fetch<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<std::sync::Arc<WorkloadCertificate>, IdentityError>> {
        Box::pin(async move { self.sign(identity).map(std::sync::Arc::new) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_authority_it_is_given_and_names_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let open = || FileCa::open(dir.path(), Duration::from_secs(3600), Clock::system());
        let missing = open().err().expect("nothing is there").to_string();
        assert!(missing.contains("ca-cert.pem"), "{missing}");

        let made = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
        std::fs::write(dir.path().join("ca-cert.pem"), made.root_pem()).unwrap();
        std::fs::write(dir.path().join("ca-key.pem"), "nonsense").unwrap();
        let bad = open().err().expect("the key is nonsense").to_string();
        assert!(bad.contains("ca-key.pem"), "{bad}");

        std::fs::write(dir.path().join("ca-key.pem"), made.issuer.key().serialize_pem()).unwrap();
        let identity: Identity = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let signed = open().unwrap().sign(&identity).unwrap();
        assert_eq!(signed.identity(), &identity);
        assert_eq!(signed.describe().cert_chain.len(), 1);
    }
}
