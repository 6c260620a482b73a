//! Who is calling: a bearer token becomes a [`Caller`] by asking the Kubernetes API (TokenReview), and a caller becomes
//! a [`Client`] by looking up the pod its token is bound to. Nothing a caller says about itself counts.
//!
//! Where there is no token, the connection's certificate says who calls ([`certificate`]): a service account without a
//! pod. A token that is not accepted is not made good by a certificate.
//!
//! Fails closed: a token the API does not vouch for is `Unauthenticated`; an API that does not answer is
//! `Unavailable`, so that the client comes back.

pub mod certificate;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use futures_util::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::{Api, PostParams};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Status};

use self::certificate::{Certificates, Chain};
use crate::resources::{PodDirectory, PodInfo, lock};

/// A verdict is believed this long; a deleted pod's token may pass for as long here (the pod directory is asked too).
const CACHE_FOR: Duration = Duration::from_secs(60);
/// Verdicts kept; when full, expired ones go, then all: the API is asked again, nothing worse.
const CACHE_SIZE: usize = 20_000;
/// Longer than any service account token; what is longer is refused unread.
pub(crate) const MAX_TOKEN: usize = 16 * 1024;
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// TokenReviews in flight. Strangers with made-up tokens must not drown the API server; callers beyond this wait.
const MAX_REVIEWS: usize = 32;

/// Where a request has its token.
const AUTHORIZATION: &str = "authorization";
const USERNAME_PREFIX: &str = "system:serviceaccount:";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// Who calls, as a token or a certificate proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    /// The pod the token is bound to, if any.
    pub pod: Option<BoundPod>,
    /// When what it has shown ends, if that says so.
    pub expires: Option<SystemTime>,
    pub proof: Proof,
}

/// What a caller has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    Token,
    /// Less than a token: never a pod, and with that no node and no waypoint.
    Certificate(Chain),
}

impl Proof {
    /// For log lines and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Certificate(_) => "certificate",
        }
    }
}

/// The pod in a bound token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundPod {
    pub name: Arc<str>,
    pub uid: Arc<str>,
}

/// Why a token or a certificate was not accepted.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum AuthError {
    #[error("no bearer token in the authorization metadata")]
    NoToken,
    #[error("the token is not accepted: {0}")]
    Rejected(String),
    #[error("the token could not be reviewed: {0}")]
    ReviewFailed(String),
    #[error("no token, and the client certificate is not accepted: {0}")]
    Certificate(String),
}

impl AuthError {
    /// What the caller is told. Reasons stay in our log: they help whoever tries tokens out.
    pub fn status(&self) -> Status {
        match self {
            Self::NoToken | Self::Rejected(_) | Self::Certificate(_) => {
                Status::unauthenticated("authentication failure")
            }
            Self::ReviewFailed(_) => Status::unavailable("tokens cannot be reviewed now"),
        }
    }
}

/// Turns tokens into callers.
pub trait Authenticate: Send + Sync {
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthError>>;
}

/// The token of a request.
///
/// # Errors
/// [`AuthError::NoToken`] if the metadata carries none.
pub fn bearer(metadata: &MetadataMap) -> Result<&str, AuthError> {
    let value = metadata.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).ok_or(AuthError::NoToken)?;
    let (scheme, token) = value.split_once(' ').ok_or(AuthError::NoToken)?;
    match token.trim() {
        token if scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() => Ok(token),
        _ => Err(AuthError::NoToken),
    }
}

/// [`Authenticate`] by TokenReview, remembering verdicts for a minute and never past the end of the token.
pub struct TokenReviewer {
    client: kube::Client,
    audiences: Vec<String>,
    /// By SHA-256 of the token: the cache holds nothing one could log in with.
    cache: Mutex<HashMap<[u8; 32], (Instant, Caller)>>,
    reviews: Semaphore,
}

impl TokenReviewer {
    /// Reviews tokens with `client`; a token must be meant for one of `audiences`.
    pub fn new(client: kube::Client, audiences: Vec<String>) -> Self {
        Self { client, audiences, cache: Mutex::default(), reviews: Semaphore::new(MAX_REVIEWS) }
    }

    fn cached(&self, key: &[u8; 32]) -> Option<Caller> {
        let (until, caller) = lock(&self.cache).get(key).cloned()?;
        let alive = caller.expires.is_none_or(|end| SystemTime::now() < end);
        (Instant::now() < until && alive).then_some(caller)
    }

    fn remember(&self, key: [u8; 32], caller: &Caller) {
        let now = Instant::now();
        let mut cache = lock(&self.cache);
        if cache.len() >= CACHE_SIZE {
            cache.retain(|_, (until, _)| now < *until);
        }
        if cache.len() >= CACHE_SIZE {
            cache.clear();
        }
        cache.insert(key, (now + CACHE_FOR, caller.clone()));
    }

    async fn review(&self, token: &str) -> Result<Caller, AuthError> {
        let _slot = self.reviews.acquire().await.map_err(|error| AuthError::ReviewFailed(error.to_string()))?;
        let review = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(self.audiences.clone()) },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let reviewed = tokio::time::timeout(REVIEW_TIMEOUT, api.create(&PostParams::default(), &review))
            .await
            .map_err(|_| AuthError::ReviewFailed(format!("no answer in {} s", REVIEW_TIMEOUT.as_secs())))?
            .map_err(|error| AuthError::ReviewFailed(error.to_string()))?;
        let status = reviewed.status.ok_or_else(|| AuthError::ReviewFailed("the review has no status".into()))?;
        let mut caller = caller(&status, &self.audiences)?;
        caller.expires = expiry(token);
        Ok(caller)
    }
}

impl Authenticate for TokenReviewer {
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthError>> {
        Box::pin(async move {
            if token.len() > MAX_TOKEN {
                return Err(AuthError::Rejected(format!("longer than {MAX_TOKEN} bytes")));
            }
            let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
            if let Some(caller) = self.cached(&key) {
                return Ok(caller);
            }
            let caller = self.review(token).await?;
            self.remember(key, &caller);
            Ok(caller)
        })
    }
}

/// Reads a TokenReview's verdict.
fn caller(status: &TokenReviewStatus, audiences: &[String]) -> Result<Caller, AuthError> {
    let rejected = |reason: &str| Err(AuthError::Rejected(reason.to_owned()));
    if !status.authenticated.unwrap_or(false) {
        return rejected(status.error.as_deref().unwrap_or("not authenticated"));
    }
    // An API server that knows nothing of audiences returns none; its verdict does not say the token is for us.
    let granted = status.audiences.as_deref().unwrap_or_default();
    if !granted.iter().any(|audience| audiences.contains(audience)) {
        return rejected("meant for another audience");
    }
    let Some(user) = &status.user else { return rejected("no user in the review") };
    let name = user.username.as_deref().unwrap_or_default();
    let Some((namespace, service_account)) = name.strip_prefix(USERNAME_PREFIX).and_then(|rest| rest.split_once(':'))
    else {
        return rejected("not a service account");
    };
    if namespace.is_empty() || service_account.is_empty() || service_account.contains(':') {
        return rejected("not a service account");
    }
    let extra = |key: &str| -> Option<Arc<str>> {
        let value = user.extra.as_ref()?.get(key)?.first()?;
        (!value.is_empty()).then(|| value.as_str().into())
    };
    let pod = match (extra(POD_NAME), extra(POD_UID)) {
        (Some(name), Some(uid)) => Some(BoundPod { name, uid }),
        (None, None) => None,
        _ => return rejected("half a pod binding"),
    };
    let (namespace, service_account) = (namespace.into(), service_account.into());
    Ok(Caller { namespace, service_account, pod, expires: None, proof: Proof::Token })
}

/// The `exp` of a JWT that the API server has vouched for. Only ever shortens trust, so reading it unverified is safe.
fn expiry(token: &str) -> Option<SystemTime> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: Option<f64>,
    }
    let payload = token.split('.').nth(1)?;
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?;
    let seconds = serde_json::from_slice::<Claims>(&payload).ok()?.exp?;
    UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)
}

/// Service accounts trusted to act for all pods of their node, `<namespace>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedNodeAccounts(Vec<(String, String)>);

impl Default for TrustedNodeAccounts {
    fn default() -> Self {
        Self(vec![("istio-system".into(), "ztunnel".into())])
    }
}

/// An entry of `CA_TRUSTED_NODE_ACCOUNTS` that is not `<namespace>/<service account>`.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not <namespace>/<service account>")]
pub struct BadAccount(String);

impl std::str::FromStr for TrustedNodeAccounts {
    type Err = BadAccount;

    /// Comma-separated; empty trusts nobody.
    fn from_str(text: &str) -> Result<Self, BadAccount> {
        text.split(',')
            .map(str::trim)
            .filter(|entry| !entry.is_empty())
            .map(|entry| match entry.split_once('/') {
                Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                    Ok((namespace.to_owned(), name.to_owned()))
                }
                _ => Err(BadAccount(entry.to_owned())),
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

impl TrustedNodeAccounts {
    fn contains(&self, caller: &Caller) -> bool {
        self.0.iter().any(|(namespace, name)| **namespace == *caller.namespace && **name == *caller.service_account)
    }
}

/// An authenticated caller with what the control plane itself knows about its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Client {
    pub caller: Caller,
    /// The node this caller acts for: set only if its service account is a trusted node account and its pod runs there.
    pub node: Option<Arc<str>>,
    /// The Gateway whose waypoint the caller's pod belongs to: namespace, name.
    pub waypoint: Option<(Arc<str>, Arc<str>)>,
}

/// Decides who is calling.
#[derive(Clone)]
pub struct Gatekeeper {
    pub authenticator: Arc<dyn Authenticate>,
    pub certificates: Certificates,
    pub pods: Arc<dyn PodDirectory>,
    pub trusted: TrustedNodeAccounts,
}

impl Gatekeeper {
    /// The caller of a request: by its token, or by its connection's certificate where it says nothing of a token.
    ///
    /// # Errors
    /// `Unauthenticated`: a rejected token, one whose pod is gone, or neither a token nor a good certificate.
    /// `Unavailable`: we cannot tell yet.
    pub async fn admit(&self, metadata: &MetadataMap, extensions: &Extensions) -> Result<Client, Status> {
        let verdict = match bearer(metadata) {
            Ok(token) => self.authenticator.authenticate(token).await,
            Err(error) if metadata.contains_key(AUTHORIZATION) => Err(error),
            Err(error) => certificate::shown(extensions).map_or(Err(error), |chain| self.certificates.caller(chain)),
        };
        let admitted = match verdict {
            Ok(caller) => self.identify(caller),
            Err(error) => {
                tracing::warn!(%error, "caller refused");
                Err(error.status())
            }
        };
        if admitted.is_err() {
            metrics::counter!("citadel_server_authentication_failure_count").increment(1);
        }
        admitted
    }

    /// Whether the certificate of a caller that has shown one is still good: roots go, and lists of the revoked come.
    ///
    /// # Errors
    /// `Unauthenticated`.
    pub fn check_certificate(&self, caller: &Caller) -> Result<(), Status> {
        let Proof::Certificate(chain) = &caller.proof else { return Ok(()) };
        self.certificates.check(chain).map(drop).map_err(|error| {
            let Caller { namespace, service_account, .. } = caller;
            tracing::warn!(%namespace, %service_account, %error, "caller refused");
            error.status()
        })
    }

    /// What is known of an authenticated caller now. Asked again while a stream lives: pods go, and change.
    ///
    /// # Errors
    /// As [`Gatekeeper::admit`].
    pub fn identify(&self, caller: Caller) -> Result<Client, Status> {
        if !self.pods.synced() {
            return Err(Status::unavailable("the control plane has not read the cluster yet"));
        }
        let Some(bound) = &caller.pod else { return Ok(Client { caller, node: None, waypoint: None }) };
        let pod = self.pods.pod(&caller.namespace, &bound.name).filter(|pod| is_bound(&caller, bound, pod));
        let Some(pod) = pod else {
            tracing::warn!(namespace = %caller.namespace, pod = %bound.name, uid = %bound.uid, "the pod of a token is gone");
            return Err(Status::unauthenticated("authentication failure"));
        };
        let node = (self.trusted.contains(&caller) && !pod.node.is_empty()).then_some(pod.node);
        let waypoint = (!pod.gateway.is_empty()).then(|| (Arc::clone(&caller.namespace), pod.gateway));
        Ok(Client { caller, node, waypoint })
    }
}

/// A pod of the same name that came later, or runs as somebody else, is not the one the token was made for.
fn is_bound(caller: &Caller, bound: &BoundPod, pod: &PodInfo) -> bool {
    pod.uid == bound.uid
        && pod.service_account == caller.service_account
        && !matches!(&*pod.phase, "Failed" | "Succeeded")
}

#[cfg(test)]
mod tests;
