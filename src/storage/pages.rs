//! Returns pages of the daemon's own heap to the system; their owner keeps the addresses. Knows no file and no guest.

use std::sync::atomic::AtomicU64;

/// Returns the memory of unused words to the system. Words whose whole page is given here read as zero afterwards; the
/// others keep their values. The memory comes back when a word is written.
pub fn give_back<'a>(pieces: impl Iterator<Item = &'a [AtomicU64]>) {
    let mut spans: Vec<(usize, &[AtomicU64])> =
        pieces.map(|words| (words.as_ptr() as usize, words)).collect();
    spans.sort_unstable_by_key(|(address, _)| *address);
    for together in spans.chunk_by(|(address, words), (next, _)| address + size_of_val(*words) == *next) {
        let length = together.iter().map(|(_, words)| size_of_val(*words)).sum();
        let (address, first) = together[0];
        drop_pages(first.as_ptr().cast_mut().cast(), address, length);
    }
}

/// Drops the whole system pages inside a contiguous range of words at this address.
fn drop_pages(start: *mut u8, address: usize, length: usize) {
    let page = rustix::param::page_size();
    let begin = address.next_multiple_of(page);
    let end = (address + length) / page * page;
    if begin < end {
        // SAFETY: the pages lie within words to which the caller has shared references, and any value of a word is
        // valid at any time. If the call fails the words are unchanged.
        unsafe {
            libc::madvise(start.wrapping_add(begin - address).cast(), end - begin, libc::MADV_DONTNEED)
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn words_given_back_read_as_zero_and_can_be_stored_again() {
        let words: Vec<AtomicU64> = (1..=5 * 512).map(AtomicU64::new).collect();
        // In unordered pieces, none of which fills a page.
        let pieces = [2, 0, 5, 4, 1, 3].map(|n| &words[100 + n * 256..100 + (n + 1) * 256]);
        give_back(pieces.into_iter());
        let values = || words.iter().map(|word| word.load(Ordering::Relaxed));
        let zeros = values().filter(|value| *value == 0).count();
        assert_eq!(zeros % 512, 0);
        assert!((2 * 512..=3 * 512).contains(&zeros), "{zeros} words: all pages within the range");
        assert!(values().zip(1..).all(|(value, before)| value == 0 || value == before));
        assert!(values().take(100).chain(values().skip(100 + 3 * 512)).all(|value| value != 0));
        words.iter().zip(7..).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        assert!(values().zip(7..).all(|(value, stored)| value == stored));
        give_back([&words[..3], &words[4..5]].into_iter());
        assert_eq!(values().next(), Some(7), "less than a page stays");
    }
}
