//! From the figures of all rounds to medians, a JSON file and a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Higher,
    Lower,
}

/// What one contestant did in one round of one test.
#[derive(Clone, Debug)]
pub struct Round {
    /// No contestant was disturbed in this round of this test.
    pub calm: bool,
    /// By contestant; one that failed is missing.
    pub values: BTreeMap<String, f64>,
}

/// What ours is held to: a ratio to another contestant's figure, or `absolute` for the figure itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Budget {
    pub against: String,
    pub must: f64,
    pub aim: f64,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub test: String,
    pub metric: &'static str,
    pub better: Better,
    /// `None` where there is nothing to measure: no proxy, no CPU of one.
    pub plain: Option<f64>,
    pub ours: Option<f64>,
    pub peers: BTreeMap<String, f64>,
    /// Half the range of our figures over their median.
    pub spread: f64,
    /// Rounds that nothing else disturbed.
    pub calm: usize,
    /// Ours over plain, for the table.
    #[serde(skip)]
    against_plain: Option<f64>,
    /// Ours over what the budget is taken against.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
}

/// Whether ours keeps to its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Missed,
    Holds,
    Aim,
}

/// The whole result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub suite: &'static str,
    pub commit: String,
    pub machine: Machine,
    pub started: String,
    pub rounds: u32,
    pub rows: Vec<Row>,
}

/// Where it was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub kernel: String,
    /// Cores that the contestants had.
    pub cpus: usize,
    pub model: String,
}

/// The rounds that count: the calm ones where they are at least half and two (or all there are), otherwise all.
fn counted(rounds: &[Round]) -> Vec<&Round> {
    let calm: Vec<&Round> = rounds.iter().filter(|round| round.calm).collect();
    let enough = calm.len() * 2 >= rounds.len() && calm.len() >= rounds.len().min(2);
    if enough { calm } else { rounds.iter().collect() }
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Ours over `against`, round by round, and the median of that: what a machine does in some rounds and not in others is done
/// to both.
fn paired(rounds: &[&Round], against: &str) -> Option<f64> {
    let ratio = |round: &&Round| {
        let ours = *round.values.get("ours")?;
        let reference = if against == "absolute" { 1.0 } else { *round.values.get(against)? };
        (reference > 0.0).then(|| ours / reference)
    };
    median(&mut rounds.iter().filter_map(ratio).collect::<Vec<_>>())
}

/// Four significant digits: more would claim what is not known.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

impl Row {
    /// Medians of the rounds that count.
    pub fn new(test: &str, metric: &'static str, better: Better, rounds: &[Round], budget: Option<Budget>) -> Self {
        let rounds_counted = counted(rounds);
        let values = |name: &str| -> Vec<f64> {
            rounds_counted.iter().filter_map(|round| round.values.get(name).copied()).collect()
        };
        let of = |name: &str| median(&mut values(name)).map(rounded);
        let mut ours = values("ours");
        let middle = median(&mut ours);
        let spread = match (ours.first(), ours.last(), middle) {
            (Some(low), Some(high), Some(middle)) if middle > 0.0 => (high - low) / 2.0 / middle,
            _ => 0.0,
        };
        let ratio = budget.as_ref().and_then(|budget| paired(&rounds_counted, &budget.against));
        let names = rounds.iter().flat_map(|round| round.values.keys());
        let peers = names.filter(|name| !matches!(name.as_str(), "plain" | "ours"));
        Self {
            test: test.to_owned(),
            metric,
            better,
            plain: of("plain"),
            ours: of("ours"),
            peers: peers.filter_map(|name| Some((name.clone(), of(name)?))).collect(),
            spread: (spread * 1000.0).round() / 1000.0,
            calm: rounds.iter().filter(|round| round.calm).count(),
            against_plain: paired(&rounds_counted, "plain"),
            ratio: ratio.map(rounded),
            budget,
        }
    }

    /// `None` without a budget; a figure that is missing misses it.
    pub fn verdict(&self) -> Option<Verdict> {
        let budget = self.budget.as_ref()?;
        let Some(ratio) = self.ratio else { return Some(Verdict::Missed) };
        let within = |limit: f64| match self.better {
            Better::Higher => ratio >= limit,
            Better::Lower => ratio <= limit,
        };
        Some(match () {
            () if within(budget.aim) => Verdict::Aim,
            () if within(budget.must) => Verdict::Holds,
            () => Verdict::Missed,
        })
    }
}

impl Report {
    /// Writes the JSON, one row a line so that two files compare well.
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut text = serde_json::to_string(&Self { rows: Vec::new(), ..self.clone() })?;
        let rows: Vec<String> = self.rows.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        let empty = text.rfind("[]").context("rows come last")?;
        text.replace_range(empty.., &format!("[\n{}\n]}}\n", rows.join(",\n")));
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The table, and how many budgets hold.
    pub fn table(&self) -> String {
        let mut peers: Vec<&String> = self.rows.iter().flat_map(|row| row.peers.keys()).collect();
        peers.sort();
        peers.dedup();
        let mut text = format!("{:24}{:22}{:>10}{:>10}", "test", "metric", "plain", "ours");
        peers.iter().for_each(|name| text += &format!("{name:>13}"));
        text += &format!("{:>9}{:>8}{:>6}  budget\n", "÷plain", "spread", "calm");
        for row in &self.rows {
            let _ = write!(text, "{:24}{:22}{:>10}{:>10}", row.test, row.metric, shown(row.plain), shown(row.ours));
            peers.iter().for_each(|name| text += &format!("{:>13}", shown(row.peers.get(*name).copied())));
            let _ = write!(text, "{:>9}{:>7.0}%{:>6}", shown(row.against_plain), row.spread * 100.0, row.calm);
            text += &row.budget_text();
            text.push('\n');
        }
        let verdicts: Vec<Verdict> = self.rows.iter().filter_map(Row::verdict).collect();
        let hold = verdicts.iter().filter(|verdict| **verdict != Verdict::Missed).count();
        let aims = verdicts.iter().filter(|verdict| **verdict == Verdict::Aim).count();
        let _ = writeln!(text, "budgets: {hold} of {} hold, {aims} reach what we aim for", verdicts.len());
        text
    }
}

impl Row {
    fn budget_text(&self) -> String {
        let (Some(budget), Some(verdict)) = (&self.budget, self.verdict()) else { return String::new() };
        let sign = match self.better {
            Better::Higher => '≥',
            Better::Lower => '≤',
        };
        let word = match verdict {
            Verdict::Missed => "MISSED",
            Verdict::Holds => "holds",
            Verdict::Aim => "aim reached",
        };
        let Budget { against, must, aim } = budget;
        let against = if against == "absolute" { String::new() } else { format!("÷{against} ") };
        format!("  {against}{} {sign} {must} ({aim}): {word}", shown(self.ratio))
    }
}

/// Three digits or so.
fn shown(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(v) if v.abs() >= 100.0 => format!("{v:.0}"),
        Some(v) if v.abs() >= 10.0 => format!("{v:.1}"),
        Some(v) => format!("{v:.2}"),
    }
}

impl Machine {
    /// This machine, of which `cpus` cores are used.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn here(cpus: usize) -> Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo")?;
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpus,
            model: model.map_or("unknown", |(_, name)| name).to_owned(),
        })
    }
}

/// The commit that was built, marked where the tree differs from it; empty outside a git checkout.
pub fn commit(workspace: &Path) -> String {
    let output = Command::new("git").arg("-C").arg(workspace).args(["describe", "--always", "--dirty"]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(calm: bool, plain: f64, ours: f64) -> Round {
        Round { calm, values: [("plain".to_owned(), plain), ("ours".to_owned(), ours)].into() }
    }

    fn budget(must: f64, aim: f64) -> Option<Budget> {
        Some(Budget { against: "plain".to_owned(), must, aim })
    }

    #[test]
    fn disturbed_rounds_are_left_out_where_enough_calm_ones_remain() {
        let mut rounds = vec![round(true, 10.0, 5.0), round(false, 10.0, 1.0), round(true, 10.0, 6.0)];
        let row = Row::new("t", "m", Better::Higher, &rounds, None);
        assert_eq!((row.ours, row.calm), (Some(5.5), 2));
        rounds[0].calm = false;
        let row = Row::new("t", "m", Better::Higher, &rounds, None);
        assert_eq!((row.ours, row.calm), (Some(5.0), 1));
        assert!((row.spread - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_budget_holds_from_its_limit_on_in_its_own_direction() {
        let row = |better, ours, must, aim| Row::new("t", "m", better, &[round(true, 10.0, ours)], budget(must, aim));
        assert_eq!(row(Better::Higher, 5.0, 0.5, 0.6).verdict(), Some(Verdict::Holds));
        assert_eq!(row(Better::Higher, 4.9, 0.5, 0.6).verdict(), Some(Verdict::Missed));
        assert_eq!(row(Better::Lower, 14.0, 1.7, 1.4).verdict(), Some(Verdict::Aim));
        assert_eq!(row(Better::Lower, 18.0, 1.7, 1.4).verdict(), Some(Verdict::Missed));
    }

    #[test]
    fn a_ratio_is_that_of_the_rounds_and_not_of_what_the_machine_does_between_them() {
        let rounds = [round(true, 10.0, 11.0), round(true, 20.0, 22.0), round(true, 30.0, 60.0)];
        let row = Row::new("t", "m", Better::Lower, &rounds, budget(1.15, 1.05));
        assert_eq!((row.plain, row.ours, row.ratio), (Some(20.0), Some(22.0), Some(1.1)));
        let slow = [round(true, 10.0, 11.0), round(true, 20.0, 22.0), round(true, 20.0, 30.0), round(true, 60.0, 66.0)];
        let row = Row::new("t", "m", Better::Lower, &slow, budget(1.15, 1.05));
        assert_eq!((row.plain, row.ours, row.ratio), (Some(20.0), Some(26.0), Some(1.1)));
        assert_eq!(row.verdict(), Some(Verdict::Holds));
    }

    #[test]
    fn a_contestant_that_failed_has_no_figure_and_misses_its_budget() {
        let failed = Round { calm: true, values: [("plain".to_owned(), 1.0)].into() };
        let row = Row::new("t", "m", Better::Higher, &[failed], budget(0.1, 0.2));
        assert_eq!((row.ours, row.verdict()), (None, Some(Verdict::Missed)));
    }

    #[test]
    fn the_file_is_what_the_format_says() {
        let rows = vec![Row::new(
            "throughput_1",
            "gbit_per_s",
            Better::Higher,
            &[round(true, 30.8123, 14.1)],
            budget(0.38, 0.5),
        )];
        let machine = Machine { kernel: "6.18".into(), cpus: 2, model: "x".into() };
        let report = Report { suite: "l4", commit: "abc".into(), machine, started: "now".into(), rounds: 1, rows };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/l4.json");
        report.write(&path).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!(value["rows"][0]["plain"], 30.81);
        assert_eq!(value["rows"][0]["budget"], serde_json::json!({"against": "plain", "must": 0.38, "aim": 0.5}));
        assert!(report.table().ends_with("budgets: 1 of 1 hold, 0 reach what we aim for\n"), "{}", report.table());
    }

    #[test]
    fn four_digits_are_kept() {
        assert_eq!([rounded(123_456.0), rounded(0.001_234_56), rounded(0.0)], [123_500.0, 0.001_235, 0.0]);
    }
}
