//! Persistent bitmaps (spec: "Bitmaps"): their directory, a walk over its entries, and the entries of a bitmap's table.
//!
//! Owns the offsets and the bounds of their fields, and the flags. It never reads the bits of a bitmap.

use crate::address::{HostOffset, HostRange};
use crate::extension;
use crate::feature::AUTOCLEAR_BITMAPS;
use crate::geometry::Geometry;
use crate::header::Header;
use crate::parse::{u32_at, u64_at};

/// Bytes of a directory entry before its variable parts.
const FIXED_LENGTH: usize = 24;
/// Bytes read at a time: more than the longest entry.
const CHUNK: u64 = 256 << 10;
/// The most entries of a bitmap's table.
const TABLE_ENTRIES_MAX: u32 = 0x800_0000;
/// The most bytes of a bitmap.
const BITMAP_SIZE_MAX: u64 = 512 << 20;
/// The longest name in bytes.
const NAME_LENGTH_MAX: u16 = 1023;
/// Range of the binary logarithm of the bytes that a bit stands for.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The only type of bitmap: it records which bytes were written.
const TYPE_DIRTY_TRACKING: u8 = 1;
/// Flag: a program used the bitmap and did not store it again, so its bits have no meaning.
const FLAG_IN_USE: u32 = 1;
/// Flag: every program that writes to the disk must record its writes in the bitmap.
const FLAG_AUTO: u32 = 2;
/// Offset of the flags in an entry.
const FLAGS: u64 = 12;
/// Flags that the format reserves.
const FLAGS_RESERVED: u32 = !3;
/// Reserved bits of an entry of a bitmap's table.
const TABLE_ENTRY_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits 9 to 55 of an entry of a bitmap's table: the host offset in bytes.
const TABLE_ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The contents of the bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many bitmaps there are.
    pub count: u32,
    /// Where their directory is.
    pub directory_offset: HostOffset,
    /// Bytes of the directory.
    pub directory_size: u64,
}

/// A bitmap, as its entry in the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// The index of its entry in the directory, from 0.
    pub index: u32,
    /// Where its entry is in the file.
    pub offset: HostOffset,
    /// Where its table is.
    pub table_offset: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// Its flags; see [`Bitmap::is_in_use`] and [`Bitmap::is_auto`].
    flags: u32,
    /// Binary logarithm of the bytes that a bit stands for, 9 to 31.
    granularity_bits: u8,
    /// Its name, which need not be UTF-8.
    pub name: Vec<u8>,
}

impl Bitmap {
    /// True if the bitmap may be out of date and must not be used: the program that updated it did not store it.
    pub fn is_in_use(&self) -> bool {
        self.flags & FLAG_IN_USE != 0
    }

    /// True if every program that writes to the disk must update the bitmap.
    pub fn is_auto(&self) -> bool {
        self.flags & FLAG_AUTO != 0
    }

    /// Bytes that a bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Bytes of its table.
    pub fn table_length(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// Marks the bitmap as possibly out of date. Returns the bytes to write and their offset in the file. They never
    /// cross a sector boundary, because entries are aligned.
    pub fn mark_in_use(&mut self) -> (HostOffset, [u8; 4]) {
        self.flags |= FLAG_IN_USE;
        (HostOffset(self.offset.0 + FLAGS), self.flags.to_be_bytes())
    }
}

impl Header {
    /// The persistent bitmaps, if they are valid. Without the autoclear bit they are not: a program that does not
    /// support bitmaps has written to the image since.
    pub fn bitmaps(&self) -> Option<Bitmaps> {
        let extension = self.extensions.iter().find(|extension| extension.magic == extension::BITMAPS)?;
        // The length was checked when the header was read.
        let data = extension.data.first_chunk::<24>()?;
        (self.autoclear & AUTOCLEAR_BITMAPS != 0).then(|| Bitmaps {
            count: u32_at(data, 0),
            directory_size: u64_at(data, 8),
            directory_offset: HostOffset(u64_at(data, 16)),
        })
    }
}

/// A walk over the directory of bitmaps, in pieces.
#[derive(Debug)]
pub struct BitmapDirectory {
    geometry: Geometry,
    count: u32,
    /// First byte past the directory.
    end: u64,
    file_length: u64,
    /// Where the next entry is.
    at: u64,
    index: u32,
    broken: bool,
}

impl BitmapDirectory {
    /// A walk over the directory of `bitmaps` in a file of `file_length` bytes.
    pub fn new(bitmaps: &Bitmaps, geometry: Geometry, file_length: u64) -> Self {
        let Bitmaps { count, directory_offset: HostOffset(at), directory_size } = *bitmaps;
        let end = at.saturating_add(directory_size);
        BitmapDirectory { geometry, count, end, file_length, at, index: 0, broken: false }
    }

    /// The next piece to read; `None` at the end of the directory, or where it is
    /// broken. Up to seven bytes of it may be past the end of the file: they count as zeros.
    pub fn next_piece(&mut self) -> Option<HostRange> {
        if self.broken || (self.index == self.count && self.at == self.end) {
            return None;
        }
        let length = CHUNK.min(self.end.min(self.file_length).saturating_sub(self.at)).next_multiple_of(8);
        // The directory must have exactly as many entries as the extension says.
        if self.index == self.count || length == 0 {
            self.broken = true;
            return None;
        }
        Some(HostRange::new(HostOffset(self.at), length))
    }

    /// Consumes the bytes that [`BitmapDirectory::next_piece`] named, and calls `each` for every bitmap in them.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Bitmap)) {
        let read_to = self.at + bytes.len() as u64;
        let to_the_end = read_to >= self.end || read_to >= self.file_length;
        while self.index < self.count {
            let Some(fixed) = bytes.first_chunk::<FIXED_LENGTH>() else {
                self.broken = to_the_end;
                return;
            };
            let Some((mut bitmap, name_length)) = self.parse_fixed(fixed) else {
                self.broken = true;
                return;
            };
            let length = (FIXED_LENGTH + name_length).next_multiple_of(8) as u64;
            if self.at + length > self.end {
                self.broken = true;
                return;
            }
            // The end of the file may cut a name: the missing bytes count as zeros, as in every table.
            if length > bytes.len() as u64 && !to_the_end {
                return;
            }
            bitmap.name = bytes[FIXED_LENGTH..bytes.len().min(FIXED_LENGTH + name_length)].to_vec();
            each(bitmap);
            bytes = bytes.get(length as usize..).unwrap_or_default();
            self.at += length;
            self.index += 1;
        }
    }

    /// True if the next entry breaks the format or is missing.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The next entry's index in the directory, and its offset in the file.
    pub fn place(&self) -> (u32, HostOffset) {
        (self.index, HostOffset(self.at))
    }

    /// The next entry without its name, and the name's length in bytes; `None` if the entry breaks the format.
    fn parse_fixed(&self, fixed: &[u8; FIXED_LENGTH]) -> Option<(Bitmap, usize)> {
        let (table_offset, table_entries, flags) = (u64_at(fixed, 0), u32_at(fixed, 8), u32_at(fixed, 12));
        let (kind, granularity_bits) = (fixed[16], fixed[17]);
        let (name_length, extra_length) = (u16::from_be_bytes([fixed[18], fixed[19]]), u32_at(fixed, 20));
        let size = u64::from(table_entries) << self.geometry.cluster_bits;
        let valid = table_offset != 0
            && self.geometry.is_aligned(table_offset)
            && (1..=TABLE_ENTRIES_MAX).contains(&table_entries)
            && size <= BITMAP_SIZE_MAX
            && flags & FLAGS_RESERVED == 0
            && kind == TYPE_DIRTY_TRACKING
            && GRANULARITY_BITS.contains(&granularity_bits)
            && (1..=NAME_LENGTH_MAX).contains(&name_length)
            && extra_length == 0
            // A bitmap without meaning need not cover the disk.
            && (flags & FLAG_IN_USE != 0 || self.geometry.size <= (size * 8) << granularity_bits);
        let bitmap = Bitmap {
            index: self.index,
            offset: HostOffset(self.at),
            table_offset: HostOffset(table_offset),
            table_entries,
            flags,
            granularity_bits,
            name: Vec::new(),
        };
        valid.then_some((bitmap, name_length.into()))
    }
}

/// Decodes an entry of a bitmap's table to the cluster that holds this part of the bitmap. `None` means that all bits
/// of the part are equal.
///
/// # Errors
/// Returns the entry itself if it has reserved bits set or an offset that is not the start of a cluster.
pub fn bitmap_table_entry(raw: u64, geometry: &Geometry) -> Result<Option<HostOffset>, u64> {
    let offset = raw & TABLE_ENTRY_OFFSET;
    // With an offset, bit 0 (all ones) is reserved too.
    let reserved = raw & TABLE_ENTRY_RESERVED != 0 || (offset != 0 && raw & 1 != 0);
    if reserved || !geometry.is_aligned(offset) {
        return Err(raw);
    }
    Ok((offset != 0).then_some(HostOffset(offset)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Version;

    const GEOMETRY: Geometry = Geometry {
        version: Version::V3,
        cluster_bits: 16,
        refcount_order: 4,
        extended_l2: false,
        size: 1 << 30,
    };

    fn entry(change: impl FnOnce(&mut Vec<u8>), name: &str) -> Vec<u8> {
        let mut bytes = vec![0; FIXED_LENGTH];
        bytes[..8].copy_from_slice(&0x5_0000_u64.to_be_bytes());
        bytes[8..12].copy_from_slice(&1_u32.to_be_bytes());
        (bytes[16], bytes[17]) = (TYPE_DIRTY_TRACKING, 16);
        bytes[18..20].copy_from_slice(&(name.len() as u16).to_be_bytes());
        change(&mut bytes);
        bytes.extend_from_slice(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Walks a directory at offset 64 for which the extension claims `count` entries. Returns the table offsets found.
    fn walk(directory: &[u8], count: u32, cut: u64) -> (Vec<u64>, BitmapDirectory) {
        let file = [vec![0xee; 64], directory.to_vec()].concat();
        let (directory_offset, directory_size) = (HostOffset(64), directory.len() as u64);
        let bitmaps = Bitmaps { count, directory_offset, directory_size };
        let mut walk = BitmapDirectory::new(&bitmaps, GEOMETRY, file.len() as u64 - cut);
        let mut seen = Vec::new();
        while let Some(HostRange { offset: at, length }) = walk.next_piece() {
            let mut bytes = file[at.0 as usize..].to_vec();
            bytes.truncate((file.len() as u64 - cut - at.0) as usize);
            bytes.resize(length as usize, 0);
            walk.feed(&bytes, |bitmap| seen.push(bitmap.table_offset.0));
        }
        (seen, walk)
    }

    #[test]
    fn entries_of_varying_length_follow_each_other() {
        let long = "n".repeat(1023);
        let names: Vec<&str> = (0..600).map(|n| if n % 3 == 0 { "a" } else { &long }).collect();
        let directory: Vec<u8> = names.iter().flat_map(|name| entry(|_| {}, name)).collect();
        assert!(directory.len() as u64 > CHUNK);
        let (seen, walked) = walk(&directory, 600, 0);
        assert_eq!((seen.len(), walked.is_broken()), (600, false));
        for count in [599, 601] {
            assert!(walk(&directory, count, 0).1.is_broken(), "{count}");
        }
        // The end of the file may cut the last name, but not the last entry.
        assert!(!walk(&directory, 600, 1000).1.is_broken());
        assert!(walk(&directory, 600, 1032).1.is_broken());
    }

    #[test]
    fn flags_and_names_are_read() {
        let entries = [entry(|e| e[15] = 2, "first"), entry(|e| (e[15], e[17]) = (1, 20), "second one")];
        let (directory_offset, directory_size) = (HostOffset(64), entries.concat().len() as u64);
        let bitmaps = Bitmaps { count: 2, directory_offset, directory_size };
        let mut walk = BitmapDirectory::new(&bitmaps, GEOMETRY, 64 + directory_size);
        let mut seen = Vec::new();
        assert_eq!(walk.next_piece(), Some(HostRange::new(HostOffset(64), directory_size)));
        walk.feed(&entries.concat(), |bitmap| seen.push(bitmap));
        assert_eq!([seen[0].name.as_slice(), &seen[1].name], [b"first".as_slice(), b"second one"]);
        let told = |bitmap: &Bitmap| (bitmap.is_in_use(), bitmap.is_auto(), bitmap.granularity());
        assert_eq!([told(&seen[0]), told(&seen[1])], [(false, true, 1 << 16), (true, false, 1 << 20)]);
        assert_eq!(seen[0].mark_in_use(), (HostOffset(64 + 12), [0, 0, 0, 3]));
        assert!(seen[0].is_in_use());
        assert_eq!(seen[1].mark_in_use(), (HostOffset(64 + 32 + 12), [0, 0, 0, 1]));
    }

    #[test]
    fn each_field_is_bounded() {
        let broken = |change: fn(&mut Vec<u8>)| walk(&entry(change, "name"), 1, 0).1.is_broken();
        assert!(!broken(|_| {}));
        assert!(!broken(|e| e[15] = 3), "in use, automatic");
        assert!(!broken(|e| (e[15], e[17]) = (1, 9)), "in use and too short");
        let cases: [fn(&mut Vec<u8>); 12] = [
            |e| e[6] = 2,
            |e| e[5] = 0,
            |e| e[11] = 0,
            |e| e[10] = 0x20,
            |e| e[12] = 1,
            |e| e[15] = 4,
            |e| e[16] = 2,
            |e| e[17] = 8,
            |e| e[17] = 32,
            |e| e[19] = 0,
            |e| e[23] = 8,
            |e| e[17] = 10,
        ];
        for (number, change) in cases.into_iter().enumerate() {
            assert!(broken(change), "case {number}");
        }
    }

    #[test]
    fn a_table_entry_is_a_cluster_or_none() {
        assert_eq!(bitmap_table_entry(0, &GEOMETRY), Ok(None));
        assert_eq!(bitmap_table_entry(1, &GEOMETRY), Ok(None));
        assert_eq!(bitmap_table_entry(0x7_0000, &GEOMETRY), Ok(Some(HostOffset(0x7_0000))));
        for raw in [0x7_0001, 0x7_0200, 2, 1 << 63, 0x7_0000 | 1 << 56] {
            assert_eq!(bitmap_table_entry(raw, &GEOMETRY), Err(raw));
        }
    }
}
