//! What drives disks in tests, on files of the host. It has a disk beside a model, an image that Strata and QEMU
//! change by turns, both checkers, and images with single damages.
//!
//! Owns the drivers and makes no choice of what to try: that belongs to a test target. It is compiled once for all of
//! them, together with the disk for the host's storage.
#![allow(missing_docs, reason = "it is for the tests beside it, and says what it must where it is")]

pub mod agree;
pub mod bench;
pub mod damage;
mod disk_rig;
pub mod victims;

pub use disk_rig::{K, M, Rig, options, patch, pattern, tables, word, write};
