//! Runs of host clusters, the units of the allocator and of the guard.

pub(crate) use qcow2::HostRun;

/// A run of unused clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FreeRun {
    pub run: HostRun,
    /// It reads as zero on the host: never written, or punched since.
    pub known_zero: bool,
}
