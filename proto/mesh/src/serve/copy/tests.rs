use std::time::Duration;

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(addr), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("done before patience ends")
}

#[tokio::test]
async fn both_directions_are_copied_and_counted_and_end_separately() {
    let (mut client, downstream) = pair().await;
    let (upstream, mut server) = pair().await;
    let counts = ByteCounts::default();
    let talk = async {
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        assert_eq!(question, "question");
        // The other direction is still open.
        server.write_all(b"a longer answer").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "a longer answer");
    };
    let (outcome, ()) = within(async { tokio::join!(copy_bidirectional(downstream, upstream, &counts), talk) }).await;
    assert_eq!(outcome.unwrap(), Transferred { received: 8, sent: 15 });
    assert_eq!((counts.received(), counts.sent()), (8, 15));
}

#[tokio::test]
async fn large_transfers_arrive_unchanged_in_both_directions() {
    const SIZE: usize = 24 << 20;
    let (client, downstream) = pair().await;
    let (upstream, server) = pair().await;
    let counts = ByteCounts::default();
    let exchange = async |stream: TcpStream, seed: usize| {
        let (mut read, mut write) = stream.into_split();
        let byte = |seed: usize, at: usize| (at.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 9) as u8;
        let sent: Vec<u8> = (0..SIZE).map(|at| byte(seed, at)).collect();
        let writing = async {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let reading = read.read_to_end(&mut got);
        let ((), read) = tokio::join!(writing, reading);
        assert_eq!(read.unwrap(), SIZE);
        assert!(got.iter().enumerate().all(|(at, b)| *b == byte(1 - seed, at)));
    };
    let (outcome, (), ()) = within(async {
        tokio::join!(copy_bidirectional(downstream, upstream, &counts), exchange(client, 0), exchange(server, 1))
    })
    .await;
    assert_eq!(outcome.unwrap(), Transferred { received: SIZE as u64, sent: SIZE as u64 });
}

#[tokio::test]
async fn what_follows_urgent_data_is_carried_on() {
    const BULK: usize = 2 << 20;
    let (mut client, downstream) = pair().await;
    let (upstream, mut server) = pair().await;
    let counts = ByteCounts::default();
    let talk = async {
        let reading = async {
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            got
        };
        let writing = async {
            client.write_all(&vec![b'a'; BULK]).await.unwrap();
            client.writable().await.unwrap();
            socket2::SockRef::from(&client).send_out_of_band(b"!").unwrap();
            client.write_all(&vec![b'b'; BULK]).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let (got, ()) = tokio::join!(reading, writing);
        assert_eq!(got.len(), 2 * BULK);
        assert!(got[..BULK].iter().all(|b| *b == b'a') && got[BULK..].iter().all(|b| *b == b'b'));
        drop(server);
    };
    let (outcome, ()) = within(async { tokio::join!(copy_bidirectional(downstream, upstream, &counts), talk) }).await;
    assert_eq!(outcome.unwrap().received, 2 * BULK as u64);
}

#[tokio::test]
async fn a_reset_ends_the_copy_is_passed_on_and_is_no_error() {
    let (client, downstream) = pair().await;
    let (upstream, mut server) = pair().await;
    let counts = ByteCounts::default();
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let outcome = within(copy_bidirectional(downstream, upstream, &counts)).await;
    assert_eq!(outcome.unwrap(), Transferred::default());
    let mut rest = Vec::new();
    let error = within(server.read_to_end(&mut rest)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// A source that breaks right behind what it says.
struct Breaking(Option<&'static [u8]>);

impl ByteStream for Breaking {
    fn poll_chunk(&mut self, _: &mut Context<'_>, _: usize, _: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        let said = self.0.take().map(Bytes::from_static);
        Poll::Ready(said.ok_or_else(|| io::ErrorKind::ConnectionReset.into()))
    }
    fn poll_put(&mut self, _: &mut Context<'_>, chunks: &mut Chunks) -> Poll<io::Result<usize>> {
        let len = chunks.len();
        *chunks = Chunks::default();
        Poll::Ready(Ok(len))
    }
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn last_words_before_a_reset_arrive_and_then_the_reset() {
    let (mut client, downstream) = pair().await;
    let counts = ByteCounts::default();
    let outcome = within(copy_bidirectional(downstream, Breaking(Some(b"sorry")), &counts)).await;
    assert_eq!(outcome.unwrap(), Transferred { received: 0, sent: 5 });
    let mut heard = [0; 5];
    within(client.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"sorry");
    let error = within(client.read(&mut heard)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// Takes nothing and says nothing: for now, or because it was reset, of which its writer alone is told.
#[derive(Default)]
struct Taking {
    reset: bool,
    told: bool,
    passed_on: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl ByteStream for Taking {
    fn poll_chunk(&mut self, _: &mut Context<'_>, _: usize, _: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        if self.told { Poll::Ready(Ok(Bytes::new())) } else { Poll::Pending }
    }
    fn poll_put(&mut self, _: &mut Context<'_>, _: &mut Chunks) -> Poll<io::Result<usize>> {
        self.told = self.reset;
        if self.reset { Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())) } else { Poll::Pending }
    }
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
    fn pass_reset_on(&mut self) {
        self.passed_on.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_reset_that_the_writing_side_hears_first_is_no_end_for_the_reading_one() {
    let (mut client, downstream) = pair().await;
    client.write_all(b"question").await.unwrap();
    downstream.readable().await.unwrap();
    let server = Taking { reset: true, ..Taking::default() };
    let outcome = within(copy_bidirectional(downstream, server, &ByteCounts::default())).await;
    assert_eq!(outcome.unwrap(), Transferred::default());
    let error = within(client.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(start_paused = true)]
async fn last_words_that_nobody_takes_are_not_waited_for_for_ever_and_the_reset_is_passed_on() {
    let (sink, began) = (Taking::default(), tokio::time::Instant::now());
    let passed_on = sink.passed_on.clone();
    let outcome = copy_bidirectional(sink, Breaking(Some(b"sorry")), &ByteCounts::default()).await;
    assert_eq!(outcome.unwrap(), Transferred::default());
    assert!(began.elapsed() >= FAREWELL && began.elapsed() < 2 * FAREWELL);
    assert!(passed_on.load(std::sync::atomic::Ordering::Relaxed));
}

/// Has something to say once, and is told when that waits.
struct Gathering {
    said: Option<&'static [u8]>,
    gathered: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl ByteStream for Gathering {
    fn poll_chunk(&mut self, _: &mut Context<'_>, _: usize, _: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        self.said.take().map_or(Poll::Pending, |said| Poll::Ready(Ok(Bytes::from_static(said))))
    }
    fn poll_put(&mut self, _: &mut Context<'_>, _: &mut Chunks) -> Poll<io::Result<usize>> {
        Poll::Pending
    }
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
    fn gather(&mut self, _: &mut Context<'_>) {
        self.gathered.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_whose_words_nobody_takes_gathers_what_comes() {
    let gathered = std::sync::Arc::<std::sync::atomic::AtomicBool>::default();
    let source = Gathering { said: Some(b"question"), gathered: gathered.clone() };
    let counts = ByteCounts::default();
    let copying = copy_bidirectional(source, Taking::default(), &counts);
    assert!(tokio::time::timeout(Duration::from_secs(1), copying).await.is_err(), "nobody takes it");
    assert!(gathered.load(std::sync::atomic::Ordering::Relaxed));
}

/// A server that has answered and hung up without reading the question.
struct Refusing {
    answer: std::collections::VecDeque<Bytes>,
}

impl ByteStream for Refusing {
    fn poll_chunk(&mut self, _: &mut Context<'_>, _: usize, _: &mut BytesMut) -> Poll<io::Result<Bytes>> {
        Poll::Ready(Ok(self.answer.pop_front().unwrap_or_default()))
    }
    fn poll_put(&mut self, _: &mut Context<'_>, _: &mut Chunks) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }
    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }
    fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }
}

#[tokio::test]
async fn an_answer_given_before_hanging_up_is_delivered() {
    let (mut client, downstream) = pair().await;
    client.write_all(b"a long question").await.unwrap();
    let answer = "413 too long ".repeat(20_000);
    let chunks = answer.as_bytes().chunks(1000).map(Bytes::copy_from_slice).collect();
    let counts = ByteCounts::default();
    let read = async {
        let mut got = String::new();
        client.read_to_string(&mut got).await.unwrap();
        got
    };
    let copying = copy_bidirectional(downstream, Refusing { answer: chunks }, &counts);
    let (outcome, got) = within(async { tokio::join!(copying, read) }).await;
    assert_eq!(outcome.unwrap(), Transferred { received: 0, sent: answer.len() as u64 });
    assert!(got == answer);
}

#[tokio::test(start_paused = true)]
async fn a_side_that_hung_up_is_not_waited_for_for_ever() {
    let (mut client, downstream) = tokio::io::duplex(64);
    let counts = ByteCounts::default();
    client.write_all(b"question").await.unwrap();
    // More than fits, and nobody reads it.
    let answer = std::iter::repeat_n(Bytes::from_static(&[1; 64]), 64).collect();
    let start = tokio::time::Instant::now();
    copy_bidirectional(downstream, Refusing { answer }, &counts).await.unwrap();
    assert_eq!(start.elapsed(), FAREWELL);
}

#[tokio::test]
async fn a_reader_that_stops_stops_the_writer() {
    let (mut client, downstream) = pair().await;
    let (upstream, mut server) = pair().await;
    let counts = ByteCounts::default();
    let mut copying = Box::pin(copy_bidirectional(downstream, upstream, &counts));
    let chunk = vec![7; 1 << 16];
    let mut written = 0_u64;
    // Nobody reads at the far end: sockets fill up, and then the copy must hold no more than its room.
    let stuck = async {
        while let Ok(wrote) = tokio::time::timeout(Duration::from_millis(300), client.write_all(&chunk)).await {
            wrote.unwrap();
            written += chunk.len() as u64;
            assert!(written < 256 << 20, "somebody swallows everything");
        }
    };
    tokio::select! {
        _ = &mut copying => panic!("the copy ended"),
        () = stuck => {}
    }
    drop(client);
    let drained = async {
        let mut sink = vec![0; 1 << 16];
        while server.read(&mut sink).await.unwrap() > 0 {}
        drop(server);
    };
    let (outcome, ()) = within(async { tokio::join!(copying, drained) }).await;
    assert!(outcome.unwrap().received >= written);
}

/// Application, copy, tunnel, copy, application: the whole data path of two node proxies.
struct Path {
    client: TcpStream,
    server: TcpStream,
    client_side: tokio::task::JoinHandle<Transferred>,
    server_side: tokio::task::JoinHandle<Transferred>,
    _pool: crate::hbone::Pool,
    _trigger: crate::drain::DrainTrigger,
}

async fn path() -> Path {
    use crate::{
        clock::Clock,
        hbone::{self, ConnectHeaders, H2Settings, Pool, PoolKey, PoolSettings},
        identity::{FileCa, Identity},
        tls,
    };
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let [source, destination] = ["client", "server"].map(|name| Identity::new("td", "ns", name).unwrap());
    let client_cert = std::sync::Arc::new(ca.sign(&source).unwrap());
    let server_cert = ca.sign(&destination).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (client, downstream) = pair().await;
    let (upstream, server) = pair().await;
    let (trigger, watcher) = crate::drain::channel();
    let (done, served) = tokio::sync::oneshot::channel();
    let slot = std::sync::Mutex::new(Some((upstream, done)));
    tokio::spawn(async move {
        let (socket, peer) = listener.accept().await.unwrap();
        let (stream, peer) = tls::accept(&server_cert, socket, peer).await.unwrap();
        hbone::serve(stream, peer, H2Settings::default(), watcher, |request| {
            let (upstream, done) = slot.lock().unwrap().take().expect("one tunnel is opened");
            async move {
                let tunnel = request.accept(None).unwrap();
                let copied = copy_bidirectional(tunnel, upstream, &ByteCounts::default()).await;
                let _ = done.send(copied.unwrap());
            }
        })
        .await
    });
    let pool = Pool::new(PoolSettings::default());
    let key = PoolKey::new(source, vec![destination], addr, addr.ip());
    let authority = "10.0.0.1:80".parse().unwrap();
    let tunnel = pool
        .connect(key, &client_cert, || TcpStream::connect(addr), &authority, &ConnectHeaders::default())
        .await
        .unwrap();
    let client_side =
        tokio::spawn(
            async move { copy_bidirectional(downstream, tunnel.stream, &ByteCounts::default()).await.unwrap() },
        );
    let server_side = tokio::spawn(async move { served.await.expect("the handler says how it ended") });
    Path { client, server, client_side, server_side, _pool: pool, _trigger: trigger }
}

#[tokio::test]
async fn applications_talk_through_a_tunnel_and_end_one_direction_at_a_time() {
    const SIZE: usize = 16 << 20;
    let mut path = within(path()).await;
    let byte = |at: usize| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
    let asking = async {
        let sent: Vec<u8> = (0..SIZE).map(byte).collect();
        path.client.write_all(&sent).await.unwrap();
        path.client.shutdown().await.unwrap();
        let mut answer = String::new();
        path.client.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answering = async {
        let mut got = Vec::new();
        path.server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), SIZE);
        assert!(got.iter().enumerate().all(|(at, b)| *b == byte(at)));
        path.server.write_all(b"all there").await.unwrap();
        path.server.shutdown().await.unwrap();
    };
    let (answer, ()) = within(async { tokio::join!(asking, answering) }).await;
    assert_eq!(answer, "all there");
    let wanted = Transferred { received: SIZE as u64, sent: 9 };
    assert_eq!(within(path.client_side).await.unwrap(), wanted);
    assert_eq!(within(path.server_side).await.unwrap(), wanted);
}

#[tokio::test]
async fn an_application_that_vanishes_ends_the_other_through_the_tunnel() {
    // The pool must outlive the tunnel, so the rest is bound as well.
    let Path { mut client, mut server, client_side, server_side, _pool, _trigger } = within(path()).await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(within(server.read_u8()).await.unwrap(), b'x');
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let mut rest = Vec::new();
    let _ = within(server.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
    drop(server);
    within(client_side).await.unwrap();
    within(server_side).await.unwrap();
}

/// A hundred thousand of these may be alive at once.
#[test]
fn the_copy_is_small() {
    fn size<A, B, F>(_: impl FnOnce(A, B) -> F) -> usize {
        size_of::<F>()
    }
    let counts = &ByteCounts::default();
    let bytes = size(|a: TcpStream, b: crate::hbone::HboneStream| copy_bidirectional(a, b, counts));
    assert!(bytes <= 672, "{bytes} bytes");
}
