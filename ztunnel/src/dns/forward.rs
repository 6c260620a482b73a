//! What the mesh does not know is asked of the server the application asked, from the pod's own namespace and address.
//!
//! Nothing is kept: each query is a socket and an id of its own, so no pod can leave anything behind for another, and
//! an answer counts only from that server, to that port, with that id and question. The server's bytes go back as they
//! are, apart from the id.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::message::Query;
use super::with_scratch;
use crate::ending::Ending;
use crate::node::pod::LocalPod;

/// How long a server may take.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum NoAnswer {
    #[error("asking {server}: {source}")]
    Io { server: SocketAddr, source: io::Error },
    #[error("{0} did not answer within {seconds} s", seconds = TIMEOUT.as_secs())]
    Timeout(SocketAddr),
    #[error("{0} answered something else")]
    Mismatch(SocketAddr),
    #[error("there is no server to ask: ztunnel's /etc/resolv.conf names none")]
    NoServer,
    #[error(transparent)]
    Connect(#[from] Ending),
    #[error("more queries are under way than one pod may have")]
    Overloaded,
}

/// Asks one server after the other until one answers, as resolvers do.
///
/// # Errors
/// What kept the last one's answer away.
pub async fn first(pod: &LocalPod, servers: &[SocketAddr], query: &Query, bytes: &[u8]) -> Result<Vec<u8>, NoAnswer> {
    let mut last = NoAnswer::NoServer;
    // Together they may take as long as one: the client will not wait for more.
    let each = TIMEOUT / u32::try_from(servers.len().max(1)).unwrap_or(1);
    for server in servers {
        match tokio::time::timeout(each, udp(pod, *server, query, bytes)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => last = error,
            Err(_) => last = NoAnswer::Timeout(*server),
        }
    }
    Err(last)
}

/// Asks `server` by UDP. An answer that is truncated is handed on as it is: the client then comes by TCP.
///
/// # Errors
/// What kept the answer away.
pub async fn udp(pod: &LocalPod, server: SocketAddr, query: &Query, bytes: &[u8]) -> Result<Vec<u8>, NoAnswer> {
    let io = |source| NoAnswer::Io { server, source };
    let source = pod.address_like(server.ip()).ok_or(Ending::NoSource(server))?;
    let socket = UdpSocket::from_std(pod.netns.outgoing_udp(source).map_err(io)?.into()).map_err(io)?;
    socket.connect(server).await.map_err(io)?;
    let _asking = pod.dns.note_query(socket.local_addr().map_err(io)?);
    let id = rand::random();
    socket.send(&Query::with_id(bytes, id)).await.map_err(io)?;
    let answered = async {
        loop {
            socket.readable().await?;
            let answer: io::Result<Option<Vec<u8>>> = with_scratch(|buffer| {
                let length = socket.try_recv(buffer)?;
                // What does not match was guessed by somebody else; the server's own may still come.
                let answer = &buffer[..length];
                Ok(query.is_answered_by(answer, id).then(|| Query::with_id(answer, query.id())))
            });
            match answer {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    };
    match tokio::time::timeout(TIMEOUT, answered).await {
        Ok(answered) => answered.map_err(io),
        Err(_) => Err(NoAnswer::Timeout(server)),
    }
}

/// Asks over a connection to `server`.
///
/// # Errors
/// What kept the answer away; the connection is of no more use then.
pub async fn tcp(stream: &mut TcpStream, server: SocketAddr, query: &Query, bytes: &[u8]) -> Result<Vec<u8>, NoAnswer> {
    let id = rand::random();
    let exchange = async {
        write(stream, &Query::with_id(bytes, id)).await?;
        read(stream).await?.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    };
    match tokio::time::timeout(TIMEOUT, exchange).await {
        Ok(Ok(answer)) if query.is_answered_by(&answer, id) => Ok(Query::with_id(&answer, query.id())),
        Ok(Ok(_)) => Err(NoAnswer::Mismatch(server)),
        Ok(Err(source)) => Err(NoAnswer::Io { server, source }),
        Err(_) => Err(NoAnswer::Timeout(server)),
    }
}

/// Reads one message with its length before it; `None` at the end.
///
/// # Errors
/// Those of the stream; the end in the middle of a message is one.
pub async fn read(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes one message with its length before it.
///
/// # Errors
/// Those of the stream; a message above 64 KiB.
pub async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend(length.to_be_bytes());
    framed.extend(message);
    stream.write_all(&framed).await
}
