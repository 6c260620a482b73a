//! What becomes of connections to a pod, and of ztunnel's own to the application.

use std::{io::ErrorKind, net::IpAddr, os::fd::AsFd};

use ebpf_loader::{FailureMode, Inbound, PodCapture, Slot, abi::MARK_LEG};
use socket2::SockAddr;

use crate::support::*;

#[test]
fn is_steered_by_port_to_ztunnel() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let app = lab.pod.listen(POD4, 80);
        for (pod, source, plain, hbone) in
            [(POD4, PEER4, Slot::In4, Slot::Hbone4), (POD6, PEER6, Slot::In6, Slot::Hbone6)]
        {
            for (port, slot) in [(80, plain), (15008, hbone)] {
                let mut client = lab.peer.connect(at(pod, port)).expect("ztunnel answers");
                let (mut accepted, original) = proxy.accept(slot);
                assert_eq!(original, at(pod, port));
                assert_eq!(accepted.peer_addr().expect("a client").ip(), source);
                assert_joined(&mut client, &mut accepted);
            }
        }
        app.set_nonblocking(true).expect("a socket option");
        assert_eq!(app.accept().expect_err("nothing arrives").kind(), ErrorKind::WouldBlock);
        let counters = capture.counters().expect("counters");
        assert_eq!((counters.inbound, counters.hbone), (2, 2));
    });
}

#[test]
fn plaintext_goes_to_the_application_where_the_pod_asks_for_it() {
    isolated(|lab| {
        let capture = lab.open();
        let options = PodCapture { inbound: Inbound::Bypass, ..lab.pod_capture() };
        let (_, proxy) = lab.enrol(&capture, &options);
        let app = lab.pod.listen(POD4, 80);
        lab.peer.connect(at(POD4, 80)).expect("a direct connection");
        app.accept().expect("the app got it");
        proxy.assert_idle();
        let _tunnel = lab.peer.connect(at(POD4, 15008)).expect("ztunnel answers");
        proxy.accept(Slot::Hbone4);
    });
}

#[test]
fn leg_to_the_application_shows_it_the_client() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        // One on the pod's network, one far away, for each family.
        for (pod, client) in
            [(POD4, PEER4), (POD4, "192.0.2.7".parse().expect("an address")), (POD6, PEER6), (POD6, SERVICE6)]
        {
            let app = lab.pod.listen(pod, 80);
            let mut leg = lab
                .pod
                .connect_with(at(pod, 80), |socket| {
                    set_transparent(socket, client);
                    set_option(socket.as_fd(), libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
                    socket.set_mark(MARK_LEG)?;
                    socket.bind_device(Some(b"lo"))?;
                    socket.bind(&SockAddr::from(at(client, 0)))
                })
                .unwrap_or_else(|error| panic!("{client} → {pod}: {error}"));
            let (mut accepted, seen) = app.accept().expect("the app got it");
            assert_eq!(seen.ip(), client);
            assert_joined(&mut leg, &mut accepted);
        }
        proxy.assert_idle();
    });
}

#[test]
fn leg_of_a_pod_that_calls_itself_needs_no_detour() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        for pod in [POD4, POD6] {
            let app = lab.pod.listen(pod, 80);
            let mut leg = lab
                .pod
                .connect_with(at(pod, 80), |socket| {
                    set_transparent(socket, pod);
                    socket.set_mark(MARK_LEG)?;
                    socket.bind(&SockAddr::from(at(pod, 0)))
                })
                .unwrap_or_else(|error| panic!("{pod} → itself: {error}"));
            let (mut accepted, seen) = app.accept().expect("the app got it");
            assert_eq!(seen.ip(), pod);
            assert_joined(&mut leg, &mut accepted);
        }
        proxy.assert_idle();
    });
}

#[test]
fn without_a_listener_is_refused_or_passed_as_the_pod_says() {
    isolated(|lab| {
        let capture = lab.open();
        let apps = [POD4, POD6].map(|pod| lab.pod.listen(pod, 80));
        // An application may take the HBONE port; it must not be handed what peers encrypted for ztunnel.
        let squatters = [POD4, POD6].map(|pod| lab.pod.listen(pod, 15008));
        let (cookie, proxy) = lab.enrol(&capture, &lab.pod_capture());
        drop(proxy);
        for pod in [POD4, POD6] {
            for port in [80, 15008] {
                let error = lab.peer.connect(at(pod, port)).expect_err("no ztunnel, no connection");
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            }
        }
        let counters = capture.counters().expect("counters");
        assert_eq!((counters.dropped, counters.failed_open), (4, 0));

        let options = PodCapture { failure: FailureMode::Open, ..lab.pod_capture() };
        capture.enrol(cookie, &options, ebpf_loader::Phase::Captured).expect("an update");
        for (pod, app) in [POD4, POD6].into_iter().zip(apps) {
            lab.peer.connect(at(pod, 80)).expect("a direct connection");
            app.accept().expect("the app got it");
            let error = lab.peer.connect(at(pod, 15008)).expect_err("HBONE never reaches the application");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
        for squatter in squatters {
            squatter.set_nonblocking(true).expect("a socket option");
            assert_eq!(squatter.accept().expect_err("nothing arrives").kind(), ErrorKind::WouldBlock);
        }
    });
}

#[test]
fn follows_the_pods_addresses() {
    isolated(|lab| {
        let capture = lab.open();
        let (cookie, proxy) = lab.enrol(&capture, &lab.pod_capture());
        lab.pod.ip("addr add 10.55.0.3/24 dev eth0");
        let second: IpAddr = "10.55.0.3".parse().expect("an address");
        let leg = || {
            lab.pod.connect_with(at(second, 80), |socket| {
                set_transparent(socket, PEER4);
                socket.set_mark(MARK_LEG)?;
                socket.bind_device(Some(b"lo"))?;
                socket.bind(&SockAddr::from(at(PEER4, 0)))
            })
        };
        let app = lab.pod.listen(second, 80);
        let _looped = leg().expect("not known as the pod's: taken for captured traffic");
        assert_eq!(proxy.accept(Slot::Out4).1, at(second, 80));

        let options = PodCapture { addresses: vec![POD4, POD6, second], ..lab.pod_capture() };
        capture.enrol(cookie, &options, ebpf_loader::Phase::Captured).expect("an update");
        leg().expect("now it is");
        app.accept().expect("the app got it");
        // From one of its addresses to the other: the leg of a pod that calls itself.
        lab.pod
            .connect_with(at(second, 80), |socket| {
                socket.set_mark(MARK_LEG)?;
                socket.bind(&SockAddr::from(at(POD4, 0)))
            })
            .expect("its own business");
        assert_eq!(app.accept().expect("the app got it").1.ip(), POD4);
        proxy.assert_idle();
    });
}
