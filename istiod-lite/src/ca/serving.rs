//! The certificate the control plane serves with on 15012 and 15017: signed by its own authority, renewed at half life and when the
//! authority changes, and picked anew for each handshake, so that nothing restarts when it changes.

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
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;

use super::CurrentAuthority;
use super::authority::{Authority, Subject};
use crate::revision::Revision;

/// Validity of the serving certificate; renewed at half of it.
const TTL: Duration = Duration::from_secs(24 * 3600);
/// The clock is looked at again this often, because it may jump; also the pause after a renewal that did not work.
const LOOK: Duration = Duration::from_secs(30);
/// A clock that goes back by less needs no new certificate: it is dated back by two minutes.
const BACK: Duration = Duration::from_secs(60);

/// The names clients may know this control plane by in `namespace`.
pub fn dns_names(namespace: &str, revision: &Revision, custom_host: Option<&str>) -> Vec<String> {
    let of_revision = Some(revision).filter(|revision| !revision.is_default()).map(|revision| revision.named("istiod"));
    ["istiod", "istiod-remote", "istio-pilot"]
        .map(str::to_owned)
        .into_iter()
        .chain(of_revision)
        .map(|service| format!("{service}.{namespace}.svc"))
        .chain(custom_host.map(str::to_owned))
        .collect()
}

/// Hands the current serving certificate to handshakes.
pub struct ServingCertificate {
    authority: Arc<CurrentAuthority>,
    names: Vec<String>,
    clock: Clock,
    current: ArcSwap<Serving>,
}

/// A certificate, and the times by which it serves.
struct Serving {
    key: Arc<CertifiedKey>,
    signed_by: Arc<Authority>,
    signed: OffsetDateTime,
    renew: OffsetDateTime,
}

impl Serving {
    /// Its half-life is over, the clock has gone back to when it was not valid yet, or another signs now.
    fn is_due(&self, authority: &Authority, now: OffsetDateTime) -> bool {
        self.renew <= now || now + BACK < self.signed || !self.signed_by.signs_as(authority)
    }
}

impl ServingCertificate {
    /// Signs the first certificate, for `names`.
    ///
    /// # Errors
    /// The authority cannot sign.
    pub fn new(authority: Arc<CurrentAuthority>, names: Vec<String>, clock: Clock) -> anyhow::Result<Arc<Self>> {
        let first = sign(authority.load(), &names, clock.now().into())?;
        Ok(Arc::new(Self { authority, names, clock, current: ArcSwap::from_pointee(first) }))
    }

    /// TLS settings for a port that speaks `protocols`, the preferred one first: TLS 1.2 or newer as Istio's clients
    /// expect. `clients` says whether certificates are asked for, and which are good.
    ///
    /// # Errors
    /// Never with the provider this is built with.
    pub fn server_config(
        self: &Arc<Self>,
        protocols: &[&[u8]],
        clients: Arc<dyn ClientCertVerifier>,
    ) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let asks = clients.offer_client_auth();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .context("TLS versions")?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        if asks {
            // A session that is resumed brings its certificate along, and nobody would look at that again.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// Renews at half life, and when another signs, until drained.
    pub async fn renew(self: Arc<Self>, drain: DrainWatcher) {
        let mut changes = self.authority.changes();
        loop {
            // Nothing is lost by the branch not taken: what is due is asked below. The sender lives in `self`.
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = changes.changed() => {}
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
        let authority = self.authority.load();
        if self.current.load().is_due(&authority, now) {
            let next = sign(authority, &self.names, now)?;
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

fn sign(authority: Arc<Authority>, names: &[String], now: OffsetDateTime) -> anyhow::Result<Serving> {
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
    let key = Arc::new(CertifiedKey::new(chain, key));
    Ok(Serving { key, signed_by: authority, signed: now, renew: now + half.max(LOOK) })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::SystemTime;

    use x509_parser::prelude::{FromDer as _, X509Certificate};

    use super::*;
    use crate::ca::SELF_SIGNED_ROOT_TTL;

    #[test]
    fn names_are_those_clients_dial() {
        let names = dns_names("istio-system", &"canary".parse().unwrap(), Some("istiod.example"));
        assert_eq!(names[0], "istiod.istio-system.svc");
        for name in ["istiod.example", "istiod-canary.istio-system.svc"] {
            assert!(names.contains(&name.to_owned()), "{name}");
        }
    }

    #[test]
    fn renewed_at_half_life_and_when_the_clock_jumps() {
        let start = SystemTime::now();
        let passed = Arc::new(AtomicU64::new(0));
        let clock = Clock::with({
            let passed = Arc::clone(&passed);
            move || start + Duration::from_secs(passed.load(Ordering::Relaxed))
        });
        let material = Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, start.into()).unwrap();
        let authority = CurrentAuthority::new(Arc::new(Authority::from_material(&material).unwrap()));
        let serving =
            ServingCertificate::new(authority, dns_names("istio-system", &Revision::default(), None), clock).unwrap();
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
    #[tokio::test(start_paused = true)]
    async fn reissued_at_once_when_another_signs_and_not_when_only_roots_change() {
        let clock = Clock::from_runtime(SystemTime::now());
        let authority = || {
            let now = clock.now().into();
            let material = Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, now).unwrap();
            Arc::new(Authority::from_material(&material).unwrap())
        };
        let (old, new) = (authority(), authority());
        let current = CurrentAuthority::new(Arc::clone(&old));
        let names = dns_names("istio-system", &Revision::default(), None);
        let serving = ServingCertificate::new(Arc::clone(&current), names, clock.clone()).unwrap();
        let (_trigger, drain) = mesh::drain::channel();
        let renewing = tokio::spawn(Arc::clone(&serving).renew(drain));
        let leaf = || serving.current.load().key.cert[0].clone();
        let first = leaf();
        let both = format!("{}{}", old.root_bundle_pem(), new.root_bundle_pem());
        for (authority, changed) in [(&old, false), (&new, true)] {
            // The task must be waiting before there is something to wait for.
            tokio::time::sleep(Duration::from_millis(1)).await;
            current.replace(Arc::new(authority.handing_out(&both)), None);
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(leaf() != first, changed);
        }
        renewing.abort();
    }
}
