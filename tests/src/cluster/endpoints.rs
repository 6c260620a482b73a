//! Which pods answer for which service: EndpointSlices, and from the same calculation the forwards of the nodes and the DNS names.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use super::dns::Names;
use super::services::Forward;
use crate::topology::PARENT_V4;

/// Marks the slices that are the lab's.
const MANAGER: &str = "lab";

/// Whether labels satisfy a service's selector; one without selector has no pods of its own.
pub fn selects(selector: Option<&BTreeMap<String, String>>, pod: &core::Pod) -> bool {
    selector
        .is_some_and(|selector| !selector.is_empty() && selector.iter().all(|(k, v)| pod.labels().get(k) == Some(v)))
}

/// Whether the pod's Ready condition holds and it is not on its way out.
pub fn ready(pod: &core::Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// All addresses of a pod.
pub fn addresses(pod: &core::Pod) -> Vec<IpAddr> {
    let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    ips.filter_map(|ip| ip.ip.parse().ok()).collect()
}

fn vips(service: &core::Service) -> Vec<IpAddr> {
    let spec = service.spec.as_ref();
    let all = spec.and_then(|spec| spec.cluster_ips.clone()).unwrap_or_default();
    let one = spec.and_then(|spec| spec.cluster_ip.clone());
    let texts = if all.is_empty() { one.into_iter().collect() } else { all };
    texts.iter().filter_map(|ip| ip.parse().ok()).collect()
}

/// The service whose one endpoint is the API server.
fn is_api(service: &core::Service) -> bool {
    service.name_any() == "kubernetes" && service.namespace().as_deref() == Some("default")
}

/// The port of a pod behind a port of the service.
fn target_port(port: &core::ServicePort, pod: &core::Pod) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
            let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
            ports.find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port)
        }
    }
}

fn protocol(port: &core::ServicePort) -> &'static str {
    if port.protocol.as_deref() == Some("UDP") { "udp" } else { "tcp" }
}

/// What the nodes forward.
pub fn forwards(services: &[core::Service], pods: &[core::Pod]) -> Vec<Forward> {
    let mut forwards = Vec::new();
    for service in services {
        let spec = service.spec.clone().unwrap_or_default();
        let own = |pod: &&core::Pod| {
            pod.namespace() == service.namespace() && selects(spec.selector.as_ref(), pod) && ready(pod)
        };
        let pods: Vec<&core::Pod> = pods.iter().filter(own).collect();
        for (vip, port) in vips(service).into_iter().flat_map(|vip| spec.ports.iter().flatten().map(move |p| (vip, p)))
        {
            let mut endpoints: Vec<SocketAddr> = pods
                .iter()
                .flat_map(|pod| {
                    let target = target_port(port, pod).and_then(|port| u16::try_from(port).ok());
                    let same_family = addresses(pod).into_iter().filter(move |ip| ip.is_ipv4() == vip.is_ipv4());
                    same_family.filter_map(move |ip| Some(SocketAddr::new(ip, target?)))
                })
                .collect();
            endpoints.sort();
            if is_api(service) && vip.is_ipv4() {
                endpoints = vec![SocketAddr::new(PARENT_V4.into(), super::API_PORT)];
            }
            let Ok(number) = u16::try_from(port.port) else { continue };
            forwards.push(Forward { vip: SocketAddr::new(vip, number), protocol: protocol(port), endpoints });
        }
    }
    forwards.sort();
    forwards
}

/// Names of all services; a headless one resolves to its ready pods.
pub fn names(services: &[core::Service], pods: &[core::Pod]) -> Names {
    let mut names = Names::new();
    for service in services {
        let key = format!("{}.{}.svc.cluster.local", service.name_any(), service.namespace().unwrap_or_default());
        let mut addresses = vips(service);
        if addresses.is_empty() {
            let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
            let behind = pods
                .iter()
                .filter(|pod| pod.namespace() == service.namespace() && selects(selector, pod) && ready(pod));
            addresses = behind.flat_map(self::addresses).collect();
        }
        names.insert(key, addresses);
    }
    names
}

/// The slices of one service: one for each family and set of target ports.
pub fn slices(service: &core::Service, pods: &[core::Pod]) -> Vec<discovery::EndpointSlice> {
    let spec = service.spec.clone().unwrap_or_default();
    if spec.selector.as_ref().is_none_or(BTreeMap::is_empty) {
        return Vec::new();
    }
    let mut families = spec.ip_families.clone().unwrap_or_default();
    if families.is_empty() {
        let v6_only = vips(service).first().is_some_and(IpAddr::is_ipv6);
        families.push(if v6_only { "IPv6" } else { "IPv4" }.to_owned());
    }
    let behind: Vec<&core::Pod> = pods
        .iter()
        .filter(|pod| pod.namespace() == service.namespace() && selects(spec.selector.as_ref(), pod))
        .collect();
    let mut slices = Vec::new();
    for family in families {
        let mut groups: BTreeMap<Vec<Option<i32>>, Vec<discovery::Endpoint>> = BTreeMap::new();
        for pod in &behind {
            let address = addresses(pod).into_iter().find(|ip| ip.is_ipv4() == (family == "IPv4"));
            let Some(address) = address else { continue };
            let ports = spec.ports.iter().flatten().map(|port| target_port(port, pod)).collect();
            groups.entry(ports).or_default().push(endpoint(pod, address));
        }
        for (index, (ports, endpoints)) in groups.into_iter().enumerate() {
            slices.push(slice(service, &spec, &family, index, &ports, endpoints));
        }
    }
    slices
}

fn endpoint(pod: &core::Pod, address: IpAddr) -> discovery::Endpoint {
    let ready = ready(pod);
    let terminating = pod.metadata.deletion_timestamp.is_some();
    discovery::Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(discovery::EndpointConditions {
            ready: Some(ready),
            serving: Some(ready),
            terminating: Some(terminating),
        }),
        node_name: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        target_ref: Some(core::ObjectReference {
            kind: Some("Pod".into()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn slice(
    service: &core::Service,
    spec: &core::ServiceSpec,
    family: &str,
    index: usize,
    ports: &[Option<i32>],
    endpoints: Vec<discovery::Endpoint>,
) -> discovery::EndpointSlice {
    let name = service.name_any();
    let ports = spec.ports.iter().flatten().zip(ports).map(|(port, target)| discovery::EndpointPort {
        name: Some(port.name.clone().unwrap_or_default()),
        port: *target,
        protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".into())),
        app_protocol: port.app_protocol.clone(),
    });
    let mut slice = discovery::EndpointSlice {
        address_type: family.to_owned(),
        endpoints,
        ports: Some(ports.collect()),
        ..Default::default()
    };
    slice.metadata.name = Some(format!("{name}-{}-{index}", family.to_lowercase()));
    slice.metadata.namespace = service.namespace();
    slice.metadata.labels = Some(BTreeMap::from([
        ("kubernetes.io/service-name".into(), name.clone()),
        ("endpointslice.kubernetes.io/managed-by".into(), MANAGER.into()),
    ]));
    slice.metadata.owner_references = Some(vec![super::workloads::owner("v1", "Service", &name, service.uid())]);
    slice
}

/// Makes the API's slices of one service those that were calculated.
pub async fn publish(client: &Client, service: &core::Service, wanted: &[discovery::EndpointSlice]) -> Result<()> {
    let namespace = service.namespace().unwrap_or_default();
    let api: Api<discovery::EndpointSlice> = Api::namespaced(client.clone(), &namespace);
    let ours =
        format!("kubernetes.io/service-name={},endpointslice.kubernetes.io/managed-by={MANAGER}", service.name_any());
    for old in api.list(&ListParams::default().labels(&ours)).await? {
        if wanted.iter().all(|slice| slice.metadata.name != old.metadata.name) {
            super::workloads::ignore_missing(api.delete(&old.name_any(), &DeleteParams::default()).await)?;
        }
    }
    for slice in wanted {
        let name = slice.name_any();
        if api.get_opt(&name).await?.is_some() {
            let patch = json!({"endpoints": slice.endpoints, "ports": slice.ports, "metadata": {"labels": slice.metadata.labels}});
            api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        } else {
            api.create(&Default::default(), slice).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, ip: &str, ready: bool) -> core::Pod {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "shop", "labels": {"app": "server"}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}
        }))
        .expect("a pod")
    }

    fn service() -> core::Service {
        serde_json::from_value(json!({
            "metadata": {"name": "server", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.9", "selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": "web"}]}
        }))
        .expect("a service")
    }

    #[test]
    fn only_ready_pods_get_traffic_but_all_are_listed() {
        let pods = [pod("a", "10.244.1.10", true), pod("b", "10.244.2.10", false)];
        let forwards = forwards(&[service()], &pods);
        assert_eq!(forwards[0].endpoints, ["10.244.1.10:8080".parse().expect("an address")]);
        let slices = slices(&service(), &pods);
        let ready: Vec<_> = slices[0].endpoints.iter().map(|e| e.conditions.as_ref().and_then(|c| c.ready)).collect();
        assert_eq!(ready, [Some(true), Some(false)]);
        assert_eq!(slices[0].ports.as_ref().map(|ports| ports[0].port), Some(Some(8080)));
    }
}
