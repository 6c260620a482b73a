//! A pod in the mesh, as the data path sees it: its namespace, its addresses, its open connections.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use ebpf_loader::NetnsCookie;
use mesh::drain::{DrainTrigger, DrainWatcher};
use mesh::identity::Standing;
use mesh::model::Workload;
use mesh::policy::{Connection, still_allows};
use mesh::store::Snapshot;
use serde::Serialize;
use tokio::sync::Notify;

use super::backend::{Backend, redirect};
use super::enrolment::Enrolment;
use super::keep::Kept;
use super::netns::{Family, Netns};
use crate::dns::DnsState;

/// One enrolled pod. Shared by the workers; lives until its last connection has ended.
pub struct LocalPod {
    pub uid: String,
    pub workload_uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub netns: Netns,
    pub backend: Backend,
    pub cookie: NetnsCookie,
    pub connections: Connections,
    pub dns: DnsState,
    pub drain: DrainWatcher,
    /// The same namespace was enrolled again while this one was leaving: the steering belongs to the other now.
    pub superseded: AtomicBool,
    pub kept: Kept,
    /// Connections and tunnels that are being opened: what still needs sockets made.
    opening: AtomicUsize,
    /// No sockets can be made any more; tunnels that are asked for now are sent away.
    closed_door: AtomicBool,
    addresses: ArcSwap<Vec<IpAddr>>,
    /// Addresses of our own listeners; whoever dials those talks to nobody.
    listeners: ArcSwap<Vec<SocketAddr>>,
    trigger: Mutex<Option<DrainTrigger>>,
}

impl LocalPod {
    #[must_use]
    pub fn new(enrolment: &Enrolment, netns: Netns, cookie: NetnsCookie, dns: DnsState) -> Self {
        let (trigger, drain) = mesh::drain::channel();
        Self {
            uid: enrolment.uid.clone(),
            workload_uid: enrolment.workload_uid.clone(),
            name: enrolment.name.clone(),
            namespace: enrolment.namespace.clone(),
            service_account: enrolment.service_account.clone(),
            netns,
            backend: Backend::Ebpf,
            cookie,
            connections: Connections::default(),
            dns,
            drain,
            superseded: AtomicBool::new(false),
            kept: Kept::default(),
            opening: AtomicUsize::new(0),
            closed_door: AtomicBool::new(false),
            addresses: ArcSwap::from_pointee(enrolment.addresses.clone()),
            listeners: ArcSwap::default(),
            trigger: Mutex::new(Some(trigger)),
        }
    }

    /// The same pod with connections that come by redirection. Its addresses are those of its workload, which may be
    /// known late.
    #[must_use]
    pub fn redirected(mut self) -> Self {
        self.backend = Backend::Redirect;
        self
    }

    /// Takes the addresses the control plane gives for the pod, where nobody else tells them.
    pub fn learn_addresses(&self, known: &[IpAddr]) {
        if self.backend == Backend::Redirect && **self.addresses.load() != *known {
            self.set_addresses(known.to_vec());
        }
    }

    #[must_use]
    pub fn addresses(&self) -> Arc<Vec<IpAddr>> {
        self.addresses.load_full()
    }

    pub fn set_addresses(&self, addresses: Vec<IpAddr>) {
        self.addresses.store(Arc::new(addresses));
    }

    /// The pod's address of the same family as `like`.
    #[must_use]
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.load().iter().find(|a| a.is_ipv4() == like.is_ipv4()).copied()
    }

    /// Is this workload the pod, and not another one of its name? Both kinds of resource are told by name, and a name is
    /// used again; an address may be as well, but not both at the same time by the same account. (A pod of a CNI agent
    /// has the addresses that its workload says.)
    #[must_use]
    pub fn is_described_by(&self, workload: &Workload) -> bool {
        self.namespace == workload.namespace
            && self.service_account == workload.service_account
            && (matches!(self.backend, Backend::Redirect)
                || self.addresses.load().iter().any(|own| workload.addresses.contains(own)))
    }

    /// Did somebody dial one of our own ports? Answering would make ztunnel dial itself without end.
    #[must_use]
    pub fn is_own_listener(&self, destination: SocketAddr) -> bool {
        match self.backend {
            Backend::Ebpf => self.listeners.load().contains(&destination),
            // Dialled from outside, the port is redirected like any other.
            Backend::Redirect => {
                redirect::is_own_port(destination.port())
                    && (destination.ip().is_loopback() || self.addresses.load().contains(&destination.ip()))
            }
        }
    }

    /// Listeners that were opened for it, before anybody can dial them.
    pub fn add_listeners(&self, opened: &[SocketAddr]) {
        self.listeners.rcu(|known| [known.as_slice(), opened].concat());
    }

    /// Are there listeners for that family?
    #[must_use]
    pub fn listens(&self, family: Family) -> bool {
        self.listeners.load().iter().any(|address| Family::of(address.ip()) == family)
    }

    fn trigger(&self) -> std::sync::MutexGuard<'_, Option<DrainTrigger>> {
        self.trigger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the listeners and tells peers to open no more tunnels; what is open goes on. Waits for nobody.
    pub fn stop_accepting(&self) {
        self.kept.close_listeners();
        if let Some(trigger) = &*self.trigger() {
            trigger.begin();
        }
    }

    /// Cuts what is open.
    pub fn cut(&self) {
        drop(self.trigger().take());
    }

    /// Resolves once nothing of the pod is served any more.
    pub async fn finished(&self) {
        let finished = self.trigger().as_ref().map(DrainTrigger::finished);
        match finished {
            Some(finished) => finished.await,
            // Cut already: what is left says its last words.
            None => {
                while !self.connections.is_empty() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Stops accepting, lets connections end until `deadline`, then cuts them.
    pub async fn drain(&self, deadline: Duration) {
        self.stop_accepting();
        let _ = tokio::time::timeout(deadline, self.finished()).await;
        self.cut();
    }

    /// Counts as something that is being opened, until dropped or until its bytes flow.
    pub fn opening(self: &Arc<Self>) -> Opening {
        self.opening.fetch_add(1, Ordering::SeqCst);
        Opening(self.clone())
    }

    #[must_use]
    pub fn is_opening(&self) -> bool {
        self.opening.load(Ordering::SeqCst) > 0
    }

    /// From now on tunnels that are asked for on open connections are sent away.
    pub fn close_door(&self) {
        self.closed_door.store(true, Ordering::SeqCst);
    }

    #[must_use]
    pub fn is_door_closed(&self) -> bool {
        self.closed_door.load(Ordering::SeqCst)
    }
}

/// A connection or tunnel that is being opened.
pub struct Opening(Arc<LocalPod>);

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.opening.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Which way a connection goes, seen from the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    Inbound,
    Outbound,
}

/// How the other side speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Transport {
    #[serde(rename = "HBONE")]
    Hbone,
    #[serde(rename = "TCP")]
    Tcp,
}

/// What is known of an open connection; shown in `/config_dump`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    #[serde(skip)]
    pub way: Way,
    pub src: SocketAddr,
    pub original_dst: SocketAddr,
    pub actual_dst: SocketAddr,
    pub protocol: Transport,
    /// What policy was asked, to ask again when it changes; `None` where no policy applies.
    #[serde(skip)]
    pub authorized_as: Option<Connection>,
    /// Of the peers that the TLS connections below have proved; none without TLS, or where nobody can be revoked.
    #[serde(skip)]
    pub peers: Vec<Arc<Standing>>,
}

impl Facts {
    fn is_revoked(&self) -> bool {
        self.peers.iter().any(|peer| peer.is_revoked())
    }
}

/// The open connections of a pod.
#[derive(Debug, Default)]
pub struct Connections {
    next: AtomicU64,
    open: Mutex<BTreeMap<u64, (Facts, Arc<Notify>)>>,
}

/// Keeps a connection in the table; dropping it takes it out.
pub struct Tracked {
    pod: Arc<LocalPod>,
    id: u64,
    cut: Arc<Notify>,
    opening: Mutex<Option<Opening>>,
}

impl Tracked {
    /// Enters a connection into its pod's table.
    #[must_use]
    pub fn open(opening: Opening, facts: Facts) -> Self {
        let cut = Arc::new(Notify::new());
        let pod = opening.0.clone();
        let id = pod.connections.next.fetch_add(1, Ordering::Relaxed);
        pod.connections.table().insert(id, (facts, cut.clone()));
        Self { pod, id, cut, opening: Mutex::new(Some(opening)) }
    }

    /// Its bytes flow: no more sockets are needed for it.
    pub fn established(&self) {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Resolves when a policy that allowed the connection no longer does, or its peer has been revoked.
    pub async fn denied(&self) {
        self.cut.notified().await;
    }

    /// The tunnel has reached this peer, or one more behind it. To be asked afterwards: [`Self::is_peer_revoked`].
    pub fn reached(&self, peer: Option<&Arc<Standing>>) {
        if let (Some(peer), Some((facts, _))) = (peer, self.pod.connections.table().get_mut(&self.id)) {
            facts.peers.push(peer.clone());
        }
    }

    /// Has the certificate of the peer been revoked?
    #[must_use]
    pub fn is_peer_revoked(&self) -> bool {
        let table = self.pod.connections.table();
        table.get(&self.id).is_some_and(|(facts, _)| facts.is_revoked())
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.pod.connections.table().remove(&self.id);
    }
}

impl Connections {
    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (Facts, Arc<Notify>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.table().len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[must_use]
    pub fn list(&self, way: Way) -> Vec<Facts> {
        self.table().values().filter(|(f, _)| f.way == way).map(|(f, _)| f.clone()).collect()
    }

    /// What policy was asked about the connections of one way, by their numbers.
    #[must_use]
    pub fn asked(&self, way: Way) -> Vec<(u64, Connection)> {
        let table = self.table();
        let of_way = table.iter().filter(|(_, (facts, _))| facts.way == way);
        of_way.filter_map(|(id, (facts, _))| Some((*id, facts.authorized_as.clone()?))).collect()
    }

    /// Cuts those connections as denied. Returns how many there were.
    pub fn cut(&self, ids: &[u64]) -> usize {
        let table = self.table();
        let found = ids.iter().filter_map(|id| table.get(id));
        found.map(|(_, notify)| notify.notify_one()).count()
    }

    /// Cuts those whose peer has been revoked. Returns how many there were.
    pub fn cut_revoked(&self) -> usize {
        let table = self.table();
        let revoked = table.values().filter(|(facts, _)| facts.is_revoked());
        revoked.map(|(_, notify)| notify.notify_one()).count()
    }

    /// Asks policy again for every inbound connection and cuts those it now denies. Returns how many that were.
    pub fn reevaluate(&self, world: &Snapshot, workload_uid: &str) -> usize {
        let Some(workload) = world.workload(workload_uid) else { return 0 };
        let mut cut = 0;
        for (facts, notify) in self.table().values() {
            let denied = facts.authorized_as.as_ref().is_some_and(|c| !still_allows(world.policies_for(workload), c));
            if denied {
                // Leaves a permit when the connection is not waiting yet, so the order does not matter.
                notify.notify_one();
                cut += 1;
            }
        }
        cut
    }
}
