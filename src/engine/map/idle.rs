//! Releases memory of the map that no reader uses any more.
//!
//! A sweep evicts the slice of a frame that no reader used since the sweep before, as the clock does. The caller
//! ([`crate::IdleMap`]) then releases the memory of the frame's pages and returns the frame. Until then, no slice gets
//! the frame. A late reader finds the old contents or zeros. Zeros are safe: a zero word is unresolved, and a zero
//! second word means that no subcluster is known. No address ever becomes invalid.

use super::{ChainMap, MapWriter};
use crate::bounds::MAP_SWEPT_AT_ONCE as SWEPT_AT_ONCE;
use crate::sync::{AtomicU64, Ordering};

/// The result of a sweep.
pub(crate) struct Swept {
    /// Frames without a slice; the caller owns them until [`MapWriter::take_back`].
    pub frames: Vec<usize>,
    /// Where the next sweep continues; `None` at the end.
    pub next: Option<usize>,
}

impl MapWriter {
    /// Evicts slices that no reader used since the last sweep, from some frames from number `from` on.
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

    /// Number of frames with memory, less one that always stays for the clock.
    fn sweepable(&self) -> usize {
        (self.owners.len() - self.bare.len() - self.away).saturating_sub(1)
    }

    /// Takes back the frames of a sweep, without memory. The host allocates it again on their next use.
    pub fn take_back(&mut self, map: &ChainMap, frames: &[usize]) {
        self.away -= frames.len();
        self.bare.extend(frames);
        self.note_sweepable(map);
    }

    /// To be called wherever [`MapWriter::sweepable`] may have changed to or from 0.
    pub(super) fn note_sweepable(&self, map: &ChainMap) {
        map.sweepable.store(self.sweepable() > 0, Ordering::SeqCst);
    }
}

impl ChainMap {
    /// True if a sweep would find frames, provided that no reader uses the map.
    pub fn is_sweepable(&self) -> bool {
        self.sweepable.load(Ordering::SeqCst)
    }

    /// The pages of a frame.
    pub fn pages(&self, frame: usize) -> impl Iterator<Item = &[AtomicU64]> {
        (0..self.pages_a_frame()).filter_map(move |page| self.page(frame, page)).map(|words| &words[..])
    }
}
