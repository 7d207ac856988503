//! The random numbers of all tests and simulations: a small generator whose whole sequence follows from its seed.
//! //! It never asks the host for randomness, so a seed is enough to repeat a run. Recorded seeds (tests/cases/gallery, the
//! crash machine) rely on this very sequence.
#![forbid(unsafe_code)]

/// A SplitMix64 generator: fast, and any seed is a good one.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Self {
        Random { state: seed }
    }

    /// The next 64 random bits.
    pub fn next_bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number below `bound`; 0 if `bound` is 0. Its bias is far below what a test or a benchmark can see.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The high half of the product.
        ((u128::from(self.next_bits()) * u128::from(bound)) >> 64) as u64
    }

    /// True `part` times in `whole`.
    pub fn chance(&mut self, part: u64, whole: u64) -> bool {
        self.below(whole) < part
    }

    /// One of the items.
    ///
    /// # Panics
    /// When there are no items.
    pub fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }

    /// A separate generator for a part of the work, so that its draws do not shift any others.
    pub fn fork(&mut self) -> Random {
        Random::new(self.next_bits())
    }
}

/// Spreads every bit of `value` over all bits of the result, one to one.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_sequence_and_numbers_stay_below_their_bound() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..200).map(|_| random.below(7)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_eq!(Random::new(1).next_bits(), 0x910a_2dec_8902_5cc1, "recorded seeds keep their meaning");
        assert_ne!(draw(1), draw(2));
        for number in 0..7 {
            assert!(draw(3).contains(&number), "{number} never comes");
        }
        assert!(draw(3).iter().all(|number| *number < 7));
        let mut random = Random::new(4);
        let hits = (0..1000).filter(|_| random.chance(1, 4)).count();
        assert!((150..350).contains(&hits), "{hits} of 1000 at one in four");
    }
}
