//! The rules of custom resources that their definitions write in CEL (`x-kubernetes-validations`).
//!
//! A schema's rules are compiled once (`expr`); an object is walked beside them, and each is evaluated (`eval`) at the
//! places it stands for, with the object's value there as `self` (`value`). On an update a rule sees the value that was
//! there as `oldSelf`, where one can be told: fields and map entries by name, elements of lists with keys by those; a rule
//! that does not ask for it is left out where nothing changed, as Kubernetes leaves it out, so that an object from before
//! the rule can still be touched.
//!
//! What holds: an object's rules together take at most [`ALLOWANCE`] steps, at worst half a second, then the object is
//! refused; they do it on the thread that writes, never on the reactor. The evaluator does not panic; the parser, which is
//! not ours, sees the texts of definitions only. A rule that fails refuses the object. Types are not checked beforehand: a
//! rule that asks for a field the schema does not have is found out by the first object. What we cannot evaluate
//! ([`Rules::ignored`]) the definition's status names.

mod eval;
mod expr;
mod functions;
#[cfg(test)]
mod tests;
mod texts;
mod value;

use std::collections::HashMap;
use std::fmt;

use serde_json::{Value, json};

use super::error::Cause;
use super::schema::{self, ListType};
use eval::{Fault, Run};
use expr::{Compiled, Unusable};
use value::Val;

/// Steps that the rules of one object may take together. The rules of a Gateway with all its listeners take a hundredth.
const ALLOWANCE: usize = 3_000_000;

/// What telling about a violation costs, so that a message for each of many elements ends, too.
const TELLING: usize = 500;

/// As much of a rule's text as a status or a message repeats.
const SHOWN: usize = 120;

/// The rules of one schema, ready to be evaluated.
#[derive(Default)]
pub struct Rules {
    root: Node,
    ignored: Vec<String>,
}

/// The rules at and below one node of the schema; what has none is left out.
#[derive(Default)]
struct Node {
    rules: Vec<Rule>,
    properties: Vec<(String, Node)>,
    /// Below `additionalProperties`.
    values: Option<Box<Node>>,
    items: Option<Box<Node>>,
}

struct Rule {
    text: String,
    condition: Compiled,
    message: Option<String>,
    message_expression: Option<Compiled>,
    reason: Reason,
    /// Where below the node the violation is told, as it is appended to a path.
    field: String,
    optional_old: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Invalid,
    Forbidden,
    Required,
    Duplicate,
}

impl Reason {
    const ALL: [Self; 4] = [Self::Required, Self::Forbidden, Self::Invalid, Self::Duplicate];

    fn name(self) -> &'static str {
        match self {
            Self::Invalid => "FieldValueInvalid",
            Self::Forbidden => "FieldValueForbidden",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
        }
    }
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").field("ignored", &self.ignored).finish_non_exhaustive()
    }
}

impl Rules {
    /// Compiles the rules of a schema, which stands at `at` in its definition; what no API server takes is told in
    /// `causes`.
    pub fn compile(schema: &Value, at: &str, causes: &mut Vec<Cause>) -> Self {
        let mut compiler = Compiler { ignored: Vec::new(), causes };
        let root = compiler.node(schema, at, "", Tracked::Yes).unwrap_or_default();
        Self { root, ignored: compiler.ignored }
    }

    /// The rules that are not evaluated: field, rule and reason of each.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// Evaluates the rules on an object that is as its schema says.
    pub fn validate(&self, object: &Value, old: Option<&Value>, schema: &Value, causes: &mut Vec<Cause>) {
        let mut walk = Walk { run: Run::new(ALLOWANCE), causes };
        let place = Place { value: object, old, schema, unchanged: false };
        if let Err(Spent { field }) = walk.node(&self.root, place, "") {
            let detail = "validation took too long: no further rules are evaluated";
            walk.causes.push(invalid(field, "object", detail));
        }
    }
}

/// Whether the value that was there before can be told at a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tracked {
    Yes,
    /// Below a list whose elements have no keys.
    No,
}

struct Compiler<'c> {
    ignored: Vec<String>,
    causes: &'c mut Vec<Cause>,
}

impl Compiler<'_> {
    /// `at`: in the definition; `field`: in the object.
    fn node(&mut self, schema: &Value, at: &str, field: &str, tracked: Tracked) -> Option<Node> {
        let mut node = Node::default();
        let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
        for (index, rule) in rules.enumerate() {
            let at = format!("{at}.x-kubernetes-validations[{index}]");
            node.rules.extend(self.rule(rule, schema, &at, field, tracked));
        }
        for (name, child) in schema["properties"].as_object().into_iter().flatten() {
            let at = format!("{at}.properties[{name}]");
            let child = self.node(child, &at, &schema::join(field, name), tracked);
            node.properties.extend(child.map(|child| (name.clone(), child)));
        }
        let values = &schema["additionalProperties"];
        if values.is_object() {
            let child = self.node(values, &format!("{at}.additionalProperties"), &format!("{field}[*]"), tracked);
            node.values = child.map(Box::new);
        }
        let items = &schema["items"];
        if items.is_object() {
            let tracked = match schema::list_type(schema) {
                ListType::Map(_) => tracked,
                ListType::Atomic | ListType::Set => Tracked::No,
            };
            node.items = self.node(items, &format!("{at}.items"), &format!("{field}[*]"), tracked).map(Box::new);
        }
        let empty =
            node.rules.is_empty() && node.properties.is_empty() && node.values.is_none() && node.items.is_none();
        (!empty).then_some(node)
    }

    fn rule(&mut self, rule: &Value, schema: &Value, at: &str, field: &str, tracked: Tracked) -> Option<Rule> {
        let text = rule["rule"].as_str().unwrap_or_default().trim();
        if text.is_empty() {
            self.causes.push(Cause::required(format!("{at}.rule"), "rule is not specified"));
            return None;
        }
        let message = rule["message"].as_str().map(str::trim);
        if message.is_some_and(|message| message.is_empty() || message.contains('\n')) {
            let detail = "message must be a line of text";
            self.causes.push(Cause::invalid(format!("{at}.message"), &rule["message"], detail));
        }
        let reason = self.reason(&rule["reason"], at);
        let told_at = match rule["fieldPath"].as_str() {
            Some(path) => relative_path(path, schema),
            None => Some(String::new()),
        };
        if told_at.is_none() {
            let detail = "fieldPath must be a valid path to a field below";
            self.causes.push(Cause::invalid(format!("{at}.fieldPath"), &rule["fieldPath"], detail));
        }
        let condition = match expr::compile(text) {
            Ok(compiled) => compiled,
            Err(Unusable::Wrong(why)) => {
                let detail = format!("compilation failed: {why}");
                self.causes.push(Cause::invalid(format!("{at}.rule"), &text.into(), &detail));
                return None;
            }
            Err(Unusable::Unsupported(why)) => {
                self.ignored.push(format!("{}: {} ({why})", named(field.to_owned()), shorten(text)));
                return None;
            }
        };
        if condition.uses_old && tracked == Tracked::No {
            let detail = "oldSelf cannot be used below a list that is not of type map";
            self.causes.push(Cause::invalid(format!("{at}.rule"), &text.into(), detail));
        }
        let message_expression = match rule["messageExpression"].as_str().map(expr::compile) {
            None | Some(Err(Unusable::Unsupported(_))) => None,
            Some(Ok(compiled)) => Some(compiled),
            Some(Err(Unusable::Wrong(why))) => {
                let detail = format!("messageExpression compilation failed: {why}");
                self.causes.push(Cause::invalid(
                    format!("{at}.messageExpression"),
                    &rule["messageExpression"],
                    &detail,
                ));
                None
            }
        };
        Some(Rule {
            text: text.to_owned(),
            condition,
            message: message.map(str::to_owned),
            message_expression,
            reason,
            field: told_at.unwrap_or_default(),
            optional_old: rule["optionalOldSelf"] == true,
        })
    }

    fn reason(&mut self, told: &Value, at: &str) -> Reason {
        let Some(name) = told.as_str() else { return Reason::Invalid };
        let known = Reason::ALL.into_iter().find(|reason| reason.name() == name);
        if known.is_none() {
            let names = Reason::ALL.map(|reason| reason.name().to_owned());
            self.causes.push(Cause::not_supported(format!("{at}.reason"), told, &names));
        }
        known.unwrap_or(Reason::Invalid)
    }
}

/// `.a.b['c']` as it continues the path of a node, if its schema has that field.
fn relative_path(path: &str, schema: &Value) -> Option<String> {
    let mut told = String::new();
    let mut schema = schema;
    let mut rest = path.trim();
    while !rest.is_empty() {
        let name;
        if let Some(quoted) = rest.strip_prefix("['") {
            (name, rest) = quoted.split_once("']")?;
        } else {
            let field = rest.strip_prefix('.')?;
            (name, rest) = field.split_at(field.find(['.', '[']).unwrap_or(field.len()));
        }
        let property = schema["properties"].get(name);
        told.push_str(&if property.is_some() { format!(".{name}") } else { format!("[{name}]") });
        schema = schema::child(schema, name)?;
    }
    (!told.is_empty()).then_some(told)
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// A value of the object, with what was there before.
#[derive(Clone, Copy)]
struct Place<'v> {
    value: &'v Value,
    old: Option<&'v Value>,
    schema: &'v Value,
    /// It, or something around it, is what it was.
    unchanged: bool,
}

struct Walk<'v, 'c> {
    run: Run<'v>,
    causes: &'c mut Vec<Cause>,
}

/// The allowance was spent at a field.
struct Spent {
    field: String,
}

impl<'v> Walk<'v, '_> {
    fn node(&mut self, node: &'v Node, mut place: Place<'v>, field: &str) -> Result<(), Spent> {
        // A null is what the node around it makes of it.
        if place.value.is_null() {
            return Ok(());
        }
        place.unchanged |= place.old == Some(place.value);
        for rule in &node.rules {
            self.rule(rule, place, field).map_err(|_| Spent { field: named(field.to_owned()) })?;
        }
        match place.value {
            Value::Object(fields) => {
                for (name, child) in &node.properties {
                    if let (Some(value), Some(schema)) = (fields.get(name), place.schema["properties"].get(name)) {
                        let old = place.old.and_then(|old| old.get(name));
                        self.node(child, Place { value, old, schema, ..place }, &schema::join(field, name))?;
                    }
                }
                if let Some(child) = &node.values {
                    for (key, value) in fields {
                        let old = place.old.and_then(|old| old.get(key));
                        let schema = &place.schema["additionalProperties"];
                        self.node(child, Place { value, old, schema, ..place }, &format!("{field}[{key}]"))?;
                    }
                }
            }
            Value::Array(elements) => {
                if let Some(child) = &node.items {
                    let before = Before::new(place);
                    let schema = &place.schema["items"];
                    for (index, value) in elements.iter().enumerate() {
                        let old = before.of(value);
                        self.node(child, Place { value, old, schema, ..place }, &format!("{field}[{index}]"))?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Evaluates one rule.
    ///
    /// # Errors
    /// Only that the allowance is spent.
    fn rule(&mut self, rule: &'v Rule, place: Place<'v>, field: &str) -> Result<(), Fault> {
        let old = place.old.filter(|old| !old.is_null()).map(|old| Val::of(old, place.schema));
        let old = match (rule.condition.uses_old, rule.optional_old) {
            (true, true) => old.map_or(Val::Optional(None), Val::some),
            (true, false) => match old {
                Some(old) => old,
                None => return Ok(()),
            },
            (false, _) if place.unchanged => return Ok(()),
            (false, _) => Val::Null,
        };
        let this = Val::of(place.value, place.schema);
        let detail = match self.run.evaluate(&rule.condition.expr, this.clone(), old.clone()) {
            Ok(Val::Bool(true)) => return Ok(()),
            Ok(Val::Bool(false)) => self.message(rule, this, old)?,
            Ok(other) => format!("a {} evaluating rule: {}", other.type_name(), rule.sentence()),
            Err(Fault::Wrong(why)) => format!("{why} evaluating rule: {}", rule.sentence()),
            Err(fault @ (Fault::Spent | Fault::Overload)) => return Err(fault),
        };
        self.run.spend(TELLING)?;
        let field = named(format!("{field}{}", rule.field).trim_start_matches('.').to_owned());
        let kind = if schema::is_int_or_string(place.schema) {
            schema::type_name(place.value)
        } else {
            place.schema["type"].as_str().unwrap_or_else(|| schema::type_name(place.value))
        };
        self.causes.push(match rule.reason {
            Reason::Invalid => invalid(field, kind, &detail),
            Reason::Forbidden => Cause::forbidden(field, &detail),
            Reason::Required => Cause::required(field, &detail),
            Reason::Duplicate => {
                let message = format!("Duplicate value: {kind:?}: {detail}");
                Cause { reason: rule.reason.name(), field, message }
            }
        });
        Ok(())
    }

    /// What a violated rule says: its expression for that, else its message, else itself.
    fn message(&mut self, rule: &'v Rule, this: Val<'v>, old: Val<'v>) -> Result<String, Fault> {
        if let Some(expression) = &rule.message_expression {
            match self.run.evaluate(&expression.expr, this, old) {
                Ok(Val::Text(text)) if !text.trim().is_empty() && !text.contains('\n') => {
                    return Ok(text.trim().chars().take(MESSAGE).collect());
                }
                Err(Fault::Spent) => return Err(Fault::Spent),
                _ => {}
            }
        }
        Ok(rule.message.clone().unwrap_or_else(|| format!("failed rule: {}", rule.text)))
    }
}

/// Characters of a message that an expression made.
const MESSAGE: usize = 5 * 1024;

impl Rule {
    fn sentence(&self) -> String {
        self.message.clone().unwrap_or_else(|| shorten(&self.text))
    }
}

/// The elements of a list as they were, by their keys.
struct Before<'v> {
    keys: Vec<String>,
    elements: HashMap<String, &'v Value>,
}

impl<'v> Before<'v> {
    fn new(place: Place<'v>) -> Self {
        let mut before = Self { keys: Vec::new(), elements: HashMap::new() };
        if let ListType::Map(keys) = schema::list_type(place.schema) {
            before.keys = keys;
            let elements = place.old.and_then(Value::as_array).into_iter().flatten();
            before.elements = elements.map(|element| (before.key(element), element)).collect();
        }
        before
    }

    fn key(&self, element: &Value) -> String {
        json!(self.keys.iter().map(|key| &element[key.as_str()]).collect::<Vec<_>>()).to_string()
    }

    fn of(&self, element: &Value) -> Option<&'v Value> {
        if self.elements.is_empty() { None } else { self.elements.get(&self.key(element)).copied() }
    }
}

fn invalid(field: String, kind: &str, detail: &str) -> Cause {
    Cause::invalid(field, &kind.into(), detail)
}

fn named(field: String) -> String {
    if field.is_empty() { "<nil>".to_owned() } else { field }
}
