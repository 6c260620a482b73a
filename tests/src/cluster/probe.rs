//! Readiness probes, run as a kubelet runs them: from the node's network namespace, by a process of the node's cgroup.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::cluster::state;
use crate::container;
use crate::sys::{self, quote};

/// Where the kubelet of a node lives.
#[derive(Clone, Copy, Debug)]
pub struct Kubelet<'a> {
    pub netns: &'a Path,
    /// The node's cgroup root.
    pub cgroup: &'a Path,
}

impl Kubelet<'_> {
    /// The cgroup of the kubelet and all it starts, below the node's root.
    pub const CGROUP: &'static str = "kubelet";

    /// A command that runs where the kubelet does.
    pub fn command(&self, argv: &[&str]) -> Command {
        let cgroup = self.cgroup.join(Self::CGROUP).join("cgroup.procs").display().to_string();
        let netns = self.netns.display().to_string();
        let script = format!("echo $$ > {}; exec nsenter --net={} -- \"$@\"", quote(&cgroup), quote(&netns));
        let mut command = sys::command("sh");
        command.args(["-ec", &script, "kubelet"]).args(argv);
        command
    }
}

/// Asks once. `Ok` is "ready"; the error says why not.
pub fn probe(
    probe: &core::Probe,
    spec: &core::Container,
    running: &state::Container,
    address: IpAddr,
    kubelet: Kubelet<'_>,
) -> Result<()> {
    let patience = probe.timeout_seconds.unwrap_or(1).max(1);
    if let Some(http) = &probe.http_get {
        let port = port(&http.port, spec)?;
        let path = http.path.clone().unwrap_or_else(|| "/".into());
        if http.scheme.as_deref().is_some_and(|scheme| scheme == "HTTPS") {
            bail!("the lab has no HTTPS probe");
        }
        let address = http.host.as_ref().map_or(Ok(address), |host| host.parse())?;
        return get(&kubelet, &format!("http://{}{path}", SocketAddr::new(address, port)), patience);
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = port(&tcp.port, spec)?;
        let connect = format!("exec 3<>/dev/tcp/{address}/{port}");
        let mut command = kubelet.command(&["timeout", &patience.to_string(), "bash", "-c", &connect]);
        return sys::check(&mut command).map(drop);
    }
    if let Some(exec) = &probe.exec {
        let argv = exec.command.clone().unwrap_or_default();
        let mut command = container::exec_command(running.pid, &running.cgroup, &running.env, &argv);
        return sys::check(&mut command).map(drop);
    }
    bail!("the lab has no such probe")
}

/// A number, or the name of one of the container's ports.
fn port(port: &IntOrString, spec: &core::Container) -> Result<u16> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            spec.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port)
        }
    };
    let number = number.with_context(|| format!("{} has no port {port:?}", spec.name))?;
    u16::try_from(number).with_context(|| format!("port {number} out of range"))
}

fn get(kubelet: &Kubelet<'_>, url: &str, patience: i32) -> Result<()> {
    let patience = patience.to_string();
    let answer = sys::check(&mut kubelet.command(&[
        "curl",
        "--silent",
        "--show-error",
        "--noproxy",
        "*",
        "--max-time",
        &patience,
        "--user-agent",
        "kube-probe/lab",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
        url,
    ]))?;
    let status = String::from_utf8_lossy(&answer.stdout).into_owned();
    match status.parse::<u16>() {
        Ok(200..=399) => Ok(()),
        _ => bail!("{url} answered {status}"),
    }
}
