//! What the fuzz targets (`tests/fuzz`) reach and nobody else may. It exists in their builds only.

use rustls::pki_types::CertificateDer;

use crate::{identity::Identity, store::Snapshot, telemetry};

pub use crate::hbone::fuzzing::{ask, frames_in_pieces, pipe, sending, while_unanswered};
pub use telemetry::{LogFormat, capture};

/// The mesh identities a peer's certificate names.
pub fn identities(certificate: &[u8]) -> Option<Vec<Identity>> {
    crate::identity::identities(&CertificateDer::from(certificate)).ok()
}

/// Do both hold the same, however it came there?
pub fn are_alike(one: &Snapshot, other: &Snapshot) -> bool {
    one.is_like(other)
}
