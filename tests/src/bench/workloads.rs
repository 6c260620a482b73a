//! What a ztunnel needs to know a mesh: memory at rest and at its peak, and the time until it is ready, by the number of workloads.
//! Its control plane is a gRPC server of this process that says all at once what istiod would.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_proto::ads::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use mesh_proto::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_proto::workload::{ADDRESS_TYPE, Address, NetworkAddress, Port, PortList, Service, Workload, address};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::interrupt::Interrupt;
use super::usage;
use crate::local;
use crate::raw::{Lab, Node};

/// Longest that a ztunnel may take to get ready.
const READY: Duration = Duration::from_secs(60);
/// After that it is at rest: what was only needed to get ready has been given back, if it ever is. ztunnel looks every five
/// seconds whether there is time for it, and has been busy the first time.
const REST: Duration = Duration::from_secs(12);
const WORKLOADS_PER_SERVICE: usize = 10;
const WORKLOADS_PER_NODE: usize = 100;
const SERVICES_PER_NAMESPACE: usize = 10;

/// A ztunnel that knows so many workloads.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub rest_mib: f64,
    pub peak_mib: f64,
    pub ready_s: f64,
}

/// Starts a ztunnel, tells it of `workloads` and looks at it.
///
/// # Errors
/// When it does not get ready; what it said is part of the error.
pub fn measure(ztunnel: &Path, workloads: usize, interrupt: &Interrupt) -> Result<Known> {
    let lab = Lab::up("bench-known")?;
    let node = lab.node("node-a");
    let plane = Plane::serve(node, mesh(workloads))?;
    let ca = lab.scratch("ca")?;
    local::write_ca(&ca)?;
    let shown = |path: &Path| path.display().to_string();
    let env = [
        ("NODE_NAME", node.net.name.clone()),
        ("XDS_ADDRESS", format!("http://127.0.0.1:{}", plane.port)),
        ("AUTH_TOKEN", String::new()),
        ("LOCAL_CA_DIR", shown(&ca)),
        ("CGROUP_ROOT", shown(&node.cgroup)),
        ("HOST_NETNS", "/proc/self/ns/net".to_owned()),
        ("BPFFS_DIR", shown(&node.bpffs)),
        ("ZTUNNEL_WORKER_THREADS", "2".to_owned()),
    ];
    let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let argv = local::unlimited(&[&shown(ztunnel)]);
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let started = Instant::now();
    let mut process = node.spawn("ztunnel", &argv, &env)?;
    let ready = interrupt.until("the ztunnel to be ready", READY, || {
        if !process.running() {
            bail!("it has ended:\n{}", process.output());
        }
        Ok(local::answers_ready(node, 15021).then(|| started.elapsed()))
    })?;
    rest(interrupt)?;
    let system = node.cgroup.join("system");
    let rest = usage::resident_kib(&system)?;
    let peak = usage::processes(&system)?.into_iter().map(peak_kib).sum::<Result<u64>>()?;
    let answer = local::http(node, 15020, "/metrics")?;
    if !answer.contains("istio_xds_message_total") {
        bail!("it has not heard of the mesh");
    }
    Ok(Known { rest_mib: rest as f64 / 1024.0, peak_mib: peak as f64 / 1024.0, ready_s: ready.as_secs_f64() })
}

/// Waits until what was only needed to get ready has been given back.
///
/// # Errors
/// When the user does not want to wait.
pub fn rest(interrupt: &Interrupt) -> Result<()> {
    let end = Instant::now() + REST;
    interrupt.until("the proxies to rest", REST * 2, || Ok((Instant::now() > end).then_some(())))
}

fn peak_kib(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in status")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// A mesh as istiod describes it: pods behind services, ten to one, in namespaces and on nodes.
fn mesh(workloads: usize) -> Vec<Resource> {
    let mut resources = Vec::new();
    let services = workloads.div_ceil(WORKLOADS_PER_SERVICE);
    let namespace_of = |service: usize| format!("team-{:04}", service / SERVICES_PER_NAMESPACE);
    let name_of = |service: usize| format!("service-{service:05}");
    let host_of = |service: usize| format!("{}.{}.svc.cluster.local", name_of(service), namespace_of(service));
    for n in 0..services {
        let ports = vec![Port { service_port: 80, target_port: 8080, ..Port::default() }];
        let vip = Ipv4Addr::from(0x0a60_0000 + u32::try_from(n).expect("a small number"));
        let service = Service {
            name: name_of(n),
            namespace: namespace_of(n),
            hostname: host_of(n),
            addresses: vec![NetworkAddress { address: vip.octets().to_vec().into(), ..NetworkAddress::default() }],
            ports,
            canonical: true,
            ..Service::default()
        };
        let name = format!("{}/{}", service.namespace, service.hostname);
        resources.push(resource(name, address::Type::Service(service)));
    }
    for n in 0..workloads {
        let of = n / WORKLOADS_PER_SERVICE;
        let (namespace, app) = (namespace_of(of), name_of(of));
        let name = format!("{app}-7c9d8f6b5-{n:05x}");
        let ip = Ipv4Addr::from(0x0ac8_0000 + u32::try_from(n).expect("a small number"));
        let ports = PortList { ports: vec![Port { service_port: 80, target_port: 8080, ..Port::default() }] };
        let workload = Workload {
            uid: format!("Kubernetes//Pod/{namespace}/{name}"),
            namespace: namespace.clone(),
            addresses: vec![ip.octets().to_vec().into()],
            tunnel_protocol: 1,
            service_account: app.clone(),
            node: format!("node-{:04}", n / WORKLOADS_PER_NODE),
            canonical_name: app.clone(),
            canonical_revision: "v1".to_owned(),
            workload_type: 2,
            workload_name: app.clone(),
            cluster_id: "Kubernetes".to_owned(),
            services: [(format!("{namespace}/{}", host_of(of)), ports)].into(),
            name,
            ..Workload::default()
        };
        resources.push(resource(workload.uid.clone(), address::Type::Workload(workload)));
    }
    resources
}

fn resource(name: String, content: address::Type) -> Resource {
    let value = Address { r#type: Some(content) }.encode_to_vec();
    let version = format!("{:016x}", (value.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let any = prost_types::Any { type_url: ADDRESS_TYPE.to_owned(), value };
    Resource { name, version, resource: Some(any), ..Resource::default() }
}

/// The control plane. It is told what to say once, and ends with its value.
struct Plane {
    port: u16,
    _runtime: tokio::runtime::Runtime,
}

/// What is said, until it has been.
struct Once(Arc<Mutex<Vec<Resource>>>);

impl Plane {
    fn serve(node: &Node, mesh: Vec<Resource>) -> Result<Self> {
        let listener = node.net.netns.enter(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let service = AggregatedDiscoveryServiceServer::new(Once(Arc::new(Mutex::new(mesh))));
        let server = tonic::transport::Server::builder().add_service(service);
        // Ends with the runtime.
        runtime.spawn(server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)));
        Ok(Self { port, _runtime: runtime })
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Once {
    type DeltaAggregatedResourcesStream = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outgoing) = mpsc::channel(16);
        let (mut requests, mesh) = (request.into_inner(), self.0.clone());
        // Ends with the stream.
        tokio::spawn(async move {
            let mut answered = BTreeMap::new();
            while let Ok(Some(request)) = requests.message().await {
                if answered.insert(request.type_url.clone(), ()).is_some() {
                    continue;
                }
                let resources = match &*request.type_url {
                    ADDRESS_TYPE => std::mem::take(&mut *mesh.lock().unwrap_or_else(PoisonError::into_inner)),
                    _ => Vec::new(),
                };
                let nonce = answered.len().to_string();
                let type_url = request.type_url;
                let response = DeltaDiscoveryResponse { type_url, nonce, resources, ..Default::default() };
                if responses.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_has_a_service_and_names_are_never_shared() {
        let mesh = mesh(25);
        let names: std::collections::BTreeSet<&str> = mesh.iter().map(|resource| resource.name.as_str()).collect();
        assert_eq!((mesh.len(), names.len()), (28, 28));
        let services = mesh.iter().filter(|resource| resource.name.starts_with("team-")).count();
        assert_eq!(services, 3);
    }
}
