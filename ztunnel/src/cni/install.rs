//! Puts the plugin into the node's CNI directories, keeps it there while the main CNI comes, goes and rewrites its
//! configuration or clears the directory of programs, and takes it out again.
//!
//! Everything is written beside its place and renamed there, in the same directory: runtimes see whole files only, and
//! containerd 1.6 looks again only when something was written in, or renamed within, the directory it watches. A file
//! that was never ours is neither removed nor written over. Taking out needs no ztunnel; it does not happen when one ends, because another
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
use tokio::time::Instant;
use ztunnel_cni::namespaces::replace;
use ztunnel_cni::plugin::NAME;

use super::conflist::{self, Edit, SAVED};

/// In case a change was missed, or the directory was made anew.
const LOOK_ANYWAY: Duration = Duration::from_secs(30);
/// A CNI's installer writes several files in a row.
const SETTLE: Duration = Duration::from_millis(50);
/// So many times that we had to put something back, each within [`CALM`] of the one before, are a fight with somebody who
/// does the same. It is told once, and from then on each turn of ours comes twice as late as the one before.
const FIGHT: u32 = 5;
const CALM: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
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

/// Whether a look has changed anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrote {
    Something,
    Nothing,
}

/// Installs binary and configuration; without a main CNI there is nothing to configure yet.
///
/// # Errors
/// With the path that could not be read or written, or the configuration that cannot take a plugin.
pub fn install(directories: &Directories, entry: &Value) -> anyhow::Result<()> {
    copy_program(&directories.bin)?;
    report(&ensure(&directories.conf, entry, Existing::Refresh)?.0);
    Ok(())
}

/// Installs, and then looks after the configuration until the drain begins. It stays installed.
pub async fn run(directories: Directories, entry: Value, drain: DrainWatcher) {
    let mut last = String::new();
    let mut existing = Existing::Refresh;
    let mut fight = Fight::default();
    let mut program = copy_program(&directories.bin);
    loop {
        // First the watch: what changes after the look wakes us.
        let watch = watch(&directories);
        let mut wrote = Wrote::Nothing;
        // A configuration that names a program which is not there keeps every pod of the node from starting, our own too.
        if program.is_err() || !directories.bin.join(NAME).exists() {
            program = copy_program(&directories.bin);
            wrote = if program.is_ok() { Wrote::Something } else { Wrote::Nothing };
        }
        let looked = match &program {
            Ok(()) => ensure(&directories.conf, &entry, existing),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        let said = match &looked {
            Ok((found, in_conf)) => {
                existing = Existing::Keep;
                if *in_conf == Wrote::Something {
                    wrote = Wrote::Something;
                }
                format!("{found:?}")
            }
            Err(error) => format!("{error:#}"),
        };
        if said != last {
            match &looked {
                Ok((found, _)) => report(found),
                Err(error) => tracing::warn!(error = format!("{error:#}"), "installing the CNI plugin"),
            }
            last = said;
        }
        let mut pause = SETTLE;
        if wrote == Wrote::Something {
            metrics::counter!("ztunnel_cni_installs_total").increment(1);
            pause = fight.wrote(Instant::now());
            if fight.has_just_begun() {
                let file = if let Ok((Found::In(file), _)) = &looked { file } else { NAME };
                tracing::warn!(file, "something takes the CNI plugin out again and again; it comes back ever later");
            }
        }
        tokio::select! {
            () = changed(watch) => {}
            () = tokio::time::sleep(LOOK_ANYWAY) => {}
            () = drain.draining() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = drain.draining() => return,
        }
    }
}

/// Tells a fight from a main CNI that is being installed, and ends it by patience: two that both write at once whenever
/// the other has written would do nothing else.
#[derive(Default)]
struct Fight {
    writes: u32,
    last: Option<Instant>,
}

impl Fight {
    /// Something was written at this moment; returns how long the next look has to wait.
    fn wrote(&mut self, now: Instant) -> Duration {
        let calm = CALM + self.pause();
        if self.last.is_none_or(|last| now - last > calm) {
            self.writes = 0;
        }
        self.last = Some(now);
        self.writes = self.writes.saturating_add(1);
        self.pause()
    }

    const fn has_just_begun(&self) -> bool {
        self.writes == FIGHT
    }

    fn pause(&self) -> Duration {
        let doublings = (self.writes + 1).saturating_sub(FIGHT).min(u32::BITS - 1);
        SETTLE.saturating_mul(1 << doublings).min(LONGEST_PAUSE)
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
/// was made of it. Where the owner has put another list in that one's place, the owner has moved on: the list stays,
/// and what was saved is of no use.
fn restore(saved: &Path) -> io::Result<()> {
    let name = saved.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = name.strip_suffix(SAVED).unwrap_or(&name).to_owned();
    let (original, list) = (saved.with_file_name(&name), saved.with_file_name(conflist::list_name(&name)));
    let is_ours = match read(&list) {
        Ok(text) => conflist::is_made_of(&text, &read(saved)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(error),
    };
    if !is_ours || original.exists() {
        fs::remove_file(saved)?;
    } else {
        // Before the list goes: at no moment is the node without a configuration.
        fs::rename(saved, &original)?;
    }
    if !is_ours {
        return Ok(());
    }
    match fs::remove_file(list) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// One look: the configuration that runtimes take has our plugin afterwards.
fn ensure(conf: &Path, entry: &Value, existing: Existing) -> anyhow::Result<(Found, Wrote)> {
    let in_file = |path: &Path, error: &dyn std::fmt::Display| anyhow::anyhow!("{}: {error}", path.display());
    let names = names(conf).map_err(|error| in_file(conf, &error))?;
    let Some(name) = conflist::in_order(names).into_iter().next() else { return Ok((Found::NoConf, Wrote::Nothing)) };
    let path = conf.join(&name);
    let text = read(&path).map_err(|error| in_file(&path, &error))?;
    match conflist::add(&text, entry, existing == Existing::Refresh).map_err(|error| in_file(&path, &error))? {
        Edit::Nothing => Ok((Found::In(name), Wrote::Nothing)),
        Edit::Rewrite(text) => {
            replace(&path, text.as_bytes(), mode(&path)).map_err(|error| in_file(&path, &error))?;
            Ok((Found::In(name), Wrote::Something))
        }
        Edit::Replace { list } => {
            let target = conflist::list_name(&name);
            let (list_path, saved) = (conf.join(&target), conf.join(format!("{name}{SAVED}")));
            let is_free = may_be_written(&list_path, &text, &saved).map_err(|error| in_file(&list_path, &error))?;
            anyhow::ensure!(
                is_free,
                "{}: the list that the plugin would have to be in, {target}, is there already and not ours; as runtimes \
                 take {name} first, remove one of the two",
                path.display()
            );
            // The list first: at no moment is the node without a configuration.
            replace(&list_path, list.as_bytes(), mode(&path)).map_err(|error| in_file(&path, &error))?;
            fs::rename(&path, saved).map_err(|error| in_file(&path, &error))?;
            Ok((Found::In(target), Wrote::Something))
        }
    }
}

/// Is there no such list, or one that we have made: of what was saved, or of `single`, where we were ended before that
/// was saved?
fn may_be_written(list: &Path, single: &str, saved: &Path) -> io::Result<bool> {
    let text = match read(list) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        read => read?,
    };
    let made_of = |single: &str| conflist::is_made_of(&text, single);
    Ok(conflist::remove(&text).is_some() && (made_of(single) || read(saved).is_ok_and(|saved| made_of(&saved))))
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
