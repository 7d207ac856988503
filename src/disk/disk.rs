//! An open disk: opens a chain of images, starts the housekeeper, creates queues, and closes.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use engine::{Engine, EngineSpec, EngineStatus, FileIndex, JournalMemory};
use qcow2::SECTOR;
use storage::{FileInfo, Storage, StorageError};
use tracing::warn;

use crate::background::housekeeper::{Housekeeper, Keeper};
use crate::background::leak_input::LeakInput;
use crate::background::resizing::Resizing;
use crate::error::OpenError;
use crate::inflate;
use crate::layer::Layer;
use crate::live::{NewOverlay, NotNamed, SnapshotError, SnapshotRefusal};
use crate::open::chain::{Chain, note_writes, open_chain};
use crate::open::file_end::{fill_last_block, lengthen};
use crate::open::header::HeaderSector;
use crate::open::overlay::{self, OldTop, Overlay};
use crate::open::{close, data_file};
use crate::options::DiskOptions;
use crate::rules::{self, SnapshotStep};
use crate::runtime::driver::Driver;
use crate::serve::journal::{self, JournalKept};
use crate::serve::policy::ZeroPolicy;
use crate::serve::queue::{DiskQueue, ParkedQueue};
use crate::serve::space::{Space, SpaceWatch};
use crate::serve::worker::Worker;
use crate::serve::zero_route::ZeroRoute;
use crate::shared::{SIDE_QUEUE_DEPTH, Shared, WORKERS_MAX};
use crate::size::{NewSize, ResizeError, Resized, Shrinking};

/// An open disk.
pub struct Disk<S: Storage> {
    pub(crate) shared: Arc<Shared<S>>,
    housekeeper: Option<Housekeeper>,
    /// It has a housekeeper of its own, if its top image needs one.
    is_kept: bool,
}

impl<S: Storage> Disk<S> {
    /// Opens the chain whose top image is at `path`.
    ///
    /// # Errors
    /// Names the file, the structure and the offset at fault. By then a writable image may have been changed, but not
    /// in its contents. Changes may be: refcounts rebuilt if it was marked dirty, autoclear bits, flags of bitmaps,
    /// and the end of the file.
    pub fn open(storage: S, path: &Path, options: &DiskOptions) -> Result<Self, OpenError> {
        let mut disk = Self::open_unkept(storage, path, options)?;
        disk.is_kept = true;
        if disk.needs_keeping() {
            disk.housekeeper = Some(Housekeeper::start(Arc::clone(&disk.shared))?);
        }
        Ok(disk)
    }

    /// As [`Disk::open`], but without a housekeeping thread: the caller drives a [`Keeper`].
    ///
    /// # Errors
    /// As for [`Disk::open`].
    pub fn open_unkept(storage: S, path: &Path, options: &DiskOptions) -> Result<Self, OpenError> {
        // An internal snapshot is always read-only.
        let read_only = options.read_only || options.snapshot.is_some();
        let options = &DiskOptions { read_only, ..options.clone() };
        let driver = Driver::new(storage.queue(SIDE_QUEUE_DEPTH)?);
        let chain = driver.block_on(open_chain(&driver, &storage, path, options))?;
        Self::of_chain(storage, path, options, &driver, chain)
    }

    /// Builds a disk without a housekeeping thread from an open chain.
    pub(crate) fn of_chain(
        storage: S,
        path: &Path,
        options: &DiskOptions,
        driver: &Driver<S::Queue>,
        mut chain: Chain,
    ) -> Result<Self, OpenError> {
        let keeps_header = chain.top.is_some();
        let data = chain.specs[0].data_file();
        let leaks = LeakInput::of(chain.top.as_ref());
        // Created before any write, because it may refuse the image.
        let engine = Engine::new(EngineSpec {
            layers: chain.specs,
            writable: !options.read_only,
            top: chain.top,
            map_bytes: options.map_bytes,
            table_bytes: options.table_bytes,
            workers: WORKERS_MAX,
        });
        let engine =
            engine.map_err(|error| OpenError::Request { path: path.to_owned(), source: error.into() })?;
        let header = match &chain.layers[0].header {
            Some(top) if keeps_header => {
                let sector = driver.block_on(HeaderSector::load(driver, &chain.files[0]))?;
                driver.block_on(fill_last_block(driver, &chain.files[0]))?;
                if data != FileIndex(0) {
                    let file = &mut chain.files[usize::from(data.0)];
                    driver.block_on(data_file::extend(driver, file, chain.layers[0].size))?;
                }
                driver.block_on(note_writes(driver, &chain.files[0], top, &sector, &mut chain.bitmaps))?;
                Some(sector)
            }
            // A raw image's file is extended to a whole last sector before any write to it.
            None if !options.read_only => {
                driver.block_on(lengthen(driver, &chain.files[0], chain.layers[0].size))?;
                None
            }
            _ => None,
        };
        let zero_route = ZeroRoute::of(&chain.layers[0], data != FileIndex(0), options.discard_no_unref);
        let top_header = chain.layers[0].header.as_ref().filter(|_| keeps_header);
        let awaits_journal = top_header.is_some_and(|header| header.journal_number().is_some());
        let shared = Arc::new(Shared {
            storage,
            size: AtomicU64::new(engine.size()),
            limit: AtomicU64::new(engine.size()),
            resizing: AtomicBool::new(false),
            engine,
            images: (0..chain.layers.len()).map(|layer| FileIndex(layer as u16)).collect(),
            layers: chain.layers,
            files: chain.files,
            data,
            header,
            read_only: options.read_only,
            options: options.clone(),
            bell: Arc::default(),
            corrupt_marked: AtomicBool::new(false),
            space: Space::new(options.on_enospc, path),
            policy: ZeroPolicy { detect: options.detect_zeroes, discards: options.discards },
            zero_route,
            failures: Arc::default(),
            work: Arc::default(),
            inflated: inflate::Cache::new(options.inflated_bytes),
            inflaters: inflate::Pool::new(options.inflate_threads),
            leaks,
            awaits_journal: AtomicBool::new(awaits_journal),
        });
        Ok(Disk { shared, housekeeper: None, is_kept: false })
    }

    /// A housekeeper for a disk that was opened by [`Disk::open_unkept`]. Drop it before the disk is closed.
    ///
    /// # Errors
    /// If the host refuses the resources.
    pub fn keeper(&self) -> Result<Keeper<S>, OpenError> {
        Keeper::new(Arc::clone(&self.shared))
    }

    fn needs_keeping(&self) -> bool {
        self.shared.is_qcow2()
    }

    /// Virtual size in bytes. It changes with [`Disk::resize`].
    pub fn size(&self) -> u64 {
        // Acquire pairs with the release at the end of a resize: requests up to this size find all that it changed.
        self.shared.size.load(Ordering::Acquire)
    }

    /// Bytes of the top image's file or device as it is now, in whole sectors. For a raw disk whose file has been
    /// resized, this is its new size. None for a qcow2 image.
    ///
    /// # Errors
    /// If the host cannot report it.
    pub fn raw_length(&self) -> Result<Option<u64>, StorageError> {
        if self.shared.is_qcow2() {
            return Ok(None);
        }
        let length = self.shared.storage.length(self.shared.top_file())?;
        Ok(Some(length.next_multiple_of(SECTOR)))
    }

    /// Resizes the disk while it is in use, and waits until that is done and durable. Requests go on meanwhile. The
    /// new part reads as zero. The caller lets no request reach past the present size before this has returned, and none
    /// past the new size from its call on.
    ///
    /// # Errors
    /// See [`ResizeError`]. The disk has its old size then.
    pub fn resize(&self, wanted: NewSize, shrinking: Shrinking) -> Result<Resized, ResizeError> {
        let mut resizing = self.resizing(wanted, shrinking)?;
        loop {
            if let Some(result) = resizing.poll() {
                return result;
            }
            resizing.wait(None);
        }
    }

    /// As [`Disk::resize`], but the caller drives it.
    ///
    /// # Errors
    /// If the resize cannot begin; see [`ResizeError`].
    pub fn resizing(&self, wanted: NewSize, shrinking: Shrinking) -> Result<Resizing<S>, ResizeError> {
        Resizing::begin(&self.shared, wanted, shrinking)
    }

    /// The top image's cluster size in bytes; none for a raw image.
    pub fn cluster_size(&self) -> Option<u64> {
        self.shared.is_qcow2().then(|| self.shared.engine.unit())
    }

    /// Bytes of the smallest unit that is allocated, zeroed or discarded by itself: the top image's subclusters if it
    /// has them, else its clusters. None for a raw image.
    pub fn granule_size(&self) -> Option<u64> {
        self.shared.is_qcow2().then(|| self.shared.engine.granule())
    }

    /// True if write zeroes of whole clusters may have to write that many bytes, because the image or the host cannot
    /// record zeros.
    pub fn zeros_are_data(&self) -> bool {
        self.shared.zeros_are_data()
    }

    /// True if nothing may be written.
    pub fn is_read_only(&self) -> bool {
        self.shared.read_only
    }

    /// The external file that holds the top image's data.
    pub fn data_file(&self) -> Option<&Path> {
        self.shared.has_data_file().then(|| self.shared.data_file().info.path.as_path())
    }

    /// The layers, the top image first.
    pub fn layers(&self) -> &[Layer] {
        &self.shared.layers
    }

    /// The open files: those of the layers and external data files, in the order in which they were opened.
    pub fn files(&self) -> impl Iterator<Item = &FileInfo> {
        self.shared.files.iter().map(|file| &file.info)
    }

    /// Bytes that the host has allocated for a layer's file.
    ///
    /// # Errors
    /// If the host cannot report it.
    pub fn allocated(&self, layer: usize) -> Result<u64, StorageError> {
        self.shared.storage.allocated(self.shared.file(self.shared.images[layer]).id)
    }

    /// The engine's counters.
    pub fn status(&self) -> EngineStatus {
        self.shared.engine.status()
    }

    /// True if metadata could not be made durable: every later write and flush fails.
    pub fn has_failed(&self) -> bool {
        self.shared.engine.has_failed()
    }

    /// True if damage was found since the disk was opened, and the top image's header was to be marked with it.
    pub fn is_marked_corrupt(&self) -> bool {
        self.shared.corrupt_marked.load(Ordering::Relaxed)
    }

    /// The requests that wait for space on the host: their number, and how to end their wait.
    pub fn space(&self) -> SpaceWatch {
        self.shared.space.watch()
    }

    /// Creates the calling thread's queue, for at most `depth` requests in flight. If a dead daemon left a journal and
    /// [`Disk::keep_journal`] has not been called, the journal is given up.
    ///
    /// # Errors
    /// If the host refuses the resources, or the disk has too many queues.
    pub fn queue(&self, depth: u32) -> Result<DiskQueue<S>, OpenError> {
        if self.shared.awaits_journal() {
            self.keep_journal(None)?;
        }
        DiskQueue::new(Arc::clone(&self.shared), depth)
    }

    /// Gives the disk, as it is now, to a queue that had let it go.
    ///
    /// # Errors
    /// If the disk has too many queues.
    pub fn resume(&self, queue: ParkedQueue<S>) -> Result<DiskQueue<S>, OpenError> {
        queue.resume(Arc::clone(&self.shared))
    }

    /// From now on what is committed is recorded in this memory, which outlives the process, so that a successor
    /// can carry it out. With `None` it is not. No request is in flight. First everything committed becomes
    /// durable. If a dead daemon left its records in this memory, they are carried out before that.
    ///
    /// Images without a journal only become durable: raw images, version 2, external data files.
    ///
    /// # Errors
    /// If something could not be made durable: then the journal so far stays in use. Or if the header could not be
    /// written: then the disk has failed.
    ///
    /// # Panics
    /// If a request is in flight: a programmer error.
    pub fn keep_journal(&self, memory: Option<JournalMemory>) -> Result<JournalKept, OpenError> {
        journal::keep(&self.shared, memory)
    }

    /// As [`Disk::keep_journal`], after [`Disk::snapshot`] has ended the journal. The frontend counts on one: without it,
    /// writes that are answered and not flushed would be lost with the process, and nobody would notice.
    ///
    /// # Errors
    /// As [`Disk::keep_journal`]. If no journal is in use then, and the image could have one in this memory, the disk has
    /// failed.
    ///
    /// # Panics
    /// As [`Disk::keep_journal`].
    pub fn keep_journal_again(&self, memory: Option<JournalMemory>) -> Result<JournalKept, OpenError> {
        journal::keep_again(&self.shared, memory)
    }

    /// True while a journal that a dead daemon left waits for its frontend, which has it.
    pub fn awaits_journal(&self) -> bool {
        self.shared.awaits_journal()
    }

    /// Makes every write durable that completed before, as a guest's flush does. The calling thread waits for that. Where
    /// the host has no space for metadata, it fails at once. False if that must wait: a dead daemon left a journal, and
    /// its frontend, which has it, is not back yet.
    ///
    /// # Errors
    /// If the host refuses, or the disk has failed before.
    pub fn flush(&self) -> Result<bool, OpenError> {
        // Never by a queue, which would give such a journal up.
        if self.shared.awaits_journal() {
            return Ok(false);
        }
        let driver = Driver::new(self.shared.storage.queue(SIDE_QUEUE_DEPTH)?);
        let limit = WORKERS_MAX;
        let worker = Worker::new(Arc::clone(&self.shared), Rc::clone(&driver));
        let worker = worker.ok_or(OpenError::TooManyQueues { limit })?;
        let failed = |source| OpenError::Request { path: self.shared.layers[0].path.clone(), source };
        driver.block_on(worker.flush()).map_err(failed)?;
        Ok(true)
    }

    /// Makes an overlay for a snapshot of the disk, while it is in use: an empty image over the present top, durable with its
    /// name. To give it up, drop it and remove its file ([`Disk::discard_overlay`]).
    ///
    /// # Errors
    /// See [`SnapshotError`]. Then there is no overlay.
    pub fn make_overlay(&self, new: &NewOverlay) -> Result<Overlay, SnapshotError> {
        overlay::make(&self.shared, new)
    }

    /// Removes the file of an overlay that is not to be used.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn discard_overlay(&self, overlay: &Overlay) -> Result<(), OpenError> {
        overlay::discard(&self.shared, overlay)
    }

    /// Puts an overlay of this disk on top of its chain: from now on all writes go there, and what was the top is only read.
    /// All queues are parked, and the housekeeper rests ([`Disk::rest`]). `name` makes sure that the next open of the disk
    /// finds the overlay; it is called when the old top is durable. The journal has ended:
    /// see [`Disk::keep_journal_again`]. Finish with [`Disk::let_go`].
    ///
    /// # Errors
    /// See [`SnapshotError`]. The disk goes on with its old top, or has failed. The overlay is removed, unless the next open
    /// may find it.
    pub fn snapshot(
        &mut self,
        overlay: Overlay,
        mut name: impl FnMut() -> Result<(), NotNamed>,
    ) -> Result<OldTop, SnapshotError> {
        let path = self.shared.layers[0].path.clone();
        if let Err(error) = self.ready_for(&overlay) {
            let _ = self.discard_overlay(&overlay);
            return Err(error);
        }
        for step in rules::snapshot_order() {
            let done = match step {
                SnapshotStep::Retire => overlay::retire(&self.shared),
                SnapshotStep::Name => name().map_err(|NotNamed { source, undone }| {
                    if !undone {
                        // Writes to the old top would change what lies below the overlay, without its journal.
                        self.shared.engine.fail();
                    }
                    SnapshotError::Name { path: path.clone(), source }
                }),
                SnapshotStep::Switch => break,
            };
            if let Err(error) = done {
                if !self.shared.engine.has_failed() {
                    let _ = self.discard_overlay(&overlay);
                }
                return Err(error);
            }
        }
        let shared = Arc::get_mut(&mut self.shared).expect("looked at before, and nobody can come");
        overlay::put_on_top(shared, overlay).inspect_err(|_| {
            // The next open finds the overlay: nothing more may be written to the old top.
            self.shared.engine.fail();
        })
    }

    /// Refuses if somebody has the disk, or the overlay does not fit.
    fn ready_for(&mut self, overlay: &Overlay) -> Result<(), SnapshotError> {
        if Arc::get_mut(&mut self.shared).is_none() {
            let (path, source) = (self.shared.layers[0].path.clone(), SnapshotRefusal::InUse);
            return Err(SnapshotError::Refused { path, source });
        }
        overlay::examine_again(&self.shared, overlay)
    }

    /// After a snapshot, beside the traffic: other processes may read the old top.
    ///
    /// # Errors
    /// If the host refuses. The disk goes on all the same.
    pub fn let_go(&self, old: OldTop) -> Result<(), OpenError> {
        overlay::let_go(&self.shared, old)
    }

    /// Makes everything durable and closes the image cleanly: releases reserved clusters, punches freed space, and
    /// cuts the file to its length. All queues must be gone.
    ///
    /// # Errors
    /// If something could not be made durable. Unless the disk had failed before, the image then needs at most a leak
    /// repair.
    pub fn close(mut self) -> Result<(), OpenError> {
        self.rest();
        close::close(&self.shared)
    }

    /// As [`Disk::close`], but the files stay open and the image locked until the disk is dropped, which must come next.
    ///
    /// # Errors
    /// As for [`Disk::close`]. The disk may then be used on.
    pub fn finish(&mut self) -> Result<(), OpenError> {
        self.rest();
        let closed = close::close(&self.shared);
        if closed.is_err() {
            self.go_on();
        }
        closed
    }

    /// The housekeeper works again, if the disk was opened with one.
    pub fn go_on(&mut self) {
        // A raw image has none, but an overlay of it does.
        if self.is_kept && self.housekeeper.is_none() && self.needs_keeping() {
            match Housekeeper::start(Arc::clone(&self.shared)) {
                Ok(housekeeper) => self.housekeeper = Some(housekeeper),
                Err(error) => warn!(%error, "the housekeeper of a disk could not begin anew"),
            }
        }
    }

    /// Ends the housekeeper after its present work, until [`Disk::go_on`]. Requests go on, and flush and reclaim where they
    /// must.
    pub fn rest(&mut self) {
        if let Some(housekeeper) = self.housekeeper.take() {
            housekeeper.stop();
        }
    }
}

impl<S: Storage> Drop for Disk<S> {
    /// Without [`Disk::close`]: only stops the housekeeper. The image stays as a crash would leave it.
    fn drop(&mut self) {
        self.rest();
    }
}
