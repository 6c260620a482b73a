//! `bench`: measures the mesh against plain TCP and peers. Usually run by `cargo xtask bench`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mesh_tests::bench::{Options, l4, load, serve};

/// Measures the mesh side by side with plain TCP and with peers.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Subcommand)]
enum Suite {
    /// Bytes, pings, short connections and HTTP between two pods
    L4(Options),
    /// The server end of a test
    #[command(hide = true)]
    Serve,
    /// The client end of a test
    #[command(hide = true)]
    Load(load::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().suite {
        Suite::L4(options) => l4::run(&options),
        Suite::Serve => serve::run(),
        Suite::Load(options) => load::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}
