//! What the binary says to those who start it wrongly: everything at once, and exit status 2.

#![forbid(unsafe_code)]

use std::process::{Command, Output};

fn ztunnel(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
    command.args(args).env_clear().envs(env.iter().copied()).output().expect("the binary runs")
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn unknown_flags_are_all_named() {
    let output = ztunnel(&["proxy", "ztunnel", "--frobnicate", "-z"], &[]);
    assert_eq!(output.status.code(), Some(2));
    let said = error(&output);
    assert!(said.contains("--frobnicate") && said.contains("-z"), "{said}");
}

#[test]
fn bad_environment_values_are_all_named() {
    let output = ztunnel(&[], &[("NODE_NAME", "n"), ("STATS_PORT", "many"), ("PROXY_MODE", "dedicated")]);
    assert_eq!(output.status.code(), Some(2));
    let said = error(&output);
    assert!(said.contains("STATS_PORT") && said.contains("PROXY_MODE"), "{said}");
}

#[test]
fn version_needs_no_settings() {
    let output = ztunnel(&["--version"], &[]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains(env!("CARGO_PKG_VERSION")));
}
