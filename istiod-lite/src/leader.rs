//! Which of several replicas writes: the one that holds a Lease, by the rules and with the times of Kubernetes' own
//! controllers. All replicas serve; the leader alone writes what follows from the world, which is the same for all.
//!
//! There are two [`Office`]s. Of the replicas of a **revision** one deploys its Gateways and says what became of them. Of those
//! who lead a revision one leads the **mesh**, and writes what there is once: that of the default revision, and another only
//! while there is none.
//!
//! ```text
//!             nobody's, or not renewed for its time             renewed every other second
//!  following ─────────────────────────────────────────► leading ───────────┐
//!      ▲                                                  │  ▲─────────────┘
//!      └───── not renewed for 10 s, or another's ◄────────┤
//!                                                         └── drained, or gives way: stops writing, then empties the Lease
//! ```
//!
//! Invariant: who leads has stopped writing before another takes over. A follower takes over when the Lease has not
//! changed for its whole time by the follower's clock, from when it saw the change; the leader stops a third of that time
//! earlier, by its own clock, from before it asked for the change. No two clocks are compared, and what stands in the
//! Lease as a time is for people to read.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use mesh::drain::DrainWatcher;
use rand::Rng as _;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::revision::Revision;

/// In the mesh's root namespace, but for the revision: who leads that. Not Istio's name: where both run side by side each has a
/// leader.
pub const LEASE: &str = "istiod-lite-leader";
/// As [`LEASE`]: who leads the mesh.
pub const MESH_LEASE: &str = "istiod-lite-mesh-leader";
/// How long the Lease is its holder's without being renewed.
const LEASE_TIME: Duration = Duration::from_secs(15);
/// A leader that could not renew it for this long stops.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between attempts, of followers and of the leader.
const RETRY: Duration = Duration::from_secs(2);
/// For the last write of a process that ends.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);

/// A name that no other process has: the host's, and something random.
pub fn anonymous() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{}", host.trim(), uuid::Uuid::new_v4())
}

/// What there is to be elected for.
#[derive(Debug, Clone)]
pub struct Office {
    lease: String,
    /// Who does not lead here does not stand.
    entitled: Option<watch::Receiver<bool>>,
    /// The Lease of somebody who has precedence.
    senior: Option<String>,
}

impl Office {
    /// The lead of a revision.
    pub fn of_revision(revision: &Revision) -> Self {
        Self { lease: revision.named(LEASE), entitled: None, senior: None }
    }

    /// The lead of the mesh, for who is `leading` this revision.
    pub fn of_mesh(revision: &Revision, leading: watch::Receiver<bool>) -> Self {
        let senior = (!revision.is_default()).then(|| Revision::default().named(LEASE));
        Self { lease: MESH_LEASE.to_owned(), entitled: Some(leading), senior }
    }
}

/// What can be told of somebody who has precedence by a Lease of theirs.
#[derive(Debug)]
struct Senior {
    seen: Option<Option<LeaseSpec>>,
    /// Since when nothing has been heard of them.
    since: Instant,
}

impl Senior {
    fn new(now: Instant) -> Self {
        Self { seen: None, since: now }
    }

    /// The API has this of them now, or nothing. True: they have renewed it since the last look.
    fn look(&mut self, lease: Option<Lease>, now: Instant) -> bool {
        let is_held = lease.as_ref().is_some_and(|lease| holder(lease).is_some());
        let spec = lease.and_then(|lease| lease.spec);
        // What there is at the first look may be what somebody has left behind.
        let has_changed = self.seen.as_ref().is_some_and(|seen| *seen != spec);
        if has_changed || self.seen.is_none() {
            self.since = now;
        }
        self.seen = Some(spec);
        has_changed && is_held
    }

    /// Nobody has it, and who gave it back has not come again.
    fn is_silent(&self, now: Instant) -> bool {
        self.seen.is_some() && now >= self.since + LEASE_TIME
    }
}

/// The Lease as one candidate sees it. No clock and no API: times are arguments, requests are answers.
#[derive(Debug)]
struct Candidate {
    lease: String,
    identity: String,
    seen: Option<Seen>,
    /// Another had it when it was deleted, and may not have noticed before then.
    elsewhere_until: Option<Instant>,
}

#[derive(Debug)]
struct Seen {
    lease: Lease,
    /// When it was seen to say this, by our clock.
    since: Instant,
}

/// What to do about the Lease.
#[derive(Debug, PartialEq)]
enum Move {
    /// It is another's.
    Wait,
    Create(Lease),
    /// If it still is the version that was seen.
    Replace(Lease),
}

impl Candidate {
    fn new(lease: String, identity: String) -> Self {
        Self { lease, identity, seen: None, elsewhere_until: None }
    }

    /// The API has this now, or nothing.
    fn observe(&mut self, lease: Option<Lease>, now: Instant) {
        let before = self.seen.take();
        self.elsewhere_until = match (&lease, &before) {
            (Some(_), _) => None,
            (None, Some(Seen { lease, .. })) if holder(lease).is_some_and(|holder| holder != self.identity) => {
                Some(now + time_of(&lease.spec.clone().unwrap_or_default()))
            }
            (None, _) => self.elsewhere_until,
        };
        self.seen = lease.map(|lease| {
            let same = before.filter(|before| before.lease.spec == lease.spec);
            Seen { since: same.map_or(now, |before| before.since), lease }
        });
    }

    /// What was seen is not what there is.
    fn forget(&mut self) {
        self.seen = None;
    }

    /// As far as is known.
    fn is_holder(&self) -> bool {
        self.seen.as_ref().and_then(|seen| holder(&seen.lease)) == Some(&*self.identity)
    }

    fn next(&self, now: Instant, clock: MicroTime) -> Move {
        let Some(Seen { lease, since }) = &self.seen else {
            if self.elsewhere_until.is_some_and(|until| now < until) {
                return Move::Wait;
            }
            return Move::Create(self.ours(ObjectMeta::default(), clock.clone(), clock, 0));
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or_default();
        let acquired = if self.is_holder() {
            spec.acquire_time.unwrap_or_else(|| clock.clone())
        } else {
            let is_over = || now >= *since + time_of(&spec);
            if holder(lease).is_some() && !is_over() {
                return Move::Wait;
            }
            clock.clone()
        };
        let transitions = if self.is_holder() { transitions } else { transitions.saturating_add(1) };
        Move::Replace(self.ours(lease.metadata.clone(), acquired, clock, transitions))
    }

    /// What to leave behind: nobody's, for the next to take at once.
    fn released(&self, clock: MicroTime) -> Option<Lease> {
        let seen = self.seen.as_ref().filter(|_| self.is_holder())?;
        let mut lease = seen.lease.clone();
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = None;
        spec.lease_duration_seconds = Some(1);
        (spec.acquire_time, spec.renew_time) = (Some(clock.clone()), Some(clock));
        Some(lease)
    }

    fn ours(&self, mut meta: ObjectMeta, acquired: MicroTime, renewed: MicroTime, transitions: i32) -> Lease {
        meta.name = Some(self.lease.clone());
        let spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE_TIME.as_secs()).ok(),
            acquire_time: Some(acquired),
            renew_time: Some(renewed),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        Lease { metadata: meta, spec: Some(spec) }
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
}

/// For how long it is its holder's; ours where it does not say.
fn time_of(spec: &LeaseSpec) -> Duration {
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    seconds.filter(|seconds| *seconds > 0).map_or(LEASE_TIME, Duration::from_secs)
}

fn wall_clock() -> MicroTime {
    MicroTime(Timestamp::from_nanosecond(OffsetDateTime::now_utc().unix_timestamp_nanos()).unwrap_or_default())
}

/// One replica's part in the election.
pub struct Election {
    leases: Api<Lease>,
    office: Office,
    candidate: Candidate,
    senior: Senior,
    leading: watch::Sender<bool>,
}

/// Resolves when it becomes ours to have.
async fn newly_entitled(entitled: &mut Option<watch::Receiver<bool>>) {
    if let Some(entitled) = entitled {
        let is_already = *entitled.borrow();
        if !is_already && entitled.wait_for(|leads| *leads).await.is_ok() {
            return;
        }
    }
    // It is already, or what would entitle us has ended.
    std::future::pending().await
}

/// Resolves when it is not ours to have any more.
async fn unseated(entitled: &mut Option<watch::Receiver<bool>>) {
    match entitled {
        // An error: what entitled us has ended.
        Some(entitled) => _ = entitled.wait_for(|leads| !*leads).await,
        None => std::future::pending().await,
    }
}

/// How a term of office ended.
enum Ended {
    Lost,
    /// Somebody who has precedence is there, or it is not ours to have any more.
    GivesWay,
    /// Drained, or nothing is left to do.
    Over,
}

impl Election {
    /// `identity` must be no other living process'.
    pub fn new(client: &kube::Client, namespace: &str, office: Office, identity: String) -> Self {
        let leases = Api::namespaced(client.clone(), namespace);
        let candidate = Candidate::new(office.lease.clone(), identity);
        Self { leases, office, candidate, senior: Senior::new(Instant::now()), leading: watch::Sender::new(false) }
    }

    /// Whether this replica leads.
    pub fn leading(&self) -> watch::Receiver<bool> {
        self.leading.subscribe()
    }

    /// Has `work` done whenever this replica leads, until drained: begun anew each time, dropped when it leads no longer.
    /// At the end the Lease is given back.
    pub async fn run<F: Future<Output = ()>>(mut self, work: impl Fn() -> F, drain: DrainWatcher) {
        self.lead(false);
        loop {
            let won = tokio::select! {
                won = self.win() => won,
                () = drain.draining() => return self.release().await,
            };
            self.lead(true);
            // The order matters to a process that was stopped for a while: it sees that its time is over before it writes
            // again. The work is dropped with the statement, before the Lease is given back.
            let ended = tokio::select! {
                biased;
                () = drain.draining() => Ended::Over,
                ended = self.keep(won) => ended,
                () = work() => Ended::Over,
            };
            self.lead(false);
            match ended {
                Ended::Lost => {}
                Ended::GivesWay => self.release().await,
                Ended::Over => return self.release().await,
            }
        }
    }

    fn lead(&mut self, leads: bool) {
        metrics::gauge!("leader_election_master_status", "name" => self.office.lease.clone()).set(if leads {
            1.0
        } else {
            0.0
        });
        if self.leading.send_replace(leads) != leads {
            let (identity, lease) = (&self.candidate.identity, &self.office.lease);
            match leads {
                true => tracing::info!(identity, lease, "leading: this replica writes statuses and objects"),
                false => tracing::info!(identity, lease, "not leading any more"),
            }
        }
    }

    /// Tries until it has the Lease. Returns since when that is certain.
    async fn win(&mut self) -> Instant {
        loop {
            let lease = self.office.lease.clone();
            let started = Instant::now();
            match tokio::time::timeout(RENEW_DEADLINE, self.stand()).await {
                Ok(Ok(true)) => return started,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(%error, "Lease {lease}"),
                Err(_) => tracing::warn!("Lease {lease}: no answer within {} s", RENEW_DEADLINE.as_secs()),
            }
            // Candidates that began together need not ask together for ever.
            let wait = RETRY.mul_f64(rand::rng().random_range(1.0..1.2));
            // Nothing is lost by the branch not taken: whether we are entitled is asked again.
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = newly_entitled(&mut self.office.entitled) => {}
            }
        }
    }

    /// Renews the Lease, which was had at `renewed`; returns when it is not certain any more.
    async fn keep(&mut self, mut renewed: Instant) -> Ended {
        let lease = self.office.lease.clone();
        while Instant::now() < renewed + RENEW_DEADLINE {
            let end = renewed + RENEW_DEADLINE;
            // Nothing is lost by the branch not taken: the wait begins anew, or is not needed any more.
            tokio::select! {
                () = tokio::time::sleep_until((Instant::now() + RETRY).min(end)) => {}
                () = unseated(&mut self.office.entitled) => return Ended::GivesWay,
            }
            // Who cannot be looked at may be there or not; we are.
            if let Ok(Ok(true)) = tokio::time::timeout_at(end, self.look_at_senior()).await {
                tracing::info!("Lease {lease} is left to the default revision");
                return Ended::GivesWay;
            }
            let started = Instant::now();
            match tokio::time::timeout_at(end, self.attempt()).await {
                Ok(Ok(true)) => renewed = started,
                Ok(Ok(false)) => {
                    tracing::warn!("Lease {lease} is another's");
                    return Ended::Lost;
                }
                Ok(Err(error)) => tracing::warn!(%error, "Lease {lease} not renewed"),
                Err(_) => {}
            }
        }
        tracing::warn!("Lease {lease} not renewed for {} s", RENEW_DEADLINE.as_secs());
        Ended::Lost
    }

    /// Whether somebody who has precedence has shown up since the last look.
    async fn look_at_senior(&mut self) -> Result<bool, kube::Error> {
        let Some(name) = &self.office.senior else { return Ok(false) };
        let lease = self.leases.get_opt(name).await?;
        Ok(self.senior.look(lease, Instant::now()))
    }

    /// As [`Self::attempt`], where it is ours to try. Else only looks, as how long it is another's is counted from then.
    async fn stand(&mut self) -> Result<bool, kube::Error> {
        self.look_at_senior().await?;
        let is_entitled = self.office.entitled.as_ref().is_none_or(|entitled| *entitled.borrow());
        if is_entitled && (self.office.senior.is_none() || self.senior.is_silent(Instant::now())) {
            return self.attempt().await;
        }
        let lease = self.leases.get_opt(&self.office.lease).await?;
        self.candidate.observe(lease, Instant::now());
        Ok(false)
    }

    /// Whether the Lease is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        // The second time with what somebody else has written meanwhile, or we, without having heard the answer.
        for _ in 0..2 {
            // Who holds it knows what it says.
            if !self.candidate.is_holder() {
                let lease = self.leases.get_opt(&self.office.lease).await?;
                self.candidate.observe(lease, Instant::now());
            }
            let params = PostParams::default();
            let written = match self.candidate.next(Instant::now(), wall_clock()) {
                Move::Wait => return Ok(false),
                Move::Create(lease) => self.leases.create(&params, &lease).await,
                Move::Replace(lease) => self.leases.replace(&self.office.lease, &params, &lease).await,
            };
            match written {
                Ok(lease) => {
                    self.candidate.observe(Some(lease), Instant::now());
                    return Ok(true);
                }
                Err(kube::Error::Api(status)) if status.code == 409 || self.has_gone(status.code) => {
                    self.candidate.forget();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// A Lease that we have held was deleted; a creation that is answered like this lacks the namespace.
    fn has_gone(&self, code: u16) -> bool {
        code == 404 && self.candidate.is_holder()
    }

    async fn release(&mut self) {
        let lease = self.office.lease.clone();
        match tokio::time::timeout(RELEASE_DEADLINE, self.give_back()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "Lease {lease} not given back: others wait until it has run out"),
            Err(_) => tracing::warn!("Lease {lease} not given back: no answer"),
        }
        self.candidate.forget();
    }

    async fn give_back(&mut self) -> Result<(), kube::Error> {
        // The second time if a renewal was under way: it may have been written.
        for _ in 0..2 {
            let Some(lease) = self.candidate.released(wall_clock()) else { return Ok(()) };
            match self.leases.replace(&self.office.lease, &PostParams::default(), &lease).await {
                Ok(_) => {
                    tracing::info!("Lease {} given back", self.office.lease);
                    return Ok(());
                }
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    let lease = self.leases.get_opt(&self.office.lease).await?;
                    self.candidate.observe(lease, Instant::now());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
