//! The body of a response on its way to the client: counted, bounded in time, and telling the record when it ends.
//!
//! Metrics and the access log are written when the stream ends, trailers seen, and not at headers.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error("the request's time is up")]
    Deadline,
}

/// Any body the waypoint passes on.
pub struct Body(UnsyncBoxBody<Bytes, BodyError>);

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Body")
    }
}

impl Body {
    pub fn empty() -> Self {
        Self(Empty::new().map_err(|never| match never {}).boxed_unsync())
    }

    pub fn full(bytes: Bytes) -> Self {
        Self(Full::new(bytes).map_err(|never| match never {}).boxed_unsync())
    }

    pub fn incoming(body: Incoming) -> Self {
        Self(body.map_err(BodyError::Http).boxed_unsync())
    }

    /// Wraps `body`; `bytes` counts along, and `end` is called exactly once with how it ended.
    pub fn watched(
        body: Self,
        deadline: Option<Instant>,
        bytes: Arc<AtomicU64>,
        end: impl FnOnce(End) + Send + 'static,
    ) -> Self {
        let deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at)));
        let watched = Watched { inner: body, deadline, bytes, grpc_status: None, end: Some(Box::new(end)) };
        Self(UnsyncBoxBody::new(watched))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

/// How a body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    pub how: How,
    pub bytes: u64,
    /// `grpc-status` of the trailers.
    pub grpc_status: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Complete,
    /// The side that sends the body broke off.
    Broken,
    Deadline,
    /// The reader went away.
    Dropped,
}

struct Watched {
    inner: Body,
    deadline: Option<Pin<Box<Sleep>>>,
    bytes: Arc<AtomicU64>,
    grpc_status: Option<u16>,
    end: Option<Box<dyn FnOnce(End) + Send>>,
}

impl Watched {
    fn finish(&mut self, how: How) {
        if let Some(end) = self.end.take() {
            end(End { how, bytes: self.bytes.load(Ordering::Relaxed), grpc_status: self.grpc_status });
        }
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            this.finish(How::Deadline);
            return Poll::Ready(Some(Err(BodyError::Deadline)));
        }
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        match &frame {
            None => this.finish(How::Complete),
            Some(Err(_)) => this.finish(How::Broken),
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                }
                if let Some(trailers) = frame.trailers_ref() {
                    this.grpc_status = grpc_status(trailers);
                }
                // Readers stop polling once the length is used up or trailers are seen.
                if this.inner.is_end_stream() {
                    this.finish(How::Complete);
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let how = if self.inner.is_end_stream() { How::Complete } else { How::Dropped };
        self.finish(how);
    }
}

/// gRPC's UNKNOWN; also what codes that gRPC does not define stand for.
const GRPC_UNKNOWN: u16 = 2;
const GRPC_LAST: u16 = 16;

/// The `grpc-status` of headers or trailers. It becomes a label, so an application cannot make up codes.
pub fn grpc_status(headers: &http::HeaderMap) -> Option<u16> {
    let text = headers.get("grpc-status")?.to_str().ok();
    Some(text.and_then(|t| t.parse().ok()).filter(|code| *code <= GRPC_LAST).unwrap_or(GRPC_UNKNOWN))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;

    fn watch(body: Body, deadline: Option<Instant>) -> (Body, Arc<Mutex<Vec<End>>>) {
        let ends: Arc<Mutex<Vec<End>>> = Arc::default();
        let seen = ends.clone();
        (Body::watched(body, deadline, Arc::default(), move |end| seen.lock().expect("lock").push(end)), ends)
    }

    #[tokio::test]
    async fn the_end_is_told_once_with_the_bytes() {
        let (body, ends) = watch(Body::full(Bytes::from_static(b"hello")), None);
        assert_eq!(body.collect().await.expect("body").to_bytes(), "hello");
        assert_eq!(*ends.lock().expect("lock"), [End { how: How::Complete, bytes: 5, grpc_status: None }]);
    }

    #[tokio::test]
    async fn a_dropped_body_and_an_empty_one_are_told_apart() {
        let (body, ends) = watch(Body::full(Bytes::from_static(b"hello")), None);
        drop(body);
        assert_eq!(ends.lock().expect("lock")[0].how, How::Dropped);
        let (body, ends) = watch(Body::empty(), None);
        drop(body);
        assert_eq!(ends.lock().expect("lock")[0].how, How::Complete);
    }

    #[test]
    fn grpc_codes_are_those_that_grpc_knows() {
        let of = |value: &'static str| {
            grpc_status(
                &[(http::HeaderName::from_static("grpc-status"), value.parse().expect("value"))].into_iter().collect(),
            )
        };
        assert_eq!((of("0"), of("16"), of("17"), of("x")), (Some(0), Some(16), Some(2), Some(2)));
        assert_eq!(grpc_status(&http::HeaderMap::new()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_breaks_a_body_that_stalls() {
        struct Stalled;
        impl http_body::Body for Stalled {
            type Data = Bytes;
            type Error = BodyError;
            fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
                Poll::Pending
            }
        }
        let at = Instant::now() + Duration::from_secs(1);
        let (body, ends) = watch(Body(UnsyncBoxBody::new(Stalled)), Some(at));
        assert!(matches!(body.collect().await, Err(BodyError::Deadline)));
        assert_eq!(ends.lock().expect("lock")[0].how, How::Deadline);
    }
}
