//! AuthorizationPolicy without targetRefs → connection-level authorization for the node proxy of the destination.
//!
//! L7 attributes cannot be seen there: a rule of an ALLOW that has one is left out (less is allowed), in a DENY the
//! attribute is left out (more is denied), and the status says so. A DENY whose `to` or one of whose `when` had nothing but
//! L7 attributes matches nothing, as in Istio, and the status says that too. What nobody knows is another matter: it is
//! unreadable, and its DENY stays closed. A policy that cannot be read as a whole denies all it can reach.

use mesh_proto::security::{
    Action as WireAction, Address, Authorization, Clause, Group, Match, Scope, ServiceAccountMatch, StringMatch,
    string_match,
};

use super::parse::{self, Action, DropRule, Mistake, Part, Polarity, Reader, Text};
use super::verdict::{EXPLAIN, Problem, Status, Wanted, joined};
use super::world::World;
use crate::types::security::{AuthorizationPolicySpec, Condition, Operation, Rule, Source};
use crate::types::{Lenient, Object, annotation};

pub const CONDITION: &str = "ZtunnelAccepted";
/// What mends an action that there is not.
pub const ACTIONS: &str = "write ALLOW, DENY, AUDIT or CUSTOM";
const L7_ONLY: &str = "is an HTTP attribute, which only a waypoint can see (use targetRefs)";

/// The authorization to send, if any, and what the status says.
pub fn translate(
    world: &World,
    policy: &Object<AuthorizationPolicySpec>,
    spec: &AuthorizationPolicySpec,
) -> (Option<Authorization>, Wanted) {
    let unsupported = |message: String| Wanted::new(CONDITION, Status::False, "UnsupportedValue", message);
    let (action, closed) = match spec.action.as_deref().unwrap_or("ALLOW") {
        "ALLOW" => (Action::Allow, None),
        "DENY" => (Action::Deny, None),
        other @ ("AUDIT" | "CUSTOM") => {
            let message = format!("action {other} needs a waypoint (use targetRefs); not enforced");
            return (None, unsupported(message).because(&mistakes(spec)));
        }
        other => {
            let problem = Problem::fault(format!("action: {other:?} is unknown"), ACTIONS);
            (Action::Allow, Some(problem.worded(|message| message + "; everything is denied")))
        }
    };
    let mistakes = mistakes(spec);
    // An unreadable selector selects everything, which widens a DENY; an ALLOW must not open what it was not meant for.
    let closed = match (action, spec.unreadable.as_slice()) {
        (_, []) => closed,
        (Action::Allow, reasons) => Some(format!("{}; everything is denied", joined(reasons)).into()),
        (Action::Deny, _) => closed,
    };
    let mut problems: Vec<Problem> = spec
        .unreadable
        .iter()
        .map(|reason| Problem::from(format!("{reason}; denies wherever the policy could reach")))
        .chain(spec.unused.iter().map(|reason| Problem::from(reason.as_str())))
        .collect();
    let domains = world.trust_domains();
    let groups = match closed {
        // An ALLOW that matches nothing.
        Some(_) => Vec::new(),
        None => spec
            .rules
            .iter()
            .enumerate()
            .filter_map(|(index, rule)| {
                group(rule, Reader::new(action, index, &domains), policy.namespace(), &mut problems)
            })
            .collect(),
    };
    let scope = match &spec.selector {
        Some(selector) if !selector.match_labels.is_empty() => Scope::WorkloadSelector,
        _ if policy.namespace() == world.mesh.root_namespace => Scope::Global,
        _ => Scope::Namespace,
    };
    let authorization = Authorization {
        name: policy.name().to_owned(),
        namespace: policy.namespace().to_owned(),
        scope: scope.into(),
        action: match action {
            Action::Allow => WireAction::Allow,
            Action::Deny => WireAction::Deny,
        }
        .into(),
        groups,
        dry_run: is_dry_run(policy),
    };
    let wanted = match (&closed, problems.is_empty()) {
        (Some(problem), _) => unsupported(problem.message.clone()),
        (None, true) => Wanted::new(CONDITION, Status::True, "Accepted", "attached to ztunnel"),
        (None, false) => Wanted::new(CONDITION, Status::True, "UnsupportedValue", joined(&problems)),
    };
    (Some(authorization), wanted.because(mistakes.iter().chain(&closed).chain(&problems)))
}

/// What is wrong with a policy beside its rules.
pub(super) fn mistakes(spec: &AuthorizationPolicySpec) -> Vec<Problem> {
    let unreadable = spec.unreadable.iter().map(|reason| Problem::fault(reason.as_str(), EXPLAIN));
    unreadable.chain(spec.unused.iter().map(|reason| Problem::fault(reason.as_str(), "take it out"))).collect()
}

/// Annotation `istio.io/dry-run: "true"`: evaluated and logged, not enforced.
pub fn is_dry_run(policy: &Object<AuthorizationPolicySpec>) -> bool {
    annotation(&policy.meta, "istio.io/dry-run") == Some("true")
}

/// `None`: the rule is left out, i.e. never matches.
fn group(rule: &Lenient<Rule>, mut reader: Reader, namespace: &str, problems: &mut Vec<Problem>) -> Option<Group> {
    let (action, index) = (reader.action, reader.rule);
    let result = match (reader.whole(rule), action) {
        (Some(rule), _) => clauses(rule, namespace, &mut reader),
        (None, Action::Allow) => Err(DropRule),
        // We cannot tell what it denies: everything.
        (None, Action::Deny) => Ok(Vec::new()),
    };
    let note = if result.is_err() { " (the rule is left out)" } else { "" };
    let in_rule = |message: String| format!("rules[{index}]: {message}{note}");
    problems.extend(reader.problems.drain(..).map(|problem| problem.worded(in_rule)));
    result.ok().map(|rules| Group { rules })
}

fn clauses(rule: &Rule, namespace: &str, reader: &mut Reader) -> Result<Vec<Clause>, DropRule> {
    for attribute in rule.unknown.keys() {
        reader.unsupported(attribute, true, "is unknown")?;
    }
    let mut clauses = Vec::new();
    push_clause(&mut clauses, &rule.to, reader, |index, to, reader| {
        reader.part = Some(Part::To(index));
        operation(&to.operation, reader)
    })?;
    push_clause(&mut clauses, &rule.from, reader, |index, from, reader| {
        reader.part = Some(Part::From(index));
        source(&from.source, namespace, reader)
    })?;
    for (index, when) in rule.when.iter().enumerate() {
        push_clause(&mut clauses, std::slice::from_ref(when), reader, |_, when, reader| {
            reader.part = Some(Part::When(index));
            condition(when, namespace, reader)
        })?;
    }
    Ok(clauses)
}

/// One clause for a list of alternatives. A match left empty by unreadable values is true, so the clause goes; one left
/// empty by L7 attributes stays and never matches.
fn push_clause<T>(
    clauses: &mut Vec<Clause>,
    alternatives: &[T],
    reader: &mut Reader,
    translate: impl Fn(usize, &T, &mut Reader) -> Result<Match, DropRule>,
) -> Result<(), DropRule> {
    if alternatives.is_empty() {
        return Ok(());
    }
    let mut matches = Vec::with_capacity(alternatives.len());
    let mut always = false;
    let before = reader.problems.len();
    for (index, alternative) in alternatives.iter().enumerate() {
        reader.widened = false;
        let found = translate(index, alternative, reader)?;
        always |= reader.widened && found == Match::default();
        matches.push(found);
    }
    if !always {
        if reader.problems.len() > before && matches.iter().all(|found| *found == Match::default()) {
            reader.problems.push("nothing is left that can be seen on a connection, so the rule denies nothing".into());
        }
        clauses.push(Clause { matches });
    }
    Ok(())
}

fn operation(operation: &Operation, reader: &mut Reader) -> Result<Match, DropRule> {
    for (attribute, values) in [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ] {
        reader.unsupported(attribute, !values.is_empty(), L7_ONLY)?;
    }
    for attribute in operation.unknown.keys() {
        reader.unsupported(attribute, true, "is unknown")?;
    }
    Ok(Match {
        destination_ports: reader.field("ports", Polarity::Positive, &operation.ports, parse::port)?,
        not_destination_ports: reader.field("notPorts", Polarity::Negative, &operation.not_ports, parse::port)?,
        ..Match::default()
    })
}

fn source(source: &Source, namespace: &str, reader: &mut Reader) -> Result<Match, DropRule> {
    use Polarity::{Negative, Positive};
    for (attribute, values) in [
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ] {
        reader.unsupported(attribute, !values.is_empty(), L7_ONLY)?;
    }
    for (attribute, values) in [("trustDomains", &source.trust_domains), ("notTrustDomains", &source.not_trust_domains)]
    {
        reader.unsupported(attribute, !values.is_empty(), parse::NO_TRUST_DOMAINS)?;
    }
    for attribute in source.unknown.keys() {
        reader.unsupported(attribute, true, "is unknown")?;
    }
    let account = |value: &str| service_account(value, namespace);
    Ok(Match {
        principals: reader.principals("principals", Positive, &source.principals, string)?,
        not_principals: reader.principals("notPrincipals", Negative, &source.not_principals, string)?,
        namespaces: reader.field("namespaces", Positive, &source.namespaces, string)?,
        not_namespaces: reader.field("notNamespaces", Negative, &source.not_namespaces, string)?,
        service_accounts: reader.field("serviceAccounts", Positive, &source.service_accounts, account)?,
        not_service_accounts: reader.field("notServiceAccounts", Negative, &source.not_service_accounts, account)?,
        source_ips: reader.field("ipBlocks", Positive, &source.ip_blocks, ip_block)?,
        not_source_ips: reader.field("notIpBlocks", Negative, &source.not_ip_blocks, ip_block)?,
        ..Match::default()
    })
}

fn condition(when: &Condition, namespace: &str, reader: &mut Reader) -> Result<Match, DropRule> {
    use Polarity::{Negative, Positive};
    let key = when.key.as_str();
    let (values, not_values) = (&when.values, &when.not_values);
    let account = |value: &str| service_account(value, namespace);
    let mut found = Match::default();
    match key {
        "source.ip" => {
            found.source_ips = reader.field(key, Positive, values, ip_block)?;
            found.not_source_ips = reader.field(key, Negative, not_values, ip_block)?;
        }
        "source.namespace" => {
            found.namespaces = reader.field(key, Positive, values, string)?;
            found.not_namespaces = reader.field(key, Negative, not_values, string)?;
        }
        "source.principal" => {
            found.principals = reader.principals(key, Positive, values, string)?;
            found.not_principals = reader.principals(key, Negative, not_values, string)?;
        }
        "source.serviceAccount" => {
            found.service_accounts = reader.field(key, Positive, values, account)?;
            found.not_service_accounts = reader.field(key, Negative, not_values, account)?;
        }
        "destination.ip" => {
            found.destination_ips = reader.field(key, Positive, values, ip_block)?;
            found.not_destination_ips = reader.field(key, Negative, not_values, ip_block)?;
        }
        "destination.port" => {
            found.destination_ports = reader.field(key, Positive, values, parse::port)?;
            found.not_destination_ports = reader.field(key, Negative, not_values, parse::port)?;
        }
        _ if is_http(key) => reader.unsupported(&format!("when {key:?}"), true, L7_ONLY)?,
        _ => {
            reader.unknown_key(key)?;
            reader.widened = true;
        }
    }
    Ok(found)
}

/// Keys that exist and speak of requests.
pub(super) fn is_http(key: &str) -> bool {
    matches!(key, "remote.ip" | "connection.sni") || key.starts_with("request.") || key.starts_with("experimental.")
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

fn ip_block(value: &str) -> Result<Address, Mistake> {
    parse::ip_block(value).map(|(address, length)| Address { address, length })
}

fn service_account(value: &str, policy_namespace: &str) -> Result<ServiceAccountMatch, Mistake> {
    parse::service_account(value, policy_namespace)
        .map(|(namespace, service_account)| ServiceAccountMatch { namespace, service_account })
}
