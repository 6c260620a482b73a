//! DNS in the lab's cluster: applications resolve through ztunnel unless their pod asks otherwise.

#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared by all programs of cases; each uses its part")]
mod support;

use anyhow::{Context, Result, ensure};
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::wait;

use support::{Case, Stage};

const CASES: &[Case] = &[
    ("a request by name is resolved by ztunnel", by_name),
    ("a name outside the mesh is the cluster DNS's to deny", outside),
    ("names of ServiceEntries have addresses of their own and lead to their endpoints", service_entries),
    ("an annotation leaves a pod its own DNS while it runs", opted_out),
];

#[test]
fn names_are_resolved_by_ztunnel_unless_the_pod_asks_otherwise() {
    support::run("dns", CASES);
}

/// Sum of a metric of the client's ztunnel, of the client alone.
fn count(stage: &Stage, metric: &str) -> Result<u64> {
    let session = &stage.teller.session;
    let node = session.pod("client")?.node;
    let is_proxy = |app: &String| app == "ztunnel";
    let ztunnel = session
        .pods()
        .into_iter()
        .find(|pod| pod.node == node && pod.labels.get("app").is_some_and(is_proxy))
        .context("no ztunnel runs there")?;
    let answer =
        stage.request(&format!("{}/{}", ztunnel.namespace, ztunnel.name), &["http://localhost:15020/metrics"])?;
    let lines = answer.body.lines().filter(|line| {
        line.starts_with(&format!("{metric}{{")) && line.contains("source_canonical_service=\"client\"")
    });
    lines.map(|line| Ok(line.rsplit(' ').next().context("a value")?.parse::<u64>()?)).sum()
}

const QUERIES: &str = "istio_dns_requests_total";
const FORWARDED: &str = "istio_dns_upstream_requests_total";

fn by_name(stage: &Stage) -> Result<()> {
    let before = (count(stage, QUERIES)?, count(stage, FORWARDED)?);
    for url in ["http://server/", "http://server.shop/", "http://server.shop.svc.cluster.local/"] {
        stage.comes_to("client", &[url], "200")?;
    }
    let after = (count(stage, QUERIES)?, count(stage, FORWARDED)?);
    ensure!(after.0 >= before.0 + 3, "{before:?} {after:?}");
    ensure!(after.1 == before.1, "nobody else was asked: {before:?} {after:?}");
    Ok(())
}

fn outside(stage: &Stage) -> Result<()> {
    let before = count(stage, FORWARDED)?;
    let answer = stage.request("client", &["http://nobody.example/"])?;
    ensure!(answer.exit == 6, "could not be resolved: {answer:?}");
    ensure!(count(stage, FORWARDED)? > before, "the cluster DNS was asked");
    Ok(())
}

/// `host address` of every address that was allocated.
fn allocated(stage: &Stage) -> Result<Vec<String>> {
    let path = "jsonpath={range .items[*].status.addresses[*]}{.host} {.value}{\"\\n\"}{end}";
    let said = stage.kubectl(&["-n", "shop", "get", "serviceentries", "-o", path])?;
    let mut all: Vec<String> = said.lines().map(str::to_owned).collect();
    all.sort();
    Ok(all)
}

fn service_entries(stage: &Stage) -> Result<()> {
    let sample = "manifests/samples/service-entry.yaml";
    stage.kubectl(&["apply", "-f", sample])?;
    for (host, version) in [("catalog.internal", "v2"), ("legacy.internal", "v1")] {
        stage.comes_to("client", &[&format!("http://{host}/")], "200")?;
        let answer = stage.request("client", &[&format!("http://{host}/")])?;
        ensure!(answer.body.contains(&format!("hello from server-{version}")), "{host}: {answer:?}");
    }
    let first = allocated(stage)?;
    let hosts: Vec<&str> = first.iter().filter_map(|line| line.split_once(' ').map(|(host, _)| host)).collect();
    ensure!(hosts == ["catalog.internal", "catalog.internal", "legacy.internal", "legacy.internal"], "{first:?}");
    ensure!(first.iter().filter(|line| line.contains(" 240.240.")).count() == 2, "{first:?}");
    ensure!(first.iter().filter(|line| line.contains(" 2001:2:")).count() == 2, "{first:?}");
    let condition = "jsonpath={.items[*].status.conditions[?(@.type==\"Accepted\")].status}";
    let said = stage.kubectl(&["-n", "shop", "get", "serviceentries", "-o", condition])?;
    ensure!(said == "True True", "{said}");

    // Another control plane finds the addresses where the first wrote them down.
    stage.kubectl(&["-n", "istio-system", "delete", "pods", "-l", "app=istiod"])?;
    stage.kubectl(&["apply", "-f", "tests/demo/service-entry-late.yaml"])?;
    wait::until("the next control plane to allocate", SETTLE, || {
        let all = allocated(stage)?;
        ensure!(all.iter().any(|line| line.starts_with("late.internal ")), "{all:?}");
        let others: Vec<&String> = all.iter().filter(|line| !line.starts_with("late.internal ")).collect();
        ensure!(others == first.iter().collect::<Vec<_>>(), "{first:?} have become {others:?}");
        Ok(())
    })?;
    stage.kubectl(&["delete", "-f", "tests/demo/service-entry-late.yaml"])?;

    // A user's own address takes the place of the one that was allocated.
    let patch = r#"{"spec": {"addresses": ["192.0.2.77"]}}"#;
    stage.kubectl(&["-n", "shop", "patch", "serviceentry", "legacy", "--type=merge", "-p", patch])?;
    wait::until("the allocated address to be taken back", SETTLE, || {
        let left = allocated(stage)?;
        ensure!(left == first[..2], "{left:?}");
        Ok(())
    })?;
    stage.comes_to("client", &["--resolve", "legacy.internal:80:192.0.2.77", "http://legacy.internal/"], "200")?;

    stage.kubectl(&["delete", "-f", sample])?;
    wait::until("the names to be gone", SETTLE, || {
        let answer = stage.request("client", &["http://catalog.internal/"])?;
        ensure!(answer.exit == 6, "it is still resolved: {answer:?}");
        Ok(())
    })
}

fn opted_out(stage: &Stage) -> Result<()> {
    // Whether a request by name is seen by ztunnel's DNS.
    let is_seen = || -> Result<bool> {
        let before = count(stage, QUERIES)?;
        stage.comes_to("client", &["http://server/"], "200")?;
        Ok(count(stage, QUERIES)? > before)
    };
    let pod = stage.teller.session.pod("client")?.name;
    stage.kubectl(&["-n", "shop", "annotate", "pod", &pod, "ambient.istio.io/dns-capture=false"])?;
    wait::until("DNS to go direct", SETTLE, || {
        ensure!(!is_seen()?, "ztunnel saw the query");
        Ok(())
    })?;
    stage.kubectl(&["-n", "shop", "annotate", "pod", &pod, "ambient.istio.io/dns-capture-"])?;
    wait::until("DNS to be captured again", SETTLE, || {
        ensure!(is_seen()?, "ztunnel did not see the query");
        Ok(())
    })
}
