//! `kill -9` of the API, alone and with the control plane in its process, at any moment of writing some hundred objects: what
//! was answered is there afterwards, what was not is there or isn't, and what was given out once is not given out again.
//! `KILL_SEEDS` says how many moments are tried.

mod standalone_support;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};

use futures_util::{StreamExt as _, stream};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt as _};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;
use standalone_support::{Beside, Kubectl, Server, eventually_async};
use tokio::sync::Notify;
use tokio::task::JoinSet;

const SEEDS: u64 = 10;
const ANY: &str = "127.0.0.1:0";
const OBJECTS: usize = 500;
const WRITERS: usize = 8;
const KILLS: usize = 3;
/// By which the objects' states are told apart.
const VALUE: &str = "example.com/value";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    ConfigMap,
    /// Is given an address when it is created.
    Service,
    /// Is given one by the control plane, in its status.
    ServiceEntry,
}

impl Kind {
    fn api(self, client: &Client) -> Api<DynamicObject> {
        let (group, version, kind) = match self {
            Self::ConfigMap => ("", "v1", "ConfigMap"),
            Self::Service => ("", "v1", "Service"),
            Self::ServiceEntry => ("networking.istio.io", "v1", "ServiceEntry"),
        };
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        Api::default_namespaced_with(client.clone(), &resource)
    }

    fn object(self, name: &str, value: &str) -> DynamicObject {
        let mut object = json!({"metadata": {"name": name, "annotations": {VALUE: value}}});
        let (api, kind) = match self {
            Self::ConfigMap => ("v1", "ConfigMap"),
            Self::Service => ("v1", "Service"),
            Self::ServiceEntry => ("networking.istio.io/v1", "ServiceEntry"),
        };
        (object["apiVersion"], object["kind"]) = (api.into(), kind.into());
        match self {
            Self::ConfigMap => object["data"] = json!({"value": value}),
            Self::Service => object["spec"] = json!({"ports": [{"name": "http", "port": 80}]}),
            Self::ServiceEntry => {
                let host = format!("{name}.example.com");
                let ports = json!([{"number": 80, "name": "http", "protocol": "HTTP"}]);
                object["spec"] = json!({"hosts": [host], "resolution": "DNS", "ports": ports});
            }
        }
        serde_json::from_value(object).expect("an object")
    }
}

/// What happens to each object, in this order; every third is deleted in between.
#[derive(Clone, Copy, Debug)]
enum Step {
    Create(&'static str),
    Apply(&'static str),
    Delete,
}

impl Step {
    fn all(of: usize) -> &'static [Self] {
        match of % 3 {
            0 => &[Self::Create("first"), Self::Apply("second"), Self::Delete, Self::Apply("third")],
            _ => &[Self::Create("first"), Self::Apply("second")],
        }
    }

    /// The value that it leaves behind.
    fn outcome(self) -> Option<&'static str> {
        match self {
            Self::Create(value) | Self::Apply(value) => Some(value),
            Self::Delete => None,
        }
    }
}

/// An object as it was seen last.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    value: String,
    uid: Option<String>,
    version: u64,
    address: Option<String>,
}

impl Seen {
    fn of(kind: Kind, object: &DynamicObject) -> Self {
        let address = match kind {
            Kind::ConfigMap => None,
            Kind::Service => object.data["spec"]["clusterIP"].as_str(),
            Kind::ServiceEntry => object.data["status"]["addresses"][0]["value"].as_str(),
        };
        Self {
            value: object.annotations().get(VALUE).cloned().unwrap_or_default(),
            uid: object.uid(),
            version: object.resource_version().and_then(|version| version.parse().ok()).expect("a version"),
            address: address.map(str::to_owned),
        }
    }
}

/// What is to be done to an object, what was answered last, and whether the step that follows may have been done as well.
#[derive(Debug)]
struct Fate {
    kind: Kind,
    name: String,
    steps: &'static [Step],
    known: Option<Seen>,
    is_open: bool,
}

impl Fate {
    fn next(&self) -> Option<Step> {
        self.steps.first().copied()
    }

    /// Does the next step. False: nobody answered.
    async fn advance(&mut self, client: &Client) -> bool {
        let Some(step) = self.next() else { return true };
        let (api, name) = (self.kind.api(client), self.name.as_str());
        let params = PatchParams::apply("kills").force();
        let outcome = match step {
            Step::Create(value) => api.create(&PostParams::default(), &self.kind.object(name, value)).await.map(Some),
            Step::Apply(value) => {
                api.patch(name, &params, &Patch::Apply(self.kind.object(name, value))).await.map(Some)
            }
            Step::Delete => api.delete(name, &DeleteParams::default()).await.map(|_| None),
        };
        match outcome {
            Ok(object) => {
                self.known = object.map(|object| Seen::of(self.kind, &object));
                self.steps = &self.steps[1..];
                true
            }
            Err(kube::Error::Api(status)) => panic!("{step:?} of {name}: {status}"),
            Err(_) => {
                self.is_open = true;
                false
            }
        }
    }

    /// Holds against what is there after a restart.
    fn compare(&mut self, found: Option<Seen>) {
        let value = |seen: &Option<Seen>| seen.as_ref().map(|seen| seen.value.clone());
        let before = format!("{self:?}");
        if let (Some(known), Some(found)) = (&mut self.known, &found)
            && known.address.is_none()
        {
            // One that the control plane gave after we had the answer.
            known.address.clone_from(&found.address);
        }
        if value(&found) == value(&self.known) {
            if let (Some(known), Some(found)) = (&self.known, &found) {
                assert_eq!((&known.uid, &known.address), (&found.uid, &found.address), "{before}: {found:?}");
                // Statuses are written by others.
                assert!(known.version == found.version || self.kind != Kind::ConfigMap, "{before}: {found:?}");
                assert!(known.version <= found.version, "{before}: {found:?}");
            }
        } else {
            let step =
                self.next().filter(|_| self.is_open).unwrap_or_else(|| panic!("{before}, and there is {found:?}"));
            assert_eq!(value(&found).as_deref(), step.outcome(), "{before}, and there is {found:?}");
            self.steps = &self.steps[1..];
        }
        self.known = found;
        self.is_open = false;
    }
}

async fn all(client: &Client, kind: Kind) -> BTreeMap<String, Seen> {
    let list = kind.api(client).list(&ListParams::default()).await.expect("a list");
    let ours = list.iter().filter(|object| object.annotations().contains_key(VALUE));
    ours.map(|object| (object.name_any(), Seen::of(kind, object))).collect()
}

/// Lets writers work on what is in `fates` until `answers` steps were answered (then they are left alone with a server that is
/// to be killed) or all is done.
async fn write(client: &Client, fates: Vec<Fate>, answers: usize, kill: impl FnOnce()) -> Vec<Fate> {
    let queue = Arc::new(Mutex::new((VecDeque::from(fates), answers)));
    let enough = Arc::new(Notify::new());
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (client, queue, enough) = (client.clone(), Arc::clone(&queue), Arc::clone(&enough));
        writers.spawn(async move {
            let mut done = Vec::new();
            loop {
                let next = queue.lock().unwrap().0.pop_front();
                let Some(mut fate) = next else { return done };
                if !fate.advance(&client).await {
                    done.push(fate);
                    return done;
                }
                let mut queue = queue.lock().unwrap();
                match fate.next() {
                    Some(_) => queue.0.push_back(fate),
                    None => done.push(fate),
                }
                queue.1 = queue.1.saturating_sub(1);
                if queue.1 == 0 {
                    enough.notify_one();
                }
            }
        });
    }
    let mut fates = Vec::new();
    let mut kill = Some(kill);
    loop {
        tokio::select! {
            () = enough.notified(), if kill.is_some() => kill.take().expect("once")(),
            done = writers.join_next() => match done {
                Some(done) => fates.extend(done.expect("no panic")),
                None => break,
            },
        }
    }
    assert!(kill.is_none() || answers == usize::MAX, "all was written before {answers} answers");
    fates.extend(std::mem::take(&mut queue.lock().unwrap().0));
    fates
}

async fn compare(client: &Client, fates: &mut [Fate]) {
    let mut there: BTreeMap<Kind, BTreeMap<String, Seen>> = BTreeMap::new();
    for fate in fates {
        let of_kind = match there.entry(fate.kind) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => place.insert(all(client, fate.kind).await),
        };
        let found = of_kind.remove(&fate.name);
        fate.compare(found);
    }
    let left: Vec<_> = there.into_values().flatten().collect();
    assert!(left.is_empty(), "nobody made {left:?}");
}

/// Whether each that should have an address has one, and each one of its own.
fn is_addressed(objects: &BTreeMap<String, Seen>) -> bool {
    let addresses: BTreeSet<_> = objects.values().filter_map(|seen| seen.address.as_ref()).collect();
    addresses.len() == objects.len()
}

async fn live_through_kills(seed: u64, kubectl: Option<&Path>) {
    let mut random = StdRng::seed_from_u64(seed);
    // The CRDs come by kubectl.
    let kubectl = kubectl.filter(|_| seed % 2 == 1);
    let beside = match kubectl {
        None => Beside::Nothing,
        Some(_) => Beside::ControlPlane(vec![
            // Any: one that was free before a kill may be another's after it.
            ("ISTIOD_GRPC_ADDR", ANY.to_owned()),
            ("ISTIOD_MONITORING_ADDR", ANY.to_owned()),
            ("ISTIOD_WEBHOOK_ADDR", ANY.to_owned()),
        ]),
    };
    let mut server = Server::start_beside(&beside);
    let mut kinds = vec![Kind::ConfigMap, Kind::Service];
    if let Some(binary) = kubectl {
        let kubectl = Kubectl::new(&server, "current", binary);
        kubectl.ok("create namespace istio-system");
        kubectl.ok(&format!("apply -f {}/../manifests/crds", env!("CARGO_MANIFEST_DIR")));
        kinds.push(Kind::ServiceEntry);
    }
    let mut fates: Vec<Fate> = (0..OBJECTS)
        .map(|at| {
            let kind = kinds[at % kinds.len()];
            Fate { kind, name: format!("x{at}"), steps: Step::all(at / 3), known: None, is_open: false }
        })
        .collect();
    for _ in 0..KILLS {
        // All kills come before all is written.
        let answers = random.random_range(1..OBJECTS * 4 / 5);
        let client = server.client().await;
        fates = write(&client, fates, answers, || server.kill()).await;
        server.restart_beside(&beside);
        compare(&server.client().await, &mut fates).await;
    }
    let client = server.client().await;
    let mut fates = write(&client, fates, usize::MAX, || unreachable!("so many are not written")).await;
    assert!(fates.iter().all(|fate| fate.next().is_none() && fate.known.is_some()));
    compare(&client, &mut fates).await;
    assert!(is_addressed(&all(&client, Kind::Service).await));
    if kubectl.is_some() {
        let given = async || Some(all(&client, Kind::ServiceEntry).await).filter(is_addressed);
        eventually_async("an address for every ServiceEntry", given).await;
        // Those that were seen in time are the same.
        compare(&client, &mut fates).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_outlives_a_kill_at_any_moment() {
    let seeds: u64 = std::env::var("KILL_SEEDS").map_or(SEEDS, |text| text.parse().expect("KILL_SEEDS is a number"));
    let kubectl = Kubectl::versions().into_iter().next().map(|(_, binary)| binary);
    // Two at a time, as each waits for the disk.
    stream::iter(0..seeds).for_each_concurrent(2, |seed| live_through_kills(seed, kubectl.as_deref())).await;
}
