use std::io::Read as _;
use std::process::{Command, Stdio};

use flate2::read::GzDecoder;
use serde_json::json;

use super::*;
use crate::cli::testing::failure;
use crate::testing::FakeApi;

/// An API with one pod of the mesh, one of somebody else's, and a Secret that nobody is to ask for.
fn cluster() -> Cluster {
    let client = FakeApi::answering(|_, path, _| {
        let list = |items: Vec<Value>| (200, json!({"metadata": {}, "items": items}));
        let pod = |namespace: &str, name: &str| {
            json!({
                "metadata": {"name": name, "namespace": namespace, "annotations": {LAST_APPLIED: "everything", "kept": "yes"}},
                "spec": {"containers": [{"name": "c", "env": [{"name": "PASSWORD", "value": format!("hunter2-{namespace}")}]}]},
                "status": {"phase": "Running", "containerStatuses": [
                    {"name": "c", "ready": true, "image": "", "imageID": "", "restartCount": 1},
                ]},
            })
        };
        match path {
            "/api/v1/pods" => list(vec![pod("istio-system", "istiod-0"), pod("shop", "web-0")]),
            "/api/v1/namespaces/istio-system/pods" => list(vec![pod("istio-system", "istiod-0")]),
            path if path.contains("secret") => panic!("{path}"),
            path if path.ends_with("/log") => (200, json!("what was logged")),
            path if path.contains("/proxy/") => failure(503, "no such replica"),
            _ => list(Vec::new()),
        }
    });
    Cluster { client, namespace: "default".into(), system: "istio-system".into(), mesh: MeshSettings::default() }
}

async fn collected() -> (Vec<u8>, usize, usize) {
    let mut archive = Vec::new();
    let mut report = Report::new(&mut archive, Duration::from_secs(60));
    report.collect(&cluster()).await.expect("a report");
    let (files, missing) = report.finish().expect("an archive");
    (archive, files, missing)
}

#[tokio::test]
async fn the_archive_holds_objects_and_logs_and_no_secrets() {
    let (archive, files, missing) = collected().await;
    let mut bytes = Vec::new();
    GzDecoder::new(&archive[..]).read_to_end(&mut bytes).expect("gzip");
    let text = String::from_utf8_lossy(&bytes);
    for there in [
        "bug-report/logs/istio-system/istiod-0/c.log",
        "bug-report/logs/istio-system/istiod-0/c.previous.log",
        "what was logged",
        "kept",
        "hunter2-istio-system",
    ] {
        assert!(text.contains(there), "{there}");
    }
    for hidden in ["hunter2-shop", "everything"] {
        assert!(!text.contains(hidden), "{hidden}");
    }
    assert!(missing > 0 && text.contains("no such replica"), "what could not be had is said");
    // What others read it with.
    let mut tar =
        Command::new("tar").args(["-tzf", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("tar");
    tar.stdin.take().expect("a pipe").write_all(&archive).expect("tar reads");
    let output = tar.wait_with_output().expect("tar ends");
    let listed = String::from_utf8(output.stdout).expect("names");
    assert!(output.status.success(), "{listed}");
    assert_eq!(listed.lines().count(), files, "{listed}");
}

#[tokio::test]
async fn size_and_time_are_bounded() {
    let mut archive = Vec::new();
    let mut report = Report::new(&mut archive, Duration::ZERO);
    report.collect(&cluster()).await.expect("a report");
    report.add("large.txt", "x".repeat(MOST_BYTES + 10)).expect("room");
    assert!(report.missing.iter().any(|line| line.contains("out of time")), "{:?}", report.missing);
    assert!(report.missing.contains(&"large.txt: 10 bytes were cut".to_owned()), "{:?}", report.missing);
    report.bytes = MOST_IN_ALL - 1;
    report.add("more.txt", "more".into()).expect("room");
    assert!(report.missing.contains(&"more.txt: 3 bytes were cut".to_owned()), "{:?}", report.missing);
}
