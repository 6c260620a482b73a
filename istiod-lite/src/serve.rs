//! The control plane's ports: 15012, gRPC with TLS (discovery, certificates, enrolment reports, what replicas ask each
//! other), where callers may show a certificate; 15014, plain HTTP for operators (metrics, version, readiness, who is
//! connected); 15017, HTTPS for the API server ([`crate::admission`]). Wiring only.

pub mod proxies;

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use axum::http::{StatusCode, header};
use axum::routing::get;
use mesh::clock::Clock;
use mesh::drain::DrainWatcher;
use mesh::net::PeerAddr;
use mesh_proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_proto::enrolment::enrolment_service_server::EnrolmentServiceServer;
use mesh_proto::replica::replica_service_server::ReplicaServiceServer;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use self::proxies::Proxies;
use crate::admission::{self, Knowledge};
use crate::auth::certificate::Certificates;
use crate::auth::{Authenticate, Gatekeeper, TrustedNodeAccounts};
use crate::ca::clients::ClientCertificates;
use crate::ca::service::CertificateService;
use crate::ca::serving::{self, ServingCertificate};
use crate::ca::{CurrentAuthority, LeafLifetime};
use crate::push::callers::Callers;
use crate::push::enrolment::Reports;
use crate::push::stream::{Discovery, NodeStreams};
use crate::push::view::{self, View};
use crate::replica::service::{Account, Replica};
use crate::resources::{Acks, Placements, PodDirectory, ReportSink, ResourceStore, lock};
use crate::revision::Revision;

/// These two are read before the caller is known, so they are no larger than they need be.
const MAX_CSR: usize = 64 * 1024;
/// About 100 bytes for each pod of a node.
const MAX_REPORT: usize = 1024 * 1024;
/// As many for each pod that leaves the mesh in the same moment.
const MAX_QUESTION: usize = 1024 * 1024;
/// A stranger gets this long to finish a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at a time; connections beyond are closed, and proxies come back by themselves.
pub(crate) const MAX_HANDSHAKES: usize = 512;
/// Of certificates that are refused in handshakes one is told of at most this often; all are counted.
const TOLD_EVERY: Duration = Duration::from_secs(1);
/// The longest token and what else comes with it.
const MAX_HEADERS: u32 = crate::auth::MAX_TOKEN as u32 + 16 * 1024;
/// Streams of one connection. A proxy needs three.
const MAX_STREAMS: u32 = 128;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// What the operator chooses.
#[derive(Debug, Clone)]
pub struct Settings {
    /// gRPC with TLS.
    pub grpc: SocketAddr,
    /// Metrics, version, readiness and who is connected.
    pub http: SocketAddr,
    /// Admission.
    pub webhook: SocketAddr,
    pub namespace: String,
    /// What the control plane runs as (`SERVICE_ACCOUNT`): by it replicas know each other.
    pub service_account: String,
    pub trust_domain: String,
    /// The serving certificate has the name of its Service.
    pub revision: Revision,
    /// Another DNS name for the serving certificate (`ISTIOD_CUSTOM_HOST`).
    pub custom_host: Option<String>,
    /// Service accounts that act for the pods of their node (`CA_TRUSTED_NODE_ACCOUNTS`).
    pub trusted_node_accounts: TrustedNodeAccounts,
    pub lifetime: LeafLifetime,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            grpc: (Ipv6Addr::UNSPECIFIED, 15012).into(),
            http: (Ipv6Addr::UNSPECIFIED, 15014).into(),
            webhook: (Ipv6Addr::UNSPECIFIED, 15017).into(),
            namespace: "istio-system".to_owned(),
            service_account: "istiod".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            revision: Revision::default(),
            custom_host: None,
            trusted_node_accounts: TrustedNodeAccounts::default(),
            lifetime: LeafLifetime::default(),
        }
    }
}

/// What the server works with.
pub struct Deps {
    pub store: Arc<ResourceStore>,
    pub acks: Arc<Acks>,
    pub pods: Arc<dyn PodDirectory>,
    pub placements: Arc<dyn Placements>,
    /// What objects are judged by.
    pub knowledge: Knowledge,
    pub reports: Arc<dyn ReportSink>,
    pub authority: Arc<CurrentAuthority>,
    /// [`crate::auth::TokenReviewer`] in production.
    pub authenticator: Arc<dyn Authenticate>,
    /// What of MeshConfig is in force, as JSON.
    pub mesh_config: Rendered,
    /// Renders the metric registry for a scrape.
    pub metrics: Rendered,
    pub clock: Clock,
    pub settings: Settings,
}

/// Sockets bound before anything else starts, so that a taken port is an error at start.
#[derive(Debug)]
pub struct Listeners {
    pub grpc: TcpListener,
    pub http: TcpListener,
    pub webhook: TcpListener,
}

impl Listeners {
    /// Binds all ports.
    ///
    /// # Errors
    /// Names the address that cannot be bound.
    pub async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        let bind = async |address: SocketAddr| {
            let bound = match TcpListener::bind(address).await {
                // A host without IPv6 still serves IPv4.
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
                    TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], address.port()))).await
                }
                bound => bound,
            };
            bound.with_context(|| format!("listening on {address}"))
        };
        Ok(Self {
            grpc: bind(settings.grpc).await?,
            http: bind(settings.http).await?,
            webhook: bind(settings.webhook).await?,
        })
    }
}

/// Serves until drained: streams are told to reconnect elsewhere, calls in flight finish, the drain's cut ends the rest.
///
/// # Errors
/// The serving certificate cannot be signed, or a listener fails for good.
pub async fn run(deps: Deps, listeners: Listeners, drain: DrainWatcher) -> anyhow::Result<()> {
    let settings = &deps.settings;
    let clients: Arc<dyn ClientCertVerifier> = ClientCertificates::new(Arc::clone(&deps.authority));
    let gatekeeper = Gatekeeper {
        authenticator: deps.authenticator,
        certificates: Certificates::new(Arc::clone(&clients), settings.trust_domain.as_str().into()),
        pods: Arc::clone(&deps.pods),
        trusted: settings.trusted_node_accounts.clone(),
    };
    let names = serving::dns_names(&settings.namespace, &settings.revision, settings.custom_host.as_deref());
    let certificate = ServingCertificate::new(Arc::clone(&deps.authority), names, deps.clock.clone())?;
    let (views_in, views) = watch::channel(Arc::new(View::new(deps.store.snapshot())));
    let connected = Proxies::new(Arc::clone(&deps.store), Arc::clone(&deps.acks));

    let discovery = Discovery {
        gatekeeper: gatekeeper.clone(),
        views,
        acks: Arc::clone(&deps.acks),
        nodes: NodeStreams::new(Arc::clone(&deps.reports)),
        callers: Callers::default(),
        drain: drain.clone(),
    };
    let certificates = CertificateService {
        gatekeeper: gatekeeper.clone(),
        authority: deps.authority,
        trust_domain: settings.trust_domain.as_str().into(),
        lifetime: settings.lifetime,
        clock: deps.clock,
    };
    let store = Arc::clone(&deps.store);
    let replica = Replica {
        gatekeeper: gatekeeper.clone(),
        store: Arc::clone(&store),
        acks: deps.acks,
        account: Account { namespace: settings.namespace.clone(), name: settings.service_account.clone() },
    };
    let reports = Reports { gatekeeper, store, sink: deps.reports, placements: deps.placements };
    let (handshaken, incoming) = mpsc::channel(16);
    let grpc = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .add_service(discovery)
        .add_service(IstioCertificateServiceServer::new(certificates).max_decoding_message_size(MAX_CSR))
        .add_service(EnrolmentServiceServer::new(reports).max_decoding_message_size(MAX_REPORT))
        .add_service(ReplicaServiceServer::new(replica).max_decoding_message_size(MAX_QUESTION))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), {
            let drain = drain.clone();
            async move { drain.draining().await }
        });

    let _guard = drain.guard();
    // Dropping the set ends whatever is left when this function returns.
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let follower = view::follow(Arc::clone(&deps.store), views_in);
    tasks.spawn(async move {
        follower.await;
        Ok(())
    });
    let acceptor = TlsAcceptor::from(certificate.server_config(&[b"h2"], clients)?);
    let accepting = accept(listeners.grpc, acceptor, handshaken, drain.clone());
    tasks.spawn(async move {
        accepting.await;
        Ok(())
    });
    let nobody = WebPkiClientVerifier::no_client_auth();
    let acceptor = TlsAcceptor::from(certificate.server_config(&[b"h2", b"http/1.1"], nobody)?);
    let mut admitting = JoinSet::new();
    admitting.spawn(admission::serve(listeners.webhook, acceptor, deps.knowledge, drain.clone()));
    let renewing = certificate.renew(drain.clone());
    tasks.spawn(async move {
        renewing.await;
        Ok(())
    });
    let operators = operator_routes(deps.store, deps.pods, (deps.metrics, deps.mesh_config), connected);
    tasks.spawn({
        let drain = drain.clone();
        async move {
            axum::serve(listeners.http, operators)
                .with_graceful_shutdown(async move { drain.draining().await })
                .await
                .context("monitoring port")
        }
    });
    tokio::select! {
        ended = grpc => ended.context("gRPC server")?,
        () = drain.cut() => {}
    }
    // Questions of the API server that are under way are answered.
    tokio::select! {
        _ = admitting.join_next() => {}
        () = drain.cut() => {}
    }
    Ok(())
}

/// Hands over the connections that finish a TLS handshake; garbage costs a bounded wait and a count.
async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    handshaken: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
    drain: DrainWatcher,
) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    mesh::serve::accept_loop(listener, drain, move |stream, peer| {
        let (acceptor, handshaken, slots) = (acceptor.clone(), handshaken.clone(), Arc::clone(&slots));
        async move {
            if let Some(tls) = shake_hands(&acceptor, &slots, stream, peer).await {
                // An error means that the server has ended, and with it this connection.
                let _ = handshaken.send(Ok(tls)).await;
            }
        }
    })
    .await;
}

/// A connection that is through its handshake; one slot for each that is not.
pub(crate) async fn shake_hands(
    acceptor: &TlsAcceptor,
    slots: &Semaphore,
    stream: TcpStream,
    peer: PeerAddr,
) -> Option<TlsStream<TcpStream>> {
    let Ok(_slot) = slots.try_acquire() else {
        refused(peer, "too many handshakes at a time");
        return None;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(tls)) => Some(tls),
        Ok(Err(error)) => {
            let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
            if let Some(rustls::Error::InvalidCertificate(reason)) = cause {
                refused_certificate(peer, reason);
            }
            refused(peer, &error.to_string());
            None
        }
        Err(_) => {
            refused(peer, "timed out");
            None
        }
    }
}

fn refused(peer: PeerAddr, reason: &str) {
    metrics::counter!("pilot_tls_handshake_failures_total").increment(1);
    tracing::debug!(?peer, reason, "TLS handshake");
}

/// Certificates that did not verify, since one was told of.
static REFUSED: Mutex<Untold> = Mutex::new(Untold { told: None, count: 0 });

struct Untold {
    told: Option<Instant>,
    count: u64,
}

impl Untold {
    /// Counts one more. Returns how many there were if it is time to say so.
    fn tell(&mut self, now: Instant) -> Option<u64> {
        self.count += 1;
        if self.told.is_some_and(|told| now < told + TOLD_EVERY) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.count))
    }
}

/// The other end has its alert from the handshake.
fn refused_certificate(peer: PeerAddr, reason: &rustls::CertificateError) {
    metrics::counter!("citadel_server_authentication_failure_count").increment(1);
    if let Some(handshakes) = lock(&REFUSED).tell(Instant::now()) {
        tracing::warn!(?peer, %reason, handshakes, "client certificate refused");
    }
}

/// Text that is made for each who asks.
pub type Rendered = Arc<dyn Fn() -> String + Send + Sync>;

fn operator_routes(
    store: Arc<ResourceStore>,
    pods: Arc<dyn PodDirectory>,
    (metrics, mesh_config): (Rendered, Rendered),
    connected: Proxies,
) -> axum::Router {
    let ready = move || {
        let reason = if !pods.synced() {
            Err((StatusCode::SERVICE_UNAVAILABLE, "waiting for the Kubernetes API\n"))
        } else if store.generation() == 0 {
            Err((StatusCode::SERVICE_UNAVAILABLE, "waiting for the first translation\n"))
        } else {
            Ok("ready\n")
        };
        std::future::ready(reason)
    };
    axum::Router::new()
        .route("/ready", get(ready))
        .route(
            proxies::PATH,
            get(move || std::future::ready(([(header::CONTENT_TYPE, "application/json")], connected.render()))),
        )
        .route(
            "/debug/mesh",
            get(move || std::future::ready(([(header::CONTENT_TYPE, "application/json")], mesh_config()))),
        )
        .route("/version", get(async || concat!(env!("CARGO_PKG_VERSION"), "\n")))
        .route(
            "/metrics",
            get(move || {
                let text = metrics();
                std::future::ready(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
            }),
        )
}

#[cfg(test)]
mod tests;
