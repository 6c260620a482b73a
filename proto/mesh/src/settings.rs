//! Reading settings from the environment: every mistake is collected, so that an operator sees them all at once.
//!
//! Components turn what this yields into a typed struct at start; nothing reads the environment later.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Everything wrong with the settings, in the order it was found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    pub fn push(&mut self, text: impl Into<String>) {
        self.0.push(text.into());
    }

    /// `value` if nothing was wrong.
    ///
    /// # Errors
    /// The mistakes themselves.
    pub fn into_result<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }

    /// One line per mistake.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} mistake(s) in the settings:", self.0.len())?;
        self.0.iter().try_for_each(|m| write!(f, "\n  - {m}"))
    }
}

impl std::error::Error for Mistakes {}

/// The environment while it is being read.
#[derive(Debug)]
pub struct Environment {
    vars: BTreeMap<String, String>,
    pub mistakes: Mistakes,
}

impl Environment {
    /// From `(name, value)` pairs, usually [`std::env::vars`].
    pub fn new(vars: impl IntoIterator<Item = (String, String)>) -> Self {
        Self { vars: vars.into_iter().collect(), mistakes: Mistakes::default() }
    }

    /// Unset and empty mean the same: Kubernetes manifests often set variables to "".
    pub fn text(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(|v| v.trim()).filter(|v| !v.is_empty())
    }

    pub fn string(&self, name: &str, default: &str) -> String {
        self.text(name).unwrap_or(default).to_owned()
    }

    /// The text of a variable that has no default.
    pub fn required(&mut self, name: &str, meaning: &str) -> String {
        match self.text(name) {
            Some(text) => text.to_owned(),
            None => {
                self.mistakes.push(format!("{name} is not set: {meaning}"));
                String::new()
            }
        }
    }

    /// A variable read by `parse`; what it does not understand is a mistake that names what was `expected`.
    pub fn parse<T>(&mut self, name: &str, default: T, expected: &str, parse: impl FnOnce(&str) -> Option<T>) -> T {
        let Some(text) = self.text(name) else { return default };
        let (parsed, text) = (parse(text), text.to_owned());
        parsed.unwrap_or_else(|| {
            self.mistakes.push(format!("{name}={text:?} is not {expected}"));
            default
        })
    }

    pub fn value<T: FromStr>(&mut self, name: &str, default: T, expected: &str) -> T {
        self.parse(name, default, expected, |v| v.parse().ok())
    }

    pub fn bool(&mut self, name: &str, default: bool) -> bool {
        self.parse(name, default, "true or false", |v| match v.to_ascii_lowercase().as_str() {
            "true" | "1" | "t" => Some(true),
            "false" | "0" | "f" => Some(false),
            _ => None,
        })
    }

    pub fn duration(&mut self, name: &str, default: Duration) -> Duration {
        self.parse(name, default, "a duration such as 10s, 5m or 24h", |v| humantime::parse_duration(v).ok())
    }

    /// The same, with an upper limit.
    pub fn duration_up_to(&mut self, name: &str, default: Duration, most: Duration) -> Duration {
        let expected = format!("a duration of at most {}", humantime::format_duration(most));
        self.parse(name, default, &expected, |v| humantime::parse_duration(v).ok().filter(|d| *d <= most))
    }

    /// A variable whose only supported values are `allowed`.
    pub fn only(&mut self, name: &str, allowed: &[&str], why: &str) {
        let Some(value) = self.text(name) else { return };
        if !allowed.iter().any(|a| a.eq_ignore_ascii_case(value)) {
            let text = format!("{name}={value:?} is not supported: {why}");
            self.mistakes.push(text);
        }
    }

    /// Variables whose name starts with `prefix`, without it.
    pub fn with_prefix(&self, prefix: &str) -> impl Iterator<Item = (&str, &str)> {
        self.vars.iter().filter_map(move |(name, value)| Some((name.strip_prefix(prefix)?, value.as_str())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_mistakes_are_listed_and_empty_means_unset() {
        let vars = [("A", "x"), ("B", "maybe"), ("C", ""), ("D", "10parsecs"), ("E", "5m")];
        let mut env = Environment::new(vars.map(|(n, v)| (n.to_owned(), v.to_owned())));
        assert_eq!(env.value("A", 7, "a number"), 7);
        assert!(env.bool("B", true));
        assert_eq!(env.string("C", "c"), "c");
        assert_eq!(env.duration("D", Duration::ZERO), Duration::ZERO);
        assert_eq!(env.duration("E", Duration::ZERO), Duration::from_secs(300));
        assert_eq!(env.duration_up_to("E", Duration::ZERO, Duration::from_secs(1)), Duration::ZERO);
        env.only("A", &["y"], "only y exists");
        env.required("Z", "the last letter");
        let mistakes = env.mistakes.into_result(()).expect_err("mistakes");
        let want = [
            "A=\"x\" is not a number",
            "B=\"maybe\" is not true or false",
            "D=\"10parsecs\" is not a duration such as 10s, 5m or 24h",
            "E=\"5m\" is not a duration of at most 1s",
            "A=\"x\" is not supported: only y exists",
            "Z is not set: the last letter",
        ];
        assert_eq!(mistakes.lines(), want);
    }
}
