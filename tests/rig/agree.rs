//! Strata's checker and `qemu-img check` on the same image, in one call at the end of every test that makes an image.
//!
//! Owns the rule for agreement, and the list of allowed disagreements.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use disk::check::{FindingKind, Report, Verdict};
use disk::{DiskOptions, OpenError};
use qcow2::EntryError;
use serde_json::Value;
use storage::host::HostStorage;
use strata_kit::images::find_tool;

/// The result of `qemu-img check`, with its numbers.
#[derive(Debug)]
pub struct Second {
    /// None if it could not complete the check.
    pub verdict: Option<Verdict>,
    /// Leaked clusters.
    pub leaks: u64,
    /// Its whole output.
    pub text: String,
    json: Value,
}

/// Checks an image with `qemu-img`.
///
/// # Panics
/// If it is not installed: a test with an image made by QEMU has already found it.
pub fn second_opinion(image: &Path) -> Second {
    let mut command = Command::new(find_tool("qemu-img").expect("found before"));
    // Names of other files in the image are relative to this folder.
    command.current_dir(image.parent().expect("a folder"));
    let output = command.args(["check", "--output=json", "-f", "qcow2"]).arg(image).output().expect("runs");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let verdict = match output.status.code() {
        Some(0) => Some(Verdict::Clean),
        Some(2) => Some(Verdict::Corrupt),
        Some(3) => Some(Verdict::Leaks),
        _ => None,
    };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let mut second = Second { verdict, leaks: 0, text, json };
    second.leaks = second.number("leaks");
    second
}

impl Second {
    /// A number of the output, which omits zeros.
    fn number(&self, name: &str) -> u64 {
        self.json.get(name).and_then(Value::as_u64).unwrap_or(0)
    }
}

/// The result of our check, within a time that only a hang exceeds.
///
/// # Errors
/// As [`disk::check::check`].
///
/// # Panics
/// If it takes longer.
pub fn our_opinion(image: &Path) -> Result<Report, OpenError> {
    let options =
        DiskOptions { lock_timeout: Duration::from_secs(5), direct: false, ..DiskOptions::default() };
    let start = Instant::now();
    let result = disk::check::check(&HostStorage::new(), image, &options);
    assert!(start.elapsed() < Duration::from_secs(30), "{}: took {:?}", image.display(), start.elapsed());
    result
}

/// True for the only findings that Strata calls corrupt and QEMU does not:
///
/// - Data or other metadata overlaps metadata, with refcounts that agree. The next change of a mapping would overwrite
///   guest data, or be overwritten by it.
/// - The zero flag in version 2, or data at a wrong offset of an external file. QEMU's check accepts
///   both, but QEMU fails to read them.
pub fn is_exception(kind: &FindingKind) -> bool {
    match kind {
        FindingKind::Overlap { .. } | FindingKind::ZeroFlag { .. } => true,
        FindingKind::BadEntry { source, .. } => matches!(source, EntryError::DataFileOffset { .. }),
        _ => false,
    }
}

/// True if both verdicts are the same, or if ours is stricter only because of findings that [`is_exception`] allows.
fn is_same(ours: &Report, theirs: Verdict) -> bool {
    let mut corruptions =
        ours.findings.iter().map(|finding| finding.kind).filter(|kind| !kind.is_leak() && !kind.is_note());
    ours.verdict() == theirs
        || (ours.verdict() == Verdict::Corrupt && corruptions.all(|kind| is_exception(&kind)))
}

/// Asserts that both checkers agree on an image, and returns the report. None if both refuse its header.
///
/// # Panics
/// If they disagree.
pub fn check_agrees(image: &Path, what: &str) -> Option<Report> {
    let theirs = second_opinion(image);
    let ours = match our_opinion(image) {
        Ok(report) => report,
        Err(OpenError::Format { .. }) if theirs.verdict.is_none() => return None,
        Err(error) => panic!("{what}: {error}\n{}", theirs.text),
    };
    // QEMU aborts the check if it cannot read a structure.
    let expected = theirs.verdict.unwrap_or(Verdict::Corrupt);
    assert!(is_same(&ours, expected), "{what}\nours: {ours:#?}\ntheirs: {}", theirs.text);
    if ours.verdict() != Verdict::Corrupt {
        let ours_and_theirs = [
            (ours.leaked_clusters, theirs.leaks),
            (ours.total_clusters, theirs.number("total-clusters")),
            (ours.allocated_clusters, theirs.number("allocated-clusters")),
            (ours.fragmented_clusters, theirs.number("fragmented-clusters")),
            (ours.compressed_clusters, theirs.number("compressed-clusters")),
            (ours.image_end_offset, theirs.number("image-end-offset")),
        ];
        for (ours, theirs_is) in ours_and_theirs {
            assert_eq!(ours, theirs_is, "{what}: {ours_and_theirs:?}\n{}", theirs.text);
        }
    }
    Some(ours)
}

/// Asserts that both checkers find nothing wrong. Tests that wrote to an image end with this.
///
/// # Panics
/// If one of them finds something.
pub fn assert_clean(image: &Path, what: &str) {
    let report = check_agrees(image, what).unwrap_or_else(|| panic!("{what}: the header is broken"));
    assert_eq!((report.verdict(), report.notes), (Verdict::Clean, 0), "{what}: {report:#?}");
}
