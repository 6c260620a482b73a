//! Addresses for hosts of ServiceEntries that name none: one of each family, so that a name can be dialled and told from
//! others on the same port.
//!
//! An address is a hash of namespace and host, or the next free one. What stands in a status already is kept, so
//! addresses survive restarts and other objects coming and going; where two claim the same, the older object keeps it,
//! also against one that a user has written out (`spec.addresses`). Ranges that users write take nothing: an address
//! counts before any range. Pure: the same world gives the same addresses.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;
use xxhash_rust::xxh64::xxh64;

use super::service_entry::{Entry, is_single};
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
    /// By object: addresses that its user wrote and that an older object had been given, and that object.
    refused: HashMap<&'a Key, Vec<(IpAddr, &'a Key)>>,
    pub exhausted: HashSet<Host<'a>>,
}

impl<'a> Allocation<'a> {
    /// `entries` with the oldest first.
    pub fn new(prefixes: &Prefixes, entries: &[&'a Entry<'a>]) -> Self {
        let mut this = Self::default();
        if !prefixes.enabled {
            return this;
        }
        let pools = prefixes.pools();
        let mut taken: HashSet<IpAddr> = HashSet::new();
        let mut given: HashMap<IpAddr, &'a Key> = HashMap::new();
        let mut lacking: Vec<(Host<'a>, &(IpNet, u64))> = Vec::new();
        // What is said already, the oldest first.
        for entry in entries {
            for ip in entry.vips.iter().filter(|net| is_single(net)).map(IpNet::addr) {
                match given.get(&ip) {
                    Some(older) => this.refused.entry(entry.key).or_default().push((ip, older)),
                    None => _ = taken.insert(ip),
                }
            }
            let hosts = entry.hosts.iter().filter(|host| entry.wants_addresses && !host.starts_with('*'));
            for host in hosts.map(|host| (entry.key, host.as_str())) {
                for pool in &pools {
                    let mut told = entry.told.of(host.1).iter().copied();
                    let kept = told.find(|ip| is_of(pool, *ip) && !taken.contains(ip));
                    match kept {
                        Some(ip) => {
                            taken.insert(ip);
                            given.insert(ip, entry.key);
                            this.addresses.entry(host).or_default().push(ip);
                        }
                        None => lacking.push((host, pool)),
                    }
                }
            }
        }
        // Then what is free.
        for pool in &pools {
            let mut used = taken.iter().filter(|ip| is_of(pool, **ip)).count() as u64;
            for (host, _) in lacking.iter().filter(|(_, of)| *of == pool) {
                // One of as many addresses as are taken, and one more, is free, if any is.
                let found = (used < pool.1).then(|| probe(pool, *host).find(|ip| !taken.contains(ip))).flatten();
                match found {
                    Some(ip) => {
                        taken.insert(ip);
                        used += 1;
                        this.addresses.entry(*host).or_default().push(ip);
                    }
                    None => _ = this.exhausted.insert(*host),
                }
            }
        }
        for addresses in this.addresses.values_mut() {
            addresses.sort_unstable();
        }
        this
    }

    /// The addresses that its user wrote and `key` does not have.
    pub fn refused_of(&self, key: &Key) -> HashSet<IpAddr> {
        self.refused(key).map(|(ip, _)| ip).collect()
    }

    /// Which addresses that its user wrote `key` does not have, and which older object does.
    pub fn refused(&self, key: &Key) -> impl Iterator<Item = (IpAddr, &'a Key)> {
        self.refused.get(key).into_iter().flatten().copied()
    }

    pub fn of(&self, key: &'a Key, host: &'a str) -> &[IpAddr] {
        self.addresses.get(&(key, host)).map(Vec::as_slice).unwrap_or_default()
    }
}

/// The addresses that a status gives each host.
#[derive(Debug, Default)]
pub struct Told<'s>(HashMap<&'s str, Vec<IpAddr>>);

impl<'s> Told<'s> {
    pub fn by(status: &'s Value) -> Self {
        let mut this = Self::default();
        for entry in status["addresses"].as_array().into_iter().flatten() {
            let ip = entry["value"].as_str().and_then(|value| value.parse().ok());
            if let (Some(host), Some(ip)) = (entry["host"].as_str(), ip) {
                this.0.entry(host).or_default().push(ip);
            }
        }
        this
    }

    pub fn of(&self, host: &str) -> &[IpAddr] {
        self.0.get(host).map(Vec::as_slice).unwrap_or_default()
    }
}

/// Addresses to try, each of the pool once.
fn probe((prefix, size): &(IpNet, u64), (key, host): Host<'_>) -> impl Iterator<Item = IpAddr> + use<> {
    let start = xxh64(format!("{}/{host}", key.namespace).as_bytes(), 0);
    let (prefix, size) = (*prefix, *size);
    (0..size).map(move |step| at(&prefix, 1 + (start % size + step) % size))
}

fn at(prefix: &IpNet, index: u64) -> IpAddr {
    match prefix.network() {
        // An index is below the size of the pool, which a prefix of this family bounds.
        IpAddr::V4(base) => Ipv4Addr::from(u32::from(base) | u32::try_from(index).unwrap_or_default()).into(),
        IpAddr::V6(base) => Ipv6Addr::from(u128::from(base) | u128::from(index)).into(),
    }
}

fn is_of((prefix, size): &(IpNet, u64), ip: IpAddr) -> bool {
    index(prefix, ip).is_some_and(|n| (1..=*size).contains(&n))
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
    use crate::translate::lookups::Lookups;
    use crate::translate::owned::Owned;
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
        let entries = Entries::new(world, Owned { world, lookups: &Lookups::of(world) });
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
    }

    #[test]
    fn a_range_that_a_user_wrote_takes_no_address_however_wide_it_is() {
        let given = status("x.test", "240.240.1.1");
        let fresh = allocated(&entry("new", &["x.test"], "", &given));
        assert_eq!(fresh["x.test"][0].to_string(), "240.240.1.1");
        for range in ["0.0.0.0/0", "240.240.0.0/17", "\"::/0\"", "\"2001:2::/48\""] {
            let wide = entry("a-range", &["y.test"], &format!(", addresses: [{range}]"), "");
            let mut all = allocated(&(wide + &entry("new", &["x.test"], "", &given)));
            assert!(all.remove("y.test").expect("the range's host").is_empty());
            assert_eq!(all, fresh, "{range}");
        }
    }

    #[test]
    fn an_address_that_was_given_stays_with_the_older_object_and_the_newcomer_is_named() {
        let refused = |yaml: &str| {
            let world = fixture::world(yaml);
            let entries = Entries::new(&world, Owned { world: &world, lookups: &Lookups::of(&world) });
            let all = entries.by_age();
            let allocation = Allocation::new(&Prefixes::default(), &all);
            let refused = all.iter().flat_map(|entry| {
                allocation.refused(entry.key).map(|(ip, older)| format!("{}: {ip} of {older}", entry.key.name))
            });
            (refused.collect::<Vec<_>>(), told(&world, &Prefixes::default())["x.test"][0].to_string())
        };
        let given = |name| entry(name, &["x.test"], "", &status("x.test", "240.240.7.7"));
        let written = entry("written", &["y.test"], ", addresses: [240.240.7.7]", "");
        let kept = (vec!["written: 240.240.7.7 of shop/older".to_owned()], "240.240.7.7".to_owned());
        // Of the same age, so the name decides.
        assert_eq!(refused(&(written.clone() + &given("older"))), kept);
        let (none, moved) = refused(&(written + &given("younger")));
        assert!(none.is_empty(), "{none:?}");
        assert_ne!(moved, "240.240.7.7");
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
        let entries = Entries::new(&world, Owned { world: &world, lookups: &Lookups::of(&world) });
        let all = entries.by_age();
        assert_eq!(Allocation::new(&prefixes, &all).exhausted.len(), 5, "in one family or the other");
    }
}
