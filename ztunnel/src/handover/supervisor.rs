//! The first process of the container, where a draining ztunnel may outlive it.
//!
//! A runtime kills what is left of a container once its first process has ended, and the first process itself when the
//! grace period is over. So the first process is this one: it does nothing but start ztunnel, pass signals on and end as
//! ztunnel ends, or at once when ztunnel says that it has left the container. It is the same program started anew, so it
//! has no thread, no runtime and no unsafe fork; what it costs is a few hundred KiB.
//!
//! Until then the two live and die together: a supervisor that is killed takes ztunnel along.

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, dup2_stdin, getppid};

/// Tells ztunnel who its supervisor is.
pub const SUPERVISOR: &str = "ZTUNNEL_SUPERVISOR";

/// What ztunnel says when it has left the container.
const DETACHED: u8 = b'd';

/// Those that people and runtimes send.
const PASSED_ON: [Signal; 5] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1];

/// Runs ztunnel and ends as it ends. Must be called before there is a second thread.
#[must_use]
pub fn run() -> ExitCode {
    match supervise() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("ztunnel: supervising: {error}");
            ExitCode::FAILURE
        }
    }
}

fn supervise() -> io::Result<u8> {
    let mut handled = SigSet::from_iter(PASSED_ON);
    handled.add(Signal::SIGCHLD);
    // Before there is a child: what arrives from now on waits to be read.
    handled.thread_block()?;
    let signals = SignalFd::with_flags(&handled, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let (line, theirs) = UnixStream::pair()?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("ztunnel")
        .args(env::args_os().skip(1))
        .env(SUPERVISOR, std::process::id().to_string())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let pid = Pid::from_raw(child.id().try_into().map_err(io::Error::other)?);
    let mut listening = true;
    loop {
        let mut both = [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(line.as_fd(), PollFlags::POLLIN)];
        let watched = if listening { &mut both[..] } else { &mut both[..1] };
        match poll(watched, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if listening && both[1].any().unwrap_or(false) {
            let mut word = [0];
            match (&line).read(&mut word) {
                Ok(1..) if word[0] == DETACHED => return Ok(0),
                Ok(1..) => {}
                // It has closed its end; that it has ended comes as a signal.
                Ok(0) | Err(_) => listening = false,
            }
        }
        while let Some(signal) = signals.read_signal()? {
            match Signal::try_from(i32::try_from(signal.ssi_signo).unwrap_or(0)) {
                Ok(Signal::SIGCHLD) | Err(_) => {}
                Ok(signal) => {
                    // It may have ended just now.
                    let _ = kill(pid, signal);
                }
            }
        }
        if let Some(status) = child.try_wait()? {
            return Ok(mirrored(status));
        }
    }
}

/// As a shell tells it.
fn mirrored(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// What ties ztunnel to its supervisor.
#[derive(Debug)]
pub struct Leash {
    line: UnixStream,
}

impl Leash {
    /// Ties this process to its supervisor. Must be called before there is a second thread.
    ///
    /// # Errors
    /// When `supervisor` is not this process' parent (any more).
    pub fn tie(supervisor: u32) -> io::Result<Self> {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // It may have died before that.
        if u32::try_from(getppid().as_raw()).ok() != Some(supervisor) {
            return Err(io::Error::other(format!("process {supervisor} is not our supervisor")));
        }
        // Whoever starts a process hands down what it blocks.
        SigSet::all().thread_unblock()?;
        let line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        dup2_stdin(File::open("/dev/null")?)?;
        Ok(Self { line })
    }

    /// Stops the supervisor's end from being ours. It still waits for us.
    ///
    /// # Errors
    /// That of `prctl`.
    pub fn loosen(&self) -> io::Result<()> {
        Ok(prctl::set_pdeathsig(None)?)
    }

    /// Lets the supervisor end, and with it the container.
    ///
    /// # Errors
    /// When it is gone.
    pub fn release(mut self) -> io::Result<()> {
        self.line.write_all(&[DETACHED])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_supervisor_ends_as_ztunnel_ended() {
        assert_eq!(mirrored(ExitStatus::from_raw(0)), 0);
        assert_eq!(mirrored(ExitStatus::from_raw(2 << 8)), 2);
        assert_eq!(mirrored(ExitStatus::from_raw(9)), 137);
    }

    #[test]
    fn nobody_is_tied_to_a_stranger() {
        // On a thread of its own: what it sets is the thread's, and no parent of ours is process 0.
        let tied = std::thread::spawn(|| Leash::tie(0).map(drop)).join().unwrap();
        assert!(tied.is_err());
    }
}
