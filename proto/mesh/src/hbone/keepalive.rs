//! Noticing that a peer is gone.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::{sleep, timeout},
};

use super::H2Settings;

/// What is heard of the peer of one connection.
#[derive(Default)]
pub(super) struct Pulse {
    /// Bytes that came from it.
    heard: AtomicU64,
    /// A PING shall be sent now.
    wanted: Notify,
}

impl Pulse {
    /// Has a PING sent, unless one is under way, and tells whether `patience` passes without a byte from the peer. What
    /// else it sends says as much as the PONG: on a slow path that may stand in a long queue.
    pub(super) async fn is_silent(&self, patience: Duration) -> bool {
        let before = self.heard.load(Ordering::Relaxed);
        self.wanted.notify_one();
        sleep(patience).await;
        self.heard.load(Ordering::Relaxed) == before
    }
}

/// Returns once a PING has gone unanswered for too long; never, while the peer is there. Errors of the connection are
/// reported by whoever drives it. Without a `pulse` nobody else asks for PINGs.
pub(super) async fn peer_gone(ping_pong: Option<PingPong>, settings: H2Settings, pulse: Option<Arc<Pulse>>) {
    let Some(mut ping_pong) = ping_pong else { return std::future::pending().await };
    loop {
        match &pulse {
            None => sleep(settings.keepalive).await,
            // Either way it is time.
            Some(pulse) => drop(timeout(settings.keepalive, pulse.wanted.notified()).await),
        }
        match timeout(settings.keepalive_timeout, ping_pong.ping(Ping::opaque())).await {
            Err(_) => return,
            Ok(Err(_)) => return std::future::pending().await,
            Ok(Ok(_)) => {}
        }
    }
}

/// A stream that notes in a [`Pulse`] what it reads.
pub(super) struct Heard<S> {
    stream: S,
    pulse: Arc<Pulse>,
}

impl<S> Heard<S> {
    pub(super) fn new(stream: S, pulse: Arc<Pulse>) -> Self {
        Self { stream, pulse }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, out);
        let bytes = out.filled().len() - before;
        if bytes > 0 {
            self.pulse.heard.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
