//! The kubelet's probes: from the node, at the ports that were named, and nothing else.

use std::{net::IpAddr, os::fd::AsFd};

use ebpf_loader::{
    PodCapture, Slot,
    abi::{PROBE_SOURCE4, PROBE_SOURCE6},
};
use socket2::SockAddr;

use crate::support::*;

const NAMED: u16 = 8080;
const OTHER: u16 = 80;

fn sources() -> [(IpAddr, IpAddr, IpAddr, Slot); 2] {
    [(POD4, PEER4, PROBE_SOURCE4.into(), Slot::In4), (POD6, PEER6, PROBE_SOURCE6.into(), Slot::In6)]
}

/// The peer becomes the node, as far as addresses are concerned.
fn give_addresses(lab: &Lab) {
    for (_, _, source, _) in sources() {
        let length = if source.is_ipv4() { "32" } else { "128 nodad" };
        lab.peer.ip(&format!("addr add {source}/{length} dev lo"));
    }
}

fn probed(lab: &Lab) -> PodCapture {
    PodCapture { probe_ports: vec![NAMED], ..lab.pod_capture() }
}

#[test]
fn from_the_host_reaches_the_application_at_named_ports_only() {
    isolated(|lab| {
        give_addresses(lab);
        let capture = lab.open();
        capture.set_host(lab.peer.fd.as_fd()).expect("a host");
        let (cookie, proxy) = lab.enrol(&capture, &probed(lab));
        for (pod, node, source, plain) in sources() {
            let app = lab.pod.listen(pod, NAMED);
            let mut probe = lab.peer.connect(at(pod, NAMED)).expect("the application answers");
            let (mut accepted, seen) = app.accept().expect("the app got it");
            assert_eq!(seen.ip(), source);
            assert_joined(&mut probe, &mut accepted);
            // The same caller, elsewhere in the pod: ordinary traffic under its ordinary name.
            let _other = lab.peer.connect(at(pod, OTHER)).expect("ztunnel answers");
            let (accepted, _) = proxy.accept(plain);
            assert_eq!(accepted.peer_addr().expect("a client").ip(), node);
        }
        proxy.assert_idle();

        // Nothing is named any more.
        capture.enrol(cookie, &lab.pod_capture(), ebpf_loader::Phase::Captured).expect("the pod changes");
        for (pod, _, _, plain) in sources() {
            let _plain = lab.peer.connect(at(pod, NAMED)).expect("ztunnel answers");
            proxy.accept(plain);
        }
    });
}

#[test]
fn from_an_ipv6_socket_to_an_ipv4_pod_works() {
    isolated(|lab| {
        give_addresses(lab);
        let capture = lab.open();
        capture.set_host(lab.peer.fd.as_fd()).expect("a host");
        let (_, proxy) = lab.enrol(&capture, &probed(lab));
        let app = lab.pod.listen(POD4, NAMED);
        let IpAddr::V4(pod) = POD4 else { unreachable!("an IPv4 address") };
        let _probe = lab.peer.connect(at(pod.to_ipv6_mapped().into(), NAMED)).expect("the application answers");
        assert_eq!(app.accept().expect("the app got it").1.ip(), IpAddr::from(PROBE_SOURCE4));
        proxy.assert_idle();
    });
}

#[test]
fn from_elsewhere_is_no_probe() {
    isolated(|lab| {
        give_addresses(lab);
        let capture = lab.open();
        // Traffic the node forwards has the node's address and was not opened in its netns; here nobody is the host.
        let (_, proxy) = lab.enrol(&capture, &probed(lab));
        for (pod, node, _, plain) in sources() {
            let _app = lab.pod.listen(pod, NAMED);
            let _plain = lab.peer.connect(at(pod, NAMED)).expect("ztunnel answers");
            let (accepted, _) = proxy.accept(plain);
            assert_eq!(accepted.peer_addr().expect("a client").ip(), node);
        }
        proxy.assert_idle();
    });
}

#[test]
fn with_a_borrowed_address_gets_no_further_than_the_named_ports() {
    isolated(|lab| {
        give_addresses(lab);
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &probed(lab));
        for (pod, _, source, plain) in sources() {
            let _app = lab.pod.listen(pod, OTHER);
            for (port, slot) in [(OTHER, plain), (15008, if plain == Slot::In4 { Slot::Hbone4 } else { Slot::Hbone6 })]
            {
                let borrowed = |socket: &socket2::Socket| socket.bind(&SockAddr::from(at(source, 0)));
                let _spoofed = lab.peer.connect_with(at(pod, port), borrowed).expect("ztunnel answers");
                proxy.accept(slot);
            }
        }
        proxy.assert_idle();
    });
}

#[test]
fn of_a_process_that_chose_its_address_is_ordinary_traffic() {
    isolated(|lab| {
        give_addresses(lab);
        let capture = lab.open();
        capture.set_host(lab.peer.fd.as_fd()).expect("a host");
        let (_, proxy) = lab.enrol(&capture, &probed(lab));
        for (pod, node, _, plain) in sources() {
            let chosen = |socket: &socket2::Socket| {
                // Leaves the port open, so that binding once more would work.
                set_option(socket.as_fd(), libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
                socket.bind(&SockAddr::from(at(node, 0)))
            };
            let _plain = lab.peer.connect_with(at(pod, NAMED), chosen).expect("ztunnel answers");
            assert_eq!(proxy.accept(plain).0.peer_addr().expect("a client").ip(), node);
        }
        proxy.assert_idle();
    });
}

#[test]
fn of_a_node_without_the_addresses_is_ordinary_traffic() {
    isolated(|lab| {
        let capture = lab.open();
        capture.set_host(lab.peer.fd.as_fd()).expect("a host");
        let (_, proxy) = lab.enrol(&capture, &probed(lab));
        let _app = lab.pod.listen(POD4, NAMED);
        let _plain = lab.peer.connect(at(POD4, NAMED)).expect("ztunnel answers");
        proxy.accept(Slot::In4);
    });
}

#[test]
fn of_a_pod_that_took_over_the_address_survives_the_one_before() {
    isolated(|lab| {
        give_addresses(lab);
        let capture = lab.open();
        capture.set_host(lab.peer.fd.as_fd()).expect("a host");
        let before = Netns::new().expect("a netns");
        let old = capture.attach_netns(before.fd.as_fd()).expect("sk_lookup attaches");
        capture.enrol(old, &probed(lab), ebpf_loader::Phase::Captured).expect("enrolled");
        let (_, proxy) = lab.enrol(&capture, &probed(lab));
        capture.detach(old).expect("the one before is out");
        let app = lab.pod.listen(POD4, NAMED);
        let _probe = lab.peer.connect(at(POD4, NAMED)).expect("the application answers");
        app.accept().expect("the app got it");
        proxy.assert_idle();
    });
}
