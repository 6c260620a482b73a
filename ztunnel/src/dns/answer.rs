//! What the mesh answers to a name, decided on one snapshot; pure.
//!
//! A pod that asks for `api` in namespace `shop` sends, one after the other, what its search list makes of it. Only
//! the mesh's own names are answered here; everything else is somebody else's to answer, or to deny.

use std::net::IpAddr;

use mesh::model::{IpFamilies, Service};
use mesh::store::Snapshot;

/// Whoever asks.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    pub namespace: &'a str,
    pub network: &'a str,
    /// Cluster domain, `cluster.local`.
    pub domain: &'a str,
    /// Its services win where neither the client's own namespace nor a canonical service does.
    pub preferred_namespace: Option<&'a str>,
    /// Without it no IPv6 address is told.
    pub ipv6: bool,
}

/// The type of address asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    A,
    Aaaa,
}

impl Kind {
    const fn is_of(self, address: IpAddr) -> bool {
        matches!((self, address), (Self::A, IpAddr::V4(_)) | (Self::Aaaa, IpAddr::V6(_)))
    }
}

/// A name of the mesh.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// The name without the search domain that led to it; it is told as the canonical name.
    pub canonical: Option<String>,
    /// Of the kind asked for; empty says that the name exists without one.
    pub addresses: Vec<IpAddr>,
}

/// A name to look up, and how it came about.
struct Candidate {
    name: String,
    stripped: Option<String>,
}

/// What the mesh knows of `name` (lower case, no final dot); `None` where it knows nothing. A name that may mean a
/// Kubernetes service means it, unless the client's own namespace says otherwise: nobody else takes its callers.
#[must_use]
pub fn answer(world: &Snapshot, client: &Client<'_>, name: &str, kind: Kind) -> Option<Found> {
    let candidates = candidates(client, name);
    let (service, canonical) = first(world, client, &candidates)?;
    let (service, canonical) = match *service.namespace == *client.namespace || is_of_cluster(client, service) {
        true => (service, canonical),
        false => kubernetes(world, client, &candidates).unwrap_or((service, canonical)),
    };
    Some(Found { canonical: canonical.map(str::to_owned), addresses: addresses(world, client, service, kind) })
}

/// A service, and the canonical name to tell.
type Named<'a, 'c> = (&'a Service, Option<&'c str>);

/// The first that any candidate stands for, by its name or by a wildcard.
fn first<'a, 'c>(world: &'a Snapshot, client: &Client<'_>, candidates: &'c [Candidate]) -> Option<Named<'a, 'c>> {
    candidates.iter().find_map(|Candidate { name, stripped }| {
        let exact = lookup(world, client, name).map(|service| (service, stripped.as_deref()));
        exact.or_else(|| wildcards(name).find_map(|name| lookup(world, client, &name)).map(|service| (service, None)))
    })
}

/// The first Kubernetes service that any of them names.
fn kubernetes<'a, 'c>(world: &'a Snapshot, client: &Client<'_>, candidates: &'c [Candidate]) -> Option<Named<'a, 'c>> {
    candidates.iter().find_map(|Candidate { name, stripped }| {
        let service = lookup(world, client, name).filter(|service| is_of_cluster(client, service))?;
        Some((service, stripped.as_deref()))
    })
}

/// The name, what Kubernetes' search list makes of it, and the same for what is left without a search domain: a
/// client appends those to names that were complete already.
fn candidates(client: &Client<'_>, name: &str) -> Vec<Candidate> {
    let mut all = vec![Candidate { name: name.to_owned(), stripped: None }];
    all.extend(expansions(client, name).into_iter().map(|name| Candidate { name, stripped: None }));
    let Client { namespace, domain, .. } = client;
    for search in [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), (*domain).to_owned()] {
        let Some(rest) = name.strip_suffix(&search).and_then(|rest| rest.strip_suffix('.')) else { continue };
        if rest.is_empty() {
            continue;
        }
        let stripped = Some(rest.to_owned());
        all.push(Candidate { name: rest.to_owned(), stripped: stripped.clone() });
        all.extend(expansions(client, rest).into_iter().map(|name| Candidate { name, stripped: stripped.clone() }));
    }
    all
}

fn expansions(client: &Client<'_>, name: &str) -> Vec<String> {
    let Client { namespace, domain, .. } = client;
    let is_svc = name.ends_with(".svc");
    match name.split('.').count() {
        1 => vec![format!("{name}.{namespace}.svc.{domain}")],
        2 => vec![format!("{name}.svc.{domain}"), format!("{name}.{namespace}.svc.{domain}")],
        3 if is_svc => vec![format!("{name}.{domain}"), format!("{name}.svc.{domain}")],
        3 => vec![format!("{name}.svc.{domain}")],
        4 if is_svc => vec![format!("{name}.{domain}")],
        _ => Vec::new(),
    }
}

/// `a.b.c` → `*.b.c`, `*.c`.
fn wildcards(name: &str) -> impl Iterator<Item = String> + '_ {
    name.match_indices('.').map(|(dot, _)| format!("*{}", &name[dot..]))
}

/// A service that can be answered for: it has an address of its own, or is a Kubernetes service, whose endpoints' are
/// told. Anything else has its addresses in some other DNS.
fn lookup<'a>(world: &'a Snapshot, client: &Client<'_>, name: &str) -> Option<&'a Service> {
    let service = world.service_by_hostname_preferring(name, client.namespace, client.preferred_namespace)?;
    let below_svc = || {
        let rest = service.hostname.strip_suffix(client.domain).and_then(|rest| rest.strip_suffix(".svc."));
        rest.is_some_and(|rest| !rest.is_empty())
    };
    (!service.vips.is_empty() || below_svc()).then_some(&**service)
}

/// Is it called as a Kubernetes service of its own namespace is?
fn is_of_cluster(client: &Client<'_>, service: &Service) -> bool {
    let rest = service.hostname.strip_suffix(client.domain).and_then(|rest| rest.strip_suffix(".svc."));
    rest.and_then(|rest| rest.strip_suffix(&*service.namespace)).is_some_and(|rest| rest.ends_with('.'))
}

fn addresses(world: &Snapshot, client: &Client<'_>, service: &Service, kind: Kind) -> Vec<IpAddr> {
    let possible = match service.ip_families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::Ipv4 => kind == Kind::A,
        IpFamilies::Ipv6 => kind == Kind::Aaaa,
    };
    if !possible || (kind == Kind::Aaaa && !client.ipv6) {
        return Vec::new();
    }
    if !service.vips.is_empty() {
        let reachable = service.vips.iter().filter(|vip| &*vip.network == client.network);
        return reachable.map(|vip| vip.address).filter(|a| kind.is_of(*a)).collect();
    }
    world
        .endpoints(&service.key())
        .filter(|(workload, _)| &*workload.network == client.network)
        .filter_map(|(workload, _)| workload.addresses.iter().copied().find(|a| kind.is_of(*a)))
        .collect()
}

#[cfg(test)]
mod tests;
