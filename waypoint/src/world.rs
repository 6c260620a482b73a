//! What the control plane told this waypoint beyond workloads and services: routes and L7 policies, as one immutable
//! value that requests read through a snapshot.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use mesh::xds::{Rejected, ResourceHandler, typed_handler};
use mesh_proto::waypoint as wire;

use crate::policy::{HttpPolicy, PolicySet};
use crate::route::{CompiledRoute, RouteTable};

/// One configuration: a request sees exactly one from start to end.
#[derive(Debug, Default)]
pub struct World {
    pub routes: RouteTable,
    pub policies: PolicySet,
}

/// The resources behind the current [`World`]; unchanged ones are shared from one to the next.
#[derive(Debug, Default)]
struct Parts {
    routes: BTreeMap<String, Arc<CompiledRoute>>,
    policies: BTreeMap<String, Arc<HttpPolicy>>,
}

/// Publishes a [`World`] for every change.
#[derive(Debug, Default)]
pub struct WorldStore {
    current: ArcSwap<World>,
    parts: Mutex<Parts>,
}

impl WorldStore {
    pub fn snapshot(&self) -> Arc<World> {
        self.current.load_full()
    }

    fn change(&self, edit: impl FnOnce(&mut Parts)) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        edit(&mut parts);
        let world = World {
            routes: RouteTable::build(&parts.routes),
            policies: PolicySet::build(parts.policies.values().cloned()),
        };
        self.current.store(Arc::new(world));
    }

    /// Takes in routes. One that does not compile is refused and its last good version stays.
    pub fn route_handler(self: &Arc<Self>) -> Arc<dyn ResourceHandler> {
        let world = self.clone();
        typed_handler(wire::ROUTE_TYPE, move |updated: Vec<(String, wire::Route)>, removed| {
            let mut rejected = Vec::new();
            world.change(|parts| {
                for (name, route) in updated {
                    match CompiledRoute::compile(&route) {
                        Ok(compiled) => {
                            parts.routes.insert(name, Arc::new(compiled));
                        }
                        Err(why) => rejected.push(Rejected { name, reason: why.to_string() }),
                    }
                }
                for name in removed {
                    parts.routes.remove(&name);
                }
            });
            rejected
        })
    }

    /// Takes in policies. One that does not compile is refused *and* closes the door for its targets: the last good
    /// version may allow what the new one forbids.
    pub fn policy_handler(self: &Arc<Self>) -> Arc<dyn ResourceHandler> {
        let world = self.clone();
        typed_handler(wire::HTTP_POLICY_TYPE, move |updated: Vec<(String, wire::HttpPolicy)>, removed| {
            let mut rejected = Vec::new();
            world.change(|parts| {
                for (name, policy) in updated {
                    let compiled = HttpPolicy::compile(&policy).unwrap_or_else(|why| {
                        rejected.push(Rejected { name: name.clone(), reason: why.to_string() });
                        HttpPolicy::unreadable(&policy, &why)
                    });
                    parts.policies.insert(name, Arc::new(compiled));
                }
                for name in removed {
                    parts.policies.remove(&name);
                }
            });
            rejected
        })
    }
}
