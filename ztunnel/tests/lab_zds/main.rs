//! Pods that a CNI agent hands over (ZDS), redirected by its iptables rules: a hand-made agent, real rules, real curl.
//!
//! Needs root and `ip`, `nsenter`, `unshare`, `setpriv`, `bash`, `curl`, `iptables`, `ipset`; the last test the BPF
//! programs as well. Where one is missing a test says so and passes, unless `LAB=required`.

#![forbid(unsafe_code)]

mod agent;
mod lab;
mod rules;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agent::{Agent, HELLO, Listener, Pod, Wire, del, encode, keep, snapshot_sent};
use lab::{APP_PORT, ELSEWHERE, Lab, MARKER, OUTSIDE, PATIENCE, Source, Tap, VIP, addresses, eventually, possible};
use mesh_proto::zds::workload_request::Payload;
use mesh_proto::zds::{AddWorkload, WorkloadInfo};

/// PeerAuthentication STRICT, as the control plane writes it.
const STRICT: &str = "{name: strict, namespace: istio-system, scope: Global, action: Deny, rules: [[[{notPrincipals: [{Presence: []}]}]]]}";
const OWN: &str = "ztunnel_self_connections_total";

fn app(address: &str) -> String {
    if address.contains(':') {
        format!("http://[{address}]:{APP_PORT}/")
    } else {
        format!("http://{address}:{APP_PORT}/")
    }
}

fn seen(client: &str) -> Result<String, String> {
    Ok(format!("{client} {MARKER}"))
}

/// Both nodes with an agent, its rules, and all pods in the mesh.
fn redirected(mark: char) -> (Lab, [Agent; 2]) {
    let mut lab = Lab::up(mark);
    lab.configure("");
    let agents = ['a', 'b'].map(|node| Agent::start(&lab.socket(node), Vec::new()));
    rules::install_on_node(&lab.netns("a"));
    for (node, agent) in ['a', 'b'].into_iter().zip(&agents) {
        lab.start_ztunnel(node, Source::Agent, 15000);
        eventually("the snapshot is taken", || agent.snapshots() == 1);
        eventually("ztunnel is ready", || lab.ready(node, 15000));
        lab.enrol(agent, &format!("{node}1"));
        lab.enrol(agent, &format!("{node}2"));
    }
    (lab, agents)
}

fn no_violations(agents: impl IntoIterator<Item = Agent>) {
    for agent in agents {
        assert_eq!(agent.stop(), Vec::<String>::new());
    }
}

#[test]
fn pods_of_an_agent_talk_over_hbone() {
    if !possible(Source::Agent) {
        return;
    }
    let (lab, agents) = redirected('h');
    lab.serve("b1");
    lab.serve("a1");
    let [[a1, a1_v6], [b1, b1_v6], [b2, _]] = ["a1", "b1", "b2"].map(addresses);

    // Both ways, both families, by address and by service, across nodes and on one.
    let tap = Tap::watch(&lab.netns("br"));
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1));
    assert_eq!(lab.curl("a1", &app(&b1_v6)), seen(&a1_v6));
    assert_eq!(lab.curl("b2", &app(&a1)), seen(&b2), "the other way");
    assert_eq!(lab.curl("b2", &app(&b1)), seen(&b2), "on the same node");
    assert_eq!(lab.curl("a1", &format!("http://{VIP}/")), seen(&a1), "by service address");
    assert_eq!(lab.curl("b1", &format!("http://{VIP}/")), seen(&b1), "a pod that calls its own service");
    assert_eq!(lab.curl("b1", &app(&b1)), seen(&b1), "and itself");
    assert!(lab.curl("a1", &format!("http://{b1}:9/")).is_err(), "a port nobody listens on");
    let (ports, marker) = tap.end();
    assert!(!marker, "the payload was readable on the wire");
    assert!(!ports.is_empty() && ports.iter().all(|p| *p == 15008), "{ports:?}");
    let metrics = lab.http('b', 15020, "/metrics");
    let of_both = ["istio_tcp_connections_opened_total", "mutual_tls", "sa/a1\"", "sa/b1\""];
    assert!(metrics.lines().any(|line| of_both.iter().all(|part| line.contains(part))), "{metrics}");
    assert!(metrics.contains("workload_manager_active_proxy_count 2"), "{metrics}");

    // Plaintext: served, then refused under STRICT. The kubelet's probes pass either way, both families.
    assert_eq!(lab.curl("br", &app(&a1)), seen(OUTSIDE));
    lab.configure(STRICT);
    eventually("plaintext is refused", || lab.curl("br", &app(&a1)).is_err());
    assert_eq!(lab.curl("b1", &app(&a1)), seen(&b1), "mTLS is what STRICT asks for");
    assert_eq!(lab.curl("a", &app(&a1)), seen("169.254.7.127"), "a probe");
    assert_eq!(lab.curl("a", &app(&a1_v6)), seen("fd16:9254:7127:1337:ffff:ffff:ffff:ffff"), "a probe");
    lab.configure("");
    eventually("plaintext is served again", || lab.curl("br", &app(&a1)).is_ok());

    // Our own ports: nobody gets anywhere by dialling them.
    for (from, to) in [("a1", "127.0.0.1"), ("a1", "[::1]"), ("a1", &a1), ("br", &a1)] {
        for port in [15001, 15006] {
            let before = lab.counter('a', 15020, OWN);
            assert!(lab.curl(from, &format!("http://{to}:{port}/")).is_err(), "{from} dials {to}:{port}");
            assert_eq!(lab.counter('a', 15020, OWN), before + 1.0, "{from} dials {to}:{port}");
        }
    }
    assert!(lab.curl("b1", &format!("http://{a1}:15001/")).is_err(), "through the mesh neither");

    no_violations(agents);
}

/// Annotation `istio.io/reroute-virtual-interfaces`: the agent's rule brings what a machine behind the pod sends to the
/// port for what leaves, and it leaves as the pod's.
#[test]
fn what_a_machine_behind_a_pod_sends_leaves_as_the_pods() {
    if !possible(Source::Agent) {
        return;
    }
    let (lab, agents) = redirected('v');
    lab.serve("b1");
    lab.serve("a1");
    lab.put_behind("a1");
    let [[a1, a1_v6], [b1, b1_v6]] = ["a1", "b1"].map(addresses);
    assert!(lab.curl("vm", &app(&b1)).is_err(), "the pod forwards nothing by itself");
    rules::reroute(&lab.netns("a1"), "vm");
    lab.configure(STRICT);
    eventually("plaintext is refused", || lab.curl("br", &app(&b1)).is_err());

    let tap = Tap::watch(&lab.netns("br"));
    assert_eq!(lab.curl("vm", &app(&b1)), seen(&a1));
    assert_eq!(lab.curl("vm", &app(&b1_v6)), seen(&a1_v6));
    assert_eq!(lab.curl("vm", &format!("http://{VIP}/")), seen(&a1), "by service address");
    let (ports, marker) = tap.end();
    assert!(!marker, "the payload was readable on the wire");
    assert!(!ports.is_empty() && ports.iter().all(|p| *p == 15008), "{ports:?}");
    let log = lab.log('b');
    let of_pod = ["direction=\"inbound\"", "src.identity=\"spiffe://cluster.local/ns/shop/sa/a1\""];
    assert!(log.lines().any(|line| of_pod.iter().all(|part| line.contains(part))), "{log}");

    // The pod itself goes on as before, and what comes to it from elsewhere is not taken for its own.
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1));
    assert_eq!(lab.curl("b1", &app(&a1)), seen(&b1));
    // Our own ports mean nobody from there either.
    for port in [15001, 15006] {
        assert!(lab.curl("vm", &format!("http://10.66.0.1:{port}/")).is_err(), "vm dials {port}");
    }
    assert!(lab.counter('a', 15020, OWN) >= 1.0);
    no_violations(agents);
}

#[test]
fn names_of_the_mesh_are_answered_and_others_asked_for() {
    if !possible(Source::Agent) {
        return;
    }
    let (lab, agents) = redirected('d');
    let api = "api.shop.svc.cluster.local.";
    // Nobody is at that address: the answer is ztunnel's, in that server's name (the client's socket takes no other).
    for (server, tcp) in [("10.96.0.2", false), ("10.96.0.2", true), ("fd77::fffe", false), ("fd77::fffe", true)] {
        assert_eq!(lab.resolve("a1", server, api, tcp).as_deref(), Some(VIP), "{server} {tcp}");
        let other = lab.resolve("a1", server, "elsewhere.test.", tcp);
        assert_eq!(other, Some(ELSEWHERE.to_string()), "{server} {tcp}");
    }
    assert!(lab.counter('a', 15020, "istio_dns_requests_total") >= 8.0);
    no_violations(agents);
}

#[test]
fn restarts_of_ztunnel_and_of_the_agent_are_survived() {
    if !possible(Source::Agent) {
        return;
    }
    let (mut lab, [mut a, b]) = redirected('r');
    lab.serve("b1");
    let [[a1, _], [b1, _]] = ["a1", "b1"].map(addresses);

    // ztunnel dies: closed at once. The next one gets the snapshot.
    lab.kill_ztunnel('a');
    assert!(lab.curl("a1", &app(&b1)).is_err(), "fails closed");
    lab.start_ztunnel('a', Source::Agent, 15000);
    eventually("another snapshot", || a.snapshots() == 2);
    eventually("ztunnel is ready", || lab.ready('a', 15000));
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1));

    // The agent goes: pods are served, ztunnel is not ready. It comes back without the namespaces: they are kept.
    let mut open = lab.hold("a1", &b1);
    assert_eq!(open.ask(), format!("{a1} {MARKER}"));
    assert_eq!(a.stop(), Vec::<String>::new());
    eventually("ztunnel is not ready", || !lab.ready('a', 15000));
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1), "served without an agent");
    let kept = ["a1", "a2"].map(|pod| Pod { netns: None, ..lab.pod(pod) });
    a = Agent::start(&lab.socket('a'), kept.to_vec());
    eventually("the new agent has told", || a.snapshots() == 1);
    eventually("ztunnel is ready again", || lab.ready('a', 15000));
    assert_eq!(open.ask(), format!("{a1} {MARKER}"), "a connection from before lives on");
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1));

    // A third agent no longer has a2.
    assert_eq!(a.stop(), Vec::<String>::new());
    a = Agent::start(&lab.socket('a'), vec![lab.pod("a1")]);
    eventually("the next agent has told", || a.snapshots() == 1);
    eventually("a2 is not served any more", || !lab.http('a', 15000, "/config_dump").contains("-a2\""));
    assert_eq!(open.ask(), format!("{a1} {MARKER}"));
    assert!(lab.curl("a2", &app(&b1)).is_err(), "its rules are there, and nobody behind them");

    // Deleted: cut.
    let uid = lab.pod("a1").uid;
    assert_eq!(a.del(&uid), [Ok(())]);
    assert_eq!(a.del(&uid), [Ok(())], "one that is not known is no error");
    assert_eq!(open.ask(), "", "its connections are cut");
    rules::remove(&lab.netns("a1"));
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1), "out of the mesh it talks plainly");
    no_violations([a, b]);
}

#[test]
fn an_upgrade_loses_no_new_connection() {
    if !possible(Source::Agent) {
        return;
    }
    let (mut lab, [a, b]) = redirected('u');
    lab.serve("b1");
    let [[a1, _], [b1, _]] = ["a1", "b1"].map(addresses);
    let mut open = lab.hold("a1", &b1);
    assert_eq!(open.ask(), format!("{a1} {MARKER}"));
    let over = AtomicBool::new(false);
    let at = lab.netns("a1");
    let to = std::net::SocketAddr::new(b1.parse().expect("an address"), lab::ECHO_PORT);
    let (calls, old_ended) = std::thread::scope(|scope| {
        let (over, at) = (&over, &at);
        let caller = scope.spawn(move || {
            lab::inside(at, || {
                let mut calls = 0;
                while !over.load(Ordering::SeqCst) && calls < 20_000 {
                    lab::Held::connect(to).expect_answer();
                    calls += 1;
                }
                calls
            })
        });
        lab.start_ztunnel('a', Source::Agent, 16000);
        eventually("the successor has the pods", || a.snapshots() == 2 && lab.ready('a', 16000));
        let mut old = lab.retire_ztunnel('a');
        // Both are told of pods that go; only the newer of pods that come.
        assert_eq!(a.del("nobody"), [Ok(()), Ok(())]);
        let started = Instant::now();
        eventually("the old one accepts no more", || lab.log('a').contains("no longer accepting"));
        let accepting = started.elapsed();
        assert_eq!(open.ask(), format!("{a1} {MARKER}"), "the old one lets connections go on");
        drop(open);
        eventually("the old one ends", || old.try_wait().expect("its state").is_some_and(|s| s.success()));
        over.store(true, Ordering::SeqCst);
        (caller.join().expect("no call failed"), accepting)
    });
    assert!(calls > 10, "{calls}");
    assert!(old_ended < Duration::from_secs(8), "it saw its successor, and did not wait out its time: {old_ended:?}");
    assert!(lab.counter('a', 16020, "istio_tcp_connections_opened_total") > 0.0, "by the new one");
    no_violations([a, b]);
}

#[test]
fn a_pod_with_a_new_namespace_is_served_there() {
    if !possible(Source::Agent) {
        return;
    }
    let (lab, agents) = redirected('n');
    lab.serve("b1");
    let [[a1, _], [b1, _]] = ["a1", "b1"].map(addresses);
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1));
    assert_eq!(agents[0].add(&lab.pod("a1")), Ok(()), "told again it changes nothing");
    assert_eq!(lab.log('a').matches("\tserved").count(), 2);

    lab.renew("a1");
    rules::install(&lab.netns("a1"));
    assert!(lab.curl("a1", &app(&b1)).is_err(), "nobody is there yet");
    assert_eq!(agents[0].add(&lab.pod("a1")), Ok(()));
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1));

    // One namespace has one identity.
    let thief = Pod { uid: "thief".into(), netns: Some(lab.netns("a1")), ..lab.pod("a2") };
    let refused = agents[0].add(&thief).unwrap_err();
    assert!(refused.contains("is served as pod"), "{refused}");
    eventually("what is pending keeps it from being ready", || !lab.ready('a', 15000));
    assert_eq!(agents[0].del("thief"), [Ok(())]);
    // Shown when the next request is done, or tried again.
    eventually("ready", || lab.ready('a', 15000));
    assert_eq!(lab.curl("a1", &app(&b1)), seen(&a1));

    // A port that is taken: refused, and served once it is free.
    lab.renew("a2");
    let squatter = lab::inside(&lab.netns("a2"), || std::net::TcpListener::bind("0.0.0.0:15006").unwrap());
    let refused = agents[0].add(&lab.pod("a2")).unwrap_err();
    assert!(refused.contains("15006"), "{refused}");
    // The agent has its answer a moment earlier.
    eventually("what is pending keeps it from being ready", || !lab.ready('a', 15000));
    drop(squatter);
    eventually("tried again", || lab.ready('a', 15000));
    rules::install(&lab.netns("a2"));
    assert_eq!(lab.curl("a2", &app(&b1)), seen(&addresses("a2")[0]));
    no_violations(agents);
}

/// The next connection, past its hello.
fn greeted(listener: &Listener) -> Wire {
    let wire = listener.accept(PATIENCE).expect("ztunnel connects");
    assert_eq!(wire.receive(PATIENCE).expect("the hello"), HELLO);
    wire
}

/// ... with one pod in its snapshot.
fn synced(listener: &Listener, pod: &Pod) -> Wire {
    let wire = greeted(listener);
    let netns = File::open(pod.netns.as_ref().expect("it has one")).expect("open");
    wire.send(&pod.add(), &[netns.as_fd()]).expect("sent");
    assert_eq!(wire.ack().expect("an answer"), "");
    wire.send(&snapshot_sent(), &[]).expect("sent");
    assert_eq!(wire.ack().expect("an answer"), "");
    wire
}

#[test]
fn an_agent_that_breaks_the_protocol_is_told_and_left() {
    if !possible(Source::Agent) {
        return;
    }
    let mut lab = Lab::up('x');
    lab.configure("");
    let listener = Listener::bind(&lab.socket('a'));
    lab.start_ztunnel('a', Source::Agent, 15000);
    let (a1, a2) = (lab.pod("a1"), lab.pod("a2"));
    let netns = File::open(lab.netns("a2")).expect("open");
    let fd = netns.as_fd();
    let nameless = encode(Payload::Add(AddWorkload {
        uid: a2.uid.clone(),
        workload_info: Some(WorkloadInfo { name: String::new(), ..WorkloadInfo::default() }),
    }));
    let long = Pod { name: "x".repeat(1100), ..a2.clone() };
    let serves = |pod: &Pod| lab.http('a', 15000, "/config_dump").contains(&format!("\"{}\"", pod.uid));

    // Told, left, and come back to; pods are served on.
    for (message, files, text) in [
        (vec![0xff; 40], vec![], "cannot be decoded"),
        (vec![0x22, 0x00], vec![], "no known kind"),
        (a2.add(), vec![], "0 file descriptors instead of 1"),
        (a2.add(), vec![fd, fd], "2 file descriptors instead of 1"),
        (a2.add(), vec![fd; 8], "more file descriptors than one"),
        (del(&a1.uid), vec![fd], "1 file descriptors instead of 0"),
        (nameless, vec![fd], "without name"),
        (long.add(), vec![fd], "longer than 1024 bytes"),
    ] {
        let wire = synced(&listener, &a1);
        eventually("ready with a good agent", || lab.ready('a', 15000));
        wire.send(&message, &files).expect("sent");
        let told = wire.ack().expect("an answer");
        assert!(told.contains(text), "{told} instead of {text}");
        assert_eq!(wire.receive(PATIENCE).expect("the end"), [0u8; 0], "{text}");
        assert!(serves(&a1) && !serves(&a2), "{text}");
    }

    // Who exists is in doubt: nobody is served until told anew.
    for (message, text) in [(keep(&a1.uid), "Keep after the snapshot"), (snapshot_sent(), "a second snapshot")] {
        let wire = synced(&listener, &a1);
        assert!(serves(&a1));
        wire.send(&message, &[]).expect("sent");
        assert_eq!(wire.ack().expect("an answer"), text);
        assert_eq!(wire.receive(PATIENCE).expect("the end"), [0u8; 0], "{text}");
        eventually("nobody is served", || !serves(&a1));
    }
    let wire = synced(&listener, &a1);
    assert!(serves(&a1), "a good agent is believed again");

    // A file that is no namespace, and the node's own: not served, the connection kept.
    let file = File::open("/proc/self/status").expect("open");
    wire.send(&a2.add(), &[file.as_fd()]).expect("sent");
    assert!(wire.ack().expect("an answer").contains("namespace"));
    let own = File::open(lab.netns("a")).expect("open");
    wire.send(&a2.add(), &[own.as_fd()]).expect("sent");
    assert!(wire.ack().expect("an answer").contains("ztunnel's own network namespace"));
    wire.send(&del(&a2.uid), &[]).expect("sent");
    assert_eq!(wire.ack().expect("an answer"), "");
    assert!(!lab.log('a').contains("panicked"), "{}", lab.log('a'));
}

#[test]
fn a_redirected_node_talks_to_one_that_captures_itself() {
    if !possible(Source::File) {
        return;
    }
    let mut lab = Lab::up('m');
    lab.configure("");
    let agent = Agent::start(&lab.socket('a'), Vec::new());
    rules::install_on_node(&lab.netns("a"));
    lab.start_ztunnel('a', Source::Agent, 15000);
    for pod in ["b1", "b2"] {
        lab.make_findable(pod);
    }
    lab.start_ztunnel('b', Source::File, 15000);
    eventually("the pods of b are captured", || {
        lab.ready('b', 15000) && lab.log('b').matches("\tenrolled").count() == 2
    });
    eventually("the snapshot is taken", || agent.snapshots() == 1);
    lab.enrol(&agent, "a1");
    lab.serve("a1");
    lab.serve("b1");
    lab.configure(STRICT);
    let [[a1, a1_v6], [b1, b1_v6]] = ["a1", "b1"].map(addresses);
    eventually("STRICT is in force", || lab.curl("br", &app(&a1)).is_err() && lab.curl("br", &app(&b1)).is_err());
    for (from, to, client) in [("a1", &b1, &a1), ("b1", &a1, &b1), ("a1", &b1_v6, &a1_v6), ("b1", &a1_v6, &b1_v6)] {
        assert_eq!(lab.curl(from, &app(to)), seen(client), "{from} calls {to}");
    }
    no_violations([agent]);
}
