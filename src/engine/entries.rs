//! The entries of an L1 table or a refcount table in memory. Pieces that are all zero take no memory.
//!
//! A header may claim a table of 32 MiB that is a hole in the file, and a chain has up to 1,000 images.

/// Entries in a piece, which takes 4 KiB.
const PIECE: usize = 512;

/// The entries of a table, as they are on disk.
#[derive(Clone, Debug, Default)]
pub struct Entries {
    /// Reaches at least to the last entry that is not zero. A `None` piece is all zero.
    pieces: Vec<Option<Box<[u64; PIECE]>>>,
    len: u64,
}

/// An entry that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedEntry {
    /// Its index in the table.
    pub index: u64,
    /// The entry as on disk.
    pub raw: u64,
}

impl Entries {
    /// A table of `len` entries, all zero.
    pub fn new(len: u64) -> Self {
        Entries { pieces: Vec::new(), len }
    }

    /// The number of entries.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if it has no entries.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// An entry; zero past the end.
    pub fn get(&self, index: u64) -> u64 {
        let (piece, at) = split(index);
        self.pieces.get(piece).and_then(Option::as_ref).map_or(0, |piece| piece[at])
    }

    /// Changes an entry.
    ///
    /// # Panics
    /// Past the end: a programmer error.
    pub fn set(&mut self, entry: UsedEntry) {
        let UsedEntry { index, raw } = entry;
        assert!(index < self.len, "entry {index} of {}", self.len);
        if raw == 0 && self.get(index) == 0 {
            return;
        }
        let (piece, at) = split(index);
        if piece >= self.pieces.len() {
            self.pieces.resize(piece + 1, None);
        }
        self.pieces[piece].get_or_insert_with(|| Box::new([0; PIECE]))[at] = raw;
    }

    /// Sets entries, from index `first` on, from their bytes on disk. Ignores entries past the end, and half an entry.
    pub fn read(&mut self, first: u64, bytes: &[u8]) {
        for (index, word) in (first..self.len).zip(bytes.as_chunks::<8>().0) {
            if *word != [0; 8] {
                self.set(UsedEntry { index, raw: u64::from_be_bytes(*word) });
            }
        }
    }

    /// Adds zeros at the end until there are `len` entries.
    pub fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// The entries that are not zero, in order.
    pub fn used(&self) -> impl DoubleEndedIterator<Item = UsedEntry> {
        self.used_in_pieces(0)
    }

    /// The same from an index on.
    pub fn used_from(&self, first: u64) -> impl Iterator<Item = UsedEntry> {
        self.used_in_pieces(split(first).0).skip_while(move |entry| entry.index < first)
    }

    fn used_in_pieces(&self, first: usize) -> impl DoubleEndedIterator<Item = UsedEntry> {
        let pieces = self.pieces.iter().enumerate().skip(first);
        let pieces = pieces.filter_map(|(n, piece)| Some((n, piece.as_ref()?)));
        pieces.flat_map(|(n, piece)| {
            let entries = piece.iter().enumerate().filter(|(_, raw)| **raw != 0);
            entries.map(move |(at, raw)| UsedEntry { index: (n * PIECE + at) as u64, raw: *raw })
        })
    }
}

impl FromIterator<u64> for Entries {
    fn from_iter<T: IntoIterator<Item = u64>>(entries: T) -> Self {
        let mut table = Entries::default();
        for raw in entries {
            table.len += 1;
            table.set(UsedEntry { index: table.len - 1, raw });
        }
        table
    }
}

fn split(index: u64) -> (usize, usize) {
    ((index / PIECE as u64) as usize, (index % PIECE as u64) as usize)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn zeros_take_no_memory() {
        let mut table = Entries::new(1 << 22);
        table.read(0, &vec![0; 1 << 20]);
        table.set(UsedEntry { index: 4_000_000, raw: 0 });
        assert_eq!((table.pieces.len(), table.get(4_000_000)), (0, 0));
        table.set(UsedEntry { index: 600, raw: 7 });
        assert_eq!(table.pieces.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true]);
        table.set(UsedEntry { index: 600, raw: 0 });
        assert_eq!((table.get(600), table.used().count()), (0, 0));
    }

    #[test]
    fn entries_are_read_where_they_were_set() {
        let mut table = Entries::new(1030);
        table.read(510, &[1u64, 0, 2, 3].map(u64::to_be_bytes).concat());
        table.read(1028, &[8u64, 9, 10].map(u64::to_be_bytes).concat());
        let used =
            [(510, 1), (512, 2), (513, 3), (1028, 8), (1029, 9)].map(|(index, raw)| UsedEntry { index, raw });
        assert_eq!(table.used().collect::<Vec<_>>(), used, "the last is past the end");
        assert_eq!(table.used().next_back(), Some(UsedEntry { index: 1029, raw: 9 }));
        table.grow(2000);
        table.set(UsedEntry { index: 1999, raw: 5 });
        assert_eq!([1030, 1999, 2000].map(|index| table.get(index)), [0, 5, 0]);
        let same: Entries = (0..2000).map(|index| table.get(index)).collect();
        assert_eq!((same.len(), same.used().eq(table.used())), (2000, true));
    }
}
