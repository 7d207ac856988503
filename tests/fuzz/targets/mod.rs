//! What is fuzzed: functions from bytes to nothing, which panic where something is wrong. `tests/fuzz.rs` and cargo-fuzz
//! run the same ones.
//!
//! Owns the list of them, and what one run may cost.
#![allow(dead_code, unused_imports, reason = "each runner uses its own part")]

mod bitmaps;
mod compressed;
mod extensions;
mod header;
mod host;
mod image;
mod ring;
mod session;
mod snapshots;
mod sound;
mod tables;
mod values;

pub use image::encode as encode_image;

use std::time::Duration;

use crate::meter::measure;

/// The longest that one run may take.
const TIME_MAX: Duration = Duration::from_secs(1);
/// The most heap that one run may hold, in bytes. No input stands for a file of more than 1 MiB.
const BYTES_MAX: usize = 64 << 20;

/// Something that is fuzzed.
pub struct Target {
    /// Its name, also that of its corpus.
    pub name: &'static str,
    /// Looks at an input; panics at a finding.
    judge: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "header", judge: header::judge },
    Target { name: "extensions", judge: extensions::judge },
    Target { name: "tables", judge: tables::judge },
    Target { name: "snapshots", judge: snapshots::judge },
    Target { name: "bitmaps", judge: bitmaps::judge },
    Target { name: "compressed", judge: compressed::judge },
    Target { name: "image", judge: image::judge },
    Target { name: "ring", judge: ring::judge },
];

impl Target {
    /// Runs it once.
    ///
    /// # Panics
    /// At a finding, or if it takes too long or too much.
    pub fn run(&self, input: &[u8]) {
        let ((), cost) = measure(|| (self.judge)(input));
        assert!(cost.time <= TIME_MAX, "{}: took {:?}", self.name, cost.time);
        assert!(cost.bytes <= BYTES_MAX, "{}: held {} bytes", self.name, cost.bytes);
    }
}

/// The target of this name.
///
/// # Panics
/// If there is none.
pub fn target(name: &str) -> &'static Target {
    TARGETS.iter().find(|target| target.name == name).expect("a target of this name")
}
