//! DNS of captured pods as their applications see it: one ztunnel fed from a file, three pods, two DNS servers.
//!
//! Needs root, the BPF programs and `ip`, `nsenter`, `unshare`, `bash`, `getent`, `dig`. Where one is missing the test says so
//! and passes, unless `LAB=required`. All traffic stays on a bridge without uplink inside namespaces of the test's own.

#![forbid(unsafe_code)]

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use nix::sched::{CloneFlags, setns};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use socket2::{Domain, Protocol, Socket, Type};

/// Client and server are captured; the DNS of `own` is its own affair.
const PODS: [&str; 3] = ["client", "server", "own"];
const PATIENCE: Duration = Duration::from_secs(20);
const VIP: &str = "10.96.0.10";
/// Of services outside the mesh, as a control plane would allocate them.
const ALLOCATED: [&str; 4] = ["240.240.0.7", "2001:2::7", "240.240.0.8", "240.240.0.9"];
/// Endpoints of a service that does not fit into a datagram of old.
const CROWD: usize = 60;
/// Where ztunnel itself is, on the same bridge as the pods.
const NODE: &str = "10.77.0.200";
/// Outside the mesh: the first is what the first DNS server says of `known.test`, the other is a lie.
const OUTSIDE: [&str; 2] = ["192.0.2.1", "192.0.2.66"];
const SERVERS: [&str; 3] = ["10.77.0.53", "10.77.0.54", "fd77::53"];

struct Lab {
    name: String,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    pins: PathBuf,
    children: Vec<Child>,
    ztunnel: Option<Child>,
    asked: Arc<Mutex<Vec<Asked>>>,
    /// Labs of one process take turns.
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());
static COUNT: AtomicU32 = AtomicU32::new(0);

/// What a DNS server was asked: by whom, how, for what, under which id.
#[derive(Debug, Clone)]
struct Asked {
    by: IpAddr,
    tcp: bool,
    name: String,
    id: u16,
}

fn run(command: &str) -> String {
    let output = Command::new("bash").args(["-ec", command]).output().expect("bash runs");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn addresses(pod: &str) -> [String; 2] {
    let n = PODS.iter().position(|p| *p == pod).expect("a pod of the lab") + 1;
    [format!("10.77.0.{n}"), format!("fd77::{n}")]
}

/// Runs `work` on a thread inside a namespace.
fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let file = fs::File::open(netns).expect("the namespace");
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET).expect("entered");
            work()
        });
        thread.join().expect("the work does not panic")
    })
}

impl Lab {
    fn up() -> Self {
        // What a failed test leaves of it is nothing that the next would find.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("ztd{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let unified = Path::new("/sys/fs/cgroup/unified");
        let root = if unified.exists() { unified } else { Path::new("/sys/fs/cgroup") };
        let mut lab = Self {
            cgroup: root.join(&name),
            pins: Path::new("/sys/fs/bpf").join(&name),
            dir: tempfile::tempdir().expect("a directory"),
            children: Vec::new(),
            ztunnel: None,
            asked: Arc::default(),
            name,
            _turn: turn,
        };
        let n = lab.name.clone();
        run(&format!(
            "ip netns add {n}-br; ip netns add {n}-node
             ip -n {n}-br link set lo up; ip -n {n}-node link set lo up
             ip -n {n}-br link add br0 type bridge; ip -n {n}-br link set br0 up
             for a in 10.77.0.53/16 10.77.0.54/16 10.77.255.254/16; do ip -n {n}-br addr add $a dev br0; done
             for a in {} {}; do ip -n {n}-br addr add $a/32 dev br0; done
             ip -n {n}-br addr add fd77::53/64 dev br0 nodad
             ip -n {n}-br addr add fd77::ff/64 dev br0 nodad
             ip link add vnode netns {n}-br type veth peer name eth0 netns {n}-node
             ip -n {n}-br link set vnode master br0 up; ip -n {n}-node link set eth0 up
             ip -n {n}-node addr add {NODE}/16 dev eth0",
            OUTSIDE[0], OUTSIDE[1]
        ));
        for pod in PODS {
            let [v4, v6] = addresses(pod);
            run(&format!(
                "ip netns add {n}-{pod}; ip -n {n}-{pod} link set lo up
                 ip link add v{pod} netns {n}-br type veth peer name eth0 netns {n}-{pod}
                 ip -n {n}-br link set v{pod} master br0 up
                 ip -n {n}-{pod} link set eth0 up
                 ip -n {n}-{pod} addr add {v4}/16 dev eth0
                 ip -n {n}-{pod} addr add {v6}/64 dev eth0 nodad
                 ip -n {n}-{pod} route add default via 10.77.255.254
                 ip -n {n}-{pod} route add default via fd77::ff"
            ));
            fs::create_dir_all(lab.pod_cgroup(pod)).expect("a cgroup for the pod");
            let child = lab.in_pod(pod, "exec sleep 600").spawn().expect("a process in the pod");
            lab.children.push(child);
        }
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(lab.dir.path().join("ca-cert.pem"), certificate.pem()).expect("written");
        fs::write(lab.dir.path().join("ca-key.pem"), key.serialize_pem()).expect("written");
        let resolv = "nameserver 10.77.0.53\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 attempts:1 timeout:3\n";
        fs::write(lab.dir.path().join("resolv.conf"), resolv).expect("written");
        for (n, server) in SERVERS.into_iter().enumerate() {
            lab.serve_dns(server, u8::try_from(n).expect("few") + 1);
        }
        lab
    }

    fn pod_cgroup(&self, pod: &str) -> PathBuf {
        self.cgroup.join(format!("kubepods/burstable/pod{}-{pod}/main", self.name))
    }

    fn netns(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-{name}", self.name))
    }

    /// A shell in the pod's namespace and cgroup, and with its `resolv.conf`.
    fn in_pod(&self, pod: &str, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        let resolv = self.dir.path().join("resolv.conf");
        let enter = format!(
            "echo $$ > {}/cgroup.procs; if [ -e {resolv} ]; then mount --bind {resolv} /etc/resolv.conf; fi; {script}",
            self.pod_cgroup(pod).display(),
            resolv = resolv.display()
        );
        let netns = format!("--net={}", self.netns(pod).display());
        command.args([&netns, "unshare", "-m", "bash", "-ec", &enter]);
        command
    }

    /// `captures`: the pods whose DNS is captured.
    fn configure(&self, captures: &[&str]) {
        self.configure_without("", captures);
    }

    /// The same with one pod that is not enrolled.
    fn configure_without(&self, left: &str, captures: &[&str]) {
        use std::fmt::Write as _;
        let mut text = String::from("workloads:\n");
        for pod in PODS {
            let [v4, v6] = addresses(pod);
            let serves = if pod == "server" {
                r#""shop/api.shop.svc.cluster.local": {80: 8080}, "shop/db.shop.svc.cluster.local": {80: 8080}, "shop/any.shop.svc.cluster.local": {80: 8080}"#
            } else {
                ""
            };
            // Whoever asks for endpoints that are not ready gets them.
            let unwell = if pod == "own" {
                r#""shop/db.shop.svc.cluster.local": {80: 8080}, "shop/any.shop.svc.cluster.local": {80: 8080}"#
            } else {
                ""
            };
            let status = if pod == "own" { "Unhealthy" } else { "Healthy" };
            writeln!(text, r#"- {{uid: "Kubernetes//Pod/shop/{pod}", name: {pod}, namespace: shop, serviceAccount: {pod}, workloadIps: ["{v4}", "{v6}"], protocol: HBONE, canonicalName: the-{pod}, status: {status}, services: {{{serves}{unwell}}}}}"#).expect("a string takes it");
        }
        for n in 0..CROWD {
            writeln!(text, r#"- {{uid: "crowd-{n}", name: crowd-{n}, namespace: shop, serviceAccount: default, workloadIps: ["10.88.0.{n}"], protocol: TCP, services: {{"shop/crowd.shop.svc.cluster.local": {{80: 8080}}}}}}"#).expect("a string takes it");
        }
        for (host, service) in [("known.test", "ext"), ("guarded-endpoint.test", "guarded"), ("nobody.test", "nobody")]
        {
            writeln!(text, r#"- {{uid: "Kubernetes/networking.istio.io/ServiceEntry/shop/{service}/{host}", name: {service}, namespace: shop, serviceAccount: default, workloadIps: [], hostname: {host}, protocol: TCP, services: {{"shop/{service}.example.com": {{80: 8080}}}}}}"#).expect("a string takes it");
        }
        let [ext, ext6, guarded, nobody] = ALLOCATED;
        writeln!(
            text,
            r#"services:
- {{name: any, namespace: shop, hostname: any.shop.svc.cluster.local, vips: [], ports: {{80: 8080}}, loadBalancer: {{healthPolicy: AllowAll}}}}
- {{name: crowd, namespace: shop, hostname: crowd.shop.svc.cluster.local, vips: [], ports: {{80: 8080}}}}
- {{name: ext, namespace: shop, hostname: ext.example.com, vips: ["/{ext}", "/{ext6}"], ports: {{80: 8080}}}}
- {{name: guarded, namespace: shop, hostname: guarded.example.com, vips: ["/{guarded}"], ports: {{80: 8080}}}}
- {{name: nobody, namespace: shop, hostname: nobody.example.com, vips: ["/{nobody}"], ports: {{80: 8080}}}}
- {{name: wild, namespace: shop, hostname: "*.wild.example.com", vips: ["/240.240.0.10"], ports: {{80: 8080}}}}
- {{name: four, namespace: shop, hostname: four.example.com, vips: ["/240.240.0.11", "/2001:2::11"], ipFamilies: IPv4, ports: {{80: 8080}}}}
- {{name: api, namespace: shop, hostname: api.shop.svc.cluster.local, vips: ["/{VIP}"], ports: {{80: 8080}}}}
- {{name: db, namespace: shop, hostname: db.shop.svc.cluster.local, vips: [], ports: {{80: 8080}}}}
policies: []
enrolments:"#
        )
        .expect("a string takes it");
        for pod in PODS.into_iter().filter(|pod| *pod != left) {
            let [v4, v6] = addresses(pod);
            let dns = captures.contains(&pod);
            writeln!(text, r#"- {{uid: {}-{pod}, name: {pod}, namespace: shop, serviceAccount: {pod}, addresses: ["{v4}", "{v6}"], workloadUid: "Kubernetes//Pod/shop/{pod}", dnsCapture: {dns}}}"#, self.name).expect("a string takes it");
        }
        fs::write(self.dir.path().join("next"), text).expect("written");
        fs::rename(self.dir.path().join("next"), self.dir.path().join("mesh.yaml")).expect("renamed");
    }

    fn start_ztunnel(&mut self) {
        let log = fs::File::create(self.dir.path().join("log")).expect("a log file");
        // Its own resolv.conf, in a mount namespace of its own.
        let resolv = self.dir.path().join("node-resolv.conf");
        fs::write(&resolv, "nameserver 10.77.0.53\n").expect("written");
        let enter =
            format!("mount --bind {} /etc/resolv.conf; exec {}", resolv.display(), env!("CARGO_BIN_EXE_ztunnel"));
        let child = Command::new("nsenter")
            .arg(format!("--net={}", self.netns("node").display()))
            .args(["unshare", "-m", "bash", "-ec", &enter])
            .env("LOCAL_XDS_PATH", self.dir.path().join("mesh.yaml"))
            .env("LOCAL_CA_DIR", self.dir.path())
            .env("CGROUP_ROOT", &self.cgroup)
            .env("HOST_NETNS", self.netns("node"))
            .env("BPFFS_DIR", self.pins.join("node"))
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .env("RUST_LOG", "info,dns=debug")
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .expect("ztunnel starts");
        self.ztunnel = Some(child);
        eventually("the pods are enrolled", || self.log().matches("\tenrolled").count() == PODS.len());
    }

    fn kill_ztunnel(&mut self) {
        let mut child = self.ztunnel.take().expect("it runs");
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn metrics(&self) -> String {
        inside(&self.netns("node"), || {
            let mut stream = TcpStream::connect(("127.0.0.1", 15020)).expect("the metrics port");
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("asked");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("answered");
            answer
        })
    }

    /// The value of a metric of which the line has all of `parts`.
    fn metric(&self, parts: &[&str]) -> Option<f64> {
        let text = self.metrics();
        let line = text.lines().filter(|l| !l.starts_with('#')).find(|l| parts.iter().all(|p| l.contains(p)));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok())
    }

    /// Asks `server` from the application of `pod`. The socket is a connected one: it takes an answer from that address
    /// and port only. `None`: no answer within the time.
    fn ask(&self, pod: &str, server: &str, network: &str, message: &Message) -> Option<Message> {
        let bytes = message.to_vec().expect("encoded");
        let prefix = if network == "tcp" {
            u16::try_from(bytes.len()).expect("short").to_be_bytes().to_vec()
        } else {
            Vec::new()
        };
        let file = self.dir.path().join(format!("query-{pod}"));
        fs::write(&file, [prefix, bytes].concat()).expect("written");
        // One write is one datagram. TCP: the server's end is ours, as the client's is closed after one answer.
        let read =
            if network == "tcp" { "timeout 8 head -c 60000" } else { "timeout 8 dd bs=65535 count=1 status=none" };
        let script = format!("exec 3<>/dev/{network}/{server}/53; cat {} >&3; {read} <&3", file.display());
        let output = self.in_pod(pod, &script).output().expect("the shell runs");
        let skip = if network == "tcp" { 2 } else { 0 };
        Message::from_vec(output.stdout.get(skip..)?).ok()
    }

    fn udp(&self, pod: &str, server: &str, name: &str, kind: RecordType) -> String {
        self.ask(pod, server, "udp", &query(name, kind)).map_or("silence".into(), |m| told(&m))
    }

    /// What `dig` of the pod's application prints.
    fn dig(&self, pod: &str, arguments: &str) -> String {
        let output = self.in_pod(pod, &format!("exec dig +tries=1 +time=8 {arguments}")).output().expect("dig runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What an application of the pod reads from `host:port`, found as its C library finds it.
    fn read_from(&self, pod: &str, host: &str, port: u16) -> String {
        let script = format!("exec 3<>/dev/tcp/{host}/{port}; timeout 10 head -n 1 <&3");
        let output = self.in_pod(pod, &script).output().expect("the shell runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Serves `text` on every address of a namespace; ends with the process.
    fn serve_text(&self, netns: &str, address: &str, port: u16, text: &'static [u8]) {
        let at: SocketAddr = SocketAddr::new(address.parse().expect("an address"), port);
        let listener = inside(&self.netns(netns), || TcpListener::bind(at).expect("bound"));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.and_then(|mut s| s.write_all(text));
            }
        });
    }

    fn asked_for(&self, name: &str) -> Vec<Asked> {
        self.asked.lock().expect("no panic holds it").iter().filter(|a| a.name == name).cloned().collect()
    }

    /// A DNS server that knows `known.test` as 192.0.2.`number`, and has its ways with some others.
    fn serve_dns(&self, address: &str, number: u8) {
        let at: IpAddr = address.parse().expect("an address");
        let (udp, tcp) = inside(&self.netns("br"), || {
            (UdpSocket::bind((at, 53)).expect("bound"), TcpListener::bind((at, 53)).expect("bound"))
        });
        let note = |asked: Arc<Mutex<Vec<Asked>>>| {
            move |by: IpAddr, tcp, bytes: &[u8]| {
                let message = Message::from_vec(bytes).expect("ztunnel sends what the client sent");
                let name = message.queries[0].name().to_ascii();
                asked.lock().expect("no panic holds it").push(Asked {
                    by,
                    tcp,
                    name: name.clone(),
                    id: message.metadata.id,
                });
                (name, message)
            }
        };
        // Both end with the process.
        let noted = note(self.asked.clone());
        let neighbour = forger(&self.netns("own"));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok((n, from)) = udp.recv_from(&mut buffer) {
                let (name, message) = noted(from.ip(), false, &buffer[..n]);
                let answer = |id: u16, cut| {
                    let mut answer = reply(&message, number);
                    (answer.metadata.id, answer.metadata.truncation) = (id, cut);
                    udp.send_to(&answer.to_vec().expect("encoded"), from).expect("sent");
                };
                let id = message.metadata.id;
                match name.as_str() {
                    "silent.test." => {}
                    "big.test." => answer(id, true),
                    "forged.test." => {
                        answer(id.wrapping_add(1), true);
                        answer(id, false);
                    }
                    // While the answer is awaited a neighbour forges it: knowing everything but the id, or but the port.
                    "guarded.test." | "guarded-endpoint.test." => {
                        let forge = |id, to| forge(&neighbour, at, to, &message, id);
                        for wrong in (0..=u16::MAX).filter(|wrong| wrong % 16 == 0 && *wrong != id) {
                            forge(wrong, from);
                        }
                        for port in (1024..=u16::MAX).filter(|port| port % 64 == 0 && *port != from.port()) {
                            forge(id, SocketAddr::new(from.ip(), port));
                        }
                        // The forgeries may have filled the buffer of the one who waits.
                        for _ in 0..5 {
                            answer(id, false);
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    }
                    // Knowing all of it, as nobody does who cannot read along.
                    "observed.test." => forge(&neighbour, at, from, &message, id),
                    _ => answer(id, false),
                }
            }
        });
        let noted = note(self.asked.clone());
        std::thread::spawn(move || {
            for stream in tcp.incoming() {
                let mut stream = stream.expect("accepted");
                let from = stream.peer_addr().expect("a peer").ip();
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
                    stream.read_exact(&mut bytes).expect("a message");
                    let (_, message) = noted(from, true, &bytes);
                    let answer = reply(&message, number).to_vec().expect("encoded");
                    let length = u16::try_from(answer.len()).expect("short").to_be_bytes();
                    stream.write_all(&[&length[..], &answer].concat()).expect("sent");
                }
            }
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- ztunnel\n{}\n--- asked {:?}", self.log(), self.asked.lock());
        }
        for child in self.children.iter_mut().chain(self.ztunnel.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.pins);
        let script = format!(
            "for kill in $(find {cgroup} -name cgroup.kill); do echo 1 > $kill; done
             for n in br node {}; do ip netns del {}-$n; done
             for try in {{1..50}}; do find {cgroup} -depth -type d -exec rmdir {{}} \\;; [ -e {cgroup} ] || break; sleep 0.1; done",
            PODS.join(" "),
            self.name,
            cgroup = self.cgroup.display()
        );
        let _ = Command::new("bash").args(["-c", &script]).stderr(Stdio::null()).status();
    }
}

/// A socket of a pod with NET_RAW that sends packets in anybody's name.
fn forger(netns: &Path) -> Socket {
    inside(netns, || {
        Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).expect("a raw socket")
    })
}

/// Answers `asked` with a lie in the name of the server `from`.
fn forge(neighbour: &Socket, from: IpAddr, to: SocketAddr, asked: &Message, id: u16) {
    let mut lie = reply(asked, 66);
    lie.metadata.id = id;
    let payload = lie.to_vec().expect("encoded");
    let packet = ztunnel::dns::packet::udp(SocketAddr::new(from, 53), to, &payload).expect("it fits");
    // A full queue loses a forgery, and that is all.
    let _ = neighbour.send_to(&packet, &SocketAddr::new(to.ip(), 0).into());
}

fn reply(asked: &Message, number: u8) -> Message {
    let mut answer = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
    answer.add_query(asked.queries[0].clone());
    let name = asked.queries[0].name();
    let text = name.to_ascii();
    if !text.ends_with("known.test.") && !KNOWN.contains(&&*text) {
        answer.metadata.response_code = ResponseCode::NXDomain;
    } else if asked.queries[0].query_type() == RecordType::A {
        let data = RData::A(A(Ipv4Addr::new(192, 0, 2, number)));
        answer.add_answer(Record::from_rdata(name.clone(), 77, data));
    }
    answer
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x2a2a, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
    message
}

/// `code [aa] [tc] data/ttl...`
fn told(message: &Message) -> String {
    assert_eq!(message.metadata.id, 0x2a2a, "the id the client sent");
    let m = &message.metadata;
    let mut text = format!("{:?}", m.response_code);
    text.push_str(if m.authoritative { " aa" } else { "" });
    text.push_str(if m.truncation { " tc" } else { "" });
    for record in &message.answers {
        text.push_str(&format!(" {}/{}", record.data, record.ttl));
    }
    text
}

/// Names the servers have an address for, beside those below `known.test`.
const KNOWN: [&str; 5] = ["big.test.", "forged.test.", "guarded.test.", "guarded-endpoint.test.", "observed.test."];

/// True where the lab can run; otherwise says why not.
fn possible() -> bool {
    let tools = ["ip", "nsenter", "unshare", "bash", "getent", "dig"];
    let missing = tools.iter().find(|t| Command::new("which").arg(t).output().is_ok_and(|o| !o.status.success()));
    let why = if !nix::unistd::geteuid().is_root() {
        "not root".to_owned()
    } else if !ebpf_loader::has_programs() {
        "no BPF programs were built in: run `cargo xtask bpf`".to_owned()
    } else if let Some(tool) = missing {
        format!("{tool} is not installed")
    } else {
        return true;
    };
    assert!(std::env::var("LAB").as_deref() != Ok("required"), "LAB=required, but {why}");
    eprintln!("SKIPPED: {why}");
    false
}

#[test]
fn pods_resolve_the_mesh_and_everything_else() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up();
    lab.configure(&["client", "server"]);
    let listener = inside(&lab.netns("server"), || TcpListener::bind(("::", 8080)).expect("bound"));
    // Ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.and_then(|mut s| s.write_all(b"hello\n"));
        }
    });
    assert_eq!(lab.udp("client", SERVERS[0], "api.shop.svc.cluster.local.", RecordType::A), "NXDomain", "before");
    // A DNS server in a pod has port 53 on every address for itself, whether it was there first or comes later.
    let first = inside(&lab.netns("server"), || UdpSocket::bind(("0.0.0.0", 53)).expect("port 53 is free"));
    lab.start_ztunnel();
    let later = inside(&lab.netns("client"), || UdpSocket::bind(("::", 53)).expect("port 53 is still free"));
    drop((first, later));

    // Names of the mesh, whichever server is asked.
    let udp = |server, name, kind| lab.udp("client", server, name, kind);
    for server in SERVERS {
        for name in ["api.shop.svc.cluster.local.", "api.shop.svc.", "api.shop.", "api.", "API.Shop."] {
            assert_eq!(udp(server, name, RecordType::A), format!("NoError aa {VIP}/30"), "{name} of {server}");
        }
    }
    assert_eq!(udp(SERVERS[0], "api.shop.", RecordType::AAAA), "NoError aa", "it exists, without one");
    let [v4, v6] = addresses("server");
    assert_eq!(udp(SERVERS[0], "db.shop.", RecordType::A), format!("NoError aa {v4}/30"), "headless");
    assert_eq!(udp(SERVERS[0], "db.shop.", RecordType::AAAA), format!("NoError aa {v6}/30"));
    let twice = "api.shop.svc.cluster.local.shop.svc.cluster.local.";
    assert_eq!(
        udp(SERVERS[0], twice, RecordType::A),
        format!("NoError aa api.shop.svc.cluster.local./30 {VIP}/30"),
        "with the search domain appended to a whole name"
    );
    let message = lab.ask("client", SERVERS[0], "tcp", &query("api.shop.", RecordType::A)).expect("an answer");
    assert_eq!(told(&message), format!("NoError aa {VIP}/30"), "by TCP");
    assert_eq!(lab.asked_for("api.shop.").len(), 0, "nobody else was asked");

    // Everything else, from the server that was asked.
    for (n, server) in SERVERS.into_iter().enumerate() {
        assert_eq!(udp(server, "known.test.", RecordType::A), format!("NoError 192.0.2.{}/77", n + 1));
    }
    assert_eq!(udp(SERVERS[0], "nobody.test.", RecordType::A), "NXDomain");
    assert_eq!(udp(SERVERS[0], "api.shop.", RecordType::TXT), "NXDomain", "other types are not ours to answer");
    assert_eq!(udp(SERVERS[0], "forged.test.", RecordType::A), "NoError 192.0.2.1/77", "a wrong id is not taken");
    assert_eq!(udp(SERVERS[0], "big.test.", RecordType::A), "NoError tc 192.0.2.1/77", "truncation passes through");
    let message = lab.ask("client", SERVERS[1], "tcp", &query("big.test.", RecordType::A)).expect("an answer");
    assert_eq!(told(&message), "NoError 192.0.2.2/77", "and so does the retry");
    assert!(lab.asked_for("big.test.").iter().any(|a| a.tcp));
    let known = lab.asked_for("known.test.");
    let client: Vec<IpAddr> = addresses("client").iter().map(|a| a.parse().expect("an address")).collect();
    assert!(known.iter().all(|a| client.contains(&a.by)), "asked from the pod's own addresses: {known:?}");
    assert!(known.iter().any(|a| a.id != 0x2a2a), "under ids of our own: {known:?}");
    assert_eq!(udp(SERVERS[0], "silent.test.", RecordType::A), "ServFail", "no answer in time");

    // As an application does it: by name, and then into the mesh.
    let said = lab.in_pod("client", "exec 3<>/dev/tcp/api/80; timeout 10 head -n 1 <&3").output().expect("it runs");
    assert_eq!(String::from_utf8_lossy(&said.stdout), "hello\n", "{}", String::from_utf8_lossy(&said.stderr));
    let said = lab.in_pod("client", "getent ahostsv4 www.known.test").output().expect("it runs");
    assert!(String::from_utf8_lossy(&said.stdout).starts_with("192.0.2.1"), "{said:?}");

    // A pod that asked for it keeps its own DNS.
    assert_eq!(lab.udp("own", SERVERS[0], "api.shop.", RecordType::A), "NXDomain");
    assert_eq!(lab.asked_for("api.shop.").last().map(|a| (a.id, a.tcp)), Some((0x2a2a, false)), "directly");
    assert!(!run(&format!("ip -n {}-own rule", lab.name)).contains("dport 53"));
    assert!(run(&format!("ip -n {}-client rule", lab.name)).contains("dport 53"));

    let of = |name: &'static str, more: &'static str| [name, "the-client", more];
    assert!(lab.metric(&of("istio_dns_requests_total{", "request_query_type=\"AAAA\"")) >= Some(2.0));
    assert!(lab.metric(&of("istio_dns_requests_total{", "request_protocol=\"tcp\"")) >= Some(1.0));
    assert!(lab.metric(&of("istio_dns_upstream_requests_total{", "request_query_type=\"TXT\"")) >= Some(1.0));
    assert!(lab.metric(&of("istio_dns_upstream_failures_total{", "request_query_type=\"A\"")) >= Some(1.0));
    assert!(lab.metric(&of("istio_dns_upstream_request_duration_seconds_bucket{", "le=\"0.0005\"")) >= Some(0.0));
    assert!(lab.metric(&of("istio_dns_upstream_request_duration_seconds_bucket{", "le=\"5\"")) >= Some(1.0));
    assert_eq!(lab.metric(&["istio_dns_requests_total{", "the-own"]), None);
    let text = lab.metrics();
    let of = |name: &str| -> Vec<String> {
        text.lines()
            .filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')))
            .map(Into::into)
            .collect()
    };
    for (name, kind) in [
        ("istio_dns_requests_total", "counter"),
        ("istio_dns_upstream_requests_total", "counter"),
        ("istio_dns_upstream_failures_total", "counter"),
        ("istio_dns_upstream_request_duration_seconds", "histogram"),
    ] {
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name}");
        let lines = if kind == "counter" { of(name) } else { of(&format!("{name}_count")) };
        assert!(!lines.is_empty(), "{name}");
        for line in lines {
            let labels =
                ["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"];
            assert!(labels.iter().all(|label| line.contains(&format!("{label}=\""))), "{line}");
            assert_eq!(line.matches("=\"").count(), labels.len(), "{line}");
        }
    }
    let buckets = of("istio_dns_upstream_request_duration_seconds_bucket");
    let bounds =
        buckets.iter().filter(|l| l.contains("\"TXT\"")).filter_map(|l| l.split("le=\"").nth(1)?.split('"').next());
    assert_eq!(bounds.collect::<Vec<_>>(), ["0.0005", "0.001", "0.01", "0.1", "1", "5", "+Inf"]);
    assert!(lab.log().contains("api.shop.") && lab.log().contains("known.test."), "target dns at debug");

    // A pod may change its mind while it runs.
    lab.configure(&["client", "server", "own"]);
    eventually("own is captured", || lab.udp("own", SERVERS[0], "api.shop.", RecordType::A).contains(VIP));
    lab.configure(&["server"]);
    eventually("client is not", || lab.udp("client", SERVERS[0], "api.shop.", RecordType::A) == "NXDomain");
    lab.configure(&["client", "server"]);
    eventually("client is again", || lab.udp("client", SERVERS[0], "api.shop.", RecordType::A).contains(VIP));

    // Without ztunnel there is no answer, and no query goes round it; the next one answers again.
    lab.kill_ztunnel();
    let started = Instant::now();
    assert_eq!(lab.udp("client", SERVERS[0], "known.test.after.", RecordType::A), "silence");
    assert!(started.elapsed() < Duration::from_secs(5), "refused, not timed out");
    assert_eq!(lab.asked_for("known.test.after.").len(), 0);
    assert_eq!(lab.udp("own", SERVERS[0], "known.test.", RecordType::A), "NoError 192.0.2.1/77", "own goes direct");
    lab.start_ztunnel();
    assert_eq!(lab.udp("client", SERVERS[0], "known.test.", RecordType::A), "NoError 192.0.2.1/77");
}

#[test]
fn dig_and_the_c_library_are_answered_by_every_transport_and_family() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up();
    lab.configure(&["client", "server"]);
    lab.serve_text("br", OUTSIDE[0], 8080, b"truth\n");
    lab.start_ztunnel();
    let [ext, ext6, ..] = ALLOCATED;
    let [server4, server6] = addresses("server");
    let [own4, _] = addresses("own");
    for (n, server) in SERVERS.into_iter().enumerate() {
        for transport in ["+notcp", "+tcp"] {
            let outside = format!("192.0.2.{}", n + 1);
            let expected = [
                ("api.shop.svc.cluster.local", "A", VIP),
                ("ApI.sHoP", "A", VIP),
                ("db.shop.svc", "A", server4.as_str()),
                ("db.shop.svc", "AAAA", server6.as_str()),
                ("ext.example.com", "A", ext),
                ("ext.example.com", "AAAA", ext6),
                ("a.b.wild.example.com", "A", "240.240.0.10"),
                ("four.example.com", "A", "240.240.0.11"),
                ("www.known.test", "A", outside.as_str()),
            ];
            let asked: String =
                expected.iter().map(|(name, kind, _)| format!(" {name} {kind} @{server} {transport} +short")).collect();
            let answers: Vec<&str> = expected.iter().map(|(_, _, answer)| *answer).collect();
            let said = lab.dig("client", &asked);
            assert_eq!(said.lines().collect::<Vec<_>>(), answers, "{server} {transport}");
        }
    }
    let dig = |arguments: &str| lab.dig("client", &format!("@{} {arguments}", SERVERS[0]));
    // What is not there, and what is there without an address of that type.
    for (asked, status, records) in [
        ("nobody.test A", "NXDOMAIN", 0),
        ("api.shop AAAA", "NOERROR", 0),
        ("four.example.com AAAA", "NOERROR", 0),
        ("other.example.com A", "NXDOMAIN", 0),
        ("wild.example.com A", "NXDOMAIN", 0),
        ("db-0.db.shop.svc.cluster.local A", "NXDOMAIN", 0),
        ("any.shop A", "NOERROR", 2),
        ("api.shop A +norecurse", "NOERROR", 1),
        ("api.shop A +opcode=update", "NOTIMP", 0),
        ("api.shop A +opcode=notify", "NOTIMP", 0),
    ] {
        let said = dig(asked);
        assert!(said.contains(&format!("status: {status}")), "{asked}: {said}");
        assert!(said.contains(&format!("ANSWER: {records},")), "{asked}: {said}");
    }
    assert!(dig("any.shop A +short").contains(&own4), "one that is not ready, for a service that says so");
    // Names with a search domain appended are told by their own name; the spelling of the question comes back.
    let said = dig("ExT.example.COM.Shop.svc.cluster.local A +noall +answer");
    let records: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        records,
        [
            vec!["ExT.example.COM.Shop.svc.cluster.local.", "30", "IN", "CNAME", "ext.example.com."],
            vec!["ext.example.com.", "30", "IN", "A", ext]
        ]
    );
    // Sizes: the old limit, TCP after it, and what EDNS allows.
    let said = dig("crowd.shop A +noedns +ignore");
    assert!(said.contains("flags: qr aa tc rd ra"), "{said}");
    let size = said.split("MSG SIZE  rcvd: ").nth(1).and_then(|rest| rest.trim().parse::<usize>().ok());
    assert!(size.is_some_and(|size| (400..=512).contains(&size)), "{said}");
    assert_eq!(dig("crowd.shop A +noedns +short").lines().filter(|l| l.starts_with("10.88.")).count(), CROWD, "by TCP");
    let said = dig("crowd.shop A +bufsize=4096 +ignore");
    assert!(said.contains("flags: qr aa rd ra") && said.contains(&format!("ANSWER: {CROWD},")), "{said}");
    assert!(said.contains("EDNS: version: 0") && said.contains("udp: 1232"), "{said}");

    // The C library, by the search list of the pod, by UDP and TCP, asking over IPv4 and IPv6.
    let of_resolv = |server: &str| {
        let text = format!(
            "nameserver {server}\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 attempts:1 timeout:3\n"
        );
        fs::write(lab.dir.path().join("resolv.conf"), text).expect("written");
    };
    for server in [SERVERS[0], SERVERS[2]] {
        of_resolv(server);
        for options in ["", "use-vc"] {
            let script = format!(
                "export RES_OPTIONS={options}; for n in api api.shop ext.example.com; do getent ahostsv4 $n | head -n 1; done; \
                 getent ahostsv6 ext.example.com | head -n 1"
            );
            let output = lab.in_pod("client", &script).output().expect("it runs");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let firsts: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
            assert_eq!(firsts, [VIP, VIP, ext, ext6], "{server} {options}: {output:?}");
        }
    }

    // And on to the endpoints behind such an address, found by their own names: from either family.
    assert_eq!(lab.read_from("client", "ext.example.com", 80), "truth\n");
    assert_eq!(lab.read_from("client", ext6, 80), "truth\n", "of the other family, where there is no other");
    let asked = lab.asked_for("known.test.");
    assert!(asked.iter().all(|a| a.by.to_string() == NODE), "ztunnel asks for itself: {asked:?}");
    assert_eq!(asked.len(), 2, "once for each family, and then it is known: {asked:?}");
    assert_eq!(lab.read_from("client", "nobody.example.com", 80), "");
    eventually("the log says why", || {
        lab.log().contains("looking up nobody.test") && lab.log().contains("no such name")
    });
}

/// Of the threat model: a pod with NET_ADMIN cannot poison a neighbour's DNS; answers are not cached at all, and names of
/// ServiceEntries are resolved from ztunnel's own network namespace.
#[test]
fn a_pod_with_net_admin_cannot_poison_a_neighbours_dns_nor_what_ztunnel_believes() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up();
    lab.configure(&PODS);
    lab.serve_text("br", OUTSIDE[0], 8080, b"truth\n");
    lab.serve_text("br", OUTSIDE[1], 8080, b"lie\n");
    // Who answers for an address on the wire is the network's to say, not ours: here it does.
    let n = lab.name.clone();
    run(&format!(
        "mac=$(ip netns exec {n}-br cat /sys/class/net/br0/address)
         for s in client node; do ip -n {n}-$s neigh replace 10.77.0.53 lladdr $mac dev eth0 nud permanent; done"
    ));
    lab.start_ztunnel();

    // The pod claims the address of the server that all ask, and answers with lies.
    run(&format!("ip -n {n}-own addr add 10.77.0.53/32 dev lo"));
    let liar = inside(&lab.netns("own"), || UdpSocket::bind("0.0.0.0:53").expect("bound"));
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = liar.recv_from(&mut buffer) {
            let lie = reply(&Message::from_vec(&buffer[..length]).expect("a query"), 66);
            let _ = liar.send_to(&lie.to_vec().expect("encoded"), from);
        }
    });
    let ask = |pod, server, name| lab.udp(pod, server, name, RecordType::A);
    let [itself, _] = addresses("own");
    assert_eq!(ask("own", &itself, "known.test."), "NoError 192.0.2.66/77", "it deceives itself");
    assert_eq!(ask("own", SERVERS[0], "known.test."), "NoError 192.0.2.66/77", "by the claimed address as well");
    // From the pod's address such a query looks as if it were captured; what is forwarded there comes back, once.
    let said = lab.dig("own", &format!("-b {itself} @{} known.test A", SERVERS[0]));
    assert!(said.contains("status: SERVFAIL"), "{said}");
    assert!(lab.metric(&["ztunnel_self_connections_total"]) >= Some(1.0));
    // Through ztunnel, from another server, which says something else; nobody else hears of it.
    assert_eq!(ask("own", SERVERS[1], "known.test."), "NoError 192.0.2.2/77");
    assert_eq!(ask("client", SERVERS[0], "known.test."), "NoError 192.0.2.1/77");
    assert_eq!(ask("client", SERVERS[1], "known.test."), "NoError 192.0.2.2/77");

    // Forged answers arrive, and count where everything is known; they do not where id or port had to be guessed.
    assert_eq!(ask("client", SERVERS[0], "observed.test."), "NoError 192.0.2.66/77");
    assert_eq!(ask("client", SERVERS[0], "guarded.test."), "NoError 192.0.2.1/77");

    // ztunnel's own questions are asked where the pod has no say, also for connections of that pod.
    for pod in ["own", "client"] {
        assert_eq!(lab.read_from(pod, ALLOCATED[0], 80), "truth\n", "{pod}");
        assert_eq!(lab.read_from(pod, ALLOCATED[2], 80), "truth\n", "{pod}, while answers are forged");
    }
    let asked = lab.asked_for("guarded-endpoint.test.");
    assert!(!asked.is_empty() && asked.iter().all(|a| a.by.to_string() == NODE), "{asked:?}");
}

#[test]
fn dns_capture_flips_on_a_live_pod_without_losing_a_query() {
    const FLIPS: usize = 4;
    const OFF: &str = "status: NXDOMAIN";
    const ON: &str = "status: NOERROR";
    if !possible() {
        return;
    }
    let mut lab = Lab::up();
    lab.configure(&["client"]);
    lab.start_ztunnel();
    let (names, stop, said) = (lab.dir.path().join("names"), lab.dir.path().join("stop"), lab.dir.path().join("said"));
    fs::write(&names, "api.shop.svc.cluster.local A\n".repeat(100)).expect("written");
    // One query after the other, each by a socket of its own, asked once.
    let script = format!(
        "until [ -e {} ] || [ $SECONDS -gt 90 ]; do dig @{} -f {} +tries=1 +time=4 +noall +comments; done > {}",
        stop.display(),
        SERVERS[0],
        names.display(),
        said.display()
    );
    let mut asking = lab.in_pod("client", &script).spawn().expect("it runs");
    // And by one socket that lives on, which keeps whatever mark it got. A query that is lost ends the loop.
    let (bytes, kept) = (lab.dir.path().join("bytes"), lab.dir.path().join("kept"));
    fs::write(&bytes, query("api.shop.", RecordType::A).to_vec().expect("encoded")).expect("written");
    let script = format!(
        "exec 3<>/dev/udp/{}/53
         until [ -e {} ] || [ $SECONDS -gt 90 ]; do
           cat {} >&3; timeout 4 dd bs=65535 count=1 status=none <&3 | od -An -tx1 -j3 -N1
         done > {}",
        SERVERS[0],
        stop.display(),
        bytes.display(),
        kept.display()
    );
    let mut asking_by_one = lab.in_pod("client", &script).spawn().expect("it runs");
    let codes = || -> Vec<String> {
        fs::read_to_string(&kept).unwrap_or_default().lines().map(|l| l.trim().to_owned()).collect()
    };
    let rule = || run(&format!("ip -n {}-client rule", lab.name)).contains("dport 53");
    let answered = |status: &str| fs::read_to_string(&said).unwrap_or_default().matches(status).count();
    for _ in 0..FLIPS {
        // By its annotation, and by leaving the mesh and coming back.
        for (left, captures, status) in
            [("", ["server"], OFF), ("", ["client"], ON), ("client", ["client"], OFF), ("", ["client"], ON)]
        {
            lab.configure_without(left, &captures);
            eventually("the rule follows", || rule() == (status == ON));
            let before = answered(status);
            eventually("queries are answered that way", || answered(status) > before + 10);
            let before = codes().len();
            eventually("those of the kept socket too", || codes().len() > before + 10);
        }
    }
    fs::write(&stop, "").expect("written");
    assert!(asking.wait().expect("it ends").success(), "dig fails where a query is not answered");
    let text = fs::read_to_string(&said).expect("dig wrote");
    assert!(!text.contains("communications error") && !text.contains("timed out"), "{text}");
    assert_eq!(
        text.matches("status: ").count(),
        text.matches("status: NXDOMAIN").count() + text.matches("status: NOERROR").count()
    );
    assert!(asking_by_one.wait().expect("it ends").success(), "after {} answers", codes().len());
    assert!(["80", "03"].iter().all(|code| codes().iter().any(|c| c == code)), "both ways: {:?}", codes());
    println!(
        "{} and {} queries over {FLIPS} flips each way, none lost",
        text.matches("status: ").count(),
        codes().len()
    );
}

#[test]
fn a_burst_of_queries_from_one_pod_does_not_starve_another() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up();
    lab.configure(&["client", "own"]);
    lab.start_ztunnel();
    // Its server never answers, so that all of them stay under way as long as they may.
    let bytes = query("silent.test.", RecordType::A).to_vec().expect("encoded");
    let escaped: String = bytes.iter().map(|b| format!("\\x{b:02x}")).collect();
    let script = format!("for i in {{1..4000}}; do printf '{escaped}' > /dev/udp/{}/53; done", SERVERS[0]);
    let started = Instant::now();
    let status = lab.in_pod("own", &script).status().expect("the shell runs");
    assert!(status.success());
    eventually("some are dropped", || lab.metric(&["ztunnel_dns_dropped_total"]) >= Some(1.0));

    let asked: String =
        (0..50).map(|n| format!(" api.shop A @{0} +short www{n}.known.test A @{0} +short", SERVERS[0])).collect();
    let before = Instant::now();
    let said = lab.dig("client", &asked);
    let took = before.elapsed();
    assert_eq!(said.lines().filter(|l| *l == VIP).count(), 50, "{said}");
    assert_eq!(said.lines().filter(|l| *l == "192.0.2.1").count(), 50, "{said}");
    assert!(took < Duration::from_secs(4), "nobody waits for the other's: {took:?}");
    let (forwarded, rounds) = (lab.asked_for("silent.test.").len(), started.elapsed().as_secs() / 5 + 1);
    assert!(forwarded >= 200, "the limit is one of many queries: {forwarded}");
    assert!(forwarded as u64 <= 256 * rounds, "{forwarded} in {rounds} times the time a server has");
    eventually("the pod is answered again", || {
        lab.udp("own", SERVERS[0], "known.test.", RecordType::A).contains("192.0.2.1")
    });
}
