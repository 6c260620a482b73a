//! The `ztunnel` binary: reads arguments and environment, then hands over to [`ztunnel::app`], or serves one call of a
//! container runtime, as which it is also started under the plugin's name.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};
use ztunnel::cni::install;
use ztunnel::config::{CniTask, Command, Config, Mistakes, USAGE, UninstallTask, parse_args};
use ztunnel::explain::cli;
use ztunnel::handover::supervisor;
use ztunnel::{app, dedicated, uninstall};

/// A mistake of whoever started us; nothing was tried.
const BAD_SETTINGS: u8 = 2;
/// `explain` has nothing to say to such a question.
const NO_ANSWER: u8 = 2;

fn main() -> ExitCode {
    let called_as = std::env::args_os().next();
    if called_as.is_some_and(|path| Path::new(&path).file_name().is_some_and(|name| name == ztunnel_cni::plugin::NAME))
    {
        return ztunnel_cni::main();
    }
    match parse_args(std::env::args().skip(1)) {
        Ok(Command::Version) => {
            println!("ztunnel {}", ztunnel::VERSION);
            ExitCode::SUCCESS
        }
        Ok(Command::Help) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Command::Cni) => ztunnel_cni::main(),
        Ok(command @ (Command::CniInstall | Command::CniUninstall)) => match CniTask::from_env(std::env::vars()) {
            Ok(task) => done(match command {
                Command::CniInstall => install::install(&task.directories, &task.settings.entry()),
                _ => install::uninstall(&task.directories),
            }),
            Err(mistakes) => refuse(&mistakes),
        },
        Ok(Command::Uninstall) => match UninstallTask::from_env(std::env::vars()) {
            Ok(task) => done(uninstall::run(&task)),
            Err(mistakes) => refuse(&mistakes),
        },
        Ok(Command::Wait) => done(until_ended()),
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
        Ok(Command::Explain(question)) => explain(question.as_ref()),
        Err(mistakes) => refuse(&mistakes),
    }
}

/// Prints the answer of the ztunnel that runs here; the exit status is for scripts.
fn explain(question: Option<&cli::Question>) -> ExitCode {
    let Some(question) = question else {
        println!("{}", cli::USAGE);
        return ExitCode::SUCCESS;
    };
    let admin = match cli::Admin::from_env(std::env::vars()) {
        Ok(admin) => admin,
        Err(mistakes) => return refuse(&mistakes),
    };
    match cli::ask(&admin, question) {
        Ok(cli::Answer::Verdict(connects, said)) => {
            print!("{said}");
            if connects { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Ok(cli::Answer::None(said)) => {
            eprintln!("ztunnel explain: {said}");
            ExitCode::from(NO_ANSWER)
        }
        Err(error) => {
            eprintln!("ztunnel explain: {error:#}");
            ExitCode::from(NO_ANSWER)
        }
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
    done(app::run(config, log))
}

/// Waits for SIGTERM or SIGINT. As process 1 of a container we would not be ended by them unless we ask.
fn until_ended() -> anyhow::Result<()> {
    let ends = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    ends.thread_block()?;
    ends.wait()?;
    Ok(())
}

fn done(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
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
