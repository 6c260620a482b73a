use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;
use crate::drain;

async fn ask(addr: std::net::SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn operators_get_their_answers() {
    let readiness = Readiness::default();
    let waiting = readiness.pending("xds sync");
    let server = AdminServer::new("test")
        .readiness(readiness.clone())
        .metrics(crate::telemetry::metrics_handle())
        .route(Method::GET, "/config_dump", |request| async move { json(&request.param("a")) })
        .route(Method::POST, "/quitquitquit", |_| async { text(StatusCode::OK, "") })
        .index("test", &[("/config_dump", "what is known")]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (trigger, watcher) = drain::channel();
    let serving = tokio::spawn(server.serve(listener, watcher));

    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    let not_ready = ask(addr, &get("/healthz/ready")).await;
    assert!(not_ready.starts_with("HTTP/1.1 500") && not_ready.contains("xds sync"), "{not_ready}");
    drop(waiting);
    assert!(ask(addr, &get("/healthz/ready")).await.starts_with("HTTP/1.1 200"));
    readiness.shutting_down();
    assert!(ask(addr, &get("/healthz/ready")).await.starts_with("HTTP/1.1 500"));

    assert!(ask(addr, &get("/stats/prometheus")).await.starts_with("HTTP/1.1 200"));
    assert!(ask(addr, &get("/config_dump?a=b%3Dc")).await.ends_with("\"b=c\""));
    assert!(ask(addr, &get("/config_dump?a=shop%2Fweb%20%5B%3A%3A1%5D")).await.ends_with("\"shop/web [::1]\""));
    let index = ask(addr, &get("/")).await;
    assert!(index.contains("content-type: text/html"), "{index}");
    assert!(index.contains("<a href=\"/config_dump\">/config_dump</a></td><td>what is known"), "{index}");
    assert!(index.contains("<td>POST</td><td>/quitquitquit</td>"), "a click must not end anything: {index}");
    assert!(ask(addr, &get("/nowhere")).await.starts_with("HTTP/1.1 404"));
    let post = "POST /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    assert!(ask(addr, post).await.starts_with("HTTP/1.1 405"));
    assert!(ask(addr, "\0\0garbage\r\n\r\n").await.starts_with("HTTP/1.1 400"));

    trigger.drain(Duration::from_secs(5)).await;
    serving.await.unwrap();
    assert!(TcpStream::connect(addr).await.is_err(), "a drained server accepts nothing");
}

#[tokio::test]
async fn scrapers_get_the_format_and_encoding_they_prefer() {
    let server = Arc::new(AdminServer::new("test").metrics(crate::telemetry::metrics_handle()));
    metrics::counter!("admin_test_total").increment(1);
    let ask = async |accept: &'static str, encoding: &'static str| {
        let handler = server.find(&Method::GET, "/metrics").expect("it is there");
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(encoding));
        let (method, path) = (Method::GET, "/metrics".into());
        let (parts, body) =
            handler(AdminRequest { method, path, query: None, headers, body: Bytes::new() }).await.into_parts();
        let body = body.collect().await.expect("it is in memory").to_bytes();
        let text = |name| parts.headers.get(name).map_or("", |v: &HeaderValue| v.to_str().expect("text")).to_owned();
        (text(header::CONTENT_TYPE), text(header::CONTENT_ENCODING), body)
    };
    let (kind, encoding, body) = ask("text/plain", "identity").await;
    assert_eq!((&*kind, &*encoding), ("text/plain; version=0.0.4; charset=utf-8", ""));
    assert!(String::from_utf8_lossy(&body).contains("# TYPE admin_test_total counter\nadmin_test_total 1\n"));
    let (kind, encoding, body) =
        ask("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "br, gzip;q=0.5").await;
    assert_eq!((&*kind, &*encoding), ("application/openmetrics-text; version=1.0.0; charset=utf-8", "gzip"));
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&*body), &mut text).expect("gzip");
    assert!(text.contains("# TYPE admin_test counter\nadmin_test_total 1\n") && text.ends_with("# EOF\n"), "{text}");
    assert_eq!(ask("*/*", "gzip;q=0").await.1, "");
}
