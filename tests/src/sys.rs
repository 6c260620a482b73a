//! Small doors to the system: commands whose failure says what was run, work done inside a network namespace, process identity.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// Search path given to every process the lab starts.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command with a fixed search path.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", PATH);
    command
}

/// Runs a command to its end; a non-zero status is an error that carries the command and its standard error.
pub fn check(command: &mut Command) -> Result<Output> {
    let shown = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot run {shown}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{shown}: {}: {}", output.status, stderr.trim());
    }
    Ok(output)
}

/// Runs a program with `input` on its standard input.
pub fn feed(command: &mut Command, input: &str) -> Result<Output> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {shown}"))?;
    let mut stdin = child.stdin.take().expect("standard input was piped above");
    stdin.write_all(input.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{shown}: {}: {}\ninput was:\n{input}", output.status, stderr.trim());
    }
    Ok(output)
}

/// Feeds lines to `ip -batch` inside (`Some`) or outside a namespace.
pub fn ip_batch(netns: Option<&str>, lines: &str) -> Result<()> {
    let mut ip = command("ip");
    if let Some(netns) = netns {
        ip.args(["-n", netns]);
    }
    feed(ip.args(["-batch", "-"]), lines).map(drop)
}

/// Quotes one word for `sh`.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Runs `work` on a thread of its own inside the network namespace bound at `netns`; sockets made there belong to it.
///
/// # Errors
/// When the namespace cannot be entered, or what `work` returns.
pub fn in_netns<T: Send + 'static>(netns: &Path, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let namespace = File::open(netns).with_context(|| format!("no network namespace {}", netns.display()))?;
    let thread = std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)
            .context("cannot enter a network namespace: CAP_SYS_ADMIN is needed")?;
        work()
    });
    thread.join().map_err(|_| anyhow!("a thread inside {} panicked", netns.display()))?
}

/// Writes sysctls inside a namespace; names with slashes, below `/proc/sys`. One that this kernel does not have is skipped.
pub fn sysctl(netns: &Path, settings: &[(&str, &str)]) -> Result<()> {
    let settings: Vec<(String, String)> = settings.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    in_netns(netns, move || {
        for (name, value) in settings {
            let file = PathBuf::from("/proc/sys").join(&name);
            if file.exists() {
                std::fs::write(&file, &value).with_context(|| format!("cannot set {name} to {value}"))?;
            }
        }
        Ok(())
    })
}

/// Start time of a process in clock ticks since boot, `None` when it is gone or a zombie. With the PID it names one process for ever.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if fields.first() == Some(&"Z") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// Where the unified cgroup hierarchy is mounted on this machine; on hybrid systems that is not `/sys/fs/cgroup`.
pub fn cgroup2_root() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let fields: Vec<&str> = before.split(' ').collect();
        if after.starts_with("cgroup2 ") && fields.get(3) == Some(&"/") {
            return Ok(PathBuf::from(fields[4]));
        }
    }
    bail!("no cgroup2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}
