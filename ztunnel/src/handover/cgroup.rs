//! Leaves the container's cgroups for one of our own on the node, so that the runtime no longer takes us for a part of
//! the container.
//!
//! `<hierarchy>/ztunnel-draining/<generation>`, in the v2 hierarchy and, on hybrid nodes, in every v1 hierarchy in which
//! the container has a cgroup. At the top level like `kubepods` with the cgroupfs driver: systemd leaves alone what it
//! has not made. It needs the node's cgroup file system, writable, and the node's process 1 under `/proc` to step out of
//! the container's cgroup namespace, from inside which nobody may leave it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

use crate::node::find::pod_of_path;

/// Where all generations that drain are found.
const PARENT: &str = "ztunnel-draining";

/// Grows by what connections buffer from now on: what is in use already stays charged where it was.
const MEMORY: &str = "1073741824";
/// Threads; a sealed process makes no new ones.
const PIDS: &str = "1024";

/// A hierarchy, by the directory of its root.
#[derive(Debug, PartialEq, Eq)]
enum Hierarchy {
    V1(PathBuf),
    V2(PathBuf),
}

impl Hierarchy {
    fn root(&self) -> &Path {
        match self {
            Self::V1(root) | Self::V2(root) => root,
        }
    }
}

/// The cgroups of this process, made for it alone.
#[derive(Debug)]
pub struct Shelter {
    homes: Vec<PathBuf>,
    /// `cgroup.procs` of the roots: held open, as a sealed process opens nothing.
    ways_out: Vec<File>,
}

impl Shelter {
    /// Moves this process, all threads of it. `root` is the node's v2 hierarchy.
    ///
    /// # Errors
    /// What was in the way, and what to mount.
    pub fn enter(root: &Path, proc_root: &Path, generation: &str) -> io::Result<Self> {
        let host = proc_root.join("1/ns/cgroup");
        // On a thread that ends: which part of the tree is seen is the thread's matter.
        let moved = std::thread::scope(|scope| scope.spawn(|| move_to_node(root, &host, generation)).join());
        moved.map_err(|_| io::Error::other("moving to another cgroup panicked"))?
    }

    /// Leaves the cgroups and removes them. For the very end.
    pub fn leave(mut self) {
        for way_out in &mut self.ways_out {
            // Then the cgroup stays until another ztunnel removes it.
            let _ = way_out.write_all(b"0");
        }
        for home in &self.homes {
            remove(home);
        }
    }
}

/// Removes what generations left behind that were killed. Those with processes cannot be removed: how many there are.
pub fn sweep(root: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let v1 = v1_mounts(&mounts).map(|(mount, _)| mount);
    let mut left = 0;
    for root in v1.chain([root.to_owned()]) {
        let entries = fs::read_dir(root.join(PARENT)).into_iter().flatten().flatten().map(|entry| entry.path());
        for home in entries.filter(|path| path.is_dir()) {
            remove(&home);
            left += usize::from(home.exists());
        }
    }
    left
}

fn remove(home: &Path) {
    // Another generation may be in the parent.
    let _ = fs::remove_dir(home);
    let _ = home.parent().map(fs::remove_dir);
}

fn move_to_node(root: &Path, host: &Path, generation: &str) -> io::Result<Shelter> {
    // Where we are in it already, or /proc is another's, this changes nothing; if it was needed the move below fails.
    if let Err(error) = File::open(host).and_then(|ns| Ok(setns(ns, CloneFlags::CLONE_NEWCGROUP)?)) {
        tracing::debug!(%error, namespace = %host.display(), "entering the node's cgroup namespace");
    }
    let cgroups = fs::read_to_string("/proc/thread-self/cgroup")?;
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let mut shelter = Shelter { homes: Vec::new(), ways_out: Vec::new() };
    for hierarchy in plan(&cgroups, &mounts, root).map_err(io::Error::other)? {
        let home = hierarchy.root().join(PARENT).join(generation);
        let moved = prepare(&hierarchy, &home).and_then(|()| fs::write(home.join("cgroup.procs"), "0"));
        moved.map_err(|error| {
            let hint = "is the node's /sys/fs/cgroup mounted writable, and hostPID set?";
            io::Error::new(error.kind(), format!("moving to {}: {error}; {hint}", home.display()))
        })?;
        shelter.ways_out.push(OpenOptions::new().write(true).open(hierarchy.root().join("cgroup.procs"))?);
        shelter.homes.push(home);
    }
    Ok(shelter)
}

fn prepare(hierarchy: &Hierarchy, home: &Path) -> io::Result<()> {
    fs::create_dir_all(home)?;
    let parent = home.parent().unwrap_or(home);
    match hierarchy {
        Hierarchy::V2(_) => {
            // Controllers that the node has not turned on at its root limit nothing here.
            let _ = fs::write(parent.join("cgroup.subtree_control"), "+memory +pids");
            limit(&home.join("memory.max"), MEMORY);
            limit(&home.join("pids.max"), PIDS);
        }
        Hierarchy::V1(root) => {
            // A cpuset without CPUs takes no process.
            for (above, here) in [(root.as_path(), parent), (parent, home)] {
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if let Ok(inherited) = fs::read(above.join(file)) {
                        fs::write(here.join(file), inherited)?;
                    }
                }
            }
            limit(&home.join("memory.limit_in_bytes"), MEMORY);
            limit(&home.join("pids.max"), PIDS);
        }
    }
    Ok(())
}

/// Sets a limit where its controller is.
fn limit(file: &Path, value: &str) {
    if file.exists()
        && let Err(error) = fs::write(file, value)
    {
        tracing::debug!(%error, file = %file.display(), "limiting a draining ztunnel");
    }
}

/// Which hierarchies to move in: v2 last, as it is the one that a runtime's "kill all" looks at.
fn plan(cgroups: &str, mounts: &str, root: &Path) -> Result<Vec<Hierarchy>, String> {
    let mut hierarchies = Vec::new();
    for line in cgroups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        // What is in no pod's cgroup is not killed with it.
        if id == "0" || pod_of_path(path).is_none() {
            continue;
        }
        let wanted: Vec<&str> = controllers.split(',').collect();
        let mount = v1_mounts(mounts).find(|(_, options)| wanted.iter().all(|c| options.split(',').any(|o| o == *c)));
        let (mount, _) =
            mount.ok_or_else(|| format!("cgroup v1 hierarchy {controllers} of the node is not mounted"))?;
        hierarchies.push(Hierarchy::V1(mount));
    }
    hierarchies.push(Hierarchy::V2(root.to_owned()));
    Ok(hierarchies)
}

/// Mount points of whole v1 hierarchies, with their options.
fn v1_mounts(mounts: &str) -> impl Iterator<Item = (PathBuf, &str)> {
    mounts.lines().filter_map(|line| {
        let (place, what) = line.split_once(" - ")?;
        let mut what = what.split(' ');
        let (kind, _, options) = (what.next()?, what.next()?, what.next()?);
        let place: Vec<&str> = place.split(' ').collect();
        (kind == "cgroup" && place.get(3) == Some(&"/")).then(|| Some((PathBuf::from(place.get(4)?), options)))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
        30 1 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        31 1 0:27 /elsewhere /mnt rw - cgroup cgroup rw,memory\n\
        32 1 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        33 1 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";

    #[test]
    fn leaves_every_hierarchy_that_has_the_container_and_no_other() {
        let root = Path::new("/sys/fs/cgroup/unified");
        let pod = "/kubepods/burstable/pod1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed/0123";
        let cgroups =
            format!("5:memory:{pod}\n4:cpu,cpuacct:{pod}\n3:freezer:/\n0::/system.slice/containerd.service\n");
        let v1 = |at: &str| Hierarchy::V1(PathBuf::from(at));
        let expected =
            vec![v1("/sys/fs/cgroup/memory"), v1("/sys/fs/cgroup/cpu,cpuacct"), Hierarchy::V2(root.to_owned())];
        assert_eq!(plan(&cgroups, MOUNTS, root), Ok(expected));
        let missing = plan(&format!("7:pids:{pod}\n"), MOUNTS, root).unwrap_err();
        assert!(missing.contains("pids"), "{missing}");
        assert_eq!(plan("0::/anything\n", MOUNTS, root), Ok(vec![Hierarchy::V2(root.to_owned())]));
    }
}
