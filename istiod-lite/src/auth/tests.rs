use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use k8s_openapi::api::authentication::v1::UserInfo;

use super::*;
use crate::testing::{FakeApi, Pods};

fn user(name: &str, extra: &[(&str, &str)]) -> TokenReviewStatus {
    let extra: BTreeMap<String, Vec<String>> =
        extra.iter().map(|(key, value)| (key.to_string(), vec![value.to_string()])).collect();
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(vec!["istio-ca".into()]),
        user: Some(UserInfo { username: Some(name.into()), extra: Some(extra), ..UserInfo::default() }),
        error: None,
    }
}

fn read(status: &TokenReviewStatus) -> Result<Caller, AuthError> {
    caller(status, &["istio-ca".to_owned()])
}

const BOUND: [(&str, &str); 2] = [(POD_NAME, "ztunnel-x"), (POD_UID, "u-1")];

#[test]
fn a_bound_service_account_token_names_its_pod() {
    let caller = read(&user("system:serviceaccount:istio-system:ztunnel", &BOUND)).unwrap();
    assert_eq!((&*caller.namespace, &*caller.service_account), ("istio-system", "ztunnel"));
    assert_eq!(caller.pod, Some(BoundPod { name: "ztunnel-x".into(), uid: "u-1".into() }));
}

#[test]
fn anything_else_is_rejected() {
    let good = user("system:serviceaccount:a:b", &BOUND);
    for bad in [
        TokenReviewStatus { authenticated: Some(false), ..good.clone() },
        TokenReviewStatus { authenticated: None, ..good.clone() },
        TokenReviewStatus { audiences: None, ..good.clone() },
        TokenReviewStatus { audiences: Some(vec!["https://kubernetes.default.svc".into()]), ..good.clone() },
        TokenReviewStatus { user: None, ..good.clone() },
        user("kubernetes-admin", &[]),
        user("system:serviceaccount:a", &BOUND),
        user("system:serviceaccount::b", &BOUND),
        user("system:serviceaccount:a:b:c", &BOUND),
        user("system:serviceaccount:a:b", &[(POD_NAME, "p")]),
        user("system:serviceaccount:a:b", &[(POD_UID, "u")]),
    ] {
        assert!(matches!(read(&bad), Err(AuthError::Rejected(_))), "{bad:?}");
    }
}

#[test]
fn the_bearer_token_is_found_or_missed() {
    let with = |value: &str| {
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", value.parse().unwrap());
        bearer(&metadata).map(str::to_owned)
    };
    assert_eq!(with("Bearer abc").unwrap(), "abc");
    assert_eq!(with("bearer abc").unwrap(), "abc");
    for bad in ["abc", "Basic abc", "Bearer ", ""] {
        assert_eq!(with(bad), Err(AuthError::NoToken), "{bad:?}");
    }
    assert_eq!(bearer(&MetadataMap::new()), Err(AuthError::NoToken));
}

fn jwt(exp: u64) -> String {
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(format!("{{\"exp\":{exp}}}"));
    format!("h.{payload}.s")
}

fn in_seconds(seconds: u64) -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + seconds
}

/// A reviewer whose API answers `status`, and how often it was asked.
fn reviewer(status: TokenReviewStatus) -> (TokenReviewer, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let client = FakeApi::answering({
        let asked = Arc::clone(&asked);
        move |_, path, body| {
            assert_eq!(path, "/apis/authentication.k8s.io/v1/tokenreviews");
            asked.fetch_add(1, Ordering::SeqCst);
            let mut review: TokenReview = serde_json::from_slice(body).unwrap();
            assert_eq!(review.spec.audiences, Some(vec!["istio-ca".to_owned()]));
            review.status = Some(status.clone());
            (201, serde_json::to_value(review).unwrap())
        }
    });
    (TokenReviewer::new(client, vec!["istio-ca".into()]), asked)
}

#[tokio::test(start_paused = true)]
async fn a_verdict_is_kept_for_a_minute_and_no_longer() {
    let (reviewer, asked) = reviewer(user("system:serviceaccount:a:b", &BOUND));
    let token = jwt(in_seconds(3600));
    for _ in 0..3 {
        reviewer.authenticate(&token).await.unwrap();
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    reviewer.authenticate("another").await.unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    tokio::time::advance(CACHE_FOR).await;
    reviewer.authenticate(&token).await.unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_verdict_does_not_outlive_the_token() {
    let (reviewer, asked) = reviewer(user("system:serviceaccount:a:b", &BOUND));
    let token = jwt(in_seconds(0));
    for _ in 0..2 {
        reviewer.authenticate(&token).await.unwrap();
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2, "only the API may accept a token that looks expired");
}

#[tokio::test]
async fn a_rejection_is_not_kept_and_an_api_error_is_no_rejection() {
    let rejected = TokenReviewStatus { authenticated: Some(false), ..TokenReviewStatus::default() };
    let (reviewer, asked) = reviewer(rejected);
    for _ in 0..2 {
        let error = reviewer.authenticate("t").await.unwrap_err();
        assert_eq!(error.status().code(), tonic::Code::Unauthenticated);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2);

    let broken = FakeApi::answering(|_, _, _| (500, serde_json::json!({"kind": "Status", "code": 500})));
    let reviewer = TokenReviewer::new(broken, vec!["istio-ca".into()]);
    let error = reviewer.authenticate("t").await.unwrap_err();
    assert_eq!(error.status().code(), tonic::Code::Unavailable);
    let long = "x".repeat(MAX_TOKEN + 1);
    assert!(matches!(reviewer.authenticate(&long).await, Err(AuthError::Rejected(_))));
}

#[test]
fn trusted_accounts_are_parsed_or_refused() {
    let trusted: TrustedNodeAccounts = "istio-system/ztunnel, other/proxy".parse().unwrap();
    assert_eq!(trusted.0.len(), 2);
    assert_eq!("".parse::<TrustedNodeAccounts>().unwrap().0.len(), 0);
    for bad in ["ztunnel", "/x", "x/", "a/b/c"] {
        assert!(bad.parse::<TrustedNodeAccounts>().is_err(), "{bad}");
    }
}

fn gatekeeper(pods: Pods) -> Gatekeeper {
    struct Nobody;
    impl Authenticate for Nobody {
        fn authenticate<'a>(&'a self, _token: &'a str) -> BoxFuture<'a, Result<Caller, AuthError>> {
            Box::pin(async { Err(AuthError::NoToken) })
        }
    }
    Gatekeeper {
        authenticator: Arc::new(Nobody),
        certificates: Certificates::new(rustls::server::WebPkiClientVerifier::no_client_auth(), "cluster.local".into()),
        pods: Arc::new(pods),
        trusted: TrustedNodeAccounts::default(),
    }
}

fn bound(namespace: &str, account: &str, pod: &str, uid: &str) -> Caller {
    Caller {
        namespace: namespace.into(),
        service_account: account.into(),
        pod: Some(BoundPod { name: pod.into(), uid: uid.into() }),
        expires: None,
        proof: Proof::Token,
    }
}

#[test]
fn only_a_node_proxy_acts_for_a_node_and_only_its_own() {
    let gate = gatekeeper(
        Pods::new()
            .pod("istio-system", "zt-a", "ztunnel", "node-a")
            .pod("shop", "cart", "cart", "node-a")
            .pod("shop", "zt", "ztunnel", "node-a")
            .waypoint("shop", "wp", "node-b"),
    );
    let node = |caller| gate.identify(caller).unwrap().node;
    assert_eq!(node(bound("istio-system", "ztunnel", "zt-a", "istio-system/zt-a")).as_deref(), Some("node-a"));
    assert_eq!(node(bound("shop", "cart", "cart", "shop/cart")), None);
    assert_eq!(node(bound("shop", "ztunnel", "zt", "shop/zt")), None, "the namespace counts");
    let waypoint = gate.identify(bound("shop", "wp", "wp-1", "shop/wp-1")).unwrap().waypoint.unwrap();
    assert_eq!((&*waypoint.0, &*waypoint.1), ("shop", "wp"));
}

#[test]
fn a_token_dies_with_its_pod() {
    let gate = gatekeeper(Pods::new().pod("shop", "cart", "cart", "node-a"));
    for gone in [
        bound("shop", "cart", "cart", "an-earlier-uid"),
        bound("shop", "cart", "cart-2", "shop/cart-2"),
        bound("shop", "other", "cart", "shop/cart"),
    ] {
        assert_eq!(gate.identify(gone).unwrap_err().code(), tonic::Code::Unauthenticated);
    }
    let unsynced = gatekeeper(Pods::default());
    let status = unsynced.identify(bound("shop", "cart", "cart", "shop/cart")).unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
}
