//! Tells the API server by which roots it knows us: the `caBundle` of our webhook, and nothing else of that object, is ours.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::WEBHOOK;
use crate::ca::CurrentAuthority;

const FIELD_MANAGER: &str = "istiod-lite-webhook";
/// Before a write that failed is tried again, and before the object is asked for again: doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Keeps the bundle at the roots that are handed out, whenever these or the object change. Never ends.
/// `name` is the object's.
pub async fn keep_trusted(client: Client, authority: Arc<CurrentAuthority>, name: &str) {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client);
    let named = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = std::pin::pin!(watcher(api.clone(), named));
    let mut changes = authority.changes();
    let mut seen = Seen::default();
    let mut retry = RETRY.0;
    loop {
        let outdated = seen.found.as_ref().and_then(|found| outdated(found, &authority.distributed().0));
        let mut failed = false;
        if let Some(apply) = outdated {
            let params = PatchParams::apply(FIELD_MANAGER).force();
            match api.patch(name, &params, &Patch::Apply(&apply)).await {
                Ok(written) => {
                    tracing::info!("the API server knows the webhook by the roots of now");
                    // Until the watch brings it.
                    seen.found = Some(written);
                    retry = RETRY.0;
                }
                Err(error) => {
                    tracing::warn!(error = %error, "{name}: caBundle not written; objects are not judged");
                    failed = true;
                }
            }
        }
        // Nothing is lost by the branches not taken: what is to be written is worked out again above.
        let lost = tokio::select! {
            event = events.next() => match event {
                Some(Ok(event)) => {
                    seen.handle(event);
                    false
                }
                Some(Err(error)) => {
                    tracing::debug!(error = %error, "{name} cannot be watched");
                    true
                }
                None => true,
            },
            // An error would mean that the authority is gone, which is held here.
            _ = changes.changed() => false,
            () = tokio::time::sleep(retry), if failed => false,
        };
        if lost {
            tokio::time::sleep(retry).await;
        }
        retry = if lost || failed { (retry * 2).min(RETRY.1) } else { RETRY.0 };
    }
}

/// The object, as far as we have heard.
#[derive(Default)]
struct Seen {
    found: Option<ValidatingWebhookConfiguration>,
    listing: Option<ValidatingWebhookConfiguration>,
}

impl Seen {
    fn handle(&mut self, event: Event<ValidatingWebhookConfiguration>) {
        match event {
            Event::Init => self.listing = None,
            Event::InitApply(object) => self.listing = Some(object),
            Event::InitDone => self.found = self.listing.take(),
            Event::Apply(object) => self.found = Some(object),
            Event::Delete(_) => self.found = None,
        }
    }
}

/// What to apply where the API server knows other roots, or none. By UID: an object that has gone is not made again.
fn outdated(found: &ValidatingWebhookConfiguration, roots: &str) -> Option<Value> {
    let webhook = found.webhooks.iter().flatten().find(|webhook| webhook.name == WEBHOOK)?;
    let current = webhook.client_config.ca_bundle.as_ref();
    if current.is_some_and(|bundle| bundle.0 == roots.as_bytes()) {
        return None;
    }
    Some(json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": found.metadata.name, "uid": found.metadata.uid},
        "webhooks": [{"name": WEBHOOK, "clientConfig": {"caBundle": STANDARD.encode(roots)}}],
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::CONFIGURATION;

    fn configuration(webhook: &str, bundle: Option<&str>) -> ValidatingWebhookConfiguration {
        let mut object = json!({
            "metadata": {"name": CONFIGURATION, "uid": "u-1"},
            "webhooks": [{
                "name": webhook, "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "clientConfig": {"url": "https://192.0.2.1/validate"},
            }],
        });
        if let Some(bundle) = bundle {
            object["webhooks"][0]["clientConfig"]["caBundle"] = STANDARD.encode(bundle).into();
        }
        serde_json::from_value(object).expect("a configuration")
    }

    #[test]
    fn only_other_roots_are_written_and_only_into_our_webhook() {
        assert_eq!(outdated(&configuration(WEBHOOK, Some("ROOTS")), "ROOTS"), None);
        assert_eq!(outdated(&configuration("another.example.com", None), "ROOTS"), None);
        for before in [None, Some("OLD")] {
            let apply = outdated(&configuration(WEBHOOK, before), "ROOTS").expect("something to write");
            assert_eq!(apply["metadata"], json!({"name": CONFIGURATION, "uid": "u-1"}));
            let expected = json!([{"name": WEBHOOK, "clientConfig": {"caBundle": STANDARD.encode("ROOTS")}}]);
            assert_eq!(apply["webhooks"], expected);
        }
    }

    #[test]
    fn an_object_that_is_no_longer_listed_has_gone() {
        let mut seen = Seen::default();
        seen.handle(Event::Apply(configuration(WEBHOOK, None)));
        assert!(seen.found.is_some());
        seen.handle(Event::Init);
        seen.handle(Event::InitDone);
        assert!(seen.found.is_none());
    }
}
