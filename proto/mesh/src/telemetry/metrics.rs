//! The metric registry of the process, and byte counts of connections that are still open.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use metrics::Counter;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::exposition::{Exposition, Family, open_metrics};
use super::process::process;

/// Upper bounds of every histogram, as Envoy has them; durations are in milliseconds.
const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// DNS is asked of servers nearby and answered in a packet: finer, and in seconds as Istio has it.
const DNS_DURATION: &str = "istio_dns_upstream_request_duration_seconds";
const DNS_BUCKETS: [f64; 6] = [0.000_5, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Looks at something when metrics are asked for, and at no other time.
type Collector = Box<dyn Fn() -> Vec<Family> + Send + Sync>;

/// The registry of this process, as text.
#[derive(Clone)]
pub struct MetricsHandle {
    registry: PrometheusHandle,
    collectors: Arc<Mutex<Vec<Collector>>>,
}

impl MetricsHandle {
    /// What was counted, in the Prometheus text format, without what collectors find. Bytes of open connections are
    /// counted up to now.
    pub fn render(&self) -> String {
        OPEN.flush();
        self.registry.run_upkeep();
        self.registry.render()
    }

    /// All there is, for a scraper.
    pub fn expose(&self, format: Exposition) -> String {
        let mut text = self.render();
        for collect in &*self.collectors() {
            collect().iter().for_each(|family| family.write(&mut text));
        }
        match format {
            Exposition::Text => text,
            Exposition::OpenMetrics => open_metrics(&text),
        }
    }

    /// Adds what `collect` finds at each scrape. It stays for the life of the process.
    pub fn collect(&self, collect: impl Fn() -> Vec<Family> + Send + Sync + 'static) {
        self.collectors().push(Box::new(collect));
    }

    fn collectors(&self) -> std::sync::MutexGuard<'_, Vec<Collector>> {
        self.collectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registry, installed at the first call. Metrics recorded before that are lost.
pub fn metrics_handle() -> MetricsHandle {
    static HANDLE: OnceLock<MetricsHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let recorder = PrometheusBuilder::new()
                .set_buckets(&BUCKETS)
                .and_then(|b| b.set_buckets_for_metric(Matcher::Full(DNS_DURATION.into()), &DNS_BUCKETS))
                .expect("the lists of buckets are not empty")
                .build_recorder();
            let registry = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::error!("another metrics recorder is installed; metrics of the mesh will be missing");
            }
            MetricsHandle { registry, collectors: Arc::new(Mutex::new(vec![Box::new(process) as Collector])) }
        })
        .clone()
}

/// Sets `istio_build`, by which dashboards tell versions apart.
pub fn record_build(component: &str, tag: &str) {
    metrics::gauge!("istio_build", "component" => component.to_owned(), "tag" => tag.to_owned()).set(1.0);
}

/// Bytes of one connection, seen from downstream, written by the copy loop and read by whoever wants to know.
#[derive(Default, Debug)]
pub struct ByteCounts {
    received: AtomicU64,
    sent: AtomicU64,
}

impl ByteCounts {
    /// Bytes read from downstream.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes written to downstream.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// The byte metrics of one open connection.
pub(super) struct OpenBytes {
    pub(super) counts: Arc<ByteCounts>,
    received: Counter,
    sent: Counter,
    /// What the metrics already hold.
    counted: Mutex<(u64, u64)>,
}

impl OpenBytes {
    fn flush(&self) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.counts.received(), self.counts.sent());
        self.received.increment(now.0 - counted.0);
        self.sent.increment(now.1 - counted.1);
        *counted = now;
    }
}

/// Open connections, so that a long-lived one shows its bytes before it ends. Sharded by thread: a connection is opened
/// and closed by one thread, and only rendering meets the others.
pub(super) struct Open {
    shards: [Mutex<HashMap<u64, Arc<OpenBytes>>>; SHARDS],
    next: AtomicU64,
}

const SHARDS: usize = 16;

pub(super) static OPEN: std::sync::LazyLock<Open> =
    std::sync::LazyLock::new(|| Open { shards: Default::default(), next: AtomicU64::new(0) });

thread_local! {
    static SHARD: usize = {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        (NEXT.fetch_add(1, Ordering::Relaxed) as usize) % SHARDS
    };
}

/// Keeps a connection among the open ones; its last bytes are counted when this is dropped.
pub(super) struct OpenEntry {
    shard: usize,
    key: u64,
    pub(super) bytes: Arc<OpenBytes>,
}

impl Open {
    pub(super) fn add(&self, received: Counter, sent: Counter) -> OpenEntry {
        let shard = SHARD.with(|shard| *shard);
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let bytes = Arc::new(OpenBytes { counts: Arc::default(), received, sent, counted: Mutex::default() });
        self.shard(shard).insert(key, bytes.clone());
        OpenEntry { shard, key, bytes }
    }

    fn shard(&self, index: usize) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<OpenBytes>>> {
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) {
        for index in 0..SHARDS {
            // Copied out, so that opening and closing never wait for the flush.
            let open: Vec<_> = self.shard(index).values().cloned().collect();
            open.iter().for_each(|bytes| bytes.flush());
        }
    }
}

impl Drop for OpenEntry {
    fn drop(&mut self) {
        OPEN.shard(self.shard).remove(&self.key);
        self.bytes.flush();
    }
}
