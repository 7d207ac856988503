//! Probes damaged images one by one. Each is refused by name, or served as far as it is intact, in little time and
//! memory. `damage/table.txt` records the outcome for each, and what QEMU does.
//!
//! `STRATA_DAMAGE_WRITE=1` writes the table again. Then read it: every line is a promise.

mod probe;
mod qemu;
mod reasons;
mod table;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use disk::check::Verdict;
use disk::{Disk, DiskOptions};
use qcow2::{Geometry, NewImage, Version};
use storage::host::HostStorage;
use strata_kit::Qemu;

use crate::probe::{Opened, Outcome, Read, probe};
use crate::table::Row;
use strata_fuzz_targets::meter::measure;
use strata_rig::damage::{
    BACKING, BITMAPS, Damage, EXTENSIONS, FILE, HEADER, LENGTHS, MAPPING, PACKED, REFCOUNTS, Raw, SNAPSHOTS,
};
use strata_rig::victims::{self, Victim};

/// The longest time that the whole probe of one image may take.
const TIME_MAX: Duration = Duration::from_secs(1);
/// The most heap that the probe may hold, in bytes.
const BYTES_MAX: usize = 64 << 20;
/// The greatest length of an image in bytes.
const FILE_MAX: usize = 1 << 20;
/// The most heap, in bytes, that a chain of images may hold whose tables are holes in their files.
const HOLES_BYTES_MAX: usize = 16 << 20;
/// The least number of images.
const ROWS_MIN: usize = 300;
/// Images that QEMU does not get: it follows a chain that leads to itself until it runs out of memory.
const ENDLESS: &str = "over itself";

/// Each image to be damaged, with the lists of its damages.
fn victims() -> Vec<(Victim, Vec<&'static [Damage]>)> {
    vec![
        (victims::plain(), vec![HEADER, LENGTHS, EXTENSIONS, BACKING, MAPPING, REFCOUNTS, FILE, PACKED]),
        (victims::old(), vec![MAPPING]),
        (victims::subclusters(), vec![MAPPING, FILE]),
        (victims::snapshot(), vec![SNAPSHOTS, MAPPING]),
        (victims::bitmap(), vec![BITMAPS]),
        (victims::data_file(), vec![MAPPING]),
    ]
}

fn rows() -> Vec<(Row, Victim)> {
    let mut rows = Vec::new();
    for (victim, lists) in victims() {
        let sound = Raw::new(victim.bytes.clone());
        for (damage, run) in lists.into_iter().flatten() {
            let mut raw = sound.clone();
            if run(&mut raw) {
                let row = Row { victim: victim.name, damage, bytes: raw.bytes };
                rows.push((row, victim.clone()));
            }
        }
    }
    rows
}

/// Probes an image within the bounds.
fn judge(row: &Row, victim: &Victim) -> Outcome {
    assert!(row.bytes.len() <= FILE_MAX || row.damage.contains("longer"), "{}: not a small file", row.name());
    let (outcome, cost) = measure(|| probe(&row.bytes, victim));
    assert!(cost.time <= TIME_MAX, "{}: took {:?}", row.name(), cost.time);
    assert!(cost.bytes <= BYTES_MAX, "{}: held {} bytes", row.name(), cost.bytes);
    if outcome.checked.as_ref().is_ok_and(|(verdict, _)| *verdict == Verdict::Clean) {
        assert_served(row, &outcome);
    }
    outcome
}

/// Asserts that an image which the checker calls clean is served whole, except streams of compressed clusters, which no
/// check reads.
fn assert_served(row: &Row, outcome: &Outcome) {
    let failed = outcome.reads.values().filter_map(|read| match read {
        Read::Fails(why) => Some(why),
        _ => None,
    });
    let failed = failed.chain(outcome.writes.iter().filter_map(|(_, why)| why.as_ref()));
    let unexcused: Vec<&String> = failed.filter(|why| !why.contains("compressed cluster at")).collect();
    assert!(unexcused.is_empty() && !outcome.marked, "{}: clean, but {unexcused:?}", row.name());
}

#[test]
fn each_is_refused_by_name_or_served_as_far_as_it_is_whole() {
    let Some(_) = Qemu::find() else { return };
    let rows = rows();
    println!("{} damaged images", rows.len());
    assert!(rows.len() >= ROWS_MIN, "{} damaged images", rows.len());
    // Our outcomes come first, so that our faults show at once.
    let outcomes: Vec<Outcome> = rows.iter().map(|(row, victim)| judge(row, victim)).collect();
    let work: Vec<_> = rows.iter().zip(&outcomes).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let parts: Vec<String> = std::thread::scope(|scope| {
        let parts = work.chunks(work.len().div_ceil(threads)).map(|part| scope.spawn(|| describe(part)));
        let parts: Vec<_> = parts.collect();
        parts.into_iter().map(|part| part.join().expect("a part of the table")).collect()
    });
    let text = parts.concat();
    table::compare(&text, &Path::new(env!("CARGO_MANIFEST_DIR")).join("cases/damage/table.txt"));
    for damage in reasons::damages() {
        let used = text.lines().any(|line| line.ends_with(&format!(": {damage}")));
        assert!(used, "{damage}: there is no such row, but a reason for it");
    }
}

/// The rows of some images. This runs QEMU on them.
fn describe(part: &[(&(Row, Victim), &Outcome)]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let row = |((row, victim), ours): &(&(Row, Victim), &Outcome)| {
        let theirs =
            (!row.damage.starts_with(ENDLESS)).then(|| qemu::ask(folder.path(), &row.bytes, victim, ours));
        table::describe(row, ours, theirs.as_ref(), victim)
    };
    part.iter().map(row).collect()
}

/// Makes an image whose L1 table has 32 MiB and is a hole in its file.
fn write_holes(path: &Path, backing: Option<&str>) {
    let geometry = Geometry {
        version: Version::V3,
        size: 1 << 61,
        cluster_bits: 21,
        refcount_order: 4,
        extended_l2: false,
    };
    let image = NewImage {
        geometry,
        backing_file: backing.map(|name| name.as_bytes().to_vec()),
        backing_format: backing.map(|_| "qcow2".to_string()),
    };
    let file = File::create(path).expect("a file");
    for (offset, piece) in image.layout().expect("a layout") {
        file.set_len(offset.0 + piece.len() as u64).expect("a length");
        let used = piece.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        file.write_all_at(&piece[..used], offset.0).expect("room");
    }
}

#[test]
fn tables_that_are_holes_take_no_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let name = |layer: u32| format!("l{layer}.qcow2");
    for layer in 0..4 {
        write_holes(&folder.path().join(name(layer)), layer.checked_sub(1).map(name).as_deref());
    }
    for read_only in [true, false] {
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        let open = || Disk::open(HostStorage::new(), &folder.path().join(name(3)), &options);
        let (disk, cost) = measure(open);
        let disk = disk.expect("a chain");
        assert_eq!(disk.layers().len(), 4);
        assert!(cost.bytes <= HOLES_BYTES_MAX, "read-only {read_only}: held {} bytes", cost.bytes);
    }
}

#[test]
fn undamaged_images_are_served_whole() {
    let Some(_) = Qemu::find() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    for (victim, _) in victims() {
        let row = Row { victim: victim.name, damage: "nothing", bytes: victim.bytes.clone() };
        let ours = judge(&row, &victim);
        assert_eq!(ours.opened, Opened::Writable, "{}", victim.name);
        // Cluster 3 of the image with subclusters has two kinds of contents in one cluster.
        let expected: Vec<_> =
            victim.contents.iter().map(|(place, byte)| (*place, Read::All(*byte))).collect();
        assert_eq!(ours.reads.clone().into_iter().collect::<Vec<_>>(), expected, "{}", victim.name);
        assert!(
            ours.writes.iter().all(|(_, failed)| failed.is_none()) && ours.changed.is_empty(),
            "{ours:?}"
        );
        assert!(!ours.marked);
        let theirs = qemu::ask(folder.path(), &victim.bytes, &victim, &ours);
        assert_eq!((theirs.opened, &theirs.reads), (Opened::Writable, &ours.reads), "{}", victim.name);
        assert!(theirs.writes.iter().all(|done| *done) && !theirs.marked);
        std::fs::write(folder.path().join("top"), &victim.bytes).expect("an image");
        let check = std::process::Command::new("qemu-img")
            .args(["check", "-f", "qcow2", "top"])
            // The name of its data file is relative to this folder.
            .current_dir(folder.path())
            .output()
            .expect("runs");
        assert!(check.status.success(), "{}: {check:?}", victim.name);
    }
}
