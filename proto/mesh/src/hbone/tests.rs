use std::{
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::*;
use crate::{
    clock::Clock,
    drain::{self, DrainTrigger, DrainWatcher},
    identity::{FileCa, Identity, WorkloadCertificate},
    tls,
};

mod hostile;
mod pool;

const PATIENCE: Duration = Duration::from_secs(20);
static LAST_WORDS: [u8; 40_000] = [7; 40_000];

thread_local! {
    /// How much `heard` was sent, or how that broke off. A test's runtime has this thread alone.
    static HEARD: std::cell::Cell<Option<Result<usize, io::ErrorKind>>> = const { std::cell::Cell::new(None) };
}

#[test]
fn authorities_are_addresses_or_names_with_a_port() {
    for (text, expected) in [
        ("10.0.0.1:80", Authority::Ip("10.0.0.1:80".parse().unwrap())),
        ("[fd00::1]:80", Authority::Ip("[fd00::1]:80".parse().unwrap())),
        ("[::ffff:10.0.0.1]:80", Authority::Ip("10.0.0.1:80".parse().unwrap())),
        ("api.shop.svc.cluster.local:80", Authority::Host { host: "api.shop.svc.cluster.local".into(), port: 80 }),
    ] {
        assert_eq!(text.parse(), Ok(expected));
    }
    let long = format!("{}:80", "a".repeat(300));
    for text in [
        "",
        ":",
        ":80",
        "10.0.0.1",
        "host",
        "host:",
        "host:0",
        "host:+80",
        "host:99999",
        "a b:80",
        "[::1]",
        "::1:80",
        "u@h:80",
        "h:8:0",
        &long,
    ] {
        assert!(text.parse::<Authority>().is_err(), "{text}");
    }
}

/// A server that answers each CONNECT as its authority's host says.
struct World {
    ca: FileCa,
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    /// Of the server's certificate.
    serving_serial: Vec<u8>,
    trigger: Option<DrainTrigger>,
    serving: JoinHandle<()>,
    /// The client's.
    cert: Arc<WorkloadCertificate>,
    pool: Pool,
}

fn id(name: &str) -> Identity {
    Identity::new("td", "ns", name).unwrap()
}

async fn echo(request: ConnectRequest) {
    let status = match &request.authority {
        Authority::Host { host, .. } if &**host == "denied" => StatusCode::UNAUTHORIZED,
        Authority::Host { host, .. } if &**host == "down" => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::OK,
    };
    if status != StatusCode::OK {
        return request.reject(status);
    }
    assert_eq!(request.peer.identity(), &id("client"));
    let baggage = Baggage { service: Some("echo".into()), ..Baggage::default() };
    let [cut, dropped, heard] = ["cut", "dropped", "heard"]
        .map(|name| matches!(&request.authority, Authority::Host { host, .. } if &**host == name));
    let Ok(mut stream) = request.accept(Some(&baggage)) else { return };
    if cut {
        let _ = stream.read_u8().await;
        return crate::net::ByteStream::abort(&mut stream);
    }
    if dropped {
        let _ = stream.write_all(&LAST_WORDS).await;
        return;
    }
    if heard {
        let mut all = Vec::new();
        let end = stream.read_to_end(&mut all).await.map_err(|error| error.kind());
        return HEARD.set(Some(end));
    }
    let (mut read, mut write) = tokio::io::split(stream);
    // Ends with the client's direction; the answer to that is the end of ours.
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        let _ = write.shutdown().await;
    }
}

async fn world(server: H2Settings, client: PoolSettings) -> World {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (trigger, watcher) = drain::channel();
    let connections = Arc::new(AtomicUsize::new(0));
    let cert = Arc::new(ca.sign(&id("server")).unwrap());
    let serving_serial = cert.serial_bytes();
    let serving = tokio::spawn(accept_all(listener, cert, server, watcher, connections.clone()));
    let client_cert = Arc::new(ca.sign(&id("client")).unwrap());
    World {
        ca,
        addr,
        connections,
        serving_serial,
        trigger: Some(trigger),
        serving,
        cert: client_cert,
        pool: Pool::new(client),
    }
}

async fn accept_all(
    listener: TcpListener,
    cert: Arc<WorkloadCertificate>,
    settings: H2Settings,
    drain: DrainWatcher,
    connections: Arc<AtomicUsize>,
) {
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            () = drain.draining() => break,
            accepted = listener.accept() => {
                let (stream, peer) = accepted.expect("a loopback listener accepts");
                connections.fetch_add(1, Ordering::Relaxed);
                let (cert, settings, drain) = (cert.clone(), settings.clone(), drain.clone());
                tasks.spawn(async move {
                    if let Ok((stream, peer)) = tls::accept(&cert, stream, peer).await {
                        let _ = serve(stream, peer, settings, drain, echo).await;
                    }
                });
            }
        }
    }
    drop(listener);
    tasks.join_all().await;
}

async fn default_world() -> World {
    world(H2Settings::default(), PoolSettings::default()).await
}

impl World {
    fn key(&self) -> PoolKey {
        PoolKey::new(id("client"), vec![id("server")], self.addr, IpAddr::from([127, 0, 0, 1]))
    }

    async fn connect_to(&self, authority: &str) -> Result<Tunnel, TunnelError> {
        let addr = self.addr;
        let authority = authority.parse().unwrap();
        self.pool
            .connect(self.key(), &self.cert, || TcpStream::connect(addr), &authority, &ConnectHeaders::default())
            .await
    }

    async fn connect(&self) -> Tunnel {
        self.connect_to("10.0.0.1:80").await.expect("the server accepts everything")
    }

    fn dialled(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("done before patience ends")
}

async fn until(mut condition: impl FnMut() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

async fn round_trip(tunnel: &mut Tunnel, text: &[u8]) {
    tunnel.stream.write_all(text).await.unwrap();
    let mut back = vec![0; text.len()];
    within(tunnel.stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(back, text);
}

#[tokio::test]
async fn bytes_come_back_and_half_close_travels_both_ways() {
    let world = default_world().await;
    let mut tunnel = world.connect().await;
    assert_eq!(tunnel.peer.identity(), &id("server"));
    assert_eq!(tunnel.response.baggage.as_ref().unwrap().service.as_deref(), Some("echo"));
    round_trip(&mut tunnel, b"hello").await;
    // Our direction ends; what is under way still arrives, and then the other end's own end.
    tunnel.stream.write_all(b"last words").await.unwrap();
    tunnel.stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    within(tunnel.stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"last words");
}

#[tokio::test]
async fn sixty_four_mebibytes_come_back_unchanged() {
    const SIZE: usize = 64 << 20;
    let world = default_world().await;
    let Tunnel { stream, .. } = world.connect().await;
    let (mut read, mut write) = tokio::io::split(stream);
    let byte = |at: usize| (at.wrapping_mul(2_654_435_761) >> 11) as u8;
    let writing = async {
        let mut at = 0;
        while at < SIZE {
            let piece: Vec<u8> = (at..(at + 100_003).min(SIZE)).map(byte).collect();
            write.write_all(&piece).await.unwrap();
            at += piece.len();
        }
        write.shutdown().await.unwrap();
    };
    let reading = async {
        let (mut at, mut buffer) = (0, vec![0; 1 << 16]);
        loop {
            let n = read.read(&mut buffer).await.unwrap();
            if n == 0 {
                return at;
            }
            assert!(buffer[..n].iter().enumerate().all(|(i, b)| *b == byte(at + i)), "changed near {at}");
            at += n;
        }
    };
    let ((), read) = within(async { tokio::join!(writing, reading) }).await;
    assert_eq!(read, SIZE);
}

#[tokio::test]
async fn a_tunnel_that_is_cut_does_not_look_as_if_it_had_ended() {
    let world = default_world().await;
    let mut cut = within(world.connect_to("cut:80")).await.unwrap().stream;
    cut.write_all(b"x").await.unwrap();
    let mut rest = Vec::new();
    let error = within(cut.read_to_end(&mut rest)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    round_trip(&mut world.connect().await, b"the others go on").await;
}

#[tokio::test]
async fn a_tunnel_that_is_dropped_unfinished_delivers_what_was_said_and_is_reset() {
    let world = default_world().await;
    let mut tunnel = within(world.connect_to("dropped:80")).await.unwrap().stream;
    let mut heard = Vec::new();
    let error = within(tunnel.read_to_end(&mut heard)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    assert!(heard == LAST_WORDS);
    round_trip(&mut world.connect().await, b"the others go on").await;
}

/// A peer counts what looks like a flood over the whole life of a connection.
#[tokio::test]
async fn tunnels_that_are_dropped_unfinished_do_not_add_up() {
    let world = default_world().await;
    for _ in 0..150 {
        let mut theirs = within(world.connect_to("dropped:80")).await.unwrap().stream;
        assert!(within(theirs.read_to_end(&mut Vec::new())).await.is_err());
        let mut ours = world.connect().await.stream;
        ours.write_all(b"to be broken off").await.unwrap();
        drop(ours);
    }
    round_trip(&mut world.connect().await, b"on the same connection").await;
    assert_eq!(world.dialled(), 1);
}

#[tokio::test]
async fn who_ends_a_tunnel_and_drops_it_at_once_has_ended_it() {
    let world = default_world().await;
    let mut tunnel = within(world.connect_to("heard:80")).await.unwrap().stream;
    tunnel.write_all(&LAST_WORDS).await.unwrap();
    tunnel.shutdown().await.unwrap();
    drop(tunnel);
    until(|| HEARD.get().is_some()).await;
    assert_eq!(HEARD.get(), Some(Ok(LAST_WORDS.len())));
}

#[tokio::test]
async fn tunnels_share_a_connection() {
    let world = default_world().await;
    let mut tunnels = Vec::new();
    for _ in 0..20 {
        tunnels.push(world.connect().await);
    }
    for tunnel in &mut tunnels {
        round_trip(tunnel, b"x").await;
    }
    assert_eq!(world.dialled(), 1);
    assert_eq!(world.pool.stats(), PoolStats { connections: 1, streams: 20 });
    drop(tunnels);
    until(|| world.pool.stats().streams == 0).await;
}

#[tokio::test]
async fn first_connects_of_a_key_dial_once() {
    let world = default_world().await;
    let tunnels = within(futures_util::future::join_all((0..32).map(|_| world.connect()))).await;
    assert_eq!(tunnels.len(), 32);
    assert_eq!(world.dialled(), 1);
}

#[tokio::test]
async fn a_full_connection_gets_a_sibling_and_is_used_again() {
    let world = world(H2Settings::default(), PoolSettings { max_streams: 2, ..PoolSettings::default() }).await;
    let mut held = vec![world.connect().await, world.connect().await, world.connect().await];
    assert_eq!(world.dialled(), 2);
    held.remove(0);
    held.push(world.connect().await);
    assert_eq!(world.dialled(), 2);
}

#[tokio::test]
async fn the_peers_stream_limit_is_kept() {
    let world = world(H2Settings { max_streams: 3, ..H2Settings::default() }, PoolSettings::default()).await;
    let mut held = Vec::new();
    // The limit is known once the peer's settings have come, which is no later than its first answer.
    for _ in 0..7 {
        held.push(within(world.connect()).await);
    }
    assert_eq!(world.dialled(), 3);
    for tunnel in &mut held {
        round_trip(tunnel, b"x").await;
    }
}

#[tokio::test]
async fn answers_other_than_200_are_told_by_status() {
    let world = default_world().await;
    for (authority, status, flag) in [
        ("denied:80", StatusCode::UNAUTHORIZED, ResponseFlag::Deny),
        ("down:80", StatusCode::SERVICE_UNAVAILABLE, ResponseFlag::UpstreamRejected),
    ] {
        let error = within(world.connect_to(authority)).await.err().expect("refused");
        assert!(matches!(error, TunnelError::Status(got) if got == status), "{error}");
        assert_eq!(error.flag(), flag);
    }
    round_trip(&mut world.connect().await, b"the connection is none the worse").await;
    assert_eq!(world.dialled(), 1);
}

/// A bare HTTP/2 client with a good identity.
async fn raw_client(world: &World) -> h2::client::SendRequest<Bytes> {
    let cert = world.ca.sign(&id("client")).unwrap();
    let socket = TcpStream::connect(world.addr).await.unwrap();
    let (stream, _) = tls::connect(&cert, &[id("server")], socket, world.addr).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    // Ends with the runtime of the test.
    tokio::spawn(connection);
    send.ready().await.unwrap()
}

#[tokio::test]
async fn what_is_no_connect_to_host_and_port_gets_400() {
    let world = default_world().await;
    let send = raw_client(&world).await;
    let status = async |method: Method, uri: &str| {
        let request = Request::builder().method(method).uri(uri).body(()).unwrap();
        let (response, _) = send.clone().ready().await.unwrap().send_request(request, true).unwrap();
        within(response).await.unwrap().status()
    };
    assert_eq!(status(Method::GET, "https://10.0.0.1:80/").await, StatusCode::BAD_REQUEST);
    assert_eq!(status(Method::POST, "https://10.0.0.1:80/").await, StatusCode::BAD_REQUEST);
    assert_eq!(status(Method::CONNECT, "10.0.0.1").await, StatusCode::BAD_REQUEST);
    assert_eq!(status(Method::CONNECT, "host").await, StatusCode::BAD_REQUEST);
    assert_eq!(status(Method::CONNECT, "host:0").await, StatusCode::BAD_REQUEST);
    assert_eq!(status(Method::CONNECT, "user@host:80").await, StatusCode::BAD_REQUEST);
    assert_eq!(status(Method::CONNECT, "10.0.0.1:80").await, StatusCode::OK);

    let mut extended = Request::builder().method(Method::CONNECT).uri("https://10.0.0.1:80/").body(()).unwrap();
    extended.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    if let Ok((response, _)) = send.clone().ready().await.unwrap().send_request(extended, true) {
        // Refused by us or, since we never offered it, by h2.
        assert!(
            within(response).await.is_ok_and(|r| r.status() == StatusCode::BAD_REQUEST)
                || send.clone().ready().await.is_ok()
        );
    }
}

#[tokio::test]
async fn garbage_inside_tls_ends_only_its_connection() {
    let world = default_world().await;
    let cert = world.ca.sign(&id("client")).unwrap();
    let socket = TcpStream::connect(world.addr).await.unwrap();
    let (mut stream, _) = tls::connect(&cert, &[id("server")], socket, world.addr).await.unwrap();
    stream.write_all(&[0x55; 4096]).await.unwrap();
    stream.flush().await.unwrap();
    let mut rest = Vec::new();
    let _ = within(stream.read_to_end(&mut rest)).await;
    round_trip(&mut world.connect().await, b"still here").await;
}

#[tokio::test]
async fn the_cut_ends_tunnels_that_do_not_finish() {
    let mut world = default_world().await;
    let mut tunnel = world.connect().await;
    round_trip(&mut tunnel, b"x").await;
    let trigger = world.trigger.take().expect("the drain starts once");
    // Nobody holds a guard, so the cut follows at once.
    trigger.drain(Duration::ZERO).await;
    within(&mut world.serving).await.unwrap();
    let mut rest = Vec::new();
    let _ = within(tunnel.stream.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
}

#[tokio::test]
async fn goaway_lets_tunnels_finish() {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let (client, server) = (Arc::new(ca.sign(&id("client")).unwrap()), Arc::new(ca.sign(&id("server")).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (trigger, watcher) = drain::channel();
    let guard = watcher.guard();
    let second_made = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let made = second_made.clone();
    // Two connections: the first drains, the second takes what comes after.
    let serving = tokio::spawn({
        async move {
            let (socket, peer) = listener.accept().await.unwrap();
            let (stream, peer) = tls::accept(&server, socket, peer).await.unwrap();
            let first = tokio::spawn(serve(stream, peer, H2Settings::default(), watcher, echo));
            let (socket, peer) = listener.accept().await.unwrap();
            let (stream, peer) = tls::accept(&server, socket, peer).await.unwrap();
            made.store(true, Ordering::Relaxed);
            let (_trigger, watcher) = drain::channel();
            let second = tokio::spawn(async move {
                let _trigger = _trigger;
                serve(stream, peer, H2Settings::default(), watcher, echo).await
            });
            first.await.unwrap().unwrap();
            drop(guard);
            second.await.unwrap().unwrap();
        }
    });
    let pool = Pool::new(PoolSettings::default());
    let key = PoolKey::new(id("client"), vec![id("server")], addr, addr.ip());
    let authority: Authority = "10.0.0.1:80".parse().unwrap();
    let headers = ConnectHeaders::default();
    let connect = || pool.connect(key.clone(), &client, || TcpStream::connect(addr), &authority, &headers);

    let mut old = connect().await.unwrap();
    round_trip(&mut old, b"before").await;
    let draining = tokio::spawn(trigger.drain(PATIENCE));
    // Until the GOAWAY has arrived, new tunnels may still open on the old connection, or be told to go elsewhere.
    let mut new = within(async {
        loop {
            let tunnel = connect().await.unwrap();
            if second_made.load(Ordering::Relaxed) {
                return tunnel;
            }
            drop(tunnel);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    round_trip(&mut new, b"elsewhere").await;
    round_trip(&mut old, b"and the old one lives").await;
    old.stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    within(old.stream.read_to_end(&mut rest)).await.unwrap();
    drop(old);
    assert_eq!(within(draining).await.unwrap(), drain::Drained::Clean);
    drop(new);
    drop(pool);
    within(serving).await.unwrap();
}

#[tokio::test]
async fn a_tunnel_sent_away_on_a_fresh_connection_opens_on_the_next() {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let (client, server) = (Arc::new(ca.sign(&id("client")).unwrap()), Arc::new(ca.sign(&id("server")).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (_trigger, watcher) = drain::channel();
    // The first connection is the last of a proxy that goes; the second is its successor's.
    let serving = tokio::spawn(async move {
        for n in 0..2 {
            let (socket, peer) = listener.accept().await.unwrap();
            let (stream, peer) = tls::accept(&server, socket, peer).await.unwrap();
            let handler = move |request: ConnectRequest| async move {
                if n == 0 { request.send_away() } else { echo(request).await }
            };
            tokio::spawn(serve(stream, peer, H2Settings::default(), watcher.clone(), handler));
        }
    });
    let pool = Pool::new(PoolSettings::default());
    let key = PoolKey::new(id("client"), vec![id("server")], addr, addr.ip());
    let (authority, headers) = ("10.0.0.1:80".parse().unwrap(), ConnectHeaders::default());
    let connect = pool.connect(key, &client, || TcpStream::connect(addr), &authority, &headers);
    round_trip(&mut within(connect).await.unwrap(), b"by the successor").await;
    within(serving).await.unwrap();
}

/// Answers a CONNECT once it has heard what comes with it; says it back, and whatever follows.
async fn heard_first(request: ConnectRequest, heard: tokio::sync::mpsc::Sender<Vec<u8>>) {
    let stream = request.accept(None).unwrap();
    let (mut read, mut write) = tokio::io::split(stream);
    let mut bytes = vec![0; 5];
    read.read_exact(&mut bytes).await.unwrap();
    heard.send(bytes.clone()).await.unwrap();
    write.write_all(&bytes).await.unwrap();
    let _ = tokio::io::copy(&mut read, &mut write).await;
}

#[tokio::test]
async fn what_a_client_has_to_say_travels_with_its_connect_and_again_where_it_was_not_taken() {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let (client, server) = (Arc::new(ca.sign(&id("client")).unwrap()), Arc::new(ca.sign(&id("server")).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (_trigger, watcher) = drain::channel();
    let (heard, mut hearing) = tokio::sync::mpsc::channel(4);
    let (answer, answering) = tokio::sync::watch::channel(false);
    let serving = tokio::spawn(async move {
        for n in 0..2 {
            let (socket, peer) = listener.accept().await.unwrap();
            let (stream, peer) = tls::accept(&server, socket, peer).await.unwrap();
            let (heard, answering) = (heard.clone(), answering.clone());
            let handler = move |request: ConnectRequest| {
                let (heard, mut answering) = (heard.clone(), answering.clone());
                async move {
                    if n == 0 {
                        return request.send_away();
                    }
                    let _ = answering.wait_for(|may| *may).await;
                    heard_first(request, heard).await;
                }
            };
            tokio::spawn(serve(stream, peer, H2Settings::default(), watcher.clone(), handler));
        }
    });
    let pool = Pool::new(PoolSettings::default());
    let key = PoolKey::new(id("client"), vec![id("server")], addr, addr.ip());
    let (authority, headers) = ("10.0.0.1:80".parse().unwrap(), ConnectHeaders::default());
    let (mut app, mut captured) = tokio::io::duplex(1024);
    app.write_all(b"early").await.unwrap();
    let mut meanwhile = Meanwhile::Say(EarlyBytes::of(&mut captured));
    let dial = || TcpStream::connect(addr);
    let connect = pool.connect_while(key, &client, dial, &authority, &headers, &mut meanwhile);
    let more = async {
        // The answer waits for it; so it is said before there is one.
        app.write_all(b"-and-late").await.unwrap();
        answer.send_replace(true);
    };
    let (tunnel, ()) = within(async { tokio::join!(connect, more) }).await;
    let mut tunnel = tunnel.unwrap();
    let Meanwhile::Say(early) = meanwhile else { panic!("it stays what it was") };
    let sent = early.len();
    assert!(early.broken().is_none());
    assert!((5..=14).contains(&sent), "{sent}");
    assert_eq!(within(hearing.recv()).await.unwrap(), b"early");
    let mut back = vec![0; sent];
    within(tunnel.stream.read_exact(&mut back)).await.unwrap();
    assert_eq!(back, b"early-and-late"[..sent]);
    within(serving).await.unwrap();
}

#[tokio::test]
async fn a_client_that_breaks_off_before_its_tunnel_stands_is_known_to_have() {
    struct Broken;
    impl crate::net::ByteStream for Broken {
        fn poll_chunk(
            &mut self,
            _: &mut std::task::Context<'_>,
            _: usize,
            _: &mut bytes::BytesMut,
        ) -> std::task::Poll<std::io::Result<bytes::Bytes>> {
            std::task::Poll::Ready(Err(std::io::ErrorKind::ConnectionReset.into()))
        }

        fn poll_put(
            &mut self,
            _: &mut std::task::Context<'_>,
            _: &mut crate::net::Chunks,
        ) -> std::task::Poll<std::io::Result<usize>> {
            unreachable!("nothing is written to the client yet")
        }

        fn poll_flush(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<std::io::Result<()>> {
            unreachable!()
        }

        fn poll_end(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<std::io::Result<()>> {
            unreachable!()
        }
    }
    let world = default_world().await;
    let (addr, mut broken) = (world.addr, Broken);
    let mut meanwhile = Meanwhile::Say(EarlyBytes::of(&mut broken));
    let (authority, headers) = ("10.0.0.1:80".parse().unwrap(), ConnectHeaders::default());
    let dial = || TcpStream::connect(addr);
    let connect = world.pool.connect_while(world.key(), &world.cert, dial, &authority, &headers, &mut meanwhile);
    within(connect).await.unwrap();
    let Meanwhile::Say(early) = meanwhile else { panic!("it stays what it was") };
    assert_eq!(early.broken().expect("it broke off").kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn small_windows_do_not_stop_tunnels_for_good() {
    let h2 = H2Settings { stream_window: 65_535, connection_window: 4 * 65_535, ..H2Settings::default() };
    let world = world(h2.clone(), PoolSettings { h2, ..PoolSettings::default() }).await;
    let mut tunnels = Vec::new();
    // Each holds back less than its own window, all together more than the connection's.
    for _ in 0..8 {
        let mut tunnel = world.connect().await;
        round_trip(&mut tunnel, &[1; 40_000]).await;
        tunnels.push(tunnel);
    }
    assert_eq!(world.dialled(), 1);
    // And this is more than one stream's.
    for _ in 0..4 {
        round_trip(&mut tunnels[0], &[2; 40_000]).await;
    }
}

#[tokio::test]
async fn both_ends_know_a_stream_by_the_same_name() {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let (client, server) = (Arc::new(ca.sign(&id("client")).unwrap()), Arc::new(ca.sign(&id("server")).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (_trigger, watcher) = drain::channel();
    let (named, mut names) = tokio::sync::mpsc::channel(4);
    tokio::spawn(async move {
        let (socket, peer) = listener.accept().await.unwrap();
        let (stream, peer) = tls::accept(&server, socket, peer).await.unwrap();
        let handler = move |request: ConnectRequest| {
            let named = named.clone();
            async move {
                named.send(request.stream()).await.unwrap();
                echo(request).await;
            }
        };
        let _ = serve(stream, peer, H2Settings::default(), watcher, handler).await;
    });
    let pool = Pool::new(PoolSettings::default());
    let key = PoolKey::new(id("client"), vec![id("server")], addr, addr.ip());
    let (authority, headers) = ("10.0.0.1:80".parse().unwrap(), ConnectHeaders::default());
    let mut told = Vec::new();
    let mut tunnels = Vec::new();
    for _ in 0..2 {
        let mut announce = |name| told.push(name);
        let mut meanwhile = Meanwhile::Announce(&mut announce);
        let dial = || TcpStream::connect(addr);
        let connect = pool.connect_while(key.clone(), &client, dial, &authority, &headers, &mut meanwhile);
        tunnels.push(within(connect).await.unwrap());
    }
    let seen = [within(names.recv()).await.unwrap(), within(names.recv()).await.unwrap()];
    assert_eq!(told, seen);
    assert!(told[0].session == told[1].session && told[0].stream != told[1].stream && told[0].session != [0; 32]);
}

#[tokio::test]
async fn unused_connections_are_closed() {
    let settings = PoolSettings { unused_release: Duration::from_millis(50), ..PoolSettings::default() };
    let world = world(H2Settings::default(), settings).await;
    let mut tunnel = world.connect().await;
    round_trip(&mut tunnel, b"x").await;
    assert_eq!(world.pool.stats().connections, 1);
    drop(tunnel);
    until(|| world.pool.stats().connections == 0).await;
    world.connect().await;
    assert_eq!(world.dialled(), 2);
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_on_a_new_connection() {
    let mut world = default_world().await;
    let mut old = world.connect().await;
    let later = world.cert.not_after() + Duration::from_secs(60);
    world.cert = Arc::new(world.ca.sign_valid(&id("client"), world.cert.not_before(), later).unwrap());
    let mut new = world.connect().await;
    assert_eq!((world.dialled(), world.pool.stats().connections), (2, 1));
    round_trip(&mut old, b"what is open goes on").await;
    round_trip(&mut new, b"x").await;
    let _another = world.connect().await;
    assert_eq!(world.dialled(), 2);
}

#[tokio::test]
async fn a_connect_given_up_half_way_leaves_nothing_behind() {
    let world = default_world().await;
    let (authority, headers) = ("10.0.0.1:80".parse().unwrap(), ConnectHeaders::default());
    let never = || std::future::pending::<io::Result<TcpStream>>();
    let connecting = world.pool.connect(world.key(), &world.cert, never, &authority, &headers);
    assert!(tokio::time::timeout(Duration::from_millis(10), connecting).await.is_err());
    assert_eq!(world.pool.keys(), 0);
}

#[tokio::test]
async fn a_drained_pool_keeps_tunnels_until_they_end() {
    let world = default_world().await;
    let mut tunnel = world.connect().await;
    let (_trigger, watcher) = drain::channel();
    let pool = world.pool.clone();
    let mut drained = tokio::spawn(async move { pool.drain(&watcher).await });
    round_trip(&mut tunnel, b"x").await;
    assert!(!drained.is_finished());
    drop(tunnel);
    within(&mut drained).await.unwrap();
}

#[tokio::test]
async fn a_client_the_server_refuses_learns_that_it_is_tls() {
    let world = default_world().await;
    let foreign = Arc::new(world.ca.sign(&Identity::new("other", "ns", "client").unwrap()).unwrap());
    let authority = "10.0.0.1:80".parse().unwrap();
    let addr = world.addr;
    let error = within(world.pool.connect(
        world.key(),
        &foreign,
        || TcpStream::connect(addr),
        &authority,
        &ConnectHeaders::default(),
    ))
    .await
    .err()
    .expect("another trust domain");
    assert_eq!(error.flag(), ResponseFlag::TlsFailure, "{error:?}");
}

#[tokio::test]
async fn a_refused_dial_is_a_connect_failure_and_leaves_nothing_behind() {
    let world = default_world().await;
    let cert = Arc::new(world.ca.sign(&id("client")).unwrap());
    let authority = "10.0.0.1:80".parse().unwrap();
    let refuse = || async { Err(io::ErrorKind::ConnectionRefused.into()) };
    let error = within(world.pool.connect(world.key(), &cert, refuse, &authority, &ConnectHeaders::default()))
        .await
        .err()
        .expect("nobody is there");
    assert_eq!(error.flag(), ResponseFlag::Connect);
    assert_eq!(world.pool.stats(), PoolStats::default());
}

#[tokio::test]
async fn double_hbone_nests() {
    let world = default_world().await;
    let outer = world.connect().await;
    // The echo at the far end cannot speak TLS: it sends our own hello back, which is no server's.
    let cert = world.ca.sign(&id("client")).unwrap();
    let settings = PoolSettings::default();
    let authority = "api:80".parse().unwrap();
    let (expected, headers) = ([id("server")], ConnectHeaders::default());
    let inner = connect_once(outer.stream, &cert, &expected, world.addr, &settings, &authority, &headers);
    assert!(matches!(within(inner).await.err(), Some(TunnelError::Tls(_))));

    let (near, far) = tokio::io::duplex(1 << 16);
    let server = world.ca.sign(&id("server")).unwrap();
    let (_trigger, watcher) = drain::channel();
    let addr = world.addr;
    let accepting = tokio::spawn(async move {
        let (stream, peer) = tls::accept(&server, far, addr).await.unwrap();
        serve(stream, peer, H2Settings::default(), watcher, echo).await
    });
    let headers = ConnectHeaders { network: Some("west".into()), ..ConnectHeaders::default() };
    let mut tunnel =
        within(connect_once(near, &cert, &[id("server")], addr, &settings, &authority, &headers)).await.unwrap();
    round_trip(&mut tunnel, b"inner").await;
    drop(tunnel);
    within(accepting).await.unwrap().expect("the only stream ended, and with it the connection");
}

/// A transfer that was cut short must not look like a whole one.
#[tokio::test]
async fn a_connection_that_goes_away_breaks_its_tunnels_and_does_not_end_them() {
    let world = default_world().await;
    let (near, far) = tokio::io::duplex(1 << 16);
    let (server, cert) = (world.ca.sign(&id("server")).unwrap(), world.ca.sign(&id("client")).unwrap());
    let (_trigger, watcher) = drain::channel();
    let addr = world.addr;
    let accepting = tokio::spawn(async move {
        let (stream, peer) = tls::accept(&server, far, addr).await.unwrap();
        serve(stream, peer, H2Settings::default(), watcher, echo).await
    });
    let (settings, headers) = (PoolSettings::default(), ConnectHeaders::default());
    let authority = "api:80".parse().unwrap();
    let mut tunnel =
        within(connect_once(near, &cert, &[id("server")], addr, &settings, &authority, &headers)).await.unwrap();
    round_trip(&mut tunnel, b"before").await;
    accepting.abort();
    let error = within(tunnel.stream.read_u8()).await.expect_err("cut");
    assert!(!crate::net::is_hang_up(error.kind()), "an error and no ordinary end: {error}");
}

#[tokio::test]
async fn a_revoked_peer_loses_its_tunnels_and_its_place_in_the_pool() {
    use crate::identity::{HandshakeRules, KeyExchange, Revocations};
    let mut world = default_world().await;
    let revocations = Revocations::default();
    let rules = HandshakeRules { key_exchange: KeyExchange::default(), revocations: Some(revocations.clone()) };
    world.cert = Arc::new(world.ca.sign(&id("client")).unwrap().with_rules(rules));
    let mut tunnel = world.connect().await;
    round_trip(&mut tunnel, b"before").await;
    assert_eq!((world.pool.stats().connections, world.dialled()), (1, 1));

    revocations.load(world.ca.list_pem(&[world.serving_serial.clone()]).as_bytes()).unwrap();
    assert!(tunnel.peer.is_revoked());
    let error = within(tunnel.stream.read_u8()).await.expect_err("cut");
    assert!(!crate::net::is_hang_up(error.kind()), "an error and no ordinary end: {error}");
    let error = within(world.connect_to("10.0.0.1:80")).await.err().expect("the next handshake is refused");
    assert!(matches!(error, TunnelError::Tls(crate::tls::TlsError::Revoked)), "{error}");
    assert_eq!((error.flag(), world.dialled()), (ResponseFlag::CertRevoked, 2));
    until(|| world.pool.keys() == 0).await;

    revocations.load(b"").unwrap();
    round_trip(&mut world.connect().await, b"after").await;
}
