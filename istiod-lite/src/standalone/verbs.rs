//! What create, update, apply and delete do to an object, inside one transaction: decode, default, validate, number,
//! own, store. Knows no HTTP; the controllers use it too.

use std::sync::Arc;

use ipnet::IpNet;
use rand::Rng as _;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::apply::{self, Manager};
use super::error::{ApiError, ApiResult};
use super::registry::{CONFIG_MAPS, CRDS, Kind, NAMESPACES, PODS, SERVICE_ACCOUNTS, SERVICES};
use super::store::{Key, Object, Transaction};
use super::{builtin, crd, schema, services};

pub const FOREGROUND: &str = "foregroundDeletion";
pub const ORPHAN: &str = "orphan";

/// What to do with fields the schema does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownFields {
    Ignore,
    Warn,
    Refuse,
}

/// What the server was started with, as far as objects are concerned.
#[derive(Debug, Clone)]
pub struct Settings {
    pub service_cidrs: Vec<IpNet>,
    /// PEM; published as `kube-root-ca.crt`.
    pub ca_certificate: String,
}

/// One write to one kind.
pub struct Write<'a> {
    pub kind: &'a Kind,
    pub settings: &'a Settings,
    /// Empty for cluster-scoped kinds.
    pub namespace: &'a str,
    /// `status` or `scale`, else empty.
    pub subresource: &'a str,
    pub manager: &'a str,
    pub unknown_fields: UnknownFields,
    pub warnings: Vec<String>,
}

/// Seconds a pod may be given at most, ten years: a client may ask for more than there is time.
const LONGEST_GRACE: u64 = 10 * 365 * 24 * 3600;

/// Now, as Kubernetes writes times.
pub fn now() -> String {
    format_time(OffsetDateTime::now_utc())
}

pub fn format_time(time: OffsetDateTime) -> String {
    let whole = time.replace_nanosecond(0).unwrap_or(time);
    whole.format(&Rfc3339).expect("a UTC time of this era has an RFC 3339 form")
}

impl<'a> Write<'a> {
    /// A write by the server itself.
    pub fn internal(kind: &'a Kind, settings: &'a Settings, namespace: &'a str) -> Self {
        Self {
            kind,
            settings,
            namespace,
            subresource: "",
            manager: "istiod-lite",
            unknown_fields: UnknownFields::Ignore,
            warnings: Vec::new(),
        }
    }

    pub fn key(&self, name: &str) -> Key {
        Key::new(&self.kind.storage, self.namespace, name)
    }

    fn not_found(&self, name: &str) -> ApiError {
        ApiError::not_found(&self.kind.group, &self.kind.plural, name)
    }

    fn invalid(&self, object: &Value, causes: &[super::error::Cause]) -> ApiError {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        ApiError::invalid(&self.kind.group, &self.kind.kind, name, causes)
    }

    /// Brings what a client sent into the shape of its kind: type, namespace, no unknown fields, right JSON types.
    pub fn decode(&mut self, object: &mut Value) -> ApiResult<()> {
        let kind = self.kind;
        let Some(fields) = object.as_object_mut() else {
            return Err(ApiError::bad_request(format!("a {} is a JSON object", kind.kind)));
        };
        let api_version = kind.api_version();
        for (field, ours) in [("apiVersion", &api_version), ("kind", &kind.kind)] {
            match fields.get(field).and_then(Value::as_str) {
                None | Some("") => {
                    fields.insert(field.to_owned(), ours.as_str().into());
                }
                Some(theirs) if theirs == ours => {}
                Some(theirs) => {
                    return Err(ApiError::bad_request(format!(
                        "the {field} in the data ({theirs}) does not match the expected {field} ({ours})"
                    )));
                }
            }
        }
        if !fields.get("metadata").is_some_and(Value::is_object) {
            fields.insert("metadata".into(), json!({}));
        }
        let mut unknown = Vec::new();
        schema::prune(object, &kind.schema, "", &mut unknown);
        self.report_unknown(&unknown)?;
        let typed = if kind.is_custom() { &object["metadata"] } else { &*object };
        let (node, path) = if kind.is_custom() {
            (schema::reference(schema::OBJECT_META), "metadata")
        } else {
            (kind.schema.clone(), "")
        };
        if let Some(error) = schema::type_error(typed, &node, path) {
            return Err(ApiError::bad_request(format!(
                "{} in version {:?} cannot be handled as a {}: {error}",
                kind.kind, kind.version, kind.kind
            )));
        }
        let theirs = object["metadata"]["namespace"].as_str().unwrap_or_default();
        if !theirs.is_empty() && theirs != self.namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        if !self.namespace.is_empty() {
            object["metadata"]["namespace"] = self.namespace.into();
        }
        Ok(())
    }

    fn report_unknown(&mut self, unknown: &[String]) -> ApiResult<()> {
        let named: Vec<String> = unknown.iter().map(|path| format!("unknown field {path:?}")).collect();
        match self.unknown_fields {
            UnknownFields::Refuse if !named.is_empty() => {
                let list = named.join(", ");
                Err(ApiError::bad_request(format!(
                    "{} in version {:?} cannot be handled as a {}: strict decoding error: {list}",
                    self.kind.kind, self.kind.version, self.kind.kind
                )))
            }
            UnknownFields::Warn => {
                self.warnings.extend(named);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn manager_entry<'m>(&'m self, api_version: &'m str, now: &'m str) -> Manager<'m> {
        Manager { name: self.manager, api_version, subresource: self.subresource, now }
    }

    /// Stores a new object.
    ///
    /// # Errors
    /// As the Kubernetes API answers POST.
    pub fn create(&mut self, tx: &mut Transaction<'_>, mut object: Value) -> ApiResult<Arc<Object>> {
        self.decode(&mut object)?;
        if object["metadata"]["resourceVersion"].as_str().is_some_and(|v| !v.is_empty()) {
            return Err(ApiError::bad_request("resourceVersion should not be set on objects to be created"));
        }
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.shift_remove("managedFields");
        }
        self.insert(tx, object, None)
    }

    /// `applied`: the managed fields that server-side apply has settled.
    fn insert(
        &mut self,
        tx: &mut Transaction<'_>,
        mut object: Value,
        applied: Option<Value>,
    ) -> ApiResult<Arc<Object>> {
        let kind = self.kind;
        let now = now();
        name_object(&mut object["metadata"]);
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        self.require_namespace(tx, &name)?;
        let key = self.key(&name);
        if tx.get(&key).is_some() {
            return Err(ApiError::already_exists(&kind.group, &kind.plural, &name));
        }
        let metadata = &mut object["metadata"];
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion", "generation"] {
            metadata.as_object_mut().map(|m| m.shift_remove(field));
        }
        metadata["uid"] = uuid::Uuid::new_v4().to_string().into();
        metadata["creationTimestamp"] = now.as_str().into();
        if kind.has_generation() {
            metadata["generation"] = 1.into();
        }
        if kind.has_status {
            object.as_object_mut().map(|o| o.shift_remove("status"));
        }
        self.fill_in(tx, &mut object, None, &now)?;
        self.check(&object, None)?;
        match applied {
            Some(fields) => object["metadata"]["managedFields"] = fields,
            None => {
                let api_version = kind.api_version();
                apply::track_update(None, &mut object, &kind.schema, &self.manager_entry(&api_version, &now));
            }
        }
        let stored = tx.put(&key, object);
        if &*kind.storage == NAMESPACES {
            ensure_namespace_content(tx, self.settings, &name)?;
        }
        Ok(stored)
    }

    fn require_namespace(&self, tx: &Transaction<'_>, name: &str) -> ApiResult<()> {
        if !self.kind.namespaced {
            return Ok(());
        }
        let Some(namespace) = tx.get(&Key::new(NAMESPACES, "", self.namespace)) else {
            return Err(ApiError::not_found("", "namespaces", self.namespace));
        };
        if is_terminating(&namespace.value) {
            let kind = self.kind;
            return Err(ApiError::namespace_terminating(&kind.group, &kind.plural, name, self.namespace));
        }
        Ok(())
    }

    /// Defaults and what the server assigns by kind.
    fn fill_in(&self, tx: &Transaction<'_>, object: &mut Value, old: Option<&Value>, now: &str) -> ApiResult<()> {
        let kind = self.kind;
        if kind.is_custom() {
            schema::apply_defaults(object, &kind.schema);
            return Ok(());
        }
        builtin::apply_defaults(kind, object);
        if let Some(fields) = object.as_object_mut() {
            fields.retain(|_, v| !v.is_null());
        }
        match &*kind.storage {
            SERVICES => {
                services::allocate(tx, &self.settings.service_cidrs, object, old)?;
                if old.is_none() {
                    object["status"] = json!({"loadBalancer": {}});
                }
            }
            PODS if old.is_none() => self.admit_pod(tx, object)?,
            NAMESPACES => {
                object["metadata"]["labels"]["kubernetes.io/metadata.name"] = object["metadata"]["name"].clone();
                if old.is_none() {
                    object["spec"]["finalizers"] = json!(["kubernetes"]);
                    object["status"] = json!({"phase": "Active"});
                }
            }
            CRDS if self.subresource != "status" => {
                if let Some(old) = old {
                    object["status"] = old["status"].clone();
                }
                crd::set_status(object, now);
            }
            _ => {}
        }
        Ok(())
    }

    /// The service account a pod runs as must exist, as admission has it.
    fn admit_pod(&self, tx: &Transaction<'_>, pod: &mut Value) -> ApiResult<()> {
        let spec = &mut pod["spec"];
        if spec["serviceAccountName"].as_str().is_none_or(str::is_empty) {
            spec["serviceAccountName"] = "default".into();
            spec["serviceAccount"] = "default".into();
        }
        let account = spec["serviceAccountName"].as_str().unwrap_or_default().to_owned();
        if tx.get(&Key::new(SERVICE_ACCOUNTS, self.namespace, &account)).is_none() {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let why = format!(
                "error looking up service account {}/{account}: serviceaccount {account:?} not found",
                self.namespace
            );
            return Err(ApiError::forbidden("", "pods", name, &why));
        }
        pod["status"] = json!({"phase": "Pending", "qosClass": quality_of_service(&pod["spec"])});
        Ok(())
    }

    fn check(&self, object: &Value, old: Option<&Value>) -> ApiResult<()> {
        let mut causes = builtin::validate_metadata(self.kind, object);
        if self.kind.is_custom() {
            schema::validate(object, &self.kind.schema, "", &mut causes);
            // Rules count on what the schema says of types and sizes.
            if causes.is_empty() {
                self.kind.rules().validate(object, old, &self.kind.schema, &mut causes);
            }
        } else {
            causes.extend(builtin::validate(self.kind, object, old));
        }
        if causes.is_empty() { Ok(()) } else { Err(self.invalid(object, &causes)) }
    }

    /// Replaces an object by what `change` makes of it.
    ///
    /// # Errors
    /// As the Kubernetes API answers PUT and PATCH: 404, 409 on a stale version, 422 on what may not be.
    pub fn update(
        &mut self,
        tx: &mut Transaction<'_>,
        name: &str,
        change: impl FnOnce(&mut Self, &Value) -> ApiResult<Value>,
    ) -> ApiResult<Arc<Object>> {
        let key = self.key(name);
        let old = tx.get(&key).ok_or_else(|| self.not_found(name))?;
        let mut current = old.value.clone();
        current["apiVersion"] = self.kind.api_version().into();
        let mut new = change(self, &current)?;
        self.decode(&mut new)?;
        self.replace(tx, &key, &old, new, false)
    }

    /// Server-side apply: create or merge.
    ///
    /// # Errors
    /// 409 on conflicts unless `force`.
    pub fn apply(
        &mut self,
        tx: &mut Transaction<'_>,
        name: &str,
        mut config: Value,
        force: bool,
    ) -> ApiResult<(Arc<Object>, bool)> {
        let key = self.key(name);
        if config["metadata"]["managedFields"].as_array().is_some_and(|m| !m.is_empty()) {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        self.decode(&mut config)?;
        match config["metadata"]["name"].as_str() {
            Some(theirs) if theirs != name => {
                return Err(ApiError::bad_request(format!(
                    "the name of the object ({theirs}) does not match the name on the URL ({name})"
                )));
            }
            _ => config["metadata"]["name"] = name.into(),
        }
        // What belongs to the other endpoint is not applied through this one.
        if let Some(fields) = config.as_object_mut() {
            match self.subresource {
                "status" => fields.retain(|k, _| matches!(k.as_str(), "apiVersion" | "kind" | "metadata" | "status")),
                _ if self.kind.has_status => {
                    fields.shift_remove("status");
                }
                _ => {}
            }
        }
        let now = now();
        let api_version = self.kind.api_version();
        let manager = self.manager_entry(&api_version, &now);
        match tx.get(&key) {
            None if !self.subresource.is_empty() => Err(self.not_found(name)),
            None => {
                if config["metadata"]["resourceVersion"].as_str().is_some_and(|v| !v.is_empty()) {
                    return Err(ApiError::conflict(&self.kind.group, &self.kind.plural, name, "it does not exist"));
                }
                let created = apply::apply(None, &config, &self.kind.schema, &manager, force)?;
                let fields = created["metadata"]["managedFields"].clone();
                let fields = if fields.is_null() { json!([]) } else { fields };
                Ok((self.insert(tx, created, Some(fields))?, true))
            }
            Some(old) => {
                let mut current = old.value.clone();
                current["apiVersion"] = api_version.as_str().into();
                let merged = apply::apply(Some(&current), &config, &self.kind.schema, &manager, force)?;
                Ok((self.replace(tx, &key, &old, merged, true)?, false))
            }
        }
    }

    fn replace(
        &mut self,
        tx: &mut Transaction<'_>,
        key: &Key,
        old_object: &Arc<Object>,
        mut new: Value,
        ownership_settled: bool,
    ) -> ApiResult<Arc<Object>> {
        let kind = self.kind;
        let old = &old_object.value;
        let now = now();
        self.check_preconditions(&new, old_object, &key.name)?;
        self.keep_what_is_not_theirs(&mut new, old);
        self.fill_in(tx, &mut new, Some(old), &now)?;
        self.check(&new, Some(old))?;
        if kind.has_generation() {
            const UNCOUNTED: [&str; 4] = ["apiVersion", "kind", "metadata", "status"];
            let mut fields = new.as_object().into_iter().chain(old.as_object()).flat_map(Map::keys);
            if fields.any(|field| !UNCOUNTED.contains(&field.as_str()) && new[field] != old[field]) {
                let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
                new["metadata"]["generation"] = generation.into();
            }
        }
        if !ownership_settled {
            let api_version = kind.api_version();
            apply::track_update(Some(old), &mut new, &kind.schema, &self.manager_entry(&api_version, &now));
        }
        if is_gone(kind, &new) {
            let last = tx.put(key, new);
            tx.delete(key);
            return Ok(last);
        }
        if same(&new, old) {
            return Ok(old_object.clone());
        }
        Ok(tx.put(key, new))
    }

    fn check_preconditions(&self, new: &Value, old: &Object, name: &str) -> ApiResult<()> {
        let conflict = |why: &str| Err(ApiError::conflict(&self.kind.group, &self.kind.plural, name, why));
        let (theirs, ours) = (&new["metadata"], &old.value["metadata"]);
        if theirs["name"].as_str().is_some_and(|n| n != name) {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({}) does not match the name on the URL ({name})",
                theirs["name"].as_str().unwrap_or_default()
            )));
        }
        if theirs["uid"].as_str().is_some_and(|uid| !uid.is_empty() && ours["uid"] != uid) {
            let (theirs, ours) = (theirs["uid"].as_str().unwrap_or_default(), ours["uid"].as_str().unwrap_or_default());
            return conflict(&format!(
                "StorageError: invalid object, Code: 4, Precondition failed: UID in precondition: {theirs}, UID in object meta: {ours}"
            ));
        }
        let version = theirs["resourceVersion"].as_str().unwrap_or_default();
        if !version.is_empty() && version != "0" && version != old.version.to_string() {
            return conflict(
                "the object has been modified; please apply your changes to the latest version and try again",
            );
        }
        Ok(())
    }

    /// Restores what only the server, or only the other endpoint, may change.
    fn keep_what_is_not_theirs(&self, new: &mut Value, old: &Value) {
        const SYSTEM: [&str; 7] = [
            "uid",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generation",
            "generateName",
            "name",
        ];
        let managed = new["metadata"].get("managedFields").cloned();
        if self.subresource == "status" {
            let status = new.as_object_mut().and_then(|o| o.shift_remove("status"));
            // Conditions of a status may come with annotations only for pods, whose kubelet has one endpoint.
            let annotations =
                (&*self.kind.storage == PODS).then(|| new["metadata"].get("annotations").cloned()).flatten();
            *new = old.clone();
            new["apiVersion"] = self.kind.api_version().into();
            if let Some(fields) = new.as_object_mut() {
                fields.shift_remove("status");
                if let Some(status) = status {
                    fields.insert("status".into(), status);
                }
            }
            if let Some(annotations) = annotations {
                new["metadata"]["annotations"] = annotations;
            }
        } else if self.kind.has_status && self.subresource != "finalize" {
            if let Some(fields) = new.as_object_mut() {
                fields.shift_remove("status");
                if let Some(status) = old.get("status") {
                    fields.insert("status".into(), status.clone());
                }
            }
            // Only the finalize endpoint changes these.
            if &*self.kind.storage == NAMESPACES {
                new["spec"] = old["spec"].clone();
            }
        }
        if let Some(metadata) = new["metadata"].as_object_mut() {
            for field in SYSTEM {
                match old["metadata"].get(field) {
                    Some(value) => {
                        metadata.insert(field.into(), value.clone());
                    }
                    None => {
                        metadata.shift_remove(field);
                    }
                }
            }
            // New finalizers cannot hold up a deletion that is under way.
            if metadata.contains_key("deletionTimestamp")
                && let Some(Value::Array(finalizers)) = metadata.get_mut("finalizers")
            {
                let before = old["metadata"]["finalizers"].as_array();
                finalizers.retain(|f| before.is_some_and(|b| b.contains(f)));
            }
            match managed {
                Some(managed) => metadata.insert("managedFields".into(), managed),
                None => metadata.shift_remove("managedFields"),
            };
        }
    }

    /// Deletes an object, or starts to: finalizers, a pod's grace period and foreground deletion keep it for a while.
    /// Returns its last state and whether it is gone.
    ///
    /// # Errors
    /// 404, or 409 when a precondition does not hold.
    pub fn delete(
        &mut self,
        tx: &mut Transaction<'_>,
        name: &str,
        options: &DeleteOptions,
    ) -> ApiResult<(Arc<Object>, bool)> {
        let key = self.key(name);
        let old = tx.get(&key).ok_or_else(|| self.not_found(name))?;
        let metadata = &old.value["metadata"];
        for (precondition, actual, what) in [
            (&options.uid, metadata["uid"].as_str(), "UID"),
            (&options.resource_version, metadata["resourceVersion"].as_str(), "ResourceVersion"),
        ] {
            if let Some(wanted) = precondition
                && actual != Some(wanted)
            {
                let actual = actual.unwrap_or_default();
                let why =
                    format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {actual}");
                return Err(ApiError::conflict(&self.kind.group, &self.kind.plural, name, &why));
            }
        }
        if self.is_protected(name) {
            let why = "this namespace may not be deleted";
            return Err(ApiError::forbidden(&self.kind.group, &self.kind.plural, name, why));
        }
        let mut new = old.value.clone();
        let mut finalizers: Vec<Value> = metadata["finalizers"].as_array().cloned().unwrap_or_default();
        let policy = options.propagation.as_deref().unwrap_or_default();
        finalizers.retain(|f| match policy {
            "Foreground" => f != ORPHAN,
            "Orphan" => f != FOREGROUND,
            "Background" => f != FOREGROUND && f != ORPHAN,
            _ => true,
        });
        let wanted = match policy {
            "Foreground" => Some(FOREGROUND),
            "Orphan" => Some(ORPHAN),
            _ => None,
        };
        if let Some(wanted) = wanted
            && !finalizers.iter().any(|f| f == wanted)
        {
            finalizers.push(wanted.into());
        }
        if &*self.kind.storage == CRDS && !finalizers.iter().any(|f| f == crd::CLEANUP_FINALIZER) {
            finalizers.push(crd::CLEANUP_FINALIZER.into());
        }
        if let Some(metadata) = new["metadata"].as_object_mut() {
            metadata.shift_remove("finalizers");
            if !finalizers.is_empty() {
                metadata.insert("finalizers".into(), finalizers.into());
            }
        }
        let grace = self.grace_period(&old.value, options);
        let started = metadata.get("deletionTimestamp").is_some();
        let shorter = metadata["deletionGracePeriodSeconds"].as_u64().is_some_and(|g| grace < g);
        if !started || shorter {
            let end = OffsetDateTime::now_utc() + std::time::Duration::from_secs(grace);
            new["metadata"]["deletionTimestamp"] = format_time(end).into();
            new["metadata"]["deletionGracePeriodSeconds"] = grace.into();
            if self.kind.has_generation() && !started {
                let generation = metadata["generation"].as_i64().unwrap_or(0) + 1;
                new["metadata"]["generation"] = generation.into();
            }
        }
        if &*self.kind.storage == NAMESPACES {
            new["status"]["phase"] = "Terminating".into();
        }
        if &*self.kind.storage == CRDS {
            crd::set_status(&mut new, &now());
        }
        if is_gone(self.kind, &new) {
            let gone = tx.delete(&key).unwrap_or(old);
            return Ok((gone, true));
        }
        if same(&new, &old.value) {
            return Ok((old, false));
        }
        Ok((tx.put(&key, new), false))
    }

    fn is_protected(&self, name: &str) -> bool {
        &*self.kind.storage == NAMESPACES && matches!(name, "default" | "kube-system" | "kube-public")
    }

    /// Only pods that a kubelet may be running are given time.
    fn grace_period(&self, object: &Value, options: &DeleteOptions) -> u64 {
        if &*self.kind.storage != PODS {
            return 0;
        }
        let assigned = object["spec"]["nodeName"].as_str().is_some_and(|n| !n.is_empty());
        let finished = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        if !assigned || finished {
            return 0;
        }
        let own = object["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(30);
        options.grace_period.unwrap_or(own).min(LONGEST_GRACE)
    }
}

/// What a DELETE asked for beside the name.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    pub propagation: Option<String>,
    pub grace_period: Option<u64>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
}

pub fn is_terminating(object: &Value) -> bool {
    object["metadata"].get("deletionTimestamp").is_some()
}

/// Whether an object that is being deleted waits for nothing any more.
fn is_gone(kind: &Kind, object: &Value) -> bool {
    let metadata = &object["metadata"];
    let waiting = |list: &Value| list.as_array().is_some_and(|l| !l.is_empty());
    let kubelet = &*kind.storage == PODS && metadata["deletionGracePeriodSeconds"].as_u64().is_some_and(|g| g > 0);
    let content = &*kind.storage == NAMESPACES && waiting(&object["spec"]["finalizers"]);
    is_terminating(object) && !waiting(&metadata["finalizers"]) && !kubelet && !content
}

/// Whether two states differ in nothing a client would see as a change.
fn same(new: &Value, old: &Value) -> bool {
    let essence = |object: &Value| {
        let mut object = object.clone();
        if let Some(metadata) = object["metadata"].as_object_mut() {
            metadata.shift_remove("resourceVersion");
            for entry in metadata.get_mut("managedFields").and_then(Value::as_array_mut).into_iter().flatten() {
                entry.as_object_mut().map(|e| e.shift_remove("time"));
            }
        }
        object
    };
    essence(new) == essence(old)
}

fn name_object(metadata: &mut Value) {
    let named = metadata["name"].as_str().is_some_and(|n| !n.is_empty());
    if let Some(prefix) = metadata["generateName"].as_str().filter(|p| !named && !p.is_empty()) {
        // Without vowels and look-alikes, as users know it.
        const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
        let mut random = rand::rng();
        let suffix: String = (0..5).map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())])).collect();
        let prefix: String = prefix.chars().take(58).collect();
        metadata["name"] = format!("{prefix}{suffix}").into();
    }
}

fn quality_of_service(spec: &Value) -> &'static str {
    let mut any = false;
    let mut all = true;
    for container in spec["containers"].as_array().into_iter().flatten() {
        let resources = &container["resources"];
        for name in ["cpu", "memory"] {
            let (limit, request) = (&resources["limits"][name], &resources["requests"][name]);
            any |= !limit.is_null() || !request.is_null();
            all &= !limit.is_null() && (request.is_null() || request == limit);
        }
    }
    match (any, all) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// What every live namespace contains: the service account `default` and the API server's root certificate.
pub fn ensure_namespace_content(tx: &mut Transaction<'_>, settings: &Settings, namespace: &str) -> ApiResult<()> {
    let built_in = super::registry::built_in_registry();
    let root = json!({
        "metadata": {
            "name": "kube-root-ca.crt",
            "annotations": {"kubernetes.io/description": "Verifies the API server's certificate."},
        },
        "data": {"ca.crt": settings.ca_certificate},
    });
    let account = json!({"metadata": {"name": "default"}});
    for (storage, name, object) in [(SERVICE_ACCOUNTS, "default", account), (CONFIG_MAPS, "kube-root-ca.crt", root)] {
        let Some(kind) = built_in.by_storage(storage) else { continue };
        match tx.get(&Key::new(storage, namespace, name)) {
            None => {
                Write::internal(kind, settings, namespace).create(tx, object)?;
            }
            Some(current) if storage == CONFIG_MAPS && current.value["data"] != object["data"] => {
                Write::internal(kind, settings, namespace).update(tx, name, |_, old| {
                    let mut new = old.clone();
                    new["data"] = object["data"].clone();
                    Ok(new)
                })?;
            }
            Some(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::registry::built_in_registry;
    use super::*;

    #[test]
    fn a_pod_is_given_no_more_time_than_there_is() {
        let settings = Settings { service_cidrs: Vec::new(), ca_certificate: String::new() };
        let kind = built_in_registry().by_storage(PODS).expect("a built-in kind");
        let write = Write::internal(kind, &settings, "n");
        let options = DeleteOptions { grace_period: Some(u64::MAX), ..DeleteOptions::default() };
        let grace = write.grace_period(&json!({"spec": {"nodeName": "node"}}), &options);
        assert_eq!(grace, LONGEST_GRACE);
        assert!(!format_time(OffsetDateTime::now_utc() + std::time::Duration::from_secs(grace)).is_empty());
    }
}
