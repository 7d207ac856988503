//! Strata's checker and `qemu-img check` on the same image: the one call with which a test ends that made an image.
//!
//! Owns when the two agree, and the list of what they are allowed to disagree on.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use disk::check::{CheckError, FindingKind, Report, Verdict};
use disk::{DiskOptions, OpenError};
use qcow2::EntryError;
use serde_json::Value;
use storage::host::HostStorage;
use strata_tests::images::find_tool;

/// What `qemu-img check` says, with its numbers.
#[derive(Debug)]
pub struct Second {
    /// None if it could not check, or not to the end.
    pub verdict: Option<Verdict>,
    /// Leaked clusters.
    pub leaks: u64,
    /// All that it printed.
    pub text: String,
    json: Value,
}

/// Asks `qemu-img`.
///
/// # Panics
/// If it is not installed: whoever has an image of QEMU's has looked for it before.
pub fn second_opinion(image: &Path) -> Second {
    let mut command = Command::new(find_tool("qemu-img").expect("found before"));
    // Where the names of its other files are looked for.
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
    /// A number that it leaves out if it is 0.
    fn number(&self, name: &str) -> u64 {
        self.json.get(name).and_then(Value::as_u64).unwrap_or(0)
    }
}

/// Our check, within a time that only a hang exceeds.
///
/// # Errors
/// As [`disk::check::check`].
///
/// # Panics
/// If it takes longer.
pub fn our_opinion(image: &Path) -> Result<Report, CheckError> {
    let options =
        DiskOptions { lock_timeout: Duration::from_secs(5), direct: false, ..DiskOptions::default() };
    let start = Instant::now();
    let result = disk::check::check(&HostStorage::new(), image, &options);
    assert!(start.elapsed() < Duration::from_secs(30), "{}: took {:?}", image.display(), start.elapsed());
    result
}

/// What we call corrupt and QEMU does not, and nothing else: metadata that something else lies upon, with refcounts
/// that agree, where the next change of a mapping would change guest data or be changed by it; and the zero flag in version
/// 2, and data elsewhere than it must be in an external file, where QEMU fails to read what its own check lets pass.
pub fn is_exception(kind: &FindingKind) -> bool {
    match kind {
        FindingKind::Overlap { .. } | FindingKind::ZeroFlag { .. } => true,
        FindingKind::BadEntry { source, .. } => matches!(source, EntryError::DataFileOffset { .. }),
        _ => false,
    }
}

/// True if the two verdicts are the same, or ours is stricter for what [`is_exception`] says and nothing else.
fn is_same(ours: &Report, theirs: Verdict) -> bool {
    let mut corruptions =
        ours.findings.iter().map(|finding| finding.kind).filter(|kind| !kind.is_leak() && !kind.is_note());
    ours.verdict() == theirs
        || (ours.verdict() == Verdict::Corrupt && corruptions.all(|kind| is_exception(&kind)))
}

/// Asserts that both checkers say the same of an image; what they say. None of an image whose header neither takes.
///
/// # Panics
/// If they disagree.
pub fn check_agrees(image: &Path, what: &str) -> Option<Report> {
    let theirs = second_opinion(image);
    let ours = match our_opinion(image) {
        Ok(report) => report,
        Err(CheckError::Open(OpenError::Format { .. })) if theirs.verdict.is_none() => return None,
        Err(error) => panic!("{what}: {error}\n{}", theirs.text),
    };
    // QEMU gives up where it cannot read a structure.
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

/// Asserts that both checkers find nothing wrong: how a test ends that wrote to an image.
///
/// # Panics
/// If one does.
pub fn assert_clean(image: &Path, what: &str) {
    let report = check_agrees(image, what).unwrap_or_else(|| panic!("{what}: the header is broken"));
    assert_eq!((report.verdict(), report.notes), (Verdict::Clean, 0), "{what}: {report:#?}");
}
