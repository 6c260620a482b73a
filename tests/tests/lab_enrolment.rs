//! Enrolment of pods that live: what labels and annotations do to them, what a user is told, and pods that come, go and
//! come back under the same name.

#![forbid(unsafe_code)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::state::Pod;
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::wait;

use support::{Case, Stage, said};

const CASES: &[Case] = &[
    ("each pod is captured as its and its namespace's labels say, and a user sees why not", as_labels_say),
    ("labels and annotations of running pods are followed", followed_live),
    ("inbound capture is bypassed and taken back while the pod runs", bypass_flips),
    ("a pod that is being deleted stays captured until it has ended", until_it_ends),
    ("a name that comes back with another account never has the old one's identity", same_name_other_account),
    ("control plane and proxy die while a pod leaves and joins, and it ends as asked", both_die_meanwhile),
    ("pods that come and go fast leave nothing behind", come_and_go),
];

#[test]
fn pods_are_enrolled_by_the_rules() {
    support::run("enrol", CASES);
}

/// Longer than a deletion with everything that follows it on the node, or than the control plane takes to come back.
const GONE: Duration = Duration::from_secs(40);
/// Pods that come and go, and how many at a time.
const COMING_AND_GOING: usize = 24;
const AT_ONCE: usize = 6;

/// A pod that does nothing, with these lines of metadata and spec.
fn idle(namespace: &str, name: &str, metadata: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}{metadata}}}\n\
         spec: {{nodeName: node-a, terminationGracePeriodSeconds: 1, containers: [{{name: curl, image: curl}}]{spec}}}\n---\n"
    )
}

fn delete(stage: &Stage, namespace: &str, names: &[&str]) -> Result<()> {
    let mut arguments = vec!["-n", namespace, "delete", "pod", "--wait=false"];
    arguments.extend(names);
    stage.kubectl(&arguments)?;
    wait::until("the pods to be gone", SETTLE, || {
        let left: Vec<String> = stage.teller.session.pods().into_iter().map(|pod| pod.name).collect();
        ensure!(names.iter().all(|name| !left.iter().any(|pod| pod == name)), "{left:?}");
        Ok(())
    })
}

fn pod(stage: &Stage, name: &str) -> Result<Pod> {
    wait::until(&format!("pod {name} to run"), SETTLE, || stage.teller.session.pod(name))
}

fn becomes(stage: &Stage, pod: &Pod, redirection: &str) -> Result<()> {
    wait::until(&format!("{} to be {redirection:?}", pod.name), GONE, || {
        let now = stage.teller.session.redirection(pod)?;
        ensure!(now == redirection, "it is {now:?}");
        Ok(())
    })
}

/// Namespace, name, what is special in metadata and spec, what the annotation must say, the reason of an event.
type Row<'a> = (&'a str, &'a str, String, &'a str, &'a str, Option<&'a str>);

fn as_labels_say(stage: &Stage) -> Result<()> {
    let label = |value: &str| format!(", labels: {{istio.io/dataplane-mode: {value}}}");
    let note = |key: &str, value: &str| format!(", annotations: {{{key}: {value}}}");
    // Namespace shop says ambient, namespace outside nothing.
    let cases: [Row<'_>; 8] = [
        ("shop", "plain", String::new(), "", "enabled", None),
        ("shop", "opted-out", label("none"), "", "", None),
        ("shop", "sideways", label("sideways"), "", "enabled", Some("InvalidLabel")),
        ("shop", "on-host", String::new(), ", hostNetwork: true", "", Some("NotEnrolled")),
        ("shop", "has-sidecar", note("sidecar.istio.io/status", "'{}'"), "", "", Some("NotEnrolled")),
        ("shop", "has-machine", note("istio.io/reroute-virtual-interfaces", "vm0"), "", "enabled", Some("Unsupported")),
        ("outside", "silent", String::new(), "", "", None),
        ("outside", "opted-in", label("ambient"), "", "enabled", None),
    ];
    let manifest: String = cases.iter().map(|(ns, name, meta, spec, ..)| idle(ns, name, meta, spec)).collect();
    let ended =
        idle("shop", "ended", "", ", restartPolicy: Never").replace("image: curl", "image: curl, command: ['true']");
    stage.teller.session.apply(&(manifest + &ended))?;
    for (namespace, name, _, _, redirection, reason) in &cases {
        let of_pod = pod(stage, &format!("{namespace}/{name}"))?;
        becomes(stage, &of_pod, redirection)?;
        let about = format!("involvedObject.name={name}");
        let path = "jsonpath={range .items[*]}{.reason}: {.message}{\"\\n\"}{end}";
        let events = || stage.kubectl(&["-n", namespace, "get", "events", "--field-selector", &about, "-o", path]);
        match reason {
            Some(reason) => {
                let told = wait::until(&format!("an event of {name}"), SETTLE, || {
                    let told = events()?;
                    ensure!(told.lines().any(|line| line.starts_with(reason)), "{told:?}");
                    Ok(told)
                })?;
                println!("  {name}: {}", told.trim());
            }
            None => ensure!(events()?.is_empty(), "{name}: {}", events()?),
        }
    }
    let described = stage.kubectl(&["-n", "shop", "describe", "pod", "on-host"])?;
    ensure!(described.contains("NotEnrolled") && described.contains("hostNetwork"), "{described}");
    let path = "jsonpath={.status.phase} {.metadata.annotations}";
    let ended = wait::until("the pod that ends to have ended", SETTLE, || {
        let said = stage.kubectl(&["-n", "shop", "get", "pod", "ended", "-o", path])?;
        ensure!(said.starts_with("Succeeded"), "{said}");
        ensure!(!said.contains("redirection"), "{said}");
        Ok(said)
    })?;
    println!("  ended: {ended}");
    // What was to stay outside has stayed there all the while.
    for (namespace, name, _, _, redirection, _) in &cases {
        let now = stage.teller.session.redirection(&pod(stage, &format!("{namespace}/{name}"))?)?;
        ensure!(now == *redirection, "{name} is {now:?}");
    }
    stage.kubectl(&["-n", "shop", "delete", "pod", "ended", "--wait=false"])?;
    delete(stage, "shop", &["plain", "opted-out", "sideways", "on-host", "has-sidecar", "has-machine"])?;
    delete(stage, "outside", &["silent", "opted-in"])
}

fn followed_live(stage: &Stage) -> Result<()> {
    stage.teller.session.apply(&idle("shop", "moody", "", ""))?;
    let moody = pod(stage, "shop/moody")?;
    becomes(stage, &moody, "enabled")?;
    let set = |verb: &str, value: &str| stage.kubectl(&["-n", "shop", verb, "pod", "moody", "--overwrite", value]);
    for (verb, value, redirection) in [
        ("label", "istio.io/dataplane-mode=none", ""),
        ("label", "istio.io/dataplane-mode=ambient", "enabled"),
        ("label", "istio.io/dataplane-mode-", "enabled"),
        // Whoever claims that a sidecar was injected gets his will, late as it is.
        ("annotate", "sidecar.istio.io/status={}", ""),
        ("annotate", "sidecar.istio.io/status-", "enabled"),
    ] {
        set(verb, value)?;
        becomes(stage, &moody, redirection).with_context(|| format!("{verb} {value}"))?;
        let answer = stage.request("moody", &["http://server-v1/"])?;
        ensure!(answer.good(), "{verb} {value}: {answer:?}");
    }
    delete(stage, "shop", &["moody"])
}

fn bypass_flips(stage: &Stage) -> Result<()> {
    let server = stage.teller.session.pod("server-v1")?;
    let annotate = |value: &str| {
        let value = format!("ambient.istio.io/bypass-inbound-capture{value}");
        stage.kubectl(&["-n", "shop", "annotate", "pod", &server.name, "--overwrite", &value])
    };
    stage.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    let flips = || -> Result<()> {
        for (value, status) in [("=true", "200"), ("=false", "000"), ("=T", "200"), ("-", "000")] {
            annotate(value)?;
            stage.comes_to("stranger", &["http://server-v1.shop/"], status).with_context(|| value.to_owned())?;
            stage.comes_to("client", &["http://server-v1/"], "200")?;
        }
        Ok(())
    };
    let outcome = flips();
    if outcome.is_err() {
        annotate("-")?;
    }
    stage.kubectl(&["delete", "-f", "tests/demo/strict.yaml"])?;
    outcome
}

fn until_it_ends(stage: &Stage) -> Result<()> {
    // It will not end before it must, and asks on: what it sends while it is being deleted is still the mesh's.
    let script =
        "trap '' TERM; while :; do curl -s -m 2 -o /dev/null -w '%{http_code}\\n' http://server-v1/; sleep 0.1; done";
    let manifest = idle("shop", "stubborn", "", "")
        .replace("terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 60")
        .replace("image: curl", &format!("image: curl, command: [bash, -c, \"{}\"]", script.replace('\\', "\\\\")));
    stage.teller.session.apply(&manifest)?;
    let stubborn = pod(stage, "shop/stubborn")?;
    becomes(stage, &stubborn, "enabled")?;
    stage.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    let outcome = (|| -> Result<()> {
        stage.comes_to("stranger", &["http://server-v1.shop/"], "000")?;
        let answers = || -> Result<Vec<String>> { Ok(stage.log(&stubborn)?.lines().map(str::to_owned).collect()) };
        stage.kubectl(&["-n", "shop", "delete", "pod", "stubborn", "--wait=false"])?;
        let deleted = answers()?.len();
        // STRICT lets in nothing but what is captured.
        let later = wait::until("ten answers while it is being deleted", SETTLE, || {
            let said = answers()?;
            ensure!(said.len() >= deleted + 10, "{} of {}", said.len(), deleted + 10);
            Ok(said[deleted..].to_vec())
        })?;
        let stamp = ["-n", "shop", "get", "pod", "stubborn", "-o", "jsonpath={.metadata.deletionTimestamp}"];
        ensure!(!stage.kubectl(&stamp)?.is_empty(), "it is not being deleted");
        ensure!(stage.teller.session.redirection(&stubborn)? == "enabled", "taken out before its end");
        ensure!(later.iter().all(|status| status == "200"), "{later:?}");
        Ok(())
    })();
    stage.kubectl(&["delete", "-f", "tests/demo/strict.yaml"])?;
    let ended =
        stage.kubectl(&["-n", "shop", "delete", "pod", "stubborn", "--force", "--grace-period=0", "--wait=false"]);
    outcome.and(ended)?;
    wait::until("the pod to be gone", SETTLE, || {
        ensure!(stage.teller.session.pods().iter().all(|pod| pod.uid != stubborn.uid), "it is there");
        Ok(())
    })
}

/// As a StatefulSet's pods come back, and faster: the successor is there before the predecessor has left everywhere.
fn same_name_other_account(stage: &Stage) -> Result<()> {
    stage.kubectl(&["apply", "-f", "tests/demo/allow-client.yaml"])?;
    stage.comes_to("other", &["http://server-v1/"], "000")?;
    let outcome = (|| -> Result<()> {
        for round in 0..6 {
            let (account, allowed) = if round % 2 == 0 { ("client", true) } else { ("other", false) };
            stage.teller.session.apply(&idle("shop", "web-0", "", &format!(", serviceAccountName: {account}")))?;
            let web = pod(stage, "shop/web-0")?;
            let mut statuses: BTreeMap<String, usize> = BTreeMap::new();
            let end = Instant::now() + SETTLE;
            // From its first moment on, until it is in the mesh for three answers.
            let mut after = 0;
            while after < 3 {
                ensure!(Instant::now() < end, "round {round}: {statuses:?}");
                let joined = stage.teller.session.redirection(&web)? == "enabled";
                let answer = stage.request("shop/web-0", &["http://server-v1/"])?;
                *statuses.entry(answer.status.clone()).or_default() += 1;
                ensure!(
                    allowed || !answer.good(),
                    "round {round}: {account} was taken for its predecessor: {answer:?}"
                );
                after += usize::from(joined && answer.good() == allowed);
            }
            println!("  round {round}: {account} {statuses:?}");
            stage.kubectl(&["-n", "shop", "delete", "pod", "web-0", "--force", "--grace-period=0", "--wait=false"])?;
            wait::until("the name to be free", SETTLE, || {
                let got = stage.teller.session.kubectl_output(&["-n", "shop", "get", "pod", "web-0"])?;
                ensure!(!got.status.success(), "{}", said(&got));
                let gone = stage.teller.session.pods().iter().all(|pod| pod.uid != web.uid);
                ensure!(gone, "its processes run");
                Ok(())
            })?;
        }
        Ok(())
    })();
    stage.kubectl(&["delete", "-f", "tests/demo/allow-client.yaml"])?;
    outcome?;
    stage.comes_to("other", &["http://server-v1/"], "200")
}

fn both_die_meanwhile(stage: &Stage) -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    let session = &stage.teller.session;
    stage.teller.session.apply(&idle("shop", "moody", "", ""))?;
    let moody = pod(stage, "shop/moody")?;
    becomes(stage, &moody, "enabled")?;
    let slay = |victim: &Pod| -> Result<()> {
        Ok(kill(nix::unistd::Pid::from_raw(i32::try_from(victim.main()?.pid)?), Signal::SIGKILL)?)
    };
    let label = |value: &str| stage.kubectl(&["-n", "shop", "label", "pod", "moody", "--overwrite", value]);
    for round in 0..3 {
        let victim = if round % 2 == 0 { session.pod("istio-system/istiod")? } else { session.proxy("node-a")? };
        label("istio.io/dataplane-mode=none")?;
        slay(&victim)?;
        becomes(stage, &moody, "")?;
        stage.comes_to("moody", &["http://server-v1/"], "200")?;
        let victim = if round % 2 == 0 { session.proxy("node-a")? } else { session.pod("istio-system/istiod")? };
        label("istio.io/dataplane-mode-")?;
        slay(&victim)?;
        becomes(stage, &moody, "enabled")?;
        stage.comes_to("moody", &["http://server-v1/"], "200")?;
    }
    // Captured for good and not just said to be: nothing else comes through.
    stage.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    let strict = stage.comes_to("stranger", &["http://server-v1.shop/"], "000");
    let captured = stage.comes_to("moody", &["http://server-v1/"], "200");
    stage.kubectl(&["delete", "-f", "tests/demo/strict.yaml"])?;
    strict.and(captured)?;
    delete(stage, "shop", &["moody"])
}

/// What ztunnel holds.
#[derive(Debug, PartialEq)]
struct Held {
    descriptors: usize,
    pins: BTreeSet<PathBuf>,
    pods: usize,
}

fn held(stage: &Stage) -> Result<Held> {
    let session = &stage.teller.session;
    let proxy = session.proxy("node-a")?;
    // The container's first process only supervises.
    let supervisor = proxy.main()?.pid;
    let children = std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))?;
    let serving = children.split_whitespace().next().context("it supervises nobody")?;
    let descriptors = std::fs::read_dir(format!("/proc/{serving}/fd"))?.count();
    let mut pins = BTreeSet::new();
    walk(&session.record.bpffs.join("node-a"), &mut pins)?;
    let argv = ["curl", "-sS", "-m", "3", "http://127.0.0.1:15000/config_dump"];
    let output = session.exec(&proxy.name, &argv)?.output()?;
    let dump: serde_json::Value = serde_json::from_slice(&output.stdout).with_context(|| said(&output))?;
    let pods = dump["workloadState"].as_object().context("no workloadState")?.len();
    Ok(Held { descriptors, pins, pods })
}

fn walk(directory: &Path, files: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), files)?;
        } else {
            files.insert(entry.path());
        }
    }
    Ok(())
}

fn come_and_go(stage: &Stage) -> Result<()> {
    let pid = stage.teller.session.proxy("node-a")?.main()?.pid;
    let settled = |what: &str, before: Option<&Held>, deadline| {
        wait::until(what, deadline, || {
            let (first, second) = (held(stage)?, held(stage)?);
            ensure!(first == second, "{first:?}, {second:?}");
            let Some(before) = before else { return Ok(first) };
            // Of the cases before there may have been pins still, and a pod that was leaving.
            let more: Vec<_> = first.pins.difference(&before.pins).collect();
            ensure!(
                more.is_empty() && first.pods <= before.pods,
                "{} pods, then {}; new: {more:?}",
                before.pods,
                first.pods
            );
            Ok(first)
        })
    };
    let before = settled("a calm moment", None, SETTLE)?;
    let names: Vec<String> = (0..COMING_AND_GOING).map(|n| format!("hasty-{n}")).collect();
    for (round, batch) in names.chunks(AT_ONCE).enumerate() {
        let manifest: String = batch.iter().map(|name| idle("shop", name, "", "")).collect();
        stage.teller.session.apply(&manifest)?;
        // Each round goes at another moment: at once, when they run, when they are captured.
        match round % 3 {
            0 => {}
            1 => drop(pod(stage, &format!("shop/{}", batch[0]))?),
            _ => becomes(stage, &pod(stage, &format!("shop/{}", batch[0]))?, "enabled")?,
        }
        let mut arguments = vec!["-n", "shop", "delete", "pod", "--force", "--grace-period=0", "--wait=false"];
        arguments.push("--ignore-not-found");
        arguments.extend(batch.iter().map(String::as_str));
        stage.kubectl(&arguments)?;
    }
    let after = settled("everything of them to be gone", Some(&before), GONE)?;
    let (before, after) = (before.descriptors, after.descriptors);
    println!("  descriptors: {before} before, {after} after {COMING_AND_GOING} pods");
    // A few may be connections of the moment; one for each pod would be a leak.
    ensure!(after < before + COMING_AND_GOING / 2, "descriptors: {before} before, {after} after");
    ensure!(stage.teller.session.proxy("node-a")?.main()?.pid == pid, "ztunnel was restarted");
    stage.traffic_flows()
}
