//! How metrics are written for those who scrape them: the Prometheus text format, or OpenMetrics 1.0 for whoever asks.
//!
//! The registry writes the former. The latter is made from that text, since the two differ in little: the name of a
//! counter's family lacks `_total`, bounds of buckets are floating-point numbers, no line is blank, and the end is marked.

use std::fmt::Write;

/// A format of exposition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exposition {
    Text,
    OpenMetrics,
}

impl Exposition {
    /// What an `Accept` header prefers. OpenMetrics must be named, and win; everything else is answered with text, which every
    /// scraper reads.
    pub fn accepted(accept: &str) -> Self {
        let (mut open_metrics, mut text) = (0.0, 0.0);
        for (media, weight) in preferences(accept) {
            let best: &mut f32 = match media {
                "application/openmetrics-text" => &mut open_metrics,
                "text/plain" => &mut text,
                _ => continue,
            };
            *best = best.max(weight);
        }
        if open_metrics > 0.0 && open_metrics >= text { Self::OpenMetrics } else { Self::Text }
    }

    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The items of an `Accept` or `Accept-Encoding` header with their `q`, 1 where none is given (RFC 9110, 12.4.2).
pub(crate) fn preferences(header: &str) -> impl Iterator<Item = (&str, f32)> {
    header.split(',').map(|item| {
        let mut parts = item.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let weight = parts.find_map(|p| p.strip_prefix("q=")).map_or(1.0, |q| q.parse().unwrap_or(0.0));
        (name, weight)
    })
}

/// What a metric does over time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Counter,
    Gauge,
}

/// One metric with a value for each label set, found when it is asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct Family {
    name: &'static str,
    kind: Kind,
    /// At most one label each.
    samples: Vec<(Option<(&'static str, String)>, f64)>,
}

impl Family {
    /// Counters' names end in `_total`.
    pub const fn new(name: &'static str, kind: Kind) -> Self {
        Self { name, kind, samples: Vec::new() }
    }

    #[must_use]
    pub fn value(mut self, value: f64) -> Self {
        self.samples.push((None, value));
        self
    }

    #[must_use]
    pub fn labelled(mut self, label: &'static str, is: impl Into<String>, value: f64) -> Self {
        self.samples.push((Some((label, is.into())), value));
        self
    }

    pub(super) fn write(&self, out: &mut String) {
        let kind = match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Writing to a string does not fail.
        let _ = writeln!(out, "# TYPE {} {kind}", self.name);
        for (label, value) in &self.samples {
            let value = if *value == f64::INFINITY { "+Inf".to_owned() } else { value.to_string() };
            let _ = match label {
                None => writeln!(out, "{} {value}", self.name),
                // As Rust quotes a string, it has all escapes that the format knows; names of threads need none.
                Some((label, is)) => writeln!(out, "{}{{{label}={is:?}}} {value}", self.name),
            };
        }
    }
}

/// The same metrics as OpenMetrics. A counter that is not called `_total` would have to change its name, which would break
/// whoever asks for it: it is left as it is, with a type that says nothing.
pub(super) fn open_metrics(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            let _ = writeln!(out, "# HELP {} {help}", name.strip_suffix("_total").unwrap_or(name));
            continue;
        }
        let _ = match line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            Some((name, "counter")) => match name.strip_suffix("_total") {
                Some(family) => writeln!(out, "# TYPE {family} counter"),
                None => writeln!(out, "# TYPE {name} unknown"),
            },
            Some(_) => writeln!(out, "{line}"),
            None => writeln!(out, "{}", with_float_bound(line)),
        };
    }
    out.push_str("# EOF\n");
    out
}

/// `le="5"` as `le="5.0"`. The bound is the last label of a bucket.
fn with_float_bound(line: &str) -> std::borrow::Cow<'_, str> {
    const BOUND: &str = ",le=\"";
    let series = line.split_once('{').map_or(line, |(name, _)| name);
    let bound = line.rfind(BOUND).map(|at| at + BOUND.len()).or_else(|| {
        let alone = format!("{series}{{le=\"");
        line.starts_with(&alone).then_some(alone.len())
    });
    match bound.and_then(|from| Some((from, from + line[from..].find('"')?))) {
        Some((from, to)) if series.ends_with("_bucket") && line[from..to].bytes().all(|b| b.is_ascii_digit()) => {
            format!("{}.0{}", &line[..to], &line[to..]).into()
        }
        _ => line.into(),
    }
}

#[cfg(test)]
mod tests;
