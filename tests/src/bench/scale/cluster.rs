//! A cluster as its API tells of it, without one: pods behind services, in namespaces and on nodes, as large as in life and as
//! alike as the pods of a Deployment are. Pure: what an object looks like follows from its number.
//!
//! Each pod has a serial number, and its name ends with it, so that whoever hears of a pod knows which event brought it.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

/// Where proxies and control plane live.
pub const SYSTEM: &str = "istio-system";
/// The service account of node proxies.
pub const ZTUNNEL: &str = "ztunnel";
/// In every namespace, with the root certificate.
const ROOT_CERT: &str = "istio-ca-root-cert";
const SERVICES_PER_NAMESPACE: u32 = 10;
/// What a ReplicaSet puts between its Deployment's name and the pod's own.
const TEMPLATE_HASH: &str = "7c9d8f6b5";
const CREATED: &str = "2026-11-01T00:00:00Z";
/// First addresses of pods, of services and of nodes.
const POD_NET: u32 = 0x0a00_0000;
const SERVICE_NET: u32 = 0xac10_0000;
const NODE_NET: u32 = 0xc0a8_0000;
/// More serial numbers than there are addresses make no sense.
pub const SERIALS: u32 = 1 << 24;

/// How large it is. None of the numbers is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Beside the node proxies.
    pub pods: u32,
    pub services: u32,
    /// Each with a node proxy.
    pub nodes: u32,
}

/// Which pod is where. A place is one replica of a service; its pod is replaced by another one in time.
#[derive(Clone, Debug)]
pub struct Cluster {
    size: Size,
    /// The serial number of the pod in each place.
    places: Vec<u32>,
    next_serial: u32,
    next_place: u32,
}

/// A pod, by where it is and which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    pub place: u32,
    pub serial: u32,
}

/// One pod went, another one came, of the same service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replaced {
    pub gone: Pod,
    pub came: Pod,
    pub service: u32,
}

impl Cluster {
    pub fn new(size: Size) -> Self {
        Self { size, places: (0..size.pods).collect(), next_serial: size.pods, next_place: 0 }
    }

    pub fn size(&self) -> Size {
        self.size
    }

    pub fn pod(&self, place: u32) -> Option<Pod> {
        self.places.get(place as usize).map(|serial| Pod { place, serial: *serial })
    }

    /// Replaces the pod that has been there longest. `None` when there are no serial numbers left.
    pub fn replace(&mut self) -> Option<Replaced> {
        let (place, serial) = (self.next_place, self.next_serial);
        let gone = self.pod(place)?;
        // The last addresses are those of node proxies.
        if serial >= SERIALS - self.size.nodes {
            return None;
        }
        self.places[place as usize] = serial;
        self.next_serial += 1;
        self.next_place = (place + 1) % self.size.pods;
        Some(Replaced { gone, came: Pod { place, serial }, service: self.size.service_of(place) })
    }

    /// Names that a proxy knows the pods, the node proxies and the services by.
    pub fn resources(&self) -> impl Iterator<Item = String> + '_ {
        let size = self.size;
        let pods = (0..size.pods).filter_map(move |place| self.pod(place)).map(move |pod| size.workload(pod));
        let proxies = (0..size.nodes).map(|node| format!("Kubernetes//Pod/{SYSTEM}/{}", proxy_name(node)));
        let services = (0..size.services).map(move |service| {
            let namespace = size.namespace_of(service);
            format!("{namespace}/{}.{namespace}.svc.cluster.local", service_name(service))
        });
        pods.chain(proxies).chain(services)
    }

    /// The endpoints of a service as they are now.
    pub fn slice(&self, service: u32, version: u64) -> Value {
        let size = self.size;
        let (name, namespace) = (service_name(service), size.namespace_of(service));
        let pods = size.places_of(service).filter_map(|place| self.pod(place));
        let endpoints: Vec<Value> = pods
            .map(|pod| {
                json!({
                    "addresses": [pod.address().to_string()],
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": node_name(size.node_of(pod.place)),
                    "targetRef": {
                        "kind": "Pod", "namespace": &namespace, "name": size.pod_name(pod), "uid": pod.uid(),
                    },
                    "zone": zone(size.node_of(pod.place)),
                })
            })
            .collect();
        let mut meta = meta(&format!("{name}-x7k2p"), Some(&namespace), &uid(3, service), version);
        meta["generateName"] = format!("{name}-").into();
        meta["labels"] = json!({
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": &name,
        });
        meta["ownerReferences"] = owner("v1", "Service", &name, &uid(2, service));
        json!({
            "metadata": meta,
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        })
    }
}

impl Pod {
    fn address(self) -> Ipv4Addr {
        Ipv4Addr::from(POD_NET + self.serial)
    }

    fn uid(self) -> String {
        uid(1, self.serial)
    }
}

impl Size {
    /// What a proxy that asks for everything is sent.
    pub fn resources(self) -> usize {
        self.pods as usize + self.nodes as usize + self.services as usize
    }

    pub fn namespaces(self) -> u32 {
        self.services.div_ceil(SERVICES_PER_NAMESPACE)
    }

    fn per_service(self) -> u32 {
        self.pods.div_ceil(self.services)
    }

    fn service_of(self, place: u32) -> u32 {
        place / self.per_service()
    }

    fn places_of(self, service: u32) -> impl Iterator<Item = u32> {
        let first = service * self.per_service();
        first..(first + self.per_service()).min(self.pods)
    }

    /// The pods of a service are spread.
    fn node_of(self, place: u32) -> u32 {
        place % self.nodes
    }

    fn namespace_of(self, service: u32) -> String {
        namespace_name(service / SERVICES_PER_NAMESPACE)
    }

    fn pod_name(self, pod: Pod) -> String {
        format!("{}-{TEMPLATE_HASH}-{:06x}", service_name(self.service_of(pod.place)), pod.serial)
    }

    /// The name a proxy knows a pod by.
    fn workload(self, pod: Pod) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace_of(self.service_of(pod.place)), self.pod_name(pod))
    }

    /// A pod that has run for a while and is in the mesh.
    pub fn pod(self, pod: Pod, version: u64) -> Value {
        let service = self.service_of(pod.place);
        let app = service_name(service);
        let mut meta = meta(&self.pod_name(pod), Some(&self.namespace_of(service)), &pod.uid(), version);
        meta["generateName"] = format!("{app}-{TEMPLATE_HASH}-").into();
        meta["labels"] = json!({
            "app": &app, "app.kubernetes.io/name": &app, "app.kubernetes.io/version": "v1", "pod-template-hash": TEMPLATE_HASH,
        });
        meta["annotations"] = json!({
            "ambient.istio.io/redirection": "enabled",
            "prometheus.io/scrape": "true", "prometheus.io/port": "8080", "kubectl.kubernetes.io/restartedAt": CREATED,
        });
        meta["ownerReferences"] = owner("apps/v1", "ReplicaSet", &format!("{app}-{TEMPLATE_HASH}"), &uid(4, service));
        meta["managedFields"] = managed_fields();
        let node = self.node_of(pod.place);
        running(meta, &app, &app, "http", 8080, pod.address(), node)
    }

    /// The proxy of a node.
    pub fn proxy(self, node: u32, version: u64) -> Value {
        let mut meta = meta(&proxy_name(node), Some(SYSTEM), &proxy_uid(node), version);
        meta["generateName"] = "ztunnel-".into();
        meta["labels"] = json!({"app": ZTUNNEL, "controller-revision-hash": "5d4f7c", "pod-template-generation": "1"});
        meta["ownerReferences"] = owner("apps/v1", "DaemonSet", ZTUNNEL, &uid(6, 0));
        meta["managedFields"] = managed_fields();
        // Behind the addresses of all pods there ever may be.
        let address = Ipv4Addr::from(POD_NET + SERIALS - 1 - node);
        running(meta, ZTUNNEL, ZTUNNEL, "stats", 15020, address, node)
    }

    pub fn service(self, service: u32, version: u64) -> Value {
        let app = service_name(service);
        let mut meta = meta(&app, Some(&self.namespace_of(service)), &uid(2, service), version);
        meta["labels"] = json!({"app": &app});
        let address = Ipv4Addr::from(SERVICE_NET + service).to_string();
        json!({
            "metadata": meta,
            "spec": {
                "clusterIP": &address, "clusterIPs": [&address], "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack", "selector": {"app": &app}, "sessionAffinity": "None", "type": "ClusterIP",
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": "http"}],
            },
            "status": {"loadBalancer": {}},
        })
    }
}

/// One of the namespaces that are in the mesh.
pub fn namespace(number: u32, version: u64) -> Value {
    let name = namespace_name(number);
    let mut meta = meta(&name, None, &uid(7, number), version);
    meta["labels"] = json!({"kubernetes.io/metadata.name": &name, "istio.io/dataplane-mode": "ambient"});
    json!({"metadata": meta, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}})
}

/// The one that is not.
pub fn system_namespace(version: u64) -> Value {
    let mut meta = meta(SYSTEM, None, &uid(8, 0), version);
    meta["labels"] = json!({"kubernetes.io/metadata.name": SYSTEM});
    json!({"metadata": meta, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}})
}

/// The root certificate in a namespace; the last number is that of the system's.
pub fn root_cert(size: Size, number: u32, root: &str, version: u64) -> Value {
    let namespace = if number < size.namespaces() { namespace_name(number) } else { SYSTEM.to_owned() };
    let mut meta = meta(ROOT_CERT, Some(&namespace), &uid(9, number), version);
    meta["labels"] = json!({"istio.io/config": "true"});
    json!({"metadata": meta, "data": {"root-cert.pem": root}})
}

pub fn node(number: u32, version: u64) -> Value {
    let name = node_name(number);
    let mut meta = meta(&name, None, &uid(5, number), version);
    meta["labels"] = json!({
        "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "kubernetes.io/hostname": &name,
        "node.kubernetes.io/instance-type": "m5.4xlarge", "topology.kubernetes.io/region": "eu-1",
        "topology.kubernetes.io/zone": zone(number),
    });
    let condition = |kind: &str, status: &str| {
        json!({
            "type": kind, "status": status, "reason": format!("Kubelet{kind}"), "message": "kubelet has posted its status",
            "lastHeartbeatTime": CREATED, "lastTransitionTime": CREATED,
        })
    };
    let address = Ipv4Addr::from(NODE_NET + number).to_string();
    let id = uid(5, number);
    let info = json!({
        "architecture": "amd64", "bootID": &id, "containerRuntimeVersion": "containerd://2.1.4", "kernelVersion": "6.12.0",
        "kubeProxyVersion": "v1.32.0", "kubeletVersion": "v1.32.0", "machineID": &id, "operatingSystem": "linux",
        "osImage": "Debian GNU/Linux 13", "systemUUID": &id,
    });
    json!({
        "metadata": meta,
        "spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"], "providerID": format!("cloud:///eu-1/{name}")},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": &name}],
            "allocatable": {"cpu": "15890m", "memory": "61847Mi", "pods": "110"},
            "capacity": {"cpu": "16", "memory": "64Gi", "pods": "110"},
            "conditions": [
                condition("MemoryPressure", "False"), condition("DiskPressure", "False"), condition("PIDPressure", "False"),
                condition("Ready", "True"),
            ],
            "nodeInfo": info,
        },
    })
}

/// The serial number of the pod that a resource of a proxy is about; `None` for what is no pod of the cluster's.
pub fn serial_of(resource: &str) -> Option<u32> {
    let pod = resource.strip_prefix("Kubernetes//Pod/team-")?;
    let (_, serial) = pod.rsplit_once('-')?;
    u32::from_str_radix(serial, 16).ok()
}

pub fn proxy_name(node: u32) -> String {
    format!("{ZTUNNEL}-{node:05}")
}

pub fn proxy_uid(node: u32) -> String {
    uid(6, node + 1)
}

pub fn node_name(node: u32) -> String {
    format!("node-{node:05}")
}

fn namespace_name(number: u32) -> String {
    format!("team-{number:04}")
}

fn service_name(service: u32) -> String {
    format!("service-{service:05}")
}

fn zone(node: u32) -> &'static str {
    ["eu-1a", "eu-1b", "eu-1c"][node as usize % 3]
}

/// Names one object of one kind.
fn uid(kind: u16, number: u32) -> String {
    format!("{number:08x}-{kind:04x}-4000-8000-0123456789ab")
}

fn meta(name: &str, namespace: Option<&str>, uid: &str, version: u64) -> Value {
    let mut meta =
        json!({"name": name, "uid": uid, "resourceVersion": version.to_string(), "creationTimestamp": CREATED});
    if let Some(namespace) = namespace {
        meta["namespace"] = namespace.into();
    }
    meta
}

fn owner(version: &str, kind: &str, name: &str, uid: &str) -> Value {
    json!([{
        "apiVersion": version, "kind": kind, "name": name, "uid": uid, "controller": true, "blockOwnerDeletion": true,
    }])
}

/// Who has written which field: a quarter of what an API server says of a pod.
fn managed_fields() -> Value {
    let set = |fields: &[&str]| Value::Object(fields.iter().map(|field| (format!("f:{field}"), json!({}))).collect());
    json!([
        {
            "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1", "time": CREATED, "fieldsType": "FieldsV1",
            "fieldsV1": {
                "f:metadata": {"f:annotations": set(&["prometheus.io/port", "prometheus.io/scrape"]), "f:labels": set(&["app", "version"])},
                "f:spec": {"f:containers": {"k:{\"name\":\"app\"}": set(&["env", "image", "imagePullPolicy", "livenessProbe", "name",
                    "ports", "readinessProbe", "resources", "terminationMessagePath", "volumeMounts"])}},
            },
        },
        {
            "manager": "kubelet", "operation": "Update", "apiVersion": "v1", "time": CREATED, "fieldsType": "FieldsV1",
            "subresource": "status",
            "fieldsV1": {"f:status": set(&["conditions", "containerStatuses", "hostIP", "phase", "podIP", "podIPs", "startTime"])},
        },
    ])
}

/// A pod of one container that runs and is ready.
fn running(meta: Value, app: &str, account: &str, port: &str, number: u16, address: Ipv4Addr, node: u32) -> Value {
    let tolerations = ["not-ready", "unreachable"].map(|what| {
        let key = format!("node.kubernetes.io/{what}");
        json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
    });
    json!({
        "metadata": meta,
        "spec": {
            "containers": [container(app, port, number)],
            "volumes": [token_volume()],
            "tolerations": tolerations,
            "dnsPolicy": "ClusterFirst",
            "enableServiceLinks": true,
            "nodeName": node_name(node),
            "preemptionPolicy": "PreemptLowerPriority",
            "priority": 0,
            "restartPolicy": "Always",
            "schedulerName": "default-scheduler",
            "securityContext": {},
            "serviceAccount": account,
            "serviceAccountName": account,
            "terminationGracePeriodSeconds": 30,
        },
        "status": status(app, address, Ipv4Addr::from(NODE_NET + node)),
    })
}

fn container(app: &str, port: &str, number: u16) -> Value {
    let probe = |path: &str| {
        json!({
            "httpGet": {"path": path, "port": port, "scheme": "HTTP"},
            "failureThreshold": 3, "periodSeconds": 10, "successThreshold": 1, "timeoutSeconds": 1,
        })
    };
    json!({
        "env": [
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
            {"name": "LOG_LEVEL", "value": "info"},
            {"name": "DATABASE", "value": "postgres.storage.svc.cluster.local:5432"},
        ],
        "name": "app",
        "image": format!("registry.example.com/{app}:1.2.3"),
        "imagePullPolicy": "IfNotPresent",
        "livenessProbe": probe("/live"),
        "readinessProbe": probe("/ready"),
        "ports": [{"name": port, "containerPort": number, "protocol": "TCP"}],
        "resources": {"limits": {"cpu": "1", "memory": "512Mi"}, "requests": {"cpu": "100m", "memory": "128Mi"}},
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "volumeMounts": [
            {"mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "name": "kube-api-access", "readOnly": true},
        ],
    })
}

/// What every pod has by itself.
fn token_volume() -> Value {
    let namespace = json!({"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}});
    let sources = json!([
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]);
    json!({"name": "kube-api-access", "projected": {"defaultMode": 420, "sources": sources}})
}

fn status(app: &str, address: Ipv4Addr, host: Ipv4Addr) -> Value {
    let conditions = ["Initialized", "Ready", "ContainersReady", "PodScheduled"]
        .map(|kind| json!({"type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": CREATED}));
    let container = json!({
        "containerID": format!("containerd://{}", "5f3c9a1e".repeat(8)),
        "image": format!("registry.example.com/{app}:1.2.3"),
        "imageID": format!("registry.example.com/{app}@sha256:{}", "9d1f27b4".repeat(8)),
        "lastState": {},
        "name": "app",
        "ready": true,
        "restartCount": 0,
        "started": true,
        "state": {"running": {"startedAt": CREATED}},
    });
    json!({
        "conditions": conditions,
        "containerStatuses": [container],
        "hostIP": host.to_string(),
        "hostIPs": [{"ip": host.to_string()}],
        "phase": "Running",
        "podIP": address.to_string(),
        "podIPs": [{"ip": address.to_string()}],
        "qosClass": "Burstable",
        "startTime": CREATED,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use k8s_openapi::api::core::v1;
    use k8s_openapi::api::discovery::v1::EndpointSlice;

    use super::*;

    const SIZE: Size = Size { pods: 25, services: 3, nodes: 4 };

    #[test]
    fn every_pod_has_a_service_and_is_found_again_by_its_name() {
        let cluster = Cluster::new(SIZE);
        let names: BTreeSet<String> = cluster.resources().collect();
        assert_eq!(names.len(), SIZE.resources());
        let serials: BTreeSet<u32> = names.iter().filter_map(|name| serial_of(name)).collect();
        assert_eq!(serials, (0..25).collect());
        let behind: usize = (0..3).map(|service| SIZE.places_of(service).count()).sum();
        assert_eq!(behind, 25);
        assert_eq!(serial_of("Kubernetes//Pod/istio-system/ztunnel-00001"), None);
        assert_eq!(serial_of("team-0000/service-00000.team-0000.svc.cluster.local"), None);
    }

    #[test]
    fn a_pod_is_replaced_by_one_that_never_was() {
        let mut cluster = Cluster::new(SIZE);
        let mut seen: BTreeSet<u32> = (0..25).collect();
        for n in 0..60 {
            let replaced = cluster.replace().unwrap();
            assert_eq!(replaced.gone.place, n % 25, "the oldest first");
            assert!(seen.insert(replaced.came.serial));
            assert_eq!(cluster.pod(replaced.gone.place), Some(replaced.came));
            let slice = cluster.slice(replaced.service, 7).to_string();
            assert!(slice.contains(&replaced.came.uid()) && !slice.contains(&replaced.gone.uid()));
        }
        assert_eq!(cluster.resources().count(), SIZE.resources());
    }

    #[test]
    fn objects_are_what_the_api_would_serve() {
        let cluster = Cluster::new(SIZE);
        let text = SIZE.pod(cluster.pod(24).unwrap(), 5);
        assert!((3000..6000).contains(&text.to_string().len()), "as large as in life: {}", text.to_string().len());
        let pod: v1::Pod = serde_json::from_value(text).unwrap();
        assert_eq!(pod.metadata.namespace.as_deref(), Some("team-0000"));
        let proxy: v1::Pod = serde_json::from_value(SIZE.proxy(3, 5)).unwrap();
        assert_eq!(proxy.spec.unwrap().service_account_name.as_deref(), Some(ZTUNNEL));
        let _: v1::Service = serde_json::from_value(SIZE.service(2, 5)).unwrap();
        let _: v1::Node = serde_json::from_value(node(3, 5)).unwrap();
        let _: v1::Namespace = serde_json::from_value(namespace(0, 5)).unwrap();
        let _: v1::ConfigMap = serde_json::from_value(root_cert(SIZE, 1, "PEM", 5)).unwrap();
        let slice: EndpointSlice = serde_json::from_value(cluster.slice(2, 5)).unwrap();
        assert_eq!(slice.endpoints.len(), 7);
    }
}
