//! What users want otherwise about the objects behind a waypoint: ConfigMaps of strategic merge patches, one of defaults
//! for a class (label [`DEFAULTS_FOR`], in the mesh's own namespace) and one of a Gateway
//! (`spec.infrastructure.parametersRef`). Each is read once, when it arrives.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::{Value, json};

use super::binding;
use super::verdict::joined;
use super::world::World;
use crate::types::gateway::{GatewaySpec, ParametersRef};
use crate::types::{Key, created, label};
use crate::{schema, strategic};

/// On a ConfigMap: the class of Gateways whose defaults it holds.
pub const DEFAULTS_FOR: &str = "gateway.istio.io/defaults-for-class";

/// The kinds of objects that a waypoint consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    ServiceAccount,
    Service,
    Deployment,
    /// Only where a patch asks for it.
    HorizontalPodAutoscaler,
    /// Only where a patch asks for it.
    PodDisruptionBudget,
}

impl Part {
    pub const ALL: [Self; 5] = [
        Self::ServiceAccount,
        Self::Service,
        Self::Deployment,
        Self::HorizontalPodAutoscaler,
        Self::PodDisruptionBudget,
    ];

    /// Group, version, kind and plural, as the API has them.
    pub fn api(self) -> (&'static str, &'static str, &'static str, &'static str) {
        match self {
            Self::ServiceAccount => ("", "v1", "ServiceAccount", "serviceaccounts"),
            Self::Service => ("", "v1", "Service", "services"),
            Self::Deployment => ("apps", "v1", "Deployment", "deployments"),
            Self::HorizontalPodAutoscaler => {
                ("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
            }
            Self::PodDisruptionBudget => ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
        }
    }

    pub fn kind(self) -> &'static str {
        self.api().2
    }

    pub fn api_version(self) -> String {
        let (group, version, ..) = self.api();
        if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
    }

    /// Of a ConfigMap.
    pub fn key(self) -> &'static str {
        match self {
            Self::ServiceAccount => "serviceAccount",
            Self::Service => "service",
            Self::Deployment => "deployment",
            Self::HorizontalPodAutoscaler => "horizontalPodAutoscaler",
            Self::PodDisruptionBudget => "podDisruptionBudget",
        }
    }

    pub(super) fn schema(self) -> Value {
        schema::reference(&match self {
            Self::ServiceAccount => schema::name_of::<ServiceAccount>(),
            Self::Service => schema::name_of::<Service>(),
            Self::Deployment => schema::name_of::<Deployment>(),
            Self::HorizontalPodAutoscaler => schema::name_of::<HorizontalPodAutoscaler>(),
            Self::PodDisruptionBudget => schema::name_of::<PodDisruptionBudget>(),
        })
    }
}

pub type Patches = BTreeMap<Part, Value>;

/// What became of looking for a ConfigMap.
#[derive(Debug)]
pub struct Parameters {
    /// The class whose defaults it holds.
    class: Option<String>,
    /// Nanoseconds since the epoch.
    created: i64,
    /// Or what is wrong with it.
    patches: Result<Patches, String>,
}

impl Parameters {
    pub fn read(found: ConfigMap) -> Self {
        let class = label(&found.metadata, DEFAULTS_FOR).map(str::to_owned);
        let mut patches = Patches::new();
        let mut problems = Vec::new();
        for (key, text) in found.data.iter().flatten() {
            match Part::ALL.into_iter().find(|part| part.key() == key) {
                None => problems.push(unknown_key(key)),
                Some(part) => match patch(part, text) {
                    Ok(patch) => _ = patches.insert(part, patch),
                    Err(problem) => problems.push(format!("{key}: {problem}")),
                },
            }
        }
        problems.extend(found.binary_data.iter().flatten().map(|(key, _)| unknown_key(key)));
        let patches = if problems.is_empty() { Ok(patches) } else { Err(joined(&problems)) };
        Self { class, created: created(&found.metadata), patches }
    }

    /// One that is not there.
    pub fn missing() -> Self {
        Self::unreadable("does not exist: create it, or take the reference away".into())
    }

    /// One that the API does not show.
    pub fn unreadable(reason: String) -> Self {
        Self { class: None, created: 0, patches: Err(reason) }
    }
}

fn unknown_key(key: &str) -> String {
    let known: Vec<&str> = Part::ALL.iter().map(|part| part.key()).collect();
    format!("{key}: is none of the keys {}", known.join(", "))
}

fn patch(part: Part, text: &str) -> Result<Value, String> {
    let patch: Value = match text.trim() {
        "" => Value::Null,
        _ => {
            serde_saphyr::from_str(text).map_err(|error| format!("is not YAML: {}", first_line(&error.to_string())))?
        }
    };
    let patch = match patch {
        // There to ask for the object.
        Value::Null => json!({}),
        Value::Object(_) => patch,
        _ => return Err(format!("is not a part of a {}", part.kind())),
    };
    let node = part.schema();
    if let Some(problem) = schema::type_error(&patch, &node, "") {
        return Err(problem);
    }
    let mut unknown = Vec::new();
    schema::prune(&mut patch.clone(), &node, "", &mut unknown);
    unknown.retain(|field| !is_directive(field));
    if !unknown.is_empty() {
        return Err(format!("a {} has no {}", part.kind(), unknown.join(", ")));
    }
    strategic::merge(&mut json!({}), &patch, &node).map_err(|bad| bad.to_string())?;
    Ok(patch)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// `$patch` and the like, of a strategic merge patch.
fn is_directive(field: &str) -> bool {
    field.starts_with('$') || field.contains(".$")
}

/// What applies to a Gateway, in this order.
#[derive(Debug, Default)]
pub struct Applying<'a> {
    /// Each with the name of its ConfigMap.
    pub patches: Vec<(String, &'a Patches)>,
    /// Defaults that do not count, as older ones do.
    pub ignored: Vec<&'a Key>,
}

impl Applying<'_> {
    pub fn asks_for(&self, part: Part) -> bool {
        self.patches.iter().any(|(_, patches)| patches.contains_key(&part))
    }
}

/// Why nothing can be said of the objects of a Gateway.
#[derive(Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Nobody has looked for its ConfigMap yet.
    NotRead,
    Invalid(String),
}

/// The patches for a Gateway: those of its class, then its own.
///
/// # Errors
/// A ConfigMap that is not there, or not as it should be.
pub fn of<'a>(world: &'a World, gateway: &Key, spec: &GatewaySpec) -> Result<Applying<'a>, Unusable> {
    let mut applying = Applying::default();
    let class = Some(spec.gateway_class_name.as_str());
    let mut defaults: Vec<_> =
        world.class_defaults.iter().filter(|(_, found)| found.class.as_deref() == class).collect();
    defaults.sort_by_key(|(_, found)| found.created);
    let mut add = |key: &Key, found: &'a Parameters, place: &str| {
        let name = format!("{place}ConfigMap {key}");
        match &found.patches {
            Ok(patches) => {
                applying.patches.push((name, patches));
                Ok(())
            }
            Err(problem) => Err(Unusable::Invalid(format!("{name}: {problem}"))),
        }
    };
    let mut defaults = defaults.into_iter();
    if let Some((key, found)) = defaults.next() {
        add(key, found, "")?;
    }
    if let Some(reference) = &spec.infrastructure.parameters_ref {
        let key = config_map(gateway, reference).map_err(Unusable::Invalid)?;
        let found = world.parameters.get(&key).ok_or(Unusable::NotRead)?;
        add(&key, found, "spec.infrastructure.parametersRef: ")?;
    }
    applying.ignored.extend(defaults.map(|(key, _)| key));
    Ok(applying)
}

fn config_map(gateway: &Key, reference: &ParametersRef) -> Result<Key, String> {
    let ParametersRef { group, kind, name } = reference;
    if !matches!(group.as_str(), "" | "core") || kind != "ConfigMap" {
        return Err(format!(
            "spec.infrastructure.parametersRef: a {kind} of group {group:?} is not read here: name a ConfigMap \
             (group \"\", kind ConfigMap)"
        ));
    }
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    if name.is_empty() || !name.bytes().all(plain) {
        return Err(format!("spec.infrastructure.parametersRef.name: no ConfigMap can be called {name:?}"));
    }
    Ok(Key::new(gateway.namespace.clone(), name.as_str()))
}

/// The ConfigMaps that waypoints refer to.
pub fn referenced(world: &World) -> BTreeSet<Key> {
    let specs = binding::waypoints(world).filter_map(|(key, gateway)| Some((key, gateway.spec.as_ref().ok()?)));
    specs.filter_map(|(key, spec)| config_map(key, spec.infrastructure.parameters_ref.as_ref()?).ok()).collect()
}

/// Whether some of those have not been looked for yet.
pub fn are_unread(world: &World) -> bool {
    referenced(world).iter().any(|key| !world.parameters.contains_key(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> Parameters {
        let value: Value = serde_saphyr::from_str(yaml).expect("YAML");
        Parameters::read(serde_json::from_value(value).expect("a ConfigMap"))
    }

    #[test]
    fn what_cannot_be_done_is_named_with_its_key_and_field() {
        for (data, said) in [
            ("{deployment: 'spec: {replicas: 2}'}", ""),
            ("{horizontalPodAutoscaler: ''}", ""),
            (
                "{deployment: 'spec: {template: {spec: {containers: [{name: istio-proxy, resources: {limits: {cpu: 1}}}]}}}'}",
                "",
            ),
            ("{deployment: 'spec: {template: {spec: {containers: [{name: a, $patch: delete}]}}}'}", ""),
            ("{Deployment: ''}", "Deployment: is none of the keys serviceAccount, service, deployment, "),
            ("{deployment: 'spec: ['}", "deployment: is not YAML: "),
            ("{deployment: '[1]'}", "deployment: is not a part of a Deployment"),
            ("{deployment: 'spec: {replica: 2}'}", "deployment: a Deployment has no spec.replica"),
            ("{deployment: 'spec: {replicas: many}'}", "field spec.replicas of type integer"),
            ("{service: 'spec: {$patch: explode}'}", "service: invalid strategic merge patch: unknown $patch"),
            ("{service: 'spec: {ports: [{name: x}]}'}", "an element lacks its merge key \"port\""),
        ] {
            let found = read(&format!("{{metadata: {{name: p}}, data: {data}}}")).patches;
            match found {
                Ok(_) => assert_eq!(said, "", "{data}"),
                Err(problem) => assert!(!said.is_empty() && problem.contains(said), "{data}: {problem}"),
            }
        }
        let binary = read("{metadata: {name: p}, binaryData: {deployment: AAAA}}").patches;
        assert!(binary.expect_err("no text").contains("deployment: is none of"));
    }

    #[test]
    fn a_problem_takes_one_line() {
        let found = read("{metadata: {name: p}, data: {deployment: \"a: b\\n c: [\\n\"}}").patches;
        let problem = found.expect_err("no YAML");
        assert!(!problem.contains('\n') && problem.len() > "deployment: is not YAML: ".len(), "{problem:?}");
    }
}
