//! A disk as a byte array: the contents that a guest may rely on, for comparison with a real disk.
//!
//! Owns the effect of every request on contents, and makes random sequences of requests. It models the promises of
//! Strata, which qemu-storage-daemon also makes. A discard makes whole clusters read as zero and changes nothing else.
//! In a version 2 image with a backing file it does nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use proptest::prelude::*;

use crate::client::SECTOR;

/// Bytes of a piece of the sparse array.
const PIECE: u64 = 4096;

/// An operation on a disk. Offsets and lengths are in bytes, in whole sectors, and inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read, and compare.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Write the [`contents`] of the seed.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Distinguishes the contents of different writes.
        seed: u32,
    },
    /// Discard.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Write zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Whether the space may be given back.
        unmap: bool,
    },
    /// Flush.
    Flush,
}

/// Seeds from here on write zeros: below [`ZERO_SEEDS`] in some stretches, from there on everywhere.
pub const GAPPY_SEEDS: u32 = 0xc000_0000;
/// See [`GAPPY_SEEDS`].
pub const ZERO_SEEDS: u32 = 0xe000_0000;

/// True if a write has zeros in a sector.
fn is_gap(seed: u32, sector: u64) -> bool {
    match seed {
        ..GAPPY_SEEDS => false,
        ZERO_SEEDS.. => true,
        // Stretches of 4 KiB to 64 KiB.
        _ => {
            ((sector >> (3 + seed % 5)) ^ u64::from(seed >> 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 0
        }
    }
}

/// The bytes that write number `seed` writes from `offset` on. Every sector of every write is different, records its
/// location, and is not zero, except for seeds from [`GAPPY_SEEDS`] on.
pub fn contents(seed: u32, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length).expect("a request's length fits in memory")];
    for (index, sector) in bytes.chunks_mut(SECTOR as usize).enumerate() {
        let number = offset / SECTOR + index as u64;
        if is_gap(seed, number) {
            continue;
        }
        let mut state = (number ^ u64::from(seed).rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for word in sector.chunks_mut(8) {
            // xorshift64*: a nonzero state never becomes 0.
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
            word.copy_from_slice(&random[..word.len()]);
        }
    }
    bytes
}

/// The effect of a discard on the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardRule {
    /// Whole clusters read as zero afterwards; a shorter last cluster of the disk counts as whole.
    ZeroesClusters,
    /// None: version 2 with a backing file cannot hide the backing data.
    Nothing,
}

/// The sparse contents of a disk.
#[derive(Clone, Debug)]
pub struct ByteModel {
    size: u64,
    cluster_size: u64,
    discard: DiscardRule,
    /// Pieces that are not all zero, by number.
    pieces: BTreeMap<u64, Box<[u8]>>,
}

/// A difference between a disk and its model.
#[derive(Clone, PartialEq, Eq)]
pub struct Difference {
    /// The first run of differing bytes. It ends where at least 16 bytes agree.
    pub range: Range<u64>,
    /// Up to 16 bytes of the model from there.
    pub expected: Vec<u8>,
    /// Up to 16 bytes of the disk from there.
    pub found: Vec<u8>,
    /// Total number of differing sectors.
    pub sectors: u64,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.range;
        write!(
            f,
            "bytes {start:#x} to {end:#x} differ (sector {} and {} in all): expected {:02x?}, found {:02x?}",
            start / SECTOR,
            self.sectors,
            self.expected,
            self.found
        )
    }
}

impl fmt::Debug for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Difference {}

impl ByteModel {
    /// A disk of zeroes. Size and cluster size are in bytes.
    ///
    /// # Panics
    /// If the cluster size is not a power of two of at least a sector.
    pub fn new(size: u64, cluster_size: u64, discard: DiscardRule) -> Self {
        assert!(
            cluster_size.is_power_of_two() && cluster_size >= SECTOR,
            "clusters are powers of two from 512 on"
        );
        Self { size, cluster_size, discard, pieces: BTreeMap::new() }
    }

    /// A disk that begins with these contents. Past their end, up to `size`, it is zero.
    pub fn with_contents(bytes: &[u8], size: u64, cluster_size: u64, discard: DiscardRule) -> Self {
        let mut model = Self::new(size, cluster_size, discard);
        let length = bytes.len().min(usize::try_from(size).unwrap_or(usize::MAX));
        model.write(0, &bytes[..length]);
        model
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Applies an operation to the model.
    ///
    /// # Panics
    /// If it reaches past the end.
    pub fn apply(&mut self, operation: &Operation) {
        match *operation {
            Operation::Read { .. } | Operation::Flush => {}
            Operation::Write { offset, length, seed } => self.write(offset, &contents(seed, offset, length)),
            Operation::WriteZeroes { offset, length, .. } => self.zero(offset, length),
            Operation::Discard { offset, length } => self.discard(offset, length),
        }
    }

    /// Writes bytes.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.assert_inside(offset, bytes.len() as u64);
        let mut at = offset;
        let mut left = bytes;
        while !left.is_empty() {
            let start = (at % PIECE) as usize;
            let (part, rest) = left.split_at(left.len().min(PIECE as usize - start));
            // Zeroes need no piece.
            if part.iter().any(|byte| *byte != 0) || self.pieces.contains_key(&(at / PIECE)) {
                let piece = self.pieces.entry(at / PIECE).or_insert_with(|| vec![0; PIECE as usize].into());
                piece[start..start + part.len()].copy_from_slice(part);
            }
            at += part.len() as u64;
            left = rest;
        }
    }

    /// Makes a range zero.
    ///
    /// # Panics
    /// If it reaches past the end.
    pub fn zero(&mut self, offset: u64, length: u64) {
        self.assert_inside(offset, length);
        let end = offset + length;
        let (first, last) = (offset / PIECE, end.div_ceil(PIECE));
        let touched: Vec<u64> =
            self.pieces.range(first..last.max(first)).map(|(number, _)| *number).collect();
        for number in touched {
            let start = offset.max(number * PIECE) - number * PIECE;
            let stop = end.min((number + 1) * PIECE) - number * PIECE;
            if stop - start == PIECE {
                self.pieces.remove(&number);
            } else if let Some(piece) = self.pieces.get_mut(&number) {
                piece[start as usize..stop as usize].fill(0);
            }
        }
    }

    /// Discards a range: see [`DiscardRule`].
    ///
    /// # Panics
    /// If it reaches past the end.
    pub fn discard(&mut self, offset: u64, length: u64) {
        self.assert_inside(offset, length);
        if self.discard == DiscardRule::Nothing {
            return;
        }
        let end = offset + length;
        let first = offset.next_multiple_of(self.cluster_size);
        let last = if end == self.size { end } else { end - end % self.cluster_size };
        if first < last {
            self.zero(first, last - first);
        }
    }

    /// The bytes of a range.
    ///
    /// # Panics
    /// If it reaches past the end.
    pub fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        self.assert_inside(offset, length);
        let mut bytes = vec![0; usize::try_from(length).expect("a request's length fits in memory")];
        let end = offset + length;
        for (number, piece) in self.pieces.range(offset / PIECE..end.div_ceil(PIECE).max(offset / PIECE)) {
            let from = offset.max(number * PIECE);
            let to = end.min((number + 1) * PIECE);
            let part = &piece[(from - number * PIECE) as usize..(to - number * PIECE) as usize];
            bytes[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
        }
        bytes
    }

    /// Compares the bytes that a disk returned from `offset` on with the model.
    ///
    /// # Errors
    /// The first range that differs.
    ///
    /// # Panics
    /// If the bytes reach past the end.
    pub fn compare(&self, offset: u64, found: &[u8]) -> Result<(), Box<Difference>> {
        let expected = self.read(offset, found.len() as u64);
        if expected == found {
            return Ok(());
        }
        let differs = |index: &usize| expected[*index] != found[*index];
        let first = (0..found.len()).find(differs).expect("the bytes are not equal");
        // Random bytes sometimes agree by chance: a run continues across fewer than 16 equal bytes.
        let mut last = first;
        for index in (first..found.len()).filter(differs) {
            if index - last > 16 {
                break;
            }
            last = index;
        }
        let shown = first..found.len().min(first + 16);
        let sectors = expected.chunks(SECTOR as usize).zip(found.chunks(SECTOR as usize));
        Err(Box::new(Difference {
            range: offset + first as u64..offset + last as u64 + 1,
            expected: expected[shown.clone()].to_vec(),
            found: found[shown].to_vec(),
            sectors: sectors.filter(|(expected, found)| expected != found).count() as u64,
        }))
    }

    /// Compares a whole disk, including its length.
    ///
    /// # Errors
    /// The first range that differs, or the range that only one of the two has.
    pub fn compare_all(&self, found: &[u8]) -> Result<(), Box<Difference>> {
        let length = (found.len() as u64).min(self.size);
        self.compare(0, &found[..length as usize])?;
        let longer = (found.len() as u64).max(self.size);
        if length == longer {
            return Ok(());
        }
        let sectors = (longer - length).div_ceil(SECTOR);
        Err(Box::new(Difference { range: length..longer, expected: Vec::new(), found: Vec::new(), sectors }))
    }

    fn assert_inside(&self, offset: u64, length: u64) {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.size);
        assert!(inside, "{offset:#x}+{length:#x} is outside a disk of {:#x} bytes", self.size);
    }
}

/// The geometry of the disk for which operations are made, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Size of the disk, in whole sectors.
    pub size: u64,
    /// Size of a cluster.
    pub cluster_size: u64,
    /// The longest read or write. Discards and zeroes may cover this or four clusters, whichever is more.
    pub transfer_max: u64,
}

/// A range of sectors inside the disk. Most often it is at or near a cluster's border, and between one sector and four
/// clusters long. It shrinks to the first sector.
pub fn ranges(geometry: Geometry, length_max: u64) -> impl Strategy<Value = (u64, u64)> + Clone {
    let Geometry { size, cluster_size, .. } = geometry;
    let per_cluster = cluster_size / SECTOR;
    let sectors = size / SECTOR;
    let clusters = size.div_ceil(cluster_size);
    let edge = prop_oneof![
        4 => Just(0),
        2 => Just(per_cluster - 1),
        1 => Just(1 % per_cluster),
        3 => 0..per_cluster,
    ];
    let length = prop_oneof![
        3 => 1..=8_u64,
        3 => 1..=per_cluster,
        3 => (1..=4_u64).prop_map(move |count| count * per_cluster),
        2 => 1..=4 * per_cluster,
    ];
    (0..clusters, edge, length).prop_map(move |(cluster, edge, length)| {
        let first = (cluster * per_cluster + edge).min(sectors - 1);
        let length = length.min(sectors - first).min((length_max / SECTOR).max(1));
        (first * SECTOR, length * SECTOR)
    })
}

/// One random operation.
///
/// # Panics
/// If the disk does not consist of whole sectors.
pub fn operations(geometry: Geometry) -> impl Strategy<Value = Operation> + Clone {
    assert!(geometry.size >= SECTOR && geometry.size.is_multiple_of(SECTOR), "a disk has whole sectors");
    let moved = ranges(geometry, geometry.transfer_max);
    let named = ranges(geometry, geometry.transfer_max.max(4 * geometry.cluster_size));
    // The simplest kinds come first, because shrinking prefers them.
    prop_oneof![
        1 => Just(Operation::Flush),
        3 => moved.clone().prop_map(|(offset, length)| Operation::Read { offset, length }),
        6 => (moved, 0..u32::MAX)
            .prop_map(|((offset, length), seed)| Operation::Write { offset, length, seed }),
        2 => named.clone().prop_map(|(offset, length)| Operation::Discard { offset, length }),
        2 => (named, any::<bool>())
            .prop_map(|((offset, length), unmap)| Operation::WriteZeroes { offset, length, unmap }),
    ]
}

/// A sequence of `1..=count_max` operations. It shrinks by omitting operations first.
pub fn sequences(geometry: Geometry, count_max: usize) -> impl Strategy<Value = Vec<Operation>> {
    proptest::collection::vec(operations(geometry), 1..=count_max)
}

/// As [`sequences`], for a disk with granules of `granule_size` bytes that can be allocated separately. Some operations
/// are aimed at clusters, the others at granules.
pub fn sequences_of_parts(
    geometry: Geometry,
    granule_size: u64,
    count_max: usize,
) -> impl Strategy<Value = Vec<Operation>> {
    let parts = Geometry { cluster_size: granule_size, ..geometry };
    let either = prop_oneof![operations(geometry), operations(parts), near(geometry, granule_size)];
    proptest::collection::vec(either, 1..=count_max)
}

/// Operations on up to 40 consecutive whole granules, from any granule on.
fn near(geometry: Geometry, granule_size: u64) -> impl Strategy<Value = Operation> + Clone {
    let Geometry { size, transfer_max, .. } = geometry;
    let parts = size / granule_size;
    (0..parts.max(1), 1..=40_u64, 0..6_u8, 0..u32::MAX).prop_map(move |(first, count, kind, seed)| {
        let offset = first * granule_size;
        let length = (count * granule_size).min(size - offset);
        match kind {
            0 => Operation::Discard { offset, length },
            1 | 2 => Operation::WriteZeroes { offset, length, unmap: kind == 1 },
            _ => Operation::Write { offset, length: length.min(transfer_max), seed },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { size: 37 * 4096 + 512, cluster_size: 4096, transfer_max: 16384 };

    proptest! {
        #[test]
        fn the_sparse_model_is_a_byte_array(sequence in sequences(GEOMETRY, 40)) {
            let mut model = ByteModel::new(GEOMETRY.size, GEOMETRY.cluster_size, DiscardRule::ZeroesClusters);
            let mut plain = vec![0u8; GEOMETRY.size as usize];
            for operation in &sequence {
                model.apply(operation);
                match *operation {
                    Operation::Write { offset, length, seed } => {
                        plain[offset as usize..(offset + length) as usize]
                            .copy_from_slice(&contents(seed, offset, length));
                    }
                    Operation::WriteZeroes { offset, length, .. } => {
                        plain[offset as usize..(offset + length) as usize].fill(0);
                    }
                    Operation::Discard { offset, length } => {
                        for (index, cluster) in plain.chunks_mut(4096).enumerate() {
                            let start = index as u64 * 4096;
                            if start >= offset && start + cluster.len() as u64 <= offset + length {
                                cluster.fill(0);
                            }
                        }
                    }
                    Operation::Read { .. } | Operation::Flush => {}
                }
                prop_assert!(model.compare_all(&plain).is_ok());
            }
        }

        #[test]
        fn operations_stay_within_the_disk(sequence in sequences(GEOMETRY, 40)) {
            for operation in &sequence {
                if let Operation::Read { offset, length }
                | Operation::Write { offset, length, .. }
                | Operation::Discard { offset, length }
                | Operation::WriteZeroes { offset, length, .. } = *operation
                {
                    prop_assert!(offset % SECTOR == 0 && length % SECTOR == 0 && length > 0);
                    prop_assert!(offset + length <= GEOMETRY.size);
                }
            }
        }
    }

    #[test]
    fn a_difference_is_named_where_it_begins() {
        let mut model = ByteModel::new(8192, 4096, DiscardRule::ZeroesClusters);
        model.write(512, &contents(1, 512, 1024));
        let mut disk = model.read(0, 8192);
        assert!(model.compare_all(&disk).is_ok());
        disk[600] ^= 1;
        disk[601] ^= 1;
        disk[4096] ^= 1;
        let difference = model.compare_all(&disk).expect_err("the disk was changed");
        assert_eq!((difference.range.clone(), difference.sectors), (600..602, 2));
        assert_eq!(model.compare_all(&disk[..4096]).expect_err("changed").range, 600..602);
        assert_eq!(model.compare_all(&model.read(0, 4096)).expect_err("short").range, 4096..8192);
    }

    #[test]
    fn discards_touch_whole_clusters_only() {
        let mut model = ByteModel::new(3 * 4096 + 512, 4096, DiscardRule::ZeroesClusters);
        let full = contents(7, 0, model.size());
        model.write(0, &full);
        model.discard(512, 4096);
        model.discard(3 * 4096, 0);
        assert!(model.compare_all(&full).is_ok(), "no whole cluster was covered");
        model.discard(4095 / 512 * 512, 2 * 4096);
        assert_eq!(model.read(4096, 4096), vec![0; 4096]);
        assert_eq!(model.read(8192, 4096), full[8192..12288]);
        model.discard(3 * 4096, 512);
        assert_eq!(model.read(3 * 4096, 512), vec![0; 512]);
        let mut old = ByteModel::with_contents(&full, full.len() as u64, 4096, DiscardRule::Nothing);
        old.discard(0, full.len() as u64);
        assert!(old.compare_all(&full).is_ok());
    }
}
