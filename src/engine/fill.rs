//! The unfinished fill of a slice of the map. It waits for tables; resolve.rs continues it.

use crate::map::SubclusterMap;
use crate::word::Word;

/// A fill of a slice under way. The results of the layers above `layer` are final. So only the tables of one layer need
/// be in the cache at a time, however deep the chain is and whatever other fills run.
pub(crate) struct FillJob {
    pub words: Vec<Word>,
    /// The second words, if the map has some.
    pub seconds: Vec<SubclusterMap>,
    /// Clusters of the slice that no layer has resolved yet.
    pub open: Vec<u16>,
    /// The next layer to search.
    pub layer: usize,
}

impl FillJob {
    /// A fill of a slice of `count` clusters, about which nothing is known yet.
    pub fn new(count: u64, has_subclusters: bool) -> Self {
        let seconds =
            if has_subclusters { vec![SubclusterMap::default(); count as usize] } else { Vec::new() };
        let open = (0..count as u16).collect();
        FillJob { words: vec![Word::UNRESOLVED; count as usize], seconds, open, layer: 0 }
    }

    /// Sets the words of cluster number `at` of the slice.
    pub fn set(&mut self, at: u16, word: Word, second: SubclusterMap) {
        self.words[usize::from(at)] = word;
        if let Some(stored) = self.seconds.get_mut(usize::from(at)) {
            *stored = second;
        }
    }
}
