//! A pod in the mesh, as the data path sees it: its namespace, its addresses, its open connections.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use ebpf_loader::NetnsCookie;
use mesh::drain::{DrainTrigger, DrainWatcher};
use mesh::policy::{Connection, authorize};
use mesh::store::Snapshot;
use serde::Serialize;
use tokio::sync::Notify;

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
    pub cookie: NetnsCookie,
    pub connections: Connections,
    pub dns: DnsState,
    pub drain: DrainWatcher,
    /// The same namespace was enrolled again while this one was leaving: the steering belongs to the other now.
    pub superseded: AtomicBool,
    pub kept: Kept,
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
            cookie,
            connections: Connections::default(),
            dns,
            drain,
            superseded: AtomicBool::new(false),
            kept: Kept::default(),
            addresses: ArcSwap::from_pointee(enrolment.addresses.clone()),
            listeners: ArcSwap::default(),
            trigger: Mutex::new(Some(trigger)),
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

    /// Did somebody in the pod dial one of our loopback ports? Answering would make ztunnel dial itself without end.
    #[must_use]
    pub fn is_own_listener(&self, destination: SocketAddr) -> bool {
        self.listeners.load().contains(&destination)
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

    /// Stops accepting, lets connections end until `deadline`, then cuts them. Where a drain is under way already,
    /// waits for its end, as long.
    pub async fn drain(&self, deadline: Duration) {
        self.kept.close_listeners();
        let trigger = self.trigger.lock().unwrap_or_else(PoisonError::into_inner).take();
        match trigger {
            Some(trigger) => {
                trigger.drain(deadline).await;
            }
            None => {
                let emptied = async {
                    while !self.connections.is_empty() {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                };
                let _ = tokio::time::timeout(deadline, emptied).await;
            }
        }
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
}

impl Tracked {
    /// Enters a connection of `pod`.
    #[must_use]
    pub fn open(pod: &Arc<LocalPod>, facts: Facts) -> Self {
        let cut = Arc::new(Notify::new());
        let id = pod.connections.next.fetch_add(1, Ordering::Relaxed);
        pod.connections.table().insert(id, (facts, cut.clone()));
        Self { pod: pod.clone(), id, cut }
    }

    /// Resolves when a policy that allowed the connection no longer does.
    pub async fn denied(&self) {
        self.cut.notified().await;
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

    /// Asks policy again for every inbound connection and cuts those it now denies. Returns how many that were.
    pub fn reevaluate(&self, world: &Snapshot, workload_uid: &str) -> usize {
        let Some(workload) = world.workload(workload_uid) else { return 0 };
        let mut cut = 0;
        for (facts, notify) in self.table().values() {
            let denied =
                facts.authorized_as.as_ref().is_some_and(|c| authorize(world.policies_for(workload), c).is_err());
            if denied {
                // Leaves a permit when the connection is not waiting yet, so the order does not matter.
                notify.notify_one();
                cut += 1;
            }
        }
        cut
    }
}
