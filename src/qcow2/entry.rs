//! Entries of the L1 table, the L2 tables and the refcount table: raw 64-bit words to enums and back.
//!
//! Owns their bits (spec: "Cluster mapping", "Refcount table"). Reserved bits are ignored when decoding, as only an
//! image check looks at them, and are zero when encoding. It never looks at a file's length.

use thiserror::Error;

use crate::address::HostOffset;
use crate::geometry::{Geometry, Version};

/// Bit 63 of an L1 or L2 entry: the cluster's refcount is exactly one, so it may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry, since version 3 and without extended L2: the cluster reads as zeros.
pub const ZERO: u64 = 1;
/// Bits 9 to 55 of an L1 or L2 entry: the host offset in bytes.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 9 to 63 of an entry of the refcount table: the refblock's host offset in bytes.
pub const REFBLOCK_OFFSET_MASK: u64 = !0x1ff;
/// Host offsets that an entry names are below this, in bytes.
pub const HOST_OFFSET_LIMIT: u64 = 1 << 56;
/// Unit of a compressed cluster's length, in bytes.
pub const COMPRESSED_SECTOR_SIZE: u64 = 512;

/// Why an entry cannot be understood. `raw` is the entry as it is in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum EntryError {
    /// The offset is not the start of a cluster.
    #[error("entry {raw:#018x}: its offset is not a multiple of the cluster size")]
    Unaligned {
        /// The entry.
        raw: u64,
    },
    /// Version 2 has no zero clusters.
    #[error("entry {raw:#018x}: it has the zero flag, which version 2 does not know")]
    ZeroFlagInV2 {
        /// The entry.
        raw: u64,
    },
    /// Flagged as in use, but at the header's place. Only an external data file may have data there.
    #[error("entry {raw:#018x}: it claims data at offset 0, where the header is")]
    DataAtOffsetZero {
        /// The entry.
        raw: u64,
    },
    /// The offset is past what the format or a file can address.
    #[error("entry {raw:#018x}: its offset is past the largest that an image can have")]
    OffsetTooLarge {
        /// The entry.
        raw: u64,
    },
}

/// An entry of the L1 table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L1Entry {
    /// No L2 table: every cluster below is unallocated.
    Unallocated,
    /// There is an L2 table.
    Table {
        /// Where it is.
        offset: HostOffset,
        /// True if its refcount is one.
        copied: bool,
    },
}

impl L1Entry {
    /// Understands a raw entry.
    ///
    /// # Errors
    /// If the offset is not the start of a cluster.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<L1Entry, EntryError> {
        let offset = raw & OFFSET_MASK;
        if offset == 0 {
            return Ok(L1Entry::Unallocated);
        }
        if !geometry.is_aligned(offset) {
            return Err(EntryError::Unaligned { raw });
        }
        Ok(L1Entry::Table { offset: HostOffset(offset), copied: raw & COPIED != 0 })
    }

    /// The raw entry.
    ///
    /// # Panics
    /// If the offset is 0, no multiple of 512 or not below 2^56: a programmer error.
    pub fn encode(self) -> u64 {
        match self {
            L1Entry::Unallocated => 0,
            L1Entry::Table { offset, copied } => {
                assert!(offset.0 != 0 && offset.0 & !OFFSET_MASK == 0, "no place for an L2 table: {offset}");
                offset.0 | copied_flag(copied)
            }
        }
    }
}

/// An L2 entry: what one guest cluster holds. With extended L2 this is the first of the entry's two words, and which
/// subclusters are allocated or zero is in the second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L2Entry {
    /// Nothing here: the backing file's data, or zeros if there is none.
    Unallocated,
    /// Reads as zeros; no host cluster.
    Zero,
    /// Reads as zeros, but keeps a host cluster whose contents do not matter.
    ZeroAllocated {
        /// Where the host cluster is.
        offset: HostOffset,
        /// True if its refcount is one.
        copied: bool,
    },
    /// Plain data.
    Data {
        /// Where the host cluster is.
        offset: HostOffset,
        /// True if its refcount is one.
        copied: bool,
    },
    /// Compressed data.
    Compressed {
        /// The first byte of the data, aligned to nothing.
        offset: HostOffset,
        /// How many 512-byte sectors the data touches, the one of its first byte included. It can claim two clusters.
        sectors: u64,
    },
}

impl L2Entry {
    /// Understands a raw entry. The compressed bit is looked at before the zero bit.
    ///
    /// # Errors
    /// If the offset is not the start of a cluster or too large, the zero flag is set in version 2, or it is flagged
    /// as data at offset 0.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<L2Entry, EntryError> {
        if raw & COMPRESSED != 0 {
            return decode_compressed(raw, geometry);
        }
        let offset = HostOffset(raw & OFFSET_MASK);
        let copied = raw & COPIED != 0;
        // With extended L2 entries bit 0 is reserved: the second word says what is zero.
        let zero = raw & ZERO != 0 && !geometry.extended_l2;
        if zero && geometry.version == Version::V2 {
            return Err(EntryError::ZeroFlagInV2 { raw });
        }
        if !geometry.is_aligned(offset.0) {
            return Err(EntryError::Unaligned { raw });
        }
        match (zero, offset.0) {
            (true, 0) => Ok(L2Entry::Zero),
            (true, _) => Ok(L2Entry::ZeroAllocated { offset, copied }),
            // To fall through to the backing file here would show other data than the entry's writer meant.
            (false, 0) if copied => Err(EntryError::DataAtOffsetZero { raw }),
            (false, 0) => Ok(L2Entry::Unallocated),
            (false, _) => Ok(L2Entry::Data { offset, copied }),
        }
    }

    /// The raw entry.
    ///
    /// # Panics
    /// On what the format cannot say, a programmer error: an offset that is 0, not the start of a cluster or too large,
    /// a zero cluster in version 2 or with extended L2, a compressed length out of range.
    pub fn encode(self, geometry: &Geometry) -> u64 {
        match self {
            L2Entry::Unallocated => 0,
            L2Entry::Zero => zero_flag(geometry),
            L2Entry::ZeroAllocated { offset, copied } => {
                cluster_field(offset, geometry) | copied_flag(copied) | zero_flag(geometry)
            }
            L2Entry::Data { offset, copied } => cluster_field(offset, geometry) | copied_flag(copied),
            L2Entry::Compressed { offset, sectors } => {
                let (shift, length_mask) = compressed_fields(geometry);
                assert!(
                    offset.0 < HOST_OFFSET_LIMIT.min(1 << shift),
                    "no place for compressed data: {offset}"
                );
                assert!((1..=length_mask + 1).contains(&sectors), "compressed data of {sectors} sectors");
                COMPRESSED | (sectors - 1) << shift | offset.0
            }
        }
    }
}

/// Where an entry of the refcount table says that its refblock is; nothing if there is none, which means that all its
/// refcounts are 0.
///
/// # Errors
/// If the offset is not the start of a cluster, or past what a file can have (2^63 bytes).
pub fn refblock_offset(raw: u64, geometry: &Geometry) -> Result<Option<HostOffset>, EntryError> {
    let offset = raw & REFBLOCK_OFFSET_MASK;
    if offset == 0 {
        return Ok(None);
    }
    if !geometry.is_aligned(offset) {
        return Err(EntryError::Unaligned { raw });
    }
    if offset > i64::MAX as u64 - geometry.cluster_size() {
        return Err(EntryError::OffsetTooLarge { raw });
    }
    Ok(Some(HostOffset(offset)))
}

/// The raw entry of the refcount table for a refblock.
///
/// # Panics
/// If the offset is 0 or not the start of a cluster: a programmer error.
pub fn encode_refblock_offset(offset: HostOffset, geometry: &Geometry) -> u64 {
    assert!(offset.0 != 0 && geometry.is_aligned(offset.0), "no place for a refblock: {offset}");
    offset.0
}

/// The bytes of the file that compressed data may touch, from its first byte to the end of its last sector.
pub fn compressed_length(offset: HostOffset, sectors: u64) -> u64 {
    sectors * COMPRESSED_SECTOR_SIZE - offset.0 % COMPRESSED_SECTOR_SIZE
}

fn decode_compressed(raw: u64, geometry: &Geometry) -> Result<L2Entry, EntryError> {
    let (shift, length_mask) = compressed_fields(geometry);
    let offset = raw & ((1 << shift) - 1);
    // In small clusters the field is wider than an offset may be, and the upper bits must be zero.
    if offset >= HOST_OFFSET_LIMIT {
        return Err(EntryError::OffsetTooLarge { raw });
    }
    Ok(L2Entry::Compressed { offset: HostOffset(offset), sectors: ((raw >> shift) & length_mask) + 1 })
}

/// Where the length field of a compressed entry begins, in bits, and its mask once shifted down (spec: "Compressed
/// Clusters Descriptor").
fn compressed_fields(geometry: &Geometry) -> (u32, u64) {
    let length_bits = geometry.cluster_bits - 8;
    (62 - length_bits, (1 << length_bits) - 1)
}

fn cluster_field(offset: HostOffset, geometry: &Geometry) -> u64 {
    let fits = offset.0 != 0 && offset.0 < HOST_OFFSET_LIMIT && geometry.is_aligned(offset.0);
    assert!(fits, "no place for a data cluster: {offset}");
    offset.0
}

fn zero_flag(geometry: &Geometry) -> u64 {
    let known = geometry.version == Version::V3 && !geometry.extended_l2;
    assert!(known, "the zero flag needs version 3 without extended L2");
    ZERO
}

const fn copied_flag(copied: bool) -> u64 {
    if copied { COPIED } else { 0 }
}
