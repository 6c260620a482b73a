//! The server's own certificates: a CA kept in the data directory, and a serving certificate made anew on each start.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

const NAMES: [&str; 5] =
    ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"];

/// What the listeners serve with and what clients trust.
pub struct ServingCertificate {
    pub config: Arc<rustls::ServerConfig>,
    pub ca_pem: String,
}

/// Makes (or reads) the CA and issues a serving certificate for the usual names and `addresses`.
///
/// # Errors
/// When the data directory cannot be used or holds something else.
pub fn open(data_dir: &Path, addresses: &[IpAddr]) -> anyhow::Result<ServingCertificate> {
    let ca_key =
        super::files::secret(&data_dir.join("ca.key"), || Ok(KeyPair::generate()?.serialize_pem().into_bytes()))?;
    let ca_key = KeyPair::from_pem(&String::from_utf8(ca_key)?).context("ca.key in the data directory")?;
    let ca_pem = super::files::secret(&data_dir.join("ca.crt"), || {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "istiod-lite standalone CA");
        params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
        params.not_after = OffsetDateTime::now_utc() + Duration::days(3650);
        Ok(params.self_signed(&ca_key)?.pem().into_bytes())
    })?;
    let ca_pem = String::from_utf8(ca_pem)?;
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key).context("ca.crt in the data directory")?;

    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(NAMES.map(str::to_owned))?;
    params.subject_alt_names.extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
    params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + Duration::days(365);
    let certificate = params.signed_by(&key, &issuer)?;

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(ServingCertificate { config: Arc::new(config), ca_pem })
}
