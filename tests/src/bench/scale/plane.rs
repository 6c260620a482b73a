//! The control plane that is measured: a process of its own, in a cgroup of its own, of which the kernel counts what it takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::bench::interrupt::Interrupt;
use crate::bench::usage;
use crate::local;
use crate::raw::{Node, Process};
use crate::record;

/// Where proxies call.
pub const GRPC_PORT: u16 = 15012;
const MONITORING_PORT: u16 = 15014;
/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// A running control plane.
pub struct Plane {
    guard: Guard,
    process: Process,
    cgroup: PathBuf,
    started: Instant,
}

impl Plane {
    /// Starts the program against an API server on the node's loopback. It is ended when it takes more than `most_mib`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(node: &Node, program: &Path, api_port: u16, scratch: &Path, most_mib: u64) -> Result<Self> {
        let kubeconfig = scratch.join("kubeconfig");
        fs::write(&kubeconfig, kubeconfig_text(api_port))?;
        let env = [
            ("KUBECONFIG", kubeconfig.display().to_string()),
            ("ISTIOD_GRPC_ADDR", format!("127.0.0.1:{GRPC_PORT}")),
            ("ISTIOD_MONITORING_ADDR", format!("127.0.0.1:{MONITORING_PORT}")),
        ];
        let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let argv = local::unlimited(&[&program.display().to_string()]);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let started = Instant::now();
        let process = node.spawn("istiod-lite", &argv, &env)?;
        let cgroup = node.cgroup.join("system");
        let guard = Guard::watch(cgroup.clone(), most_mib)?;
        Ok(Self { guard, process, cgroup, started })
    }

    /// Waits until it serves, and says how long that took.
    ///
    /// # Errors
    /// When it does not.
    pub fn ready(&mut self, node: &Node, deadline: Duration, interrupt: &Interrupt) -> Result<Duration> {
        interrupt.until("the control plane to be ready", deadline, || {
            self.check()?;
            // It may not listen yet.
            let answer = local::http(node, MONITORING_PORT, "/ready").unwrap_or_default();
            Ok(answer.starts_with("HTTP/1.1 200").then(|| self.started.elapsed()))
        })
    }

    /// # Errors
    /// When it has ended, by itself or by us.
    pub fn check(&mut self) -> Result<()> {
        if let Some(mib) = self.guard.exceeded() {
            bail!("the control plane was ended, as it took more than {mib} MiB");
        }
        if !self.process.running() {
            let output = self.process.output();
            let lines: Vec<&str> = output.lines().collect();
            bail!("the control plane has ended:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
        }
        Ok(())
    }

    /// The cgroup that nothing else is in.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub fn resident_mib(&self) -> Result<f64> {
        Ok(usage::resident_kib(&self.cgroup)? as f64 / 1024.0)
    }

    /// The most it has had since the last time this was asked, in MiB.
    pub fn take_peak_mib(&self) -> f64 {
        self.guard.watched.peak_kib.swap(0, Ordering::Relaxed) as f64 / 1024.0
    }
}

fn kubeconfig_text(api_port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: bench\n\
         clusters: [{{name: bench, cluster: {{server: \"http://127.0.0.1:{api_port}\"}}}}]\n\
         users: [{{name: bench, user: {{}}}}]\n\
         contexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]\n"
    )
}

/// Looks at the memory of what runs in a cgroup, and ends that before it takes the machine's.
struct Guard {
    watched: Arc<Watched>,
    most_mib: u64,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Watched {
    peak_kib: AtomicU64,
    exceeded: AtomicBool,
    over: AtomicBool,
}

impl Guard {
    fn watch(cgroup: PathBuf, most_mib: u64) -> Result<Self> {
        let watched = Arc::<Watched>::default();
        let shared = Arc::clone(&watched);
        let thread = std::thread::Builder::new().name("memory".to_owned()).spawn(move || {
            while !shared.over.load(Ordering::Relaxed) {
                let kib = resident_kib_in(&cgroup);
                shared.peak_kib.fetch_max(kib, Ordering::Relaxed);
                if kib > most_mib * 1024 && !shared.exceeded.swap(true, Ordering::Relaxed) {
                    // What cannot be ended this way ends with the lab.
                    let _ = record::kill_cgroup(&cgroup);
                }
                std::thread::sleep(LOOK);
            }
        })?;
        Ok(Self { watched, most_mib, thread: Some(thread) })
    }

    /// How much was too much.
    fn exceeded(&self) -> Option<u64> {
        self.watched.exceeded.load(Ordering::Relaxed).then_some(self.most_mib)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.watched.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does not panic.
            let _ = thread.join();
        }
    }
}

/// Of whatever is there; what has ended has none. Cheaper than the exact figure, and good enough to be looked at all the time.
fn resident_kib_in(cgroup: &Path) -> u64 {
    let pids = usage::processes(cgroup).unwrap_or_default();
    let status = pids.into_iter().filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
    status.filter_map(|text| resident_kib(&text)).sum()
}

fn resident_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_says_of_memory() {
        assert_eq!(resident_kib("Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t  812 kB\n"), Some(812));
        assert_eq!(resident_kib("Name:\tx\nState:\tZ (zombie)\n"), None);
    }

    #[test]
    fn a_kubeconfig_is_yaml_that_names_the_server() {
        let kubeconfig = kube::config::Kubeconfig::from_yaml(&kubeconfig_text(4711)).expect("it can be read");
        let cluster = kubeconfig.clusters[0].cluster.as_ref().expect("it has a cluster");
        assert_eq!(cluster.server.as_deref(), Some("http://127.0.0.1:4711"));
    }
}
