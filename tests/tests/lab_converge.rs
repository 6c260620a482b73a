//! How long what is applied takes to be in force, in a cluster of a thousand pods.

#![forbid(unsafe_code)]

#[allow(dead_code, reason = "a case of one kind needs only part of it")]
mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use mesh_tests::cluster::api;
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::wait;
use serde_json::{Value, json};

use support::{Case, Stage};

const CASES: &[Case] = &[("a policy is in force and its status says so in moments, beside a thousand pods", policy)];

#[test]
fn what_is_applied_is_in_force_in_moments() {
    support::run("converge", CASES);
}

const CROWD: usize = 1000;
const ROUNDS: usize = 25;
/// From `kubectl apply` returning to enforcement: half of them, and all but the slowest.
const HALF: Duration = Duration::from_millis(100);
const ALMOST_ALL: Duration = Duration::from_millis(500);
const STATUS: Duration = Duration::from_secs(2);
const SERVER: &str = "http://server-v1/";

const DENY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: moment, namespace: shop}\n\
    spec:\n  selector: {matchLabels: {app: server}}\n  action: DENY\n  rules: [{from: [{source: {namespaces: [shop]}}]}]\n";

/// Pods on nodes that nobody plays: everybody is told of them, nobody runs them.
fn crowd(stage: &Stage) -> Result<()> {
    let kubeconfig = stage.teller.session.kubeconfig();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = api::client(&kubeconfig).await?;
        let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": "crowd"}}))?;
        Api::all(client.clone()).create(&PostParams::default(), &namespace).await?;
        let pods: Api<Pod> = Api::namespaced(client, "crowd");
        let made = stream::iter((0..CROWD).map(Ok::<_, anyhow::Error>)).try_for_each_concurrent(16, |at| {
            let pods = pods.clone();
            async move {
                let name = format!("p{at}");
                let pod = json!({
                    "metadata": {"name": name, "labels": {"app": format!("a{}", at % 50)}},
                    "spec": {"nodeName": format!("n{}", at % 20), "containers": [{"name": "c", "image": "i"}]},
                });
                pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
                let status = json!({"status": {
                    "phase": "Running",
                    "podIP": format!("10.99.{}.{}", at / 250, at % 250 + 1),
                    "conditions": [{"type": "Ready", "status": "True"}],
                }});
                pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
                Ok(())
            }
        });
        made.await
    })
}

/// Asks until the answer has this status; returns how long ago `since` was then.
fn answered(stage: &Stage, status: &str, since: Instant) -> Result<Duration> {
    wait::until(&format!("an answer {status}"), SETTLE, || {
        let answer = stage.request("client", &[SERVER])?;
        ensure!(answer.status == status, "{answer:?}");
        Ok(since.elapsed())
    })
}

fn judged(stage: &Stage, since: Instant) -> Result<Duration> {
    wait::until("a status", SETTLE, || {
        let text = stage.kubectl(&["-n", "shop", "get", "authorizationpolicy", "moment", "-o", "json"])?;
        let object: Value = serde_json::from_str(&text)?;
        let conditions = object["status"]["conditions"].as_array().context("no conditions")?.clone();
        let accepted = conditions.iter().any(|c| c["type"] == "ZtunnelAccepted" && c["status"] == "True");
        ensure!(accepted, "{conditions:?}");
        Ok(since.elapsed())
    })
}

fn policy(stage: &Stage) -> Result<()> {
    crowd(stage)?;
    let (mut enforced, mut told) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        stage.teller.session.apply(DENY)?;
        let applied = Instant::now();
        enforced.push(answered(stage, "000", applied)?);
        told.push(judged(stage, applied)?);
        stage.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "moment"])?;
        answered(stage, "200", Instant::now())?;
    }
    enforced.sort_unstable();
    told.sort_unstable();
    println!("  in force after: {enforced:?}");
    println!("  status after: {told:?}");
    // One in 25 is what a percentile of 99 leaves out at the least.
    let (half, almost_all) = (enforced[ROUNDS / 2], enforced[ROUNDS - 2]);
    ensure!(half < HALF, "half of the policies took {half:?}");
    ensure!(almost_all < ALMOST_ALL, "a policy took {almost_all:?}");
    ensure!(told[ROUNDS - 2] < STATUS, "a status took {:?}", told[ROUNDS - 2]);
    Ok(())
}
