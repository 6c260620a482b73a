//! Bad input to a running mesh: wrong certificates, malformed tunnel requests, garbage on every port, tokens that prove too little.
//! Each gets a clear answer, and nobody else notices.

#![forbid(unsafe_code)]

#[path = "support/garbage.rs"]
mod garbage;
mod support;
#[path = "support/tokens.rs"]
mod tokens;
#[path = "support/tunnel.rs"]
mod tunnel;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use http::{Method, Request};
use mesh_tests::cluster::state::Pod;
use mesh_tests::cluster::{API_PORT, api};
use mesh_tests::memory;
use mesh_tests::places::Places;
use mesh_tests::topology::PARENT_V4;
use mesh_tests::wait;

use garbage::Target;
use support::{Case, Stage, said};
use tokens::{AUDIENCE, Asking, ControlPlane};
use tunnel::{Authority, Credentials, Validity};

const CASES: &[Case] = &[
    ("clients without a good certificate are refused by reason", wrong_certificates),
    ("malformed tunnel requests are answered by status", malformed_requests),
    ("a denied identity is answered 401", denied_identity),
    ("a client of a tunnel is who its certificate says, whatever its headers say", headers_of_another),
    ("a node's token is good for identities of that node only", identity_of_another_node),
    ("an ordinary pod is nobody else", ordinary_pod),
    ("tokens that are over, foreign, forged or none are refused", bad_tokens),
    ("a node never sees another node's enrolments", enrolments_of_another_node),
    ("ztunnel names missing capabilities and what to do", missing_capabilities),
    ("ztunnel names a cgroup root or BPF directory that is none", wrong_mounts),
    ("garbage on every port hurts nobody", garbage_everywhere),
];

#[test]
fn bad_input_gets_a_clear_answer_and_loses_nothing() {
    support::run("badin", CASES);
}

/// Arguments, environment, and the words that the answer must have.
type Mistaken<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], &'a [&'a str]);

#[test]
fn programs_name_every_mistake_and_end_with_status_2() {
    let cases: &[Mistaken<'_>] = &[
        ("ztunnel", &["--frobnicate", "-z", "sideways"], &[], &["--frobnicate", "-z", "sideways"]),
        (
            "ztunnel",
            &[],
            &[("STATS_PORT", "many"), ("DRAIN_DURATION", "soon"), ("PROXY_MODE", "sideways"), ("LOG_FORMAT", "xml")],
            &["NODE_NAME", "STATS_PORT", "PROXY_MODE", "LOG_FORMAT", "not"],
        ),
        (
            "ztunnel",
            &[],
            &[("PROXY_MODE", "dedicated"), ("INPOD_UDS", "/run/agent.sock"), ("ADMIN_PORT", "15000")],
            &["PROXY_WORKLOAD_INFO", "INPOD_UDS", "ADMIN_PORT"],
        ),
        ("ztunnel", &[], &[("NODE_NAME", "n"), ("RUST_LOG", "loud=very=much")], &["RUST_LOG"]),
        ("waypoint", &["--frobnicate", "sideways"], &[], &["--frobnicate", "sideways"]),
        (
            "waypoint",
            &[],
            &[("HBONE_PORT", "99999"), ("ACCESS_LOG", "loud"), ("SECRET_TTL", "ever")],
            &["HBONE_PORT", "ACCESS_LOG", "SECRET_TTL", "POD_NAME", "GATEWAY_NAME"],
        ),
        ("istiod-lite", &["--frobnicate"], &[], &["--frobnicate"]),
        ("istiod-lite", &["standalone"], &[], &["--data-dir"]),
        ("istiod-lite", &["standalone", "--data-dir", "x", "--listen", "nowhere"], &[], &["--listen", "nowhere"]),
        (
            "istiod-lite",
            &[],
            &[("ISTIOD_GRPC_ADDR", "nowhere"), ("LOG_FORMAT", "xml"), ("MAX_WORKLOAD_CERT_TTL", "ever")],
            &["ISTIOD_GRPC_ADDR", "LOG_FORMAT", "MAX_WORKLOAD_CERT_TTL"],
        ),
        ("lab", &["frobnicate"], &[], &["frobnicate"]),
        ("lab", &["demo", "--frobnicate"], &[], &["--frobnicate"]),
    ];
    let binaries = Places::find().expect("cargo runs this test").binaries;
    for (program, arguments, settings, words) in cases {
        let path = binaries.join(program);
        if !path.exists() {
            let missing = format!("{} is missing: run `cargo xtask build`", path.display());
            assert!(std::env::var_os("LAB").is_none_or(|value| value != "required"), "LAB=required, but {missing}");
            eprintln!("SKIPPED: {missing}");
            continue;
        }
        let mut command = Command::new("timeout");
        command.arg("10").arg(&path).args(*arguments).env_clear().env("PATH", mesh_tests::sys::PATH);
        let output = command.envs(settings.iter().copied()).output().expect("it runs");
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{program} {arguments:?} {settings:?}: {text}");
        for word in *words {
            assert!(text.contains(word), "{program} {arguments:?} {settings:?}: no {word} in {text}");
        }
    }
}

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/other";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

fn ztunnel(stage: &Stage, node: &str) -> Result<Pod> {
    let mut pods = stage.teller.session.pods().into_iter();
    pods.find(|pod| pod.node == node && pod.labels.get("app").is_some_and(|app| app == "ztunnel"))
        .with_context(|| format!("no ztunnel runs on {node}"))
}

fn ipv4(pod: &Pod) -> Result<IpAddr> {
    pod.addresses.iter().copied().find(IpAddr::is_ipv4).with_context(|| format!("{} has no IPv4 address", pod.name))
}

fn connect(authority: &str) -> Result<Request<()>> {
    Ok(Request::builder().method(Method::CONNECT).uri(authority).body(())?)
}

/// Waits for a line of a ztunnel's log that names the connection and has all the words.
fn logged(stage: &Stage, ztunnel: &Pod, source: SocketAddr, words: &[&str]) -> Result<()> {
    let source = format!("src.addr={source} ");
    wait::until(&format!("a log line with {source}and {words:?}"), Duration::from_secs(3), || {
        let log = stage.log(ztunnel)?;
        let of_it: Vec<&str> = log.lines().filter(|line| line.contains(&source)).collect();
        let found = of_it.iter().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(found, "there is: {of_it:#?}");
        Ok(())
    })
}

fn wrong_certificates(stage: &Stage) -> Result<()> {
    let (client, server) = (stage.teller.session.pod("client")?, stage.teller.session.pod("server-v1")?);
    let (ca, ztunnel) = (Authority::of_the_mesh(stage)?, ztunnel(stage, "node-b")?);
    let to = ipv4(&server)?;
    let request = || connect(&format!("{to}:8080"));
    let good = tunnel::ask(&client.netns, to, Some(&ca.leaf(CLIENT, Validity::Now)?), request()?)?;
    ensure!(good.answer == Ok(200), "a good certificate is let in: {good:?}");
    // What is shown, the alert the client gets, and what the log says.
    let leaf_of = |root: &str| Authority::stranger(root)?.leaf(CLIENT, Validity::Now);
    let cases: [(&str, Option<Credentials>, &str, &str); 7] = [
        ("another root", Some(leaf_of("elsewhere")?), "UnknownCA", "does not chain"),
        ("another root under the name of ours", Some(leaf_of("cluster.local")?), "DecryptError", "does not chain"),
        ("itself", Some(tunnel::self_signed(CLIENT)?), "UnknownCA", "does not chain"),
        (
            "another trust domain",
            Some(ca.leaf("spiffe://elsewhere/ns/shop/sa/client", Validity::Now)?),
            "alert",
            "spiffe://elsewhere/ns/shop/sa/client",
        ),
        ("no identity", Some(ca.leaf("https://example.com/", Validity::Now)?), "alert", "no SPIFFE identity"),
        ("an end in the past", Some(ca.leaf(CLIENT, Validity::Over)?), "CertificateExpired", "expired"),
        ("nothing", None, "CertificateRequired", "no certificate"),
    ];
    for (shown, credentials, alert, reason) in cases {
        let ending = tunnel::ask(&client.netns, to, credentials.as_ref(), request()?)?;
        let told = ending.answer.as_ref().err().with_context(|| format!("{shown}: let in: {ending:?}"))?;
        ensure!(told.contains(alert), "{shown}: the client is told {told:?}, not {alert}");
        logged(stage, &ztunnel, ending.local, &["direction=\"inbound\"", reason]).context(shown)?;
        stage.traffic_flows()?;
    }
    Ok(())
}

fn malformed_requests(stage: &Stage) -> Result<()> {
    let (client, server) = (stage.teller.session.pod("client")?, stage.teller.session.pod("server-v1")?);
    let (good, ztunnel) = (Authority::of_the_mesh(stage)?.leaf(CLIENT, Validity::Now)?, ztunnel(stage, "node-b")?);
    let (to, elsewhere) = (ipv4(&server)?, ipv4(&client)?);
    let get = Request::builder().uri(format!("https://{to}:8080/")).body(())?;
    let cases = [
        ("GET", get, 400, "not a CONNECT"),
        ("no port", connect(&to.to_string())?, 400, "not a CONNECT"),
        ("port 0", connect(&format!("{to}:0"))?, 400, "not a CONNECT"),
        ("a port beyond 65535", connect(&format!("{to}:80800"))?, 400, "not a CONNECT"),
        ("another pod's address", connect(&format!("{elsewhere}:8080"))?, 400, "tunnel request for"),
        ("the proxy's own port", connect(&format!("{to}:15008"))?, 503, "the proxy's own"),
        ("a service that is not there", connect("nowhere.shop.svc.cluster.local:80")?, 503, "nowhere.shop"),
        ("a port nobody listens on", connect(&format!("{to}:9"))?, 503, "connecting to"),
    ];
    for (name, request, status, reason) in cases {
        let ending = tunnel::ask(&client.netns, to, Some(&good), request)?;
        ensure!(ending.answer == Ok(status), "{name}: {ending:?}, not {status}");
        logged(stage, &ztunnel, ending.local, &["direction=\"inbound\"", reason]).context(name)?;
        stage.traffic_flows()?;
    }
    Ok(())
}

fn denied_identity(stage: &Stage) -> Result<()> {
    let (client, server) = (stage.teller.session.pod("client")?, stage.teller.session.pod("server-v1")?);
    let (ca, ztunnel) = (Authority::of_the_mesh(stage)?, ztunnel(stage, "node-b")?);
    let to = ipv4(&server)?;
    let ask = |identity: &str| -> Result<tunnel::Ending> {
        let shown = ca.leaf(identity, Validity::Now)?;
        tunnel::ask(&client.netns, to, Some(&shown), connect(&format!("{to}:8080"))?)
    };
    stage.kubectl(&["apply", "-f", "tests/demo/allow-client.yaml"])?;
    // The address it comes from counts for nothing, only the identity does.
    let denied = wait::until("the policy to arrive", Duration::from_secs(5), || {
        let ending = ask(OTHER)?;
        ensure!(ending.answer == Ok(401), "{ending:?}");
        Ok(ending)
    });
    let allowed = ask(CLIENT)?;
    stage.kubectl(&["delete", "-f", "tests/demo/allow-client.yaml"])?;
    ensure!(allowed.answer == Ok(200), "{allowed:?}");
    logged(stage, &ztunnel, denied?.local, &[OTHER, "error=\"policy: "])?;
    stage.comes_to("other", &["http://server-v1/"], "200")
}

/// `forwarded` and `baggage` are for waypoints to say, and only of the destinations they stand before.
fn headers_of_another(stage: &Stage) -> Result<()> {
    let (client, server) = (stage.teller.session.pod("client")?, stage.teller.session.pod("server-v1")?);
    let (ca, ztunnel) = (Authority::of_the_mesh(stage)?, ztunnel(stage, "node-b")?);
    let to = ipv4(&server)?;
    let ask = |identity: &str| -> Result<tunnel::Ending> {
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(format!("{to}:8080"))
            .header("forwarded", "for=203.0.113.9;by=198.51.100.7;host=nowhere.example")
            .header("baggage", "k8s.namespace.name=kube-system,k8s.deployment.name=liar,service.name=liar")
            .header("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/client")
            .header("x-istio-source", "spiffe://cluster.local/ns/shop/sa/client")
            .body(())?;
        tunnel::ask(&client.netns, to, Some(&ca.leaf(identity, Validity::Now)?), request)
    };
    let granted = ask(CLIENT)?;
    ensure!(granted.answer == Ok(200), "{granted:?}");
    logged(stage, &ztunnel, granted.local, &["direction=\"inbound\"", &format!("src.identity=\"{CLIENT}\"")])?;
    stage.kubectl(&["apply", "-f", "tests/demo/allow-client.yaml"])?;
    let denied = wait::until("the policy to arrive", Duration::from_secs(5), || {
        let ending = ask(OTHER)?;
        ensure!(ending.answer == Ok(401), "{ending:?}");
        Ok(ending)
    });
    stage.kubectl(&["delete", "-f", "tests/demo/allow-client.yaml"])?;
    logged(stage, &ztunnel, denied?.local, &[OTHER, "error=\"policy: "])?;
    let log = stage.log(&ztunnel)?;
    for word in ["203.0.113.9", "198.51.100.7", "nowhere.example", "liar"] {
        ensure!(!log.contains(word), "{word} has come into the log");
    }
    let argv = ["curl", "-sS", "-m", "3", "http://127.0.0.1:15020/metrics"];
    let metrics = said(&stage.teller.session.exec(&ztunnel.name, &argv)?.output()?);
    ensure!(metrics.lines().any(|line| line.starts_with("ztunnel_baggage_dropped_total")), "not counted:\n{metrics}");
    ensure!(!metrics.contains("liar"), "a label of the client's making");
    stage.comes_to("other", &["http://server-v1/"], "200")
}

/// Whether an error says that the caller is not who it would have to be.
fn unauthenticated<T>(what: &str, outcome: Result<T>) -> Result<()> {
    let Err(e) = outcome else { anyhow::bail!("{what}: granted") };
    let text = format!("{e:#}");
    let refused = text.contains("Unauthenticated") || text.contains("does not have valid authentication credentials");
    ensure!(refused, "{what}: not refused as it should be: {text}");
    Ok(())
}

fn identity_of_another_node(stage: &Stage) -> Result<()> {
    let ztunnel = ztunnel(stage, "node-b")?;
    let token = tokens::bound(stage, &ztunnel, "ztunnel", AUDIENCE)?;
    let plane = ControlPlane::with_token(stage, &token)?;
    let own = plane.certificate(SERVER, Asking::Impersonating)?;
    ensure!(own.identity().to_string() == SERVER, "{:?}", own.identity());
    unauthenticated("client runs on node-a", plane.certificate(CLIENT, Asking::Impersonating))?;
    unauthenticated(
        "istiod's own",
        plane.certificate("spiffe://cluster.local/ns/shop/sa/nobody", Asking::Impersonating),
    )?;
    unauthenticated(
        "another trust domain",
        plane.certificate("spiffe://elsewhere/ns/shop/sa/server", Asking::Impersonating),
    )?;
    let istiod = stage.teller.session.pod("istio-system/istiod")?;
    let log = stage.log(&istiod)?;
    let named = log.lines().any(|line| line.contains("certificate refused") && line.contains(CLIENT));
    ensure!(named, "the control plane's log does not say who asked for what");
    stage.traffic_flows()
}

fn ordinary_pod(stage: &Stage) -> Result<()> {
    let client = stage.teller.session.pod("client")?;
    let plane = ControlPlane::with_token(stage, &tokens::bound(stage, &client, "client", AUDIENCE)?)?;
    let own = plane.certificate(CLIENT, Asking::AsSelf)?;
    ensure!(own.identity().to_string() == CLIENT, "{:?}", own.identity());
    unauthenticated("another account", plane.certificate(OTHER, Asking::Impersonating))?;
    // The request names another; the token does not.
    let outcome = plane.certificate(OTHER, Asking::AsSelf);
    let wrong = outcome.err().map(|e| format!("{e:#}")).context("a certificate of another identity was given")?;
    ensure!(
        wrong.contains(CLIENT),
        "the certificate is for the token's own identity, whatever the request says: {wrong}"
    );
    ensure!(
        plane.enrolments("node-a", std::slice::from_ref(&client.uid))?.is_empty(),
        "an ordinary pod sees enrolments"
    );
    let report = plane.report().err().map(|e| format!("{e:#}")).context("an ordinary pod reports enrolments")?;
    ensure!(report.contains("only a node proxy"), "{report}");
    stage.traffic_flows()
}

fn bad_tokens(stage: &Stage) -> Result<()> {
    let ztunnel = ztunnel(stage, "node-b")?;
    let good = tokens::bound(stage, &ztunnel, "ztunnel", AUDIENCE)?;
    let (key, now) = (tokens::true_key(stage)?, tokens::now()?);
    let age = |claims: &mut serde_json::Value, ended: u64| {
        claims["iat"] = (now - 1200).into();
        claims["nbf"] = (now - 1200).into();
        claims["exp"] = ended.into();
    };
    // Proof that what is refused below is refused for its claims: the same forgery with good ones passes.
    let control = tokens::resigned(&good, &key, |claims| age(claims, now + 300))?;
    ControlPlane::with_token(stage, &control)?.certificate(SERVER, Asking::Impersonating)?;
    let foreign_key = rcgen::KeyPair::generate()?;
    let cases = [
        ("over", tokens::resigned(&good, &key, |claims| age(claims, now - 60))?),
        ("of another key", tokens::resigned(&good, &foreign_key, |_| ())?),
        (
            "of a pod that is gone",
            tokens::resigned(&good, &key, |claims| {
                claims["kubernetes.io"]["pod"]["uid"] = uuid::Uuid::new_v4().to_string().into();
            })?,
        ),
        ("for another audience", tokens::bound(stage, &ztunnel, "ztunnel", "https://kubernetes.default.svc")?),
        ("cut short", good[..good.len() - 8].to_owned()),
        ("no token at all", "hello".to_owned()),
        ("longer than any token", "x".repeat(12_000)),
    ];
    for (name, token) in cases {
        let plane = ControlPlane::with_token(stage, &token)?;
        unauthenticated(name, plane.certificate(SERVER, Asking::Impersonating))?;
        unauthenticated(name, plane.enrolments("node-b", &[]))?;
    }
    ControlPlane::with_token(stage, &good)?.certificate(SERVER, Asking::Impersonating)?;
    stage.traffic_flows()
}

fn enrolments_of_another_node(stage: &Stage) -> Result<()> {
    let pods = stage.teller.session.pods();
    let of_node = |node: &str| -> BTreeSet<String> {
        let joined = pods.iter().filter(|pod| pod.node == node && pod.namespace == "shop");
        joined.map(|pod| pod.uid.clone()).collect()
    };
    let (here, elsewhere) = (of_node("node-b"), of_node("node-a"));
    ensure!(here.len() >= 2 && elsewhere.len() >= 2, "{here:?} {elsewhere:?}");
    let ztunnel = ztunnel(stage, "node-b")?;
    let plane = ControlPlane::with_token(stage, &tokens::bound(stage, &ztunnel, "ztunnel", AUDIENCE)?)?;
    let also: Vec<String> = elsewhere.iter().cloned().collect();
    // Neither calling ourselves by the other's name nor asking for its pods by UID helps.
    let seen = plane.enrolments("node-a", &also)?;
    ensure!(seen == here, "sees {seen:?}, should see {here:?}, never {elsewhere:?}");
    stage.traffic_flows()
}

/// A ztunnel outside the lab's pods, with rights and settings of the test's own. It is to fail before it touches anything.
fn rogue_ztunnel(stage: &Stage, setpriv: &[&str], settings: &[(&str, &str)]) -> Result<(Option<i32>, String)> {
    let session = &stage.teller.session;
    let bpffs = session.record.bpffs.join("rogue");
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", session.wire().path().display())).args(["timeout", "20", "setpriv"]).args(setpriv);
    command.arg("--").arg(session.places.binaries.join("ztunnel")).env_clear().env("PATH", mesh_tests::sys::PATH);
    command.env("NODE_NAME", "node-x").env("BPFFS_DIR", bpffs).envs(settings.iter().copied());
    let output = command.output()?;
    Ok((output.status.code(), said(&output)))
}

fn missing_capabilities(stage: &Stage) -> Result<()> {
    for (dropped, names) in [
        ("-bpf", &["CAP_BPF"][..]),
        ("-net_admin", &["CAP_NET_ADMIN"]),
        ("-bpf,-sys_admin,-sys_ptrace", &["CAP_BPF", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"]),
    ] {
        let (code, text) = rogue_ztunnel(stage, &["--inh-caps", "-all", "--bounding-set", dropped], &[])?;
        ensure!(code == Some(1), "{dropped}: {code:?} {text}");
        for word in names.iter().chain(&["missing capabilities", "securityContext.capabilities.add"]) {
            ensure!(text.contains(word), "{dropped}: no {word} in {text}");
        }
        ensure!(!text.contains("CAP_NET_RAW"), "{dropped}: names what is there: {text}");
    }
    stage.traffic_flows()
}

fn wrong_mounts(stage: &Stage) -> Result<()> {
    let plain = tempfile::tempdir()?;
    let path = plain.path().to_str().context("a path of text")?;
    let (code, text) = rogue_ztunnel(stage, &[], &[("CGROUP_ROOT", path)])?;
    ensure!(code == Some(1) && text.contains(path), "{code:?} {text}");
    ensure!(text.contains("not the root of a cgroup2 hierarchy") && text.contains("CGROUP_ROOT"), "{text}");
    let (code, text) = rogue_ztunnel(stage, &[], &[("BPFFS_DIR", "/proc/self/nowhere")])?;
    ensure!(code == Some(1) && text.contains("/proc/self/nowhere"), "{code:?} {text}");
    stage.traffic_flows()
}

/// Every port on which something of ours listens, each to be attacked by a neighbour or, where that cannot reach it, from inside.
fn targets(stage: &Stage) -> Result<Vec<Target>> {
    let session = &stage.teller.session;
    let neighbour = session.pod("stranger")?.netns;
    let mut targets = Vec::new();
    for (name, pod, wanted) in [
        ("ztunnel of node-a", ztunnel(stage, "node-a")?, &[15000, 15020, 15021][..]),
        ("ztunnel of node-b", ztunnel(stage, "node-b")?, &[15000, 15020, 15021]),
        ("istiod", session.pod("istio-system/istiod")?, &[15012, 15014, 15017]),
        ("waypoint", session.pod("shop/waypoint")?, &[15000, 15008, 15020, 15021]),
        ("client", session.pod("client")?, &[]),
        ("server", session.pod("server-v1")?, &[]),
    ] {
        // 8080 is the application's.
        let sockets = garbage::listening(&pod.netns)?;
        let sockets: Vec<_> = sockets.into_iter().filter(|socket| socket.port() != 8080).collect();
        let ports: BTreeSet<u16> = sockets.iter().map(SocketAddr::port).collect();
        ensure!(
            wanted.iter().all(|port| ports.contains(port)),
            "{name} listens on {sockets:?}, not on all of {wanted:?}"
        );
        for socket in sockets {
            let to = match socket.ip() {
                ip if ip.is_unspecified() => SocketAddr::new(ipv4(&pod)?, socket.port()),
                _ => socket,
            };
            let from = if to.ip().is_loopback() { pod.netns.clone() } else { neighbour.clone() };
            targets.push(Target { owner: name.to_owned(), from, to });
        }
        if wanted.is_empty() {
            // Of a captured pod these are the proxy's listeners, on loopback; the kernel steers this port to one of them.
            let hbone = SocketAddr::new(ipv4(&pod)?, 15008);
            targets.push(Target { owner: name.to_owned(), from: neighbour.clone(), to: hbone });
        }
    }
    let api = SocketAddr::new(PARENT_V4.into(), API_PORT);
    targets.push(Target { owner: "API server".into(), from: session.wire().path(), to: api });
    targets.sort_by_key(|target| (target.owner.clone(), target.to));
    targets.dedup_by_key(|target| (target.owner.clone(), target.to));
    Ok(targets)
}

/// PID and restarts of each of our processes.
fn processes(stage: &Stage) -> Result<BTreeMap<String, (u32, i32)>> {
    let session = &stage.teller.session;
    let ours =
        session.pods().into_iter().filter(|pod| pod.namespace == "istio-system" || pod.name.starts_with("waypoint"));
    let mut found = BTreeMap::new();
    for pod in ours {
        let container = pod.main()?;
        found.insert(pod.name.clone(), (container.pid, container.restarts));
    }
    let api: u32 = std::fs::read_to_string(api::pid_file(&session.record))?.trim().parse()?;
    found.insert("API server".into(), (api, 0));
    Ok(found)
}

fn memory(processes: &BTreeMap<String, (u32, i32)>) -> Result<BTreeMap<String, u64>> {
    processes.iter().map(|(name, (pid, _))| Ok((name.clone(), memory::written_kib(*pid)?))).collect()
}

/// What the whole attack may cost a process at most, in KiB. Debug builds; each huge header alone has 4 MiB.
const MEMORY: u64 = 48 * 1024;

/// Ordinary requests beside the attack, at least.
const REQUESTS: usize = 20;

fn garbage_everywhere(stage: &Stage) -> Result<()> {
    stage.kubectl(&["apply", "-f", "tests/demo/waypoint.yaml"])?;
    stage.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=30s"])?;
    let targets = targets(stage)?;
    println!("  {} ports", targets.len());
    let before = processes(stage)?;
    let memory_before = memory(&before)?;
    let over = AtomicBool::new(false);
    let (thrown, requests) = std::thread::scope(|scope| {
        let user = scope.spawn(|| -> Result<usize> {
            let mut sent = 0;
            while !over.load(Ordering::Relaxed) || sent < REQUESTS {
                let answer = stage.request("client", &["http://server-v1/"])?;
                ensure!(answer.good(), "request {sent} during the attack: {answer:?}");
                sent += 1;
            }
            Ok(sent)
        });
        let attacks: Vec<_> = targets.iter().map(|target| scope.spawn(move || garbage::throw(target))).collect();
        let thrown: Vec<_> = attacks.into_iter().map(|attack| attack.join().expect("no attack panics")).collect();
        over.store(true, Ordering::Relaxed);
        (thrown, user.join().expect("the user does not panic"))
    });
    let memory_after = memory(&before)?;
    let mut silent = Vec::new();
    let mut open = Vec::new();
    for thrown in thrown {
        match thrown {
            Ok(connections) => silent.extend(connections),
            Err(e) => open.push(format!("{e:#}")),
        }
    }
    ensure!(open.is_empty(), "{}", open.join("\n"));
    println!("  {} requests meanwhile, {} silent connections held", requests?, silent.len());
    for (name, kib) in &memory_after {
        let grown = kib.saturating_sub(memory_before[name]);
        println!("  {name}: {kib} KiB, {grown} more than before");
        ensure!(grown <= MEMORY, "{name} grew by {grown} KiB");
    }
    ensure!(processes(stage)? == before, "restarted: {before:?} before, {:?} after", processes(stage)?);
    stage.traffic_flows()?;
    stage.kubectl(&["get", "pods", "-A"])?;
    drop(silent);
    stage.kubectl(&["delete", "-f", "tests/demo/waypoint.yaml"]).map(drop)
}
