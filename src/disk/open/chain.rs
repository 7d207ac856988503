//! Opening a chain: the top image and every backing file below it, checked, locked and read once.
//!
//! Only files that a header names with a known format are opened, and never one that is in the chain already. Formats
//! are never guessed. Memory is bounded by what the files hold, not by what their headers claim.

use std::collections::HashSet;
use std::path::Path;

use engine::check::RepairKind;
use engine::{Entries, FileIndex, LayerFormat, LayerSpec, TopSpec};
use names::shown;
use qcow2::feature::autoclear_with_journal;
use qcow2::{Bitmap, Geometry, Header, HostOffset, HostRange, Incompatible, SECTOR, Unsupported};
use storage::{FileId, FileInfo, IoQueue, OpenOptions, Storage};
use tracing::{info, warn};

use crate::background::leak_input::knows_all_owners;
use crate::error::OpenError;
use crate::image::check::repair_open;
use crate::image::image_file::ImageFile;
use crate::layer::{DiskFile, Layer};
use crate::open::backing::{LayerFile, backing_of};
use crate::open::cut_short::warn_if_cut_short;
use crate::open::data_file::DataFiles;
use crate::open::header::HeaderSector;
use crate::open::raw::{raw_layer, warn_of_marks};
use crate::options::{DiskOptions, Format};
use crate::rules::{self, Awaited};
use crate::runtime::driver::Driver;

/// The most layers of a chain: as many as still open fast and in little memory.
pub const CHAIN_LAYERS_MAX: usize = 1000;

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
                warn_of_marks(&ImageFile { driver, id, info: &info }, writable).await;
                raw_layer(&path, &info)
            }
            Format::Qcow2 => {
                let mut header = ImageFile { driver, id, info: &info }.header(info.length).await?;
                check_supported(&info, &header, writable)?;
                data_files.open(storage, (chain.layers.len(), &path), Some(&header), &how, &mut seen)?;
                if writable && header.incompatible.contains(Incompatible::DIRTY) {
                    rebuild_refcounts(driver, id, &info).await?;
                    info.length = storage.length(id)?;
                    header = ImageFile { driver, id, info: &info }.header(info.length).await?;
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
                let image = ImageFile { driver, id, info: &info };
                let l1 = image.active_l1(header, writable).await?;
                if writable {
                    let mut spec = image.top_spec(header).await?;
                    spec.keep_discarded = options.discard_no_unref;
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
    // A journal may still be carried out. Before anything else is written, its number goes or is replaced.
    let kept = autoclear_with_journal(header.autoclear_kept(bitmaps.is_some()), header.journal_number());
    let retired = match bitmaps {
        Some(bitmaps) => image.retire_bitmaps(bitmaps).await?,
        None => false,
    };
    if kept != header.autoclear {
        sector.patch_and_sync(driver, file, qcow2::position::patch_autoclear(kept)).await?;
    } else if retired && rules::waits_for(Awaited::BitmapMarks) {
        image.sync().await?;
    }
    Ok(())
}

/// The served part of a disk of this size. As in QEMU, a partial last sector is not part of it: guests cannot address
/// part of a sector, and direct I/O cannot move one.
fn whole_sectors(header: &Header, size: u64) -> Geometry {
    Geometry { size: size / SECTOR * SECTOR, ..header.geometry() }
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

impl<Q: IoQueue> ImageFile<'_, Q> {
    /// The active L1 table. For a writable image, all entries, because their tables must not be overwritten.
    /// Otherwise only the entries that the size needs, as a chain may have 1,000 such tables.
    pub async fn active_l1(&self, header: &Header, writable: bool) -> Result<Entries, OpenError> {
        let all = u64::from(header.l1_entries);
        let entries = if writable { all } else { header.geometry().l1_entries().min(all) };
        self.table_in_file("L1 table", header.l1_offset, entries).await
    }

    pub async fn top_spec(&self, header: &Header) -> Result<TopSpec, OpenError> {
        let entries = u64::from(header.refcount_table_clusters) * header.geometry().cluster_size() / 8;
        let offset = header.refcount_table_offset;
        Ok(TopSpec {
            l1_offset: header.l1_offset,
            refcount_table_offset: offset,
            refcount_table: self.table_in_file("refcount table", offset, entries).await?,
            file_length: self.info.length,
            bitmaps: Vec::new(),
            snapshots: self.snapshot_places(header).await?,
            keep_discarded: false,
            may_search_leaks: false,
        })
    }

    /// The entries of a table; entries past the end of the file are zero.
    async fn table_in_file(
        &self,
        structure: &'static str,
        offset: HostOffset,
        entries: u64,
    ) -> Result<Entries, OpenError> {
        self.table(structure, self.in_file(HostRange::new(offset, entries * 8)), entries).await
    }
}
