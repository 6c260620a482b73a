//! HBONE: one TCP connection as one HTTP/2 CONNECT stream over mutual TLS. Here are what is asked for (authority and
//! headers), the stream itself, the server that accepts streams and the pool that opens them.

use std::{fmt, io, net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use crate::{net::is_exhausted, telemetry::ResponseFlag, text::Text, tls::TlsError};

mod allowance;
mod client;
mod early;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod headers;
mod keepalive;
mod outbox;
mod pool;
mod sending;
mod server;
mod stream;

pub use client::{Tunnel, connect_once};
pub use early::{EarlyBytes, Meanwhile, StreamName};
pub use headers::{Baggage, ConnectHeaders, TraceParent};
pub use pool::{Pool, PoolKey, PoolSettings, PoolStats};
pub use server::{ConnectRequest, ServeError, serve};
pub use stream::HboneStream;

/// The port HBONE is spoken on.
pub const HBONE_PORT: u16 = 15008;

/// Bytes a stream may have waiting for its connection. It bridges the time until the connection's task runs, not the
/// way to the peer, and is what a stream costs whose peer does not read.
const SEND_BUFFER: usize = 512 * 1024;
/// Streams that one end has reset and still knows: what the other had sent before it heard of that is then dropped quietly. A
/// refused CONNECT is one, whose client may have said something already, and one whose client has gone.
const RESET_STREAMS: usize = 1024;
/// Resets in a connection's life that the other end is the cause of, after which h2 takes it for an attacker. It never
/// forgets one, and a pooled connection lives long.
const RESETS: usize = 1 << 20;

/// What a CONNECT asks for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Authority {
    Ip(SocketAddr),
    Host { host: Text, port: u16 },
}

/// An authority without host or port, or with one that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not host:port")]
pub struct AuthorityParseError(String);

/// As DNS has it; longer is nobody's name.
const MAX_HOST: usize = 253;

impl Authority {
    pub fn port(&self) -> u16 {
        match self {
            Self::Ip(addr) => addr.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl FromStr for Authority {
    type Err = AuthorityParseError;

    fn from_str(text: &str) -> Result<Self, AuthorityParseError> {
        let malformed = || AuthorityParseError(text.chars().take(MAX_HOST).collect());
        let authority = match text.parse::<SocketAddr>() {
            Ok(addr) => Self::Ip(crate::net::canonical(addr)),
            Err(_) => {
                let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
                let well_formed = (1..=MAX_HOST).contains(&host.len())
                    && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
                if !well_formed || !port.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(malformed());
                }
                let port = port.parse().map_err(|_| malformed())?;
                Self::Host { host: host.to_ascii_lowercase().into(), port }
            }
        };
        if authority.port() == 0 { Err(malformed()) } else { Ok(authority) }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(addr) => addr.fmt(f),
            Self::Host { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// HTTP/2 parameters of both roles.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct H2Settings {
    /// Bytes one stream may have in flight.
    pub stream_window: u32,
    /// Bytes one connection may have in flight. Must stay well above the stream window, or one stream that nobody reads
    /// stops the others.
    pub connection_window: u32,
    /// Longest DATA frame we accept.
    pub frame_size: u32,
    /// Streams a client may have open on one connection with us.
    pub max_streams: u32,
    /// Quiet time before a PING.
    pub keepalive: Duration,
    /// A PING unanswered this long means that the peer is gone.
    pub keepalive_timeout: Duration,
}

impl H2Settings {
    /// Bytes that a stream reads before it gives their credit back: per read it would cost a lock and, at worst, a frame. All
    /// streams together must not hold back a window, or nobody could send any more.
    fn release(&self) -> usize {
        let share = self.connection_window / self.max_streams.max(1) / 4 * 3;
        (64 * 1024).min(self.stream_window / 2).min(share).max(1) as usize
    }

    /// What small frames that nobody has taken yet may cost a connection, in the 256 bytes that h2 needs for each: twice what
    /// its window may. h2's own choice is half of it, which a peer that keeps to its window comes to.
    fn frame_budget(&self) -> usize {
        self.connection_window as usize * 2
    }
}

impl Default for H2Settings {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_size: 1 << 20,
            max_streams: 200,
            keepalive: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("connecting: {0}")]
    Connect(#[source] io::Error),
    #[error("connecting timed out; does a NetworkPolicy allow port {HBONE_PORT}?")]
    ConnectTimeout,
    #[error(transparent)]
    Tls(TlsError),
    #[error("http/2: {0}")]
    H2(#[source] h2::Error),
    #[error("tunnel: {0}")]
    Stream(#[source] h2::Error),
    #[error("tunnel: the peer answered {0}")]
    Status(http::StatusCode),
    #[error("tunnel: the peer did not answer the CONNECT in time")]
    ResponseTimeout,
    #[error("tunnel: the peer is gone: it answered neither the CONNECT nor a PING")]
    PeerGone,
    /// Several tunnels wanted the same connection, and one tried for all of them.
    #[error(transparent)]
    Shared(Arc<TunnelError>),
    #[error("tunnel: {0} is not an authority that can be asked for")]
    Authority(Authority),
    #[error("tunnel: connections to the peer keep closing before they can be used")]
    Unstable,
}

impl TunnelError {
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::Connect(error) if is_exhausted(error) => ResponseFlag::Exhausted,
            Self::Connect(_) | Self::Stream(_) | Self::Unstable => ResponseFlag::Connect,
            Self::ConnectTimeout => ResponseFlag::NetworkPolicy,
            Self::Tls(error) => error.flag(),
            Self::H2(_) => ResponseFlag::H2HandshakeFailure,
            Self::Status(http::StatusCode::UNAUTHORIZED) => ResponseFlag::Deny,
            Self::Status(_) => ResponseFlag::UpstreamRejected,
            Self::ResponseTimeout | Self::PeerGone => ResponseFlag::Timeout,
            Self::Shared(error) => error.flag(),
            Self::Authority(_) => ResponseFlag::BadRequest,
        }
    }

    /// An HTTP/2 error from a connection whose handshake the server may yet have refused: TLS 1.3 clients learn that
    /// their certificate is not accepted only at the first read, and h2 keeps of that no more than the text.
    fn from_h2(error: h2::Error, otherwise: fn(h2::Error) -> Self) -> Self {
        const ALERT: &str = "received fatal alert: ";
        if error.is_io()
            && let Some((_, alert)) = error.to_string().split_once(ALERT)
        {
            return Self::Tls(TlsError::Rejected(alert.to_owned()));
        }
        otherwise(error)
    }
}

#[cfg(test)]
mod tests;
