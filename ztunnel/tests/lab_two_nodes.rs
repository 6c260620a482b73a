//! Two ztunnels fed from files, each with two pods: what an application and somebody on the wire see of the mesh.
//!
//! Needs root, the BPF programs and `ip`, `nsenter`, `bash`. Where one is missing the test says so and passes, unless
//! `LAB=required`. All traffic stays on a bridge without uplink inside namespaces of the test's own; everything made is
//! taken down by [`Lab`]'s drop.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

const PODS: [&str; 4] = ["a1", "a2", "b1", "b2"];
const PATIENCE: Duration = Duration::from_secs(20);
const MARKER: &str = "payload-marker-5f1c";
const APP_PORT: u16 = 8080;
/// How often a pod joins and leaves; a leak of one descriptor each time is then plain to see.
const CYCLES: usize = 10;
const VIP: &str = "10.96.0.10";

/// Namespaces, cgroups, processes and pins of one run.
struct Lab {
    name: String,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    pins: PathBuf,
    children: Vec<Child>,
    ztunnels: Vec<(char, Child)>,
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

fn node_of(pod: &str) -> char {
    pod.chars().next().expect("pods are named after their node")
}

fn addresses(pod: &str) -> [String; 2] {
    let n = PODS.iter().position(|p| *p == pod).expect("a pod of the lab") + 1;
    [format!("10.77.0.{n}"), format!("fd77::{n}")]
}

impl Lab {
    /// `mark` tells labs of one test program apart.
    fn up(mark: char) -> Self {
        let name = format!("ztl{mark}{}", std::process::id());
        let unified = Path::new("/sys/fs/cgroup/unified");
        let root = if unified.exists() { unified } else { Path::new("/sys/fs/cgroup") };
        let mut lab = Self {
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
        run(&format!("ip -n {0}-br link add br0 type bridge; ip -n {0}-br link set br0 up", lab.name));
        for pod in PODS {
            let [v4, v6] = addresses(pod);
            run(&format!(
                "ip link add v{pod} netns {0}-br type veth peer name eth0 netns {0}-{pod}
                 ip -n {0}-br link set v{pod} master br0 up
                 ip -n {0}-{pod} link set eth0 up
                 ip -n {0}-{pod} addr add {v4}/16 dev eth0
                 ip -n {0}-{pod} addr add {v6}/64 dev eth0 nodad
                 ip -n {0}-{pod} route add default via 10.77.255.254",
                lab.name
            ));
            fs::create_dir_all(lab.pod_cgroup(pod)).expect("a cgroup for the pod");
            // What keeps the pod findable: a process of its own, as its pause container is in a cluster.
            let child = lab.in_pod(pod, "exec sleep 600").spawn().expect("a process in the pod");
            lab.children.push(child);
        }
        lab.make_ca();
        lab
    }

    fn pod_cgroup(&self, pod: &str) -> PathBuf {
        self.cgroup.join(format!("{}/kubepods/burstable/pod{}-{pod}/main", node_of(pod), self.name))
    }

    fn netns(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-{name}", self.name))
    }

    /// A shell in the pod's namespace and cgroup.
    fn in_pod(&self, pod: &str, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        let enter = format!("echo $$ > {}/cgroup.procs; {script}", self.pod_cgroup(pod).display());
        command.arg(format!("--net={}", self.netns(pod).display())).args(["bash", "-ec", &enter]);
        command
    }

    fn make_ca(&self) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate");
        fs::write(self.dir.path().join("ca-cert.pem"), certificate.pem()).expect("written");
        fs::write(self.dir.path().join("ca-key.pem"), key.serialize_pem()).expect("written");
    }

    /// Writes what `node`'s ztunnel knows, in one step as an editor would.
    fn configure(&self, node: char, policies: &str) {
        self.configure_without(node, policies, "");
    }

    /// The same with one pod not enrolled.
    fn configure_without(&self, node: char, policies: &str, left: &str) {
        let mut text = String::from("workloads:\n");
        for pod in PODS {
            let [v4, v6] = addresses(pod);
            let serves = if pod == "b1" { r#""shop/api.shop.svc": {80: 8080}"# } else { "" };
            writeln!(
                text,
                r#"- {{uid: "Kubernetes//Pod/shop/{pod}", name: {pod}, namespace: shop, serviceAccount: {pod}, workloadIps: ["{v4}", "{v6}"], protocol: HBONE, services: {{{serves}}}}}"#
            )
            .expect("a string takes it");
        }
        writeln!(text, r#"services: [{{name: api, namespace: shop, hostname: api.shop.svc, vips: ["/{VIP}"], ports: {{80: 8080}}}}]"#)
            .expect("a string takes it");
        writeln!(text, "policies: [{policies}]\nenrolments:").expect("a string takes it");
        for pod in PODS.into_iter().filter(|p| node_of(p) == node && *p != left) {
            let [v4, v6] = addresses(pod);
            writeln!(
                text,
                r#"- {{uid: {}-{pod}, name: {pod}, namespace: shop, serviceAccount: {pod}, addresses: ["{v4}", "{v6}"], workloadUid: "Kubernetes//Pod/shop/{pod}"}}"#,
                self.name
            )
            .expect("a string takes it");
        }
        let next = self.dir.path().join(format!("{node}.next"));
        fs::write(&next, text).expect("written");
        fs::rename(next, self.dir.path().join(format!("{node}.yaml"))).expect("renamed");
    }

    fn start_ztunnel(&mut self, node: char) {
        self.start_ztunnel_on(node, 15000);
    }

    /// With its ports at `ports`, `ports` + 20 and + 21, so that two can run on one node.
    fn start_ztunnel_on(&mut self, node: char, ports: u16) {
        self.start_ztunnel_with(node, ports, 2);
    }

    /// The same with some of the node's pods enrolled from the start.
    fn start_ztunnel_with(&mut self, node: char, ports: u16, pods: usize) {
        let log = fs::File::create(self.dir.path().join(format!("{node}.log"))).expect("a log file");
        let child = Command::new("nsenter")
            .arg(format!("--net={}", self.netns(&node.to_string()).display()))
            .arg(env!("CARGO_BIN_EXE_ztunnel"))
            .env("LOCAL_XDS_PATH", self.dir.path().join(format!("{node}.yaml")))
            .env("LOCAL_CA_DIR", self.dir.path())
            .env("CGROUP_ROOT", self.cgroup.join(node.to_string()))
            .env("BPFFS_DIR", self.pins.join(node.to_string()))
            // Run in the node's namespace.
            .env("HOST_NETNS", "/proc/self/ns/net")
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .env("ADMIN_PORT", ports.to_string())
            .env("STATS_PORT", (ports + 20).to_string())
            .env("READINESS_PORT", (ports + 21).to_string())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .expect("ztunnel starts");
        self.ztunnels.push((node, child));
        eventually("ztunnel is ready and its pods are enrolled", || {
            self.log(node).matches("\tenrolled").count() == pods
                && self.http(node, ports + 21, "/healthz/ready").contains("200 OK")
        });
    }

    fn kill_ztunnel(&mut self, node: char) {
        let at = self.ztunnels.iter().position(|(n, _)| *n == node).expect("it runs");
        let (_, mut child) = self.ztunnels.remove(at);
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    /// Asks the older ztunnel of a node to end, and waits for it.
    fn retire_ztunnel(&mut self, node: char) {
        let at = self.ztunnels.iter().position(|(n, _)| *n == node).expect("it runs");
        let (_, mut child) = self.ztunnels.remove(at);
        run(&format!("kill -TERM {}", child.id()));
        eventually("the old ztunnel ends", || child.try_wait().expect("its state").is_some_and(|s| s.success()));
    }

    /// A connection from `pod` that stays open.
    fn hold(&self, pod: &str, address: &str) -> Held {
        let script = format!(
            "exec 3<>/dev/tcp/{address}/{APP_PORT}
             while read -r line; do echo \"$line\" >&3; read -r -t 10 answer <&3; echo \"$answer\"; done"
        );
        let mut command = self.in_pod(pod, &script);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the shell runs");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Held { child, answers }
    }

    fn log(&self, node: char) -> String {
        fs::read_to_string(self.dir.path().join(format!("{node}.log"))).unwrap_or_default()
    }

    fn http(&self, node: char, port: u16, path: &str) -> String {
        let netns = self.netns(&node.to_string());
        inside(&netns, move || {
            let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
            let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
            let mut answer = String::new();
            let _ = stream.write_all(request.as_bytes());
            let _ = stream.read_to_string(&mut answer);
            answer
        })
    }

    /// Sends the marker from `pod`; what comes back is the address the server saw, and the marker again.
    fn call(&self, pod: &str, address: &str, port: u16) -> Result<String, String> {
        let script = format!("exec 3<>/dev/tcp/{address}/{port}; printf '{MARKER}\\n' >&3; timeout 10 head -n 1 <&3");
        let output = self.in_pod(pod, &script).output().expect("the shell runs");
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if said.is_empty() { Err(String::from_utf8_lossy(&output.stderr).into_owned()) } else { Ok(said) }
    }
}

/// An open connection and the shell that holds it.
struct Held {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Held {
    /// What the server says now; empty when the connection is gone.
    fn ask(&mut self) -> String {
        let mut answer = String::new();
        let question = self.child.stdin.as_mut().map(|stdin| writeln!(stdin, "{MARKER}"));
        if matches!(question, Some(Ok(()))) {
            let _ = self.answers.read_line(&mut answer);
        }
        answer.trim().to_owned()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
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
        let _ = Command::new("bash")
            .args([
                "-c",
                &format!(
                    "for n in br a b {}; do ip netns del {}-$n; done; find {} -depth -type d -exec rmdir {{}} \\;",
                    PODS.join(" "),
                    self.name,
                    self.cgroup.display()
                ),
            ])
            .stderr(Stdio::null())
            .status();
    }
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

/// An application that answers each line with the address it sees and the line.
fn serve_in(netns: &Path) {
    let listener = inside(netns, || TcpListener::bind(("::", APP_PORT)).expect("bound"));
    // Ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let peer = stream.peer_addr().map(|a| a.ip().to_canonical()).expect("a peer");
                let mut line = [0u8; 64];
                while let Ok(n @ 1..) = stream.read(&mut line) {
                    let text = String::from_utf8_lossy(&line[..n]).into_owned();
                    let _ = stream.write_all(format!("{peer} {text}").as_bytes());
                }
            });
        }
    });
}

/// What passed over the bridge: TCP ports, and whether the marker was there to read.
struct Wire {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<(Vec<u16>, bool)>>,
    thread: JoinHandle<()>,
}

impl Wire {
    fn watch(netns: &Path) -> Self {
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

    fn end(self) -> (Vec<u16>, bool) {
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

/// True where the lab can run; otherwise says why not.
fn possible() -> bool {
    let tools = ["ip", "nsenter", "bash"];
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
fn two_nodes_talk_through_the_mesh() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up('t');
    lab.configure('a', "");
    lab.configure('b', "");
    serve_in(&lab.netns("b1"));
    let [b1, b1_v6] = addresses("b1");
    let [a1, a1_v6] = addresses("a1");
    let answer = |client: &str| Ok(format!("{client} {MARKER}"));

    // Uncaptured first: the watcher can see what it is to miss later.
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    let (ports, marker) = wire.end();
    assert!(marker && ports.contains(&APP_PORT), "{ports:?}");

    let mut before = lab.hold("a1", &b1);
    assert_eq!(before.ask(), format!("{a1} {MARKER}"));

    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    assert_eq!(before.ask(), format!("{a1} {MARKER}"), "a connection from before joining lives on");

    // Captured: the server sees the client's own address; the wire carries HBONE and nothing to read.
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    assert_eq!(lab.call("a1", &b1_v6, APP_PORT), answer(&a1_v6));
    assert_eq!(lab.call("a2", VIP, 80), answer(&addresses("a2")[0]), "by service address");
    assert_eq!(lab.call("b2", VIP, 80), answer(&addresses("b2")[0]), "on the same node");
    assert_eq!(lab.call("b1", VIP, 80), answer(&b1), "a pod that calls its own service");
    assert!(lab.call("a1", &b1, 9).is_err(), "a port nobody listens on");
    let (ports, marker) = wire.end();
    assert!(!marker, "the payload was readable on the wire");
    assert!(!ports.is_empty() && ports.iter().all(|p| *p == 15008), "{ports:?}");
    let metrics = lab.http('b', 15020, "/metrics");
    let line = metrics.lines().find(|l| l.contains("istio_tcp_connections_opened_total") && l.contains("sa/a1"));
    let line = line.expect("the connection of a1 is counted");
    assert!(line.contains(r#"connection_security_policy="mutual_tls""#) && line.contains("sa/b1"), "{line}");

    // Policy: one identity in, the others and plaintext out.
    lab.configure('b', "{name: only-a1, namespace: shop, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/a1}]}]]]}");
    eventually("the policy denies a2", || lab.call("a2", &b1, APP_PORT).is_err());
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    eventually("the denial is logged", || lab.log('b').contains("none matched"));
    let outside = lab.netns("br");
    run(&format!("ip -n {}-br addr add 10.77.99.1/16 dev br0", lab.name));
    let refused = inside(&outside, {
        let to: IpAddr = b1.parse().expect("an address");
        move || {
            let mut stream = TcpStream::connect((to, APP_PORT)).expect("the handshake is ztunnel's");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            let _ = stream.write_all(MARKER.as_bytes());
            !matches!(stream.read(&mut [0; 64]), Ok(1..))
        }
    });
    assert!(refused, "plaintext of nobody in particular must not pass");
    lab.configure('b', "");
    eventually("without the policy a2 gets through", || lab.call("a2", &b1, APP_PORT).is_ok());

    // Garbage on the HBONE port harms nobody.
    let _ = inside(&outside, {
        let to: IpAddr = b1.parse().expect("an address");
        move || TcpStream::connect((to, 15008)).and_then(|mut s| s.write_all(&[0x5a; 4000]))
    });
    eventually("the garbage is logged", || lab.log('b').contains("connection failed"));

    // Killed: closed, at once, both ways. Restarted: works.
    lab.kill_ztunnel('a');
    let started = Instant::now();
    assert!(lab.call("a1", &b1, APP_PORT).is_err());
    assert!(started.elapsed() < Duration::from_secs(5), "refused, not timed out");
    assert_eq!(lab.call("b2", &b1, APP_PORT), answer(&addresses("b2")[0]), "the other node does not notice");
    lab.start_ztunnel('a');
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));

    // Upgraded: calls go on while the old one hands over and ends.
    lab.start_ztunnel_on('b', 16000);
    lab.retire_ztunnel('b');
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    assert!(lab.http('b', 16020, "/metrics").contains("istio_tcp_connections_opened_total"), "by the new one");

    // Left: what is open stays, what is new is plain again.
    let mut open = lab.hold("a1", &b1);
    assert_eq!(open.ask(), format!("{a1} {MARKER}"));
    lab.configure_without('a', "", "a1");
    let wire = Wire::watch(&lab.netns("br"));
    eventually("a1 calls directly again", || {
        let called = lab.call("a1", &b1, APP_PORT) == answer(&a1);
        called && wire.seen.lock().expect("no panic holds it").1
    });
    eventually("rules and listeners are gone, except for what is open", || {
        lab.http('a', 15000, "/config_dump").contains("\"Draining\"")
    });
    assert_eq!(open.ask(), format!("{a1} {MARKER}"), "a connection from before leaving lives on");
    drop(open);
    let rules = format!("ip -n {}-a1 rule", lab.name);
    eventually("nothing is left in the pod", || !run(&rules).contains("15000"));
}

#[test]
fn a_pod_that_joins_and_leaves_many_times_costs_nothing_in_the_end() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up('c');
    lab.configure_without('a', "", "a1");
    lab.start_ztunnel_with('a', 15000, 1);
    let ztunnel = lab.ztunnels[0].1.id();
    let descriptors = || fs::read_dir(format!("/proc/{ztunnel}/fd")).expect("it runs").count();
    let pins = |lab: &Lab| run(&format!("find {} -type f | wc -l", lab.pins.display()));
    let settled = |lab: &Lab| {
        let dump = lab.http('a', 15000, "/config_dump");
        dump.contains("\"Up\"") && !dump.contains("\"Draining\"") && !dump.contains("-a1\"")
    };
    let before = (descriptors(), pins(&lab));
    for n in 1..=CYCLES {
        lab.configure('a', "");
        eventually("a1 is enrolled", || lab.log('a').matches("\tenrolled").count() == n + 1);
        lab.configure_without('a', "", "a1");
        eventually("a1 leaves", || lab.log('a').matches("\tleaving").count() == n);
    }
    eventually("every leaving pod has left", || settled(&lab));
    eventually("descriptors and pins are as they were", || (descriptors(), pins(&lab)) == before);
    let rules = run(&format!("ip -n {0}-a1 rule; ip -n {0}-a1 -6 rule", lab.name));
    assert!(!rules.contains("15000"), "{rules}");

    // Deleted: its process is gone before the control plane says so.
    lab.configure('a', "");
    eventually("a1 can join again", || lab.log('a').matches("\tenrolled").count() == CYCLES + 2);
    lab.children[0].kill().expect("a1's process is killed");
    lab.children[0].wait().expect("and reaped");
    lab.configure_without('a', "", "a1");
    eventually("a1 leaves for good", || lab.log('a').matches("\tleaving").count() == CYCLES + 1);
    eventually("nothing is held of a deleted pod", || settled(&lab) && (descriptors(), pins(&lab)) == before);
    assert!(!lab.log('a').contains("panicked"), "{}", lab.log('a'));
}
