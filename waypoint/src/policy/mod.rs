//! L7 AuthorizationPolicy: who may call what.
//!
//! Evaluation order (Istio): a matching DENY refuses; with no ALLOW policy all is allowed; a matching ALLOW allows;
//! otherwise refused. AUDIT policies only record. A dry-run policy is evaluated and reported, never enforced. The
//! source is the identity the TLS handshake proved, never a header.

mod compile;
mod template;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use mesh::identity::Identity;

pub use compile::PolicyError;
use template::PathTemplate;

/// What a policy may look at. TCP connections have no `http` part.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub source: Option<&'a Identity>,
    /// `<trust domain>/ns/<namespace>/sa/<service account>`; empty without an identity.
    pub principal: &'a str,
    pub source_ip: IpAddr,
    /// The address and *service* port the client dialled.
    pub destination: SocketAddr,
    pub http: Option<HttpSubject<'a>>,
}

#[derive(Debug, Clone, Copy)]
pub struct HttpSubject<'a> {
    pub method: &'a str,
    /// Normalised, without query.
    pub path: &'a str,
    /// As sent, with its port.
    pub authority: &'a str,
    pub headers: &'a HeaderMap,
}

/// Proof that a request passed; only [`PolicySet::authorize`] makes one.
#[derive(Debug, PartialEq, Eq)]
pub struct Permit(());

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("denied by {policy} rule {rule}")]
    Matched { policy: Arc<str>, rule: usize },
    #[error("no ALLOW policy matches")]
    NoAllowMatched,
    #[error("policy {policy} could not be read: {reason}")]
    Unreadable { policy: Arc<str>, reason: Arc<str> },
}

impl Denial {
    /// Response code details, in Envoy's form.
    pub fn details(&self) -> String {
        match self {
            Self::Matched { policy, rule } => {
                let (ns, name) = policy.split_once('/').unwrap_or(("", policy));
                format!("rbac_access_denied_matched_policy[ns[{ns}]-policy[{name}]-rule[{rule}]]")
            }
            Self::NoAllowMatched => "rbac_access_denied_matched_policy[none]".into(),
            Self::Unreadable { .. } => "rbac_access_denied_unreadable_policy".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Allow,
    Deny,
    Audit,
    /// The resource could not be decoded: everything in its reach is refused until it is mended.
    Unreadable,
}

/// One policy resource, compiled.
#[derive(Debug)]
pub struct HttpPolicy {
    /// `<namespace>/<name>`.
    name: Arc<str>,
    action: Action,
    dry_run: bool,
    /// `<namespace>/<hostname>`; empty = all traffic of the waypoint.
    services: Vec<Arc<str>>,
    rules: Vec<Rule>,
    unreadable: Option<Arc<str>>,
}

#[derive(Debug, Default)]
struct Rule {
    from: Vec<Source>,
    to: Vec<Operation>,
    when: Vec<Condition>,
}

/// A field and its negation: empty `any` constrains nothing; `none` lists what must not match.
#[derive(Debug)]
struct Field<T> {
    any: Vec<T>,
    none: Vec<T>,
}

impl<T> Default for Field<T> {
    fn default() -> Self {
        Self { any: Vec::new(), none: Vec::new() }
    }
}

impl<T> Field<T> {
    fn holds(&self, matches: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&matches)) && !self.none.iter().any(&matches)
    }

    fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }
}

#[derive(Debug, Default)]
struct Source {
    principals: Field<Text>,
    namespaces: Field<Text>,
    service_accounts: Field<(Arc<str>, Arc<str>)>,
    ips: Field<IpNet>,
}

#[derive(Debug, Default)]
struct Operation {
    hosts: Field<Text>,
    ports: Field<u16>,
    methods: Field<Text>,
    paths: Field<PathMatch>,
}

#[derive(Debug)]
struct Condition {
    key: Key,
    values: ConditionValues,
}

#[derive(Debug)]
enum Key {
    Header(HeaderName),
    SourceIp,
    SourceNamespace,
    SourcePrincipal,
    SourceServiceAccount,
    SourceTrustDomain,
    DestinationIp,
    DestinationPort,
}

#[derive(Debug)]
enum ConditionValues {
    Text(Field<Text>),
    Ip(Field<IpNet>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Text {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Present,
}

impl Text {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(t) => **t == *value,
            Self::Prefix(t) => value.starts_with(&**t),
            Self::Suffix(t) => value.ends_with(&**t),
            Self::Present => !value.is_empty(),
        }
    }

    /// For host names, which compare without regard to case; the pattern is lower case already.
    fn matches_host(&self, value: &str) -> bool {
        match value.bytes().any(|b| b.is_ascii_uppercase()) {
            true => self.matches(&value.to_ascii_lowercase()),
            false => self.matches(value),
        }
    }
}

#[derive(Debug)]
enum PathMatch {
    Text(Text),
    Template(PathTemplate),
}

impl Source {
    fn matches(&self, s: &Subject<'_>) -> bool {
        let namespace = s.source.map_or("", |i| i.namespace());
        self.principals.holds(|t| t.matches(s.principal))
            && self.namespaces.holds(|t| t.matches(namespace))
            && self
                .service_accounts
                .holds(|(ns, sa)| s.source.is_some_and(|i| i.namespace() == ns && i.service_account() == sa))
            && self.ips.holds(|net| net.contains(&s.source_ip))
    }
}

impl Operation {
    fn matches(&self, s: &Subject<'_>, deny: bool) -> bool {
        if !self.ports.holds(|p| *p == s.destination.port()) {
            return false;
        }
        let Some(http) = s.http else {
            let l4_only = self.hosts.is_empty() && self.methods.is_empty() && self.paths.is_empty();
            return l4_only || deny;
        };
        self.hosts.holds(|t| t.matches_host(http.authority))
            && self.methods.holds(|t| t.matches(http.method))
            && self.paths.holds(|p| match p {
                PathMatch::Text(t) => t.matches(http.path),
                PathMatch::Template(t) => t.matches(http.path),
            })
    }
}

/// Every way an application may read a header: each of its lines, and all of them joined by commas. Odd bytes do not
/// hide the rest.
fn readings(headers: &HeaderMap, name: &HeaderName) -> Vec<String> {
    let mut lines: Vec<String> =
        headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect();
    if lines.len() > 1 {
        lines.push(lines.join(","));
    }
    lines
}

impl Condition {
    fn matches(&self, s: &Subject<'_>, deny: bool) -> bool {
        let text = |value: Option<&str>| match &self.values {
            // An absent value never satisfies `values`; `notValues` hold.
            ConditionValues::Text(field) => match value {
                Some(v) => field.holds(|t| t.matches(v)),
                None => field.any.is_empty(),
            },
            ConditionValues::Ip(_) => false,
        };
        let ip = |value: IpAddr| match &self.values {
            ConditionValues::Ip(field) => field.holds(|net| net.contains(&value)),
            ConditionValues::Text(_) => false,
        };
        match &self.key {
            Key::Header(name) => match (s.http, &self.values) {
                (None, _) => deny,
                (Some(http), ConditionValues::Text(field)) => {
                    let readings = readings(http.headers, name);
                    // A header without a value is there.
                    let holds = |v: &String| field.holds(|t| *t == Text::Present || t.matches(v));
                    match readings.is_empty() {
                        true => field.any.is_empty(),
                        false if deny => readings.iter().any(holds),
                        false => readings.iter().all(holds),
                    }
                }
                (Some(_), ConditionValues::Ip(_)) => false,
            },
            Key::SourceIp => ip(s.source_ip),
            Key::DestinationIp => ip(s.destination.ip()),
            Key::DestinationPort => text(Some(&s.destination.port().to_string())),
            Key::SourcePrincipal => text(s.source.map(|_| s.principal)),
            Key::SourceNamespace => text(s.source.map(|i| &**i.namespace())),
            Key::SourceTrustDomain => text(s.source.map(|i| &**i.trust_domain())),
            Key::SourceServiceAccount => {
                text(s.source.map(|i| format!("{}/{}", i.namespace(), i.service_account())).as_deref())
            }
        }
    }
}

impl HttpPolicy {
    /// The first rule that matches. On a TCP connection an HTTP field makes an ALLOW rule fail and is ignored in a
    /// DENY rule; of a header that is sent twice any reading makes a DENY rule match and all must make an ALLOW rule
    /// match. So both err on the closed side.
    fn matched_rule(&self, s: &Subject<'_>) -> Option<usize> {
        let deny = self.action == Action::Deny;
        self.rules.iter().position(|rule| {
            (rule.from.is_empty() || rule.from.iter().any(|f| f.matches(s)))
                && (rule.to.is_empty() || rule.to.iter().any(|t| t.matches(s, deny)))
                && rule.when.iter().all(|c| c.matches(s, deny))
        })
    }
}

/// A policy that matched without being enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub policy: Arc<str>,
    pub kind: ObservedKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObservedKind {
    Audit,
    DryRunDenied,
    DryRunAllowed,
}

impl ObservedKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::DryRunDenied => "dry_run_denied",
            Self::DryRunAllowed => "dry_run_allowed",
        }
    }
}

/// All policies of a waypoint, indexed by service.
#[derive(Debug, Default)]
pub struct PolicySet {
    everywhere: Vec<Arc<HttpPolicy>>,
    by_service: HashMap<Arc<str>, Vec<Arc<HttpPolicy>>>,
}

impl PolicySet {
    pub fn build(policies: impl IntoIterator<Item = Arc<HttpPolicy>>) -> Self {
        let mut set = Self::default();
        for policy in policies {
            if policy.services.is_empty() {
                set.everywhere.push(policy);
                continue;
            }
            for service in &policy.services {
                set.by_service.entry(service.clone()).or_default().push(policy.clone());
            }
        }
        set
    }

    /// Decides on `subject`, addressed to `service` (`None` for traffic straight to a pod). `observed` is told of
    /// policies that match but are not enforced.
    ///
    /// # Errors
    /// The policy that refuses.
    pub fn authorize(
        &self,
        service: Option<&str>,
        subject: &Subject<'_>,
        mut observed: impl FnMut(Observed),
    ) -> Result<Permit, Denial> {
        let own = service.and_then(|s| self.by_service.get(s)).map_or(&[][..], Vec::as_slice);
        let all = || self.everywhere.iter().chain(own);
        for p in all() {
            match (p.action, p.dry_run) {
                (Action::Unreadable, _) => {
                    let reason = p.unreadable.clone().unwrap_or_else(|| "unknown".into());
                    return Err(Denial::Unreadable { policy: p.name.clone(), reason });
                }
                (Action::Deny, false) => {
                    if let Some(rule) = p.matched_rule(subject) {
                        return Err(Denial::Matched { policy: p.name.clone(), rule });
                    }
                }
                (Action::Audit, false) => {
                    if p.matched_rule(subject).is_some() {
                        observed(Observed { policy: p.name.clone(), kind: ObservedKind::Audit });
                    }
                }
                (Action::Deny, true) => {
                    if p.matched_rule(subject).is_some() {
                        observed(Observed { policy: p.name.clone(), kind: ObservedKind::DryRunDenied });
                    }
                }
                (Action::Allow, true) => {
                    let allowed = p.matched_rule(subject).is_some();
                    let kind = if allowed { ObservedKind::DryRunAllowed } else { ObservedKind::DryRunDenied };
                    observed(Observed { policy: p.name.clone(), kind });
                }
                (Action::Allow, false) | (Action::Audit, true) => {}
            }
        }
        let mut allows = all().filter(|p| p.action == Action::Allow && !p.dry_run).peekable();
        if allows.peek().is_none() || allows.any(|p| p.matched_rule(subject).is_some()) {
            return Ok(Permit(()));
        }
        Err(Denial::NoAllowMatched)
    }
}
