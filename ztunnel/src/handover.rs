//! Hand-over from one ztunnel of a node to the next, and the life of the old one after its container.
//!
//! ```text
//!  container                                     the node
//!  ┌ supervisor ── child: serving ─SIGTERM─► accepting ─ successor claimed, or the time is nearly up ───┐
//!  │     ▲                                                                                               ▼
//!  │     │                                            listeners closed, GOAWAY, what is being opened settles
//!  │     │ "detached": exit 0                                             │ connections left
//!  │     └─────────────────────────────────────────────── own cgroup, sealed: draining ◄─────────────────┘
//!  └ ends                                                     ▲ cuts, end      │ table, counters, log lines
//!                                                             └── successor ◄──┘   (unix socket, root only)
//! ```
//! Nothing is handed from process to process but words: connections, keys and sessions stay where they were made. The
//! draining process holds no policy and no configuration that could grow old. It tells its successor which inbound
//! connections it has and on what grounds they were let in; the successor asks *its* policy and says which to cut. So
//! two versions never have to agree on how to read a policy, and what the serving generation would cut is cut here too.
//!
//! What is left to a draining process is bounded: time, number of generations, silence of the successor ([`drainer`]),
//! and what it can do at all ([`seal`]).

pub mod cgroup;
pub mod counters;
pub mod drainer;
pub mod follow;
pub mod seal;
pub mod supervisor;
pub mod wire;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};

use crate::worker::Workers;
use drainer::{Drainer, End};
use supervisor::Leash;

/// Whoever removes ztunnel from a node makes this file in the run directory: draining ztunnels end when they see it. A
/// ztunnel that starts removes it.
pub const UNINSTALL_MARKER: &str = "uninstalled";

/// Directory of the drainers' sockets, below the run directory.
const SOCKETS: &str = "drain";

/// One process of ztunnel on this node, and when it was started: sorts by age.
#[must_use]
pub fn generation() -> String {
    format!("{:010}-{}", unix_seconds(SystemTime::now()), std::process::id())
}

/// Makes the run directory, for root alone.
///
/// # Errors
/// When it cannot be made or belongs to somebody else.
pub fn prepare_run_dir(run_dir: &Path) -> io::Result<PathBuf> {
    let sockets = run_dir.join(SOCKETS);
    fs::create_dir_all(&sockets)?;
    for directory in [run_dir, &sockets] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    }
    Ok(sockets)
}

/// Says that ztunnel was removed from this node, where it has ever run.
///
/// # Errors
/// When the file cannot be made.
pub fn leave_marker(run_dir: &Path) -> io::Result<()> {
    match fs::write(run_dir.join(UNINSTALL_MARKER), "") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes the sockets of draining ztunnels, once there is none.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_sockets(run_dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(run_dir.join(SOCKETS)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes back an uninstallation: there is a ztunnel again.
pub fn remove_marker(run_dir: &Path) {
    // Usually there is none.
    let _ = fs::remove_file(run_dir.join(UNINSTALL_MARKER));
}

/// For threads that are just ending, before it is looked at what the rest may do. One that resolves a name cannot be
/// stopped; open connections are served meanwhile, and the container's grace period is longer.
const LAST_THREADS: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Gives up everything that open connections do not need, lets the container end, and drains. The process must be out of
/// the container's cgroups, and have no threads but this one and the workers'.
///
/// # Errors
/// What could not be given up: then nothing is served on, and the caller ends the process.
pub fn live_on(drainer: Drainer, leash: Leash, workers: &Workers) -> io::Result<End> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = prepare_run_dir(&drainer.run_dir)?.join(format!("{}.sock", drainer.generation));
        let control = UnixListener::bind(socket)?;
        let terminate = signal(SignalKind::terminate())?;
        // A runtime waits for the container's standard output to be closed by all who hold it.
        drainer.log.keep();
        let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        // It fails for the leader of a group, which nobody supervises.
        let _ = setsid();
        leash.loosen()?;
        workers.give_up_capabilities().await?;
        seal::drop_capabilities()?;
        let powerless = async {
            while !seal::is_powerless()? {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            Ok::<_, io::Error>(())
        };
        let late = |_| io::Error::other("a thread still has capabilities");
        tokio::time::timeout(LAST_THREADS, powerless).await.map_err(late)??;
        seal::seal(control.as_fd())?;
        leash.release()?;
        Ok(drainer.run(control, terminate).await)
    })
}

/// Is the process at the other end of the socket of our own user? The directory is closed to others already; this holds
/// also where somebody opened it.
fn is_trusted(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw())
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
