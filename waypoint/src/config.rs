//! Settings: environment and arguments in, one typed [`Config`] out. Names are Istio's where one exists.

use std::net::IpAddr;
use std::time::Duration;

use mesh::grpc::{GrpcConfig, RootCa, TokenSource};
use mesh::settings::{Environment, Mistakes};

/// What the command line asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Run,
    Version,
    Help,
}

/// Shown by `--help`.
pub const USAGE: &str = "\
waypoint: the L7 proxy of the mesh

usage: waypoint [proxy waypoint]    run (settings come from the environment, see README.md)
       waypoint --version           print the version and exit
       waypoint --help              print this and exit";

/// How the access log is written to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessLog {
    Off,
    /// Envoy's default line.
    Text,
    /// The same operators as JSON keys.
    Json,
}

/// The whole of a waypoint's settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub xds: GrpcConfig,
    pub ca: GrpcConfig,
    pub cluster_id: String,
    pub network: String,
    pub trust_domain: String,
    pub pod_name: String,
    pub namespace: String,
    pub service_account: String,
    /// The waypoint's own name: `<gateway>.<namespace>.svc.<domain>` is the service that others bind to.
    pub gateway: String,
    pub cluster_domain: String,
    pub instance_ip: Option<IpAddr>,
    pub node_name: String,
    pub version_tag: String,
    pub worker_threads: usize,
    /// From SIGTERM to the end of the process.
    pub drain_deadline: Duration,
    pub certificate_ttl: Duration,
    pub hbone_port: u16,
    pub admin_port: u16,
    pub stats_port: u16,
    pub readiness_port: u16,
    pub log_filter: String,
    pub log_format: String,
    pub access_log: AccessLog,
    /// Adds the client's address to `x-forwarded-for` on the way to the application.
    pub append_forwarded_for: bool,
}

impl Config {
    /// The hostname that `use-waypoint` bindings name.
    pub fn hostname(&self) -> String {
        format!("{}.{}.svc.{}", self.gateway, self.namespace, self.cluster_domain)
    }

    /// Reads the settings.
    ///
    /// # Errors
    /// Every variable that has no meaning here, at once.
    pub fn from_env(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self, Mistakes> {
        let mut env = Environment::new(vars);
        let cluster_id =
            env.text("ISTIO_META_CLUSTER_ID").or(env.text("CLUSTER_ID")).unwrap_or("Kubernetes").to_owned();
        let plane = |env: &Environment, name: &str| GrpcConfig {
            address: env.string(&format!("{name}_ADDRESS"), "istiod.istio-system.svc:15012"),
            root_ca: RootCa::from_setting(
                &env.string(&format!("{name}_ROOT_CA"), "/var/run/secrets/istio/root-cert.pem"),
            ),
            token: TokenSource::from_setting(&env.string("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token")),
            headers: env.with_prefix(&format!("{name}_HEADER_")).map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
            cluster_id: cluster_id.clone(),
            alt_hostname: env.text(&format!("ALT_{name}_HOSTNAME")).map(str::to_owned),
            dialer: mesh::grpc::Dialer::default(),
        };
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let grace = env.value("TERMINATION_GRACE_PERIOD_SECONDS", 30_u64, "a number of seconds");
        // Leaves the kubelet's SIGKILL a margin, as Istio's node proxy does.
        let drain = if grace > 10 { grace - 5 } else { grace.saturating_sub(1).max(1) };
        let config = Self {
            xds: plane(&env, "XDS"),
            ca: plane(&env, "CA"),
            cluster_id: cluster_id.clone(),
            network: env.string("NETWORK", ""),
            trust_domain: env.string("TRUST_DOMAIN", "cluster.local"),
            pod_name: env.required("POD_NAME", "the waypoint's own pod"),
            namespace: env.required("POD_NAMESPACE", "the waypoint's own namespace"),
            service_account: env.required("SERVICE_ACCOUNT", "it becomes the waypoint's identity"),
            gateway: env.required("GATEWAY_NAME", "the Gateway this waypoint was deployed for"),
            cluster_domain: env.string("CLUSTER_DOMAIN", "cluster.local"),
            instance_ip: env.parse("INSTANCE_IP", None, "an IP address", |v| v.parse().ok().map(Some)),
            node_name: env.string("NODE_NAME", ""),
            version_tag: env.string("ISTIO_META_ISTIO_VERSION", env!("CARGO_PKG_VERSION")),
            worker_threads: env.parse("WAYPOINT_WORKER_THREADS", cores, "a number of threads above 0", |v| {
                v.parse().ok().filter(|n| *n > 0)
            }),
            drain_deadline: env.duration("CONNECTION_TERMINATION_DEADLINE", Duration::from_secs(drain)),
            certificate_ttl: env.duration("SECRET_TTL", Duration::from_secs(24 * 3600)),
            hbone_port: env.value("HBONE_PORT", 15008, "a port"),
            admin_port: env.value("ADMIN_PORT", 15000, "a port"),
            stats_port: env.value("STATS_PORT", 15020, "a port"),
            readiness_port: env.value("READINESS_PORT", 15021, "a port"),
            log_filter: env.string("RUST_LOG", "info"),
            log_format: env.parse("LOG_FORMAT", "plain".to_owned(), "plain or json", |v| {
                matches!(v, "plain" | "json").then(|| v.to_owned())
            }),
            access_log: env.parse("ACCESS_LOG", AccessLog::Text, "text, json or off", |v| match v {
                "text" => Some(AccessLog::Text),
                "json" => Some(AccessLog::Json),
                "off" => Some(AccessLog::Off),
                _ => None,
            }),
            append_forwarded_for: env.bool("APPEND_X_FORWARDED_FOR", true),
        };
        env.mistakes.into_result(config)
    }
}

/// Parses the arguments after the program name.
///
/// # Errors
/// Every argument that is not understood.
pub fn parse_args(args: impl IntoIterator<Item = String>) -> Result<Command, Mistakes> {
    let mut command = Command::Run;
    let mut mistakes = Mistakes::default();
    for arg in args {
        match arg.as_str() {
            "--version" | "-V" => command = Command::Version,
            "--help" | "-h" => command = Command::Help,
            "proxy" | "waypoint" => {}
            other => mistakes.push(format!("unknown argument {other}; see --help")),
        }
    }
    mistakes.into_result(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_flags_and_bad_values_are_all_named() {
        let mistakes = parse_args(["--bogus", "serve"].map(str::to_owned)).expect_err("mistakes");
        assert_eq!(mistakes.lines().len(), 2);
        let env = [("POD_NAME", "w"), ("POD_NAMESPACE", "shop"), ("SERVICE_ACCOUNT", "w"), ("HBONE_PORT", "many")];
        let mistakes = Config::from_env(env.map(|(k, v)| (k.to_owned(), v.to_owned()))).expect_err("mistakes");
        assert_eq!(
            mistakes.lines(),
            [
                "GATEWAY_NAME is not set: the Gateway this waypoint was deployed for",
                "HBONE_PORT=\"many\" is not a port"
            ]
        );
    }
}
