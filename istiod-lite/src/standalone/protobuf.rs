//! Reads the protobuf bodies that current kubectl sends where it uses typed clients (`create serviceaccount`, `create
//! token`, `auth can-i` …). Answers are always JSON, which those clients accept.
//!
//! Only the messages in [`message`] are known. A field that is not in its table is refused by name, never dropped, so
//! nothing a user wrote can get lost on the way.

use serde_json::{Map, Value, json};

use super::error::{ApiError, ApiResult};

/// Media type of these bodies.
pub const MEDIA: &str = "application/vnd.kubernetes.protobuf";

/// What precedes the envelope.
const MAGIC: &[u8] = b"k8s\0";

/// How a field is encoded and what becomes of it. Go writes unset plain fields as zero values; these are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Text,
    Texts,
    Integer,
    /// Zero means zero: the field is a pointer in Go.
    OptionalInteger,
    Flag,
    OptionalFlag,
    TextMap,
    BytesMap,
    Message(&'static str),
    Messages(&'static str),
    /// Kept even when empty: presence is the information.
    Struct(&'static str),
    IntOrString,
    /// Resource name to quantity.
    Quantities,
    /// String to list of strings.
    ListMap,
    /// Never taken from a client: status, times, managed fields.
    Ignored,
}

type Field = (u64, &'static str, Type);

/// The fields of a message, by number; `None` for one that is not known.
fn message(name: &str) -> Option<&'static [Field]> {
    use Type::*;
    Some(match name {
        "ObjectMeta" => &[
            (1, "name", Text),
            (2, "generateName", Text),
            (3, "namespace", Text),
            (4, "selfLink", Ignored),
            (5, "uid", Text),
            (6, "resourceVersion", Text),
            (7, "generation", Ignored),
            (8, "creationTimestamp", Ignored),
            (9, "deletionTimestamp", Ignored),
            (10, "deletionGracePeriodSeconds", Ignored),
            (11, "labels", TextMap),
            (12, "annotations", TextMap),
            (13, "ownerReferences", Messages("OwnerReference")),
            (14, "finalizers", Texts),
            (17, "managedFields", Ignored),
        ],
        "OwnerReference" => &[
            (1, "kind", Text),
            (3, "name", Text),
            (4, "uid", Text),
            (5, "apiVersion", Text),
            (6, "controller", OptionalFlag),
            (7, "blockOwnerDeletion", OptionalFlag),
        ],
        "LabelSelector" => {
            &[(1, "matchLabels", TextMap), (2, "matchExpressions", Messages("LabelSelectorRequirement"))]
        }
        "LabelSelectorRequirement" => &[(1, "key", Text), (2, "operator", Text), (3, "values", Texts)],
        "Namespace" => {
            &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("NamespaceSpec")), (3, "status", Ignored)]
        }
        "NamespaceSpec" => &[(1, "finalizers", Texts)],
        "ServiceAccount" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "secrets", Messages("ObjectReference")),
            (3, "imagePullSecrets", Messages("LocalObjectReference")),
            (4, "automountServiceAccountToken", OptionalFlag),
        ],
        "ObjectReference" => &[
            (1, "kind", Text),
            (2, "namespace", Text),
            (3, "name", Text),
            (4, "uid", Text),
            (5, "apiVersion", Text),
            (6, "resourceVersion", Text),
            (7, "fieldPath", Text),
        ],
        "LocalObjectReference" => &[(1, "name", Text)],
        "ConfigMap" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "data", TextMap),
            (3, "binaryData", BytesMap),
            (4, "immutable", OptionalFlag),
        ],
        "Secret" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "data", BytesMap),
            (3, "type", Text),
            (4, "stringData", TextMap),
            (5, "immutable", OptionalFlag),
        ],
        "Service" => {
            &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("ServiceSpec")), (3, "status", Ignored)]
        }
        "ServiceSpec" => &[
            (1, "ports", Messages("ServicePort")),
            (2, "selector", TextMap),
            (3, "clusterIP", Text),
            (4, "type", Text),
            (5, "externalIPs", Texts),
            (7, "sessionAffinity", Text),
            (8, "loadBalancerIP", Text),
            (9, "loadBalancerSourceRanges", Texts),
            (10, "externalName", Text),
            (11, "externalTrafficPolicy", Text),
            (12, "healthCheckNodePort", Integer),
            (13, "publishNotReadyAddresses", Flag),
        ],
        "ServicePort" => &[
            (1, "name", Text),
            (2, "protocol", Text),
            (3, "port", Integer),
            (4, "targetPort", IntOrString),
            (5, "nodePort", Integer),
            (6, "appProtocol", Text),
        ],
        "Deployment" => {
            &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("DeploymentSpec")), (3, "status", Ignored)]
        }
        "DeploymentSpec" => &[
            (1, "replicas", OptionalInteger),
            (2, "selector", Struct("LabelSelector")),
            (3, "template", Message("PodTemplateSpec")),
            (4, "strategy", Message("DeploymentStrategy")),
            (5, "minReadySeconds", Integer),
            (6, "revisionHistoryLimit", OptionalInteger),
            (7, "paused", Flag),
            (9, "progressDeadlineSeconds", OptionalInteger),
        ],
        "DeploymentStrategy" => &[(1, "type", Text)],
        "PodTemplateSpec" => &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("PodSpec"))],
        "PodSpec" => &[
            (2, "containers", Messages("Container")),
            (3, "restartPolicy", Text),
            (4, "terminationGracePeriodSeconds", OptionalInteger),
            (5, "activeDeadlineSeconds", OptionalInteger),
            (6, "dnsPolicy", Text),
            (7, "nodeSelector", TextMap),
            (8, "serviceAccountName", Text),
            (9, "serviceAccount", Text),
            (10, "nodeName", Text),
            (11, "hostNetwork", Flag),
            (12, "hostPID", Flag),
            (13, "hostIPC", Flag),
            (15, "imagePullSecrets", Messages("LocalObjectReference")),
            (16, "hostname", Text),
            (17, "subdomain", Text),
            (19, "schedulerName", Text),
            (20, "initContainers", Messages("Container")),
            (24, "priorityClassName", Text),
        ],
        "Container" => &[
            (1, "name", Text),
            (2, "image", Text),
            (3, "command", Texts),
            (4, "args", Texts),
            (5, "workingDir", Text),
            (6, "ports", Messages("ContainerPort")),
            (7, "env", Messages("EnvVar")),
            (8, "resources", Message("ResourceRequirements")),
            (13, "terminationMessagePath", Text),
            (14, "imagePullPolicy", Text),
            (16, "stdin", Flag),
            (17, "stdinOnce", Flag),
            (18, "tty", Flag),
            (20, "terminationMessagePolicy", Text),
        ],
        "ContainerPort" => &[
            (1, "name", Text),
            (2, "hostPort", Integer),
            (3, "containerPort", Integer),
            (4, "protocol", Text),
            (5, "hostIP", Text),
        ],
        "EnvVar" => &[(1, "name", Text), (2, "value", Text)],
        "ResourceRequirements" => &[(1, "limits", Quantities), (2, "requests", Quantities)],
        "Role" => &[(1, "metadata", Message("ObjectMeta")), (2, "rules", Messages("PolicyRule"))],
        "ClusterRole" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "rules", Messages("PolicyRule")),
            (3, "aggregationRule", Struct("AggregationRule")),
        ],
        "AggregationRule" => &[(1, "clusterRoleSelectors", Messages("LabelSelector"))],
        "PolicyRule" => &[
            (1, "verbs", Texts),
            (2, "apiGroups", Texts),
            (3, "resources", Texts),
            (4, "resourceNames", Texts),
            (5, "nonResourceURLs", Texts),
        ],
        "RoleBinding" | "ClusterRoleBinding" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "subjects", Messages("Subject")),
            (3, "roleRef", Message("RoleRef")),
        ],
        "RoleRef" => &[(1, "apiGroup", Text), (2, "kind", Text), (3, "name", Text)],
        "Subject" => &[(1, "kind", Text), (2, "apiGroup", Text), (3, "name", Text), (4, "namespace", Text)],
        "TokenRequest" => {
            &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("TokenRequestSpec")), (3, "status", Ignored)]
        }
        "TokenRequestSpec" => &[
            (1, "audiences", Texts),
            (3, "boundObjectRef", Struct("BoundObjectReference")),
            (4, "expirationSeconds", OptionalInteger),
        ],
        "BoundObjectReference" => &[(1, "kind", Text), (2, "apiVersion", Text), (3, "name", Text), (4, "uid", Text)],
        "TokenReview" => {
            &[(1, "metadata", Message("ObjectMeta")), (2, "spec", Message("TokenReviewSpec")), (3, "status", Ignored)]
        }
        "TokenReviewSpec" => &[(1, "token", Text), (2, "audiences", Texts)],
        "SelfSubjectReview" => &[(1, "metadata", Message("ObjectMeta")), (2, "status", Ignored)],
        "SelfSubjectAccessReview" | "SubjectAccessReview" | "LocalSubjectAccessReview" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "spec", Message("SubjectAccessReviewSpec")),
            (3, "status", Ignored),
        ],
        "SubjectAccessReviewSpec" => &[
            (1, "resourceAttributes", Struct("ResourceAttributes")),
            (2, "nonResourceAttributes", Struct("NonResourceAttributes")),
            (3, "user", Text),
            (4, "groups", Texts),
            (5, "extra", ListMap),
            (6, "uid", Text),
        ],
        "ResourceAttributes" => &[
            (1, "namespace", Text),
            (2, "verb", Text),
            (3, "group", Text),
            (4, "version", Text),
            (5, "resource", Text),
            (6, "subresource", Text),
            (7, "name", Text),
        ],
        "NonResourceAttributes" => &[(1, "path", Text), (2, "verb", Text)],
        "SelfSubjectRulesReview" => &[
            (1, "metadata", Message("ObjectMeta")),
            (2, "spec", Message("SelfSubjectRulesReviewSpec")),
            (3, "status", Ignored),
        ],
        "SelfSubjectRulesReviewSpec" => &[(1, "namespace", Text)],
        "DeleteOptions" => &[
            (1, "gracePeriodSeconds", OptionalInteger),
            (2, "preconditions", Struct("Preconditions")),
            (3, "orphanDependents", OptionalFlag),
            (4, "propagationPolicy", Text),
            (5, "dryRun", Texts),
        ],
        "Preconditions" => &[(1, "uid", Text), (2, "resourceVersion", Text)],
        _ => return None,
    })
}

/// A body as JSON.
///
/// # Errors
/// 400 on bytes that are no such message, 415 on a kind or field this server reads only as JSON.
pub fn decode(body: &[u8]) -> ApiResult<Value> {
    let envelope = body.strip_prefix(MAGIC).ok_or_else(|| malformed("it does not begin with \"k8s\\0\""))?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for field in fields(envelope) {
        match field? {
            (1, Wire::Bytes(types)) => {
                for field in fields(types) {
                    match field? {
                        (1, Wire::Bytes(text)) => api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    if message(&kind).is_none() {
        return Err(json_only(&format!("a {kind}")));
    }
    let mut object = decode_message(&kind, raw)?;
    object.insert("apiVersion".into(), api_version.into());
    object.insert("kind".into(), kind.into());
    Ok(object.into())
}

fn malformed(what: &str) -> ApiError {
    ApiError::bad_request(format!("the body is not a Kubernetes protobuf message: {what}"))
}

fn json_only(what: &str) -> ApiError {
    ApiError::unsupported_media_type(MEDIA, &format!("application/json for {what}"))
}

fn utf8(bytes: &[u8]) -> ApiResult<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| malformed("a string is not UTF-8"))
}

enum Wire<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// Fixed-width numbers, which none of the known fields use.
    Other,
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

fn fields(mut bytes: &[u8]) -> impl Iterator<Item = ApiResult<(u64, Wire<'_>)>> {
    let mut next = move || -> Option<Option<(u64, Wire<'_>)>> {
        if bytes.is_empty() {
            return None;
        }
        let mut read = || {
            let tag = varint(&mut bytes)?;
            let wire = match tag & 7 {
                0 => Wire::Varint(varint(&mut bytes)?),
                1 => take(&mut bytes, 8).map(|_| Wire::Other)?,
                2 => {
                    let length = usize::try_from(varint(&mut bytes)?).ok()?;
                    Wire::Bytes(take(&mut bytes, length)?)
                }
                5 => take(&mut bytes, 4).map(|_| Wire::Other)?,
                _ => return None,
            };
            Some((tag >> 3, wire))
        };
        let field = read();
        if field.is_none() {
            // The rest cannot be told apart.
            bytes = &[];
        }
        Some(field)
    };
    std::iter::from_fn(move || next().map(|field| field.ok_or_else(|| malformed("it is cut short"))))
}

fn decode_message(name: &str, bytes: &[u8]) -> ApiResult<Map<String, Value>> {
    let known = message(name).ok_or_else(|| json_only(name))?;
    let mut object = Map::new();
    for field in fields(bytes) {
        let (number, wire) = field?;
        let (_, field, data) =
            known.iter().find(|(n, ..)| *n == number).ok_or_else(|| json_only(&format!("field {number} of {name}")))?;
        put(&mut object, field, *data, wire)?;
    }
    Ok(object)
}

fn put(object: &mut Map<String, Value>, field: &str, data: Type, wire: Wire<'_>) -> ApiResult<()> {
    let mismatch = || malformed(&format!("{field} has another wire type"));
    let push = |object: &mut Map<String, Value>, value: Value| {
        if let Value::Array(list) = object.entry(field).or_insert_with(|| json!([])) {
            list.push(value);
        }
    };
    let value = match (data, wire) {
        (Type::Ignored, _) => return Ok(()),
        (Type::Integer | Type::Flag, Wire::Varint(0)) => return Ok(()),
        (Type::Integer | Type::OptionalInteger, Wire::Varint(number)) => json!(number.cast_signed()),
        (Type::Flag | Type::OptionalFlag, Wire::Varint(number)) => json!(number != 0),
        (Type::Text, Wire::Bytes([])) => return Ok(()),
        (Type::Text, Wire::Bytes(bytes)) => utf8(bytes)?.into(),
        (Type::Texts, Wire::Bytes(bytes)) => {
            push(object, utf8(bytes)?.into());
            return Ok(());
        }
        (Type::Messages(name), Wire::Bytes(bytes)) => {
            push(object, decode_message(name, bytes)?.into());
            return Ok(());
        }
        (Type::Message(name), Wire::Bytes(bytes)) => match decode_message(name, bytes)? {
            empty if empty.is_empty() => return Ok(()),
            fields => fields.into(),
        },
        (Type::Struct(name), Wire::Bytes(bytes)) => decode_message(name, bytes)?.into(),
        (Type::IntOrString, Wire::Bytes(bytes)) => int_or_string(bytes)?,
        (Type::TextMap | Type::BytesMap | Type::Quantities | Type::ListMap, Wire::Bytes(bytes)) => {
            let (key, value) = entry(data, bytes)?;
            if let Value::Object(map) = object.entry(field).or_insert_with(|| json!({})) {
                map.insert(key, value);
            }
            return Ok(());
        }
        _ => return Err(mismatch()),
    };
    object.insert(field.to_owned(), value);
    Ok(())
}

fn int_or_string(bytes: &[u8]) -> ApiResult<Value> {
    let (mut is_text, mut number, mut text) = (false, 0, String::new());
    for field in fields(bytes) {
        match field? {
            (1, Wire::Varint(kind)) => is_text = kind == 1,
            (2, Wire::Varint(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(value)) => text = utf8(value)?,
            _ => {}
        }
    }
    Ok(if is_text { text.into() } else { number.into() })
}

/// One map entry: a message of key and value.
fn entry(data: Type, bytes: &[u8]) -> ApiResult<(String, Value)> {
    use base64::Engine as _;
    let (mut key, mut value) = (String::new(), &[][..]);
    for field in fields(bytes) {
        match field? {
            (1, Wire::Bytes(bytes)) => key = utf8(bytes)?,
            (2, Wire::Bytes(bytes)) => value = bytes,
            _ => {}
        }
    }
    let texts = |bytes| -> ApiResult<Vec<String>> {
        let mut all = Vec::new();
        for field in fields(bytes) {
            if let (1, Wire::Bytes(text)) = field? {
                all.push(utf8(text)?);
            }
        }
        Ok(all)
    };
    let value = match data {
        Type::BytesMap => base64::engine::general_purpose::STANDARD.encode(value).into(),
        Type::Quantities => texts(value)?.pop().unwrap_or_default().into(),
        Type::ListMap => json!(texts(value)?),
        _ => utf8(value)?.into(),
    };
    Ok((key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![field << 3 | 2, u8::try_from(content.len()).unwrap()];
        out.extend_from_slice(content);
        out
    }

    fn body(kind: &str, raw: &[u8]) -> Vec<u8> {
        let types = [bytes(1, b"v1"), bytes(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), bytes(1, &types), bytes(2, raw)].concat()
    }

    #[test]
    fn a_config_map_is_read_whole() {
        let metadata = [bytes(1, b"c"), bytes(2, b"")].concat();
        let data = [bytes(1, b"k"), bytes(2, b"v")].concat();
        let raw = [bytes(1, &metadata), bytes(2, &data), vec![4 << 3, 1]].concat();
        assert_eq!(
            decode(&body("ConfigMap", &raw)).unwrap(),
            json!({"metadata": {"name": "c"}, "data": {"k": "v"}, "immutable": true, "apiVersion": "v1", "kind": "ConfigMap"})
        );
    }

    #[test]
    fn what_is_not_known_is_refused_not_dropped() {
        assert_eq!(decode(&body("ConfigMap", &bytes(9, b"x"))).unwrap_err().code, 415);
        assert_eq!(decode(&body("Unheard", b"")).unwrap_err().code, 415);
    }

    #[test]
    fn garbage_is_an_error() {
        for garbage in [&b""[..], b"k8s", b"k8s\0\x0a\xff", b"k8s\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"] {
            assert!(decode(garbage).is_err(), "{garbage:?}");
        }
    }

    #[test]
    fn every_message_a_table_names_exists() {
        let mut wanted =
            vec!["ServiceAccount", "Deployment", "Service", "ClusterRole", "TokenRequest", "SubjectAccessReview"];
        while let Some(name) = wanted.pop() {
            for (_, field, data) in message(name).unwrap_or_else(|| panic!("{name}")) {
                match data {
                    Type::Message(next) | Type::Messages(next) | Type::Struct(next) => wanted.push(next),
                    _ => assert!(!field.is_empty()),
                }
            }
        }
    }
}
