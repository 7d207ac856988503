//! The work that no request asks for: late flushes, freed space, unused memory, leaks of an earlier crash, another size.
//!
//! Owns the housekeeper's thread and its schedule.

pub(crate) mod bell;
pub(crate) mod housekeeper;
pub(crate) mod leak_input;
mod leaks;
mod punch;
mod reclaim;
pub(crate) mod resizing;
