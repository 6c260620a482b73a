//! What a process has in memory, exact where `/proc/PID/status` of one with many threads is not.

use std::fs;

use anyhow::{Context, Result};

/// All of it, in KiB.
///
/// # Errors
/// When there is no such process.
pub fn resident_kib(pid: u32) -> Result<u64> {
    kib(pid, "Rss:")
}

/// What it has written to, in KiB: without its code, which comes and goes by its own rules.
///
/// # Errors
/// When there is no such process.
pub fn written_kib(pid: u32) -> Result<u64> {
    kib(pid, "Anonymous:")
}

fn kib(pid: u32, kind: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(kind)).with_context(|| format!("no {kind}"))?;
    Ok(line.split_whitespace().next().context("no value")?.parse()?)
}
