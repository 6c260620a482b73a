//! `ztunnel uninstall`: takes everything of ours off a node on which no ztunnel will run any more.
//!
//! A ztunnel that ends leaves capture in place on purpose, and what it captured is refused until another one comes. When
//! none will, the pods of the node must be let go of, whether or not they are still labelled: nobody else can do it.
//!
//! Order: nobody serves the node; the CNI plugin, which would keep new pods waiting; a word to draining ztunnels, which
//! end; new connections of captured pods go direct; once the open ones have ended that need them, rules, routes and
//! sysctls; last the pins, as what has to be restored is kept in a map of theirs. Each step is tried whatever became of
//! the others, and all of it may be done again.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ebpf_loader::{Capture, NetnsCookie};
use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use crate::cni::install;
use crate::config::UninstallTask;
use crate::handover::{self, cgroup};
use crate::node::find::{self, Finder};
use crate::node::host::Host;
use crate::node::netns::Netns;
use crate::node::sysctl::Sysctls;
use crate::node::{release, tenure};

/// For a ztunnel whose pod was just deleted: its grace period is 30 s, and it uses it where connections are open.
const SERVED: Duration = Duration::from_secs(60);
/// For draining ztunnels to end, which look for the marker every second or so, and for applications to close what was cut.
const ENDING: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Does it, and says on standard output what it did. Nothing to do is no error.
///
/// # Errors
/// When a ztunnel serves the node, or a step did not come to its end; the others were done all the same.
pub fn run(task: &UninstallTask) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(take_off(task))
}

async fn take_off(task: &UninstallTask) -> anyhow::Result<()> {
    let captured = until_unserved(task).await?;
    let mut steps = Steps::default();
    steps.done(
        install::uninstall(&task.directories),
        format!(
            "the CNI plugin is neither in {} nor in {}",
            task.directories.conf.display(),
            task.directories.bin.display()
        ),
    );
    let told = handover::leave_marker(&task.run_dir);
    steps.done(
        told.with_context(|| format!("telling draining ztunnels in {}", task.run_dir.display())),
        "draining ztunnels are told to end",
    );
    let end = Instant::now() + ENDING;
    match captured {
        Some(capture) => {
            if release_all(task, &capture, end, &mut steps).await {
                drop(capture);
                steps.done(
                    ebpf_loader::remove_pins(&task.bpffs_dir).map_err(Into::into),
                    format!("no programs and maps are pinned in {}", task.bpffs_dir.display()),
                );
            }
        }
        None => println!("nothing is captured: there are no pins in {}", task.bpffs_dir.display()),
    }
    let host = Host::open(&task.host_netns);
    let host = host.with_context(|| format!("opening the node's network namespace {}", task.host_netns.display()));
    let removed = match host {
        Ok(mut host) => host.remove_addresses().await.map_err(Into::into),
        Err(error) => Err(error),
    };
    steps.done(removed, "the node's lo has no addresses of probes");
    steps.done(until_drained(task, end).await, "no ztunnel drains");
    steps.outcome()
}

/// What has been done, told at once; what could not be is told at the end.
#[derive(Default)]
struct Steps(Vec<anyhow::Error>);

impl Steps {
    fn done(&mut self, outcome: anyhow::Result<()>, said: impl std::fmt::Display) {
        match outcome {
            Ok(()) => println!("{said}"),
            Err(error) => self.0.push(error),
        }
    }

    fn outcome(self) -> anyhow::Result<()> {
        let problems: Vec<_> = self.0.iter().map(|error| format!("{error:#}")).collect();
        ensure!(problems.is_empty(), "not everything is off this node; to be tried again:\n{}", problems.join("\n"));
        Ok(())
    }
}

/// Waits for the ztunnel of the node to end; returns what was captured, if anything was.
async fn until_unserved(task: &UninstallTask) -> anyhow::Result<Option<Capture>> {
    let end = Instant::now() + SERVED;
    let mut told = None;
    let mut served_by = |who: Option<String>| {
        let Some(who) = who else { return Ok(false) };
        ensure!(Instant::now() < end, "{who} serves this node: delete the DaemonSet first");
        if told.as_ref() != Some(&who) {
            println!("waiting for {who} to end");
            told = Some(who);
        }
        Ok(true)
    };
    let claimant = || -> anyhow::Result<Option<String>> {
        let pid = tenure::claimant(&task.bpffs_dir, &task.proc_root)
            .with_context(|| format!("reading {}", task.bpffs_dir.display()))?;
        Ok(pid.map(|pid| format!("a ztunnel (process {pid})")))
    };
    while served_by(claimant()?)? {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    if !has_pins(&task.bpffs_dir)? {
        return Ok(None);
    }
    let capture = Capture::open(&task.bpffs_dir, &task.cgroup_root)?;
    // One that has not claimed the node yet, or lost it again: its listeners are in the map while it lives.
    let listener = || -> anyhow::Result<Option<String>> {
        Ok((!capture.listening()?.is_empty()).then(|| "a ztunnel that listens in pods".to_owned()))
    };
    while served_by(listener()?)? {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(Some(capture))
}

fn has_pins(directory: &Path) -> anyhow::Result<bool> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        entries => Ok(entries.with_context(|| format!("reading {}", directory.display()))?.next().is_some()),
    }
}

/// A pod's namespace that was captured.
struct Captured {
    uid: String,
    netns: Netns,
    cookie: NetnsCookie,
}

/// Lets go of every namespace; true when nothing more has to be restored in any.
async fn release_all(task: &UninstallTask, capture: &Capture, end: Instant, steps: &mut Steps) -> bool {
    let before = steps.0.len();
    let pods = captured_pods(task, capture).unwrap_or_else(|error| {
        steps.0.push(error);
        Vec::new()
    });
    // All of them, before anything is waited for.
    for pod in &pods {
        let stopped = release::stop(capture, &pod.netns, pod.cookie).await;
        if let Err(error) = stopped.with_context(|| format!("pod {}: ending its capture", pod.uid)) {
            steps.0.push(error);
        }
    }
    let rest = detach_rest(capture, &pods);
    match rest {
        Ok(0) => {}
        Ok(count) => println!("{count} captured namespaces have no process of a pod in them: let go of"),
        Err(error) => steps.0.push(error),
    }
    let released = join_all(pods.iter().map(|pod| take_back(task, capture, pod, end))).await;
    for (pod, released) in pods.iter().zip(released) {
        let note = match released {
            Ok(Open::None) => "",
            Ok(Open::Some) => "; connections that it had left open are cut off",
            Err(_) => "",
        };
        steps.done(
            released.map(drop).with_context(|| format!("pod {}", pod.uid)),
            format!("pod {}: released{note}", pod.uid),
        );
    }
    steps.0.len() == before
}

/// Namespaces of pods that are captured, or were and still have something of ours.
fn captured_pods(task: &UninstallTask, capture: &Capture) -> anyhow::Result<Vec<Captured>> {
    let proc_root = task.proc_root.display();
    if !find::shows_the_node(&task.proc_root) {
        bail!("process 1 of {proc_root} is ztunnel: the node's processes are not there (hostPID)");
    }
    let kept = capture.kept()?;
    let host = Host::open(&task.host_netns)
        .with_context(|| format!("opening the node's network namespace {}", task.host_netns.display()))?;
    let finder = Finder::new(&task.proc_root, &task.cgroup_root, host.inode());
    let found = finder.and_then(|finder| finder.all()).with_context(|| format!("reading {proc_root}"))?;
    let mut pods = Vec::new();
    for (uid, found) in found.into_values() {
        let netns = found.netns;
        let cookie = ebpf_loader::cookie_of(netns.file())?;
        if kept.contains(&cookie) {
            pods.push(Captured { uid, netns, cookie });
        }
    }
    Ok(pods)
}

/// Namespaces in which nobody was found are let go of all the same; rules in them end with them.
fn detach_rest(capture: &Capture, pods: &[Captured]) -> anyhow::Result<usize> {
    let done: HashSet<_> = pods.iter().map(|pod| pod.cookie).collect();
    let rest: Vec<_> = capture.attached()?.into_iter().filter(|cookie| !done.contains(cookie)).collect();
    rest.iter().try_for_each(|cookie| capture.detach(*cookie))?;
    Ok(rest.len())
}

/// Whether a pod had connections open at the end that needed the rules.
enum Open {
    None,
    Some,
}

async fn take_back(task: &UninstallTask, capture: &Capture, pod: &Captured, end: Instant) -> anyhow::Result<Open> {
    let waited = timeout_at(end, release::until_unneeded(&pod.netns, LOOK_AGAIN)).await;
    let sysctls = Sysctls::open(&pod.netns, &task.proc_root)?;
    let found = capture.remember(pod.cookie, 0)?;
    if let Err(error) = release::take_back(capture, &pod.netns, pod.cookie, &sysctls).await {
        // For the next try.
        capture.remember(pod.cookie, found)?;
        return Err(error.into());
    }
    Ok(if waited.is_ok() { Open::None } else { Open::Some })
}

/// Waits for draining ztunnels to end, and removes what they, and those that were killed, leave.
async fn until_drained(task: &UninstallTask, end: Instant) -> anyhow::Result<()> {
    loop {
        match cgroup::sweep(&task.cgroup_root) {
            0 => break,
            left => ensure!(Instant::now() < end, "{left} cgroups of draining ztunnels still have processes"),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    handover::remove_sockets(&task.run_dir)
        .with_context(|| format!("removing the sockets of draining ztunnels in {}", task.run_dir.display()))
}
