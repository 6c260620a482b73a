//! What operators see of a running ztunnel: its dump as istioctl reads it, `explain`, metrics and profiles.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Deserialize;

use crate::support::*;

const PODS: [Pod; 3] = [('a', "a1"), ('a', "a2"), ('b', "b1")];
const POLICY: &str = "{name: only-a1, namespace: shop, scope: Namespace, action: Allow, rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/a1}]}]]]}, {name: open, namespace: other, scope: Namespace, action: Deny, rules: [[[{notPrincipals: [{Presence: []}], sourceIps: [10.0.0.0/8], destinationPorts: [1]}]]]}";

/// The parts of the dump that `istioctl ztunnel-config` makes its columns of, in its types. What it does without is
/// optional; a type that it does not expect would fail the whole command.
mod istioctl {
    use super::{BTreeMap, Deserialize};

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Dump {
        pub workloads: Vec<Workload>,
        pub services: Vec<Service>,
        pub policies: Vec<Policy>,
        pub certificates: Vec<Certificates>,
        pub workload_state: BTreeMap<String, State>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Workload {
        pub uid: String,
        pub workload_ips: Vec<String>,
        pub waypoint: Option<Gateway>,
        pub protocol: String,
        pub name: String,
        pub namespace: String,
        pub service_account: String,
        pub workload_type: String,
        pub cluster_id: String,
        pub trust_domain: String,
        #[serde(default)]
        pub node: String,
        pub status: String,
    }

    #[derive(Deserialize)]
    pub struct Gateway {
        pub destination: String,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Service {
        pub name: String,
        pub namespace: String,
        pub hostname: String,
        pub vips: Vec<String>,
        pub ports: BTreeMap<String, i64>,
        pub waypoint: Option<Gateway>,
        pub endpoints: BTreeMap<String, Endpoint>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Endpoint {
        pub workload_uid: String,
        pub port: BTreeMap<u16, u16>,
        pub status: String,
    }

    #[derive(Deserialize)]
    pub struct Policy {
        pub name: String,
        pub namespace: String,
        pub scope: String,
        pub action: String,
        pub rules: Vec<Vec<Vec<Match>>>,
    }

    #[derive(Deserialize, Default, Debug, PartialEq)]
    #[serde(rename_all = "camelCase", default, deny_unknown_fields)]
    pub struct Match {
        pub principals: Vec<StringMatch>,
        pub not_principals: Vec<StringMatch>,
        pub source_ips: Vec<String>,
        pub destination_ports: Vec<u16>,
    }

    #[derive(Deserialize, Debug, PartialEq)]
    #[serde(rename_all = "PascalCase", deny_unknown_fields)]
    pub struct StringMatch {
        pub exact: Option<String>,
        pub presence: Option<serde_json::Value>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Certificates {
        pub identity: String,
        pub state: String,
        #[serde(default)]
        pub cert_chain: Vec<Certificate>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Certificate {
        pub pem: String,
        pub serial_number: String,
        pub valid_from: String,
        pub expiration_time: String,
    }

    #[derive(Deserialize)]
    pub struct State {
        pub state: String,
        pub connections: Connections,
        pub info: Info,
    }

    #[derive(Deserialize)]
    pub struct Connections {
        pub inbound: Vec<Connection>,
        pub outbound: Vec<Connection>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Connection {
        pub src: String,
        pub original_dst: String,
        pub actual_dst: String,
        pub protocol: String,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct Info {
        pub name: String,
        pub namespace: String,
        pub service_account: String,
    }
}

/// The head and the body of an answer.
fn get(lab: &Lab, node: char, port: u16, path: &str, headers: &str) -> (String, Vec<u8>) {
    inside(&lab.netns(&node.to_string()), || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).expect("asked");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("answered");
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
        (String::from_utf8_lossy(&answer[..end]).into_owned(), answer[end + 4..].to_vec())
    })
}

fn explain(lab: &Lab, args: &str) -> (Output, String) {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", lab.netns("a").display())).arg(env!("CARGO_BIN_EXE_ztunnel")).arg("explain");
    let output = command.args(args.split_whitespace()).env("ADMIN_PORT", "15000").output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output, said)
}

#[test]
fn operators_see_what_is_and_what_would_be() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let mesh = Mesh {
        policies: POLICY,
        services: format!(
            r#"{{name: api, namespace: shop, hostname: api.shop.svc.cluster.local, vips: ["/{VIP}"], ports: {{80: 8080}}}}"#
        ),
        serves: vec![("b1", r#""shop/api.shop.svc.cluster.local": {80: 8080}"#)],
        ..Mesh::default()
    };
    lab.configure('a', &mesh);
    lab.configure('b', &mesh);
    serve_in(&lab.netns("b1"));
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');
    let [b1, _] = lab.addresses("b1");
    let [a1, _] = lab.addresses("a1");
    let mut held = lab.hold("a1", &b1);
    assert_eq!(held.ask(), format!("{a1} {MARKER}"));

    read_as_istioctl_does(&lab, &a1, &b1);
    explained_as_it_is(&lab, &b1);
    scraped(&lab);
    profiled(&lab);
    assert_eq!(held.ask(), format!("{a1} {MARKER}"), "open through all of that");
}

fn read_as_istioctl_does(lab: &Lab, a1: &str, b1: &str) {
    let dump = |node| -> istioctl::Dump {
        serde_json::from_slice(&get(lab, node, 15000, "/config_dump", "").1).expect("in istioctl's types")
    };
    let (a, b) = (dump('a'), dump('b'));
    let workload = a.workloads.iter().find(|w| w.name == "b1").expect("b1 is known");
    assert_eq!((&*workload.uid, &*workload.namespace), ("Kubernetes//Pod/shop/b1", "shop"));
    assert_eq!((&*workload.protocol, &*workload.status, &*workload.service_account), ("HBONE", "Healthy", "b1"));
    assert_eq!((&*workload.cluster_id, &*workload.trust_domain), ("Kubernetes", "cluster.local"));
    assert_eq!((&*workload.workload_type, &*workload.node), ("deployment", "b"));
    assert!(workload.workload_ips.iter().any(|ip| ip == b1) && workload.waypoint.is_none());

    let [service] = &a.services[..] else { panic!("one service") };
    assert_eq!(
        (&*service.name, &*service.namespace, &*service.hostname),
        ("api", "shop", "api.shop.svc.cluster.local")
    );
    assert_eq!((&service.vips[..], service.ports["80"]), (&[format!("/{VIP}")][..], 8080));
    assert!(service.waypoint.as_ref().is_none_or(|waypoint| !waypoint.destination.is_empty()));
    let endpoint = &service.endpoints["Kubernetes//Pod/shop/b1"];
    assert_eq!(
        (&*endpoint.workload_uid, endpoint.port[&80], &*endpoint.status),
        ("Kubernetes//Pod/shop/b1", 8080, "Healthy")
    );

    let policy = a.policies.iter().find(|p| p.name == "only-a1").expect("the policy is known");
    assert_eq!((&*policy.namespace, &*policy.scope, &*policy.action), ("shop", "Namespace", "Allow"));
    assert_eq!(policy.rules[0][0][0].principals[0].exact.as_deref(), Some("cluster.local/ns/shop/sa/a1"));
    let other = a.policies.iter().find(|p| p.name == "open").expect("the other one, too");
    let only = &other.rules[0][0][0];
    assert_eq!(only.not_principals[0].presence, Some(serde_json::json!([])));
    assert_eq!((&only.source_ips[..], &only.destination_ports[..]), (&["10.0.0.0/8".to_owned()][..], &[1][..]));

    let certificates = a.certificates.iter().find(|c| c.identity.ends_with("/sa/a1")).expect("a1's");
    assert_eq!(certificates.state, "Available");
    let leaf = &certificates.cert_chain[0];
    assert!(leaf.serial_number.bytes().all(|b| b.is_ascii_digit()), "decimal: {}", leaf.serial_number);
    assert!(leaf.pem.starts_with("LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t"), "PEM in base64: {}", leaf.pem);
    for time in [&leaf.valid_from, &leaf.expiration_time] {
        assert!(time.len() == "2026-01-01T00:00:00Z".len() && time.ends_with('Z'), "RFC 3339: {time}");
    }

    let outbound = a.workload_state.values().find(|s| s.info.name == "a1").expect("a1 is here");
    assert_eq!((&*outbound.state, &*outbound.info.namespace, &*outbound.info.service_account), ("Up", "shop", "a1"));
    let [connection] = &outbound.connections.outbound[..] else { panic!("one is held") };
    assert!(connection.src.starts_with(a1), "{}", connection.src);
    assert_eq!(connection.original_dst, format!("{b1}:{APP_PORT}"));
    assert_eq!((&*connection.actual_dst, &*connection.protocol), (&*format!("{b1}:15008"), "HBONE"));
    let inbound = b.workload_state.values().find(|s| s.info.name == "b1").expect("b1 is there");
    let [connection] = &inbound.connections.inbound[..] else { panic!("one is held") };
    assert_eq!((&*connection.actual_dst, &*connection.protocol), (&*format!("{b1}:{APP_PORT}"), "HBONE"));
}

/// What is said would happen happens.
fn explained_as_it_is(lab: &Lab, b1: &str) {
    let (output, said) = explain(lab, "--from shop/a1 --to api.shop:80");
    assert_eq!(output.status.code(), Some(0), "{said}");
    for part in
        ["captured by this ztunnel", &format!("{b1}:15008"), "policy shop/only-a1", "this decides", "WOULD CONNECT"]
    {
        assert!(said.contains(part), "{part} in\n{said}");
    }
    assert!(lab.call("a1", VIP, 80).is_ok());

    let (output, said) = explain(lab, &format!("--from shop/a2 --to {VIP}:80 -o json"));
    assert_eq!(output.status.code(), Some(1), "{said}");
    let json: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(json["verdict"], "refused");
    assert_eq!(json["dialled"][0]["ways"][0]["refused"]["flag"], "DENY");
    assert!(lab.call("a2", VIP, 80).is_err());
    eventually("the log says the same", || lab.log('b').contains("allow policies exist, but none matched"));

    for (args, code, part) in [
        ("--from shop/nobody --to api.shop:80", 2, "no such workload"),
        ("--from shop/a1 --to api.shop", 2, "HOST:PORT"),
        ("--from shop/a1", 2, "--to is missing"),
        ("--help", 0, "usage"),
    ] {
        let (output, said) = explain(lab, args);
        assert_eq!(output.status.code(), Some(code), "{args}: {said}");
        assert!(said.contains(part), "{args}: {said}");
    }
}

fn scraped(lab: &Lab) {
    let (head, body) = get(lab, 'a', 15020, "/metrics", "accept: application/openmetrics-text;version=1.0.0\r\n");
    let text = String::from_utf8(body).expect("text");
    assert!(head.to_lowercase().contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    for part in [
        "# TYPE istio_tcp_connections_opened counter\n",
        "istio_tcp_connections_opened_total{reporter=\"source\",",
        "istio_tcp_sockets_open{reporter=\"source\"} ",
        "istio_build{component=\"ztunnel\",tag=",
        "workload_manager_active_proxy_count 2\n",
        "workload_manager_pending_proxy_count 0\n",
        "workload_manager_proxies_started_total 2\n",
        "process_open_fds ",
        "process_max_fds ",
        "tokio_num_workers 4\n",
        "tokio_global_queue_depth ",
        "tokio_num_alive_tasks ",
        "tokio_worker_total_busy_duration_seconds_total{worker=\"0\"} ",
        "tokio_worker_park_count_total{worker=\"1\"} ",
        "tokio_worker_park_unpark_count_total{worker=\"control-1\"} ",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    if let Ok(path) = std::env::var("KEEP_OPENMETRICS") {
        std::fs::write(path, &text).expect("kept");
    }
    let (head, body) = get(lab, 'a', 15020, "/stats/prometheus", "accept-encoding: gzip\r\n");
    assert!(head.to_lowercase().contains("content-encoding: gzip") && body.starts_with(&[0x1f, 0x8b]), "{head}");
}

/// Connections are opened all the while; none may notice.
fn profiled(lab: &Lab) {
    let (index, page) = get(lab, 'a', 15000, "/", "");
    assert!(index.contains("text/html") && String::from_utf8_lossy(&page).contains("/debug/pprof/profile"));
    let (head, body) = get(lab, 'a', 15000, "/debug/pprof/heap", "");
    assert!(head.starts_with("HTTP/1.1 501") && String::from_utf8_lossy(&body).contains("allocator"), "{head}");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let calls = scope.spawn(|| {
            let mut calls = 0;
            while !done.load(Ordering::Relaxed) {
                lab.call("a1", VIP, 80).expect("a call while a profile is taken");
                calls += 1;
            }
            calls
        });
        let (head, profile) = get(lab, 'a', 15000, "/debug/pprof/profile?seconds=2&frequency=1000", "");
        done.store(true, Ordering::Relaxed);
        assert!(calls.join().expect("no call failed") > 0);
        assert!(head.starts_with("HTTP/1.1 200") && profile.starts_with(&[0x1f, 0x8b]), "{head}");
        if let Ok(path) = std::env::var("KEEP_PROFILE") {
            std::fs::write(path, &profile).expect("kept");
        }
    });
    let (head, _) = get(lab, 'a', 15000, "/debug/pprof/profile?seconds=301", "");
    assert!(head.starts_with("HTTP/1.1 400"), "{head}");
}
