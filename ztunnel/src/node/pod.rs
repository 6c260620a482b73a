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

use super::backend::{Backend, redirect};
use super::enrolment::Enrolment;
use super::netns::Netns;
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
    addresses: ArcSwap<Vec<IpAddr>>,
    /// Addresses of our own listeners; whoever dials those talks to nobody.
    listeners: Vec<SocketAddr>,
    trigger: Mutex<Option<DrainTrigger>>,
}

impl LocalPod {
    #[must_use]
    pub fn new(
        enrolment: &Enrolment,
        netns: Netns,
        cookie: NetnsCookie,
        listeners: Vec<SocketAddr>,
        dns: DnsState,
    ) -> Self {
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
            addresses: ArcSwap::from_pointee(enrolment.addresses.clone()),
            listeners,
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

    /// Did somebody dial one of our own ports? Answering would make ztunnel dial itself without end.
    #[must_use]
    pub fn is_own_listener(&self, destination: SocketAddr) -> bool {
        match self.backend {
            Backend::Ebpf => self.listeners.contains(&destination),
            // Dialled from outside, the port is redirected like any other.
            Backend::Redirect => {
                redirect::is_own_port(destination.port())
                    && (destination.ip().is_loopback() || self.addresses.load().contains(&destination.ip()))
            }
        }
    }

    /// Stops accepting, lets connections end until `deadline`, then cuts them. Where a drain is under way already,
    /// waits for its end, as long.
    pub async fn drain(&self, deadline: Duration) {
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
