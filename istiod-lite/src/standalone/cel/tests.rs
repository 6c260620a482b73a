use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::error::Cause;
use super::super::schema;
use super::Rules;

/// Field and message of each cause.
fn told(causes: &[Cause]) -> Vec<String> {
    causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect()
}

fn compiled(schema: &Value) -> Rules {
    let mut causes = Vec::new();
    let rules = Rules::compile(schema, "schema", &mut causes);
    assert_eq!(told(&causes), Vec::<String>::new());
    assert_eq!(rules.ignored(), Vec::<String>::new());
    rules
}

fn violations(schema: &Value, object: &Value, old: Option<&Value>) -> Vec<String> {
    let mut causes = Vec::new();
    compiled(schema).validate(object, old, schema, &mut causes);
    told(&causes)
}

fn refused(schema: &Value) -> Vec<String> {
    let mut causes = Vec::new();
    Rules::compile(schema, "schema", &mut causes);
    told(&causes)
}

/// An object of many types, and its schema.
fn example() -> (Value, Value) {
    let text = json!({"type": "string"});
    let schema = json!({"type": "object", "properties": {
        "text": text, "absent": text, "namespace": text, "a-b": text, "a__b": text, "x.y/z": text,
        "number": {"type": "integer"}, "ratio": {"type": "number"}, "yes": {"type": "boolean"},
        "port": {"x-kubernetes-int-or-string": true}, "name": {"x-kubernetes-int-or-string": true},
        "list": {"type": "array", "items": {"type": "integer"}},
        "set": {"type": "array", "x-kubernetes-list-type": "set", "items": text},
        "things": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
            "items": {"type": "object", "properties": {"name": text, "size": {"type": "integer"}}}},
        "labels": {"type": "object", "additionalProperties": text},
        "nested": {"type": "object", "properties": {"inner": {"type": "object", "properties": {"leaf": text}}}},
        "any": {"x-kubernetes-preserve-unknown-fields": true},
        "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"known": text}},
        "template": {"type": "object", "x-kubernetes-embedded-resource": true, "x-kubernetes-preserve-unknown-fields": true},
        "since": {"type": "string", "format": "date-time"}, "span": {"type": "string", "format": "duration"},
        "bytes": {"type": "string", "format": "byte"},
        "nothing": {"type": "string", "nullable": true},
    }});
    let object = json!({
        "text": "häppy text", "namespace": "n", "a-b": "dash", "a__b": "under", "x.y/z": "all",
        "number": 7, "ratio": 2, "yes": true, "port": 80, "name": "http", "list": [1, 2, 3], "set": ["a", "b"],
        "things": [{"name": "one", "size": 1}, {"name": "two", "size": 2}],
        "labels": {"app": "web", "namespace": "kept", "a/b": "c"}, "nested": {"inner": {"leaf": "green"}},
        "any": {"x": 1}, "open": {"known": "k", "unknown": "u"},
        "template": {"kind": "Pod", "metadata": {"name": "p", "labels": {"a": "b"}}},
        "since": "2026-11-27T10:00:00Z", "span": "90s", "bytes": "YWJj", "nothing": null,
    });
    (schema, object)
}

/// What a rule says of the example: `None` when it holds.
fn verdict(rule: &str) -> Option<String> {
    let (mut schema, object) = example();
    schema["x-kubernetes-validations"] = json!([{"rule": rule}]);
    violations(&schema, &object, None).pop()
}

#[test]
fn what_holds_holds() {
    for rule in [
        // Fields and their names.
        "self.text == 'häppy text' && has(self.text) && !has(self.absent)",
        "self.__namespace__ == 'n' && self.a__dash__b == 'dash' && self.a__underscores__b == 'under'",
        "self.x__dot__y__slash__z == 'all'",
        "self.labels.namespace == 'kept' && self.labels['a/b'] == 'c' && 'app' in self.labels && !('b' in self.labels)",
        "has(self.labels.app) && !has(self.labels.other) && has(self.nested.inner.leaf)",
        "has(self.nothing) && self.nothing == null",
        "self.template.metadata.name == 'p' && self.template.kind == 'Pod' && !has(self.template.apiVersion)",
        "self.open.known == 'k'",
        // Numbers.
        "self.number == 7 && self.number / 2 == 3 && self.number % 4 == 3 && -self.number == -7 && 2 * 3 - 1 == 5",
        "self.ratio == 2.0 && type(self.ratio) == double && self.number < 7.5 && 1u < 2 && 0x10 == 16",
        "int('12') == 12 && int(2.9) == 2 && uint(3) == 3u && double('1.5') == 1.5 && string(12) == '12'",
        "type(self.port) == int && self.port == 80 && type(self.name) == string && self.name == 'http'",
        "(type(self.port) == int ? self.port : 0) in [80, 443]",
        // Failures that the other side makes good.
        "self.absent == 'x' || true",
        "true || self.absent == 'x'",
        "!(self.list[9] == 1 && false)",
        "[self.list[0], 0].exists(x, 6 / x == 6)",
        "[0, 2].exists(x, 6 / x == 3) && ![0, 2].all(x, 6 / x == 4)",
        "self.yes ? true : self.list[9] == 1",
        // Texts.
        "self.text.contains('ppy') && self.text.startsWith('hä') && self.text.endsWith('xt') && self.text.size() == 10",
        "size(self.text) == 10 && self.text.substring(2) == 'ppy text' && self.text.substring(1, 3) == 'äp'",
        "self.text.indexOf('p') == 2 && self.text.indexOf('p', 3) == 3 && self.text.lastIndexOf('t') == 9",
        "self.text.lastIndexOf('t', 8) == 6 && self.text.indexOf('z') == -1 && self.text.charAt(1) == 'ä'",
        "' AbC '.trim().lowerAscii() == 'abc' && 'abc'.upperAscii() == 'ABC' && 'abc'.reverse() == 'cba'",
        "'a,b,c'.split(',') == ['a', 'b', 'c'] && 'a,b,c'.split(',', 2) == ['a', 'b,c'] && 'ab'.split('') == ['a', 'b']",
        "'a,b'.split(',', 0) == [] && 'a,b'.split(',', -1) == ['a', 'b'] && ''.split(',') == ['']",
        "'aXbX'.replace('X', '-') == 'a-b-' && 'aXbX'.replace('X', '-', 1) == 'a-bX' && ['a', 'b'].join('-') == 'a-b'",
        "['a', 'b'].join() == 'ab' && 'a' + 'b' == 'ab' && 'a' < 'b' && '%s has %d of %s'.format(['x', 3, [1, 2]]) == 'x has 3 of [1, 2]'",
        r#"self.text.matches('^h.+t$') && matches('abc', 'b') && 'a.b'.matches(r'^a\.b$') && 'a.b'.matches(r"""a\.b""")"#,
        r"!'٣'.matches(r'\d') && '3]'.matches(r'^[\d\]]+$') && 'a-'.matches('^[-a-z]+$') && ']'.matches('[]]') && '['.matches('[[]')",
        r"'a b'.matches(r'\bb') && !'ab'.matches(r'\bb') && '&&'.matches('^[&&]+$') && 'x'.matches('^[[:alpha:]]$')",
        r"'é'.matches(r'^\W$') && 'ab12'.find('[0-9]+') == '12' && 'a1b2'.findAll('[0-9]') == ['1', '2']",
        // Lists, sets and maps.
        "self.list[0] == 1 && self.list.size() == 3 && 2 in self.list && !(4 in self.list) && self.list + [4] == [1, 2, 3, 4]",
        "self.list.all(x, x > 0) && self.list.exists(x, x == 2) && self.list.exists_one(x, x == 2)",
        "self.list.existsOne(x, x == 2) && self.list.filter(x, x > 1) == [2, 3] && self.list.map(x, x * 2) == [2, 4, 6]",
        "self.list.map(x, x > 1, x * 2) == [4, 6] && self.list.all(x, self.list.exists_one(y, x == y))",
        "self.list.all(i, x, x == i + 1) && self.labels.all(k, v, k != v) && self.list.transformList(i, x, i * x) == [0, 2, 6]",
        "self.list.sum() == 6 && self.list.min() == 1 && self.list.max() == 3 && self.list.isSorted() && self.list.indexOf(2) == 1",
        "self.set == ['b', 'a'] && self.set + ['b', 'c'] == ['a', 'b', 'c']",
        "(self.things + self.things).size() == 2 && self.things.all(t, t.size == size(t.name.substring(2)) + t.size - 1)",
        "self.things.map(t, t.name) == ['one', 'two'] && [[1], [2]] == [[1], [2]] && self.things == self.things",
        "self.labels.all(key, key.size() > 2) && self.labels.exists(key, self.labels[key] == 'web') && size(self.labels) == 3",
        "{'a': 1, 'b': 2} == {'b': 2, 'a': 1} && {'a': 1}.a == 1 && {'a': 1}['a'] == 1 && {1: 'x'}[1] == 'x' && {}.size() == 0",
        "sets.contains([1, 2], [2]) && sets.intersects([1], [1, 2]) && sets.equivalent([1, 1], [1]) && !sets.contains([1], [2])",
        // Times.
        "duration('1h') == duration('60m') && duration(self.text == '' ? '' : '1.5s') > duration('1s')",
        "self.span == duration('1m30s') && self.span.getSeconds() == 90 && string(duration('-1500ms')) == '-1.5s'",
        "self.since < timestamp('2026-11-28T00:00:00Z') && self.since + duration('14h') == timestamp('2026-11-28T00:00:00Z')",
        "self.since - timestamp('2026-11-27T09:00:00Z') == duration('1h') && self.bytes == b'abc' && size(self.bytes) == 3",
        // What may be absent.
        "self.?absent.orValue('none') == 'none' && self.?text.hasValue() && !self.?absent.hasValue()",
        "self.?nested.?inner.?leaf.orValue('') == 'green' && self.?nested.inner.leaf.value() == 'green'",
        "self.list[?9].orValue(0) == 0 && self.labels[?'app'].orValue('') == 'web' && optional.none().or(optional.of(1)).value() == 1",
        "isIP('fd00::1') && !isIP('10.0.0.0/8') && isCIDR('10.0.0.0/8')",
    ] {
        assert_eq!(verdict(rule), None, "{rule}");
    }
}

#[test]
fn what_fails_refuses_and_says_why() {
    for (rule, why) in [
        ("self.absent == 'x'", "no such key: absent"),
        ("self.namespace == 'n'", "undefined field 'namespace'"),
        ("self.unknown == 1", "undefined field 'unknown'"),
        ("has(self.unknown)", "undefined field 'unknown'"),
        ("self.any == 1", "undefined field 'any'"),
        ("self.open.unknown == 'u'", "undefined field 'unknown'"),
        ("has(self.template.metadata.labels)", "undefined field 'labels'"),
        ("self.list[3] == 1", "index out of bounds: 3"),
        ("self.list[-1] == 1", "index out of bounds: -1"),
        ("self.labels['b'] == 'c'", "no such key: b"),
        ("1 / (self.number - 7) == 1", "division by zero"),
        ("9223372036854775807 + self.number > 0", "integer overflow"),
        ("-(-9223372036854775807 - 1) > 0", "integer overflow"),
        ("(-9223372036854775807 - 1) / -1 > 0", "integer overflow"),
        ("(-9223372036854775807 - 1) % -1 == 0", "integer overflow"),
        ("self.text.substring(99) == ''", "index out of range: 99"),
        ("self.text.substring(3, 1) == ''", "invalid substring range"),
        ("self.text + 1 == ''", "no such overload: _+_(string, int)"),
        ("self.number < 'a'", "no such overload: _<_(int, string)"),
        ("int(self.text) == 1", "not an int: häppy text"),
        ("duration(self.text) > duration('1s')", "invalid duration: häppy text"),
        ("self.text.matches(self.text + '(')", "the pattern \"häppy text(\""),
        ("self.number", "a int"),
        ("self.nested.all(x, true)", "no such overload: a loop over object"),
        ("self.list.all(x, 1 / 0 == x)", "division by zero"),
        ("self.absent == 'x' || false", "no such key: absent"),
        ("timestamp('9999-12-31T00:00:00Z') + duration('2000000h') > self.since", "timestamp overflow"),
    ] {
        let told = verdict(rule).unwrap_or_default();
        assert_eq!(told, format!("<nil>: Invalid value: \"object\": {why} evaluating rule: {rule}"));
    }
    assert_eq!(verdict("self.number == 8").unwrap(), "<nil>: Invalid value: \"object\": failed rule: self.number == 8");
}

#[test]
fn a_violation_is_told_where_and_as_the_rule_has_it() {
    let schema = json!({"type": "object", "properties": {"spec": {"type": "object",
        "x-kubernetes-validations": [
            {"rule": "self.min <= self.max", "message": "min is at most max", "fieldPath": ".min", "reason": "FieldValueForbidden"},
            {"rule": "self.max < 10", "messageExpression": "'max is %d'.format([self.max])", "message": "max is less than 10"},
            {"rule": "self.max < 11", "messageExpression": "self.gone", "message": "max is less than 11", "reason": "FieldValueRequired"},
            {"rule": "self.max < 12", "fieldPath": ".labels['a']", "reason": "FieldValueDuplicate"},
        ],
        "properties": {
            "min": {"type": "integer"}, "max": {"type": "integer"}, "gone": {"type": "string"},
            "labels": {"type": "object", "additionalProperties":
                {"type": "string", "x-kubernetes-validations": [{"rule": "self != 'x'", "message": "no x"}]}},
            "hosts": {"type": "array", "items":
                {"type": "string", "x-kubernetes-validations": [{"rule": "self != '*'", "message": "no *"}]}},
        },
    }}});
    let object = json!({"spec": {"min": 20, "max": 12, "labels": {"a": "x", "b": "y"}, "hosts": ["a", "*"]}});
    assert_eq!(
        violations(&schema, &object, None),
        [
            "spec.min: Forbidden: min is at most max",
            "spec: Invalid value: \"object\": max is 12",
            "spec: Required value: max is less than 11",
            "spec.labels[a]: Duplicate value: \"object\": failed rule: self.max < 12",
            "spec.labels[a]: Invalid value: \"string\": no x",
            "spec.hosts[1]: Invalid value: \"string\": no *",
        ]
    );
    assert_eq!(violations(&schema, &json!({"spec": null}), None), Vec::<String>::new());
}

#[test]
fn a_transition_is_judged_where_there_was_something_before() {
    let schema = json!({"type": "object", "properties": {
        "class": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "class stays"}]},
        "count": {"type": "integer", "x-kubernetes-validations":
            [{"rule": "!oldSelf.hasValue() || self >= oldSelf.value()", "optionalOldSelf": true, "message": "count grows"}]},
        "ports": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"], "items":
            {"type": "object", "properties": {"name": {"type": "string"}, "port":
                {"type": "integer", "x-kubernetes-validations": [{"rule": "self >= oldSelf", "message": "port grows"}]}}}},
    }});
    let port = |name: &str, port: u16| json!({"name": name, "port": port});
    let old = json!({"class": "a", "count": 2, "ports": [port("x", 5), port("y", 7)]});
    let new = json!({"class": "b", "count": 1, "ports": [port("y", 6), port("z", 1), port("x", 6)]});
    assert_eq!(violations(&schema, &new, None), Vec::<String>::new());
    assert_eq!(violations(&schema, &new, Some(&json!({}))), Vec::<String>::new());
    assert_eq!(
        violations(&schema, &new, Some(&old)),
        [
            "class: Invalid value: \"string\": class stays",
            "count: Invalid value: \"integer\": count grows",
            "ports[0].port: Invalid value: \"integer\": port grows",
        ]
    );
}

#[test]
fn what_did_not_change_is_let_be() {
    let rule = json!([{"rule": "self.n < 5", "message": "n is small"}]);
    let part = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "x-kubernetes-validations": rule});
    let schema =
        json!({"type": "object", "properties": {"a": part, "b": part, "list": {"type": "array", "items": part}}});
    let old = json!({"a": {"n": 9}, "b": {"n": 9}, "list": [{"n": 9}]});
    let mut new = old.clone();
    new["b"]["n"] = 8.into();
    assert_eq!(violations(&schema, &new, Some(&old)), ["b: Invalid value: \"object\": n is small"]);
    // Elements without keys are those of another list once one of them is another.
    new["list"] = json!([{"n": 9}, {"n": 1}]);
    new["b"]["n"] = 1.into();
    assert_eq!(violations(&schema, &new, Some(&old)), ["list[0]: Invalid value: \"object\": n is small"]);
}

#[test]
fn a_definition_with_a_rule_that_is_none_is_refused() {
    let with = |rule: Value| json!({"type": "object", "properties": {"a": {"type": "string"}}, "x-kubernetes-validations": [rule]});
    let at = "schema.x-kubernetes-validations[0]";
    for (rule, field) in [
        (json!({"rule": "self.a =="}), "rule"),
        (json!({"rule": ""}), "rule"),
        (json!({"message": "m"}), "rule"),
        (json!({"rule": "other.a == 'x'"}), "rule"),
        (json!({"rule": "has(self)"}), "rule"),
        (json!({"rule": "self.a.all(1, true)"}), "rule"),
        (json!({"rule": "namespace"}), "rule"),
        (json!({"rule": "true", "message": "two\nlines"}), "message"),
        (json!({"rule": "true", "messageExpression": "("}), "messageExpression"),
        (json!({"rule": "true", "reason": "Whim"}), "reason"),
        (json!({"rule": "true", "fieldPath": ".b"}), "fieldPath"),
    ] {
        let told = refused(&with(rule.clone()));
        assert!(told.len() == 1 && told[0].starts_with(&format!("{at}.{field}: ")), "{rule}: {told:?}");
    }
    let below = json!({"type": "object", "properties": {"l": {"type": "array", "items":
        {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf"}]}}}});
    assert!(refused(&below)[0].starts_with("schema.properties[l].items.x-kubernetes-validations[0].rule: "));
}

#[test]
fn what_we_cannot_evaluate_is_named_and_refuses_nothing() {
    let deep = format!("{}true", "!".repeat(2) + &"true == ".repeat(300));
    let long = format!("self.a != '{}'", "x".repeat(20_000));
    let rules =
        ["url(self.a).getHost() == 'b'", "quantity('1Mi').isInteger()", r"self.a.matches(r'\Qa')", &deep, &long];
    for rule in rules {
        let schema = json!({"type": "object", "properties": {"a": {"type": "string"}}, "x-kubernetes-validations": [{"rule": rule}]});
        let mut causes = Vec::new();
        let rules = Rules::compile(&schema, "", &mut causes);
        assert_eq!((rules.ignored().len(), causes.len()), (1, 0), "{:.80}: {causes:?}", rule);
        rules.validate(&json!({"a": "x"}), None, &schema, &mut causes);
        assert_eq!(causes, []);
    }
}

/// What costs too much is refused in time, and with little memory, whatever it does.
#[test]
fn an_allowance_ends_what_does_not_end() {
    let big = json!({"list": vec!["x"; 20_000], "text": "x".repeat(1_000_000), "labels": (0..20_000).map(|n| (n.to_string(), "v".into())).collect::<serde_json::Map<String, Value>>()});
    for rule in [
        "self.list.all(a, self.list.all(b, self.list.all(c, a == b && b == c)))",
        "self.list.all(a, self.text.contains('y') || true)",
        "self.list.map(a, self.text + a).size() == 0",
        "self.list.map(a, self.text.replace('', self.text)).size() == 0",
        "self.list.map(a, self.text.split('')).size() == 0",
        "self.list.map(a, self.list + self.list).size() == 0",
        "self.list.all(a, self.text.matches('(x+x+)+y') || true)",
        "self.list.all(a, self.text.matches(self.text) || true)",
        "self.list.all(a, self.labels.all(k, self.labels == self.labels))",
        "self.list.all(a, [self.text, self.text].join(self.text).size() > 0)",
        "self.list.all(a, self.list.reverse().lastIndexOf('y') == -1)",
        "self.list.all(a, self.text.findAll('x').size() > 0)",
        "self.list.all(a, self.text < self.text || self.text.upperAscii() != self.text.substring(1))",
    ] {
        let text = json!({"type": "string"});
        let schema = json!({"type": "object", "x-kubernetes-validations": [{"rule": rule}], "properties": {
            "list": {"type": "array", "items": text}, "text": text, "labels": {"type": "object", "additionalProperties": text}}});
        let rules = compiled(&schema);
        let (begin, mut causes) = (Instant::now(), Vec::new());
        rules.validate(&big, None, &schema, &mut causes);
        let told = told(&causes);
        assert!(told.len() == 1 && told[0].contains("validation took too long"), "{rule}: {told:?}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{rule}: {:?}", begin.elapsed());
    }
    // Neither do many small violations end in as many sentences.
    let schema =
        json!({"type": "array", "items": {"type": "string", "x-kubernetes-validations": [{"rule": "self != 'x'"}]}});
    let told = violations(&schema, &big["list"], None);
    assert!(told.len() < 20_000 && told.last().unwrap().contains("validation took too long"), "{}", told.len());
}

#[test]
fn the_deepest_rule_fits_the_stack_of_a_thread_that_writes() {
    let deepest = format!("{}1 == 199", "1 + ".repeat(198));
    let nested = (0..90).fold("true".to_owned(), |inner, _| format!("[1].all(x, {inner})"));
    let schema = json!({"type": "object", "x-kubernetes-validations": [{"rule": deepest}, {"rule": nested}]});
    std::thread::Builder::new()
        .stack_size(2 << 20)
        .spawn(move || assert_eq!(violations(&schema, &json!({}), None), Vec::<String>::new()))
        .unwrap()
        .join()
        .unwrap();
}

/// Our CRDs, by kind: those that Gateway API and Istio publish.
fn published() -> BTreeMap<String, Vec<(Value, Rules)>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds");
    let mut kinds = BTreeMap::new();
    for file in std::fs::read_dir(directory).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let crd: Value = serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let schemas =
            crd["spec"]["versions"].as_array().unwrap().iter().map(|v| v["schema"]["openAPIV3Schema"].clone());
        let kind = crd["spec"]["names"]["kind"].as_str().unwrap().to_owned();
        kinds.insert(kind, schemas.map(|schema| (schema.clone(), compiled(&schema))).collect());
    }
    kinds
}

/// One change of an object that its definition takes, for each family of rules: what is refused then.
#[test]
fn the_published_rules_are_kept() {
    let kinds = published();
    let rules = json!([{
        "matches": [{"path": {"type": "PathPrefix", "value": "/a"}}],
        "filters": [
            {"type": "URLRewrite", "urlRewrite": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/b"}}},
            {"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "m", "port": 1}, "percent": 3}},
        ],
        "backendRefs": [{"name": "b", "port": 80}],
        "timeouts": {"request": "2s", "backendRequest": "1s"},
    }]);
    let good = BTreeMap::from([
        (
            "HTTPRoute",
            json!({"spec": {"parentRefs": [{"name": "g", "sectionName": "a"}, {"name": "g", "sectionName": "b"}], "rules": rules}}),
        ),
        (
            "Gateway",
            json!({"spec": {
                "gatewayClassName": "istio",
                "listeners": [
                    {"name": "a", "port": 80, "protocol": "HTTP"},
                    {"name": "b", "port": 443, "protocol": "HTTPS", "hostname": "a.example.org", "tls": {"mode": "Terminate", "certificateRefs": [{"name": "c"}]}},
                ],
                "addresses": [{"type": "Hostname", "value": "a.example.org"}, {"type": "IPAddress", "value": "10.0.0.1"}],
                "infrastructure": {"labels": {"example.org/a": "b"}, "annotations": {"a": "b"}},
            }}),
        ),
        ("GatewayClass", json!({"spec": {"controllerName": "istio.io/c"}})),
        (
            "AuthorizationPolicy",
            json!({"spec": {
            "selector": {"matchLabels": {"app": "a"}}, "rules": [{"from": [{"source": {"principals": ["p"]}}]}]}}),
        ),
        (
            "PeerAuthentication",
            json!({"spec": {"selector": {"matchLabels": {"app": "a"}}, "portLevelMtls": {"80": {"mode": "STRICT"}}}}),
        ),
        (
            "ServiceEntry",
            json!({"spec": {
            "hosts": ["a.example.org"], "addresses": ["10.0.0.0/8"], "resolution": "STATIC", "ports": [{"number": 80, "name": "http"}],
            "endpoints": [{"address": "unix:///s"}, {"address": "10.0.0.1", "ports": {"http": 8080}}]}}),
        ),
        ("WorkloadEntry", json!({"spec": {"address": "unix://@s"}})),
        ("ReferenceGrant", json!({"spec": {"from": [], "to": []}})),
    ]);
    let judge = |kind: &str, mut object: Value, old: Option<&Value>| {
        let told = kinds[kind].iter().map(|(schema, rules)| {
            schema::apply_defaults(&mut object, schema);
            let mut causes = Vec::new();
            rules.validate(&object, old, schema, &mut causes);
            told(&causes)
        });
        let told: Vec<Vec<String>> = told.collect();
        assert!(told.iter().all(|version| *version == told[0]), "{kind}: {told:?}");
        told[0].clone()
    };
    for (kind, object) in &good {
        assert_eq!(judge(kind, object.clone(), None), Vec::<String>::new(), "{kind}");
    }
    assert_eq!(kinds.len(), good.len());
    let route = "/spec/rules/0";
    let redirect = json!([{"type": "RequestRedirect", "requestRedirect": {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/b"}}}]);
    for (kind, place, value, sentence) in [
        (
            "HTTPRoute",
            "/spec/parentRefs",
            json!([{"name": "g", "sectionName": "a"}, {"name": "g"}]),
            "spec.parentRefs: Invalid value: \"array\": the same parent is named as a whole and by section",
        ),
        (
            "HTTPRoute",
            "/spec/parentRefs/1/sectionName",
            json!("a"),
            "spec.parentRefs: Invalid value: \"array\": the same section of a parent is named twice",
        ),
        ("HTTPRoute", &format!("{route}/matches/0/path/value"), json!("a"), "spec.rules[0].matches[0].path: "),
        ("HTTPRoute", &format!("{route}/matches/0/path/value"), json!("/a//b"), "spec.rules[0].matches[0].path: "),
        ("HTTPRoute", &format!("{route}/matches/0/path/value"), json!("/%zz"), "spec.rules[0].matches[0].path: "),
        (
            "HTTPRoute",
            &format!("{route}/matches/0/path/type"),
            json!("Exact"),
            "spec.rules[0]: Invalid value: \"object\": ReplacePrefixMatch",
        ),
        (
            "HTTPRoute",
            &format!("{route}/matches"),
            Value::from(vec![json!({}); 129]),
            "spec.rules: Invalid value: \"array\": a route has 128 matches at most",
        ),
        (
            "HTTPRoute",
            &format!("{route}/filters"),
            redirect,
            "spec.rules[0]: Invalid value: \"object\": what is redirected has no backend",
        ),
        ("HTTPRoute", &format!("{route}/filters/0/type"), json!("CORS"), "spec.rules[0].filters[0]: "),
        ("HTTPRoute", &format!("{route}/filters/1/type"), json!("URLRewrite"), "spec.rules[0].filters: "),
        (
            "HTTPRoute",
            &format!("{route}/filters/0/urlRewrite/path/type"),
            json!("ReplaceFullPath"),
            "spec.rules[0].filters[0].urlRewrite.path: ",
        ),
        (
            "HTTPRoute",
            &format!("{route}/filters/1/requestMirror/fraction"),
            json!({"numerator": 2, "denominator": 1}),
            "spec.rules[0].filters[1].requestMirror.fraction: ",
        ),
        ("HTTPRoute", &format!("{route}/backendRefs/0"), json!({"name": "b"}), "spec.rules[0].backendRefs[0]: "),
        ("HTTPRoute", &format!("{route}/timeouts/backendRequest"), json!("3s"), "spec.rules[0].timeouts: "),
        (
            "HTTPRoute",
            "/spec/rules/1",
            json!({"filters": [{"type": "CORS", "cors": {"allowOrigins": ["*", "https://a"]}}]}),
            "spec.rules[1].filters[0].cors.allowOrigins: ",
        ),
        (
            "Gateway",
            "/spec/listeners/1/name",
            json!("a"),
            "spec.listeners: Invalid value: \"array\": two listeners have the same name",
        ),
        (
            "Gateway",
            "/spec/listeners/1/tls/mode",
            json!("Passthrough"),
            "spec.listeners: Invalid value: \"array\": HTTPS ends at its listener",
        ),
        ("Gateway", "/spec/listeners/1/tls/certificateRefs", json!([]), "spec.listeners[1].tls: "),
        (
            "Gateway",
            "/spec/listeners/0/tls",
            json!({"mode": "Passthrough"}),
            "spec.listeners: Invalid value: \"array\": this protocol has no TLS",
        ),
        (
            "Gateway",
            "/spec/listeners/0/protocol",
            json!("TLS"),
            "spec.listeners: Invalid value: \"array\": a listener of TLS",
        ),
        ("Gateway", "/spec/addresses/0/value", json!("a b"), "spec.addresses[0]: "),
        ("Gateway", "/spec/addresses/2", json!({"type": "IPAddress", "value": "10.0.0.1"}), "spec.addresses: "),
        ("Gateway", "/spec/infrastructure/labels/a b", json!("c"), "spec.infrastructure.labels: "),
        (
            "Gateway",
            "/spec/tls",
            json!({"frontend": {"perPort": [{"port": 1}, {"port": 1}]}}),
            "spec.tls.frontend.perPort: ",
        ),
        (
            "AuthorizationPolicy",
            "/spec/targetRef",
            json!({"kind": "Service", "name": "s"}),
            "spec: Invalid value: \"object\": a policy has a selector or targets",
        ),
        ("AuthorizationPolicy", "/spec/selector/matchLabels/a*", json!("c"), "spec.selector.matchLabels: "),
        (
            "AuthorizationPolicy",
            "/spec/selector/matchLabels/a",
            json!("c*"),
            "spec.selector.matchLabels[a]: Invalid value: \"string\": ",
        ),
        (
            "AuthorizationPolicy",
            "/spec/rules/0/from/0/source/serviceAccounts",
            json!(["s"]),
            "spec.rules[0].from[0].source: ",
        ),
        ("PeerAuthentication", "/spec/portLevelMtls", json!({"0": {}}), "spec.portLevelMtls: "),
        (
            "PeerAuthentication",
            "/spec/portLevelMtls",
            json!({"http": {}}),
            "spec.portLevelMtls: Invalid value: \"object\": not an int: http evaluating rule: the keys are ports",
        ),
        (
            "PeerAuthentication",
            "/spec/selector",
            json!({}),
            "spec: Invalid value: \"object\": portLevelMtls needs a selector",
        ),
        (
            "ServiceEntry",
            "/spec/resolution",
            json!("DNS"),
            "spec: Invalid value: \"object\": only resolution STATIC and NONE go with CIDRs",
        ),
        ("ServiceEntry", "/spec/resolution", json!("NONE"), "spec: Invalid value: \"object\": resolution NONE"),
        (
            "ServiceEntry",
            "/spec/workloadSelector",
            json!({"labels": {"a": "b"}}),
            "spec: Invalid value: \"object\": endpoints are either listed or selected",
        ),
        ("ServiceEntry", "/spec/hosts/0", json!("*"), "spec.hosts[0]: "),
        ("ServiceEntry", "/spec/ports/1", json!({"number": 80, "name": "more"}), "spec.ports: "),
        ("ServiceEntry", "/spec/ports/0/number", json!(0), "spec.ports[0].number: "),
        ("ServiceEntry", "/spec/endpoints/0/address", json!("unix://s"), "spec.endpoints[0].address: "),
        ("ServiceEntry", "/spec/endpoints/0", json!({}), "spec.endpoints[0]: "),
        ("ServiceEntry", "/spec/endpoints/1/ports", json!({"a b": 1}), "spec.endpoints[1].ports: "),
        ("WorkloadEntry", "/spec/ports", json!({"a": 1}), "spec: Invalid value: \"object\": a socket has no ports"),
        ("WorkloadEntry", "/spec/address", json!("unix:///a/"), "spec.address: "),
        (
            "WorkloadEntry",
            "/spec",
            json!({"ports": {"a": 70_000}}),
            "spec: Invalid value: \"object\": address is missing",
        ),
    ] {
        let mut object = good[kind].clone();
        set(&mut object, place, value);
        let told = judge(kind, object.clone(), None);
        assert!(told.iter().any(|told| told.starts_with(sentence)), "{kind} {place}: {told:?} {object}");
    }
    let mut other = good["GatewayClass"].clone();
    other["spec"]["controllerName"] = "istio.io/d".into();
    let told = judge("GatewayClass", other, Some(&good["GatewayClass"]));
    assert_eq!(
        told,
        [
            "spec.controllerName: Invalid value: \"string\": the controller of a class never changes; write another class"
        ]
    );
}

/// Sets the value at a JSON pointer, which may continue a list or an object.
fn set(object: &mut Value, place: &str, value: Value) {
    let (parent, last) = place.rsplit_once('/').unwrap();
    match object.pointer_mut(parent).unwrap() {
        Value::Array(elements) if last == elements.len().to_string() => elements.push(value),
        Value::Array(elements) => elements[last.parse::<usize>().unwrap()] = value,
        parent => parent[last] = value,
    }
}
