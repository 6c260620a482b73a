//! The certificate the control plane serves with on 15012: signed by its own authority, renewed at half life, and
//! picked anew for each handshake, so that nothing restarts when it changes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use mesh::clock::Clock;
use mesh::drain::DrainWatcher;
use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;

use super::authority::{Authority, Subject};

/// Validity of the serving certificate; renewed at half of it.
const TTL: Duration = Duration::from_secs(24 * 3600);
/// After a renewal that did not work.
const RETRY: Duration = Duration::from_secs(60);

/// The names clients may know this control plane by in `namespace`.
pub fn dns_names(namespace: &str, custom_host: Option<&str>) -> Vec<String> {
    ["istiod", "istiod-remote", "istio-pilot"]
        .map(|service| format!("{service}.{namespace}.svc"))
        .into_iter()
        .chain(custom_host.map(str::to_owned))
        .collect()
}

/// Hands the current serving certificate to handshakes.
pub struct ServingCertificate {
    authority: Arc<Authority>,
    names: Vec<String>,
    clock: Clock,
    current: ArcSwap<CertifiedKey>,
}

impl ServingCertificate {
    /// Signs the first certificate, for `names`.
    ///
    /// # Errors
    /// The authority cannot sign.
    pub fn new(authority: Arc<Authority>, names: Vec<String>, clock: Clock) -> anyhow::Result<Arc<Self>> {
        let (first, _) = sign(&authority, &names, clock.now().into())?;
        Ok(Arc::new(Self { authority, names, clock, current: ArcSwap::from_pointee(first) }))
    }

    /// TLS settings for the gRPC port: TLS 1.2 or newer as Istio's clients expect, no client certificate asked for.
    ///
    /// # Errors
    /// Never with the provider this is built with.
    pub fn server_config(self: &Arc<Self>) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .context("TLS versions")?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Renews at half life until drained.
    pub async fn renew(self: Arc<Self>, drain: DrainWatcher) {
        let mut wait = TTL / 2;
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = drain.draining() => return,
            }
            wait = self.renew_now().unwrap_or_else(|error| {
                tracing::error!(error = format!("{error:#}"), "the serving certificate could not be renewed");
                RETRY
            });
        }
    }

    /// Signs and installs a new certificate; returns how long until the next is due.
    fn renew_now(&self) -> anyhow::Result<Duration> {
        let now = OffsetDateTime::from(self.clock.now());
        let (next, not_after) = sign(&self.authority, &self.names, now)?;
        self.current.store(Arc::new(next));
        tracing::info!(%not_after, "serving certificate renewed");
        // Shorter than TTL / 2 only in the last day of the CA's own life.
        Ok(Duration::try_from((not_after - now) / 2).unwrap_or(RETRY).max(RETRY))
    }
}

impl fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

fn sign(
    authority: &Authority,
    names: &[String],
    now: OffsetDateTime,
) -> anyhow::Result<(CertifiedKey, OffsetDateTime)> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let issued = authority.issue(&key, &Subject::Dns(names), TTL, now).context("signing the serving certificate")?;
    let chain = std::iter::once(&issued.leaf)
        .chain(&issued.intermediates)
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)?;
    Ok((CertifiedKey::new(chain, key), issued.not_after))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::SystemTime;

    use x509_parser::prelude::{FromDer as _, X509Certificate};

    use super::*;

    #[test]
    fn names_are_those_clients_dial() {
        let names = dns_names("istio-system", Some("istiod.example"));
        assert_eq!(names[0], "istiod.istio-system.svc");
        assert!(names.contains(&"istiod.example".to_owned()));
    }

    #[test]
    fn renewal_installs_a_later_certificate_due_at_half_life() {
        let start = SystemTime::now();
        let passed = Arc::new(AtomicU64::new(0));
        let clock = Clock::with({
            let passed = Arc::clone(&passed);
            move || start + Duration::from_secs(passed.load(Ordering::Relaxed))
        });
        let material = Authority::self_signed("cluster.local", start.into()).unwrap();
        let authority = Arc::new(Authority::from_material(&material).unwrap());
        let serving = ServingCertificate::new(authority, dns_names("istio-system", None), clock).unwrap();
        let end =
            |key: &CertifiedKey| X509Certificate::from_der(&key.cert[0]).unwrap().1.validity().not_after.timestamp();
        let before = end(&serving.current.load());
        passed.store(3600, Ordering::Relaxed);
        assert_eq!(serving.renew_now().unwrap(), TTL / 2);
        assert_eq!(end(&serving.current.load()) - before, 3600);
    }
}
