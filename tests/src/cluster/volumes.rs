//! Volumes of a pod, as directories the containers get by bind mounts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::authentication::v1 as authentication;
use k8s_openapi::api::core::v1 as core;
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt};

use super::template;
use crate::container::Bind;

/// Where a pod without a say in it finds its own token.
pub const SERVICE_ACCOUNT_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Name of the volume behind it.
const ACCESS_VOLUME: &str = "kube-api-access";
/// Lifetime of the token there, as a kubelet asks for.
const ACCESS_TOKEN_SECONDS: i64 = 3607;

/// Directories of a node that stand for paths of a real host.
#[derive(Clone, Debug)]
pub struct HostPaths {
    /// The node's cgroup root: `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// The node's directory on a bpffs: `/sys/fs/bpf`.
    pub bpffs: PathBuf,
    /// Everything else is below this directory.
    pub rest: PathBuf,
}

impl HostPaths {
    fn resolve(&self, path: &str) -> PathBuf {
        let below = |root: &str| Path::new(path).strip_prefix(root).ok().map(Path::to_path_buf);
        if let Some(rest) = below("/sys/fs/cgroup") {
            // On a hybrid host the unified hierarchy is one level down; here there is no other.
            return self.cgroup.join(rest.strip_prefix("unified").unwrap_or(&rest));
        }
        if let Some(rest) = below("/sys/fs/bpf") {
            return self.bpffs.join(rest);
        }
        if below("/proc").is_some() || below("/dev").is_some() {
            return PathBuf::from(path);
        }
        self.rest.join(path.trim_start_matches('/'))
    }
}

/// Fills the volumes of one pod below `directory`.
pub struct Volumes<'a> {
    pub client: &'a Client,
    pub pod: &'a core::Pod,
    pub directory: &'a Path,
    pub host: &'a HostPaths,
}

impl Volumes<'_> {
    fn namespace(&self) -> String {
        self.pod.namespace().unwrap_or_default()
    }

    fn spec(&self) -> core::PodSpec {
        self.pod.spec.clone().unwrap_or_default()
    }

    fn path(&self, volume: &str) -> PathBuf {
        self.directory.join(volume)
    }

    fn automounts(&self) -> bool {
        self.spec().automount_service_account_token != Some(false)
    }

    /// Writes everything; run again it refreshes what has changed. Fails while an object it needs is missing.
    pub async fn fill(&self) -> Result<()> {
        for volume in self.spec().volumes.unwrap_or_default() {
            self.fill_one(&volume).await.with_context(|| format!("volume {}", volume.name))?;
        }
        // An account may refuse the mount for its pods; the pod's own word counts more.
        if self.automounts() && self.account_automounts().await? {
            self.fill_access().await.context("service account token")?;
        }
        Ok(())
    }

    async fn account_automounts(&self) -> Result<bool> {
        if self.spec().automount_service_account_token == Some(true) {
            return Ok(true);
        }
        let api = Api::<core::ServiceAccount>::namespaced(self.client.clone(), &self.namespace());
        let account = api.get(&self.account()).await?;
        Ok(account.automount_service_account_token != Some(false))
    }

    fn account(&self) -> String {
        self.spec().service_account_name.unwrap_or_else(|| "default".into())
    }

    async fn fill_one(&self, volume: &core::Volume) -> Result<()> {
        let path = self.path(&volume.name);
        if let Some(host) = &volume.host_path {
            let source = self.host.resolve(&host.path);
            if !source.exists() {
                match host.type_.as_deref() {
                    Some("DirectoryOrCreate") | None | Some("") => fs::create_dir_all(&source)?,
                    _ => bail!("host path {} does not exist", host.path),
                }
            }
            return Ok(());
        }
        fs::create_dir_all(&path)?;
        if volume.empty_dir.is_some() {
            return Ok(fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777))?);
        }
        if let Some(source) = &volume.config_map {
            let data = self.config_map(&source.name, source.optional).await?;
            return write_items(&path, data, source.items.as_deref());
        }
        if let Some(source) = &volume.secret {
            let name = source.secret_name.clone().unwrap_or_default();
            return write_items(&path, self.secret(&name, source.optional).await?, source.items.as_deref());
        }
        if let Some(projected) = &volume.projected {
            for source in projected.sources.iter().flatten() {
                self.project(&path, source).await?;
            }
            return Ok(());
        }
        if let Some(downward) = &volume.downward_api {
            return self.downward(&path, downward.items.as_deref().unwrap_or_default());
        }
        bail!("the lab knows configMap, secret, projected, downwardAPI, hostPath and emptyDir volumes")
    }

    async fn project(&self, path: &Path, source: &core::VolumeProjection) -> Result<()> {
        if let Some(source) = &source.config_map {
            write_items(path, self.config_map(&source.name, source.optional).await?, source.items.as_deref())?;
        }
        if let Some(source) = &source.secret {
            write_items(path, self.secret(&source.name, source.optional).await?, source.items.as_deref())?;
        }
        if let Some(downward) = &source.downward_api {
            self.downward(path, downward.items.as_deref().unwrap_or_default())?;
        }
        if let Some(token) = &source.service_account_token {
            let seconds = token.expiration_seconds.unwrap_or(3600);
            self.token(&path.join(&token.path), token.audience.as_deref(), seconds).await?;
        }
        Ok(())
    }

    fn downward(&self, path: &Path, items: &[core::DownwardAPIVolumeFile]) -> Result<()> {
        for item in items {
            let field = item.field_ref.as_ref().context("the lab has no resourceFieldRef in volumes")?;
            let value = template::field(self.pod, &field.field_path).map_err(anyhow::Error::msg)?;
            write(&path.join(&item.path), value.as_bytes())?;
        }
        Ok(())
    }

    async fn fill_access(&self) -> Result<()> {
        let path = self.path(ACCESS_VOLUME);
        fs::create_dir_all(&path)?;
        write_items(&path, self.config_map("kube-root-ca.crt", None).await?, None)?;
        write(&path.join("namespace"), self.namespace().as_bytes())?;
        self.token(&path.join("token"), None, ACCESS_TOKEN_SECONDS).await
    }

    /// A token bound to the pod, asked for anew once it has used up four fifths of its life.
    async fn token(&self, path: &Path, audience: Option<&str>, seconds: i64) -> Result<()> {
        let age = fs::metadata(path).and_then(|metadata| metadata.modified()).ok().and_then(|at| at.elapsed().ok());
        let renew_after = u64::try_from(seconds).unwrap_or(0) * 4 / 5;
        if age.is_some_and(|age| age.as_secs() < renew_after) {
            return Ok(());
        }
        let request = authentication::TokenRequest {
            spec: authentication::TokenRequestSpec {
                audiences: audience.map(str::to_owned).into_iter().collect(),
                expiration_seconds: Some(seconds),
                bound_object_ref: Some(authentication::BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: self.pod.metadata.name.clone(),
                    uid: self.pod.metadata.uid.clone(),
                }),
            },
            ..Default::default()
        };
        let api = Api::<core::ServiceAccount>::namespaced(self.client.clone(), &self.namespace());
        let reply: authentication::TokenRequest =
            api.create_subresource("token", &self.account(), &PostParams::default(), &request).await?;
        write(path, reply.status.context("the API server gave no token")?.token.as_bytes())
    }

    async fn config_map(&self, name: &str, optional: Option<bool>) -> Result<BTreeMap<String, Vec<u8>>> {
        let api = Api::<core::ConfigMap>::namespaced(self.client.clone(), &self.namespace());
        let Some(object) = api.get_opt(name).await? else {
            return absent(optional, "configmap", name);
        };
        let text = object.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
        let binary = object.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0));
        Ok(text.chain(binary).collect())
    }

    async fn secret(&self, name: &str, optional: Option<bool>) -> Result<BTreeMap<String, Vec<u8>>> {
        let api = Api::<core::Secret>::namespaced(self.client.clone(), &self.namespace());
        let Some(object) = api.get_opt(name).await? else {
            return absent(optional, "secret", name);
        };
        Ok(object.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect())
    }

    /// A variable that comes from elsewhere; `None` where it is optional and missing.
    pub async fn variable(&self, source: &core::EnvVarSource) -> Result<Option<String>> {
        if let Some(field) = &source.field_ref {
            return Ok(Some(template::field(self.pod, &field.field_path).map_err(anyhow::Error::msg)?));
        }
        let (mut data, key, optional) = if let Some(key) = &source.config_map_key_ref {
            (self.config_map(&key.name, key.optional).await?, &key.key, key.optional)
        } else if let Some(key) = &source.secret_key_ref {
            (self.secret(&key.name, key.optional).await?, &key.key, key.optional)
        } else {
            bail!("the lab has no such source of a variable")
        };
        match data.remove(key) {
            Some(value) => Ok(Some(String::from_utf8(value)?)),
            None if optional == Some(true) => Ok(None),
            None => bail!("no key {key}"),
        }
    }

    /// What a container mounts.
    pub fn binds(&self, container: &core::Container) -> Result<Vec<Bind>> {
        let spec = self.spec();
        let mut binds = Vec::new();
        for mount in container.volume_mounts.iter().flatten() {
            let volume = spec.volumes.iter().flatten().find(|volume| volume.name == mount.name);
            let volume = volume.with_context(|| format!("{} mounts no volume of the pod", mount.name))?;
            let mut source = match &volume.host_path {
                Some(host) => self.host.resolve(&host.path),
                None => self.path(&mount.name),
            };
            if let Some(sub_path) = &mount.sub_path {
                source.push(sub_path);
            }
            binds.push(Bind {
                source,
                target: PathBuf::from(&mount.mount_path),
                read_only: mount.read_only == Some(true),
            });
        }
        let access = self.path(ACCESS_VOLUME);
        let taken = binds.iter().any(|bind| bind.target == Path::new(SERVICE_ACCOUNT_DIR));
        if access.exists() && !taken {
            binds.push(Bind { source: access, target: SERVICE_ACCOUNT_DIR.into(), read_only: true });
        }
        Ok(binds)
    }
}

fn absent(optional: Option<bool>, kind: &str, name: &str) -> Result<BTreeMap<String, Vec<u8>>> {
    if optional == Some(true) {
        return Ok(BTreeMap::new());
    }
    bail!("{kind} {name:?} not found")
}

fn write_items(path: &Path, data: BTreeMap<String, Vec<u8>>, items: Option<&[core::KeyToPath]>) -> Result<()> {
    match items {
        None => data.iter().try_for_each(|(key, value)| write(&path.join(key), value)),
        Some(items) => items.iter().try_for_each(|item| {
            let value = data.get(&item.key).with_context(|| format!("no key {}", item.key))?;
            write(&path.join(&item.path), value)
        }),
    }
}

/// Replaces a file in one step, if its content changed. A reader sees the old or the new.
fn write(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|before| before == content) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, content)?;
    Ok(fs::rename(&temporary, path)?)
}
