//! One accept loop for every listener.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::Instant,
};

use crate::{
    drain::DrainWatcher,
    net::{PeerAddr, canonical, tune},
};

/// When the process has no file descriptors left, asking again at once would only burn the CPU that frees some.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// How often the log tells that nothing can be accepted: of all loops together, as they fail together.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Connections taken off the queue of a listener that is about to close: as long as the longest queue.
const LAST_ACCEPTS: usize = 65_536;

/// Tasks that watch the cut themselves get this long to record that they were drained; the others are aborted then.
const CUT_GRACE: Duration = Duration::from_millis(200);

/// Tunes the listener, and with it what it accepts from now on (see [`tune`]), and hands each connection to `handler`, whose
/// futures run as tasks of this loop. On drain what is in the listener's queue is served still, as closing the listener
/// would reset it; then the listener is closed and the tasks may finish until the cut. Dropping the future of this function
/// cuts them at once.
pub async fn accept_loop<H, F>(listener: TcpListener, drain: DrainWatcher, handler: H)
where
    H: Fn(TcpStream, PeerAddr) -> F + Send,
    F: Future<Output = ()> + Send + 'static,
{
    if let Err(error) = tune(&listener) {
        tracing::warn!(%error, "setting a listener's options");
    }
    let mut tasks = JoinSet::new();
    let mut draining = std::pin::pin!(drain.draining());
    loop {
        // A connection that arrives in the same instant as the drain is served: `accept` is cancel safe.
        tokio::select! {
            biased;
            () = &mut draining => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => start(&mut tasks, &handler, stream, peer),
                Err(error) => pause_after(&error).await,
            },
            // Reaps what has finished.
            Some(_) = tasks.join_next() => {}
        }
    }
    match listener.into_std() {
        Ok(listener) => last_accepts(&listener, |stream, peer| start(&mut tasks, &handler, stream, peer)),
        Err(error) => tracing::warn!(%error, "emptying a listener's queue"),
    }
    tokio::select! {
        () = async { while tasks.join_next().await.is_some() {} } => return,
        () = drain.cut() => {}
    }
    let last_words = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(CUT_GRACE, last_words).await.is_err() {
        tasks.shutdown().await;
    }
}

/// Takes what is queued, asking the kernel itself: the runtime may not have heard of the latest.
fn last_accepts(listener: &std::net::TcpListener, mut take: impl FnMut(TcpStream, SocketAddr)) {
    // Bounded, because whoever is still steered here would otherwise keep it from ending.
    for _ in 0..LAST_ACCEPTS {
        let accepted = listener.accept().and_then(|(stream, peer)| {
            stream.set_nonblocking(true)?;
            Ok((TcpStream::from_std(stream)?, peer))
        });
        match accepted {
            Ok((stream, peer)) => take(stream, peer),
            // That one is gone; the next may not be.
            Err(error) if crate::net::is_hang_up(error.kind()) => {}
            Err(_) => return,
        }
    }
}

fn start<H, F>(tasks: &mut JoinSet<()>, handler: &H, stream: TcpStream, peer: SocketAddr)
where
    H: Fn(TcpStream, PeerAddr) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    tasks.spawn(handler(stream, PeerAddr(canonical(peer))));
}

async fn pause_after(error: &io::Error) {
    // The connection is gone, not the listener.
    if crate::net::is_hang_up(error.kind()) {
        return;
    }
    metrics::counter!("mesh_accept_failures_total").increment(1);
    if let Some(attempts) = FAILURES.lock().unwrap_or_else(PoisonError::into_inner).tell(Instant::now()) {
        tracing::warn!(%error, attempts, "connections cannot be accepted, and wait");
    }
    tokio::time::sleep(EXHAUSTED_PAUSE).await;
}

/// Failures of the whole process.
static FAILURES: Mutex<Failures> = Mutex::new(Failures { told: None, untold: 0 });

struct Failures {
    told: Option<Instant>,
    untold: u64,
}

impl Failures {
    /// Counts one, and returns how many there were since the last time if it is time to say so.
    fn tell(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        if self.told.is_some_and(|told| now < told + TOLD_EVERY) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain;

    #[test]
    fn failures_are_told_once_in_a_while_with_their_number() {
        let mut failures = Failures { told: None, untold: 0 };
        let start = Instant::now();
        let said: Vec<_> = (0..25).map(|second| failures.tell(start + Duration::from_secs(second))).collect();
        let told: Vec<_> = said.iter().enumerate().filter_map(|(second, n)| Some((second, (*n)?))).collect();
        assert_eq!(told, [(0, 1), (10, 10), (20, 10)]);
    }

    #[tokio::test]
    async fn what_is_queued_when_the_drain_begins_is_served() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watcher) = drain::channel();
        let guard = watcher.guard();
        let draining = tokio::spawn(trigger.drain(Duration::from_secs(5)));
        watcher.draining().await;
        let mut clients = Vec::new();
        for _ in 0..20 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let served = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = served.clone();
        accept_loop(listener, watcher, move |_stream, _peer| {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            async {}
        })
        .await;
        assert_eq!(served.load(std::sync::atomic::Ordering::Relaxed), clients.len());
        drop(guard);
        draining.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_accepted_is_tuned() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watcher) = drain::channel();
        let (seen, mut sight) = tokio::sync::mpsc::channel(1);
        let accepting = tokio::spawn(accept_loop(listener, watcher, move |stream, _peer| {
            let seen = seen.clone();
            async move {
                let socket = socket2::SockRef::from(&stream);
                let tuned = (socket.tcp_nodelay().unwrap(), socket.keepalive().unwrap());
                seen.send((tuned, socket.tcp_keepalive_time().unwrap())).await.unwrap();
            }
        }));
        // What is connected before the loop has begun has what the listener had then.
        tokio::task::yield_now().await;
        let _client = TcpStream::connect(address).await.unwrap();
        assert_eq!(sight.recv().await, Some(((true, true), Duration::from_secs(180))));
        trigger.drain(Duration::from_secs(5)).await;
        accepting.await.unwrap();
    }

    #[tokio::test]
    async fn a_task_that_is_cut_may_still_say_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (trigger, watcher) = drain::channel();
        let (started, mut starts) = tokio::sync::mpsc::channel(1);
        let (told, mut tellings) = tokio::sync::mpsc::channel(1);
        let watch = watcher.clone();
        let accepting = tokio::spawn(accept_loop(listener, watcher.clone(), move |_stream, _peer| {
            let (watch, started, told) = (watch.clone(), started.clone(), told.clone());
            async move {
                let _guard = watch.guard();
                started.send(()).await.unwrap();
                watch.cut().await;
                told.send(()).await.unwrap();
            }
        }));
        let _client = TcpStream::connect(address).await.unwrap();
        starts.recv().await.unwrap();
        trigger.drain(Duration::from_millis(1)).await;
        accepting.await.unwrap();
        assert_eq!(tellings.try_recv(), Ok(()));
    }
}
