//! Answers a node's question about one of its pods, from the world as it is now.

use mesh_proto::enrolment::resolve_response::Verdict;
use mesh_proto::enrolment::{OutsideMesh, PodEnrolment, ResolveRequest, UnknownPod};
use prost::Message as _;

use crate::enrol::rules::{self, DATAPLANE_MODE, Outside};
use crate::translate::enrolment;
use crate::translate::world::World;
use crate::types::{Key, STATIC_POD_UID, annotation, label};

/// Nothing can be said.
pub fn unknown() -> Verdict {
    Verdict::Unknown(UnknownPod {})
}

/// What is decided about `asked`, if it is placed on `node`.
pub fn resolve(world: &World, node: &str, asked: &ResolveRequest) -> Verdict {
    let Some(pod) = world.pods.get(&Key::new(&*asked.namespace, &*asked.name)) else { return unknown() };
    let placed = pod.node() == Some(node);
    let uids = [pod.uid.as_deref(), annotation(&**pod, STATIC_POD_UID)];
    // Another UID: a pod of that name is gone, or not known yet.
    if !placed || !uids.contains(&Some(asked.uid.as_str())) {
        return unknown();
    }
    match enrolment::translate(world, pod) {
        Some(resource) => match PodEnrolment::decode(resource.body()) {
            Ok(enrolment) => Verdict::Enrolment(enrolment),
            // Encoded a moment ago.
            Err(_) => unknown(),
        },
        None if rules::judge(world, pod) == Err(Outside::NamespaceUnknown) => unknown(),
        None => {
            let namespace = world.namespace(&asked.namespace);
            let mode = namespace.map(|namespace| label(&namespace.metadata, DATAPLANE_MODE));
            let is_hidden = world.hidden.contains(&*asked.namespace);
            let namespace_outside = is_hidden || mode.is_some_and(|mode| mode != Some("ambient"));
            Verdict::Outside(OutsideMesh { namespace_outside })
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::translate::world::Table;
    use crate::types::Held;

    fn world(namespace_mode: &str, pod: Value) -> World {
        let mut world = World::default();
        let namespace = json!({"metadata": {"name": "shop", "labels": {DATAPLANE_MODE: namespace_mode}}});
        let pod: k8s_openapi::api::core::v1::Pod = serde_json::from_value(pod).unwrap();
        world.namespaces.insert(Key::new("", "shop"), Held::new(serde_json::from_value(namespace).unwrap()));
        world.pods.insert(Key::of(&pod.metadata), Held::new(crate::types::Pod::new(pod)));
        world
    }

    fn pod() -> Value {
        json!({
            "metadata": {"name": "a", "namespace": "shop", "uid": "u1"},
            "spec": {"nodeName": "n1", "serviceAccountName": "web", "containers": []},
        })
    }

    fn ask(world: &World, node: &str, uid: &str) -> Verdict {
        resolve(world, node, &ResolveRequest { uid: uid.into(), namespace: "shop".into(), name: "a".into() })
    }

    #[test]
    fn a_pod_without_an_address_is_described_to_its_node_and_to_no_other() {
        let world = world("ambient", pod());
        let Verdict::Enrolment(enrolment) = ask(&world, "n1", "u1") else { panic!("not enrolled") };
        assert_eq!((enrolment.uid.as_str(), enrolment.service_account.as_str()), ("u1", "web"));
        assert!(enrolment.addresses.is_empty());
        assert_eq!(ask(&world, "n2", "u1"), unknown());
        assert_eq!(ask(&world, "", "u1"), unknown());
        assert_eq!(ask(&world, "n1", "u0"), unknown(), "its predecessor of the same name");
    }

    #[test]
    fn a_pod_that_is_not_placed_is_unknown() {
        let mut unplaced = pod();
        unplaced["spec"]["nodeName"] = Value::Null;
        let world = world("ambient", unplaced);
        assert_eq!(ask(&world, "n1", "u1"), unknown());
        assert_eq!(ask(&world, "", "u1"), unknown());
    }

    #[test]
    fn tells_a_namespace_outside_from_a_pod_outside() {
        let outside = |namespace_outside| Verdict::Outside(OutsideMesh { namespace_outside });
        assert_eq!(ask(&world("none", pod()), "n1", "u1"), outside(true));
        let mut opted_out = pod();
        opted_out["metadata"]["labels"] = json!({DATAPLANE_MODE: "none"});
        assert_eq!(ask(&world("ambient", opted_out), "n1", "u1"), outside(false));
    }

    #[test]
    fn a_namespace_that_has_not_been_heard_of_is_not_outside() {
        let mut early = world("ambient", pod());
        early.namespaces = Table::default();
        assert_eq!(ask(&early, "n1", "u1"), unknown());
        let mut opted_out = pod();
        opted_out["metadata"]["labels"] = json!({DATAPLANE_MODE: "none"});
        let mut early = world("ambient", opted_out);
        early.namespaces = Table::default();
        let outside = Verdict::Outside(OutsideMesh { namespace_outside: false });
        assert_eq!(ask(&early, "n1", "u1"), outside, "the pod speaks for itself, not for its namespace");
    }

    #[test]
    fn a_static_pod_is_known_by_the_uid_its_node_has_given_it() {
        let mut mirror = pod();
        mirror["metadata"]["annotations"] = json!({STATIC_POD_UID: "hash"});
        let world = world("ambient", mirror);
        let Verdict::Enrolment(enrolment) = ask(&world, "n1", "hash") else { panic!("not enrolled") };
        assert_eq!(enrolment.uid, "u1");
    }
}
