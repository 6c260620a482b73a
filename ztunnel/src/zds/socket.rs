//! Packets to and from the agent: a unix socket of type SOCK_SEQPACKET with file descriptors beside the bytes.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::session::{LONGEST, Lost};

/// Room for as many descriptors as a mistaken agent may send; more are reported as lost.
const FILES: usize = 4;

/// A connection to the agent. tokio knows unix streams only, of which nothing but the readiness is used here.
pub struct AgentSocket(UnixStream);

/// What one packet brought; the bytes are in the caller's buffer.
#[derive(Debug)]
pub struct Received {
    /// Zero at the end of the connection.
    pub length: usize,
    pub files: Vec<OwnedFd>,
    pub lost: Option<Lost>,
}

impl AgentSocket {
    /// # Errors
    /// When nobody listens at `path`, or it is no socket of this type.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
        // A local connect is done at once, or refused when the agent's queue is full.
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self(UnixStream::from_std(socket.into())?))
    }

    /// The next packet. Cancel safe.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn receive(&self, buffer: &mut [u8; LONGEST]) -> io::Result<Received> {
        loop {
            self.0.readable().await?;
            match self.0.try_io(Interest::READABLE, || receive(&self.0, buffer)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                received => return received,
            }
        }
    }

    /// Sends one packet.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn send(&self, packet: &[u8]) -> io::Result<()> {
        loop {
            self.0.writable().await?;
            match self.0.try_io(Interest::WRITABLE, || SockRef::from(&self.0).send(packet)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                sent => return sent.map(drop),
            }
        }
    }
}

fn receive(socket: impl AsFd, buffer: &mut [u8; LONGEST]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let files = control
        .drain()
        .filter_map(|part| match part {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        })
        .flatten()
        .collect();
    let lost = if message.flags.contains(ReturnFlags::TRUNC) {
        Some(Lost::Bytes)
    } else if message.flags.contains(ReturnFlags::CTRUNC) {
        Some(Lost::Files)
    } else {
        None
    };
    Ok(Received { length: message.bytes, files, lost })
}
