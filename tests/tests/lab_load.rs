//! What must not lose a connection, under load, in a short form; `cargo xtask bench soak` is the long one.

use std::time::Duration;

use anyhow::Result;
use mesh_tests::load::endure;
use mesh_tests::load::soak::{self, Act, Scale, Verdict};
use mesh_tests::places::Places;
use mesh_tests::raw;

/// How soon the last refusal must come where debug builds share the machine with other tests. The figure to hold is
/// [`soak::BACK`], and the long form holds us to it.
const BACK_IN_A_TEST: Duration = Duration::from_secs(10);

/// Plays an act where the lab is available.
fn play(act: Act) -> Result<Option<Verdict>> {
    if !raw::available() {
        return Ok(None);
    }
    let verdict =
        soak::play(&Places::find()?, &format!("{act:?}{}", std::process::id()).to_lowercase(), act, &Scale::short())?;
    println!("{}", verdict.line());
    verdict.check(BACK_IN_A_TEST)?;
    Ok(Some(verdict))
}

#[test]
fn under_mixed_load_with_everything_changing_nothing_fails_and_no_memory_grows() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let id = format!("endure{}", std::process::id());
    let outcome = endure::play(&Places::find()?, &id, &endure::Options::short())?;
    outcome.lines().iter().for_each(|line| println!("{line}"));
    outcome.check()
}

#[test]
fn no_new_connection_fails_while_ztunnels_are_restarted_by_sigterm() -> Result<()> {
    play(Act::Sigterm).map(drop)
}

#[test]
fn after_kill_9_refusals_end_with_the_restart_and_nothing_leaves_in_clear() -> Result<()> {
    play(Act::Kill).map(drop)
}

#[test]
fn joining_and_leaving_the_mesh_fails_no_new_connection_and_loses_no_open_one() -> Result<()> {
    play(Act::Enrol).map(drop)
}

#[test]
fn an_upgrade_fails_no_new_connection_and_loses_no_open_one() -> Result<()> {
    play(Act::Upgrade).map(drop)
}

#[test]
fn a_ztunnel_killed_in_a_cluster_serves_again_and_nothing_leaves_in_clear() -> Result<()> {
    play(Act::KillPod).map(drop)
}
