use std::pin::Pin;

use mesh_proto::ads::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_proto::ads::{DeltaDiscoveryResponse, Resource};
use mesh_proto::security::{AUTHORIZATION_TYPE, Authorization};
use mesh_proto::workload::{Address, Workload, address};
use prost::Message;
use prost_types::Any;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::super::{address_handler, authorization_handler};
use super::*;
use crate::drain;
use crate::grpc::{RootCa, TokenSource};
use crate::store::Store;

const PATIENCE: Duration = Duration::from_secs(20);

/// One stream as the control plane sees it.
struct Peer {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

impl Peer {
    async fn request(&mut self) -> DeltaDiscoveryRequest {
        let message = tokio::time::timeout(PATIENCE, self.requests.message());
        message.await.expect("a request in time").expect("the stream holds").expect("the stream goes on")
    }

    async fn respond(&self, type_url: &str, nonce: &str, resources: Vec<Resource>, removed: Vec<String>) {
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            nonce: nonce.to_owned(),
            resources,
            removed_resources: removed,
            ..Default::default()
        };
        self.responses.send(Ok(response)).await.expect("the client listens");
    }

    async fn fail(self, status: Status) {
        self.responses.send(Err(status)).await.expect("the client listens");
    }
}

/// A control plane whose streams are played by the test.
struct Stage(mpsc::Sender<Peer>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Stage {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn tokio_stream::Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outgoing) = mpsc::channel(16);
        let peer = Peer { requests: request.into_inner(), responses };
        self.0.send(peer).await.map_err(|_| Status::unavailable("the play is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// A served stage: its address and its streams.
async fn stage() -> (String, mpsc::Receiver<Peer>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, peers) = mpsc::channel(4);
    // Ends with the test's runtime.
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(AggregatedDiscoveryServiceServer::new(Stage(sender)))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    (address, peers)
}

async fn next(peers: &mut mpsc::Receiver<Peer>) -> Peer {
    tokio::time::timeout(PATIENCE, peers.recv()).await.expect("a stream in time").expect("the server runs")
}

fn node() -> NodeInfo {
    NodeInfo {
        role: NodeRole::Ztunnel,
        ip: Some("10.0.0.5".parse().unwrap()),
        name: "ztunnel-x".to_owned(),
        namespace: "istio-system".to_owned(),
        node_name: "node-a".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        metadata: BTreeMap::new(),
    }
}

fn config(address: String) -> XdsConfig {
    let grpc = GrpcConfig {
        address,
        root_ca: RootCa::System,
        token: TokenSource::None,
        headers: vec![],
        cluster_id: "Kubernetes".to_owned(),
        alt_hostname: None,
        dialer: Default::default(),
    };
    XdsConfig { grpc, node: node() }
}

fn packed(name: &str, version: &str, type_url: &str, message: &impl Message) -> Resource {
    let any = Any { type_url: type_url.to_owned(), value: message.encode_to_vec() };
    Resource { name: name.to_owned(), version: version.to_owned(), resource: Some(any), ..Default::default() }
}

fn workload(uid: &str, version: &str) -> Resource {
    let workload = Workload { uid: uid.to_owned(), ..Default::default() };
    let address = Address { r#type: Some(address::Type::Workload(workload)) };
    packed(uid, version, ADDRESS_TYPE, &address)
}

async fn becomes<T: Clone>(watch: &mut watch::Receiver<T>, wanted: impl FnMut(&T) -> bool) {
    tokio::time::timeout(PATIENCE, watch.wait_for(wanted)).await.expect("in time").expect("the sender lives");
}

#[tokio::test]
async fn streams_end_and_configuration_stays_and_resumes() {
    let (address, mut peers) = stage().await;
    let store = Store::new();
    let handlers = vec![address_handler(store.clone()), authorization_handler(store.clone())];
    let client = XdsClient::new(config(address), handlers);
    let (mut synced, mut connected, mut changes) = (client.synced(), client.connected(), store.watch());
    let mut link = client.link();
    let (trigger, drain) = drain::channel();
    let running = tokio::spawn(client.run(drain));

    let mut peer = next(&mut peers).await;
    let (first, second) = (peer.request().await, peer.request().await);
    assert_eq!([first.type_url.as_str(), second.type_url.as_str()], [ADDRESS_TYPE, AUTHORIZATION_TYPE]);
    assert_eq!(first.node.unwrap().id, "ztunnel~10.0.0.5~ztunnel-x.istio-system~istio-system.svc.cluster.local");

    peer.respond(ADDRESS_TYPE, "n1", vec![workload("a", "1"), workload("b", "1")], vec![]).await;
    let ack = peer.request().await;
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("n1", None));
    assert!(!*synced.borrow(), "policies have not been answered yet");
    let bad = packed("ns/p", "", AUTHORIZATION_TYPE, &Authorization { action: 9, ..Default::default() });
    peer.respond(AUTHORIZATION_TYPE, "n2", vec![bad], vec![]).await;
    let nack = peer.request().await;
    assert_eq!(nack.error_detail.unwrap().message, "ns/p: name is empty");
    becomes(&mut synced, |synced| *synced).await;
    becomes(&mut connected, |connected| *connected).await;
    becomes(&mut link, Option::is_some).await;

    peer.fail(Status::unavailable("rolling")).await;
    becomes(&mut link, Option::is_none).await;
    becomes(&mut connected, |connected| !*connected).await;
    assert_eq!(store.snapshot().workloads().count(), 2, "nothing is forgotten");
    assert!(*synced.borrow());

    let mut peer = next(&mut peers).await;
    let resumed = peer.request().await;
    let versions: Vec<_> = resumed.initial_resource_versions.into_iter().collect();
    assert_eq!(versions, [("a".into(), "1".into()), ("b".into(), "1".into())]);
    peer.request().await;
    changes.mark_unchanged();
    peer.respond(ADDRESS_TYPE, "m1", vec![], vec!["a".to_owned()]).await;
    becomes(&mut changes, |_| true).await;
    assert_eq!(peer.request().await.response_nonce, "m1");
    assert!(store.snapshot().workload("a").is_none() && store.snapshot().workload("b").is_some());
    becomes(&mut link, Option::is_some).await;

    trigger.drain(PATIENCE).await;
    tokio::time::timeout(PATIENCE, running).await.expect("run ends with the drain").unwrap();
    assert_eq!(store.snapshot().workloads().count(), 1, "the drain forgets nothing");
}

#[tokio::test]
async fn an_unreachable_control_plane_is_tried_until_the_drain() {
    // A port that was free a moment ago; whoever may have taken it since speaks no xDS.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let _installed = metrics::set_default_local_recorder(&recorder);
    let client = XdsClient::new(config(address), vec![address_handler(Store::new())]);
    let synced = client.synced();
    let (trigger, drain) = drain::channel();
    let running = tokio::spawn(client.run(drain));
    let twice = async {
        loop {
            let text = handle.render();
            let line = text.lines().find_map(|line| {
                line.strip_prefix(r#"istio_xds_connection_terminations_total{reason="ConnectionError"} "#)
            });
            if line.is_some_and(|count| count.parse::<u64>().unwrap() >= 2) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, twice).await.expect("it is tried again and counted");
    assert!(handle.render().contains("xds_connected 0"));
    assert!(!*synced.borrow());
    trigger.drain(PATIENCE).await;
    tokio::time::timeout(PATIENCE, running).await.expect("run ends with the drain").unwrap();
}

#[tokio::test]
async fn a_client_on_demand_asks_by_name_and_waits_for_the_word() {
    let (address, mut peers) = stage().await;
    let store = Store::new();
    let (demand, demanded) = demand();
    let client = XdsClient::on_demand(config(address), vec![address_handler(store.clone())], demanded);
    let (trigger, drain) = drain::channel();
    let running = tokio::spawn(client.run(drain));
    let ask = |name: &'static str| {
        let demand = demand.clone();
        tokio::spawn(async move { demand.ask(name).await })
    };
    let answered = async |asked: tokio::task::JoinHandle<()>| {
        tokio::time::timeout(PATIENCE, asked).await.expect("in time").expect("no panic");
    };
    let mut peer = next(&mut peers).await;
    assert_eq!(peer.request().await.resource_names_unsubscribe, ["*"]);
    let (found, absent) = (ask("/10.0.0.1"), ask("/10.9.9.9"));
    let mut names = [peer.request().await, peer.request().await].map(|r| r.resource_names_subscribe.concat());
    names.sort_unstable();
    assert_eq!(names, ["/10.0.0.1", "/10.9.9.9"]);
    let alias = Resource { aliases: vec!["/10.0.0.1".to_owned()], ..workload("a", "1") };
    peer.respond(ADDRESS_TYPE, "n1", vec![alias], vec![]).await;
    answered(found).await;
    assert!(store.snapshot().workload("a").is_some(), "what was asked for is there when the wait ends");
    assert!(!absent.is_finished());
    assert_eq!(peer.request().await.response_nonce, "n1");

    // A word that does not come before the stream ends comes on the next one.
    peer.fail(Status::unavailable("rolling")).await;
    let mut peer = next(&mut peers).await;
    let resumed = peer.request().await;
    assert_eq!(resumed.resource_names_subscribe, ["*", "/10.0.0.1", "/10.9.9.9", "a"]);
    assert!(!absent.is_finished());
    peer.respond(ADDRESS_TYPE, "m1", vec![], vec!["/10.9.9.9".to_owned()]).await;
    answered(absent).await;
    assert_eq!(peer.request().await.response_nonce, "m1");
    // Both are known now: nothing more is asked, and nobody waits.
    answered(ask("/10.9.9.9")).await;
    answered(ask("/10.0.0.1")).await;
    demand.hint("/10.9.9.9");
    demand.hint("b");
    assert_eq!(peer.request().await.resource_names_subscribe, ["b"]);
    trigger.drain(PATIENCE).await;
    tokio::time::timeout(PATIENCE, running).await.expect("run ends with the drain").unwrap();
    answered(ask("never")).await;
}

#[test]
fn waits_double_up_to_a_quarter_of_a_minute() {
    let mut backoff = Backoff::new();
    let waits: Vec<_> = (0..13).map(|_| backoff.next().as_millis()).collect();
    assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000]);
}

#[test]
fn endings_have_their_reason() {
    let reason = |end: StreamEnd| end.reason();
    assert_eq!(reason(StreamEnd::Connect(Status::unavailable("refused"))), "ConnectionError");
    assert_eq!(reason(StreamEnd::Broken(Status::cancelled(""))), "Reconnect");
    assert_eq!(reason(StreamEnd::Broken(Status::unavailable("received GOAWAY"))), "Reconnect");
    assert_eq!(reason(StreamEnd::Broken(Status::unauthenticated("token"))), "Error");
    assert_eq!(reason(StreamEnd::Senseless(ResponseError::Compressed)), "Error");
    assert_eq!(reason(StreamEnd::Torn), "Error");
    assert_eq!(reason(StreamEnd::Complete), "Complete");
}

#[test]
fn metadata_comes_from_the_environment_and_mistakes_are_all_told() {
    let variables = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    };
    let good = [("ISTIO_META_NETWORK", "east"), ("ISTIO_METAJSON_LABELS", r#"{"app":"z"}"#), ("PATH", "/bin")];
    let metadata = NodeInfo::metadata_from(variables(&good)).unwrap();
    let node = NodeInfo { metadata, ..node() }.to_wire();
    let fields = node.metadata.unwrap().fields;
    let text = |key: &str| match fields[key].kind.as_ref() {
        Some(prost_types::value::Kind::StringValue(text)) => text.clone(),
        other => panic!("{key} is {other:?}"),
    };
    for (key, value) in [
        ("NAME", "ztunnel-x"),
        ("NAMESPACE", "istio-system"),
        ("INSTANCE_IPS", "10.0.0.5"),
        ("NODE_NAME", "node-a"),
        ("CLUSTER_ID", "Kubernetes"),
        ("NETWORK", "east"),
    ] {
        assert_eq!(text(key), value, "{key}");
    }
    assert!(matches!(fields["LABELS"].kind, Some(prost_types::value::Kind::StructValue(_))));
    assert!(!fields.contains_key("PATH"));

    let bad = [("ISTIO_METAJSON_A", "{"), ("ISTIO_METAJSON_B", "nope")];
    let mistakes = NodeInfo::metadata_from(variables(&bad)).unwrap_err();
    assert_eq!(mistakes.len(), 2, "{mistakes:?}");
    let unknown_ip = NodeInfo { ip: None, role: NodeRole::Waypoint, ..self::node() }.to_wire();
    assert!(unknown_ip.id.starts_with("waypoint~1.1.1.1~"), "{}", unknown_ip.id);
}
