//! One step of a change of an image file that no process uses: of a repair, or of a change of its snapshots or size.

use qcow2::{HostOffset, HostRange};

/// The next step of a plan for an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileStep {
    /// Write these bytes, at most a cluster, a refcount table (8 MiB) or [`crate::check::READ_MAX`] of them. They may
    /// lie past the end of the file. They need not fill sectors; the rest of a sector must stay. Between syncs the
    /// order does not matter.
    Write {
        /// The offset.
        offset: HostOffset,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Make all earlier writes durable before the next step.
    Sync,
    /// These bytes are not in use: the host may have their space.
    Punch(HostRange),
    /// Nothing is in use past this length: the file may end there, if it is longer.
    Cut {
        /// The length in bytes.
        length: u64,
    },
}
