//! Deployments, ReplicaSets and DaemonSets become pods that are already placed on a node.
//!
//! Each pass compares what should be with what the API holds at that moment, so a pass that is cut short is completed by the next.

use std::collections::BTreeMap;

use anyhow::Result;
use k8s_openapi::api::apps::v1 as apps;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use super::endpoints::ready;

/// A node that pods can be placed on.
#[derive(Clone, Debug)]
pub struct Place {
    pub name: String,
    pub labels: BTreeMap<String, String>,
}

/// A controlling owner reference.
pub fn owner(api_version: &str, kind: &str, name: &str, uid: Option<String>) -> OwnerReference {
    OwnerReference {
        api_version: api_version.into(),
        kind: kind.into(),
        name: name.into(),
        uid: uid.unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// An object that is gone, or there already, is as good as done.
pub fn ignore_missing<T>(result: kube::Result<T>) -> kube::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether `object` has the controlling owner `uid`.
fn owned_by(pod: &core::Pod, uid: &str) -> bool {
    pod.owner_references().iter().any(|owner| owner.uid == uid)
}

/// Counts towards the number that should run.
fn active(pod: &core::Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Failed" | "Succeeded"))
}

/// A short name for a template's content: FNV-1a, in letters that cannot spell words.
pub fn template_hash(template: &core::PodTemplateSpec) -> String {
    let text = serde_json::to_string(template).unwrap_or_default();
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    letters(hash, 9)
}

fn letters(mut number: u64, count: usize) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut text = String::new();
    for _ in 0..count {
        let index = usize::try_from(number % 27).expect("a remainder of 27 fits");
        text.push(char::from(ALPHABET[index]));
        number /= 27;
    }
    text
}

/// A name that was not given before.
fn suffix() -> String {
    letters(u64::from_le_bytes(uuid::Uuid::new_v4().into_bytes()[..8].try_into().expect("eight bytes")), 5)
}

/// The nodes a template may run on.
pub fn eligible<'a>(template: &core::PodSpec, places: &'a [Place]) -> Vec<&'a Place> {
    let fits = |place: &&Place| {
        template.node_selector.iter().flatten().all(|(key, value)| place.labels.get(key) == Some(value))
    };
    places.iter().filter(fits).collect()
}

/// The eligible node with the fewest pods, the first among equals.
pub fn place<'a>(template: &core::PodSpec, places: &'a [Place], pods: &[core::Pod]) -> Option<&'a Place> {
    let load = |place: &&Place| {
        pods.iter()
            .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(&place.name))
            .count()
    };
    eligible(template, places).into_iter().min_by_key(load)
}

/// All workloads of one pass.
pub struct Pass<'a> {
    pub client: &'a Client,
    pub places: &'a [Place],
}

impl Pass<'_> {
    /// Brings the pods of all Deployments and DaemonSets to what they ask for and writes their status.
    pub async fn run(&self) -> Result<()> {
        let everything = ListParams::default();
        let deployments = Api::<apps::Deployment>::all(self.client.clone()).list(&everything).await?;
        for deployment in deployments.items.iter().filter(|d| d.metadata.deletion_timestamp.is_none()) {
            Box::pin(self.deployment(deployment)).await?;
        }
        let daemons = Api::<apps::DaemonSet>::all(self.client.clone()).list(&everything).await?;
        for daemon in daemons.items.iter().filter(|d| d.metadata.deletion_timestamp.is_none()) {
            self.daemon_set(daemon).await?;
        }
        self.bind_unplaced().await
    }

    async fn pods_of(&self, namespace: &str, uid: &str) -> Result<Vec<core::Pod>> {
        let pods = Api::<core::Pod>::namespaced(self.client.clone(), namespace);
        let list = pods.list(&ListParams::default()).await?;
        Ok(list.items.into_iter().filter(|pod| owned_by(pod, uid)).collect())
    }

    async fn deployment(&self, deployment: &apps::Deployment) -> Result<()> {
        let namespace = deployment.namespace().unwrap_or_default();
        let Some(spec) = &deployment.spec else { return Ok(()) };
        let hash = template_hash(&spec.template);
        let api = Api::<apps::ReplicaSet>::namespaced(self.client.clone(), &namespace);
        let uid = deployment.uid().unwrap_or_default();
        let sets = api.list(&ListParams::default()).await?.items;
        let (current, old): (Vec<_>, Vec<_>) = sets
            .into_iter()
            .filter(|set| set.owner_references().iter().any(|owner| owner.uid == uid))
            .partition(|set| set.labels().get("pod-template-hash") == Some(&hash));
        let Some(current) = current.into_iter().next() else {
            ignore_missing(api.create(&PostParams::default(), &replica_set(deployment, spec, &hash)).await)?;
            return Box::pin(self.deployment(deployment)).await;
        };
        let wanted = spec.replicas.unwrap_or(1);
        let new = self.replicas(&current, wanted, &spec.template, &hash).await?;
        let ready_count = new.iter().filter(|pod| ready(pod)).count();
        let mut total = new.len();
        let enough = i32::try_from(ready_count).is_ok_and(|count| count >= wanted);
        for set in old {
            // Old pods go once the new ones can take over.
            let keep = if enough { 0 } else { set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0) };
            if let Some(template) = set.spec.as_ref().and_then(|spec| spec.template.clone()) {
                let hash = set.labels().get("pod-template-hash").cloned().unwrap_or_default();
                total += self.replicas(&set, keep, &template, &hash).await?.len();
            }
        }
        self.deployment_status(deployment, wanted, total, new.len(), ready_count).await
    }

    /// Creates or deletes pods of one ReplicaSet; returns those that count now.
    async fn replicas(
        &self,
        set: &apps::ReplicaSet,
        wanted: i32,
        template: &core::PodTemplateSpec,
        hash: &str,
    ) -> Result<Vec<core::Pod>> {
        let (namespace, name) = (set.namespace().unwrap_or_default(), set.name_any());
        let pods = Api::<core::Pod>::namespaced(self.client.clone(), &namespace);
        let uid = set.uid().unwrap_or_default();
        let mut own: Vec<core::Pod> = self.pods_of(&namespace, &uid).await?.into_iter().filter(active).collect();
        let wanted_count = usize::try_from(wanted).unwrap_or(0);
        // The ones that are not ready yet are the first to go.
        own.sort_by_key(|pod| !ready(pod));
        for surplus in own.split_off(wanted_count.min(own.len())) {
            ignore_missing(pods.delete(&surplus.name_any(), &DeleteParams::default()).await)?;
        }
        while own.len() < wanted_count {
            let reference = owner("apps/v1", "ReplicaSet", &name, Some(uid.clone()));
            let all = Api::<core::Pod>::all(self.client.clone()).list(&ListParams::default()).await?.items;
            let Some(place) = place(&template.spec.clone().unwrap_or_default(), self.places, &all) else { break };
            let labels = [("pod-template-hash".to_owned(), hash.to_owned())];
            let pod = pod(&name, template, &place.name, labels, reference);
            own.push(pods.create(&PostParams::default(), &pod).await?);
        }
        let sets = Api::<apps::ReplicaSet>::namespaced(self.client.clone(), &namespace);
        if set.spec.as_ref().and_then(|spec| spec.replicas) != Some(wanted) {
            sets.patch(&name, &PatchParams::default(), &Patch::Merge(json!({"spec": {"replicas": wanted}}))).await?;
        }
        let ready_count = own.iter().filter(|pod| ready(pod)).count();
        let status = json!({"replicas": own.len(), "fullyLabeledReplicas": own.len(), "readyReplicas": ready_count,
            "availableReplicas": ready_count, "observedGeneration": set.metadata.generation});
        write_status(&sets, &name, serde_json::to_value(&set.status)?, status).await?;
        Ok(own)
    }

    async fn deployment_status(
        &self,
        deployment: &apps::Deployment,
        wanted: i32,
        total: usize,
        updated: usize,
        ready_count: usize,
    ) -> Result<()> {
        let available = i32::try_from(ready_count).is_ok_and(|count| count >= wanted);
        let complete = available && updated == total;
        let conditions = json!([
            condition(
                deployment,
                "Available",
                available,
                if available { "MinimumReplicasAvailable" } else { "MinimumReplicasUnavailable" }
            ),
            condition(
                deployment,
                "Progressing",
                true,
                if complete { "NewReplicaSetAvailable" } else { "ReplicaSetUpdated" }
            ),
        ]);
        let status = json!({"replicas": total, "updatedReplicas": updated, "readyReplicas": ready_count,
            "availableReplicas": ready_count, "unavailableReplicas": total.saturating_sub(ready_count),
            "observedGeneration": deployment.metadata.generation, "conditions": conditions});
        let api = Api::<apps::Deployment>::namespaced(self.client.clone(), &deployment.namespace().unwrap_or_default());
        write_status(&api, &deployment.name_any(), serde_json::to_value(&deployment.status)?, status).await
    }

    async fn daemon_set(&self, daemon: &apps::DaemonSet) -> Result<()> {
        let (namespace, name) = (daemon.namespace().unwrap_or_default(), daemon.name_any());
        let Some(spec) = &daemon.spec else { return Ok(()) };
        let pods = Api::<core::Pod>::namespaced(self.client.clone(), &namespace);
        let uid = daemon.uid().unwrap_or_default();
        let hash = template_hash(&spec.template);
        let own: Vec<core::Pod> = self.pods_of(&namespace, &uid).await?.into_iter().filter(active).collect();
        let places = eligible(&spec.template.spec.clone().unwrap_or_default(), self.places);
        let surge = spec.update_strategy.as_ref().and_then(|s| s.rolling_update.as_ref()?.max_surge.clone()).is_some();
        let (mut updated, mut ready_count) = (0, 0);
        for place in &places {
            let here = own
                .iter()
                .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(&place.name));
            let (new, old): (Vec<_>, Vec<_>) =
                here.partition(|pod| pod.labels().get("controller-revision-hash") == Some(&hash));
            ready_count += usize::from(new.iter().chain(&old).any(|pod| ready(pod)));
            // As in Kubernetes the older pod counts while there are two: a rollout is not done before that has gone.
            updated += usize::from(old.is_empty() && !new.is_empty());
            let taken_over = new.iter().any(|pod| ready(pod));
            if !old.is_empty() && (taken_over || !surge) {
                for pod in &old {
                    ignore_missing(pods.delete(&pod.name_any(), &DeleteParams::default()).await)?;
                }
            }
            if new.is_empty() && (old.is_empty() || surge) {
                let reference = owner("apps/v1", "DaemonSet", &name, Some(uid.clone()));
                let labels = [("controller-revision-hash".to_owned(), hash.clone())];
                let pod = pod(&name, &spec.template, &place.name, labels, reference);
                pods.create(&PostParams::default(), &pod).await?;
            }
        }
        let status = json!({"desiredNumberScheduled": places.len(), "currentNumberScheduled": places.len(),
            "numberMisscheduled": 0, "numberReady": ready_count, "numberAvailable": ready_count,
            "numberUnavailable": places.len() - ready_count, "updatedNumberScheduled": updated,
            "observedGeneration": daemon.metadata.generation});
        let api = Api::<apps::DaemonSet>::namespaced(self.client.clone(), &namespace);
        write_status(&api, &name, serde_json::to_value(&daemon.status)?, status).await
    }

    /// The scheduler's part, for pods that somebody created by hand.
    async fn bind_unplaced(&self) -> Result<()> {
        let all = Api::<core::Pod>::all(self.client.clone()).list(&ListParams::default()).await?.items;
        for pod in all.iter().filter(|pod| active(pod)) {
            let spec = pod.spec.clone().unwrap_or_default();
            if spec.node_name.is_some() {
                continue;
            }
            let Some(place) = place(&spec, self.places, &all) else { continue };
            let api = Api::<core::Pod>::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
            let patch = json!({"spec": {"nodeName": place.name}});
            ignore_missing(api.patch(&pod.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await)?;
        }
        Ok(())
    }
}

fn replica_set(deployment: &apps::Deployment, spec: &apps::DeploymentSpec, hash: &str) -> apps::ReplicaSet {
    let name = deployment.name_any();
    let mut template = spec.template.clone();
    let hash_label = ("pod-template-hash".to_owned(), hash.to_owned());
    template.metadata.get_or_insert_default().labels.get_or_insert_default().extend([hash_label.clone()]);
    let mut selector = spec.selector.clone();
    selector.match_labels.get_or_insert_default().extend([hash_label]);
    let mut set = apps::ReplicaSet {
        spec: Some(apps::ReplicaSetSpec {
            replicas: spec.replicas.or(Some(1)),
            selector,
            template: Some(template.clone()),
            ..Default::default()
        }),
        ..Default::default()
    };
    set.metadata.name = Some(format!("{name}-{hash}"));
    set.metadata.namespace = deployment.namespace();
    set.metadata.labels = template.metadata.and_then(|metadata| metadata.labels);
    set.metadata.owner_references = Some(vec![owner("apps/v1", "Deployment", &name, deployment.uid())]);
    set
}

fn pod(
    owner_name: &str,
    template: &core::PodTemplateSpec,
    node: &str,
    labels: impl IntoIterator<Item = (String, String)>,
    reference: OwnerReference,
) -> core::Pod {
    let metadata = template.metadata.clone().unwrap_or_default();
    let mut spec = template.spec.clone().unwrap_or_default();
    spec.node_name = Some(node.to_owned());
    let mut pod = core::Pod { spec: Some(spec), ..Default::default() };
    pod.metadata.name = Some(format!("{owner_name}-{}", suffix()));
    pod.metadata.generate_name = Some(format!("{owner_name}-"));
    pod.metadata.annotations = metadata.annotations;
    let mut all = metadata.labels.unwrap_or_default();
    all.extend(labels);
    pod.metadata.labels = Some(all);
    pod.metadata.owner_references = Some(vec![reference]);
    pod
}

/// A condition that keeps its transition time while its status stays.
fn condition(deployment: &apps::Deployment, kind: &str, holds: bool, reason: &str) -> Value {
    let status = if holds { "True" } else { "False" };
    let before = deployment.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let same = before.into_iter().find(|c| c.type_ == kind && c.status == status);
    let since = same
        .and_then(|c| serde_json::to_value(&c.last_transition_time).ok())
        .unwrap_or_else(|| json!(super::kubelet::now()));
    json!({"type": kind, "status": status, "reason": reason, "lastTransitionTime": since, "lastUpdateTime": since,
        "message": format!("{kind}: {reason}")})
}

/// Writes a status only where it says something new: an unchanged write would wake every watcher, this one first.
async fn write_status<K>(api: &Api<K>, name: &str, before: Value, status: Value) -> Result<()>
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let said = |key: &str, value: &Value| {
        before.get(key).unwrap_or(&Value::Null) == value || (value == &json!(0) && before.get(key).is_none())
    };
    if status.as_object().is_some_and(|fields| fields.iter().all(|(key, value)| said(key, value))) {
        return Ok(());
    }
    let patch = Patch::Merge(json!({"status": status}));
    ignore_missing(api.patch_status(name, &PatchParams::default(), &patch).await)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Vec<Place> {
        ["node-a", "node-b"]
            .map(|name| Place {
                name: name.into(),
                labels: BTreeMap::from([("kubernetes.io/hostname".to_owned(), name.to_owned())]),
            })
            .to_vec()
    }

    #[test]
    fn pods_spread_unless_they_choose() {
        let on_a: core::Pod =
            serde_json::from_value(json!({"spec": {"containers": [], "nodeName": "node-a"}})).expect("a pod");
        let free = core::PodSpec::default();
        assert_eq!(place(&free, &places(), std::slice::from_ref(&on_a)).map(|place| &*place.name), Some("node-b"));
        let selector = Some(BTreeMap::from([("kubernetes.io/hostname".to_owned(), "node-a".to_owned())]));
        let bound = core::PodSpec { node_selector: selector, ..Default::default() };
        assert_eq!(place(&bound, &places(), &[on_a]).map(|place| &*place.name), Some("node-a"));
    }

    #[test]
    fn a_template_s_hash_follows_its_content() {
        let mut template = core::PodTemplateSpec::default();
        let empty = template_hash(&template);
        template.spec = Some(core::PodSpec::default());
        assert_ne!(template_hash(&template), empty);
        assert_eq!(empty.len(), 9);
    }
}
