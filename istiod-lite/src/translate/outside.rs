//! What a user names for the mesh to call on its own behalf: where a policy's keys come from, or who is asked to decide. Such a
//! call is made with the caller's network position, so it may not go where only the node or the control plane itself is.

use std::net::IpAddr;

use super::world::MeshSettings;

/// Of the cluster's API, which has the keys of its own tokens.
pub const IS_API: &str = "is the API of the cluster";

/// Why the mesh never calls this host: a name, or an address with or without brackets. Of a name it is the name that is looked
/// at; what it resolves to has to be looked at again, by [`refused_address`], when it is called.
pub fn refused_host(host: &str, mesh: &MeshSettings) -> Option<&'static str> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Some(address) = literal(bare) {
        return refused_address(address);
    }
    let name = bare.trim_end_matches('.').to_ascii_lowercase();
    if name == "localhost" || name.ends_with(".localhost") {
        return Some("is loopback");
    }
    // Under any number of the endings that a Service's name may have.
    let long = format!(".svc.{}", mesh.cluster_domain);
    let short = [&*long, ".svc"].into_iter().find_map(|end| name.strip_suffix(end));
    let short = short.unwrap_or(&name);
    let is_api = short == "kubernetes.default" || name == "kubernetes";
    match short.split_once('.') {
        _ if is_api => Some(IS_API),
        Some((service, namespace)) if namespace == mesh.root_namespace && is_istiod(service) => {
            Some("is the control plane")
        }
        None if is_istiod(short) => Some("is the control plane"),
        _ => None,
    }
}

/// As [`refused_host`], of what a name has resolved to.
pub fn refused_address(address: IpAddr) -> Option<&'static str> {
    match address.to_canonical() {
        address if address.is_loopback() => Some("is loopback"),
        address if address.is_unspecified() || address.is_multicast() => Some("is no host's address"),
        IpAddr::V4(address) if address.is_link_local() => Some("is link-local, as metadata services are"),
        IpAddr::V4(address) if address.octets()[0] == 0 || address.is_broadcast() => Some("is no host's address"),
        // Where a cloud answers in IPv6.
        IpAddr::V6(address) if address.segments() == [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => {
            Some("is a metadata service")
        }
        IpAddr::V6(address) if address.is_unicast_link_local() => Some("is link-local, as metadata services are"),
        _ => None,
    }
}

/// `istiod`, and that of a revision.
fn is_istiod(service: &str) -> bool {
    service == "istiod" || service.starts_with("istiod-")
}

/// An address in any of the ways in which resolvers read one: `127.1`, `0x7f000001` and `017700000001` are loopback.
fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.split_once('%').map_or(host, |(address, _zone)| address);
    if let Ok(address) = bare.parse() {
        return Some(address);
    }
    let number = |part: &str| match (part.strip_prefix("0x").or(part.strip_prefix("0X")), part.strip_prefix('0')) {
        (Some(hex), _) => u32::from_str_radix(hex, 16).ok(),
        (None, Some(octal)) if !octal.is_empty() => u32::from_str_radix(octal, 8).ok(),
        _ => part.parse().ok(),
    };
    let parts: Vec<u32> = bare.trim_end_matches('.').split('.').map(number).collect::<Option<_>>()?;
    let (last, first) = parts.split_last()?;
    let rest = 4_u32.checked_sub(u32::try_from(first.len()).ok()?).filter(|rest| *rest > 0)?;
    let fits = first.iter().all(|part| *part < 256) && u64::from(*last) < 1 << (8 * rest);
    let high = first.iter().enumerate().fold(0, |sum, (index, part)| sum | (part & 0xff) << (24 - 8 * index));
    fits.then(|| IpAddr::V4((high | last).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_nodes_or_the_control_planes_own_is_never_called() {
        let mesh = MeshSettings::default();
        for (host, why) in [
            ("127.0.0.1", "loopback"),
            ("127.1", "loopback"),
            ("0x7f.1", "loopback"),
            ("2130706433", "loopback"),
            ("017700000001", "loopback"),
            ("[::1]", "loopback"),
            ("::ffff:127.0.0.9", "loopback"),
            ("LocalHost.", "loopback"),
            ("keys.localhost", "loopback"),
            ("169.254.169.254", "link-local"),
            ("0xa9fea9fe", "link-local"),
            ("fe80::1%eth0", "link-local"),
            ("::ffff:169.254.169.254", "link-local"),
            ("fd00:ec2::254", "metadata"),
            ("0.0.0.0", "no host's"),
            ("0", "no host's"),
            ("255.255.255.255", "no host's"),
            ("224.0.0.1", "no host's"),
            ("istiod.istio-system.svc", "control plane"),
            ("istiod.istio-system.svc.cluster.local.", "control plane"),
            ("istiod-canary.istio-system", "control plane"),
            ("istiod", "control plane"),
            ("kubernetes.default.svc.cluster.local", "API"),
            ("kubernetes.default", "API"),
        ] {
            assert!(refused_host(host, &mesh).is_some_and(|found| found.contains(why)), "{host}");
        }
        for host in [
            "10.0.0.1",
            "192.0.2.7",
            "[2001:db8::1]",
            "keys.example.com",
            "istiod.example.com",
            "istiod.shop.svc",
            "opa.shop.svc.cluster.local",
            "1.2.3.4.5",
            "256.256.256.256",
            "a.1",
            "",
        ] {
            assert_eq!(refused_host(host, &mesh), None, "{host}");
        }
    }
}
