//! Internal snapshots of one image file: lists, creates, applies and deletes them, and reads the parts that an open
//! needs.
//!
//! Owns the I/O. The crates below decide what the bytes mean, and the order of writes.

use std::path::Path;

use engine::Entries;
use engine::change::SnapshotPlaces;
use engine::check::RepairKind;
use names::shown;
use qcow2::header::L1_TABLE_SIZE_MAX;
use qcow2::{Geometry, Header, HostRange, Incompatible, SnapshotTable};
use storage::{FileId, FileInfo, IoQueue, OpenOptions, Storage};
use tracing::warn;

pub use engine::change::SnapshotChange as Change;
pub use qcow2::Snapshot;

use crate::bounds::READ_PIECE_BYTES as PIECE;
use crate::error::{BadSnapshot, OpenError};
pub use crate::image::change::{ChangeError, ChangeRefusal};
use crate::image::change::{QUEUE_DEPTH, carry_out, plan};
use crate::image::check::repair_open;
use crate::image::image_file::{ImageFile, Sharing};
use crate::layer::DiskFile;
use crate::open::file_end::fill_last_block;
use crate::options::DiskOptions;
use crate::range::ByteRange;
use crate::runtime::driver::Driver;

/// The most bytes that the L1 tables of the snapshots of a writable image may have together: all are read at open. At
/// clusters of 64 KiB each is 16 KiB for a TiB of disk.
const L1_BYTES_MAX: u64 = 64 << 20;

/// The internal snapshots of the qcow2 image at `path`, in the order of its table. Takes a shared lock, so that no
/// writer may have the image open, and writes nothing. Of the options, `direct` and `lock_timeout` matter.
///
/// # Errors
/// If the image cannot be opened or read, or its snapshot table is broken.
pub fn list<S: Storage>(storage: &S, path: &Path, options: &DiskOptions) -> Result<Vec<Snapshot>, OpenError> {
    list_sharing(storage, path, Sharing::Readers, options)
}

/// As [`list`], with a choice of which others may use the image. A data file that `options` name must belong to the
/// image. It is not opened, because the image alone describes its snapshots.
///
/// # Errors
/// As for [`list`], and if a data file is named for an image that keeps its data itself.
pub fn list_sharing<S: Storage>(
    storage: &S,
    path: &Path,
    sharing: Sharing,
    options: &DiskOptions,
) -> Result<Vec<Snapshot>, OpenError> {
    let driver = Driver::new(storage.queue(QUEUE_DEPTH)?);
    let (id, info) = sharing.open(storage, path, options)?;
    driver.block_on(async {
        let image = ImageFile { driver: &driver, id, info: &info };
        let header = image.header(info.length).await?;
        expect_data_file(&info, &header, options)?;
        image.snapshots(&header).await
    })
}

/// Creates, applies or deletes a snapshot of the qcow2 image at `path`. Takes an exclusive lock, so that nothing else
/// may have the image open. A crash at any instant leaves the disk in its old or its new state, and all other
/// snapshots as they are. See docs/durability.md, "Changes of an image that nobody uses". Of the options, `direct`
/// and `lock_timeout` matter. The file stays open, and locked, as long as the storage lives: use a new storage for
/// each change.
///
/// # Errors
/// See [`ChangeError`].
pub fn change<S: Storage>(
    storage: &S,
    path: &Path,
    change: Change,
    options: &DiskOptions,
) -> Result<Snapshot, ChangeError> {
    let driver = Driver::new(storage.queue(QUEUE_DEPTH).map_err(OpenError::from)?);
    let how = OpenOptions { writable: true, direct: options.direct, lock_timeout: options.lock_timeout };
    let (id, info) = storage.open(path, &how).map_err(OpenError::from)?;
    if info.block_device {
        return Err(OpenError::WritableBlockDevice { path: path.to_path_buf() }.into());
    }
    let changes_the_disk = matches!(change, Change::Apply { .. });
    driver.block_on(async {
        let (header, info) = sound_header(storage, &driver, id, info).await?;
        expect_data_file(&info, &header, options)?;
        let file = DiskFile { id, info };
        let image = ImageFile { driver: &driver, id, info: &file.info };
        let mut plan = plan(&image, &header, engine::change::Change::Snapshot(change)).await?;
        fill_last_block(&driver, &file).await?;
        if changes_the_disk && let Some(mut bitmaps) = image.bitmaps(&header).await? {
            // The bitmaps describe the old contents of the disk.
            if image.retire_bitmaps(&mut bitmaps).await? {
                image.sync().await?;
            }
        }
        carry_out(&image, &mut plan).await?;
        Ok(plan.snapshot().expect("it is about a snapshot").clone())
    })
}

/// Refuses a data file that is named for an image that has none.
fn expect_data_file(info: &FileInfo, header: &Header, options: &DiskOptions) -> Result<(), OpenError> {
    match &options.data_file {
        Some(file) if !header.has_data_file() => {
            Err(OpenError::DataFileNotWanted { image: info.path.clone(), file: file.clone() })
        }
        _ => Ok(()),
    }
}

/// The header of an image that is to be written, after any repair of its refcounts.
async fn sound_header<S: Storage>(
    storage: &S,
    driver: &Driver<S::Queue>,
    id: FileId,
    mut info: FileInfo,
) -> Result<(Header, FileInfo), ChangeError> {
    let mut header = ImageFile { driver, id, info: &info }.header(info.length).await?;
    if let Some(source) = header.unsupported().or_else(|| header.write_refusal()) {
        return Err(OpenError::Unsupported { path: info.path, source }.into());
    }
    if header.incompatible.contains(Incompatible::DIRTY) {
        repair_open(driver, id, &info, RepairKind::All, &mut |_| {}).await.map_err(ChangeError::Repair)?;
        info.length = storage.length(id).map_err(OpenError::from)?;
        header = ImageFile { driver, id, info: &info }.header(info.length).await?;
    }
    Ok((header, info))
}

/// Whether a snapshot's L1 table can be where the entry says.
fn l1_place(snapshot: &Snapshot, geometry: &Geometry, file_length: u64) -> Result<HostRange, BadSnapshot> {
    let (offset, entries) = (snapshot.l1_offset, snapshot.l1_entries);
    let length = u64::from(entries) * 8;
    // A table of no bytes has no location.
    let is_in_file = length == 0 || (offset.0 > 0 && offset.0 < file_length);
    if length > L1_TABLE_SIZE_MAX || !geometry.is_aligned(offset.0) || !is_in_file {
        return Err(BadSnapshot::L1Place { offset, entries });
    }
    Ok(HostRange::new(offset, length))
}

impl<Q: IoQueue> ImageFile<'_, Q> {
    /// All entries of the snapshot table.
    pub async fn snapshots(&self, header: &Header) -> Result<Vec<Snapshot>, OpenError> {
        Ok(self.snapshot_table(header).await?.0)
    }

    /// All entries of the snapshot table, and its length in bytes.
    async fn snapshot_table(&self, header: &Header) -> Result<(Vec<Snapshot>, u64), OpenError> {
        let mut table = SnapshotTable::new(header.snapshots_offset, header.snapshots, self.info.length);
        let mut snapshots = Vec::new();
        while let Some(piece) = table.next_piece() {
            let bytes = self.read("snapshot table", piece.into()).await?;
            table.feed(&bytes, |entry| snapshots.push(entry.snapshot));
        }
        if table.is_broken() {
            let (index, offset) = table.place();
            return Err(OpenError::SnapshotTable { path: self.info.path.clone(), index, offset });
        }
        Ok((snapshots, table.length()))
    }

    /// The ranges of the file that the snapshots own: nothing may be written there.
    pub async fn snapshot_places(&self, header: &Header) -> Result<SnapshotPlaces, OpenError> {
        let mut places = SnapshotPlaces::default();
        if header.snapshots == 0 {
            return Ok(places);
        }
        let (snapshots, length) = self.snapshot_table(header).await?;
        places.tables.push(HostRange::new(header.snapshots_offset, length));
        let geometry = header.geometry();
        let path = || self.info.path.clone();
        for snapshot in &snapshots {
            match l1_place(snapshot, &geometry, self.info.length) {
                Ok(HostRange { length: 0, .. }) => {}
                Ok(place) => places.tables.push(place),
                Err(bad) => {
                    places.has_unknown();
                    warn!(path = %shown(&path()), id = %shown(&snapshot.id),
                        %bad, "an internal snapshot is damaged: it cannot be used, and is not watched over");
                }
            }
            if snapshot.has_unknown_fields() {
                places.has_unknown();
            }
        }
        let l1_tables = places.tables[1..].to_vec();
        let length = l1_tables.iter().map(|table| table.length).sum();
        if length > L1_BYTES_MAX {
            return Err(OpenError::SnapshotsTooLarge { path: path(), length, max: L1_BYTES_MAX });
        }
        for table in l1_tables {
            for piece in self.l1_in_file(table).pieces(PIECE) {
                let bytes = self.read("L1 table of a snapshot", piece).await?;
                places.add_l1(&geometry, &bytes, self.info.length);
            }
        }
        Ok(places)
    }

    /// The disk of the snapshot with this ID or name: its bytes, and its L1 table.
    pub async fn snapshot_disk(&self, header: &Header, wanted: &str) -> Result<(u64, Entries), OpenError> {
        let path = || self.info.path.clone();
        let snapshots = self.snapshots(header).await?;
        let found = qcow2::snapshot::find(&snapshots, wanted.as_bytes());
        let Some(snapshot) = found.map(|index| &snapshots[index]) else {
            return Err(OpenError::NoSuchSnapshot { path: path(), wanted: wanted.to_owned() });
        };
        let bad = |source| OpenError::BadSnapshot { path: path(), wanted: wanted.to_owned(), source };
        let geometry = Geometry { size: snapshot.disk_size().unwrap_or(header.size), ..header.geometry() };
        let table = l1_place(snapshot, &geometry, self.info.length).map_err(bad)?;
        let (entries, needed) = (snapshot.l1_entries, geometry.l1_entries());
        if needed > u64::from(entries) {
            return Err(bad(BadSnapshot::TooFewL1Entries { entries, needed }));
        }
        let present = self.l1_in_file(table);
        let l1 = self.table("L1 table of the snapshot", present, u64::from(entries)).await?;
        Ok((geometry.size, l1))
    }

    /// The part of an L1 table that is in the file. An entry in which the file ends counts whole: its rest is zero.
    fn l1_in_file(&self, table: HostRange) -> ByteRange {
        let present = self.in_file(table);
        ByteRange { length: present.length.next_multiple_of(8), ..present }
    }
}
