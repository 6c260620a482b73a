//! Revoked certificates (`CRL_PATH`): the lists' file, and the cut of what is open. Whom a list names is refused and
//! loses its TLS connections in `mesh`; here its tunnels get the right ending, in this process and in those that drain.

use std::io;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mesh::drain::DrainWatcher;
use mesh::identity::{RevocationFile, Revocations};

use crate::node::Registry;

/// Base64 in one message to a drainer: its lines are bounded.
const PIECE: usize = 512 << 10;
/// No lists are longer; who sends more sends none.
const LONGEST: usize = 64 << 20;

/// The lists of the file at `path`, and what follows the file.
///
/// # Errors
/// A file that is there and cannot be used.
pub fn open(path: &Path) -> anyhow::Result<(Revocations, RevocationFile)> {
    let revocations = Revocations::default();
    let file = RevocationFile::open(path, revocations.clone())
        .with_context(|| format!("CRL_PATH={}: not starting without these lists", path.display()))?;
    Ok((revocations, file))
}

/// Ends the tunnels of revoked peers after each load, until the drain.
pub async fn cut_on_load(revocations: Revocations, registry: Arc<Registry>, drain: DrainWatcher) {
    let mut loads = revocations.watch();
    loop {
        tokio::select! {
            loaded = loads.changed() => if loaded.is_err() { return },
            () = drain.draining() => return,
        }
        cut(&registry);
    }
}

/// Ends the tunnels whose peer is revoked.
pub fn cut(registry: &Registry) {
    for pod in registry.pods() {
        let cut = pod.connections.cut_revoked();
        if cut > 0 {
            tracing::info!(pod = %pod.name, namespace = %pod.namespace, cut, "peers of open connections are revoked");
        }
    }
}

/// The lists in force as texts to send, the last of them marked. There is always one.
pub fn pieces(revocations: &Revocations) -> Vec<(String, bool)> {
    let text = STANDARD.encode(revocations.lists().concat());
    let count = text.len().div_ceil(PIECE).max(1);
    (0..count)
        .map(|n| (text[(n * PIECE).min(text.len())..((n + 1) * PIECE).min(text.len())].to_owned(), n + 1 == count))
        .collect()
}

/// Lists that come in pieces.
#[derive(Default)]
pub struct Pieces(String);

impl Pieces {
    /// All of it with the `last` one, in DER.
    ///
    /// # Errors
    /// What cannot be lists; what came of it is forgotten.
    pub fn take(&mut self, piece: &str, last: bool) -> io::Result<Option<Vec<u8>>> {
        if self.0.len() + piece.len() > LONGEST {
            self.0 = String::new();
            return Err(io::Error::other("revocation lists that are too long"));
        }
        self.0.push_str(piece);
        last.then(|| STANDARD.decode(std::mem::take(&mut self.0)).map_err(io::Error::other)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_arrive_as_they_were_however_many_pieces_they_take() {
        use rcgen::{
            CertificateParams, CertificateRevocationListParams, DnType, Issuer, KeyIdMethod, KeyPair,
            RevokedCertParams, SerialNumber, date_time_ymd,
        };
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        let issuer = Issuer::new(params, KeyPair::generate().unwrap());
        let list = |entries: u32| {
            let revoked = (0..entries).map(|n| RevokedCertParams {
                serial_number: SerialNumber::from_slice(&[&[1; 12][..], &n.to_be_bytes()].concat()),
                revocation_time: date_time_ymd(2026, 1, 1),
                reason_code: None,
                invalidity_date: None,
            });
            let list = CertificateRevocationListParams {
                this_update: date_time_ymd(2026, 1, 1),
                next_update: date_time_ymd(2036, 1, 1),
                crl_number: 1u64.into(),
                issuing_distribution_point: None,
                revoked_certs: revoked.collect(),
                key_identifier_method: KeyIdMethod::Sha256,
            };
            list.signed_by(&issuer).unwrap().der().to_vec()
        };
        for lists in [vec![], vec![list(1)], vec![list(1), list(30_000)]] {
            let (sent, received) = (Revocations::default(), Revocations::default());
            sent.load(&lists.concat()).unwrap();
            let mut whole = Pieces::default();
            let mut loaded = None;
            let sizes: Vec<usize> = pieces(&sent).iter().map(|(piece, _)| piece.len()).collect();
            assert!(sizes.iter().all(|size| *size <= PIECE) && (sizes.len() > 1) == (lists.len() > 1), "{sizes:?}");
            for (piece, last) in pieces(&sent) {
                assert!(loaded.is_none(), "nothing comes after the last");
                loaded = whole.take(&piece, last).unwrap();
            }
            received.load(&loaded.expect("the last piece completes it")).unwrap();
            assert_eq!(received.lists(), sent.lists());
            assert_eq!(received.lists().len(), lists.len());
        }
        assert!(Pieces::default().take("no base64!", true).is_err());
    }
}
