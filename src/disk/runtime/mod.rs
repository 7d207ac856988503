//! What a thread of a disk runs on: its I/O queue, its executor, its timers, and its budgets of memory.
//!
//! Knows no disk and no request.

pub(crate) mod driver;
mod executor;
