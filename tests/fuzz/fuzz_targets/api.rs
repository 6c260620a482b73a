//! What clients send to the control plane: bodies, selectors and patches of the API it can serve itself, signing requests,
//! and the proxies' half of delta xDS.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

use istiod_lite::ca::{Authority, LeafLifetime, SELF_SIGNED_ROOT_TTL};
use istiod_lite::push::session::{Event, Session};
use istiod_lite::push::view::{Scope, View};
use istiod_lite::resources::{Audience, Resource, ResourceStore};
use istiod_lite::standalone::fuzzing as api;
use istiod_lite::translate::world::World;
use istiod_lite::translate::{fixture, translate};
use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::identity::{Identity, new_csr};
use mesh::model;
use mesh::policy::Policy;
use mesh_fuzz::{begin, has_fraction, seed, take, texts};
use mesh_proto::ads::DeltaDiscoveryRequest;
use mesh_proto::enrolment::{POD_ENROLMENT_TYPE, PodEnrolment};
use mesh_proto::security::{AUTHORIZATION_TYPE, Authorization};
use mesh_proto::waypoint::{self as wire, HTTP_POLICY_TYPE, ROUTE_TYPE, Route};
use mesh_proto::workload::{ADDRESS_TYPE, Address, Service, Workload, address};
use prost::Message;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use time::OffsetDateTime;
use waypoint::policy::HttpPolicy;
use waypoint::route::CompiledRoute;
use ztunnel::node::enrolment::Enrolment;

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    match (letter, std::str::from_utf8(content)) {
        (b'b', _) => body(content, "application/vnd.kubernetes.protobuf"),
        (b'y', _) => body(content, "application/yaml"),
        (b's', Ok(text)) => selectors(text),
        (b'q', Ok(text)) => request(text),
        (b'J', _) => patch("json-patch", content),
        (b'M', _) => patch("merge-patch", content),
        (b'S', _) => patch("strategic-merge-patch", content),
        (b'o', _) => object(content),
        (b'c', Ok(text)) => signing_request(text),
        (b'x', _) => subscriptions(content),
        (b't', Ok(text)) => translation(text),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

/// What is taken is written to the disk and to other clients, who must be able to read it.
fn readable(value: &Value) {
    if has_fraction(value) {
        return;
    }
    let text = value.to_string();
    assert_eq!(serde_json::from_str::<Value>(&text).ok().as_ref(), Some(value), "{text:.200}");
}

fn body(bytes: &[u8], content_type: &str) {
    if let Some(value) = api::body(bytes, content_type) {
        readable(&value);
    }
}

static POD: LazyLock<Value> = LazyLock::new(|| {
    json!({
        "metadata": {"name": "p", "namespace": "n", "labels": {"app": "web"}, "finalizers": ["a", "b"]},
        "spec": {
            "nodeName": "node",
            "containers": [{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b", "image": "2"}],
            "volumes": [{"name": "v", "emptyDir": {}}],
        },
    })
});

/// Labels in the first line, fields in the second.
fn selectors(text: &str) {
    let (labels, fields) = text.split_once('\n').unwrap_or((text, ""));
    let _ = api::selects(labels, fields, &POD);
    // A negated field takes whatever the field does not.
    for (field, value) in [("metadata.name", labels), ("spec.nodeName", fields)] {
        if value.contains([',', '=', '!']) || value.trim().is_empty() {
            continue;
        }
        let [is, is_not] = ["=", "!="].map(|sign| api::selects("", &format!("{field}{sign}{value}"), &POD));
        assert_eq!(is.map(|is| !is), is_not);
    }
}

fn request(text: &str) {
    let mut lines = text.splitn(3, '\n');
    let mut next = || lines.next().unwrap_or_default();
    api::request(next(), next(), next());
}

fn patch(media: &str, content: &[u8]) {
    let Ok(change) = serde_json::from_slice::<Value>(content) else { return };
    if let Some(pod) = api::patched(media, &POD, change) {
        readable(&pod);
    }
}

/// A letter for the kind, an object, and in another line what is applied to it. What is kept is what comes of it a second
/// time, and nobody who writes it can make it unreadable.
fn object(mut content: &[u8]) {
    let kind = api::kind(take(&mut content).wrapping_sub(b'A'));
    let mut lines = content.split(|byte| *byte == b'\n').map(serde_json::from_slice::<Value>);
    let (Some(Ok(object)), config) = (lines.next(), lines.next()) else { return };
    let Some(stored) = api::stored(kind, object) else { return };
    readable(&stored);
    assert_eq!(api::stored(kind, stored.clone()).as_ref(), Some(&stored));
    if let Some(Ok(config)) = config.filter(|config| config.as_ref().is_ok_and(Value::is_object))
        && let Some(applied) = api::applied(kind, &stored, &config)
    {
        readable(&applied);
    }
}

/// Whatever is asked for, the certificate is for whom the authority says.
fn signing_request(csr: &str) {
    // The same in every run, and far enough from the epoch: a certificate starts before it is made, and none before 1970
    // is read.
    static NOW: LazyLock<OffsetDateTime> = LazyLock::new(|| OffsetDateTime::UNIX_EPOCH + SELF_SIGNED_ROOT_TTL);
    static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
        let material = Authority::self_signed("td", SELF_SIGNED_ROOT_TTL, *NOW).expect("material");
        Authority::from_material(&material).expect("an authority")
    });
    const NAME: &str = "spiffe://td/ns/shop/sa/cart";
    let Ok(issued) = AUTHORITY.sign(csr, NAME, 0, LeafLifetime::default(), *NOW) else { return };
    let leaf = CertificateDer::from_pem_slice(issued.leaf.as_bytes()).expect("PEM");
    let names = mesh::fuzzing::identities(&leaf).expect("a certificate");
    assert_eq!(names, [NAME.parse::<Identity>().expect("an identity")]);
}

/// Objects as users write them, a document each. Whatever they say, what the proxies are told is something they take: a
/// policy they cannot read would close doors, and a route would stay as it was.
fn translation(text: &str) {
    let mut world = World::default();
    for document in text.split("\n---\n") {
        let Some(mut object) = api::body(document.as_bytes(), "application/yaml") else { continue };
        // As the API server stores it.
        let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { continue };
        metadata.entry("namespace").or_insert_with(|| "default".into());
        let is_name = |field: &str| {
            let name = object["metadata"][field].as_str().unwrap_or_default();
            (1..=253).contains(&name.len())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b))
        };
        if is_name("name") && is_name("namespace") {
            let _ = fixture::add(&mut world, object);
        }
    }
    let translation = translate(&world);
    let again = translate(&world);
    assert_eq!(translation.resources, again.resources);
    for resource in translation.resources {
        let body = resource.body();
        let refused = match resource.type_url() {
            ADDRESS_TYPE => {
                let address = Address::decode(body).expect("our own message");
                model::Resource::try_from(address)
                    .map(|read| assert_eq!(read.name(), *resource.name))
                    .err()
                    .map(|e| e.to_string())
            }
            AUTHORIZATION_TYPE => {
                let policy = Authorization::decode(body).expect("our own message");
                Policy::try_from(policy).err().map(|e| e.to_string())
            }
            ROUTE_TYPE => {
                let route = Route::decode(body).expect("our own message");
                CompiledRoute::compile(&route).err().map(|e| e.to_string())
            }
            HTTP_POLICY_TYPE => {
                let policy = wire::HttpPolicy::decode(body).expect("our own message");
                HttpPolicy::compile(&policy).err().map(|e| e.to_string())
            }
            POD_ENROLMENT_TYPE => {
                let pod = PodEnrolment::decode(body).expect("our own message");
                Enrolment::try_from(pod).err().map(|e| e.to_string())
            }
            other => panic!("{other}"),
        };
        assert_eq!(refused, None, "{}", resource.name);
    }
}

/// The world at two moments: some for all, some for one node, some for another.
static VIEWS: LazyLock<[Arc<View>; 2]> = LazyLock::new(|| {
    let node = |node: &str| vec![Audience::Node(node.into())];
    let workload = |uid: &str, service: &str| {
        let workload = Workload {
            uid: uid.into(),
            services: [(service.to_owned(), Default::default())].into(),
            ..Default::default()
        };
        let mut resource =
            Resource::new(ADDRESS_TYPE, uid, &Address { r#type: Some(address::Type::Workload(workload)) });
        resource = resource.with_aliases(vec![format!("/{uid}-ip")]);
        resource
    };
    let service = |name: &str| {
        let service = Service { name: name.into(), ..Default::default() };
        Resource::new(ADDRESS_TYPE, name, &Address { r#type: Some(address::Type::Service(service)) })
    };
    let first = || vec![workload("a", "n/api"), workload("b", "n/api").for_audience(node("other")), service("n/api")];
    let store = ResourceStore::new();
    store.publish(first());
    let one = View::new(store.snapshot());
    store.publish([first(), vec![workload("c", "n/api").for_audience(node("here")), service("n/db")]].concat());
    let two = one.next(store.snapshot());
    [Arc::new(one), Arc::new(two)]
});

/// Requests, each behind its length, and news in between. A client hears of nothing that is not for it, of nothing twice
/// before it has answered, and all the same ends up with what it may see.
fn subscriptions(mut input: &[u8]) {
    let scope = Scope { node: Some("here".into()), waypoint: None };
    let mut session = Session::new(scope.clone());
    let (mut now, mut waiting) = (0, BTreeSet::new());
    while !input.is_empty() {
        let (step, length) = (take(&mut input), usize::from(take(&mut input)));
        let (content, rest) = input.split_at(length.min(input.len()));
        input = rest;
        let output = if step == b'n' {
            now = 1;
            session.handle_view(&VIEWS[now])
        } else {
            let Ok(request) = DeltaDiscoveryRequest::decode(content) else { continue };
            if !request.response_nonce.is_empty() {
                waiting.remove(&(request.type_url.clone(), request.response_nonce.clone()));
            }
            match session.handle_request(request, &VIEWS[now]) {
                Ok(output) => output,
                Err(_) => return,
            }
        };
        let unknown: Vec<&String> = output
            .events
            .iter()
            .filter_map(|event| if let Event::UnknownType(type_url) = event { Some(type_url) } else { None })
            .collect();
        for response in &output.responses {
            if unknown.iter().any(|unknown| **unknown == *response.type_url) {
                assert!(response.updated.is_empty());
                continue;
            }
            assert!(!waiting.iter().any(|(type_url, _)| **type_url == *response.type_url), "two at once");
            waiting.insert((response.type_url.to_string(), response.nonce.clone()));
            for resource in &response.updated {
                let known: BTreeMap<_, _> =
                    VIEWS[now].snapshot().of_type(ADDRESS_TYPE).map(|known| (&*known.name, known)).collect();
                assert!(known.get(&*resource.name).is_some_and(|known| scope.sees(known)), "{}", resource.name);
            }
        }
    }
}

const OBJECTS: [&str; 6] = [
    r#"{"metadata":{"name":"p","labels":{"a":"b"}},"spec":{"containers":[{"name":"a","image":"b","ports":[{"containerPort":80}],"livenessProbe":{"httpGet":{"port":80}},"env":[{"name":"x","valueFrom":{"fieldRef":{"fieldPath":"y"}}}]}],"volumes":[{"name":"v","configMap":{"name":"c"}}]}}"#,
    r#"{"metadata":{"name":"d"},"spec":{"replicas":1,"selector":{"matchLabels":{"a":"b"}},"template":{"metadata":{"labels":{"a":"b"}},"spec":{"containers":[{"name":"a","image":"b"}]}}}}"#,
    r#"{"metadata":{"name":"s"},"spec":{"ports":[{"port":80,"targetPort":"http"}],"type":"ClusterIP"}}"#,
    r#"{"metadata":{"name":"xs.example.com"},"spec":{"group":"example.com","scope":"Namespaced","names":{"plural":"xs","kind":"X"},"versions":[{"name":"v1","served":true,"storage":true,"schema":{"openAPIV3Schema":{"type":"object","properties":{"spec":{"type":"object","x-kubernetes-preserve-unknown-fields":true}}}}}]}}"#,
    r#"{"metadata":{"name":"r"},"rules":[{"verbs":["get"],"apiGroups":[""],"resources":["pods"]}],"roleRef":{"kind":"Role","name":"r"},"subjects":[{"kind":"User","name":"u"}]}"#,
    r#"{"metadata":{"name":"s"},"stringData":{"a":"b"},"data":{"c":"ZA=="},"immutable":true}"#,
];

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (letter, contents) in [
        (
            b'y',
            &["metadata: {name: p}\nspec: {containers: [{name: a, image: b}]}\n", "a: &a [1]\nb: [*a, *a]\n"]
                as &[&str],
        ),
        (
            b's',
            &["app=web,tier in (a, b),!x,y notin(z)\nspec.nodeName=node,metadata.name!=p", "a==b,c!=d\nstatus.phase=x"],
        ),
        (
            b'q',
            &[
                "/apis/apps/v1/namespaces/a/deployments/d/status\nlabelSelector=a%3Db&watch=true&limit=5\napplication/json;as=Table;v=v1;g=meta.k8s.io,application/json",
                "/api/v1/namespaces/a/finalize\nx=1+2\n*/*",
            ],
        ),
        (
            b'J',
            &[
                r#"[{"op":"add","path":"/spec/containers/-","value":{"name":"c"}},{"op":"test","path":"/metadata/name","value":"p"},{"op":"remove","path":"/spec/volumes/0"}]"#,
                r#"[{"op":"copy","from":"/spec","path":"/metadata/labels"},{"op":"move","from":"/metadata/labels/containers","path":"/a~1b"},{"op":"replace","path":"","value":{}}]"#,
            ],
        ),
        (b'M', &[r#"{"metadata":{"labels":null,"x":{"y":[1,{"z":null}]}}}"#]),
        (
            b'S',
            &[
                r#"{"spec":{"$setElementOrder/containers":[{"name":"b"},{"name":"a"}],"containers":[{"name":"a","env":[{"name":"X","$patch":"delete"}]},{"name":"b","image":null}]}}"#,
                r#"{"metadata":{"$deleteFromPrimitiveList/finalizers":["a"],"finalizers":["c"]},"spec":{"volumes":[{"name":"v","configMap":{"name":"c"},"$retainKeys":["name","configMap"]}],"$patch":"replace"}}"#,
            ],
        ),
    ] {
        seeds.extend(texts(letter, contents));
    }
    // Each as every kind: most are none, which has to be found out without harm.
    for kind in b'A'..b'A' + 40 {
        for object in OBJECTS {
            let twice = format!("{object}\n{object}");
            seeds.push(seed(b'o', [&[kind], twice.as_bytes()].concat()));
        }
    }
    macro_rules! worlds {
        ($($case:literal),*) => {
            [$(include_str!(concat!("../../../istiod-lite/testdata/translate/", $case, "/in.yaml"))),*]
        };
    }
    // Few objects at a time, so that a change of one shows.
    for world in worlds!(
        "addresses",
        "authorization-l4",
        "authorization-l7",
        "endpoint-policies",
        "enrolment",
        "not-theirs",
        "peer-authentication",
        "routes",
        "service-entries",
        "waypoint-binding",
        "workload-entries"
    ) {
        let documents: Vec<&str> = world.split("\n---\n").collect();
        seeds.extend(documents.chunks(4).map(|few| seed(b't', few.join("\n---\n"))));
    }
    let identity = Identity::new("td", "other", "name").expect("an identity");
    seeds.push(seed(b'c', new_csr(&identity).expect("a request").pem));

    // An envelope with a ServiceAccount, by hand: nothing here writes them.
    let field = |number: u8, content: &[u8]| {
        [&[number << 3 | 2, u8::try_from(content.len()).expect("it is short")], content].concat()
    };
    let metadata =
        [field(1, b"default"), field(3, b"n"), field(11, &[field(1, b"a"), field(2, b"b")].concat())].concat();
    let kind = [field(1, b"v1"), field(2, b"ServiceAccount")].concat();
    let account = [field(1, &metadata), vec![4 << 3, 1]].concat();
    seeds.push(seed(b'b', [b"k8s\0", &field(1, &kind)[..], &field(2, &account)].concat()));
    let pod_template = field(3, &field(2, &field(2, &[field(1, b"c"), field(2, b"i")].concat())));
    let kind = [field(1, b"apps/v1"), field(2, b"Deployment")].concat();
    let deployment = [field(1, &metadata), field(2, &[vec![1 << 3, 3], pod_template].concat())].concat();
    seeds.push(seed(b'b', [b"k8s\0", &field(1, &kind)[..], &field(2, &deployment)].concat()));

    let request = |subscribe: &[&str], nonce: &str| {
        let names = subscribe.iter().map(|name| (*name).to_owned()).collect();
        let request = DeltaDiscoveryRequest {
            type_url: ADDRESS_TYPE.into(),
            resource_names_subscribe: names,
            response_nonce: nonce.into(),
            ..Default::default()
        };
        let bytes = request.encode_to_vec();
        [&[b'r', u8::try_from(bytes.len()).expect("it is short")], &bytes[..]].concat()
    };
    let news = vec![b'n', 0];
    seeds.push(seed(b'x', [request(&[], ""), request(&[], "1"), news.clone(), request(&[], "2")].concat()));
    seeds
        .push(seed(b'x', [request(&["/a-ip", "b"], ""), news, request(&["n/db"], "1"), request(&["*"], "2")].concat()));
    seeds
}
