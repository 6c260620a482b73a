//! Port 15017: HTTPS for the API server. Nobody is asked who they are, as API servers have no certificate to show by
//! default: what an answer says follows from the question and from what the statuses say anyway. What strangers can cost
//! is bounded: handshakes, connections, bytes that are held, values in them, time, and questions judged at once.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use mesh::drain::DrainWatcher;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::review::{Answer, Review};
use super::{Knowledge, Outcome, decide};
use crate::serve::{MAX_HANDSHAKES, shake_hands};

const PATH: &str = "/validate";
/// The object as it was and as it is to be, 3 MiB at most each, and what stands around them.
const LONGEST: usize = 6 * 1024 * 1024 + 64 * 1024;
/// Bytes of all questions under way, in units of 1 KiB.
const ROOM: usize = 32 * 1024;
/// Values in one question. A value takes about as much memory as a hundred letters.
const MOST_VALUES: usize = 400_000;
/// Questions judged at once; the others wait.
const JUDGES: usize = 2;
/// From the head of a question to its answer, as long as the API server waits.
const PATIENCE: Duration = Duration::from_secs(5);
const CONNECTIONS: usize = 256;
const MAX_STREAMS: u32 = 128;
/// An idle connection is closed after this, or asked whether anybody is there.
const IDLE: Duration = Duration::from_secs(60);

/// Why a question has no answer. The API server then does what its configuration says: as we ask it to, it lets pass.
#[derive(Debug, PartialEq, Eq)]
enum Unanswered {
    NotFound,
    NotPost,
    NotJson,
    LengthUnknown,
    TooLong,
    Unreadable(String),
    Late,
    Failed,
}

impl Unanswered {
    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::NotPost => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::LengthUnknown => StatusCode::LENGTH_REQUIRED,
            Self::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unreadable(_) => StatusCode::BAD_REQUEST,
            Self::Late => StatusCode::GATEWAY_TIMEOUT,
            Self::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn text(self) -> String {
        match self {
            Self::NotFound => format!("only {PATH} is here"),
            Self::NotPost => "an AdmissionReview is posted".into(),
            Self::NotJson => "an AdmissionReview is application/json".into(),
            Self::LengthUnknown => "the length must be known before".into(),
            Self::TooLong => format!("{LONGEST} bytes and {MOST_VALUES} values at most"),
            Self::Unreadable(reason) => reason,
            Self::Late => format!("no answer within {PATIENCE:?}"),
            Self::Failed => "it could not be judged; see the log".into(),
        }
    }
}

/// Serves until drained: questions under way are answered.
pub async fn serve(listener: TcpListener, acceptor: TlsAcceptor, knowledge: Knowledge, drain: DrainWatcher) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let webhook = Arc::new(Webhook { knowledge, room: Semaphore::new(ROOM), judges: Arc::new(Semaphore::new(JUDGES)) });
    mesh::serve::accept_loop(listener, drain.clone(), move |stream, peer| {
        let (acceptor, drain, webhook) = (acceptor.clone(), drain.clone(), Arc::clone(&webhook));
        let (handshakes, connections) = (Arc::clone(&handshakes), Arc::clone(&connections));
        async move {
            let Some(stream) = shake_hands(&acceptor, &handshakes, stream, peer).await else { return };
            let Ok(_connection) = connections.try_acquire() else {
                return tracing::debug!(?peer, "too many connections to the webhook");
            };
            connection(stream, webhook, drain).await;
        }
    })
    .await;
}

async fn connection(stream: TlsStream<TcpStream>, webhook: Arc<Webhook>, drain: DrainWatcher) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(IDLE).max_concurrent_streams(MAX_STREAMS);
    let service = hyper::service::service_fn(move |request| {
        let webhook = Arc::clone(&webhook);
        async move { Ok::<_, Infallible>(webhook.answer(request).await) }
    });
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    // Nothing is lost by the branch not taken: the connection goes on below.
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = drain.draining() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "webhook connection ended");
    }
}

struct Webhook {
    knowledge: Knowledge,
    room: Semaphore,
    judges: Arc<Semaphore>,
}

impl Webhook {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let answered = tokio::time::timeout(PATIENCE, self.respond(request)).await.unwrap_or(Err(Unanswered::Late));
        let (status, kind, body) = match answered {
            Ok(body) => (StatusCode::OK, "application/json", Bytes::from(body)),
            Err(why) => {
                let status = why.status();
                metrics::counter!("galley_validation_http_error", "status" => status.as_str().to_owned()).increment(1);
                let text = why.text();
                tracing::debug!(%status, text, "question to the webhook");
                (status, "text/plain; charset=utf-8", Bytes::from(text + "\n"))
            }
        };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
        response
    }

    async fn respond(&self, request: Request<Incoming>) -> Result<Vec<u8>, Unanswered> {
        let (head, body) = request.into_parts();
        if head.uri.path() != PATH {
            return Err(Unanswered::NotFound);
        }
        if head.method != Method::POST {
            return Err(Unanswered::NotPost);
        }
        let text = |name: header::HeaderName| head.headers.get(name).and_then(|value| value.to_str().ok());
        if !text(header::CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/json")) {
            return Err(Unanswered::NotJson);
        }
        let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<usize>().ok());
        let length = length.ok_or(Unanswered::LengthUnknown)?;
        if length > LONGEST {
            return Err(Unanswered::TooLong);
        }
        let units = u32::try_from(length / 1024 + 1).map_err(|_| Unanswered::TooLong)?;
        let _room = self.room.acquire_many(units).await.map_err(|_| Unanswered::Failed)?;
        let body = Limited::new(body, length).collect().await;
        let body = body.map_err(|error| Unanswered::Unreadable(error.to_string()))?.to_bytes();
        let judge = Arc::clone(&self.judges).acquire_owned().await.map_err(|_| Unanswered::Failed)?;
        let knowledge = Arc::clone(&self.knowledge);
        // Whoever gives up waiting does not end it: it keeps its place among the judges until it is done.
        let judged = tokio::task::spawn_blocking(move || {
            let _judge = judge;
            answer(&knowledge, &body)
        });
        judged.await.unwrap_or_else(|_| {
            tracing::error!("judging an object panicked; the API server does without");
            Err(Unanswered::Failed)
        })
    }
}

/// The answer to the bytes of a question.
fn answer(knowledge: &Knowledge, body: &[u8]) -> Result<Vec<u8>, Unanswered> {
    if values(body) > MOST_VALUES {
        return Err(Unanswered::TooLong);
    }
    let unreadable = |error: serde_json::Error| Unanswered::Unreadable(format!("AdmissionReview: {error}"));
    let review: Review = serde_json::from_slice(body).map_err(unreadable)?;
    let mut request = review.request().map_err(Unanswered::Unreadable)?;
    let outcome = decide(&knowledge(), &mut request);
    let name = match &outcome {
        Outcome::Admitted { .. } => "galley_validation_passed",
        Outcome::Refused { .. } => "galley_validation_failed",
    };
    metrics::counter!(name).increment(1);
    if let Outcome::Refused { message } = &outcome {
        tracing::debug!(kind = request.kind.kind, namespace = request.namespace, why = message, "refused");
    }
    serde_json::to_vec(&Answer::new(request.uid, outcome)).map_err(unreadable)
}

/// No fewer than there are in a JSON text.
fn values(text: &[u8]) -> usize {
    1 + text.iter().filter(|byte| matches!(byte, b',' | b'[' | b':')).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_is_left_uncounted() {
        for (text, there) in [("[]", 1), ("[1,2,3]", 4), (r#"{"a":{"b":[1,{}]}}"#, 5), ("[[[[]]]]", 4)] {
            assert!(values(text.as_bytes()) >= there, "{text}");
        }
    }

    #[test]
    fn more_values_than_memory_is_kept_for_are_not_read() {
        let knowledge: Knowledge = Arc::new(super::super::Known::default);
        let many = format!("[{}0]", "0,".repeat(MOST_VALUES));
        assert_eq!(answer(&knowledge, many.as_bytes()), Err(Unanswered::TooLong));
    }
}
