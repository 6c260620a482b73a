//! The `redirect` back end: fixed ports in the pod's namespace, to which the rules of Istio's CNI agent bring connections.
//!
//! The rules are the agent's; what we keep of the bargain is that every socket of ours carries [`MARK_BYPASS`], by
//! which they tell our packets from the application's. Ports are shared (`SO_REUSEPORT`): a successor opens its
//! own before we close ours, and what is new goes to it from that moment, so that nothing waits at a listener that is
//! about to close.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

use ebpf_loader::abi::MARK_BYPASS;
use mesh::model::HBONE_PORT;
use mesh::net::canonical;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::TcpStream;

use crate::dns::serve::{Answers, DnsSocket};
use crate::node::netns::Netns;
use crate::worker::Role;

/// What leaves the pod.
pub const OUTBOUND_PORT: u16 = 15001;
/// Plaintext to the pod.
pub const PASSTHROUGH_PORT: u16 = 15006;
/// DNS, on loopback only.
pub const DNS_PORT: u16 = 15053;

/// Pending handshakes per listener; bounded again by net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// A pod's open ports.
pub struct Listeners {
    /// One set for each worker.
    pub shares: Vec<Vec<(Role, std::net::TcpListener)>>,
    pub dns: Vec<DnsSocket>,
}

/// Opens a pod's ports: three for each worker, and those for DNS.
///
/// # Errors
/// Those of the socket calls; a port that something else in the pod has is the likely one.
pub fn open(netns: &Netns, workers: usize, ipv6: bool, dns: bool) -> io::Result<Listeners> {
    let workers = workers.max(1);
    netns.enter(|| {
        let older = Sockets::list()?;
        let mut shares: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        for (role, port) in
            [(Role::Hbone, HBONE_PORT), (Role::Outbound, OUTBOUND_PORT), (Role::Passthrough, PASSTHROUGH_PORT)]
        {
            for share in &mut shares {
                share.push((role, everywhere(port, ipv6)?));
            }
            take_over(&shares, older.tcp(port));
        }
        let mut sockets = Vec::new();
        for ip in loopbacks(ipv6).filter(|_| dns) {
            let at = SocketAddr::new(ip, DNS_PORT);
            let Some(queries) = unless_absent(at, udp(at))? else { continue };
            prefer_newest(&queries, older.udp(at), 1);
            sockets.push(DnsSocket { queries, answers: Answers::Same });
            for share in &mut shares {
                share.push((Role::Dns, tcp(at).map_err(|error| naming(at, &error))?));
            }
            take_over(&shares, older.tcp_at(at));
        }
        Ok(Listeners { shares, dns: sockets })
    })
}

/// What was pushed last takes over from `older` sockets on the same port.
fn take_over(shares: &[Vec<(Role, std::net::TcpListener)>], older: usize) {
    if let Some((_, listener)) = shares.last().and_then(|share| share.last()) {
        prefer_newest(listener, older, shares.len());
    }
}

/// Spreads what is new over the `newest` members of the group that shares a port, past the `older` ones. Members stand
/// in the order they came; when the older ones have closed, the numbers mean nobody and the kernel spreads as it always
/// does.
fn prefer_newest(member: &impl AsFd, older: usize, newest: usize) {
    let (Ok(older), Ok(newest)) = (u32::try_from(older), u32::try_from(newest)) else { return };
    if older == 0 {
        return;
    }
    let step = |code: u32, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap_or_default(), jt: 0, jf: 0, k };
    let random = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM).cast_unsigned();
    let mut program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, random),
        step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, newest),
        step(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K, older),
        step(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    if let Err(errno) = setsockopt(member, sockopt::AttachReusePortCbpf, &filter) {
        tracing::debug!(%errno, "a predecessor keeps its share of new connections until it ends");
    }
}

/// What conntrack says that was dialled; `None` when that is the listener itself, or nothing.
#[must_use]
pub fn original_destination(stream: &TcpStream, here: SocketAddr) -> Option<SocketAddr> {
    let socket = SockRef::from(stream);
    let found = match here.ip() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    let dialled = found.ok().and_then(|address| address.as_socket()).map(canonical)?;
    (dialled != here).then_some(dialled)
}

/// Ports of the pod that lead to us and that nobody has any business to dial. HBONE's is not among them.
#[must_use]
pub const fn is_own_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | PASSTHROUGH_PORT)
}

/// How many sockets listen on the HBONE port in this namespace: more than ours means that somebody else serves the pod
/// as well, and only a ztunnel can (the port is shared among processes of one user).
///
/// # Errors
/// Those of entering the namespace and of reading what the kernel lists.
pub fn serving(netns: &Netns) -> io::Result<usize> {
    netns.enter(|| Ok(Sockets::list()?.tcp(HBONE_PORT)))
}

/// What the kernel lists of the namespace the thread is in.
struct Sockets {
    tcp: [String; 2],
    udp: [String; 2],
}

/// States in which a socket takes what is new, as `/proc/net` writes them: TCP's LISTEN, and UDP's without a peer.
const LISTEN: &str = "0A";
const UNCONNECTED: &str = "07";

impl Sockets {
    fn list() -> io::Result<Self> {
        let read = |table: &str| match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read,
        };
        Ok(Self { tcp: [read("tcp")?, read("tcp6")?], udp: [read("udp")?, read("udp6")?] })
    }

    fn tcp(&self, port: u16) -> usize {
        self.tcp.iter().map(|table| count(table, port, LISTEN)).sum()
    }

    fn tcp_at(&self, at: SocketAddr) -> usize {
        count(&self.tcp[usize::from(at.is_ipv6())], at.port(), LISTEN)
    }

    fn udp(&self, at: SocketAddr) -> usize {
        count(&self.udp[usize::from(at.is_ipv6())], at.port(), UNCONNECTED)
    }
}

/// Lines are: slot, local address, remote address, state, ...
fn count(table: &str, port: u16, state: &str) -> usize {
    let port = format!(":{port:04X}");
    let is_meant = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some(state)
    };
    table.lines().filter(is_meant).count()
}

/// One listener for both families, where the kernel has both.
fn everywhere(port: u16, ipv6: bool) -> io::Result<std::net::TcpListener> {
    if ipv6 {
        let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
        if let Some(listener) = unless_absent(at, tcp(at))? {
            return Ok(listener);
        }
    }
    let at = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    tcp(at).map_err(|error| naming(at, &error))
}

fn loopbacks(ipv6: bool) -> impl Iterator<Item = IpAddr> {
    [Ipv4Addr::LOCALHOST.into()].into_iter().chain(ipv6.then_some(Ipv6Addr::LOCALHOST.into()))
}

/// `None` where the namespace has no such family; other errors name the port.
fn unless_absent<T>(at: SocketAddr, made: io::Result<T>) -> io::Result<Option<T>> {
    match made {
        Ok(made) => Ok(Some(made)),
        Err(error)
            if at.is_ipv6() && matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) =>
        {
            Ok(None)
        }
        Err(error) => Err(naming(at, &error)),
    }
}

fn naming(at: SocketAddr, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{at}: {error}"))
}

fn tcp(at: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = bound(at, Type::STREAM, Protocol::TCP)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn udp(at: SocketAddr) -> io::Result<std::net::UdpSocket> {
    bound(at, Type::DGRAM, Protocol::UDP).map(Into::into)
}

fn bound(at: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(at), kind.nonblocking(), Some(protocol))?;
    if at.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_port(true)?;
    socket.set_mark(MARK_BYPASS)?;
    socket.bind(&at.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_counted_by_port_and_state() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:3AA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100007F:3AA0 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1
   3: 00000000000000000000000000000000:3AA0 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 4 1
";
        assert_eq!(count(table, HBONE_PORT, LISTEN), 2);
        assert_eq!(count(table, 15_006, LISTEN), 0);
    }

    #[test]
    fn a_connection_that_no_rule_brought_has_no_original_destination() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let here = listener.local_addr().unwrap();
            let client = TcpStream::connect(here).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            assert_eq!(original_destination(&accepted, here), None);
            drop(client);
        });
    }
}
