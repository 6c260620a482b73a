//! What runs where, written by the supervisor and read by `lab exec`, `lab status` and the demo.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// One running container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    pub name: String,
    pub pid: u32,
    pub restarts: i32,
    pub cgroup: PathBuf,
    pub env: BTreeMap<String, String>,
}

/// One running pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub node: String,
    pub labels: BTreeMap<String, String>,
    pub addresses: Vec<IpAddr>,
    pub netns: PathBuf,
    pub containers: Vec<Container>,
}

impl Pod {
    fn directory(run_dir: &Path) -> PathBuf {
        run_dir.join("state")
    }

    /// Publishes the pod's present state.
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        let directory = Self::directory(run_dir);
        std::fs::create_dir_all(&directory)?;
        let temporary = directory.join(format!("{}.new", self.uid));
        std::fs::write(&temporary, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(temporary, directory.join(format!("{}.json", self.uid)))?;
        Ok(())
    }

    /// Forgets a pod.
    pub fn remove(run_dir: &Path, uid: &str) {
        // Gone already is what was wanted.
        let _ = std::fs::remove_file(Self::directory(run_dir).join(format!("{uid}.json")));
    }

    /// Log of a container.
    pub fn log(run_dir: &Path, namespace: &str, pod: &str, container: &str) -> PathBuf {
        run_dir.join("logs").join(format!("{namespace}.{pod}.{container}.log"))
    }

    /// The first container.
    pub fn main(&self) -> Result<&Container> {
        self.containers.first().with_context(|| format!("{} has no running container", self.name))
    }
}

/// All running pods, by namespace and name.
pub fn pods(run_dir: &Path) -> Vec<Pod> {
    let Ok(entries) = std::fs::read_dir(Pod::directory(run_dir)) else { return Vec::new() };
    let mut pods: Vec<Pod> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok())
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    pods
}

/// Finds a pod by `name`, `namespace/name`, a beginning of the name, or the value of its label `app`.
pub fn find(run_dir: &Path, wanted: &str) -> Result<Pod> {
    let (namespace, name) = match wanted.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, wanted),
    };
    let all = pods(run_dir);
    let candidates: Vec<&Pod> = all
        .iter()
        .filter(|pod| namespace.is_none_or(|namespace| pod.namespace == namespace))
        .filter(|pod| !pod.containers.is_empty())
        .collect();
    let by = |test: &dyn Fn(&Pod) -> bool| candidates.iter().find(|pod| test(pod)).copied().cloned();
    by(&|pod| pod.name == name)
        .or_else(|| by(&|pod| pod.labels.get("app").is_some_and(|app| app == name)))
        .or_else(|| by(&|pod| pod.name.starts_with(name)))
        .map_or_else(
            || {
                let names: Vec<String> =
                    candidates.iter().map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect();
                bail!("no running pod {wanted}; there are: {}", names.join(", "))
            },
            Ok,
        )
}
