//! Address newtypes, socket options, and byte streams as the copy loop wants them. Knows nothing of TLS or HTTP.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};

mod read_ahead;
mod stream;

pub use read_ahead::ReadAhead;
pub use stream::{ByteStream, Chunks, Io};

/// Where the application dialled, before any resolution.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalDst(pub SocketAddr);

/// Who is at the other end of an accepted socket.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PeerAddr(pub SocketAddr);

/// Idle time before the first keepalive probe, and between probes.
const KEEPALIVE: Duration = Duration::from_secs(180);
const KEEPALIVE_PROBES: u32 = 9;

/// The address with an IPv4-mapped IPv6 address written as IPv4, which is how the mesh model spells addresses.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(canonical_ip(addr.ip()), addr.port())
}

/// As [`canonical`], for an address without port.
pub fn canonical_ip(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

/// Sets what every proxied socket wants: no Nagle delay, and keepalive that notices a vanished peer. What a listener
/// accepts has from the beginning what the listener has, which spares five system calls per connection.
///
/// # Errors
/// Those of `setsockopt`.
pub fn tune(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Whether an error says no more than that the other side went away.
pub fn is_hang_up(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof)
}

/// Whether an error says that this machine or process has nothing left for another socket.
pub fn is_exhausted(error: &io::Error) -> bool {
    use nix::errno::Errno::{self, EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM};
    let number = error.raw_os_error().map(Errno::from_raw);
    matches!(number, Some(EMFILE | ENFILE | ENOBUFS | ENOMEM | EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_become_ipv4() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(canonical(mapped), "10.0.0.1:80".parse().unwrap());
        let v6: SocketAddr = "[fd00::1]:80".parse().unwrap();
        assert_eq!(canonical(v6), v6);
    }
}
