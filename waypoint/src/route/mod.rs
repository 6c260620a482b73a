//! Which rule governs a request: HTTPRoutes compiled per service, matched in the precedence order of the Gateway API.
//!
//! Pure: no I/O, no clock. The *service* was chosen by the address the client dialled, never by the Host header
//! (Gateway API mesh conformance, `MeshFrontendHostname`), so tables are keyed by service. Routes in the service's own
//! namespace are producer routes; routes from another namespace act only on that namespace's clients and replace the
//! producer's for them.

mod compile;
mod matching;
mod split;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

pub use compile::RouteError;
pub use matching::{RequestHead, query_pairs};
pub use split::Split;

use crate::filter::Filter;
use matching::Matcher;

/// One rule of a route, shared by the table entries made of its matches.
#[derive(Debug)]
pub struct Rule {
    /// The rule's own name, or `<namespace>.<route>.<index>`: what logs and metrics call it.
    pub name: Arc<str>,
    pub filters: Vec<Filter>,
    pub backends: Split<Backend>,
    /// Whole exchange, retries included. `None` = unlimited.
    pub request_timeout: Option<std::time::Duration>,
    /// One try against a backend. `None` = unlimited.
    pub backend_timeout: Option<std::time::Duration>,
}

/// Where a share of a rule's requests goes.
#[derive(Debug)]
pub struct Backend {
    pub target: Target,
    pub filters: Vec<Filter>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `<namespace>/<hostname>` and the service port.
    Service { service: Arc<str>, port: u16 },
    /// The reference could not be resolved; its share is answered 500. The text says why.
    Invalid(Arc<str>),
}

/// The outcome of looking a request up.
#[derive(Debug)]
pub enum Found<'a> {
    Rule {
        rule: &'a Arc<Rule>,
        /// The prefix that matched, for `ReplacePrefixMatch`; `None` when the match was not by prefix.
        prefix: Option<&'a str>,
    },
    /// The service has routes for this port and none matches: 404.
    NoMatch,
    /// No route governs this service and port: the request goes to the service's own endpoints.
    Unrouted,
}

/// One route resource after validation: its rules, and the services it hangs on.
#[derive(Debug)]
pub struct CompiledRoute {
    namespace: Arc<str>,
    /// Age and name: the last tie-breakers.
    created: i64,
    full_name: String,
    parents: Vec<(Arc<str>, u16)>,
    entries: Vec<(Matcher, Arc<Rule>)>,
}

#[derive(Debug)]
struct Entry {
    matcher: Matcher,
    /// 0 = every port of the service.
    port: u16,
    rule: Arc<Rule>,
}

/// Everything that hangs on one service.
#[derive(Debug, Default)]
struct ServiceRoutes {
    producer: Vec<Entry>,
    /// By namespace of the client.
    consumer: HashMap<Arc<str>, Vec<Entry>>,
}

/// The compiled routes of a waypoint, immutable; a change builds the next one from shared [`CompiledRoute`]s.
#[derive(Debug, Default)]
pub struct RouteTable {
    services: HashMap<Arc<str>, ServiceRoutes>,
}

impl RouteTable {
    /// Orders the entries of all routes by precedence. `routes` is keyed by resource name.
    pub fn build(routes: &BTreeMap<String, Arc<CompiledRoute>>) -> Self {
        let mut by_age: Vec<&Arc<CompiledRoute>> = routes.values().collect();
        by_age.sort_by(|a, b| a.created.cmp(&b.created).then_with(|| a.full_name.cmp(&b.full_name)));
        let mut table = Self::default();
        for route in by_age {
            for (service, port) in &route.parents {
                let at = table.services.entry(service.clone()).or_default();
                let producer = service.split('/').next() == Some(&*route.namespace);
                let list =
                    if producer { &mut at.producer } else { at.consumer.entry(route.namespace.clone()).or_default() };
                list.extend(route.entries.iter().map(|(m, rule)| Entry {
                    matcher: m.clone(),
                    port: *port,
                    rule: rule.clone(),
                }));
            }
        }
        for at in table.services.values_mut() {
            // Stable: equals stay in order of age, name and position.
            at.producer.sort_by_key(|e| std::cmp::Reverse(e.matcher.rank()));
            for list in at.consumer.values_mut() {
                list.sort_by_key(|e| std::cmp::Reverse(e.matcher.rank()));
            }
        }
        table
    }

    /// Finds the rule for a request to `port` of `service` (`<namespace>/<hostname>`) by a client of
    /// `client_namespace` (from its identity; empty when it has none).
    pub fn find(&self, service: &str, port: u16, client_namespace: &str, request: &RequestHead<'_>) -> Found<'_> {
        let Some(at) = self.services.get(service) else { return Found::Unrouted };
        let governs = |list: &&Vec<Entry>| list.iter().any(|e| e.port == 0 || e.port == port);
        let Some(list) =
            at.consumer.get(client_namespace).filter(governs).or_else(|| Some(&at.producer).filter(governs))
        else {
            return Found::Unrouted;
        };
        list.iter()
            .find(|e| (e.port == 0 || e.port == port) && e.matcher.matches(request))
            .map_or(Found::NoMatch, |e| Found::Rule { rule: &e.rule, prefix: e.matcher.prefix() })
    }

    /// Whether any route governs this port, for anybody.
    pub fn governs(&self, service: &str, port: u16) -> bool {
        self.services.get(service).is_some_and(|at| {
            at.producer.iter().chain(at.consumer.values().flatten()).any(|e| e.port == 0 || e.port == port)
        })
    }
}
