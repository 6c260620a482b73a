use std::sync::{Arc, Mutex};

use clap::Parser;

use super::*;
use crate::cli::testing::failure;
use crate::resources::lock;
use crate::testing::FakeApi;

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

fn wanted(arguments: &str) -> Wanted {
    match Line::try_parse_from(["x", "generate"].into_iter().chain(arguments.split_whitespace()))
        .expect("arguments")
        .command
    {
        Command::Generate { wanted, .. } => wanted,
        other => panic!("{other:?}"),
    }
}

const UP: &str = r#"{"conditions": [{"type": "Programmed", "status": "True", "reason": "Programmed", "message": "A waypoint pod is ready"}]}"#;

/// An API with one waypoint, one Gateway of another class and what was written.
fn api(written: &Arc<Mutex<Vec<(String, Value)>>>) -> Cluster {
    let written = Arc::clone(written);
    let client = FakeApi::answering(move |method, path, body| {
        let gateway = |name: &str, class: &str, status: Value| {
            json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                "metadata": {"name": name, "namespace": "shop"}, "spec": {"gatewayClassName": class}, "status": status,
            })
        };
        let of_path = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways";
        match (method, path) {
            ("GET", path) if path == of_path => {
                let up = serde_json::from_str(UP).expect("JSON");
                let items = [
                    gateway("other", "nginx", Value::Null),
                    gateway("waypoint", WAYPOINT_CLASS, up),
                    gateway("new", WAYPOINT_CLASS, Value::Null),
                ];
                (200, json!({"metadata": {}, "items": items}))
            }
            ("GET", "/api/v1/namespaces/shop") => {
                (200, json!({"metadata": {"name": "shop", "labels": {USE_WAYPOINT: "old"}}}))
            }
            ("PATCH", path) if path.ends_with("/taken") => failure(409, "conflict with \"argocd\": .spec.listeners"),
            ("PATCH" | "DELETE", path) => {
                let body: Value = serde_json::from_slice(body).unwrap_or_default();
                lock(&written).push((format!("{method} {path}"), body.clone()));
                (200, if body.is_object() { body } else { json!({"metadata": {"name": "x"}}) })
            }
            other => panic!("{other:?}"),
        }
    });
    Cluster { client, namespace: "shop".into(), system: "istio-system".into(), mesh: MeshSettings::default() }
}

const NO_WAIT: Wait = Wait { wait: false, timeout: Duration::from_secs(1) };

#[test]
fn the_gateway_says_what_was_asked_for_and_nothing_else() {
    assert_eq!(
        yaml(&gateway(&wanted(""), None)).expect("YAML"),
        "\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: waypoint
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - name: mesh
    port: 15008
    protocol: HBONE
"
    );
    let all = gateway(&wanted("--name w --for all --revision canary"), Some("shop"));
    let labels = json!({"istio.io/rev": "canary", "istio.io/waypoint-for": "all"});
    assert_eq!(all["metadata"], json!({"name": "w", "namespace": "shop", "labels": labels}));
    assert!(Line::try_parse_from(["x", "generate", "--for", "everything"]).is_err());
    assert!(Line::try_parse_from(["x", "delete"]).is_err(), "which?");
}

#[tokio::test]
async fn a_namespace_that_uses_another_waypoint_is_left_to_it_unless_told_otherwise() {
    let written = Arc::default();
    let cluster = api(&written);
    let wanted = wanted("");
    let applied = |overwrite| apply(&cluster, &wanted, true, overwrite, &NO_WAIT, Paint::PLAIN);
    let refused = applied(false).await.expect_err("it is taken").to_string();
    assert!(refused.contains("uses waypoint \"old\"") && refused.contains("--overwrite"), "{refused}");
    assert!(lock(&written).is_empty(), "nothing is half done");
    let said = applied(true).await.expect("it is taken over").text;
    assert_eq!(
        said,
        "waypoint shop/waypoint applied\n\
         namespace shop labelled istio.io/use-waypoint=waypoint\n\
         namespace shop is not in the mesh: kubectl label namespace shop istio.io/dataplane-mode=ambient\n"
    );
    let written = lock(&written);
    let [(gateway, _), (namespace, label)] = &written[..] else { panic!("{written:?}") };
    assert!(gateway.ends_with("/gateways/waypoint") && namespace == "PATCH /api/v1/namespaces/shop", "{written:?}");
    assert_eq!(label["metadata"]["labels"], json!({USE_WAYPOINT: "waypoint"}));
}

#[tokio::test]
async fn a_gateway_of_somebody_elses_is_not_taken_over() {
    let cluster = api(&Arc::default());
    let error =
        apply(&cluster, &wanted("--name taken"), false, false, &NO_WAIT, Paint::PLAIN).await.expect_err("a conflict");
    assert_eq!(error.to_string(), "conflict with \"argocd\": .spec.listeners; --overwrite takes it over");
}

#[tokio::test]
async fn only_waypoints_are_listed_and_deleted() {
    let written = Arc::default();
    let Cluster { client, .. } = api(&written);
    let found = waypoints(&client, Some("shop")).await.expect("a list");
    assert_eq!(
        listed(&found, Paint::PLAIN),
        "\
NAMESPACE   NAME       REVISION   TRAFFIC   PROGRAMMED
shop        new        default    service   Unknown
shop        waypoint   default    service   True
"
    );
    assert_eq!(
        statuses(&found, Paint::PLAIN),
        "\
NAMESPACE   NAME       PROGRAMMED   REASON       MESSAGE
shop        new        Unknown      Pending      no control plane has said anything about it
shop        waypoint   True         Programmed   A waypoint pod is ready
"
    );
    let of = |labels: Value| {
        let metadata = json!({"name": "w", "namespace": "shop", "labels": labels});
        let object = json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": metadata});
        Waypoint::of(&serde_json::from_value(object).expect("a Gateway"), "blue").revision
    };
    assert_eq!((of(json!({"istio.io/rev": "green"})), of(json!({}))), ("green".into(), "blue".into()));
    let error = delete(&client, "shop", vec!["waypoint".into(), "other".into()], false).await.expect_err("no waypoint");
    assert_eq!(error.to_string(), "no waypoint other in namespace shop; nothing was deleted");
    assert!(lock(&written).is_empty());
    let said = delete(&client, "shop", Vec::new(), true).await.expect("both go");
    assert_eq!(said, "waypoint shop/new deleted\nwaypoint shop/waypoint deleted\n");
    assert_eq!(lock(&written).len(), 2);
}
