//! The directory of persistent bitmaps, walked as by a disk.

use qcow2::{BitmapDirectory, Bitmaps, Geometry, HostOffset, Version};

use super::values::Values;

/// The input: the claimed number of bitmaps, the claimed length of the directory, the disk's size, then the
/// directory, which ends the file.
pub fn judge(input: &[u8]) {
    let mut values = Values(input);
    let count = u32::from(values.u16());
    let (length, how) = (u64::from(values.u16()), values.u8());
    let directory = values.0;
    let start = 512;
    let geometry = Geometry {
        version: Version::V3,
        cluster_bits: 9 + u32::from(how & 15) % 13,
        refcount_order: 4,
        extended_l2: false,
        size: 1 << (how >> 4),
    };
    let directory_size = if how & 1 == 0 { directory.len() as u64 } else { length };
    let bitmaps = Bitmaps { count, directory_offset: HostOffset(start), directory_size };
    let mut walk = BitmapDirectory::new(&bitmaps, geometry, start + directory.len() as u64);
    let mut found = Vec::new();
    while let Some(qcow2::HostRange { offset, length }) = walk.next_piece() {
        let at = (offset.0 - start) as usize;
        let mut bytes = directory[at..directory.len().min(at + length as usize)].to_vec();
        assert!(length - (bytes.len() as u64) < 8, "no more than is there");
        bytes.resize(length as usize, 0);
        walk.feed(&bytes, |bitmap| found.push(bitmap));
    }
    assert!(walk.is_broken() || found.len() == count as usize);
    for (index, bitmap) in (0..).zip(&mut found) {
        assert_eq!(bitmap.index, index);
        assert!(geometry.is_aligned(bitmap.table_offset.0) && bitmap.table_offset.0 != 0);
        assert!(bitmap.name.len() <= 1023 && bitmap.table_length() <= 512 << 20);
        assert!(bitmap.granularity().is_power_of_two());
        let (at, _) = bitmap.mark_in_use();
        assert!(bitmap.is_in_use() && at.0 / 512 == (at.0 + 3) / 512, "within a sector");
    }
}
