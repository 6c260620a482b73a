//! The cluster's API server: `istiod-lite standalone --api-only`, on listening sockets the lab made for it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;

use super::API_PORT;
use crate::container::append;
use crate::record::Record;
use crate::sys::{self, quote};
use crate::topology::{PARENT_V4, Parent};

/// A running API server. Its sockets are the lab's: while it restarts, clients wait in their queues.
pub struct Server {
    child: Child,
    sockets: [TcpListener; 2],
    record: Record,
    program: PathBuf,
    /// Kubeconfig of the administrator, for the root namespace.
    pub kubeconfig: PathBuf,
}

impl Server {
    /// Starts the server and waits until it has written its kubeconfig.
    pub fn start(record: &Record, parent: &Parent, program: &Path) -> Result<Self> {
        let local = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = SocketAddr::new(IpAddr::V4(PARENT_V4), API_PORT);
        let inside = parent.netns.enter(move || Ok(TcpListener::bind(address)?))?;
        let sockets = [local, inside];
        let child = spawn(record, program, &sockets)?;
        let kubeconfig = kubeconfig(record);
        let (record, program) = (record.clone(), program.to_owned());
        let mut server = Self { child, sockets, record, program, kubeconfig };
        crate::wait::until("the API server to write its kubeconfig", Duration::from_secs(30), || {
            if let Some(status) = server.child.try_wait()? {
                let log = fs::read_to_string(server.log()).unwrap_or_default();
                return Ok(Err(anyhow::anyhow!("the API server ended with {status}:\n{log}")));
            }
            if !server.kubeconfig.exists() {
                bail!("it is still starting");
            }
            Ok(Ok(()))
        })??;
        server.publish()?;
        Ok(server)
    }

    fn log(&self) -> PathBuf {
        self.record.logs().join("api-server.log")
    }

    /// Lets others find the process (the demo kills it).
    fn publish(&self) -> Result<()> {
        Ok(fs::write(pid_file(&self.record), self.child.id().to_string())?)
    }

    /// A client with the administrator's rights.
    pub async fn client(&self) -> Result<Client> {
        client(&self.kubeconfig).await
    }

    /// Starts the server again if it has ended.
    pub fn keep(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            eprintln!("the API server ended with {status}: starting it again");
            self.child = spawn(&self.record, &self.program, &self.sockets)?;
            self.publish()?;
        }
        Ok(())
    }

    /// Ends the server in good order.
    pub fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("PID out of range")?;
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let ended = crate::wait::until_true("the API server to end", Duration::from_secs(3), || {
            matches!(self.child.try_wait(), Ok(Some(_)))
        });
        if ended.is_err() {
            self.child.kill()?;
            self.child.wait()?;
        }
        Ok(())
    }
}

/// Where the administrator's kubeconfig is.
pub fn kubeconfig(record: &Record) -> PathBuf {
    record.run_dir.join("kubeconfig")
}

/// Holds the PID of the API server.
pub fn pid_file(record: &Record) -> PathBuf {
    record.run_dir.join("api-server.pid")
}

fn spawn(record: &Record, program: &Path, sockets: &[TcpListener; 2]) -> Result<Child> {
    let log = append(&record.logs().join("api-server.log"))?;
    let cgroup = record.cgroup.join("api-server");
    fs::create_dir_all(&cgroup)?;
    // The sockets arrive as standard input and output and are moved to where LISTEN_FDS says they are.
    let script = format!(
        "echo $$ > {}/cgroup.procs\nexec 3<&0 4<&1 0</dev/null 1>&2\nexport LISTEN_PID=$$ LISTEN_FDS=2\n\
         exec {} standalone --api-only --data-dir {} --kubeconfig-out {}",
        quote(&cgroup.display().to_string()),
        quote(&program.display().to_string()),
        quote(&record.run_dir.join("api-data").display().to_string()),
        quote(&kubeconfig(record).display().to_string()),
    );
    Command::new("/bin/sh")
        .args(["-ec", &script])
        .env_clear()
        .env("PATH", sys::PATH)
        .env("RUST_LOG", "info")
        .stdin(OwnedFd::from(sockets[0].try_clone()?))
        .stdout(OwnedFd::from(sockets[1].try_clone()?))
        .stderr(log)
        .process_group(0)
        .spawn()
        .context("cannot start the API server")
}

/// A client from a kubeconfig file.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}
