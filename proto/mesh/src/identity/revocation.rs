//! Certificates that their authorities have taken back (RFC 5280): the lists, and who of our peers is on them.
//!
//! ```text
//!  handshake ──► path to a root ──► on a list? ──yes──► refused
//!                                       │no
//!                                       ▼
//!                 Standing: Good ──a new list names the path──► Revoked: its connection breaks, at once
//! ```
//! Every certificate of a peer's path but the root is looked for in the lists of the one that issued it. A list counts
//! only with that issuer's signature; what no list speaks of is allowed. A list past its `nextUpdate` still revokes whom
//! it names: to forget them would be worse, and to refuse everybody else of that issuer would be an outage by the
//! calendar. Its age is logged and shown as a metric. Whether the issuer's certificate says `cRLSign` does not matter:
//! authorities made for Istio often lack it, and the signature is the same key's.

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::Context,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use futures_util::task::AtomicWaker;
use tokio::sync::watch;

mod file;
mod list;

pub use file::RevocationFile;
use list::List;

/// Why lists were not taken.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    #[error("{0}: {1}")]
    Read(String, #[source] io::Error),
    #[error("revocation list {number}: {reason}")]
    Malformed { number: usize, reason: String },
    #[error("there is no revocation list in it, but {0}")]
    NoList(&'static str),
}

/// Which end of a handshake the peer was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerRole {
    Client,
    Server,
}

impl PeerRole {
    /// The label of who reports: we are the other end.
    fn reporter(self) -> &'static str {
        match self {
            Self::Client => "destination",
            Self::Server => "source",
        }
    }
}

/// Whoever issued a certificate of a path.
#[derive(PartialEq, Eq, Hash)]
struct Issuer {
    /// DER of the name, without tag and length.
    name: Box<[u8]>,
    /// DER of the SubjectPublicKeyInfo.
    key: Box<[u8]>,
}

/// One certificate of a path: as much of it as tells whether it is revoked.
struct Link {
    issuer: Arc<Issuer>,
    serial: Box<[u8]>,
}

/// A verified path from a peer to a root, the root left out.
pub(crate) struct Path(Box<[Link]>);

/// Whether the peer of one TLS connection is still who it was taken for. Shared by all that goes over the connection.
pub struct Standing {
    path: Path,
    role: PeerRole,
    revoked: AtomicBool,
    /// The task that drives the connection.
    driver: AtomicWaker,
}

/// The error of a connection whose peer has been revoked.
#[derive(Debug, thiserror::Error)]
#[error("the peer's certificate has been revoked")]
pub struct Revoked;

impl Standing {
    /// Has a certificate of the peer been revoked since the handshake?
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// An error once the peer is revoked; until then the task of `cx` is woken when it is.
    pub(crate) fn poll_good(&self, cx: &Context<'_>) -> io::Result<()> {
        self.driver.register(cx.waker());
        if self.is_revoked() { Err(io::Error::other(Revoked)) } else { Ok(()) }
    }

    fn revoke(&self) {
        self.revoked.store(true, Ordering::Release);
        self.driver.wake();
    }
}

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standing")
            .field("role", &self.role)
            .field("revoked", &self.is_revoked())
            .finish_non_exhaustive()
    }
}

/// What a load has brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Loaded {
    pub lists: usize,
    /// Certificates on them.
    pub entries: usize,
    /// Open TLS connections that were cut.
    pub cut: usize,
}

/// The lists in force, and the connections to cut when they change. Shared by all threads.
#[derive(Clone)]
pub struct Revocations(Arc<Inner>);

struct Inner {
    lists: ArcSwap<Lists>,
    /// One of each, however many connections come through it.
    issuers: Mutex<HashSet<Arc<Issuer>>>,
    open: Mutex<Open>,
    loads: watch::Sender<u64>,
}

/// By issuer; one issuer may have several, and several issuers one name.
#[derive(Default)]
struct Lists(HashMap<Box<[u8]>, Vec<List>>);

/// Connections of peers that are in good standing.
#[derive(Default)]
struct Open {
    standings: Vec<Weak<Standing>>,
    /// Those that ended are dropped when there are so many.
    tidy_at: usize,
}

const TIDY_AT: usize = 64;

impl Default for Revocations {
    fn default() -> Self {
        Self(Arc::new(Inner {
            lists: ArcSwap::default(),
            issuers: Mutex::default(),
            open: Mutex::new(Open { standings: Vec::new(), tidy_at: TIDY_AT }),
            loads: watch::Sender::new(0),
        }))
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revocations").field("lists", &self.0.lists.load().0.len()).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Revocations {
    /// Puts the lists of `bytes` (PEM or DER, any number of them; empty: nobody is revoked) in the place of those before,
    /// and breaks every open connection whose peer is on one of them.
    ///
    /// # Errors
    /// [`RevocationError`]; then the lists before stay.
    pub fn load(&self, bytes: &[u8]) -> Result<Loaded, RevocationError> {
        let mut lists = Lists::default();
        for list in list::parse(bytes)? {
            lists.0.entry(list.issuer().into()).or_default().push(list);
        }
        let all = || lists.0.values().flatten();
        let (count, entries) = (all().count(), all().map(List::len).sum());
        record(count, entries, all().filter_map(List::next_update).min());
        self.0.lists.store(Arc::new(lists));
        let cut = self.cut();
        self.0.loads.send_modify(|loads| *loads += 1);
        Ok(Loaded { lists: count, entries, cut })
    }

    /// How many lists are in `bytes`; nothing is done with them.
    ///
    /// # Errors
    /// [`RevocationError`]: [`Self::load`] would not take them.
    pub fn check(bytes: &[u8]) -> Result<usize, RevocationError> {
        Ok(list::parse(bytes)?.len())
    }

    /// Breaks the connections of those who are on a list now.
    fn cut(&self) -> usize {
        let mut open = lock(&self.0.open);
        // Read with the lock held: whoever enters later looks at these lists or at newer ones.
        let lists = self.0.lists.load();
        let mut cut = 0;
        open.standings.retain(|standing| {
            let Some(standing) = standing.upgrade() else { return false };
            let revoked = lists.name(&standing.path);
            if revoked {
                count_rejection(standing.role);
                standing.revoke();
                cut += 1;
            }
            !revoked
        });
        cut
    }

    /// Changes with every load.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.0.loads.subscribe()
    }

    /// The lists in force, in DER.
    pub fn lists(&self) -> Vec<Vec<u8>> {
        self.0.lists.load().0.values().flatten().map(|list| list.der().to_vec()).collect()
    }

    /// When the first of the lists in force is due to be replaced.
    pub fn next_update(&self) -> Option<SystemTime> {
        self.0.lists.load().0.values().flatten().filter_map(List::next_update).min()
    }

    /// The path that a handshake has verified, unless somebody on it is revoked.
    pub(crate) fn examine(&self, verified: &webpki::VerifiedPath<'_>, role: PeerRole) -> Result<Path, webpki::Error> {
        let path = self.path(verified);
        if self.0.lists.load().name(&path) {
            count_rejection(role);
            return Err(webpki::Error::CertRevoked);
        }
        Ok(path)
    }

    /// Watches over a connection from now on. `None` where a load since the handshake has revoked its peer.
    pub(crate) fn admit(&self, path: Path, role: PeerRole) -> Option<Arc<Standing>> {
        let standing = Arc::new(Standing { path, role, revoked: AtomicBool::new(false), driver: AtomicWaker::new() });
        {
            let mut open = lock(&self.0.open);
            if open.standings.len() >= open.tidy_at {
                open.standings.retain(|standing| standing.strong_count() > 0);
                open.tidy_at = (open.standings.len() * 2).max(TIDY_AT);
            }
            open.standings.push(Arc::downgrade(&standing));
        }
        if self.0.lists.load().name(&standing.path) {
            count_rejection(role);
            return None;
        }
        Some(standing)
    }

    fn path(&self, verified: &webpki::VerifiedPath<'_>) -> Path {
        let mut links = Vec::with_capacity(2);
        let mut subject: &webpki::Cert<'_> = verified.end_entity();
        for issuer in verified.intermediate_certificates() {
            let key = issuer.subject_public_key_info();
            links.push(self.link(subject, issuer.subject(), &key));
            subject = issuer;
        }
        let anchor = verified.anchor();
        links.push(self.link(subject, &anchor.subject, &list::sequence(&anchor.subject_public_key_info)));
        Path(links.into())
    }

    fn link(&self, of: &webpki::Cert<'_>, name: &[u8], key: &[u8]) -> Link {
        let issuer = Issuer { name: name.into(), key: key.into() };
        let mut issuers = lock(&self.0.issuers);
        let issuer = match issuers.get(&issuer) {
            Some(known) => known.clone(),
            None => {
                if issuers.len() >= TIDY_AT {
                    issuers.retain(|issuer| Arc::strong_count(issuer) > 1);
                }
                let issuer = Arc::new(issuer);
                issuers.insert(issuer.clone());
                issuer
            }
        };
        Link { issuer, serial: of.serial().into() }
    }

    #[cfg(test)]
    fn open(&self) -> usize {
        lock(&self.0.open).standings.len()
    }
}

impl Lists {
    fn name(&self, path: &Path) -> bool {
        path.0.iter().any(|link| {
            let lists = self.0.get(&link.issuer.name);
            lists.is_some_and(|lists| {
                lists.iter().any(|list| list.names(&link.serial) && list.is_signed_by(&link.issuer))
            })
        })
    }
}

fn count_rejection(role: PeerRole) {
    metrics::counter!("istio_crl_policy_rejections_total", "reporter" => role.reporter()).increment(1);
}

#[allow(clippy::cast_precision_loss, reason = "counts and dates are small")]
fn record(lists: usize, entries: usize, next_update: Option<SystemTime>) {
    metrics::gauge!("mesh_crl_lists").set(lists as f64);
    metrics::gauge!("mesh_crl_entries").set(entries as f64);
    let due = next_update.map_or(Duration::ZERO, |at| at.duration_since(UNIX_EPOCH).unwrap_or_default());
    metrics::gauge!("mesh_crl_next_update_timestamp_seconds").set(due.as_secs_f64());
}

#[cfg(test)]
mod tests;
