//! Wiring: control plane on one runtime, one single-threaded runtime per worker for the data path, and the order of
//! start and drain. Nothing of the control side can delay a byte.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context as _;
use mesh::clock::Clock;
use mesh::drain::{self, DrainWatcher};
use mesh::identity::{CaClient, CaConfig, CertificateManager, Identity};
use mesh::model::NamespacedHostname;
use mesh::serve::{AdminServer, Readiness, accept_loop, json};
use mesh::store::Store;
use mesh::telemetry::{self, LogHandle};
use mesh::xds::{NodeInfo, NodeRole, XdsClient, XdsConfig, address_handler};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::config::Config;
use crate::listener::{self, Shared, Worker};
use crate::target::Me;
use crate::world::WorldStore;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Runs until SIGTERM, SIGINT or `/quitquitquit`, then drains.
///
/// # Errors
/// What keeps it from starting: an address in use, settings that contradict each other.
pub fn run(config: Config, log: LogHandle) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()
        .context("starting the control runtime")?;
    runtime.block_on(control(config, log))
}

async fn control(config: Config, log: LogHandle) -> anyhow::Result<()> {
    let metrics = telemetry::metrics_handle();
    telemetry::record_build("waypoint", &config.version_tag);
    let readiness = Readiness::default();
    let (trigger, watcher) = drain::channel();
    let quit = Arc::new(Notify::new());

    let identity = Identity::new(&config.trust_domain, &config.namespace, &config.service_account)
        .context("SERVICE_ACCOUNT, POD_NAMESPACE and TRUST_DOMAIN do not make an identity")?;
    let clock = Clock::system();
    let ca_channel = mesh::grpc::channel(config.ca.clone()).context("CA_ADDRESS")?;
    let ca = CaClient::new(ca_channel, CaConfig { ttl: config.certificate_ttl, impersonate: false }, clock.clone());
    let (certificates, rotation) = CertificateManager::new(Arc::new(ca), clock);
    certificates.prefetch(identity.clone());

    let store = Store::new();
    let world = Arc::new(WorldStore::default());
    let handlers = vec![address_handler(store.clone()), world.route_handler(), world.policy_handler()];
    let xds = XdsClient::new(xds_config(&config), handlers);
    let me = Me {
        service: NamespacedHostname::new(config.namespace.as_str(), config.hostname()),
        network: config.network.as_str().into(),
    };
    let shared =
        Arc::new(Shared::new(config.clone(), me, identity.clone(), store.clone(), world, certificates.clone()));

    let synced = readiness.pending("xds");
    let first_certificate = readiness.pending("certificate");
    let mut xds_synced = xds.synced();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(rotation.run(watcher.clone()));
    tasks.spawn(xds.run(watcher.clone()));
    tasks.spawn(async move {
        if xds_synced.wait_for(|synced| *synced).await.is_ok() {
            drop(synced);
        }
    });
    let wanted = certificates.clone();
    tasks.spawn(async move {
        // `get` waits for the rotation, which retries; an error is one failed try.
        while let Err(error) = wanted.get(&identity).await {
            tracing::warn!(%error, "waiting for the waypoint's certificate");
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
        drop(first_certificate);
    });
    // These outlast the drain, which can so be watched to its end.
    let (admin_end, admin_drain) = drain::channel();
    serve_admin(&config, &shared, &certificates, metrics, log, &readiness, &quit, &admin_drain, &mut tasks).await?;

    let listeners = listeners(&config)?;
    let workers = listeners
        .into_iter()
        .enumerate()
        .map(|(n, listeners)| worker(n, shared.clone(), listeners, watcher.clone()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    tracing::info!(identity = %shared.identity, port = config.hbone_port, workers = workers.len(), "waypoint started");
    drop(watcher);

    wait_for_end(&quit).await?;
    readiness.shutting_down();
    tracing::info!(deadline = ?config.drain_deadline, "draining");
    let outcome = trigger.drain(config.drain_deadline).await;
    tracing::info!(?outcome, "drained");
    for worker in workers {
        let _ = tokio::task::spawn_blocking(move || worker.join()).await;
    }
    admin_end.drain(std::time::Duration::ZERO).await;
    tasks.shutdown().await;
    Ok(())
}

async fn wait_for_end(quit: &Notify) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate()).context("SIGTERM handler")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT handler")?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
        () = quit.notified() => {}
    }
    Ok(())
}

fn xds_config(config: &Config) -> XdsConfig {
    XdsConfig {
        grpc: config.xds.clone(),
        node: NodeInfo {
            role: NodeRole::Waypoint,
            ip: config.instance_ip,
            name: config.pod_name.clone(),
            namespace: config.namespace.clone(),
            node_name: config.node_name.clone(),
            cluster_id: config.cluster_id.clone(),
            metadata: [("GATEWAY_NAME".to_owned(), config.gateway.clone().into())].into(),
        },
    }
}

/// One listener per worker and address family on the same port; the kernel spreads connections over them.
fn listeners(config: &Config) -> anyhow::Result<Vec<Vec<std::net::TcpListener>>> {
    let port = config.hbone_port;
    let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    (0..config.worker_threads)
        .map(|_| {
            let mut list = vec![listen(v4).with_context(|| format!("listening on {v4}"))?];
            // A host without IPv6 is no reason not to serve IPv4.
            list.extend(listen(v6).inspect_err(|error| tracing::info!(%error, "no IPv6 listener")).ok());
            Ok(list)
        })
        .collect()
}

fn listen(address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn worker(
    n: usize,
    shared: Arc<Shared>,
    listeners: Vec<std::net::TcpListener>,
    drain: DrainWatcher,
) -> anyhow::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("worker runtime")?;
    let body = move || runtime.block_on(work(shared, listeners, drain));
    std::thread::Builder::new().name(format!("worker-{n}")).spawn(body).context("starting a worker")
}

async fn work(shared: Arc<Shared>, listeners: Vec<std::net::TcpListener>, drain: DrainWatcher) {
    let worker = Arc::new(Worker::new(shared));
    let guard = drain.guard();
    let accepting = listeners.into_iter().map(|listener| {
        let (worker, drain) = (worker.clone(), drain.clone());
        async move {
            let listener = match TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => return tracing::error!(%error, "a listener is unusable"),
            };
            let watch = drain.clone();
            accept_loop(listener, drain, move |stream, peer| {
                listener::connection(worker.clone(), stream, peer, watch.clone())
            })
            .await;
        }
    });
    tokio::select! {
        _ = futures_util::future::join_all(accepting) => {}
        () = worker.tidy() => {}
    }
    worker.drain(&drain).await;
    drop(guard);
}

#[expect(clippy::too_many_arguments, reason = "wiring: everything meets here once")]
async fn serve_admin(
    config: &Config,
    shared: &Arc<Shared>,
    certificates: &CertificateManager,
    metrics: telemetry::MetricsHandle,
    log: LogHandle,
    readiness: &Readiness,
    quit: &Arc<Notify>,
    watcher: &DrainWatcher,
    tasks: &mut tokio::task::JoinSet<()>,
) -> anyhow::Result<()> {
    let bind = async |ip: Ipv4Addr, port: u16| {
        let address = SocketAddr::from((ip, port));
        TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))
    };
    let (store, certificates, gateway) = (shared.store.clone(), certificates.clone(), config.hostname());
    let quit = quit.clone();
    let admin = AdminServer::new("admin").logging(log).quit(move || quit.notify_one()).route(
        http::Method::GET,
        "/config_dump",
        move |_request| {
            let mut dump = store.snapshot().config_dump();
            let state = serde_json::to_value(certificates.snapshot()).unwrap_or_default();
            dump.insert("certificates".into(), state);
            dump.insert("gateway".into(), gateway.clone().into());
            async move { json(&dump) }
        },
    );
    let stats = AdminServer::new("stats").metrics(metrics);
    let ready = AdminServer::new("readiness").readiness(readiness.clone());
    let admin_listener = bind(Ipv4Addr::LOCALHOST, config.admin_port).await?;
    let stats_listener = bind(Ipv4Addr::UNSPECIFIED, config.stats_port).await?;
    let ready_listener = bind(Ipv4Addr::UNSPECIFIED, config.readiness_port).await?;
    tasks.spawn(admin.serve(admin_listener, watcher.clone()));
    tasks.spawn(stats.serve(stats_listener, watcher.clone()));
    tasks.spawn(ready.serve(ready_listener, watcher.clone()));
    Ok(())
}
