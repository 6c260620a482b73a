//! From the wire resource to matchers: validation happens here, once, and a bad resource is refused whole with a reason
//! (the control plane sees it as a NACK) while all others go on.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, Method};
use mesh_proto::waypoint::{self as wire, backend, key_match, route_match};
use regex::{Regex, RegexBuilder};

use super::matching::{Matcher, PathMatch, ValueMatch};
use super::{Backend, CompiledRoute, Rule, Split, Target};
use crate::filter::{Filter, FilterError};

/// Compiled size in bytes above which a regular expression is refused: it bounds what one route can cost.
const REGEX_SIZE_LIMIT: usize = 1 << 20;

/// The longest timeout, which is what the Gateway API can write; with more than a clock can count, adding would panic.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(100_000 * 3600);

/// Why a route resource is refused.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("rule {rule}: {what} {value:?} is not valid")]
    Invalid { rule: usize, what: &'static str, value: String },
    #[error("rule {rule}: regular expression {pattern:?}: {source}")]
    Regex { rule: usize, pattern: String, source: Box<regex::Error> },
    #[error("rule {rule}: {source}")]
    Filter { rule: usize, source: FilterError },
    #[error("rule {rule}: {what} is missing")]
    Missing { rule: usize, what: &'static str },
}

impl CompiledRoute {
    /// # Errors
    /// The first thing in the resource that cannot be enforced.
    pub fn compile(route: &wire::Route) -> Result<Self, RouteError> {
        let namespace: Arc<str> = route.namespace.as_str().into();
        let parents = route
            .parents
            .iter()
            .map(|p| Ok((Arc::from(p.service.as_str()), port(0, "parent port", p.port)?)))
            .collect::<Result<_, _>>()?;
        let mut entries = Vec::new();
        for (index, rule) in route.rules.iter().enumerate() {
            let compiled = Arc::new(compile_rule(route, index, rule)?);
            // Without matches a rule takes everything (Gateway API: a prefix match on `/`).
            let everything = [wire::RouteMatch::default()];
            let matches = if rule.matches.is_empty() { &everything[..] } else { &rule.matches };
            for m in matches {
                entries.push((matcher(index, m)?, compiled.clone()));
            }
        }
        let full_name = format!("{}/{}", route.namespace, route.name);
        Ok(Self { namespace, created: route.created, full_name, parents, entries })
    }
}

fn compile_rule(route: &wire::Route, index: usize, rule: &wire::RouteRule) -> Result<Rule, RouteError> {
    let name = if rule.name.is_empty() {
        format!("{}.{}.{index}", route.namespace, route.name)
    } else {
        format!("{}.{}.{}", route.namespace, route.name, rule.name)
    };
    let backends =
        rule.backends.iter().map(|b| Ok((b.weight, backend(index, b)?))).collect::<Result<Vec<_>, RouteError>>()?;
    Ok(Rule {
        name: name.into(),
        filters: filters(index, &rule.filters)?,
        backends: Split::new(backends),
        request_timeout: duration(index, rule.request_timeout.as_ref())?,
        backend_timeout: duration(index, rule.backend_request_timeout.as_ref())?,
    })
}

fn backend(rule: usize, b: &wire::Backend) -> Result<Backend, RouteError> {
    let target = match &b.target {
        Some(backend::Target::Service(s)) => {
            Target::Service { service: s.service.as_str().into(), port: port(rule, "backend port", s.port)? }
        }
        Some(backend::Target::Invalid(why)) => Target::Invalid(why.as_str().into()),
        None => return Err(RouteError::Missing { rule, what: "backend target" }),
    };
    Ok(Backend { target, filters: filters(rule, &b.filters)? })
}

fn filters(rule: usize, list: &[wire::Filter]) -> Result<Vec<Filter>, RouteError> {
    list.iter().map(Filter::compile).collect::<Result<_, _>>().map_err(|source| RouteError::Filter { rule, source })
}

fn matcher(rule: usize, m: &wire::RouteMatch) -> Result<Matcher, RouteError> {
    let path = match &m.path {
        None => PathMatch::Prefix(String::new()),
        Some(route_match::Path::PathExact(p)) => PathMatch::Exact(p.clone()),
        Some(route_match::Path::PathPrefix(p)) => PathMatch::Prefix(p.trim_end_matches('/').to_owned()),
        Some(route_match::Path::PathRegex(p)) => PathMatch::Regex(full_match(rule, p)?),
    };
    let method = match m.method.as_str() {
        "" => None,
        text => Some(Method::from_bytes(text.as_bytes()).map_err(|_| RouteError::Invalid {
            rule,
            what: "method",
            value: text.to_owned(),
        })?),
    };
    let mut headers: Vec<(HeaderName, ValueMatch)> = Vec::new();
    for h in &m.headers {
        let name = HeaderName::from_bytes(h.name.as_bytes()).map_err(|_| RouteError::Invalid {
            rule,
            what: "header name",
            value: h.name.clone(),
        })?;
        // "a second entry with the same name is ignored" (Gateway API).
        if headers.iter().all(|(n, _)| *n != name) {
            headers.push((name, value_match(rule, h)?));
        }
    }
    let mut query: Vec<(String, ValueMatch)> = Vec::new();
    for q in &m.query_params {
        if query.iter().all(|(n, _)| *n != q.name) {
            query.push((q.name.clone(), value_match(rule, q)?));
        }
    }
    Ok(Matcher { path, method, headers, query })
}

fn value_match(rule: usize, m: &wire::KeyMatch) -> Result<ValueMatch, RouteError> {
    match &m.value {
        Some(key_match::Value::Exact(v)) => Ok(ValueMatch::Exact(v.clone())),
        Some(key_match::Value::Regex(v)) => Ok(ValueMatch::Regex(full_match(rule, v)?)),
        None => Err(RouteError::Missing { rule, what: "match value" }),
    }
}

/// RE2 semantics, anchored at both ends.
fn full_match(rule: usize, pattern: &str) -> Result<Regex, RouteError> {
    let build = |pattern: &str| RegexBuilder::new(pattern).size_limit(REGEX_SIZE_LIMIT).build();
    // By itself first: one that closes the group would match anywhere.
    build(pattern).and_then(|_| build(&format!("^(?:{pattern})$"))).map_err(|source| RouteError::Regex {
        rule,
        pattern: pattern.to_owned(),
        source: Box::new(source),
    })
}

fn port(rule: usize, what: &'static str, value: u32) -> Result<u16, RouteError> {
    u16::try_from(value).map_err(|_| RouteError::Invalid { rule, what, value: value.to_string() })
}

fn duration(rule: usize, value: Option<&prost_types::Duration>) -> Result<Option<Duration>, RouteError> {
    let Some(value) = value else { return Ok(None) };
    let bad = || RouteError::Invalid { rule, what: "timeout", value: format!("{value:?}") };
    let d = Duration::try_from(*value).ok().filter(|d| *d <= LONGEST_TIMEOUT).ok_or_else(bad)?;
    Ok((!d.is_zero()).then_some(d))
}
