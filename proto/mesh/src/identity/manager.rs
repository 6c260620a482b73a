//! Keeps a valid certificate for each identity in use.
//!
//! ```text
//!            want                 ok                    half-life
//! (nothing) ─────► Initializing ─────► Available ────────────────────► fetched again; the old one serves on
//!                       │ error            ▲ ok              │ error
//!                       ▼                  │                 ▼
//!                  Unavailable ────────────┴──backoff──── Available, and due again by backoff, by expiry at the latest
//! ```
//! All fetches are made by [`Rotation::run`], on the control plane's runtime; the data path waits for their outcome, one
//! fetch for all who wait. A failed identity answers at once with its error, and an impatient caller brings the next
//! attempt forward, so that nobody waits for a backoff and no failing authority is hammered.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rand::Rng;
use serde::Serialize;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};

use super::{BoxFuture, CertificateInfo, Identity, IdentityError, WorkloadCertificate};
use crate::{clock::Clock, drain::DrainWatcher};

/// Where certificates come from.
pub trait CertificateSource: Send + Sync {
    /// One attempt at a fresh certificate for exactly `id`.
    fn fetch<'a>(&'a self, id: &'a Identity) -> BoxFuture<'a, Result<Arc<WorkloadCertificate>, IdentityError>>;
}

/// Fetches at a time: a node that starts with many identities must not flood the authority.
const CONCURRENT: usize = 8;
/// First pause after a failure, drawn from this range of seconds.
const FIRST_PAUSE: std::ops::Range<f64> = 0.5..1.0;
const MAX_PAUSE: f64 = 150.0;
const JITTER: std::ops::Range<f64> = 0.8..1.2;
/// An impatient caller brings the next attempt forward to this long after the last, and a certificate that arrives with
/// next to nothing left is not replaced sooner.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// The wall clock is looked at again at least this often, because it may jump.
const MAX_SLEEP: Duration = Duration::from_secs(10);
/// A clock that goes back by less needs no new certificates: authorities date them back by two minutes.
const BACK: Duration = Duration::from_secs(60);

/// Who needs an identity; whoever has a connection waiting goes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Urgency {
    Connection,
    Prefetch,
}

/// Hands out certificates; shared by all threads.
#[derive(Clone)]
pub struct CertificateManager {
    shared: Arc<Shared>,
}

struct Shared {
    entries: Mutex<Entries>,
    /// Something became due.
    wake: Notify,
    clock: Clock,
}

#[derive(Default)]
struct Entries {
    by_identity: BTreeMap<Identity, Entry>,
    stopped: bool,
}

struct Entry {
    certificate: Option<Arc<WorkloadCertificate>>,
    /// By the wall clock: when the certificate came, and when half of what it had left then is over. The other half is
    /// for a control plane that is down.
    fetched: SystemTime,
    renew: SystemTime,
    /// Of the last attempt.
    failure: Option<IdentityError>,
    /// Failures since the last success.
    failures: u32,
    /// Seconds; the pause after the first failure.
    first_pause: f64,
    urgency: Urgency,
    due: Instant,
    fetching: bool,
    finished: Option<Instant>,
    /// Counts attempts that ended; waiters wait for the next.
    attempts: watch::Sender<u64>,
}

/// An identity and its certificate as `/config_dump` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    pub identity: Identity,
    /// `Available`, `Initializing` or `Unavailable: <why>`.
    pub state: String,
    #[serde(flatten)]
    pub certificate: Option<CertificateInfo>,
}

/// The fetching half of a [`CertificateManager`].
pub struct Rotation {
    shared: Arc<Shared>,
    source: Arc<dyn CertificateSource>,
}

impl CertificateManager {
    /// A manager without certificates. Nothing is fetched until the [`Rotation`] runs.
    pub fn new(source: Arc<dyn CertificateSource>, clock: Clock) -> (Self, Rotation) {
        let shared = Arc::new(Shared { entries: Mutex::default(), wake: Notify::new(), clock });
        (Self { shared: shared.clone() }, Rotation { shared, source })
    }

    /// The certificate of `identity`, fetched now if there is none that is valid.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<WorkloadCertificate>, IdentityError> {
        let mut attempts = match self.shared.ask(identity) {
            Asked::Answer(answer) => return answer,
            Asked::Wait(attempts) => attempts,
        };
        self.shared.wake.notify_one();
        let forgotten = || IdentityError::Forgotten(identity.clone());
        let ended = attempts.changed().await;
        let entries = self.shared.entries();
        if entries.stopped {
            return Err(IdentityError::Stopped(identity.clone()));
        }
        ended.map_err(|_| forgotten())?;
        let entry = entries.by_identity.get(identity).ok_or_else(forgotten)?;
        match (entry.valid(&self.shared.clock), &entry.failure) {
            (Some(certificate), _) => Ok(certificate),
            (None, Some(failure)) => Err(failure.clone()),
            (None, None) => Err(entry.expired(identity)),
        }
    }

    /// The certificate of `identity` if there is one that is valid.
    pub fn get_cached(&self, identity: &Identity) -> Option<Arc<WorkloadCertificate>> {
        self.shared.entries().by_identity.get(identity)?.valid(&self.shared.clock)
    }

    /// Has `identity` fetched before anybody waits for it, and kept fresh from then on.
    pub fn prefetch(&self, identity: Identity) {
        self.shared.entries().want(identity, Urgency::Prefetch);
        self.shared.wake.notify_one();
    }

    /// Drops the certificates and keys of a service account that no workload here has any more, of whatever trust domain:
    /// what was fetched ahead may have been for another than the control plane came to name.
    pub fn forget_account(&self, namespace: &str, service_account: &str) {
        let is_theirs = |id: &Identity| &**id.namespace() == namespace && &**id.service_account() == service_account;
        self.shared.entries().by_identity.retain(|identity, _| !is_theirs(identity));
    }

    /// Drops all certificates and keys. Open connections keep what they were made with.
    pub fn forget_all(&self) {
        self.shared.entries().by_identity.clear();
    }

    pub fn snapshot(&self) -> Vec<CertificateStatus> {
        let entries = self.shared.entries();
        entries
            .by_identity
            .iter()
            .map(|(identity, entry)| {
                let valid = entry.valid(&self.shared.clock);
                let state = match (&valid, &entry.failure) {
                    (Some(_), _) => "Available".to_owned(),
                    (None, Some(failure)) => format!("Unavailable: {failure}"),
                    (None, None) => "Initializing".to_owned(),
                };
                let certificate = valid.map(|certificate| certificate.describe());
                CertificateStatus { identity: identity.clone(), state, certificate }
            })
            .collect()
    }
}

enum Asked {
    Answer(Result<Arc<WorkloadCertificate>, IdentityError>),
    Wait(watch::Receiver<u64>),
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, identity: &Identity) -> Asked {
        let mut entries = self.entries();
        if entries.stopped {
            return Asked::Answer(Err(IdentityError::Stopped(identity.clone())));
        }
        // Looked up first, so that the common case clones nothing but the answer.
        if let Some(certificate) = entries.by_identity.get(identity).and_then(|entry| entry.valid(&self.clock)) {
            return Asked::Answer(Ok(certificate));
        }
        let entry = entries.want(identity.clone(), Urgency::Connection);
        if !entry.fetching {
            let now = Instant::now();
            match (&entry.failure, entry.finished) {
                (Some(failure), Some(finished)) if now < finished + MIN_PAUSE => {
                    return Asked::Answer(Err(failure.clone()));
                }
                _ => entry.due = now,
            }
        }
        Asked::Wait(entry.attempts.subscribe())
    }

    /// Marks the most urgent identity that is due as being fetched.
    fn start(&self) -> Option<Identity> {
        let (now, wall) = (Instant::now(), self.clock.now());
        let mut entries = self.entries();
        let (identity, entry) = entries
            .by_identity
            .iter_mut()
            .filter(|(_, entry)| !entry.fetching && (entry.due <= now || entry.overdue(wall)))
            .min_by_key(|(_, entry)| (entry.urgency, entry.due))?;
        entry.fetching = true;
        Some(identity.clone())
    }

    fn finish(&self, identity: &Identity, outcome: Result<Arc<WorkloadCertificate>, IdentityError>) {
        let (now, wall) = (Instant::now(), self.clock.now());
        let mut entries = self.entries();
        let Some(entry) = entries.by_identity.get_mut(identity) else { return };
        entry.fetching = false;
        entry.finished = Some(now);
        entry.urgency = Urgency::Prefetch;
        match outcome {
            Ok(certificate) => {
                tracing::debug!(%identity, serial = certificate.serial(), "certificate fetched");
                let half = certificate.not_after().duration_since(wall).unwrap_or_default() / 2;
                (entry.fetched, entry.renew) = (wall, wall + half);
                entry.due = now + half.max(MIN_PAUSE);
                entry.certificate = Some(certificate);
                entry.failure = None;
                entry.failures = 0;
            }
            Err(error) => {
                let mut pause = pause(entry.first_pause, entry.failures);
                if let Some(certificate) = entry.valid(&self.clock) {
                    let left = certificate.not_after().duration_since(wall).unwrap_or_default();
                    pause = pause.min(left);
                }
                tracing::warn!(%identity, %error, retry_in = ?pause, "certificate could not be fetched");
                entry.due = now + pause;
                entry.failures += 1;
                entry.failure = Some(error);
            }
        }
        entry.attempts.send_modify(|attempts| *attempts += 1);
    }

    /// When to look again.
    fn next_due(&self) -> Instant {
        let latest = Instant::now() + MAX_SLEEP;
        let entries = self.entries();
        entries.by_identity.values().filter(|e| !e.fetching).map(|e| e.due).min().map_or(latest, |due| due.min(latest))
    }
}

/// Doubles with each failure, with jitter so that a node's identities do not ask in step.
fn pause(first: f64, failures: u32) -> Duration {
    let grown = first * 2f64.powi(failures.min(16) as i32);
    Duration::from_secs_f64((grown * rand::rng().random_range(JITTER)).min(MAX_PAUSE))
}

impl Entries {
    fn want(&mut self, identity: Identity, urgency: Urgency) -> &mut Entry {
        let entry = self.by_identity.entry(identity).or_insert_with(|| Entry {
            certificate: None,
            fetched: SystemTime::UNIX_EPOCH,
            renew: SystemTime::UNIX_EPOCH,
            failure: None,
            failures: 0,
            first_pause: rand::rng().random_range(FIRST_PAUSE),
            urgency,
            due: Instant::now(),
            fetching: false,
            finished: None,
            attempts: watch::Sender::new(0),
        });
        entry.urgency = entry.urgency.min(urgency);
        entry
    }
}

impl Entry {
    fn valid(&self, clock: &Clock) -> Option<Arc<WorkloadCertificate>> {
        self.certificate.as_ref().filter(|certificate| !certificate.is_expired(clock.now())).cloned()
    }

    /// The wall clock has passed the half-life although the timer has not, or has gone back to when the certificate was
    /// not valid yet: its peers, whose clocks went back too, would refuse it.
    fn overdue(&self, wall: SystemTime) -> bool {
        let rested = self.finished.is_none_or(|finished| finished.elapsed() >= MIN_PAUSE);
        let jumped = self.renew <= wall || wall + BACK < self.fetched;
        self.failures == 0 && rested && self.certificate.is_some() && jumped
    }

    fn expired(&self, identity: &Identity) -> IdentityError {
        match &self.certificate {
            Some(certificate) => IdentityError::Expired { identity: identity.clone(), at: certificate.not_after() },
            None => IdentityError::Stopped(identity.clone()),
        }
    }
}

impl Rotation {
    /// Fetches what is wanted and renews what is held, until the drain cuts: connections that are finishing may still
    /// need a certificate.
    pub async fn run(self, drain: DrainWatcher) {
        let mut fetches = JoinSet::new();
        let mut running: HashMap<tokio::task::Id, Identity> = HashMap::new();
        loop {
            while fetches.len() < CONCURRENT {
                let Some(identity) = self.shared.start() else { break };
                let source = self.source.clone();
                let task = fetches.spawn({
                    let identity = identity.clone();
                    async move { source.fetch(&identity).await }
                });
                running.insert(task.id(), identity);
            }
            let due = self.shared.next_due();
            let full = fetches.len() >= CONCURRENT;
            // Nothing is lost by the branch not taken: `wake` keeps its permit, and fetches stay in their set.
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep_until(due), if !full => {}
                Some(done) = fetches.join_next_with_id() => {
                    let (id, outcome) = match done {
                        Ok((id, outcome)) => (id, Some(outcome)),
                        Err(error) => (error.id(), None),
                    };
                    if let Some(identity) = running.remove(&id) {
                        let outcome = outcome.unwrap_or_else(|| {
                            let reason = "the fetch was aborted".to_owned();
                            Err(IdentityError::Unreachable { identity: identity.clone(), reason })
                        });
                        self.shared.finish(&identity, outcome);
                    }
                }
                () = drain.cut() => return,
            }
        }
    }
}

impl Drop for Rotation {
    fn drop(&mut self) {
        // Whoever waits for an attempt learns that there will be none.
        let mut entries = self.shared.entries();
        entries.stopped = true;
        for entry in entries.by_identity.values_mut() {
            entry.attempts = watch::Sender::new(0);
        }
    }
}

#[cfg(test)]
mod tests;
