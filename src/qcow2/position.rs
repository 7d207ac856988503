//! Where the fields of the header are, and the patches that change one fact in a single write.
//!
//! Owns the byte positions (spec: "Header"). Each patch lies within the file's first 512 bytes, so a disk writes it
//! whole or not at all. The caller is responsible for the write order around a patch.

use crate::address::HostOffset;
use crate::feature::Incompatible;

/// The magic, 4 bytes.
pub const MAGIC: usize = 0;
/// The version, 4 bytes.
pub const VERSION: usize = 4;
/// Offset of the backing file's name, 8 bytes.
pub const BACKING_FILE_OFFSET: usize = 8;
/// Length of the backing file's name, 4 bytes.
pub const BACKING_FILE_LENGTH: usize = 16;
/// Logarithm of the cluster size, 4 bytes.
pub const CLUSTER_BITS: usize = 20;
/// Size of the disk, 8 bytes.
pub const SIZE: usize = 24;
/// Encryption method, 4 bytes.
pub const CRYPT_METHOD: usize = 32;
/// Entries of the active L1 table, 4 bytes; its offset follows.
pub const L1_ENTRIES: usize = 36;
/// Offset of the active L1 table, 8 bytes.
pub const L1_OFFSET: usize = 40;
/// Offset of the refcount table, 8 bytes; its length follows.
pub const REFCOUNT_TABLE_OFFSET: usize = 48;
/// Length of the refcount table in clusters, 4 bytes.
pub const REFCOUNT_TABLE_CLUSTERS: usize = 56;
/// Number of snapshots, 4 bytes; the table's offset follows.
pub const SNAPSHOTS: usize = 60;
/// Offset of the snapshot table, 8 bytes.
pub const SNAPSHOTS_OFFSET: usize = 64;
/// Incompatible features, 8 bytes, version 3.
pub const INCOMPATIBLE: usize = 72;
/// Compatible features, 8 bytes, version 3.
pub const COMPATIBLE: usize = 80;
/// Autoclear features, 8 bytes, version 3.
pub const AUTOCLEAR: usize = 88;
/// Logarithm of the refcount width, 4 bytes, version 3.
pub const REFCOUNT_ORDER: usize = 96;
/// Length of the header, 4 bytes, version 3.
pub const HEADER_LENGTH: usize = 100;
/// Compression type, 1 byte, version 3 if the header is longer than 104 bytes.
pub const COMPRESSION_TYPE: usize = 104;

/// Bytes to write over the header, all within its first 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Patch<const LENGTH: usize> {
    /// Offset in the file.
    pub offset: HostOffset,
    /// The bytes to write.
    pub bytes: [u8; LENGTH],
}

/// Switches to another active L1 table: entries and offset at once.
pub fn patch_l1_table(entries: u32, offset: HostOffset) -> Patch<12> {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&entries.to_be_bytes());
    bytes[4..].copy_from_slice(&offset.0.to_be_bytes());
    Patch { offset: HostOffset(L1_ENTRIES as u64), bytes }
}

/// Switches to another refcount table: offset and length in clusters at once.
pub fn patch_refcount_table(offset: HostOffset, clusters: u32) -> Patch<12> {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&offset.0.to_be_bytes());
    bytes[8..].copy_from_slice(&clusters.to_be_bytes());
    Patch { offset: HostOffset(REFCOUNT_TABLE_OFFSET as u64), bytes }
}

/// Switches to another disk: its size, and the entries and the offset of its active L1 table, at once. Not for an
/// encrypted image: the encryption method lies between these fields.
pub fn patch_disk(size: u64, l1_entries: u32, l1_offset: HostOffset) -> Patch<24> {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&size.to_be_bytes());
    bytes[12..16].copy_from_slice(&l1_entries.to_be_bytes());
    bytes[16..].copy_from_slice(&l1_offset.0.to_be_bytes());
    Patch { offset: HostOffset(SIZE as u64), bytes }
}

/// Switches to another snapshot table: number of snapshots and offset at once.
pub fn patch_snapshots(count: u32, offset: HostOffset) -> Patch<12> {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&count.to_be_bytes());
    bytes[4..].copy_from_slice(&offset.0.to_be_bytes());
    Patch { offset: HostOffset(SNAPSHOTS as u64), bytes }
}

/// The features of an image of version 3.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// A program that does not know one of these must not use the image.
    pub incompatible: Incompatible,
    /// A program may ignore these.
    pub compatible: u64,
    /// A program that writes to the image clears those that it does not know.
    pub autoclear: u64,
}

/// Changes all features at once. Version 3 only.
pub fn patch_features(features: Features) -> Patch<24> {
    let Features { incompatible, compatible, autoclear } = features;
    let mut bytes = [0; 24];
    for (place, features) in bytes.chunks_exact_mut(8).zip([incompatible.0, compatible, autoclear]) {
        place.copy_from_slice(&features.to_be_bytes());
    }
    Patch { offset: HostOffset(INCOMPATIBLE as u64), bytes }
}

/// Changes the incompatible features. Version 3 only: in version 2 these bytes belong to the extensions.
pub fn patch_incompatible(features: Incompatible) -> Patch<8> {
    Patch { offset: HostOffset(INCOMPATIBLE as u64), bytes: features.0.to_be_bytes() }
}

/// Changes the autoclear features. Version 3 only.
pub fn patch_autoclear(features: u64) -> Patch<8> {
    Patch { offset: HostOffset(AUTOCLEAR as u64), bytes: features.to_be_bytes() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_at_the_offsets_of_their_fields() {
        let l1 = patch_l1_table(0x0102_0304, HostOffset(0x10_0000));
        assert_eq!((l1.offset.0, l1.bytes), (36, [1, 2, 3, 4, 0, 0, 0, 0, 0, 0x10, 0, 0]));
        let table = patch_refcount_table(HostOffset(0x10_0000), 0x0102_0304);
        assert_eq!((table.offset.0, table.bytes), (48, [0, 0, 0, 0, 0, 0x10, 0, 0, 1, 2, 3, 4]));
        let incompatible = patch_incompatible(Incompatible::DIRTY);
        assert_eq!((incompatible.offset.0, incompatible.bytes), (72, [0, 0, 0, 0, 0, 0, 0, 1]));
        assert_eq!(patch_autoclear(2).offset.0, 88);
        let disk = patch_disk(1 << 40, 7, HostOffset(0x10_0000));
        assert_eq!((disk.offset.0, disk.bytes[2], disk.bytes[15], disk.bytes[21]), (24, 1, 7, 0x10));
        assert_eq!(disk.bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>(), 1 + 7 + 0x10);
        let snapshots = patch_snapshots(3, HostOffset(0x10_0000));
        assert_eq!((snapshots.offset.0, snapshots.bytes), (60, [0, 0, 0, 3, 0, 0, 0, 0, 0, 0x10, 0, 0]));
        let features =
            patch_features(Features { incompatible: Incompatible::DIRTY, compatible: 2, autoclear: 3 });
        assert_eq!(
            (features.offset.0, features.bytes[7], features.bytes[15], features.bytes[23]),
            (72, 1, 2, 3)
        );
    }
}
