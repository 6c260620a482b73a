use std::collections::{HashMap, HashSet};

use super::*;
use crate::telemetry::metrics_handle;

/// What Prometheus sends.
const PROMETHEUS: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
    application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";

#[test]
fn open_metrics_is_for_those_who_prefer_it() {
    for (accept, expected) in [
        (PROMETHEUS, Exposition::OpenMetrics),
        ("application/openmetrics-text", Exposition::OpenMetrics),
        ("text/plain, application/openmetrics-text;q=0.9", Exposition::Text),
        ("application/openmetrics-text;q=0", Exposition::Text),
        ("application/openmetrics-text;q=lots", Exposition::Text),
        ("text/plain", Exposition::Text),
        ("*/*", Exposition::Text),
        ("", Exposition::Text),
    ] {
        assert_eq!(Exposition::accepted(accept), expected, "{accept}");
    }
}

#[test]
fn the_text_is_turned_into_open_metrics() {
    let text = "# HELP a_total all\n# TYPE a_total counter\na_total{x=\"le=\\\"5\\\"\"} 3\n\n\
        # TYPE pilot_pushes counter\npilot_pushes 1\n\n\
        # TYPE d histogram\nd_bucket{z=\"1\",le=\"5\"} 1\nd_bucket{z=\"1\",le=\"0.5\"} 0\nd_bucket{z=\"1\",le=\"+Inf\"} 1\n\
        d_sum{z=\"1\"} 4.5\nd_count{z=\"1\"} 1\n\n# TYPE e histogram\ne_bucket{le=\"100\"} 0\n\n# TYPE g gauge\ng 1\n";
    let expected = "# HELP a all\n# TYPE a counter\na_total{x=\"le=\\\"5\\\"\"} 3\n\
        # TYPE pilot_pushes unknown\npilot_pushes 1\n\
        # TYPE d histogram\nd_bucket{z=\"1\",le=\"5.0\"} 1\nd_bucket{z=\"1\",le=\"0.5\"} 0\nd_bucket{z=\"1\",le=\"+Inf\"} 1\n\
        d_sum{z=\"1\"} 4.5\nd_count{z=\"1\"} 1\n# TYPE e histogram\ne_bucket{le=\"100.0\"} 0\n# TYPE g gauge\ng 1\n# EOF\n";
    assert_eq!(open_metrics(text), expected);
}

#[test]
fn what_is_served_holds_to_open_metrics() {
    let metrics = metrics_handle();
    metrics::counter!("exposition_test_total", "a" => "q\"\\\n,{}").increment(1);
    metrics::counter!("exposition_test_pushes").increment(1);
    metrics::gauge!("exposition_test_open").set(2.5);
    metrics::histogram!("exposition_test_seconds", "a" => "b").record(0.3);
    let text = metrics.expose(Exposition::OpenMetrics);
    let families = check(&text);
    for (name, kind) in [
        ("exposition_test", "counter"),
        ("exposition_test_pushes", "unknown"),
        ("exposition_test_open", "gauge"),
        ("exposition_test_seconds", "histogram"),
        ("process_open_fds", "gauge"),
        ("process_max_fds", "gauge"),
    ] {
        assert_eq!(families.get(name).map(String::as_str), Some(kind), "{name} in\n{text}");
    }
}

/// The rules of OpenMetrics 1.0 that a scraper refuses a whole answer for. Returns the families with their types.
fn check(text: &str) -> HashMap<String, String> {
    let body = text.strip_suffix("# EOF\n").expect("the end is marked, once and last");
    let (mut families, mut series) = (HashMap::new(), HashSet::new());
    let mut current = (String::new(), String::new());
    for line in body.lines() {
        if let Some(meta) = line.strip_prefix("# ") {
            let words: Vec<&str> = meta.splitn(3, ' ').collect();
            assert!(["TYPE", "HELP", "UNIT"].contains(&words[0]) && words.len() == 3, "{line}");
            if words[0] == "TYPE" {
                current = (words[1].to_owned(), words[2].to_owned());
                let known = families.insert(words[1].to_owned(), words[2].to_owned());
                assert_eq!(known, None, "{} is interleaved or of two types", words[1]);
            }
            continue;
        }
        let (id, value) = line.rsplit_once(' ').expect("a value");
        let value: f64 = value.parse().expect("a number");
        assert!(series.insert(id.to_owned()), "{id} stands twice");
        let (name, labels) = id.split_once('{').map_or((id, ""), |(n, l)| (n, l.strip_suffix('}').expect("closed")));
        let suffix = name.strip_prefix(&*current.0).unwrap_or_else(|| panic!("{name} in family {}", current.0));
        let suffixes: &[&str] = match &*current.1 {
            "counter" => &["_total"],
            "gauge" | "unknown" => &[""],
            "histogram" => &["_bucket", "_sum", "_count"],
            other => panic!("type {other}"),
        };
        assert!(suffixes.contains(&suffix), "{name} of a {}", current.1);
        assert!(current.1 != "counter" || value >= 0.0, "{line}");
        if suffix == "_bucket" {
            let (_, bound) = labels.rsplit_once("le=\"").expect("a bucket has a bound");
            let bound = bound.strip_suffix('"').expect("the bound is last");
            assert!(bound == "+Inf" || bound.contains('.'), "{line}");
        }
    }
    families
}
