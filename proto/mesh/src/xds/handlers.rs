//! Who takes the resources of one type, and the two handlers that feed the store.

use std::sync::Arc;

use bytes::Bytes;
use mesh_proto::{security, workload};
use prost::Message;

use crate::model::{Resource, Shared};
use crate::policy::Policy;
use crate::store::{Store, Update};

/// A resource that was not applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The resource's xDS name.
    pub name: String,
    /// For the control plane's log and ours: the field, and what is wrong with it.
    pub reason: String,
}

impl Rejected {
    pub fn new(name: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self { name: name.into(), reason: reason.to_string() }
    }
}

/// Takes the resources of one type. Called from the control runtime, one response at a time; must not block on I/O.
pub trait ResourceHandler: Send + Sync {
    /// The type it takes, as `type.googleapis.com/<message>`.
    fn type_url(&self) -> &'static str;

    /// Applies what it can of `updated` (name, version, encoded message) and forgets what is `removed`; returns what it
    /// could not apply. Names may be removed that were never known.
    fn apply(&self, updated: Vec<(String, String, Bytes)>, removed: Vec<String>) -> Vec<Rejected>;
}

struct Typed<M, F> {
    type_url: &'static str,
    apply: F,
    message: std::marker::PhantomData<fn() -> M>,
}

impl<M, F> ResourceHandler for Typed<M, F>
where
    M: Message + Default,
    F: Fn(Vec<(String, M)>, Vec<String>) -> Vec<Rejected> + Send + Sync,
{
    fn type_url(&self) -> &'static str {
        self.type_url
    }

    fn apply(&self, updated: Vec<(String, String, Bytes)>, removed: Vec<String>) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        let decoded = updated.into_iter().filter_map(|(name, _, value)| match M::decode(value) {
            Ok(message) => Some((name, message)),
            Err(error) => {
                rejected.push(Rejected::new(name, error));
                None
            }
        });
        let decoded = decoded.collect();
        rejected.extend((self.apply)(decoded, removed));
        rejected
    }
}

/// A handler from a closure over decoded messages: `apply(updated, removed)` returns what it rejects. What does not decode
/// is rejected before it gets there.
pub fn typed_handler<M: Message + Default + 'static>(
    type_url: &'static str,
    apply: impl Fn(Vec<(String, M)>, Vec<String>) -> Vec<Rejected> + Send + Sync + 'static,
) -> Arc<dyn ResourceHandler> {
    Arc::new(Typed { type_url, apply, message: std::marker::PhantomData })
}

/// Feeds workloads and services into `store`.
pub fn address_handler(store: Arc<Store>) -> Arc<dyn ResourceHandler> {
    Arc::new(Addresses(store))
}

struct Addresses(Arc<Store>);

impl ResourceHandler for Addresses {
    fn type_url(&self) -> &'static str {
        workload::ADDRESS_TYPE
    }

    /// One by one: a hundred thousand of them are never there in two forms at once.
    fn apply(&self, updated: Vec<(String, String, Bytes)>, removed: Vec<String>) -> Vec<Rejected> {
        let (mut update, mut rejected, mut shared) = (Update::new(), Vec::new(), Shared::default());
        for name in removed {
            update.push_remove_address(name);
        }
        for (name, _, value) in updated {
            match read_address(&name, value) {
                Ok(mut resource) => {
                    resource.share(&mut shared);
                    update.push_resource(resource);
                }
                Err(reason) => rejected.push(Rejected { name, reason }),
            }
        }
        self.0.apply(update);
        rejected
    }
}

fn read_address(name: &str, value: Bytes) -> Result<Resource, String> {
    let address = workload::Address::decode(value).map_err(|error| error.to_string())?;
    let resource = Resource::try_from(address).map_err(|error| error.to_string())?;
    if resource.name() == name { Ok(resource) } else { Err(format!("content is {}", resource.name())) }
}

/// Feeds L4 policies into `store`. One that cannot be understood is rejected *and* put there as a closed door: whatever
/// it was to govern denies until the control plane sends it in a form we can read, or removes it.
pub fn authorization_handler(store: Arc<Store>) -> Arc<dyn ResourceHandler> {
    Arc::new(Authorizations(store))
}

struct Authorizations(Arc<Store>);

impl ResourceHandler for Authorizations {
    fn type_url(&self) -> &'static str {
        security::AUTHORIZATION_TYPE
    }

    fn apply(&self, updated: Vec<(String, String, Bytes)>, removed: Vec<String>) -> Vec<Rejected> {
        let (mut update, mut rejected) = (Update::new(), Vec::new());
        for name in removed {
            update.push_remove_policy(name);
        }
        for (name, _, value) in updated {
            match read_policy(&name, value) {
                Ok(policy) => update.push_policy(policy),
                Err((door, reason)) => {
                    tracing::error!(policy = %name, %reason, "policy is not understood");
                    if let Some(door) = door {
                        update.push_policy(door);
                    }
                    rejected.push(Rejected { name, reason });
                }
            }
        }
        self.0.apply(update);
        rejected
    }
}

/// The policy, or what to put in its place and why.
fn read_policy(name: &str, value: Bytes) -> Result<Policy, (Option<Policy>, String)> {
    let key = name.parse().map_err(|error| (None, format!("resource name: {error}")))?;
    let wire = match security::Authorization::decode(value) {
        Ok(wire) => wire,
        Err(error) => {
            let reason = error.to_string();
            return Err((Some(Policy::unreadable(key, crate::policy::Scope::default(), reason.clone())), reason));
        }
    };
    match Policy::try_from(wire.clone()) {
        Ok(policy) if *policy.key() == key => Ok(policy),
        Ok(policy) => Err((None, format!("content is {}", policy.key()))),
        Err(error) => Err((Policy::refused(&wire, key, &error), error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Connection, Denial, authorize};

    fn encoded(name: &str, message: &impl Message) -> (String, String, Bytes) {
        (name.to_owned(), String::new(), message.encode_to_vec().into())
    }

    fn service(namespace: &str, hostname: &str) -> workload::Address {
        let service =
            workload::Service { namespace: namespace.to_owned(), hostname: hostname.to_owned(), ..Default::default() };
        workload::Address { r#type: Some(workload::address::Type::Service(service)) }
    }

    #[test]
    fn good_resources_are_applied_beside_rejected_ones() {
        let store = Store::new();
        let handler = address_handler(store.clone());
        let rejected = handler.apply(
            vec![
                encoded("shop/api", &service("shop", "api")),
                encoded("shop/empty", &workload::Address::default()),
                encoded("shop/liar", &service("shop", "other")),
                ("shop/garbage".to_owned(), String::new(), Bytes::from_static(&[0xff, 0xff, 0xff])),
            ],
            vec!["never/known".to_owned()],
        );
        let mut names: Vec<_> = rejected.iter().map(|r| r.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["shop/empty", "shop/garbage", "shop/liar"]);
        let snapshot = store.snapshot();
        assert_eq!(snapshot.services().map(|s| s.key().to_string()).collect::<Vec<_>>(), ["shop/api"]);
        handler.apply(vec![], vec!["shop/api".to_owned()]);
        assert_eq!(store.snapshot().services().count(), 0);
    }

    #[test]
    fn a_policy_not_understood_denies_until_it_is_replaced() {
        let store = Store::new();
        let handler = authorization_handler(store.clone());
        let mut policy = security::Authorization {
            name: "p".to_owned(),
            namespace: "shop".to_owned(),
            scope: security::Scope::Namespace as i32,
            action: 7,
            ..Default::default()
        };
        let server = crate::model::Workload { namespace: "shop".into(), ..Default::default() };
        let conn = Connection {
            source: None,
            source_ip: [10, 0, 0, 1].into(),
            destination: ([10, 0, 0, 2], 80).into(),
            original: None,
        };
        let decide = || {
            let snapshot = store.snapshot();
            authorize(snapshot.policies_for(&server), &conn).map(|_| ())
        };

        let rejected = handler.apply(vec![encoded("shop/p", &policy)], vec![]);
        assert_eq!(rejected, [Rejected::new("shop/p", "action: 7 is not a known value")]);
        assert!(matches!(decide(), Err(Denial::Unreadable { .. })), "{:?}", decide());

        policy.action = security::Action::Deny as i32;
        assert_eq!(handler.apply(vec![encoded("shop/p", &policy)], vec![]), []);
        assert_eq!(decide(), Ok(()));

        handler.apply(vec![("shop/p".to_owned(), String::new(), Bytes::from_static(b"\xff\xff"))], vec![]);
        assert!(matches!(decide(), Err(Denial::Unreadable { .. })));
        handler.apply(vec![], vec!["shop/p".to_owned()]);
        assert_eq!(decide(), Ok(()));

        policy.action = 7;
        policy.dry_run = true;
        assert_eq!(handler.apply(vec![encoded("shop/p", &policy)], vec![]).len(), 1);
        assert_eq!(decide(), Ok(()), "a dry-run policy is never enforced, readable or not");
    }
}
