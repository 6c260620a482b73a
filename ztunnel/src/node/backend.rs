//! By what means a pod's connections come to ztunnel, as far as the data path must know: how an accepted connection
//! tells where it was going, and how one to the application is made that is not taken again.

pub mod redirect;

use std::io;
use std::net::{IpAddr, SocketAddr};

use mesh::net::canonical;
use socket2::Socket;
use tokio::net::TcpStream;

use super::netns::Netns;
use crate::worker::Role;

/// The two back ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Our programs steer packets to listeners on loopback; nothing is rewritten.
    Ebpf,
    /// Rules of a CNI agent rewrite the destination to fixed ports; conntrack remembers what it was.
    Redirect,
}

impl Backend {
    /// Where the connection was going. `None` when nothing brought it here: somebody dialled the listener itself.
    #[must_use]
    pub fn destination(self, role: Role, stream: &TcpStream) -> Option<SocketAddr> {
        // A socket that cannot name its own end is closed already.
        let here = stream.local_addr().map(canonical).ok()?;
        match (self, role) {
            (Self::Ebpf, _) | (Self::Redirect, Role::Hbone) => Some(here),
            (Self::Redirect, Role::Outbound | Role::Passthrough | Role::Dns) => {
                redirect::original_destination(stream, here)
            }
        }
    }

    /// A socket for the last leg to the application, which shall see `client` as the peer.
    ///
    /// # Errors
    /// Those of the socket calls.
    pub fn app_leg(self, netns: &Netns, client: IpAddr, port: u16) -> io::Result<Socket> {
        match self {
            Self::Ebpf => netns.app_leg(client, port),
            Self::Redirect => netns.outgoing_as(client, port),
        }
    }
}
