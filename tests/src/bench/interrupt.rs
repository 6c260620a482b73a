//! Ctrl-C: noticed at the next step, so that labs are taken down by their owner as at any other end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Whether somebody asked us to stop.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes SIGINT and SIGTERM over for the rest of the process.
    ///
    /// # Errors
    /// When no thread or handler can be made.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        let flag = interrupt.0.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut int, mut term) = {
            let _inside = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        // Lives as long as the process; there is nothing to join it for.
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = int.recv() => {}
                    _ = term.recv() => {}
                }
                flag.store(true, Ordering::Relaxed);
            });
        })?;
        Ok(interrupt)
    }

    /// # Errors
    /// When we were asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Asks `probe` every few milliseconds until it yields a value.
    ///
    /// # Errors
    /// What `probe` returns, at once; the deadline, which names `what`; an interruption.
    pub fn until<T>(&self, what: &str, deadline: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let end = Instant::now() + deadline;
        loop {
            self.check()?;
            if let Some(value) = probe().with_context(|| what.to_owned())? {
                return Ok(value);
            }
            if Instant::now() >= end {
                bail!("{what}: not within {deadline:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
