//! A lab with a cluster, from the side of who plays with it: start and end its supervisor, speak `kubectl`, run commands in pods.

use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::capture::Capture;
use crate::cluster::api;
use crate::cluster::probe::Kubelet;
use crate::cluster::state::{self, Pod};
use crate::container::{self, Security};
use crate::places::Places;
use crate::record::{self, Record};
use crate::topology::Netns;
use crate::wait;

/// The lab that `lab up` and the demo bring up.
pub const DEFAULT: &str = "lab";
/// Said on the supervisor's standard input when it is to live on without us.
pub const KEEP: &[u8] = b"keep";

/// A running lab with a cluster.
pub struct Session {
    pub record: Record,
    pub places: Places,
    supervisor: Option<(Child, ChildStdin)>,
}

impl Session {
    /// Brings up nodes and API server and waits until they serve. The supervisor ends with this process unless [`Session::keep`] is called.
    pub fn start(id: &str, places: &Places) -> Result<Self> {
        for reaped in record::reap_dead()? {
            eprintln!("cleaned up after lab {reaped}, which was killed");
        }
        if let Some(other) = record::find(id).filter(|other| !other.ending) {
            bail!(
                "lab {id} is up already (process {}): play with it, or take it down with `cargo xtask lab down`",
                other.owner.pid
            );
        }
        let log = record::log_file(id);
        let mut output = fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut child = Command::new(places.binaries.join("lab"))
            .args(["--id", id, "supervise"])
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .process_group(0)
            .spawn()
            .context("cannot start the lab's supervisor")?;
        let stdin = child.stdin.take().context("standard input was piped")?;
        let started = wait::until("the lab to come up", Duration::from_secs(60), || {
            if let Some(status) = child.try_wait()? {
                // By the open file: a predecessor that ends just now removes the name.
                let mut said = String::new();
                output.rewind().and_then(|()| output.read_to_string(&mut said))?;
                return Ok(Err(anyhow!("the lab did not come up ({status}):\n{said}")));
            }
            // Another's of the same name may still be there, ending or just begun.
            let own = |record: &Record| record.owner.pid == child.id();
            let record = record::find(id).filter(own).context("no record yet")?;
            if !ready_file(&record).exists() {
                bail!("the API server is starting");
            }
            Ok(Ok(record))
        });
        let record = started??;
        Ok(Self { record, places: places.clone(), supervisor: Some((child, stdin)) })
    }

    /// The lab that is up already.
    pub fn attach(id: &str, places: &Places) -> Result<Self> {
        let record = record::find(id).context("no lab is up: `cargo xtask lab up`")?;
        Ok(Self { record, places: places.clone(), supervisor: None })
    }

    /// Leaves the lab standing when this process ends.
    pub fn keep(&mut self) -> Result<()> {
        let (_, mut stdin) = self.supervisor.take().context("this process did not start the lab")?;
        stdin.write_all(KEEP)?;
        Ok(())
    }

    /// Ends the supervisor and waits until everything is gone.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let owner = self.record.owner;
        if owner.alive() {
            kill(Pid::from_raw(i32::try_from(owner.pid)?), Signal::SIGTERM)?;
        }
        if let Some((mut child, _)) = self.supervisor.take() {
            child.wait()?;
        }
        wait::until_true("the lab's supervisor to end", Duration::from_secs(30), || !owner.alive())?;
        // Gone already where the next command was faster.
        let _ = fs::remove_file(record::log_file(&self.record.id));
        record::reap_dead().map(drop)
    }

    /// Kubeconfig of the administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        api::kubeconfig(&self.record)
    }

    /// `kubectl` (Debian's 1.20) as administrator, not yet run.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(self.places.kubectl()?);
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(arguments);
        // Its caches belong to the lab, not to the user.
        command.env("HOME", &self.record.run_dir).current_dir(&self.places.workspace);
        Ok(command)
    }

    /// Runs `kubectl` to its end.
    pub fn kubectl_output(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.kubectl(arguments)?.output()?)
    }

    /// Applies a manifest.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        let mut command = self.kubectl(&["apply", "-f", "-"])?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("standard input was piped")?.write_all(manifest.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// What the pod's annotation says of its capture; empty without one.
    pub fn redirection(&self, pod: &Pod) -> Result<String> {
        let path = "jsonpath={.metadata.annotations.ambient\\.istio\\.io/redirection}";
        let output = self.kubectl_output(&["-n", &pod.namespace, "get", "pod", &pod.name, "-o", path])?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// All pods with running containers.
    pub fn pods(&self) -> Vec<Pod> {
        state::pods(&self.record.run_dir)
    }

    /// A pod by name, beginning of the name, or label `app`.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        state::find(&self.record.run_dir, name)
    }

    /// A command inside a pod's first container, not yet run.
    pub fn exec(&self, pod: &str, argv: &[&str]) -> Result<Command> {
        let pod = self.pod(pod)?;
        let container = pod.main()?;
        wait::until(&format!("{} to be set up", pod.name), Duration::from_secs(10), || {
            ensure!(container::is_set_up(container.pid)?, "its file systems are being mounted");
            Ok(())
        })?;
        let argv: Vec<String> = argv.iter().map(|word| (*word).to_owned()).collect();
        Ok(container::exec_command(container.pid, &container.cgroup, &container.env, &argv))
    }

    /// As [`Session::exec`], with the rights that a container has, and these capabilities more: exec itself keeps the
    /// caller's. Names without `CAP_`, lower case.
    pub fn exec_as(&self, pod: &str, more: &[&str], argv: &[&str]) -> Result<Command> {
        let mut kept: Vec<String> = container::DEFAULT_CAPABILITIES.iter().map(|name| (*name).to_owned()).collect();
        kept.extend(more.iter().map(|name| (*name).to_owned()));
        let script =
            format!("exec {} -- \"$@\"", Security { capabilities: Some(kept), ..Security::privileged() }.setpriv());
        let limited: Vec<&str> = ["/bin/sh", "-ec", &script, "exec"].into_iter().chain(argv.iter().copied()).collect();
        self.exec(pod, &limited)
    }

    /// The node proxy of a node.
    pub fn proxy(&self, node: &str) -> Result<Pod> {
        let is_it = |pod: &Pod| pod.node == node && pod.labels.get("app").is_some_and(|app| app == "ztunnel");
        let mut running = self.pods().into_iter().filter(|pod| !pod.containers.is_empty());
        running.find(is_it).with_context(|| format!("no ztunnel runs on {node}"))
    }

    /// A command where the kubelet of a node runs.
    pub fn on_node(&self, node: &str, argv: &[&str]) -> Command {
        let netns = PathBuf::from("/run/netns").join(format!("{}{node}", self.record.netns_prefix));
        Kubelet { netns: &netns, cgroup: &self.record.cgroup.join(node) }.command(argv)
    }

    /// The namespace between the nodes.
    pub fn wire(&self) -> Netns {
        Netns { name: format!("{}parent", self.record.netns_prefix) }
    }

    /// Captures what crosses between the nodes from now on.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.wire())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.supervisor.is_some()
            && let Err(e) = self.end()
        {
            eprintln!("the lab cannot be taken down: {e:#}");
        }
    }
}

/// Exists once the lab serves.
pub fn ready_file(record: &Record) -> PathBuf {
    record.run_dir.join("ready")
}
