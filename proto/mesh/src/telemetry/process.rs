//! The process itself as metrics: its descriptors, and what the runtimes are busy with.

use std::fs;

use tokio::runtime::{Handle, RuntimeMetrics};

use super::{Family, Kind, metrics::metrics_handle};

/// Descriptors in use and allowed. What `/proc` does not tell (a draining process may open no file) is left out.
pub(super) fn process() -> Vec<Family> {
    let gauge = |name, value: Option<f64>| value.map(|value| Family::new(name, Kind::Gauge).value(value));
    // One of them is the directory that is being read.
    let open = fs::read_dir("/proc/self/fd").ok().map(|fds| fds.count().saturating_sub(1) as f64);
    let most = fs::read_to_string("/proc/self/limits").ok().and_then(|limits| soft_limit(&limits));
    [gauge("process_open_fds", open), gauge("process_max_fds", most)].into_iter().flatten().collect()
}

/// `Max open files   1024   4096   files`
fn soft_limit(limits: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(f64::INFINITY),
        number => number.parse().ok(),
    }
}

/// Shows tokio's own figures of these runtimes: counters for each of their threads under the label `worker`, which is the
/// runtime's name, with the thread's number where it has several; the rest for all runtimes together.
pub fn watch_runtimes(runtimes: Vec<(String, Handle)>) {
    metrics_handle().collect(move || runtime_families(&runtimes));
}

fn runtime_families(runtimes: &[(String, Handle)]) -> Vec<Family> {
    let runtimes: Vec<(&str, RuntimeMetrics)> = runtimes.iter().map(|(name, of)| (&**name, of.metrics())).collect();
    let sum = |name, of: fn(&RuntimeMetrics) -> usize| {
        Family::new(name, Kind::Gauge).value(runtimes.iter().map(|(_, metrics)| of(metrics)).sum::<usize>() as f64)
    };
    let each = |name, of: fn(&RuntimeMetrics, usize) -> f64| {
        let mut family = Family::new(name, Kind::Counter);
        for (runtime, metrics) in &runtimes {
            let threads = metrics.num_workers();
            for n in 0..threads {
                let label = if threads == 1 { (*runtime).to_owned() } else { format!("{runtime}-{n}") };
                family = family.labelled("worker", label, of(metrics, n));
            }
        }
        family
    };
    vec![
        sum("tokio_num_workers", RuntimeMetrics::num_workers),
        sum("tokio_global_queue_depth", RuntimeMetrics::global_queue_depth),
        sum("tokio_num_alive_tasks", RuntimeMetrics::num_alive_tasks),
        each("tokio_worker_total_busy_duration_seconds_total", |m, n| m.worker_total_busy_duration(n).as_secs_f64()),
        each("tokio_worker_park_count_total", |m, n| m.worker_park_count(n) as f64),
        each("tokio_worker_park_unpark_count_total", |m, n| m.worker_park_unpark_count(n) as f64),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_counted() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 4096                 files\n";
        assert_eq!(soft_limit(limits), Some(1024.0));
        let mut text = String::new();
        process().iter().for_each(|family| family.write(&mut text));
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).expect("it is there");
            line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
        };
        assert!(value("process_open_fds") >= 3.0 && value("process_max_fds") >= value("process_open_fds"), "{text}");
    }

    #[test]
    fn every_thread_of_every_runtime_has_its_counters() {
        let one = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let two = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("a runtime");
        one.block_on(tokio::task::yield_now());
        let families =
            runtime_families(&[("0".into(), one.handle().clone()), ("control".into(), two.handle().clone())]);
        let mut text = String::new();
        families.iter().for_each(|family| family.write(&mut text));
        assert!(text.contains("tokio_num_workers 3\n"), "{text}");
        for name in ["total_busy_duration_seconds", "park_count", "park_unpark_count"] {
            for worker in ["0", "control-0", "control-1"] {
                assert!(text.contains(&format!("tokio_worker_{name}_total{{worker=\"{worker}\"}} ")), "{text}");
            }
        }
    }
}
