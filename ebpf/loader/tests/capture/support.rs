//! A pod, a peer on the other end of its cable, and a stand-in for ztunnel.

use std::{
    any::type_name_of_val,
    env, fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::{self, Command},
    thread,
    time::Duration,
};

use ebpf_loader::{
    Capture, LoadError, NetnsCookie, Phase, PodCapture, Slot,
    abi::{MARK_CAPTURE, MARK_MASK, ROUTE_TABLE, RULE_PREF_DNS, RULE_PREF_TCP, VERSION},
    ensure_bpffs, has_programs,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

pub const POD4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 55, 0, 2));
pub const POD6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd55, 0, 0, 0, 0, 0, 0, 2));
pub const PEER4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 55, 0, 1));
pub const PEER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd55, 0, 0, 0, 0, 0, 0, 1));
/// Nobody has these; only capture makes them answer.
pub const SERVICE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));
pub const SERVICE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 1));

/// Long enough for anything that works, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(5);

const CGROUP: &str = "EBPF_LOADER_TEST_CGROUP";
const BPFFS: &str = "EBPF_LOADER_TEST_BPFFS";
const CGROUP_PREFIX: &str = "ebpf-loader-test-";
/// Exit status of a child that found it has not the rights.
const SKIP: i32 = 77;
const CHILD_SECONDS: u32 = 60;

/// Runs a test body in a process of its own.
pub fn isolated<F: FnOnce(&Lab)>(body: F) {
    if let (Some(cgroup), Some(bpffs)) = (env::var_os(CGROUP), env::var_os(BPFFS)) {
        inside(Path::new(&cgroup), Path::new(&bpffs), body);
        return;
    }
    // `capture::outbound::name::{{closure}}`; libtest knows it without the crate.
    let name = type_name_of_val(&body).trim_end_matches("::{{closure}}");
    let name = name.split_once("::").expect("a path").1;
    let root = match cgroup2_root() {
        Ok(root) => root,
        Err(why) => return skip(name, &why),
    };
    reap(&root);
    let cgroup = Cgroup(root.join(format!("{CGROUP_PREFIX}{}-{}", process::id(), name.replace("::", "-"))));
    if let Err(error) = fs::create_dir(&cgroup.0) {
        return skip(name, &format!("creating {}: {error}", cgroup.0.display()));
    }
    let bpffs = tempfile::tempdir().expect("a temporary directory");
    let output = Command::new(env::current_exe().expect("this program"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CGROUP, &cgroup.0)
        .env(BPFFS, bpffs.path())
        .output()
        .expect("this program starts");
    if output.status.code() == Some(SKIP) {
        return skip(name, String::from_utf8_lossy(&output.stderr).trim());
    }
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    assert!(stdout.contains("1 passed"), "the child ran no test:\n{stdout}\n{stderr}");
}

fn skip(name: &str, why: &str) {
    assert!(env::var("LAB").as_deref() != Ok("required"), "LAB=required, but {name} cannot run: {why}");
    // Not by `eprintln`: libtest keeps what a passing test prints to itself.
    let _ = writeln!(io::stderr(), "SKIPPED {name}: {why}");
}

fn inside<F: FnOnce(&Lab)>(cgroup: &Path, bpffs: &Path, body: F) {
    nix::unistd::alarm::set(CHILD_SECONDS);
    fs::write(cgroup.join("cgroup.procs"), "0").expect("the test's cgroup takes it");
    let lab = match Lab::new(cgroup, bpffs) {
        Ok(lab) => lab,
        Err(why) => {
            eprintln!("{why}");
            process::exit(SKIP);
        }
    };
    body(&lab);
}

struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}

fn cgroup2_root() -> Result<PathBuf, String> {
    if !has_programs() {
        return Err("no eBPF programs in this build; run `cargo xtask bpf`".into());
    }
    if !nix::unistd::geteuid().is_root() {
        return Err("not root".into());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let cgroup2 = fields.find(|fields| fields.get(2) == Some(&"cgroup2")).ok_or("no cgroup2 is mounted")?;
    Ok(PathBuf::from(cgroup2[1]))
}

/// Removes what a killed run left.
fn reap(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(CGROUP_PREFIX)?.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// One pod and its peer, joined by a cable, and an opened [`Capture`] on hooks of their own.
pub struct Lab {
    pub bpffs: PathBuf,
    pub cgroup: PathBuf,
    pub pod: Netns,
    pub peer: Netns,
}

impl Lab {
    /// The error is a reason to skip.
    fn new(cgroup: &Path, bpffs: &Path) -> Result<Lab, String> {
        unshare(CloneFlags::CLONE_NEWNS).map_err(|error| format!("unshare: {error}"))?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(|error| format!("making mounts private: {error}"))?;
        ensure_bpffs(bpffs).map_err(|error| error.to_string())?;
        let lab = Lab {
            bpffs: bpffs.join("ztunnel"),
            cgroup: cgroup.to_owned(),
            pod: Netns::new().map_err(|error| format!("making a netns: {error}"))?,
            peer: Netns::new().map_err(|error| format!("making a netns: {error}"))?,
        };
        if let Err(error @ (LoadError::MissingCapabilities { .. } | LoadError::NotPermitted { .. })) =
            Capture::open(&lab.bpffs, &lab.cgroup)
        {
            return Err(error.to_string());
        }
        let peer = lab.peer.path();
        lab.pod.ip(&format!("link add eth0 type veth peer name eth0 netns {peer}"));
        for (netns, v4, v6) in [(&lab.pod, POD4, POD6), (&lab.peer, PEER4, PEER6)] {
            netns.ip("link set lo up");
            netns.ip("link set eth0 up");
            netns.ip(&format!("addr add {v4}/24 dev eth0"));
            netns.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
        }
        lab.pod.ip(&format!("route add default via {PEER4}"));
        lab.pod.ip(&format!("-6 route add default via {PEER6}"));
        lab.route(&lab.pod);
        Ok(lab)
    }

    /// What ztunnel does to a pod's netns by netlink.
    fn route(&self, pod: &Netns) {
        for (family, source) in [("-4", POD4), ("-6", POD6)] {
            let mark = format!("{MARK_CAPTURE:#x}/{MARK_MASK:#x}");
            // Numbers: a bare machine has no /etc/protocols to look names up in.
            pod.ip(&format!("{family} rule add pref {RULE_PREF_TCP} fwmark {mark} ipproto 6 lookup {ROUTE_TABLE}"));
            pod.ip(&format!(
                "{family} rule add pref {RULE_PREF_DNS} fwmark {MARK_CAPTURE:#x} ipproto 17 dport 53 lookup {ROUTE_TABLE}"
            ));
            pod.ip(&format!("{family} route add local default dev lo src {source} table {ROUTE_TABLE}"));
        }
        pod.run(|| fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1").expect("the sysctl"));
    }

    /// Where this build pins.
    pub fn layout(&self) -> PathBuf {
        self.bpffs.join(format!("v{VERSION}"))
    }

    pub fn open(&self) -> Capture {
        Capture::open(&self.bpffs, &self.cgroup).expect("capture opens")
    }

    pub fn pod_capture(&self) -> PodCapture {
        PodCapture { addresses: vec![POD4, POD6], ..PodCapture::default() }
    }

    /// The whole sequence: listeners, `sk_lookup`, enrolment.
    pub fn enrol(&self, capture: &Capture, options: &PodCapture) -> (NetnsCookie, Proxy) {
        let cookie = capture.attach_netns(self.pod.fd.as_fd()).expect("sk_lookup attaches");
        let proxy = self.proxy(capture, cookie);
        capture.enrol(cookie, options, Phase::Captured).expect("the pod is enrolled");
        (cookie, proxy)
    }

    pub fn proxy(&self, capture: &Capture, cookie: NetnsCookie) -> Proxy {
        let listeners: Vec<_> = [Slot::Out4, Slot::Out6, Slot::In4, Slot::In6, Slot::Hbone4, Slot::Hbone6]
            .into_iter()
            .map(|slot| (slot, self.pod.run(|| transparent_listener(slot))))
            .collect();
        for (slot, listener) in &listeners {
            capture.set_listener(cookie, *slot, listener.as_fd()).expect("the slot takes the listener");
        }
        Proxy { listeners }
    }
}

/// A network namespace without a name: gone with its last descriptor, thread and socket.
pub struct Netns {
    pub fd: OwnedFd,
}

impl Netns {
    pub fn new() -> io::Result<Netns> {
        thread::scope(|scope| {
            let made = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                Ok(Netns { fd: fs::File::open("/proc/thread-self/ns/net")?.into() })
            });
            made.join().expect("no panic while making a netns")
        })
    }

    /// Runs something on a thread inside.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET).expect("entering the netns");
                catch_unwind(AssertUnwindSafe(inside))
            });
            match thread.join().expect("panics are caught") {
                Ok(value) => value,
                Err(panic) => resume_unwind(panic),
            }
        })
    }

    pub fn ip(&self, arguments: &str) {
        let output = self.run(|| Command::new("ip").args(arguments.split(' ')).output().expect("`ip` is installed"));
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Where another process finds it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.fd.as_raw_fd())
    }

    /// A plain listener of an application.
    pub fn listen(&self, address: IpAddr, port: u16) -> TcpListener {
        self.run(|| {
            let listener = TcpListener::bind((address, port)).expect("the address is free");
            set_patience(listener.as_fd());
            listener
        })
    }

    /// A plain client.
    pub fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.connect_with(to, |_| Ok(()))
    }

    /// A client that does something to its socket first.
    pub fn connect_with(
        &self,
        to: SocketAddr,
        prepare: impl FnOnce(&Socket) -> io::Result<()> + Send,
    ) -> io::Result<TcpStream> {
        self.run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            set_patience(socket.as_fd());
            prepare(&socket)?;
            socket.connect_timeout(&SockAddr::from(to), PATIENCE)?;
            Ok(socket.into())
        })
    }
}

/// ztunnel's listeners, as far as capture is concerned.
pub struct Proxy {
    listeners: Vec<(Slot, TcpListener)>,
}

impl Proxy {
    /// The next connection of a slot: the stream, and where its client wanted to go.
    pub fn accept(&self, slot: Slot) -> (TcpStream, SocketAddr) {
        let (_, listener) = self.listeners.iter().find(|(candidate, _)| *candidate == slot).expect("an open slot");
        let (stream, _) = listener.accept().unwrap_or_else(|error| panic!("nothing arrived in {slot:?}: {error}"));
        set_patience(stream.as_fd());
        let original = stream.local_addr().expect("a bound socket");
        (stream, original)
    }

    /// Takes a waiting connection and ends it; false when there is none.
    pub fn try_accept(&self, slot: Slot) -> bool {
        let (_, listener) = self.listeners.iter().find(|(candidate, _)| *candidate == slot).expect("an open slot");
        listener.set_nonblocking(true).expect("a socket option");
        let taken = listener.accept().is_ok();
        listener.set_nonblocking(false).expect("a socket option");
        taken
    }

    /// No connection is waiting anywhere.
    pub fn assert_idle(&self) {
        for (slot, listener) in &self.listeners {
            listener.set_nonblocking(true).expect("a socket option");
            let waiting = listener.accept();
            assert!(waiting.is_err(), "{slot:?} got {waiting:?}");
            listener.set_nonblocking(false).expect("a socket option");
        }
    }
}

fn transparent_listener(slot: Slot) -> TcpListener {
    let (domain, address): (_, IpAddr) = match slot {
        Slot::Out4 | Slot::In4 | Slot::Hbone4 | Slot::Dns4 => (Domain::IPV4, Ipv4Addr::LOCALHOST.into()),
        Slot::Out6 | Slot::In6 | Slot::Hbone6 | Slot::Dns6 => (Domain::IPV6, Ipv6Addr::LOCALHOST.into()),
    };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    set_transparent(&socket, address);
    socket.bind(&SockAddr::from(SocketAddr::new(address, 0))).expect("a loopback port");
    socket.listen(128).expect("a listener");
    set_patience(socket.as_fd());
    socket.into()
}

/// May use addresses that are not the host's.
pub fn set_transparent(socket: &Socket, family: IpAddr) {
    match family {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true).expect("IP_TRANSPARENT"),
        IpAddr::V6(_) => set_option(socket.as_fd(), libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1),
    }
}

pub fn set_option(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, value: libc::c_int) {
    // SAFETY: the value is as long as said and lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "socket option {level}/{option}: {}", io::Error::last_os_error());
}

/// As `connect(AF_UNSPEC)`.
pub fn disconnect(socket: &Socket) {
    let unspecified = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the address is as long as said and lives through the call.
    let result = unsafe {
        libc::connect(
            socket.as_fd().as_raw_fd(),
            &raw const unspecified,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// No accept, read or write blocks for longer.
pub fn set_patience(socket: BorrowedFd<'_>) {
    let socket = socket2::SockRef::from(&socket);
    socket.set_read_timeout(Some(PATIENCE)).expect("SO_RCVTIMEO");
    socket.set_write_timeout(Some(PATIENCE)).expect("SO_SNDTIMEO");
}

/// Sends something each way.
pub fn assert_joined(one: &mut TcpStream, other: &mut TcpStream) {
    send(one, other, b"there");
    send(other, one, b"again");
}

fn send(from: &mut TcpStream, to: &mut TcpStream, text: &[u8; 5]) {
    from.write_all(text).expect("writing");
    let mut got = [0; 5];
    to.read_exact(&mut got).expect("reading");
    assert_eq!(&got, text);
}

pub fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}
