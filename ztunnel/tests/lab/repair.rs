//! A pod with NET_ADMIN breaks its own capture: what is put back, how soon, and what got out meanwhile.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ebpf_loader::{Slot, cookie_of};
use std::os::fd::AsFd;

use crate::support::*;

const PODS: [Pod; 2] = [('a', "client"), ('b', "server")];
/// What a user is promised.
const SOON: Duration = Duration::from_secs(1);
/// What a crowded machine may add to it before a test says that nothing was repaired at all.
const SLACK: Duration = Duration::from_secs(4);
/// What the kernel does not tell is looked at now and then (`node/keep.rs`).
const LOOKS: Duration = Duration::from_secs(9);

/// Breaks something in `client`, and expects it mended soon and counted under `what`.
#[track_caller]
fn assert_repaired(lab: &Lab, what: &str, breakage: &str, is_whole: impl Fn() -> bool) {
    let script =
        breakage.replace("IP", &format!("ip -n {}-client", lab.name)).replace("PINS", &lab.pins.display().to_string());
    assert_repaired_after(lab, what, breakage, || drop(run(&script)), is_whole);
}

#[track_caller]
fn assert_repaired_after(lab: &Lab, what: &str, breakage: &str, act: impl Fn(), is_whole: impl Fn() -> bool) {
    let label = format!("what=\"{what}\"");
    let parts = ["ztunnel_capture_repairs_total", label.as_str()];
    let before = lab.metric('a', &parts).unwrap_or(0.0);
    assert!(is_whole(), "before: {breakage}");
    act();
    let told = ["rule", "route", "link"].contains(&what);
    let patience = SOON + SLACK + if told { Duration::ZERO } else { LOOKS };
    let started = Instant::now();
    within(patience, breakage, &is_whole);
    let took = started.elapsed();
    eprintln!("repaired after {took:?}: {breakage}");
    within(SOON + SLACK, "the repair is counted", || lab.metric('a', &parts).unwrap_or(0.0) > before);
}

#[test]
fn what_a_pod_breaks_of_its_capture_is_put_back_and_counted() {
    if !possible(&["nsenter"]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    for node in ['a', 'b'] {
        lab.configure(node, &Mesh::default());
    }
    serve_in(&lab.netns("server"));
    let (sysctl, reflect) = ("/proc/sys/net/ipv4/tcp_fwmark_accept", "/proc/sys/net/ipv4/fwmark_reflect");
    let path = lab.netns("client");
    let read = |name: &str| inside(&path, || std::fs::read_to_string(name).expect("a sysctl"));
    // Not the kernel's defaults: what was found is what has to come back in the end.
    run(&format!("nsenter --net={} sh -c 'echo 1 > {reflect}'", lab.netns("client").display()));
    let (name, netns) = (lab.name.clone(), lab.netns("client").display().to_string());
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    let [server, server6] = lab.addresses("server");
    let [client, client6] = lab.addresses("client");
    let said = |from: &str| Ok(format!("{from} {MARKER}"));
    assert_eq!(lab.call("client", &server, APP_PORT), said(&client));

    let rules = |family: &str| run(&format!("ip -n {name}-client {family} rule"));
    let routes =
        |family: &str| run(&format!("ip -n {name}-client {family} route show table 15000 2>/dev/null || true"));
    let has_rules = |family: &str| {
        let rules = rules(family);
        rules.matches("lookup 15000").count() == 2 && rules.contains("dport 53") && rules.contains("lookup main")
    };
    let has_route = |family: &str| {
        let routes = routes(family);
        routes.lines().count() == 1 && routes.contains("local default dev lo") && routes.contains("src")
    };
    let wire = Wire::watch(&lab.netns("br"));
    for (family, to, from) in [("-4", &server, &client), ("-6", &server6, &client6)] {
        // `flush` takes the rule of the main table as well, and nothing has a way out.
        assert_repaired(&lab, "rule", &format!("IP {family} rule flush"), || has_rules(family));
        assert_repaired(&lab, "rule", &format!("IP {family} rule del pref 100"), || has_rules(family));
        assert_repaired(&lab, "route", &format!("IP {family} route flush table 15000"), || has_route(family));
        let other = format!("IP {family} route replace default dev eth0 table 15000");
        assert_repaired(&lab, "route", &other, || has_route(family));
        assert_eq!(lab.call("client", to, APP_PORT), said(from));
    }
    let up = || has_route("-4") && has_route("-6") && run(&format!("ip -n {name}-client link show lo")).contains("UP");
    assert_repaired(&lab, "link", "IP link set lo down", up);
    assert_repaired(&lab, "sysctl", &format!("nsenter --net={netns} sh -c 'echo 0 > {sysctl}'"), || {
        read(sysctl).trim() == "1"
    });
    assert_repaired(&lab, "steering", "rm PINS/a/v*/netns/*", || {
        run(&format!("ls {}/a/v*/netns | wc -l", lab.pins.display())).trim() == "1"
    });
    // No pod can do this: somebody who plays with the map.
    let capture = lab.capture('a');
    let cookie = cookie_of(std::fs::File::open(&path).expect("the namespace").as_fd()).expect("its cookie");
    for slot in [Slot::Out4, Slot::Out6, Slot::In4, Slot::Hbone4, Slot::Dns4] {
        let filled = || capture.listening().expect("the map").contains(&(cookie, slot));
        let empty = || capture.clear_listener(cookie, slot).expect("the map");
        assert_repaired_after(&lab, "listener", &format!("{slot:?} emptied"), empty, filled);
    }
    drop(capture);
    assert_eq!(lab.call("client", &server, APP_PORT), said(&client));
    assert_eq!(lab.call("client", &server6, APP_PORT), said(&client6));
    let (ports, marker) = wire.end();
    assert!(!marker && ports.iter().all(|port| *port == 15008), "{ports:?}");

    // Our own repairs are no reason for more.
    let repairs = || -> BTreeSet<String> {
        let metrics = lab.http('a', 15020, "/metrics");
        metrics.lines().filter(|l| l.starts_with("ztunnel_capture_repairs_total")).map(str::to_owned).collect()
    };
    let before = repairs();
    let looked = Instant::now();
    while looked.elapsed() < 2 * SOON {
        assert_eq!(lab.call("client", &server, APP_PORT), said(&client));
    }
    assert_eq!(repairs(), before);

    // It leaves, after another ztunnel has come in between: sysctls are what they were before the first one.
    lab.kill_ztunnel('a');
    lab.start_ztunnel('a');
    lab.configure('a', &Mesh { left: "client", ..Mesh::default() });
    eventually("rules are gone", || !rules("-4").contains("15000") && !rules("-6").contains("15000"));
    eventually("sysctls are as they were", || (read(sysctl).trim(), read(reflect).trim()) == ("0", "1"));
}

/// While somebody flushes the rules again and again: how much of what is sent meanwhile is to be read on the wire.
#[test]
fn a_pod_that_fights_against_its_capture_harms_itself_alone() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    for node in ['a', 'b'] {
        lab.configure(node, &Mesh::default());
    }
    serve_in(&lab.netns("server"));
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    let [server, _] = lab.addresses("server");
    eventually("the fight is told", || {
        run(&format!("ip -n {}-client rule del pref 100 || true", lab.name));
        let _ = lab.call("client", &server, APP_PORT);
        lab.log('a').contains("again and again")
    });
    assert_eq!(lab.log('a').matches("again and again").count(), 1);
    // The other side is no party to it: plaintext that got out is captured there and judged without an identity.
    eventually("the pod is whole again", || lab.call("client", &server, APP_PORT).is_ok());
}
