//! Which workload of the mesh is ours: found by name or by address, and believed only if it is of our namespace and
//! service account, because a certificate for another identity would not be had anyway.

use std::net::IpAddr;
use std::sync::Arc;

use mesh::model::Workload;
use mesh::store::Snapshot;
use thiserror::Error;

use crate::config::{Config, Dedicated};
use crate::node::enrolment::{Dns, Enrolment};
use crate::node::netns::Netns;

/// Why nothing is served (yet).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NotFound {
    #[error(
        "the control plane knows no workload {0} (is there a pod or WorkloadEntry of that name? WORKLOAD_UID and \
         INSTANCE_IP find one of another name)"
    )]
    Unknown(String),
    #[error(
        "workload {uid} runs as {found} and not as {wanted}, which is what PROXY_WORKLOAD_INFO or POD_NAMESPACE and \
         SERVICE_ACCOUNT say"
    )]
    SomebodyElse { uid: Arc<str>, found: String, wanted: String },
    #[error("none of the addresses of workload {uid} ({addresses}) is configured here; it cannot be captured")]
    NotHere { uid: Arc<str>, addresses: String },
}

/// What the manager needs to know of our workload.
///
/// # Errors
/// [`NotFound`]; the next change may cure it.
pub fn enrolment(world: &Snapshot, config: &Config, settings: &Dedicated) -> Result<Enrolment, NotFound> {
    let workload = find(world, config, settings)?;
    let here = |ip: &IpAddr| Netns::own().and_then(|own| own.holds_any(std::slice::from_ref(ip))).unwrap_or(false);
    let addresses = own_addresses(workload, config.instance_ip, here);
    if addresses.is_empty() {
        let known: Vec<String> = workload.addresses.iter().map(ToString::to_string).collect();
        return Err(NotFound::NotHere { uid: workload.uid.clone(), addresses: known.join(", ") });
    }
    Ok(Enrolment {
        uid: workload.uid.to_string(),
        epoch: 0,
        name: config.pod_name.as_str().into(),
        namespace: workload.namespace.clone(),
        service_account: workload.service_account.clone(),
        workload_uid: workload.uid.clone(),
        addresses,
        failure: settings.failure,
        inbound: settings.inbound,
        dns: Dns::Capture,
        excluded: Vec::new(),
        excluded_ports_to: Vec::new(),
        excluded_ports_at: settings.excluded_inbound_ports.clone(),
        probe_ports: Vec::new(),
    })
}

/// By the name that was given or the two usual ones, else by our address.
fn find<'a>(world: &'a Snapshot, config: &Config, settings: &Dedicated) -> Result<&'a Arc<Workload>, NotFound> {
    let (namespace, name) = (&config.pod_namespace, &config.pod_name);
    let uids = match &settings.workload_uid {
        Some(uid) => vec![uid.clone()],
        None => ["/Pod", "networking.istio.io/WorkloadEntry"]
            .map(|kind| format!("{}/{kind}/{namespace}/{name}", config.cluster_id))
            .to_vec(),
    };
    let by_address = || config.instance_ip.and_then(|ip| world.workload_by_ip(&config.network, ip));
    let found = uids.iter().find_map(|uid| world.workload(uid)).or_else(by_address);
    let workload = found.ok_or_else(|| NotFound::Unknown(uids.join(" or ")))?;
    if *workload.namespace != **namespace || *workload.service_account != *config.service_account {
        return Err(NotFound::SomebodyElse {
            uid: workload.uid.clone(),
            found: format!("{}/{}", workload.namespace, workload.service_account),
            wanted: format!("{namespace}/{}", config.service_account),
        });
    }
    Ok(workload)
}

/// Those of the workload's addresses that are configured here, our own one first. Loopback is never captured.
fn own_addresses(workload: &Workload, instance: Option<IpAddr>, here: impl Fn(&IpAddr) -> bool) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for ip in instance.iter().chain(workload.addresses.iter()) {
        if !addresses.contains(ip) && !ip.is_loopback() && here(ip) {
            addresses.push(*ip);
        }
    }
    addresses
}

#[cfg(test)]
mod tests {
    use mesh::store::{Store, Update};

    use super::*;
    use crate::config::Mode;

    fn config(more: &[(&str, &str)]) -> (Config, Dedicated) {
        let base = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "shop/vm-1/billing")];
        let vars = base.iter().chain(more).map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let config = Config::from_env(vars).expect("settings");
        let Mode::Dedicated(settings) = config.mode.clone() else { panic!("dedicated") };
        (config, settings)
    }

    fn world(workloads: &[(&str, &str, &str)]) -> Arc<Snapshot> {
        let mut yaml = String::from("workloads:\n");
        for (uid, account, ip) in workloads {
            yaml += &format!(
                "- {{uid: \"{uid}\", name: x, namespace: shop, serviceAccount: {account}, workloadIps: [\"{ip}\", \"127.0.0.1\"]}}\n"
            );
        }
        let mut update = Update::new();
        for workload in mesh::xds::local::parse(&yaml).expect("a file").workloads {
            update.push_workload(workload);
        }
        let store = Store::new();
        store.apply(update);
        store.snapshot()
    }

    fn uid_of(world: &Snapshot, (config, settings): &(Config, Dedicated)) -> Result<String, NotFound> {
        find(world, config, settings).map(|w| w.uid.to_string())
    }

    #[test]
    fn the_workload_is_a_pod_or_a_workload_entry_or_has_our_address() {
        const POD: &str = "Kubernetes//Pod/shop/vm-1";
        const ENTRY: &str = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm-1";
        let pod = world(&[(POD, "billing", "192.0.2.1")]);
        assert_eq!(uid_of(&pod, &config(&[])).as_deref(), Ok(POD));
        let entry = world(&[(ENTRY, "billing", "192.0.2.1")]);
        assert_eq!(uid_of(&entry, &config(&[])).as_deref(), Ok(ENTRY));
        let other = world(&[("Kubernetes/networking.istio.io/WorkloadEntry/shop/another", "billing", "192.0.2.7")]);
        assert!(matches!(uid_of(&other, &config(&[])), Err(NotFound::Unknown(_))));
        assert!(uid_of(&other, &config(&[("INSTANCE_IP", "192.0.2.7")])).is_ok(), "by address");
        let named = config(&[("WORKLOAD_UID", "Kubernetes/networking.istio.io/WorkloadEntry/shop/another")]);
        assert!(uid_of(&other, &named).is_ok(), "by the name that was given");
    }

    #[test]
    fn a_workload_of_another_account_is_not_ours_whatever_its_name_and_address() {
        let world = world(&[("Kubernetes//Pod/shop/vm-1", "admin", "192.0.2.1")]);
        let found = uid_of(&world, &config(&[("INSTANCE_IP", "192.0.2.1")]));
        assert!(matches!(found, Err(NotFound::SomebodyElse { .. })), "{found:?}");
    }

    #[test]
    fn only_addresses_that_are_here_are_captured() {
        let world = world(&[("Kubernetes//Pod/shop/vm-1", "billing", "192.0.2.1")]);
        let (config, settings) = config(&[]);
        let elsewhere = enrolment(&world, &config, &settings);
        assert!(matches!(elsewhere, Err(NotFound::NotHere { .. })), "{elsewhere:?}");
        let workload = find(&world, &config, &settings).expect("known");
        let instance = "192.0.2.9".parse().expect("an address");
        let all = own_addresses(workload, Some(instance), |_| true);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0], instance, "our own one first");
    }
}
