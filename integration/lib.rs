//! Strata as real processes: the code that the demo, `cargo verify`, the VM tests and the benchmarks share.
//!
//! Owns preparing a machine ([`setup`]), the tiny guest ([`guest`], [`cpio`]), virtual machines ([`machine`]),
//! block daemons ([`daemon`]) and disk images ([`image`]). Owns also the guest's jobs ([`scenario`]; with kills of
//! the daemon [`crash`] and [`areas`]) and the output for the user ([`steps`], [`picture`]). It never links
//! Strata's own crates: a daemon is a program with a socket here.
#![forbid(unsafe_code)]

pub mod areas;
pub mod command;
pub mod cpio;
pub mod crash;
pub mod daemon;
pub mod firmware;
pub mod guest;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod picture;
pub mod qmp;
pub mod scenario;
pub mod setup;
pub mod stand;
pub mod steps;
pub mod stock;
