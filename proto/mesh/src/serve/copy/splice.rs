//! Bytes from one socket to another by way of a pipe, without a copy to user space and back (splice(2)).

use std::{
    io::{self, PipeReader, PipeWriter},
    os::fd::AsFd,
    task::{Context, Poll, ready},
};

use nix::fcntl::{SpliceFFlags, splice};
use tokio::{io::Interest, net::TcpStream};

/// Most that is asked for at once. A pipe has sixteen places, each for a piece of a packet and thus at most 64 KiB.
const WANT: usize = 1 << 20;

/// A pipe between two sockets.
pub(super) struct Pipe {
    out: PipeReader,
    into: PipeWriter,
    held: usize,
}

/// What became of an attempt to move something.
pub(super) enum Moved {
    /// So many bytes are in the sink.
    Bytes(usize),
    /// The source has nothing for now, and the pipe is empty.
    Waiting,
    /// The source has ended, and the pipe is empty.
    Ended,
}

/// Whose error it is.
pub(super) enum Side {
    Source(io::Error),
    Sink(io::Error),
}

impl Pipe {
    pub(super) fn new() -> io::Result<Self> {
        let (out, into) = io::pipe()?;
        Ok(Self { out, into, held: 0 })
    }

    /// Moves what there is; pending while the sink takes nothing.
    pub(super) fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
        source: &TcpStream,
        sink: &TcpStream,
    ) -> Poll<Result<Moved, Side>> {
        // Filled only when empty: a full pipe and a source without bytes would look the same.
        if self.held == 0 {
            match poll_io(cx, source, Interest::READABLE, || splice_once(source, &self.into, WANT)) {
                Poll::Pending => return Poll::Ready(Ok(Moved::Waiting)),
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(Moved::Ended)),
                Poll::Ready(Ok(bytes)) => self.held = bytes,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Side::Source(error))),
            }
        }
        let drained = ready!(poll_io(cx, sink, Interest::WRITABLE, || splice_once(&self.out, sink, self.held)));
        match drained {
            Ok(0) => Poll::Ready(Err(Side::Sink(io::ErrorKind::WriteZero.into()))),
            Ok(bytes) => {
                self.held -= bytes;
                Poll::Ready(Ok(Moved::Bytes(bytes)))
            }
            Err(error) => Poll::Ready(Err(Side::Sink(error))),
        }
    }
}

fn splice_once(from: &impl AsFd, to: &impl AsFd, bytes: usize) -> io::Result<usize> {
    let how = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(splice(from, None, to, None, bytes, how)?)
}

/// Tries until it works, fails, or the socket is not ready, which the task is woken for.
fn poll_io<T>(
    cx: &mut Context<'_>,
    socket: &TcpStream,
    interest: Interest,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> Poll<io::Result<T>> {
    loop {
        if interest.is_readable() {
            ready!(socket.poll_read_ready(cx))?;
        } else {
            ready!(socket.poll_write_ready(cx))?;
        }
        match socket.try_io(interest, &mut attempt) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return Poll::Ready(done),
        }
    }
}
