//! `strata check`: finds and repairs what is wrong with an image, for people and for programs.
//!
//! Owns the exit codes, which are those of `qemu-img check`, and the JSON, spelled as there where it has the same
//! fact. The engine finds what is wrong; the text form is in `text_form`.

mod text_form;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use disk::check::{Finding, Progress, RepairKind, Report, Sharing, Verdict, check_watched, repair_watched};
use disk::{DiskOptions, OpenError};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use storage::host::HostStorage;

use crate::cli::{Cache, CheckArgs, ImageFormat, Repairs};
use crate::error::{ProgramError, Purpose};
use crate::text::{self, json_name, print};

/// Long enough for the last I/O of a daemon that was just killed, short enough that people do not wonder.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// The bar appears only after this many pieces: a shorter check has nothing to show.
const BAR_DELAY_PIECES: u64 = 8;

/// The result of a check, and of a repair if one ran.
struct Outcome {
    /// The image's report now.
    report: Report,
    /// The report before a repair that wrote something.
    before: Option<Report>,
    /// Why a requested repair did not run.
    not_repaired: Option<String>,
}

/// The outcome for programs. Numbers that QEMU's ImageCheck has use its names.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Facts<'a> {
    filename: String,
    format: &'static str,
    /// Always 0: a check that meets a host error prints nothing here.
    check_errors: u64,
    corruptions: u64,
    leaks: u64,
    /// Harmless breaches of the format: they do not change the exit code.
    notes: u64,
    /// Only if a repair was requested, like the next two.
    #[serde(skip_serializing_if = "Option::is_none")]
    corruptions_fixed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    leaks_fixed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_repaired: Option<&'a str>,
    total_clusters: u64,
    allocated_clusters: u64,
    fragmented_clusters: u64,
    compressed_clusters: u64,
    /// In bytes.
    image_end_offset: u64,
    /// How many findings of each kind.
    counts: BTreeMap<&'static str, u64>,
    /// The first findings of each kind.
    findings: Vec<FindingFacts>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct FindingFacts {
    kind: &'static str,
    severity: &'static str,
    /// Offset in the image file, in bytes.
    offset: u64,
    text: String,
}

/// Runs the command: exit code 0 for a clean image, 2 for a corrupt one, 3 for one with leaks.
///
/// # Errors
/// When the image could not be checked or repaired, or the result cannot be printed. The exit code is 1, or 63 if
/// its format has nothing to check.
pub fn run(options: &CheckArgs) -> Result<ExitCode, ProgramError> {
    if options.format == ImageFormat::Raw {
        return Err(ProgramError::NothingToCheck { image: options.image.clone() });
    }
    let storage = options.lock.storage().confined(&options.chain_root).map_err(ProgramError::ChainRoot)?;
    let purpose = if options.repair.is_some() { Purpose::Repair } else { Purpose::Check };
    let outcome = examine(&storage, options).map_err(|source| ProgramError::Check {
        image: options.image.clone(),
        purpose,
        source: Box::new(source),
    })?;
    let text = if options.output.is_json() {
        json(&options.image, options.repair, &outcome)
    } else {
        text_form::outcome(&options.image, options.repair, &outcome)
    };
    print(&text).map_err(ProgramError::Print)?;
    Ok(exit_code(outcome.report.verdict()))
}

fn exit_code(verdict: Verdict) -> ExitCode {
    match verdict {
        Verdict::Clean => ExitCode::SUCCESS,
        Verdict::Corrupt => ExitCode::from(2),
        Verdict::Leaks => ExitCode::from(3),
    }
}

fn examine(storage: &HostStorage, options: &CheckArgs) -> Result<Outcome, OpenError> {
    let how = DiskOptions {
        direct: options.cache == Cache::Direct,
        lock_timeout: options.lock.timeout(LOCK_PATIENCE),
        ..DiskOptions::default()
    };
    let mut bar = Bar::new();
    let mut watch = |progress| bar.show(progress);
    let Some(repairs) = options.repair else {
        let sharing = if options.force_share { Sharing::All } else { Sharing::Readers };
        let report = check_watched(storage, &options.image, sharing, &how, &mut watch)?;
        return Ok(Outcome { report, before: None, not_repaired: None });
    };
    let kind = match repairs {
        Repairs::Leaks => RepairKind::Leaks,
        Repairs::All => RepairKind::All,
        Repairs::DropSnapshots => RepairKind::AllDroppingSnapshots,
    };
    match repair_watched(storage, &options.image, kind, &how, &mut watch) {
        Ok(repaired) => {
            let before = (repaired.writes > 0).then_some(repaired.found);
            Ok(Outcome { report: repaired.left, before, not_repaired: None })
        }
        Err(OpenError::NotRepairable { source, found, .. }) => {
            Ok(Outcome { report: *found, before: None, not_repaired: Some(source.to_string()) })
        }
        Err(error) => Err(error),
    }
}

fn severity(finding: &Finding) -> &'static str {
    if finding.kind.is_leak() {
        "leak"
    } else if finding.kind.is_note() {
        "note"
    } else {
        "corruption"
    }
}

fn json(image: &Path, repair: Option<Repairs>, outcome: &Outcome) -> String {
    let Outcome { report, before, not_repaired } = outcome;
    let before = before.as_ref().unwrap_or(report);
    let fixed = |before: u64, now: u64| repair.map(|_| before.saturating_sub(now));
    let findings = report.findings.iter().map(|finding| FindingFacts {
        kind: finding.kind.name(),
        severity: severity(finding),
        offset: finding.offset.0,
        text: finding.kind.to_string(),
    });
    let facts = Facts {
        filename: json_name(image),
        format: "qcow2",
        check_errors: 0,
        corruptions: report.corruptions,
        leaks: report.leaked_clusters,
        notes: report.notes,
        corruptions_fixed: fixed(before.corruptions, report.corruptions),
        leaks_fixed: fixed(before.leaked_clusters, report.leaked_clusters),
        not_repaired: not_repaired.as_deref(),
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        fragmented_clusters: report.fragmented_clusters,
        compressed_clusters: report.compressed_clusters,
        image_end_offset: report.image_end_offset,
        counts: report.tallies.iter().map(|tally| (tally.name, tally.count)).collect(),
        findings: findings.collect(),
    };
    text::json(&facts)
}

/// A progress bar on the standard error, if that is a terminal.
struct Bar {
    bar: ProgressBar,
    calls: u64,
}

impl Bar {
    fn new() -> Self {
        let style = ProgressStyle::with_template("{msg:24} {bar:40} {bytes} of {total_bytes}");
        let style = style.expect("a right template").progress_chars("#>-");
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_style(style);
        Bar { bar, calls: 0 }
    }

    fn show(&mut self, progress: Progress) {
        self.calls += 1;
        if self.calls > BAR_DELAY_PIECES {
            self.bar.set_message(format!("reading: {}", progress.part));
            self.bar.set_length(progress.total);
            self.bar.set_position(progress.done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests;
