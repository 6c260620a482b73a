//! DNS over UDP.

use std::{
    io::{ErrorKind, IoSlice, IoSliceMut},
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

use ebpf_loader::{Dns, PodCapture, Slot};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt,
    sockopt::{Ipv4OrigDstAddr, Ipv4PacketInfo},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::support::*;

#[test]
fn query_is_captured_and_answered_from_the_server_it_was_meant_for() {
    isolated(|lab| {
        let capture = lab.open();
        capture.capture_dns().expect("the hook attaches");
        let options = PodCapture { dns: Dns::Capture, ..lab.pod_capture() };
        let (cookie, _proxy) = lab.enrol(&capture, &options);
        let server = lab.pod.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).expect("a socket");
            set_transparent(&socket, POD4);
            setsockopt(&socket, Ipv4OrigDstAddr, &true).expect("a socket option");
            setsockopt(&socket, Ipv4PacketInfo, &true).expect("a socket option");
            let own = at(Ipv4Addr::new(127, 15, 0, 53).into(), 53);
            socket.bind(&SockAddr::from(own)).expect("a loopback port");
            set_patience(socket.as_fd());
            UdpSocket::from(socket)
        });
        capture.set_listener(cookie, Slot::Dns4, server.as_fd()).expect("the slot takes the socket");

        let client = lab.pod.run(|| UdpSocket::bind("0.0.0.0:0").expect("a socket"));
        set_patience(client.as_fd());
        client.send_to(b"query", at(SERVICE4, 53)).expect("sending");
        let (from, meant_for) = receive(&server);
        assert_eq!(meant_for, SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 1), 53));
        answer(&server, from, *meant_for.ip());
        let mut buffer = [0; 64];
        let (length, source) = client.recv_from(&mut buffer).expect("an answer");
        assert_eq!((&buffer[..length], source), (b"answer".as_slice(), at(SERVICE4, 53)));
        assert_eq!(capture.counters().expect("counters").dns, 1);
    });
}

#[test]
fn other_udp_and_pods_that_did_not_ask_are_left_alone() {
    isolated(|lab| {
        let capture = lab.open();
        capture.capture_dns().expect("the hook attaches");
        let (cookie, _proxy) = lab.enrol(&capture, &lab.pod_capture());
        let client = lab.pod.run(|| UdpSocket::bind("0.0.0.0:0").expect("a socket"));
        assert_eq!(Socket::from(client).mark().expect("SO_MARK"), 0, "the pod did not ask");

        let options = PodCapture { dns: Dns::Capture, ..lab.pod_capture() };
        capture.enrol(cookie, &options, ebpf_loader::Phase::Captured).expect("an update");
        let server = lab.peer.run(|| UdpSocket::bind((PEER4, 5353)).expect("a socket"));
        set_patience(server.as_fd());
        let client = lab.pod.run(|| UdpSocket::bind("0.0.0.0:0").expect("a socket"));
        client.send_to(b"hello", at(PEER4, 5353)).expect("sending");
        let mut buffer = [0; 64];
        let (length, source) = server.recv_from(&mut buffer).expect("it arrives");
        assert_eq!((&buffer[..length], source.ip()), (b"hello".as_slice(), POD4));
    });
}

#[test]
fn without_a_server_queries_are_refused_at_once() {
    isolated(|lab| {
        let capture = lab.open();
        capture.capture_dns().expect("the hooks attach");
        let options = PodCapture { dns: Dns::Capture, ..lab.pod_capture() };
        let (_, _proxy) = lab.enrol(&capture, &options);
        for (server, any) in [(SERVICE4, "0.0.0.0:0"), (SERVICE6, "[::]:0")] {
            let client = lab.pod.run(|| UdpSocket::bind(any).expect("a socket"));
            let error = client.send_to(b"query", at(server, 53)).expect_err("nobody would answer");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "of a socket that is not connected");
            let error = client.connect(at(server, 53)).expect_err("nobody would answer");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
        let mapped = lab.pod.run(|| UdpSocket::bind("[::]:0").expect("a socket"));
        let server: std::net::SocketAddr = "[::ffff:10.96.0.1]:53".parse().expect("an address");
        let error = mapped.send_to(b"query", server).expect_err("nobody would answer");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "over IPv4 from an IPv6 socket");

        // The pod's own resolver, other ports and pods that did not ask.
        let own = lab.pod.run(|| UdpSocket::bind((POD4, 53)).expect("a socket"));
        set_patience(own.as_fd());
        let client = lab.pod.run(|| UdpSocket::bind("0.0.0.0:0").expect("a socket"));
        client.send_to(b"query", at(POD4, 53)).expect("its own business");
        own.recv_from(&mut [0; 8]).expect("it arrives");
        client.send_to(b"hello", at(PEER4, 5353)).expect("not DNS");
        lab.peer.run(|| UdpSocket::bind("0.0.0.0:0").expect("a socket").send_to(b"query", at(POD4, 53)).expect("sent"));
    });
}

/// A caching resolver on an extra address of `lo`, as node-local DNS has it, asks and answers within the netns.
#[test]
fn a_server_on_an_address_of_the_netns_own_lo_is_left_alone() {
    isolated(|lab| {
        let capture = lab.open();
        capture.capture_dns().expect("the hooks attach");
        let options = PodCapture { dns: Dns::Capture, ..lab.pod_capture() };
        let (cookie, _proxy) = lab.enrol(&capture, &options);
        for (extra, slot, command) in [
            ("169.254.20.10", Slot::Dns4, "addr add 169.254.20.10/32 dev lo"),
            ("fd20::10", Slot::Dns6, "-6 addr add fd20::10/128 dev lo nodad"),
        ] {
            lab.pod.ip(command);
            let extra = extra.parse().expect("an address");
            let (any, loopback) =
                if at(extra, 0).is_ipv4() { ("0.0.0.0:0", "127.0.0.1:0") } else { ("[::]:0", "[::1]:0") };
            let ours = lab.pod.run(|| UdpSocket::bind(loopback).expect("a loopback port"));
            capture.set_listener(cookie, slot, ours.as_fd()).expect("the slot takes the socket");
            let server = lab.pod.run(|| UdpSocket::bind((extra, 53)).expect("a socket"));
            set_patience(server.as_fd());
            // The kernel adds the route of an IPv6 address a moment after the address: until then it is elsewhere.
            let probe = lab.pod.run(|| UdpSocket::bind((extra, 0)).expect("a socket"));
            probe.set_read_timeout(Some(Duration::from_millis(20))).expect("a socket option");
            let itself = probe.local_addr().expect("a bound socket");
            let end = Instant::now() + PATIENCE;
            while probe.send_to(b"hello", itself).is_err() || probe.recv(&mut [0; 8]).is_err() {
                assert!(Instant::now() < end, "no route to {extra}");
            }
            let client = lab.pod.run(|| UdpSocket::bind(any).expect("a socket"));
            set_patience(client.as_fd());
            client.send_to(b"query", at(extra, 53)).expect("its own business");
            let (_, from) = server.recv_from(&mut [0; 8]).expect("it arrives");
            assert_eq!(from.ip(), extra, "it took the server's address for its own");
            server.send_to(b"answer", from).expect("sending");
            let (_, source) = client.recv_from(&mut [0; 8]).expect("an answer");
            assert_eq!(source, at(extra, 53));
        }
        assert_eq!(capture.counters().expect("counters").dns, 0);
    });
}

/// The client, and the server it asked.
fn receive(socket: &UdpSocket) -> (SockaddrIn, SocketAddrV4) {
    let mut buffer = [0; 64];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(libc::sockaddr_in, libc::in_pktinfo);
    let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty())
        .expect("a query arrives");
    let meant_for = message
        .cmsgs()
        .expect("untruncated control data")
        .find_map(|message| match message {
            ControlMessageOwned::Ipv4OrigDstAddr(address) => Some(SockaddrIn::from(address)),
            _ => None,
        })
        .expect("the original destination");
    (message.address.expect("a source"), SocketAddrV4::new(meant_for.ip(), meant_for.port()))
}

fn answer(socket: &UdpSocket, to: SockaddrIn, from: Ipv4Addr) {
    let info = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(from).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(b"answer")], &control, MsgFlags::empty(), Some(&to)).expect("sending");
}
