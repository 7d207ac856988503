//! Entries of the L1 table, the L2 tables and the refcount table: raw 64-bit words to enums and back.
//!
//! Owns their bits (spec: "Cluster mapping", "Refcount table"). Decoding ignores reserved bits, which only an image
//! check tests; encoding clears them. It never tests an offset against a file's length.

use thiserror::Error;

use crate::address::{HostOffset, HostRun};
use crate::geometry::{Geometry, Version};
use crate::subcluster::{HostPlace, SubclusterSet, Subclusters};
use crate::table::{entry, set_entry};

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
/// Every host offset in an entry is below this, in bytes.
pub const HOST_OFFSET_LIMIT: u64 = 1 << 56;
/// Unit of a compressed cluster's length, in bytes.
pub const COMPRESSED_SECTOR_SIZE: u64 = 512;

/// Why an entry cannot be decoded. `raw` is the entry as it is in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum EntryError {
    /// The offset is not the start of a cluster.
    #[error("entry {raw:#018x}: its offset is not a multiple of the cluster size")]
    Unaligned {
        /// The entry.
        raw: u64,
    },
    /// Version 2 has no zero clusters.
    #[error("entry {raw:#018x}: it has the zero flag, which version 2 does not have")]
    ZeroFlagInV2 {
        /// The entry.
        raw: u64,
    },
    /// The COPIED flag is set, but the offset is 0, the header's. Only an external data file may have data there. A
    /// check reports it; every other reader takes the cluster for unallocated.
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
    /// A subcluster cannot both hold data and read as zeros.
    #[error("entry {raw:#018x}: its bitmap {bitmap:#018x} has subclusters that are both allocated and zero")]
    SubclusterTwice {
        /// The entry.
        raw: u64,
        /// Its bitmap of subclusters.
        bitmap: u64,
    },
    /// A compressed cluster in an image with an external data file, where data cannot be compressed.
    #[error("entry {raw:#018x}: it is compressed, but an external data file has no compressed clusters")]
    CompressedInDataFile {
        /// The entry.
        raw: u64,
    },
    /// Data in an external data file, but not at the guest's own offset.
    #[error(
        "entry {raw:#018x}: an external data file has this cluster at the guest's own offset, {expected}"
    )]
    DataFileOffset {
        /// The entry.
        raw: u64,
        /// The only valid offset.
        expected: HostOffset,
    },
    /// A subcluster holds data, but there is no host cluster for it.
    #[error(
        "entry {raw:#018x}: its bitmap {bitmap:#018x} has allocated subclusters, but there is no host cluster"
    )]
    SubclusterNowhere {
        /// The entry.
        raw: u64,
        /// Its bitmap of subclusters.
        bitmap: u64,
    },
}

/// An entry of the L1 table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L1Entry {
    /// No L2 table: every cluster below is unallocated.
    Unallocated,
    /// There is an L2 table.
    Table {
        /// Where the L2 table is.
        offset: HostOffset,
        /// True if its refcount is one.
        copied: bool,
    },
}

impl L1Entry {
    /// Decodes a raw entry.
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
                assert!(
                    offset.0 != 0 && offset.0 & !OFFSET_MASK == 0,
                    "not a valid L2 table offset: {offset}"
                );
                offset.0 | copied_flag(copied)
            }
        }
    }
}

/// An L2 entry as it is in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawL2Entry {
    /// The descriptor of the cluster; without extended L2 this is the whole entry.
    pub descriptor: u64,
    /// With extended L2: which subclusters are allocated (bits 0 to 31) and which read as zeros (bits 32 to 63). It has
    /// no meaning for a compressed cluster.
    pub bitmap: u64,
}

impl From<u64> for RawL2Entry {
    /// An entry without extended L2.
    fn from(descriptor: u64) -> Self {
        RawL2Entry { descriptor, bitmap: 0 }
    }
}

impl RawL2Entry {
    /// The entry at `index` of a table, or of a part of one.
    ///
    /// # Panics
    /// If there is no such entry: a programmer error.
    pub fn load(table: &[u8], index: usize, geometry: &Geometry) -> RawL2Entry {
        if geometry.extended_l2 {
            RawL2Entry { descriptor: entry(table, 2 * index), bitmap: entry(table, 2 * index + 1) }
        } else {
            entry(table, index).into()
        }
    }

    /// Stores the entry at `index` of a table, or of a part of one.
    ///
    /// # Panics
    /// As for [`RawL2Entry::load`].
    pub fn store(self, table: &mut [u8], index: usize, geometry: &Geometry) {
        if geometry.extended_l2 {
            set_entry(table, 2 * index, self.descriptor);
            set_entry(table, 2 * index + 1, self.bitmap);
        } else {
            set_entry(table, index, self.descriptor);
        }
    }
}

/// An L2 entry: what one guest cluster holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L2Entry {
    /// Not in this image: reads give the backing file's data, or zeros without a backing file.
    Unallocated,
    /// Reads as zeros; no host cluster.
    Zero,
    /// Reads as zeros; has a host cluster, whose contents are ignored.
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
        /// The first byte of the data; it need not be aligned.
        offset: HostOffset,
        /// How many 512-byte sectors the data touches, the sector of its first byte included. At most two clusters.
        sectors: u64,
    },
    /// With extended L2 only: subclusters of more than one kind.
    Subclusters(Subclusters),
}

impl L2Entry {
    /// Decodes a raw entry. The compressed bit is tested before the zero bit.
    ///
    /// # Errors
    /// - The offset is not the start of a cluster, or is too large.
    /// - The zero flag is set in version 2.
    /// - The subcluster bitmap contradicts itself or the offset.
    pub fn decode(raw: impl Into<RawL2Entry>, geometry: &Geometry) -> Result<L2Entry, EntryError> {
        let entry = raw.into();
        let RawL2Entry { descriptor: raw, .. } = entry;
        if raw & COMPRESSED != 0 {
            return decode_compressed(raw, geometry);
        }
        if geometry.extended_l2 {
            return decode_subclusters(entry, geometry);
        }
        let offset = HostOffset(raw & OFFSET_MASK);
        let copied = raw & COPIED != 0;
        let zero = raw & ZERO != 0;
        if zero && geometry.version == Version::V2 {
            return Err(EntryError::ZeroFlagInV2 { raw });
        }
        if !geometry.is_aligned(offset.0) {
            return Err(EntryError::Unaligned { raw });
        }
        match (zero, offset.0) {
            (true, 0) => Ok(L2Entry::Zero),
            (true, _) => Ok(L2Entry::ZeroAllocated { offset, copied }),
            // Unallocated whatever the flags, as in QEMU.
            (false, 0) => Ok(L2Entry::Unallocated),
            (false, _) => Ok(L2Entry::Data { offset, copied }),
        }
    }

    /// The host cluster of a standard cluster, even if the cluster reads as zeros.
    pub const fn host(self) -> Option<HostPlace> {
        match self {
            L2Entry::ZeroAllocated { offset, copied } | L2Entry::Data { offset, copied } => {
                Some(HostPlace { offset, copied })
            }
            L2Entry::Subclusters(subclusters) => subclusters.host,
            L2Entry::Unallocated | L2Entry::Zero | L2Entry::Compressed { .. } => None,
        }
    }

    /// The host clusters that this entry references. Compressed data references every cluster that it touches, and may
    /// share clusters with other compressed data.
    pub fn host_clusters(self, geometry: &Geometry) -> Option<HostRun> {
        match self {
            L2Entry::Compressed { offset, sectors } => {
                let first = geometry.host_cluster(offset);
                let past = geometry.clusters_for(offset.0 + compressed_length(offset, sectors));
                Some(HostRun::new(first, past - first.0))
            }
            _ => self.host().map(|host| HostRun::one(geometry.host_cluster(host.offset))),
        }
    }

    /// The raw entry.
    ///
    /// # Panics
    /// On an entry that the format cannot express, a programmer error:
    /// - an offset that is 0, not the start of a cluster or too large;
    /// - a zero cluster in version 2;
    /// - subclusters without extended L2, or contradictory ones;
    /// - a compressed length out of range.
    pub fn encode(self, geometry: &Geometry) -> RawL2Entry {
        if geometry.extended_l2
            && let Some(subclusters) = Subclusters::of(self)
        {
            return encode_subclusters(subclusters, geometry);
        }
        self.encode_descriptor(geometry).into()
    }

    fn encode_descriptor(self, geometry: &Geometry) -> u64 {
        match self {
            L2Entry::Unallocated => 0,
            L2Entry::Subclusters(_) => panic!("subclusters need extended L2"),
            L2Entry::Zero => zero_flag(geometry),
            L2Entry::ZeroAllocated { offset, copied } => {
                cluster_field(offset, geometry) | copied_flag(copied) | zero_flag(geometry)
            }
            L2Entry::Data { offset, copied } => cluster_field(offset, geometry) | copied_flag(copied),
            L2Entry::Compressed { offset, sectors } => {
                let (shift, length_mask) = compressed_fields(geometry);
                assert!(
                    offset.0 < HOST_OFFSET_LIMIT.min(1 << shift),
                    "not a valid offset of compressed data: {offset}"
                );
                assert!((1..=length_mask + 1).contains(&sectors), "compressed data of {sectors} sectors");
                COMPRESSED | (sectors - 1) << shift | offset.0
            }
        }
    }
}

impl Subclusters {
    /// The L2 entry of this cluster: an ordinary one if all 32 subclusters are of one kind.
    pub fn entry(self) -> L2Entry {
        match self.host {
            Some(HostPlace { offset, copied }) if self.allocated == SubclusterSet::ALL => {
                L2Entry::Data { offset, copied }
            }
            Some(HostPlace { offset, copied }) if self.zero == SubclusterSet::ALL => {
                L2Entry::ZeroAllocated { offset, copied }
            }
            None if self.zero == SubclusterSet::ALL => L2Entry::Zero,
            None if self.zero.is_empty() => L2Entry::Unallocated,
            _ => L2Entry::Subclusters(self),
        }
    }

    /// The subclusters of an entry; `None` for a compressed cluster.
    pub fn of(entry: L2Entry) -> Option<Subclusters> {
        let (none, all) = (SubclusterSet::EMPTY, SubclusterSet::ALL);
        let (allocated, zero) = match entry {
            L2Entry::Unallocated => (none, none),
            L2Entry::Zero | L2Entry::ZeroAllocated { .. } => (none, all),
            L2Entry::Data { .. } => (all, none),
            L2Entry::Subclusters(subclusters) => return Some(subclusters),
            L2Entry::Compressed { .. } => return None,
        };
        Some(Subclusters { host: entry.host(), allocated, zero })
    }
}

/// Decodes an entry of the refcount table to the refblock's offset. `None` means that there is no refblock and all its
/// refcounts are 0.
///
/// # Errors
/// If the offset is not the start of a cluster, or is past the largest offset of a file (2^63 bytes).
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
    assert!(offset.0 != 0 && geometry.is_aligned(offset.0), "not a valid refblock offset: {offset}");
    offset.0
}

/// The length in bytes of compressed data, from its first byte to the end of its last sector.
pub fn compressed_length(offset: HostOffset, sectors: u64) -> u64 {
    sectors * COMPRESSED_SECTOR_SIZE - offset.0 % COMPRESSED_SECTOR_SIZE
}

fn decode_compressed(raw: u64, geometry: &Geometry) -> Result<L2Entry, EntryError> {
    let (shift, length_mask) = compressed_fields(geometry);
    let offset = raw & ((1 << shift) - 1);
    // With small clusters the field is wider than an offset may be; the upper bits must be zero.
    if offset >= HOST_OFFSET_LIMIT {
        return Err(EntryError::OffsetTooLarge { raw });
    }
    Ok(L2Entry::Compressed { offset: HostOffset(offset), sectors: ((raw >> shift) & length_mask) + 1 })
}

/// Decodes an extended entry that is not compressed. Bit 0 of the descriptor is reserved: zeros are in the bitmap.
fn decode_subclusters(entry: RawL2Entry, geometry: &Geometry) -> Result<L2Entry, EntryError> {
    let RawL2Entry { descriptor: raw, bitmap } = entry;
    let (offset, copied) = (HostOffset(raw & OFFSET_MASK), raw & COPIED != 0);
    if !geometry.is_aligned(offset.0) {
        return Err(EntryError::Unaligned { raw });
    }
    let (allocated, zero) = subclusters_of(entry)?;
    let host = (offset.0 != 0).then_some(HostPlace { offset, copied });
    if host.is_none() && !allocated.is_empty() {
        return Err(EntryError::SubclusterNowhere { raw, bitmap });
    }
    Ok(Subclusters { host, allocated, zero }.entry())
}

/// Splits an entry's bitmap into the allocated and the zero subclusters.
pub(crate) fn subclusters_of(entry: RawL2Entry) -> Result<(SubclusterSet, SubclusterSet), EntryError> {
    let RawL2Entry { descriptor: raw, bitmap } = entry;
    let (allocated, zero) = (SubclusterSet(bitmap as u32), SubclusterSet((bitmap >> 32) as u32));
    if !allocated.common(zero).is_empty() {
        return Err(EntryError::SubclusterTwice { raw, bitmap });
    }
    Ok((allocated, zero))
}

fn encode_subclusters(subclusters: Subclusters, geometry: &Geometry) -> RawL2Entry {
    let Subclusters { host, allocated, zero } = subclusters;
    assert!(allocated.common(zero).is_empty(), "a subcluster is both data and zero: {subclusters:?}");
    assert!(host.is_some() || allocated.is_empty(), "data without a host cluster: {subclusters:?}");
    let descriptor = host.map_or(0, |host| cluster_field(host.offset, geometry) | copied_flag(host.copied));
    RawL2Entry { descriptor, bitmap: subclusters.bitmap() }
}

/// The first bit of a compressed entry's length field, and the field's mask after the shift (spec: "Compressed Clusters
/// Descriptor").
fn compressed_fields(geometry: &Geometry) -> (u32, u64) {
    let length_bits = geometry.cluster_bits - 8;
    (62 - length_bits, (1 << length_bits) - 1)
}

fn cluster_field(offset: HostOffset, geometry: &Geometry) -> u64 {
    let fits = offset.0 != 0 && offset.0 < HOST_OFFSET_LIMIT && geometry.is_aligned(offset.0);
    assert!(fits, "not a valid data cluster offset: {offset}");
    offset.0
}

fn zero_flag(geometry: &Geometry) -> u64 {
    assert!(geometry.version == Version::V3, "the zero flag needs version 3");
    ZERO
}

const fn copied_flag(copied: bool) -> u64 {
    if copied { COPIED } else { 0 }
}

#[cfg(test)]
mod tests;
