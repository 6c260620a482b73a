//! How a connection ended, in one word.

use std::fmt;

/// The `response_flags` label. Each way a connection can end has one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ResponseFlag {
    /// It went well.
    #[default]
    None,
    /// Refused by an authorization policy.
    Deny,
    /// The destination did not accept a connection, or the path to it broke while connecting.
    Connect,
    /// No TLS session: not authenticated, or not TLS at all.
    TlsFailure,
    /// TLS stood but HTTP/2 did not come up on it.
    H2HandshakeFailure,
    /// A connect to the HBONE port timed out: most likely a NetworkPolicy blocks 15008.
    NetworkPolicy,
    /// No certificate of our own to speak with.
    IdentityError,
    /// The peer's certificate has been revoked.
    CertRevoked,
    /// The destination has a waypoint and none of its instances can be used.
    WaypointUnavailable,
    /// The service has no endpoint that can be used.
    NoHealthyUpstream,
    /// The other side took too long to answer.
    Timeout,
    /// Broken by either side while bytes were flowing.
    Reset,
    /// Cut at the drain deadline.
    Drained,
    /// Given up before it had an outcome, by us or by whoever asked.
    Cancelled,
    /// Cut, or not taken on, for the sake of the others: a flood of frames or of handshakes.
    Overload,
    /// The peer asked for something that makes no sense.
    BadRequest,
    /// The peer answered the CONNECT with an error.
    UpstreamRejected,
    /// We have no descriptor, port or memory left for another connection.
    Exhausted,
}

impl ResponseFlag {
    /// The wire spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
            Self::WaypointUnavailable => "WAYPOINT_UNAVAILABLE",
            Self::NoHealthyUpstream => "NO_HEALTHY_UPSTREAM",
            Self::Timeout => "TIMEOUT",
            Self::Reset => "RESET",
            Self::Drained => "DRAINED",
            Self::Cancelled => "CANCELLED",
            Self::Overload => "OVERLOAD",
            Self::BadRequest => "BAD_REQUEST",
            Self::UpstreamRejected => "UPSTREAM_REJECTED",
            Self::Exhausted => "EXHAUSTED",
        }
    }
}

impl fmt::Display for ResponseFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
