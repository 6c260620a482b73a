//! The pods' DNS: names of the mesh are answered from the store, everything else by the server the pod asked.
//!
//! [`answer`] decides and touches nothing; [`message`] reads and writes the wire; [`serve`] takes queries off the
//! pod's sockets and sends answers from the address that was asked; [`forward`] asks on. No answer is ever kept, so no
//! pod can put anything into another's. UDP is served on the control runtime, where it cannot delay a byte of a
//! connection; captured connections to port 53 by the worker that accepted them.

pub mod answer;
pub mod forward;
pub mod message;
pub mod packet;
pub mod resolv;
pub mod serve;

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mesh::model::Workload;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::node::pod::LocalPod;
use crate::worker::Shared;
use answer::Client;
use forward::NoAnswer;
use message::{Asked, Query, Transport};

/// Queries of one pod that may be under way, each with a socket and a task. Far above what resolvers have open.
const IN_FLIGHT: usize = 256;

/// The longest datagram.
const DATAGRAM: usize = 65_535;

thread_local! {
    /// One buffer for all that a thread receives: a pod's sockets are mostly idle, and a node has hundreds.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; DATAGRAM]);
}

/// Lends the thread's buffer. What was received must be copied out.
fn with_scratch<T>(receive: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|buffer| receive(buffer))
}

/// What of a pod's DNS is ztunnel's.
#[derive(Debug)]
pub struct DnsState {
    captured: AtomicBool,
    in_flight: Arc<Semaphore>,
    /// Asked in place of the server the pod asks, where that cannot be told.
    servers: Arc<[SocketAddr]>,
    /// Where queries of our own for this pod come from.
    asking: Mutex<HashSet<SocketAddr>>,
}

/// A query of ours, as long as it is under way.
struct Asking<'a> {
    state: &'a DnsState,
    from: SocketAddr,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.state.asking.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.from);
    }
}

impl DnsState {
    #[must_use]
    pub fn new(captured: bool) -> Self {
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
        Self { captured: AtomicBool::new(captured), in_flight, servers: Arc::new([]), asking: Mutex::default() }
    }

    /// For a pod whose queries come without the address of the server: names outside the mesh are asked of `servers`.
    #[must_use]
    pub fn asking(servers: Arc<[SocketAddr]>) -> Self {
        Self { servers, ..Self::new(false) }
    }

    /// Who is asked about names outside the mesh, the first one first, when the pod asked `asked`.
    #[must_use]
    pub fn servers(&self, asked: Option<SocketAddr>) -> Vec<SocketAddr> {
        if self.servers.is_empty() { asked.into_iter().collect() } else { self.servers.to_vec() }
    }

    #[must_use]
    pub fn is_captured(&self) -> bool {
        self.captured.load(Ordering::Relaxed)
    }

    pub fn set_captured(&self, captured: bool) {
        self.captured.store(captured, Ordering::Relaxed);
    }

    /// Notes a socket of ours, so that what it sends is known when it comes back.
    fn note_query(&self, from: SocketAddr) -> Asking<'_> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner).insert(from);
        Asking { state: self, from }
    }

    /// Did this query leave from a socket of ours? So it is where a process of the pod has given the address of a server
    /// to its own namespace: asking on would ask ourselves without end.
    fn is_own(&self, client: SocketAddr) -> bool {
        let own = self.asking.lock().unwrap_or_else(PoisonError::into_inner).contains(&client);
        if own {
            metrics::counter!("ztunnel_self_connections_total").increment(1);
        }
        own
    }

    /// `None` when the pod has as many queries under way as it may.
    fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.in_flight.clone().try_acquire_owned().ok()
    }
}

/// What becomes of a message.
enum Verdict {
    Reply(Vec<u8>),
    Forward(Box<Query>, Labels),
    Ignore,
}

/// Of the metrics: whose query.
#[derive(Clone)]
struct Labels {
    kind: &'static str,
    transport: &'static str,
    service: Arc<str>,
    revision: Arc<str>,
}

impl Labels {
    fn of(query: &Query, source: Option<&Workload>) -> Self {
        let unknown = || Arc::from("unknown");
        Self {
            kind: query.type_label(),
            transport: query.transport().as_str(),
            service: source.map_or_else(unknown, |w| w.canonical_name.clone()),
            revision: source.map_or_else(unknown, |w| w.canonical_revision.clone()),
        }
    }

    fn list(&self) -> [metrics::Label; 4] {
        [
            metrics::Label::new("request_query_type", self.kind),
            metrics::Label::new("request_protocol", self.transport),
            metrics::Label::new("source_canonical_service", self.service.to_string()),
            metrics::Label::new("source_canonical_revision", self.revision.to_string()),
        ]
    }

    fn count(&self, name: &'static str) {
        metrics::counter!(name, self.list().iter()).increment(1);
    }
}

/// Decides on one message of `pod` on the newest snapshot. Waits only for the pod's own workload to become known.
async fn decide(
    shared: &Shared,
    pod: &LocalPod,
    server: Option<SocketAddr>,
    transport: Transport,
    bytes: &[u8],
) -> Verdict {
    let query = match message::read(bytes, transport) {
        Asked::Query(query) => query,
        Asked::Refused(reply) => return Verdict::Reply(reply),
        Asked::Nothing => return Verdict::Ignore,
    };
    let local = shared.local(pod).await;
    let labels = Labels::of(&query, local.as_ref().ok().map(|l| &*l.workload));
    labels.count("istio_dns_requests_total");
    let reply = |reply: Option<Vec<u8>>| reply.map_or(Verdict::Ignore, Verdict::Reply);
    let (pod, namespace, name) = (&pod.name, &pod.namespace, query.name());
    let source = match local {
        Ok(source) => source,
        Err(error) => {
            tracing::debug!(target: "dns", %pod, %namespace, %name, r#type = labels.kind, ?server, %error, "not answered");
            return reply(query.fail());
        }
    };
    let client = Client {
        namespace: &source.workload.namespace,
        network: &source.workload.network,
        domain: &shared.config.cluster_domain,
        preferred_namespace: shared.config.preferred_namespace.as_deref(),
        ipv6: shared.config.ipv6,
    };
    let found = query.wanted().and_then(|(name, kind)| answer::answer(&source.world, &client, &name, kind));
    match found {
        Some(found) => {
            let addresses = found.addresses.len();
            tracing::debug!(target: "dns", %pod, %namespace, %name, r#type = labels.kind, ?server, addresses, "answered");
            reply(query.answer(shuffled(found)))
        }
        None => {
            tracing::debug!(target: "dns", %pod, %namespace, %name, r#type = labels.kind, ?server, "forwarded");
            Verdict::Forward(query, labels)
        }
    }
}

/// Clients take the first address; all shall be first in turn.
fn shuffled(mut found: answer::Found) -> answer::Found {
    use rand::seq::SliceRandom;
    found.addresses.shuffle(&mut rand::rng());
    found
}

/// Counts what `ask` comes to, and makes an answer of it: the server's, or that there is none.
async fn forwarded(
    query: &Query,
    labels: &Labels,
    ask: impl Future<Output = Result<Vec<u8>, NoAnswer>>,
) -> Option<Vec<u8>> {
    labels.count("istio_dns_upstream_requests_total");
    let started = Instant::now();
    let answer = ask.await;
    metrics::histogram!("istio_dns_upstream_request_duration_seconds", labels.list().iter())
        .record(started.elapsed().as_secs_f64());
    match answer {
        Ok(answer) => Some(answer),
        Err(error) => {
            labels.count("istio_dns_upstream_failures_total");
            tracing::debug!(target: "dns", name = %query.name(), r#type = labels.kind, %error, "no answer");
            query.fail()
        }
    }
}
