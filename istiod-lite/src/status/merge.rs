//! A status as it is and a report as it should be → the fields to write, or nothing. Other controllers' conditions,
//! parents and fields stay as they are.

use serde_json::{Map, Value, json};

use crate::translate::verdict::{LONGEST_MESSAGE, ListenerReport, ParentReport, Report, Wanted};
use crate::types::gateway::{GROUP, ROUTE_CONTROLLER};

/// The changed fields of `status`; `None` when it already says so. `now` is RFC 3339.
pub fn status(current: &Value, report: &Report, generation: i64, now: &str) -> Option<Value> {
    let mut changed = Map::new();
    let mut set = |field: &str, value: Value| {
        if current[field] != value && !(current[field].is_null() && is_empty(&value)) {
            changed.insert(field.to_owned(), value);
        }
    };
    match report {
        Report::Conditions { owned, wanted } => {
            set("conditions", conditions(&current["conditions"], owned, wanted, generation, now));
        }
        Report::Addressed { owned, wanted, addresses } => {
            set("conditions", conditions(&current["conditions"], owned, wanted, generation, now));
            let addresses = addresses.iter().map(|(host, value)| json!({"value": value, "host": host})).collect();
            set("addresses", Value::Array(addresses));
        }
        Report::Class { wanted, features } => {
            set("conditions", conditions(&current["conditions"], &types(wanted), wanted, generation, now));
            set("supportedFeatures", features.iter().map(|name| json!({"name": name})).collect());
        }
        Report::Gateway { conditions: wanted, addresses, listeners } => {
            let owned = types(wanted);
            set("conditions", conditions(&current["conditions"], &owned, wanted, generation, now));
            if let Some(addresses) = addresses {
                let addresses = addresses.iter().map(|(kind, value)| json!({"type": kind, "value": value})).collect();
                set("addresses", Value::Array(addresses));
            }
            let listeners = listeners.iter().map(|report| listener(&current["listeners"], report, generation, now));
            set("listeners", Value::Array(listeners.collect()));
        }
        Report::Parents(reports) => set("parents", parents(&current["parents"], reports, generation, now)),
    }
    (!changed.is_empty()).then_some(Value::Object(changed))
}

fn types(wanted: &[Wanted]) -> Vec<&str> {
    wanted.iter().map(|wanted| wanted.r#type).collect()
}

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

/// Conditions of other types first, as they are; then ours.
fn conditions(current: &Value, owned: &[&str], wanted: &[Wanted], generation: i64, now: &str) -> Value {
    let current = current.as_array().map(Vec::as_slice).unwrap_or_default();
    let is_owned = |condition: &&Value| condition["type"].as_str().is_some_and(|found| owned.contains(&found));
    let next: Vec<Value> = current
        .iter()
        .filter(|condition| !is_owned(condition))
        .cloned()
        .chain(wanted.iter().map(|wanted| condition(current, wanted, generation, now)))
        .collect();
    // The order carries no meaning: don't write for its sake.
    let same = next.len() == current.len() && next.iter().all(|condition| current.contains(condition));
    Value::Array(if same { current.to_vec() } else { next })
}

fn condition(current: &[Value], wanted: &Wanted, generation: i64, now: &str) -> Value {
    let last = current.iter().find(|condition| condition["type"] == wanted.r#type);
    let since = last
        .filter(|last| last["status"] == wanted.status.as_str())
        .and_then(|last| last["lastTransitionTime"].as_str())
        .unwrap_or(now);
    let mut condition = json!({
        "type": wanted.r#type,
        "status": wanted.status.as_str(),
        "reason": wanted.reason,
        "message": &wanted.message[..wanted.message.floor_char_boundary(LONGEST_MESSAGE)],
        "lastTransitionTime": since,
    });
    // Services of older clusters have no generation; zero would claim to have observed nothing.
    if generation > 0 {
        condition["observedGeneration"] = generation.into();
    }
    condition
}

fn listener(current: &Value, report: &ListenerReport, generation: i64, now: &str) -> Value {
    let last = current.as_array().into_iter().flatten().find(|listener| listener["name"] == *report.name);
    let owned = types(&report.conditions);
    let empty = Value::Null;
    let last_conditions = last.map_or(&empty, |last| &last["conditions"]);
    json!({
        "name": report.name,
        "attachedRoutes": report.attached,
        "supportedKinds": report.kinds.iter().map(|kind| json!({"group": GROUP, "kind": kind})).collect::<Vec<_>>(),
        "conditions": conditions(last_conditions, &owned, &report.conditions, generation, now),
    })
}

/// Entries of other controllers first, as they are; then ours, in the order of the route's parentRefs.
fn parents(current: &Value, reports: &[ParentReport], generation: i64, now: &str) -> Value {
    let current = current.as_array().map(Vec::as_slice).unwrap_or_default();
    let (ours, others): (Vec<&Value>, Vec<&Value>) =
        current.iter().partition(|parent| parent["controllerName"] == ROUTE_CONTROLLER);
    let next = reports.iter().map(|report| {
        let last = ours.iter().find(|parent| parent["parentRef"] == report.parent);
        let last_conditions = last.map_or(Value::Null, |last| last["conditions"].clone());
        // Every condition of our entry is ours: one we no longer set goes.
        let all: Vec<&str> =
            last_conditions.as_array().into_iter().flatten().filter_map(|found| found["type"].as_str()).collect();
        json!({
            "parentRef": report.parent,
            "controllerName": ROUTE_CONTROLLER,
            "conditions": conditions(&last_conditions, &all, &report.conditions, generation, now),
        })
    });
    Value::Array(others.into_iter().cloned().chain(next).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::verdict::Status;

    const OWNED: &[&str] = &["Accepted"];

    fn report(status: Status) -> Report {
        Report::Conditions { owned: OWNED, wanted: vec![Wanted::new("Accepted", status, "R", "m")] }
    }

    #[test]
    fn writes_once_and_then_nothing() {
        let first = status(&Value::Null, &report(Status::True), 3, "t1").unwrap();
        assert_eq!(first["conditions"][0]["observedGeneration"], 3);
        assert_eq!(status(&first, &report(Status::True), 3, "t2"), None);
    }

    #[test]
    fn the_time_of_a_transition_is_kept_until_the_status_changes() {
        let first = status(&Value::Null, &report(Status::True), 1, "t1").unwrap();
        let observed = status(&first, &report(Status::True), 2, "t2").unwrap();
        assert_eq!(observed["conditions"][0]["lastTransitionTime"], "t1");
        let flipped = status(&first, &report(Status::False), 2, "t2").unwrap();
        assert_eq!(flipped["conditions"][0]["lastTransitionTime"], "t2");
    }

    #[test]
    fn conditions_and_parents_of_others_stay() {
        let current =
            json!({"conditions": [{"type": "Theirs", "status": "True"}, {"type": "Accepted", "status": "True"}]});
        let none = Report::Conditions { owned: OWNED, wanted: Vec::new() };
        let next = status(&current, &none, 1, "t").unwrap();
        assert_eq!(next["conditions"], json!([{"type": "Theirs", "status": "True"}]));

        let current = json!({"parents": [
            {"controllerName": "other", "parentRef": {"name": "g"}, "conditions": []},
            {"controllerName": ROUTE_CONTROLLER, "parentRef": {"name": "gone"}, "conditions": []},
        ]});
        let next = status(&current, &Report::Parents(Vec::new()), 1, "t").unwrap();
        assert_eq!(next["parents"].as_array().unwrap().len(), 1);
        assert_eq!(next["parents"][0]["controllerName"], "other");
    }

    #[test]
    fn nothing_to_say_about_an_untouched_object_writes_nothing() {
        let none = Report::Conditions { owned: OWNED, wanted: Vec::new() };
        assert_eq!(status(&Value::Null, &none, 1, "t"), None);
        assert_eq!(status(&Value::Null, &Report::Parents(Vec::new()), 1, "t"), None);
    }

    #[test]
    fn allocated_addresses_are_written_once_and_taken_back() {
        let report = |addresses: &[(&str, &str)]| Report::Addressed {
            owned: OWNED,
            wanted: vec![Wanted::new("Accepted", Status::True, "R", "m")],
            addresses: addresses.iter().map(|(host, ip)| ((*host).to_owned(), ip.parse().unwrap())).collect(),
        };
        let given = report(&[("a.test", "240.240.0.1"), ("a.test", "2001:2::1")]);
        let first = status(&json!({"theirs": 1}), &given, 1, "t1").unwrap();
        assert_eq!(
            first["addresses"],
            json!([{"value": "240.240.0.1", "host": "a.test"}, {"value": "2001:2::1", "host": "a.test"}])
        );
        assert_eq!(status(&first, &given, 1, "t2"), None, "never fights over what is so already");
        let next = status(&first, &report(&[]), 1, "t2").unwrap();
        assert_eq!(next, json!({"addresses": []}));
        assert_eq!(status(&json!({"conditions": first["conditions"]}), &report(&[]), 1, "t2"), None);
    }

    #[test]
    fn features_of_a_class_are_put_back_and_then_left_alone() {
        let report = || Report::Class {
            wanted: vec![Wanted::new("Accepted", Status::True, "R", "m")],
            features: &["HTTPRoute", "HTTPRouteMethodMatching"],
        };
        let first = status(&json!({"supportedFeatures": [{"name": "Mesh"}]}), &report(), 1, "t1").unwrap();
        assert_eq!(first["supportedFeatures"], json!([{"name": "HTTPRoute"}, {"name": "HTTPRouteMethodMatching"}]));
        assert_eq!(status(&first, &report(), 1, "t2"), None);
    }

    #[test]
    fn a_message_is_as_long_as_the_api_takes() {
        let long = Wanted::new("Accepted", Status::True, "R", "ä".repeat(LONGEST_MESSAGE));
        let written = status(&Value::Null, &Report::Conditions { owned: OWNED, wanted: vec![long] }, 1, "t").unwrap();
        assert_eq!(written["conditions"][0]["message"].as_str().unwrap().len(), LONGEST_MESSAGE);
    }

    #[test]
    fn a_condition_of_a_route_that_no_longer_applies_goes() {
        let parent = json!({"name": "s", "kind": "Service", "group": ""});
        let with = |conditions| Report::Parents(vec![ParentReport { parent: parent.clone(), conditions }]);
        let accepted = || Wanted::new("Accepted", Status::True, "R", "");
        let partial = Wanted::new("PartiallyInvalid", Status::True, "R", "");
        let first = status(&Value::Null, &with(vec![accepted(), partial]), 1, "t").unwrap();
        let next = status(&first, &with(vec![accepted()]), 1, "t").unwrap();
        assert_eq!(next["parents"][0]["conditions"].as_array().unwrap().len(), 1);
    }
}
