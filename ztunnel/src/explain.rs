//! What would happen to a connection, and what decides it: the data path's own decisions, asked without a connection.
//!
//! Routes come from [`resolve::outbound`], targets from [`resolve::inbound`], verdicts from [`policy::authorize`], all on the
//! live snapshot; here is only what brings a question to them and puts their answers in order. Where chance decides, each
//! outcome is asked for by the number that brings it about ([`chance`]). Nothing is dialled. What this ztunnel cannot see
//! (the application, L7 policy, NetworkPolicies) is said and not guessed.

mod balance;
mod chance;
pub mod cli;
mod find;
mod policies;
mod text;
mod ways;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use http::{HeaderValue, Method, StatusCode};
use ipnet::IpNet;
use mesh::model::Workload;
use mesh::serve::{AdminRequest, AdminResponse, AdminServer, json, text as plain};
use mesh::store::Snapshot;
use serde::Serialize;

use crate::node::Registry;
use crate::worker::Shared;

/// Says [`Verdict`] in the answer's head, for the command line.
const VERDICT: &str = "x-explain-verdict";

const NOT_KNOWN: [&str; 3] = [
    "whether the application listens on that port",
    "whether a NetworkPolicy or a firewall lets the packets pass (to the next hop's port)",
    "what a pod's annotations exclude from capture",
];

/// What came of a question.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub verdict: Verdict,
    /// In one sentence.
    pub because: String,
    pub source: Source,
    /// How the destination was understood.
    pub destination: String,
    /// The addresses that the application may dial; it takes one of them.
    pub dialled: Vec<Dialled>,
    /// What decides as well and cannot be seen from here.
    pub not_known: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Connects,
    Refused,
    /// As chance has it: some of the ways are refused.
    Partly,
}

/// Who connects.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    pub workload: Arc<str>,
    pub name: String,
    /// SPIFFE ID; `None` where the workload cannot have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    pub addresses: Vec<IpAddr>,
    pub captured: Captured,
    /// State of its certificate, where this ztunnel keeps it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
}

/// Who takes the connections that the source opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Captured {
    Here,
    /// By the ztunnel of its node, of which it is assumed that it knows the same.
    Elsewhere,
    /// It speaks HBONE by itself.
    Itself,
    /// What it sends goes out as it is.
    No,
}

/// One address that the application may dial, and where that leads.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dialled {
    pub address: SocketAddr,
    /// What the address is, and why it is that.
    pub is: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub balancing: Vec<balance::Balancing>,
    pub ways: Vec<Way>,
}

/// One of the ways that a connection may take.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Way {
    /// From 0 to 1, among those of the same address.
    pub probability: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hop: Option<Hop>,
    /// Policies of the destination, those that decide and those that do not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<policies::Asked>,
    pub notes: Vec<String>,
    /// Behind a waypoint: what each endpoint would say to it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub behind: Vec<Behind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
}

/// The TCP connection that a ztunnel makes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    pub next: SocketAddr,
    /// `direct`, `waypoint` or `passthrough`.
    pub via: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// `None`: plain TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hbone: Option<Hbone>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hbone {
    pub authority: String,
    /// One of these must be proven by the next hop.
    pub expected: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Behind {
    pub endpoint: String,
    pub address: SocketAddr,
    pub policies: Vec<policies::Asked>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
}

/// Why a connection would be refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// `source` or `destination`: whose ztunnel says no, and logs it.
    pub by: &'static str,
    /// As in the metrics.
    pub flag: &'static str,
    pub reason: String,
}

/// A question that has no answer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoAnswer {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Unknown(String),
}

/// What is known while a question is answered.
pub struct View<'a> {
    pub world: &'a Snapshot,
    pub settings: &'a Settings,
    /// The certificates' states of the workloads that are captured here.
    pub here: &'a dyn Fn(&Workload) -> Option<String>,
    /// What host names of endpoints stand for, as far as they were looked up.
    pub names: &'a BTreeMap<Arc<str>, Result<Vec<IpAddr>, String>>,
    /// Those that were needed and not there.
    pub lacking: Mutex<BTreeSet<Arc<str>>>,
}

/// The settings that count here.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    pub network: String,
    pub domain: String,
    pub preferred_namespace: Option<String>,
    pub ipv6: bool,
    pub excluded_destinations: Vec<IpNet>,
    pub excluded_ports: Vec<u16>,
}

/// Answers from what is in `view`.
///
/// # Errors
/// When the question is malformed, or is about something unknown.
pub fn explain(view: &View<'_>, from: &str, to: &str) -> Result<Explanation, NoAnswer> {
    let workload = find::source(view, from)?;
    let destination = find::destination(view, &workload, to)?;
    let source = describe(view, &workload);
    let dialled: Vec<_> = destination.addresses.iter().map(|to| ways::dialled(view, &workload, &source, *to)).collect();
    let (verdict, because) = judge(&dialled);
    let not_known = NOT_KNOWN.map(str::to_owned).to_vec();
    Ok(Explanation { verdict, because, source, destination: destination.said, dialled, not_known })
}

fn describe(view: &View<'_>, workload: &Workload) -> Source {
    let certificate = (view.here)(workload);
    let captured = match (&certificate, workload.protocol) {
        (Some(_), _) => Captured::Here,
        (None, mesh::model::TunnelProtocol::Hbone) if workload.native_tunnel => Captured::Itself,
        (None, mesh::model::TunnelProtocol::Hbone) => Captured::Elsewhere,
        (None, mesh::model::TunnelProtocol::None) => Captured::No,
    };
    Source {
        workload: workload.uid.clone(),
        name: format!("{}/{}", workload.namespace, workload.name),
        identity: workload.identity().ok().map(|id| id.to_string()),
        addresses: workload.addresses.clone(),
        captured,
        certificate,
    }
}

fn judge(dialled: &[Dialled]) -> (Verdict, String) {
    let ways = || dialled.iter().flat_map(|d| &d.ways);
    let refused: Vec<&Refusal> = ways().filter_map(|way| way.refused.as_ref()).collect();
    match (refused.first(), refused.len() == ways().count()) {
        (None, _) => (Verdict::Connects, "nothing that is known here refuses it".to_owned()),
        (Some(first), true) => (Verdict::Refused, first.reason.clone()),
        (Some(first), false) => (Verdict::Partly, format!("not every way is open: {}", first.reason)),
    }
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Connects => "connects",
            Self::Refused => "refused",
            Self::Partly => "partly",
        }
    }
}

/// Adds `GET /explain?from=…&to=…` to the server; `&o=json` for programs.
#[must_use]
pub fn route(server: AdminServer, shared: Shared, registry: Arc<Registry>) -> AdminServer {
    server.route(Method::GET, "/explain", move |request| answer(shared.clone(), registry.clone(), request))
}

async fn answer(shared: Shared, registry: Arc<Registry>, request: AdminRequest) -> AdminResponse {
    let (Some(from), Some(to)) = (request.param("from"), request.param("to")) else {
        return plain(StatusCode::BAD_REQUEST, format!("{}\n", cli::USAGE));
    };
    match ask(&shared, &registry, &from, &to).await {
        Ok(explanation) => {
            let verdict = HeaderValue::from_static(explanation.verdict.as_str());
            let mut response = match request.param("o").as_deref() {
                Some("json") => json(&explanation),
                _ => plain(StatusCode::OK, explanation.to_string()),
            };
            response.headers_mut().insert(VERDICT, verdict);
            response
        }
        Err(NoAnswer::Usage(said)) => plain(StatusCode::BAD_REQUEST, format!("{said}\n")),
        Err(NoAnswer::Unknown(said)) => plain(StatusCode::NOT_FOUND, format!("{said}\n")),
    }
}

/// Host names that endpoints have are looked up as for a connection; the rest is known.
async fn ask(shared: &Shared, registry: &Registry, from: &str, to: &str) -> Result<Explanation, NoAnswer> {
    let config = &shared.config;
    let settings = Settings {
        network: config.network.clone(),
        domain: config.cluster_domain.clone(),
        preferred_namespace: config.preferred_namespace.clone(),
        ipv6: config.ipv6,
        excluded_destinations: config.excluded_destinations.clone(),
        excluded_ports: config.excluded_ports.clone(),
    };
    let world = shared.store.snapshot();
    let (pods, certificates) = (registry.pods(), shared.certs.snapshot());
    let here = |workload: &Workload| {
        let is_it = |pod: &Arc<crate::node::pod::LocalPod>| {
            pod.workload_uid == workload.uid && pod.is_described_by(workload) && !pod.drain.is_draining()
        };
        pods.iter().any(is_it).then(|| {
            let identity = workload.identity();
            let known = certificates.iter().find(|c| identity.as_ref().is_ok_and(|id| *id == c.identity));
            known.map_or_else(|| "not asked for yet".to_owned(), |c| c.state.clone())
        })
    };
    let mut names = BTreeMap::new();
    loop {
        // `here` must not be held over the wait, so the view is made anew.
        let (outcome, lacking) = {
            let view =
                View { world: &world, settings: &settings, here: &here, names: &names, lacking: Mutex::default() };
            let outcome = explain(&view, from, to);
            (outcome, view.lacking.into_inner().unwrap_or_else(PoisonError::into_inner))
        };
        if lacking.is_empty() {
            return outcome;
        }
        for name in lacking {
            let found = shared.names.addresses(&name).await;
            names.insert(name, found.map(|found| found.to_vec()).map_err(|error| error.to_string()));
        }
    }
}

#[cfg(test)]
mod tests;
