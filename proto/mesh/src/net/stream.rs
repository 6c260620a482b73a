//! The copy loop's view of a connection: chunks rather than a caller's buffer, so that bytes that already lie in memory
//! (an HTTP/2 DATA frame) move on without a copy.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    net::{TcpStream, UnixStream},
};
use tokio_util::io::poll_read_buf;

/// A connection with two independent directions, in chunks.
pub trait ByteStream: Unpin + Send {
    /// The next bytes; empty means that the other side has ended its direction. `size` is what the reader has room for
    /// and no promise in either direction. `spare` is the reader's own to keep between calls.
    fn poll_chunk(&mut self, cx: &mut Context<'_>, size: usize, spare: &mut BytesMut) -> Poll<io::Result<Bytes>>;

    /// Writes a prefix of `chunks`, removing what was taken; returns its length.
    fn poll_put(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>>;

    /// Pushes out what was put. Called when there is nothing more to put for now.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Ends our direction; the other stays open.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// The reader has no room: what comes may be put where it needs less. Wakes the reader when more has come.
    fn gather(&mut self, _: &mut Context<'_>) {}

    /// Makes the coming drop a reset, so that the other side cannot take what it has for all there was.
    fn abort(&mut self) {}

    /// The bytes came from where there was a reset, and their reader has to see one too once this is dropped, behind all that
    /// was put. A socket loses with it what its other end had no room for, as TCP does.
    fn pass_reset_on(&mut self) {}

    /// The socket, where it is nothing else.
    fn socket(&self) -> Option<&TcpStream> {
        None
    }
}

/// Lent to a copy that its owner may want to abort.
impl<S: ByteStream> ByteStream for &mut S {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, size: usize, spare: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        (**self).poll_chunk(cx, size, spare)
    }

    fn poll_put(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>> {
        (**self).poll_put(cx, chunks)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        (**self).poll_flush(cx)
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        (**self).poll_end(cx)
    }

    fn gather(&mut self, cx: &mut Context<'_>) {
        (**self).gather(cx);
    }

    fn abort(&mut self) {
        (**self).abort();
    }

    fn pass_reset_on(&mut self) {
        (**self).pass_reset_on();
    }

    fn socket(&self) -> Option<&TcpStream> {
        (**self).socket()
    }
}

/// Bytes on their way from one stream to another.
#[derive(Default)]
pub struct Chunks {
    queue: VecDeque<Bytes>,
    len: usize,
}

/// As many chunks as one vectored write takes.
pub const MAX_CHUNKS: usize = 16;

impl Chunks {
    pub fn push(&mut self, chunk: Bytes) {
        self.len += chunk.len();
        self.queue.push_back(chunk);
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether another chunk would make the queue longer than one write takes.
    pub fn is_full(&self) -> bool {
        self.queue.len() >= MAX_CHUNKS
    }

    /// The length of the first chunk.
    pub fn first_len(&self) -> Option<usize> {
        self.queue.front().map(Bytes::len)
    }

    /// Takes up to `limit` bytes of the first chunk.
    pub fn take(&mut self, limit: usize) -> Option<Bytes> {
        let first = self.queue.front_mut()?;
        let taken = if first.len() <= limit { self.queue.pop_front()? } else { first.split_to(limit) };
        self.len -= taken.len();
        Some(taken)
    }

    fn advance(&mut self, mut written: usize) {
        self.len -= written;
        while written > 0 {
            let Some(first) = self.queue.front_mut() else { return };
            let step = first.len().min(written);
            first.advance(step);
            written -= step;
            if first.is_empty() {
                self.queue.pop_front();
            }
        }
    }

    fn poll_write_to<W: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut W,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let written = if self.queue.len() > 1 && stream.is_write_vectored() {
            let mut slices = [IoSlice::new(&[]); MAX_CHUNKS];
            let used = self.queue.len().min(MAX_CHUNKS);
            for (slice, chunk) in slices.iter_mut().zip(&self.queue) {
                *slice = IoSlice::new(chunk);
            }
            ready!(Pin::new(stream).poll_write_vectored(cx, &slices[..used]))?
        } else {
            let Some(first) = self.queue.front() else { return Poll::Ready(Ok(0)) };
            ready!(Pin::new(stream).poll_write(cx, first))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.advance(written);
        Poll::Ready(Ok(written))
    }
}

/// What a waiting reader may keep: an idle connection must not hold a bulk transfer's buffer.
const KEEP_IDLE: usize = 1024;

fn poll_read_chunk<R: AsyncRead + Unpin>(
    stream: &mut R,
    cx: &mut Context<'_>,
    size: usize,
    spare: &mut BytesMut,
) -> Poll<io::Result<Bytes>> {
    // What is left of the last buffer serves again unless it has become small against what is wanted.
    if spare.capacity() < size / 2 {
        spare.reserve(size);
    }
    match poll_read_buf(Pin::new(stream), cx, spare) {
        Poll::Ready(read) => {
            read?;
            Poll::Ready(Ok(spare.split().freeze()))
        }
        Poll::Pending => {
            if spare.capacity() > KEEP_IDLE {
                *spare = BytesMut::new();
            }
            Poll::Pending
        }
    }
}

macro_rules! byte_stream_over_socket {
    ($socket:ty, $tcp:expr) => {
        impl ByteStream for $socket {
            fn poll_chunk(
                &mut self,
                cx: &mut Context<'_>,
                size: usize,
                spare: &mut BytesMut,
            ) -> Poll<io::Result<Bytes>> {
                // Asked first, so that a waiting connection needs no buffer at all.
                if self.poll_read_ready(cx)?.is_pending() {
                    if spare.capacity() > KEEP_IDLE {
                        *spare = BytesMut::new();
                    }
                    return Poll::Pending;
                }
                poll_read_chunk(self, cx, size, spare)
            }

            fn poll_put(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>> {
                chunks.poll_write_to(self, cx)
            }

            fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }

            fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(self).poll_shutdown(cx)
            }

            fn abort(&mut self) {
                // Without it the close is an orderly one; there is nothing better to do then.
                let _ = socket2::SockRef::from(&*self).set_linger(Some(std::time::Duration::ZERO));
            }

            fn pass_reset_on(&mut self) {
                self.abort();
            }

            fn socket(&self) -> Option<&TcpStream> {
                let tcp: fn(&Self) -> Option<&TcpStream> = $tcp;
                tcp(self)
            }
        }
    };
}

byte_stream_over_socket!(TcpStream, |socket| Some(socket));
byte_stream_over_socket!(UnixStream, |_| None);

/// Any other stream as a [`ByteStream`]. It passes a reset on only where dropping it is one.
pub struct Io<S>(S);

impl<S> Io<S> {
    pub fn new(stream: S) -> Self {
        Self(stream)
    }

    pub fn into_inner(self) -> S {
        self.0
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for Io<S> {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, size: usize, spare: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        poll_read_chunk(&mut self.0, cx, size, spare)
    }

    fn poll_put(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>> {
        chunks.poll_write_to(&mut self.0, cx)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl ByteStream for DuplexStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, size: usize, spare: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        poll_read_chunk(self, cx, size, spare)
    }

    fn poll_put(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>> {
        chunks.poll_write_to(self, cx)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self).poll_flush(cx)
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self).poll_shutdown(cx)
    }
}
