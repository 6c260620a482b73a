//! Wiring: what is made in which order, and how it all ends. No decision about traffic is taken here.
//!
//! Start: settings, privileges, programs, certificates, workers, configuration, pods, servers; ready once the control
//! plane's first answers are in and every pod of the first list was tried. End: readiness drops; accepting goes on,
//! for a successor may still be starting; pods drain; what is left at the deadline is cut, or lives on without the
//! container where the settings say so ([`crate::handover`]).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ebpf_loader::Capture;
use futures_util::FutureExt;
use futures_util::future::join_all;
use mesh::drain::{self, DrainWatcher};
use mesh::identity::HandshakeRules;
use mesh::serve::Readiness;
use mesh::store::Store;
use mesh::telemetry::{self, LogHandle};
use mesh::xds::local::LocalSource;
use mesh::xds::{NodeInfo, NodeRole, ResourceHandler, XdsClient, XdsConfig, address_handler, authorization_handler};
use mesh_proto::enrolment::PodState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use ztunnel_cni::namespaces::Namespaces;

use crate::config::{CaSource, Config, Dedicated, Mode};
use crate::dedicated::open::{self, Open};
use crate::dns::resolv;
use crate::handover::cgroup::Shelter;
use crate::handover::drainer::Drainer;
use crate::handover::follow::{Follower, Generations};
use crate::handover::supervisor::Leash;
use crate::handover::{self, live_on};
use crate::names::{Names, Servers};
use crate::node::backend::redirect;
use crate::node::enrolment::Desired;
use crate::node::find::{self, Finder};
use crate::node::host::Host;
use crate::node::manager::{self, Manager};
use crate::node::orders::Orders;
use crate::node::tenure::Tenure;
use crate::node::{Registry, enrolment, orders, report};
use crate::worker::{Shared, Workers};
use crate::zds::{self, agent::Agent, pods::Pods};
use crate::{admin, capture, certs, cni, dedicated, privileges, revocation};

/// Control plane, enrolment, metrics and admin: enough that one slow task does not hold up another.
const CONTROL_THREADS: usize = 2;

/// Names the servers for names of endpoints, and those that are asked where a pod's own cannot be told.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// For tasks on the control runtime that do not end by themselves, such as a name that is being resolved.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often a draining ztunnel looks for its successor, and how long it still accepts once there is one.
const SUCCESSOR_POLL: Duration = Duration::from_millis(100);
const HALF_DONE: Duration = Duration::from_secs(1);
/// For peers to hear that they shall open no more tunnels, and for short connections to end.
const GOODBYE: Duration = Duration::from_secs(1);
/// For connections and tunnels that are being opened; those that take longer fail.
const SETTLE: Duration = Duration::from_secs(10);
const SETTLE_POLL: Duration = Duration::from_millis(20);

/// Runs until SIGTERM, SIGINT or `/quitquitquit`, and through the drain that follows.
///
/// # Errors
/// What kept it from starting.
pub fn run(mut config: Config, log: LogHandle) -> anyhow::Result<()> {
    // Before there is a second thread.
    let leash = config.supervisor.map(Leash::tie).transpose().context("ZTUNNEL_SUPERVISOR")?;
    let metrics = telemetry::metrics_handle();
    telemetry::record_build("ztunnel", &config.version_tag);
    privileges::check(&config)?;
    privileges::lift_file_limit();
    let (revocations, crl) = config.crl.as_deref().map(revocation::open).transpose()?.unzip();
    let source = Source::open(&config)?;
    if config.mode.dedicated().is_some() {
        let ca = if let CaSource::Remote(ca) = &mut config.ca { Some(ca) } else { None };
        config.xds.iter_mut().chain(ca).for_each(|plane| plane.dialer = dedicated::control::dialer());
    }
    let control = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .context("making the control runtime")?;
    let config = Arc::new(config);
    let generation = handover::generation();
    let registry = Arc::new(Registry::default());
    let generations = Generations::new(&generation, &config.version_tag, &registry, config.draining_generations);
    let (workers, certs, shelter) = control.block_on(async {
        let ports = admin::Ports::bind(&config).await?;
        // Enrolment ends first; what feeds open connections (policy, certificates) when they have ended.
        let (enrolment_end, enrolling) = drain::channel();
        let (feeds_end, drain) = drain::channel();
        let rules = HandshakeRules { key_exchange: config.key_exchange, revocations: revocations.clone() };
        let (certs, rotation) = certs::open(&config, rules)?;
        let names = Names::new(Servers::File(RESOLV_CONF.into()), config.ipv6);
        let (demand, demanded) = config.on_demand.then(mesh::xds::demand).unzip();
        let shared = Shared {
            config: config.clone(),
            store: Store::new(),
            certs: certs.clone(),
            names,
            joins: Arc::default(),
            hearsay: Arc::default(),
            demand,
            handshakes: Arc::default(),
        };
        let workers = Arc::new(Workers::start(&shared).context("starting workers")?);
        let data = workers.runtimes().iter().enumerate().map(|(n, runtime)| (n.to_string(), runtime.clone()));
        telemetry::watch_runtimes(data.chain([("control".to_owned(), control.handle().clone())]).collect());
        let readiness = Readiness::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(rotation.run(drain.clone()));
        if let Some((file, revocations)) = crl.zip(revocations.clone()) {
            tasks.spawn(file.run(drain.clone()));
            tasks.spawn(revocation::cut_on_load(revocations, registry.clone(), drain.clone()));
        }

        let finder = match &source {
            Source::ControlPlane { finder, .. } => Some(finder.clone()),
            Source::Agent { .. } | Source::Uncaptured { .. } => None,
        };
        let cni_finder = finder.clone();
        let PodSource { runner, handler: pods, reports, settled, successor, handed_over, search } =
            source.into_pods(&shared, &workers, &registry, &enrolling);
        if let Some(Search { settings, publish }) = search {
            let store = shared.store.clone();
            tasks.spawn(dedicated::follow(config.clone(), settings, store, publish, enrolling.clone()));
        }
        let mut ready: Vec<_> = settled.into_iter().map(|sign| ("pods", sign)).collect();
        let mut control_plane = None;
        if let Some(path) = &config.local_xds {
            let local = LocalSource::new(path, shared.store.clone(), pods.clone());
            local.load().with_context(|| format!("LOCAL_XDS_PATH={}", path.display()))?;
            tasks.spawn(local.run(drain.clone()));
        }
        if let Some(grpc) = &config.xds {
            let store = &shared.store;
            let mut handlers = vec![address_handler(store.clone()), authorization_handler(store.clone())];
            handlers.extend(pods);
            let xds = XdsConfig { grpc: grpc.clone(), node: node_info(&config) };
            let client = match demanded {
                Some(demanded) => XdsClient::on_demand(xds, handlers, demanded),
                None => XdsClient::new(xds, handlers),
            };
            ready.push(("control plane", client.synced()));
            if let Some(reports) = reports {
                control_plane = Some(mesh::grpc::channel(grpc.clone()).context("XDS_ADDRESS")?);
                tasks.spawn(report::run(client.link(), reports, enrolling.clone()));
            }
            tasks.spawn(client.run(drain.clone()));
        }
        let synced = ready.iter().find(|(name, _)| *name == "control plane").map(|(_, s)| s.clone());
        if let Runner::Agent(_, sign) = &runner {
            tasks.spawn(follow(sign.clone(), readiness.clone()));
        }
        if let Some(finder) = finder.filter(|_| leash.is_some()) {
            let sockets = handover::prepare_run_dir(&config.run_dir)
                .with_context(|| format!("making RUN_DIR {}", config.run_dir.display()))?;
            handover::remove_marker(&config.run_dir);
            let follower = Follower {
                sockets,
                cgroup_root: config.cgroup_root.clone(),
                store: shared.store.clone(),
                synced: synced.clone(),
                registry: registry.clone(),
                finder,
                log: log.clone(),
                generations: generations.clone(),
                revocations: revocations.clone(),
            };
            tasks.spawn(follower.run(enrolling.clone()));
        }
        if let Some(((path, finder), (orders, desired))) = config.cni.socket.as_ref().zip(cni_finder).zip(handed_over) {
            let listener =
                cni::server::Listener::bind(path).with_context(|| format!("CNI_SOCKET={}", path.display()))?;
            let deps = cni::server::Deps {
                orders,
                desired,
                registry: registry.clone(),
                finder,
                control_plane,
                namespaces: Namespaces::open(&config.cni.state),
                readiness: readiness.clone(),
            };
            tasks.spawn(cni::server::run(listener, deps, enrolling.clone()));
        }
        if let Some(directories) = config.cni.install.clone() {
            // A plugin that is new on this node asks nobody who has nothing to say yet.
            let (synced, drain, entry) = (synced.clone(), enrolling.clone(), config.cni.entry());
            tasks.spawn(async move {
                if wait(synced, &drain).await {
                    cni::install::run(directories, entry, drain).await;
                }
            });
        }
        // Pods are enrolled on top of everything that is known, so that no connection meets an empty store.
        tasks.spawn(async move {
            if wait(synced, &enrolling).await {
                match runner {
                    Runner::Manager(manager) => manager.run(enrolling).await,
                    Runner::Agent(agent, _) => agent.run().await,
                    Runner::Open(open) => open.run(enrolling).await,
                }
            }
        });
        tasks.spawn(policy_changes(shared.clone(), registry.clone(), drain.clone()));
        for (name, mut sign) in ready {
            let pending = readiness.pending(name);
            tasks.spawn(async move {
                // An error means that the sender ended with the drain; readiness is down by then.
                let _ = sign.wait_for(|ok| *ok).await;
                drop(pending);
            });
        }
        let (quit, quit_asked) = watch::channel(false);
        // These outlast the drain: it can be watched to its end.
        let (admin_end, admin_drain) = drain::channel();
        let (shown, ready) = (registry.clone(), readiness.clone());
        let admin = admin::Deps {
            shared,
            registry: shown,
            readiness: ready,
            metrics: metrics.clone(),
            log: log.clone(),
            generations,
            quit,
        };
        admin::start(ports, admin, &mut tasks, &admin_drain);

        let version = crate::VERSION;
        tracing::info!(node = %config.node_name, workers = workers.count(), version, "started");
        until_asked_to_end(quit_asked).await?;
        readiness.shutting_down();
        enrolment_end.drain(Duration::ZERO).await;
        let shelter = drain_pods(&config, &registry, &successor, leash.as_ref().map(|_| &*generation)).await;
        feeds_end.drain(Duration::ZERO).await;
        if config.mode.dedicated().is_some_and(|d| d.release_on_exit) && !successor.serves_all(&registry) {
            dedicated::release::take_away(&config).await.context("releasing this network namespace")?;
            tracing::info!("released: nothing is captured any more");
        }
        admin_end.drain(Duration::ZERO).await;
        tasks.shutdown().await;
        anyhow::Ok((workers, certs, shelter))
    })?;
    // With it go configuration, the way to the control plane and its token.
    control.shutdown_timeout(LAST_WORDS);
    let mut outcome = Ok(());
    if let Some((shelter, leash)) = shelter.zip(leash) {
        certs.forget_all();
        let drainer = Drainer {
            generation,
            version: config.version_tag.clone(),
            since: std::time::SystemTime::now(),
            limit: config.detached_drain,
            orphaned: config.orphaned_drain,
            run_dir: config.run_dir.clone(),
            registry,
            revocations,
            metrics,
            log,
        };
        outcome = live_on(drainer, leash, &workers).map(drop).context("living on without the container");
        shelter.leave();
    }
    if let Some(workers) = Arc::into_inner(workers) {
        workers.stop();
    }
    outcome
}

/// Where pods are looked for, and the namespace their probes come from.
fn surroundings(config: &Config, capture: &Capture) -> anyhow::Result<(Host, Finder)> {
    if config.mode.dedicated().is_some() {
        return Ok((Host::none(), Finder::own()));
    }
    let netns = &config.host_netns;
    let opening = || format!("opening the node's network namespace {}", netns.display());
    let host = Host::open(netns).with_context(opening)?;
    if let Some(file) = host.file() {
        capture.set_host(file)?;
    }
    if !find::shows_the_node(&config.proc_root) {
        anyhow::bail!(
            "process 1 of {} is ztunnel: the node's processes are not there (hostPID)",
            config.proc_root.display()
        );
    }
    let finder = Finder::new(&config.proc_root, &config.cgroup_root, host.inode())
        .with_context(|| format!("reading {} and {}", config.proc_root.display(), config.cgroup_root.display()))?;
    Ok((host, finder))
}

/// Where pods come from, opened.
enum Source {
    /// The control plane names them; capture is ours.
    ControlPlane { capture: Arc<Capture>, host: Host, finder: Finder },
    /// A CNI agent hands them over, and captures.
    Agent { path: PathBuf, dns_servers: Vec<SocketAddr> },
    /// The one workload of dedicated mode, with capture off.
    Uncaptured { dns_servers: Vec<SocketAddr> },
}

/// Who runs the pods, and what the rest needs to know of it.
struct PodSource {
    runner: Runner,
    /// Takes the control plane's enrolments, where those count.
    handler: Option<Arc<dyn ResourceHandler>>,
    reports: Option<watch::Receiver<Vec<PodState>>>,
    settled: Option<watch::Receiver<bool>>,
    successor: Successor,
    /// Where others hand pods over to, and the enrolments that were pushed.
    handed_over: Option<(Orders, watch::Receiver<Desired>)>,
    search: Option<Search>,
}

/// In dedicated mode: how the one workload is told, once it is found.
struct Search {
    settings: Dedicated,
    publish: watch::Sender<Desired>,
}

enum Runner {
    Manager(Box<Manager>),
    /// With its readiness, which may be lost again.
    Agent(Box<Agent>, watch::Receiver<bool>),
    Open(Box<Open>),
}

impl Source {
    fn open(config: &Config) -> anyhow::Result<Self> {
        if let Some(path) = &config.agent {
            let text = std::fs::read_to_string(RESOLV_CONF).with_context(|| format!("reading {RESOLV_CONF}"))?;
            return Ok(Self::Agent { path: path.clone(), dns_servers: resolv::servers(&text) });
        }
        if config.mode.is_capture_off() {
            let text = std::fs::read_to_string(RESOLV_CONF).with_context(|| format!("reading {RESOLV_CONF}"))?;
            return Ok(Self::Uncaptured { dns_servers: resolv::servers(&text) });
        }
        if config.mode.dedicated().is_some() {
            dedicated::release::refuse_foreign_pins(config)?;
        }
        let capture = capture::open(config).context("setting up capture")?;
        let (host, finder) = surroundings(config, &capture)?;
        Ok(Self::ControlPlane { capture, host, finder })
    }

    fn into_pods(
        self,
        shared: &Shared,
        workers: &Arc<Workers>,
        registry: &Arc<Registry>,
        enrolling: &DrainWatcher,
    ) -> PodSource {
        let (shared, workers, registry) = (shared.clone(), workers.clone(), registry.clone());
        match self {
            Self::ControlPlane { capture, host, finder } => {
                let tenure = Arc::new(Tenure::new(&shared.config.bpffs_dir));
                let (handler, desired, search) = match &shared.config.mode {
                    Mode::Shared => {
                        let (handler, desired) = enrolment::handler();
                        (Some(handler), desired, None)
                    }
                    // The one pod is no enrolment of the control plane's.
                    Mode::Dedicated(settings) => {
                        let (publish, desired) = watch::channel(Desired::default());
                        (None, desired, Some(Search { settings: settings.clone(), publish }))
                    }
                };
                let successor = Successor::Tenure(tenure.clone());
                let (orders, ordered) = orders::channel();
                let handed_over = Some((orders, desired.clone()));
                let deps = manager::Deps {
                    shared,
                    capture,
                    host,
                    finder,
                    workers,
                    registry,
                    desired,
                    orders: ordered,
                    tenure,
                };
                let (manager, reports, settled) = Manager::new(deps);
                PodSource {
                    runner: Runner::Manager(Box::new(manager)),
                    reports: handler.is_some().then_some(reports),
                    handler,
                    settled: Some(settled),
                    successor,
                    handed_over,
                    search,
                }
            }
            Self::Uncaptured { dns_servers } => {
                let (publish, desired) = watch::channel(Desired::default());
                let search = shared.config.mode.dedicated().map(|d| Search { settings: d.clone(), publish });
                let successor = Successor::Listeners { own: workers.count() };
                let deps = open::Deps { shared, workers, registry, desired, dns_servers: dns_servers.into() };
                let (open, settled) = Open::new(deps);
                let runner = Runner::Open(Box::new(open));
                PodSource {
                    runner,
                    handler: None,
                    reports: None,
                    settled: Some(settled),
                    successor,
                    handed_over: None,
                    search,
                }
            }
            Self::Agent { path, dns_servers } => {
                let successor = Successor::Listeners { own: workers.count() };
                let pods = Pods::new(zds::pods::Deps { shared, workers, registry, dns_servers: dns_servers.into() });
                let (agent, ready) = Agent::new(&path, pods, enrolling.clone());
                let runner = Runner::Agent(Box::new(agent), ready);
                PodSource {
                    runner,
                    handler: None,
                    reports: None,
                    settled: None,
                    successor,
                    handed_over: None,
                    search: None,
                }
            }
        }
    }
}

/// How a ztunnel that ends learns that another has taken over.
enum Successor {
    /// By the claim beside the pins.
    Tenure(Arc<Tenure>),
    /// By listeners on a pod's ports that are not our own.
    Listeners { own: usize },
}

impl Successor {
    fn serves_all(&self, registry: &Registry) -> bool {
        match self {
            Self::Tenure(tenure) => tenure.is_lost(),
            Self::Listeners { own } => {
                registry.pods().iter().all(|pod| redirect::serving(&pod.netns).is_ok_and(|all| all > *own))
            }
        }
    }
}

/// Keeps readiness as `sign` says.
fn follow(mut sign: watch::Receiver<bool>, readiness: Readiness) -> impl Future<Output = ()> {
    let name = "pods of the CNI agent";
    // Before the first question can come.
    let mut pending = Some(readiness.pending(name));
    async move {
        loop {
            if *sign.borrow_and_update() {
                pending = None;
            } else if pending.is_none() {
                pending = Some(readiness.pending(name));
            }
            if sign.changed().await.is_err() {
                // The end; readiness as a whole is down by then.
                return;
            }
        }
    }
}

/// False when the drain began first.
async fn wait(sign: Option<watch::Receiver<bool>>, drain: &DrainWatcher) -> bool {
    let Some(mut sign) = sign else { return true };
    tokio::select! {
        seen = sign.wait_for(|ok| *ok) => seen.is_ok(),
        () = drain.draining() => false,
    }
}

fn node_info(config: &Config) -> NodeInfo {
    NodeInfo {
        role: NodeRole::Ztunnel,
        ip: config.instance_ip,
        name: config.pod_name.clone(),
        namespace: config.pod_namespace.clone(),
        node_name: config.node_name.clone(),
        cluster_id: config.cluster_id.clone(),
        metadata: config.node_metadata.clone(),
    }
}

/// Asks policy again for open connections whenever the store has changed, and cuts those that are denied now.
async fn policy_changes(shared: Shared, registry: Arc<Registry>, drain: DrainWatcher) {
    let mut changes = shared.store.watch();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = drain.draining() => return,
        }
        let world = shared.store.snapshot();
        for pod in registry.pods() {
            let cut = pod.connections.reevaluate(&world, &pod.workload_uid);
            if cut > 0 {
                let (pod, namespace) = (&pod.name, &pod.namespace);
                tracing::info!(%pod, %namespace, cut, "policy no longer allows open connections");
            }
        }
    }
}

async fn until_asked_to_end(mut quit: watch::Receiver<bool>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let by = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        // The sender lives in the admin server, which is still there.
        Ok(_) = quit.wait_for(|asked| *asked) => "/quitquitquit",
    };
    tracing::info!(by, "asked to end");
    Ok(())
}

/// The drain. Pins stay: whoever comes next takes over from them, and until then the pods' new connections are refused.
/// Where this `generation` may live on without its container, what is left open after a moment is not waited for: it is
/// then out of the container's cgroups.
async fn drain_pods(
    config: &Config,
    registry: &Registry,
    successor: &Successor,
    generation: Option<&str>,
) -> Option<Shelter> {
    let deadline = Instant::now() + config.termination_deadline;
    // Without a successor we are still better than nobody, until the time that open connections need to end.
    let accepting = config.termination_deadline.saturating_sub(config.drain_deadline);
    if !registry.pods().is_empty() {
        tracing::info!(seconds = accepting.as_secs_f64(), "accepting until a successor has taken over");
        let taken_over = async {
            while !successor.serves_all(registry) {
                tokio::time::sleep(SUCCESSOR_POLL).await;
            }
            // What is new goes to the successor's listeners; handshakes that were half done are still ours.
            tokio::time::sleep(HALF_DONE).await;
        };
        let _ = tokio::time::timeout(accepting, taken_over).await;
        tracing::info!("no longer accepting");
    }
    let left = || deadline.saturating_duration_since(Instant::now());
    if let Some(generation) = generation
        && let Some(shelter) = leave_container(config, registry, generation, left()).await
    {
        return Some(shelter);
    }
    let left = left();
    let mut pods = JoinSet::new();
    for pod in registry.pods() {
        pods.spawn(async move { pod.drain(left).await });
    }
    pods.join_all().await;
    tracing::info!("drained");
    None
}

/// Brings what is half done to an end, so that no socket need be made any more, and leaves the container's cgroups.
/// `None` where there is no reason to, or it could not be done.
async fn leave_container(config: &Config, registry: &Registry, generation: &str, left: Duration) -> Option<Shelter> {
    let pods = registry.pods();
    pods.iter().for_each(|pod| pod.stop_accepting());
    let finished = || join_all(pods.iter().map(|pod| pod.finished()));
    if tokio::time::timeout(GOODBYE.min(left), finished()).await.is_ok() {
        return None;
    }
    pods.iter().for_each(|pod| pod.close_door());
    let settled = async {
        while pods.iter().any(|pod| pod.is_opening()) {
            tokio::time::sleep(SETTLE_POLL).await;
        }
    };
    let _ = tokio::time::timeout(SETTLE.min(left / 2), settled).await;
    if finished().now_or_never().is_some() {
        return None;
    }
    let open = registry.open_connections();
    match Shelter::enter(&config.cgroup_root, &config.proc_root, generation) {
        Ok(shelter) => {
            let (limit, orphaned) = (config.detached_drain.as_secs(), config.orphaned_drain.as_secs());
            tracing::info!(%generation, open, limit, orphaned, "open connections live on without the container");
            Some(shelter)
        }
        Err(error) => {
            tracing::error!(%error, open, "connections end with the container, as it cannot be left");
            None
        }
    }
}
