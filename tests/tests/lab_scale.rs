//! The bench of the control plane, small and short: that it can be run, and that what it counts is what happened.

#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::bench::interrupt::Interrupt;
use mesh_tests::bench::scale::cluster::Size;
use mesh_tests::bench::scale::stage::{self, Scene};
use mesh_tests::places::Places;
use mesh_tests::{raw, record};

const SMALL: Scene = Scene {
    size: Size { pods: 200, services: 20, nodes: 5 },
    few: 2,
    churn: 20,
    rounds: 1,
    secs: 2.0,
    returning: 3,
    arriving: 3,
    most_mib: 4096,
};

#[test]
fn a_small_fleet_hears_of_every_change_and_comes_back() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let id = format!("scale{}", std::process::id());
    let said = Mutex::new(Vec::new());
    let say = |text: &str| said.lock().expect("nobody panics with it").push(text.to_owned());
    let (figures, failed) = stage::measure(&Places::find()?, &id, &SMALL, &Interrupt::default(), &say)?;
    if let Some(error) = failed {
        return Err(error.context(format!("{figures:?}, {said:?}")));
    }
    println!("{figures:#?}\n{said:?}");
    let round = figures.rounds.first().context("there was a round")?;
    // A pod went and a pod came, each time, and all five heard.
    ensure!(round.heard.deliveries == round.heard.changes as u64 * 2 * 5, "{round:?}");
    ensure!(round.heard.changes >= 20 && round.cpu_s > 0.0, "{round:?}");
    ensure!(0.0 < round.heard.p50 && round.heard.p50 <= round.heard.p99, "{round:?}");
    ensure!(round.heard.p50 <= round.heard.converge_p99, "{round:?}");
    for storm in [figures.returning, figures.arriving] {
        let storm = storm.context("there was a storm")?;
        // The two who stayed have heard of all; those who came back do not count. It may begin between a pod that goes and the one
        // that comes for it.
        let all = storm.heard.changes as u64 * 2 * 2;
        ensure!(storm.heard.deliveries.abs_diff(all) <= 2 && storm.peak_mib > 0.0, "{storm:?}");
    }
    ensure!(figures.rss_idle_mib.is_some_and(|mib| mib > 1.0), "{figures:?}");
    ensure!(record::all().iter().all(|record| record.id != id), "something is left behind");
    Ok(())
}

#[test]
fn a_control_plane_that_takes_too_much_memory_is_ended_and_named() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let id = format!("scalemem{}", std::process::id());
    let scene = Scene { most_mib: 1, ..SMALL };
    let began = Instant::now();
    let (_, failed) = stage::measure(&Places::find()?, &id, &scene, &Interrupt::default(), &|_| {})?;
    let error = format!("{:#}", failed.context("nothing failed")?);
    ensure!(error.contains("more than 1 MiB"), "{error}");
    ensure!(began.elapsed() < Duration::from_secs(60), "it was waited for");
    Ok(())
}
