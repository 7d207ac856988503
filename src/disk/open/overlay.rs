//! An overlay for a disk in use: made and durable beside the traffic, then put on top of the chain while no queue has the
//! disk (docs/durability.md, "A snapshot of a disk in use").
//!
//! Owns the steps and their I/O; the order is a rule (`rules::snapshot_order`). How a later open finds the overlay is the
//! caller's part.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::{Entries, FileIndex, LayerFormat, LayerSpec, TopSpec};
use qcow2::feature::autoclear_with_journal;
use qcow2::position::{AUTOCLEAR, patch_autoclear};
use qcow2::{Geometry, Header, JournalNumber, NewImage, Version};
use storage::{FileId, FileInfo, OpenOptions, Storage};

use crate::background::leak_input::LeakInput;
use crate::error::{OpenError, RequestError};
use crate::image::image_file::ImageFile;
use crate::layer::{DiskFile, Layer};
use crate::live::{NewOverlay, SnapshotError, SnapshotRefusal};
use crate::open::chain::CHAIN_LAYERS_MAX;
use crate::open::close;
use crate::open::header::HeaderSector;
use crate::rules::{self, Awaited};
use crate::runtime::driver::Driver;
use crate::serve::worker::Worker;
use crate::serve::zero_route::ZeroRoute;
use crate::shared::{SIDE_QUEUE_DEPTH, Shared, WORKERS_MAX};

/// The width of a new image's refcounts: 2^4 bits, as QEMU's.
const REFCOUNT_ORDER: u32 = 4;

/// An overlay that is durable, open and empty, and not in the chain yet. It fits only the disk that it was made for.
#[must_use]
pub struct Overlay {
    file: DiskFile,
    header: Header,
    sector: HeaderSector,
    l1: Entries,
    top: TopSpec,
}

/// The image that was the top, with what is left to be done to it.
#[must_use]
pub struct OldTop {
    file: FileIndex,
    sector: Option<HeaderSector>,
}

/// Makes an overlay beside the traffic. Then it makes durable what is in memory, so that little is left for the moment at
/// which nobody has the disk.
pub(crate) fn make<S: Storage>(shared: &Arc<Shared<S>>, new: &NewOverlay) -> Result<Overlay, SnapshotError> {
    let refused = |source| SnapshotError::Refused { path: shared.layers[0].path.clone(), source };
    examine(shared).map_err(refused)?;
    let worker = side_worker(shared)?;
    let driver = &worker.driver;
    let options = &shared.options;
    let how = OpenOptions { writable: true, direct: options.direct, lock_timeout: options.lock_timeout };
    let (id, info) = shared.storage.create(&new.path, shared.top_file(), &how).map_err(OpenError::from)?;
    let made = driver.block_on(async {
        let overlay = fill(driver, shared, (id, info), new).await?;
        settle_some(&worker).await.map_err(|source| request_failed(shared, source))?;
        Ok::<_, SnapshotError>(overlay)
    });
    if made.is_err() {
        // Nothing names it. If it cannot be removed, it is a file too many.
        let _ = shared.storage.remove(&new.path);
    }
    made
}

/// Refuses what is impossible before anything is written.
fn examine<S: Storage>(shared: &Shared<S>) -> Result<(), SnapshotRefusal> {
    if shared.read_only {
        return Err(SnapshotRefusal::ReadOnly);
    }
    if shared.engine.has_failed() || shared.corrupt_marked.load(Ordering::Acquire) {
        return Err(SnapshotRefusal::Failed);
    }
    if shared.awaits_journal() {
        return Err(SnapshotRefusal::AwaitsJournal);
    }
    if shared.has_data_file() {
        return Err(SnapshotRefusal::DataFile);
    }
    if shared.layers.len() >= CHAIN_LAYERS_MAX {
        return Err(SnapshotRefusal::ChainTooDeep { limit: CHAIN_LAYERS_MAX });
    }
    // The overlay's tables are as long as the disk, and the map keeps its length until the disk is opened again.
    if shared.engine.size() > shared.size.load(Ordering::Acquire) {
        return Err(SnapshotRefusal::LargerMap);
    }
    Ok(())
}

fn side_worker<S: Storage>(shared: &Arc<Shared<S>>) -> Result<Rc<Worker<S>>, OpenError> {
    let driver = Driver::new(shared.storage.queue(SIDE_QUEUE_DEPTH)?);
    let worker = Worker::new(Arc::clone(shared), Rc::clone(&driver))
        .ok_or(OpenError::TooManyQueues { limit: WORKERS_MAX })?;
    // If space is lacking, the snapshot fails at once.
    worker.stop_waiting.set(true);
    Ok(worker)
}

fn request_failed<S: Storage>(shared: &Shared<S>, source: RequestError) -> SnapshotError {
    SnapshotError::Open(OpenError::Request { path: shared.layers[0].path.clone(), source })
}

/// Makes what was answered so far durable, and gives back what was freed.
async fn settle_some<S: Storage>(worker: &Worker<S>) -> Result<(), RequestError> {
    worker.flush().await?;
    if worker.shared.is_qcow2() {
        while worker.reclaim_some().await? {}
        worker.flush().await?;
    }
    Ok(())
}

/// Writes an empty image, makes it durable with its name, and reads it like any other.
async fn fill<S: Storage>(
    driver: &Driver<S::Queue>,
    shared: &Shared<S>,
    (id, mut info): (FileId, FileInfo),
    new: &NewOverlay,
) -> Result<Overlay, OpenError> {
    let path = || info.path.clone();
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: shared.engine.unit().trailing_zeros(),
        refcount_order: REFCOUNT_ORDER,
        extended_l2: shared.engine.granule() < shared.engine.unit(),
        size: shared.size.load(Ordering::Acquire),
    };
    let format = if shared.is_qcow2() { "qcow2" } else { "raw" };
    let mut image = NewImage::new(geometry);
    image.backing_file = Some(new.backing_file.clone());
    image.backing_format = Some(format.to_owned());
    let pieces = image.layout().map_err(|source| OpenError::Format { path: path(), source })?;
    let mut bytes: Vec<u8> = pieces.into_iter().flat_map(|(_, piece)| piece).collect();
    // To the end of a block: see `fill_last_block`.
    let block = u64::from(info.block_size.max(info.offset_alignment).max(512)) as usize;
    bytes.resize(bytes.len().next_multiple_of(block), 0);
    let written = ImageFile { driver, id, info: &info };
    written.write(0, &bytes).await?;
    if rules::waits_for(Awaited::NewOverlay) {
        written.sync().await?;
    }
    shared.storage.sync_name(&info.path)?;
    info.length = shared.storage.length(id)?;
    let image = ImageFile { driver, id, info: &info };
    let header = image.header(info.length).await?;
    let l1 = image.active_l1(&header, true).await?;
    let mut top = image.top_spec(&header).await?;
    top.keep_discarded = shared.options.discard_no_unref;
    let file = DiskFile { id, info };
    let sector = HeaderSector::load(driver, &file).await?;
    Ok(Overlay { file, header, sector, l1, top })
}

/// Removes an overlay that is not to be used.
pub(crate) fn discard<S: Storage>(shared: &Shared<S>, overlay: &Overlay) -> Result<(), OpenError> {
    Ok(shared.storage.remove(&overlay.file.info.path)?)
}

/// Refuses an overlay that no longer fits.
pub(crate) fn examine_again<S: Storage>(shared: &Shared<S>, overlay: &Overlay) -> Result<(), SnapshotError> {
    let refused = |source| SnapshotError::Refused { path: shared.layers[0].path.clone(), source };
    examine(shared).map_err(refused)?;
    let fits = overlay.header.size == shared.size.load(Ordering::Acquire)
        && overlay.header.size == shared.engine.size();
    if fits { Ok(()) } else { Err(refused(SnapshotRefusal::Resized)) }
}

/// Makes the top image a clean and durable one: nobody has the disk.
pub(crate) fn retire<S: Storage>(shared: &Arc<Shared<S>>) -> Result<(), SnapshotError> {
    let worker = side_worker(shared)?;
    let driver = &worker.driver;
    if rules::flushes_old_top() {
        driver.block_on(close::settle(&worker)).map_err(|source| request_failed(shared, source))?;
    }
    shared.engine.end_journal();
    Ok(())
}

/// Puts the overlay on top. What was the top is clean and durable, and exclusive access shows that nobody has the disk.
pub(crate) fn put_on_top<S: Storage>(
    shared: &mut Shared<S>,
    overlay: Overlay,
) -> Result<OldTop, SnapshotError> {
    let Overlay { file, header, sector, l1, top } = overlay;
    let index = FileIndex(shared.files.len() as u16);
    let format = LayerFormat::Qcow2 { geometry: header.geometry(), l1, data_file: None };
    let put = shared.engine.put_on_top(LayerSpec { file: index, format }, top);
    put.map_err(|error| request_failed(shared, error.into()))?;
    let (path, size) = (file.info.path.clone(), shared.size.load(Ordering::Acquire));
    // A disk that was resized while it was in use has another size than its header had at open.
    shared.layers[0].size = size;
    shared.layers.insert(0, Layer::qcow2(path, header, file.info.length));
    let old = shared.images[0];
    shared.files.push(file);
    shared.images.insert(0, index);
    shared.data = index;
    shared.zero_route = ZeroRoute::of(&shared.layers[0], false, shared.options.discard_no_unref);
    // The search for leaks of the old top is over: what it has not found stays for `strata check`.
    shared.leaks = LeakInput::default();
    Ok(OldTop { file: old, sector: shared.header.replace(sector) })
}

/// What is left to be done to the old top, and can be done beside the traffic: the number of its journal goes, its length
/// becomes durable, and other processes may read it.
pub(crate) fn let_go<S: Storage>(shared: &Shared<S>, old: OldTop) -> Result<(), OpenError> {
    let file = shared.file(old.file);
    let driver = Driver::new(shared.storage.queue(SIDE_QUEUE_DEPTH)?);
    let present = old.sector.as_ref().map_or(0, |sector| u64::from_be_bytes(sector.field(AUTOCLEAR)));
    match &old.sector {
        Some(sector) if JournalNumber::of_autoclear(present).is_some() => {
            let patch = patch_autoclear(autoclear_with_journal(present, None));
            driver.block_on(sector.patch_and_sync(&driver, file, patch))?;
        }
        _ => driver.block_on(ImageFile { driver: &driver, id: file.id, info: &file.info }.sync())?,
    }
    Ok(shared.storage.share(file.id)?)
}
