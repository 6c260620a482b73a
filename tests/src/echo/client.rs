//! The client: what to ask comes as JSON on standard input, what came of it goes to standard output.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use axum::http::header::{CONNECTION, HOST, UPGRADE};
use axum::http::uri::Authority;
use axum::http::{Request, Response, Uri};
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tonic::client::Grpc;
use tonic::metadata::AsciiMetadataKey;
use tonic::transport::{Channel, Endpoint};

use super::{Answer, Ask, How, listed};

/// One request may take this long.
const PATIENCE: Duration = Duration::from_secs(5);
/// Over so many connections requests are spread: a few have one each.
const CONNECTIONS: u32 = 10;
/// Said to a WebSocket's server, and said back.
const SAID: &str = "there and back\n";

/// Asks everything at once and prints the answers in the order of the questions.
///
/// # Errors
/// When the questions cannot be read. A question without an answer is none.
pub fn run() -> Result<()> {
    let asks: Vec<Ask> = serde_json::from_reader(std::io::stdin().lock())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answers = runtime.block_on(join_all(asks.iter().map(ask)));
    println!("{}", serde_json::to_string(&answers)?);
    Ok(())
}

/// The answers to one question, those to what is asked then at the end.
pub async fn ask(ask: &Ask) -> Vec<Answer> {
    let mut answers = repeat(ask).await;
    for url in &ask.then {
        let then = Ask {
            how: How::Http1,
            method: "GET".into(),
            url: url.clone(),
            headers: Vec::new(),
            count: 1,
            then: Vec::new(),
        };
        answers.extend(repeat(&then).await);
    }
    answers
}

async fn repeat(ask: &Ask) -> Vec<Answer> {
    let on_one_connection = (ask.count / CONNECTIONS).max(1);
    let mut kept = None;
    let mut answers = Vec::new();
    for number in 0..ask.count {
        if number.is_multiple_of(on_one_connection) {
            kept = None;
        }
        let started = Instant::now();
        let exchange = tokio::time::timeout(PATIENCE, exchange(ask, &mut kept)).await;
        let outcome = exchange.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {PATIENCE:?}")));
        let mut answer = outcome.unwrap_or_else(|e| {
            kept = None;
            Answer { error: Some(format!("{e:#}")), ..Answer::default() }
        });
        answer.millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        answers.push(answer);
    }
    answers
}

async fn exchange(ask: &Ask, kept: &mut Option<Connection>) -> Result<Answer> {
    let to: Uri = ask.url.parse().with_context(|| format!("{} is no URL", ask.url))?;
    let mut connection = match kept.take() {
        Some(connection) => connection,
        None => Connection::open(ask.how, &to).await?,
    };
    let answer = connection.send(ask, &to).await?;
    *kept = Some(connection);
    Ok(answer)
}

enum Connection {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
    Grpc(Grpc<Channel>),
}

impl Connection {
    async fn open(how: How, to: &Uri) -> Result<Self> {
        let authority = to.authority().context("a URL needs a host")?;
        if how == How::Grpc {
            let endpoint = Endpoint::from_shared(format!("http://{authority}"))?;
            return Ok(Self::Grpc(Grpc::new(endpoint.connect().await?)));
        }
        let host = authority.host().trim_matches(['[', ']']);
        let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        // The tasks end with their connections, whose errors are told to who asks.
        if how == How::Http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            return Ok(Self::Http2(sender));
        }
        let (sender, connection) = http1::handshake(io).await?;
        tokio::spawn(connection.with_upgrades());
        Ok(Self::Http1(sender))
    }

    async fn send(&mut self, ask: &Ask, to: &Uri) -> Result<Answer> {
        let response = match self {
            Self::Grpc(grpc) => return call(grpc, ask, to).await,
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request(ask, to)?).await?
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request(ask, to)?).await?
            }
        };
        read(response).await
    }
}

fn request(ask: &Ask, to: &Uri) -> Result<Request<Empty<Bytes>>> {
    let is_host = |name: &str| name.eq_ignore_ascii_case("host");
    let named = ask.headers.iter().find(|(name, _)| is_host(name)).map(|(_, host)| host.as_str());
    let authority = named.or(to.authority().map(Authority::as_str)).context("a URL needs a host")?;
    let target = to.path_and_query().context("a URL has a path")?.clone();
    let mut builder = Request::builder().method(ask.method.as_str());
    builder = match ask.how {
        How::Http2 => builder.uri(Uri::builder().scheme("http").authority(authority).path_and_query(target).build()?),
        How::Http1 | How::Grpc | How::WebSocket => builder.uri(Uri::from(target)).header(HOST, authority),
    };
    for (name, value) in ask.headers.iter().filter(|(name, _)| !is_host(name)) {
        builder = builder.header(name, value);
    }
    if ask.how == How::WebSocket {
        builder = builder.header(CONNECTION, "Upgrade").header(UPGRADE, "websocket");
        builder = builder.header("sec-websocket-version", "13").header("sec-websocket-key", "ZWNobyBvZiBhIGxhYiEhIQ==");
    }
    Ok(builder.body(Empty::new())?)
}

async fn read(response: Response<Incoming>) -> Result<Answer> {
    let (status, headers) = (response.status().as_u16(), listed(response.headers()));
    let body = match status {
        101 => switched(response).await?,
        _ => String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?,
    };
    Ok(Answer { status, headers, body, ..Answer::default() })
}

/// What a WebSocket's server says first, if it also says back what it is told.
async fn switched(response: Response<Incoming>) -> Result<String> {
    let mut stream = BufReader::new(TokioIo::new(hyper::upgrade::on(response).await?));
    let (mut report, mut back) = (String::new(), String::new());
    stream.read_line(&mut report).await?;
    stream.write_all(SAID.as_bytes()).await?;
    stream.read_line(&mut back).await?;
    ensure!(back == SAID, "{SAID:?} came back as {back:?}");
    Ok(report)
}

async fn call(grpc: &mut Grpc<Channel>, ask: &Ask, to: &Uri) -> Result<Answer> {
    let mut request = tonic::Request::new(());
    for (name, value) in &ask.headers {
        request.metadata_mut().insert(AsciiMetadataKey::from_bytes(name.as_bytes())?, value.parse()?);
    }
    let method = to.path_and_query().context("a URL has a path")?.clone();
    grpc.ready().await?;
    let codec = tonic_prost::ProstCodec::<(), String>::default();
    match grpc.unary(request, method, codec).await {
        Ok(response) => {
            let (metadata, body, _) = response.into_parts();
            Ok(Answer { status: 200, headers: listed(&metadata.into_headers()), body, ..Answer::default() })
        }
        Err(status) => {
            let error = format!("{:?}: {}", status.code(), status.message());
            Ok(Answer { error: Some(error), ..Answer::default() })
        }
    }
}
