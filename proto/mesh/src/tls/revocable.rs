//! The cut of a TLS connection whose peer is revoked. It stands below TLS, so that whatever goes over the connection
//! breaks with it, whoever uses it and however many tunnels there are.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::identity::Standing;

/// A stream that fails once its peer is revoked. One task drives a connection, and it is woken.
pub struct Revocable<S> {
    inner: S,
    peer: Option<Arc<Standing>>,
}

impl<S> Revocable<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner, peer: None }
    }

    /// From now on the peer counts as `peer`.
    pub(super) fn watch(&mut self, peer: Option<Arc<Standing>>) {
        self.peer = peer;
    }

    fn check(&self, cx: &Context<'_>) -> io::Result<()> {
        self.peer.as_ref().map_or(Ok(()), |peer| peer.poll_good(cx))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Revocable<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_read(cx, out)
    }
}

// A connection whose peer does not read may wait here and not at a read.
impl<S: AsyncWrite + Unpin> AsyncWrite for Revocable<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
