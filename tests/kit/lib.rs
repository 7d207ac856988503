//! The drivers of disks in tests: the rig on the host's files, the crash machine on a simulated host, and the models
//! that both are compared with.
//!
//! Owns the list of these modules, which is compiled once for all test targets. Tests belong to a target.
#![allow(missing_docs, reason = "it is for the tests beside it, and says what it must where it is")]

#[path = "../agree.rs"]
pub mod agree;
#[path = "../bench/mod.rs"]
pub mod bench;
#[path = "../crash/mod.rs"]
pub mod crash;
#[path = "../rig/mod.rs"]
pub mod rig;
