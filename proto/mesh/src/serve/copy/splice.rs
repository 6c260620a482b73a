//! Bytes from one socket to another by way of a pipe, without a copy to user space and back (splice(2)).

use std::{
    cell::RefCell,
    io::{self, PipeReader, PipeWriter},
    os::fd::{AsFd, AsRawFd},
    task::{Context, Poll, ready},
};

use nix::{
    fcntl::{SpliceFFlags, splice},
    sys::socket::{MsgFlags, recv},
};
use tokio::{io::Interest, net::TcpStream};

/// Most that is asked for at once. A pipe has sixteen places, each for a piece of a packet and thus at most 64 KiB.
const WANT: usize = 1 << 20;

/// Empty pipes a thread keeps for the next transfer: those that wait hold none, as a node's pipes are counted.
const SPARE: usize = 4;

thread_local! {
    static SPARES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

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
    /// The source has bytes that splice does not get at (it stops before urgent data), and the pipe is empty.
    Stuck,
}

/// What an attempt to fill the pipe has brought.
enum Filled {
    Bytes(usize),
    Ended,
    Stuck,
}

/// Whose error it is.
pub(super) enum Side {
    Source(io::Error),
    Sink(io::Error),
}

impl Pipe {
    pub(super) fn get() -> io::Result<Self> {
        if let Some(spare) = SPARES.with_borrow_mut(Vec::pop) {
            return Ok(spare);
        }
        let (out, into) = io::pipe()?;
        Ok(Self { out, into, held: 0 })
    }

    /// For whoever comes next, if it is empty.
    pub(super) fn give_back(self) {
        SPARES.with_borrow_mut(|spares| {
            if self.held == 0 && spares.len() < SPARE {
                spares.push(self);
            }
        });
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
            match poll_io(cx, source, Interest::READABLE, || fill(source, &self.into)) {
                Poll::Pending => return Poll::Ready(Ok(Moved::Waiting)),
                Poll::Ready(Ok(Filled::Ended)) => return Poll::Ready(Ok(Moved::Ended)),
                Poll::Ready(Ok(Filled::Stuck)) => return Poll::Ready(Ok(Moved::Stuck)),
                Poll::Ready(Ok(Filled::Bytes(bytes))) => self.held = bytes,
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

/// What there is; "nothing" and "the end" are believed only when a read says so as well.
fn fill(source: &TcpStream, pipe: &PipeWriter) -> io::Result<Filled> {
    match splice_once(source, pipe, WANT) {
        Ok(0) => {}
        Ok(bytes) => return Ok(Filled::Bytes(bytes)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => return Err(error),
    }
    match recv(source.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)? {
        0 => Ok(Filled::Ended),
        _ => Ok(Filled::Stuck),
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
