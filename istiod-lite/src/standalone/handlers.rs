//! The verbs of the API on resources: what each reads from a call, and the answer it gives.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use http::{Method, StatusCode};
use rand::Rng as _;
use serde_json::{Value, json};

use super::api::{Answer, Api, Call};
use super::error::{ApiError, ApiResult};
use super::rbac::{self, Attributes};
use super::registry::{Kind, ScalePaths};
use super::request::{Form, Query, Target};
use super::selector::Selector;
use super::store::{Mode, Object, Store, Transaction};
use super::table::{self, Include};
use super::tokens::User;
use super::verbs::{DeleteOptions, UnknownFields, Write};
use super::watch::{Start, Watch};
use super::{patch, reviews};

impl Api {
    pub(super) fn get(&self, kind: &Kind, call: &Call) -> ApiResult<Answer> {
        let object = self.object(kind, call)?;
        let value = shown(kind, &object);
        let value = match call.form {
            Form::Object => value,
            Form::Partial => table::partial(&value),
            Form::Table => {
                let metadata = json!({"resourceVersion": object.version.to_string()});
                table::table(kind, &[value], metadata, include(&call.query)?)
            }
        };
        Ok(Answer::Json(StatusCode::OK, value))
    }

    fn object(&self, kind: &Kind, call: &Call) -> ApiResult<Arc<Object>> {
        let Target { namespace, name, .. } = &call.target;
        let found = self.store.get(&super::store::Key::new(&kind.storage, namespace, name));
        found.ok_or_else(|| ApiError::not_found(&kind.group, &kind.plural, name))
    }

    pub(super) fn list(&self, kind: &Kind, call: &Call, selector: &Selector) -> ApiResult<Answer> {
        let (current, objects) = self.store.list(&kind.storage, &call.target.namespace);
        let asked = call.query.number("resourceVersion")?;
        let exact = call.query.get("resourceVersionMatch") == Some("Exact");
        if let Some(asked) = asked {
            if asked > current {
                return Err(ApiError::too_large_version(asked, current));
            }
            let unchanged = self.store.events_since(&kind.storage, asked).is_some_and(|events| events.is_empty());
            if exact && !unchanged {
                return Err(ApiError::expired(
                    "The provided resource version is too old; only the current state is kept",
                ));
            }
        } else if exact {
            return Err(ApiError::bad_request("resourceVersionMatch is forbidden unless resourceVersion is provided"));
        }
        let page = Page::parse(&call.query)?;
        let version = page.version.unwrap_or(current);
        let after = |object: &Arc<Object>| page.after.as_ref().is_none_or(|last| &position(&object.value) > last);
        let mut matching: Vec<&Arc<Object>> =
            objects.iter().filter(|o| after(o) && selector.matches(&o.value)).collect();
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if let Some(limit) = page.limit.filter(|l| *l < matching.len()) {
            let remaining = matching.len() - limit;
            matching.truncate(limit);
            if let Some(last) = matching.last() {
                metadata["continue"] = Page::token(version, &position(&last.value)).into();
                metadata["remainingItemCount"] = remaining.into();
            }
        }
        let items: Vec<Value> = matching.into_iter().map(|o| shown(kind, o)).collect();
        let value = match call.form {
            Form::Object => list_of(kind, metadata, items),
            Form::Partial => json!({
                "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
                "items": items.iter().map(table::partial).collect::<Vec<_>>(),
            }),
            Form::Table => table::table(kind, &items, metadata, include(&call.query)?),
        };
        Ok(Answer::Json(StatusCode::OK, value))
    }

    pub(super) fn watch(&self, kind: Arc<Kind>, call: &Call, selector: &Selector) -> ApiResult<Answer> {
        let mut selector = selector.clone();
        if !call.target.name.is_empty() {
            let by_name = format!("metadata.name={}", call.target.name);
            selector = Selector::parse(&kind.storage, call.query.get("labelSelector"), Some(&by_name))?;
        }
        let timeout = match call.query.number("timeoutSeconds")? {
            Some(seconds) if seconds > 0 => Duration::from_secs(seconds.min(24 * 3600)),
            // Spread, so that clients of one start do not all come back together.
            _ => Duration::from_secs(rand::rng().random_range(1800..3600)),
        };
        let initial = call.query.is_true("sendInitialEvents");
        let since = call.query.number("resourceVersion")?.filter(|v| *v != 0);
        let start = match since {
            // One that is too old is told so by an ERROR event: not every client looks at the status of a watch.
            Some(version) if !initial => Start::At(version),
            _ => {
                let (version, objects) = self.store.list(&kind.storage, &call.target.namespace);
                Start::With { objects, version, marked: initial }
            }
        };
        let watch = Watch {
            store: Arc::clone(&self.store),
            kind,
            namespace: call.target.namespace.clone(),
            selector,
            form: call.form,
            include: include(&call.query)?,
            bookmarks: call.query.is_true("allowWatchBookmarks"),
            timeout,
        };
        Ok(Answer::Stream(watch, start))
    }

    pub(super) async fn review(self: &Arc<Self>, kind: &Arc<Kind>, call: Call) -> ApiResult<Answer> {
        if call.method != Method::POST || !call.target.name.is_empty() {
            return Err(ApiError::method_not_allowed());
        }
        let mut review = call.body;
        let mut write = Write::internal(kind, &self.settings, &call.target.namespace);
        write.decode(&mut review)?;
        let namespace = &call.target.namespace;
        let value = reviews::answer(&self.store, &self.tokens, &kind.kind, &call.user, namespace, review)?;
        Ok(Answer::Json(StatusCode::CREATED, value))
    }

    pub(super) async fn token(self: &Arc<Self>, call: Call) -> ApiResult<Answer> {
        let Target { namespace, name, .. } = &call.target;
        let value = reviews::token_request(&self.store, &self.tokens, namespace, name, call.body)?;
        Ok(Answer::Json(StatusCode::CREATED, value))
    }

    /// Runs `change` as a write of this call's user and answers with the object.
    async fn change(
        self: &Arc<Self>,
        kind: Arc<Kind>,
        call: &Call,
        warnings: &mut Vec<String>,
        change: impl FnOnce(&mut Write<'_>, &mut Transaction<'_>) -> ApiResult<(Arc<Object>, bool)> + Send + 'static,
    ) -> ApiResult<Answer> {
        let unknown_fields = match call.query.get("fieldValidation") {
            Some("Strict") => UnknownFields::Refuse,
            Some("Ignore") => UnknownFields::Ignore,
            None | Some("Warn") => UnknownFields::Warn,
            Some(other) => return Err(ApiError::bad_request(format!("invalid fieldValidation: {other:?}"))),
        };
        let mode = if call.dry_run { Mode::DryRun } else { Mode::Commit };
        let (settings, user, target, manager) =
            (Arc::clone(&self.settings), call.user.clone(), call.target.clone(), call.manager.clone());
        let shown_as = Arc::clone(&kind);
        let store = Arc::clone(&self.store);
        let (object, created, found) = self
            .write(mode, move |tx| {
                let mut write = Write {
                    kind: &kind,
                    settings: &settings,
                    namespace: &target.namespace,
                    subresource: &target.subresource,
                    manager: &manager,
                    unknown_fields,
                    warnings: Vec::new(),
                };
                let (object, created) = change(&mut write, tx)?;
                refuse_escalation(&store, &user, &kind, &object.value)?;
                Ok((object, created, write.warnings))
            })
            .await?;
        warnings.extend(found);
        let code = if created { StatusCode::CREATED } else { StatusCode::OK };
        let value = shown(&shown_as, &object);
        let value = match call.form {
            Form::Object => value,
            Form::Partial => table::partial(&value),
            Form::Table => {
                let metadata = json!({"resourceVersion": object.version.to_string()});
                table::table(&shown_as, &[value], metadata, include(&call.query)?)
            }
        };
        Ok(Answer::Json(code, value))
    }

    pub(super) async fn create(
        self: &Arc<Self>,
        kind: Arc<Kind>,
        mut call: Call,
        warnings: &mut Vec<String>,
    ) -> ApiResult<Answer> {
        let body = call.body.take();
        self.change(kind, &call, warnings, move |write, tx| Ok((write.create(tx, body)?, true))).await
    }

    pub(super) async fn replace(
        self: &Arc<Self>,
        kind: Arc<Kind>,
        mut call: Call,
        warnings: &mut Vec<String>,
    ) -> ApiResult<Answer> {
        let (body, name) = (call.body.take(), call.target.name.clone());
        if kind.is_custom() && body["metadata"]["resourceVersion"].as_str().is_none_or(str::is_empty) {
            let detail = "must be specified for an update";
            let cause = super::error::Cause::invalid("metadata.resourceVersion", &json!(0), detail);
            return Err(ApiError::invalid(&kind.group, &kind.kind, &name, &[cause]));
        }
        self.change(kind, &call, warnings, move |write, tx| Ok((write.update(tx, &name, |_, _| Ok(body))?, false)))
            .await
    }

    pub(super) async fn patch(
        self: &Arc<Self>,
        kind: Arc<Kind>,
        mut call: Call,
        warnings: &mut Vec<String>,
    ) -> ApiResult<Answer> {
        const SUPPORTED: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";
        let (body, name) = (call.body.take(), call.target.name.clone());
        let media = call.content_type.split(';').next().unwrap_or_default().trim().to_owned();
        if media == "application/apply-patch+yaml" {
            let force = call.query.is_true("force");
            if call.query.get("fieldManager").is_none() {
                return Err(ApiError::bad_request(
                    "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
                ));
            }
            return self.change(kind, &call, warnings, move |write, tx| write.apply(tx, &name, body, force)).await;
        }
        let supported = match media.as_str() {
            "application/json-patch+json" | "application/merge-patch+json" => true,
            "application/strategic-merge-patch+json" => !kind.is_custom(),
            _ => false,
        };
        if !supported {
            return Err(ApiError::unsupported_media_type(&media, SUPPORTED));
        }
        self.change(kind, &call, warnings, move |write, tx| {
            let object = write.update(tx, &name, |write, current| {
                let mut patched = current.clone();
                match media.as_str() {
                    "application/json-patch+json" => patch::json_patch(&mut patched, body)?,
                    "application/merge-patch+json" => patch::merge(&mut patched, &body),
                    _ => patch::strategic(&mut patched, &body, &write.kind.schema)?,
                }
                Ok(patched)
            })?;
            Ok((object, false))
        })
        .await
    }

    pub(super) async fn delete(self: &Arc<Self>, kind: Arc<Kind>, call: Call) -> ApiResult<Answer> {
        let options = delete_options(&call)?;
        let mode = if call.dry_run { Mode::DryRun } else { Mode::Commit };
        let (settings, target, deleted) = (Arc::clone(&self.settings), call.target.clone(), Arc::clone(&kind));
        let (object, gone) = self
            .write(mode, move |tx| {
                Write::internal(&deleted, &settings, &target.namespace).delete(tx, &target.name, &options)
            })
            .await?;
        let value = if gone && kind.plural != "pods" {
            let uid = &object.value["metadata"]["uid"];
            json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                "details": {"name": call.target.name, "group": kind.group, "kind": kind.plural, "uid": uid},
            })
        } else {
            shown(&kind, &object)
        };
        Ok(Answer::Json(StatusCode::OK, value))
    }

    pub(super) async fn delete_collection(
        self: &Arc<Self>,
        kind: Arc<Kind>,
        call: Call,
        selector: Selector,
    ) -> ApiResult<Answer> {
        let options = delete_options(&call)?;
        let mode = if call.dry_run { Mode::DryRun } else { Mode::Commit };
        let (settings, namespace, deleted) =
            (Arc::clone(&self.settings), call.target.namespace.clone(), Arc::clone(&kind));
        let objects = self
            .write(mode, move |tx| {
                let mut gone = Vec::new();
                for (key, object) in tx.list(&deleted.storage, &namespace) {
                    if selector.matches(&object.value) {
                        let mut write = Write::internal(&deleted, &settings, &key.namespace);
                        gone.push(write.delete(tx, &key.name, &options)?.0);
                    }
                }
                Ok(gone)
            })
            .await?;
        let items = objects.iter().map(|o| shown(&kind, o)).collect();
        let metadata = json!({"resourceVersion": self.store.version().to_string()});
        Ok(Answer::Json(StatusCode::OK, list_of(&kind, metadata, items)))
    }

    pub(super) fn get_scale(&self, kind: &Kind, call: &Call) -> ApiResult<Answer> {
        let object = self.object(kind, call)?;
        let paths = kind.scale.as_ref().ok_or_else(ApiError::no_such_path)?;
        Ok(Answer::Json(StatusCode::OK, scale(&object.value, paths)))
    }

    pub(super) async fn set_scale(self: &Arc<Self>, kind: Arc<Kind>, mut call: Call) -> ApiResult<Answer> {
        let paths = kind.scale.clone().ok_or_else(ApiError::no_such_path)?;
        let (body, name, is_patch) = (call.body.take(), call.target.name.clone(), call.method == Method::PATCH);
        let media = call.content_type.split(';').next().unwrap_or_default().trim().to_owned();
        let read = paths.clone();
        let answer = self
            .change(kind, &call, &mut Vec::new(), move |write, tx| {
                write.subresource = "scale";
                let object = write.update(tx, &name, |_, current| {
                    let mut wanted = if is_patch { scale(current, &paths) } else { body.clone() };
                    match media.as_str() {
                        _ if !is_patch => {}
                        "application/json-patch+json" => patch::json_patch(&mut wanted, body)?,
                        // A Scale has no lists, so both merges do the same.
                        _ => patch::merge(&mut wanted, &body),
                    }
                    let replicas = wanted["spec"]["replicas"].as_i64().unwrap_or(0);
                    let mut new = current.clone();
                    if let Some(version) = wanted["metadata"]["resourceVersion"].as_str().filter(|v| !v.is_empty()) {
                        new["metadata"]["resourceVersion"] = version.into();
                    }
                    *place(&mut new, &paths.spec)? = replicas.into();
                    Ok(new)
                })?;
                Ok((object, false))
            })
            .await?;
        match answer {
            Answer::Json(code, object) => Ok(Answer::Json(code, scale(&object, &read))),
            other => Ok(other),
        }
    }

    pub(super) async fn finalize(self: &Arc<Self>, kind: Arc<Kind>, mut call: Call) -> ApiResult<Answer> {
        let (body, name) = (call.body.take(), call.target.name.clone());
        self.change(kind, &call, &mut Vec::new(), move |write, tx| {
            let object = write.update(tx, &name, |_, current| {
                let mut new = current.clone();
                new["spec"]["finalizers"] = body["spec"]["finalizers"].as_array().cloned().unwrap_or_default().into();
                Ok(new)
            })?;
            Ok((object, false))
        })
        .await
    }

    /// Assigns a pod to a node, as a scheduler does.
    pub(super) async fn bind(self: &Arc<Self>, kind: Arc<Kind>, mut call: Call) -> ApiResult<Answer> {
        let (body, name) = (call.body.take(), call.target.name.clone());
        let node = body["target"]["name"].as_str().unwrap_or_default().to_owned();
        if node.is_empty() {
            return Err(ApiError::bad_request("target.name is required to bind a pod"));
        }
        self.change(kind, &call, &mut Vec::new(), move |write, tx| {
            write.subresource = "";
            let object = write.update(tx, &name, |_, current| {
                let mut new = current.clone();
                new["spec"]["nodeName"] = node.into();
                Ok(new)
            })?;
            Ok((object, false))
        })
        .await?;
        Ok(Answer::Json(
            StatusCode::CREATED,
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
        ))
    }
}

/// Nobody gives rights, through a role or a binding, that they do not have.
fn refuse_escalation(store: &Store, user: &User, kind: &Kind, object: &Value) -> ApiResult<()> {
    if kind.group != "rbac.authorization.k8s.io" || user.is_admin() {
        return Ok(());
    }
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (namespace, name) = (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
    let (verb, resource, subject, granted) = if kind.plural.ends_with("bindings") {
        let reference = &object["roleRef"];
        let resource = if reference["kind"] == "Role" { "roles" } else { "clusterroles" };
        ("bind", resource, text(&reference["name"]), rbac::role_rules(store, reference, &namespace))
    } else {
        let mut rules = object["rules"].as_array().cloned().unwrap_or_default();
        if object["aggregationRule"].is_object() {
            rules.push(json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}));
        }
        ("escalate", kind.plural.as_str(), name.clone(), rules)
    };
    let asked = Attributes {
        verb: verb.into(),
        resource: resource.into(),
        group: kind.group.clone(),
        namespace: namespace.clone(),
        name: subject,
        ..Attributes::default()
    };
    if rbac::is_allowed(store, user, &asked) {
        return Ok(());
    }
    match rbac::uncovered(&rbac::rules_for(store, user, &namespace), &granted) {
        None => Ok(()),
        Some(rule) => {
            let why =
                format!("user {:?} is attempting to grant RBAC permissions not currently held: {rule}", user.name);
            Err(ApiError::forbidden(&kind.group, &kind.plural, &name, &why))
        }
    }
}

/// Where a page of a list ends and the next begins.
struct Page {
    limit: Option<usize>,
    version: Option<u64>,
    after: Option<(String, String)>,
}

impl Page {
    fn parse(query: &Query) -> ApiResult<Self> {
        let limit = query.number("limit")?.filter(|l| *l > 0).and_then(|l| usize::try_from(l).ok());
        let Some(token) = query.get("continue") else { return Ok(Self { limit, version: None, after: None }) };
        let parse = || -> Option<Self> {
            let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(token).ok()?;
            let token: Value = serde_json::from_slice(&bytes).ok()?;
            let text = |v: &Value| v.as_str().map(str::to_owned);
            Some(Self {
                limit,
                version: Some(token["v"].as_u64()?),
                after: Some((text(&token["ns"])?, text(&token["n"])?)),
            })
        };
        parse().ok_or_else(|| ApiError::bad_request("continue key is not valid"))
    }

    /// Later pages carry the version of the first, so a watch from there misses nothing.
    fn token(version: u64, (namespace, name): &(String, String)) -> String {
        let token = json!({"v": version, "ns": namespace, "n": name});
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(token.to_string())
    }
}

fn position(object: &Value) -> (String, String) {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

/// An object as this version of its kind.
fn shown(kind: &Kind, object: &Object) -> Value {
    let mut value = object.value.clone();
    value["apiVersion"] = kind.api_version().into();
    value["kind"] = kind.kind.as_str().into();
    value
}

fn list_of(kind: &Kind, metadata: Value, items: Vec<Value>) -> Value {
    json!({"kind": format!("{}List", kind.kind), "apiVersion": kind.api_version(), "metadata": metadata, "items": items})
}

/// The scale subresource of an object.
fn scale(object: &Value, paths: &ScalePaths) -> Value {
    let at = |path: &str| path.split('.').fold(object, |value, step| &value[step]);
    let metadata = &object["metadata"];
    let mut scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"], "creationTimestamp": metadata["creationTimestamp"],
        },
        "spec": {"replicas": at(&paths.spec).as_i64().unwrap_or(0)},
        "status": {"replicas": at(&paths.status).as_i64().unwrap_or(0)},
    });
    match paths.selector.as_deref().map(at) {
        Some(Value::String(text)) => scale["status"]["selector"] = text.as_str().into(),
        Some(selector @ Value::Object(_)) => {
            let labels = selector["matchLabels"].as_object().into_iter().flatten();
            let text: Vec<String> = labels.map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())).collect();
            scale["status"]["selector"] = text.join(",").into();
        }
        _ => {}
    }
    scale
}

/// Where a dotted path leads in an object, made as far as it is not there.
fn place<'a>(object: &'a mut Value, path: &str) -> ApiResult<&'a mut Value> {
    path.split('.').try_fold(object, |value, step| {
        if value.is_null() {
            *value = json!({});
        }
        let fields = value.as_object_mut();
        let fields =
            fields.ok_or_else(|| ApiError::bad_request(format!("the object has no place for {path}: {step}")))?;
        Ok(fields.entry(step).or_insert(Value::Null))
    })
}

fn delete_options(call: &Call) -> ApiResult<DeleteOptions> {
    let text = |v: &Value| v.as_str().map(str::to_owned);
    let body = &call.body;
    let propagation =
        call.query.get("propagationPolicy").map(str::to_owned).or_else(|| text(&body["propagationPolicy"]));
    let propagation = match (propagation, &body["orphanDependents"]) {
        (None, Value::Bool(true)) => Some("Orphan".to_owned()),
        (None, Value::Bool(false)) => Some("Background".to_owned()),
        (given, _) => given,
    };
    if let Some(policy) = propagation.as_deref().filter(|p| !matches!(*p, "Foreground" | "Background" | "Orphan")) {
        return Err(ApiError::bad_request(format!("invalid propagationPolicy: {policy:?}")));
    }
    Ok(DeleteOptions {
        propagation,
        grace_period: call.query.number("gracePeriodSeconds")?.or_else(|| body["gracePeriodSeconds"].as_u64()),
        uid: text(&body["preconditions"]["uid"]),
        resource_version: text(&body["preconditions"]["resourceVersion"]),
    })
}

fn include(query: &Query) -> ApiResult<Include> {
    match query.get("includeObject") {
        None | Some("Metadata") => Ok(Include::Metadata),
        Some("None") => Ok(Include::Nothing),
        Some("Object") => Ok(Include::Object),
        Some(other) => Err(ApiError::bad_request(format!("unrecognized includeObject value: {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_have_a_place_or_are_refused() {
        let mut object = json!({"spec": null});
        *place(&mut object, "spec.size.replicas").unwrap() = 3.into();
        assert_eq!(object, json!({"spec": {"size": {"replicas": 3}}}));
        assert_eq!(place(&mut json!({"spec": "small"}), "spec.replicas").unwrap_err().code, 400);
    }
}
