//! A pod with a ztunnel of its own in a cluster whose control plane is istiod-lite: `manifests/samples/own-ztunnel.yaml`
//! as it stands; and a machine outside it.

#![forbid(unsafe_code)]

#[path = "dedicated/machine.rs"]
mod machine;
#[allow(dead_code, reason = "shared by all programs of cases; each uses its part")]
mod support;

use std::net::SocketAddr;
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
    ("a machine outside the cluster joins, works and leaves as its document says", machine::as_documented),
    ("without any node proxy two of them talk to each other, and to nobody in clear text", without_node_proxies),
    ("deleted they leave nothing on their nodes", deleted),
];

#[test]
fn a_pod_may_have_a_ztunnel_of_its_own() {
    support::run("dedicated", CASES);
}

const NAME: &str = "own-ztunnel";
const URL: &str = "http://own-ztunnel/";
const SERVER: &str = "http://server-v1/";
const STRICT: &str = "tests/demo/strict.yaml";

fn sample(stage: &Stage) -> PathBuf {
    stage.teller.session.places.file("manifests/samples/own-ztunnel.yaml")
}

fn joins(stage: &Stage) -> Result<()> {
    let file = sample(stage);
    stage.kubectl(&["apply", "-f", file.to_str().context("a path in UTF-8")?])?;
    let pod = ready(stage)?;
    let redirection = stage.teller.session.redirection(&pod)?;
    ensure!(redirection.is_empty(), "enrolled by the node: {redirection}");
    Ok(())
}

fn both_ways(stage: &Stage) -> Result<()> {
    stage.kubectl(&["apply", "-f", STRICT])?;
    stage.comes_to("client", &[URL], "200")?;
    stage.comes_to(NAME, &[SERVER], "200")?;
    // By now policy is in force: what is outside the mesh gets in nowhere, and the kubelet still finds it ready.
    let pod = ready(stage)?;
    for address in &pod.addresses {
        let url = format!("http://{}/", SocketAddr::new(*address, 8080));
        let answer = stage.request("client", &[&url])?;
        ensure!(answer.status == "200", "{url}: {answer:?}");
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
    stage.teller.session.apply(&allow("server", NAME))?;
    stage.comes_to("client", &[SERVER], "000")?;
    stage.comes_to(NAME, &[SERVER], "200")?;
    stage.teller.session.apply(&allow(NAME, "other"))?;
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

/// As in a cluster where no DaemonSet may run: the others leave the mesh, then their proxies go.
fn without_node_proxies(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    stage.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode-"])?;
    for name in ["client", "server-v1"] {
        let pod = session.pod(name)?;
        wait::until(&format!("{name} to leave"), SETTLE, || {
            ensure!(session.redirection(&pod)?.is_empty(), "still enrolled");
            Ok(())
        })?;
    }
    stage.kubectl(&["apply", "-f", STRICT])?;
    stage.kubectl(&["-n", "istio-system", "delete", "daemonset", "ztunnel"])?;
    wait::until("the node proxies to end", SETTLE * 3, || {
        ensure!(["node-a", "node-b"].iter().all(|node| session.proxy(node).is_err()), "one still runs");
        Ok(())
    })?;
    stage.kubectl(&["-n", "shop", "scale", "deployment", NAME, "--replicas=2"])?;
    let wait = ["-n", "shop", "rollout", "status", "deployment", NAME, "--timeout=30s"];
    stage.kubectl(&wait)?;
    let pods = all(stage);
    let [one, other] = pods.as_slice() else { anyhow::bail!("{} pods", pods.len()) };
    let wire = session.capture()?;
    for (from, to) in [(one, other), (other, one)] {
        for address in &to.addresses {
            let url = format!("http://{}/", SocketAddr::new(*address, 8080));
            let from = format!("shop/{}", from.name);
            wait::until(&format!("{url} to answer {from}"), SETTLE, || {
                let answer = stage.request(&from, &[&url])?;
                ensure!(answer.good() && answer.body.contains("beside a ztunnel"), "{answer:?}");
                Ok(())
            })?;
            stage.comes_to("client", &[&url], "000")?;
        }
    }
    let wire = wire.stop()?;
    ensure!(wire.count(b"beside a ztunnel") == 0, "an answer was readable on the wire");
    // What is outside the mesh is spoken to as it is.
    stage.comes_to(NAME, &[SERVER], "200")
}

fn deleted(stage: &Stage) -> Result<()> {
    let pods = all(stage);
    let pins = pods.iter().map(|pod| pins(stage, pod)).collect::<Result<Vec<_>>>()?;
    for pins in &pins {
        ensure!(pins.is_dir(), "{} is where pins are", pins.display());
    }
    let file = sample(stage);
    stage.kubectl(&["delete", "-f", file.to_str().context("a path in UTF-8")?])?;
    wait::until("the pods and their pins to go", SETTLE, || {
        ensure!(all(stage).is_empty(), "a pod is still there");
        for pins in &pins {
            ensure!(!pins.exists(), "{} is still there", pins.display());
        }
        Ok(())
    })?;
    stage.kubectl(&["delete", "--ignore-not-found", "-f", STRICT])?;
    stage.traffic_flows()
}

/// All pods with a ztunnel of their own.
fn all(stage: &Stage) -> Vec<Pod> {
    let is_one = |pod: &Pod| pod.labels.get("app").is_some_and(|app| app == NAME);
    stage.teller.session.pods().into_iter().filter(is_one).collect()
}

fn allow(app: &str, account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {app}-from-{account}, namespace: shop}}\n\
         spec:\n  selector: {{matchLabels: {{app: {app}}}}}\n  action: ALLOW\n  \
         rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/{account}]}}}}]}}]\n"
    )
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
    container(&stage.teller.session.pod(NAME)?)
}

fn container(pod: &Pod) -> Result<Container> {
    let container = pod.containers.iter().find(|c| c.name == "ztunnel");
    container.cloned().context("the pod has no container ztunnel")
}

/// The directory of its pins, as the host sees it.
fn pins(stage: &Stage, pod: &Pod) -> Result<PathBuf> {
    let inside = container(pod)?.env.get("BPFFS_DIR").context("BPFFS_DIR is set")?.clone();
    let below = inside.strip_prefix("/sys/fs/bpf/").context("below the node's bpffs")?.to_owned();
    Ok(stage.teller.session.record.bpffs.join(&pod.node).join(below))
}
