//! A proxy that does nothing: takes a connection, makes another, copies. Two of them on the way show what user-space hops cost on a
//! machine before any of them encrypts, decides or counts.
//!
//! Built like our data path where it is a matter of taste: a thread for each core with a runtime of its own, listeners that share a port.

use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Barrier};
use std::thread;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

/// Read at once, in each direction.
const BUFFER: usize = 128 << 10;
const BACKLOG: u32 = 4096;
/// Said on standard output once it listens.
pub const READY: &str = "relaying";

/// What one relay process is told.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// FROM=TO: where it listens, and where what it accepts goes
    #[arg(required = true)]
    ways: Vec<Way>,
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

/// Relays until killed.
///
/// # Errors
/// When it cannot listen.
pub fn run(options: &Options) -> Result<()> {
    let count = thread::available_parallelism()?.get();
    let all_listen = Arc::new(Barrier::new(count + 1));
    let threads: Vec<_> = (0..count)
        .map(|_| {
            let (ways, all_listen) = (options.ways.clone(), all_listen.clone());
            thread::spawn(move || {
                // The others wait for this one and would not end.
                if let Err(error) = serve(&ways, &all_listen) {
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

fn serve(ways: &[Way], all_listen: &Barrier) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let mut loops = JoinSet::new();
        for way in ways {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseport(true)?;
            socket.bind(way.from).with_context(|| way.from.to_string())?;
            loops.spawn(accept(socket.listen(BACKLOG)?, way.to));
        }
        all_listen.wait();
        // One only ends with an error.
        loops.join_next().await.context("there are ways")??
    })
}

async fn accept(listener: TcpListener, to: SocketAddr) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        // Its errors are the client's to tell.
        tokio::spawn(relay(stream, to));
    }
}

async fn relay(mut from: TcpStream, to: SocketAddr) -> std::io::Result<()> {
    from.set_nodelay(true)?;
    let mut to = TcpStream::connect(to).await?;
    to.set_nodelay(true)?;
    copy_bidirectional_with_sizes(&mut from, &mut to, BUFFER, BUFFER).await.map(drop)
}
