//! One contestant: two nodes, a client, a server on the other node and one on the same, and whatever proxies it brings.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::interrupt::Interrupt;
use super::load::{self, Outcome};
use super::relay;
use super::serve;
use super::usage::{Sample, Spent};
use crate::local::{self, unlimited};
use crate::raw::{Lab, Pod, Process};
use crate::sys;

const NAMESPACE: &str = "bench";
/// A relay beside a server listens so far above the server's port.
const RELAYED: u16 = 1000;
/// Longest that proxies may take to get ready.
const READY: Duration = Duration::from_secs(30);
/// Beyond its own time a load may take this long, before it counts as lost; it gives up by itself earlier.
const OVERTIME: Duration = Duration::from_secs(90);

/// What carries the traffic.
#[derive(Clone, Debug)]
pub enum Mesh {
    /// Nothing: the kernel alone.
    Plain,
    /// Our ztunnel, this binary.
    Ours(PathBuf),
    /// A relay beside the client and one beside each server, which copy; with TLS between the two, or without.
    Relay { tls: bool },
    /// A command of the user's, run on each node.
    Peer(String),
}

/// Which server a test talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    OtherNode,
    SameNode,
}

/// A contestant that is up. Dropping it takes everything down.
pub struct Arena {
    pub name: String,
    pub mesh: Mesh,
    proxies: Vec<Process>,
    /// Servers, and what keeps the client pod alive.
    _servers: Vec<Process>,
    client: Pod,
    far: Pod,
    near: Pod,
    program: PathBuf,
    interrupt: Interrupt,
    runs: u32,
    pub lab: Lab,
}

impl Arena {
    /// Brings a contestant up and waits until it is ready.
    ///
    /// # Errors
    /// When something does not start; what its proxies said is part of the error.
    pub fn up(name: &str, mesh: Mesh, interrupt: &Interrupt) -> Result<Self> {
        let lab = Lab::up(&format!("bench-{name}"))?;
        let client = lab.node("node-a").add_pod("client")?;
        let near = lab.node("node-a").add_pod("near")?;
        let far = lab.node("node-b").add_pod("far")?;
        for pod in [&client, &near, &far] {
            sys::sysctl(&pod.net.netns.path(), &local::MANY_PORTS)?;
        }
        let program = std::env::current_exe()?;
        let mut servers = vec![client.spawn("pause", &["sleep", "infinity"], &[])?];
        for pod in [&near, &far] {
            let argv = unlimited(&[&program.display().to_string(), "serve"]);
            servers.push(pod.spawn(&pod.name, &words(&argv), &[])?);
        }
        for server in &mut servers[1..] {
            server.wait_listening(serve::HTTP)?;
        }
        let interrupt = interrupt.clone();
        let mut arena = Self {
            name: name.to_owned(),
            mesh,
            proxies: Vec::new(),
            _servers: servers,
            client,
            far,
            near,
            program,
            interrupt,
            runs: 0,
            lab,
        };
        match arena.mesh {
            Mesh::Relay { tls } => arena.start_relays(tls),
            _ => arena.start_proxies(),
        }
        .with_context(|| format!("starting {name}"))?;
        Ok(arena)
    }

    fn start_proxies(&mut self) -> Result<()> {
        let ca = self.lab.scratch("ca")?;
        local::write_ca(&ca)?;
        let pods_file = self.lab.scratch("mesh")?.join("pods.json");
        fs::write(&pods_file, serde_json::to_vec_pretty(&self.pods_as_json())?)?;
        for node in self.lab.nodes() {
            let name = &node.net.name;
            let ready = self.lab.scratch("mesh")?.join(format!("{name}.ready"));
            let config = self.lab.scratch("mesh")?.join(format!("{name}.yaml"));
            let enrolled: Vec<&Pod> = match self.mesh {
                Mesh::Ours(_) => self.pods().into_iter().filter(|(_, of)| of == name).map(|(pod, _)| pod).collect(),
                Mesh::Plain | Mesh::Relay { .. } | Mesh::Peer(_) => Vec::new(),
            };
            local::write_file(&config, &local::mesh_file(NAMESPACE, &self.pods(), &enrolled))?;
            let shown = |path: &Path| path.display().to_string();
            let env = [
                ("NODE_NAME", name.clone()),
                ("NODE_IP", node.net.ipv4.to_string()),
                ("PODS", shown(&pods_file)),
                ("LOCAL_XDS_PATH", shown(&config)),
                ("LOCAL_CA_DIR", shown(&ca)),
                ("CGROUP_ROOT", shown(&node.cgroup)),
                ("HOST_NETNS", "/proc/self/ns/net".to_owned()),
                ("BPFFS_DIR", shown(&node.bpffs)),
                ("READY_FILE", shown(&ready)),
            ];
            let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (*key, value.as_str())).collect();
            let argv = match &self.mesh {
                Mesh::Plain | Mesh::Relay { .. } => continue,
                Mesh::Ours(ztunnel) => unlimited(&[&shown(ztunnel)]),
                Mesh::Peer(command) => unlimited(&["/bin/sh", "-c", command]),
            };
            self.proxies.push(node.spawn(&format!("proxy-{name}"), &words(&argv), &env)?);
        }
        for (node, proxy) in self.lab.nodes().iter().zip(&mut self.proxies) {
            let file = self.lab.scratch("mesh")?.join(format!("{}.ready", node.net.name));
            self.interrupt.until(&format!("the proxy of {} to be ready", node.net.name), READY, || {
                alive(proxy)?;
                let ready = match &self.mesh {
                    Mesh::Ours(_) => local::answers_ready(node, 15021),
                    Mesh::Peer(_) => file.exists(),
                    Mesh::Plain | Mesh::Relay { .. } => true,
                };
                Ok(ready.then_some(()))
            })?;
        }
        Ok(())
    }

    /// In the pods' namespaces, and in the nodes' cgroups, where a mesh has its proxies.
    fn start_relays(&mut self, tls: bool) -> Result<()> {
        let certificate = self.lab.scratch("relay")?;
        relay::write_certificate(&certificate)?;
        let from_client = [Target::OtherNode, Target::SameNode].map(|target| {
            let (here, there) = (self.destination(target), self.address(target));
            serve::ALL.map(|port| format!("{here}:{port}={there}:{}", port + RELAYED))
        });
        let to_server = |pod: &Pod| {
            let here = pod.net.ipv4;
            serve::ALL.map(|port| format!("{here}:{}={here}:{port}", port + RELAYED)).to_vec()
        };
        let relays = [
            ("node-a", &self.client, "to", from_client.concat()),
            ("node-a", &self.near, "from", to_server(&self.near)),
            ("node-b", &self.far, "from", to_server(&self.far)),
        ];
        let mut started = Vec::new();
        for (node, pod, side, ways) in relays {
            let netns = format!("--net={}", pod.net.netns.path().display());
            let program = self.program.display().to_string();
            let mut argv = unlimited(&["nsenter", &netns, &program, "relay"]);
            if tls {
                argv.extend(["--tls", side, "--certificate", &certificate.display().to_string()].map(str::to_owned));
            }
            argv.extend(ways);
            started.push(self.lab.node(node).spawn(&format!("relay-{}", pod.name), &words(&argv), &[])?);
        }
        self.proxies = started;
        for relay in &mut self.proxies {
            relay.wait_output(relay::READY, READY)?;
        }
        Ok(())
    }

    /// What a load is told to dial.
    fn destination(&self, target: Target) -> IpAddr {
        match (&self.mesh, target) {
            (Mesh::Relay { .. }, Target::OtherNode) => [127, 0, 1, 1].into(),
            (Mesh::Relay { .. }, Target::SameNode) => [127, 0, 2, 1].into(),
            _ => self.address(target),
        }
    }

    fn pods(&self) -> [(&Pod, &str); 3] {
        [(&self.client, "node-a"), (&self.near, "node-a"), (&self.far, "node-b")]
    }

    fn pods_as_json(&self) -> serde_json::Value {
        let pod = |(pod, node): (&Pod, &str)| {
            json!({
                "name": pod.name, "uid": pod.uid, "node": node, "netns": pod.net.netns.path(),
                "ipv4": pod.net.ipv4, "ipv6": pod.net.ipv6, "cgroup": pod.cgroup,
            })
        };
        self.pods().map(pod).into()
    }

    /// The address a target has.
    pub fn address(&self, target: Target) -> IpAddr {
        match target {
            Target::OtherNode => self.far.net.ipv4.into(),
            Target::SameNode => self.near.net.ipv4.into(),
        }
    }

    /// The client's own.
    pub fn client_address(&self) -> IpAddr {
        self.client.net.ipv4.into()
    }

    /// Cgroups of the proxies, one for each node; `None` without proxies.
    pub fn proxy_cgroups(&self) -> Option<Vec<PathBuf>> {
        match self.mesh {
            Mesh::Plain => None,
            _ => Some(self.lab.nodes().iter().map(|node| node.cgroup.join("system")).collect()),
        }
    }

    /// Starts a load in the client pod.
    pub fn start_load(
        &mut self,
        kind: &str,
        target: Target,
        connections: u32,
        size: u32,
        secs: f64,
    ) -> Result<Process> {
        self.runs += 1;
        let argv = unlimited(&[
            &self.program.display().to_string(),
            "load",
            kind,
            "--to",
            &self.destination(target).to_string(),
            "--connections",
            &connections.to_string(),
            "--size",
            &size.to_string(),
            "--secs",
            &secs.to_string(),
        ]);
        self.client.spawn(&format!("load-{}", self.runs), &words(&argv), &[])
    }

    /// Runs a load to its end and says what it saw and what it cost.
    ///
    /// # Errors
    /// The load's own error; a proxy that has ended; an interruption.
    pub fn load(
        &mut self,
        kind: &str,
        target: Target,
        connections: u32,
        size: u32,
        secs: f64,
    ) -> Result<(Outcome, Spent)> {
        let proxies = self.proxy_cgroups().unwrap_or_default();
        let lab = self.lab.record.cgroup.clone();
        let before = Sample::take(&lab, &proxies)?;
        let mut process = self.start_load(kind, target, connections, size, secs)?;
        let deadline = load::WARM_UP + Duration::from_secs_f64(secs) + OVERTIME;
        self.interrupt.until("the load to end", deadline, || Ok((!process.running()).then_some(())))?;
        let after = Sample::take(&lab, &proxies)?;
        self.check_proxies()?;
        let said = process.output();
        if !process.wait(Duration::ZERO)?.success() {
            bail!("{}: {kind} with {connections}: {}", self.name, said.trim());
        }
        let line = said.lines().last().context("the load said nothing")?;
        let outcome = serde_json::from_str(line).with_context(|| format!("the load said {line:?}"))?;
        Ok((outcome, after.since(&before)))
    }

    /// # Errors
    /// When a proxy has ended, with what it said last.
    pub fn check_proxies(&mut self) -> Result<()> {
        self.proxies.iter_mut().try_for_each(alive)
    }
}

fn alive(proxy: &mut Process) -> Result<()> {
    if proxy.running() {
        return Ok(());
    }
    let said = proxy.output();
    let lines: Vec<&str> = said.lines().collect();
    bail!("{} has ended:\n{}", proxy.log.display(), lines[lines.len().saturating_sub(20)..].join("\n"))
}

fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}
