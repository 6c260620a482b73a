//! The suite `scale`: the control plane under a fleet. The istiod-lite that is built runs as a process of its own; its API server and
//! its node proxies are played by this process, over real connections.
//!
//! - [`cluster`] is what the API holds, and which pod is replaced next
//! - [`api`] serves it: lists, watches, token reviews
//! - [`fleet`] is the node proxies
//! - [`ledger`] knows when which change was written and heard
//! - [`plane`] is the control plane, and what it takes
//! - [`stage`] puts them on one node of a lab and does the measuring
//!
//! Each size begins with a control plane of its own. What is small comes first: what a change costs in a large cluster is compared
//! with what it costs there, as it should follow the number of proxies and not that of pods.

pub mod api;
pub mod cluster;
pub mod fleet;
pub mod ledger;
pub mod plane;
pub mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use self::cluster::Size;
use self::stage::{Figures, Scene, Storm};
use super::interrupt::Interrupt;
use super::report::{self, Better, Budget, Machine, Report, Round, Row};
use crate::places::Places;

/// The size that others are compared with, and that is asked for by itself.
const SMALL: u32 = 1_000;
/// Its proxies, where its memory is looked at: one for each hundred pods.
const FEW: u32 = 10;
/// `--full`.
const FULL: [u32; 3] = [SMALL, 10_000, 100_000];
const FULL_ZTUNNELS: u32 = 1_000;
/// Resources that a storm is about: proxies that come back, times pods.
const STORM_RESOURCES: u32 = 10_000_000;

/// A limit: what must hold, what we aim for.
type Limit = (f64, f64);

/// MiB at [`SMALL`], with [`FEW`] proxies.
const RSS_SMALL_LIMIT: Limit = (40.0, 20.0);
/// MiB, and a KiB for each pod.
const RSS_LIMIT: f64 = 64.0;
/// KiB beside that for each connection: TLS records and HTTP/2 frames on their way, of either direction.
const CONNECTION_LIMIT: f64 = 64.0;
/// Seconds until everybody is back.
const STORM_LIMIT: Limit = (30.0, 10.0);
/// Milliseconds that a change may take to those who stayed, meanwhile: who is not starved hears within a second.
const STARVED_LIMIT: Limit = (1000.0, 300.0);
/// What a change costs ÷ what it costs at [`SMALL`], with the same proxies.
const GROWTH_LIMIT: Limit = (2.0, 1.25);

/// Arguments of `scale`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Node proxies, each with a stream
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(2..=5_000))]
    pub ztunnels: u32,
    /// Pods, beside those of the proxies
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=200_000))]
    pub pods: u32,
    /// Services, which the pods are shared out to
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub services: u32,
    /// Pods that are replaced by others in a second
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub churn: u32,
    /// How often the churn is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Seconds of each time
    #[arg(long, default_value_t = 10.0, value_parser = super::seconds)]
    pub secs: f64,
    /// What is planned for: 1,000 ztunnels, and 1,000, 10,000 and 100,000 pods with a tenth of it as services. Takes a while
    #[arg(long, conflicts_with_all = ["ztunnels", "pods", "services"])]
    pub full: bool,
    /// Only these tests, without the size; what they need before is done all the same
    #[arg(long, value_delimiter = ',', value_name = "TEST,...")]
    pub only: Vec<String>,
    /// The control plane is ended when it takes more than this, in MiB [default: half of what the machine has left]
    #[arg(long)]
    pub memory: Option<u64>,
    /// Where the JSON goes [default: target/bench/scale.json]
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// What can be asked for.
const TESTS: &[&str] = &[
    "ready",
    "rss_idle",
    "rss_few",
    "rss",
    "rss_per_proxy",
    "push_p50",
    "push_p99",
    "converge_p99",
    "push_interval",
    "cpu_per_change",
    "cpu_growth",
    "cpu",
    "fleet_cpu",
    RETURNING,
    "push_p99_storm",
    "rss_peak_storm",
    ARRIVING,
    "push_p99_cold_storm",
    "rss_peak_cold_storm",
];
/// Proxies come back and tell what they hold.
const RETURNING: &str = "reconnect_storm";
/// Proxies come and hold nothing.
const ARRIVING: &str = "cold_storm";

/// Runs the suite.
///
/// # Errors
/// When a control plane does not come up or says something wrong; at the end, after the results are written, when a part of it failed.
pub fn run(options: &Options) -> Result<()> {
    let unknown: Vec<&str> = options.only.iter().map(String::as_str).filter(|name| !TESTS.contains(name)).collect();
    ensure!(unknown.is_empty(), "no such test: {}; there are: {}", unknown.join(", "), TESTS.join(" "));
    let wanted = |test: &str| options.only.is_empty() || options.only.iter().any(|only| only == test);
    let started = OffsetDateTime::now_utc().replace_nanosecond(0)?.format(&Rfc3339)?;
    let places = Places::find()?;
    let interrupt = Interrupt::install()?;
    let most_mib = match options.memory {
        Some(mib) => mib,
        None => available_mib(&fs::read_to_string("/proc/meminfo")?)? / 2,
    };
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    let mut small: Option<f64> = None;
    for size in sizes(options) {
        let label = label(size.pods);
        println!("{label}: {} pods, {} services, {} node proxies", size.pods, size.services, size.nodes);
        let storms = size.pods > SMALL || options.pods <= SMALL;
        let scene = Scene {
            size,
            few: if size.pods == SMALL { FEW.min(size.nodes) } else { 0 },
            churn: options.churn.min(size.pods / 10),
            rounds: options.rounds,
            secs: options.secs,
            returning: if storms && wanted_any(&wanted, RETURNING, "storm") { storm(size) } else { 0 },
            arriving: if storms && wanted_any(&wanted, ARRIVING, "cold_storm") { storm(size) } else { 0 },
            most_mib,
        };
        let (figures, failed) =
            stage::measure(&places, "bench-scale", &scene, &interrupt, &|said| println!("  {said}"))?;
        interrupt.check()?;
        failures.extend(failed.map(|error| format!("{label}: {error:#}")));
        rows.extend(self::rows(&scene, &figures, small));
        if size.pods == SMALL {
            small = cpu_per_change(&figures);
        }
    }
    rows.retain(|row| row.test.split_once('@').is_some_and(|(test, _)| wanted(test)));
    let machine = Machine::here(std::thread::available_parallelism()?.get())?;
    let commit = report::commit(&places.workspace);
    let report = Report { suite: "scale", commit, machine, started, rounds: options.rounds, rows };
    let out = options.out.clone().unwrap_or_else(|| places.target.join("bench/scale.json"));
    report.write(&out)?;
    print!("{}", report.table());
    println!("written to {}", out.display());
    if !failures.is_empty() {
        bail!("what failed:\n  {}", failures.join("\n  "));
    }
    Ok(())
}

fn wanted_any(wanted: &impl Fn(&str) -> bool, test: &str, kind: &str) -> bool {
    wanted(test) || wanted(&format!("push_p99_{kind}")) || wanted(&format!("rss_peak_{kind}"))
}

/// In the order in which they are measured.
fn sizes(options: &Options) -> Vec<Size> {
    let shrunk = |pods: u32| Size {
        pods,
        services: (u64::from(options.services) * u64::from(pods) / u64::from(options.pods)).max(1) as u32,
        nodes: options.ztunnels,
    };
    if options.full {
        return FULL.map(|pods| Size { pods, services: pods / 10, nodes: FULL_ZTUNNELS }).into();
    }
    let mut sizes = vec![shrunk(options.pods)];
    if options.pods > SMALL {
        sizes.insert(0, shrunk(SMALL));
    }
    sizes
}

/// How many of the proxies come back at once. A few stay, to hear what happens to the others' changes meanwhile.
fn storm(size: Size) -> u32 {
    let stay = size.nodes.div_ceil(50).min(8);
    (STORM_RESOURCES / size.pods).clamp(1, size.nodes - stay)
}

fn label(pods: u32) -> String {
    if pods >= 1000 && pods.is_multiple_of(1000) { format!("{}k", pods / 1000) } else { pods.to_string() }
}

fn available_mib(meminfo: &str) -> Result<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    let kib: u64 = line.split_whitespace().next().context("MemAvailable has no value")?.parse()?;
    Ok(kib / 1024)
}

/// Microseconds, over the rounds.
fn cpu_per_change(figures: &Figures) -> Option<f64> {
    let changes: usize = figures.rounds.iter().map(|round| round.heard.changes).sum();
    let spent: f64 = figures.rounds.iter().map(|round| round.cpu_s).sum();
    (changes > 0).then(|| spent * 1e6 / changes as f64)
}

/// All figures of one size. What was to be measured and failed has none, and misses its budget.
fn rows(scene: &Scene, figures: &Figures, small: Option<f64>) -> Vec<Row> {
    let label = label(scene.size.pods);
    let row = |test: &str, metric, rounds: &[(bool, Option<f64>)], limit: Option<Limit>| {
        let budget = limit.map(|(must, aim)| Budget { against: "absolute".to_owned(), must, aim });
        let rounds: Vec<Round> = rounds
            .iter()
            .map(|(calm, value)| {
                let values: BTreeMap<String, f64> = value.map(|value| ("ours".to_owned(), value)).into_iter().collect();
                Round { calm: *calm, values }
            })
            .collect();
        Row::new(&format!("{test}@{label}"), metric, Better::Lower, &rounds, budget)
    };
    let once = |value: Option<f64>| [(true, value)];
    let rss_limit = f64::from(scene.size.pods) / 1024.0 + RSS_LIMIT;
    let limit = |limit: f64| Some((limit, limit / 2.0));
    let connections = f64::from(scene.size.nodes) * CONNECTION_LIMIT / 1024.0;
    let per_proxy = figures.rss_mib.zip(figures.rss_idle_mib).map(|(rss, idle)| (rss - idle).max(0.0) * 1024.0);
    let mut rows = vec![
        row("ready", "s", &once(figures.ready_s), None),
        row("rss_idle", "mib", &once(figures.rss_idle_mib), limit(rss_limit)),
    ];
    if scene.few > 0 {
        rows.push(row("rss_few", "mib", &once(figures.rss_few_mib), Some(RSS_SMALL_LIMIT)));
    }
    rows.push(row("rss", "mib", &once(figures.rss_mib), limit(rss_limit + connections)));
    rows.push(row("rss_per_proxy", "kib", &once(per_proxy.map(|kib| kib / f64::from(scene.size.nodes))), None));
    let each = |of: &dyn Fn(&stage::Round) -> f64| -> Vec<(bool, Option<f64>)> {
        match figures.rounds.is_empty() {
            true => vec![(true, None)],
            false => figures.rounds.iter().map(|round| (round.calm, Some(of(round)))).collect(),
        }
    };
    rows.push(row("push_p50", "ms", &each(&|round| round.heard.p50), None));
    rows.push(row("push_p99", "ms", &each(&|round| round.heard.p99), None));
    rows.push(row("converge_p99", "ms", &each(&|round| round.heard.converge_p99), None));
    rows.push(row("push_interval", "ms", &each(&|round| round.push_interval_ms), None));
    let per_change = |round: &stage::Round| round.cpu_s * 1e6 / round.heard.changes.max(1) as f64;
    rows.push(row("cpu_per_change", "us", &each(&per_change), None));
    if scene.size.pods > SMALL {
        let growth = cpu_per_change(figures).zip(small).map(|(large, small)| large / small);
        rows.push(row("cpu_growth", "over_small", &once(growth), Some(GROWTH_LIMIT)));
    }
    rows.push(row("cpu", "cores", &each(&|round| round.cpu_s / round.seconds), None));
    rows.push(row("fleet_cpu", "cores", &each(&|round| round.fleet_cpu_s / round.seconds), None));
    for (proxies, storm, test, kind) in [
        (scene.returning, &figures.returning, RETURNING, "storm"),
        (scene.arriving, &figures.arriving, ARRIVING, "cold_storm"),
    ] {
        if proxies == 0 {
            continue;
        }
        let of = |value: fn(&Storm) -> f64| once(storm.as_ref().map(value));
        rows.push(row(test, "s", &of(|storm| storm.seconds), Some(STORM_LIMIT)));
        rows.push(row(&format!("push_p99_{kind}"), "ms", &of(|storm| storm.heard.p99), Some(STARVED_LIMIT)));
        rows.push(row(&format!("rss_peak_{kind}"), "mib", &of(|storm| storm.peak_mib), None));
    }
    rows
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::ledger::Summary;
    use super::report::Verdict;
    use super::*;

    #[derive(Parser)]
    struct Suite {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &[&str]) -> Options {
        Suite::try_parse_from([&["scale"], words].concat()).expect("good options").options
    }

    fn scene(size: Size) -> Scene {
        Scene { size, few: 0, churn: 100, rounds: 2, secs: 1.0, returning: 10, arriving: 0, most_mib: 1000 }
    }

    #[test]
    fn the_small_size_comes_first_with_as_many_proxies() {
        let small = Size { pods: 1_000, services: 100, nodes: 200 };
        assert_eq!(sizes(&options(&[])), [small, Size { pods: 10_000, services: 1_000, nodes: 200 }]);
        assert_eq!(sizes(&options(&["--pods", "500", "--services", "5"])).len(), 1);
        let full = sizes(&options(&["--full"]));
        assert_eq!(full.iter().map(|size| size.resources()).collect::<Vec<_>>(), [2_100, 12_000, 111_000]);
    }

    #[test]
    fn a_storm_is_about_ten_million_resources_and_leaves_somebody() {
        let of = |pods, nodes| storm(Size { pods, services: 10, nodes });
        assert_eq!([of(100_000, 1000), of(10_000, 1000), of(10_000, 200), of(200, 5)], [100, 992, 196, 4]);
        assert_eq!(of(1_000, 2), 1);
    }

    #[test]
    fn sizes_are_told_shortly() {
        assert_eq!([label(200), label(1_000), label(100_000), label(1_500)], ["200", "1k", "100k", "1500"]);
        assert_eq!(available_mib("MemTotal: 9 kB\nMemAvailable:   2048000 kB\n").unwrap(), 2000);
    }

    #[test]
    fn every_row_can_be_asked_for_and_what_failed_misses_its_budget() {
        let mut scene = scene(Size { pods: 1024, services: 10, nodes: 20 });
        (scene.few, scene.arriving) = (10, 10);
        let rows = rows(&scene, &Figures::default(), Some(1.0));
        let tests: Vec<&str> = rows.iter().filter_map(|row| Some(row.test.split_once('@')?.0)).collect();
        assert_eq!(tests, TESTS);
        let verdicts: Vec<Verdict> = rows.iter().filter_map(Row::verdict).collect();
        assert_eq!(verdicts, vec![Verdict::Missed; 8]);
    }

    #[test]
    fn a_change_is_compared_with_what_it_costs_in_a_small_cluster() {
        let heard = Summary { changes: 1000, ..Summary::default() };
        let round = |cpu_s| stage::Round { heard, cpu_s, seconds: 10.0, calm: true, ..stage::Round::default() };
        let figures = Figures { rounds: vec![round(1.0), round(2.0)], rss_mib: Some(90.0), ..Figures::default() };
        assert_eq!(cpu_per_change(&figures), Some(1500.0));
        let rows = rows(&scene(Size { pods: 102_400, services: 10, nodes: 20 }), &figures, Some(1000.0));
        let row = |test: &str| rows.iter().find(|row| row.test == test).expect(test);
        let growth = row("cpu_growth@102400");
        assert_eq!((growth.ours, growth.verdict()), (Some(1.5), Some(Verdict::Holds)));
        let rss = row("rss@102400");
        assert_eq!(
            (rss.budget.as_ref().map(|budget| budget.must), rss.verdict()),
            (Some(165.25), Some(Verdict::Holds))
        );
        assert_eq!(row("cpu@102400").ours, Some(0.15));
    }
}
