//! Through the waypoint and not around it: what is bound to one that cannot be used is closed, what its policies reach lets
//! nobody else in, and the destination knows the client behind it. All of it again where ztunnels ask for what they need to know.

#![forbid(unsafe_code)]

mod support;
#[expect(dead_code, reason = "the rest of it is for other programs")]
#[path = "support/tunnel.rs"]
mod tunnel;

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use http::{Method, Request};
use mesh_tests::cluster::state::Pod;
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::wait;

use support::{Case, Stage, said};
use tunnel::{Authority, Validity};

const CASES: &[Case] = &[
    ("a waypoint that is missing or does not admit the namespace closes what is bound to it", unusable_waypoint),
    ("a policy of the waypoint closes its port to everybody else and no other port", guarded_port),
    ("a policy of the class closes the way around as well", guarded_by_class),
    ("a client behind a waypoint is named at its destination, in metrics and log", named_at_destination),
    ("policy at the destination decides about the client behind the waypoint", decided_at_destination),
    ("a client is not who a peer says that is no waypoint of the destination", forged_client),
    ("a waypoint that is rolled out loses no request", rolled_out),
    ("what a waypoint's parameters ask for is there for as long as they do", by_parameters),
    ("on demand a service, a pod and an address of nobody are told apart at the first connection", asked_for),
    ("on demand a client behind a waypoint is named at its destination", named_on_demand),
    ("on demand policy at the destination decides about the client behind the waypoint", decided_at_destination),
    ("on demand what the control plane says nothing about stays closed, and what is known goes on", unanswered),
];

#[test]
fn through_the_waypoint_and_not_around_it() {
    support::run("waypt", CASES);
}

const SERVER: &str = "http://server/";
const DIRECT: &str = "http://server-v1/";
const REFUSED: &str = "000";
/// A waypoint's answer when the endpoint lets it in no more.
const UNAVAILABLE: &str = "503";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/other";
const WAYPOINT: &str = "spiffe://cluster.local/ns/shop/sa/waypoint";

/// One request after the other, each on a connection of its own, until it is told something.
const ASK: &str =
    "while ! read -t 0; do curl -s -o /dev/null -m 10 -w '%{http_code}\\n' http://server/ </dev/null; done";
/// Enough of them to have met every moment of two rollouts.
const MANY: usize = 200;

/// A Gateway that admits its own namespace only, and the Service of `server` for bytes.
const OBJECTS: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: private, namespace: outside, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: bytes, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec:
  selector: {app: server, version: v1}
  ports: [{name: tcp, port: 81, targetPort: 8080}]
"#;

fn ztunnel(stage: &Stage, node: &str) -> Result<Pod> {
    let is_it = |pod: &Pod| pod.node == node && pod.labels.get("app").is_some_and(|app| app == "ztunnel");
    let mut found: Vec<Pod> = stage.teller.session.pods().into_iter().filter(is_it).collect();
    ensure!(found.len() == 1, "{} ztunnels run on {node}", found.len());
    Ok(found.remove(0))
}

fn ipv4(pod: &Pod) -> Result<IpAddr> {
    pod.addresses.iter().copied().find(IpAddr::is_ipv4).with_context(|| format!("{} has no IPv4 address", pod.name))
}

/// Waits for a line in the log of a node's ztunnel that has all the words.
fn logged(stage: &Stage, node: &str, words: &[&str]) -> Result<String> {
    let ztunnel = ztunnel(stage, node)?;
    wait::until(&format!("a log line of {} with {words:?}", ztunnel.name), Duration::from_secs(5), || {
        let log = stage.log(&ztunnel)?;
        let found = log.lines().rfind(|line| words.iter().all(|word| line.contains(word)));
        found.map(str::to_owned).with_context(|| {
            let last: Vec<&str> = log.lines().rev().take(20).collect();
            format!("there is: {last:#?}")
        })
    })
}

fn metrics(stage: &Stage, node: &str) -> Result<String> {
    let argv = ["curl", "-sS", "-m", "3", "http://127.0.0.1:15020/metrics"];
    Ok(said(&stage.teller.session.exec(&ztunnel(stage, node)?.name, &argv)?.output()?))
}

/// The value of a counter that has no labels.
fn counter(stage: &Stage, node: &str, name: &str) -> Result<u64> {
    let text = metrics(stage, node)?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    Ok(value.unwrap_or_default())
}

fn bind(stage: &Stage, waypoint: &str) -> Result<()> {
    stage.kubectl(&["-n", "shop", "label", "service", "server", waypoint, "--overwrite"]).map(drop)
}

/// The condition `istio.io/WaypointBound` of Service `server` comes to say this.
fn bound(stage: &Stage, status: &str, reason: &str) -> Result<()> {
    wait::until(&format!("WaypointBound={status} ({reason})"), SETTLE, || {
        let path = "jsonpath={.status.conditions[?(@.type=='istio.io/WaypointBound')]['status','reason','message']}";
        let said = stage.kubectl(&["-n", "shop", "get", "service", "server", "-o", path])?;
        ensure!(said.starts_with(&format!("{status} {reason}")), "it says {said:?}");
        Ok(())
    })
}

/// Brings Services `server` and `bytes` behind waypoint `shop/waypoint`, which stays for the cases that follow.
fn behind_waypoint(stage: &Stage) -> Result<Pod> {
    stage.teller.session.apply(OBJECTS)?;
    stage.kubectl(&["apply", "-f", "tests/demo/waypoint.yaml"])?;
    stage.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=30s"])?;
    bind(stage, "istio.io/use-waypoint=waypoint")?;
    let waypoint = stage.teller.session.pod("shop/waypoint")?;
    wait::until("requests to go through the waypoint", SETTLE, || {
        let path = format!("/probe-{}", uuid::Uuid::new_v4().simple());
        let answer = stage.request("client", &[&format!("{SERVER}{path}")])?;
        ensure!(answer.good() && stage.log(&waypoint)?.contains(&path), "{answer:?}");
        Ok(())
    })?;
    Ok(waypoint)
}

fn unusable_waypoint(stage: &Stage) -> Result<()> {
    stage.teller.session.apply(OBJECTS)?;
    bind(stage, "istio.io/use-waypoint=nowhere")?;
    bound(stage, "False", "WaypointIsNotReady")?;
    stage.comes_to("client", &[SERVER], REFUSED)?;
    logged(stage, "node-a", &["direction=\"outbound\"", "nowhere", "response_flags=\"WAYPOINT_UNAVAILABLE\""])?;
    // Nothing else is closed.
    stage.traffic_flows()?;
    stage.kubectl(&["-n", "shop", "wait", "--for=condition=Ready", "pod", "--all", "--timeout=10s"])?;

    stage.kubectl(&["-n", "outside", "wait", "--for=condition=Programmed", "gateway/private", "--timeout=30s"])?;
    bind(stage, "istio.io/use-waypoint-namespace=outside")?;
    bind(stage, "istio.io/use-waypoint=private")?;
    bound(stage, "False", "AttachmentDenied")?;
    stage.comes_to("client", &[SERVER], REFUSED)?;
    logged(stage, "node-a", &["private", "response_flags=\"WAYPOINT_UNAVAILABLE\""])?;
    bind(stage, "istio.io/use-waypoint-namespace-")?;
    bind(stage, "istio.io/use-waypoint-")?;
    stage.comes_to("client", &[SERVER], "200")?;

    // A pod that is dialled itself.
    let server = stage.teller.session.pod("server-v1")?;
    let address = format!("http://{}:8080/", ipv4(&server)?);
    let name = server.name.as_str();
    stage.comes_to("client", &[&address], "200")?;
    stage.kubectl(&["-n", "shop", "label", "pod", name, "istio.io/use-waypoint=nowhere"])?;
    stage.comes_to("client", &[&address], REFUSED)?;
    stage.kubectl(&["-n", "shop", "label", "pod", name, "istio.io/use-waypoint-"])?;
    stage.comes_to("client", &[&address], "200")
}

/// Runs `check` with a policy for a waypoint, by what it targets, and takes the policy away again.
fn with_policy(stage: &Stage, namespace: &str, target: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    stage.teller.session.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: guard, namespace: {namespace}}}\n\
         spec:\n  targetRefs: [{target}]\n  action: DENY\n  rules: [{{to: [{{operation: {{methods: [DELETE]}}}}]}}]\n"
    ))?;
    let outcome = check();
    stage.kubectl(&["-n", namespace, "delete", "authorizationpolicy", "guard"])?;
    outcome?;
    stage.comes_to("client", &[DIRECT], "200")
}

fn connect(stage: &Stage, identity: &str, to: &str, original: Option<(&str, &str)>) -> Result<tunnel::Ending> {
    let client = stage.teller.session.pod("client")?;
    let server = stage.teller.session.pod("server-v1")?;
    let mut request = Request::builder().method(Method::CONNECT).uri(format!("{}:{to}", ipv4(&server)?));
    if let Some((identity, address)) = original {
        request = request.header("x-mesh-original-peer", identity).header("forwarded", format!("for=\"{address}\""));
    }
    let shown = Authority::of_the_mesh(stage)?.leaf(identity, Validity::Now)?;
    tunnel::ask(&client.netns, ipv4(&server)?, Some(&shown), request.body(())?)
}

fn guarded_port(stage: &Stage) -> Result<()> {
    behind_waypoint(stage)?;
    stage.comes_to("client", &[DIRECT], "200")?;
    with_policy(stage, "shop", "{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}", || {
        stage.comes_to("client", &[DIRECT], REFUSED)?;
        // That one may have been under way and cut; the next is refused by name.
        stage.comes_to("client", &[DIRECT], REFUSED)?;
        logged(stage, "node-b", &["direction=\"inbound\"", CLIENT, "shop/istio_only_waypoint_", "=\"DENY\""])?;
        stage.comes_to("stranger", &["http://server-v1.shop/"], REFUSED)?;
        stage.comes_to("client", &[SERVER], "200")?;
        stage.comes_to("client", &["-X", "DELETE", SERVER], "403")?;
        let answers = [("8080", CLIENT), ("8080", WAYPOINT), ("9", CLIENT)].map(|(port, identity)| {
            let ending = connect(stage, identity, port, None)?;
            ending.answer.map_err(anyhow::Error::msg)
        });
        let [client, waypoint, elsewhere] = answers;
        // Nobody listens on port 9: policy let it pass.
        ensure!((client?, waypoint?, elsewhere?) == (401, 200, 503), "client, waypoint, another port");
        // Probes go on: a pod gets ready by nothing else.
        let old = stage.teller.session.pod("server-v2")?;
        stage.kubectl(&["-n", "shop", "delete", "pod", &old.name])?;
        wait::until("another server", SETTLE, || {
            let new = stage.teller.session.pod("server-v2")?;
            ensure!(new.uid != old.uid, "the old one is there");
            stage.kubectl(&["-n", "shop", "wait", "--for=condition=Ready", "pod", &new.name, "--timeout=1s"])
        })?;
        Ok(())
    })
}

fn guarded_by_class(stage: &Stage) -> Result<()> {
    behind_waypoint(stage)?;
    let class = "{group: gateway.networking.k8s.io, kind: GatewayClass, name: istio-waypoint}";
    with_policy(stage, "istio-system", class, || {
        stage.comes_to("client", &[DIRECT], REFUSED)?;
        stage.comes_to("client", &[SERVER], "200")?;
        stage.comes_to("client", &["-X", "DELETE", SERVER], "403")
    })
}

fn named_at_destination(stage: &Stage) -> Result<()> {
    named(stage, |condition| condition())
}

/// What only telemetry wants to know is asked for then and not waited for: one of the next connections is named.
fn named_on_demand(stage: &Stage) -> Result<()> {
    named(stage, |condition| wait::until("a connection to be named", SETTLE, condition))
}

/// `settled` says whether the first connection has to be named.
fn named(stage: &Stage, settled: impl Fn(&dyn Fn() -> Result<()>) -> Result<()>) -> Result<()> {
    behind_waypoint(stage)?;
    let client = stage.teller.session.pod("client")?;
    let name = format!("src.workload=\"{}\"", client.name);
    let asked = |url: &str, service: &str| {
        stage.comes_to("client", &[url], "200")?;
        let text = metrics(stage, "node-b")?;
        let labels = [
            "istio_tcp_connections_opened_total{reporter=\"destination\",source_workload=\"client\"".to_owned(),
            format!("source_principal=\"{CLIENT}\""),
            format!("destination_service_name=\"{service}\""),
        ];
        let is_opened = text.lines().any(|line| labels.iter().all(|label| line.contains(label)));
        let all: Vec<&str> = text.lines().filter(|l| l.starts_with("istio_tcp_connections_opened")).collect();
        ensure!(is_opened, "none to {service} is counted for the client: {all:#?}");
        Ok(())
    };
    settled(&|| asked(SERVER, "server"))?;
    // Bytes have a tunnel of their own, which ends with them.
    settled(&|| asked("http://bytes:81/", "bytes"))?;
    let identity = format!("src.identity=\"{CLIENT}\"");
    let via = format!("via.identity=\"{WAYPOINT}\"");
    let bytes = "dst.service=\"bytes.shop.svc.cluster.local\"";
    let line = logged(stage, "node-b", &["direction=\"inbound\"", &name, &identity, &via, bytes])?;
    let waypoint = stage.teller.session.pod("shop/waypoint")?;
    for (field, pod) in [("src.addr", &client), ("via.addr", &waypoint)] {
        let of_pod = |ip: &IpAddr| {
            let with_port = SocketAddr::new(*ip, 0).to_string();
            line.contains(&format!("{field}={}", with_port.trim_end_matches('0')))
        };
        ensure!(pod.addresses.iter().any(of_pod), "{field} is not of {}: {line}", pod.name);
    }
    let text = metrics(stage, "node-b")?;
    let of_waypoint = |line: &&str| line.contains("reporter=\"destination\",source_workload=\"waypoint\"");
    ensure!(text.lines().find(of_waypoint).is_none(), "something is counted for the waypoint itself:\n{text}");
    ensure!(counter(stage, "node-b", "ztunnel_original_peer_dropped_total")? == 0, "the waypoint was not believed");
    Ok(())
}

fn decided_at_destination(stage: &Stage) -> Result<()> {
    behind_waypoint(stage)?;
    stage.comes_to("other", &[SERVER], "200")?;
    stage.comes_to("client", &[SERVER], "200")?;
    // Let in by name; the waypoint's own name is on no list.
    stage.kubectl(&["apply", "-f", "tests/demo/allow-client.yaml"])?;
    stage.comes_to("other", &[SERVER], UNAVAILABLE)?;
    stage.comes_to("client", &[SERVER], "200")?;
    stage.comes_to("client", &["http://bytes:81/"], "200")?;
    stage.comes_to("other", &["http://bytes:81/"], REFUSED)?;
    stage.kubectl(&["delete", "-f", "tests/demo/allow-client.yaml"])?;
    stage.comes_to("other", &[SERVER], "200")?;

    // Kept out by name, also in the middle of it.
    let url = format!("{SERVER}slow");
    let mut ended = stage.teller.open_long_lived("other", &url)?;
    let mut kept = stage.teller.open_long_lived("client", &url)?;
    stage.kubectl(&["apply", "-f", "tests/demo/deny-other.yaml"])?;
    ended.ends(SETTLE)?;
    let of_other = format!("src.identity=\"{OTHER}\"");
    let via = format!("via.identity=\"{WAYPOINT}\"");
    logged(stage, "node-b", &["direction=\"inbound\"", &of_other, &via, "response_flags=\"DENY\""])?;
    stage.comes_to("other", &[SERVER], UNAVAILABLE)?;
    kept.wait_more(1, SETTLE)?;
    stage.kubectl(&["delete", "-f", "tests/demo/deny-other.yaml"])?;
    stage.comes_to("other", &[SERVER], "200")
}

fn forged_client(stage: &Stage) -> Result<()> {
    behind_waypoint(stage)?;
    let client = ipv4(&stage.teller.session.pod("client")?)?.to_string();
    let ask = |identity: &str, original: &str| -> Result<u16> {
        let ending = connect(stage, identity, "8080", Some((original, &client)))?;
        ending.answer.map_err(anyhow::Error::msg)
    };
    stage.kubectl(&["apply", "-f", "tests/demo/allow-client.yaml"])?;
    stage.comes_to("other", &[DIRECT], REFUSED)?;
    let before = counter(stage, "node-b", "ztunnel_original_peer_dropped_total")?;
    let answers = [
        (ask(OTHER, CLIENT)?, 401, "an ordinary peer"),
        (ask(CLIENT, OTHER)?, 200, "an ordinary peer of somebody who is not let in"),
        (ask(WAYPOINT, CLIENT)?, 200, "the waypoint"),
        (ask(WAYPOINT, OTHER)?, 401, "the waypoint of somebody who is not let in"),
        (ask(WAYPOINT, "spiffe://elsewhere/ns/shop/sa/client")?, 401, "the waypoint of another trust domain"),
    ];
    for (answer, wanted, who) in answers {
        ensure!(answer == wanted, "{who}: {answer}, not {wanted}");
    }
    let dropped = counter(stage, "node-b", "ztunnel_original_peer_dropped_total")? - before;
    ensure!(dropped == 3, "{dropped} false claims are counted");
    let of_other = format!("src.identity=\"{OTHER}\"");
    let line = logged(stage, "node-b", &["direction=\"inbound\"", &of_other, "response_flags=\"DENY\""])?;
    ensure!(line.contains("via.identity") == line.contains(WAYPOINT), "{line}");

    // No longer its waypoint: now its word is nobody's.
    bind(stage, "istio.io/use-waypoint-")?;
    stage.kubectl(&["-n", "shop", "delete", "service", "bytes"])?;
    wait::until("the waypoint to be believed no more", SETTLE, || {
        let answer = ask(WAYPOINT, CLIENT)?;
        ensure!(answer == 401, "{answer}");
        Ok(())
    })?;
    stage.kubectl(&["delete", "-f", "tests/demo/allow-client.yaml"])?;
    stage.comes_to("other", &[DIRECT], "200")
}

/// The services that the ztunnel of a node knows.
fn known(stage: &Stage, node: &str) -> Result<Vec<String>> {
    let argv = ["curl", "-sS", "-m", "3", "http://127.0.0.1:15000/config_dump"];
    let said = said(&stage.teller.session.exec(&ztunnel(stage, node)?.name, &argv)?.output()?);
    let dump: serde_json::Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    let services = dump["services"].as_array().context("no services in the dump")?;
    Ok(services.iter().filter_map(|service| Some(service["name"].as_str()?.to_owned())).collect())
}

/// A pod outside the mesh.
const OUTSIDE: &str = "outside/stranger";

fn asked_for(stage: &Stage) -> Result<()> {
    let settings = ["XDS_ON_DEMAND=true", "DNS_CAPTURE=false"];
    stage.kubectl(&["-n", "istio-system", "set", "env", "daemonset/ztunnel", settings[0], settings[1]])?;
    stage.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=60s"])?;
    wait::until("the former ztunnels to be gone", SETTLE, || {
        ["node-a", "node-b"].iter().try_for_each(|node| ztunnel(stage, node).map(drop))
    })?;
    let server = stage.teller.session.pod("server-v1")?;
    let before = known(stage, "node-a")?;
    stage.comes_to("client", &["http://server-v2/"], "200")?;
    let after = known(stage, "node-a")?;
    let new: Vec<&String> = after.iter().filter(|name| !before.contains(name)).collect();
    ensure!(new == ["server-v2"], "not that service alone has come: {before:?}, then {after:?}");
    let direct = format!("http://{}:8080/", ipv4(&server)?);
    stage.comes_to("client", &[&direct], "200")?;
    let encrypted = ["direction=\"outbound\"", "dst.hbone_addr=", "dst.workload=\"server-v1"];
    logged(stage, "node-a", &encrypted)?;
    let address = ipv4(&stage.teller.session.pod(OUTSIDE)?)?;
    // Nobody listens there, which the stranger's own kernel says: the connection has gone through.
    let answer = stage.request("client", &[&format!("http://{address}:9/")])?;
    ensure!(answer.exit == 7 || answer.exit == 56, "neither refused nor reset: {answer:?}");
    logged(stage, "node-a", &["direction=\"outbound\"", &format!("dst.addr={address}:9")])?;
    Ok(())
}

fn unanswered(stage: &Stage) -> Result<()> {
    stage.comes_to("client", &[DIRECT], "200")?;
    stage.kubectl(&["-n", "istio-system", "scale", "deployment/istiod", "--replicas=0"])?;
    wait::until("the control plane to be gone", SETTLE, || {
        ensure!(stage.teller.session.pod("istio-system/istiod").is_err(), "it is there");
        Ok(())
    })?;
    let outcome = (|| {
        let answer = stage.request("client", &[DIRECT])?;
        ensure!(answer.good(), "what is known goes on: {answer:?}");
        // TEST-NET-2: nobody's.
        let answer = stage.request("client", &["-m", "20", "http://198.51.100.77/"])?;
        ensure!(answer.status == REFUSED, "{answer:?}");
        let words = ["direction=\"outbound\"", "198.51.100.77", "the control plane has not said", "=\"CONNECT\""];
        logged(stage, "node-a", &words).map(drop)
    })();
    stage.kubectl(&["-n", "istio-system", "scale", "deployment/istiod", "--replicas=1"])?;
    stage.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod", "--timeout=60s"])?;
    outcome
}

/// The shell that asks; it ends with this.
struct Asking(Child);

impl Drop for Asking {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As `kubectl rollout restart` does it: the old pods go while requests go on.
fn rolled_out(stage: &Stage) -> Result<()> {
    let first = behind_waypoint(stage)?;
    let session = &stage.teller.session;
    let log = session.record.run_dir.join("asked.log");
    let mut command = session.exec("client", &["bash", "-c", ASK])?;
    let mut asking = Asking(command.stdin(Stdio::piped()).stdout(fs::File::create(&log)?).spawn()?);
    for _ in 0..2 {
        stage.kubectl(&["-n", "shop", "rollout", "restart", "deployment/waypoint"])?;
        stage.kubectl(&["-n", "shop", "rollout", "status", "deployment/waypoint", "--timeout=60s"])?;
    }
    wait::until("the old pods to be gone and enough to be asked", SETTLE, || {
        let left: Vec<_> = session
            .pods()
            .into_iter()
            .filter(|pod| pod.namespace == "shop" && pod.name.starts_with("waypoint-"))
            .collect();
        ensure!(left.len() == 1 && left[0].uid != first.uid, "{} waypoints", left.len());
        let asked = fs::read_to_string(&log)?.lines().count();
        ensure!(asked >= MANY, "{asked} requests");
        Ok(())
    })?;
    asking.0.stdin.take().context("a pipe")?.write_all(b"\n")?;
    asking.0.wait()?;
    let said = fs::read_to_string(&log)?;
    let lost: Vec<_> = said.lines().enumerate().filter(|(_, status)| *status != "200").collect();
    ensure!(lost.is_empty(), "of {} requests: {lost:?}", said.lines().count());
    Ok(())
}

/// By the rights that `manifests/install.yaml` gives.
fn by_parameters(stage: &Stage) -> Result<()> {
    behind_waypoint(stage)?;
    let there = |what: &str| stage.kubectl(&["-n", "shop", "get", what, "waypoint", "-o", "name"]).map(drop);
    let gone = |what: &str| {
        let said =
            stage.kubectl(&["-n", "shop", "get", what, "--field-selector", "metadata.name=waypoint", "-o", "name"])?;
        ensure!(said.trim().is_empty(), "there is {said:?}");
        Ok(())
    };
    let refer = |reference: &str| {
        let patch = format!("{{\"spec\": {{\"infrastructure\": {{\"parametersRef\": {reference}}}}}}}");
        stage.kubectl(&["-n", "shop", "patch", "gateway", "waypoint", "--type", "merge", "-p", &patch]).map(drop)
    };
    stage.teller.session.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: of-waypoint, namespace: shop}\ndata:\n  \
         horizontalPodAutoscaler: \"spec: {maxReplicas: 3}\"\n  podDisruptionBudget: \"spec: {minAvailable: 1}\"\n",
    )?;
    refer("{\"group\": \"\", \"kind\": \"ConfigMap\", \"name\": \"of-waypoint\"}")?;
    for what in ["horizontalpodautoscalers", "poddisruptionbudgets"] {
        wait::until(&format!("{what} to come"), SETTLE, || there(what))?;
    }
    refer("null")?;
    for what in ["horizontalpodautoscalers", "poddisruptionbudgets"] {
        wait::until(&format!("{what} to go"), SETTLE, || gone(what))?;
    }
    stage.kubectl(&["-n", "shop", "delete", "configmap", "of-waypoint"])?;
    stage.comes_to("client", &[SERVER], "200")?;

    let class = ["get", "gatewayclass", "istio-waypoint", "-o", "jsonpath={.metadata.uid}"];
    let before = stage.kubectl(&class)?;
    stage.kubectl(&["delete", "gatewayclass", "istio-waypoint"])?;
    wait::until("the class to be back", SETTLE, || {
        let now = stage.kubectl(&class)?;
        ensure!(!now.is_empty() && now != before, "it is {now:?}");
        Ok(())
    })
}
