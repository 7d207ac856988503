//! A disk as a session's block device: what the guest sees of it, its pauses, and when it is opened, resized and released.
//! `device_queue` passes the requests on.
//!
//! Neither side knows the other. Nothing is allocated per request here.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use disk::resize::{NewSize, ResizeError, Resized, Shrinking};
use disk::{Disk, NewOverlay, NotNamed, OldTop, OpenError, Overlay, SnapshotError};
use qcow2::SECTOR;
use storage::{FileInfo, Storage};
use tracing::warn;
use vhost_blk::{BlockDevice, Capacity, DeviceProfile, JournalMemory};

pub use crate::device_queue::DeviceQueue;
pub use crate::device_watch::DeviceWatch;

use crate::gate::{Gate, NotClosed};
use crate::held::{DiskRef, Held, Reopening};

/// The best alignment of a raw image's requests, in bytes: a page, and a block of most file systems.
const RAW_UNIT: u32 = 4096;
/// The largest physical block in bytes.
const PHYSICAL_MAX: u32 = 64 << 10;
/// How long a pause waits for the requests in flight.
const PAUSE_PATIENCE: Duration = Duration::from_secs(5);
/// How often a resize looks whether it is to be given up.
const RESIZE_PACE: Duration = Duration::from_millis(100);

/// A disk as a session's block device.
pub struct DiskDevice<S: Storage> {
    disk: Arc<Held<S>>,
    /// Closed while no request may reach the disk.
    gate: Arc<Gate>,
    /// What the guest sees of it, also while it is released.
    facts: Mutex<DiskFacts>,
    serial: [u8; 20],
    blocks: BlockSizes,
    capacity: Capacity,
    watch: DeviceWatch,
    /// Where the disk keeps its journal, also when it is opened again. A leaf lock.
    journal: Mutex<Option<JournalMemory>>,
    /// Held by a resize and by a switch of the journal: see [`DiskDevice::alone`].
    alone: Mutex<()>,
    /// Threads that wait for the disk while it is being resized: a resize is given up for them. Relaxed: it orders nothing,
    /// and a resize looks again.
    waiting: AtomicU32,
}

/// The block sizes of a device, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct BlockSizes {
    /// The smallest unit of requests: 512 or 4096. The disk's size is a multiple.
    pub logical: u32,
    /// The unit that is best written whole, a power of two; `None`: a block of the host.
    pub physical: Option<u32>,
}

impl Default for BlockSizes {
    fn default() -> Self {
        BlockSizes { logical: SECTOR as u32, physical: None }
    }
}

/// Why a disk in use got no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSnapshotError {
    /// A resize, another snapshot or a switch of the journal is under way.
    #[error("the disk is being changed already")]
    Busy,
    /// Requests did not end.
    #[error(transparent)]
    Gate(#[from] NotClosed),
    /// The disk cannot have one, or the host refused.
    #[error(transparent)]
    Disk(#[from] SnapshotError),
}

/// Why a disk could not be paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// Requests did not end.
    #[error(transparent)]
    Gate(#[from] NotClosed),
    /// Something could not be made durable.
    #[error(transparent)]
    Flush(#[from] OpenError),
}

/// The properties of a disk that its guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// Bytes.
    pub size: u64,
    /// Bytes of the smallest unit that is allocated by itself; none for a raw image.
    pub granule: Option<u64>,
    /// Bytes of a block of the file system or device that holds the image's data.
    pub host_block: u32,
    /// Nothing may be written.
    pub read_only: bool,
    /// Write zeroes may have to write data.
    pub zeros_are_data: bool,
}

impl DiskFacts {
    fn of<S: Storage>(disk: &Disk<S>) -> Self {
        let data = disk.data_file();
        let file = disk.files().find(|file| data.is_none_or(|data| file.path == data));
        DiskFacts {
            size: disk.size(),
            granule: disk.granule_size(),
            host_block: file.map_or(SECTOR as u32, host_block),
            read_only: disk.is_read_only(),
            zeros_are_data: disk.zeros_are_data(),
        }
    }
}

/// Bytes of a block of the file system or device that holds a file.
pub fn host_block(file: &FileInfo) -> u32 {
    file.block_size.max(file.offset_alignment)
}

impl<S: Storage> DiskDevice<S> {
    /// A device that answers GET_ID with `serial`. Its disk is never released.
    pub fn new(disk: Disk<S>, serial: [u8; 20], blocks: BlockSizes) -> Self {
        Self::releasable(disk, serial, blocks, None)
    }

    /// A device that answers GET_ID with `serial`. Its disk may be released if there is a way to open it again.
    pub fn releasable(
        disk: Disk<S>,
        serial: [u8; 20],
        blocks: BlockSizes,
        reopening: Option<Reopening<S>>,
    ) -> Self {
        let watch = DeviceWatch::default();
        watch.follow(&disk);
        let facts = DiskFacts::of(&disk);
        let capacity = Capacity::new(facts.size / SECTOR);
        let disk = Arc::new(Held::new(Some(disk), reopening));
        let (facts, gate, journal, alone) =
            (Mutex::new(facts), Arc::default(), Mutex::default(), Mutex::default());
        let waiting = AtomicU32::new(0);
        DiskDevice { facts, disk, gate, serial, blocks, capacity, watch, journal, alone, waiting }
    }

    /// A device whose disk another process still uses. It is opened when the first queue starts.
    pub fn released(facts: DiskFacts, serial: [u8; 20], blocks: BlockSizes, reopening: Reopening<S>) -> Self {
        let disk = Arc::new(Held::new(None, Some(reopening)));
        let capacity = Capacity::new(facts.size / SECTOR);
        let (facts, watch, journal) = (Mutex::new(facts), DeviceWatch::default(), Mutex::default());
        let (gate, alone, waiting) = (Arc::default(), Mutex::default(), AtomicU32::new(0));
        DiskDevice { facts, disk, gate, serial, blocks, capacity, watch, journal, alone, waiting }
    }

    /// The disk, for commands; none while it is released. Waits for the end of a snapshot, which may wait for the host.
    pub fn disk(&self) -> Option<DiskRef<'_, S>> {
        self.disk.get()
    }

    /// The disk, for queries; none while it is released, or at the moment of a snapshot. Never waits.
    pub fn glance(&self) -> Option<DiskRef<'_, S>> {
        self.disk.glance()
    }

    /// True at the moment of a snapshot: the disk is here, and [`DiskDevice::glance`] finds none.
    pub fn is_changing(&self) -> bool {
        self.disk.is_changing()
    }

    fn journal(&self) -> MutexGuard<'_, Option<JournalMemory>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a logical block: the disk's size must be a multiple.
    pub fn logical_block_size(&self) -> u64 {
        self.blocks.logical.into()
    }

    /// What the guest sees of the disk.
    pub fn facts(&self) -> DiskFacts {
        *self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resizes the disk while it is served: no request reaches past the smaller of the two sizes until that is durable. It
    /// is given up where `gives_up` says so, and where the session needs the disk for itself. `None` if the disk is released; it is not released meanwhile. The caller tells
    /// the frontend (`vhost_blk::BackChannel`).
    ///
    /// # Errors
    /// As [`Disk::resize`]. The disk has its old size then.
    pub fn resize(
        &self,
        wanted: NewSize,
        shrinking: Shrinking,
        gives_up: impl Fn() -> bool,
    ) -> Result<Option<Resized>, ResizeError> {
        let _alone = self.alone();
        let Some(disk) = self.disk.get() else { return Ok(None) };
        let mut resizing = disk.resizing(wanted, shrinking)?;
        let Resized { from, to } = resizing.sizes();
        self.capacity.set(from.min(to) / SECTOR);
        let outcome = loop {
            if let Some(outcome) = resizing.poll() {
                break outcome;
            }
            if gives_up() || self.waiting.load(Ordering::Relaxed) > 0 {
                resizing.give_up();
            }
            resizing.wait(Some(RESIZE_PACE));
        };
        self.note_facts(&disk);
        outcome.map(Some)
    }

    /// Makes an overlay the top of the chain while the disk is served, so that the present top has the disk as it was at one
    /// moment. Requests in flight end before that moment, and others wait for it. `name` makes sure that the next open finds
    /// the overlay. `None` if the disk is released. What the guest sees of the disk stays as it is.
    ///
    /// # Errors
    /// See [`DeviceSnapshotError`]. The disk goes on with its old top then, or has failed.
    pub fn snapshot(
        &self,
        new: &NewOverlay,
        name: impl FnMut() -> Result<(), NotNamed>,
    ) -> Result<Option<()>, DeviceSnapshotError> {
        let _alone = match self.alone.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(DeviceSnapshotError::Busy),
        };
        let Some(disk) = self.disk.wait() else { return Ok(None) };
        let overlay = disk.make_overlay(new)?;
        drop(disk);
        // A thread that ends or begins takes long: not while requests wait.
        self.disk.change(Disk::rest);
        let switched = self.switch(overlay, name);
        self.disk.change(Disk::go_on);
        let Some(old) = switched? else { return Ok(None) };
        if let Some(Err(error)) = self.disk.wait().map(|disk| disk.let_go(old)) {
            warn!(%error, "the lock of the old top stays that of a writer");
        }
        Ok(Some(()))
    }

    /// Puts an overlay on top while the gate is closed.
    fn switch(
        &self,
        overlay: Overlay,
        name: impl FnMut() -> Result<(), NotNamed>,
    ) -> Result<Option<OldTop>, DeviceSnapshotError> {
        let change = match self.gate.close_for_change(PAUSE_PATIENCE) {
            Ok(change) => change,
            Err(error) => {
                let _ = self.disk.wait().map(|disk| disk.discard_overlay(&overlay));
                return Err(error.into());
            }
        };
        let switched = self.disk.change(|disk| {
            let switched = disk.snapshot(overlay, name);
            // The old top's journal has ended, whatever became of the overlay. No request passes before the new one begins.
            let journal = self.journal().clone();
            if let Err(error) = disk.keep_journal_again(journal) {
                warn!(%error, "the journal could not begin anew");
            }
            switched
        });
        drop(change);
        Ok(switched.transpose()?)
    }

    /// Keeps all requests from the disk until [`DiskDevice::resume`]: those in flight end, then everything becomes
    /// durable. Requests that come meanwhile wait in their rings.
    ///
    /// # Errors
    /// When the requests in flight do not end in time, or something could not be made durable. Then the disk is not paused,
    /// unless it was before.
    pub fn pause(&self) -> Result<(), PauseError> {
        let was_paused = self.gate.is_paused();
        self.gate.pause(PAUSE_PATIENCE)?;
        let flushed = self.disk.wait().map_or(Ok(true), |disk| disk.flush());
        if flushed.is_err() && !was_paused {
            self.gate.resume();
        }
        // A disk that awaits the journal of a dead daemon has answered nothing.
        Ok(flushed.map(|_| ())?)
    }

    /// Lets requests pass again.
    pub fn resume(&self) {
        self.gate.resume();
    }

    /// True if the disk is paused.
    pub fn is_paused(&self) -> bool {
        self.gate.is_paused()
    }

    /// Keeps resizes, snapshots and switches of the journal apart: a resize commits entries, and the others need that nobody
    /// does.
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what a resize must not delay: one that is under way is given up. A frontend waits for this.
    fn before_a_resize<T>(&self, call: impl FnOnce() -> T) -> T {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let result = call();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// The disk was opened or resized.
    fn note_facts(&self, disk: &Disk<S>) {
        let facts = DiskFacts::of(disk);
        *self.facts.lock().unwrap_or_else(PoisonError::into_inner) = facts;
        self.capacity.set(facts.size / SECTOR);
    }

    /// Closes the disk. All queues have been dropped by then.
    ///
    /// # Errors
    /// As [`Disk::close`].
    pub fn close(self) -> Result<(), OpenError> {
        let held = Arc::into_inner(self.disk).expect("all queues have been dropped");
        held.into_disk().map_or(Ok(()), Disk::close)
    }

    /// A watch on the device, usable even while it is being closed.
    pub fn watch(&self) -> DeviceWatch {
        self.watch.clone()
    }
}

impl<S: Storage> BlockDevice for DiskDevice<S> {
    type Queue = DeviceQueue<S>;

    fn profile(&self) -> DeviceProfile {
        let facts = self.facts();
        // At most 2 MiB, so the fallback is never taken.
        let unit = facts.granule.map_or(RAW_UNIT, |size| u32::try_from(size).unwrap_or(RAW_UNIT));
        let writable = !facts.read_only;
        DeviceProfile {
            capacity: self.capacity.clone(),
            block_size: self.blocks.logical,
            physical_block_size: self
                .blocks
                .physical
                .unwrap_or(facts.host_block)
                .clamp(self.blocks.logical, PHYSICAL_MAX),
            optimal_io_size: unit,
            read_only: !writable,
            discard: writable,
            discard_alignment: unit,
            write_zeroes: writable,
            zeroes_are_data: facts.zeros_are_data,
            serial: self.serial,
        }
    }

    fn keep_journal(&self, memory: Option<JournalMemory>) -> io::Result<()> {
        let _alone = self.before_a_resize(|| self.alone());
        if let Some(disk) = self.disk.wait() {
            disk.keep_journal(memory.clone()).map_err(io::Error::other)?;
        }
        *self.journal() = memory;
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        // A disk that is released was made durable first. One that waits for its journal has answered nothing.
        self.disk.wait().map_or(Ok(()), |disk| disk.flush().map(|_| ()).map_err(io::Error::other))
    }

    fn queue(&self, depth: u32) -> io::Result<DeviceQueue<S>> {
        let disk = self.disk.get_back(|disk| {
            self.watch.follow(disk);
            self.note_facts(disk);
            let journal = self.journal().clone();
            disk.keep_journal(journal).map(|_| ())
        });
        let queue = disk.and_then(|disk| disk.queue(depth)).map_err(io::Error::other)?;
        let notifier = queue.notifier();
        let seat = self.gate.seat(Arc::new(move || notifier.notify()));
        let disk = Arc::clone(&self.disk);
        let gauge = self.watch.gauge();
        Ok(DeviceQueue::new(queue, disk, seat, gauge))
    }

    fn release(&self) -> io::Result<bool> {
        let released = self.before_a_resize(|| {
            // A snapshot under way needs the disk.
            let _alone = self.alone();
            self.disk.release()
        });
        released.map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::{Request, RequestId};
    use disk::resize::InUseError;
    use disk::{DiskOptions, Format};
    use storage::host::HostStorage;
    use vhost_blk::{BlockQueue as _, GuestSlice};

    /// A frontend must not wait until a large disk has been resized.
    #[test]
    fn a_resize_is_given_up_for_a_session_that_needs_the_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("raw");
        std::fs::write(&path, vec![0; 1 << 20]).expect("written");
        let options = DiskOptions { format: Format::Raw, ..DiskOptions::default() };
        let disk = Disk::open(HostStorage::new(), &path, &options).expect("it opens");
        let device = DiskDevice::new(disk, [0; 20], BlockSizes::default());
        // Nobody polls it, so its request keeps the resize waiting.
        let mut queue = device.queue(8).expect("a queue");
        queue.submit(RequestId(1), Request::Flush, &[]);
        let memory = vec![0; 512];
        queue.submit(RequestId(2), Request::Read { offset: 0 }, &[GuestSlice::from(&mut memory.leak()[..])]);
        std::thread::scope(|scope| {
            let resizing =
                scope.spawn(|| device.resize(NewSize::Of(512 << 10), Shrinking::Accepted, || false));
            while device.capacity.sectors() == (1 << 20) / SECTOR {
                std::thread::yield_now();
            }
            device.keep_journal(None).expect("it begins after the resize");
            let ended = resizing.join().expect("no panic");
            assert!(
                matches!(ended, Err(ResizeError::InUse { source: InUseError::GivenUp, .. })),
                "{ended:?}"
            );
        });
        assert_eq!(device.capacity.sectors(), (1 << 20) / SECTOR, "the disk has its old size");
        drop(queue);
        device.close().expect("closed");
    }
}
