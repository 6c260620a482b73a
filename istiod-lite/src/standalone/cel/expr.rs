//! From the text of a rule to an expression that can be evaluated: names become places, functions are found. The `cel`
//! crate parses; what it would need to evaluate, we do not use (see ARCHITECTURE.md, decisions).

use std::thread;

use ::cel::common::ast::{EntryExpr, Expr as Parsed, IdedExpr, LiteralValue, operators};
use regex::Regex;

use super::functions::{self, Function};
use super::texts;

/// Longest text that is parsed, in bytes: ten times what the longest published rules have.
const LONGEST: usize = 16 * 1024;

/// Most levels of an expression: evaluation recurses, on a thread with 2 MiB of stack.
const DEEPEST: usize = 200;

/// Stack of the thread that parses; the parser needs tens of kilobytes for each level, in a debug build.
const PARSER_STACK: usize = 64 << 20;

/// Where an evaluation finds `self`; `oldSelf` comes next, then the variables of loops.
pub const SELF: usize = 0;
pub const OLD_SELF: usize = 1;

pub enum Expr {
    Null,
    Bool(bool),
    Int(i64),
    UInt(u64),
    Double(f64),
    Text(String),
    Bytes(Vec<u8>),
    Type(&'static str),
    Variable(usize),
    List(Vec<Expr>),
    Map(Vec<(Expr, Expr)>),
    Select(Box<Expr>, String),
    Has(Box<Expr>, String),
    /// `a.?b`
    Maybe(Box<Expr>, String),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    If(Box<[Expr; 3]>),
    Loop(Box<Loop>),
    /// A pattern that does not depend on the object.
    Matches(Box<Expr>, Regex),
    Call(&'static Function, Vec<Expr>),
}

/// `over.all(x, body)` and its like.
pub struct Loop {
    pub kind: LoopKind,
    pub over: Expr,
    /// Whether two variables are bound: place and element, key and value.
    pub pairs: bool,
    pub condition: Option<Expr>,
    pub body: Expr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoopKind {
    All,
    Exists,
    ExistsOne,
    /// The bodies' values, of those that meet the condition.
    Map,
    /// The elements themselves whose body is true.
    Filter,
}

/// Why there is no expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// No API server takes it.
    #[error("{0}")]
    Wrong(String),
    /// It may well be a rule, but not to us.
    #[error("{0}")]
    Unsupported(String),
}

/// An expression, and whether it speaks of `oldSelf`.
pub struct Compiled {
    pub expr: Expr,
    pub uses_old: bool,
}

/// Reads an expression.
///
/// # Errors
/// What is wrong with it, or what we lack.
pub fn compile(text: &str) -> Result<Compiled, Unusable> {
    if text.len() > LONGEST {
        return Err(Unusable::Unsupported(format!("longer than {LONGEST} bytes")));
    }
    // Its own thread: for the stack. Where panics unwind (not in a release build) one of the parser's costs the rule only.
    thread::scope(|scope| {
        let parsing = thread::Builder::new().name("cel".into()).stack_size(PARSER_STACK);
        let parsing = parsing.spawn_scoped(scope, || parse(text)).map_err(|e| Unusable::Unsupported(e.to_string()))?;
        parsing.join().unwrap_or_else(|_| Err(Unusable::Unsupported("the parser gave up".into())))
    })
}

fn parse(text: &str) -> Result<Compiled, Unusable> {
    // An environment without macros leaves `all`, `has` and their like as the calls they are written as.
    let parsed = ::cel::Env::default().parser().parse(text).map_err(|errors| {
        let first = errors.errors.first();
        let told = first.map(|e| format!("{}:{}: {}", e.pos.0, e.pos.1, e.msg));
        Unusable::Wrong(told.unwrap_or_else(|| "not an expression".into()))
    })?;
    let mut reader = Reader { bound: Vec::new(), uses_old: false };
    let expr = reader.read(&parsed, DEEPEST)?;
    Ok(Compiled { expr, uses_old: reader.uses_old })
}

struct Reader {
    /// Variables of the loops around, outermost first.
    bound: Vec<String>,
    uses_old: bool,
}

impl Reader {
    fn read(&mut self, parsed: &IdedExpr, levels: usize) -> Result<Expr, Unusable> {
        let Some(levels) = levels.checked_sub(1) else {
            return Err(Unusable::Unsupported(format!("nested deeper than {DEEPEST} levels")));
        };
        match &parsed.expr {
            Parsed::Literal(literal) => Ok(read_literal(literal)),
            Parsed::Ident(name) => self.read_name(name),
            Parsed::Select(select) => {
                let of = Box::new(self.read(&select.operand, levels)?);
                Ok(Expr::Select(of, select.field.clone()))
            }
            Parsed::List(list) if list.optional_indices.is_empty() => {
                self.read_all(&list.elements, levels).map(Expr::List)
            }
            Parsed::Map(map) => {
                let entries = map.entries.iter().map(|entry| match &entry.expr {
                    EntryExpr::MapEntry(entry) if !entry.optional => {
                        Ok((self.read(&entry.key, levels)?, self.read(&entry.value, levels)?))
                    }
                    _ => Err(Unusable::Unsupported("optional entries".into())),
                });
                entries.collect::<Result<_, _>>().map(Expr::Map)
            }
            Parsed::Call(call) => self.read_call(&call.func_name, call.target.as_deref(), &call.args, levels),
            Parsed::Struct(made) => Err(Unusable::Unsupported(format!("messages of type {:?}", made.type_name))),
            Parsed::List(_) => Err(Unusable::Unsupported("optional elements".into())),
            Parsed::Comprehension(_) | Parsed::Unspecified => Err(Unusable::Unsupported("its shape".into())),
        }
    }

    fn read_all(&mut self, parsed: &[IdedExpr], levels: usize) -> Result<Vec<Expr>, Unusable> {
        parsed.iter().map(|one| self.read(one, levels)).collect()
    }

    fn read_name(&mut self, name: &str) -> Result<Expr, Unusable> {
        if let Some(place) = self.bound.iter().rposition(|bound| bound == name) {
            return Ok(Expr::Variable(OLD_SELF + 1 + place));
        }
        match name {
            "self" => Ok(Expr::Variable(SELF)),
            "oldSelf" => {
                self.uses_old = true;
                Ok(Expr::Variable(OLD_SELF))
            }
            _ => match functions::TYPES.iter().find(|known| **known == name) {
                Some(known) => Ok(Expr::Type(known)),
                None => Err(Unusable::Wrong(format!("undeclared reference to '{name}'"))),
            },
        }
    }

    fn read_call(
        &mut self,
        name: &str,
        target: Option<&IdedExpr>,
        args: &[IdedExpr],
        levels: usize,
    ) -> Result<Expr, Unusable> {
        let mut read = |parsed: &IdedExpr| self.read(parsed, levels).map(Box::new);
        match (name, target, args) {
            (operators::LOGICAL_AND, None, [a, b]) => return Ok(Expr::And(read(a)?, read(b)?)),
            (operators::LOGICAL_OR, None, [a, b]) => return Ok(Expr::Or(read(a)?, read(b)?)),
            (operators::CONDITIONAL, None, [a, b, c]) => {
                return Ok(Expr::If(Box::new([*read(a)?, *read(b)?, *read(c)?])));
            }
            (operators::OPT_SELECT, None, [of, field]) => {
                return match &field.expr {
                    Parsed::Literal(LiteralValue::String(field)) => {
                        Ok(Expr::Maybe(read(of)?, field.inner().to_owned()))
                    }
                    _ => Err(Unusable::Wrong("a field is selected by its name".into())),
                };
            }
            (operators::HAS, None, [field]) => {
                return match &field.expr {
                    Parsed::Select(select) => Ok(Expr::Has(read(&select.operand)?, select.field.clone())),
                    _ => Err(Unusable::Wrong("invalid argument to has() macro".into())),
                };
            }
            _ => {}
        }
        if let Some(target) = target
            && let Some((kind, pairs, condition, body)) = loop_shape(name, args)
        {
            return self.read_loop(kind, pairs, target, args, condition, body, levels);
        }
        // `sets.contains(a, b)` is a function of two arguments, whatever it looks like.
        let space = target.and_then(|target| match &target.expr {
            Parsed::Ident(space) if !self.bound.contains(space) => {
                functions::find(&format!("{space}.{name}"), false, args.len())
            }
            _ => None,
        });
        if let Some(function) = space {
            return Ok(Expr::Call(function, self.read_all(args, levels)?));
        }
        let Some(function) = functions::find(name, target.is_some(), args.len()) else {
            return Err(Unusable::Unsupported(format!("the function {name} of {} arguments", args.len())));
        };
        let mut all = Vec::with_capacity(args.len() + 1);
        if let Some(target) = target {
            all.push(self.read(target, levels)?);
        }
        all.extend(self.read_all(args, levels)?);
        if function.name == "matches"
            && let Some(Expr::Text(pattern)) = all.pop_if(|pattern| matches!(pattern, Expr::Text(_)))
            && let Some(text) = all.pop()
        {
            let pattern = texts::regex(&pattern).map_err(Unusable::Unsupported)?;
            return Ok(Expr::Matches(Box::new(text), pattern));
        }
        Ok(Expr::Call(function, all))
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of a loop, read in this one place")]
    fn read_loop(
        &mut self,
        kind: LoopKind,
        pairs: bool,
        target: &IdedExpr,
        args: &[IdedExpr],
        condition: Option<&IdedExpr>,
        body: &IdedExpr,
        levels: usize,
    ) -> Result<Expr, Unusable> {
        let over = self.read(target, levels)?;
        let outside = self.bound.len();
        for variable in &args[..1 + usize::from(pairs)] {
            match &variable.expr {
                Parsed::Ident(name) => self.bound.push(name.clone()),
                _ => return Err(Unusable::Wrong("argument must be a simple name".into())),
            }
        }
        let condition = condition.map(|condition| self.read(condition, levels)).transpose();
        let body = self.read(body, levels);
        self.bound.truncate(outside);
        Ok(Expr::Loop(Box::new(Loop { kind, over, pairs, condition: condition?, body: body? })))
    }
}

/// Which loop a call is: its kind, whether it binds two variables, its condition and its body.
fn loop_shape<'p>(name: &str, args: &'p [IdedExpr]) -> Option<(LoopKind, bool, Option<&'p IdedExpr>, &'p IdedExpr)> {
    use LoopKind::{All, Exists, ExistsOne, Filter, Map};
    Some(match (name, args) {
        ("all", [_, body]) => (All, false, None, body),
        ("all", [_, _, body]) => (All, true, None, body),
        ("exists", [_, body]) => (Exists, false, None, body),
        ("exists", [_, _, body]) => (Exists, true, None, body),
        ("exists_one" | "existsOne", [_, body]) => (ExistsOne, false, None, body),
        ("exists_one" | "existsOne", [_, _, body]) => (ExistsOne, true, None, body),
        ("filter", [_, body]) => (Filter, false, None, body),
        ("map", [_, body]) => (Map, false, None, body),
        ("map", [_, condition, body]) => (Map, false, Some(condition), body),
        ("transformList", [_, _, body]) => (Map, true, None, body),
        ("transformList", [_, _, condition, body]) => (Map, true, Some(condition), body),
        _ => return None,
    })
}

fn read_literal(literal: &LiteralValue) -> Expr {
    match literal {
        LiteralValue::Null => Expr::Null,
        LiteralValue::Boolean(yes) => Expr::Bool(*yes.inner()),
        LiteralValue::Int(number) => Expr::Int(*number.inner()),
        LiteralValue::UInt(number) => Expr::UInt(*number.inner()),
        LiteralValue::Double(number) => Expr::Double(*number.inner()),
        LiteralValue::String(text) => Expr::Text(text.inner().to_owned()),
        LiteralValue::Bytes(bytes) => Expr::Bytes(bytes.inner().to_vec()),
    }
}
