//! A mesh to be loaded: two ztunnels fed from files, three pods in the mesh and two outside, servers in all that are talked to.
//!
//! ```text
//!   node-a  client (mesh) ──┬──► near (mesh)          node-b
//!                           ├─────────────────────────► far (mesh) ──► client
//!                           └─────────────────────────► plain
//!           outside ────────┬──► near
//!                           └─────────────────────────► far
//! ```
//! Every arrow is a flow for IPv4 and one for IPv6.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::client::{Amount, Flow, READY, Visible};
use super::{Tally, now_ms};
use crate::bench::serve;
use crate::local::{self, unlimited};
use crate::raw::{Lab, NODES, Pod, Process};
use crate::{sys, wait};

const NAMESPACE: &str = "soak";
/// Longest that a ztunnel may take to be ready on a crowded machine.
const UP: Duration = Duration::from_secs(30);

/// Addresses of the pods that are talked to.
#[derive(Clone, Debug)]
pub struct Pods {
    pub client: Vec<IpAddr>,
    pub near: Vec<IpAddr>,
    pub far: Vec<IpAddr>,
    pub plain: Vec<IpAddr>,
}

/// For each pod that opens connections: its flows, and its share of the amount in percent of new and of long-lived ones. `within` says
/// whether what pods of the mesh say to each other may be read.
pub fn shares(pods: &Pods, within: Visible) -> [(&'static str, Vec<Flow>, u32, u32); 3] {
    let flow = |name: &str, to: &[IpAddr], visible| -> Vec<Flow> {
        let one = |ip: &IpAddr| Flow {
            name: format!("{name}{}", if ip.is_ipv4() { 4 } else { 6 }),
            to: SocketAddr::new(*ip, serve::ECHO),
            visible,
        };
        to.iter().map(one).collect()
    };
    let (far, near) = (flow("far", &pods.far, within), flow("near", &pods.near, within));
    let client = [far, near, flow("leaving", &pods.plain, Visible::May)].concat();
    let coming = [flow("coming-far", &pods.far, Visible::May), flow("coming-near", &pods.near, Visible::May)].concat();
    [("client", client, 50, 50), ("outside", coming, 25, 25), ("far", flow("back", &pods.client, within), 25, 25)]
}

/// The mesh, its pods and their servers. Dropping it takes all down.
pub struct Stage {
    client: Pod,
    near: Pod,
    far: Pod,
    outside: Pod,
    plain: Pod,
    /// Servers, and what keeps a pod alive without one.
    _servers: Vec<Process>,
    program: PathBuf,
    ztunnels: HashMap<&'static str, Ztunnel>,
    started: u32,
    runs: u32,
    lab: Lab,
}

/// One process, and where it says whether it is ready.
pub struct Ztunnel {
    pub process: Process,
    ports: u16,
    /// Milliseconds since 1970 of its start.
    pub started_ms: u64,
}

/// Clients under way.
pub struct Load {
    clients: Vec<Process>,
}

impl Stage {
    /// Brings all up but the ztunnels; `bench` is the program that is both ends of the load.
    ///
    /// # Errors
    /// When something does not start.
    pub fn up(id: &str, bench: &Path) -> Result<Self> {
        let lab = Lab::up(id)?;
        let (a, b) = (lab.node("node-a"), lab.node("node-b"));
        let (client, near, outside) = (a.add_pod("client")?, a.add_pod("near")?, a.add_pod("outside")?);
        let (far, plain) = (b.add_pod("far")?, b.add_pod("plain")?);
        let argv = unlimited(&[&bench.display().to_string(), "serve"]);
        let mut servers = Vec::new();
        for pod in [&client, &near, &far, &outside, &plain] {
            sys::sysctl(&pod.net.netns.path(), &super::TIME_WAIT_REUSED)?;
            servers.push(pod.spawn(&format!("serve-{}", pod.name), &words(&argv), &[])?);
        }
        for server in &mut servers {
            server.wait_listening(serve::HTTP)?;
        }
        local::write_ca(&lab.scratch("ca")?)?;
        let program = bench.to_owned();
        let stage = Self {
            client,
            near,
            far,
            outside,
            plain,
            _servers: servers,
            program,
            ztunnels: HashMap::new(),
            started: 0,
            runs: 0,
            lab,
        };
        for node in NODES {
            stage.configure(node)?;
        }
        Ok(stage)
    }

    fn members(&self) -> [(&Pod, &'static str); 3] {
        [(&self.client, NODES[0]), (&self.near, NODES[0]), (&self.far, NODES[1])]
    }

    /// Addresses of the pods that talk to each other through the mesh.
    pub fn mesh_addresses(&self) -> Vec<IpAddr> {
        self.members().iter().flat_map(|(pod, _)| pod.net.addresses()).collect()
    }

    /// The lab below.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Tells a node's ztunnel of the mesh, and to enrol its pods.
    fn configure(&self, node: &str) -> Result<()> {
        let members = self.members();
        let here: Vec<&Pod> = members.iter().filter(|(_, of)| *of == node).map(|(pod, _)| *pod).collect();
        local::write_file(&self.file(node)?, &local::mesh_file(NAMESPACE, &members, &here))
    }

    fn file(&self, node: &str) -> Result<PathBuf> {
        Ok(self.lab.scratch("mesh")?.join(format!("{node}.yaml")))
    }

    /// Starts a ztunnel on a node, beside one that may still be there, and returns at once.
    ///
    /// # Errors
    /// When the program cannot be run.
    pub fn start(&mut self, node: &str, program: &Path) -> Result<Ztunnel> {
        let node = self.lab.node(node);
        self.started += 1;
        // A predecessor keeps its ports until it ends, and there may be two of them.
        let ports = 15000 + u16::try_from(self.started % 40).unwrap_or(0) * 100;
        let (file, ca) = (self.file(&node.net.name)?, self.lab.scratch("ca")?);
        let name = format!("ztunnel-{}-{}", node.net.name, self.started);
        let started_ms = now_ms();
        let process = local::start_ztunnel(node, &name, program, &file, &ca, ports)?;
        Ok(Ztunnel { process, ports, started_ms })
    }

    /// Waits until a ztunnel is ready, which says that its pods are enrolled.
    ///
    /// # Errors
    /// When it ends, or does not get ready.
    pub fn wait_ready(&self, node: &str, ztunnel: &mut Ztunnel) -> Result<()> {
        let node = self.lab.node(node);
        wait::until(&format!("the ztunnel of {} to be ready", node.net.name), UP, || {
            if !ztunnel.process.running() {
                return Ok(Err(anyhow::anyhow!("it has ended:\n{}", ztunnel.process.output())));
            }
            if local::answers_ready(node, ztunnel.ports + 21) { Ok(Ok(())) } else { bail!("not ready") }
        })?
    }

    /// Starts the clients and waits until their long-lived connections are open.
    ///
    /// # Errors
    /// When a client does not get that far.
    pub fn start_load(&mut self, amount: Amount) -> Result<Load> {
        self.runs += 1;
        let mut clients = Vec::new();
        let of = |pod: &Pod| pod.net.addresses().to_vec();
        let pods = Pods { client: of(&self.client), near: of(&self.near), far: of(&self.far), plain: of(&self.plain) };
        for (name, flows, new_share, long_share) in shares(&pods, Visible::Never) {
            let pod = [&self.client, &self.outside, &self.far].into_iter().find(|pod| pod.name == name);
            let pod = pod.context("a client's pod")?;
            let mut argv = unlimited(&[&self.program.display().to_string(), "soak-client"]);
            argv.extend(amount.arguments(&flows, new_share, long_share));
            clients.push(pod.spawn(&format!("client-{}-{}", pod.name, self.runs), &words(&argv), &[])?);
        }
        let mut load = Load { clients };
        for client in &mut load.clients {
            wait::until("the long-lived connections to open", Duration::from_secs(60), || {
                let said = client.output();
                if !client.running() {
                    return Ok(Err(anyhow::anyhow!("the load ended early: {said}")));
                }
                if said.contains(READY) { Ok(Ok(())) } else { bail!("not all are open") }
            })??;
        }
        Ok(load)
    }

    /// The ztunnel that serves a node now.
    pub fn current(&mut self, node: &'static str) -> Option<Ztunnel> {
        self.ztunnels.remove(node)
    }

    /// Makes this the one that serves a node.
    pub fn install(&mut self, node: &'static str, ztunnel: Ztunnel) {
        self.ztunnels.insert(node, ztunnel);
    }

    /// Starts a ztunnel on both nodes and waits for them.
    ///
    /// # Errors
    /// When one does not get ready.
    pub fn start_both(&mut self, program: &Path) -> Result<()> {
        for node in NODES {
            let ztunnel = self.start(node, program)?;
            self.install(node, ztunnel);
        }
        for node in NODES {
            let mut ztunnel = self.current(node).context("it was started")?;
            self.wait_ready(node, &mut ztunnel)?;
            self.install(node, ztunnel);
        }
        Ok(())
    }
}

impl Load {
    /// Lets it run on until a moment; an early end is an error.
    ///
    /// # Errors
    /// When a client has ended.
    pub fn run_until(&mut self, end: Instant) -> Result<()> {
        let time = end.saturating_duration_since(Instant::now());
        wait::until_true("the time to pass", time + Duration::from_secs(5), || {
            Instant::now() >= end || self.clients.iter_mut().any(|client| !client.running())
        })?;
        self.check()
    }

    /// # Errors
    /// When a client has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.clients.iter_mut().find_map(|client| (!client.running()).then(|| client.output())) {
            Some(said) => bail!("a client has ended: {said}"),
            None => Ok(()),
        }
    }

    /// Ends it; what all clients together saw.
    ///
    /// # Errors
    /// When a client does not end well, or its counts do not add up.
    pub fn stop(mut self) -> Result<Tally> {
        for client in &self.clients {
            client.signal(Signal::SIGTERM)?;
        }
        let mut all = Tally::default();
        for client in &mut self.clients {
            let status = client.wait(Duration::from_secs(45))?;
            all.merge(Tally::read(status, &fs::read_to_string(&client.log)?)?);
        }
        Ok(all)
    }
}

fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}
