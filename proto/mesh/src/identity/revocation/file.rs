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

/// As much as goes to draining generations as well.
const LONGEST: usize = 32 << 20;

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
    /// It has been told that it cannot be read.
    unread: bool,
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
        let mut file =
            Self { path: path.to_owned(), revocations, taken, seen, missing: false, unread: false, outdated };
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
        // Not taken, so that it is tried again: it may have been for want of descriptors.
        let bytes = std::fs::read(&self.path).map_err(|error| self.unreadable(error))?;
        self.taken = Some(stamp);
        let outcome = self.check(&bytes).and_then(|()| self.revocations.load(&bytes));
        let label = if outcome.is_ok() { "taken" } else { "refused" };
        metrics::counter!("mesh_crl_loads_total", "outcome" => label).increment(1);
        let loaded = outcome?;
        let (lists, entries, cut) = (loaded.lists, loaded.entries, loaded.cut);
        tracing::info!(path = %self.path.display(), lists, entries, cut, "revocation lists taken");
        Ok(())
    }

    /// Whoever writes a file in place cuts it to nothing first, and may get no further: that takes nothing back.
    fn check(&self, bytes: &[u8]) -> Result<(), RevocationError> {
        if bytes.trim_ascii().is_empty() && !self.revocations.lists().is_empty() {
            return Err(RevocationError::NoList(
                "nothing, while lists are in force: a list without entries takes them back",
            ));
        }
        if bytes.len() > LONGEST {
            return Err(self.unreadable(io::Error::other(format!("it is larger than {LONGEST} bytes"))));
        }
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
                if self.taken != Some(now) && self.seen == Some(now) {
                    let outcome = self.take(now);
                    let unread = self.taken != Some(now);
                    if let Err(error) = outcome
                        && !(unread && self.unread)
                    {
                        tracing::error!(%path, "{error}; the revocation lists from before stay");
                    }
                    self.unread = unread;
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
