use mesh_proto::security::Authorization;
use mesh_proto::workload::{Address, Workload, address};

use super::*;
use crate::push::session::fixtures::{service, workload};

#[test]
fn a_workload_is_the_inside_of_its_address() {
    let inner = Workload { uid: "c//Pod/ns/a".into(), name: "a".repeat(300), ..Workload::default() };
    let outer = Address { r#type: Some(address::Type::Workload(inner.clone())) };
    let resource = Resource::new(ADDRESS_TYPE, "c//Pod/ns/a", &outer);
    assert_eq!(Workload::decode(resource.message_as(WORKLOAD_TYPE).unwrap().reader()).unwrap(), inner);
    assert_eq!(resource.message_as(ADDRESS_TYPE).unwrap().len(), resource.body().len());
    assert!(service("ns/svc", "10.0.0.1").message_as(WORKLOAD_TYPE).is_none());
    let empty = Resource::new(ADDRESS_TYPE, "x", &Address::default());
    assert!(empty.message_as(WORKLOAD_TYPE).is_none());
}

#[test]
fn changes_are_the_names_that_differ_and_are_forgotten_after_a_while() {
    let store = ResourceStore::new();
    let policy = |name: &str, namespace: &str| {
        let body = Authorization { namespace: namespace.into(), ..Authorization::default() };
        Resource::new(AUTHORIZATION_TYPE, name, &body)
    };
    store.publish([policy("a", "1"), policy("b", "1"), policy("c", "1")]);
    let first = View::new(store.snapshot());
    store.publish([policy("a", "1"), policy("b", "2"), policy("d", "1"), workload("w", "node-a", &[])]);
    let mut view = first.next(store.snapshot());
    let names = |names: &[&str]| Changed::Names(names.iter().map(|name| Arc::from(*name)).collect());
    assert_eq!(view.changed_since(1, AUTHORIZATION_TYPE), names(&["b", "c", "d"]));
    assert_eq!(view.changed_since(1, ADDRESS_TYPE), names(&["w"]));
    assert_eq!(view.changed_since(1, WORKLOAD_TYPE), names(&["w"]));
    assert_eq!(view.changed_since(2, AUTHORIZATION_TYPE), names(&[]));
    for generation in 0..REMEMBERED {
        assert_ne!(view.changed_since(1, AUTHORIZATION_TYPE), Changed::Everything);
        store.publish([policy("a", &generation.to_string())]);
        view = view.next(store.snapshot());
    }
    assert_eq!(view.changed_since(1, AUTHORIZATION_TYPE), Changed::Everything);

    // Of large changes only as many as fit, and the last in any case.
    let last = view.generation();
    let many = |version: usize| {
        let name = move |at: usize| workload(&format!("w{at}"), &format!("node-{version}"), &[]);
        (0..REMEMBERED_NAMES / 2 + 1).map(name).collect::<Vec<_>>()
    };
    for version in 0..2 {
        store.publish(many(version));
        view = view.next(store.snapshot());
        let is_remembered = matches!(view.changed_since(view.generation() - 1, ADDRESS_TYPE), Changed::Names(_));
        assert!(is_remembered, "{version}");
    }
    assert_eq!(view.changed_since(last, ADDRESS_TYPE), Changed::Everything);
}

#[tokio::test]
async fn readers_get_a_view_of_each_new_generation() {
    let store = Arc::new(ResourceStore::new());
    let (sender, mut views) = watch::channel(Arc::new(View::new(store.snapshot())));
    let follower = tokio::spawn(follow(Arc::clone(&store), sender));
    store.publish([workload("w", "node-a", &[])]);
    views.wait_for(|view| view.generation() == 1).await.unwrap();
    store.publish([]);
    views.wait_for(|view| view.generation() == 2).await.unwrap();
    drop(views);
    follower.await.unwrap();
}
