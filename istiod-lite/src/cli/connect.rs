//! Which cluster is meant, and by which settings its control plane runs.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

use crate::config::Config;
use crate::revision::{self, Revision};
use crate::translate::world::MeshSettings;
use crate::types::label;

/// An API server that is there answers sooner.
const CONNECTED: Duration = Duration::from_secs(10);
/// The control plane's pods and their Deployment, those of the default revision.
pub const CONTROL_PLANE: &str = "app=istiod";

/// As [`CONTROL_PLANE`] has them, and after them those of other revisions.
///
/// # Errors
/// They cannot be listed.
pub async fn of_control_planes<K>(client: &Client, system: &str) -> Result<Vec<K>, kube::Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), system);
    let list = async |labels: &str| api.list(&ListParams::default().labels(labels)).await.map(|found| found.items);
    let mut found = list(CONTROL_PLANE).await?;
    let of_revision = |object: &K| {
        let revision = label(object.meta(), revision::LABEL)?.parse::<Revision>().ok()?;
        (label(object.meta(), "app")? == revision.named("istiod")).then_some(revision)
    };
    let others = list(revision::LABEL).await?.into_iter();
    found.extend(others.filter(|object| of_revision(object).is_some_and(|revision| !revision.is_default())));
    Ok(found)
}

/// kubectl's flags, and Istio's for its own namespace.
#[derive(Debug, Clone, Default, Args)]
pub struct Target {
    /// The kubeconfig to use; else KUBECONFIG, ~/.kube/config, or the account of the pod this runs in.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig.
    #[arg(long)]
    pub context: Option<String>,
    /// The namespace of what is named without one; else the context's.
    #[arg(long, short)]
    pub namespace: Option<String>,
    /// Where the control plane runs [default: istio-system]
    #[arg(long, short = 'i', value_name = "NAMESPACE")]
    pub istio_namespace: Option<String>,
}

/// A cluster one can ask.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    pub namespace: String,
    /// Where the control plane runs.
    pub system: String,
    /// As the control plane has them, where it can be asked.
    pub mesh: MeshSettings,
}

impl Target {
    /// `own` are the settings of this process: what is meant where the cluster has no control plane of its own.
    ///
    /// # Errors
    /// No usable kubeconfig.
    pub async fn connect(&self, own: MeshSettings) -> anyhow::Result<Cluster> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let mut config = match (&self.kubeconfig, &self.context) {
            (Some(path), _) => {
                let read = Kubeconfig::read_from(path).with_context(|| path.display().to_string())?;
                kube::Config::from_custom_kubeconfig(read, &options).await?
            }
            (None, Some(_)) => kube::Config::from_kubeconfig(&options).await?,
            (None, None) => kube::Config::infer().await.context("no cluster to ask: see --kubeconfig")?,
        };
        config.connect_timeout = Some(CONNECTED);
        let namespace = self.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config)?;
        let system = self.istio_namespace.clone().unwrap_or_else(|| own.root_namespace.clone());
        let mesh = settings(&client, &system, own).await;
        Ok(Cluster { client, namespace, system, mesh })
    }

    /// The namespace of what is named without one, where no cluster is asked.
    pub fn offline_namespace(&self) -> String {
        self.namespace.clone().unwrap_or_else(|| "default".to_owned())
    }
}

async fn settings(client: &Client, system: &str, own: MeshSettings) -> MeshSettings {
    // Whoever may not look, or runs the control plane elsewhere, says it by the environment.
    let found: Option<Vec<Deployment>> = of_control_planes(client, system).await.ok();
    let found = found.and_then(|found| found.iter().find_map(|deployment| settings_of(deployment, system)));
    found.unwrap_or(MeshSettings { root_namespace: system.to_owned(), ..own })
}

/// From the environment of its first container. Values that come from elsewhere are those of the namespace, or of no
/// interest here.
fn settings_of(deployment: &Deployment, system: &str) -> Option<MeshSettings> {
    let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
    let variables = pod.containers.first()?.env.iter().flatten();
    let given = variables.filter_map(|variable| Some((variable.name.clone(), variable.value.clone()?)));
    let variables = given.chain([("POD_NAMESPACE".to_owned(), system.to_owned())]);
    Config::from_env(variables).ok().map(|config| config.mesh)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::FakeApi;

    #[tokio::test]
    async fn settings_are_those_of_the_control_plane_where_there_is_one() {
        let env = json!([
            {"name": "TRUST_DOMAIN", "value": "example.org"},
            {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        ]);
        let client = FakeApi::answering(move |_, path, _| match path {
            "/apis/apps/v1/namespaces/mesh/deployments" => {
                let container = json!({"name": "discovery", "env": env});
                let template = json!({"spec": {"containers": [container]}});
                (
                    200,
                    json!({"items": [{"metadata": {}, "spec": {"selector": {}, "template": template}}], "metadata": {}}),
                )
            }
            _ => (403, json!({"kind": "Status", "code": 403, "status": "Failure", "reason": "Forbidden"})),
        });
        let found = settings(&client, "mesh", MeshSettings::default()).await;
        assert_eq!((&*found.trust_domain, &*found.root_namespace), ("example.org", "mesh"));
        let own = MeshSettings { trust_domain: "own".into(), ..MeshSettings::default() };
        let found = settings(&client, "elsewhere", own).await;
        assert_eq!((&*found.trust_domain, &*found.root_namespace), ("own", "elsewhere"));
    }
}
