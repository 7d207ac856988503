//! A second opinion on a sample of the crash states: `qemu-img` checks and reads them as real files.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use storage_sim::Image;
use strata_kit::Qemu;
use strata_kit::images::{Check, Format};

use super::examine::Seen;
use super::shape::{BASE, DATA, Start, TOP, overlay_names};
use super::stamp::read_stamps;

/// One distinct state in this many is sampled.
const ONE_IN: u64 = 500;

/// QEMU's tools, if present.
pub struct SecondOpinion {
    qemu: Option<Qemu>,
    offered: AtomicU64,
    given: AtomicU64,
}

impl SecondOpinion {
    /// Finds the tools. Without them the comparison is skipped visibly.
    pub fn find() -> Self {
        SecondOpinion { qemu: Qemu::find(), offered: AtomicU64::new(0), given: AtomicU64::new(0) }
    }

    /// Compares with QEMU's opinion if this state is in the sample. Dirty images are left out.
    ///
    /// # Errors
    /// The difference between the two.
    pub fn ask(&self, image: &Image, start: &Start, seen: &Seen) -> Result<(), String> {
        let Some(qemu) = self.qemu.as_ref().filter(|_| !seen.dirty && start.shape.is_qcow2()) else {
            return Ok(());
        };
        if !self.offered.fetch_add(1, Ordering::Relaxed).is_multiple_of(ONE_IN) {
            return Ok(());
        }
        self.given.fetch_add(1, Ordering::Relaxed);
        compare(qemu, &start.revealed(image), &start.top, seen)
    }
}

fn compare(qemu: &Qemu, image: &Image, top: &str, seen: &Seen) -> Result<(), String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let top = folder.path().join(top);
    for name in overlay_names().chain([TOP.to_owned(), BASE.to_owned()]) {
        if image.file(Path::new(&name)).is_some() {
            image.export(Path::new(&name), &folder.path().join(&name)).expect("an export");
        }
    }
    let top = if image.file(Path::new(DATA)).is_some() {
        let data = folder.path().join(DATA);
        image.export(Path::new(DATA), &data).expect("an export");
        // The header names no data file.
        let node = |path: &Path| serde_json::json!({ "driver": "file", "filename": path });
        let name = serde_json::json!({ "driver": "qcow2", "file": node(&top), "data-file": node(&data) });
        PathBuf::from(format!("json:{name}"))
    } else {
        top
    };
    if seen.shy {
        // Version 2 has no mark for this state, but a repair finds its faults.
        qemu.img(["check", "-q", "-r", "all", "-f", "qcow2", &top.display().to_string()])
            .map_err(|error| format!("qemu-img check -r all: {error}"))?;
    }
    let verdict = match qemu.check(&top).map_err(|error| format!("qemu-img check: {error}"))? {
        Check::Clean => 0,
        Check::Leaks(leaks) => leaks,
        Check::Corrupt(text) => return Err(format!("qemu-img check finds errors: {text}")),
    };
    if verdict != if seen.shy { 0 } else { seen.leaks } {
        return Err(format!("qemu-img check finds {verdict} leaks, and we {}", seen.leaks));
    }
    let bytes = qemu.read_all(&top, Format::Qcow2).map_err(|error| format!("qemu-img convert: {error}"))?;
    let theirs = read_stamps(0, &bytes);
    match theirs.iter().zip(&seen.values).position(|(theirs, ours)| theirs != ours) {
        Some(sector) => {
            let (theirs, ours) = (theirs[sector], seen.values[sector]);
            Err(format!("qemu-img reads {theirs} in sector {sector}, and we {ours}"))
        }
        None if theirs.len() != seen.values.len() => Err(format!("qemu-img reads {} sectors", theirs.len())),
        None => Ok(()),
    }
}

impl fmt::Display for SecondOpinion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.qemu {
            Some(_) => write!(f, "{} of these read by qemu-img too", self.given.load(Ordering::Relaxed)),
            None => f.write_str("none read by qemu-img, which is not installed"),
        }
    }
}
