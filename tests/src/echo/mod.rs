//! An application for cases about HTTP: its server answers with what has reached it, its client tells what came back.
//!
//! Both run in pods (`bench echo`, `bench ask`), so that what they say goes the way of any application's.

pub mod client;
pub mod server;

use axum::http::HeaderMap;
use serde::{Deserialize, Serialize};

/// What a server has seen of a request, and who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub hostname: String,
    pub namespace: String,
    pub method: String,
    /// With its query.
    pub path: String,
    pub host: String,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub protocol: String,
    pub headers: Headers,
    /// How many requests with the same key have come, this one included.
    pub seen: u32,
}

/// Names in lower case; a name with several values is there several times.
pub type Headers = Vec<(String, String)>;

/// How a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    Http1,
    /// Without asking first whether the server speaks it.
    Http2,
    /// A call with an empty message. The answer is the text of the message that comes back.
    Grpc,
    /// HTTP/1.1 that becomes a WebSocket, in so far as a proxy can tell: after the handshake, bytes that are said back.
    WebSocket,
}

/// What a client is to ask.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ask {
    pub how: How,
    pub method: String,
    /// `http://HOST[:PORT]/PATH`
    pub url: String,
    /// One named `host` says for whom the request is, wherever it is sent.
    pub headers: Headers,
    /// So many times, one after the other.
    pub count: u32,
    /// What to get, once each, after that.
    pub then: Vec<String>,
}

/// What came of one request.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// 0 without an answer; of a call that went well 200.
    pub status: u16,
    pub headers: Headers,
    pub body: String,
    /// Why there is no answer; status and message of a call that failed.
    pub error: Option<String>,
    /// Time from before the connection to the end of the answer.
    pub millis: u64,
}

impl Answer {
    /// What the server says it has seen; `None` when somebody else has answered.
    pub fn report(&self) -> Option<Report> {
        serde_json::from_str(&self.body).ok()
    }
}

/// The values of a name, joined as one reads them.
pub fn values(headers: &[(String, String)], name: &str) -> Option<String> {
    let all: Vec<&str> = headers.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect();
    (!all.is_empty()).then(|| all.join(","))
}

fn listed(headers: &HeaderMap) -> Headers {
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    headers.iter().map(|(name, value)| (name.to_string(), text(value.as_bytes()))).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    /// A server on loopback, and its address.
    async fn serve() -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound").to_string();
        let routes = server::routes(Arc::new(server::Server::named("me", "here")));
        // Ends with the test.
        tokio::spawn(async move { axum::serve(listener, routes).await });
        address
    }

    async fn one(how: How, url: String, headers: &[(&str, &str)]) -> Answer {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let ask = Ask { how, method: "GET".into(), url, headers, count: 1, then: Vec::new() };
        client::ask(&ask).await.remove(0)
    }

    #[tokio::test]
    async fn a_report_says_who_was_asked_for_what_and_how() {
        let at = serve().await;
        for (how, protocol) in
            [(How::Http1, "HTTP/1.1"), (How::Http2, "HTTP/2.0"), (How::Grpc, "HTTP/2.0"), (How::WebSocket, "HTTP/1.1")]
        {
            let answer = one(how, format!("http://{at}/a.B/C"), &[("x-one", "1")]).await;
            let status = if how == How::WebSocket { 101 } else { 200 };
            let report = answer.report().unwrap_or_default();
            assert_eq!((answer.status, report.protocol.as_str()), (status, protocol), "{how:?}: {answer:?}");
            let found = (report.hostname.as_str(), report.namespace.as_str(), report.path.as_str(), &report.host);
            assert_eq!(found, ("me", "here", "/a.B/C", &at), "{how:?}");
            assert_eq!(values(&report.headers, "x-one").as_deref(), Some("1"), "{how:?}");
        }
        for how in [How::Http1, How::Http2] {
            let answer = one(how, format!("http://{at}/"), &[("host", "another")]).await;
            assert_eq!(answer.report().unwrap_or_default().host, "another", "{how:?}");
        }
    }

    #[tokio::test]
    async fn a_server_fails_and_dawdles_as_often_as_it_is_told_and_counts() {
        let at = serve().await;
        let statuses = |answers: Vec<Answer>| answers.iter().map(|answer| answer.status).collect::<Vec<_>>();
        let ask = Ask {
            how: How::Http1,
            method: "GET".into(),
            url: format!("http://{at}/?key=a&fail=503&times=2"),
            headers: Vec::new(),
            count: 3,
            then: vec![format!("http://{at}/?count=a&want=3"), format!("http://{at}/?count=b")],
        };
        let answers = client::ask(&ask).await;
        let counts: Vec<u32> = answers.iter().map(|answer| answer.report().unwrap_or_default().seen).collect();
        assert_eq!((statuses(answers), counts), (vec![503, 503, 200, 200, 200], vec![1, 2, 3, 3, 0]));
        let slow = one(How::Http1, format!("http://{at}/?delay=80&key=c&times=1"), &[]).await;
        let quick = one(How::Http1, format!("http://{at}/?delay=60000&key=c&times=1"), &[]).await;
        assert!(slow.millis >= 80 && quick.status == 200, "{slow:?} {quick:?}");
    }

    #[tokio::test]
    async fn what_cannot_be_reached_is_an_answer_with_a_reason() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
        let at = nobody.local_addr().expect("it is bound");
        drop(nobody);
        let started = std::time::Instant::now();
        let answer = one(How::Http1, format!("http://{at}/"), &[]).await;
        assert!(answer.status == 0 && answer.error.is_some(), "{answer:?}");
        assert!(started.elapsed() < Duration::from_secs(4), "a refusal is not waited for");
    }
}
