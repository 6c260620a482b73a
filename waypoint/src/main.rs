//! The `waypoint` program: arguments and settings in, exit status out.

use std::process::ExitCode;

use waypoint::app;
use waypoint::config::{Command, Config, USAGE, parse_args};

fn main() -> ExitCode {
    match parse_args(std::env::args().skip(1)) {
        Ok(Command::Run) => {}
        Ok(Command::Version) => {
            println!("waypoint {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Command::Help) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(mistakes) => {
            eprintln!("waypoint: {mistakes}");
            return ExitCode::from(2);
        }
    }
    let config = match Config::from_env(std::env::vars()) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("waypoint: {mistakes}");
            return ExitCode::from(2);
        }
    };
    let format = config.log_format.parse().expect("checked when the settings were read");
    let log = match mesh::telemetry::init_logging(&config.log_filter, format) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("waypoint: RUST_LOG={:?}: {error}", config.log_filter);
            return ExitCode::from(2);
        }
    };
    // One TLS provider for the process, chosen before anything builds a TLS configuration.
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed already");
    }
    match app::run(config, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
