//! The state that all threads of an open disk share.
//!
//! Owns which file holds what, and the mark of a corrupt image. Does no I/O but for that mark.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use engine::{Engine, FileIndex};
use qcow2::{Incompatible, Version, position};
use storage::{FileId, Kind, Operation, Storage};

use crate::background::bell::Bell;
use crate::background::leak_input::LeakInput;
use crate::error::RequestError;
use crate::inflate;
use crate::layer::{DiskFile, Layer};
use crate::open::header::HeaderSector;
use crate::options::DiskOptions;
use crate::runtime::driver::Driver;
use crate::serve::failures::FailureLog;
use crate::serve::policy::ZeroPolicy;
use crate::serve::space::Space;
use crate::serve::zero_route::ZeroRoute;

/// Workers of one disk at a time: queues, the housekeeper, the threads that resize it and close it, and two for commands.
pub(crate) const WORKERS_MAX: usize = 261;
/// Operations in flight of the thread that opens or closes a disk, and of the housekeeper.
pub(crate) const SIDE_QUEUE_DEPTH: u32 = 64;

/// State that all threads of a disk share.
pub(crate) struct Shared<S: Storage> {
    pub storage: S,
    pub engine: Engine,
    pub layers: Vec<Layer>,
    /// The open files, by the number that the engine knows them by. A file keeps its number.
    pub files: Vec<DiskFile>,
    /// The file of each layer.
    pub images: Vec<FileIndex>,
    /// The file that holds the top image's data: its own, or an external one.
    pub data: FileIndex,
    /// The top image's first sector, for changes of the header; none for a raw or read-only top image.
    pub header: Option<HeaderSector>,
    pub read_only: bool,
    /// How the disk was opened.
    pub options: DiskOptions,
    /// The disk's size in bytes, as its header names it. The engine's tables reach at least as far.
    pub size: AtomicU64,
    /// The end in bytes that no request may pass: the size, or a smaller one that a resize is about to make durable.
    /// Stored before an epoch ends, and loaded by each request in its own epoch (docs/concurrency.md, "A disk that
    /// shrinks").
    pub limit: AtomicU64,
    /// A resize is under way.
    pub resizing: AtomicBool,
    /// Wakes the housekeeper.
    pub bell: Arc<Bell>,
    /// Set once, by the first thread that is to set the corrupt bit.
    pub corrupt_marked: AtomicBool,
    /// Requests that wait for space on the host.
    pub space: Arc<Space>,
    /// Which writes and discards become something else.
    pub policy: ZeroPolicy,
    /// How ranges are zeroed and discarded.
    pub zero_route: ZeroRoute,
    /// The log of all queues' failed requests.
    pub failures: Arc<FailureLog>,
    /// The work of all queues' requests off the fast path.
    pub work: Arc<AtomicU64>,
    /// A cache of inflated clusters.
    pub inflated: inflate::Cache,
    /// The threads that inflate compressed clusters.
    pub inflaters: inflate::Pool,
    /// Input and state of the search for leaks.
    pub leaks: LeakInput,
    /// A journal that a dead daemon left may still be carried out: nothing may be allocated, freed or searched for.
    pub awaits_journal: AtomicBool,
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
        self.data != self.images[0]
    }

    /// The file that is the top image.
    pub fn top_image(&self) -> &DiskFile {
        self.file(self.images[0])
    }

    /// The layer that a file holds.
    pub fn layer_of(&self, file: FileIndex) -> &Layer {
        let number = self.images.iter().position(|image| *image == file);
        &self.layers[number.expect("only images are asked for")]
    }

    /// The top image's file, for operations.
    pub fn top_file(&self) -> FileId {
        self.top_image().id
    }

    /// True if the top image is a qcow2 image.
    pub fn is_qcow2(&self) -> bool {
        self.layers[0].header.is_some()
    }

    /// True if zeros over a range of whole clusters may have to be written as data. In a raw image that depends on the
    /// host's file system, which is known only once it has refused.
    pub fn zeros_are_data(&self) -> bool {
        self.zero_route.is_raw() || (self.layers.len() > 1 && !self.layers[0].knows_zero_clusters())
    }

    /// True for the first call alone: its caller sets the corrupt bit.
    fn claim_corrupt_mark(&self) -> bool {
        !self.corrupt_marked.swap(true, Ordering::AcqRel)
    }

    /// Sets the incompatible bit "corrupt" in the top image's header, once, if it can have one.
    pub async fn mark_corrupt(&self, driver: &Driver<S::Queue>) -> Result<(), RequestError> {
        let Some(header) = &self.header else { return Ok(()) };
        let version3 = self.layers[0].header.as_ref().is_some_and(|header| header.version == Version::V3);
        if !version3 || !self.claim_corrupt_mark() {
            return Ok(());
        }
        let change = header.change().await;
        let bits = u64::from_be_bytes(header.field(position::INCOMPATIBLE));
        let marked = Incompatible(bits).with(Incompatible::CORRUPT);
        let write = change.write(self.top_image(), position::patch_incompatible(marked));
        driver.run_all([write]).await.map_err(RequestError::io("header write"))?;
        let sync = Operation::bare(self.top_file(), Kind::Sync, 0);
        driver.run_bare(sync).await.map_err(RequestError::io("fdatasync"))
    }
}
