//! The `istiod-lite` binary: reads arguments and environment, then hands over to [`istiod_lite::app`] or
//! [`istiod_lite::standalone`].

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;
use istiod_lite::config::Config;
use istiod_lite::standalone::{Server, StandaloneArgs, default_service_cidrs};
use istiod_lite::{app, cli};
use mesh::drain::{self, DrainTrigger, DrainWatcher};
use tokio::signal::unix::{SignalKind, signal};

/// Lists come in bursts, from many threads, and most of what is allocated for them is freed at once: the C library's allocator
/// keeps more of that than all that is held. How soon this one gives back is in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A mistake of whoever started us; nothing was tried.
const BAD_SETTINGS: u8 = 2;

/// The control plane of the mesh. Without a command it runs against the cluster of the pod it is in (or of KUBECONFIG).
#[derive(Parser)]
#[command(name = "istiod-lite", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Brings its own Kubernetes API server: for laptops, virtual machines and tests.
    Standalone(Standalone),
    #[command(flatten)]
    Ask(cli::Command),
}

#[derive(Args)]
struct Standalone {
    /// Where objects, keys and certificates are kept.
    #[arg(long)]
    data_dir: PathBuf,
    /// Where to write a kubeconfig with the administrator's token.
    #[arg(long)]
    kubeconfig_out: Option<PathBuf>,
    /// Serve the API only; a control plane is started elsewhere.
    #[arg(long)]
    api_only: bool,
    /// Where to serve the API, unless sockets are handed over (LISTEN_FDS). May be given more than once.
    #[arg(long, default_value = "127.0.0.1:6443")]
    listen: Vec<SocketAddr>,
    /// Addresses for Services, at most one range of each family.
    #[arg(long, default_values_t = default_service_cidrs())]
    service_cidr: Vec<IpNet>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::from_env(std::env::vars()) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("istiod-lite: {mistakes}");
            return ExitCode::from(BAD_SETTINGS);
        }
    };
    // An error only says that a provider is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let standalone = match arguments.command {
        None => None,
        Some(Command::Standalone(standalone)) => Some(standalone),
        // Answers go where the log would go, so there is none.
        Some(Command::Ask(command)) => return ask(command, config),
    };
    if let Err(error) = mesh::telemetry::init_logging(&config.log_filter, config.log_format) {
        eprintln!("istiod-lite: {error}");
        return ExitCode::from(BAD_SETTINGS);
    }
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(standalone, config)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("istiod-lite: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ask(command: cli::Command, config: Config) -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(command.run(config)),
        Err(error) => {
            eprintln!("istiod-lite: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(own_api: Option<Standalone>, config: Config) -> anyhow::Result<()> {
    let (trigger, drain) = drain::channel();
    let deadline = config.drain_deadline;
    let component = async {
        match own_api {
            None => app::run(config, kube::Client::try_default().await?, drain).await,
            Some(Standalone { data_dir, kubeconfig_out, api_only, listen, service_cidr }) => {
                let service_cidrs = service_cidr;
                let args = StandaloneArgs { data_dir, kubeconfig_out, api_only, listen, service_cidrs };
                standalone(args, config, drain).await
            }
        }
    };
    tokio::pin!(component);
    // A component that ends by itself has failed; one that was told to end gets until the deadline.
    tokio::select! {
        outcome = &mut component => return outcome,
        () = terminated() => {}
    }
    tracing::info!("terminating");
    let ((), outcome) = tokio::join!(shut_down(trigger, deadline), component);
    outcome
}

/// Who it is that serves the API too: the data are one process', so whoever was of this name has ended.
const STANDALONE: &str = "standalone";

/// The API server, and beside it the control plane as its administrator.
async fn standalone(args: StandaloneArgs, config: Config, drain: DrainWatcher) -> anyhow::Result<()> {
    let server = Server::start(&args).await?;
    let outcome = if args.api_only {
        drain.draining().await;
        Ok(())
    } else {
        let kubeconfig = kube::config::Kubeconfig::read_from(server.kubeconfig())?;
        let options = kube::config::KubeConfigOptions::default();
        let client = kube::Client::try_from(kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?)?;
        app::run(Config { identity: STANDALONE.to_owned(), ..config }, client, drain).await
    };
    server.shutdown().await;
    outcome
}

async fn shut_down(trigger: DrainTrigger, deadline: std::time::Duration) {
    trigger.drain(deadline).await;
}

/// SIGTERM or SIGINT.
async fn terminated() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        tracing::error!("signals cannot be handled; end this process by SIGKILL");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
