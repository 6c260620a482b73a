//! The small HTTP servers: admin on localhost, or in dedicated mode on a unix socket; metrics and readiness for the
//! kubelet and the scraper.

mod profile;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use http::Method;
use mesh::serve::{AdminServer, json};
use mesh::telemetry::{LogHandle, MetricsHandle};
use mesh::{drain::DrainWatcher, serve::Readiness};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Config, Mode};
use crate::explain;
use crate::handover::follow::Generations;
use crate::node::Registry;
use crate::worker::Shared;

/// What the index says of the admin server's paths.
const ABOUT: [(&str, &str); 7] = [
    ("/explain", "?from=NAMESPACE/POD&amp;to=HOST:PORT: what would happen to that connection, and which rule decides"),
    (
        "/config_dump",
        "what this ztunnel knows: workloads, services, policies, certificates, pods and their connections, settings",
    ),
    (
        "/logging",
        "?level=LEVEL or ?level=TARGET=LEVEL,... adds to the log filter, ?reset takes it back; alone it shows the filter",
    ),
    ("/quitquitquit", "drain and end"),
    ("/debug/pprof/profile", "a CPU profile for pprof; ?seconds=1-300 (10), &amp;frequency=1-1000 (100)"),
    ("/debug/pprof/heap", "not in this build"),
    ("/debug/pprof/heap/profiling", "not in this build"),
];

/// What the servers show.
pub struct Deps {
    pub shared: Shared,
    pub registry: Arc<Registry>,
    pub readiness: Readiness,
    pub metrics: MetricsHandle,
    pub log: LogHandle,
    pub generations: Generations,
    /// Set to true by `/quitquitquit`.
    pub quit: watch::Sender<bool>,
}

/// Where the admin server listens.
enum Admin {
    Loopback(TcpListener),
    /// With the file, which goes when the server ends.
    Unix(UnixListener, SocketFile),
}

/// A socket in the filesystem; removed with this.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The servers' sockets.
pub struct Ports {
    admin: Admin,
    stats: TcpListener,
    readiness: TcpListener,
}

impl Ports {
    /// Before anything else is touched: a second ztunnel in one network namespace must fail without taking pods over.
    ///
    /// # Errors
    /// A port that cannot be bound, with the setting that chooses another.
    pub async fn bind(config: &Config) -> anyhow::Result<Self> {
        let everywhere: &[IpAddr] = &[Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
        let admin = match &config.mode {
            Mode::Shared => {
                Admin::Loopback(bind("ADMIN_PORT", &[Ipv4Addr::LOCALHOST.into()], config.admin_port).await?)
            }
            Mode::Dedicated(settings) => bind_unix(&settings.admin_socket)?,
        };
        Ok(Self {
            admin,
            stats: bind("STATS_PORT", everywhere, config.stats_port).await?,
            readiness: bind("READINESS_PORT", everywhere, config.readiness_port).await?,
        })
    }
}

/// Starts the three servers into `tasks`. They go on during the drain of the pods, so that it can be watched.
pub fn start(ports: Ports, deps: Deps, tasks: &mut JoinSet<()>, drain: &DrainWatcher) {
    let dump = {
        let (shared, registry, generations) = (deps.shared.clone(), deps.registry.clone(), deps.generations.clone());
        move |_| {
            let dump = config_dump(&shared, &registry, &generations);
            async move { json(&dump) }
        }
    };
    let quit = deps.quit;
    let admin = AdminServer::new("admin").route(Method::GET, "/config_dump", dump).logging(deps.log).quit(move || {
        quit.send_replace(true);
    });
    let admin = explain::route(profile::routes(admin), deps.shared, deps.registry).index("ztunnel", &ABOUT);
    let stats = AdminServer::new("stats").metrics(deps.metrics);
    let ready = AdminServer::new("readiness").readiness(deps.readiness);
    match ports.admin {
        Admin::Loopback(listener) => tasks.spawn(admin.serve(listener, drain.clone())),
        Admin::Unix(listener, file) => {
            let drain = drain.clone();
            tasks.spawn(async move {
                let _file = file;
                admin.serve_unix(listener, drain).await;
            })
        }
    };
    tasks.spawn(stats.serve(ports.stats, drain.clone()));
    tasks.spawn(ready.serve(ports.readiness, drain.clone()));
}

/// The first of `addresses` that can be bound: a host without IPv6 has no `[::]`.
async fn bind(setting: &str, addresses: &[IpAddr], port: u16) -> anyhow::Result<TcpListener> {
    let mut last = None;
    for ip in addresses {
        match TcpListener::bind(SocketAddr::new(*ip, port)).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    let error = last.unwrap_or_else(|| std::io::Error::other("no address"));
    Err(error).with_context(|| format!("listening on port {port} (set {setting} to choose another)"))
}

/// A socket for root and our own user, in place of one that nobody answers any more.
fn bind_unix(path: &Path) -> anyhow::Result<Admin> {
    let bound = || -> anyhow::Result<UnixListener> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        anyhow::ensure!(!is_answered(path), "another ztunnel answers there");
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
            Ok(_) => anyhow::bail!("something that is no socket is in the way"),
            Err(_) => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    let listener =
        bound().with_context(|| format!("listening on {} (set ADMIN_SOCKET to choose another)", path.display()))?;
    Ok(Admin::Unix(listener, SocketFile(path.to_owned())))
}

/// Is there a live ztunnel behind this socket?
#[must_use]
pub fn is_answered(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

fn config_dump(shared: &Shared, registry: &Registry, generations: &Generations) -> serde_json::Value {
    let mut dump = shared.store.snapshot().config_dump();
    dump.insert("certificates".into(), serde_json::json!(shared.certs.snapshot()));
    dump.insert("config".into(), shared.config.dump());
    dump.insert("workloadState".into(), registry.dump());
    dump.insert("generations".into(), serde_json::json!(generations.list()));
    dump.insert("version".into(), serde_json::json!({ "version": crate::VERSION }));
    serde_json::Value::Object(dump)
}
