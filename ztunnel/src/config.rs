//! Settings: raw environment and arguments in, one typed [`Config`] out, with *all* mistakes listed at once.
//!
//! Names and meanings are those of Istio's ztunnel where one exists. A known variable that asks for something this
//! ztunnel does not do is a mistake and not ignored: nobody should run with a setting that is read but not kept.
//! Nothing reads the environment after this.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use mesh::grpc::{Dialer, GrpcConfig, RootCa, TokenSource};
use mesh::identity::KeyExchange;
use mesh::settings::Environment;
pub use mesh::settings::Mistakes;
use mesh::telemetry::LogFormat;
use mesh::xds::NodeInfo;

use crate::cni::install::Directories;
use crate::handover::supervisor::SUPERVISOR;
use crate::node::enrolment::{Failure, Inbound};
use crate::{cni, explain};

/// Where bytes of control-plane trust come from.
const DEFAULT_CONTROL_PLANE: &str = "istiod.istio-system.svc:15012";
const DEFAULT_ROOT_CERT: &str = "./var/run/secrets/istio/root-cert.pem";
const DEFAULT_TOKEN: &str = "./var/run/secrets/tokens/istio-token";
const DEFAULT_CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Hybrid nodes mount the v2 hierarchy here; the programs attach to v2 only.
const HYBRID_CGROUP_ROOT: &str = "/sys/fs/cgroup/unified";
const DEFAULT_RUN_DIR: &str = "/var/run/ztunnel";
/// Enough for a pod to be replaced on a slow node; policy cannot be asked in the meantime.
const DEFAULT_ORPHANED_DRAIN: Duration = Duration::from_secs(60);
/// How long connections have to end once nothing new is accepted and no successor came.
const LONGEST_DRAIN: Duration = Duration::from_secs(5);
const DEFAULT_BPFFS_DIR: &str = "/sys/fs/bpf/ztunnel";
/// A node's ztunnel may run on the same kernel; each has its own pins.
const DEDICATED_BPFFS_DIR: &str = "/sys/fs/bpf/ztunnel-dedicated";
pub(crate) const DEFAULT_ADMIN_SOCKET: &str = "/var/run/ztunnel/admin.sock";
/// The metadata service of cloud machines: instance credentials, reachable by link-local address only.
const DEFAULT_EXCLUDED: &str = "169.254.169.254/32";

/// The node's own pods, and the control plane's: without them nobody else's would start either.
const DEFAULT_PASS_NAMESPACES: &str = "kube-system,istio-system";
/// Known variables that make no sense in dedicated mode, and why.
const NOT_DEDICATED: [(&str, &str); 4] = [
    ("DETACHED_DRAIN", "connections of a dedicated ztunnel end with it"),
    ("INPOD_UDS", "a ztunnel of dedicated mode captures its workload by itself"),
    ("ADMIN_PORT", "in dedicated mode the admin server is on a unix socket; ADMIN_SOCKET says where"),
    ("HOST_NETNS", "a ztunnel of dedicated mode knows no namespace but its own"),
];
/// Settings of capture, which mean nothing where it is off.
const ONLY_CAPTURING: [&str; 8] = [
    "EXCLUDED_INBOUND_PORTS",
    "EXCLUDED_PORTS",
    "CGROUP_ROOT",
    "BPFFS_DIR",
    "EXCLUDED_DESTINATIONS",
    "CAPTURE_FAILURE_MODE",
    "BYPASS_INBOUND_CAPTURE",
    "RELEASE_ON_EXIT",
];
const ONLY_DEDICATED: [&str; 8] = [
    "EXCLUDED_INBOUND_PORTS",
    "CAPTURE",
    "PROXY_WORKLOAD_INFO",
    "WORKLOAD_UID",
    "CAPTURE_FAILURE_MODE",
    "BYPASS_INBOUND_CAPTURE",
    "RELEASE_ON_EXIT",
    "ADMIN_SOCKET",
];

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Run,
    /// One call of a container runtime.
    Cni,
    CniInstall,
    CniUninstall,
    /// Take everything of ours off the node.
    Uninstall,
    /// Do nothing until SIGTERM, as the containers of a DaemonSet have to.
    Wait,
    /// Take away what a dedicated ztunnel left in the kernel.
    Release,
    /// Ask the ztunnel that runs here what would happen to a connection; `None`: how to ask.
    Explain(Option<explain::cli::Question>),
    Version,
    Help,
}

/// Shown by `--help`.
pub const USAGE: &str = "\
ztunnel: the node proxy of the mesh

usage: ztunnel [proxy ztunnel]      run (settings come from the environment, see README.md)
       ztunnel cni                  be the CNI plugin for one call (CNI_COMMAND and standard input)
       ztunnel cni install          put the plugin into CNI_BIN_DIR and CNI_CONF_DIR, once
       ztunnel cni uninstall        take it out again, and nothing else
       ztunnel uninstall            take everything of ours off the node, on which no ztunnel may run any more
       ztunnel wait                 do nothing until SIGTERM
       ztunnel release              take away what a ztunnel of dedicated mode left in the kernel (same environment)
       ztunnel explain --from POD --to HOST:PORT   what would happen to a connection, and which rule decides; see its --help
       ztunnel --version            print the version and exit
       ztunnel --help               print this and exit";

/// Parses the arguments after the program name. `proxy ztunnel` is what Istio's DaemonSet passes.
///
/// # Errors
/// Every argument that is not understood.
pub fn parse_args<I: IntoIterator<Item = String>>(args: I) -> Result<Command, Mistakes> {
    let mut args = args.into_iter().peekable();
    if args.next_if(|first| first == "explain").is_some() {
        return explain::cli::parse(args).map(Command::Explain);
    }
    let mut command = Command::Run;
    let mut mistakes = Mistakes::default();
    let mut words = Vec::new();
    for arg in args {
        match arg.as_str() {
            "--version" | "-V" | "version" => command = Command::Version,
            "--help" | "-h" | "help" => command = Command::Help,
            flag if flag.starts_with('-') => mistakes.push(format!("unknown flag {flag}; see --help")),
            _ => words.push(arg),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] | ["proxy" | "ztunnel"] | ["proxy", "ztunnel"] => {}
        ["cni"] => command = Command::Cni,
        ["cni", "install"] => command = Command::CniInstall,
        ["cni", "uninstall"] => command = Command::CniUninstall,
        ["uninstall"] => command = Command::Uninstall,
        ["wait"] => command = Command::Wait,
        ["release"] if command == Command::Run => command = Command::Release,
        other => mistakes.push(format!("unknown argument(s) {:?}; the only form is `proxy ztunnel`", other.join(" "))),
    }
    mistakes.into_result(command)
}

/// Where workload certificates come from.
#[derive(Debug, Clone)]
pub enum CaSource {
    /// The control plane signs, on behalf of pods of this node.
    Remote(GrpcConfig),
    /// This process signs with the key in a directory (`ca-cert.pem`, `ca-key.pem`).
    Directory(PathBuf),
}

/// Whom this ztunnel serves (`PROXY_MODE`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// The pods of a node that the control plane names.
    Shared,
    /// One workload, in whose network namespace this process runs.
    Dedicated(Dedicated),
}

/// Settings of the dedicated mode. Name, namespace and service account of the workload are those of [`Config`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dedicated {
    /// Name of the Workload resource, where it is neither a pod's nor a WorkloadEntry's of the usual name.
    pub workload_uid: Option<String>,
    pub capture: Capture,
    pub failure: Failure,
    pub inbound: Inbound,
    /// Where plaintext goes to the application directly, whether or not a ztunnel is alive.
    pub excluded_inbound_ports: Vec<u16>,
    /// An orderly end takes the capture away, as `ztunnel release` does; a crash never does.
    pub release_on_exit: bool,
    /// The admin server listens here: every process of the namespace can reach a loopback port.
    pub admin_socket: PathBuf,
}

/// How the workload's connections come to a dedicated ztunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capture {
    /// By our programs.
    Ebpf,
    /// Not at all: peers dial port 15008, and who wants more redirects to 15001, 15006 and 15053.
    Off,
}

/// The whole of ztunnel's settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub mode: Mode,
    /// xDS server; `None` when only a file feeds this ztunnel.
    pub xds: Option<GrpcConfig>,
    pub ca: CaSource,
    /// File with workloads, services, policies and enrolments, re-read when it changes.
    pub local_xds: Option<PathBuf>,
    pub certificate_ttl: Duration,
    /// File of certificate revocation lists, re-read when it changes.
    pub crl: Option<PathBuf>,
    pub key_exchange: KeyExchange,

    pub cluster_id: String,
    pub cluster_domain: String,
    pub network: String,
    pub trust_domain: String,
    pub node_name: String,
    pub pod_name: String,
    pub pod_namespace: String,
    pub service_account: String,
    /// Our own address, where the downward API gave one.
    pub instance_ip: Option<IpAddr>,
    pub version_tag: String,
    /// `ISTIO_META_*` and `ISTIO_METAJSON_*` of the environment, sent to the control plane.
    pub node_metadata: BTreeMap<String, serde_json::Value>,

    pub worker_threads: usize,
    /// Total time from SIGTERM to the end of the process.
    pub termination_deadline: Duration,
    /// The part of it that remains for open connections once accepting has stopped.
    pub drain_deadline: Duration,
    /// Off: enrolled pods are not served over IPv6, and as policy could not be asked, connections to and from them are refused.
    pub ipv6: bool,
    /// Pods' DNS is captured, unless a pod asked otherwise.
    pub dns_capture: bool,
    /// Whose services win among equals of several namespaces, in DNS only.
    pub preferred_namespace: Option<String>,
    pub response_baggage: bool,
    /// Workloads and services are asked for when they are needed, instead of all being sent.
    pub on_demand: bool,
    /// Two pods of this node are joined inside the process once the tunnel between them is authorized.
    pub same_node_join: bool,
    /// How long a worker looks for the answer to what it has passed on before it sleeps; zero is never.
    pub busy_poll: Duration,
    /// A proxy that takes tunnels with a PROXY header is called on its pod's loopback, not on the pod's address.
    pub localhost_app_tunnel: bool,
    pub log_policy_decisions: bool,
    pub pool_max_streams: usize,
    pub pool_idle: Duration,
    pub stream_window: u32,
    pub connection_window: u32,
    pub frame_size: u32,

    pub admin_port: u16,
    pub stats_port: u16,
    pub readiness_port: u16,
    pub log_filter: String,
    pub log_format: LogFormat,

    /// Socket of Istio's CNI agent, from which pods come then, and which captures them; the settings below mean nothing
    /// in that case.
    pub agent: Option<PathBuf>,
    pub cgroup_root: PathBuf,
    pub bpffs_dir: PathBuf,
    pub proc_root: PathBuf,
    /// Network namespace of the node, from which the kubelet probes.
    pub host_netns: PathBuf,
    pub excluded_destinations: Vec<IpNet>,
    pub cni: CniSettings,
    /// TCP ports that no pod's connections are captured to.
    pub excluded_ports: Vec<u16>,

    /// How long a draining ztunnel may live on without its container; zero: connections end with the container.
    pub detached_drain: Duration,
    /// How long of that without a successor.
    pub orphaned_drain: Duration,
    /// How many ztunnels of the node may be draining at a time; of more the oldest ends.
    pub draining_generations: usize,
    /// Of the node and for root alone: where draining ztunnels and their successors meet.
    pub run_dir: PathBuf,
    /// The process that waits for this one on behalf of the container's runtime.
    pub supervisor: Option<u32>,
}

/// What the CNI plugin has to do with us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniSettings {
    /// Where plugins hand over pods; `None`: nowhere.
    pub socket: Option<PathBuf>,
    /// What is remembered of Kubernetes namespaces for the time when the control plane is silent.
    pub state: PathBuf,
    /// Kubernetes namespaces whose pods never wait for the mesh.
    pub pass_namespaces: Vec<String>,
    /// Where the plugin is installed to; `None`: by others, or not.
    pub install: Option<Directories>,
}

/// What `ztunnel cni install` and `uninstall` need, with defaults for all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniTask {
    pub settings: CniSettings,
    pub directories: Directories,
}

/// What `ztunnel uninstall` needs: where a ztunnel leaves things on its node, with the defaults of [`Config`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UninstallTask {
    pub directories: Directories,
    /// Where draining ztunnels learn that no other one will come.
    pub run_dir: PathBuf,
    pub cgroup_root: PathBuf,
    pub bpffs_dir: PathBuf,
    pub proc_root: PathBuf,
    pub host_netns: PathBuf,
}

impl UninstallTask {
    /// # Errors
    /// As [`Config::from_env`].
    pub fn from_env<I: IntoIterator<Item = (String, String)>>(vars: I) -> Result<Self, Mistakes> {
        let mut raw = Raw(Environment::new(vars));
        let directories = raw.directories();
        let proc_root = PathBuf::from(raw.0.string("PROC_ROOT", "/proc"));
        let host_default = proc_root.join("1/ns/net");
        let task = Self {
            directories,
            run_dir: PathBuf::from(raw.0.string("RUN_DIR", DEFAULT_RUN_DIR)),
            cgroup_root: raw.0.text("CGROUP_ROOT").map_or_else(default_cgroup_root, PathBuf::from),
            bpffs_dir: PathBuf::from(raw.0.string("BPFFS_DIR", DEFAULT_BPFFS_DIR)),
            proc_root,
            host_netns: raw.0.text("HOST_NETNS").map_or(host_default, PathBuf::from),
        };
        raw.0.mistakes.into_result(task)
    }
}

impl CniTask {
    /// # Errors
    /// As [`Config::from_env`].
    pub fn from_env<I: IntoIterator<Item = (String, String)>>(vars: I) -> Result<Self, Mistakes> {
        let mut raw = Raw(Environment::new(vars));
        let directories = raw.directories();
        let settings = raw.cni(cni::DEFAULT_SOCKET);
        raw.0.mistakes.into_result(Self { settings, directories })
    }
}

impl CniSettings {
    fn dump(&self) -> serde_json::Value {
        serde_json::json!({
            "socket": self.socket,
            "state": self.state,
            "passNamespaces": self.pass_namespaces,
            "binDir": self.install.as_ref().map(|d| &d.bin),
            "confDir": self.install.as_ref().map(|d| &d.conf),
        })
    }

    /// Our entry in the node's configuration.
    #[must_use]
    pub fn entry(&self) -> serde_json::Value {
        let socket = self.socket.as_deref().unwrap_or(Path::new(cni::DEFAULT_SOCKET));
        cni::install::entry(socket, &self.state, &self.pass_namespaces)
    }
}

impl Mode {
    /// Is this a dedicated ztunnel that captures nothing?
    #[must_use]
    pub const fn is_capture_off(&self) -> bool {
        matches!(self, Self::Dedicated(Dedicated { capture: Capture::Off, .. }))
    }

    #[must_use]
    pub const fn dedicated(&self) -> Option<&Dedicated> {
        match self {
            Self::Shared => None,
            Self::Dedicated(settings) => Some(settings),
        }
    }
}

impl Dedicated {
    fn dump(&self) -> serde_json::Value {
        serde_json::json!({
            "workloadUid": self.workload_uid,
            "capture": match self.capture { Capture::Ebpf => "ebpf", Capture::Off => "off" },
            "captureFailureMode": match self.failure { Failure::Closed => "closed", Failure::Open => "open" },
            "bypassInboundCapture": self.inbound == Inbound::Bypass,
            "excludedInboundPorts": self.excluded_inbound_ports,
            "releaseOnExit": self.release_on_exit,
            "adminSocket": self.admin_socket,
        })
    }
}

impl Config {
    /// Reads the settings from `(name, value)` pairs, usually [`std::env::vars`].
    ///
    /// # Errors
    /// Every variable that has no meaning here, at once.
    pub fn from_env<I: IntoIterator<Item = (String, String)>>(vars: I) -> Result<Self, Mistakes> {
        let vars: Vec<_> = vars.into_iter().collect();
        let metadata = NodeInfo::metadata_from(vars.iter().cloned());
        let mut raw = Raw(Environment::new(vars));
        raw.refuse_what_is_not_done();
        let mut config = raw.config();
        match metadata {
            Ok(metadata) => config.node_metadata = metadata,
            Err(texts) => texts.into_iter().for_each(|t| raw.0.mistakes.push(t)),
        }
        raw.0.mistakes.into_result(config)
    }

    /// The settings as shown in `/config_dump`. Tokens and headers may be credentials: they are named, not shown.
    #[must_use]
    pub fn dump(&self) -> serde_json::Value {
        let plane = |p: &GrpcConfig| {
            serde_json::json!({
                "address": p.address, "root": p.root_ca.to_string(), "serverName": p.alt_hostname,
                "headers": p.headers.iter().map(|(k, _)| k).collect::<Vec<_>>(),
                "token": format!("{:?}", p.token),
            })
        };
        let mut dump = serde_json::json!({
            "xds": self.xds.as_ref().map(plane),
            "ca": match &self.ca {
                CaSource::Remote(p) => plane(p),
                CaSource::Directory(d) => serde_json::json!({ "directory": d }),
            },
            "localXds": self.local_xds,
            "certificateTtl": seconds(self.certificate_ttl),
            "crlPath": self.crl,
            "compliancePolicy": match self.key_exchange {
                KeyExchange::PostQuantumPreferred => "",
                KeyExchange::PostQuantumOnly => "pqc",
            },
            "clusterId": self.cluster_id,
            "clusterDomain": self.cluster_domain,
            "network": self.network,
            "trustDomain": self.trust_domain,
            "localNode": self.node_name,
            "podName": self.pod_name,
            "podNamespace": self.pod_namespace,
            "serviceAccount": self.service_account,
            "instanceIp": self.instance_ip,
            "nodeMetadata": self.node_metadata,
            "numWorkerThreads": self.worker_threads,
            "terminationDeadline": seconds(self.termination_deadline),
            "drainDeadline": seconds(self.drain_deadline),
            "ipv6Enabled": self.ipv6,
            "dnsCapture": self.dns_capture,
            "preferredServiceNamespace": self.preferred_namespace,
            "responseBaggage": self.response_baggage,
            "xdsOnDemand": self.on_demand,
            "sameNodeJoin": self.same_node_join,
            "busyPoll": seconds(self.busy_poll),
            "localhostAppTunnel": self.localhost_app_tunnel,
            "logPolicyDecisions": self.log_policy_decisions,
            "poolMaxStreamsPerConn": self.pool_max_streams,
            "poolUnusedReleaseTimeout": seconds(self.pool_idle),
            "windowSize": self.stream_window,
            "connectionWindowSize": self.connection_window,
            "frameSize": self.frame_size,
            "adminPort": self.admin_port,
            "statsPort": self.stats_port,
            "readinessPort": self.readiness_port,
            "inpodUds": self.agent,
            "cgroupRoot": self.cgroup_root,
            "bpffsDir": self.bpffs_dir,
            "procRoot": self.proc_root,
            "hostNetns": self.host_netns,
            "excludedDestinations": self.excluded_destinations,
            "excludedPorts": self.excluded_ports,
            "detachedDrain": seconds(self.detached_drain),
            "orphanedDrain": seconds(self.orphaned_drain),
            "drainingGenerations": self.draining_generations,
            "runDir": self.run_dir,
        });
        dump["proxyMode"] = match &self.mode {
            Mode::Shared => "Shared",
            Mode::Dedicated(_) => "Dedicated",
        }
        .into();
        dump["dedicated"] = self.mode.dedicated().map(Dedicated::dump).into();
        dump["cni"] = self.cni.dump();
        dump
    }
}

fn seconds(d: Duration) -> String {
    format!("{}s", d.as_secs_f64())
}

/// The environment while it is being read.
struct Raw(Environment);

impl Raw {
    /// As it stands, where set-but-empty means something else than unset.
    fn verbatim(&self, name: &str) -> Option<&str> {
        self.0.with_prefix(name).find(|(rest, _)| rest.is_empty()).map(|(_, value)| value.trim())
    }

    fn refuse_what_is_not_done(&mut self) {
        let no = &["false", "0"];
        let yes = &["true", "1"];
        self.0.only("PROXY_MODE", &["shared", "dedicated"], "it is shared (one ztunnel per node) or dedicated");
        if self.is_dedicated() {
            for (name, why) in NOT_DEDICATED {
                self.0.only(name, &[], why);
            }
        } else {
            for name in ONLY_DEDICATED {
                self.0.only(name, &[], "it belongs to the dedicated mode");
            }
        }
        self.0.only("PROXY_CONFIG", &[], "set the environment variables themselves");
        self.0.only("ENABLE_PROXY", yes, "a ztunnel without a data plane has no purpose");
        self.0.only("INPOD_ENABLED", yes, "pods are always captured in their own network namespace");
        self.0.only("INPOD_PORT_REUSE", yes, "listeners always share their port");
        let agent = self.0.text("INPOD_UDS").is_some();
        for name in ["ISTIO_META_DNS_PROXY_ADDR", "DNS_PROXY_ADDR"] {
            let allowed: &[&str] = if agent { &["localhost:15053", "127.0.0.1:15053"] } else { &[] };
            self.0.only(name, allowed, "there is no address to choose");
        }
        if agent {
            self.0.only("DETACHED_DRAIN", &["0s"], "connections of pods from a CNI agent end with the container");
            let ours = ["CGROUP_ROOT", "BPFFS_DIR", "HOST_NETNS", "PROC_ROOT", "EXCLUDED_DESTINATIONS"];
            for name in ours.into_iter().chain(["CNI_SOCKET", "CNI_BIN_DIR", "CNI_CONF_DIR"]) {
                self.0.only(name, &[], "with INPOD_UDS pods are found and captured by the CNI agent");
            }
        }
        self.0.only("LOCAL_XDS", &[], "name a file with LOCAL_XDS_PATH");
        self.0.only("TLS12_ENABLED", no, "HBONE is TLS 1.3 only");
        let policy = "it is pqc (X25519MLKEM768 only); there is no FIPS-validated cryptography in this program";
        self.0.only("COMPLIANCE_POLICY", &["pqc"], policy);
        self.0.only("UNSTABLE_ENABLE_SOCKS5", no, "there is no SOCKS listener");
        self.0.only("FAKE_CA", no, "use LOCAL_CA_DIR");
        self.0.only("ENABLE_ORIG_SRC", yes, "applications always see the client's address");
        self.0.only("PACKET_MARK", &["1337", "0x539"], "the mark is part of the capture programs");
        self.0.only("KEEPALIVE_ENABLED", yes, "keepalive is what notices a dead node");
        self.0.only("KEEPALIVE_TIME", &["180s", "3m"], "it is fixed at 180s");
        self.0.only("KEEPALIVE_INTERVAL", &["180s", "3m"], "it is fixed at 180s");
        self.0.only("KEEPALIVE_RETRIES", &["9"], "it is fixed at 9");
        self.0.only("USER_TIMEOUT_ENABLED", no, "the TCP user timeout is not set");
    }

    fn config(&mut self) -> Config {
        let local_xds = self.0.text("LOCAL_XDS_PATH").map(PathBuf::from);
        let local_ca = self.0.text("LOCAL_CA_DIR").map(PathBuf::from);
        // With a file for the one and no address for the other there is no control plane to ask.
        let xds = self.control_plane("XDS", local_xds.is_some());
        let ca = match (local_ca, self.control_plane("CA", false)) {
            (Some(dir), _) => CaSource::Directory(dir),
            (None, Some(remote)) => CaSource::Remote(remote),
            (None, None) => {
                self.0.mistakes.push("CA_ADDRESS is empty and LOCAL_CA_DIR is not set: no certificate source");
                CaSource::Directory(PathBuf::new())
            }
        };
        if xds.is_none() && local_xds.is_none() {
            self.0.mistakes.push("XDS_ADDRESS is empty and LOCAL_XDS_PATH is not set: nothing says which pods exist");
        }
        let mode = self.mode();
        let dedicated = mode.dedicated().is_some();
        let [pod_namespace, pod_name, service_account] = self.workload(dedicated);
        let node_name = self.0.string("NODE_NAME", "");
        if node_name.is_empty() && xds.is_some() && !dedicated {
            self.0.mistakes.push("NODE_NAME is not set: it names the node whose pods are served (downward API)");
        }
        let (termination_deadline, drain_deadline) = self.deadlines();
        let cgroup_default = default_cgroup_root();
        let proc_root = PathBuf::from(self.0.string("PROC_ROOT", "/proc"));
        let host_default = proc_root.join("1/ns/net");
        Config {
            mode,
            xds,
            ca,
            local_xds,
            certificate_ttl: self.0.duration("SECRET_TTL", Duration::from_secs(24 * 3600)),
            crl: self.0.text("CRL_PATH").map(PathBuf::from),
            key_exchange: match self.0.text("COMPLIANCE_POLICY") {
                Some(_) => KeyExchange::PostQuantumOnly,
                None => KeyExchange::PostQuantumPreferred,
            },
            cluster_id: self.cluster_id(),
            cluster_domain: self.0.string("CLUSTER_DOMAIN", "cluster.local"),
            network: self.0.string("NETWORK", ""),
            trust_domain: self.0.string("TRUST_DOMAIN", "cluster.local"),
            node_name,
            pod_name,
            pod_namespace,
            service_account,
            instance_ip: self.0.parse("INSTANCE_IP", None, "an IP address", |v| v.parse().ok().map(Some)),
            version_tag: self.0.string("ISTIO_META_ISTIO_VERSION", crate::VERSION),
            node_metadata: BTreeMap::new(),
            worker_threads: self.worker_threads(),
            termination_deadline,
            drain_deadline,
            ipv6: self.0.bool("IPV6_ENABLED", true),
            dns_capture: self.dns_capture(),
            // Istio's spelling.
            preferred_namespace: self.0.text("PREFERED_SERVICE_NAMESPACE").map(str::to_owned),
            response_baggage: self.0.bool("ENABLE_RESPONSE_BAGGAGE", true),
            on_demand: self.on_demand(),
            same_node_join: self.0.bool("SAME_NODE_JOIN", true),
            busy_poll: self.0.duration_up_to("BUSY_POLL", Duration::from_micros(50), Duration::from_millis(1)),
            localhost_app_tunnel: self.0.bool("LOCALHOST_APP_TUNNEL", true),
            log_policy_decisions: self.0.bool("AUTHZ_POLICY_INFO_LOGGING", false),
            pool_max_streams: self.0.parse("POOL_MAX_STREAMS_PER_CONNECTION", 100, "a number from 1 to 65535", |v| {
                v.parse::<u16>().ok().filter(|n| *n > 0).map(usize::from)
            }),
            pool_idle: self.0.duration("POOL_UNUSED_RELEASE_TIMEOUT", Duration::from_secs(300)),
            stream_window: self.window("HTTP2_STREAM_WINDOW_SIZE", 4 << 20),
            connection_window: self.window("HTTP2_CONNECTION_WINDOW_SIZE", 16 << 20),
            frame_size: self.0.parse("HTTP2_FRAME_SIZE", 1 << 20, "a size from 16384 to 16777215", |v| {
                v.parse().ok().filter(|n| (16384..=16_777_215).contains(n))
            }),
            admin_port: self.0.value("ADMIN_PORT", 15000, "a port"),
            stats_port: self.0.value("STATS_PORT", 15020, "a port"),
            readiness_port: self.0.value("READINESS_PORT", 15021, "a port"),
            log_filter: self.0.string("RUST_LOG", "info"),
            log_format: self.0.value("LOG_FORMAT", LogFormat::Plain, "plain or json"),
            agent: self.0.text("INPOD_UDS").map(PathBuf::from),
            cgroup_root: self.0.text("CGROUP_ROOT").map_or(cgroup_default, PathBuf::from),
            bpffs_dir: PathBuf::from(
                self.0.string("BPFFS_DIR", if dedicated { DEDICATED_BPFFS_DIR } else { DEFAULT_BPFFS_DIR }),
            ),
            proc_root,
            host_netns: self.0.text("HOST_NETNS").map_or(host_default, PathBuf::from),
            excluded_destinations: self.prefixes("EXCLUDED_DESTINATIONS", DEFAULT_EXCLUDED),
            cni: self.cni(""),
            excluded_ports: self.ports("EXCLUDED_PORTS"),
            detached_drain: self.0.duration("DETACHED_DRAIN", Duration::ZERO),
            orphaned_drain: self.0.duration("ORPHANED_DRAIN", DEFAULT_ORPHANED_DRAIN),
            draining_generations: self.0.parse("DRAINING_GENERATIONS", 2, "a number from 1 to 100", |v| {
                v.parse().ok().filter(|n| (1..=100).contains(n))
            }),
            run_dir: PathBuf::from(self.0.string("RUN_DIR", DEFAULT_RUN_DIR)),
            supervisor: self.0.parse(SUPERVISOR, None, "a process", |v| v.parse().ok().map(Some)),
        }
    }

    fn directories(&mut self) -> Directories {
        let bin = PathBuf::from(self.0.string("CNI_BIN_DIR", "/opt/cni/bin"));
        let conf = PathBuf::from(self.0.string("CNI_CONF_DIR", "/etc/cni/net.d"));
        Directories { bin, conf }
    }

    fn cni(&mut self, socket: &str) -> CniSettings {
        let socket = Some(self.0.string("CNI_SOCKET", socket)).filter(|path| !path.is_empty()).map(PathBuf::from);
        let install = match (self.0.text("CNI_BIN_DIR"), self.0.text("CNI_CONF_DIR")) {
            (Some(bin), Some(conf)) => Some(Directories { bin: bin.into(), conf: conf.into() }),
            _ => None,
        };
        if install.is_some() && socket.is_none() {
            self.0
                .mistakes
                .push("CNI_BIN_DIR and CNI_CONF_DIR are set, and CNI_SOCKET is not: plugins would find nobody");
        }
        let mut pass_namespaces: Vec<String> = self
            .0
            .string("CNI_PASS_NAMESPACES", DEFAULT_PASS_NAMESPACES)
            .split(',')
            .map(|name| name.trim().to_owned())
            .filter(|name| !name.is_empty())
            .collect();
        // Our own, or a ztunnel's pod would wait for a ztunnel.
        let own = self.0.string("POD_NAMESPACE", "");
        if !own.is_empty() && !pass_namespaces.contains(&own) {
            pass_namespaces.push(own);
        }
        let state = PathBuf::from(self.0.string("CNI_STATE", cni::DEFAULT_STATE));
        CniSettings { socket, state, pass_namespaces, install }
    }

    fn is_dedicated(&self) -> bool {
        self.0.text("PROXY_MODE").is_some_and(|mode| mode.eq_ignore_ascii_case("dedicated"))
    }

    fn mode(&mut self) -> Mode {
        if !self.is_dedicated() {
            return Mode::Shared;
        }
        let failure = self.0.parse("CAPTURE_FAILURE_MODE", Failure::Closed, "closed or open", |mode| match mode {
            "closed" => Some(Failure::Closed),
            "open" => Some(Failure::Open),
            _ => None,
        });
        let bypass = self.0.bool("BYPASS_INBOUND_CAPTURE", false);
        let capture = self.0.parse("CAPTURE", Capture::Ebpf, "ebpf or off", |mode| match mode {
            "ebpf" => Some(Capture::Ebpf),
            "off" => Some(Capture::Off),
            _ => None,
        });
        if capture == Capture::Off {
            for name in ONLY_CAPTURING {
                self.0.only(name, &[], "with CAPTURE=off nothing is captured");
            }
        }
        Mode::Dedicated(Dedicated {
            workload_uid: self.0.text("WORKLOAD_UID").map(str::to_owned),
            capture,
            failure,
            excluded_inbound_ports: self.ports("EXCLUDED_INBOUND_PORTS"),
            inbound: if bypass { Inbound::Bypass } else { Inbound::Capture },
            release_on_exit: self.0.bool("RELEASE_ON_EXIT", false),
            admin_socket: PathBuf::from(self.0.string("ADMIN_SOCKET", DEFAULT_ADMIN_SOCKET)),
        })
    }

    /// Namespace, name and service account: our own pod's, or in dedicated mode those of the workload, which must be
    /// known and may stand in one variable as Istio's ztunnel wants them.
    fn workload(&mut self, dedicated: bool) -> [String; 3] {
        let own = ["POD_NAMESPACE", "POD_NAME", "SERVICE_ACCOUNT"].map(|name| self.0.string(name, ""));
        if !dedicated {
            return own;
        }
        let info = self.0.parse("PROXY_WORKLOAD_INFO", None, "namespace/name/service-account", |text| {
            let parts: Vec<String> = text.split('/').map(str::to_owned).collect();
            <[String; 3]>::try_from(parts).ok().filter(|parts| parts.iter().all(|part| !part.is_empty())).map(Some)
        });
        let named = info.unwrap_or(own);
        if named.iter().any(String::is_empty) && self.0.text("PROXY_WORKLOAD_INFO").is_none() {
            self.0.mistakes.push(
                "PROXY_MODE=dedicated needs PROXY_WORKLOAD_INFO=namespace/name/service-account, or POD_NAMESPACE, \
                 POD_NAME and SERVICE_ACCOUNT: the workload this ztunnel is for",
            );
        }
        named
    }

    /// `XDS_*` or `CA_*`. An address set to "" turns the part off; one that is not set means the usual control plane,
    /// unless a file takes its place.
    fn control_plane(&mut self, part: &str, replaced: bool) -> Option<GrpcConfig> {
        let name = format!("{part}_ADDRESS");
        let address = match self.verbatim(&name) {
            Some("") => return None,
            Some(address) => address.to_owned(),
            None if replaced => return None,
            None => DEFAULT_CONTROL_PLANE.to_owned(),
        };
        if address.contains(char::is_whitespace) {
            self.0.mistakes.push(format!("{name}={address:?} is not host:port or a URL"));
        }
        let prefix = format!("{part}_HEADER_");
        Some(GrpcConfig {
            address,
            root_ca: RootCa::from_setting(&rooted(&self.0.string(&format!("{part}_ROOT_CA"), DEFAULT_ROOT_CERT))),
            token: TokenSource::from_setting(&rooted(self.verbatim("AUTH_TOKEN").unwrap_or(DEFAULT_TOKEN))),
            headers: self.0.with_prefix(&prefix).map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())).collect(),
            cluster_id: self.cluster_id(),
            alt_hostname: self.0.text(&format!("ALT_{part}_HOSTNAME")).map(str::to_owned),
            dialer: Dialer::default(),
        })
    }

    fn cluster_id(&self) -> String {
        let first = self.0.text("ISTIO_META_CLUSTER_ID").or_else(|| self.0.text("CLUSTER_ID"));
        first.unwrap_or("Kubernetes").to_owned()
    }

    /// Asked for by name are addresses; what needs everything cannot go with it.
    fn on_demand(&mut self) -> bool {
        let on_demand = self.0.bool("XDS_ON_DEMAND", false);
        if on_demand {
            if self.dns_capture() {
                self.0.mistakes.push("XDS_ON_DEMAND=true: most names stay unknown, so DNS_CAPTURE must be false");
            }
            self.0.only("PROXY_MODE", &["shared"], "with XDS_ON_DEMAND only a node's own workloads come unasked");
            self.0.only("LOCAL_XDS_PATH", &[], "with XDS_ON_DEMAND it is the control plane that is asked");
        }
        on_demand
    }

    /// Two names for one setting; the proxy metadata's wins.
    fn dns_capture(&mut self) -> bool {
        let plain = self.0.bool("DNS_CAPTURE", true);
        self.0.bool("ISTIO_META_DNS_CAPTURE", plain)
    }

    fn window(&mut self, name: &str, default: u32) -> u32 {
        self.0.parse(name, default, "a size from 65535 to 2147483647", |v| {
            v.parse().ok().filter(|n| (65_535..=0x7fff_ffff).contains(n))
        })
    }

    /// (total, drain): a pod gets `TERMINATION_GRACE_PERIOD_SECONDS` before it is killed, and a little of that is kept
    /// back for the exit itself. The drain is short beside it: as long as no successor is there, nobody else would take
    /// new connections, while those that are open mostly need a moment or forever.
    fn deadlines(&mut self) -> (Duration, Duration) {
        let grace = self.0.parse("TERMINATION_GRACE_PERIOD_SECONDS", None, "a number of seconds", |v| {
            v.trim_end_matches('s').parse::<u64>().ok().map(Some)
        });
        let total = match grace {
            Some(t) if t > 10 => Duration::from_secs(t - 5),
            Some(t) => Duration::from_secs(t.saturating_sub(1).max(1)),
            None => Duration::from_secs(5),
        };
        let total = self.0.duration("CONNECTION_TERMINATION_DEADLINE", total);
        (total, (total / 4).min(LONGEST_DRAIN))
    }

    /// `ZTUNNEL_WORKER_THREADS`: a number, `N%` of the cores, 0 for all; unset: a quarter of them, at least two,
    /// unless the container's CPU limit or request says otherwise.
    fn worker_threads(&mut self) -> usize {
        let limit = self.0.parse("ZTUNNEL_RESOURCE_CPU_LIMIT", None, "a number of cores", |v| cores(v).map(Some));
        let request = self.0.parse("ZTUNNEL_RESOURCE_CPU_REQUEST", None, "a number of cores", |v| cores(v).map(Some));
        let here = std::thread::available_parallelism().map_or(1, usize::from);
        let hint = self.0.parse("ZTUNNEL_CPU_LIMIT", None, "a number of cores", |v| cores(v).map(Some));
        let all = hint.unwrap_or(here).max(1);
        let request = request.unwrap_or(0);
        let auto = limit.map_or_else(|| (all.div_ceil(4)).max(request).max(2), |l| l.max(request)).max(1);
        self.0.parse("ZTUNNEL_WORKER_THREADS", auto, "a number, a percentage such as 50%, or 0 for all cores", |v| {
            let count = match v.strip_suffix('%') {
                Some(percent) => {
                    let percent: usize = percent.parse().ok().filter(|p| (1..=100).contains(p))?;
                    (all * percent).div_ceil(100)
                }
                None => match v.parse().ok()? {
                    0 => all,
                    n => n,
                },
            };
            (count <= 1024).then_some(count.max(1))
        })
    }

    fn ports(&mut self, name: &str) -> Vec<u16> {
        let text = self.verbatim(name).unwrap_or_default().to_owned();
        let mut ports = Vec::new();
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            match item.parse() {
                Ok(port) if port > 0 => ports.push(port),
                _ => self.0.mistakes.push(format!("{name}: {item:?} is not a port")),
            }
        }
        ports
    }

    fn prefixes(&mut self, name: &str, default: &str) -> Vec<IpNet> {
        // Set but empty means: exclude nothing.
        let text = self.verbatim(name).unwrap_or(default).to_owned();
        let mut prefixes = Vec::new();
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            match item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from)) {
                Ok(net) => prefixes.push(net.trunc()),
                Err(_) => self.0.mistakes.push(format!("{name}: {item:?} is not an address prefix such as 10.0.0.0/8")),
            }
        }
        prefixes
    }
}

/// `2`, `2.5` or `2500m`, rounded up.
fn cores(text: &str) -> Option<usize> {
    let millis = match text.strip_suffix('m') {
        Some(m) => m.parse::<u32>().ok()?,
        None => {
            let cores: f64 = text.parse().ok().filter(|c: &f64| (0.0..=4096.0).contains(c))?;
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded just above")]
            {
                (cores * 1000.0).ceil() as u32
            }
        }
    };
    Some(millis.div_ceil(1000) as usize)
}

/// Istio's charts give paths relative to the root directory.
fn rooted(path: &str) -> String {
    path.strip_prefix("./var/run/").map_or_else(|| path.to_owned(), |rest| format!("/var/run/{rest}"))
}

/// The cgroup2 hierarchy: on hybrid nodes it is beside the v1 controllers. `cgroup.controllers` exists in v2 only.
fn default_cgroup_root() -> PathBuf {
    let hybrid = Path::new(HYBRID_CGROUP_ROOT);
    if hybrid.join("cgroup.controllers").exists() { hybrid.to_owned() } else { PathBuf::from(DEFAULT_CGROUP_ROOT) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(vars: &[(&str, &str)]) -> Result<Config, Mistakes> {
        Config::from_env(vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())))
    }

    #[test]
    fn defaults_need_only_the_node_name() {
        let config = env(&[("NODE_NAME", "a")]).unwrap();
        let xds = config.xds.unwrap();
        assert_eq!(xds.address, DEFAULT_CONTROL_PLANE);
        assert_eq!(xds.token, TokenSource::Path("/var/run/secrets/tokens/istio-token".into()));
        assert_eq!(xds.root_ca, RootCa::Path("/var/run/secrets/istio/root-cert.pem".into()));
        assert_eq!(config.termination_deadline, Duration::from_secs(5));
        assert_eq!((config.admin_port, config.stats_port, config.readiness_port), (15000, 15020, 15021));
        assert_eq!(config.excluded_destinations, vec![DEFAULT_EXCLUDED.parse::<IpNet>().unwrap()]);
    }

    #[test]
    fn an_uninstallation_looks_where_a_ztunnel_leaves_things() {
        let moved = [
            ("PROC_ROOT", "/host/proc"),
            ("RUN_DIR", "/run/z"),
            ("BPFFS_DIR", "/bpf/z"),
            ("CGROUP_ROOT", "/cgroup"),
            ("CNI_SOCKET", "/s"),
            ("CNI_BIN_DIR", "/bin"),
            ("CNI_CONF_DIR", "/conf"),
        ];
        for vars in [&moved[..0], &moved] {
            let config = env(&[&[("NODE_NAME", "a")], vars].concat()).unwrap();
            let vars = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let task = UninstallTask::from_env(vars).unwrap();
            let (bin, conf) = (PathBuf::from("/opt/cni/bin"), PathBuf::from("/etc/cni/net.d"));
            let expected = UninstallTask {
                directories: config.cni.install.unwrap_or(Directories { bin, conf }),
                run_dir: config.run_dir,
                cgroup_root: config.cgroup_root,
                bpffs_dir: config.bpffs_dir,
                proc_root: config.proc_root,
                host_netns: config.host_netns,
            };
            assert_eq!(task, expected);
        }
    }

    #[test]
    fn lists_every_mistake_at_once() {
        let mistakes = env(&[
            ("NODE_NAME", "a"),
            ("ADMIN_PORT", "70000"),
            ("LOG_FORMAT", "xml"),
            ("SECRET_TTL", "soon"),
            ("IPV6_ENABLED", "perhaps"),
            ("EXCLUDED_DESTINATIONS", "10.0.0.0/8,ten"),
            ("EXCLUDED_PORTS", "22,0"),
            ("ZTUNNEL_WORKER_THREADS", "200%"),
        ])
        .unwrap_err();
        for name in [
            "ADMIN_PORT",
            "LOG_FORMAT",
            "SECRET_TTL",
            "IPV6_ENABLED",
            "EXCLUDED_DESTINATIONS",
            "EXCLUDED_PORTS",
            "ZTUNNEL_WORKER_THREADS",
        ] {
            assert!(mistakes.lines().iter().any(|m| m.contains(name)), "{name} missing in {mistakes}");
        }
        assert_eq!(mistakes.lines().len(), 7);
    }

    #[test]
    fn dns_is_captured_unless_told_otherwise() {
        let captured = |vars: &[(&str, &str)]| env(&[&[("NODE_NAME", "a")], vars].concat()).unwrap().dns_capture;
        assert!(captured(&[]));
        assert!(!captured(&[("DNS_CAPTURE", "false")]));
        assert!(captured(&[("DNS_CAPTURE", "false"), ("ISTIO_META_DNS_CAPTURE", "true")]));
        assert!(!captured(&[("ISTIO_META_DNS_CAPTURE", "false")]));
    }

    #[test]
    fn refuses_settings_it_would_not_keep() {
        for (name, value) in [
            ("PROXY_MODE", "dedicated"),
            ("ISTIO_META_DNS_PROXY_ADDR", "localhost:15053"),
            ("COMPLIANCE_POLICY", "fips-140-2"),
            ("COMPLIANCE_POLICY", "cnsa"),
            ("TLS12_ENABLED", "true"),
            ("PACKET_MARK", "7"),
        ] {
            let mistakes = env(&[("NODE_NAME", "a"), (name, value)]).unwrap_err();
            assert!(mistakes.to_string().contains(name), "{mistakes}");
        }
    }

    #[test]
    fn on_demand_goes_with_nothing_that_needs_all_names() {
        let of = |vars: &[(&str, &str)]| env(&[&[("NODE_NAME", "a"), ("XDS_ON_DEMAND", "true")], vars].concat());
        assert!(of(&[("DNS_CAPTURE", "false")]).unwrap().on_demand);
        assert!(!env(&[("NODE_NAME", "a")]).unwrap().on_demand);
        assert!(of(&[]).unwrap_err().to_string().contains("DNS_CAPTURE"));
        for (name, value) in [("LOCAL_XDS_PATH", "/x.yaml"), ("PROXY_MODE", "dedicated")] {
            let mistakes = of(&[("DNS_CAPTURE", "false"), (name, value)]).unwrap_err();
            assert!(mistakes.to_string().contains(name), "{mistakes}");
        }
    }

    #[test]
    fn key_exchange_is_post_quantum_alone_where_that_is_asked_for() {
        let of = |vars: &[(&str, &str)]| env(&[&[("NODE_NAME", "a")], vars].concat()).unwrap().key_exchange;
        assert_eq!(of(&[]), KeyExchange::PostQuantumPreferred);
        assert_eq!(of(&[("COMPLIANCE_POLICY", "")]), KeyExchange::PostQuantumPreferred);
        assert_eq!(of(&[("COMPLIANCE_POLICY", "pqc")]), KeyExchange::PostQuantumOnly);
    }

    #[test]
    fn an_agent_brings_the_pods_and_takes_the_settings_of_capture() {
        let uds = ("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock");
        let config = env(&[("NODE_NAME", "a"), uds, ("ISTIO_META_DNS_PROXY_ADDR", "localhost:15053")]).unwrap();
        assert_eq!(config.agent.as_deref(), Some(Path::new(uds.1)));
        for name in ["BPFFS_DIR", "CGROUP_ROOT", "EXCLUDED_DESTINATIONS", "HOST_NETNS", "PROC_ROOT"] {
            let mistakes = env(&[("NODE_NAME", "a"), uds, (name, "/x")]).unwrap_err();
            assert!(mistakes.to_string().contains(name), "{mistakes}");
        }
    }

    #[test]
    fn needs_a_source_of_pods_and_of_certificates() {
        let mistakes = env(&[("XDS_ADDRESS", ""), ("CA_ADDRESS", "")]).unwrap_err();
        assert_eq!(mistakes.lines().len(), 2);
        let config = env(&[("LOCAL_XDS_PATH", "/x.yaml"), ("LOCAL_CA_DIR", "/ca")]).unwrap();
        assert!(config.xds.is_none());
        assert!(matches!(config.ca, CaSource::Directory(dir) if dir == Path::new("/ca")));
    }

    #[test]
    fn a_plugin_is_not_installed_for_a_socket_that_is_not_there() {
        let node = ("NODE_NAME", "a");
        let directories = [node, ("CNI_BIN_DIR", "/bin-dir"), ("CNI_CONF_DIR", "/conf-dir")];
        assert!(env(&directories).unwrap_err().to_string().contains("CNI_SOCKET"));
        let config = env(&[&directories[..], &[("CNI_SOCKET", "/s"), ("POD_NAMESPACE", "mesh")]].concat()).unwrap();
        assert_eq!(config.cni.pass_namespaces, ["kube-system", "istio-system", "mesh"]);
        assert_eq!(config.cni.install.unwrap().conf, Path::new("/conf-dir"));
        assert_eq!(env(&[node]).unwrap().cni.socket, None, "off unless it is asked for");
    }

    #[test]
    fn deadline_follows_the_grace_period() {
        for (grace, expected) in [("30", 25), ("11", 6), ("10", 9), ("1", 1), ("0", 1)] {
            let config = env(&[("NODE_NAME", "a"), ("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap();
            assert_eq!(config.termination_deadline, Duration::from_secs(expected), "{grace}");
        }
        let both =
            [("NODE_NAME", "a"), ("TERMINATION_GRACE_PERIOD_SECONDS", "30"), ("CONNECTION_TERMINATION_DEADLINE", "7s")];
        assert_eq!(env(&both).unwrap().termination_deadline, Duration::from_secs(7));
    }

    #[test]
    fn worker_threads_take_numbers_and_percentages() {
        let threads = |v| {
            env(&[("NODE_NAME", "a"), ("ZTUNNEL_CPU_LIMIT", "8"), ("ZTUNNEL_WORKER_THREADS", v)])
                .unwrap()
                .worker_threads
        };
        assert_eq!([threads("3"), threads("50%"), threads("0"), threads("1%")], [3, 4, 8, 1]);
        assert_eq!(cores("2500m"), Some(3));
        assert_eq!(cores("lots"), None);
    }

    #[test]
    fn headers_and_metadata_are_collected_by_prefix() {
        let config =
            env(&[("NODE_NAME", "a"), ("XDS_HEADER_X-One", "1"), ("ISTIO_META_ENABLE_HBONE", "true")]).unwrap();
        assert_eq!(config.xds.as_ref().unwrap().headers, vec![("x-one".to_owned(), "1".to_owned())]);
        assert_eq!(config.node_metadata["ENABLE_HBONE"], "true");
        assert!(!config.dump().to_string().contains("\"1\""), "header values may be credentials");
    }

    #[test]
    fn dedicated_mode_names_its_workload_and_its_own_settings() {
        let dedicated = |more: &[(&str, &str)]| env(&[&[("PROXY_MODE", "dedicated")][..], more].concat());
        let config = dedicated(&[("PROXY_WORKLOAD_INFO", "shop/vm-1/billing")]).unwrap();
        assert_eq!((&*config.pod_namespace, &*config.pod_name, &*config.service_account), ("shop", "vm-1", "billing"));
        assert_eq!(config.bpffs_dir, Path::new(DEDICATED_BPFFS_DIR));
        let settings = config.mode.dedicated().unwrap();
        assert_eq!((settings.failure, settings.inbound), (Failure::Closed, Inbound::Capture));
        assert_eq!(settings.admin_socket, Path::new("/var/run/ztunnel/admin.sock"));
        let own = [("POD_NAMESPACE", "shop"), ("POD_NAME", "web-1"), ("SERVICE_ACCOUNT", "web")];
        assert_eq!(dedicated(&own).unwrap().pod_name, "web-1");
        let open = [&own[..], &[("CAPTURE_FAILURE_MODE", "open"), ("BYPASS_INBOUND_CAPTURE", "true")]].concat();
        let settings = dedicated(&open).unwrap().mode;
        let settings = settings.dedicated().unwrap();
        assert_eq!((settings.failure, settings.inbound), (Failure::Open, Inbound::Bypass));
        for bad in [
            &own[1..],
            &[("PROXY_WORKLOAD_INFO", "shop/vm-1")],
            &[("PROXY_WORKLOAD_INFO", "shop//billing")],
            &[&own[..], &[("ADMIN_PORT", "15000")]].concat(),
            &[&own[..], &[("HOST_NETNS", "/proc/1/ns/net")]].concat(),
            &[&own[..], &[("CAPTURE_FAILURE_MODE", "ajar")]].concat(),
            &[&own[..], &[("CAPTURE", "iptables")]].concat(),
            &[&own[..], &[("CAPTURE", "off"), ("CGROUP_ROOT", "/sys/fs/cgroup")]].concat(),
        ] {
            assert_eq!(dedicated(bad).unwrap_err().lines().len(), 1, "{bad:?}");
        }
        for name in ONLY_DEDICATED {
            assert!(env(&[("NODE_NAME", "a"), (name, "x")]).is_err(), "{name} in shared mode");
        }
    }

    #[test]
    fn arguments_of_istios_daemon_set_are_understood() {
        let parse = |args: &[&str]| parse_args(args.iter().map(|s| (*s).to_owned()));
        assert_eq!(parse(&[]), Ok(Command::Run));
        assert_eq!(parse(&["proxy", "ztunnel"]), Ok(Command::Run));
        assert_eq!(parse(&["--version"]), Ok(Command::Version));
        assert_eq!(parse(&["--frobnicate", "--twice"]).unwrap_err().lines().len(), 2);
        assert_eq!(parse(&["cni"]), Ok(Command::Cni));
        assert_eq!(parse(&["cni", "uninstall"]), Ok(Command::CniUninstall));
        assert_eq!(parse(&["uninstall"]), Ok(Command::Uninstall));
        assert_eq!(parse(&["wait"]), Ok(Command::Wait));
        assert!(parse(&["cni", "dance"]).is_err());
        assert!(matches!(parse(&["explain", "--from", "a/b", "--to", "c:1"]), Ok(Command::Explain(Some(_)))));
        assert_eq!(parse(&["release"]), Ok(Command::Release));
        assert!(parse(&["release", "--now"]).is_err() && parse(&["release", "all"]).is_err());
    }
}
