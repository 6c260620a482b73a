//! A waypoint that leaves the mesh's side of its work to ztunnel, and is told by PROXY headers who calls whom.

use std::io::{Read, Write};
use std::net::TcpListener;

use crate::support::*;

const PODS: [Pod; 3] = [('a', "a1"), ('b', "b1"), ('b', "b2")];
/// Where the waypoint listens, on its loopback.
const PORT: u16 = 15088;

/// A waypoint in b2 that answers with what it was told.
fn serve_waypoint(lab: &Lab) {
    let listener = inside(&lab.netns("b2"), || TcpListener::bind(("127.0.0.1", PORT)).expect("bound"));
    // Ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let from = stream.peer_addr().expect("a peer").ip();
            let mut told = Vec::new();
            let mut buffer = [0; 512];
            while !told.ends_with(b"\n") || told.len() < 16 {
                match stream.read(&mut buffer) {
                    Ok(n @ 1..) => told.extend(&buffer[..n]),
                    _ => break,
                }
            }
            let answer = match told.get(16..28) {
                Some([s0, s1, s2, s3, d0, d1, d2, d3, _, _, p0, p1]) if told.starts_with(b"\r\n\r\n\0\r\nQUIT\n") => {
                    let identity = String::from_utf8_lossy(&told[31..]);
                    let port = u16::from_be_bytes([*p0, *p1]);
                    format!("over {from}: {s0}.{s1}.{s2}.{s3} to {d0}.{d1}.{d2}.{d3}:{port} as {identity}")
                }
                _ => format!("not a header: {told:?}\n"),
            };
            let _ = stream.write_all(answer.as_bytes());
        }
    });
}

#[test]
fn a_waypoint_behind_ztunnel_is_told_who_calls_whom() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let waypoint = r#"{name: waypoint, namespace: shop, hostname: waypoint.shop.svc, ports: {15008: 15008}}"#;
    let bound = r#"waypoint: {destination: "shop/waypoint.shop.svc", hboneMtlsPort: 15008}"#;
    let mesh = Mesh {
        services: format!(
            r#"{{name: api, namespace: shop, hostname: api.shop.svc, vips: ["/{VIP}"], ports: {{80: 8080}}, {bound}}}, {waypoint}"#
        ),
        serves: vec![
            ("b1", r#""shop/api.shop.svc": {80: 8080}"#),
            ("b2", r#""shop/waypoint.shop.svc": {15008: 15008}"#),
        ],
        more: vec![("b2", format!(", applicationTunnel: {{protocol: PROXY, port: {PORT}}}"))],
        ..Mesh::default()
    };
    lab.configure('a', &mesh);
    lab.configure('b', &mesh);
    serve_waypoint(&lab);
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    let a1 = lab.addresses("a1")[0].clone();
    let told = |to: &str| Ok(format!("over 127.0.0.1: {a1} to {to} as spiffe://cluster.local/ns/shop/sa/a1{MARKER}"));
    assert_eq!(lab.call("a1", VIP, 80), told(&format!("{VIP}:80")));
    // Policy for the waypoint is about the port that it listens on.
    let deny = |port: u16| Mesh {
        policies: match port {
            80 => "{name: no, namespace: shop, scope: Namespace, action: Deny, rules: [[[{destinationPorts: [80]}]]]}",
            _ => {
                "{name: no, namespace: shop, scope: Namespace, action: Deny, rules: [[[{destinationPorts: [15088]}]]]}"
            }
        },
        ..mesh.clone()
    };
    lab.reconfigure('b', &deny(80));
    assert_eq!(lab.call("a1", VIP, 80), told(&format!("{VIP}:80")));
    lab.reconfigure('b', &deny(PORT));
    assert!(lab.call("a1", VIP, 80).is_err());
}
