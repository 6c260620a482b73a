//! The lines of the story, (a) to (k). Each stands on what the ones before it left behind.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::teller::{Answer, Line, SETTLE, Teller};
use crate::cluster::api;
use crate::cluster::state::Pod;
use crate::wait;

/// In the order they are told.
pub const LINES: &[Line] = &[
    ('a', "before joining: it works, and anyone on the wire can read it", before_joining),
    ('b', "the namespace joins; an open connection lives on, nothing restarts", joining),
    ('c', "new connections: TLS 1.3 on 15008 only, and the server sees the client", encrypted),
    ('d', "policy by service account, within a second", policy_by_identity),
    ('e', "STRICT refuses plaintext from outside the mesh, PERMISSIVE lets it in", strict),
    ('f', "a waypoint comes up by itself and routes", waypoint_routes),
    ('g', "policy by method", policy_by_method),
    ('h', "leaving brings plain traffic back; an open connection lives on", leaving),
    ('i', "metrics name both ends and say mutual_tls", metrics),
    ('j', "a killed ztunnel: refused at once, and back after its restart", killed_ztunnel),
    ('k', "control plane and API killed: traffic goes on, nothing is lost", killed_control_plane),
];

const JOIN: &[&str] = &["label", "namespace", "shop", "istio.io/dataplane-mode=ambient", "--overwrite"];
const REDIRECTION: &[&str] = &[
    "-n",
    "shop",
    "get",
    "pods",
    "-l",
    "app in (client,other,server)",
    "-o",
    "jsonpath={range .items[*]}{.metadata.name} {.metadata.annotations.ambient\\.istio\\.io/redirection}{\"\\n\"}{end}",
];
/// The network and a curl are never slower than this on one machine, so what is over has failed at once.
const AT_ONCE: Duration = Duration::from_secs(1);
/// What curl ends with. Without ztunnel a captured pod gets neither a name nor a connection.
const COULD_NOT_RESOLVE: i32 = 6;
const COULD_NOT_CONNECT: i32 = 7;

fn before_joining(t: &mut Teller) -> Result<()> {
    let marker = marker();
    let url = format!("http://server-v1/{marker}");
    let capture = t.session.capture()?;
    let answer = t.curl("client", &[&url])?;
    let wire = capture.stop()?;
    t.claim(answer.good() && answer.body.contains(&marker), "the client reaches the server");
    let seen = wire.count(marker.as_bytes());
    t.claim(seen > 0, &format!("the payload is readable in {seen} packets between the nodes"));
    Ok(())
}

fn joining(t: &mut Teller) -> Result<()> {
    let before = t.processes("shop");
    let mut open = t.open_long_lived("client", "http://server-v1/slow")?;
    t.kubectl(JOIN)?;
    joined(t)?;
    let received = open.received();
    open.wait_more(500, SETTLE)?;
    let more = open.received() - received;
    t.claim(true, &format!("the connection opened before is alive: {more} more bytes since the pods joined"));
    let after = t.processes("shop");
    t.claim(before == after, &format!("{} processes of the namespace, none restarted", after.len()));
    Ok(())
}

fn joined(t: &Teller) -> Result<()> {
    t.kubectl_until(REDIRECTION, SETTLE, |said| {
        said.lines().count() >= 4 && said.lines().all(|line| line.ends_with(" enabled"))
    })?;
    Ok(())
}

/// A pod that is told to be redirected speaks HBONE at once and is captured when its peers know; waits until the wire shows it.
fn carried(t: &Teller, pod: &str, host: &str) -> Result<()> {
    wait::until("requests to be carried by the mesh", SETTLE, || {
        let marker = marker();
        let capture = t.session.capture()?;
        let answer = t.request(pod, &[&format!("http://{host}/{marker}")])?;
        let seen = capture.stop()?.count(marker.as_bytes());
        if !answer.good() || seen > 0 {
            bail!("{answer:?}, readable in {seen} packets");
        }
        Ok(())
    })
}

fn encrypted(t: &mut Teller) -> Result<()> {
    let client = t.session.pod("client")?;
    let server = t.session.pod("server-v1")?;
    let v6 = server.addresses.iter().find(|ip| ip.is_ipv6()).context("the server has no IPv6 address")?;
    for host in ["server-v1".to_owned(), format!("[{v6}]:8080")] {
        let marker = marker();
        let url = format!("http://{host}/{marker}");
        carried(t, "client", &host)?;
        let capture = t.session.capture()?;
        let answer = t.curl("client", &[&url])?;
        let wire = capture.stop()?;
        let addresses = ends(&client, &server);
        let sees = client.addresses.iter().any(|ip| answer.body.contains(&format!("to {ip}:")));
        t.claim(answer.good() && sees, "the server sees the client pod's own address");
        let seen = wire.count(marker.as_bytes());
        t.claim(
            seen == 0,
            &format!("not one of {} packets carries the payload in clear ({seen} do)", wire.frames.len()),
        );
        let segments: Vec<_> = wire.between(&addresses).collect();
        let elsewhere = segments.iter().filter(|s| s.source.1 != 15008 && s.destination.1 != 15008).count();
        t.claim(
            !segments.is_empty() && elsewhere == 0,
            &format!("{} TCP segments between the pods, {elsewhere} of them not on port 15008", segments.len()),
        );
    }
    tls_version(t)
}

/// A connection to a service not dialled so far shows its handshake: tunnels are reused.
fn tls_version(t: &mut Teller) -> Result<()> {
    let capture = t.session.capture()?;
    t.curl("other", &["http://server-v2/"])?;
    let versions = capture.stop()?.tls_versions(15008);
    let all = !versions.is_empty() && versions.iter().all(|version| *version == 0x0304);
    t.claim(all, &format!("servers on 15008 chose TLS {versions:x?} (304 is 1.3)"));
    Ok(())
}

fn policy_by_identity(t: &mut Teller) -> Result<()> {
    t.curl_until("other", &["http://server-v1/"], SETTLE, Answer::good)?;
    t.kubectl(&["apply", "-f", "tests/demo/allow-client.yaml"])?;
    let applied = Instant::now();
    let (_, _) = t.curl_until("other", &["http://server-v1/"], SETTLE, |answer| !answer.good())?;
    let took = applied.elapsed();
    t.claim(
        took <= Duration::from_secs(1),
        &format!("service account other is denied {} ms after kubectl apply", took.as_millis()),
    );
    let answer = t.curl("client", &["http://server-v1/"])?;
    t.claim(answer.good(), "service account client is allowed");
    t.kubectl(&["delete", "-f", "tests/demo/allow-client.yaml"])?;
    let answer = t.curl_until("other", &["http://server-v1/"], SETTLE, Answer::good);
    t.claim(answer.is_ok(), "without the policy the other is allowed again");
    Ok(())
}

fn strict(t: &mut Teller) -> Result<()> {
    let url = "http://server-v1.shop/";
    let answer = t.curl("stranger", &[url])?;
    t.claim(answer.good(), "a client outside the mesh gets in while nothing forbids it");
    t.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    let refused = t.curl_until("stranger", &[url], SETTLE, |answer| !answer.good());
    t.claim(refused.is_ok(), "STRICT: plaintext is refused");
    let answer = t.curl("client", &["http://server-v1/"])?;
    t.claim(answer.good(), "STRICT: a client of the mesh gets in");
    t.kubectl(&["apply", "-f", "tests/demo/permissive.yaml"])?;
    let admitted = t.curl_until("stranger", &[url], SETTLE, Answer::good);
    t.claim(admitted.is_ok(), "PERMISSIVE: plaintext is let in");
    Ok(())
}

fn waypoint_routes(t: &mut Teller) -> Result<()> {
    t.kubectl(&["apply", "-f", "tests/demo/waypoint.yaml"])?;
    t.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=30s"])?;
    let pod = t.session.pod("shop/waypoint");
    t.claim(pod.is_ok(), "the waypoint's pod came up by itself");
    t.kubectl(&["apply", "-f", "tests/demo/route.yaml"])?;
    t.kubectl(&["label", "namespace", "shop", "istio.io/use-waypoint=waypoint", "--overwrite"])?;
    let by_header: &[&str] = &["-H", "x-version: v2", "http://server/"];
    // Ten in a row by header: the route is in force, not luck.
    wait::until("requests with the header to go to v2", SETTLE, || {
        for _ in 0..10 {
            let answer = t.request("client", by_header)?;
            if !answer.body.contains("server-v2") {
                bail!("{answer:?}");
            }
        }
        Ok(())
    })?;
    t.curl("client", by_header)?;
    t.claim(true, "requests with header x-version: v2 go to v2");
    let said = t.session.exec("client", &["curl", "-s", "-m", "60", "http://server/?[1-500]"])?.output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let (v1, v2) = (said.matches("from server-v1").count(), said.matches("from server-v2").count());
    println!("  $ lab exec client -- curl -s 'http://server/?[1-500]'\n      {v1} answers of v1, {v2} of v2");
    let within = v1 + v2 == 500 && v1.abs_diff(450) <= 5;
    t.claim(within, "500 requests split 90/10, give or take one point");
    Ok(())
}

fn policy_by_method(t: &mut Teller) -> Result<()> {
    t.kubectl(&["apply", "-f", "tests/demo/read-only.yaml"])?;
    let denied = |answer: &Answer| answer.status == "403";
    let (answer, _) = t.curl_until("client", &["-X", "POST", "http://server/"], SETTLE, denied)?;
    t.claim(answer.body == "RBAC: access denied", "POST is answered 403 RBAC: access denied");
    let answer = t.curl("client", &["http://server/"])?;
    t.claim(answer.good(), "GET is allowed");
    t.kubectl(&["delete", "-f", "tests/demo/read-only.yaml"])?;
    Ok(())
}

fn leaving(t: &mut Teller) -> Result<()> {
    let mut open = t.open_long_lived("client", "http://server-v1/slow")?;
    t.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode-", "istio.io/use-waypoint-"])?;
    t.kubectl_until(REDIRECTION, SETTLE, |said| !said.contains("enabled"))?;
    let marker = marker();
    let url = format!("http://server-v1/{marker}");
    let plain = wait::until("plain traffic", SETTLE, || {
        let capture = t.session.capture()?;
        let answer = t.request("client", &[&url])?;
        let seen = capture.stop()?.count(marker.as_bytes());
        if !answer.good() || seen == 0 {
            bail!("{answer:?}, readable in {seen} packets");
        }
        Ok(seen)
    })?;
    t.curl("client", &[&url])?;
    t.claim(plain > 0, &format!("the payload is readable again, in {plain} packets"));
    let received = open.received();
    open.wait_more(500, SETTLE)?;
    let more = open.received() - received;
    t.claim(true, &format!("the connection opened in the mesh is alive: {more} more bytes"));
    Ok(())
}

fn metrics(t: &mut Teller) -> Result<()> {
    let identities = [
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
        "destination_principal=\"spiffe://cluster.local/ns/shop/sa/server\"",
        "connection_security_policy=\"mutual_tls\"",
    ];
    for (node, reporter) in [("node-a", "reporter=\"source\""), ("node-b", "reporter=\"destination\"")] {
        let ztunnel = ztunnel_of(t, node)?;
        let said = scrape(t, &ztunnel, "istio_tcp_connections_opened_total")?;
        let found = said.lines().find(|line| {
            line.contains(reporter) && identities.iter().all(|wanted| line.contains(wanted)) && !line.ends_with(" 0")
        });
        t.claim(found.is_some(), &format!("the ztunnel of {node} reports client to server as {reporter}, mutual_tls"));
    }
    let waypoint = t.session.pod("shop/waypoint")?;
    let said = scrape(t, &waypoint, "istio_requests_total")?;
    let found = said.lines().any(|line| {
        line.contains(identities[0]) && line.contains(identities[2]) && line.contains("response_code=\"200\"")
    });
    t.claim(found, "the waypoint reports the client's requests, mutual_tls");
    Ok(())
}

/// Lines of one metric of a pod, shown in part.
fn scrape(t: &Teller, pod: &Pod, metric: &str) -> Result<String> {
    let name = format!("{}/{}", pod.namespace, pod.name);
    let answer = t.request(&name, &["http://localhost:15020/stats/prometheus"])?;
    let lines: Vec<&str> = answer.body.lines().filter(|line| line.starts_with(metric)).collect();
    println!(
        "  $ lab exec {name} -- curl -s localhost:15020/stats/prometheus | grep {metric}\n      {} series",
        lines.len()
    );
    lines.iter().take(2).for_each(|line| println!("      {line}"));
    Ok(lines.join("\n"))
}

fn ztunnel_of(t: &Teller, node: &str) -> Result<Pod> {
    let mut pods = t.session.pods().into_iter();
    pods.find(|pod| pod.node == node && pod.labels.get("app").is_some_and(|app| app == "ztunnel"))
        .with_context(|| format!("no ztunnel runs on {node}"))
}

fn killed_ztunnel(t: &mut Teller) -> Result<()> {
    t.kubectl(JOIN)?;
    joined(t)?;
    carried(t, "client", "server-v1")?;
    let pid = ztunnel_of(t, "node-a")?.main()?.pid;
    kill9(pid)?;
    println!("  $ kill -9 {pid}    (ztunnel of node-a)");
    let answer = t.curl("client", &["http://server-v1/"])?;
    t.claim(
        [COULD_NOT_RESOLVE, COULD_NOT_CONNECT].contains(&answer.exit) && answer.took < AT_ONCE,
        &format!("a new connection is refused after {} ms, not let out in clear", answer.took.as_millis()),
    );
    let back = t.curl_until("client", &["http://server-v1/"], Duration::from_secs(20), Answer::good);
    t.claim(back.is_ok(), "after its restart connections work again");
    let restarted = ztunnel_of(t, "node-a")?.main()?.pid;
    t.claim(restarted != pid, &format!("its process is now {restarted}"));
    Ok(())
}

fn killed_control_plane(t: &mut Teller) -> Result<()> {
    t.curl_until("other", &["http://server-v1/"], SETTLE, Answer::good)?;
    let before =
        t.ask(&["-n", "shop", "get", "deployments,services,gateways,httproutes,peerauthentications", "-o", "name"])?;
    let istiod = t.session.pod("istio-system/istiod")?.main()?.pid;
    let api: u32 = std::fs::read_to_string(api::pid_file(&t.session.record))?.trim().parse()?;
    kill9(istiod)?;
    kill9(api)?;
    println!("  $ kill -9 {istiod} {api}    (control plane, API server)");
    let mut failed = 0;
    let mut sent = 0;
    let mut request = |t: &Teller| -> Result<()> {
        sent += 1;
        failed += usize::from(!t.request("client", &["http://server-v1/"])?.good());
        Ok(())
    };
    for _ in 0..10 {
        request(t)?;
    }
    // The API is back first; what is applied now the control plane learns when it is.
    wait::until("the API to take a policy", SETTLE, || t.ask(&["apply", "-f", "tests/demo/deny-other.yaml"]))?;
    println!("  $ kubectl apply -f tests/demo/deny-other.yaml");
    let denied = wait::until("the policy to arrive", Duration::from_secs(30), || {
        request(t)?;
        let answer = t.request("other", &["http://server-v1/"])?;
        if answer.good() {
            bail!("service account other is still let in");
        }
        Ok(answer)
    });
    t.claim(denied.is_ok(), "a policy applied meanwhile arrives");
    t.claim(failed == 0, &format!("{sent} requests of the client during that time, {failed} failed"));
    let running = t.session.pod("istio-system/istiod")?.main()?.pid;
    t.claim(running != istiod, &format!("the control plane's process is now {running}"));
    let after =
        t.ask(&["-n", "shop", "get", "deployments,services,gateways,httproutes,peerauthentications", "-o", "name"])?;
    t.claim(before == after, &format!("{} objects before, the same after", before.lines().count()));
    t.kubectl(&["delete", "-f", "tests/demo/deny-other.yaml"])?;
    Ok(())
}

/// Kills a process and waits until nothing of it is left: the kernel closes its sockets some time after the signal, and a connection
/// made meanwhile would be accepted and reset rather than refused.
fn kill9(pid: u32) -> Result<()> {
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    let process = std::path::PathBuf::from(format!("/proc/{pid}"));
    wait::until_true("the killed process to be gone", SETTLE, || !process.exists())
}

fn ends(client: &Pod, server: &Pod) -> Vec<IpAddr> {
    client.addresses.iter().chain(&server.addresses).copied().collect()
}

/// A payload that occurs nowhere else.
fn marker() -> String {
    format!("payload-{}", uuid::Uuid::new_v4().simple())
}
