//! The embedded API server as programs meet it: through the `kube` client.

mod standalone_support;

use std::collections::BTreeSet;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use futures_util::TryStreamExt as _;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenReview};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use kube::api::{
    Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, PropagationPolicy, WatchEvent, WatchParams,
};
use kube::{Client, Resource as _, ResourceExt as _};
use serde_json::{Value, json};
use standalone_support::{Server, eventually_async};

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("an object of that type")
}

fn config_map(name: &str, value: &str) -> ConfigMap {
    from(json!({"metadata": {"name": name}, "data": {"value": value}}))
}

fn pod(name: &str, node: Option<&str>) -> Pod {
    from(json!({"metadata": {"name": name}, "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}}))
}

fn deployment(name: &str) -> Deployment {
    from(json!({"metadata": {"name": name}, "spec": {
        "selector": {"matchLabels": {"app": name}},
        "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "c", "image": "i"}]}},
    }}))
}

fn code(error: kube::Error) -> (u16, String) {
    match error {
        kube::Error::Api(status) => (status.code, status.reason.clone()),
        other => panic!("not an answer of the API: {other}"),
    }
}

async fn namespace(client: &Client, name: &str) {
    let namespace: Namespace = from(json!({"metadata": {"name": name}}));
    Api::all(client.clone()).create(&PostParams::default(), &namespace).await.expect("a namespace");
}

#[tokio::test]
async fn nothing_answered_is_lost_by_a_kill() {
    let mut server = Server::start();
    let api: Api<ConfigMap> = Api::default_namespaced(server.client().await);
    for i in 0..20 {
        api.create(&PostParams::default(), &config_map(&format!("c{i}"), "x")).await.unwrap();
    }
    api.delete("c0", &DeleteParams::default()).await.unwrap();
    let last = api.patch("c1", &PatchParams::default(), &Patch::Merge(json!({"data": {"value": "y"}}))).await.unwrap();
    server.kill_and_restart();

    let api: Api<ConfigMap> = Api::default_namespaced(server.client().await);
    let names: BTreeSet<String> =
        api.list(&ListParams::default()).await.unwrap().iter().map(|c| c.name_any()).collect();
    assert_eq!(names.iter().filter(|n| n.starts_with('c')).count(), 19);
    let kept = api.get("c1").await.unwrap();
    assert_eq!((kept.resource_version(), kept.uid()), (last.resource_version(), last.uid()));
    assert_eq!(kept.data.unwrap()["value"], "y");
    // A watcher that had seen all of it goes on where it was.
    let watch = api.watch(&WatchParams::default(), &last.resource_version().unwrap()).await.unwrap();
    let mut watch = std::pin::pin!(watch);
    let fresh = api.create(&PostParams::default(), &config_map("fresh", "z")).await.unwrap();
    match watch.try_next().await.unwrap() {
        Some(WatchEvent::Added(object)) => assert_eq!(object.resource_version(), fresh.resource_version()),
        other => panic!("{other:?}"),
    }
    let version: u64 = fresh.resource_version().unwrap().parse().unwrap();
    assert!(version > last.resource_version().unwrap().parse().unwrap());
}

#[tokio::test]
async fn a_watch_sees_objects_come_and_go_with_its_selector() {
    let server = Server::start();
    let api: Api<Pod> = Api::default_namespaced(server.client().await);
    let params = WatchParams::default().fields("spec.nodeName=n1").labels("app=a");
    let start = api.list(&ListParams::default()).await.unwrap().metadata.resource_version.unwrap();
    let watch = api.watch(&params, &start).await.unwrap();
    let mut watch = std::pin::pin!(watch);
    api.create(&PostParams::default(), &pod("elsewhere", Some("n2"))).await.unwrap();
    api.create(&PostParams::default(), &pod("p", None)).await.unwrap();
    let patch = |value: Value| {
        let api = api.clone();
        async move { api.patch("p", &PatchParams::default(), &Patch::Merge(value)).await.unwrap() }
    };
    patch(json!({"metadata": {"labels": {"app": "a"}}, "spec": {"nodeName": "n1"}})).await;
    patch(json!({"metadata": {"annotations": {"x": "y"}}})).await;
    patch(json!({"metadata": {"labels": {"app": "b"}}})).await;
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.push(match watch.try_next().await.unwrap().expect("the watch goes on") {
            WatchEvent::Added(o) => format!("added {}", o.name_any()),
            WatchEvent::Modified(o) => format!("modified {}", o.name_any()),
            WatchEvent::Deleted(o) => format!("deleted {}", o.name_any()),
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(seen, ["added p", "modified p", "deleted p"]);
}

#[tokio::test]
async fn a_watch_from_too_long_ago_is_told_to_list_again() {
    let mut server = Server::start();
    let api: Api<ConfigMap> = Api::default_namespaced(server.client().await);
    let first = api.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    api.create(&PostParams::default(), &config_map("b", "1")).await.unwrap();
    server.kill_and_restart();
    let api: Api<ConfigMap> = Api::default_namespaced(server.client().await);
    let watch = api.watch(&WatchParams::default(), &first.resource_version().unwrap()).await.unwrap();
    let mut watch = std::pin::pin!(watch);
    match watch.try_next().await.unwrap() {
        Some(WatchEvent::Error(status)) => assert_eq!((status.code, status.reason.as_str()), (410, "Expired")),
        other => panic!("the events in between are gone: {other:?}"),
    }
}

#[tokio::test]
async fn stale_writes_conflict_and_lists_come_in_pages() {
    let server = Server::start();
    let api: Api<ConfigMap> = Api::default_namespaced(server.client().await);
    let stale = api.create(&PostParams::default(), &config_map("a", "1")).await.unwrap();
    api.replace("a", &PostParams::default(), &stale).await.expect("nothing has changed in between");
    api.patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"value": "2"}}))).await.unwrap();
    let mut second = stale.clone();
    second.data = Some([("value".to_owned(), "3".to_owned())].into());
    assert_eq!(code(api.replace("a", &PostParams::default(), &second).await.unwrap_err()), (409, "Conflict".into()));
    assert_eq!(
        code(api.create(&PostParams::default(), &config_map("a", "1")).await.unwrap_err()),
        (409, "AlreadyExists".into())
    );
    for i in 0..6 {
        api.create(&PostParams::default(), &config_map(&format!("page-{i}"), "1")).await.unwrap();
    }
    let (mut names, mut params) = (Vec::new(), ListParams::default().limit(3));
    loop {
        let page = api.list(&params).await.unwrap();
        assert!(page.items.len() <= 3);
        names.extend(page.iter().map(|c| c.name_any()));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => break,
        }
    }
    assert_eq!(names.iter().filter(|n| n.starts_with("page-")).count(), 6);
}

#[tokio::test]
async fn apply_by_two_managers_conflicts_until_forced() {
    let server = Server::start();
    let api: Api<ConfigMap> = Api::default_namespaced(server.client().await);
    let object = |value: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"value": value}});
    api.patch("a", &PatchParams::apply("one"), &Patch::Apply(object("1"))).await.unwrap();
    api.patch("a", &PatchParams::apply("two"), &Patch::Apply(object("1"))).await.expect("the same value is shared");
    let refused = api.patch("a", &PatchParams::apply("two"), &Patch::Apply(object("2"))).await.unwrap_err();
    assert_eq!(code(refused), (409, "Conflict".into()));
    let forced = api.patch("a", &PatchParams::apply("two").force(), &Patch::Apply(object("2"))).await.unwrap();
    assert_eq!(forced.data.unwrap()["value"], "2");
    let none = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}});
    let left = api.patch("a", &PatchParams::apply("two"), &Patch::Apply(none)).await.unwrap();
    assert_eq!(left.data.unwrap_or_default().get("value"), None, "nobody owns it any more");
}

#[tokio::test]
async fn status_and_spec_have_their_own_doors() {
    let server = Server::start();
    let api: Api<Deployment> = Api::default_namespaced(server.client().await);
    api.create(&PostParams::default(), &deployment("d")).await.unwrap();
    let both = json!({"spec": {"replicas": 4}, "status": {"replicas": 9}});
    let main = api.patch("d", &PatchParams::default(), &Patch::Merge(&both)).await.unwrap();
    assert_eq!((main.spec.unwrap().replicas, main.status), (Some(4), None));
    assert_eq!(main.metadata.generation, Some(2));
    let both = json!({"spec": {"replicas": 5}, "status": {"replicas": 9}});
    let status = api.patch_status("d", &PatchParams::default(), &Patch::Merge(&both)).await.unwrap();
    assert_eq!((status.spec.unwrap().replicas, status.status.unwrap().replicas), (Some(4), Some(9)));
    assert_eq!(status.metadata.generation, Some(2), "a status is no change of what is wanted");
    let scale = api.get_scale("d").await.unwrap();
    assert_eq!((scale.spec.unwrap().replicas, scale.status.unwrap().replicas), (Some(4), 9));
}

#[tokio::test]
async fn a_token_is_bound_to_its_pod() {
    let server = Server::start();
    let client = server.client().await;
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let accounts: Api<ServiceAccount> = Api::default_namespaced(client.clone());
    let made = pods.create(&PostParams::default(), &pod("p", Some("n1"))).await.unwrap();
    let request = |audiences: &[&str], name: &str, uid: Option<String>| -> TokenRequest {
        from(json!({"metadata": {}, "spec": {
            "audiences": audiences, "expirationSeconds": 600,
            "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid},
        }}))
    };
    let ask = |request: TokenRequest| {
        let accounts = accounts.clone();
        async move { accounts.create_token_request("default", &PostParams::default(), &request).await }
    };
    assert_eq!(code(ask(request(&["istio-ca"], "nobody", None)).await.unwrap_err()).0, 404);
    assert_eq!(code(ask(request(&["istio-ca"], "p", Some("other".into()))).await.unwrap_err()).0, 409);
    let issued = ask(request(&["istio-ca"], "p", made.uid())).await.unwrap().status.unwrap();

    let reviews: Api<TokenReview> = Api::all(client.clone());
    let review = |audience: &str, token: &str| {
        let (reviews, audience, token) = (reviews.clone(), audience.to_owned(), token.to_owned());
        async move {
            let review: TokenReview = from(json!({"metadata": {}, "spec": {"token": token, "audiences": [audience]}}));
            reviews.create(&PostParams::default(), &review).await.unwrap().status.unwrap()
        }
    };
    let status = review("istio-ca", &issued.token).await;
    assert_eq!(status.authenticated, Some(true));
    let user = status.user.unwrap();
    assert_eq!(user.username.as_deref(), Some("system:serviceaccount:default:default"));
    let extra = user.extra.unwrap();
    assert_eq!(extra["authentication.kubernetes.io/pod-name"], ["p"]);
    assert_eq!(extra["authentication.kubernetes.io/pod-uid"], [made.uid().unwrap()]);
    assert_eq!(extra["authentication.kubernetes.io/node-name"], ["n1"]);
    assert_ne!(review("something-else", &issued.token).await.authenticated, Some(true));
    assert_ne!(review("istio-ca", "garbage").await.authenticated, Some(true));

    // For another audience it opens nothing here; one for this server does, as that account.
    let stranger: Api<Pod> = Api::default_namespaced(server.client_as(&issued.token).await);
    assert_eq!(code(stranger.list(&ListParams::default()).await.unwrap_err()), (401, "Unauthorized".into()));
    let own = ask(request(&[], "p", made.uid())).await.unwrap().status.unwrap().token;
    let account: Api<Pod> = Api::default_namespaced(server.client_as(&own).await);
    assert_eq!(code(account.list(&ListParams::default()).await.unwrap_err()), (403, "Forbidden".into()));

    pods.delete("p", &DeleteParams::default().grace_period(0)).await.unwrap();
    assert_ne!(review("istio-ca", &issued.token).await.authenticated, Some(true), "its pod is gone");
    assert_eq!(code(account.list(&ListParams::default()).await.unwrap_err()).0, 401);
}

#[tokio::test]
async fn without_a_token_only_health_and_version_answer() {
    let server = Server::start();
    let client = server.client_as("wrong").await;
    let nodes: Api<Pod> = Api::all(client.clone());
    assert_eq!(code(nodes.list(&ListParams::default()).await.unwrap_err()), (401, "Unauthorized".into()));
    let get = |path: &str| http::Request::get(path).body(Vec::new()).unwrap();
    assert_eq!(client.request_text(get("/readyz")).await.unwrap(), "ok");
    assert_eq!(code(client.request_text(get("/apis")).await.unwrap_err()).0, 401);
}

#[tokio::test]
async fn a_pod_on_a_node_waits_for_its_kubelet() {
    let server = Server::start();
    let api: Api<Pod> = Api::default_namespaced(server.client().await);
    api.create(&PostParams::default(), &pod("waiting", None)).await.unwrap();
    api.create(&PostParams::default(), &pod("running", Some("n1"))).await.unwrap();
    api.delete("waiting", &DeleteParams::default()).await.unwrap();
    assert!(api.get_opt("waiting").await.unwrap().is_none());
    api.delete("running", &DeleteParams::default()).await.unwrap();
    let dying = api.get("running").await.unwrap();
    assert!(dying.metadata.deletion_timestamp.is_some());
    assert_eq!(dying.metadata.deletion_grace_period_seconds, Some(30));
    api.delete("running", &DeleteParams::default().grace_period(0)).await.unwrap();
    assert!(api.get_opt("running").await.unwrap().is_none());
}

#[tokio::test]
async fn dependents_are_collected_as_the_policy_says() {
    let server = Server::start();
    let client = server.client().await;
    let owners: Api<Deployment> = Api::default_namespaced(client.clone());
    let dependents: Api<ConfigMap> = Api::default_namespaced(client.clone());
    for policy in [PropagationPolicy::Background, PropagationPolicy::Foreground, PropagationPolicy::Orphan] {
        let owner = owners.create(&PostParams::default(), &deployment("owner")).await.unwrap();
        let mut dependent = config_map("dependent", "x");
        let mut reference = owner.controller_owner_ref(&()).unwrap();
        reference.block_owner_deletion = Some(true);
        dependent.metadata.owner_references = Some(vec![reference]);
        dependent.metadata.finalizers = Some(vec!["test.example.org/hold".into()]);
        dependents.create(&PostParams::default(), &dependent).await.unwrap();
        let params = DeleteParams { propagation_policy: Some(policy.clone()), ..DeleteParams::default() };
        owners.delete("owner", &params).await.unwrap();
        let orphan = matches!(policy, PropagationPolicy::Orphan);
        let settled = eventually_async("the collector has acted", async || {
            let dependent = dependents.get("dependent").await.unwrap();
            let disowned = dependent.owner_references().is_empty();
            (disowned || dependent.metadata.deletion_timestamp.is_some()).then_some(disowned)
        })
        .await;
        assert_eq!(settled, orphan, "{policy:?}");
        if matches!(policy, PropagationPolicy::Foreground) {
            assert!(owners.get_opt("owner").await.unwrap().is_some(), "it waits for what holds it");
        }
        let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        dependents.patch("dependent", &PatchParams::default(), &release).await.unwrap();
        if orphan {
            dependents.delete("dependent", &DeleteParams::default()).await.unwrap();
        }
        eventually_async("both are gone", async || {
            let left = (owners.get_opt("owner").await.unwrap(), dependents.get_opt("dependent").await.unwrap());
            matches!(left, (None, None)).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_terminating_namespace_takes_nothing_new() {
    let server = Server::start();
    let client = server.client().await;
    namespace(&client, "going").await;
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), "going");
    let mut held = config_map("held", "x");
    held.metadata.finalizers = Some(vec!["test.example.org/hold".into()]);
    api.create(&PostParams::default(), &held).await.unwrap();
    let namespaces: Api<Namespace> = Api::all(client);
    namespaces.delete("going", &DeleteParams::default()).await.unwrap();
    let refused = api.create(&PostParams::default(), &config_map("new", "x")).await.unwrap_err();
    assert_eq!(code(refused), (403, "Forbidden".into()));
    assert_eq!(namespaces.get("going").await.unwrap().status.unwrap().phase.as_deref(), Some("Terminating"));
    eventually_async("all but the held one are gone", async || {
        let left = api.list(&ListParams::default()).await.unwrap().items;
        (left.len() == 1).then_some(())
    })
    .await;
    api.patch("held", &PatchParams::default(), &Patch::Merge(json!({"metadata": {"finalizers": []}}))).await.unwrap();
    eventually_async("the namespace is gone", async || {
        namespaces.get_opt("going").await.unwrap().is_none().then_some(())
    })
    .await;
}

#[tokio::test]
async fn sockets_that_are_handed_over_are_all_served() {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let sockets = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let mut script = String::new();
    for (index, socket) in sockets.iter().enumerate() {
        fcntl(socket, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        script += &format!("exec {}<&{}; ", index + 3, socket.as_raw_fd());
    }
    let mut command = Command::new("bash");
    // The numbers may overlap with 3 and 4 only if they are those already.
    let first = sockets[0].as_raw_fd();
    assert!(first > 4, "the runtime's own descriptors come first");
    command
        .args(["-c", &format!("{script} exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_istiod-lite")])
        .env("LISTEN_FDS", "2")
        .env_remove("LISTEN_PID");
    let server = Server::start_by(command);
    for socket in &sockets {
        let mut config = server.config().await;
        config.cluster_url = format!("https://{}", socket.local_addr().unwrap()).parse().unwrap();
        let client = Client::try_from(config).unwrap();
        assert_eq!(client.apiserver_version().await.unwrap().major, "1");
    }
}

#[tokio::test]
async fn a_full_disk_refuses_writes_keeps_reads_and_heals() {
    if Command::new("prlimit").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: no prlimit to play a full disk with");
    }
    let mut command = Command::new("bash");
    // With the signal ignored, a write beyond the limit is an error, as on a disk that is full.
    command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_istiod-lite")]);
    let server = Server::start_by(command);
    let api: Api<ConfigMap> = Api::default_namespaced(server.client().await);
    api.create(&PostParams::default(), &config_map("before", "x")).await.unwrap();
    let size = std::fs::metadata(server.dir().join("data/objects.redb")).unwrap().len();
    server.limit_file_size(&size.to_string());
    let mut stored = 0;
    let refused = loop {
        match api.create(&PostParams::default(), &config_map(&format!("big-{stored}"), &"x".repeat(500_000))).await {
            Ok(_) => stored += 1,
            Err(error) => break code(error),
        }
        assert!(stored < 100, "50 MB do not fit into {size} bytes");
    };
    assert_eq!(refused, (500, "InternalError".into()));
    assert_eq!(api.get("before").await.unwrap().name_any(), "before");
    assert!(api.get_opt(&format!("big-{stored}")).await.unwrap().is_none(), "what was refused is not there");
    server.limit_file_size("unlimited");
    api.create(&PostParams::default(), &config_map("after", "x")).await.expect("there is room again");
}
