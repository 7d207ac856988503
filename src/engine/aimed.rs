//! Host clusters at which data I/O was aimed in this session.
//!
//! A set that only grows, a bit a cluster where the clusters lie together. Its memory is bounded: beyond that it holds
//! every cluster up to the last that was added, which is safe, as it is there to keep metadata away.

use crate::alloc::Run;
use crate::hashed::HashMap;

/// Clusters in a chunk.
const CHUNK_CLUSTERS: u64 = 512;
/// The most chunks: some 50 MiB with the table that they are in, and clusters enough for 16 TiB of 64 KiB each.
const CHUNKS_MAX: usize = 1 << 19;

#[derive(Default)]
pub(crate) struct Aimed {
    chunks: HashMap<u64, [u64; CHUNK_CLUSTERS as usize / 64]>,
    /// All clusters before this are in the set.
    below: u64,
    /// The first cluster past all that were added.
    end: u64,
}

impl Aimed {
    /// Adds a run.
    pub fn add(&mut self, run: Run) {
        let end = run.start.0 + run.count;
        self.end = self.end.max(end);
        if self.below > 0 {
            self.below = self.end;
            return;
        }
        let mut cluster = run.start.0;
        while cluster < end {
            let past = ((cluster / CHUNK_CLUSTERS + 1) * CHUNK_CLUSTERS).min(end);
            let chunk = self.chunks.entry(cluster / CHUNK_CLUSTERS).or_default();
            for cluster in cluster..past {
                let at = cluster % CHUNK_CLUSTERS;
                chunk[at as usize / 64] |= 1 << (at % 64);
            }
            cluster = past;
        }
        if self.chunks.len() > CHUNKS_MAX {
            self.chunks = HashMap::default();
            self.below = self.end;
        }
    }

    /// True if a cluster is in the set.
    pub fn contains(&self, cluster: u64) -> bool {
        let at = cluster % CHUNK_CLUSTERS;
        let bit = |chunk: &[u64; 8]| chunk[at as usize / 64] >> (at % 64) & 1 == 1;
        cluster < self.below || self.chunks.get(&(cluster / CHUNK_CLUSTERS)).is_some_and(bit)
    }
}

#[cfg(test)]
mod tests {
    use qcow2::HostCluster;

    use super::*;

    fn run(start: u64, count: u64) -> Run {
        Run { start: HostCluster(start), count }
    }

    #[test]
    fn it_holds_what_was_added() {
        let mut aimed = Aimed::default();
        for (start, count) in [(0, 1), (500, 1100), (1 << 40, 64)] {
            aimed.add(run(start, count));
        }
        let held =
            [0, 1, 499, 500, 511, 512, 1599, 1600, (1 << 40) - 1, 1 << 40, (1 << 40) + 63, (1 << 40) + 64];
        let expected = [true, false, false, true, true, true, true, false, false, true, true, false];
        assert_eq!(held.map(|cluster| aimed.contains(cluster)), expected);
    }

    #[test]
    fn scattered_clusters_take_bounded_memory() {
        let mut aimed = Aimed::default();
        for number in 0..=CHUNKS_MAX as u64 {
            aimed.add(run(number * CHUNK_CLUSTERS, 1));
        }
        assert!(aimed.chunks.is_empty());
        let last = CHUNKS_MAX as u64 * CHUNK_CLUSTERS;
        assert!(aimed.contains(1) && aimed.contains(last) && !aimed.contains(last + 1));
        aimed.add(run(last + 7, 1));
        assert!(aimed.contains(last + 6) && !aimed.contains(last + 8));
    }
}
