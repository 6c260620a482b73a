//! PeerAuthentication → authorization that refuses connections without identity. DISABLE and PERMISSIVE are the same
//! here: the node proxy always offers mutual TLS. Port over workload over namespace over mesh; the oldest of a level.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::sync::LazyLock;

use mesh_proto::security::{Action, Authorization, Clause, Group, Match, Scope, StringMatch, string_match};

use super::verdict::{EXPLAIN, Problem, Status, Wanted, joined};
use super::world::World;
use crate::types::security::{MutualTls, PeerAuthenticationSpec};
use crate::types::{Held, Key, Labels, Object};

pub const CONDITION: &str = "Accepted";
/// The common one.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";
/// Before the name of a policy that has one of its own.
pub const CONVERTED: &str = "converted_peer_authentication_";

/// What stands for one that cannot be read: nobody knows which workloads it selects, so it closes its namespace.
static UNREADABLE: LazyLock<PeerAuthenticationSpec> = LazyLock::new(|| PeerAuthenticationSpec {
    mtls: MutualTls { mode: "STRICT".to_owned() },
    ..PeerAuthenticationSpec::default()
});

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Strict,
    Permissive,
}

/// What is asked of connections to a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    pub mode: Mode,
    /// The policy that says so; none does where nothing was written.
    pub by: Option<Key>,
    /// The ports where something else is asked, and the policy that says so.
    pub ports: Option<(Key, BTreeMap<u16, Mode>)>,
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

fn spec_of(policy: &Policy) -> &PeerAuthenticationSpec {
    policy.spec.as_ref().unwrap_or(&UNREADABLE)
}

/// Does it speak of some workloads only? One that cannot be read speaks of all.
pub fn has_selector(policy: &Policy) -> bool {
    selector(spec_of(policy)).is_some()
}

/// Whether it may speak of what has these labels.
pub fn may_select(policy: &Policy, labels: &Labels) -> bool {
    selector(spec_of(policy)).is_none_or(|selector| selector.are_among(labels))
}

/// All PeerAuthentications, sorted into levels.
#[derive(Debug, Default)]
pub struct PeerAuthentications {
    root_namespace: String,
    namespaces: BTreeMap<String, Level>,
}

/// Those of one namespace.
#[derive(Debug, Default)]
struct Level {
    /// Oldest first.
    selecting: Vec<Held<Policy>>,
    /// For all its workloads: one that cannot be read, else the oldest.
    general: Option<Held<Policy>>,
}

impl PeerAuthentications {
    pub fn new(world: &World) -> Self {
        let mut sorted: Vec<Held<Policy>> = world.peer_authentications.values().cloned().collect();
        sorted.sort_by_cached_key(|policy| (policy.spec.is_ok(), policy.age()));
        let mut this = Self { root_namespace: world.mesh.root_namespace.clone(), ..Self::default() };
        for policy in sorted {
            let level = this.namespaces.entry(policy.namespace().to_owned()).or_default();
            match has_selector(&policy) {
                true => level.selecting.push(policy),
                false => _ = level.general.get_or_insert(policy),
            }
        }
        this
    }

    /// What is sent: the common strict policy, and one for each policy with port exceptions.
    pub fn authorizations(&self) -> Vec<Authorization> {
        let mut authorizations: Vec<Authorization> =
            self.namespaces.values().flat_map(|of| &of.selecting).filter_map(|it| self.converted(it)).collect();
        if !self.namespaces.is_empty() {
            let groups = vec![Group { rules: vec![no_identity()] }];
            authorizations.push(deny(&self.root_namespace, STATIC_STRICT.into(), groups));
        }
        authorizations
    }

    /// The reference a workload carries, `<namespace>/<name>`.
    pub fn policy_of(&self, namespace: &str, labels: &Labels) -> Option<String> {
        let selected = self.selected(namespace, labels);
        if let Some(policy) = selected
            && self.own(policy).is_some()
        {
            return Some(format!("{namespace}/{}", converted_name(policy)));
        }
        (self.base(namespace, selected).0 == Mode::Strict).then(|| format!("{}/{STATIC_STRICT}", self.root_namespace))
    }

    /// What [`Self::policy_of`] comes to, and who says so.
    pub fn demand(&self, namespace: &str, labels: &Labels) -> Demand {
        let selected = self.selected(namespace, labels);
        let (mode, by) = self.base(namespace, selected);
        let exceptions = selected.map(|policy| (policy.key(), exceptions(spec_of(policy), mode).collect()));
        let ports = exceptions.filter(|(_, ports): &(Key, BTreeMap<u16, Mode>)| !ports.is_empty());
        Demand { mode, by: by.map(Object::key), ports }
    }

    /// The one that speaks of workloads with these labels in particular.
    fn selected(&self, namespace: &str, labels: &Labels) -> Option<&Policy> {
        let level = self.namespaces.get(namespace).filter(|_| namespace != self.root_namespace)?;
        level.selecting.iter().find(|policy| may_select(policy, labels)).map(|policy| &**policy)
    }

    /// Apart from ports: what `selected` says, else what is inherited.
    fn base<'a>(&'a self, namespace: &str, selected: Option<&'a Policy>) -> (Mode, Option<&'a Policy>) {
        let own = selected.and_then(|policy| Some((mode(&spec_of(policy).mtls)?, Some(policy))));
        own.unwrap_or_else(|| self.inherited(namespace))
    }

    /// Namespace over mesh over permissive.
    fn inherited(&self, namespace: &str) -> (Mode, Option<&Policy>) {
        let level = |namespace: &str| {
            let policy: &Policy = self.namespaces.get(namespace)?.general.as_ref()?;
            Some((mode(&spec_of(policy).mtls)?, Some(policy)))
        };
        level(namespace).or_else(|| level(&self.root_namespace)).unwrap_or((Mode::Permissive, None))
    }

    /// Of a policy whose ports differ from its base: that, and the ports.
    fn own<'a>(&self, policy: &'a Policy) -> Option<(Mode, impl Iterator<Item = u32> + use<'a>)> {
        let spec = spec_of(policy);
        if selector(spec).is_none() || policy.namespace() == self.root_namespace {
            return None;
        }
        let (base, _) = self.base(policy.namespace(), Some(policy));
        let mut exceptions = exceptions(spec, base).map(|(port, _)| port.into()).peekable();
        exceptions.peek()?;
        Some((base, exceptions))
    }

    /// It replaces the common one.
    fn converted(&self, policy: &Policy) -> Option<Authorization> {
        let (base, exceptions) = self.own(policy)?;
        let exceptions: Vec<u32> = exceptions.collect();
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

/// The ports where `spec` asks for something else than `base`.
fn exceptions(spec: &PeerAuthenticationSpec, base: Mode) -> impl Iterator<Item = (u16, Mode)> {
    let asked = spec.port_level_mtls.iter().filter_map(|(port, mtls)| Some((port.parse().ok()?, mode(mtls)?)));
    asked.filter(move |(_, mode)| *mode != base)
}

/// Says something only when something is wrong.
pub fn condition(world: &World, policy: &Policy) -> Option<Wanted> {
    let spec = match &policy.spec {
        Ok(spec) => spec,
        Err(reason) => {
            let message = format!("{reason}; taken as STRICT for the whole namespace");
            let wanted = Wanted::new(CONDITION, Status::False, "Invalid", message);
            return Some(wanted.because([&Problem::fault(reason.as_str(), EXPLAIN)]));
        }
    };
    let mut problems: Vec<Problem> = Vec::new();
    let modes = std::iter::once(("mtls.mode".to_owned(), &spec.mtls))
        .chain(spec.port_level_mtls.iter().map(|(port, mtls)| (format!("portLevelMtls.{port}.mode"), mtls)));
    for (field, mtls) in modes {
        match mtls.mode.as_str() {
            "" | "UNSET" | "PERMISSIVE" | "STRICT" => {}
            "DISABLE" => problems.push(format!("{field}: DISABLE acts like PERMISSIVE in ambient mode").into()),
            other => {
                let problem = Problem::fault(format!("{field}: {other:?} is unknown"), MODES);
                problems.push(problem.worded(|message| message + " and taken as STRICT"));
            }
        }
    }
    for port in spec.port_level_mtls.keys().filter(|port| port.parse::<NonZeroU16>().is_err()) {
        let mend = "write the number, from 1 to 65535, that the container listens on";
        let problem = Problem::fault(format!("portLevelMtls: {port:?} is not a port"), mend);
        problems.push(problem.worded(|message| message + "; ignored"));
    }
    if selector(spec).is_none() && !spec.port_level_mtls.is_empty() {
        let mend = "name the workloads in selector.matchLabels, or take the ports out";
        let problem = Problem::fault("portLevelMtls: needs a selector", mend);
        problems.push(problem.worded(|message| message + "; ignored"));
    }
    if selector(spec).is_some() && policy.namespace() == world.mesh.root_namespace {
        problems.push("selector: not in the root namespace; ignored".into());
    }
    (!problems.is_empty())
        .then(|| Wanted::new(CONDITION, Status::False, "UnsupportedValue", joined(&problems)).because(&problems))
}

/// What mends a mode that there is not.
const MODES: &str = "write STRICT, PERMISSIVE, DISABLE or UNSET";

fn selector(spec: &PeerAuthenticationSpec) -> Option<&Labels> {
    spec.selector.as_ref().map(|selector| &selector.match_labels).filter(|labels| !labels.is_empty())
}

fn converted_name(policy: &Policy) -> String {
    format!("{CONVERTED}{}", policy.name())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::fixture;

    #[test]
    fn what_is_demanded_and_by_whom_is_what_is_sent() {
        let policy = |key: &str, age: u8, spec: &str| {
            let (namespace, name) = key.split_once('/').expect("a key");
            format!(
                "kind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '2026-01-0{age}T00:00:00Z'}}\nspec: {spec}\n---\n"
            )
        };
        let world = fixture::world(&[
            policy("istio-system/mesh", 1, "{mtls: {mode: STRICT}}"),
            policy("open/default", 1, "{mtls: {mode: PERMISSIVE}}"),
            policy("open/web", 2, "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}"),
            policy("open/younger", 3, "{selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}}"),
            policy("unset/default", 1, "{mtls: {mode: UNSET}}"),
            policy("unset/api", 1, "{selector: {matchLabels: {app: api}}, portLevelMtls: {'80': {mode: DISABLE}, '81': {mode: STRICT}}}"),
        ].concat());
        let policies = PeerAuthentications::new(&world);
        let labels = |app: &str| Labels::from(BTreeMap::from([("app".to_owned(), app.to_owned())]));
        use Mode::{Permissive, Strict};
        for (namespace, app, mode, by, port, sent) in [
            (
                "shop",
                "web",
                Strict,
                Some("istio-system/mesh"),
                None,
                Some("istio-system/istio_converted_static_strict"),
            ),
            ("open", "api", Permissive, Some("open/default"), None, None),
            ("open", "web", Strict, Some("open/web"), None, Some("istio-system/istio_converted_static_strict")),
            (
                "unset",
                "web",
                Strict,
                Some("istio-system/mesh"),
                None,
                Some("istio-system/istio_converted_static_strict"),
            ),
            (
                "unset",
                "api",
                Strict,
                Some("istio-system/mesh"),
                Some(80),
                Some("unset/converted_peer_authentication_api"),
            ),
        ] {
            let (of, labels) = (format!("{namespace}/{app}"), labels(app));
            let demand = policies.demand(namespace, &labels);
            assert_eq!((demand.mode, demand.by.map(|by| by.to_string())), (mode, by.map(str::to_owned)), "{of}");
            let ports = demand.ports.map(|(by, ports)| (by.to_string(), ports));
            assert_eq!(ports, port.map(|port| (of.clone(), BTreeMap::from([(port, Permissive)]))), "{of}");
            assert_eq!(policies.policy_of(namespace, &labels).as_deref(), sent, "{of}");
        }
        let none = PeerAuthentications::new(&World::default()).demand("shop", &Labels::default());
        assert_eq!(none, Demand { mode: Permissive, by: None, ports: None });
    }
}
