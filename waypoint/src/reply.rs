//! Answers the waypoint gives itself, with Envoy's status, body, flag and details, and their gRPC form.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use crate::body::Body;

/// Response flags of the L7 access log and metrics, in Envoy's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flag {
    None,
    NoRoute,
    NoCluster,
    NoHealthyUpstream,
    UpstreamConnectFailure,
    UpstreamConnectionTermination,
    UpstreamRemoteReset,
    UpstreamProtocolError,
    UpstreamRequestTimeout,
    DownstreamProtocolError,
    DownstreamConnectionTermination,
}

impl Flag {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::NoRoute => "NR",
            Self::NoCluster => "NC",
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamConnectFailure => "UF",
            Self::UpstreamConnectionTermination => "UC",
            Self::UpstreamRemoteReset => "UR",
            Self::UpstreamProtocolError => "UPE",
            Self::UpstreamRequestTimeout => "UT",
            Self::DownstreamProtocolError => "DPE",
            Self::DownstreamConnectionTermination => "DC",
        }
    }
}

/// A local answer: what the client gets and what the log says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: StatusCode,
    pub body: Cow<'static, str>,
    pub flag: Flag,
    pub details: Cow<'static, str>,
    pub location: Option<String>,
}

impl Reply {
    fn new(status: StatusCode, body: impl Into<Cow<'static, str>>, flag: Flag, details: &'static str) -> Self {
        Self { status, body: body.into(), flag, details: details.into(), location: None }
    }

    pub fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "", Flag::NoRoute, "route_not_found")
    }

    /// A backend that does not exist takes its share as 500 (Gateway API), not 503.
    pub fn invalid_backend() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "", Flag::NoCluster, "cluster_not_found")
    }

    pub fn no_healthy_upstream() -> Self {
        let body = "no healthy upstream";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, body, Flag::NoHealthyUpstream, "no_healthy_upstream")
    }

    pub fn connect_failure(cause: &str) -> Self {
        let body = format!(
            "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, \
             transport failure reason: {cause}"
        );
        let details = "upstream_reset_before_response_started{remote_connection_failure}";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, body, Flag::UpstreamConnectFailure, details)
    }

    pub fn upstream_closed() -> Self {
        let body = "upstream connect error or disconnect/reset before headers. reset reason: connection termination";
        let details = "upstream_reset_before_response_started{connection_termination}";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, body, Flag::UpstreamConnectionTermination, details)
    }

    pub fn upstream_reset() -> Self {
        let body = "upstream connect error or disconnect/reset before headers. reset reason: remote reset";
        let details = "upstream_reset_before_response_started{remote_reset}";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, body, Flag::UpstreamRemoteReset, details)
    }

    pub fn upstream_protocol_error() -> Self {
        let body = "upstream connect error or disconnect/reset before headers. reset reason: protocol error";
        let details = "upstream_reset_before_response_started{protocol_error}";
        Self::new(StatusCode::BAD_GATEWAY, body, Flag::UpstreamProtocolError, details)
    }

    pub fn timeout() -> Self {
        let flag = Flag::UpstreamRequestTimeout;
        Self::new(StatusCode::GATEWAY_TIMEOUT, "upstream request timeout", flag, "response_timeout")
    }

    pub fn denied(details: String) -> Self {
        let details = details.into();
        let body = "RBAC: access denied".into();
        Self { status: StatusCode::FORBIDDEN, body, flag: Flag::None, details, location: None }
    }

    pub fn bad_request(details: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "Bad Request", Flag::DownstreamProtocolError, details)
    }

    /// The client's own body broke the protocol, or off.
    pub fn broken_body() -> Self {
        Self::bad_request("request_body_broken")
    }

    pub fn status(status: StatusCode, details: &'static str) -> Self {
        Self::new(status, status.canonical_reason().unwrap_or_default(), Flag::DownstreamProtocolError, details)
    }

    pub fn redirect(status: StatusCode, location: String) -> Self {
        Self { location: Some(location), ..Self::new(status, "", Flag::None, "direct_response") }
    }

    /// The response for an ordinary client, or its gRPC form for a request with a gRPC content type.
    pub fn into_response(self, grpc: bool) -> Response<Body> {
        if grpc { self.grpc_response() } else { self.http_response() }
    }

    fn http_response(self) -> Response<Body> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_LENGTH, self.body.len().into());
        if !self.body.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        if let Some(location) = self.location.and_then(|l| HeaderValue::from_str(&l).ok()) {
            headers.insert(LOCATION, location);
        }
        let mut response = Response::new(Body::full(Bytes::from(self.body.into_owned())));
        *response.status_mut() = self.status;
        *response.headers_mut() = headers;
        response
    }

    /// Trailers-only: HTTP 200 with the status in headers (gRPC over HTTP/2, "Responses").
    fn grpc_response(self) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", grpc_status(self.status).into());
        if !self.body.is_empty() {
            let message = utf8_percent_encode(&self.body, GRPC_MESSAGE).to_string();
            if let Ok(value) = HeaderValue::from_str(&message) {
                headers.insert("grpc-message", value);
            }
        }
        response
    }
}

/// `grpc-message` escapes everything but printable ASCII, and the percent sign itself.
const GRPC_MESSAGE: &AsciiSet = &CONTROLS.add(b'%');

/// HTTP status to gRPC status (gRPC's own mapping for proxies).
pub fn grpc_status(status: StatusCode) -> u16 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// Whether a request speaks gRPC.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("application/grpc"))
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_is_19_bytes_of_text_and_grpc_status_7() {
        let reply = Reply::denied("x".into());
        let http = reply.clone().into_response(false);
        assert_eq!((http.status().as_u16(), &http.headers()["content-length"]), (403, &HeaderValue::from(19)));
        let grpc = reply.into_response(true);
        assert_eq!((grpc.status().as_u16(), &grpc.headers()["grpc-status"]), (200, &HeaderValue::from(7)));
        assert_eq!(grpc.headers()["grpc-message"], "RBAC: access denied");
    }

    #[test]
    fn grpc_is_recognised_by_its_content_type() {
        for (value, want) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            let headers: HeaderMap = [(CONTENT_TYPE, HeaderValue::from_static(value))].into_iter().collect();
            assert_eq!(is_grpc(&headers), want, "{value}");
        }
    }
}
