//! A proxy that does nothing: takes a connection, makes another, copies. Two of them on the way show what user-space hops cost on a
//! machine before any of them encrypts, decides or counts; with TLS between the two, what they cost before they speak HTTP/2.
//!
//! Built like our data path where it is a matter of taste: a thread for each core with a runtime of its own, listeners that share a port.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Barrier};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Read at once, in each direction.
const BUFFER: usize = 128 << 10;
const BACKLOG: u32 = 4096;
/// Said on standard output once it listens.
pub const READY: &str = "relaying";
/// Whom the certificate of a server's relay names.
const NAME: &str = "relay";
const CERT: &str = "relay-cert.pem";
const KEY: &str = "relay-key.pem";

/// What one relay process is told.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Which of its two sides speaks TLS
    #[arg(long, requires = "certificate", value_enum)]
    tls: Option<Side>,
    /// Where the certificate of the server's side is
    #[arg(long)]
    certificate: Option<PathBuf>,
    /// FROM=TO: where it listens, and where what it accepts goes
    #[arg(required = true)]
    ways: Vec<Way>,
}

/// One side of a relay.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Side {
    /// What it accepts.
    From,
    /// What it makes.
    To,
}

/// TLS of one side, or none.
#[derive(Clone)]
enum Tls {
    None,
    From(TlsAcceptor),
    To(TlsConnector),
}

#[derive(Clone, Copy, Debug)]
struct Way {
    from: SocketAddr,
    to: SocketAddr,
}

impl FromStr for Way {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (from, to) = text.split_once('=').context("FROM=TO is expected")?;
        Ok(Self { from: from.parse()?, to: to.parse()? })
    }
}

/// Makes the certificate that relays with TLS use.
///
/// # Errors
/// When the files cannot be written.
pub fn write_certificate(directory: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    fs::write(directory.join(CERT), made.cert.pem())?;
    Ok(fs::write(directory.join(KEY), made.signing_key.serialize_pem())?)
}

impl Tls {
    /// TLS 1.3 with the cipher that ours prefers.
    fn new(options: &Options) -> Result<Self> {
        let (Some(side), Some(directory)) = (options.tls, &options.certificate) else { return Ok(Self::None) };
        let cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
        let provider = Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() });
        let certificate = CertificateDer::from_pem_file(directory.join(CERT))?;
        Ok(match side {
            Side::From => {
                let key = PrivateKeyDer::from_pem_file(directory.join(KEY))?;
                let config = ServerConfig::builder_with_provider(provider)
                    .with_protocol_versions(&[&rustls::version::TLS13])?
                    .with_no_client_auth()
                    .with_single_cert(vec![certificate], key)?;
                Self::From(Arc::new(config).into())
            }
            Side::To => {
                let mut roots = RootCertStore::empty();
                roots.add(certificate)?;
                let config = ClientConfig::builder_with_provider(provider)
                    .with_protocol_versions(&[&rustls::version::TLS13])?
                    .with_root_certificates(roots)
                    .with_no_client_auth();
                Self::To(Arc::new(config).into())
            }
        })
    }
}

/// Relays until killed.
///
/// # Errors
/// When it cannot listen.
pub fn run(options: &Options) -> Result<()> {
    let tls = Tls::new(options)?;
    let count = thread::available_parallelism()?.get();
    let all_listen = Arc::new(Barrier::new(count + 1));
    let threads: Vec<_> = (0..count)
        .map(|_| {
            let (ways, tls, all_listen) = (options.ways.clone(), tls.clone(), all_listen.clone());
            thread::spawn(move || {
                // The others wait for this one and would not end.
                if let Err(error) = serve(&ways, &tls, &all_listen) {
                    eprintln!("relay: {error:#}");
                    std::process::exit(1);
                }
            })
        })
        .collect();
    all_listen.wait();
    println!("{READY}");
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread panicked")))
}

fn serve(ways: &[Way], tls: &Tls, all_listen: &Barrier) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut loops = JoinSet::new();
        for way in ways {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseport(true)?;
            socket.bind(way.from).with_context(|| way.from.to_string())?;
            loops.spawn(accept(socket.listen(BACKLOG)?, way.to, tls.clone()));
        }
        all_listen.wait();
        // One only ends with an error.
        loops.join_next().await.context("there are ways")??
    })
}

async fn accept(listener: TcpListener, to: SocketAddr, tls: Tls) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        // Its errors are the client's to tell.
        tokio::spawn(relay(stream, to, tls.clone()));
    }
}

async fn relay(from: TcpStream, to: SocketAddr, tls: Tls) -> std::io::Result<()> {
    from.set_nodelay(true)?;
    let to = TcpStream::connect(to).await?;
    to.set_nodelay(true)?;
    match tls {
        Tls::None => copy(from, to).await,
        Tls::From(acceptor) => copy(acceptor.accept(from).await?, to).await,
        Tls::To(connector) => {
            let name = ServerName::try_from(NAME).map_err(std::io::Error::other)?;
            copy(from, connector.connect(name, to).await?).await
        }
    }
}

async fn copy(
    mut from: impl AsyncRead + AsyncWrite + Unpin,
    mut to: impl AsyncRead + AsyncWrite + Unpin,
) -> std::io::Result<()> {
    copy_bidirectional_with_sizes(&mut from, &mut to, BUFFER, BUFFER).await.map(drop)
}
