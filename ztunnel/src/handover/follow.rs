//! The serving ztunnel's side: it finds those that drain, asks policy for them, and carries on their records.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use mesh::drain::DrainWatcher;
use mesh::identity::Revocations;
use mesh::policy::{self, still_allows};
use mesh::store::{Snapshot, Store};
use mesh::telemetry::LogHandle;
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::codec::LinesCodecError;

use super::wire::{self, FromDrainer, Inbound, State, ToDrainer, Writer};
use super::{cgroup, counters, is_trusted};
use crate::node::Registry;
use crate::node::find::Finder;
use crate::revocation;

/// How often new drainers are looked for.
const SCAN: Duration = Duration::from_millis(500);
/// How often a drainer hears of us.
const ALIVE: Duration = Duration::from_secs(1);
/// How often pods of a drainer are looked at for being gone.
const GONE_CHECK: Duration = Duration::from_secs(5);
/// For a drainer to say who it is, and to take a word.
const ANSWER: Duration = Duration::from_secs(5);

/// What the follower needs from the rest.
pub struct Follower {
    pub sockets: PathBuf,
    pub cgroup_root: PathBuf,
    pub store: Arc<Store>,
    /// Policy is not asked before its first version is complete: half of it would cut what the whole allows.
    pub synced: Option<watch::Receiver<bool>>,
    pub registry: Arc<Registry>,
    pub finder: Finder,
    pub log: LogHandle,
    pub generations: Generations,
    pub revocations: Option<Revocations>,
}

/// The generations of ztunnel on this node, for admin and metrics.
#[derive(Clone)]
pub struct Generations(Arc<Known>);

struct Known {
    own: Generation,
    registry: Arc<Registry>,
    /// Generations that may drain at a time; the oldest of more has to end.
    most: usize,
    draining: Mutex<BTreeMap<String, Generation>>,
}

/// One of them.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Generation {
    pub generation: String,
    pub version: String,
    pub state: &'static str,
    /// Seconds since 1970: when it was started, or began to drain.
    pub since: u64,
    /// When it has to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<u64>,
    pub connections: usize,
    /// Of connections that have ended, and of open ones up to some seconds ago.
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

impl Generations {
    /// With this process as the serving one, and at most `most` that drain.
    #[must_use]
    pub fn new(generation: &str, version: &str, registry: &Arc<Registry>, most: usize) -> Self {
        let own = Generation {
            generation: generation.to_owned(),
            version: version.to_owned(),
            state: "serving",
            since: super::unix_seconds(std::time::SystemTime::now()),
            deadline: None,
            connections: 0,
            received_bytes: 0,
            sent_bytes: 0,
        };
        Self(Arc::new(Known { own, registry: registry.clone(), most, draining: Mutex::default() }))
    }

    fn draining(&self) -> MutexGuard<'_, BTreeMap<String, Generation>> {
        self.0.draining.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The serving one first, then those that drain, the oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Generation> {
        let own = Generation { connections: self.0.registry.open_connections(), ..self.0.own.clone() };
        std::iter::once(own).chain(self.draining().values().cloned()).collect()
    }

    fn put(&self, generation: Generation) {
        gauge(&generation, generation.connections);
        self.draining().insert(generation.generation.clone(), generation);
    }

    fn update(&self, generation: &str, state: &State) {
        if let Some(known) = self.draining().get_mut(generation) {
            known.connections = state.connections;
            if state.counted {
                (known.received_bytes, known.sent_bytes) = (state.received, state.sent);
            }
            gauge(known, known.connections);
        }
    }

    fn remove(&self, generation: &str) {
        if let Some(gone) = self.draining().remove(generation) {
            gauge(&gone, 0);
        }
    }

    fn is_one_too_many(&self, generation: &str) -> bool {
        let draining = self.draining();
        draining.len() > self.0.most && draining.keys().next().is_some_and(|oldest| oldest == generation)
    }
}

/// A process of ztunnel meets a handful of generations in its life: the labels are bounded by that.
fn gauge(of: &Generation, connections: usize) {
    let (generation, version) = (of.generation.clone(), of.version.clone());
    #[allow(clippy::cast_precision_loss, reason = "connections of a node are few")]
    metrics::gauge!(
        "ztunnel_generation_connections", "generation" => generation, "version" => version, "state" => of.state
    )
    .set(connections as f64);
}

/// How a session ended.
enum Ended {
    /// It was one, or will be looked at again.
    Over,
    /// Whoever listens there is not ztunnel.
    Stranger,
}

impl Follower {
    /// Follows every drainer there is, until the drain.
    pub async fn run(self, drain: DrainWatcher) {
        let this = Arc::new(self);
        let mut sessions: JoinSet<(PathBuf, Ended)> = JoinSet::new();
        let (mut followed, mut strangers) = (BTreeSet::new(), BTreeSet::new());
        let mut scan = tokio::time::interval(SCAN);
        scan.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = scan.tick() => {
                    for socket in sockets(&this.sockets) {
                        if !strangers.contains(&socket) && followed.insert(socket.clone()) {
                            let this = this.clone();
                            sessions.spawn(async move {
                                let ended = this.follow(&socket).await;
                                (socket, ended)
                            });
                        }
                    }
                    let own = &this.generations.0.own;
                    gauge(own, this.registry.open_connections());
                }
                Some(ended) = sessions.join_next() => if let Ok((socket, ended)) = ended {
                    followed.remove(&socket);
                    if matches!(ended, Ended::Stranger) {
                        strangers.insert(socket);
                    }
                },
                // Ours to follow no longer: the successor does.
                () = drain.draining() => return,
            }
        }
    }

    async fn follow(&self, socket: &Path) -> Ended {
        let stream = match UnixStream::connect(socket).await {
            Ok(stream) => stream,
            Err(error) => {
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    // Its process has ended, and could not remove it.
                    let _ = std::fs::remove_file(socket);
                    cgroup::sweep(&self.cgroup_root);
                }
                return Ended::Over;
            }
        };
        if !is_trusted(&stream) {
            tracing::warn!(socket = %socket.display(), "not listened to: another user's process is behind it");
            return Ended::Stranger;
        }
        let (read, write) = stream.into_split();
        let mut lines = wire::reader(read);
        let mut session = Session { follower: self, table: BTreeMap::new(), out: wire::writer(write) };
        let hello = timeout(ANSWER, lines.next()).await.ok().flatten().and_then(Result::ok);
        let Some(generation) = hello.and_then(|line| self.greeted(&line)) else { return Ended::Over };
        tracing::info!(%generation, "following a ztunnel that drains");
        let outcome = session.run(&generation, &mut lines).await;
        self.generations.remove(&generation);
        let error = outcome.err().map(tracing::field::display);
        tracing::info!(%generation, error, "a ztunnel that drained has ended");
        Ended::Over
    }

    fn greeted(&self, line: &str) -> Option<String> {
        let Ok(FromDrainer::Hello { generation, version, since, deadline }) = serde_json::from_str(line) else {
            return None;
        };
        self.generations.put(Generation {
            generation: generation.clone(),
            version,
            state: "draining",
            since,
            deadline: Some(deadline),
            connections: 0,
            received_bytes: 0,
            sent_bytes: 0,
        });
        Some(generation)
    }

    fn is_synced(&self) -> bool {
        self.synced.as_ref().is_none_or(|synced| *synced.borrow())
    }
}

/// A pod of the drainer.
#[derive(Default)]
struct Pod {
    workload: String,
    inbound: BTreeMap<u64, policy::Connection>,
}

/// One drainer that is followed.
struct Session<'a> {
    follower: &'a Follower,
    table: BTreeMap<String, Pod>,
    out: Writer<OwnedWriteHalf>,
}

impl Session<'_> {
    /// Until the drainer has ended.
    async fn run(
        &mut self,
        generation: &str,
        lines: &mut wire::Reader<tokio::net::unix::OwnedReadHalf>,
    ) -> Result<(), LinesCodecError> {
        let mut changes = self.follower.store.watch();
        let mut alive = tokio::time::interval(ALIVE);
        let mut presence = tokio::time::interval(GONE_CHECK);
        presence.reset();
        let mut stale = true;
        let revocations = self.follower.revocations.clone().unwrap_or_default();
        let mut loads = revocations.watch();
        if self.follower.revocations.is_some() {
            loads.mark_changed();
        }
        loop {
            if stale && self.follower.is_synced() {
                stale = false;
                let world = self.follower.store.snapshot();
                for (pod, ids) in denied(&mut self.table, &world) {
                    tracing::info!(%generation, %pod, cut = ids.len(), "policy no longer allows open connections");
                    self.say(&ToDrainer::Cut { pod, ids }).await?;
                }
            }
            // Every branch is cancel safe; what is not taken in one round is there in the next.
            tokio::select! {
                line = lines.next() => match line {
                    Some(line) => stale |= self.hear(generation, &line?),
                    None => return Ok(()),
                },
                changed = changes.changed() => match changed {
                    Ok(()) => stale = true,
                    Err(_) => return Ok(()),
                },
                Ok(()) = loads.changed() => for (piece, last) in revocation::pieces(&revocations) {
                    self.say(&ToDrainer::Revocations { piece, last }).await?;
                },
                _ = alive.tick() => {
                    let too_many = self.follower.generations.is_one_too_many(generation);
                    self.say(if too_many { &ToDrainer::End } else { &ToDrainer::Alive }).await?;
                }
                _ = presence.tick() => for pod in self.gone().await {
                    self.table.remove(&pod);
                    self.say(&ToDrainer::PodGone { pod }).await?;
                },
            }
        }
    }

    async fn say(&mut self, word: &ToDrainer) -> Result<(), LinesCodecError> {
        let said = timeout(ANSWER, wire::send(&mut self.out, word)).await;
        said.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
    }

    /// True when policy has to be asked.
    fn hear(&mut self, generation: &str, line: &str) -> bool {
        match serde_json::from_str(line) {
            Ok(FromDrainer::Connections { pod, workload, inbound }) => {
                let known = self.table.entry(pod).or_default();
                known.workload = workload;
                known.inbound.extend(inbound.into_iter().filter_map(connection));
                true
            }
            Ok(FromDrainer::State(state)) => {
                self.follower.generations.update(generation, &state);
                if state.log_lost > 0 {
                    tracing::warn!(%generation, lines = state.log_lost, "log lines of a draining ztunnel are lost");
                }
                counters::carry_on(state.counters);
                state.log.iter().for_each(|line| self.follower.log.pass_on(line, generation));
                false
            }
            Ok(FromDrainer::Hello { .. } | FromDrainer::Unknown) => false,
            Err(error) => {
                tracing::debug!(%generation, %error, "not understood");
                false
            }
        }
    }

    /// Pods of the drainer of which no process is left.
    async fn gone(&self) -> Vec<String> {
        let here: BTreeSet<String> = self.follower.registry.pods().iter().map(|pod| pod.uid.clone()).collect();
        let missing: BTreeSet<String> = self.table.keys().filter(|uid| !here.contains(*uid)).cloned().collect();
        if missing.is_empty() {
            return Vec::new();
        }
        let (finder, wanted) = (self.follower.finder.clone(), missing.clone());
        match tokio::task::spawn_blocking(move || finder.find(&wanted)).await {
            Ok(Ok(found)) => missing.into_iter().filter(|uid| !found.contains_key(uid)).collect(),
            // Nothing is known then.
            Ok(Err(_)) | Err(_) => Vec::new(),
        }
    }
}

/// What policy was asked when it let the connection in. One with an identity that cannot be read was never let in.
fn connection(inbound: Inbound) -> Option<(u64, policy::Connection)> {
    let source = inbound.identity.map(|identity| identity.parse()).transpose().ok()?;
    let original = inbound.original.map(|original| {
        original.identity.parse().map(|identity| policy::Original { identity, address: original.address })
    });
    let asked = policy::Connection {
        source,
        source_ip: inbound.source,
        destination: inbound.destination,
        original: original.transpose().ok()?,
    };
    Some((inbound.id, asked))
}

/// Takes out of the table what `world` no longer allows. As with connections of our own, those of a workload that is not
/// known are left alone.
fn denied(table: &mut BTreeMap<String, Pod>, world: &Snapshot) -> Vec<(String, Vec<u64>)> {
    let mut cuts = Vec::new();
    for (uid, pod) in table {
        let Some(workload) = world.workload(&pod.workload) else { continue };
        let gone = pod.inbound.extract_if(.., |_, asked| !still_allows(world.policies_for(workload), asked));
        let ids: Vec<u64> = gone.map(|(id, _)| id).collect();
        if !ids.is_empty() {
            cuts.push((uid.clone(), ids));
        }
    }
    cuts
}

fn sockets(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "sock")).collect()
}

#[cfg(test)]
mod tests {
    use mesh::model::{NamespacedName, Workload};
    use mesh::policy::{Action, Policy, Scope};
    use mesh::store::Update;

    use super::*;

    fn inbound(id: u64, identity: Option<&str>) -> Inbound {
        Inbound {
            id,
            identity: identity.map(str::to_owned),
            source: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 80).into(),
            original: None,
        }
    }

    #[test]
    fn a_client_behind_a_waypoint_is_asked_about_as_well() {
        let store = Store::new();
        let workload = Workload { uid: "w".into(), ..Default::default() }.with(|w| w.namespace = "shop".into());
        let rules = serde_json::json!([[[{"principals": [{"Suffix": "/sa/client"}]}]]]);
        let rules = serde_json::from_value(rules).unwrap();
        let only = Policy::new(NamespacedName::new("shop", "x"), Scope::Namespace, Action::Allow, rules);
        store.apply(Update::new().workload(workload).policy(only));
        let behind = |id, client: &str| {
            let identity = format!("spiffe://td/ns/shop/sa/{client}");
            let original = wire::Original { identity, address: ([10, 0, 0, 3], 0).into() };
            let told = Inbound { original: Some(original), ..inbound(id, Some("spiffe://td/ns/shop/sa/waypoint")) };
            let told: Inbound = serde_json::from_value(serde_json::to_value(told).unwrap()).unwrap();
            connection(told).expect("identities that can be read")
        };
        let pod = Pod { workload: "w".into(), inbound: [behind(1, "client"), behind(2, "other")].into() };
        let mut table = BTreeMap::from([("p".to_owned(), pod)]);
        assert_eq!(denied(&mut table, &store.snapshot()), [("p".to_owned(), vec![2])]);
    }

    #[test]
    fn what_policy_no_longer_allows_is_cut_once() {
        let store = Store::new();
        let workload = Workload { uid: "w".into(), ..Default::default() }.with(|w| w.namespace = "shop".into());
        store.apply(Update::new().workload(workload));
        let connections =
            [inbound(1, Some("spiffe://td/ns/shop/sa/a")), inbound(2, None), inbound(3, Some("nonsense"))];
        let pod = Pod { workload: "w".into(), inbound: connections.into_iter().filter_map(connection).collect() };
        assert_eq!(pod.inbound.len(), 2, "nobody has an identity that is none");
        let mut table = BTreeMap::from([("p".to_owned(), pod)]);
        assert!(denied(&mut table, &store.snapshot()).is_empty());
        // An ALLOW policy without rules allows nobody.
        let nobody = Policy::new(NamespacedName::new("shop", "x"), Scope::Namespace, Action::Allow, Vec::new());
        store.apply(Update::new().policy(nobody));
        assert_eq!(denied(&mut table, &store.snapshot()), [("p".to_owned(), vec![1, 2])]);
        assert!(denied(&mut table, &store.snapshot()).is_empty());
    }

    #[test]
    fn of_three_that_drain_the_oldest_is_one_too_many() {
        let generations = Generations::new("4", "v4", &Arc::default(), 2);
        for name in ["1", "2", "3"] {
            assert!(!generations.is_one_too_many("1"));
            let since = 0;
            let version = String::from("v");
            generations.put(Generation {
                generation: name.to_owned(),
                version,
                state: "draining",
                since,
                deadline: None,
                connections: 0,
                received_bytes: 0,
                sent_bytes: 0,
            });
        }
        assert!(generations.is_one_too_many("1") && !generations.is_one_too_many("2"));
        generations.remove("1");
        assert!(!generations.is_one_too_many("2"));
    }
}
