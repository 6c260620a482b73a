//! What of an HTTPRoute can never work. The translation says the same of it in one text with what is not done yet; a test
//! holds the two together.

use serde::Deserialize as _;
use serde_json::Value;

use crate::translate::regular_expression::{self, Unfit};
use crate::translate::verdict::{EXPLAIN, Fault};
use crate::types::gateway::{
    GROUP, HttpFilter, HttpMatch, HttpRouteRule, HttpRouteSpec, ParentRef, PathModifier, ValueMatch,
};
use crate::types::{CustomKind as _, Lenient, networking};

/// Of a route that is meant for nobody but us: what others make of a rule is not ours to say.
pub fn faults(object: &Value) -> Vec<Fault> {
    if object["kind"] != HttpRouteSpec::KIND
        || !object["apiVersion"].as_str().is_some_and(|version| version.starts_with(GROUP))
    {
        return Vec::new();
    }
    let Ok(spec) = HttpRouteSpec::deserialize(&object["spec"]) else { return Vec::new() };
    if spec.parent_refs.is_empty() || !spec.parent_refs.iter().all(is_ours) {
        return Vec::new();
    }
    let mut out = Faults::default();
    for (index, rule) in spec.rules.iter().flatten().enumerate() {
        let place = format!("spec.rules[{index}]");
        if let Some(rule) = out.readable(&place, rule) {
            out.rule(&place, rule);
        }
    }
    out.0
}

fn is_ours(parent: &ParentRef) -> bool {
    let (group, kind) = (parent.group.as_deref(), parent.kind.as_deref());
    matches!((group, kind), (Some("" | "core"), Some("Service")) | (Some(networking::GROUP), Some("ServiceEntry")))
}

/// What was found, and how many regular expressions were looked at.
#[derive(Default)]
struct Faults(Vec<Fault>, usize);

impl Faults {
    fn add(&mut self, place: impl Into<String>, text: impl Into<String>) {
        self.0.push(Fault::new(place, text));
    }

    fn readable<'a, T>(&mut self, place: &str, value: &'a Lenient<T>) -> Option<&'a T> {
        match value {
            Lenient::Good(value) => Some(value),
            Lenient::Bad(reason) => {
                self.add(place, format!("cannot be read: {reason}; {EXPLAIN}"));
                None
            }
        }
    }

    fn rule(&mut self, place: &str, rule: &HttpRouteRule) {
        for (index, found) in rule.matches.iter().enumerate() {
            let place = format!("{place}.matches[{index}]");
            if let Some(found) = self.readable(&place, found) {
                self.matching(&place, found);
            }
        }
        for (index, filter) in rule.filters.iter().enumerate() {
            let place = format!("{place}.filters[{index}]");
            if let Some(filter) = self.readable(&place, filter) {
                self.filter(&place, filter, rule);
            }
        }
        for (index, backend) in rule.backend_refs.iter().enumerate() {
            self.readable(&format!("{place}.backendRefs[{index}]"), backend);
        }
        let has = |kind: &str| {
            rule.filters.iter().any(|filter| matches!(filter, Lenient::Good(filter) if filter.r#type == kind))
        };
        if has("RequestRedirect") && (has("URLRewrite") || !rule.backend_refs.is_empty()) {
            let text = "RequestRedirect answers the request itself; take it out, or URLRewrite and backendRefs";
            self.add(format!("{place}.filters"), text);
        }
        for (field, value) in [("request", &rule.timeouts.request), ("backendRequest", &rule.timeouts.backend_request)]
        {
            if let Some(value) = value.as_deref().filter(|value| !is_duration(value)) {
                let text = format!("{value:?} is not a duration; write it as 10s, 500ms or 1m30s");
                self.add(format!("{place}.timeouts.{field}"), text);
            }
        }
    }

    fn matching(&mut self, place: &str, found: &HttpMatch) {
        if let Some(path) = &found.path {
            let value = path.value.as_deref().unwrap_or("/");
            match path.r#type.as_deref() {
                Some("RegularExpression") => self.regex(format!("{place}.path.value"), value),
                None | Some("Exact" | "PathPrefix") if !value.starts_with('/') => {
                    self.add(format!("{place}.path.value"), format!("{value:?} is not absolute; begin it with /"));
                }
                _ => {}
            }
        }
        for (field, entries) in [("headers", &found.headers), ("queryParams", &found.query_params)] {
            let is_regex = |entry: &ValueMatch| entry.r#type.as_deref() == Some("RegularExpression");
            for (index, entry) in entries.iter().enumerate().filter(|(_, entry)| is_regex(entry)) {
                let value = entry.value.as_deref().unwrap_or_default();
                self.regex(format!("{place}.{field}[{index}].value"), value);
            }
        }
    }

    fn regex(&mut self, place: String, value: &str) {
        self.1 += 1;
        let most = regular_expression::MOST_OF_ROUTE;
        let outcome = if self.1 > most { None } else { Some(regular_expression::check(value)) };
        let text = match outcome {
            None => format!("one route may have {most} regular expressions; write several routes"),
            Some(Ok(())) => return,
            Some(Err(Unfit::TooLarge)) => {
                format!(
                    "{value:?} takes more memory than a waypoint gives one; write a shorter one, or ask for less in it"
                )
            }
            Some(Err(Unfit::NotOne(error))) => {
                // It draws the place of the mistake in lines above the last.
                let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
                format!("{value:?} is not a regular expression: {reason}; write it in the syntax of RE2")
            }
        };
        self.add(place, text);
    }

    fn filter(&mut self, place: &str, filter: &HttpFilter, rule: &HttpRouteRule) {
        let (field, is_there) = match filter.r#type.as_str() {
            "RequestHeaderModifier" => ("requestHeaderModifier", filter.request_header_modifier.is_some()),
            "ResponseHeaderModifier" => ("responseHeaderModifier", filter.response_header_modifier.is_some()),
            "RequestRedirect" => ("requestRedirect", filter.request_redirect.is_some()),
            "URLRewrite" => ("urlRewrite", filter.url_rewrite.is_some()),
            _ => return,
        };
        if !is_there {
            let text = format!("of type {} without {field}; say there what to do, or take it out", filter.r#type);
            return self.add(place, text);
        }
        let modifier: Option<&PathModifier> = match field {
            "requestRedirect" => filter.request_redirect.as_ref().and_then(|redirect| redirect.path.as_ref()),
            "urlRewrite" => filter.url_rewrite.as_ref().and_then(|rewrite| rewrite.path.as_ref()),
            _ => None,
        };
        let is_prefix = |found: &Lenient<HttpMatch>| match found {
            Lenient::Good(found) => {
                let kind = found.path.as_ref().and_then(|path| path.r#type.as_deref());
                kind.is_none_or(|kind| kind == "PathPrefix")
            }
            Lenient::Bad(_) => true,
        };
        let replaces_prefix = modifier.is_some_and(|modifier| modifier.r#type == "ReplacePrefixMatch");
        if replaces_prefix && !rule.matches.iter().all(is_prefix) {
            let text = "ReplacePrefixMatch needs a prefix; write PathPrefix into each match of the rule";
            self.add(format!("{place}.{field}.path"), text);
        }
    }
}

/// As the Gateway API writes them: numbers and units (GEP-2257).
fn is_duration(text: &str) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let unit = after.find(|letter: char| letter.is_ascii_digit()).unwrap_or(after.len());
        if number.is_empty() || !matches!(&after[..unit], "h" | "m" | "s" | "ms") {
            return false;
        }
        rest = &after[unit..];
    }
    !text.is_empty()
}
