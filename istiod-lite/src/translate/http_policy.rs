//! AuthorizationPolicy with targetRefs → request-level policy for the waypoints that serve its targets, and the list of
//! what it reaches, from which [`super::guard`] closes the way around the waypoint.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_proto::waypoint::{
    Action as WireAction, Condition, HttpPolicy, HttpRule, IpBlock, Operation, Source, StringMatch, string_match,
};

use super::authorization::{ACTIONS, is_dry_run, is_http, mistakes};
use super::binding::{self, Binding, TrafficType};
use super::parse::{self, Action, DropRule, Mistake, Part, Polarity, Reader, Text};
use super::service_entry;
use super::verdict::{Problem, Status, Wanted, joined};
use super::world::World;
use crate::types::gateway::{self, MESH_CONTROLLER, WAYPOINT_CLASS};
use crate::types::networking;
use crate::types::security::{self, AuthorizationPolicySpec, TargetRef};
use crate::types::{Key, Object};

pub const CONDITION: &str = "WaypointAccepted";
const UNSUPPORTED: &str = "is not supported by waypoints yet";

/// What policies attached by targetRefs reach.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Services, each with the waypoint it is bound to.
    pub services: BTreeSet<Key>,
    /// Waypoints with all their traffic, those among them that do not exist (any more).
    pub waypoints: BTreeSet<Key>,
    /// Every waypoint, whether it exists or not.
    pub every_waypoint: bool,
}

impl Reach {
    /// All traffic of this waypoint.
    pub fn covers(&self, waypoint: &Key) -> bool {
        self.every_waypoint || self.waypoints.contains(waypoint)
    }
}

/// A policy for certain waypoints.
#[derive(Debug, PartialEq)]
pub struct Attached {
    /// The xDS name.
    pub name: String,
    pub policy: HttpPolicy,
    pub waypoints: BTreeSet<Key>,
}

/// `bindings` are those of all Services.
pub fn translate(
    world: &World,
    policy: &Object<AuthorizationPolicySpec>,
    spec: &AuthorizationPolicySpec,
    bindings: &BTreeMap<Key, Binding>,
    reach: &mut Reach,
) -> (Vec<Attached>, Wanted) {
    if spec.selector.is_some() {
        let problem = Problem::fault("selector: excludes targetRefs", "take one of the two out");
        let message = "selector and targetRefs exclude one another; the policy is not enforced";
        return (Vec::new(), Wanted::new(CONDITION, Status::False, "Invalid", message).because([&problem]));
    }
    let mut targets = Targets::default();
    // Nobody can tell where these lead; the others are served.
    spec.unreadable.iter().for_each(|reason| targets.problem("Invalid", reason.as_str()));
    for target in &spec.targets {
        targets.add(world, policy.namespace(), target, bindings);
    }
    let (http_policy, mut problems) = http_policy(policy, spec, &world.trust_domains());
    problems.extend(spec.unused.iter().map(|reason| Problem::from(reason.as_str())));
    let of_targets = targets.problems.iter().map(|(_, problem)| problem);
    let all: Vec<Problem> = mistakes(spec).iter().chain(&problems).chain(of_targets).cloned().collect();
    // What only watches closes nothing.
    if !http_policy.dry_run && http_policy.action() != WireAction::Audit {
        reach.services.extend(targets.guarded.iter().cloned());
        reach.waypoints.extend(targets.waypoints.iter().chain(&targets.missing).cloned());
        reach.every_waypoint |= targets.every_waypoint;
    }

    let name = format!("AuthorizationPolicy/{}", policy.key());
    let mut attached = Vec::new();
    if !targets.services.is_empty() {
        attached.push(Attached {
            name: name.clone(),
            policy: HttpPolicy { services: targets.services.keys().cloned().collect(), ..http_policy.clone() },
            waypoints: targets.services.values().flatten().cloned().collect(),
        });
    }
    if !targets.waypoints.is_empty() {
        // A waypoint that is a target itself applies the policy to everything: a resource of its own.
        attached.push(Attached {
            name: format!("{name}/gateways"),
            policy: http_policy,
            waypoints: targets.waypoints.clone(),
        });
    }
    let condition = match (attached.is_empty(), targets.problems.first()) {
        (true, Some((reason, _))) => {
            let unused: Vec<&Problem> = targets.problems.iter().map(|(_, problem)| problem).collect();
            Wanted::new(CONDITION, Status::False, reason, joined(&unused))
        }
        _ => {
            problems.extend(targets.problems.into_iter().map(|(_, problem)| problem));
            match problems.is_empty() {
                true => Wanted::new(CONDITION, Status::True, "Accepted", "bound to its waypoints"),
                false => Wanted::new(CONDITION, Status::True, "PartiallyInvalid", joined(&problems)),
            }
        }
    };
    (attached, condition.because(&all))
}

#[derive(Default)]
struct Targets {
    /// xDS name of a Service → its waypoints.
    services: BTreeMap<String, BTreeSet<Key>>,
    /// Those and the Services whose waypoint does not exist: nothing may go around it all the same.
    guarded: BTreeSet<Key>,
    waypoints: BTreeSet<Key>,
    /// Waypoints that do not exist: what is bound to one stays behind it all the same.
    missing: BTreeSet<Key>,
    every_waypoint: bool,
    problems: Vec<(&'static str, Problem)>,
}

/// What policies can be attached to.
const TARGETS: &[(&str, &str)] = &[
    ("", "Service"),
    (networking::GROUP, "ServiceEntry"),
    (gateway::GROUP, "Gateway"),
    (gateway::GROUP, "GatewayClass"),
];

impl Targets {
    fn add(&mut self, world: &World, namespace: &str, target: &TargetRef, bindings: &BTreeMap<Key, Binding>) {
        let key = Key::new(namespace, target.name.as_str());
        if target.namespace.as_deref().is_some_and(|other| !other.is_empty() && other != namespace) {
            let message = format!("targetRefs: {} must be in the policy's namespace", target.name);
            let mend = "take `namespace` out, and write the policy into the namespace of its target";
            return self.problem("Invalid", Problem::fault(message, mend));
        }
        match (target.group.as_str(), target.kind.as_str()) {
            ("" | "core", "Service") => match bindings.get(&key) {
                None => self.problem("TargetNotFound", format!("targetRefs: Service {key} does not exist")),
                Some(binding) => {
                    let named = vec![(key.clone(), world.service_name(&key))];
                    self.add_services(world, &format!("Service {key}"), named, binding);
                }
            },
            ("networking.istio.io", "ServiceEntry") => {
                match world.service_entries.get(&key).map(|found| (found, &found.spec)) {
                    None => self.problem("TargetNotFound", format!("targetRefs: ServiceEntry {key} does not exist")),
                    Some((_, Err(_))) => {
                        self.problem("Invalid", format!("targetRefs: ServiceEntry {key} cannot be read"))
                    }
                    Some((entry, Ok(spec))) => {
                        let binding = binding::resolve(world, &entry.meta, TrafficType::Entry);
                        let named = spec.hosts.iter().map(|host| service_entry::names(&key.namespace, host)).collect();
                        self.add_services(world, &format!("ServiceEntry {key}"), named, &binding);
                    }
                }
            }
            ("gateway.networking.k8s.io", "Gateway") => match world.gateways.get(&key) {
                Some(gateway) if binding::is_waypoint(world, gateway) => {
                    self.waypoints.insert(key);
                }
                Some(_) => self.problem("Invalid", format!("targetRefs: Gateway {key} is not a waypoint")),
                None => {
                    self.problem("TargetNotFound", format!("targetRefs: Gateway {key} does not exist"));
                    self.missing.insert(key);
                }
            },
            ("gateway.networking.k8s.io", "GatewayClass") => {
                let class = world.gateway_classes.get(&Key::new("", target.name.as_str()));
                let ours = class.is_some_and(|class| {
                    class.spec.as_ref().is_ok_and(|class| class.controller_name == MESH_CONTROLLER)
                });
                if namespace != world.mesh.root_namespace {
                    let message = format!("targetRefs: GatewayClass only from namespace {}", world.mesh.root_namespace);
                    self.problem("Invalid", message);
                } else if ours || target.name == WAYPOINT_CLASS {
                    self.every_waypoint = true;
                    self.waypoints.extend(binding::waypoints(world).map(|(key, _)| key.clone()));
                } else {
                    self.problem("TargetNotFound", format!("targetRefs: GatewayClass {} is not ours", target.name));
                }
            }
            (group, kind) => {
                let message = format!("targetRefs: kind {group}/{kind} is not supported");
                let problem = match TARGETS.iter().find(|(_, known)| *known == kind) {
                    Some((of, _)) => Problem::fault(message, &format!("{kind} is of group {of:?}")),
                    None => message.into(),
                };
                self.problem("Invalid", problem);
            }
        }
    }

    /// What `target` is to the mesh, each by its key among bindings and its xDS name.
    fn add_services(&mut self, world: &World, target: &str, services: Vec<(Key, String)>, binding: &Binding) {
        let Some(waypoint) = &binding.waypoint else {
            return self.problem("AncestorNotBound", format!("targetRefs: {target} is not bound to a waypoint"));
        };
        let exists = world.gateways.contains_key(waypoint);
        if !exists {
            let message = format!("targetRefs: waypoint {waypoint} of {target} does not exist");
            self.problem("AncestorNotBound", message);
        }
        for (key, name) in services {
            self.guarded.insert(key);
            if exists {
                self.services.insert(name, binding.waypoints().cloned().collect());
            }
        }
    }

    fn problem(&mut self, reason: &'static str, problem: impl Into<Problem>) {
        self.problems.push((reason, problem.into()));
    }
}

fn http_policy(
    policy: &Object<AuthorizationPolicySpec>,
    spec: &AuthorizationPolicySpec,
    domains: &Arc<[String]>,
) -> (HttpPolicy, Vec<Problem>) {
    let mut problems: Vec<Problem> = Vec::new();
    let (wire, action) = match spec.action.as_deref().unwrap_or("ALLOW") {
        "ALLOW" => (WireAction::Allow, Action::Allow),
        "DENY" => (WireAction::Deny, Action::Deny),
        // An audit that matches more only records more.
        "AUDIT" => (WireAction::Audit, Action::Deny),
        "CUSTOM" => {
            problems.push("action: CUSTOM is not supported; matching requests are denied".into());
            (WireAction::Deny, Action::Deny)
        }
        other => {
            let problem = Problem::fault(format!("action: {other:?} is unknown"), ACTIONS);
            problems.push(problem.worded(|message| message + "; everything is denied"));
            let rules = vec![HttpRule::default()];
            return (message(policy, WireAction::Deny, rules), problems);
        }
    };
    let rules = spec
        .rules
        .iter()
        .enumerate()
        .filter_map(|(index, rule)| {
            let mut reader = Reader::new(action, index, domains);
            let result = match (reader.whole(rule), action) {
                (Some(rule), _) => http_rule(rule, policy.namespace(), &mut reader),
                (None, Action::Allow) => Err(DropRule),
                (None, Action::Deny) => Ok(HttpRule::default()),
            };
            let note = if result.is_err() { " (the rule is left out)" } else { "" };
            let in_rule = |message: String| format!("rules[{index}]: {message}{note}");
            problems.extend(reader.problems.drain(..).map(|problem| problem.worded(in_rule)));
            result.ok()
        })
        .collect();
    (message(policy, wire, rules), problems)
}

fn message(policy: &Object<AuthorizationPolicySpec>, action: WireAction, rules: Vec<HttpRule>) -> HttpPolicy {
    HttpPolicy {
        name: policy.name().to_owned(),
        namespace: policy.namespace().to_owned(),
        action: action.into(),
        services: Vec::new(),
        rules,
        dry_run: is_dry_run(policy),
    }
}

fn http_rule(rule: &security::Rule, namespace: &str, reader: &mut Reader) -> Result<HttpRule, DropRule> {
    for attribute in rule.unknown.keys() {
        reader.unsupported(attribute, true, "is unknown")?;
    }
    let (mut from, mut to, mut when) = (Vec::new(), Vec::new(), Vec::new());
    for (index, alternative) in rule.from.iter().enumerate() {
        reader.part = Some(Part::From(index));
        from.push(source(&alternative.source, namespace, reader)?);
    }
    for (index, alternative) in rule.to.iter().enumerate() {
        reader.part = Some(Part::To(index));
        to.push(operation(&alternative.operation, reader)?);
    }
    for (index, condition) in rule.when.iter().enumerate() {
        reader.part = Some(Part::When(index));
        when.extend(self::condition(condition, namespace, reader)?);
    }
    Ok(HttpRule { from, to, when })
}

fn source(source: &security::Source, namespace: &str, reader: &mut Reader) -> Result<Source, DropRule> {
    use Polarity::{Negative, Positive};
    for (attribute, values) in [
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ] {
        reader.unsupported(attribute, !values.is_empty(), UNSUPPORTED)?;
    }
    for (attribute, values) in [("trustDomains", &source.trust_domains), ("notTrustDomains", &source.not_trust_domains)]
    {
        reader.unsupported(attribute, !values.is_empty(), parse::NO_TRUST_DOMAINS)?;
    }
    for attribute in source.unknown.keys() {
        reader.unsupported(attribute, true, "is unknown")?;
    }
    let account = |value: &str| service_account(value, namespace);
    Ok(Source {
        principals: reader.principals("principals", Positive, &source.principals, string)?,
        not_principals: reader.principals("notPrincipals", Negative, &source.not_principals, string)?,
        namespaces: reader.field("namespaces", Positive, &source.namespaces, string)?,
        not_namespaces: reader.field("notNamespaces", Negative, &source.not_namespaces, string)?,
        service_accounts: reader.field("serviceAccounts", Positive, &source.service_accounts, account)?,
        not_service_accounts: reader.field("notServiceAccounts", Negative, &source.not_service_accounts, account)?,
        ip_blocks: reader.field("ipBlocks", Positive, &source.ip_blocks, ip_block)?,
        not_ip_blocks: reader.field("notIpBlocks", Negative, &source.not_ip_blocks, ip_block)?,
    })
}

fn operation(operation: &security::Operation, reader: &mut Reader) -> Result<Operation, DropRule> {
    use Polarity::{Negative, Positive};
    for attribute in operation.unknown.keys() {
        reader.unsupported(attribute, true, "is unknown")?;
    }
    Ok(Operation {
        hosts: reader.field("hosts", Positive, &operation.hosts, string)?,
        not_hosts: reader.field("notHosts", Negative, &operation.not_hosts, string)?,
        ports: reader.field("ports", Positive, &operation.ports, parse::port)?,
        not_ports: reader.field("notPorts", Negative, &operation.not_ports, parse::port)?,
        methods: reader.field("methods", Positive, &operation.methods, string)?,
        not_methods: reader.field("notMethods", Negative, &operation.not_methods, string)?,
        paths: reader.field("paths", Positive, &operation.paths, path)?,
        not_paths: reader.field("notPaths", Negative, &operation.not_paths, path)?,
    })
}

/// `None`: nothing of the condition is left, in a DENY.
fn condition(when: &security::Condition, namespace: &str, reader: &mut Reader) -> Result<Option<Condition>, DropRule> {
    let key = when.key.as_str();
    let is_header = key.strip_prefix("request.headers[").and_then(|rest| rest.strip_suffix(']'));
    let check: Box<Check<'_>> = match key {
        "source.ip" | "destination.ip" => Box::new(|value| {
            parse::ip_block(value)?;
            Ok(exact(value))
        }),
        "destination.port" => Box::new(|value| {
            parse::port(value)?;
            Ok(exact(value))
        }),
        "source.serviceAccount" => Box::new(|value| service_account(value, namespace).map(|found| exact(&found))),
        "source.namespace" | "source.principal" => Box::new(string),
        _ if is_header.is_some_and(|name| !name.is_empty()) => Box::new(string),
        _ => {
            match is_http(key) {
                true => reader.unsupported(&format!("when {key:?}"), true, UNSUPPORTED)?,
                false => reader.unknown_key(key)?,
            }
            return Ok(None);
        }
    };
    let mut read = |polarity, values: &[String]| match key {
        "source.principal" => reader.principals(key, polarity, values, &check),
        _ => reader.field(key, polarity, values, &check),
    };
    let values = read(Polarity::Positive, &when.values)?;
    let not_values = read(Polarity::Negative, &when.not_values)?;
    Ok((!values.is_empty() || !not_values.is_empty()).then(|| Condition { key: key.to_owned(), values, not_values }))
}

/// Reads a value of a condition.
type Check<'a> = dyn Fn(&str) -> Result<StringMatch, Mistake> + 'a;

fn exact(value: &str) -> StringMatch {
    StringMatch { match_type: Some(string_match::MatchType::Exact(value.to_owned())) }
}

fn string(value: &str) -> Result<StringMatch, Mistake> {
    use string_match::MatchType;
    let found = match parse::text(value)? {
        Text::Exact(text) => MatchType::Exact(text),
        Text::Prefix(text) => MatchType::Prefix(text),
        Text::Suffix(text) => MatchType::Suffix(text),
        Text::Present => MatchType::Presence(()),
    };
    Ok(StringMatch { match_type: Some(found) })
}

const TEMPLATE: &str = "write it as /a/{*}/b or /a/{**}";

/// A path, or a template: `{*}` is one segment, `{**}` any run of characters and the last operator.
fn path(value: &str) -> Result<StringMatch, Mistake> {
    if !value.contains(['{', '}']) {
        return string(value);
    }
    let rest = value.replace("{**}", "").replace("{*}", "");
    if rest.contains(['{', '}', '*']) {
        return Err(Mistake::new("templates may hold {*} and {**} and no other brace or star", TEMPLATE));
    }
    let whole_segments = value.split('/').all(|segment| !segment.contains('{') || matches!(segment, "{*}" | "{**}"));
    let operators_after_rest = value.split_once("{**}").is_some_and(|(_, after)| after.contains('{'));
    if !value.starts_with('/') || !whole_segments || operators_after_rest {
        let what = "{*} and {**} stand for whole segments of an absolute path, and {**} comes last";
        return Err(Mistake::new(what, TEMPLATE));
    }
    Ok(StringMatch { match_type: Some(string_match::MatchType::Template(value.to_owned())) })
}

fn ip_block(value: &str) -> Result<IpBlock, Mistake> {
    parse::ip_block(value).map(|(address, length)| IpBlock { address, length })
}

fn service_account(value: &str, policy_namespace: &str) -> Result<String, Mistake> {
    parse::service_account(value, policy_namespace).map(|(namespace, name)| format!("{namespace}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_templates_are_checked() {
        for good in ["/a/{*}/b", "/a/{**}", "/{**}/x", "/plain", "/p*", "*"] {
            assert!(path(good).is_ok(), "{good}");
        }
        for bad in ["/foo/{*}.txt", "/{**}/{*}", "/{id}", "/a/{*}/b*", "a/{*}"] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }
}
