//! Wiring: what is made in which order, and how it all ends. No decision about traffic is taken here.
//!
//! Start: settings, privileges, programs, certificates, workers, configuration, pods, servers; ready once the control
//! plane's first answers are in and every pod of the first list was tried. End: readiness drops; accepting goes on,
//! for a successor may still be starting; pods drain; what is left at the deadline is cut.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use mesh::drain::{self, DrainWatcher};
use mesh::serve::Readiness;
use mesh::store::Store;
use mesh::telemetry::{self, LogHandle};
use mesh::xds::local::LocalSource;
use mesh::xds::{NodeInfo, NodeRole, XdsClient, XdsConfig, address_handler, authorization_handler};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::Config;
use crate::node::find::Finder;
use crate::node::host::Host;
use crate::node::manager::{self, Manager};
use crate::node::tenure::Tenure;
use crate::node::{Registry, enrolment, report};
use crate::worker::{Shared, Workers};
use crate::{admin, capture, certs, privileges};

/// Control plane, enrolment, metrics and admin: enough that one slow task does not hold up another.
const CONTROL_THREADS: usize = 2;

/// For tasks on the control runtime that do not end by themselves, such as a name that is being resolved.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often a draining ztunnel looks for its successor, and how long it still accepts once there is one.
const SUCCESSOR_POLL: Duration = Duration::from_millis(100);
const HALF_DONE: Duration = Duration::from_secs(1);

/// Runs until SIGTERM, SIGINT or `/quitquitquit`, and through the drain that follows.
///
/// # Errors
/// What kept it from starting.
pub fn run(config: Config, log: LogHandle) -> anyhow::Result<()> {
    let metrics = telemetry::metrics_handle();
    telemetry::record_build("ztunnel", &config.version_tag);
    privileges::check()?;
    privileges::lift_file_limit();
    let capture =
        capture::open(&config.bpffs_dir, &config.cgroup_root, &config.excluded_destinations, config.dns_capture)
            .context("setting up capture")?;
    let host = Host::open(&config.host_netns)
        .with_context(|| format!("opening the node's network namespace {}", config.host_netns.display()))?;
    capture.set_host(host.file())?;
    let finder = Finder::new(&config.proc_root, &config.cgroup_root, host.inode())
        .with_context(|| format!("reading {} and {}", config.proc_root.display(), config.cgroup_root.display()))?;
    let control = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .context("making the control runtime")?;
    let config = Arc::new(config);
    let workers = control.block_on(async {
        let ports = admin::Ports::bind(&config).await?;
        // Enrolment ends first; what feeds open connections (policy, certificates) when they have ended.
        let (enrolment_end, enrolling) = drain::channel();
        let (feeds_end, drain) = drain::channel();
        let (certs, rotation) = certs::open(&config)?;
        let shared = Shared { config: config.clone(), store: Store::new(), certs };
        let workers = Arc::new(Workers::start(&shared).context("starting workers")?);
        let registry = Arc::new(Registry::default());
        let readiness = Readiness::default();
        let tenure = Arc::new(Tenure::new(&config.bpffs_dir));
        let mut tasks = JoinSet::new();
        tasks.spawn(rotation.run(drain.clone()));

        let (pods, desired) = enrolment::handler();
        let deps = manager::Deps {
            shared: shared.clone(),
            capture,
            host,
            finder,
            workers: workers.clone(),
            registry: registry.clone(),
            desired,
            tenure: tenure.clone(),
        };
        let (manager, reports, settled) = Manager::new(deps);

        let mut ready = vec![("pods", settled)];
        if let Some(path) = &config.local_xds {
            let local = LocalSource::new(path, shared.store.clone(), Some(pods.clone()));
            local.load().with_context(|| format!("LOCAL_XDS_PATH={}", path.display()))?;
            tasks.spawn(local.run(drain.clone()));
        }
        if let Some(grpc) = &config.xds {
            let store = &shared.store;
            let handlers = vec![address_handler(store.clone()), authorization_handler(store.clone()), pods];
            let xds = XdsConfig { grpc: grpc.clone(), node: node_info(&config), on_demand: false };
            let client = XdsClient::new(xds, handlers);
            ready.push(("control plane", client.synced()));
            let channel = mesh::grpc::channel(grpc.clone()).context("XDS_ADDRESS")?;
            tasks.spawn(report::run(channel, reports, client.connected(), enrolling.clone()));
            tasks.spawn(client.run(drain.clone()));
        }
        // Pods are enrolled on top of everything that is known, so that no connection meets an empty store.
        let synced = ready.iter().find(|(name, _)| *name == "control plane").map(|(_, s)| s.clone());
        tasks.spawn(async move {
            if wait(synced, &enrolling).await {
                manager.run(enrolling).await;
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
        let admin = admin::Deps { shared, registry: shown, readiness: ready, metrics, log, quit };
        admin::start(ports, admin, &mut tasks, &admin_drain);

        let version = crate::VERSION;
        tracing::info!(node = %config.node_name, workers = workers.count(), version, "started");
        until_asked_to_end(quit_asked).await?;
        readiness.shutting_down();
        enrolment_end.drain(Duration::ZERO).await;
        drain_pods(&config, &registry, &tenure).await;
        feeds_end.drain(Duration::ZERO).await;
        admin_end.drain(Duration::ZERO).await;
        tasks.shutdown().await;
        anyhow::Ok(workers)
    })?;
    if let Some(workers) = Arc::into_inner(workers) {
        workers.stop();
    }
    control.shutdown_timeout(LAST_WORDS);
    Ok(())
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
async fn drain_pods(config: &Config, registry: &Registry, tenure: &Tenure) {
    let deadline = Instant::now() + config.termination_deadline;
    // Without a successor we are still better than nobody, until the time that open connections need to end.
    let accepting = config.termination_deadline.saturating_sub(config.drain_deadline);
    if !registry.pods().is_empty() {
        tracing::info!(seconds = accepting.as_secs_f64(), "accepting until a successor has taken over");
        let taken_over = async {
            while !tenure.is_lost() {
                tokio::time::sleep(SUCCESSOR_POLL).await;
            }
            // What is new goes to the successor's listeners; handshakes that were half done are still ours.
            tokio::time::sleep(HALF_DONE).await;
        };
        let _ = tokio::time::timeout(accepting, taken_over).await;
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let mut pods = JoinSet::new();
    for pod in registry.pods() {
        pods.spawn(async move { pod.drain(left).await });
    }
    pods.join_all().await;
    tracing::info!("drained");
}
