//! Readiness probes, run on a thread inside the pod's network namespace: a kubelet's probe is not traffic of the mesh.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::cluster::state;
use crate::container;
use crate::sys;

/// Asks once. `Ok` is "ready"; the error says why not.
pub fn probe(
    probe: &core::Probe,
    spec: &core::Container,
    running: &state::Container,
    address: IpAddr,
    netns: &Path,
) -> Result<()> {
    let patience = Duration::from_secs(probe.timeout_seconds.unwrap_or(1).max(1).unsigned_abs().into());
    if let Some(http) = &probe.http_get {
        let port = port(&http.port, spec)?;
        let path = http.path.clone().unwrap_or_else(|| "/".into());
        if http.scheme.as_deref().is_some_and(|scheme| scheme == "HTTPS") {
            bail!("the lab has no HTTPS probe");
        }
        let address = http.host.as_ref().map_or(Ok(address), |host| host.parse())?;
        return sys::in_netns(netns, move || get(SocketAddr::new(address, port), &path, patience));
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = port(&tcp.port, spec)?;
        return sys::in_netns(netns, move || {
            TcpStream::connect_timeout(&SocketAddr::new(address, port), patience)?;
            Ok(())
        });
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

fn get(address: SocketAddr, path: &str, patience: Duration) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: kube-probe/lab\r\nConnection: close\r\n\r\n"
    )?;
    let mut head = [0; 64];
    let length = stream.read(&mut head)?;
    let line = String::from_utf8_lossy(&head[..length]).into_owned();
    let status = line.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok());
    match status {
        Some(200..=399) => Ok(()),
        _ => bail!("{address}{path} answered {:?}", line.lines().next().unwrap_or_default()),
    }
}
