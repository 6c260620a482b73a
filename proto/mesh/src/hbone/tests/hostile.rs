//! Clients that keep to HTTP/2 and mean no good, frame by frame.

use std::{
    io,
    pin::Pin,
    sync::atomic::AtomicBool,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::mpsc,
};

use super::*;
use crate::net::ByteStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A CONNECT, in HPACK without compression.
fn connect(stream: u32, authority: &str) -> Vec<u8> {
    let mut block = vec![0x02, 7];
    block.extend(b"CONNECT");
    block.extend([0x01, u8::try_from(authority.len()).unwrap()]);
    block.extend(authority.as_bytes());
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// The code of the GOAWAY among these frames.
fn goaway(mut bytes: &[u8]) -> Option<u32> {
    while let [a, b, c, kind, _, _, _, _, _, rest @ ..] = bytes {
        let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        if *kind == GOAWAY {
            return Some(u32::from_be_bytes(rest[4..8].try_into().unwrap()));
        }
        bytes = rest.get(length..)?;
    }
    None
}

/// A server whose handler is `handler`, and a client that may write to it whatever it wants.
async fn between<F: Future<Output = ()> + Send + 'static>(
    handler: impl Fn(ConnectRequest) -> F + Send + 'static,
) -> (tls::TlsStream<DuplexStream>, JoinHandle<Result<(), ServeError>>) {
    between_over(|far| far, handler).await
}

/// The same, whose server has `transport` of its end.
async fn between_over<S: AsyncRead + AsyncWrite + Unpin + Send + 'static, F: Future<Output = ()> + Send + 'static>(
    transport: impl FnOnce(DuplexStream) -> S,
    handler: impl Fn(ConnectRequest) -> F + Send + 'static,
) -> (tls::TlsStream<DuplexStream>, JoinHandle<Result<(), ServeError>>) {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let (near, far) = tokio::io::duplex(1 << 16);
    let far = transport(far);
    let (client, server) = (ca.sign(&id("client")).unwrap(), ca.sign(&id("server")).unwrap());
    let addr = "10.0.0.9:15008".parse().unwrap();
    let serving = tokio::spawn(async move {
        let (_trigger, watcher) = drain::channel();
        let (stream, peer) = tls::accept(&server, far, addr).await.unwrap();
        serve(stream, peer, H2Settings::default(), watcher, handler).await
    });
    let (mut stream, _) = tls::connect(&client, &[id("server")], near, addr).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    (stream, serving)
}

#[tokio::test]
async fn a_flood_of_frames_that_move_nothing_is_cut_and_told_why() {
    let (stream, serving) = between(echo).await;
    let (mut read, mut write) = tokio::io::split(stream);
    let flooding = tokio::spawn(async move {
        let pings = frame(PING, 0, 0, &[7; 8]).repeat(100);
        for _ in 0..1000 {
            if write.write_all(&pings).await.is_err() {
                break;
            }
        }
        // Until the other side has hung up.
        write
    });
    let mut heard = Vec::new();
    let _ = within(read.read_to_end(&mut heard)).await;
    assert_eq!(goaway(&heard), Some(ENHANCE_YOUR_CALM));
    let error = within(serving).await.unwrap().expect_err("cut");
    assert!(matches!(error, ServeError::Flood), "{error}");
    assert_eq!(error.flag(), ResponseFlag::Overload);
    drop(within(flooding).await.unwrap());
}

#[tokio::test]
async fn streams_that_are_given_up_unanswered_exhaust_the_allowance_and_answered_ones_do_not() {
    // One after the other, so that h2's own limit on what was never accepted has no part in it.
    let (answers, mut answered) = mpsc::channel(1);
    let handler = move |request: ConnectRequest| {
        let answers = answers.clone();
        async move {
            let mut request = request;
            let refused = matches!(&request.authority, Authority::Host { host, .. } if &**host == "no");
            if refused {
                request.reject(StatusCode::UNAUTHORIZED);
            } else {
                request.given_up().await;
            }
            let _ = answers.send(()).await;
        }
    };
    let (stream, mut serving) = between(handler).await;
    let (mut read, mut write) = tokio::io::split(stream);
    let hearing = tokio::spawn(async move {
        let mut heard = Vec::new();
        let _ = read.read_to_end(&mut heard).await;
        heard
    });
    let mut next = 1;
    let mut streams = move || {
        next += 2;
        (next, frame(RST_STREAM, 0, next, &8u32.to_be_bytes()))
    };
    // Refused, and reset by a client that wants nothing else of the stream: an answer earns more than that costs.
    for _ in 0..12_000 {
        let (stream, reset) = streams();
        write.write_all(&connect(stream, "no:80")).await.unwrap();
        within(answered.recv()).await.unwrap();
        write.write_all(&reset).await.unwrap();
    }
    let mut given_up = 0;
    loop {
        let (stream, reset) = streams();
        if write.write_all(&[connect(stream, "maybe:80"), reset].concat()).await.is_err() {
            break;
        }
        tokio::select! {
            _ = answered.recv() => given_up += 1,
            error = &mut serving => {
                assert!(matches!(error.unwrap(), Err(ServeError::Flood)));
                break;
            }
            () = tokio::time::sleep(PATIENCE) => panic!("neither given up nor cut"),
        }
        assert!(given_up < 30_000, "nobody stops it");
    }
    assert_eq!(goaway(&within(hearing).await.unwrap()), Some(ENHANCE_YOUR_CALM));
}

#[tokio::test]
async fn who_hangs_up_before_hearing_why_it_was_cut_is_blamed_all_the_same() {
    const WINDOW_UPDATE: u8 = 8;
    let (mut stream, serving) = between(echo).await;
    // Until the server has nothing more to say.
    await_frame(&mut stream, &frame(SETTINGS, ACK, 0, &[])).await;
    stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &0u32.to_be_bytes())).await.unwrap();
    drop(stream);
    let error = within(serving).await.unwrap().expect_err("broken");
    assert!(matches!(error, ServeError::GivenUp(h2::Reason::PROTOCOL_ERROR)), "{error}");
    assert_eq!(error.flag(), ResponseFlag::BadRequest);
}

/// Reads until there is such a frame.
async fn await_frame(stream: &mut (impl AsyncRead + Unpin), frame: &[u8]) {
    let mut heard = Vec::new();
    while !heard.windows(frame.len()).any(|bytes| bytes == frame) {
        assert!(within(stream.read_buf(&mut heard)).await.unwrap() > 0, "{:?}", goaway(&heard));
    }
}

#[tokio::test]
async fn small_frames_for_a_reader_that_stalls_wait_and_cost_nobody_the_connection() {
    // More than the budget of h2 for what was not taken, many times over.
    const FRAMES: usize = 150_000;
    // Large ones among them, as the order counts.
    let payload = |number: usize| vec![number.to_le_bytes()[0]; if number.is_multiple_of(1000) { 2000 } else { 1 }];
    let expected = (0..FRAMES).flat_map(payload).collect::<Vec<_>>();
    let length = expected.len();
    let (told, mut taken) = mpsc::channel(1);
    let on = Arc::new(tokio::sync::Notify::new());
    let handler = {
        let on = on.clone();
        move |request: ConnectRequest| {
            let (told, on) = (told.clone(), on.clone());
            async move {
                let mut stream = request.accept(None).unwrap();
                let mut stalls = std::pin::pin!(on.notified());
                // As who copies does while nobody takes anything.
                std::future::poll_fn(|cx| {
                    stream.gather(cx);
                    stalls.as_mut().poll(cx)
                })
                .await;
                let mut bytes = vec![0; length];
                let end = stream.read_exact(&mut bytes).await.map(|_| bytes);
                told.send(end).await.unwrap();
            }
        }
    };
    let (mut stream, serving) = between(handler).await;
    // Its windows count from then on.
    await_frame(&mut stream, &frame(SETTINGS, ACK, 0, &[])).await;
    stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await.unwrap();
    let (mut read, mut write) = tokio::io::split(stream);
    let writing = tokio::spawn(async move {
        write.write_all(&connect(1, "stalls:80")).await.unwrap();
        for first in (0..FRAMES).step_by(1000) {
            let frames = (first..first + 1000).map(|number| frame(DATA, 0, 1, &payload(number)));
            write.write_all(&frames.collect::<Vec<_>>().concat()).await.unwrap();
        }
        write.write_all(&frame(PING, 0, 0, b"all seen")).await.unwrap();
        write.flush().await.unwrap();
        write
    });
    await_frame(&mut read, &frame(PING, ACK, 0, b"all seen")).await;
    let _writer = within(writing).await.unwrap();
    on.notify_one();
    let taken = within(taken.recv()).await.unwrap().unwrap();
    assert!(taken == expected, "something else");
    assert!(!serving.is_finished());
}

/// A transport whose peer is gone once that is said: writing fails, and reading has not noticed.
struct Unheard {
    inner: DuplexStream,
    gone: Arc<AtomicBool>,
}

impl AsyncRead for Unheard {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.gone.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Unheard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.gone.load(Ordering::Relaxed) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn streams_end_with_a_connection_that_broke_while_it_was_written_to() {
    let gone = Arc::new(AtomicBool::new(false));
    let (stands, mut standing) = mpsc::channel(2);
    let (told, mut ends) = mpsc::channel(1);
    let talk = Arc::new(tokio::sync::Notify::new());
    let transport = {
        let gone = gone.clone();
        move |inner| Unheard { inner, gone }
    };
    let handler = {
        let talk = talk.clone();
        move |request: ConnectRequest| {
            let (stands, told, talk) = (stands.clone(), told.clone(), talk.clone());
            async move {
                let talks = matches!(&request.authority, Authority::Host { host, .. } if &**host == "talks");
                let mut stream = request.accept(None).unwrap();
                stands.send(()).await.unwrap();
                if talks {
                    talk.notified().await;
                    let _ = stream.write_all(&LAST_WORDS).await;
                } else {
                    told.send(stream.read_u8().await.map_err(|error| error.kind())).await.unwrap();
                }
            }
        }
    };
    let (mut stream, serving) = between_over(transport, handler).await;
    stream.write_all(&[connect(1, "listens:80"), connect(3, "talks:80")].concat()).await.unwrap();
    for _ in 0..2 {
        within(standing.recv()).await.unwrap();
    }
    gone.store(true, Ordering::Relaxed);
    talk.notify_one();
    within(serving).await.unwrap().expect("the peer is gone, and broke no rule");
    assert!(within(ends.recv()).await.unwrap().is_err(), "an end that nobody has said");
}

/// A server that hears of every reset late: what it says on a stream arrives when a hundred more have been reset.
async fn late_server(listener: TcpListener, cert: WorkloadCertificate) {
    const BEHIND: usize = 100;
    let (stream, peer) = listener.accept().await.unwrap();
    let (mut stream, _) = tls::accept(&cert, stream, peer).await.unwrap();
    stream.read_exact(&mut [0; PREFACE.len()]).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    let mut reset = std::collections::VecDeque::new();
    loop {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).await.is_err() {
            return;
        }
        let [a, b, c, kind, flags, id @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        let id = u32::from_be_bytes(id);
        let answer = match kind {
            SETTINGS | PING if flags & ACK == 0 => frame(kind, ACK, 0, if kind == PING { &payload } else { &[] }),
            // `:status: 200`, the eighth of HPACK's static table.
            HEADERS => frame(HEADERS, END_HEADERS, id, &[0x88]),
            RST_STREAM => {
                reset.push_back(id);
                if reset.len() <= BEHIND {
                    continue;
                }
                frame(DATA, 0, reset.pop_front().unwrap(), b"late")
            }
            _ => continue,
        };
        stream.write_all(&answer).await.unwrap();
    }
}

/// h2 counts them over a connection's life, and by default takes the 1,024th for an attack.
#[tokio::test]
async fn what_comes_too_late_for_its_streams_does_not_end_a_clients_connection() {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let serving = tokio::spawn(late_server(listener, ca.sign(&id("server")).unwrap()));
    let cert = Arc::new(ca.sign(&id("client")).unwrap());
    let pool = Pool::new(PoolSettings::default());
    let key = PoolKey::new(id("client"), vec![id("server")], addr, IpAddr::from([127, 0, 0, 1]));
    let authority = "10.0.0.1:80".parse().unwrap();
    let dials = AtomicUsize::new(0);
    for at in 0..1_400 {
        let dial = || {
            dials.fetch_add(1, Ordering::Relaxed);
            TcpStream::connect(addr)
        };
        let tunnel = within(pool.connect(key.clone(), &cert, dial, &authority, &ConnectHeaders::default())).await;
        drop(tunnel.unwrap_or_else(|error| panic!("tunnel {at}: {error}")));
        assert_eq!(dials.load(Ordering::Relaxed), 1, "tunnel {at} has a connection of its own");
        until(|| pool.stats().streams == 0).await;
    }
    drop(pool);
    within(serving).await.unwrap();
}
