//! One request from first byte to answer: who asks, may they, which object, which verb.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use base64::Engine as _;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited, StreamBody};
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::sync::watch as channel;

use super::error::{ApiError, ApiResult};
use super::rbac::{self, Attributes};
use super::registry::{CRDS, Kind, NAMESPACES, Registry, ScalePaths};
use super::request::{Form, Query, Target};
use super::selector::Selector;
use super::store::{Mode, Object, Store, Transaction};
use super::table::{self, Include};
use super::tokens::{Tokens, User};
use super::verbs::{DeleteOptions, Settings, UnknownFields, Write};
use super::watch::{Start, Watch};
use super::{discovery, openapi, patch, protobuf, reviews, tokens};

pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// As etcd's limit with some room, and enough for any CRD.
const MAX_BODY: usize = 3 * 1024 * 1024;

/// The embedded API server, apart from its sockets.
pub struct Api {
    pub store: Arc<Store>,
    pub settings: Arc<Settings>,
    pub tokens: Arc<Tokens>,
    registry: ArcSwap<Registry>,
    documents: Mutex<Documents>,
    /// True once watches have to end.
    stopping: channel::Receiver<bool>,
}

/// Rendered OpenAPI documents of one registry, by request path.
#[derive(Default)]
struct Documents {
    of: Option<Arc<Registry>>,
    rendered: HashMap<String, Bytes>,
}

/// The answer to a request before it is bytes.
enum Answer {
    Json(StatusCode, Value),
    Bytes { media: &'static str, body: Bytes },
    Stream(Watch, Start),
}

/// A request that has been authenticated and taken apart.
struct Call {
    user: User,
    method: Method,
    target: Target,
    query: Query,
    form: Form,
    body: Value,
    content_type: String,
    manager: String,
    dry_run: bool,
}

impl Api {
    pub fn new(store: Arc<Store>, settings: Settings, tokens: Tokens, stopping: channel::Receiver<bool>) -> Self {
        let api = Self {
            store,
            settings: Arc::new(settings),
            tokens: Arc::new(tokens),
            registry: ArcSwap::from_pointee(Registry::default()),
            documents: Mutex::default(),
            stopping,
        };
        api.reload();
        api
    }

    pub fn registry(&self) -> Arc<Registry> {
        self.registry.load_full()
    }

    /// Reads the served kinds from the stored definitions again.
    pub fn reload(&self) {
        let (_, crds) = self.store.list(CRDS, "");
        self.registry.store(Arc::new(Registry::new(crds.iter().map(|c| &c.value))));
    }

    /// Runs a change on a blocking thread and lets its consequences for the served kinds take effect.
    ///
    /// # Errors
    /// Those of the change.
    pub async fn write<T: Send + 'static>(
        self: &Arc<Self>,
        mode: Mode,
        change: impl FnOnce(&mut Transaction<'_>) -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<T> {
        let api = Arc::clone(self);
        let written = tokio::task::spawn_blocking(move || {
            let committed = api.store.write(mode, change)?;
            if committed.touched.iter().any(|key| &*key.resource == CRDS) {
                api.reload();
            }
            Ok(committed.result)
        });
        written.await.map_err(|e| ApiError::internal(format!("the write did not finish: {e}")))?
    }

    /// Answers one request.
    pub async fn handle<B>(self: Arc<Self>, request: Request<B>) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut warnings = Vec::new();
        let answer = self.answer(request, &mut warnings).await;
        let mut response = match answer {
            Ok(Answer::Json(code, value)) => json_response(code, &value),
            Ok(Answer::Bytes { media, body }) => {
                let mut response = Response::new(full(body));
                response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(media));
                response
            }
            Ok(Answer::Stream(watch, start)) => self.stream(watch, start),
            Err(error) => {
                let code = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                if code.is_server_error() && error.code != 501 {
                    tracing::error!(message = %error.message, "request failed");
                }
                json_response(code, &error.status())
            }
        };
        for warning in warnings {
            let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
            if let Ok(value) = header::HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
                response.headers_mut().append(header::WARNING, value);
            }
        }
        response
    }

    fn stream(&self, watch: Watch, start: Start) -> Response<Body> {
        let stop = Box::pin(super::server::stopped(self.stopping.clone()));
        let events = watch.run(start).take_until(stop);
        let mut response = Response::new(StreamBody::new(events).boxed_unsync());
        let media = header::HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, media);
        response
    }

    async fn answer<B>(self: &Arc<Self>, request: Request<B>, warnings: &mut Vec<String>) -> ApiResult<Answer>
    where
        B: http_body::Body<Data = Bytes> + Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        if let Some(answer) = self.public(&path) {
            return Ok(answer);
        }
        let user = self.authenticate(&parts.headers)?;
        let query = Query::parse(parts.uri.query().unwrap_or_default());
        let accept = header_text(&parts.headers, "accept");
        let Some(target) = Target::parse(&path) else {
            let verb = parts.method.as_str().to_lowercase();
            let asked = Attributes { verb: verb.clone(), path: path.clone(), ..Attributes::default() };
            if !rbac::is_allowed(&self.store, &user, &asked) {
                return Err(ApiError::forbidden_path(&user.name, &verb, &path));
            }
            if !matches!(parts.method, Method::GET | Method::HEAD) {
                return Err(ApiError::method_not_allowed());
            }
            return self.about_itself(&path, accept);
        };
        let registry = self.registry();
        let kind = registry.get(&target.group, &target.version, &target.resource).cloned();
        let storage = kind.as_ref().map_or("", |k| &k.storage);
        let selector = Selector::parse(storage, query.get("labelSelector"), query.get("fieldSelector"));
        self.authorize(&user, &target, &parts.method, &query, selector.as_ref().ok().and_then(Selector::name))?;
        let kind = kind.ok_or_else(ApiError::no_such_path)?;
        if !target.namespace.is_empty() && !kind.namespaced {
            return Err(ApiError::no_such_path());
        }
        let body = read_body(body).await?;
        let content_type = header_text(&parts.headers, "content-type").to_owned();
        let body = if parts.method == Method::GET { Value::Null } else { parse_body(&body, &content_type)? };
        let agent = header_text(&parts.headers, "user-agent").split('/').next().unwrap_or_default();
        let manager = query.get("fieldManager").unwrap_or(if agent.is_empty() { "unknown" } else { agent }).to_owned();
        let call = Call {
            dry_run: dry_run(&query, &body)?,
            form: if query.is_true("watch") || parts.method == Method::GET {
                Form::negotiate(accept)?
            } else {
                Form::negotiate(accept).unwrap_or(Form::Object)
            },
            user,
            method: parts.method,
            target,
            query,
            body,
            content_type,
            manager,
        };
        self.dispatch(kind, call, selector, warnings).await
    }

    /// What anybody may know.
    fn public(&self, path: &str) -> Option<Answer> {
        match path {
            "/healthz" | "/livez" | "/readyz" => {
                Some(Answer::Bytes { media: "text/plain", body: Bytes::from_static(b"ok") })
            }
            "/version" | "/version/" => Some(Answer::Json(StatusCode::OK, discovery::version())),
            _ => None,
        }
    }

    fn authenticate(&self, headers: &HeaderMap) -> ApiResult<User> {
        let token = header_text(headers, "authorization")
            .split_once(' ')
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) = token.ok_or_else(ApiError::unauthorized)?;
        let (user, _) = self
            .tokens
            .authenticate(&self.store, token.trim(), &reviews::api_audiences())
            .ok_or_else(ApiError::unauthorized)?;
        self.impersonate(user, headers)
    }

    fn impersonate(&self, user: User, headers: &HeaderMap) -> ApiResult<User> {
        let texts = |name: &str| -> Vec<String> {
            headers.get_all(name).iter().filter_map(|v| v.to_str().ok().map(str::to_owned)).collect()
        };
        let (name, groups) = (header_text(headers, "impersonate-user").to_owned(), texts("impersonate-group"));
        let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for header in headers.keys() {
            if let Some(key) = header.as_str().strip_prefix("impersonate-extra-") {
                extra.insert(super::request::decode(key), texts(header.as_str()));
            }
        }
        let uid = header_text(headers, "impersonate-uid").to_owned();
        if name.is_empty() {
            let nothing = groups.is_empty() && extra.is_empty() && uid.is_empty();
            return if nothing {
                Ok(user)
            } else {
                Err(ApiError::bad_request("requested groups, uid or extra without impersonating a user"))
            };
        }
        let mut questions = Vec::new();
        match name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':')) {
            Some((namespace, account)) => {
                questions.push(("serviceaccounts", namespace.to_owned(), account.to_owned(), ""))
            }
            None => questions.push(("users", String::new(), name.clone(), "")),
        }
        questions.extend(groups.iter().map(|g| ("groups", String::new(), g.clone(), "")));
        for (key, values) in &extra {
            questions.extend(values.iter().map(|v| ("userextras", String::new(), v.clone(), key.as_str())));
        }
        if !uid.is_empty() {
            questions.push(("uids", String::new(), uid.clone(), ""));
        }
        for (resource, namespace, name, subresource) in questions {
            let group = if matches!(resource, "userextras" | "uids") { "authentication.k8s.io" } else { "" };
            let asked = Attributes {
                verb: "impersonate".into(),
                resource: resource.into(),
                subresource: subresource.into(),
                group: group.into(),
                namespace,
                name: name.clone(),
                path: String::new(),
            };
            if !rbac::is_allowed(&self.store, &user, &asked) {
                let why = denial(&user, &asked);
                return Err(ApiError::forbidden(group, resource, &name, &why));
            }
        }
        Ok(tokens::impersonated(&name, &uid, groups, extra))
    }

    fn authorize(
        &self,
        user: &User,
        target: &Target,
        method: &Method,
        query: &Query,
        field_name: Option<&str>,
    ) -> ApiResult<()> {
        let asked = target.attributes(method, query, field_name);
        if asked.verb.is_empty() {
            return Err(ApiError::method_not_allowed());
        }
        if rbac::is_allowed(&self.store, user, &asked) {
            return Ok(());
        }
        Err(ApiError::forbidden(&target.group, &target.resource, &target.name, &denial(user, &asked)))
    }

    fn about_itself(&self, path: &str, accept: &str) -> ApiResult<Answer> {
        let registry = self.registry();
        let ok = |value: Value| Ok(Answer::Json(StatusCode::OK, value));
        let aggregated = |core: bool| {
            let body = Bytes::from(discovery::aggregated(&registry, core).to_string());
            Ok(Answer::Bytes { media: discovery::AGGREGATED, body })
        };
        let segments: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
        match segments.as_slice() {
            ["api"] if discovery::wants_aggregated(accept) => aggregated(true),
            ["apis"] if discovery::wants_aggregated(accept) => aggregated(false),
            ["api"] => ok(discovery::core_versions()),
            ["apis"] => ok(discovery::groups(&registry)),
            ["api", version] => discovery::resources(&registry, "", version).map_or(Err(ApiError::no_such_path()), ok),
            ["apis", group] => discovery::group(&registry, group).map_or(Err(ApiError::no_such_path()), ok),
            ["apis", group, version] => {
                discovery::resources(&registry, group, version).map_or(Err(ApiError::no_such_path()), ok)
            }
            ["openapi", ..] => self.openapi(&registry, &segments, accept),
            ["openid", "v1", "jwks"] => ok(self.tokens.jwks()),
            [".well-known", "openid-configuration"] => ok(json!({
                "issuer": tokens::ISSUER, "jwks_uri": format!("{}/openid/v1/jwks", tokens::ISSUER),
                "response_types_supported": ["id_token"], "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            })),
            _ => Err(ApiError::no_such_path()),
        }
    }

    /// OpenAPI documents are large and change only with the served kinds, so they are rendered once.
    fn openapi(&self, registry: &Arc<Registry>, segments: &[&str], accept: &str) -> ApiResult<Answer> {
        const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
        let protobuf = segments == ["openapi", "v2"] && accept.contains(PROTOBUF);
        let name = format!("{}{protobuf}", segments.join("/"));
        let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        if !documents.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, registry)) {
            *documents = Documents { of: Some(Arc::clone(registry)), rendered: HashMap::new() };
        }
        // As answered it has no '@', which Go's parser of media types refuses.
        let media =
            if protobuf { "application/com.github.proto-openapi.spec.v2.v1.0+protobuf" } else { "application/json" };
        if let Some(body) = documents.rendered.get(&name) {
            return Ok(Answer::Bytes { media, body: body.clone() });
        }
        let body = match segments {
            ["openapi", "v2"] if protobuf => openapi::v2_protobuf(&openapi::v2(registry)),
            ["openapi", "v2"] => openapi::v2(registry).to_string().into_bytes(),
            ["openapi", "v3"] => {
                // Clients cache by this: it changes when the definitions do.
                let hash = format!("{:x}", self.store.list(CRDS, "").1.iter().map(|c| c.version).sum::<u64>());
                openapi::v3_index(registry, &hash).to_string().into_bytes()
            }
            ["openapi", "v3", "api", version] => rendered(openapi::v3(registry, "", version))?,
            ["openapi", "v3", "apis", group, version] => rendered(openapi::v3(registry, group, version))?,
            _ => return Err(ApiError::no_such_path()),
        };
        let body = Bytes::from(body);
        documents.rendered.insert(name, body.clone());
        Ok(Answer::Bytes { media, body })
    }

    async fn dispatch(
        self: &Arc<Self>,
        kind: Arc<Kind>,
        call: Call,
        selector: ApiResult<Selector>,
        warnings: &mut Vec<String>,
    ) -> ApiResult<Answer> {
        if kind.create_only {
            return self.review(&kind, call).await;
        }
        if !call.target.name.is_empty() && kind.namespaced && call.target.namespace.is_empty() {
            return Err(ApiError::no_such_path());
        }
        let named = !call.target.name.is_empty();
        match (&call.method, named, call.target.subresource.as_str()) {
            (&Method::GET, _, "") if call.query.is_true("watch") => self.watch(kind, &call, &selector?),
            (&Method::GET, false, "") => self.list(&kind, &call, &selector?),
            (&Method::GET, true, "") => self.get(&kind, &call),
            (&Method::GET, true, "status") if kind.has_status => self.get(&kind, &call),
            (&Method::GET, true, "scale") if kind.scale.is_some() => self.get_scale(&kind, &call),
            (&Method::POST, false, "") => {
                if kind.namespaced && call.target.namespace.is_empty() {
                    return Err(ApiError::method_not_allowed());
                }
                self.create(kind, call, warnings).await
            }
            (&Method::POST, true, "token") if kind.plural == "serviceaccounts" => self.token(call).await,
            (&Method::POST, true, "binding") if kind.plural == "pods" => self.bind(kind, call).await,
            (_, true, "log" | "exec" | "attach" | "portforward" | "proxy" | "eviction") if kind.plural == "pods" => {
                Err(ApiError::not_implemented(&format!("pods/{}", call.target.subresource)))
            }
            (&Method::PUT | &Method::PATCH, true, "scale") if kind.scale.is_some() => self.set_scale(kind, call).await,
            (&Method::PUT, true, "finalize") if kind.plural == "namespaces" => self.finalize(kind, call).await,
            (&Method::PUT, true, "") => self.replace(kind, call, warnings).await,
            (&Method::PUT, true, "status") if kind.has_status => self.replace(kind, call, warnings).await,
            (&Method::PATCH, true, "") => self.patch(kind, call, warnings).await,
            (&Method::PATCH, true, "status") if kind.has_status => self.patch(kind, call, warnings).await,
            (&Method::DELETE, true, "") => self.delete(kind, call).await,
            (&Method::DELETE, false, "") => self.delete_collection(kind, call, selector?).await,
            (_, _, "") => Err(ApiError::method_not_allowed()),
            _ => Err(ApiError::no_such_path()),
        }
    }

    fn get(&self, kind: &Kind, call: &Call) -> ApiResult<Answer> {
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

    fn list(&self, kind: &Kind, call: &Call, selector: &Selector) -> ApiResult<Answer> {
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

    fn watch(&self, kind: Arc<Kind>, call: &Call, selector: &Selector) -> ApiResult<Answer> {
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
            Some(version) if !initial => {
                if self.store.events_since(&kind.storage, version).is_none() {
                    return Err(ApiError::expired(format!("too old resource version: {version}")));
                }
                Start::At(version)
            }
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

    async fn review(self: &Arc<Self>, kind: &Arc<Kind>, call: Call) -> ApiResult<Answer> {
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

    async fn token(self: &Arc<Self>, call: Call) -> ApiResult<Answer> {
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

    async fn create(
        self: &Arc<Self>,
        kind: Arc<Kind>,
        mut call: Call,
        warnings: &mut Vec<String>,
    ) -> ApiResult<Answer> {
        let body = call.body.take();
        self.change(kind, &call, warnings, move |write, tx| Ok((write.create(tx, body)?, true))).await
    }

    async fn replace(
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

    async fn patch(self: &Arc<Self>, kind: Arc<Kind>, mut call: Call, warnings: &mut Vec<String>) -> ApiResult<Answer> {
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

    async fn delete(self: &Arc<Self>, kind: Arc<Kind>, call: Call) -> ApiResult<Answer> {
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

    async fn delete_collection(self: &Arc<Self>, kind: Arc<Kind>, call: Call, selector: Selector) -> ApiResult<Answer> {
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

    fn get_scale(&self, kind: &Kind, call: &Call) -> ApiResult<Answer> {
        let object = self.object(kind, call)?;
        let paths = kind.scale.as_ref().ok_or_else(ApiError::no_such_path)?;
        Ok(Answer::Json(StatusCode::OK, scale(&object.value, paths)))
    }

    async fn set_scale(self: &Arc<Self>, kind: Arc<Kind>, mut call: Call) -> ApiResult<Answer> {
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
                    let target = paths.spec.split('.').fold(&mut new, |value, step| &mut value[step]);
                    *target = replicas.into();
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

    async fn finalize(self: &Arc<Self>, kind: Arc<Kind>, mut call: Call) -> ApiResult<Answer> {
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
    async fn bind(self: &Arc<Self>, kind: Arc<Kind>, mut call: Call) -> ApiResult<Answer> {
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

fn dry_run(query: &Query, body: &Value) -> ApiResult<bool> {
    let in_body = (body["kind"] == "DeleteOptions").then(|| body["dryRun"].as_array()).flatten();
    let wanted: Vec<&str> =
        query.all("dryRun").chain(in_body.into_iter().flatten().filter_map(Value::as_str)).collect();
    match wanted.iter().find(|v| **v != "All") {
        Some(other) => Err(ApiError::bad_request(format!("invalid dryRun: {other:?}, supported: \"All\""))),
        None => Ok(!wanted.is_empty()),
    }
}

fn include(query: &Query) -> ApiResult<Include> {
    match query.get("includeObject") {
        None | Some("Metadata") => Ok(Include::Metadata),
        Some("None") => Ok(Include::Nothing),
        Some("Object") => Ok(Include::Object),
        Some(other) => Err(ApiError::bad_request(format!("unrecognized includeObject value: {other:?}"))),
    }
}

fn denial(user: &User, asked: &Attributes) -> String {
    let resource = match asked.subresource.as_str() {
        "" => asked.resource.clone(),
        sub => format!("{}/{sub}", asked.resource),
    };
    let place = match asked.namespace.as_str() {
        "" => "at the cluster scope".to_owned(),
        namespace => format!("in the namespace {namespace:?}"),
    };
    format!("User {:?} cannot {} resource {resource:?} in API group {:?} {place}", user.name, asked.verb, asked.group)
}

fn header_text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

async fn read_body<B>(body: B) -> ApiResult<Bytes>
where
    B: http_body::Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::too_large()),
        Err(error) => Err(ApiError::bad_request(format!("reading the request body: {error}"))),
    }
}

fn parse_body(body: &[u8], content_type: &str) -> ApiResult<Value> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    let media = content_type.split(';').next().unwrap_or_default().trim();
    if media == protobuf::MEDIA {
        return protobuf::decode(body);
    }
    let is_json = media.is_empty() || media == "application/json" || media.ends_with("+json");
    let is_yaml = media.ends_with("yaml");
    if !is_json && !is_yaml {
        return Err(ApiError::unsupported_media_type(media, "application/json, application/yaml"));
    }
    match serde_json::from_slice(body) {
        Ok(value) => Ok(value),
        Err(_) if is_yaml => {
            let text =
                std::str::from_utf8(body).map_err(|e| ApiError::bad_request(format!("the body is not UTF-8: {e}")))?;
            serde_saphyr::from_str(text).map_err(|e| ApiError::bad_request(format!("the body is not YAML: {e}")))
        }
        Err(error) => Err(ApiError::bad_request(format!("the body is not JSON: {error}"))),
    }
}

fn rendered(document: Option<Value>) -> ApiResult<Vec<u8>> {
    document.map(|d| d.to_string().into_bytes()).ok_or_else(ApiError::no_such_path)
}

fn full(bytes: Bytes) -> Body {
    Full::new(bytes).boxed_unsync()
}

fn json_response(code: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(full(Bytes::from(value.to_string())));
    *response.status_mut() = code;
    let media = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, media);
    response
}

/// Whether a namespace exists, for those who need to know before they write.
pub fn namespace_exists(store: &Store, name: &str) -> bool {
    store.get(&super::store::Key::new(NAMESPACES, "", name)).is_some()
}
