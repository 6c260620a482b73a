//! Which Kubernetes namespaces were outside the mesh when the control plane last said so, in a file: what is decided by
//! when it is silent, also by a plugin without a ztunnel, also after a reboot.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
/// Names that are remembered; of more, those that the control plane has not spoken of for longest are forgotten. That
/// costs their pods a retry while it is silent, and keeps what was deleted long ago from being believed for ever.
const MOST: usize = 1024;
/// Many times as many names.
const MAX_FILE: u64 = 4 << 20;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// Their pods are not captured unless they ask for it themselves. The one spoken of last is the last.
    outside: Vec<String>,
}

/// The file, and what is in it.
#[derive(Debug)]
pub struct Namespaces {
    path: PathBuf,
    outside: Mutex<Vec<String>>,
}

impl Namespaces {
    /// What an earlier process has learned; nothing where the file cannot be read.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        Self { path: path.to_owned(), outside: Mutex::new(stored(path)) }
    }

    /// Was the namespace outside the mesh when the control plane last spoke of it?
    #[must_use]
    pub fn is_outside(&self, namespace: &str) -> bool {
        self.known().iter().any(|known| known == namespace)
    }

    /// The control plane has said that the namespace is outside the mesh.
    pub fn note_outside(&self, namespace: &str) {
        let mut outside = self.known();
        let before = outside.len();
        outside.retain(|known| known != namespace);
        let is_new = outside.len() == before;
        outside.push(namespace.to_owned());
        let excess = outside.len().saturating_sub(MOST);
        outside.drain(..excess);
        // The order alone is not worth a write.
        if is_new {
            self.write(&outside);
        }
    }

    /// The control plane has said that these have pods in the mesh.
    pub fn note_inside<'a>(&self, namespaces: impl Iterator<Item = &'a str>) {
        let mut outside = self.known();
        let before = outside.len();
        for namespace in namespaces {
            outside.retain(|known| known != namespace);
        }
        if outside.len() != before {
            self.write(&outside);
        }
    }

    fn known(&self) -> MutexGuard<'_, Vec<String>> {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, outside: &[String]) {
        let stored = Stored { version: VERSION, outside: outside.to_vec() };
        let written = serde_json::to_vec(&stored).map_err(io::Error::from).and_then(|b| replace(&self.path, &b, 0o644));
        if let Err(error) = written {
            // A name too few in the file costs a retry; one too many would let a pod out. Better no file than an old one.
            eprintln!("remembering namespaces outside the mesh in {}: {error}", self.path.display());
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What the file says; nothing where it says nothing one can rely on.
#[must_use]
pub fn read(path: &Path) -> BTreeSet<String> {
    stored(path).into_iter().collect()
}

fn stored(path: &Path) -> Vec<String> {
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    match read.map(|_| serde_json::from_str::<Stored>(&text)) {
        Ok(Ok(stored)) if stored.version == VERSION => stored.outside,
        _ => Vec::new(),
    }
}

/// Writes a file by a new one in the same directory, so that readers see the old or the new, and watchers a rename.
///
/// # Errors
/// Those of the file system.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
    // With a dot and another ending: nobody takes it for the file itself.
    let fresh = path.with_file_name(format!(".{name}.{}.new", std::process::id()));
    let written = fs::write(&fresh, content)
        .and_then(|()| fs::set_permissions(&fresh, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_learned_survives_a_restart_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("namespaces.json");
        let first = Namespaces::open(&path);
        assert!(!first.is_outside("default"), "nothing is known yet");
        first.note_outside("default");
        first.note_outside("batch");
        let second = Namespaces::open(&path);
        assert!(second.is_outside("default") && second.is_outside("batch"));
        second.note_inside(["default", "shop"].into_iter());
        assert_eq!(read(&path), BTreeSet::from(["batch".to_owned()]));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn of_too_many_namespaces_the_one_spoken_of_last_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("namespaces.json");
        let namespaces = Namespaces::open(&path);
        for n in 0..MOST {
            namespaces.note_outside(&format!("ns-{n}"));
        }
        namespaces.note_outside("ns-0");
        namespaces.note_outside("one-more");
        for (name, expected) in [("ns-0", true), ("ns-1", false), ("ns-2", true), ("one-more", true)] {
            assert_eq!(namespaces.is_outside(name), expected, "{name}");
            assert_eq!(Namespaces::open(&path).is_outside(name), expected, "{name}, after a restart");
        }
        assert_eq!(read(&path).len(), MOST);
    }

    #[test]
    fn a_file_that_cannot_be_read_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("namespaces.json");
        for text in ["", "{", r#"{"version":2,"outside":["default"]}"#] {
            fs::write(&path, text).unwrap();
            assert!(read(&path).is_empty(), "{text}");
        }
    }
}
