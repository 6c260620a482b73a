//! Evaluates an expression. Every step and every byte looked at or made costs, so that an expression ends when its
//! allowance does, whatever the object: loops in loops, a text repeated for each element of a list. Nothing here panics:
//! arithmetic is checked, places are asked for, and recursion is as deep as the expression (`expr`) or the object
//! (`depth`).

use std::cmp::Ordering;
use std::rc::Rc;

use super::expr::{Expr, Loop, LoopKind, OLD_SELF};
use super::value::{self, List, Map, Text, Val};

/// How an evaluation fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The allowance is spent.
    Spent,
    /// Operator or function does not take what it was given.
    Overload,
    Wrong(String),
}

pub type Outcome<'v> = Result<Val<'v>, Fault>;

impl Fault {
    pub fn wrong<T>(what: impl Into<String>) -> Result<T, Self> {
        Err(Self::Wrong(what.into()))
    }
}

/// What evaluations on behalf of one object share.
pub struct Run<'v> {
    /// Steps that may still be taken.
    left: usize,
    variables: Vec<Val<'v>>,
}

impl<'v> Run<'v> {
    pub fn new(allowance: usize) -> Self {
        Self { left: allowance, variables: Vec::new() }
    }

    /// The value of an expression.
    ///
    /// # Errors
    /// What Kubernetes calls an evaluation error, or that the allowance is spent.
    pub fn evaluate(&mut self, expr: &'v Expr, this: Val<'v>, old: Val<'v>) -> Outcome<'v> {
        self.variables.clear();
        self.variables.extend([this, old]);
        debug_assert_eq!(self.variables.len(), OLD_SELF + 1);
        self.eval(expr)
    }

    /// # Errors
    /// When no more may be spent.
    pub fn spend(&mut self, steps: usize) -> Result<(), Fault> {
        match self.left.checked_sub(steps) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => {
                self.left = 0;
                Err(Fault::Spent)
            }
        }
    }

    /// Pays for bytes that are looked at or made.
    ///
    /// # Errors
    /// When no more may be spent.
    pub fn spend_bytes(&mut self, bytes: usize) -> Result<(), Fault> {
        self.spend(bytes / 8)
    }

    fn eval(&mut self, expr: &'v Expr) -> Outcome<'v> {
        self.spend(1)?;
        match expr {
            Expr::Null => Ok(Val::Null),
            Expr::Bool(yes) => Ok(Val::Bool(*yes)),
            Expr::Int(number) => Ok(Val::Int(*number)),
            Expr::UInt(number) => Ok(Val::UInt(*number)),
            Expr::Double(number) => Ok(Val::Double(*number)),
            Expr::Text(text) => Ok(Val::Text(Text::Stored(text))),
            Expr::Bytes(bytes) => Ok(Val::Bytes(bytes.as_slice().into())),
            Expr::Type(name) => Ok(Val::Type(name)),
            Expr::Variable(place) => match self.variables.get(*place) {
                Some(value) => Ok(value.clone()),
                None => Fault::wrong("unbound variable"),
            },
            Expr::List(elements) => self.eval_all(elements).map(Val::list),
            Expr::Map(entries) => self.make_map(entries),
            Expr::Select(of, field) => {
                let of = self.eval(of)?;
                select(&of, field)
            }
            Expr::Has(of, field) => {
                let of = self.eval(of)?;
                Ok(Val::Bool(find(&of, field)?.is_some()))
            }
            Expr::Maybe(of, field) => match self.eval(of)? {
                Val::Optional(None) => Ok(Val::Optional(None)),
                of => Ok(Val::Optional(find(&of, field)?.map(Rc::new))),
            },
            Expr::And(a, b) => self.both(a, b, false),
            Expr::Or(a, b) => self.both(a, b, true),
            Expr::If(parts) => {
                let [condition, then, otherwise] = parts.as_ref();
                let branch = if self.eval_bool(condition)? { then } else { otherwise };
                self.eval(branch)
            }
            Expr::Loop(over) => self.run_loop(over),
            Expr::Matches(text, pattern) => match self.eval(text)? {
                Val::Text(text) => {
                    self.spend_match(&text, pattern.as_str())?;
                    Ok(Val::Bool(pattern.is_match(&text)))
                }
                other => Fault::wrong(format!("no such overload: {}.matches(string)", other.type_name())),
            },
            Expr::Call(function, args) => {
                let args = self.eval_all(args)?;
                match (function.run)(self, &args) {
                    Err(Fault::Overload) => {
                        let types: Vec<_> = args.iter().map(Val::type_name).collect();
                        Fault::wrong(format!("no such overload: {}({})", function.name, types.join(", ")))
                    }
                    outcome => outcome,
                }
            }
        }
    }

    /// A pattern costs by its length, too.
    ///
    /// # Errors
    /// When no more may be spent.
    pub fn spend_match(&mut self, text: &str, pattern: &str) -> Result<(), Fault> {
        self.spend_bytes((text.len() + 8).saturating_mul(1 + pattern.len() / 8))
    }

    fn eval_all(&mut self, exprs: &'v [Expr]) -> Result<Vec<Val<'v>>, Fault> {
        exprs.iter().map(|expr| self.eval(expr)).collect()
    }

    fn eval_bool(&mut self, expr: &'v Expr) -> Result<bool, Fault> {
        match self.eval(expr)? {
            Val::Bool(yes) => Ok(yes),
            other => Fault::wrong(format!("no such overload: {} where a bool is asked for", other.type_name())),
        }
    }

    /// `&&` and `||`: either side alone may decide, even if the other one fails.
    fn both(&mut self, a: &'v Expr, b: &'v Expr, deciding: bool) -> Outcome<'v> {
        match self.eval_bool(a) {
            Err(Fault::Spent) => Err(Fault::Spent),
            Ok(a) if a == deciding => Ok(Val::Bool(a)),
            Ok(_) => self.eval_bool(b).map(Val::Bool),
            Err(fault) => match self.eval_bool(b) {
                Ok(b) if b == deciding => Ok(Val::Bool(b)),
                Err(Fault::Spent) => Err(Fault::Spent),
                _ => Err(fault),
            },
        }
    }

    fn make_map(&mut self, exprs: &'v [(Expr, Expr)]) -> Outcome<'v> {
        let mut entries: Vec<(Val<'v>, Val<'v>)> = Vec::with_capacity(exprs.len());
        for (key, value) in exprs {
            let (key, value) = (self.eval(key)?, self.eval(value)?);
            for (other, _) in &entries {
                if self.equal(other, &key)? {
                    return Fault::wrong("a map has each key once");
                }
            }
            entries.push((key, value));
        }
        Ok(Val::Map(Map::Made(Rc::new(entries))))
    }

    fn run_loop(&mut self, over: &'v Loop) -> Outcome<'v> {
        let range = self.eval(&over.over)?;
        let outside = self.variables.len();
        let outcome = match &range {
            Val::List(list) => {
                let mut elements = list.iter().enumerate();
                self.turn(over, &mut || {
                    elements
                        .next()
                        .map(|(place, element)| (Val::Int(i64::try_from(place).unwrap_or(i64::MAX)), element))
                })
            }
            Val::Map(map) => {
                self.spend(map.len())?;
                let mut entries = map.entries().into_iter();
                self.turn(over, &mut || {
                    entries.next().map(|(key, value)| if over.pairs { (key, value) } else { (Val::Null, key) })
                })
            }
            other => Fault::wrong(format!("no such overload: a loop over {}", other.type_name())),
        };
        self.variables.truncate(outside);
        outcome
    }

    /// The loop itself; `next` yields the pair of variables, of which a loop with one takes the second.
    fn turn(&mut self, over: &'v Loop, next: &mut dyn FnMut() -> Option<(Val<'v>, Val<'v>)>) -> Outcome<'v> {
        let outside = self.variables.len();
        let mut failed = None;
        let mut found = 0;
        let mut made = Vec::new();
        while let Some((first, second)) = next() {
            self.spend(2)?;
            self.variables.truncate(outside);
            if over.pairs {
                self.variables.push(first);
            }
            self.variables.push(second.clone());
            match over.kind {
                LoopKind::All | LoopKind::Exists => {
                    let deciding = over.kind == LoopKind::Exists;
                    match self.eval_bool(&over.body) {
                        Ok(yes) if yes == deciding => return Ok(Val::Bool(yes)),
                        Ok(_) => {}
                        Err(Fault::Spent) => return Err(Fault::Spent),
                        // A later element may decide.
                        Err(fault) => failed = Some(fault),
                    }
                }
                LoopKind::ExistsOne => found += usize::from(self.eval_bool(&over.body)?),
                LoopKind::Filter => {
                    if self.eval_bool(&over.body)? {
                        made.push(second);
                    }
                }
                LoopKind::Map => {
                    let wanted = match &over.condition {
                        Some(condition) => self.eval_bool(condition)?,
                        None => true,
                    };
                    if wanted {
                        made.push(self.eval(&over.body)?);
                    }
                }
            }
        }
        match (over.kind, failed) {
            (_, Some(fault)) => Err(fault),
            (LoopKind::All, None) => Ok(Val::Bool(true)),
            (LoopKind::Exists, None) => Ok(Val::Bool(false)),
            (LoopKind::ExistsOne, None) => Ok(Val::Bool(found == 1)),
            (LoopKind::Map | LoopKind::Filter, None) => Ok(Val::list(made)),
        }
    }

    /// `a == b`: numbers of different types compare by value, sets without regard to order.
    ///
    /// # Errors
    /// When no more may be spent.
    pub fn equal(&mut self, a: &Val<'v>, b: &Val<'v>) -> Result<bool, Fault> {
        self.spend(1)?;
        Ok(match (a, b) {
            (Val::Null, Val::Null) => true,
            (Val::Bool(a), Val::Bool(b)) => a == b,
            (Val::Int(_) | Val::UInt(_) | Val::Double(_), Val::Int(_) | Val::UInt(_) | Val::Double(_)) => {
                compare_numbers(a, b) == Some(Ordering::Equal)
            }
            (Val::Text(a), Val::Text(b)) => {
                self.spend_bytes(a.len().min(b.len()))?;
                **a == **b
            }
            (Val::Bytes(a), Val::Bytes(b)) => {
                self.spend_bytes(a.len().min(b.len()))?;
                a == b
            }
            (Val::Duration(a), Val::Duration(b)) => a == b,
            (Val::Timestamp(a), Val::Timestamp(b)) => a == b,
            (Val::Type(a), Val::Type(b)) => a == b,
            (Val::Optional(None), Val::Optional(None)) => true,
            (Val::Optional(Some(a)), Val::Optional(Some(b))) => self.equal(a, b)?,
            (Val::List(a), Val::List(b)) => self.equal_lists(a, b)?,
            (Val::Map(a), Val::Map(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                self.spend(a.len())?;
                for (key, value) in a.entries() {
                    match self.entry(b, &key)? {
                        Some(other) if self.equal(&value, &other)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Val::Object(a, schema), Val::Object(b, _)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (name, value) in *a {
                    let Some(other) = b.get(name) else { return Ok(false) };
                    let known = &schema["properties"][name.as_str()];
                    if !self.equal(&Val::of(value, known), &Val::of(other, known))? {
                        return Ok(false);
                    }
                }
                true
            }
            _ => false,
        })
    }

    fn equal_lists(&mut self, a: &List<'v>, b: &List<'v>) -> Result<bool, Fault> {
        if a.len() != b.len() {
            return Ok(false);
        }
        if a.identity().is_some() {
            for element in a.iter() {
                if !self.contains(b, &element)? {
                    return Ok(false);
                }
            }
            return Ok(true);
        }
        for (a, b) in a.iter().zip(b.iter()) {
            if !self.equal(&a, &b)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// `element in list`.
    ///
    /// # Errors
    /// When no more may be spent.
    pub fn contains(&mut self, list: &List<'v>, element: &Val<'v>) -> Result<bool, Fault> {
        for other in list.iter() {
            if self.equal(&other, element)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// `map[key]`.
    ///
    /// # Errors
    /// When no more may be spent.
    pub fn entry(&mut self, map: &Map<'v>, key: &Val<'v>) -> Result<Option<Val<'v>>, Fault> {
        match map {
            Map::Stored(entries, schema) => Ok(match key {
                Val::Text(key) => entries.get(&**key).map(|value| Val::of(value, schema)),
                _ => None,
            }),
            Map::Made(entries) => {
                for (other, value) in entries.iter() {
                    if self.equal(other, key)? {
                        return Ok(Some(value.clone()));
                    }
                }
                Ok(None)
            }
        }
    }

    /// `list + list`: a set takes what it has not, a list with keys takes the other's elements for its own.
    ///
    /// # Errors
    /// When no more may be spent.
    pub fn join_lists(&mut self, a: &List<'v>, b: &List<'v>) -> Outcome<'v> {
        self.spend(2 * (a.len() + b.len()))?;
        let mut made: Vec<Val<'v>> = a.iter().collect();
        let Some(keys) = a.identity() else {
            made.extend(b.iter());
            return Ok(Val::list(made));
        };
        for element in b.iter() {
            let mut same = None;
            for (place, ours) in made.iter().enumerate() {
                if self.same_element(ours, &element, &keys)? {
                    same = Some(place);
                    break;
                }
            }
            match same.and_then(|place| made.get_mut(place)) {
                Some(ours) => *ours = element,
                None => made.push(element),
            }
        }
        Ok(Val::list(made))
    }

    fn same_element(&mut self, a: &Val<'v>, b: &Val<'v>, keys: &[&str]) -> Result<bool, Fault> {
        let (Val::Object(a, schema), Val::Object(b, _), false) = (a, b, keys.is_empty()) else {
            return self.equal(a, b);
        };
        for key in keys {
            let known = &schema["properties"][*key];
            let same = match (a.get(*key), b.get(*key)) {
                (Some(a), Some(b)) => self.equal(&Val::of(a, known), &Val::of(b, known))?,
                (None, None) => true,
                _ => false,
            };
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// `of.field`.
fn select<'v>(of: &Val<'v>, field: &str) -> Outcome<'v> {
    match find(of, field)? {
        // What is selected of an optional value is optional.
        found if matches!(of, Val::Optional(_)) => Ok(Val::Optional(found.map(Rc::new))),
        Some(value) => Ok(value),
        None => Fault::wrong(format!("no such key: {field}")),
    }
}

/// The field, if the value has it.
fn find<'v>(of: &Val<'v>, field: &str) -> Result<Option<Val<'v>>, Fault> {
    match of {
        Val::Object(fields, schema) => match value::property(schema, field) {
            Some((name, known)) => Ok(fields.get(name).map(|value| Val::of(value, known))),
            None => Fault::wrong(format!("undefined field '{field}'")),
        },
        Val::Map(Map::Stored(entries, schema)) => Ok(entries.get(field).map(|value| Val::of(value, schema))),
        Val::Map(Map::Made(entries)) => {
            let found = entries.iter().find(|(key, _)| matches!(key, Val::Text(key) if **key == *field));
            Ok(found.map(|(_, value)| value.clone()))
        }
        Val::Optional(None) => Ok(None),
        Val::Optional(Some(of)) => find(of, field),
        other => Fault::wrong(format!("no such overload: {}.{field}", other.type_name())),
    }
}

/// `a < b` and its like; `None`: there is no order between them.
pub fn compare(a: &Val<'_>, b: &Val<'_>) -> Result<Option<Ordering>, Fault> {
    Ok(match (a, b) {
        (Val::Int(_) | Val::UInt(_) | Val::Double(_), Val::Int(_) | Val::UInt(_) | Val::Double(_)) => {
            compare_numbers(a, b)
        }
        (Val::Text(a), Val::Text(b)) => Some((**a).cmp(&**b)),
        (Val::Bytes(a), Val::Bytes(b)) => Some(a.cmp(b)),
        (Val::Bool(a), Val::Bool(b)) => Some(a.cmp(b)),
        (Val::Duration(a), Val::Duration(b)) => Some(a.cmp(b)),
        (Val::Timestamp(a), Val::Timestamp(b)) => Some(a.cmp(b)),
        _ => return Err(Fault::Overload),
    })
}

fn compare_numbers(a: &Val<'_>, b: &Val<'_>) -> Option<Ordering> {
    let whole = |value: &Val<'_>| match value {
        Val::Int(number) => Some(i128::from(*number)),
        Val::UInt(number) => Some(i128::from(*number)),
        _ => None,
    };
    let float = |value: &Val<'_>| match value {
        Val::Double(number) => *number,
        other => whole(other).map_or(f64::NAN, |number| number as f64),
    };
    match (whole(a), whole(b)) {
        (Some(a), Some(b)) => Some(a.cmp(&b)),
        _ => float(a).partial_cmp(&float(b)),
    }
}

/// A place in a list, from a number of whatever type.
pub fn place(number: &Val<'_>) -> Result<Option<usize>, Fault> {
    match number {
        Val::Int(number) => Ok(usize::try_from(*number).ok()),
        Val::UInt(number) => Ok(usize::try_from(*number).ok()),
        Val::Double(number) if number.fract() == 0.0 => Ok((*number >= 0.0).then_some(*number as usize)),
        _ => Err(Fault::Overload),
    }
}
