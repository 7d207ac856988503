//! The journal: what was committed in memory and is not durable yet, in memory that outlives the process
//! (docs/durability.md, "The journal").
//!
//! Every commit appends the new entries before it publishes them, hence before the request is answered. `seal` is the
//! checksum, `record` one record, `ring` the shared memory, `appender` its owner. `commit` adds the records of requests,
//! and `replay` carries out what a dead process left.

mod appender;
mod commit;
mod record;
mod replay;
mod ring;
mod seal;

pub(crate) use appender::Journal;
pub use replay::Replay;
pub use ring::{JournalError, JournalMemory};
