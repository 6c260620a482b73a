//! Pods that come and go faster than anybody looks: what they leave behind in a ztunnel, and what many of them cost it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::local;
use mesh_tests::memory;
use mesh_tests::places::Places;
use mesh_tests::raw::{self, Lab, Pod, Process};
use mesh_tests::wait;

const NAMESPACE: &str = "many";
const PORTS: u16 = 15000;
const PATIENCE: Duration = Duration::from_secs(30);
/// How many come and go, and how many are there at once.
const PODS: usize = 100;
const AT_ONCE: usize = 20;
/// What a second hundred may add to the memory of a ztunnel that has seen the first.
const GROWTH_KIB: u64 = 1024;

/// What a ztunnel holds.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    pins: usize,
}

fn held(pid: u32, bpffs: &Path) -> Result<Held> {
    let count = |directory: String| Ok::<_, anyhow::Error>(fs::read_dir(directory)?.count());
    Ok(Held {
        descriptors: count(format!("/proc/{pid}/fd"))?,
        threads: count(format!("/proc/{pid}/task"))?,
        pins: files(bpffs)?,
    })
}

fn files(directory: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { files(&entry.path())? } else { 1 };
    }
    Ok(count)
}

#[test]
fn pods_that_come_and_go_fast_leave_nothing_behind() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let program = Places::find()?.binaries.join("ztunnel");
    let lab = Lab::up(&format!("many{}", std::process::id()))?;
    let node = lab.node("node-a");
    let (file, ca) = (lab.scratch("mesh")?.join("node-a.yaml"), lab.scratch("ca")?);
    local::write_ca(&ca)?;
    let tell = |pods: &[(Pod, Process)]| {
        let all: Vec<(&Pod, &str)> = pods.iter().map(|(pod, _)| (pod, "node-a")).collect();
        let here: Vec<&Pod> = pods.iter().map(|(pod, _)| pod).collect();
        local::write_file(&file, &local::mesh_file(NAMESPACE, &all, &here))
    };
    tell(&[])?;
    let mut ztunnel = local::start_ztunnel(node, "ztunnel", &program, &file, &ca, PORTS)?;
    wait::until_true("the ztunnel to be ready", PATIENCE, || local::answers_ready(node, PORTS + 21))?;
    let before = held(ztunnel.pid(), &node.bpffs)?;
    let mut written = Vec::new();
    for round in 0..2 {
        let mut pods: Vec<(Pod, Process)> = Vec::new();
        for n in 0..PODS + AT_ONCE {
            if n < PODS {
                let pod = node.add_pod(&format!("idle-{round}-{n}"))?;
                let process = pod.spawn("sleep", &["sleep", "infinity"], &[])?;
                pods.push((pod, process));
            }
            // Some are gone before the ztunnel has heard of it, as in life.
            if n >= AT_ONCE {
                let (pod, process) = pods.remove(0);
                drop(process);
                pod.delete()?;
            }
            tell(&pods)?;
        }
        ensure!(pods.is_empty(), "all pods are gone");
        wait::until("nothing of the pods to be held", PATIENCE, || {
            ensure!(ztunnel.running(), "the ztunnel has ended");
            let now = held(ztunnel.pid(), &node.bpffs)?;
            // Threads that wait for blocking work end by themselves, and so does the connection that asked for readiness:
            // those from before included.
            let no_more = now.descriptors <= before.descriptors && now.threads <= before.threads;
            ensure!(no_more && now.pins == before.pins, "{now:?}, before: {before:?}");
            let dump = local::http(node, PORTS, "/config_dump")?;
            ensure!(!dump.contains("idle-"), "the admin endpoint still shows pods");
            Ok(())
        })?;
        written.push(memory::written_kib(ztunnel.pid())?);
    }
    let enrolled = ztunnel.output().matches("\tenrolled").count();
    ensure!(enrolled > PODS, "only {enrolled} pods were enrolled: nothing was shown");
    println!("{enrolled} of {} pods were enrolled; KiB after each hundred: {written:?}", 2 * PODS);
    ensure!(written[1] <= written[0] + GROWTH_KIB, "memory grows: {written:?} KiB");
    ensure!(!ztunnel.output().contains("panicked"), "{}", ztunnel.output());
    Ok(())
}
