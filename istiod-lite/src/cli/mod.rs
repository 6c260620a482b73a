//! The commands beside the control plane itself, for people at a terminal and for their scripts: flags and output are
//! kubectl's where kubectl has them, and Istio's where Istio has.
//!
//! A command asks the API (or reads files), decides by the same pure functions as the control plane, and says what came of
//! it: 0 nothing is wrong, 1 something is, 2 it could not be looked at or done. Nothing here is part of the control plane.

mod analyze;
mod bug_report;
mod connect;
mod describe;
mod explain;
mod facts;
mod install_check;
mod output;
mod proxy_status;
mod read;
mod tar;
mod waypoint;

use std::process::ExitCode;

use clap::Subcommand;

use self::output::Paint;
use crate::config::Config;

/// It could not be looked at, or done.
const NOT_DONE: u8 = 2;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Says whether the mesh can be installed on this cluster, or is there and whole, and how to mend what is not.
    #[command(visible_aliases = ["precheck", "verify"])]
    InstallCheck(install_check::Arguments),
    /// Says what of these objects will not be done as it is written, without changing anything.
    Analyze(analyze::Arguments),
    /// Says which proxies are connected, and whether they have what they should.
    #[command(visible_alias = "ps")]
    ProxyStatus(proxy_status::Arguments),
    /// Says what holds of a pod or a Service: mesh, mTLS, waypoint, policies, routes.
    #[command(subcommand)]
    Describe(describe::Command),
    /// Says what would become of a connection from A to B, and which policy and which routes decide.
    Explain(explain::Arguments),
    /// Makes, shows and removes waypoints.
    #[command(subcommand)]
    Waypoint(waypoint::Command),
    /// Collects what is needed to find a fault into an archive: objects, statuses, logs. No Secrets.
    BugReport(bug_report::Arguments),
}

/// How a command ended that could be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Good,
    Findings,
}

/// What a command says, and how it ended.
#[derive(Debug)]
struct Said {
    text: String,
    ending: Ending,
}

impl Said {
    fn good(text: impl Into<String>) -> Self {
        Self { text: text.into(), ending: Ending::Good }
    }
}

impl Command {
    /// Carries it out.
    pub async fn run(self, config: Config) -> ExitCode {
        let mesh = config.mesh;
        let paint = Paint::of_stdout(|name| std::env::var(name).ok());
        let said = match self {
            Self::InstallCheck(arguments) => install_check::run(arguments, mesh, paint).await,
            Self::Analyze(arguments) => analyze::run(arguments, mesh).await,
            Self::ProxyStatus(arguments) => proxy_status::run(arguments, mesh, paint).await,
            Self::Describe(command) => describe::run(command, mesh, paint).await,
            Self::Explain(arguments) => explain::run(arguments, mesh, paint).await,
            Self::Waypoint(command) => waypoint::run(command, mesh, paint).await,
            Self::BugReport(arguments) => bug_report::run(arguments, mesh).await,
        };
        match said {
            Ok(Said { text, ending }) => {
                output::print(&text);
                match ending {
                    Ending::Good => ExitCode::SUCCESS,
                    Ending::Findings => ExitCode::FAILURE,
                }
            }
            Err(error) => {
                eprintln!("istiod-lite: {error:#}");
                ExitCode::from(NOT_DONE)
            }
        }
    }
}

#[cfg(test)]
mod testing;
