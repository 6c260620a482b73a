//! kube-proxy's part: service addresses become endpoint addresses by DNAT on each node, for what the mesh does not capture.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;

use crate::sys;
use crate::topology::NodeNet;

/// One service address and who answers there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Forward {
    pub vip: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Ready ones, sorted.
    pub endpoints: Vec<SocketAddr>,
}

/// The whole rule set of a node; replacing it is one transaction and leaves open connections alone.
pub fn ruleset(forwards: &[Forward]) -> String {
    let mut script = String::new();
    for family in ["ip", "ip6"] {
        // Declared first, so that deleting it never misses.
        let _ = write!(
            script,
            "table {family} lab {{}}\ndelete table {family} lab\ntable {family} lab {{\n chain services {{\n"
        );
        for forward in forwards.iter().filter(|forward| forward.vip.is_ipv4() == (family == "ip")) {
            rules(&mut script, family, forward);
        }
        script += " }\n chain prerouting { type nat hook prerouting priority -100; jump services; }\n";
        script += " chain output { type nat hook output priority -100; jump services; }\n}\n";
    }
    script
}

fn rules(script: &mut String, family: &str, forward: &Forward) {
    let Forward { vip, protocol, endpoints } = forward;
    for (index, endpoint) in endpoints.iter().enumerate() {
        let left = endpoints.len() - index;
        let chance = if left == 1 { String::new() } else { format!("numgen random mod {left} 0 ") };
        let target = match endpoint.ip() {
            IpAddr::V4(ip) => format!("{ip}:{}", endpoint.port()),
            IpAddr::V6(ip) => format!("[{ip}]:{}", endpoint.port()),
        };
        let _ =
            writeln!(script, "  {family} daddr {} {protocol} dport {} {chance}dnat to {target}", vip.ip(), vip.port());
    }
}

/// Loads a rule set on a node.
pub fn program(node: &NodeNet, ruleset: &str) -> Result<()> {
    let mut command = sys::command("ip");
    sys::feed(command.args(["netns", "exec", &node.netns.name, "nft", "-f", "-"]), ruleset).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_share_connections_evenly() {
        let endpoint = |text: &str| text.parse().expect("an address");
        let forward = Forward {
            vip: endpoint("10.96.0.7:80"),
            protocol: "tcp",
            endpoints: vec![endpoint("10.244.1.10:8080"), endpoint("10.244.2.10:8080")],
        };
        let rules = ruleset(&[forward]);
        assert!(rules.contains("ip daddr 10.96.0.7 tcp dport 80 numgen random mod 2 0 dnat to 10.244.1.10:8080"));
        assert!(rules.contains("ip daddr 10.96.0.7 tcp dport 80 dnat to 10.244.2.10:8080"));
    }
}
