//! Network namespaces and what joins them.
//!
//! ```text
//!              parent (no uplink)   br0 172.30.0.1, fd00:30::1
//!                 │                          │
//!   node-a eth0 172.30.0.11      node-b eth0 172.30.0.12        routes to the other's pods
//!          cbr0 10.244.1.1              cbr0 10.244.2.1
//!          │        │                   │
//!        pod eth0  pod eth0           pod eth0 10.244.2.10, fd00:244:2::a
//! ```
//! Addresses are the same in every lab: labs cannot see one another.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::record::Record;
use crate::sys;

/// Address of the parent namespace: DNS and the API are served there.
pub const PARENT_V4: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);
/// The same for IPv6.
pub const PARENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 1);
/// The bridge in the parent namespace that all traffic between nodes crosses.
pub const WIRE: &str = "br0";
/// Address of every bridge. One that is not set follows the lowest of its ports: a new pod's link would change it, and neighbours
/// would talk to the old one until they ask again.
const BRIDGE_MAC: &str = "02:00:00:00:00:01";
/// Host numbers of pods in their node's subnet.
const POD_HOSTS: std::ops::Range<u8> = 2..255;

/// One network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    /// Name as `ip netns` knows it.
    pub name: String,
}

impl Netns {
    /// Creates the namespace with its loopback up and the settings every namespace of a lab has.
    pub fn create(name: String) -> Result<Self> {
        sys::check(sys::command("ip").args(["netns", "add", &name]))?;
        let netns = Self { name };
        sys::ip_batch(Some(&netns.name), "link set lo up\n")?;
        sys::sysctl(
            &netns.path(),
            &[
                // A machine default of bbr paces veth traffic.
                ("net/ipv4/tcp_congestion_control", "reno"),
                // Addresses are ours alone; waiting for duplicates only delays.
                ("net/ipv6/conf/all/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_ra", "0"),
                ("net/ipv4/conf/all/send_redirects", "0"),
                ("net/ipv4/conf/default/send_redirects", "0"),
                ("net/ipv4/conf/all/accept_redirects", "0"),
                ("net/ipv4/conf/default/accept_redirects", "0"),
                ("net/ipv6/conf/all/accept_redirects", "0"),
                ("net/ipv6/conf/default/accept_redirects", "0"),
                ("net/bridge/bridge-nf-call-iptables", "0"),
                ("net/bridge/bridge-nf-call-ip6tables", "0"),
            ],
        )?;
        Ok(netns)
    }

    /// File that holds the namespace; opening it is how one enters.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Unbinds the name. The namespace itself lives on while a process or socket holds it.
    pub fn delete(&self) -> Result<()> {
        sys::check(sys::command("ip").args(["netns", "delete", &self.name])).map(drop)
    }

    /// Runs `work` on a thread inside the namespace; sockets opened there stay there.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        sys::in_netns(&self.path(), work)
    }
}

/// The namespace between the nodes.
#[derive(Clone, Debug)]
pub struct Parent {
    pub netns: Netns,
}

/// A node: a namespace with an address between the nodes, a bridge for its pods, a cgroup root and a bpffs directory of its own.
#[derive(Clone, Debug)]
pub struct NodeNet {
    pub name: String,
    pub netns: Netns,
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
    index: u8,
    prefix: String,
    /// Where the search for a free address goes on: a used address rests as long as possible, as with a real IPAM.
    next_host: Arc<Mutex<u8>>,
}

/// Addresses of one pod and the namespace that has them.
#[derive(Clone, Debug)]
pub struct PodNet {
    pub netns: Netns,
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
}

impl PodNet {
    /// Both addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.ipv4.into(), self.ipv6.into()]
    }
}

impl Parent {
    /// Creates the parent namespace and its bridge.
    pub fn create(record: &Record) -> Result<Self> {
        let netns = Netns::create(format!("{}parent", record.netns_prefix))?;
        sys::ip_batch(
            Some(&netns.name),
            &format!(
                "link add {WIRE} address {BRIDGE_MAC} type bridge mcast_snooping 0\nlink set {WIRE} up\n\
                 addr add {PARENT_V4}/24 dev {WIRE}\naddr add {PARENT_V6}/64 dev {WIRE} nodad\n"
            ),
        )?;
        sys::sysctl(&netns.path(), &[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
        Ok(Self { netns })
    }

    /// Joins nodes to the bridge, each with routes to the pods of all others.
    pub fn join(&self, record: &Record, names: &[&str]) -> Result<Vec<NodeNet>> {
        let nodes: Vec<NodeNet> =
            (1u8..).zip(names).map(|(index, name)| NodeNet::create(record, index, name)).collect::<Result<_>>()?;
        let mut routes = String::new();
        for node in &nodes {
            self.plug(node)?;
            routes += &node.route_lines();
        }
        sys::ip_batch(Some(&self.netns.name), &routes)?;
        for node in &nodes {
            let others = nodes.iter().filter(|other| other.index != node.index);
            let lines: String = others.map(NodeNet::route_lines).collect();
            sys::ip_batch(Some(&node.netns.name), &lines)?;
        }
        Ok(nodes)
    }

    fn plug(&self, node: &NodeNet) -> Result<()> {
        let NodeNet { name, netns, ipv4, ipv6, .. } = node;
        sys::ip_batch(
            Some(&self.netns.name),
            &format!(
                "link add {name} type veth peer name eth0 netns {}\nlink set {name} master {WIRE} up\n",
                netns.name
            ),
        )?;
        sys::ip_batch(
            Some(&netns.name),
            &format!(
                "addr add {ipv4}/24 dev eth0\naddr add {ipv6}/64 dev eth0 nodad\nlink set eth0 up\n\
                 route add default via {PARENT_V4}\nroute add ::/0 via {PARENT_V6}\n"
            ),
        )
    }
}

impl NodeNet {
    fn create(record: &Record, index: u8, name: &str) -> Result<Self> {
        let netns = Netns::create(format!("{}{name}", record.netns_prefix))?;
        let node = Self {
            name: name.to_owned(),
            netns,
            ipv4: Ipv4Addr::new(172, 30, 0, 10 + index),
            ipv6: Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 0x10 + u16::from(index)),
            index,
            prefix: record.netns_prefix.clone(),
            next_host: Arc::new(Mutex::new(POD_HOSTS.start)),
        };
        let (gateway4, gateway6) = node.gateways();
        sys::ip_batch(
            Some(&node.netns.name),
            &format!(
                "link add cbr0 address {BRIDGE_MAC} type bridge mcast_snooping 0\nlink set cbr0 up\n\
                 addr add {gateway4}/24 dev cbr0\naddr add {gateway6}/64 dev cbr0 nodad\n"
            ),
        )?;
        sys::sysctl(&node.netns.path(), &[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
        Ok(node)
    }

    fn gateways(&self) -> (Ipv4Addr, Ipv6Addr) {
        self.host(1)
    }

    fn host(&self, host: u8) -> (Ipv4Addr, Ipv6Addr) {
        let subnet = u16::from(self.index);
        (Ipv4Addr::new(10, 244, self.index, host), Ipv6Addr::new(0xfd00, 0x244, subnet, 0, 0, 0, 0, u16::from(host)))
    }

    /// The subnet of the node's pods, as `spec.podCIDR` says it.
    pub fn pod_cidrs(&self) -> [String; 2] {
        let (v4, v6) = self.host(0);
        [format!("{v4}/24"), format!("{v6}/64")]
    }

    fn route_lines(&self) -> String {
        let [v4, v6] = self.pod_cidrs();
        format!("route add {v4} via {}\nroute add {v6} via {}\n", self.ipv4, self.ipv6)
    }

    /// Makes the namespace of a pod on this node with the next free address. `label` must be unique in the lab.
    ///
    /// # Errors
    /// When the subnet is used up.
    pub fn add_pod(&self, label: &str) -> Result<PodNet> {
        // Held until the link is there, by which the next one sees that the address is taken.
        let mut next_host = self.next_host.lock().unwrap_or_else(PoisonError::into_inner);
        let host = self.free_host(*next_host)?;
        *next_host = host + 1;
        let (ipv4, ipv6) = self.host(host);
        let (gateway4, gateway6) = self.gateways();
        let netns = Netns::create(format!("{}{label}", self.prefix))?;
        // The device on the node carries the address's number: `free_host` reads the allocation back from there.
        sys::ip_batch(
            Some(&self.netns.name),
            &format!(
                "link add veth{host} type veth peer name eth0 netns {}\nlink set veth{host} master cbr0 up\n",
                netns.name
            ),
        )?;
        drop(next_host);
        // Host routes only: pods of one node reach each other through the node, whose connection tracking undoes the DNAT of
        // service addresses on the way back.
        sys::ip_batch(
            Some(&netns.name),
            &format!(
                "addr add {ipv4}/32 dev eth0\naddr add {ipv6}/128 dev eth0 nodad\nlink set eth0 up\n\
                 route add {gateway4} dev eth0\nroute add {gateway6} dev eth0\n\
                 route add default via {gateway4}\nroute add ::/0 via {gateway6}\n"
            ),
        )?;
        Ok(PodNet { netns, ipv4, ipv6 })
    }

    /// Removes a pod's link at once, so that its address is free again even while something still holds the namespace.
    pub fn remove_pod(&self, pod: &PodNet) -> Result<()> {
        let host = pod.ipv4.octets()[3];
        sys::ip_batch(Some(&self.netns.name), &format!("link delete veth{host}\n"))?;
        pod.netns.delete()
    }

    fn free_host(&self, next: u8) -> Result<u8> {
        let taken = self.netns.enter(|| {
            let dev = std::fs::read_to_string("/proc/thread-self/net/dev")?;
            Ok(dev
                .lines()
                .filter_map(|line| line.split(':').next()?.trim().strip_prefix("veth")?.parse().ok())
                .collect::<Vec<u8>>())
        })?;
        let mut hosts = (next..POD_HOSTS.end).chain(POD_HOSTS.start..next);
        let Some(host) = hosts.find(|host| !taken.contains(host)) else {
            bail!("no free pod address on {}", self.name);
        };
        Ok(host)
    }
}

/// The parent and its nodes in one step.
pub fn create(record: &Record, nodes: &[&str]) -> Result<(Parent, Vec<NodeNet>)> {
    let parent = Parent::create(record).context("cannot make the parent namespace")?;
    let nodes = parent.join(record, nodes).context("cannot make the nodes")?;
    Ok((parent, nodes))
}
