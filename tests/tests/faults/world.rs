//! A mesh of two ztunnels to break: a client on one node, a server on the other, one outside the mesh, and connections between them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use mesh_tests::bench::serve;
use mesh_tests::local;
use mesh_tests::places::Places;
use mesh_tests::raw::{self, Lab, NODES, Pod, Process};
use mesh_tests::wait;

/// How long what should work may take on a crowded machine.
pub const SETTLE: Duration = Duration::from_secs(30);
const PORTS: u16 = 15000;
/// Says `open` once it has been answered, and `ended` when the connection has.
const IDLE: &str = "exec 3<>/dev/tcp/$0/$1 && echo hello >&3 && read -r line <&3 && echo open\n\
    while read -r line <&3; do :; done; echo ended";
/// Says something five times a second and counts the answers; `LOST` when there is none.
const BEAT: &str = "trap '' PIPE; exec 3<>/dev/tcp/$0/$1; n=0\n\
    while :; do n=$((n+1)); echo $n >&3 || break; read -r -t 60 line <&3 || break; echo \"beat $line\"; sleep 0.2; done; echo LOST";
const ONCE: &str = "exec 3<>/dev/tcp/$0/$1 && echo hello >&3 && read -r -t 60 line <&3 && echo \"$line\"";

/// The mesh; dropping it takes all down.
pub struct Mesh {
    pub client: Pod,
    pub far: Pod,
    /// Outside the mesh, on the server's node.
    pub plain: Pod,
    pub places: Places,
    ztunnels: BTreeMap<&'static str, Process>,
    started: u32,
    pids: Vec<u32>,
    _servers: Vec<Process>,
    pub lab: Lab,
}

impl Mesh {
    /// Brings pods and servers up where the lab is available, and no ztunnel.
    pub fn prepare(name: &str) -> Result<Option<Self>> {
        if !raw::available() {
            return Ok(None);
        }
        let places = Places::find()?;
        for program in ["bench", "ztunnel"] {
            ensure!(places.binaries.join(program).exists(), "{program} is missing: run `cargo xtask build`");
        }
        let lab = Lab::up(&format!("{name}{}", std::process::id()))?;
        let client = lab.node(NODES[0]).add_pod("client")?;
        let (far, plain) = (lab.node(NODES[1]).add_pod("far")?, lab.node(NODES[1]).add_pod("plain")?);
        let bench = places.binaries.join("bench").display().to_string();
        let mut servers = Vec::new();
        for pod in [&client, &far, &plain] {
            servers.push(pod.spawn(&format!("serve-{}", pod.name), &[&bench, "serve"], &[])?);
        }
        for server in &mut servers {
            server.wait_listening(serve::HTTP)?;
        }
        local::write_ca(&lab.scratch("ca")?)?;
        let members = [(&client, NODES[0]), (&far, NODES[1])];
        for (pod, node) in members {
            let file = lab.scratch("mesh")?.join(format!("{node}.yaml"));
            local::write_file(&file, &local::mesh_file("faults", &members, &[pod]))?;
        }
        Ok(Some(Self {
            client,
            far,
            plain,
            places,
            ztunnels: BTreeMap::new(),
            started: 0,
            pids: Vec::new(),
            _servers: servers,
            lab,
        }))
    }

    /// As [`Mesh::prepare`], with a ztunnel on each node.
    pub fn up(name: &str) -> Result<Option<Self>> {
        let Some(mut mesh) = Self::prepare(name)? else { return Ok(None) };
        NODES.iter().try_for_each(|node| mesh.start(node, &[]))?;
        Ok(Some(mesh))
    }

    /// Starts the ztunnel of a node with settings of its own, and waits for it.
    pub fn start(&mut self, node: &'static str, settings: &[(&str, String)]) -> Result<()> {
        self.started += 1;
        let program = self.program(settings)?;
        let (file, ca) = (self.lab.scratch("mesh")?.join(format!("{node}.yaml")), self.lab.scratch("ca")?);
        let at = self.lab.node(node);
        let name = format!("ztunnel-{node}-{}", self.started);
        let mut process = local::start_ztunnel(at, &name, &program, &file, &ca, PORTS)?;
        self.pids.push(process.pid());
        wait::until(&format!("the ztunnel of {node}"), SETTLE, || {
            if !process.running() {
                return Ok(Err(anyhow::anyhow!("it has ended:\n{}", process.output())));
            }
            if local::answers_ready(at, PORTS + 21) { Ok(Ok(())) } else { bail!("not ready") }
        })??;
        self.ztunnels.insert(node, process);
        Ok(())
    }

    /// A script that has these settings in its environment and becomes ztunnel.
    fn program(&self, settings: &[(&str, String)]) -> Result<PathBuf> {
        let mut script = "#!/bin/sh\n".to_owned();
        for (name, value) in settings {
            writeln!(script, "export {name}='{value}'")?;
        }
        writeln!(script, "exec '{}'", self.places.binaries.join("ztunnel").display())?;
        let path = self.lab.scratch("programs")?.join(format!("ztunnel-{}", self.started));
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// The ztunnel of a node.
    pub fn ztunnel(&mut self, node: &str) -> &mut Process {
        self.ztunnels.get_mut(node).expect("it was started")
    }

    /// What the ztunnel of a node has logged.
    pub fn log(&self, node: &str) -> String {
        self.ztunnels.get(node).expect("it was started").output()
    }

    /// Lines of a ztunnel's log about connections that ended with a flag.
    pub fn flagged(&self, node: &str, flag: &str) -> usize {
        let flag = format!("response_flags=\"{flag}\"");
        self.log(node).lines().filter(|line| line.contains(&flag)).count()
    }

    /// A metric of a ztunnel, by the beginning of its line.
    pub fn metric(&self, node: &str, name: &str) -> Result<f64> {
        let said = local::http(self.lab.node(node), PORTS + 20, "/metrics")?;
        let line = said.lines().find(|line| line.starts_with(name));
        Ok(line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0))
    }

    /// A connection from the client that says nothing once it is open.
    pub fn hold(&self, to: IpAddr) -> Result<Process> {
        let mut held = self.spawn("held", IDLE, to)?;
        held.wait_output("open", SETTLE)?;
        Ok(held)
    }

    /// A connection from the client that goes on talking.
    pub fn beat(&self, to: IpAddr) -> Result<Process> {
        let mut beat = self.spawn("beat", BEAT, to)?;
        beat.wait_output("beat", SETTLE)?;
        Ok(beat)
    }

    fn spawn(&self, name: &str, script: &str, to: IpAddr) -> Result<Process> {
        let (to, port) = (to.to_string(), serve::ECHO.to_string());
        let log = format!("{name}-{}", to.replace([':', '.'], "-"));
        self.client.spawn(&log, &["bash", "-c", script, &to, &port], &[])
    }

    /// One new connection of the client: whether it was answered, and how long that took.
    pub fn call(&self, to: IpAddr) -> Result<(bool, Duration)> {
        Self::call_from(&self.client, to)
    }

    /// The same from another pod.
    pub fn call_from(pod: &Pod, to: IpAddr) -> Result<(bool, Duration)> {
        let (to, port) = (to.to_string(), serve::ECHO.to_string());
        let began = Instant::now();
        let output = pod.run(&["bash", "-c", ONCE, &to, &port])?;
        Ok((String::from_utf8_lossy(&output.stdout).trim() == "hello", began.elapsed()))
    }

    /// New connections of the client work, or come to within the time.
    pub fn comes_to_work(&self, to: IpAddr) -> Result<()> {
        wait::until("a new connection to be answered", SETTLE, || {
            let (answered, took) = self.call(to)?;
            ensure!(answered, "refused after {took:?}");
            Ok(())
        })
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        // What libfaketime shares between a process and its children, and leaves when the process is killed.
        for pid in &self.pids {
            for name in [format!("faketime_shm_{pid}"), format!("sem.faketime_sem_{pid}")] {
                // Only a process with another clock has them.
                let _ = fs::remove_file(Path::new("/dev/shm").join(name));
            }
        }
    }
}

/// Goes on being answered.
pub fn lives(beat: &Process) -> Result<()> {
    let beats = |said: &str| said.matches("beat").count();
    let before = beats(&beat.output());
    wait::until("the open connection to be answered", SETTLE, || {
        let said = beat.output();
        ensure!(!said.contains("LOST"), "it is lost after {} answers", beats(&said));
        ensure!(beats(&said) > before + 1, "no answer");
        Ok(())
    })
}
