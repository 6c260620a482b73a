//! The CNI plugin under real runtimes: Debian's containerd and cnitool hand over pods, and not one packet of them leaves
//! for a mesh peer in clear.

#![forbid(unsafe_code)]

#[path = "support/cri.rs"]
mod cri;
#[path = "support/leftovers.rs"]
mod leftovers;
#[path = "support/peer.rs"]
mod peer;
#[path = "support/pods.rs"]
mod pods;
#[path = "support/runtime.rs"]
mod runtime;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Child, Command, Output};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mesh_tests::{raw, record, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::{Case, Stage, said};

use leftovers::Machine;
use peer::Peer;
use pods::{Acted, Kubelet, NETWORK, NODE, PATIENCE, PLUGIN, Tool, delete, links, succeeds};
use runtime::{IMAGE, NodeView, PodObject};

const CONF: &str = "10-lab.conflist";
/// Pods of the mesh whose first act is a connection.
const PODS: usize = 100;
/// Pods outside the mesh among them, one in so many: the watcher has to see what they send.
const CONTROL_EVERY: usize = 10;
/// Pods a kubelet starts at the same time on such a machine.
const AT_ONCE: usize = 8;
/// What is shown of ztunnel's log after a failure.
const LOG_LINES: usize = 100;
/// The name of the lab in which this program, started by itself, is to be killed.
const TO_BE_KILLED: &str = "LAB_CNI_TO_BE_KILLED";
/// A lab with everything in it.
const UP: Duration = Duration::from_secs(150);

/// Two labs at a time are more than small machines can carry.
static ONE_LAB: Mutex<()> = Mutex::new(());

const CASES: &[Case] = &[
    ("the plugin joins the main CNI's configuration, whenever that comes or changes", joins_the_chain),
    ("a pod is enrolled when cnitool's ADD returns, and not after DEL, twice or not", cnitool_adds_and_deletes),
    ("what the runtime no longer has is collected", garbage_is_collected),
    ("a pod outside the mesh passes, and its namespace is remembered", a_pod_outside_passes),
    ("a pod that the control plane does not know waits where its namespace may be in the mesh", an_unknown_pod),
    ("a control plane that is away keeps back only who may belong to the mesh", without_a_control_plane),
    ("a ztunnel that is away keeps back only who may belong to the mesh, with any runtime", without_a_ztunnel),
    ("containerd takes the plugin up while it runs", containerd_takes_it_up),
    ("a hundred pods of containerd connect first of all, and never in clear", a_hundred_first_acts),
    ("uninstalling leaves the main CNI's configuration as it was", uninstalls),
];

#[test]
fn pods_of_a_real_runtime_are_captured_from_their_first_packet() {
    if std::env::var_os(TO_BE_KILLED).is_some() || !raw::available() {
        return;
    }
    let _one = ONE_LAB.lock().unwrap_or_else(PoisonError::into_inner);
    let id = format!("cni{}", std::process::id());
    let machine = Machine::before(&id);
    let outcome = catch_unwind(AssertUnwindSafe(|| support::run(&id, CASES)));
    // Whatever the cases came to.
    let left = machine.has_nothing_left();
    if let Err(failed) = outcome {
        println!("afterwards: {left:?}");
        resume_unwind(failed);
    }
    left.expect("nothing is left on the machine");
}

/// With pods of both runtimes running, test and supervisor are killed: the next command that looks takes all of it away.
#[test]
fn a_run_that_is_killed_leaves_nothing_behind() {
    if let Some(id) = std::env::var_os(TO_BE_KILLED) {
        return support::run(&id.to_string_lossy(), &[("pods run until this is killed", holds_pods)]);
    }
    if !raw::available() {
        return;
    }
    let _one = ONE_LAB.lock().unwrap_or_else(PoisonError::into_inner);
    let id = format!("cnik{}", std::process::id());
    let machine = Machine::before(&id);
    let victim = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["a_run_that_is_killed_leaves_nothing_behind", "--exact", "--nocapture"])
        .env(TO_BE_KILLED, &id)
        .spawn()
        .expect("this program can be started");
    let mut victim = Victim(victim);
    wait::until("its pods to run", UP, || {
        if let Some(status) = victim.0.try_wait()? {
            return Ok(Err(anyhow::anyhow!("it has ended: {status}")));
        }
        let record = record::find(&id).context("no lab yet")?;
        ensure!(record.run_dir.join(HOLDING).exists(), "no pods yet");
        Ok(Ok(()))
    })
    .and_then(|pods_run| pods_run)
    .expect("its pods run");
    let supervisor = record::find(&id).expect("the lab has a record").owner;
    let supervisor = Pid::from_raw(i32::try_from(supervisor.pid).expect("a PID"));
    // The supervisor first: it would tidy up when it sees the test end.
    kill(supervisor, Signal::SIGKILL).expect("the supervisor can be killed");
    drop(victim);
    assert!(machine.has_something(), "there would have been something to find");
    wait::until("the lab to be taken down", PATIENCE, || {
        record::reap_dead()?;
        ensure!(!record::all().iter().any(|record| record.id == id), "its record is there");
        Ok(())
    })
    .expect("the lab is taken down");
    machine.has_nothing_left().expect("nothing is left on the machine");
}

/// Killed when it is let go of.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Says that there are pods now.
const HOLDING: &str = "holding";

fn holds_pods(stage: &Stage) -> Result<()> {
    let kubelet = Kubelet::start(stage)?;
    fs::write(kubelet.node.conf_dir().join(CONF), main_conf())?;
    chained(&kubelet.node)?;
    kubelet.wait_for_plugin()?;
    let pod = kubelet.create("shop", "held")?;
    kubelet.block_on(async {
        let config = kubelet.config(&pod);
        let (sandbox, _) = kubelet.cri.run_sandbox(&config).await?;
        kubelet.cri.start(&sandbox, &config, IMAGE, &[]).await
    })?;
    let tool = Tool::new(stage, "shop", "held-too")?;
    succeeds(&tool.call("add")?)?;
    fs::write(stage.teller.session.record.run_dir.join(HOLDING), "")?;
    // Nobody waits for ever where the killer was killed.
    std::thread::sleep(UP);
    bail!("nobody has killed this")
}

/// The main CNI of the node: addresses that the lab itself does not give out.
fn main_conf() -> String {
    let conf = json!({
        "cniVersion": "1.0.0",
        "name": NETWORK,
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.244.1.0/24", "rangeStart": "10.244.1.100", "rangeEnd": "10.244.1.249", "gateway": "10.244.1.1"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    });
    serde_json::to_string_pretty(&conf).unwrap_or_default() + "\n"
}

/// Waits for the plugin to be in the main CNI's configuration.
fn chained(node: &NodeView) -> Result<()> {
    wait::until("the plugin to be in the main CNI's configuration", PATIENCE, || {
        let text = fs::read_to_string(node.conf_dir().join(CONF))?;
        ensure!(text.contains(PLUGIN), "{text}");
        Ok(())
    })
}

/// The runtime has been told why, and tries again.
fn is_told_to_wait(output: &Output, reason: &str) -> Result<()> {
    ensure!(!output.status.success() && said(output).contains(reason), "{}", said(output));
    Ok(())
}

fn joins_the_chain(stage: &Stage) -> Result<()> {
    let node = NodeView::of(&stage.teller.session, NODE)?;
    // The second time with the plugin in it, which this takes out.
    for _ in 0..2 {
        fs::write(node.conf_dir().join(CONF), main_conf())?;
        chained(&node)?;
    }
    let program = node.root.join("opt/cni/bin").join(PLUGIN);
    fs::remove_file(&program)?;
    wait::until_true("the program to be there again", PATIENCE, || program.exists())?;
    for verb in ["VERSION", "STATUS"] {
        let output = node.plugin(verb, &json!({"cniVersion": "1.1.0", "name": NETWORK, "type": PLUGIN}))?;
        succeeds(&output).context(verb)?;
        ensure!(verb == "STATUS" || said(&output).contains("\"1.1.0\""), "{}", said(&output));
    }
    Ok(())
}

fn cnitool_adds_and_deletes(stage: &Stage) -> Result<()> {
    let tool = Tool::new(stage, "shop", "tool")?;
    let before = enrolled(stage)?;
    let added = tool.call("add")?;
    // At once: whatever is asked for now must be so already.
    ensure!(tool.is_captured()?, "ADD has returned before the capture was there: {}", said(&added));
    succeeds(&added)?;
    ensure!(enrolled(stage)? == before + 1, "{} pods, {before} before", enrolled(stage)?);
    let result: serde_json::Value = serde_json::from_slice(&added.stdout).with_context(|| said(&added))?;
    ensure!(result["ips"].as_array().is_some_and(|ips| !ips.is_empty()), "{result}");
    succeeds(&tool.call("check")?)?;
    let peer = Peer::of(stage)?;
    let watching = peer.watch(&tool.node_netns)?;
    let talked = tool.first_act(&peer.targets()[0])?;
    watching.judge(&BTreeSet::from([tool.address()?]), &BTreeSet::new())?;
    succeeds(&talked)?;
    for _ in 0..2 {
        succeeds(&tool.call("del")?)?;
        ensure!(enrolled(stage)? == before && !tool.is_captured()?, "DEL leaves it captured");
    }
    let checked = tool.call("check")?;
    ensure!(!checked.status.success(), "CHECK of a pod that is gone: {}", said(&checked));
    tool.end()
}

fn garbage_is_collected(stage: &Stage) -> Result<()> {
    let (kept, lost) = (Tool::new(stage, "shop", "kept")?, Tool::new(stage, "shop", "lost")?);
    for tool in [&kept, &lost] {
        succeeds(&tool.call("add")?)?;
    }
    // By the name that cnitool gives to the container: it knows no GC itself.
    let container = kept.container_id()?;
    let conf = json!({
        "cniVersion": "1.1.0", "name": NETWORK, "type": PLUGIN,
        "cni.dev/valid-attachments": [{"containerID": container, "ifname": "eth0"}],
    });
    succeeds(&kept.node.plugin("GC", &conf)?)?;
    ensure!(kept.is_captured()? && !lost.is_captured()?, "the wrong one was collected");
    succeeds(&kept.call("check")?)?;
    ensure!(!lost.call("check")?.status.success(), "CHECK finds what was collected");
    for tool in [kept, lost] {
        succeeds(&tool.call("del")?)?;
        tool.end()?;
    }
    Ok(())
}

fn a_pod_outside_passes(stage: &Stage) -> Result<()> {
    let tool = Tool::new(stage, "outside", "tool")?;
    succeeds(&tool.call("add")?)?;
    ensure!(!tool.is_captured()?, "captured");
    succeeds(&tool.call("check")?)?;
    let state = tool.node.root.join("var/lib/ztunnel/namespaces.json");
    let known = fs::read_to_string(&state)?;
    ensure!(known.contains("outside") && !known.contains("shop"), "{known}");
    succeeds(&tool.call("del")?)?;
    tool.end()
}

/// The node learned before that namespace `outside` is; of `shop` it knows that it is not.
fn an_unknown_pod(stage: &Stage) -> Result<()> {
    let mut tools = Vec::new();
    for namespace in ["shop", "outside", "kube-system"] {
        let mut tool = Tool::new(stage, namespace, "nobody")?;
        tool.pod.uid = "00000000-0000-4000-8000-000000000000".to_owned();
        tools.push(tool);
    }
    let [inside, outside, system] = &tools[..] else { bail!("three pods") };
    let added = inside.call("add")?;
    is_told_to_wait(&added, "the control plane does not know the pod on this node")?;
    ensure!(!inside.is_captured()?, "half in");
    for tool in [outside, system] {
        succeeds(&tool.call("add")?)?;
        ensure!(!tool.is_captured()?, "captured");
    }
    for tool in tools {
        succeeds(&tool.call("del")?)?;
        ensure!(tool.links()? == ["lo"], "links are left: {:?}", tool.links()?);
        tool.end()?;
    }
    Ok(())
}

/// As above.
fn without_a_control_plane(stage: &Stage) -> Result<()> {
    scale_istiod(stage, 0)?;
    // After it is gone: a pod that was pushed before needs nobody's word.
    let (inside, outside) = (Tool::new(stage, "shop", "kept-back")?, Tool::new(stage, "outside", "passes")?);
    let own = Tool::new(stage, "istio-system", "the-control-planes-own")?;
    let away = (|| {
        for tool in [&outside, &own] {
            succeeds(&tool.call("add")?)?;
        }
        is_told_to_wait(&inside.call("add")?, "cannot join the mesh now")?;
        ensure!(!inside.is_captured()?, "half in");
        // What a runtime does after a failure.
        succeeds(&inside.call("del")?)
    })();
    scale_istiod(stage, 1)?;
    away?;
    inside.is_added_after_all()?;
    for tool in [inside, outside, own] {
        succeeds(&tool.call("del")?)?;
        tool.end()?;
    }
    stage.traffic_flows()
}

fn scale_istiod(stage: &Stage, replicas: usize) -> Result<()> {
    stage.kubectl(&["-n", "istio-system", "scale", "deployment/istiod", &format!("--replicas={replicas}")])?;
    if replicas > 0 {
        stage.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod", "--timeout=60s"])?;
        return Ok(());
    }
    are_gone(stage, "istiod")
}

fn are_gone(stage: &Stage, name: &str) -> Result<()> {
    wait::until(&format!("pods {name}* to end"), Duration::from_secs(60), || {
        let left = stage.teller.session.pods().iter().filter(|pod| pod.name.starts_with(name)).count();
        ensure!(left == 0, "{left} are left");
        Ok(())
    })
}

fn without_a_ztunnel(stage: &Stage) -> Result<()> {
    let kubelet = Kubelet::start(stage)?;
    kubelet.wait_for_plugin()?;
    stage.kubectl(&["-n", "istio-system", "delete", "daemonset", "ztunnel"])?;
    let away = are_gone(stage, "ztunnel").and_then(|()| without_a_ztunnel_now(stage, &kubelet));
    stage.kubectl(&["apply", "-f", "manifests/install.yaml"])?;
    stage.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=60s"])?;
    let (inside, sandboxes) = away?;
    inside.is_added_after_all()?;
    succeeds(&inside.call("del")?)?;
    inside.end()?;
    let before = enrolled(stage)?;
    let id = wait::until("containerd to make the sandbox after all", PATIENCE, || kubelet.sandbox(&sandboxes[0]))?;
    ensure!(enrolled(stage)? == before + 1, "not enrolled");
    kubelet.block_on(kubelet.cri.remove(&id))?;
    for pod in &sandboxes {
        kubelet.block_on(delete(&kubelet.client, pod))?;
    }
    kubelet.end()?;
    stage.traffic_flows()
}

/// What is to be tried again once it is back.
fn without_a_ztunnel_now(stage: &Stage, kubelet: &Kubelet) -> Result<(Tool, Vec<PodObject>)> {
    let (inside, outside) = (Tool::new(stage, "shop", "kept-back")?, Tool::new(stage, "outside", "passes")?);
    let own = Tool::new(stage, "istio-system", "ztunnel-itself")?;
    is_told_to_wait(&inside.call("add")?, "ztunnel does not answer on this node")?;
    ensure!(!inside.is_captured()?, "half in");
    succeeds(&inside.call("del")?)?;
    ensure!(inside.links()? == ["lo"], "links are left: {:?}", inside.links()?);
    for tool in [outside, own] {
        succeeds(&tool.call("add")?)?;
        succeeds(&tool.call("del")?)?;
        tool.end()?;
    }
    let links = || kubelet.node_netns.enter(links);
    let before = links()?;
    let mut pods = Vec::new();
    for (namespace, comes) in [("shop", false), ("outside", true), ("kube-system", true)] {
        let pod = kubelet.create(namespace, "sandbox")?;
        match kubelet.sandbox(&pod) {
            Ok(id) if comes => kubelet.block_on(kubelet.cri.remove(&id))?,
            Ok(_) => bail!("a sandbox in {namespace}"),
            Err(error) if comes => bail!("{namespace}: {error:#}"),
            Err(error) => {
                let told = format!("{error:#}");
                ensure!(told.contains("ztunnel does not answer on this node"), "{told}");
            }
        }
        pods.push(pod);
    }
    ensure!(links()? == before, "links are left on the node: {:?}, before {before:?}", links()?);
    let left = kubelet.containerd.sandboxes()?;
    ensure!(left.is_empty(), "network namespaces are left: {left:?}");
    Ok((inside, pods))
}

/// As on a new node: the runtime comes first, then the main CNI, then the plugin.
fn containerd_takes_it_up(stage: &Stage) -> Result<()> {
    let path = NodeView::of(&stage.teller.session, NODE)?.conf_dir().join(CONF);
    fs::remove_file(&path)?;
    let kubelet = Kubelet::start(stage)?;
    let without = kubelet.block_on(kubelet.cri.network());
    ensure!(without.is_err(), "it has a network: {without:?}");
    fs::write(&path, main_conf())?;
    kubelet.wait_for_plugin()?;
    kubelet.end()
}

fn a_hundred_first_acts(stage: &Stage) -> Result<()> {
    let kubelet = Kubelet::start(stage)?;
    kubelet.wait_for_plugin()?;
    let before = enrolled(stage)?;
    let peer = Peer::of(stage)?;
    let targets = peer.targets();
    let watching = peer.watch(&kubelet.node_netns)?;
    let began = Instant::now();
    let acts: Result<Vec<Acted>> = kubelet.block_on(async {
        let controls = PODS / CONTROL_EVERY;
        stream::iter(0..PODS + controls)
            .map(|n| {
                let namespace = if n % (CONTROL_EVERY + 1) == CONTROL_EVERY { "outside" } else { "shop" };
                let (kubelet, target) = (&kubelet, &targets[n % targets.len()]);
                async move { kubelet.first_act(namespace, n, target).await.with_context(|| format!("pod {n}")) }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    });
    let took = began.elapsed();
    let of = |namespace: &str| {
        let acts = acts.iter().flatten().filter(|act| act.namespace == namespace);
        acts.map(|act| act.address).collect::<BTreeSet<_>>()
    };
    let (inside, controls) = (of("shop"), of("outside"));
    let judged = watching.judge(&inside, &controls);
    let left = kubelet.containerd.sandboxes()?;
    kubelet.end()?;
    let mut sandboxes: Vec<Duration> = acts?.into_iter().map(|act| act.sandbox).collect();
    sandboxes.sort();
    println!(
        "  {} pods in {:.1} s; a sandbox took {} ms, at most {} ms",
        sandboxes.len(),
        took.as_secs_f32(),
        sandboxes[sandboxes.len() / 2].as_millis(),
        sandboxes.last().map_or(0, Duration::as_millis)
    );
    if judged.is_err() {
        let log = stage.log(&stage.teller.session.proxy(NODE)?)?;
        let lines: Vec<&str> = log.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(LOG_LINES)).for_each(|line| println!("{line}"));
    }
    judged?;
    ensure!((inside.len(), controls.len()) == (PODS, PODS / CONTROL_EVERY), "an address was given twice");
    ensure!(left.is_empty(), "network namespaces are left: {left:?}");
    wait::until("nobody to be enrolled any more", PATIENCE, || {
        ensure!(enrolled(stage)? == before, "{} pods, {before} before", enrolled(stage)?);
        Ok(())
    })
}

fn uninstalls(stage: &Stage) -> Result<()> {
    let node = NodeView::of(&stage.teller.session, NODE)?;
    stage.kubectl(&["-n", "istio-system", "delete", "daemonset", "ztunnel"])?;
    are_gone(stage, "ztunnel")?;
    stage.kubectl(&["apply", "-f", "manifests/uninstall.yaml"])?;
    stage.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel-uninstall", "--timeout=60s"])?;
    ensure!(fs::read_to_string(node.conf_dir().join(CONF))? == main_conf());
    ensure!(!node.root.join("opt/cni/bin").join(PLUGIN).exists(), "the plugin's program is there");
    Ok(())
}

/// Pods that the node's ztunnel captures.
fn enrolled(stage: &Stage) -> Result<usize> {
    let session = &stage.teller.session;
    let proxy = session.proxy(NODE)?;
    let output = session.exec(&proxy.name, &["curl", "-s", "http://127.0.0.1:15020/metrics"])?.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("workload_manager_active_proxy_count"));
    let count = line.and_then(|rest| rest.split_whitespace().last()).with_context(|| said(&output))?;
    Ok(count.parse::<f64>()? as usize)
}
