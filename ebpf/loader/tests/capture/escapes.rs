//! Ways to open a connection that could go around capture: those that are captured all the same, and those that are not.

use std::{
    io::{self, ErrorKind, Read, Write},
    mem,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
};

use ebpf_loader::{
    Slot,
    abi::{MARK_BYPASS, MARK_CAPTURE},
};
use io_uring::{IoUring, opcode, types};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::support::*;

/// Where nobody is, the slot that captures it, and the pod's address of the family.
const FAMILIES: [(IpAddr, Slot, IpAddr); 2] = [(SERVICE4, Slot::Out4, POD4), (SERVICE6, Slot::Out6, POD6)];
const TCP_FASTOPEN_CONNECT: libc::c_int = 30;
const IP_UNICAST_IF: libc::c_int = 50;
const IPV6_UNICAST_IF: libc::c_int = 76;

/// Opens a connection to each family's nowhere in the way said, and expects it at ztunnel with the pod's address.
fn assert_captured(lab: &Lab, connect: impl Fn(SocketAddr) -> io::Result<Socket> + Sync) {
    let capture = lab.open();
    let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
    for (destination, slot, source) in FAMILIES {
        let client = lab.pod.run(|| connect(at(destination, 80))).unwrap_or_else(|e| panic!("{destination}: {e}"));
        set_patience(client.as_fd());
        let (mut accepted, original) = proxy.accept(slot);
        assert_eq!(original, at(destination, 80));
        assert_eq!(accepted.peer_addr().expect("a client").ip(), source);
        assert_joined(&mut TcpStream::from(client), &mut accepted);
    }
    assert_eq!(capture.counters().expect("counters").captured, 2);
}

fn tcp(to: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    set_patience(socket.as_fd());
    Ok(socket)
}

fn connected(socket: Socket, to: SocketAddr) -> io::Result<Socket> {
    socket.connect(&SockAddr::from(to))?;
    Ok(socket)
}

#[test]
fn a_connect_that_does_not_wait_is_captured() {
    isolated(|lab| {
        assert_captured(lab, |to| {
            let socket = tcp(to)?;
            socket.set_nonblocking(true)?;
            let error = socket.connect(&SockAddr::from(to)).expect_err("it does not wait");
            assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
            // The first write waits for the handshake.
            socket.set_nonblocking(false)?;
            Ok(socket)
        });
    });
}

#[test]
fn a_socket_that_was_disconnected_is_captured_again() {
    isolated(|lab| {
        assert_captured(lab, |to| {
            // Where nobody listens on loopback: refused, and then dissolved.
            let socket = tcp(to)?;
            let loopback: IpAddr = if to.is_ipv4() { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() };
            socket.connect(&SockAddr::from(at(loopback, 9))).expect_err("nobody is there");
            disconnect(&socket);
            connected(socket, to)
        });
    });
}

#[test]
fn data_in_the_first_packet_is_captured() {
    isolated(|lab| {
        // What the client asks for. Whether the kernel then puts data into the SYN is its own affair.
        lab.pod.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "3").expect("the sysctl"));
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (destination, slot, _) in FAMILIES {
            let to = at(destination, 80);
            let sent = lab.pod.run(|| {
                let socket = tcp(to).expect("a socket");
                let sent = socket.send_to_with_flags(b"there", &SockAddr::from(to), libc::MSG_FASTOPEN);
                assert_eq!(sent.expect("sent"), 5);
                socket
            });
            let (mut accepted, original) = proxy.accept(slot);
            assert_eq!(original, to);
            assert_received(&mut accepted, b"there");
            drop(sent);
            let lazily = lab.pod.run(|| {
                let socket = tcp(to).expect("a socket");
                set_option(socket.as_fd(), libc::SOL_TCP, TCP_FASTOPEN_CONNECT, 1);
                socket.connect(&SockAddr::from(to)).expect("it waits for data");
                assert_eq!(socket.send(b"again").expect("sent"), 5);
                socket
            });
            let (mut accepted, original) = proxy.accept(slot);
            assert_eq!(original, to);
            assert_received(&mut accepted, b"again");
            drop(lazily);
        }
        proxy.assert_idle();
    });
}

fn assert_received(stream: &mut TcpStream, expected: &[u8; 5]) {
    let mut got = [0; 5];
    io::Read::read_exact(stream, &mut got).expect("the data");
    assert_eq!(&got, expected);
}

#[test]
fn io_uring_is_captured() {
    isolated(|lab| assert_captured(lab, |to| by_ring(to, &IoUring::builder())));
}

#[test]
fn io_uring_with_a_thread_of_the_kernel_is_captured() {
    isolated(|lab| {
        let mut builder = IoUring::builder();
        builder.setup_sqpoll(1000);
        assert_captured(lab, |to| by_ring(to, &builder));
    });
}

fn by_ring(to: SocketAddr, builder: &io_uring::Builder) -> io::Result<Socket> {
    let socket = tcp(to)?;
    let address = SockAddr::from(to);
    let mut ring: IoUring = builder.build(8)?;
    let connect = opcode::Connect::new(types::Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.len()).build();
    // SAFETY: socket and address live until the entry has completed, below.
    unsafe { ring.submission().push(&connect) }.expect("the queue is empty");
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().expect("one was waited for").result();
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(socket) }
}

#[test]
fn a_socket_bound_to_an_address_or_port_is_captured() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (destination, slot, pod) in FAMILIES {
            let any: IpAddr = if pod.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            for bound in [at(pod, 0), at(any, 40_000), at(pod, 40_001)] {
                let to = at(destination, 80);
                let mut client = lab
                    .pod
                    .connect_with(to, |socket| socket.bind(&SockAddr::from(bound)))
                    .unwrap_or_else(|error| panic!("{bound} → {to}: {error}"));
                let (mut accepted, original) = proxy.accept(slot);
                assert_eq!((original, accepted.peer_addr().expect("a client").ip()), (to, pod));
                assert!(bound.port() == 0 || accepted.peer_addr().expect("a client").port() == bound.port());
                assert_joined(&mut client, &mut accepted);
            }
        }
        // From loopback to elsewhere there is no way without capture either.
        let mut client = lab
            .pod
            .connect_with(at(SERVICE4, 80), |socket| socket.bind(&SockAddr::from(at([127, 0, 0, 1].into(), 0))))
            .expect("a captured connection");
        let (mut accepted, original) = proxy.accept(Slot::Out4);
        assert_eq!(original, at(SERVICE4, 80));
        assert_joined(&mut client, &mut accepted);
    });
}

#[test]
fn an_interface_of_choice_is_captured() {
    isolated(|lab| {
        assert_captured(lab, |to| {
            let socket = tcp(to)?;
            let eth0 = nix::net::if_::if_nametoindex("eth0")?;
            // In network order.
            let index = eth0.to_be() as libc::c_int;
            match to {
                SocketAddr::V4(_) => set_option(socket.as_fd(), libc::SOL_IP, IP_UNICAST_IF, index),
                SocketAddr::V6(_) => set_option(socket.as_fd(), libc::SOL_IPV6, IPV6_UNICAST_IF, index),
            }
            connected(socket, to)
        });
    });
}

#[test]
fn a_socket_bound_to_a_device_is_captured_over_ipv6_too() {
    isolated(|lab| {
        assert_captured(lab, |to| {
            let socket = tcp(to)?;
            socket.bind_device(Some(b"eth0"))?;
            connected(socket, to)
        });
    });
}

#[test]
fn a_socket_that_shuns_gateways_is_captured() {
    isolated(|lab| {
        assert_captured(lab, |to| {
            let socket = tcp(to)?;
            set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DONTROUTE, 1);
            connected(socket, to)
        });
    });
}

#[test]
fn a_mark_set_before_is_overwritten() {
    isolated(|lab| {
        assert_captured(lab, |to| {
            let socket = tcp(to)?;
            socket.set_mark(0x77)?;
            let socket = connected(socket, to)?;
            assert_eq!(socket.mark()?, MARK_CAPTURE, "the application's own is gone");
            Ok(socket)
        });
    });
}

/// Its packets take another route, to a server that knows nothing of the connection. The application needs privileges
/// for it and breaks only its own.
#[test]
fn a_mark_set_after_breaks_the_connection() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let client = Socket::from(lab.pod.connect(at(PEER4, 80)).expect("a captured connection"));
        let (_accepted, _) = proxy.accept(Slot::Out4);
        client.set_mark(0x77).expect("SO_MARK");
        client.send(b"hello").expect("the kernel takes it");
        let error = client.recv(&mut [mem::MaybeUninit::uninit()]).expect_err("nobody knows the connection");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn mptcp_is_captured_over_ipv6_too() {
    isolated(|lab| {
        if !has_mptcp() {
            return eprintln!("this kernel has no MPTCP");
        }
        assert_captured(lab, |to| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP))?;
            connected(socket, to)
        });
    });
}

/// The peer asks for MPTCP, ztunnel's listener answers in TCP. An application's own MPTCP listener changes nothing.
#[test]
fn mptcp_to_the_pod_is_captured() {
    isolated(|lab| {
        if !has_mptcp() {
            return eprintln!("this kernel has no MPTCP");
        }
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (pod, plain, hbone) in [(POD4, Slot::In4, Slot::Hbone4), (POD6, Slot::In6, Slot::Hbone6)] {
            let app = lab.pod.run(|| {
                let socket = Socket::new(Domain::for_address(at(pod, 80)), Type::STREAM, Some(Protocol::MPTCP));
                let socket = socket.expect("an MPTCP socket");
                socket.bind(&SockAddr::from(at(pod, 80))).expect("a free port");
                socket.listen(1).expect("a listener");
                socket
            });
            for (port, slot) in [(80, plain), (15008, hbone)] {
                let client = lab.peer.run(|| {
                    let to = at(pod, port);
                    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP));
                    let socket = socket.expect("an MPTCP socket");
                    set_patience(socket.as_fd());
                    socket.connect_timeout(&SockAddr::from(to), PATIENCE).expect("ztunnel answers");
                    socket
                });
                let (mut accepted, original) = proxy.accept(slot);
                assert_eq!(original, at(pod, port));
                assert_joined(&mut TcpStream::from(client), &mut accepted);
            }
            app.set_nonblocking(true).expect("a socket option");
            assert_eq!(app.accept().expect_err("nothing arrives").kind(), ErrorKind::WouldBlock);
        }
    });
}

fn has_mptcp() -> bool {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).is_ok()
}

/// Forging ztunnel's mark needs CAP_NET_RAW. What leaves is plain and proves no identity: its receiver decides.
#[test]
fn the_bypass_mark_escapes() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (peer, pod) in [(PEER4, POD4), (PEER6, POD6)] {
            let server = lab.peer.listen(peer, 80);
            lab.pod.connect_with(at(peer, 80), |socket| socket.set_mark(MARK_BYPASS)).expect("a direct connection");
            assert_eq!(server.accept().expect("the server got it").1.ip(), pod);
        }
        proxy.assert_idle();
    });
}

#[test]
fn raw_sockets_escape() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
            let domain = Domain::for_address(at(pod, 0));
            let (from, to) = (at(pod, 40_000), at(peer, 80));
            let watcher = lab.peer.run(|| Socket::new(domain, Type::RAW, Some(Protocol::TCP)).expect("a raw socket"));
            set_patience(watcher.as_fd());
            let raw = lab.pod.run(|| Socket::new(domain, Type::RAW, Some(Protocol::TCP)).expect("a raw socket"));
            raw.send_to(&syn(from, to), &SockAddr::from(at(peer, 0))).expect("sent");
            let mut packet = [mem::MaybeUninit::uninit(); 128];
            let (length, source) = watcher.recv_from(&mut packet).expect("it arrives on the wire");
            assert!(length >= 20);
            assert_eq!(source.as_socket().expect("an address").ip(), pod);
        }
        proxy.assert_idle();
    });
}

/// What `AF_PACKET` (CAP_NET_RAW) sends never was a socket of TCP: it leaves as it is, plain and without an identity. It
/// also reads along, as on any machine: what its pod receives, whoever gets it in the end.
#[test]
fn packet_sockets_escape_and_read_along() {
    const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0x55, 1];
    isolated(|lab| {
        lab.peer.ip("link set eth0 address 02:00:00:00:55:01");
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (pod, peer, inbound) in [(POD4, PEER4, Slot::In4), (POD6, PEER6, Slot::In6)] {
            let (from, to) = (at(pod, 40_000), at(peer, 80));
            let kind = if pod.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
            let watcher = lab
                .peer
                .run(|| Socket::new(Domain::for_address(to), Type::RAW, Some(Protocol::TCP)).expect("a raw socket"));
            set_patience(watcher.as_fd());
            let (packets, link) = lab.pod.run(|| {
                let protocol = Protocol::from(libc::c_int::from((kind as u16).to_be()));
                let packets = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)).expect("a packet socket");
                let device = nix::net::if_::if_nametoindex("eth0").expect("a device");
                (packets, link_address(kind as u16, device, PEER_MAC))
            });
            set_patience(packets.as_fd());
            packets.send_to(&in_packet(from, to, &syn(from, to)), &link).expect("sent");
            let mut bytes = [mem::MaybeUninit::uninit(); 128];
            let (_, source) = watcher.recv_from(&mut bytes).expect("it arrives on the wire");
            assert_eq!(source.as_socket().expect("an address").ip(), pod);
            proxy.assert_idle();

            let mut client = lab.peer.connect(at(pod, 8080)).expect("ztunnel answers");
            let _accepted = proxy.accept(inbound);
            client.write_all(b"to be read along").expect("sent");
            loop {
                let mut buffer = [0; 2048];
                let length = (&packets).read(&mut buffer).expect("it is heard");
                if contains(&buffer[..length], b"to be read along") {
                    break;
                }
            }
        }
    });
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Where a packet socket sends to.
fn link_address(protocol: u16, device: u32, mac: [u8; 6]) -> SockAddr {
    let mut octets = [0; 8];
    octets[..6].copy_from_slice(&mac);
    let link = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: device as libc::c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: octets,
    };
    // SAFETY: the storage is larger than any socket address, and what is written is one, as long as said.
    let made = unsafe {
        SockAddr::try_init(|storage, length| {
            storage.cast::<libc::sockaddr_ll>().write(link);
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    };
    made.expect("an address").1
}

/// An IP packet around a TCP segment.
fn in_packet(from: SocketAddr, to: SocketAddr, segment: &[u8]) -> Vec<u8> {
    let length = segment.len() as u8;
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0, 0, 20 + length, 0, 0, 0x40, 0, 64, 6, 0, 0];
            header.extend([from.octets(), to.octets()].concat());
            let sum = folded(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            [&header, segment].concat()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = [0x60, 0, 0, 0, 0, length, 6, 64];
            [&header, &from.octets()[..], &to.octets()[..], segment].concat()
        }
        _ => unreachable!("both of one family"),
    }
}

/// A TCP SYN of the pod's own making. The peer's kernel answers it: nobody listens, so a reset comes back.
fn syn(from: SocketAddr, to: SocketAddr) -> [u8; 20] {
    let mut segment = [0_u8; 20];
    segment[..2].copy_from_slice(&from.port().to_be_bytes());
    segment[2..4].copy_from_slice(&to.port().to_be_bytes());
    (segment[12], segment[13], segment[14]) = (5 << 4, 2, 0xff);
    let sum = checksum(from, to, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// Of a TCP segment with its pseudo header.
fn checksum(from: SocketAddr, to: SocketAddr, segment: &[u8]) -> u16 {
    let octets = |address: SocketAddr| match address.ip() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let bytes = [octets(from), octets(to), vec![0, 6, 0, segment.len() as u8], segment.to_vec()].concat();
    folded(&bytes)
}

/// The checksum of IP and TCP.
fn folded(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[test]
fn udp_other_than_dns_escapes() {
    isolated(|lab| {
        let capture = lab.open();
        capture.capture_dns().expect("the hooks attach");
        let options = ebpf_loader::PodCapture { dns: ebpf_loader::Dns::Capture, ..lab.pod_capture() };
        let (_, proxy) = lab.enrol(&capture, &options);
        for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
            let server = lab.peer.run(|| UdpSocket::bind((peer, 443)).expect("a socket"));
            set_patience(server.as_fd());
            let client = lab.pod.run(|| UdpSocket::bind((pod, 0)).expect("a socket"));
            client.send_to(b"hello", at(peer, 443)).expect("sending");
            client.connect(at(peer, 443)).expect("connected");
            client.send(b"hello").expect("sending");
            for _ in 0..2 {
                assert_eq!(server.recv_from(&mut [0; 8]).expect("it arrives").1.ip(), pod);
            }
        }
        proxy.assert_idle();
    });
}

/// Docker in a pod: another namespace, whose packets the pod only forwards.
#[test]
fn a_namespace_behind_the_pod_escapes() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let inner = Netns::new().expect("a netns");
        lab.pod.ip(&format!("link add inner type veth peer name eth0 netns {}", inner.path()));
        lab.pod.ip("addr add 10.66.0.1/24 dev inner");
        lab.pod.ip("-6 addr add fd66::1/64 dev inner nodad");
        lab.pod.ip("link set inner up");
        lab.pod.run(|| {
            for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                std::fs::write(format!("/proc/sys/net/{name}"), "1").expect("the sysctl");
            }
        });
        for command in [
            "link set lo up",
            "link set eth0 up",
            "addr add 10.66.0.2/24 dev eth0",
            "-6 addr add fd66::2/64 dev eth0 nodad",
            "route add default via 10.66.0.1",
            "-6 route add default via fd66::1",
        ] {
            inner.ip(command);
        }
        lab.peer.ip(&format!("route add 10.66.0.0/24 via {POD4}"));
        lab.peer.ip(&format!("-6 route add fd66::/64 via {POD6}"));
        for peer in [PEER4, PEER6] {
            let server = lab.peer.listen(peer, 80);
            inner.connect(at(peer, 80)).expect("a direct connection");
            server.accept().expect("the server got it");
        }
        proxy.assert_idle();
    });
}

#[test]
fn what_was_open_before_is_left_alone() {
    isolated(|lab| {
        for (pod, peer) in [(POD4, PEER4), (POD6, PEER6)] {
            let (app, server) = (lab.pod.listen(pod, 80), lab.peer.listen(peer, 80));
            let mut inbound = lab.peer.connect(at(pod, 80)).expect("a direct connection");
            let mut outbound = lab.pod.connect(at(peer, 80)).expect("a direct connection");
            let mut got_in = app.accept().expect("the app got it").0;
            let mut got_out = server.accept().expect("the server got it").0;
            let capture = lab.open();
            let (cookie, proxy) = lab.enrol(&capture, &lab.pod_capture());
            assert_joined(&mut inbound, &mut got_in);
            assert_joined(&mut outbound, &mut got_out);
            proxy.assert_idle();
            capture.detach(cookie).expect("the pod is out");
        }
    });
}

#[test]
fn a_socket_made_before_and_connected_after_is_captured() {
    isolated(|lab| {
        let sockets = lab.pod.run(|| FAMILIES.map(|(to, _, _)| tcp(at(to, 80)).expect("a socket")));
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (socket, (to, slot, _)) in sockets.into_iter().zip(FAMILIES) {
            let _open = connected(socket, at(to, 80)).expect("a captured connection");
            assert_eq!(proxy.accept(slot).1, at(to, 80));
        }
    });
}

/// `exec` into a pod, an ephemeral container: what counts is the namespace of the socket, not when its process came.
#[test]
fn a_socket_follows_the_namespace_it_was_made_in() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let from_pod = lab.pod.run(|| tcp(at(SERVICE4, 80)).expect("a socket"));
        // Used from elsewhere.
        let _open = connected(from_pod, at(SERVICE4, 80)).expect("a captured connection");
        assert_eq!(proxy.accept(Slot::Out4).1, at(SERVICE4, 80));
        let from_peer = lab.peer.run(|| tcp(at(PEER4, 80)).expect("a socket"));
        let server = lab.peer.listen(PEER4, 80);
        let _open = lab.pod.run(|| connected(from_peer, at(PEER4, 80))).expect("a direct connection");
        server.accept().expect("the server got it");
        proxy.assert_idle();
    });
}

#[test]
fn excluded_ports_go_direct_both_ways() {
    isolated(|lab| {
        let capture = lab.open();
        let options = ebpf_loader::PodCapture {
            excluded_ports_to: vec![5432],
            excluded_ports_at: vec![9090, 15008],
            ..lab.pod_capture()
        };
        let (cookie, proxy) = lab.enrol(&capture, &options);
        for (pod, peer, out, into, hbone) in
            [(POD4, PEER4, Slot::Out4, Slot::In4, Slot::Hbone4), (POD6, PEER6, Slot::Out6, Slot::In6, Slot::Hbone6)]
        {
            let (database, metrics) = (lab.peer.listen(peer, 5432), lab.pod.listen(pod, 9090));
            lab.pod.connect(at(peer, 5432)).expect("a direct connection");
            database.accept().expect("the server got it");
            lab.peer.connect(at(pod, 9090)).expect("a direct connection");
            metrics.accept().expect("the app got it");
            proxy.assert_idle();
            // Neither number means anything the other way, and no other port is excluded.
            let _out = lab.pod.connect(at(peer, 9090)).expect("a captured connection");
            assert_eq!(proxy.accept(out).1, at(peer, 9090));
            let _in = lab.peer.connect(at(pod, 5432)).expect("ztunnel answers");
            assert_eq!(proxy.accept(into).1, at(pod, 5432));
            let _tunnel = lab.peer.connect(at(pod, 15008)).expect("ztunnel answers");
            proxy.accept(hbone);
        }
        assert_eq!(capture.counters().expect("counters").excluded, 4);

        // Without the exclusion it is captured again.
        capture.enrol(cookie, &lab.pod_capture(), ebpf_loader::Phase::Captured).expect("an update");
        let _out = lab.pod.connect(at(SERVICE4, 5432)).expect("a captured connection");
        proxy.accept(Slot::Out4);
        let _in = lab.peer.connect(at(POD4, 9090)).expect("ztunnel answers");
        proxy.accept(Slot::In4);
    });
}
