//! What a stream says, and whether it has left.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use h2::SendStream;
use tokio::sync::oneshot;

/// The sending half of a stream, which knows what of it h2 still has.
pub struct Sending {
    pub(super) stream: SendStream<Bytes>,
    /// Held by all that is queued, too.
    queue: Arc<Queue>,
}

/// Is gone once all that a stream has queued is with the connection's codec, or the stream is no more. Whoever waits for that
/// has the other end.
#[derive(Default)]
struct Queue(OnceLock<oneshot::Sender<()>>);

/// h2 tells nobody what has left. An empty frame behind it would show that, and is what a peer takes for a flood after the
/// hundredth.
struct Queued {
    data: Bytes,
    #[expect(dead_code, reason = "its end is what counts")]
    queue: Arc<Queue>,
}

impl AsRef<[u8]> for Queued {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Sending {
    pub(super) fn new(stream: SendStream<Bytes>) -> Self {
        Self { stream, queue: Arc::default() }
    }

    /// Queues `data`, and behind it the end if this is it.
    ///
    /// # Errors
    /// When the stream is gone.
    pub(super) fn send(&mut self, data: Bytes, end: bool) -> Result<(), h2::Error> {
        let data = Bytes::from_owner(Queued { data, queue: self.queue.clone() });
        self.stream.send_data(data, end)
    }

    /// Resolves when all that was queued has left. None when nothing has to.
    pub(super) fn departure(&mut self) -> Option<oneshot::Receiver<()>> {
        if Arc::strong_count(&self.queue) == 1 {
            return None;
        }
        let (last, departed) = oneshot::channel();
        let _ = std::mem::take(&mut self.queue).0.set(last);
        Some(departed)
    }
}
