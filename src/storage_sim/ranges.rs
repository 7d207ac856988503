//! Sets of bytes of a file: the parts of an operation that took effect, are open, or survive a crash.
//!
//! Pure arithmetic; it knows no file.

use std::ops::Range;

use crate::Random;

/// The most blocks of a tear that are decided one by one; with more, whole runs are.
const BLOCKS_ONE_BY_ONE_MAX: u64 = 128;

/// A set of byte offsets, as sorted ranges that neither touch each other nor are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    ranges: Vec<Range<u64>>,
}

impl Ranges {
    /// No byte.
    pub fn none() -> Self {
        Self::default()
    }

    /// One range, or none if it is empty.
    pub fn one(range: Range<u64>) -> Self {
        if range.is_empty() { Self::none() } else { Ranges { ranges: vec![range] } }
    }

    /// True if there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().cloned()
    }

    /// Bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// The last offset of the set, plus one; 0 if it is empty.
    pub fn end(&self) -> u64 {
        self.ranges.last().map_or(0, |range| range.end)
    }

    /// The bytes that are in both.
    pub fn intersect(&self, other: &Ranges) -> Ranges {
        let mut common = Ranges::none();
        for a in &self.ranges {
            for b in &other.ranges {
                common.append(a.start.max(b.start)..a.end.min(b.end));
            }
        }
        common
    }

    /// The bytes that are not in `other`.
    pub fn without(&self, other: &Ranges) -> Ranges {
        let mut left = Ranges::none();
        for range in &self.ranges {
            let mut at = range.start;
            for hole in &other.ranges {
                if hole.end <= at || hole.start >= range.end {
                    continue;
                }
                left.append(at..hole.start.max(at));
                at = hole.end;
            }
            left.append(at..range.end.max(at));
        }
        left
    }

    /// A random part of the set, cut at multiples of `grain` bytes: a beginning, an end, all but one block, one block,
    /// or any blocks. May be empty or the whole.
    pub fn tear(&self, random: &mut Random, grain: u64) -> Ranges {
        let blocks: u64 = self.ranges.iter().map(|range| blocks_of(range, grain)).sum();
        if blocks == 0 {
            return Ranges::none();
        }
        let chosen = random.below(blocks);
        let shape = random.below(6);
        let mut coin = random.fork();
        let (mut run, mut kept) = (0, false);
        self.pick_blocks(grain, |number| match shape {
            0 => number < chosen,
            1 => number >= chosen,
            2 => number != chosen,
            3 => number == chosen,
            _ if blocks <= BLOCKS_ONE_BY_ONE_MAX => coin.chance(1, 2),
            _ => {
                if run == 0 {
                    (run, kept) = (1 + coin.below(blocks / 8), coin.chance(1, 2));
                }
                run -= 1;
                kept
            }
        })
    }

    /// The blocks of `grain` bytes, counted from 0 over the set, that `keep` accepts.
    fn pick_blocks(&self, grain: u64, mut keep: impl FnMut(u64) -> bool) -> Ranges {
        let (mut picked, mut number) = (Ranges::none(), 0);
        for range in &self.ranges {
            let mut at = range.start;
            while at < range.end {
                let next = (at / grain + 1).saturating_mul(grain).min(range.end);
                if keep(number) {
                    picked.append(at..next);
                }
                number += 1;
                at = next;
            }
        }
        picked
    }

    /// Adds a range behind all others, joining it with the last if they touch.
    fn append(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }
}

fn blocks_of(range: &Range<u64>, grain: u64) -> u64 {
    range.end.div_ceil(grain) - range.start / grain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[Range<u64>]) -> Ranges {
        let mut set = Ranges::none();
        for range in ranges {
            set.append(range.clone());
        }
        set
    }

    #[test]
    fn sets_are_cut_and_met_like_sets_of_numbers() {
        let sets = [
            set(&[]),
            Ranges::one(0..20),
            Ranges::one(7..8),
            set(&[0..3, 5..9, 12..20]),
            set(&[2..6, 8..13, 19..25]),
            set(&[3..5, 9..12]),
        ];
        let members =
            |set: &Ranges| (0..30).filter(|n| set.iter().any(|r| r.contains(n))).collect::<Vec<_>>();
        for a in &sets {
            assert_eq!(a.bytes(), members(a).len() as u64);
            assert_eq!(a.end(), members(a).last().map_or(0, |last| last + 1));
            for b in &sets {
                let (of_a, of_b) = (members(a), members(b));
                let common: Vec<u64> = of_a.iter().copied().filter(|n| of_b.contains(n)).collect();
                let rest: Vec<u64> = of_a.iter().copied().filter(|n| !of_b.contains(n)).collect();
                assert_eq!(members(&a.intersect(b)), common, "{a:?} and {b:?}");
                assert_eq!(members(&a.without(b)), rest, "{a:?} without {b:?}");
            }
        }
    }

    #[test]
    fn tears_are_parts_cut_at_the_grain() {
        let mut random = Random::new(5);
        let whole = set(&[100..1536, 2048..4096]);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..4000 {
            let torn = whole.tear(&mut random, 512);
            assert!(torn.without(&whole).is_empty());
            for range in torn.iter() {
                assert!(range.start % 512 == 0 || range.start == 100);
                assert!(range.end % 512 == 0);
            }
            seen.insert(format!("{torn:?}"));
        }
        // Seven blocks: 128 parts.
        assert!(seen.len() > 120, "only {} different tears", seen.len());
        let long = Ranges::one(0..1 << 40);
        assert!((0..100).all(|_| long.tear(&mut random, 1 << 30).bytes() <= 1 << 40));
        assert!(Ranges::none().tear(&mut random, 512).is_empty());
    }
}
