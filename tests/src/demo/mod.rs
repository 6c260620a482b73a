//! The story that `cargo xtask demo` tells.
use crate::places::Places;
use crate::session::Session;
use anyhow::Result;
use std::process::ExitCode;
pub fn run(_places: &Places, _keep: bool, _only: &[char]) -> Result<ExitCode> {
    anyhow::bail!("not yet")
}
pub fn install(_session: &Session) -> Result<()> {
    Ok(())
}
pub fn how_to_play(_session: &Session) -> String {
    String::new()
}
