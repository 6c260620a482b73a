//! What happens to a request's head before policy sees it, and to heads on their way between HTTP versions.
//!
//! Policy, routes and the upstream must read the same request: whatever two parsers could read differently is refused or
//! made plain here, once.

use http::header::{
    CONNECTION, COOKIE, EXPECT, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, StatusCode, Uri, Version};

use crate::path;
use crate::reply::Reply;

/// Headers that speak of one connection (RFC 9110 7.6.1), besides those `Connection` names.
const HOP_BY_HOP: [HeaderName; 6] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Headers by which a proxy in front is told what to do: from a client of the mesh they are not to be believed.
const FROM_CLIENTS: [&str; 8] = [
    "x-forwarded-client-cert",
    "x-istio-source",
    "x-forwarded-network",
    "x-envoy-peer-metadata",
    "x-envoy-peer-metadata-id",
    "x-envoy-retry-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-rq-timeout-ms",
];

/// A request that means one thing only: the URI is its normalised path and query, the authority stands in `Host`.
#[derive(Debug, PartialEq, Eq)]
pub struct Prepared {
    pub authority: String,
    /// A WebSocket handshake; its `Connection` and `Upgrade` headers are kept.
    pub websocket: bool,
}

/// Checks and normalises.
///
/// # Errors
/// The answer for a request that is refused.
pub fn prepare(parts: &mut Parts) -> Result<Prepared, Reply> {
    if parts.version < Version::HTTP_11 {
        return Err(Reply::status(StatusCode::UPGRADE_REQUIRED, "low_version"));
    }
    if parts.method == Method::CONNECT {
        return Err(Reply::status(StatusCode::METHOD_NOT_ALLOWED, "connect_not_allowed"));
    }
    let authority = authority(parts)?;
    let websocket = is_websocket(parts);
    parts.uri = target(&parts.uri, &parts.method)?;
    strip_hop_by_hop(&mut parts.headers, websocket);
    join_cookies(&mut parts.headers);
    for name in FROM_CLIENTS {
        parts.headers.remove(name);
    }
    let host = HeaderValue::from_str(&authority).map_err(|_| Reply::bad_request("invalid_authority"))?;
    parts.headers.insert(HOST, host);
    Ok(Prepared { authority, websocket })
}

/// The authority a request is for. An absolute target wins over Host; without either, or with several, it has none.
fn authority(parts: &Parts) -> Result<String, Reply> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Reply::bad_request("duplicate_host"));
    }
    let text = match (parts.uri.authority(), host) {
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host.to_str().map_err(|_| Reply::bad_request("invalid_host"))?,
        (None, None) => return Err(Reply::bad_request("missing_host_header")),
    };
    if text.contains('@') || text.parse::<Authority>().is_err() {
        return Err(Reply::bad_request("invalid_authority"));
    }
    Ok(text.to_owned())
}

fn target(uri: &Uri, method: &Method) -> Result<Uri, Reply> {
    if uri.path() == "*" && method == Method::OPTIONS {
        return Ok(Uri::from_static("*"));
    }
    let path = path::normalise(uri.path()).map_err(|_| Reply::bad_request("path_normalization_failed"))?;
    let target = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.into_owned(),
    };
    let target: PathAndQuery = target.parse().map_err(|_| Reply::bad_request("path_normalization_failed"))?;
    Ok(Uri::from(target))
}

fn is_websocket(parts: &Parts) -> bool {
    let names = |name: HeaderName, token: &str| {
        parts
            .headers
            .get_all(name)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
    };
    parts.version == Version::HTTP_11 && names(CONNECTION, "upgrade") && names(UPGRADE, "websocket")
}

/// Removes what must not cross a proxy, on requests and responses alike. `TE: trailers` may pass.
pub fn strip_hop_by_hop(headers: &mut HeaderMap, keep_upgrade: bool) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|t| t.trim().parse().ok())
        .collect();
    for name in named {
        if !(keep_upgrade && name == UPGRADE) {
            headers.remove(name);
        }
    }
    let upgrades = keep_upgrade && headers.contains_key(UPGRADE);
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    if headers.get_all(TE).iter().any(|v| v != "trailers") {
        headers.remove(TE);
    }
    if upgrades {
        // Nothing else the client may have named: whoever chose h2c would read requests that no policy has seen.
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    }
}

/// HTTP/2 splits cookies into crumbs for compression; everyone else reads one line.
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// Makes a prepared head one of HTTP/1.1: origin-form target, `Host` as it stands.
pub fn to_h1(parts: &mut Parts) {
    parts.version = Version::HTTP_11;
}

/// Makes a prepared head one of HTTP/2: the authority moves from `Host` into the URI.
pub fn to_h2(parts: &mut Parts) {
    parts.version = Version::HTTP_2;
    let host = parts.headers.remove(HOST);
    parts.headers.remove(EXPECT);
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.authority = host.and_then(|h| h.to_str().ok()?.parse().ok());
    uri.scheme = Some(Scheme::HTTP);
    parts.uri = Uri::from_parts(uri).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(request: http::request::Builder) -> Parts {
        request.body(()).expect("request").into_parts().0
    }

    #[test]
    fn heads_come_out_plain() {
        let mut p = parts(
            Request::get("http://shop.example/a/../b?x=1")
                .header("host", "ignored")
                .header("connection", "close, x-private")
                .header("x-private", "1")
                .header("te", "gzip")
                .header("upgrade", "h2c")
                .header("cookie", "a=1")
                .header("cookie", "b=2")
                .header("x-forwarded-client-cert", "forged"),
        );
        let prepared = prepare(&mut p).expect("fine");
        assert_eq!((prepared.authority.as_str(), prepared.websocket), ("shop.example", false));
        assert_eq!(p.uri, "/b?x=1");
        let names: Vec<_> = p.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["host", "cookie"]);
        assert_eq!(p.headers["host"], "shop.example");
        assert_eq!(p.headers["cookie"], "a=1; b=2");
        to_h2(&mut p);
        assert_eq!(p.uri, "http://shop.example/b?x=1");
        assert!(!p.headers.contains_key(HOST));
    }

    #[test]
    fn a_websocket_handshake_keeps_its_upgrade_and_no_other() {
        let mut p = parts(
            Request::get("/chat")
                .header("host", "h")
                .header("connection", "keep-alive, Upgrade")
                .header("upgrade", "WebSocket"),
        );
        assert!(prepare(&mut p).expect("fine").websocket);
        let upgrade =
            |p: &Parts| [CONNECTION, UPGRADE].map(|name| p.headers.get_all(name).iter().cloned().collect::<Vec<_>>());
        assert_eq!(upgrade(&p), [["upgrade"], ["websocket"]]);
        let smuggled = Request::get("/chat").header("host", "h").header("connection", "upgrade, http2-settings");
        let smuggled =
            smuggled.header("http2-settings", "AAMAAABk").header("upgrade", "h2c").header("upgrade", "websocket");
        let mut p = parts(smuggled);
        assert!(prepare(&mut p).expect("fine").websocket);
        assert_eq!(upgrade(&p), [["upgrade"], ["websocket"]], "nothing but what was asked about is passed on");
        assert!(!p.headers.contains_key("http2-settings"));
    }

    #[test]
    fn what_is_ambiguous_is_refused() {
        let refused =
            |request: http::request::Builder| prepare(&mut parts(request)).expect_err("refused").status.as_u16();
        assert_eq!(refused(Request::get("/")), 400);
        assert_eq!(refused(Request::get("/").header("host", "a").header("host", "b")), 400);
        assert_eq!(refused(Request::get("/").header("host", "user@a")), 400);
        assert_eq!(refused(Request::get("/%zz").header("host", "a")), 400);
        assert_eq!(refused(Request::get("/").version(Version::HTTP_10).header("host", "a")), 426);
        assert_eq!(refused(Request::connect("a:1").header("host", "a")), 405);
    }
}
