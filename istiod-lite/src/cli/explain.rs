//! `istiod-lite explain`: what would become of a connection from a pod to a Service, pod or address, by what the control
//! plane tells the proxies now. Connections are decided by the proxies' own evaluator (`mesh::policy`). Requests are
//! decided by waypoints, which this does not link: what they would ask is listed in the order in which they ask it.
//!
//! `ztunnel explain` answers for what the ztunnel of one node knows at that moment, and chooses among endpoints as it does.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::Args;
use mesh::identity::Identity;
use mesh::model::{NamespacedHostname, Service, Workload};
use mesh::policy::{Connection, Original, Policy, authorize};
use serde::Serialize;

use super::connect::Target;
use super::describe::{self, facts};
use super::facts::{self, Facts, RequestPolicy, RouteUse};
use super::output::{Cell, Format, Paint, Sheet, Table, Tone, written};
use super::{Ending, Said};
use crate::translate::binding::{self, TrafficType};
use crate::translate::world::MeshSettings;
use crate::types::{Key, Meta, Pod};

#[derive(Debug, Args)]
pub struct Arguments {
    /// The pod that connects: NAME, NAME.NAMESPACE or NAMESPACE/NAME.
    #[arg(long, value_name = "POD")]
    from: String,
    /// What it connects to: a host name, an address, or the name of a Service or pod as above; and the port.
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// Look into these files or directories and at no cluster; - is standard input.
    #[arg(long = "filename", short, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    target: Target,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// Exit status 1 where it would be refused, by any endpoint.
pub async fn run(arguments: Arguments, own: MeshSettings, paint: Paint) -> anyhow::Result<Said> {
    let (facts, namespace) = facts(&arguments.files, &arguments.target, own).await?;
    let explained = explain(&facts, &namespace, &arguments.from, &arguments.to)?;
    let text = written(arguments.output, &explained, || explained.text(paint))?;
    let ending = if explained.refused { Ending::Findings } else { Ending::Good };
    Ok(Said { text, ending })
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Explanation {
    /// By at least one endpoint, or by everything.
    refused: bool,
    because: String,
    from: String,
    /// The identity it proves; `None` where it proves none.
    identity: Option<String>,
    to: String,
    waypoint: Option<AtWaypoint>,
    endpoints: Vec<AtEndpoint>,
}

/// What its waypoint would ask of a request.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct AtWaypoint {
    #[serde(skip)]
    key: Option<Key>,
    name: String,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    policies: Vec<RequestPolicy>,
    routes: Vec<RouteUse>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct AtEndpoint {
    endpoint: String,
    address: Option<SocketAddr>,
    hbone: bool,
    policies: Vec<Asked>,
    /// Why it would be refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

/// One policy that governs an endpoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    policy: String,
    action: String,
    dry_run: bool,
    /// The first rule that matches, counted from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<usize>,
    decides: bool,
}

/// Where it connects to.
enum Destination {
    Service(Arc<Service>),
    Workload(Arc<Workload>),
    /// Nothing that the mesh knows.
    Elsewhere(String),
}

fn explain(facts: &Facts, namespace: &str, from: &str, to: &str) -> anyhow::Result<Explanation> {
    let source = facts::named("Pod", from, namespace, |key| facts.world.pods.contains_key(key))?;
    let source = &facts.world.pods[&source];
    let address = source.running_addresses().and_then(|addresses| addresses.first().copied());
    let address = address.with_context(|| format!("Pod {} has no address yet, so it cannot connect", source.key))?;
    let membership = facts.membership(source);
    let identity = membership.in_mesh.then(|| identity_of(facts, source)).transpose()?;
    let (destination, port) = destination(facts, source, to)?;
    let mut explained = Explanation {
        refused: false,
        because: String::new(),
        from: source.key.to_string(),
        identity: identity.as_ref().map(ToString::to_string),
        to: String::new(),
        waypoint: None,
        endpoints: Vec::new(),
    };
    let (name, meta, workloads): (_, Option<(&dyn Meta, TrafficType)>, Vec<_>) = match &destination {
        Destination::Elsewhere(said) => {
            explained.to.clone_from(said);
            explained.because = "the mesh does not know it, so the connection goes there as it is".to_owned();
            return Ok(explained);
        }
        Destination::Workload(workload) => {
            explained.to = format!("pod {}/{}, port {port}", workload.namespace, workload.name);
            let pod = facts.pod(workload);
            (None, pod.map(|pod| (pod as &dyn Meta, TrafficType::Workload)), vec![(Arc::clone(workload), port)])
        }
        Destination::Service(service) => {
            let key = service.key();
            explained.to = format!("service {key}, port {port}");
            if !service.ports.contains_key(&port) {
                let ports: Vec<String> = service.ports.keys().map(ToString::to_string).collect();
                bail!("service {key} has no port {port}; it has {}", ports.join(", "));
            }
            let targets = facts.mesh.endpoints(&key).filter_map(|(workload, ports)| {
                let of_service = || service.ports.get(&port).map(|found| found.target_port).filter(|port| *port != 0);
                Some((Arc::clone(workload), ports.target(port).or_else(of_service)?))
            });
            let targets: Vec<_> = targets.collect();
            let meta = facts.behind(&key);
            (Some(key), meta, targets)
        }
    };
    // A client outside the mesh knows no waypoint.
    explained.waypoint = meta
        .filter(|_| identity.is_some())
        .and_then(|(meta, traffic)| at_waypoint(facts, meta, traffic, name.as_ref()));
    let through = explained.waypoint.as_ref().and_then(|at| at.key.clone());
    for (workload, port) in workloads {
        explained.endpoints.push(at_endpoint(
            facts,
            source,
            address,
            identity.as_ref(),
            through.as_ref(),
            &workload,
            port,
        ));
    }
    explained.conclude();
    Ok(explained)
}

impl Explanation {
    fn conclude(&mut self) {
        if let Some(problem) = self.waypoint.as_ref().and_then(|at| at.problem.as_ref()) {
            self.refused = true;
            self.because = format!("its waypoint cannot be used: {problem}");
            return;
        }
        let refused: Vec<&String> = self.endpoints.iter().filter_map(|endpoint| endpoint.refused.as_ref()).collect();
        (self.refused, self.because) = match (refused.first(), refused.len() == self.endpoints.len()) {
            _ if self.endpoints.is_empty() => (true, "no endpoint can take connections on that port".to_owned()),
            (Some(first), true) => (true, (*first).clone()),
            (Some(first), false) => (true, format!("not by every endpoint: {first}")),
            (None, _) if self.waypoint.is_some() => {
                (false, "no policy for connections refuses it; the waypoint decides about each request".to_owned())
            }
            (None, _) => (false, "no policy refuses it".to_owned()),
        };
    }

    fn text(&self, paint: Paint) -> String {
        let mut sheet = Sheet::new(paint);
        sheet.line("From", self.from.as_str());
        sheet.line("Identity", self.identity.as_deref().unwrap_or("none is proved: the pod is not in the mesh"));
        sheet.line("To", self.to.as_str());
        match &self.waypoint {
            Some(AtWaypoint { name, problem, policies, routes, .. }) => {
                sheet.line("Through", format!("waypoint {name}"));
                if let Some(problem) = problem {
                    sheet.line("", Cell::toned(Tone::Bad, problem.as_str()));
                }
                let title = "It asks these policies about each request, and an ALLOW must match if there is any";
                sheet.table(title, &describe::request_policies(policies));
                sheet.table(
                    "Then the most specific match of these routes decides, the older of equals",
                    &describe::routes(routes),
                );
            }
            None => sheet.line("Through", "no waypoint"),
        }
        for endpoint in &self.endpoints {
            let address = endpoint.address.map_or_else(|| "no address".to_owned(), |address| address.to_string());
            let how = if endpoint.hbone { "HBONE" } else { "plain TCP" };
            sheet.line("Endpoint", format!("{} at {address}, by {how}", endpoint.endpoint));
            let mut table = Table::new(&["POLICY", "ACTION", "MATCHES", ""]);
            for asked in &endpoint.policies {
                let dry_run = if asked.dry_run { " (dry run)" } else { "" };
                table.row([
                    Cell::from(asked.policy.as_str()),
                    Cell::from(format!("{}{dry_run}", asked.action)),
                    Cell::from(asked.rule.map_or_else(|| "no".to_owned(), |rule| format!("rule {rule}"))),
                    Cell::from(if asked.decides { "decides" } else { "" }),
                ]);
            }
            sheet.table("Policies for connections, at its ztunnel", &table);
            if let Some(refused) = &endpoint.refused {
                sheet.line("", Cell::toned(Tone::Bad, refused.as_str()));
            }
        }
        let verdict = match self.refused {
            true => Cell::toned(Tone::Bad, format!("would be refused: {}", self.because)),
            false => Cell::toned(Tone::Good, format!("would connect: {}", self.because)),
        };
        sheet.line("It", verdict);
        sheet.finish()
    }
}

fn identity_of(facts: &Facts, pod: &Pod) -> anyhow::Result<Identity> {
    let trust_domain = &facts.world.mesh.trust_domain;
    Ok(Identity::new(trust_domain, &pod.key.namespace, &pod.template.service_account)?)
}

fn destination(facts: &Facts, source: &Pod, to: &str) -> anyhow::Result<(Destination, u16)> {
    let network = facts.world.network();
    if let Ok(address) = to.parse::<SocketAddr>() {
        let ip = mesh::net::canonical(address).ip();
        let service = facts.mesh.best_service_by_vip(network, ip, &source.key.namespace);
        let found = match (service, facts.mesh.workload_by_ip(network, ip)) {
            (Some(service), _) => Destination::Service(Arc::clone(service)),
            (None, Some(workload)) => Destination::Workload(Arc::clone(workload)),
            (None, None) => Destination::Elsewhere(address.to_string()),
        };
        return Ok((found, address.port()));
    }
    let form = || format!("--to {to}: it is HOST:PORT");
    let (host, port) = to.rsplit_once(':').with_context(form)?;
    let port: u16 = port.parse().ok().filter(|port| *port > 0).with_context(form)?;
    if let Some(service) = facts.mesh.service_by_hostname(&host.to_ascii_lowercase(), &source.key.namespace) {
        return Ok((Destination::Service(Arc::clone(service)), port));
    }
    let of_service = |key: &Key| facts.mesh.service(&facts.service_name(key));
    // As a resolver's search list has it: NAME, NAME.NAMESPACE, and that with .svc.
    let short = host.strip_suffix(".svc").unwrap_or(host);
    if let Ok(key) = facts::named("Service", short, &source.key.namespace, |key| of_service(key).is_some())
        && let Some(service) = of_service(&key)
    {
        return Ok((Destination::Service(Arc::clone(service)), port));
    }
    let known = |key: &Key| facts.workload(key).is_some();
    match facts::named("Service or pod", host, &source.key.namespace, known) {
        Ok(key) => match facts.workload(&key) {
            Some(workload) => Ok((Destination::Workload(Arc::clone(workload)), port)),
            None => bail!("pod {key} has no address"),
        },
        // A full name may be anybody's.
        Err(_) if host.contains('.') && !host.contains('/') => Ok((Destination::Elsewhere(to.to_owned()), port)),
        Err(error) => Err(error),
    }
}

fn at_waypoint(
    facts: &Facts,
    meta: &dyn Meta,
    traffic: TrafficType,
    service: Option<&NamespacedHostname>,
) -> Option<AtWaypoint> {
    let binding = binding::resolve(&facts.world, meta, traffic);
    // Nothing is asked for, or it may be skipped.
    binding.address.as_ref()?;
    let usage = facts.waypoint(meta, traffic)?;
    let waypoint = binding.waypoint;
    Some(AtWaypoint {
        name: waypoint.as_ref().map_or_else(|| "that it may not use".to_owned(), ToString::to_string),
        problem: (!usage.works).then_some(usage.message),
        policies: match (&waypoint, service) {
            (Some(waypoint), Some(service)) => facts.request_policies(service, waypoint),
            _ => Vec::new(),
        },
        routes: service.map(|service| facts.routes(service)).unwrap_or_default(),
        key: waypoint,
    })
}

/// What the ztunnel of an endpoint says to the connection, or to the waypoint that speaks for it.
fn at_endpoint(
    facts: &Facts,
    source: &Pod,
    address: IpAddr,
    identity: Option<&Identity>,
    waypoint: Option<&Key>,
    workload: &Workload,
    port: u16,
) -> AtEndpoint {
    let hbone = facts.takes_hbone(workload) && identity.is_some();
    let family = |ip: &&IpAddr| ip.is_ipv4() == address.is_ipv4();
    let ip = workload.addresses.iter().find(family).or_else(|| workload.addresses.first());
    let destination = ip.map(|ip| SocketAddr::new(*ip, port));
    let name = format!("{}/{}", workload.namespace, workload.name);
    let in_mesh = facts.takes_hbone(workload) && !workload.native_tunnel;
    let (Some(destination), true) = (destination, in_mesh) else {
        // No ztunnel stands before it.
        return AtEndpoint { endpoint: name, address: destination, hbone, policies: Vec::new(), refused: None };
    };
    let connection = match waypoint.and_then(|waypoint| speaker(facts, waypoint)) {
        Some((waypoint, source_ip)) => Connection {
            source: Some(waypoint),
            source_ip,
            destination,
            original: identity.map(|identity| Original { identity: identity.clone(), address: (address, 0).into() }),
        },
        None => {
            Connection { source: identity.filter(|_| hbone).cloned(), source_ip: address, destination, original: None }
        }
    };
    let policies: Vec<&Policy> = facts.mesh.policies_for(workload).collect();
    // Those that only watch count connections, and this is none.
    let outcome = authorize(policies.iter().copied().filter(|policy| !policy.is_dry_run()), &connection);
    let deciding = match &outcome {
        Ok(permit) => permit.allowed_by(),
        Err(denial) => denial.policy(),
    };
    let asked = policies.iter().map(|policy| Asked {
        policy: facts.origin(policy.key()),
        action: format!("{:?}", policy.action()).to_uppercase(),
        dry_run: policy.is_dry_run(),
        rule: policy.matching_rule(&connection),
        decides: deciding == Some(policy.key()),
    });
    let policies = asked.collect();
    let plain = if connection.source.is_none() { ", without an identity" } else { "" };
    let refused = outcome.err().map(|denial| match denial.policy() {
        Some(policy) => format!("denied by {} for {}{plain}", facts.origin(policy), source.key),
        None => format!("{denial} for {}{plain}", source.key),
    });
    AtEndpoint { endpoint: name, address: Some(destination), hbone, policies, refused }
}

/// The identity of a waypoint, and the address of one of its pods if it has any.
fn speaker(facts: &Facts, waypoint: &Key) -> Option<(Identity, IpAddr)> {
    let identity = Identity::new(&facts.world.mesh.trust_domain, &waypoint.namespace, &waypoint.name).ok()?;
    let service = facts.service_name(waypoint);
    let address = facts.mesh.endpoints(&service).find_map(|(workload, _)| workload.addresses.first().copied());
    Some((identity, address.unwrap_or(IpAddr::from([0, 0, 0, 0]))))
}

#[cfg(test)]
mod tests;
