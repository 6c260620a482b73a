//! Gives memory back after a burst.
//!
//! The C library keeps what is freed for the next allocation, up to tens of megabytes, and a node has its proxy's memory
//! for nothing until the next transfer. To give it back at once would cost a transfer a third of its speed: its buffers
//! come and go all the time. So it goes once the process has little to do. So does, after the start, the code that only the
//! start needed.

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use tokio::time::Instant;

use crate::calls::{give_back_code, give_back_memory};

/// Share of one core above which the process has something to do.
const BUSY: f64 = 0.05;

/// Tells the quiet after a burst by the CPU the process takes.
pub struct Heap {
    looked: Instant,
    spent: Duration,
    /// There was a burst, the first being the start, and its memory has not been given back yet.
    burst: bool,
    started: bool,
}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

impl Heap {
    #[must_use]
    pub fn new() -> Self {
        Self { looked: Instant::now(), spent: spent(), burst: true, started: false }
    }

    /// To be called every few seconds: gives back what was freed if there was little to do since the last time, and more
    /// before that.
    pub fn look(&mut self) {
        if self.is_quiet(Instant::now(), spent()) {
            give_back_memory();
            if !std::mem::replace(&mut self.started, true)
                && let Err(error) = give_back_code()
            {
                tracing::debug!(%error, "code that is not needed any more stays in memory");
            }
        }
    }

    fn is_quiet(&mut self, now: Instant, spent: Duration) -> bool {
        let (time, cpu) = (now - self.looked, spent.saturating_sub(self.spent));
        (self.looked, self.spent) = (now, spent);
        let busy = cpu.as_secs_f64() > BUSY * time.as_secs_f64();
        let quiet = self.burst && !busy;
        self.burst = busy;
        quiet
    }
}

/// CPU time of all threads until now; nothing where the kernel does not say.
fn spent() -> Duration {
    let micros = |usage: nix::sys::resource::Usage| {
        (usage.user_time() + usage.system_time()).num_microseconds().try_into().unwrap_or_default()
    };
    getrusage(UsageWho::RUSAGE_SELF).map(micros).map(Duration::from_micros).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn memory_goes_once_after_each_burst() {
        let mut heap = Heap { looked: Instant::now(), spent: Duration::ZERO, burst: true, started: true };
        let mut spent = Duration::ZERO;
        let mut gone = Vec::new();
        for millis in [5000, 3000, 10, 10, 0, 400, 100, 0] {
            tokio::time::advance(Duration::from_secs(5)).await;
            spent += Duration::from_millis(millis);
            gone.push(heap.is_quiet(Instant::now(), spent));
        }
        assert_eq!(gone, [false, false, true, false, false, false, true, false]);
    }

    #[test]
    fn the_kernel_says_what_was_spent() {
        let before = spent();
        while spent() == before {
            std::hint::spin_loop();
        }
    }
}
