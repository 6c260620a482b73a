//! What must not lose a connection, under load, in a short form; `cargo xtask bench soak` is the long one.

use std::time::Duration;

use anyhow::Result;
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
fn no_new_connection_fails_while_ztunnels_are_restarted_by_sigterm() -> Result<()> {
    play(Act::Sigterm).map(drop)
}

#[test]
fn after_kill_9_refusals_end_with_the_restart_and_nothing_leaves_in_clear() -> Result<()> {
    play(Act::Kill).map(drop)
}
