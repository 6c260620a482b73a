//! What a client may send that moves nothing.
//!
//! h2 bounds what it keeps, and answers whatever comes for as long as it comes: PINGs, SETTINGS, streams beyond the limit,
//! streams that are given up at once. Each costs its sender less than us. [`Rationed`] reads the frame headers of a
//! connection along, in both directions, and spends an allowance that bytes and answered CONNECTs earn back. It also tells
//! the [`Outbox`] when all is written.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use h2::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::Instant,
};

use super::outbox::Outbox;

/// Frames that may come at once without moving anything: fifty times what 200 streams need to begin and end.
const BURST: u32 = 10_000;
/// Frames it grows by with time. A keepalive needs one in ten seconds.
const PER_SECOND: u32 = 100;
/// What a CONNECT earns with our answer: its HEADERS, its end, and credit for what it was sent.
const PER_ANSWER: u32 = 4;
/// What a DATA frame earns, either way: credit given back for its stream and its connection, ...
const PER_DATA: u32 = 2;
/// ... and once more for so many bytes, as some give it back in smaller pieces.
const BYTES_PER_FRAME: u32 = 1024;

const PREFACE: usize = 24;
const HEADER: usize = 9;
const DATA: u8 = 0;
const GOAWAY: u8 = 7;
/// The last stream and the reason (RFC 9113, section 6.8).
const GOAWAY_HEAD: usize = 8;

/// What the handlers and the loop of one connection know of its allowance.
#[derive(Default)]
pub(super) struct Allowance {
    answered: AtomicU32,
    exhausted: Notify,
    /// The reason of our last GOAWAY, heard or not; zero is NO_ERROR.
    goaway: AtomicU32,
}

impl Allowance {
    /// A CONNECT has had our answer.
    pub(super) fn answered(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// Resolves once the client has sent more than it is allowed to.
    pub(super) async fn exhausted(&self) {
        self.exhausted.notified().await;
    }

    /// Why we have given the connection up, where the client is to blame. h2 forgets it when the client hangs up before it
    /// has heard.
    pub(super) fn gave_up(&self) -> Option<Reason> {
        let reason = Reason::from(self.goaway.load(Ordering::Relaxed));
        (reason != Reason::NO_ERROR).then_some(reason)
    }
}

/// A server's stream. Once the allowance is exhausted it brings nothing more.
pub(super) struct Rationed<S> {
    stream: S,
    received: Frames,
    sent: Frames,
    left: Budget,
    shared: Arc<Allowance>,
    outbox: Arc<Outbox>,
    exhausted: bool,
}

/// The streams must not wait for a connection that is no more.
impl<S> Drop for Rationed<S> {
    fn drop(&mut self) {
        self.outbox.emptied();
    }
}

impl<S> Rationed<S> {
    pub(super) fn new(stream: S, shared: Arc<Allowance>, outbox: Arc<Outbox>) -> Self {
        Self {
            stream,
            received: Frames::after(PREFACE),
            sent: Frames::after(0),
            left: Budget::new(),
            shared,
            outbox,
            exhausted: false,
        }
    }

    fn has_received(&mut self, bytes: &[u8]) {
        let seen = self.received.read(bytes);
        self.left.earn(seen.earned);
        if seen.costly > 0 && !self.left.spend(seen.costly, &self.shared.answered) {
            self.exhausted = true;
            self.shared.exhausted.notify_one();
        }
    }

    fn has_sent(&mut self, bytes: &[u8]) {
        let seen = self.sent.read(bytes);
        self.left.earn(seen.earned);
        if let Some(reason) = seen.goaway {
            self.shared.goaway.store(reason, Ordering::Relaxed);
        }
    }
}

/// The allowance in frames.
struct Budget {
    left: u32,
    /// Until when what time brings has been counted.
    counted: Instant,
}

impl Budget {
    fn new() -> Self {
        Self { left: BURST, counted: Instant::now() }
    }

    fn earn(&mut self, frames: u32) {
        self.left = self.left.saturating_add(frames).min(BURST);
    }

    /// False when there is not enough. Looks at the clock, and at what others have earned, only then.
    fn spend(&mut self, frames: u32, answered: &AtomicU32) -> bool {
        if self.left < frames {
            self.earn(answered.swap(0, Ordering::Relaxed).saturating_mul(PER_ANSWER));
            let grown = self.counted.elapsed().as_millis() * u128::from(PER_SECOND) / 1000;
            // What is less than a frame goes on growing.
            if grown > 0 {
                self.counted += Duration::from_secs(1) * u32::try_from(grown).unwrap_or(BURST) / PER_SECOND;
                self.earn(u32::try_from(grown).unwrap_or(BURST));
            }
        }
        match self.left.checked_sub(frames) {
            Some(left) => self.left = left,
            None => return false,
        }
        true
    }
}

/// What a piece of one direction was made of.
#[derive(Default, Debug, PartialEq, Eq)]
struct Seen {
    costly: u32,
    earned: u32,
    /// The reason of the last GOAWAY.
    goaway: Option<u32>,
}

/// Finds the frame headers in one direction of a connection, which comes in any pieces.
struct Frames {
    /// Bytes until the next header.
    skip: usize,
    head: [u8; HEADER + GOAWAY_HEAD],
    have: usize,
    /// As much of a frame has to be seen: its header, and what begins a GOAWAY.
    need: usize,
}

impl Frames {
    fn after(skip: usize) -> Self {
        Self { skip, head: [0; HEADER + GOAWAY_HEAD], have: 0, need: HEADER }
    }

    fn read(&mut self, mut bytes: &[u8]) -> Seen {
        let mut seen = Seen::default();
        while !bytes.is_empty() {
            if self.skip > 0 {
                let skipped = self.skip.min(bytes.len());
                self.skip -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let (taken, rest) = bytes.split_at(bytes.len().min(self.need - self.have));
            self.head[self.have..][..taken.len()].copy_from_slice(taken);
            self.have += taken.len();
            bytes = rest;
            if self.have < self.need {
                continue;
            }
            let [a, b, c, kind, .., d, e, f, g] = self.head;
            let length = u32::from_be_bytes([0, a, b, c]);
            if self.need > HEADER {
                seen.goaway = Some(u32::from_be_bytes([d, e, f, g]));
            } else if kind == DATA && length > 0 {
                seen.earned = seen.earned.saturating_add(PER_DATA + length / BYTES_PER_FRAME);
            } else {
                seen.costly = seen.costly.saturating_add(1);
                if kind == GOAWAY && length as usize >= GOAWAY_HEAD {
                    self.need = HEADER + GOAWAY_HEAD;
                    continue;
                }
            }
            self.skip = length as usize - (self.need - HEADER);
            self.have = 0;
            self.need = HEADER;
        }
        seen
    }
}

/// What the frames in these bytes cost, what they earn and why they give up, read in pieces of such sizes in turn.
#[cfg(fuzzing)]
pub fn read_in_pieces(mut bytes: &[u8], sizes: &[u8]) -> (u64, u64, Option<u32>) {
    let mut frames = Frames::after(PREFACE);
    let (mut costly, mut earned, mut goaway) = (0, 0, None);
    for size in sizes.iter().cycle() {
        if bytes.is_empty() {
            break;
        }
        let (piece, rest) = bytes.split_at(bytes.len().min(usize::from(*size).max(1)));
        let seen = frames.read(piece);
        costly += u64::from(seen.costly);
        earned += u64::from(seen.earned);
        goaway = seen.goaway.or(goaway);
        bytes = rest;
    }
    (costly, earned, goaway)
}

impl<S: AsyncRead + Unpin> AsyncRead for Rationed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.exhausted {
            // The connection's loop has been told, and ends it.
            return Poll::Pending;
        }
        let before = out.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, out);
        self.has_received(&out.filled()[before..]);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rationed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, data);
        match &written {
            Poll::Ready(Ok(bytes)) => self.has_sent(&data[..*bytes]),
            // What it was to say is still wanted.
            Poll::Ready(Err(_)) => self.has_sent(data),
            Poll::Pending => {}
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() {
            self.outbox.emptied();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, data);
        let mut bytes = match &written {
            Poll::Ready(Ok(bytes)) => *bytes,
            Poll::Ready(Err(_)) => usize::MAX,
            Poll::Pending => 0,
        };
        for piece in data {
            let piece = &piece[..bytes.min(piece.len())];
            self.has_sent(piece);
            bytes -= piece.len();
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, 0, 0, 0, 0, 0];
        frame.extend(std::iter::repeat_n(0xff, length.into()));
        frame
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let mut bytes = vec![b'P'; PREFACE];
        // SETTINGS, a PING, DATA, an empty DATA frame, and a kind nobody knows.
        for (kind, length) in [(4, 0), (6, 8), (DATA, 200), (DATA, 0), (99, 3)] {
            bytes.extend(frame(kind, length));
        }
        // A GOAWAY says why, a cut one nothing.
        bytes.extend([0, 0, 10, GOAWAY, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 11, b'h', b'i']);
        bytes.extend(frame(GOAWAY, 7));
        bytes.extend(frame(6, 8));
        for size in 1..bytes.len() {
            let mut frames = Frames::after(PREFACE);
            let pieces: Vec<Seen> = bytes.chunks(size).map(|piece| frames.read(piece)).collect();
            let sum = |what: fn(&Seen) -> u32| pieces.iter().map(what).sum::<u32>();
            assert_eq!((sum(|seen| seen.costly), sum(|seen| seen.earned)), (7, PER_DATA), "in pieces of {size}");
            assert_eq!(pieces.iter().filter_map(|seen| seen.goaway).collect::<Vec<_>>(), [11], "in pieces of {size}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_allowance_lasts_for_a_burst_and_grows_with_time_and_answers() {
        let answered = AtomicU32::new(0);
        let mut budget = Budget::new();
        assert!(budget.spend(BURST, &answered));
        assert!(!budget.spend(1, &answered));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(budget.spend(2 * PER_SECOND, &answered));
        assert!(!budget.spend(1, &answered));
        answered.store(3, Ordering::Relaxed);
        assert!(budget.spend(3 * PER_ANSWER, &answered));
        assert!(!budget.spend(1, &answered));
        budget.earn(u32::MAX);
        assert!(budget.spend(BURST, &answered), "no more than a burst is saved up");
        assert!(!budget.spend(1, &answered));
        tokio::time::advance(Duration::from_secs(1 << 36)).await;
        assert!(budget.spend(1, &answered), "nor does an age of silence break it");
    }
}
