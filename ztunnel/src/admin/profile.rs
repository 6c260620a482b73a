//! CPU profiles of the running process, for `go tool pprof` and its like.
//!
//! The kernel sends SIGPROF as CPU time is spent, and the handler notes the stack of the thread it interrupts. A node's
//! connections depend on that handler, so it must not wait or allocate: stacks are unwound by tables that were read before
//! (no lock of the loader's), and memory is tried before it is read. The tables themselves are read at the first sample;
//! [`warm_up`] sees to it that this is one at which the interrupted thread cannot be in the allocator. System calls that the signal
//! interrupts are started again by the kernel, or by whoever made them. Between profiles there is neither timer nor cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use http::{HeaderValue, Method, StatusCode, header};
use mesh::serve::{AdminRequest, AdminResponse, AdminServer, gzip, text};
use pprof::protos::Message;
use pprof::{ProfilerGuard, ProfilerGuardBuilder};
use tokio::sync::Semaphore;

const SECONDS: Limits = Limits { name: "seconds", least: 1, most: 300, usual: 10 };
/// Samples per second of CPU time.
const FREQUENCY: Limits = Limits { name: "frequency", least: 1, most: 1000, usual: 100 };

/// Where a thread may hold a lock that reading the tables wants as well.
const LOCKING: [&str; 4] = ["libc.so", "libc-", "ld-linux", "libgcc"];
const WARM_UP: Duration = Duration::from_secs(2);

const NO_HEAP: &str = "no heap profile: this build uses the C library's allocator, which keeps none. Memory of the process \
    and what it is for: /proc/PID/smaps_rollup; leaks: valgrind or heaptrack on a test machine.\n";

/// A number in the query.
struct Limits {
    name: &'static str,
    least: u32,
    most: u32,
    usual: u32,
}

impl Limits {
    fn read(&self, request: &AdminRequest) -> Result<u32, String> {
        let Some(value) = request.param(self.name) else { return Ok(self.usual) };
        let Self { name, least, most, .. } = self;
        let number = value.parse().ok().filter(|n| (*least..=*most).contains(n));
        number.ok_or_else(|| format!("{name}={value}: it is a number from {least} to {most}\n"))
    }
}

/// Adds `/debug/pprof/` to the server.
#[must_use]
pub fn routes(server: AdminServer) -> AdminServer {
    // The timer and its signal are the process's.
    let one = Arc::new(Semaphore::new(1));
    let profile = move |request| profile(one.clone(), request);
    let heap = |_| async { text(StatusCode::NOT_IMPLEMENTED, NO_HEAP) };
    server
        .route(Method::GET, "/debug/pprof/profile", profile)
        .route(Method::GET, "/debug/pprof/heap", heap)
        .route(Method::GET, "/debug/pprof/heap/profiling", heap)
        .route(Method::POST, "/debug/pprof/heap/profiling", heap)
}

async fn profile(one: Arc<Semaphore>, request: AdminRequest) -> AdminResponse {
    let (seconds, frequency) = match (SECONDS.read(&request), FREQUENCY.read(&request)) {
        (Ok(seconds), Ok(frequency)) => (seconds, frequency),
        (Err(mistake), _) | (_, Err(mistake)) => return text(StatusCode::BAD_REQUEST, mistake),
    };
    // The unwinder takes the return address for the program counter there.
    if cfg!(target_arch = "aarch64") {
        return text(StatusCode::NOT_IMPLEMENTED, "no CPU profile: stacks are not read right on this architecture\n");
    }
    if let Err(error) = try_scratch() {
        let directory = std::env::temp_dir();
        let said =
            format!("a profile needs a directory for temporary files (TMPDIR): {}: {error}\n", directory.display());
        return text(StatusCode::INTERNAL_SERVER_ERROR, said);
    }
    let Ok(_only) = one.try_acquire() else {
        return text(StatusCode::CONFLICT, "a profile is being taken; one at a time\n");
    };
    match take(Duration::from_secs(seconds.into()), frequency).await {
        Ok(profile) => {
            let mut response = text(StatusCode::OK, gzip(&profile));
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            let name = HeaderValue::from_static("attachment; filename=\"profile.pb.gz\"");
            headers.insert(header::CONTENT_DISPOSITION, name);
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")),
    }
}

/// Asked before the profiler is, which never tries again.
fn try_scratch() -> std::io::Result<()> {
    let path = std::env::temp_dir().join(format!("ztunnel-profile-{}", std::process::id()));
    std::fs::OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
    std::fs::remove_file(path)
}

/// A profile as protobuf. Whoever stops waiting stops the timer.
async fn take(length: Duration, frequency: u32) -> anyhow::Result<Vec<u8>> {
    tokio::task::spawn_blocking(warm_up).await.context("preparing")??;
    let guard = start(ProfilerGuardBuilder::default(), frequency)?;
    tokio::time::sleep(length).await;
    // Names of functions are found by reading the program's file, which takes a while.
    tokio::task::spawn_blocking(move || {
        let report = guard.report().build().context("reading the samples")?;
        drop(guard);
        let profile = report.pprof().context("writing the profile")?;
        profile.write_to_bytes().context("writing the profile")
    })
    .await
    .context("reading the samples")?
}

fn start(builder: ProfilerGuardBuilder, frequency: u32) -> anyhow::Result<ProfilerGuard<'static>> {
    // The samples are kept in a file once they are many.
    let build = builder.frequency(frequency.try_into().context("frequency")?).build();
    build.context("starting the profiler (it needs a directory for temporary files)")
}

/// Takes one sample that is not of the C library. See the head of this file.
fn warm_up() -> anyhow::Result<()> {
    let guard = start(ProfilerGuardBuilder::default().blocklist(&LOCKING), FREQUENCY.most)?;
    let begin = Instant::now();
    while guard.report().build_unresolved().context("reading the first sample")?.data.is_empty() {
        anyhow::ensure!(begin.elapsed() < WARM_UP, "no sample was taken within {} s", WARM_UP.as_secs());
        (0..1_000_000u32).for_each(|n| {
            std::hint::black_box(n);
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use http::HeaderMap;

    use super::*;

    fn request(query: &str) -> AdminRequest {
        let (headers, path) = (HeaderMap::new(), "/debug/pprof/profile".to_owned());
        AdminRequest { method: Method::GET, path, query: Some(query.into()), headers, body: Default::default() }
    }

    #[inline(never)]
    fn a_busy_function(over: &AtomicBool) -> u64 {
        let mut sum = 0u64;
        while !over.load(Ordering::Relaxed) {
            sum = (0..10_000u64).fold(sum, |sum, n| std::hint::black_box(sum.wrapping_add(n)));
        }
        sum
    }

    #[tokio::test]
    async fn a_profile_names_the_function_that_was_busy() {
        static OVER: AtomicBool = AtomicBool::new(false);
        let busy = std::thread::spawn(|| a_busy_function(&OVER));
        // The signals go to whoever runs, and the other tests may leave it little to run.
        let mut named = false;
        for _ in 0..20 {
            let profile = take(Duration::from_secs(1), 200).await.expect("a profile");
            let profile = pprof::protos::Profile::parse_from_bytes(&profile).expect("protobuf");
            named =
                !profile.sample.is_empty() && profile.string_table.iter().any(|name| name.contains("a_busy_function"));
            if named {
                break;
            }
        }
        OVER.store(true, Ordering::Relaxed);
        busy.join().expect("it ends");
        assert!(named, "not in twenty profiles");
    }

    #[tokio::test]
    async fn one_at_a_time_and_within_limits() {
        for query in ["seconds=0", "seconds=301", "frequency=0", "frequency=1001", "seconds=x", "seconds="] {
            let answer = profile(Arc::new(Semaphore::new(1)), request(query)).await;
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{query}");
        }
        let taken = Arc::new(Semaphore::new(0));
        assert_eq!(profile(taken, request("seconds=1")).await.status(), StatusCode::CONFLICT);
    }
}
