//! The unused clusters that may be allocated again, in bounded memory.
//!
//! Most are stored as runs. If there are too many runs, the last ones become bits of chunks, one bit a cluster. If
//! there are too many chunks as well, clusters are left out: not allocated again before the image is next opened.

use std::collections::BTreeMap;
use std::ops::Range;

use qcow2::HostCluster;

use crate::bounds::{
    FREE_CHUNK_CLUSTERS as CHUNK_CLUSTERS, FREE_CHUNKS_MAX as CHUNKS_MAX, FREE_RUNS_MAX as RUNS_MAX,
};
use crate::run::{FreeRun, HostRun};

/// Free bytes at the end of a file that mark it as not closed by its last writer. A clean close leaves fewer, to end at
/// a block of the host's file system.
pub(crate) const TAIL_BYTES: u64 = 64 << 10;

type Chunk = [u64; CHUNK_CLUSTERS as usize / 64];

/// Free clusters, each in a run, in a chunk, or left out.
pub(crate) struct FreeClusters {
    runs_max: usize,
    chunks_max: usize,
    /// Keyed by the first cluster.
    runs: BTreeMap<u64, FreeRun>,
    /// Keyed by number; no chunk is empty.
    chunks: BTreeMap<u64, Chunk>,
    left_out: bool,
}

impl Default for FreeClusters {
    fn default() -> Self {
        FreeClusters::with_room(RUNS_MAX, CHUNKS_MAX)
    }
}

impl FreeClusters {
    /// An empty set with room for this many runs and chunks.
    fn with_room(runs_max: usize, chunks_max: usize) -> Self {
        FreeClusters { runs_max, chunks_max, runs: BTreeMap::new(), chunks: BTreeMap::new(), left_out: false }
    }

    /// True if a cluster is known to be free.
    pub fn contains(&self, cluster: u64) -> bool {
        let before = self.runs.range(..=cluster).next_back();
        before.is_some_and(|(_, free)| cluster < free.run.start.0 + free.run.count) || self.has_bit(cluster)
    }

    /// True if clusters were left out: one with refcount zero that is not here may be such.
    pub fn has_left_out(&self) -> bool {
        self.left_out
    }

    /// True if there might be no room for one more cluster.
    pub fn is_full(&self) -> bool {
        self.runs.len() >= self.runs_max && self.chunks.len() >= self.chunks_max
    }

    /// The first stored run; if there is none, the first chunk becomes runs.
    pub fn first(&mut self) -> Option<FreeRun> {
        if self.runs.is_empty()
            && let Some((number, chunk)) = self.chunks.pop_first()
        {
            for run in runs_of(number, &chunk) {
                self.runs.insert(run.start.0, FreeRun { run, known_zero: false });
            }
        }
        self.runs.values().next().copied()
    }

    /// Takes up to `count` clusters from the front of the first run.
    pub fn take(&mut self, count: u64) -> Option<FreeRun> {
        let whole = self.first()?;
        self.runs.remove(&whole.run.start.0);
        if whole.run.count <= count {
            return Some(whole);
        }
        let start = HostCluster(whole.run.start.0 + count);
        let rest =
            FreeRun { run: HostRun { start, count: whole.run.count - count }, known_zero: whole.known_zero };
        self.runs.insert(start.0, rest);
        Some(FreeRun { run: HostRun { start: whole.run.start, count }, known_zero: whole.known_zero })
    }

    /// Adds a run and merges it with its neighbours. Clusters that are free already stay as they are.
    pub fn add(&mut self, added: FreeRun) {
        let mut start = added.run.start.0;
        let end = start + added.run.count;
        while start < end {
            if let Some((_, before)) = self.runs.range(..=start).next_back() {
                let before_end = before.run.start.0 + before.run.count;
                if before_end > start {
                    start = before_end;
                    continue;
                }
            }
            if self.has_bit(start) {
                start += 1;
                continue;
            }
            let next = self.runs.range(start..end).next().map_or(end, |(next, _)| *next);
            let next = self.first_bit(start..next);
            let run = HostRun { start: HostCluster(start), count: next - start };
            self.insert(FreeRun { run, known_zero: added.known_zero });
            start = next;
        }
        while self.runs.len() > self.runs_max {
            let (_, last) = self.runs.pop_last().expect("there are some");
            self.spill(last.run);
        }
    }

    /// Inserts a run that overlaps no other.
    fn insert(&mut self, mut added: FreeRun) {
        let start = added.run.start.0;
        if let Some((_, before)) = self.runs.range(..start).next_back().map(|(k, v)| (*k, *v))
            && before.run.start.0 + before.run.count == start
            && before.known_zero == added.known_zero
        {
            self.runs.remove(&before.run.start.0);
            added.run = HostRun { start: before.run.start, count: before.run.count + added.run.count };
        }
        let end = added.run.start.0 + added.run.count;
        if let Some(after) = self.runs.get(&end).copied()
            && after.known_zero == added.known_zero
        {
            self.runs.remove(&end);
            added.run.count += after.run.count;
        }
        self.runs.insert(added.run.start.0, added);
    }

    /// Turns a run into bits while there is room for chunks; leaves out the rest.
    fn spill(&mut self, run: HostRun) {
        let (mut cluster, end) = (run.start.0, run.start.0 + run.count);
        while cluster < end {
            let number = cluster / CHUNK_CLUSTERS;
            let past = ((number + 1) * CHUNK_CLUSTERS).min(end);
            if self.chunks.len() < self.chunks_max || self.chunks.contains_key(&number) {
                let chunk = self.chunks.entry(number).or_default();
                (cluster..past).for_each(|cluster| chunk[word_of(cluster)] |= bit_of(cluster));
            } else {
                self.left_out = true;
            }
            cluster = past;
        }
    }

    /// The start of the free clusters that end at `end`; `end` if the cluster before it is in use.
    pub fn start_of_last(&self, mut end: u64) -> u64 {
        loop {
            match self.runs.range(..end).next_back() {
                Some((start, last)) if start + last.run.count == end => end = *start,
                _ if end > 0 && self.has_bit(end - 1) => end -= 1,
                _ => return end,
            }
        }
    }

    fn has_bit(&self, cluster: u64) -> bool {
        let chunk = self.chunks.get(&(cluster / CHUNK_CLUSTERS));
        chunk.is_some_and(|chunk| chunk[word_of(cluster)] & bit_of(cluster) != 0)
    }

    /// The first of these clusters that is stored as a bit; their end if there is none.
    fn first_bit(&self, clusters: Range<u64>) -> u64 {
        let Range { start, end } = clusters;
        for (number, chunk) in self.chunks.range(start / CHUNK_CLUSTERS..end.div_ceil(CHUNK_CLUSTERS)) {
            let (from, past) = (number * CHUNK_CLUSTERS, (number + 1) * CHUNK_CLUSTERS);
            let found = (start.max(from)..end.min(past))
                .find(|cluster| chunk[word_of(*cluster)] & bit_of(*cluster) != 0);
            if let Some(found) = found {
                return found;
            }
        }
        end
    }
}

fn word_of(cluster: u64) -> usize {
    (cluster % CHUNK_CLUSTERS / 64) as usize
}

fn bit_of(cluster: u64) -> u64 {
    1 << (cluster % 64)
}

/// The runs of a chunk's bits.
fn runs_of(number: u64, chunk: &Chunk) -> Vec<HostRun> {
    let mut runs: Vec<HostRun> = Vec::new();
    let clusters = number * CHUNK_CLUSTERS..(number + 1) * CHUNK_CLUSTERS;
    for cluster in clusters.filter(|cluster| chunk[word_of(*cluster)] & bit_of(*cluster) != 0) {
        match runs.last_mut() {
            Some(last) if last.start.0 + last.count == cluster => last.count += 1,
            _ => runs.push(HostRun::one(HostCluster(cluster))),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u64, known_zero: bool) -> FreeRun {
        FreeRun { run: HostRun { start: HostCluster(start), count }, known_zero }
    }

    fn listed(free: &FreeClusters) -> Vec<(u64, u64, bool)> {
        free.runs.values().map(|f| (f.run.start.0, f.run.count, f.known_zero)).collect()
    }

    #[test]
    fn free_runs_merge_and_never_overlap() {
        let mut free = FreeClusters::with_room(16, 16);
        free.add(run(10, 5, true));
        free.add(run(20, 5, true));
        free.add(run(15, 5, true));
        assert_eq!(listed(&free), [(10, 15, true)]);
        free.add(run(5, 30, false));
        assert_eq!(listed(&free), [(5, 5, false), (10, 15, true), (25, 10, false)]);
        assert_eq!(free.take(3), Some(run(5, 3, false)));
        assert_eq!(free.take(100), Some(run(8, 2, false)));
        assert_eq!(free.take(100), Some(run(10, 15, true)));
    }

    #[test]
    fn the_free_end_goes_as_far_as_runs_follow_each_other() {
        let mut free = FreeClusters::with_room(16, 16);
        free.add(run(90, 10, true));
        free.add(run(80, 10, false));
        free.add(run(70, 5, false));
        free.add(run(120, 5, false));
        assert_eq!([100, 75, 79, 125].map(|end| free.start_of_last(end)), [80, 70, 79, 120]);
        assert_eq!(listed(&free).len(), 4, "it only looks");
    }

    #[test]
    fn the_free_end_goes_through_bits() {
        let mut free = FreeClusters::with_room(16, 16);
        free.spill(HostRun { start: HostCluster(500), count: 20 });
        free.add(run(520, 4, true));
        free.add(run(490, 10, false));
        assert_eq!(free.start_of_last(524), 490);
        assert_eq!(free.start_of_last(510), 490);
    }

    #[test]
    fn free_clusters_are_found_in_runs_and_chunks() {
        let mut free = FreeClusters::with_room(16, 16);
        free.add(run(10, 2, true));
        free.spill(HostRun::one(HostCluster(12)));
        assert_eq!([9, 10, 12, 13].map(|cluster| free.contains(cluster)), [false, true, true, false]);
        free.add(run(9, 5, true));
        assert_eq!(listed(&free), [(9, 3, true), (13, 1, true)]);
    }

    /// Every second cluster: memory is bounded, and each is found again exactly once.
    #[test]
    fn scattered_clusters_take_bounded_memory_and_come_back() {
        let (runs, chunks) = (100, 200);
        let many = runs + (chunks - 1) * CHUNK_CLUSTERS / 2;
        let mut free = FreeClusters::with_room(runs as usize, chunks as usize);
        (0..many).for_each(|number| free.add(run(2 * number, 1, true)));
        assert_eq!(
            (free.runs.len() as u64, free.chunks.len() as u64, free.has_left_out()),
            (runs, chunks, false)
        );
        let mut seen = vec![false; many as usize];
        while let Some(taken) = free.take(u64::MAX) {
            assert!(taken.run.count == 1 && taken.run.start.0.is_multiple_of(2), "{taken:?}");
            assert!(!std::mem::replace(&mut seen[taken.run.start.0 as usize / 2], true), "{taken:?}");
        }
        assert!(seen.iter().all(|seen| *seen));
    }

    #[test]
    fn clusters_past_both_bounds_are_left_out() {
        let (runs, chunks) = (10, 20);
        let mut free = FreeClusters::with_room(runs, chunks);
        let far = |number: u64| run(number * CHUNK_CLUSTERS, 1, true);
        let room = (runs + chunks) as u64;
        (0..room).for_each(|number| free.add(far(number)));
        assert!(free.is_full() && !free.has_left_out());
        free.add(far(room));
        assert!(free.has_left_out());
        let held = (0..=room).filter(|number| free.contains(number * CHUNK_CLUSTERS)).count() as u64;
        assert_eq!(held, room);
    }

    /// The memory if every second cluster of a 1 TiB disk is discarded and tree nodes are half empty.
    #[test]
    fn the_bounds_are_a_few_mebibytes() {
        let of_runs = RUNS_MAX * size_of::<(u64, FreeRun)>();
        let of_chunks = CHUNKS_MAX * size_of::<(u64, Chunk)>();
        assert!(2 * (of_runs + of_chunks) <= 8 << 20, "{of_runs}, {of_chunks}");
    }
}
