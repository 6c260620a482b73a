//! Queries in, answers out: the UDP socket of a pod, and its connections to port 53.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use ebpf_loader::abi::DNS_PORT;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg};
use socket2::Socket;
use tokio::io::Interest;
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;

use super::forward::{self, NoAnswer};
use super::message::{Query, Transport};
use super::packet;
use super::{Verdict, decide, forwarded, with_scratch};
use crate::ending::Ending;
use crate::node::backend::Backend;
use crate::node::pod::LocalPod;
use crate::worker::{Place, Shared, count_self_call};

/// How long a connection may be silent between queries.
const TCP_IDLE: Duration = Duration::from_secs(5);
/// Longer queries than any resolver sends are cut, and so not answered.
const LONGEST_QUERY: usize = 4096;
/// Before receiving is tried again after an error that is not about one packet.
const RECEIVE_PAUSE: Duration = Duration::from_millis(100);

/// A pod's DNS sockets of one family.
pub struct DnsSocket {
    /// Where queries are handed over.
    pub queries: std::net::UdpSocket,
    pub answers: Answers,
}

/// How an answer gets the address of the server that was asked.
pub enum Answers {
    /// By a raw socket that sends whole packets.
    InTheServersName(Socket),
    /// By the socket the query came to: what rewrote the one will rewrite the other.
    Same,
}

/// As many as the queue of a socket holds of the smallest.
const LAST_QUERIES: u32 = 1024;

/// Serves a pod's captured UDP until its drain begins, and then the queries that are under way.
pub async fn udp(shared: Shared, pod: Arc<LocalPod>, socket: DnsSocket) {
    let _working = pod.drain.guard();
    let queries = match UdpSocket::from_std(socket.queries) {
        Ok(queries) => queries,
        Err(error) => return tracing::error!(%error, pod = %pod.name, "the DNS socket cannot be registered"),
    };
    let queries = Arc::new(queries);
    let answers = Arc::new(socket.answers);
    // Bounded by the pod's permits; each ends with the time a server may take.
    let mut tasks = JoinSet::new();
    let (mut draining, mut last_ones) = (false, LAST_QUERIES);
    loop {
        let received = if draining {
            // What is in the queue when the drain begins would be lost with the socket. Without a successor more may come
            // all the time.
            last_ones -= 1;
            match receive(&queries) {
                Ok(received) if last_ones > 0 => Ok(received),
                Ok(_) | Err(_) => break,
            }
        } else {
            tokio::select! {
                received = queries.async_io(Interest::READABLE, || receive(&queries)) => received,
                Some(_) = tasks.join_next() => continue,
                () = pod.drain.draining() => {
                    draining = true;
                    continue;
                }
            }
        };
        let received = match received {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!(target: "dns", pod = %pod.name, %error, "receiving");
                tokio::time::sleep(RECEIVE_PAUSE).await;
                continue;
            }
        };
        let Some(Datagram { bytes, client, server }) = received else { continue };
        // The steering brings port 53 alone; whoever came to our own port would be forwarded to ourselves.
        if pod.backend == Backend::Ebpf && server.is_some_and(|server| server.port() != DNS_PORT) {
            count_self_call();
            continue;
        }
        if pod.dns.is_own(client) {
            continue;
        }
        // Dropped like by any server that is too busy: resolvers ask again.
        let Some(permit) = pod.dns.permit() else {
            metrics::counter!("ztunnel_dns_dropped_total").increment(1);
            continue;
        };
        let (shared, pod, queries, answers) = (shared.clone(), pod.clone(), queries.clone(), answers.clone());
        tasks.spawn(async move {
            let servers = pod.dns.servers(server);
            let reply = match decide(&shared, &pod, servers.first().copied(), Transport::Udp, &bytes).await {
                Verdict::Reply(reply) => Some(reply),
                Verdict::Forward(query, labels) => {
                    forwarded(&query, &labels, forward::first(&pod, &servers, &query, &bytes)).await
                }
                Verdict::Ignore => None,
            };
            drop(permit);
            let Some(reply) = reply else { return };
            let sent = match (&*answers, server) {
                (Answers::InTheServersName(raw), Some(server)) => send(raw, server, client, &reply),
                (Answers::InTheServersName(_), None) => Ok(()),
                (Answers::Same, _) => queries.send_to(&reply, client).await.map(drop),
            };
            if let Err(error) = sent {
                tracing::debug!(target: "dns", pod = %pod.name, %client, %error, "sending an answer");
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

/// A query, from whom, and whom it was meant for, where that can be told.
struct Datagram {
    bytes: Vec<u8>,
    client: SocketAddr,
    server: Option<SocketAddr>,
}

/// `None` for a datagram that is too long.
fn receive(socket: &UdpSocket) -> io::Result<Option<Datagram>> {
    with_scratch(|buffer| receive_into(socket, &mut buffer[..LONGEST_QUERY]))
}

fn receive_into(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<Datagram>> {
    let mut slices = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!(libc::sockaddr_in6);
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    if message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Ok(None);
    }
    let server = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4OrigDstAddr(to) => Some(SocketAddr::V4(SockaddrIn::from(to).into())),
        ControlMessageOwned::Ipv6OrigDstAddr(to) => Some(SocketAddr::V6(SockaddrIn6::from(to).into())),
        _ => None,
    });
    let client = message.address.as_ref().and_then(address);
    let length = message.bytes;
    Ok(client.map(|client| Datagram { bytes: buffer[..length].to_vec(), client, server }))
}

fn address(from: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = from.as_sockaddr_in().map(|a| SocketAddr::V4((*a).into()));
    v4.or_else(|| from.as_sockaddr_in6().map(|a| SocketAddr::V6((*a).into())))
}

fn send(raw: &Socket, server: SocketAddr, client: SocketAddr, reply: &[u8]) -> io::Result<()> {
    let packet = packet::udp(server, client, reply).ok_or(io::ErrorKind::InvalidData)?;
    // The port is in the packet; a raw socket takes none.
    raw.send_to(&packet, &SocketAddr::new(client.ip(), 0).into()).map(drop)
}

/// Serves a connection that came to a port for DNS alone.
pub async fn captured(at: Arc<Place>, client: TcpStream, _from: SocketAddr, server: SocketAddr) {
    let server = at.pod.dns.servers(Some(server)).first().copied().unwrap_or(server);
    Box::pin(tcp(&at, client, server)).await;
}

/// Serves a connection the pod's application opened to port 53 of `server`, one query after the other.
pub async fn tcp(at: &Place, mut client: TcpStream, server: SocketAddr) {
    let _ = mesh::net::tune(&client);
    let mut upstream: Option<TcpStream> = None;
    loop {
        let bytes = tokio::select! {
            read = tokio::time::timeout(TCP_IDLE, forward::read(&mut client)) => match read {
                Ok(Ok(Some(bytes))) => bytes,
                // Its end, an error or silence: nothing is owed to the client.
                Ok(Ok(None) | Err(_)) | Err(_) => return,
            },
            () = at.pod.drain.draining() => return,
        };
        let reply = match decide(&at.shared, &at.pod, Some(server), Transport::Tcp, &bytes).await {
            Verdict::Reply(reply) => Some(reply),
            Verdict::Ignore => return,
            Verdict::Forward(query, labels) if query.is_transfer() => {
                labels.count("istio_dns_upstream_requests_total");
                return transfer(at, client, server, &bytes).await;
            }
            Verdict::Forward(query, labels) => {
                let ask = async {
                    let _permit = at.pod.dns.permit().ok_or(NoAnswer::Overloaded)?;
                    ask(&mut upstream, || at.dial_plain(server), server, &query, &bytes).await
                };
                forwarded(&query, &labels, ask).await
            }
        };
        let Some(reply) = reply else { return };
        match tokio::time::timeout(TCP_IDLE, forward::write(&mut client, &reply)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// Asks over the connection that is kept, or a new one, which is then kept. One that has failed in any way is not: what
/// it brings next may be the answer to the query before.
async fn ask<D: Future<Output = Result<TcpStream, Ending>>>(
    kept: &mut Option<TcpStream>,
    dial: impl FnOnce() -> D,
    server: SocketAddr,
    query: &Query,
    bytes: &[u8],
) -> Result<Vec<u8>, NoAnswer> {
    if let Some(mut stream) = kept.take() {
        match forward::tcp(&mut stream, server, query, bytes).await {
            // A server may close between two queries; then a new connection is due, and only then.
            Err(NoAnswer::Io { .. }) => {}
            Err(other) => return Err(other),
            Ok(answer) => {
                *kept = Some(stream);
                return Ok(answer);
            }
        }
    }
    let mut stream = dial().await?;
    let answer = forward::tcp(&mut stream, server, query, bytes).await?;
    *kept = Some(stream);
    Ok(answer)
}

/// A zone transfer has no end that could be told without reading all of it: the two sides are joined.
async fn transfer(at: &Place, mut client: TcpStream, server: SocketAddr, query: &[u8]) {
    let joined = async {
        let mut upstream = at.dial_plain(server).await.map_err(io::Error::other)?;
        forward::write(&mut upstream, query).await?;
        tokio::io::copy_bidirectional(&mut client, &mut upstream).await
    };
    tokio::select! {
        done = joined => if let Err(error) = done {
            tracing::debug!(target: "dns", pod = %at.pod.name, %server, %error, "zone transfer");
        },
        () = at.pod.drain.cut() => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::net::TcpListener;

    use super::super::message::{self, Asked};
    use super::*;

    /// What a server does with a query.
    #[derive(Clone, Copy)]
    enum Does {
        Answer,
        AnswerAnother,
        Nothing,
        Close,
    }

    /// Does one after the other, whatever connection they come by.
    async fn server(listener: TcpListener, script: Vec<Does>) {
        let script = Arc::new(Mutex::new(script.into_iter()));
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let script = script.clone();
            connections.spawn(async move {
                while let Ok(Some(mut message)) = forward::read(&mut stream).await {
                    let next = script.lock().unwrap().next().expect("so many queries");
                    message[2] |= 0x80;
                    match next {
                        Does::Answer => {}
                        Does::AnswerAnother => message[0] ^= 1,
                        Does::Nothing => continue,
                        Does::Close => return,
                    }
                    forward::write(&mut stream, &message).await.unwrap();
                }
            });
        }
    }

    /// `www.example.com`, type A.
    fn query() -> (Query, Vec<u8>) {
        let bytes = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x07example\x03com\x00\x00\x01\x00\x01";
        match message::read(bytes, Transport::Tcp) {
            Asked::Query(query) => (*query, bytes.to_vec()),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_connection_that_has_failed_in_any_way_is_not_asked_again() {
        use Does::{Answer, AnswerAnother, Close, Nothing};
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        let script = vec![Answer, AnswerAnother, Answer, Nothing, Answer, Close, Answer, Answer];
        tasks.spawn(server(listener, script));
        let (query, bytes) = query();
        let (mut kept, mut dialled) = (None, 0);
        let mut told = Vec::new();
        for does in [Answer, AnswerAnother, Answer, Nothing, Answer, Close, Answer] {
            // The server is silent, so it is time alone that passes.
            if matches!(does, Nothing) {
                tokio::time::pause();
            }
            let dial = || {
                dialled += 1;
                async { Ok(TcpStream::connect(to).await.expect("it listens")) }
            };
            let answer = ask(&mut kept, dial, to, &query, &bytes).await;
            if matches!(does, Nothing) {
                tokio::time::resume();
            }
            let told_so = match answer {
                Ok(answer) => {
                    assert_eq!(answer[..2], bytes[..2], "under the client's id");
                    "answer"
                }
                Err(NoAnswer::Mismatch(_)) => "mismatch",
                Err(NoAnswer::Timeout(_)) => "timeout",
                Err(_) => "other",
            };
            told.push((told_so, dialled));
        }
        let expected = [
            ("answer", 1),
            ("mismatch", 1),
            ("answer", 2),
            ("timeout", 2),
            ("answer", 3),
            // Closed between two queries, as far as can be told: asked again over a new one.
            ("answer", 4),
            ("answer", 4),
        ];
        assert_eq!(told, expected);
    }
}
