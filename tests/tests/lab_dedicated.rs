//! A pod with a ztunnel of its own in a cluster whose control plane is istiod-lite: `manifests/samples/own-ztunnel.yaml`
//! as it stands.

#![forbid(unsafe_code)]

mod support;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::state::{Container, Pod};
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use support::{Case, Stage};

const CASES: &[Case] = &[
    ("it joins by its own token, and its node's ztunnel keeps off", joins),
    ("it talks HBONE both ways under STRICT, and stays ready", both_ways),
    ("its identity is its workload's, for policy on either side", identity),
    ("killed it is closed, and it finds the control plane again although all is captured", killed),
    ("deleted it leaves nothing on its node", deleted),
];

#[test]
fn a_pod_may_have_a_ztunnel_of_its_own() {
    support::run("dedicated", CASES);
}

const NAME: &str = "own-ztunnel";
const URL: &str = "http://own-ztunnel/";
const SERVER: &str = "http://server-v1/";

fn sample(stage: &Stage) -> PathBuf {
    stage.teller.session.places.file("manifests/samples/own-ztunnel.yaml")
}

fn joins(stage: &Stage) -> Result<()> {
    let file = sample(stage);
    stage.kubectl(&["apply", "-f", file.to_str().context("a path in UTF-8")?])?;
    let pod = ready(stage)?;
    let redirection = stage.kubectl(&[
        "-n",
        "shop",
        "get",
        "pod",
        &pod.name,
        "-o",
        "jsonpath={.metadata.annotations.ambient\\.istio\\.io/redirection}",
    ])?;
    ensure!(redirection.trim().is_empty(), "enrolled by the node: {redirection}");
    Ok(())
}

fn both_ways(stage: &Stage) -> Result<()> {
    apply(stage, STRICT)?;
    stage.comes_to("client", &[URL], "200")?;
    stage.comes_to(NAME, &[SERVER], "200")?;
    // By now policy is in force: what is outside the mesh gets in nowhere, and the kubelet still finds it ready.
    let pod = ready(stage)?;
    for address in &pod.addresses {
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let answer = stage.request("client", &[&format!("http://{host}:8080/")])?;
        ensure!(answer.status == "200", "{host}: {answer:?}");
    }
    let wire = stage.teller.session.capture()?;
    stage.comes_to("client", &[URL], "200")?;
    stage.comes_to(NAME, &[SERVER], "200")?;
    let wire = wire.stop()?;
    ensure!(wire.segments().next().is_some(), "nothing passed");
    ensure!(wire.count(b"hello from") == 0, "an answer was readable on the wire");
    Ok(())
}

fn identity(stage: &Stage) -> Result<()> {
    apply(stage, &allow("server", NAME))?;
    stage.comes_to("client", &[SERVER], "000")?;
    stage.comes_to(NAME, &[SERVER], "200")?;
    apply(stage, &allow(NAME, "other"))?;
    stage.comes_to("client", &[URL], "000")?;
    stage.comes_to("other", &[URL], "200")?;
    stage.kubectl(&["-n", "shop", "delete", "authorizationpolicies", "--all"])?;
    stage.comes_to("client", &[URL], "200")?;
    stage.traffic_flows()
}

fn killed(stage: &Stage) -> Result<()> {
    let before = ztunnel(stage)?;
    kill(Pid::from_raw(before.pid.cast_signed()), Signal::SIGKILL)?;
    // Refused by the kernel from the moment of its death until the next one is up.
    stage.comes_to(NAME, &[SERVER], "000")?;
    wait::until("the next ztunnel to run", SETTLE, || {
        let now = ztunnel(stage)?;
        ensure!(now.restarts > before.restarts, "not restarted yet");
        Ok(())
    })?;
    // It has to resolve and reach istiod from a namespace where everybody else is refused.
    stage.comes_to(NAME, &[SERVER], "200")?;
    stage.comes_to("client", &[URL], "200")
}

fn deleted(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod(NAME)?;
    let pins = pins(stage, &pod)?;
    ensure!(pins.is_dir(), "{} is where its pins are", pins.display());
    let file = sample(stage);
    stage.kubectl(&["delete", "-f", file.to_str().context("a path in UTF-8")?])?;
    wait::until("the pod and its pins to go", SETTLE, || {
        ensure!(stage.teller.session.pods().iter().all(|p| p.uid != pod.uid), "the pod is still there");
        ensure!(!pins.exists(), "{} is still there", pins.display());
        Ok(())
    })?;
    stage.kubectl(&["-n", "shop", "delete", "peerauthentications", "--all"])?;
    stage.traffic_flows()
}

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
    metadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";

fn allow(app: &str, account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {app}-from-{account}, namespace: shop}}\n\
         spec:\n  selector: {{matchLabels: {{app: {app}}}}}\n  action: ALLOW\n  \
         rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/{account}]}}}}]}}]\n"
    )
}

fn apply(stage: &Stage, objects: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("objects.yaml");
    std::fs::write(&file, objects)?;
    stage.kubectl(&["apply", "-f", file.to_str().context("a path in UTF-8")?]).map(drop)
}

fn ready(stage: &Stage) -> Result<Pod> {
    wait::until("the pod with its own ztunnel to be ready", SETTLE, || {
        let pod = stage.teller.session.pod(NAME)?;
        let state = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
        let said = stage.kubectl(&["-n", "shop", "get", "pod", &pod.name, "-o", state])?;
        ensure!(said.trim() == "True", "ready: {said}");
        Ok(pod)
    })
}

fn ztunnel(stage: &Stage) -> Result<Container> {
    let pod = stage.teller.session.pod(NAME)?;
    let container = pod.containers.iter().find(|c| c.name == "ztunnel");
    container.cloned().context("the pod has no container ztunnel")
}

/// The directory of its pins, as the host sees it.
fn pins(stage: &Stage, pod: &Pod) -> Result<PathBuf> {
    let inside = ztunnel(stage)?.env.get("BPFFS_DIR").context("BPFFS_DIR is set")?.clone();
    let below = inside.strip_prefix("/sys/fs/bpf/").context("below the node's bpffs")?.to_owned();
    Ok(stage.teller.session.record.bpffs.join(&pod.node).join(below))
}
