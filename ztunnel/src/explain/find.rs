//! Who and where is meant: what people call a pod or a service.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::model::{Service, Workload};

use super::{NoAnswer, View};
use crate::dns::answer::{Client, Kind, answer};

/// An answer must stay readable; DNS hands out no more than fit anyway.
const MOST_ADDRESSES: usize = 32;

/// Where an application would connect to.
pub(super) struct Destination {
    pub(super) said: String,
    pub(super) addresses: Vec<SocketAddr>,
}

/// A workload's UID, an address of its, or `<namespace>/<name>`.
pub(super) fn source(view: &View<'_>, text: &str) -> Result<Arc<Workload>, NoAnswer> {
    let unknown = |what: &str| NoAnswer::Unknown(format!("--from {text}: {what}"));
    if let Ok(ip) = text.parse::<IpAddr>() {
        let found = view.world.workload_by_ip(&view.settings.network, ip);
        return found
            .cloned()
            .ok_or_else(|| unknown("no workload has that address (pods of the host network own none)"));
    }
    if let Some(workload) = view.world.workload(text) {
        return Ok(workload.clone());
    }
    let Some((namespace, name)) = text.split_once('/') else {
        return Err(NoAnswer::Usage(format!("--from {text}: it is <namespace>/<pod>, a workload's UID or an address")));
    };
    match &by_name(view, namespace, name)[..] {
        [] => Err(unknown("no such workload is known from the control plane")),
        [only] => Ok(only.clone()),
        several => {
            let uids: Vec<&str> = several.iter().map(|workload| &*workload.uid).collect();
            Err(NoAnswer::Usage(format!("--from {text}: which of {}?", uids.join(", "))))
        }
    }
}

fn by_name(view: &View<'_>, namespace: &str, name: &str) -> Vec<Arc<Workload>> {
    let is_it = |w: &&Arc<Workload>| *w.namespace == *namespace && *w.name == *name;
    view.world.workloads().filter(is_it).cloned().collect()
}

/// `<what>:<port>`, where what is an address, a host name, `<namespace>/<service>` or `<namespace>/<pod>`.
pub(super) fn destination(view: &View<'_>, source: &Workload, text: &str) -> Result<Destination, NoAnswer> {
    let usage = || {
        let form = "it is HOST:PORT; HOST is an address ([..] around IPv6), a host name, <namespace>/<service> or <namespace>/<pod>";
        NoAnswer::Usage(format!("--to {text}: {form}"))
    };
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(Destination { said: address.to_string(), addresses: vec![mesh::net::canonical(address)] });
    }
    let (what, port) = text.rsplit_once(':').ok_or_else(usage)?;
    let port: u16 = port.parse().ok().filter(|port| *port > 0).ok_or_else(usage)?;
    let (said, ips) = match what.split_once('/') {
        Some((namespace, name)) => named(view, source, namespace, name).ok_or_else(|| {
            NoAnswer::Unknown(format!("--to {text}: neither a service nor a workload of that name is known"))
        })?,
        None if what.is_empty() || what.contains(':') => return Err(usage()),
        None => by_dns(view, source, what).ok_or_else(|| {
            let why = "not a name of the mesh; the pod's own DNS server is asked, so give the address that it says";
            NoAnswer::Unknown(format!("--to {text}: {why}"))
        })?,
    };
    let usable = |ip: &IpAddr| source.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
    // Applications try addresses in the order in which the resolver gives them, and not all at once.
    let first = ips.iter().copied().find(usable);
    let ips = ips.into_iter().filter(|ip| first.is_some_and(|first| first.is_ipv4() == ip.is_ipv4()));
    let addresses: Vec<_> = ips.take(MOST_ADDRESSES).map(|ip| SocketAddr::new(ip, port)).collect();
    if addresses.is_empty() {
        return Err(NoAnswer::Unknown(format!("--to {text}: {said}, without an address that the source can use")));
    }
    Ok(Destination { said, addresses })
}

fn by_dns(view: &View<'_>, source: &Workload, name: &str) -> Option<(String, Vec<IpAddr>)> {
    let settings = view.settings;
    let client = Client {
        namespace: &source.namespace,
        network: &settings.network,
        domain: &settings.domain,
        preferred_namespace: settings.preferred_namespace.as_deref(),
        ipv6: settings.ipv6,
    };
    let asked = name.trim_end_matches('.').to_ascii_lowercase();
    let found = [Kind::A, Kind::Aaaa].map(|kind| answer(view.world, &client, &asked, kind));
    if found.iter().all(Option::is_none) {
        return None;
    }
    let addresses: Vec<IpAddr> = found.into_iter().flatten().flat_map(|found| found.addresses).collect();
    Some((format!("host {name}, as DNS answers in namespace {}", source.namespace), addresses))
}

fn named(view: &View<'_>, source: &Workload, namespace: &str, name: &str) -> Option<(String, Vec<IpAddr>)> {
    let is_it = |s: &&Arc<Service>| *s.namespace == *namespace && (*s.name == *name || *s.hostname == *name);
    if let Some(service) = view.world.services().find(is_it) {
        let key = service.key();
        if service.vips.is_empty() {
            let of_network = view.world.endpoints(&key).filter(|(w, _)| w.network == source.network);
            let addresses = of_network.flat_map(|(w, _)| w.addresses.clone()).collect();
            return Some((format!("headless service {key}, by its endpoints' addresses"), addresses));
        }
        let vips = service.vips.iter().filter(|vip| vip.network == source.network).map(|vip| vip.address);
        return Some((format!("service {key}"), vips.collect()));
    }
    let workload = by_name(view, namespace, name).into_iter().next()?;
    Some((format!("workload {}", workload.uid), workload.addresses.clone()))
}
