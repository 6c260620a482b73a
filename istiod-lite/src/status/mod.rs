//! Writes what became of each object into its status. Only what differs is written, only our own conditions are
//! touched, and a write is refused by the API if the object has changed meanwhile: then the next pass sees the new one.
//! What the API finds invalid is not written again until the object, or what is to be said of it, changes.

mod merge;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use futures_util::{StreamExt, stream};
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::HTTP_POLICY_TYPE;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::resources::lock;
use crate::translate::verdict::{Kind, Report, Status, Verdict};
use crate::translate::world::World;
use crate::types::gateway::{GatewayClassSpec, GatewaySpec, HttpRouteSpec};
use crate::types::networking::{ServiceEntrySpec, WorkloadEntrySpec};
use crate::types::security::{AuthorizationPolicySpec, PeerAuthenticationSpec};
use crate::types::{CustomKind, Held, Key, Object};

pub const FIELD_MANAGER: &str = "istiod-lite";
/// Writes under way at once.
const CONCURRENCY: usize = 16;

/// Of a status, by name.
type Fields = BTreeMap<String, Value>;

/// A status to write.
#[derive(Debug, PartialEq)]
pub struct Write {
    pub kind: Kind,
    pub key: Key,
    /// The resource version this was decided on.
    version: String,
    /// What it is to say.
    report: Report,
    /// The fields to change.
    status: Fields,
}

/// What the API has found invalid.
#[derive(Debug, Default)]
pub struct Refused(Vec<Write>);

impl Refused {
    /// Those of `writes`, all that differs now, that are not known to be in vain.
    fn remaining(&mut self, writes: Vec<Write>) -> Vec<Write> {
        let known = std::mem::take(&mut self.0);
        let is_known = |write: &Write| {
            let same = |of: &Write| (of.kind, &of.key, &of.version) == (write.kind, &write.key, &write.version);
            known.iter().any(|known| same(known) && known.report == write.report)
        };
        let (refused, remaining) = writes.into_iter().partition(is_known);
        self.0 = refused;
        remaining
    }
}

/// What must be written so that every status says what its verdict says.
pub fn differences(world: &World, verdicts: &[Verdict], now: OffsetDateTime) -> Vec<Write> {
    let now = now.replace_nanosecond(0).unwrap_or(now).format(&Rfc3339).unwrap_or_default();
    verdicts
        .iter()
        .filter_map(|verdict| {
            let (status, version) = current(world, verdict.kind, &verdict.key)?;
            let Value::Object(status) = merge::status(&status, &verdict.report, verdict.generation, &now)? else {
                return None;
            };
            let (report, status) = (verdict.report.clone(), status.into_iter().collect());
            Some(Write { kind: verdict.kind, key: verdict.key.clone(), version, report, status })
        })
        .collect()
}

/// What statuses follow from: what objects say now, and what is to be said of them.
#[derive(Debug)]
pub struct Basis {
    verdicts: Arc<[Verdict]>,
    /// Only the kinds that we report on.
    objects: World,
}

impl Basis {
    pub fn new(world: &World, verdicts: &Arc<[Verdict]>) -> Self {
        let objects = World {
            services: world.services.clone(),
            gateway_classes: world.gateway_classes.clone(),
            gateways: world.gateways.clone(),
            http_routes: world.http_routes.clone(),
            authorization_policies: world.authorization_policies.clone(),
            peer_authentications: world.peer_authentications.clone(),
            service_entries: world.service_entries.clone(),
            workload_entries: world.workload_entries.clone(),
            ..World::default()
        };
        Self { verdicts: Arc::clone(verdicts), objects }
    }

    /// Whether it still does.
    pub fn holds(&self, world: &World, verdicts: &Arc<[Verdict]>) -> bool {
        let objects = &self.objects;
        Arc::ptr_eq(&self.verdicts, verdicts)
            && objects.services.ptr_eq(&world.services)
            && objects.gateway_classes.ptr_eq(&world.gateway_classes)
            && objects.gateways.ptr_eq(&world.gateways)
            && objects.http_routes.ptr_eq(&world.http_routes)
            && objects.authorization_policies.ptr_eq(&world.authorization_policies)
            && objects.peer_authentications.ptr_eq(&world.peer_authentications)
            && objects.service_entries.ptr_eq(&world.service_entries)
            && objects.workload_entries.ptr_eq(&world.workload_entries)
    }
}

/// Whether such an object is in force only where proxies have taken it.
pub fn is_carried_out_by_proxies(kind: Kind) -> bool {
    matches!(kind, Kind::AuthorizationPolicy | Kind::PeerAuthentication)
}

/// The verdicts on policies, with what proxies said to them: a policy that one refuses is not accepted. `refused` says, of a
/// resource by type and name, how many do and why. To those that are `unacknowledged` some have said nothing for too long.
pub fn answered(
    mut verdicts: Vec<Verdict>,
    refused: impl Fn(&'static str, &str) -> Option<(usize, String)>,
    unacknowledged: &BTreeSet<(Kind, Key)>,
) -> Vec<Verdict> {
    for verdict in &mut verdicts {
        let late = unacknowledged.contains(&(verdict.kind, verdict.key.clone()));
        let key = verdict.key.to_string();
        let Report::Conditions { wanted, .. } = &mut verdict.report else { continue };
        let refusal = match verdict.kind {
            Kind::AuthorizationPolicy => {
                let at_waypoints = format!("AuthorizationPolicy/{key}");
                refused(AUTHORIZATION_TYPE, &key)
                    .or_else(|| refused(HTTP_POLICY_TYPE, &at_waypoints))
                    .or_else(|| refused(HTTP_POLICY_TYPE, &format!("{at_waypoints}/gateways")))
            }
            _ => None,
        };
        for condition in wanted.iter_mut().filter(|condition| condition.status == Status::True) {
            if let Some((proxies, reason)) = &refusal {
                condition.status = Status::False;
                condition.reason = "RefusedByProxy";
                condition.message = format!("refused by {proxies} of the proxies, one of which says: {reason}");
            } else if late {
                condition.message.push_str("; not every proxy has acknowledged it");
            }
        }
    }
    verdicts
}

/// Carries out `writes`. False: some failed for a reason that will not bring a watch event, so try again.
pub async fn write(client: &Client, writes: Vec<Write>, refused: &Mutex<Refused>) -> bool {
    let writes = lock(refused).remaining(writes);
    let outcomes = stream::iter(writes).map(|write| async { (patch(client, &write).await, write) });
    let done = outcomes.buffer_unordered(CONCURRENCY).map(|(outcome, write)| match outcome {
        Outcome::Done => true,
        Outcome::Invalid => {
            lock(refused).0.push(write);
            true
        }
        Outcome::Failed => false,
    });
    done.fold(true, |all, one| std::future::ready(all && one)).await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    /// The API takes none of it.
    Invalid,
    Failed,
}

async fn patch(client: &Client, write: &Write) -> Outcome {
    let whole = patch_fields(client, write, &write.status).await;
    if whole != Outcome::Invalid || write.status.len() == 1 {
        return whole;
    }
    // What is at fault shall not hold the rest back. One is enough: the watch brings the object with it, and the next pass
    // the others.
    for (field, value) in &write.status {
        let one = patch_fields(client, write, &Fields::from([(field.clone(), value.clone())])).await;
        if one != Outcome::Invalid {
            return one;
        }
    }
    Outcome::Invalid
}

async fn patch_fields(client: &Client, write: &Write, status: &Fields) -> Outcome {
    let resource = api_resource(write.kind);
    let api: Api<DynamicObject> = match write.key.namespace.is_empty() {
        true => Api::all_with(client.clone(), &resource),
        false => Api::namespaced_with(client.clone(), &write.key.namespace, &resource),
    };
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let body = json!({"metadata": {"resourceVersion": write.version}, "status": status});
    match api.patch_status(&write.key.name, &params, &Patch::Merge(&body)).await {
        Ok(_) => Outcome::Done,
        // Changed or deleted meanwhile; the watch brings the news.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Outcome::Done,
        Err(error) => {
            tracing::warn!(kind = ?write.kind, object = %write.key, error = %error, "status not written");
            match error {
                kube::Error::Api(status) if status.code == 422 => Outcome::Invalid,
                _ => Outcome::Failed,
            }
        }
    }
}

/// The status and resource version we know of.
fn current(world: &World, kind: Kind, key: &Key) -> Option<(Value, String)> {
    fn custom<S>(object: Option<&Held<Object<S>>>) -> Option<(Value, String)> {
        let object = object?;
        Some((object.status.clone(), object.meta.resource_version.clone().unwrap_or_default()))
    }
    match kind {
        Kind::Service => {
            let service = world.services.get(key)?;
            Some((json!({"conditions": service.conditions}), service.version.to_string()))
        }
        Kind::GatewayClass => custom(world.gateway_classes.get(key)),
        Kind::Gateway => custom(world.gateways.get(key)),
        Kind::HttpRoute => custom(world.http_routes.get(key)),
        Kind::AuthorizationPolicy => custom(world.authorization_policies.get(key)),
        Kind::PeerAuthentication => custom(world.peer_authentications.get(key)),
        Kind::ServiceEntry => custom(world.service_entries.get(key)),
        Kind::WorkloadEntry => custom(world.workload_entries.get(key)),
    }
}

fn api_resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::Service => ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", "Service"), "services"),
        Kind::GatewayClass => GatewayClassSpec::api_resource(),
        Kind::Gateway => GatewaySpec::api_resource(),
        Kind::HttpRoute => HttpRouteSpec::api_resource(),
        Kind::AuthorizationPolicy => AuthorizationPolicySpec::api_resource(),
        Kind::PeerAuthentication => PeerAuthenticationSpec::api_resource(),
        Kind::ServiceEntry => ServiceEntrySpec::api_resource(),
        Kind::WorkloadEntry => WorkloadEntrySpec::api_resource(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::resources::Acks;
    use crate::testing::FakeApi;
    use crate::translate::fixture;
    use crate::translate::verdict::{Status, Wanted};

    fn verdict(message: &str) -> Verdict {
        let wanted = vec![Wanted::new("Accepted", Status::True, "R", message)];
        let addresses = vec![("x.test".to_owned(), "240.240.0.1".parse().unwrap())];
        let report = Report::Addressed { owned: &["Accepted"], wanted, addresses };
        Verdict { kind: Kind::ServiceEntry, key: Key::new("shop", "e"), generation: 1, report }
    }

    fn world(version: u32, status: &str) -> World {
        let meta = format!("{{name: e, namespace: shop, resourceVersion: \"{version}\"}}");
        fixture::world(&format!("kind: ServiceEntry\nmetadata: {meta}\nspec: {{}}\nstatus: {{{status}}}\n"))
    }

    /// The fields of each status that one write sends to an API which calls conditions invalid.
    async fn sent(refused: &Mutex<Refused>, world: &World, message: &str) -> Vec<String> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let client = FakeApi::answering(move |_, _, body| {
            let body: Value = serde_json::from_slice(body).unwrap();
            let mut fields: Vec<&str> = body["status"].as_object().unwrap().keys().map(String::as_str).collect();
            fields.sort_unstable();
            lock(&log).push(fields.join(" "));
            match fields.contains(&"conditions") {
                true => (422, json!({"kind": "Status", "status": "Failure", "code": 422, "reason": "Invalid"})),
                false => (200, json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {}})),
            }
        });
        let writes = differences(world, &[verdict(message)], OffsetDateTime::UNIX_EPOCH);
        assert!(write(&client, writes, refused).await, "trying again each second changes nothing");
        std::mem::take(&mut *lock(&seen))
    }

    #[tokio::test]
    async fn an_invalid_condition_holds_no_address_back_and_is_not_sent_for_ever() {
        let refused = Mutex::new(Refused::default());
        let both = ["addresses conditions", "addresses"];
        assert_eq!(sent(&refused, &world(1, ""), "m").await, both, "the address goes alone");
        let addressed = |version| world(version, "addresses: [{host: x.test, value: 240.240.0.1}]");
        assert_eq!(sent(&refused, &addressed(2), "m").await, ["conditions"]);
        assert_eq!(sent(&refused, &addressed(2), "m").await, [""; 0], "the same would be refused again");
        assert_eq!(sent(&refused, &addressed(2), "other").await, ["conditions"], "something else to say");
        assert_eq!(sent(&refused, &addressed(2), "other").await, [""; 0]);
        assert_eq!(sent(&refused, &addressed(3), "other").await, ["conditions"], "another object");
    }

    #[tokio::test]
    async fn a_policy_is_accepted_when_no_proxy_refuses_it() {
        let policy = |name: &str| Verdict {
            kind: Kind::AuthorizationPolicy,
            key: Key::new("shop", name),
            generation: 1,
            report: Report::Conditions {
                owned: &["ZtunnelAccepted"],
                wanted: vec![Wanted::new("ZtunnelAccepted", Status::True, "Accepted", "attached")],
            },
        };
        let said = |acks: &Acks, late: &BTreeSet<(Kind, Key)>| -> Vec<String> {
            let refused = |type_url: &'static str, name: &str| acks.refused(type_url, name);
            let verdicts = answered(vec![policy("a"), policy("b")], refused, late);
            let mut out = Vec::new();
            for verdict in verdicts {
                let Report::Conditions { wanted, .. } = verdict.report else { unreachable!() };
                out.push(format!("{} {}", wanted[0].reason, wanted[0].message));
            }
            out
        };
        let acks = Arc::new(Acks::default());
        let (one, other) = (acks.client(), acks.client());
        assert_eq!(said(&acks, &BTreeSet::new()), ["Accepted attached", "Accepted attached"]);
        let late = [(Kind::AuthorizationPolicy, Key::new("shop", "b"))].into();
        assert_eq!(said(&acks, &late), ["Accepted attached", "Accepted attached; not every proxy has acknowledged it"]);
        let mut refusals = acks.refusals();
        let names: Vec<Arc<str>> = vec!["shop/a".into(), "shop/b".into()];
        let refused: BTreeMap<Arc<str>, String> = [("shop/b".into(), "no such action".to_owned())].into();
        one.answered(AUTHORIZATION_TYPE, names.clone(), refused.clone());
        other.answered(AUTHORIZATION_TYPE, names.clone(), BTreeMap::new());
        assert!(refusals.has_changed().unwrap() && acks.any_refused());
        assert_eq!(
            said(&acks, &BTreeSet::new())[1],
            "RefusedByProxy refused by 1 of the proxies, one of which says: no such action"
        );
        refusals.mark_unchanged();
        one.answered(AUTHORIZATION_TYPE, names.clone(), refused);
        assert!(!refusals.has_changed().unwrap());
        drop(one);
        assert!(refusals.has_changed().unwrap() && !acks.any_refused());
        assert_eq!(said(&acks, &BTreeSet::new())[1], "Accepted attached");
        other.subscribed(AUTHORIZATION_TYPE);
        assert!(!acks.wait_acked(AUTHORIZATION_TYPE, 1, Duration::ZERO).await);
        other.acked(AUTHORIZATION_TYPE, 1);
        assert!(acks.wait_acked(AUTHORIZATION_TYPE, 1, Duration::ZERO).await);
    }
}
