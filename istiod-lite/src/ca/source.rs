//! Where the authority's key comes from: a mounted directory, Secret `cacerts`, or the root this control plane made for
//! itself, in that order. Reads and writes; what comes of it is decided elsewhere.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, PostParams};
use mesh::identity::Revocations;
use time::OffsetDateTime;

use super::authority::{Authority, CaMaterial, RenewError};

/// The Secret an operator puts an intermediate CA into; preferred when it is there.
pub(super) const PLUGGED_IN: &str = "cacerts";
/// The Secret that holds the root this control plane made.
pub(super) const SELF_SIGNED: &str = "istio-ca-secret";
pub(super) const SELF_SIGNED_TYPE: &str = "istio.io/ca-root";

/// A Secret and a ConfigMap hold a MiB, and there is more in them than revocation lists.
pub(super) const LONGEST_LISTS: usize = 900 << 10;

/// Istio's own keys, then those of a `kubernetes.io/tls` Secret.
const KEYS: [&str; 8] =
    ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem", "ca-crl.pem", "tls.crt", "tls.key", "ca.crt"];

/// What lies in a Secret or a directory, by key.
type Data = BTreeMap<String, ByteString>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Directory,
    PluggedIn,
    SelfSigned,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Directory => "the mounted directory",
            Self::PluggedIn => "Secret cacerts",
            Self::SelfSigned => "Secret istio-ca-secret",
        })
    }
}

/// Material that can be read; whether it can sign is for [`Authority::from_material`] to say.
#[derive(Clone, PartialEq, Eq)]
pub struct Found {
    pub origin: Origin,
    pub material: CaMaterial,
    /// Revocation lists, PEM.
    pub revocations: Option<String>,
}

/// Why there is no material.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// May pass.
    #[error("Secret {name}: the API does not answer as it should")]
    Api {
        name: String,
        #[source]
        cause: Box<kube::Error>,
    },
    /// Somebody must mend it.
    #[error("{place} is not a usable CA: {reason}")]
    Unusable { place: String, reason: String },
}

/// The places to look at.
#[derive(Clone)]
pub struct Sources {
    secrets: Api<Secret>,
    namespace: String,
    directory: PathBuf,
}

impl Sources {
    pub fn new(client: &kube::Client, namespace: &str, directory: &Path) -> Self {
        let secrets = Api::namespaced(client.clone(), namespace);
        Self { secrets, namespace: namespace.to_owned(), directory: directory.to_owned() }
    }

    /// Where `origin` is, for messages.
    pub fn place(&self, origin: Origin) -> String {
        match origin {
            Origin::Directory => format!("directory {}", self.directory.display()),
            Origin::PluggedIn => format!("Secret {}/{PLUGGED_IN}", self.namespace),
            Origin::SelfSigned => format!("Secret {}/{SELF_SIGNED}", self.namespace),
        }
    }

    /// What an operator has plugged in. `None`: nothing.
    pub async fn plugged_in(&self) -> Result<Option<Found>, SourceError> {
        let place = self.place(Origin::Directory);
        match read_directory(&self.directory) {
            Ok(Some(data)) => return found(Origin::Directory, &place, &data).map(Some),
            Ok(None) => {}
            Err(error) => return Err(SourceError::Unusable { place, reason: error.to_string() }),
        }
        let secret = self.read(PLUGGED_IN).await?;
        secret.map(|secret| self.found(Origin::PluggedIn, &secret)).transpose()
    }

    /// The root that was made here, if there is one.
    pub async fn self_signed(&self) -> Result<Option<Found>, SourceError> {
        let secret = self.read(SELF_SIGNED).await?;
        secret.map(|secret| self.found(Origin::SelfSigned, &secret)).transpose()
    }

    /// What is there besides that of `origin`, which comes before it; as far as it is usable.
    pub async fn passed_over(&self, origin: Origin) -> Result<Vec<Found>, SourceError> {
        let others: &[(Origin, &str)] = match origin {
            Origin::Directory => &[(Origin::PluggedIn, PLUGGED_IN), (Origin::SelfSigned, SELF_SIGNED)],
            Origin::PluggedIn => &[(Origin::SelfSigned, SELF_SIGNED)],
            Origin::SelfSigned => &[],
        };
        let mut found = Vec::new();
        for (origin, name) in others {
            let secret = self.read(name).await?;
            found.extend(secret.and_then(|secret| self.found(*origin, &secret).ok()));
        }
        Ok(found)
    }

    /// Makes a root. Two control planes that start at once agree: who loses the creation reads the winner's.
    pub async fn make(&self, trust_domain: &str, ttl: Duration, now: OffsetDateTime) -> Result<Found, SourceError> {
        let unusable = |reason: String| SourceError::Unusable { place: "a new root".into(), reason };
        let made = Authority::self_signed(trust_domain, ttl, now).map_err(|error| unusable(error.to_string()))?;
        let mut secret = self.secret(SELF_SIGNED, SELF_SIGNED_TYPE);
        write_material(&mut secret, made);
        let secret = match self.secrets.create(&PostParams::default(), &secret).await {
            Ok(secret) => secret,
            Err(kube::Error::Api(status)) if status.code == 409 => {
                let winner = self.read(SELF_SIGNED).await?;
                winner.ok_or_else(|| unusable("it exists and does not".into()))?
            }
            Err(cause) => return Err(self.api(SELF_SIGNED, cause)),
        };
        self.found(Origin::SelfSigned, &secret)
    }

    /// Replaces the root that was made here by its successor, if it is still `old`. Whatever the Secret holds afterwards
    /// is the answer: another replica may have been faster.
    pub async fn renew(&self, old: &Found, ttl: Duration, now: OffsetDateTime) -> Result<Found, SourceError> {
        let place = || self.place(Origin::SelfSigned);
        let gone = || SourceError::Unusable { place: place(), reason: "it has gone".into() };
        let mut secret = self.read(SELF_SIGNED).await?.ok_or_else(gone)?;
        let current = self.found(Origin::SelfSigned, &secret)?;
        if current != *old {
            return Ok(current);
        }
        let renewed = Authority::renewed(&old.material, ttl, now)
            .map_err(|error: RenewError| SourceError::Unusable { place: place(), reason: error.to_string() })?;
        write_material(&mut secret, renewed);
        // With the resource version that was read: a Secret that has changed since is not overwritten.
        match self.secrets.replace(SELF_SIGNED, &PostParams::default(), &secret).await {
            Ok(secret) => self.found(Origin::SelfSigned, &secret),
            Err(kube::Error::Api(status)) if status.code == 409 => self.self_signed().await?.ok_or_else(gone),
            Err(cause) => Err(self.api(SELF_SIGNED, cause)),
        }
    }

    pub(super) async fn read(&self, name: &str) -> Result<Option<Secret>, SourceError> {
        self.secrets.get_opt(name).await.map_err(|cause| self.api(name, cause))
    }

    /// Creates `secret`, or replaces the version it was read as. `None`: somebody else was faster.
    pub(super) async fn write(&self, name: &str, secret: &Secret) -> Result<Option<Secret>, SourceError> {
        let params = PostParams::default();
        let written = match &secret.metadata.resource_version {
            Some(_) => self.secrets.replace(name, &params, secret).await,
            None => self.secrets.create(&params, secret).await,
        };
        match written {
            Ok(secret) => Ok(Some(secret)),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(None),
            Err(cause) => Err(self.api(name, cause)),
        }
    }

    /// A Secret of ours, still without data.
    pub(super) fn secret(&self, name: &str, kind: &str) -> Secret {
        let (name, namespace) = (Some(name.to_owned()), Some(self.namespace.clone()));
        let metadata = ObjectMeta { name, namespace, ..ObjectMeta::default() };
        Secret { metadata, type_: Some(kind.to_owned()), ..Secret::default() }
    }

    fn found(&self, origin: Origin, secret: &Secret) -> Result<Found, SourceError> {
        let none = Data::new();
        found(origin, &self.place(origin), secret.data.as_ref().unwrap_or(&none))
    }

    fn api(&self, name: &str, cause: kube::Error) -> SourceError {
        SourceError::Api { name: format!("{}/{name}", self.namespace), cause: Box::new(cause) }
    }
}

/// The files of `directory` that have a meaning; `None` if there is no key among them. A mounted Secret is read through
/// the link that its next version turns elsewhere, so that what is read belongs together.
fn read_directory(directory: &Path) -> io::Result<Option<Data>> {
    let directory = directory.join("..data").canonicalize().unwrap_or_else(|_| directory.to_owned());
    let mut data = Data::new();
    for key in KEYS {
        match std::fs::read(directory.join(key)) {
            Ok(bytes) => _ = data.insert(key.to_owned(), ByteString(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("{key}: {error}"))),
        }
    }
    Ok((data.contains_key("ca-key.pem") || data.contains_key("tls.key")).then_some(data))
}

fn found(origin: Origin, place: &str, data: &Data) -> Result<Found, SourceError> {
    let unusable = |reason| SourceError::Unusable { place: place.to_owned(), reason };
    let material = material(data).map_err(unusable)?;
    let revocations = text(data, "ca-crl.pem").and_then(checked_lists).map_err(unusable)?;
    Ok(Found { origin, material, revocations })
}

/// Reads either layout.
fn material(data: &Data) -> Result<CaMaterial, String> {
    if let (Some(certificate), Some(key)) = (text(data, "ca-cert.pem")?, text(data, "ca-key.pem")?) {
        let (chain, roots) = (text(data, "cert-chain.pem")?, text(data, "root-cert.pem")?);
        return Ok(CaMaterial { certificate, key, chain: chain.unwrap_or_default(), roots: roots.unwrap_or_default() });
    }
    if let (Some(certificate), Some(key)) = (text(data, "tls.crt")?, text(data, "tls.key")?) {
        let roots = text(data, "ca.crt")?.unwrap_or_default();
        return Ok(CaMaterial { certificate, key, chain: String::new(), roots });
    }
    Err("needs ca-cert.pem and ca-key.pem, or tls.crt and tls.key".into())
}

/// Nothing but white space is the same as none.
fn text(data: &Data, key: &str) -> Result<Option<String>, String> {
    let Some(ByteString(bytes)) = data.get(key) else { return Ok(None) };
    let text = String::from_utf8(bytes.clone()).map_err(|_| format!("{key} is not text"))?;
    Ok((!text.trim().is_empty()).then_some(text))
}

/// Lists that proxies would refuse are not given to them: one that starts would end. Whether they are signed by whom they
/// name is the proxies' to say: they know the paths.
fn checked_lists(text: Option<String>) -> Result<Option<String>, String> {
    let Some(mut text) = text else { return Ok(None) };
    if text.len() > LONGEST_LISTS {
        return Err(format!("ca-crl.pem: {} bytes; a ConfigMap is to hold {LONGEST_LISTS} at most", text.len()));
    }
    Revocations::check(text.as_bytes()).map_err(|error| format!("ca-crl.pem: {error}"))?;
    // Another may come after it.
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(Some(text))
}

fn write_material(secret: &mut Secret, material: CaMaterial) {
    let data = secret.data.get_or_insert_default();
    let texts =
        [("ca-cert.pem", material.certificate), ("ca-key.pem", material.key), ("root-cert.pem", material.roots)];
    for (key, text) in texts {
        // A key that Istio has left empty stays, and none is added.
        if !text.is_empty() {
            data.insert(key.to_owned(), ByteString(text.into_bytes()));
        }
    }
}
