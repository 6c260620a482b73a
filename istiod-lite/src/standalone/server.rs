//! Brings the API server up: data directory, certificates, sockets (own or handed over), kubeconfig; and down again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ipnet::IpNet;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::api::Api;
use super::store::Store;
use super::tokens::Tokens;
use super::verbs::Settings;
use super::{controllers, files, tls};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long open requests may take to end after a stop; watches end at once.
const DRAIN: Duration = Duration::from_secs(5);

/// How the embedded API server is run.
#[derive(Debug, Clone)]
pub struct StandaloneArgs {
    /// Where objects, keys and the CA are kept; made if missing, mode 0700.
    pub data_dir: PathBuf,
    /// Where the administrator's kubeconfig is written (0600); `admin.kubeconfig` in the data directory if `None`.
    pub kubeconfig_out: Option<PathBuf>,
    /// Whether the caller runs nothing but the API server; the server itself does not look at it.
    pub api_only: bool,
    /// Addresses to listen on, unless sockets were handed over by `LISTEN_FDS`.
    pub listen: Vec<SocketAddr>,
    /// Ranges of ClusterIPs, at most one per family; the first one's family is the primary one.
    pub service_cidrs: Vec<IpNet>,
}

impl StandaloneArgs {
    /// The defaults of the command line.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            kubeconfig_out: None,
            api_only: false,
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 6443))],
            service_cidrs: default_service_cidrs(),
        }
    }
}

/// 10.96.0.0/16 and fd00:10:96::/112.
pub fn default_service_cidrs() -> Vec<IpNet> {
    let v4 = ipnet::Ipv4Net::new(Ipv4Addr::new(10, 96, 0, 0), 16).expect("16 is a valid IPv4 prefix length");
    let v6 = ipnet::Ipv6Net::new(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112)
        .expect("112 is a valid IPv6 prefix length");
    vec![v4.into(), v6.into()]
}

/// A running API server. Dropping it cuts everything; [`Server::shutdown`] lets requests end.
pub struct Server {
    addresses: Vec<SocketAddr>,
    kubeconfig: PathBuf,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Server {
    /// Opens the data directory and serves. Ready when it returns.
    ///
    /// # Errors
    /// When the data directory is unusable or in use, or a socket cannot be had.
    pub async fn start(args: &StandaloneArgs) -> anyhow::Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&args.data_dir)
            .with_context(|| format!("creating the data directory {}", args.data_dir.display()))?;
        check_cidrs(&args.service_cidrs)?;
        let listeners = listeners(&args.listen).await?;
        let addresses: Vec<SocketAddr> = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()
            .context("reading a socket's address")?;
        let store = Arc::new(Store::open(&args.data_dir.join("objects.redb"))?);
        let tokens = Tokens::open(&args.data_dir)?;
        let certificate = tls::open(&args.data_dir, &certified(&addresses, &args.service_cidrs))?;

        let path = args.kubeconfig_out.clone().unwrap_or_else(|| args.data_dir.join("admin.kubeconfig"));
        let url = reachable(&addresses).context("no socket to listen on")?;
        let kubeconfig = kubeconfig(url, &certificate.ca_pem, tokens.admin());

        let (stop, stopping) = watch::channel(false);
        let settings = Settings { service_cidrs: args.service_cidrs.clone(), ca_certificate: certificate.ca_pem };
        let api = Arc::new(Api::new(store, settings, tokens, stopping.clone()));
        controllers::bootstrap(&api, &addresses).await.context("creating the initial objects")?;

        let mut tasks = JoinSet::new();
        tasks.spawn(controllers::run(Arc::clone(&api), stopping.clone()));
        let acceptor = TlsAcceptor::from(certificate.config);
        for listener in listeners {
            tasks.spawn(accept(listener, acceptor.clone(), Arc::clone(&api), stopping.clone()));
        }
        // Last, so that whoever waits for the file finds a server behind it.
        files::write_private(&path, kubeconfig.as_bytes())?;
        tracing::info!(?addresses, kubeconfig = %path.display(), "API server is ready");
        Ok(Self { addresses, kubeconfig: path, stop, tasks })
    }

    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Path of the administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Ends watches, lets other requests finish, and closes the store.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN + Duration::from_secs(1), ended).await.is_err() {
            tracing::warn!("requests were cut at the end of the drain time");
        }
    }
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// Those of [`Server::start`].
pub async fn run(args: StandaloneArgs) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let server = Server::start(&args).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    server.shutdown().await;
    Ok(())
}

/// Returns when the server is to stop, or is gone.
pub async fn stopped(mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

fn check_cidrs(cidrs: &[IpNet]) -> anyhow::Result<()> {
    let v4 = cidrs.iter().filter(|c| c.addr().is_ipv4()).count();
    anyhow::ensure!(
        !cidrs.is_empty() && v4 <= 1 && cidrs.len() - v4 <= 1,
        "one service range per address family, at least one"
    );
    for cidr in cidrs {
        anyhow::ensure!(cidr.max_prefix_len() - cidr.prefix_len() >= 3, "the service range {cidr} is too small");
    }
    Ok(())
}

/// The sockets that were handed over (`LISTEN_FDS`, file descriptors 3 and up), else new ones.
async fn listeners(listen: &[SocketAddr]) -> anyhow::Result<Vec<TcpListener>> {
    let mut handed_over = listenfd::ListenFd::from_env();
    let mut found = Vec::new();
    for index in 0..handed_over.len() {
        let socket =
            handed_over.take_tcp_listener(index).context("LISTEN_FDS: a descriptor is not a listening TCP socket")?;
        let Some(socket) = socket else { continue };
        socket.set_nonblocking(true)?;
        found.push(TcpListener::from_std(socket)?);
    }
    if found.is_empty() {
        for address in listen {
            found.push(TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))?);
        }
    }
    anyhow::ensure!(!found.is_empty(), "no address to listen on and no socket handed over");
    Ok(found)
}

/// Addresses the serving certificate is for.
fn certified(addresses: &[SocketAddr], cidrs: &[IpNet]) -> Vec<IpAddr> {
    let mut all = vec![IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    all.extend(addresses.iter().map(SocketAddr::ip).filter(|ip| !ip.is_unspecified()));
    all.extend(cidrs.iter().filter_map(controllers::api_address));
    all.sort();
    all.dedup();
    all
}

/// The address the kubeconfig names: loopback if there is one.
fn reachable(addresses: &[SocketAddr]) -> Option<SocketAddr> {
    let mut address = *addresses.iter().find(|a| a.ip().is_loopback()).or(addresses.first())?;
    if address.ip().is_unspecified() {
        let loopback = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        address.set_ip(loopback);
    }
    Some(address)
}

fn kubeconfig(address: SocketAddr, ca_pem: &str, token: &str) -> String {
    let ca = base64::engine::general_purpose::STANDARD.encode(ca_pem);
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: standalone
  cluster:
    server: https://{address}
    certificate-authority-data: {ca}
users:
- name: admin
  user:
    token: {token}
contexts:
- name: standalone
  context:
    cluster: standalone
    user: admin
current-context: standalone
"
    )
}

/// One listener: a task per connection, joined at the end.
async fn accept(listener: TcpListener, tls: TlsAcceptor, api: Arc<Api>, stopping: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        // Cancelling an accept or a join loses nothing.
        tokio::select! {
            () = stopped(stopping.clone()) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, tls.clone(), Arc::clone(&api), stopping.clone()));
                }
                Err(error) => {
                    // Out of descriptors, most likely: give the connections that are open a moment to close.
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    // The set is dropped, and with it what is left, when the time is over.
    let _ = tokio::time::timeout(DRAIN, ended).await;
}

async fn serve(stream: TcpStream, tls: TlsAcceptor, api: Arc<Api>, stopping: watch::Receiver<bool>) {
    // Without it a small answer waits for the client's delayed acknowledgement.
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake"),
        Err(_) => return tracing::debug!("TLS handshake timed out"),
    };
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(60));
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30)).max_concurrent_streams(1000);
    let service = hyper::service::service_fn(move |request| {
        let api = Arc::clone(&api);
        async move { Ok::<_, std::convert::Infallible>(api.handle(request).await) }
    });
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stopped(stopping) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
