//! Two ztunnels of dedicated mode, each in the network namespace of its one workload, and a node's shared one with a
//! pod, all on one kernel: they speak HBONE with one another, and what lives beside a dedicated ztunnel has no power
//! over it.
//!
//! Needs root, the BPF programs and `ip`, `nsenter`, `setpriv`, `bash`. Where one is missing the test says so and
//! passes, unless `LAB=required`. All traffic stays on a bridge without uplink inside namespaces of the test's own;
//! everything made is taken down by [`Lab`]'s drop.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

/// `a1` is a pod of node `a`; `v1` and `v2` have a ztunnel each and no node.
const WORKLOADS: [&str; 3] = ["a1", "v1", "v2"];
const PATIENCE: Duration = Duration::from_secs(20);
const MARKER: &str = "payload-marker-5f1c";
const APP_PORT: u16 = 8080;
const READINESS: u16 = 15021;
const STATS: u16 = 15020;

/// Namespaces, cgroups, processes and pins of one run.
struct Lab {
    name: String,
    dir: tempfile::TempDir,
    cgroup: PathBuf,
    pins: PathBuf,
    children: Vec<Child>,
    ztunnels: Vec<(&'static str, Child)>,
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

fn addresses(workload: &str) -> [String; 2] {
    let n = WORKLOADS.iter().position(|w| *w == workload).expect("a workload of the lab") + 1;
    [format!("10.78.0.{n}"), format!("fd78::{n}")]
}

fn v4(workload: &str) -> String {
    addresses(workload)[0].clone()
}

fn answer(client: &str) -> Result<String, String> {
    Ok(format!("{client} {MARKER}"))
}

impl Lab {
    /// `mark` tells labs of one test program apart.
    fn up(mark: char) -> Self {
        let name = format!("ztd{mark}{}", std::process::id());
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
        for ns in ["br", "a"].into_iter().chain(WORKLOADS) {
            run(&format!("ip netns add {0}-{ns}; ip -n {0}-{ns} link set lo up", lab.name));
        }
        run(&format!(
            "ip -n {0}-br link add br0 type bridge; ip -n {0}-br link set br0 up
             ip -n {0}-br addr add 10.78.99.1/16 dev br0",
            lab.name
        ));
        for workload in WORKLOADS {
            let [v4, v6] = addresses(workload);
            run(&format!(
                "ip link add v{workload} netns {0}-br type veth peer name eth0 netns {0}-{workload}
                 ip -n {0}-br link set v{workload} master br0 up
                 ip -n {0}-{workload} link set eth0 up
                 ip -n {0}-{workload} addr add {v4}/16 dev eth0
                 ip -n {0}-{workload} addr add {v6}/64 dev eth0 nodad",
                lab.name
            ));
            fs::create_dir_all(lab.cgroup_of(workload)).expect("a cgroup for the workload");
            serve_in(&lab.netns(workload));
        }
        // What keeps the pod findable.
        let child = lab.inside("a1", "exec sleep 600").spawn().expect("a process in the pod");
        lab.children.push(child);
        lab.make_ca();
        for node in ["a", "v1", "v2"] {
            lab.configure(node, "");
        }
        lab
    }

    fn cgroup_of(&self, workload: &str) -> PathBuf {
        self.cgroup.join(match workload {
            "a1" => format!("a/kubepods/burstable/pod{}-a1/main", self.name),
            dedicated => dedicated.to_owned(),
        })
    }

    fn netns(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-{name}", self.name))
    }

    /// A shell in the workload's namespace and cgroup.
    fn inside(&self, workload: &str, script: &str) -> Command {
        let mut command = Command::new("nsenter");
        let enter = format!("echo $$ > {}/cgroup.procs; {script}", self.cgroup_of(workload).display());
        command.arg(format!("--net={}", self.netns(workload).display())).args(["bash", "-ec", &enter]);
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

    /// Writes what a ztunnel knows, in one step as an editor would. The enrolment is for the node alone.
    fn configure(&self, node: &str, policies: &str) {
        let mut text = String::from("workloads:\n");
        for workload in WORKLOADS {
            let [v4, v6] = addresses(workload);
            writeln!(
                text,
                r#"- {{uid: "Kubernetes//Pod/shop/{workload}", name: {workload}, namespace: shop, serviceAccount: {workload}, workloadIps: ["{v4}", "{v6}"], protocol: HBONE}}"#
            )
            .expect("a string takes it");
        }
        let [v4, v6] = addresses("a1");
        writeln!(
            text,
            r#"policies: [{policies}]
enrolments:
- {{uid: {}-a1, name: a1, namespace: shop, serviceAccount: a1, addresses: ["{v4}", "{v6}"], workloadUid: "Kubernetes//Pod/shop/a1"}}"#,
            self.name
        )
        .expect("a string takes it");
        let next = self.dir.path().join(format!("{node}.next"));
        fs::write(&next, text).expect("written");
        fs::rename(next, self.dir.path().join(format!("{node}.yaml"))).expect("renamed");
    }

    fn start_node(&mut self) {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns("a").display()))
            .arg(env!("CARGO_BIN_EXE_ztunnel"))
            .env("CGROUP_ROOT", self.cgroup.join("a"))
            .env("BPFFS_DIR", self.pins.join("a"))
            .env("HOST_NETNS", "/proc/self/ns/net");
        self.start("a", command);
    }

    /// A ztunnel in the namespace and cgroup of its workload, with three capabilities and no more.
    fn start_dedicated(&mut self, workload: &'static str, settings: &[(&str, &str)]) {
        let mut command = self.dedicated(workload, "");
        command.envs(settings.iter().copied());
        self.start(workload, command);
    }

    /// The same with capture off, which takes one capability.
    fn start_uncaptured(&mut self, workload: &'static str) {
        let script = format!("exec setpriv --bounding-set=-all,+net_admin {}", env!("CARGO_BIN_EXE_ztunnel"));
        let mut command = self.inside(workload, &script);
        command
            .env("PROXY_MODE", "dedicated")
            .env("CAPTURE", "off")
            .env("PROXY_WORKLOAD_INFO", format!("shop/{workload}/{workload}"))
            .env("ADMIN_SOCKET", self.admin(workload));
        self.start(workload, command);
    }

    fn dedicated(&self, workload: &str, arguments: &str) -> Command {
        let script = format!(
            "exec setpriv --bounding-set=-all,+bpf,+net_admin,+net_raw {} {arguments}",
            env!("CARGO_BIN_EXE_ztunnel")
        );
        let mut command = self.inside(workload, &script);
        command
            .env("PROXY_MODE", "dedicated")
            .env("PROXY_WORKLOAD_INFO", format!("shop/{workload}/{workload}"))
            .env("CGROUP_ROOT", self.cgroup_of(workload))
            .env("ADMIN_SOCKET", self.admin(workload))
            .env("LOCAL_XDS_PATH", self.dir.path().join(format!("{workload}.yaml")))
            .env("LOCAL_CA_DIR", self.dir.path())
            .env("BPFFS_DIR", self.pins.join(workload));
        command
    }

    fn start(&mut self, node: &'static str, mut command: Command) {
        let log = fs::File::create(self.dir.path().join(format!("{node}.log"))).expect("a log file");
        let child = command
            .env("LOCAL_XDS_PATH", self.dir.path().join(format!("{node}.yaml")))
            .env("LOCAL_CA_DIR", self.dir.path())
            .env("ZTUNNEL_WORKER_THREADS", "2")
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .expect("ztunnel starts");
        self.ztunnels.push((node, child));
        eventually("ztunnel is ready and its workload is enrolled", || {
            ["\tenrolled", "\tserved"].iter().any(|told| self.log(node).contains(told))
                && self.http(node, READINESS, "/healthz/ready").contains("200 OK")
        });
    }

    fn end_ztunnel(&mut self, node: &str, signal: &str) {
        let at = self.ztunnels.iter().position(|(n, _)| *n == node).expect("it runs");
        let (_, mut child) = self.ztunnels.remove(at);
        run(&format!("kill -{signal} {}", child.id()));
        eventually("the ztunnel ends", || child.try_wait().expect("its state").is_some());
    }

    fn release(&self, workload: &str) -> Output {
        self.dedicated(workload, "release").output().expect("ztunnel runs")
    }

    /// Nothing of a ztunnel is left in the workload's namespace, nor pinned for it.
    #[track_caller]
    fn assert_clean(&self, workload: &str) {
        let name = format!("{}-{workload}", self.name);
        let rules = run(&format!("ip -n {name} rule; ip -n {name} -6 rule"));
        let routes =
            run(&format!("for f in -4 -6; do ip -n {name} $f route show table 15000 2>/dev/null || true; done"));
        assert!(!rules.contains("15000") && routes.trim().is_empty(), "{rules}\n{routes}");
        let sysctl = "cat /proc/sys/net/ipv4/tcp_fwmark_accept";
        assert_eq!(run(&format!("nsenter --net={} {sysctl}", self.netns(workload).display())).trim(), "0");
        assert!(!self.pins.join(workload).exists());
    }

    fn admin(&self, workload: &str) -> PathBuf {
        self.dir.path().join(format!("{workload}.sock"))
    }

    fn log(&self, node: &str) -> String {
        fs::read_to_string(self.dir.path().join(format!("{node}.log"))).unwrap_or_default()
    }

    fn http(&self, node: &str, port: u16, path: &str) -> String {
        inside(&self.netns(node), move || {
            TcpStream::connect(("127.0.0.1", port)).map(|stream| get(stream, path)).unwrap_or_default()
        })
    }

    /// Sends the marker from `client`; what comes back is the address the server saw, and the marker again.
    fn call(&self, client: &str, address: &str) -> Result<String, String> {
        self.call_port(client, address, APP_PORT)
    }

    fn call_port(&self, client: &str, address: &str, port: u16) -> Result<String, String> {
        let script = format!("exec 3<>/dev/tcp/{address}/{port}; printf '{MARKER}\\n' >&3; timeout 10 head -n 1 <&3");
        let output = self.inside(client, &script).output().expect("the shell runs");
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if said.is_empty() { Err(String::from_utf8_lossy(&output.stderr).into_owned()) } else { Ok(said) }
    }

    /// From outside the mesh, in plain text.
    fn call_from_outside(&self, to: &str) -> bool {
        let to: IpAddr = to.parse().expect("an address");
        inside(&self.netns("br"), move || {
            let mut stream = TcpStream::connect((to, APP_PORT)).expect("the handshake is ztunnel's");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            let _ = stream.write_all(MARKER.as_bytes());
            matches!(stream.read(&mut [0; 64]), Ok(1..))
        })
    }

    fn self_connections(&self, workload: &str) -> u64 {
        let metrics = self.http(workload, STATS, "/metrics");
        let line = metrics.lines().find_map(|l| l.strip_prefix("ztunnel_self_connections_total "));
        line.map_or(0, |n| n.parse().expect("a number"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in ["a", "v1", "v2"] {
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
                    "for n in br a {}; do ip netns del {}-$n; done; find {} -depth -type d -exec rmdir {{}} \\;",
                    WORKLOADS.join(" "),
                    self.name,
                    self.cgroup.display()
                ),
            ])
            .stderr(Stdio::null())
            .status();
    }
}

fn get(mut stream: impl Read + Write, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    let mut answer = String::new();
    let _ = stream.write_all(request.as_bytes());
    let _ = stream.read_to_string(&mut answer);
    answer
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

/// Ports on which a namespace listens on loopback: (IPv4, IPv6). `table` is `tcp` or `udp`.
fn loopback_ports(netns: &Path, table: &str) -> (Vec<u16>, Vec<u16>) {
    inside(netns, || {
        let listening = if table == "tcp" { "0A" } else { "07" };
        let read = |family: &str, loopback: &str| -> Vec<u16> {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{table}{family}")).expect("the table");
            text.lines()
                .filter_map(|line| {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    let (address, port) = words.get(1)?.split_once(':')?;
                    (address == loopback && words.get(3) == Some(&listening))
                        .then(|| u16::from_str_radix(port, 16).ok())?
                })
                .collect()
        };
        let mut ports = (read("", "0100007F"), read("6", "00000000000000000000000001000000"));
        // One entry for each worker.
        ports.0.dedup();
        ports.1.dedup();
        ports.0.sort_unstable();
        ports.1.sort_unstable();
        ports.0.dedup();
        ports.1.dedup();
        ports
    })
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

fn allow_only(account: &str) -> String {
    format!(
        "{{name: only, namespace: shop, scope: Namespace, action: Allow, rules: [[[{{principals: [{{Exact: cluster.local/ns/shop/sa/{account}}}]}}]]]}}"
    )
}

/// True where the lab can run; otherwise says why not.
fn possible() -> bool {
    let tools = ["ip", "nsenter", "setpriv", "bash"];
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
fn a_dedicated_ztunnel_speaks_hbone_with_a_node_and_with_its_like() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up('h');
    lab.start_node();
    lab.start_dedicated("v1", &[]);
    lab.start_dedicated("v2", &[]);

    let wire = Wire::watch(&lab.netns("br"));
    for (client, server) in [("v1", "a1"), ("a1", "v1"), ("v1", "v2"), ("v2", "v1")] {
        for (from, to) in addresses(client).iter().zip(addresses(server)) {
            assert_eq!(lab.call(client, &to), answer(from), "{client} calls {server} at {to}");
        }
    }
    let (ports, marker) = wire.end();
    assert!(!marker, "the payload was readable on the wire");
    assert!(!ports.is_empty() && ports.iter().all(|p| *p == 15008), "{ports:?}");

    // Its identity counts at the other side, and it asks for the others'.
    lab.configure("a", &allow_only("v1"));
    eventually("the node denies v2", || lab.call("v2", &v4("a1")).is_err());
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));
    lab.configure("v1", &allow_only("a1"));
    eventually("v1 denies v2", || lab.call("v2", &v4("v1")).is_err());
    assert_eq!(lab.call("a1", &v4("v1")), answer(&v4("a1")));
    assert!(!lab.call_from_outside(&v4("v1")), "plaintext of nobody in particular must not pass");
    lab.configure("v1", "");
    eventually("without the policy plaintext is let in", || lab.call_from_outside(&v4("v1")));
}

#[test]
fn what_lives_beside_a_dedicated_ztunnel_has_no_power_over_it() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up('p');
    lab.start_node();
    lab.start_dedicated("v1", &[]);
    let v1 = lab.netns("v1");

    // Admin is on a socket for root alone, and not on any port.
    let socket = lab.admin("v1");
    let dump = get(UnixStream::connect(&socket).expect("root may"), "/config_dump");
    assert!(dump.contains(r#""proxyMode": "Dedicated""#) && dump.contains(r#""Up""#), "{dump}");
    assert_eq!(fs::metadata(&socket).expect("it is there").permissions().mode() & 0o777, 0o600);
    let (tcp4, tcp6) = loopback_ports(&v1, "tcp");
    let (udp4, udp6) = loopback_ports(&v1, "udp");
    assert!(!tcp4.contains(&15000) && tcp4.len() == 3 && tcp6.len() == 3, "{tcp4:?} {tcp6:?}");
    assert!(udp4.len() == 1 && udp6.len() == 1, "{udp4:?} {udp6:?}");
    for port in [STATS, READINESS] {
        let answer = lab.http("v1", port, "/config_dump");
        assert!(answer.starts_with("HTTP/1.1 404"), "{port}: {answer}");
    }

    // Its own sockets, dialled from beside it: closed and counted, one by one.
    let mapped = IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped());
    let loopbacks = tcp4
        .iter()
        .flat_map(|port| [SocketAddr::new(Ipv4Addr::LOCALHOST.into(), *port), SocketAddr::new(mapped, *port)])
        .chain(tcp6.iter().map(|port| SocketAddr::new(Ipv6Addr::LOCALHOST.into(), *port)));
    let mut counted = lab.self_connections("v1");
    for own in loopbacks {
        let closed = inside(&v1, move || {
            let mut stream = TcpStream::connect(own).expect("it listens");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_))
        });
        assert!(closed, "{own} answered");
        counted += 1;
        eventually("the connection is counted", || lab.self_connections("v1") == counted);
    }
    let [own4, own6] = addresses("v1").map(|ip| ip.parse::<IpAddr>().expect("an address"));
    for own in tcp4.iter().map(|p| SocketAddr::new(own4, *p)).chain(tcp6.iter().map(|p| SocketAddr::new(own6, *p))) {
        assert!(inside(&v1, move || TcpStream::connect(own).is_err()), "{own} is not loopback");
    }
    let queries = udp4
        .iter()
        .map(|p| (Ipv4Addr::LOCALHOST.into(), *p))
        .chain(udp6.iter().map(|p| (Ipv6Addr::LOCALHOST.into(), *p)));
    for to in queries.collect::<Vec<(IpAddr, u16)>>() {
        inside(&v1, move || {
            let any: IpAddr = if to.0.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            let socket = UdpSocket::bind((any, 0)).expect("a socket");
            // A question for `x.`, of type A.
            socket.send_to(b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01x\0\0\x01\0\x01", to).expect("sent");
        });
        counted += 1;
        eventually("the query is counted, once", || lab.self_connections("v1") == counted);
    }
    // From the mesh, by tunnel, at its own ports.
    for port in [STATS, READINESS, 15008, 15006, 15001] {
        assert!(lab.call_port("a1", &v4("v1"), port).is_err(), "{port} by HBONE");
        counted += 1;
        eventually("the tunnel is counted", || lab.self_connections("v1") == counted);
    }
    assert_eq!(lab.call("a1", &v4("v1")), answer(&v4("a1")), "the application is served as before");
}

#[test]
fn with_capture_off_the_workload_is_reached_by_hbone_and_nothing_else_changes() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up('o');
    lab.start_node();
    lab.start_uncaptured("v1");
    let [v1, v1_v6] = addresses("v1");

    // Inbound by HBONE, under its identity and policy; the application sees its own address as the peer.
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("a1", &v1), answer(&v1));
    assert_eq!(lab.call("a1", &v1_v6), answer(&v1_v6));
    let (ports, marker) = wire.end();
    assert!(!marker && ports.iter().all(|p| *p == 15008), "{ports:?}");
    lab.configure("v1", &allow_only("v2"));
    eventually("v1 denies a1", || lab.call("a1", &v1).is_err());
    // Everything else is as without a ztunnel.
    assert!(lab.call_from_outside(&v1), "plaintext does not come to ztunnel, so policy does not see it");
    let rules = run(&format!("ip -n {0}-v1 rule; ip -n {0}-v1 -6 rule", lab.name));
    assert!(!rules.contains("15000") && !lab.pins.join("v1").exists(), "{rules}");
    lab.configure("v1", "");
    eventually("v1 lets a1 in", || lab.call("a1", &v1).is_ok());

    // Its own ports, dialled from beside it and by tunnel.
    let mut counted = lab.self_connections("v1");
    for port in [15001, 15006] {
        let closed = inside(&lab.netns("v1"), move || {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_))
        });
        assert!(closed, "{port} answered");
        counted += 1;
        eventually("the connection is counted", || lab.self_connections("v1") == counted);
        assert!(lab.call_port("a1", &v1, port).is_err(), "{port} by HBONE");
        counted += 1;
        eventually("the tunnel is counted", || lab.self_connections("v1") == counted);
    }
    lab.end_ztunnel("v1", "TERM");
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")), "nothing stays behind");
}

#[test]
fn a_dead_dedicated_ztunnel_fails_as_set_and_its_capture_ends_when_released() {
    if !possible() {
        return;
    }
    let mut lab = Lab::up('r');
    lab.start_node();
    lab.start_dedicated("v1", &[("EXCLUDED_INBOUND_PORTS", "2222")]);
    lab.start_dedicated("v2", &[("CAPTURE_FAILURE_MODE", "open")]);
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));

    // Dead: closed at once, or direct where that was asked for; the others notice nothing.
    lab.end_ztunnel("v1", "KILL");
    lab.end_ztunnel("v2", "KILL");
    let wire = Wire::watch(&lab.netns("br"));
    let started = Instant::now();
    assert!(lab.call("v1", &v4("a1")).is_err());
    assert!(lab.call("a1", &v4("v1")).is_err());
    assert!(started.elapsed() < Duration::from_secs(5), "refused, not timed out");
    assert!(!wire.end().1, "in clear text");
    assert_eq!(lab.call("v2", &v4("a1")), answer(&v4("v2")), "fails open");
    let owner = inside(&lab.netns("v1"), || TcpListener::bind(("0.0.0.0", 2222)).expect("a port for the owner"));
    let way_in = SocketAddr::new(v4("v1").parse().expect("an address"), 2222);
    assert!(
        inside(&lab.netns("br"), move || TcpStream::connect_timeout(&way_in, PATIENCE).is_ok()),
        "the owner's way in"
    );
    drop(owner);

    // The next one takes over what the dead one left.
    lab.start_dedicated("v1", &[]);
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));
    assert!(lab.log("v1").contains("reach=Full"), "what a predecessor captured stays captured");
    assert_eq!(lab.call("a1", &v4("v1")), answer(&v4("a1")));

    // Pins that are another's are not touched.
    let foreign = lab.dedicated("v2", "").env("BPFFS_DIR", lab.pins.join("v1")).output().expect("ztunnel runs");
    let said = String::from_utf8_lossy(&foreign.stderr);
    assert!(!foreign.status.success() && said.contains("BPFFS_DIR"), "{said}");
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));

    // Released: not while it runs; then all is as if it had never been, here and nowhere else.
    let refused = lab.release("v1");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("stop it first"), "{said}");
    lab.end_ztunnel("v1", "TERM");
    assert!(!lab.admin("v1").exists(), "the socket is gone");
    assert!(lab.call("v1", &v4("a1")).is_err(), "stopped is not released");
    let released = lab.release("v1");
    assert!(released.status.success(), "{}", String::from_utf8_lossy(&released.stderr));
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));
    assert!(wire.end().1, "direct again");
    assert!(lab.release("v1").status.success(), "released twice");
    lab.assert_clean("v1");
    assert_eq!(lab.call("a1", &v4("a1")), answer(&v4("a1")));
    lab.start_dedicated("v2", &[]);
    assert_eq!(lab.call("v2", &v4("a1")), answer(&v4("v2")), "the node's capture is untouched");
}

#[test]
fn an_orderly_end_releases_where_that_is_asked_for() {
    const RELEASING: &[(&str, &str)] = &[("RELEASE_ON_EXIT", "true")];
    if !possible() {
        return;
    }
    let mut lab = Lab::up('e');
    lab.start_node();
    lab.start_dedicated("v1", RELEASING);
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));

    // A crash is no orderly end.
    lab.end_ztunnel("v1", "KILL");
    assert!(lab.call("v1", &v4("a1")).is_err());
    lab.start_dedicated("v1", RELEASING);
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));

    lab.end_ztunnel("v1", "TERM");
    assert!(lab.log("v1").contains("released"), "{}", lab.log("v1"));
    lab.assert_clean("v1");
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));
    assert!(wire.end().1, "direct");

    // It can come back, and its setting can: then an orderly end leaves the workload closed.
    lab.start_dedicated("v1", &[]);
    assert_eq!(lab.call("v1", &v4("a1")), answer(&v4("v1")));
    lab.end_ztunnel("v1", "TERM");
    assert!(lab.call("v1", &v4("a1")).is_err());
}
