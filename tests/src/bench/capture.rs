//! The suite `capture`: what the way into a proxy costs, without a proxy. Plain loopback, our programs, and what iptables does.
//!
//! Every contestant has a pod of its own in one lab; a sink in the pod takes the connections. Plain dials the sink over loopback; the
//! others dial an address that nobody has, and get to the sink.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::interrupt::Interrupt;
use super::report::{Better, Budget, Machine, Report, Round, Row};
use super::sink::{FOREIGN, FOREIGN_PORT, PORT, READY, Timed};
use super::usage::Sample;
use super::{Options, report};
use crate::container::Security;
use crate::places::Places;
use crate::raw::{Lab, Pod, Process};
use crate::sys;

const PLAIN: &str = "plain";
const OURS: &str = "ours";
const REDIRECT: &str = "redirect";
/// Plain once more, in another pod: what differs between it and plain is what this machine cannot tell apart.
const AGAIN: &str = "plain2";
/// Contestants take turns this often in each round: what disturbs for a second then disturbs all alike.
const TURNS: u32 = 10;
/// Beyond its own time a client may take this long.
const OVERTIME: Duration = Duration::from_secs(20);

/// Name, which way is better, and how it is read off.
type Metric = (&'static str, Better, fn(&Timed) -> f64);

/// One way of using a contestant: name, deed, bytes, and what is read from the result.
struct Test {
    name: &'static str,
    deed: &'static str,
    size: usize,
    metrics: &'static [Metric],
}

const TESTS: &[Test] = &[
    Test {
        name: "connect",
        deed: "connect",
        size: 64,
        metrics: &[("p50_us", Better::Lower, |t| t.p50_us), ("p10_us", Better::Lower, |t| t.p10_us)],
    },
    Test { name: "ping_64b", deed: "ping", size: 64, metrics: &[("p50_us", Better::Lower, |t| t.p50_us)] },
    Test {
        name: "write_64k",
        deed: "push",
        size: 64 << 10,
        metrics: &[("gbit_per_s", Better::Higher, |t| t.gbit_per_s)],
    },
    Test {
        name: "write_1k",
        deed: "push",
        size: 1 << 10,
        metrics: &[("gbit_per_s", Better::Higher, |t| t.gbit_per_s)],
    },
];

/// What is asked of ours: test, metric, against whom, must, aim. That bytes cost nothing means: no more than runs differ by.
const BUDGETS: &[(&str, &str, &str, f64, f64)] = &[
    ("connect", "p50_us", PLAIN, 1.15, 1.1),
    ("ping_64b", "p50_us", PLAIN, 1.05, 1.02),
    ("write_64k", "gbit_per_s", PLAIN, 0.95, 0.98),
    ("write_1k", "gbit_per_s", PLAIN, 0.95, 0.98),
    ("connect", "p50_us", REDIRECT, 1.0, 0.9),
    ("ping_64b", "p50_us", REDIRECT, 1.0, 0.95),
    ("write_64k", "gbit_per_s", REDIRECT, 1.0, 1.2),
    ("write_1k", "gbit_per_s", REDIRECT, 1.0, 1.2),
];

/// A contestant: its pod, and the sink in it.
struct Contestant {
    name: &'static str,
    pod: Pod,
    to: SocketAddr,
    _sink: Process,
}

/// Runs the suite.
///
/// # Errors
/// When a contestant does not come up; when a run failed.
pub fn run(options: &Options) -> Result<()> {
    ensure!(options.peer.is_empty(), "the suite capture has its contestants: --peer is not for it");
    let known = TESTS.iter().map(|test| test.name).collect::<Vec<_>>();
    if let Some(unknown) = options.only.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no such test: {unknown}; there are: {}", known.join(" "));
    }
    let [dialling, sinking] = options.cpus[..] else { bail!("--cpus: one for the client and one for the sink") };
    let started = OffsetDateTime::now_utc().replace_nanosecond(0)?.format(&Rfc3339)?;
    let places = Places::find()?;
    let interrupt = Interrupt::install()?;
    let lab = Lab::up("bench-capture")?;
    let contestants =
        [plain(&lab, PLAIN, sinking)?, ours(&lab, sinking)?, redirect(&lab, sinking)?, plain(&lab, AGAIN, sinking)?];
    println!("client on core {dialling}, sink on core {sinking}; rounds of {} s in {TURNS} turns", options.secs);
    let secs = options.secs / f64::from(TURNS);
    let mut rows = Vec::new();
    for test in TESTS.iter().filter(|test| options.only.is_empty() || options.only.iter().any(|o| o == test.name)) {
        let mut rounds: Vec<(bool, BTreeMap<&str, Timed>)> = Vec::new();
        for round in 0..(options.rounds * TURNS) as usize {
            let mut calm = true;
            let mut figures = BTreeMap::new();
            for turn in 0..contestants.len() {
                let contestant = &contestants[(turn + round) % contestants.len()];
                let before = Sample::take(&lab.record.cgroup, &[])?;
                let timed = contestant.time(test, secs, dialling, &interrupt)?;
                calm &= Sample::take(&lab.record.cgroup, &[])?.since(&before).calm();
                figures.insert(contestant.name, timed);
            }
            rounds.push((calm, figures));
        }
        rows.extend(rows_of(test, &rounds));
    }
    drop(contestants);
    drop(lab);
    let machine = Machine::here(options.cpus.len())?;
    let commit = report::commit(&places.workspace);
    let report = Report { suite: "capture", commit, machine, started, rounds: options.rounds, rows };
    let out = options.out.clone().unwrap_or_else(|| places.target.join("bench/capture.json"));
    report.write(&out)?;
    print!("{}", report.table());
    println!("written to {}", out.display());
    Ok(())
}

/// A row for each metric, and one more for each further budget of it.
fn rows_of(test: &Test, rounds: &[(bool, BTreeMap<&str, Timed>)]) -> Vec<Row> {
    let mut rows = Vec::new();
    for (metric, better, read) in test.metrics {
        let rounds: Vec<Round> = rounds
            .iter()
            .map(|(calm, figures)| Round {
                calm: *calm,
                values: figures.iter().map(|(name, timed)| ((*name).to_owned(), read(timed))).collect(),
            })
            .collect();
        let budgets = BUDGETS.iter().filter(|(t, m, ..)| (t, m) == (&test.name, metric));
        let budgets =
            budgets.map(|(.., against, must, aim)| Budget { against: (*against).to_owned(), must: *must, aim: *aim });
        let mut budgets: Vec<Option<Budget>> = budgets.map(Some).collect();
        if budgets.is_empty() {
            budgets.push(None);
        }
        rows.extend(budgets.into_iter().map(|budget| Row::new(test.name, metric, *better, &rounds, budget)));
    }
    rows
}

fn plain(lab: &Lab, name: &'static str, cpu: usize) -> Result<Contestant> {
    contestant(lab, name, SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)), &["direct", "--cpu", &cpu.to_string()], |_| {
        Ok(())
    })
}

/// Our programs and maps; rules and routes as a ztunnel sets them (`ztunnel/src/node/routing.rs`).
fn ours(lab: &Lab, cpu: usize) -> Result<Contestant> {
    let node = lab.node("node-a");
    let (cgroup, bpffs) = (node.cgroup.display().to_string(), node.bpffs.display().to_string());
    let cpu = cpu.to_string();
    let arguments = ["ours", "--cpu", &cpu, "--cgroup", &cgroup, "--bpffs", &bpffs];
    contestant(lab, OURS, foreign(), &arguments, |pod| {
        sys::ip_batch(
            Some(&pod.net.netns.name),
            &format!(
                "rule add pref 100 fwmark 0x53a/0xfffffffe ipproto tcp lookup 15000\n\
                 route add local default dev lo src {} table 15000\n",
                pod.net.ipv4
            ),
        )
    })
}

fn redirect(lab: &Lab, cpu: usize) -> Result<Contestant> {
    contestant(lab, REDIRECT, foreign(), &["direct", "--cpu", &cpu.to_string()], |pod| {
        let rule = "-t nat -A OUTPUT -p tcp ! -d 127.0.0.0/8 -j REDIRECT --to-ports";
        let mut command = sys::command("ip");
        command
            .args(["netns", "exec", &pod.net.netns.name, "iptables-nft"])
            .args(rule.split(' '))
            .arg(PORT.to_string());
        sys::check(&mut command).map(drop)
    })
}

fn foreign() -> SocketAddr {
    SocketAddr::from((FOREIGN, FOREIGN_PORT))
}

fn contestant(
    lab: &Lab,
    name: &'static str,
    to: SocketAddr,
    arguments: &[&str],
    prepare: impl FnOnce(&Pod) -> Result<()>,
) -> Result<Contestant> {
    let pod = lab.node("node-a").add_pod(name)?;
    prepare(&pod).with_context(|| format!("preparing {name}"))?;
    let program = std::env::current_exe()?.display().to_string();
    let address = pod.net.ipv4.to_string();
    let argv = [&[program.as_str(), "sink"][..], arguments, &["--pod", &address]].concat();
    // It stands for the node's proxy: loading programs needs rights.
    let mut sink = pod.spawn_as(&format!("sink-{name}"), &argv, &[], Security::privileged())?;
    sink.wait_output(READY, Duration::from_secs(10))?;
    Ok(Contestant { name, pod, to, _sink: sink })
}

impl Contestant {
    fn time(&self, test: &Test, secs: f64, cpu: usize, interrupt: &Interrupt) -> Result<Timed> {
        let program = std::env::current_exe()?.display().to_string();
        let (to, cpu, size, time) = (self.to.to_string(), cpu.to_string(), test.size.to_string(), secs.to_string());
        let argv = [program.as_str(), "dial", test.deed, "--to", &to, "--cpu", &cpu, "--size", &size, "--secs", &time];
        let mut client = self.pod.spawn(&format!("dial-{}", self.name), &argv, &[])?;
        let deadline = Duration::from_secs_f64(secs) + OVERTIME;
        interrupt.until("a client to end", deadline, || Ok((!client.running()).then_some(())))?;
        let said = client.output();
        ensure!(client.wait(Duration::ZERO)?.success(), "{} {}: {}", self.name, test.name, said.trim());
        let line = said.lines().last().context("the client said nothing")?;
        serde_json::from_str(line).with_context(|| format!("the client said {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_name_metrics_that_exist() {
        for (test, metric, ..) in BUDGETS {
            let test = TESTS.iter().find(|t| t.name == *test).expect("a budget's test exists");
            assert!(test.metrics.iter().any(|(name, ..)| name == metric), "{metric}");
        }
    }

    #[test]
    fn a_metric_with_two_budgets_has_two_rows() {
        let timed = |p50_us| Timed { p50_us, ..Timed::default() };
        let figures = BTreeMap::from([(PLAIN, timed(10.0)), (OURS, timed(11.0)), (REDIRECT, timed(14.0))]);
        let rows = rows_of(&TESTS[0], &[(true, figures)]);
        let against: Vec<_> =
            rows.iter().map(|row| row.budget.as_ref().map(|budget| budget.against.as_str())).collect();
        assert_eq!(against, [Some(PLAIN), Some(REDIRECT), None]);
        assert!(rows[0].verdict() == Some(report::Verdict::Aim) && rows[1].verdict() == Some(report::Verdict::Aim));
    }
}
