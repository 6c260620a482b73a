//! The pods the agent told of: started, tried again, replaced and stopped. What it must not know is how it was told.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ebpf_loader::LoadError;
use mesh::identity::{Identity, IdentityParseError};
use nix::sys::stat::fstat;
use thiserror::Error;
use tokio_util::task::TaskTracker;

use super::session::PodInfo;
use crate::dns::{self, DnsState};
use crate::node::Registry;
use crate::node::backend::redirect;
use crate::node::enrolment::{Dns, Enrolment, Failure, Inbound};
use crate::node::netns::Netns;
use crate::node::pod::LocalPod;
use crate::worker::{Shared, Workers};

/// Why a pod is not served. All are told to the agent, and tried again.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("looking at the file that came with the pod: {0}")]
    File(#[source] io::Error),
    #[error("the file that came with the pod is ztunnel's own network namespace")]
    Own,
    #[error("its network namespace is served as pod {0}")]
    Taken(String),
    #[error("opening ports in the pod's network namespace: {0}")]
    Ports(#[source] io::Error),
    #[error(transparent)]
    Cookie(#[from] LoadError),
    #[error("ztunnel is shutting down")]
    Ending,
}

/// What pods are made from.
pub struct Deps {
    pub shared: Shared,
    pub workers: Arc<Workers>,
    pub registry: Arc<Registry>,
    /// Who is asked about names outside the mesh.
    pub dns_servers: Arc<[SocketAddr]>,
}

/// A pod that is served.
struct Up {
    pod: Arc<LocalPod>,
    info: PodInfo,
}

/// A pod that could not be started.
struct Pending {
    info: PodInfo,
    netns: OwnedFd,
}

/// All pods of the node that the agent has told of.
pub struct Pods {
    deps: Deps,
    up: BTreeMap<String, Up>,
    pending: BTreeMap<String, Pending>,
    /// Each ends with its pod's drain.
    tasks: TaskTracker,
}

impl Pods {
    #[must_use]
    pub fn new(deps: Deps) -> Self {
        let pods = Self { deps, up: BTreeMap::new(), pending: BTreeMap::new(), tasks: TaskTracker::new() };
        pods.count();
        pods
    }

    /// Whether some pod could not be started yet.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Serves a pod. Told again it changes nothing; in another namespace, or with another name, it takes its place.
    ///
    /// # Errors
    /// What kept it from starting; it is tried again by [`Self::retry`].
    pub async fn start(&mut self, info: PodInfo, netns: OwnedFd) -> Result<(), StartError> {
        let inode = fstat(&netns).map_err(|errno| StartError::File(errno.into()))?.st_ino;
        match self.up.get(&info.uid) {
            Some(up) if up.info == info && up.pod.netns.inode() == inode => return Ok(()),
            Some(_) => {
                tracing::info!(uid = %info.uid, pod = %info.name, namespace = %info.namespace, "replaced");
                self.stop(&info.uid);
            }
            None => {}
        }
        let result = self.try_start(&info, &netns).await;
        match &result {
            Ok(()) => {
                self.pending.remove(&info.uid);
            }
            Err(error) => {
                tracing::warn!(uid = %info.uid, pod = %info.name, namespace = %info.namespace, %error, "not served");
                self.pending.insert(info.uid.clone(), Pending { info, netns });
            }
        }
        self.count();
        result
    }

    /// Stops serving a pod and cuts its connections: it was deleted, or its rules are gone. Unknown pods are fine.
    pub fn stop(&mut self, uid: &str) {
        self.pending.remove(uid);
        let Some(Up { pod, info }) = self.up.remove(uid) else { return self.count() };
        tracing::info!(%uid, pod = %info.name, namespace = %info.namespace, open = pod.connections.len(), "stopped");
        let (shared, registry) = (self.deps.shared.clone(), self.deps.registry.clone());
        self.tasks.spawn(async move {
            pod.drain(Duration::ZERO).await;
            registry.remove(&pod);
            forget_identity(&shared, &registry, &pod);
        });
        self.count();
    }

    /// Stops every pod that is not in `keep`.
    pub fn reconcile(&mut self, keep: &BTreeSet<String>) {
        let gone: Vec<String> =
            self.up.keys().chain(self.pending.keys()).filter(|uid| !keep.contains(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.stop(uid));
    }

    /// Whether `uid` is served, or will be.
    #[must_use]
    pub fn knows(&self, uid: &str) -> bool {
        self.up.contains_key(uid) || self.pending.contains_key(uid)
    }

    /// Tries what is pending once more.
    pub async fn retry(&mut self) {
        for (_, Pending { info, netns }) in std::mem::take(&mut self.pending) {
            // Told in the log, and pending again.
            let _ = self.start(info, netns).await;
        }
    }

    async fn try_start(&mut self, info: &PodInfo, file: &OwnedFd) -> Result<(), StartError> {
        let open = || -> io::Result<(u64, Netns)> {
            let inode = fstat(file)?.st_ino;
            Ok((inode, Netns::new(file.try_clone()?, inode)?))
        };
        let (inode, netns) = open().map_err(StartError::File)?;
        if netns.is_own().map_err(StartError::File)? {
            return Err(StartError::Own);
        }
        if let Some((uid, _)) = self.up.iter().find(|(_, up)| up.pod.netns.inode() == inode) {
            return Err(StartError::Taken(uid.clone()));
        }
        let config = &self.deps.shared.config;
        let cookie = ebpf_loader::cookie_of(file.as_fd())?;
        let redirect::Listeners { shares, dns } =
            redirect::open(&netns, self.deps.workers.count(), config.ipv6, config.dns_capture)
                .map_err(StartError::Ports)?;
        let enrolment = enrolment(info, &config.cluster_id);
        let state = DnsState::asking(self.deps.dns_servers.clone());
        let pod = Arc::new(LocalPod::new(&enrolment, netns, cookie, state).redirected());
        self.deps.registry.insert(&pod);
        self.deps.workers.assign(&pod, shares).await;
        for socket in dns {
            self.tasks.spawn(dns::serve::udp(self.deps.shared.clone(), pod.clone(), socket));
        }
        if let Ok(identity) = identity_of(&self.deps.shared, &pod) {
            self.deps.shared.certs.prefetch(identity);
        }
        tracing::info!(uid = %info.uid, pod = %info.name, namespace = %info.namespace, "served");
        self.up.insert(info.uid.clone(), Up { pod, info: info.clone() });
        Ok(())
    }

    fn count(&self) {
        #[allow(clippy::cast_precision_loss, reason = "pods of a node are few")]
        {
            metrics::gauge!("workload_manager_active_proxy_count").set(self.up.len() as f64);
            metrics::gauge!("workload_manager_pending_proxy_count").set(self.pending.len() as f64);
        }
    }
}

/// The pod in the words of the data path. Whatever else an enrolment says is the agent's business here.
fn enrolment(info: &PodInfo, cluster: &str) -> Enrolment {
    Enrolment {
        uid: info.uid.clone(),
        name: info.name.as_str().into(),
        namespace: info.namespace.as_str().into(),
        service_account: info.service_account.as_str().into(),
        workload_uid: format!("{cluster}//Pod/{}/{}", info.namespace, info.name).into(),
        // Those of the workload, once it is known.
        addresses: Vec::new(),
        epoch: 0,
        failure: Failure::Closed,
        inbound: Inbound::Capture,
        dns: Dns::Capture,
        excluded: Vec::new(),
        excluded_ports_to: Vec::new(),
        excluded_ports_at: Vec::new(),
        probe_ports: Vec::new(),
    }
}

/// The identity the pod will need. A name that is none is told when a connection wants it.
fn identity_of(shared: &Shared, pod: &LocalPod) -> Result<Identity, IdentityParseError> {
    let world = shared.store.snapshot();
    world.workload(&pod.workload_uid).map_or_else(
        || Identity::new(&shared.config.trust_domain, &pod.namespace, &pod.service_account),
        |workload| workload.identity(),
    )
}

fn forget_identity(shared: &Shared, registry: &Registry, pod: &LocalPod) {
    let same = |p: &Arc<LocalPod>| p.namespace == pod.namespace && p.service_account == pod.service_account;
    if !registry.pods().iter().any(same) {
        shared.certs.forget_account(&pod.namespace, &pod.service_account);
    }
}
