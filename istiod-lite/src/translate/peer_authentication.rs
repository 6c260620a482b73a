//! PeerAuthentication → authorization that refuses connections without identity. DISABLE and PERMISSIVE are the same
//! here: the node proxy always offers mutual TLS. Port over workload over namespace over mesh; the oldest of a level.

use std::sync::LazyLock;

use mesh_proto::security::{Action, Authorization, Clause, Group, Match, Scope, StringMatch, string_match};

use super::verdict::{Status, Wanted, joined};
use super::world::World;
use crate::types::security::{MutualTls, PeerAuthenticationSpec};
use crate::types::{Object, matches_labels};

pub const CONDITION: &str = "Accepted";
const STATIC_STRICT: &str = "istio_converted_static_strict";

/// What stands for one that cannot be read: nobody knows which workloads it selects, so it closes its namespace.
static UNREADABLE: LazyLock<PeerAuthenticationSpec> = LazyLock::new(|| PeerAuthenticationSpec {
    mtls: MutualTls { mode: "STRICT".to_owned() },
    ..PeerAuthenticationSpec::default()
});

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Strict,
    Permissive,
}

/// `None` inherits. What we don't know is strict: the door stays closed.
fn mode(mtls: &MutualTls) -> Option<Mode> {
    match mtls.mode.as_str() {
        "" | "UNSET" => None,
        "PERMISSIVE" | "DISABLE" => Some(Mode::Permissive),
        _ => Some(Mode::Strict),
    }
}

type Policy = Object<PeerAuthenticationSpec>;

/// All PeerAuthentications, sorted into levels.
pub struct PeerAuthentications<'a> {
    world: &'a World,
    /// Oldest first, and before them those that cannot be read.
    sorted: Vec<(&'a Policy, &'a PeerAuthenticationSpec)>,
}

impl<'a> PeerAuthentications<'a> {
    pub fn new(world: &'a World) -> Self {
        let policies = world.peer_authentications.values();
        let mut sorted: Vec<_> =
            policies.map(|policy| (&**policy, policy.spec.as_ref().unwrap_or(&UNREADABLE))).collect();
        sorted.sort_by_key(|(policy, _)| (policy.spec.is_ok(), policy.age()));
        Self { world, sorted }
    }

    /// What is sent: the common strict policy, and one for each policy with port exceptions.
    pub fn authorizations(&self) -> Vec<Authorization> {
        let mut authorizations: Vec<Authorization> =
            self.sorted.iter().filter_map(|(policy, spec)| self.converted(policy, spec)).collect();
        if !self.world.peer_authentications.is_empty() {
            let groups = vec![Group { rules: vec![no_identity()] }];
            authorizations.push(deny(&self.world.mesh.root_namespace, STATIC_STRICT.into(), groups));
        }
        authorizations
    }

    /// The reference a workload carries, `<namespace>/<name>`.
    pub fn policy_of(
        &self,
        namespace: &str,
        labels: Option<&std::collections::BTreeMap<String, String>>,
    ) -> Option<String> {
        let selected = self.sorted.iter().find(|(policy, spec)| {
            policy.namespace() == namespace
                && namespace != self.world.mesh.root_namespace
                && selector(spec).is_some_and(|selector| matches_labels(selector, labels))
        });
        if let Some((policy, spec)) = selected
            && self.converted(policy, spec).is_some()
        {
            return Some(format!("{namespace}/{}", converted_name(policy)));
        }
        let effective = selected.and_then(|(_, spec)| mode(&spec.mtls)).unwrap_or_else(|| self.inherited(namespace));
        (effective == Mode::Strict).then(|| format!("{}/{STATIC_STRICT}", self.world.mesh.root_namespace))
    }

    /// Namespace over mesh over permissive.
    fn inherited(&self, namespace: &str) -> Mode {
        let level = |namespace: &str| {
            let (_, spec) = self
                .sorted
                .iter()
                .find(|(policy, spec)| policy.namespace() == namespace && selector(spec).is_none())?;
            mode(&spec.mtls)
        };
        level(namespace).or_else(|| level(&self.world.mesh.root_namespace)).unwrap_or(Mode::Permissive)
    }

    /// For policies whose ports differ from their base; it replaces the common one.
    fn converted(&self, policy: &Policy, spec: &PeerAuthenticationSpec) -> Option<Authorization> {
        if selector(spec).is_none() || policy.namespace() == self.world.mesh.root_namespace {
            return None;
        }
        let base = mode(&spec.mtls).unwrap_or_else(|| self.inherited(policy.namespace()));
        let exceptions: Vec<u32> = spec
            .port_level_mtls
            .iter()
            .filter_map(|(port, mtls)| Some((port.parse::<u16>().ok()?, mode(mtls)?)))
            .filter(|(_, mode)| *mode != base)
            .map(|(port, _)| port.into())
            .collect();
        if exceptions.is_empty() {
            return None;
        }
        let groups = match base {
            Mode::Strict => {
                let other_ports = exceptions
                    .iter()
                    .map(|port| clause(Match { not_destination_ports: vec![*port], ..Match::default() }));
                vec![Group { rules: std::iter::once(no_identity()).chain(other_ports).collect() }]
            }
            Mode::Permissive => exceptions
                .iter()
                .map(|port| Group { rules: vec![clause(Match { destination_ports: vec![*port], ..no_principal() })] })
                .collect(),
        };
        Some(deny(policy.namespace(), converted_name(policy), groups))
    }
}

/// Says something only when something is wrong.
pub fn condition(world: &World, policy: &Policy) -> Option<Wanted> {
    let spec = match &policy.spec {
        Ok(spec) => spec,
        Err(reason) => {
            let message = format!("{reason}; taken as STRICT for the whole namespace");
            return Some(Wanted::new(CONDITION, Status::False, "Invalid", message));
        }
    };
    let mut problems = Vec::new();
    let modes = std::iter::once(("mtls.mode".to_owned(), &spec.mtls))
        .chain(spec.port_level_mtls.iter().map(|(port, mtls)| (format!("portLevelMtls.{port}.mode"), mtls)));
    for (field, mtls) in modes {
        match mtls.mode.as_str() {
            "" | "UNSET" | "PERMISSIVE" | "STRICT" => {}
            "DISABLE" => problems.push(format!("{field}: DISABLE acts like PERMISSIVE in ambient mode")),
            other => problems.push(format!("{field}: {other:?} is unknown and taken as STRICT")),
        }
    }
    for port in spec.port_level_mtls.keys().filter(|port| port.parse::<u16>().is_err()) {
        problems.push(format!("portLevelMtls: {port:?} is not a port; ignored"));
    }
    if selector(spec).is_none() && !spec.port_level_mtls.is_empty() {
        problems.push("portLevelMtls: needs a selector; ignored".into());
    }
    if selector(spec).is_some() && policy.namespace() == world.mesh.root_namespace {
        problems.push("selector: not in the root namespace; ignored".into());
    }
    (!problems.is_empty()).then(|| Wanted::new(CONDITION, Status::False, "UnsupportedValue", joined(&problems)))
}

fn selector(spec: &PeerAuthenticationSpec) -> Option<&std::collections::BTreeMap<String, String>> {
    spec.selector.as_ref().map(|selector| &selector.match_labels).filter(|labels| !labels.is_empty())
}

fn converted_name(policy: &Policy) -> String {
    format!("converted_peer_authentication_{}", policy.name())
}

fn no_principal() -> Match {
    let presence = StringMatch { match_type: Some(string_match::MatchType::Presence(())) };
    Match { not_principals: vec![presence], ..Match::default() }
}

fn no_identity() -> Clause {
    clause(no_principal())
}

fn clause(found: Match) -> Clause {
    Clause { matches: vec![found] }
}

fn deny(namespace: &str, name: String, groups: Vec<Group>) -> Authorization {
    Authorization {
        name,
        namespace: namespace.to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        groups,
        dry_run: false,
    }
}
