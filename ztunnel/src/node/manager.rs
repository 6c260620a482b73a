//! The task that enrols pods, keeps them enrolled and lets them go. See the module above for the order of steps.

mod obey;
mod release;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ebpf_loader::{Capture, NetnsCookie};
use futures_util::stream::{self, StreamExt};
use mesh::drain::DrainWatcher;
use mesh::identity::{Identity, IdentityParseError};
use mesh::model::TunnelProtocol;
use mesh_memory::Heap;
use mesh_proto::enrolment::{PodState, pod_state::State as WireState};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::task::TaskTracker;

use super::enrolment::{Desired, Enrolment};
use super::find::{Finder, Found, Process};
use super::host::Host;
use super::keep::{Keeper, Keeping};
use super::netns::{Callers, Family, Netns};
use super::orders::Order;
use super::pod::LocalPod;
use super::tenure::Tenure;
use super::{EnrolError, Registry, marked, routing};
use crate::capture::{Phase, Reach, Slot, captures_dns, pod_capture};
use crate::dns::{self, DnsState};
use crate::worker::{Role, Shared, Workers};
use obey::Handed;

/// First pause before a pod's namespace is looked for again; doubles up to [`LONGEST_RETRY`].
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// How many pods are enrolled at the same time: enough that none waits for another's netlink answers.
const ENROL_AT_ONCE: usize = 16;
/// How often rules, routes and processes of enrolled pods are looked after.
const UPKEEP: Duration = Duration::from_secs(5);
/// How long pods of a predecessor keep their capture while their namespaces are still being looked for.
const TAKEOVER: Duration = Duration::from_secs(60);
/// How soon it is looked again whether what a predecessor captured is wanted.
const COLLECT_AGAIN: Duration = Duration::from_secs(5);
/// How long a pod that left still answers HBONE: peers may not have heard yet.
const HBONE_ONLY: Duration = Duration::from_secs(5);
/// How often a pod that left is looked at for being gone altogether.
const GONE_CHECK: Duration = Duration::from_secs(2);
/// How long a pod that a predecessor serves stays with it while we wait for the pod's certificate.
const CERTIFICATE_WAIT: Duration = Duration::from_secs(5);
/// Connections of a pod that left end when they end; a number is needed only because timers want one.
const AS_LONG_AS_IT_TAKES: Duration = Duration::from_secs(365 * 24 * 3600);

/// One pod that shall be in the mesh.
struct Entry {
    wanted: Enrolment,
    state: State,
    /// The control plane has named it: from then on it ends when it is named no longer.
    named: bool,
    handed: Option<Handed>,
}

impl Entry {
    /// Enrolled, but the control plane has not told the mesh yet.
    fn is_partly_captured(&self) -> bool {
        matches!(&self.state, State::Up(up) if up.reach == Reach::NotPlaintext)
    }
}

enum State {
    Waiting(EnrolError),
    Up(Up),
}

/// An enrolled pod and what keeps it so.
struct Up {
    pod: Arc<LocalPod>,
    known: Known,
    reach: Reach,
    keeping: Keeping,
}

/// How the namespace is known to be the pod's.
enum Known {
    /// It was handed over, and no process was seen in it yet.
    HandedOver,
    /// This process of the pod is in it; when it ends, another is looked for.
    Process(Process),
}

impl Known {
    fn is_certain(&self) -> bool {
        matches!(self, Self::Process(process) if process.is_alive())
    }
}

/// What the manager needs from the rest.
pub struct Deps {
    pub shared: Shared,
    pub capture: Arc<Capture>,
    pub host: Host,
    pub finder: Finder,
    pub workers: Arc<Workers>,
    pub registry: Arc<Registry>,
    pub desired: watch::Receiver<Desired>,
    pub orders: mpsc::Receiver<Order>,
    pub tenure: Arc<Tenure>,
}

impl Deps {
    /// Opens a pod's listeners of one family, gives them to the workers, and only then to the kernel: no connection
    /// must wait at a listener from which nobody accepts.
    async fn listen(&self, dns: &TaskTracker, pod: &Arc<LocalPod>, family: Family) -> Result<(), EnrolError> {
        let workers = self.workers.count();
        let mut own_addresses: Vec<SocketAddr> = Vec::new();
        let mut leaders: Vec<(Slot, OwnedFd)> = Vec::new();
        let mut shares: Vec<Vec<(Role, std::net::TcpListener)>> = (0..workers).map(|_| Vec::new()).collect();
        for (slot, role) in slots(family) {
            let whose = if role == Role::Outbound { Callers::Pod } else { Callers::Network };
            let group = pod.netns.listeners(family, workers, whose).map_err(EnrolError::Listeners)?;
            for (n, (listener, share)) in group.into_iter().zip(&mut shares).enumerate() {
                // The kernel spreads connections over the group; one member stands for all of it in the map.
                if n == 0 {
                    own_addresses.push(listener.local_addr().map_err(EnrolError::Listeners)?);
                    leaders.push((slot, listener.try_clone().map_err(EnrolError::Listeners)?.into()));
                }
                share.push((role, listener));
            }
        }
        // Also where DNS is not captured now: a pod may change its mind, and the slot costs two sockets.
        if self.shared.config.dns_capture {
            let socket = pod.netns.dns(family).map_err(EnrolError::Listeners)?;
            leaders.push((dns_slot(family), socket.queries.try_clone().map_err(EnrolError::Listeners)?.into()));
            dns.spawn(dns::serve::udp(self.shared.clone(), pod.clone(), socket));
        }
        pod.add_listeners(&own_addresses);
        self.workers.assign(pod, shares).await;
        for (slot, leader) in leaders {
            self.capture.set_listener(pod.cookie, slot, leader.as_fd())?;
            pod.kept.add_listener(slot, leader);
        }
        Ok(())
    }
}

/// Owns every pod of the node.
pub struct Manager {
    deps: Deps,
    keeper: Arc<Keeper>,
    entries: BTreeMap<String, Entry>,
    leaving: JoinSet<Arc<LocalPod>>,
    /// Each ends with its pod's drain.
    dns: TaskTracker,
    reports: watch::Sender<Vec<PodState>>,
    /// Becomes true when every pod of the first complete list has been tried once.
    settled: watch::Sender<bool>,
    retry: Duration,
    /// Namespaces a predecessor captured: they stay captured, whatever the control plane has not said yet.
    inherited: BTreeSet<NetnsCookie>,
    /// Until then pins of a predecessor are left alone; `None` once they were collected.
    collect_by: Option<Instant>,
    has_claimed: bool,
    /// What a predecessor captured and nobody wants, while connections are open in it.
    releasing: JoinSet<()>,
    /// Held for a walk over `/proc` on behalf of pods that leave: any number of them costs one at a time.
    walking: Arc<tokio::sync::Mutex<()>>,
}

impl Manager {
    /// The manager, the reports it publishes, and a sign that the first round is through.
    #[must_use]
    pub fn new(deps: Deps) -> (Self, watch::Receiver<Vec<PodState>>, watch::Receiver<bool>) {
        let (reports, reported) = watch::channel(Vec::new());
        let (settled, settled_seen) = watch::channel(false);
        let inherited = deps.capture.attached().unwrap_or_else(|error| {
            tracing::warn!(%error, "reading what a predecessor captured");
            Vec::new()
        });
        let keeper = Keeper::new(deps.capture.clone(), deps.shared.config.proc_root.clone(), deps.tenure.clone());
        let manager = Self {
            deps,
            keeper: Arc::new(keeper),
            entries: BTreeMap::new(),
            leaving: JoinSet::new(),
            dns: TaskTracker::new(),
            reports,
            settled,
            retry: FIRST_RETRY,
            inherited: inherited.into_iter().collect(),
            collect_by: Some(Instant::now() + TAKEOVER),
            has_claimed: false,
            releasing: JoinSet::new(),
            walking: Arc::default(),
        };
        (manager, reported, settled_seen)
    }

    /// Runs until the drain begins. Pods stay enrolled then: a successor takes them over, or they fail closed.
    pub async fn run(mut self, drain: DrainWatcher) {
        let mut world = self.deps.shared.store.watch();
        let mut looking = JoinSet::new();
        looking.spawn(self.keeper.clone().look(self.deps.registry.clone(), drain.clone()));
        let mut upkeep = tokio::time::interval(UPKEEP);
        upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        upkeep.reset();
        let mut heap = Heap::new();
        loop {
            let desired = self.deps.desired.borrow_and_update().clone();
            self.take(desired.pods).await;
            self.prepare_host(desired.complete).await;
            // A successor enrols what is new; two would take the listeners' places from each other.
            if !self.deps.tenure.is_lost() {
                self.enrol_waiting().await;
            }
            self.answer().await;
            self.promote();
            self.collect(desired.complete).await;
            self.publish();
            self.settled.send_if_modified(|settled| desired.complete && !std::mem::replace(settled, true));

            let waiting = self.entries.values().any(|e| matches!(e.state, State::Waiting(_)));
            let partly = self.entries.values().any(Entry::is_partly_captured);
            // Every branch only wakes the loop; what it saw is looked at again from the start.
            tokio::select! {
                changed = self.deps.desired.changed() => {
                    if changed.is_err() {
                        // Without its source the set cannot change any more; the pods stay.
                        drain.draining().await;
                        return self.detach_all();
                    }
                    self.retry = FIRST_RETRY;
                }
                Some(order) = self.deps.orders.recv() => self.obey(order).await,
                () = tokio::time::sleep(self.retry), if waiting => {
                    self.retry = (self.retry * 2).min(LONGEST_RETRY);
                }
                Ok(()) = world.changed(), if partly => {}
                _ = upkeep.tick() => {
                    heap.look();
                    self.look_after().await;
                }
                Some(_) = self.releasing.join_next() => {}
                Some(left) = self.leaving.join_next() => {
                    if let Ok(pod) = left {
                        self.deps.registry.remove(&pod);
                        self.forget_identity(&pod);
                    }
                }
                // Pods that are leaving go on until the process ends; aborting their tasks would cut connections.
                () = drain.draining() => return self.detach_all(),
            }
        }
    }

    fn detach_all(&mut self) {
        self.leaving.detach_all();
        self.releasing.detach_all();
    }

    /// Compares what is wanted with what is.
    async fn take(&mut self, wanted: BTreeMap<String, Enrolment>) {
        let stays = |uid: &String, entry: &Entry| wanted.contains_key(uid) || (entry.handed.is_some() && !entry.named);
        let gone: Vec<String> =
            self.entries.iter().filter(|(uid, entry)| !stays(uid, entry)).map(|(uid, _)| uid.clone()).collect();
        for uid in gone {
            if let Some(Entry { state: State::Up(up), .. }) = self.entries.remove(&uid) {
                self.leave(up).await;
            }
        }
        for (uid, wanted) in wanted {
            let Some(entry) = self.entries.get_mut(&uid) else {
                let state = State::Waiting(EnrolError::NoProcess);
                self.entries.insert(uid, Entry { wanted, state, named: true, handed: None });
                continue;
            };
            entry.named = true;
            self.want(&uid, wanted).await;
        }
    }

    /// Takes a new description of a known pod. Addresses that came with its namespace are those in it; the API may not have
    /// them yet, or still those of the pod's last namespace.
    async fn want(&mut self, uid: &str, mut wanted: Enrolment) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        if let Some(handed) = entry.handed.as_ref().filter(|handed| !handed.addresses.is_empty()) {
            wanted.addresses.clone_from(&handed.addresses);
        }
        if entry.wanted == wanted {
            return;
        }
        let only_epoch = Enrolment { epoch: wanted.epoch, ..entry.wanted.clone() } == wanted;
        entry.wanted = wanted;
        if only_epoch {
            return;
        }
        if let State::Up(up) = &entry.state
            && let Err(error) = update(&self.deps, &self.keeper, &self.dns, up, &entry.wanted).await
        {
            let (pod, namespace) = (&entry.wanted.name, &entry.wanted.namespace);
            tracing::warn!(%pod, %namespace, %error, "updating a pod's capture");
        }
    }

    /// The node has the addresses that probes come from while it has pods that are probed. Before the first complete
    /// list nothing is taken away: a predecessor's pods may still be wanted.
    async fn prepare_host(&mut self, complete: bool) {
        if self.entries.values().any(|entry| !entry.wanted.probe_ports.is_empty()) {
            self.deps.host.add_addresses(self.deps.shared.config.ipv6).await;
        } else if complete
            && self.leaving.is_empty()
            && let Err(error) = self.deps.host.remove_addresses().await
        {
            tracing::debug!(%error, "removing the addresses of probes");
        }
    }

    /// One walk over `/proc` for all pods whose namespace was not handed over, then those with one, several at a time.
    async fn enrol_waiting(&mut self) {
        let mut wanted = BTreeSet::new();
        let mut tasks = Vec::new();
        for (uid, entry) in &mut self.entries {
            if matches!(entry.state, State::Up(_)) {
                continue;
            }
            if entry.wanted.addresses.is_empty() {
                entry.state = State::Waiting(EnrolError::NoAddress);
            } else if let Some(handed) = &entry.handed {
                let netns = handed.netns.try_clone().map_err(EnrolError::Listeners);
                tasks.push((uid.clone(), entry.wanted.clone(), netns.map(|netns| (netns, Known::HandedOver))));
            } else {
                wanted.insert(uid.clone());
            }
        }
        let mut found = find(&self.deps.finder, &wanted).await;
        tasks.extend(wanted.into_iter().filter_map(|uid| {
            let enrolment = self.entries.get(&uid)?.wanted.clone();
            let found = found.remove(&uid).unwrap_or_default();
            let place = if self.deps.finder.is_own() { only(found) } else { choose(found, &enrolment) };
            Some((uid, enrolment, place.map(|Found { netns, process }| (netns, Known::Process(process)))))
        }));
        let this = &*self;
        let tried: Vec<_> = stream::iter(tasks)
            .map(|(uid, enrolment, place)| async move { (uid, this.try_enrol(&enrolment, place).await) })
            .buffer_unordered(ENROL_AT_ONCE)
            .collect()
            .await;
        for (uid, state) in tried {
            if let Some(entry) = self.entries.get_mut(&uid) {
                entry.state = state;
            }
        }
    }

    /// One attempt, told in the log.
    async fn try_enrol(&self, wanted: &Enrolment, place: Result<(Netns, Known), EnrolError>) -> State {
        let (pod, namespace) = (&wanted.name, &wanted.namespace);
        let enrolled = match place {
            Ok((netns, known)) => self.enrol(wanted, netns, known).await,
            Err(error) => Err(error),
        };
        match enrolled {
            Ok(up) => {
                let pid = match &up.known {
                    Known::Process(process) => Some(process.pid),
                    Known::HandedOver => None,
                };
                tracing::info!(%pod, %namespace, pid, reach = ?up.reach, "enrolled");
                State::Up(up)
            }
            Err(error) => {
                if error.state() == WireState::Failed {
                    tracing::warn!(%pod, %namespace, %error, "not enrolled");
                }
                State::Waiting(error)
            }
        }
    }

    async fn enrol(&self, wanted: &Enrolment, netns: Netns, known: Known) -> Result<Up, EnrolError> {
        let config = &self.deps.shared.config;
        let cookie = ebpf_loader::cookie_of(netns.file())?;
        // A predecessor of this pod that is still leaving must not take the steering away behind our back.
        for old in self.deps.registry.pods().iter().filter(|p| p.cookie == cookie) {
            old.superseded.store(true, Ordering::SeqCst);
        }
        let dns = captures_dns(wanted, config.dns_capture);
        // What is captured already, by a predecessor, stays so. Otherwise the rule for DNS comes last: sockets that were
        // marked in an earlier stay would have their queries sent to nobody until the steering takes them.
        let dns_first = dns && self.inherited.contains(&cookie);
        let pod = Arc::new(LocalPod::new(wanted, netns, cookie, DnsState::new(dns_first)));
        let reach = self.reach_of(&pod);
        let enrolled = async {
            self.deps.capture.attach_netns(pod.netns.file())?;
            for family in families(wanted, config.ipv6) {
                self.deps.listen(&self.dns, &pod, family).await?;
            }
            self.keeper.route(&pod).await?;
            let capture = pod_capture(wanted, reach, dns, &config.excluded_ports);
            self.deps.capture.enrol(cookie, &capture, Phase::Captured)?;
            if dns && !dns_first {
                pod.dns.set_captured(true);
                self.keeper.route(&pod).await?;
            }
            Ok(())
        };
        if self.inherited.contains(&cookie) {
            self.await_certificate(&pod).await;
        }
        if let Err(error) = enrolled.await {
            pod.drain(Duration::ZERO).await;
            if matches!(known, Known::HandedOver) {
                self.undo(&pod).await;
            }
            return Err(error);
        }
        self.deps.registry.insert(&pod);
        if let Ok(identity) = self.identity_of(&pod) {
            self.deps.shared.certs.prefetch(identity);
        }
        Ok(Up { keeping: self.keeper.keep(&pod), pod, known, reach })
    }

    /// A predecessor serves this pod and has its certificate; taking over without one would make connections wait, or
    /// fail where the authority does. Where it does not come, the predecessor may be dead: then waiting helps nobody.
    async fn await_certificate(&self, pod: &LocalPod) {
        let Ok(identity) = self.identity_of(pod) else { return };
        match tokio::time::timeout(CERTIFICATE_WAIT, self.deps.shared.certs.get(&identity)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%identity, %error, "taking over a pod without its certificate"),
            Err(_) => tracing::warn!(%identity, "taking over a pod whose certificate takes long"),
        }
    }

    /// Plaintext to the pod is captured once the control plane tells the mesh that this workload speaks HBONE; before
    /// that, peers would not know how to reach it under a policy that demands it. What the pod sends is captured from
    /// the first moment: nobody has to hear of that.
    fn reach_of(&self, pod: &LocalPod) -> Reach {
        let world = self.deps.shared.store.snapshot();
        let workload = world.workload(&pod.workload_uid).filter(|w| pod.is_described_by(w));
        let speaks = workload.is_some_and(|w| w.protocol == TunnelProtocol::Hbone);
        if speaks || self.inherited.contains(&pod.cookie) { Reach::Full } else { Reach::NotPlaintext }
    }

    fn promote(&mut self) {
        let ready: Vec<String> = self
            .entries
            .iter()
            .filter_map(|(uid, entry)| match &entry.state {
                State::Up(up) if up.reach == Reach::NotPlaintext => {
                    (self.reach_of(&up.pod) == Reach::Full).then(|| uid.clone())
                }
                State::Up(_) | State::Waiting(_) => None,
            })
            .collect();
        for uid in ready {
            let Some(Entry { wanted, state: State::Up(up), .. }) = self.entries.get_mut(&uid) else { continue };
            let ports = &self.deps.shared.config.excluded_ports;
            let capture = pod_capture(wanted, Reach::Full, up.pod.dns.is_captured(), ports);
            match self.deps.capture.enrol(up.pod.cookie, &capture, Phase::Captured) {
                Ok(()) => {
                    up.reach = Reach::Full;
                    tracing::info!(pod = %wanted.name, namespace = %wanted.namespace, "captured");
                }
                Err(error) => {
                    tracing::warn!(pod = %wanted.name, namespace = %wanted.namespace, %error, "capturing a pod");
                }
            }
        }
    }

    /// Follows a pod whose namespace was made anew, and clears away what dead namespaces left. What was changed inside
    /// one is the keeper's.
    async fn look_after(&mut self) {
        if self.deps.tenure.is_lost() {
            return;
        }
        self.deps.host.doubt();
        match self.deps.capture.collect_dead() {
            Ok(dead) if dead.is_empty() => {}
            Ok(dead) => tracing::debug!(count = dead.len(), "collected pins of namespaces that are gone"),
            Err(error) => tracing::warn!(%error, "collecting pins of namespaces that are gone"),
        }
        let mut lost = BTreeSet::new();
        let mut orphaned = BTreeSet::new();
        for (uid, entry) in &self.entries {
            let State::Up(up) = &entry.state else { continue };
            if !up.known.is_certain() {
                orphaned.insert(uid.clone());
            }
        }
        for (uid, found) in find(&self.deps.finder, &orphaned).await {
            let Some(entry) = self.entries.get_mut(&uid) else { continue };
            let State::Up(up) = &mut entry.state else { continue };
            let inode = up.pod.netns.inode();
            match found.into_iter().find(|f| f.netns.inode() == inode) {
                Some(same) => up.known = Known::Process(same.process),
                None => {
                    // The pod's processes are all elsewhere: whoever handed this one over did not say that it ended.
                    entry.handed = None;
                    lost.insert(uid);
                }
            }
        }
        for uid in lost {
            let Some(entry) = self.entries.get_mut(&uid) else { continue };
            let old = std::mem::replace(&mut entry.state, State::Waiting(EnrolError::NoProcess));
            let (pod, namespace) = (&entry.wanted.name, &entry.wanted.namespace);
            tracing::info!(%pod, %namespace, "the pod's namespace has changed; enrolling again");
            if let State::Up(up) = old {
                self.leave(up).await;
            }
        }
    }

    /// Takes a pod out of the mesh without touching its open connections.
    async fn leave(&mut self, up: Up) {
        let Up { pod, keeping, known, .. } = up;
        drop(keeping);
        // Should it join again, that is a beginning like any other.
        self.inherited.remove(&pod.cookie);
        tracing::info!(pod = %pod.name, namespace = %pod.namespace, open = pod.connections.len(), "leaving");
        // Resolvers may keep a socket, and its mark.
        if let Err(error) = routing::release_dns(&pod.netns).await {
            tracing::debug!(pod = %pod.name, namespace = %pod.namespace, %error, "releasing a pod's DNS");
        }
        pod.dns.set_captured(false);
        if let Err(error) = self.deps.capture.leave(pod.cookie) {
            tracing::warn!(pod = %pod.name, namespace = %pod.namespace, %error, "stopping a pod's capture");
        }
        let (capture, tenure) = (self.deps.capture.clone(), self.deps.tenure.clone());
        let (finder, walking) = (self.deps.finder.clone(), self.walking.clone());
        let keeper = self.keeper.clone();
        self.leaving.spawn(async move {
            let here = pod.clone();
            let gone = until_gone(&finder, &walking, known, &here);
            tokio::pin!(gone);
            // Such a future must not be asked again once it has answered.
            let mut is_gone = tokio::select! {
                () = tokio::time::sleep(HBONE_ONLY) => false,
                () = &mut gone => true,
            };
            // A successor may have enrolled it meanwhile, here or in another process; it also takes out what is left.
            if !pod.superseded.load(Ordering::SeqCst)
                && !tenure.is_lost()
                && let Err(error) = capture.detach(pod.cookie)
            {
                tracing::warn!(pod = %pod.name, namespace = %pod.namespace, %error, "detaching a pod");
            }
            // A pod that is gone has nobody left to talk to.
            let patience = if is_gone { Duration::ZERO } else { AS_LONG_AS_IT_TAKES };
            tokio::select! {
                () = pod.drain(patience) => {}
                () = &mut gone, if !is_gone => {
                    is_gone = true;
                    pod.cut();
                }
            }
            // Connections may be open that others serve: a predecessor that drains, or this process from a former stay.
            while !is_gone && marked::any_open(&pod.netns).unwrap_or(false) {
                tokio::select! {
                    () = tokio::time::sleep(GONE_CHECK) => {}
                    () = &mut gone => is_gone = true,
                }
            }
            let is_enrolled_anew =
                || pod.superseded.load(Ordering::SeqCst) || capture.is_attached(pod.cookie).unwrap_or(true);
            if !is_enrolled_anew()
                && let Err(error) = keeper.unroute(&pod).await
            {
                tracing::debug!(pod = %pod.name, namespace = %pod.namespace, %error, "removing a pod's routing");
            }
            pod
        });
    }

    /// Makes this ztunnel the node's, and takes back what a predecessor captured and nobody wants any more. A pod that
    /// is wanted and not found yet keeps the capture it has: it is refused, and must not go on in clear text.
    async fn collect(&mut self, complete: bool) {
        let Some(by) = self.collect_by.filter(|_| complete) else { return };
        let hopeful = |e: &Entry| matches!(&e.state, State::Waiting(w) if !matches!(w, EnrolError::NoAddress));
        // Once the node is claimed, a look is a walk over `/proc` that nobody waits for.
        if Instant::now() < by && (self.has_claimed || self.entries.values().any(hopeful)) {
            return;
        }
        if !std::mem::replace(&mut self.has_claimed, true)
            && let Err(error) = self.deps.tenure.claim()
        {
            tracing::warn!(%error, "claiming the node; a predecessor will accept for longer than it needs to");
        }
        self.collect_by = self.release_unwanted().await.then(|| Instant::now() + COLLECT_AGAIN);
    }

    fn publish(&self) {
        let mut states: BTreeMap<String, PodState> = self
            .deps
            .registry
            .pods()
            .iter()
            .map(|pod| (pod.uid.clone(), state(&pod.uid, 0, WireState::Leaving, String::new())))
            .collect();
        for (uid, entry) in &self.entries {
            let reported = match &entry.state {
                State::Up(_) => state(uid, entry.wanted.epoch, WireState::Enrolled, String::new()),
                State::Waiting(error) => state(uid, entry.wanted.epoch, error.state(), error.to_string()),
            };
            states.insert(uid.clone(), reported);
        }
        let up = self.entries.values().filter(|e| matches!(e.state, State::Up(_))).count();
        #[allow(clippy::cast_precision_loss, reason = "pods of a node are few")]
        {
            metrics::gauge!("workload_manager_active_proxy_count").set(up as f64);
            metrics::gauge!("workload_manager_pending_proxy_count").set((self.entries.len() - up) as f64);
        }
        let states: Vec<PodState> = states.into_values().collect();
        self.reports.send_if_modified(|last| {
            let changed = *last != states;
            *last = states;
            changed
        });
    }

    /// The identity the pod will need. A name that is none is told when a connection wants it.
    fn identity_of(&self, pod: &LocalPod) -> Result<Identity, IdentityParseError> {
        let world = self.deps.shared.store.snapshot();
        world.workload(&pod.workload_uid).filter(|w| pod.is_described_by(w)).map_or_else(
            || Identity::new(&self.deps.shared.config.trust_domain, &pod.namespace, &pod.service_account),
            |w| w.identity(),
        )
    }

    fn forget_identity(&self, pod: &LocalPod) {
        let still = self
            .deps
            .registry
            .pods()
            .iter()
            .any(|p| p.namespace == pod.namespace && p.service_account == pod.service_account);
        if !still {
            self.deps.shared.certs.forget_account(&pod.namespace, &pod.service_account);
        }
    }
}

fn state(uid: &str, epoch: u64, state: WireState, reason: String) -> PodState {
    PodState { uid: uid.to_owned(), state: state.into(), reason, epoch }
}

/// New addresses or options for a pod that is enrolled.
async fn update(
    deps: &Deps,
    keeper: &Keeper,
    dns_tasks: &TaskTracker,
    up: &Up,
    wanted: &Enrolment,
) -> Result<(), EnrolError> {
    if wanted.addresses.is_empty() {
        return Err(EnrolError::NoAddress);
    }
    let config = &deps.shared.config;
    for family in families(wanted, config.ipv6) {
        if !up.pod.listens(family) {
            deps.listen(dns_tasks, &up.pod, family).await?;
        }
    }
    up.pod.set_addresses(wanted.addresses.clone());
    let (dns, before) = (captures_dns(wanted, config.dns_capture), up.pod.dns.is_captured());
    // Sockets that were marked once keep their mark, and the rule leads them to the steering: it stands only while that
    // does, or their queries would come to nobody.
    up.pod.dns.set_captured(dns && before);
    keeper.route(&up.pod).await?;
    let capture = pod_capture(wanted, up.reach, dns, &config.excluded_ports);
    deps.capture.enrol(up.pod.cookie, &capture, Phase::Captured)?;
    if dns && !before {
        up.pod.dns.set_captured(true);
        keeper.route(&up.pod).await?;
    }
    Ok(())
}

/// The one namespace that is the pod's: it holds an address of the pod. A process of the pod's alone does not make it so: who starts
/// a container is in the pod's cgroup before it has entered the pod's namespace.
fn choose(mut found: Vec<Found>, wanted: &Enrolment) -> Result<Found, EnrolError> {
    let count = found.len();
    found.retain(|f| f.netns.holds_any(&wanted.addresses).unwrap_or(false));
    if found.is_empty() && count > 1 || found.len() > 1 {
        return Err(EnrolError::Ambiguous(count));
    }
    only(found)
}

fn only(mut found: Vec<Found>) -> Result<Found, EnrolError> {
    found.pop().ok_or(EnrolError::NoProcess)
}

fn families(wanted: &Enrolment, ipv6: bool) -> impl Iterator<Item = Family> {
    let has = |family| wanted.addresses.iter().any(|a| Family::of(*a) == family);
    let (v4, v6) = (has(Family::V4), has(Family::V6) && ipv6);
    v4.then_some(Family::V4).into_iter().chain(v6.then_some(Family::V6))
}

const fn slots(family: Family) -> [(Slot, Role); 3] {
    match family {
        Family::V4 => [(Slot::Hbone4, Role::Hbone), (Slot::Out4, Role::Outbound), (Slot::In4, Role::Passthrough)],
        Family::V6 => [(Slot::Hbone6, Role::Hbone), (Slot::Out6, Role::Outbound), (Slot::In6, Role::Passthrough)],
    }
}

const fn dns_slot(family: Family) -> Slot {
    match family {
        Family::V4 => Slot::Dns4,
        Family::V6 => Slot::Dns6,
    }
}

/// An error is told and finds nothing.
async fn find(finder: &Finder, wanted: &BTreeSet<String>) -> BTreeMap<String, Vec<Found>> {
    try_find(finder, wanted).await.unwrap_or_else(|error| {
        tracing::error!(%error, "listing processes; no pod can be found");
        BTreeMap::new()
    })
}

async fn try_find(finder: &Finder, wanted: &BTreeSet<String>) -> io::Result<BTreeMap<String, Vec<Found>>> {
    if wanted.is_empty() {
        return Ok(BTreeMap::new());
    }
    let (finder, wanted) = (finder.clone(), wanted.clone());
    tokio::task::spawn_blocking(move || finder.find(&wanted)).await.map_err(io::Error::other)?
}

/// Resolves when no process of the pod is left in its namespace: the pod was deleted, not just taken out of the mesh.
/// As long as the process lives that is `known`, nobody walks over `/proc`.
async fn until_gone(finder: &Finder, walking: &tokio::sync::Mutex<()>, mut known: Known, pod: &LocalPod) {
    let wanted = BTreeSet::from([pod.uid.clone()]);
    loop {
        if !known.is_certain() {
            let _alone = walking.lock().await;
            // Nothing is known when it fails.
            if let Ok(found) = try_find(finder, &wanted).await {
                match found.into_values().flatten().find(|f| f.netns.inode() == pod.netns.inode()) {
                    Some(same) => known = Known::Process(same.process),
                    None => return,
                }
            }
        }
        tokio::time::sleep(GONE_CHECK).await;
    }
}
