//! What a draining ztunnel gives up: capabilities, and every system call that open connections do not need.
//!
//! It can go on moving bytes between sockets it has, take connections of its one control socket, measure time, allocate
//! memory and end. It can make no socket, connect none, open no file, enter no namespace, run no program, touch no other
//! process and load nothing into the kernel. The filter is a list of what is allowed; everything else fails with EPERM,
//! which the code meets as an ordinary error. A process killed by its filter would cut all its connections because one
//! library asked for something new.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::thread::{CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

/// Allowed whatever the arguments.
const FREE: &[libc::c_long] = &[
    // Bytes.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_lseek,
    // From socket to socket by way of a pipe.
    libc::SYS_pipe2,
    libc::SYS_splice,
    // Waiting.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Signals, threads, the end.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_geteuid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getrandom,
    // Is there an uninstall marker?
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
];

/// The same under the names that only older architectures have.
#[cfg(target_arch = "x86_64")]
const FREE_HERE: &[libc::c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_time,
    libc::SYS_stat,
    // Its own cgroup, at the end. Of a directory with anything in it the kernel lets nobody take it away.
    libc::SYS_rmdir,
];
#[cfg(not(target_arch = "x86_64"))]
const FREE_HERE: &[libc::c_long] = &[];

/// Gives up all capabilities of the calling thread.
///
/// # Errors
/// Those of the kernel; there is no reason for one.
pub fn drop_capabilities() -> io::Result<()> {
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

/// Has no thread of this process any capability left?
///
/// # Errors
/// When `/proc` cannot be read.
pub fn is_powerless() -> io::Result<bool> {
    for task in fs::read_dir("/proc/self/task")? {
        // One that has just ended has none.
        let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        let powerful = |line: &str| {
            let set = line.strip_prefix("CapEff:").or_else(|| line.strip_prefix("CapPrm:"));
            set.is_some_and(|set| set.trim().bytes().any(|digit| digit != b'0'))
        };
        if status.lines().any(powerful) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Puts the filter on every thread of the process, for good.
///
/// # Errors
/// When the kernel has no seccomp, or a thread has a filter that the others have not.
pub fn seal(control: BorrowedFd<'_>) -> io::Result<()> {
    let filter = filter(control.as_raw_fd(), std::process::id()).map_err(io::Error::other)?;
    apply_filter_all_threads(&filter).map_err(io::Error::other)
}

/// The filter, for a process `pid` whose control socket listens on `control`.
fn filter(control: i32, pid: u32) -> Result<BpfProgram, seccompiler::BackendError> {
    let unsigned = |value: libc::c_int| u64::from(value.cast_unsigned());
    let is = |argument, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let lacks = |argument, flags: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(flags), 0)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in FREE.iter().chain(FREE_HERE) {
        rules.insert(*call, Vec::new());
    }
    rules.insert(libc::SYS_accept4, vec![is(0, unsigned(control))?]);
    // Fast open connects: a socket that was connected once could be used to go elsewhere.
    rules.insert(libc::SYS_sendto, vec![lacks(3, unsigned(libc::MSG_FASTOPEN))?]);
    rules.insert(libc::SYS_sendmsg, vec![lacks(2, unsigned(libc::MSG_FASTOPEN))?]);
    // A descriptor can be told to send signals to any process of the node, for which root needs no capability.
    let two = |first, second| SeccompRule::new(vec![first, second]);
    let equals = |argument, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    let without =
        |argument, flags| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(flags), 0);
    rules.insert(
        libc::SYS_fcntl,
        vec![
            is(1, unsigned(libc::F_GETFD))?,
            is(1, unsigned(libc::F_SETFD))?,
            is(1, unsigned(libc::F_GETFL))?,
            is(1, unsigned(libc::F_DUPFD_CLOEXEC))?,
            two(equals(1, unsigned(libc::F_SETFL))?, without(2, unsigned(libc::O_ASYNC))?)?,
        ],
    );
    // No new code.
    rules.insert(libc::SYS_mmap, vec![lacks(2, unsigned(libc::PROT_EXEC))?]);
    rules.insert(libc::SYS_mprotect, vec![lacks(2, unsigned(libc::PROT_EXEC))?]);
    // To abort.
    rules.insert(libc::SYS_tgkill, vec![is(0, u64::from(pid))?]);
    #[cfg(not(target_arch = "x86_64"))]
    rules.insert(libc::SYS_unlinkat, vec![is(2, unsigned(libc::AT_REMOVEDIR))?]);
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use nix::fcntl::{SpliceFFlags, splice};

    use super::*;

    fn refused<T>(what: &str, tried: io::Result<T>) {
        let error = tried.err().unwrap_or_else(|| panic!("{what} was allowed"));
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{what}: {error}");
    }

    /// Has the kernel send signals about a socket to process 1.
    fn ask_for_signals(socket: &TcpStream) -> io::Result<()> {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        fcntl(socket, FcntlArg::F_GETFL)?;
        Ok(fcntl(socket, FcntlArg::F_SETFL(OFlag::O_ASYNC)).map(drop)?)
    }

    #[test]
    fn a_sealed_thread_goes_on_with_what_it_has_and_gets_nothing_new() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let control = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let mut near = TcpStream::connect(address).unwrap();
        let (mut far, _) = tcp.accept().unwrap();
        let mut successor = UnixStream::connect(&path).unwrap();
        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        let own = dir.path().join("own");
        std::fs::write(&own, "x").unwrap();
        let netns = File::open("/proc/self/ns/net").unwrap();
        let unbound = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();

        // Only this thread: the filter of one test must not be every other's.
        std::thread::spawn(move || {
            drop_capabilities().unwrap();
            let program = filter(control.as_raw_fd(), std::process::id()).unwrap();
            seccompiler::apply_filter(&program).unwrap();

            near.write_all(b"on").unwrap();
            let mut word = [0; 2];
            far.read_exact(&mut word).unwrap();
            let (out, into) = std::io::pipe().unwrap();
            near.write_all(b"by").unwrap();
            let none = SpliceFFlags::empty();
            assert_eq!(splice(&far, None, &into, None, 2, none), Ok(2));
            assert_eq!(splice(&out, None, &far, None, 2, none), Ok(2));
            near.read_exact(&mut word).unwrap();
            assert_eq!(&word, b"by", "as large transfers go");
            far.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(near.read(&mut word).unwrap(), 0, "half-closed");
            let (mut taken, _) = control.accept().unwrap();
            taken.write_all(b"ok").unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
            let mut much = Vec::new();
            much.resize(64 << 20, 1u8);
            drop(much);
            assert!(own.exists());

            refused("socket", TcpStream::connect(address).map(drop));
            refused("socket", UdpSocket::bind("127.0.0.1:0").map(drop));
            refused("socket", UnixStream::connect(&path).map(drop));
            refused("socketpair", UnixStream::pair().map(drop));
            refused("connect", unbound.connect(&address.into()));
            refused("bind", unbound.bind(&address.into()));
            refused("listen", unbound.listen(1));
            let fast = unbound.send_to_with_flags(b"x", &address.into(), libc::MSG_FASTOPEN);
            refused("fast open", fast.map(drop));
            refused("accept elsewhere", tcp.accept().map(drop));
            refused("open to read", File::open(&own).map(drop));
            refused("open to write", File::create(&own).map(drop));
            refused("unlink", std::fs::remove_file(&own));
            refused("mkdir", std::fs::create_dir(own.with_extension("d")));
            std::fs::remove_dir(&empty).unwrap();
            let entered = nix::sched::setns(netns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET);
            refused("setns", entered.map_err(io::Error::from));
            let killed = nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), None);
            refused("kill", killed.map_err(io::Error::from));
            let owned = ask_for_signals(&near);
            refused("a signal by descriptor", owned);
            refused("exec", std::process::Command::new("/bin/true").status().map(drop));
            refused("a thread", std::thread::Builder::new().spawn(|| {}).map(drop));
        })
        .join()
        .unwrap();
        let mut word = [0; 2];
        successor.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"ok");
    }
}
