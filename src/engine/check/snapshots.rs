//! Walks the table of internal snapshots (spec: "Snapshots"): entries of varying length, one after the other.
//!
//! Owns the places of the fields that a check needs. It says what each entry claims and judges nothing but its length.

use qcow2::HostOffset;

/// Bytes of an entry before its variable parts.
const FIXED_LENGTH: usize = 40;
/// The most extra data that an entry may have, in bytes.
const EXTRA_LENGTH_MAX: u32 = 1024;
/// The most bytes of a snapshot table.
const TABLE_LENGTH_MAX: u64 = 64 << 20;
/// Bytes read at a time: more than the longest entry has.
const CHUNK: u64 = 256 << 10;

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    /// Its place in the table.
    pub index: u32,
    /// Where it is in the file, in bytes.
    pub offset: u64,
    /// Its L1 table.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u64,
    /// Bytes of extra data.
    pub extra_length: u32,
}

/// A walk in progress.
pub(super) struct SnapshotWalk {
    start: u64,
    /// The entry that comes next.
    at: u64,
    index: u32,
    count: u32,
    file_length: u64,
    /// The entry that comes next is broken.
    pub broken: bool,
}

impl SnapshotWalk {
    /// A walk over `count` entries from `start` on.
    pub fn new(start: HostOffset, count: u32, file_length: u64) -> Self {
        SnapshotWalk { start: start.0, at: start.0, index: 0, count, file_length, broken: false }
    }

    /// The next piece to read; nothing at the end of the table, or where it is broken.
    pub fn next(&mut self) -> Option<(u64, u64)> {
        if self.index == self.count || self.broken {
            return None;
        }
        let length = CHUNK.min(self.file_length.saturating_sub(self.at));
        if length == 0 || self.length() > TABLE_LENGTH_MAX {
            self.broken = true;
            return None;
        }
        Some((self.at, length))
    }

    /// Takes in what [`SnapshotWalk::next`] asked for.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(Snapshot)) {
        let to_the_end = self.at + bytes.len() as u64 >= self.file_length;
        while self.index < self.count {
            let Some(fixed) = bytes.first_chunk::<FIXED_LENGTH>() else {
                self.broken = to_the_end;
                return;
            };
            let u16_at = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
            let u32_at =
                |at: usize| u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
            let extra_length = u32_at(36);
            if extra_length > EXTRA_LENGTH_MAX {
                self.broken = true;
                return;
            }
            let length = FIXED_LENGTH + extra_length as usize + u16_at(12) + u16_at(14);
            // The end of the file may cut the name of the last: its bytes are zeros then, as for every table.
            if length > bytes.len() && !to_the_end {
                return;
            }
            let l1_offset = HostOffset(qcow2::entry(fixed, 0));
            let l1_entries = u64::from(u32_at(8));
            each(Snapshot { index: self.index, offset: self.at, l1_offset, l1_entries, extra_length });
            let padded = length.next_multiple_of(8);
            bytes = bytes.get(padded..).unwrap_or_default();
            self.at += padded as u64;
            self.index += 1;
        }
    }

    /// Bytes of the table walked so far.
    pub fn length(&self) -> u64 {
        self.at - self.start
    }

    /// The place in the table of the entry that comes next, and in the file.
    pub fn place(&self) -> (u32, u64) {
        (self.index, self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(l1: u64, entries: u32, extra: u32, id: &str, name: &str) -> Vec<u8> {
        let mut bytes = vec![0; FIXED_LENGTH];
        bytes[..8].copy_from_slice(&l1.to_be_bytes());
        bytes[8..12].copy_from_slice(&entries.to_be_bytes());
        bytes[12..14].copy_from_slice(&(id.len() as u16).to_be_bytes());
        bytes[14..16].copy_from_slice(&(name.len() as u16).to_be_bytes());
        bytes[36..40].copy_from_slice(&extra.to_be_bytes());
        bytes.resize(FIXED_LENGTH + extra as usize, 0);
        bytes.extend_from_slice(id.as_bytes());
        bytes.extend_from_slice(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn walk(file: &[u8], count: u32) -> (Vec<(u64, u64)>, SnapshotWalk) {
        let mut walk = SnapshotWalk::new(HostOffset(512), count, file.len() as u64);
        let mut seen = Vec::new();
        while let Some((at, length)) = walk.next() {
            let bytes = &file[at as usize..(at + length) as usize];
            walk.feed(bytes, |found| seen.push((found.l1_offset.0, found.l1_entries)));
        }
        (seen, walk)
    }

    #[test]
    fn entries_of_varying_length_follow_each_other() {
        let mut file = vec![0xee; 512];
        let long = "n".repeat(65_535);
        let mut expected = Vec::new();
        for n in 0..9_u32 {
            file.extend(entry(u64::from(n) << 16, n, n * 100, "1", &long));
            expected.push((u64::from(n) << 16, u64::from(n)));
        }
        let (seen, walk) = walk(&file, 9);
        assert_eq!((seen, walk.broken), (expected, false));
        assert_eq!(walk.length(), file.len() as u64 - 512);
    }

    #[test]
    fn the_last_name_may_be_cut_by_the_end_of_the_file() {
        let file =
            [vec![0; 512], entry(1 << 16, 1, 16, "1", "one"), entry(2 << 16, 2, 16, "2", "two")].concat();
        let (seen, walked) = walk(&file[..file.len() - 8], 2);
        assert_eq!((seen.len(), walked.broken, walked.length()), (2, false, 128));
        assert!(walk(&file[..file.len() - 8], 3).1.broken);
    }

    #[test]
    fn a_table_that_cannot_be_walked_is_broken() {
        let good = entry(1 << 16, 1, 16, "1", "one");
        let table = |second: Vec<u8>| [vec![0; 512], good.clone(), second].concat();
        for (second, what) in [
            (Vec::new(), "missing"),
            (vec![0; 39], "cut short"),
            (entry(0, 0, 1025, "", ""), "too much extra data"),
        ] {
            let (seen, walk) = walk(&table(second), 2);
            assert_eq!((seen.len(), walk.broken, walk.place().0), (1, true, 1), "{what}");
        }
    }
}
