//! An operation in progress: its next system call, and the meaning of the result.
//!
//! A [`Slot`] gives the next [`Call`] and takes its result, until the operation is done. It makes no system call: the
//! ring or plain calls do, on the queue's thread or another. Slots are reused with their allocations, so that the
//! steady state allocates nothing.

use std::sync::atomic::Ordering;

use super::OpenFile;
use crate::bounds::{CALL_BYTES_MAX, IOVECS_MAX, ZEROS_BYTES, ZEROS_PER_CALL};
use crate::guest::zero_from;
use crate::{Completion, Errno, FileId, Kind, Operation, Part, Parts, Token};

/// How often in a row a call may return EINTR or EAGAIN before that is the operation's result.
const RETRIES_MAX: u32 = 1000;

static ZEROS: Zeros = Zeros([0; ZEROS_BYTES]);

#[repr(align(4096))]
struct Zeros([u8; ZEROS_BYTES]);

/// The next system call of an operation. Addresses stay valid until the slot takes the result.
pub(super) enum Call {
    Read { address: *mut u8, len: u32, offset: u64 },
    Write { address: *const u8, len: u32, offset: u64 },
    Readv { iovecs: *const libc::iovec, count: u32, offset: u64 },
    Writev { iovecs: *const libc::iovec, count: u32, offset: u64 },
    Fallocate { mode: i32, offset: u64, len: u64 },
    Sync,
    Truncate { len: u64 },
}

/// What to do after a call's result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Make the next call.
    Again,
    /// Over.
    Done(Result<(), Errno>),
}

/// An operation in progress.
pub(super) struct Slot {
    pub(super) file: FileId,
    token: Token,
    kind: Kind,
    offset: u64,
    parts: Parts,
    /// Bytes to move, and bytes moved.
    total: u64,
    done: u64,
    /// A Zero that writes zeros, because the file system cannot zero a range.
    zero_by_writing: bool,
    retries: u32,
    /// Must live until the call that uses it is over; its allocation is reused until the queue ends.
    iovecs: Vec<libc::iovec>,
}

/// All slots of a queue.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

/// The result of an operation that needs no system call, or must not reach one.
pub(super) fn answer_at_once(operation: &Operation, file: &OpenFile) -> Option<Result<(), Errno>> {
    let length = match operation.kind {
        Kind::Read | Kind::Write => operation.parts_len(),
        Kind::Punch { length } | Kind::Zero { length } | Kind::Allocate { length } => length,
        Kind::Sync => return None,
        Kind::SetLength => return (i64::try_from(operation.offset).is_err()).then_some(Err(Errno::EINVAL)),
    };
    // Beyond a signed 64-bit offset the ring would even take -1 for "the current position".
    if operation.offset.checked_add(length).is_none_or(|end| i64::try_from(end).is_err()) {
        return Some(Err(Errno::EINVAL));
    }
    if !is_aligned(operation, length, file) {
        return Some(Err(Errno::EINVAL));
    }
    if length == 0 {
        return Some(Ok(()));
    }
    if file.info.block_device && matches!(operation.kind, Kind::Allocate { .. }) {
        // All the space of a device is always allocated.
        let inside = operation.offset + length <= file.info.length;
        return Some(if inside { Ok(()) } else { Err(Errno::ENOSPC) });
    }
    None
}

/// Checked here and not by the host, because some file systems silently fall back to buffered I/O.
fn is_aligned(operation: &Operation, length: u64, file: &OpenFile) -> bool {
    let offset_mask = u64::from(file.info.offset_alignment) - 1;
    let memory_mask = file.info.memory_alignment as usize - 1;
    if offset_mask == 0 && memory_mask == 0 {
        return true;
    }
    (operation.offset | length) & offset_mask == 0
        && operation.parts.iter().all(|part| (address_of(part) as usize | part.len()) & memory_mask == 0)
}

fn address_of(part: &Part) -> *mut u8 {
    match part {
        // The mapping outlives the operation (see `GuestSlice`), so the guard need not live longer than this.
        Part::Guest(slice) => slice.ptr_guard_mut().as_ptr(),
        Part::Owned(buffer) => buffer.as_ptr(),
    }
}

impl Slot {
    /// A slot with nothing to do.
    pub(super) fn idle() -> Self {
        Slot {
            file: FileId(0),
            token: Token(0),
            kind: Kind::Sync,
            offset: 0,
            parts: Parts::new(),
            total: 0,
            done: 0,
            zero_by_writing: false,
            retries: 0,
            iovecs: Vec::new(),
        }
    }

    /// Starts an operation in this slot.
    pub(super) fn begin(&mut self, token: Token, operation: Operation, file: &OpenFile) {
        self.total = match operation.kind {
            Kind::Zero { length } => length,
            _ => operation.parts_len(),
        };
        self.zero_by_writing =
            matches!(operation.kind, Kind::Zero { .. }) && file.no_zero_range.load(Ordering::Relaxed);
        (self.file, self.token, self.kind, self.offset) =
            (operation.file, token, operation.kind, operation.offset);
        self.parts = operation.parts;
        self.done = 0;
        self.retries = 0;
    }

    /// Ends the operation and returns its memory.
    pub(super) fn finish(&mut self, result: Result<(), Errno>) -> Completion {
        Completion { token: self.token, result, parts: std::mem::take(&mut self.parts) }
    }

    /// The call to make now.
    pub(super) fn next_call(&mut self) -> Call {
        let offset = self.offset;
        match self.kind {
            Kind::Read | Kind::Write => self.transfer(),
            Kind::Zero { .. } if self.zero_by_writing => self.write_zeros(),
            Kind::Zero { length } => {
                Call::Fallocate { mode: libc::FALLOC_FL_ZERO_RANGE, offset, len: length }
            }
            Kind::Punch { length } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                Call::Fallocate { mode, offset, len: length }
            }
            Kind::Allocate { length } => Call::Fallocate { mode: 0, offset, len: length },
            Kind::Sync => Call::Sync,
            Kind::SetLength => Call::Truncate { len: offset },
        }
    }

    fn transfer(&mut self) -> Call {
        let write = self.kind == Kind::Write;
        let offset = self.offset + self.done;
        if let [part] = self.parts.as_slice() {
            let len = (self.total - self.done).min(CALL_BYTES_MAX) as u32;
            let address = address_of(part).wrapping_add(self.done as usize);
            return if write {
                Call::Write { address, len, offset }
            } else {
                Call::Read { address, len, offset }
            };
        }
        self.iovecs.clear();
        let mut skip = self.done as usize;
        for part in &self.parts {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            if self.iovecs.len() == IOVECS_MAX {
                break;
            }
            let iov_base = address_of(part).wrapping_add(skip).cast();
            self.iovecs.push(libc::iovec { iov_base, iov_len: part.len() - skip });
            skip = 0;
        }
        let (iovecs, count) = (self.iovecs.as_ptr(), self.iovecs.len() as u32);
        if write { Call::Writev { iovecs, count, offset } } else { Call::Readv { iovecs, count, offset } }
    }

    fn write_zeros(&mut self) -> Call {
        self.iovecs.clear();
        let mut left = self.total - self.done;
        while left > 0 && self.iovecs.len() < ZEROS_PER_CALL {
            let iov_len = left.min(ZEROS_BYTES as u64) as usize;
            // The kernel only reads it: only write calls use it.
            let iov_base = ZEROS.0.as_ptr().cast_mut().cast();
            self.iovecs.push(libc::iovec { iov_base, iov_len });
            left -= iov_len as u64;
        }
        Call::Writev {
            iovecs: self.iovecs.as_ptr(),
            count: self.iovecs.len() as u32,
            offset: self.offset + self.done,
        }
    }

    /// Takes the result of the call: bytes moved (or 0), or a negated errno.
    pub(super) fn take_result(&mut self, result: i32, file: &OpenFile) -> Verdict {
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.retries += 1;
            return if self.retries < RETRIES_MAX {
                Verdict::Again
            } else {
                Verdict::Done(Err(Errno(-result)))
            };
        }
        self.retries = 0;
        match (self.kind, u64::try_from(result)) {
            (Kind::Zero { .. }, Err(_)) if result == -libc::EOPNOTSUPP && !self.zero_by_writing => {
                file.no_zero_range.store(true, Ordering::Relaxed);
                self.zero_by_writing = true;
                Verdict::Again
            }
            (_, Err(_)) => Verdict::Done(Err(Errno(-result))),
            (Kind::Read, Ok(count)) => self.advance_read(count, file),
            (Kind::Write, Ok(count)) => self.advance_write(count),
            (Kind::Zero { .. }, Ok(count)) if self.zero_by_writing => self.advance_write(count),
            (_, Ok(_)) => Verdict::Done(Ok(())),
        }
    }

    fn advance_read(&mut self, count: u64, file: &OpenFile) -> Verdict {
        self.done = (self.done + count).min(self.total);
        if self.done == self.total {
            return Verdict::Done(Ok(()));
        }
        // Direct I/O transfers whole blocks except at the end of the file, where an aligned continuation is impossible.
        let at_end = count == 0 || self.done & (u64::from(file.info.offset_alignment) - 1) != 0;
        if !at_end {
            return Verdict::Again;
        }
        self.zero_rest();
        Verdict::Done(Ok(()))
    }

    fn advance_write(&mut self, count: u64) -> Verdict {
        self.done = (self.done + count).min(self.total);
        if self.done == self.total {
            Verdict::Done(Ok(()))
        } else if count == 0 {
            Verdict::Done(Err(Errno::EIO))
        } else {
            Verdict::Again
        }
    }

    fn zero_rest(&mut self) {
        let mut skip = self.done as usize;
        for part in &mut self.parts {
            let from = skip.min(part.len());
            skip -= from;
            match part {
                Part::Guest(slice) => zero_from(slice, from),
                Part::Owned(buffer) => buffer.as_mut_slice()[from..].fill(0),
            }
        }
    }
}

impl Slots {
    /// Starts an operation in a free slot.
    pub(super) fn insert(&mut self, token: Token, operation: Operation, file: &OpenFile) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::idle());
            u32::try_from(self.slots.len() - 1).expect("fewer operations than 2^32 fit in memory")
        });
        self.get(index).begin(token, operation, file);
        index
    }

    pub(super) fn get(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// Ends the operation in a slot and frees the slot.
    pub(super) fn finish(&mut self, index: u32, result: Result<(), Errno>) -> Completion {
        self.free.push(index);
        self.get(index).finish(result)
    }

    /// Operations in slots.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests;
