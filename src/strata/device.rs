//! Connects a disk to a vhost-user session: passes requests and results on unchanged, and counts those in flight.
//!
//! Neither side knows the other. Nothing is allocated per request here.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use block::{Request, RequestId};
use disk::resize::{NewSize, ResizeError, Resized, Shrinking};
use disk::{Completed, Disk, DiskQueue, OpenError, RequestError, SpaceStatus, SpaceWatch};
use qcow2::SECTOR;
use storage::{FileInfo, Storage};
use tracing::error;
use vhost_blk::{BlockDevice, BlockQueue, Capacity, DeviceProfile, GuestSlice, JournalMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::held::{DiskRef, Held, Reopening};

/// The best alignment of a raw image's requests, in bytes: a page, and a block of most file systems.
const RAW_UNIT: u32 = 4096;
/// The largest physical block in bytes.
const PHYSICAL_MAX: u32 = 64 << 10;
/// How often a resize looks whether it is to be given up.
const RESIZE_PACE: Duration = Duration::from_millis(100);
/// How long a queue whose thread panics waits for the host before it ends the program.
const PANIC_PATIENCE: Duration = Duration::from_secs(30);

/// A disk as a session's block device.
pub struct DiskDevice<S: Storage> {
    disk: Held<S>,
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

/// Shows what a device's queues have in flight and what waits for space, for as long as it exists.
#[derive(Clone, Default)]
pub struct DeviceWatch {
    /// The existing queues. A leaf lock: taken when a queue is created and when the counts are read.
    queues: Arc<Mutex<Vec<Weak<Gauge>>>>,
    /// The waits of the disk as it was last opened; none before. A leaf lock, except for the disk's in [`SpaceWatch`].
    space: Arc<Mutex<Option<SpaceWatch>>>,
}

/// How many requests one queue has in flight. Stored by its thread and loaded by other threads: relaxed, it orders
/// nothing.
struct Gauge {
    /// The name of the thread.
    queue: String,
    in_flight: AtomicU32,
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
        let (facts, disk, journal) = (Mutex::new(facts), Held::new(Some(disk), reopening), Mutex::default());
        DiskDevice { facts, disk, serial, blocks, capacity, watch, journal, alone: Mutex::default() }
    }

    /// A device whose disk another process still uses. It is opened when the first queue starts.
    pub fn released(facts: DiskFacts, serial: [u8; 20], blocks: BlockSizes, reopening: Reopening<S>) -> Self {
        let disk = Held::new(None, Some(reopening));
        let capacity = Capacity::new(facts.size / SECTOR);
        let (facts, watch, journal) = (Mutex::new(facts), DeviceWatch::default(), Mutex::default());
        DiskDevice { facts, disk, serial, blocks, capacity, watch, journal, alone: Mutex::default() }
    }

    /// The disk, for queries; none while it is released.
    pub fn disk(&self) -> Option<DiskRef<'_, S>> {
        self.disk.get()
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
    /// is given up where `gives_up` says so. `None` if the disk is released; it is not released meanwhile. The caller tells
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
            if gives_up() {
                resizing.give_up();
            }
            resizing.wait(Some(RESIZE_PACE));
        };
        self.note_facts(&disk);
        outcome.map(Some)
    }

    /// Keeps a resize and a switch of the journal apart: a resize commits entries, and a switch needs that nobody does.
    fn alone(&self) -> MutexGuard<'_, ()> {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.disk.into_disk().map_or(Ok(()), Disk::close)
    }

    /// A watch on the device, usable even while it is being closed.
    pub fn watch(&self) -> DeviceWatch {
        self.watch.clone()
    }
}

impl DeviceWatch {
    /// Follows a disk that was just opened.
    fn follow<S: Storage>(&self, disk: &Disk<S>) {
        *self.space() = Some(disk.space());
    }

    fn space(&self) -> MutexGuard<'_, Option<SpaceWatch>> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The numbers of requests that wait for space.
    pub fn space_status(&self) -> SpaceStatus {
        self.space().as_ref().map(SpaceWatch::status).unwrap_or_default()
    }

    /// The device is being stopped: requests that wait for space fail, and none waits from now on.
    pub fn stop_waiting(&self) {
        if let Some(space) = &*self.space() {
            space.stop_waiting();
        }
    }

    /// The queues with requests in flight: the name of each queue's thread, and its number of requests.
    pub fn in_flight(&self) -> Vec<(String, u32)> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let gauges = queues.iter().filter_map(Weak::upgrade);
        let counts = gauges.map(|gauge| (gauge.queue.clone(), gauge.in_flight.load(Ordering::Relaxed)));
        counts.filter(|(_, in_flight)| *in_flight > 0).collect()
    }

    /// A gauge for the calling thread's queue.
    fn gauge(&self) -> Arc<Gauge> {
        let queue = std::thread::current().name().unwrap_or("a queue").to_owned();
        let gauge = Arc::new(Gauge { queue, in_flight: AtomicU32::new(0) });
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|other| other.strong_count() > 0);
        queues.push(Arc::downgrade(&gauge));
        gauge
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
        let _alone = self.alone();
        if let Some(disk) = self.disk.wait() {
            disk.keep_journal(memory.clone()).map_err(io::Error::other)?;
        }
        *self.journal() = memory;
        Ok(())
    }

    fn queue(&self, depth: u32) -> io::Result<DeviceQueue<S>> {
        let disk = self.disk.get_back(|disk| {
            self.watch.follow(disk);
            self.note_facts(disk);
            let journal = self.journal().clone();
            disk.keep_journal(journal).map(|_| ())
        });
        let queue = disk.and_then(|disk| disk.queue(depth)).map_err(io::Error::other)?;
        Ok(DeviceQueue { queue, in_flight: 0, gauge: self.watch.gauge() })
    }

    fn release(&self) -> io::Result<bool> {
        self.disk.release().map_err(io::Error::other)
    }
}

/// One thread's queue on the disk.
pub struct DeviceQueue<S: Storage> {
    queue: DiskQueue<S>,
    /// Requests submitted and not yet completed to the caller.
    in_flight: u32,
    gauge: Arc<Gauge>,
}

impl<S: Storage> DeviceQueue<S> {
    /// Records how many requests are in flight.
    fn count(&mut self, in_flight: u32) {
        self.in_flight = in_flight;
        self.gauge.in_flight.store(in_flight, Ordering::Relaxed);
    }
}

impl<S: Storage> BlockQueue for DeviceQueue<S> {
    type Error = RequestError;

    fn submit(&mut self, id: RequestId, request: Request, slices: &[GuestSlice]) {
        self.count(self.in_flight + 1);
        self.queue.submit(id, request, slices);
    }

    fn expect_more(&mut self, more: bool) {
        self.queue.expect_more(more);
    }

    fn poll(&mut self, done: &mut Vec<Completed>) {
        let before = done.len();
        self.queue.poll(done);
        self.count(self.in_flight - (done.len() - before) as u32);
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        self.queue.wait(timeout);
    }

    fn stop_waiting(&mut self) {
        self.queue.stop_waiting();
    }

    fn watch(&mut self, event: EventFd) {
        self.queue.watch(event);
    }

    fn kicks(&self) -> u64 {
        self.queue.signals()
    }

    fn heed_kicks(&mut self, heed: bool) {
        self.queue.heed_signals(heed);
    }

    fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    fn notifier(&self) -> Arc<dyn Fn() + Send + Sync> {
        let notifier = self.queue.notifier();
        Arc::new(move || notifier.notify())
    }
}

impl<S: Storage> Drop for DeviceQueue<S> {
    /// Waits until the host no longer uses any guest memory. After a panic in the disk a request may never end. Then
    /// ending the program is the only safe way, and no worse for the image than a crash.
    fn drop(&mut self) {
        self.queue.stop_waiting();
        let patience = std::thread::panicking().then(|| Instant::now() + PANIC_PATIENCE);
        loop {
            self.poll(&mut Vec::new());
            if self.in_flight == 0 {
                return;
            }
            if patience.is_some_and(|end| Instant::now() >= end) {
                error!(
                    in_flight = self.in_flight,
                    "a queue that failed has requests at the host that do not end"
                );
                std::process::abort();
            }
            self.queue.wait(patience.map(|end| end.saturating_duration_since(Instant::now())));
        }
    }
}
