//! Peers that are not who they should be or do not speak what they should, on the waypoint's HBONE port.

mod support;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use mesh::clock::Clock;
use mesh::hbone::{ConnectHeaders, Pool, PoolKey, PoolSettings, TunnelError};
use mesh::identity::{FileCa, Identity, WorkloadCertificate};
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(10);

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("done before patience ends")
}

/// What this thread logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("lock").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    /// Waits for a line that holds all `parts`.
    async fn says(&self, parts: &[&str]) {
        let found = || {
            let text = String::from_utf8_lossy(&self.0.lock().expect("lock")).into_owned();
            text.lines().any(|l| parts.iter().all(|p| l.contains(p))).then_some(()).ok_or(text)
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while let Err(text) = found() {
            assert!(tokio::time::Instant::now() < deadline, "{parts:?} not in {text}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

async fn connect_with(mesh: &Mesh, certificate: WorkloadCertificate) -> TunnelError {
    let certificate = Arc::new(certificate);
    let at = mesh.address;
    let local = std::net::Ipv4Addr::LOCALHOST.into();
    let key = PoolKey::new(certificate.identity().clone(), vec![identity("waypoint")], at, local);
    let authority = format!("{VIP}:{HTTP}").parse().expect("authority");
    let pool = Pool::new(PoolSettings::default());
    let dial = move || TcpStream::connect(at);
    within(pool.connect(key, &certificate, dial, &authority, &ConnectHeaders::default())).await.err().expect("refused")
}

#[tokio::test]
async fn a_client_that_cannot_prove_itself_is_refused_and_the_log_says_why() {
    let (log, _guard) = Log::start();
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);

    let other_root = FileCa::generate("cluster.local", Duration::from_secs(3600), Clock::system()).expect("CA");
    let (chain, key) = other_root.sign_pem(&identity("client")).expect("signed");
    let foreign = WorkloadCertificate::from_pem(&chain, &key, mesh.ca.root_pem(), &Clock::system()).expect("valid");
    let stranger = Identity::new("other.example", "shop", "client").expect("identity");
    let now = SystemTime::now();
    let (before, ended) = (now - Duration::from_secs(7200), now - Duration::from_secs(3600));
    let (begins, after) = (now + Duration::from_secs(3600), now + Duration::from_secs(7200));
    let sign_valid = |from, to| mesh.ca.sign_valid(&identity("client"), from, to).expect("signed");
    for (certificate, why) in [
        (foreign, "does not chain to a root we trust"),
        (mesh.ca.sign(&stranger).expect("signed"), "another trust domain: expected cluster.local"),
        (sign_valid(before, ended), "has expired"),
        (sign_valid(begins, after), "not valid yet"),
    ] {
        let error = connect_with(&mesh, certificate).await;
        assert_eq!(error.flag().as_str(), "TLS_FAILURE", "{why}: {error}");
        log.says(&["WARN", "access", "connection failed", "dst.addr=127.0.0.1", why, "TLS_FAILURE"]).await;
    }
    assert_eq!(within(mesh.get("/")).await.0, StatusCode::OK);
}

#[derive(Debug)]
struct Nobody;

impl rustls::client::ResolvesClientCert for Nobody {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let (log, _guard) = Log::start();
    let mesh = Mesh::start().await;
    let config = mesh.ca.sign(&identity("client")).expect("signed").client_config(&[identity("waypoint")]);
    let mut anonymous = Arc::unwrap_or_clone(config);
    anonymous.client_auth_cert_resolver = Arc::new(Nobody);
    let tcp = TcpStream::connect(mesh.address).await.expect("connected");
    let name = rustls::pki_types::ServerName::IpAddress(mesh.address.ip().into());
    let mut tls = tokio_rustls::TlsConnector::from(Arc::new(anonymous)).connect(name, tcp).await.expect("half-way");
    let refused = within(tls.read(&mut [0; 16])).await.expect_err("an alert");
    assert!(refused.to_string().contains("CertificateRequired"), "{refused}");
    log.says(&["WARN", "connection failed", "sent no certificate", "TLS_FAILURE"]).await;
}

#[tokio::test]
async fn garbage_ends_its_own_connection_only() {
    let (log, _guard) = Log::start();
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    let hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 600]].concat();
    for garbage in [
        &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0; 4096],
        &[0xff; 70_000],
        &hello,
    ] {
        let mut stream = TcpStream::connect(mesh.address).await.expect("connected");
        // The waypoint may hang up before all is written.
        let _ = stream.write_all(garbage).await;
        let mut rest = Vec::new();
        let _ = within(stream.read_to_end(&mut rest)).await;
    }
    log.says(&["WARN", "connection failed", "TLS_FAILURE"]).await;
    // Half a record and then silence must not hold anybody else up.
    let mut silent = TcpStream::connect(mesh.address).await.expect("connected");
    silent.write_all(&hello[..20]).await.expect("write");
    assert_eq!(within(mesh.get("/")).await.0, StatusCode::OK);
}

#[tokio::test]
async fn what_is_no_connect_to_something_served_here_is_refused_one_by_one() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    let certificate = mesh.ca.sign(&identity("client")).expect("signed");
    let tcp = TcpStream::connect(mesh.address).await.expect("connected");
    let expected = [identity("waypoint")];
    let (tls, _) = mesh::tls::connect(&certificate, &expected, tcp, mesh.address).await.expect("mTLS");
    let (mut sender, connection) = h2::client::handshake(tls).await.expect("HTTP/2");
    tokio::spawn(connection);
    let connect = |authority: &str| Request::builder().method(Method::CONNECT).uri(authority.to_owned());
    let huge = "x".repeat(80 * 1024);
    for (request, want) in [
        (Request::get("https://10.96.0.1:80/"), StatusCode::BAD_REQUEST),
        (Request::post("https://10.96.0.1:80/"), StatusCode::BAD_REQUEST),
        (connect("10.96.0.1"), StatusCode::BAD_REQUEST),
        (connect("10.96.0.1:0"), StatusCode::BAD_REQUEST),
        (connect("user@10.96.0.1:80"), StatusCode::BAD_REQUEST),
        (connect("10.96.0.1:99999"), StatusCode::BAD_REQUEST),
        (connect("10.96.0.1:80").header("x-huge", &huge), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        (connect("10.96.0.1:80").header("baggage", "=;,=\u{7f}".trim_end_matches('\u{7f}')), StatusCode::OK),
    ] {
        let request: Request<()> = request.body(()).expect("request");
        let what = format!("{} {}", request.method(), request.uri());
        sender = within(sender.ready()).await.expect("the connection goes on");
        let (answer, _body) = sender.send_request(request, false).expect("sent");
        assert_eq!(within(answer).await.expect("an answer").status(), want, "{what}");
    }
    let _: h2::client::SendRequest<Bytes> = sender;
}
