//! `bench`: measures the mesh against plain TCP and peers. Usually run by `cargo xtask bench`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mesh_tests::bench::{Options, capture, l4, load, relay, scale, serve, sink};
use mesh_tests::echo;
use mesh_tests::load::{client, endure, many, soak};

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
    /// The way into a proxy, without one: loopback, our programs, iptables
    Capture(Options),
    /// The control plane under many node proxies, pods and changes: how soon they hear, and what it takes
    Scale(scale::Options),
    /// Many idle pods on one node: time to enrol them, memory and CPU of their ztunnel
    Pods(many::Options),
    /// Everything that must not lose a connection, under load: not a measurement, a test that takes its time
    Soak(soak::Options),
    /// Everything at once for half an hour: load, changes, short certificates. Nothing may fail, and no memory grow
    Endure(endure::Options),
    /// The client end of a soak
    #[command(hide = true)]
    SoakClient(client::Options),
    /// Where connections end in the suite `capture`
    #[command(hide = true)]
    Sink(sink::SinkOptions),
    /// The client end there
    #[command(hide = true)]
    Dial(sink::DialOptions),
    /// The server end of a test
    #[command(hide = true)]
    Serve,
    /// An application that answers with what has reached it
    #[command(hide = true)]
    Echo(echo::server::Options),
    /// Its client: what to ask on standard input, what came of it on standard output
    #[command(hide = true)]
    Ask,
    /// A proxy that only copies
    #[command(hide = true)]
    Relay(relay::Options),
    /// The client end of a test
    #[command(hide = true)]
    Load(load::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().suite {
        Suite::L4(options) => l4::run(&options),
        Suite::Capture(options) => capture::run(&options),
        Suite::Scale(options) => scale::run(&options),
        Suite::Sink(options) => sink::sink(&options).map(|never| match never {}),
        Suite::Dial(options) => sink::dial(&options),
        Suite::Pods(options) => many::run(&options),
        Suite::Soak(options) => soak::run(&options),
        Suite::Endure(options) => endure::run(&options),
        Suite::SoakClient(options) => client::run(&options),
        Suite::Serve => serve::run(),
        Suite::Echo(options) => echo::server::run(&options),
        Suite::Ask => echo::client::run(),
        Suite::Relay(options) => relay::run(&options),
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
