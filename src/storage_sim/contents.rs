//! The bytes of one simulated file: sparse, and cheap to copy, as copies share their pages until one is written.
//!
//! A present page is one with allocated space, even if it is all zeros. It knows no operation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock, OnceLock};

use strata_random::mix;

/// Bytes of a page: the unit in which space is allocated and pages are shared.
pub const PAGE_BYTES: u64 = 4096;

static ZERO_PAGE: LazyLock<Arc<Page>> =
    LazyLock::new(|| Arc::new(Page { bytes: [0; PAGE_BYTES as usize], hash: OnceLock::new() }));

struct Page {
    bytes: [u8; PAGE_BYTES as usize],
    /// Computed on first use, cleared when the bytes change.
    hash: OnceLock<u64>,
}

/// A file's bytes and length. Bytes that were never written, or are past the end, are zero.
#[derive(Clone, Default)]
pub struct Contents {
    pages: Arc<BTreeMap<u64, Arc<Page>>>,
    length: u64,
}

impl Contents {
    /// A file with these bytes; pages of zeros are left sparse.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut contents = Contents { pages: Arc::default(), length: bytes.len() as u64 };
        for (index, chunk) in bytes.chunks(PAGE_BYTES as usize).enumerate() {
            if chunk.iter().any(|byte| *byte != 0) {
                contents.write(index as u64 * PAGE_BYTES, chunk);
            }
        }
        contents
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes allocated.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE_BYTES
    }

    /// Fills the buffer from an offset on, with zeros past the end.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut rest = buffer;
        for (index, within) in pages_of(offset..offset.saturating_add(rest.len() as u64)) {
            let (target, after) = rest.split_at_mut(within.len());
            match self.pages.get(&index) {
                Some(page) => target.copy_from_slice(&page.bytes[within]),
                None => target.fill(0),
            }
            rest = after;
        }
    }

    /// All the bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let length = usize::try_from(self.length).expect("a test asks only for files that fit memory");
        let mut bytes = vec![0; length];
        self.read(0, &mut bytes);
        bytes
    }

    /// The pages that are allocated and not all zeros: their offsets, and their bytes cut to the file's length.
    pub fn data_pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().filter(|(_, page)| page.hash() != 0).map(|(index, page)| {
            let offset = index * PAGE_BYTES;
            let count = self.length.saturating_sub(offset).min(PAGE_BYTES) as usize;
            (offset, &page.bytes[..count])
        })
    }

    /// Writes bytes. The length stays: after a write past the end the caller must set it, or the next
    /// [`Contents::set_length`] loses the bytes.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for (index, within) in pages_of(offset..offset.saturating_add(bytes.len() as u64)) {
            let (source, after) = rest.split_at(within.len());
            self.page(index)[within].copy_from_slice(source);
            rest = after;
        }
    }

    /// Zeroes a range within present pages, and frees whole pages if `give_back`. Absent pages stay sparse.
    pub(crate) fn zero(&mut self, range: Range<u64>, give_back: bool) {
        if range.is_empty() {
            return;
        }
        let first_page = range.start / PAGE_BYTES;
        let last_page = (range.end - 1) / PAGE_BYTES;
        let present: Vec<u64> = self.pages.range(first_page..=last_page).map(|(index, _)| *index).collect();
        for index in present {
            let within = within_page(index, &range);
            if within.len() < PAGE_BYTES as usize {
                self.page(index)[within].fill(0);
            } else if give_back {
                Arc::make_mut(&mut self.pages).remove(&index);
            } else {
                Arc::make_mut(&mut self.pages).insert(index, Arc::clone(&ZERO_PAGE));
            }
        }
    }

    /// Allocates the absent pages of a range, which still read as zero.
    pub(crate) fn allocate(&mut self, range: Range<u64>) {
        let missing: Vec<u64> = self.missing_pages(range).collect();
        if !missing.is_empty() {
            let pages = Arc::make_mut(&mut self.pages);
            pages.extend(missing.into_iter().map(|index| (index, Arc::clone(&ZERO_PAGE))));
        }
    }

    /// The pages of a range that are not allocated, in order.
    pub(crate) fn missing_pages(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        pages_of(range).map(|(index, _)| index).filter(|index| !self.pages.contains_key(index))
    }

    /// Sets the length; bytes past it are gone for good.
    pub(crate) fn set_length(&mut self, length: u64) {
        self.zero(length..u64::MAX, true);
        // The loop above keeps the page in which the end lies; one that begins at the end is whole, and gone.
        self.length = length;
    }

    /// Grows the length to at least `length`.
    pub(crate) fn grow(&mut self, length: u64) {
        self.length = self.length.max(length);
    }

    /// A hash of the length and the bytes, the same in every run and wherever the space is allocated.
    pub fn hash(&self) -> u64 {
        let mut sum = mix(self.length ^ 0x5eed);
        for (index, page) in self.pages.iter() {
            let hash = page.hash();
            if hash != 0 {
                sum = sum.wrapping_add(mix(hash ^ mix(index + 1)));
            }
        }
        mix(sum)
    }

    /// A page to write to, allocated if need be.
    fn page(&mut self, index: u64) -> &mut [u8; PAGE_BYTES as usize] {
        let page = Arc::make_mut(&mut self.pages).entry(index).or_insert_with(|| Arc::clone(&ZERO_PAGE));
        let page = Arc::make_mut(page);
        page.hash = OnceLock::new();
        &mut page.bytes
    }
}

impl Page {
    /// 0 if and only if (but for a chance in 2^64) all bytes are zero.
    fn hash(&self) -> u64 {
        *self.hash.get_or_init(|| {
            let mut words = [0u64; 4];
            let mut any = 0;
            for block in self.bytes.chunks_exact(32) {
                for (word, bytes) in words.iter_mut().zip(block.chunks_exact(8)) {
                    let value = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
                    any |= value;
                    *word = (*word ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
                }
            }
            if any == 0 {
                return 0;
            }
            words.iter().fold(1, |hash, word| mix(hash ^ word).wrapping_add(*word))
        })
    }
}

impl Clone for Page {
    /// A copy is made to be changed.
    fn clone(&self) -> Self {
        Page { bytes: self.bytes, hash: OnceLock::new() }
    }
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Contents({} bytes, {} allocated)", self.length, self.allocated())
    }
}

/// The pages that a range touches: their indexes and the touched bytes of each.
fn pages_of(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let pages =
        if range.is_empty() { 0..0 } else { range.start / PAGE_BYTES..(range.end - 1) / PAGE_BYTES + 1 };
    pages.map(move |index| (index, within_page(index, &range)))
}

fn within_page(index: u64, range: &Range<u64>) -> Range<usize> {
    let start = index * PAGE_BYTES;
    let from = range.start.saturating_sub(start).min(PAGE_BYTES);
    let to = (range.end - start).min(PAGE_BYTES);
    from as usize..to as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_copies_do_not_change() {
        let mut bytes = vec![0u8; 20_000];
        bytes[5000..13_000].fill(3);
        bytes[19_999] = 9;
        let mut contents = Contents::from_bytes(&bytes);
        assert_eq!((contents.length(), contents.allocated()), (20_000, 4 * PAGE_BYTES));
        assert_eq!(contents.to_bytes(), bytes);
        let copy = contents.clone();
        contents.write(4000, &[7; 300]);
        assert_eq!(copy.to_bytes(), bytes);
        bytes[4000..4300].fill(7);
        assert_eq!(contents.to_bytes(), bytes);
        let mut past = [1; 100];
        contents.read(19_990, &mut past);
        assert_eq!((past[9], past[10]), (9, 0));
    }

    #[test]
    fn zeroing_keeps_space_and_punching_gives_whole_pages_back() {
        let mut contents = Contents::from_bytes(&[1; 5 * 4096]);
        contents.zero(100..8192, true);
        assert_eq!(contents.allocated(), 4 * 4096);
        contents.zero(8192..12_288, false);
        assert_eq!(contents.allocated(), 4 * 4096);
        let bytes = contents.to_bytes();
        assert!(bytes[..100].iter().all(|byte| *byte == 1));
        assert!(bytes[100..12_288].iter().all(|byte| *byte == 0));
        assert!(bytes[12_288..].iter().all(|byte| *byte == 1));
        contents.allocate(0..6 * 4096);
        assert_eq!(contents.allocated(), 6 * 4096);
        assert_eq!(contents.to_bytes(), bytes);
        assert_eq!(contents.missing_pages(4096..8 * 4096).collect::<Vec<_>>(), [6, 7]);
    }

    #[test]
    fn bytes_past_the_end_are_gone() {
        let mut contents = Contents::from_bytes(&[1; 10_000]);
        contents.set_length(5000);
        contents.grow(10_000);
        let bytes = contents.to_bytes();
        assert_eq!(bytes.len(), 10_000);
        assert!(bytes[..5000].iter().all(|byte| *byte == 1) && bytes[5000..].iter().all(|byte| *byte == 0));
        contents.set_length(4096);
        assert_eq!(contents.allocated(), 4096);
        contents.set_length(u64::MAX / 2);
        assert_eq!(contents.allocated(), 4096);
    }

    #[test]
    fn the_hash_is_of_the_bytes_and_the_length_alone() {
        let bytes: Vec<u8> = (0..30_000u32).map(|n| (n % 253) as u8).collect();
        let contents = Contents::from_bytes(&bytes);
        let mut allocated = contents.clone();
        allocated.allocate(0..1 << 20);
        assert_eq!(contents.hash(), allocated.hash());
        let mut longer = contents.clone();
        longer.grow(30_001);
        assert_ne!(contents.hash(), longer.hash());
        let mut changed = contents.clone();
        assert_eq!(changed.hash(), contents.hash());
        changed.write(29_000, &[bytes[29_000] ^ 1]);
        assert_ne!(changed.hash(), contents.hash());
        changed.write(29_000, &[bytes[29_000]]);
        assert_eq!(changed.hash(), contents.hash());
        // Two pages that change places are another file.
        let mut swapped = bytes.clone();
        swapped[..8192].rotate_left(4096);
        assert_ne!(Contents::from_bytes(&swapped).hash(), contents.hash());
        // Fixed for good: seeds and hashes are recorded elsewhere.
        assert_eq!(Contents::from_bytes(b"strata").hash(), 17_477_442_291_989_488_095);
        assert_eq!(contents.hash(), 3_576_262_640_479_901_741);
    }
}
