//! Tests the output for made-up reports.

use super::*;
use disk::check::{FindingKind, Tally};
use qcow2::{EntryError, HostOffset};

fn report() -> Report {
    let finding = |offset, kind| Finding { offset: HostOffset(offset), kind };
    let leak = FindingKind::Leak { recorded: 2, references: 1 };
    let source = EntryError::DataAtOffsetZero { raw: 1 << 63 };
    let odd = FindingKind::BadEntry { part: disk::check::ImagePart::L2, source };
    let low = FindingKind::RefcountTooLow { recorded: 0, references: 1 };
    let mut report = Report::default();
    (report.corruptions, report.notes, report.leaked_clusters) = (1, 1, 5);
    report.findings = vec![finding(65536, leak), finding(8, odd), finding(131_072, leak), finding(512, low)];
    report.tallies = [("leak", 5), ("odd-entry", 1), ("refcount-too-low", 1)]
        .map(|(name, count)| Tally { name, count })
        .to_vec();
    (report.total_clusters, report.allocated_clusters) = (200, 50);
    (report.fragmented_clusters, report.compressed_clusters) = (5, 1);
    report.image_end_offset = 1 << 20;
    report
}

fn plain(report: Report) -> Outcome {
    Outcome { report, before: None, not_repaired: None }
}

fn text(repair: Option<Repairs>, outcome: &Outcome) -> String {
    text_form::outcome(Path::new("a\x1b.qcow2"), repair, outcome)
}

#[test]
fn findings_are_listed_by_kind_and_the_rest_counted() {
    let told = text(None, &plain(report()));
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[0].starts_with("leak       offset "), "{told}");
    assert!(lines[1].contains("refcount 2, references 1"), "{told}");
    assert_eq!(lines[2], "           and 3 more of this kind (leak)");
    assert!(lines[3].starts_with("note ") && lines[4].starts_with("corruption "), "{told}");
    assert!(
        lines[5].starts_with("a\\u{1b}.qcow2: corrupt, 1 corruption, 5 leaked clusters, 1 note:"),
        "{told}"
    );
    assert!(lines[6].contains("-r all"), "{told}");
    assert_eq!(lines[7], "50 of 200 clusters allocated (25.00 %), 10.00 % fragmented, 2.00 % compressed");
    assert_eq!(lines[8], "the image ends at 1 MiB (1048576 bytes)");
}

#[test]
fn a_repair_tells_before_and_after() {
    let outcome = Outcome { report: Report::default(), before: Some(report()), not_repaired: None };
    let told = text(Some(Repairs::All), &outcome);
    assert!(told.contains("1 corruption, 5 leaked clusters, 1 note before the repair"), "{told}");
    assert!(
        told.contains("clean after the repair, nothing is wrong") && !told.contains("strata check"),
        "{told}"
    );
    let outcome = Outcome { not_repaired: Some("no way".into()), ..plain(report()) };
    assert!(text(Some(Repairs::All), &outcome).contains("not repaired: no way\n"));
}

#[test]
fn json_has_the_keys_of_qemu_img() {
    let mut left = report();
    left.leaked_clusters = 2;
    let outcome = Outcome { before: Some(report()), ..plain(left) };
    let value: serde_json::Value =
        serde_json::from_str(&json(Path::new("a"), Some(Repairs::Leaks), &outcome)).expect("JSON");
    for (key, number) in [
        ("check-errors", 0),
        ("corruptions", 1),
        ("leaks", 2),
        ("corruptions-fixed", 0),
        ("leaks-fixed", 3),
        ("total-clusters", 200),
        ("allocated-clusters", 50),
        ("fragmented-clusters", 5),
        ("compressed-clusters", 1),
        ("image-end-offset", 1 << 20),
    ] {
        assert_eq!(value[key], number, "{key}");
    }
    assert_eq!((&value["filename"], &value["format"]), (&"a".into(), &"qcow2".into()));
    assert_eq!(value["counts"]["leak"], 5);
    let finding = &value["findings"][3];
    assert_eq!((&finding["kind"], &finding["severity"]), (&"refcount-too-low".into(), &"corruption".into()));
    assert_eq!(finding["offset"], 512);
    let value: serde_json::Value =
        serde_json::from_str(&json(Path::new("a"), None, &plain(report()))).expect("JSON");
    assert!(value.get("leaks-fixed").is_none());
}
