//! The runtime of one thread of a disk: I/O queue, executor, timers and memory budgets.
//!
//! Knows no disk and no request.

mod budget;
pub(crate) mod driver;
mod executor;
pub(crate) mod timers;
