//! What the control socket asks and tells: the daemon, as a trait.

use crate::api::{Chain, DiskState, Resize, Resized, Snapshot, SnapshotTaken, Stats};
use crate::failure::Failure;

/// A daemon with one disk. The queries are called on the control thread and never wait for I/O of the disk.
pub trait Subject: Send + Sync + 'static {
    /// The disk, its state and its frontend.
    fn disk(&self) -> DiskState;

    /// The layers, the top image first.
    ///
    /// # Errors
    /// When another process has the image, or it is being changed at this moment.
    fn chain(&self) -> Result<Chain, Failure>;

    /// All counters.
    fn stats(&self) -> Stats;

    /// Changes what is logged.
    ///
    /// # Errors
    /// When the text is no level and no filter.
    fn set_log_level(&self, level: &str) -> Result<(), Failure>;

    /// Makes every write durable that was acknowledged before. Called on a thread of its own.
    ///
    /// # Errors
    /// When the host refuses, or another process has the image.
    fn flush(&self) -> Result<(), Failure>;

    /// Keeps requests from the disk until it is resumed, and makes everything durable. Called on a thread of its own.
    ///
    /// # Errors
    /// When the requests in flight do not end, or something could not be made durable: then it is not paused.
    fn pause(&self) -> Result<(), Failure>;

    /// Lets requests pass again. Returns at once.
    fn resume(&self);

    /// Makes an overlay the top image. Called on a thread of its own.
    ///
    /// # Errors
    /// When the disk cannot have one now, or the host refuses.
    fn snapshot(&self, wanted: Snapshot) -> Result<SnapshotTaken, Failure>;

    /// Gives the disk another size. Called on a thread of its own.
    ///
    /// # Errors
    /// When the disk cannot have that size, the host refuses, or another process has the image.
    fn resize(&self, wanted: Resize) -> Result<Resized, Failure>;

    /// The daemon ends: a resize under way is given up.
    fn give_up(&self);

    /// Begins to end the daemon, as SIGTERM does. Returns at once.
    fn shut_down(&self);
}
