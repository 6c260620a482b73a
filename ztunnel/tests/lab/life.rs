//! What becomes of connections when a pod joins, when it leaves, and when ztunnel dies: those that are open, those that
//! were captured before, and new ones; both ways, over both families, to a pod of the same node and of another.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::support::*;

const PODS: [Pod; 4] = [('a', "pod"), ('a', "near"), ('b', "far"), ('b', "aside")];

/// Who calls whom, seen from `pod`, which joins and leaves: to and from its own node and another.
const PAIRS: [(&str, &str); 4] = [("pod", "near"), ("near", "pod"), ("pod", "far"), ("far", "pod")];

fn mesh(pod: &str) -> Mesh<'_> {
    Mesh { left: pod, ..Mesh::default() }
}

/// A connection of each pair and family, with what its server has to say.
fn hold_all(lab: &Lab) -> Vec<(String, Held, String)> {
    let mut held = Vec::new();
    for (from, to) in PAIRS {
        for (source, destination) in lab.addresses(from).into_iter().zip(lab.addresses(to)) {
            held.push((format!("{from} → {destination}"), lab.hold(from, &destination), format!("{source} {MARKER}")));
        }
    }
    held
}

#[track_caller]
fn assert_alive(when: &str, held: &mut [(String, Held, String)]) {
    for (name, connection, answer) in held {
        assert_eq!(connection.ask(), *answer, "{name}, {when}");
    }
}

fn call_all(lab: &Lab) -> Vec<(String, Result<String, String>, String)> {
    let mut said = Vec::new();
    for (from, to) in PAIRS {
        for (source, destination) in lab.addresses(from).into_iter().zip(lab.addresses(to)) {
            let answer = lab.call(from, &destination, APP_PORT);
            said.push((format!("{from} → {destination}"), answer, format!("{source} {MARKER}")));
        }
    }
    said
}

#[track_caller]
fn assert_new(when: &str, lab: &Lab) {
    for (name, answer, expected) in call_all(lab) {
        assert_eq!(answer, Ok(expected), "{name}, {when}");
    }
}

#[test]
fn open_captured_and_new_connections_live_through_join_leave_and_fail_with_a_crash() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    lab.configure('a', &mesh("pod"));
    lab.configure('b', &mesh("pod"));
    for pod in ["pod", "near", "far"] {
        serve_in(&lab.netns(pod));
    }
    lab.start_ztunnel_with('a', 15000, 1);
    lab.start_ztunnel('b');
    let join = |lab: &Lab| {
        lab.reconfigure('a', &mesh(""));
        lab.reconfigure('b', &mesh(""));
    };
    let enrolled = |lab: &Lab, times| {
        eventually("pod is captured", || lab.log('a').matches("\tenrolled").count() == times);
    };

    // Enrol. Open: untouched. New: captured, and nothing to be read.
    let mut open = hold_all(&lab);
    assert_alive("before it joins", &mut open);
    join(&lab);
    enrolled(&lab, 2);
    assert_alive("after it has joined", &mut open);
    let wire = Wire::watch(&lab.netns("br"));
    assert_new("after it has joined", &lab);
    let (ports, marker) = wire.end();
    assert!(!marker && ports.iter().all(|p| *p == 15008), "what is new is captured: {ports:?}");

    // Un-enrol. Open: untouched. Captured before: live on through ztunnel. New: direct.
    let mut captured = hold_all(&lab);
    assert_alive("captured", &mut captured);
    // As the control plane does: peers hear of it first.
    lab.reconfigure('b', &mesh("pod"));
    lab.reconfigure('a', &mesh("pod"));
    eventually("pod leaves", || lab.log('a').matches("\tleaving").count() == 1);
    assert_alive("open since before it joined, after it has left", &mut open);
    assert_alive("captured, after it has left", &mut captured);
    assert_new("after it has left", &lab);
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(
        lab.call("pod", &lab.addresses("near")[0], APP_PORT),
        Ok(format!("{} {MARKER}", lab.addresses("pod")[0]))
    );
    let (_, marker) = wire.end();
    assert!(marker, "what is new goes direct");

    // It joins again while its connections of the first time are still there.
    join(&lab);
    enrolled(&lab, 3);
    assert_alive("open, after it has joined again", &mut open);
    assert_alive("captured the first time, after it has joined again", &mut captured);
    assert_new("after it has joined again", &lab);

    // It leaves again: the second stay needs the rules no more, connections of the first still do.
    lab.reconfigure('b', &mesh("pod"));
    lab.reconfigure('a', &mesh("pod"));
    let steered = || run(&format!("find {} -path '*/netns/*' | wc -l", lab.pins.join("a").display())).trim().to_owned();
    eventually("nothing of it is steered any more", || steered() == "1");
    let wire = Wire::watch(&lab.netns("br"));
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        assert_alive("captured the first time, after it has left again", &mut captured);
    }
    let (ports, marker) = wire.end();
    assert!(!marker && ports.iter().all(|p| *p == 15008), "still captured: {ports:?}");
    join(&lab);
    enrolled(&lab, 4);
    assert_alive("captured the first time, after it has joined for the third time", &mut captured);

    // Crash. Open: untouched. Captured before: cut. New: refused at once, and nothing leaves in clear text.
    // Those with `near`, which was captured all along, came by its ztunnel from the first.
    open.drain(..4);
    let wire = Wire::watch(&lab.netns("br"));
    lab.kill_ztunnel('a');
    let started = Instant::now();
    for (name, answer, _) in call_all(&lab) {
        assert!(answer.is_err(), "{name}: {answer:?}");
    }
    assert!(started.elapsed() < Duration::from_secs(20), "refused, not timed out: {:?}", started.elapsed());
    for (name, connection, _) in &mut captured {
        assert_eq!(connection.ask(), "", "{name}");
    }
    let (_, marker) = wire.end();
    assert!(!marker, "nothing leaves in clear text");
    assert_alive("open, after the crash", &mut open);
    lab.start_ztunnel('a');
    assert_new("after the next one has come", &lab);
    assert_alive("open, after the next one has come", &mut open);
}

/// A lab with all pods in the mesh, `far` serving, and a ztunnel on each node.
fn all_in() -> Lab {
    let mut lab = Lab::up(&PODS);
    for node in ['a', 'b'] {
        lab.configure(node, &Mesh::default());
    }
    serve_in(&lab.netns("far"));
    lab.start_ztunnel('b');
    lab.start_ztunnel('a');
    lab
}

/// Rules for captured connections in a pod's namespace.
fn rules(lab: &Lab, pod: &str) -> usize {
    run(&format!("ip -n {}-{pod} rule", lab.name)).matches("lookup 15000").count()
}

#[test]
fn a_pod_that_left_while_no_ztunnel_was_there_is_released_altogether() {
    if !possible(&[]) {
        return;
    }
    let mut lab = all_in();
    let netns = lab.netns("pod");
    let sysctl = || {
        inside(&netns, || fs::read_to_string("/proc/sys/net/ipv4/tcp_fwmark_accept").expect("a sysctl"))
            .trim()
            .to_owned()
    };
    assert_eq!((rules(&lab, "pod"), rules(&lab, "near"), sysctl().as_str()), (2, 2, "1"));
    lab.kill_ztunnel('a');
    lab.configure('a', &mesh("pod"));
    lab.configure('b', &mesh("pod"));
    lab.start_ztunnel_with('a', 15000, 1);
    eventually("its rules are gone", || rules(&lab, "pod") == 0);
    eventually("its sysctls are as they were", || sysctl() == "0");
    assert_eq!(rules(&lab, "near"), 2, "that one stays");
    let [here, _] = lab.addresses("pod");
    assert_eq!(lab.call("pod", &lab.addresses("far")[0], APP_PORT), Ok(format!("{here} {MARKER}")));
}

#[test]
fn a_successor_that_dies_after_it_has_claimed_the_node_leaves_it_to_the_one_before() {
    if !possible(&[]) {
        return;
    }
    let mut lab = all_in();
    let pins = lab.pins.join("a");
    let marks = || run(&format!("ls {} | grep current_ || true", pins.display()));
    let mut held = lab.hold("pod", &lab.addresses("far")[0]);
    let answer = format!("{} {MARKER}", lab.addresses("pod")[0]);
    assert_eq!(held.ask(), answer);
    let first = marks();
    lab.start_ztunnel_on('a', 16000);
    eventually("the successor has claimed the node", || marks() != first && marks().lines().count() == 1);
    let (node, mut successor) = lab.ztunnels.pop().expect("the successor runs");
    assert_eq!(node, 'a');
    successor.kill().expect("killed");
    successor.wait().expect("reaped");
    within(Duration::from_secs(5), "the node is served again", || {
        lab.call("pod", &lab.addresses("far")[0], APP_PORT) == Ok(answer.clone())
    });
    assert_eq!(held.ask(), answer, "what the first one had open was never touched");
    assert_eq!(lab.metric('a', &["ztunnel_takeovers_undone_total"]), Some(1.0));
    // And it can be succeeded again.
    lab.start_ztunnel_on('a', 17000);
    lab.retire_ztunnel('a');
    assert_eq!(lab.call("pod", &lab.addresses("far")[0], APP_PORT), Ok(answer));
}

/// A leg has its client's address: on a port of the client's it would take a plain connection's packets.
#[test]
fn last_legs_keep_out_of_the_ports_that_clients_use() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    for node in ['a', 'b'] {
        lab.configure(node, &mesh("aside"));
        serve_in(&lab.netns(if node == 'a' { "near" } else { "far" }));
    }
    lab.start_ztunnel('a');
    lab.start_ztunnel_with('b', 15000, 1);
    let mut held: Vec<Held> =
        ["pod", "aside"].iter().flat_map(|from| lab.addresses("far").map(|to| lab.hold(from, &to))).collect();
    assert!(
        held.iter_mut().all(|held| held.ask().ends_with(MARKER)),
        "by tunnel and in plain text, over both families"
    );
    let table = inside(&lab.netns("far"), || fs::read_to_string("/proc/thread-self/net/tcp6").expect("the table"));
    let application = format!(":{APP_PORT:04X}");
    let peers: Vec<u16> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[1].ends_with(&application) && fields[3] == "01")
        .map(|fields| u16::from_str_radix(fields[2].rsplit(':').next().expect("a port"), 16).expect("hexadecimal"))
        .collect();
    let (legs, clients): (Vec<u16>, Vec<u16>) = peers.into_iter().partition(|port| (20_000..32_768).contains(port));
    // The transparent ends of plain connections are seen as well, those of IPv4 in the other table.
    assert_eq!((legs.len(), clients.len()), (4, 1), "{table}");
}

#[test]
fn a_pod_that_fails_open_goes_direct_without_a_ztunnel() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let open = Mesh { options: vec![("pod", ", failureMode: Open".into())], ..Mesh::default() };
    // The other node's pods are plain: what comes back must not depend on a ztunnel that is not there.
    lab.configure('a', &open);
    serve_in(&lab.netns("pod"));
    let plain = lab.netns("far");
    serve_in(&plain);
    lab.start_ztunnel('a');
    lab.kill_ztunnel('a');
    for (n, from) in lab.addresses("pod").into_iter().enumerate() {
        let far = &lab.addresses("far")[n];
        assert_eq!(lab.call("pod", far, APP_PORT), Ok(format!("{from} {MARKER}")), "out");
        assert_eq!(lab.call("far", &from, APP_PORT), Ok(format!("{far} {MARKER}")), "in");
        let near = &lab.addresses("near")[n];
        assert!(lab.call("near", far, APP_PORT).is_err(), "its neighbour {near} fails closed");
    }
}

/// Dual stack comes in two steps, as when the second address is late.
#[test]
fn a_family_that_comes_after_the_pod_has_joined_is_captured() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let [v4, v6] = lab.addresses("pod");
    let only = |address: &str| Mesh { addresses: vec![("pod", address.to_owned())], ..Mesh::default() };
    lab.configure('a', &only(&format!("\"{v4}\"")));
    lab.configure('b', &mesh(""));
    serve_in(&lab.netns("pod"));
    serve_in(&lab.netns("far"));
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    let [far4, far6] = lab.addresses("far");
    assert_eq!(lab.call("pod", &far4, APP_PORT), Ok(format!("{v4} {MARKER}")));
    assert!(lab.call("pod", &far6, APP_PORT).is_err(), "no listener for the family: refused, not in clear text");
    lab.reconfigure('a', &mesh(""));
    eventually("the pod's second family is captured", || lab.call("pod", &far6, APP_PORT).is_ok());
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("pod", &far6, APP_PORT), Ok(format!("{v6} {MARKER}")));
    assert_eq!(lab.call("far", &v6, APP_PORT), Ok(format!("{far6} {MARKER}")));
    assert_eq!(lab.call("pod", &far4, APP_PORT), Ok(format!("{v4} {MARKER}")));
    let (ports, marker) = wire.end();
    assert!(!marker && ports.iter().all(|p| *p == 15008), "{ports:?}");
}

#[test]
fn exclusions_go_direct_and_everything_else_through_the_mesh() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let [far4, _] = lab.addresses("far");
    let demand = "{name: demand, namespace: shop, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/far}]}]]]}";
    let excluded = format!(", excludedDestinations: [\"{far4}/32\"], excludedInboundPorts: [{APP_PORT}]");
    lab.configure('a', &Mesh { policies: demand, options: vec![("pod", excluded)], ..mesh("") });
    lab.configure('b', &mesh(""));
    for pod in ["pod", "near", "far"] {
        serve_in(&lab.netns(pod));
    }
    lab.env = vec![("EXCLUDED_PORTS", "9".into())];
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    assert!(lab.http('a', 15000, "/config_dump").contains("excludedPorts"));
    let ports_of = |from: &str, to: &str, port| {
        let wire = Wire::watch(&lab.netns("br"));
        let answer = lab.call(from, to, port);
        (answer.is_ok(), wire.end().0)
    };
    let direct = |seen: &[u16], port| seen.contains(&port);
    let (answered, ports) = ports_of("pod", &far4, APP_PORT);
    assert!(answered && direct(&ports, APP_PORT) && !direct(&ports, 15008), "a destination by prefix: {ports:?}");
    let (answered, ports) = ports_of("pod", &lab.addresses("far")[1], APP_PORT);
    assert!(answered && direct(&ports, 15008) && !direct(&ports, APP_PORT), "its other address: {ports:?}");
    let (answered, ports) = ports_of("near", &far4, APP_PORT);
    assert!(answered && direct(&ports, 15008) && !direct(&ports, APP_PORT), "another pod: {ports:?}");
    for pod in ["pod", "near"] {
        let (answered, ports) = ports_of(pod, &lab.addresses("aside")[0], 9);
        assert!(!answered && direct(&ports, 9), "a port, for all pods of the node: {ports:?}");
    }
    // Plaintext to an excluded port reaches the application, whatever policy says; to its neighbour's it does not.
    let [pod4, _] = lab.addresses("pod");
    assert_eq!(lab.call("far", &pod4, APP_PORT), Ok(format!("{far4} {MARKER}")), "HBONE goes on");
    run(&format!("ip -n {}-br addr add 10.77.99.1/16 dev br0", lab.name));
    let plain = |pod: &str| {
        let to = (lab.addresses(pod)[0].clone(), APP_PORT);
        inside(&lab.netns("br"), || {
            let mut stream = TcpStream::connect((to.0.as_str(), to.1)).expect("somebody answers");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            let _ = stream.write_all(MARKER.as_bytes());
            matches!(stream.read(&mut [0; 64]), Ok(1..))
        })
    };
    assert!(plain("pod"), "excluded");
    assert!(!plain("near"), "captured, and without an identity");
}

/// Somebody in the pod who finds ztunnel's listeners on loopback gets nothing from them.
#[test]
fn dialling_ztunnels_own_listeners_is_closed_and_counted() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    lab.configure('a', &mesh(""));
    lab.start_ztunnel('a');
    let listening = |table: &str, any: &str| -> BTreeSet<u16> {
        let text = inside(&lab.netns("pod"), || {
            std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).expect("a table")
        });
        let listens = text.lines().skip(1).filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (address, port) = fields.get(1)?.rsplit_once(':')?;
            (fields.get(3) == Some(&"0A") && address == any).then(|| u16::from_str_radix(port, 16).ok())?
        });
        listens.collect()
    };
    for (table, loopback, address) in
        [("tcp", "0100007F", "127.0.0.1"), ("tcp6", "00000000000000000000000001000000", "::1")]
    {
        let ports = listening(table, loopback);
        assert!(ports.len() >= 3, "{table}: {ports:?}");
        for port in ports {
            let before = lab.metric('a', &["ztunnel_self_connections_total"]).unwrap_or(0.0);
            assert!(lab.call("pod", address, port).is_err(), "{address}:{port}");
            eventually("it is counted", || {
                lab.metric('a', &["ztunnel_self_connections_total"]).unwrap_or(0.0) > before
            });
        }
    }
}

/// A container with NET_RAW forges ztunnel's mark: it leaves uncaptured, and proves nothing to whom it calls.
#[test]
fn what_escapes_by_the_bypass_mark_is_refused_where_identity_is_demanded() {
    if !possible(&["python3"]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let demand = "{name: demand, namespace: shop, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/pod}]}]]]}";
    lab.configure('a', &mesh(""));
    lab.configure('b', &Mesh { policies: demand, ..mesh("") });
    serve_in(&lab.netns("far"));
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    for (n, far) in lab.addresses("far").into_iter().enumerate() {
        let own = lab.addresses("pod")[n].clone();
        assert_eq!(lab.call("pod", &far, APP_PORT), Ok(format!("{own} {MARKER}")), "through the mesh");
        let forged = format!(
            "exec python3 -c 'import socket
s = socket.socket({})
s.setsockopt(socket.SOL_SOCKET, 36, 0x539)
s.settimeout(10)
try:
    s.connect((\"{far}\", {APP_PORT})); s.sendall(b\"{MARKER}\"); print(\"said\", len(s.recv(64)))
except OSError as error:
    print(type(error).__name__)'",
            if far.contains(':') { "socket.AF_INET6" } else { "socket.AF_INET" }
        );
        let wire = Wire::watch(&lab.netns("br"));
        let output = lab.in_pod("pod", &forged).output().expect("python runs");
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        assert!(["said 0", "ConnectionResetError"].contains(&said.as_str()), "{said} {output:?}");
        let (ports, _) = wire.end();
        assert!(ports.contains(&APP_PORT), "it did escape: {ports:?}");
    }
    eventually("the refusal is told", || lab.log('b').contains("none matched"));
}
