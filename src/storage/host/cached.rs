//! Serves reads from the page cache by a plain call that does not wait for the disk, because the pool costs many times
//! as much. (io_uring does the same by itself, so an extra call before it would only cost.)
//!
//! Owns how often that is tried. A file whose reads keep missing is tried less and less. A miss costs an extra
//! call, in which the kernel starts to read ahead and may wait for room in the device's queue. A read that misses,
//! or is cached only in part, goes to the pool.

use super::OpenFile;
use super::inline::read_without_waiting;
use super::slots::{Slot, Verdict};
use crate::bounds::CACHED_BYTES_MAX as BYTES_MAX;
use crate::{Errno, Kind, Operation};

/// The most reads of a file that are passed over after a miss.
const PASSED_MAX: u8 = 63;

/// Hits and misses, by file.
#[derive(Default)]
pub(super) struct CachedReads {
    files: Vec<Luck>,
}

/// Reads to pass over now, and the number after the next miss.
#[derive(Clone, Copy, Default)]
struct Luck {
    passes: u8,
    after_miss: u8,
}

impl CachedReads {
    /// Whether to try this operation.
    #[inline]
    pub(super) fn tries(&mut self, operation: &Operation, file: &OpenFile) -> bool {
        file.buffered
            && operation.kind == Kind::Read
            && operation.parts_len() <= BYTES_MAX
            && self.is_due(operation.file.0)
    }

    fn is_due(&mut self, file: u16) -> bool {
        let luck = self.luck(file);
        let due = luck.passes == 0;
        luck.passes = luck.passes.saturating_sub(1);
        due
    }

    /// Tries the read in a slot. `None` if it is not complete; bytes already read stay.
    pub(super) fn run(&mut self, slot: &mut Slot, file: &OpenFile) -> Option<Result<(), Errno>> {
        let count = read_without_waiting(file.raw_fd(), &slot.next_call());
        let verdict = count.map(|count| slot.take_result(count, file));
        let result = match verdict {
            Some(Verdict::Done(result)) => Some(result),
            _ => None,
        };
        self.note(slot.file.0, result.is_some());
        result
    }

    fn note(&mut self, file: u16, hit: bool) {
        let luck = self.luck(file);
        if hit {
            luck.after_miss /= 2;
        } else {
            luck.passes = luck.after_miss;
            luck.after_miss = (2 * luck.after_miss + 1).min(PASSED_MAX);
        }
    }

    fn luck(&mut self, file: u16) -> &mut Luck {
        let index = usize::from(file);
        if self.files.len() <= index {
            self.files.resize(index + 1, Luck::default());
        }
        &mut self.files[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_keeps_missing_is_tried_less_and_less() {
        let mut cached = CachedReads::default();
        let mut tried = Vec::new();
        for read in 0..200 {
            if cached.is_due(3) {
                tried.push(read);
                cached.note(3, false);
            }
        }
        assert_eq!(tried, [0, 1, 3, 7, 15, 31, 63, 127, 191], "one in 64 in the end");
        assert!(cached.is_due(0), "each file counts for itself");
    }

    #[test]
    fn hits_restore_the_attempts() {
        let mut cached = CachedReads::default();
        for _ in 0..1000 {
            if cached.is_due(0) {
                cached.note(0, false);
            }
        }
        while !cached.is_due(0) {}
        for _ in 0..7 {
            cached.note(0, true);
            assert!(cached.is_due(0), "a file whose reads hit is tried");
        }
        cached.note(0, false);
        assert!(cached.is_due(0), "a single miss passes over no read");
    }
}
