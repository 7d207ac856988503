//! Aimed clusters: the host clusters to which this session sent data I/O.
//!
//! A set that only grows, with one bit a cluster in chunks of neighbours. Its memory is bounded: at the bound, each bit
//! comes to stand for 8 neighbours, then for 64, and so on. Membership is then no longer certain. That is safe for
//! keeping metadata away from a cluster, but it proves nothing.

use crate::bounds::{AIMED_CHUNK_BITS, AIMED_CHUNKS_MAX};
use crate::hashed::HashMap;
use crate::run::HostRun;

/// Words of a chunk.
const WORDS: usize = AIMED_CHUNK_BITS as usize / 64;
/// When memory runs out, 2^this bits become one. Merging only two at a time would scan every bit more often.
const COARSER_BY: u32 = 3;

/// Whether a cluster is in the set, as far as known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It is not in the set.
    Not,
    /// It, or a neighbour, is in the set.
    Perhaps,
    /// It is in the set.
    Surely,
}

#[derive(Default)]
pub(crate) struct Aimed {
    chunks: HashMap<u64, [u64; WORDS]>,
    /// A bit stands for 2^this clusters.
    shift: u32,
}

impl Aimed {
    /// Adds a run.
    pub fn add(&mut self, run: HostRun) {
        if run.count == 0 {
            return;
        }
        let (first, last) = (run.start.0, run.start.0 + run.count - 1);
        let mut bit = first >> self.shift;
        while bit <= last >> self.shift {
            let past = ((bit / AIMED_CHUNK_BITS + 1) * AIMED_CHUNK_BITS).min((last >> self.shift) + 1);
            let chunk = self.chunks.entry(bit / AIMED_CHUNK_BITS).or_default();
            (bit..past).for_each(|bit| set(chunk, bit));
            bit = past;
        }
        while self.chunks.len() > AIMED_CHUNKS_MAX {
            self.coarsen();
        }
    }

    /// Makes each bit stand for more clusters.
    fn coarsen(&mut self) {
        let finer = std::mem::take(&mut self.chunks);
        for (number, bits) in finer {
            let first = number * AIMED_CHUNK_BITS;
            for (word, mut left) in (0..).zip(bits) {
                while left != 0 {
                    let bit = (first + word * 64 + u64::from(left.trailing_zeros())) >> COARSER_BY;
                    set(self.chunks.entry(bit / AIMED_CHUNK_BITS).or_default(), bit);
                    left &= left - 1;
                }
            }
        }
        self.shift += COARSER_BY;
    }

    /// Whether a cluster is in the set, as far as known.
    pub fn knows(&self, cluster: u64) -> Known {
        let bit = cluster >> self.shift;
        let at = bit % AIMED_CHUNK_BITS;
        let chunk = self.chunks.get(&(bit / AIMED_CHUNK_BITS));
        match chunk.is_some_and(|chunk| chunk[at as usize / 64] >> (at % 64) & 1 == 1) {
            false => Known::Not,
            true if self.shift > 0 => Known::Perhaps,
            true => Known::Surely,
        }
    }

    /// The first cluster past those that share the bit of `cluster`.
    pub fn past_neighbours(&self, cluster: u64) -> u64 {
        ((cluster >> self.shift) + 1) << self.shift
    }
}

/// Sets a bit in its chunk.
fn set(chunk: &mut [u64; WORDS], bit: u64) {
    let at = bit % AIMED_CHUNK_BITS;
    chunk[at as usize / 64] |= 1 << (at % 64);
}

#[cfg(test)]
mod tests {
    use qcow2::HostCluster;

    use super::*;

    fn run(start: u64, count: u64) -> HostRun {
        HostRun { start: HostCluster(start), count }
    }

    #[test]
    fn aimed_clusters_are_remembered() {
        let mut aimed = Aimed::default();
        for (start, count) in [(0, 1), (500, 40), (1 << 40, 64), (7, 0)] {
            aimed.add(run(start, count));
        }
        let held = [0, 1, 7, 499, 500, 511, 512, 539, 540, 1 << 40, (1 << 40) + 63, (1 << 40) + 64];
        let expected =
            [true, false, false, false, true, true, true, true, false, true, true, false].map(|held| {
                match held {
                    true => Known::Surely,
                    false => Known::Not,
                }
            });
        assert_eq!(held.map(|cluster| aimed.knows(cluster)), expected);
    }

    #[test]
    fn past_the_memory_bound_no_cluster_is_certain() {
        let mut aimed = Aimed::default();
        let far = AIMED_CHUNK_BITS * 1000;
        for number in 0..=AIMED_CHUNKS_MAX as u64 {
            aimed.add(run(number * far, 1));
        }
        assert!(aimed.chunks.len() <= AIMED_CHUNKS_MAX && aimed.shift > 0);
        let size = 1 << aimed.shift;
        let last = AIMED_CHUNKS_MAX as u64 * far;
        for number in [0, far, last] {
            assert_eq!(aimed.knows(number), Known::Perhaps);
            assert_eq!(aimed.knows(number + size), Known::Not);
            assert_eq!(aimed.past_neighbours(number + 1), number / size * size + size);
        }
        aimed.add(run(last + size + 1, 2 * size));
        let around = [last + size, last + 4 * size].map(|cluster| aimed.knows(cluster));
        assert_eq!(around, [Known::Perhaps, Known::Not]);
    }

    #[test]
    fn coarser_bits_forget_no_cluster() {
        let mut aimed = Aimed::default();
        let mut added = Vec::new();
        for n in 0..200 {
            added.push(n * n * 37 % 100_003);
            aimed.add(run(added[n as usize], 1));
            if n % 50 == 49 {
                aimed.coarsen();
            }
            assert!(added.iter().all(|cluster| aimed.knows(*cluster) != Known::Not), "{n}");
        }
    }
}
