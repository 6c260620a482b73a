//! One HTTPRoute match as a predicate and its place in the order of precedence.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, Method};
use percent_encoding::percent_decode_str;
use regex::Regex;

/// What of a request the rules look at. `path` is normalised and has no query.
#[derive(Debug, Clone, Copy)]
pub struct RequestHead<'a> {
    pub method: &'a Method,
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub headers: &'a HeaderMap,
}

#[derive(Debug, Clone)]
pub(super) enum PathMatch {
    Exact(String),
    /// Without a trailing `/`; empty matches all.
    Prefix(String),
    Regex(Regex),
}

#[derive(Debug, Clone)]
pub(super) enum ValueMatch {
    Exact(String),
    Regex(Regex),
}

impl ValueMatch {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(want) => want == value,
            Self::Regex(re) => re.is_match(value),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Matcher {
    pub(super) path: PathMatch,
    pub(super) method: Option<Method>,
    pub(super) headers: Vec<(HeaderName, ValueMatch)>,
    pub(super) query: Vec<(String, ValueMatch)>,
}

/// Gateway API precedence: greater wins.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    path_kind: u8,
    path_length: usize,
    method: bool,
    headers: usize,
    query: usize,
}

impl Matcher {
    pub(super) fn rank(&self) -> Rank {
        let (path_kind, path_length) = match &self.path {
            PathMatch::Exact(p) => (2, p.len()),
            PathMatch::Prefix(p) => (1, p.len()),
            PathMatch::Regex(re) => (0, re.as_str().len()),
        };
        Rank {
            path_kind,
            path_length,
            method: self.method.is_some(),
            headers: self.headers.len(),
            query: self.query.len(),
        }
    }

    pub(super) fn matches(&self, request: &RequestHead<'_>) -> bool {
        self.path_matches(request.path)
            && self.method.as_ref().is_none_or(|m| m == request.method)
            && self
                .headers
                .iter()
                .all(|(name, want)| header_value(request.headers, name).is_some_and(|v| want.matches(&v)))
            && (self.query.is_empty() || self.query_matches(request.query.unwrap_or_default()))
    }

    /// What `ReplacePrefixMatch` replaces; `/` for the prefix that matches everything.
    pub(super) fn prefix(&self) -> Option<&str> {
        match &self.path {
            PathMatch::Prefix(p) if p.is_empty() => Some("/"),
            PathMatch::Prefix(p) => Some(p),
            PathMatch::Exact(_) | PathMatch::Regex(_) => None,
        }
    }

    fn path_matches(&self, path: &str) -> bool {
        match &self.path {
            PathMatch::Exact(want) => want == path,
            PathMatch::Prefix(want) => {
                path.strip_prefix(want.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            PathMatch::Regex(re) => re.is_match(path),
        }
    }

    fn query_matches(&self, query: &str) -> bool {
        self.query.iter().all(|(name, want)| {
            // Only the first occurrence of a name counts.
            query_pairs(query).find(|(n, _)| n == name).is_some_and(|(_, v)| want.matches(&v))
        })
    }
}

/// The values of a header joined by commas, as the Gateway API compares repeated headers.
fn header_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.to_str().ok()?;
    let mut joined = Cow::Borrowed(first);
    for value in values {
        let text = joined.to_mut();
        text.push(',');
        text.push_str(value.to_str().ok()?);
    }
    Some(joined)
}

/// The decoded `name=value` pairs of a query string, in order.
pub fn query_pairs(query: &str) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decode(name), decode(value))
    })
}

fn decode(text: &str) -> Cow<'_, str> {
    if text.contains('+') {
        return Cow::Owned(percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned());
    }
    percent_decode_str(text).decode_utf8_lossy()
}
