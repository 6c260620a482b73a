//! Whose pod a process is, told by real processes in real cgroups: version 2, version 1, and both at once.
//!
//! Needs root, `unshare` and a mounted cgroup2 hierarchy; where one is missing the test says so and passes, unless
//! `LAB=required`. Nothing is sent; every process and cgroup is taken away by [`Made`]'s drop.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use ztunnel::node::find::Finder;

const PATIENCE: Duration = Duration::from_secs(10);

/// Processes and cgroups of this test.
#[derive(Default)]
struct Made {
    children: Vec<Child>,
    cgroups: BTreeSet<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Network {
    Own,
    OfTheNode,
}

impl Made {
    /// A process in these cgroups.
    fn process(&mut self, cgroups: &[PathBuf], network: Network) -> u32 {
        let mut command = match network {
            Network::Own => Command::new("unshare"),
            Network::OfTheNode => Command::new("env"),
        };
        if network == Network::Own {
            command.arg("--net");
        }
        let child = command.args(["sleep", "600"]).spawn().expect("a process");
        let pid = child.id();
        self.children.push(child);
        let end = Instant::now() + PATIENCE;
        let comm = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        while comm().trim() != "sleep" {
            assert!(Instant::now() < end, "it is {:?}", comm());
            std::thread::sleep(Duration::from_millis(5));
        }
        for cgroup in cgroups {
            self.make(cgroup);
            fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("a process moves");
        }
        pid
    }

    /// Makes a cgroup and those above it, and remembers which were not there.
    fn make(&mut self, cgroup: &Path) {
        let missing: Vec<&Path> = cgroup.ancestors().take_while(|path| !path.exists()).collect();
        self.cgroups.extend(missing.into_iter().map(Path::to_owned));
        fs::create_dir_all(cgroup).expect("a cgroup");
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        // The deepest first. One that somebody else uses by now stays.
        for cgroup in self.cgroups.iter().rev() {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

fn inode(path: &str) -> u64 {
    fs::metadata(path).expect("it is there").ino()
}

/// The mount point of the cgroup2 hierarchy, and of one of version 1 that has nothing to do with accounting.
fn hierarchies() -> Option<(PathBuf, Option<PathBuf>)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let find = |kind: &str, option: &str| {
        let mut found = mounts.lines().filter_map(|line| {
            let (fields, rest) = line.split_once(" - ")?;
            let of_kind = rest.split(' ').next() == Some(kind) && rest.contains(option);
            let mut fields = fields.split(' ').skip(3);
            // Only a mount of the whole: paths are compared with those of /proc.
            (of_kind && fields.next() == Some("/")).then(|| PathBuf::from(fields.next().unwrap_or_default()))
        });
        found.next()
    };
    Some((find("cgroup2", "")?, find("cgroup", "freezer").or_else(|| find("cgroup", "name="))))
}

fn skip(reason: &str) {
    assert!(std::env::var_os("LAB").is_none_or(|v| v != "required"), "LAB=required, but {reason}");
    eprintln!("SKIPPED: {reason}");
}

#[test]
fn a_process_is_of_the_pod_that_its_cgroups_show_and_of_no_other() {
    if !nix::unistd::geteuid().is_root() {
        return skip("not root");
    }
    let Some((v2, v1)) = hierarchies() else { return skip("no cgroup2 hierarchy is mounted") };
    let name = format!("find-{}", std::process::id());
    let uid = |n: u8| format!("{n:08}-{:04x}-4000-8000-{:012}", std::process::id() & 0xffff, n);
    let node = v2.join(&name).join("node");
    let pod = |root: &Path, n: u8| root.join("kubepods/burstable").join(format!("pod{}", uid(n)));
    let mut made = Made::default();

    let honest = made.process(&[pod(&node, 1).join("c")], Network::Own);
    made.process(&[pod(&node, 2).join("c")], Network::OfTheNode);
    // Pod 3 makes cgroups below its own that look like those of pods 1 and 4, and puts a namespace of its own there.
    let liar = made.process(&[pod(&node, 3).join("c")], Network::Own);
    let nested = made.process(&[pod(&pod(&node, 3).join("c"), 1).join("c")], Network::Own);
    made.process(&[pod(&pod(&node, 3).join("c"), 4).join("c")], Network::OfTheNode);
    // A tree of another node, and one that no kubelet made.
    made.process(&[pod(&v2.join(&name).join("other"), 5).join("c")], Network::Own);
    made.process(&[node.join("system/kubepods/burstable").join(format!("pod{}", uid(6)))], Network::Own);
    let mut both = None;
    if let Some(v1) = &v1 {
        let old = made.process(&[pod(v1, 7).join("c")], Network::Own);
        // Version 1 says one pod and version 2 another: whoever may write to one of them is not believed.
        made.process(&[pod(v1, 8).join("c"), pod(&node, 9).join("c")], Network::Own);
        let agreed = made.process(&[pod(v1, 10).join("c"), pod(&node, 10).join("c")], Network::Own);
        both = Some((old, agreed));
    }

    let finder = Finder::new(Path::new("/proc"), &node, Some(inode("/proc/self/ns/net"))).expect("a finder");
    let wanted: BTreeSet<String> = (1..=10).map(uid).collect();
    let found = finder.find(&wanted).expect("/proc can be listed");
    let namespaces = |n: u8| -> BTreeSet<u64> {
        found.get(&uid(n)).into_iter().flatten().map(|found| found.netns.inode()).collect()
    };
    let of = |pids: &[u32]| -> BTreeSet<u64> { pids.iter().map(|pid| inode(&format!("/proc/{pid}/ns/net"))).collect() };
    assert_eq!(namespaces(1), of(&[honest]), "and not what pod 3 made");
    assert_eq!(namespaces(2), of(&[]), "the node's namespace is nobody's");
    assert_eq!(namespaces(3), of(&[liar, nested]), "both are pod 3's, so its address must decide");
    for n in [4, 5, 6, 8, 9] {
        assert_eq!(namespaces(n), of(&[]), "pod {n}");
    }
    match both {
        Some((old, agreed)) => {
            assert_eq!((namespaces(7), namespaces(10)), (of(&[old]), of(&[agreed])));
        }
        None => eprintln!("no hierarchy of version 1 is mounted: that part was left out"),
    }

    // A process that is gone is nobody's, whoever has its number next.
    let first = found[&uid(1)].first().expect("found above");
    assert!(first.process.is_alive());
    let child = made.children.iter_mut().find(|child| child.id() == honest).expect("started above");
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    assert!(!first.process.is_alive());
    assert!(!finder.find(&wanted).expect("/proc can be listed").contains_key(&uid(1)));
}
