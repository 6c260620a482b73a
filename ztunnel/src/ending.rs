//! Every way a connection of the data path can end badly, by name, and what that means to log, metric and peer.

use std::io;
use std::net::SocketAddr;

use http::StatusCode;
use mesh::hbone::TunnelError;
use mesh::identity::{IdentityError, IdentityParseError};
use mesh::net::is_exhausted;
use mesh::policy::Denial;
use mesh::serve::CopyError;
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::Failure;
use thiserror::Error;

use crate::resolve::{BadTarget, NoRoute};

/// Why a connection did not end well.
#[derive(Debug, Error)]
pub enum Ending {
    #[error(transparent)]
    NoRoute(#[from] NoRoute),
    #[error(transparent)]
    BadTarget(#[from] BadTarget),
    #[error("workload {0} is not known from the control plane")]
    UnknownWorkload(String),
    #[error("workload {workload} is {found} for the control plane but {enrolled} was enrolled here")]
    WorkloadMismatch { workload: String, found: String, enrolled: String },
    #[error("workload {workload}: {source}")]
    BadIdentity { workload: String, source: IdentityParseError },
    #[error("certificate of the local workload: {0}")]
    Identity(#[from] IdentityError),
    #[error("tunnel to {to}: {source}")]
    Tunnel { to: SocketAddr, source: TunnelError },
    #[error("through gateway {gateway}: {source}")]
    Beyond { gateway: SocketAddr, source: TunnelError },
    #[error("connecting to {to}: {source}")]
    Connect { to: SocketAddr, source: io::Error },
    #[error("connecting to {to}: no answer within {seconds} s")]
    ConnectTimeout { to: SocketAddr, seconds: u64 },
    #[error("telling the application's proxy at {to} of the connection: {source}")]
    Announce { to: SocketAddr, source: io::Error },
    #[error("the pod has no address of the family of {0}")]
    NoSource(SocketAddr),
    #[error("policy: {0}")]
    Denied(#[from] Denial),
    #[error("a policy change no longer allows this connection")]
    DeniedLater,
    #[error("the peer's certificate has been revoked")]
    Revoked,
    #[error("the proxy or the pod is going away")]
    Drained,
    #[error("the client gave the tunnel up before it was answered")]
    GivenUp,
    #[error("answering the tunnel request: {0}")]
    Answer(TunnelError),
    #[error(transparent)]
    Copy(#[from] CopyError),
}

impl Ending {
    #[must_use]
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::NoRoute(e) => e.flag(),
            Self::BadTarget(_) => ResponseFlag::BadRequest,
            Self::Connect { source, .. } if is_exhausted(source) => ResponseFlag::Exhausted,
            Self::UnknownWorkload(_)
            | Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::Announce { .. }
            | Self::NoSource(_) => ResponseFlag::Connect,
            Self::WorkloadMismatch { .. } | Self::BadIdentity { .. } | Self::Identity(_) => ResponseFlag::IdentityError,
            Self::Tunnel { source, .. } | Self::Beyond { source, .. } | Self::Answer(source) => source.flag(),
            Self::Denied(_) | Self::DeniedLater => ResponseFlag::Deny,
            Self::Revoked => ResponseFlag::CertRevoked,
            Self::Drained => ResponseFlag::Drained,
            Self::GivenUp => ResponseFlag::Cancelled,
            Self::Copy(_) => ResponseFlag::Reset,
        }
    }

    /// What the peer of a tunnel request is told when the request ends so before it was answered.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadTarget(e) => e.status(),
            Self::Denied(_) | Self::DeniedLater | Self::Revoked => StatusCode::UNAUTHORIZED,
            Self::NoRoute(_)
            | Self::UnknownWorkload(_)
            | Self::WorkloadMismatch { .. }
            | Self::BadIdentity { .. }
            | Self::Identity(_)
            | Self::Tunnel { .. }
            | Self::Beyond { .. }
            | Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::Announce { .. }
            | Self::NoSource(_)
            | Self::Drained
            | Self::GivenUp
            | Self::Answer(_)
            | Self::Copy(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl From<Ending> for Failure {
    fn from(ending: Ending) -> Self {
        Self::new(ending.flag(), &ending)
    }
}

#[cfg(test)]
mod tests;
