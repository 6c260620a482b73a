//! ServiceEntries as the mesh's services, one for each host, and the endpoints they list.
//!
//! A part that cannot be used costs itself and is named in the condition [`ACCEPTED`]. Where a namespace has several
//! objects for one host, a Kubernetes Service has it, else the oldest entry.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_proto::workload::{
    Address, AppProtocol, LoadBalancing, NetworkAddress, Port, PortList, Service, Visibility, address, load_balancing,
};

use super::allocate::{Allocation, Told};
use super::binding::{self, Binding, TrafficType};
use super::mesh_config::Limit;
use super::networks;
use super::owned::Owned;
use super::service::{annotated_distribution, app_protocol_named, distributed};
use super::verdict::{EXPLAIN, Kind, Problem, Report, Status, Verdict, Wanted, joined};
use super::workload_entry::{self, Endpoint, Unusable};
use super::world::{View, World};
use super::{Translation, address_bytes, address_resource};
use crate::types::networking::{self, ServiceEntrySpec, WorkloadEntrySpec};
use crate::types::{Key, Labels, Lenient, Object, label};

/// Whether all of an entry is enforced.
pub const ACCEPTED: &str = "Accepted";
/// How far an entry is seen.
const VISIBILITY: &str = "istio.io/VisibilityApplied";
const OWNED: &[&str] = &[ACCEPTED, VISIBILITY, "istio.io/WaypointBound"];
/// `false` keeps an entry without addresses of its own without any.
const AUTO_ALLOCATE: &str = "networking.istio.io/enable-autoallocate-ip";

/// What one entry, or all of a namespace that select pods, may multiply to: each endpoint says of each host that it is behind
/// which ports it has there, and each host says which names its endpoints may prove. An object that is as large as the API takes
/// could come to gigabytes of it.
mod most {
    /// Pairs of a host and a port behind which a pod is by the entries of its namespace.
    pub const SELECTING: usize = 10_000;
    /// Pairs of a host and a port of all endpoints that an entry lists.
    pub const LISTED: usize = 200_000;
    /// Bytes of the names in `subjectAltNames`, for each host anew.
    pub const NAMES: usize = 4 * 1024 * 1024;
}

/// How a destination is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// Where the client dialled.
    None,
    Static,
    Dns,
}

/// A ServiceEntry that can be read.
#[derive(Debug)]
pub struct Entry<'a> {
    pub key: &'a Key,
    pub object: &'a Object<ServiceEntrySpec>,
    spec: &'a ServiceEntrySpec,
    /// `None`: one we don't know; the entry then does nothing.
    resolution: Option<Resolution>,
    /// In lower case; those that another object of the namespace has are left out.
    pub hosts: Vec<String>,
    /// `spec.addresses`.
    pub vips: Vec<IpNet>,
    ports: Vec<&'a networking::Port>,
    pub wants_addresses: bool,
    /// What its status says of addresses.
    pub told: Told<'a>,
    visibility: Option<Visibility>,
    /// MeshConfig lets it be seen less far than it asks for.
    is_limited: bool,
    /// Pods that it selects are left out: those of older entries are enough.
    is_beyond: bool,
    problems: Vec<Problem>,
}

/// What one entry selects of its namespace's pods, and the services that they are then behind.
#[derive(Debug, Clone, PartialEq)]
pub struct EntrySelector {
    labels: Labels,
    services: BTreeMap<String, PortList>,
}

/// By namespace, for those that select anything.
pub type EntrySelectors = BTreeMap<String, Vec<EntrySelector>>;

/// All of them.
#[derive(Debug, Default)]
pub struct Entries<'a> {
    /// By namespace, the oldest first.
    by_namespace: BTreeMap<&'a str, Vec<Entry<'a>>>,
    /// Who has a host where several namespaces have one.
    canonical: HashMap<String, &'a Key>,
}

impl<'a> Entries<'a> {
    pub fn new(world: &'a World, owned: Owned<'_>) -> Self {
        if world.service_entries.is_empty() {
            return Self::default();
        }
        let mut objects: Vec<_> = world.service_entries.iter().collect();
        objects.sort_by_cached_key(|(_, object)| object.age());
        let services: HashMap<String, &str> =
            world.services.keys().map(|key| (world.hostname(key), &*key.namespace)).collect();
        let mut this = Self::default();
        let mut had: HashMap<(&str, String), &Key> = HashMap::new();
        let mut selecting: HashMap<&str, usize> = HashMap::new();
        for (key, object) in objects {
            let Ok(spec) = &object.spec else { continue };
            let mut entry = Entry::new(key, object, spec, world.entry_limit(&key.namespace));
            entry.leave_to_others(owned);
            entry.hosts.retain(|host| {
                let by = match services.get(host) {
                    Some(namespace) if *namespace == &*key.namespace => "a Service".to_owned(),
                    _ => match had.insert((&key.namespace, host.clone()), key) {
                        None => return true,
                        // Listed twice.
                        Some(other) if other == key => return false,
                        Some(other) => {
                            had.insert((&key.namespace, host.clone()), other);
                            format!("ServiceEntry {}", other.name)
                        }
                    },
                };
                entry.problems.push(format!("hosts: {host:?} belongs to {by} of this namespace").into());
                false
            });
            for host in &entry.hosts {
                if entry.visibility == Some(Visibility::Public) && !services.contains_key(host) {
                    this.canonical.entry(host.clone()).or_insert(key);
                }
            }
            if entry.selector().is_some() {
                let pairs = selecting.entry(&key.namespace).or_default();
                *pairs += entry.hosts.len() * entry.ports.len().max(1);
                entry.is_beyond = *pairs > most::SELECTING;
                if entry.is_beyond {
                    let message = format!(
                        "workloadSelector: the entries of the namespace that have one come to more than {} pairs of host \
                         and port; what this one selects is left out",
                        most::SELECTING
                    );
                    entry.problems.push(message.into());
                    *pairs -= entry.hosts.len() * entry.ports.len().max(1);
                }
            }
            this.by_namespace.entry(&key.namespace).or_default().push(entry);
        }
        this
    }

    /// The oldest first.
    pub fn by_age(&self) -> Vec<&Entry<'a>> {
        let mut all: Vec<&Entry<'a>> = self.by_namespace.values().flatten().collect();
        all.sort_by_cached_key(|entry| entry.object.age());
        all
    }

    /// What is to be known of them to place a pod.
    pub fn selectors(&self) -> EntrySelectors {
        let mut selectors = EntrySelectors::new();
        for (namespace, entries) in &self.by_namespace {
            for entry in entries {
                let Some(labels) = entry.selector() else { continue };
                let services = entry.services(&entry.hosts, &BTreeMap::new());
                let selector = EntrySelector { labels: labels.clone(), services };
                selectors.entry((*namespace).to_owned()).or_default().push(selector);
            }
        }
        selectors
    }

    /// The single addresses that their users wrote.
    pub fn written(world: &World) -> HashSet<IpAddr> {
        let specs = world.service_entries.values().filter_map(|object| object.spec.as_ref().ok());
        let addresses = specs.flat_map(|spec| &spec.addresses).filter_map(|address| {
            let net = address.parse::<IpNet>().or_else(|_| address.parse::<IpAddr>().map(IpNet::from)).ok()?;
            is_single(&net).then(|| net.addr().to_canonical())
        });
        addresses.collect()
    }

    /// Those that select what has these labels.
    fn selecting<'s>(&'s self, namespace: &str, labels: &'s Labels) -> impl Iterator<Item = &'s Entry<'a>> {
        let entries = self.by_namespace.get(namespace).into_iter().flatten();
        entries.filter(move |entry| entry.selector().is_some_and(|wanted| wanted.are_among(labels)))
    }
}

impl<'a> Entry<'a> {
    fn new(key: &'a Key, object: &'a Object<ServiceEntrySpec>, spec: &'a ServiceEntrySpec, limit: Limit) -> Self {
        let mut problems: Vec<Problem> = Vec::new();
        let resolution = match spec.resolution.as_str() {
            "" | "NONE" => Some(Resolution::None),
            "STATIC" => Some(Resolution::Static),
            "DNS" | "DNS_ROUND_ROBIN" => Some(Resolution::Dns),
            other => {
                let message = format!("resolution: {other} is not supported");
                let problem = match other {
                    "DYNAMIC_DNS" => message.into(),
                    _ => Problem::fault(message, "write NONE, STATIC, DNS or DNS_ROUND_ROBIN"),
                };
                problems.push(problem.worded(|message| message + "; the entry does nothing"));
                None
            }
        };
        if !matches!(spec.location.as_str(), "" | "MESH_EXTERNAL" | "MESH_INTERNAL") {
            let message = format!("location: {:?} is not a known value", spec.location);
            problems.push(Problem::fault(message, "write MESH_EXTERNAL or MESH_INTERNAL"));
        }
        let has_endpoints = !spec.endpoints.is_empty();
        let selects = spec.workload_selector.is_some();
        if has_endpoints && selects {
            let message = "endpoints: left out, for there is a workloadSelector";
            problems.push(Problem::fault(message, "take one of the two out"));
        }
        if spec.workload_selector.as_ref().is_some_and(|selector| selector.labels.is_empty()) {
            problems.push("workloadSelector: without labels it selects nothing".into());
        }
        match resolution {
            Some(Resolution::None) if has_endpoints || selects => {
                let message = "resolution: NONE goes where the client dials; endpoints are not used";
                problems.push(match has_endpoints {
                    true => Problem::fault(message, "write STATIC for those with an IP address, DNS for names"),
                    false => message.into(),
                });
            }
            Some(Resolution::Static) if !has_endpoints && !selects => {
                let message = "endpoints: STATIC needs some, or a workloadSelector; connections are refused";
                problems.push(Problem::fault(message, "list their addresses, or write resolution DNS or NONE"));
            }
            _ => {}
        }
        let implicit = resolution == Some(Resolution::Dns) && !has_endpoints && !selects;
        let hosts = spec.hosts.iter().filter_map(|host| {
            let host = host.to_ascii_lowercase();
            let (reason, mend) = match host.strip_prefix("*.") {
                _ if resolution.is_none() => return None,
                Some(_) if implicit => {
                    ("a wildcard cannot be looked up; name endpoints", Some("or write resolution NONE"))
                }
                rest if is_hostname(rest.unwrap_or(&host)) => return Some(host),
                _ => ("not a host name", is_no_host(&host).then_some(HOST)),
            };
            let message = format!("hosts: {host:?}: {reason}");
            problems.push(match mend {
                Some(mend) => Problem::fault(message, mend),
                None => message.into(),
            });
            None
        });
        let hosts = hosts.collect();
        let vips = spec.addresses.iter().filter_map(|address| {
            let parsed = address.parse::<IpNet>().or_else(|_| address.parse::<IpAddr>().map(IpNet::from));
            // As proxies read it: one IPv4 address has one form.
            let canonical = |net: IpNet| if is_single(&net) { net.addr().to_canonical().into() } else { net.trunc() };
            let none = || Problem::fault(format!("addresses: {address:?} is none"), ADDRESS);
            parsed.map(canonical).map_err(|_| problems.push(none())).ok()
        });
        let vips = vips.collect();
        let ports = spec.ports.iter().filter_map(|port| match port {
            Lenient::Good(port) if port.number > 0 => {
                if protocol(&port.protocol).is_none() {
                    let message = format!("ports: protocol {:?} is not known; bytes are passed on", port.protocol);
                    problems.push(message.into());
                }
                Some(port)
            }
            Lenient::Good(_) => {
                problems.push(Problem::fault("ports: 0 is no port", "write a number from 1 to 65535"));
                None
            }
            Lenient::Bad(reason) => {
                problems.push(Problem::fault(format!("ports: {reason}"), EXPLAIN));
                None
            }
        });
        let ports = ports.collect();
        for name in spec.subject_alt_names.iter().filter(|name| !name.starts_with("spiffe://")) {
            let message = format!("subjectAltNames: {name:?} is not a SPIFFE identity; nothing else is verified");
            problems.push(message.into());
        }
        let asked = match &*spec.export_to {
            [] => Some(Visibility::Public),
            all if all.iter().any(|to| to == "*") => Some(Visibility::Public),
            [none] if none == "~" => None,
            some => {
                let beyond: Vec<_> = some.iter().filter(|to| *to != "." && **to != *key.namespace).cloned().collect();
                if !beyond.is_empty() {
                    let beyond = beyond.join(", ");
                    let message = format!("exportTo: only \".\" and \"*\" are supported; {beyond} does not see it");
                    problems.push(message.into());
                }
                Some(Visibility::Namespace)
            }
        };
        let visibility = limit.of(asked);
        let is_limited = visibility != asked;
        let opted_out = label(&object.meta, AUTO_ALLOCATE).is_some_and(|value| value.eq_ignore_ascii_case("false"));
        let wants_addresses = spec.addresses.is_empty()
            && !opted_out
            && visibility.is_some()
            && matches!(resolution, Some(Resolution::Static | Resolution::Dns));
        let told = Told::by(&object.status);
        let is_beyond = false;
        Self {
            key,
            object,
            spec,
            resolution,
            hosts,
            vips,
            ports,
            wants_addresses,
            told,
            visibility,
            is_limited,
            is_beyond,
            problems,
        }
    }

    /// Takes out what Services, and pods of other namespaces, have.
    fn leave_to_others(&mut self, owned: Owned<'_>) {
        let Self { key, hosts, vips, problems, .. } = self;
        hosts.retain(|host| {
            let owner = owned.host(host, &key.namespace);
            problems.extend(owner.iter().map(|owner| Problem::from(format!("hosts: {host:?} belongs to {owner}"))));
            owner.is_none()
        });
        vips.retain(|net| {
            let owner = is_single(net).then(|| owned.address(net.addr(), &key.namespace)).flatten();
            let taken = owner.iter().map(|owner| format!("addresses: {} belongs to {owner}", net.addr()));
            problems.extend(taken.map(Problem::from));
            owner.is_none()
        });
    }

    fn selector(&self) -> Option<&Labels> {
        let is_used = !matches!(self.resolution, None | Some(Resolution::None));
        let labels = &self.spec.workload_selector.as_ref()?.labels;
        (is_used && !self.is_beyond && !labels.is_empty()).then_some(labels)
    }

    /// The names of its services, with the ports of one endpoint behind each.
    fn services(&self, hosts: &[String], named: &BTreeMap<String, u16>) -> BTreeMap<String, PortList> {
        let ports: Vec<Port> = self
            .ports
            .iter()
            .map(|port| port_of(port, named.get(&port.name).copied().filter(|own| *own > 0)))
            .collect();
        let service = |host: &String| (self.service_name(host), PortList { ports: ports.clone() });
        hosts.iter().map(service).collect()
    }

    fn service_name(&self, host: &str) -> String {
        format!("{}/{host}", self.key.namespace)
    }
}

/// A host of an entry among the bindings, where no Service has such a name, and in xDS.
pub fn names(namespace: &str, host: &str) -> (Key, String) {
    let host = host.to_ascii_lowercase();
    (Key::new(namespace, format!("ServiceEntry/{host}")), format!("{namespace}/{host}"))
}

/// The names of services that select a pod of these labels, with its ports behind each.
pub fn services_selecting_pod(
    selectors: &EntrySelectors,
    namespace: &str,
    labels: &Labels,
) -> BTreeMap<String, PortList> {
    let selecting = selectors.get(namespace).into_iter().flatten();
    let selecting = selecting.filter(|selector| selector.labels.are_among(labels));
    selecting.flat_map(|selector| selector.services.clone()).collect()
}

/// The names of services that select what has these labels and names its ports so, with its ports behind each.
pub fn services_selecting(
    entries: &Entries<'_>,
    namespace: &str,
    labels: &Labels,
    named: &BTreeMap<String, u16>,
) -> BTreeMap<String, PortList> {
    entries.selecting(namespace, labels).flat_map(|entry| entry.services(&entry.hosts, named)).collect()
}

/// The policies that select these labels in this namespace.
pub type Selecting<'s> = dyn Fn(&str, &Labels) -> Vec<String> + 's;

/// Emits all of them; returns what each service is bound to, by its name.
pub fn translate(
    view: View<'_>,
    entries: &Entries<'_>,
    policies: &Selecting<'_>,
    out: &mut Translation,
) -> BTreeMap<String, (Key, Binding)> {
    let world = view.world;
    let all = entries.by_age();
    let allocation = Allocation::new(&world.mesh.allocation, &all);
    let mut bindings = BTreeMap::new();
    for entry in all {
        let binding = binding::resolve(world, &entry.object.meta, TrafficType::Entry);
        let mut problems = entry.problems.clone();
        problems.extend(allocation.refused(entry.key).map(|(ip, older)| {
            let Key { namespace, name } = older;
            Problem::from(format!("addresses: {ip} is already that of ServiceEntry {name} of namespace {namespace}"))
        }));
        let mut addresses = Vec::new();
        let own = own_vips(entry, &allocation);
        let identities = identities(view, entry, &mut problems);
        for host in &entry.hosts {
            let Some(visibility) = entry.visibility else { continue };
            let allocated = allocation.of(entry.key, host);
            if allocation.exhausted.contains(&(entry.key, host.as_str())) {
                problems.push(format!("hosts: no address is left for {host}").into());
            }
            addresses.extend(allocated.iter().map(|ip| (host.clone(), *ip)));
            // Told once it is written: nobody shall see an address that a restart could change.
            let written = entry.told.of(host).iter().copied().filter(|ip| allocated.contains(ip));
            let is_canonical = entries.canonical.get(host).is_some_and(|key| *key == entry.key);
            let message = Service {
                name: entry.key.name.to_string(),
                namespace: entry.key.namespace.to_string(),
                hostname: host.clone(),
                addresses: vips(world, own.iter().copied().chain(written.map(|ip| (ip, None)))),
                ports: entry.ports.iter().map(|port| port_of(port, None)).collect(),
                subject_alt_names: identities.clone(),
                waypoint: binding.address.as_deref().cloned(),
                weighted_waypoints: binding.weighted(),
                load_balancing: load_balancing(world, entry),
                canonical: is_canonical,
                ingress_use_waypoint: binding::ingress_uses_waypoint(world, &entry.object.meta),
                visibility: visibility.into(),
                ..Service::default()
            };
            let aliases = message.addresses.iter().map(alias).collect();
            let name = entry.service_name(host);
            let resource = Address { r#type: Some(address::Type::Service(message)) };
            out.resources.push(address_resource(name.clone(), &resource, aliases));
            bindings.insert(name, (names(&entry.key.namespace, host).0, binding.clone()));
        }
        if entry.visibility.is_some() && !entry.hosts.is_empty() {
            endpoints(view, entry, policies, out, &mut problems);
        }
        out.verdicts.push(verdict(entry, problems, &binding, addresses));
    }
    let unreadable = world.service_entries.iter().filter_map(|(key, object)| {
        let reason = object.spec.as_ref().err()?;
        let wanted = Wanted::new(ACCEPTED, Status::False, "Invalid", format!("{reason}; the entry does nothing"));
        let wanted = wanted.because([&Problem::fault(reason.as_str(), EXPLAIN)]);
        let report = Report::Conditions { owned: OWNED, wanted: vec![wanted] };
        Some(Verdict { kind: Kind::ServiceEntry, key: key.clone(), generation: object.generation(), report })
    });
    out.verdicts.extend(unreadable);
    bindings
}

/// Those that its user wrote, but for those that are another entry's.
fn own_vips(entry: &Entry<'_>, allocation: &Allocation<'_>) -> Vec<(IpAddr, Option<u32>)> {
    let refused = allocation.refused_of(entry.key);
    let own = entry.vips.iter().filter(|net| !(is_single(net) && refused.contains(&net.addr())));
    own.map(|net| (net.addr(), (!is_single(net)).then(|| u32::from(net.prefix_len())))).collect()
}

fn vips(world: &World, addresses: impl Iterator<Item = (IpAddr, Option<u32>)>) -> Vec<NetworkAddress> {
    let network = world.network();
    let vip = |(ip, length)| NetworkAddress { network: network.into(), address: address_bytes(ip), length };
    addresses.map(vip).collect()
}

/// `network/IP`, and for a range its length too.
fn alias(vip: &NetworkAddress) -> String {
    let ip = match (<[u8; 4]>::try_from(&*vip.address), <[u8; 16]>::try_from(&*vip.address)) {
        (Ok(v4), _) => IpAddr::from(v4),
        (_, Ok(v6)) => IpAddr::from(v6),
        _ => return String::new(),
    };
    match vip.length {
        Some(length) => format!("{}/{ip}/{length}", vip.network),
        None => format!("{}/{ip}", vip.network),
    }
}

/// Who may answer for it: those that it names, and its endpoints of other networks, which are known by nothing else. One
/// that is left out is not accepted.
fn identities(view: View<'_>, entry: &Entry<'_>, problems: &mut Vec<Problem>) -> Vec<String> {
    let (world, namespace) = (view.world, &*entry.key.namespace);
    let named = entry.spec.subject_alt_names.iter().filter(|name| name.starts_with("spiffe://")).cloned();
    let mut names: Vec<String> = named.collect();
    let listed = entry.spec.endpoints.iter().filter_map(|endpoint| match endpoint {
        Lenient::Good(spec) => Some(spec),
        Lenient::Bad(_) => None,
    });
    let beyond = listed.filter(|spec| networks::of_entry(world, &entry.object.meta, spec) != world.network());
    names.extend(beyond.map(|spec| world.identity(namespace, &spec.service_account)));
    if let Some(selector) = entry.selector() {
        names.extend(view.lookups.beyond(namespace).selected(selector));
    }
    let mut seen = HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    let (all, mut left) = (names.len(), most::NAMES / entry.hosts.len().max(1));
    let fitting = names.iter().take_while(|name| {
        let fits = name.len() <= left;
        left -= if fits { name.len() } else { 0 };
        fits
    });
    let fitting = fitting.count();
    names.truncate(fitting);
    if fitting < all {
        let (beyond, most) = (all - fitting, most::NAMES);
        let message = format!("subjectAltNames: the last {beyond} are left out; all hosts together have {most} bytes");
        problems.push(message.into());
    }
    names
}

fn load_balancing(world: &World, entry: &Entry<'_>) -> Option<LoadBalancing> {
    use load_balancing::{HealthPolicy, Mode};
    if entry.resolution == Some(Resolution::None) {
        return Some(LoadBalancing {
            mode: Mode::Passthrough.into(),
            health_policy: HealthPolicy::AllowAll.into(),
            ..LoadBalancing::default()
        });
    }
    let (mode, scopes) = distributed(annotated_distribution(world, &entry.object.meta));
    (mode != Mode::UnspecifiedMode).then(|| LoadBalancing {
        routing_preference: scopes.iter().map(|scope| i32::from(*scope)).collect(),
        mode: mode.into(),
        ..LoadBalancing::default()
    })
}

/// The endpoints it lists; by DNS and without any, each host is its own.
fn endpoints(
    view: View<'_>,
    entry: &Entry<'_>,
    policies: &Selecting<'_>,
    out: &mut Translation,
    problems: &mut Vec<Problem>,
) {
    if matches!(entry.resolution, None | Some(Resolution::None)) || entry.spec.workload_selector.is_some() {
        return;
    }
    let cluster = &view.world.mesh.cluster_id;
    let uid = |address: &str| format!("{cluster}/{}/ServiceEntry/{}/{address}", networking::GROUP, entry.key);
    let mut emit = |uid: String, spec: &WorkloadEntrySpec, hosts: &[String]| {
        let services = entry.services(hosts, &spec.ports);
        let mut policies = policies(&entry.key.namespace, &workload_entry::labels_of(&entry.object.meta, spec));
        policies.sort_unstable();
        let endpoint = Endpoint { uid, spec: spec.clone(), services, policies, ..Endpoint::default() };
        let by_name = entry.resolution == Some(Resolution::Dns);
        workload_entry::resource(view, &entry.object.meta, &endpoint, by_name)
            .map(|resource| out.resources.push(resource))
    };
    if entry.spec.endpoints.is_empty() && entry.resolution == Some(Resolution::Dns) {
        for host in &entry.hosts {
            let spec = WorkloadEntrySpec { address: host.clone(), ..WorkloadEntrySpec::default() };
            // A host name is always an address.
            let _ = emit(uid(host), &spec, std::slice::from_ref(host));
        }
    }
    let mut times: HashMap<&str, u32> = HashMap::new();
    let each = (entry.hosts.len() * entry.ports.len()).max(1);
    let fit = most::LISTED / each;
    if entry.spec.endpoints.len() > fit {
        let message = format!(
            "endpoints: {} are left out; {} pairs of host and port each come to more than {}",
            entry.spec.endpoints.len() - fit,
            each,
            most::LISTED
        );
        problems.push(Problem::fault(message, "write several entries, with fewer hosts and ports each"));
    }
    for endpoint in entry.spec.endpoints.iter().take(fit) {
        let outcome = match endpoint {
            Lenient::Good(spec) => {
                let count = times.entry(&spec.address).or_default();
                *count += 1;
                // The same address again, with other ports.
                let again = if *count > 1 { format!("/{count}") } else { String::new() };
                emit(uid(&spec.address) + &again, spec, &entry.hosts)
            }
            Lenient::Bad(reason) => Err(Unusable { reason: reason.clone(), mend: Some(EXPLAIN) }),
        };
        problems.extend(outcome.err().map(|unusable| unusable.worded(|reason| format!("endpoints: {reason}"))));
    }
}

fn verdict(entry: &Entry<'_>, problems: Vec<Problem>, binding: &Binding, addresses: Vec<(String, IpAddr)>) -> Verdict {
    let accepted = match (problems.is_empty(), entry.hosts.is_empty()) {
        (true, false) => Wanted::new(ACCEPTED, Status::True, "Accepted", "all of it is enforced"),
        (true, true) => Wanted::new(ACCEPTED, Status::False, "Invalid", "hosts: there is none"),
        (false, false) => Wanted::new(ACCEPTED, Status::True, "PartiallyInvalid", joined(&problems)),
        (false, true) => Wanted::new(ACCEPTED, Status::False, "Invalid", joined(&problems)),
    };
    let (reason, message) = match (entry.visibility, entry.is_limited) {
        (Some(Visibility::Public), _) => ("Public", "every namespace sees it"),
        (Some(Visibility::Namespace), false) => ("Namespace", "only its own namespace sees it"),
        (Some(Visibility::Namespace), true) => ("Namespace", "only its own namespace sees it (serviceEntryVisibility)"),
        (None, false) => ("Nobody", "nobody sees it (exportTo: ~)"),
        (None, true) => ("Nobody", "nobody sees it (serviceEntryVisibility)"),
    };
    let wanted = [accepted.because(&problems), Wanted::new(VISIBILITY, Status::True, reason, message)];
    Verdict {
        kind: Kind::ServiceEntry,
        key: entry.key.clone(),
        generation: entry.object.generation(),
        report: Report::Addressed {
            owned: OWNED,
            wanted: wanted.into_iter().chain(binding.condition.as_deref().cloned()).collect(),
            addresses,
        },
    }
}

fn port_of(port: &networking::Port, own: Option<u16>) -> Port {
    let target = own.or(Some(port.target_port).filter(|target| *target > 0)).unwrap_or(port.number);
    Port {
        service_port: port.number.into(),
        target_port: target.into(),
        app_protocol: protocol(&port.protocol).unwrap_or(AppProtocol::Unknown).into(),
    }
}

/// An empty one says nothing, which is known too.
fn protocol(text: &str) -> Option<AppProtocol> {
    if text.is_empty() { Some(AppProtocol::Unknown) } else { app_protocol_named(text) }
}

/// One address, not a range.
pub fn is_single(net: &IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

const HOST: &str = "write names such as www.example.com, with *. before one to mean all below it";
const ADDRESS: &str = "write an IP address or a CIDR";

/// Nobody's: Istio takes IP addresses, and stars before a part of a label.
fn is_no_host(host: &str) -> bool {
    let name = host.strip_prefix('*').map_or(host, |rest| rest.trim_start_matches(['.', '-']));
    name.parse::<IpAddr>().is_err() && !is_hostname(name)
}

/// Letters, digits, hyphens and underscores between dots (RFC 1123, and what DNS is used for beside).
pub fn is_hostname(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(is_label) && text.parse::<IpAddr>().is_err()
}
