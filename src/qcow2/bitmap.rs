//! Persistent bitmaps (spec: "Bitmaps"): where their directory is, a walk over its entries, and the entries of a bitmap's
//! table.
//!
//! Owns the places and the bounds of their fields, and the flags. What a bitmap's bits mean is not looked at.

use crate::address::HostOffset;
use crate::extension;
use crate::feature::AUTOCLEAR_BITMAPS;
use crate::geometry::Geometry;
use crate::header::Header;
use crate::parse::{u32_at, u64_at};

/// Bytes of a directory entry before its variable parts.
const FIXED_LENGTH: usize = 24;
/// Bytes read at a time: more than the longest entry has.
const CHUNK: u64 = 256 << 10;
/// The most entries of a bitmap's table.
const TABLE_ENTRIES_MAX: u32 = 0x800_0000;
/// The most bytes that a bitmap may take.
const BITMAP_SIZE_MAX: u64 = 512 << 20;
/// The longest name in bytes.
const NAME_LENGTH_MAX: u16 = 1023;
/// The least and the largest binary logarithm of the bytes that a bit stands for.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The one type of bitmaps that there is: what was written.
const TYPE_DIRTY_TRACKING: u8 = 1;
/// Flag: the bitmap was being used and not stored, so what it says means nothing.
const FLAG_IN_USE: u32 = 1;
/// Flag: whoever writes to the disk must note it in the bitmap.
const FLAG_AUTO: u32 = 2;
/// Where an entry has its flags.
const FLAGS: u64 = 12;
/// Flags that the format reserves.
const FLAGS_RESERVED: u32 = !3;
/// Reserved bits of an entry of a bitmap's table.
const TABLE_ENTRY_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits 9 to 55 of an entry of a bitmap's table: the host offset in bytes.
const TABLE_ENTRY_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What the bitmaps extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many bitmaps there are.
    pub count: u32,
    /// Where their directory is.
    pub directory_offset: HostOffset,
    /// Bytes of the directory.
    pub directory_size: u64,
}

/// A bitmap, as its entry in the directory says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its place in the directory, from 0.
    pub index: u32,
    /// Where its entry is in the file.
    pub offset: HostOffset,
    /// Where its table is.
    pub table_offset: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// Its flags; see the functions.
    flags: u32,
    /// Binary logarithm of the bytes that a bit stands for, 9 to 31.
    granularity_bits: u8,
    /// Its name, which need not be UTF-8.
    pub name: Vec<u8>,
}

impl Bitmap {
    /// True if the bitmap may be out of date and must not be used: whoever kept it up to date did not store it.
    pub fn is_in_use(&self) -> bool {
        self.flags & FLAG_IN_USE != 0
    }

    /// True if whoever writes to the disk must keep the bitmap up to date.
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

    /// Says that the bitmap may be out of date: what is to be written in the file, and where. It never lies across two
    /// sectors, as entries are aligned.
    pub fn mark_in_use(&mut self) -> (HostOffset, [u8; 4]) {
        self.flags |= FLAG_IN_USE;
        (HostOffset(self.offset.0 + FLAGS), self.flags.to_be_bytes())
    }
}

impl Header {
    /// The persistent bitmaps, if there are any that mean something: without the autoclear bit they do not, as a
    /// program that knows none has written since.
    pub fn bitmaps(&self) -> Option<Bitmaps> {
        let extension = self.extensions.iter().find(|extension| extension.magic == extension::BITMAPS)?;
        // The length was looked at when the header was read.
        let data = extension.data.first_chunk::<24>()?;
        (self.autoclear & AUTOCLEAR_BITMAPS != 0).then(|| Bitmaps {
            count: u32_at(data, 0),
            directory_size: u64_at(data, 8),
            directory_offset: HostOffset(u64_at(data, 16)),
        })
    }
}

/// A walk over the directory of bitmaps, piece by piece.
#[derive(Debug)]
pub struct BitmapDirectory {
    geometry: Geometry,
    count: u32,
    /// First byte past the directory.
    end: u64,
    file_length: u64,
    /// The entry that comes next.
    at: u64,
    index: u32,
    broken: bool,
}

impl BitmapDirectory {
    /// A walk over the directory of `bitmaps` in a file of so many bytes.
    pub fn new(bitmaps: &Bitmaps, geometry: Geometry, file_length: u64) -> Self {
        let Bitmaps { count, directory_offset: HostOffset(at), directory_size } = *bitmaps;
        let end = at.saturating_add(directory_size);
        BitmapDirectory { geometry, count, end, file_length, at, index: 0, broken: false }
    }

    /// The next piece to read, where and how many bytes; nothing at the end of the directory, or where it is broken.
    /// Up to seven bytes may be past the end of the file: they are zeros.
    pub fn next_piece(&mut self) -> Option<(HostOffset, u64)> {
        if self.broken || (self.index == self.count && self.at == self.end) {
            return None;
        }
        let length = CHUNK.min(self.end.min(self.file_length).saturating_sub(self.at)).next_multiple_of(8);
        // As many entries as the extension says, and nothing behind them.
        if self.index == self.count || length == 0 {
            self.broken = true;
            return None;
        }
        Some((HostOffset(self.at), length))
    }

    /// Takes in the bytes that [`BitmapDirectory::next_piece`] named, with a call for each bitmap that lies in them.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Bitmap)) {
        let read_to = self.at + bytes.len() as u64;
        let to_the_end = read_to >= self.end || read_to >= self.file_length;
        while self.index < self.count {
            let Some(fixed) = bytes.first_chunk::<FIXED_LENGTH>() else {
                self.broken = to_the_end;
                return;
            };
            let Some((mut bitmap, name_length)) = self.understand(fixed) else {
                self.broken = true;
                return;
            };
            let length = (FIXED_LENGTH + name_length).next_multiple_of(8) as u64;
            if self.at + length > self.end {
                self.broken = true;
                return;
            }
            // The end of the file may cut a name: its bytes are zeros then, as for every table.
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

    /// True if the entry that comes next breaks the format, or is missing.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The place in the directory of the entry that comes next, and in the file.
    pub fn place(&self) -> (u32, HostOffset) {
        (self.index, HostOffset(self.at))
    }

    /// The entry that comes next, without its name, and the name's length in bytes, if it is right.
    fn understand(&self, fixed: &[u8; FIXED_LENGTH]) -> Option<(Bitmap, usize)> {
        let (table_offset, table_entries, flags) = (u64_at(fixed, 0), u32_at(fixed, 8), u32_at(fixed, 12));
        let (kind, granularity_bits) = (fixed[16], fixed[17]);
        let (name_length, extra_length) = (u16::from_be_bytes([fixed[18], fixed[19]]), u32_at(fixed, 20));
        let size = u64::from(table_entries) << self.geometry.cluster_bits;
        let right = table_offset != 0
            && self.geometry.is_aligned(table_offset)
            && (1..=TABLE_ENTRIES_MAX).contains(&table_entries)
            && size <= BITMAP_SIZE_MAX
            && flags & FLAGS_RESERVED == 0
            && kind == TYPE_DIRTY_TRACKING
            && GRANULARITY_BITS.contains(&granularity_bits)
            && (1..=NAME_LENGTH_MAX).contains(&name_length)
            && extra_length == 0
            // One that means nothing need not be as long as the disk.
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
        right.then_some((bitmap, name_length.into()))
    }
}

/// Where an entry of a bitmap's table says that a part of the bitmap is: a cluster, or none where all its bits are the
/// same.
///
/// # Errors
/// Gives the entry back if it has reserved bits set or an offset that is not the start of a cluster.
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

    /// Walks a directory at offset 64 that says it has `count` entries; the tables seen.
    fn walk(directory: &[u8], count: u32, cut: u64) -> (Vec<u64>, BitmapDirectory) {
        let file = [vec![0xee; 64], directory.to_vec()].concat();
        let (directory_offset, directory_size) = (HostOffset(64), directory.len() as u64);
        let bitmaps = Bitmaps { count, directory_offset, directory_size };
        let mut walk = BitmapDirectory::new(&bitmaps, GEOMETRY, file.len() as u64 - cut);
        let mut seen = Vec::new();
        while let Some((at, length)) = walk.next_piece() {
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
    fn flags_and_names_are_told() {
        let entries = [entry(|e| e[15] = 2, "first"), entry(|e| (e[15], e[17]) = (1, 20), "second one")];
        let (directory_offset, directory_size) = (HostOffset(64), entries.concat().len() as u64);
        let bitmaps = Bitmaps { count: 2, directory_offset, directory_size };
        let mut walk = BitmapDirectory::new(&bitmaps, GEOMETRY, 64 + directory_size);
        let mut seen = Vec::new();
        assert_eq!(walk.next_piece(), Some((HostOffset(64), directory_size)));
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
    fn table_entries_are_a_cluster_or_none() {
        assert_eq!(bitmap_table_entry(0, &GEOMETRY), Ok(None));
        assert_eq!(bitmap_table_entry(1, &GEOMETRY), Ok(None));
        assert_eq!(bitmap_table_entry(0x7_0000, &GEOMETRY), Ok(Some(HostOffset(0x7_0000))));
        for raw in [0x7_0001, 0x7_0200, 2, 1 << 63, 0x7_0000 | 1 << 56] {
            assert_eq!(bitmap_table_entry(raw, &GEOMETRY), Err(raw));
        }
    }
}
