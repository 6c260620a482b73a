//! The certificate authority: where its key comes from ([`Authority::load_or_create`]), who gets a certificate for
//! which identity ([`service`]), and the certificate the control plane itself serves with ([`serving`]).
//!
//! The key is read once into memory and leaves the process only as the Secret that already holds it.

pub mod authority;
pub mod service;
pub mod serving;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, ObjectMeta, PostParams};
use time::OffsetDateTime;

use authority::CaMaterial;
pub use authority::{Authority, LeafLifetime};

/// The Secret an operator puts an intermediate CA into; preferred when it is there.
const PLUGGED_IN: &str = "cacerts";
/// The Secret that holds the root this control plane made.
const SELF_SIGNED: &str = "istio-ca-secret";
const SELF_SIGNED_TYPE: &str = "istio.io/ca-root";

impl Authority {
    /// The authority of this mesh: from Secret `cacerts` if there is one, else from `istio-ca-secret`, which is made if
    /// it does not exist. Two control planes that start at once agree: who loses the creation reads the winner's.
    ///
    /// # Errors
    /// The API refuses, or a Secret is there but unusable. An unusable one is never passed over: falling back to
    /// another root would cut the mesh in two.
    pub async fn load_or_create(
        client: &kube::Client,
        namespace: &str,
        trust_domain: &str,
    ) -> anyhow::Result<Arc<Authority>> {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let read = async |name: &str| {
            secrets.get_opt(name).await.with_context(|| format!("reading Secret {namespace}/{name}"))
        };
        let (name, secret) = if let Some(secret) = read(PLUGGED_IN).await? {
            (PLUGGED_IN, secret)
        } else if let Some(secret) = read(SELF_SIGNED).await? {
            (SELF_SIGNED, secret)
        } else {
            let made = Authority::self_signed(trust_domain, OffsetDateTime::now_utc())?;
            let secret = match secrets.create(&PostParams::default(), &to_secret(namespace, made)).await {
                Ok(secret) => secret,
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    read(SELF_SIGNED).await?.context("Secret istio-ca-secret exists and does not")?
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("creating Secret {namespace}/{SELF_SIGNED}"));
                }
            };
            (SELF_SIGNED, secret)
        };
        let authority = material(&secret)
            .and_then(|material| Ok(Authority::from_material(&material)?))
            .with_context(|| format!("Secret {namespace}/{name} is not a usable CA"))?;
        let expires = authority.not_after();
        metrics::gauge!("citadel_server_root_cert_expiry_timestamp").set(expires.unix_timestamp() as f64);
        tracing::info!(secret = name, %expires, "certificate authority loaded");
        Ok(Arc::new(authority))
    }
}

/// Reads either layout: Istio's own keys, or those of a `kubernetes.io/tls` Secret.
fn material(secret: &Secret) -> anyhow::Result<CaMaterial> {
    let text = |key: &str| -> anyhow::Result<Option<String>> {
        let Some(ByteString(bytes)) = secret.data.as_ref().and_then(|data| data.get(key)) else { return Ok(None) };
        let text = String::from_utf8(bytes.clone()).with_context(|| format!("{key} is not text"))?;
        Ok((!text.trim().is_empty()).then_some(text))
    };
    if let (Some(certificate), Some(key)) = (text("ca-cert.pem")?, text("ca-key.pem")?) {
        let (chain, roots) = (text("cert-chain.pem")?, text("root-cert.pem")?);
        return Ok(CaMaterial { certificate, key, chain: chain.unwrap_or_default(), roots: roots.unwrap_or_default() });
    }
    if let (Some(certificate), Some(key)) = (text("tls.crt")?, text("tls.key")?) {
        return Ok(CaMaterial { certificate, key, chain: String::new(), roots: text("ca.crt")?.unwrap_or_default() });
    }
    bail!("needs ca-cert.pem and ca-key.pem, or tls.crt and tls.key")
}

fn to_secret(namespace: &str, material: CaMaterial) -> Secret {
    let data = [("ca-cert.pem", material.certificate), ("ca-key.pem", material.key)]
        .map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes())));
    Secret {
        metadata: ObjectMeta {
            name: Some(SELF_SIGNED.to_owned()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        type_: Some(SELF_SIGNED_TYPE.to_owned()),
        data: Some(BTreeMap::from(data)),
        ..Secret::default()
    }
}

#[cfg(test)]
mod tests;
