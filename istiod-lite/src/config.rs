//! Settings of the control plane: raw environment in, one typed [`Config`] out, with *all* mistakes listed at once.
//! Names are Istio's where one exists. Nothing reads the environment after this.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use mesh::grpc::TokenSource;
use mesh::telemetry::LogFormat;

use crate::auth::TrustedNodeAccounts;
use crate::ca::{self, LeafLifetime};
use crate::deploy::WaypointSettings;
use crate::replica::peers::Credentials;
use crate::translate::allocate::Prefixes;
use crate::translate::world::MeshSettings;
use crate::{leader, serve};

#[derive(Debug, Clone)]
pub struct Config {
    pub mesh: MeshSettings,
    pub serve: serve::Settings,
    pub ca: ca::Settings,
    pub waypoint: WaypointSettings,
    /// Who this is in the election of a leader: no other living process.
    pub identity: String,
    /// What other replicas are asked with.
    pub replica: Credentials,
    pub log_filter: String,
    pub log_format: LogFormat,
    /// From SIGTERM to the end of the process.
    pub drain_deadline: Duration,
}

/// Variables that could not be used, and why.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistakes(pub Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} unusable setting(s):", self.0.len())?;
        self.0.iter().try_for_each(|mistake| write!(f, "\n  {mistake}"))
    }
}

impl std::error::Error for Mistakes {}

impl Config {
    /// # Errors
    /// Every variable of ours whose value cannot be used.
    pub fn from_env(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self, Mistakes> {
        let mut env = Env { vars: vars.into_iter().collect(), mistakes: Vec::new() };
        let defaults = MeshSettings::default();
        let lifetime = LeafLifetime::default();
        let serve_defaults = serve::Settings::default();
        let mesh = MeshSettings {
            cluster_id: env.text("CLUSTER_ID", &defaults.cluster_id),
            trust_domain: env.text("TRUST_DOMAIN", &defaults.trust_domain),
            root_namespace: env.text("POD_NAMESPACE", &defaults.root_namespace),
            cluster_domain: env.text("CLUSTER_DOMAIN", &defaults.cluster_domain),
            excluded_namespaces: env.list("EXCLUDE_NAMESPACES").unwrap_or(defaults.excluded_namespaces),
            allocation: env.allocation(defaults.allocation),
            revision: env.parsed("REVISION").unwrap_or_default(),
        };
        let serve = serve::Settings {
            grpc: env.parsed::<SocketAddr>("ISTIOD_GRPC_ADDR").unwrap_or(serve_defaults.grpc),
            http: env.parsed::<SocketAddr>("ISTIOD_MONITORING_ADDR").unwrap_or(serve_defaults.http),
            webhook: env.parsed::<SocketAddr>("ISTIOD_WEBHOOK_ADDR").unwrap_or(serve_defaults.webhook),
            namespace: mesh.root_namespace.clone(),
            service_account: env.text("SERVICE_ACCOUNT", &serve_defaults.service_account),
            trust_domain: mesh.trust_domain.clone(),
            revision: mesh.revision.clone(),
            custom_host: env.vars.get("ISTIOD_CUSTOM_HOST").cloned().filter(|host| !host.is_empty()),
            trusted_node_accounts: env.parsed::<TrustedNodeAccounts>("CA_TRUSTED_NODE_ACCOUNTS").unwrap_or_default(),
            lifetime: LeafLifetime {
                default: env.duration("DEFAULT_WORKLOAD_CERT_TTL", lifetime.default),
                max: env.duration("MAX_WORKLOAD_CERT_TTL", lifetime.max),
            },
        };
        if serve.lifetime.default > serve.lifetime.max {
            env.mistakes.push("DEFAULT_WORKLOAD_CERT_TTL: longer than MAX_WORKLOAD_CERT_TTL".into());
        }
        let ca = env.ca(ca::Settings::default());
        let log_filter = env.text("RUST_LOG", "info");
        let waypoint = WaypointSettings {
            image: env.text("WAYPOINT_IMAGE", "waypoint"),
            control_plane: env.text(
                "WAYPOINT_CONTROL_PLANE",
                &format!("{}.{}.svc:15012", mesh.revision.named("istiod"), mesh.root_namespace),
            ),
            cluster_id: mesh.cluster_id.clone(),
            trust_domain: mesh.trust_domain.clone(),
            log_filter: env.text("WAYPOINT_LOG", "info"),
        };
        // A container that is restarted goes on as the same; its pod's name is nobody else's.
        let pod = Some(env.text("POD_NAME", "")).filter(|name| !name.is_empty());
        let replica = Credentials {
            token: TokenSource::from_setting(&env.text("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token")),
            namespace: mesh.root_namespace.clone(),
            cluster_id: mesh.cluster_id.clone(),
            pod: pod.clone(),
        };
        let identity = pod.unwrap_or_else(leader::anonymous);
        let log_format = env.parsed::<LogFormat>("LOG_FORMAT").unwrap_or_default();
        let drain_deadline = env.duration("TERMINATION_DRAIN_DURATION", Duration::from_secs(5));
        if !env.mistakes.is_empty() {
            return Err(Mistakes(env.mistakes));
        }
        Ok(Self { mesh, serve, ca, waypoint, identity, replica, log_filter, log_format, drain_deadline })
    }
}

/// Certificates know no year after 9999, and clocks none that are much later.
const LONGEST: Duration = Duration::from_secs(1000 * 366 * 24 * 3600);

struct Env {
    vars: BTreeMap<String, String>,
    mistakes: Vec<String>,
}

impl Env {
    /// An empty value is the same as none.
    fn text(&self, name: &str, default: &str) -> String {
        self.vars.get(name).filter(|value| !value.is_empty()).map_or(default, String::as_str).to_owned()
    }

    /// Names between commas.
    fn list(&self, name: &str) -> Option<BTreeSet<String>> {
        let value = self.vars.get(name).filter(|value| !value.is_empty())?;
        Some(value.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect())
    }

    fn parsed<T: FromStr<Err: fmt::Display>>(&mut self, name: &str) -> Option<T> {
        let value = self.vars.get(name).filter(|value| !value.is_empty())?;
        match value.parse() {
            Ok(parsed) => Some(parsed),
            Err(reason) => {
                self.mistakes.push(format!("{name}={value:?}: {reason}"));
                None
            }
        }
    }

    fn allocation(&mut self, defaults: Prefixes) -> Prefixes {
        let prefixes = Prefixes {
            enabled: self.parsed::<bool>("PILOT_ENABLE_IP_AUTOALLOCATE").unwrap_or(defaults.enabled),
            v4: self.parsed("PILOT_IP_AUTOALLOCATE_IPV4_PREFIX").unwrap_or(defaults.v4),
            v6: self.parsed("PILOT_IP_AUTOALLOCATE_IPV6_PREFIX").unwrap_or(defaults.v6),
        };
        if prefixes.v4.prefix_len() > 30 || prefixes.v6.prefix_len() > 126 {
            self.mistakes.push("PILOT_IP_AUTOALLOCATE_IPV4_PREFIX, _IPV6_PREFIX: no room for addresses".into());
        }
        prefixes
    }

    fn ca(&mut self, defaults: ca::Settings) -> ca::Settings {
        let grace = "CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE";
        let directory = self.vars.get("ROOT_CA_DIR").filter(|value| !value.is_empty());
        let settings = ca::Settings {
            directory: directory.map_or(defaults.directory, Into::into),
            root_ttl: self.duration("CITADEL_SELF_SIGNED_CA_CERT_TTL", defaults.root_ttl),
            root_check: self.duration("CITADEL_SELF_SIGNED_ROOT_CERT_CHECK_INTERVAL", defaults.root_check),
            root_grace_percent: self.parsed(grace).unwrap_or(defaults.root_grace_percent),
            root_check_jitter: self
                .parsed("CITADEL_ENABLE_JITTER_FOR_ROOT_CERT_ROTATOR")
                .unwrap_or(defaults.root_check_jitter),
            staged: self.parsed("CA_STAGED_ROOT_CHANGE").unwrap_or(defaults.staged),
        };
        if settings.root_ttl.is_zero() {
            self.mistakes.push("CITADEL_SELF_SIGNED_CA_CERT_TTL: no time at all".into());
        }
        if settings.root_grace_percent > 99 {
            self.mistakes.push(format!("{grace}: a root would be renewed at each look; 99 at most"));
        }
        settings
    }

    fn duration(&mut self, name: &str, default: Duration) -> Duration {
        let duration = self.parsed::<humantime::Duration>(name).map_or(default, Into::into);
        if duration > LONGEST {
            self.mistakes.push(format!("{name}: more than a thousand years"));
        }
        duration
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vars: &[(&str, &str)]) -> Result<Config, Mistakes> {
        Config::from_env(vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn an_empty_environment_is_istios_defaults() {
        let config = config(&[("UNRELATED", "x")]).unwrap();
        assert_eq!(config.mesh, MeshSettings::default());
        assert_eq!(config.serve.grpc.port(), 15012);
        assert_eq!(config.serve.webhook.port(), 15017);
        assert_eq!(config.waypoint, WaypointSettings::default());
        assert_eq!(config.ca, ca::Settings::default());
    }

    #[test]
    fn a_pods_name_is_who_it_is_and_without_one_everybody_is_somebody_else() {
        assert_eq!(config(&[("POD_NAME", "istiod-1")]).unwrap().identity, "istiod-1");
        assert_ne!(config(&[]).unwrap().identity, config(&[]).unwrap().identity);
    }

    #[test]
    fn waypoints_ask_the_control_plane_of_the_revision_that_deployed_them() {
        let asked = |vars: &[(&str, &str)]| config(vars).unwrap().waypoint.control_plane;
        assert_eq!(asked(&[("REVISION", "")]), asked(&[("REVISION", "default")]));
        assert_eq!(asked(&[("REVISION", "canary")]), "istiod-canary.istio-system.svc:15012");
        assert_eq!(asked(&[("REVISION", "canary"), ("WAYPOINT_CONTROL_PLANE", "other:15012")]), "other:15012");
    }

    #[test]
    fn the_authoritys_settings_have_istios_names() {
        let config = config(&[
            ("ROOT_CA_DIR", "/etc/cacerts"),
            ("CITADEL_SELF_SIGNED_CA_CERT_TTL", "8760h0m0s"),
            ("CITADEL_SELF_SIGNED_ROOT_CERT_CHECK_INTERVAL", "10m"),
            ("CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE", "30"),
            ("CITADEL_ENABLE_JITTER_FOR_ROOT_CERT_ROTATOR", "false"),
            ("CA_STAGED_ROOT_CHANGE", "false"),
        ]);
        let expected = ca::Settings {
            directory: "/etc/cacerts".into(),
            root_ttl: Duration::from_secs(8760 * 3600),
            root_check: Duration::from_secs(600),
            root_grace_percent: 30,
            root_check_jitter: false,
            staged: false,
        };
        assert_eq!(config.unwrap().ca, expected);
    }

    #[test]
    fn excluded_namespaces_are_names_between_commas() {
        let excluded = |value| config(&[("EXCLUDE_NAMESPACES", value)]).unwrap().mesh.excluded_namespaces;
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(excluded("kube-system, legacy,"), names(&["kube-system", "legacy"]));
        assert_eq!(excluded(""), names(&["kube-system"]), "empty is the default");
        assert_eq!(excluded(","), names(&[]), "none at all");
    }

    #[test]
    fn every_mistake_is_listed() {
        let Mistakes(mistakes) = config(&[
            ("ISTIOD_GRPC_ADDR", "nowhere"),
            ("ISTIOD_WEBHOOK_ADDR", "15017"),
            ("DEFAULT_WORKLOAD_CERT_TTL", "soon"),
            ("CA_TRUSTED_NODE_ACCOUNTS", "ztunnel"),
            ("LOG_FORMAT", "xml"),
            ("REVISION", "1.30"),
            ("PILOT_ENABLE_IP_AUTOALLOCATE", "maybe"),
            ("PILOT_IP_AUTOALLOCATE_IPV4_PREFIX", "2001:2::/48"),
            ("PILOT_IP_AUTOALLOCATE_IPV6_PREFIX", "2001:2::1/128"),
            ("CITADEL_SELF_SIGNED_CA_CERT_TTL", "0s"),
            ("CITADEL_SELF_SIGNED_ROOT_CERT_CHECK_INTERVAL", "100000years"),
            ("CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE", "100"),
        ])
        .unwrap_err();
        assert_eq!(mistakes.len(), 12, "{mistakes:?}");
    }
}
