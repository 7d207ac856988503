//! What the map gives back of its memory once nobody uses it.
//!
//! A frame whose slice no reader used between two sweeps loses it, as by the clock. Its pages then go to whoever asked
//! ([`crate::IdleMap`]), to have their memory taken away and be handed back; until that, no slice gets the frame. A
//! reader that is late finds what was there, or zeros, and those say nothing: a word of zeros is unresolved, and of the
//! subclusters of a second word none is known. No address ever ceases to be valid.

use super::{ChainMap, MapWriter};
use crate::bounds::MAP_SWEPT_AT_ONCE as SWEPT_AT_ONCE;
use crate::sync::{AtomicU64, Ordering};

/// What a sweep found.
pub(crate) struct Swept {
    /// Frames that hold no slice; the caller has them until [`MapWriter::take_back`].
    pub frames: Vec<usize>,
    /// Where the next sweep is to go on, if that was not all.
    pub next: Option<usize>,
}

impl MapWriter {
    /// Takes slices that no reader used since the last sweep out of some frames, from number `from` on.
    pub fn sweep(&mut self, map: &ChainMap, from: usize) -> Swept {
        let end = (from + SWEPT_AT_ONCE).min(self.owners.len());
        for number in from..end {
            let Some(slice) = self.owners[number].slice else { continue };
            if !map.referenced[number].swap(false, Ordering::Relaxed) {
                self.forget(map, number, slice);
                self.free.push(number);
            }
        }
        let count = self.free.len().min(SWEPT_AT_ONCE).min(self.sweepable());
        let frames = self.free.split_off(self.free.len() - count);
        self.away += count;
        self.note_sweepable(map);
        Swept { frames, next: (end < self.owners.len()).then_some(end) }
    }

    /// Frames with memory, but for one that stays, so that the clock finds one whatever is away.
    fn sweepable(&self) -> usize {
        (self.owners.len() - self.bare.len() - self.away).saturating_sub(1)
    }

    /// Frames of a sweep come back, without their memory: it comes back when they are used again.
    pub fn take_back(&mut self, map: &ChainMap, frames: &[usize]) {
        self.away -= frames.len();
        self.bare.extend(frames);
        self.note_sweepable(map);
    }

    /// To be called wherever [`MapWriter::sweepable`] may have become 0, or ceased to be.
    pub(super) fn note_sweepable(&self, map: &ChainMap) {
        map.sweepable.store(self.sweepable() > 0, Ordering::SeqCst);
    }
}

impl ChainMap {
    /// Whether a sweep would give anything if nobody used the map.
    pub fn is_sweepable(&self) -> bool {
        self.sweepable.load(Ordering::SeqCst)
    }

    /// The pages of a frame.
    pub fn pages(&self, frame: usize) -> impl Iterator<Item = &[AtomicU64]> {
        (0..self.pages_a_frame()).filter_map(move |page| self.page(frame, page)).map(|words| &words[..])
    }
}
