//! The image header as a type (spec: "Header", "Additional fields").
//!
//! Owns the fields and the facts that follow from them. `parse` reads a header from bytes, `encode` writes one, and
//! `validate` checks one; the byte positions are in [`position`](crate::position).

use crate::address::HostOffset;
use crate::entry::HOST_OFFSET_LIMIT;
use crate::error::FormatError;
use crate::extension::{self, Extension};
use crate::feature::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, Compression, Incompatible, JournalNumber, Unsupported,
};
use crate::geometry::{Geometry, Version};

/// The first four bytes of every image: "QFI" and 0xfb.
pub const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header in bytes.
pub const HEADER_LENGTH_V2: u32 = 72;
/// The shortest version 3 header in bytes.
pub const HEADER_LENGTH_V3_MIN: u32 = 104;
/// Length of a version 3 header with every field that this crate knows, in bytes.
pub const HEADER_LENGTH_V3: u32 = 112;
/// The longest backing file name in bytes.
pub const BACKING_FILE_LENGTH_MAX: usize = 1023;
/// The longest backing format name in bytes.
pub const BACKING_FORMAT_LENGTH_MAX: usize = 15;
/// The largest L1 table in bytes.
pub const L1_TABLE_SIZE_MAX: u64 = 32 << 20;
/// The largest refcount table in bytes.
pub const REFCOUNT_TABLE_SIZE_MAX: u64 = 8 << 20;
/// The most snapshots that an image may have.
pub const SNAPSHOTS_MAX: u32 = 65_536;

/// An image's header, with everything else in its first cluster: extensions and the backing file's name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// The format's version.
    pub version: Version,
    /// Binary logarithm of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Encryption method; 0 is none.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table is.
    pub l1_offset: HostOffset,
    /// Where the refcount table is.
    pub refcount_table_offset: HostOffset,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table is; without meaning if the image has no snapshots.
    pub snapshots_offset: HostOffset,
    /// Incompatible features; none in version 2.
    pub incompatible: Incompatible,
    /// Compatible features; none in version 2.
    pub compatible: u64,
    /// Autoclear features; none in version 2.
    pub autoclear: u64,
    /// Binary logarithm of the width of a refcount in bits, 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// Length of the header in bytes, extensions not included; 72 in version 2.
    pub header_length: u32,
    /// Compression of compressed clusters: 0 is deflate, 1 is zstd.
    pub compression_type: u8,
    /// The header's bytes after the compression type, not interpreted here: padding and later fields.
    pub unknown_fields: Vec<u8>,
    /// Name of the backing file as in the header, which need not be UTF-8; never empty.
    pub backing_file: Option<Vec<u8>>,
    /// Format of the backing file, as in its extension; see [`Header::set_backing_format`].
    pub backing_format: Option<String>,
    /// All header extensions in their order, the backing format's included.
    pub extensions: Vec<Extension>,
    /// Damage in the area of the extensions. Extensions behind it are not in `extensions`.
    pub damaged_extensions: Option<FormatError>,
}

impl Header {
    /// The values that the layout of the image depends on.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.incompatible.contains(Incompatible::EXTENDED_L2),
            size: self.size,
        }
    }

    /// The compression method of compressed clusters, if this crate knows it.
    pub fn compression(&self) -> Option<Compression> {
        match self.compression_type {
            0 => Some(Compression::Deflate),
            1 => Some(Compression::Zstd),
            _ => None,
        }
    }

    /// The first feature, if any, because of which Strata cannot serve the image at all.
    pub fn unsupported(&self) -> Option<Unsupported> {
        if let Some(bit) = self.incompatible.unknown_bit() {
            let name = extension::incompatible_feature_name(&self.extensions, bit);
            return Some(Unsupported::IncompatibleFeature { bit, name });
        }
        if self.crypt_method != 0 {
            return Some(Unsupported::Encryption { method: self.crypt_method });
        }
        if self.compression().is_none() {
            return Some(Unsupported::Compression { compression_type: self.compression_type });
        }
        None
    }

    /// The first reason, if any, to serve the image read-only.
    pub fn write_refusal(&self) -> Option<Unsupported> {
        if self.incompatible.contains(Incompatible::CORRUPT) {
            return Some(Unsupported::Corrupt);
        }
        if let Some(source) = self.damaged_extensions {
            return Some(Unsupported::DamagedExtensions { source });
        }
        if self.has_data_file() && self.snapshots > 0 {
            return Some(Unsupported::SnapshotsWithDataFile);
        }
        (self.has_data_file() && self.size > HOST_OFFSET_LIMIT).then_some(Unsupported::DataFileTooLarge)
    }

    /// Guest data is in an external file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible.contains(Incompatible::DATA_FILE)
    }

    /// True if the external data file, read as a raw image, must always show the guest's data. With a backing file that
    /// is impossible, so the bit is ignored then.
    pub fn is_data_file_raw(&self) -> bool {
        self.has_data_file() && self.backing_file.is_none() && self.autoclear & AUTOCLEAR_RAW_DATA_FILE != 0
    }

    /// The external data file's name for display, not for opening it. The last one if there are several.
    pub fn data_file_name(&self) -> Option<&[u8]> {
        let extension = self.extensions.iter().rfind(|extension| extension.magic == extension::DATA_FILE)?;
        Some(&extension.data)
    }

    /// The number of the journal that a daemon kept of the image and has not carried out; see [`JournalNumber`].
    pub fn journal_number(&self) -> Option<JournalNumber> {
        let may_have = self.version == Version::V3 && !self.has_data_file();
        JournalNumber::of_autoclear(self.autoclear).filter(|_| may_have)
    }

    /// The autoclear features that stay set while the image is written. `bitmaps` is true if the image's bitmaps are
    /// consistent.
    pub fn autoclear_kept(&self, bitmaps: bool) -> u64 {
        let mut kept = 0;
        if bitmaps {
            kept |= AUTOCLEAR_BITMAPS;
        }
        if self.is_data_file_raw() {
            kept |= AUTOCLEAR_RAW_DATA_FILE;
        }
        self.autoclear & kept
    }

    /// Changes the backing file's format, both in the field and in the extensions.
    pub fn set_backing_format(&mut self, format: Option<&str>) {
        let format = format.filter(|format| !format.is_empty());
        let place = self.extensions.iter().position(|extension| extension.magic == extension::BACKING_FORMAT);
        self.extensions.retain(|extension| extension.magic != extension::BACKING_FORMAT);
        if let Some(format) = format {
            let extension = Extension { magic: extension::BACKING_FORMAT, data: format.as_bytes().to_vec() };
            self.extensions.insert(place.unwrap_or(0), extension);
        }
        self.backing_format = format.map(str::to_owned);
    }
}
