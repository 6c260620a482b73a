//! A [`World`] of what files hold or a cluster has at one moment.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::translate::binding::MANAGED_LABEL;
use crate::translate::parameters::{DEFAULTS_FOR, Parameters};
use crate::translate::world::{MeshSettings, World};
use crate::translate::{documents, mesh_config, parameters};
use crate::types::gateway::{GatewayClassSpec, GatewaySpec, HttpRouteSpec};
use crate::types::networking::{ServiceEntrySpec, WorkloadEntrySpec};
use crate::types::security::{AuthorizationPolicySpec, PeerAuthenticationSpec};
use crate::types::{CustomKind as _, Held, Key};

/// Of a list, in one answer.
const PAGE: u32 = 500;
/// Kinds without a namespace.
const CLUSTER_SCOPED: &[&str] = &["Namespace", "Node", "GatewayClass"];

/// What was read.
#[derive(Debug, Default)]
pub struct Seen {
    pub world: World,
    pub objects: usize,
    /// Objects of kinds that mean nothing to the control plane.
    pub others: BTreeSet<String>,
}

/// A kind that is translated.
#[derive(Debug, Clone)]
pub struct Kind {
    pub resource: ApiResource,
    /// Only those with this label.
    pub label: Option<&'static str>,
}

/// All that is translated.
pub fn kinds() -> Vec<Kind> {
    let core = |group: &str, kind: &str, plural: &str| {
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, "v1", kind), plural)
    };
    let of_all = [
        core("", "Namespace", "namespaces"),
        core("", "Node", "nodes"),
        core("", "Pod", "pods"),
        core("", "Service", "services"),
        core("discovery.k8s.io", "EndpointSlice", "endpointslices"),
        GatewayClassSpec::api_resource(),
        GatewaySpec::api_resource(),
        HttpRouteSpec::api_resource(),
        AuthorizationPolicySpec::api_resource(),
        PeerAuthenticationSpec::api_resource(),
        ServiceEntrySpec::api_resource(),
        WorkloadEntrySpec::api_resource(),
    ];
    let mut kinds: Vec<Kind> = of_all.into_iter().map(|resource| Kind { resource, label: None }).collect();
    kinds.push(Kind { resource: core("apps", "Deployment", "deployments"), label: Some(MANAGED_LABEL) });
    kinds
}

/// Looks at files, directories (their `.yaml`, `.yml` and `.json` files) and `-`, the standard input. Objects without a
/// namespace are of `namespace`. Waypoints are taken to be up: whether they are is not in a file.
///
/// # Errors
/// A file that cannot be read, or an object that is not one of its kind.
pub fn files(paths: &[PathBuf], namespace: &str, mesh: MeshSettings) -> anyhow::Result<Seen> {
    let mut seen = Seen { world: World { mesh: Arc::new(mesh), ..World::default() }, ..Seen::default() };
    for (path, text) in texts(paths)? {
        let found: Vec<Value> = serde_saphyr::from_multiple(&text).with_context(|| path.display().to_string())?;
        for object in found.into_iter().flat_map(items) {
            let object = placed(object, namespace);
            let name = named(&object);
            match documents::add(&mut seen.world, up(object)) {
                Ok(true) => seen.objects += 1,
                Ok(false) => _ = seen.others.insert(name),
                Err(error) => bail!("{}: {name}: {error}", path.display()),
            }
        }
    }
    for key in parameters::referenced(&seen.world) {
        if !seen.world.parameters.contains_key(&key) {
            let absent = Parameters::unreadable("is not among these files".into());
            seen.world.parameters.insert(key, Held::new(absent));
        }
    }
    Ok(seen)
}

/// Lists all that is translated. A kind whose CRD is not installed has no objects.
///
/// # Errors
/// A list that the API does not give, with its reason.
pub async fn cluster(client: &Client, mesh: MeshSettings) -> anyhow::Result<Seen> {
    let lists = kinds().into_iter().map(|kind| async move {
        let objects = list(client, &kind, None).await;
        objects.map(|objects| (kind, objects))
    });
    let mut seen = Seen { world: World { mesh: Arc::new(mesh), ..World::default() }, ..Seen::default() };
    for (kind, objects) in futures_util::future::try_join_all(lists).await? {
        // Those that are only counted among others' are not looked at for themselves.
        let counts = kind.label.is_none() && !matches!(&*kind.resource.kind, "Namespace" | "Node" | "EndpointSlice");
        for object in objects {
            let name = named(&object);
            match documents::add(&mut seen.world, object) {
                Ok(_) => seen.objects += usize::from(counts),
                Err(error) => bail!("{name}: {error}"),
            }
        }
    }
    mesh_config(client, &mut seen.world).await?;
    waypoint_parameters(client, &mut seen.world).await?;
    Ok(seen)
}

async fn mesh_config(client: &Client, world: &mut World) -> anyhow::Result<()> {
    let api = Api::<ConfigMap>::namespaced(client.clone(), &world.mesh.root_namespace);
    let found = api.get_opt(mesh_config::CONFIG_MAP).await.context("MeshConfig")?;
    world.mesh_config = world.mesh_config.after(found.as_ref(), &world.mesh);
    world.find_hidden();
    Ok(())
}

/// The ConfigMaps that say how waypoints are deployed: those for classes, and those that Gateways refer to.
async fn waypoint_parameters(client: &Client, world: &mut World) -> anyhow::Result<()> {
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", "ConfigMap"), "configmaps");
    let defaults = Kind { resource, label: Some(DEFAULTS_FOR) };
    let root = world.mesh.root_namespace.clone();
    for object in list(client, &defaults, Some(&root)).await? {
        documents::add(world, object).map_err(anyhow::Error::msg).context("ConfigMaps of a class")?;
    }
    for key in parameters::referenced(world) {
        let found = Api::<ConfigMap>::namespaced(client.clone(), &key.namespace).get_opt(&key.name).await;
        let read = match found {
            Ok(found) => found.map_or_else(Parameters::missing, Parameters::read),
            Err(error) => Parameters::unreadable(format!("cannot be read: {error}")),
        };
        world.parameters.insert(key, Held::new(read));
    }
    Ok(())
}

/// The objects of one kind, of one namespace or all.
///
/// # Errors
/// The API's reason; that it does not know the kind is none.
pub async fn list(client: &Client, kind: &Kind, namespace: Option<&str>) -> anyhow::Result<Vec<Value>> {
    let resource = &kind.resource;
    let api: Api<DynamicObject> = match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, resource),
        None => Api::all_with(client.clone(), resource),
    };
    let mut page = ListParams::default().limit(PAGE);
    page.label_selector = kind.label.map(str::to_owned);
    let mut objects = Vec::new();
    loop {
        let found = match api.list(&page).await {
            Ok(found) => found,
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(Vec::new()),
            Err(error) => return Err(anyhow::Error::new(error).context(format!("listing {}", resource.plural))),
        };
        for object in found.items {
            let mut object = serde_json::to_value(object)?;
            // Lists do not say it of each.
            object["apiVersion"] = resource.api_version.as_str().into();
            object["kind"] = resource.kind.as_str().into();
            objects.push(object);
        }
        page.continue_token = found.metadata.continue_.filter(|token| !token.is_empty());
        if page.continue_token.is_none() {
            return Ok(objects);
        }
    }
}

fn texts(paths: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut out = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            out.push((path.clone(), text));
            continue;
        }
        let mut files = vec![path.clone()];
        if path.is_dir() {
            let entries = fs::read_dir(path).with_context(|| path.display().to_string())?;
            files = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
            files.retain(|file| file.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json"));
            files.sort_unstable();
        }
        for file in files {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            out.push((file, text));
        }
    }
    Ok(out)
}

/// The objects of a list, such as `kubectl get -o yaml` prints; an empty document is none.
fn items(document: Value) -> Vec<Value> {
    match document {
        Value::Null => Vec::new(),
        Value::Object(mut list)
            if list.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List")) =>
        {
            match list.remove("items") {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            }
        }
        object => vec![object],
    }
}

fn placed(mut object: Value, namespace: &str) -> Value {
    let scoped = object["kind"].as_str().is_some_and(|kind| !CLUSTER_SCOPED.contains(&kind));
    if scoped && object["metadata"].is_object() && object["metadata"]["namespace"].is_null() {
        object["metadata"]["namespace"] = namespace.into();
    }
    object
}

fn named(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let key = Key::new(text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
    format!("{} {key}", text(&object["kind"]))
}

/// A Gateway as it is when its pods are ready.
fn up(mut object: Value) -> Value {
    if object["kind"] == "Gateway" && object["status"]["addresses"].is_null() {
        object["status"] = json!({"addresses": [{"type": "IPAddress", "value": "192.0.2.1"}]});
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::testing::failure;
    use crate::testing::FakeApi;

    fn answer(path: &str) -> (u16, Value) {
        let object = |name: &str| json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {}});
        match path {
            "/api/v1/services" => (200, json!({"metadata": {}, "items": [object("web")]})),
            path if path.starts_with("/apis/security.istio.io/") => failure(404, "not found"),
            _ => (200, json!({"metadata": {}, "items": []})),
        }
    }

    #[tokio::test]
    async fn a_kind_that_is_not_installed_is_empty_and_one_that_is_refused_is_an_error() {
        let client = FakeApi::answering(|_, path, _| answer(path));
        let seen = cluster(&client, MeshSettings::default()).await.expect("a world");
        assert_eq!((seen.objects, seen.world.services.len()), (1, 1));

        let client = FakeApi::answering(|_, path, _| match path {
            "/api/v1/pods" => failure(403, "pods is forbidden: User \"x\" cannot list resource \"pods\""),
            path => answer(path),
        });
        let error = cluster(&client, MeshSettings::default()).await.expect_err("pods are not listed");
        let said = format!("{error:#}");
        assert!(said.contains("listing pods") && said.contains("forbidden"), "{said}");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("a.yaml"), "kind: [").expect("a file");
        let error = files(&[directory.path().join("a.yaml")], "shop", MeshSettings::default()).expect_err("no YAML");
        assert!(format!("{error:#}").contains("a.yaml"), "{error:#}");
    }
}
