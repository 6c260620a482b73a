//! Who is calling: the administrator's static token and signed service account tokens bound to objects that exist.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::registry::{PODS, SERVICE_ACCOUNTS};
use super::store::{Key, Store};

pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// Audiences this API server answers to.
pub const API_AUDIENCES: [&str; 3] = [ISSUER, "https://kubernetes.default.svc", "kubernetes.default.svc"];
pub const MASTERS: &str = "system:masters";
pub const AUTHENTICATED: &str = "system:authenticated";
pub const UNAUTHENTICATED: &str = "system:unauthenticated";

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    pub fn is_admin(&self) -> bool {
        self.groups.iter().any(|g| g == MASTERS)
    }

    pub fn service_account(namespace: &str, name: &str, uid: &str) -> Self {
        Self {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            uid: uid.into(),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
                AUTHENTICATED.into(),
            ],
            extra: BTreeMap::new(),
        }
    }

    pub fn to_json(&self) -> Value {
        let mut user = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            user["uid"] = self.uid.as_str().into();
        }
        if !self.extra.is_empty() {
            user["extra"] = json!(self.extra);
        }
        user
    }
}

/// The object a token dies with.
#[derive(Debug, Clone)]
pub struct Bound {
    /// `Pod` or `Secret`, whose name and UID follow.
    pub kind: String,
    pub name: String,
    pub uid: String,
    /// Node of a pod, empty while it has none.
    pub node: String,
}

/// Signs and checks tokens.
pub struct Tokens {
    key: EcdsaKeyPair,
    key_id: String,
    admin: String,
}

impl Tokens {
    /// Reads the signing key and the administrator's token from the data directory, making them on first start.
    ///
    /// # Errors
    /// When the files cannot be read or written.
    pub fn open(data_dir: &Path) -> anyhow::Result<Self> {
        let pkcs8 = super::files::secret(&data_dir.join("service-account.key"), || {
            let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())?;
            Ok(document.as_ref().to_vec())
        })?;
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8)
            .map_err(|e| anyhow::anyhow!("service-account.key in the data directory: {e}"))?;
        let admin = super::files::secret(&data_dir.join("admin.token"), || {
            let mut random = [0; 32];
            aws_lc_rs::rand::fill(&mut random)?;
            Ok(URL_SAFE_NO_PAD.encode(random).into_bytes())
        })?;
        let admin = String::from_utf8(admin).context("admin.token in the data directory is not text")?;
        let key_id = URL_SAFE_NO_PAD.encode(Sha256::digest(key.public_key().as_ref()));
        Ok(Self { key, key_id, admin: admin.trim().to_owned() })
    }

    pub fn admin(&self) -> &str {
        &self.admin
    }

    /// Signs a token of a service account.
    ///
    /// # Errors
    /// Only if the random source does not answer.
    pub fn sign(
        &self,
        namespace: &str,
        (name, uid): (&str, &str),
        audiences: &[String],
        bound: Option<&Bound>,
        lifetime_seconds: i64,
    ) -> anyhow::Result<(String, i64)> {
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        let expires = now + lifetime_seconds;
        let mut binding = json!({"namespace": namespace, "serviceaccount": {"name": name, "uid": uid}});
        if let Some(bound) = bound {
            binding[bound.kind.to_lowercase()] = json!({"name": bound.name, "uid": bound.uid});
            if !bound.node.is_empty() {
                binding["node"] = json!({"name": bound.node});
            }
        }
        let claims = json!({
            "iss": ISSUER, "sub": format!("system:serviceaccount:{namespace}:{name}"), "aud": audiences,
            "iat": now, "nbf": now, "exp": expires, "jti": uuid::Uuid::new_v4().to_string(), "kubernetes.io": binding,
        });
        let header = json!({"alg": "ES256", "kid": self.key_id, "typ": "JWT"});
        let encode = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes())?;
        Ok((format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())), expires))
    }

    /// The user a bearer token stands for, and which of the wanted audiences it is for. `None`: not a valid token now.
    pub fn authenticate(&self, store: &Store, token: &str, wanted: &[String]) -> Option<(User, Vec<String>)> {
        // Digests are compared, so the time taken tells nothing about the token.
        if Sha256::digest(token) == Sha256::digest(&self.admin) {
            let accepted: Vec<String> =
                wanted.iter().filter(|a| API_AUDIENCES.contains(&a.as_str())).cloned().collect();
            let user = User {
                name: "kubernetes-admin".into(),
                uid: String::new(),
                groups: vec![MASTERS.into(), AUTHENTICATED.into()],
                extra: BTreeMap::new(),
            };
            return (!accepted.is_empty()).then_some((user, accepted));
        }
        let claims = self.verify(token)?;
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        if claims["iss"] != ISSUER || claims["exp"].as_i64()? <= now || claims["nbf"].as_i64()? > now + 60 {
            return None;
        }
        let audiences = claims["aud"].as_array()?;
        let accepted: Vec<String> =
            wanted.iter().filter(|a| audiences.iter().any(|t| t == a.as_str())).cloned().collect();
        if accepted.is_empty() {
            return None;
        }
        Some((self.bound_user(store, &claims)?, accepted))
    }

    fn verify(&self, token: &str) -> Option<Value> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let decode = |part: &str| -> Option<Value> { serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok() };
        if decode(header)?["alg"] != "ES256" {
            return None;
        }
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref());
        key.verify(signed.as_bytes(), &URL_SAFE_NO_PAD.decode(signature).ok()?).ok()?;
        decode(claims)
    }

    /// The token's user, if the account and what it is bound to still exist as they were.
    fn bound_user(&self, store: &Store, claims: &Value) -> Option<User> {
        let binding = &claims["kubernetes.io"];
        let namespace = binding["namespace"].as_str()?;
        let exists = |resource: &str, named: &Value| {
            let object = store.get(&Key::new(resource, namespace, named["name"].as_str()?))?;
            (object.value["metadata"]["uid"] == named["uid"]).then_some(object)
        };
        let account = &binding["serviceaccount"];
        exists(SERVICE_ACCOUNTS, account)?;
        let mut user = User::service_account(namespace, account["name"].as_str()?, account["uid"].as_str()?);
        let mut extra = |key: &str, value: &str| {
            user.extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
        };
        extra("credential-id", &format!("JTI={}", claims["jti"].as_str()?));
        if let Some(pod) = binding.get("pod") {
            let object = exists(PODS, pod)?;
            extra("pod-name", pod["name"].as_str()?);
            extra("pod-uid", pod["uid"].as_str()?);
            if let Some(node) = object.value["spec"]["nodeName"].as_str().filter(|n| !n.is_empty()) {
                extra("node-name", node);
            }
        }
        if let Some(secret) = binding.get("secret") {
            exists("/secrets", secret)?;
        }
        Some(user)
    }

    /// The public key for those who verify tokens themselves.
    pub fn jwks(&self) -> Value {
        let point = self.key.public_key().as_ref();
        // Uncompressed: 0x04, then x and y of 32 bytes each.
        let (x, y) = point.get(1..).unwrap_or_default().split_at(32.min(point.len().saturating_sub(1)));
        json!({"keys": [{
            "use": "sig", "kty": "EC", "kid": self.key_id, "crv": "P-256", "alg": "ES256",
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        }]})
    }
}

/// A `User` for an impersonation request; groups of service accounts are filled in.
pub fn impersonated(name: &str, uid: &str, groups: Vec<String>, extra: BTreeMap<String, Vec<String>>) -> User {
    let mut user = match name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':')) {
        Some((namespace, account)) if groups.is_empty() => User::service_account(namespace, account, uid),
        _ => User { name: name.into(), uid: uid.into(), groups, extra: BTreeMap::new() },
    };
    if !user.groups.iter().any(|g| g == AUTHENTICATED) {
        user.groups.push(AUTHENTICATED.into());
    }
    user.extra = extra;
    user
}

#[cfg(test)]
mod tests {
    use super::super::store::Mode;
    use super::*;

    #[test]
    fn a_token_dies_with_what_it_is_bound_to() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let pod = Key::new(PODS, "ns", "p");
        store
            .write(Mode::Commit, |tx| {
                let named = |name: &str, uid: &str| json!({"metadata": {"name": name, "namespace": "ns", "uid": uid}});
                tx.put(&Key::new(SERVICE_ACCOUNTS, "ns", "sa"), named("sa", "u1"));
                tx.put(&pod, named("p", "u2"));
                Ok(())
            })
            .unwrap();
        let bound = Bound { kind: "Pod".into(), name: "p".into(), uid: "u2".into(), node: String::new() };
        let audience = vec!["istio-ca".to_owned()];
        let (token, _) = tokens.sign("ns", ("sa", "u1"), &audience, Some(&bound), 600).unwrap();
        let (user, _) = tokens.authenticate(&store, &token, &audience).unwrap();
        assert_eq!(user.name, "system:serviceaccount:ns:sa");
        assert_eq!(user.extra["authentication.kubernetes.io/pod-uid"], ["u2"]);
        let api: Vec<String> = API_AUDIENCES.iter().map(|a| (*a).to_owned()).collect();
        assert!(tokens.authenticate(&store, &token, &api).is_none(), "wrong audience");
        let (expired, _) = tokens.sign("ns", ("sa", "u1"), &audience, None, -1).unwrap();
        assert!(tokens.authenticate(&store, &expired, &audience).is_none(), "expired");
        let mut forged = token.clone();
        forged.replace_range(40..41, if &forged[40..41] == "A" { "B" } else { "A" });
        assert!(tokens.authenticate(&store, &forged, &audience).is_none(), "forged");
        store.write(Mode::Commit, |tx| Ok(tx.delete(&pod))).unwrap();
        assert!(tokens.authenticate(&store, &token, &audience).is_none(), "the pod is gone");
    }
}
