use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::*;
use crate::resources::lock;
use crate::testing::FakeApi;

/// A namespace's Secrets behind the Kubernetes API; `on_create` may play a rival.
#[derive(Clone, Default)]
struct Secrets(Arc<Mutex<BTreeMap<String, Value>>>);

impl Secrets {
    fn put(&self, name: &str, keys: &[(&str, &str)]) {
        let data = keys.iter().map(|(key, text)| (key.to_string(), ByteString(text.as_bytes().to_vec()))).collect();
        let secret = Secret {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            data: Some(data),
            ..Secret::default()
        };
        lock(&self.0).insert(name.into(), serde_json::to_value(secret).unwrap());
    }

    fn client(&self, rival: Option<CaMaterial>) -> kube::Client {
        let secrets = self.clone();
        FakeApi::answering(move |method, path, body| {
            let name = path.strip_prefix("/api/v1/namespaces/istio-system/secrets").expect("only Secrets are read");
            let status = |code: u16, reason: &str| {
                (code, json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": ""}))
            };
            if method == "GET" {
                let found = lock(&secrets.0).get(name.trim_start_matches('/')).cloned();
                return found.map_or_else(|| status(404, "NotFound"), |secret| (200, secret));
            }
            if let Some(rival) = &rival {
                secrets.put(SELF_SIGNED, &[("ca-cert.pem", &rival.certificate), ("ca-key.pem", &rival.key)]);
                return status(409, "AlreadyExists");
            }
            let secret: Value = serde_json::from_slice(body).unwrap();
            assert_eq!(secret["type"], SELF_SIGNED_TYPE);
            lock(&secrets.0).insert(secret["metadata"]["name"].as_str().unwrap().into(), secret.clone());
            (201, secret)
        })
    }

    async fn load(&self) -> anyhow::Result<Arc<Authority>> {
        Authority::load_or_create(&self.client(None), "istio-system", "cluster.local").await
    }
}

fn made() -> CaMaterial {
    Authority::self_signed("cluster.local", OffsetDateTime::now_utc()).unwrap()
}

#[tokio::test]
async fn the_root_survives_a_restart() {
    let secrets = Secrets::default();
    let first = secrets.load().await.unwrap();
    assert!(lock(&secrets.0).contains_key("istio-ca-secret"));
    let second = secrets.load().await.unwrap();
    assert_eq!(first.root_bundle_pem(), second.root_bundle_pem());
}

#[tokio::test]
async fn who_loses_the_race_to_create_the_root_takes_the_winners() {
    let rival = made();
    let client = Secrets::default().client(Some(rival.clone()));
    let authority = Authority::load_or_create(&client, "istio-system", "cluster.local").await.unwrap();
    let theirs = Authority::from_material(&rival).unwrap();
    assert_eq!(authority.root_bundle_pem(), theirs.root_bundle_pem());
}

#[tokio::test]
async fn a_plugged_in_ca_is_preferred_in_either_layout() {
    let (old, new) = (made(), made());
    let expected = Authority::from_material(&new).unwrap().root_bundle_pem();
    let layouts: [[(&str, &str); 4]; 2] = [
        [
            ("ca-cert.pem", &new.certificate),
            ("ca-key.pem", &new.key),
            ("cert-chain.pem", &new.certificate),
            ("root-cert.pem", &new.certificate),
        ],
        [("tls.crt", &new.certificate), ("tls.key", &new.key), ("ca.crt", &new.certificate), ("unrelated", "")],
    ];
    for layout in layouts {
        let secrets = Secrets::default();
        secrets.put(SELF_SIGNED, &[("ca-cert.pem", &old.certificate), ("ca-key.pem", &old.key)]);
        secrets.put(PLUGGED_IN, &layout);
        assert_eq!(secrets.load().await.unwrap().root_bundle_pem(), expected);
    }
}

#[tokio::test]
async fn an_unusable_secret_is_an_error_and_not_replaced() {
    let secrets = Secrets::default();
    secrets.put(PLUGGED_IN, &[("ca-cert.pem", "nonsense"), ("ca-key.pem", "nonsense")]);
    let error = format!("{:#}", secrets.load().await.err().expect("refused"));
    assert!(error.contains("Secret istio-system/cacerts is not a usable CA"), "{error}");
    assert!(!lock(&secrets.0).contains_key(SELF_SIGNED));

    let secrets = Secrets::default();
    secrets.put(SELF_SIGNED, &[("something", "else")]);
    assert!(secrets.load().await.is_err());
}
