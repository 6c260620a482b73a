//! `istiod-lite describe pod|svc`: what holds of one pod or Service, as the control plane sees it now.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mesh::model::{EndpointPorts, HealthStatus, NamespacedHostname, Workload};
use serde::Serialize;

use super::connect::Target;
use super::facts::{self, ConnectionPolicy, Facts, Membership, MutualTls, RequestPolicy, RouteUse, WaypointUse};
use super::output::{Cell, Format, Paint, Sheet, Table, Tone, written};
use super::{Said, read};
use crate::translate::binding::{self, TrafficType};
use crate::translate::world::MeshSettings;
use crate::types::{Key, Pod, Service};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// A pod: is it in the mesh and why, its identity, mTLS, waypoints, policies and routes.
    #[command(visible_aliases = ["po", "pods"])]
    Pod(Arguments),
    /// A Service: its waypoint, endpoints, mTLS, policies and routes.
    #[command(visible_aliases = ["service", "services"])]
    Svc(Arguments),
}

#[derive(Debug, Args)]
pub struct Arguments {
    /// NAME, NAME.NAMESPACE or NAMESPACE/NAME.
    name: String,
    /// Look into these files or directories and at no cluster; - is standard input.
    #[arg(long = "filename", short, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    target: Target,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

pub async fn run(command: Command, own: MeshSettings, paint: Paint) -> anyhow::Result<Said> {
    let (Command::Pod(arguments) | Command::Svc(arguments)) = &command;
    let (facts, namespace) = facts(&arguments.files, &arguments.target, own).await?;
    let name = arguments.name.as_str();
    let text = match &command {
        Command::Pod(_) => {
            let key = facts::named("Pod", name, &namespace, |key| facts.world.pods.contains_key(key))?;
            let described = PodDescription::of(&facts, &facts.world.pods[&key]);
            written(arguments.output, &described, || described.text(paint))?
        }
        Command::Svc(_) => {
            let key = facts::named("Service", name, &namespace, |key| facts.world.services.contains_key(key))?;
            let described = ServiceDescription::of(&facts, &key, &facts.world.services[&key]);
            written(arguments.output, &described, || described.text(paint))?
        }
    };
    Ok(Said::good(text))
}

/// What files say, or without any the cluster; and the namespace of what is named without one.
pub(super) async fn facts(files: &[PathBuf], target: &Target, own: MeshSettings) -> anyhow::Result<(Facts, String)> {
    if files.is_empty() {
        let cluster = target.connect(own).await?;
        let seen = read::cluster(&cluster.client, cluster.mesh).await?;
        return Ok((Facts::of(seen.world, false), cluster.namespace));
    }
    let namespace = target.offline_namespace();
    let seen = read::files(files, &namespace, own)?;
    Ok((Facts::of(seen.world, true), namespace))
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PodDescription {
    pod: String,
    node: Option<String>,
    phase: &'static str,
    ready: bool,
    addresses: Vec<String>,
    identity: String,
    mesh: Membership,
    mutual_tls: MutualTls,
    /// For connections to the pod's own address.
    waypoint: Option<WaypointUse>,
    /// Policies of its ztunnel; none where there is no such ztunnel, and none is known of a pod without an address.
    connection_policies: Option<Vec<ConnectionPolicy>>,
    services: Vec<ServiceOfPod>,
}

/// A Service that the pod is an endpoint of.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceOfPod {
    host: String,
    ports: Vec<String>,
    #[serde(flatten)]
    through: Through,
}

/// What stands between a client and a Service.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Through {
    waypoint: Option<WaypointUse>,
    request_policies: Vec<RequestPolicy>,
    routes: Vec<RouteUse>,
}

impl Through {
    fn of(facts: &Facts, service: &NamespacedHostname) -> Self {
        let object = facts.behind(service);
        let binding = object.map(|(object, traffic)| binding::resolve(&facts.world, object, traffic));
        let waypoint = binding.and_then(|binding| binding.waypoint);
        Self {
            waypoint: object.and_then(|(object, traffic)| facts.waypoint(object, traffic)),
            request_policies: waypoint.map(|at| facts.request_policies(service, &at)).unwrap_or_default(),
            routes: facts.routes(service),
        }
    }
}

impl PodDescription {
    fn of(facts: &Facts, pod: &Pod) -> Self {
        let (workload, mesh) = (facts.workload(&pod.key), facts.membership(pod));
        let services = workload.into_iter().flat_map(|workload| workload.services.iter());
        let services = services.map(|(name, ports)| ServiceOfPod {
            host: name.hostname.to_string(),
            ports: mapped(ports),
            through: Through::of(facts, name),
        });
        let connection_policies = workload.filter(|_| mesh.in_mesh).map(|workload| facts.connection_policies(workload));
        Self {
            pod: pod.key.to_string(),
            node: pod.node().map(str::to_owned),
            phase: pod.phase.name(),
            ready: pod.is_ready,
            addresses: pod.running_addresses().into_iter().flatten().map(ToString::to_string).collect(),
            identity: facts.identity(pod),
            mesh,
            mutual_tls: facts.mutual_tls(pod),
            waypoint: facts.waypoint(pod, TrafficType::Workload),
            connection_policies,
            services: services.collect(),
        }
    }

    fn text(&self, paint: Paint) -> String {
        let mut sheet = Sheet::new(paint);
        let ready = if self.ready { ", ready" } else { ", not ready" };
        let node = self.node.as_ref().map_or_else(|| ", not placed".to_owned(), |node| format!(" on {node}"));
        let phase = if self.phase.is_empty() { String::new() } else { format!(", {}{ready}", self.phase) };
        sheet.line("Pod", format!("{}{node}{phase}", self.pod));
        sheet.line("Addresses", or_none(&self.addresses.join(", ")));
        sheet.line("Identity", self.identity.as_str());
        membership(&mut sheet, &self.mesh);
        match self.mesh.in_mesh {
            true => mutual_tls(&mut sheet, &self.mutual_tls),
            false => sheet.line("mTLS", "nothing is asked of connections to a pod that is not captured"),
        }
        let unused = "none for connections to its own address";
        sheet.line("Waypoint", waypoint(self.waypoint.as_ref(), unused));
        match &self.connection_policies {
            Some(policies) => sheet.table("Policies for connections, at its ztunnel", &connection_policies(policies)),
            None if self.mesh.in_mesh => {
                sheet.line("Policies", "unknown: it has no address, so the mesh does not know it");
            }
            None => sheet.line("Policies", "none for connections: no ztunnel stands before it"),
        }
        for service in &self.services {
            let title = format!("{} ({})", service.host, service.ports.join(", "));
            through(&mut sheet, &title, &service.through);
        }
        sheet.finish()
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceDescription {
    service: String,
    host: String,
    addresses: Vec<String>,
    ports: Vec<String>,
    #[serde(flatten)]
    through: Through,
    endpoints: Vec<EndpointDescription>,
    /// Of the ztunnels of its endpoints.
    connection_policies: Vec<ConnectionPolicy>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointDescription {
    name: String,
    addresses: Vec<String>,
    node: String,
    healthy: bool,
    /// Connections to it are carried by HBONE; else in plain TCP.
    hbone: bool,
    ports: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mutual_tls: Option<MutualTls>,
}

impl ServiceDescription {
    fn of(facts: &Facts, key: &Key, object: &Service) -> Self {
        let name = facts.service_name(key);
        let endpoints: Vec<_> = facts.mesh.all_endpoints(&name).collect();
        let captured = |workload: &Workload| facts.pod(workload).is_none_or(|pod| facts.membership(pod).in_mesh);
        let guarded = endpoints.iter().filter(|(workload, _)| captured(workload));
        let mut policies: Vec<ConnectionPolicy> =
            guarded.flat_map(|(workload, _)| facts.connection_policies(workload)).collect();
        policies.sort_by(|a, b| b.action.cmp(&a.action).then_with(|| a.cmp(b)));
        policies.dedup();
        let known = facts.mesh.service(&name);
        let ports = known.into_iter().flat_map(|known| known.ports.iter());
        let mut described: Vec<EndpointDescription> =
            endpoints.iter().map(|(workload, ports)| EndpointDescription::of(facts, workload, ports)).collect();
        described.sort_by(|a, b| a.name.cmp(&b.name));
        Self {
            service: key.to_string(),
            host: name.hostname.to_string(),
            addresses: object.vips().iter().map(ToString::to_string).collect(),
            ports: ports.map(|(port, to)| format!("{port} ({:?})", to.app_protocol).to_lowercase()).collect(),
            through: Through::of(facts, &name),
            endpoints: described,
            connection_policies: policies,
        }
    }

    fn text(&self, paint: Paint) -> String {
        let mut sheet = Sheet::new(paint);
        sheet.line("Service", self.service.as_str());
        sheet.line("Host", self.host.as_str());
        sheet.line("Addresses", or_none(&self.addresses.join(", ")));
        sheet.line("Ports", or_none(&self.ports.join(", ")));
        through_lines(&mut sheet, &self.through);
        let mut table = Table::new(&["ENDPOINT", "NODE", "HEALTH", "CARRIED BY", "MTLS", "PORTS"]);
        for endpoint in &self.endpoints {
            let health = match endpoint.healthy {
                true => Cell::toned(Tone::Good, "healthy"),
                false => Cell::toned(Tone::Doubtful, "not ready"),
            };
            let mtls = endpoint.mutual_tls.as_ref().map_or("-", |asked| asked.mode);
            table.row([
                Cell::from(endpoint.name.as_str()),
                Cell::from(endpoint.node.as_str()),
                health,
                Cell::from(if endpoint.hbone { "HBONE" } else { "plain TCP" }),
                Cell::from(mtls),
                Cell::from(endpoint.ports.join(", ")),
            ]);
        }
        sheet.table("Endpoints", &table);
        sheet.table(
            "Policies for connections, at the ztunnels of its endpoints",
            &connection_policies(&self.connection_policies),
        );
        sheet.finish()
    }
}

impl EndpointDescription {
    fn of(facts: &Facts, workload: &Workload, ports: &EndpointPorts) -> Self {
        Self {
            name: format!("{}/{}", workload.namespace, workload.name),
            addresses: workload.addresses.iter().map(ToString::to_string).collect(),
            node: workload.node.to_string(),
            healthy: workload.status == HealthStatus::Healthy,
            hbone: facts.takes_hbone(workload),
            ports: mapped(ports),
            mutual_tls: facts
                .pod(workload)
                .filter(|pod| facts.membership(pod).in_mesh)
                .map(|pod| facts.mutual_tls(pod)),
        }
    }
}

/// Service port → port of the endpoint.
fn mapped(ports: &EndpointPorts) -> Vec<String> {
    ports.iter().map(|port| format!("{} -> {}", port.service_port, port.target_port)).collect()
}

fn or_none(text: &str) -> Cell {
    Cell::from(if text.is_empty() { "none" } else { text })
}

fn membership(sheet: &mut Sheet, mesh: &Membership) {
    let said = match mesh.in_mesh {
        true => Cell::toned(Tone::Good, format!("in, by {}", mesh.reason)),
        false => Cell::toned(Tone::Doubtful, format!("out: {}", mesh.reason)),
    };
    let capture = mesh.capture.as_deref().map(Cell::from);
    let mend = mesh.mend.as_ref().map(|mend| Cell::from(format!("to join: {mend}")));
    sheet.lines("Mesh", std::iter::once(said).chain(capture).chain(mend));
}

fn mutual_tls(sheet: &mut Sheet, asked: &MutualTls) {
    let by = asked
        .by
        .as_ref()
        .map_or_else(|| "no PeerAuthentication says otherwise".to_owned(), |by| format!("by PeerAuthentication {by}"));
    let ports = asked.ports.iter().map(|(port, mode)| {
        Cell::from(format!("{mode} on port {port}, by PeerAuthentication {}", asked.ports_by.as_deref().unwrap_or("-")))
    });
    sheet.lines("mTLS", std::iter::once(Cell::from(format!("{}, {by}", asked.mode))).chain(ports));
}

fn waypoint(found: Option<&WaypointUse>, otherwise: &str) -> Cell {
    match found {
        None => Cell::from(otherwise),
        Some(found) => Cell::toned(if found.works { Tone::Good } else { Tone::Bad }, found.message.as_str()),
    }
}

fn through(sheet: &mut Sheet, title: &str, found: &Through) {
    sheet.line("Service", title);
    through_lines(sheet, found);
}

fn through_lines(sheet: &mut Sheet, found: &Through) {
    sheet.line("Waypoint", waypoint(found.waypoint.as_ref(), "none; no label asks for one"));
    if found.waypoint.is_some() || !found.request_policies.is_empty() {
        sheet.table("Policies for requests, at its waypoint", &request_policies(&found.request_policies));
    }
    if found.waypoint.is_some() || !found.routes.is_empty() {
        sheet.table("Routes", &routes(&found.routes));
    }
}

pub(super) fn connection_policies(policies: &[ConnectionPolicy]) -> Table {
    let mut table = Table::new(&["NAME", "ACTION", "OF", "NOTE"]);
    for policy in policies {
        table.row([
            Cell::from(policy.name.as_str()),
            Cell::from(action(&policy.action, policy.dry_run)),
            Cell::from(policy.reach),
            note(&policy.notes),
        ]);
    }
    table
}

pub(super) fn request_policies(policies: &[RequestPolicy]) -> Table {
    let mut table = Table::new(&["NAME", "ACTION", "RULES", "OF", "NOTE"]);
    for policy in policies {
        table.row([
            Cell::from(policy.name.as_str()),
            Cell::from(action(policy.action, policy.dry_run)),
            Cell::from(policy.rules.to_string()),
            Cell::from(if policy.whole_waypoint { "waypoint" } else { "service" }),
            note(&policy.notes),
        ]);
    }
    table
}

pub(super) fn routes(routes: &[RouteUse]) -> Table {
    let mut table = Table::new(&["NAME", "RULES", "PORT", "CLIENTS", "NOTE"]);
    for route in routes {
        let clients = route.only_for_clients_of.as_ref().map_or_else(|| "all".to_owned(), |of| format!("of {of}"));
        table.row([
            Cell::from(route.name.as_str()),
            Cell::from(route.rules.to_string()),
            Cell::from(route.port.map_or_else(|| "all".to_owned(), |port| port.to_string())),
            Cell::from(clients),
            note(&route.notes),
        ]);
    }
    table
}

fn action(action: &str, dry_run: bool) -> String {
    if dry_run { format!("{action} (dry run)") } else { action.to_owned() }
}

fn note(notes: &[String]) -> Cell {
    Cell::toned(Tone::Doubtful, notes.join("; "))
}

#[cfg(test)]
mod tests;
