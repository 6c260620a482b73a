//! Doors for `crate::fuzzing`: the reader of frame headers, a client that waits for its answer, and a tunnel without the TLS below it.

use std::task::Context;

use bytes::Bytes;
use h2::{RecvStream, SendStream};

pub use super::allowance::read_in_pieces as frames_in_pieces;
pub use super::sending::Sending;
use super::{H2Settings, HboneStream, Meanwhile, StreamName};

/// What of this has left is known.
pub fn sending(stream: SendStream<Bytes>) -> Sending {
    Sending::new(stream)
}

/// The CONNECT has been sent.
pub fn ask(meanwhile: &mut Meanwhile<'_>, stream: u32, body: &mut Sending) {
    meanwhile.asked(StreamName { session: [0; 32], stream }, body);
}

/// There is no answer yet.
pub fn while_unanswered(meanwhile: &mut Meanwhile<'_>, cx: &mut Context<'_>, body: &mut Sending) {
    meanwhile.poll(cx, body);
}

/// The two halves of an HTTP/2 stream, of a connection with the smallest windows there are, as a tunnel.
pub fn pipe(send: Sending, recv: RecvStream) -> HboneStream {
    let settings =
        H2Settings { stream_window: 65_535, connection_window: 65_535, max_streams: 4, ..H2Settings::default() };
    HboneStream::new(send, recv, settings.release())
}
