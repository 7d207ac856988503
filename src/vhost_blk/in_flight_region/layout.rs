//! The layout of the in-flight region: where each queue's area lies, and behind them the page and the journal that only
//! Strata uses.
//!
//! Pure arithmetic. The areas and their fields are those of the vhost-user specification ("Inflight I/O tracking"),
//! which leaves the space between areas to the back-end: here each begins at a multiple of 64 bytes, so that no two
//! workers share a cache line.

/// The kind of the rings whose requests a region records. The specification has an area of its own for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingKind {
    Split,
    Packed,
}

impl RingKind {
    /// Bytes of an area before its descriptor states.
    pub(super) const fn header_bytes(self) -> usize {
        match self {
            RingKind::Split => 16,
            RingKind::Packed => 32,
        }
    }

    /// Bytes of the state of one descriptor.
    pub(super) const fn entry_bytes(self) -> usize {
        match self {
            RingKind::Split => 16,
            RingKind::Packed => 32,
        }
    }
}

/// The areas begin at multiples of this.
const AREA_ALIGNMENT: usize = 64;
/// Strata's own page begins at a multiple of this and has this many bytes, whatever the host's pages are.
pub(super) const OWN_BYTES: usize = 4096;
/// Bytes of the device's journal behind that page. With records of 32 bytes there are some 32,000 changes between two
/// cuts of the metadata. Pages that are never used take no memory.
pub(super) const JOURNAL_BYTES: usize = 1 << 20;

/// The layout of a region for so many queues of so many descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The kind of all rings.
    pub kind: RingKind,
    /// Queues, from queue 0 on.
    pub queues: u16,
    /// Descriptor states in each queue's area.
    pub queue_size: u16,
}

impl Layout {
    /// The offset of a queue's area, in bytes.
    pub(super) fn queue_at(self, index: u16) -> usize {
        usize::from(index) * self.area_bytes()
    }

    /// Bytes from one area to the next.
    fn area_bytes(self) -> usize {
        let entries = usize::from(self.queue_size) * self.kind.entry_bytes();
        (self.kind.header_bytes() + entries).next_multiple_of(AREA_ALIGNMENT)
    }

    /// Bytes of all areas together: the least that any back-end needs.
    pub(super) fn areas_bytes(self) -> usize {
        self.queue_at(self.queues)
    }

    /// The offset of Strata's own page.
    pub(super) fn own_at(self) -> usize {
        self.areas_bytes().next_multiple_of(OWN_BYTES)
    }

    /// The offset of the device's journal.
    pub(super) fn journal_at(self) -> usize {
        self.own_at() + OWN_BYTES
    }

    /// Bytes of the whole region, with Strata's page and the journal.
    pub(crate) fn bytes(self) -> usize {
        self.journal_at() + JOURNAL_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_aligned_and_do_not_overlap() {
        let sizes = [(1, 1), (1, 128), (3, 7), (64, 1024), (256, 32768), (u16::MAX, u16::MAX)];
        let all = sizes.into_iter().flat_map(|(queues, queue_size)| {
            [RingKind::Split, RingKind::Packed].map(|kind| Layout { kind, queues, queue_size })
        });
        for layout in all {
            let Layout { kind, queues, queue_size } = layout;
            let used = kind.header_bytes() + kind.entry_bytes() * usize::from(queue_size);
            for index in [0, queues / 2, queues - 1] {
                assert!(layout.queue_at(index).is_multiple_of(64));
                assert!(layout.queue_at(index) + used <= layout.queue_at(index.saturating_add(1)).max(used));
            }
            assert!(layout.queue_at(queues - 1) + used <= layout.areas_bytes());
            assert!(layout.areas_bytes() <= layout.own_at() && layout.own_at().is_multiple_of(4096));
            assert_eq!(layout.journal_at(), layout.own_at() + 4096);
            assert_eq!(layout.bytes(), layout.journal_at() + (1 << 20));
        }
    }

    #[test]
    fn the_sizes_are_those_of_the_specification() {
        let split = Layout { kind: RingKind::Split, queues: 2, queue_size: 128 };
        assert_eq!(split.queue_at(1), 16 + 128 * 16 + 48, "rounded up to 64 bytes");
        assert_eq!((split.areas_bytes(), split.own_at(), split.journal_at()), (4224, 8192, 12288));
        let packed = Layout { kind: RingKind::Packed, ..split };
        assert_eq!(packed.queue_at(1), 32 + 128 * 32 + 32, "rounded up to 64 bytes");
        assert_eq!((packed.areas_bytes(), packed.own_at(), packed.journal_at()), (8320, 12288, 16384));
    }
}
