//! What drives disks in tests: the rig, on the host's files, and the crash machine, on a simulated host; and what both
//! are compared with.
//!
//! Owns the list of it, and that it is compiled once for all test targets. A test belongs to a target.
#![allow(missing_docs, reason = "it is for the tests beside it, and says what it must where it is")]

#[path = "../agree.rs"]
pub mod agree;
#[path = "../bench/mod.rs"]
pub mod bench;
#[path = "../crash/mod.rs"]
pub mod crash;
#[path = "../rig/mod.rs"]
pub mod rig;
