//! Bytes from one stream to another and back, until both directions have ended.
//!
//! Each direction reads chunks while it has room and writes them together, so that a burst costs one write. The room
//! grows with what has been carried: most connections are short and small, and those that are not gain from large
//! buffers. A direction that waits holds no more than a small rest of a buffer.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll, ready},
};

use bytes::BytesMut;

use crate::{
    net::{ByteStream, Chunks, is_hang_up},
    telemetry::{ByteCounts, ResponseFlag},
};

/// Room at the start, after [`GROW_FIRST`] bytes, and after [`GROW_SECOND`].
const ROOM: [usize; 3] = [1024, 16 * 1024, 256 * 1024];
const GROW_FIRST: u64 = 128 * 1024;
/// Early, because a buffer is let go whenever its direction waits: it costs memory only while bytes flow.
const GROW_SECOND: u64 = 2 * 1024 * 1024;
/// Rounds of one direction in one poll. Streams in memory are always ready and would starve everybody else.
const MAX_ROUNDS: usize = 32;

/// How much went which way.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Transferred {
    /// From downstream to upstream.
    pub received: u64,
    /// From upstream to downstream.
    pub sent: u64,
}

/// Something other than the end of a connection. A peer that hangs up, however rudely, ends the copy and is no error.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("downstream: {0}")]
    Downstream(#[source] io::Error),
    #[error("upstream: {0}")]
    Upstream(#[source] io::Error),
}

impl CopyError {
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::Downstream(_) | Self::Upstream(_) => ResponseFlag::Reset,
        }
    }
}

/// Copies both ways until both sides have ended, or one has gone away. When one side ends, the other is told and may
/// still speak. `counters` follow along while it runs.
pub async fn copy_bidirectional<A: ByteStream, B: ByteStream>(
    mut downstream: A,
    mut upstream: B,
    counters: &ByteCounts,
) -> Result<Transferred, CopyError> {
    let mut up = OneWay::default();
    let mut down = OneWay::default();
    let ended = poll_fn(|cx| {
        let up_ended = up.poll(cx, &mut downstream, &mut upstream, |bytes| counters.add_received(bytes));
        let up_ended = match up_ended {
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.of(CopyError::Downstream, CopyError::Upstream))),
            other => other.is_ready(),
        };
        let down_ended = down.poll(cx, &mut upstream, &mut downstream, |bytes| counters.add_sent(bytes));
        match down_ended {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error.of(CopyError::Upstream, CopyError::Downstream))),
            Poll::Ready(Ok(())) if up_ended => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    })
    .await;
    match ended {
        Err(error @ (CopyError::Downstream(_) | CopyError::Upstream(_))) if !hung_up(&error) => Err(error),
        _ => Ok(Transferred { received: up.carried, sent: down.carried }),
    }
}

fn hung_up(error: &CopyError) -> bool {
    match error {
        CopyError::Downstream(error) | CopyError::Upstream(error) => is_hang_up(error.kind()),
    }
}

/// An error and the side it came from, seen from one direction.
enum SideError {
    Source(io::Error),
    Sink(io::Error),
}

impl SideError {
    fn of(self, source: fn(io::Error) -> CopyError, sink: fn(io::Error) -> CopyError) -> CopyError {
        match self {
            Self::Source(error) => source(error),
            Self::Sink(error) => sink(error),
        }
    }
}

/// ```text
/// Open ──source ended──► Ending ──all written, sink told──► Ended
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Open,
    Ending,
    Ended,
}

/// One direction.
#[derive(Default)]
struct OneWay {
    phase: Phase,
    waiting: Chunks,
    /// The reader's rest of a buffer.
    spare: BytesMut,
    unflushed: bool,
    carried: u64,
}

impl OneWay {
    /// Ready once the source has ended and the sink knows.
    fn poll<R: ByteStream, W: ByteStream>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
        count: impl Fn(u64),
    ) -> Poll<Result<(), SideError>> {
        for _ in 0..MAX_ROUNDS {
            if self.phase == Phase::Ended {
                return Poll::Ready(Ok(()));
            }
            let more = self.fill(cx, source)?;
            if !self.waiting.is_empty() {
                let written = ready!(sink.poll_put(cx, &mut self.waiting)).map_err(SideError::Sink)? as u64;
                self.carried += written;
                self.unflushed = true;
                count(written);
            } else if self.phase == Phase::Ending {
                ready!(sink.poll_end(cx)).map_err(SideError::Sink)?;
                self.phase = Phase::Ended;
            } else if more.is_pending() {
                if self.unflushed {
                    ready!(sink.poll_flush(cx)).map_err(SideError::Sink)?;
                    self.unflushed = false;
                }
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads while there is room; pending when the source has nothing for now.
    fn fill<R: ByteStream>(&mut self, cx: &mut Context<'_>, source: &mut R) -> Result<Poll<()>, SideError> {
        let room = self.room();
        while self.phase == Phase::Open && self.waiting.len() < room && !self.waiting.is_full() {
            match source.poll_chunk(cx, room - self.waiting.len(), &mut self.spare) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Err(error)) => return Err(SideError::Source(error)),
                Poll::Ready(Ok(chunk)) if chunk.is_empty() => {
                    self.phase = Phase::Ending;
                    self.spare = BytesMut::new();
                }
                Poll::Ready(Ok(chunk)) => self.waiting.push(chunk),
            }
        }
        Ok(Poll::Ready(()))
    }

    fn room(&self) -> usize {
        match self.carried {
            ..GROW_FIRST => ROOM[0],
            GROW_FIRST..GROW_SECOND => ROOM[1],
            GROW_SECOND.. => ROOM[2],
        }
    }
}

#[cfg(test)]
mod tests;
