//! What the streams of one connection have queued together. h2 bounds each stream alone; a client with many that reads
//! nothing would have all of them filled.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

/// Bytes the streams of a connection may queue before all that is queued has been written: eight streams' worth.
const MOST: usize = 8 * super::SEND_BUFFER;

/// Streams queue only what their windows let through, so once the connection has flushed nothing is left of it.
#[derive(Default)]
pub(super) struct Outbox {
    queued: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
}

impl Outbox {
    fn is_full(&self) -> bool {
        self.queued.load(Ordering::Acquire) >= MOST
    }

    /// Ready while there is room for whatever a stream may queue at once.
    pub(super) fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        if !self.is_full() {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have been emptied since; whoever does that takes the lock afterwards.
        if !self.is_full() {
            return Poll::Ready(());
        }
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// A stream has handed over that many bytes.
    pub(super) fn queued(&self, bytes: usize) {
        self.queued.fetch_add(bytes, Ordering::AcqRel);
    }

    /// All that was queued is written, or never will be.
    pub(super) fn emptied(&self) {
        if self.queued.swap(0, Ordering::AcqRel) < MOST {
            return;
        }
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::Arc, time::Duration};

    use super::*;

    #[tokio::test]
    async fn a_full_outbox_makes_everybody_wait_until_it_is_emptied() {
        let outbox = Arc::<Outbox>::default();
        outbox.queued(MOST - 1);
        poll_fn(|cx| outbox.poll_room(cx)).await;
        outbox.queued(1);
        let waiters = [(); 3].map(|()| {
            let outbox = outbox.clone();
            tokio::spawn(async move { poll_fn(|cx| outbox.poll_room(cx)).await })
        });
        tokio::task::yield_now().await;
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
        outbox.emptied();
        for waiter in waiters {
            tokio::time::timeout(Duration::from_secs(20), waiter).await.expect("woken").expect("no panic");
        }
    }
}
