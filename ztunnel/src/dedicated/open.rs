//! Dedicated mode with capture off: fixed ports in our own namespace, and nothing done to make connections come to them.
//!
//! Peers reach the workload by HBONE on 15008, and the application is called from the workload's own address. Whoever
//! wants more captured sets rules that redirect to 15001, 15006 and 15053, as a sidecar's do, and leave packets with
//! mark 0x539 alone.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh::drain::DrainWatcher;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::dns::{self, DnsState};
use crate::node::backend::redirect;
use crate::node::enrolment::{Desired, Enrolment};
use crate::node::netns::Netns;
use crate::node::pod::LocalPod;
use crate::node::{EnrolError, Registry};
use crate::worker::{Shared, Workers};

/// Between two attempts to open the ports.
const RETRY: Duration = Duration::from_secs(5);

/// What is needed to serve the workload.
pub struct Deps {
    pub shared: Shared,
    pub workers: Arc<Workers>,
    pub registry: Arc<Registry>,
    pub desired: watch::Receiver<Desired>,
    /// Who is asked about names outside the mesh.
    pub dns_servers: Arc<[SocketAddr]>,
}

/// Serves the one workload.
pub struct Open {
    deps: Deps,
    settled: watch::Sender<bool>,
    /// Each ends with the pod's drain.
    dns: TaskTracker,
}

impl Open {
    /// With a sign that the workload is served.
    #[must_use]
    pub fn new(deps: Deps) -> (Self, watch::Receiver<bool>) {
        let (settled, seen) = watch::channel(false);
        (Self { deps, settled, dns: TaskTracker::new() }, seen)
    }

    /// Opens the ports once the workload is known, and follows its addresses until the drain begins.
    pub async fn run(mut self, drain: DrainWatcher) {
        let mut pod: Option<Arc<LocalPod>> = None;
        loop {
            let wanted = self.deps.desired.borrow_and_update().pods.values().next().cloned();
            let failed = match (&pod, wanted) {
                (Some(pod), Some(wanted)) => {
                    pod.set_addresses(wanted.addresses);
                    false
                }
                (None, Some(wanted)) => match self.open(&wanted).await {
                    Ok(opened) => {
                        pod = Some(opened);
                        self.settled.send_replace(true);
                        false
                    }
                    Err(error) => {
                        tracing::warn!(workload = %wanted.workload_uid, %error, "not served");
                        true
                    }
                },
                (_, None) => false,
            };
            tokio::select! {
                Ok(()) = self.deps.desired.changed() => {}
                () = tokio::time::sleep(RETRY), if failed => {}
                () = drain.draining() => return,
            }
        }
    }

    async fn open(&self, wanted: &Enrolment) -> Result<Arc<LocalPod>, EnrolError> {
        let Deps { shared, workers, registry, dns_servers, .. } = &self.deps;
        let config = &shared.config;
        let opening = || -> io::Result<(Netns, redirect::Listeners)> {
            let netns = Netns::own()?;
            let listeners = redirect::open(&netns, workers.count(), config.ipv6, config.dns_capture)?;
            Ok((netns, listeners))
        };
        let (netns, redirect::Listeners { shares, dns }) = opening().map_err(EnrolError::Listeners)?;
        let cookie = ebpf_loader::cookie_of(netns.file())?;
        let state = DnsState::asking(dns_servers.clone());
        let pod = Arc::new(LocalPod::new(wanted, netns, cookie, state).redirected());
        registry.insert(&pod);
        metrics::gauge!("workload_manager_active_proxy_count").set(1.0);
        workers.assign(&pod, shares).await;
        for socket in dns {
            self.dns.spawn(dns::serve::udp(shared.clone(), pod.clone(), socket));
        }
        if let Some(Ok(identity)) = shared.store.snapshot().workload(&pod.workload_uid).map(|w| w.identity()) {
            shared.certs.prefetch(identity);
        }
        tracing::info!(workload = %pod.workload_uid, "served; nothing is captured");
        Ok(pod)
    }
}
