//! What becomes of connections that a pod opens.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use ebpf_loader::{FailureMode, PodCapture, Slot, abi::MARK_BYPASS};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::support::*;

/// A refusal that took longer came from a timer, not from the hook.
const AT_ONCE: Duration = Duration::from_secs(1);

#[test]
fn is_captured_and_the_original_destination_known() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for (destination, slot, source) in [(SERVICE4, Slot::Out4, POD4), (SERVICE6, Slot::Out6, POD6)] {
            let mut client = lab.pod.connect(at(destination, 80)).expect("a captured connection");
            let (mut accepted, original) = proxy.accept(slot);
            assert_eq!(original, at(destination, 80));
            assert_eq!(accepted.peer_addr().expect("a client").ip(), source);
            assert_eq!(
                client.peer_addr().expect("a server"),
                at(destination, 80),
                "the application sees what it dialled"
            );
            assert_eq!(client.local_addr().expect("an address").ip(), source);
            assert_joined(&mut client, &mut accepted);
        }
        assert_eq!(capture.counters().expect("counters").captured, 2);
        proxy.assert_idle();
    });
}

#[test]
fn from_an_ipv6_socket_to_an_ipv4_destination_is_captured() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let IpAddr::V4(service) = SERVICE4 else { unreachable!("an IPv4 address") };
        let mapped = at(service.to_ipv6_mapped().into(), 81);
        let mut client = lab.pod.connect(mapped).expect("a captured connection");
        let (mut accepted, original) = proxy.accept(Slot::Out4);
        assert_eq!(original, at(SERVICE4, 81));
        assert_joined(&mut client, &mut accepted);
    });
}

#[test]
fn to_hbone_and_dns_ports_elsewhere_is_ordinary_outbound() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for port in [15008, 53] {
            let _client = lab.pod.connect(at(SERVICE4, port)).expect("a captured connection");
            assert_eq!(proxy.accept(Slot::Out4).1, at(SERVICE4, port));
        }
    });
}

#[test]
fn of_a_socket_bound_to_a_device_is_captured() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let _client = lab
            .pod
            .connect_with(at(SERVICE4, 80), |socket| socket.bind_device(Some(b"eth0")))
            .expect("a captured connection");
        assert_eq!(proxy.accept(Slot::Out4).1, at(SERVICE4, 80));
    });
}

#[test]
fn by_mptcp_is_captured() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let client = lab.pod.run(|| {
            let socket = match Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) {
                Err(error)
                    if [Some(libc::EPROTONOSUPPORT), Some(libc::ENOPROTOOPT)].contains(&error.raw_os_error()) =>
                {
                    return None;
                }
                socket => socket.expect("an MPTCP socket"),
            };
            socket.connect_timeout(&SockAddr::from(at(SERVICE4, 80)), PATIENCE).expect("a captured connection");
            Some(socket)
        });
        match client {
            Some(_open) => assert_eq!(proxy.accept(Slot::Out4).1, at(SERVICE4, 80)),
            None => eprintln!("this kernel has no MPTCP"),
        }
    });
}

#[test]
fn of_ztunnel_itself_goes_direct() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let server = lab.peer.listen(PEER4, 80);
        let mut client =
            lab.pod.connect_with(at(PEER4, 80), |socket| socket.set_mark(MARK_BYPASS)).expect("a direct connection");
        let (mut accepted, _) = server.accept().expect("the server got it");
        assert_joined(&mut client, &mut accepted);
        proxy.assert_idle();
        assert_eq!(capture.counters().expect("counters").bypassed, 1);
    });
}

#[test]
fn to_loopback_and_to_the_pod_itself_is_the_pods_own_business() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        // An address the pod has and the control plane knows nothing of.
        let spare: IpAddr = "10.77.0.1".parse().expect("an address");
        lab.pod.ip("addr add 10.77.0.1/32 dev lo");
        let loopback6 = Ipv6Addr::LOCALHOST.into();
        for address in ["127.0.0.1".parse().expect("an address"), loopback6, POD4, POD6, spare] {
            let app = lab.pod.listen(address, 8080);
            let mut client =
                lab.pod.connect(at(address, 8080)).unwrap_or_else(|error| panic!("calling {address}: {error}"));
            let (mut accepted, _) = app.accept().unwrap_or_else(|error| panic!("the app at {address}: {error}"));
            assert_joined(&mut client, &mut accepted);
        }
        let app = lab.pod.listen("0.0.0.0".parse().expect("an address"), 8081);
        lab.pod.connect("0.0.0.0:8081".parse().expect("an address")).expect("calling this host");
        app.accept().expect("the app got it");
        proxy.assert_idle();
    });
}

#[test]
fn to_an_excluded_prefix_goes_direct() {
    isolated(|lab| {
        let capture = lab.open();
        let server4 = lab.peer.listen(PEER4, 80);
        let server6 = lab.peer.listen(PEER6, 80);
        let prefix = |text: &str| text.parse().expect("a prefix");
        let options = PodCapture { excluded: vec![prefix("10.55.0.0/30")], ..lab.pod_capture() };
        let (cookie, proxy) = lab.enrol(&capture, &options);

        lab.pod.connect(at(PEER4, 80)).expect("excluded by the pod");
        server4.accept().expect("the server got it");
        let IpAddr::V4(peer) = PEER4 else { unreachable!("an IPv4 address") };
        lab.pod.connect(at(peer.to_ipv6_mapped().into(), 80)).expect("excluded by the pod, as IPv4-mapped");
        server4.accept().expect("the server got it");
        let _captured = lab.pod.connect(at(PEER6, 80)).expect("not excluded");
        proxy.accept(Slot::Out6);

        capture.set_global_exclusions(&[prefix("fd55::/64")]).expect("the map takes it");
        lab.pod.connect(at(PEER6, 80)).expect("excluded for all");
        server6.accept().expect("the server got it");
        assert_eq!(capture.counters().expect("counters").excluded, 3);

        // All of IPv6 says nothing of IPv4, and what is no longer named is captured again.
        let options = PodCapture { excluded: vec![prefix("::/0")], ..lab.pod_capture() };
        capture.enrol(cookie, &options, ebpf_loader::Phase::Captured).expect("an update");
        capture.set_global_exclusions(&[]).expect("the map takes it");
        let _captured = lab.pod.connect(at(PEER4, 80)).expect("no longer excluded");
        proxy.accept(Slot::Out4);
        lab.pod.connect(at(PEER6, 80)).expect("excluded by the pod");
        server6.accept().expect("the server got it");
        proxy.assert_idle();
    });
}

#[test]
fn of_a_reused_socket_loses_its_mark_when_it_goes_direct() {
    isolated(|lab| {
        let capture = lab.open();
        let server = lab.peer.listen(PEER4, 80);
        let options = PodCapture { excluded: vec!["10.55.0.1/32".parse().expect("a prefix")], ..lab.pod_capture() };
        let (_, proxy) = lab.enrol(&capture, &options);
        lab.pod.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket");
            socket.connect_timeout(&SockAddr::from(at(SERVICE4, 80)), PATIENCE).expect("a captured connection");
            disconnect(&socket);
            socket.connect_timeout(&SockAddr::from(at(PEER4, 80)), PATIENCE).expect("a direct connection");
            assert_eq!(socket.mark().expect("SO_MARK"), 0);
        });
        server.accept().expect("the server got it");
        proxy.accept(Slot::Out4);
    });
}

#[test]
fn without_a_listener_is_refused_at_once() {
    isolated(|lab| {
        let capture = lab.open();
        let server = lab.peer.listen(PEER4, 80);
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        drop(proxy);
        for destination in [PEER4, SERVICE4, PEER6] {
            assert_refused_at_once(lab, at(destination, 80));
        }
        assert_eq!(capture.counters().expect("counters").refused, 3);
        server.set_nonblocking(true).expect("a socket option");
        assert_eq!(server.accept().expect_err("nothing arrives").kind(), ErrorKind::WouldBlock);
    });
}

fn assert_refused_at_once(lab: &Lab, to: SocketAddr) {
    let start = Instant::now();
    let error = lab.pod.connect(to).expect_err("no ztunnel, no connection");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
    assert!(start.elapsed() < AT_ONCE, "{to} took {:?}", start.elapsed());
}

#[test]
fn without_a_listener_goes_direct_where_the_pod_fails_open() {
    isolated(|lab| {
        let capture = lab.open();
        let options = PodCapture { failure: FailureMode::Open, ..lab.pod_capture() };
        let (_, proxy) = lab.enrol(&capture, &options);
        for (peer, slot) in [(PEER4, Slot::Out4), (PEER6, Slot::Out6)] {
            let _captured = lab.pod.connect(at(peer, 80)).expect("a captured connection");
            proxy.accept(slot);
        }
        drop(proxy);
        for peer in [PEER4, PEER6] {
            let server = lab.peer.listen(peer, 80);
            lab.pod.connect(at(peer, 80)).expect("a direct connection");
            server.accept().expect("the server got it");
        }
        assert_eq!(capture.counters().expect("counters").failed_open, 2);
    });
}

#[test]
fn of_a_pod_that_is_not_enrolled_is_left_alone() {
    isolated(|lab| {
        let capture = lab.open();
        let cookie = capture.attach_netns(lab.pod.fd.as_fd()).expect("sk_lookup attaches");
        let proxy = lab.proxy(&capture, cookie);
        let server = lab.peer.listen(PEER4, 80);
        lab.pod.connect(at(PEER4, 80)).expect("a direct connection");
        server.accept().expect("the server got it");
        let app = lab.pod.listen(POD4, 80);
        lab.peer.connect(at(POD4, 80)).expect("a direct connection");
        app.accept().expect("the app got it");
        proxy.assert_idle();
    });
}
