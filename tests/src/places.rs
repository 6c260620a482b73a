//! Where things are: the workspace, its built binaries, the tools that `cargo xtask setup` unpacked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cluster::images::Images;
use crate::record;

/// Directories the lab works with.
#[derive(Clone, Debug)]
pub struct Places {
    /// Root of the workspace.
    pub workspace: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// Binaries of the profile this program was built with.
    pub binaries: PathBuf,
}

impl Places {
    /// From the running program's own path: cargo put it below the target directory.
    ///
    /// # Errors
    /// When the program was moved elsewhere.
    pub fn find() -> Result<Self> {
        let program = std::env::current_exe()?;
        // `target/PROFILE/NAME`, or `target/PROFILE/deps/NAME` for tests. Cargo's CACHEDIR.TAG is no sign: cargo writes it
        // only where it made the directory itself.
        let directory = program.parent().context("this program has no directory")?;
        let binaries = if directory.ends_with("deps") { directory.parent() } else { Some(directory) };
        let (binaries, target) = binaries
            .and_then(|binaries| Some((binaries, binaries.parent()?)))
            .context("this program is not in cargo's target directory: run it by `cargo xtask`")?;
        ensure!(
            binaries.join(".fingerprint").is_dir(),
            "{} is not cargo's target directory: run this by `cargo xtask`",
            target.display()
        );
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no workspace")?;
        Ok(Self { workspace: workspace.to_owned(), binaries: binaries.to_owned(), target: target.to_owned() })
    }

    /// Unpacked tools.
    pub fn tools(&self) -> PathBuf {
        self.target.join("tools")
    }

    /// What the pods of a lab are made of.
    pub fn images(&self, lab: &str) -> Images {
        let pushed = Path::new(record::RECORDS).join(lab).join("images");
        Images { binaries: self.binaries.clone(), tools: self.tools(), pushed }
    }

    /// Debian's kubectl 1.20, the oldest the demo must work with.
    pub fn kubectl(&self) -> Result<PathBuf> {
        let path = self.tools().join("kubectl-1.20/usr/bin/kubectl");
        ensure!(path.exists(), "{} is missing: run `cargo xtask setup`", path.display());
        Ok(path)
    }

    /// A present kubectl, from the Python package.
    pub fn current_kubectl(&self) -> Result<PathBuf> {
        let path = self.tools().join("venv/bin/kubectl");
        ensure!(path.exists(), "{} is missing: run `cargo xtask setup`", path.display());
        Ok(path)
    }

    /// A file of the workspace.
    pub fn file(&self, path: &str) -> PathBuf {
        self.workspace.join(path)
    }
}
