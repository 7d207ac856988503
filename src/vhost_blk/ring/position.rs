//! Positions in a packed ring (virtio 1.2, 2.8.1): a descriptor, and the lap.
//!
//! Pure arithmetic. Each side goes round the ring, and its wrap counter flips at the end of each lap. Two positions of
//! one ring are less than two laps apart.

/// A position in a packed ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    index: u16,
    wrap: bool,
}

/// The wrap counter in a position's 16 bits; the descriptor is in the others.
const WRAP: u16 = 1 << 15;

impl Position {
    /// Where both sides begin.
    pub const START: Self = Position { index: 0, wrap: true };

    /// A descriptor in a lap with this wrap counter.
    pub fn new(index: u16, wrap: bool) -> Self {
        Position { index, wrap }
    }

    /// The form of event suppression and of vhost-user's messages: the descriptor in bits 0 to 14, the wrap counter in
    /// bit 15.
    pub fn from_bits(bits: u16) -> Self {
        Position { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    /// As [`Position::from_bits`] reads it. The index is below 32,768.
    pub fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// The descriptor.
    pub fn index(self) -> u16 {
        self.index
    }

    /// The wrap counter.
    pub fn wrap(self) -> bool {
        self.wrap
    }

    /// So many descriptors further in a ring of `size`. At most `size`.
    #[inline]
    #[must_use]
    pub fn advance(self, descriptors: u16, size: u16) -> Self {
        // Both are at most 32,768, and the index is less.
        let index = self.index + descriptors;
        if index < size {
            Position { index, ..self }
        } else {
            Position { index: index - size, wrap: !self.wrap }
        }
    }

    /// So many descriptors back in a ring of `size`. At most `size`.
    #[inline]
    #[must_use]
    pub fn retreat(self, descriptors: u16, size: u16) -> Self {
        if descriptors <= self.index {
            Position { index: self.index - descriptors, ..self }
        } else {
            Position { index: self.index + (size - descriptors), wrap: !self.wrap }
        }
    }

    /// Descriptors from here on to `other` in a ring of `size`: 0 to 2 × `size` - 1. Both are in the ring.
    #[inline]
    pub fn distance(self, other: Position, size: u16) -> u32 {
        let laps = 2 * u32::from(size);
        let place = |position: Position| u32::from(position.index) + if position.wrap { 0 } else { laps / 2 };
        let ahead = place(other) + laps - place(self);
        if ahead < laps { ahead } else { ahead - laps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_go_round_and_come_back() {
        for size in [1, 2, 3, 7, 128, 32768] {
            let mut at = Position::START;
            for step in
                [1, 1, size / 2, size, size - 1, 1, size].into_iter().filter(|step| (1..=size).contains(step))
            {
                let next = at.advance(step, size);
                assert!(next.index() < size);
                assert_eq!(next.retreat(step, size), at, "{size}, {step}");
                assert_eq!(at.distance(next, size), u32::from(step), "{size}, {step}");
                assert_eq!(next.distance(at, size), 2 * u32::from(size) - u32::from(step));
                assert_eq!(Position::from_bits(next.bits()), next);
                at = next;
            }
            assert_eq!(at.distance(at, size), 0);
        }
    }

    #[test]
    fn bits_are_those_of_the_messages() {
        assert_eq!(Position::START.bits(), 0x8000);
        assert_eq!(Position::new(5, false).bits(), 5);
        assert_eq!(Position::from_bits(0xffff), Position::new(0x7fff, true));
    }
}
