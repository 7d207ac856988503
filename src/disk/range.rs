//! A range of bytes of a disk or of a file.

use qcow2::HostRange;

/// Some bytes from an offset on; perhaps none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteRange {
    /// Offset of the first byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl From<HostRange> for ByteRange {
    fn from(range: HostRange) -> Self {
        ByteRange::new(range.offset.0, range.length)
    }
}

impl ByteRange {
    pub const fn new(offset: u64, length: u64) -> Self {
        ByteRange { offset, length }
    }

    /// The bytes from `start` to before `end`; none if `end` is not past `start`.
    pub const fn between(start: u64, end: u64) -> Self {
        ByteRange { offset: start, length: end.saturating_sub(start) }
    }

    /// Offset of the first byte past the range.
    pub const fn end(self) -> u64 {
        self.offset + self.length
    }

    pub const fn is_empty(self) -> bool {
        self.length == 0
    }

    /// The part of the range from an offset on.
    pub fn starting_at(self, offset: u64) -> Self {
        ByteRange::between(self.offset.max(offset), self.end())
    }

    /// The part of the range before an offset.
    pub fn before(self, offset: u64) -> Self {
        ByteRange::between(self.offset, self.end().min(offset))
    }

    /// The whole blocks in the range; none may be.
    pub fn whole_blocks(self, block: u64) -> Self {
        ByteRange::between(self.offset.next_multiple_of(block), self.end() / block * block)
    }

    /// All blocks that the range touches; none if it is empty.
    pub fn around_blocks(self, block: u64) -> Self {
        if self.is_empty() {
            return self;
        }
        ByteRange::between(self.offset / block * block, self.end().next_multiple_of(block))
    }

    /// The range in pieces of `size` bytes, the last perhaps shorter.
    pub fn pieces(self, size: u64) -> impl Iterator<Item = ByteRange> {
        let starts = (0..self.length).step_by(size as usize);
        starts.map(move |done| ByteRange::new(self.offset + done, size.min(self.length - done)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_and_split_exactly() {
        let range = ByteRange::new(1000, 3000);
        assert_eq!(range.whole_blocks(512), ByteRange::between(1024, 3584));
        assert!(ByteRange::new(100, 600).whole_blocks(512).is_empty(), "no whole block");
        assert_eq!(ByteRange::new(512, 512).whole_blocks(512), ByteRange::new(512, 512));
        assert_eq!(range.around_blocks(512), ByteRange::between(512, 4096));
        assert!(ByteRange::new(7, 0).around_blocks(512).is_empty());
        assert_eq!((range.starting_at(0), range.starting_at(2000)), (range, ByteRange::between(2000, 4000)));
        assert!(range.starting_at(5000).is_empty() && range.before(500).is_empty());
        assert_eq!((range.before(9000), range.before(2000)), (range, ByteRange::between(1000, 2000)));
        let pieces: Vec<_> = range.pieces(1024).map(|piece| (piece.offset, piece.length)).collect();
        assert_eq!(pieces, [(1000, 1024), (2024, 1024), (3048, 952)]);
        assert_eq!(ByteRange::new(7, 0).pieces(512).count(), 0);
    }
}
