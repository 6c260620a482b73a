//! Fewer reads below TLS. rustls asks its socket for 4 KiB at a time, which at bulk speed is four system calls per TLS
//! record; this reads what is there and hands it on in the pieces asked for. It holds memory only while it holds bytes.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// First read after a pause: a small message and its TLS framing.
const SMALL: usize = 4 * 1024;
/// Once reads come back full: eight TLS records at once.
const LARGE: usize = 128 * 1024;

/// A stream whose reads run ahead of what is asked for; writes pass through.
pub struct ReadAhead<S> {
    inner: S,
    buffer: BytesMut,
    /// Size of the next read.
    want: usize,
}

impl<S> ReadAhead<S> {
    pub fn new(inner: S) -> Self {
        Self { inner, buffer: BytesMut::new(), want: SMALL }
    }

    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S> ReadAhead<S> {
    /// Sizes the next read by what the last one brought.
    fn learn(&mut self, read: usize) {
        if read >= self.want {
            self.want = (self.want * 4).min(LARGE);
        } else if read < self.want / 4 {
            self.want = (self.want / 4).max(SMALL);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.buffer.is_empty() {
            // Who asks for as much as we would read gains nothing from a detour.
            if out.remaining() >= this.want {
                let before = out.filled().len();
                ready!(Pin::new(&mut this.inner).poll_read(cx, out))?;
                this.learn(out.filled().len() - before);
                return Poll::Ready(Ok(()));
            }
            this.buffer.reserve(this.want);
            match poll_read_buf(Pin::new(&mut this.inner), cx, &mut this.buffer) {
                Poll::Pending => {
                    this.buffer = BytesMut::new();
                    return Poll::Pending;
                }
                Poll::Ready(read) => this.learn(read?),
            }
        }
        let len = this.buffer.len().min(out.remaining());
        out.put_slice(&this.buffer[..len]);
        this.buffer.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Counts reads, and has endless bytes.
    struct Endless(usize);

    impl AsyncRead for Endless {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.0 += 1;
            let n = out.remaining();
            out.initialize_unfilled();
            out.advance(n);
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn bulk_is_read_in_large_pieces_although_asked_for_in_small_ones() {
        let mut stream = ReadAhead::new(Endless(0));
        let mut piece = [0; 4096];
        for _ in 0..1024 {
            stream.read_exact(&mut piece).await.unwrap();
        }
        let reads = stream.get_ref().0;
        assert!(reads <= 40, "4 MiB took {reads} reads");
    }

    #[tokio::test]
    async fn hands_on_every_byte_in_small_pieces() {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            far.write_all(&sent).await.unwrap();
            far.shutdown().await.unwrap();
        });
        let mut near = ReadAhead::new(near);
        let mut got = Vec::new();
        let mut piece = [0; 1000];
        loop {
            match near.read(&mut piece).await.unwrap() {
                0 => break,
                n => got.extend_from_slice(&piece[..n]),
            }
        }
        writer.await.unwrap();
        assert!(got == expected);
    }
}
