//! Peers that share no code with ours at port 15008: Envoy as the client of tunnels, Python's OpenSSL with the package
//! `h2`, and the test programs h2spec, nghttp and h2load.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;

use crate::support::*;

const PODS: [Pod; 3] = [('a', "a1"), ('b', "b1"), ('g', "foreign")];
/// Of Envoy, on its pod's loopback: one tunnel for each connection.
const TUNNEL: &str = "127.0.0.1:9000";
/// The same to [`FAREWELL_PORT`].
const FAREWELL: &str = "127.0.0.1:9001";
const ENVOY_ADMIN: u16 = 9901;
/// Says goodbye first, and keeps what it hears afterwards.
const FAREWELL_PORT: u16 = 8083;
/// Of the forwarder that has a certificate.
const PLAIN: &str = "127.0.0.1:9100";

const NO_STRANGERS: &str = "{name: no, namespace: shop, scope: Namespace, action: Deny, rules: [[[{principals: [{Exact: cluster.local/ns/shop/sa/stranger}]}]]]}";

impl Lab {
    fn foreign() -> Self {
        let mut lab = Self::up(&PODS);
        lab.certify("foreign");
        lab.certify("stranger");
        lab.configure('b', &Mesh { policies: NO_STRANGERS, ..Mesh::default() });
        serve_in(&lab.netns("b1"));
        lab.start_ztunnel('b');
        lab
    }

    /// What a program said, on both streams, and whether it ended well.
    fn said(&self, script: &str) -> (String, bool) {
        let output = self.in_pod("foreign", &format!("{{ {script}; }} 2>&1")).output().expect("the shell runs");
        (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.success())
    }

    fn has_line_of(&self, node: char, parts: &[&str]) -> bool {
        self.log(node).lines().any(|line| parts.iter().all(|part| line.contains(part)))
    }
}

#[test]
fn a_client_over_openssl_and_pythons_h2_is_served_and_its_mistakes_cost_it_no_more_than_they_must() {
    const CASES: &str = "tunnel interleaved end_stream reset bulk get path_in_connect no_authority no_method \
        twice_an_authority pseudo_header_after_others status_in_request extended_connect connection_header \
        somebody_elses_address no_port port_of_nobody";
    /// What is no header at all ends the connection: h2 takes it for broken compression.
    const CUTTING: &str = "unknown_pseudo_header upper_case";
    let python = tool("peers/bin/python");
    if !possible(&[python.to_str().expect("a path of letters")]) {
        return;
    }
    let lab = Lab::foreign();
    let [b1, _] = lab.addresses("b1");
    let client = |name: &str, cases: &str| {
        lab.said(&format!(
            "{} {} {b1}:15008 {b1}:{APP_PORT} {} {name} {cases}",
            python.display(),
            peer_script("client.py").display(),
            lab.dir.path().display()
        ))
    };
    let (said, well) = client("foreign", &format!("{CASES} {CUTTING}"));
    let (cut, held): (Vec<_>, Vec<_>) =
        said.lines().filter_map(|line| line.split_once(' ')).partition(|(how, _)| *how == "cut");
    let names = |cases: &[(&str, &str)]| cases.iter().map(|(_, case)| (*case).to_owned()).collect::<BTreeSet<_>>();
    let (cut, held) = (names(&cut), names(&held));
    let expected = |cases: &str| cases.split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!((cut, held), (expected(CUTTING), expected(CASES)), "{said}");
    assert!(well, "{said}");
    for parts in [
        &["connection complete", "sa/foreign", "inbound"][..],
        &["request failed", "sa/foreign", "not a CONNECT", "response_flags=\"BAD_REQUEST\""],
        &["connection complete", "sa/foreign", "response_flags=\"CONNECT\""],
    ] {
        eventually(&format!("{parts:?} is recorded"), || lab.has_line_of('b', parts));
    }
    let (said, _) = client("stranger", "denied");
    assert!(said.contains("ok denied"), "{said}");
    eventually("the denial is recorded", || lab.has_line_of('b', &["sa/stranger", "response_flags=\"DENY\""]));
}

/// Envoy as whatever wants to reach a pod: what is said to its ports is tunnelled to b1, by the identity `name`.
fn start_envoy(lab: &mut Lab, name: &str) {
    let [b1, _] = lab.addresses("b1");
    let dir = lab.dir.path();
    let listener = |at: &str, port: u16| {
        let (address, own) = at.rsplit_once(':').expect("an address");
        format!(
            r#"
  - name: to-{port}
    address: {{socket_address: {{address: {address}, port_value: {own}}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tunnel
          cluster: hbone
          tunneling_config: {{hostname: "{b1}:{port}"}}
          access_log:
          - name: file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {dir}/envoy-access.log
              log_format: {{text_format_source: {{inline_string: "%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_TRANSPORT_FAILURE_REASON%\n"}}}}
"#,
            dir = dir.display()
        )
    };
    let config = format!(
        r#"
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {ENVOY_ADMIN}}}}}}}
static_resources:
  listeners:{}{}
  clusters:
  - name: hbone
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{allow_connect: true}}}}
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          alpn_protocols: [h2]
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          tls_certificates: [{{certificate_chain: {{filename: {dir}/{name}.pem}}, private_key: {{filename: {dir}/{name}.key}}}}]
          validation_context:
            trusted_ca: {{filename: {dir}/ca-cert.pem}}
            match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: "spiffe://cluster.local/ns/shop/sa/b1"}}}}]
    load_assignment:
      cluster_name: hbone
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {b1}, port_value: 15008}}}}}}}}]}}]
"#,
        listener(TUNNEL, APP_PORT),
        listener(FAREWELL, FAREWELL_PORT),
        dir = dir.display()
    );
    let file = dir.join("envoy.yaml");
    fs::write(&file, config).expect("written");
    let log = fs::File::create(dir.join("envoy.log")).expect("a log file");
    let script = format!(
        "exec {} --config-path {} --concurrency 1 --disable-hot-restart --log-level info",
        tool("envoy/bin/envoy").display(),
        file.display()
    );
    let mut child = lab.in_pod("foreign", &script).stdout(Stdio::null()).stderr(log).spawn().expect("Envoy starts");
    let said = || fs::read_to_string(lab.dir.path().join("envoy.log")).unwrap_or_default();
    eventually("Envoy listens", || {
        assert!(child.try_wait().expect("ours").is_none() && !said().contains("[critical]"), "{}", said());
        said().contains("starting main dispatch loop")
    });
    lab.children.push(child);
}

/// A counter or gauge of Envoy's.
fn envoy_counts(lab: &Lab, what: &str) -> u64 {
    let (said, _) = lab.said(&format!("curl -s 'http://127.0.0.1:{ENVOY_ADMIN}/stats?filter=^{what}$'"));
    said.trim().rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default()
}

/// An application that ends its direction at once and tells what it heard until the other one ends.
fn say_farewell_in(netns: &Path) -> mpsc::Receiver<Vec<u8>> {
    let listener = inside(netns, || TcpListener::bind(("::", FAREWELL_PORT)).expect("bound"));
    let (heard, hearing) = mpsc::channel();
    // Ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = std::io::Write::write_all(&mut stream, b"goodbye");
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            let _ = heard.send(rest);
        }
    });
    hearing
}

#[test]
fn envoy_tunnels_through_15008_and_follows_a_drain() {
    const STREAMS: usize = 50;
    if !possible(&[tool("envoy/bin/envoy").to_str().expect("a path of letters")]) {
        return;
    }
    let mut lab = Lab::foreign();
    let farewells = say_farewell_in(&lab.netns("b1"));
    start_envoy(&mut lab, "foreign");
    let (own, port) = TUNNEL.rsplit_once(':').expect("an address");
    let port: u16 = port.parse().expect("a port");
    let answer = format!("{} {MARKER}", lab.addresses("foreign")[0]);

    // Many streams on one connection.
    let mut held: Vec<Held> = (0..STREAMS).map(|_| lab.hold_at("foreign", own, port)).collect();
    for _ in 0..2 {
        for connection in &mut held {
            assert_eq!(connection.ask(), answer);
        }
    }
    assert_eq!(envoy_counts(&lab, "cluster.hbone.upstream_cx_total"), 1, "all of them in one");
    assert_eq!(lab.metric('b', &["istio_tcp_sockets_open", "destination"]), Some(STREAMS as f64));

    // Either direction ends alone.
    let (said, _) = lab.said(&format!("exec 3<>/dev/tcp/{}; cat <&3; echo later >&3", FAREWELL.replace(':', "/")));
    assert_eq!(said, "goodbye");
    assert_eq!(farewells.recv_timeout(PATIENCE), Ok(b"later\n".to_vec()));
    let python = "import socket,sys; s=socket.create_connection(('127.0.0.1',9000)); s.sendall(b'last words'); \
        s.shutdown(1); print(b''.join(iter(lambda: s.recv(999), b'')).decode())";
    let (said, _) = lab.said(&format!("python3 -c \"{python}\""));
    assert_eq!(said.trim(), format!("{} last words", lab.addresses("foreign")[0]));

    // A successor: what is open stays with the old one, what is new comes to the new one.
    lab.start_ztunnel_on('b', 16000);
    let at = lab.ztunnels.iter().position(|(node, _)| *node == 'b').expect("the older");
    let (_, mut old) = lab.ztunnels.remove(at);
    run(&format!("kill -TERM {}", old.id()));
    eventually("Envoy follows the GOAWAY", || {
        assert_eq!(lab.call("foreign", own, port).as_ref(), Ok(&answer));
        envoy_counts(&lab, "cluster.hbone.upstream_cx_total") > 1
    });
    for connection in &mut held {
        assert_eq!(connection.ask(), answer, "across the drain");
    }
    drop(held);
    eventually("the old one ends", || old.try_wait().expect("its state").is_some_and(|status| status.success()));
    assert_eq!(lab.call("foreign", own, port).as_ref(), Ok(&answer));
    assert_eq!(envoy_counts(&lab, "cluster.hbone.upstream_cx_total"), 2);
}

#[test]
fn envoy_without_permission_is_told_so() {
    if !possible(&[tool("envoy/bin/envoy").to_str().expect("a path of letters")]) {
        return;
    }
    let mut lab = Lab::foreign();
    start_envoy(&mut lab, "stranger");
    let (own, port) = TUNNEL.rsplit_once(':').expect("an address");
    assert!(lab.call("foreign", own, port.parse().expect("a port")).is_err());
    eventually("ztunnel records it", || lab.has_line_of('b', &["sa/stranger", "response_flags=\"DENY\""]));
    let access = || fs::read_to_string(lab.dir.path().join("envoy-access.log")).unwrap_or_default();
    eventually("so does Envoy", || access().lines().any(|line| line.starts_with("UF")));
    // The connection itself is good: no failure of TLS, and no second one.
    assert_eq!(envoy_counts(&lab, "cluster.hbone.upstream_cx_connect_fail"), 0, "{}", access());
    assert_eq!(envoy_counts(&lab, "cluster.hbone.ssl.connection_error"), 0);
}

/// The forwarder by which programs come in that cannot show a certificate.
fn start_forwarder(lab: &mut Lab) {
    let [b1, _] = lab.addresses("b1");
    let script = format!(
        "exec {} {} {PLAIN} {b1}:15008 {} foreign",
        tool("peers/bin/python").display(),
        peer_script("forward.py").display(),
        lab.dir.path().display()
    );
    let mut child = lab.in_pod("foreign", &script).stdout(Stdio::piped()).spawn().expect("the shell runs");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("readable");
    lab.children.push(child);
    assert_eq!(line.trim(), "ready");
}

/// What h2spec asks for that does not apply, and why.
const NOT_APPLICABLE: &[(&str, &str)] = &[
    ("generic/2: Sends a WINDOW_UPDATE frame on half-closed (remote) stream", "wants a body; a GET has 400 and none"),
    ("generic/2: Sends a PRIORITY frame on half-closed (remote) stream", "wants a body"),
    (
        "http2/4.2: Sends a large size DATA frame that exceeds the SETTINGS_MAX_FRAME_SIZE",
        "most of that MiB is still on its way when the connection closes, and the reset for it may overtake the GOAWAY",
    ),
    (
        "http2/4.2: Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE",
        "is shorter than our frames may be",
    ),
    (
        "http2/5.1.2: Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded",
        "does not exceed it: each GET has been answered before the next comes",
    ),
];

#[test]
fn h2spec_finds_no_fault_in_framing_streams_and_errors() {
    let h2spec = tool("h2spec");
    if !possible(&[tool("peers/bin/python").to_str().expect("a path of letters"), h2spec.to_str().expect("one, too")]) {
        return;
    }
    let mut lab = Lab::foreign();
    start_forwarder(&mut lab);
    let (host, port) = PLAIN.rsplit_once(':').expect("an address");
    let report = lab.dir.path().join("h2spec.xml");
    let (said, _) = lab.said(&format!("{} -h {host} -p {port} -o 5 -j {}", h2spec.display(), report.display()));
    let failed = failures(&fs::read_to_string(&report).unwrap_or_else(|e| panic!("{e}: {said}")));
    let may_fail =
        |case: &str| NOT_APPLICABLE.iter().any(|(known, _)| *known == case) || ANSWERED_BEFORE.contains(&case);
    let faults: Vec<_> = failed.iter().filter(|case| !may_fail(case)).collect();
    assert!(faults.is_empty(), "{faults:#?}\n{said}");
    assert!(!lab.log('b').contains("panicked"), "{}", lab.log('b'));
}

/// What is wrong comes, in these, after the headers of a GET and on its stream. Where our 400 and the end of the stream
/// overtake it, it is dropped quietly as RFC 9113 has it (section 5.1, "closed").
const ANSWERED_BEFORE: [&str; 7] = [
    "http2/5.1: closed: Sends a DATA frame after sending RST_STREAM frame",
    "http2/5.1: closed: Sends a HEADERS frame after sending RST_STREAM frame",
    "http2/6.9.1: Sends multiple WINDOW_UPDATE frames increasing the flow control window to above 2^31-1 on a stream",
    "http2/8.1: Sends a second HEADERS frame without the END_STREAM flag",
    "http2/8.1.2.1: Sends a HEADERS frame that contains a pseudo-header field as trailers",
    "http2/8.1.2.6: Sends a HEADERS frame with the \"content-length\" header field which does not equal the DATA frame payload length",
    "http2/8.1.2.6: Sends a HEADERS frame with the \"content-length\" header field which does not equal the sum of the multiple DATA frames payload length",
];

/// The cases of a JUnit report that did not go as h2spec wants it.
fn failures(report: &str) -> BTreeSet<String> {
    let cases: Vec<&str> = report.split("<testcase ").skip(1).collect();
    assert!(cases.len() > 100, "{} cases were run: {report}", cases.len());
    let failed = cases.into_iter().filter(|case| case.contains("<failure") || case.contains("<error"));
    let attribute = |case: &str, name: &str| {
        let (_, rest) = case.split_once(&format!("{name}=\""))?;
        Some(rest.split_once('"')?.0.replace("&#34;", "\""))
    };
    let name = |case: &str| Some(format!("{}: {}", attribute(case, "package")?, attribute(case, "classname")?));
    failed.map(|case| name(case).unwrap_or_else(|| panic!("a case without a name: {case}"))).collect()
}

#[test]
fn nghttp_and_h2load_are_told_that_only_connect_is_served_and_overdo_it_at_their_cost() {
    let python = tool("peers/bin/python");
    if !possible(&[python.to_str().expect("a path of letters"), "nghttp", "h2load"]) {
        return;
    }
    let mut lab = Lab::foreign();
    start_forwarder(&mut lab);
    let (said, _) = lab.said(&format!("nghttp -nv http://{PLAIN}/"));
    assert!(said.contains(":status: 400") && said.contains("GOAWAY"), "{said}");
    let (said, _) = lab.said(&format!("h2load -n 2000 -c 4 -m 50 http://{PLAIN}/"));
    assert!(said.contains("2000 done") && said.contains("2000 4xx"), "{said}");
    let (said, _) = lab.said(&format!("h2load -n 100000 -c 1 -m 100 http://{PLAIN}/"));
    assert!(!said.contains("100000 4xx"), "{said}");
    eventually("that is told of", || {
        lab.has_line_of('b', &["HBONE connection failed", "sa/foreign", "response_flags=\"OVERLOAD\""])
    });
    let (said, _) = lab.said(&format!("h2load -n 100 -c 1 http://{PLAIN}/"));
    assert!(said.contains("100 4xx"), "it may come again: {said}");
}
