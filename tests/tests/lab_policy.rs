//! Malformed policies and routes, applied with `kubectl` to a running mesh: each is refused or its status names the field, what
//! is half readable errs on the closed side, and everything else stays in force.

#![forbid(unsafe_code)]

mod support;

use std::fmt::Write as _;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::wait;
use serde_json::Value;

use support::{Case, Stage, said};

const CASES: &[Case] = &[
    ("an invalid IP block costs an ALLOW only its own rule", invalid_ip_block),
    ("a DENY with an unreadable port denies every port", invalid_port_in_deny),
    ("a DENY with an unknown condition stays closed", unknown_condition_in_deny),
    ("an ALLOW with an unknown condition lets nobody in by that rule", unknown_condition_in_allow),
    ("action CUSTOM without a waypoint is reported and changes nothing", custom_action),
    ("an HTTP attribute in a connection policy is reported and errs on the closed side", http_attribute),
    ("an unknown field is refused by both kubectls and named", unknown_field),
    ("an unknown action is refused and named", unknown_action),
    ("rules of the wrong type are refused and named", rules_of_wrong_type),
    ("an unknown mTLS mode is refused and STRICT stays", unknown_mtls_mode),
    ("a policy for a Service that does not exist says so", missing_target),
    ("a request policy with an unreadable path stays closed for what it denies", unreadable_path),
    ("a route with a broken regular expression keeps its other rules", broken_regex),
    ("a route to a missing backend answers 500 there and nowhere else", missing_backend),
    ("an unknown filter is refused, an unsupported one is named and its requests answered 500", filters),
];

#[test]
fn malformed_policies_are_named_and_everything_else_stays_in_force() {
    support::run("badpol", CASES);
}

const SERVER: &str = "http://server-v1/";
const REFUSED: &str = "000";
const GUARD: &str = "server-not-other";

/// Configuration is judged within this time of being applied.
const JUDGED: Duration = Duration::from_secs(2);

/// Applies objects with a present `kubectl`, which leaves validation to the API server, and says what came of it.
fn apply_now(stage: &Stage, objects: &str) -> Result<Output> {
    let session = &stage.teller.session;
    let mut command = Command::new(session.places.current_kubectl()?);
    command.arg("--kubeconfig").arg(session.kubeconfig()).env("HOME", &session.record.run_dir);
    feed(command.args(["apply", "-f", "-"]), objects)
}

/// Applies objects with `kubectl` 1.20, which validates them itself.
fn apply_old(stage: &Stage, objects: &str) -> Result<Output> {
    feed(&mut stage.teller.session.kubectl(&["apply", "-f", "-"])?, objects)
}

/// Applies objects that the API server accepts.
fn apply(stage: &Stage, objects: &str) -> Result<()> {
    let output = apply_now(stage, objects)?;
    ensure!(output.status.success(), "{}", said(&output));
    Ok(())
}

/// Deletes an object of namespace `shop`.
fn delete(stage: &Stage, kind: &str, name: &str) -> Result<()> {
    stage.kubectl(&["-n", "shop", "delete", kind, name]).map(drop)
}

/// Runs a command with this on its standard input.
fn feed(command: &mut Command, input: &str) -> Result<Output> {
    use std::io::Write as _;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("standard input was piped")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

/// An AuthorizationPolicy for the servers.
fn policy(name: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec:\n  selector: {{matchLabels: {{app: server}}}}\n  action: {action}\n  rules: {rules}\n"
    )
}

/// Applies a policy beside a good one and waits for its verdict; returns the named condition's status and message.
fn judged(stage: &Stage, kind: &str, name: &str, condition: &str, object: &str) -> Result<(String, String)> {
    apply(stage, object)?;
    let applied = Instant::now();
    let found = wait::until(&format!("a verdict on {kind}/{name}"), JUDGED, || {
        let object: Value = serde_json::from_str(&stage.kubectl(&["-n", "shop", "get", kind, name, "-o", "json"])?)?;
        let generation = object["metadata"]["generation"].clone();
        let conditions = match kind {
            "httproute" => object["status"]["parents"][0]["conditions"].clone(),
            _ => object["status"]["conditions"].clone(),
        };
        let all = conditions.as_array().context("no conditions yet")?;
        let found = all.iter().find(|c| c["type"] == condition && c["observedGeneration"] == generation);
        let found = found.with_context(|| format!("no condition {condition} yet: {conditions}"))?;
        let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
        Ok((text("status"), text("message")))
    })?;
    println!("  {kind}/{name} after {} ms: {condition}={} {}", applied.elapsed().as_millis(), found.0, found.1);
    Ok(found)
}

fn names(message: &str, words: &[&str]) -> Result<()> {
    let missing: Vec<_> = words.iter().filter(|word| !message.contains(**word)).collect();
    ensure!(missing.is_empty(), "{message:?} does not mention {missing:?}");
    Ok(())
}

fn refused(output: &Output, words: &[&str]) -> Result<()> {
    ensure!(!output.status.success(), "accepted: {}", said(output));
    names(&said(output), words)
}

fn does_not_exist(stage: &Stage, kind: &str, name: &str) -> Result<()> {
    let all = stage.kubectl(&["-n", "shop", "get", kind, "-o", "name"])?;
    ensure!(!all.lines().any(|line| line.ends_with(&format!("/{name}"))), "{name} was stored: {all}");
    Ok(())
}

/// Runs `check` while a good policy keeps `other` out, and proves before and after that it does.
fn beside_a_good_policy(stage: &Stage, check: impl FnOnce() -> Result<()>) -> Result<()> {
    stage.kubectl(&["apply", "-f", "tests/demo/deny-other.yaml"])?;
    stage.comes_to("other", &[SERVER], REFUSED)?;
    let outcome = check();
    let kept_out = stage.request("other", &[SERVER])?;
    stage.kubectl(&["delete", "-f", "tests/demo/deny-other.yaml"])?;
    outcome?;
    ensure!(kept_out.status == REFUSED, "policy {GUARD} was lost: {kept_out:?}");
    stage.comes_to("client", &[SERVER], "200")?;
    stage.comes_to("other", &[SERVER], "200")
}

fn invalid_ip_block(stage: &Stage) -> Result<()> {
    beside_a_good_policy(stage, || {
        let rules = "[{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}, \
                      {from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]";
        let bad = policy("bad", "ALLOW", rules);
        let (_, message) = judged(stage, "authorizationpolicy", "bad", "ZtunnelAccepted", &bad)?;
        names(&message, &["rules[0]", "ipBlocks", "10.0.0.0/33", "left out"])?;
        ensure!(!message.contains("rules[1]"), "{message}");
        // The rule that can be read is in force, the other lets nobody in.
        stage.comes_to("stranger", &["http://server-v1.shop/"], REFUSED)?;
        stage.comes_to("client", &[SERVER], "200")?;
        delete(stage, "authorizationpolicy", "bad")
    })
}

fn invalid_port_in_deny(stage: &Stage) -> Result<()> {
    beside_a_good_policy(stage, || {
        let rules = "[{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}], \
                       to: [{operation: {ports: [http]}}]}]";
        let bad = policy("bad", "DENY", rules);
        let (_, message) = judged(stage, "authorizationpolicy", "bad", "ZtunnelAccepted", &bad)?;
        names(&message, &["rules[0]", "ports", "\"http\"", "not a port"])?;
        stage.comes_to("client", &[SERVER], REFUSED)?;
        // What it says can be read: it speaks of the client alone.
        stage.comes_to("stranger", &["http://server-v1.shop/"], "200")?;
        delete(stage, "authorizationpolicy", "bad")
    })
}

fn unknown_condition_in_deny(stage: &Stage) -> Result<()> {
    beside_a_good_policy(stage, || {
        let rules = "[{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}], \
                       when: [{key: source.colour, values: [blue]}]}]";
        let bad = policy("bad", "DENY", rules);
        let (_, message) = judged(stage, "authorizationpolicy", "bad", "ZtunnelAccepted", &bad)?;
        names(&message, &["rules[0]", "source.colour"])?;
        stage.comes_to("client", &[SERVER], REFUSED)?;
        delete(stage, "authorizationpolicy", "bad")
    })
}

fn unknown_condition_in_allow(stage: &Stage) -> Result<()> {
    let rules = "[{when: [{key: source.colour, values: [blue]}]}]";
    let bad = policy("bad", "ALLOW", rules);
    let (_, message) = judged(stage, "authorizationpolicy", "bad", "ZtunnelAccepted", &bad)?;
    names(&message, &["rules[0]", "source.colour", "left out"])?;
    stage.comes_to("client", &[SERVER], REFUSED)?;
    delete(stage, "authorizationpolicy", "bad")?;
    stage.traffic_flows()
}

fn custom_action(stage: &Stage) -> Result<()> {
    beside_a_good_policy(stage, || {
        let bad = policy("bad", "CUSTOM", "[{}]");
        let (status, message) = judged(stage, "authorizationpolicy", "bad", "ZtunnelAccepted", &bad)?;
        ensure!(status == "False", "{message}");
        names(&message, &["CUSTOM", "not enforced", "targetRefs"])?;
        let answer = stage.request("client", &[SERVER])?;
        ensure!(answer.good(), "{answer:?}");
        delete(stage, "authorizationpolicy", "bad")
    })
}

fn http_attribute(stage: &Stage) -> Result<()> {
    beside_a_good_policy(stage, || {
        let client = "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]";
        // A DENY of POST to a port that cannot see the method denies the port.
        let rules = format!("[{{{client}, to: [{{operation: {{ports: ['8080'], methods: [POST]}}}}]}}]");
        let bad = policy("bad", "DENY", &rules);
        let (_, message) = judged(stage, "authorizationpolicy", "bad", "ZtunnelAccepted", &bad)?;
        names(&message, &["rules[0]", "methods", "waypoint"])?;
        stage.comes_to("client", &[SERVER], REFUSED)?;
        // Of this one nothing is left, which the status must say.
        let rules = format!("[{{{client}, to: [{{operation: {{methods: [POST]}}}}]}}]");
        let bad = policy("bad", "DENY", &rules);
        let (_, message) = judged(stage, "authorizationpolicy", "bad", "ZtunnelAccepted", &bad)?;
        names(&message, &["rules[0]", "methods", "denies nothing"])?;
        stage.comes_to("client", &[SERVER], "200")?;
        delete(stage, "authorizationpolicy", "bad")
    })
}

fn unknown_field(stage: &Stage) -> Result<()> {
    // Without the field the rule would be empty, and an empty rule of an ALLOW lets everybody in.
    let bad = policy("bad", "ALLOW", "[{form: [{source: {principals: [x]}}]}]");
    refused(&apply_now(stage, &bad)?, &["unknown field", "form"])?;
    refused(&apply_old(stage, &bad)?, &["unknown field", "form"])?;
    does_not_exist(stage, "authorizationpolicies", "bad")?;
    stage.traffic_flows()
}

fn unknown_action(stage: &Stage) -> Result<()> {
    let bad = policy("bad", "DROP", "[{}]");
    refused(&apply_now(stage, &bad)?, &["spec.action", "DROP", "DENY"])?;
    refused(&apply_old(stage, &bad)?, &["action"])?;
    does_not_exist(stage, "authorizationpolicies", "bad")
}

fn rules_of_wrong_type(stage: &Stage) -> Result<()> {
    let bad = policy("bad", "DENY", "everything");
    refused(&apply_now(stage, &bad)?, &["spec.rules"])?;
    refused(&apply_old(stage, &bad)?, &["rules"])?;
    does_not_exist(stage, "authorizationpolicies", "bad")
}

fn unknown_mtls_mode(stage: &Stage) -> Result<()> {
    let stranger: &[&str] = &["http://server-v1.shop/"];
    stage.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    stage.comes_to("stranger", stranger, REFUSED)?;
    let bad = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
               metadata: {name: default, namespace: shop}\nspec: {mtls: {mode: STRICKT}}\n";
    refused(&apply_now(stage, bad)?, &["spec.mtls.mode", "STRICKT", "STRICT"])?;
    refused(&apply_old(stage, bad)?, &["mode"])?;
    let answer = stage.request("stranger", stranger)?;
    ensure!(answer.status == REFUSED, "STRICT was lost: {answer:?}");
    stage.traffic_flows()?;
    // A port that is none does not get past the rules of its definition.
    let bad = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: ports, namespace: shop}\n\
               spec: {selector: {matchLabels: {app: server}}, mtls: {mode: STRICT}, portLevelMtls: {http: {mode: PERMISSIVE}}}\n";
    refused(&apply_now(stage, bad)?, &["spec.portLevelMtls", "not an int: http", "the keys are ports"])?;
    refused(&apply_old(stage, bad)?, &["spec.portLevelMtls", "the keys are ports"])?;
    does_not_exist(stage, "peerauthentications", "ports")?;
    delete(stage, "peerauthentication", "default")?;
    stage.comes_to("stranger", stranger, "200")
}

fn missing_target(stage: &Stage) -> Result<()> {
    beside_a_good_policy(stage, || {
        let bad = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: shop}\n\
                   spec:\n  targetRefs: [{group: \"\", kind: Service, name: nowhere}]\n  action: DENY\n  rules: [{}]\n";
        let (status, message) = judged(stage, "authorizationpolicy", "bad", "WaypointAccepted", bad)?;
        ensure!(status == "False", "{message}");
        names(&message, &["shop/nowhere", "does not exist"])?;
        let answer = stage.request("client", &[SERVER])?;
        ensure!(answer.good(), "{answer:?}");
        delete(stage, "authorizationpolicy", "bad")
    })
}

/// Runs `check` with Service `server` behind a waypoint.
fn with_waypoint(stage: &Stage, check: impl FnOnce() -> Result<()>) -> Result<()> {
    stage.kubectl(&["apply", "-f", "tests/demo/waypoint.yaml"])?;
    stage.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=30s"])?;
    stage.kubectl(&["-n", "shop", "label", "service", "server", "istio.io/use-waypoint=waypoint", "--overwrite"])?;
    let waypoint = stage.teller.session.pod("shop/waypoint")?;
    let path = format!("/probe-{}", uuid::Uuid::new_v4().simple());
    wait::until("requests to go through the waypoint", SETTLE, || {
        let answer = stage.request("client", &[&format!("http://server{path}")])?;
        ensure!(answer.good() && stage.log(&waypoint)?.contains(&path), "{answer:?}");
        Ok(())
    })?;
    check()
}

fn unreadable_path(stage: &Stage) -> Result<()> {
    with_waypoint(stage, || {
        let bad = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: shop}\n\
                   spec:\n  targetRefs: [{group: \"\", kind: Service, name: server}]\n  action: DENY\n\
                   \x20 rules: [{to: [{operation: {methods: [GET], paths: [\"/{id}\"]}}]}]\n";
        let (_, message) = judged(stage, "authorizationpolicy", "bad", "WaypointAccepted", bad)?;
        names(&message, &["rules[0]", "paths", "/{id}"])?;
        stage.comes_to("client", &["http://server/anything"], "403")?;
        // The method can be read.
        stage.comes_to("client", &["-X", "PUT", "http://server/anything"], "200")?;
        // Nor is there a way around the waypoint while the policy is there.
        stage.comes_to("client", &[SERVER], REFUSED)?;
        delete(stage, "authorizationpolicy", "bad")?;
        stage.comes_to("client", &["http://server/anything"], "200")?;
        stage.traffic_flows()
    })
}

/// An HTTPRoute of Service `server` with these rules.
fn route(rules: &str) -> String {
    let mut text = String::from("apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n");
    text += "metadata: {name: bad, namespace: shop}\nspec:\n";
    text += "  parentRefs: [{group: \"\", kind: Service, name: server, port: 80}]\n";
    let _ = writeln!(text, "  rules: {rules}");
    text
}

fn broken_regex(stage: &Stage) -> Result<()> {
    with_waypoint(stage, || {
        let bad = route(
            "[{matches: [{path: {type: RegularExpression, value: \"/a(\"}}], backendRefs: [{name: server-v1, port: 80}]}, \
              {matches: [{path: {type: PathPrefix, value: /good}}], backendRefs: [{name: server-v2, port: 80}]}]",
        );
        let (_, message) = judged(stage, "httproute", "bad", "PartiallyInvalid", &bad)?;
        names(&message, &["rules[0]", "matches[0]", "/a(", "regular expression"])?;
        wait::until("the good rule to be in force", SETTLE, || {
            let answer = stage.request("client", &["http://server/good"])?;
            ensure!(answer.good() && answer.body.contains("server-v2"), "{answer:?}");
            Ok(())
        })?;
        let answer = stage.request("client", &["http://server/a("])?;
        ensure!(answer.status == "404", "no rule matches it: {answer:?}");
        delete(stage, "httproute", "bad")?;
        stage.comes_to("client", &["http://server/a("], "200")
    })
}

fn missing_backend(stage: &Stage) -> Result<()> {
    with_waypoint(stage, || {
        let bad = route(
            "[{matches: [{path: {type: PathPrefix, value: /lost}}], backendRefs: [{name: nowhere, port: 80}]}, \
              {backendRefs: [{name: server-v1, port: 80}]}]",
        );
        let (status, message) = judged(stage, "httproute", "bad", "ResolvedRefs", &bad)?;
        ensure!(status == "False", "{message}");
        names(&message, &["rules[0].backendRefs[0]", "shop/nowhere", "does not exist"])?;
        stage.comes_to("client", &["http://server/lost"], "500")?;
        stage.comes_to("client", &["http://server/"], "200")?;
        stage.traffic_flows()?;
        delete(stage, "httproute", "bad")?;
        stage.comes_to("client", &["http://server/lost"], "200")
    })
}

fn filters(stage: &Stage) -> Result<()> {
    with_waypoint(stage, || {
        let unknown = route("[{filters: [{type: Teleport}], backendRefs: [{name: server-v1, port: 80}]}]");
        refused(&apply_now(stage, &unknown)?, &["spec.rules[0].filters[0].type", "Teleport"])?;
        does_not_exist(stage, "httproutes", "bad")?;
        let unsupported = route(
            "[{matches: [{path: {type: PathPrefix, value: /lost}}], backendRefs: [{name: server-v1, port: 80}], \
               filters: [{type: RequestMirror, requestMirror: {backendRef: {name: server-v2, port: 80}}}]}, \
              {backendRefs: [{name: server-v1, port: 80}]}]",
        );
        let (_, message) = judged(stage, "httproute", "bad", "PartiallyInvalid", &unsupported)?;
        names(&message, &["rules[0]", "filters[0]", "RequestMirror", "not supported"])?;
        stage.comes_to("client", &["http://server/lost"], "500")?;
        stage.comes_to("client", &["http://server/"], "200")?;
        delete(stage, "httproute", "bad")?;
        stage.comes_to("client", &["http://server/lost"], "200")
    })
}
