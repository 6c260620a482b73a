//! Finds the network namespace of a pod by the pod's UID in the cgroup path of a process, and by nothing else.
//!
//! The UID counts only as the *first* pod component below the kubelet's root: what stands deeper may be the pod's own
//! doing. `/proc/PID` is held open as a directory while its files are read, which names the process beyond its number
//! (as a pidfd does, but also where `/proc` shows another PID namespace than ours), and the cgroup is read again after
//! the namespace is open, so a process that ended or moved in between is not mistaken for another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};

use super::netns::Netns;

/// Longer than any path the kubelet makes; a pod may make longer ones to be a nuisance.
const MAX_CGROUP_FILE: u64 = 64 * 1024;

/// A process of a pod, held open, with the namespace it was seen in.
#[derive(Debug)]
pub struct Found {
    pub netns: Netns,
    pub process: Process,
}

/// `/proc/PID`, held open: reads fail once the process is gone, whoever has its number then.
#[derive(Debug)]
pub struct Process {
    directory: OwnedFd,
    pub pid: u32,
}

impl Process {
    /// Is the process still there?
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // The link of a zombie's namespace is gone although its directory is not.
        self.open("ns/net").is_ok()
    }

    fn open(&self, file: &str) -> io::Result<OwnedFd> {
        Ok(openat(self.directory.as_fd(), file, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
    }

    fn cgroups(&self) -> io::Result<String> {
        let mut text = String::new();
        fs::File::from(self.open("cgroup")?).take(MAX_CGROUP_FILE).read_to_string(&mut text)?;
        Ok(text)
    }
}

/// Where to look.
#[derive(Debug, Clone)]
pub struct Finder {
    proc_root: PathBuf,
    kubelet: KubeletRoot,
    refused: BTreeSet<u64>,
    /// There is one workload and it lives where we do: nothing is searched.
    own: bool,
}

/// What stands before the kubelet's own tree in the paths of `/proc/PID/cgroup`. A path without it belongs to somebody
/// else, whatever it looks like further down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct KubeletRoot {
    /// Path of `CGROUP_ROOT` inside the v2 hierarchy; "" for the whole.
    v2: String,
    /// By controllers (second field; "" for v2), below that: where a kubelet that itself runs in a container (kind) or
    /// was given a `cgroupRoot` keeps its pods.
    nested: BTreeMap<String, String>,
}

impl KubeletRoot {
    /// ztunnel is a pod of the same kubelet, so its own path shows where the tree is. Where it does not (another cgroup
    /// namespace, no pod at all) the tree is expected at the top.
    pub(crate) fn new(v2: String, own: &str) -> Self {
        let mut root = Self { v2, ..Self::default() };
        for (v1, controllers, path) in lines(own) {
            let Some(path) = root.below_v2(v1, path) else { continue };
            let parts: Vec<&str> = path.split('/').collect();
            // The last one: what is above it belongs to a cluster around ours.
            if let Some(at) = parts.iter().rposition(|part| is_root(part)).filter(|at| *at > 1) {
                root.nested.insert(controllers.to_owned(), parts[..at].join("/"));
            }
        }
        root
    }

    /// The path from the kubelet's tree on; `None` outside it.
    fn strip<'a>(&self, v1: bool, controllers: &str, path: &'a str) -> Option<&'a str> {
        let path = self.below_v2(v1, path)?;
        match self.nested.get(controllers) {
            Some(prefix) => below(path, prefix),
            None => Some(path),
        }
    }

    fn below_v2<'a>(&self, v1: bool, path: &'a str) -> Option<&'a str> {
        if v1 { Some(path) } else { below(path, &self.v2) }
    }
}

/// `path` without `prefix`, which ends at a slash.
fn below<'a>(path: &'a str, prefix: &str) -> Option<&'a str> {
    path.strip_prefix(prefix).filter(|rest| prefix.is_empty() || rest.starts_with('/'))
}

/// Is it of v1, controllers, path: the lines of `/proc/PID/cgroup`. A path may have colons.
fn lines(cgroups: &str) -> impl Iterator<Item = (bool, &str, &str)> {
    cgroups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        Some((parts.next()? != "0", parts.next()?, parts.next()?))
    })
}

impl Finder {
    /// `host` is the inode of the node's own network namespace, where it is known.
    ///
    /// # Errors
    /// When this process' own mounts or namespace cannot be read.
    pub fn new(proc_root: &Path, cgroup_root: &Path, host: Option<u64>) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let own_cgroups = fs::read_to_string("/proc/self/cgroup")?;
        let root = fs::canonicalize(cgroup_root)?;
        // Neither the host's namespace nor ours is ever a pod's. Process 1 may be hidden from us; we are not.
        let init = fs::File::open(proc_root.join("1/ns/net")).and_then(|f| inode(f.as_fd()));
        let own = inode(fs::File::open("/proc/self/ns/net")?.as_fd())?;
        Ok(Self {
            proc_root: proc_root.to_owned(),
            kubelet: KubeletRoot::new(v2_prefix(&mounts, &root).unwrap_or_default(), &own_cgroups),
            refused: init.into_iter().chain([own]).chain(host).collect(),
            own: false,
        })
    }

    /// Is this the inode of a namespace that is never a pod's: the node's or our own?
    #[must_use]
    pub fn refuses(&self, inode: u64) -> bool {
        self.refused.contains(&inode)
    }

    /// For a ztunnel in the namespace of its only workload: whoever is wanted is here.
    #[must_use]
    pub fn own() -> Self {
        Self { proc_root: PathBuf::from("/proc"), kubelet: KubeletRoot::default(), refused: BTreeSet::new(), own: true }
    }

    /// Is whoever is wanted here, in our own namespace, whatever addresses others know it by?
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// Every namespace that holds a process of one of the `wanted` pods, in one walk over `/proc`.
    ///
    /// # Errors
    /// When `/proc` itself cannot be listed; single processes come and go and are passed over.
    pub fn find(&self, wanted: &BTreeSet<String>) -> io::Result<BTreeMap<String, Vec<Found>>> {
        let mut found: BTreeMap<String, Vec<Found>> = BTreeMap::new();
        if wanted.is_empty() {
            return Ok(found);
        }
        if self.own {
            return wanted.iter().map(|uid| Ok((uid.clone(), vec![own()?]))).collect();
        }
        for (path, pid) in self.processes()? {
            if let Ok(Some((uid, one))) = self.examine(&path, pid, |uid| wanted.contains(uid)) {
                let known = found.entry(uid).or_default();
                if !known.iter().any(|f| f.netns.inode() == one.netns.inode()) {
                    known.push(one);
                }
            }
        }
        Ok(found)
    }

    /// The namespaces of all pods, by inode, with the UID of the pod whose process is in it.
    ///
    /// # Errors
    /// When `/proc` cannot be listed.
    pub fn all(&self) -> io::Result<BTreeMap<u64, (String, Found)>> {
        let mut all = BTreeMap::new();
        if self.own {
            return Ok(all);
        }
        for (path, pid) in self.processes()? {
            if let Ok(Some((uid, one))) = self.examine(&path, pid, |_| true) {
                all.entry(one.netns.inode()).or_insert((uid, one));
            }
        }
        Ok(all)
    }

    fn processes(&self) -> io::Result<impl Iterator<Item = (PathBuf, u32)>> {
        let entries = fs::read_dir(&self.proc_root)?.flatten();
        Ok(entries.filter_map(|entry| Some((entry.path(), entry.file_name().to_str()?.parse().ok()?))))
    }

    fn examine(&self, path: &Path, pid: u32, wanted: impl Fn(&str) -> bool) -> io::Result<Option<(String, Found)>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let process = Process { directory: nix::fcntl::open(path, flags, Mode::empty())?, pid };
        let Some(uid) = self.pod_uid(&process.cgroups()?).filter(|uid| wanted(uid)) else {
            return Ok(None);
        };
        let file = process.open("ns/net")?;
        let opened = inode(file.as_fd())?;
        if self.refused.contains(&opened) {
            return Ok(None);
        }
        let still = self.pod_uid(&process.cgroups()?);
        let now = inode(process.open("ns/net")?.as_fd())?;
        if still.as_ref() != Some(&uid) || now != opened {
            return Ok(None);
        }
        Ok(Some((uid, Found { netns: Netns::new(file, opened)?, process })))
    }

    /// The pod UID all hierarchies agree on.
    fn pod_uid(&self, cgroups: &str) -> Option<String> {
        pod_uid(cgroups, &self.kubelet)
    }
}

/// Are the processes below `proc_root` the node's, and not just those of our container?
#[must_use]
pub fn shows_the_node(proc_root: &Path) -> bool {
    let first = fs::read_link(proc_root.join("1/exe"));
    !first.is_ok_and(|first| std::env::current_exe().is_ok_and(|own| own == first))
}

/// This process, in its namespace.
fn own() -> io::Result<Found> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = nix::fcntl::open("/proc/self", flags, Mode::empty())?;
    Ok(Found { netns: Netns::own()?, process: Process { directory, pid: std::process::id() } })
}

fn inode(file: std::os::fd::BorrowedFd<'_>) -> io::Result<u64> {
    Ok(fstat(file)?.st_ino)
}

/// The pod UID in the text of `/proc/PID/cgroup`. Lines without one (other controllers, hybrid nodes) do not count;
/// two lines that name different pods make the process nobody's.
pub(crate) fn pod_uid(cgroups: &str, kubelet: &KubeletRoot) -> Option<String> {
    let mut uid: Option<String> = None;
    for (v1, controllers, path) in lines(cgroups) {
        let Some(here) = kubelet.strip(v1, controllers, path).and_then(pod_of_path) else { continue };
        match &uid {
            Some(other) if *other != here => return None,
            _ => uid = Some(here),
        }
    }
    uid
}

/// The pod a cgroup path belongs to: `/kubepods[/QOS]/podUID/...` (cgroupfs driver) or
/// `/kubepods.slice[/kubepods-QOS.slice]/kubepods[-QOS]-podUID.slice/...` (systemd driver), below an optional kubelet
/// directory. Seen from inside a cgroup namespace, leading `..` stand for the part of the path shared with us.
pub(crate) fn pod_of_path(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let up = parts.iter().take_while(|p| **p == "..").count();
    parts.drain(..up);
    let mut parts = parts.into_iter().peekable();
    let elided = up > 0;
    // kind and some distributions keep the kubelet's tree one level down.
    if matches!(parts.peek(), Some(&"kubelet" | &"kubelet.slice")) {
        parts.next();
    }
    match parts.peek() {
        Some(p) if is_root(p) => {
            parts.next();
        }
        Some(_) if elided => {}
        _ => return None,
    }
    if parts.peek().is_some_and(|p| is_qos(p)) {
        parts.next();
    }
    pod_component(parts.next()?)
}

fn is_root(part: &str) -> bool {
    matches!(part, "kubepods" | "kubepods.slice" | "kubelet-kubepods.slice")
}

fn is_qos(part: &str) -> bool {
    let part = part.strip_suffix(".slice").map_or(part, |p| {
        let p = p.strip_prefix("kubelet-").unwrap_or(p);
        p.strip_prefix("kubepods-").unwrap_or(p)
    });
    matches!(part, "burstable" | "besteffort" | "guaranteed")
}

fn pod_component(part: &str) -> Option<String> {
    let uid = match part.strip_suffix(".slice") {
        None => part.strip_prefix("pod")?.to_owned(),
        Some(unit) => {
            let unit = unit.strip_prefix("kubelet-").unwrap_or(unit);
            let unit = unit.strip_prefix("kubepods-")?;
            let unit =
                ["burstable-", "besteffort-", "guaranteed-"].iter().find_map(|q| unit.strip_prefix(q)).unwrap_or(unit);
            // systemd reads a dash as a level of the tree, so the kubelet writes UIDs with underscores.
            unit.strip_prefix("pod")?.replace('_', "-")
        }
    };
    let plausible = !uid.is_empty() && uid.len() <= 64 && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    plausible.then_some(uid)
}

/// `cgroup_root` as a path inside the v2 hierarchy, from the mount that shows it. A root that lies above our cgroup
/// namespace (`/..`) cannot be spelled; paths of others then start with `..` as well, which [`pod_of_path`] reads.
pub(crate) fn v2_prefix(mountinfo: &str, cgroup_root: &Path) -> Option<String> {
    let mount = mountinfo
        .lines()
        .filter_map(|line| {
            let (fields, rest) = line.split_once(" - ")?;
            if rest.split(' ').next() != Some("cgroup2") {
                return None;
            }
            let mut fields = fields.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            let below = cgroup_root.strip_prefix(point).ok()?;
            Some((point.len(), root.to_owned(), below.to_owned()))
        })
        // Later mounts cover earlier ones at the same place.
        .enumerate()
        .max_by_key(|(order, (length, ..))| (*length, *order))
        .map(|(_, m)| m)?;
    let (_, root, below) = mount;
    let path = Path::new(&root).join(below);
    if path.components().any(|c| c == Component::ParentDir) {
        return None;
    }
    Some(path.to_str()?.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";
    const OTHER: &str = "ffffffff-1111-2222-3333-444455556666";

    #[test]
    fn reads_the_uid_of_both_drivers_and_all_classes() {
        let under = UID.replace('-', "_");
        for path in [
            format!("/kubepods/pod{UID}/abc"),
            format!("/kubepods/burstable/pod{UID}/abc"),
            format!("/kubepods/besteffort/pod{UID}"),
            format!("/kubepods.slice/kubepods-pod{under}.slice/cri-containerd-abc.scope"),
            format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/crio-abc.scope"),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{under}.slice/x"
            ),
            format!("/kubelet/kubepods/burstable/pod{UID}/abc"),
            format!("/../../pod{UID}/abc"),
            format!("/../../../besteffort/pod{UID}/abc"),
            format!("/../../../../kubepods/burstable/pod{UID}/abc"),
        ] {
            assert_eq!(pod_of_path(&path).as_deref(), Some(UID), "{path}");
        }
    }

    #[test]
    fn names_a_pod_makes_below_its_own_cgroup_do_not_count() {
        let nested = format!("/kubepods/burstable/pod{UID}/c/kubepods/burstable/pod{OTHER}/x");
        assert_eq!(pod_of_path(&nested).as_deref(), Some(UID));
        for path in [
            format!("/system.slice/evil.service/kubepods/pod{OTHER}/x"),
            format!("/user.slice/user-1000.slice/kubepods/burstable/pod{OTHER}"),
            format!("/kubepods/burstable/x/pod{OTHER}"),
            format!("/kubepods/burstable/burstable/pod{OTHER}"),
            format!("/../../system.slice/x/pod{OTHER}"),
            format!("/pod{OTHER}"),
            "/kubepods/burstable/pod".to_owned(),
            "/kubepods/burstable/podx/../y".replace("podx", "pod!x"),
            "/".to_owned(),
        ] {
            assert_eq!(pod_of_path(&path), None, "{path}");
        }
    }

    #[test]
    fn hierarchies_must_agree() {
        let v1 = |uid: &str| format!("4:memory:/kubepods/burstable/pod{uid}/c\n");
        let top = KubeletRoot::default();
        let both = format!("{}0::/\n", v1(UID));
        assert_eq!(pod_uid(&both, &top).as_deref(), Some(UID), "hybrid: only the v1 lines name the pod");
        let torn = format!("{}0::/kubepods/burstable/pod{OTHER}/c\n", v1(UID));
        assert_eq!(pod_uid(&torn, &top), None);
    }

    #[test]
    fn only_paths_below_the_given_root_count() {
        let line = format!("0::/lab/node-a/kubepods/burstable/pod{UID}/c\n");
        let below = |v2: &str| pod_uid(&line, &KubeletRoot { v2: v2.into(), ..KubeletRoot::default() });
        assert_eq!(below("/lab/node-a").as_deref(), Some(UID));
        assert_eq!(below("/lab/node-b"), None);
        assert_eq!(below("/lab/node"), None, "a prefix ends at a slash");
        assert_eq!(below(""), None);
    }

    /// What `/proc/PID/cgroup` really holds, by kubelet, runtime and hierarchy; the pod it says, and ours where it matters.
    #[test]
    fn samples_of_nodes_are_read_as_the_pod_they_show() {
        let under = UID.replace('-', "_");
        let hash = "4d5a1c7ecc0f8ab02ab75d9a1e0a8b35";
        let own = "0a0a0a0a-0000-0000-0000-00000000000a";
        // What ztunnel reads of itself, what it reads of the process, what it makes of it.
        let samples: Vec<(&str, String, String, Option<&str>)> = vec![
            (
                "v1, cgroupfs, dockershim",
                format!("12:pids:/kubepods/besteffort/pod{own}/0f\n1:name=systemd:/kubepods/besteffort/pod{own}/0f\n"),
                format!(
                    "12:pids:/kubepods/besteffort/pod{UID}/1e\n4:cpu,cpuacct:/kubepods/besteffort/pod{UID}/1e\n1:name=systemd:/kubepods/besteffort/pod{UID}/1e\n"
                ),
                Some(UID),
            ),
            (
                "v1, systemd, containerd, v2 mounted beside it",
                String::new(),
                format!(
                    "9:memory:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/cri-containerd-1e.scope\n0::/\n"
                ),
                Some(UID),
            ),
            (
                "v1 with containerd's old spelling, slice and runtime in one component",
                String::new(),
                format!("9:memory:/kubepods-burstable-pod{under}.slice:cri-containerd:1e\n"),
                None,
            ),
            (
                "v2, systemd, CRI-O, a process in a cgroup of its container's making",
                String::new(),
                format!("0::/kubepods.slice/kubepods-pod{under}.slice/crio-1e.scope/init\n"),
                Some(UID),
            ),
            (
                "a static pod: its configuration's hash",
                String::new(),
                format!(
                    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{hash}.slice/cri-containerd-1e.scope\n"
                ),
                Some(hash),
            ),
            (
                "kind on v2, seen in the node's cgroup namespace",
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{}.slice/cri-containerd-0f.scope\n",
                    own.replace('-', "_")
                ),
                format!(
                    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{under}.slice/cri-containerd-1e.scope\n"
                ),
                Some(UID),
            ),
            (
                "kind on v1: below the node's container",
                format!("7:memory:/docker/cafe/kubelet/kubepods/besteffort/pod{own}/0f\n"),
                format!("7:memory:/docker/cafe/kubelet/kubepods/burstable/pod{UID}/1e\n"),
                Some(UID),
            ),
            (
                "kind on v1: the same tree below another container is another cluster's",
                format!("7:memory:/docker/cafe/kubelet/kubepods/besteffort/pod{own}/0f\n"),
                format!("7:memory:/docker/beef/kubelet/kubepods/burstable/pod{UID}/1e\n"),
                None,
            ),
            (
                "kind within a pod of a cluster around it",
                format!("7:memory:/kubepods/burstable/pod{OTHER}/1e/docker/cafe/kubepods/besteffort/pod{own}/0f\n"),
                format!("7:memory:/kubepods/burstable/pod{OTHER}/1e/docker/cafe/kubepods/burstable/pod{UID}/1e\n"),
                Some(UID),
            ),
            (
                "the pod around such a cluster is none of its own",
                format!("7:memory:/kubepods/burstable/pod{OTHER}/1e/docker/cafe/kubepods/besteffort/pod{own}/0f\n"),
                format!("7:memory:/kubepods/burstable/pod{OTHER}/1e\n"),
                None,
            ),
            (
                "a kubelet with a cgroupRoot",
                format!("0::/node/kubepods/pod{own}/0f\n"),
                format!("0::/node/kubepods/burstable/pod{UID}/1e\n"),
                Some(UID),
            ),
            (
                "a tree that somebody made where no kubelet keeps one",
                format!("0::/node/kubepods/pod{own}/0f\n"),
                format!("0::/kubepods/burstable/pod{OTHER}/1e\n"),
                None,
            ),
            (
                "v2, ztunnel in a cgroup namespace of its own",
                "0::/\n".to_owned(),
                format!(
                    "0::/../../../kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/cri-containerd-1e.scope\n"
                ),
                Some(UID),
            ),
            (
                "hybrid where another pod's name appears in a hierarchy the pod may write to",
                String::new(),
                format!("9:memory:/kubepods/burstable/pod{UID}/1e\n1:name=systemd:/kubepods/burstable/pod{OTHER}/1e\n"),
                None,
            ),
            ("a process of the node", String::new(), "0::/system.slice/kubelet.service\n".to_owned(), None),
            ("a path with colons", String::new(), format!("0::/kubepods/pod{UID}/a:b:c\n"), Some(UID)),
            ("no path at all", String::new(), "0:\nnonsense\n\n".to_owned(), None),
        ];
        for (name, own, process, expected) in samples {
            let kubelet = KubeletRoot::new(String::new(), &own);
            assert_eq!(pod_uid(&process, &kubelet).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn the_kubelets_tree_is_where_our_own_pod_is() {
        let own = format!("0::/lab/node-a/inner/kubepods/burstable/pod{UID}/c\n7:memory:/kubepods/pod{UID}/c\n");
        let root = KubeletRoot::new("/lab/node-a".into(), &own);
        let nested = BTreeMap::from([(String::new(), "/inner".to_owned())]);
        assert_eq!(root, KubeletRoot { v2: "/lab/node-a".into(), nested });
        assert_eq!(KubeletRoot::new("/elsewhere".into(), &own).nested, BTreeMap::new());
    }

    #[test]
    fn root_prefix_follows_the_mount() {
        let mounts = "25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      36 25 0:31 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n\
                      90 25 0:31 /lab/node-a /host/cgroup rw - cgroup2 cgroup2 rw\n\
                      91 25 0:31 /../../.. /up rw - cgroup2 cgroup2 rw\n";
        let prefix = |p: &str| v2_prefix(mounts, Path::new(p));
        assert_eq!(prefix("/sys/fs/cgroup/unified").as_deref(), Some(""));
        assert_eq!(prefix("/sys/fs/cgroup/unified/lab/node-a").as_deref(), Some("/lab/node-a"));
        assert_eq!(prefix("/host/cgroup").as_deref(), Some("/lab/node-a"));
        assert_eq!(prefix("/up"), None);
        assert_eq!(prefix("/elsewhere"), None);
    }

    #[test]
    fn an_ended_process_is_noticed_whoever_has_its_number() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let path = PathBuf::from(format!("/proc/{}", child.id()));
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let process = Process { directory: nix::fcntl::open(&path, flags, Mode::empty()).unwrap(), pid: child.id() };
        assert!(process.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
    }
}
