//! Resizes a disk while requests go on (docs/durability.md, "Resizing a disk in use").
//!
//! Owns the steps and their I/O; the order is a rule (`rules::growth_order`). It lets nobody know of the new size: the
//! caller does, once the size is durable. Requests must not reach past the smaller of the two sizes meanwhile.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use block::Request;
use engine::EngineError;
use engine::change::Resize;
use names::shown;
use qcow2::Header;
use storage::{Errno, Kind, Operation, Storage};
use tracing::{error, warn};

use crate::error::{OpenError, RequestError};
use crate::image::change::ChangeError;
use crate::image::image_file::ImageFile;
use crate::range::ByteRange;
use crate::rules::{self, ResizeStep};
use crate::runtime::driver::Driver;
use crate::serve::worker::Worker;
use crate::shared::{SIDE_QUEUE_DEPTH, Shared, WORKERS_MAX};
use crate::size::{InUseError, NewSize, ResizeError, Resized, Shrinking};

/// Bytes of the part between the two ends that are zeroed by one request, at most, and granules. A resize can be given up
/// between two requests.
const CLEARED_BYTES: u64 = 256 << 20;
const CLEARED_GRANULES: u64 = 1024;
/// The first pause between checks whether older requests have ended; each is twice the one before.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(50);

type Outcome = Result<Resized, ResizeError>;

/// A resize under way. It goes on only while it is driven; dropping it drives it to its end.
#[must_use]
pub struct Resizing<S: Storage> {
    shared: Arc<Shared<S>>,
    driver: Rc<Driver<S::Queue>>,
    resized: Resized,
    given_up: Rc<Cell<bool>>,
    outcome: Rc<RefCell<Option<Outcome>>>,
}

impl<S: Storage> Resizing<S> {
    pub(crate) fn begin(
        shared: &Arc<Shared<S>>,
        wanted: NewSize,
        shrinking: Shrinking,
    ) -> Result<Self, ResizeError> {
        let path = shared.layers[0].path.clone();
        let refused = |source| ResizeError::InUse { path: path.clone(), source };
        let from = shared.size.load(Ordering::Acquire);
        let resized = Resized { from, to: wanted.of(from, &path)? };
        if resized.to < from && shrinking == Shrinking::Refused {
            return Err(ResizeError::WouldShrink { path, from, to: resized.to });
        }
        if shared.read_only && (shared.is_qcow2() || resized.to < from) {
            return Err(refused(InUseError::ReadOnly));
        }
        if shared.awaits_journal() {
            return Err(refused(InUseError::AwaitsJournal));
        }
        let driver = Driver::new(shared.storage.queue(SIDE_QUEUE_DEPTH).map_err(OpenError::from)?);
        let worker = Worker::new(Arc::clone(shared), Rc::clone(&driver))
            .ok_or(OpenError::TooManyQueues { limit: WORKERS_MAX })?;
        if shared.resizing.swap(true, Ordering::AcqRel) {
            return Err(refused(InUseError::Busy));
        }
        // If space is lacking, the resize fails at once.
        worker.stop_waiting.set(true);
        worker.clears_past_end.set(true);
        let (outcome, given_up) = (Rc::new(RefCell::new(None)), Rc::new(Cell::new(false)));
        let (told, gives_up) = (Rc::clone(&outcome), Rc::clone(&given_up));
        driver.spawn(async move {
            let mut ended = worker.resize(resized, &gives_up).await;
            if ended.is_ok() {
                worker.publish_size(resized.to);
            } else if worker.shared.size.load(Ordering::Acquire) == resized.to {
                let path = shown(&worker.shared.layers[0].path);
                warn!(%path, "the disk is smaller, but the space past its new end was not all given back");
                ended = Ok(());
            } else {
                worker.shared.limit.store(resized.from, Ordering::SeqCst);
            }
            worker.shared.resizing.store(false, Ordering::Release);
            *told.borrow_mut() = Some(ended.map(|()| resized));
        });
        Ok(Resizing { shared: Arc::clone(shared), driver, resized, given_up, outcome })
    }

    /// The disk's size in bytes before, and afterwards if it succeeds.
    pub fn sizes(&self) -> Resized {
        self.resized
    }

    /// The resize is no longer wanted. It fails soon, unless the new size is about to be stored. A disk that is durably
    /// smaller keeps its new size, and what lies past its end.
    pub fn give_up(&self) {
        self.given_up.set(true);
    }

    /// Does all work that is possible now; the outcome, once, when it is there. Never blocks.
    pub fn poll(&mut self) -> Option<Result<Resized, ResizeError>> {
        self.driver.poll(|_| panic!("a resize has no fast path"));
        self.outcome.borrow_mut().take()
    }

    /// Sleeps until there may be something to do, or the time is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.driver.wait(timeout);
    }
}

impl<S: Storage> Drop for Resizing<S> {
    fn drop(&mut self) {
        while self.driver.has_tasks() {
            self.poll();
            if self.driver.has_tasks() {
                self.driver.wait(None);
            }
        }
        debug_assert!(!self.shared.resizing.load(Ordering::Acquire), "nobody else resizes");
    }
}

impl<S: Storage> Worker<S> {
    async fn resize(&self, resized: Resized, given_up: &Cell<bool>) -> Result<(), ResizeError> {
        if resized.to == resized.from {
            return Ok(());
        }
        let refused = |source| ResizeError::InUse { path: self.shared.layers[0].path.clone(), source };
        if let Some(header) = &self.shared.layers[0].header {
            self.examine(header, resized).await?;
        }
        self.examine_blocks(resized).map_err(refused)?;
        let grows = resized.to > resized.from;
        if !grows {
            // Before the epoch ends: a request either finds this limit, or is waited for.
            self.shared.limit.store(resized.to, Ordering::SeqCst);
        }
        let steps = if grows { rules::growth_order() } else { rules::shrinking_order() };
        for step in steps {
            let done = match step {
                ResizeStep::Extend => self.extend(resized.to).await.map_err(Into::into),
                ResizeStep::AwaitOlder => self.await_older_requests(given_up).await,
                // Nothing is left behind the cut, and a longer raw image keeps what its file has.
                ResizeStep::Clear if !self.shared.is_qcow2() => Ok(()),
                ResizeStep::Remove if self.shared.zero_route.is_raw() => Ok(()),
                ResizeStep::Cut => self.cut_data(resized.to, given_up).await,
                ResizeStep::Clear => self.clear(resized, given_up).await,
                ResizeStep::Remove => self.remove_rest(resized, given_up).await,
                ResizeStep::Flush => self.flush().await.map_err(Into::into),
                ResizeStep::StoreSize => self.store_size(resized.to).await.map_err(Into::into),
            };
            done.map_err(refused)?;
            // From here on the disk has its new size, whatever becomes of the space past its end.
            if !grows && *step == self.last_step_before_smaller() {
                self.publish_size(resized.to);
            }
        }
        Ok(())
    }

    /// The step that makes a smaller size durable: the header has it, or the length of a raw image.
    fn last_step_before_smaller(&self) -> ResizeStep {
        if self.shared.is_qcow2() { ResizeStep::StoreSize } else { ResizeStep::Cut }
    }

    fn publish_size(&self, size: u64) {
        self.shared.limit.store(size, Ordering::SeqCst);
        // Release: see `Disk::size`.
        self.shared.size.store(size, Ordering::Release);
    }

    /// Refuses what is impossible before anything is written.
    async fn examine(&self, header: &Header, Resized { from, to }: Resized) -> Result<(), ResizeError> {
        let file = self.shared.top_image();
        let image = ImageFile { driver: &self.driver, id: file.id, info: &file.info };
        let snapshots = image.snapshots(header).await?;
        let backing_size = self.shared.layers.get(1).map_or(0, |below| below.size);
        let present = Header { size: from, ..header.clone() };
        let resize = Resize { size: to, backing_size, compacts: false };
        let path = || file.info.path.clone();
        let refused = |source| ChangeError::Refused { path: path(), source };
        resize.examine_in_use(&present, &snapshots).map_err(refused)?;
        let data = self.shared.data_file();
        if self.shared.has_data_file() && data.info.block_device && data.info.length < to {
            return Err(ResizeError::BlockDevice { path: data.info.path.clone() });
        }
        Ok(())
    }

    /// Refuses to change the length of a file within a block of its file system. The host would write that block through
    /// its page cache, where it can collide with a direct write (`FileInfo::block_size`).
    fn examine_blocks(&self, Resized { from, to }: Resized) -> Result<(), InUseError> {
        let file = self.shared.data_file();
        if file.info.block_device || !self.has_bytewise_file() {
            return Ok(());
        }
        let block = u64::from(file.info.block_size.max(1));
        let present = self
            .shared
            .storage
            .length(file.id)
            .map_err(|_| RequestError::io("the file's length")(Errno::EIO))?;
        let lengthens = to > present && !present.is_multiple_of(block);
        let cuts = to < from && !to.is_multiple_of(block);
        if lengthens || cuts { Err(InUseError::PartialBlock { block }) } else { Ok(()) }
    }

    /// True if a file holds the guest's data byte by byte: a raw image, or an external data file.
    fn has_bytewise_file(&self) -> bool {
        !self.shared.is_qcow2() || self.shared.has_data_file()
    }

    /// Lets the tables and the map reach to the new end, and the file where it holds the disk byte by byte.
    async fn extend(&self, to: u64) -> Result<(), RequestError> {
        if self.has_bytewise_file() {
            self.lengthen_data(to).await?;
        }
        if to > self.engine().size() {
            let plan = self.engine().plan_growth(to)?;
            if let Some(range) = plan.table {
                self.allocate(range).await.map_err(RequestError::io("allocating the L1 table"))?;
            }
            self.engine().commit_growth(&plan);
        }
        self.engine().set_end(to);
        let (Some((entries, offset)), Some(header)) = (self.engine().l1_table(), &self.shared.header) else {
            return Ok(());
        };
        // An earlier resize may have failed between the engine's table and the header's.
        if header.field(qcow2::position::L1_ENTRIES) == entries.to_be_bytes() {
            return Ok(());
        }
        // The header names the longer table before any L2 table is linked there: a crash must not leave tables that
        // nothing names.
        self.flush().await?;
        self.change_header(qcow2::position::patch_l1_table(entries, offset)).await
    }

    /// Makes the file that holds the guest's data byte by byte as long as the disk.
    async fn lengthen_data(&self, to: u64) -> Result<(), RequestError> {
        let file = self.shared.data_file();
        let failed = RequestError::io("making the file longer");
        let present = self.shared.storage.length(file.id).map_err(|_| Errno::EIO);
        match present {
            Ok(present) if present >= to => Ok(()),
            Ok(_) if file.info.block_device || self.shared.read_only => Err(failed(Errno::ENOSPC)),
            Ok(_) => {
                self.driver.run_bare(Operation::bare(file.id, Kind::SetLength, to)).await.map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Waits until every request that began before this call has ended, or has started over. A disk that has failed may
    /// have requests that never end.
    async fn await_older_requests(&self, given_up: &Cell<bool>) -> Result<(), InUseError> {
        let epoch = self.engine().end_epoch();
        let mut pause = PAUSE_MIN;
        while !self.engine().have_ended(epoch) {
            if given_up.get() {
                return Err(InUseError::GivenUp);
            }
            if self.engine().has_failed() {
                return Err(RequestError::from(EngineError::Failed).into());
            }
            let mut alarm = self.driver.alarm(self.driver.now() + pause);
            poll_fn(|context| {
                if alarm.is_over() {
                    return Poll::Ready(());
                }
                alarm.wake(context.waker());
                Poll::Pending
            })
            .await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Ok(())
    }

    /// Makes the part between the two ends read as zero.
    async fn clear(&self, Resized { from, to }: Resized, given_up: &Cell<bool>) -> Result<(), InUseError> {
        let (mut at, end) = (from.min(to), from.max(to));
        while at < end {
            if given_up.get() {
                return Err(InUseError::GivenUp);
            }
            let length = self.piece_length(ByteRange::between(at, end));
            let request = Request::WriteZeroes { offset: at, length, unmap: true, write_through: false };
            let work = self.count_work(&request, &[]);
            self.serve(self.enter(), request, &[], work).await?;
            at += length;
        }
        Ok(())
    }

    /// Removes the entries of all whole clusters past the end of a disk that has become smaller.
    async fn remove_rest(
        &self,
        Resized { from, to }: Resized,
        given_up: &Cell<bool>,
    ) -> Result<(), InUseError> {
        let unit = self.engine().unit();
        // The cluster in which the larger disk ended is not in use any more.
        let end = from.next_multiple_of(unit).min(self.engine().size());
        let mut at = to.next_multiple_of(unit);
        while at < end {
            if given_up.get() {
                return Err(InUseError::GivenUp);
            }
            let length = self.piece_length(ByteRange::between(at, end));
            self.remove_entries(ByteRange::new(at, length)).await?;
            at += length;
        }
        Ok(())
    }

    /// The bytes of the next piece of what is left to be cleared. Each begins where a granule does, but for the first.
    fn piece_length(&self, left: ByteRange) -> u64 {
        let step = CLEARED_BYTES.min(CLEARED_GRANULES * self.engine().granule());
        left.length.min(step - left.offset % step)
    }

    /// Makes the size durable, in the header of a qcow2 image. A raw image has its length already, or gets it by the cut.
    async fn store_size(&self, to: u64) -> Result<(), RequestError> {
        match self.engine().l1_table() {
            Some((entries, offset)) => {
                self.change_header(qcow2::position::patch_disk(to, entries, offset)).await
            }
            None => Ok(()),
        }
    }

    /// Cuts the file that holds the guest's data byte by byte, and makes its length durable.
    async fn cut_data(&self, to: u64, given_up: &Cell<bool>) -> Result<(), InUseError> {
        let file = self.shared.data_file();
        if !self.has_bytewise_file() {
            return Ok(());
        }
        self.engine().set_end(to);
        if file.info.block_device {
            return Ok(());
        }
        if self.shared.is_qcow2() {
            // Writes that began before fill the cluster in which the disk ends, up to the old end.
            self.await_older_requests(given_up).await?;
        }
        let failed = RequestError::io("making the file shorter");
        self.driver.run_bare(Operation::bare(file.id, Kind::SetLength, to)).await.map_err(failed)?;
        let sync = Operation::bare(file.id, Kind::Sync, 0);
        self.driver.run_bare(sync).await.map_err(|source| {
            // It is unknown which of the guest's writes are durable.
            self.engine().fail();
            let path = shown(&file.info.path);
            error!(%path, error = %source, "the disk has failed: fdatasync of the shorter file failed");
            RequestError::Io { action: "fdatasync", source }.into()
        })
    }

    /// Changes a field of the header durably. If that fails, it is unknown what the header says, and the disk fails.
    async fn change_header<const LENGTH: usize>(
        &self,
        patch: qcow2::position::Patch<LENGTH>,
    ) -> Result<(), RequestError> {
        let header = self.shared.header.as_ref().expect("a writable qcow2 image has its header sector");
        let changed = header.patch_and_sync(&self.driver, self.shared.top_image(), patch).await;
        changed.map_err(|source| {
            self.engine().fail();
            let path = shown(&self.shared.layers[0].path);
            error!(%path, error = %source, "the disk has failed: its header could not be changed");
            RequestError::Io { action: "header write", source: Errno::EIO }
        })
    }
}
