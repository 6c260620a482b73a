//! Which Kubernetes namespaces were outside the mesh when the control plane last said so, in a file: what is decided by
//! when it is silent, also by a plugin without a ztunnel, also after a reboot.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;
/// Ten thousand names.
const MAX_FILE: u64 = 4 << 20;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// Their pods are not captured unless they ask for it themselves.
    outside: BTreeSet<String>,
}

/// The file, and what is in it.
#[derive(Debug)]
pub struct Namespaces {
    path: PathBuf,
    outside: Mutex<BTreeSet<String>>,
}

impl Namespaces {
    /// What an earlier process has learned; nothing where the file cannot be read.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        Self { path: path.to_owned(), outside: Mutex::new(read(path)) }
    }

    /// Was the namespace outside the mesh when the control plane last spoke of it?
    #[must_use]
    pub fn is_outside(&self, namespace: &str) -> bool {
        self.known().contains(namespace)
    }

    /// The control plane has said that the namespace is outside the mesh.
    pub fn note_outside(&self, namespace: &str) {
        let mut outside = self.known();
        if outside.insert(namespace.to_owned()) {
            self.write(&outside);
        }
    }

    /// The control plane has said that these have pods in the mesh.
    pub fn note_inside<'a>(&self, namespaces: impl Iterator<Item = &'a str>) {
        let mut outside = self.known();
        let before = outside.len();
        for namespace in namespaces {
            outside.remove(namespace);
        }
        if outside.len() != before {
            self.write(&outside);
        }
    }

    fn known(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, outside: &BTreeSet<String>) {
        let stored = Stored { version: VERSION, outside: outside.clone() };
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
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    match read.map(|_| serde_json::from_str::<Stored>(&text)) {
        Ok(Ok(stored)) if stored.version == VERSION => stored.outside,
        _ => BTreeSet::new(),
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
    fn a_file_that_cannot_be_read_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("namespaces.json");
        for text in ["", "{", r#"{"version":2,"outside":["default"]}"#] {
            fs::write(&path, text).unwrap();
            assert!(read(&path).is_empty(), "{text}");
        }
    }
}
