//! Who takes the resources of one type, and the two handlers that feed the store.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_proto::{security, workload};
use prost::Message;

use crate::model::{Shared, Sharing};
use crate::policy::Policy;
use crate::store::{Store, Update};
use crate::text::Text;

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

    /// A response begins.
    fn begin(&self) -> Box<dyn Batch>;
}

/// The resources of one response, taken as they arrive. Nothing of them counts unless they are applied: dropping it is
/// what happens when the stream breaks.
pub trait Batch: Send {
    /// A resource with its encoded message.
    fn update(&mut self, name: &Text, message: &[u8]);

    /// The response is complete: forgets what is `removed`, then applies what it can; returns what it could not apply. Names
    /// may be removed that were never known.
    fn apply(self: Box<Self>, removed: Vec<String>) -> Vec<Rejected>;
}

struct Typed<M, F> {
    type_url: &'static str,
    apply: Arc<F>,
    message: std::marker::PhantomData<fn() -> M>,
}

struct TypedBatch<M, F> {
    apply: Arc<F>,
    decoded: Vec<(String, M)>,
    rejected: Vec<Rejected>,
}

impl<M, F> ResourceHandler for Typed<M, F>
where
    M: Message + Default + 'static,
    F: Fn(Vec<(String, M)>, Vec<String>) -> Vec<Rejected> + Send + Sync + 'static,
{
    fn type_url(&self) -> &'static str {
        self.type_url
    }

    fn begin(&self) -> Box<dyn Batch> {
        Box::new(TypedBatch { apply: self.apply.clone(), decoded: Vec::new(), rejected: Vec::new() })
    }
}

impl<M, F> Batch for TypedBatch<M, F>
where
    M: Message + Default,
    F: Fn(Vec<(String, M)>, Vec<String>) -> Vec<Rejected> + Send + Sync,
{
    fn update(&mut self, name: &Text, message: &[u8]) {
        match M::decode(message) {
            Ok(message) => self.decoded.push((name.to_string(), message)),
            Err(error) => self.rejected.push(Rejected::new(&**name, error)),
        }
    }

    fn apply(mut self: Box<Self>, removed: Vec<String>) -> Vec<Rejected> {
        self.rejected.extend((self.apply)(self.decoded, removed));
        self.rejected
    }
}

/// A handler from a closure over decoded messages: `apply(updated, removed)` returns what it rejects. What does not decode
/// is rejected before it gets there.
pub fn typed_handler<M: Message + Default + 'static>(
    type_url: &'static str,
    apply: impl Fn(Vec<(String, M)>, Vec<String>) -> Vec<Rejected> + Send + Sync + 'static,
) -> Arc<dyn ResourceHandler> {
    Arc::new(Typed { type_url, apply: Arc::new(apply), message: std::marker::PhantomData })
}

/// Feeds workloads and services into `store`.
pub fn address_handler(store: Arc<Store>) -> Arc<dyn ResourceHandler> {
    Arc::new(Addresses { store, shared: Arc::default() })
}

struct Addresses {
    store: Arc<Store>,
    shared: Arc<Mutex<Shared>>,
}

struct AddressBatch {
    store: Arc<Store>,
    shared: Arc<Mutex<Shared>>,
    sharing: Sharing,
    update: Update,
    rejected: Vec<Rejected>,
}

impl ResourceHandler for Addresses {
    fn type_url(&self) -> &'static str {
        workload::ADDRESS_TYPE
    }

    fn begin(&self) -> Box<dyn Batch> {
        locked(&self.shared).sweep();
        Box::new(AddressBatch {
            store: self.store.clone(),
            shared: self.shared.clone(),
            sharing: Sharing::default(),
            update: Update::new(),
            rejected: Vec::new(),
        })
    }
}

impl Batch for AddressBatch {
    fn update(&mut self, name: &Text, message: &[u8]) {
        match locked(&self.shared).read(name, message, &mut self.sharing) {
            Ok(resource) => self.update.push_resource(resource),
            Err(reason) => self.rejected.push(Rejected::new(&**name, reason)),
        }
    }

    fn apply(self: Box<Self>, removed: Vec<String>) -> Vec<Rejected> {
        let Self { store, sharing, update, rejected, .. } = *self;
        // It is needed no more, and the store is about to grow.
        drop(sharing);
        let mut whole = Update::new();
        for name in removed {
            whole.push_remove_address(name);
        }
        whole.append(update);
        store.apply(whole);
        rejected
    }
}

/// Whoever panicked there left sets of texts as they were.
fn locked(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Feeds L4 policies into `store`. One that cannot be understood is rejected *and* put there as a closed door: whatever
/// it was to govern denies until the control plane sends it in a form we can read, or removes it.
pub fn authorization_handler(store: Arc<Store>) -> Arc<dyn ResourceHandler> {
    Arc::new(Authorizations(store))
}

struct Authorizations(Arc<Store>);

struct AuthorizationBatch {
    store: Arc<Store>,
    update: Update,
    rejected: Vec<Rejected>,
}

impl ResourceHandler for Authorizations {
    fn type_url(&self) -> &'static str {
        security::AUTHORIZATION_TYPE
    }

    fn begin(&self) -> Box<dyn Batch> {
        Box::new(AuthorizationBatch { store: self.0.clone(), update: Update::new(), rejected: Vec::new() })
    }
}

impl Batch for AuthorizationBatch {
    fn update(&mut self, name: &Text, message: &[u8]) {
        match read_policy(name, message) {
            Ok(policy) => self.update.push_policy(policy),
            Err((door, reason)) => {
                if let Some(door) = door {
                    self.update.push_policy(door);
                }
                self.rejected.push(Rejected::new(&**name, reason));
            }
        }
    }

    fn apply(self: Box<Self>, removed: Vec<String>) -> Vec<Rejected> {
        let mut whole = Update::new();
        for name in removed {
            whole.push_remove_policy(name);
        }
        for Rejected { name, reason } in &self.rejected {
            tracing::error!(policy = %name, %reason, "policy is not understood");
        }
        whole.append(self.update);
        self.store.apply(whole);
        self.rejected
    }
}

/// The policy, or what to put in its place and why.
fn read_policy(name: &str, value: &[u8]) -> Result<Policy, (Option<Policy>, String)> {
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

    fn encoded(name: &'static str, message: &impl Message) -> (&'static str, Vec<u8>) {
        (name, message.encode_to_vec())
    }

    fn apply(handler: &Arc<dyn ResourceHandler>, updated: &[(&str, Vec<u8>)], removed: &[&str]) -> Vec<Rejected> {
        let mut batch = handler.begin();
        for (name, message) in updated {
            batch.update(&Text::from(*name), message);
        }
        batch.apply(removed.iter().map(|name| (*name).to_owned()).collect())
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
        let rejected = apply(
            &handler,
            &[
                encoded("shop/api", &service("shop", "api")),
                encoded("shop/empty", &workload::Address::default()),
                encoded("shop/liar", &service("shop", "other")),
                ("shop/garbage", vec![0xff, 0xff, 0xff]),
            ],
            &["never/known"],
        );
        let mut names: Vec<_> = rejected.iter().map(|r| r.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["shop/empty", "shop/garbage", "shop/liar"]);
        let snapshot = store.snapshot();
        assert_eq!(snapshot.services().map(|s| s.key().to_string()).collect::<Vec<_>>(), ["shop/api"]);
        apply(&handler, &[], &["shop/api"]);
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
        let server = crate::model::Workload::default().with(|w| w.namespace = "shop".into());
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

        let rejected = apply(&handler, &[encoded("shop/p", &policy)], &[]);
        assert_eq!(rejected, [Rejected::new("shop/p", "action: 7 is not a known value")]);
        assert!(matches!(decide(), Err(Denial::Unreadable { .. })), "{:?}", decide());

        policy.action = security::Action::Deny as i32;
        assert_eq!(apply(&handler, &[encoded("shop/p", &policy)], &[]), []);
        assert_eq!(decide(), Ok(()));

        apply(&handler, &[("shop/p", b"\xff\xff".to_vec())], &[]);
        assert!(matches!(decide(), Err(Denial::Unreadable { .. })));
        apply(&handler, &[], &["shop/p"]);
        assert_eq!(decide(), Ok(()));

        policy.action = 7;
        policy.dry_run = true;
        assert_eq!(apply(&handler, &[encoded("shop/p", &policy)], &[]).len(), 1);
        assert_eq!(decide(), Ok(()), "a dry-run policy is never enforced, readable or not");
    }
}
