//! Opening a chain: the top image and every backing file below it, checked, locked and read once.
//!
//! Only files that a header names with a known format are opened, and never one that is in the chain already. Formats
//! are never guessed. Memory is bounded by what the files hold, not by what their headers claim.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::check::RepairKind;
use engine::mutation::{Mutation, active};
use engine::{Entries, FileIndex, LayerFormat, LayerSpec, TopSpec};
use names::shown;
use qcow2::{Bitmap, Geometry, Header, HostOffset, Incompatible, Unsupported};
use storage::{AlignedBuf, FileId, FileInfo, IoQueue, Kind, OpenOptions, Operation, Storage};
use tracing::{info, warn};

use crate::background::leaks::knows_all_owners;
use crate::bounds::READ_PIECE_BYTES as PIECE;
use crate::error::OpenError;
use crate::image::check::{ImageFile, repair_open};
use crate::layer::{DiskFile, Layer};
use crate::open::backing::{LayerFile, backing_of};
use crate::open::cut_short::warn_if_cut_short;
use crate::open::data_file::DataFiles;
use crate::open::foreign;
use crate::open::header::HeaderSector;
use crate::runtime::driver::Driver;
use crate::serve::policy::{DetectZeroes, Discards};
use crate::serve::space::OnEnospc;

/// The most layers of a chain: as many as still open fast and in little memory.
pub const CHAIN_LAYERS_MAX: usize = 1000;

/// The most threads of a disk that inflate, unless the options name more.
const INFLATE_THREADS: usize = 4;

/// Bytes of a sector, the unit of a disk's size.
const SECTOR: u64 = 512;

/// The format of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// qcow2, version 2 or 3.
    Qcow2,
    /// The plain bytes of the disk.
    Raw,
}

/// How to open a disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The top image's format.
    pub format: Format,
    /// The format of backing files whose overlay does not record one.
    pub backing_format: Option<Format>,
    /// The external file that holds the top image's data. The name in the image's header is not followed.
    pub data_file: Option<PathBuf>,
    /// The data files of backing files: the path of the backing file as it is opened, and its data file.
    pub backing_data_files: Vec<(PathBuf, PathBuf)>,
    /// Never write to the top image.
    pub read_only: bool,
    /// The ID or the name of an internal snapshot of the top image to open instead of the active disk: read-only.
    pub snapshot: Option<String>,
    /// Bypass the host's page cache, except for backing files.
    pub direct: bool,
    /// Bypass the page cache for backing files too.
    pub backing_direct: bool,
    /// How long to wait for another process's image lock.
    pub lock_timeout: Duration,
    /// The most bytes of chain map. A resident guest cluster takes 8 bytes, except where clusters lie in order.
    pub map_bytes: usize,
    /// The most bytes of clean L2 tables and refblocks to cache.
    pub table_bytes: usize,
    /// The most bytes of inflated clusters to cache.
    pub inflated_bytes: usize,
    /// The most threads that inflate; with none, each request inflates on its queue's thread.
    pub inflate_threads: usize,
    /// How to treat a request that finds no space on the host.
    pub on_enospc: OnEnospc,
    /// Whether writes of zeros become write zeroes.
    pub detect_zeroes: DetectZeroes,
    /// How to treat discards.
    pub discards: Discards,
    /// A cluster that the guest discards or zeroes keeps its host cluster, so that the image does not become
    /// fragmented. The space is given back all the same. Only for a qcow2 image of version 3.
    pub discard_no_unref: bool,
    /// While the disk is in use, search for clusters that a writer left counted but unused when it did not close the
    /// image.
    pub search_leaks: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        DiskOptions {
            format: Format::Qcow2,
            backing_format: None,
            data_file: None,
            backing_data_files: Vec::new(),
            read_only: false,
            snapshot: None,
            direct: true,
            backing_direct: false,
            lock_timeout: Duration::from_secs(5),
            map_bytes: 32 << 20,
            table_bytes: 16 << 20,
            inflated_bytes: 16 << 20,
            inflate_threads: std::thread::available_parallelism().map_or(1, usize::from).min(INFLATE_THREADS),
            on_enospc: OnEnospc::Report,
            detect_zeroes: DetectZeroes::Off,
            discards: Discards::Unmap,
            discard_no_unref: false,
            search_leaks: true,
        }
    }
}

/// An opened chain, ready to become an engine.
pub(crate) struct Chain {
    pub layers: Vec<Layer>,
    pub files: Vec<DiskFile>,
    pub specs: Vec<LayerSpec>,
    /// For a writable qcow2 top image.
    pub top: Option<TopSpec>,
    /// The bitmaps of a writable qcow2 top image.
    pub bitmaps: Option<Vec<Bitmap>>,
}

/// Opens the chain whose top is `path`.
pub(crate) async fn open_chain<S: Storage>(
    driver: &Driver<S::Queue>,
    storage: &S,
    path: &Path,
    options: &DiskOptions,
) -> Result<Chain, OpenError> {
    let mut chain =
        Chain { layers: Vec::new(), files: Vec::new(), specs: Vec::new(), top: None, bitmaps: None };
    let mut at = LayerFile { path: path.to_path_buf(), format: options.format, recorded: false };
    match open_layers(driver, storage, &mut chain, &mut at, options).await {
        Ok(()) => Ok(chain),
        Err(error) if chain.layers.is_empty() => Err(error),
        Err(source) => {
            let names = chain.layers.into_iter().map(|layer| layer.path).chain([at.path]).collect();
            Err(OpenError::Backing { chain: names, recorded: at.recorded, source: Box::new(source) })
        }
    }
}

/// Adds all layers to a chain. `at` is the first layer, and afterwards the last that was tried.
async fn open_layers<S: Storage>(
    driver: &Driver<S::Queue>,
    storage: &S,
    chain: &mut Chain,
    at: &mut LayerFile,
    options: &DiskOptions,
) -> Result<(), OpenError> {
    let mut seen = HashSet::new();
    let mut data_files = DataFiles::new(options);
    let mut next = Some(at.clone());
    while let Some(file) = next {
        at.clone_from(&file);
        let LayerFile { path, format, .. } = file;
        if chain.layers.len() >= CHAIN_LAYERS_MAX {
            return Err(OpenError::ChainTooDeep { path, limit: CHAIN_LAYERS_MAX });
        }
        let top = chain.layers.is_empty();
        let writable = top && !options.read_only;
        let direct = if top { options.direct } else { options.backing_direct };
        let how = OpenOptions { writable, direct, lock_timeout: options.lock_timeout };
        let (id, mut info) = storage.open(&path, &how)?;
        if !seen.insert(info.identity) {
            return Err(OpenError::BackingLoop { path });
        }
        let file = FileIndex(chain.files.len() as u16);
        let mut layer = match format {
            Format::Raw => {
                data_files.open(storage, (chain.layers.len(), &path), None, &how, &mut seen)?;
                foreign::warn_of_marks(&ImageFile { driver, id, info: &info }, writable).await;
                raw_layer(&path, &info)
            }
            Format::Qcow2 => {
                let mut header = Reader { driver, id, info: &info }.header().await?;
                check_supported(&info, &header, writable)?;
                data_files.open(storage, (chain.layers.len(), &path), Some(&header), &how, &mut seen)?;
                if writable && header.incompatible.contains(Incompatible::DIRTY) {
                    rebuild_refcounts(driver, id, &info).await?;
                    info.length = storage.length(id)?;
                    header = Reader { driver, id, info: &info }.header().await?;
                }
                Layer::qcow2(path.clone(), header, info.length)
            }
        };
        let snapshot = options.snapshot.as_deref().filter(|_| top);
        if writable && options.discard_no_unref && !layer.knows_zero_clusters() {
            return Err(OpenError::NoZeroClusters { path });
        }
        let format = match (&layer.header, snapshot) {
            (None, None) => LayerFormat::Raw { size: layer.size },
            (None, Some(_)) => return Err(OpenError::SnapshotOfRaw { path }),
            (Some(header), Some(_)) if header.has_data_file() => {
                return Err(OpenError::Unsupported { path, source: Unsupported::SnapshotsWithDataFile });
            }
            (Some(header), Some(wanted)) => {
                let image = ImageFile { driver, id, info: &info };
                let (size, l1) = image.snapshot_disk(header, wanted).await?;
                layer.size = size;
                warn_if_cut_short(&info, header, &l1, None);
                LayerFormat::Qcow2 { geometry: whole_sectors(header, size), l1, data_file: None }
            }
            (Some(header), None) => {
                let reader = Reader { driver, id, info: &info };
                let l1 = reader.l1(header, writable).await?;
                if writable {
                    let mut spec = reader.top(header).await?;
                    spec.keep_discarded = options.discard_no_unref;
                    let image = ImageFile { driver, id, info: &info };
                    if let Some(bitmaps) = image.bitmaps_to_guard(header).await? {
                        spec.bitmaps = bitmaps.places;
                        chain.bitmaps = Some(bitmaps.list);
                    }
                    spec.may_search_leaks = options.search_leaks
                        && spec.snapshots.is_whole()
                        && knows_all_owners(header, chain.bitmaps.is_some());
                    chain.top = Some(spec);
                }
                let refcounts = chain.top.as_ref().filter(|_| writable).map(|top| &top.refcount_table);
                warn_if_cut_short(&info, header, &l1, refcounts);
                LayerFormat::Qcow2 { geometry: whole_sectors(header, header.size), l1, data_file: None }
            }
        };
        next = match &layer.header {
            Some(header) => backing_of(&path, header, options.backing_format)?,
            None => None,
        };
        chain.specs.push(LayerSpec { file, format });
        chain.files.push(DiskFile { id, info });
        chain.layers.push(layer);
    }
    // Data files come after all images, so that an image's file index is its layer's number.
    for (layer, file) in data_files.finish()? {
        let index = FileIndex(chain.files.len() as u16);
        chain.files.push(file);
        if let LayerFormat::Qcow2 { data_file, .. } = &mut chain.specs[layer].format {
            *data_file = Some(index);
        }
    }
    Ok(())
}

/// Extends a writable file to a whole block of its file system. Growing it later from inside a block would write that
/// block through the host's page cache, where it can collide with a direct write (`FileInfo::block_size`).
pub(crate) async fn fill_last_block<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &DiskFile,
) -> Result<(), OpenError> {
    let length = file.info.length.next_multiple_of(u64::from(file.info.block_size.max(1)));
    lengthen(driver, file, length).await
}

/// Extends a file to a length, if it is shorter.
pub(crate) async fn lengthen<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &DiskFile,
    length: u64,
) -> Result<(), OpenError> {
    if length <= file.info.length {
        return Ok(());
    }
    let grow = Operation::bare(file.id, Kind::SetLength, length);
    let path = file.info.path.clone();
    driver.run_bare(grow).await.map_err(|source| OpenError::Io {
        path,
        structure: "end of the file",
        offset: length,
        source,
    })
}

/// Records for other programs which contents are not kept up to date: bitmaps, and the subjects of unknown autoclear
/// features. Durable before anything else is written.
pub(crate) async fn note_writes<Q: IoQueue>(
    driver: &Driver<Q>,
    file: &DiskFile,
    header: &Header,
    sector: &HeaderSector,
    bitmaps: &mut Option<Vec<Bitmap>>,
) -> Result<(), OpenError> {
    let image = ImageFile { driver, id: file.id, info: &file.info };
    let kept = header.autoclear_kept(bitmaps.is_some());
    let retired = match bitmaps {
        Some(bitmaps) => image.retire_bitmaps(bitmaps).await?,
        None => false,
    };
    if kept != header.autoclear {
        sector.patch_and_sync(driver, file, qcow2::position::patch_autoclear(kept)).await?;
    } else if retired && !active(Mutation::BitmapsMarkedLate) {
        image.sync().await?;
    }
    Ok(())
}

/// The served part of a disk of this size. As in QEMU, a partial last sector is not part of it: guests cannot address
/// part of a sector, and direct I/O cannot move one.
fn whole_sectors(header: &Header, size: u64) -> Geometry {
    Geometry { size: size / SECTOR * SECTOR, ..header.geometry() }
}

/// A raw layer. As in QEMU, a sector in which its file ends is part of the disk, and its missing bytes read as zero.
pub(crate) fn raw_layer(path: &Path, info: &FileInfo) -> Layer {
    Layer::raw(path.to_path_buf(), info.length.next_multiple_of(SECTOR), info.length)
}

/// Rebuilds the refcounts of an image that was not closed cleanly, before anything is allocated: they may be too low.
async fn rebuild_refcounts<Q: IoQueue>(
    driver: &Driver<Q>,
    id: FileId,
    info: &FileInfo,
) -> Result<(), OpenError> {
    let path = shown(&info.path);
    warn!(%path, "the image was not closed cleanly: its refcounts are rebuilt");
    let repaired = repair_open(driver, id, info, RepairKind::All, &mut |_| {}).await;
    let (found, writes) = repaired.map_err(|error| OpenError::Dirty(Box::new(error)))?;
    info!(%path, leaked_clusters = found.leaked_clusters, corruptions = found.corruptions, writes, "rebuilt");
    Ok(())
}

fn check_supported(info: &FileInfo, header: &Header, writable: bool) -> Result<(), OpenError> {
    let path = info.path.clone();
    let refusal = header.unsupported().or_else(|| if writable { header.write_refusal() } else { None });
    if let Some(source) = refusal {
        return Err(OpenError::Unsupported { path, source });
    }
    if writable && info.block_device {
        return Err(OpenError::WritableBlockDevice { path });
    }
    Ok(())
}

/// Reads the metadata of one file.
struct Reader<'a, Q> {
    driver: &'a Driver<Q>,
    id: FileId,
    info: &'a FileInfo,
}

impl<Q: IoQueue> Reader<'_, Q> {
    async fn header(&self) -> Result<Header, OpenError> {
        let image = ImageFile { driver: self.driver, id: self.id, info: self.info };
        let prefix = self.read("header", 0, Header::PREFIX_MAX as u64).await?;
        let wanted = match Header::cluster_size_hint(&prefix) {
            Ok(wanted) => wanted,
            Err(source) => return Err(foreign::explain(&image, source).await),
        };
        let area = self.read("header", 0, wanted).await?;
        let format = |source| OpenError::Format { path: self.info.path.clone(), source };
        Header::parse(&area, self.info.length).map_err(format)
    }

    /// The active L1 table. For a writable image, all entries, because their tables must not be overwritten.
    /// Otherwise only the entries that the size needs, as a chain may have 1,000 such tables.
    async fn l1(&self, header: &Header, writable: bool) -> Result<Entries, OpenError> {
        let all = u64::from(header.l1_entries);
        let entries = if writable { all } else { header.geometry().l1_entries().min(all) };
        self.table("L1 table", header.l1_offset, entries).await
    }

    async fn top(&self, header: &Header) -> Result<TopSpec, OpenError> {
        let entries = u64::from(header.refcount_table_clusters) * header.geometry().cluster_size() / 8;
        let refcount_table = self.table("refcount table", header.refcount_table_offset, entries).await?;
        let image = ImageFile { driver: self.driver, id: self.id, info: self.info };
        Ok(TopSpec {
            l1_offset: header.l1_offset,
            refcount_table_offset: header.refcount_table_offset,
            refcount_table,
            file_length: self.info.length,
            bitmaps: Vec::new(),
            snapshots: image.snapshot_places(header).await?,
            keep_discarded: false,
            may_search_leaks: false,
        })
    }

    /// The entries of a table; entries past the end of the file are zero.
    async fn table(
        &self,
        what: &'static str,
        offset: HostOffset,
        entries: u64,
    ) -> Result<Entries, OpenError> {
        let mut table = Entries::new(entries);
        let length = self.in_file(offset.0, entries * 8);
        for at in (0..length).step_by(PIECE as usize) {
            let bytes = self.read_piece(what, offset.0 + at, PIECE.min(length - at)).await?;
            table.read(at / 8, &bytes);
        }
        Ok(table)
    }

    /// Reads a range, cut to the end of the file.
    async fn read(&self, structure: &'static str, offset: u64, length: u64) -> Result<Vec<u8>, OpenError> {
        let length = self.in_file(offset, length);
        let mut bytes = Vec::with_capacity(length as usize);
        for at in (0..length).step_by(PIECE as usize) {
            bytes.extend(self.read_piece(structure, offset + at, PIECE.min(length - at)).await?);
        }
        Ok(bytes)
    }

    /// How many bytes of a range are in the file.
    fn in_file(&self, offset: u64, length: u64) -> u64 {
        length.min(self.info.length.saturating_sub(offset))
    }

    /// Reads at most a piece.
    async fn read_piece(
        &self,
        structure: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<Vec<u8>, OpenError> {
        let aligned = length.next_multiple_of(u64::from(self.info.offset_alignment.max(512)));
        let operation = Operation::bare(self.id, Kind::Read, offset);
        let (result, buffer) = self.driver.run_buffer(operation, AlignedBuf::new(aligned as usize)).await;
        let path = self.info.path.clone();
        result.map_err(|source| OpenError::Io { path, structure, offset, source })?;
        Ok(buffer.as_slice()[..length as usize].to_vec())
    }
}
