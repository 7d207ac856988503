//! One open disk: opens a chain of images, and runs the engine's plans on a [`storage::Storage`].
//!
//! [`Disk`] is shared by all threads; each serves requests through a [`DiskQueue`] of its own. The fast path, for
//! requests whose clusters are all in the chain map, is straight-line code in `serve/queue.rs`. All other requests run
//! as async functions, one file per kind in `serve/`. No lock is held across I/O. Knows nothing of vhost-user or virtio.
#![forbid(unsafe_code)]

mod background;
pub mod bounds;
mod error;
mod image;
mod inflate;
mod layer;
mod open;
mod runtime;
mod serve;

pub use background::housekeeper::Keeper;
pub use error::{OpenError, RequestError};
pub use image::{change, check, resize, snapshot};
pub use inflate::InflateError;
pub use layer::Layer;
pub use open::backing::BackingNameError;
pub use open::bitmaps::BadBitmaps;
pub use open::chain::{CHAIN_LAYERS_MAX, DiskOptions, Format};
pub use open::describe::{LayerDescription, describe};
pub use open::foreign::Foreign;
pub use serve::policy::{DetectZeroes, Discards};
pub use serve::queue::{Completed, DiskQueue, Request, RequestId};
pub use serve::space::{OnEnospc, SpaceStatus, SpaceWatch};

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::mutation::{Mutation, active};
use engine::{Engine, EngineSpec, EngineStatus, FileIndex};
use storage::{FileId, FileInfo, Storage, StorageError};

use crate::background::housekeeper::{Bell, Housekeeper};
use crate::background::leaks::Leaks;
use crate::layer::DiskFile;
use crate::open::chain::{Chain, open_chain};
use crate::open::header::HeaderSector;
use crate::open::{chain, close, data_file};
use crate::runtime::driver::Driver;
use crate::serve::policy::ZeroPolicy;
use crate::serve::space::Space;

/// Workers of one disk at a time: queues, the housekeeper, and the thread that closes it.
const WORKERS_MAX: usize = 258;
/// Operations in flight of the thread that opens or closes a disk, and of the housekeeper.
const SIDE_QUEUE_DEPTH: u32 = 64;

/// An open disk.
pub struct Disk<S: Storage> {
    shared: Arc<Shared<S>>,
    housekeeper: Option<Housekeeper>,
}

/// State that all threads of a disk share.
pub(crate) struct Shared<S: Storage> {
    pub storage: S,
    pub engine: Engine,
    pub layers: Vec<Layer>,
    /// The files of the layers in order, then external data files.
    pub files: Vec<DiskFile>,
    /// The file that holds the top image's data: its own, or an external one.
    pub data: FileIndex,
    /// The top image's first sector, for changes of the header; none for a raw or read-only top image.
    pub header: Option<HeaderSector>,
    pub read_only: bool,
    /// Wakes the housekeeper.
    pub bell: Arc<Bell>,
    /// Set once, by the first thread that is to set the corrupt bit.
    pub corrupt_marked: AtomicBool,
    /// Requests that wait for space on the host.
    pub space: Arc<Space>,
    /// How zeros and discards are treated.
    pub policy: ZeroPolicy,
    /// A cache of inflated clusters.
    pub inflated: inflate::Cache,
    /// The threads that inflate compressed clusters.
    pub inflaters: inflate::Pool,
    /// Input and state of the search for leaks.
    pub leaks: Leaks,
}

impl<S: Storage> Shared<S> {
    pub fn file(&self, index: FileIndex) -> &DiskFile {
        &self.files[usize::from(index.0)]
    }

    /// The file that holds the top image's data.
    pub fn data_file(&self) -> &DiskFile {
        self.file(self.data)
    }

    /// True if the top image's data is in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.data != FileIndex(0)
    }

    /// The file with the top image's data at the guest's offsets, which can thus be read as a raw image. This is a
    /// raw top image itself, or an external data file that is flagged as raw.
    pub fn raw_file(&self) -> Option<&DiskFile> {
        let is_raw = match &self.layers[0].header {
            None => true,
            Some(header) => header.is_data_file_raw() && !active(Mutation::RawViewForgotten),
        };
        is_raw.then(|| self.data_file())
    }

    /// The top image's file.
    pub fn top_file(&self) -> FileId {
        self.files[0].id
    }

    /// True if the top image is a qcow2 image.
    pub fn is_qcow2(&self) -> bool {
        self.layers[0].header.is_some()
    }
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
    fn of_chain(
        storage: S,
        path: &Path,
        options: &DiskOptions,
        driver: &Driver<S::Queue>,
        mut chain: Chain,
    ) -> Result<Self, OpenError> {
        let keeps_header = chain.top.is_some();
        let data = chain.specs[0].data_file();
        let leaks = Leaks::of(chain.top.as_ref());
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
                driver.block_on(chain::fill_last_block(driver, &chain.files[0]))?;
                if data != FileIndex(0) {
                    let file = &mut chain.files[usize::from(data.0)];
                    driver.block_on(data_file::extend(driver, file, chain.layers[0].size))?;
                }
                driver.block_on(chain::note_writes(
                    driver,
                    &chain.files[0],
                    top,
                    &sector,
                    &mut chain.bitmaps,
                ))?;
                Some(sector)
            }
            // A raw image's file is extended to a whole last sector before any write to it.
            None if !options.read_only => {
                driver.block_on(chain::lengthen(driver, &chain.files[0], chain.layers[0].size))?;
                None
            }
            _ => None,
        };
        let shared = Arc::new(Shared {
            storage,
            engine,
            layers: chain.layers,
            files: chain.files,
            data,
            header,
            read_only: options.read_only,
            bell: Arc::default(),
            corrupt_marked: AtomicBool::new(false),
            space: Space::new(options.on_enospc, path),
            policy: ZeroPolicy {
                detect: options.detect_zeroes,
                discards: options.discards,
                keeps_place: options.discard_no_unref,
            },
            inflated: inflate::Cache::new(options.inflated_bytes),
            inflaters: inflate::Pool::new(options.inflate_threads),
            leaks,
        });
        Ok(Disk { shared, housekeeper: None })
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

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.shared.engine.size()
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

    /// The open files: the layers' files in order, then external data files.
    pub fn files(&self) -> impl Iterator<Item = &FileInfo> {
        self.shared.files.iter().map(|file| &file.info)
    }

    /// Bytes that the host has allocated for a layer's file.
    ///
    /// # Errors
    /// If the host cannot report it.
    pub fn allocated(&self, layer: usize) -> Result<u64, StorageError> {
        self.shared.storage.allocated(self.shared.files[layer].id)
    }

    /// The engine's counters.
    pub fn status(&self) -> EngineStatus {
        self.shared.engine.status()
    }

    /// The requests that wait for space on the host: their number, and how to end their wait.
    pub fn space(&self) -> SpaceWatch {
        self.shared.space.watch()
    }

    /// Creates the calling thread's queue, for at most `depth` requests in flight.
    ///
    /// # Errors
    /// If the host refuses the resources, or the disk has too many queues.
    pub fn queue(&self, depth: u32) -> Result<DiskQueue<S>, OpenError> {
        DiskQueue::new(Arc::clone(&self.shared), depth)
    }

    /// Makes everything durable and closes the image cleanly: releases reserved clusters, punches freed space, and
    /// cuts the file to its length. All queues must be gone.
    ///
    /// # Errors
    /// If something could not be made durable. Unless the disk had failed before, the image then needs at most a leak
    /// repair.
    pub fn close(mut self) -> Result<(), OpenError> {
        if let Some(housekeeper) = self.housekeeper.take() {
            housekeeper.stop();
        }
        close::close(&self.shared)
    }
}

impl<S: Storage> Drop for Disk<S> {
    /// Without [`Disk::close`]: only stops the housekeeper. The image stays as a crash would leave it.
    fn drop(&mut self) {
        if let Some(housekeeper) = self.housekeeper.take() {
            housekeeper.stop();
        }
    }
}

impl<S: Storage> Shared<S> {
    /// True for the first call alone: its caller sets the corrupt bit.
    pub fn claim_corrupt_mark(&self) -> bool {
        !self.corrupt_marked.swap(true, Ordering::AcqRel)
    }
}
