//! A worker that waits for the answer to what it has just passed on looks for it a moment longer before it sleeps: to be
//! woken costs more than a short message does, the more so where an idle core has to be woken first.
//!
//! ```text
//!           ┌──sleeps that ended soon, in bytes: NEEDED in a row──┐
//! Asleep ───┤                                                     ▼
//!           └◄──nothing came within the time──── Looking ◄──bytes──┘
//! ```
//!
//! Between two looks the core is offered to whoever else wants it. A worker whose traffic is slower than that, and one that
//! never runs out of work, sleep as ever.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use mesh::serve::activity;
use tokio::runtime::Builder;

/// So many short sleeps make a pattern.
const NEEDED: u8 = 4;

#[derive(Default)]
struct State {
    asleep_since: Cell<Option<Instant>>,
    moves_then: Cell<u64>,
    /// Sleeps in a row that ended soon, and in bytes.
    short: Cell<u8>,
    /// A sleep just ended, and soon.
    was_short: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    turn: Cell<bool>,
    /// So many looks there were.
    #[cfg(test)]
    looks: Cell<u32>,
}

thread_local! {
    static STATE: State = State::default();
}

/// Has the runtime tell us of its sleeps. `most` is how long a look goes on; zero turns it all off.
pub fn install(builder: &mut Builder, most: Duration) {
    if most.is_zero() {
        return;
    }
    builder.on_thread_park(|| STATE.with(State::before_sleep));
    builder.on_thread_unpark(move || STATE.with(|state| state.after_sleep(most)));
}

/// Starts what looks, on this thread's runtime.
pub fn start(most: Duration) {
    if !most.is_zero() {
        tokio::spawn(async move {
            loop {
                turn().await;
                look(most).await;
            }
        });
    }
}

impl State {
    /// Waking a task here keeps the runtime from sleeping.
    fn before_sleep(&self) {
        let moves = activity::moves();
        let moved = moves != self.moves_then.replace(moves);
        if self.was_short.replace(false) {
            self.short.set(if moved { self.short.get().saturating_add(1) } else { 0 });
        }
        if moved && self.short.get() >= NEEDED {
            self.turn.set(true);
            if let Some(waker) = self.waker.borrow_mut().take() {
                waker.wake();
                return;
            }
        }
        self.asleep_since.set(Some(Instant::now()));
    }

    fn after_sleep(&self, most: Duration) {
        if let Some(since) = self.asleep_since.take() {
            let soon = since.elapsed() <= most;
            self.was_short.set(soon);
            if !soon {
                self.short.set(0);
            }
        }
    }
}

/// Until the runtime would sleep although more is expected soon.
fn turn() -> impl Future<Output = ()> {
    poll_fn(|cx| {
        STATE.with(|state| {
            if state.turn.take() {
                return Poll::Ready(());
            }
            *state.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
    })
}

/// Asks the kernel for news, again and again, until there are bytes or the time is over.
async fn look(most: Duration) {
    let (began, before) = (Instant::now(), activity::moves());
    #[cfg(test)]
    STATE.with(|state| state.looks.set(state.looks.get() + 1));
    loop {
        std::thread::yield_now();
        // The runtime asks the kernel without waiting before it comes back here.
        tokio::task::yield_now().await;
        if activity::moves() != before {
            return;
        }
        if began.elapsed() > most {
            STATE.with(|state| state.short.set(0));
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use mesh::serve::copy_bidirectional;
    use mesh::telemetry::ByteCounts;

    use super::*;

    /// How often a thread looked that carried a ping-pong between two sockets.
    fn looks_of_a_ping_pong(most: Duration, round_trips: u32) -> u32 {
        let [(mut client, down), (mut server, up)] = [(); 2].map(|()| UnixStream::pair().expect("sockets"));
        let worker = std::thread::spawn(move || {
            let mut builder = Builder::new_current_thread();
            builder.enable_all();
            install(&mut builder, most);
            let runtime = builder.build().expect("a runtime");
            let _entered = runtime.enter();
            start(most);
            let ends = [down, up].map(|socket| {
                socket.set_nonblocking(true).expect("a socket");
                tokio::net::UnixStream::from_std(socket).expect("registered")
            });
            let [down, up] = ends;
            runtime.block_on(async {
                let counts = Arc::<ByteCounts>::default();
                copy_bidirectional(down, up, &counts).await.expect("no error");
            });
            STATE.with(|state| state.looks.get())
        });
        let mut byte = [0];
        for n in 0..round_trips {
            client.write_all(&[n as u8]).expect("sent");
            server.read_exact(&mut byte).expect("received");
            server.write_all(&byte).expect("sent");
            client.read_exact(&mut byte).expect("received");
            assert_eq!(byte[0], n as u8);
        }
        drop((client, server));
        worker.join().expect("it ends")
    }

    #[test]
    fn a_worker_in_a_ping_pong_looks_instead_of_sleeping() {
        // So long that every pause is a short one, whatever else the machine does.
        let looks = looks_of_a_ping_pong(Duration::from_secs(60), 100);
        assert!(looks > 50, "{looks} looks in 100 round trips");
    }

    #[test]
    fn who_is_told_to_sleep_sleeps() {
        assert_eq!(looks_of_a_ping_pong(Duration::ZERO, 100), 0);
    }

    #[test]
    fn a_look_without_news_ends_and_the_next_one_has_to_be_earned_again() {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        STATE.with(|state| state.short.set(NEEDED));
        runtime.block_on(look(Duration::from_micros(50)));
        assert_eq!(STATE.with(|state| state.short.get()), 0);
    }
}
