//! What is done to the mesh while it is under load, and what must hold then.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, ValueEnum};
use nix::sys::signal::Signal;

use super::client::{Amount, Visible};
use super::cluster::{self, Cluster};
use super::stage::{Load, Stage, Ztunnel};
use super::watch::{Seen, Watch};
use super::{Tally, now_ms};
use crate::local::GRACE;
use crate::places::Places;
use crate::raw::NODES;
use crate::topology::Netns;

/// After `kill -9`: refusals end this soon after the restart has begun.
pub const BACK: Duration = Duration::from_secs(1);
/// How many ztunnels of a node drain at a time unless the setting says otherwise (`DRAINING_GENERATIONS`).
const MOST_DRAINING: u32 = 2;
/// How long nobody is there after `kill -9`, so that refusals are there to be seen.
const GAP: Duration = Duration::from_millis(300);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Act {
    /// SIGTERM to each node's ztunnel in turn; the successor starts a moment before or after
    Sigterm,
    /// `kill -9`, and a new one a moment later
    Kill,
    /// The namespace's label is set and taken away, by `kubectl`
    Enrol,
    /// A rollout of the DaemonSet to a binary of another version
    Upgrade,
    /// `kill -9` in a cluster, where the new one has to ask the control plane for everything
    KillPod,
}

/// How often and how long.
#[derive(Args, Clone, Debug)]
pub struct Scale {
    /// New connections per second
    #[arg(long, default_value_t = 240)]
    pub rate: u32,
    /// Long-lived connections
    #[arg(long, default_value_t = 1000)]
    pub long: u32,
    /// Seconds under load
    #[arg(long, default_value_t = 60)]
    pub secs: u64,
    /// How often; what the issue asks for unless said
    #[arg(long)]
    pub times: Option<u32>,
}

/// Arguments of `soak`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// What is done to the mesh; all of it unless said
    pub acts: Vec<Act>,
    #[command(flatten)]
    pub scale: Scale,
}

impl Scale {
    /// What a test can spend.
    pub fn short() -> Self {
        Self { rate: 200, long: 200, secs: 10, times: Some(2) }
    }
}

/// What came of one act.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub act: Act,
    pub times: u32,
    pub tally: Tally,
    pub seen: Seen,
    /// From the beginning of a restart to the last refusal, of each.
    pub back: Vec<Duration>,
}

impl Act {
    fn times(self) -> u32 {
        match self {
            Act::Sigterm | Act::Upgrade => 10,
            Act::Kill | Act::KillPod => 5,
            Act::Enrol => 20,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Act::Sigterm => "sigterm",
            Act::Kill => "kill",
            Act::Enrol => "enrol",
            Act::Upgrade => "upgrade",
            Act::KillPod => "kill-pod",
        }
    }

    fn kills(self) -> bool {
        matches!(self, Act::Kill | Act::KillPod)
    }

    /// Whether connections from before must live on.
    fn keeps_open_ones(self) -> bool {
        matches!(self, Act::Enrol | Act::Upgrade)
    }
}

impl Verdict {
    /// Does it hold? After a kill the last refusal must have come within `back` of the restart.
    ///
    /// # Errors
    /// What does not hold, all of it.
    pub fn check(&self, back: Duration) -> Result<()> {
        let Tally { failed, failures, .. } = &self.tally;
        let mut wrong = Vec::new();
        let mut must = |holds: bool, what: String| {
            if !holds {
                wrong.push(what);
            }
        };
        if self.act.kills() {
            let longest = self.back.iter().max().copied().unwrap_or_default();
            must(longest < back, format!("the last refusal came {longest:?} after a restart had begun"));
            must(*failed > 0, "nothing was refused: was anything killed?".to_owned());
        } else {
            must(
                *failed == 0,
                format!("{failed} new connections failed:\n  {}", Tally::by_kind(failures).join("\n  ")),
            );
        }
        if self.act.keeps_open_ones() {
            let Tally { long_lost, losses, .. } = &self.tally;
            let kinds = Tally::by_kind(losses).join("\n  ");
            must(*long_lost == 0, format!("{long_lost} long-lived connections were lost:\n  {kinds}"));
        }
        must(self.seen.secrets == 0, format!("{} frames can be read", self.seen.secrets));
        // Pods that are not in the mesh, or only now and then, talk directly.
        must(
            self.seen.around == 0 || self.act == Act::Enrol,
            format!("{} attempts to connect past the mesh", self.seen.around),
        );
        must(self.seen.public > 0, "the watcher saw not even what goes in plain text".to_owned());
        ensure!(wrong.is_empty(), "{}: {}", self.act.name(), wrong.join("\n"));
        Ok(())
    }

    /// A line for the reader.
    pub fn line(&self) -> String {
        let t = &self.tally;
        let mut line = format!(
            "{} × {}: {} new connections ({:.0}/s), {} failed, slowest {} ms; {} long-lived, {} lost, {} ended by plan, {} alive, {} \
             heartbeats; {} frames searched, {} readable, {} SYN past the mesh",
            self.act.name(),
            self.times,
            t.opened,
            t.rate(),
            t.failed,
            t.slowest_ms,
            t.long_opened,
            t.long_lost,
            t.long_ended,
            t.long_alive,
            t.heartbeats,
            self.seen.searched,
            self.seen.secrets,
            self.seen.around,
        );
        if let Some(longest) = self.back.iter().max() {
            line += &format!("; refusals ended within {} ms of the restart", longest.as_millis());
        }
        line
    }
}

/// Runs acts one after the other, each on a mesh of its own, and says what came of them.
///
/// # Errors
/// When something does not hold, after all have been run.
pub fn run(options: &Options) -> Result<()> {
    let places = Places::find()?;
    let acts = if options.acts.is_empty() { Act::value_variants() } else { options.acts.as_slice() };
    let mut wrong = Vec::new();
    for act in acts {
        let verdict = play(&places, &format!("soak-{}", act.name()), *act, &options.scale)?;
        println!("{}", verdict.line());
        if let Err(error) = verdict.check(BACK) {
            println!("  does not hold: {error:#}");
            Tally::by_kind(&verdict.tally.losses).iter().for_each(|kind| println!("  lost: {kind}"));
            wrong.push(act.name());
        }
    }
    ensure!(wrong.is_empty(), "does not hold: {}", wrong.join(", "));
    Ok(())
}

/// Plays one act.
///
/// # Errors
/// When the stage or the load breaks; what the load saw is in the verdict.
pub fn play(places: &Places, id: &str, act: Act, scale: &Scale) -> Result<Verdict> {
    let present = |programs: &[&str]| {
        let missing = programs.iter().find(|program| !places.binaries.join(program).exists());
        missing.map_or(Ok(()), |program| Err(anyhow!("{program} is missing: run `cargo xtask build`")))
    };
    present(&["bench", "ztunnel"])?;
    match act {
        Act::Sigterm | Act::Kill => with_files(places, id, act, scale),
        Act::Enrol | Act::Upgrade | Act::KillPod => {
            present(&["istiod-lite", "lab"])?;
            with_cluster(places, id, act, scale)
        }
    }
}

/// On ztunnels that are fed from files.
fn with_files(places: &Places, id: &str, act: Act, scale: &Scale) -> Result<Verdict> {
    let ztunnel = places.binaries.join("ztunnel");
    let mut stage = Stage::up(id, &places.binaries.join("bench"))?;
    stage.start_both(&ztunnel)?;
    let mut load = stage.start_load(Amount::of(scale.rate, scale.long))?;
    let nodes = stage.lab().nodes().iter().map(|node| node.net.netns.clone()).collect::<Vec<_>>();
    let watch = Watch::start(&nodes.iter().collect::<Vec<_>>(), &stage.mesh_addresses())?;
    let times = scale.times.unwrap_or(act.times());
    let pace = Pace::new(Duration::from_secs(scale.secs), times);
    let mut restarts = Vec::new();
    let mut leaving = Vec::new();
    for turn in 0..times {
        load.run_until(pace.at(turn))?;
        let node = NODES[turn as usize % NODES.len()];
        let old = stage.current(node).context("a ztunnel serves each node")?;
        let new = if act == Act::Kill {
            let killed_ms = now_ms();
            let new = kill(&mut stage, node, &ztunnel, old, &mut load)?;
            restarts.push(Restart { killed_ms, started_ms: new.started_ms });
            new
        } else {
            sigterm(&mut stage, node, &ztunnel, old, turn, &mut load, &mut leaving)?
        };
        stage.install(node, new);
    }
    load.run_until(pace.at(times))?;
    let tally = load.stop()?;
    let seen = watch.stop()?;
    for mut old in leaving {
        let ended = old.process.wait(Duration::from_secs(GRACE + 5)).context("a ztunnel that was asked to end")?;
        ensure!(ended.success(), "a ztunnel that was asked to end: {ended}");
    }
    let back = restarts.iter().map(|restart| last_refusal(&tally, *restart, &restarts)).collect();
    Ok(Verdict { act, times, tally, seen, back })
}

/// In a cluster, by `kubectl`.
fn with_cluster(places: &Places, id: &str, act: Act, scale: &Scale) -> Result<Verdict> {
    let mut cluster = Cluster::up(id, places, &cluster::ALL)?;
    let within = if act == Act::Enrol { Visible::May } else { Visible::Never };
    let times = scale.times.unwrap_or(act.times());
    if act == Act::Upgrade && times > MOST_DRAINING {
        // Of ztunnels that drain the oldest ends when there are too many: who upgrades so often says so.
        cluster.let_drain(times)?;
    }
    if act != Act::Enrol {
        cluster.enrol()?;
    }
    let mut load = cluster.start_load(Amount::of(scale.rate, scale.long), within)?;
    let prefix = &cluster.session.record.netns_prefix;
    let nodes = NODES.map(|node| Netns { name: format!("{prefix}{node}") });
    let watch = Watch::start(&nodes.each_ref(), &cluster.mesh_addresses()?)?;
    let pace = Pace::new(Duration::from_secs(scale.secs), times);
    let mut restarts = Vec::new();
    for turn in 0..times {
        load.run_until(pace.at(turn))?;
        match act {
            Act::Enrol => {
                cluster.enrol()?;
                load.run_until((pace.at(turn) + pace.distance / 2).max(Instant::now()))?;
                cluster.unenrol()?;
            }
            Act::Upgrade => {
                cluster.upgrade()?;
            }
            _ => restarts.push(cluster.kill(NODES[turn as usize % NODES.len()])?),
        }
    }
    load.run_until(pace.at(times).max(Instant::now()))?;
    let tally = load.stop()?;
    let seen = watch.stop()?;
    cluster.session.stop()?;
    let back = restarts.iter().map(|restart| last_refusal(&tally, *restart, &restarts)).collect();
    Ok(Verdict { act, times, tally, seen, back })
}

/// A kill and what followed, in milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Restart {
    pub killed_ms: u64,
    pub started_ms: u64,
}

/// Even distances in time, with as much before the first and after the last.
struct Pace {
    begin: Instant,
    distance: Duration,
}

impl Pace {
    fn new(whole: Duration, times: u32) -> Self {
        Self { begin: Instant::now(), distance: whole / (times + 1) }
    }

    /// The moment of a turn.
    fn at(&self, turn: u32) -> Instant {
        self.begin + self.distance * (turn + 1)
    }
}

/// One restart; which of the two comes first, the end or the successor, changes from turn to turn.
fn sigterm(
    stage: &mut Stage,
    node: &'static str,
    program: &Path,
    old: Ztunnel,
    turn: u32,
    load: &mut Load,
    leaving: &mut Vec<Ztunnel>,
) -> Result<Ztunnel> {
    let end_first = (turn as usize / NODES.len()).is_multiple_of(2);
    if end_first {
        old.process.signal(Signal::SIGTERM)?;
        load.run_until(Instant::now() + Duration::from_millis(500))?;
    }
    let mut new = stage.start(node, program)?;
    stage.wait_ready(node, &mut new)?;
    if !end_first {
        old.process.signal(Signal::SIGTERM)?;
    }
    leaving.push(old);
    Ok(new)
}

fn kill(stage: &mut Stage, node: &'static str, program: &Path, mut old: Ztunnel, load: &mut Load) -> Result<Ztunnel> {
    old.process.kill()?;
    load.run_until(Instant::now() + GAP)?;
    let mut new = stage.start(node, program)?;
    stage.wait_ready(node, &mut new)?;
    Ok(new)
}

/// How long after a restart the last connection was begun that failed, before the next kill.
fn last_refusal(tally: &Tally, of: Restart, restarts: &[Restart]) -> Duration {
    let next = restarts.iter().map(|other| other.killed_ms).filter(|at| *at > of.started_ms).min().unwrap_or(u64::MAX);
    // What was begun just before a kill fails with it.
    let before = tally.failures.iter().filter(|failure| failure.failed_ms < next);
    let last = before.map(|failure| failure.begun_ms).filter(|at| *at >= of.started_ms).max();
    Duration::from_millis(last.unwrap_or(of.started_ms) - of.started_ms)
}

#[cfg(test)]
mod tests {
    use super::super::{Failure, Phase};
    use super::*;

    #[test]
    fn refusals_belong_to_the_restart_before_them() {
        let refused = |begun_ms| Failure {
            begun_ms,
            failed_ms: begun_ms,
            flow: String::new(),
            phase: Phase::Connect,
            error: "ECONNREFUSED".into(),
        };
        let failures = [900, 1000, 1250, 8800, 9000, 9100].map(refused).to_vec();
        let tally = Tally { failures, ..Tally::default() };
        let restarts = [(800, 1000), (5000, 9000)].map(|(killed_ms, started_ms)| Restart { killed_ms, started_ms });
        assert_eq!(restarts.map(|restart| last_refusal(&tally, restart, &restarts).as_millis()), [250, 100]);
    }
}
