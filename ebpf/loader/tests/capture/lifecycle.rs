//! Enrolling, leaving, crashing, taking over, cleaning up.

use std::{
    fs,
    io::ErrorKind,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use ebpf_loader::{Phase, Slot, cookie_of, netns_cookie};

use crate::support::*;

#[test]
fn hbone_comes_before_capture() {
    isolated(|lab| {
        let capture = lab.open();
        let cookie = capture.attach_netns(lab.pod.fd.as_fd()).expect("sk_lookup attaches");
        let proxy = lab.proxy(&capture, cookie);
        capture.enrol(cookie, &lab.pod_capture(), Phase::HboneOnly).expect("the pod is enrolled");
        let app = lab.pod.listen(POD4, 80);
        let server = lab.peer.listen(PEER4, 80);

        let _tunnel = lab.peer.connect(at(POD4, 15008)).expect("ztunnel answers");
        proxy.accept(Slot::Hbone4);
        lab.peer.connect(at(POD4, 80)).expect("a direct connection");
        app.accept().expect("the app got it");
        lab.pod.connect(at(PEER4, 80)).expect("a direct connection");
        server.accept().expect("the server got it");
        proxy.assert_idle();

        capture.enrol(cookie, &lab.pod_capture(), Phase::Captured).expect("the next phase");
        let _in = lab.peer.connect(at(POD4, 80)).expect("ztunnel answers");
        proxy.accept(Slot::In4);
        let _out = lab.pod.connect(at(PEER4, 80)).expect("a captured connection");
        proxy.accept(Slot::Out4);
    });
}

#[test]
fn leaving_touches_no_open_connection_and_keeps_hbone() {
    isolated(|lab| {
        let capture = lab.open();
        let app = lab.pod.listen(POD4, 80);
        let mut before = lab.peer.connect(at(POD4, 80)).expect("a direct connection");
        let (mut before_app, _) = app.accept().expect("the app got it");

        let (cookie, proxy) = lab.enrol(&capture, &lab.pod_capture());
        assert_joined(&mut before, &mut before_app);
        let mut out = lab.pod.connect(at(SERVICE4, 80)).expect("a captured connection");
        let (mut out_proxy, _) = proxy.accept(Slot::Out4);
        let mut inbound = lab.peer.connect(at(POD4, 80)).expect("ztunnel answers");
        let (mut inbound_proxy, _) = proxy.accept(Slot::In4);

        capture.leave(cookie).expect("the pod leaves");
        assert_joined(&mut out, &mut out_proxy);
        assert_joined(&mut inbound, &mut inbound_proxy);
        let server = lab.peer.listen(PEER4, 80);
        lab.pod.connect(at(PEER4, 80)).expect("a direct connection");
        server.accept().expect("the server got it");
        lab.peer.connect(at(POD4, 80)).expect("a direct connection");
        app.accept().expect("the app got it");
        let _tunnel = lab.peer.connect(at(POD4, 15008)).expect("ztunnel still answers");
        proxy.accept(Slot::Hbone4);

        capture.detach(cookie).expect("the pod is out");
        assert_joined(&mut out, &mut out_proxy);
        assert_joined(&mut inbound, &mut inbound_proxy);
        assert_joined(&mut before, &mut before_app);
        let error = lab.peer.connect(at(POD4, 15008)).expect_err("nobody listens any more");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert!(capture.attached().expect("a list").is_empty());
        capture.detach(cookie).expect("twice is fine");
        capture.leave(cookie).expect("leaving without being there is fine");
    });
}

#[test]
fn crash_fails_closed_until_the_next_one_takes_over() {
    isolated(|lab| {
        let first = lab.open();
        let (cookie, proxy) = lab.enrol(&first, &lab.pod_capture());
        let _out = lab.pod.connect(at(SERVICE4, 80)).expect("a captured connection");
        proxy.accept(Slot::Out4);
        // All that a killed process leaves is what is pinned.
        drop((first, proxy));
        let refused = |result: std::io::Result<_>| {
            assert_eq!(result.map(|_| ()).expect_err("refused").kind(), ErrorKind::ConnectionRefused);
        };
        refused(lab.pod.connect(at(SERVICE4, 80)));
        refused(lab.peer.connect(at(POD4, 80)));

        let second = lab.open();
        assert_eq!(second.attached().expect("a list"), [cookie]);
        refused(lab.pod.connect(at(SERVICE4, 80)));
        let (again, proxy) = lab.enrol(&second, &lab.pod_capture());
        assert_eq!(again, cookie);
        let _out = lab.pod.connect(at(SERVICE4, 80)).expect("captured again");
        proxy.accept(Slot::Out4);
        let _in = lab.peer.connect(at(POD4, 80)).expect("ztunnel answers again");
        proxy.accept(Slot::In4);
        assert_eq!(second.counters().expect("counters").captured, 2, "counted on by the same maps");
        assert_eq!(second.collect_garbage(&[cookie]).expect("a clean-up"), []);
        let _out = lab.pod.connect(at(SERVICE4, 80)).expect("still captured");
        proxy.accept(Slot::Out4);
    });
}

#[test]
fn what_a_predecessor_wrote_is_known_and_replaced() {
    isolated(|lab| {
        let server = lab.peer.listen(PEER4, 80);
        let first = lab.open();
        let excluding =
            ebpf_loader::PodCapture { excluded: vec!["10.55.0.1".parse().expect("a prefix")], ..lab.pod_capture() };
        let (_, proxy) = lab.enrol(&first, &excluding);
        lab.pod.connect(at(PEER4, 80)).expect("excluded");
        server.accept().expect("the server got it");
        drop((first, proxy));

        let second = lab.open();
        let (_, proxy) = lab.enrol(&second, &lab.pod_capture());
        let _out = lab.pod.connect(at(PEER4, 80)).expect("no longer excluded");
        proxy.accept(Slot::Out4);
    });
}

#[test]
fn hand_over_refuses_nobody() {
    const CONNECTIONS: usize = 300;
    isolated(|lab| {
        let old = lab.open();
        let (_, old_proxy) = lab.enrol(&old, &lab.pod_capture());
        let (opened, finished) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let client = scope.spawn(|| {
                lab.pod.run(|| {
                    let mut errors = Vec::new();
                    for _ in 0..CONNECTIONS {
                        // The backlog of either listener takes them all; nobody needs to accept.
                        match std::net::TcpStream::connect_timeout(&at(SERVICE4, 80), PATIENCE) {
                            Ok(_) => opened.fetch_add(1, Ordering::SeqCst),
                            Err(error) => {
                                errors.push(error);
                                0
                            }
                        };
                    }
                    finished.store(true, Ordering::SeqCst);
                    errors
                })
            });
            // Both ztunnels drain their queues all the while, so that neither backlog fills.
            let drain = |proxy: &Proxy| while proxy.try_accept(Slot::Out4) {};
            while opened.load(Ordering::SeqCst) == 0 && !finished.load(Ordering::SeqCst) {
                drain(&old_proxy);
            }
            let new = lab.open();
            let (_, new_proxy) = lab.enrol(&new, &lab.pod_capture());
            while !finished.load(Ordering::SeqCst) {
                drain(&old_proxy);
                drain(&new_proxy);
            }
            let errors = client.join().expect("no panic");
            assert!(errors.is_empty(), "{} of {CONNECTIONS} failed: {:?}", errors.len(), errors.first());
            drain(&old_proxy);
            drop((old, old_proxy));
            drain(&new_proxy);
            let _out = lab.pod.connect(at(SERVICE4, 81)).expect("the new one is left");
            assert_eq!(new_proxy.accept(Slot::Out4).1, at(SERVICE4, 81));
        });
    });
}

#[test]
fn garbage_of_dead_and_forgotten_netns_is_collected() {
    isolated(|lab| {
        let capture = lab.open();
        let (pod, _proxy) = lab.enrol(&capture, &lab.pod_capture());
        let forgotten = Netns::new().expect("a netns");
        let forgotten_cookie = capture.attach_netns(forgotten.fd.as_fd()).expect("sk_lookup attaches");
        capture.enrol(forgotten_cookie, &lab.pod_capture(), Phase::Captured).expect("enrolled");
        let dead = Netns::new().expect("a netns");
        let dead_cookie = capture.attach_netns(dead.fd.as_fd()).expect("sk_lookup attaches");
        capture.enrol(dead_cookie, &lab.pod_capture(), Phase::Captured).expect("enrolled");
        drop(dead);
        // The kernel takes a netns apart in the background.
        let deadline = std::time::Instant::now() + PATIENCE;
        while capture.attached().expect("a list").contains(&dead_cookie) {
            assert!(std::time::Instant::now() < deadline, "the netns does not die");
            thread::yield_now();
        }

        let mut expected = vec![forgotten_cookie, dead_cookie];
        expected.sort_unstable();
        assert_eq!(capture.collect_garbage(&[pod, dead_cookie]).expect("a clean-up"), expected);
        assert_eq!(capture.attached().expect("a list"), [pod]);
        let pins: Vec<_> = fs::read_dir(lab.layout().join("netns")).expect("the pins").flatten().collect();
        assert_eq!(pins.len(), 1);
        assert_eq!(capture.collect_garbage(&[pod]).expect("a clean-up"), []);
        // It is out of the mesh: nothing is refused there.
        forgotten.ip("link set lo up");
        let app = forgotten.listen(std::net::Ipv4Addr::LOCALHOST.into(), 80);
        forgotten.connect(app.local_addr().expect("an address")).expect("its own business");
    });
}

/// What a build with another layout is: the same programs on other maps, pinned under another number.
fn pin_as_another_layout(lab: &Lab) -> std::path::PathBuf {
    let other = lab.bpffs.join("v9999");
    fs::rename(lab.layout(), &other).expect("pins can be moved");
    other
}

#[test]
fn another_layout_hands_over_without_a_gap_while_both_are_alive() {
    isolated(|lab| {
        let old = lab.open();
        let (cookie, old_proxy) = lab.enrol(&old, &lab.pod_capture());
        let other = pin_as_another_layout(lab);
        let new = lab.open();
        assert_eq!(new.attached().expect("a list"), [cookie], "it knows what the other one captured");
        let server = lab.peer.listen(PEER4, 80);

        // Not enrolled here yet: still the other one's.
        let mut before = lab.pod.connect(at(PEER4, 80)).expect("a captured connection");
        let (mut before_proxy, _) = old_proxy.accept(Slot::Out4);
        let _in = lab.peer.connect(at(POD4, 80)).expect("ztunnel answers");
        old_proxy.accept(Slot::In4);

        let (_, new_proxy) = lab.enrol(&new, &lab.pod_capture());
        let both_ways = || {
            for (service, pod, out, into, hbone) in [
                (PEER4, POD4, Slot::Out4, Slot::In4, Slot::Hbone4),
                (SERVICE6, POD6, Slot::Out6, Slot::In6, Slot::Hbone6),
            ] {
                let _out = lab.pod.connect(at(service, 80)).expect("a captured connection");
                new_proxy.accept(out);
                for (port, slot) in [(80, into), (15008, hbone)] {
                    let _in = lab.peer.connect(at(pod, port)).expect("ztunnel answers");
                    new_proxy.accept(slot);
                }
            }
        };
        both_ways();
        old_proxy.assert_idle();
        assert_joined(&mut before, &mut before_proxy);

        // The other one ends. Its hooks are still attached, and must not refuse for want of its listeners.
        drop((old, old_proxy));
        both_ways();
        assert_eq!(new.collect_garbage(&[cookie]).expect("a clean-up"), []);
        assert!(!other.exists());
        both_ways();
        server.set_nonblocking(true).expect("a socket option");
        assert_eq!(server.accept().expect_err("nothing went in clear").kind(), ErrorKind::WouldBlock);
    });
}

#[test]
fn what_a_dead_build_with_another_layout_captured_stays_closed_until_it_is_taken_over() {
    isolated(|lab| {
        let old = lab.open();
        let (_, old_proxy) = lab.enrol(&old, &lab.pod_capture());
        drop((old, old_proxy));
        pin_as_another_layout(lab);
        let new = lab.open();
        let server = lab.peer.listen(PEER4, 80);
        let app = lab.pod.listen(POD4, 80);
        for (from, to) in [(&lab.pod, at(PEER4, 80)), (&lab.peer, at(POD4, 80))] {
            assert_eq!(from.connect(to).expect_err("refused").kind(), ErrorKind::ConnectionRefused);
        }
        let (_, proxy) = lab.enrol(&new, &lab.pod_capture());
        let _out = lab.pod.connect(at(PEER4, 80)).expect("captured at once");
        proxy.accept(Slot::Out4);
        let _in = lab.peer.connect(at(POD4, 80)).expect("ztunnel answers at once");
        proxy.accept(Slot::In4);
        for listener in [server, app] {
            listener.set_nonblocking(true).expect("a socket option");
            assert_eq!(listener.accept().expect_err("nothing went in clear").kind(), ErrorKind::WouldBlock);
        }
    });
}

#[test]
fn what_was_found_in_a_netns_outlives_all_but_being_forgotten() {
    isolated(|lab| {
        let first = lab.open();
        let (cookie, _proxy) = lab.enrol(&first, &lab.pod_capture());
        assert_eq!(first.remember(cookie, 0b101).expect("kept"), 0b101);
        drop(first);
        let second = lab.open();
        assert_eq!(second.remember(cookie, 0).expect("kept"), 0b101, "the first one's, not what we made of it");
        second.detach(cookie).expect("the pod is out");
        assert_eq!(second.remember(cookie, 0).expect("kept"), 0b101);
        second.forget_found(cookie).expect("forgotten");
        assert_eq!(second.remember(cookie, 0b10).expect("kept"), 0b10);
        assert_eq!(second.collect_garbage(&[]).expect("a clean-up"), [cookie]);
        assert_eq!(second.remember(cookie, 0).expect("kept"), 0);
    });
}

#[test]
fn pins_of_dead_netns_are_collected_while_running() {
    isolated(|lab| {
        let capture = lab.open();
        let (cookie, _proxy) = lab.enrol(&capture, &lab.pod_capture());
        let dying = Netns::new().expect("a netns");
        let dead = capture.attach_netns(dying.fd.as_fd()).expect("sk_lookup attaches");
        capture.enrol(dead, &lab.pod_capture(), Phase::Captured).expect("it is enrolled");
        drop(dying);
        let end = std::time::Instant::now() + PATIENCE;
        // The kernel takes a namespace down in its own time.
        while capture.collect_dead().expect("a list") != [dead] {
            assert!(std::time::Instant::now() < end, "the netns does not die");
            thread::yield_now();
        }
        assert_eq!(fs::read_dir(lab.layout().join("netns")).expect("the pins").count(), 1);
        assert!(capture.is_attached(cookie).expect("a link"));
    });
}

#[test]
fn steering_and_listeners_that_are_gone_are_seen_and_put_back() {
    isolated(|lab| {
        let capture = lab.open();
        let (cookie, proxy) = lab.enrol(&capture, &lab.pod_capture());
        assert_eq!(capture.listening().expect("a list").len(), 6);
        capture.clear_listener(cookie, Slot::In4).expect("emptied");
        assert!(!capture.listening().expect("a list").contains(&(cookie, Slot::In4)));

        fs::remove_file(lab.layout().join("netns").join(cookie.to_string())).expect("the link is gone with its pin");
        assert!(!capture.is_attached(cookie).expect("no link"));
        capture.attach_netns(lab.pod.fd.as_fd()).expect("attached again");
        assert!(capture.is_attached(cookie).expect("a link"));
        let _in = lab.peer.connect(at(POD6, 80)).expect("ztunnel answers");
        proxy.accept(Slot::In6);
    });
}

#[test]
fn pins_of_another_layout_are_collected() {
    isolated(|lab| {
        let capture = lab.open();
        fs::create_dir_all(lab.bpffs.join("v0/links")).expect("a directory");
        fs::create_dir_all(lab.bpffs.join("somebody-elses")).expect("a directory");
        capture.collect_garbage(&[]).expect("a clean-up");
        assert!(!lab.bpffs.join("v0").exists());
        assert!(lab.bpffs.join("somebody-elses").exists());
    });
}

#[test]
fn destroy_leaves_nothing_and_lets_everything_through() {
    isolated(|lab| {
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        capture.capture_dns().expect("the hook attaches");
        drop(proxy);
        capture.destroy().expect("everything goes");
        let server = lab.peer.listen(PEER4, 80);
        lab.pod.connect(at(PEER4, 80)).expect("a direct connection");
        server.accept().expect("the server got it");
        assert_eq!(fs::read_dir(&lab.bpffs).expect("the directory").count(), 0);
    });
}

#[test]
fn cookies_agree_and_differ() {
    isolated(|lab| {
        let pod = cookie_of(lab.pod.fd.as_fd()).expect("a cookie");
        let listener = lab.pod.listen(POD4, 80);
        assert_eq!(netns_cookie(listener.as_fd()).expect("a cookie"), pod);
        assert_ne!(cookie_of(lab.peer.fd.as_fd()).expect("a cookie"), pod);
    });
}
