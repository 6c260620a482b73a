//! Istio's security API: AuthorizationPolicy and PeerAuthentication. Field meanings are Istio's.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{CustomKind, Labels, Lenient};

pub const GROUP: &str = "security.istio.io";

impl CustomKind for AuthorizationPolicySpec {
    const GROUP: &'static str = GROUP;
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "AuthorizationPolicy";
    const PLURAL: &'static str = "authorizationpolicies";
}

impl CustomKind for PeerAuthenticationSpec {
    const GROUP: &'static str = GROUP;
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "PeerAuthentication";
    const PLURAL: &'static str = "peerauthentications";
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadSelector {
    pub match_labels: Labels,
}

/// Decodes from anything: what cannot be read is left out and named, so that the policy can be closed as far as it reaches.
#[derive(Debug, Clone, Default)]
pub struct AuthorizationPolicySpec {
    pub selector: Option<WorkloadSelector>,
    /// Of `targetRef` and `targetRefs`, those that can be read.
    pub targets: Vec<TargetRef>,
    /// Meant for waypoints: it has targets, readable or not.
    pub is_targeted: bool,
    /// `ALLOW` when absent.
    pub action: Option<String>,
    /// Rules that are no list are one unreadable rule.
    pub rules: Vec<Lenient<Rule>>,
    /// Why parts of it cannot be read, with the field.
    pub unreadable: Vec<String>,
    /// Fields that mean nothing without another value of `action`.
    pub unused: Vec<String>,
}

impl<'de> Deserialize<'de> for AuthorizationPolicySpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut spec = Self::default();
        let mut fields = match Value::deserialize(deserializer)? {
            Value::Object(fields) => fields,
            Value::Null => return Ok(spec),
            other => {
                spec.unreadable.push(format!("spec: {other} is not an object"));
                return Ok(spec);
            }
        };
        let mut take = |field: &str| fields.remove(field).filter(|value| !value.is_null());
        spec.selector = take("selector").and_then(|value| spec.read("selector", value));
        let targets = match take("targetRefs") {
            None => Vec::new(),
            Some(Value::Array(targets)) => targets,
            Some(other) => vec![other],
        };
        let targets: Vec<Value> = take("targetRef").into_iter().chain(targets).collect();
        spec.is_targeted = !targets.is_empty();
        for target in targets {
            let target = spec.read("targetRefs", target);
            spec.targets.extend(target);
        }
        let provider = take("provider");
        spec.action = take("action").map(|action| action.as_str().map_or_else(|| action.to_string(), str::to_owned));
        if let Some(rules) = take("rules") {
            spec.rules =
                Vec::deserialize(rules).unwrap_or_else(|error| vec![Lenient::Bad(format!("not a list: {error}"))]);
        }
        if provider.is_some() && spec.action.as_deref() != Some("CUSTOM") {
            spec.unused.push("provider: is only asked by action CUSTOM".into());
        }
        Ok(spec)
    }
}

impl AuthorizationPolicySpec {
    fn read<T: DeserializeOwned>(&mut self, field: &str, value: Value) -> Option<T> {
        T::deserialize(value).map_err(|error| self.unreadable.push(format!("{field}: {error}"))).ok()
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct TargetRef {
    #[serde(default)]
    pub group: String,
    pub kind: String,
    pub name: String,
    pub namespace: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Rule {
    pub from: Vec<From>,
    pub to: Vec<To>,
    pub when: Vec<Condition>,
    #[serde(flatten)]
    pub unknown: BTreeMap<String, Value>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct From {
    #[serde(default)]
    pub source: Source,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct To {
    #[serde(default)]
    pub operation: Operation,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Source {
    pub principals: Vec<String>,
    pub not_principals: Vec<String>,
    pub request_principals: Vec<String>,
    pub not_request_principals: Vec<String>,
    pub namespaces: Vec<String>,
    pub not_namespaces: Vec<String>,
    pub service_accounts: Vec<String>,
    pub not_service_accounts: Vec<String>,
    pub ip_blocks: Vec<String>,
    pub not_ip_blocks: Vec<String>,
    pub remote_ip_blocks: Vec<String>,
    pub not_remote_ip_blocks: Vec<String>,
    pub trust_domains: Vec<String>,
    pub not_trust_domains: Vec<String>,
    /// Attributes of other versions of the API.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, Value>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Operation {
    pub hosts: Vec<String>,
    pub not_hosts: Vec<String>,
    pub ports: Vec<String>,
    pub not_ports: Vec<String>,
    pub methods: Vec<String>,
    pub not_methods: Vec<String>,
    pub paths: Vec<String>,
    pub not_paths: Vec<String>,
    #[serde(flatten)]
    pub unknown: BTreeMap<String, Value>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    pub key: String,
    #[serde(default)]
    pub values: Vec<String>,
    #[serde(default)]
    pub not_values: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerAuthenticationSpec {
    pub selector: Option<WorkloadSelector>,
    pub mtls: MutualTls,
    pub port_level_mtls: BTreeMap<String, MutualTls>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct MutualTls {
    /// UNSET when empty.
    pub mode: String,
}
