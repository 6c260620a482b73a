//! HTTP as hostile or merely slow peers speak it, byte by byte where it matters.

mod support;

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh::hbone::{self, ConnectRequest, H2Settings};
use mesh::identity::CertificateSource;
use mesh::model::{NamespacedHostname, TunnelProtocol};
use mesh::store::Update;
use mesh_proto::waypoint as wire;
use support::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(10);

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("done before patience ends")
}

/// Reads until what was read ends with `end`, or the stream does.
async fn read_until(stream: &mut (impl AsyncRead + Unpin), end: &str) -> String {
    let mut seen = Vec::new();
    within(async {
        let mut byte = [0];
        while !seen.ends_with(end.as_bytes()) && stream.read(&mut byte).await.expect("read") > 0 {
            seen.push(byte[0]);
        }
    })
    .await;
    String::from_utf8_lossy(&seen).into_owned()
}

/// A server made of bytes: `serve` gets each connection.
async fn raw_origin<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listener");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

#[tokio::test]
async fn an_answer_before_the_upload_ends_keeps_nobody_else_waiting() {
    let mesh = Mesh::start().await;
    let eager = raw_origin(|mut stream| async move {
        while read_until(&mut stream, "\r\n\r\n").await.contains("HTTP/1.1") {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.expect("write");
        }
    })
    .await;
    mesh.serve(&[eager]);
    let mut slow = mesh.tunnel(HTTP).await;
    slow.write_all(b"POST / HTTP/1.1\r\nhost: server\r\ncontent-length: 1000\r\n\r\nx").await.expect("write");
    assert!(read_until(&mut slow, "ok").await.starts_with("HTTP/1.1 200"));
    for _ in 0..3 {
        assert_eq!(within(mesh.get("/")).await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_request_means_one_thing_to_both_sides() {
    let mesh = Mesh::start().await;
    let heads: Arc<Mutex<Vec<String>>> = Arc::default();
    let seen = heads.clone();
    let recording = raw_origin(move |mut stream| {
        let seen = seen.clone();
        async move {
            loop {
                let head = read_until(&mut stream, "\r\n\r\n").await.to_ascii_lowercase();
                if head.is_empty() {
                    return;
                }
                if head.contains("chunked") {
                    read_until(&mut stream, "0\r\n\r\n").await;
                }
                seen.lock().expect("lock").push(head);
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.expect("write");
            }
        }
    })
    .await;
    mesh.serve(&[recording]);
    // What a reader of Content-Length takes for the body is a second request for a reader of Transfer-Encoding.
    for lengths in
        ["content-length: 45\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 45"]
    {
        let mut stream = mesh.tunnel(HTTP).await;
        let both = format!("POST /first HTTP/1.1\r\nhost: server\r\n{lengths}\r\n\r\n0\r\n\r\n");
        stream.write_all(both.as_bytes()).await.expect("write");
        stream.write_all(b"GET /second HTTP/1.1\r\nhost: server\r\n\r\n").await.expect("write");
        let answer = read_until(&mut stream, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") || answer.starts_with("HTTP/1.1 400"), "{answer}");
    }
    for head in heads.lock().expect("lock").iter() {
        assert!(!(head.contains("content-length") && head.contains("chunked")), "{head}");
    }
    heads.lock().expect("lock").clear();
    for bad in [
        "content-length: 1\r\ncontent-length: 2",
        "content-length: +1",
        "transfer-encoding: gzip",
        "transfer-encoding: chunked, gzip",
        "host: other",
        "bad name: x",
    ] {
        let mut stream = mesh.tunnel(HTTP).await;
        let request = format!("POST / HTTP/1.1\r\nhost: server\r\n{bad}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("write");
        let answer = read_until(&mut stream, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{bad}: {answer}");
    }
    assert!(heads.lock().expect("lock").is_empty(), "none of these may reach the application");
}

#[tokio::test]
async fn answers_without_a_body_leave_the_connection_in_step() {
    let mesh = Mesh::start().await;
    let terse = raw_origin(|mut stream| async move {
        loop {
            let head = read_until(&mut stream, "\r\n\r\n").await;
            let answer = match head.split(' ').nth(1) {
                Some("/204") => "HTTP/1.1 204 No Content\r\n\r\n",
                Some("/304") => "HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\ncontent-length: 7\r\n\r\n",
                Some("/head") => "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n",
                Some(_) => "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlast",
                None => return,
            };
            stream.write_all(answer.as_bytes()).await.expect("write");
        }
    })
    .await;
    mesh.serve(&[terse]);
    let mut stream = mesh.tunnel(HTTP).await;
    let request = |method: &str, path: &str| format!("{method} {path} HTTP/1.1\r\nhost: server\r\n\r\n");
    // All at once: pipelined requests are answered in order.
    let all = [request("HEAD", "/head"), request("GET", "/204"), request("GET", "/304"), request("GET", "/last")];
    stream.write_all(all.concat().as_bytes()).await.expect("write");
    for (status, length) in [("200", Some("7")), ("204", None), ("304", Some("7")), ("200", Some("4"))] {
        let head = read_until(&mut stream, "\r\n\r\n").await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        let got = head.lines().find_map(|l| l.strip_prefix("content-length: "));
        assert!(got == length || got.is_none() && status == "304", "{head}");
    }
    assert_eq!(read_until(&mut stream, "last").await, "last");
}

#[tokio::test]
async fn continue_is_sent_and_trailers_pass() {
    let mesh = Mesh::start().await;
    let trailing = raw_origin(|mut stream| async move {
        read_until(&mut stream, "\r\n\r\n").await;
        assert_eq!(read_until(&mut stream, "body").await, "body");
        let answer =
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.expect("write");
    })
    .await;
    mesh.serve(&[trailing]);
    let mut stream = mesh.tunnel(HTTP).await;
    let head = "POST / HTTP/1.1\r\nhost: server\r\nte: trailers\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("write");
    assert!(read_until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 100"));
    stream.write_all(b"body").await.expect("write");
    assert!(read_until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 200"));
    assert_eq!(read_until(&mut stream, "\r\n\r\n").await, "2\r\nok\r\n0\r\nx-sum: 7\r\n\r\n");
}

#[tokio::test]
async fn a_body_that_breaks_off_is_the_clients_fault_and_reaches_nobody_whole() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    let mut stream = mesh.tunnel(HTTP).await;
    let broken = b"POST / HTTP/1.1\r\nhost: server\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n";
    stream.write_all(broken).await.expect("write");
    let answer = read_until(&mut stream, "\r\n\r\n").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!(within(mesh.get("/")).await.0, StatusCode::OK);
}

#[tokio::test]
async fn an_upstream_that_switches_unasked_is_refused() {
    let mesh = Mesh::start().await;
    let odd = raw_origin(|mut stream| async move {
        read_until(&mut stream, "\r\n\r\n").await;
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: other\r\n\r\nbytes";
        stream.write_all(answer).await.expect("write");
    })
    .await;
    mesh.serve(&[odd]);
    assert_eq!(within(mesh.get("/")).await.0, StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn the_request_timeout_ends_a_body_that_stalls() {
    let mesh = Mesh::start().await;
    mesh.serve(&[]);
    let stalling = raw_origin(|mut stream| async move {
        read_until(&mut stream, "\r\n\r\n").await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.expect("write");
        // The waypoint hangs up.
        let _ = stream.read(&mut [0]).await;
    })
    .await;
    mesh.backend("slow", stalling);
    let service = wire::ServicePort { service: "shop/slow.shop.svc.cluster.local".into(), port: u32::from(HTTP) };
    let backend =
        wire::Backend { weight: 1, target: Some(wire::backend::Target::Service(service)), ..Default::default() };
    let parent = wire::Parent { service: "shop/server.shop.svc.cluster.local".into(), port: 0 };
    mesh.routes(vec![wire::Route {
        name: "r".into(),
        namespace: "shop".into(),
        parents: vec![parent],
        rules: vec![wire::RouteRule {
            backends: vec![backend],
            request_timeout: Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 }),
            ..Default::default()
        }],
        ..Default::default()
    }]);
    let mut stream = mesh.tunnel(HTTP).await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: server\r\n\r\n").await.expect("write");
    let answer = read_until(&mut stream, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut rest = Vec::new();
    let end = within(stream.read_to_end(&mut rest)).await.map_err(|error| error.kind());
    assert_eq!(rest, b"half");
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset), "it cannot be taken for all there was");
}

/// An HTTP/2 server that answers each message as it comes and closes with a gRPC status; counts its connections.
async fn grpc_echo(connections: Arc<AtomicUsize>) -> SocketAddr {
    let echo = |request: Request<Incoming>| async move {
        let (sender, receiver) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
        let mut body = request.into_body();
        tokio::spawn(async move {
            while let Some(Ok(frame)) = body.frame().await {
                if let Ok(data) = frame.into_data() {
                    let _ = sender.send(Ok(Frame::data(data))).await;
                }
            }
            let trailers = [(http::HeaderName::from_static("grpc-status"), http::HeaderValue::from_static("5"))];
            let _ = sender.send(Ok(Frame::trailers(trailers.into_iter().collect()))).await;
        });
        let body = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receiver));
        Ok::<_, Infallible>(Response::new(body))
    };
    raw_origin(move |stream| {
        connections.fetch_add(1, Ordering::Relaxed);
        async move {
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = builder.serve_connection(TokioIo::new(stream), service_fn(echo)).await;
        }
    })
    .await
}

#[tokio::test]
async fn grpc_streams_both_ways_at_once_on_one_upstream_connection() {
    let mesh = Mesh::start().await;
    let connections = Arc::new(AtomicUsize::new(0));
    mesh.serve(&[grpc_echo(connections.clone()).await]);
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(mesh.tunnel(GRPC).await))
            .await
            .expect("handshake");
    tokio::spawn(connection);
    let talks = (0..20).map(|n: u8| {
        let mut sender = sender.clone();
        async move {
            let (messages, receiver) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
            let body = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receiver));
            let request = Request::post("http://server/pkg.Service/Talk")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(body)
                .expect("request");
            let mut answer = within(sender.send_request(request)).await.expect("response").into_body();
            for round in 0..3 {
                let message = Bytes::from(vec![n, round]);
                messages.send(Ok(Frame::data(message.clone()))).await.expect("open");
                let back = within(answer.frame()).await.expect("a frame").expect("no error");
                assert_eq!(back.into_data().expect("data"), message);
            }
            drop(messages);
            let trailers = within(answer.frame()).await.expect("a frame").expect("no error");
            assert_eq!(trailers.into_trailers().expect("trailers")["grpc-status"], "5");
        }
    });
    futures_util::future::join_all(talks).await;
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_drain_finishes_requests_and_websockets_and_closes_idle_connections() {
    let mut mesh = Mesh::start().await;
    let (release, released) = tokio::sync::watch::channel(false);
    let waiting = raw_origin(move |mut stream| {
        let mut released = released.clone();
        async move {
            loop {
                let head = read_until(&mut stream, "\r\n\r\n").await;
                if head.contains("upgrade") {
                    let switched =
                        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
                    stream.write_all(switched).await.expect("write");
                    let (mut r, mut w) = stream.split();
                    let _ = tokio::io::copy(&mut r, &mut w).await;
                    return;
                }
                if head.is_empty() {
                    return;
                }
                if head.contains("/slow") {
                    released.wait_for(|r| *r).await.expect("released");
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").await.expect("write");
            }
        }
    })
    .await;
    mesh.serve(&[waiting]);
    let mut idle = mesh.tunnel(HTTP).await;
    idle.write_all(b"GET / HTTP/1.1\r\nhost: server\r\n\r\n").await.expect("write");
    read_until(&mut idle, "done").await;
    let mut slow = mesh.tunnel(HTTP).await;
    slow.write_all(b"GET /slow HTTP/1.1\r\nhost: server\r\n\r\n").await.expect("write");
    let mut socket = mesh.tunnel(HTTP).await;
    let handshake = b"GET /ws HTTP/1.1\r\nhost: server\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    socket.write_all(handshake).await.expect("write");
    read_until(&mut socket, "\r\n\r\n").await;

    let trigger = mesh.trigger.take().expect("not drained yet");
    let guard = mesh.drain.guard();
    let drained = tokio::spawn(trigger.drain(PATIENCE));
    assert_eq!(read_until(&mut idle, "never").await, "", "an idle connection is closed");
    socket.write_all(b"still here").await.expect("write");
    assert_eq!(read_until(&mut socket, "still here").await, "still here");
    release.send(true).expect("somebody waits");
    let answer = read_until(&mut slow, "never").await;
    assert!(answer.ends_with("done") && answer.to_ascii_lowercase().contains("connection: close"), "{answer}");
    socket.shutdown().await.expect("shutdown");
    assert_eq!(read_until(&mut socket, "never").await, "");
    drop((idle, slow, socket));
    within(mesh.serving).await.expect("the accept loop ends by itself");
    drop(guard);
    assert_eq!(drained.await.expect("drain"), mesh::drain::Drained::Clean);
}

#[tokio::test]
async fn a_drained_worker_lets_kept_connections_go_and_waits_for_what_is_under_way() {
    let mesh = Mesh::start().await;
    // Stands for the endpoint's node proxy: echoes TCP, answers HTTP, and tells when its connection has ended.
    let pod: SocketAddr = "127.0.0.8:8080".parse().expect("address");
    let listener = TcpListener::bind(SocketAddr::new(pod.ip(), hbone::HBONE_PORT)).await.expect("listener");
    let certificate = mesh.ca.fetch(&identity("server")).await.expect("certificate");
    let (_running, watcher) = mesh::drain::channel();
    let ended = tokio::spawn(async move {
        let (stream, peer) = listener.accept().await.expect("accepted");
        let (tls, peer) = mesh::tls::accept(&certificate, stream, peer).await.expect("mTLS");
        let echo = |request: ConnectRequest| async move {
            let (mut r, mut w) = tokio::io::split(request.accept(None).expect("accepted"));
            let first = r.read_u8().await.expect("a byte");
            if first == b'G' {
                w.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.expect("write");
            }
            let _ = tokio::io::copy(&mut r, &mut w).await;
            let _ = w.shutdown().await;
        };
        hbone::serve(tls, peer, H2Settings::default(), watcher, echo).await
    });
    mesh.serve(&[]);
    let key = NamespacedHostname::new("shop", "server.shop.svc.cluster.local");
    let workload = endpoint(&key, 0, pod).with(|w| w.protocol = TunnelProtocol::Hbone);
    mesh.store.apply(Update::new().workload(workload));
    let mut web = mesh.tunnel(HTTP).await;
    web.write_all(b"GET / HTTP/1.1\r\nhost: server\r\n\r\n").await.expect("write");
    assert!(read_until(&mut web, "ok").await.starts_with("HTTP/1.1 200"));
    let mut tcp = mesh.tunnel(TCP).await;
    tcp.write_all(b"-half").await.expect("write");
    assert_eq!(read_until(&mut tcp, "half").await, "half");

    let (worker, watcher) = (mesh.worker.clone(), mesh.drain.clone());
    let drained = tokio::spawn(async move { worker.drain(&watcher).await });
    tcp.write_all(b" and half").await.expect("write");
    assert_eq!(read_until(&mut tcp, "and half").await, " and half");
    assert!(!drained.is_finished() && !ended.is_finished());
    tcp.shutdown().await.expect("shutdown");
    assert_eq!(read_until(&mut tcp, "never").await, "");
    within(drained).await.expect("drained");
    within(ended).await.expect("no panic").expect("closed in good order");
}
