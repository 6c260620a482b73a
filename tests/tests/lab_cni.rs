//! The CNI plugin under real runtimes: Debian's containerd and cnitool hand over pods, and not one packet of them leaves
//! for a mesh peer in clear.

#[path = "support/cri.rs"]
mod cri;
#[path = "support/runtime.rs"]
mod runtime;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use mesh_tests::capture::{Capture, Wire};
use mesh_tests::cluster::api;
use mesh_tests::cluster::kubelet::RUN_ELSEWHERE;
use mesh_tests::topology::Netns;
use mesh_tests::wait;
use serde_json::json;
use support::{Stage, said};

use cri::{Linux, Metadata, Runtime, SandboxConfig};
use runtime::{IMAGE, NodeView, PodObject};

const NODE: &str = "node-a";
const NETWORK: &str = "lab";
const CONF: &str = "10-lab.conflist";
const PLUGIN: &str = "ztunnel-cni";
const HBONE: u16 = 15008;
const PATIENCE: Duration = Duration::from_secs(30);
const PODS: usize = 100;
/// Pods a kubelet starts at the same time on such a machine.
const AT_ONCE: usize = 8;

#[test]
fn pods_of_a_real_runtime_are_captured_from_their_first_packet() {
    support::run(
        &format!("cni{}", std::process::id()),
        &[
            ("the plugin joins the main CNI's configuration, whenever that comes or changes", joins_the_chain),
            ("a pod added by cnitool speaks HBONE at once, and deleting it is idempotent", cnitool_adds_and_deletes),
            ("a pod outside the mesh passes, and its namespace is remembered", a_pod_outside_passes),
            ("a control plane that is away keeps back only who may belong to the mesh", without_a_control_plane),
            ("a hundred pods of containerd connect first of all, and never in clear", a_hundred_first_acts),
            ("uninstalling leaves the main CNI's configuration as it was", uninstalls),
        ],
    );
}

/// The main CNI of the node: addresses that the lab itself does not give out.
fn main_conf() -> String {
    let conf = json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.244.1.0/24", "rangeStart": "10.244.1.100", "rangeEnd": "10.244.1.249", "gateway": "10.244.1.1"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    });
    serde_json::to_string_pretty(&conf).unwrap_or_default() + "\n"
}

fn joins_the_chain(stage: &Stage) -> Result<()> {
    let node = NodeView::of(&stage.teller.session, NODE)?;
    let path = node.conf_dir().join(CONF);
    for _ in 0..2 {
        fs::write(&path, main_conf())?;
        wait::until("the plugin to be in the main CNI's configuration", PATIENCE, || {
            let text = fs::read_to_string(&path)?;
            ensure!(text.contains(PLUGIN), "{text}");
            Ok(())
        })?;
    }
    let output = node.run("echo '{\"cniVersion\":\"1.1.0\"}' | CNI_COMMAND=VERSION /opt/cni/bin/ztunnel-cni")?;
    ensure!(output.status.success() && said(&output).contains("1.1.0"), "{}", said(&output));
    let output = node.run("echo '{\"cniVersion\":\"1.1.0\"}' | CNI_COMMAND=STATUS /opt/cni/bin/ztunnel-cni")?;
    ensure!(output.status.success(), "{}", said(&output));
    Ok(())
}

fn cnitool_adds_and_deletes(stage: &Stage) -> Result<()> {
    let tool = Tool::new(stage, "shop", "tool")?;
    let added = tool.call("add")?;
    ensure!(added.status.success(), "{}", said(&added));
    let result: serde_json::Value = serde_json::from_slice(&added.stdout).with_context(|| said(&added))?;
    ensure!(result["ips"].as_array().is_some_and(|ips| !ips.is_empty()), "{result}");
    let peer = Peer::of(stage)?;
    let watching = Capture::start(&tool.node_netns)?;
    let talked = tool.first_act(&peer.address())?;
    peer.judge(watching, 1)?;
    ensure!(talked.status.success(), "{}", said(&talked));
    let checked = tool.call("check")?;
    ensure!(checked.status.success(), "{}", said(&checked));
    for _ in 0..2 {
        let deleted = tool.call("del")?;
        ensure!(deleted.status.success(), "{}", said(&deleted));
    }
    tool.end()
}

fn a_pod_outside_passes(stage: &Stage) -> Result<()> {
    let tool = Tool::new(stage, "outside", "tool")?;
    let added = tool.call("add")?;
    ensure!(added.status.success(), "{}", said(&added));
    let state = tool.node.root.join("var/lib/ztunnel/namespaces.json");
    let known = fs::read_to_string(&state)?;
    ensure!(known.contains("outside") && !known.contains("shop"), "{known}");
    let deleted = tool.call("del")?;
    ensure!(deleted.status.success(), "{}", said(&deleted));
    tool.end()
}

/// The node learned before that namespace `outside` is; of `shop` it knows that it is not.
fn without_a_control_plane(stage: &Stage) -> Result<()> {
    scale_istiod(stage, 0)?;
    // After it is gone: a pod that was pushed before needs nobody's word.
    let (inside, outside) = (Tool::new(stage, "shop", "kept-back")?, Tool::new(stage, "outside", "passes")?);
    let own = Tool::new(stage, "istio-system", "the-control-planes-own")?;
    let away = (|| {
        for tool in [&outside, &own] {
            let added = tool.call("add")?;
            ensure!(added.status.success(), "{}", said(&added));
        }
        let refused = inside.call("add")?;
        ensure!(!refused.status.success() && said(&refused).contains("cannot join the mesh now"), "{}", said(&refused));
        // What a runtime does after a failure.
        let deleted = inside.call("del")?;
        ensure!(deleted.status.success(), "{}", said(&deleted));
        Ok(())
    })();
    scale_istiod(stage, 1)?;
    away?;
    wait::until("the pod to start after all", PATIENCE, || {
        let added = inside.call("add")?;
        if !added.status.success() {
            inside.call("del")?;
            bail!("{}", said(&added));
        }
        Ok(())
    })?;
    for tool in [inside, outside, own] {
        let deleted = tool.call("del")?;
        ensure!(deleted.status.success(), "{}", said(&deleted));
        tool.end()?;
    }
    stage.traffic_flows()
}

fn scale_istiod(stage: &Stage, replicas: usize) -> Result<()> {
    stage.kubectl(&["-n", "istio-system", "scale", "deployment/istiod", &format!("--replicas={replicas}")])?;
    if replicas > 0 {
        stage.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod", "--timeout=60s"])?;
        return Ok(());
    }
    wait::until("istiod to end", PATIENCE, || {
        let left = stage.teller.session.pods().iter().filter(|pod| pod.name.starts_with("istiod")).count();
        ensure!(left == 0, "{left} are left");
        Ok(())
    })
}

fn a_hundred_first_acts(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    let node = NodeView::of(session, NODE)?;
    let containerd = node.start_containerd()?;
    let peer = Peer::of(stage)?;
    // On the node: what leaves a pod crosses a device there, wherever it goes.
    let watching = Capture::start(&Netns { name: format!("{}{NODE}", session.record.netns_prefix) })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let client = api::client(&session.kubeconfig()).await?;
        let cri = Runtime::at(&containerd.socket);
        let end = tokio::time::Instant::now() + PATIENCE;
        while let Err(error) = cri.network().await {
            ensure!(tokio::time::Instant::now() < end, "{error:#}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let logs = session.record.run_dir.join("logs/cri");
        let kubelet = Arc::new(FirstActs { client, cri, address: peer.address(), logs: logs.display().to_string() });
        stream::iter(0..PODS)
            .map(|n| {
                let kubelet = kubelet.clone();
                async move { kubelet.pod(n).await.with_context(|| format!("pod {n}")) }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await
    });
    let seen = peer.judge(watching, PODS);
    drop(containerd);
    node.end_runtime()?;
    outcome?;
    seen
}

/// The part of a kubelet that matters here.
struct FirstActs {
    client: Client,
    cri: Runtime,
    address: String,
    logs: String,
}

impl FirstActs {
    /// One pod from its object to its end.
    async fn pod(&self, n: usize) -> Result<()> {
        let pod = create(&self.client, "shop", &format!("first-act-{n}")).await?;
        let config = SandboxConfig {
            metadata: Some(Metadata { name: pod.name.clone(), uid: pod.uid.clone(), namespace: pod.namespace.clone() }),
            log_directory: format!("{}/{}", self.logs, pod.name),
            linux: Some(Linux {}),
        };
        let (sandbox, address) = self.cri.run_sandbox(&config).await.context("making the sandbox")?;
        let container = self.cri.start(&sandbox, &config, IMAGE, &[&self.address]).await.context("starting")?;
        // Kubelets say the address once the containers run.
        tell_address(&self.client, &pod, &address).await?;
        let end = tokio::time::Instant::now() + PATIENCE;
        let code = loop {
            if let Some(code) = self.cri.exit_code(&container).await? {
                break code;
            }
            ensure!(tokio::time::Instant::now() < end, "it still tries to connect");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.cri.remove(&sandbox).await.context("removing")?;
        delete(&self.client, &pod).await?;
        let log = format!("{}/{}/main.log", self.logs, pod.name);
        ensure!(code == 0, "its first connection failed ({code}): {}", fs::read_to_string(&log).unwrap_or_default());
        Ok(())
    }
}

fn uninstalls(stage: &Stage) -> Result<()> {
    let node = NodeView::of(&stage.teller.session, NODE)?;
    stage.kubectl(&["-n", "istio-system", "delete", "daemonset", "ztunnel"])?;
    wait::until("ztunnel to end", Duration::from_secs(60), || {
        let left = stage.teller.session.pods().iter().filter(|pod| pod.name.starts_with("ztunnel")).count();
        ensure!(left == 0, "{left} are left");
        Ok(())
    })?;
    stage.kubectl(&["apply", "-f", "manifests/uninstall.yaml"])?;
    stage.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel-uninstall", "--timeout=60s"])?;
    ensure!(fs::read_to_string(node.conf_dir().join(CONF))? == main_conf());
    ensure!(!node.root.join("opt/cni/bin").join(PLUGIN).exists());
    Ok(())
}

/// The server of the shop, as somebody on the wire knows it.
struct Peer {
    service: IpAddr,
    endpoints: BTreeSet<IpAddr>,
}

impl Peer {
    fn of(stage: &Stage) -> Result<Self> {
        let service =
            stage.kubectl(&["-n", "shop", "get", "service", "server-v1", "-o", "jsonpath={.spec.clusterIP}"])?;
        let pods = stage.teller.session.pods();
        let servers = pods.iter().filter(|pod| pod.labels.get("app").is_some_and(|app| app == "server"));
        let endpoints: BTreeSet<IpAddr> = servers.flat_map(|pod| pod.addresses.clone()).collect();
        ensure!(!endpoints.is_empty(), "no server");
        Ok(Self { service: service.trim().parse()?, endpoints })
    }

    fn address(&self) -> String {
        format!("{}:80", self.service)
    }

    /// Nothing went to the peer in clear, and at least so many connections were opened to it by HBONE.
    fn judge(&self, watching: Capture, connections: usize) -> Result<()> {
        let wire: Wire = watching.stop()?;
        let opened: Vec<_> = wire.segments().filter(|segment| segment.opens).collect();
        let to_peer = |ip: IpAddr| ip == self.service || self.endpoints.contains(&ip);
        let clear: Vec<_> = opened
            .iter()
            .filter(|segment| to_peer(segment.destination.0) && segment.destination.1 != HBONE)
            .map(|segment| (segment.source, segment.destination))
            .collect();
        ensure!(clear.is_empty(), "{} SYNs in clear, the first: {:?}", clear.len(), clear.first());
        ensure!(wire.count(b"GET /first-act") == 0, "a request in clear");
        // A tunnel for each pod, whatever port it comes from: seen more than once, at each device it crosses.
        let tunnels: BTreeSet<_> = opened
            .iter()
            .filter(|segment| self.endpoints.contains(&segment.destination.0) && segment.destination.1 == HBONE)
            .map(|segment| segment.source)
            .collect();
        ensure!(tunnels.len() >= connections, "{} tunnels for {connections} pods", tunnels.len());
        Ok(())
    }
}

/// A pod whose runtime is `cnitool`.
struct Tool {
    node: NodeView,
    client: Client,
    rt: tokio::runtime::Runtime,
    pod: PodObject,
    netns: Netns,
    node_netns: Netns,
    program: std::path::PathBuf,
}

impl Tool {
    fn new(stage: &Stage, namespace: &str, name: &str) -> Result<Self> {
        let session = &stage.teller.session;
        let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (client, pod) = rt.block_on(async {
            let client = api::client(&session.kubeconfig()).await?;
            let pod = create(&client, namespace, name).await?;
            anyhow::Ok((client, pod))
        })?;
        let prefix = &session.record.netns_prefix;
        Ok(Self {
            node: NodeView::of(session, NODE)?,
            client,
            rt,
            netns: Netns::create(format!("{prefix}{namespace}-{name}"))?,
            node_netns: Netns { name: format!("{prefix}{NODE}") },
            program: session.places.binaries.join("first_act"),
            pod,
        })
    }

    fn call(&self, verb: &str) -> Result<std::process::Output> {
        self.node.cnitool(verb, NETWORK, &self.netns.name, &self.pod)
    }

    /// The first process of the pod, in its cgroup. Its address becomes known as with a kubelet: a moment later.
    fn first_act(&self, to: &str) -> Result<std::process::Output> {
        let script = format!("exec nsenter --net=/run/lab-netns/{} {} {to}", self.netns.name, self.program.display());
        let child = self.node.command(&script, Some(&self.pod.uid))?.spawn()?;
        let address = self.netns.enter(|| {
            let text = mesh_tests::sys::check(
                mesh_tests::sys::command("ip").args(["-4", "-o", "addr", "show", "scope", "global"]),
            )?;
            let text = String::from_utf8(text.stdout)?;
            let address = text.split_whitespace().skip_while(|word| *word != "inet").nth(1).context("no address")?;
            Ok(address.split('/').next().unwrap_or_default().to_owned())
        })?;
        self.rt.block_on(tell_address(&self.client, &self.pod, &address))?;
        Ok(child.wait_with_output()?)
    }

    fn end(self) -> Result<()> {
        self.rt.block_on(delete(&self.client, &self.pod))?;
        self.netns.delete()
    }
}

/// A pod that is placed on the node and that the lab leaves to us.
async fn create(client: &Client, namespace: &str, name: &str) -> Result<PodObject> {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": namespace, "annotations": {RUN_ELSEWHERE: "yes"}},
        "spec": {
            "nodeName": NODE,
            "serviceAccountName": "default",
            "automountServiceAccountToken": false,
            "containers": [{"name": "main", "image": "first-act"}],
        },
    }))?;
    let api = Api::<Pod>::namespaced(client.clone(), namespace);
    let created = api.create(&PostParams::default(), &pod).await?;
    Ok(PodObject { namespace: namespace.to_owned(), name: name.to_owned(), uid: created.uid().context("no UID")? })
}

async fn tell_address(client: &Client, pod: &PodObject, address: &str) -> Result<()> {
    let status = json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}});
    let api = Api::<Pod>::namespaced(client.clone(), &pod.namespace);
    api.patch_status(&pod.name, &PatchParams::default(), &Patch::Merge(&status)).await?;
    Ok(())
}

async fn delete(client: &Client, pod: &PodObject) -> Result<()> {
    let api = Api::<Pod>::namespaced(client.clone(), &pod.namespace);
    api.delete(&pod.name, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await?;
    Ok(())
}
