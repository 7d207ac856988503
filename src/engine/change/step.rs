//! One step of a change of an image that no process uses.

use qcow2::HostOffset;

/// The next step of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanStep {
    /// Write these bytes, at most [`crate::check::READ_MAX`] or a cluster of them. They may lie past the end of the
    /// file. They need not fill sectors; the rest of a sector must stay. Between syncs the order does not matter.
    Write {
        /// The offset.
        offset: HostOffset,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Read these bytes of a table, pass them to [`Plan::correct`], and write back the part that it changed.
    Correct {
        /// The offset.
        offset: HostOffset,
        /// The length in bytes.
        length: usize,
    },
    /// Make all earlier writes durable before the next step.
    Sync,
    /// These bytes are no longer used: the host may have their space.
    Punch {
        /// The offset.
        offset: HostOffset,
        /// The length in bytes.
        length: u64,
    },
    /// Nothing is in use past this length: the file may end there, if it is longer.
    Cut {
        /// The length in bytes.
        length: u64,
    },
}
