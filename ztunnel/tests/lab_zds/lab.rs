//! Two nodes with two pods each on a bridge without uplink: namespaces, applications, ztunnels, and what can be asked
//! of them. Everything is taken down by the drop.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use nix::sched::{CloneFlags, setns};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use crate::agent::{Agent, Pod};
use crate::rules;

pub const PODS: [&str; 4] = ["a1", "a2", "b1", "b2"];
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const MARKER: &str = "payload-marker-5f1c";
pub const APP_PORT: u16 = 8080;
/// Where lines are answered on one connection for as long as it is open.
pub const ECHO_PORT: u16 = 9090;
pub const VIP: &str = "10.96.0.10";
/// The bridge itself: the cluster's DNS server, and somebody who is not in the mesh.
pub const OUTSIDE: &str = "10.77.0.53";
/// What that server says of any name.
pub const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

/// Where a node's pods come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Agent,
    /// The `ebpf` back end, fed from the file.
    File,
}

pub struct Lab {
    name: String,
    pub dir: tempfile::TempDir,
    cgroup: PathBuf,
    pins: PathBuf,
    children: Vec<Child>,
    ztunnels: Vec<(char, Child)>,
}

pub fn run(command: &str) -> String {
    let output = Command::new("bash").args(["-ec", command]).output().expect("bash runs");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn node_of(pod: &str) -> char {
    pod.chars().next().expect("pods are named after their node")
}

pub fn addresses(pod: &str) -> [String; 2] {
    let n = PODS.iter().position(|p| *p == pod).expect("a pod of the lab") + 1;
    [format!("10.77.0.{n}"), format!("fd77::{n}")]
}

/// Runs `work` on a thread inside a namespace.
pub fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let file = fs::File::open(netns).expect("the namespace");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET).expect("entered");
            work()
        });
        thread.join().expect("the work does not panic")
    })
}

/// True where the lab can run; otherwise says why not.
pub fn possible(source: Source) -> bool {
    let tools = ["ip", "nsenter", "unshare", "setpriv", "bash", "curl", "iptables", "ip6tables", "ipset"];
    let missing = tools.iter().find(|t| Command::new("which").arg(t).output().is_ok_and(|o| !o.status.success()));
    let why = if !nix::unistd::geteuid().is_root() {
        "not root".to_owned()
    } else if source == Source::File && !ebpf_loader::has_programs() {
        "no BPF programs were built in: run `cargo xtask bpf`".to_owned()
    } else if let Some(tool) = missing {
        format!("{tool} is not installed: run `cargo xtask setup`")
    } else {
        return true;
    };
    assert!(std::env::var("LAB").as_deref() != Ok("required"), "LAB=required, but {why}");
    eprintln!("SKIPPED: {why}");
    false
}

impl Lab {
    /// `mark` tells labs of one test program apart.
    pub fn up(mark: char) -> Self {
        let name = format!("ztz{mark}{}", std::process::id());
        let unified = Path::new("/sys/fs/cgroup/unified");
        let root = if unified.exists() { unified } else { Path::new("/sys/fs/cgroup") };
        let lab = Self {
            cgroup: root.join(&name),
            pins: Path::new("/sys/fs/bpf").join(&name),
            dir: tempfile::tempdir().expect("a directory"),
            children: Vec::new(),
            ztunnels: Vec::new(),
            name,
        };
        for ns in ["br", "a", "b"].into_iter().chain(PODS) {
            run(&format!("ip netns add {0}-{ns}; ip -n {0}-{ns} link set lo up", lab.name));
        }
        run(&format!(
            "ip -n {0}-br link add br0 type bridge; ip -n {0}-br link set br0 up
             ip -n {0}-br addr add {OUTSIDE}/16 dev br0
             ip link add vnode netns {0}-br type veth peer name eth0 netns {0}-a
             ip -n {0}-br link set vnode master br0 up
             ip -n {0}-a link set eth0 up
             ip -n {0}-a addr add 10.77.255.254/16 dev eth0
             ip -n {0}-a addr add fd77::fffe/64 dev eth0 nodad",
            lab.name
        ));
        for pod in PODS {
            lab.wire(pod);
        }
        lab.make_ca();
        fs::write(lab.dir.path().join("resolv.conf"), format!("nameserver {OUTSIDE}\n")).expect("written");
        lab.serve_dns();
        lab
    }

    /// Connects a pod's namespace. Node a is the way out, so what a probe's answer is sent to comes back to it.
    fn wire(&self, pod: &str) {
        let [v4, v6] = addresses(pod);
        run(&format!(
            "ip link add v{pod} netns {0}-br type veth peer name eth0 netns {0}-{pod}
             ip -n {0}-br link set v{pod} master br0 up
             ip -n {0}-{pod} link set eth0 up
             ip -n {0}-{pod} addr add {v4}/16 dev eth0
             ip -n {0}-{pod} addr add {v6}/64 dev eth0 nodad
             ip -n {0}-{pod} route add default via 10.77.255.254
             ip -n {0}-{pod} -6 route add default via fd77::fffe",
            self.name
        ));
    }

    /// The pod's sandbox dies and a new one takes its place, with the same addresses.
    pub fn renew(&self, pod: &str) {
        run(&format!(
            "ip -n {0}-br link del v{pod}; ip netns del {0}-{pod}
             ip netns add {0}-{pod}; ip -n {0}-{pod} link set lo up",
            self.name
        ));
        self.wire(pod);
    }

    /// A machine behind an interface of a pod, as a virtual machine or a container in it has: namespace and interface `vm`.
    pub fn put_behind(&self, pod: &str) {
        run(&format!(
            "ip netns add {0}-vm; ip -n {0}-vm link set lo up
             ip link add vm netns {0}-{pod} type veth peer name eth0 netns {0}-vm
             ip -n {0}-{pod} addr add 10.66.0.1/24 dev vm; ip -n {0}-{pod} addr add fd66::1/64 dev vm nodad
             ip -n {0}-vm addr add 10.66.0.2/24 dev eth0; ip -n {0}-vm addr add fd66::2/64 dev eth0 nodad
             ip -n {0}-{pod} link set vm up; ip -n {0}-vm link set eth0 up
             ip -n {0}-vm route add default via 10.66.0.1; ip -n {0}-vm -6 route add default via fd66::1",
            self.name
        ));
    }

    pub fn netns(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-{name}", self.name))
    }

    pub fn socket(&self, node: char) -> PathBuf {
        self.dir.path().join(format!("{node}.sock"))
    }

    /// The pod as the agent tells of it.
    pub fn pod(&self, pod: &str) -> Pod {
        Pod {
            uid: format!("{}-{pod}", self.name),
            name: pod.to_owned(),
            namespace: "shop".to_owned(),
            service_account: pod.to_owned(),
            netns: Some(self.netns(pod)),
        }
    }

    /// What the agent does for a pod: rules, ztunnel, probes.
    pub fn enrol(&self, agent: &Agent, pod: &str) {
        rules::install(&self.netns(pod));
        let told = self.pod(pod);
        eventually("ztunnel takes the pod", || agent.add(&told).is_ok());
        if node_of(pod) == 'a' {
            rules::probed(&self.netns("a"), &addresses(pod));
        }
    }

    fn pod_cgroup(&self, pod: &str) -> PathBuf {
        self.cgroup.join(format!("{}/kubepods/burstable/pod{}-{pod}/main", node_of(pod), self.name))
    }

    /// A process in the pod, by which the `ebpf` back end finds it.
    pub fn make_findable(&mut self, pod: &str) {
        let cgroup = self.pod_cgroup(pod);
        fs::create_dir_all(&cgroup).expect("a cgroup for the pod");
        let script = format!("echo $$ > {}/cgroup.procs; exec sleep 600", cgroup.display());
        let child = self.in_pod(pod, &["bash", "-ec", &script]).spawn().expect("a process in the pod");
        self.children.push(child);
    }

    fn in_pod(&self, pod: &str, command: &[&str]) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter.arg(format!("--net={}", self.netns(pod).display()));
        // The `ebpf` back end captures what is below the node's cgroup.
        let cgroup = self.pod_cgroup(pod).join("cgroup.procs");
        if cgroup.exists() {
            nsenter.args(["bash", "-ec", &format!("echo $$ > {}; exec \"$@\"", cgroup.display()), "in-pod"]);
        }
        nsenter.args(command);
        nsenter
    }

    fn make_ca(&self) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(self.dir.path().join("ca-cert.pem"), certificate.pem()).expect("written");
        fs::write(self.dir.path().join("ca-key.pem"), key.serialize_pem()).expect("written");
    }

    /// Writes what both nodes' ztunnels know, in one step as an editor would.
    pub fn configure(&self, policies: &str) {
        for node in ['a', 'b'] {
            let mut text = String::from("workloads:\n");
            for pod in PODS {
                let [v4, v6] = addresses(pod);
                let serves = if pod == "b1" { r#""shop/api.shop.svc.cluster.local": {80: 8080}"# } else { "" };
                writeln!(text, r#"- {{uid: "Kubernetes//Pod/shop/{pod}", name: {pod}, namespace: shop, serviceAccount: {pod}, workloadIps: ["{v4}", "{v6}"], protocol: HBONE, services: {{{serves}}}}}"#)
                    .expect("a string takes it");
            }
            writeln!(text, r#"services: [{{name: api, namespace: shop, hostname: api.shop.svc.cluster.local, vips: ["/{VIP}"], ports: {{80: 8080}}}}]"#)
                .expect("a string takes it");
            writeln!(text, "policies: [{policies}]\nenrolments:").expect("a string takes it");
            for pod in PODS.into_iter().filter(|p| node_of(p) == node) {
                let [v4, v6] = addresses(pod);
                writeln!(text, r#"- {{uid: {}-{pod}, name: {pod}, namespace: shop, serviceAccount: {pod}, addresses: ["{v4}", "{v6}"], workloadUid: "Kubernetes//Pod/shop/{pod}"}}"#, self.name)
                    .expect("a string takes it");
            }
            let next = self.dir.path().join(format!("{node}.next"));
            fs::write(&next, text).expect("written");
            fs::rename(next, self.dir.path().join(format!("{node}.yaml"))).expect("renamed");
        }
    }

    /// With its ports at `ports`, `ports` + 20 and + 21, so that two can run on one node. With an agent it has the
    /// capabilities that Istio's chart gives, and no more.
    pub fn start_ztunnel(&mut self, node: char, source: Source, ports: u16) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path(node)).expect("a log file");
        let mut command = Command::new("unshare");
        let limits = match source {
            Source::Agent => "setpriv --bounding-set=-all,+net_admin,+sys_admin,+net_raw",
            Source::File => "",
        };
        let script = format!(
            "mount --bind {}/resolv.conf /etc/resolv.conf; exec nsenter --net={} {limits} {}",
            self.dir.path().display(),
            self.netns(&node.to_string()).display(),
            env!("CARGO_BIN_EXE_ztunnel"),
        );
        command
            .args(["-m", "bash", "-ec", &script])
            .env("LOCAL_XDS_PATH", self.dir.path().join(format!("{node}.yaml")))
            .env("LOCAL_CA_DIR", self.dir.path())
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .env("TERMINATION_GRACE_PERIOD_SECONDS", "30")
            .env("ADMIN_PORT", ports.to_string())
            .env("STATS_PORT", (ports + 20).to_string())
            .env("READINESS_PORT", (ports + 21).to_string())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log);
        match source {
            Source::Agent => command.env("INPOD_UDS", self.socket(node)),
            Source::File => command
                .env("CGROUP_ROOT", self.cgroup.join(node.to_string()))
                .env("BPFFS_DIR", self.pins.join(node.to_string()))
                .env("HOST_NETNS", "/proc/self/ns/net"),
        };
        self.ztunnels.push((node, command.spawn().expect("ztunnel starts")));
    }

    pub fn ready(&self, node: char, ports: u16) -> bool {
        self.http(node, ports + 21, "/healthz/ready").contains("200 OK")
    }

    /// The older ztunnel of a node.
    fn older(&mut self, node: char) -> Child {
        let at = self.ztunnels.iter().position(|(n, _)| *n == node).expect("it runs");
        self.ztunnels.remove(at).1
    }

    pub fn kill_ztunnel(&mut self, node: char) {
        let mut child = self.older(node);
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    /// Asks the older ztunnel of a node to end; the caller waits for it.
    pub fn retire_ztunnel(&mut self, node: char) -> Child {
        let child = self.older(node);
        run(&format!("kill -TERM {}", child.id()));
        child
    }

    fn log_path(&self, node: char) -> PathBuf {
        self.dir.path().join(format!("{node}.log"))
    }

    pub fn log(&self, node: char) -> String {
        fs::read_to_string(self.log_path(node)).unwrap_or_default()
    }

    pub fn http(&self, node: char, port: u16, path: &str) -> String {
        inside(&self.netns(&node.to_string()), move || {
            let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
            let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
            let mut answer = String::new();
            let _ = stream.write_all(request.as_bytes());
            let _ = stream.read_to_string(&mut answer);
            answer
        })
    }

    /// The value of a counter, over all its labels.
    pub fn counter(&self, node: char, stats: u16, name: &str) -> f64 {
        let metrics = self.http(node, stats, "/metrics");
        let values =
            metrics.lines().filter(|l| l.starts_with(name)).filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok());
        values.sum()
    }

    /// `curl` in a pod (or node): the body, which is the address the server saw and the marker.
    pub fn curl(&self, from: &str, url: &str) -> Result<String, String> {
        let output = self.in_pod(from, &["curl", "-gsS", "--max-time", "10", url]).output().expect("curl runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// A connection to the echo of a pod.
    pub fn hold(&self, from: &str, to: &str) -> Held {
        let to = SocketAddr::new(to.parse().expect("an address"), ECHO_PORT);
        inside(&self.netns(from), || Held::connect(to))
    }

    /// Applications of a pod: HTTP on one port, lines on another. Both say whom they see.
    pub fn serve(&self, pod: &str) {
        let bind = |port| inside(&self.netns(pod), move || TcpListener::bind(("::", port)).expect("bound"));
        let (http, echo) = (bind(APP_PORT), bind(ECHO_PORT));
        // They end with the process.
        each(http, |mut stream, peer| {
            let mut lines = BufReader::new(stream.try_clone().expect("cloned")).lines();
            while lines.next().is_some_and(|l| l.is_ok_and(|l| !l.is_empty())) {}
            let body = format!("{peer} {MARKER}\n");
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            let _ = stream.write_all((head + &body).as_bytes());
        });
        each(echo, |mut stream, peer| {
            let lines = BufReader::new(stream.try_clone().expect("cloned")).lines();
            for line in lines.map_while(Result::ok) {
                let _ = stream.write_all(format!("{peer} {line}\n").as_bytes());
            }
        });
    }

    /// The cluster's DNS server.
    fn serve_dns(&self) {
        let at: IpAddr = OUTSIDE.parse().expect("an address");
        let (udp, tcp) = inside(&self.netns("br"), || {
            (UdpSocket::bind((at, 53)).expect("bound"), TcpListener::bind((at, 53)).expect("bound"))
        });
        // They end with the process.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok((n, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&elsewhere(&buffer[..n]), from);
            }
        });
        each(tcp, |mut stream, _| {
            while let Some(query) = read_framed(&mut stream) {
                let _ = stream.write_all(&framed(&elsewhere(&query)));
            }
        });
    }

    /// Asks `server` for the address of `name`, as a resolver does: by a connected socket.
    pub fn resolve(&self, pod: &str, server: &str, name: &str, tcp: bool) -> Option<String> {
        let server = SocketAddr::new(server.parse().expect("an address"), 53);
        let mut message = Message::new(0x2a2a, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).expect("a name"), RecordType::A));
        let bytes = message.to_vec().expect("encoded");
        let answer = inside(&self.netns(pod), || {
            if tcp {
                let mut stream = TcpStream::connect(server).ok()?;
                stream.set_read_timeout(Some(PATIENCE)).ok()?;
                stream.write_all(&framed(&bytes)).ok()?;
                return read_framed(&mut stream);
            }
            let any: IpAddr = if server.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0)).ok()?;
            socket.connect(server).ok()?;
            socket.set_read_timeout(Some(PATIENCE)).ok()?;
            socket.send(&bytes).ok()?;
            let mut buffer = vec![0; 4096];
            let n = socket.recv(&mut buffer).ok()?;
            buffer.truncate(n);
            Some(buffer)
        })?;
        let answer = Message::from_vec(&answer).ok()?;
        Some(answer.answers.last()?.data.to_string())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in ['a', 'b'] {
                eprintln!("--- ztunnel {node}\n{}", self.log(node));
            }
        }
        for child in self.children.iter_mut().chain(self.ztunnels.iter_mut().map(|(_, c)| c)) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.pins);
        let script = format!(
            "for n in vm br a b {}; do ip netns del {}-$n; done; find {} -depth -type d -exec rmdir {{}} \\;",
            PODS.join(" "),
            self.name,
            self.cgroup.display()
        );
        let _ = Command::new("bash").args(["-c", &script]).stderr(Stdio::null()).status();
    }
}

/// An open connection to an echo.
pub struct Held(BufReader<TcpStream>);

impl Held {
    /// From the namespace of the thread.
    pub fn connect(to: SocketAddr) -> Self {
        let stream = TcpStream::connect(to).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        Self(BufReader::new(stream))
    }

    #[track_caller]
    pub fn expect_answer(mut self) {
        assert!(self.ask().ends_with(MARKER), "a connection was lost");
    }

    /// What the server says now; empty when the connection is gone.
    pub fn ask(&mut self) -> String {
        let mut answer = String::new();
        if writeln!(self.0.get_mut(), "{MARKER}").is_ok() {
            let _ = self.0.read_line(&mut answer);
        }
        answer.trim().to_owned()
    }
}

/// Serves each connection on a thread of its own.
fn each(listener: TcpListener, serve: impl Fn(TcpStream, IpAddr) + Copy + Send + 'static) {
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let Ok(peer) = stream.peer_addr() else { continue };
            std::thread::spawn(move || serve(stream, peer.ip().to_canonical()));
        }
    });
}

fn elsewhere(query: &[u8]) -> Vec<u8> {
    let asked = Message::from_vec(query).expect("ztunnel sends what the client sent");
    let mut answer = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
    answer.add_query(asked.queries[0].clone());
    answer.add_answer(Record::from_rdata(asked.queries[0].name().clone(), 77, RData::A(A(ELSEWHERE))));
    answer.to_vec().expect("encoded")
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&u16::try_from(message.len()).expect("short").to_be_bytes()[..], message].concat()
}

fn read_framed(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).ok()?;
    Some(message)
}

/// What passed over the bridge: TCP ports, and whether the marker was there to read.
pub struct Tap {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<(Vec<u16>, bool)>>,
    thread: JoinHandle<()>,
}

impl Tap {
    pub fn watch(netns: &Path) -> Self {
        const ALL: i32 = (nix::libc::ETH_P_ALL as u16).to_be() as i32;
        let socket = inside(netns, || {
            socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(ALL.into()))
                .expect("a packet socket")
        });
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("set");
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new((Vec::new(), false))));
        let thread = std::thread::spawn({
            let (stop, seen) = (stop.clone(), seen.clone());
            move || {
                let mut frame = vec![0u8; 65536];
                while !stop.load(Ordering::Relaxed) {
                    let Ok(n) = (&socket).read(&mut frame) else { continue };
                    let frame = &frame[..n];
                    let mut seen = seen.lock().expect("no panic holds it");
                    seen.0.extend(tcp_ports(frame));
                    seen.1 |= frame.windows(MARKER.len()).any(|w| w == MARKER.as_bytes());
                }
            }
        });
        Self { stop, seen, thread }
    }

    pub fn end(self) -> (Vec<u16>, bool) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the watcher ends");
        self.seen.lock().expect("no panic holds it").clone()
    }
}

/// The lower port of a TCP segment in an Ethernet frame: the service's, as the other one is ephemeral.
fn tcp_ports(frame: &[u8]) -> Option<u16> {
    let (protocol, offset) = match frame.get(12..14)? {
        [0x08, 0x00] => (*frame.get(23)?, 14 + usize::from(*frame.get(14)? & 0xf) * 4),
        [0x86, 0xdd] => (*frame.get(20)?, 54),
        _ => return None,
    };
    let ports = frame.get(offset..offset + 4).filter(|_| protocol == 6)?;
    Some(u16::from_be_bytes([ports[0], ports[1]]).min(u16::from_be_bytes([ports[2], ports[3]])))
}
