//! Persistent bitmaps of one image file: reads their locations, and marks those out of date that we do not update.
//!
//! Owns the treatment of bitmaps in a writable open. Bitmaps that every writer must update are marked in use, as if a
//! program had ended without saving them: no program trusts them any more. The others stay as they are. The contents
//! of bitmaps are never read or written.

use names::shown;
use qcow2::{Bitmap, BitmapDirectory, Header, HostOffset, HostRange, bitmap_table_entry};
use storage::IoQueue;
use tracing::warn;

use crate::bounds::READ_PIECE_BYTES as PIECE;
use crate::error::{BadBitmaps, OpenError};
use crate::image::image_file::ImageFile;
use crate::range::ByteRange;

/// The most bytes that the tables of all bitmaps may have together. At clusters of 64 KiB they name 512 GiB of bitmaps.
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// The bitmaps of an image that is to be written.
pub(crate) struct Guarded {
    pub list: Vec<Bitmap>,
    /// Their ranges of the file.
    pub places: Vec<HostRange>,
}

impl<Q: IoQueue> ImageFile<'_, Q> {
    /// The bitmaps of an image; none if its header marks them as invalid.
    pub async fn bitmaps(&self, header: &Header) -> Result<Option<Vec<Bitmap>>, OpenError> {
        let Some(bitmaps) = header.bitmaps() else { return Ok(None) };
        let mut directory = BitmapDirectory::new(&bitmaps, header.geometry(), self.info.length);
        let mut list = Vec::new();
        while let Some(piece) = directory.next_piece() {
            let bytes = self.read("bitmap directory", piece.into()).await?;
            directory.feed(&bytes, |bitmap| list.push(bitmap));
        }
        if directory.is_broken() {
            let (index, offset) = directory.place();
            return Err(self.bad_bitmaps(BadBitmaps::Directory { index, offset }));
        }
        Ok(Some(list))
    }

    /// As [`ImageFile::bitmaps`], for an image that is to be written. Bitmaps that break the format are logged, and
    /// then the image has none: its header will record that.
    pub async fn bitmaps_to_guard(&self, header: &Header) -> Result<Option<Guarded>, OpenError> {
        let found = async {
            let Some(list) = self.bitmaps(header).await? else { return Ok(None) };
            let places = self.bitmap_places(header, &list).await?;
            Ok(Some(Guarded { list, places }))
        };
        match found.await {
            Err(OpenError::Bitmaps { path, source }) => {
                warn!(path = %shown(&path), error = %source,
                    "the image's bitmaps are damaged: they are given up, and the space they took is leaked");
                Ok(None)
            }
            other => other,
        }
    }

    async fn bitmap_places(&self, header: &Header, list: &[Bitmap]) -> Result<Vec<HostRange>, OpenError> {
        let length = list.iter().map(Bitmap::table_length).sum();
        if length > TABLE_BYTES_MAX {
            return Err(self.bad_bitmaps(BadBitmaps::TooLarge { length, max: TABLE_BYTES_MAX }));
        }
        let geometry = header.geometry();
        let size = geometry.cluster_size();
        let directory =
            header.bitmaps().map(|maps| HostRange::new(maps.directory_offset, maps.directory_size));
        let mut places = Vec::from_iter(directory);
        for bitmap in list {
            let table = HostRange::new(bitmap.table_offset, bitmap.table_length());
            self.check_in_file(table, size)?;
            places.push(table);
            for piece in ByteRange::from(table).pieces(PIECE) {
                let bytes = self.read("bitmap table", piece).await?;
                for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
                    let raw = u64::from_be_bytes(*word);
                    let offset = HostOffset(piece.offset + index as u64 * 8);
                    let cluster = bitmap_table_entry(raw, &geometry)
                        .map_err(|raw| self.bad_bitmaps(BadBitmaps::TableEntry { raw, offset }))?;
                    let Some(cluster) = cluster else { continue };
                    let cluster = HostRange::new(cluster, size);
                    self.check_in_file(cluster, size)?;
                    match places.last_mut() {
                        // A table may end inside a cluster: then no cluster follows it directly.
                        Some(last) if last.end() == cluster.offset => last.length += size,
                        _ => places.push(cluster),
                    }
                }
            }
        }
        Ok(places)
    }

    /// Refuses a range that is not in the file; the last cluster of a file need not be whole.
    fn check_in_file(&self, range: HostRange, cluster_size: u64) -> Result<(), OpenError> {
        let end = self.info.length.next_multiple_of(cluster_size);
        if range.offset.0.saturating_add(range.length) <= end {
            return Ok(());
        }
        Err(self.bad_bitmaps(BadBitmaps::PastEnd { start: range.offset, length: range.length }))
    }

    fn bad_bitmaps(&self, source: BadBitmaps) -> OpenError {
        OpenError::Bitmaps { path: self.info.path.clone(), source }
    }

    /// Marks every bitmap that a writer must update as out of date; true if there was one. Sync before anything else
    /// is written.
    pub async fn retire_bitmaps(&self, list: &mut [Bitmap]) -> Result<bool, OpenError> {
        let mut any = false;
        for bitmap in list.iter_mut().filter(|bitmap| bitmap.is_auto() && !bitmap.is_in_use()) {
            warn!(path = %shown(&self.info.path), bitmap = %shown(&bitmap.name),
                "the bitmap is marked as out of date: writes are not noted in it");
            let (at, flags) = bitmap.mark_in_use();
            self.write(at.0, &flags).await?;
            any = true;
        }
        Ok(any)
    }
}
