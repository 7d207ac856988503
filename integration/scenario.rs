//! The guests' work on a disk, and the conditions that must hold afterwards. Shared by the demo and the VM tests.
//!
//! Owns the scripts' parameters and every check of a visit. It never starts a process itself.

use crate::image;
use crate::stand::{Checkpoint, Stand, Visit};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::Path;

/// The files that the first visit creates and deletes.
const DELETED: [&str; 4] = ["f1-1k", "f3-17k", "f6-513k", "f9-4096k"];

/// The parameters of the file system scenario.
#[derive(Clone, Debug)]
pub struct Work {
    /// MiB that each of two fio jobs writes and verifies.
    pub fio_mib: u64,
    /// Additional options of mkfs.ext4, such as `-E nodiscard`.
    pub mkfs_options: String,
    /// MiB from the disk's start that the guest reads before it writes: the data of the layers below.
    pub base_mib: u64,
}

/// fio's measurements of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Throughput {
    /// Requests a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Total bytes.
    pub bytes: u64,
}

/// fio's two phases: writing, then reading with a check of every block.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fio {
    /// The reads of the verification.
    pub read: Throughput,
    /// The writes.
    pub write: Throughput,
}

impl Fio {
    /// Parses fio's JSON, in which group reporting leaves one job. An error that fio reports is returned as an error.
    pub fn parse(json: &str) -> Result<Self> {
        // fio may print warnings before the object.
        let start = json.find('{').context("fio gave no JSON")?;
        let value: serde_json::Value = serde_json::from_str(&json[start..]).context("fio's JSON")?;
        let job = &value["jobs"][0];
        let error = job["error"].as_i64().context("fio's JSON has no job")?;
        ensure!(error == 0, "fio ended with error {error}");
        let of = |side: &str| Throughput {
            iops: job[side]["iops"].as_f64().unwrap_or(0.0),
            bytes_per_second: job[side]["bw_bytes"].as_f64().unwrap_or(0.0),
            bytes: job[side]["io_bytes"].as_u64().unwrap_or(0),
        };
        Ok(Self { read: of("read"), write: of("write") })
    }
}

/// The first visit and its results.
#[derive(Clone, Debug)]
pub struct FirstVisit {
    /// All reports and measurements.
    pub visit: Visit,
    /// The files at its end, with their checksums.
    pub files: BTreeMap<String, String>,
    /// fio's measurements.
    pub fio: Fio,
}

/// Reads the disk, creates a file system, runs fio, writes and deletes files, trims. `expected_base` is the checksum of
/// the first `work.base_mib` MiB, computed on the host.
pub fn first_visit(
    stand: &Stand,
    name: &str,
    work: &Work,
    expected_base: &str,
    watch: &mut dyn FnMut(&Checkpoint),
) -> Result<FirstVisit> {
    let script = format!(
        "FIO_SIZE={}\nMKFS_OPTIONS='{}'\nBASE_MIB={}\n{}",
        work.fio_mib,
        work.mkfs_options,
        work.base_mib,
        include_str!("guest/first_boot.sh")
    );
    let visit = stand.visit(name, &script, watch)?;
    let base = visit.fact("base.md5")?;
    ensure!(base == expected_base, "the guest read {base}, but the layers below hold {expected_base}");
    expect_write_back(&visit)?;
    let queues = visit.number("disk.queues")?;
    ensure!(queues == u64::from(stand.serve.queues), "the guest sees {queues} queues");
    ensure!(visit.number("disk.discard_max")? > 0, "the disk does not support discards");
    let fio = Fio::parse(visit.fact("fio")?)?;
    let wanted = (work.fio_mib * 2) << 20;
    ensure!(fio.write.bytes >= wanted && fio.read.bytes >= wanted, "fio did less than required: {fio:?}");
    let interrupts = queue_interrupts(&visit)?;
    ensure!(interrupts.iter().all(|count| *count > 0), "a queue was not used: {interrupts:?}");
    ensure!(visit.number("trimmed")? > 0, "fstrim trimmed nothing");
    let mut files = visit.sums("file");
    ensure!(files.len() > DELETED.len(), "files are missing: {files:?}");
    for name in DELETED {
        ensure!(files.remove(name).is_some(), "{name} was never written");
    }
    expect_space_given_back(&visit)?;
    Ok(FirstVisit { visit, files, fio })
}

/// Checks that the guest uses writeback: with writethrough it sends no flush, and this scenario would test none.
pub fn expect_write_back(visit: &Visit) -> Result<()> {
    let cache = visit.fact("disk.cache")?;
    ensure!(cache == "write back", "the guest's cache mode is {cache}: it would never flush");
    Ok(())
}

/// Interrupts by queue, as the guest's kernel counted them.
pub fn queue_interrupts(visit: &Visit) -> Result<Vec<u64>> {
    let counts = visit.fact("queue.interrupts")?;
    counts.split_whitespace().map(|count| count.parse().context("interrupt counts")).collect()
}

/// Checks that the deleted and trimmed space is given back to the host, at the latest at the daemon's end.
fn expect_space_given_back(visit: &Visit) -> Result<()> {
    let full = visit.checkpoint("files")?.allocated;
    let end = visit.allocated_at_end;
    let deleted = visit.checkpoint("fio")?.requests.written_bytes / 4;
    ensure!(end + deleted <= full, "the image occupied {full} bytes before the trim and {end} after it");
    Ok(())
}

/// The second visit, in a new machine: the file system is clean and every file is there. The visit's last fact is the
/// checksum of the disk's first `sum_mib` MiB.
pub fn second_visit(
    stand: &Stand,
    name: &str,
    sum_mib: u64,
    expected: &BTreeMap<String, String>,
) -> Result<Visit> {
    let script = format!("SUM_MIB={sum_mib}\n{}", include_str!("guest/second_boot.sh"));
    let visit = stand.visit(name, &script, &mut |_| {})?;
    same_files(expected, &visit.sums("file"), "the second visit")?;
    Ok(visit)
}

/// Checks that the image is clean and that QEMU reads the same from it as the guest. Compared are the disk's first
/// `sum_mib` MiB by checksum, and every file.
pub fn host_agrees(
    stand: &Stand,
    last: &Visit,
    sum_mib: u64,
    expected: &BTreeMap<String, String>,
    scratch: &Path,
) -> Result<()> {
    image::expect_clean(&stand.serve.image)?;
    let raw = scratch.join("flat.raw");
    image::flatten(&stand.serve.image, &stand.serve.format, &raw)?;
    let (guest, host) = (last.fact("disk.md5")?, image::md5(&raw, sum_mib)?);
    ensure!(guest == host, "the guest read the checksum {guest}, qemu-img reads {host}");
    let mut found = image::files_in_ext4(&raw, "/files", scratch)?;
    ensure!(found.remove("second-visit").is_some(), "the file of the second visit is not in the image");
    same_files(expected, &found, "the image read by qemu-img")?;
    std::fs::remove_file(&raw)?;
    Ok(())
}

/// Checks that two sets of files have the same names and checksums.
fn same_files(
    expected: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
    place: &str,
) -> Result<()> {
    for (name, sum) in expected {
        match found.get(name) {
            Some(other) if other == sum => {}
            Some(other) => bail!("{place}: {name} has the checksum {other} instead of {sum}"),
            None => bail!("{place}: {name} is missing"),
        }
    }
    let extra: Vec<&String> = found.keys().filter(|name| !expected.contains_key(*name)).collect();
    ensure!(extra.is_empty(), "{place}: unexpected files: {extra:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fios_results_and_errors_are_parsed() {
        let json = |error: u8| {
            let side = r#"{"iops": 10.5, "bw_bytes": 4096, "io_bytes": 8192}"#;
            format!(r#"note: x {{"jobs": [{{"error": {error}, "read": {side}, "write": {side}}}]}}"#)
        };
        let fio = Fio::parse(&json(0)).expect("good JSON");
        assert_eq!((fio.read.bytes, fio.write.iops), (8192, 10.5));
        assert!(Fio::parse(&json(84)).is_err());
        assert!(Fio::parse("{}").is_err());
        assert!(Fio::parse("").is_err());
    }

    #[test]
    fn missing_changed_and_extra_files_are_found() {
        let set = |names: &[(&str, &str)]| -> BTreeMap<String, String> {
            names.iter().map(|(name, sum)| ((*name).to_owned(), (*sum).to_owned())).collect()
        };
        let expected = set(&[("a", "1"), ("b", "2")]);
        assert!(same_files(&expected, &expected.clone(), "here").is_ok());
        assert!(same_files(&expected, &set(&[("a", "1")]), "here").is_err());
        assert!(same_files(&expected, &set(&[("a", "1"), ("b", "3")]), "here").is_err());
        assert!(same_files(&expected, &set(&[("a", "1"), ("b", "2"), ("c", "3")]), "here").is_err());
    }
}
