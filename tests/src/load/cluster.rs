//! The same load in a lab with a cluster: pods join and leave by `kubectl label`, ztunnels come and go by rollouts.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::client::{Amount, READY, Visible};
use super::soak::Restart;
use super::stage::{Pods, shares};
use super::{Tally, now_ms};
use crate::bench::serve;
use crate::cluster::state::Pod;
use crate::places::Places;
use crate::raw::NODES;
use crate::session::Session;
use crate::{demo, local, sys, wait};

/// A file of pods, and their names.
pub type Cast = (&'static str, &'static [&'static str]);
/// All pods of the soak.
pub const ALL: Cast = ("tests/soak/pods.yaml", &["client", "near", "far", "outside", "plain"]);
/// One more on the second node, which is closed from time to time.
pub const GUARDED: Cast = ("tests/soak/guarded.yaml", &["guarded"]);
/// Only the server on the second node.
pub const FAR: Cast = ("tests/soak/far.yaml", &["far"]);

const LABEL: &str = "istio.io/dataplane-mode";
/// How long the mesh may take for what it is asked, on a crowded machine.
const SETTLE: Duration = Duration::from_secs(30);
/// What the version in a ztunnel binary looks like, and what a later one would have there.
const VERSION: &str = concat!("ztunnel/", env!("CARGO_PKG_VERSION"));

/// A cluster with the mesh installed and the pods of the soak, none of which has joined.
pub struct Cluster {
    pub session: Session,
    runs: u32,
    versions: u32,
}

/// Clients under way in pods of the cluster.
pub struct Load {
    clients: Vec<(Child, PathBuf)>,
}

impl Cluster {
    /// Brings all up.
    ///
    /// # Errors
    /// When something does not come up.
    pub fn up(id: &str, places: &Places, (file, names): &Cast) -> Result<Self> {
        let session = Session::start(id, places)?;
        demo::install_with(&session, file)?;
        let cluster = Self { session, runs: 0, versions: 0 };
        cluster.wait_serving(names)?;
        Ok(cluster)
    }

    /// Adds pods to those that are there.
    ///
    /// # Errors
    /// When they do not come up.
    pub fn add(&self, (file, names): &Cast) -> Result<()> {
        self.kubectl(&["apply", "-f", file])?;
        self.wait_serving(names)
    }

    fn wait_serving(&self, names: &[&str]) -> Result<()> {
        for name in names {
            let pod = wait::until(&format!("pod {name}"), SETTLE, || self.session.pod(name))?;
            sys::sysctl(&pod.netns, &super::TIME_WAIT_REUSED)?;
            wait::until_true("a server to listen", SETTLE, || {
                crate::raw::listening(&pod.netns, serve::HTTP).unwrap_or(false)
            })?;
        }
        Ok(())
    }

    /// Runs `kubectl`; a refusal is an error.
    ///
    /// # Errors
    /// What it said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let output = self.session.kubectl_output(arguments)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(said)
    }

    /// Addresses of the pods that are in the mesh after [`Cluster::enrol`].
    ///
    /// # Errors
    /// When a pod is not there.
    pub fn mesh_addresses(&self) -> Result<Vec<std::net::IpAddr>> {
        let pods = ["soak/client", "soak/near", "soak/far"].iter().map(|name| self.session.pod(name));
        Ok(pods.collect::<Result<Vec<_>>>()?.into_iter().flat_map(|pod| pod.addresses).collect())
    }

    /// Labels the namespace and waits until every pod of it is said to be enrolled.
    ///
    /// # Errors
    /// When one is not.
    pub fn enrol(&self) -> Result<()> {
        self.kubectl(&["label", "namespace", "soak", &format!("{LABEL}=ambient"), "--overwrite"])?;
        let pods = self.session.pods().into_iter().filter(|pod| pod.namespace == "soak");
        self.wait_annotated("enabled", pods.count())
    }

    /// Takes the label away and waits until no pod is said to be enrolled.
    ///
    /// # Errors
    /// When one still is.
    pub fn unenrol(&self) -> Result<()> {
        self.kubectl(&["label", "namespace", "soak", &format!("{LABEL}-")])?;
        self.wait_annotated("enabled", 0)
    }

    fn wait_annotated(&self, value: &str, count: usize) -> Result<()> {
        wait::until(&format!("{count} pods annotated {value}"), SETTLE, || {
            let path =
                "jsonpath={range .items[*]}{.metadata.annotations.ambient\\.istio\\.io/redirection}{\"\\n\"}{end}";
            let said = self.kubectl(&["-n", "soak", "get", "pods", "-o", path])?;
            let found = said.lines().filter(|line| *line == value).count();
            ensure!(found == count, "{found} are");
            Ok(())
        })
    }

    /// Rolls the ztunnels over to a binary of another version, and waits until it serves both nodes. Returns the version.
    ///
    /// # Errors
    /// When the rollout does not end, or the metrics do not show the version.
    pub fn upgrade(&mut self) -> Result<String> {
        self.versions += 1;
        // Two that take turns: copies of a debug build are large.
        let version = format!("0.1.{}", 1 + self.versions % 2);
        let image = format!("ztunnel:{version}");
        let images = self.session.places.images(&self.session.record.id);
        if !images.pushed.join(&image).exists() {
            let binary = fs::read(images.binaries.join("ztunnel"))?;
            images.push(&image, &with_version(&binary, &version)?)?;
        }
        let set = format!("istio-proxy={image}");
        self.kubectl(&["-n", "istio-system", "set", "image", "daemonset/ztunnel", &set])?;
        self.rolled_out()?;
        for node in NODES {
            wait::until(&format!("{version} to serve {node}"), SETTLE, || {
                let said = self.serving(node)?.metrics()?;
                ensure!(said.contains(&format!("tag=\"{version}\"")), "the metrics do not show it");
                Ok(())
            })?;
        }
        Ok(version)
    }

    /// Has so many ztunnels of a node drain at a time.
    ///
    /// # Errors
    /// When the rollout does not end.
    pub fn let_drain(&self, generations: u32) -> Result<()> {
        self.set(&[&format!("DRAINING_GENERATIONS={generations}")])
    }

    /// Has the ztunnels run with other settings, `NAME=VALUE` each.
    ///
    /// # Errors
    /// When the rollout does not end.
    pub fn set(&self, settings: &[&str]) -> Result<()> {
        let command = ["-n", "istio-system", "set", "env", "daemonset/ztunnel"];
        self.kubectl(&[&command, settings].concat())?;
        self.rolled_out()
    }

    /// Waits until a rollout of the ztunnels has ended.
    ///
    /// # Errors
    /// When it does not.
    pub fn rolled_out(&self) -> Result<()> {
        self.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=60s"]).map(drop)
    }

    /// Kills the ztunnel of a node and waits until its container has been started again and is ready. The restart begins with ztunnel
    /// itself, not with the container that is made for it.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn kill(&self, node: &str) -> Result<Restart> {
        let old = self.serving(node)?;
        let pid = old.0.main()?.pid;
        let killed_ms = now_ms();
        kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
        let started_ms = wait::until("the container to be started again", SETTLE, || {
            let again = self.session.pod(&format!("istio-system/{}", old.0.name))?;
            let pid_now = again.main()?.pid;
            ensure!(pid_now != pid, "not yet");
            // Before that it is the lab that makes a container.
            let program = fs::read_link(format!("/proc/{pid_now}/exe"))?;
            ensure!(program.ends_with("ztunnel"), "{} still sets the container up", program.display());
            Ok(now_ms())
        })?;
        wait::until("the ztunnel to be ready again", SETTLE, || self.serving(node).map(drop))?;
        Ok(Restart { killed_ms, started_ms })
    }

    /// The ready ztunnel of a node that is not about to end.
    fn serving(&self, node: &str) -> Result<Ztunnel> {
        let path = "jsonpath={range .items[*]}{.metadata.uid} {.metadata.deletionTimestamp} \
                    {.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}{end}";
        let said = self.kubectl(&["-n", "istio-system", "get", "pods", "-l", "app=ztunnel", "-o", path])?;
        // The middle column is empty where nobody has deleted the pod.
        let ready: Vec<&str> = said
            .lines()
            .filter_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
                [uid, "", "True"] => Some(uid),
                _ => None,
            })
            .collect();
        let here = self.ztunnels().into_iter().find(|z| z.0.node == node && ready.contains(&z.0.uid.as_str()));
        here.with_context(|| format!("no ztunnel is ready on {node}: {said}"))
    }

    fn ztunnels(&self) -> Vec<Ztunnel> {
        let all =
            self.session.pods().into_iter().filter(|pod| pod.labels.get("app").is_some_and(|app| app == "ztunnel"));
        all.map(Ztunnel).collect()
    }

    /// Starts the clients and waits until their long-lived connections are open.
    ///
    /// # Errors
    /// When a client does not get that far.
    pub fn start_load(&mut self, amount: Amount, secret: Visible) -> Result<Load> {
        let address = |name: &str| Ok::<_, anyhow::Error>(self.session.pod(name)?.addresses);
        let pods = Pods {
            client: address("soak/client")?,
            near: address("soak/near")?,
            far: address("soak/far")?,
            plain: address("outside/plain")?,
        };
        let clients = shares(&pods, secret).map(|(pod, flows, new, long)| (pod, amount.arguments(&flows, new, long)));
        self.start_clients(&clients)
    }

    /// Starts clients in pods, each with its arguments, and waits until their long-lived connections are open.
    ///
    /// # Errors
    /// When a client does not get that far.
    pub fn start_clients(&mut self, clients: &[(&str, Vec<String>)]) -> Result<Load> {
        self.runs += 1;
        let mut load = Load { clients: Vec::new() };
        for (pod, arguments) in clients {
            let log = self.session.record.logs().join(format!("load-{pod}-{}.log", self.runs));
            let mut argv = local::unlimited(&["bench", "soak-client"]);
            argv.extend_from_slice(arguments);
            let words: Vec<&str> = argv.iter().map(String::as_str).collect();
            let output = File::create(&log)?;
            let mut command = self.session.exec(pod, &words)?;
            let child = command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).spawn()?;
            load.clients.push((child, log));
        }
        for (client, log) in &mut load.clients {
            wait::until("the long-lived connections to open", Duration::from_secs(60), || {
                let said = fs::read_to_string(log.as_path())?;
                if client.try_wait()?.is_some() {
                    return Ok(Err(anyhow::anyhow!("the load ended early: {said}")));
                }
                if said.contains(READY) { Ok(Ok(())) } else { bail!("not all are open") }
            })??;
        }
        Ok(load)
    }
}

/// One ztunnel's pod.
struct Ztunnel(Pod);

impl Ztunnel {
    fn metrics(&self) -> Result<String> {
        let to = SocketAddr::from(([127, 0, 0, 1], 15020));
        sys::in_netns(&self.0.netns, move || local::get(to, "/metrics"))
    }
}

impl Load {
    /// Lets it run on until a moment; an early end is an error.
    ///
    /// # Errors
    /// When a client has ended.
    pub fn run_until(&mut self, end: Instant) -> Result<()> {
        let time = end.saturating_duration_since(Instant::now());
        let clients = &mut self.clients;
        wait::until_true("the time to pass", time + Duration::from_secs(5), || {
            Instant::now() >= end || clients.iter_mut().any(|(client, _)| !matches!(client.try_wait(), Ok(None)))
        })?;
        for (client, log) in clients {
            if client.try_wait()?.is_some() {
                bail!("a client has ended: {}", fs::read_to_string(log.as_path())?);
            }
        }
        Ok(())
    }

    /// Ends it; what all clients together saw.
    ///
    /// # Errors
    /// When a client does not end well, or its counts do not add up.
    pub fn stop(mut self) -> Result<Tally> {
        for (client, _) in &self.clients {
            kill(Pid::from_raw(i32::try_from(client.id())?), Signal::SIGTERM)?;
        }
        let mut all = Tally::default();
        for (client, log) in &mut self.clients {
            let status = wait::until("a client to end", Duration::from_secs(45), || {
                client.try_wait()?.context("it still runs")
            })?;
            all.merge(Tally::read(status, &fs::read_to_string(log.as_path())?)?);
        }
        Ok(all)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for (client, _) in &mut self.clients {
            // An error means that it has ended.
            let _ = client.kill();
            let _ = client.wait();
        }
    }
}

/// The binary with another version in it, of the same length.
fn with_version(binary: &[u8], version: &str) -> Result<Vec<u8>> {
    let (old, new) = (VERSION.as_bytes(), format!("ztunnel/{version}"));
    ensure!(old.len() == new.len(), "{version} is not as long as the version it replaces");
    let mut changed = binary.to_vec();
    let mut at = 0;
    let mut found = 0;
    while let Some(next) = changed[at..].windows(old.len()).position(|window| window == old) {
        changed[at + next..at + next + old.len()].copy_from_slice(new.as_bytes());
        at += next + old.len();
        found += 1;
    }
    ensure!(found > 0, "no {VERSION} in the binary");
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_gets_another_version_everywhere() {
        let binary = [b"\0\x01", VERSION.as_bytes(), b"x", VERSION.as_bytes()].concat();
        let changed = with_version(&binary, "0.1.7").expect("the version is there");
        assert_eq!(changed, b"\0\x01ztunnel/0.1.7xztunnel/0.1.7");
        assert!(with_version(b"nothing", "0.1.7").is_err() && with_version(&binary, "0.1.70").is_err());
    }
}
