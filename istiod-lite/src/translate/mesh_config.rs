//! MeshConfig as far as it is carried out: key `mesh` of ConfigMap `istio` in the mesh's own namespace. What of it is
//! not carried out is a [`Finding`], and one that cannot be read changes nothing: the last good one stays in force.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use mesh_proto::workload::Visibility;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::outside::refused_host;
use super::world::MeshSettings;
use crate::types::{Key, selects};

pub const CONFIG_MAP: &str = "istio";
/// Of the ConfigMap.
const KEY: &str = "mesh";
/// By which selectors mean a namespace by its name. The API server sets it.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// What is in force, and what is to be said of what was written.
#[derive(Debug, Clone, Default)]
pub struct MeshConfig {
    pub chosen: Arc<Chosen>,
    pub findings: Arc<[Finding]>,
}

/// What is carried out.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Chosen {
    /// Names of the trust domain in policies, beside its own.
    pub trust_domain_aliases: Vec<String>,
    /// Namespaces that none of them selects are as if they were not there; without any, all are.
    pub discovery_selectors: Vec<LabelSelector>,
    /// `None`: entries alone say how far they are seen.
    pub service_entry_visibility: Option<EntryVisibility>,
}

/// How far ServiceEntries are seen, whatever they say themselves.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EntryVisibility {
    default_visibility: Limit,
    /// The first whose rules all hold counts.
    policies: Vec<VisibilityPolicy>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct VisibilityPolicy {
    visibility: Limit,
    /// Of the entry's namespace. `None`: a rule that we don't know, which never holds.
    matching_rules: Vec<Option<LabelSelector>>,
}

/// As far as an entry may be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Limit {
    None,
    Namespace,
    Public,
}

impl Limit {
    /// What an entry that wants to be seen so far comes to.
    pub fn of(self, wanted: Option<Visibility>) -> Option<Visibility> {
        match self {
            Self::None => None,
            Self::Namespace => wanted.map(|_| Visibility::Namespace),
            Self::Public => wanted,
        }
    }
}

/// Something of MeshConfig that is not done as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its path in MeshConfig; empty: the whole.
    pub field: String,
    pub reason: &'static str,
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{}: {}", self.reason, self.message)
    }
}

const NOT_CARRIED_OUT: &str = "NotCarriedOut";
const NEEDS_RESTART: &str = "NeedsRestart";
const REFUSED: &str = "Refused";
const UNREADABLE: &str = "Unreadable";

impl MeshConfig {
    /// Is it this one?
    pub fn is_in(key: &Key, mesh: &MeshSettings) -> bool {
        *key.name == *CONFIG_MAP && *key.namespace == *mesh.root_namespace
    }

    /// What is in force once the ConfigMap is as it was `found`; `self` is what was before.
    pub fn after(&self, found: Option<&ConfigMap>, mesh: &MeshSettings) -> Self {
        let text = found.and_then(|found| found.data.as_ref()?.get(KEY));
        match text.map_or_else(|| Ok((Chosen::default(), Vec::new())), |text| read(text, mesh)) {
            Ok((chosen, findings)) => {
                // One value while it is the same, so that nothing is derived again.
                let chosen = if *self.chosen == chosen { Arc::clone(&self.chosen) } else { Arc::new(chosen) };
                Self { chosen, findings: findings.into() }
            }
            Err(reason) => {
                let message = format!("{reason}; what was in force before stays (after a restart, the defaults)");
                let finding = Finding { field: String::new(), reason: UNREADABLE, message };
                Self { chosen: Arc::clone(&self.chosen), findings: [finding].into() }
            }
        }
    }
}

impl Chosen {
    /// The trust domain and its other names; empty where there are none, as nothing is to be done about it then.
    pub fn trust_domains(&self, own: &str) -> Arc<[String]> {
        match self.trust_domain_aliases.is_empty() {
            true => Arc::default(),
            false => std::iter::once(own.to_owned()).chain(self.trust_domain_aliases.iter().cloned()).collect(),
        }
    }

    /// The names of those among `namespaces` that are not looked at.
    pub fn hidden<'a>(
        &self,
        namespaces: impl Iterator<Item = &'a Namespace>,
        mesh: &MeshSettings,
    ) -> BTreeSet<Arc<str>> {
        if self.discovery_selectors.is_empty() {
            return BTreeSet::new();
        }
        let is_hidden = |namespace: &&Namespace| {
            namespace.metadata.name.as_deref() != Some(&mesh.root_namespace)
                && !self.discovery_selectors.iter().any(|selector| selects_namespace(selector, namespace))
        };
        namespaces.filter(is_hidden).map(|found| found.metadata.name.as_deref().unwrap_or_default().into()).collect()
    }
}

impl EntryVisibility {
    /// How far entries of a namespace may be seen; one that is not known has no labels.
    pub fn of(&self, namespace: Option<&Namespace>) -> Limit {
        let unknown = Namespace::default();
        let namespace = namespace.unwrap_or(&unknown);
        let holds = |rule: &Option<LabelSelector>| rule.as_ref().is_some_and(|rule| selects_namespace(rule, namespace));
        let first = self.policies.iter().find(|policy| policy.matching_rules.iter().all(holds));
        first.map_or(self.default_visibility, |policy| policy.visibility)
    }
}

fn selects_namespace(selector: &LabelSelector, namespace: &Namespace) -> bool {
    let meta = &namespace.metadata;
    match (&meta.name, &meta.labels) {
        (Some(name), labels) if labels.as_ref().is_none_or(|labels| !labels.contains_key(NAMESPACE_NAME)) => {
            let mut labels = labels.clone().unwrap_or_default();
            labels.insert(NAMESPACE_NAME.to_owned(), name.clone());
            selects(selector, Some(&labels))
        }
        (_, labels) => selects(selector, labels.as_ref()),
    }
}

/// A principal under every name that the trust domain has. What does not say a trust domain (`*`, a suffix of more than
/// its name) is as it was; so is one of a trust domain that is another's.
pub fn principals(written: &str, domains: &[String]) -> Vec<String> {
    let as_it_is = || vec![written.to_owned()];
    let Some((domain, rest)) = written.split_once('/') else { return as_it_is() };
    let matches = |name: &String| match domain.strip_prefix('*') {
        Some("") => true,
        Some(suffix) => name.ends_with(suffix),
        None => name == domain,
    };
    if !domains.iter().any(matches) {
        return as_it_is();
    }
    let others = domains.iter().filter(|name| !matches(name)).map(|name| format!("{name}/{rest}"));
    as_it_is().into_iter().chain(others).collect()
}

/// # Errors
/// Why nothing of it can be relied on.
fn read(text: &str, mesh: &MeshSettings) -> Result<(Chosen, Vec<Finding>), String> {
    let value: Value = match text.trim() {
        "" => Value::Null,
        _ => serde_saphyr::from_str(text)
            .map_err(|error| format!("is not YAML: {}", error.to_string().lines().next().unwrap_or_default()))?,
    };
    let fields = match value {
        Value::Null => return Ok((Chosen::default(), Vec::new())),
        Value::Object(fields) => fields,
        _ => return Err("is not a MeshConfig, which has fields".into()),
    };
    let mut chosen = Chosen::default();
    let mut findings = Vec::new();
    let mut find = |field: &str, reason, message: String| {
        findings.push(Finding { field: field.to_owned(), reason, message });
    };
    for (field, value) in fields {
        if is_unset(&value) {
            continue;
        }
        match &*field {
            "trustDomain" => {
                let wanted: String = typed(&field, value)?;
                if wanted != mesh.trust_domain {
                    let message = format!(
                        "{:?} is the trust domain, as TRUST_DOMAIN says; write {wanted:?} there, for istiod and ztunnel, \
                         and restart both",
                        mesh.trust_domain
                    );
                    find(&field, NEEDS_RESTART, message);
                }
            }
            "rootNamespace" => {
                let wanted: String = typed(&field, value)?;
                if wanted != mesh.root_namespace {
                    let message = format!(
                        "{:?}, where istiod runs, is the mesh's namespace; {wanted:?} is one if istiod runs there",
                        mesh.root_namespace
                    );
                    find(&field, NEEDS_RESTART, message);
                }
            }
            "trustDomainAliases" => {
                chosen.trust_domain_aliases = typed(&field, value)?;
                let aliases = &mut chosen.trust_domain_aliases;
                if let Some(bad) = aliases.iter().find(|name| name.is_empty() || name.contains(['/', '*'])) {
                    return Err(format!("{field}: {bad:?} is not a trust domain"));
                }
                let mut seen = BTreeSet::from([mesh.trust_domain.clone()]);
                aliases.retain(|name| seen.insert(name.clone()));
            }
            "discoverySelectors" => {
                let selectors: Vec<Value> = typed(&field, value)?;
                let read = selectors.into_iter().enumerate();
                let read = read.map(|(index, value)| selector(&format!("{field}[{index}]"), value));
                chosen.discovery_selectors = read.collect::<Result<_, _>>()?;
            }
            "serviceEntryVisibility" => {
                chosen.service_entry_visibility = Some(entry_visibility(&field, value, &mut find)?);
            }
            "outboundTrafficPolicy" if is_only(&value, "mode", &["ALLOW_ANY"]) => {}
            "outboundTrafficPolicy" => {
                let message = "only {mode: ALLOW_ANY} is carried out: what the mesh does not know is passed through";
                find(&field, NOT_CARRIED_OUT, message.into());
            }
            "pathNormalization" if is_only(&value, "normalization", &["BASE", "DEFAULT"]) => {}
            "pathNormalization" => {
                find(&field, NOT_CARRIED_OUT, "waypoints normalize as BASE does, and in no other way".into());
            }
            "extensionProviders" => {
                let providers: Vec<Value> = typed(&field, value)?;
                for (index, provider) in providers.iter().enumerate() {
                    let at = format!("{field}[{index}]");
                    match refused_provider(provider, mesh) {
                        Some(message) => find(&at, REFUSED, message),
                        None => find(&at, NOT_CARRIED_OUT, "nobody asks providers or reports to them".into()),
                    }
                }
            }
            _ => find(&field, NOT_CARRIED_OUT, "nothing here reads it".into()),
        }
    }
    Ok((chosen, findings))
}

/// Why this provider is never called: by where it is. Every kind of provider says that in `service`: a host, of a registry's
/// namespace if it has one.
fn refused_provider(provider: &Value, mesh: &MeshSettings) -> Option<String> {
    let fields = provider.as_object()?;
    let (kind, service) =
        fields.iter().find_map(|(kind, of)| Some((kind, of.as_object()?.get("service")?.as_str()?)))?;
    let host = service.rsplit_once('/').map_or(service, |(_, host)| host);
    let why = refused_host(host, mesh)?;
    let name = fields.get("name").and_then(Value::as_str).unwrap_or_default();
    Some(format!(
        "provider {name:?} is never called: {kind}.service {service:?} {why}; name a Service or a ServiceEntry's host"
    ))
}

/// As good as not written.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        // What it has for fields may matter: see `serviceEntryVisibility`.
        Value::Object(_) | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Has it no field but this, and there one of these values?
fn is_only(value: &Value, field: &str, values: &[&str]) -> bool {
    value.as_object().is_some_and(|fields| {
        let fits = |value: &Value| is_unset(value) || value.as_str().is_some_and(|value| values.contains(&value));
        fields.iter().all(|(name, value)| name == field && fits(value))
    })
}

fn typed<T: DeserializeOwned>(field: &str, value: Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| format!("{field}: {error}"))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Selector {
    #[serde(default)]
    match_labels: BTreeMap<String, String>,
    #[serde(default)]
    match_expressions: Vec<Expression>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expression {
    key: String,
    operator: String,
    #[serde(default)]
    values: Vec<String>,
}

/// A selector of which every part is known: a misspelt one would select what it was not meant for.
fn selector(field: &str, value: Value) -> Result<LabelSelector, String> {
    let Selector { match_labels, match_expressions } = typed(field, value)?;
    for Expression { key, operator, values } in &match_expressions {
        let needs_values = match operator.as_str() {
            "In" | "NotIn" => true,
            "Exists" | "DoesNotExist" => false,
            other => return Err(format!("{field}: operator {other:?} of {key} is unknown")),
        };
        if needs_values == values.is_empty() {
            let what = if needs_values { "needs values" } else { "takes no values" };
            return Err(format!("{field}: operator {operator} of {key} {what}"));
        }
    }
    let expressions = match_expressions
        .into_iter()
        .map(|Expression { key, operator, values }| LabelSelectorRequirement { key, operator, values: Some(values) });
    Ok(LabelSelector { match_labels: Some(match_labels), match_expressions: Some(expressions.collect()) })
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WrittenVisibility {
    default_visibility: String,
    policies: Vec<WrittenPolicy>,
    apply_to_sidecars: bool,
    #[serde(flatten)]
    unknown: BTreeMap<String, Value>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct WrittenPolicy {
    visibility: String,
    matching_rules: Vec<BTreeMap<String, Value>>,
}

fn entry_visibility(
    field: &str,
    value: Value,
    find: &mut impl FnMut(&str, &'static str, String),
) -> Result<EntryVisibility, String> {
    let written: WrittenVisibility = typed(field, value)?;
    if written.apply_to_sidecars {
        find(&format!("{field}.applyToSidecars"), NOT_CARRIED_OUT, "there are no sidecars in this mesh".into());
    }
    for name in written.unknown.keys() {
        find(&format!("{field}.{name}"), NOT_CARRIED_OUT, "nothing here reads it".into());
    }
    let mut policies = Vec::new();
    for (index, policy) in written.policies.into_iter().enumerate() {
        let at = format!("{field}.policies[{index}]");
        let mut matching_rules = Vec::new();
        for (rule, mut fields) in policy.matching_rules.into_iter().enumerate() {
            let at = format!("{at}.matchingRules[{rule}]");
            let namespaces = fields.remove("namespaceSelector");
            let is_known = fields.is_empty() && namespaces.is_some();
            if !is_known {
                let others: Vec<&str> = fields.keys().map(String::as_str).collect();
                let message = format!("only namespaceSelector is known, not {:?}: it never holds", others.join(", "));
                find(&at, NOT_CARRIED_OUT, message);
            }
            let read = namespaces.map(|value| selector(&format!("{at}.namespaceSelector"), value)).transpose()?;
            matching_rules.push(read.filter(|_| is_known));
        }
        policies.push(VisibilityPolicy { visibility: limit(&at, &policy.visibility)?, matching_rules });
    }
    Ok(EntryVisibility { default_visibility: limit(field, &written.default_visibility)?, policies })
}

fn limit(field: &str, text: &str) -> Result<Limit, String> {
    match text {
        "" | "UNSPECIFIED" | "VISIBILITY_UNSPECIFIED" | "PUBLIC" => Ok(Limit::Public),
        "NAMESPACE" => Ok(Limit::Namespace),
        "NONE" => Ok(Limit::None),
        other => Err(format!("{field}: visibility {other:?} is none of PUBLIC, NAMESPACE, NONE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(before: &MeshConfig, text: &str) -> MeshConfig {
        let data = Some([(KEY.to_owned(), text.to_owned())].into());
        before.after(Some(&ConfigMap { data, ..ConfigMap::default() }), &MeshSettings::default())
    }

    fn said(config: &MeshConfig) -> Vec<String> {
        config.findings.iter().map(|finding| format!("{} {}", finding.field, finding.reason)).collect()
    }

    #[test]
    fn an_ordinary_one_is_carried_out_where_it_can_be_and_the_rest_is_said() {
        let config = after(
            &MeshConfig::default(),
            "
defaultConfig: {discoveryAddress: istiod.istio-system.svc:15012}
enablePrometheusMerge: true
rootNamespace: istio-system
trustDomain: cluster.local
trustDomainAliases: [old.example, cluster.local, old.example]
discoverySelectors: [{matchLabels: {mesh: 'yes'}}, {matchExpressions: [{key: app, operator: Exists}]}]
outboundTrafficPolicy: {mode: ALLOW_ANY}
pathNormalization: {normalization: BASE}
extensionProviders: []
",
        );
        assert_eq!(config.chosen.trust_domain_aliases, ["old.example"]);
        assert_eq!(config.chosen.discovery_selectors.len(), 2);
        assert_eq!(said(&config), ["defaultConfig NotCarriedOut", "enablePrometheusMerge NotCarriedOut"]);
    }

    #[test]
    fn a_provider_that_is_where_only_the_node_or_the_control_plane_is_is_refused() {
        let config = after(
            &MeshConfig::default(),
            "
extensionProviders:
- {name: opa, envoyExtAuthzGrpc: {service: opa.shop.svc.cluster.local, port: 9191}}
- {name: node, envoyExtAuthzHttp: {service: 127.0.0.1, port: 10250}}
- {name: cloud, envoyExtAuthzHttp: {service: 169.254.169.254, port: 80}}
- {name: own, envoyExtAuthzGrpc: {service: istio-system/istiod.istio-system.svc.cluster.local, port: 15010}}
- {name: odd, prometheus: {}}
",
        );
        let expected = [
            "extensionProviders[0] NotCarriedOut",
            "extensionProviders[1] Refused",
            "extensionProviders[2] Refused",
            "extensionProviders[3] Refused",
            "extensionProviders[4] NotCarriedOut",
        ];
        assert_eq!(said(&config), expected);
        let message = &config.findings[1].message;
        assert!(message.contains("\"node\"") && message.contains("is loopback"), "{message}");
    }

    #[test]
    fn what_others_than_this_process_must_be_told_needs_a_restart() {
        let config = after(&MeshConfig::default(), "{trustDomain: example.org, rootNamespace: mesh}");
        let mut said = said(&config);
        said.sort_unstable();
        assert_eq!(said, ["rootNamespace NeedsRestart", "trustDomain NeedsRestart"]);
        let config =
            after(&config, "{outboundTrafficPolicy: {mode: REGISTRY_ONLY}, pathNormalization: {normalization: NONE}}");
        assert_eq!(config.findings.len(), 2, "{config:?}");
    }

    #[test]
    fn one_that_cannot_be_read_leaves_the_last_good_one_in_force() {
        let good = after(&MeshConfig::default(), "trustDomainAliases: [old.example]");
        for bad in [
            "trustDomainAliases: [",
            "- a list",
            "trustDomainAliases: 5",
            "trustDomainAliases: [a/b]",
            "discoverySelectors: [{matchLabel: {a: b}}]",
            "discoverySelectors: [{matchExpressions: [{key: a, operator: Like}]}]",
            "discoverySelectors: [{matchExpressions: [{key: a, operator: In}]}]",
            "serviceEntryVisibility: {defaultVisibility: SOME}",
            "serviceEntryVisibility: {policies: [{visible: PUBLIC}]}",
        ] {
            let config = after(&good, bad);
            assert!(Arc::ptr_eq(&config.chosen, &good.chosen), "{bad}");
            assert_eq!(said(&config), [" Unreadable"], "{bad}");
        }
        let gone = good.after(None, &MeshSettings::default());
        assert_eq!((&*gone.chosen, gone.findings.len()), (&Chosen::default(), 0));
    }

    #[test]
    fn the_first_policy_that_holds_of_a_namespace_says_how_far_its_entries_are_seen() {
        let config = after(
            &MeshConfig::default(),
            "
serviceEntryVisibility:
  defaultVisibility: NAMESPACE
  applyToSidecars: true
  policies:
    - {visibility: NONE, matchingRules: [{hostnameSuffix: example.com}]}
    - visibility: PUBLIC
      matchingRules: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shared}}}]
    - visibility: NONE
      matchingRules: [{namespaceSelector: {matchLabels: {a: b}}}, {namespaceSelector: {matchLabels: {c: d}}}]
",
        );
        let namespace = |name: &str, labels: &[(&str, &str)]| {
            let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let mut namespace = Namespace::default();
            namespace.metadata.name = Some(name.to_owned());
            namespace.metadata.labels = Some(labels);
            namespace
        };
        let visibility = config.chosen.service_entry_visibility.as_ref().expect("it was written");
        assert_eq!(visibility.of(Some(&namespace("shared", &[]))), Limit::Public);
        assert_eq!(visibility.of(Some(&namespace("x", &[("a", "b"), ("c", "d")]))), Limit::None);
        assert_eq!(visibility.of(Some(&namespace("x", &[("a", "b")]))), Limit::Namespace);
        assert_eq!(visibility.of(None), Limit::Namespace);
        let expected = [
            "serviceEntryVisibility.applyToSidecars NotCarriedOut",
            "serviceEntryVisibility.policies[0].matchingRules[0] NotCarriedOut",
        ];
        assert_eq!(said(&config), expected);
        assert_eq!(Limit::Namespace.of(Some(Visibility::Public)), Some(Visibility::Namespace));
        assert_eq!(Limit::Public.of(Some(Visibility::Namespace)), Some(Visibility::Namespace), "a limit, not a wish");
        assert_eq!(Limit::Namespace.of(None), None);
    }

    #[test]
    fn a_principal_has_all_names_of_its_trust_domain() {
        let domains = ["new.example".to_owned(), "old.example".to_owned(), "other.org".to_owned()];
        let all = |written: &str| principals(written, &domains);
        let named = ["new.example/ns/a/sa/b", "old.example/ns/a/sa/b", "other.org/ns/a/sa/b"];
        for written in named {
            let mut found = all(written);
            found.sort_unstable();
            assert_eq!(found, named);
        }
        assert_eq!(all("*.example/ns/a/sa/b"), ["*.example/ns/a/sa/b", "other.org/ns/a/sa/b"]);
        assert_eq!(all("old.example/ns/a/*").len(), 3);
        for kept in ["*", "*/ns/a/sa/b", "*/sa/b", "foreign.org/ns/a/sa/b", "new.exam*", ""] {
            assert_eq!(all(kept), [kept]);
        }
        assert_eq!(principals("new.example/ns/a/sa/b", &[]), ["new.example/ns/a/sa/b"]);
    }

    #[test]
    fn the_meshs_own_namespace_is_never_hidden() {
        let config = after(&MeshConfig::default(), "discoverySelectors: [{matchLabels: {mesh: 'yes'}}]");
        let namespaces = ["istio-system", "shop", "bare"].map(|name| {
            let mut namespace = Namespace::default();
            namespace.metadata.name = Some(name.to_owned());
            namespace.metadata.labels = (name == "shop").then(|| [("mesh".to_owned(), "yes".to_owned())].into());
            namespace
        });
        let hidden = config.chosen.hidden(namespaces.iter(), &MeshSettings::default());
        assert_eq!(hidden.iter().map(|name| &**name).collect::<Vec<_>>(), ["bare"]);
    }
}
