//! A stub resolver: one name, its addresses, from recursive servers. Each question has a socket, a port and an id of its
//! own; an answer counts only from that server, with that id and question.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use ebpf_loader::abi::MARK_BYPASS;
use hickory_proto::op::{Message, MessageType, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use socket2::SockRef;
use tokio::net::{TcpSocket, UdpSocket};

use super::NameError;
use crate::dns::forward;
use crate::dns::message::{self, Asked, Query, Transport};

/// How long one server may take before the next is asked.
const PATIENCE: Duration = Duration::from_secs(2);
/// Rounds through all servers: a datagram may be lost.
const ROUNDS: usize = 2;
/// The longest datagram that is expected: none larger is asked for.
const DATAGRAM: usize = 4096;
/// Aliases that are followed within an answer.
const ALIASES: usize = 16;

/// Addresses and how long they may be kept; empty where the name exists without any.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    pub addresses: Vec<IpAddr>,
    pub ttl: Duration,
}

/// Asks for the addresses of both families at once. One family is enough.
pub async fn look_up(servers: &[SocketAddr], host: &str, ipv6: bool) -> Result<Found, NameError> {
    let mut name = Name::from_ascii(host).map_err(|_| NameError::Unusable)?;
    name.set_fqdn(true);
    let v6 = async {
        match ipv6 {
            true => ask(servers, &name, RecordType::AAAA).await,
            false => Ok(Found { addresses: Vec::new(), ttl: Duration::MAX }),
        }
    };
    match tokio::join!(ask(servers, &name, RecordType::A), v6) {
        (Ok(v4), Ok(v6)) => Ok(Found { addresses: [v4.addresses, v6.addresses].concat(), ttl: v4.ttl.min(v6.ttl) }),
        // Of the other family more is known a little later.
        (Ok(one), Err(_)) | (Err(_), Ok(one)) if !one.addresses.is_empty() => Ok(one),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

async fn ask(servers: &[SocketAddr], name: &Name, kind: RecordType) -> Result<Found, NameError> {
    let mut last = String::from("there is none");
    for server in std::iter::repeat_n(servers, ROUNDS).flatten() {
        match tokio::time::timeout(PATIENCE, exchange(*server, name, kind)).await {
            Ok(Ok(answer)) => match answer.metadata.response_code {
                ResponseCode::NoError => return Ok(read(&answer, name, kind)),
                ResponseCode::NXDomain => return Err(NameError::NoSuchName),
                // This server cannot; another may.
                code => last = format!("{server}: {code}"),
            },
            Ok(Err(error)) => last = format!("{server}: {error}"),
            Err(_) => last = format!("{server}: silent for {} s", PATIENCE.as_secs()),
        }
    }
    Err(NameError::NoAnswer(last))
}

async fn exchange(server: SocketAddr, name: &Name, kind: RecordType) -> io::Result<Message> {
    let id = rand::random();
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Question::query(name.clone(), kind));
    let bytes = message.to_vec().map_err(io::Error::other)?;
    let Asked::Query(query) = message::read(&bytes, Transport::Udp) else {
        return Err(io::Error::other("the question cannot be written"));
    };
    let answer = udp(server, &query, &bytes, id).await?;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    let socket = if server.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    spare(&socket);
    let mut stream = socket.connect(server).await?;
    forward::write(&mut stream, &bytes).await?;
    let answer = forward::read(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
    if !query.is_answered_by(&answer, id) {
        return Err(io::Error::other("answered something else"));
    }
    Message::from_vec(&answer).map_err(io::Error::other)
}

/// In dedicated mode our own namespace is captured and would bring the question back to us. Elsewhere the mark means
/// nothing, and whoever may not set it does not need it.
fn spare(socket: &impl AsFd) {
    let _ = SockRef::from(socket).set_mark(MARK_BYPASS);
}

async fn udp(server: SocketAddr, query: &Query, bytes: &[u8], id: u16) -> io::Result<Message> {
    let any: SocketAddr = match server.ip() {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    spare(&socket);
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // What does not match was guessed by somebody else; the server's own may still come.
        if query.is_answered_by(&buffer[..length], id) {
            return Message::from_vec(&buffer[..length]).map_err(io::Error::other);
        }
    }
}

/// The addresses that belong to the name, by way of its aliases; records of other names count for nothing.
pub(crate) fn read(answer: &Message, name: &Name, kind: RecordType) -> Found {
    let mut owner = name.clone();
    let mut ttl = u32::MAX;
    for _ in 0..ALIASES {
        let own = || answer.answers.iter().filter(|record| record.name == owner);
        let addresses: Vec<(IpAddr, u32)> = own()
            .filter_map(|record| match (&record.data, kind) {
                (RData::A(ip), RecordType::A) => Some((IpAddr::V4(ip.0), record.ttl)),
                (RData::AAAA(ip), RecordType::AAAA) => Some((IpAddr::V6(ip.0), record.ttl)),
                _ => None,
            })
            .collect();
        if !addresses.is_empty() {
            ttl = addresses.iter().map(|(_, ttl)| *ttl).fold(ttl, u32::min);
            let addresses = addresses.into_iter().map(|(ip, _)| ip).collect();
            return Found { addresses, ttl: Duration::from_secs(ttl.into()) };
        }
        let alias = own().find_map(|record| match &record.data {
            RData::CNAME(to) => Some((to.0.clone(), record.ttl)),
            _ => None,
        });
        let Some((next, its)) = alias else { break };
        (owner, ttl) = (next, ttl.min(its));
    }
    // That there is none is news of a short life; the other family decides.
    Found { addresses: Vec::new(), ttl: Duration::from_secs(ttl.min(30).into()) }
}
