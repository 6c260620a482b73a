//! The control plane is away: what runs goes on, and what nobody can sign any more is refused, not let through. It comes back, and
//! what was decided meanwhile holds.

#![forbid(unsafe_code)]

#[path = "support/mod.rs"]
mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::raw::NODES;
use mesh_tests::{local, sys, wait};

use support::{Case, Stage, said};

/// Of certificates here: short enough to see their end, long enough to be renewed before on a crowded machine.
const LIFETIME: &str = "SECRET_TTL=60s";
/// Half of a lifetime, and a fetch that gets no answer.
const RENEWAL: Duration = Duration::from_secs(50);
/// The other half of a lifetime, and room.
const END: Duration = Duration::from_secs(60);
const SETTLE: Duration = Duration::from_secs(30);
const DENIED: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: meanwhile, namespace: shop}\n\
    spec: {action: DENY, rules: [{from: [{source: {namespaces: [shop]}}]}]}\n";

/// How long an outage is that certificates survive; `OUTAGE_SECS` has another length.
const AWAY: Duration = Duration::from_secs(20);
/// Between two requests of it.
const PACE: Duration = Duration::from_millis(200);

const CASES: &[Case] = &[
    ("an outage that certificates survive is noticed by nobody", away_unnoticed),
    ("the mesh goes on without its control plane and believes it again", away_and_back),
];

#[test]
fn without_its_control_plane_the_mesh_goes_on_until_its_certificates_end_and_then_closes() {
    support::run("outage", CASES);
}

fn away_unnoticed(stage: &Stage) -> Result<()> {
    stage.traffic_flows()?;
    NODES.iter().try_for_each(|node| comes_to(stage, node, 1.0))?;
    goes(stage)?;
    let length = match std::env::var("OUTAGE_SECS") {
        Ok(seconds) => Duration::from_secs(seconds.parse().context("OUTAGE_SECS")?),
        Err(_) => AWAY,
    };
    let (begun, mut requests) = (Instant::now(), 0);
    while begun.elapsed() < length {
        let answer = stage.request("client", &["http://server-v1/"])?;
        ensure!(answer.status == "200", "request {requests}, after {:?}: {answer:?}", begun.elapsed());
        requests += 1;
        std::thread::sleep(PACE);
    }
    eprintln!("{requests} requests in {length:?} without a control plane, all answered");
    NODES.iter().try_for_each(|node| ready(stage, node))?;
    comes_back(stage)?;
    stage.traffic_flows()
}

/// The control plane goes.
fn goes(stage: &Stage) -> Result<()> {
    stage.kubectl(&["-n", "istio-system", "scale", "deployment/istiod", "--replicas=0"])?;
    // Until it is gone it signs: a process that ends finishes what it is asked on connections that are open.
    let gone = ["-n", "istio-system", "wait", "--for=delete", "pod", "-l", "app=istiod", "--timeout=60s"];
    stage.kubectl(&gone)?;
    NODES.iter().try_for_each(|node| comes_to(stage, node, 0.0))
}

fn comes_back(stage: &Stage) -> Result<()> {
    rolled(stage, &["scale", "deployment/istiod", "--replicas=1"], "deployment/istiod")?;
    NODES.iter().try_for_each(|node| comes_to(stage, node, 1.0))
}

fn away_and_back(stage: &Stage) -> Result<()> {
    rolled(stage, &["set", "env", "daemonset/ztunnel", LIFETIME], "daemonset/ztunnel")?;
    stage.traffic_flows()?;
    NODES.iter().try_for_each(|node| comes_to(stage, node, 1.0))?;

    goes(stage)?;
    stage.teller.session.apply(DENIED)?;
    // A certificate is asked for, nobody answers, and the old one serves on: it has half of its life left.
    wait::until("a renewal to fail", RENEWAL, || {
        let log = log(stage)?;
        ensure!(log.contains("certificate could not be fetched"), "none was tried:\n{log}");
        Ok(())
    })?;
    let answer = stage.request("client", &["http://server-v1/"])?;
    ensure!(answer.status == "200", "without a control plane: {answer:?}");
    NODES.iter().try_for_each(|node| ready(stage, node))?;

    wait::until("certificates to end, and with them new connections", END, || {
        let answer = stage.request("client", &["http://server-v1/"])?;
        ensure!(answer.status == "000", "last answer: {answer:?}");
        Ok(())
    })?;
    wait::until("the log to say why", SETTLE, || {
        stage.request("client", &["http://server-v1/"])?;
        ensure!(log(stage)?.contains("response_flags=\"IDENTITY_ERROR\""), "it does not");
        Ok(())
    })?;
    NODES.iter().try_for_each(|node| ready(stage, node))?;

    comes_back(stage)?;
    // It is refused still, and now by the policy of the meantime.
    wait::until("what was decided meanwhile to hold", SETTLE, || {
        stage.request("client", &["http://server-v1/"])?;
        ensure!(log(stage)?.contains("shop/meanwhile"), "nothing was denied by it");
        Ok(())
    })?;
    let delete = ["-n", "shop", "delete", "authorizationpolicy", "meanwhile"];
    let output = stage.teller.session.kubectl_output(&delete)?;
    ensure!(output.status.success(), "{}", said(&output));
    stage.traffic_flows()
}

/// A change in the mesh's own namespace, and its rollout.
fn rolled(stage: &Stage, change: &[&str], workload: &str) -> Result<()> {
    stage.kubectl(&[&["-n", "istio-system"], change].concat())?;
    stage.kubectl(&["-n", "istio-system", "rollout", "status", workload, "--timeout=60s"]).map(drop)
}

/// The ztunnels' logs.
fn log(stage: &Stage) -> Result<String> {
    let logs = NODES.iter().map(|node| stage.log(&stage.teller.session.proxy(node)?));
    Ok(logs.collect::<Result<Vec<_>>>()?.concat())
}

fn ask(stage: &Stage, node: &str, port: u16, path: &'static str) -> Result<String> {
    let proxy = stage.teller.session.proxy(node)?;
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    sys::in_netns(&proxy.netns, move || local::get(to, path))
}

/// The gauge that tells whether the control plane is there.
fn comes_to(stage: &Stage, node: &str, value: f64) -> Result<()> {
    wait::until(&format!("xds_connected of {node} to be {value}"), SETTLE, || {
        let said = ask(stage, node, 15020, "/metrics")?;
        let line = said.lines().find(|line| line.starts_with("xds_connected")).context("no such gauge")?;
        let now: f64 = line.rsplit(' ').next().context("no value")?.parse()?;
        ensure!((now - value).abs() < 0.5, "it is {now}");
        Ok(())
    })
}

/// A ztunnel that knows its pods is no less ready for serving them by what it knows.
fn ready(stage: &Stage, node: &str) -> Result<()> {
    let said = ask(stage, node, 15021, "/healthz/ready")?;
    ensure!(said.starts_with("HTTP/1.1 200"), "{node}: {said}");
    Ok(())
}
