//! The run record: everything a lab creates hangs below a few names, and those are written down before the first of them exists.
//!
//! A lab named `X` owns the network namespaces `lab-X-*`, the cgroup `mesh-lab-X` (with every process of it), one private bpffs
//! mount (with every pin of it) and one run directory. Taking down is therefore the same work whether the lab ends by itself or
//! a later command finds the record of one that was killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use crate::{sys, wait};

/// Directory of all run records.
pub const RECORDS: &str = "/run/mesh-lab";

/// One process, named so that a reused PID is not mistaken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    /// Clock ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// The calling process.
    pub fn own() -> Result<Self> {
        let pid = std::process::id();
        let started = sys::start_time(pid).context("/proc is not mounted")?;
        Ok(Self { pid, started })
    }

    /// Whether this very process still runs.
    pub fn alive(&self) -> bool {
        sys::start_time(self.pid) == Some(self.started)
    }
}

/// What a lab owns.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    /// The process that answers for the lab; when it is gone the rest is garbage.
    pub owner: ProcessId,
    /// Network namespaces whose name starts so belong to the lab.
    pub netns_prefix: String,
    /// Every process of the lab but its owner lives in or below this cgroup.
    pub cgroup: PathBuf,
    /// Logs, volumes, pod roots.
    pub run_dir: PathBuf,
    /// A bpffs instance of its own: unmounting it lets go of every pinned program, link and map.
    pub bpffs: PathBuf,
    /// Its owner is taking it down.
    #[serde(default)]
    pub ending: bool,
}

impl Record {
    /// Writes the record of a new lab owned by the calling process, then makes its cgroup, run directory and bpffs.
    ///
    /// # Errors
    /// When a lab of that name is still running, or rights are missing.
    pub fn create(id: &str) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces, cgroups and mounts: run it as root");
        }
        reap_dead()?;
        let base = Path::new(RECORDS).join(id);
        let record = Self {
            id: id.to_owned(),
            owner: ProcessId::own()?,
            netns_prefix: format!("lab-{id}-"),
            cgroup: sys::cgroup2_root()?.join(format!("mesh-lab-{id}")),
            bpffs: base.join("bpf"),
            run_dir: base,
            ending: false,
        };
        let _lock = record.wait_for_name()?;
        record.write()?;
        record.prepare().inspect_err(|_| {
            if let Err(e) = record.take_down() {
                eprintln!("lab {id}: cannot clean up: {e:#}");
            }
        })?;
        Ok(record)
    }

    /// Holds the lock once no other lab has the name; one that is ending is waited for.
    fn wait_for_name(&self) -> Result<Flock<fs::File>> {
        wait::until("the lab of that name to end", Duration::from_secs(15), || {
            let lock = lock()?;
            match load(&self.path()) {
                Ok(other) if other.ending => bail!("process {} is taking it down", other.owner.pid),
                Ok(other) => Ok(Err(anyhow!(
                    "a lab named {} is already up (process {}): take it down first",
                    self.id,
                    other.owner.pid
                ))),
                Err(_) => Ok(Ok(lock)),
            }
        })?
    }

    fn prepare(&self) -> Result<()> {
        fs::create_dir_all(&self.bpffs)?;
        fs::create_dir_all(self.logs())?;
        fs::create_dir(&self.cgroup).with_context(|| format!("cannot make cgroup {}", self.cgroup.display()))?;
        mount(Some("bpf"), &self.bpffs, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .context("cannot mount bpffs: does this kernel have CONFIG_BPF_SYSCALL?")
    }

    /// Log files, one for each container.
    pub fn logs(&self) -> PathBuf {
        self.run_dir.join("logs")
    }

    fn path(&self) -> PathBuf {
        Path::new(RECORDS).join(format!("{}.json", self.id))
    }

    fn write(&self) -> Result<()> {
        fs::create_dir_all(RECORDS)?;
        let temporary = self.path().with_extension("new");
        fs::write(&temporary, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&temporary, self.path())?;
        Ok(())
    }

    /// Makes `owner` answer for the lab from now on.
    pub fn hand_over(&mut self, owner: ProcessId) -> Result<()> {
        self.owner = owner;
        self.write()
    }

    /// Removes all the record names, the record itself last. Doing it twice is harmless.
    pub fn take_down(&self) -> Result<()> {
        if self.path().exists() {
            Self { ending: true, ..self.clone() }.write()?;
        }
        kill_cgroup(&self.cgroup)?;
        for netns in netns_with_prefix(&self.netns_prefix)? {
            sys::check(sys::command("ip").args(["netns", "delete", &netns]))?;
        }
        remove_cgroup(&self.cgroup)?;
        if mounted(&self.bpffs)? {
            umount2(&self.bpffs, MntFlags::MNT_DETACH).context("cannot unmount the lab's bpffs")?;
        }
        remove_tree(&self.run_dir)?;
        match fs::remove_file(self.path()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }
}

/// Serialises creation and reaping between processes; released on drop.
fn lock() -> Result<Flock<fs::File>> {
    fs::create_dir_all(RECORDS).context("cannot make /run/mesh-lab: run as root")?;
    let file = fs::File::create(Path::new(RECORDS).join("lock")).context("cannot lock /run/mesh-lab: run as root")?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e.into())
}

/// What a lab's supervisor says.
pub fn log_file(id: &str) -> PathBuf {
    Path::new(RECORDS).join(format!("{id}.log"))
}

/// The record of a lab that is up.
pub fn find(id: &str) -> Option<Record> {
    load(&Path::new(RECORDS).join(format!("{id}.json"))).ok().filter(|record| record.owner.alive())
}

/// All records there are, readable ones only: a record is replaced by rename, so a broken one is not ours.
pub fn all() -> Vec<Record> {
    let Ok(entries) = fs::read_dir(RECORDS) else { return Vec::new() };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .filter_map(|path| load(&path).ok())
        .collect()
}

fn load(path: &Path) -> Result<Record> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// Takes down the lab of that name if the calling process answers for it, however little of it has been made.
pub fn take_down_own(id: &str) -> Result<()> {
    let own = std::process::id();
    find(id).filter(|record| record.owner.pid == own).map_or(Ok(()), |record| record.take_down())
}

/// Takes down every lab whose owner is gone and says which.
pub fn reap_dead() -> Result<Vec<String>> {
    let _lock = lock()?;
    let mut reaped = Vec::new();
    for record in all().into_iter().filter(|record| !record.owner.alive()) {
        record.take_down().with_context(|| format!("cannot reap lab {}", record.id))?;
        // The log of its supervisor; there is none where no supervisor was.
        let _ = fs::remove_file(log_file(&record.id));
        reaped.push(record.id);
    }
    Ok(reaped)
}

fn netns_with_prefix(prefix: &str) -> Result<Vec<String>> {
    let entries = match fs::read_dir("/run/netns") {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect())
}

/// Kills every process in and below a cgroup and waits until they are gone.
pub fn kill_cgroup(cgroup: &Path) -> Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    fs::write(cgroup.join("cgroup.kill"), "1")
        .with_context(|| format!("cannot kill {} (cgroup.kill needs Linux 5.14)", cgroup.display()))?;
    let events = cgroup.join("cgroup.events");
    wait::until_true("processes of the lab to end", Duration::from_secs(10), || {
        fs::read_to_string(&events).map_or(true, |text| text.contains("populated 0"))
    })
}

/// Removes a cgroup and those below it; the processes must be gone.
pub fn remove_cgroup(cgroup: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(cgroup) else { return Ok(()) };
    for entry in entries.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    // A just-ended process can hold its cgroup for a moment longer, and one that was on its way in when the others were killed
    // (a container enters by itself) has come since.
    wait::until("a cgroup to become removable", Duration::from_secs(5), || match fs::remove_dir(cgroup) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            Err(e.into())
        }
        _ => Ok(()),
    })
}

fn mounted(path: &Path) -> Result<bool> {
    let wanted = path.display().to_string();
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().any(|line| line.split(' ').nth(4) == Some(&wanted)))
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
