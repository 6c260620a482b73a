//! Waiting for a condition with a deadline: the only way the lab ever waits.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// Asks `probe` until it yields a value, every few milliseconds, for at most `deadline`. The error names `what` and the last reason.
pub fn until<T>(what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_millis(2);
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(reason) if Instant::now() >= end => {
                return Err(anyhow!("{what}: not within {deadline:?}: {reason:#}"));
            }
            Err(_) => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        }
    }
}

/// As [`until`], for a plain yes or no.
pub fn until_true(what: &str, deadline: Duration, mut probe: impl FnMut() -> bool) -> Result<()> {
    until(what, deadline, || if probe() { Ok(()) } else { Err(anyhow!("still false")) })
}
