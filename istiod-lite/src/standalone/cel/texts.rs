//! Texts: searching, cutting and making them, and patterns. Places count characters, as users do, not bytes.

use std::fmt::Write as _;

use regex::{Regex, RegexBuilder};
use time::format_description::well_known::Rfc3339;

use super::eval::{Fault, Outcome, Run, place};
use super::value::{Text, Val};

/// Most bytes a pattern may take when compiled.
const PATTERN_SIZE: usize = 1 << 20;

/// A pattern, read as RE2 reads it: `\d` and its like know ASCII only, and a class is a list, not a calculation.
///
/// # Errors
/// Why it is none.
pub fn regex(pattern: &str) -> Result<Regex, String> {
    let mut ours = String::with_capacity(pattern.len());
    // Within brackets: where the first member stands.
    let mut class: Option<usize> = None;
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        let length = c.len_utf8() + if c == '\\' { rest[1..].chars().next().map_or(0, char::len_utf8) } else { 0 };
        let (token, after) = rest.split_at(length);
        rest = after;
        let ascii = match token {
            r"\d" => "[:digit:]",
            r"\D" => "[:^digit:]",
            r"\w" => "[:word:]",
            r"\W" => "[:^word:]",
            r"\s" => "[:space:]",
            r"\S" => "[:^space:]",
            _ => "",
        };
        match (token, class) {
            (_, None) if !ascii.is_empty() => ours.push_str(&format!("[{ascii}]")),
            (_, Some(_)) if !ascii.is_empty() => ours.push_str(ascii),
            (r"\b", None) => ours.push_str(r"(?-u:\b)"),
            ("[", None) => {
                ours.push('[');
                if let Some(after) = rest.strip_prefix('^') {
                    ours.push('^');
                    rest = after;
                }
                class = Some(ours.len());
            }
            ("]", Some(start)) if ours.len() > start => {
                ours.push(']');
                class = None;
            }
            ("[", Some(_)) if let Some(end) = rest.strip_prefix(':').and_then(|named| named.find(":]")) => {
                let (named, after) = rest.split_at(end + 3);
                ours.push('[');
                ours.push_str(named);
                rest = after;
            }
            ("[" | "]" | "&" | "~", Some(_)) => {
                ours.push('\\');
                ours.push_str(token);
            }
            _ => ours.push_str(token),
        }
    }
    RegexBuilder::new(&ours)
        .size_limit(PATTERN_SIZE)
        .dfa_size_limit(PATTERN_SIZE)
        .build()
        .map_err(|_| format!("the pattern {pattern:?}"))
}

/// As much of a text as a message takes.
pub fn cut(text: &str) -> &str {
    const ENOUGH: usize = 64;
    text.char_indices().nth(ENOUGH).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

/// A scalar as text.
pub fn written(value: &Val<'_>) -> Result<String, Fault> {
    Ok(match value {
        Val::Bool(yes) => yes.to_string(),
        Val::Int(number) => number.to_string(),
        Val::UInt(number) => number.to_string(),
        Val::Double(number) => number.to_string(),
        Val::Text(text) => text.to_string(),
        Val::Bytes(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => return Fault::wrong("invalid UTF-8 in bytes"),
        },
        Val::Duration(span) => {
            let (sign, span) = (if *span < 0 { "-" } else { "" }, span.unsigned_abs());
            let fraction = format!("{:09}", span % 1_000_000_000);
            let fraction = fraction.trim_end_matches('0');
            let point = if fraction.is_empty() { "" } else { "." };
            format!("{sign}{}{point}{fraction}s", span / 1_000_000_000)
        }
        Val::Timestamp(time) => time.format(&Rfc3339).map_err(|e| Fault::Wrong(e.to_string()))?,
        Val::Type(name) => (*name).to_owned(),
        _ => return Err(Fault::Overload),
    })
}

pub fn texts<'v>(run: &mut Run<'v>, args: &[Val<'v>], holds: fn(&str, &str) -> bool) -> Outcome<'v> {
    match args {
        [Val::Text(text), Val::Text(part)] => {
            run.spend_bytes(text.len() + part.len())?;
            Ok(Val::Bool(holds(text, part)))
        }
        _ => Err(Fault::Overload),
    }
}

pub fn changed<'v>(run: &mut Run<'v>, args: &[Val<'v>], change: fn(&str) -> String) -> Outcome<'v> {
    match args {
        [Val::Text(text)] => {
            run.spend_bytes(2 * text.len())?;
            Ok(Val::text(change(text)))
        }
        _ => Err(Fault::Overload),
    }
}

/// A text and a pattern that came with the object.
pub fn text_and_pattern<'a, 'v>(run: &mut Run<'v>, args: &'a [Val<'v>]) -> Result<(&'a str, Regex), Fault> {
    match args {
        [Val::Text(text), Val::Text(pattern), ..] => {
            // To compile one takes longer than to use it.
            run.spend(1_000 + pattern.len().saturating_mul(100))?;
            run.spend_match(text, pattern)?;
            Ok((text, regex(pattern).map_err(Fault::Wrong)?))
        }
        _ => Err(Fault::Overload),
    }
}

pub fn matches<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let (text, pattern) = text_and_pattern(run, args)?;
    Ok(Val::Bool(pattern.is_match(text)))
}

pub fn find_all<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let limit = match args.get(2) {
        None => usize::MAX,
        Some(Val::Int(limit)) => usize::try_from(*limit).unwrap_or(usize::MAX),
        Some(_) => return Err(Fault::Overload),
    };
    let (text, pattern) = text_and_pattern(run, args)?;
    let mut found = Vec::new();
    for part in pattern.find_iter(text).take(limit) {
        run.spend(4 + part.len() / 8)?;
        found.push(Val::text(part.as_str()));
    }
    Ok(Val::list(found))
}

/// Where in a text, in bytes, its nth character begins.
pub fn at_char<'v>(run: &mut Run<'v>, text: &str, at: &Val<'v>) -> Result<usize, Fault> {
    run.spend_bytes(text.len())?;
    let starts = text.char_indices().map(|(start, _)| start).chain([text.len()]);
    match place(at)?.and_then(|at| starts.into_iter().nth(at)) {
        Some(start) => Ok(start),
        None => Fault::wrong(format!("index out of range: {}", written(at)?)),
    }
}

pub fn substring<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let (text, start, end) = match args {
        [Val::Text(text), start @ Val::Int(_)] => (text, start, None),
        [Val::Text(text), start @ Val::Int(_), end @ Val::Int(_)] => (text, start, Some(end)),
        _ => return Err(Fault::Overload),
    };
    let from = at_char(run, text, start)?;
    let to = end.map_or(Ok(text.len()), |end| at_char(run, text, end))?;
    run.spend_bytes(text.len())?;
    let part = match text {
        Text::Stored(text) => text.get(from..to).map(|part| Val::Text(Text::Stored(part))),
        Text::Made(text) => text.get(from..to).map(Val::text),
    };
    part.map_or_else(|| Fault::wrong("invalid substring range"), Ok)
}

/// The place of a byte, in characters.
fn char_place<'v>(text: &str, byte: Option<usize>) -> Outcome<'v> {
    let place = byte.and_then(|byte| text.get(..byte)).map(|before| before.chars().count());
    Ok(Val::Int(place.and_then(|place| i64::try_from(place).ok()).unwrap_or(-1)))
}

pub fn index_of<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::List(list), element] => place_in(run, list.iter().enumerate(), element),
        [Val::Text(text), Val::Text(part), from @ ..] => {
            run.spend_bytes(2 * text.len() + part.len())?;
            let from = from.first().map_or(Ok(0), |from| at_char(run, text, from))?;
            let found = text.get(from..).and_then(|rest| rest.find(&**part)).map(|found| from + found);
            char_place(text, found)
        }
        _ => Err(Fault::Overload),
    }
}

pub fn last_index_of<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    match args {
        [Val::List(list), element] => {
            let places: Vec<_> = (0..list.len()).rev().filter_map(|at| Some((at, list.get(at)?))).collect();
            run.spend(places.len())?;
            place_in(run, places.into_iter(), element)
        }
        [Val::Text(text), Val::Text(part), until @ ..] => {
            run.spend_bytes(2 * text.len() + part.len())?;
            // The last one that begins there or before.
            let until = match until.first() {
                Some(until) => at_char(run, text, until)?.saturating_add(part.len()).min(text.len()),
                None => text.len(),
            };
            char_place(text, text.get(..until).unwrap_or(text).rfind(&**part))
        }
        _ => Err(Fault::Overload),
    }
}

fn place_in<'v>(
    run: &mut Run<'v>,
    mut places: impl Iterator<Item = (usize, Val<'v>)>,
    element: &Val<'v>,
) -> Outcome<'v> {
    let found = places.find_map(|(at, other)| match run.equal(&other, element) {
        Ok(false) => None,
        Ok(true) => Some(Ok(at)),
        Err(fault) => Some(Err(fault)),
    });
    Ok(Val::Int(found.transpose()?.and_then(|at| i64::try_from(at).ok()).unwrap_or(-1)))
}

/// How many at most: an optional last argument, of which a negative one means all.
fn limit(args: &[Val<'_>]) -> Result<Option<usize>, Fault> {
    match args {
        [] => Ok(None),
        [Val::Int(limit)] => Ok(usize::try_from(*limit).ok()),
        _ => Err(Fault::Overload),
    }
}

pub fn replace<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let [Val::Text(text), Val::Text(old), Val::Text(new), most @ ..] = args else { return Err(Fault::Overload) };
    run.spend_bytes(2 * text.len())?;
    let most = limit(most)?.unwrap_or(usize::MAX);
    let places = text.matches(&**old).take(most).count();
    run.spend_bytes(places.saturating_mul(new.len()))?;
    Ok(Val::text(text.replacen(&**old, new, most)))
}

pub fn split<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let [Val::Text(text), Val::Text(by), most @ ..] = args else { return Err(Fault::Overload) };
    run.spend_bytes(text.len())?;
    let most = limit(most)?.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = &**text;
    while parts.len() < most {
        run.spend(4)?;
        let next = match rest.chars().next() {
            // Between nothing and nothing stands each character.
            Some(first) if by.is_empty() => Some((first.len_utf8(), first.len_utf8())),
            _ if by.is_empty() => break,
            _ => rest.find(&**by).map(|end| (end, end + by.len())),
        };
        match next.filter(|_| parts.len() + 1 < most) {
            Some((end, next)) => {
                parts.push(Val::text(rest.get(..end).unwrap_or_default()));
                rest = rest.get(next..).unwrap_or_default();
            }
            None => {
                parts.push(Val::text(rest));
                break;
            }
        }
    }
    run.spend_bytes(text.len())?;
    Ok(Val::list(parts))
}

pub fn join<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let (list, between) = match args {
        [Val::List(list)] => (list, ""),
        [Val::List(list), Val::Text(between)] => (list, &**between),
        _ => return Err(Fault::Overload),
    };
    let mut joined = String::new();
    for (place, element) in list.iter().enumerate() {
        let Val::Text(text) = element else { return Err(Fault::Overload) };
        run.spend(1)?;
        run.spend_bytes(text.len() + between.len())?;
        if place > 0 {
            joined.push_str(between);
        }
        joined.push_str(&text);
    }
    Ok(Val::text(joined))
}

/// `'%s has %d'.format([name, count])`
pub fn format_text<'v>(run: &mut Run<'v>, args: &[Val<'v>]) -> Outcome<'v> {
    let [Val::Text(form), Val::List(list)] = args else { return Err(Fault::Overload) };
    run.spend_bytes(form.len())?;
    let mut given = list.iter();
    let mut told = String::new();
    let mut rest = &**form;
    while let Some((before, after)) = rest.split_once('%') {
        told.push_str(before);
        let clause = after.chars().next();
        rest = after.get(clause.map_or(0, char::len_utf8)..).unwrap_or_default();
        if clause == Some('%') {
            told.push('%');
            continue;
        }
        let Some(value) = given.next() else { return Fault::wrong("format: fewer values than clauses") };
        match (clause, &value) {
            (Some('s'), value) => tell(run, value, &mut told)?,
            (Some('d'), Val::Int(_) | Val::UInt(_)) => told.push_str(&written(&value)?),
            (Some('f'), Val::Double(number)) => {
                let _ = write!(told, "{number:.6}");
            }
            (Some('x'), Val::Int(number)) => {
                let _ = write!(told, "{number:x}");
            }
            _ => return Fault::wrong("format: unsupported clause"),
        }
    }
    told.push_str(rest);
    run.spend_bytes(told.len())?;
    Ok(Val::text(told))
}

fn tell<'v>(run: &mut Run<'v>, value: &Val<'v>, told: &mut String) -> Result<(), Fault> {
    run.spend(1)?;
    match value {
        Val::Null => told.push_str("null"),
        Val::Text(text) => {
            run.spend_bytes(text.len())?;
            told.push_str(text);
        }
        Val::List(list) => {
            told.push('[');
            for (place, element) in list.iter().enumerate() {
                told.push_str(if place > 0 { ", " } else { "" });
                tell(run, &element, told)?;
            }
            told.push(']');
        }
        Val::Map(map) => {
            told.push('{');
            run.spend(map.len())?;
            for (place, (key, value)) in map.entries().iter().enumerate() {
                told.push_str(if place > 0 { ", " } else { "" });
                tell(run, key, told)?;
                told.push_str(": ");
                tell(run, value, told)?;
            }
            told.push('}');
        }
        other => told.push_str(&written(other)?),
    }
    Ok(())
}
