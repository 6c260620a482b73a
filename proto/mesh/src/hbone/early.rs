//! What a client does while its CONNECT is unanswered.
//!
//! It may say what it has to say: HTTP/2 lets DATA follow the CONNECT at once (RFC 9113, section 8.5), and the peer keeps it until it has a connection of its own to
//! write it to. So a request that is there already travels with the CONNECT, a round trip earlier, and with it in one write.

use std::{
    io,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};

use super::sending::Sending;
use crate::{net::ByteStream, tls::SessionName};

/// One stream of one TLS session, by the same name at both its ends and nowhere else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StreamName {
    pub session: SessionName,
    pub stream: u32,
}

/// What a client does while its CONNECT is unanswered.
pub enum Meanwhile<'a> {
    Wait,
    /// Say what it has to say.
    Say(EarlyBytes<'a>),
    /// Tell somebody which stream it is on. More than one where another connection had to be tried.
    Announce(&'a mut (dyn FnMut(StreamName) + Send)),
}

impl Meanwhile<'_> {
    /// The CONNECT is on its way.
    pub(super) fn asked(&mut self, stream: StreamName, body: &mut Sending) {
        match self {
            Self::Wait => {}
            Self::Say(early) => early.repeat(body),
            Self::Announce(tell) => tell(stream),
        }
    }

    /// There is no answer yet. Never ready: that is what is waited for.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, body: &mut Sending) {
        match self {
            Self::Say(early) => early.poll(cx, body),
            Self::Wait | Self::Announce(_) => {}
        }
    }
}

/// Most that is said unheard: what every peer has room for before its SETTINGS are known (RFC 9113, section 6.9.2).
const LIMIT: usize = 65_535;
const READ: usize = 4 * 1024;

/// Bytes read from a client while its CONNECT is unanswered; kept until it is, because a connection may turn out not to have taken them.
pub struct EarlyBytes<'a> {
    source: Option<&'a mut dyn ByteStream>,
    said: Vec<Bytes>,
    len: usize,
    spare: BytesMut,
    broken: Option<io::Error>,
}

impl<'a> EarlyBytes<'a> {
    pub fn of(source: &'a mut dyn ByteStream) -> Self {
        Self { source: Some(source), said: Vec::new(), len: 0, spare: BytesMut::new(), broken: None }
    }

    /// Bytes read and sent.
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The error that ended the client, where one did.
    pub fn broken(self) -> Option<io::Error> {
        self.broken
    }

    /// Says again what a connection has not taken.
    fn repeat(&self, to: &mut Sending) {
        for bytes in &self.said {
            // Fails only when the stream is gone, which its answer reports.
            let _ = to.send(bytes.clone(), false);
        }
    }

    /// Sends what the client has said.
    fn poll(&mut self, cx: &mut Context<'_>, to: &mut Sending) {
        while let Some(source) = &mut self.source
            && self.len < LIMIT
        {
            match source.poll_chunk(cx, READ.min(LIMIT - self.len), &mut self.spare) {
                Poll::Pending => return,
                // Whoever copies afterwards reads the end once more, and passes it on.
                Poll::Ready(Ok(bytes)) if bytes.is_empty() => self.source = None,
                Poll::Ready(Ok(bytes)) => {
                    self.len += bytes.len();
                    self.said.push(bytes.clone());
                    // As above.
                    let _ = to.send(bytes, false);
                }
                Poll::Ready(Err(error)) => {
                    self.broken = Some(error);
                    self.source = None;
                }
            }
        }
    }
}
