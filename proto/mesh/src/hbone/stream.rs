//! One tunnelled connection: an HTTP/2 stream after its 200.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{client::StreamPermit, outbox::Outbox, sending::Sending};
use crate::net::{ByteStream, Chunks};

/// Most that is copied at once for a writer that has no chunks of its own.
const MAX_COPY: usize = 256 * 1024;

/// A DATA frame below this is copied when it has to wait: what h2 keeps of one frame is a quarter of it.
const SMALL: usize = 1024;

/// Most of what had to wait that is handed over at once.
const PIECE: usize = 64 * 1024;

/// How long what is queued may take to leave once nobody waits for it.
const FAREWELL: Duration = Duration::from_secs(10);

/// The bytes of one tunnelled TCP connection. Ending the writing side (`shutdown`) leaves the reading side open; dropping
/// it unfinished resets the stream behind all that was written.
pub struct HboneStream {
    /// Until it is dropped.
    send: Option<Sending>,
    recv: RecvStream,
    /// Received, but the reader had no room for it.
    leftover: Bytes,
    /// Rare, and large beside the rest.
    gathered: Option<Box<Gathered>>,
    unreleased: usize,
    /// As [`super::H2Settings::release`] has it.
    release: usize,
    end: End,
    /// What all streams of the connection have queued, where that is bounded.
    outbox: Option<Arc<Outbox>>,
    /// The client's count of streams on the connection.
    permit: Option<StreamPermit>,
}

/// How our direction ended.
#[derive(PartialEq, Eq)]
enum End {
    Open,
    /// END_STREAM is queued.
    Queued,
    Aborted,
}

/// What has come while the reader could take nothing, in order.
#[derive(Default)]
struct Gathered {
    pieces: VecDeque<Bytes>,
    /// The last of it: small frames, together.
    small: BytesMut,
}

impl Gathered {
    fn push(&mut self, data: Bytes) {
        if data.len() < SMALL {
            self.small.extend_from_slice(&data);
        } else {
            if !self.small.is_empty() {
                self.pieces.push_back(std::mem::take(&mut self.small).freeze());
            }
            self.pieces.push_back(data);
        }
    }

    fn len(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum::<usize>() + self.small.len()
    }

    fn pop(&mut self) -> Option<Bytes> {
        let Some(first) = self.pieces.front_mut() else {
            if self.small.is_empty() {
                return None;
            }
            let piece = self.small.split_to(self.small.len().min(PIECE)).freeze();
            if self.small.is_empty() {
                self.small = BytesMut::new();
            }
            return Some(piece);
        };
        if first.len() > PIECE {
            return Some(first.split_to(PIECE));
        }
        self.pieces.pop_front()
    }
}

impl HboneStream {
    /// A client's.
    pub(super) fn opened(send: Sending, recv: RecvStream, release: usize, permit: StreamPermit) -> Self {
        let mut stream = Self::new(send, recv, release);
        stream.permit = Some(permit);
        stream
    }

    /// A server's.
    pub(super) fn accepted(send: Sending, recv: RecvStream, release: usize, outbox: Arc<Outbox>) -> Self {
        let mut stream = Self::new(send, recv, release);
        stream.outbox = Some(outbox);
        stream
    }

    /// One that nothing bounds or counts.
    pub(super) fn new(send: Sending, recv: RecvStream, release: usize) -> Self {
        Self {
            send: Some(send),
            recv,
            leftover: Bytes::new(),
            gathered: None,
            unreleased: 0,
            release,
            end: End::Open,
            outbox: None,
            permit: None,
        }
    }

    fn sending(&mut self) -> &mut Sending {
        self.send.as_mut().expect("only dropping takes it")
    }

    fn writer(&mut self) -> &mut SendStream<Bytes> {
        &mut self.sending().stream
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if !self.leftover.is_empty() {
            return Poll::Ready(Ok(std::mem::take(&mut self.leftover)));
        }
        if let Some(gathered) = &mut self.gathered {
            if let Some(data) = gathered.pop() {
                self.is_taken(data.len());
                return Poll::Ready(Ok(data));
            }
            self.gathered = None;
        }
        loop {
            match ready!(self.recv.poll_data(cx)) {
                // Empty frames are legal and mean nothing.
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    self.is_taken(data.len());
                    return Poll::Ready(Ok(data));
                }
                None => return Poll::Ready(Ok(Bytes::new())),
                Some(Err(error)) => {
                    return Poll::Ready(match error.reason() {
                        // All was said (RFC 9113, section 8.1); what we have to say is not wanted.
                        Some(Reason::NO_ERROR) => Ok(Bytes::new()),
                        // A stream that is dropped unfinished, as when its connection was reset: there was more to come.
                        Some(Reason::CANCEL) => Err(io::Error::new(io::ErrorKind::ConnectionReset, error)),
                        // The connection below went, and with it who knows how much: no end that a peer meant.
                        _ if error.is_io() => Err(io::Error::other(format!("the tunnel's connection broke: {error}"))),
                        _ => Err(to_io(error)),
                    });
                }
            }
        }
    }

    /// The reader has so many bytes more, and the peer gets its credit back.
    fn is_taken(&mut self, bytes: usize) {
        self.unreleased += bytes;
        if self.unreleased >= self.release {
            // Fails only when the stream is gone, which the next read reports.
            let _ = self.recv.flow_control().release_capacity(self.unreleased);
            self.unreleased = 0;
        }
    }

    /// Room to send, at least one byte and at most `want`.
    fn poll_room(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<io::Result<usize>> {
        if let Some(outbox) = &self.outbox
            && outbox.poll_room(cx).is_pending()
            // A stream that is over has to learn so while it waits, too.
            && self.writer().poll_reset(cx).is_pending()
        {
            return Poll::Pending;
        }
        let send = self.writer();
        send.reserve_capacity(want);
        loop {
            let room = send.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room.min(want)));
            }
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }

    fn send(&mut self, data: Bytes) -> io::Result<()> {
        if let Some(outbox) = &self.outbox {
            outbox.queued(data.len());
        }
        self.sending().send(data, false).map_err(to_io)
    }

    fn end(&mut self) -> io::Result<()> {
        if self.end != End::Open {
            return Ok(());
        }
        self.end = End::Queued;
        // What was reserved and not used belongs to the other streams again.
        self.writer().reserve_capacity(0);
        self.sending().send(Bytes::new(), true).map_err(to_io)
    }
}

/// With the last handle of an unfinished stream h2 drops what is queued and resets it. A peer's last words may be among that,
/// and so may the end itself.
impl Drop for HboneStream {
    fn drop(&mut self) {
        let Some(mut send) = self.send.take() else { return };
        let over = match self.end {
            End::Open => false,
            // Nothing will be reset.
            End::Queued => self.recv.is_end_stream(),
            End::Aborted => true,
        };
        if over {
            return;
        }
        let Some(departed) = send.departure() else { return };
        // Outside a runtime nobody drives the connection either.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        // Nobody reads any more, and the connection's other streams need the room.
        let untaken = self.gathered.as_ref().map_or(0, |gathered| gathered.len());
        let _ = self.recv.flow_control().release_capacity(self.unreleased + untaken);
        let permit = self.permit.take();
        runtime.spawn(async move {
            let _ = tokio::time::timeout(FAREWELL, departed).await;
            drop((send, permit));
        });
    }
}

fn to_io(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    let kind = match error.reason() {
        Some(Reason::NO_ERROR | Reason::CANCEL | Reason::STREAM_CLOSED) => io::ErrorKind::BrokenPipe,
        _ => io::ErrorKind::ConnectionReset,
    };
    io::Error::new(kind, error)
}

impl ByteStream for HboneStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, _: usize, _: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        self.poll_data(cx)
    }

    fn poll_put(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>> {
        if chunks.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_room(cx, chunks.len()))?;
        let mut sent = 0;
        while let Some(chunk) = chunks.take(room - sent) {
            sent += chunk.len();
            self.send(chunk)?;
            if sent == room {
                break;
            }
        }
        Poll::Ready(Ok(sent))
    }

    /// The connection's driver flushes.
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.end())
    }

    /// h2 bounds what it keeps of small frames that nobody takes, and then gives the whole connection up; a window of them,
    /// which is no more than the peer may send, would be more than that. Credit goes back once they are taken.
    fn gather(&mut self, cx: &mut Context<'_>) {
        // The end, and what breaks the stream, is there again for the reader.
        while let Poll::Ready(Some(Ok(data))) = self.recv.poll_data(cx) {
            if !data.is_empty() {
                self.gathered.get_or_insert_default().push(data);
            }
        }
    }

    /// RFC 9113, section 8.5. What is queued is dropped.
    fn abort(&mut self) {
        self.writer().send_reset(Reason::CONNECT_ERROR);
        self.end = End::Aborted;
    }
}

impl AsyncRead for HboneStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut data = ready!(self.poll_data(cx))?;
        let fits = data.split_to(data.len().min(out.remaining()));
        out.put_slice(&fits);
        self.leftover = data;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_room(cx, data.len().min(MAX_COPY)))?;
        self.send(Bytes::copy_from_slice(&data[..room]))?;
        Poll::Ready(Ok(room))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.end())
    }
}
