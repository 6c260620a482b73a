//! The one place that enters a pod's network namespace: sockets, listeners, sysctls and netlink made there.
//!
//! A thread goes in, makes one thing, and comes back before anything else can run on it: no `.await` happens inside.
//! A thread that could not come back would make every later socket in the wrong place, so that ends the process.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use ebpf_loader::abi::{MARK_BYPASS, MARK_LEG};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::stat::fstat;
use rand::Rng;
use socket2::{Domain, Protocol, Socket, Type};

use crate::dns::serve::{Answers, DnsSocket};

/// Pending handshakes per listener; bounded again by net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// An open network namespace; holding it keeps the namespace alive.
#[derive(Debug)]
pub struct Netns {
    file: OwnedFd,
    /// Inode, the name by which two open files are known to be the same namespace.
    inode: u64,
    /// The way back; `None` for the namespace this process is in, which is never left.
    home: Option<File>,
}

/// What a listener is bound to besides the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    #[must_use]
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
    const fn domain(self) -> Domain {
        match self {
            Self::V4 => Domain::IPV4,
            Self::V6 => Domain::IPV6,
        }
    }

    #[must_use]
    pub const fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Self::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
        }
    }
}

impl Netns {
    /// Takes an open `/proc/PID/ns/net` whose inode the caller has verified.
    ///
    /// # Errors
    /// When this process' own namespace cannot be opened.
    pub fn new(file: OwnedFd, inode: u64) -> io::Result<Self> {
        // The thread's, not the process': they are the same here, as threads always come back.
        Ok(Self { file, inode, home: Some(File::open("/proc/thread-self/ns/net")?) })
    }

    /// The namespace this process is in. Working in it takes no right to enter one.
    ///
    /// # Errors
    /// When `/proc` does not show it.
    pub fn own() -> io::Result<Self> {
        let file = File::open("/proc/self/ns/net")?;
        let inode = fstat(&file)?.st_ino;
        Ok(Self { file: file.into(), inode, home: None })
    }

    /// The same namespace, held a second time.
    ///
    /// # Errors
    /// When there are too many open files.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            inode: self.inode,
            home: self.home.as_ref().map(File::try_clone).transpose()?,
        })
    }

    #[must_use]
    pub const fn inode(&self) -> u64 {
        self.inode
    }

    #[must_use]
    pub fn file(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Is it the one this process lives in?
    ///
    /// # Errors
    /// Those of `fstat`.
    pub fn is_own(&self) -> io::Result<bool> {
        let Some(home) = &self.home else { return Ok(true) };
        Ok(fstat(home)?.st_ino == self.inode)
    }

    /// Runs `make` with the thread inside the namespace. It must not block for long: a data path thread may run it.
    ///
    /// # Errors
    /// Those of `setns` (CAP_SYS_ADMIN) and of `make`.
    pub fn enter<T>(&self, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let Some(home) = &self.home else { return make() };
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let made = make();
        if let Err(errno) = setns(home, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%errno, "thread is stuck in a pod's network namespace; ending the process");
            std::process::abort();
        }
        made
    }

    /// A group of listeners on one loopback port, one per worker, that can answer for any address.
    ///
    /// Port 0 never clashes with the application, and loopback is reachable from outside only by the steering. Those of the
    /// pod's own calls take only what comes over lo.
    ///
    /// # Errors
    /// Those of the socket calls; CAP_NET_ADMIN or CAP_NET_RAW is needed for a transparent socket.
    pub fn listeners(&self, family: Family, count: usize, whose: Callers) -> io::Result<Vec<std::net::TcpListener>> {
        self.enter(|| {
            let mut address = SocketAddr::new(family.loopback(), 0);
            (0..count.max(1))
                .map(|_| {
                    let socket = tcp(family)?;
                    transparent(&socket, family)?;
                    if whose == Callers::Pod {
                        // Device and mark lead the answers back over lo. Left to the `local` table, whose route to the
                        // pod's address names another device, the kernel would make two routes for each connection and
                        // keep neither.
                        socket.bind_device(Some(b"lo"))?;
                        socket.set_mark(MARK_LEG)?;
                    }
                    // Balances new connections over the workers; the kernel applies it after the steering as well.
                    socket.set_reuse_port(true)?;
                    // Before it listens: what waits to be accepted has its options already.
                    mesh::net::tune(&socket)?;
                    socket.bind(&address.into())?;
                    socket.listen(BACKLOG)?;
                    let listener = std::net::TcpListener::from(socket);
                    address = listener.local_addr()?;
                    Ok(listener)
                })
                .collect()
        })
    }

    /// A socket for a connection of ztunnel's own from the pod: never captured, `source` as its address.
    ///
    /// # Errors
    /// Those of the socket calls.
    pub fn outgoing(&self, source: IpAddr) -> io::Result<Socket> {
        let socket = self.enter(|| tcp(Family::of(source)))?;
        socket.set_mark(MARK_BYPASS)?;
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        Ok(socket)
    }

    /// As [`Self::outgoing`], for datagrams; the kernel picks the port.
    ///
    /// # Errors
    /// Those of the socket calls.
    pub fn outgoing_udp(&self, source: IpAddr) -> io::Result<Socket> {
        let socket = self.enter(|| udp(Family::of(source)))?;
        // In place of the mark that every UDP socket of a pod gets where DNS is captured: this would ask itself.
        socket.set_mark(MARK_BYPASS)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        Ok(socket)
    }

    /// The sockets by which a pod's DNS is served: one that learns whom a query was meant for, and one that can answer
    /// in that server's name.
    ///
    /// # Errors
    /// Those of the socket calls; CAP_NET_RAW is needed.
    pub fn dns(&self, family: Family) -> io::Result<DnsSocket> {
        self.enter(|| {
            let queries = udp(family)?;
            match family {
                Family::V4 => setsockopt(&queries, sockopt::Ipv4OrigDstAddr, &true)?,
                Family::V6 => setsockopt(&queries, sockopt::Ipv6OrigDstAddr, &true)?,
            }
            queries.bind(&SocketAddr::new(family.loopback(), 0).into())?;
            // Of this protocol the sender writes the IP header.
            let answers = Socket::new(family.domain(), Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
            answers.set_nonblocking(true)?;
            Ok(DnsSocket { queries: queries.into(), answers: Answers::InTheServersName(answers) })
        })
    }

    /// A socket for the last leg to the application, which shall see `client` as the peer. `port` is the source port, see
    /// [`leg_port`]; 0 leaves it to the kernel.
    ///
    /// Mark and device lead the packets (and, by `tcp_fwmark_accept`, the answers) over lo, where the steering lets
    /// them pass to the application's own listener.
    ///
    /// # Errors
    /// Those of the socket calls.
    pub fn app_leg(&self, client: IpAddr, port: u16) -> io::Result<Socket> {
        let family = Family::of(client);
        let socket = self.enter(|| {
            let socket = tcp(family)?;
            // The device is looked up by name in the namespace of the socket; inside is where the two agree anyway.
            socket.bind_device(Some(b"lo"))?;
            Ok(socket)
        })?;
        transparent(&socket, family)?;
        socket.set_mark(MARK_LEG)?;
        bind_leg(&socket, SocketAddr::new(client, port))?;
        Ok(socket)
    }

    /// As [`Self::outgoing`], from an address that need not be the pod's: how the application is called in its
    /// client's name where rules of others bring the answers back.
    ///
    /// # Errors
    /// Those of the socket calls; CAP_NET_ADMIN or CAP_NET_RAW is needed for a transparent socket.
    pub fn outgoing_as(&self, client: IpAddr, port: u16) -> io::Result<Socket> {
        let family = Family::of(client);
        let socket = self.enter(|| tcp(family))?;
        transparent(&socket, family)?;
        socket.set_mark(MARK_BYPASS)?;
        bind_leg(&socket, SocketAddr::new(client, port))?;
        Ok(socket)
    }

    /// Is any of `addresses` configured in this namespace?
    ///
    /// # Errors
    /// Those of `setns`; an address that is not here is no error.
    pub fn holds_any(&self, addresses: &[IpAddr]) -> io::Result<bool> {
        self.enter(|| {
            Ok(addresses.iter().any(|ip| {
                // Binding is the cheapest question: it fails for addresses that are not local.
                tcp(Family::of(*ip)).and_then(|s| s.bind(&SocketAddr::new(*ip, 0).into())).is_ok()
            }))
        })
    }
}

/// Who calls at a group of listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Callers {
    /// The pod's own processes, whose captured connections all come over lo.
    Pod,
    /// Whoever reaches the pod over the network.
    Network,
}

/// A source port for a last leg that its client is not likely to use itself.
///
/// The application's end of a leg has the same addresses and, by chance, the same ports as a connection that the client
/// makes in plain text; that one then would not get to us but to the application's socket, which answers it with
/// nothing, or with a reset. Clients take theirs from 32768 on, unless somebody has told them otherwise; and what
/// applications listen at is rarely above 20000: a leg's port is taken for those that do not share addresses.
#[must_use]
pub fn leg_port(rng: &mut impl Rng) -> u16 {
    rng.random_range(20_000..32_768)
}

fn bind_leg(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    if to.port() == 0 {
        setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
    } else {
        // Many legs may have a port, as long as they lead to different places: `connect` sees to that.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&to.into())
}

fn tcp(family: Family) -> io::Result<Socket> {
    Socket::new(family.domain(), Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

fn udp(family: Family) -> io::Result<Socket> {
    Socket::new(family.domain(), Type::DGRAM.nonblocking(), Some(Protocol::UDP))
}

fn transparent(socket: &Socket, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => socket.set_ip_transparent_v4(true),
        Family::V6 => socket.set_ip_transparent_v6(true),
    }
}
