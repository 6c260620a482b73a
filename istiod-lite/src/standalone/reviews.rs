//! Questions to the API server about tokens and permissions: the kinds one can only POST.

use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::rbac::{self, Attributes};
use super::registry::{PODS, SERVICE_ACCOUNTS};
use super::store::{Key, Store};
use super::tokens::{API_AUDIENCES, Bound, Tokens, User};

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

pub fn api_audiences() -> Vec<String> {
    API_AUDIENCES.iter().map(|a| (*a).to_owned()).collect()
}

/// Answers a review posted by `user`.
///
/// # Errors
/// 400 or 422 when the question is incomplete.
pub fn answer(
    store: &Store,
    tokens: &Tokens,
    kind: &str,
    user: &User,
    namespace: &str,
    mut review: Value,
) -> ApiResult<Value> {
    let status = match kind {
        "TokenReview" => token(store, tokens, &review["spec"])?,
        "SubjectAccessReview" | "LocalSubjectAccessReview" => {
            let spec = &review["spec"];
            if kind == "LocalSubjectAccessReview" && spec["resourceAttributes"]["namespace"] != namespace {
                return Err(ApiError::bad_request(
                    "spec.resourceAttributes.namespace must match the namespace of the request",
                ));
            }
            let asked_for = User {
                name: text(&spec["user"]),
                uid: text(&spec["uid"]),
                groups: texts(&spec["groups"]),
                extra: serde_json::from_value(spec["extra"].clone()).unwrap_or_default(),
            };
            if asked_for.name.is_empty() && asked_for.groups.is_empty() {
                return Err(ApiError::bad_request("at least one of spec.user or spec.groups must be specified"));
            }
            access(store, &asked_for, spec)?
        }
        "SelfSubjectAccessReview" => access(store, user, &review["spec"])?,
        "SelfSubjectRulesReview" => rules(store, user, &text(&review["spec"]["namespace"])),
        "SelfSubjectReview" => json!({"userInfo": user.to_json()}),
        other => return Err(ApiError::internal(format!("no answer for {other}"))),
    };
    review["status"] = status;
    Ok(review)
}

fn token(store: &Store, tokens: &Tokens, spec: &Value) -> ApiResult<Value> {
    let wanted = match texts(&spec["audiences"]) {
        none if none.is_empty() => api_audiences(),
        wanted => wanted,
    };
    let token = spec["token"].as_str().filter(|t| !t.is_empty());
    let token = token.ok_or_else(|| ApiError::bad_request("token is required for TokenReview in authentication"))?;
    Ok(match tokens.authenticate(store, token, &wanted) {
        Some((user, audiences)) => json!({"authenticated": true, "user": user.to_json(), "audiences": audiences}),
        None => json!({
            "authenticated": false, "user": {},
            "error": "the token is malformed, expired, for another audience, or what it is bound to is gone",
        }),
    })
}

fn access(store: &Store, user: &User, spec: &Value) -> ApiResult<Value> {
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let asked = match (resource.is_object(), path.is_object()) {
        (true, false) => Attributes {
            verb: text(&resource["verb"]),
            resource: text(&resource["resource"]),
            subresource: text(&resource["subresource"]),
            group: text(&resource["group"]),
            namespace: text(&resource["namespace"]),
            name: text(&resource["name"]),
            path: String::new(),
        },
        (false, true) => Attributes { verb: text(&path["verb"]), path: text(&path["path"]), ..Attributes::default() },
        _ => {
            return Err(ApiError::bad_request(
                "exactly one of resourceAttributes and nonResourceAttributes must be specified",
            ));
        }
    };
    let allowed = rbac::is_allowed(store, user, &asked);
    let reason = if allowed { "RBAC: allowed" } else { "RBAC: no rule allows it" };
    Ok(json!({"allowed": allowed, "reason": reason}))
}

fn rules(store: &Store, user: &User, namespace: &str) -> Value {
    let mut all = rbac::rules_for(store, user, namespace);
    if user.is_admin() {
        all.push(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
    }
    let (urls, resources): (Vec<Value>, Vec<Value>) = all.into_iter().partition(|r| r.get("nonResourceURLs").is_some());
    json!({"resourceRules": resources, "nonResourceRules": urls, "incomplete": false})
}

/// Answers `serviceaccounts/<name>/token`: a token of that account, bound to a pod or secret if asked.
///
/// # Errors
/// 404 when the account or the object does not exist, 409 when its UID is another, 422 on a lifetime out of bounds.
pub fn token_request(
    store: &Store,
    tokens: &Tokens,
    namespace: &str,
    name: &str,
    mut request: Value,
) -> ApiResult<Value> {
    let account = store
        .get(&Key::new(SERVICE_ACCOUNTS, namespace, name))
        .ok_or_else(|| ApiError::not_found("", "serviceaccounts", name))?;
    let spec = &request["spec"];
    let lifetime = spec["expirationSeconds"].as_i64().unwrap_or(3600);
    if !(600..=1 << 32).contains(&lifetime) {
        let cause = super::error::Cause::invalid(
            "spec.expirationSeconds",
            &lifetime.into(),
            "may not specify a duration less than 10 minutes or larger than 2^32 seconds",
        );
        return Err(ApiError::invalid("authentication.k8s.io", "TokenRequest", name, &[cause]));
    }
    let audiences = match texts(&spec["audiences"]) {
        none if none.is_empty() => api_audiences(),
        wanted => wanted,
    };
    let bound = bound_object(store, namespace, name, &spec["boundObjectRef"])?;
    let uid = text(&account.value["metadata"]["uid"]);
    let (token, expires) = tokens
        .sign(namespace, (name, &uid), &audiences, bound.as_ref(), lifetime)
        .map_err(|e| ApiError::internal(format!("signing the token: {e}")))?;
    let expires = time::OffsetDateTime::from_unix_timestamp(expires).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    request["apiVersion"] = "authentication.k8s.io/v1".into();
    request["kind"] = "TokenRequest".into();
    request["metadata"] = json!({"name": name, "namespace": namespace});
    request["spec"]["audiences"] = json!(audiences);
    request["spec"]["expirationSeconds"] = lifetime.into();
    request["status"] = json!({"token": token, "expirationTimestamp": super::verbs::format_time(expires)});
    Ok(request)
}

fn bound_object(store: &Store, namespace: &str, account: &str, reference: &Value) -> ApiResult<Option<Bound>> {
    if !reference.is_object() {
        return Ok(None);
    }
    let (kind, name) = (text(&reference["kind"]), text(&reference["name"]));
    let resource = match kind.as_str() {
        "Pod" => PODS,
        "Secret" => "/secrets",
        _ => return Err(ApiError::bad_request(format!("cannot bind token to object of type {kind:?}"))),
    };
    let plural = resource.trim_start_matches('/');
    let object =
        store.get(&Key::new(resource, namespace, &name)).ok_or_else(|| ApiError::not_found("", plural, &name))?;
    let uid = text(&object.value["metadata"]["uid"]);
    let wanted = text(&reference["uid"]);
    if !wanted.is_empty() && wanted != uid {
        let why = format!("the UID in the bound object reference ({wanted}) does not match the UID in record ({uid})");
        return Err(ApiError::conflict("", plural, &name, &why));
    }
    if kind == "Pod" && object.value["spec"]["serviceAccountName"] != account {
        return Err(ApiError::bad_request(format!(
            "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
        )));
    }
    let node = text(&object.value["spec"]["nodeName"]);
    Ok(Some(Bound { kind, name, uid, node }))
}
