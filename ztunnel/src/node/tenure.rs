//! Which ztunnel of a node is the current one, told by an empty directory beside the pins.
//!
//! During an upgrade two run at once. The new one claims the node once every pod is its own, by making its mark and
//! removing all others; the old one sees that its mark is gone and need not accept any longer. Marks of the dead mean
//! nothing and are removed by the next claim.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Marks start with this; bpffs allows no dots in names.
const PREFIX: &str = "current_";

/// This process' claim on the node.
#[derive(Debug)]
pub struct Tenure {
    mark: PathBuf,
    claimed: AtomicBool,
}

impl Tenure {
    /// A claim that has not been made yet.
    #[must_use]
    pub fn new(bpffs_dir: &Path) -> Self {
        // Process numbers repeat over containers; together with the time they do not.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let mark = bpffs_dir.join(format!("{PREFIX}{}_{now}", std::process::id()));
        Self { mark, claimed: AtomicBool::new(false) }
    }

    /// Makes this process the current one.
    ///
    /// # Errors
    /// When the directory cannot be written; then a predecessor waits out its time.
    pub fn claim(&self) -> io::Result<()> {
        fs::create_dir(&self.mark)?;
        self.claimed.store(true, Ordering::SeqCst);
        let parent = self.mark.parent().unwrap_or(Path::new("/"));
        for entry in fs::read_dir(parent)?.flatten() {
            let other = entry.path();
            if other != self.mark && entry.file_name().to_string_lossy().starts_with(PREFIX) {
                fs::remove_dir(other)?;
            }
        }
        Ok(())
    }

    /// Has another ztunnel claimed the node since?
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.claimed.load(Ordering::SeqCst) && !self.mark.exists()
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        // Gone already when there is a successor.
        let _ = fs::remove_dir(&self.mark);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_claim_wins_and_stale_marks_go() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("current_1_stale")).unwrap();
        fs::create_dir(dir.path().join("links")).unwrap();
        let (old, new) = (Tenure::new(dir.path()), Tenure::new(dir.path()));
        assert!(!old.is_lost(), "nothing was claimed");
        old.claim().unwrap();
        assert!(!old.is_lost());
        new.claim().unwrap();
        assert!(old.is_lost() && !new.is_lost());
        drop((old, new));
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["links"]);
    }
}
