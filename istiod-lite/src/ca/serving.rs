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
/// The clock is looked at again this often, because it may jump; also the pause after a renewal that did not work.
const LOOK: Duration = Duration::from_secs(30);
/// A clock that goes back by less needs no new certificate: it is dated back by two minutes.
const BACK: Duration = Duration::from_secs(60);

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
    current: ArcSwap<Serving>,
}

/// A certificate, and the times by which it serves.
struct Serving {
    key: Arc<CertifiedKey>,
    signed: OffsetDateTime,
    renew: OffsetDateTime,
}

impl Serving {
    /// Its half-life is over, or the clock has gone back to when it was not valid yet.
    fn is_due(&self, now: OffsetDateTime) -> bool {
        self.renew <= now || now + BACK < self.signed
    }
}

impl ServingCertificate {
    /// Signs the first certificate, for `names`.
    ///
    /// # Errors
    /// The authority cannot sign.
    pub fn new(authority: Arc<Authority>, names: Vec<String>, clock: Clock) -> anyhow::Result<Arc<Self>> {
        let first = sign(&authority, &names, clock.now().into())?;
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
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = drain.draining() => return,
            }
            if let Err(error) = self.renew_if_due() {
                tracing::error!(error = format!("{error:#}"), "the serving certificate could not be renewed");
            }
        }
    }

    /// Signs and installs a new certificate if it is time for one.
    fn renew_if_due(&self) -> anyhow::Result<()> {
        let now = OffsetDateTime::from(self.clock.now());
        if self.current.load().is_due(now) {
            let next = sign(&self.authority, &self.names, now)?;
            tracing::info!(renew_at = %next.renew, "serving certificate renewed");
            self.current.store(Arc::new(next));
        }
        Ok(())
    }
}

impl fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load().key.clone())
    }
}

fn sign(authority: &Authority, names: &[String], now: OffsetDateTime) -> anyhow::Result<Serving> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let issued = authority.issue(&key, &Subject::Dns(names), TTL, now).context("signing the serving certificate")?;
    let chain = std::iter::once(&issued.leaf)
        .chain(&issued.intermediates)
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)?;
    // At least a look lies between two, also in the last day of the CA's own life.
    let half = Duration::try_from((issued.not_after - now) / 2).unwrap_or_default();
    Ok(Serving { key: Arc::new(CertifiedKey::new(chain, key)), signed: now, renew: now + half.max(LOOK) })
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
    fn renewed_at_half_life_and_when_the_clock_jumps() {
        let start = SystemTime::now();
        let passed = Arc::new(AtomicU64::new(0));
        let clock = Clock::with({
            let passed = Arc::clone(&passed);
            move || start + Duration::from_secs(passed.load(Ordering::Relaxed))
        });
        let material = Authority::self_signed("cluster.local", start.into()).unwrap();
        let authority = Arc::new(Authority::from_material(&material).unwrap());
        let serving = ServingCertificate::new(authority, dns_names("istio-system", None), clock).unwrap();
        let end = || {
            let current = serving.current.load();
            X509Certificate::from_der(&current.key.cert[0]).unwrap().1.validity().not_after.timestamp()
        };
        let first = end();
        // Seconds since the start, and the seconds that the certificate ends after the first.
        let half = TTL.as_secs() / 2;
        for (now, later) in [(3600, 0), (half, half), (half - 30, half), (7200, 7200), (half, 7200)] {
            passed.store(now, Ordering::Relaxed);
            serving.renew_if_due().unwrap();
            assert_eq!(end() - first, i64::try_from(later).unwrap(), "at {now}");
        }
    }
}
