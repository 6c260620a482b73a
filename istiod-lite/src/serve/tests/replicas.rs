//! What another replica hears about the clients of this one.

use mesh::grpc::TokenSource;
use mesh_proto::replica::replica_service_client::ReplicaServiceClient;
use mesh_proto::replica::{AcknowledgedRequest, Content, PartedRequest};
use mesh_proto::security::Authorization;
use mesh_proto::workload::{Address, TunnelProtocol, Workload, address};

use super::*;
use crate::replica::peers::{Credentials, Peers};
use crate::replica::{POLICY_TYPES, contents};
use crate::translate::fixture;

const SHORT: Duration = Duration::from_millis(200);

impl World {
    /// Another replica, which knows of this one.
    fn replica(&self) -> Peers {
        self.pods.arrive("istio-system", "istiod-2", "istiod", "node-b");
        self.tokens.issue("istio-system", "istiod-2", "istiod", None);
        let credentials = Credentials {
            token: TokenSource::Literal("istio-system/istiod-2".into()),
            namespace: "istio-system".into(),
            cluster_id: "Kubernetes".into(),
            pod: Some("istiod-2".into()),
        };
        let peers = Peers::new(credentials, Arc::clone(&self.authority));
        peers.observe(&fixture::world(&format!(
            "kind: EndpointSlice\nmetadata: {{name: x, namespace: istio-system, labels: {{kubernetes.io/service-name: istiod}}}}\n\
             addressType: IPv4\nports: [{{name: grpc-xds, port: {}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n",
            self.grpc.port()
        )));
        peers
    }
}

fn policy(name: &str, of: &str) -> Resource {
    let policy = Authorization { name: name.into(), namespace: of.into(), ..Authorization::default() };
    Resource::new(AUTHORIZATION_TYPE, name, &policy)
}

fn pod(tunnel: TunnelProtocol) -> Resource {
    let workload = Workload { uid: "cart".into(), tunnel_protocol: tunnel.into(), ..Workload::default() };
    Resource::new(ADDRESS_TYPE, "cart", &Address { r#type: Some(address::Type::Workload(workload)) })
}

/// What a replica that has these would ask about.
fn asked(resources: Vec<Resource>) -> Vec<Content> {
    let store = ResourceStore::new();
    store.publish([workload("other", "node-b", &[])]);
    store.publish(resources);
    contents(&store.snapshot(), &POLICY_TYPES)
}

#[tokio::test]
async fn a_policy_is_acknowledged_when_all_clients_have_it_as_the_asking_replica_has() {
    let world = World::ready().await;
    let peers = world.replica();
    let mut stream = world.discover("istio-system/zt-a").await.unwrap();
    stream.ask(request(AUTHORIZATION_TYPE)).await;
    assert!(peers.acknowledged(asked(vec![]), PATIENCE).await);

    world.store.publish([policy("a", "shop"), policy("b", "shop")]);
    let response = stream.next().await;
    let both = asked(vec![policy("a", "shop"), policy("b", "shop")]);
    assert!(!peers.acknowledged(both.clone(), SHORT).await, "it has been sent, no more");
    stream.send.send(ack(&response)).await.unwrap();
    assert!(peers.acknowledged(both.clone(), PATIENCE).await);
    for others in [vec![], vec![policy("a", "shop")], vec![policy("a", "shop"), policy("b", "other")]] {
        assert!(!peers.acknowledged(asked(others), SHORT).await);
    }
    let to_one = policy("b", "shop").for_audience(vec![Audience::Node("node-a".into())]);
    assert!(!peers.acknowledged(asked(vec![policy("a", "shop"), to_one]), SHORT).await, "others may see it");

    // It comes to have what is asked about while the question waits, as its world is a moment later.
    world.store.publish([policy("a", "shop")]);
    let later = async {
        let response = stream.next().await;
        stream.send.send(ack(&response)).await.unwrap();
        world.store.publish([policy("a", "shop"), policy("b", "shop")]);
        let response = stream.next().await;
        stream.send.send(ack(&response)).await.unwrap();
    };
    let (acknowledged, ()) = tokio::join!(peers.acknowledged(both, PATIENCE), later);
    assert!(acknowledged);
}

#[tokio::test]
async fn what_a_proxy_refuses_is_known_to_all_replicas() {
    let world = World::ready().await;
    world.store.publish([policy("a", "shop")]);
    let peers = world.replica();
    let refused = |acks: &Acks| peers.refusals().borrow().of(acks, AUTHORIZATION_TYPE, "a");
    let refuse = |acks: &Arc<Acks>, why: &str| {
        let client = acks.client();
        client.subscribed(AUTHORIZATION_TYPE);
        client.answered(AUTHORIZATION_TYPE, vec!["a".into()], [("a".into(), why.to_owned())].into());
        client
    };
    let ours = Arc::new(Acks::default());
    assert!(peers.acknowledged(vec![], PATIENCE).await);
    assert_eq!(refused(&ours), None);
    let theirs = refuse(&world.acks, "no such field");
    let mut news = peers.refusals();
    assert!(peers.acknowledged(vec![], PATIENCE).await);
    assert_eq!(refused(&ours), Some((1, "no such field".to_owned())));
    assert!(news.has_changed().unwrap());
    news.mark_unchanged();
    let _also_ours = refuse(&ours, "too long");
    assert_eq!(refused(&ours), Some((2, "too long".to_owned())), "of both replicas");
    assert!(peers.acknowledged(vec![], PATIENCE).await);
    assert!(!news.has_changed().unwrap(), "nothing is new");
    drop(theirs);
    assert!(peers.acknowledged(vec![], PATIENCE).await);
    assert_eq!(refused(&Acks::default()), None);
}

#[tokio::test]
async fn a_pod_has_parted_when_no_client_is_told_to_speak_hbone_to_it() {
    let world = World::ready().await;
    let peers = world.replica();
    let parted = async |patience| peers.parted(&["cart".to_owned(), "gone".to_owned()], patience).await;
    world.store.publish([pod(TunnelProtocol::Hbone)]);
    let mut stream = world.discover("istio-system/zt-a").await.unwrap();
    stream.ask(request(ADDRESS_TYPE)).await;
    assert!(!parted(SHORT).await, "it is in the mesh");
    world.store.publish([pod(TunnelProtocol::None)]);
    let response = stream.next().await;
    assert!(!parted(SHORT).await, "a client has not acknowledged that it is not");
    stream.send.send(ack(&response)).await.unwrap();
    assert!(parted(PATIENCE).await);
}

#[tokio::test]
async fn nobody_but_a_replica_is_answered() {
    let world = World::ready().await;
    world.pods.arrive("shop", "istiod", "istiod", "node-a");
    world.tokens.issue("shop", "istiod", "istiod", None);
    for (token, code) in [
        ("istio-system/zt-a", Code::PermissionDenied),
        ("shop/cart", Code::PermissionDenied),
        ("shop/istiod", Code::PermissionDenied),
        ("nonsense", Code::Unauthenticated),
    ] {
        let mut client = ReplicaServiceClient::new(world.channel().await);
        let refused = client.acknowledged(authorized(token, AcknowledgedRequest::default())).await.unwrap_err();
        assert_eq!(refused.code(), code, "{token}");
        let refused = client.parted(authorized(token, PartedRequest::default())).await.unwrap_err();
        assert_eq!(refused.code(), code, "{token}");
    }
    world.replica();
    let mut client = ReplicaServiceClient::new(world.channel().await);
    let content = |type_url: &str| Content { type_url: type_url.to_owned(), digest: 0 };
    for contents in [vec![content(ADDRESS_TYPE)], vec![content(AUTHORIZATION_TYPE); 3]] {
        let request = authorized("istio-system/istiod-2", AcknowledgedRequest { contents });
        assert_eq!(client.acknowledged(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
}
