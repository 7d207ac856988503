//! The answers that may come instead of a plan: load these tables, wait, or do another job first.

use qcow2::HostOffset;

use crate::tables::TableId;
use crate::word::FileIndex;

/// The engine's answer to a call that may need I/O first. Do what it requires, then call again.
#[derive(Debug)]
#[must_use]
pub enum Answer<T> {
    /// The answer itself.
    Ready(T),
    /// Load these tables (all at once), report each to [`crate::Engine::table_loaded`] or
    /// [`crate::Engine::table_failed`], and call again.
    Load(Vec<TableLoad>),
    /// Another task does what this call needs. The waker is registered: call again when woken.
    Wait,
    /// The request has a place in the line of those that wait for clusters. Run [`crate::Engine::plan_reserve`] to its
    /// end, then call again, with the same turn.
    Reserve,
    /// Too many tables are dirty: flush, then call again.
    Flush,
    /// Have the host allocate these pieces of existing tables: they are about to change and may be holes in the file.
    /// Report each to [`crate::Engine::table_allocated`], and call again.
    Allocate(Vec<TablePlace>),
    /// Too much freed space is held back, or the journal is full. Release the claim and the epoch, flush and reclaim until
    /// [`crate::Engine::held_back`] reports room, and start again.
    Crowded,
    /// Give the top image its own L2 table here by [`crate::Engine::plan_table`], then call again.
    Table(TableSlot),
}

/// An L1 entry of the top image, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableSlot(pub u64);

/// Where a piece of a table of the top image lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TablePlace {
    /// The table slice.
    pub table: TableId,
    /// Its offset.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub length: u64,
}

/// A piece of a table to be read from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLoad {
    /// The table slice.
    pub table: TableId,
    /// The file to read.
    pub file: FileIndex,
    /// Its offset in the file.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub length: usize,
    /// A read-ahead: no request needs it yet, so a failure does no harm.
    pub ahead: bool,
}

/// Unwraps `Ready`; returns any other answer from the function.
macro_rules! ready {
    ($answer:expr) => {
        match $answer {
            Answer::Ready(value) => value,
            Answer::Load(loads) => return Ok(Answer::Load(loads)),
            Answer::Wait => return Ok(Answer::Wait),
            Answer::Reserve => return Ok(Answer::Reserve),
            Answer::Flush => return Ok(Answer::Flush),
            Answer::Allocate(places) => return Ok(Answer::Allocate(places)),
            Answer::Crowded => return Ok(Answer::Crowded),
            Answer::Table(slot) => return Ok(Answer::Table(slot)),
        }
    };
}
pub(crate) use ready;
