//! Two pods of one node: the tunnel between them is opened like any other, and their bytes do not go through it.

use std::io::{Read, Write};
use std::net::TcpListener;

use crate::support::*;

const PODS: [Pod; 2] = [('a', "one"), ('a', "two")];
const ONLY_ONE: &str = "{name: only-one, namespace: shop, scope: Namespace, action: Allow, \
                        rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/one}]}]]]}";
const ONLY_ANOTHER: &str = "{name: only-one, namespace: shop, scope: Namespace, action: Allow, \
                            rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/another}]}]]]}";
/// More than all buffers on the way hold.
const BULK: usize = 48 << 20;
const BULK_PORT: u16 = 8081;

fn joins(lab: &Lab) -> f64 {
    lab.metric('a', &["ztunnel_same_node_joins_total"]).unwrap_or(0.0)
}

fn pattern(length: usize) -> impl Iterator<Item = u8> {
    (0..length).map(|i| (i % 251) as u8)
}

/// Takes a bulk, sends it back and ends; was it right?
fn echo_bulk(lab: &Lab, pod: &str) -> std::thread::JoinHandle<bool> {
    let listener = inside(&lab.netns(pod), || TcpListener::bind(("::", BULK_PORT)).expect("bound"));
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the client comes");
        let mut bytes = vec![0; BULK];
        stream.read_exact(&mut bytes).expect("all of it comes");
        stream.write_all(&bytes).expect("the client reads");
        bytes.iter().copied().eq(pattern(BULK))
    })
}

#[test]
fn pods_of_one_node_are_joined_once_they_are_authorized() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let with = |policies| Mesh { policies, ..Mesh::default() };
    lab.configure('a', &with(ONLY_ONE));
    serve_in(&lab.netns("two"));
    lab.start_ztunnel('a');
    let [one, one_v6] = lab.addresses("one");
    let [two, two_v6] = lab.addresses("two");

    // The client's address arrives, and each side has its record of the same bytes.
    assert_eq!(lab.call("one", &two, APP_PORT), Ok(format!("{one} {MARKER}")));
    assert_eq!(lab.call("one", &two_v6, APP_PORT), Ok(format!("{one_v6} {MARKER}")));
    assert!((joins(&lab) - 2.0).abs() < f64::EPSILON, "{}", joins(&lab));
    let (asked, answered) = (MARKER.len() + 1, one.len() + 1 + MARKER.len() + 1);
    let record = |direction: &str, sent: usize, received: usize| {
        let counts = format!("direction=\"{direction}\" bytes_sent={sent} bytes_recv={received} ");
        eventually(&format!("{direction}: {counts}"), || {
            lab.log('a').lines().any(|line| line.contains(&counts) && line.contains("src.identity=\"spiffe://"))
        });
    };
    record("outbound", asked, answered);
    record("inbound", answered, asked);

    // Many bytes, one direction after the other, each to its end.
    let right = echo_bulk(&lab, "two");
    let bulk = lab.dir.path().join("bulk");
    std::fs::write(&bulk, pattern(BULK).collect::<Vec<_>>()).expect("written");
    let script = format!(
        "exec 3<>/dev/tcp/{two}/{BULK_PORT}; cat {0} >&3; timeout 30 head -c {BULK} <&3 | cmp - {0} && echo same",
        bulk.display()
    );
    let output = lab.in_pod("one", &script).output().expect("the shell runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "same", "what came back is not what was sent");
    assert!(right.join().expect("no panic"), "what arrived is not what was sent");
    assert!((joins(&lab) - 3.0).abs() < f64::EPSILON, "{}", joins(&lab));
    record("outbound", BULK, BULK);

    // Policy of the destination ends what it allowed before, and refuses what is new.
    let mut open = lab.hold("one", &two);
    assert_eq!(open.ask(), format!("{one} {MARKER}"));
    lab.configure('a', &with(ONLY_ANOTHER));
    eventually("the open connection is cut", || open.ask().is_empty());
    eventually("as denied", || lab.log('a').contains("no longer allows"));
    assert!(lab.call("one", &two, APP_PORT).is_err());
    lab.configure('a', &with(""));
    eventually("it is allowed again", || lab.call("one", &two, APP_PORT).is_ok());

    // A service that hangs up first, and a port that nobody listens on.
    assert!(lab.call("one", &two, 9).is_err());
    assert!(!lab.log('a').contains("panicked"), "{}", lab.log('a'));
}

#[test]
fn a_setting_leaves_the_bytes_in_the_tunnel() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    lab.env.push(("SAME_NODE_JOIN", "false".into()));
    lab.configure('a', &Mesh::default());
    serve_in(&lab.netns("two"));
    lab.start_ztunnel('a');
    let ([one, _], [two, _]) = (lab.addresses("one"), lab.addresses("two"));
    assert_eq!(lab.call("one", &two, APP_PORT), Ok(format!("{one} {MARKER}")));
    assert!(joins(&lab).abs() < f64::EPSILON, "{}", joins(&lab));
}
