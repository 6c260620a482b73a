//! One connection to the agent, as a state machine without sockets: packets in, orders and answers out.
//!
//! ```text
//! (connected) ──hello──► snapshot ──SnapshotSent──► live
//!                        Add Keep Del               Add Del
//! ```
//! The agent sends one request and waits for its answer. What it may not send is a [`Violation`]; it is answered as an
//! error, and then the connection ends.

use std::collections::BTreeSet;

use mesh_proto::zds::workload_request::Payload;
use mesh_proto::zds::workload_response::Payload as Answer;
use mesh_proto::zds::{Ack, Version, WorkloadRequest, WorkloadResponse, ZdsHello};
use prost::Message;
use thiserror::Error;

/// The longest message, either way, in bytes.
pub const LONGEST: usize = 1024;
/// What of an error's text is told; the rest of the packet is framing.
const LONGEST_TEXT: usize = 1000;

/// One packet as it came off the socket. `F` is an open file; tests have numbers instead.
#[derive(Debug)]
pub struct Packet<'a, F> {
    pub bytes: &'a [u8],
    pub files: Vec<F>,
    /// What the kernel could not hand over.
    pub lost: Option<Lost>,
}

/// The part of a packet that was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// `MSG_TRUNC`.
    Bytes,
    /// `MSG_CTRUNC`.
    Files,
}

/// Who a pod is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInfo {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
}

/// What is to be done before the request is answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Order<F> {
    /// Serve the pod in this namespace. It may be served already.
    Start(PodInfo, F),
    /// A pod that is served goes on being so.
    Keep(String),
    Stop(String),
    /// The snapshot is complete: whatever is not in this set is gone.
    Reconcile(BTreeSet<String>),
}

/// What the agent must not do.
#[derive(Debug, Error)]
pub enum Violation {
    #[error("a message is longer than {LONGEST} bytes")]
    TooLong,
    #[error("more file descriptors than one came with a message")]
    FilesLost,
    #[error("a message cannot be decoded: {0}")]
    Undecodable(#[from] prost::DecodeError),
    #[error("a message is of no known kind")]
    Unknown,
    #[error("{kind} came with {got} file descriptors instead of {expected}")]
    Files { kind: &'static str, expected: usize, got: usize },
    #[error("{0} names no pod")]
    NoUid(&'static str),
    #[error("an added pod comes without {0}")]
    Incomplete(&'static str),
    #[error("Keep after the snapshot")]
    LateKeep,
    #[error("a second snapshot")]
    SecondSnapshot,
}

/// What a violation means for the pods that are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consequence {
    /// They go on; another connection sets things right.
    Reconnect,
    /// Which pods exist is not known any more: none is served until the agent has told anew.
    StopAll,
}

impl Violation {
    #[must_use]
    pub const fn consequence(&self) -> Consequence {
        match self {
            Self::TooLong
            | Self::FilesLost
            | Self::Undecodable(_)
            | Self::Unknown
            | Self::Files { .. }
            | Self::NoUid(_)
            | Self::Incomplete(_) => Consequence::Reconnect,
            Self::LateKeep | Self::SecondSnapshot => Consequence::StopAll,
        }
    }
}

/// How far a connection has come.
#[derive(Debug)]
enum Phase {
    /// With the pods that were named so far.
    Snapshot(BTreeSet<String>),
    Live,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Session {
    phase: Phase,
}

impl Default for Session {
    fn default() -> Self {
        Self { phase: Phase::Snapshot(BTreeSet::new()) }
    }
}

impl Session {
    /// The packet that opens every connection.
    #[must_use]
    pub fn hello() -> Vec<u8> {
        ZdsHello { version: Version::V1.into() }.encode_to_vec()
    }

    /// Whether the agent has named every pod it has.
    #[must_use]
    pub const fn is_synced(&self) -> bool {
        matches!(self.phase, Phase::Live)
    }

    /// Takes the next request.
    ///
    /// # Errors
    /// What is wrong with it. Files that came with it are closed by being dropped.
    pub fn handle_packet<F>(&mut self, packet: Packet<'_, F>) -> Result<Order<F>, Violation> {
        match packet.lost {
            Some(Lost::Bytes) => return Err(Violation::TooLong),
            Some(Lost::Files) => return Err(Violation::FilesLost),
            None => {}
        }
        let request = WorkloadRequest::decode(packet.bytes)?;
        match request.payload.ok_or(Violation::Unknown)? {
            Payload::Add(add) => {
                let uid = named("Add", add.uid)?;
                let info = add.workload_info.ok_or(Violation::Incomplete("workload_info"))?;
                let info = PodInfo {
                    name: given("name", info.name)?,
                    namespace: given("namespace", info.namespace)?,
                    service_account: given("service_account", info.service_account)?,
                    uid,
                };
                let file = only(packet.files)?;
                self.name(&info.uid);
                Ok(Order::Start(info, file))
            }
            Payload::Keep(keep) => {
                none("Keep", &packet.files)?;
                let uid = named("Keep", keep.uid)?;
                match &mut self.phase {
                    Phase::Snapshot(seen) => seen.insert(uid.clone()),
                    Phase::Live => return Err(Violation::LateKeep),
                };
                Ok(Order::Keep(uid))
            }
            Payload::Del(del) => {
                none("Del", &packet.files)?;
                let uid = named("Del", del.uid)?;
                if let Phase::Snapshot(seen) = &mut self.phase {
                    seen.remove(&uid);
                }
                Ok(Order::Stop(uid))
            }
            Payload::SnapshotSent(_) => {
                none("SnapshotSent", &packet.files)?;
                match std::mem::replace(&mut self.phase, Phase::Live) {
                    Phase::Snapshot(seen) => Ok(Order::Reconcile(seen)),
                    Phase::Live => Err(Violation::SecondSnapshot),
                }
            }
        }
    }

    fn name(&mut self, uid: &str) {
        if let Phase::Snapshot(seen) = &mut self.phase {
            seen.insert(uid.to_owned());
        }
    }
}

/// The answer to a request; an empty text says that all is well.
#[must_use]
pub fn ack(error: &str) -> Vec<u8> {
    let end = (0..=LONGEST_TEXT.min(error.len())).rev().find(|n| error.is_char_boundary(*n)).unwrap_or(0);
    WorkloadResponse { payload: Some(Answer::Ack(Ack { error: error[..end].to_owned() })) }.encode_to_vec()
}

fn named(kind: &'static str, uid: String) -> Result<String, Violation> {
    if uid.is_empty() { Err(Violation::NoUid(kind)) } else { Ok(uid) }
}

fn given(field: &'static str, value: String) -> Result<String, Violation> {
    if value.is_empty() { Err(Violation::Incomplete(field)) } else { Ok(value) }
}

fn only<F>(files: Vec<F>) -> Result<F, Violation> {
    let got = files.len();
    let mut files = files.into_iter();
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(file),
        _ => Err(Violation::Files { kind: "Add", expected: 1, got }),
    }
}

fn none<F>(kind: &'static str, files: &[F]) -> Result<(), Violation> {
    if files.is_empty() { Ok(()) } else { Err(Violation::Files { kind, expected: 0, got: files.len() }) }
}

#[cfg(test)]
mod tests;
