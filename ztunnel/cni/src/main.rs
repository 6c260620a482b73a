//! The `ztunnel-cni` binary, called by container runtimes.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ztunnel_cni::main()
}
