//! What becomes of tunnels whose peer cannot be reached, or has vanished.

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::*;

#[tokio::test(start_paused = true)]
async fn who_waits_for_somebody_elses_dial_fails_with_it() {
    let world = default_world().await;
    let dialled = AtomicUsize::new(0);
    let authority: Authority = "10.0.0.1:80".parse().unwrap();
    let started = Instant::now();
    let attempt = async |after: u64| {
        sleep(Duration::from_secs(after)).await;
        let dial = || {
            dialled.fetch_add(1, Ordering::Relaxed);
            std::future::pending::<io::Result<TcpStream>>()
        };
        let tunnel = world.pool.connect(world.key(), &world.cert, dial, &authority, &ConnectHeaders::default()).await;
        (tunnel.err().expect("nobody answers").flag(), started.elapsed().as_secs())
    };
    let timed_out = |seconds| (ResponseFlag::NetworkPolicy, seconds);
    let together = tokio::join!(attempt(0), attempt(1), attempt(9));
    assert_eq!(together, (timed_out(10), timed_out(10), timed_out(10)));
    assert_eq!(dialled.load(Ordering::Relaxed), 1);
    assert_eq!(attempt(1).await, timed_out(21), "who comes later tries anew");
    assert_eq!(dialled.load(Ordering::Relaxed), 2);
    assert_eq!(world.pool.keys(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_failure_with_an_older_certificate_is_not_shared() {
    let world = default_world().await;
    let later = world.cert.not_after() + Duration::from_secs(60);
    let newer = Arc::new(world.ca.sign_valid(&id("client"), world.cert.not_before(), later).unwrap());
    let authority: Authority = "10.0.0.1:80".parse().unwrap();
    let attempt = async |cert: &Arc<WorkloadCertificate>, why: io::ErrorKind| {
        let dial = || async move {
            sleep(Duration::from_secs(1)).await;
            Err(why.into())
        };
        world
            .pool
            .connect(world.key(), cert, dial, &authority, &ConnectHeaders::default())
            .await
            .err()
            .expect("refused")
            .to_string()
    };
    let (old, new) = tokio::join!(
        attempt(&world.cert, io::ErrorKind::ConnectionRefused),
        attempt(&newer, io::ErrorKind::HostUnreachable)
    );
    assert!(old.contains("refused") && new.contains("unreachable"), "{old}; {new}");
}

#[tokio::test]
async fn who_waits_dials_when_the_other_gives_up() {
    let world = default_world().await;
    let authority: Authority = "10.0.0.1:80".parse().unwrap();
    let headers = ConnectHeaders::default();
    let never = || std::future::pending::<io::Result<TcpStream>>();
    let first = Box::pin(world.pool.connect(world.key(), &world.cert, never, &authority, &headers));
    let second = world.connect();
    // The first to be polled dials.
    let given_up = async {
        assert!(timeout(Duration::from_millis(10), first).await.is_err());
    };
    let ((), mut tunnel) = within(async { tokio::join!(given_up, second) }).await;
    round_trip(&mut tunnel, b"x").await;
}

/// A server of one connection that, once told, is there no longer: it neither reads nor writes nor hangs up.
async fn vanishing(told: Arc<Notify>) -> (SocketAddr, Arc<WorkloadCertificate>, Pool) {
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let (client, server) = (Arc::new(ca.sign(&id("client")).unwrap()), Arc::new(ca.sign(&id("server")).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (socket, peer) = listener.accept().await.unwrap();
        let (stream, peer) = tls::accept(&server, socket, peer).await.unwrap();
        let (_trigger, watcher) = drain::channel();
        let mut serving = Box::pin(serve(stream, peer, H2Settings::default(), watcher, echo));
        tokio::select! {
            _ = &mut serving => {}
            // What is not polled does nothing.
            () = told.notified() => std::future::pending().await,
        }
    });
    (addr, client, Pool::new(PoolSettings::default()))
}

#[tokio::test]
async fn a_peer_that_has_vanished_is_given_up_long_before_its_answer_is_due() {
    let told = Arc::new(Notify::new());
    let (addr, cert, pool) = vanishing(told.clone()).await;
    let key = PoolKey::new(id("client"), vec![id("server")], addr, addr.ip());
    let authority: Authority = "10.0.0.1:80".parse().unwrap();
    let dialled = AtomicUsize::new(0);
    let connect = async || {
        let dial = || {
            dialled.fetch_add(1, Ordering::Relaxed);
            TcpStream::connect(addr)
        };
        pool.connect(key.clone(), &cert, dial, &authority, &ConnectHeaders::default()).await
    };
    let mut open = connect().await.unwrap();
    round_trip(&mut open, b"x").await;
    told.notify_one();
    // From here on nothing arrives any more, so time may jump.
    tokio::task::yield_now().await;
    tokio::time::pause();
    let started = Instant::now();
    let errors = tokio::join!(connect(), connect());
    let waited = started.elapsed();
    for error in [errors.0, errors.1] {
        let error = error.err().expect("nobody answers");
        assert!(matches!(error, TunnelError::PeerGone), "{error}");
        assert_eq!(error.flag(), ResponseFlag::Timeout);
    }
    let PoolSettings { answer_patience, pong_patience, response_timeout, .. } = PoolSettings::default();
    assert!(waited < answer_patience + pong_patience + Duration::from_millis(100), "{waited:?}");
    assert!(waited < response_timeout / 2);
    assert_eq!(pool.stats(), PoolStats::default(), "nobody else is sent there");
    assert_eq!(dialled.load(Ordering::Relaxed), 1, "what may have been acted on is not asked for again");
    // What is open is not cut yet: that is for the keepalive, which waits longer.
    open.stream.write_all(b"still open").await.unwrap();
}

#[tokio::test]
async fn a_peer_that_takes_its_time_but_answers_pings_is_waited_for() {
    const SLOW: Duration = Duration::from_millis(1500);
    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).unwrap();
    let (client, server) = (Arc::new(ca.sign(&id("client")).unwrap()), Arc::new(ca.sign(&id("server")).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (_trigger, watcher) = drain::channel();
    tokio::spawn(async move {
        let (socket, peer) = listener.accept().await.unwrap();
        let (stream, peer) = tls::accept(&server, socket, peer).await.unwrap();
        let slow = |request| async move {
            // As an application does that is hard to reach.
            sleep(SLOW).await;
            echo(request).await;
        };
        serve(stream, peer, H2Settings::default(), watcher, slow).await
    });
    // Without a PONG it would be given up half-way.
    let (answer_patience, pong_patience) = (Duration::from_millis(20), SLOW / 3);
    let pool = Pool::new(PoolSettings { answer_patience, pong_patience, ..PoolSettings::default() });
    let key = PoolKey::new(id("client"), vec![id("server")], addr, addr.ip());
    let (authority, headers) = ("10.0.0.1:80".parse().unwrap(), ConnectHeaders::default());
    let mut tunnel = pool.connect(key, &client, || TcpStream::connect(addr), &authority, &headers).await.unwrap();
    round_trip(&mut tunnel, b"at last").await;
}
