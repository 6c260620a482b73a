//! The process that answers for a lab with a cluster: brings it up, keeps it true to the API, takes it down.

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use k8s_openapi::api::apps::v1 as apps;
use k8s_openapi::api::core::v1 as core;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::api::Server;
use super::dns::Zone;
use super::images::Images;
use super::kubelet::{Kubelet, Node, Shared, now};
use super::volumes::HostPaths;
use super::workloads::{Pass, Place, ignore_missing};
use super::{endpoints, probe, services};
use crate::record::Record;
use crate::topology::{self, NodeNet, PARENT_V4, Parent};

/// Changes that arrive within this time are handled together.
const DEBOUNCE: Duration = Duration::from_millis(10);
/// Without any change things are compared this often, so that what failed is tried again.
const RESYNC: Duration = Duration::from_secs(1);
/// How soon a dead API server is noticed.
const SERVER_CHECK: Duration = Duration::from_millis(50);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Options {
    pub id: String,
    /// Names of the nodes.
    pub nodes: Vec<String>,
    pub images: Images,
}

/// A running cluster.
pub struct Supervisor {
    server: Server,
    cluster: Cluster,
}

/// All of it but the API server.
struct Cluster {
    record: Record,
    client: Client,
    nodes: BTreeMap<String, Node>,
    parent: Parent,
}

impl Supervisor {
    /// Creates everything up to the Node objects. A failure leaves nothing behind.
    pub async fn start(options: &Options) -> Result<Self> {
        let record = Record::create(&options.id)?;
        match Self::build(options, &record).await {
            Ok(supervisor) => Ok(supervisor),
            Err(e) => {
                record.take_down().context("cannot clean up")?;
                Err(e)
            }
        }
    }

    async fn build(options: &Options, record: &Record) -> Result<Self> {
        let names: Vec<&str> = options.nodes.iter().map(String::as_str).collect();
        let (parent, nets) = topology::create(record, &names)?;
        let server = Server::start(record, &parent, &options.images.binaries.join("istiod-lite"))?;
        let client = server.client().await?;
        let mut nodes = BTreeMap::new();
        for net in nets {
            let node = prepare(record, net)?;
            announce(&client, &node).await.with_context(|| format!("cannot create Node {}", node.net.name))?;
            nodes.insert(node.net.name.clone(), node);
        }
        Ok(Self { server, cluster: Cluster { record: record.clone(), client, nodes, parent } })
    }

    /// What it owns on this machine.
    pub fn record(&self) -> &Record {
        &self.cluster.record
    }

    /// Keeps the cluster until `end` resolves, then takes it down.
    pub async fn run(self, images: Images, end: impl Future<Output = ()>) -> Result<()> {
        let Self { mut server, cluster } = self;
        let outcome = tokio::select! {
            outcome = cluster.keep(images) => outcome,
            // Apart from the cluster, which waits for answers while the server is away.
            outcome = keep_server(&mut server) => outcome,
            () = end => Ok(()),
        };
        let stopped = server.stop();
        tokio::task::spawn_blocking(move || cluster.record.take_down()).await??;
        outcome.and(stopped)
    }
}

async fn keep_server(server: &mut Server) -> Result<()> {
    loop {
        server.keep()?;
        tokio::time::sleep(SERVER_CHECK).await;
    }
}

impl Cluster {
    async fn keep(&self, images: Images) -> Result<()> {
        let changed = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        let zone = Zone::default();
        tasks.spawn(zone.clone().serve(self.dns_socket()?));
        let pods = watch_all::<core::Pod>(&self.client, &changed, &mut tasks);
        let services = watch_all::<core::Service>(&self.client, &changed, &mut tasks);
        // Workloads are read afresh in each pass; these watches only say when.
        let _deployments = watch_all::<apps::Deployment>(&self.client, &changed, &mut tasks);
        let _daemons = watch_all::<apps::DaemonSet>(&self.client, &changed, &mut tasks);
        let (wake_workloads, workloads_due) = watch::channel(());
        tasks.spawn(workloads(self.client.clone(), self.places(), workloads_due));
        let shared = Shared {
            client: self.client.clone(),
            images,
            run_dir: self.record.run_dir.clone(),
            nodes: self.nodes.clone(),
        };
        let mut kubelet = Kubelet::new(Arc::new(shared));
        let mut network = Network::new(self.client.clone(), self.nodes.clone(), zone);
        loop {
            kubelet.sync(&pods.state());
            wake_workloads.send_replace(());
            if let Err(e) = network.sync(&services.state(), &pods.state()).await {
                eprintln!("services: {e:#}");
            }
            tokio::select! {
                () = changed.notified() => tokio::time::sleep(DEBOUNCE).await,
                () = tokio::time::sleep(RESYNC) => {}
                Some(ended) = tasks.join_next() => ended.context("a task of the lab panicked")??,
            }
        }
    }

    fn places(&self) -> Vec<Place> {
        self.nodes.values().map(|node| Place { name: node.net.name.clone(), labels: labels(&node.net) }).collect()
    }

    fn dns_socket(&self) -> Result<UdpSocket> {
        let socket = self.parent.netns.enter(|| {
            let socket = std::net::UdpSocket::bind((PARENT_V4, 53))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        Ok(UdpSocket::from_std(socket)?)
    }
}

/// Turns workloads into pods, again and again, apart from the loop that runs pods: neither waits for the other.
async fn workloads(client: Client, places: Vec<Place>, mut due: watch::Receiver<()>) -> Result<()> {
    while due.changed().await.is_ok() {
        let pass = Pass { client: &client, places: &places };
        if let Err(e) = Box::pin(pass.run()).await {
            eprintln!("workloads: {e:#}");
        }
    }
    Ok(())
}

/// Services as last written to the API and the nodes.
struct Network {
    client: Client,
    nodes: BTreeMap<String, Node>,
    zone: Zone,
    ruleset: String,
    slices: BTreeMap<String, serde_json::Value>,
}

impl Network {
    fn new(client: Client, nodes: BTreeMap<String, Node>, zone: Zone) -> Self {
        Self { client, nodes, zone, ruleset: String::new(), slices: BTreeMap::new() }
    }

    async fn sync(&mut self, services: &[Arc<core::Service>], pods: &[Arc<core::Pod>]) -> Result<()> {
        let services: Vec<core::Service> = services.iter().map(|service| (**service).clone()).collect();
        let mut pods: Vec<core::Pod> = pods.iter().map(|pod| (**pod).clone()).collect();
        pods.sort_by_key(ResourceExt::name_any);
        self.zone.publish(endpoints::names(&services, &pods));
        let ruleset = services::ruleset(&endpoints::forwards(&services, &pods));
        if ruleset != self.ruleset {
            let nets: Vec<NodeNet> = self.nodes.values().map(|node| node.net.clone()).collect();
            let script = ruleset.clone();
            tokio::task::spawn_blocking(move || nets.iter().try_for_each(|net| services::program(net, &script)))
                .await??;
            self.ruleset = ruleset;
        }
        for service in &services {
            let slices = endpoints::slices(service, &pods);
            let text = serde_json::to_value(&slices)?;
            let uid = service.uid().unwrap_or_default();
            if self.slices.get(&uid) != Some(&text) {
                endpoints::publish(&self.client, service, &slices).await?;
                self.slices.insert(uid, text);
            }
        }
        Ok(())
    }
}

/// Mirrors all objects of a kind and notifies of each change.
fn watch_all<K>(client: &Client, changed: &Arc<Notify>, tasks: &mut JoinSet<Result<()>>) -> reflector::Store<K>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let api: Api<K> = Api::all(client.clone());
    let changed = changed.clone();
    tasks.spawn(async move {
        let stream = watcher(api, watcher::Config::default()).default_backoff().reflect(writer);
        let mut stream = std::pin::pin!(stream);
        while let Some(event) = stream.next().await {
            if let Err(e) = event {
                eprintln!("watch of {}: {e}", K::kind(&()));
            }
            changed.notify_one();
        }
        Ok(())
    });
    reader
}

fn prepare(record: &Record, net: NodeNet) -> Result<Node> {
    let host_paths = HostPaths {
        cgroup: record.cgroup.join(&net.name),
        bpffs: record.bpffs.join(&net.name),
        rest: record.run_dir.join("nodes").join(&net.name),
    };
    let kubelet = host_paths.cgroup.join(probe::Kubelet::CGROUP);
    for directory in [&kubelet, &host_paths.bpffs, &host_paths.rest] {
        fs::create_dir_all(directory)?;
    }
    Ok(Node { cgroup: host_paths.cgroup.clone(), net, host_paths })
}

fn labels(net: &NodeNet) -> BTreeMap<String, String> {
    BTreeMap::from(
        [
            ("kubernetes.io/hostname", net.name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("topology.kubernetes.io/region", "lab"),
            ("topology.kubernetes.io/zone", net.name.as_str()),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    )
}

async fn announce(client: &Client, node: &Node) -> Result<()> {
    let net = &node.net;
    let api = Api::<core::Node>::all(client.clone());
    let object: core::Node = serde_json::from_value(json!({
        "metadata": {"name": net.name, "labels": labels(net)},
        "spec": {"podCIDR": net.pod_cidrs()[0], "podCIDRs": net.pod_cidrs()}
    }))?;
    ignore_missing(api.create(&PostParams::default(), &object).await)?;
    let status = json!({"status": {
        "addresses": [{"type": "InternalIP", "address": net.ipv4}, {"type": "InternalIP", "address": net.ipv6},
            {"type": "Hostname", "address": net.name}],
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "the lab is its kubelet",
            "lastHeartbeatTime": now(), "lastTransitionTime": now()}],
        "nodeInfo": {"architecture": std::env::consts::ARCH, "bootID": "", "containerRuntimeVersion": "lab://1",
            "kernelVersion": kernel()?, "kubeProxyVersion": "", "kubeletVersion": "v1.32.0-lab", "machineID": "",
            "operatingSystem": "linux", "osImage": "the lab's host", "systemUUID": ""}
    }});
    api.patch_status(&net.name, &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}

fn kernel() -> Result<String> {
    Ok(nix::sys::utsname::uname()?.release().to_string_lossy().into_owned())
}
