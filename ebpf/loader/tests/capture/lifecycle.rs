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
        let pins: Vec<_> = fs::read_dir(lab.bpffs.join("v1/netns")).expect("the pins").flatten().collect();
        assert_eq!(pins.len(), 1);
        assert_eq!(capture.collect_garbage(&[pod]).expect("a clean-up"), []);
        // It is out of the mesh: nothing is refused there.
        forgotten.ip("link set lo up");
        let app = forgotten.listen(std::net::Ipv4Addr::LOCALHOST.into(), 80);
        forgotten.connect(app.local_addr().expect("an address")).expect("its own business");
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
