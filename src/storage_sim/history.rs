//! The record of a run: every operation that changes a file or makes it durable, and every event in the life of each.
//!
//! It is only a record; `replay` decides what may survive a crash.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::{Image, Ranges, Verb};

/// An instant of a run: the number of events recorded before it. A crash may happen at any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub usize);

/// A run: its start, the operations on the files, and the events.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub(crate) start: Image,
    pub(crate) operations: Vec<Recorded>,
    pub(crate) events: Vec<Event>,
}

/// An operation that changes a file, or an fdatasync.
#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    pub(crate) verb: Verb,
    /// Index into the image's files.
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// The bytes of a write.
    pub(crate) bytes: Option<Arc<[u8]>>,
}

/// An event of an operation, which is identified by its index.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// It was pushed: from here on its effect may be on the disk.
    Pushed(usize),
    /// Bytes of it took effect: reads see them. Where effects overlap, the later one wins.
    Effect { operation: usize, bytes: Ranges, step: Option<LengthStep> },
    /// It completed.
    Completed { operation: usize, how: Ending },
}

/// How an operation completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Whole.
    Done,
    /// With an error; bytes that have not taken effect never will.
    Failed,
    /// A failed fdatasync: the outcome of each operation that it covers is drawn from this seed.
    SyncFailed(u64),
}

/// A change of a file's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LengthStep {
    /// At least this long.
    Grow(u64),
    /// Exactly this long; what was past it is gone.
    Set(u64),
}

impl History {
    /// The end of the run.
    pub fn end(&self) -> Moment {
        Moment(self.events.len())
    }

    /// All files at the start of the run, all durable.
    pub fn start(&self) -> &Image {
        &self.start
    }
}

impl Recorded {
    /// The bytes of the file that it changes; none for an fdatasync, an allocation or a change of length.
    pub(crate) fn changes(&self) -> Ranges {
        match self.verb {
            Verb::Write | Verb::Punch | Verb::Zero => Ranges::one(self.range()),
            Verb::Read | Verb::Sync | Verb::Allocate | Verb::SetLength => Ranges::none(),
        }
    }

    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }

    /// The change of length of the whole operation on a file that is short enough.
    pub(crate) fn step(&self) -> Option<LengthStep> {
        match self.verb {
            Verb::Write | Verb::Zero | Verb::Allocate => Some(LengthStep::Grow(self.range().end)),
            Verb::SetLength => Some(LengthStep::Set(self.offset)),
            Verb::Read | Verb::Sync | Verb::Punch => None,
        }
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.verb {
            Verb::Sync => f.write_str("fdatasync"),
            Verb::SetLength => write!(f, "set length {:#x}", self.offset),
            verb => write!(f, "{verb:?} {:#x}+{:#x}", self.offset, self.length),
        }
    }
}
