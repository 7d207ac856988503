//! What a plan may answer instead of a plan: load these tables, wait, or do another job first.

use qcow2::HostOffset;

use crate::tables::TableId;
use crate::word::FileIndex;

/// The engine's answer to a question that may need I/O first. Ask again after doing what it says.
#[derive(Debug)]
#[must_use]
pub enum Answer<T> {
    /// The answer itself.
    Ready(T),
    /// Load these tables (at once, together), hand each to [`crate::Engine::table_loaded`] or
    /// [`crate::Engine::table_failed`], and ask again.
    Load(Vec<TableLoad>),
    /// Somebody else is at work on what this needs. The waker is registered: ask again when woken.
    Wait,
    /// Run [`crate::Engine::plan_reserve`] to its end, then ask again.
    Reserve,
    /// Too much is dirty: flush, then ask again.
    Flush,
    /// Have the host allocate these pieces of existing tables, as they are about to be changed and may be holes of the file;
    /// hand each to [`crate::Engine::table_allocated`], and ask again.
    Allocate(Vec<TablePlace>),
    /// So much freed space is held back that no more may be. Give up the claim and the epoch, flush and reclaim until
    /// [`crate::Engine::held_back`] says that there is room, and begin anew.
    Crowded,
    /// Make this L2 table the top image's own by [`crate::Engine::plan_table`], then ask again.
    Table(TableSlot),
}

/// An L1 entry of the top image, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableSlot(pub u64);

/// Where a piece of a table of the top image lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TablePlace {
    /// Which.
    pub table: TableId,
    /// Where.
    pub offset: HostOffset,
    /// Bytes.
    pub length: u64,
}

/// A piece of a table to be read from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLoad {
    /// Which.
    pub table: TableId,
    /// The file it is in.
    pub file: FileIndex,
    /// Where.
    pub offset: HostOffset,
    /// Bytes.
    pub length: usize,
    /// Loaded on the chance that it is needed: if it cannot be read, nothing is lost.
    pub ahead: bool,
}

/// Leaves a function with any answer but `Ready`.
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
