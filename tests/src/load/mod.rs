//! Load that counts: new connections at a steady rate, and long-lived ones with a heartbeat, while something happens to the mesh.
//!
//! The question is never how fast, always whether: every connection that was opened is either good or in the list of failures, with
//! errno, phase and moment. One process at each end keeps it cheap enough to run beside the proxies on two cores.
//!
//! - [`client`] is the end that opens, counts and judges; the server is [`crate::bench::serve`]
//! - [`stage`] is a mesh of two ztunnels fed from files, with pods in and outside of it
//! - [`cluster`] is one with a control plane, where pods join by `kubectl`
//! - [`watch`] looks at the wire meanwhile: nothing readable, nothing around the mesh
//! - [`many`] is the opposite of load: many pods that do nothing
//! - [`soak`] is what is done to the mesh under load, and what must hold
//! - [`endure`] is everything at once, for as long as one likes

pub mod client;
pub mod cluster;
pub mod endure;
pub mod many;
pub mod soak;
pub mod stage;
pub mod watch;

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// A minute of connections waits in TIME_WAIT otherwise. The range of ports stays as the kernel has it: a client with a
/// wider one may meet the ports of ztunnel's last legs.
pub const TIME_WAIT_REUSED: [(&str, &str); 1] = [("net/ipv4/tcp_tw_reuse", "1")];

/// In the payload of flows that must not be readable on the wire.
pub const SECRET: &str = "soak-secret-7f3a";
/// In the payload of flows that leave or enter the mesh in plain text: shows that the watcher can see.
pub const OPEN: &str = "soak-public-51d0";

/// What went wrong with one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Milliseconds since 1970 when the connection, or the heartbeat, was begun.
    pub begun_ms: u64,
    /// And when it failed.
    pub failed_ms: u64,
    pub flow: String,
    pub phase: Phase,
    /// The errno's name, `EOF`, `timeout` or `changed`.
    pub error: String,
}

/// How far a connection had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Connect,
    Send,
    Receive,
    Close,
}

/// What one client saw. Every connection it opened is in one of the counts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Seconds from the moment all long-lived connections were there to the end.
    pub seconds: f64,
    /// New connections: opened, and each of them good or failed, or refused where that is what may happen.
    pub opened: u64,
    pub ok: u64,
    pub failed: u64,
    pub refused: u64,
    pub slowest_ms: u64,
    /// Long-lived connections: opened; then lost, ended by plan, or alive at the end.
    pub long_opened: u64,
    pub long_lost: u64,
    pub long_ended: u64,
    pub long_alive: u64,
    pub heartbeats: u64,
    /// The first of them; the counts above are complete.
    pub failures: Vec<Failure>,
    /// Of long-lived connections.
    pub losses: Vec<Failure>,
    /// New connections that went well, by flow.
    pub flows: BTreeMap<String, u64>,
}

impl Tally {
    /// Adds what another client saw in the same time.
    pub fn merge(&mut self, other: Self) {
        self.seconds = self.seconds.max(other.seconds);
        self.opened += other.opened;
        self.ok += other.ok;
        self.failed += other.failed;
        self.refused += other.refused;
        self.slowest_ms = self.slowest_ms.max(other.slowest_ms);
        self.long_opened += other.long_opened;
        self.long_lost += other.long_lost;
        self.long_ended += other.long_ended;
        self.long_alive += other.long_alive;
        self.heartbeats += other.heartbeats;
        self.failures.extend(other.failures);
        self.losses.extend(other.losses);
        for (flow, count) in other.flows {
            *self.flows.entry(flow).or_default() += count;
        }
    }

    /// From the exit status and the output of a client.
    ///
    /// # Errors
    /// When it did not end well, or connections are not accounted for.
    pub fn read(status: ExitStatus, said: &str) -> Result<Self> {
        ensure!(status.success(), "a client ended with {status}: {said}");
        let line = said.lines().last().context("the load said nothing")?;
        let tally: Self = serde_json::from_str(line).with_context(|| format!("the load said {line:?}"))?;
        ensure!(tally.adds_up(), "connections are not accounted for: {line}");
        Ok(tally)
    }

    /// New connections per second.
    pub fn rate(&self) -> f64 {
        self.opened as f64 / self.seconds.max(1e-3)
    }

    /// Whether every connection is accounted for.
    pub fn adds_up(&self) -> bool {
        self.opened == self.ok + self.failed + self.refused
            && self.long_opened == self.long_lost + self.long_ended + self.long_alive
    }

    /// What failed, counted by flow, phase and error: a line for each.
    pub fn by_kind(failures: &[Failure]) -> Vec<String> {
        let mut kinds: BTreeMap<(&str, Phase, &str), (u64, u64, u64)> = BTreeMap::new();
        for failure in failures {
            let kind = (failure.flow.as_str(), failure.phase, failure.error.as_str());
            let seen = kinds.entry(kind).or_insert((0, failure.failed_ms, failure.failed_ms));
            seen.0 += 1;
            seen.1 = seen.1.min(failure.failed_ms);
            seen.2 = seen.2.max(failure.failed_ms);
        }
        let line = |((flow, phase, error), (count, first, last)): ((&str, Phase, &str), (u64, u64, u64))| {
            format!("{count} × {flow}: {error} in {phase:?} ({first} to {last})")
        };
        kinds.into_iter().map(line).collect()
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_is_nowhere_shows() {
        let mut tally = Tally { opened: 3, ok: 2, failed: 1, ..Tally::default() };
        assert!(tally.adds_up());
        tally.merge(Tally { opened: 1, long_opened: 2, long_alive: 1, long_ended: 1, ..Tally::default() });
        assert!(!tally.adds_up());
    }

    #[test]
    fn failures_are_counted_by_kind() {
        let failure = |at, error: &str| Failure {
            begun_ms: at,
            failed_ms: at,
            flow: "a".into(),
            phase: Phase::Connect,
            error: error.into(),
        };
        let kinds = Tally::by_kind(&[failure(5, "ECONNREFUSED"), failure(9, "ECONNREFUSED"), failure(7, "timeout")]);
        assert_eq!(kinds, ["2 × a: ECONNREFUSED in Connect (5 to 9)", "1 × a: timeout in Connect (7 to 7)"]);
    }
}
