//! HTTPRoute with Services or ServiceEntries as parents → one resolved route for the waypoints of those.
//!
//! A rule we cannot carry out is not skipped: requests that match it are answered 500, and the status names the field.

use std::collections::{BTreeMap, BTreeSet};

use http::header::HOST;
use http::uri::{Authority, PathAndQuery};
use http::{HeaderName, HeaderValue};
use mesh_proto::waypoint::{
    Backend, Filter, Header, HeaderModifier, KeyMatch, Parent, PathModifier, Redirect, Rewrite, Route, RouteMatch,
    RouteRule, ServicePort, backend, filter, key_match, path_modifier, route_match,
};
use prost_types::Duration;

use super::binding::{self, Binding, TrafficType};
use super::regular_expression::{self, Unfit};
use super::service_entry;
use super::verdict::{ParentReport, Status, Wanted, joined};
use super::world::World;
use crate::types::gateway::{self as api, HttpRouteSpec, ParentRef};
use crate::types::{Key, Lenient, Object, Service, created};

/// Parents we report on, the route if any parent takes it, and the waypoints that carry it out.
#[derive(Debug, Default)]
pub struct Translated {
    pub route: Option<Route>,
    pub waypoints: BTreeSet<Key>,
    pub parents: Vec<ParentReport>,
}

pub fn translate(world: &World, object: &Object<HttpRouteSpec>, bindings: &BTreeMap<Key, Binding>) -> Translated {
    let spec = match &object.spec {
        Ok(spec) => spec,
        // Without a readable parentRef there is nobody to report to; with one, say it there.
        Err(_) => return Translated::default(),
    };
    let mut problems = Problems::default();
    let rules: Vec<RouteRule> = match &spec.rules {
        Some(rules) => {
            rules.iter().enumerate().filter_map(|(index, rule)| self::rule(world, object, index, rule, &mut problems))
        }
        .collect(),
        None => vec![RouteRule { matches: vec![match_all()], ..RouteRule::default() }],
    };
    let resolved = problems.resolved_refs();
    let whole = problems.accepted(spec.rules.as_ref().map_or(1, Vec::len));
    let mut translated = Translated::default();
    let mut parents = Vec::new();
    for parent_ref in spec.parent_refs.iter().filter(|parent| is_service(parent) || is_service_entry(parent)) {
        let taken = match is_service(parent_ref) {
            true => of_service(world, object, parent_ref, bindings),
            false => of_entry(world, object, parent_ref),
        };
        let (mut conditions, waypoints) = match taken {
            Ok((taken, waypoints)) => {
                let (accepted, partial) = &whole;
                let conditions: Vec<Wanted> = std::iter::once(accepted).chain(partial).cloned().collect();
                parents.extend(taken);
                (conditions, Some(waypoints))
            }
            Err(message) => (vec![Wanted::new("Accepted", Status::False, "NoMatchingParent", message)], None),
        };
        conditions.push(resolved.clone());
        conditions.extend(waypoints.as_deref().map(waypoint_condition));
        let waypoints = waypoints.unwrap_or_default();
        translated.waypoints.extend(waypoints);
        let parent = serde_json::to_value(parent_ref).unwrap_or_default();
        translated.parents.push(ParentReport { parent, conditions });
    }
    if !parents.is_empty() && !translated.waypoints.is_empty() {
        translated.route = Some(Route {
            name: object.name().to_owned(),
            namespace: object.namespace().to_owned(),
            created: created(&object.meta),
            parents,
            rules,
        });
    }
    translated
}

fn is_service(parent: &ParentRef) -> bool {
    matches!(parent.group.as_deref(), Some("" | "core")) && parent.kind.as_deref() == Some("Service")
}

fn is_service_entry(parent: &ParentRef) -> bool {
    parent.group.as_deref() == Some("networking.istio.io") && parent.kind.as_deref() == Some("ServiceEntry")
}

/// What takes the route, and the waypoints that carry it out; or why nothing does.
type Taken = Result<(Vec<Parent>, Vec<Key>), String>;

fn of_service(
    world: &World,
    route: &Object<HttpRouteSpec>,
    parent: &ParentRef,
    bindings: &BTreeMap<Key, Binding>,
) -> Taken {
    let key = parent_key(route, parent);
    let service = world.services.get(&key).ok_or_else(|| format!("Service {key} does not exist"))?;
    if service.is_external() {
        return Err(format!("Service {key} is an ExternalName"));
    }
    if service.is_headless() {
        return Err(format!("Service {key} is headless: no address to attach to"));
    }
    if let Some(port) = parent.port
        && !has_port(service, port)
    {
        return Err(format!("Service {key} has no port {port}"));
    }
    if parent.section_name.is_some() {
        return Err("parentRefs: sectionName of a Service is not supported (use port)".into());
    }
    let waypoints = bindings.get(&key).map(|binding| existing(world, binding)).unwrap_or_default();
    Ok((vec![parent_of(world.service_name(&key), parent)], waypoints))
}

/// Each of its hosts takes the route.
fn of_entry(world: &World, route: &Object<HttpRouteSpec>, parent: &ParentRef) -> Taken {
    let key = parent_key(route, parent);
    let entry = world.service_entries.get(&key).ok_or_else(|| format!("ServiceEntry {key} does not exist"))?;
    let spec = entry.spec.as_ref().map_err(|_| format!("ServiceEntry {key} cannot be read"))?;
    if let Some(port) = parent.port
        && !spec.ports.iter().any(|found| matches!(found, Lenient::Good(found) if found.number == port))
    {
        return Err(format!("ServiceEntry {key} has no port {port}"));
    }
    if parent.section_name.is_some() {
        return Err("parentRefs: sectionName of a ServiceEntry is not supported (use port)".into());
    }
    let binding = binding::resolve(world, &entry.meta, TrafficType::Entry);
    let names = spec.hosts.iter().map(|host| service_entry::names(&key.namespace, host).1);
    Ok((names.map(|name| parent_of(name, parent)).collect(), existing(world, &binding)))
}

fn parent_key(route: &Object<HttpRouteSpec>, parent: &ParentRef) -> Key {
    Key::new(parent.namespace.as_deref().unwrap_or(route.namespace()), parent.name.as_str())
}

fn parent_of(service: String, parent: &ParentRef) -> Parent {
    Parent { service, port: parent.port.unwrap_or_default().into() }
}

fn existing(world: &World, binding: &Binding) -> Vec<Key> {
    binding.waypoints().filter(|waypoint| world.gateways.contains_key(*waypoint)).cloned().collect()
}

fn waypoint_condition(waypoints: &[Key]) -> Wanted {
    match waypoints {
        [_, ..] => {
            let names: Vec<String> = waypoints.iter().map(ToString::to_string).collect();
            let message = format!("carried out by {}", names.join(" and "));
            Wanted::new("ResolvedWaypoints", Status::True, "ResolvedWaypoints", message)
        }
        [] => Wanted::new(
            "ResolvedWaypoints",
            Status::False,
            "MissingUseWaypointLabel",
            "the Service is bound to no waypoint that exists, so the route does nothing (label istio.io/use-waypoint)",
        ),
    }
}

fn has_port(service: &Service, number: u16) -> bool {
    service.ports().iter().any(|port| port.number == i32::from(number))
}

/// Nothing can be told to be a request of such a rule.
const LEFT_OUT: &str = " (the rule is left out)";

#[derive(Default)]
struct Problems {
    /// What is wrong with rules, in their order.
    rules: Vec<String>,
    /// How many rules are not carried out at all.
    refused: usize,
    /// Regular expressions that were looked at.
    expressions: usize,
    /// Reason and text of backend references that lead nowhere.
    backends: Vec<(&'static str, String)>,
}

impl Problems {
    fn rule(&mut self, index: usize, problem: String) {
        self.rules.push(format!("rules[{index}]{problem}"));
    }

    fn resolved_refs(&self) -> Wanted {
        match self.backends.first() {
            None => Wanted::new("ResolvedRefs", Status::True, "ResolvedRefs", "All references resolved"),
            Some((reason, _)) => {
                let all: Vec<&str> = self.backends.iter().map(|(_, message)| message.as_str()).collect();
                Wanted::new("ResolvedRefs", Status::False, reason, joined(&all))
            }
        }
    }

    /// `Accepted`, and `PartiallyInvalid` where it applies.
    fn accepted(&self, rules: usize) -> (Wanted, Option<Wanted>) {
        let message = joined(&self.rules);
        if self.rules.is_empty() {
            (Wanted::new("Accepted", Status::True, "Accepted", "Route was valid"), None)
        } else if self.refused >= rules {
            (Wanted::new("Accepted", Status::False, "UnsupportedValue", message), None)
        } else {
            let partial =
                Wanted::new("PartiallyInvalid", Status::True, "UnsupportedValue", format!("Dropped Rule: {message}"));
            (Wanted::new("Accepted", Status::True, "Accepted", "Route was valid in part"), Some(partial))
        }
    }
}

/// `None`: no match of the rule can be read, so no request can be told to be its.
fn rule(
    world: &World,
    route: &Object<HttpRouteSpec>,
    index: usize,
    rule: &Lenient<api::HttpRouteRule>,
    problems: &mut Problems,
) -> Option<RouteRule> {
    let rule = match rule {
        Lenient::Good(rule) => rule,
        Lenient::Bad(reason) => {
            problems.rule(index, format!(": {reason}{LEFT_OUT}"));
            problems.refused += 1;
            return None;
        }
    };
    let mut bad = Vec::new();
    let mut matches = Vec::new();
    for (number, found) in rule.matches.iter().enumerate() {
        match good(found).and_then(|found| route_match(found, &mut problems.expressions)) {
            Ok(found) => matches.push(found),
            Err(reason) => bad.push(format!("matches[{number}]: {reason} (the match is left out)")),
        }
    }
    if rule.matches.is_empty() {
        matches.push(match_all());
    }
    let partly_matched = bad.len();
    let mut filters = Vec::new();
    for (number, found) in rule.filters.iter().enumerate() {
        match good(found).and_then(|found| filter(found, FilterPlace::Rule(rule))) {
            Ok(found) => filters.push(found),
            Err(reason) => bad.push(format!("filters[{number}]: {reason}")),
        }
    }
    let redirects = filters.iter().any(|found| matches!(found.filter, Some(filter::Filter::Redirect(_))));
    let rewrites = filters.iter().any(|found| matches!(found.filter, Some(filter::Filter::Rewrite(_))));
    if redirects && (rewrites || !rule.backend_refs.is_empty()) {
        bad.push("filters: RequestRedirect goes with neither URLRewrite nor backendRefs".into());
    }
    let mut backends = Vec::new();
    for (number, found) in rule.backend_refs.iter().enumerate() {
        let place = format!("rules[{index}].backendRefs[{number}]");
        match good(found) {
            Ok(found) => match backend(world, route, &place, found, problems) {
                Ok(found) => backends.push(found),
                Err(reason) => bad.push(format!("backendRefs[{number}].{reason}")),
            },
            Err(reason) => bad.push(format!("backendRefs[{number}]: {reason}")),
        }
    }
    let mut timeout = |field: &str, value: &Option<String>| match value.as_deref().map(duration) {
        None => None,
        Some(Ok(found)) => found,
        Some(Err(reason)) => {
            bad.push(format!("timeouts.{field}: {reason}"));
            None
        }
    };
    let request_timeout = timeout("request", &rule.timeouts.request);
    let backend_request_timeout = timeout("backendRequest", &rule.timeouts.backend_request);
    if rule.retry.is_some() {
        bad.push("retry: is not supported yet".into());
    }
    if rule.session_persistence.is_some() {
        bad.push("sessionPersistence: is not supported yet".into());
    }
    // Unreadable matches narrow the rule; anything else leaves it impossible to carry out.
    let impossible = bad.len() > partly_matched;
    let consequence = match (matches.is_empty(), impossible) {
        (true, _) => LEFT_OUT,
        (false, true) => " (requests of the rule are answered 500)",
        (false, false) => "",
    };
    for problem in bad.drain(..) {
        problems.rule(index, format!(".{problem}{consequence}"));
    }
    if matches.is_empty() {
        problems.refused += 1;
        return None;
    }
    if impossible {
        problems.refused += 1;
        filters.clear();
        let reason = "the rule cannot be carried out; see the route's status".to_owned();
        backends = vec![Backend { weight: 1, target: Some(backend::Target::Invalid(reason)), filters: Vec::new() }];
    }
    Some(RouteRule { name: rule.name.clone(), matches, filters, backends, request_timeout, backend_request_timeout })
}

fn good<T>(value: &Lenient<T>) -> Result<&T, String> {
    match value {
        Lenient::Good(value) => Ok(value),
        Lenient::Bad(reason) => Err(reason.clone()),
    }
}

fn match_all() -> RouteMatch {
    RouteMatch { path: Some(route_match::Path::PathPrefix("/".into())), ..RouteMatch::default() }
}

/// `expressions` counts those of the route.
fn route_match(found: &api::HttpMatch, expressions: &mut usize) -> Result<RouteMatch, String> {
    let path = match &found.path {
        None => route_match::Path::PathPrefix("/".into()),
        Some(path) => {
            let value = path.value.clone().unwrap_or_else(|| "/".into());
            match path.r#type.as_deref().unwrap_or("PathPrefix") {
                "RegularExpression" => route_match::Path::PathRegex(regex(value, expressions)?),
                _ if !value.starts_with('/') => return Err(format!("path.value: {value:?} is not absolute")),
                "Exact" => route_match::Path::PathExact(value),
                "PathPrefix" => route_match::Path::PathPrefix(value),
                other => return Err(format!("path.type: {other:?} is unknown")),
            }
        }
    };
    Ok(RouteMatch {
        path: Some(path),
        headers: key_matches("headers", &found.headers, |name| name.to_ascii_lowercase(), expressions)?,
        query_params: key_matches("queryParams", &found.query_params, str::to_owned, expressions)?,
        method: found.method.clone(),
    })
}

/// A second entry of the same name is ignored, as the standard says.
fn key_matches(
    field: &str,
    entries: &[api::ValueMatch],
    canonical: impl Fn(&str) -> String,
    expressions: &mut usize,
) -> Result<Vec<KeyMatch>, String> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for entry in entries {
        let name = canonical(&entry.name);
        if !seen.insert(name.clone()) {
            continue;
        }
        let value = entry.value.clone().unwrap_or_default();
        let value = match entry.r#type.as_deref().unwrap_or("Exact") {
            "Exact" => key_match::Value::Exact(value),
            "RegularExpression" => key_match::Value::Regex(
                regex(value, expressions).map_err(|reason| format!("{field}[{name}]: {reason}"))?,
            ),
            other => return Err(format!("{field}[{name}].type: {other:?} is unknown")),
        };
        found.push(KeyMatch { name, value: Some(value) });
    }
    Ok(found)
}

fn regex(value: String, expressions: &mut usize) -> Result<String, String> {
    *expressions += 1;
    if *expressions > regular_expression::MOST_OF_ROUTE {
        return Err(format!("one route may have {} regular expressions", regular_expression::MOST_OF_ROUTE));
    }
    match regular_expression::check(&value) {
        Ok(()) => Ok(value),
        Err(Unfit::NotOne(_)) => Err(format!("{value:?} is not a regular expression (RE2 syntax)")),
        Err(Unfit::TooLarge) => Err(format!("{value:?} takes more memory than a waypoint gives one")),
    }
}

enum FilterPlace<'a> {
    Rule(&'a api::HttpRouteRule),
    Backend,
}

fn filter(found: &api::HttpFilter, place: FilterPlace<'_>) -> Result<Filter, String> {
    let missing = |field: &str| format!("type {} without {field}", found.r#type);
    let filter = match (found.r#type.as_str(), place) {
        ("RequestHeaderModifier", _) => {
            let modifier = found.request_header_modifier.as_ref().ok_or_else(|| missing("requestHeaderModifier"))?;
            filter::Filter::RequestHeaders(header_modifier("requestHeaderModifier", modifier)?)
        }
        ("ResponseHeaderModifier", _) => {
            let modifier = found.response_header_modifier.as_ref().ok_or_else(|| missing("responseHeaderModifier"))?;
            filter::Filter::ResponseHeaders(header_modifier("responseHeaderModifier", modifier)?)
        }
        ("RequestRedirect", FilterPlace::Rule(rule)) => {
            let redirect = found.request_redirect.as_ref().ok_or_else(|| missing("requestRedirect"))?;
            let status = redirect.status_code.unwrap_or(302);
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                return Err(format!("requestRedirect.statusCode: {status} is not supported"));
            }
            if !matches!(redirect.scheme.as_str(), "" | "http" | "https") {
                return Err(format!("requestRedirect.scheme: {:?} is not supported", redirect.scheme));
            }
            filter::Filter::Redirect(Redirect {
                scheme: redirect.scheme.clone(),
                hostname: authority("requestRedirect", &redirect.hostname)?,
                path: path_modifier("requestRedirect", redirect.path.as_ref(), rule)?,
                port: redirect.port.unwrap_or_default().into(),
                status,
            })
        }
        ("URLRewrite", FilterPlace::Rule(rule)) => {
            let rewrite = found.url_rewrite.as_ref().ok_or_else(|| missing("urlRewrite"))?;
            filter::Filter::Rewrite(Rewrite {
                hostname: authority("urlRewrite", &rewrite.hostname)?,
                path: path_modifier("urlRewrite", rewrite.path.as_ref(), rule)?,
            })
        }
        ("RequestRedirect" | "URLRewrite", FilterPlace::Backend) => {
            return Err(format!("type {} is not supported on a backendRef", found.r#type));
        }
        (other, _) => return Err(format!("type {other:?} is not supported yet")),
    };
    Ok(Filter { filter: Some(filter) })
}

/// What HTTP cannot carry is said here: a waypoint would refuse the whole route for it.
fn header_modifier(field: &str, modifier: &api::HeaderModifier) -> Result<HeaderModifier, String> {
    let name = |name: &str| match HeaderName::from_bytes(name.as_bytes()) {
        Ok(name) if name != HOST => Ok(name.to_string()),
        Ok(_) => Err(format!("{field}: host is for urlRewrite.hostname to change")),
        Err(_) => Err(format!("{field}: {name:?} is not the name of a header")),
    };
    // The first entry of a name wins.
    let headers = |entries: &[api::NameValue]| {
        let mut seen = BTreeSet::new();
        let mut headers = Vec::new();
        for entry in entries {
            let name = name(&entry.name)?;
            if !seen.insert(name.clone()) {
                continue;
            }
            if HeaderValue::from_str(&entry.value).is_err() {
                return Err(format!("{field}: {:?} is not a value that the header {name} can have", entry.value));
            }
            headers.push(Header { name, value: entry.value.clone() });
        }
        Ok(headers)
    };
    Ok(HeaderModifier {
        set: headers(&modifier.set)?,
        add: headers(&modifier.add)?,
        remove: modifier.remove.iter().map(|removed| name(removed)).collect::<Result<_, _>>()?,
    })
}

fn authority(field: &str, hostname: &str) -> Result<String, String> {
    if hostname.is_empty() || hostname.parse::<Authority>().is_ok() {
        return Ok(hostname.to_owned());
    }
    Err(format!("{field}.hostname: {hostname:?} is not a host"))
}

fn path_modifier(
    field: &str,
    modifier: Option<&api::PathModifier>,
    rule: &api::HttpRouteRule,
) -> Result<Option<PathModifier>, String> {
    let Some(modifier) = modifier else { return Ok(None) };
    let is_path = |path: &str| path.starts_with('/') && !path.contains('#') && path.parse::<PathAndQuery>().is_ok();
    let no_path =
        |path: &str| Err(format!("{field}.path: {path:?} is not a path; it starts with / and has no fragment"));
    let kind = match modifier.r#type.as_str() {
        "ReplaceFullPath" => {
            let path = modifier.replace_full_path.clone().unwrap_or_default();
            if !is_path(&path) {
                return no_path(&path);
            }
            path_modifier::Kind::ReplaceFull(path)
        }
        "ReplacePrefixMatch" => {
            let is_prefix = |found: &Lenient<api::HttpMatch>| match found {
                Lenient::Good(found) => found
                    .path
                    .as_ref()
                    .is_none_or(|path| path.r#type.as_deref().is_none_or(|kind| kind == "PathPrefix")),
                Lenient::Bad(_) => false,
            };
            if !rule.matches.iter().all(is_prefix) {
                return Err(format!("{field}.path: ReplacePrefixMatch needs PathPrefix matches"));
            }
            let path = modifier.replace_prefix_match.clone().unwrap_or_default();
            if !path.is_empty() && !is_path(&path) {
                return no_path(&path);
            }
            path_modifier::Kind::ReplacePrefixMatch(path)
        }
        other => return Err(format!("{field}.path.type: {other:?} is unknown")),
    };
    Ok(Some(PathModifier { kind: Some(kind) }))
}

/// A reference that leads nowhere becomes an invalid backend with its weight: its share is answered 500. A Service of
/// another namespace needs no grant, because the mesh's own policy guards it.
fn backend(
    world: &World,
    route: &Object<HttpRouteSpec>,
    place: &str,
    found: &api::BackendRef,
    problems: &mut Problems,
) -> Result<Backend, String> {
    let mut filters = Vec::new();
    for (number, entry) in found.filters.iter().enumerate() {
        let entry = good(entry).and_then(|entry| filter(entry, FilterPlace::Backend));
        filters.push(entry.map_err(|reason| format!("filters[{number}]: {reason}"))?);
    }
    let target = match resolve_backend(world, route, found) {
        Ok(target) => backend::Target::Service(target),
        Err((reason, message)) => {
            problems.backends.push((reason, format!("{place}: {message}")));
            backend::Target::Invalid(message)
        }
    };
    Ok(Backend { weight: found.weight.unwrap_or(1), target: Some(target), filters })
}

fn resolve_backend(
    world: &World,
    route: &Object<HttpRouteSpec>,
    found: &api::BackendRef,
) -> Result<ServicePort, (&'static str, String)> {
    let (group, kind) = (found.group.as_deref().unwrap_or_default(), found.kind.as_deref().unwrap_or("Service"));
    if !matches!(group, "" | "core") || kind != "Service" {
        return Err(("InvalidKind", format!("kind {group}/{kind} is not supported")));
    }
    let key = Key::new(found.namespace.as_deref().unwrap_or(route.namespace()), found.name.as_str());
    let Some(port) = found.port else {
        return Err(("UnsupportedValue", format!("Service {key} needs a port")));
    };
    let service = world.services.get(&key).ok_or(("BackendNotFound", format!("Service {key} does not exist")))?;
    if service.is_external() {
        return Err(("BackendNotFound", format!("Service {key} is an ExternalName, which the mesh does not know")));
    }
    if !has_port(service, port) {
        return Err(("BackendNotFound", format!("Service {key} has no port {port}")));
    }
    Ok(ServicePort { service: world.service_name(&key), port: port.into() })
}

/// Gateway API durations (`1h2m3s4ms`, each unit once, in any order); zero means none.
fn duration(value: &str) -> Result<Option<Duration>, String> {
    let unreadable = || format!("{value:?} is not a duration such as 10s, 500ms or 1m30s");
    let mut millis: u64 = 0;
    let mut rest = value;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(unreadable)?;
        let number: u64 = rest[..digits].parse().map_err(|_| unreadable())?;
        rest = &rest[digits..];
        let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1000,
            "ms" => 1,
            _ => return Err(unreadable()),
        };
        millis = number.checked_mul(unit).and_then(|more| millis.checked_add(more)).ok_or_else(unreadable)?;
        rest = &rest[end..];
    }
    if value.is_empty() {
        return Err(unreadable());
    }
    let (seconds, nanos) = (millis / 1000, (millis % 1000) * 1_000_000);
    let found = Duration {
        seconds: i64::try_from(seconds).map_err(|_| unreadable())?,
        nanos: i32::try_from(nanos).map_err(|_| unreadable())?,
    };
    Ok((millis > 0).then_some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_durations_as_the_standard_writes_them() {
        let of = |seconds, nanos| Ok(Some(Duration { seconds, nanos }));
        assert_eq!(duration("10s"), of(10, 0));
        assert_eq!(duration("1m30s"), of(90, 0));
        assert_eq!(duration("500ms"), of(0, 500_000_000));
        assert_eq!(duration("0s"), Ok(None));
        for bad in ["", "10", "s", "1d", "-1s", "1.5s", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
