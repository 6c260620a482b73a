//! The authority in force, shared by all who sign: read without a lock, replaced as a whole.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use arc_swap::ArcSwap;
use mesh::identity::Revocations;
use mesh::tls::ClientPaths;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use tokio::sync::watch;

use super::authority::{Authority, Issued, LeafLifetime, SignError};

/// What is in force at one moment.
struct InForce {
    authority: Arc<Authority>,
    /// The revocation lists that came with its key, PEM.
    revocations: Option<Arc<str>>,
    /// What both demand of a client's certificate.
    clients: ClientPaths,
}

impl InForce {
    fn new(authority: Arc<Authority>, revocations: Option<Arc<str>>) -> Self {
        let clients = client_paths(&authority.root_bundle_pem(), revocations.as_deref());
        Self { authority, revocations, clients }
    }
}

/// Below `roots` (PEM), and on none of `lists`.
fn client_paths(roots: &str, lists: Option<&str>) -> ClientPaths {
    let revocations = lists.map(|_| Revocations::default());
    if let (Some(revocations), Some(lists)) = (&revocations, lists)
        && let Err(error) = revocations.load(lists.as_bytes())
    {
        // They were read when they came, so this does not happen. If it does, nobody knows who is revoked.
        tracing::error!(%error, "client certificates are refused: the revocation lists cannot be read");
        return ClientPaths::new(RootCertStore::empty(), None);
    }
    let mut anchors = RootCertStore::empty();
    anchors.add_parsable_certificates(CertificateDer::pem_slice_iter(roots.as_bytes()).filter_map(Result::ok));
    ClientPaths::new(anchors, revocations)
}

/// The authority in force.
pub struct CurrentAuthority {
    in_force: ArcSwap<InForce>,
    /// When the last certificate that was issued ends, in seconds since 1970.
    last_end: AtomicI64,
    changes: watch::Sender<u64>,
}

impl CurrentAuthority {
    pub fn new(authority: Arc<Authority>) -> Arc<Self> {
        Arc::new(Self {
            in_force: ArcSwap::from_pointee(InForce::new(authority, None)),
            last_end: AtomicI64::new(0),
            changes: watch::Sender::new(0),
        })
    }

    pub fn load(&self) -> Arc<Authority> {
        Arc::clone(&self.in_force.load().authority)
    }

    /// What every namespace is to have: roots, and revocation lists if there are any. PEM.
    pub fn distributed(&self) -> (String, Option<Arc<str>>) {
        let in_force = self.in_force.load();
        (in_force.authority.root_bundle_pem(), in_force.revocations.clone())
    }

    /// As [`Authority::sign`], by whoever signs now.
    ///
    /// # Errors
    /// Those of [`Authority::sign`].
    pub fn sign(
        &self,
        csr: &str,
        spiffe: &str,
        validity_seconds: i64,
        lifetime: LeafLifetime,
        now: OffsetDateTime,
    ) -> Result<Issued, SignError> {
        // Noted before the authority is read: whoever replaces it and looks at the note afterwards has it in there, or
        // this certificate comes with the new roots.
        if let Ok(ttl) = lifetime.grant(validity_seconds) {
            self.note_end((now + ttl).unix_timestamp());
        }
        self.load().sign(csr, spiffe, validity_seconds, lifetime, now)
    }

    /// Whether a client's certificate is good below the roots that are handed out now, and on none of the lists.
    ///
    /// # Errors
    /// In the words of rustls, by which it chooses the alert.
    pub fn verify_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.in_force.load().clients.verify(leaf, intermediates, now)
    }

    pub(super) fn note_end(&self, end: i64) {
        self.last_end.fetch_max(end, Ordering::SeqCst);
    }

    /// None ends later than that.
    pub(super) fn limit_end(&self, latest: i64) {
        self.last_end.fetch_min(latest, Ordering::SeqCst);
    }

    /// When the last certificate that was issued ends, in seconds since 1970. Not less than it is.
    pub(super) fn last_end(&self) -> i64 {
        self.last_end.load(Ordering::SeqCst)
    }

    pub(crate) fn replace(&self, authority: Arc<Authority>, revocations: Option<Arc<str>>) {
        self.in_force.store(Arc::new(InForce::new(authority, revocations)));
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Changes with everything that is put in force.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

impl fmt::Debug for CurrentAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CurrentAuthority").field("not_after", &self.load().not_after()).finish_non_exhaustive()
    }
}
