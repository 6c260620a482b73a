use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use mesh::drain;
use serde_json::{Value, json};

use super::*;
use crate::resources::lock;
use crate::testing::FakeApi;

fn clock(seconds: i64) -> MicroTime {
    MicroTime(Timestamp::from_second(seconds).unwrap())
}

/// As another has written it, at some time by its own clock.
fn lease(holder: &str, renewed: i64, version: &str) -> Lease {
    let metadata = ObjectMeta { resource_version: Some(version.into()), ..ObjectMeta::default() };
    let spec = LeaseSpec {
        holder_identity: Some(holder.into()),
        lease_duration_seconds: Some(15),
        acquire_time: Some(clock(7)),
        renew_time: Some(clock(renewed)),
        lease_transitions: Some(3),
        ..LeaseSpec::default()
    };
    Lease { metadata, spec: Some(spec) }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Whose it would be, since when and after how many changes; and the version it replaces.
fn would_be(candidate: &Candidate, now: Instant) -> Option<(String, MicroTime, i32, Option<String>)> {
    match candidate.next(now, clock(100)) {
        Move::Wait => None,
        Move::Create(lease) | Move::Replace(lease) => {
            let spec = lease.spec.unwrap();
            assert_eq!((spec.renew_time, spec.lease_duration_seconds), (Some(clock(100)), Some(15)));
            let (holder, acquired) = (spec.holder_identity.unwrap(), spec.acquire_time.unwrap());
            Some((holder, acquired, spec.lease_transitions.unwrap(), lease.metadata.resource_version))
        }
    }
}

#[test]
fn a_lease_that_nobody_has_made_is_made() {
    let candidate = Candidate::new(LEASE.into(), "a".into());
    assert!(matches!(candidate.next(Instant::now(), clock(0)), Move::Create(_)));
    assert_eq!(would_be(&candidate, Instant::now()), Some(("a".into(), clock(100), 0, None)));
}

#[test]
fn anothers_is_left_alone_until_it_has_not_changed_for_its_time() {
    let start = Instant::now();
    // Whatever their clock says.
    for renewed in [0, 100, 4_000_000_000] {
        let mut candidate = Candidate::new(LEASE.into(), "a".into());
        candidate.observe(Some(lease("b", renewed, "1")), start);
        assert_eq!(would_be(&candidate, start), None);
        candidate.observe(Some(lease("b", renewed + 2, "2")), start + seconds(14));
        candidate.observe(Some(lease("b", renewed + 2, "2")), start + seconds(28));
        assert_eq!(would_be(&candidate, start + seconds(28)), None, "14 s after it was renewed");
        let taken = would_be(&candidate, start + seconds(29));
        assert_eq!(taken, Some(("a".into(), clock(100), 4, Some("2".into()))));
    }
}

#[test]
fn one_that_is_deleted_is_left_to_who_had_it_for_as_long_as_it_was_theirs() {
    let (start, mut candidate) = (Instant::now(), Candidate::new(LEASE.into(), "a".into()));
    candidate.observe(Some(lease("b", 50, "1")), start);
    candidate.observe(None, start + seconds(5));
    candidate.observe(None, start + seconds(10));
    assert!(matches!(candidate.next(start + seconds(19), clock(0)), Move::Wait), "it may lead on until it looks");
    assert!(matches!(candidate.next(start + seconds(20), clock(0)), Move::Create(_)));
    // Or it is there again.
    candidate.observe(Some(lease("", 50, "2")), start + seconds(6));
    candidate.observe(None, start + seconds(7));
    assert!(matches!(candidate.next(start + seconds(7), clock(0)), Move::Create(_)), "nobody had it");
}

#[test]
fn what_was_given_back_is_taken_at_once() {
    let (start, mut leader, mut next) =
        (Instant::now(), Candidate::new(LEASE.into(), "b".into()), Candidate::new(LEASE.into(), "a".into()));
    leader.observe(Some(lease("b", 50, "5")), start);
    let released = leader.released(clock(60)).unwrap();
    assert_eq!(released.metadata.resource_version.as_deref(), Some("5"), "nobody else's is overwritten");
    next.observe(Some(released), start);
    assert_eq!(would_be(&next, start), Some(("a".into(), clock(100), 4, Some("5".into()))));
    assert_eq!(next.released(clock(60)), None, "it is not ours to give back");
    // As client-go leaves it.
    next.observe(Some(lease("", 50, "6")), start);
    assert!(would_be(&next, start).is_some());
}

#[test]
fn a_container_that_is_restarted_goes_on_under_its_pods_name() {
    let (start, mut candidate) = (Instant::now(), Candidate::new(LEASE.into(), "pod-1".into()));
    candidate.observe(Some(lease("pod-1", 50, "5")), start);
    assert_eq!(would_be(&candidate, start), Some(("pod-1".into(), clock(7), 3, Some("5".into()))));
}

#[test]
fn a_lease_that_says_no_time_has_ours() {
    let (start, mut candidate) = (Instant::now(), Candidate::new(LEASE.into(), "a".into()));
    let mut without = lease("b", 50, "5");
    without.spec.as_mut().unwrap().lease_duration_seconds = None;
    candidate.observe(Some(without), start);
    assert_eq!(would_be(&candidate, start + seconds(14)), None);
    assert!(would_be(&candidate, start + seconds(15)).is_some());
}

/// What the API has of Leases, and for whom it answers.
#[derive(Default)]
struct Api {
    leases: BTreeMap<String, Value>,
    version: u64,
    cut_off: Vec<&'static str>,
}

impl Api {
    fn answer(&mut self, who: &str, method: &str, path: &str, body: &[u8]) -> (u16, Value) {
        let refused = |code: u16| {
            let reason = match code {
                404 => "NotFound",
                409 => "Conflict",
                _ => "InternalError",
            };
            (code, json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}))
        };
        if self.cut_off.contains(&who) {
            return refused(500);
        }
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let name = body["metadata"]["name"].as_str().or(path.rsplit('/').next()).unwrap().to_owned();
        let lease = self.leases.get(&name);
        let current = lease.map(|lease| lease["metadata"]["resourceVersion"].clone());
        match (method, lease) {
            ("GET", None) | ("PUT", None) => return refused(404),
            ("GET", Some(lease)) => return (200, lease.clone()),
            ("POST", Some(_)) => return refused(409),
            _ => {}
        }
        let mut new = body;
        if method == "PUT" && Some(&new["metadata"]["resourceVersion"]) != current.as_ref() {
            return refused(409);
        }
        self.version += 1;
        new["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.leases.insert(name, new.clone());
        (200, new)
    }
}

/// Counts as working while it lives. At no time there are two.
struct Working(Arc<Mutex<Vec<&'static str>>>, &'static str);

impl Working {
    fn new(working: &Arc<Mutex<Vec<&'static str>>>, who: &'static str) -> Self {
        let mut now = lock(working);
        now.push(who);
        assert_eq!(now.len(), 1, "{now:?}");
        drop(now);
        Self(Arc::clone(working), who)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        lock(&self.0).retain(|who| *who != self.1);
    }
}

#[derive(Default)]
struct Stage {
    api: Arc<Mutex<Api>>,
    working: Arc<Mutex<Vec<&'static str>>>,
}

impl Stage {
    fn enter(&self, who: &'static str) -> (drain::DrainTrigger, tokio::task::JoinHandle<()>) {
        let (api, working) = (Arc::clone(&self.api), Arc::clone(&self.working));
        let client = FakeApi::answering(move |method, path, body| {
            assert!(path.starts_with("/apis/coordination.k8s.io/v1/namespaces/istio-system/leases"), "{path}");
            lock(&api).answer(who, method, path, body)
        });
        let (trigger, drain) = drain::channel();
        let work = move || {
            let working = Arc::clone(&working);
            async move {
                let _working = Working::new(&working, who);
                std::future::pending::<()>().await;
            }
        };
        let office = Office::of_revision(&Revision::default());
        let election = Election::new(&client, "istio-system", office, who.to_owned());
        (trigger, tokio::spawn(election.run(work, drain)))
    }

    /// Waits until they are who works, and says how long that took.
    async fn becomes(&self, wanted: &[&str]) -> Duration {
        let start = Instant::now();
        while *lock(&self.working) != wanted {
            assert!(start.elapsed() < seconds(60), "{:?} instead of {wanted:?}", lock(&self.working));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        start.elapsed()
    }

    fn holder(&self) -> Value {
        lock(&self.api).leases.get(LEASE).map(|lease| lease["spec"]["holderIdentity"].clone()).unwrap_or_default()
    }
}

#[tokio::test(start_paused = true)]
async fn the_leader_stops_before_the_next_begins_and_both_come_back() {
    let stage = Stage::default();
    let (_keep_a, a) = stage.enter("a");
    stage.becomes(&["a"]).await;
    let (_keep_b, b) = stage.enter("b");
    tokio::time::sleep(seconds(60)).await;
    assert_eq!(*lock(&stage.working), ["a"], "it renews in time");

    // The API does not answer the leader: it stops by itself, and the other waits for the rest of the Lease's time.
    lock(&stage.api).cut_off.push("a");
    let stopped = stage.becomes(&[]).await;
    assert!(stopped <= RENEW_DEADLINE + RETRY && stopped >= RENEW_DEADLINE - RETRY, "{stopped:?}");
    let taken = stage.becomes(&["b"]).await;
    assert!(taken >= seconds(4) && stopped + taken <= LEASE_TIME + RETRY * 3, "{stopped:?} {taken:?}");
    lock(&stage.api).cut_off.clear();
    tokio::time::sleep(seconds(60)).await;
    assert_eq!(*lock(&stage.working), ["b"], "who was away does not push in");

    // A Lease that is deleted is made again, and one that is taken by hand is believed.
    lock(&stage.api).leases.clear();
    stage.becomes(&["b"]).await;
    tokio::time::sleep(seconds(5)).await;
    assert_eq!(stage.holder(), "b");
    if let Some(lease) = lock(&stage.api).leases.get_mut(LEASE) {
        lease["spec"]["holderIdentity"] = "somebody".into();
        lease["metadata"]["resourceVersion"] = "other".into();
    }
    assert!(stage.becomes(&[]).await <= RETRY * 2);
    a.abort();
    b.abort();
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_ends_gives_way_at_once() {
    let stage = Stage::default();
    let (trigger, a) = stage.enter("a");
    stage.becomes(&["a"]).await;
    let (_keep, b) = stage.enter("b");
    tokio::time::sleep(seconds(10)).await;
    // As after a renewal whose answer was not heard.
    if let Some(lease) = lock(&stage.api).leases.get_mut(LEASE) {
        lease["metadata"]["resourceVersion"] = "unheard".into();
    }
    trigger.begin();
    a.await.unwrap();
    assert_eq!(stage.holder(), Value::Null, "given back before it ends");
    let taken = stage.becomes(&["b"]).await;
    assert!(taken <= RETRY.mul_f64(1.2), "{taken:?}");
    b.abort();
}

#[test]
fn who_has_precedence_is_there_while_their_lease_changes() {
    let (start, mut senior) = (Instant::now(), Senior::new(Instant::now()));
    assert!(!senior.is_silent(start + seconds(60)), "nobody has looked");
    assert!(!senior.look(Some(lease("b", 50, "1")), start), "left behind, perhaps");
    assert!(!senior.look(Some(lease("b", 50, "1")), start + seconds(14)));
    assert!(!senior.is_silent(start + seconds(14)) && senior.is_silent(start + seconds(15)));
    assert!(senior.look(Some(lease("b", 52, "2")), start + seconds(16)), "it is renewed");
    assert!(!senior.look(Some(lease("", 53, "3")), start + seconds(18)), "given back");
    assert!(!senior.is_silent(start + seconds(32)) && senior.is_silent(start + seconds(33)), "for the next of theirs");
    assert!(!senior.look(None, start + seconds(40)) && senior.is_silent(start + seconds(55)));
}

impl Stage {
    /// A control plane of a revision, which works where it leads the mesh.
    fn enter_of(&self, revision: &str, who: &'static str) -> (drain::DrainTrigger, tokio::task::JoinHandle<()>) {
        let (api, working) = (Arc::clone(&self.api), Arc::clone(&self.working));
        let client = FakeApi::answering(move |method, path, body| lock(&api).answer(who, method, path, body));
        let (trigger, drain) = drain::channel();
        let revision: Revision = revision.parse().unwrap();
        let elect = |office| Election::new(&client, "istio-system", office, who.to_owned());
        let own = elect(Office::of_revision(&revision));
        let mesh = elect(Office::of_mesh(&revision, own.leading()));
        let work = move || {
            let working = Arc::clone(&working);
            async move {
                let _working = Working::new(&working, who);
                std::future::pending::<()>().await;
            }
        };
        let elections = async move {
            tokio::join!(own.run(std::future::pending, drain.clone()), mesh.run(work, drain));
        };
        (trigger, tokio::spawn(elections))
    }
}

#[tokio::test(start_paused = true)]
async fn the_default_revision_leads_the_mesh_and_another_while_there_is_none() {
    let stage = Stage::default();
    let (_keep, canary) = stage.enter_of("canary", "canary");
    let alone = stage.becomes(&["canary"]).await;
    assert!(alone >= LEASE_TIME && alone <= LEASE_TIME + RETRY * 4, "{alone:?}");

    // The default comes, and has it as soon as it is seen to be there.
    let (end, default) = stage.enter_of("", "a");
    let handed_over = stage.becomes(&["a"]).await;
    assert!(handed_over <= RETRY * 5, "{handed_over:?}");
    let (_keep, b) = stage.enter_of("", "b");
    tokio::time::sleep(seconds(60)).await;
    assert_eq!(*lock(&stage.working), ["a"], "nobody pushes in");

    // When its leader ends, the next of its own is first.
    end.begin();
    default.await.unwrap();
    let next = stage.becomes(&["b"]).await;
    assert!(next <= RETRY * 3, "{next:?}");

    // When all of the default are gone without a word, the other revision goes on.
    b.abort();
    stage.becomes(&[]).await;
    let reserve = stage.becomes(&["canary"]).await;
    assert!(reserve >= LEASE_TIME - RETRY * 2 && reserve <= LEASE_TIME + RETRY * 3, "{reserve:?}");
    canary.abort();
}

#[tokio::test(start_paused = true)]
async fn who_does_not_lead_its_revision_does_not_lead_the_mesh() {
    let stage = Stage::default();
    // As one of before there were revisions, which leads all.
    let theirs = json!({"metadata": {"name": LEASE, "resourceVersion": "x"}, "spec": {"holderIdentity": "old"}});
    lock(&stage.api).leases.insert(LEASE.into(), theirs);
    let (_keep, a) = stage.enter_of("", "a");
    let renew = async {
        for second in 0..20 {
            tokio::time::sleep(seconds(2)).await;
            let mut api = lock(&stage.api);
            api.leases.get_mut(LEASE).unwrap()["spec"]["leaseTransitions"] = second.into();
        }
    };
    renew.await;
    assert_eq!(*lock(&stage.working), [""; 0], "it writes all there is");
    let taken = stage.becomes(&["a"]).await;
    assert!(taken <= LEASE_TIME + RETRY * 3, "{taken:?}");

    // Who takes over its revision from one that is dead need not wait for the mesh another time.
    let (_keep, b) = stage.enter_of("", "b");
    tokio::time::sleep(seconds(10)).await;
    a.abort();
    stage.becomes(&[]).await;
    let taken = stage.becomes(&["b"]).await;
    assert!(taken >= LEASE_TIME - RETRY * 2 && taken <= LEASE_TIME + RETRY * 4, "{taken:?}");
    b.abort();
}

/// The objects of the installation.
fn manifest() -> Vec<Value> {
    of_file("install")
}

fn of_file(name: &str) -> Vec<Value> {
    let path = format!("{}/../manifests/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    serde_saphyr::from_multiple(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_installation_allows_what_the_election_asks_for_and_no_more() {
    let role = manifest().into_iter().find(|object| object["kind"] == "Role" && object["metadata"]["name"] == "istiod");
    let rules = role.unwrap()["rules"].as_array().unwrap().clone();
    let of_leases: Vec<_> = rules.iter().filter(|rule| rule["resources"] == json!(["leases"])).collect();
    assert!(of_leases.iter().all(|rule| rule["apiGroups"] == json!(["coordination.k8s.io"])));
    let verbs = |names: Value| of_leases.iter().find(|rule| rule["resourceNames"] == names).map(|rule| &rule["verbs"]);
    assert_eq!(verbs(Value::Null), Some(&json!(["create"])));
    assert_eq!(verbs(json!([LEASE, MESH_LEASE])), Some(&json!(["get", "update"])));
    assert_eq!(of_leases.len(), 2);
}

#[test]
fn an_upgrade_and_a_drained_node_leave_a_replica_where_there_is_another() {
    let manifest = manifest();
    let of = |kind: &str| manifest.iter().find(|it| it["kind"] == kind && it["metadata"]["name"] == "istiod").unwrap();
    let (deployment, budget) = (&of("Deployment")["spec"], &of("PodDisruptionBudget")["spec"]);
    assert_eq!(deployment["strategy"]["rollingUpdate"], json!({"maxSurge": 1, "maxUnavailable": 0}));
    assert_eq!(deployment["replicas"], Value::Null, "applying it again leaves what was scaled");
    assert_eq!((&budget["maxUnavailable"], &budget["minAvailable"]), (&json!(1), &Value::Null));
    assert_eq!(budget["selector"], deployment["selector"]);
    let pod = &deployment["template"]["spec"];
    let sleep = &pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"];
    assert!(sleep.as_u64() < pod["terminationGracePeriodSeconds"].as_u64());
    for constraint in pod["topologySpreadConstraints"].as_array().unwrap() {
        assert_eq!(constraint["whenUnsatisfiable"], "ScheduleAnyway", "one node is enough");
        assert_eq!(constraint["labelSelector"], deployment["selector"]);
    }
}
