//! Two nodes and their pods without an API server: for ztunnels fed from a file, and for benchmarks.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use mesh_tests::raw::Lab;
//! let lab = Lab::up("example")?;
//! let client = lab.node("node-a").add_pod("client")?;
//! let server = lab.node("node-b").add_pod("server")?;
//! let mut web = server.spawn("web", &["python3", "-m", "http.server", "80"], &[])?;
//! web.wait_listening(80)?;
//! let answer = client.run(&["curl", "-s", &format!("http://{}/", server.net.ipv4)])?;
//! assert!(answer.status.success());
//! # Ok(()) }
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::capture::Capture;
use crate::container::{Launch, Security};
use crate::record::{self, Record};
use crate::sys;
use crate::topology::{self, NodeNet, Parent, PodNet};
use crate::wait;

/// Names of the two nodes.
pub const NODES: [&str; 2] = ["node-a", "node-b"];

/// A running lab; dropping it takes everything down.
pub struct Lab {
    pub record: Record,
    pub parent: Parent,
    nodes: Vec<Node>,
}

/// One node: where a ztunnel runs.
pub struct Node {
    pub net: NodeNet,
    /// Root of the node's cgroups, what a ztunnel gets as `CGROUP_ROOT`.
    pub cgroup: PathBuf,
    /// Directory on a bpffs, what a ztunnel gets as `BPFFS_DIR`.
    pub bpffs: PathBuf,
    logs: PathBuf,
}

/// A pod: namespaces and cgroup, no process yet.
pub struct Pod {
    pub name: String,
    /// The pod's UID as a kubelet would put it in the cgroup path.
    pub uid: String,
    pub net: PodNet,
    /// Cgroup of the pod's one container.
    pub cgroup: PathBuf,
    node: NodeNet,
    logs: PathBuf,
}

/// A process of the lab; dropping it kills it.
pub struct Process {
    child: Child,
    netns: PathBuf,
    /// Standard output and error.
    pub log: PathBuf,
}

/// Root and a kernel that has what the lab needs, or the reason to skip a test. With `LAB=required` a reason is a panic.
///
/// Call it first in every lab test: `if !mesh_tests::raw::available() { return; }`
#[must_use]
pub fn available() -> bool {
    let reason = if !nix::unistd::geteuid().is_root() {
        "not root"
    } else if sys::cgroup2_root().is_err() {
        "no cgroup2 hierarchy is mounted"
    } else if sys::command("ip").arg("-V").output().is_err() {
        "iproute2 is not installed"
    } else {
        return true;
    };
    assert!(
        std::env::var_os("LAB").is_none_or(|value| value != "required"),
        "LAB=required, but the lab is not available: {reason}"
    );
    eprintln!("SKIPPED: this test needs the lab: {reason}");
    false
}

impl Lab {
    /// Brings up two nodes. `name` must be unique among labs running at the time: short, lower case.
    pub fn up(name: &str) -> Result<Self> {
        let record = Record::create(name)?;
        Self::build(&record).inspect_err(|_| {
            if let Err(e) = record.take_down() {
                eprintln!("lab {name}: cannot clean up: {e:#}");
            }
        })
    }

    fn build(record: &Record) -> Result<Self> {
        let (parent, nodes) = topology::create(record, &NODES)?;
        let nodes = nodes.into_iter().map(|net| Node::create(record, net)).collect::<Result<_>>()?;
        Ok(Self { record: record.clone(), parent, nodes })
    }

    /// `node-a` or `node-b`.
    ///
    /// # Panics
    /// On any other name.
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.net.name == name).expect("a lab has node-a and node-b")
    }

    /// Both nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Captures what crosses between the nodes from now on.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.parent.netns)
    }

    /// A directory that vanishes with the lab.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.record.run_dir.join("scratch").join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_logs(&self.record.logs());
        }
        if let Err(e) = self.record.take_down() {
            eprintln!("lab {}: cannot take down: {e:#}", self.record.id);
        }
    }
}

/// A failing test shows the ends of all logs.
fn print_logs(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.filter_map(Result::ok) {
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("---- {}", entry.path().display());
        lines.iter().skip(lines.len().saturating_sub(40)).for_each(|line| eprintln!("{line}"));
    }
}

impl Node {
    fn create(record: &Record, net: NodeNet) -> Result<Self> {
        let cgroup = record.cgroup.join(&net.name);
        let bpffs = record.bpffs.join(&net.name);
        fs::create_dir_all(&cgroup)?;
        fs::create_dir_all(&bpffs)?;
        Ok(Self { net, cgroup, bpffs, logs: record.logs() })
    }

    /// Adds a pod with addresses of this node and a random UID.
    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        let uid = uuid::Uuid::new_v4().to_string();
        let net = self.net.add_pod(name)?;
        let cgroup = pod_cgroup(&self.cgroup, &uid).join("container");
        fs::create_dir_all(&cgroup)?;
        let node = self.net.clone();
        Ok(Pod { name: name.to_owned(), uid, net, cgroup, node, logs: self.logs.clone() })
    }

    /// Starts a process of the node itself: in its namespace, outside every pod.
    pub fn spawn(&self, name: &str, argv: &[&str], env: &[(&str, &str)]) -> Result<Process> {
        let mut launch = Launch::new(argv, self.cgroup.join("system"));
        launch.netns = Some(self.net.netns.path());
        start(launch, env, &self.logs, name)
    }
}

/// Where a kubelet with the cgroupfs driver puts a pod of the burstable class.
pub fn pod_cgroup(node_root: &Path, uid: &str) -> PathBuf {
    node_root.join("kubepods/burstable").join(format!("pod{uid}"))
}

impl Pod {
    /// Starts a process in the pod, as root but with a container's capabilities. Its log is `<run dir>/logs/<name>.log`.
    pub fn spawn(&self, name: &str, argv: &[&str], env: &[(&str, &str)]) -> Result<Process> {
        self.spawn_as(name, argv, env, Security::unprivileged())
    }

    /// As [`Pod::spawn`], with rights of the caller's choice.
    pub fn spawn_as(&self, name: &str, argv: &[&str], env: &[(&str, &str)], security: Security) -> Result<Process> {
        let mut launch = self.launch(argv);
        launch.security = security;
        start(launch, env, &self.logs, name)
    }

    fn launch(&self, argv: &[&str]) -> Launch {
        let mut launch = Launch::new(argv, self.cgroup.clone());
        launch.netns = Some(self.net.netns.path());
        launch
    }

    /// Runs a command in the pod to its end and returns what it said.
    pub fn run(&self, argv: &[&str]) -> Result<Output> {
        let mut launch = self.launch(argv);
        launch.security = Security::unprivileged();
        let mut command = launch.command()?;
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.output().with_context(|| format!("cannot run {argv:?} in {}", self.name))
    }

    /// Runs `work` on a thread in the pod's network namespace. The thread is **not** in the pod's cgroup: its connections are not captured.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        self.net.netns.enter(work)
    }

    /// Kills what runs in the pod and removes its link, namespace and cgroup.
    pub fn delete(self) -> Result<()> {
        let pod_cgroup = self.cgroup.parent().expect("a container's cgroup is below its pod's");
        record::kill_cgroup(pod_cgroup)?;
        self.node.remove_pod(&self.net)?;
        record::remove_cgroup(pod_cgroup)
    }
}

fn start(mut launch: Launch, env: &[(&str, &str)], logs: &Path, name: &str) -> Result<Process> {
    launch.env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>();
    let log = logs.join(format!("{name}.log"));
    launch.log = Some(log.clone());
    let netns = launch.netns.clone().expect("processes of a raw lab have a namespace");
    let child = launch.command()?.spawn().with_context(|| format!("cannot start {name}"))?;
    Ok(Process { child, netns, log })
}

impl Process {
    /// PID of the program itself (and of the shell that became it).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("PID out of range")?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    /// Whether it has not ended yet.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end.
    pub fn wait(&mut self, deadline: Duration) -> Result<std::process::ExitStatus> {
        wait::until("a process to end", deadline, || self.child.try_wait()?.context("it still runs"))
    }

    /// Kills it with SIGKILL and waits for the end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Everything it has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until some process of the same namespace listens on a TCP port; fails at once when this process ends.
    pub fn wait_listening(&mut self, port: u16) -> Result<()> {
        let netns = self.netns.clone();
        let name = self.log.display().to_string();
        wait::until(&format!("port {port} of {name}"), Duration::from_secs(20), || {
            if !self.running() {
                return Ok(Err(anyhow::anyhow!("{name}: ended before listening:\n{}", self.output())));
            }
            if listening(&netns, port)? {
                return Ok(Ok(()));
            }
            bail!("nobody listens yet")
        })?
    }

    /// Waits until its output contains `text`.
    pub fn wait_output(&mut self, text: &str, deadline: Duration) -> Result<()> {
        wait::until(&format!("{text:?} in {}", self.log.display()), deadline, || {
            let output = self.output();
            if output.contains(text) {
                return Ok(());
            }
            bail!("it said: {}", output.lines().last().unwrap_or("nothing"))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means it has ended already.
        let _ = self.kill();
    }
}

/// Whether a TCP listener on `port` exists in a namespace, without connecting to it.
pub fn listening(netns: &Path, port: u16) -> Result<bool> {
    sys::in_netns(netns, move || {
        let suffix = format!(":{port:04X}");
        let listens = |line: &str| {
            let mut fields = line.split_whitespace().skip(1);
            fields.next().is_some_and(|local| local.ends_with(&suffix)) && fields.nth(1) == Some("0A")
        };
        let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
        Ok(tables.iter().any(|table| fs::read_to_string(table).is_ok_and(|text| text.lines().any(listens))))
    })
}
