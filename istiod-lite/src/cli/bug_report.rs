//! `istiod-lite bug-report`: what is needed to find a fault, as one archive: objects, statuses, logs, who is connected.
//!
//! Secrets are not read. Of what is, annotations that hold whole objects and the environment of other people's containers
//! are left out. Size and time are bounded; what could not be had, or was cut, is said in the archive itself.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use flate2::Compression;
use flate2::write::GzEncoder;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{ListParams, LogParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;
use tokio::time::Instant;

use super::connect::{Cluster, Target};
use super::output::yaml;
use super::read::{self, Kind};
use super::tar::Archive;
use super::{Said, analyze, install_check, proxy_status};
use crate::revision::LABEL;
use crate::translate::binding::MANAGED_LABEL;
use crate::translate::world::MeshSettings;
use crate::types::label;

/// Of one file; the rest is cut.
const MOST_BYTES: usize = 16 * 1024 * 1024;
/// Of all files, before they are compressed.
const MOST_IN_ALL: usize = 256 * 1024 * 1024;
/// Of the end of a container's log.
const LOG_LINES: i64 = 10_000;
const LOG_BYTES: i64 = 4 * 1024 * 1024;
/// Whose logs are fetched.
const MOST_PODS: usize = 100;
/// What kubectl keeps of an object is the object again.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

#[derive(Debug, Args)]
pub struct Arguments {
    /// Where to write the archive; a file that exists is left alone.
    #[arg(long, value_name = "FILE", default_value = "bug-report.tar.gz")]
    file: PathBuf,
    /// The longest that collecting may take.
    #[arg(long, default_value = "2m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    #[command(flatten)]
    target: Target,
}

pub async fn run(arguments: Arguments, own: MeshSettings) -> anyhow::Result<Said> {
    let Arguments { file: path, timeout, target } = arguments;
    let cluster = target.connect(own).await?;
    // For its owner alone: logs name people's services.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.with_context(|| path.display().to_string())?;
    let mut report = Report::new(file, timeout);
    report.collect(&cluster).await?;
    let (files, lacking) = report.finish()?;
    Ok(Said::good(format!(
        "{}: {files} files; {lacking} things could not be had or were cut (missing.txt says which). Read it before you pass it on.\n",
        path.display()
    )))
}

struct Report<W: Write> {
    archive: Archive<GzEncoder<W>>,
    until: Instant,
    files: usize,
    bytes: usize,
    missing: Vec<String>,
}

impl<W: Write> Report<W> {
    fn new(out: W, timeout: Duration) -> Self {
        let archive = Archive::new(GzEncoder::new(out, Compression::default()));
        Self { archive, until: Instant::now() + timeout, files: 0, bytes: 0, missing: Vec::new() }
    }

    async fn collect(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        let Cluster { client, system, mesh, .. } = cluster;
        let version = self.within("the API server's version", async { Ok(client.apiserver_version().await?) }).await;
        let server = version.map(|version| version.git_version).unwrap_or_default();
        let text = format!("istiod-lite {}\nKubernetes {server}\n", env!("CARGO_PKG_VERSION"));
        self.add("version.txt", text)?;
        if let Some(checks) = self.within("install-check", install_check::report(cluster)).await {
            self.add("install-check.txt", checks)?;
        }
        if let Some(replicas) = self.within("proxy-status", proxy_status::of_cluster(cluster)).await {
            self.add("proxy-status.json", serde_json::to_string_pretty(&replicas)?)?;
        }
        if let Some(seen) = self.within("analyze", read::cluster(client, mesh.clone())).await {
            self.add("analyze.txt", analyze::Analysis::of(seen, false).to_string())?;
        }
        for kind in read::kinds() {
            self.objects(cluster, &kind, None).await?;
        }
        let own = |group: &str, kind: &str, plural: &str| Kind {
            resource: ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, "v1", kind), plural),
            label: None,
        };
        for kind in [
            own("apps", "DaemonSet", "daemonsets"),
            own("apps", "Deployment", "deployments"),
            own("", "Event", "events"),
        ] {
            self.objects(cluster, &kind, Some(system)).await?;
        }
        self.logs(cluster).await
    }

    /// Nothing where it fails or takes too long, and a line about it.
    async fn within<T>(&mut self, what: &str, wanted: impl Future<Output = anyhow::Result<T>>) -> Option<T> {
        match tokio::time::timeout_at(self.until, wanted).await {
            Ok(Ok(got)) => return Some(got),
            Ok(Err(error)) => self.missing.push(format!("{what}: {error:#}")),
            Err(_) => self.missing.push(format!("{what}: out of time (--timeout)")),
        }
        None
    }

    async fn objects(&mut self, cluster: &Cluster, kind: &Kind, namespace: Option<&str>) -> anyhow::Result<()> {
        let plural = kind.resource.plural.as_str();
        let Some(mut objects) = self.within(plural, read::list(&cluster.client, kind, namespace)).await else {
            return Ok(());
        };
        objects.iter_mut().for_each(|object| redact(object, &cluster.system));
        let of = namespace.map(|namespace| format!("{namespace}-")).unwrap_or_default();
        let text = yaml(&serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects}))?;
        self.add(&format!("objects/{of}{plural}.yaml"), text)
    }

    /// The mesh's own pods and the waypoints.
    async fn logs(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        let own: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.system);
        let all: Api<Pod> = Api::all(cluster.client.clone());
        let params = |labels: &str| ListParams::default().labels(labels);
        let (mesh, waypoints) = (params("app in (istiod, ztunnel)"), params(MANAGED_LABEL));
        let found = self.within("pods of the mesh", async {
            let mut pods = own.list(&mesh).await?.items;
            let others = own.list(&params(&format!("{LABEL},!{MANAGED_LABEL}"))).await?.items.into_iter();
            pods.extend(others.filter(|pod| label(&pod.metadata, "app").is_some_and(|app| app.starts_with("istiod-"))));
            pods.extend(all.list(&waypoints).await?.items);
            Ok(pods)
        });
        let pods = found.await.unwrap_or_default();
        if pods.len() > MOST_PODS {
            self.missing.push(format!("logs of {} more pods", pods.len() - MOST_PODS));
        }
        for pod in pods.iter().take(MOST_PODS) {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let api: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
            let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
            for container in statuses {
                let mut params = LogParams {
                    container: Some(container.name.clone()),
                    tail_lines: Some(LOG_LINES),
                    limit_bytes: Some(LOG_BYTES),
                    timestamps: true,
                    ..LogParams::default()
                };
                let what = format!("logs/{namespace}/{name}/{}", container.name);
                if let Some(log) = self.within(&what, async { Ok(api.logs(name, &params).await?) }).await {
                    self.add(&format!("{what}.log"), log)?;
                }
                if container.restart_count > 0 {
                    params.previous = true;
                    let what = format!("{what}.previous");
                    if let Some(log) = self.within(&what, async { Ok(api.logs(name, &params).await?) }).await {
                        self.add(&format!("{what}.log"), log)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, name: &str, mut text: String) -> anyhow::Result<()> {
        let room = MOST_BYTES.min(MOST_IN_ALL.saturating_sub(self.bytes));
        if text.len() > room {
            self.missing.push(format!("{name}: {} bytes were cut", text.len() - room));
            text.truncate(text.floor_char_boundary(room));
        }
        self.bytes += text.len();
        self.files += 1;
        self.archive.file(&format!("bug-report/{name}"), text.as_bytes()).context("writing the archive")
    }

    /// How many files there are, and how many things are not there.
    fn finish(mut self) -> anyhow::Result<(usize, usize)> {
        let missing = self.missing.iter().map(|line| format!("{line}\n")).collect::<String>();
        self.archive.file("bug-report/missing.txt", missing.as_bytes())?;
        self.archive.finish()?.finish()?.flush()?;
        Ok((self.files + 1, self.missing.len()))
    }
}

/// Takes out what is a copy of the object, what only the API server needs, and what others may have hidden in the
/// environment of their containers.
fn redact(object: &mut Value, system: &str) {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
        }
    }
    if object["metadata"]["namespace"] == system {
        return;
    }
    for spec in ["/spec", "/spec/template/spec"] {
        for containers in ["containers", "initContainers", "ephemeralContainers"] {
            let found = object.pointer_mut(&format!("{spec}/{containers}")).and_then(Value::as_array_mut);
            for container in found.into_iter().flatten() {
                let variables = container.get_mut("env").and_then(Value::as_array_mut);
                for variable in variables.into_iter().flatten() {
                    if let Some(value) = variable.get_mut("value") {
                        *value = "redacted".into();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
