//! Golden answers about the mesh of `testdata/cli/shop`.

use serde_json::{Value, json};

use super::*;
use crate::cli::testing::{golden, shop};

fn pod(namespace: &str, name: &str) -> PodDescription {
    let facts = shop();
    PodDescription::of(&facts, &facts.world.pods[&Key::new(namespace, name)])
}

fn service(name: &str) -> ServiceDescription {
    let facts = shop();
    let key = Key::new("shop", name);
    ServiceDescription::of(&facts, &key, &facts.world.services[&key])
}

#[test]
fn a_pod_is_told_with_all_that_decides_about_it() {
    golden("pod-server.txt", &pod("shop", "server-1").text(Paint::PLAIN));
    golden("pod-client.txt", &pod("shop", "client-1").text(Paint::PLAIN));
    golden("pod-pending.txt", &pod("shop", "server-2").text(Paint::PLAIN));
    golden("pod-outside.txt", &pod("outside", "stranger.v1").text(Paint::PLAIN));
}

#[test]
fn a_service_is_told_with_its_endpoints_and_what_is_asked_of_its_requests() {
    golden("service-server.txt", &service("server").text(Paint::PLAIN));
    golden("service-plain.txt", &service("plain").text(Paint::PLAIN));
}

#[test]
fn programs_get_the_same() {
    let text = written(Format::Json, &pod("shop", "server-1"), || unreachable!()).expect("JSON");
    let read: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(read["mesh"]["inMesh"], true);
    assert_eq!(
        read["mutualTls"],
        json!({"mode": "STRICT", "by": "istio-system/default", "ports": {"9090": "PERMISSIVE"}, "portsBy": "shop/server"})
    );
    assert_eq!(read["services"][1]["waypoint"]["name"], "shop/waypoint");
}

#[test]
fn names_may_have_their_namespace_before_or_after_them_and_dots_of_their_own() {
    let facts = shop();
    let named = |text: &str, namespace: &str| {
        facts::named("Pod", text, namespace, |key| facts.world.pods.contains_key(key)).map(|key| key.to_string())
    };
    for text in ["client-1", "client-1.shop", "shop/client-1"] {
        assert_eq!(named(text, "shop").expect("it exists"), "shop/client-1");
    }
    assert_eq!(named("stranger.v1", "outside").expect("it exists"), "outside/stranger.v1");
    assert_eq!(named("stranger.v1.outside", "shop").expect("it exists"), "outside/stranger.v1");
    let error = named("nobody.v1", "shop").expect_err("it does not exist").to_string();
    assert_eq!(error, "there is no Pod shop/nobody.v1 or v1/nobody");
}
