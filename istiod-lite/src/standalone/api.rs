//! One request from first byte to answer: who asks, may they, what it is about. The verbs are in `handlers`.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited, StreamBody};
use serde_json::{Value, json};
use tokio::sync::watch as channel;

use super::depth::{DEEPEST, exceeds};
use super::error::{ApiError, ApiResult};
use super::rbac::{self, Attributes};
use super::registry::{CRDS, Kind, Registry};
use super::request::{Form, Query, Target};
use super::selector::Selector;
use super::store::{Mode, Store, Transaction};
use super::tokens::{Tokens, User};
use super::verbs::Settings;
use super::watch::{Start, Watch};
use super::{discovery, openapi, protobuf, reviews, tokens};

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
pub(super) enum Answer {
    Json(StatusCode, Value),
    Bytes { media: &'static str, body: Bytes },
    Stream(Watch, Start),
}

/// A request that has been authenticated and taken apart.
pub(super) struct Call {
    pub(super) user: User,
    pub(super) method: Method,
    pub(super) target: Target,
    pub(super) query: Query,
    pub(super) form: Form,
    pub(super) body: Value,
    pub(super) content_type: String,
    pub(super) manager: String,
    pub(super) dry_run: bool,
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
            dry_run: dry_run(&parts.method, &query, &body)?,
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
}

fn dry_run(method: &Method, query: &Query, body: &Value) -> ApiResult<bool> {
    // The body of a DELETE is its options, named so or not.
    let in_body = (method == Method::DELETE).then(|| body["dryRun"].as_array()).flatten();
    let wanted: Vec<&str> =
        query.all("dryRun").chain(in_body.into_iter().flatten().filter_map(Value::as_str)).collect();
    match wanted.iter().find(|v| **v != "All") {
        Some(other) => Err(ApiError::bad_request(format!("invalid dryRun: {other:?}, supported: \"All\""))),
        None => Ok(!wanted.is_empty()),
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

pub(super) fn parse_body(body: &[u8], content_type: &str) -> ApiResult<Value> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    let media = content_type.split(';').next().unwrap_or_default().trim();
    if media == protobuf::MEDIA {
        return protobuf::decode(body);
    }
    let value = parse_text(body, media)?;
    match exceeds(&value, DEEPEST) {
        false => Ok(value),
        true => Err(ApiError::bad_request(format!("the body is nested deeper than {DEEPEST} levels"))),
    }
}

fn parse_text(body: &[u8], media: &str) -> ApiResult<Value> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_nested_too_deeply_to_be_read_again_is_refused_in_any_form() {
        for media in ["application/json", "application/yaml", "application/apply-patch+yaml"] {
            let nested = |levels: usize| format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
            let value = parse_body(nested(100).as_bytes(), media).unwrap();
            assert_eq!(serde_json::from_str::<Value>(&value.to_string()).unwrap(), value);
            assert_eq!(parse_body(nested(101).as_bytes(), media).unwrap_err().code, 400, "{media}");
            // As YAML spells it, so that it is not read as JSON.
            let nested = |levels: usize| format!("{}a", "- ".repeat(levels));
            assert!(parse_body(nested(101).as_bytes(), media).is_err(), "{media}");
        }
    }
}
