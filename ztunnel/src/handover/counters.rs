//! The counters of a draining ztunnel, which nobody scrapes any more, are carried on by its successor.
//!
//! They are read from the registry's own text, so that nothing on the data path counts twice. Gauges and histograms are
//! not carried: the one describes a process, the other only DNS, which a draining ztunnel does not serve.

use std::collections::HashMap;

use super::wire::Counted;

/// The counters that are about connections. Only these are believed.
const CARRIED: [&str; 6] = [
    "istio_tcp_connections_closed_total",
    "istio_tcp_connections_failed_total",
    "istio_tcp_received_bytes_total",
    "istio_tcp_sent_bytes_total",
    "mesh_connections_refused_total",
    "mesh_hbone_connections_broken_total",
];
/// Bytes as the metrics name them.
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const SENT: &str = "istio_tcp_sent_bytes_total";

/// What was told already, by series.
#[derive(Debug, Default)]
pub struct Told(HashMap<String, u64>);

/// A counter that grew: its series, what it stands at, and what to tell.
#[derive(Debug, PartialEq, Eq)]
pub struct Grown {
    series: String,
    value: u64,
    pub counted: Counted,
}

impl Told {
    /// What stands in the registry's text now needs no telling: whoever scraped us has seen it.
    #[must_use]
    pub fn all(registry: &str) -> Self {
        Self(counters(registry).map(|(series, value)| (series.to_owned(), value)).collect())
    }

    /// What grew since it was told.
    #[must_use]
    pub fn growth(&self, registry: &str) -> Vec<Grown> {
        let grown = counters(registry).filter_map(|(series, value)| {
            let by = value.saturating_sub(self.0.get(series).copied().unwrap_or_default());
            let (name, labels) = if by > 0 { parse(series)? } else { return None };
            Some(Grown { series: series.to_owned(), value, counted: Counted { name, labels, by } })
        });
        grown.collect()
    }

    /// These have been told.
    pub fn note(&mut self, told: Vec<Grown>) {
        self.0.extend(told.into_iter().map(|grown| (grown.series, grown.value)));
    }
}

/// Bytes carried so far: received, sent.
#[must_use]
pub fn bytes(registry: &str) -> (u64, u64) {
    let sum = |name: &str| counters(registry).filter(|(line, _)| line.starts_with(name)).map(|(_, value)| value).sum();
    (sum(RECEIVED), sum(SENT))
}

/// Adds to our own counters what another generation counted.
pub fn carry_on(counted: Vec<Counted>) {
    for Counted { name, labels, by } in counted {
        if let Some(name) = CARRIED.iter().find(|known| **known == name) {
            let labels: Vec<_> = labels.into_iter().map(|(key, value)| metrics::Label::new(key, value)).collect();
            metrics::counter!(*name, labels).increment(by);
        }
    }
}

/// `name{labels}` and value of every line that is carried.
fn counters(registry: &str) -> impl Iterator<Item = (&str, u64)> {
    registry.lines().filter(|line| CARRIED.iter().any(|name| line.starts_with(name))).filter_map(|line| {
        // Label values may hold spaces; the value does not.
        let (series, value) = line.rsplit_once(' ')?;
        Some((series, value.parse().ok()?))
    })
}

/// The exposition format: `name{key="value",…}`, with `\\`, `\"` and `\n` in values.
fn parse(series: &str) -> Option<(String, Vec<(String, String)>)> {
    let Some((name, rest)) = series.split_once('{') else { return Some((series.to_owned(), Vec::new())) };
    let mut labels = Vec::new();
    let mut rest = rest.strip_suffix('}')?;
    while !rest.is_empty() {
        let (key, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (at, '"') => break at,
                (_, other) => value.push(other),
            }
        };
        labels.push((key.trim_start_matches(',').to_owned(), value));
        rest = &after[end + 1..];
    }
    Some((name.to_owned(), labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# TYPE istio_tcp_sent_bytes_total counter\n\
        istio_tcp_sent_bytes_total{a=\"x y\",b=\"q\\\"\\\\\\n,{}\"} 5\n\
        istio_tcp_sockets_open{reporter=\"source\"} 7\n";

    #[test]
    fn growth_is_told_once_and_labels_are_read_as_they_were_meant() {
        let mut told = Told::all("istio_tcp_received_bytes_total 3\n");
        let labels = vec![("a".to_owned(), "x y".to_owned()), ("b".to_owned(), "q\"\\\n,{}".to_owned())];
        let counted = |by| vec![Counted { name: "istio_tcp_sent_bytes_total".into(), labels: labels.clone(), by }];
        let growth = |told: &Told, text: &str| told.growth(text).into_iter().map(|g| g.counted).collect::<Vec<_>>();
        assert_eq!(growth(&told, BEFORE), counted(5));
        assert_eq!(growth(&told, BEFORE), counted(5), "what was not noted is told again");
        told.note(told.growth(BEFORE));
        assert_eq!(growth(&told, BEFORE), []);
        assert_eq!(growth(&told, &BEFORE.replace(" 5\n", " 12\n")), counted(7));
        assert_eq!(growth(&told, "istio_tcp_received_bytes_total 3\n"), []);
        assert_eq!(bytes(BEFORE), (0, 5));
    }
}
