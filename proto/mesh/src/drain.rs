//! Shutting down without losing connections: one trigger, many watchers, and a count of who is still working.
//!
//! ```text
//! running ──drain()──► draining ──last guard dropped──► done
//!                          └──────deadline────────────► cut
//! ```
//! Watchers learn of *draining* (take nothing new, finish what runs) and of *cut* (let go now). Dropping the trigger is
//! an immediate cut: whoever owned it is gone, so nobody would wait.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Phase {
    Running,
    Draining,
    Cut,
}

/// How a drain ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drained {
    /// Everyone finished in time.
    Clean,
    /// The deadline passed and the rest was told to let go.
    Cut,
}

/// Starts the drain. There is one.
pub struct DrainTrigger {
    phase: watch::Sender<Phase>,
    working: Arc<watch::Sender<usize>>,
}

/// Learns of the drain; cheap to clone.
#[derive(Clone)]
pub struct DrainWatcher {
    phase: watch::Receiver<Phase>,
    working: Arc<watch::Sender<usize>>,
}

/// Work that the drain waits for until this is dropped. One per listener, pool or worker rather than per connection:
/// the count is shared between threads.
pub struct Guard(Arc<watch::Sender<usize>>);

/// A connected trigger and watcher.
pub fn channel() -> (DrainTrigger, DrainWatcher) {
    let (phase, watching) = watch::channel(Phase::Running);
    let working = Arc::new(watch::Sender::new(0));
    (DrainTrigger { phase, working: working.clone() }, DrainWatcher { phase: watching, working })
}

impl DrainTrigger {
    /// Tells everyone to finish and waits for nobody: [`Self::drain`] does that later.
    pub fn begin(&self) {
        self.phase.send_if_modified(|phase| {
            let first = *phase < Phase::Draining;
            *phase = (*phase).max(Phase::Draining);
            first
        });
    }

    /// Returns once every [`Guard`] is dropped. Safe to drop and call again.
    pub fn finished(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut working = self.working.subscribe();
        async move {
            // The sender lives in each watcher: without one nobody is left who could work.
            let _ = working.wait_for(|count| *count == 0).await;
        }
    }

    /// Tells everyone to finish, waits until every [`Guard`] is dropped or `deadline` has passed, and then cuts.
    pub async fn drain(self, deadline: Duration) -> Drained {
        self.begin();
        let finished = tokio::time::timeout(deadline, self.finished()).await;
        self.phase.send_replace(Phase::Cut);
        if finished.is_ok() { Drained::Clean } else { Drained::Cut }
    }
}

impl Drop for DrainTrigger {
    fn drop(&mut self) {
        self.phase.send_replace(Phase::Cut);
    }
}

impl DrainWatcher {
    /// Returns once nothing new may be taken. Safe to drop and call again.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reached(Phase::Draining)
    }

    /// Returns once everything must be let go.
    pub fn cut(&self) -> impl Future<Output = ()> + Send + use<> {
        self.reached(Phase::Cut)
    }

    /// Holds the drain up until it is dropped.
    pub fn guard(&self) -> Guard {
        self.working.send_modify(|count| *count += 1);
        Guard(self.working.clone())
    }

    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }

    pub fn is_cut(&self) -> bool {
        *self.phase.borrow() >= Phase::Cut
    }

    /// Borrows nothing, so that it can be awaited from a task of its own.
    fn reached(&self, phase: Phase) -> impl Future<Output = ()> + Send + use<> {
        let mut watching = self.phase.clone();
        async move {
            // An error means that the trigger is gone, which its drop has made a cut.
            let _ = watching.wait_for(|now| *now >= phase).await;
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn drain_waits_for_guards_and_then_cuts() {
        let (trigger, watcher) = channel();
        let guard = watcher.guard();
        assert!(!watcher.is_draining());
        let worker = tokio::spawn({
            let watcher = watcher.clone();
            async move {
                watcher.draining().await;
                assert!(!watcher.is_cut());
                drop(guard);
            }
        });
        assert_eq!(trigger.drain(Duration::from_secs(5)).await, Drained::Clean);
        worker.await.expect("the worker saw the drain before the cut");
        watcher.cut().await;
    }

    #[tokio::test(start_paused = true)]
    async fn deadline_cuts_who_does_not_finish() {
        let (trigger, watcher) = channel();
        let _guard = watcher.guard();
        let start = tokio::time::Instant::now();
        assert_eq!(trigger.drain(Duration::from_secs(5)).await, Drained::Cut);
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        assert!(watcher.is_cut());
    }

    #[tokio::test]
    async fn losing_the_trigger_cuts() {
        let (trigger, watcher) = channel();
        drop(trigger);
        watcher.draining().await;
        watcher.cut().await;
    }
}
