//! `istiod-lite proxy-status`: which proxies are connected to which replica of the control plane, and whether each has
//! what it should. Each replica is asked for its own, through the API server or at an address.

use anyhow::{Context as _, bail};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::connect::{CONTROL_PLANE, Cluster, Target, of_control_planes};
use super::output::{Cell, Format, Paint, Table, Tone, written};
use super::{Ending, Said};
use crate::serve::proxies::{Connected, PATH, Proxy, Type};
use crate::translate::world::MeshSettings;

const MONITORING_PORT: u16 = 15014;
/// The types behind the last columns.
const COLUMNS: [&[&str]; 5] =
    [&["Address", "Workload"], &["Authorization"], &["PodEnrolment"], &["Route"], &["HttpPolicy"]];

#[derive(Debug, Args)]
pub struct Arguments {
    /// Only this proxy: the name of its pod, or NAME.NAMESPACE.
    proxy: Option<String>,
    /// Ask the replica at this address (its monitoring port, 15014) and not those that the cluster has.
    #[arg(long, value_name = "http://HOST:PORT")]
    istiod_address: Option<http::Uri>,
    #[command(flatten)]
    target: Target,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// What one replica says.
#[derive(Debug, Serialize)]
pub struct Replica {
    pub istiod: String,
    #[serde(flatten)]
    pub connected: Connected,
}

/// How a proxy is with one type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Synced,
    /// Something is under way that it has not acknowledged.
    Stale,
    NotSent,
    Rejected,
}

impl State {
    fn of(of: &Type, current: u64) -> Self {
        if of.rejected.is_some() {
            Self::Rejected
        } else if of.acked >= current {
            Self::Synced
        } else if of.sent == 0 && of.acked == 0 {
            Self::NotSent
        } else {
            Self::Stale
        }
    }

    fn cell(self) -> Cell {
        match self {
            Self::Synced => Cell::toned(Tone::Good, "SYNCED"),
            Self::Stale => Cell::toned(Tone::Doubtful, "STALE"),
            Self::NotSent => Cell::toned(Tone::Doubtful, "NOT SENT"),
            Self::Rejected => Cell::toned(Tone::Bad, "REJECTED"),
        }
    }
}

/// Exit status 1 where a proxy lacks something.
pub async fn run(arguments: Arguments, own: MeshSettings, paint: Paint) -> anyhow::Result<Said> {
    let Arguments { proxy, istiod_address, target, output } = arguments;
    let mut replicas = match istiod_address {
        Some(address) => vec![at(address).await?],
        None => of_cluster(&target.connect(own).await?).await?,
    };
    if let Some(wanted) = &proxy {
        for replica in &mut replicas {
            replica.connected.proxies.retain(|proxy| is_called(proxy, wanted));
        }
        if replicas.iter().all(|replica| replica.connected.proxies.is_empty()) {
            bail!("{wanted} is connected to no replica of the control plane");
        }
    }
    let text = written(output, &replicas, || text(&replicas, OffsetDateTime::now_utc(), paint))?;
    let all = replicas.iter().flat_map(|replica| replica.connected.proxies.iter().map(move |proxy| (replica, proxy)));
    let mut states =
        all.flat_map(|(replica, proxy)| proxy.types.iter().map(move |of| State::of(of, replica.connected.generation)));
    let ending = if states.all(|state| state == State::Synced) { Ending::Good } else { Ending::Findings };
    Ok(Said { text, ending })
}

/// Asks every replica that runs.
///
/// # Errors
/// There is none, or one does not answer.
pub async fn of_cluster(cluster: &Cluster) -> anyhow::Result<Vec<Replica>> {
    let found: Vec<Pod> =
        of_control_planes(&cluster.client, &cluster.system).await.context("listing the control plane's pods")?;
    let runs = |pod: &Pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
    let names: Vec<String> = found.into_iter().filter(runs).filter_map(|pod| pod.metadata.name).collect();
    if names.is_empty() {
        bail!(
            "no pod with label {CONTROL_PLANE} runs in namespace {}: see --istio-namespace, and --istiod-address for one that is no pod",
            cluster.system
        );
    }
    let mut replicas = Vec::new();
    for name in names {
        let path = format!("/api/v1/namespaces/{}/pods/{name}:{MONITORING_PORT}/proxy{PATH}", cluster.system);
        let connected = ask(&cluster.client, &path).await.with_context(|| {
            format!("asking {name} by way of the API server (needs get on pods/proxy, or --istiod-address with a port-forward)")
        })?;
        replicas.push(Replica { istiod: name, connected });
    }
    Ok(replicas)
}

async fn at(address: http::Uri) -> anyhow::Result<Replica> {
    let istiod = address.authority().context("--istiod-address: it is http://HOST:PORT")?.to_string();
    // The same client as for an API server, without anything to log in with.
    let client = Client::try_from(kube::Config::new(address))?;
    let connected = ask(&client, PATH).await.with_context(|| format!("asking {istiod}"))?;
    Ok(Replica { istiod, connected })
}

async fn ask(client: &Client, path: &str) -> anyhow::Result<Connected> {
    Ok(client.request(http::Request::get(path).body(Vec::new())?).await?)
}

fn is_called(proxy: &Proxy, wanted: &str) -> bool {
    let pod = proxy.pod.as_deref().unwrap_or_default();
    wanted == pod || wanted.strip_prefix(pod).is_some_and(|rest| rest.strip_prefix('.') == Some(&*proxy.namespace))
}

fn text(replicas: &[Replica], now: OffsetDateTime, paint: Paint) -> String {
    let mut table = Table::new(&[
        "NAME",
        "NODE",
        "ISTIOD",
        "CONNECTED",
        "WORKLOADS",
        "AUTHORIZATION",
        "ENROLMENT",
        "ROUTES",
        "POLICIES",
    ]);
    let mut rejected = Vec::new();
    let mut omitted = 0;
    for Replica { istiod, connected } in replicas {
        omitted += connected.omitted;
        for proxy in &connected.proxies {
            // A machine's proxy has a token that is bound to no pod.
            let name = proxy.pod.as_ref().unwrap_or(&proxy.service_account);
            let name = format!("{name}.{}", proxy.namespace);
            let states = COLUMNS.iter().map(|names| {
                let of = proxy.types.iter().find(|of| names.contains(&&*of.name));
                of.map_or_else(|| Cell::from("-"), |of| State::of(of, connected.generation).cell())
            });
            let head = [
                Cell::from(name.as_str()),
                Cell::from(proxy.node.as_deref().unwrap_or("-")),
                Cell::from(istiod.as_str()),
                Cell::from(age(&proxy.connected_since, now)),
            ];
            table.row(head.into_iter().chain(states));
            let said = proxy.types.iter().filter_map(|of| Some((&of.name, of.rejected.as_ref()?)));
            rejected.extend(said.map(|(kind, reason)| format!("{name} rejected of {kind}: {reason}")));
        }
    }
    let mut text = match table.is_empty() {
        true => "No proxies are connected.\n".to_owned(),
        false => table.render("", paint),
    };
    if omitted > 0 {
        text.push_str(&format!("and {omitted} more that were not listed\n"));
    }
    for line in rejected {
        text.push_str(&Table::line(&line, Tone::Bad, paint));
    }
    text
}

/// As kubectl writes ages.
fn age(since: &str, now: OffsetDateTime) -> String {
    let Ok(since) = OffsetDateTime::parse(since, &Rfc3339) else { return "-".to_owned() };
    let seconds = (now - since).whole_seconds().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::FakeApi;

    fn connected() -> serde_json::Value {
        let of = |name: &str, sent: u64, acked: u64| json!({"name": name, "sent": sent, "acked": acked});
        let mut bad = of("Authorization", 6, 7);
        bad["rejected"] = "shop/p: no such action\u{1b}[2J".into();
        json!({"version": "0.1.0", "generation": 7, "proxies": [
            {"namespace": "istio-system", "pod": "ztunnel-a", "serviceAccount": "ztunnel", "node": "a",
             "connectedSince": "2026-11-27T10:00:00Z", "types": [of("Address", 7, 7), bad, of("PodEnrolment", 0, 0)]},
            {"namespace": "shop", "pod": "waypoint-1", "serviceAccount": "waypoint", "waypoint": "waypoint",
             "connectedSince": "2026-11-27T11:59:30Z", "types": [of("HttpPolicy", 7, 6), of("Route", 3, 7), of("Workload", 1, 7)]},
        ], "omitted": 2})
    }

    #[test]
    fn each_proxy_is_a_line_and_each_type_a_state() {
        let connected = serde_json::from_value(connected()).expect("what a replica says");
        let replicas = [Replica { istiod: "istiod-0".into(), connected }];
        let now = time::macros::datetime!(2026-11-27 12:00 UTC);
        assert_eq!(
            text(&replicas, now, Paint::PLAIN),
            "\
NAME                     NODE   ISTIOD     CONNECTED   WORKLOADS   AUTHORIZATION   ENROLMENT   ROUTES   POLICIES
ztunnel-a.istio-system   a      istiod-0   2h          SYNCED      REJECTED        NOT SENT    -        -
waypoint-1.shop          -      istiod-0   30s         SYNCED      -               -           SYNCED   STALE
and 2 more that were not listed
ztunnel-a.istio-system rejected of Authorization: shop/p: no such action [2J
"
        );
        assert_eq!(text(&[], now, Paint::PLAIN), "No proxies are connected.\n");
    }

    #[tokio::test]
    async fn each_running_replica_is_asked_through_the_api() {
        let client = FakeApi::answering(|_, path, _| match path {
            "/api/v1/namespaces/istio-system/pods" => {
                let pod = |name: &str, phase: &str| json!({"metadata": {"name": name}, "status": {"phase": phase}});
                (200, json!({"metadata": {}, "items": [pod("istiod-0", "Running"), pod("istiod-1", "Pending")]}))
            }
            "/api/v1/namespaces/istio-system/pods/istiod-0:15014/proxy/debug/proxies" => (200, connected()),
            other => panic!("{other}"),
        });
        let (namespace, system, mesh) = ("default".into(), "istio-system".into(), MeshSettings::default());
        let replicas = of_cluster(&Cluster { client, namespace, system, mesh }).await.expect("an answer");
        let [Replica { istiod, connected }] = &replicas[..] else { panic!("{replicas:?}") };
        assert_eq!((istiod.as_str(), connected.proxies.len()), ("istiod-0", 2));
        let called = |wanted: &str| is_called(&connected.proxies[1], wanted);
        assert_eq!(
            ["waypoint-1", "waypoint-1.shop", "waypoint-1.other", "waypoint"].map(called),
            [true, true, false, false]
        );
    }
}
