//! The one source of chance in a simulation: a small generator whose whole sequence follows from its seed.
//!
//! It never asks the host for randomness, so that a seed is a full account of a run.

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

    /// A number below `bound`.
    ///
    /// # Panics
    /// When `bound` is 0: there is no such number.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "there is no number below 0");
        // The high half of the product: even enough for any bound that a test uses.
        ((u128::from(self.next_bits()) * u128::from(bound)) >> 64) as u64
    }

    /// True `part` times in `whole`.
    pub fn chance(&mut self, part: u64, whole: u64) -> bool {
        self.below(whole) < part
    }

    /// A generator of its own for a part of the work, so that what it draws does not shift anything else.
    pub fn fork(&mut self) -> Random {
        Random::new(self.next_bits())
    }
}

/// Spreads every bit of `value` over all bits of the result, one to one.
pub(crate) fn mix(value: u64) -> u64 {
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
