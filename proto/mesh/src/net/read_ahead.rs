//! Fewer reads below TLS. rustls asks its socket for 4 KiB at a time, which at bulk speed is four system calls per TLS
//! record; this reads what is there and hands it on in the pieces asked for. It holds memory only while it holds bytes.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
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

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.buffer.is_empty() {
            // Who asks for as much as we would read gains nothing from a detour.
            if out.remaining() >= this.want {
                return Pin::new(&mut this.inner).poll_read(cx, out);
            }
            this.buffer.reserve(this.want);
            let read = match poll_read_buf(Pin::new(&mut this.inner), cx, &mut this.buffer) {
                Poll::Pending => {
                    this.buffer = BytesMut::new();
                    this.want = SMALL;
                    return Poll::Pending;
                }
                Poll::Ready(read) => read?,
            };
            this.want = if read >= this.want { (this.want * 4).min(LARGE) } else { this.want };
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
