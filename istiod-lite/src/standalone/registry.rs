//! Which kinds are served: the built-in ones and those that CustomResourceDefinitions add, found by path.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock, OnceLock};

use k8s_openapi::api as v;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use serde_json::{Value, json};

use super::cel::Rules;
use super::schema;

pub const CRDS: &str = "apiextensions.k8s.io/customresourcedefinitions";
pub const NAMESPACES: &str = "/namespaces";
pub const PODS: &str = "/pods";
pub const SERVICES: &str = "/services";
pub const SERVICE_ACCOUNTS: &str = "/serviceaccounts";
pub const CONFIG_MAPS: &str = "/configmaps";

/// Where the scale subresource reads and writes, as dotted paths below the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalePaths {
    pub spec: String,
    pub status: String,
    pub selector: Option<String>,
}

/// One served kind in one version.
#[derive(Debug, Clone)]
pub struct Kind {
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub singular: String,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub namespaced: bool,
    pub has_status: bool,
    pub scale: Option<ScalePaths>,
    /// `<group>/<plural>`, the key of its objects in the store.
    pub storage: Arc<str>,
    pub schema: Value,
    pub source: Source,
    /// Only POST, nothing stored (reviews).
    pub create_only: bool,
    rules: OnceLock<Arc<Rules>>,
}

#[derive(Debug, Clone)]
pub enum Source {
    /// Name of its definition.
    BuiltIn(String),
    Custom {
        columns: Vec<Value>,
    },
}

impl Kind {
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    pub fn is_custom(&self) -> bool {
        matches!(self.source, Source::Custom { .. })
    }

    /// The schema's rules in CEL, compiled when first asked for. What is wrong with them was told to who wrote the
    /// definition.
    pub fn rules(&self) -> &Rules {
        self.rules.get_or_init(|| Arc::new(Rules::compile(&self.schema, "", &mut Vec::new())))
    }

    pub fn verbs(&self) -> &'static [&'static str] {
        if self.create_only {
            &["create"]
        } else {
            &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
        }
    }

    /// Whether spec changes count in `metadata.generation`.
    pub fn has_generation(&self) -> bool {
        self.is_custom()
            || matches!(
                self.group.as_str(),
                "apps"
                    | "batch"
                    | "policy"
                    | "networking.k8s.io"
                    | "apiextensions.k8s.io"
                    | "admissionregistration.k8s.io"
            )
    }
}

/// All served kinds at one moment.
#[derive(Debug, Default)]
pub struct Registry {
    kinds: BTreeMap<(String, String, String), Arc<Kind>>,
    /// Versions of each group, preferred first, groups in discovery order.
    groups: Vec<(String, Vec<String>)>,
}

impl Registry {
    /// The built-in kinds and those of the given (established) CustomResourceDefinitions.
    pub fn new<'a>(crds: impl IntoIterator<Item = &'a Value>) -> Self {
        let mut registry = Self::default();
        for kind in built_in() {
            registry.add(kind);
        }
        let mut custom: Vec<Kind> = crds.into_iter().flat_map(custom_kinds).collect();
        custom.sort_by(|a, b| a.group.cmp(&b.group).then(priority(&b.version).cmp(&priority(&a.version))));
        for kind in custom {
            registry.add(kind);
        }
        registry
    }

    fn add(&mut self, kind: Kind) {
        match self.groups.iter_mut().find(|(g, _)| *g == kind.group) {
            Some((_, versions)) if versions.contains(&kind.version) => {}
            Some((_, versions)) => versions.push(kind.version.clone()),
            None => self.groups.push((kind.group.clone(), vec![kind.version.clone()])),
        }
        let key = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
        self.kinds.entry(key).or_insert_with(|| Arc::new(kind));
    }

    pub fn get(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.kinds.get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// Any version of the kind stored under this key.
    pub fn by_storage(&self, storage: &str) -> Option<&Arc<Kind>> {
        self.kinds.values().find(|k| &*k.storage == storage && !k.create_only)
    }

    pub fn groups(&self) -> &[(String, Vec<String>)] {
        &self.groups
    }

    pub fn of_version<'a>(&'a self, group: &'a str, version: &'a str) -> impl Iterator<Item = &'a Arc<Kind>> + 'a {
        self.kinds.values().filter(move |k| k.group == group && k.version == version)
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.kinds.values()
    }
}

/// The registry without any custom resources.
pub fn built_in_registry() -> &'static Registry {
    static BUILT_IN: LazyLock<Registry> = LazyLock::new(|| Registry::new([]));
    &BUILT_IN
}

/// Kubernetes' order of versions: v2 > v1 > v1beta1 > v1alpha1 > anything else.
fn priority(version: &str) -> (u8, u32, u32) {
    let digits = |s: &str| s.chars().take_while(char::is_ascii_digit).collect::<String>();
    let Some(rest) = version.strip_prefix('v') else { return (0, 0, 0) };
    let major = digits(rest);
    let Ok(number) = major.parse() else { return (0, 0, 0) };
    let tail = &rest[major.len()..];
    match (tail, tail.strip_prefix("beta"), tail.strip_prefix("alpha")) {
        ("", ..) => (3, number, 0),
        (_, Some(minor), _) => (2, number, minor.parse().unwrap_or(0)),
        (_, _, Some(minor)) => (1, number, minor.parse().unwrap_or(0)),
        _ => (0, 0, 0),
    }
}

/// One served kind per served version of a CustomResourceDefinition.
fn custom_kinds(crd: &Value) -> Vec<Kind> {
    let spec = &crd["spec"];
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let texts = |v: &Value| v.as_array().into_iter().flatten().filter_map(|s| s.as_str().map(str::to_owned)).collect();
    let (group, names) = (text(&spec["group"]), &spec["names"]);
    let plural = text(&names["plural"]);
    let served = spec["versions"].as_array().into_iter().flatten().filter(|v| v["served"] == true);
    served
        .map(|version| {
            let subresources = &version["subresources"];
            let scale = subresources.get("scale").filter(|s| s.is_object());
            let path = |v: &Value| text(v).trim_start_matches('.').to_owned();
            let singular = names["singular"].as_str().filter(|s| !s.is_empty());
            Kind {
                group: group.clone(),
                version: text(&version["name"]),
                kind: text(&names["kind"]),
                plural: plural.clone(),
                singular: singular.map_or_else(|| text(&names["kind"]).to_lowercase(), str::to_owned),
                short_names: texts(&names["shortNames"]),
                categories: texts(&names["categories"]),
                namespaced: spec["scope"] == "Namespaced",
                has_status: subresources.get("status").is_some(),
                scale: scale.map(|s| ScalePaths {
                    spec: path(&s["specReplicasPath"]),
                    status: path(&s["statusReplicasPath"]),
                    selector: s["labelSelectorPath"].as_str().map(|p| p.trim_start_matches('.').to_owned()),
                }),
                storage: format!("{group}/{plural}").into(),
                schema: complete_schema(&version["schema"]["openAPIV3Schema"]),
                source: Source::Custom {
                    columns: version["additionalPrinterColumns"].as_array().cloned().unwrap_or_default(),
                },
                create_only: false,
                rules: OnceLock::new(),
            }
        })
        .collect()
}

/// Adds what every object has to a custom resource's schema.
fn complete_schema(schema: &Value) -> Value {
    let mut schema = if schema.is_object() { schema.clone() } else { json!({"type": "object"}) };
    schema["type"] = "object".into();
    schema["properties"]["apiVersion"] =
        json!({"type": "string", "description": "Version of the schema of this object."});
    schema["properties"]["kind"] = json!({"type": "string", "description": "Kind of this object."});
    schema["properties"]["metadata"] = schema::reference(schema::OBJECT_META);
    schema
}

struct BuiltIn {
    plural: &'static str,
    short: &'static [&'static str],
    scope: Scope,
    shape: Shape,
}

#[derive(PartialEq)]
enum Scope {
    Cluster,
    Namespaced,
}

#[derive(PartialEq)]
enum Shape {
    Plain,
    Status,
    /// With status and replicas.
    Scale,
    Review,
}

fn kind<T>(built_in: &BuiltIn) -> Kind
where
    T: k8s_openapi::Resource + schemars::JsonSchema,
{
    let definition = schema::name_of::<T>();
    let in_all = matches!(built_in.plural, "pods" | "services" | "daemonsets" | "deployments" | "replicasets")
        || matches!(built_in.plural, "statefulsets" | "horizontalpodautoscalers" | "jobs");
    Kind {
        group: T::GROUP.into(),
        version: T::VERSION.into(),
        kind: T::KIND.into(),
        plural: built_in.plural.into(),
        singular: T::KIND.to_lowercase(),
        short_names: built_in.short.iter().map(|s| (*s).to_owned()).collect(),
        categories: match (in_all, T::GROUP) {
            (true, _) => vec!["all".into()],
            (_, "admissionregistration.k8s.io" | "apiextensions.k8s.io") => vec!["api-extensions".into()],
            _ => Vec::new(),
        },
        namespaced: built_in.scope == Scope::Namespaced,
        has_status: matches!(built_in.shape, Shape::Status | Shape::Scale),
        scale: (built_in.shape == Shape::Scale).then(|| ScalePaths {
            spec: "spec.replicas".into(),
            status: "status.replicas".into(),
            selector: Some("spec.selector".into()),
        }),
        storage: format!("{}/{}", T::GROUP, built_in.plural).into(),
        schema: schema::reference(&definition),
        source: Source::BuiltIn(definition),
        create_only: built_in.shape == Shape::Review,
        rules: OnceLock::new(),
    }
}

fn built_in() -> Vec<Kind> {
    macro_rules! table {
        ($($t:ty, $plural:literal, $short:expr, $scope:ident, $shape:ident;)*) => {
            vec![$( kind::<$t>(&BuiltIn { plural: $plural, short: &$short, scope: Scope::$scope, shape: Shape::$shape }) ),*]
        };
    }
    table![
        v::core::v1::ConfigMap, "configmaps", ["cm"], Namespaced, Plain;
        v::core::v1::Endpoints, "endpoints", ["ep"], Namespaced, Plain;
        v::core::v1::Event, "events", ["ev"], Namespaced, Plain;
        v::core::v1::Namespace, "namespaces", ["ns"], Cluster, Status;
        v::core::v1::Node, "nodes", ["no"], Cluster, Status;
        // The next two, ReplicationController, CronJob and Ingress are only kept: `kubectl apply --prune` asks for them.
        v::core::v1::PersistentVolumeClaim, "persistentvolumeclaims", ["pvc"], Namespaced, Status;
        v::core::v1::PersistentVolume, "persistentvolumes", ["pv"], Cluster, Status;
        v::core::v1::ReplicationController, "replicationcontrollers", ["rc"], Namespaced, Scale;
        v::core::v1::Pod, "pods", ["po"], Namespaced, Status;
        v::core::v1::Secret, "secrets", [], Namespaced, Plain;
        v::core::v1::ServiceAccount, "serviceaccounts", ["sa"], Namespaced, Plain;
        v::core::v1::Service, "services", ["svc"], Namespaced, Status;
        v::apps::v1::DaemonSet, "daemonsets", ["ds"], Namespaced, Status;
        v::apps::v1::Deployment, "deployments", ["deploy"], Namespaced, Scale;
        v::apps::v1::ReplicaSet, "replicasets", ["rs"], Namespaced, Scale;
        v::apps::v1::StatefulSet, "statefulsets", ["sts"], Namespaced, Scale;
        v::authentication::v1::TokenReview, "tokenreviews", [], Cluster, Review;
        v::authentication::v1::SelfSubjectReview, "selfsubjectreviews", [], Cluster, Review;
        v::authorization::v1::SubjectAccessReview, "subjectaccessreviews", [], Cluster, Review;
        v::authorization::v1::LocalSubjectAccessReview, "localsubjectaccessreviews", [], Namespaced, Review;
        v::authorization::v1::SelfSubjectAccessReview, "selfsubjectaccessreviews", [], Cluster, Review;
        v::authorization::v1::SelfSubjectRulesReview, "selfsubjectrulesreviews", [], Cluster, Review;
        v::autoscaling::v2::HorizontalPodAutoscaler, "horizontalpodautoscalers", ["hpa"], Namespaced, Status;
        v::batch::v1::Job, "jobs", [], Namespaced, Status;
        v::batch::v1::CronJob, "cronjobs", ["cj"], Namespaced, Status;
        v::coordination::v1::Lease, "leases", [], Namespaced, Plain;
        v::discovery::v1::EndpointSlice, "endpointslices", [], Namespaced, Plain;
        v::networking::v1::Ingress, "ingresses", ["ing"], Namespaced, Status;
        v::networking::v1::NetworkPolicy, "networkpolicies", ["netpol"], Namespaced, Plain;
        v::policy::v1::PodDisruptionBudget, "poddisruptionbudgets", ["pdb"], Namespaced, Status;
        v::rbac::v1::ClusterRoleBinding, "clusterrolebindings", [], Cluster, Plain;
        v::rbac::v1::ClusterRole, "clusterroles", [], Cluster, Plain;
        v::rbac::v1::RoleBinding, "rolebindings", [], Namespaced, Plain;
        v::rbac::v1::Role, "roles", [], Namespaced, Plain;
        v::admissionregistration::v1::MutatingWebhookConfiguration,
            "mutatingwebhookconfigurations", [], Cluster, Plain;
        v::admissionregistration::v1::ValidatingWebhookConfiguration,
            "validatingwebhookconfigurations", [], Cluster, Plain;
        apiextensions::CustomResourceDefinition, "customresourcedefinitions", ["crd", "crds"], Cluster, Status;
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_rank_as_kubernetes_ranks_them() {
        let mut versions = ["v1alpha3", "v2", "v1beta1", "foo", "v1", "v1beta2"];
        versions.sort_by_key(|v| std::cmp::Reverse(priority(v)));
        assert_eq!(versions, ["v2", "v1", "v1beta2", "v1beta1", "v1alpha3", "foo"]);
    }

    #[test]
    fn every_built_in_kind_has_its_definition() {
        for kind in Registry::new([]).all() {
            let Source::BuiltIn(name) = &kind.source else { panic!("{} is not built in", kind.kind) };
            assert!(schema::definitions().contains_key(name), "{name}");
        }
    }
}
