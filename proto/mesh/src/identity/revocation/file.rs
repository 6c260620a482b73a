//! Lists from a file (`CRL_PATH`), taken anew whenever it changes.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{RevocationError, Revocations};
use crate::drain::DrainWatcher;

/// How often the file is looked at. It is read once it looks the same twice: somebody may be writing it.
const POLL: Duration = Duration::from_millis(500);

/// What tells one version of a file from another. By path, so that a symbolic link that is turned elsewhere (which is how
/// a kubelet changes a ConfigMap) shows as another file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

/// A file of lists that is followed.
pub struct RevocationFile {
    path: PathBuf,
    revocations: Revocations,
    /// Of what was read last, whether or not it could be taken, so that each mistake is told once.
    taken: Option<Stamp>,
    /// At the last look.
    seen: Option<Stamp>,
    /// It has been told that the file is away.
    missing: bool,
    /// The date of which it has been told that it has passed.
    outdated: Option<SystemTime>,
}

impl RevocationFile {
    /// Takes the file as it is now. One that does not exist (yet) is no mistake, as with Istio's ztunnel: the ConfigMap
    /// of a mesh without revocations does not exist either.
    ///
    /// # Errors
    /// A file that is there and cannot be read or understood: starting without the lists somebody wrote would let in
    /// whom they name.
    pub fn open(path: &Path, revocations: Revocations) -> Result<Self, RevocationError> {
        let (taken, seen, outdated) = (None, None, None);
        let mut file = Self { path: path.to_owned(), revocations, taken, seen, missing: false, outdated };
        match stamp(path) {
            Ok(stamp) => file.take(stamp)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), "there is no file of revocation lists: nobody is revoked");
                file.missing = true;
            }
            Err(error) => return Err(file.unreadable(error)),
        }
        Ok(file)
    }

    fn unreadable(&self, error: io::Error) -> RevocationError {
        RevocationError::Read(self.path.display().to_string(), error)
    }

    fn take(&mut self, stamp: Stamp) -> Result<(), RevocationError> {
        self.taken = Some(stamp);
        let bytes = std::fs::read(&self.path).map_err(|error| self.unreadable(error));
        let outcome = bytes.and_then(|bytes| self.revocations.load(&bytes));
        let label = if outcome.is_ok() { "taken" } else { "refused" };
        metrics::counter!("mesh_crl_loads_total", "outcome" => label).increment(1);
        let loaded = outcome?;
        let (lists, entries, cut) = (loaded.lists, loaded.entries, loaded.cut);
        tracing::info!(path = %self.path.display(), lists, entries, cut, "revocation lists taken");
        Ok(())
    }

    /// Follows the file until the drain begins. What cannot be understood, and a file that goes away, leave what was
    /// loaded in force.
    pub async fn run(mut self, drain: DrainWatcher) {
        loop {
            tokio::select! {
                () = drain.draining() => return,
                () = tokio::time::sleep(POLL) => self.look(),
            }
        }
    }

    pub(super) fn look(&mut self) {
        let path = self.path.clone();
        let path = path.display();
        match stamp(&self.path) {
            Ok(now) => {
                self.missing = false;
                if self.taken != Some(now)
                    && self.seen == Some(now)
                    && let Err(error) = self.take(now)
                {
                    tracing::error!(%path, "{error}; the revocation lists from before stay");
                }
                self.seen = Some(now);
            }
            Err(error) if !self.missing => {
                self.missing = true;
                tracing::error!(%path, %error, "revocation lists cannot be read; those from before stay");
            }
            Err(_) => {}
        }
        let due = self.revocations.next_update();
        if due != self.outdated && due.is_some_and(|due| due <= SystemTime::now()) {
            self.outdated = due;
            tracing::warn!(%path,
                "a revocation list is past its nextUpdate: whom it names stays revoked, newer revocations are missing");
        }
    }
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let metadata = std::fs::metadata(path)?;
    let modified = (metadata.mtime(), metadata.mtime_nsec());
    Ok(Stamp { device: metadata.dev(), inode: metadata.ino(), length: metadata.len(), modified })
}
