//! The log of dirty pages that a frontend keeps while it migrates a guest (vhost-user, "Migration"). It has one bit
//! for each 4096 bytes of guest memory, in memory that it shares with the daemon.
//!
//! Owns the mapping of the log, and each worker's memory of what its chains will write. A page is marked after it
//! was written and before the guest learns of that. A frontend that fetches the log between the write and the mark
//! fetches the mark later. `shared_file` checks and maps the file.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use vhost::vhost_user::message::VhostUserLog;
use vm_memory::{Address, GuestAddress, VolatileMemory};

use crate::loss::MemoryLoss;
use crate::shared_file::{Mapping, Piece, ShareError, SharedPiece};

/// Bytes of guest memory for which one bit stands.
const LOG_PAGE: u64 = 4096;
/// Pages in a byte of the log.
const PAGES_IN_BYTE: u64 = 8;
/// Pages in a word of the log, the unit of access. A mapping is whole words, as it is whole pages.
const PAGES_IN_WORD: u64 = 64;
/// A chain with more ranges gives their memory back when it ends.
const RANGES_KEPT: usize = 8;
/// The longest log, in bytes: 2^52 bytes of guest memory, as much as an x86-64 processor can address.
const BYTES_MAX: u64 = 1 << 37;

/// The reasons why a log is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    #[error("a dirty log of {bytes:#x} bytes: it must have 1 to {BYTES_MAX:#x}")]
    Size { bytes: u64 },
    #[error("a dirty log for {covered:#x} bytes, while guest memory ends at {end:#x}")]
    TooShort { covered: u64, end: u64 },
    #[error("a dirty log: {0}")]
    File(#[from] ShareError),
}

/// A mapped log.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    mapping: Mapping,
    bytes: u64,
}

impl DirtyLog {
    /// Maps the log of a SET_LOG_BASE message.
    ///
    /// # Errors
    /// When its file is shorter than claimed or no file at all, or the host refuses.
    pub(crate) fn map(claimed: &VhostUserLog, file: File, loss: &Arc<MemoryLoss>) -> Result<Self, LogError> {
        // The message is packed, so its fields are copied out.
        let VhostUserLog { mmap_size: bytes, mmap_offset: offset } = *claimed;
        if !(1..=BYTES_MAX).contains(&bytes) {
            return Err(LogError::Size { bytes });
        }
        let piece = SharedPiece::check(Piece { offset, bytes }, file)?;
        // At most 2^37 bytes.
        Ok(DirtyLog { mapping: piece.map(bytes as usize, loss)?, bytes })
    }

    /// Whether a page of the log was lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.mapping.watch.is_lost()
    }

    /// Checks that the log has a bit for every page before `end`, a guest address.
    ///
    /// # Errors
    /// When it is shorter.
    pub(crate) fn check_covers(&self, end: u64) -> Result<(), LogError> {
        let covered = self.bytes * PAGES_IN_BYTE * LOG_PAGE;
        if end > covered { Err(LogError::TooShort { covered, end }) } else { Ok(()) }
    }

    /// Marks the pages of a range of guest memory that the calling thread, or the host for it, has written. Pages that
    /// the log has no bit for are left out.
    pub(crate) fn mark(&self, address: GuestAddress, bytes: u64) {
        let GuestAddress(address) = address;
        let Some(last) = bytes.checked_sub(1) else { return };
        let last = (address.saturating_add(last) / LOG_PAGE).min(self.bytes * PAGES_IN_BYTE - 1);
        let first = address / LOG_PAGE;
        if first > last {
            return;
        }
        // A bit that is already set must be seen after the pages were written: the frontend clears the bit, then
        // copies the page.
        fence(Ordering::SeqCst);
        for word in first / PAGES_IN_WORD..=last / PAGES_IN_WORD {
            let from = first.saturating_sub(word * PAGES_IN_WORD);
            let to = (last - word * PAGES_IN_WORD).min(PAGES_IN_WORD - 1);
            // Bits from..=to, both below 64. The bit of a page lies in byte page / 8, so the words are little-endian.
            let mask = ((u64::MAX << from) & (u64::MAX >> (PAGES_IN_WORD - 1 - to))).to_le();
            let cell = self.mapping.memory.get_atomic_ref::<AtomicU64>(word as usize * size_of::<u64>());
            let cell = cell.expect("the word lies in the mapping");
            if cell.load(Ordering::Relaxed) & mask != mask {
                cell.fetch_or(mask, Ordering::SeqCst);
            }
        }
    }
}

/// What one worker's chains in flight may write, so that it is marked once they are done.
#[derive(Debug)]
pub(crate) struct ChainLog {
    log: Arc<DirtyLog>,
    /// What is written for each chain, by its head: guest address and bytes. Empty for a chain that is not in flight.
    written: Vec<Vec<(u64, u32)>>,
}

impl ChainLog {
    /// For a ring of `size` descriptors without chains in flight.
    pub(crate) fn new(log: Arc<DirtyLog>, size: u16) -> Self {
        ChainLog { log, written: vec![Vec::new(); usize::from(size)] }
    }

    /// Notes a chain that was just taken, and the ranges that will be written for it.
    pub(crate) fn begin(&mut self, head: u16, written: impl Iterator<Item = (u64, u32)>) {
        let noted = &mut self.written[usize::from(head)];
        noted.clear();
        noted.extend(written);
    }

    /// Marks what may have been written for a chain. Nothing writes for it any more.
    pub(crate) fn end(&mut self, head: u16) {
        let noted = &mut self.written[usize::from(head)];
        for (address, bytes) in noted.drain(..) {
            self.log.mark(GuestAddress(address), u64::from(bytes));
        }
        if noted.capacity() > RANGES_KEPT {
            *noted = Vec::new();
        }
    }
}

/// Where a log counts a part of a ring that the device writes. That may be elsewhere than the part itself.
#[derive(Clone, Debug)]
pub(crate) struct PartLog {
    log: Arc<DirtyLog>,
    /// The address of the part in the log.
    address: GuestAddress,
}

impl PartLog {
    /// A part of `bytes` bytes, logged at `address`. All of it is marked: a daemon that was killed may have
    /// written some of it that it did not mark.
    ///
    /// # Errors
    /// When the log does not have all of it.
    pub(crate) fn new(log: Arc<DirtyLog>, address: GuestAddress, bytes: u64) -> Result<Self, LogError> {
        log.check_covers(address.0.saturating_add(bytes))?;
        log.mark(address, bytes);
        Ok(PartLog { log, address })
    }

    /// Marks bytes of the part that were just written.
    pub(crate) fn mark(&self, offset: usize, bytes: usize) {
        self.log.mark(self.address.unchecked_add(offset as u64), bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(bytes: u64) -> File {
        let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(fd);
        file.set_len(bytes).expect("its length");
        file
    }

    fn map(bytes: u64, offset: u64, file: &File) -> Result<DirtyLog, LogError> {
        DirtyLog::map(&VhostUserLog::new(bytes, offset), file.try_clone().expect("a copy"), &Arc::default())
    }

    fn bytes_of(file: &File, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        file.read_exact_at(&mut bytes, 0).expect("the log");
        bytes
    }

    #[test]
    fn exactly_the_pages_of_a_range_are_marked() {
        let cases: [(u64, u64, [u8; 4]); 9] = [
            (0, 0, [0, 0, 0, 0]),
            (0, 1, [1, 0, 0, 0]),
            (4095, 2, [3, 0, 0, 0]),
            (4096, 4096, [2, 0, 0, 0]),
            (7 * 4096, 2 * 4096, [0x80, 1, 0, 0]),
            (3 * 4096 + 5, 20 * 4096, [0xf8, 0xff, 0xff, 0]),
            (31 * 4096, u64::MAX, [0, 0, 0, 0x80]),
            (32 * 4096, 4096, [0, 0, 0, 0]),
            (u64::MAX, 1, [0, 0, 0, 0]),
        ];
        for (address, bytes, expected) in cases {
            let file = file(4);
            map(4, 0, &file).expect("a log").mark(GuestAddress(address), bytes);
            assert_eq!(bytes_of(&file, 4), expected, "{address:#x}, {bytes:#x}");
        }
    }

    #[test]
    fn marks_are_added() {
        let file = file(4);
        let log = map(4, 0, &file).expect("a log");
        log.mark(GuestAddress(0), 1);
        log.mark(GuestAddress(4096), 1);
        log.mark(GuestAddress(0), 8192);
        assert_eq!(bytes_of(&file, 4), [3, 0, 0, 0]);
        // The frontend has fetched them.
        file.write_all_at(&[0], 0).expect("cleared");
        log.mark(GuestAddress(4096), 1);
        assert_eq!(bytes_of(&file, 4), [2, 0, 0, 0]);
    }

    #[test]
    fn a_chain_is_marked_when_it_ends() {
        let file = file(8);
        let mut chains = ChainLog::new(Arc::new(map(8, 0, &file).expect("a log")), 4);
        chains.begin(2, [(0, 512), (5 * 4096, 1)].into_iter());
        chains.begin(3, [(8 * 4096, 1)].into_iter());
        assert_eq!(bytes_of(&file, 2), [0, 0]);
        chains.end(2);
        assert_eq!(bytes_of(&file, 2), [0b10_0001, 0]);
        chains.begin(2, [(4096, 1)].into_iter());
        chains.end(2);
        chains.end(2);
        assert_eq!(bytes_of(&file, 2), [0b10_0011, 0]);
        chains.end(3);
        assert_eq!(bytes_of(&file, 2), [0b10_0011, 1]);
    }

    #[test]
    fn a_log_must_hold_what_is_to_be_logged() {
        let log = Arc::new(map(2, 0, &file(4096)).expect("a log"));
        assert!(log.check_covers(16 * 4096).is_ok());
        assert!(matches!(log.check_covers(16 * 4096 + 1), Err(LogError::TooShort { .. })));
        assert!(PartLog::new(Arc::clone(&log), GuestAddress(15 * 4096), 4096).is_ok());
        assert!(PartLog::new(Arc::clone(&log), GuestAddress(15 * 4096), 4097).is_err());
        assert!(PartLog::new(log, GuestAddress(u64::MAX), 4097).is_err());
    }

    #[test]
    fn numbers_that_cannot_be_true_are_refused() {
        let file = file(8192);
        let cases = [
            (0, 0, "nothing"),
            (8193, 0, "longer than the file"),
            (BYTES_MAX + 1, 0, "longer than any guest"),
            (u64::MAX, 0, "as long as can be"),
            (4097, 4096, "its end is beyond the file"),
            (1, u64::MAX - 4095, "its end overflows"),
            (1, i64::MAX as u64 & !4095, "its end overflows a file offset"),
            (1, 64, "an offset inside a page"),
        ];
        for (bytes, offset, what) in cases {
            assert!(map(bytes, offset, &file).is_err(), "{what}");
        }
        assert!(map(4096, 4096, &file).is_ok());
        let null = File::options().read(true).write(true).open("/dev/null").expect("/dev/null");
        assert!(matches!(map(1, 0, &null), Err(LogError::File(ShareError::NotAFile))));
    }

    #[test]
    fn a_file_that_is_truncated_is_noticed() {
        let file = file(4096);
        let loss = Arc::new(MemoryLoss::new().expect("an eventfd"));
        let copy = file.try_clone().expect("a copy");
        let log = DirtyLog::map(&VhostUserLog::new(4096, 0), copy, &loss).expect("a log");
        assert!(!log.is_lost());
        file.set_len(0).expect("it is cut");
        log.mark(GuestAddress(0), 1);
        assert!(log.is_lost() && loss.is_lost());
    }
}
