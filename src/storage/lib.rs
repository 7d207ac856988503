//! Host I/O: image files, their locks, and one submission queue per thread.
//!
//! This crate owns every system call on an image file and every buffer while the kernel may touch it. It knows
//! nothing of qcow2, of plans or of requests. [`Storage`] is the set of open files, shared by all threads;
//! [`IoQueue`] is one thread's way to them. [`host`] implements both on real files; the crate `storage_sim` implements
//! them in memory, for tests.

#![deny(unsafe_code)]

pub mod bounds;
#[allow(unsafe_code)]
pub mod buffer;
pub mod error;
pub mod guest;
#[allow(unsafe_code)]
pub mod host;
pub mod operation;
#[allow(unsafe_code)]
pub mod pages;
pub mod workers;
pub mod zeroes;

pub use buffer::{AlignedBuf, BufferPool};
pub use error::StorageError;
pub use guest::{GuestSlice, GuestSlices};
pub use operation::{Completion, Errno, Kind, Operation, Part, Parts, Token};

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

/// Names an open file within its [`Storage`]. Ids count up from 0 in the order of opening and are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u16);

/// How to open an image file.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Open for reading and writing, under an exclusive image lock; else read-only under a shared one.
    pub writable: bool,
    /// Bypass the host's page cache (O_DIRECT) where the file system can; where it cannot, open buffered and warn.
    pub direct: bool,
    /// How long to wait for an image lock that another process holds. I/O of a killed daemon can outlive it by
    /// some 165 ms, so a restart must not give up at once.
    pub lock_timeout: Duration,
}

/// The properties of an open file.
#[derive(Clone, Debug)]
pub struct FileInfo {
    /// The path as it was given to [`Storage::open`].
    pub path: PathBuf,
    /// Length in bytes at the time of opening.
    pub length: u64,
    /// File offsets and lengths of every operation must be multiples of this (a power of two, 1 if unrestricted).
    pub offset_alignment: u32,
    /// Addresses and lengths of every memory part must be multiples of this (a power of two, 1 if unrestricted).
    pub memory_alignment: u32,
    /// Bytes of the file system's blocks (a power of two, at most 65,536). A punch, a zeroing or a change of length
    /// that ends inside a block goes through the host's page cache for that block. There it can collide with a
    /// direct write to the same block, and the host then reports EIO at the next fdatasync.
    pub block_size: u32,
    /// True if it is a block device: it cannot grow and past its end nothing reads as zero.
    pub block_device: bool,
    /// The file's identity, whatever its name.
    pub identity: FileIdentity,
    /// True if opened for writing.
    pub writable: bool,
}

/// Tells files apart, whatever their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// The device that holds the file; 0 if the file is a block device.
    pub device: u64,
    /// The file's number on that device; for a block device its own device number.
    pub number: u64,
}

/// The open image files, shared by every thread.
pub trait Storage: Send + Sync + 'static {
    /// One thread's submission queue.
    type Queue: IoQueue;

    /// Opens and locks a file. Nothing is read from it before the lock is held.
    ///
    /// # Errors
    /// Names the path, the step that failed (open, lock, stat) and the reason.
    fn open(&self, path: &Path, options: &OpenOptions) -> Result<(FileId, FileInfo), StorageError>;

    /// Opens a file read-only without a lock, even while another process writes it. The data may change between reads,
    /// so together they may never have been in the file at one time. Only for inspecting an image in use.
    ///
    /// # Errors
    /// As for [`Storage::open`], but for the lock.
    fn open_shared(&self, path: &Path, direct: bool) -> Result<(FileId, FileInfo), StorageError>;

    /// Creates an empty file that does not exist, with the permissions of one that is open here, and opens and locks it. It
    /// may be named durably only after [`Storage::sync_name`].
    ///
    /// # Errors
    /// As for [`Storage::open`]; and if there is such a file.
    fn create(
        &self,
        path: &Path,
        like: FileId,
        options: &OpenOptions,
    ) -> Result<(FileId, FileInfo), StorageError>;

    /// Makes the name of a file durable.
    ///
    /// # Errors
    /// When the host refuses.
    fn sync_name(&self, path: &Path) -> Result<(), StorageError>;

    /// Removes the name of a file that was created here.
    ///
    /// # Errors
    /// When the host refuses.
    fn remove(&self, path: &Path) -> Result<(), StorageError>;

    /// A file that was opened for writing is only read from now on: other processes may read it, too.
    ///
    /// # Errors
    /// When the host refuses.
    fn share(&self, file: FileId) -> Result<(), StorageError>;

    /// Creates a queue for the calling thread with at most `depth` operations in flight; further ones wait in order.
    ///
    /// # Errors
    /// When the host refuses io_uring, with an error of its own.
    fn queue(&self, depth: u32) -> Result<Self::Queue, StorageError>;

    /// The file's present length in bytes, asked of the host.
    ///
    /// # Errors
    /// When the host cannot say.
    fn length(&self, file: FileId) -> Result<u64, StorageError>;

    /// Bytes the host has allocated for the file.
    ///
    /// # Errors
    /// When the host cannot say.
    fn allocated(&self, file: FileId) -> Result<u64, StorageError>;
}

/// One thread's queue of operations. It stays on the thread that created it. Dropping it waits for everything in
/// flight, because the kernel may still use the buffers.
pub trait IoQueue {
    /// Adds an operation. It owns its buffers until its [`Completion`] returns them. It may run at once (files in
    /// memory), start with the next [`IoQueue::submit`], or wait for room.
    ///
    /// A read always fills its parts: bytes past the end of the file read as zero. A write is whole or an error. Short
    /// transfers are continued here. Offsets, lengths and addresses must be aligned as the file requires, else the
    /// result is EINVAL.
    fn push(&mut self, token: Token, operation: Operation);

    /// Sends the pushed operations to the host, in one system call where possible.
    fn submit(&mut self);

    /// Moves the completions into `done`. Never blocks, and makes no system call if nothing is in flight.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// Submits, then sleeps until there is something to reap. A signal on a watched eventfd, a use of the
    /// [`Notifier`] since the last wait, and the timeout end the sleep, too. May return early without reason.
    fn wait(&mut self, timeout: Option<Duration>);

    /// From now on a signal on `event` ends [`IoQueue::wait`]. The queue reads (resets) the eventfd itself, through
    /// the same ring as file I/O, and keeps it open until the queue is dropped.
    fn watch(&mut self, event: EventFd);

    /// Signals on watched eventfds that this queue has met so far, several as one if they came close together.
    fn signals(&self) -> u64 {
        0
    }

    /// A hint: whether signals on watched eventfds are to end waits from now on, as they do at first. A signal that comes
    /// while they are not ends the first wait afterwards.
    fn heed_signals(&mut self, _heed: bool) {}

    /// A handle by which any thread can end this queue's [`IoQueue::wait`].
    fn notifier(&self) -> Arc<dyn Notifier>;

    /// Operations pushed and not yet reaped.
    fn in_flight(&self) -> usize;

    /// The time by this queue's clock (a simulated queue has its own).
    fn now(&self) -> Instant;
}

/// Ends another thread's [`IoQueue::wait`].
pub trait Notifier: Send + Sync {
    /// Makes the queue's present or next wait return. Cheap when the queue is not asleep.
    fn notify(&self);
}
