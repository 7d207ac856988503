//! What a thread of a disk runs on: its I/O queue, its executor, its timers, and its budgets of memory.
//!
//! Knows no disk and no request.

mod budget;
pub(crate) mod driver;
mod executor;
pub(crate) mod timers;
