//! One control plane, its cluster and its fleet on one node of a lab: brought up, changed, stormed and looked at, in that order, so
//! that nothing is measured after something that would show in it.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::api::{Api, Authority};
use super::cluster::{Cluster, Size};
use super::fleet::{Ears, Fleet, Holding};
use super::ledger::{Ledger, Period, Summary};
use super::plane::{GRPC_PORT, Plane};
use crate::bench::interrupt::Interrupt;
use crate::bench::usage::Sample;
use crate::local;
use crate::places::Places;
use crate::raw::Lab;

/// Lists and the first translation, in a debug build too.
const READY: Duration = Duration::from_secs(300);
/// All proxies of the fleet, a few at a time.
const UP: Duration = Duration::from_secs(1200);
const AT_A_TIME: usize = 8;
/// For the last change of a round to be heard by all.
const HEARD: Duration = Duration::from_secs(120);
/// Four times what a storm may take.
const STORM: Duration = Duration::from_secs(120);
/// Changes before they count, and before a storm.
const WARM: Duration = Duration::from_secs(2);
/// After that memory is at rest.
const REST: Duration = Duration::from_secs(5);
/// Between looks at all changes.
const LOOK: Duration = Duration::from_millis(50);
/// Of ten thousand resources, how many a proxy may be short of while pods are replaced.
const SHORT: u64 = 100;

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    pub size: Size,
    /// Proxies that are there when memory is looked at the first time; none: not looked at.
    pub few: u32,
    /// Pods in a second.
    pub churn: u32,
    pub rounds: u32,
    /// Of each round.
    pub secs: f64,
    /// Proxies that lose their stream at once and come back; and that come with nothing.
    pub returning: u32,
    pub arriving: u32,
    /// The control plane is ended when it takes more.
    pub most_mib: u64,
}

/// What was measured before something failed, if it did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    pub ready_s: Option<f64>,
    pub rss_idle_mib: Option<f64>,
    pub rss_few_mib: Option<f64>,
    pub rss_mib: Option<f64>,
    pub rounds: Vec<Round>,
    pub returning: Option<Storm>,
    pub arriving: Option<Storm>,
}

/// A time of churn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    pub heard: Summary,
    /// Between two responses to one proxy, on average.
    pub push_interval_ms: f64,
    /// Of the control plane.
    pub cpu_s: f64,
    /// Of this process: the proxies and the API server.
    pub fleet_cpu_s: f64,
    /// From the first change to when all were heard.
    pub seconds: f64,
    /// Nothing else disturbed it.
    pub calm: bool,
}

/// Many proxies at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Storm {
    /// Until the last of them was synced.
    pub seconds: f64,
    /// By those who stayed.
    pub heard: Summary,
    pub peak_mib: f64,
}

/// Brings all up, measures, and takes it down; what failed comes beside what was measured.
///
/// # Errors
/// When the lab does not come up, or the user does not want to wait.
pub fn measure(
    places: &Places,
    id: &str,
    scene: &Scene,
    interrupt: &Interrupt,
    say: &dyn Fn(&str),
) -> Result<(Figures, Option<anyhow::Error>)> {
    let program = places.binaries.join("istiod-lite");
    ensure!(program.exists(), "{} is missing: run `cargo xtask bench scale`", program.display());
    open_many_files()?;
    let lab = Lab::up(id)?;
    let mut figures = Figures::default();
    let outcome = Stage::set(&lab, &program, scene, interrupt).and_then(|mut stage| stage.play(&mut figures, say));
    interrupt.check()?;
    Ok((figures, outcome.err()))
}

/// A socket for each proxy.
fn open_many_files() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

struct Stage<'a> {
    lab: &'a Lab,
    scene: &'a Scene,
    interrupt: &'a Interrupt,
    // The clients end before their servers.
    fleet: Fleet,
    plane: Plane,
    api: Api,
    ledger: Arc<Ledger>,
}

impl<'a> Stage<'a> {
    fn set(lab: &'a Lab, program: &Path, scene: &'a Scene, interrupt: &'a Interrupt) -> Result<Self> {
        let node = lab.node("node-a");
        let scratch = lab.scratch("scale")?;
        local::write_ca(&scratch)?;
        let authority = Authority {
            certificate: fs::read_to_string(scratch.join("ca-cert.pem"))?,
            key: fs::read_to_string(scratch.join("ca-key.pem"))?,
        };
        let root = authority.certificate.clone();
        let ledger = Arc::new(Ledger::new(scene.serials(), scene.rounds as usize + 3));
        let api = Api::serve(node, Cluster::new(scene.size), authority, Arc::clone(&ledger))?;
        let plane = Plane::start(node, program, api.port, &scratch, scene.most_mib)?;
        let fleet = Fleet::new(node, GRPC_PORT, root, Arc::clone(&ledger), scene.staying())?;
        Ok(Self { lab, scene, interrupt, fleet, plane, api, ledger })
    }

    fn play(&mut self, figures: &mut Figures, say: &dyn Fn(&str)) -> Result<()> {
        let all = self.scene.size.nodes;
        let ready = self.plane.ready(self.lab.node("node-a"), READY, self.interrupt)?;
        figures.ready_s = Some(ready.as_secs_f64());
        self.fleet.try_as_stranger()?;
        self.idle(REST)?;
        figures.rss_idle_mib = Some(self.plane.resident_mib()?);
        let few = self.scene.few;
        if few > 0 {
            self.fleet.connect(0..few, AT_A_TIME, Holding::Nothing, Ears::Open);
            self.synced(0..few, UP)?;
            self.idle(REST)?;
            figures.rss_few_mib = Some(self.plane.resident_mib()?);
        }
        let began = Instant::now();
        if few < all {
            self.fleet.connect(few..all, AT_A_TIME, Holding::Nothing, Ears::Open);
            self.synced(few..all, UP)?;
        }
        self.was_sent_all(0..all)?;
        say(&format!(
            "ready after {:.1} s; {all} proxies synced, the last after {:.1} s",
            ready.as_secs_f64(),
            began.elapsed().as_secs_f64()
        ));
        self.idle(REST)?;
        figures.rss_mib = Some(self.plane.resident_mib()?);

        self.warm_up()?;
        for n in 1..=self.scene.rounds {
            let round = self.round()?;
            say(&format!(
                "round {n}: {} pods replaced, heard by {all} after {:.0} ms (p99 {:.0})",
                round.heard.changes, round.heard.p50, round.heard.p99
            ));
            figures.rounds.push(round);
        }
        self.prove()?;

        for (proxies, holding, what) in [
            (self.scene.returning, Holding::Everything, "come back"),
            (self.scene.arriving, Holding::Nothing, "come with nothing"),
        ] {
            if proxies == 0 {
                continue;
            }
            let storm = self.storm(all - proxies..all, holding).with_context(|| format!("{proxies} proxies {what}"))?;
            say(&format!("{proxies} proxies {what} at once: {:.1} s", storm.seconds));
            match holding {
                Holding::Everything => figures.returning = Some(storm),
                Holding::Nothing => figures.arriving = Some(storm),
            }
        }
        let unexpected = self.api.unexpected();
        ensure!(
            unexpected.is_empty(),
            "the control plane asked for what is not served here: {}",
            unexpected.join(", ")
        );
        Ok(())
    }

    /// Waits until these proxies, of which there are some, are synced, and says when the last of them was.
    fn synced(&mut self, proxies: Range<u32>, deadline: Duration) -> Result<Instant> {
        let (fleet, plane) = (&self.fleet, &mut self.plane);
        let synced = self.interrupt.until("the proxies to be synced", deadline, || {
            plane.check()?;
            let (synced, last) = fleet.synced(proxies.clone());
            Ok(last.filter(|_| synced == proxies.len()))
        });
        synced.with_context(|| {
            let (synced, _) = fleet.synced(proxies.clone());
            format!("{synced} of {} proxies are synced; streams ended: {:?}", proxies.len(), fleet.troubles())
        })
    }

    fn was_sent_all(&self, proxies: Range<u32>) -> Result<()> {
        let (fewest, most) = self.fleet.resources(proxies);
        let all = self.scene.size.resources() as u64;
        let short = all / SHORT + u64::from(self.scene.churn);
        ensure!(
            fewest + short >= all && most <= all + short,
            "proxies were sent {fewest} to {most} resources of {all}"
        );
        Ok(())
    }

    fn warm_up(&mut self) -> Result<()> {
        let period = self.ledger.begin();
        let churn = self.api.churn(self.scene.churn);
        self.idle(WARM)?;
        drop(churn);
        self.all_heard(period, self.scene.size.nodes)
    }

    fn round(&mut self) -> Result<Round> {
        let proxies = self.scene.size.nodes;
        let (cgroup, plane) = (self.lab.record.cgroup.clone(), [self.plane.cgroup().to_owned()]);
        let period = self.ledger.begin();
        let (before, pushes, began) = (Sample::take(&cgroup, &plane)?, self.fleet.pushes(), Instant::now());
        let churn = self.api.churn(self.scene.churn);
        self.idle(Duration::from_secs_f64(self.scene.secs))?;
        drop(churn);
        self.all_heard(period, proxies)?;
        let seconds = began.elapsed().as_secs_f64();
        let spent = Sample::take(&cgroup, &plane)?.since(&before);
        let pushes = (self.fleet.pushes() - pushes) as f64 / f64::from(proxies);
        Ok(Round {
            heard: self.ledger.summary(period),
            push_interval_ms: seconds * 1000.0 / pushes.max(1.0),
            cpu_s: spent.proxies,
            fleet_cpu_s: spent.own,
            seconds,
            calm: spent.calm(),
        })
    }

    /// Proxies lose their streams and connect at once, while pods are replaced as ever.
    fn storm(&mut self, proxies: Range<u32>, holding: Holding) -> Result<Storm> {
        let churn = self.api.churn(self.scene.churn);
        self.idle(WARM)?;
        self.plane.take_peak_mib();
        self.fleet.disconnect(proxies.clone());
        // From here on only those who stay are asked what they heard.
        let period = self.ledger.begin();
        let began = Instant::now();
        self.fleet.connect(proxies.clone(), proxies.len(), holding, Ears::Closed);
        let last = self.synced(proxies.clone(), STORM)?;
        drop(churn);
        let peak_mib = self.plane.take_peak_mib();
        if holding == Holding::Nothing {
            self.was_sent_all(proxies.clone())?;
        }
        self.all_heard(period, self.scene.staying())?;
        Ok(Storm { seconds: (last - began).as_secs_f64(), heard: self.ledger.summary(period), peak_mib })
    }

    /// Waits until so many proxies have heard of every change.
    fn all_heard(&mut self, period: Period, proxies: u32) -> Result<()> {
        let (ledger, plane) = (&self.ledger, &mut self.plane);
        let heard = self.interrupt.until("all changes to be heard by all", HEARD, || {
            plane.check()?;
            std::thread::sleep(LOOK);
            Ok((ledger.unheard(period, proxies) == 0).then_some(()))
        });
        heard.with_context(|| {
            let unheard = ledger.unheard(period, proxies);
            format!("{unheard} changes were not heard by all {proxies}; streams ended: {:?}", self.fleet.troubles())
        })
    }

    /// The proxies know what the API holds, no more and no less.
    fn prove(&self) -> Result<()> {
        let (there, known) = (self.api.resources(), self.fleet.known());
        let known: BTreeSet<String> = known.into_iter().collect();
        let example = there.symmetric_difference(&known).next();
        if let Some(name) = example {
            let wrong = there.symmetric_difference(&known).count();
            bail!("a proxy is wrong about {wrong} of {} resources, {name} among them", there.len());
        }
        Ok(())
    }

    fn idle(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        let plane = &mut self.plane;
        self.interrupt.until("the time to pass", time * 2 + Duration::from_secs(10), || {
            plane.check()?;
            Ok((Instant::now() >= end).then_some(()))
        })
    }
}

impl Scene {
    /// Proxies that are there through every storm.
    fn staying(&self) -> u32 {
        self.size.nodes - self.returning.max(self.arriving)
    }

    /// More pods than there will be: two storms may take as long as they are waited for.
    fn serials(&self) -> usize {
        let seconds = self.secs * f64::from(self.rounds) + (STORM * 2 + HEARD).as_secs_f64();
        self.size.pods as usize + (seconds * f64::from(self.churn) * 2.0) as usize
    }
}
