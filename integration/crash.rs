//! A guest that loses its daemon and its power while it writes, life after life. Each life must find the data that
//! earlier lives synced.
//!
//! Owns the lives' parameters, the record of synced data and the check of it. It starts no process itself.
//!
//! The disk has an ext4 file system, and areas for fio behind it. The kill of a process does not affect the host's
//! page cache. This tests the daemon's writes to the host before it completes a request, not the host's disk.

use crate::areas::{Areas, Content, Found};
use crate::image::{self, Health};
use crate::scenario::{self, Fio};
use crate::stand::{Stand, Visit};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::path::Path;

/// The file system's size in MiB.
pub const FILES_MIB: u64 = 128;
/// An area's size in MiB.
const AREA_MIB: u64 = 8;
/// Areas that each of fio's writers fills in turn.
const AREAS: u64 = 3;
/// fio's writers: one per queue of the guest.
const WRITERS: u64 = 2;
/// The disk's size in MiB.
pub const DISK_MIB: u64 = FILES_MIB + WRITERS * AREAS * AREA_MIB;
const MIB: u64 = 1 << 20;

/// The record of data synced in all lives so far.
#[derive(Clone, Debug)]
pub struct Record {
    files: BTreeMap<String, String>,
    areas: Areas,
    lives: u64,
}

/// The moment of a kill, counted in work that the guest has done, so that it does not depend on the machine's speed.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// fio passes that must end first in this life.
    pub passes: usize,
    /// Files that must be synced after that.
    pub files: usize,
}

impl Moment {
    fn has_come(self, visit: &Visit) -> bool {
        let mut passes = 0;
        let after = visit.facts.iter().skip_while(|(key, _)| {
            passes += usize::from(key == "flushed");
            passes < self.passes
        });
        let mut after = after.peekable();
        after.peek().is_some() && after.filter(|(key, _)| key == "synced").count() >= self.files
    }
}

/// The state after a crash.
#[derive(Clone, Debug)]
pub struct Crash {
    /// The image's state right after the kill.
    pub health: Health,
    /// The sectors found in fio's areas.
    pub found: Found,
    /// Files and fio passes that the guest synced in this life.
    pub synced: (usize, usize),
}

impl Record {
    /// The record of a new disk, whose first `base_mib` MiB read as bytes `base` and the rest as zero.
    pub fn new(base_mib: u64, base: u8) -> Self {
        let content = |area| {
            let below = FILES_MIB + (area + 1) * AREA_MIB <= base_mib;
            if below { Content::Base(base) } else { Content::Zero }
        };
        let areas = Areas::new(FILES_MIB * MIB, AREA_MIB * MIB, (0..WRITERS * AREAS).map(content));
        Self { files: BTreeMap::new(), areas, lives: 0 }
    }

    /// Runs a life: the guest checks the data that earlier lives synced, then writes until the daemon is killed. Then
    /// QEMU's tools check the image.
    pub fn life(&mut self, stand: &Stand, moment: Moment, scratch: &Path) -> Result<Crash> {
        self.lives += 1;
        let life = format!("life-{}", self.lives);
        let script = format!(
            "{}{}\nLIFE={life}\nWRITERS={WRITERS}\nAREAS={AREAS}\nPASS={}\n{}",
            self.parameters(self.lives == 1),
            include_str!("guest/crash_check.sh"),
            self.areas.next_pass(),
            include_str!("guest/crash_writer.sh"),
        );
        let enough = |visit: &Visit| {
            // No writer ends by itself.
            let failed = visit.facts.iter().find(|(key, _)| key == "stopped");
            ensure!(failed.is_none(), "{life}: a writer of the guest ended: {failed:?}");
            Ok(moment.has_come(visit))
        };
        let visit = stand.crash(&life, &script, &enough)?;
        self.judge(&visit).context(life.clone())?;
        self.take_in(&visit).context(life.clone())?;
        let health = image::check(&stand.serve.image)?;
        if let Health::Broken(words) = &health {
            bail!("{life}: the image is damaged after the kill:\n{words}");
        }
        let flat = scratch.join("flat.raw");
        image::flatten(&stand.serve.image, &stand.serve.format, &flat)?;
        let disk = std::fs::read(&flat)?;
        std::fs::remove_file(&flat)?;
        let found = self.areas.judge(&disk).with_context(|| format!("{life}, as QEMU reads the disk"))?;
        let count = |wanted: &str| visit.facts.iter().filter(|(key, _)| key == wanted).count();
        let synced = (count("synced"), count("flushed"));
        Ok(Crash { health, found, synced })
    }

    /// Runs the last life: the guest checks all synced data and powers off.
    pub fn last_life(&self, stand: &Stand) -> Result<()> {
        let script = format!("{}{}", self.parameters(false), include_str!("guest/crash_check.sh"));
        let visit = stand.visit("last-life", &script, &mut |_| {})?;
        self.judge(&visit).context("the last life")
    }

    fn parameters(&self, first: bool) -> String {
        let pairs: Vec<String> = self.areas.flushed().map(|(area, pass)| format!("{area}:{pass}")).collect();
        let first = u8::from(first);
        let flushed = pairs.join(" ");
        format!("FIRST={first}\nFILES_MIB={FILES_MIB}\nAREA_MIB={AREA_MIB}\nFLUSHED='{flushed}'\n")
    }

    /// Checks what the guest found at its start.
    fn judge(&self, visit: &Visit) -> Result<()> {
        scenario::expect_write_back(visit)?;
        let found = visit.sums("file");
        for (name, sum) in &self.files {
            let there = found.get(name);
            ensure!(there == Some(sum), "{name} was synced with {sum}, but has {there:?} after the crash");
        }
        let areas = self.areas.flushed().count() as u64;
        if areas > 0 {
            // fio's success means that every block was correct; this checks how much it read.
            let read = Fio::parse(visit.fact("fio")?)?.read.bytes;
            ensure!(read == areas * AREA_MIB * MIB, "fio verified {read} bytes of {areas} areas");
        }
        Ok(())
    }

    /// Records the guest's reports up to the kill, in their order.
    fn take_in(&mut self, visit: &Visit) -> Result<()> {
        for (key, value) in &visit.facts {
            match key.as_str() {
                "begun" => self.areas.begun(value)?,
                "flushed" => self.areas.flushed_now(value)?,
                _ => {}
            }
        }
        self.files.extend(visit.sums("synced"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_moment_counts_files_after_the_passes() {
        let mut visit = Visit::default();
        let moment = Moment { passes: 2, files: 1 };
        let mut came = Vec::new();
        for key in ["synced", "flushed", "synced", "flushed", "begun", "synced"] {
            visit.facts.push((key.to_owned(), String::new()));
            came.push(moment.has_come(&visit));
        }
        assert_eq!(came, [false, false, false, false, false, true]);
        assert!(Moment { passes: 2, files: 0 }.has_come(&visit));
        assert!(!Moment { passes: 3, files: 0 }.has_come(&visit));
    }
}
