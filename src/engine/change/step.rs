//! One step of a change of an image that no process uses.

use qcow2::HostRange;

use crate::file_step::FileStep;

/// The next step of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanStep {
    /// Do this to the file.
    File(FileStep),
    /// Read these bytes of a table, at most [`crate::check::READ_MAX`], pass them to [`Plan::correct`], and write back
    /// the part that it changed.
    ///
    /// [`Plan::correct`]: super::Plan::correct
    Correct(HostRange),
}
