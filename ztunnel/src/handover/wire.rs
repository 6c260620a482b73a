//! What a draining ztunnel and its successor say to each other: one JSON object a line, either way.
//!
//! The two are of different versions by nature. So a message nobody knows is passed over, a field nobody knows is
//! ignored, and none is ever given another meaning.

use std::net::{IpAddr, SocketAddr};

use futures_util::SinkExt;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{FramedRead, FramedWrite, LinesCodec, LinesCodecError};

/// Longer lines end the session: the table comes in pieces of [`PIECE`] connections.
const LONGEST_LINE: usize = 1 << 20;
/// Connections in one message.
pub const PIECE: usize = 500;

/// From the draining ztunnel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum FromDrainer {
    /// First of all.
    Hello { generation: String, version: String, since: u64, deadline: u64 },
    /// Some of the inbound connections of a pod. A sealed process gets no new ones, so this is said once.
    Connections { pod: String, workload: String, inbound: Vec<Inbound> },
    /// Every second, and once more at the end.
    State(State),
    #[serde(other)]
    Unknown,
}

/// An inbound connection and the grounds on which policy let it in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inbound {
    pub id: u64,
    /// SPIFFE ID that TLS proved; none for plaintext.
    pub identity: Option<String>,
    pub source: IpAddr,
    pub destination: SocketAddr,
    /// The client that the peer, a waypoint, speaks for. Who does not know of it asks policy about the waypoint alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<Original>,
}

/// As the waypoint has told it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Original {
    /// SPIFFE ID.
    pub identity: String,
    pub address: SocketAddr,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Open connections, both ways.
    pub connections: usize,
    /// Are the bytes told this time? Counting them costs, so they are not told every second.
    pub counted: bool,
    /// Bytes carried since the process started.
    pub received: u64,
    pub sent: u64,
    /// What counters grew by since the last time.
    pub counters: Vec<Counted>,
    /// Log lines since the last time, and how many there was no room for.
    pub log: Vec<String>,
    pub log_lost: u64,
}

/// One counter of the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub by: u64,
}

/// To the draining ztunnel. Any of these shows that there is a successor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase")]
pub enum ToDrainer {
    Alive,
    /// Policy no longer allows these connections of the pod.
    Cut {
        pod: String,
        ids: Vec<u64>,
    },
    /// The pod is no more.
    PodGone {
        pod: String,
    },
    /// Whose certificates are revoked, all of them: lists in DER as base64, in pieces.
    Revocations {
        piece: String,
        last: bool,
    },
    /// There are too many generations, and this is the oldest.
    End,
    #[serde(other)]
    Unknown,
}

/// The reading half of a session.
pub type Reader<R> = FramedRead<R, LinesCodec>;
/// The writing half.
pub type Writer<W> = FramedWrite<W, LinesCodec>;

pub fn reader<R: AsyncRead>(from: R) -> Reader<R> {
    FramedRead::new(from, LinesCodec::new_with_max_length(LONGEST_LINE))
}

pub fn writer<W: AsyncWrite>(to: W) -> Writer<W> {
    FramedWrite::new(to, LinesCodec::new())
}

/// # Errors
/// When the other side has gone.
pub async fn send<W, M>(to: &mut Writer<W>, message: &M) -> Result<(), LinesCodecError>
where
    W: AsyncWrite + Unpin,
    M: Serialize + Sync,
{
    let line = serde_json::to_string(message).map_err(std::io::Error::from)?;
    to.send(line).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_newer_version_says_is_passed_over_and_not_misread() {
        let new: ToDrainer = serde_json::from_str(r#"{"type":"cutAll","but":["x"]}"#).unwrap();
        assert_eq!(new, ToDrainer::Unknown);
        let more: ToDrainer = serde_json::from_str(r#"{"type":"cut","pod":"p","ids":[1],"why":"x"}"#).unwrap();
        assert_eq!(more, ToDrainer::Cut { pod: "p".into(), ids: vec![1] });
        let state: FromDrainer = serde_json::from_str(r#"{"type":"state","connections":3,"mood":"good"}"#).unwrap();
        assert_eq!(state, FromDrainer::State(State { connections: 3, ..State::default() }));
    }
}
