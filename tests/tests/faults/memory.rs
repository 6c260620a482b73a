//! What fills a proxy's memory, and what limits it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_tests::raw::{Pod, Process};
use mesh_tests::{sys, wait};

use crate::world::SETTLE;

/// What a hundred connections with readers that stall may take: what a tunnel may have waiting for its connection, 512 KiB
/// each, at the sender's; two connections' windows of 16 MiB at the reader's; and buffers beside.
pub const BOUND_KIB: u64 = 96 << 10;
const PORT: u16 = 9000;
/// Takes connections and never reads.
const DEAF: &str = r"import socket, sys
s = socket.socket(socket.AF_INET6)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('::', int(sys.argv[1])))
s.listen(512)
kept = []
while True:
    kept.append(s.accept()[0])
";
/// Writes to so many connections until none of them has taken anything for two seconds, and keeps them.
const FILL: &str = r"import selectors, socket, sys, time
to, sent, data = (sys.argv[1], int(sys.argv[2])), 0, bytes(65536)
def lost():
    print('lost', flush=True)
    sys.exit()
all = selectors.DefaultSelector()
for n in range(int(sys.argv[3])):
    s = socket.create_connection(to)
    s.setblocking(False)
    all.register(s, selectors.EVENT_WRITE)
last = time.monotonic()
while time.monotonic() - last < 2:
    for key, _ in all.select(0.5):
        try:
            sent += key.fileobj.send(data)
            last = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            lost()
print('stalled after', sent, flush=True)
for key in list(all.get_map().values()):
    all.modify(key.fileobj, selectors.EVENT_READ)
all.select()
lost()
";

/// A server that takes connections and reads none of them.
pub struct Deaf {
    to: String,
    _process: Process,
}

impl Deaf {
    pub fn listen(pod: &Pod) -> Result<Self> {
        let mut process = pod.spawn("deaf", &["python3", "-c", DEAF, &PORT.to_string()], &[])?;
        process.wait_listening(PORT)?;
        Ok(Self { to: pod.net.ipv4.to_string(), _process: process })
    }

    /// Fills so many connections to it; they stay open.
    pub fn fill(&self, client: &Pod, round: usize, connections: usize) -> Result<Process> {
        let mut senders = self.senders(client, &format!("fill-{round}"), connections)?;
        senders.wait_output("stalled", SETTLE * 2)?;
        Ok(senders)
    }

    /// The same, and not all of them may get so far.
    pub fn fill_until_ended(&self, client: &Pod) -> Result<Process> {
        self.senders(client, "fill", 100)
    }

    fn senders(&self, client: &Pod, name: &str, connections: usize) -> Result<Process> {
        let argv = ["python3", "-c", FILL, &self.to, &PORT.to_string(), &connections.to_string()];
        client.spawn(name, &argv, &[])
    }
}

/// A limit around one process. Dropping it takes the cgroup away.
pub struct Limited {
    cgroup: PathBuf,
    events: (&'static str, &'static str),
}

impl Limited {
    /// Puts a process under a limit, whichever hierarchy has the controller.
    pub fn around(pid: u32, name: &str, kib: u64) -> Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (root, limit, events) = if v1.join("memory.limit_in_bytes").exists() {
            (v1.to_owned(), "memory.limit_in_bytes", ("memory.oom_control", "oom_kill "))
        } else {
            let root = sys::cgroup2_root()?;
            fs::write(root.join("cgroup.subtree_control"), "+memory").context("no memory controller")?;
            (root, "memory.max", ("memory.events", "oom_kill "))
        };
        let cgroup = root.join(format!("mesh-lab-limit-{name}"));
        fs::create_dir(&cgroup)?;
        let limited = Self { cgroup, events };
        fs::write(limited.cgroup.join(limit), (kib << 10).to_string())?;
        // Nothing may escape into swap.
        let swap = ["memory.memsw.limit_in_bytes", "memory.swap.max"];
        for file in swap.iter().map(|file| limited.cgroup.join(file)).filter(|file| file.exists()) {
            let most = if file.ends_with("memory.swap.max") { 0 } else { kib << 10 };
            fs::write(file, most.to_string())?;
        }
        fs::write(limited.cgroup.join("cgroup.procs"), pid.to_string())?;
        Ok(limited)
    }

    /// How often the kernel has killed something in it.
    pub fn kills(&self) -> Result<u64> {
        let (file, name) = self.events;
        let text = fs::read_to_string(self.cgroup.join(file))?;
        let count = text.lines().find_map(|line| line.strip_prefix(name)).context("no count of kills")?;
        Ok(count.trim().parse()?)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let gone = wait::until("a cgroup to be empty", Duration::from_secs(5), || match fs::remove_dir(&self.cgroup) {
            Ok(()) => Ok(()),
            Err(error) => bail!("{error}"),
        });
        if let Err(error) = gone {
            eprintln!("{}: {error:#}", self.cgroup.display());
        }
    }
}
