//! The other replicas, as the EndpointSlices of the control plane's own Service name them, and what their clients say.
//!
//! A replica counts from when it is first ready until it is gone: one that starts has no clients yet, and one that is ready
//! no longer may still have some. Who cannot be reached has not acknowledged anything: waiting ends with the caller's
//! patience, and then what is written says so.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future;
use mesh::grpc::{self, AuthChannel, Dialer, GrpcConfig, RootCa, TokenSource};
use mesh_proto::replica::replica_service_client::ReplicaServiceClient;
use mesh_proto::replica::{AcknowledgedRequest, Content, PartedRequest, Refusal};
use tokio::sync::watch;
use tonic::Status;

use super::Refusals;
use crate::ca::CurrentAuthority;
use crate::ca::serving::dns_names;
use crate::resources::lock;
use crate::revision::{LABEL, Revision};
use crate::translate::world::{World, in_namespace};
use crate::types::{Key, Slice, label};

/// The Service all replicas are behind, but for a revision that is added, and its port for proxies.
const SERVICE: &str = "istiod";
const PORT: &str = "grpc-xds";
/// Between attempts at one that does not answer.
const RETRY: Duration = Duration::from_millis(250);
/// A reason of a KiB for each policy, and more policies than anybody has.
const LONGEST_ANSWER: usize = 64 * 1024 * 1024;
/// Workloads asked about at a time: names are of some hundred bytes.
const PIECE: usize = 1000;
/// How often the others are asked what their clients refuse, which may also be news when nothing of ours has changed.
const LOOK: Duration = Duration::from_secs(5);

/// What we ask with.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Of the control plane's own service account, for the audience that proxies' tokens have.
    pub token: TokenSource,
    pub namespace: String,
    pub cluster_id: String,
    /// The pod this is, which need not be asked.
    pub pod: Option<String>,
}

/// A connection, and the roots it was made with.
struct Link {
    roots: String,
    channel: AuthChannel,
}

#[derive(Default)]
struct Known {
    /// Those that count.
    links: BTreeMap<SocketAddr, Option<Link>>,
    refusals: BTreeMap<SocketAddr, Vec<Refusal>>,
    /// Why one did not answer, as it was logged.
    told: BTreeMap<SocketAddr, String>,
}

/// The other replicas.
pub struct Peers {
    credentials: Credentials,
    authority: Arc<CurrentAuthority>,
    known: Mutex<Known>,
    refusals: watch::Sender<Arc<Refusals>>,
}

impl Peers {
    /// None yet. Whom to trust is `authority`'s to say.
    pub fn new(credentials: Credentials, authority: Arc<CurrentAuthority>) -> Self {
        Self { credentials, authority, known: Mutex::default(), refusals: watch::Sender::default() }
    }

    /// These are the replicas now.
    pub fn observe(&self, world: &World) {
        let present = present(world, self.credentials.pod.as_deref());
        let mut known = lock(&self.known);
        let Known { links, refusals, told } = &mut *known;
        links.retain(|address, _| present.contains_key(address));
        for (address, _) in present.into_iter().filter(|(_, is_serving)| *is_serving) {
            links.entry(address).or_insert(None);
        }
        refusals.retain(|address, _| links.contains_key(address));
        told.retain(|address, _| links.contains_key(address));
        self.tell(&known);
    }

    /// What the clients of the others refuse, as far as they have said.
    pub fn refusals(&self) -> watch::Receiver<Arc<Refusals>> {
        self.refusals.subscribe()
    }

    /// Keeps [`Self::refusals`] current while nothing else is asked. Never ends.
    pub async fn follow_refusals(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.acknowledged(Vec::new(), LOOK).await;
        }
    }

    /// Whether all clients of all others have acknowledged resources like these, before `patience` ends.
    pub async fn acknowledged(&self, contents: Vec<Content>, patience: Duration) -> bool {
        let asked = AcknowledgedRequest { contents };
        let ask = |channel: AuthChannel| {
            let asked = asked.clone();
            async move {
                let mut replica = ReplicaServiceClient::new(channel).max_decoding_message_size(LONGEST_ANSWER);
                replica.acknowledged(asked).await.map(tonic::Response::into_inner)
            }
        };
        let asking = self.addresses().into_iter().map(|address| async move {
            let Some(answer) = self.ask(address, patience, ask).await else { return false };
            let mut known = lock(&self.known);
            if known.links.contains_key(&address) {
                known.refusals.insert(address, answer.refusals);
            }
            self.tell(&known);
            true
        });
        future::join_all(asking).await.into_iter().all(|answered| answered)
    }

    /// Whether all clients of all others know that none of these workloads speaks HBONE, before `patience` ends.
    pub async fn parted(&self, workloads: &[String], patience: Duration) -> bool {
        let addresses = self.addresses();
        let pieces = workloads.chunks(PIECE).flat_map(|piece| addresses.iter().map(move |address| (*address, piece)));
        let asking = pieces.map(|(address, piece)| {
            self.ask(address, patience, move |channel| async move {
                ReplicaServiceClient::new(channel).parted(PartedRequest { workloads: piece.to_vec() }).await
            })
        });
        future::join_all(asking).await.into_iter().all(|answer| answer.is_some())
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        lock(&self.known).links.keys().copied().collect()
    }

    /// Asks one, again if it cannot be reached.
    async fn ask<T, F>(&self, address: SocketAddr, patience: Duration, ask: impl Fn(AuthChannel) -> F) -> Option<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut why = None;
        let asking = async {
            loop {
                match self.channel(address) {
                    Ok(channel) => match ask(channel).await {
                        Ok(answer) => return answer,
                        Err(status) => why = Some(grpc::explain(&status)),
                    },
                    Err(error) => why = Some(error.to_string()),
                }
                tokio::time::sleep(RETRY).await;
            }
        };
        let answer = tokio::time::timeout(patience, asking).await.ok();
        let mut known = lock(&self.known);
        if answer.is_some() {
            known.told.remove(&address);
            return answer;
        }
        metrics::counter!("replica_questions_unanswered_total").increment(1);
        match why {
            Some(why) if known.told.get(&address) != Some(&why) => {
                tracing::warn!(%address, why, "a replica cannot be asked what its proxies have acknowledged");
                known.told.insert(address, why);
            }
            Some(_) => {}
            None => tracing::debug!(%address, ?patience, "some proxies of a replica have not acknowledged"),
        }
        None
    }

    /// The connection to a replica, made anew when other roots are trusted.
    fn channel(&self, address: SocketAddr) -> Result<AuthChannel, grpc::GrpcError> {
        let (roots, _) = self.authority.distributed();
        let mut known = lock(&self.known);
        if let Some(Some(link)) =
            known.links.get(&address).filter(|link| link.as_ref().is_some_and(|l| l.roots == roots))
        {
            return Ok(link.channel.clone());
        }
        let Credentials { token, namespace, cluster_id, .. } = &self.credentials;
        let channel = grpc::channel(GrpcConfig {
            address: format!("https://{address}"),
            root_ca: RootCa::Pem(roots.clone()),
            token: token.clone(),
            headers: Vec::new(),
            cluster_id: cluster_id.clone(),
            alt_hostname: dns_names(namespace, &Revision::default(), None).into_iter().next(),
            dialer: Dialer::default(),
        })?;
        if let Some(link) = known.links.get_mut(&address) {
            *link = Some(Link { roots, channel: channel.clone() });
        }
        Ok(channel)
    }

    fn tell(&self, known: &Known) {
        let mut all: BTreeMap<(String, String), (usize, String)> = BTreeMap::new();
        for refusal in known.refusals.values().flatten() {
            let place = (refusal.type_url.clone(), refusal.name.clone());
            let (proxies, _) = all.entry(place).or_insert_with(|| (0, refusal.reason.clone()));
            *proxies = proxies.saturating_add(refusal.proxies as usize);
        }
        let all = Refusals(all);
        self.refusals.send_if_modified(|before| {
            let is_new = **before != all;
            if is_new {
                *before = Arc::new(all);
            }
            is_new
        });
    }
}

/// Whether a Service of the mesh's namespace is that of a control plane, of whichever revision: a policy is in force once the
/// proxies of all have it.
fn is_ours(world: &World, service: &str) -> bool {
    let key = || Key::new(&*world.mesh.root_namespace, service);
    let revision = || label(&**world.services.get(&key())?, LABEL)?.parse::<Revision>().ok();
    service == SERVICE || revision().is_some_and(|revision| revision.named(SERVICE) == service)
}

/// The replicas other than `own_pod`, and whether each is serving.
fn present(world: &World, own_pod: Option<&str>) -> BTreeMap<SocketAddr, bool> {
    let mut present = BTreeMap::new();
    for (_, slice) in in_namespace(&world.endpoint_slices, &world.mesh.root_namespace) {
        let service = slice.service.as_deref();
        let Some(port) = port(slice).filter(|_| service.is_some_and(|service| is_ours(world, service))) else {
            continue;
        };
        for endpoint in slice.endpoints() {
            if own_pod.is_some() && endpoint.pod == own_pod {
                continue;
            }
            for address in endpoint.addresses {
                *present.entry(SocketAddr::new(*address, port)).or_insert(false) |= endpoint.is_serving;
            }
        }
    }
    present
}

fn port(slice: &Slice) -> Option<u16> {
    slice.ports.iter().find(|port| port.name == PORT)?.number
}

#[cfg(test)]
mod tests;
