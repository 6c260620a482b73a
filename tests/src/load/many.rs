//! Many idle pods on one node: how long it takes to enrol them all, and what each of them costs its ztunnel while nothing happens.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures_util::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::SECRET;
use super::cluster::{self, Cluster};
use super::watch::Watch;
use crate::bench::interrupt::Interrupt;
use crate::bench::report::{self, Better, Budget, Machine, Report, Round, Row};
use crate::bench::serve;
use crate::bench::usage::{self, Sample};
use crate::cluster::api;
use crate::places::Places;
use crate::topology::Netns;

const NAMESPACE: &str = "many";
const NODE: &str = "node-a";
const ANNOTATION: &str = "ambient.istio.io/redirection";
/// What the issue asks for.
const ENROL_SECONDS: f64 = 5.0;
const KIB_PER_POD: f64 = 64.0;
const IDLE_PERCENT: f64 = 0.5;
/// How long all pods may take to be there, on a crowded machine.
const UP: Duration = Duration::from_secs(300);

/// Arguments of `pods`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How many pods
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u32).range(1..=250))]
    pub pods: u32,
    /// Seconds over which the idle CPU is taken
    #[arg(long, default_value_t = 20)]
    pub secs: u64,
    /// Where the JSON goes [default: target/bench/pods.json]
    #[arg(long)]
    pub out: Option<std::path::PathBuf>,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// From the label to the last annotation.
    pub enrolled_s: f64,
    /// What each pod adds to the ztunnel.
    pub rss_kib: f64,
    pub pss_kib: f64,
    /// What each pod adds to the kernel's slabs, everything else on the machine included.
    pub slab_kib: f64,
    /// Of one core.
    pub idle_percent: f64,
    /// Nothing else disturbed the idle seconds.
    pub calm: bool,
}

/// Runs the suite `pods`.
///
/// # Errors
/// When the cluster does not come up, or a pod is not reached through the mesh.
pub fn run(options: &Options) -> Result<()> {
    let places = Places::find()?;
    let started = OffsetDateTime::now_utc().replace_nanosecond(0)?.format(&Rfc3339)?;
    let interrupt = Interrupt::install()?;
    let figures = measure(&places, "bench-pods", options, &interrupt)?;
    let row = |test: &str, metric, value: f64, must: f64, calm| {
        let budget = (must > 0.0).then(|| Budget { against: "absolute".to_owned(), must, aim: must / 2.0 });
        let values = BTreeMap::from([("ours".to_owned(), value)]);
        Row::new(test, metric, Better::Lower, &[Round { calm, values }], budget)
    };
    let rows = vec![
        row("enrol_all", "s", figures.enrolled_s, ENROL_SECONDS, true),
        row("rss_per_pod", "kib", figures.rss_kib, KIB_PER_POD, true),
        row("pss_per_pod", "kib", figures.pss_kib, KIB_PER_POD, true),
        row("slab_per_pod", "kib", figures.slab_kib, 0.0, true),
        row("idle_cpu", "percent", figures.idle_percent, IDLE_PERCENT, figures.calm),
    ];
    let commit = report::commit(&places.workspace);
    let report = Report { suite: "pods", commit, machine: Machine::here(2)?, started, rounds: 1, rows };
    let out = options.out.clone().unwrap_or_else(|| places.target.join("bench/pods.json"));
    report.write(&out)?;
    println!("{} pods on {NODE}, {} of them reached through the mesh", options.pods, options.pods);
    print!("{}", report.table());
    println!("written to {}", out.display());
    Ok(())
}

/// Brings pods up, labels their namespace, and measures.
///
/// # Errors
/// As [`run`].
pub fn measure(places: &Places, id: &str, options: &Options, interrupt: &Interrupt) -> Result<Figures> {
    let cluster = Cluster::up(id, places, &cluster::FAR)?;
    let file = cluster.session.record.run_dir.join("many.yaml");
    fs::write(&file, manifest(options.pods))?;
    cluster.kubectl(&["apply", "-f", &file.display().to_string()])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kubeconfig = cluster.session.kubeconfig();
    let count = options.pods as usize;
    let is_ready = |pod: &Pod| {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
    };
    runtime.block_on(until(&kubeconfig, count, UP, is_ready)).context("pods to be ready")?;
    interrupt.check()?;

    let ztunnel = cluster.session.pods().into_iter().find(|pod| pod.node == NODE && pod.name.starts_with("ztunnel"));
    let ztunnel = ztunnel.context("no ztunnel on the node")?;
    let cgroup = ztunnel.main()?.cgroup.clone();
    let (before, slab) = (memory(&cgroup)?, slab_kib()?);

    let enabled = |pod: &Pod| pod.annotations().get(ANNOTATION).is_some_and(|value| value == "enabled");
    let began = Instant::now();
    let labelled = std::thread::scope(|scope| {
        let all = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(until(&kubeconfig, count, UP, enabled))?;
            anyhow::Ok(began.elapsed())
        });
        cluster.kubectl(&["label", "namespace", NAMESPACE, "istio.io/dataplane-mode=ambient"])?;
        all.join().map_err(|_| anyhow::anyhow!("the watch panicked"))?
    });
    let enrolled = labelled.context("pods to be enrolled")?;

    idle(Duration::from_secs(6), interrupt)?;
    let (after, slab_after) = (memory(&cgroup)?, slab_kib()?);
    // CPU of the ztunnel's own cgroup; of the rest of the lab, only that it is the lab's.
    let first = Sample::take(&cluster.session.record.cgroup, std::slice::from_ref(&cgroup))?;
    let window = Instant::now();
    idle(Duration::from_secs(options.secs), interrupt)?;
    let spent = Sample::take(&cluster.session.record.cgroup, &[cgroup])?.since(&first);
    let idle_percent = spent.proxies / window.elapsed().as_secs_f64() * 100.0;

    all_talk(&cluster, interrupt)?;
    cluster.session.stop()?;
    let per_pod = |after: u64, before: u64| after.saturating_sub(before) as f64 / f64::from(options.pods);
    Ok(Figures {
        enrolled_s: enrolled.as_secs_f64(),
        rss_kib: per_pod(after.0, before.0),
        pss_kib: per_pod(after.1, before.1),
        slab_kib: per_pod(slab_after, slab),
        idle_percent,
        calm: spent.calm(),
    })
}

fn idle(time: Duration, interrupt: &Interrupt) -> Result<()> {
    let end = Instant::now() + time;
    interrupt.until("the time to pass", time * 2, || Ok((Instant::now() >= end).then_some(())))
}

/// Each pod says something to a server on the other node; none of it may be readable there, nor go around the mesh.
fn all_talk(cluster: &Cluster, interrupt: &Interrupt) -> Result<()> {
    cluster.enrol()?;
    let far = cluster.session.pod("soak/far")?;
    let to = far.addresses.first().context("the server has no address")?;
    let pods: Vec<_> = cluster.session.pods().into_iter().filter(|pod| pod.namespace == NAMESPACE).collect();
    let mut mesh = far.addresses.clone();
    mesh.extend(pods.iter().flat_map(|pod| pod.addresses.clone()));
    let node = Netns { name: format!("{}{NODE}", cluster.session.record.netns_prefix) };
    let watch = Watch::start(&[&node], &mesh)?;
    let said = format!("exec 3<>/dev/tcp/{to}/{}; echo {SECRET} >&3; timeout 10 head -n 1 <&3", serve::ECHO);
    for pod in &pods {
        interrupt.check()?;
        let name = format!("{NAMESPACE}/{}", pod.name);
        let output = cluster.session.exec(&name, &["bash", "-ec", &said])?.output()?;
        let heard = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(heard.trim() == SECRET, "{name}: {heard} {}", String::from_utf8_lossy(&output.stderr));
    }
    let seen = watch.stop()?;
    ensure!(seen.secrets == 0 && seen.around == 0, "not all went through the mesh: {seen:?}");
    Ok(())
}

/// Follows the pods of the namespace until so many of them are as wanted.
async fn until(kubeconfig: &Path, count: usize, deadline: Duration, wanted: impl Fn(&Pod) -> bool) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(api::client(kubeconfig).await?, NAMESPACE);
    let mut events = watcher(pods, watcher::Config::default()).default_backoff().applied_objects().boxed();
    let mut are = BTreeMap::new();
    let all = async {
        while let Some(pod) = events.try_next().await? {
            are.insert(pod.name_any(), wanted(&pod));
            if are.values().filter(|is| **is).count() >= count {
                return Ok(());
            }
        }
        bail!("the watch ended")
    };
    match tokio::time::timeout(deadline, all).await {
        Ok(outcome) => outcome,
        Err(_) => bail!("{} of {count} after {deadline:?}", are.values().filter(|is| **is).count()),
    }
}

/// Resident and proportional memory in KiB of all processes of a container.
fn memory(cgroup: &Path) -> Result<(u64, u64)> {
    let mut total = (0, 0);
    for pid in usage::processes(cgroup)? {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        total = (total.0 + field(&text, "Rss:")?, total.1 + field(&text, "Pss:")?);
    }
    Ok(total)
}

fn slab_kib() -> Result<u64> {
    field(&fs::read_to_string("/proc/meminfo")?, "Slab:")
}

fn field(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(line.split_whitespace().next().context("no value")?.parse()?)
}

fn manifest(pods: u32) -> String {
    let mut text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n");
    for n in 0..pods {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: idle-{n}, namespace: {NAMESPACE}}}\nspec:\n  \
             nodeSelector: {{kubernetes.io/hostname: {NODE}}}\n  terminationGracePeriodSeconds: 1\n  \
             containers: [{{name: idle, image: curl}}]\n"
        );
    }
    text
}
