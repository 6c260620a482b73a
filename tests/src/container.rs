//! Starting a process the way a container runtime does: cgroup, network namespace, mount namespace with its own root, user and
//! capabilities, then the program.
//!
//! A small shell script does the steps, so the lab needs no unsafe code and no helper binary; every step ends in `exec`, so the PID
//! of the spawned child is the PID of the container's process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;

use crate::sys::{self, quote};

/// Capabilities a container has when its securityContext says nothing, as runtimes grant them.
pub const DEFAULT_CAPABILITIES: &[&str] = &[
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "net_bind_service",
    "net_raw",
    "sys_chroot",
    "mknod",
    "audit_write",
    "setfcap",
];

/// Who the process is and what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Security {
    pub uid: u32,
    pub gid: u32,
    /// `None`: all of them (a privileged container, or a process of the node). Names without `CAP_`, lower case.
    pub capabilities: Option<Vec<String>>,
    pub no_new_privileges: bool,
}

impl Security {
    /// Root with every right.
    pub fn privileged() -> Self {
        Self { uid: 0, gid: 0, capabilities: None, no_new_privileges: false }
    }

    /// What a pod gets that asks for nothing.
    pub fn unprivileged() -> Self {
        let defaults = DEFAULT_CAPABILITIES.iter().map(|name| (*name).to_owned());
        Self { capabilities: Some(defaults.collect()), ..Self::privileged() }
    }

    /// The command that takes these rights; ` -- PROGRAM ARGUMENTS` follow.
    pub fn setpriv(&self) -> String {
        let mut line = format!("setpriv --reuid {} --regid {} --clear-groups", self.uid, self.gid);
        if let Some(kept) = &self.capabilities {
            let mut set = String::from("-all");
            kept.iter().for_each(|name| set.push_str(&format!(",+{name}")));
            // Root's permitted set is what the bounding set leaves; any other user ends up with none, as in a container.
            line += &format!(" --inh-caps -all --bounding-set {}", quote(&set));
        }
        if self.no_new_privileges {
            line += " --no-new-privs";
        }
        line
    }
}

/// A directory or file of the host that the process sees at another place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    pub source: PathBuf,
    /// Absolute path as the process sees it.
    pub target: PathBuf,
    pub read_only: bool,
}

impl Bind {
    pub fn new(source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        Self { source: source.into(), target: target.into(), read_only: false }
    }
}

/// A root of its own: the host's programs and libraries, but an `/etc`, `/run`, `/tmp` and `/var` of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// Empty directory to build the root on; nothing is left in it.
    pub scratch: PathBuf,
    pub binds: Vec<Bind>,
    /// Host programs that appear in `/usr/local/bin` under another name.
    pub programs: Vec<(String, PathBuf)>,
    /// Directories to make, absolute.
    pub directories: Vec<PathBuf>,
    pub hostname: String,
    pub read_only: bool,
    /// Not a container but a machine: its sysctls can be set.
    pub writable_sysctls: bool,
}

/// Parts of the host every root shares. `/etc` is not among them.
const SHARED: &[&str] = &["usr", "dev", "proc"];
/// Links into `/usr` on a merged system, directories elsewhere.
const MERGED: &[&str] = &["bin", "sbin", "lib", "lib64", "lib32", "libx32"];
/// What programs need of `/etc` to start and to verify public certificates.
const ETC: &[&str] = &[
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "nsswitch.conf",
    "ssl",
    "ca-certificates",
    "alternatives",
    "mime.types",
];
const ACCOUNTS: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n\
                        nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUPS: &str = "root:x:0:\nadm:x:4:\nwww-data:x:33:\nnogroup:x:65534:\n";

/// A process to start.
#[derive(Clone, Debug)]
pub struct Launch {
    pub argv: Vec<String>,
    /// The whole environment beside `PATH`.
    pub env: BTreeMap<String, String>,
    /// Namespace file; `None` stays in the caller's.
    pub netns: Option<PathBuf>,
    /// Made if missing.
    pub cgroup: PathBuf,
    /// `None`: the host's file system.
    pub root: Option<Root>,
    pub security: Security,
    pub workdir: Option<PathBuf>,
    /// Standard output and error are appended here; `None` discards them.
    pub log: Option<PathBuf>,
}

impl Launch {
    /// A process with full rights on the host's file system.
    pub fn new(argv: &[&str], cgroup: PathBuf) -> Self {
        Self {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            env: BTreeMap::new(),
            netns: None,
            cgroup,
            root: None,
            security: Security::privileged(),
            workdir: None,
            log: None,
        }
    }

    /// The command that does it all; the caller spawns it. Its process leads a group of its own, so a terminal's Ctrl-C does not reach it.
    pub fn command(&self) -> Result<Command> {
        fs::create_dir_all(&self.cgroup).with_context(|| format!("cannot make cgroup {}", self.cgroup.display()))?;
        if let Some(root) = &self.root {
            fs::create_dir_all(&root.scratch)?;
        }
        let mut command = Command::new("/bin/sh");
        command.args(["-ec", &self.script(), "container"]).args(&self.argv);
        command.env_clear().env("PATH", sys::PATH).envs(&self.env);
        command.process_group(0).stdin(Stdio::null());
        match &self.log {
            Some(path) => {
                let log = append(path)?;
                command.stdout(log.try_clone()?).stderr(log);
            }
            None => {
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        Ok(command)
    }

    fn script(&self) -> String {
        let mut script = format!("echo $$ > {}/cgroup.procs\n", quote(&self.cgroup.display().to_string()));
        script += "exec ";
        if let Some(netns) = &self.netns {
            script += &format!("nsenter --net={} ", quote(&netns.display().to_string()));
        }
        let mut inner = String::new();
        let mut chroot = String::new();
        if let Some(root) = &self.root {
            inner += &root.script();
            chroot = format!("chroot {} ", quote(&root.scratch.display().to_string()));
        }
        let workdir = self.workdir.as_deref().unwrap_or(Path::new("/")).display().to_string();
        let run = format!("cd {} && exec {} -- \"$@\"", quote(&workdir), self.security.setpriv());
        let _ = writeln!(inner, "exec {chroot}/bin/sh -ec {} container \"$@\"", quote(&run));
        script
            + &format!("unshare --mount --uts --propagation private /bin/sh -ec {} container \"$@\"\n", quote(&inner))
    }
}

impl Root {
    fn script(&self) -> String {
        let root = quote(&self.scratch.display().to_string());
        let hostname = quote(&self.hostname);
        let mut s =
            format!("echo {hostname} > /proc/sys/kernel/hostname\nR={root}\nmount -t tmpfs -o mode=0755 pod \"$R\"\n");
        let shared: Vec<&str> = SHARED.to_vec();
        s += "cd \"$R\" && mkdir -p etc sys run tmp var/log var/lib var/tmp var/cache root home mnt ";
        let _ = writeln!(s, "{}", shared.join(" "));
        s += "chmod 1777 tmp var/tmp\nln -s ../run var/run\n";
        for dir in &shared {
            let _ = writeln!(s, "mount --rbind /{dir} {dir}");
        }
        for dir in MERGED.iter().filter(|dir| Path::new("/").join(dir).exists()) {
            match fs::read_link(Path::new("/").join(dir)) {
                Ok(link) => {
                    let _ = writeln!(s, "ln -s {} {dir}", quote(&link.display().to_string()));
                }
                Err(_) => {
                    let _ = writeln!(s, "mkdir -p {dir}; mount --rbind /{dir} {dir}");
                }
            }
        }
        if !self.writable_sysctls {
            // As by every container runtime.
            s += "mount --bind proc/sys proc/sys; mount -o remount,ro,bind proc/sys\n";
        }
        // Attributes of /sys/class/net are those of the namespace sysfs was mounted in.
        s += "mount -t sysfs sysfs sys\n";
        for name in ETC.iter().filter(|name| Path::new("/etc").join(name).exists()) {
            let _ = writeln!(s, "cp -a /etc/{name} etc/");
        }
        let _ = writeln!(s, "printf %s {} > etc/passwd; printf %s {} > etc/group", quote(ACCOUNTS), quote(GROUPS));
        let hosts = format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {}\n", self.hostname);
        let _ = writeln!(s, "printf %s {} > etc/hosts; echo {} > etc/hostname", quote(&hosts), quote(&self.hostname));
        for directory in &self.directories {
            let _ = writeln!(s, "mkdir -p \"$R\"{}", quote(&directory.display().to_string()));
        }
        // The mount namespace is private: the host's /usr/local/bin stays as it is.
        s += "mount -t tmpfs -o mode=0755 programs usr/local/bin\n";
        for (name, program) in &self.programs {
            s += &Bind::new(program, Path::new("/usr/local/bin").join(name)).script();
        }
        for bind in &self.binds {
            s += &bind.script();
        }
        if self.read_only {
            s += "mount -o remount,ro,bind \"$R\"\n";
        }
        s + "cd /\n"
    }
}

impl Bind {
    fn script(&self) -> String {
        let source = quote(&self.source.display().to_string());
        let target = quote(&self.target.display().to_string());
        let mut s = format!(
            "S={source}; T=\"$R\"{target}\n\
             if [ -d \"$S\" ]; then mkdir -p \"$T\"; else mkdir -p \"$(dirname \"$T\")\"; [ -e \"$T\" ] || : > \"$T\"; fi\n\
             mount --rbind \"$S\" \"$T\"\n"
        );
        if self.read_only {
            s += "mount -o remount,ro,bind \"$T\"\n";
        }
        s
    }
}

/// Opens a log for appending, making its directory.
pub fn append(path: &Path) -> Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    OpenOptions::new().create(true).append(true).open(path).with_context(|| format!("cannot write {}", path.display()))
}

/// Is the process in the root that was made for it? Before, it is a shell that still mounts.
///
/// # Errors
/// When it has ended.
pub fn is_set_up(pid: u32) -> io::Result<bool> {
    let (own, root) = (fs::metadata("/")?, fs::metadata(format!("/proc/{pid}/root"))?);
    Ok((own.dev(), own.ino()) != (root.dev(), root.ino()))
}

/// A command that runs inside a container that is set up: its namespaces, root and cgroup. Rights are the caller's.
pub fn exec_command(pid: u32, cgroup: &Path, env: &BTreeMap<String, String>, argv: &[String]) -> Command {
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec nsenter --target {pid} --mount --uts --net --root --wd -- \"$@\"",
        quote(&cgroup.display().to_string())
    );
    let mut command = Command::new("/bin/sh");
    command.args(["-ec", &script, "exec"]).args(argv);
    command.env_clear().env("PATH", sys::PATH).envs(env);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_become_a_bounding_set() {
        let security = Security { capabilities: Some(vec!["net_admin".into()]), ..Security::privileged() };
        assert!(security.setpriv().ends_with("--inh-caps -all --bounding-set '-all,+net_admin'"));
        assert!(!Security::privileged().setpriv().contains("bounding"));
    }

    #[test]
    fn words_survive_the_shell() {
        let output = sys::check(sys::command("sh").args(["-c", &format!("printf %s {}", quote("a'b $c \"d\""))]));
        assert_eq!(output.expect("sh runs").stdout, b"a'b $c \"d\"");
    }
}
