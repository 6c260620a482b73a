//! What the mesh does when something under it breaks: a node, a clock, the wire, the limits of its own process. Each as the table
//! "When something is down" in ARCHITECTURE.md says.

#![forbid(unsafe_code)]

#[path = "faults/memory.rs"]
mod memory;
#[path = "faults/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::bench::serve;
use mesh_tests::load::Tally;
use mesh_tests::load::client::Amount;
use mesh_tests::load::stage::Stage;
use mesh_tests::lossy::{Faults, Lossy};
use mesh_tests::memory::written_kib;
use mesh_tests::places::Places;
use mesh_tests::raw::{self, NODES, Process};
use mesh_tests::{sys, wait};

use world::{Mesh, SETTLE, lives};

/// What keepalive may take, and what a crowded machine may take to let us see it.
const CUT: Duration = Duration::from_secs(30 + 6);
/// The longest that a new connection may be in doubt: the deadlines of TCP and of a tunnel that is open already, one after the other.
const REFUSED: Duration = Duration::from_secs(10 + 7 + 6);
const TWO_HOURS: i64 = 7200;

/// The link is gone: no FIN, no reset, nothing.
#[test]
fn a_node_that_vanishes_is_noticed_within_half_a_minute_and_found_again() -> Result<()> {
    let Some(mesh) = Mesh::up("vanish")? else { return Ok(()) };
    let (v4, v6) = (mesh.far.net.ipv4.into(), mesh.far.net.ipv6.into());
    let mut open = vec![mesh.hold(v4)?, mesh.hold(v6)?, mesh.beat(v4)?];
    let parent = &mesh.lab.parent.netns.name;
    sys::ip_batch(Some(parent), &format!("link set {} down\n", NODES[1]))?;
    let gone = Instant::now();

    for to in [v4, v6] {
        let (answered, took) = mesh.call(to)?;
        ensure!(!answered && took < REFUSED, "a new connection: answered {answered}, after {took:?}");
    }
    for held in &mut open {
        let end = if held.output().contains("beat") { "LOST" } else { "ended" };
        held.wait_output(end, CUT.saturating_sub(gone.elapsed()))?;
    }
    // Both sides know, and each by itself.
    wait::until("the server's node to cut what was open", CUT.saturating_sub(gone.elapsed()), || {
        let cut = mesh.flagged(NODES[1], "RESET");
        ensure!(cut >= open.len(), "{cut} of {} are:\n{}", open.len(), mesh.log(NODES[1]));
        Ok(())
    })?;
    let (cut, refused) = (mesh.flagged(NODES[0], "RESET"), refusals(&mesh));
    ensure!(cut >= open.len() && refused >= 2, "{cut} cut and {refused} refused:\n{}", mesh.log(NODES[0]));

    sys::ip_batch(Some(parent), &format!("link set {} up\n", NODES[1]))?;
    mesh.comes_to_work(v4)
}

/// Lines of the client's node about connections that did not come about.
fn refusals(mesh: &Mesh) -> usize {
    ["TIMEOUT", "NETWORK_POLICY", "CONNECT"].iter().map(|flag| mesh.flagged(NODES[0], flag)).sum()
}

/// The clocks of the two ztunnels, which the test sets.
struct Clocks<'a>(&'a Mesh);

impl Clocks<'_> {
    /// What has a process see such a clock. The monotonic clock goes on: that one never jumps.
    fn settings(mesh: &Mesh, node: &str) -> Result<Vec<(&'static str, String)>> {
        let library = fs::read_dir(mesh.places.tools().join("faketime/usr/lib"))
            .context("no faketime: run `cargo xtask test`")?
            .filter_map(|triplet| Some(triplet.ok()?.path().join("faketime/libfaketimeMT.so.1")))
            .find(|library| library.exists());
        let library = library.context("no libfaketimeMT.so.1")?.display().to_string();
        let file = Clocks(mesh).file(node)?.display().to_string();
        let yes = || "1".to_owned();
        Ok(vec![
            ("LD_PRELOAD", library),
            ("FAKETIME_TIMESTAMP_FILE", file),
            ("FAKETIME_NO_CACHE", yes()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", yes()),
            ("NO_FAKE_STAT", yes()),
            ("SECRET_TTL", "3600s".to_owned()),
        ])
    }

    fn file(&self, node: &str) -> Result<PathBuf> {
        Ok(self.0.lab.scratch("clocks")?.join(node))
    }

    fn set(&self, nodes: &[&str], seconds: i64) -> Result<()> {
        for node in nodes {
            let file = self.file(node)?;
            let next = file.with_extension("next");
            fs::write(&next, format!("{seconds:+}\n"))?;
            fs::rename(next, file)?;
        }
        Ok(())
    }
}

/// Certificates live for an hour here, so two hours ahead they have ended, and two hours back they have not begun.
#[test]
fn clocks_that_jump_by_two_hours_end_no_connection_and_new_ones_come_back() -> Result<()> {
    let Some(mut mesh) = Mesh::prepare("clock")? else { return Ok(()) };
    Clocks(&mesh).set(&NODES, 0)?;
    for node in NODES {
        let settings = Clocks::settings(&mesh, node)?;
        mesh.start(node, &settings)?;
    }
    let (mesh, clocks) = (&mesh, Clocks(&mesh));
    let far = mesh.far.net.ipv4.into();
    let beat = mesh.beat(far)?;

    clocks.set(&NODES, TWO_HOURS)?;
    wait::until("ztunnel to see its clock", SETTLE, || seen(mesh, TWO_HOURS))?;
    let (answered, took) = mesh.call(far)?;
    ensure!(answered, "two hours ahead a new connection was refused after {took:?}");
    lives(&beat)?;

    clocks.set(&NODES, -TWO_HOURS)?;
    wait::until("ztunnel to see its clock", SETTLE, || seen(mesh, -TWO_HOURS))?;
    mesh.comes_to_work(far).context("two hours back")?;
    lives(&beat)?;

    // One clock alone is wrong. Who has a tunnel keeps it: the server has none to the client yet, is refused, and is told why.
    let client = mesh.client.net.ipv4.into();
    clocks.set(&NODES[..1], TWO_HOURS)?;
    wait::until("ztunnel to see its clock", SETTLE, || seen(mesh, TWO_HOURS))?;
    let before = mesh.flagged(NODES[1], "TLS_FAILURE");
    let (answered, took) = Mesh::call_from(&mesh.far, client)?;
    ensure!(!answered, "answered after {took:?}");
    wait::until("the server's node to tell why", SETTLE, || {
        ensure!(mesh.flagged(NODES[1], "TLS_FAILURE") > before, "{}", mesh.log(NODES[1]));
        Ok(())
    })?;
    clocks.set(&NODES[..1], -TWO_HOURS)?;
    wait::until("the clock to be right again", SETTLE, || {
        let (answered, took) = Mesh::call_from(&mesh.far, client)?;
        ensure!(answered, "refused after {took:?}");
        Ok(())
    })?;
    lives(&beat)
}

/// Whether the client's ztunnel writes its log by a clock that is so many seconds off.
fn seen(mesh: &Mesh, seconds: i64) -> Result<()> {
    mesh.call(mesh.far.net.ipv4.into())?;
    let log = mesh.log(NODES[0]);
    let stamp = log.lines().last().and_then(|line| line.split(['\t', ' ']).next()).context("an empty log")?;
    let format = &time::format_description::well_known::Rfc3339;
    let at = time::OffsetDateTime::parse(stamp, format).with_context(|| format!("no time: {stamp}"))?;
    let off = (at - time::OffsetDateTime::now_utc()).whole_seconds() - seconds;
    ensure!(off.abs() < 600, "{off} s off");
    Ok(())
}

/// Frames are lost and late in both directions: what is carried is whole, and nothing fails.
#[test]
fn on_a_wire_that_loses_a_twentieth_and_delays_by_a_tenth_of_a_second_nothing_fails_or_changes() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let places = Places::find()?;
    let mut stage = Stage::up(&format!("lossy{}", std::process::id()), &places.binaries.join("bench"))?;
    stage.start_both(&places.binaries.join("ztunnel"))?;
    let faults = Faults { lost_percent: 5, delay: Duration::from_millis(100), seed: 4 };
    let wire = Lossy::between(stage.lab(), &places, faults)?;
    let patience = Duration::from_secs(40);
    let amount = Amount { bulk: 1, bulk_kib: 96, patience, ..Amount::of(12, 16) };
    let mut load = stage.start_load(amount)?;
    load.run_until(Instant::now() + Duration::from_secs(15))?;
    let tally = load.stop()?;
    let (carried, lost) = wire.counts();
    wire.stop()?;

    let kinds = |failures| Tally::by_kind(failures).join("\n  ");
    ensure!(tally.failed == 0, "{} failed:\n  {}", tally.failed, kinds(&tally.failures));
    ensure!(tally.long_lost == 0, "{} were lost:\n  {}", tally.long_lost, kinds(&tally.losses));
    let moved: u64 = tally.flows.iter().filter(|(flow, _)| flow.ends_with("-bulk")).map(|(_, count)| count).sum();
    ensure!(moved > 2 && tally.heartbeats > 50, "too little happened: {tally:?}");
    ensure!(
        tally.slowest_ms >= 200 && lost > 50 && carried > 1000,
        "the wire was good: {carried} carried, {lost} lost"
    );
    println!(
        "{} connections, {moved} transfers; slowest {} ms; {lost} of {} frames lost",
        tally.ok,
        tally.slowest_ms,
        carried + lost
    );
    Ok(())
}

/// The descriptor that the kernel would give a process next: a limit of that number leaves it none.
fn next_descriptor(pid: u32) -> Result<u64> {
    let open: BTreeSet<u64> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| entry.ok()?.file_name().to_string_lossy().parse().ok())
        .collect();
    (0..).find(|number| !open.contains(number)).context("numbers do not end")
}

/// How many a process may have open.
fn allowed_descriptors(pid: u32) -> Result<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("no such limit")?;
    Ok(line.split_whitespace().next().context("no value")?.parse()?)
}

fn limit_descriptors(pid: u32, soft: u64) -> Result<()> {
    let limit = format!("--nofile={soft}:");
    sys::check(sys::command("prlimit").args(["--pid", &pid.to_string(), &limit])).map(drop)
}

/// Seconds of CPU that a process has used.
fn cpu(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("no name in stat")?.1.split_whitespace().collect();
    let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("stat is short")?.parse::<u64>()? as f64) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

/// A closed loop of new connections from the client's pod.
fn calls(mesh: &Mesh, name: &str, to: &raw::Pod, patience: u64, refusable: bool) -> Result<Process> {
    let bench = mesh.places.binaries.join("bench").display().to_string();
    let (flow, patience) = (format!("{name}+={}:{}", to.net.ipv4, serve::ECHO), patience.to_string());
    let mut argv =
        vec![bench.as_str(), "soak-client", "--flow", &flow, "--rate", "40", "--long", "0", "--patience", &patience];
    if refusable {
        argv.push("--refusable");
    }
    mesh.client.spawn(&format!("calls-{name}"), &argv, &[])
}

fn ended(mut client: Process) -> Result<Tally> {
    client.signal(nix::sys::signal::Signal::SIGTERM)?;
    let status = client.wait(Duration::from_secs(60))?;
    Tally::read(status, &client.output())
}

#[test]
fn out_of_descriptors_new_connections_wait_or_are_refused_by_name_and_all_comes_back() -> Result<()> {
    const SEEN: Duration = Duration::from_secs(4);
    let Some(mut mesh) = Mesh::up("files")? else { return Ok(()) };
    let beat = mesh.beat(mesh.far.net.ipv4.into())?;
    let pid = mesh.ztunnel(NODES[0]).pid();
    let allowed = allowed_descriptors(pid)?;

    // None at all: what comes waits in the queue.
    limit_descriptors(pid, next_descriptor(pid)?)?;
    let waiting = calls(&mesh, "waiting", &mesh.far, 50, false)?;
    wait::until("an accept to fail", SETTLE, || {
        ensure!(mesh.log(NODES[0]).contains("cannot be accepted"), "not yet");
        Ok(())
    })?;
    let (began, before) = (Instant::now(), cpu(pid)?);
    wait::until_true("some time to pass", SETTLE, || began.elapsed() >= SEEN)?;
    let spent = (cpu(pid)? - before) / began.elapsed().as_secs_f64();
    lives(&beat)?;
    ensure!(spent < 0.5, "{spent:.2} cores for nothing");
    let told = mesh.log(NODES[0]).matches("cannot be accepted").count();
    ensure!((1..=3).contains(&told), "told {told} times");

    limit_descriptors(pid, allowed)?;
    let tally = ended(waiting)?;
    let kinds = Tally::by_kind(&tally.failures);
    ensure!(tally.failed == 0 && tally.ok > 0, "{} served of those that waited, {kinds:?}", tally.ok);
    ensure!(mesh.metric(NODES[0], "mesh_accept_failures_total")? > 0.0, "no metric tells of it");

    // Enough to take a connection, and not always enough to make the one that it needs.
    let refused = calls(&mesh, "refused", &mesh.plain, 20, true)?;
    wait::until("connections to be refused by name", SETTLE, || {
        limit_descriptors(pid, next_descriptor(pid)? + 1)?;
        ensure!(mesh.flagged(NODES[0], "EXHAUSTED") > 0, "none yet");
        Ok(())
    })?;
    limit_descriptors(pid, allowed)?;
    let tally = ended(refused)?;
    ensure!(tally.failed == 0 && tally.refused > 0, "{tally:?}");
    mesh.comes_to_work(mesh.far.net.ipv4.into())?;
    lives(&beat)
}

/// Connections whose servers do not read fill what lies between, and no more.
#[test]
fn readers_that_stall_cost_a_bounded_amount_of_memory_and_give_it_back() -> Result<()> {
    const CONNECTIONS: usize = 100;
    let Some(mut mesh) = Mesh::up("stall")? else { return Ok(()) };
    let pids = NODES.map(|node| mesh.ztunnel(node).pid());
    let sizes = || -> Result<Vec<u64>> { pids.iter().map(|pid| written_kib(*pid)).collect() };
    let before = sizes()?;
    let mut rounds = Vec::new();
    for round in 0..2 {
        let server = memory::Deaf::listen(&mesh.far)?;
        let senders = server.fill(&mesh.client, round, CONNECTIONS)?;
        rounds.push(sizes()?);
        // The reader first: what senders have sent when they end waits for it still.
        drop((server, senders));
        wait::until("the connections to end", SETTLE, || {
            let open = mesh.metric(NODES[1], "istio_tcp_sockets_open")?;
            ensure!(open < 1.0, "{open} are open");
            Ok(())
        })?;
    }
    println!(
        "KiB of the client's and the server's ztunnel: {before:?} idle, {rounds:?} with {CONNECTIONS} connections stalled"
    );
    for (node, idle) in before.iter().enumerate() {
        let grown = rounds[0][node].saturating_sub(*idle);
        ensure!(grown < memory::BOUND_KIB, "{}: {grown} KiB for {CONNECTIONS} connections", NODES[node]);
        // What a round leaves behind would be there twice; some of it may be how the heap has come to lie.
        let more = rounds[1][node].saturating_sub(rounds[0][node]);
        ensure!(more < memory::BOUND_KIB / 2, "{}: {more} KiB more the second time", NODES[node]);
    }
    mesh.comes_to_work(mesh.far.net.ipv4.into())
}

/// The kernel ends it, and whoever runs it starts it again: nothing goes round it in between.
#[test]
fn a_ztunnel_that_exceeds_its_memory_limit_is_ended_and_its_pods_are_closed_until_the_next() -> Result<()> {
    // What it had before is not counted: memory stays with the cgroup that it was taken in.
    const NEW_KIB: u64 = 8 << 10;
    let Some(mut mesh) = Mesh::up("oom")? else { return Ok(()) };
    let far = mesh.far.net.ipv4.into();
    mesh.comes_to_work(far)?;
    let pid = mesh.ztunnel(NODES[0]).pid();
    let limited = memory::Limited::around(pid, &mesh.lab.record.id, NEW_KIB)?;
    let server = memory::Deaf::listen(&mesh.far)?;
    let mut senders = server.fill_until_ended(&mesh.client)?;
    let status = mesh.ztunnel(NODES[0]).wait(SETTLE)?;
    ensure!(status.to_string().contains("SIGKILL"), "it ended with {status}");
    senders.wait_output("lost", SETTLE)?;
    ensure!(limited.kills()? > 0, "the kernel did not kill it for its memory");
    let (answered, took) = mesh.call(far)?;
    ensure!(!answered && took < SETTLE, "a closed door: answered {answered}, after {took:?}");
    drop(limited);
    mesh.start(NODES[0], &[])?;
    mesh.comes_to_work(far)
}
