//! Node proxies as far as a control plane can tell: each with a connection, a token and a stream of its own, by the very code that
//! ztunnel speaks with (`mesh::grpc`, `mesh::xds::response`). They subscribe as ztunnel does, acknowledge all that comes, come back as
//! ztunnel does, and keep none of it.
//!
//! Proxy 0 is the scribe: it writes down what it holds, which is what the others would hold as well.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt as _, future, stream};
use mesh::grpc::{self, Dialer, GrpcConfig, RootCa, TokenSource};
use mesh::xds::response::{Part, Responses};
use mesh_proto::ads::{self, DeltaDiscoveryRequest};
use mesh_proto::enrolment::POD_ENROLMENT_TYPE;
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::workload::ADDRESS_TYPE;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::api;
use super::cluster::{self, SYSTEM};
use super::ledger::{Ledger, News};
use crate::raw::Node;

const CALL: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// In the order of ztunnel's subscriptions.
const TYPES: [&str; 3] = [ADDRESS_TYPE, AUTHORIZATION_TYPE, POD_ENROLMENT_TYPE];
/// The name in the control plane's certificate.
const CONTROL_PLANE: &str = "istiod.istio-system.svc";
/// As ztunnel's: `mesh::xds`.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(15));
const SCRIBE: u32 = 0;

/// Names and versions of resources.
type Held = BTreeMap<String, String>;

/// All proxies, and the threads they share.
pub struct Fleet {
    runtime: Runtime,
    /// Of those who stay through a storm: each node has CPU of its own, and what they wait for must not be the others' tasks.
    apart: Runtime,
    /// How many these are, the first ones.
    staying: u32,
    shared: Arc<Shared>,
    proxies: BTreeMap<u32, (JoinHandle<()>, Arc<Progress>)>,
}

struct Shared {
    port: u16,
    root: String,
    ledger: Arc<Ledger>,
    /// Responses about workloads and services that proxies which listen for changes were sent.
    pushes: AtomicU64,
    /// What the scribe holds.
    held: Mutex<Held>,
    /// Why streams ended, and how many did.
    troubles: Mutex<BTreeMap<String, u64>>,
}

/// How far a proxy is.
#[derive(Default)]
struct Progress {
    /// Workloads and services it was sent before it was synced.
    resources: AtomicU64,
    /// When each of its subscriptions had its first answer.
    synced: OnceLock<Instant>,
}

/// What proxies have when they connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// As on a node that has just started.
    Nothing,
    /// As after a lost stream: they tell what they hold and are sent what differs.
    Everything,
}

/// Whether what proxies hear after they are synced goes into the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ears {
    Open,
    Closed,
}

impl Fleet {
    /// Proxies of a control plane that listens on the loopback of a node and has a certificate under `root`. The first
    /// `staying` of them are there through the storms.
    ///
    /// # Errors
    /// When there are no threads to be had.
    pub fn new(node: &Node, port: u16, root: String, ledger: Arc<Ledger>, staying: u32) -> Result<Self> {
        // Threads are in the network namespace of the thread that starts them.
        let runtime = |threads| {
            let built = move || Ok(Builder::new_multi_thread().worker_threads(threads).enable_all().build()?);
            node.net.netns.enter(built)
        };
        let (runtime, apart) = (runtime(2)?, runtime(1)?);
        let shared = Shared {
            port,
            root,
            ledger,
            pushes: AtomicU64::new(0),
            held: Mutex::default(),
            troubles: Mutex::default(),
        };
        Ok(Self { runtime, apart, staying, shared: Arc::new(shared), proxies: BTreeMap::new() })
    }

    /// Connects proxies, so many at a time until each of those is synced.
    pub fn connect(&mut self, numbers: Range<u32>, at_a_time: usize, holding: Holding, ears: Ears) {
        let places = Arc::new(Semaphore::new(at_a_time));
        let held = Arc::new(match holding {
            Holding::Nothing => Held::new(),
            Holding::Everything => lock(&self.shared.held).clone(),
        });
        for number in numbers {
            let progress = Arc::<Progress>::default();
            let proxy = Proxy {
                number,
                shared: Arc::clone(&self.shared),
                progress: Arc::clone(&progress),
                held: Arc::clone(&held),
                ears,
                place: None,
            };
            // Ends when it is let go of, or with the runtime.
            let runtime = if number < self.staying { &self.apart } else { &self.runtime };
            let task = runtime.spawn(proxy.live(Arc::clone(&places)));
            self.proxies.insert(number, (task, progress));
        }
    }

    /// Lets go of proxies: their connections break.
    pub fn disconnect(&mut self, numbers: Range<u32>) {
        let gone: Vec<_> = numbers.filter_map(|number| self.proxies.remove(&number)).collect();
        gone.iter().for_each(|(task, _)| task.abort());
        self.runtime.block_on(future::join_all(gone.into_iter().map(|(task, _)| task)));
    }

    /// How many of these proxies are synced, and when the last of them was.
    pub fn synced(&self, numbers: Range<u32>) -> (usize, Option<Instant>) {
        let synced: Vec<Instant> =
            self.proxies.range(numbers).filter_map(|(_, (_, progress))| progress.synced.get().copied()).collect();
        (synced.len(), synced.into_iter().max())
    }

    /// The fewest and the most resources that one of these proxies was sent until it was synced.
    pub fn resources(&self, numbers: Range<u32>) -> (u64, u64) {
        let sent = self.proxies.range(numbers).map(|(_, (_, progress))| progress.resources.load(Ordering::Relaxed));
        sent.fold((u64::MAX, 0), |(fewest, most), sent| (fewest.min(sent), most.max(sent)))
    }

    /// Responses so far to those that listen.
    pub fn pushes(&self) -> u64 {
        self.shared.pushes.load(Ordering::Relaxed)
    }

    /// Names of the workloads and services that the scribe knows.
    pub fn known(&self) -> Vec<String> {
        lock(&self.shared.held).keys().cloned().collect()
    }

    /// Why streams ended.
    pub fn troubles(&self) -> Vec<String> {
        lock(&self.shared.troubles).iter().map(|(what, times)| format!("{what} ({times} times)")).collect()
    }

    /// Tries to be let in with a token that nobody has given out.
    ///
    /// # Errors
    /// When that is possible.
    pub fn try_as_stranger(&self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let attempt = self.runtime.spawn(async move {
            let channel = grpc::channel(shared.grpc(format!("{}x", api::token(0))))?;
            let request = first_request(ADDRESS_TYPE, 0, &Held::new());
            match grpc::call(channel, CALL, stream::iter([request])).await {
                Err(status) if status.code() == Code::Unauthenticated => Ok(()),
                Err(status) => bail!("a stranger was answered {}", grpc::explain(&status)),
                Ok(_) => bail!("a stranger was let in"),
            }
        });
        self.runtime.block_on(attempt).context("the stranger panicked")?
    }
}

impl Shared {
    fn grpc(&self, token: String) -> GrpcConfig {
        GrpcConfig {
            address: format!("https://{CONTROL_PLANE}:{}", self.port),
            root_ca: RootCa::Pem(self.root.clone()),
            token: TokenSource::Literal(token),
            headers: Vec::new(),
            cluster_id: "Kubernetes".to_owned(),
            alt_hostname: None,
            // Nobody knows that name here.
            dialer: Dialer::new(|_, port| TcpStream::connect((Ipv4Addr::LOCALHOST, port))),
        }
    }
}

struct Proxy {
    number: u32,
    shared: Arc<Shared>,
    progress: Arc<Progress>,
    /// What it had when it was started.
    held: Arc<Held>,
    ears: Ears,
    /// Among those that are connecting.
    place: Option<OwnedSemaphorePermit>,
}

/// What of a response has arrived.
#[derive(Default)]
struct Arrived {
    resources: u64,
    /// Of the scribe, to be written down when it is known what they are.
    versions: Vec<(String, String)>,
}

impl Proxy {
    /// One stream after the other.
    async fn live(mut self, places: Arc<Semaphore>) {
        self.place = places.acquire_owned().await.ok();
        let mut wait = BACKOFF.0;
        loop {
            let Err(trouble) = self.stream().await;
            *lock(&self.shared.troubles).entry(format!("{trouble:#}")).or_default() += 1;
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    /// A stream from its beginning to its end, which always comes too early.
    async fn stream(&mut self) -> Result<std::convert::Infallible> {
        let channel = grpc::channel(self.shared.grpc(api::token(self.number)))?;
        let (answers, outgoing) = mpsc::channel(TYPES.len());
        let (number, held) = (self.number, Arc::clone(&self.held));
        // Made when it is their turn, as they may be large.
        let first = stream::iter(TYPES).map(move |type_url| first_request(type_url, number, &held));
        let call = grpc::call(channel, CALL, first.chain(ReceiverStream::new(outgoing)));
        let mut pieces = call.await.map_err(|status| anyhow::anyhow!("not let in: {}", grpc::explain(&status)))?;
        let mut responses = Responses::default();
        let mut arrived = Arrived::default();
        let mut unanswered = TYPES.to_vec();
        loop {
            let piece = pieces.next().await.map_err(|status| anyhow::anyhow!("ended: {}", grpc::explain(&status)))?;
            responses.push(&piece.context("ended by the control plane")?);
            while let Some(part) = responses.pop()? {
                match part {
                    Part::Resource(resource) => {
                        arrived.resources += 1;
                        self.hear(resource.name, News::Came);
                        if self.number == SCRIBE {
                            arrived.versions.push((resource.name.to_owned(), resource.version.to_owned()));
                        }
                    }
                    Part::End(rest) => {
                        rest.removed.iter().for_each(|name| self.hear(name, News::Gone));
                        if rest.type_url == ADDRESS_TYPE {
                            self.addresses(std::mem::take(&mut arrived), &rest.removed);
                        }
                        arrived = Arrived::default();
                        let known = TYPES.iter().find(|type_url| **type_url == rest.type_url);
                        let type_url = *known.with_context(|| format!("{:?} was not asked for", rest.type_url))?;
                        unanswered.retain(|waiting| *waiting != type_url);
                        if unanswered.is_empty() {
                            self.progress.synced.get_or_init(Instant::now);
                            self.place = None;
                        }
                        let ack = DeltaDiscoveryRequest {
                            type_url: rest.type_url,
                            response_nonce: rest.nonce,
                            ..DeltaDiscoveryRequest::default()
                        };
                        ensure!(answers.send(ack).await.is_ok(), "ended while it was answered");
                    }
                }
            }
        }
    }

    fn is_synced(&self) -> bool {
        self.progress.synced.get().is_some()
    }

    fn hear(&self, resource: &str, news: News) {
        if self.ears == Ears::Open
            && self.is_synced()
            && let Some(serial) = cluster::serial_of(resource)
        {
            self.shared.ledger.hear(serial, news);
        }
    }

    /// A response about workloads and services is complete.
    fn addresses(&self, arrived: Arrived, removed: &[String]) {
        if !self.is_synced() {
            self.progress.resources.fetch_add(arrived.resources, Ordering::Relaxed);
        } else if self.ears == Ears::Open {
            self.shared.pushes.fetch_add(1, Ordering::Relaxed);
        }
        if self.number == SCRIBE {
            let mut held = lock(&self.shared.held);
            held.extend(arrived.versions);
            removed.iter().for_each(|name| _ = held.remove(name));
        }
    }
}

fn first_request(type_url: &str, number: u32, held: &Held) -> DeltaDiscoveryRequest {
    let name = cluster::proxy_name(number);
    let text = |text: String| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text)) };
    let fields = [
        ("NAME", name.clone()),
        ("NAMESPACE", SYSTEM.to_owned()),
        ("NODE_NAME", cluster::node_name(number)),
        ("CLUSTER_ID", "Kubernetes".to_owned()),
    ];
    let metadata = prost_types::Struct { fields: fields.map(|(key, value)| (key.to_owned(), text(value))).into() };
    let id = format!("ztunnel~127.0.0.1~{name}.{SYSTEM}~{SYSTEM}.svc.cluster.local");
    DeltaDiscoveryRequest {
        node: Some(ads::Node { id, metadata: Some(metadata), ..ads::Node::default() }),
        type_url: type_url.to_owned(),
        // Of the other types there is none, or one for each pod of its node.
        initial_resource_versions: if type_url == ADDRESS_TYPE { held.clone() } else { Held::new() },
        ..DeltaDiscoveryRequest::default()
    }
}

/// What is guarded is whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_tells_what_it_holds_of_workloads_and_services_alone() {
        let held = Held::from([("a".to_owned(), "1".to_owned())]);
        let requests = TYPES.map(|type_url| first_request(type_url, 3, &held));
        assert_eq!(requests[0].initial_resource_versions, held);
        assert!(requests[1..].iter().all(|request| request.initial_resource_versions.is_empty()));
        let node = requests[0].node.as_ref().unwrap();
        assert_eq!(node.id, "ztunnel~127.0.0.1~ztunnel-00003.istio-system~istio-system.svc.cluster.local");
        assert!(requests.iter().all(|request| request.resource_names_subscribe.is_empty()), "everything is wanted");
    }
}
