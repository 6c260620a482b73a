//! The servers of a `resolv.conf`, for pods whose DNS comes without the address of the server that was asked.

use std::net::{IpAddr, SocketAddr};

/// Port of DNS.
const PORT: u16 = 53;
/// As many as resolvers take (`MAXNS`).
const MOST: usize = 3;

/// The `nameserver` lines, in their order. What is no address is passed over, as resolvers do; so are link-local IPv6
/// addresses, which mean nothing in another namespace.
#[must_use]
pub fn servers(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let ip: IpAddr = words.next().filter(|word| *word == "nameserver").and(words.next())?.parse().ok()?;
        Some(SocketAddr::new(ip, PORT))
    };
    text.lines().filter_map(address).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_first_three_servers_and_nothing_else() {
        let text = "search shop.svc.cluster.local\n# nameserver 10.0.0.9\nnameserver 10.96.0.10\n  nameserver\tfd00::a \n\
                    nameserver fe80::1%eth0\noptions ndots:5\nnameserver 10.0.0.3 # x\nnameserver 10.0.0.4\nnameserver";
        let expected = ["10.96.0.10:53", "[fd00::a]:53", "10.0.0.3:53"].map(|a| a.parse().unwrap());
        assert_eq!(servers(text), expected);
        assert!(servers("").is_empty());
    }
}
