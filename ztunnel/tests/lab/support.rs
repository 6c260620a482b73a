//! Pods on a bridge without uplink, in namespaces and cgroups of the test's own, and ztunnels fed from files.
//!
//! Everything made is taken down by [`Lab`]'s drop; what a killed run left, by the next one.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ebpf_loader::Capture;
use mesh::clock::Clock;
use mesh::identity::{FileCa, Identity};
use nix::sched::{CloneFlags, setns};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

pub const PATIENCE: Duration = Duration::from_secs(20);
pub const MARKER: &str = "payload-marker-5f1c";
pub const APP_PORT: u16 = 8080;
pub const VIP: &str = "10.96.0.10";
/// All labs begin with this, so that what a killed run left can be told.
const PREFIX: &str = "ztl";

/// A pod of the lab: its node and its name.
pub type Pod = (char, &'static str);

/// Namespaces, cgroups, processes and pins of one run.
pub struct Lab {
    pub name: String,
    pub dir: tempfile::TempDir,
    pub pins: PathBuf,
    /// Of the pods, in their order.
    pub children: Vec<Child>,
    pub ztunnels: Vec<(char, Child)>,
    /// What every ztunnel gets beside its own settings.
    pub env: Vec<(&'static str, String)>,
    pods: &'static [Pod],
    nodes: Vec<char>,
    cgroup: PathBuf,
}

/// What the files say beside the pods of the lab, all of which are workloads.
#[derive(Default, Clone)]
pub struct Mesh<'a> {
    /// YAML, as the file has it.
    pub policies: &'a str,
    pub services: String,
    /// The services of a pod, as its workload has them.
    pub serves: Vec<(&'a str, &'a str)>,
    /// A pod that is not enrolled, and that peers speak plain TCP to.
    pub left: &'a str,
    /// What a pod's enrolment says beside its name: YAML that begins with a comma.
    pub options: Vec<(&'a str, String)>,
    /// What a pod's workload says beside: YAML that begins with a comma.
    pub more: Vec<(&'a str, String)>,
    /// The addresses in a pod's enrolment, where not all it has.
    pub addresses: Vec<(&'a str, String)>,
}

pub fn run(command: &str) -> String {
    let output = Command::new("bash").args(["-ec", command]).output().expect("bash runs");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[track_caller]
pub fn eventually(what: &str, check: impl FnMut() -> bool) {
    within(PATIENCE, what, check);
}

#[track_caller]
pub fn within(patience: Duration, what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + patience;
    while !check() {
        assert!(Instant::now() < end, "not within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Lab {
    pub fn up(pods: &'static [Pod]) -> Self {
        /// Tell labs of one test program apart: one letter each, as `reap` expects.
        const MARKS: &[u8] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let mark = char::from(MARKS[NEXT.fetch_add(1, Ordering::Relaxed)]);
        let unified = Path::new("/sys/fs/cgroup/unified");
        let root = if unified.exists() { unified } else { Path::new("/sys/fs/cgroup") };
        reap(root);
        let name = format!("{PREFIX}{mark}{}", std::process::id());
        let mut nodes: Vec<char> = pods.iter().map(|(node, _)| *node).collect();
        nodes.dedup();
        let mut lab = Self {
            cgroup: root.join(&name),
            pins: Path::new("/sys/fs/bpf").join(&name),
            dir: tempfile::tempdir().expect("a directory"),
            children: Vec::new(),
            ztunnels: Vec::new(),
            env: Vec::new(),
            pods,
            nodes,
            name,
        };
        for ns in lab.nodes.iter().map(char::to_string).chain(["br".to_owned()]) {
            run(&format!("ip netns add {0}-{ns}; ip -n {0}-{ns} link set lo up", lab.name));
        }
        run(&format!("ip -n {0}-br link add br0 type bridge; ip -n {0}-br link set br0 up", lab.name));
        for (_, pod) in pods {
            let [v4, v6] = lab.addresses(pod);
            run(&format!(
                "ip netns add {0}-{pod}; ip -n {0}-{pod} link set lo up
                 ip link add v{pod} netns {0}-br type veth peer name eth0 netns {0}-{pod}
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

    pub fn addresses(&self, pod: &str) -> [String; 2] {
        let n = self.pods.iter().position(|(_, p)| *p == pod).expect("a pod of the lab") + 1;
        [format!("10.77.0.{n}"), format!("fd77::{n}")]
    }

    fn node_of(&self, pod: &str) -> char {
        self.pods.iter().find(|(_, p)| *p == pod).expect("a pod of the lab").0
    }

    pub fn pod_cgroup(&self, pod: &str) -> PathBuf {
        self.cgroup.join(format!("{}/kubepods/burstable/pod{}-{pod}/main", self.node_of(pod), self.name))
    }

    /// The capture of a node, for a test that plays with what its ztunnel relies on.
    pub fn capture(&self, node: char) -> Capture {
        let node = node.to_string();
        Capture::open(&self.pins.join(&node), &self.cgroup.join(&node)).expect("what is pinned there")
    }

    pub fn netns(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-{name}", self.name))
    }

    /// A shell in the pod's namespace and cgroup.
    pub fn in_pod(&self, pod: &str, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        let enter = format!("echo $$ > {}/cgroup.procs; {script}", self.pod_cgroup(pod).display());
        command.arg(format!("--net={}", self.netns(pod).display()));
        command.args(["bash", "-ec", &enter]);
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

    /// A certificate of the lab's authority for somebody who is no ztunnel, as `NAME.pem` and `NAME.key`.
    pub fn certify(&self, name: &str) {
        let dir = self.dir.path();
        let ca = FileCa::open(dir, Duration::from_secs(3600), Clock::system()).expect("the lab's");
        let identity = Identity::new("cluster.local", "shop", name).expect("a name");
        let (chain, key) = ca.sign_pem(&identity).expect("a certificate");
        fs::write(dir.join(format!("{name}.pem")), chain).expect("written");
        fs::write(dir.join(format!("{name}.key")), key).expect("written");
    }

    /// Writes what `node`'s ztunnel knows, in one step as an editor would.
    pub fn configure(&self, node: char, mesh: &Mesh<'_>) {
        let mut text = String::from("workloads:\n");
        let told = "a string takes it";
        for (node, pod) in self.pods {
            let [v4, v6] = self.addresses(pod);
            let serves = mesh.serves.iter().find(|(p, _)| p == pod).map_or("", |(_, serves)| *serves);
            let protocol = if *pod == mesh.left { "TCP" } else { "HBONE" };
            let more = mesh.more.iter().find(|(p, _)| p == pod).map_or("", |(_, more)| more);
            writeln!(
                text,
                r#"- {{uid: "Kubernetes//Pod/shop/{pod}", name: {pod}, namespace: shop, serviceAccount: {pod}, workloadIps: ["{v4}", "{v6}"], node: {node}, protocol: {protocol}, services: {{{serves}}}{more}}}"#
            )
            .expect(told);
        }
        let Mesh { services, policies, .. } = mesh;
        writeln!(text, "services: [{services}]\npolicies: [{policies}]\nenrolments: [").expect(told);
        for (_, pod) in self.pods.iter().filter(|(n, p)| *n == node && *p != mesh.left) {
            let [v4, v6] = self.addresses(pod);
            let addresses = mesh.addresses.iter().find(|(p, _)| p == pod).map(|(_, addresses)| addresses.clone());
            let addresses = addresses.unwrap_or_else(|| format!("\"{v4}\", \"{v6}\""));
            let options = mesh.options.iter().find(|(p, _)| p == pod).map_or("", |(_, options)| options);
            writeln!(
                text,
                r#"  {{uid: {}-{pod}, name: {pod}, namespace: shop, serviceAccount: {pod}, addresses: [{addresses}], workloadUid: "Kubernetes//Pod/shop/{pod}"{options}}},"#,
                self.name
            )
            .expect(told);
        }
        text.push_str("  ]\n");
        self.write(node, &text);
    }

    /// What `node`'s ztunnel knows, as the file has it.
    pub fn write(&self, node: char, text: &str) {
        let next = self.dir.path().join(format!("{node}.next"));
        fs::write(&next, text).expect("written");
        fs::rename(next, self.dir.path().join(format!("{node}.yaml"))).expect("renamed");
    }

    /// The same for a ztunnel that runs, which has taken it when this returns.
    pub fn reconfigure(&self, node: char, mesh: &Mesh<'_>) {
        let taken = || self.log(node).matches("local configuration loaded").count();
        let before = taken();
        self.configure(node, mesh);
        eventually("the configuration is taken", || taken() > before);
    }

    pub fn start_ztunnel(&mut self, node: char) {
        self.start_ztunnel_on(node, 15000);
    }

    /// With its ports at `ports`, `ports` + 20 and + 21, so that two can run on one node.
    pub fn start_ztunnel_on(&mut self, node: char, ports: u16) {
        let pods = self.pods.iter().filter(|(n, _)| *n == node).count();
        self.start_ztunnel_with(node, ports, pods);
    }

    /// The same with some of the node's pods enrolled from the start.
    pub fn start_ztunnel_with(&mut self, node: char, ports: u16, pods: usize) {
        let log = fs::File::create(self.dir.path().join(format!("{node}.log"))).expect("a log file");
        let child = Command::new("nsenter")
            .arg(format!("--net={}", self.netns(&node.to_string()).display()))
            .arg(env!("CARGO_BIN_EXE_ztunnel"))
            .env("LOCAL_XDS_PATH", self.dir.path().join(format!("{node}.yaml")))
            .env("LOCAL_CA_DIR", self.dir.path())
            .env("NODE_NAME", node.to_string())
            .env("CGROUP_ROOT", self.cgroup.join(node.to_string()))
            .env("BPFFS_DIR", self.pins.join(node.to_string()))
            // Run in the node's namespace.
            .env("HOST_NETNS", "/proc/self/ns/net")
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .env("ADMIN_PORT", ports.to_string())
            .env("STATS_PORT", (ports + 20).to_string())
            .env("READINESS_PORT", (ports + 21).to_string())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
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

    pub fn kill_ztunnel(&mut self, node: char) {
        let at = self.ztunnels.iter().position(|(n, _)| *n == node).expect("it runs");
        let (_, mut child) = self.ztunnels.remove(at);
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    /// Asks the older ztunnel of a node to end, and waits for it.
    pub fn retire_ztunnel(&mut self, node: char) {
        let at = self.ztunnels.iter().position(|(n, _)| *n == node).expect("it runs");
        let (_, mut child) = self.ztunnels.remove(at);
        run(&format!("kill -TERM {}", child.id()));
        eventually("the old ztunnel ends", || child.try_wait().expect("its state").is_some_and(|s| s.success()));
    }

    /// A connection from `pod` that stays open.
    pub fn hold(&self, pod: &str, address: &str) -> Held {
        self.hold_at(pod, address, APP_PORT)
    }

    /// The same to another port.
    pub fn hold_at(&self, pod: &str, address: &str, port: u16) -> Held {
        let script = format!(
            "exec 3<>/dev/tcp/{address}/{port}
             while read -r line; do echo \"$line\" >&3; read -r -t 10 answer <&3; echo \"$answer\"; done"
        );
        let mut command = self.in_pod(pod, &script);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the shell runs");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Held { child, answers }
    }

    pub fn log(&self, node: char) -> String {
        fs::read_to_string(self.dir.path().join(format!("{node}.log"))).unwrap_or_default()
    }

    pub fn http(&self, node: char, port: u16, path: &str) -> String {
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

    /// The value of a metric of which the line has all of `parts`.
    pub fn metric(&self, node: char, parts: &[&str]) -> Option<f64> {
        let text = self.http(node, 15020, "/metrics");
        let line = text.lines().find(|l| !l.starts_with('#') && parts.iter().all(|p| l.contains(p)));
        line.and_then(|l| l.rsplit(' ').next()?.parse().ok())
    }

    /// Sends the marker from `pod`; what comes back is the address the server saw, and the marker again.
    pub fn call(&self, pod: &str, address: &str, port: u16) -> Result<String, String> {
        let script = format!("exec 3<>/dev/tcp/{address}/{port}; printf '{MARKER}\\n' >&3; timeout 10 head -n 1 <&3");
        let output = self.in_pod(pod, &script).output().expect("the shell runs");
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if said.is_empty() { Err(String::from_utf8_lossy(&output.stderr).into_owned()) } else { Ok(said) }
    }
}

/// An open connection and the shell that holds it.
pub struct Held {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Held {
    /// What the server says now; empty when the connection is gone.
    pub fn ask(&mut self) -> String {
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
            for node in &self.nodes {
                eprintln!("--- ztunnel {node}\n{}", self.log(*node));
            }
        }
        for child in self.children.iter_mut().chain(self.ztunnels.iter_mut().map(|(_, c)| c)) {
            let _ = child.kill();
            let _ = child.wait();
        }
        take_down(&self.name, &self.cgroup);
    }
}

fn take_down(name: &str, cgroup: &Path) {
    let _ = fs::remove_dir_all(Path::new("/sys/fs/bpf").join(name));
    let script = format!(
        "for n in /run/netns/{name}-*; do ip netns del $(basename $n); done
         find {} -depth -type d -exec rmdir {{}} \\;",
        cgroup.display()
    );
    let _ = Command::new("bash").args(["-c", &script]).stderr(Stdio::null()).status();
}

/// Takes down the labs of runs that are gone. Their processes ended with the terminal or end by themselves.
fn reap(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.get(1..));
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            take_down(&name, &entry.path());
        }
    }
}

/// A program that `cargo xtask setup` has put aside.
pub fn tool(program: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("cargo's target directory");
    target.join("tools").join(program)
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

/// An application that answers each line with the address it sees and the line.
pub fn serve_in(netns: &Path) {
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
pub struct Wire {
    stop: Arc<AtomicBool>,
    pub seen: Arc<Mutex<(Vec<u16>, bool)>>,
    thread: JoinHandle<()>,
}

impl Wire {
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
                // To the end of what has come before the stop.
                loop {
                    let Ok(n) = (&socket).read(&mut frame) else {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        continue;
                    };
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

/// True where the lab can run; otherwise says why not. `more`: programs that this test needs besides those of all.
pub fn possible(more: &[&str]) -> bool {
    let mut tools = ["ip", "nsenter", "bash"].iter().chain(more);
    let missing = tools.find(|t| Command::new("which").arg(t).output().is_ok_and(|o| !o.status.success()));
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

/// A script that plays a peer.
pub fn peer_script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/peers").join(name)
}
