//! Whoever has a token, or may write objects, does what they can against the control plane: each attempt gets an answer that says
//! why, and a ztunnel of another node goes on hearing of changes while the process stays as large as it was.
//!
//! One control plane in a process of its own, on an API in another, for all of it: what is left behind by one attack is there
//! for the next.

mod standalone_support;

#[path = "hostile/callers.rs"]
mod callers;
#[path = "hostile/objects.rs"]
mod objects;
#[path = "hostile/streams.rs"]
mod streams;
#[path = "hostile/world.rs"]
mod world;

use std::time::{Duration, Instant};

use world::{Bystander, Mesh};

/// From when a policy is written until the bystander has it, whatever else goes on; in a debug build on a loaded machine.
const NOTICED_WITHIN: Duration = Duration::from_secs(8);
/// What the process may grow by at any time, in KiB, beyond what it has when the mesh is at rest.
const GROWTH_KIB: u64 = 192 * 1024;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn hostile_inputs_are_refused_with_a_reason_and_nobody_else_notices() {
    let mesh = Mesh::start().await;
    let bystander = Bystander::start(&mesh).await;
    let at_rest = mesh.memory();

    step("tokens", Box::pin(callers::bad_tokens(&mesh))).await;
    step("signing requests", Box::pin(callers::bad_signing_requests(&mesh))).await;
    step("identities of others", Box::pin(callers::identities_of_others(&mesh))).await;
    step("a pod that is gone", Box::pin(callers::pod_that_is_gone(&mesh))).await;
    step("nonsense names", Box::pin(streams::nonsense_names(&mesh))).await;
    step("too much", Box::pin(streams::too_much(&mesh))).await;
    step("no acknowledgement", Box::pin(streams::no_acknowledgement(&mesh, &bystander))).await;
    step("long refusals", Box::pin(streams::long_refusals(&mesh, &bystander))).await;
    step("no reading", Box::pin(streams::no_reading(&mesh, &bystander))).await;
    step("cycles", Box::pin(objects::cycles(&mesh))).await;
    step("long names", Box::pin(objects::long_names(&mesh, &bystander))).await;
    step("large policies", Box::pin(objects::large_policies(&mesh, &bystander))).await;
    step("large routes", Box::pin(objects::large_routes(&mesh))).await;
    step("large parameters", Box::pin(objects::large_parameters(&mesh))).await;
    step("entries that multiply", Box::pin(objects::entries_that_multiply(&mesh, &bystander))).await;

    let seen = bystander.end(&mesh).await;
    eprintln!("at rest {at_rest} KiB, at most {} KiB; noticed within {:?}", seen.most_memory, seen.slowest);
    assert!(seen.changes > 20, "{} changes are no test", seen.changes);
    assert!(seen.slowest < NOTICED_WITHIN, "a change was noticed after {:?}", seen.slowest);
    assert!(seen.most_memory < at_rest + GROWTH_KIB, "{at_rest} KiB at rest, {} KiB under attack", seen.most_memory);
    let longest = mesh.log().lines().map(str::len).max().unwrap_or_default();
    assert!(longest < 16 * 1024, "a line of {longest} bytes in the log");
}

async fn step(what: &str, doing: impl Future<Output = ()>) {
    let start = Instant::now();
    doing.await;
    eprintln!("{what}: {:?}", start.elapsed());
}
