//! Which protocol a port without a declared one speaks, told by the client's first bytes.
//!
//! A client that stays silent is waiting for the server to begin (SMTP, MySQL): after a short pause the stream is plain
//! TCP, rather than hanging for ever.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// How long a client may be silent before the port counts as server-first.
const SILENCE: Duration = Duration::from_millis(200);
/// No HTTP method in use is longer; more leading bytes without a space are not HTTP/1.
const LONGEST_METHOD: usize = 24;
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sniffed {
    Http1,
    Http2,
    /// TLS, a server-first protocol, or anything else: bytes.
    Tcp,
}

/// Reads until the protocol is clear and gives the stream back with nothing lost.
///
/// # Errors
/// What reading from the stream yields.
pub async fn sniff<S: AsyncRead + Unpin>(mut stream: S) -> io::Result<(Sniffed, Rewound<S>)> {
    let mut seen = BytesMut::with_capacity(64);
    let verdict = loop {
        if let Some(verdict) = classify(&seen) {
            break verdict;
        }
        match tokio::time::timeout(SILENCE, stream.read_buf(&mut seen)).await {
            Ok(Ok(1..)) => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(0)) | Err(_) => break Sniffed::Tcp,
        }
    };
    Ok((verdict, Rewound { seen: seen.freeze(), stream }))
}

/// `None` = more bytes are needed.
fn classify(seen: &[u8]) -> Option<Sniffed> {
    if seen.is_empty() {
        return None;
    }
    let common = seen.len().min(H2_PREFACE.len());
    if seen[..common] == H2_PREFACE[..common] {
        return (common == H2_PREFACE.len()).then_some(Sniffed::Http2);
    }
    let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
    match seen.iter().position(|b| !token(b)) {
        None if seen.len() > LONGEST_METHOD => Some(Sniffed::Tcp),
        None => None,
        Some(at @ 1..=LONGEST_METHOD) if seen[at] == b' ' => match seen.get(at + 1) {
            None => None,
            // Origin form, absolute form, or the asterisk of OPTIONS.
            Some(b'/' | b'h' | b'H' | b'*') => Some(Sniffed::Http1),
            Some(_) => Some(Sniffed::Tcp),
        },
        Some(_) => Some(Sniffed::Tcp),
    }
}

/// A stream whose first bytes have been read and are read again.
#[derive(Debug)]
pub struct Rewound<S> {
    seen: Bytes,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.seen.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let n = self.seen.len().min(buf.remaining());
        buf.put_slice(&self.seen[..n]);
        self.seen.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn first_bytes_tell_the_protocol() {
        for (bytes, want) in [
            (&b""[..], None),
            (b"GE", None),
            (b"GET ", None),
            (b"GET /", Some(Sniffed::Http1)),
            (b"OPTIONS *", Some(Sniffed::Http1)),
            (b"PRI * HTTP", None),
            (H2_PREFACE, Some(Sniffed::Http2)),
            (b"PRI * HTTP/1.1\r\n", Some(Sniffed::Http1)),
            (b"\x16\x03\x01", Some(Sniffed::Tcp)),
            (b"USER anonymous", Some(Sniffed::Tcp)),
            (b"aaaaaaaaaaaaaaaaaaaaaaaaaaaa", Some(Sniffed::Tcp)),
        ] {
            assert_eq!(classify(bytes), want, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_means_a_server_first_protocol_and_nothing_is_lost() {
        let (_client, server) = tokio::io::duplex(64);
        assert_eq!(sniff(server).await.expect("sniff").0, Sniffed::Tcp);
        let (mut client, server) = tokio::io::duplex(64);
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("write");
        drop(client);
        let (sniffed, mut stream) = sniff(server).await.expect("sniff");
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.expect("read");
        assert_eq!((sniffed, all.as_slice()), (Sniffed::Http1, &b"GET / HTTP/1.1\r\n\r\n"[..]));
    }
}
