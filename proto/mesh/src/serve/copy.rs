//! Bytes from one stream to another and back, until both directions have ended.
//!
//! Each direction reads chunks while it has room and writes them together, so that a burst costs one write. The room
//! grows with what has been carried: most connections are short and small, and those that are not gain from large
//! buffers. A direction that waits holds no more than a small rest of a buffer. Between two plain sockets a large transfer
//! leaves user space altogether: see [`splice`].

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{net::TcpStream, time::Sleep};

use crate::{
    net::{ByteStream, Chunks, is_hang_up},
    telemetry::{ByteCounts, ResponseFlag},
};

use super::activity;

mod splice;

use splice::{Moved, Pipe, Side};

/// Room at the start, after [`GROW_FIRST`] bytes, and after [`GROW_SECOND`].
/// The larger ones and the head of a DATA frame fill TLS records to the byte; a byte more would be a record of its own.
const ROOM: [usize; 3] = [1024, 16 * 1024 - FRAME_HEAD, 256 * 1024 - FRAME_HEAD];
/// RFC 9113, section 4.1.
const FRAME_HEAD: usize = 9;
const GROW_FIRST: u64 = 128 * 1024;
/// Early, because a buffer is let go whenever its direction waits: it costs memory only while bytes flow.
const GROW_SECOND: u64 = 2 * 1024 * 1024;
/// Where the pipe of [`splice`] begins to pay: making it costs as much as copying some tens of KiB.
const SPLICE_FROM: u64 = 512 * 1024;
/// Rounds of one direction in one poll. Streams in memory are always ready and would starve everybody else.
const MAX_ROUNDS: usize = 32;

/// For the last words of a side that takes nothing more: their reader may itself be waiting to be read.
const FAREWELL: Duration = Duration::from_secs(10);

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

/// Who is told how much went which way, while it goes.
pub trait Count {
    /// Bytes read from downstream have been written upstream.
    fn received(&self, bytes: u64);
    /// Bytes read from upstream have been written downstream.
    fn sent(&self, bytes: u64);
}

impl Count for ByteCounts {
    fn received(&self, bytes: u64) {
        self.add_received(bytes);
    }

    fn sent(&self, bytes: u64) {
        self.add_sent(bytes);
    }
}

impl<C: Count> Count for Arc<C> {
    fn received(&self, bytes: u64) {
        (**self).received(bytes);
    }

    fn sent(&self, bytes: u64) {
        (**self).sent(bytes);
    }
}

/// Two records of one connection.
impl<C: Count> Count for [C; 2] {
    fn received(&self, bytes: u64) {
        self.iter().for_each(|counts| counts.received(bytes));
    }

    fn sent(&self, bytes: u64) {
        self.iter().for_each(|counts| counts.sent(bytes));
    }
}

/// Copies both ways until both sides have ended, or one that was read from has gone away. When one side ends, or takes
/// nothing more, the other direction goes on to its own end. `counters` follow along while it runs.
pub async fn copy_bidirectional<A: ByteStream, B: ByteStream, C: Count>(
    mut downstream: A,
    mut upstream: B,
    counters: &C,
) -> Result<Transferred, CopyError> {
    let mut up = OneWay::default();
    let mut down = OneWay::default();
    let mut farewell: Option<Pin<Box<Sleep>>> = None;
    let ended = poll_fn(|cx| {
        (up.source_reset, down.source_reset) = (down.sink_reset, up.sink_reset);
        let up_ended = up.poll(cx, &mut downstream, &mut upstream, |bytes| counters.received(bytes));
        let up_ended = match up_ended {
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.of(CopyError::Downstream, CopyError::Upstream))),
            other => other.is_ready(),
        };
        down.source_reset |= up.sink_reset;
        let down_ended = down.poll(cx, &mut upstream, &mut downstream, |bytes| counters.sent(bytes));
        match down_ended {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error.of(CopyError::Upstream, CopyError::Downstream))),
            Poll::Ready(Ok(())) if up_ended => Poll::Ready(Ok(())),
            _ if up.is_over() || down.is_over() => {
                let over = farewell.get_or_insert_with(|| Box::pin(tokio::time::sleep(FAREWELL)));
                ready!(over.as_mut().poll(cx));
                let broken = up.broken.take().map(CopyError::Downstream);
                let broken = broken.or_else(|| down.broken.take().map(CopyError::Upstream));
                Poll::Ready(broken.map_or(Ok(()), Err))
            }
            _ => Poll::Pending,
        }
    })
    .await;
    match &ended {
        Err(CopyError::Downstream(error)) if is_reset(error) => upstream.pass_reset_on(),
        Err(CopyError::Upstream(error)) if is_reset(error) => downstream.pass_reset_on(),
        _ => {}
    }
    match ended {
        Err(error @ (CopyError::Downstream(_) | CopyError::Upstream(_))) if !hung_up(&error) => Err(error),
        _ => Ok(Transferred { received: up.carried, sent: down.carried }),
    }
}

fn is_reset(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionReset
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
///   └──────────────────────┴───────sink hung up──────────────┘
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
    /// The source was reset. What it had said before goes first.
    broken: Option<io::Error>,
    /// The sink was reset, and told its writer. Its reader sees an end.
    sink_reset: bool,
    /// Such a sink is our source.
    source_reset: bool,
    carried: u64,
    /// The sink hung up.
    gave_up: bool,
    pipe: Way,
}

/// How a direction carries its bytes.
#[derive(Default)]
enum Way {
    #[default]
    Copy,
    Splice(Pipe),
    /// There was no pipe to be had, or it cannot take what the source has.
    CopyForGood,
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
            if self.phase == Phase::Open
                && let Some((from, to)) = self.sockets(source, sink)
            {
                match ready!(self.poll_splice(cx, from, to)) {
                    Ok(Moved::Bytes(bytes)) => {
                        self.carried += bytes as u64;
                        count(bytes as u64);
                        activity::note();
                    }
                    Ok(Moved::Ended) => {
                        self.release();
                        if self.source_reset {
                            return Poll::Ready(Err(SideError::Source(io::ErrorKind::ConnectionReset.into())));
                        }
                        self.phase = Phase::Ending;
                    }
                    Ok(Moved::Waiting) => {
                        self.release();
                        return Poll::Pending;
                    }
                    Ok(Moved::Stuck) => {
                        self.release();
                        self.pipe = Way::CopyForGood;
                    }
                    Err(Side::Source(error)) => return Poll::Ready(Err(SideError::Source(error))),
                    Err(Side::Sink(error)) if is_hang_up(error.kind()) => self.give_up(&error),
                    Err(Side::Sink(error)) => return Poll::Ready(Err(SideError::Sink(error))),
                }
                continue;
            }
            let more = self.fill(cx, source)?;
            let told = if !self.waiting.is_empty() {
                let Poll::Ready(put) = sink.poll_put(cx, &mut self.waiting) else {
                    source.gather(cx);
                    return Poll::Pending;
                };
                put.map(|written| {
                    self.carried += written as u64;
                    self.unflushed = true;
                    count(written as u64);
                    activity::note();
                })
            } else if self.phase == Phase::Ending {
                ready!(sink.poll_end(cx)).map(|()| self.phase = Phase::Ended)
            } else if more.is_pending() {
                let flushed = if self.unflushed { ready!(sink.poll_flush(cx)) } else { Ok(()) };
                self.unflushed = false;
                if flushed.is_ok() {
                    return Poll::Pending;
                }
                flushed
            } else {
                Ok(())
            };
            match told {
                Ok(()) => {}
                Err(error) if is_hang_up(error.kind()) => self.give_up(&error),
                Err(error) => return Poll::Ready(Err(SideError::Sink(error))),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Both ends, where they are plain sockets and enough has been carried for a pipe to pay.
    fn sockets<'a, R: ByteStream, W: ByteStream>(
        &mut self,
        source: &'a R,
        sink: &'a W,
    ) -> Option<(&'a TcpStream, &'a TcpStream)> {
        // A socket tells of its error once: after that it would seem to have ended.
        if self.carried < SPLICE_FROM || !self.waiting.is_empty() || self.broken.is_some() {
            return None;
        }
        let sockets = source.socket().zip(sink.socket())?;
        if let Way::Copy = self.pipe {
            self.pipe = Pipe::get().map_or(Way::CopyForGood, Way::Splice);
            self.spare = BytesMut::new();
        }
        matches!(self.pipe, Way::Splice(_)).then_some(sockets)
    }

    /// Who waits holds no pipe.
    fn release(&mut self) {
        if let Way::Splice(pipe) = std::mem::take(&mut self.pipe) {
            pipe.give_back();
        }
    }

    fn poll_splice(&mut self, cx: &mut Context<'_>, from: &TcpStream, to: &TcpStream) -> Poll<Result<Moved, Side>> {
        match &mut self.pipe {
            Way::Splice(pipe) => pipe.poll_move(cx, from, to),
            Way::Copy | Way::CopyForGood => Poll::Ready(Ok(Moved::Waiting)),
        }
    }

    /// The sink takes nothing more. It may have spoken before it went (a refusal that does not wait for the request),
    /// and that is for the other direction to deliver.
    fn give_up(&mut self, error: &io::Error) {
        let sink_reset = is_reset(error);
        *self = Self { phase: Phase::Ended, carried: self.carried, gave_up: true, sink_reset, ..Self::default() };
    }

    /// Whether what is still to be done has only so much time.
    fn is_over(&self) -> bool {
        self.gave_up || self.broken.is_some()
    }

    /// Reads while there is room; pending when the source has nothing for now. Fails once all that was read is written.
    fn fill<R: ByteStream>(&mut self, cx: &mut Context<'_>, source: &mut R) -> Result<Poll<()>, SideError> {
        let room = self.room();
        while self.phase == Phase::Open && self.waiting.len() < room && !self.waiting.is_full() {
            if let Some(error) = self.broken.take() {
                if self.waiting.is_empty() {
                    return Err(SideError::Source(error));
                }
                self.broken = Some(error);
                break;
            }
            match source.poll_chunk(cx, room - self.waiting.len(), &mut self.spare) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Err(error)) if is_reset(&error) => self.broken = Some(error),
                Poll::Ready(Err(error)) => return Err(SideError::Source(error)),
                Poll::Ready(Ok(chunk)) if chunk.is_empty() && self.source_reset => {
                    self.broken = Some(io::ErrorKind::ConnectionReset.into());
                }
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
