//! What guests do on a disk, and what must be true afterwards. Shared by the demo and the VM tests.
//!
//! Owns the scripts' parameters and every judgement about a visit. It never starts a process itself.

use crate::image;
use crate::stand::{Checkpoint, Stand, Visit};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::Path;

/// The files that the first visit deletes again.
const DELETED: [&str; 4] = ["f1-1k", "f3-17k", "f6-513k", "f9-4096k"];

/// What varies between uses of the file system scenario.
#[derive(Clone, Debug)]
pub struct Work {
    /// MiB that each of two fio jobs writes and verifies.
    pub fio_mib: u64,
    /// More options of mkfs.ext4, such as `-E nodiscard`.
    pub mkfs_options: String,
    /// MiB from the disk's start that the guest reads before it writes: what the layers below say.
    pub base_mib: u64,
}

/// What fio measured in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Throughput {
    /// Requests a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Bytes in all.
    pub bytes: u64,
}

/// fio's two halves: writing, then reading with a check of every block.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fio {
    /// Reads of the verification.
    pub read: Throughput,
    /// Writes.
    pub write: Throughput,
}

impl Fio {
    /// Out of fio's JSON, group-reported: one job. Any fio error in it is ours.
    pub fn parse(json: &str) -> Result<Self> {
        // fio may put warnings before the object
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

/// The first visit and what it was judged by.
#[derive(Clone, Debug)]
pub struct FirstVisit {
    /// All that was reported and measured.
    pub visit: Visit,
    /// The files that are there at its end, with their sums.
    pub files: BTreeMap<String, String>,
    /// What fio measured.
    pub fio: Fio,
}

/// Looks at the disk, makes a file system, works, deletes, trims. `expected_base` is the sum of the first
/// `work.base_mib` MiB as the host knows it.
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
    ensure!(base == expected_base, "the guest read {base} where the layers below hold {expected_base}");
    expect_write_back(&visit)?;
    let queues = visit.number("disk.queues")?;
    ensure!(queues == u64::from(stand.serve.queues), "the guest sees {queues} queues");
    ensure!(visit.number("disk.discard_max")? > 0, "the disk takes no discards");
    let fio = Fio::parse(visit.fact("fio")?)?;
    let wanted = (work.fio_mib * 2) << 20;
    ensure!(fio.write.bytes >= wanted && fio.read.bytes >= wanted, "fio did less than asked: {fio:?}");
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

/// A guest that takes the disk for write-through sends no flush, and then nothing here would try one.
pub fn expect_write_back(visit: &Visit) -> Result<()> {
    let cache = visit.fact("disk.cache")?;
    ensure!(cache == "write back", "the guest takes the disk for {cache}: it would never flush");
    Ok(())
}

/// Interrupts by queue, as the guest's kernel counted them.
pub fn queue_interrupts(visit: &Visit) -> Result<Vec<u64>> {
    let counts = visit.fact("queue.interrupts")?;
    counts.split_whitespace().map(|count| count.parse().context("interrupt counts")).collect()
}

/// The deleted and trimmed space has to be back with the host at the latest when the daemon has ended.
fn expect_space_given_back(visit: &Visit) -> Result<()> {
    let full = visit.checkpoint("files")?.allocated;
    let end = visit.allocated_at_end;
    let deleted = visit.checkpoint("fio")?.requests.written_bytes / 4;
    ensure!(end + deleted <= full, "the image took {full} bytes before the trim and takes {end} after it");
    Ok(())
}

/// In a fresh machine: clean file system, every file there. Gives the visit.
/// Its last fact is the sum of the disk's first `sum_mib` MiB.
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

/// The image is clean, and what QEMU reads from it is what the guest saw: the disk's first
/// `sum_mib` MiB by one sum, and every file.
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
    ensure!(guest == host, "the guest's disk was {guest}, qemu-img reads {host}");
    let mut found = image::files_in_ext4(&raw, "/files", scratch)?;
    ensure!(found.remove("second-visit").is_some(), "the file of the second visit is not in the image");
    same_files(expected, &found, "the image read by qemu-img")?;
    std::fs::remove_file(&raw)?;
    Ok(())
}

/// Both sets of files are the same, names and sums.
fn same_files(
    expected: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
    place: &str,
) -> Result<()> {
    for (name, sum) in expected {
        match found.get(name) {
            Some(other) if other == sum => {}
            Some(other) => bail!("{place}: {name} has the sum {other} instead of {sum}"),
            None => bail!("{place}: {name} is gone"),
        }
    }
    let extra: Vec<&String> = found.keys().filter(|name| !expected.contains_key(*name)).collect();
    ensure!(extra.is_empty(), "{place}: files that should not be there: {extra:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fio_results_are_read_and_errors_are_errors() {
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
    fn files_are_compared_both_ways() {
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
