//! The fuzz targets: functions from bytes to nothing, which panic at a finding. The test target `fuzz` and
//! cargo-fuzz run the same ones.
//!
//! Owns the list of them, and the limits of one run. A program that uses this package gets its allocator, which counts
//! what a run holds.
#![allow(missing_docs, reason = "it is for the tests beside it, and says what it must where it is")]

mod bitmaps;
mod compressed;
mod extensions;
mod header;
pub mod host;
mod image;
pub mod meter;
mod packed;
mod ring;
pub mod session;
mod snapshots;
mod sound;
mod tables;
mod values;

pub use image::encode as encode_image;

use std::time::Duration;

use crate::meter::measure;

/// The longest time that one run may take.
const TIME_MAX: Duration = Duration::from_secs(1);
/// The most heap that one run may hold, in bytes. No input describes a file of more than 1 MiB.
const BYTES_MAX: usize = 64 << 20;

/// A fuzz target.
pub struct Target {
    /// Its name, also that of its corpus.
    pub name: &'static str,
    /// Judges an input; panics at a finding.
    judge: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "header", judge: header::judge },
    Target { name: "extensions", judge: extensions::judge },
    Target { name: "tables", judge: tables::judge },
    Target { name: "snapshots", judge: snapshots::judge },
    Target { name: "bitmaps", judge: bitmaps::judge },
    Target { name: "compressed", judge: compressed::judge },
    Target { name: "image", judge: image::judge },
    Target { name: "ring", judge: ring::judge },
    Target { name: "packed", judge: packed::judge },
];

impl Target {
    /// Runs the target once.
    ///
    /// # Panics
    /// At a finding, or if it takes too much time or memory.
    pub fn run(&self, input: &[u8]) {
        let ((), cost) = measure(|| (self.judge)(input));
        assert!(cost.time <= TIME_MAX, "{}: took {:?}", self.name, cost.time);
        assert!(cost.bytes <= BYTES_MAX, "{}: held {} bytes", self.name, cost.bytes);
    }
}

/// The target with this name.
///
/// # Panics
/// If there is no such target.
pub fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a target of this name")
}
