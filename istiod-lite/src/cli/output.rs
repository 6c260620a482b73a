//! How answers are written: tables and lines for people, JSON and YAML for programs. Colours only where somebody looks.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;

/// `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
    Yaml,
}

/// Whether to colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paint(bool);

impl Paint {
    pub const PLAIN: Self = Self(false);

    /// A terminal that takes colours, of somebody who has nothing against them (`NO_COLOR`).
    pub fn of_stdout(variable: impl Fn(&str) -> Option<String>) -> Self {
        let unwanted = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = variable("TERM").is_some_and(|terminal| terminal == "dumb");
        Self(!unwanted && !dumb && io::stdout().is_terminal())
    }

    fn around(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            Tone::Good => "32",
            Tone::Doubtful => "33",
            Tone::Bad => "31",
        };
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    Plain,
    Good,
    Doubtful,
    Bad,
}

/// A text and how it is meant.
#[derive(Debug, Clone)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub fn toned(tone: Tone, text: impl Into<String>) -> Self {
        Self { text: printable(&text.into()), tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(Tone::Plain, text)
    }
}

/// What others wrote must not move the cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Columns as `kubectl get` has them.
#[derive(Debug)]
pub struct Table {
    header: &'static [&'static str],
    rows: Vec<Vec<Cell>>,
}

impl Table {
    pub fn new(header: &'static [&'static str]) -> Self {
        Self { header, rows: Vec::new() }
    }

    /// One cell for each column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// A line of its own below a table.
    pub fn line(text: &str, tone: Tone, paint: Paint) -> String {
        format!("{}\n", paint.around(tone, &printable(text)))
    }

    /// Each line begins with `indent`.
    pub fn render(&self, indent: &str, paint: Paint) -> String {
        let header: Vec<Cell> = self.header.iter().map(|name| Cell::from(*name)).collect();
        let rows: Vec<&Vec<Cell>> = std::iter::once(&header).chain(&self.rows).collect();
        let width = |column: usize| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.text.chars().count())
                .max()
                .unwrap_or_default()
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let mut out = String::new();
        for row in rows {
            let mut line = indent.to_owned();
            for (column, cell) in row.iter().enumerate() {
                line.push_str(&paint.around(cell.tone, &cell.text));
                if column + 1 < row.len() {
                    let blanks = widths[column].saturating_sub(cell.text.chars().count()) + 3;
                    line.extend(std::iter::repeat_n(' ', blanks));
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// What is said of one thing: lines with a word in front, and tables below.
#[derive(Debug)]
pub struct Sheet {
    paint: Paint,
    text: String,
}

impl Sheet {
    pub fn new(paint: Paint) -> Self {
        Self { paint, text: String::new() }
    }

    pub fn line(&mut self, word: &str, said: impl Into<Cell>) {
        let said = said.into();
        writeln!(self.text, "{word:<12} {}", self.paint.around(said.tone, &said.text)).expect("strings take all");
    }

    /// Several lines behind one word.
    pub fn lines(&mut self, word: &str, said: impl IntoIterator<Item = Cell>) {
        let mut word = word;
        for said in said {
            self.line(word, said);
            word = "";
        }
    }

    /// Nothing of an empty table but that it is empty.
    pub fn table(&mut self, title: &str, table: &Table) {
        if table.is_empty() {
            writeln!(self.text, "{title}: none").expect("strings take all");
        } else {
            write!(self.text, "{title}:\n{}", table.render("  ", self.paint)).expect("strings take all");
        }
    }

    pub fn finish(self) -> String {
        self.text
    }
}

/// `value` in the format that was asked for; `text` is what people read.
///
/// # Errors
/// Never for what this crate writes; serialization could.
pub fn written(format: Format, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<String> {
    // By way of a value, so that both formats have the same fields in the same order.
    let value = || serde_json::to_value(value).context("the answer as JSON");
    match format {
        Format::Table => Ok(text()),
        Format::Json => Ok(format!("{}\n", serde_json::to_string_pretty(&value()?)?)),
        Format::Yaml => yaml(&value()?),
    }
}

/// # Errors
/// Never for JSON values.
pub fn yaml(value: &impl Serialize) -> anyhow::Result<String> {
    let mut text = serde_saphyr::to_string(value).context("the answer as YAML")?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// To standard output. Whoever stops reading (`| head`) has read enough.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_no_line_ends_in_blanks() {
        let mut table = Table::new(&["NAME", "STATE", "WHY"]);
        table.row([Cell::from("shop/long-name"), Cell::toned(Tone::Good, "SYNCED"), Cell::from("")]);
        table.row([Cell::from("a"), Cell::toned(Tone::Bad, "REJECTED"), Cell::from("x\n\x1b[2Jy")]);
        let plain = "NAME             STATE      WHY\nshop/long-name   SYNCED\na                REJECTED   x  [2Jy\n";
        assert_eq!(table.render("", Paint::PLAIN), plain);
        let painted = table.render("", Paint(true));
        assert!(painted.contains("\x1b[32mSYNCED\x1b[0m"), "{painted:?}");
        let stripped = painted.replace("\x1b[32m", "").replace("\x1b[31m", "").replace("\x1b[0m", "");
        assert_eq!(stripped.lines().next(), plain.lines().next());
        assert!(stripped.ends_with("a                REJECTED   x  [2Jy\n"), "{stripped:?}");
    }

    #[test]
    fn programs_get_the_same_in_both_formats() {
        let value = json!({"name": "a", "ready": "true", "none": null, "list": [1]});
        let read = |text: String| serde_saphyr::from_str::<serde_json::Value>(&text).expect("it can be read");
        for format in [Format::Json, Format::Yaml] {
            assert_eq!(read(written(format, &value, || unreachable!()).expect("it can be written")), value);
        }
        assert_eq!(written(Format::Table, &value, || "text".into()).expect("text"), "text");
    }
}
