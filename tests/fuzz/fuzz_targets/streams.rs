//! Bytes on their way, in whatever pieces and with whatever pauses: the copy loop, a tunnel with what its client says
//! before it is answered, reading ahead, and looking at the first bytes. Time stands still, so what waits for ever is
//! found at once.
#![no_main]

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::Reason;
use http::{Method, Request, Response};
use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::hbone::{EarlyBytes, Meanwhile};
use mesh::net::{ByteStream, Chunks, ReadAhead};
use mesh::serve::{CopyError, copy_bidirectional};
use mesh::telemetry::ByteCounts;
use mesh_fuzz::{begin, seed, take};
use tokio::io::{AsyncRead, AsyncReadExt, DuplexStream, ReadBuf};
use tokio::runtime::Runtime;
use waypoint::sniff::sniff;

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    let outcome: Pin<Box<dyn Future<Output = ()>>> = match letter {
        b'c' => Box::pin(copies(content)),
        b't' => Box::pin(tunnels(content)),
        b's' => Box::pin(sniffs(content)),
        b'r' => Box::pin(reads_ahead(content)),
        _ => return Corpus::Reject,
    };
    RUNTIME.with(|runtime| {
        runtime.block_on(async { tokio::time::timeout(FOR_EVER, outcome).await.expect("it ends") });
    });
    Corpus::Keep
});

const FOR_EVER: Duration = Duration::from_secs(3600);

thread_local! {
    static RUNTIME: Runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
}

/// What one side of a connection does next.
#[derive(Clone, Copy)]
enum Step {
    /// This many bytes come, or are taken.
    Move(usize),
    Wait,
    Break(io::ErrorKind),
}

impl Step {
    fn read(byte: u8) -> Self {
        match byte {
            0..=200 => Self::Move(usize::from(byte) + 1),
            201..=225 => Self::Move(usize::from(byte - 200) * 256),
            226..=249 => Self::Wait,
            250..=252 => Self::Break(io::ErrorKind::ConnectionReset),
            253..=255 => Self::Break(io::ErrorKind::Other),
        }
    }
}

/// One side of a connection: says what its script says, and ends; takes what its script takes, and then everything.
#[derive(Default)]
struct Side {
    says: VecDeque<Step>,
    takes: VecDeque<Step>,
    said: usize,
    got: Vec<u8>,
    ended: bool,
    broken: bool,
}

/// The byte that comes at this place.
#[allow(clippy::cast_possible_truncation, reason = "any byte will do")]
fn byte(at: usize) -> u8 {
    (at * 7 + at / 251) as u8
}

impl Side {
    fn new(input: &mut &[u8]) -> Self {
        let mut script = || {
            let length = usize::from(take(input)).min(input.len());
            let (steps, rest) = input.split_at(length);
            *input = rest;
            steps.iter().map(|byte| Step::read(*byte)).collect::<VecDeque<_>>()
        };
        Self { says: script(), takes: script(), ..Self::default() }
    }

    /// Up to `most` bytes of what comes next; none at the end.
    fn say(&mut self, cx: &Context<'_>, most: usize) -> Poll<io::Result<Vec<u8>>> {
        match self.says.pop_front() {
            None => Poll::Ready(Ok(Vec::new())),
            Some(Step::Wait) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Step::Break(kind)) => {
                self.broken = true;
                self.says.clear();
                Poll::Ready(Err(kind.into()))
            }
            Some(Step::Move(count)) => {
                let now = count.min(most.max(1));
                if now < count {
                    self.says.push_front(Step::Move(count - now));
                }
                let bytes = (self.said..self.said + now).map(byte).collect();
                self.said += now;
                Poll::Ready(Ok(bytes))
            }
        }
    }

    /// What has come must be what the other side has said, from the beginning, and all of it where nothing broke.
    fn has_got_from(&self, other: &Side, complete: bool) {
        assert!(self.got.len() <= other.said, "more than was said");
        assert!(self.got.iter().enumerate().all(|(at, got)| *got == byte(at)), "something else");
        if complete {
            assert_eq!((self.got.len(), self.ended), (other.said, true), "not all");
        }
    }
}

impl ByteStream for Side {
    fn poll_chunk(&mut self, cx: &mut Context<'_>, size: usize, _: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        self.say(cx, size).map_ok(Bytes::from)
    }

    fn poll_put(&mut self, cx: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>> {
        assert!(!self.ended && !chunks.is_empty());
        let most = match self.takes.pop_front() {
            None => usize::MAX,
            Some(Step::Move(count)) => count,
            Some(Step::Wait) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Step::Break(kind)) => {
                self.broken = true;
                return Poll::Ready(Err(kind.into()));
            }
        };
        let mut taken = 0;
        while taken < most
            && let Some(chunk) = chunks.take(most - taken)
        {
            taken += chunk.len();
            self.got.extend_from_slice(&chunk);
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        assert!(!std::mem::replace(&mut self.ended, true), "ended twice");
        Poll::Ready(Ok(()))
    }
}

async fn copies(mut input: &[u8]) {
    let (mut client, mut server) = (Side::new(&mut input), Side::new(&mut input));
    let counts = ByteCounts::default();
    let outcome = copy_bidirectional(&mut client, &mut server, &counts).await;
    let whole = !client.broken && !server.broken;
    assert!(outcome.is_ok() || !whole);
    server.has_got_from(&client, whole);
    client.has_got_from(&server, whole);
    assert_eq!((counts.received(), counts.sent()), (server.got.len() as u64, client.got.len() as u64));
    if let Ok(told) = outcome {
        assert_eq!((told.received, told.sent), (counts.received(), counts.sent()));
    }
}

/// A client's connection through a tunnel. Its CONNECT is turned away some times before it is answered; whatever it has
/// said in the meantime arrives once.
async fn tunnels(mut input: &[u8]) {
    let (refusals, pauses, room) = (take(&mut input) % 4, take(&mut input) % 32, usize::from(take(&mut input)));
    let (mut client, mut server) = (Side::new(&mut input), Side::new(&mut input));
    let (near, far) = tokio::io::duplex(1024 + room * 256);
    let serving = tokio::spawn(async move {
        let _ = serve(far, refusals, pauses, &mut server).await;
        server
    });
    let _ = call(near, &mut client).await;
    let server = serving.await.expect("no panic");
    let whole = !client.broken && !server.broken;
    server.has_got_from(&client, whole);
    client.has_got_from(&server, whole);
}

async fn serve(far: DuplexStream, refusals: u8, pauses: u8, side: &mut Side) -> Result<(), h2::Error> {
    // What nobody takes before the answer is bounded by the window here.
    let mut connection = h2::server::Builder::new().data_frame_budget(usize::MAX).handshake(far).await?;
    let mut tunnel = None;
    let mut turned_away = 0;
    while tunnel.is_none() {
        let Some(request) = connection.accept().await else { return Ok(()) };
        let (request, mut respond) = request?;
        for _ in 0..pauses {
            // What follows the CONNECT is read meanwhile.
            let mut driving = pin!(connection.accept());
            let _ = poll_fn(|cx| Poll::Ready(driving.as_mut().poll(cx))).await;
            tokio::task::yield_now().await;
        }
        if turned_away < refusals {
            turned_away += 1;
            respond.send_reset(Reason::REFUSED_STREAM);
            continue;
        }
        let send = mesh::fuzzing::sending(respond.send_response(Response::new(()), false)?);
        tunnel = Some(mesh::fuzzing::pipe(send, request.into_body()));
    }
    let driving = tokio::spawn(async move { while let Some(Ok(_)) = connection.accept().await {} });
    if let Some(tunnel) = tunnel {
        let _: Result<_, CopyError> = copy_bidirectional(tunnel, side, &ByteCounts::default()).await;
    }
    // The client hangs up once it has all.
    let _ = driving.await;
    Ok(())
}

async fn call(near: DuplexStream, side: &mut Side) -> Result<(), h2::Error> {
    // As for the server: what comes in one go is not taken before the rest of it is read.
    let (send, connection) = h2::client::Builder::new().data_frame_budget(usize::MAX).handshake(near).await?;
    let driving = tokio::spawn(connection);
    let mut meanwhile = Meanwhile::Say(EarlyBytes::of(side));
    let (body, response) = loop {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = "10.0.0.1:80".parse().expect("an authority");
        let (mut response, body) = send.clone().ready().await?.send_request(request, false)?;
        let mut body = mesh::fuzzing::sending(body);
        mesh::fuzzing::ask(&mut meanwhile, response.stream_id().as_u32(), &mut body);
        let answer = poll_fn(|cx| {
            let answer = Pin::new(&mut response).poll(cx);
            if answer.is_pending() {
                mesh::fuzzing::while_unanswered(&mut meanwhile, cx, &mut body);
            }
            answer
        });
        match answer.await {
            Ok(response) => break (body, response),
            Err(error) if error.reason() == Some(Reason::REFUSED_STREAM) => {}
            Err(error) => panic!("{error}"),
        }
    };
    let Meanwhile::Say(early) = meanwhile else { unreachable!("it was this") };
    let length = early.len();
    let broken = early.broken().is_some();
    assert!(length <= 65_535 && length == side.said, "{length}");
    if !broken {
        let tunnel = mesh::fuzzing::pipe(body, response.into_body());
        let _: Result<_, CopyError> = copy_bidirectional(side, tunnel, &ByteCounts::default()).await;
    } else {
        drop((body, response));
    }
    drop(send);
    let _ = driving.await;
    Ok(())
}

/// Comes in the pieces of its script.
struct Pieces<'a> {
    steps: VecDeque<Step>,
    rest: &'a [u8],
}

impl<'a> Pieces<'a> {
    fn new(input: &mut &'a [u8]) -> Self {
        let length = usize::from(take(input)).min(input.len());
        let (steps, rest) = input.split_at(length);
        Self { steps: steps.iter().map(|byte| Step::read(*byte)).collect(), rest }
    }
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let most = match self.steps.pop_front() {
            Some(Step::Wait) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Step::Move(count)) => count,
            Some(Step::Break(_)) | None => usize::MAX,
        };
        let (now, rest) = self.rest.split_at(most.min(out.remaining()).min(self.rest.len()));
        out.put_slice(now);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

/// The same bytes are the same protocol however they come, and all of them are there afterwards.
async fn sniffs(mut input: &[u8]) {
    let pieces = Pieces::new(&mut input);
    let (whole, mut all) = (pieces.rest, Vec::new());
    let (verdict, mut stream) = sniff(pieces).await.expect("it reads");
    assert_eq!(verdict, sniff(whole).await.expect("it reads").0);
    stream.read_to_end(&mut all).await.expect("it reads");
    assert_eq!(all, whole);
}

async fn reads_ahead(mut input: &[u8]) {
    let piece = usize::from(take(&mut input)) + 1;
    let pieces = Pieces::new(&mut input);
    let (whole, mut all, mut buffer) = (pieces.rest, Vec::new(), vec![0; piece * 32]);
    let mut stream = ReadAhead::new(pieces);
    loop {
        match stream.read(&mut buffer).await.expect("it reads") {
            0 => break,
            count => all.extend_from_slice(&buffer[..count]),
        }
    }
    assert_eq!(all, whole);
}

fn seeds() -> Vec<Vec<u8>> {
    let side = |says: &[u8], takes: &[u8]| {
        let length = |script: &[u8]| u8::try_from(script.len()).expect("it is short");
        [&[length(says)], says, &[length(takes)], takes].concat()
    };
    let sides = [
        [side(&[10, 230, 225, 225, 99], &[0, 240, 7]), side(&[225; 40], &[230, 3])],
        [side(&[225, 250], &[]), side(&[5], &[10, 251])],
        [side(&[225; 200], &[]), side(&[], &[0, 1, 2, 240, 203])],
        [side(&[1, 253], &[]), side(&[226; 30], &[254])],
    ];
    let mut seeds = vec![
        seed(b's', b"\x00PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        seed(b's', b"\x03\x00\xe6\x01GET /x HTTP/1.1\r\n\r\n"),
        seed(b's', b"\x02\x04\x05\x16\x03\x01\x02\x00\x01\x00"),
        seed(b'r', [&[3, 2, 230, 9][..], &[7; 300]].concat()),
    ];
    for (number, sides) in (0_u8..).zip(sides) {
        let sides = sides.concat();
        seeds.push(seed(b'c', &sides));
        seeds.push(seed(b't', [&[number, number * 9, number * 60], &sides[..]].concat()));
    }
    seeds
}
