//! HBONE in: from an accepted socket to the tunnels inside it, each resolved to what it is for and handed to the HTTP or
//! the TCP path.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use mesh::drain::DrainWatcher;
use mesh::hbone::{self, ConnectRequest, H2Settings, HboneStream, ServeError};
use mesh::identity::{CertificateManager, Identity};
use mesh::model::{AppProtocol, NamespacedHostname, Service};
use mesh::net::PeerAddr;
use mesh::store::{Snapshot, Store};
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::{self, Direction};
use mesh::tls::{self, TlsStream, VerifiedPeer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::balance::{Balancer, Endpoint};
use crate::config::{AccessLog, Config};
use crate::policy::{Denial, HttpSubject, Observed, Permit, Subject};
use crate::record::Client;
use crate::request;
use crate::sniff::{self, Sniffed};
use crate::target::{self, Destination, Me, Refusal};
use crate::tcp;
use crate::upstream::{Origin, Upstreams};
use crate::world::{World, WorldStore};

/// How long a CONNECT for something not bound here waits for the control plane's word that it is: the client's node
/// proxy may have heard of a new binding a moment earlier.
const BINDING_PATIENCE: Duration = Duration::from_secs(2);
/// How long what *was* bound here is still served: clients may hear of an unbinding a moment later.
const UNBINDING_GRACE: Duration = Duration::from_secs(10);
/// Request heads above these are answered 431.
const MAX_HEADERS: usize = 100;
const MAX_HEADER_BYTES: usize = 60 * 1024;

/// What all workers share; read through snapshots.
pub struct Shared {
    pub config: Config,
    pub me: Me,
    pub identity: Identity,
    pub store: Arc<Store>,
    pub world: Arc<WorldStore>,
    pub certificates: CertificateManager,
    /// Bindings seen lately, for [`UNBINDING_GRACE`].
    lately: Mutex<HashMap<NamespacedHostname, Instant>>,
}

impl Shared {
    pub fn new(
        config: Config,
        me: Me,
        identity: Identity,
        store: Arc<Store>,
        world: Arc<WorldStore>,
        certificates: CertificateManager,
    ) -> Self {
        Self { config, me, identity, store, world, certificates, lately: Mutex::default() }
    }
}

/// One thread's part of the waypoint.
pub struct Worker {
    pub shared: Arc<Shared>,
    upstreams: Upstreams,
    balancer: Balancer,
}

impl Worker {
    pub fn new(shared: Arc<Shared>) -> Self {
        let upstreams = Upstreams::new(shared.identity.clone(), shared.certificates.clone(), shared.config.instance_ip);
        let balancer = Balancer::new(Arc::clone(&shared.me.network));
        Self { shared, upstreams, balancer }
    }

    /// After the last downstream connection has ended: waits until what was sent upstream has left.
    pub async fn drain(&self, watcher: &DrainWatcher) {
        self.upstreams.drain(watcher).await;
    }

    /// Forgets connections to endpoints that are gone, and those idle too long. Runs until dropped.
    pub async fn tidy(&self) {
        let mut changed = self.shared.store.watch();
        let mut tick = tokio::time::interval(Duration::from_secs(15));
        loop {
            tokio::select! {
                _ = tick.tick() => self.upstreams.sweep(),
                change = changed.changed() => {
                    if change.is_err() {
                        return;
                    }
                    let world = self.shared.store.snapshot();
                    self.upstreams.retain(|uid| world.workload(uid).is_some());
                }
            }
        }
    }
}

/// One CONNECT stream and everything a request in it needs to know.
pub struct Tunnel {
    worker: Arc<Worker>,
    pub client: Arc<Client>,
    identity: Identity,
    /// The identity without its scheme, as policies spell it.
    principal: String,
    pub destination: Destination,
    service_key: Option<NamespacedHostname>,
    service_text: Option<String>,
}

impl Tunnel {
    pub fn world(&self) -> Arc<World> {
        self.worker.shared.world.snapshot()
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.worker.shared.store.snapshot()
    }

    pub fn upstreams(&self) -> &Upstreams {
        &self.worker.upstreams
    }

    pub fn balancer(&self) -> &Balancer {
        &self.worker.balancer
    }

    pub fn access_log(&self) -> AccessLog {
        self.worker.shared.config.access_log
    }

    pub fn append_forwarded_for(&self) -> bool {
        self.worker.shared.config.append_forwarded_for
    }

    pub fn service(&self) -> Option<&Arc<Service>> {
        match &self.destination {
            Destination::Service { service, .. } => Some(service),
            Destination::Pod { .. } => None,
        }
    }

    pub fn service_key(&self) -> Option<&NamespacedHostname> {
        self.service_key.as_ref()
    }

    /// The endpoint of a tunnel to a pod.
    pub fn pod_endpoint(&self) -> Option<Arc<Endpoint>> {
        match &self.destination {
            Destination::Pod { workload, address } => Some(Endpoint::direct(workload.clone(), *address)),
            Destination::Service { .. } => None,
        }
    }

    /// Asks the policies. Without `http` the subject is the connection.
    ///
    /// # Errors
    /// The denial.
    pub fn authorize(&self, world: &World, http: Option<HttpSubject<'_>>) -> Result<Permit, Denial> {
        let subject = Subject {
            source: Some(&self.identity),
            principal: &self.principal,
            source_ip: self.client.address.ip(),
            destination: self.destination.address(),
            http,
        };
        world.policies.authorize(self.service_text.as_deref(), &subject, |Observed { policy, kind }| {
            metrics::counter!("waypoint_policy_observed_total", "policy" => policy.to_string(), "kind" => kind.as_str())
                .increment(1);
            tracing::debug!(policy = &*policy, kind = kind.as_str(), client = %self.client.address, "policy observed");
        })
    }
}

/// Serves one accepted socket to its end.
pub async fn connection(worker: Arc<Worker>, stream: TcpStream, peer: PeerAddr, drain: DrainWatcher) {
    let client = mesh::net::canonical(peer.0);
    // A socket that cannot name its own end is closed already.
    let here = stream.local_addr().map_or(SocketAddr::from(([0, 0, 0, 0], 0)), mesh::net::canonical);
    let (stream, peer) = match handshake(&worker, stream, client).await {
        Ok(accepted) => accepted,
        Err(error) => return access::refused(Direction::Waypoint, client, here, error.flag(), &error),
    };
    let watch = drain.clone();
    let handler = move |request: ConnectRequest| tunnel(worker.clone(), request, watch.clone());
    let identity = peer.identity().clone();
    match hbone::serve(stream, peer, H2Settings::default(), drain, handler).await {
        Ok(()) => {}
        // Its tunnels tell of that.
        Err(ServeError::Cut) => tracing::debug!(%client, %here, "HBONE connection cut"),
        Err(error) => access::broken(Direction::Waypoint, client, &identity, here, error.flag(), &error),
    }
}

#[derive(Debug, thiserror::Error)]
enum RefusedError {
    #[error("no certificate for the waypoint: {0}")]
    Identity(#[from] mesh::identity::IdentityError),
    #[error(transparent)]
    Tls(#[from] mesh::tls::TlsError),
}

impl RefusedError {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Identity(_) => ResponseFlag::IdentityError,
            Self::Tls(error) => error.flag(),
        }
    }
}

async fn handshake(
    worker: &Worker,
    stream: TcpStream,
    client: SocketAddr,
) -> Result<(TlsStream<TcpStream>, VerifiedPeer), RefusedError> {
    let certificate = worker.shared.certificates.get(&worker.shared.identity).await?;
    Ok(tls::accept(&certificate, stream, client).await?)
}

/// One CONNECT: resolve, then the path of its protocol.
async fn tunnel(worker: Arc<Worker>, request: ConnectRequest, drain: DrainWatcher) {
    let identity = request.peer.identity().clone();
    let destination = match destination(&worker, &request, identity.namespace()).await {
        Ok(destination) => destination,
        Err(refusal) => {
            tracing::warn!(client = %request.peer.addr(), peer = %identity, %refusal, "CONNECT refused");
            metrics::counter!("waypoint_connect_refused_total").increment(1);
            request.reject(StatusCode::NOT_FOUND);
            return;
        }
    };
    let tunnel = Arc::new(build(&worker, &request, identity, destination));
    match tunnel.destination.protocol() {
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => {
            if let Some(stream) = accept(request) {
                http(tunnel, stream, drain).await;
            }
        }
        AppProtocol::Tcp | AppProtocol::Tls => tcp::serve(tunnel, request).await,
        AppProtocol::Unknown => {
            let Some(stream) = accept(request) else { return };
            match sniff::sniff(stream).await {
                Ok((Sniffed::Http1 | Sniffed::Http2, stream)) => http(tunnel, stream, drain).await,
                Ok((Sniffed::Tcp, stream)) => tcp::serve_accepted(tunnel, stream).await,
                Err(error) => tracing::debug!(%error, "the client went away before it said anything"),
            }
        }
    }
}

fn accept(request: ConnectRequest) -> Option<HboneStream> {
    request.accept(None).inspect_err(|error| tracing::debug!(%error, "the client went away")).ok()
}

async fn destination(worker: &Worker, request: &ConnectRequest, namespace: &str) -> Result<Destination, Refusal> {
    let shared = &worker.shared;
    let mut changed = shared.store.watch();
    let give_up = Instant::now() + BINDING_PATIENCE;
    loop {
        let world = shared.store.snapshot();
        changed.mark_unchanged();
        let refusal = match target::resolve(&world, &shared.me, &request.authority, namespace) {
            Ok(destination) => {
                shared.note_binding(&destination);
                return Ok(destination);
            }
            Err(refusal) => refusal,
        };
        if let Refusal::NotBound { service } = &refusal
            && shared.bound_lately(service)
            && let Some(destination) = target::unbound(&world, &shared.me, &request.authority, namespace)
        {
            return Ok(destination);
        }
        match tokio::time::timeout_at(give_up, changed.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return Err(refusal),
        }
    }
}

impl Shared {
    fn note_binding(&self, destination: &Destination) {
        if let Some(key) = destination.service_key() {
            self.lately.lock().unwrap_or_else(PoisonError::into_inner).insert(key, Instant::now());
        }
    }

    fn bound_lately(&self, service: &str) -> bool {
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        lately.retain(|_, at| at.elapsed() < UNBINDING_GRACE);
        service.parse().is_ok_and(|key: NamespacedHostname| lately.contains_key(&key))
    }
}

fn build(worker: &Arc<Worker>, request: &ConnectRequest, identity: Identity, destination: Destination) -> Tunnel {
    let address = request.peer.addr();
    let world = worker.shared.store.snapshot();
    // The address alone proves nothing; it names the workload only when the certificate says the same.
    let workload = world
        .workload_by_ip(&worker.shared.me.network, address.ip())
        .filter(|w| w.identity().is_ok_and(|id| id == identity))
        .cloned();
    let text = identity.to_string();
    let client = Client {
        address,
        principal: text.as_str().into(),
        namespace: identity.namespace().clone(),
        origin: Arc::new(Origin::new(identity.clone(), address.ip(), workload.as_deref())),
        workload,
    };
    let service_key = destination.service_key();
    Tunnel {
        worker: worker.clone(),
        client: Arc::new(client),
        identity,
        principal: text.strip_prefix("spiffe://").unwrap_or_default().to_owned(),
        destination,
        service_text: service_key.as_ref().map(ToString::to_string),
        service_key,
    }
}

/// HTTP/1.1 and HTTP/2 inside a tunnel.
async fn http<S>(tunnel: Arc<Tunnel>, stream: S, drain: DrainWatcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let tunnel = tunnel.clone();
        async move { Ok::<_, Infallible>(request::handle(tunnel, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(MAX_HEADER_BYTES).expect("60 KiB"))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        // Nothing is lost: requests under way are finished, then the connection closes.
        () = drain.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "HTTP connection in a tunnel ended");
    }
}
