//! What one caller may hold of the control plane's memory and time: streams, bytes of requests that are being read, and one
//! request that takes long. Whoever has a token may ask for as much as a proxy needs, and for no more by asking often.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

use super::grpc::MAX_REQUEST;
use crate::resources::lock;

/// Streams of one pod. A proxy has one, two while it is replaced, and some that broke without our knowing.
const STREAMS_OF_POD: usize = 32;
/// Of a service account, with tokens that are bound to no pod or with certificates: machines share it.
const STREAMS_OF_ACCOUNT: usize = 2048;
/// Bytes that are given out at once.
const UNIT: usize = 1024;
/// Of large requests of all callers; of one, as much as the largest.
const ROOM: usize = 4 * MAX_REQUEST;

/// Who has which share.
#[derive(Debug, Clone)]
pub struct Callers {
    room: Arc<Semaphore>,
    long: Arc<Long>,
    known: Arc<Mutex<HashMap<Who, Weak<Holding>>>>,
}

/// Namespace, service account, and the UID of the pod.
type Who = (Arc<str>, Arc<str>, Option<Arc<str>>);

#[derive(Debug)]
struct Holding {
    streams: Arc<Semaphore>,
    room: Arc<Semaphore>,
    /// Of requests that take long: one at a time.
    turn: Arc<Semaphore>,
}

/// A caller holds as many streams as it may.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} streams of this caller are open already")]
pub struct TooMany(usize);

/// One stream of a caller.
#[derive(Debug)]
pub struct Entry {
    holding: Arc<Holding>,
    room: Arc<Semaphore>,
    long: Arc<Long>,
    _stream: OwnedSemaphorePermit,
}

/// What its requests are read with.
#[derive(Debug, Clone)]
pub struct Share {
    /// Kept while anything of it is held, whether the stream is there or not: who comes back has what is left.
    own: Arc<Holding>,
    all: Arc<Semaphore>,
}

/// The caller's one request that takes long, until it is dropped.
pub type Turn = OwnedSemaphorePermit;

/// Threads for what takes long, in the order in which it comes: what a client holds of the mesh is read, and what it lacks looked
/// up, in 10 ms, and behind a thousand of them would wait the tasks of those who have everything and are to hear of a change.
/// Beside these threads they have theirs to themselves, as far as the kernel shares the cores out.
#[derive(Debug)]
pub struct Long(Option<Runtime>);

impl Long {
    fn new() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.max_blocking_threads(threads).thread_name("long").build();
        Self(Some(runtime.expect("a runtime without sockets and timers opens nothing")))
    }

    /// Does it on one of the threads; not at all if what is returned is dropped before it is its turn.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> AbortOnDropHandle<T> {
        let runtime = self.0.as_ref().expect("it is there until it is dropped");
        AbortOnDropHandle::new(runtime.spawn_blocking(work))
    }
}

impl Drop for Long {
    fn drop(&mut self) {
        // Waits for nothing: this is on a thread of another one.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Room for one request, until it is dropped.
pub type Reserved = [OwnedSemaphorePermit; 2];

impl Default for Callers {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(ROOM / UNIT)), long: Arc::new(Long::new()), known: Arc::default() }
    }
}

impl Callers {
    /// Counts one more stream, until the entry is dropped.
    ///
    /// # Errors
    /// There are too many.
    pub fn enter(&self, namespace: &str, account: &str, pod: Option<&str>) -> Result<Entry, TooMany> {
        let most = if pod.is_some() { STREAMS_OF_POD } else { STREAMS_OF_ACCOUNT };
        let holding = {
            let mut known = lock(&self.known);
            // Of those that have gone, at most as many are kept as are there.
            if known.len() == known.capacity() {
                known.retain(|_, holding| holding.strong_count() > 0);
            }
            let place = known.entry((namespace.into(), account.into(), pod.map(Arc::from))).or_default();
            place.upgrade().unwrap_or_else(|| {
                let holding = Arc::new(Holding {
                    streams: Arc::new(Semaphore::new(most)),
                    room: Arc::new(Semaphore::new(MAX_REQUEST / UNIT)),
                    turn: Arc::new(Semaphore::new(1)),
                });
                *place = Arc::downgrade(&holding);
                holding
            })
        };
        match Arc::clone(&holding.streams).try_acquire_owned() {
            Ok(stream) => {
                let (room, long) = (Arc::clone(&self.room), Arc::clone(&self.long));
                Ok(Entry { holding, room, long, _stream: stream })
            }
            Err(_) => Err(TooMany(most)),
        }
    }
}

impl Entry {
    pub fn share(&self) -> Share {
        Share { own: Arc::clone(&self.holding), all: Arc::clone(&self.room) }
    }

    pub fn long(&self) -> &Long {
        &self.long
    }
}

impl Share {
    /// Waits for room for a request of so many bytes: first for the caller's other ones, then for those of others.
    pub fn reserve(&self, length: usize) -> BoxFuture<'static, Reserved> {
        let units = u32::try_from(length.min(MAX_REQUEST).div_ceil(UNIT)).unwrap_or(u32::MAX);
        let (own, all) = (Arc::clone(&self.own.room), Arc::clone(&self.all));
        async move {
            let take = async |of: Arc<Semaphore>| of.acquire_many_owned(units).await.expect("they are never closed");
            [take(own).await, take(all).await]
        }
        .boxed()
    }

    /// Waits until the caller's other one has been handled.
    pub fn turn(&self) -> BoxFuture<'static, Turn> {
        let turn = Arc::clone(&self.own.turn);
        async move { turn.acquire_owned().await.expect("it is never closed") }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_caller_has_so_many_streams_and_those_that_left_are_forgotten() {
        let callers = Callers::default();
        let mut streams: Vec<Entry> =
            (0..STREAMS_OF_POD).map(|_| callers.enter("a", "b", Some("c")).unwrap()).collect();
        assert_eq!(callers.enter("a", "b", Some("c")).unwrap_err(), TooMany(STREAMS_OF_POD));
        assert!(callers.enter("a", "b", Some("d")).is_ok(), "another pod");
        assert!(callers.enter("a", "b", None).is_ok());
        streams.pop();
        assert!(callers.enter("a", "b", Some("c")).is_ok());
        for uid in 0..10_000 {
            callers.enter("a", "b", Some(&uid.to_string())).unwrap();
        }
        assert!(lock(&callers.known).len() < 100);
        assert_eq!(callers.enter("a", "b", Some("c")).map(|_| ()), Ok(()));
        assert_eq!(streams.len(), STREAMS_OF_POD - 1);
    }

    #[tokio::test]
    async fn who_comes_back_has_what_its_former_streams_have_left() {
        let callers = Callers::default();
        let enter = || callers.enter("a", "b", Some("c")).unwrap().share();
        // Its stream has gone, as that of a request has that waits for a thread.
        let held = enter();
        let (room, turn) = (held.reserve(MAX_REQUEST).await, held.turn().await);
        let back = enter();
        assert!(back.reserve(UNIT).now_or_never().is_none());
        assert!(back.turn().now_or_never().is_none());
        drop((room, turn, held));
        assert!(back.reserve(UNIT).now_or_never().is_some());
        assert!(back.turn().now_or_never().is_some());
    }

    #[tokio::test]
    async fn one_caller_leaves_room_for_others() {
        let callers = Callers::default();
        let [one, other] = ["one", "other"].map(|pod| callers.enter("a", "b", Some(pod)).unwrap().share());
        let held = one.reserve(MAX_REQUEST).await;
        assert!(one.reserve(UNIT).now_or_never().is_none());
        assert!(other.reserve(MAX_REQUEST).now_or_never().is_some());
        drop(held);
        assert!(one.reserve(UNIT).now_or_never().is_some());
    }
}
