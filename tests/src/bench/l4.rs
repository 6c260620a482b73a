//! The suite `l4`: bytes, pings, short connections and HTTP between two pods, and what the proxies need for them.
//!
//! Clients, servers and proxies share the same stated cores, as they do on a full node. `proxy_cpu_*` and `context_switches` are those of all
//! proxies on the way together, divided by the operations (or gigabytes, 10^9 bytes of payload) of the whole run, warm-up included.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::arena::{Arena, Mesh, Target};
use super::interrupt::Interrupt;
use super::load::{OPEN, Outcome};
use super::report::{Better, Budget, Machine, Report, Round, Row};
use super::usage::Spent;
use super::{Options, proof, report, usage, workloads};
use crate::places::Places;

/// What is counted in a test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Bytes,
    RoundTrips,
    Connections,
    Requests,
}

/// One way of loading a contestant.
struct Test {
    name: &'static str,
    kind: &'static str,
    unit: Unit,
    target: Target,
    connections: u32,
    /// Bytes of a message.
    size: u32,
}

const fn test(name: &'static str, kind: &'static str, unit: Unit, target: Target, connections: u32, size: u32) -> Test {
    Test { name, kind, unit, target, connections, size }
}

const TESTS: &[Test] = &[
    test("throughput_1", "push", Unit::Bytes, Target::OtherNode, 1, 1),
    test("throughput_8", "push", Unit::Bytes, Target::OtherNode, 8, 1),
    test("throughput_1_reverse", "pull", Unit::Bytes, Target::OtherNode, 1, 1),
    test("ping_1b", "ping", Unit::RoundTrips, Target::OtherNode, 1, 1),
    test("ping_1k", "ping", Unit::RoundTrips, Target::OtherNode, 1, 1024),
    test("crr_1", "connect", Unit::Connections, Target::OtherNode, 1, 64),
    test("crr_32", "connect", Unit::Connections, Target::OtherNode, 32, 64),
    test("http_1", "http", Unit::Requests, Target::OtherNode, 1, 1),
    test("http_32", "http", Unit::Requests, Target::OtherNode, 32, 1),
    test("http_256", "http", Unit::Requests, Target::OtherNode, 256, 1),
    test("same_throughput_1", "push", Unit::Bytes, Target::SameNode, 1, 1),
    test("same_ping_1b", "ping", Unit::RoundTrips, Target::SameNode, 1, 1),
    test("same_crr_1", "connect", Unit::Connections, Target::SameNode, 1, 64),
    test("same_http_32", "http", Unit::Requests, Target::SameNode, 32, 1),
];

const RSS_IDLE: &str = "rss_idle";
const RSS_PER_CONNECTION: &str = "rss_per_idle_connection";
/// Workloads that a ztunnel is told of, and the rows about it: at rest, peak ÷ rest, seconds until it is ready.
const SCALES: &[(usize, &str, &str, &str)] = &[
    (3, "rss_3", "rss_peak_3", "ready_3"),
    (10_000, "rss_10k", "rss_peak_10k", "ready_10k"),
    (100_000, "rss_100k", "rss_peak_100k", "ready_100k"),
];
/// Idle connections that are there before, so that what comes once (pools, caches) is not shared out.
const IDLE_BEFORE: u32 = 100;
const IDLE: u32 = 2000;
/// Longest that they are held, should nobody end them.
const IDLE_SECONDS: f64 = 60.0;
/// The peer that budgets are taken against, if it is there.
const REFERENCE: &str = "ztunnel";

/// A limit: what must hold, what we aim for.
type Limit = (f64, f64);

/// What is asked of ours: by test and metric, ÷ the reference peer, else ÷ plain.
const BUDGETS: &[(&str, &str, Option<Limit>, Option<Limit>)] = &[
    ("throughput_1", "gbit_per_s", Some((1.4, 1.8)), Some((0.38, 0.5))),
    ("throughput_8", "gbit_per_s", Some((1.4, 1.8)), Some((0.42, 0.54))),
    ("throughput_1", "proxy_cpu_s_per_gb", Some((0.7, 0.5)), None),
    ("throughput_8", "proxy_cpu_s_per_gb", Some((0.7, 0.5)), None),
    ("ping_1b", "p50_us", Some((0.8, 0.6)), Some((1.7, 1.4))),
    ("ping_1k", "p50_us", Some((0.8, 0.6)), Some((1.7, 1.4))),
    ("ping_1b", "proxy_cpu_us_per_op", Some((0.8, 0.6)), None),
    ("ping_1k", "proxy_cpu_us_per_op", Some((0.8, 0.6)), None),
    ("crr_1", "connections_per_s", Some((1.7, 2.5)), Some((0.28, 0.42))),
    ("crr_32", "connections_per_s", Some((1.7, 2.5)), Some((0.45, 0.65))),
    ("http_32", "requests_per_s", Some((1.4, 1.8)), Some((0.47, 0.6))),
    ("http_256", "requests_per_s", Some((1.4, 1.8)), Some((0.38, 0.5))),
    ("same_throughput_1", "gbit_per_s", Some((2.5, 4.0)), Some((0.52, 0.8))),
    ("same_http_32", "requests_per_s", Some((1.6, 2.5)), Some((0.32, 0.5))),
];
/// MiB with three workloads.
const RSS_IDLE_LIMIT: Limit = (12.0, 8.0);
/// MiB with a hundred thousand, its peak ÷ that, and seconds.
const RSS_100K_LIMIT: Limit = (90.0, 60.0);
const PEAK_LIMIT: Limit = (1.3, 1.15);
const READY_100K_LIMIT: Limit = (0.6, 0.3);
/// KiB in each proxy.
const RSS_PER_CONNECTION_LIMIT: Limit = (4.0, 2.5);

/// Figures of one run by metric.
type Figures = Vec<(&'static str, Better, f64)>;
/// Rounds by metric, in the order of the table.
type Metrics = Vec<(&'static str, Better, Vec<Round>)>;

/// Runs the suite.
///
/// # Errors
/// When a contestant does not come up or is not correct; at the end, after the results are written, when a run failed.
pub fn run(options: &Options) -> Result<()> {
    let wanted = Wanted::new(&options.only)?;
    let started = OffsetDateTime::now_utc().replace_nanosecond(0)?.format(&Rfc3339)?;
    let places = Places::find()?;
    let interrupt = Interrupt::install()?;
    pin(&options.cpus)?;
    println!("clients, servers and proxies share cores {:?}; TCP uses reno everywhere", options.cpus);
    let mut failures = Vec::new();
    let scales = scales(&wanted, &places, &interrupt, &mut failures)?;
    if !scales.is_empty() && wanted.only_scales() {
        return finish(options, &places, started, scales, &failures);
    }
    let mut arenas = bring_up(options, &places, &interrupt)?;
    // Memory first: later the allocator holds what was used before.
    let mut memory = Vec::new();
    if wanted.has(RSS_IDLE) {
        workloads::rest(&interrupt)?;
        memory.push(rss_idle(&arenas)?);
    }
    for arena in &mut arenas {
        let sentence = proof::prove(arena).with_context(|| format!("{} is not correct", arena.name))?;
        println!("{}: {sentence}", arena.name);
    }
    if wanted.has(RSS_PER_CONNECTION) {
        memory.push(rss_per_connection(&mut arenas, &interrupt, &mut failures)?);
    }
    let reference = options.peer.iter().any(|(name, _)| name == REFERENCE);
    let mut rows = Vec::new();
    let tests: Vec<&Test> = TESTS.iter().filter(|test| wanted.has(test.name)).collect();
    for (test, metrics) in tests.iter().zip(rounds(&tests, &mut arenas, options, &interrupt, &mut failures)?) {
        for (metric, better, rounds) in metrics {
            rows.push(Row::new(test.name, metric, better, &rounds, budget(test.name, metric, reference)));
        }
    }
    rows.extend(memory);
    rows.extend(scales);
    drop(arenas);
    finish(options, &places, started, rows, &failures)
}

fn finish(options: &Options, places: &Places, started: String, rows: Vec<Row>, failures: &[String]) -> Result<()> {
    let machine = Machine::here(options.cpus.len())?;
    let commit = report::commit(&places.workspace);
    let report = Report { suite: "l4", commit, machine, started, rounds: options.rounds, rows };
    let out = options.out.clone().unwrap_or_else(|| places.target.join("bench/l4.json"));
    report.write(&out)?;
    print!("{}", report.table());
    println!("written to {}", out.display());
    if !failures.is_empty() {
        bail!("runs without a figure:\n  {}", failures.join("\n  "));
    }
    Ok(())
}

/// Which tests were asked for.
struct Wanted<'a>(&'a [String]);

impl<'a> Wanted<'a> {
    fn new(only: &'a [String]) -> Result<Self> {
        let known: Vec<&str> =
            TESTS.iter().map(|test| test.name).chain([RSS_IDLE, RSS_PER_CONNECTION]).chain(names_of_scales()).collect();
        let unknown: Vec<&str> = only.iter().map(String::as_str).filter(|name| !known.contains(name)).collect();
        ensure!(unknown.is_empty(), "no such test: {}; there are: {}", unknown.join(", "), known.join(" "));
        Ok(Self(only))
    }

    fn only_scales(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|wanted| names_of_scales().any(|name| name == wanted))
    }

    fn has(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|wanted| wanted == name)
    }
}

/// Pins this process, and with it all that it starts.
fn pin(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu).with_context(|| format!("--cpus {cpu}"))?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("--cpus {cpus:?}: no such cores here"))
}

fn bring_up(options: &Options, places: &Places, interrupt: &Interrupt) -> Result<Vec<Arena>> {
    let ztunnel = places.binaries.join("ztunnel");
    ensure!(ztunnel.exists(), "{} is missing: run `cargo xtask bench`", ztunnel.display());
    let mut arenas =
        vec![Arena::up("plain", Mesh::Plain, interrupt)?, Arena::up("ours", Mesh::Ours(ztunnel), interrupt)?];
    if options.relay {
        arenas.push(Arena::up("relay", Mesh::Relay { tls: false }, interrupt)?);
        arenas.push(Arena::up("tlsrelay", Mesh::Relay { tls: true }, interrupt)?);
    }
    for (name, command) in &options.peer {
        arenas.push(Arena::up(name, Mesh::Peer(command.clone()), interrupt)?);
    }
    Ok(arenas)
}

fn budget(test: &str, metric: &str, reference: bool) -> Option<Budget> {
    let (_, _, peer, plain) = BUDGETS.iter().find(|(t, m, ..)| (*t, *m) == (test, metric))?;
    let (against, (must, aim)) = match (peer.filter(|_| reference), plain) {
        (Some(limit), _) => (REFERENCE, limit),
        (None, Some(limit)) => ("plain", *limit),
        (None, None) => return None,
    };
    Some(Budget { against: against.to_owned(), must, aim })
}

/// All rounds of all tests; contestants take turns within each test and a different one begins each round.
fn rounds(
    tests: &[&Test],
    arenas: &mut [Arena],
    options: &Options,
    interrupt: &Interrupt,
    failures: &mut Vec<String>,
) -> Result<Vec<Metrics>> {
    let mut results: Vec<Metrics> = tests.iter().map(|_| Metrics::new()).collect();
    let bar = ProgressBar::new(u64::from(options.rounds) * (tests.len() * arenas.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}")?);
    let count = arenas.len();
    for round in 0..options.rounds {
        for (test, metrics) in tests.iter().zip(&mut results) {
            let mut calm = true;
            let mut figures: BTreeMap<String, Figures> = BTreeMap::new();
            for turn in 0..count {
                let arena = &mut arenas[(turn + round as usize) % count];
                bar.set_message(format!("round {}: {} {}", round + 1, test.name, arena.name));
                match arena.load(test.kind, test.target, test.connections, test.size, options.secs) {
                    Ok((outcome, spent)) => {
                        calm &= spent.calm();
                        let proxied = !matches!(arena.mesh, Mesh::Plain);
                        figures.insert(arena.name.clone(), test.figures(&outcome, spent, proxied));
                    }
                    Err(error) => {
                        interrupt.check()?;
                        arena.check_proxies()?;
                        failures.push(format!("round {}, {}: {error:#}", round + 1, test.name));
                    }
                }
                bar.inc(1);
            }
            file(metrics, &figures, calm);
        }
    }
    bar.finish_and_clear();
    Ok(results)
}

/// Adds one round's figures to each metric.
fn file(metrics: &mut Metrics, figures: &BTreeMap<String, Figures>, calm: bool) {
    for (metric, better, _) in figures.values().flatten() {
        if !metrics.iter().any(|(known, ..)| known == metric) {
            metrics.push((metric, *better, Vec::new()));
        }
    }
    for (metric, _, rounds) in metrics {
        let value = |figures: &Figures| figures.iter().find(|(name, ..)| name == metric).map(|(_, _, value)| *value);
        let values = figures.iter().filter_map(|(name, figures)| Some((name.clone(), value(figures)?)));
        rounds.push(Round { calm, values: values.collect() });
    }
}

impl Test {
    fn figures(&self, outcome: &Outcome, spent: Spent, proxied: bool) -> Figures {
        let rate = outcome.operations as f64 / outcome.seconds;
        let mut figures = match self.unit {
            Unit::Bytes => {
                vec![("gbit_per_s", Better::Higher, outcome.bytes as f64 * 8.0 / 1e9 / outcome.seconds)]
            }
            Unit::RoundTrips => {
                vec![("p50_us", Better::Lower, outcome.p50_us), ("p99_us", Better::Lower, outcome.p99_us)]
            }
            Unit::Connections => {
                vec![("connections_per_s", Better::Higher, rate), ("p99_us", Better::Lower, outcome.p99_us)]
            }
            Unit::Requests => {
                vec![("requests_per_s", Better::Higher, rate), ("p99_us", Better::Lower, outcome.p99_us)]
            }
        };
        if !proxied {
            return figures;
        }
        let switches = spent.switches as f64;
        if self.unit == Unit::Bytes {
            let gigabytes = outcome.total_bytes as f64 / 1e9;
            figures.push(("proxy_cpu_s_per_gb", Better::Lower, spent.proxies / gigabytes));
            figures.push(("context_switches", Better::Lower, switches / gigabytes));
        } else {
            let operations = outcome.total_operations as f64;
            figures.push(("proxy_cpu_us_per_op", Better::Lower, spent.proxies * 1e6 / operations));
            figures.push(("context_switches", Better::Lower, switches / operations));
        }
        figures
    }
}

/// MiB of the larger of the two proxies, before it has carried anything.
fn rss_idle(arenas: &[Arena]) -> Result<Row> {
    let mut values = BTreeMap::new();
    for (name, cgroups) in arenas.iter().filter_map(|arena| Some((&arena.name, arena.proxy_cgroups()?))) {
        let kib = cgroups.iter().map(|cgroup| usage::resident_kib(cgroup)).collect::<Result<Vec<_>>>()?;
        values.insert(name.clone(), kib.into_iter().max().unwrap_or_default() as f64 / 1024.0);
    }
    Ok(memory_row(RSS_IDLE, "mib", values, RSS_IDLE_LIMIT))
}

fn names_of_scales() -> impl Iterator<Item = &'static str> {
    SCALES.iter().flat_map(|(_, rest, peak, ready)| [*rest, *peak, *ready])
}

/// What our ztunnel needs to know meshes of several sizes, each with one of its own that has carried nothing.
fn scales(wanted: &Wanted<'_>, places: &Places, interrupt: &Interrupt, failures: &mut Vec<String>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (workloads, rest, peak, ready) in SCALES.iter().copied() {
        if ![rest, peak, ready].iter().any(|name| wanted.has(name)) {
            continue;
        }
        let known = match workloads::measure(&places.binaries.join("ztunnel"), workloads, interrupt) {
            Ok(known) => known,
            Err(error) => {
                interrupt.check()?;
                failures.push(format!("{workloads} workloads: {error:#}"));
                continue;
            }
        };
        let (rest_limit, ready_limit) = match workloads {
            3 => (Some(RSS_IDLE_LIMIT), None),
            100_000 => (Some(RSS_100K_LIMIT), Some(READY_100K_LIMIT)),
            _ => (None, None),
        };
        let row = |test, metric, value, limit: Option<Limit>| {
            let budget = limit.map(|(must, aim)| Budget { against: "absolute".to_owned(), must, aim });
            let values = BTreeMap::from([("ours".to_owned(), value)]);
            Row::new(test, metric, Better::Lower, &[Round { calm: true, values }], budget)
        };
        rows.push(row(rest, "mib", known.rest_mib, rest_limit));
        rows.push(row(peak, "over_rest", known.peak_mib / known.rest_mib, Some(PEAK_LIMIT)));
        rows.push(row(ready, "s", known.ready_s, ready_limit));
    }
    Ok(rows)
}

/// What idle connections cost each contestant that has proxies.
fn rss_per_connection(arenas: &mut [Arena], interrupt: &Interrupt, failures: &mut Vec<String>) -> Result<Row> {
    let mut values = BTreeMap::new();
    for arena in arenas.iter_mut().filter(|arena| !matches!(arena.mesh, Mesh::Plain)) {
        match per_connection(arena, interrupt) {
            Ok(kib) => {
                values.insert(arena.name.clone(), kib);
            }
            Err(error) => {
                interrupt.check()?;
                failures.push(format!("{RSS_PER_CONNECTION}, {}: {error:#}", arena.name));
            }
        }
    }
    Ok(memory_row(RSS_PER_CONNECTION, "kib", values, RSS_PER_CONNECTION_LIMIT))
}

/// Memory is looked at once; others on the machine do not change it.
fn memory_row(test: &str, metric: &'static str, values: BTreeMap<String, f64>, (must, aim): Limit) -> Row {
    let budget = Budget { against: "absolute".to_owned(), must, aim };
    Row::new(test, metric, Better::Lower, &[Round { calm: true, values }], Some(budget))
}

/// KiB that one idle connection adds to each of the two proxies it crosses, on average.
fn per_connection(arena: &mut Arena, interrupt: &Interrupt) -> Result<f64> {
    let cgroups = arena.proxy_cgroups().context("there are proxies")?;
    let written = || cgroups.iter().map(|cgroup| usage::written_kib(cgroup)).sum::<Result<u64>>();
    let mut held = Vec::new();
    let mut at = Vec::new();
    for connections in [IDLE_BEFORE, IDLE] {
        let mut load = arena.start_load("hold", Target::OtherNode, connections, 1, IDLE_SECONDS)?;
        interrupt.until("idle connections to open", Duration::from_secs(30), || {
            ensure!(load.running(), "the load has ended: {}", load.output().trim());
            Ok(load.output().contains(OPEN).then_some(()))
        })?;
        at.push(written()?);
        held.push(load);
    }
    let grown = at[1].saturating_sub(at[0]);
    Ok(grown as f64 / f64::from(IDLE) / cgroups.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_name_tests_that_exist_and_aims_go_beyond_musts() {
        for (test, _, peer, plain) in BUDGETS {
            assert!(TESTS.iter().any(|t| t.name == *test), "{test}");
            for (must, aim) in [peer, plain].into_iter().flatten() {
                // Limits above one ask for more where more is better, and the other way round.
                assert!((must - aim).abs() > 1e-9, "{test}");
            }
        }
    }

    #[test]
    fn the_reference_peer_decides_where_it_is_present() {
        let against =
            |reference| budget("throughput_1", "gbit_per_s", reference).map(|budget| (budget.against, budget.must));
        assert_eq!(against(true), Some(("ztunnel".to_owned(), 1.4)));
        assert_eq!(against(false), Some(("plain".to_owned(), 0.38)));
        assert_eq!(budget("throughput_1", "proxy_cpu_s_per_gb", false), None);
    }

    #[test]
    fn an_unknown_test_is_refused_by_name() {
        let only = ["ping_1b".to_owned(), "pong".to_owned()];
        let error = Wanted::new(&only).err().expect("there is no pong").to_string();
        assert!(
            error.contains("pong") && error.contains("throughput_1") && !error.contains("test: ping_1b"),
            "{error}"
        );
    }

    #[test]
    fn proxies_cost_is_shared_over_the_whole_run() {
        let outcome = Outcome { seconds: 2.0, operations: 1000, total_operations: 1250, ..Outcome::default() };
        let spent = Spent { proxies: 0.05, switches: 2500, own: 0.0, others: 0.0 };
        let test = TESTS.iter().find(|test| test.name == "http_32").expect("it exists");
        let figures = test.figures(&outcome, spent, true);
        let value = |name: &str| figures.iter().find(|(metric, ..)| *metric == name).map(|(_, _, value)| *value);
        assert_eq!(value("requests_per_s"), Some(500.0));
        assert_eq!(value("context_switches"), Some(2.0));
        assert!((value("proxy_cpu_us_per_op").expect("measured") - 40.0).abs() < 1e-9);
        assert_eq!(test.figures(&outcome, spent, false).len(), 2);
    }
}
