//! Blocks that describe themselves, so that a read can be checked without a record of the writes.
//!
//! A sector's contents follow from its offset on the disk and a seed. So a check finds a sector that is misplaced,
//! torn inside or from another run. Two writes of one block are the same, so racing writes are harmless.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::random::mix;

/// 64-bit words in a sector.
const WORDS: usize = 64;

/// Word `index` of the sector that begins at byte `offset`.
fn word(seed: u64, offset: u64, index: u64) -> u64 {
    // The first word is the sector's offset in plain form, for people who read a dump.
    if index == 0 { offset } else { mix(seed ^ offset.rotate_left(17) ^ index) | 1 }
}

/// Fills a block, given as words, for byte `offset` on the disk.
pub fn stamp_block(words: &[AtomicU64], seed: u64, offset: u64) {
    for (index, place) in words.iter().enumerate() {
        let sector = offset + (index / WORDS * WORDS * 8) as u64;
        place.store(word(seed, sector, (index % WORDS) as u64), Ordering::Relaxed);
    }
}

/// Whether a block, given as words, is what [`stamp_block`] writes for this offset. If `zero_allowed`, each of its
/// sectors may also be zero.
pub fn check_block(words: &[AtomicU64], seed: u64, offset: u64, zero_allowed: bool) -> bool {
    words.chunks(WORDS).enumerate().all(|(number, sector)| {
        let at = offset + (number * WORDS * 8) as u64;
        let load = |place: &AtomicU64| place.load(Ordering::Relaxed);
        // The last word of a stamped sector is never 0, so it distinguishes the two cases.
        if zero_allowed && sector.last().map(load) == Some(0) {
            return sector.iter().all(|place| load(place) == 0);
        }
        sector.iter().enumerate().all(|(index, place)| load(place) == word(seed, at, index as u64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_verifies_in_its_place_only() {
        let block: Vec<AtomicU64> = (0..512).map(|_| AtomicU64::new(0)).collect();
        assert!(check_block(&block, 1, 0, true));
        assert!(!check_block(&block, 1, 0, false), "offset 0 is stamped with more than zeroes");
        stamp_block(&block, 1, 8192);
        assert!(check_block(&block, 1, 8192, false));
        assert!(!check_block(&block, 1, 4096, true));
        assert!(!check_block(&block, 2, 8192, true));
        block[64..128].iter().for_each(|word| word.store(0, Ordering::Relaxed));
        assert!(check_block(&block, 1, 8192, true), "a sector may be zero");
        assert!(!check_block(&block, 1, 8192, false));
        block[130].store(0, Ordering::Relaxed);
        assert!(!check_block(&block, 1, 8192, true), "part of a sector may not");
    }
}
