//! Log lines as Istio's components write them: tab-separated text, or JSON.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, Write},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{FilterExt, filter_fn},
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

const TIMESTAMP: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogFormat {
    #[default]
    Plain,
    Json,
}

impl FromStr for LogFormat {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        match text {
            "plain" => Ok(Self::Plain),
            "json" => Ok(Self::Json),
            _ => Err(LogError(format!("log format {text:?} is neither `plain` nor `json`"))),
        }
    }
}

/// A log setting that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LogError(String);

/// Changes what is logged while running.
#[derive(Clone)]
pub struct LogHandle {
    initial: Arc<str>,
    filter: reload::Handle<EnvFilter, Registry>,
    format: LogFormat,
    output: Output,
}

/// Bytes of lines that are kept while nobody takes them.
const KEPT: usize = 1 << 20;

/// Where lines go: standard output, or a store from which somebody takes them.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Option<Kept>>>);

#[derive(Default)]
struct Kept {
    lines: VecDeque<String>,
    bytes: usize,
    /// Lines there was no room for.
    lost: u64,
}

impl Output {
    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Output {
    /// A line at a time, and never an error: whoever logs cannot do anything about it, and telling so on a standard error
    /// that is gone as well would be a panic.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(kept) = &mut *self.kept() {
            if kept.bytes + line.len() > KEPT {
                kept.lost += 1;
            } else {
                kept.bytes += line.len();
                kept.lines.push_back(String::from_utf8_lossy(line).trim_end().to_owned());
            }
            return Ok(line.len());
        }
        let _ = io::stdout().write_all(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogHandle {
    /// Replaces the filter: `level` or `target=level`, comma-separated.
    pub fn set_filter(&self, filter: &str) -> Result<(), LogError> {
        let parsed = parse_filter(filter)?;
        self.filter.reload(parsed).map_err(|e| LogError(e.to_string()))
    }

    /// Adds directives to the filter in force; later ones win.
    pub fn add(&self, directives: &str) -> Result<(), LogError> {
        let current = self.current();
        self.set_filter(&if current.is_empty() { directives.to_owned() } else { format!("{current},{directives}") })
    }

    /// Back to what the process started with.
    pub fn reset(&self) -> Result<(), LogError> {
        self.set_filter(&self.initial)
    }

    /// From now on lines are not written but kept, a megabyte of them, for [`Self::take_kept`].
    pub fn keep(&self) {
        self.output.kept().get_or_insert_default();
    }

    /// Lines that were kept, the oldest first and about `most` bytes of them, and how many were lost since the last time.
    pub fn take_kept(&self, most: usize) -> (Vec<String>, u64) {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        let mut output = self.output.kept();
        let Some(kept) = &mut *output else { return (taken, 0) };
        while bytes < most
            && let Some(line) = kept.lines.pop_front()
        {
            bytes += line.len() + 1;
            taken.push(line);
        }
        kept.bytes = kept.bytes.saturating_sub(bytes);
        (taken, std::mem::take(&mut kept.lost))
    }

    /// Writes a line that another generation of this process has kept, with its name.
    pub fn pass_on(&self, line: &str, generation: &str) {
        let line = one_line(line.to_owned());
        let line = match self.format {
            LogFormat::Plain => format!("{line} generation={generation:?}\n"),
            LogFormat::Json => {
                let Ok(mut fields) = serde_json::from_str::<Map<String, Value>>(&line) else { return };
                fields.insert("generation".into(), generation.into());
                format!("{}\n", Value::Object(fields))
            }
        };
        // Writing there does not fail.
        let _ = self.output.clone().write_all(line.as_bytes());
    }

    pub fn current(&self) -> String {
        self.filter.with_current(ToString::to_string).unwrap_or_default()
    }
}

fn parse_filter(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder().parse(filter).map_err(|e| LogError(format!("log filter {filter:?}: {e}")))
}

/// h2 warns of what peers do, frame by frame: that is for a peer to fill our log with. What comes of it we tell ourselves.
fn is_ours_to_tell(metadata: &Metadata<'_>) -> bool {
    !(metadata.target().starts_with("h2::") && *metadata.level() == tracing::Level::WARN)
}

/// Starts logging to standard output. Called once, by `main`.
pub fn init_logging(filter: &str, format: LogFormat) -> Result<LogHandle, LogError> {
    let (filter_layer, handle) = reload::Layer::new(parse_filter(filter)?);
    let output = Output::default();
    let writer = output.clone();
    let lines = tracing_subscriber::fmt::layer().event_format(Lines(format)).with_writer(move || writer.clone());
    tracing_subscriber::registry()
        .with(lines.with_filter(filter_layer.and(filter_fn(is_ours_to_tell))))
        .try_init()
        .map_err(|e| LogError(format!("logging is already set up: {e}")))?;
    Ok(LogHandle { initial: filter.into(), filter: handle, format, output })
}

/// Writes one event as one line.
struct Lines(LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let now = OffsetDateTime::now_utc().format(TIMESTAMP).map_err(|_| fmt::Error)?;
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warn",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        let target = event.metadata().target();
        match self.0 {
            LogFormat::Plain => {
                let mut fields = PlainFields::default();
                event.record(&mut fields);
                writeln!(out, "{now}\t{level}\t{target}\t{}{}{}", fields.message, fields.separator(), fields.rest)
            }
            LogFormat::Json => {
                let mut fields = JsonFields::default();
                event.record(&mut fields);
                let mut line = Map::new();
                line.insert("level".into(), level.into());
                line.insert("time".into(), now.into());
                line.insert("scope".into(), target.into());
                line.insert("message".into(), fields.message.into());
                line.append(&mut fields.rest);
                writeln!(out, "{}", Value::Object(line))
            }
        }
    }
}

/// `k=v k=v`, strings quoted, everything else as it prints.
#[derive(Default)]
struct PlainFields {
    message: String,
    rest: String,
}

impl PlainFields {
    fn separator(&self) -> &'static str {
        if self.rest.is_empty() { "" } else { "\t" }
    }

    fn push(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        use fmt::Write;
        if field.name() == "message" {
            self.message = one_line(value.to_string());
            return;
        }
        let space = if self.rest.is_empty() { "" } else { " " };
        let value = one_line(value.to_string());
        // Writing to a string does not fail.
        let _ = write!(self.rest, "{space}{}={value}", field.name());
    }
}

/// A value that came from a peer must not be able to start a line of its own.
fn one_line(text: String) -> String {
    if text.contains(['\n', '\r']) { text.replace('\n', "\\n").replace('\r', "\\r") } else { text }
}

impl Visit for PlainFields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.push(field, format_args!("{value}"));
        } else {
            self.push(field, format_args!("{value:?}"));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, format_args!("{value:?}"));
    }
}

#[derive(Default)]
struct JsonFields {
    message: String,
    rest: Map<String, Value>,
}

impl JsonFields {
    fn push(&mut self, field: &Field, value: Value) {
        self.rest.insert(field.name().to_owned(), value);
    }
}

impl Visit for JsonFields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.push(field, value.into());
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.push(field, format!("{value:?}").into());
        }
    }
}

/// What `log` writes in that format, under that filter.
#[cfg(any(test, fuzzing))]
pub fn capture(format: LogFormat, filter: &str, log: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no writer panics").extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let captured = Captured::default();
    let writer = captured.clone();
    let layer = tracing_subscriber::fmt::layer().event_format(Lines(format)).with_writer(move || writer.clone());
    let layer = layer.with_filter(parse_filter(filter).expect("a filter"));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
    String::from_utf8(captured.0.lock().expect("no writer panics").clone()).expect("lines are text")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: LogFormat, log: impl FnOnce()) -> String {
        capture(format, "trace", log)
    }

    #[test]
    fn plain_lines_are_tab_separated_with_quoted_strings() {
        let got = line(LogFormat::Plain, || {
            let absent: Option<&str> = None;
            tracing::event!(
                target: "access", tracing::Level::INFO,
                src.addr = %"10.0.0.1:80", src.workload = "a", dst.workload = absent, bytes_sent = 3u64,
                "connection complete"
            );
        });
        let (time, rest) = got.split_once('\t').expect("time and the rest");
        assert!(time.ends_with('Z') && time.len() == "2026-01-01T00:00:00.000000Z".len(), "{time}");
        assert_eq!(rest, "info\taccess\tconnection complete\tsrc.addr=10.0.0.1:80 src.workload=\"a\" bytes_sent=3\n");
    }

    #[test]
    fn lines_that_are_kept_are_bounded_and_come_out_in_order() {
        let mut output = Output::default();
        output.kept().get_or_insert_default();
        let (_, filter) = reload::Layer::new(parse_filter("info").expect("a filter"));
        let log = LogHandle { initial: "info".into(), filter, format: LogFormat::Plain, output: output.clone() };
        output.write_all(b"first\n").expect("never fails");
        output.write_all(b"second\n").expect("never fails");
        output.write_all(&vec![b'x'; KEPT]).expect("never fails");
        assert_eq!(log.take_kept(3), (vec!["first".to_owned()], 1));
        log.pass_on("a\nb", "g");
        assert_eq!(log.take_kept(KEPT), (vec!["second".to_owned(), "a\\nb generation=\"g\"".to_owned()], 0));
    }

    #[test]
    fn a_peers_newline_starts_no_line() {
        let got = line(LogFormat::Plain, || tracing::warn!(error = %"a\nb", "x"));
        assert_eq!(got.lines().count(), 1);
    }

    #[test]
    fn json_lines_keep_order() {
        let got = line(LogFormat::Json, || tracing::error!(target: "access", z = 1u64, a = "b", "m"));
        assert!(got.starts_with("{\"level\":\"error\",\"time\":"), "{got}");
        assert!(got.ends_with("\"scope\":\"access\",\"message\":\"m\",\"z\":1,\"a\":\"b\"}\n"), "{got}");
    }

    #[test]
    fn unknown_format_and_filter_are_refused() {
        assert!("xml".parse::<LogFormat>().is_err());
        assert!(parse_filter("a=b=c").is_err());
        assert!(parse_filter("info,mesh=trace").is_ok());
    }
}
