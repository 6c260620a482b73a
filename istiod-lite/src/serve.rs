//! The control plane's ports: 15012, gRPC with TLS (discovery, certificates, enrolment reports), and 15014, plain HTTP
//! for operators (metrics, version, readiness). Wiring only.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::http::{StatusCode, header};
use axum::routing::get;
use mesh::clock::Clock;
use mesh::drain::DrainWatcher;
use mesh::net::PeerAddr;
use mesh_proto::ads::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use mesh_proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_proto::enrolment::enrolment_service_server::EnrolmentServiceServer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::auth::{Authenticate, Gatekeeper, TrustedNodeAccounts};
use crate::ca::service::CertificateService;
use crate::ca::serving::{self, ServingCertificate};
use crate::ca::{Authority, LeafLifetime};
use crate::push::enrolment::Reports;
use crate::push::stream::{Discovery, NodeStreams};
use crate::push::view::{self, View};
use crate::resources::{Acks, Placements, PodDirectory, ReportSink, ResourceStore};

/// Requests carry the versions of all a returning client holds: about 100 bytes for each of 100,000 resources and more.
const MAX_REQUEST: usize = 64 * 1024 * 1024;
/// These two are read before the caller is known, so they are no larger than they need be.
const MAX_CSR: usize = 64 * 1024;
/// About 100 bytes for each pod of a node.
const MAX_REPORT: usize = 1024 * 1024;
/// A stranger gets this long to finish a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at a time; connections beyond are closed, and proxies come back by themselves.
const MAX_HANDSHAKES: usize = 512;
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
    /// Metrics, version and readiness.
    pub http: SocketAddr,
    pub namespace: String,
    pub trust_domain: String,
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
            namespace: "istio-system".to_owned(),
            trust_domain: "cluster.local".to_owned(),
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
    pub reports: Arc<dyn ReportSink>,
    pub authority: Arc<Authority>,
    /// [`crate::auth::TokenReviewer`] in production.
    pub authenticator: Arc<dyn Authenticate>,
    /// Renders the metric registry for a scrape.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    pub clock: Clock,
    pub settings: Settings,
}

/// Sockets bound before anything else starts, so that a taken port is an error at start.
#[derive(Debug)]
pub struct Listeners {
    pub grpc: TcpListener,
    pub http: TcpListener,
}

impl Listeners {
    /// Binds both ports.
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
        Ok(Self { grpc: bind(settings.grpc).await?, http: bind(settings.http).await? })
    }
}

/// Serves until drained: streams are told to reconnect elsewhere, calls in flight finish, the drain's cut ends the rest.
///
/// # Errors
/// The serving certificate cannot be signed, or a listener fails for good.
pub async fn run(deps: Deps, listeners: Listeners, drain: DrainWatcher) -> anyhow::Result<()> {
    let settings = &deps.settings;
    let gatekeeper = Gatekeeper {
        authenticator: deps.authenticator,
        pods: Arc::clone(&deps.pods),
        trusted: settings.trusted_node_accounts.clone(),
    };
    let names = serving::dns_names(&settings.namespace, settings.custom_host.as_deref());
    let certificate = ServingCertificate::new(Arc::clone(&deps.authority), names, deps.clock.clone())?;
    let (views_in, views) = watch::channel(Arc::new(View::new(deps.store.snapshot())));

    let discovery = Discovery {
        gatekeeper: gatekeeper.clone(),
        views,
        acks: deps.acks,
        nodes: NodeStreams::new(Arc::clone(&deps.reports)),
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
    let reports = Reports { gatekeeper, store, sink: deps.reports, placements: deps.placements };
    let (handshaken, incoming) = mpsc::channel(16);
    let grpc = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .add_service(AggregatedDiscoveryServiceServer::new(discovery).max_decoding_message_size(MAX_REQUEST))
        .add_service(IstioCertificateServiceServer::new(certificates).max_decoding_message_size(MAX_CSR))
        .add_service(EnrolmentServiceServer::new(reports).max_decoding_message_size(MAX_REPORT))
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
    let acceptor = TlsAcceptor::from(certificate.server_config()?);
    let accepting = accept(listeners.grpc, acceptor, handshaken, drain.clone());
    tasks.spawn(async move {
        accepting.await;
        Ok(())
    });
    let renewing = certificate.renew(drain.clone());
    tasks.spawn(async move {
        renewing.await;
        Ok(())
    });
    let operators = operator_routes(deps.store, deps.pods, deps.metrics);
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
        ended = grpc => ended.context("gRPC server"),
        () = drain.cut() => Ok(()),
    }
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
            let Ok(_slot) = slots.try_acquire() else { return refused(peer, "too many handshakes at a time") };
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(tls)) => {
                    // An error means that the server has ended, and with it this connection.
                    let _ = handshaken.send(Ok(tls)).await;
                }
                Ok(Err(error)) => refused(peer, &error.to_string()),
                Err(_) => refused(peer, "timed out"),
            }
        }
    })
    .await;
}

fn refused(peer: PeerAddr, reason: &str) {
    metrics::counter!("pilot_tls_handshake_failures_total").increment(1);
    tracing::debug!(?peer, reason, "TLS handshake");
}

fn operator_routes(
    store: Arc<ResourceStore>,
    pods: Arc<dyn PodDirectory>,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
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
