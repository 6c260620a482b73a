//! Operators and functions: those of the language and Kubernetes' extensions. A rule that calls another one is not
//! evaluated, and the definition's status says so. Absent are `url`, `ip` and `cidr` as types, `quantity`, `format`,
//! `semver`, and the calendar of timestamps.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::eval::{Fault, Outcome, Run, compare, place};
use super::texts::{
    at_char, changed, cut, find_all, format_text, index_of, join, last_index_of, matches, replace, split, substring,
    text_and_pattern, texts, written,
};
use super::value::{List, Val, parse_duration};

/// One function, for all the types it takes.
pub struct Function {
    pub name: &'static str,
    /// How many arguments it takes as `f(a)`, and how many, beside `a`, as `a.f()`.
    global: Option<RangeInclusive<usize>>,
    member: Option<RangeInclusive<usize>>,
    pub run: for<'v> fn(&mut Run<'v>, &[Val<'v>]) -> Outcome<'v>,
}

/// What is a type when it stands alone.
pub const TYPES: [&str; 10] = ["bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"];

const fn global(
    name: &'static str,
    args: RangeInclusive<usize>,
    run: for<'v> fn(&mut Run<'v>, &[Val<'v>]) -> Outcome<'v>,
) -> Function {
    Function { name, global: Some(args), member: None, run }
}

const fn member(
    name: &'static str,
    args: RangeInclusive<usize>,
    run: for<'v> fn(&mut Run<'v>, &[Val<'v>]) -> Outcome<'v>,
) -> Function {
    Function { name, global: None, member: Some(args), run }
}

static FUNCTIONS: &[Function] = &[
    global("_==_", 2..=2, |run, args| equals(run, args).map(Val::Bool)),
    global("_!=_", 2..=2, |run, args| equals(run, args).map(|same| Val::Bool(!same))),
    global("_<_", 2..=2, |run, args| ordered(run, args, std::cmp::Ordering::is_lt)),
    global("_<=_", 2..=2, |run, args| ordered(run, args, std::cmp::Ordering::is_le)),
    global("_>_", 2..=2, |run, args| ordered(run, args, std::cmp::Ordering::is_gt)),
    global("_>=_", 2..=2, |run, args| ordered(run, args, std::cmp::Ordering::is_ge)),
    global("_+_", 2..=2, add),
    global("_-_", 2..=2, subtract),
    global("_*_", 2..=2, multiply),
    global("_/_", 2..=2, divide),
    global("_%_", 2..=2, remainder),
    global("-_", 1..=1, negate),
    global("!_", 1..=1, |_, args| match args {
        [Val::Bool(yes)] => Ok(Val::Bool(!yes)),
        _ => Err(Fault::Overload),
    }),
    global("@in", 2..=2, is_in),
    global("_[_]", 2..=2, |run, args| match args {
        [Val::Optional(None), _] => Ok(Val::Optional(None)),
        [Val::Optional(Some(of)), at] => index(run, of, at).map(|found| found.map_or(Val::Optional(None), Val::some)),
        [of, at] => match index(run, of, at)? {
            Some(value) => Ok(value),
            None if matches!(of, Val::List(_)) => Fault::wrong(format!("index out of bounds: {}", written(at)?)),
            None => Fault::wrong(format!("no such key: {}", written(at)?)),
        },
        _ => Err(Fault::Overload),
    }),
    global("_[?_]", 2..=2, |run, args| match args {
        [Val::Optional(None), _] => Ok(Val::Optional(None)),
        [Val::Optional(Some(of)), at] => index(run, of, at).map(|found| found.map_or(Val::Optional(None), Val::some)),
        [of, at] => index(run, of, at).map(|found| found.map_or(Val::Optional(None), Val::some)),
        _ => Err(Fault::Overload),
    }),
    Function { name: "size", global: Some(1..=1), member: Some(0..=0), run: size },
    // Types.
    global("bool", 1..=1, |_, args| match args {
        [Val::Bool(yes)] => Ok(Val::Bool(*yes)),
        [Val::Text(text)] => match &**text {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(Val::Bool(true)),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(Val::Bool(false)),
            text => Fault::wrong(format!("not a bool: {}", cut(text))),
        },
        _ => Err(Fault::Overload),
    }),
    global("bytes", 1..=1, |run, args| match args {
        [Val::Bytes(bytes)] => Ok(Val::Bytes(bytes.clone())),
        [Val::Text(text)] => {
            run.spend_bytes(text.len())?;
            Ok(Val::Bytes(text.as_bytes().into()))
        }
        _ => Err(Fault::Overload),
    }),
    global("double", 1..=1, |_, args| match args {
        [Val::Double(number)] => Ok(Val::Double(*number)),
        [Val::Int(number)] => Ok(Val::Double(*number as f64)),
        [Val::UInt(number)] => Ok(Val::Double(*number as f64)),
        [Val::Text(text)] => match text.parse() {
            Ok(number) => Ok(Val::Double(number)),
            Err(_) => Fault::wrong(format!("not a double: {}", cut(text))),
        },
        _ => Err(Fault::Overload),
    }),
    global("dyn", 1..=1, |_, args| args.first().cloned().ok_or(Fault::Overload)),
    global("int", 1..=1, to_int),
    global("uint", 1..=1, to_uint),
    global("string", 1..=1, to_string),
    global("type", 1..=1, |_, args| args.first().map(|value| Val::Type(value.type_name())).ok_or(Fault::Overload)),
    global("duration", 1..=1, |run, args| match args {
        [Val::Duration(span)] => Ok(Val::Duration(*span)),
        [Val::Text(text)] => {
            run.spend_bytes(text.len())?;
            match parse_duration(text) {
                Some(span) => Ok(Val::Duration(span)),
                None => Fault::wrong(format!("invalid duration: {}", cut(text))),
            }
        }
        _ => Err(Fault::Overload),
    }),
    global("timestamp", 1..=1, |_, args| match args {
        [Val::Timestamp(time)] => Ok(Val::Timestamp(*time)),
        [Val::Int(seconds)] => match OffsetDateTime::from_unix_timestamp(*seconds) {
            Ok(time) => Ok(Val::Timestamp(time)),
            Err(_) => Fault::wrong("timestamp out of range"),
        },
        [Val::Text(text)] => match OffsetDateTime::parse(text, &Rfc3339) {
            Ok(time) => Ok(Val::Timestamp(time)),
            Err(_) => Fault::wrong(format!("invalid timestamp: {}", cut(text))),
        },
        _ => Err(Fault::Overload),
    }),
    member("getHours", 0..=0, |_, args| whole_units(args, 3_600_000_000_000)),
    member("getMinutes", 0..=0, |_, args| whole_units(args, 60_000_000_000)),
    member("getSeconds", 0..=0, |_, args| whole_units(args, 1_000_000_000)),
    member("getMilliseconds", 0..=0, |_, args| whole_units(args, 1_000_000)),
    // Texts.
    member("contains", 1..=1, |run, args| texts(run, args, |text, part| text.contains(part))),
    member("startsWith", 1..=1, |run, args| texts(run, args, |text, part| text.starts_with(part))),
    member("endsWith", 1..=1, |run, args| texts(run, args, |text, part| text.ends_with(part))),
    Function { name: "matches", global: Some(2..=2), member: Some(1..=1), run: matches },
    member("find", 1..=1, |run, args| {
        let (text, pattern) = text_and_pattern(run, args)?;
        Ok(Val::text(pattern.find(text).map_or("", |found| found.as_str())))
    }),
    member("findAll", 1..=2, find_all),
    member("charAt", 1..=1, |run, args| match args {
        [Val::Text(text), at @ (Val::Int(_) | Val::UInt(_))] => {
            let at = at_char(run, text, at)?;
            let one = text.get(at..).and_then(|rest| rest.chars().next());
            Ok(Val::text(one.map(String::from).unwrap_or_default()))
        }
        _ => Err(Fault::Overload),
    }),
    member("indexOf", 1..=2, index_of),
    member("lastIndexOf", 1..=2, last_index_of),
    member("lowerAscii", 0..=0, |run, args| changed(run, args, |text| text.to_ascii_lowercase())),
    member("upperAscii", 0..=0, |run, args| changed(run, args, |text| text.to_ascii_uppercase())),
    member("trim", 0..=0, |run, args| changed(run, args, |text| text.trim().to_owned())),
    member("reverse", 0..=0, |run, args| match args {
        [Val::List(list)] => {
            run.spend(2 * list.len())?;
            Ok(Val::list(list.iter().rev().collect()))
        }
        _ => changed(run, args, |text| text.chars().rev().collect()),
    }),
    member("replace", 2..=3, replace),
    member("split", 1..=2, split),
    member("substring", 1..=2, substring),
    member("join", 0..=1, join),
    member("format", 1..=1, format_text),
    // Lists and sets.
    member("isSorted", 0..=0, |run, args| {
        let list = elements(run, args)?;
        let mut sorted = true;
        for (a, b) in list.iter().zip(list.iter().skip(1)) {
            run.spend(1)?;
            sorted &= compare(a, b)?.is_some_and(std::cmp::Ordering::is_le);
        }
        Ok(Val::Bool(sorted))
    }),
    member("sum", 0..=0, |run, args| {
        let list = elements(run, args)?;
        let mut elements = list.into_iter();
        let first = elements.next().unwrap_or(Val::Int(0));
        elements.try_fold(first, |sum, element| match &sum {
            Val::Int(_) | Val::UInt(_) | Val::Double(_) | Val::Duration(_) => add(run, &[sum, element]),
            _ => Err(Fault::Overload),
        })
    }),
    member("min", 0..=0, |run, args| extreme(run, args, std::cmp::Ordering::is_lt)),
    member("max", 0..=0, |run, args| extreme(run, args, std::cmp::Ordering::is_gt)),
    global("sets.contains", 2..=2, |run, args| match args {
        [Val::List(all), Val::List(some)] => within(run, some, all).map(Val::Bool),
        _ => Err(Fault::Overload),
    }),
    global("sets.equivalent", 2..=2, |run, args| match args {
        [Val::List(a), Val::List(b)] => Ok(Val::Bool(within(run, a, b)? && within(run, b, a)?)),
        _ => Err(Fault::Overload),
    }),
    global("sets.intersects", 2..=2, |run, args| match args {
        [Val::List(a), Val::List(b)] => {
            let mut shared = false;
            for element in a.iter() {
                shared = shared || run.contains(b, &element)?;
            }
            Ok(Val::Bool(shared))
        }
        _ => Err(Fault::Overload),
    }),
    global("isIP", 1..=1, |_, args| match args {
        [Val::Text(text)] => Ok(Val::Bool(text.parse::<IpAddr>().is_ok())),
        _ => Err(Fault::Overload),
    }),
    global("isCIDR", 1..=1, |_, args| match args {
        [Val::Text(text)] => Ok(Val::Bool(text.parse::<IpNet>().is_ok())),
        _ => Err(Fault::Overload),
    }),
    // What may be there or not.
    global("optional.none", 0..=0, |_, _| Ok(Val::Optional(None))),
    global("optional.of", 1..=1, |_, args| args.first().cloned().map(Val::some).ok_or(Fault::Overload)),
    member("hasValue", 0..=0, |_, args| match args {
        [Val::Optional(value)] => Ok(Val::Bool(value.is_some())),
        _ => Err(Fault::Overload),
    }),
    member("value", 0..=0, |_, args| match args {
        [Val::Optional(Some(value))] => Ok((**value).clone()),
        [Val::Optional(None)] => Fault::wrong("optional.none() dereference"),
        _ => Err(Fault::Overload),
    }),
    member("orValue", 1..=1, |_, args| match args {
        [Val::Optional(Some(value)), _] => Ok((**value).clone()),
        [Val::Optional(None), other] => Ok(other.clone()),
        _ => Err(Fault::Overload),
    }),
    member("or", 1..=1, |_, args| match args {
        [Val::Optional(None), other @ Val::Optional(_)] => Ok(other.clone()),
        [value @ Val::Optional(Some(_)), Val::Optional(_)] => Ok(value.clone()),
        _ => Err(Fault::Overload),
    }),
];

/// The function of this name, called this way.
pub fn find(name: &str, as_member: bool, args: usize) -> Option<&'static Function> {
    FUNCTIONS.iter().find(|function| {
        let takes = if as_member { &function.member } else { &function.global };
        function.name == name && takes.as_ref().is_some_and(|takes| takes.contains(&args))
    })
}

fn equals<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Result<bool, Fault> {
    match args {
        [a, b] => run.equal(a, b),
        _ => Err(Fault::Overload),
    }
}

fn ordered<'v>(run: &mut Run<'v>, args: &[Val<'v>], wanted: fn(std::cmp::Ordering) -> bool) -> Outcome<'v> {
    let [a, b] = args else { return Err(Fault::Overload) };
    if let (Val::Text(a), Val::Text(b)) = (a, b) {
        run.spend_bytes(a.len().min(b.len()))?;
    }
    Ok(Val::Bool(compare(a, b)?.is_some_and(wanted)))
}

fn in_range<'v, T>(result: Option<T>, wrap: fn(T) -> Val<'v>, what: &str) -> Outcome<'v> {
    match result {
        Some(value) => Ok(wrap(value)),
        None => Fault::wrong(format!("{what} overflow")),
    }
}

fn shifted<'v>(time: OffsetDateTime, by: i64, back: bool) -> Outcome<'v> {
    let by = time::Duration::nanoseconds(by);
    in_range(if back { time.checked_sub(by) } else { time.checked_add(by) }, Val::Timestamp, "timestamp")
}

fn add<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::Int(a), Val::Int(b)] => in_range(a.checked_add(*b), Val::Int, "integer"),
        [Val::UInt(a), Val::UInt(b)] => in_range(a.checked_add(*b), Val::UInt, "unsigned integer"),
        [Val::Double(a), Val::Double(b)] => Ok(Val::Double(a + b)),
        [Val::Text(a), Val::Text(b)] => {
            run.spend_bytes(a.len() + b.len())?;
            Ok(Val::text([&**a, &**b].concat()))
        }
        [Val::Bytes(a), Val::Bytes(b)] => {
            run.spend_bytes(a.len() + b.len())?;
            Ok(Val::Bytes([&**a, &**b].concat().into()))
        }
        [Val::List(a), Val::List(b)] => run.join_lists(a, b),
        [Val::Duration(a), Val::Duration(b)] => in_range(a.checked_add(*b), Val::Duration, "duration"),
        [Val::Timestamp(time), Val::Duration(by)] | [Val::Duration(by), Val::Timestamp(time)] => {
            shifted(*time, *by, false)
        }
        _ => Err(Fault::Overload),
    }
}

fn subtract<'v>(_: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::Int(a), Val::Int(b)] => in_range(a.checked_sub(*b), Val::Int, "integer"),
        [Val::UInt(a), Val::UInt(b)] => in_range(a.checked_sub(*b), Val::UInt, "unsigned integer"),
        [Val::Double(a), Val::Double(b)] => Ok(Val::Double(a - b)),
        [Val::Duration(a), Val::Duration(b)] => in_range(a.checked_sub(*b), Val::Duration, "duration"),
        [Val::Timestamp(time), Val::Duration(by)] => shifted(*time, *by, true),
        [Val::Timestamp(a), Val::Timestamp(b)] => {
            in_range(i64::try_from((*a - *b).whole_nanoseconds()).ok(), Val::Duration, "duration")
        }
        _ => Err(Fault::Overload),
    }
}

fn multiply<'v>(_: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::Int(a), Val::Int(b)] => in_range(a.checked_mul(*b), Val::Int, "integer"),
        [Val::UInt(a), Val::UInt(b)] => in_range(a.checked_mul(*b), Val::UInt, "unsigned integer"),
        [Val::Double(a), Val::Double(b)] => Ok(Val::Double(a * b)),
        _ => Err(Fault::Overload),
    }
}

fn divide<'v>(_: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::Int(_), Val::Int(0)] | [Val::UInt(_), Val::UInt(0)] => Fault::wrong("division by zero"),
        [Val::Int(a), Val::Int(b)] => in_range(a.checked_div(*b), Val::Int, "integer"),
        [Val::UInt(a), Val::UInt(b)] => in_range(a.checked_div(*b), Val::UInt, "unsigned integer"),
        [Val::Double(a), Val::Double(b)] => Ok(Val::Double(a / b)),
        _ => Err(Fault::Overload),
    }
}

fn remainder<'v>(_: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::Int(_), Val::Int(0)] | [Val::UInt(_), Val::UInt(0)] => Fault::wrong("modulus by zero"),
        [Val::Int(a), Val::Int(b)] => in_range(a.checked_rem(*b), Val::Int, "integer"),
        [Val::UInt(a), Val::UInt(b)] => in_range(a.checked_rem(*b), Val::UInt, "unsigned integer"),
        _ => Err(Fault::Overload),
    }
}

fn negate<'v>(_: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::Int(number)] => in_range(number.checked_neg(), Val::Int, "integer"),
        [Val::Double(number)] => Ok(Val::Double(-number)),
        _ => Err(Fault::Overload),
    }
}

fn is_in<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [element, Val::List(list)] => run.contains(list, element).map(Val::Bool),
        [key, Val::Map(map)] => Ok(Val::Bool(run.entry(map, key)?.is_some())),
        _ => Err(Fault::Overload),
    }
}

fn index<'v>(run: &mut Run<'v>, of: &Val<'v>, at: &Val<'v>) -> Result<Option<Val<'v>>, Fault> {
    match of {
        Val::List(list) => Ok(place(at)?.and_then(|at| list.get(at))),
        Val::Map(map) => run.entry(map, at),
        _ => Err(Fault::Overload),
    }
}

fn size<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let size = match args {
        [Val::Text(text)] => {
            run.spend_bytes(text.len())?;
            text.chars().count()
        }
        [Val::Bytes(bytes)] => bytes.len(),
        [Val::List(list)] => list.len(),
        [Val::Map(map)] => map.len(),
        _ => return Err(Fault::Overload),
    };
    in_range(i64::try_from(size).ok(), Val::Int, "integer")
}

fn to_int<'v>(_: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::Int(number)] => Ok(Val::Int(*number)),
        [Val::UInt(number)] => in_range(i64::try_from(*number).ok(), Val::Int, "integer"),
        // The ends themselves are not exact as floating point.
        [Val::Double(number)] if *number > i64::MIN as f64 && *number < i64::MAX as f64 => Ok(Val::Int(*number as i64)),
        [Val::Double(_)] => Fault::wrong("integer overflow"),
        [Val::Text(text)] => match text.parse() {
            Ok(number) => Ok(Val::Int(number)),
            Err(_) => Fault::wrong(format!("not an int: {}", cut(text))),
        },
        [Val::Timestamp(time)] => Ok(Val::Int(time.unix_timestamp())),
        _ => Err(Fault::Overload),
    }
}

fn to_uint<'v>(_: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::UInt(number)] => Ok(Val::UInt(*number)),
        [Val::Int(number)] => in_range(u64::try_from(*number).ok(), Val::UInt, "unsigned integer"),
        [Val::Double(number)] if *number >= 0.0 && *number < u64::MAX as f64 => Ok(Val::UInt(*number as u64)),
        [Val::Double(_)] => Fault::wrong("unsigned integer overflow"),
        [Val::Text(text)] => match text.parse() {
            Ok(number) => Ok(Val::UInt(number)),
            Err(_) => Fault::wrong(format!("not a uint: {}", cut(text))),
        },
        _ => Err(Fault::Overload),
    }
}

fn to_string<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [text @ Val::Text(_)] => Ok(text.clone()),
        [value] => {
            if let Val::Bytes(bytes) = value {
                run.spend_bytes(bytes.len())?;
            }
            written(value).map(Val::text)
        }
        _ => Err(Fault::Overload),
    }
}

fn whole_units<'v>(args: &[Val<'v>], nanoseconds: i64) -> Outcome<'v> {
    match args {
        [Val::Duration(span)] => Ok(Val::Int(span / nanoseconds)),
        _ => Err(Fault::Overload),
    }
}

fn elements<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Result<Vec<Val<'v>>, Fault> {
    match args {
        [Val::List(list)] => {
            run.spend(2 * list.len())?;
            Ok(list.iter().collect())
        }
        _ => Err(Fault::Overload),
    }
}

fn extreme<'v>(run: &mut Run<'v>, args: &[Val<'v>], better: fn(std::cmp::Ordering) -> bool) -> Outcome<'v> {
    let mut elements = elements(run, args)?.into_iter();
    let Some(mut best) = elements.next() else { return Fault::wrong("min or max of an empty list") };
    for element in elements {
        if compare(&element, &best)?.is_some_and(better) {
            best = element;
        }
    }
    Ok(best)
}

/// Whether every element of one list is in the other.
fn within<'v>(run: &mut Run<'v>, some: &List<'v>, all: &List<'v>) -> Result<bool, Fault> {
    for element in some.iter() {
        if !run.contains(all, &element)? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use serde_json::{Value, json};

    use super::super::value::Map;
    use super::*;

    /// What an attacker would try: ends of ranges, empty and wide texts, every type.
    fn strange_values(list: &Value) -> Vec<Val<'_>> {
        let Value::Array(elements) = list else { panic!("a list") };
        let object = elements[3].as_object().unwrap();
        vec![
            Val::Null,
            Val::Bool(true),
            Val::Int(0),
            Val::Int(3),
            Val::Int(-1),
            Val::Int(i64::MIN),
            Val::Int(i64::MAX),
            Val::UInt(u64::MAX),
            Val::Double(f64::NAN),
            Val::Double(-1e300),
            Val::text(""),
            Val::text("äb,ß🦀"),
            Val::text("(["),
            Val::text("%s%d%%%"),
            Val::text("-9223372036854775808ns"),
            Val::Bytes([0xff, 0].into()),
            Val::Duration(i64::MIN),
            Val::Timestamp(time::macros::datetime!(9999-12-31 23:59:59 UTC)),
            Val::Timestamp(time::macros::datetime!(-9999-01-01 0:00 UTC)),
            Val::list(vec![Val::text("ä"), Val::text("")]),
            Val::of(list, &Value::Null),
            Val::Map(Map::Made(Rc::new(vec![(Val::Int(1), Val::Null)]))),
            Val::Object(object, &elements[3]),
            Val::Optional(None),
        ]
    }

    #[test]
    fn no_function_panics_whatever_it_is_given() {
        let list = json!([1, -1, 9_223_372_036_854_775_807_i64, {"a": 1}]);
        let values = strange_values(&list);
        let mut calls = 0;
        for function in FUNCTIONS {
            let global = function.global.clone().into_iter().flatten();
            let member = function.member.clone().into_iter().flatten().map(|args| args + 1);
            for length in global.chain(member) {
                for number in 0..values.len().pow(u32::try_from(length).unwrap()) {
                    let mut rest = number;
                    let args = (0..length).map(|_| {
                        let value = values[rest % values.len()].clone();
                        rest /= values.len();
                        value
                    });
                    let _ = (function.run)(&mut Run::new(10_000), &args.collect::<Vec<_>>());
                    calls += 1;
                }
            }
        }
        assert!(calls > 300_000, "{calls}");
    }
}
