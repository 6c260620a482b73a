//! Addresses for hosts of ServiceEntries that name none: one of each family, so that a name can be dialled and told from
//! others on the same port.
//!
//! An address is a hash of namespace and host, or the next free one. What stands in a status already is kept, so
//! addresses survive restarts and other objects coming and going; where two claim the same, the older object keeps it.
//! Written out by users (`spec.addresses`) it is nobody else's. Pure: the same world gives the same addresses.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;
use xxhash_rust::xxh64::xxh64;

use super::service_entry::Entry;
use crate::types::Key;

/// Where addresses are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefixes {
    /// Without it nothing is allocated, and what was is taken back.
    pub enabled: bool,
    pub v4: Ipv4Net,
    pub v6: Ipv6Net,
}

impl Default for Prefixes {
    fn default() -> Self {
        Self {
            enabled: true,
            v4: Ipv4Net::new_assert(Ipv4Addr::new(240, 240, 0, 0), 16),
            v6: Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0), 48),
        }
    }
}

impl Prefixes {
    /// The pool of each family: its prefix, and how many addresses of it are used.
    fn pools(&self) -> [(IpNet, u64); 2] {
        // The first and the last address of an IPv4 prefix mean something else to many. Of IPv6, more than anybody needs.
        let v4 = (1_u64 << (32 - self.v4.prefix_len())).saturating_sub(2);
        let v6 = (1_u64 << (128 - self.v6.prefix_len()).min(48)) - 1;
        [(self.v4.into(), v4), (self.v6.into(), v6)]
    }
}

/// What is said of one host.
pub type Host<'a> = (&'a Key, &'a str);

/// The addresses of every host that is to have some, and the hosts for which a pool had none left.
#[derive(Debug, Default)]
pub struct Allocation<'a> {
    addresses: BTreeMap<Host<'a>, Vec<IpAddr>>,
    pub exhausted: HashSet<Host<'a>>,
}

impl<'a> Allocation<'a> {
    /// `entries` with the oldest first.
    pub fn new(prefixes: &Prefixes, entries: &[&'a Entry<'a>]) -> Self {
        let mut this = Self::default();
        if !prefixes.enabled {
            return this;
        }
        let spoken_for: Vec<IpNet> = entries.iter().flat_map(|entry| entry.vips.iter().copied()).collect();
        let (single, ranges): (Vec<IpNet>, Vec<IpNet>) =
            spoken_for.into_iter().partition(|net| net.prefix_len() == net.max_prefix_len());
        let mut taken: HashSet<IpAddr> = single.iter().map(IpNet::addr).collect();
        let is_free = |taken: &HashSet<IpAddr>, ip: &IpAddr| {
            !taken.contains(ip) && !ranges.iter().any(|range| range.contains(ip))
        };
        let hosts: Vec<(&Entry<'a>, Host<'a>)> = entries
            .iter()
            .filter(|entry| entry.wants_addresses)
            .flat_map(|entry| entry.hosts.iter().map(|host| (*entry, (entry.key, host.as_str()))))
            .filter(|(_, (_, host))| !host.starts_with('*'))
            .collect();
        for (prefix, size) in prefixes.pools() {
            let mut lacking = Vec::new();
            for (entry, host) in &hosts {
                let kept = in_status(&entry.object.status, host.1)
                    .find(|ip| index(&prefix, *ip).is_some_and(|n| (1..=size).contains(&n)) && is_free(&taken, ip));
                match kept {
                    Some(ip) => {
                        taken.insert(ip);
                        this.addresses.entry(*host).or_default().push(ip);
                    }
                    None => lacking.push(*host),
                }
            }
            for host in lacking {
                let found = probe(&prefix, size, host).find(|ip| is_free(&taken, ip));
                match found {
                    Some(ip) => {
                        taken.insert(ip);
                        this.addresses.entry(host).or_default().push(ip);
                    }
                    None => _ = this.exhausted.insert(host),
                }
            }
        }
        this
    }

    pub fn of(&self, key: &'a Key, host: &'a str) -> &[IpAddr] {
        self.addresses.get(&(key, host)).map(Vec::as_slice).unwrap_or_default()
    }
}

/// The addresses that a status gives `host`.
pub fn in_status<'s>(status: &'s Value, host: &'s str) -> impl Iterator<Item = IpAddr> + 's {
    let all = status["addresses"].as_array().into_iter().flatten();
    all.filter(move |entry| entry["host"] == *host).filter_map(|entry| entry["value"].as_str()?.parse().ok())
}

/// Addresses to try, each of the pool once.
fn probe(prefix: &IpNet, size: u64, (key, host): Host<'_>) -> impl Iterator<Item = IpAddr> + use<> {
    let start = xxh64(format!("{}/{host}", key.namespace).as_bytes(), 0);
    let prefix = *prefix;
    (0..size).map(move |step| at(&prefix, 1 + (start % size + step) % size))
}

fn at(prefix: &IpNet, index: u64) -> IpAddr {
    match prefix.network() {
        // An index is below the size of the pool, which a prefix of this family bounds.
        IpAddr::V4(base) => Ipv4Addr::from(u32::from(base) | u32::try_from(index).unwrap_or_default()).into(),
        IpAddr::V6(base) => Ipv6Addr::from(u128::from(base) | u128::from(index)).into(),
    }
}

/// Where in the prefix an address lies; `None` outside of it.
fn index(prefix: &IpNet, ip: IpAddr) -> Option<u64> {
    if !prefix.contains(&ip) {
        return None;
    }
    match (prefix.network(), ip) {
        (IpAddr::V4(base), IpAddr::V4(ip)) => Some(u64::from(u32::from(ip) - u32::from(base))),
        (IpAddr::V6(base), IpAddr::V6(ip)) => u64::try_from(u128::from(ip) - u128::from(base)).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::translate::fixture;
    use crate::translate::service_entry::Entries;
    use crate::translate::world::World;

    /// An entry: name, hosts, what else its spec says, and its status.
    fn entry(name: &str, hosts: &[&str], spec: &str, status: &str) -> String {
        format!(
            "kind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{hosts: {hosts:?}, resolution: DNS, ports: [{{number: 80, name: http}}]{spec}}}\n\
             status: {{addresses: [{status}]}}\n---\n"
        )
    }

    fn status(host: &str, value: &str) -> String {
        format!("{{host: {host}, value: \"{value}\"}}")
    }

    fn told(world: &World, prefixes: &Prefixes) -> BTreeMap<String, Vec<IpAddr>> {
        let entries = Entries::new(world);
        let all = entries.by_age();
        let allocation = Allocation::new(prefixes, &all);
        all.iter()
            .flat_map(|entry| entry.hosts.iter().map(move |host| (entry, host)))
            .map(|(entry, host)| (host.clone(), allocation.of(entry.key, host).to_vec()))
            .collect()
    }

    fn allocated(yaml: &str) -> BTreeMap<String, Vec<IpAddr>> {
        told(&fixture::world(yaml), &Prefixes::default())
    }

    #[test]
    fn every_host_gets_one_address_of_each_family_and_no_two_the_same() {
        let mut yaml = String::new();
        for n in 0..300 {
            let hosts = [format!("a{n}.example.com"), format!("b{n}.example.com")];
            let _ = write!(yaml, "{}", entry(&format!("e{n}"), &[&hosts[0], &hosts[1]], "", ""));
        }
        let all = allocated(&yaml);
        let mut seen = HashSet::new();
        for (host, addresses) in &all {
            let [v4, v6] = addresses[..] else { panic!("{host}: {addresses:?}") };
            assert!(Prefixes::default().v4.contains(&v4.to_string().parse::<Ipv4Addr>().unwrap()), "{v4}");
            assert!(v6.to_string().starts_with("2001:2::"), "{v6}");
            assert!(seen.insert(v4) && seen.insert(v6), "{host}: {addresses:?} twice");
        }
        assert_eq!(seen.len(), 1200);
        assert_eq!(all, allocated(&yaml), "the same again");
    }

    #[test]
    fn what_a_status_says_is_kept_and_the_older_object_wins_a_quarrel() {
        let fresh = allocated(&entry("new", &["x.test"], "", ""));
        let kept = allocated(&entry("new", &["x.test"], "", &status("x.test", "240.240.7.7")));
        assert_eq!(kept["x.test"], ["240.240.7.7".parse::<IpAddr>().unwrap(), fresh["x.test"][1]]);
        // Of the same age, so the name decides.
        let quarrel = entry("a", &["a.test"], "", &status("a.test", "240.240.7.7"))
            + &entry("b", &["b.test"], "", &status("b.test", "240.240.7.7"));
        let settled = allocated(&quarrel);
        assert_eq!(settled["a.test"][0].to_string(), "240.240.7.7");
        assert_ne!(settled["b.test"][0], settled["a.test"][0]);
        // Somebody else's address, the prefix's own, one for another host, one that is none: none of them counts.
        for wrong in ["192.0.2.1", "240.240.0.0", "240.240.255.255", "nonsense", "2001:2::"] {
            assert_eq!(allocated(&entry("new", &["x.test"], "", &status("x.test", wrong))), fresh, "{wrong}");
        }
        assert_eq!(allocated(&entry("new", &["x.test"], "", &status("y.test", "240.240.7.7"))), fresh);
    }

    #[test]
    fn an_address_that_a_user_wrote_is_nobody_elses() {
        let mine = allocated(&entry("new", &["x.test"], "", ""))["x.test"][0];
        let theirs = |address: &str| entry("old", &["y.test"], &format!(", addresses: [{address}]"), "");
        let all = allocated(&(theirs(&mine.to_string()) + &entry("new", &["x.test"], "", "")));
        assert_ne!(all["x.test"][0], mine);
        assert!(all["y.test"].is_empty());
        let all =
            allocated(&(theirs("240.240.0.0/17") + &entry("new", &["x.test"], "", &status("x.test", "240.240.1.1"))));
        let IpAddr::V4(moved) = all["x.test"][0] else { panic!("{all:?}") };
        assert!(moved.octets()[2] >= 128, "{moved} is in the range that somebody else has");
    }

    #[test]
    fn nobody_gets_one_who_has_one_wants_none_or_could_not_use_it() {
        for (spec, host) in [
            (", addresses: [192.0.2.1]", "x.test"),
            (", resolution: NONE", "x.test"),
            (", resolution: SOMEHOW", "x.test"),
            ("", "\\\"*.x.test\\\""),
        ] {
            let host = host.replace("\\\"", "");
            let yaml = entry("e", &[&host], spec, &status("x.test", "240.240.7.7"));
            let yaml = if spec.contains("resolution") { yaml.replace("resolution: DNS, ", "") } else { yaml };
            assert!(allocated(&yaml).values().all(Vec::is_empty), "{yaml}");
        }
        let opted_out = entry("e", &["x.test"], "", "").replace(
            "namespace: shop",
            "namespace: shop, labels: {networking.istio.io/enable-autoallocate-ip: \"false\"}",
        );
        assert!(allocated(&opted_out)["x.test"].is_empty());
        let world = fixture::world(&entry("e", &["x.test"], "", &status("x.test", "240.240.7.7")));
        let disabled = Prefixes { enabled: false, ..Prefixes::default() };
        assert!(told(&world, &disabled)["x.test"].is_empty());
    }

    #[test]
    fn a_pool_is_used_to_its_last_address_and_then_says_so() {
        let prefixes = Prefixes {
            v4: Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 29),
            v6: Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0), 126),
            ..Prefixes::default()
        };
        let mut yaml = String::new();
        for n in 0..8 {
            yaml += &entry(&format!("e{n}"), &[&format!("x{n}.test")], "", "");
        }
        let world = fixture::world(&yaml);
        let all = told(&world, &prefixes);
        let v4: HashSet<IpAddr> = all.values().flatten().filter(|ip| ip.is_ipv4()).copied().collect();
        let v6 = all.values().flatten().filter(|ip| ip.is_ipv6()).count();
        assert_eq!((v4.len(), v6), (6, 3));
        let entries = Entries::new(&world);
        let all = entries.by_age();
        assert_eq!(Allocation::new(&prefixes, &all).exhausted.len(), 5, "in one family or the other");
    }
}
