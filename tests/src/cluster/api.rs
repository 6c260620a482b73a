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

/// A running API server.
pub struct Server {
    child: Child,
    /// Kubeconfig of the administrator, for the root namespace.
    pub kubeconfig: PathBuf,
}

impl Server {
    /// Starts the server and waits until it has written its kubeconfig.
    pub fn start(record: &Record, parent: &Parent, program: &Path) -> Result<Self> {
        let local = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = SocketAddr::new(IpAddr::V4(PARENT_V4), API_PORT);
        let inside = parent.netns.enter(move || Ok(TcpListener::bind(address)?))?;
        let kubeconfig = record.run_dir.join("kubeconfig");
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
            quote(&kubeconfig.display().to_string()),
        );
        let mut child = Command::new("/bin/sh")
            .args(["-ec", &script])
            .env_clear()
            .env("PATH", sys::PATH)
            .env("RUST_LOG", "info")
            .stdin(OwnedFd::from(local))
            .stdout(OwnedFd::from(inside))
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start the API server")?;
        crate::wait::until("the API server to write its kubeconfig", Duration::from_secs(30), || {
            if let Some(status) = child.try_wait()? {
                let log = fs::read_to_string(record.logs().join("api-server.log")).unwrap_or_default();
                return Ok(Err(anyhow::anyhow!("the API server ended with {status}:\n{log}")));
            }
            if !kubeconfig.exists() {
                bail!("it is still starting");
            }
            Ok(Ok(()))
        })??;
        Ok(Self { child, kubeconfig })
    }

    /// A client with the administrator's rights.
    pub async fn client(&self) -> Result<Client> {
        client(&self.kubeconfig).await
    }

    /// Whether the server still runs; if not, why.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the API server ended with {status}; see logs/api-server.log"),
        }
    }

    /// Ends the server in good order.
    pub fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("PID out of range")?;
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let ended = crate::wait::until_true("the API server to end", Duration::from_secs(5), || {
            matches!(self.child.try_wait(), Ok(Some(_)))
        });
        if ended.is_err() {
            self.child.kill()?;
            self.child.wait()?;
        }
        Ok(())
    }
}

/// A client from a kubeconfig file.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}
