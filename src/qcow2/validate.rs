//! The checks that make a [`Header`] valid, as far as they need no other part of the image.
//!
//! Reading and writing share them, so that no header is written that reading would refuse. Support for a
//! feature is checked in [`Header::unsupported`].

use std::ops::RangeInclusive;

use crate::address::HostOffset;
use crate::error::{FormatError, FormatErrorKind, Structure};
use crate::extension;
use crate::feature::{AUTOCLEAR_BITMAPS, Incompatible};
use crate::geometry::{
    CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, CLUSTER_BITS_MIN_EXTENDED_L2, REFCOUNT_ORDER_MAX, REFCOUNT_ORDER_V2,
    Version,
};
use crate::header::{
    BACKING_FILE_LENGTH_MAX, BACKING_FORMAT_LENGTH_MAX, HEADER_LENGTH_V2, HEADER_LENGTH_V3_MIN, Header,
    L1_TABLE_SIZE_MAX, REFCOUNT_TABLE_SIZE_MAX, SNAPSHOTS_MAX,
};
use crate::parse::{u32_at, u64_at};
use crate::position;
use crate::table::ENTRY_SIZE;

/// The shortest entry of the snapshot table, in bytes (spec: "Snapshots").
const SNAPSHOT_SIZE_MIN: u64 = 40;
/// The crypt method that has an encryption header.
const CRYPT_METHOD_LUKS: u32 = 2;
/// Exact length of the encryption header extension in bytes.
const ENCRYPTION_HEADER_LENGTH: u64 = 16;
/// Exact length of the bitmaps extension in bytes.
const BITMAPS_LENGTH: u64 = 24;
/// The most bitmaps.
const BITMAPS_MAX: u64 = 65_535;
/// The largest bitmap directory in bytes.
const BITMAP_DIRECTORY_SIZE_MAX: u64 = 65_535 << 10;

impl Header {
    /// Checks every field.
    pub(crate) fn validate(&self) -> Result<(), FormatError> {
        self.validate_sizes()?;
        self.validate_refcount_table()?;
        self.validate_snapshots()?;
        self.validate_rest()
    }

    /// Checks all fields but the sizes, the refcount table and the snapshot table.
    pub(crate) fn validate_rest(&self) -> Result<(), FormatError> {
        self.validate_version()?;
        self.validate_compression()?;
        self.validate_l1_table()?;
        self.validate_backing()?;
        let mut at = self.header_length as usize;
        for extension in &self.extensions {
            self.validate_extension(extension.magic, &extension.data, at)?;
            at += extension.encoded_length();
        }
        Ok(())
    }

    /// The fields that all arithmetic depends on; must be checked first.
    pub(crate) fn validate_sizes(&self) -> Result<(), FormatError> {
        let extended = self.incompatible.contains(Incompatible::EXTENDED_L2);
        let min = if extended { CLUSTER_BITS_MIN_EXTENDED_L2 } else { CLUSTER_BITS_MIN };
        let bits = range(self.cluster_bits.into(), min.into()..=CLUSTER_BITS_MAX.into());
        bits.map_err(|kind| FormatError::new(kind, Structure::ClusterBits, position::CLUSTER_BITS))?;
        let order = range(self.refcount_order.into(), 0..=REFCOUNT_ORDER_MAX.into());
        order.map_err(|kind| FormatError::new(kind, Structure::RefcountOrder, position::REFCOUNT_ORDER))
    }

    /// The fields that depend on the version. A parsed header always passes.
    fn validate_version(&self) -> Result<(), FormatError> {
        let unknown_length = self.header_length.saturating_sub(position::COMPRESSION_TYPE as u32 + 1);
        let consistent = match self.version {
            Version::V2 => {
                self.header_length == HEADER_LENGTH_V2
                    && (self.incompatible.0, self.compatible, self.autoclear) == (0, 0, 0)
                    && self.refcount_order == REFCOUNT_ORDER_V2
                    && self.compression_type == 0
            }
            Version::V3 => {
                self.header_length >= HEADER_LENGTH_V3_MIN
                    && u64::from(self.header_length) <= 1 << self.cluster_bits
                    && self.header_length.is_multiple_of(8)
                    && (self.compression_type == 0 || self.header_length > HEADER_LENGTH_V3_MIN)
            }
        };
        if consistent && self.unknown_fields.len() as u64 == u64::from(unknown_length) {
            return Ok(());
        }
        Err(FormatError::new(FormatErrorKind::Inconsistent, Structure::Header, position::MAGIC))
    }

    fn validate_compression(&self) -> Result<(), FormatError> {
        let compression_type = self.compression_type;
        if (compression_type != 0) == self.incompatible.contains(Incompatible::COMPRESSION) {
            return Ok(());
        }
        let kind = FormatErrorKind::CompressionMismatch { compression_type };
        Err(FormatError::new(kind, Structure::CompressionType, position::COMPRESSION_TYPE))
    }

    pub(crate) fn validate_refcount_table(&self) -> Result<(), FormatError> {
        let error = |kind, at| FormatError::new(kind, Structure::RefcountTable, at);
        let clusters = u64::from(self.refcount_table_clusters);
        let max = REFCOUNT_TABLE_SIZE_MAX >> self.cluster_bits;
        range(clusters, 1..=max).map_err(|kind| error(kind, position::REFCOUNT_TABLE_CLUSTERS))?;
        let place = self.validate_place(self.refcount_table_offset, clusters << self.cluster_bits);
        place.map_err(|kind| error(kind, position::REFCOUNT_TABLE_OFFSET))
    }

    fn validate_l1_table(&self) -> Result<(), FormatError> {
        let error = |kind, at| FormatError::new(kind, Structure::L1Table, at);
        let entries = u64::from(self.l1_entries);
        let max = L1_TABLE_SIZE_MAX / ENTRY_SIZE as u64;
        range(entries, 0..=max).map_err(|kind| error(kind, position::L1_ENTRIES))?;
        let needed = self.geometry().l1_entries();
        if needed > max {
            return Err(error(FormatErrorKind::DiskTooLarge { needed, max }, position::SIZE));
        }
        if entries < needed {
            return Err(error(FormatErrorKind::TooFewL1Entries { entries, needed }, position::L1_ENTRIES));
        }
        let place = self.validate_place(self.l1_offset, entries * ENTRY_SIZE as u64);
        place.map_err(|kind| error(kind, position::L1_OFFSET))
    }

    pub(crate) fn validate_snapshots(&self) -> Result<(), FormatError> {
        let error = |kind, at| FormatError::new(kind, Structure::SnapshotTable, at);
        let count = u64::from(self.snapshots);
        range(count, 0..=SNAPSHOTS_MAX.into()).map_err(|kind| error(kind, position::SNAPSHOTS))?;
        let place = self.validate_place(self.snapshots_offset, count * SNAPSHOT_SIZE_MIN);
        place.map_err(|kind| error(kind, position::SNAPSHOTS_OFFSET))
    }

    fn validate_backing(&self) -> Result<(), FormatError> {
        if let Some(name) = &self.backing_file {
            let length = range(name.len() as u64, 1..=BACKING_FILE_LENGTH_MAX as u64);
            length.map_err(|kind| {
                FormatError::new(kind, Structure::BackingFile, position::BACKING_FILE_LENGTH)
            })?;
        }
        if self.backing_format != extension::backing_format(&self.extensions) {
            let at = self.header_length as usize;
            return Err(FormatError::new(FormatErrorKind::Inconsistent, Structure::BackingFormat, at));
        }
        Ok(())
    }

    /// The contents of the extensions that the format limits. `at` is where it begins in the file.
    fn validate_extension(&self, magic: u32, data: &[u8], at: usize) -> Result<(), FormatError> {
        let length = data.len() as u64;
        let checked = match magic {
            extension::BACKING_FORMAT => range(length, 0..=BACKING_FORMAT_LENGTH_MAX as u64),
            extension::ENCRYPTION_HEADER if self.crypt_method != CRYPT_METHOD_LUKS => {
                Err(FormatErrorKind::NotEncrypted { method: self.crypt_method })
            }
            extension::ENCRYPTION_HEADER => {
                range(length, ENCRYPTION_HEADER_LENGTH..=ENCRYPTION_HEADER_LENGTH)
                    .and_then(|()| self.validate_place(HostOffset(u64_at(data, 0)), u64_at(data, 8)))
            }
            extension::BITMAPS => self.validate_bitmaps(data),
            // An end mark among the extensions would hide those after it.
            extension::END => Err(FormatErrorKind::Inconsistent),
            _ => Ok(()),
        };
        checked.map_err(|kind| FormatError::new(kind, extension::structure(magic), at))
    }

    fn validate_bitmaps(&self, data: &[u8]) -> Result<(), FormatErrorKind> {
        range(data.len() as u64, BITMAPS_LENGTH..=BITMAPS_LENGTH)?;
        if self.autoclear & AUTOCLEAR_BITMAPS == 0 {
            // Without the bit, a program without support for bitmaps has written to the image: the contents have no
            // meaning.
            return Ok(());
        }
        range(u32_at(data, 0).into(), 1..=BITMAPS_MAX)?;
        match u32_at(data, 4) {
            0 => {}
            value => return Err(FormatErrorKind::Reserved { value: value.into() }),
        }
        let directory_size = u64_at(data, 8);
        range(directory_size, 1..=BITMAP_DIRECTORY_SIZE_MAX)?;
        self.validate_place(HostOffset(u64_at(data, 16)), directory_size)
    }

    /// A table of `length` bytes must begin at a cluster other than the header's, and end within the largest file. An
    /// empty table may have any aligned offset, because it is never read.
    fn validate_place(&self, offset: HostOffset, length: u64) -> Result<(), FormatErrorKind> {
        if !self.geometry().is_aligned(offset.0) {
            return Err(FormatErrorKind::Unaligned { value: offset.0, unit: self.geometry().cluster_size() });
        }
        match offset.0.checked_add(length) {
            Some(end) if i64::try_from(end).is_ok() => {}
            _ => return Err(FormatErrorKind::PastEnd { start: offset.0, length }),
        }
        if offset.0 == 0 && length > 0 {
            return Err(FormatErrorKind::OverlapsHeader);
        }
        Ok(())
    }
}

fn range(value: u64, allowed: RangeInclusive<u64>) -> Result<(), FormatErrorKind> {
    let (min, max) = (*allowed.start(), *allowed.end());
    if allowed.contains(&value) { Ok(()) } else { Err(FormatErrorKind::OutOfRange { value, min, max }) }
}
