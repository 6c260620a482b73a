//! The ztunnel that has left its container: it serves the connections it has, listens to its successor, and ends.
//!
//! It ends when the last connection has, and otherwise, cutting what is open, when its time is up, no successor was
//! heard of for a while, ztunnel was uninstalled, there are too many generations, or it is asked to by SIGTERM.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::future::join_all;
use mesh::identity::Revocations;
use mesh::telemetry::{LogHandle, MetricsHandle};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::Signal;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::counters::{self, Told};
use super::wire::{self, FromDrainer, Inbound, PIECE, State, ToDrainer, Writer};
use super::{UNINSTALL_MARKER, is_trusted, unix_seconds};
use crate::node::Registry;
use crate::node::pod::Way;
use crate::revocation::{self, Pieces};

/// How often state is told and the bounds are looked at.
const TICK: Duration = Duration::from_secs(1);
/// The registry is read every so many ticks: its text may be megabytes.
const COUNT_EVERY: u32 = 3;
/// For a successor to take what it is told.
const TELL_TIMEOUT: Duration = Duration::from_secs(2);
/// For connections that were cut to be recorded.
const LAST_RECORDS: Duration = Duration::from_secs(1);
/// Successors at a time: the next one starts while the last still serves.
const MOST_SESSIONS: usize = 4;
/// Words of successors that wait to be acted on; the readers wait when full.
const WORDS: usize = 64;
/// Of one message, so that lines stay short.
const COUNTERS: usize = 200;
const LOG_BYTES: usize = 256 << 10;

/// What a draining ztunnel is, and how long it may be.
pub struct Drainer {
    pub generation: String,
    pub version: String,
    pub since: SystemTime,
    /// From now on.
    pub limit: Duration,
    /// How long without a successor.
    pub orphaned: Duration,
    pub run_dir: PathBuf,
    pub registry: Arc<Registry>,
    /// What its connections are cut by, where they can be revoked.
    pub revocations: Option<Revocations>,
    pub metrics: MetricsHandle,
    pub log: LogHandle,
}

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Finished,
    TimeIsUp,
    NoSuccessor,
    Uninstalled,
    TooManyGenerations,
    Asked,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finished => "the last connection has ended",
            Self::TimeIsUp => "its time is up",
            Self::NoSuccessor => "no successor was heard of",
            Self::Uninstalled => "ztunnel was uninstalled",
            Self::TooManyGenerations => "there are newer generations that drain",
            Self::Asked => "it was asked to",
        })
    }
}

/// A successor that listens.
struct Session {
    id: u64,
    out: Writer<OwnedWriteHalf>,
}

/// What a successor said; `None`: it is gone.
type Word = (u64, Option<ToDrainer>);

impl Drainer {
    /// Drains until one of the ends. Needs a runtime that makes no threads: the process is sealed.
    pub async fn run(self, control: UnixListener, mut terminate: Signal) -> End {
        let (heard, mut words) = mpsc::channel::<Word>(WORDS);
        let mut told = Told::all(&self.metrics.render());
        let mut sessions: Vec<Session> = Vec::new();
        let (started, mut last_heard) = (Instant::now(), Instant::now());
        let pods = self.registry.pods();
        let mut finished = Box::pin(join_all(pods.iter().map(|pod| pod.finished())));
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut ticks, mut next) = (0, 0);
        let mut lists: BTreeMap<u64, Pieces> = BTreeMap::new();
        // Every branch is cancel safe: what is not taken in one round is there in the next.
        let end = loop {
            tokio::select! {
                _ = &mut finished => break End::Finished,
                _ = terminate.recv() => break End::Asked,
                () = tokio::time::sleep_until(started + self.limit) => break End::TimeIsUp,
                Ok((stream, _)) = control.accept() => {
                    if !is_trusted(&stream) {
                        tracing::warn!("somebody who is not our user spoke to the draining ztunnel; not answered");
                    } else if let Some(session) = self.greet(stream, next, &heard).await {
                        next += 1;
                        last_heard = Instant::now();
                        if sessions.len() >= MOST_SESSIONS {
                            sessions.remove(0);
                        }
                        sessions.push(session);
                    }
                }
                Some((id, word)) = words.recv() => {
                    let Some(word) = word else {
                        sessions.retain(|session| session.id != id);
                        lists.remove(&id);
                        continue;
                    };
                    last_heard = Instant::now();
                    if self.obey(word, lists.entry(id).or_default()) {
                        break End::TooManyGenerations;
                    }
                }
                _ = tick.tick() => {
                    if self.run_dir.join(UNINSTALL_MARKER).exists() {
                        break End::Uninstalled;
                    }
                    if last_heard.elapsed() > self.orphaned {
                        break End::NoSuccessor;
                    }
                    self.tell(&mut sessions, &mut told, ticks % COUNT_EVERY == 0).await;
                    ticks = ticks.wrapping_add(1);
                }
            }
        };
        tracing::info!(generation = %self.generation, open = self.open(), "draining ends: {end}");
        for pod in &pods {
            pod.cut();
        }
        let _ = timeout(LAST_RECORDS, finished_or_empty(&mut finished, end)).await;
        self.tell(&mut sessions, &mut told, true).await;
        end
    }

    fn open(&self) -> usize {
        self.registry.pods().iter().map(|pod| pod.connections.len()).sum()
    }

    /// Says who we are and what is open, and reads from then on.
    async fn greet(&self, stream: UnixStream, id: u64, heard: &mpsc::Sender<Word>) -> Option<Session> {
        let (read, write) = stream.into_split();
        let mut session = Session { id, out: wire::writer(write) };
        let hello = FromDrainer::Hello {
            generation: self.generation.clone(),
            version: self.version.clone(),
            since: unix_seconds(self.since),
            deadline: unix_seconds(self.since + self.limit),
        };
        let mut messages = vec![hello];
        for pod in self.registry.pods() {
            let inbound: Vec<Inbound> = pod.connections.inbound().collect();
            // A pod that has none is told as well, so that its end can be told back.
            let pieces: Vec<&[Inbound]> =
                if inbound.is_empty() { vec![&inbound] } else { inbound.chunks(PIECE).collect() };
            messages.extend(pieces.into_iter().map(|piece| FromDrainer::Connections {
                pod: pod.uid.clone(),
                workload: pod.workload_uid.to_string(),
                inbound: piece.to_vec(),
            }));
        }
        let told = async {
            for message in &messages {
                wire::send(&mut session.out, message).await?;
            }
            Ok::<_, tokio_util::codec::LinesCodecError>(())
        };
        if !matches!(timeout(TELL_TIMEOUT, told).await, Ok(Ok(()))) {
            return None;
        }
        let heard = heard.clone();
        // Ends with its stream, at the latest with the process.
        tokio::spawn(async move {
            let mut lines = wire::reader(read);
            while let Some(Ok(line)) = lines.next().await {
                let word = serde_json::from_str(&line).unwrap_or(ToDrainer::Unknown);
                if heard.send((id, Some(word))).await.is_err() {
                    return;
                }
            }
            // An error means that the draining is over.
            let _ = heard.send((id, None)).await;
        });
        Some(session)
    }

    /// True when it is to end.
    fn obey(&self, word: ToDrainer, lists: &mut Pieces) -> bool {
        match word {
            ToDrainer::Cut { pod, ids } => {
                for found in self.registry.pods().iter().filter(|p| p.uid == pod) {
                    let cut = found.connections.cut(&ids);
                    let (pod, namespace) = (&found.name, &found.namespace);
                    tracing::info!(%pod, %namespace, cut, "policy no longer allows open connections");
                }
            }
            ToDrainer::PodGone { pod } => {
                for gone in self.registry.pods().iter().filter(|p| p.uid == pod) {
                    gone.cut();
                }
            }
            ToDrainer::Revocations { piece, last } => match lists.take(&piece, last) {
                Ok(Some(lists)) => self.revoke(&lists),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "revocation lists of the successor"),
            },
            ToDrainer::End => return true,
            ToDrainer::Alive | ToDrainer::Unknown => {}
        }
        false
    }

    /// There are no new handshakes, so all that lists can do here is cut.
    fn revoke(&self, lists: &[u8]) {
        // Without the setting there was nothing to remember of the peers.
        let Some(revocations) = &self.revocations else { return };
        match revocations.load(lists) {
            Ok(_) => revocation::cut(&self.registry),
            Err(error) => tracing::warn!(%error, "revocation lists of the successor"),
        }
    }

    /// All sessions learn the numbers; what may be counted only once goes to the newest.
    async fn tell(&self, sessions: &mut Vec<Session>, told: &mut Told, count: bool) {
        let Some(newest) = sessions.last().map(|session| session.id) else { return };
        let connections = self.open();
        let registry = if count { self.metrics.render() } else { String::new() };
        let (received, sent) = counters::bytes(&registry);
        let mut grown = told.growth(&registry);
        let mut lost = Vec::new();
        let mut first = true;
        // At least one message, and as many as there is to tell.
        loop {
            let rest = grown.split_off(grown.len().min(COUNTERS));
            let piece = std::mem::replace(&mut grown, rest);
            let (log, log_lost) = self.log.take_kept(LOG_BYTES);
            if !first && piece.is_empty() && log.is_empty() {
                break;
            }
            let numbers = State { connections, received, sent, counted: count, ..State::default() };
            let mut full = numbers.clone();
            full.counters = piece.iter().map(|grown| grown.counted.clone()).collect();
            (full.log, full.log_lost) = (log, log_lost);
            let (full, numbers) = (FromDrainer::State(full), FromDrainer::State(numbers));
            for session in sessions.iter_mut().filter(|session| first || session.id == newest) {
                let message = if session.id == newest { &full } else { &numbers };
                if !matches!(timeout(TELL_TIMEOUT, wire::send(&mut session.out, message)).await, Ok(Ok(()))) {
                    lost.push(session.id);
                }
            }
            if lost.contains(&newest) {
                break;
            }
            told.note(piece);
            first = false;
        }
        sessions.retain(|session| !lost.contains(&session.id));
    }
}

/// Such a future must not be asked again once it has answered.
async fn finished_or_empty<F: Future + Unpin>(finished: &mut F, end: End) {
    if end != End::Finished {
        finished.await;
    }
}

impl crate::node::pod::Connections {
    /// The connections that policy was asked about.
    fn inbound(&self) -> impl Iterator<Item = Inbound> {
        let asked = self.asked(Way::Inbound);
        asked.into_iter().map(|(id, connection)| Inbound {
            id,
            identity: connection.source.as_ref().map(ToString::to_string),
            source: connection.source_ip,
            destination: connection.destination,
            original: connection
                .original
                .map(|original| wire::Original { identity: original.identity.to_string(), address: original.address }),
        })
    }
}
