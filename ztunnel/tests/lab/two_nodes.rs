//! Two ztunnels, each with two pods: what an application and somebody on the wire see of the mesh.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::support::*;

const PODS: [Pod; 4] = [('a', "a1"), ('a', "a2"), ('b', "b1"), ('b', "b2")];
/// How often a pod joins and leaves; a leak of one descriptor each time is then plain to see.
const CYCLES: usize = 10;
const RESET_PORT: u16 = 8090;
const LAST_WORDS: usize = 4000;

/// The pods and a service of `b1`; `left` is a pod that is not enrolled.
fn mesh<'a>(policies: &'a str, left: &'a str) -> Mesh<'a> {
    Mesh {
        policies,
        services: format!(
            r#"{{name: api, namespace: shop, hostname: api.shop.svc, vips: ["/{VIP}"], ports: {{80: 8080}}}}"#
        ),
        serves: vec![("b1", r#""shop/api.shop.svc": {80: 8080}"#)],
        left,
        ..Mesh::default()
    }
}

/// Asks one who answers and resets at once; how much came, and what came then.
fn ask_one_who_resets(to: IpAddr) -> (usize, Option<ErrorKind>) {
    let mut stream = TcpStream::connect((to, RESET_PORT)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.write_all(b"?").expect("sent");
    let mut heard = Vec::new();
    let end = stream.read_to_end(&mut heard);
    (heard.len(), end.err().map(|error| error.kind()))
}

#[test]
fn a_reset_of_one_application_reaches_the_other_behind_all_that_was_said() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    lab.configure('a', &mesh("", ""));
    lab.configure('b', &mesh("", ""));
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    let [b1, _] = lab.addresses("b1");
    let b1: IpAddr = b1.parse().expect("an address");
    let listener = inside(&lab.netns("b1"), || TcpListener::bind(("0.0.0.0", RESET_PORT)).expect("bound"));
    let (seen, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut word = [0; 1];
            if stream.read(&mut word).is_ok() && &word == b"?" {
                // Little enough to be on its way before the reset.
                let _ = stream.write_all(&[b'!'; LAST_WORDS]);
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            } else {
                let _ = stream.write_all(&word);
                let end = stream.read(&mut [0; 64]).map_err(|error| error.kind());
                if seen.send((word[0], end)).is_err() {
                    return;
                }
            }
        }
    });
    // Across the tunnel, and between two pods of one node.
    for client in ["a1", "b2"] {
        let netns = lab.netns(client);
        let end = inside(&netns, move || ask_one_who_resets(b1));
        assert_eq!(end, (LAST_WORDS, Some(ErrorKind::ConnectionReset)), "{client}");
        inside(&netns, move || {
            let mut stream = TcpStream::connect((b1, RESET_PORT)).expect("connected");
            stream.write_all(b".").expect("sent");
            // The tunnel stands.
            stream.read_exact(&mut [0]).expect("answered");
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("set");
        });
        let told = heard.recv_timeout(PATIENCE).expect("the server is told");
        assert_eq!(told, (b'.', Err(ErrorKind::ConnectionReset)), "{client}");
    }
}

#[test]
fn two_nodes_talk_through_the_mesh() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    lab.configure('a', &mesh("", ""));
    lab.configure('b', &mesh("", ""));
    serve_in(&lab.netns("b1"));
    let [b1, b1_v6] = lab.addresses("b1");
    let [a1, a1_v6] = lab.addresses("a1");
    let answer = |client: &str| Ok(format!("{client} {MARKER}"));

    // Uncaptured first: the watcher can see what it is to miss later.
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    let (ports, marker) = wire.end();
    assert!(marker && ports.contains(&APP_PORT), "{ports:?}");

    let mut before = lab.hold("a1", &b1);
    assert_eq!(before.ask(), format!("{a1} {MARKER}"));

    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    assert_eq!(before.ask(), format!("{a1} {MARKER}"), "a connection from before joining lives on");

    // Captured: the server sees the client's own address; the wire carries HBONE and nothing to read.
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    assert_eq!(lab.call("a1", &b1_v6, APP_PORT), answer(&a1_v6));
    assert_eq!(lab.call("a2", VIP, 80), answer(&lab.addresses("a2")[0]), "by service address");
    assert_eq!(lab.call("b2", VIP, 80), answer(&lab.addresses("b2")[0]), "on the same node");
    assert_eq!(lab.call("b1", VIP, 80), answer(&b1), "a pod that calls its own service");
    assert!(lab.call("a1", &b1, 9).is_err(), "a port nobody listens on");
    let (ports, marker) = wire.end();
    assert!(!marker, "the payload was readable on the wire");
    assert!(!ports.is_empty() && ports.iter().all(|p| *p == 15008), "{ports:?}");
    let metrics = lab.http('b', 15020, "/metrics");
    let line = metrics.lines().find(|l| l.contains("istio_tcp_connections_opened_total") && l.contains("sa/a1"));
    let line = line.expect("the connection of a1 is counted");
    assert!(line.contains(r#"connection_security_policy="mutual_tls""#) && line.contains("sa/b1"), "{line}");

    // Policy: one identity in, the others and plaintext out.
    lab.configure('b', &mesh("{name: only-a1, namespace: shop, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/a1}]}]]]}", ""));
    eventually("the policy denies a2", || lab.call("a2", &b1, APP_PORT).is_err());
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    eventually("the denial is logged", || lab.log('b').contains("none matched"));
    let outside = lab.netns("br");
    run(&format!("ip -n {}-br addr add 10.77.99.1/16 dev br0", lab.name));
    let refused = inside(&outside, {
        let to: IpAddr = b1.parse().expect("an address");
        move || {
            let mut stream = TcpStream::connect((to, APP_PORT)).expect("the handshake is ztunnel's");
            stream.set_read_timeout(Some(PATIENCE)).expect("set");
            let _ = stream.write_all(MARKER.as_bytes());
            !matches!(stream.read(&mut [0; 64]), Ok(1..))
        }
    });
    assert!(refused, "plaintext of nobody in particular must not pass");
    lab.configure('b', &mesh("", ""));
    eventually("without the policy a2 gets through", || lab.call("a2", &b1, APP_PORT).is_ok());

    // Garbage on the HBONE port harms nobody.
    let _ = inside(&outside, {
        let to: IpAddr = b1.parse().expect("an address");
        move || TcpStream::connect((to, 15008)).and_then(|mut s| s.write_all(&[0x5a; 4000]))
    });
    eventually("the garbage is logged", || lab.log('b').contains("connection failed"));

    // Killed: closed, at once, both ways. Restarted: works.
    lab.kill_ztunnel('a');
    let started = Instant::now();
    assert!(lab.call("a1", &b1, APP_PORT).is_err());
    assert!(started.elapsed() < Duration::from_secs(5), "refused, not timed out");
    assert_eq!(lab.call("b2", &b1, APP_PORT), answer(&lab.addresses("b2")[0]), "the other node does not notice");
    lab.start_ztunnel('a');
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));

    // Upgraded: calls go on while the old one hands over and ends.
    lab.start_ztunnel_on('b', 16000);
    lab.retire_ztunnel('b');
    assert_eq!(lab.call("a1", &b1, APP_PORT), answer(&a1));
    assert!(lab.http('b', 16020, "/metrics").contains("istio_tcp_connections_opened_total"), "by the new one");

    // Left: what is open stays, what is new is plain again.
    let mut open = lab.hold("a1", &b1);
    assert_eq!(open.ask(), format!("{a1} {MARKER}"));
    lab.configure('a', &mesh("", "a1"));
    let wire = Wire::watch(&lab.netns("br"));
    eventually("a1 calls directly again", || {
        let called = lab.call("a1", &b1, APP_PORT) == answer(&a1);
        called && wire.seen.lock().expect("no panic holds it").1
    });
    eventually("rules and listeners are gone, except for what is open", || {
        lab.http('a', 15000, "/config_dump").contains("\"Draining\"")
    });
    assert_eq!(open.ask(), format!("{a1} {MARKER}"), "a connection from before leaving lives on");
    drop(open);
    let rules = format!("ip -n {}-a1 rule", lab.name);
    eventually("nothing is left in the pod", || !run(&rules).contains("15000"));
}

#[test]
fn a_pod_that_joins_and_leaves_many_times_costs_nothing_in_the_end() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    lab.configure('a', &mesh("", "a1"));
    lab.start_ztunnel_with('a', 15000, 1);
    let ztunnel = lab.ztunnels[0].1.id();
    let descriptors = || fs::read_dir(format!("/proc/{ztunnel}/fd")).expect("it runs").count();
    let pins = |lab: &Lab| run(&format!("find {} -type f | wc -l", lab.pins.display()));
    let settled = |lab: &Lab| {
        let dump = lab.http('a', 15000, "/config_dump");
        dump.contains("\"Up\"") && !dump.contains("\"Draining\"") && !dump.contains("-a1\"")
    };
    let before = (descriptors(), pins(&lab));
    // The connection of a question asked just before may still be closing: there may be less in the end, never more.
    let as_before = |lab: &Lab| descriptors() <= before.0 && pins(lab) == before.1;
    for n in 1..=CYCLES {
        lab.configure('a', &mesh("", ""));
        eventually("a1 is enrolled", || lab.log('a').matches("\tenrolled").count() == n + 1);
        lab.configure('a', &mesh("", "a1"));
        eventually("a1 leaves", || lab.log('a').matches("\tleaving").count() == n);
    }
    eventually("every leaving pod has left", || settled(&lab));
    eventually("descriptors and pins are as they were", || as_before(&lab));
    let rules = run(&format!("ip -n {0}-a1 rule; ip -n {0}-a1 -6 rule", lab.name));
    assert!(!rules.contains("15000"), "{rules}");

    // Deleted: its process is gone before the control plane says so.
    lab.configure('a', &mesh("", ""));
    eventually("a1 can join again", || lab.log('a').matches("\tenrolled").count() == CYCLES + 2);
    lab.children[0].kill().expect("a1's process is killed");
    lab.children[0].wait().expect("and reaped");
    lab.configure('a', &mesh("", "a1"));
    eventually("a1 leaves for good", || lab.log('a').matches("\tleaving").count() == CYCLES + 1);
    eventually("nothing is held of a deleted pod", || settled(&lab) && as_before(&lab));
    assert!(!lab.log('a').contains("panicked"), "{}", lab.log('a'));
}
