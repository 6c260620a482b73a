use std::time::Duration;

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
async fn a_reset_ends_the_copy_and_is_no_error() {
    let (client, downstream) = pair().await;
    let (upstream, mut server) = pair().await;
    let counts = ByteCounts::default();
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let outcome = within(copy_bidirectional(downstream, upstream, &counts)).await;
    assert_eq!(outcome.unwrap(), Transferred::default());
    let mut rest = Vec::new();
    within(server.read_to_end(&mut rest)).await.unwrap();
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
