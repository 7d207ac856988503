//! The record of touched clusters, which the search for leaks must leave alone. Its memory is bounded.

use crate::hashed::HashMap;

/// Clusters of a chunk of [`Touched`].
const CHUNK_CLUSTERS: u64 = 512;
/// The most chunks: enough for 2 TiB of 64 KiB clusters.
const CHUNKS_MAX: usize = 1 << 16;

/// The clusters whose count changed, or which lost a reference, since the disk was opened.
#[derive(Default)]
pub(crate) struct Touched {
    chunks: HashMap<u64, [u64; CHUNK_CLUSTERS as usize / 64]>,
}

impl Touched {
    /// Adds a cluster; false if there are too many.
    pub fn add(&mut self, cluster: u64) -> bool {
        let at = cluster % CHUNK_CLUSTERS;
        self.chunks.entry(cluster / CHUNK_CLUSTERS).or_default()[at as usize / 64] |= 1 << (at % 64);
        self.chunks.len() <= CHUNKS_MAX
    }

    pub fn contains(&self, cluster: u64) -> bool {
        let at = cluster % CHUNK_CLUSTERS;
        self.chunks
            .get(&(cluster / CHUNK_CLUSTERS))
            .is_some_and(|chunk| chunk[at as usize / 64] >> (at % 64) & 1 == 1)
    }
}
