//! What a lab with a container runtime could leave on the machine, looked for in every place where one leaves things.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::{record, wait};

/// Where container runtimes, CNI plugins and ztunnel write when nobody gives them directories of their own, and how the
/// names begin of what is theirs there: other tests may be at work.
const PLACES: &[(&str, &[&str])] = &[
    ("/etc/cni", &[""]),
    ("/etc/containerd", &[""]),
    ("/opt/cni", &[""]),
    ("/opt/containerd", &[""]),
    ("/run/containerd", &[""]),
    ("/run/netns", &["cni-", "lab-"]),
    ("/run/runc", &[""]),
    ("/run/ztunnel", &[""]),
    ("/sys/class/net", &["cni", "veth"]),
    ("/sys/fs/bpf", &["ztunnel"]),
    ("/var/lib/cni", &[""]),
    ("/var/lib/containerd", &[""]),
    ("/var/lib/ztunnel", &[""]),
];
/// Where cgroups are, of whichever version.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Names of containers and sandboxes.
const ID_LENGTH: usize = 64;
/// The kernel takes devices and cgroups away a moment after their last user.
const PATIENCE: Duration = Duration::from_secs(15);

/// The machine as it was before.
pub struct Machine {
    lab: String,
    before: BTreeSet<PathBuf>,
}

impl Machine {
    /// Before the lab of this name comes up.
    pub fn before(lab: &str) -> Self {
        Self { lab: lab.to_owned(), before: things() }
    }

    /// Whether anything is there of the lab: what [`Machine::has_nothing_left`] looks for can be found.
    pub fn has_something(&self) -> bool {
        !self.left().is_empty() && !self.processes().is_empty()
    }

    /// Nothing is there of the lab, and nothing more than before of what any runtime makes. Other labs may come and go.
    pub fn has_nothing_left(&self) -> Result<()> {
        wait::until("everything of the lab to be gone", PATIENCE, || {
            let mut left = self.left();
            left.extend(self.processes());
            ensure!(left.is_empty(), "{}", left.join("\n"));
            Ok(())
        })
    }

    fn left(&self) -> Vec<String> {
        let things = things();
        let new = things.difference(&self.before).filter(|path| !of_another_lab(path, &self.lab));
        let records = fs::read_dir(record::RECORDS).into_iter().flatten().flatten().map(|entry| entry.path());
        let records = records.filter(|path| self.is_of_the_lab(&path.to_string_lossy()));
        new.cloned().chain(records).map(|path| path.display().to_string()).collect()
    }

    /// Processes in the lab's cgroups, with its mounts, or started with its paths.
    fn processes(&self) -> Vec<String> {
        let own = std::process::id().to_string();
        let mut left = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            for file in ["cgroup", "mountinfo", "cmdline"] {
                let text = fs::read(entry.path().join(file)).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                // Our own command line may name it.
                if self.is_of_the_lab(&text) && !(file == "cmdline" && pid == own) {
                    left.push(format!("process {pid} by its {file}"));
                }
            }
        }
        left
    }

    fn is_of_the_lab(&self, text: &str) -> bool {
        [format!("lab-{}", self.lab), format!("{}/{}", record::RECORDS, self.lab)]
            .iter()
            .any(|name| text.contains(name))
    }
}

fn of_another_lab(path: &Path, lab: &str) -> bool {
    let text = path.to_string_lossy();
    text.contains("lab-") && !text.contains(&format!("lab-{lab}"))
}

fn things() -> BTreeSet<PathBuf> {
    let mut things = BTreeSet::new();
    for (place, beginnings) in PLACES.iter().filter(|(place, _)| Path::new(place).exists()) {
        things.insert(PathBuf::from(place));
        let entries = fs::read_dir(place).into_iter().flatten().flatten();
        let theirs = |name: &str| beginnings.iter().any(|beginning| name.starts_with(beginning));
        things.extend(entries.filter(|entry| theirs(&entry.file_name().to_string_lossy())).map(|entry| entry.path()));
    }
    cgroups(Path::new(CGROUPS), &mut things);
    things
}

/// Those of labs and of containers.
fn cgroups(directory: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let container = name.len() == ID_LENGTH && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        if container || name.starts_with("mesh-lab-") || name.contains("containerd") {
            found.insert(entry.path());
        }
        cgroups(&entry.path(), found);
    }
}
