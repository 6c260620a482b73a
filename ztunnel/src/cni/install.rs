//! Puts the plugin into the node's CNI directories, keeps it there while the main CNI comes, goes and rewrites its
//! configuration or clears the directory of programs, and takes it out again.
//!
//! Everything is written beside its place and renamed there, in the same directory: runtimes see whole files only, and
//! containerd 1.6 looks again only when something was written in, or renamed within, the directory it watches. A file
//! that was never ours is never removed. Taking out needs no ztunnel; it does not happen when one ends, because another
//! one comes, and pods started in between would not be captured.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh::drain::DrainWatcher;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use ztunnel_cni::namespaces::replace;
use ztunnel_cni::plugin::NAME;

use super::conflist::{self, Edit, SAVED};

/// In case a change was missed, or the directory was made anew.
const LOOK_ANYWAY: Duration = Duration::from_secs(30);
/// A CNI's installer writes several files in a row.
const SETTLE: Duration = Duration::from_millis(50);
/// Configurations are some kilobytes.
const MAX_CONF: u64 = 1 << 20;

/// Where things go, as this process sees the node's directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directories {
    /// Usually `/opt/cni/bin` on the node.
    pub bin: PathBuf,
    /// Usually `/etc/cni/net.d` on the node.
    pub conf: PathBuf,
}

/// Our entry in a configuration list. Paths are the node's.
#[must_use]
pub fn entry(socket: &Path, state: &Path, pass_namespaces: &[String]) -> Value {
    // See the plugin for why STATUS is its own.
    json!({ "type": NAME, "socket": socket, "state": state, "passNamespaces": pass_namespaces, "status": "plugin" })
}

/// Whether an entry of another version is brought up to date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Existing {
    Refresh,
    Keep,
}

/// What a look at the configurations has found.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// The main CNI has not written its configuration yet.
    NoConf,
    /// The plugin is in this file.
    In(String),
}

/// Installs binary and configuration; without a main CNI there is nothing to configure yet.
///
/// # Errors
/// With the path that could not be read or written, or the configuration that cannot take a plugin.
pub fn install(directories: &Directories, entry: &Value) -> anyhow::Result<()> {
    copy_program(&directories.bin)?;
    report(&ensure(&directories.conf, entry, Existing::Refresh)?);
    Ok(())
}

/// Installs, and then looks after the configuration until the drain begins. It stays installed.
pub async fn run(directories: Directories, entry: Value, drain: DrainWatcher) {
    let mut last = String::new();
    let mut existing = Existing::Refresh;
    let mut program = copy_program(&directories.bin);
    loop {
        // First the watch: what changes after the look wakes us.
        let watch = watch(&directories);
        // A configuration that names a program which is not there keeps every pod of the node from starting, our own too.
        if program.is_err() || !directories.bin.join(NAME).exists() {
            program = copy_program(&directories.bin);
        }
        let looked = match &program {
            Ok(()) => ensure(&directories.conf, &entry, existing),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        let said = match &looked {
            Ok(found) => {
                existing = Existing::Keep;
                format!("{found:?}")
            }
            Err(error) => format!("{error:#}"),
        };
        if said != last {
            match &looked {
                Ok(found) => report(found),
                Err(error) => tracing::warn!(error = format!("{error:#}"), "installing the CNI plugin"),
            }
            last = said;
        }
        tokio::select! {
            () = changed(watch) => tokio::time::sleep(SETTLE).await,
            () = tokio::time::sleep(LOOK_ANYWAY) => {}
            () = drain.draining() => return,
        }
    }
}

fn report(found: &Found) {
    match found {
        Found::In(file) => tracing::info!(file, "the CNI plugin is installed"),
        Found::NoConf => tracing::info!("the CNI plugin waits for the main CNI's configuration"),
    }
}

/// Takes the plugin out of every configuration, and then away. Fine where it is not installed.
///
/// # Errors
/// With the path that could not be read or written; the rest is done all the same.
pub fn uninstall(directories: &Directories) -> anyhow::Result<()> {
    let mut first = Ok(());
    let mut note = |path: PathBuf, done: io::Result<()>| {
        if let Err(error) = done
            && first.is_ok()
        {
            first = Err(anyhow::anyhow!("{}: {error}", path.display()));
        }
    };
    match names(&directories.conf) {
        Ok(names) => {
            for name in conflist::in_order(names.clone()) {
                let path = directories.conf.join(&name);
                note(path.clone(), take_out(&path));
            }
            for name in names.iter().filter(|name| name.ends_with(SAVED)) {
                let path = directories.conf.join(name);
                note(path.clone(), restore(&path));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => note(directories.conf.clone(), Err(error)),
    }
    // Last: until now a runtime may have called it.
    let program = directories.bin.join(NAME);
    match fs::remove_file(&program) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => note(program, Err(error)),
        _ => {}
    }
    first
}

fn take_out(path: &Path) -> io::Result<()> {
    match conflist::remove(&read(path)?) {
        Some(without) => replace(path, without.as_bytes(), mode(path)),
        None => Ok(()),
    }
}

/// Gives a single plugin's configuration its name back, unless its owner has written it anew, and removes the list that
/// was made of it.
fn restore(saved: &Path) -> io::Result<()> {
    let name = saved.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = name.strip_suffix(SAVED).unwrap_or(&name).to_owned();
    let original = saved.with_file_name(&name);
    if original.exists() {
        fs::remove_file(saved)?;
    } else {
        fs::rename(saved, &original)?;
    }
    match fs::remove_file(saved.with_file_name(conflist::list_name(&name))) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// One look: the configuration that runtimes take has our plugin afterwards.
fn ensure(conf: &Path, entry: &Value, existing: Existing) -> anyhow::Result<Found> {
    let in_file = |path: &Path, error: &dyn std::fmt::Display| anyhow::anyhow!("{}: {error}", path.display());
    let names = names(conf).map_err(|error| in_file(conf, &error))?;
    let Some(name) = conflist::in_order(names).into_iter().next() else { return Ok(Found::NoConf) };
    let path = conf.join(&name);
    let text = read(&path).map_err(|error| in_file(&path, &error))?;
    match conflist::add(&text, entry, existing == Existing::Refresh).map_err(|error| in_file(&path, &error))? {
        Edit::Nothing => Ok(Found::In(name)),
        Edit::Rewrite(text) => {
            replace(&path, text.as_bytes(), mode(&path)).map_err(|error| in_file(&path, &error))?;
            Ok(Found::In(name))
        }
        Edit::Replace { list } => {
            let target = conflist::list_name(&name);
            // The list first: at no moment is the node without a configuration.
            replace(&conf.join(&target), list.as_bytes(), mode(&path)).map_err(|error| in_file(&path, &error))?;
            fs::rename(&path, conf.join(format!("{name}{SAVED}"))).map_err(|error| in_file(&path, &error))?;
            Ok(Found::In(target))
        }
    }
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(directory)?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn read(path: &Path) -> io::Result<String> {
    use io::Read as _;
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_CONF).read_to_string(&mut text)?;
    Ok(text)
}

/// That of the file which is replaced: it may hold credentials.
fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(path).map_or(0o600, |metadata| metadata.permissions().mode() & 0o777)
}

/// The plugin that lies beside this program, as in our image; or this program, which knows what to do under that name.
fn copy_program(directory: &Path) -> anyhow::Result<()> {
    let copy = || {
        let beside = std::env::current_exe()?.with_file_name(NAME);
        let program = fs::read(&beside).or_else(|_| fs::read("/proc/self/exe"))?;
        let path = directory.join(NAME);
        if fs::read(&path).is_ok_and(|there| there == program) {
            return Ok(());
        }
        replace(&path, &program, 0o755)
    };
    copy().map_err(|error: io::Error| anyhow::anyhow!("{}: {error}", directory.display()))
}

/// Watches both directories for anything that changes what a runtime would take.
#[expect(deprecated, reason = "its successor is unsafe for the sake of odd types; this one owns its descriptor")]
fn watch(directories: &Directories) -> io::Result<AsyncFd<OwnedFd>> {
    let descriptor = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let events = WatchFlags::CLOSE_WRITE
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF;
    for directory in [&directories.conf, &directories.bin] {
        inotify::add_watch(&descriptor, directory, events | WatchFlags::ONLYDIR)?;
    }
    AsyncFd::with_interest(descriptor, Interest::READABLE)
}

async fn changed(watch: io::Result<AsyncFd<OwnedFd>>) {
    let Ok(watch) = watch else {
        // No such directory, perhaps not yet: looked for again after a while.
        return std::future::pending().await;
    };
    // What happened does not matter: everything is looked at again, with a new watch.
    let _ = watch.readable().await;
}

#[cfg(test)]
mod tests;
