//! Decides which pieces of the file to read, and in what order. It also splits overlapping regions.
//!
//! Owns the bound on a single read. It does not inspect the bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use qcow2::{HostOffset, HostRange};

use super::report::ImagePart;
use super::{Progress, READ_MAX};

/// A region to be read, and a tag that identifies it.
struct Item<T> {
    offset: u64,
    length: u64,
    tag: T,
}

/// Regions of the file to be read in order, each once. Adjacent regions are read together.
pub(crate) struct Sweep<T> {
    items: Vec<Item<T>>,
    at: usize,
    /// Bytes of the present item that have been read.
    done: u64,
    /// Bytes of all items, and how many of them have been read.
    total: u64,
    read: u64,
}

impl<T> Default for Sweep<T> {
    fn default() -> Self {
        Sweep { items: Vec::new(), at: 0, done: 0, total: 0, read: 0 }
    }
}

impl<T> Sweep<T> {
    /// Adds a region, as far as it is in the file. If the file ends within an entry, that entry is read whole.
    pub fn push(&mut self, region: HostRange, file_length: u64, tag: T) {
        let HostRange { offset: HostOffset(offset), length } = region;
        let length = length.min(file_length.saturating_sub(offset)).next_multiple_of(8);
        if length > 0 {
            self.items.push(Item { offset, length, tag });
            self.total += length;
        }
    }

    /// The next piece to read. None if all have been read.
    pub fn next(&self) -> Option<HostRange> {
        self.piece(self.at, self.done)
    }

    /// The next pieces, at most `most`, each as [`Sweep::next`] will return it later.
    pub fn ahead(&self, most: usize) -> Vec<HostRange> {
        let (mut at, mut done) = (self.at, self.done);
        let mut pieces = Vec::new();
        while let (true, Some(piece)) = (pieces.len() < most, self.piece(at, done)) {
            pieces.push(piece);
            let mut left = piece.length;
            while let (true, Some(item)) = (left > 0, self.items.get(at)) {
                let here = left.min(item.length - done);
                left -= here;
                (at, done) = if done + here == item.length { (at + 1, 0) } else { (at, done + here) };
            }
        }
        pieces
    }

    /// The piece that begins `done` bytes into the item `at`.
    fn piece(&self, at: usize, done: u64) -> Option<HostRange> {
        let first = self.items.get(at)?;
        let start = first.offset + done;
        let mut end = start;
        for (n, item) in self.items[at..].iter().enumerate() {
            if (n > 0 && item.offset != end) || end - start == READ_MAX {
                break;
            }
            end = (item.offset + item.length).min(start + READ_MAX);
        }
        Some(HostRange::new(HostOffset(start), end - start))
    }

    /// Takes the bytes of the piece that [`Sweep::next`] returned. Calls `each` for every region in it, with its tag,
    /// the offset of the bytes, and the bytes.
    pub fn feed(&mut self, mut bytes: &[u8], mut each: impl FnMut(&Piece<'_, T>, &[u8])) {
        while let (false, Some(item)) = (bytes.is_empty(), self.items.get(self.at)) {
            let length = (item.length - self.done).min(bytes.len() as u64);
            let (here, rest) = bytes.split_at(length as usize);
            let offset = HostOffset(item.offset + self.done);
            each(&Piece { tag: &item.tag, offset, within: self.done }, here);
            bytes = rest;
            self.done += length;
            self.read += length;
            if self.done == item.length {
                self.at += 1;
                self.done = 0;
            }
        }
    }

    /// The progress through `part`.
    pub fn progress(&self, part: ImagePart) -> Progress {
        Progress { part, done: self.read, total: self.total }
    }

    /// Approximate bytes of memory held.
    pub fn held_bytes(&self) -> usize {
        self.items.capacity() * size_of::<Item<T>>()
    }
}

/// The location of a fed part of a region.
pub(crate) struct Piece<'a, T> {
    pub tag: &'a T,
    /// In the file.
    pub offset: HostOffset,
    /// In the region, in bytes.
    pub within: u64,
}

/// Regions that may overlap: how many of them cover each byte.
#[derive(Default)]
pub(crate) struct Cover {
    /// The change in the number of regions at each offset.
    changes: BTreeMap<u64, i64>,
}

/// A region in which each byte is covered the same number of times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Covered {
    pub start: u64,
    pub end: u64,
    pub times: u64,
}

impl Cover {
    /// Adds a region.
    pub fn add(&mut self, region: Range<u64>) {
        if !region.is_empty() {
            *self.changes.entry(region.start).or_default() += 1;
            *self.changes.entry(region.end).or_default() -= 1;
        }
    }

    /// Approximate bytes of memory held. A B-tree map takes up to twice its items.
    pub fn held_bytes(&self) -> usize {
        self.changes.len() * 2 * size_of::<(u64, i64)>()
    }

    /// The regions split so that none overlap, ascending.
    pub fn regions(&self) -> Vec<Covered> {
        let mut regions: Vec<Covered> = Vec::new();
        let (mut times, mut start) = (0_i64, 0);
        for (at, change) in &self.changes {
            if times > 0 {
                regions.push(Covered { start, end: *at, times: times as u64 });
            }
            times += change;
            start = *at;
        }
        regions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds a file in which each byte encodes its offset. Returns the reads, and what each region received.
    fn run(sweep: &mut Sweep<char>) -> (Vec<(u64, u64)>, String) {
        let (mut reads, mut seen, mut expected) = (Vec::new(), String::new(), Vec::new());
        while let Some(piece) = sweep.next() {
            let ahead = sweep.ahead(3);
            assert_eq!(ahead[0], piece);
            expected.truncate(ahead.len());
            assert_eq!(ahead[..expected.len()], expected[..]);
            expected = ahead[1..].to_vec();
            reads.push((piece.offset.0, piece.length));
            let bytes: Vec<u8> = (piece.offset.0..piece.end().0).map(|at| (at / 8) as u8).collect();
            sweep.feed(&bytes, |item, bytes| {
                assert_eq!(bytes[0], (item.offset.0 / 8) as u8);
                seen.push_str(&format!("{}{}+{} ", item.tag, item.within, bytes.len()));
            });
        }
        (reads, seen)
    }

    #[test]
    fn neighbours_are_read_together_and_large_regions_in_pieces() {
        let mut sweep = Sweep::default();
        sweep.push(HostRange::new(HostOffset(512), 512), u64::MAX, 'a');
        sweep.push(HostRange::new(HostOffset(1024), 512), u64::MAX, 'b');
        sweep.push(HostRange::new(HostOffset(0), 16), u64::MAX, 'c');
        sweep.push(HostRange::new(HostOffset(4096), READ_MAX + 8), u64::MAX, 'd');
        let (reads, seen) = run(&mut sweep);
        assert_eq!(reads, [(512, 1024), (0, 16), (4096, READ_MAX), (4096 + READ_MAX, 8)]);
        assert_eq!(seen, format!("a0+512 b0+512 c0+16 d0+{READ_MAX} d{READ_MAX}+8 "));
    }

    #[test]
    fn regions_are_cut_to_the_file() {
        let mut sweep = Sweep::default();
        sweep.push(HostRange::new(HostOffset(512), 512), 600, 'a');
        sweep.push(HostRange::new(HostOffset(1024), 512), 600, 'b');
        sweep.push(HostRange::new(HostOffset(0), 0), 600, 'c');
        assert_eq!(run(&mut sweep).0, [(512, 88)]);
        let mut sweep = Sweep::default();
        sweep.push(HostRange::new(HostOffset(512), 512), 603, 'a');
        assert_eq!(run(&mut sweep).0, [(512, 96)]);
    }

    #[test]
    fn overlapping_regions_are_split() {
        let mut cover = Cover::default();
        cover.add(10..20);
        cover.add(10..20);
        cover.add(15..30);
        cover.add(40..40);
        let region = |start, end, times| Covered { start, end, times };
        assert_eq!(cover.regions(), [region(10, 15, 2), region(15, 20, 3), region(20, 30, 1)]);
        assert_eq!(Cover::default().regions(), []);
    }
}
