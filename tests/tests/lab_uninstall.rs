//! The mesh is taken off a cluster whose namespaces are still labelled: pods talk as if it had never been there, and
//! nothing of it is left on the nodes.

#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by all programs of cases; each uses its part")]
mod support;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::state::Pod;
use mesh_tests::demo::teller::{LongLived, SETTLE};
use mesh_tests::raw;
use mesh_tests::session::Session;
use mesh_tests::topology::Netns;
use mesh_tests::wait;
use support::{Case, Stage, said};

const NODES: [&str; 2] = ["node-a", "node-b"];
/// Those of the namespace in the mesh.
const PODS: [&str; 4] = ["client", "other", "server-v1", "server-v2"];
/// Which of them has a sysctl of its own.
const SET: &str = "other";
/// What the top of the manifest says, with a bound.
const UNINSTALL: [&str; 4] = [
    "-n istio-system delete daemonset ztunnel",
    "apply -f manifests/uninstall.yaml",
    "-n istio-system rollout status daemonset/ztunnel-uninstall --timeout=150s",
    "delete --ignore-not-found -f manifests/uninstall.yaml -f manifests/install.yaml",
];
/// More than a draining ztunnel needs to see that it has to end.
const ENDING: Duration = Duration::from_secs(20);

const CASES: &[Case] = &[
    ("a node on which a ztunnel serves is left as it is", a_served_node_stays),
    ("a mesh is taken off while namespaces are labelled and connections are open", is_taken_off),
    ("taking it off once more is fine, and says that there is nothing", once_more),
];

#[test]
fn uninstalling_leaves_pods_that_talk_and_nothing_else() {
    if !raw::available() {
        return;
    }
    support::run(&format!("off{}", std::process::id()), CASES);
}

fn kubectl(stage: &Stage, line: &str) -> Result<String> {
    stage.kubectl(&line.split(' ').collect::<Vec<_>>())
}

/// The command in the environment of a pod's own ztunnel, which is serving.
fn a_served_node_stays(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    let proxy = session.proxy("node-a")?;
    // Nothing is to be waited for here: the answer is known when it says for whom it waits.
    let output = session.exec(&proxy.name, &["timeout", "3", "ztunnel", "uninstall"])?.output()?;
    ensure!(!output.status.success() && said(&output).contains("waiting for a ztunnel (process"), "{}", said(&output));
    ensure!(captured(stage, "client")?, "its capture is gone");
    stage.traffic_flows()
}

fn is_taken_off(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    set_before_it_joins(stage, SET)?;
    for pod in PODS {
        ensure!(captured(stage, pod)? && sysctls(stage, pod)? == ["1", "1"], "{pod} is not captured");
    }
    session.apply(STRICT)?;
    stage.comes_to("stranger", &["http://server-v1.shop/"], "000")?;
    stage.comes_to("client", &["http://server-v1/"], "200")?;
    let mut open: Vec<LongLived> = Vec::new();
    for pod in ["client", "server-v2"] {
        open.push(stage.teller.open_long_lived(pod, "http://server-v1.shop/slow")?);
    }
    let ended = session.pods().into_iter().map(|pod| pod.uid).collect::<Vec<_>>();

    for line in &UNINSTALL[..3] {
        kubectl(stage, line)?;
    }
    for node in NODES {
        let pod = session.pods().into_iter().find(|pod| pod.node == node && pod.name.starts_with("ztunnel-uninstall"));
        let pod = pod.with_context(|| format!("nothing was taken off {node}"))?;
        let log = fs::read_to_string(log_of(session, &pod, "uninstall"))?;
        println!("{node}:\n{log}");
        ensure!(log.matches(": released").count() == 2, "two pods of {node} are to be released");
        ensure!(log.contains("no ztunnel drains"), "{log}");
    }
    for connection in &mut open {
        connection.ends(ENDING)?;
    }
    let stay = session.pods().into_iter().filter(|pod| ended.contains(&pod.uid) && pod.namespace == "shop").count();
    ensure!(stay == PODS.len(), "pods were restarted");
    nothing_is_left(stage)?;
    pods_talk(stage)?;
    println!("annotation: {:?}", session.redirection(&session.pod("client")?)?);

    kubectl(stage, UNINSTALL[3])?;
    pods_talk(stage)
}

fn once_more(stage: &Stage) -> Result<()> {
    // Its namespace went with the rest.
    wait::until("namespace istio-system to be gone", ENDING, || {
        let namespaces = stage.kubectl(&["get", "namespaces", "-o", "name"])?;
        ensure!(!namespaces.contains("istio-system"), "{namespaces}");
        Ok(())
    })?;
    let account = "apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: ztunnel, namespace: istio-system}\n";
    stage.teller.session.apply(account)?;
    for line in &UNINSTALL[1..3] {
        kubectl(stage, line)?;
    }
    let session = &stage.teller.session;
    for pod in session.pods().iter().filter(|pod| pod.name.starts_with("ztunnel-uninstall")) {
        let log = fs::read_to_string(log_of(session, pod, "uninstall"))?;
        ensure!(log.contains("nothing is captured"), "{log}");
    }
    kubectl(stage, "delete -f manifests/uninstall.yaml")?;
    nothing_is_left(stage)?;
    pods_talk(stage)
}

/// A pod that had a sysctl set before ztunnel came: it gets that one back, and the others nothing.
fn set_before_it_joins(stage: &Stage, pod: &str) -> Result<()> {
    let session = &stage.teller.session;
    let name = session.pod(pod)?.name;
    let comes_to = |wanted: bool| {
        wait::until("the pod to leave or to join", SETTLE, || {
            ensure!(captured(stage, pod)? == wanted && (sysctls(stage, pod)? == ["1", "1"]) == wanted, "not yet");
            Ok(())
        })
    };
    stage.kubectl(&["-n", "shop", "label", "pod", &name, "istio.io/dataplane-mode=none"])?;
    comes_to(false)?;
    // Its own /proc/sys is read-only.
    let netns = session.pod(pod)?.netns.file_name().context("it has a name")?.to_string_lossy().into_owned();
    Netns { name: netns }.enter(|| Ok(fs::write("/proc/sys/net/ipv4/fwmark_reflect", "1")?))?;
    stage.kubectl(&["-n", "shop", "label", "pod", &name, "istio.io/dataplane-mode-"])?;
    comes_to(true)
}

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";

fn log_of(session: &Session, pod: &Pod, container: &str) -> PathBuf {
    Pod::log(&session.record.run_dir, &pod.namespace, &pod.name, container)
}

/// New connections on one node and between both, into and within the namespace, each way between the servers.
fn pods_talk(stage: &Stage) -> Result<()> {
    for (from, to) in [
        ("client", "server-v1"),
        ("other", "server-v2"),
        ("stranger", "server-v1"),
        ("server-v1", "server-v2"),
        ("server-v2", "server-v1"),
    ] {
        stage.comes_to(from, &[&format!("http://{to}.shop/")], "200")?;
    }
    Ok(())
}

/// Rules and routes are looked for by the number of our table, in both families.
fn captured(stage: &Stage, pod: &str) -> Result<bool> {
    let script = "ip rule; ip -6 rule; ip route show table 15000; ip -6 route show table 15000";
    let output = stage.teller.session.exec(pod, &["/bin/sh", "-c", script])?.output()?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line.contains("15000") || line.starts_with("local")))
}

fn sysctls(stage: &Stage, pod: &str) -> Result<Vec<String>> {
    let files = ["tcp_fwmark_accept", "fwmark_reflect"].map(|name| format!("/proc/sys/net/ipv4/{name}"));
    let output = stage.teller.session.exec(pod, &["cat", &files[0], &files[1]])?.output()?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn nothing_is_left(stage: &Stage) -> Result<()> {
    for pod in PODS {
        ensure!(!captured(stage, pod)?, "{pod} has rules or routes of ours");
        let before = if pod == SET { ["0", "1"] } else { ["0", "0"] };
        ensure!(sysctls(stage, pod)? == before, "{pod}: {:?}, before {before:?}", sysctls(stage, pod)?);
    }
    let session = &stage.teller.session;
    for node in NODES {
        let pins = session.record.bpffs.join(node);
        let pins: Vec<_> = fs::read_dir(&pins)?.flatten().map(|entry| entry.path()).collect();
        ensure!(pins.is_empty(), "{pins:?}");
        let draining = session.record.cgroup.join(node).join("ztunnel-draining");
        ensure!(!draining.exists(), "{} is there", draining.display());
        let lo = session.on_node(node, &["ip", "address", "show", "dev", "lo"]).output()?;
        ensure!(!said(&lo).contains("169.254.7.127"), "{}", said(&lo));
        let root = session.record.run_dir.join("nodes").join(node);
        ensure!(!root.join("opt/cni/bin/ztunnel-cni").exists(), "the plugin is on {node}");
        ensure!(!root.join("var/run/ztunnel/drain").exists(), "sockets are left on {node}");
    }
    wait::until("no process of a ztunnel to be there", SETTLE, || {
        for node in NODES {
            ensure!(session.proxy(node).is_err(), "on {node}");
        }
        Ok(())
    })
}
