//! Runs pods: one task for each pod that is placed on a node of the lab, from its namespace to its last process.
//!
//! ```text
//! placed ─▶ network ─▶ volumes ─▶ init containers ─▶ containers ⟲ restart, probe, refresh ─▶ deleted: TERM, KILL, remove
//! ```

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1 as core;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::images::Images;
use super::probe;
use super::state;
use super::template;
use super::volumes::{HostPaths, Volumes};
use super::workloads::ignore_missing;
use crate::container::{Bind, Launch, Root};
use crate::record;
use crate::topology::{NodeNet, PARENT_V4, PodNet};

/// How often a pod's task looks after its processes.
const TICK: Duration = Duration::from_millis(50);
/// First pause before a container that ended is started again; doubled each time up to the longest.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_RESTART_PAUSE: Duration = Duration::from_secs(8);
/// A container that ran so long starts again with the first pause.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// Until a container is ready it is asked this often, whatever its probe says: waiting is no part of what the lab shows.
const EAGER_PROBE: Duration = Duration::from_millis(200);
/// How often mounted objects and tokens are looked at again.
const REFRESH: Duration = Duration::from_secs(2);

/// On pods of a node that somebody else runs: a test with a real container runtime.
pub const RUN_ELSEWHERE: &str = "lab/runs-elsewhere";

/// Where a pod that sees the node's processes finds the node's network namespace.
const HOST_NETNS: &str = "/run/node/netns";

/// Seconds of the present moment as the API writes times.
pub fn now() -> String {
    let format = time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    time::OffsetDateTime::now_utc().format(&format).unwrap_or_default()
}

/// What the lab knows of one of its nodes.
#[derive(Clone)]
pub struct Node {
    pub net: NodeNet,
    pub cgroup: PathBuf,
    pub host_paths: HostPaths,
}

/// What all pods share.
pub struct Shared {
    pub client: Client,
    pub images: Images,
    pub run_dir: PathBuf,
    pub nodes: BTreeMap<String, Node>,
}

/// What a pod's task is to do.
#[derive(Clone)]
enum Wish {
    Run(Box<core::Pod>),
    /// The object is gone from the API.
    Gone,
}

/// All pods of all nodes.
pub struct Kubelet {
    shared: Arc<Shared>,
    pods: HashMap<String, (watch::Sender<Wish>, JoinHandle<()>)>,
}

impl Kubelet {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, pods: HashMap::new() }
    }

    /// Tells every pod's task what the API says now, starting and ending tasks as pods come and go.
    pub fn sync(&mut self, pods: &[Arc<core::Pod>]) {
        self.pods.retain(|_, (_, task)| !task.is_finished());
        for pod in pods {
            let Some(uid) = pod.uid().filter(|_| !pod.annotations().contains_key(RUN_ELSEWHERE)) else { continue };
            let wish = Wish::Run(Box::new((**pod).clone()));
            if let Some((sender, _)) = self.pods.get(&uid) {
                sender.send_replace(wish);
                continue;
            }
            let node_name = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            let Some(node) = self.shared.nodes.get(&node_name).cloned() else { continue };
            let (sender, wishes) = watch::channel(wish);
            let actor = Actor::new(self.shared.clone(), node, (**pod).clone(), wishes);
            // Ends when its pod is gone; the supervisor's end kills the processes by their cgroup.
            self.pods.insert(uid, (sender, tokio::spawn(actor.run())));
        }
        for (uid, (sender, _)) in &self.pods {
            if pods.iter().all(|pod| pod.uid().as_ref() != Some(uid)) {
                sender.send_replace(Wish::Gone);
            }
        }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        // The lab ends: nobody reads a status any more, and the processes die with their cgroup.
        self.pods.values().for_each(|(_, task)| task.abort());
    }
}

/// Ready or why not, and since when, of one container.
struct Running {
    spec: core::Container,
    child: Option<Child>,
    info: state::Container,
    started: Instant,
    started_text: String,
    restart_at: Option<Instant>,
    pause: Duration,
    last: Option<ExitStatus>,
    waiting: Option<(String, String)>,
    ready: bool,
    failures: i32,
    probe_due: Instant,
    probing: Option<JoinHandle<Result<()>>>,
}

impl Running {
    fn new(spec: core::Container) -> Self {
        let info = state::Container {
            name: spec.name.clone(),
            pid: 0,
            restarts: 0,
            cgroup: PathBuf::new(),
            env: BTreeMap::new(),
        };
        Self {
            spec,
            child: None,
            info,
            started: Instant::now(),
            started_text: String::new(),
            restart_at: None,
            pause: RESTART_PAUSE,
            last: None,
            waiting: Some(("ContainerCreating".into(), String::new())),
            ready: false,
            failures: 0,
            probe_due: Instant::now(),
            probing: None,
        }
    }

    fn status(&self, id: &str) -> Value {
        let state = match (&self.child, &self.waiting) {
            (Some(_), _) => json!({"running": {"startedAt": self.started_text}}),
            (None, Some((reason, message))) => json!({"waiting": {"reason": reason, "message": message}}),
            (None, None) => self.terminated(),
        };
        let last = if self.last.is_some() && self.info.restarts > 0 { self.terminated() } else { json!({}) };
        json!({"name": self.spec.name, "image": self.spec.image, "imageID": "", "containerID": format!("lab://{id}"),
            "ready": self.ready, "started": self.child.is_some(), "restartCount": self.info.restarts,
            "state": state, "lastState": last})
    }

    fn terminated(&self) -> Value {
        use std::os::unix::process::ExitStatusExt;
        let status = self.last.unwrap_or_default();
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        let reason = if code == 0 { "Completed" } else { "Error" };
        json!({"terminated": {"exitCode": code, "reason": reason, "startedAt": self.started_text}})
    }
}

/// The task of one pod.
struct Actor {
    shared: Arc<Shared>,
    node: Node,
    pod: core::Pod,
    wishes: watch::Receiver<Wish>,
    directory: PathBuf,
    net: Option<PodNet>,
    containers: Vec<Running>,
    initialised: bool,
    started: String,
    ready_since: (bool, String),
    reported: Value,
}

impl Actor {
    fn new(shared: Arc<Shared>, node: Node, pod: core::Pod, wishes: watch::Receiver<Wish>) -> Self {
        let directory = shared.run_dir.join("pods").join(pod.uid().unwrap_or_default());
        let containers = pod.spec.iter().flat_map(|spec| spec.containers.clone()).map(Running::new).collect();
        let started = now();
        Self {
            shared,
            node,
            pod,
            wishes,
            directory,
            net: None,
            containers,
            initialised: false,
            ready_since: (false, started.clone()),
            started,
            reported: Value::Null,
        }
    }

    fn name(&self) -> String {
        format!("{}/{}", self.pod.namespace().unwrap_or_default(), self.pod.name_any())
    }

    fn uid(&self) -> String {
        self.pod.uid().unwrap_or_default()
    }

    fn spec(&self) -> core::PodSpec {
        self.pod.spec.clone().unwrap_or_default()
    }

    fn host_network(&self) -> bool {
        self.spec().host_network == Some(true)
    }

    fn addresses(&self) -> Vec<IpAddr> {
        match &self.net {
            Some(net) => net.addresses().to_vec(),
            None => vec![self.node.net.ipv4.into(), self.node.net.ipv6.into()],
        }
    }

    fn netns(&self) -> PathBuf {
        self.net.as_ref().map_or_else(|| self.node.net.netns.path(), |net| net.netns.path())
    }

    fn cgroup(&self) -> PathBuf {
        crate::raw::pod_cgroup(&self.node.cgroup, &self.uid())
    }

    async fn run(mut self) {
        if let Err(e) = self.live().await {
            eprintln!("pod {}: {e:#}", self.name());
        }
        if let Err(e) = self.stop().await {
            eprintln!("pod {}: cannot be removed: {e:#}", self.name());
        }
    }

    /// From placement until the pod is to end.
    async fn live(&mut self) -> Result<()> {
        if !self.host_network() {
            let net = self.node.net.clone();
            let label = format!("pod-{}", &self.uid()[..self.uid().len().min(13)]);
            self.net = Some(tokio::task::spawn_blocking(move || net.add_pod(&label)).await??);
        }
        let addresses = self.addresses();
        let status = self.pod.status.get_or_insert_default();
        status.pod_ip = addresses.first().map(IpAddr::to_string);
        status.host_ip = Some(self.node.net.ipv4.to_string());
        status.pod_ips = Some(addresses.iter().map(|ip| core::PodIP { ip: ip.to_string() }).collect());
        let mut refreshed = Instant::now();
        while !self.ending() {
            if !self.initialised {
                self.initialise().await;
            } else {
                if refreshed.elapsed() > REFRESH {
                    refreshed = Instant::now();
                    // What cannot be refreshed now stays as it was: kubelets do the same.
                    if let Err(e) = self.fill_volumes().await {
                        eprintln!("pod {}: {e:#}", self.name());
                    }
                }
                self.tend().await;
            }
            self.report().await;
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                // An error means the kubelet is gone, and then this task is about to be dropped as well.
                _ = self.wishes.changed() => {}
            }
        }
        Ok(())
    }

    fn ending(&self) -> bool {
        match &*self.wishes.borrow() {
            Wish::Gone => true,
            Wish::Run(pod) => pod.metadata.deletion_timestamp.is_some(),
        }
    }

    async fn fill_volumes(&self) -> Result<()> {
        self.volumes().fill().await
    }

    fn volumes(&self) -> Volumes<'_> {
        Volumes { client: &self.shared.client, pod: &self.pod, directory: &self.directory, host: &self.node.host_paths }
    }

    /// Volumes, then init containers; what is missing is said in the status and tried again.
    async fn initialise(&mut self) {
        match self.prepare().await {
            Ok(()) => self.initialised = true,
            Err(e) => {
                let message = format!("{e:#}");
                for container in &mut self.containers {
                    container.waiting = Some(("ContainerCreating".into(), message.clone()));
                }
                tokio::time::sleep(TICK * 2).await;
            }
        }
    }

    async fn prepare(&mut self) -> Result<()> {
        self.fill_volumes().await?;
        self.write_resolv_conf()?;
        for container in self.spec().init_containers.unwrap_or_default() {
            let (launch, _) = self.launch(&container).await?;
            let mut child = launch.command()?.spawn()?;
            let status = loop {
                if let Some(status) = child.try_wait()? {
                    break status;
                }
                if self.ending() {
                    child.kill()?;
                }
                tokio::time::sleep(TICK).await;
            };
            anyhow::ensure!(status.success(), "init container {} ended with {status}", container.name);
        }
        Ok(())
    }

    fn write_resolv_conf(&self) -> Result<()> {
        let namespace = self.pod.namespace().unwrap_or_default();
        let text = format!(
            "nameserver {PARENT_V4}\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
        std::fs::create_dir_all(&self.directory)?;
        Ok(std::fs::write(self.directory.join("resolv.conf"), text)?)
    }

    /// Looks after every container once.
    async fn tend(&mut self) {
        for index in 0..self.containers.len() {
            self.reap(index);
            let container = &self.containers[index];
            let due = container.restart_at.is_none_or(|at| at <= Instant::now());
            if container.child.is_none() && due && self.may_start(index) {
                self.start(index).await;
            }
            self.probe(index).await;
        }
    }

    fn may_start(&self, index: usize) -> bool {
        let Some(last) = self.containers[index].last else { return true };
        match self.spec().restart_policy.as_deref() {
            Some("Never") => false,
            Some("OnFailure") => !last.success(),
            _ => true,
        }
    }

    /// Notes a container that has ended.
    fn reap(&mut self, index: usize) {
        let (uid, run_dir) = (self.uid(), self.shared.run_dir.clone());
        let container = &mut self.containers[index];
        let Some(child) = &mut container.child else { return };
        let Ok(Some(status)) = child.try_wait() else { return };
        container.child = None;
        container.last = Some(status);
        container.ready = false;
        if let Err(e) =
            record::kill_cgroup(&container.info.cgroup).and_then(|()| record::remove_cgroup(&container.info.cgroup))
        {
            eprintln!("pod {uid}: cgroup of {}: {e:#}", container.info.name);
        }
        if container.started.elapsed() > STABLE_AFTER {
            container.pause = RESTART_PAUSE;
        }
        container.restart_at = Some(Instant::now() + container.pause);
        container.pause = (container.pause * 2).min(LONGEST_RESTART_PAUSE);
        if self.may_start(index) {
            self.containers[index].waiting = Some(("CrashLoopBackOff".into(), format!("ended with {status}")));
        } else {
            self.containers[index].waiting = None;
        }
        self.publish(&run_dir);
    }

    async fn start(&mut self, index: usize) {
        let spec = self.containers[index].spec.clone();
        let result = match self.launch(&spec).await {
            Ok((launch, id)) => {
                launch.command().and_then(|mut command| Ok(command.spawn()?)).map(|child| (child, launch, id))
            }
            Err(e) => Err(e),
        };
        let run_dir = self.shared.run_dir.clone();
        let container = &mut self.containers[index];
        match result {
            Ok((child, launch, _)) => {
                container.info.pid = child.id();
                container.info.restarts += i32::from(container.last.is_some());
                container.info.cgroup = launch.cgroup;
                container.info.env = launch.env;
                container.child = Some(child);
                container.waiting = None;
                container.started = Instant::now();
                container.started_text = now();
                container.failures = 0;
                container.probe_due = Instant::now();
                container.probing = None;
                container.ready = container.spec.readiness_probe.is_none();
            }
            Err(e) => {
                container.waiting = Some(("ErrImagePull".into(), format!("{e:#}")));
                container.restart_at = Some(Instant::now() + RESTART_PAUSE);
            }
        }
        self.publish(&run_dir);
    }

    /// What a container is started with, and its ID.
    async fn launch(&self, container: &core::Container) -> Result<(Launch, String)> {
        let name = container.image.clone().unwrap_or_default();
        let image = self.shared.images.find(&name).map_err(anyhow::Error::msg)?;
        let env = self.environment(container).await?;
        let mut argv = container.command.clone().unwrap_or_default();
        let given = container.args.clone();
        if argv.is_empty() {
            argv = image.entrypoint.clone();
            argv.extend(given.unwrap_or_else(|| image.arguments.clone()));
        } else {
            argv.extend(given.unwrap_or_default());
        }
        let id = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        let mut binds = image.binds.clone();
        binds.push(Bind::new(self.directory.join("resolv.conf"), "/etc/resolv.conf"));
        binds.extend(self.volumes().binds(container)?);
        let spec = self.spec();
        if spec.host_pid == Some(true) {
            binds.push(Bind::new(self.node.net.netns.path(), HOST_NETNS));
        }
        let read_only = container.security_context.as_ref().and_then(|s| s.read_only_root_filesystem);
        let launch = Launch {
            argv: argv.iter().map(|word| template::expand(word, &env)).collect(),
            env,
            netns: Some(self.netns()),
            cgroup: self.cgroup().join(&id),
            root: Some(Root {
                scratch: self.directory.join("root"),
                binds,
                programs: image.programs,
                directories: image.directories,
                hostname: self.pod.name_any(),
                read_only: read_only == Some(true),
                writable_sysctls: false,
            }),
            security: template::security(&spec, container),
            workdir: container.working_dir.as_ref().map(PathBuf::from),
            log: Some(state::Pod::log(
                &self.shared.run_dir,
                &self.pod.namespace().unwrap_or_default(),
                &self.pod.name_any(),
                &container.name,
            )),
        };
        Ok((launch, id))
    }

    async fn environment(&self, container: &core::Container) -> Result<BTreeMap<String, String>> {
        let port = super::API_PORT.to_string();
        let mut env = BTreeMap::from([
            ("HOSTNAME".to_owned(), self.pod.name_any()),
            ("KUBERNETES_SERVICE_HOST".to_owned(), PARENT_V4.to_string()),
            ("KUBERNETES_SERVICE_PORT".to_owned(), port.clone()),
            ("KUBERNETES_SERVICE_PORT_HTTPS".to_owned(), port),
        ]);
        if self.spec().host_pid == Some(true) {
            // Process 1 is the machine's and not the node's.
            env.insert("HOST_NETNS".to_owned(), HOST_NETNS.to_owned());
        }
        anyhow::ensure!(container.env_from.is_none(), "the lab has no envFrom");
        for variable in container.env.iter().flatten() {
            let value = match &variable.value_from {
                Some(source) => {
                    let value = self.volumes().variable(source).await;
                    value.with_context(|| format!("variable {}", variable.name))?
                }
                None => Some(template::expand(variable.value.as_deref().unwrap_or_default(), &env)),
            };
            env.extend(value.map(|value| (variable.name.clone(), value)));
        }
        Ok(env)
    }

    /// Begins a probe that is due, or takes the result of one that has ended.
    async fn probe(&mut self, index: usize) {
        let (address, node) = (self.addresses()[0], self.node.clone());
        let container = &mut self.containers[index];
        let Some(readiness) = container.spec.readiness_probe.clone() else { return };
        if container.child.is_none() {
            return;
        }
        if container.probing.as_ref().is_some_and(JoinHandle::is_finished) {
            let result = container.probing.take().expect("it was seen a line above").await;
            let success = matches!(result, Ok(Ok(())));
            container.failures = if success { 0 } else { container.failures + 1 };
            if success {
                container.ready = true;
            } else if container.failures >= readiness.failure_threshold.unwrap_or(3) {
                container.ready = false;
            }
            let period = Duration::from_secs(readiness.period_seconds.unwrap_or(10).max(1).unsigned_abs().into());
            container.probe_due = Instant::now() + if container.ready { period } else { EAGER_PROBE };
        }
        if container.probing.is_none() && container.probe_due <= Instant::now() {
            let (spec, info) = (container.spec.clone(), container.info.clone());
            container.probing = Some(tokio::task::spawn_blocking(move || {
                let netns = node.net.netns.path();
                let kubelet = probe::Kubelet { netns: &netns, cgroup: &node.cgroup };
                probe::probe(&readiness, &spec, &info, address, kubelet)
            }));
        }
    }

    /// Tells `lab exec` and the demo what runs.
    fn publish(&self, run_dir: &std::path::Path) {
        let running = self.containers.iter().filter(|container| container.child.is_some());
        let pod = state::Pod {
            namespace: self.pod.namespace().unwrap_or_default(),
            name: self.pod.name_any(),
            uid: self.uid(),
            node: self.node.net.name.clone(),
            labels: self.pod.labels().clone(),
            addresses: self.addresses(),
            netns: self.netns(),
            containers: running.map(|container| container.info.clone()).collect(),
        };
        if let Err(e) = pod.write(run_dir) {
            eprintln!("pod {}: {e:#}", self.name());
        }
    }

    /// Writes the status where it says something new.
    async fn report(&mut self) {
        let status = self.status();
        if status == self.reported {
            return;
        }
        let api = Api::<core::Pod>::namespaced(self.shared.client.clone(), &self.pod.namespace().unwrap_or_default());
        let patch = Patch::Merge(json!({"status": status}));
        match ignore_missing(api.patch_status(&self.pod.name_any(), &PatchParams::default(), &patch).await) {
            Ok(_) => self.reported = status,
            // Tried again at the next tick.
            Err(e) => eprintln!("pod {}: status: {e}", self.name()),
        }
    }

    fn status(&mut self) -> Value {
        let ready = self.initialised && self.containers.iter().all(|container| container.ready);
        if ready != self.ready_since.0 {
            self.ready_since = (ready, now());
        }
        let ended =
            |container: &Running| container.child.is_none() && container.waiting.is_none() && container.last.is_some();
        let phase = if !self.containers.is_empty() && self.containers.iter().all(ended) {
            let good = self.containers.iter().all(|container| container.last.is_some_and(|status| status.success()));
            if good { "Succeeded" } else { "Failed" }
        } else if self.containers.iter().any(|container| container.child.is_some() || container.last.is_some()) {
            "Running"
        } else {
            "Pending"
        };
        let condition = |kind: &str, holds: bool, since: &str| json!({"type": kind, "status": if holds { "True" } else { "False" }, "lastTransitionTime": since});
        let addresses = self.addresses();
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let since = &self.ready_since.1;
        let containers: Vec<Value> = self
            .containers
            .iter()
            .map(|container| {
                let id = container.info.cgroup.file_name().unwrap_or_default().to_string_lossy();
                container.status(&id)
            })
            .collect();
        json!({"phase": phase, "podIP": addresses[0], "podIPs": ips, "qosClass": "Burstable",
            "hostIP": self.node.net.ipv4, "hostIPs": [{"ip": self.node.net.ipv4}, {"ip": self.node.net.ipv6}],
            "startTime": self.started,
            "conditions": [
                condition("PodScheduled", true, &self.started),
                condition("Initialized", self.initialised, &self.started),
                condition("ContainersReady", ready, since),
                condition("Ready", ready, since),
            ],
            "containerStatuses": containers})
    }

    /// Hooks that sleep, TERM, grace, KILL; then the namespace, the cgroup and the object.
    async fn stop(&mut self) -> Result<()> {
        let grace = match &*self.wishes.borrow() {
            Wish::Gone => 0,
            Wish::Run(pod) => pod.metadata.deletion_grace_period_seconds.unwrap_or(30),
        };
        let seconds = |seconds: i64| Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        let end = Instant::now() + seconds(grace);
        self.run_until(end.min(Instant::now() + seconds(self.sleeps_before_term()))).await;
        for container in self.containers.iter().filter(|container| container.child.is_some()) {
            let pid = i32::try_from(container.info.pid).context("PID out of range")?;
            // It may have ended just now.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        self.run_until(end).await;
        let (cgroup, net, node) = (self.cgroup(), self.net.clone(), self.node.net.clone());
        tokio::task::spawn_blocking(move || {
            record::kill_cgroup(&cgroup)?;
            if let Some(net) = net {
                node.remove_pod(&net)?;
            }
            record::remove_cgroup(&cgroup)
        })
        .await??;
        self.any_running();
        state::Pod::remove(&self.shared.run_dir, &self.uid());
        // A volume somebody still reads vanishes with its last reader.
        let _ = std::fs::remove_dir_all(&self.directory);
        let api = Api::<core::Pod>::namespaced(self.shared.client.clone(), &self.pod.namespace().unwrap_or_default());
        let only_this = Preconditions { uid: self.pod.uid(), resource_version: None };
        let params = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() }.grace_period(0);
        ignore_missing(api.delete(&self.pod.name_any(), &params).await)?;
        Ok(())
    }

    /// Returns before, where nothing runs any more or the object has gone.
    async fn run_until(&mut self, end: Instant) {
        while Instant::now() < end && self.any_running() && !matches!(*self.wishes.borrow(), Wish::Gone) {
            tokio::time::sleep(TICK).await;
        }
    }

    /// Seconds that the hook `preStop` of a container asks for. Other hooks than `sleep` are not run.
    fn sleeps_before_term(&self) -> i64 {
        let containers = self.pod.spec.iter().flat_map(|spec| &spec.containers);
        let hooks = containers.filter_map(|container| container.lifecycle.as_ref()?.pre_stop.as_ref()?.sleep.as_ref());
        hooks.map(|sleep| sleep.seconds).max().unwrap_or_default()
    }

    /// Collects what has ended and says whether anything is left.
    fn any_running(&mut self) -> bool {
        for container in &mut self.containers {
            if container.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_)))) {
                container.child = None;
            }
        }
        self.containers.iter().any(|container| container.child.is_some())
    }
}
