//! What plugin and ztunnel say to each other: one packet each way over a unix socket, JSON, with the pod's network
//! namespace as a descriptor beside it. Packets keep a request and its descriptor together.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Changes when an older side would misread a newer one.
const VERSION: u32 = 1;
/// The attachments of a thousand pods and more.
const MAX_PACKET: usize = 128 * 1024;

/// A container's interface: what the runtime adds and deletes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    pub container: String,
    pub interface: String,
}

/// The pod as the runtime names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    pub uid: String,
    pub namespace: String,
    pub name: String,
}

/// What the plugin asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
pub enum Request {
    /// Comes with the namespace. `addresses` are those the plugins before have put into it.
    Add { attachment: Attachment, pod: PodName, addresses: Vec<IpAddr> },
    /// Comes with the namespace where it still exists.
    Del { attachment: Attachment },
    /// Comes with the namespace: is it captured, if it is to be?
    Check { pod: PodName },
    /// Can pods be added?
    Status,
    /// All but these are gone.
    Gc { valid: Vec<Attachment> },
}

/// What ztunnel answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "lowercase")]
pub enum Answer {
    /// The pod's connections are captured from now on.
    Enrolled,
    /// The pod is not in the mesh.
    Outside,
    Done,
    /// Not now; nothing was changed.
    Later {
        reason: String,
    },
    /// Not at all; nothing was changed.
    Refused {
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

/// A packet as bytes.
///
/// # Errors
/// When it would be too long.
pub fn encode<T: Serialize>(content: T) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(&Envelope { version: VERSION, content })?;
    if bytes.len() > MAX_PACKET {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a message of {} bytes", bytes.len())));
    }
    Ok(bytes)
}

/// # Errors
/// When it is another version's, or makes no sense.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    // The version first: what else is in a packet of another version is not known.
    let Version { version } = serde_json::from_slice(bytes)?;
    if version != VERSION {
        let text = format!("plugin and ztunnel speak different versions of their protocol: {version}, {VERSION}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(serde_json::from_slice::<Envelope<T>>(bytes)?.content)
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// A connection to ztunnel. Blocking, each call up to `patience`.
///
/// # Errors
/// When nobody listens there.
pub fn connect(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let socket = socket(SocketFlags::CLOEXEC)?;
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// A listening socket, not blocking.
///
/// # Errors
/// When the path is taken or cannot be written.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 128)?;
    // The standard library's type asks nothing of a socket but that it accepts.
    Ok(socket.into())
}

fn socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends one packet.
///
/// # Errors
/// Those of the socket.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
    if !files.is_empty() {
        // The space is for exactly one.
        control.push(SendAncillaryMessage::ScmRights(&files));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives one packet and the file that came with it.
///
/// # Errors
/// Those of the socket; a packet that is too long or empty (the other side is gone), more than one file.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; MAX_PACKET + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    // Drained in any case, or the files would stay open.
    let mut files: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        })
        .flatten()
        .collect();
    let bad = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidData, text.to_owned()));
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) || files.len() > 1 {
        return bad("a packet that is too long, or has too many files");
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(received.bytes);
    Ok((bytes, files.pop()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment() -> Attachment {
        Attachment { container: "c1".into(), interface: "eth0".into() }
    }

    #[test]
    fn requests_and_answers_survive_the_trip() {
        let pod = PodName { uid: "u".into(), namespace: "shop".into(), name: "web-0".into() };
        for request in [
            Request::Check { pod: pod.clone() },
            Request::Add { attachment: attachment(), pod, addresses: vec!["10.0.0.1".parse().unwrap()] },
            Request::Del { attachment: attachment() },
            Request::Status,
            Request::Gc { valid: vec![attachment()] },
        ] {
            assert_eq!(decode::<Request>(&encode(&request).unwrap()).unwrap(), request);
        }
        let later = Answer::Later { reason: "x".into() };
        assert_eq!(decode::<Answer>(&encode(&later).unwrap()).unwrap(), later);
    }

    #[test]
    fn another_version_is_told_from_nonsense() {
        let other = decode::<Request>(br#"{"version":2,"verb":"dance"}"#).unwrap_err().to_string();
        assert!(other.contains("different versions"), "{other}");
        assert!(decode::<Request>(br#"{"version":1,"verb":"dance"}"#).is_err());
        assert!(decode::<Request>(b"").is_err());
    }

    #[test]
    fn the_longest_packet_is_bounded() {
        let valid = vec![attachment(); 10_000];
        assert!(encode(Request::Gc { valid }).is_err());
        let valid = vec![Attachment { container: "0".repeat(64), interface: "eth0".into() }; 1000];
        encode(Request::Gc { valid }).unwrap();
    }

    #[test]
    fn a_file_travels_with_its_packet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = listen(&path).unwrap();
        let client = connect(&path, Duration::from_secs(5)).unwrap();
        let (server, _) = listener.accept().unwrap();
        let file = std::fs::File::open("/proc/self/ns/net").unwrap();
        send(client.as_fd(), b"with", Some(file.as_fd())).unwrap();
        send(client.as_fd(), b"without", None).unwrap();
        let (bytes, received) = receive(server.as_fd()).unwrap();
        let inode = |f: BorrowedFd<'_>| rustix::fs::fstat(f).unwrap().st_ino;
        assert_eq!(bytes, b"with");
        assert_eq!(inode(received.expect("a file").as_fd()), inode(file.as_fd()));
        let (bytes, none) = receive(server.as_fd()).unwrap();
        assert!(bytes == b"without" && none.is_none());
        drop(client);
        assert_eq!(receive(server.as_fd()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
