//! The table of internal snapshots (spec: "Snapshots"): entries of varying length, one after the other.
//!
//! Owns the layout of an entry and of the table, and the search for a snapshot by ID or name. [`SnapshotTable`] walks a
//! table in pieces. It checks lengths only: its user must check an entry's L1 table.

use crate::address::{HostOffset, HostRange};
use crate::parse::{u32_at, u64_at};

/// Bytes of an entry before its variable parts.
const FIXED_LENGTH: usize = 40;
/// The most extra data that an entry may have, in bytes.
pub const EXTRA_LENGTH_MAX: usize = 1024;
/// Bytes of extra data that version 3 requires: the size of the VM state and the size of the disk.
pub const EXTRA_LENGTH_V3: usize = 16;
/// Bytes of extra data of a new entry: the instruction count too, which is set to "none".
const EXTRA_LENGTH_NEW: usize = 24;
/// The most bytes of a snapshot table.
pub const TABLE_LENGTH_MAX: u64 = 64 << 20;
/// Bytes read at a time: more than the longest entry.
const CHUNK: u64 = 256 << 10;

/// Positions of the fields in an entry.
mod position {
    pub const L1_OFFSET: usize = 0;
    pub const L1_ENTRIES: usize = 8;
    pub const ID_LENGTH: usize = 12;
    pub const NAME_LENGTH: usize = 14;
    pub const SECONDS: usize = 16;
    pub const NANOSECONDS: usize = 20;
    pub const VM_CLOCK: usize = 24;
    pub const VM_STATE_SIZE: usize = 32;
    pub const EXTRA_LENGTH: usize = 36;
}

/// Positions of the fields in an entry's extra data.
mod extra {
    pub const VM_STATE_SIZE: usize = 0;
    pub const DISK_SIZE: usize = 8;
    pub const ICOUNT: usize = 16;
}

/// An entry of the table; no byte of it is dropped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its ID, unique in the image; by custom a number.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// When it was taken: seconds since 1970.
    pub seconds: u32,
    /// When it was taken: nanoseconds of the second.
    pub nanoseconds: u32,
    /// The guest's running time when the snapshot was taken, in nanoseconds.
    pub vm_clock_ns: u64,
    /// Bytes of VM state in the entry's own 32-bit field; see [`Snapshot::vm_state_size`].
    pub vm_state_size_short: u32,
    /// Further fields, byte for byte: some may be absent and some unknown.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// An entry without VM state, for a disk of `disk_size` bytes.
    pub fn new(id: Vec<u8>, name: Vec<u8>, disk_size: u64) -> Snapshot {
        let mut further = vec![0; EXTRA_LENGTH_NEW];
        further[extra::DISK_SIZE..extra::ICOUNT].copy_from_slice(&disk_size.to_be_bytes());
        further[extra::ICOUNT..].copy_from_slice(&u64::MAX.to_be_bytes());
        Snapshot {
            l1_offset: HostOffset(0),
            l1_entries: 0,
            id,
            name,
            seconds: 0,
            nanoseconds: 0,
            vm_clock_ns: 0,
            vm_state_size_short: 0,
            extra: further,
        }
    }

    /// Bytes of VM state, which follows the disk in the snapshot's own tables.
    pub fn vm_state_size(&self) -> u64 {
        self.extra_field(extra::VM_STATE_SIZE).unwrap_or(self.vm_state_size_short.into())
    }

    /// Bytes of the disk when the snapshot was taken; `None` means the size of the present disk.
    pub fn disk_size(&self) -> Option<u64> {
        self.extra_field(extra::DISK_SIZE)
    }

    /// Adds the fields that version 3 requires, where they are missing, for a disk of `disk_size` bytes.
    pub fn complete(&mut self, disk_size: u64) {
        if self.extra.len() < EXTRA_LENGTH_V3 {
            let vm_state_size = self.vm_state_size();
            self.extra.resize(EXTRA_LENGTH_V3, 0);
            self.extra[extra::VM_STATE_SIZE..extra::DISK_SIZE].copy_from_slice(&vm_state_size.to_be_bytes());
            self.extra[extra::DISK_SIZE..].copy_from_slice(&disk_size.to_be_bytes());
        }
    }

    /// The instruction count when the snapshot was taken, if it was recorded.
    pub fn icount(&self) -> Option<u64> {
        self.extra_field(extra::ICOUNT).filter(|count| *count != u64::MAX)
    }

    /// It has fields after those that are known.
    pub fn has_unknown_fields(&self) -> bool {
        self.extra.len() > EXTRA_LENGTH_NEW
    }

    fn extra_field(&self, at: usize) -> Option<u64> {
        (self.extra.len() >= at + 8).then(|| u64_at(&self.extra, at))
    }

    /// Bytes in the table, with the padding before the next entry.
    pub fn encoded_length(&self) -> usize {
        (FIXED_LENGTH + self.extra.len() + self.id.len() + self.name.len()).next_multiple_of(8)
    }

    /// Appends the entry's bytes to a table.
    ///
    /// # Panics
    /// If the ID or the name is longer than 65,535 bytes, or the extra data than [`EXTRA_LENGTH_MAX`]: a programmer error.
    fn encode(&self, table: &mut Vec<u8>) {
        assert!(self.extra.len() <= EXTRA_LENGTH_MAX, "extra data of {} bytes", self.extra.len());
        let [id_length, name_length] = [&self.id, &self.name]
            .map(|text| u16::try_from(text.len()).expect("an ID and a name of at most 65,535 bytes"));
        let end = table.len() + self.encoded_length();
        table.extend(self.l1_offset.0.to_be_bytes());
        table.extend(self.l1_entries.to_be_bytes());
        table.extend(id_length.to_be_bytes());
        table.extend(name_length.to_be_bytes());
        table.extend(self.seconds.to_be_bytes());
        table.extend(self.nanoseconds.to_be_bytes());
        table.extend(self.vm_clock_ns.to_be_bytes());
        table.extend(self.vm_state_size_short.to_be_bytes());
        table.extend((self.extra.len() as u32).to_be_bytes());
        table.extend(&self.extra);
        table.extend(&self.id);
        table.extend(&self.name);
        table.resize(end, 0);
    }
}

/// The bytes of a table of these entries.
pub fn encode_table(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut table = Vec::with_capacity(snapshots.iter().map(Snapshot::encoded_length).sum());
    for snapshot in snapshots {
        snapshot.encode(&mut table);
    }
    table
}

/// The index of the snapshot with this ID, else of the first one with this name.
pub fn find(snapshots: &[Snapshot], wanted: &[u8]) -> Option<usize> {
    let by_id = snapshots.iter().position(|snapshot| snapshot.id == wanted);
    by_id.or_else(|| snapshots.iter().position(|snapshot| snapshot.name == wanted))
}

/// An unused ID: the largest number in use plus one.
pub fn next_id(snapshots: &[Snapshot]) -> Vec<u8> {
    let number = |snapshot: &Snapshot| {
        let digits = snapshot.id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0_u64, |number, digit| number.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
    };
    let mut next = snapshots.iter().map(number).max().unwrap_or(0).wrapping_add(1);
    loop {
        let id = next.to_string().into_bytes();
        if snapshots.iter().all(|snapshot| snapshot.id != id) {
            return id;
        }
        next = next.wrapping_add(1);
    }
}

/// An entry and its location.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableEntry {
    /// Its index in the table, from 0.
    pub index: u32,
    /// Where it is in the file.
    pub offset: HostOffset,
    /// The entry itself.
    pub snapshot: Snapshot,
}

/// A walk over a table.
#[derive(Clone, Debug)]
pub struct SnapshotTable {
    start: u64,
    /// Where the next entry is.
    at: u64,
    index: u32,
    count: u32,
    file_length: u64,
    broken: bool,
}

impl SnapshotTable {
    /// A walk over `count` entries from `start` on, in a file of `file_length` bytes.
    pub fn new(start: HostOffset, count: u32, file_length: u64) -> Self {
        SnapshotTable { start: start.0, at: start.0, index: 0, count, file_length, broken: false }
    }

    /// The next piece to read; `None` at the end of the table, or where it is
    /// broken.
    pub fn next_piece(&mut self) -> Option<HostRange> {
        if self.index == self.count || self.broken {
            return None;
        }
        let length = CHUNK.min(self.file_length.saturating_sub(self.at));
        if length == 0 || self.length() > TABLE_LENGTH_MAX {
            self.broken = true;
            return None;
        }
        Some(HostRange::new(HostOffset(self.at), length))
    }

    /// Consumes the bytes that [`SnapshotTable::next_piece`] named.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(TableEntry)) {
        let to_the_end = self.at + bytes.len() as u64 >= self.file_length;
        while self.index < self.count {
            if bytes.len() < FIXED_LENGTH {
                self.broken = to_the_end;
                return;
            }
            let extra_length = u32_at(bytes, position::EXTRA_LENGTH) as usize;
            if extra_length > EXTRA_LENGTH_MAX {
                self.broken = true;
                return;
            }
            let short = |at: usize| usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
            let (id_length, name_length) = (short(position::ID_LENGTH), short(position::NAME_LENGTH));
            let length = FIXED_LENGTH + extra_length + id_length + name_length;
            // The end of the file may cut the last entry's name: the missing bytes count as zeros, as in every table.
            if length > bytes.len() && !to_the_end {
                return;
            }
            let part = |from: usize, length: usize| {
                let end = (from + length).min(bytes.len());
                let mut part = bytes[from.min(end)..end].to_vec();
                part.resize(length, 0);
                part
            };
            let snapshot = Snapshot {
                l1_offset: HostOffset(u64_at(bytes, position::L1_OFFSET)),
                l1_entries: u32_at(bytes, position::L1_ENTRIES),
                id: part(FIXED_LENGTH + extra_length, id_length),
                name: part(FIXED_LENGTH + extra_length + id_length, name_length),
                seconds: u32_at(bytes, position::SECONDS),
                nanoseconds: u32_at(bytes, position::NANOSECONDS),
                vm_clock_ns: u64_at(bytes, position::VM_CLOCK),
                vm_state_size_short: u32_at(bytes, position::VM_STATE_SIZE),
                extra: part(FIXED_LENGTH, extra_length),
            };
            each(TableEntry { index: self.index, offset: HostOffset(self.at), snapshot });
            let padded = length.next_multiple_of(8);
            bytes = bytes.get(padded..).unwrap_or_default();
            self.at += padded as u64;
            self.index += 1;
        }
    }

    /// True if the next entry breaks the format or is not in the file.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Bytes of the table walked so far.
    pub fn length(&self) -> u64 {
        self.at - self.start
    }

    /// The next entry's index in the table, and its offset in the file.
    pub fn place(&self) -> (u32, HostOffset) {
        (self.index, HostOffset(self.at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u64, extra: usize, id: &str, name: &str) -> Snapshot {
        Snapshot {
            l1_offset: HostOffset(number << 16),
            l1_entries: number as u32,
            seconds: 0x0102_0304,
            nanoseconds: 0x0506_0708,
            vm_clock_ns: 0x1112_1314_1516_1718,
            vm_state_size_short: 0x2122_2324,
            extra: (0..extra).map(|n| n as u8 | 1).collect(),
            ..Snapshot::new(id.into(), name.into(), 0)
        }
    }

    fn walk(file: &[u8], count: u32) -> (Vec<Snapshot>, SnapshotTable) {
        let mut walk = SnapshotTable::new(HostOffset(512), count, file.len() as u64);
        let mut seen = Vec::new();
        while let Some(HostRange { offset: at, length }) = walk.next_piece() {
            let bytes = &file[at.0 as usize..(at.0 + length) as usize];
            walk.feed(bytes, |found| {
                assert_eq!(found.index as usize, seen.len());
                seen.push(found.snapshot);
            });
        }
        (seen, walk)
    }

    fn file(snapshots: &[Snapshot]) -> Vec<u8> {
        [vec![0xee; 512], encode_table(snapshots)].concat()
    }

    #[test]
    fn every_byte_of_every_entry_survives_a_round_trip() {
        let long = "n".repeat(65_535);
        let snapshots: Vec<Snapshot> =
            (0..9).map(|n| entry(n, n as usize * 128, "1", &long[n as usize..])).collect();
        let file = file(&snapshots);
        let (seen, walk) = walk(&file, 9);
        assert_eq!((seen, walk.is_broken()), (snapshots, false));
        assert_eq!(walk.length(), file.len() as u64 - 512);
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_specification() {
        let table = encode_table(&[entry(3, 3, "12", "name")]);
        let mut expected = vec![0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 3, 0, 2, 0, 4];
        expected.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
        expected.extend([0x21, 0x22, 0x23, 0x24, 0, 0, 0, 3, 1, 1, 3]);
        expected.extend(b"12name\0\0\0\0\0\0\0");
        expected.truncate(56);
        assert_eq!(table, expected);
    }

    #[test]
    fn fields_are_read_from_extra_data_that_is_long_enough() {
        let short = entry(1, 7, "1", "");
        assert_eq!((short.vm_state_size(), short.disk_size(), short.icount()), (0x2122_2324, None, None));
        let new = Snapshot::new(b"1".to_vec(), b"one".to_vec(), 77);
        assert_eq!((new.vm_state_size(), new.disk_size(), new.icount()), (0, Some(77), None));
        let mut counted = new;
        counted.extra[16..24].copy_from_slice(&5_u64.to_be_bytes());
        counted.extra[..8].copy_from_slice(&(1_u64 << 40).to_be_bytes());
        assert_eq!((counted.vm_state_size(), counted.icount()), (1 << 40, Some(5)));
    }

    #[test]
    fn the_last_name_may_be_cut_by_the_end_of_the_file() {
        let mut file = file(&[entry(1, 16, "1", "one"), entry(2, 16, "2", "two")]);
        file.truncate(file.len() - 8);
        let (seen, walked) = walk(&file, 2);
        assert_eq!((seen.len(), walked.is_broken(), walked.length()), (2, false, 128));
        assert_eq!((&seen[1].id[..], &seen[1].name[..]), (&b"\0"[..], &b"\0\0\0"[..]));
        assert!(walk(&file, 3).1.is_broken());
    }

    #[test]
    fn a_missing_short_or_oversized_entry_is_broken() {
        let good = encode_table(&[entry(1, 16, "1", "one")]);
        let mut greedy = encode_table(&[entry(1, 0, "", "")]);
        greedy[36..40].copy_from_slice(&1025_u32.to_be_bytes());
        for (second, what) in
            [(Vec::new(), "missing"), (vec![0; 39], "cut short"), (greedy, "too much extra data")]
        {
            let (seen, walk) = walk(&[vec![0; 512], good.clone(), second].concat(), 2);
            assert_eq!((seen.len(), walk.is_broken(), walk.place().0), (1, true, 1), "{what}");
        }
    }

    #[test]
    fn an_id_is_found_before_a_name() {
        let list = [entry(1, 0, "1", "two"), entry(2, 0, "2", "1"), entry(3, 0, "7x", "two")];
        assert_eq!(find(&list, b"1"), Some(0));
        assert_eq!(find(&list, b"two"), Some(0));
        assert_eq!(find(&list, b"7x"), Some(2));
        assert_eq!(find(&list, b"3"), None);
        assert_eq!((next_id(&list), next_id(&[])), (b"8".to_vec(), b"1".to_vec()));
        let last = [entry(1, 0, "99999999999999999999", ""), entry(1, 0, "0", "")];
        assert_eq!(next_id(&last), b"1".to_vec());
    }
}
