use std::sync::atomic::{AtomicU32, Ordering};

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

use super::*;

/// A server on loopback that counts its questions; ends with the runtime.
async fn server(answer: impl Fn(&Message) -> Vec<Message> + Send + 'static) -> (Servers, Arc<AtomicU32>) {
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = udp.local_addr().unwrap();
    let count = Arc::new(AtomicU32::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            counted.fetch_add(1, Ordering::Relaxed);
            for reply in answer(&Message::from_vec(&buffer[..length]).unwrap()) {
                udp.send_to(&reply.to_vec().unwrap(), from).await.unwrap();
            }
        }
    });
    (Servers::These(vec![at]), count)
}

fn reply(asked: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
    reply.add_query(asked.queries[0].clone());
    reply.metadata.response_code = code;
    reply
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn a(owner: &str, ttl: u32, ip: [u8; 4]) -> Record {
    Record::from_rdata(name(owner), ttl, RData::A(A(ip.into())))
}

/// `a.test` by an alias, with a record of another name beside it.
fn aliased(asked: &Message) -> Message {
    let mut reply = reply(asked, ResponseCode::NoError);
    reply.add_answer(a("victim.test.", 600, [192, 0, 2, 66]));
    let alias = RData::CNAME(CNAME(name("b.test.")));
    reply.add_answer(Record::from_rdata(name("A.test."), 60, alias));
    match asked.queries[0].query_type() {
        RecordType::A => reply.add_answer(a("b.test.", 300, [192, 0, 2, 1])),
        _ => reply.add_answer(Record::from_rdata(
            name("b.test."),
            300,
            RData::AAAA(AAAA("2001:db8::1".parse().unwrap())),
        )),
    };
    reply
}

fn known(ips: &[&str]) -> Outcome {
    Ok(ips.iter().map(|ip| ip.parse::<IpAddr>().unwrap()).collect())
}

#[tokio::test]
async fn a_name_comes_to_the_addresses_of_both_families_and_is_asked_for_once() {
    let (servers, count) = server(|asked| vec![aliased(asked)]).await;
    let names = Names::new(servers, true);
    let host = Arc::from("a.test");
    let all = futures_util::future::join_all((0..50).map(|_| names.addresses(&host))).await;
    assert!(all.iter().all(|outcome| *outcome == known(&["192.0.2.1", "2001:db8::1"])), "{all:?}");
    assert_eq!(names.addresses(&host).await, known(&["192.0.2.1", "2001:db8::1"]));
    assert_eq!(count.load(Ordering::Relaxed), 2, "one question for each family");
    let without = Names::new(names.0.servers.clone(), false);
    assert_eq!(without.addresses(&host).await, known(&["192.0.2.1"]));
}

#[tokio::test]
async fn what_nobody_asked_for_is_not_believed() {
    let lie = |asked: &Message, change: fn(&mut Message)| {
        let mut lie = reply(asked, ResponseCode::NoError);
        lie.add_answer(a("a.test.", 600, [192, 0, 2, 66]));
        change(&mut lie);
        lie
    };
    let (servers, _) = server(move |asked| {
        vec![
            lie(asked, |m| m.metadata.id = m.metadata.id.wrapping_add(1)),
            lie(asked, |m| m.metadata.message_type = MessageType::Query),
            lie(asked, |m| {
                m.queries[0].set_name(name("other.test."));
            }),
            aliased(asked),
        ]
    })
    .await;
    let names = Names::new(servers, false);
    assert_eq!(names.addresses(&Arc::from("a.test")).await, known(&["192.0.2.1"]));
    assert_eq!(names.cache().get(&Arc::from("victim.test"), Instant::now()).outcome(), None, "nor kept for later");
}

impl Known {
    fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Outcome(outcome) => Some(outcome),
            Self::Pending(_) | Self::Nothing(_) => None,
        }
    }
}

#[tokio::test]
async fn every_way_to_have_no_address_has_its_reason() {
    let (servers, _) = server(|asked| {
        let text = asked.queries[0].name().to_ascii();
        let mut reply = reply(asked, if text == "none.test." { ResponseCode::NXDomain } else { ResponseCode::NoError });
        match text.as_str() {
            "self.test." => reply.add_answer(a("self.test.", 5, [127, 0, 0, 1])),
            "any.test." => reply.add_answer(a("any.test.", 5, [0, 0, 0, 0])),
            "loop.test." => {
                reply.add_answer(Record::from_rdata(name("loop.test."), 5, RData::CNAME(CNAME(name("loop.test.")))))
            }
            "broken.test." => {
                reply.metadata.response_code = ResponseCode::ServFail;
                &mut reply
            }
            _ => &mut reply,
        };
        vec![reply]
    })
    .await;
    let names = Names::new(servers, true);
    for (host, expected) in [
        ("none.test", NameError::NoSuchName),
        ("empty.test", NameError::NoAddress),
        ("self.test", NameError::NoAddress),
        ("any.test", NameError::NoAddress),
        ("loop.test", NameError::NoAddress),
        ("a..test", NameError::Unusable),
    ] {
        assert_eq!(names.addresses(&Arc::from(host)).await, Err(expected), "{host}");
    }
    let broken = names.addresses(&Arc::from("broken.test")).await;
    assert!(matches!(&broken, Err(NameError::NoAnswer(why)) if why.contains("Server Failure")), "{broken:?}");
    let missing = Names::new(Servers::File("/nonexistent/resolv.conf".into()), true);
    assert!(matches!(missing.addresses(&Arc::from("a.test")).await, Err(NameError::Settings { .. })));
}

#[tokio::test]
async fn a_server_that_fails_is_followed_by_the_next() {
    let (good, _) = server(|asked| vec![aliased(asked)]).await;
    let (bad, count) = server(|asked| vec![reply(asked, ResponseCode::Refused)]).await;
    let (Servers::These(bad), Servers::These(good)) = (bad, good) else { unreachable!() };
    let names = Names::new(Servers::These([bad, good].concat()), false);
    assert_eq!(names.addresses(&Arc::from("a.test")).await, known(&["192.0.2.1"]));
    assert_eq!(count.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_again_by_tcp() {
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let tcp = TcpListener::bind(udp.local_addr().unwrap()).await.unwrap();
    let names = Names::new(Servers::These(vec![udp.local_addr().unwrap()]), false);
    let served = async {
        let mut buffer = [0; 4096];
        let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
        let mut cut = reply(&Message::from_vec(&buffer[..length]).unwrap(), ResponseCode::NoError);
        cut.metadata.truncation = true;
        udp.send_to(&cut.to_vec().unwrap(), from).await.unwrap();
        let (mut stream, _) = tcp.accept().await.unwrap();
        let length = usize::from(stream.read_u16().await.unwrap());
        stream.read_exact(&mut buffer[..length]).await.unwrap();
        let whole = aliased(&Message::from_vec(&buffer[..length]).unwrap()).to_vec().unwrap();
        stream.write_u16(u16::try_from(whole.len()).unwrap()).await.unwrap();
        stream.write_all(&whole).await.unwrap();
    };
    let host = Arc::from("a.test");
    let (outcome, ()) = tokio::join!(names.addresses(&host), served);
    assert_eq!(outcome, known(&["192.0.2.1"]));
}

#[test]
fn without_a_server_the_local_one_is_asked() {
    assert_eq!(servers("nameserver 192.0.2.1"), ["192.0.2.1:53".parse().unwrap()]);
    assert_eq!(servers("options ndots:5"), ["127.0.0.1:53".parse().unwrap()]);
}
