//! Wall time for certificates, as a handle. Everything that waits uses `tokio::time`; this answers only "what is the
//! date", which certificates are valid by, and lets a test choose the answer.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Answers what the time is.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> SystemTime + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::with(SystemTime::now)
    }

    /// A clock that asks `now`.
    pub fn with(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// A clock that shows `start` now and advances with the runtime's time, so that it stands still when that is paused.
    /// Must be called inside a runtime.
    pub fn from_runtime(start: SystemTime) -> Self {
        let origin = tokio::time::Instant::now();
        Self::with(move || start + origin.elapsed())
    }

    pub fn now(&self) -> SystemTime {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Clock").field(&self.now()).finish()
    }
}

/// rustls checks validity against this.
impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<rustls::pki_types::UnixTime> {
        let since = self.now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Some(rustls::pki_types::UnixTime::since_unix_epoch(since))
    }
}
