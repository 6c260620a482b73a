//! What the kernel counted: CPU, context switches and memory of the proxies, and what others did on the machine meanwhile.
//!
//! CPU comes from cgroups (microseconds, dead threads included). A contestant's proxies are what runs in its nodes' `system` cgroups.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::memory;

/// What `/proc/stat` counts in.
const TICKS_PER_SECOND: f64 = 100.0;
/// Cores that others may use before a run counts as disturbed.
const CALM: f64 = 0.3;

/// Counters at one moment.
pub struct Sample {
    at: Instant,
    /// Seconds of CPU, each.
    machine: f64,
    lab: f64,
    own: f64,
    proxies: f64,
    switches: u64,
}

/// What happened between two samples.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// CPU seconds of all proxies.
    pub proxies: f64,
    /// Context switches of all proxies.
    pub switches: u64,
    /// CPU seconds of this program.
    pub own: f64,
    /// Cores used by whatever is neither the lab nor this program.
    pub others: f64,
}

impl Spent {
    /// Whether others left the run alone.
    pub fn calm(&self) -> bool {
        self.others <= CALM
    }
}

impl Sample {
    /// Reads all counters; `lab` is the cgroup of the whole lab, `proxies` those of its proxies.
    ///
    /// # Errors
    /// When the kernel does not have them.
    pub fn take(lab: &Path, proxies: &[PathBuf]) -> Result<Self> {
        let mut spent = 0.0;
        let mut switches = 0;
        for cgroup in proxies.iter().filter(|cgroup| cgroup.exists()) {
            spent += cgroup_cpu(cgroup)?;
            switches += processes(cgroup)?.into_iter().map(context_switches).sum::<u64>();
        }
        Ok(Self {
            at: Instant::now(),
            machine: machine_cpu(&fs::read_to_string("/proc/stat")?)?,
            lab: cgroup_cpu(lab)?,
            own: process_cpu(&fs::read_to_string("/proc/self/stat")?)?,
            proxies: spent,
            switches,
        })
    }

    /// What was spent since `before`.
    pub fn since(&self, before: &Self) -> Spent {
        let wall = (self.at - before.at).as_secs_f64().max(1e-3);
        let own = self.own - before.own;
        let ours = (self.lab - before.lab) + own;
        Spent {
            proxies: self.proxies - before.proxies,
            switches: self.switches.saturating_sub(before.switches),
            own,
            others: ((self.machine - before.machine - ours) / wall).max(0.0),
        }
    }
}

fn cgroup_cpu(cgroup: &Path) -> Result<f64> {
    let path = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let micros: u64 =
        text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("no usage_usec in cpu.stat")?.parse()?;
    Ok(micros as f64 / 1e6)
}

/// Seconds in user and system mode and those stolen by the hypervisor. Interrupts are left out: they serve our own packets too.
fn machine_cpu(stat: &str) -> Result<f64> {
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let fields: Vec<u64> = line.split_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, _irq, _softirq, steal, ..] = fields[..] else {
        anyhow::bail!("/proc/stat has too few columns: {line}")
    };
    Ok((user + nice + system + steal) as f64 / TICKS_PER_SECOND)
}

fn process_cpu(stat: &str) -> Result<f64> {
    let fields: Vec<&str> = stat.rsplit_once(')').context("no process name in stat")?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).context("stat is too short");
    Ok((ticks(11)? + ticks(12)?) as f64 / TICKS_PER_SECOND)
}

/// PIDs in a cgroup, not those below it.
pub fn processes(cgroup: &Path) -> Result<Vec<u32>> {
    Ok(fs::read_to_string(cgroup.join("cgroup.procs"))?.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Of all threads; 0 for a process that is gone.
fn context_switches(pid: u32) -> u64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let status = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    status.map(|text| switches_in(&text)).sum()
}

fn switches_in(status: &str) -> u64 {
    let lines = status.lines().filter(|line| line.contains("ctxt_switches:"));
    lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

/// Resident memory of all processes of a cgroup in KiB.
pub fn resident_kib(cgroup: &Path) -> Result<u64> {
    processes(cgroup)?.into_iter().map(memory::resident_kib).sum()
}

/// What all processes of a cgroup have written to, in KiB: without their code, which comes and goes.
pub fn written_kib(cgroup: &Path) -> Result<u64> {
    processes(cgroup)?.into_iter().map(memory::written_kib).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_work_and_stolen_time_but_neither_idling_nor_interrupts() {
        let stat = "cpu  100 20 30 4000 500 6 7 80 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert!((machine_cpu(stat).unwrap() - 2.3).abs() < 1e-9);
        assert!(machine_cpu("cpu  1 2 3").is_err());
    }

    #[test]
    fn adds_both_kinds_of_switches() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t40\nnonvoluntary_ctxt_switches:\t2\n";
        assert_eq!(switches_in(status), 42);
    }

    #[test]
    fn a_process_name_with_brackets_does_not_confuse() {
        assert!((process_cpu("7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 150 50 0").unwrap() - 2.0).abs() < 1e-9);
    }
}
