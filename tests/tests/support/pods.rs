//! Pods that real container runtimes start on a node of the lab: containerd, driven as a kubelet drives it, or cnitool.

use std::fs;
use std::net::IpAddr;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use mesh_tests::cluster::api;
use mesh_tests::cluster::kubelet::RUN_ELSEWHERE;
use mesh_tests::topology::Netns;
use mesh_tests::{sys, wait};
use serde_json::json;

use crate::cri::{Linux, Metadata, Runtime, SandboxConfig};
use crate::runtime::{Containerd, IMAGE, NodeView, PodObject};
use crate::support::{Stage, said};

/// Where all of it is done.
pub const NODE: &str = "node-a";
/// The name of the main CNI's network.
pub const NETWORK: &str = "lab";
pub const PLUGIN: &str = "ztunnel-cni";
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The part of a kubelet that matters here, and the runtime that it drives.
pub struct Kubelet {
    pub node: NodeView,
    pub node_netns: Netns,
    pub containerd: Containerd,
    pub cri: Runtime,
    pub client: Client,
    logs: String,
    rt: tokio::runtime::Runtime,
}

/// A pod that has come and gone.
pub struct Acted {
    pub namespace: &'static str,
    pub address: IpAddr,
    /// How long its sandbox took, ADD in it.
    pub sandbox: Duration,
}

impl Kubelet {
    pub fn start(stage: &Stage) -> Result<Self> {
        let session = &stage.teller.session;
        let node = NodeView::of(session, NODE)?;
        let containerd = node.start_containerd()?;
        let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let client = rt.block_on(api::client(&session.kubeconfig()))?;
        // The channel belongs to the runtime that polls it.
        let cri = rt.block_on(async { Runtime::at(&containerd.socket) });
        Ok(Self {
            node,
            node_netns: Netns { name: format!("{}{NODE}", session.record.netns_prefix) },
            containerd,
            cri,
            client,
            logs: session.record.run_dir.join("logs/cri").display().to_string(),
            rt,
        })
    }

    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.rt.block_on(work)
    }

    /// Waits until the runtime itself says that the plugin is in its chain.
    pub fn wait_for_plugin(&self) -> Result<()> {
        wait::until("containerd to have the plugin in its chain", PATIENCE, || {
            let network = self.block_on(self.cri.network())?;
            ensure!(network.contains(PLUGIN), "{network}");
            Ok(())
        })
    }

    pub fn create(&self, namespace: &str, name: &str) -> Result<PodObject> {
        self.block_on(create(&self.client, namespace, name))
    }

    pub fn config(&self, pod: &PodObject) -> SandboxConfig {
        SandboxConfig {
            metadata: Some(Metadata { name: pod.name.clone(), uid: pod.uid.clone(), namespace: pod.namespace.clone() }),
            log_directory: format!("{}/{}", self.logs, pod.name),
            linux: Some(Linux {}),
        }
    }

    pub fn sandbox(&self, pod: &PodObject) -> Result<String> {
        Ok(self.block_on(self.cri.run_sandbox(&self.config(pod)))?.0)
    }

    /// One pod from its object to its end.
    pub async fn first_act(&self, namespace: &'static str, n: usize, target: &str) -> Result<Acted> {
        let pod = create(&self.client, namespace, &format!("first-act-{n}")).await?;
        let config = self.config(&pod);
        let began = Instant::now();
        let (sandbox, address) = self.cri.run_sandbox(&config).await.context("making the sandbox")?;
        let took = began.elapsed();
        let container = self.cri.start(&sandbox, &config, IMAGE, &[target]).await.context("starting")?;
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
        Ok(Acted { namespace, address: address.parse()?, sandbox: took })
    }

    /// Ends the runtime and whatever it has left running.
    pub fn end(self) -> Result<()> {
        drop(self.containerd);
        self.node.end_runtime()
    }
}

/// A pod whose runtime is `cnitool`.
pub struct Tool {
    pub node: NodeView,
    pub client: Client,
    rt: tokio::runtime::Runtime,
    pub pod: PodObject,
    netns: Netns,
    pub node_netns: Netns,
    program: std::path::PathBuf,
}

impl Tool {
    pub fn new(stage: &Stage, namespace: &str, name: &str) -> Result<Self> {
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

    pub fn call(&self, verb: &str) -> Result<Output> {
        self.node.cnitool(verb, NETWORK, &self.netns.name, &self.pod)
    }

    /// Tries again as a kubelet does.
    pub fn is_added_after_all(&self) -> Result<()> {
        wait::until("the pod to start after all", PATIENCE, || {
            let added = self.call("add")?;
            if !added.status.success() {
                succeeds(&self.call("del")?)?;
                bail!("{}", said(&added));
            }
            ensure!(self.is_captured()?, "it is not captured");
            Ok(())
        })
    }

    /// Whether anything of the capture is in its namespace: the rules, and somebody who listens.
    pub fn is_captured(&self) -> Result<bool> {
        self.netns.enter(|| {
            let rules = sys::check(sys::command("ip").args(["rule", "show"]))?;
            let rules = String::from_utf8_lossy(&rules.stdout).contains("lookup 15000");
            // 0A is LISTEN; connections may be in TIME_WAIT for a while.
            let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].map(fs::read_to_string);
            let listens = |line: &str| line.split_whitespace().nth(3) == Some("0A");
            let listeners =
                tables.iter().flatten().flat_map(|table| table.lines()).filter(|line| listens(line)).count();
            ensure!(rules == (listeners > 0), "half in: rules {rules}, {listeners} listeners");
            Ok(rules)
        })
    }

    pub fn links(&self) -> Result<Vec<String>> {
        self.netns.enter(links)
    }

    pub fn address(&self) -> Result<IpAddr> {
        let output = self.netns.enter(|| {
            Ok(sys::check(sys::command("ip").args(["-4", "-o", "addr", "show", "scope", "global"]))?.stdout)
        })?;
        let text = String::from_utf8(output)?;
        let address = text.split_whitespace().skip_while(|word| *word != "inet").nth(1).context("no address")?;
        Ok(address.split('/').next().unwrap_or_default().parse()?)
    }

    /// The name cnitool gives to containers: of the path of their namespace.
    pub fn container_id(&self) -> Result<String> {
        let path = format!("/run/lab-netns/{}", self.netns.name);
        let mut digest = Command::new("sha512sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        std::io::Write::write_all(&mut digest.stdin.take().context("standard input was piped")?, path.as_bytes())?;
        let output = digest.wait_with_output()?;
        let digits: String = String::from_utf8(output.stdout)?.chars().take(20).collect();
        Ok(format!("cnitool-{digits}"))
    }

    /// The first process of the pod, in its cgroup. Its address becomes known as with a kubelet: a moment later.
    pub fn first_act(&self, to: &str) -> Result<Output> {
        let script = format!("exec nsenter --net=/run/lab-netns/{} {} {to}", self.netns.name, self.program.display());
        let child = self.node.command(&script, Some(&self.pod.uid))?.spawn()?;
        self.rt.block_on(tell_address(&self.client, &self.pod, &self.address()?.to_string()))?;
        Ok(child.wait_with_output()?)
    }

    pub fn end(self) -> Result<()> {
        self.rt.block_on(delete(&self.client, &self.pod))?;
        self.netns.delete()
    }
}

/// A pod that is placed on the node and that the lab leaves to us.
pub async fn create(client: &Client, namespace: &str, name: &str) -> Result<PodObject> {
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

pub async fn delete(client: &Client, pod: &PodObject) -> Result<()> {
    let api = Api::<Pod>::namespaced(client.clone(), &pod.namespace);
    api.delete(&pod.name, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await?;
    Ok(())
}

/// Errors are told with all that the command said.
pub fn succeeds(output: &Output) -> Result<()> {
    ensure!(output.status.success(), "{}", said(output));
    Ok(())
}

/// Names of links, as `ip` shows them, in the namespace of the calling thread.
pub fn links() -> Result<Vec<String>> {
    let output = sys::check(sys::command("ip").args(["-o", "link", "show"]))?;
    let text = String::from_utf8(output.stdout)?;
    let name = |line: &str| Some(line.split_whitespace().nth(1)?.trim_end_matches(':').to_owned());
    Ok(text.lines().filter_map(name).collect())
}
