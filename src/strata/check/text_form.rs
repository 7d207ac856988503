//! The outcome of a check as text: the first findings of each kind, how many more there are, and the conclusion.

use std::fmt::Write as _;
use std::path::Path;

use disk::check::{RepairKind, Report, Verdict};
use names::shown;

use crate::check::{Outcome, severity};
use crate::cli::Repairs;
use crate::size;

/// The whole text.
pub(super) fn outcome(image: &Path, repair: Option<Repairs>, outcome: &Outcome) -> String {
    let mut text = String::new();
    if let Some(before) = &outcome.before {
        findings(before, &mut text);
        text += &format!("{} before the repair.\n\n", counts(before));
        if before.has_unread_snapshots() {
            text += "The snapshots that could not be read were dropped from the snapshot table.\n";
        }
    }
    let report = &outcome.report;
    findings(report, &mut text);
    let name = shown(image);
    text += &format!("{name}: {}\n", verdict(report, outcome.before.is_some()));
    if let Some(reason) = &outcome.not_repaired {
        text += &format!("not repaired: {reason}\n");
    } else if let Some(advice) = advice(report, repair) {
        text += &format!("{advice}\n");
    }
    numbers(report, &mut text);
    text
}

/// The findings grouped by kind, the first ones of each.
fn findings(report: &Report, text: &mut String) {
    for tally in &report.tallies {
        let of_kind = report.findings.iter().filter(|finding| finding.kind.name() == tally.name);
        let mut shown = 0;
        for finding in of_kind {
            shown += 1;
            let _ = writeln!(text, "{:<10} {finding}", severity(finding));
        }
        if tally.count > shown {
            let _ =
                writeln!(text, "{:<10} and {} more of this kind ({})", "", tally.count - shown, tally.name);
        }
    }
}

fn counts(report: &Report) -> String {
    let mut parts = Vec::new();
    for (count, one, many) in [
        (report.corruptions, "corruption", "corruptions"),
        (report.leaked_clusters, "leaked cluster", "leaked clusters"),
        (report.notes, "note", "notes"),
    ] {
        if count > 0 {
            parts.push(format!("{count} {}", if count == 1 { one } else { many }));
        }
    }
    if parts.is_empty() { "nothing wrong".to_owned() } else { parts.join(", ") }
}

fn verdict(report: &Report, repaired: bool) -> String {
    let after = if repaired { " after the repair" } else { "" };
    match report.verdict() {
        Verdict::Clean if report.notes == 0 => format!("clean{after}, nothing is wrong"),
        Verdict::Clean => format!("clean{after}, {}", counts(report)),
        Verdict::Leaks => format!("leaks{after}, {}: space is lost, no data is at risk", counts(report)),
        Verdict::Corrupt => {
            format!("corrupt{after}, {}: data is wrong, or may come to be when it is written", counts(report))
        }
    }
}

/// The repair to suggest, if none was tried; never one that would be refused.
fn advice(report: &Report, repair: Option<Repairs>) -> Option<String> {
    let (kind, advice) = match (report.verdict(), repair) {
        (Verdict::Leaks, None) => {
            (RepairKind::Leaks, "`strata check -r leaks` gives the space back to the host")
        }
        (Verdict::Corrupt, None | Some(Repairs::Leaks)) => {
            (RepairKind::All, "`strata check -r all` mends it; make a copy of the image first")
        }
        _ => return None,
    };
    match report.refusal(kind) {
        Some(refusal) => {
            let what = if kind == RepairKind::Leaks { "leaks" } else { "all" };
            Some(format!("`strata check -r {what}` would refuse it: {refusal}"))
        }
        None if report.has_unread_snapshots() => {
            Some(format!("{advice}. It drops the snapshots that cannot be read: no cluster belongs to them"))
        }
        None => Some(advice.to_owned()),
    }
}

fn numbers(report: &Report, text: &mut String) {
    let Report { total_clusters: total, allocated_clusters: allocated, .. } = *report;
    let part = |count: u64, of: u64| if of == 0 { 0.0 } else { count as f64 * 100.0 / of as f64 };
    let _ = writeln!(
        text,
        "{allocated} of {total} clusters allocated ({:.2} %), {:.2} % fragmented, {:.2} % compressed",
        part(allocated, total),
        part(report.fragmented_clusters, allocated),
        part(report.compressed_clusters, allocated)
    );
    let _ = writeln!(text, "the image ends at {}", size::in_words(report.image_end_offset));
}
