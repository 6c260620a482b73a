//! Everything at once, for as long as one likes: new connections, long-lived ones and transfers, workloads that change a hundred times
//! a second, policies that come and go, certificates that live for a minute. Nothing fails, and nothing grows.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use kube::Api;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::Tally;
use super::client::{Amount, Flow, Visible};
use super::cluster::{self, Cluster, Load};
use super::watch::{Seen, Watch};
use crate::bench::{serve, usage};
use crate::cluster::api;
use crate::places::Places;
use crate::raw::NODES;
use crate::topology::Netns;
use crate::{local, sys, wait};

/// What a process may grow by in ten minutes, in MiB.
pub const GROWTH: f64 = 1.0;
/// What it may grow by from the first half to the second where there was not the time for a slope. In KiB.
const GROWTH_IN_A_TEST: f64 = 12.0 * 1024.0;
/// Shorter than this, a slope says nothing.
const FOR_A_SLOPE: Duration = Duration::from_secs(300);
/// Between two looks at the memory.
const LOOK: Duration = Duration::from_secs(5);
/// WorkloadEntries that change in turn.
const ENTRIES: u64 = 100;
/// Changes under way at a time, so that a slow answer does not stop the others.
const AT_ONCE: usize = 32;
/// Of the share of time in which the machine is busy, for the rate that makes it as busy as is asked for.
const PROBE: Duration = Duration::from_secs(10);
const RATES: std::ops::RangeInclusive<f64> = 20.0..=4000.0;
const NAMESPACE: &str = "soak";
const POLICY: &str = "closed";
/// How long the mesh may take to know what is so, on a crowded machine.
const SETTLE: Duration = Duration::from_secs(60);

/// Arguments of `endure`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Seconds under load, half of which are warm-up where there are only a few
    #[arg(long, default_value_t = 1800)]
    pub secs: u64,
    /// How busy the machine is to be, in percent of all its cores; new connections make it so
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u32).range(1..=95))]
    pub cpu: u32,
    /// New connections per second, in place of --cpu
    #[arg(long)]
    pub rate: Option<u32>,
    /// Long-lived connections
    #[arg(long, default_value_t = 300)]
    pub long: u32,
    /// Changes of workloads per second
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub churn: u32,
    /// Seconds between a policy's coming and going
    #[arg(long, default_value_t = 5)]
    pub flip: u64,
    /// Lifetime of certificates in seconds
    #[arg(long, default_value_t = 60)]
    pub certificates: u64,
}

impl Options {
    /// What a test can spend, with certificates that are renewed in it.
    pub fn short() -> Self {
        Self { secs: 20, cpu: 70, rate: Some(60), long: 60, churn: 20, flip: 2, certificates: 12 }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    options: Options,
    rate: u32,
    /// Of everything but the pod that is closed now and then, and of that.
    tally: Tally,
    flipped: Tally,
    seen: Seen,
    /// Share of all cores that was busy.
    busy: f64,
    changes: u64,
    flips: u64,
    certificates: u64,
    /// By process: seconds since the load began, KiB.
    memory: BTreeMap<String, Vec<(f64, f64)>>,
}

/// Runs the suite `endure`.
///
/// # Errors
/// When it cannot be run, or something does not hold.
pub fn run(options: &Options) -> Result<()> {
    let outcome = play(&Places::find()?, "endure", options)?;
    outcome.lines().iter().for_each(|line| println!("{line}"));
    let verdict = outcome.check();
    println!("endure: {}", if verdict.is_ok() { "holds" } else { "does NOT hold" });
    verdict
}

/// Brings a mesh up, loads it, and says what came of it.
///
/// # Errors
/// When the stage or the load breaks; what the load saw is in the outcome.
pub fn play(places: &Places, id: &str, options: &Options) -> Result<Outcome> {
    for program in ["bench", "ztunnel", "istiod-lite", "lab"] {
        ensure!(places.binaries.join(program).exists(), "{program} is missing: run `cargo xtask build`");
    }
    let mut cluster = Cluster::up(id, places, &cluster::ALL)?;
    cluster.add(&cluster::GUARDED)?;
    // Connections that went well would be told by the gigabyte.
    cluster.set(&[&format!("SECRET_TTL={}s", options.certificates), "RUST_LOG=info,access=error"])?;
    cluster.enrol()?;
    let changes = Changes::start(&cluster, options)?;
    let rate = match options.rate {
        Some(rate) => rate,
        None => rate_for(&mut cluster, options)?,
    };
    let at_most = Duration::from_secs(options.secs + 300);
    let amount = Amount { bulk: 1, at_most, ..Amount::of(rate, options.long) };
    let prefix = &cluster.session.record.netns_prefix;
    let nodes = NODES.map(|node| Netns { name: format!("{prefix}{node}") });
    let mut load = cluster.start_load(amount, Visible::Never)?;
    let mut flipped = start_flipped(&mut cluster, at_most)?;
    let watch = Watch::start(&nodes.each_ref(), &cluster.mesh_addresses()?)?;

    let processes = processes(&cluster)?;
    let mut memory: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    let (issued, changed, turned) = (issued(&cluster)?, changes.made(), changes.flips());
    let (began, first) = (Instant::now(), busy()?);
    let end = began + Duration::from_secs(options.secs);
    let mut next = began + LOOK.min(end - began);
    while Instant::now() < end {
        load.run_until(next)?;
        flipped.run_until(next)?;
        changes.check()?;
        for (name, cgroup) in &processes {
            let sample = (began.elapsed().as_secs_f64(), usage::resident_kib(cgroup)? as f64);
            memory.entry(name.clone()).or_default().push(sample);
        }
        next = (next + LOOK).max(Instant::now()).min(end);
    }
    let busy = share(first, busy()?);
    let (changed, turned) = (changes.made() - changed, changes.flips() - turned);
    let (tally, flipped, seen) = (load.stop()?, flipped.stop()?, watch.stop()?);
    let issued = self::issued(&cluster)? - issued;
    let last = changes.stop()?;
    let outcome = Outcome {
        options: options.clone(),
        rate,
        tally,
        flipped,
        seen,
        busy,
        changes: changed,
        flips: turned,
        certificates: issued,
        memory,
    };
    wait::until("both ztunnels to know the last of all changes", SETTLE, || all_know(&cluster, &last))?;
    cluster.session.stop()?;
    Ok(outcome)
}

impl Outcome {
    /// Does it hold?
    ///
    /// # Errors
    /// What does not hold, all of it.
    pub fn check(&self) -> Result<()> {
        let mut wrong = Vec::new();
        let mut must = |holds: bool, what: String| {
            if !holds {
                wrong.push(what);
            }
        };
        let Options { secs, churn, flip, certificates, .. } = self.options;
        for tally in [&self.tally, &self.flipped] {
            let kinds = Tally::by_kind(&tally.failures).join("\n  ");
            must(tally.failed == 0, format!("{} new connections failed:\n  {kinds}", tally.failed));
            let kinds = Tally::by_kind(&tally.losses).join("\n  ");
            must(tally.long_lost == 0, format!("{} long-lived connections were lost:\n  {kinds}", tally.long_lost));
        }
        must(self.tally.refused == 0, "connections were refused that no policy is about".to_owned());
        let (open, closed) = (self.flipped.ok, self.flipped.refused);
        must(open > 0 && closed > 0, format!("the policy was never seen to change: {open} good, {closed} refused"));
        // Less is a load that is not there; a test shares its machine with others.
        let enough = if is_long(secs) { u64::from(churn) * secs * 8 / 10 } else { secs };
        must(self.changes >= enough, format!("{} changes of workloads", self.changes));
        must(self.flips * flip * 2 >= secs, format!("{} changes of the policy", self.flips));
        must(self.certificates * certificates >= secs, format!("{} certificates were signed", self.certificates));
        must(self.seen.secrets == 0, format!("{} frames can be read", self.seen.secrets));
        must(self.seen.around == 0, format!("{} attempts to connect past the mesh", self.seen.around));
        must(self.seen.public > 0, "the watcher saw not even what goes in plain text".to_owned());
        for (name, samples) in &self.memory {
            let settled = settled(samples, secs);
            if is_long(secs) {
                let slope = slope(settled);
                must(slope < GROWTH, format!("{name} grows by {slope:.2} MiB in ten minutes"));
            } else {
                let growth = growth(samples);
                must(growth < GROWTH_IN_A_TEST, format!("{name} has grown by {growth:.0} KiB"));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }

    /// What there is to say, for the reader.
    pub fn lines(&self) -> Vec<String> {
        let (t, f) = (&self.tally, &self.flipped);
        let transfers: u64 = t.flows.iter().filter(|(name, _)| name.ends_with("-bulk")).map(|(_, count)| count).sum();
        let mut lines = vec![
            format!(
                "endure {} s, {} new connections/s asked for, machine {:.0} % busy: {} new ({:.0}/s), {transfers} of them transfers, {} \
                 failed, slowest {} ms; {} long-lived, {} lost, {} heartbeats",
                self.options.secs,
                self.rate,
                self.busy * 100.0,
                t.opened,
                t.rate(),
                t.failed,
                t.slowest_ms,
                t.long_opened,
                t.long_lost,
                t.heartbeats,
            ),
            format!(
                "meanwhile {} changes of workloads ({:.0}/s), {} of the policy ({} let in, {} refused, {} failed), {} certificates; {} \
                 frames searched, {} readable, {} SYN past the mesh",
                self.changes,
                self.changes as f64 / self.options.secs.max(1) as f64,
                self.flips,
                f.ok,
                f.refused,
                f.failed,
                self.certificates,
                self.seen.searched,
                self.seen.secrets,
                self.seen.around,
            ),
        ];
        for (name, samples) in &self.memory {
            let mib = |sample: Option<&(f64, f64)>| sample.map_or(0.0, |(_, kib)| kib / 1024.0);
            let settled = settled(samples, self.options.secs);
            lines.push(format!(
                "{name}: {:.1} MiB at the beginning, {:.1} after the warm-up, {:.1} at the end: {:+.2} MiB in ten minutes",
                mib(samples.first()),
                mib(settled.first()),
                mib(samples.last()),
                slope(settled),
            ));
        }
        lines
    }
}

/// Long enough to be strict.
fn is_long(secs: u64) -> bool {
    Duration::from_secs(secs) >= FOR_A_SLOPE
}

/// What comes after the warm-up: five minutes of it, or half where that is less.
fn settled(samples: &[(f64, f64)], secs: u64) -> &[(f64, f64)] {
    let warm = (secs as f64 / 2.0).min(300.0);
    let from = samples.iter().position(|(at, _)| *at >= warm).unwrap_or(samples.len());
    &samples[from..]
}

/// By least squares, in MiB per ten minutes.
fn slope(samples: &[(f64, f64)]) -> f64 {
    let count = samples.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| samples.iter().map(of).sum::<f64>() / count.max(1.0);
    let (at, kib) = (mean(|sample| sample.0), mean(|sample| sample.1));
    let both: f64 = samples.iter().map(|sample| (sample.0 - at) * (sample.1 - kib)).sum();
    let square: f64 = samples.iter().map(|sample| (sample.0 - at).powi(2)).sum();
    if square > 0.0 { both / square * 600.0 / 1024.0 } else { 0.0 }
}

/// From the mean of the first half to that of the second, in KiB.
fn growth(samples: &[(f64, f64)]) -> f64 {
    let (first, second) = samples.split_at(samples.len() / 2);
    let mean = |half: &[(f64, f64)]| half.iter().map(|sample| sample.1).sum::<f64>() / half.len().max(1) as f64;
    if first.is_empty() { 0.0 } else { mean(second) - mean(first) }
}

/// The rate of new connections that makes the machine as busy as is asked for, from what some of them cost.
fn rate_for(cluster: &mut Cluster, options: &Options) -> Result<u32> {
    const TRIED: u32 = 200;
    let wanted = f64::from(options.cpu) / 100.0;
    let mut measured = [0.0; 2];
    for (rate, share_of) in [0, TRIED].into_iter().zip(&mut measured) {
        let mut load = cluster.start_load(Amount { bulk: 1, ..Amount::of(rate, options.long) }, Visible::Never)?;
        load.run_until(Instant::now() + PROBE / 5)?;
        let first = busy()?;
        load.run_until(Instant::now() + PROBE)?;
        *share_of = share(first, busy()?);
        load.stop()?;
    }
    let [without, with] = measured;
    ensure!(without < wanted, "the machine is {:.0} % busy before there is a new connection", without * 100.0);
    let rate = f64::from(TRIED) * (wanted - without) / (with - without).max(0.01);
    println!("{:.0} % busy without new connections, {:.0} % with {TRIED}/s", without * 100.0, with * 100.0);
    Ok(rate.clamp(*RATES.start(), *RATES.end()) as u32)
}

/// Ticks of all cores: busy, and all.
fn busy() -> Result<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = fields[..] else {
        bail!("/proc/stat has too few columns: {line}")
    };
    let busy = user + nice + system + irq + softirq + steal;
    Ok((busy, busy + idle + iowait))
}

fn share(before: (u64, u64), after: (u64, u64)) -> f64 {
    (after.0 - before.0) as f64 / (after.1 - before.1).max(1) as f64
}

/// The client of the pod that is closed now and then.
fn start_flipped(cluster: &mut Cluster, at_most: Duration) -> Result<Load> {
    let guarded = cluster.session.pod("soak/guarded")?;
    let flow = |ip: &std::net::IpAddr| Flow {
        name: "guarded".to_owned(),
        to: SocketAddr::new(*ip, serve::ECHO),
        visible: Visible::Never,
    };
    let flows: Vec<Flow> = guarded.addresses.iter().map(flow).collect();
    let mut arguments = Amount { at_most, ..Amount::of(20, 0) }.arguments(&flows, 100, 100);
    arguments.push("--refusable".to_owned());
    cluster.start_clients(&[("near", arguments)])
}

/// Whose memory is looked at.
fn processes(cluster: &Cluster) -> Result<Vec<(String, PathBuf)>> {
    let mut found = vec![("istiod".to_owned(), cluster.session.pod("istio-system/istiod")?.main()?.cgroup.clone())];
    for node in NODES {
        found.push((format!("ztunnel on {node}"), cluster.session.proxy(node)?.main()?.cgroup.clone()));
    }
    Ok(found)
}

/// Certificates that the control plane has signed.
fn issued(cluster: &Cluster) -> Result<u64> {
    let istiod = cluster.session.pod("istio-system/istiod")?;
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, 15014));
    let said = sys::in_netns(&istiod.netns, move || local::get(to, "/metrics"))?;
    let line = said.lines().find_map(|line| line.strip_prefix("citadel_server_success_cert_issuance_count"));
    Ok(line.and_then(|rest| rest.trim().parse::<f64>().ok()).map_or(0, |count| count as u64))
}

/// Whether both ztunnels have these revisions of the entries.
fn all_know(cluster: &Cluster, revisions: &BTreeMap<String, String>) -> Result<()> {
    for node in NODES {
        let proxy = cluster.session.proxy(node)?;
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, 15000));
        let said = sys::in_netns(&proxy.netns, move || local::get(to, "/config_dump"))?;
        let (_, body) = said.split_once("\r\n\r\n").context("an answer without a body")?;
        let dump: Value = serde_json::from_str(body)?;
        let workloads = dump["workloads"].as_array().context("a dump without workloads")?;
        let known: BTreeMap<&str, &str> = workloads
            .iter()
            .filter_map(|workload| Some((workload["name"].as_str()?, workload["canonicalRevision"].as_str()?)))
            .collect();
        for (name, revision) in revisions {
            let there = known.get(name.as_str()).copied();
            ensure!(there == Some(revision), "{node} has {name} as {there:?}, and not {revision}");
        }
    }
    Ok(())
}

/// What changes in the cluster meanwhile.
struct Changes {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<BTreeMap<String, String>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    made: AtomicU64,
    flips: AtomicU64,
}

impl Changes {
    fn start(cluster: &Cluster, options: &Options) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let (theirs, options, kubeconfig) = (shared.clone(), options.clone(), cluster.session.kubeconfig());
        let thread = std::thread::Builder::new().name("changes".to_owned()).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let client = api::client(&kubeconfig).await?;
                let churn = churn(client.clone(), &theirs, options.churn);
                let (last, ()) = tokio::try_join!(churn, flip(client, &theirs, options.flip))?;
                Ok(last)
            })
        })?;
        let changes = Self { shared, thread };
        wait::until("changes to begin", SETTLE, || {
            changes.check()?;
            ensure!(changes.made() > 0, "none yet");
            Ok(())
        })?;
        Ok(changes)
    }

    fn made(&self) -> u64 {
        self.shared.made.load(Ordering::Relaxed)
    }

    fn flips(&self) -> u64 {
        self.shared.flips.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.thread.is_finished(), "changing things has ended early");
        Ok(())
    }

    /// Ends them; the last revision of each entry.
    fn stop(self) -> Result<BTreeMap<String, String>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("changing things panicked"))?
    }
}

fn objects(client: kube::Client, group: &str, version: &str, kind: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    Api::namespaced_with(client, NAMESPACE, &resource)
}

/// Gives one entry after the other another revision.
async fn churn(client: kube::Client, shared: &Shared, per_second: u32) -> Result<BTreeMap<String, String>> {
    const REVISION: &str = "service.istio.io/canonical-revision";
    let entries = objects(client, "networking.istio.io", "v1", "WorkloadEntry");
    let mut last = BTreeMap::new();
    for n in 0..ENTRIES {
        let entry: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
            "metadata": { "name": format!("churn-{n}"), "labels": { REVISION: "r0" } },
            "spec": { "address": format!("10.99.0.{n}") },
        }))?;
        entries.create(&PostParams::default(), &entry).await.with_context(|| format!("making entry {n}"))?;
    }
    let mut pace = tokio::time::interval(Duration::from_secs(1) / per_second);
    let mut patches = JoinSet::new();
    for count in 0.. {
        pace.tick().await;
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        // An entry is changed again when its last change is long done: `ENTRIES` are more than `AT_ONCE`.
        let (name, revision) = (format!("churn-{}", count % ENTRIES), format!("r{}", count + 1));
        last.insert(name.clone(), revision.clone());
        let entries = entries.clone();
        patches.spawn(async move {
            let patch = json!({ "metadata": { "labels": { REVISION: revision } } });
            entries.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await
        });
        while patches.len() >= AT_ONCE || (shared.made.load(Ordering::Relaxed) == 0 && !patches.is_empty()) {
            let done = patches.join_next().await.context("one is under way")?;
            done?.context("changing an entry")?;
            shared.made.fetch_add(1, Ordering::Relaxed);
        }
        while let Some(done) = patches.try_join_next() {
            done?.context("changing an entry")?;
            shared.made.fetch_add(1, Ordering::Relaxed);
        }
    }
    while let Some(done) = patches.join_next().await {
        done?.context("changing an entry")?;
    }
    Ok(last)
}

/// Closes the guarded pod and opens it again.
async fn flip(client: kube::Client, shared: &Shared, seconds: u64) -> Result<()> {
    let policies = objects(client, "security.istio.io", "v1", "AuthorizationPolicy");
    let policy: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": POLICY },
        "spec": {
            "selector": { "matchLabels": { "app": "guarded" } },
            "action": "DENY",
            "rules": [{ "from": [{ "source": { "namespaces": [NAMESPACE] } }] }],
        },
    }))?;
    let mut pace = tokio::time::interval(Duration::from_millis(100));
    let mut turned = Instant::now();
    let mut closed = false;
    while !shared.stop.load(Ordering::Relaxed) {
        pace.tick().await;
        if turned.elapsed() < Duration::from_secs(seconds) {
            continue;
        }
        turned = Instant::now();
        if closed {
            policies.delete(POLICY, &DeleteParams::default()).await.context("opening the guarded pod")?;
        } else {
            policies.create(&PostParams::default(), &policy).await.context("closing the guarded pod")?;
        }
        closed = !closed;
        shared.flips.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_from_noise() {
        let samples = |per_second: f64| -> Vec<(f64, f64)> {
            (0..100)
                .map(|n| (f64::from(n) * 5.0, 9000.0 + f64::from(n) * 5.0 * per_second + f64::from(n % 7) * 40.0))
                .collect()
        };
        assert!(slope(&samples(0.0)).abs() < 0.2, "{}", slope(&samples(0.0)));
        let grown = slope(&samples(2.0));
        assert!((1.0..1.4).contains(&grown), "1200 KiB in ten minutes are {grown} MiB");
        assert!(growth(&samples(2.0)) > 400.0 && growth(&samples(0.0)) < 50.0);
        assert_eq!((slope(&[]), growth(&[(1.0, 1.0)])), (0.0, 0.0));
    }

    #[test]
    fn the_warm_up_is_left_out() {
        let samples: Vec<(f64, f64)> = (0..120).map(|n| (f64::from(n) * 5.0, 1.0)).collect();
        assert_eq!(settled(&samples, 600)[0].0, 300.0);
        assert_eq!(settled(&samples, 40)[0].0, 20.0);
        assert!(settled(&samples[..2], 600).is_empty());
    }
}
