//! What operators see of a component: log lines, metrics, the access record of a connection, and the flag that names how
//! it ended. Names of fields and labels are Istio's, written here once.

pub mod access;
mod exposition;
mod flag;
mod logging;
mod metrics;
mod process;

pub(crate) use exposition::preferences;
pub use exposition::{Exposition, Family, Kind};
pub use flag::ResponseFlag;
#[cfg(fuzzing)]
pub use logging::capture;
pub use logging::{LogError, LogFormat, LogHandle, init_logging};
pub use metrics::{ByteCounts, MetricsHandle, metrics_handle, record_build};
pub use process::watch_runtimes;
