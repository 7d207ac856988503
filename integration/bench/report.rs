//! The outcome as a table for the user and as JSON for programs.
//!
//! Owns the wording. Every figure is a median with its extremes, every ratio a median of the ratios of each turn. No
//! result is left out.

use serde_json::{Value, json};
use std::fmt::Write;

use super::case::Unit;
use super::contest::{Outcome, Row, Scale, Side};
use super::gallery::Place;
use super::measure::Sample;
use super::statistics::Summary;

/// The results of a place.
pub struct PlaceReport {
    /// The place.
    pub place: Place,
    /// Its file system.
    pub file_system: String,
    /// The results of each case.
    pub outcomes: Vec<Outcome>,
}

impl Outcome {
    fn row(&self, side: Side) -> Option<&Row> {
        self.rows.iter().find(|row| row.side == side)
    }

    /// The ratio of two sides' values, turn by turn.
    fn ratio(&self, above: Side, below: Side, of: impl Fn(&Sample) -> Option<f64>) -> Option<Summary> {
        let values = |side| -> Option<Vec<Option<f64>>> {
            Some(self.row(side)?.samples.iter().map(|sample| sample.as_ref().and_then(&of)).collect())
        };
        Summary::of_ratios(&values(above)?, &values(below)?)
    }

    fn value_ratio(&self, below: Side) -> Option<Summary> {
        self.ratio(Side::Subject, below, |sample| Some(sample.value))
    }
}

impl Row {
    fn summary(&self, of: impl Fn(&Sample) -> Option<f64>) -> Option<Summary> {
        Summary::of(self.samples.iter().flatten().filter_map(of))
    }
}

const HEADINGS: [&str; 9] = [
    "case",
    "subject",
    "rival",
    "subject / rival",
    "per CPU s",
    "CPU s",
    "RSS MiB",
    "host bytes",
    "of bare, stock, null, no chain",
];

/// The table of a place.
pub fn table(report: &PlaceReport) -> String {
    let mut lines: Vec<Vec<String>> = vec![HEADINGS.map(str::to_owned).to_vec()];
    lines.extend(report.outcomes.iter().map(cells));
    let widths: Vec<usize> = (0..HEADINGS.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = format!("\n{} ({})\n", report.place.name(), report.file_system);
    for line in &lines {
        let padded: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text.push_str(&limits(report));
    text
}

fn cells(outcome: &Outcome) -> Vec<String> {
    let name = outcome.case.name.to_owned();
    let unit = outcome.case.unit();
    let value = |side| {
        let summary = outcome.row(side).and_then(|row| row.summary(|sample| Some(sample.value)));
        summary.map_or("none".to_owned(), |summary| with_unit(unit, summary))
    };
    let ratio = outcome.value_ratio(Side::Rival);
    let better = if matches!(unit, Unit::Memory | Unit::Cpu) { " less is better" } else { "" };
    let of_limit = |side| outcome.value_ratio(side).map(|ratio| format!("{:.2}", ratio.median));
    let limits: Vec<String> =
        [Side::Bare, Side::Stock, Side::Null, Side::Unchained].into_iter().filter_map(of_limit).collect();
    vec![
        name,
        value(Side::Subject),
        value(Side::Rival),
        ratio.map_or("none".to_owned(), |ratio| format!("{}{better}", ranged(ratio, two_digits))),
        outcome
            .ratio(Side::Subject, Side::Rival, Sample::per_cpu)
            .map_or(String::new(), |ratio| two_digits(ratio.median)),
        pair(outcome, |sample| Some(sample.cpu), two_digits),
        pair(outcome, |sample| Some(sample.resident as f64), |bytes| format!("{:.1}", bytes / 1048576.0)),
        outcome
            .ratio(Side::Subject, Side::Rival, |sample| sample.host_bytes.map(|bytes| bytes as f64))
            .map_or(String::new(), |ratio| two_digits(ratio.median)),
        limits.join(", "),
    ]
}

fn two_digits(value: f64) -> String {
    format!("{value:.2}")
}

fn ranged(summary: Summary, show: impl Fn(f64) -> String) -> String {
    format!("{} [{}–{}]", show(summary.median), show(summary.min), show(summary.max))
}

fn with_unit(unit: Unit, summary: Summary) -> String {
    let scale = Scale::of(unit, summary.median);
    format!("{} {}", ranged(summary, |value| scale.number(value)), scale.suffix)
}

fn pair(outcome: &Outcome, of: impl Fn(&Sample) -> Option<f64>, show: impl Fn(f64) -> String) -> String {
    let one = |side| {
        let summary = outcome.row(side).and_then(|row| row.summary(&of));
        summary.map_or("-".to_owned(), |summary| show(summary.median))
    };
    format!("{} / {}", one(Side::Subject), one(Side::Rival))
}

/// The limits' figures, and the cost of a chain.
fn limits(report: &PlaceReport) -> String {
    let sides = [
        (Side::Bare, "bare loop (fio, io_uring)"),
        (Side::Stock, "stock rust-vmm backend on a raw file"),
        (Side::Null, "null device"),
        (Side::Unchained, "the subject without a chain"),
    ];
    let mut text = String::new();
    for outcome in &report.outcomes {
        for (side, name) in sides {
            let summary = outcome.row(side).and_then(|row| row.summary(|sample| Some(sample.value)));
            if let Some(summary) = summary {
                let figures = with_unit(outcome.case.unit(), summary);
                let of =
                    outcome.value_ratio(side).map_or("none".to_owned(), |ratio| ranged(ratio, two_digits));
                let _ = writeln!(text, "{}: {name} {figures}, the subject at {of} of it", outcome.case.name);
            }
        }
    }
    text
}

/// All problems, one per line.
pub fn remarks(report: &PlaceReport) -> Vec<String> {
    let mut lines = Vec::new();
    for outcome in &report.outcomes {
        let place = report.place.name();
        let name = outcome.case.name;
        lines.extend(short(outcome).map(|seconds| {
            format!("{place} {name}: the shortest sample has only {:.1} ms: note the extremes", seconds * 1e3)
        }));
        for row in &outcome.rows {
            lines.extend(
                row.problems.iter().map(|problem| format!("{place} {name}: {:?}: {problem}", row.side)),
            );
        }
    }
    lines
}

/// The shortest measured time in seconds, if it is too short for the kernel's clocks and scheduling noise.
fn short(outcome: &Outcome) -> Option<f64> {
    let samples = outcome.rows.iter().flat_map(|row| row.samples.iter().flatten());
    Summary::of(samples.map(|sample| sample.seconds)).map(|summary| summary.min).filter(|least| *least < 0.1)
}

/// The most CPU, in cores, that other processes used during a sample: a high value makes a run unreliable.
pub fn others(reports: &[PlaceReport]) -> Option<Summary> {
    let outcomes = reports.iter().flat_map(|report| &report.outcomes);
    let rows = outcomes.flat_map(|outcome| &outcome.rows).filter(|row| row.side != Side::Bare);
    Summary::of(rows.flat_map(|row| row.samples.iter().flatten()).map(|sample| sample.others))
}

/// One place as JSON, samples included.
pub fn json(report: &PlaceReport) -> Value {
    let outcomes: Vec<Value> = report.outcomes.iter().map(outcome_json).collect();
    json!({ "where": report.place.name(), "file-system": report.file_system, "cases": outcomes })
}

fn outcome_json(outcome: &Outcome) -> Value {
    let unit = match outcome.case.unit() {
        Unit::Rate => "requests-per-second",
        Unit::Throughput => "megabytes-per-second",
        Unit::Memory => "bytes",
        Unit::Cpu => "cpu-seconds-per-second",
    };
    let rows: Vec<Value> = outcome.rows.iter().map(row_json).collect();
    json!({
        "case": outcome.case.name,
        "unit": unit,
        "queues": outcome.case.queues,
        "depth": outcome.case.depth,
        "ratio": summary_json(outcome.value_ratio(Side::Rival)),
        "ratio-per-cpu-second": summary_json(outcome.ratio(Side::Subject, Side::Rival, Sample::per_cpu)),
        "ratio-of-bare": summary_json(outcome.value_ratio(Side::Bare)),
        "ratio-of-stock": summary_json(outcome.value_ratio(Side::Stock)),
        "ratio-of-null": summary_json(outcome.value_ratio(Side::Null)),
        "ratio-of-no-chain": summary_json(outcome.value_ratio(Side::Unchained)),
        "sides": rows,
    })
}

fn summary_json(summary: Option<Summary>) -> Value {
    summary.map_or(
        Value::Null,
        |summary| json!({ "median": summary.median, "min": summary.min, "max": summary.max }),
    )
}

fn row_json(row: &Row) -> Value {
    let side = match row.side {
        Side::Subject => "subject",
        Side::Rival => "rival",
        Side::Unchained => "subject-without-chain",
        Side::Bare => "bare-loop",
        Side::Stock => "stock-rust-vmm-backend",
        Side::Null => "null-device",
    };
    let samples: Vec<Value> = row.samples.iter().map(sample_json).collect();
    json!({
        "side": side,
        "value": summary_json(row.summary(|sample| Some(sample.value))),
        "samples": samples,
        "problems": row.problems,
    })
}

fn sample_json(sample: &Option<Sample>) -> Value {
    let Some(sample) = sample else { return Value::Null };
    json!({
        "value": sample.value,
        "requests": sample.requests,
        "seconds": sample.seconds,
        "cpu-seconds": sample.cpu,
        "cpu-of-others": sample.others,
        "resident-bytes": sample.resident,
        "latency-median-ns": sample.latency.map(|[median, _]| median),
        "latency-p99-ns": sample.latency.map(|[_, p99]| p99),
        "host-bytes": sample.host_bytes,
    })
}
