//! One ztunnel hands over to the next, as a container runtime makes it: long-lived connections outlive the container, and
//! what outlives it is bounded and can do nothing new.
//!
//! Each ztunnel runs in a cgroup of its own that is killed when its first process has ended, as containerd does.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::container::Launch;
use mesh_tests::places::Places;
use mesh_tests::raw::{self, Lab, Node, Pod, Process};
use mesh_tests::{record, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);
/// Policy reaches connections as fast as it is read from the file, looked at every second or so.
const POLICY: Duration = Duration::from_secs(8);
const PORT: u16 = 8080;

const ECHO: &str = "import socketserver\n\
class Echo(socketserver.BaseRequestHandler):\n\
\x20def handle(self):\n\
\x20 while True:\n\
\x20  data=self.request.recv(4096)\n\
\x20  if not data: return\n\
\x20  self.request.sendall(data)\n\
class Server(socketserver.ThreadingTCPServer):\n\
\x20allow_reuse_address=True; daemon_threads=True; request_queue_size=128\n\
Server(('0.0.0.0',8080),Echo).serve_forever()\n";

/// Says `round N` for each answer and `LOST` once there is none.
const HOLD: &str = "import socket,sys,time\n\
s=socket.create_connection((sys.argv[1],8080),5); s.settimeout(5)\n\
n=0\n\
try:\n\
\x20while True:\n\
\x20 s.sendall(b'x'*100)\n\
\x20 got=b''\n\
\x20 while len(got)<100:\n\
\x20  more=s.recv(100)\n\
\x20  if not more: raise OSError('closed')\n\
\x20  got+=more\n\
\x20 n+=1; print('round',n,flush=True); time.sleep(0.05)\n\
except OSError as e: print('LOST',e,flush=True)\n";

/// Opens one connection after the other, as fast as it can, until it is killed: `ok N` or what went wrong.
const HAMMER: &str = "import socket,sys\n\
n=0\n\
while True:\n\
\x20try:\n\
\x20 s=socket.create_connection((sys.argv[1],8080),5); s.sendall(b'hello'); got=s.recv(9); s.close()\n\
\x20 if got!=b'hello': raise OSError('got %r'%got)\n\
\x20 n+=1\n\
\x20 if n%20==0: print('ok',n,flush=True)\n\
\x20except OSError as e: print('FAILED after',n,e,flush=True)\n";

/// What a ztunnel of a test is told beyond what all are.
struct Settings {
    version: &'static str,
    /// Of its admin port; metrics and readiness are 20 and 21 above.
    ports: u16,
    more: &'static [(&'static str, &'static str)],
}

/// A lab with a client and a server on node a, a server on node b, and what the ztunnels know.
struct Stage {
    lab: Lab,
    client: Pod,
    near: Pod,
    far: Pod,
    /// Servers, and what keeps the client pod alive.
    _processes: Vec<Process>,
    holders: u32,
}

/// A ztunnel in its container.
struct Ztunnel {
    /// Its first process.
    child: Child,
    cgroup: PathBuf,
    log: PathBuf,
    ports: u16,
}

impl Drop for Ztunnel {
    fn drop(&mut self) {
        // Gone already where a test has ended it.
        let _ = record::kill_cgroup(&self.cgroup);
        let _ = self.child.wait();
    }
}

impl Ztunnel {
    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for the first process and then does as the runtime does: nothing of the container stays.
    fn ended(&mut self) -> Result<std::process::ExitStatus> {
        let status = wait::until("ztunnel's container to end", PATIENCE, || self.child.try_wait()?.context("it runs"))?;
        record::kill_cgroup(&self.cgroup)?;
        record::remove_cgroup(&self.cgroup)?;
        Ok(status)
    }

    /// SIGTERM, and the container's end.
    fn retire(&mut self) -> Result<Duration> {
        let started = Instant::now();
        self.signal(Signal::SIGTERM)?;
        let status = self.ended()?;
        ensure!(status.success(), "{status}: {}", self.said());
        Ok(started.elapsed())
    }

    fn main_process(&self) -> Result<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        let children = fs::read_to_string(path)?;
        children.split_whitespace().next().context("the supervisor has no child")?.parse().context("a number")
    }
}

impl Stage {
    fn up(name: &str) -> Result<Self> {
        let lab = Lab::up(&format!("{name}{}", std::process::id()))?;
        let client = lab.node("node-a").add_pod("client")?;
        let near = lab.node("node-a").add_pod("near")?;
        let far = lab.node("node-b").add_pod("far")?;
        let mut processes = vec![client.spawn("pause", &["sleep", "infinity"], &[])?];
        for pod in [&near, &far] {
            let mut server = pod.spawn(&pod.name, &["python3", "-c", ECHO], &[])?;
            server.wait_listening(PORT)?;
            processes.push(server);
        }
        write_ca(&lab.scratch("ca")?)?;
        let stage = Self { lab, client, near, far, _processes: processes, holders: 0 };
        for node in stage.lab.nodes() {
            stage.configure(node, &[])?;
        }
        Ok(stage)
    }

    fn node(&self, name: &str) -> &Node {
        self.lab.node(name)
    }

    fn run_dir(&self, node: &Node) -> Result<PathBuf> {
        self.lab.scratch(&format!("run-{}", node.net.name))
    }

    /// Where those that have left their containers are.
    fn shelter(&self, node: &Node) -> PathBuf {
        node.cgroup.join("ztunnel-draining")
    }

    fn drainers(&self, node: &Node) -> Vec<u32> {
        let homes = fs::read_dir(self.shelter(node)).into_iter().flatten().flatten();
        let lists = homes.filter_map(|home| fs::read_to_string(home.path().join("cgroup.procs")).ok());
        lists.flat_map(|list| list.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
    }

    /// What the node's ztunnels know.
    fn configure(&self, node: &Node, policies: &[Value]) -> Result<()> {
        let workload = |pod: &Pod| format!("Kubernetes//Pod/shop/{}", pod.name);
        let of = [(&self.client, "node-a"), (&self.near, "node-a"), (&self.far, "node-b")];
        let workloads = of.map(|(pod, node)| {
            json!({
                "uid": workload(pod), "name": pod.name, "namespace": "shop", "serviceAccount": pod.name, "node": node,
                "workloadIps": pod.net.addresses(), "protocol": "HBONE", "workloadName": pod.name,
            })
        });
        let here = of.into_iter().filter(|(_, name)| *name == node.net.name);
        let enrolments: Vec<Value> = here
            .map(|(pod, _)| {
                json!({
                    "uid": pod.uid, "name": pod.name, "namespace": "shop", "serviceAccount": pod.name,
                    "addresses": pod.net.addresses(), "workloadUid": workload(pod),
                })
            })
            .collect();
        let file = json!({ "workloads": workloads, "services": [], "policies": policies, "enrolments": enrolments });
        let path = self.config(node)?;
        fs::write(path.with_extension("next"), serde_json::to_vec_pretty(&file)?)?;
        Ok(fs::rename(path.with_extension("next"), path)?)
    }

    fn lists(&self) -> Result<PathBuf> {
        Ok(self.lab.scratch("ca")?.join("crl.pem"))
    }

    /// Has the authority take these certificates back.
    fn revoke(&self, serials: &[Vec<u8>]) -> Result<()> {
        let read = |name: &str| Ok::<_, anyhow::Error>(fs::read_to_string(self.lab.scratch("ca")?.join(name))?);
        let issuer = Issuer::from_ca_cert_pem(&read("ca-cert.pem")?, KeyPair::from_pem(&read("ca-key.pem")?)?)?;
        let now = std::time::SystemTime::now();
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let next = self.lists()?.with_extension("next");
        fs::write(&next, list.signed_by(&issuer)?.pem()?)?;
        Ok(fs::rename(next, self.lists()?)?)
    }

    fn config(&self, node: &Node) -> Result<PathBuf> {
        Ok(self.lab.scratch("mesh")?.join(format!("{}.yaml", node.net.name)))
    }

    /// Starts a ztunnel and waits until it is ready.
    fn start(&self, node: &Node, settings: &Settings) -> Result<Ztunnel> {
        let program = Places::find()?.binaries.join("ztunnel");
        let name = format!("{}-{}-{}", node.net.name, settings.version, settings.ports);
        let shown = |path: PathBuf| path.display().to_string();
        let mut launch = Launch::new(&[&shown(program)], node.cgroup.join(format!("ztunnel-{name}")));
        launch.netns = Some(node.net.netns.path());
        let log = self.lab.record.logs().join(format!("ztunnel-{name}.log"));
        launch.log = Some(log.clone());
        let env = [
            ("NODE_NAME", node.net.name.clone()),
            ("LOCAL_XDS_PATH", shown(self.config(node)?)),
            ("LOCAL_CA_DIR", shown(self.lab.scratch("ca")?)),
            ("CGROUP_ROOT", shown(node.cgroup.clone())),
            ("HOST_NETNS", "/proc/self/ns/net".to_owned()),
            ("BPFFS_DIR", shown(node.bpffs.clone())),
            ("RUN_DIR", shown(self.run_dir(node)?)),
            ("DETACHED_DRAIN", "10m".to_owned()),
            ("ISTIO_META_ISTIO_VERSION", settings.version.to_owned()),
            ("ZTUNNEL_WORKER_THREADS", "2".to_owned()),
            ("ADMIN_PORT", settings.ports.to_string()),
            ("STATS_PORT", (settings.ports + 20).to_string()),
            ("READINESS_PORT", (settings.ports + 21).to_string()),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30".to_owned()),
        ];
        launch.env = env.map(|(key, value)| (key.to_owned(), value)).into();
        // Of one node only, so that it is seen who cuts.
        if node.net.name == "node-a" {
            launch.env.insert("CRL_PATH".to_owned(), shown(self.lists()?));
        }
        launch.env.extend(settings.more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let child = launch.command()?.spawn()?;
        let mut ztunnel = Ztunnel { child, cgroup: launch.cgroup, log, ports: settings.ports };
        wait::until("ztunnel to be ready", PATIENCE, || {
            if let Some(status) = ztunnel.child.try_wait()? {
                return Ok(Err(anyhow::anyhow!("{status}: {}", ztunnel.said())));
            }
            let answer = http(node, settings.ports + 21, "/healthz/ready")?;
            ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            Ok(Ok(()))
        })??;
        Ok(ztunnel)
    }

    /// A connection from `pod` that stays open and is used all the time.
    fn hold(&mut self, to: IpAddr) -> Result<Held> {
        self.holders += 1;
        let name = format!("hold-{}", self.holders);
        let process = self.client.spawn(&name, &["python3", "-c", HOLD, &to.to_string()], &[])?;
        let held = Held(process);
        held.lives()?;
        Ok(held)
    }

    fn far(&self) -> IpAddr {
        self.far.net.ipv4.into()
    }

    fn near(&self) -> IpAddr {
        self.near.net.ipv4.into()
    }
}

/// A connection that is used all the time.
struct Held(Process);

impl Held {
    fn rounds(&self) -> usize {
        self.0.output().matches("round").count()
    }

    fn is_lost(&self) -> bool {
        self.0.output().contains("LOST")
    }

    /// Goes on answering.
    fn lives(&self) -> Result<()> {
        let before = self.rounds();
        wait::until("the connection to answer", PATIENCE, || {
            let said = self.0.output();
            if said.contains("LOST") || said.contains("Error") {
                return Ok(Err(anyhow::anyhow!("the connection is lost: {}", said.lines().last().unwrap_or_default())));
            }
            ensure!(self.rounds() > before + 3, "{} rounds", self.rounds());
            Ok(Ok(()))
        })?
    }

    fn is_cut(&self, within: Duration) -> Result<()> {
        wait::until_true("the connection to be cut", within, || self.is_lost())
    }
}

fn http(node: &Node, port: u16, path: &str) -> Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    node.net.netns.enter(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

/// Generations as the admin port shows them.
fn generations(node: &Node, ztunnel: &Ztunnel) -> Result<Vec<Value>> {
    let answer = http(node, ztunnel.ports, "/config_dump")?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    let dump: Value = serde_json::from_str(body)?;
    Ok(dump["generations"].as_array().context("no generations")?.clone())
}

/// The serial number of a pod's certificate.
fn serial(node: &Node, ztunnel: &Ztunnel, account: &str) -> Result<Vec<u8>> {
    let answer = http(node, ztunnel.ports, "/config_dump")?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    let dump: Value = serde_json::from_str(body)?;
    let certificates = dump["certificates"].as_array().context("no certificates")?;
    let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let found = certificates.iter().find(|c| c["identity"] == identity.as_str()).context("no such certificate")?;
    let decimal = found["certChain"][0]["serialNumber"].as_str().context("no serial number")?;
    let mut bytes: Vec<u8> = Vec::new();
    for digit in decimal.bytes() {
        let mut carry = u32::from(digit - b'0');
        for byte in bytes.iter_mut().rev() {
            carry += u32::from(*byte) * 10;
            *byte = carry.to_le_bytes()[0];
            carry >>= 8;
        }
        if carry > 0 {
            bytes.insert(0, carry.to_le_bytes()[0]);
        }
    }
    Ok(bytes)
}

fn write_ca(directory: &Path) -> Result<()> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    fs::write(directory.join("ca-cert.pem"), params.self_signed(&key)?.pem())?;
    fs::write(directory.join("ca-key.pem"), key.serialize_pem())?;
    Ok(())
}

fn deny_client() -> Value {
    let rule = json!([[[{"principals": [{"Exact": "cluster.local/ns/shop/sa/client"}]}]]]);
    json!({"name": "deny", "namespace": "shop", "scope": "Namespace", "action": "Deny", "rules": rule})
}

/// Every thread is sealed and powerless, and nothing of the container is held.
fn assert_sealed(pid: u32) -> Result<()> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field =
            |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
        ensure!(field("Seccomp:") == "2" && field("NoNewPrivs:") == "1", "not sealed:\n{status}");
        for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
            ensure!(field(set).bytes().all(|digit| digit == b'0'), "{set} is left:\n{status}");
        }
    }
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}"))?;
        ensure!(target == Path::new("/dev/null"), "fd {fd} is {}", target.display());
    }
    Ok(())
}

const V1: Settings = Settings { version: "v1", ports: 15000, more: &[] };
const V2: Settings = Settings { version: "v2", ports: 16000, more: &[] };
const V3: Settings = Settings { version: "v3", ports: 17000, more: &[] };
const V4: Settings = Settings { version: "v4", ports: 18000, more: &[] };

#[test]
fn long_lived_connections_outlive_upgrades_and_their_containers() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut stage = Stage::up("hand")?;
    let mut first = stage.start(stage.node("node-a"), &V1)?;
    let mut far_first = stage.start(stage.node("node-b"), &V1)?;
    let (far, near) = (stage.far(), stage.near());
    let (outbound, same_node) = (stage.hold(far)?, stage.hold(near)?);
    let hammer = stage.client.spawn("hammer", &["python3", "-c", HAMMER, &far.to_string()], &[])?;
    let hammer_near = stage.client.spawn("hammer-near", &["python3", "-c", HAMMER, &near.to_string()], &[])?;

    // Both ends are upgraded while connections are made as fast as they can be.
    let second = stage.start(stage.node("node-a"), &V2)?;
    let took = first.retire()?;
    ensure!(took < Duration::from_secs(15), "the container took {took:?} to end");
    let far_second = stage.start(stage.node("node-b"), &V2)?;
    far_first.retire()?;
    for process in [&hammer, &hammer_near] {
        let said = process.output();
        ensure!(said.contains("ok") && !said.contains("FAILED"), "new connections failed:\n{said}");
    }
    drop((hammer, hammer_near));
    outbound.lives()?;
    same_node.lives()?;
    for node in stage.lab.nodes() {
        let drainers = stage.drainers(node);
        ensure!(drainers.len() == 1, "{}: {drainers:?}", node.net.name);
        assert_sealed(drainers[0])?;
    }

    // Both generations are seen, with what they have.
    let node_a = stage.node("node-a");
    wait::until("both generations to be shown", PATIENCE, || {
        let shown = generations(node_a, &second)?;
        ensure!(shown.len() == 2 && shown[0]["version"] == "v2" && shown[1]["version"] == "v1", "{shown:?}");
        ensure!(shown[1]["state"] == "draining" && shown[1]["connections"].as_u64() >= Some(2), "{shown:?}");
        ensure!(shown[1]["sentBytes"].as_u64() > Some(0), "{shown:?}");
        let metrics = http(node_a, second.ports + 20, "/metrics")?;
        let line = metrics.lines().find(|l| l.starts_with("ztunnel_generation_connections") && l.contains("\"v1\""));
        ensure!(line.is_some_and(|l| l.contains("draining") && !l.ends_with(" 0")), "{line:?}");
        Ok(())
    })?;

    // A policy that denies cuts what the old generation holds, and only that; its record comes out at the new one.
    let began = Instant::now();
    stage.configure(node_a, &[deny_client()])?;
    same_node.is_cut(POLICY)?;
    println!("policy cut a connection of a draining generation after {:?}", began.elapsed());
    outbound.lives()?;
    wait::until("the record of the connection that was cut", PATIENCE, || {
        let said = second.said();
        let line = said.lines().find(|l| l.contains("generation=") && l.contains("policy change no longer allows"));
        ensure!(line.is_some(), "{}", said.lines().last().unwrap_or_default());
        let metrics = http(node_a, second.ports + 20, "/metrics")?;
        let denied = |l: &str| l.starts_with("istio_tcp_connections_failed_total") && l.contains("sa/client");
        ensure!(metrics.lines().any(denied), "the failure is not counted");
        Ok(())
    })?;
    stage.configure(node_a, &[])?;

    // When the last connection ends, so does what was left of the old generation.
    drop(outbound);
    for (node, ztunnel) in [("node-a", &second), ("node-b", &far_second)] {
        let node = stage.node(node);
        wait::until_true("the old generation to end", PATIENCE, || stage.drainers(node).is_empty())?;
        wait::until_true("its cgroup to go", PATIENCE, || !stage.shelter(node).exists())?;
        wait::until("its socket to go", PATIENCE, || {
            let left = fs::read_dir(stage.run_dir(node)?.join("drain"))?.count();
            ensure!(left == 0 && generations(node, ztunnel)?.len() == 1, "{left} sockets");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_a_draining_generation_holds_is_cut_when_its_peer_is_revoked() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut stage = Stage::up("revo")?;
    let mut first = stage.start(stage.node("node-a"), &V1)?;
    let other = stage.start(stage.node("node-b"), &V1)?;
    let (far, near) = (stage.far(), stage.near());
    let (outbound, inbound) = (stage.hold(far)?, stage.hold(near)?);
    // Of the certificates that the held connections were made with.
    let client = serial(stage.node("node-a"), &first, "client")?;
    let server = serial(stage.node("node-b"), &other, "far")?;
    let second = stage.start(stage.node("node-a"), &V2)?;
    first.retire()?;
    outbound.lives()?;
    inbound.lives()?;
    ensure!(stage.drainers(stage.node("node-a")).len() == 1);

    stage.revoke(std::slice::from_ref(&client))?;
    inbound.is_cut(PATIENCE)?;
    outbound.lives()?;
    stage.revoke(&[client, server])?;
    outbound.is_cut(PATIENCE)?;
    wait::until("the records of what was cut", PATIENCE, || {
        let said = second.said();
        for direction in ["inbound", "outbound"] {
            let is_it = |l: &&str| {
                l.contains("generation=")
                    && l.contains("CERT_REVOKED")
                    && l.contains(&format!("direction=\"{direction}\""))
            };
            ensure!(said.lines().any(|l| is_it(&l)), "{direction}: {}", said.lines().last().unwrap_or_default());
        }
        Ok(())
    })
}

#[test]
fn of_three_generations_that_drain_the_oldest_ends() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut stage = Stage::up("gens")?;
    let _far = stage.start(stage.node("node-b"), &V1)?;
    let far = stage.far();
    let mut serving = stage.start(stage.node("node-a"), &V1)?;
    let mut held = Vec::new();
    for next in [&V2, &V3] {
        held.push(stage.hold(far)?);
        let successor = stage.start(stage.node("node-a"), next)?;
        serving.retire()?;
        serving = successor;
    }
    for connection in &held {
        connection.lives()?;
    }
    ensure!(stage.drainers(stage.node("node-a")).len() == 2);
    held.push(stage.hold(far)?);
    let _fourth = stage.start(stage.node("node-a"), &V4)?;
    serving.retire()?;
    held[0].is_cut(PATIENCE)?;
    held[1].lives()?;
    held[2].lives()?;
    wait::until_true("two to be left", PATIENCE, || stage.drainers(stage.node("node-a")).len() == 2)
}

/// Accepting ends after a second and a half; 3 s without a successor are the end.
const ALONE: Settings = Settings {
    version: "alone",
    ports: 15000,
    more: &[("TERMINATION_GRACE_PERIOD_SECONDS", "4"), ("ORPHANED_DRAIN", "4s")],
};
const MARKED: Settings =
    Settings { version: "marked", ports: 15000, more: &[("TERMINATION_GRACE_PERIOD_SECONDS", "4")] };

#[test]
fn without_a_successor_or_with_the_uninstall_marker_everything_is_cut() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut stage = Stage::up("alone")?;
    let _far = stage.start(stage.node("node-b"), &V1)?;
    let far = stage.far();

    let mut ztunnel = stage.start(stage.node("node-a"), &ALONE)?;
    let held = stage.hold(far)?;
    ztunnel.retire()?;
    let node = stage.lab.node("node-a");
    ensure!(stage.drainers(node).len() == 1, "it did not outlive its container: {}", ztunnel.said());
    held.lives()?;
    held.is_cut(PATIENCE)?;
    wait::until_true("it to end", PATIENCE, || stage.drainers(node).is_empty() && !stage.shelter(node).exists())?;

    let mut ztunnel = stage.start(stage.node("node-a"), &MARKED)?;
    let held = stage.hold(far)?;
    ztunnel.retire()?;
    held.lives()?;
    let node = stage.lab.node("node-a");
    fs::write(stage.run_dir(node)?.join("uninstalled"), "")?;
    held.is_cut(PATIENCE)?;
    wait::until_true("it to end", PATIENCE, || stage.drainers(node).is_empty() && !stage.shelter(node).exists())
}

#[test]
fn a_restart_within_the_time_is_followed_and_a_crashed_successor_is_waited_for() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut stage = Stage::up("again")?;
    let _far = stage.start(stage.node("node-b"), &V1)?;
    let far = stage.far();
    let mut first = stage.start(stage.node("node-a"), &V1)?;
    let held = stage.hold(far)?;
    let mut second = stage.start(stage.node("node-a"), &V2)?;
    first.retire()?;
    held.lives()?;
    let child = second.main_process()?;
    second.signal(Signal::SIGKILL)?;
    ensure!(!second.ended()?.success());
    wait::until_true("the child of a killed supervisor to end", PATIENCE, || {
        mesh_tests::sys::start_time(child).is_none()
    })?;
    held.lives()?;
    // Its child killed instead: the supervisor ends as it ended.
    let mut third = stage.start(stage.node("node-a"), &V3)?;
    held.lives()?;
    kill(Pid::from_raw(i32::try_from(third.main_process()?)?), Signal::SIGKILL)?;
    let status = third.ended()?;
    ensure!(status.code() == Some(137), "{status}");
    held.lives()?;
    let fourth = stage.start(stage.node("node-a"), &V4)?;
    let node = stage.lab.node("node-a");
    wait::until("the last one to follow", PATIENCE, || {
        let shown = generations(node, &fourth)?;
        ensure!(shown.len() == 2 && shown[1]["version"] == "v1", "{shown:?}");
        Ok(())
    })?;
    held.lives()
}

/// Connects to the socket and says what it is told within two seconds.
const ASK: &str = "import socket,sys\n\
s=socket.socket(socket.AF_UNIX); s.settimeout(2); s.connect(sys.argv[1])\n\
try: print('told',s.recv(9999))\n\
except OSError as e: print('told nothing',e)\n";

/// Says it is a draining ztunnel.
const PRETEND: &str = "import socket,sys,time\n\
s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('listening',flush=True)\n\
c,_=s.accept()\n\
try: c.sendall(b'{\"type\":\"hello\",\"generation\":\"0\",\"version\":\"fake\",\"since\":0,\"deadline\":0}\\n')\n\
except OSError: pass\n\
try: got=c.recv(9999)\n\
except ConnectionResetError: got=b'' # closed with the greeting unread\n\
print('got',got,flush=True)\n";

#[test]
fn another_users_process_is_neither_told_anything_nor_listened_to() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut stage = Stage::up("peer")?;
    let _far = stage.start(stage.node("node-b"), &V1)?;
    let far = stage.far();
    let mut first = stage.start(stage.node("node-a"), &V1)?;
    let held = stage.hold(far)?;
    let second = stage.start(stage.node("node-a"), &V2)?;
    first.retire()?;
    let node = stage.lab.node("node-a");
    let sockets = stage.run_dir(node)?.join("drain");
    let socket = wait::until("the socket", PATIENCE, || {
        let entry = fs::read_dir(&sockets)?.next().context("none yet")??;
        Ok(entry.path())
    })?;
    // The doors that keep others out are opened, to see what stands behind them.
    let open = format!("chmod 711 {}", parents(&sockets));
    ensure!(Command::new("sh").args(["-c", &open]).status()?.success());
    ensure!(Command::new("chmod").arg("777").args([&sockets, &socket]).status()?.success());
    let as_nobody = |script: &str, argument: &Path| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "/usr/bin/python3", "-c", script])
            .arg(argument);
        command
    };
    let told = as_nobody(ASK, &socket).output()?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    ensure!(told.contains("told b''") || told.contains("told nothing"), "{told}");
    let told = Command::new("python3").args(["-c", ASK]).arg(&socket).output()?;
    ensure!(String::from_utf8_lossy(&told.stdout).contains("hello"), "root is answered");

    let fake = sockets.join("0-0.sock");
    let mut pretender = as_nobody(PRETEND, &fake).stdout(std::process::Stdio::piped()).spawn()?;
    wait::until("the stranger to be noticed", PATIENCE, || {
        if !second.said().contains("another user's process is behind it") {
            bail!("not yet");
        }
        Ok(())
    })?;
    let mut got = String::new();
    pretender.stdout.take().context("piped")?.read_to_string(&mut got)?;
    pretender.wait()?;
    ensure!(got.contains("got b''"), "{got}");
    let shown = generations(node, &second)?;
    ensure!(shown.iter().all(|g| g["version"] != "fake"), "{shown:?}");
    held.lives()
}

/// The directories down to `path` within the lab's own.
fn parents(path: &Path) -> String {
    let below = path.ancestors().take_while(|p| p.starts_with(record::RECORDS) && *p != Path::new(record::RECORDS));
    below.map(|p| p.display().to_string()).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_draining_ztunnel_is_taken_down_with_its_lab() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut stage = Stage::up("down")?;
    let _far = stage.start(stage.node("node-b"), &V1)?;
    let far = stage.far();
    let mut first = stage.start(stage.node("node-a"), &V1)?;
    let _held = stage.hold(far)?;
    let second = stage.start(stage.node("node-a"), &V2)?;
    first.retire()?;
    let drainers = stage.drainers(stage.node("node-a"));
    ensure!(drainers.len() == 1);
    let started: BTreeMap<u32, _> = drainers.iter().map(|pid| (*pid, mesh_tests::sys::start_time(*pid))).collect();
    let cgroup = stage.lab.record.cgroup.clone();
    drop((second, first));
    drop(stage);
    for (pid, start) in started {
        ensure!(start.is_none() || mesh_tests::sys::start_time(pid) != start, "process {pid} is left");
    }
    ensure!(!cgroup.exists());
    Ok(())
}
