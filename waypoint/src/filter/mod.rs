//! HTTPRoute filters: one file for each, compiled from the wire form and applied in the order the user wrote them.
//!
//! A filter either changes the request, changes the response, or answers by itself (redirect). None of them does I/O.

mod headers;
mod path;
mod redirect;

#[cfg(test)]
mod tests;

use http::{HeaderMap, Uri, uri::Authority};
use mesh_proto::waypoint::{self as wire, filter as oneof};

pub use headers::HeaderModifier;
pub use path::PathModifier;
pub use redirect::{Redirect, RedirectContext};

/// Why a filter is refused.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("filter without a kind")]
    Unknown,
    #[error("{what} {value:?} is not valid")]
    Invalid { what: &'static str, value: String },
}

#[derive(Debug)]
pub enum Filter {
    RequestHeaders(HeaderModifier),
    ResponseHeaders(HeaderModifier),
    Redirect(Redirect),
    Rewrite(Rewrite),
}

/// URLRewrite: what the upstream sees instead.
#[derive(Debug)]
pub struct Rewrite {
    pub hostname: Option<Authority>,
    pub path: Option<PathModifier>,
}

impl Filter {
    /// # Errors
    /// Names, values or status codes that HTTP does not allow.
    pub fn compile(filter: &wire::Filter) -> Result<Self, FilterError> {
        match filter.filter.as_ref().ok_or(FilterError::Unknown)? {
            oneof::Filter::RequestHeaders(m) => HeaderModifier::compile(m).map(Self::RequestHeaders),
            oneof::Filter::ResponseHeaders(m) => HeaderModifier::compile(m).map(Self::ResponseHeaders),
            oneof::Filter::Redirect(r) => Redirect::compile(r).map(Self::Redirect),
            oneof::Filter::Rewrite(r) => Ok(Self::Rewrite(Rewrite {
                hostname: authority(&r.hostname)?,
                path: r.path.as_ref().map(PathModifier::compile).transpose()?,
            })),
        }
    }
}

/// The parts of a request that filters may change.
#[derive(Debug)]
pub struct Upstream<'a> {
    pub uri: &'a mut Uri,
    pub headers: &'a mut HeaderMap,
}

/// Applies the request side of `filters`. Redirects have been answered before this point.
pub fn apply_request(filters: &[Filter], prefix: Option<&str>, request: Upstream<'_>) {
    for filter in filters {
        match filter {
            Filter::RequestHeaders(m) => m.apply(request.headers),
            Filter::Rewrite(r) => r.apply(prefix, request.uri, request.headers),
            Filter::ResponseHeaders(_) | Filter::Redirect(_) => {}
        }
    }
}

/// Applies the response side of `filters`.
pub fn apply_response(filters: &[Filter], headers: &mut HeaderMap) {
    for filter in filters {
        if let Filter::ResponseHeaders(m) = filter {
            m.apply(headers);
        }
    }
}

/// The first redirect of a rule, if it has one: such a rule has no backends.
pub fn redirect(filters: &[Filter]) -> Option<&Redirect> {
    filters.iter().find_map(|f| if let Filter::Redirect(r) = f { Some(r) } else { None })
}

impl Rewrite {
    fn apply(&self, prefix: Option<&str>, uri: &mut Uri, headers: &mut HeaderMap) {
        if let Some(path) = &self.path {
            let before = uri.path().to_owned();
            let after = path.apply(&before, prefix);
            let target = match uri.query() {
                Some(query) => format!("{after}?{query}"),
                None => after,
            };
            // Both halves were valid in a URI before; a value that is not leaves the path as it was.
            if let Ok(target) = target.parse() {
                let mut parts = std::mem::take(uri).into_parts();
                parts.path_and_query = Some(target);
                *uri = Uri::from_parts(parts).unwrap_or_default();
                if let Ok(value) = before.parse() {
                    headers.insert("x-envoy-original-path", value);
                }
            }
        }
        if let Some(host) = &self.hostname {
            let mut parts = std::mem::take(uri).into_parts();
            if parts.authority.is_some() {
                parts.authority = Some(host.clone());
            }
            *uri = Uri::from_parts(parts).unwrap_or_default();
            if let Ok(value) = host.as_str().parse() {
                headers.insert(http::header::HOST, value);
            }
        }
    }
}

fn authority(text: &str) -> Result<Option<Authority>, FilterError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| FilterError::Invalid { what: "hostname", value: text.to_owned() })
}
