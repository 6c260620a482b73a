//! Pods of this node come and go: their namespaces are found, captured, kept in order and given back.
//!
//! One task owns all of it: pods join side by side, the steps of one pod never interleave. Order when a pod joins: listeners, steering,
//! listener slots, rules and route, HBONE; then, once the control plane calls the workload an HBONE one, everything.
//! Order when it leaves: no new capture, HBONE still answered; steering away; open connections live on; rules and
//! route; listeners. A namespace is never touched that was neither handed over for the pod (see [`orders`])
//! nor found by its UID (see [`find`]).

pub mod backend;
pub mod enrolment;
pub mod find;
pub mod host;
pub mod keep;
pub mod manager;
pub mod marked;
pub mod netns;
pub mod orders;
pub mod pod;
pub mod release;
pub mod report;
pub mod routing;
pub mod sysctl;
pub mod tenure;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use ebpf_loader::LoadError;
use mesh_proto::enrolment::pod_state::State as WireState;
use thiserror::Error;

use pod::{LocalPod, Way};
use routing::RoutingError;

/// Why a pod is not (yet) captured.
#[derive(Debug, Error)]
pub enum EnrolError {
    #[error("the pod has no address yet")]
    NoAddress,
    #[error("no process of the pod found below the cgroup root yet")]
    NoProcess,
    #[error("{0} network namespaces have processes of this pod and not exactly one holds its address; not enrolled")]
    Ambiguous(usize),
    #[error("the network namespace handed over is that of pod {0}; not enrolled")]
    Taken(String),
    #[error("opening listeners in the pod's network namespace: {0}")]
    Listeners(#[source] std::io::Error),
    #[error(transparent)]
    Capture(#[from] LoadError),
    #[error(transparent)]
    Routing(#[from] RoutingError),
}

impl EnrolError {
    /// Things that cure themselves are pending; the rest somebody must look at.
    #[must_use]
    pub const fn state(&self) -> WireState {
        match self {
            Self::NoAddress | Self::NoProcess => WireState::Pending,
            Self::Ambiguous(_) | Self::Taken(_) | Self::Listeners(_) | Self::Capture(_) | Self::Routing(_) => {
                WireState::Failed
            }
        }
    }
}

/// The enrolled pods, for those who only look: admin, policy, drain.
#[derive(Default)]
pub struct Registry(RwLock<BTreeMap<u64, Arc<LocalPod>>>);

impl Registry {
    pub(crate) fn insert(&self, pod: &Arc<LocalPod>) {
        metrics::counter!("workload_manager_proxies_started_total").increment(1);
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(Self::key(pod), pod.clone());
    }

    pub(crate) fn remove(&self, pod: &Arc<LocalPod>) {
        let known = self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&Self::key(pod));
        if known.is_some() {
            metrics::counter!("workload_manager_proxies_stopped_total").increment(1);
        }
    }

    /// A pod may be here twice while it leaves and joins again; only the object tells the two apart.
    fn key(pod: &Arc<LocalPod>) -> u64 {
        Arc::as_ptr(pod) as u64
    }

    /// Every pod with open listeners or connections, those that are leaving included.
    #[must_use]
    pub fn pods(&self) -> Vec<Arc<LocalPod>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Open connections of all pods.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.pods().iter().map(|pod| pod.connections.len()).sum()
    }

    /// `workloadState` of `/config_dump`.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        let pods = self.pods().into_iter().map(|pod| {
            let state = serde_json::json!({
                "state": if pod.drain.is_draining() { "Draining" } else { "Up" },
                "connections": {
                    "inbound": pod.connections.list(Way::Inbound),
                    "outbound": pod.connections.list(Way::Outbound),
                },
                "info": {
                    "name": &*pod.name,
                    "namespace": &*pod.namespace,
                    "serviceAccount": &*pod.service_account,
                },
            });
            (pod.uid.clone(), state)
        });
        serde_json::Value::Object(pods.collect())
    }
}
