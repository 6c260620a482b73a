//! The `ztunnel` binary: reads arguments and environment, then hands over to [`ztunnel::app`].

#![forbid(unsafe_code)]

use std::process::ExitCode;

use ztunnel::config::{Command, Config, Mistakes, USAGE, parse_args};
use ztunnel::handover::supervisor;
use ztunnel::{app, dedicated};

/// A mistake of whoever started us; nothing was tried.
const BAD_SETTINGS: u8 = 2;

fn main() -> ExitCode {
    match parse_args(std::env::args().skip(1)) {
        Ok(Command::Version) => {
            println!("ztunnel {}", ztunnel::VERSION);
            ExitCode::SUCCESS
        }
        Ok(Command::Help) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Command::Run) => match Config::from_env(std::env::vars()) {
            // The process that a runtime waits for is then not the one that serves.
            Ok(config) if !config.detached_drain.is_zero() && config.supervisor.is_none() => supervisor::run(),
            Ok(config) => run(config),
            Err(mistakes) => refuse(&mistakes),
        },
        Ok(Command::Release) => match Config::from_env(std::env::vars()) {
            Ok(config) => release(&config),
            Err(mistakes) => refuse(&mistakes),
        },
        Err(mistakes) => refuse(&mistakes),
    }
}

fn release(config: &Config) -> ExitCode {
    match dedicated::release::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel release: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> ExitCode {
    let log = match mesh::telemetry::init_logging(&config.log_filter, config.log_format) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("ztunnel: RUST_LOG={:?}: {error}", config.log_filter);
            return ExitCode::from(BAD_SETTINGS);
        }
    };
    match app::run(config, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn refuse(mistakes: &Mistakes) -> ExitCode {
    eprintln!("ztunnel: {mistakes}");
    ExitCode::from(BAD_SETTINGS)
}
