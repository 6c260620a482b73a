//! Addresses and node ports of Services. The Services themselves are the record of what is taken.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;
use rand::Rng as _;
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult, Cause};
use super::registry::SERVICES;
use super::store::Transaction;

const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;

/// Which family an address or range belongs to, in Kubernetes' spelling.
fn family(is_v4: bool) -> &'static str {
    if is_v4 { "IPv4" } else { "IPv6" }
}

/// Fills in ClusterIPs, families and node ports of a new or changed Service.
///
/// # Errors
/// 422 when a requested address is taken or outside the ranges; 500 when a range is full.
pub fn allocate(tx: &Transaction<'_>, cidrs: &[IpNet], service: &mut Value, old: Option<&Value>) -> ApiResult<()> {
    let name = service["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let invalid = |cause: Cause| ApiError::invalid("", "Service", &name, &[cause]);
    let kind = service["spec"]["type"].as_str().unwrap_or_default().to_owned();
    if kind == "ExternalName" {
        return Ok(());
    }
    keep_from(old, &mut service["spec"]);
    // Looking at all Services is for those that ask for something new.
    if old.is_some_and(|old| old["spec"] == service["spec"]) {
        return Ok(());
    }
    let uid = service["metadata"]["uid"].clone();
    let mut others = tx.objects(SERVICES);
    others.retain(|other| other.value["metadata"]["uid"] != uid);
    families(cidrs, &mut service["spec"]).map_err(invalid)?;
    if service["spec"]["clusterIP"] != "None" {
        let taken: HashSet<IpAddr> = others.iter().flat_map(|o| addresses(&o.value["spec"])).collect();
        cluster_ips(cidrs, &mut service["spec"], &taken).map_err(invalid)?;
    } else {
        service["spec"]["clusterIPs"] = json!(["None"]);
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        let taken = others.iter().flat_map(|o| node_ports(&o.value["spec"])).collect();
        assign_node_ports(&mut service["spec"], taken).map_err(invalid)?;
    }
    Ok(())
}

fn addresses(spec: &Value) -> Vec<IpAddr> {
    spec["clusterIPs"].as_array().into_iter().flatten().filter_map(|ip| ip.as_str()?.parse().ok()).collect()
}

fn node_ports(spec: &Value) -> Vec<u16> {
    let ports = spec["ports"].as_array().into_iter().flatten();
    ports.filter_map(|p| u16::try_from(p["nodePort"].as_u64()?).ok()).collect()
}

/// A replace that leaves out what was allocated keeps it.
fn keep_from(old: Option<&Value>, spec: &mut Value) {
    let Some(old) = old.map(|o| &o["spec"]) else { return };
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        if spec[field].is_null() && !old[field].is_null() {
            spec[field] = old[field].clone();
        }
    }
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        let same = |o: &&Value| o["port"] == port["port"] && o["protocol"] == port["protocol"];
        let before = old["ports"].as_array().into_iter().flatten().find(same);
        if let Some(node_port) = before.and_then(|o| o.get("nodePort")).filter(|_| port["nodePort"].is_null()) {
            port["nodePort"] = node_port.clone();
        }
    }
    for port in spec["ports"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        port.retain(|_, v| !v.is_null());
    }
}

fn families(cidrs: &[IpNet], spec: &mut Value) -> Result<(), Cause> {
    let served: Vec<&str> = cidrs.iter().map(|c| family(c.addr().is_ipv4())).collect();
    let policy = match (&spec["ipFamilyPolicy"], &spec["ipFamilies"]) {
        (Value::String(policy), _) => policy.clone(),
        (_, Value::Array(list)) if list.len() > 1 => "RequireDualStack".into(),
        // An API server of one family stays with it; ours has both by default and says so.
        (_, Value::Array(_)) => "SingleStack".into(),
        _ if served.len() > 1 => "PreferDualStack".into(),
        _ => "SingleStack".into(),
    };
    let mut wanted: Vec<String> = match &spec["ipFamilies"] {
        Value::Array(list) => list.iter().filter_map(|f| f.as_str().map(str::to_owned)).collect(),
        _ => {
            let first = spec["clusterIP"].as_str().and_then(|ip| ip.parse::<IpAddr>().ok());
            vec![first.map_or(served[0], |ip| family(ip.is_ipv4())).to_owned()]
        }
    };
    if let Some(unknown) = wanted.iter().find(|f| !served.contains(&f.as_str())) {
        return Err(Cause::invalid("spec.ipFamilies", &unknown.as_str().into(), "not configured on this cluster"));
    }
    if policy != "SingleStack" {
        for family in &served {
            if !wanted.iter().any(|w| w == family) {
                wanted.push((*family).to_owned());
            }
        }
        if policy == "RequireDualStack" && wanted.len() < 2 {
            return Err(Cause::invalid(
                "spec.ipFamilyPolicy",
                &policy.into(),
                "this cluster is not configured for dual-stack services",
            ));
        }
    } else {
        wanted.truncate(1);
    }
    spec["ipFamilyPolicy"] = policy.into();
    spec["ipFamilies"] = json!(wanted);
    Ok(())
}

fn cluster_ips(cidrs: &[IpNet], spec: &mut Value, taken: &HashSet<IpAddr>) -> Result<(), Cause> {
    let wanted: Vec<String> = match (&spec["clusterIPs"], spec["clusterIP"].as_str()) {
        (Value::Array(list), _) => list.iter().filter_map(|ip| ip.as_str().map(str::to_owned)).collect(),
        (_, Some(ip)) if !ip.is_empty() => vec![ip.to_owned()],
        _ => Vec::new(),
    };
    let mut assigned: Vec<String> = Vec::new();
    for (index, family_name) in spec["ipFamilies"].as_array().into_iter().flatten().enumerate() {
        let range = cidrs.iter().find(|c| *family_name == family(c.addr().is_ipv4()));
        let Some(range) = range else { continue };
        let address = match wanted.get(index) {
            Some(text) => {
                let field = format!("spec.clusterIPs[{index}]");
                let value = Value::from(text.as_str());
                let ip: IpAddr = text.parse().map_err(|_| {
                    Cause::invalid(field.clone(), &value, "must be a valid IP address, or None for headless services")
                })?;
                if !range.contains(&ip) {
                    let detail =
                        format!("failed to allocate IP {ip}: the provided IP is not in the valid range {range}");
                    return Err(Cause::invalid(field, &value, &detail));
                }
                if taken.contains(&ip) {
                    let detail = format!("failed to allocate IP {ip}: provided IP is already allocated");
                    return Err(Cause::invalid(field, &value, &detail));
                }
                ip
            }
            None => free_address(range, taken)
                .ok_or_else(|| Cause::forbidden("spec.clusterIPs", &format!("the range {range} is full")))?,
        };
        assigned.push(address.to_string());
    }
    if let Some(first) = assigned.first() {
        spec["clusterIP"] = first.as_str().into();
    }
    spec["clusterIPs"] = json!(assigned);
    Ok(())
}

/// A free address, never the first two (network, `kubernetes`) or the last (broadcast).
fn free_address(range: &IpNet, taken: &HashSet<IpAddr>) -> Option<IpAddr> {
    let host_bits = u32::from(range.max_prefix_len() - range.prefix_len()).min(24);
    let size = 1u128 << host_bits;
    let offset = |n: u128| -> IpAddr {
        match range.network() {
            IpAddr::V4(base) => IpAddr::V4((u32::from(base) + u32::try_from(n).unwrap_or(0)).into()),
            IpAddr::V6(base) => IpAddr::V6((u128::from(base) + n).into()),
        }
    };
    let usable = size.checked_sub(3).filter(|n| *n > 0)?;
    let start = rand::rng().random_range(0..usable);
    (0..usable).map(|i| offset(2 + (start + i) % usable)).find(|ip| !taken.contains(ip))
}

fn assign_node_ports(spec: &mut Value, mut taken: HashSet<u16>) -> Result<(), Cause> {
    for (index, port) in spec["ports"].as_array_mut().into_iter().flatten().enumerate() {
        let field = format!("spec.ports[{index}].nodePort");
        let number = match port["nodePort"].as_u64().filter(|n| *n != 0) {
            Some(wanted) => {
                let value = Value::from(wanted);
                let wanted = u16::try_from(wanted).ok().filter(|n| NODE_PORTS.contains(n)).ok_or_else(|| {
                    Cause::invalid(field.clone(), &value, "the provided port is not in the valid range 30000-32767")
                })?;
                if taken.contains(&wanted) {
                    return Err(Cause::invalid(field, &value, "provided port is already allocated"));
                }
                wanted
            }
            None => NODE_PORTS
                .clone()
                .find(|n| !taken.contains(n))
                .ok_or_else(|| Cause::forbidden(field, "all node ports are allocated"))?,
        };
        taken.insert(number);
        port["nodePort"] = number.into();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidrs() -> Vec<IpNet> {
        vec!["10.96.0.0/16".parse().unwrap(), "fd00:10:96::/112".parse().unwrap()]
    }

    #[test]
    fn a_full_range_says_so() {
        let range: IpNet = "10.0.0.0/29".parse().unwrap();
        let mut taken = HashSet::new();
        while let Some(ip) = free_address(&range, &taken) {
            assert!(range.contains(&ip) && taken.insert(ip));
        }
        assert_eq!(taken.len(), 5);
    }

    #[test]
    fn both_families_unless_one_is_asked_for() {
        let mut spec = json!({});
        families(&cidrs(), &mut spec).unwrap();
        assert_eq!(spec["ipFamilies"], json!(["IPv4", "IPv6"]));
        let mut single = json!({"ipFamilyPolicy": "SingleStack"});
        families(&cidrs(), &mut single).unwrap();
        assert_eq!(single["ipFamilies"], json!(["IPv4"]));
    }

    #[test]
    fn a_requested_address_must_be_free_and_inside() {
        let taken = HashSet::from(["10.96.0.9".parse().unwrap()]);
        for (ip, ok) in [("10.96.0.8", true), ("10.96.0.9", false), ("10.97.0.1", false), ("x", false)] {
            let mut spec = json!({"clusterIP": ip, "ipFamilies": ["IPv4"]});
            assert_eq!(cluster_ips(&cidrs(), &mut spec, &taken).is_ok(), ok, "{ip}");
        }
    }
}
