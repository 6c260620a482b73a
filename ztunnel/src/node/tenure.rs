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

/// The process that has claimed the node and still runs, if there is one: `proc_root` shows the node's processes.
///
/// # Errors
/// When the marks cannot be read.
pub fn claimant(bpffs_dir: &Path, proc_root: &Path) -> io::Result<Option<u32>> {
    let marks = match fs::read_dir(bpffs_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        marks => marks?,
    };
    // A number may be another program's by now. (Its short name would not tell: a supervised ztunnel is called `exe`.)
    let own = std::env::current_exe()?;
    let is_ztunnel = |pid: &u32| {
        let program = fs::read_link(proc_root.join(pid.to_string()).join("exe"));
        program.is_ok_and(|program| name(&program).is_some() && name(&program) == name(&own))
    };
    let pids = marks.flatten().filter_map(|mark| {
        let name = mark.file_name().into_string().ok()?;
        name.strip_prefix(PREFIX)?.split('_').next()?.parse().ok()
    });
    Ok(pids.filter(|pid| *pid != std::process::id()).find(is_ztunnel))
}

/// A program's, also when its file is gone.
fn name(program: &Path) -> Option<&str> {
    let name = program.file_name()?.to_str()?;
    Some(name.strip_suffix(" (deleted)").unwrap_or(name))
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

    #[test]
    fn who_has_claimed_the_node_is_who_lives_and_is_a_ztunnel() {
        let (marks, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let claimant = || claimant(marks.path(), proc.path()).unwrap();
        let process = |pid: u32, program: &str| {
            fs::create_dir(proc.path().join(pid.to_string())).unwrap();
            std::os::unix::fs::symlink(program, proc.path().join(pid.to_string()).join("exe")).unwrap();
        };
        for mark in ["current_7_1", "current_8_1", "current_x", "links"] {
            fs::create_dir(marks.path().join(mark)).unwrap();
        }
        assert_eq!(claimant(), None, "the dead have claimed nothing");
        process(7, "/usr/bin/somebody-else");
        assert_eq!(claimant(), None);
        let own = std::env::current_exe().unwrap();
        process(8, &format!("/elsewhere/{} (deleted)", name(&own).unwrap()));
        assert_eq!(claimant(), Some(8));
        assert_eq!(super::claimant(&marks.path().join("none"), proc.path()).unwrap(), None);
    }
}
