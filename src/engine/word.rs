//! The 64-bit word of the chain map: where the whole chain has the data of one guest cluster of the top image.
//!
//! Owns the encoding only. A word is published with one atomic store and read with one atomic load.

use qcow2::HostOffset;

use crate::rules::places;

/// The number of an open file, chosen by its owner. It never changes while an engine lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIndex(pub u16);

/// Where the whole chain has the data of a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Not known yet: the engine must resolve it.
    Unresolved,
    /// Reads as zero. A write needs the engine: there may or may not be a host cluster.
    Zero,
    /// The whole cluster lies contiguously in one file.
    Data {
        /// The file.
        file: FileIndex,
        /// Where the cluster begins in it, a multiple of 512.
        offset: HostOffset,
        /// True if the cluster is the top image's own, with a refcount of one: it may be written in place. In a word the
        /// image is the one that was the top when the word was made.
        in_place: bool,
    },
    /// Subclusters, some of which lie in one host cluster or read as zero. A second word records the state of each:
    /// [`crate::Engine::lookup_subclusters`].
    Subclusters,
    /// Pieces from several places: the engine's extents list them.
    Mixed,
}

/// A [`Mapping`] in 64 bits: kind (63–62), in-place (61), file (60–47), offset in 512-byte units (46–0). A mixed
/// word in which any lower field is not 0 is a word of subclusters ([`Mapping::Subclusters`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(pub u64);

pub(crate) const KIND_SHIFT: u32 = 62;
const KIND_ZERO: u64 = 1;
const KIND_DATA: u64 = 2;
const KIND_MIXED: u64 = 3;
const IN_PLACE: u64 = 1 << 61;
const FILE_SHIFT: u32 = 47;
const FILE_MASK: u64 = (1 << 14) - 1;
const OFFSET_MASK: u64 = (1 << FILE_SHIFT) - 1;

/// The distance from a word of data to the next one in a run, in 512-byte units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step(pub u64);

impl Step {
    /// The step for clusters of 2^`bits` bytes, at least 512.
    pub fn of_cluster(bits: u32) -> Step {
        Step((1 << bits) / 512)
    }
}

impl Word {
    /// The word of [`Mapping::Unresolved`].
    pub const UNRESOLVED: Word = Word(0);
    /// The word of [`Mapping::Zero`].
    pub const ZERO: Word = Word(KIND_ZERO << KIND_SHIFT);
    /// The word of [`Mapping::Mixed`].
    pub const MIXED: Word = Word(KIND_MIXED << KIND_SHIFT);
    /// The most files that words can name.
    pub const FILES_MAX: usize = 1 << 14;

    /// The word of [`Mapping::Data`]; [`Word::MIXED`] where no word can hold the offset, because it is no multiple of
    /// 512 or past 2^56. Only a raw file or a hostile image has such offsets.
    pub fn data(file: FileIndex, offset: HostOffset, in_place: bool) -> Word {
        let units = offset.0 / 512;
        if !offset.0.is_multiple_of(512) || units > OFFSET_MASK || u64::from(file.0) > FILE_MASK {
            return Word::MIXED;
        }
        let place = if in_place { IN_PLACE } else { 0 };
        Word((KIND_DATA << KIND_SHIFT) | place | (u64::from(file.0) << FILE_SHIFT) | units)
    }

    /// The word of [`Mapping::Subclusters`] for a cluster at this offset; [`Word::MIXED`] where no word can hold the offset.
    pub fn subclusters(file: FileIndex, offset: HostOffset, in_place: bool) -> Word {
        let Word(data) = Word::data(file, offset, in_place);
        Word(data | Word::MIXED.0)
    }

    /// True for a word of [`Mapping::Subclusters`].
    #[inline]
    pub fn has_subclusters(self) -> bool {
        self.0 > Word::MIXED.0
    }

    /// The fields of a word of data or of subclusters: file, offset of the cluster, and whether it may be written in
    /// place.
    #[inline]
    pub fn place(self) -> (FileIndex, HostOffset, bool) {
        let file = FileIndex(((self.0 >> FILE_SHIFT) & FILE_MASK) as u16);
        (file, HostOffset((self.0 & OFFSET_MASK) * 512), self.0 & IN_PLACE != 0)
    }

    /// The word of the next cluster in a run: zeros after zeros, pieces after pieces, data where this data ends.
    /// `None` where there is no such word.
    pub(crate) fn next(self, step: Step) -> Option<Word> {
        match self.0 >> KIND_SHIFT {
            KIND_DATA if (self.0 & OFFSET_MASK) + step.0 <= OFFSET_MASK => Some(Word(self.0 + step.0)),
            KIND_DATA => None,
            _ => self.heads_run().then_some(self),
        }
    }

    /// True if the words of the following clusters can follow from this one ([`Word::next`]). The kind bits of such a
    /// word are not 0.
    #[inline]
    pub(crate) fn heads_run(self) -> bool {
        self.0 >> KIND_SHIFT != 0 && !self.has_subclusters()
    }

    /// The word `clusters` clusters further on in a run that begins with this word: [`Word::next`], applied that often.
    /// The caller knows that the run reaches that far.
    #[inline]
    pub(crate) fn in_run(self, clusters: u64, step: Step) -> Word {
        if self.0 >> KIND_SHIFT == KIND_DATA { Word(self.0 + clusters * step.0) } else { self }
    }

    /// Decodes the word. A place may be written only if it is in `writable`, the file with the top image's data: a word
    /// of a file that was the top before an overlay came stays true but for that.
    #[inline]
    pub fn mapping_over(self, writable: FileIndex) -> Mapping {
        self.decode(|in_place, file| places::may_write_in_place(in_place, file == writable))
    }

    /// Decodes the word.
    #[inline]
    pub fn mapping(self) -> Mapping {
        self.decode(|in_place, _| in_place)
    }

    #[inline]
    fn decode(self, may_write: impl FnOnce(bool, FileIndex) -> bool) -> Mapping {
        // Two bits are tested in turn, as a table of jumps takes more instructions.
        match (self.0 >> 63 != 0, self.0 & (1 << KIND_SHIFT) != 0) {
            (true, false) => {
                let (file, offset, in_place) = self.place();
                Mapping::Data { file, offset, in_place: may_write(in_place, file) }
            }
            (true, true) if self.has_subclusters() => Mapping::Subclusters,
            (true, true) => Mapping::Mixed,
            (false, true) => Mapping::Zero,
            (false, false) => Mapping::Unresolved,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        assert_eq!(Word::UNRESOLVED.mapping(), Mapping::Unresolved);
        assert_eq!(Word::ZERO.mapping(), Mapping::Zero);
        assert_eq!(Word::MIXED.mapping(), Mapping::Mixed);
        for file in [0, 1, 16383] {
            for offset in [0, 512, 65536, (1 << 56) - 512] {
                for in_place in [false, true] {
                    let word = Word::data(FileIndex(file), HostOffset(offset), in_place);
                    let expected =
                        Mapping::Data { file: FileIndex(file), offset: HostOffset(offset), in_place };
                    assert_eq!(word.mapping(), expected);
                    let subclusters = Word::subclusters(FileIndex(file), HostOffset(offset), in_place);
                    // Offset 0 holds data only in an external data file: elsewhere the header is there.
                    let named = file != 0 || offset != 0 || in_place;
                    assert_eq!(
                        subclusters.mapping(),
                        if named { Mapping::Subclusters } else { Mapping::Mixed }
                    );
                    assert_eq!(subclusters.place(), (FileIndex(file), HostOffset(offset), in_place));
                }
            }
        }
    }

    #[test]
    fn the_next_word_is_that_of_the_next_cluster() {
        let at = |offset, in_place| Word::data(FileIndex(3), HostOffset(offset), in_place);
        for in_place in [false, true] {
            assert_eq!(at(65536, in_place).next(Step(128)), Some(at(131072, in_place)));
            assert_eq!(at(65536, in_place).in_run(7, Step(128)), at(8 * 65536, in_place));
            let last = (1 << 56) - 65536;
            assert_eq!(at(last - 65536, in_place).next(Step(128)), Some(at(last, in_place)));
            assert_eq!(at(last, in_place).next(Step(128)), None, "it would have no word");
        }
        for word in [Word::ZERO, Word::MIXED] {
            assert!(word.heads_run());
            assert_eq!((word.next(Step(128)), word.in_run(7, Step(128))), (Some(word), word));
        }
        for word in [Word::UNRESOLVED, Word::subclusters(FileIndex(3), HostOffset(65536), true)] {
            assert!(!word.heads_run());
            assert_eq!(word.next(Step(128)), None);
        }
    }

    #[test]
    fn offsets_that_no_word_can_hold_are_mixed() {
        assert_eq!(Word::data(FileIndex(0), HostOffset(100), true), Word::MIXED);
        assert_eq!(Word::data(FileIndex(0), HostOffset(1 << 56), true), Word::MIXED);
        assert_eq!(Word::data(FileIndex(16384), HostOffset(512), true), Word::MIXED);
        assert_eq!(Word::subclusters(FileIndex(0), HostOffset(100), true), Word::MIXED);
    }
}
