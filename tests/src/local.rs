//! What a ztunnel is told in files where there is no control plane: a certificate authority, workloads, and whom to enrol.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};

use crate::raw::{Node, Pod, Process};

/// Raises the number of open files to what is allowed, then becomes the program.
const UNLIMITED: [&str; 4] = ["/bin/sh", "-ec", "ulimit -n $(ulimit -Hn); exec \"$@\"", "limits"];

/// Seconds that such a ztunnel has from SIGTERM to its end: what the manifest gives it. A successor has two thirds of them to take
/// over, on a busy machine too.
pub const GRACE: u64 = 30;

/// A certificate authority that all nodes sign with.
pub fn write_ca(directory: &Path) -> Result<()> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    fs::write(directory.join("ca-cert.pem"), params.self_signed(&key)?.pem())?;
    fs::write(directory.join("ca-key.pem"), key.serialize_pem())?;
    Ok(())
}

/// What the control plane would say of these pods and their nodes, all of them speaking HBONE; `enrolled` are those of the node that
/// reads it. JSON is YAML.
pub fn mesh_file(namespace: &str, pods: &[(&Pod, &str)], enrolled: &[&Pod]) -> Value {
    let workload_uid = |pod: &Pod| format!("Kubernetes//Pod/{namespace}/{}", pod.name);
    let workload = |(pod, node): &(&Pod, &str)| {
        json!({
            "uid": workload_uid(pod), "name": pod.name, "namespace": namespace, "serviceAccount": pod.name,
            "workloadIps": pod.net.addresses(), "protocol": "HBONE", "node": node, "workloadName": pod.name,
            "canonicalName": pod.name, "canonicalRevision": "latest", "clusterId": "Kubernetes",
        })
    };
    let enrolment = |pod: &&Pod| {
        json!({
            "uid": pod.uid, "name": pod.name, "namespace": namespace, "serviceAccount": pod.name,
            "addresses": pod.net.addresses(), "workloadUid": workload_uid(pod),
        })
    };
    let workloads: Vec<Value> = pods.iter().map(workload).collect();
    let mut file = json!({ "workloads": workloads, "services": [], "policies": [] });
    // Others that read the file do not know the word.
    if !enrolled.is_empty() {
        file["enrolments"] = enrolled.iter().map(enrolment).collect();
    }
    file
}

/// Replaces a file in one step, as its reader wants it.
pub fn write_file(path: &Path, value: &Value) -> Result<()> {
    let next = path.with_extension("next");
    fs::write(&next, serde_json::to_vec_pretty(value)?).with_context(|| format!("cannot write {}", next.display()))?;
    Ok(fs::rename(next, path)?)
}

/// The command with as many open files as the machine allows.
pub fn unlimited(argv: &[&str]) -> Vec<String> {
    UNLIMITED.iter().chain(argv).map(|word| (*word).to_owned()).collect()
}

/// Starts a ztunnel on a node, fed from a file, with its admin, metrics and readiness ports at `ports`, +20 and +21.
pub fn start_ztunnel(node: &Node, name: &str, program: &Path, file: &Path, ca: &Path, ports: u16) -> Result<Process> {
    let shown = |path: &Path| path.display().to_string();
    let env = [
        ("NODE_NAME", node.net.name.clone()),
        ("LOCAL_XDS_PATH", shown(file)),
        ("LOCAL_CA_DIR", shown(ca)),
        ("CGROUP_ROOT", shown(&node.cgroup)),
        ("HOST_NETNS", "/proc/self/ns/net".to_owned()),
        ("BPFFS_DIR", shown(&node.bpffs)),
        ("ZTUNNEL_WORKER_THREADS", "2".to_owned()),
        ("TERMINATION_GRACE_PERIOD_SECONDS", GRACE.to_string()),
        ("ADMIN_PORT", ports.to_string()),
        ("STATS_PORT", (ports + 20).to_string()),
        ("READINESS_PORT", (ports + 21).to_string()),
    ];
    let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let argv = unlimited(&[&shown(program)]);
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    node.spawn(name, &argv, &env)
}

/// Short connections by the ten thousand must not run out of ports.
pub const MANY_PORTS: [(&str, &str); 2] =
    [("net/ipv4/ip_local_port_range", "10240 60999"), ("net/ipv4/tcp_tw_reuse", "1")];

/// Whether the ztunnel of a node that has its readiness port there calls itself ready.
pub fn answers_ready(node: &Node, port: u16) -> bool {
    // It may not listen yet.
    http(node, port, "/healthz/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// What a server on the node's loopback answers to a GET, head and all.
pub fn http(node: &Node, port: u16, path: &str) -> Result<String> {
    let path = path.to_owned();
    node.net.netns.enter(move || get(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), &path))
}

/// What a server that the calling thread can reach answers to a GET, head and all.
pub fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
