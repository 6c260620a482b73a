//! Two networks that have nothing in common but a gateway, here an Envoy: it ends the outer tunnel and passes the inner
//! one on to a pod of its own network.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use crate::support::*;

const PODS: [Pod; 3] = [('a', "a1"), ('b', "b1"), ('g', "gw")];
/// The service's address in the other network.
const THERE: &str = "10.97.0.10";

/// What the service is called on both sides.
const NAMES: &str = "name: api, namespace: shop, hostname: api.shop.svc, ports: {80: 8080}";

fn envoy() -> PathBuf {
    tool("envoy/bin/envoy")
}

/// The client's network knows of the other one its gateway, and one workload that stands for all behind the service.
fn east(lab: &Lab, names: &str) -> String {
    let ([a1, a1_v6], [gw, _]) = (lab.addresses("a1"), lab.addresses("gw"));
    format!(
        r#"
workloads:
- {{uid: "Kubernetes//Pod/shop/a1", name: a1, namespace: shop, serviceAccount: a1, network: east, workloadIps: ["{a1}", "{a1_v6}"], protocol: HBONE, workloadName: caller, canonicalName: caller}}
- {{uid: "NetworkGateway/west/{gw}/15008", name: gw, namespace: shop, serviceAccount: gw, network: west, workloadIps: ["{gw}"], protocol: HBONE, workloadName: edge}}
- {{uid: "west/SplitHorizonWorkload/shop/gw/{gw}/shop/api.shop.svc", name: away, namespace: shop, network: west, networkGateway: {{destination: "west/{gw}", hboneMtlsPort: 15008}}, services: {{"shop/api.shop.svc": {{80: 80}}}}}}
services: [{{{NAMES}, vips: ["east/{VIP}"], subjectAltNames: ["{names}"]}}]
policies: []
enrolments: [{{uid: {lab}-a1, name: a1, namespace: shop, serviceAccount: a1, addresses: ["{a1}", "{a1_v6}"], workloadUid: "Kubernetes//Pod/shop/a1"}}]
"#,
        lab = lab.name
    )
}

/// The server's network knows nothing of the client, and lets in whoever is called `principal`.
fn west(lab: &Lab, principal: &str) -> String {
    let ([b1, b1_v6], [gw, _]) = (lab.addresses("b1"), lab.addresses("gw"));
    format!(
        r#"
workloads:
- {{uid: "Kubernetes//Pod/shop/b1", name: b1, namespace: shop, serviceAccount: b1, network: west, workloadIps: ["{b1}", "{b1_v6}"], protocol: HBONE, networkGateway: {{destination: "west/{gw}", hboneMtlsPort: 15008}}, workloadName: answerer, canonicalName: answerer, services: {{"shop/api.shop.svc": {{80: 8080}}}}}}
- {{uid: "Kubernetes//Pod/shop/gw", name: gw, namespace: shop, serviceAccount: gw, network: west, workloadIps: ["{gw}"]}}
services: [{{{NAMES}, vips: ["west/{THERE}"]}}]
policies: [{{name: only, namespace: shop, scope: Namespace, action: Allow, rules: [[[{{principals: [{{Exact: {principal}}}]}}]]]}}]
enrolments: [{{uid: {lab}-b1, name: b1, namespace: shop, serviceAccount: b1, addresses: ["{b1}", "{b1_v6}"], workloadUid: "Kubernetes//Pod/shop/b1"}}]
"#,
        lab = lab.name
    )
}

/// Starts the gateway: a tunnel for the service's name, and no other, leads to `to`.
fn start_gateway(lab: &mut Lab, to: &str) {
    lab.certify("gw");
    let dir = lab.dir.path();
    let config = format!(
        r#"
static_resources:
  listeners:
  - name: hbone
    address: {{socket_address: {{address: 0.0.0.0, port_value: 15008}}}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            alpn_protocols: [h2]
            tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
            tls_certificates: [{{certificate_chain: {{filename: {dir}/gw.pem}}, private_key: {{filename: {dir}/gw.key}}}}]
            validation_context: {{trusted_ca: {{filename: {dir}/ca-cert.pem}}}}
      filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: hbone
          codec_type: HTTP2
          http2_protocol_options: {{allow_connect: true}}
          upgrade_configs: [{{upgrade_type: CONNECT}}]
          route_config:
            virtual_hosts:
            - name: api
              domains: ["api.shop.svc:80"]
              routes:
              - match: {{connect_matcher: {{}}}}
                route: {{cluster: api, upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]}}
          http_filters:
          - name: router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: api
    connect_timeout: 5s
    load_assignment:
      cluster_name: api
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {to}, port_value: 15008}}}}}}}}]}}]
"#,
        dir = dir.display()
    );
    let file = dir.join("gw.yaml");
    fs::write(&file, config).expect("written");
    let log = fs::File::create(dir.join("gw.log")).expect("a log file");
    let script = format!(
        "exec {} --config-path {} --concurrency 1 --disable-hot-restart --log-level info",
        envoy().display(),
        file.display()
    );
    let mut child = lab.in_pod("gw", &script).stdout(Stdio::null()).stderr(log).spawn().expect("Envoy starts");
    let said = || fs::read_to_string(lab.dir.path().join("gw.log")).unwrap_or_default();
    eventually("the gateway listens", || {
        assert!(child.try_wait().expect("ours").is_none() && !said().contains("[critical]"), "{}", said());
        said().contains("starting main dispatch loop")
    });
    lab.children.push(child);
}

#[test]
fn a_service_of_another_network_is_reached_through_its_gateway() {
    const B1: &str = "spiffe://cluster.local/ns/shop/sa/b1";
    if !possible(&[envoy().to_str().expect("a path of letters")]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    lab.write('a', &east(&lab, B1));
    lab.write('b', &west(&lab, "cluster.local/ns/shop/sa/a1"));
    serve_in(&lab.netns("b1"));
    let (b1, gw) = (lab.addresses("b1")[0].clone(), lab.addresses("gw")[0].clone());
    start_gateway(&mut lab, &b1);
    lab.start_ztunnel('a');
    lab.start_ztunnel('b');

    // The inner tunnel carries the client's own identity to the pod's policy; the wire, and the gateway, see TLS only.
    let wire = Wire::watch(&lab.netns("br"));
    assert_eq!(lab.call("a1", VIP, 80), Ok(format!("{gw} {MARKER}")));
    let (ports, marker) = wire.end();
    assert!(!marker, "the payload was readable on the wire");
    assert!(!ports.is_empty() && ports.iter().all(|p| *p == 15008), "{ports:?}");

    // Each side knows the other by what it said of itself.
    let opened = "istio_tcp_connections_opened_total";
    let principal =
        |what: &str, account: &str| format!("{what}_principal=\"spiffe://cluster.local/ns/shop/sa/{account}\"");
    let (from, to) = (principal("source", "a1"), principal("destination", "b1"));
    let said = |node: char, labels: &[&str]| lab.metric(node, &[&[opened, &from, &to], labels].concat());
    let service = r#"destination_service="api.shop.svc""#;
    assert_eq!(said('a', &[r#"reporter="source""#, r#"destination_workload="answerer""#, service]), Some(1.0));
    assert_eq!(said('b', &[r#"reporter="destination""#, r#"source_workload="caller""#, service]), Some(1.0));

    // The tunnel to the gateway is kept, the one inside is new each time.
    assert_eq!(lab.call("a1", VIP, 80), Ok(format!("{gw} {MARKER}")));
    assert_eq!(said('b', &[r#"reporter="destination""#]), Some(2.0));

    // Policy over there is about the client, not about the gateway.
    let taken = || lab.log('b').matches("local configuration loaded").count();
    let before = taken();
    lab.write('b', &west(&lab, "cluster.local/ns/shop/sa/gw"));
    eventually("the other policy is taken", || taken() > before);
    assert!(lab.call("a1", VIP, 80).is_err());
    assert!(lab.log('b').contains("none matched"), "{}", lab.log('b'));

    // Whoever answers must be whom the service names.
    let taken = || lab.log('a').matches("local configuration loaded").count();
    let before = taken();
    lab.write('a', &east(&lab, "spiffe://cluster.local/ns/shop/sa/other"));
    eventually("the other name is taken", || taken() > before);
    assert!(lab.call("a1", VIP, 80).is_err());
    eventually("it is told why", || {
        lab.log('a').contains("through gateway") && lab.log('a').contains("not who was expected")
    });
}
