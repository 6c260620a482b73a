//! Streams whose client asks for nonsense, for too much, or does not do its part.

use std::time::{Duration, Instant};

use mesh_proto::ads::{DeltaDiscoveryRequest, Status};
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::workload::ADDRESS_TYPE;
use serde_json::json;
use tonic::Code;

use super::standalone_support::eventually_async;
use super::world::{Bystander, Mesh, Stream, ack, subscribe};

const NONSENSE: usize = 10_000;
const LIMITED: &str = "mesh_xds_limited_total";

fn on_demand(names: Vec<String>) -> DeltaDiscoveryRequest {
    let resource_names_subscribe = names.into_iter().chain(["*".to_owned()]).collect();
    let resource_names_unsubscribe = vec!["*".to_owned()];
    DeltaDiscoveryRequest { resource_names_subscribe, resource_names_unsubscribe, ..subscribe(ADDRESS_TYPE) }
}

fn names(names: impl IntoIterator<Item = String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { resource_names_subscribe: names.into_iter().collect(), ..subscribe(ADDRESS_TYPE) }
}

/// A token of a pod that nobody wishes well.
async fn pest(mesh: &Mesh, name: &str) -> String {
    let pod = mesh.pod("pest", name, "pest", Some("n-a"), json!({})).await;
    let token = mesh.token("pest", "pest", &pod).await;
    eventually_async("the pod is known", async || mesh.discover(&token, subscribe(ADDRESS_TYPE)).await.ok().map(drop))
        .await;
    token
}

pub async fn nonsense_names(mesh: &Mesh) {
    let token = pest(mesh, "nonsense").await;
    // All at once.
    let all: Vec<String> = (0..NONSENSE).map(|n| format!("nonsense/{n}.example.com")).collect();
    let mut stream = mesh.discover(&token, on_demand(all.clone())).await.unwrap();
    let answer = stream.next().await.unwrap();
    assert_eq!((answer.resources.len(), answer.removed_resources.len()), (0, NONSENSE), "each is answered");
    drop(stream);

    // One by one, each acknowledged as a proxy does.
    let start = Instant::now();
    let Stream { send, mut answers } = mesh.discover(&token, on_demand(Vec::new())).await.unwrap();
    let asking = tokio::spawn({
        let send = send.clone();
        async move {
            for name in all {
                if send.send(names([name])).await.is_err() {
                    return;
                }
            }
        }
    });
    let mut answered = 0;
    while answered < NONSENSE {
        let answer = answers.message().await.unwrap().expect("the stream goes on");
        answered += answer.removed_resources.len();
        send.send(ack(&answer)).await.unwrap();
    }
    asking.await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "in as many requests: {:?}", start.elapsed());

    // Types that nobody serves, in names that are of no type.
    for n in 0..1000 {
        let type_url = format!("type.googleapis.com/nonsense.{n}{}", "x".repeat(1000));
        send.send(DeltaDiscoveryRequest { type_url: type_url.clone(), ..names(["a".to_owned()]) }).await.unwrap();
        let answer = answers.message().await.unwrap().expect("the stream goes on");
        assert_eq!((answer.type_url, answer.resources.len()), (type_url, 0));
    }
    let metrics = mesh.get("/metrics").unwrap();
    assert!(!metrics.contains("nonsense"), "no label is what a client says");
}

pub async fn too_much(mesh: &Mesh) {
    let token = pest(mesh, "greedy").await;
    let limited = |limit: &str| mesh.metric(&format!("{LIMITED}{{limit=\"{limit}\"}}"));
    let many = |from: usize, count: usize| (from..from + count).map(|n| n.to_string()).collect::<Vec<_>>();

    // Names in one request, in several, and in bytes.
    let mut stream = mesh.discover(&token, on_demand(many(0, 200_001))).await.unwrap();
    let ended = stream.end().await;
    assert_eq!(ended.code(), Code::ResourceExhausted, "{ended:?}");
    assert!(ended.message().contains("200000"), "{ended:?}");
    type Names = fn(usize, usize) -> Vec<String>;
    for (requests, each) in [(5, many as Names), (7, long as Names)] {
        let before = limited("names");
        let mut stream = mesh.discover(&token, on_demand(Vec::new())).await.unwrap();
        for n in 0..requests {
            // The stream may have ended by then.
            let _ = stream.send.send(names(each(n * 45_000, 45_000))).await;
        }
        let ended = stream.end().await;
        assert_eq!(ended.code(), Code::ResourceExhausted, "{ended:?}");
        assert!(ended.message().contains("more names than one stream may hold"), "{ended:?}");
        assert_eq!(limited("names"), before + 1);
    }

    // What a client says it has.
    let initial_resource_versions = many(0, 200_001).into_iter().map(|name| (name, "1".to_owned())).collect();
    let returning = DeltaDiscoveryRequest { initial_resource_versions, ..subscribe(ADDRESS_TYPE) };
    let ended = mesh.discover(&token, returning).await.unwrap().end().await;
    assert_eq!(ended.code(), Code::ResourceExhausted, "{ended:?}");

    // More bytes than a request has.
    let one = DeltaDiscoveryRequest { response_nonce: "x".repeat(65 << 20), ..subscribe(ADDRESS_TYPE) };
    let ended = mesh.discover(&token, one).await.unwrap().end().await;
    assert_eq!(ended.code(), Code::OutOfRange, "{ended:?}");
    let ended = mesh.discover(&token, DeltaDiscoveryRequest::default()).await.unwrap().end().await;
    assert_eq!((ended.code(), ended.message()), (Code::InvalidArgument, "a request without type URL"));

    // Streams, over as many connections as it likes.
    let mut streams = Vec::new();
    let refused = loop {
        match mesh.discover(&token, subscribe(ADDRESS_TYPE)).await {
            Ok(stream) => streams.push(stream),
            Err(status) => break status,
        }
        assert!(streams.len() <= 32);
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("streams of this caller"), "{refused:?}");
    assert!(limited("streams") > 0);
    drop(streams);
    eventually_async("room again", async || mesh.discover(&token, subscribe(ADDRESS_TYPE)).await.ok().map(drop)).await;
}

/// Of a hundred bytes each, far fewer.
fn long(from: usize, count: usize) -> Vec<String> {
    (from..from + count / 10).map(|n| format!("{n}-{}", "x".repeat(1000))).collect()
}

fn policy(name: &str, size: usize, mark: &str) -> serde_json::Value {
    let namespaces: Vec<String> = (0..size / 64).map(|n| format!("{mark}-{n:0>50}")).chain([mark.to_owned()]).collect();
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": namespaces}}]}]},
    })
}

fn contains(mark: &str) -> impl Fn(&[u8]) -> bool {
    move |body| body.windows(mark.len()).any(|found| found == mark.as_bytes())
}

/// What it lacks is said of each policy; the others have it.
pub async fn no_acknowledgement(mesh: &Mesh, bystander: &Bystander) {
    let token = pest(mesh, "silent").await;
    let mut stream = mesh.discover(&token, subscribe(AUTHORIZATION_TYPE)).await.unwrap();
    stream.next().await.unwrap();
    let written = policy("unanswered", 64, "once");
    mesh.apply(&written).await.unwrap();
    bystander.has("shop/unanswered", contains("once")).await;
    mesh.condition(&written, |it| it.contains("not every proxy has acknowledged it")).await;
    let more = tokio::time::timeout(Duration::from_millis(100), stream.answers.message()).await;
    assert!(more.is_err(), "one answer is outstanding, and no other is sent: {more:?}");
    drop(stream);
    mesh.condition(&written, |it| it.starts_with("ZtunnelAccepted=True") && !it.contains("acknowledged")).await;
}

pub async fn long_refusals(mesh: &Mesh, bystander: &Bystander) {
    let token = pest(mesh, "dissenter").await;
    let rejects = "pilot_total_xds_rejects{type=\"authorization\"}";
    let (before, lines) = (mesh.metric(rejects), told(mesh));
    let start = Instant::now();
    let mut stream = mesh.discover(&token, subscribe(AUTHORIZATION_TYPE)).await.unwrap();
    let reason = "no; shop/heartbeat: ".repeat((4 << 20) / 20);
    for n in 0..10 {
        let answer = stream.next().await.unwrap();
        let message = format!("shop/unanswered: {reason}");
        let refusal = DeltaDiscoveryRequest { error_detail: Some(Status { code: 3, message }), ..ack(&answer) };
        stream.send.send(refusal).await.unwrap();
        // Asked for again, so that there is another answer to refuse.
        let again = vec![format!("shop/{n}"), "shop/unanswered".to_owned()];
        let again = DeltaDiscoveryRequest { resource_names_subscribe: again, ..subscribe(AUTHORIZATION_TYPE) };
        stream.send.send(again).await.unwrap();
    }
    stream.next().await.unwrap();
    assert_eq!(mesh.metric(rejects), before + 10, "each is counted");
    let most = start.elapsed().as_secs() as usize + 2;
    assert!((1..=most).contains(&(told(mesh) - lines)), "and few are told");
    let proxies = mesh.get("/debug/proxies").unwrap();
    assert!(proxies.len() < 64 * 1024, "{} bytes", proxies.len());
    // A pod of another namespace carries none of these policies out, so its word is none for their status.
    let written = policy("unanswered", 64, "twice");
    mesh.apply(&written).await.unwrap();
    bystander.has("shop/unanswered", contains("twice")).await;
    mesh.condition(&written, |it| it.starts_with("ZtunnelAccepted=True Accepted")).await;
    drop(stream);
}

fn told(mesh: &Mesh) -> usize {
    mesh.log().lines().filter(|line| line.contains("client rejected resources")).count()
}

/// What is sent to who reads nothing stays where it is, once, however much changes.
pub async fn no_reading(mesh: &Mesh, bystander: &Bystander) {
    const DEAF: usize = 30;
    const SIZE: usize = 256 * 1024;
    const CHANGES: usize = 20;
    let token = pest(mesh, "deaf").await;
    mesh.apply(&policy("loud", SIZE, "mark-0-end")).await.unwrap();
    bystander.has("shop/loud", contains("mark-0-end")).await;
    let mut deaf = Vec::new();
    for _ in 0..DEAF {
        let stream = mesh.discover(&token, subscribe(AUTHORIZATION_TYPE)).await.unwrap();
        stream.send.send(subscribe(ADDRESS_TYPE)).await.unwrap();
        // Acknowledges what it has not read, too.
        for nonce in 1..=2 * CHANGES {
            let request = DeltaDiscoveryRequest { response_nonce: nonce.to_string(), ..subscribe(AUTHORIZATION_TYPE) };
            let _ = stream.send.try_send(request);
        }
        deaf.push(stream);
    }
    let before = mesh.memory();
    for n in 1..=CHANGES {
        let mark = format!("mark-{n}-end");
        mesh.apply(&policy("loud", SIZE, &mark)).await.unwrap();
        bystander.has("shop/loud", contains(&mark)).await;
    }
    let grown = mesh.memory().saturating_sub(before);
    let all = (DEAF * SIZE * CHANGES / 1024) as u64;
    assert!(grown < all / 3, "{grown} KiB more, of {all} KiB that they were not sent");
    // They are there, and get what is new once they read.
    for stream in &mut deaf {
        let mut read = 0;
        while read == 0 {
            let answer = stream.next().await.unwrap();
            read += usize::from(answer.type_url == AUTHORIZATION_TYPE);
        }
    }
}
