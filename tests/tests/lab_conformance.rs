//! Gateway API's conformance cases for a mesh, as vectors of our own, in a running mesh whose services are behind a waypoint:
//! what holds, holds three times in a row; what is owed is refused where one sees it, and never passed over in silence.

#![forbid(unsafe_code)]

#[path = "support/conformance/mod.rs"]
mod conformance;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::echo::{Answer, Ask, How, Report, values};
use mesh_tests::places::Places;
use mesh_tests::session::Session;
use mesh_tests::{demo, raw, sys, wait};
use serde_json::Value;

use conformance::{CONSUMER, Case, KEY, MESH, Mark, POD, Said, get};

const PODS: &str = "tests/tests/support/conformance/pods.yaml";
/// The suite's own bound on how long a mesh may take to do as it is told.
const CONSISTENT: Duration = Duration::from_secs(30);
/// A status is written within this time.
const SAID_WITHIN: Duration = Duration::from_secs(5);
/// How long the pods may take to be up and in the mesh.
const SETTLE: Duration = Duration::from_secs(60);

/// What can be claimed: features of which every vector holds, as `supportedFeatures` of a status spells them, sorted. `GRPCRoute`
/// is not among them; of the further ones neither CORS, mirrors nor retries are.
const FEATURES: &[&str] = &[
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendTimeout",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRewrite",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "Mesh",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];

/// The suite's cases and how many vectors each has.
const SUITE: &[(&str, usize)] = &[
    ("MeshBasic", 1),
    ("MeshHTTPRouteSimpleSameNamespace", 1),
    ("MeshHTTPRouteMatching", 9),
    ("MeshHTTPRouteRequestHeaderModifier", 7),
    ("MeshHTTPRouteRedirectHostAndStatus", 2),
    ("MeshHTTPRouteWeight", 1),
    ("MeshTrafficSplit", 2),
    ("MeshHTTPRouteBackendRequestHeaderModifier", 7),
    ("MeshHTTPRouteQueryParamMatching", 15),
    ("MeshHTTPRouteRedirectPath", 6),
    ("MeshHTTPRouteRedirectPort", 4),
    ("MeshHTTPRouteSchemeRedirect", 4),
    ("MeshHTTPRouteRewritePath", 6),
    ("MeshHTTPRouteNamedRule", 2),
    ("MeshFrontend", 2),
    ("MeshFrontendHostname", 2),
    ("MeshPorts", 4),
    ("MeshConsumerRoute", 2),
    ("MeshHTTPRoute303Redirect", 1),
    ("MeshHTTPRoute307Redirect", 1),
    ("MeshHTTPRoute308Redirect", 1),
    ("MeshGRPCRouteWeight", 1),
    ("MeshGRPCRouteRequestHeaderModifier", 4),
];

#[test]
fn the_mesh_conforms_but_for_what_it_owes() {
    if !raw::available() {
        return;
    }
    let wanted = std::env::var("LAB_CASE").unwrap_or_default();
    let cases: Vec<Case> = conformance::all().into_iter().filter(|case| case.name.contains(&wanted)).collect();
    assert!(!cases.is_empty(), "LAB_CASE={wanted}: there is no such case");
    let mesh = Mesh::up().expect("the lab comes up");
    let mut failed = Vec::new();
    for case in &cases {
        let started = Instant::now();
        let outcome = mesh.run(case);
        let took = started.elapsed().as_secs_f32();
        let owed = case.vectors.iter().filter(|vector| vector.mark != Mark::Passes).count();
        match outcome {
            Ok(()) => {
                println!("case {} ... ok, {} of {} vectors owed [{took:.1} s]", case.name, owed, case.vectors.len())
            }
            Err(e) => {
                println!("case {} ... FAILED [{took:.1} s]: {e:#}", case.name);
                failed.push(format!("{}: {e:#}", case.name));
            }
        }
    }
    mesh.session.stop().expect("the lab comes down");
    assert!(failed.is_empty(), "{} of {} cases failed:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

/// The mesh while cases run.
struct Mesh {
    session: Session,
    /// The address of the pod of `echo-v2`.
    pod: String,
}

impl Mesh {
    fn up() -> Result<Self> {
        let places = Places::find()?;
        for program in ["lab", "istiod-lite", "ztunnel", "waypoint", "bench"] {
            let path = places.binaries.join(program);
            ensure!(path.exists(), "{} is missing: run `cargo xtask build`", path.display());
        }
        let session = Session::start("conform", &places)?;
        demo::install_with(&session, PODS)?;
        let mut mesh = Self { session, pod: String::new() };
        mesh.kubectl(&["-n", MESH, "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=60s"])?;
        for namespace in [MESH, CONSUMER] {
            mesh.kubectl(&["-n", namespace, "wait", "--for=condition=Ready", "pods", "--all", "--timeout=60s"])?;
            let pods = mesh.session.pods().into_iter();
            for pod in pods.filter(|pod| pod.namespace == namespace && pod.name.starts_with("echo-")) {
                wait::until(&format!("{} to join", pod.name), SETTLE, || {
                    let said = mesh.session.redirection(&pod)?;
                    ensure!(said == "enabled", "it is {said:?}");
                    Ok(())
                })?;
            }
            wait::until(&format!("requests from {namespace} to go through the waypoint"), SETTLE, || {
                let ask = get("/").to(&format!("echo.{MESH}")).ask;
                let answers = mesh.ask(namespace, &[ask])?;
                let all = answers.iter().flatten().filter_map(Answer::report);
                let through = all.filter(|report| values(&report.headers, "x-envoy-attempt-count").is_some()).count();
                ensure!(through == 3, "{answers:?}");
                Ok(())
            })?;
        }
        let pod = mesh.session.pod(&format!("{MESH}/echo-v2"))?;
        let address = pod.addresses.iter().find(|ip| ip.is_ipv4()).context("echo-v2 has no IPv4 address")?;
        mesh.pod = address.to_string();
        Ok(mesh)
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let output = self.session.kubectl_output(arguments)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(said)
    }

    /// What comes of questions from the client of a namespace.
    fn ask(&self, namespace: &str, asks: &[Ask]) -> Result<Vec<Vec<Answer>>> {
        let mut command = self.session.exec(&format!("{namespace}/echo-v1"), &["bench", "ask"])?;
        let output = sys::feed(&mut command, &serde_json::to_string(asks)?)?;
        serde_json::from_slice(&output.stdout).context("the client's answers")
    }

    /// Applies a case's objects, holds what is said of them and what comes of its requests against what should, and takes them
    /// away again.
    fn run(&self, case: &Case) -> Result<()> {
        let held = self
            .applied(case)
            .and_then(|()| wait::until("all vectors to be as marked", CONSISTENT, || case.judge(&self.answers(case)?)));
        let cleared = self.clear(case);
        held.and(cleared)
    }

    fn applied(&self, case: &Case) -> Result<()> {
        if case.objects.is_empty() {
            return Ok(());
        }
        let applied = self.session.apply(&case.objects);
        if let Said::NoSuchKind(kind) = case.said {
            let refused = applied.err().with_context(|| format!("{kind} is a kind now: take the marks off"))?;
            let named = format!("no matches for kind \"{kind}\"");
            ensure!(refused.to_string().contains(&named), "it is refused otherwise: {refused:#}");
            return Ok(());
        }
        applied?;
        wait::until(&format!("the status to say {:?}", case.said), SAID_WITHIN, || {
            let routes: Value = serde_json::from_str(&self.kubectl(&["get", "httproutes", "-A", "-o", "json"])?)?;
            let routes = routes["items"].as_array().context("no list")?;
            ensure!(!routes.is_empty(), "there is no route");
            routes.iter().try_for_each(|route| said(route, case.said).with_context(|| route["status"].to_string()))
        })
    }

    fn clear(&self, case: &Case) -> Result<()> {
        if case.objects.is_empty() || matches!(case.said, Said::NoSuchKind(_)) {
            return Ok(());
        }
        let mut command = self.session.kubectl(&["delete", "--wait=false", "-f", "-"])?;
        sys::feed(&mut command, &case.objects).map(drop)
    }

    /// What comes of a case's requests, all of them at once.
    fn answers(&self, case: &Case) -> Result<Vec<Vec<Answer>>> {
        let clients: BTreeSet<&str> = case.vectors.iter().map(|vector| vector.from).collect();
        let mut of_client = BTreeMap::new();
        for client in clients {
            let vectors = case.vectors.iter().filter(|vector| vector.from == client);
            let asks: Vec<Ask> = vectors.map(|vector| self.filled_in(&vector.ask)).collect();
            of_client.insert(client, self.ask(client, &asks)?.into_iter());
        }
        let next = |from: &str| of_client.get_mut(from).and_then(Iterator::next).context("an answer is missing");
        case.vectors.iter().map(|vector| vector.from).map(next).collect()
    }

    fn filled_in(&self, ask: &Ask) -> Ask {
        let key = uuid::Uuid::new_v4().simple().to_string();
        let fill = |url: &String| url.replace(KEY, &key).replace(POD, &self.pod);
        Ask { url: fill(&ask.url), then: ask.then.iter().map(fill).collect(), ..ask.clone() }
    }
}

/// Whether every parent of a route says of its present form what it should.
fn said(route: &Value, expected: Said) -> Result<()> {
    let generation = &route["metadata"]["generation"];
    let parents = route["status"]["parents"].as_array().context("no parents yet")?;
    ensure!(!parents.is_empty(), "no parents yet");
    for parent in parents {
        let conditions = parent["conditions"].as_array().context("no conditions yet")?;
        let of_type = |kind: &str| conditions.iter().find(|condition| condition["type"] == kind);
        let is = |kind: &str, status: &str| match of_type(kind) {
            None => bail!("no {kind}"),
            Some(found) if found["status"] == status && &found["observedGeneration"] == generation => Ok(found),
            Some(found) => bail!("{found}"),
        };
        let names = |condition: &Value, words: &[&str]| {
            let message = condition["message"].as_str().unwrap_or_default();
            let missing: Vec<&&str> = words.iter().filter(|word| !message.contains(**word)).collect();
            ensure!(missing.is_empty(), "{message:?} does not name {missing:?}");
            Ok(())
        };
        is("ResolvedWaypoints", "True")?;
        match expected {
            Said::CarriedOut | Said::NoSuchKind(_) => {
                is("Accepted", "True")?;
                is("ResolvedRefs", "True")?;
                ensure!(of_type("PartiallyInvalid").is_none(), "it is said to be done in part");
            }
            Said::Unresolved(words) => {
                is("Accepted", "True")?;
                names(is("ResolvedRefs", "False")?, words)?;
            }
            Said::Refused(words) => names(is("PartiallyInvalid", "True").or_else(|_| is("Accepted", "False"))?, words)?,
        }
    }
    Ok(())
}

#[test]
fn the_tables_have_all_cases_of_the_suite_and_every_debt_is_one_that_is_told() {
    let cases = conformance::all();
    let found: Vec<(&str, usize)> = cases.iter().map(|case| (case.name, case.vectors.len())).collect();
    assert_eq!(found[..SUITE.len()], *SUITE);
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    for case in &cases {
        let owes = case.vectors.iter().filter(|vector| vector.mark != Mark::Passes).count();
        let told = matches!(case.said, Said::Refused(_) | Said::NoSuchKind(_));
        assert_eq!(owes, if told { case.vectors.len() } else { 0 }, "{}", case.name);
    }
}

#[test]
fn what_can_be_claimed_is_what_the_tables_show() {
    let shown: Vec<&str> = conformance::shown(&conformance::all()).into_iter().collect();
    assert_eq!(shown, FEATURES);
}

#[test]
fn a_mark_that_is_wrong_is_told_either_way() {
    let report = Report { hostname: "echo-v1-abc".into(), namespace: MESH.into(), ..Report::default() };
    let good = Answer { status: 200, body: serde_json::to_string(&report).expect("JSON"), ..Answer::default() };
    let refused = Answer { status: 500, ..Answer::default() };
    let three = |answer: &Answer| vec![answer.clone(), answer.clone(), answer.clone()];
    let vector = || get("/").lands_on("echo-v1");
    assert!(vector().judge(&three(&good)).is_ok());
    assert!(vector().judge(&three(&good)[..2]).is_err(), "two are not three");
    assert!(vector().judge(&[good.clone(), good.clone(), refused.clone()]).is_err());
    assert!(get("/").lands_on("echo-v2").judge(&three(&good)).is_err());
    assert!(get("/").arrives_with("x-set", "a").judge(&three(&good)).is_err());
    assert!(get("/").arrives_without("x-set").judge(&three(&good)).is_ok());
    assert!(get("/").returns("x-set", "a").judge(&three(&good)).is_err());
    assert!(get("/").takes(1).judge(&three(&good)).is_err());
    assert!(get("/").how(How::Http2).answered(404).judge(&three(&refused)).is_err());

    let owed = vector().owed("something", 500);
    assert!(owed.judge(&three(&refused)).is_ok());
    let told = owed.judge(&three(&good)).expect_err("it holds").to_string();
    assert!(told.contains("take the mark off"), "{told}");
    assert!(owed.judge(&[refused.clone(), refused.clone(), good.clone()]).is_err(), "neither way");

    let split = get("/").shared(&[("echo-v1", 70), ("500", 30)]);
    let of = |served: usize| [vec![good.clone(); served], vec![refused.clone(); 500 - served]].concat();
    for (served, holds) in [(350, true), (374, true), (326, true), (376, false), (324, false), (500, false)] {
        assert_eq!(split.judge(&of(served)).is_ok(), holds, "{served}");
    }
}
