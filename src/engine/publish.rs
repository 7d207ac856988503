//! Publishes the new words of a cluster whose entry has changed, in the map and in a fill of its slice under way.

use qcow2::{GuestCluster, HostPlace, L2Entry, SubclusterSet, Subclusters};

use crate::map::{ChainMap, SliceIndex, SubclusterMap};
use crate::state::State;
use crate::word::{FileIndex, Word};

impl State {
    /// Publishes the words of a cluster of the top image that has just got this entry.
    pub fn publish_entry(&mut self, map: &ChainMap, cluster: GuestCluster, entry: L2Entry) {
        let nothing_below = !self.has_backing();
        let file = self.top_qcow2().data();
        let (word, second) = match entry {
            L2Entry::Data { offset, copied } => (Word::data(file, offset, copied), SubclusterMap::default()),
            L2Entry::Zero | L2Entry::ZeroAllocated { .. } => (Word::ZERO, SubclusterMap::default()),
            L2Entry::Subclusters(subclusters) => {
                words_of(file, &subclusters, nothing_below, |host| host.copied)
            }
            L2Entry::Unallocated if nothing_below => (Word::ZERO, SubclusterMap::default()),
            L2Entry::Unallocated | L2Entry::Compressed { .. } => (Word::MIXED, SubclusterMap::default()),
        };
        self.publish(map, cluster, word, second);
    }

    /// Publishes a cluster's new words: in the map if its slice is resident, and in a fill of its slice under way.
    pub fn publish(&mut self, map: &ChainMap, cluster: GuestCluster, word: Word, second: SubclusterMap) {
        self.map_writer.publish(map, cluster, word, second);
        let slice = SliceIndex::of(cluster);
        if let Some(job) = self.fills.get_mut(&slice) {
            let at = (cluster.0 - slice.first().0) as u16;
            job.set(at, word, second);
            job.open.retain(|open| *open != at);
        }
    }

    /// The words of the slice of a cluster are resolved again when they are needed.
    pub fn forget_words(&mut self, map: &ChainMap, cluster: GuestCluster) {
        let slice = SliceIndex::of(cluster);
        self.map_writer.forget_slice(map, slice);
        self.fills.remove(&slice);
    }
}

/// The map's words for a cluster of subclusters, from its own entry alone.
pub(crate) fn words_of(
    file: FileIndex,
    subclusters: &Subclusters,
    nothing_below: bool,
    in_place: impl FnOnce(HostPlace) -> bool,
) -> (Word, SubclusterMap) {
    let second = SubclusterMap::new(subclusters, nothing_below);
    match subclusters.host {
        _ if second == SubclusterMap::ZERO => (Word::ZERO, SubclusterMap::default()),
        // As in a fill, so that a slice written in small pieces becomes a run, too.
        Some(host) if subclusters.allocated == SubclusterSet::ALL => {
            (Word::data(file, host.offset, in_place(host)), SubclusterMap::default())
        }
        Some(host) => (Word::subclusters(file, host.offset, in_place(host)), second),
        // Only some subclusters read as zero.
        None => (Word::MIXED, SubclusterMap::default()),
    }
}
