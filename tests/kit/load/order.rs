//! The order of the blocks of a range.

use crate::random::{Random, mix};

/// The order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other; each queue has a contiguous part of the range, and starts over at its end.
    Sequential,
    /// At random, with repeats; every queue covers the whole range.
    Random,
    /// At random, every block exactly once before any repeats; the queues share the blocks out.
    RandomOnce,
}

/// A random-looking one-to-one map of `0..count` onto itself, without a table: a four-round Feistel network on the
/// next even number of bits. A result outside the range is mapped again until it falls inside, at most four times
/// on average.
#[derive(Clone, Debug)]
pub struct Permutation {
    count: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    /// The permutation of `0..count` for a seed.
    pub fn new(count: u64, seed: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        let mut random = Random::new(seed);
        let keys = std::array::from_fn(|_| random.next_bits());
        Self { count, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// The image of `index`.
    ///
    /// # Panics
    /// When `index` is not below the count.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.count, "the permutation has {} places", self.count);
        let mut value = index;
        loop {
            value = self.round_trip(value);
            if value < self.count {
                return value;
            }
        }
    }

    fn round_trip(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The blocks of one queue in order, numbered from 0 in the range.
#[derive(Clone, Debug)]
pub(super) enum Blocks {
    Sequential { first: u64, count: u64, next: u64 },
    Random { random: Random, count: u64 },
    Once { permutation: Permutation, first: u64, count: u64, next: u64 },
}

impl Blocks {
    /// Queue `queue` of `queues` over `count` blocks.
    pub fn new(order: Order, count: u64, seed: u64, queue: u64, queues: u64) -> Self {
        // Widened: the product of the counts of blocks and of queues may exceed 64 bits.
        let share = |queue: u64| (u128::from(count) * u128::from(queue) / u128::from(queues)) as u64;
        let first = share(queue);
        let part = share(queue + 1) - first;
        match order {
            Order::Sequential => Self::Sequential { first, count: part, next: 0 },
            Order::Random => Self::Random { random: Random::new(mix(seed ^ (queue << 32))), count },
            Order::RandomOnce => {
                Self::Once { permutation: Permutation::new(count, seed), first, count: part, next: 0 }
            }
        }
    }

    /// How many blocks come before the first one repeats.
    pub fn count(&self) -> u64 {
        match self {
            Self::Sequential { count, .. } | Self::Random { count, .. } | Self::Once { count, .. } => *count,
        }
    }

    pub fn next(&mut self) -> u64 {
        let advance = |next: &mut u64, count: u64| {
            let index = *next;
            *next = if index + 1 == count { 0 } else { index + 1 };
            index
        };
        match self {
            Self::Sequential { first, count, next } => *first + advance(next, *count),
            Self::Random { random, count } => random.below(*count),
            Self::Once { permutation, first, count, next } => permutation.at(*first + advance(next, *count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_permutation_hits_everything_once() {
        for count in [1, 2, 3, 15, 16, 17, 1000, 4097] {
            let permutation = Permutation::new(count, 42);
            let hit: BTreeSet<u64> = (0..count).map(|index| permutation.at(index)).collect();
            assert_eq!(hit.len() as u64, count);
            assert_eq!(hit.last(), Some(&(count - 1)));
        }
        let permutation = Permutation::new(1000, 1);
        assert!(
            (0..1000).filter(|index| permutation.at(*index) == *index).count() < 20,
            "it does not look random"
        );
        assert!(Permutation::new(u64::MAX, 1).at(5) < u64::MAX);
    }

    #[test]
    fn queues_share_the_blocks_out() {
        for order in [Order::Sequential, Order::RandomOnce] {
            let mut hit = BTreeSet::new();
            for queue in 0..3 {
                let mut blocks = Blocks::new(order, 100, 9, queue, 3);
                for _ in 0..blocks.count() {
                    assert!(hit.insert(blocks.next()), "no block comes twice");
                }
            }
            assert_eq!(hit.len(), 100);
        }
        let mut random = Blocks::new(Order::Random, 10, 9, 0, 2);
        assert!((0..1000).all(|_| random.next() < 10));
    }
}
