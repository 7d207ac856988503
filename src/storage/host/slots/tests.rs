//! Tests of slots with results that a healthy host rarely returns.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::{AlignedBuf, FileIdentity, FileInfo};

fn file(offset_alignment: u32) -> OpenFile {
    let info = FileInfo {
        path: "nowhere".into(),
        length: 0,
        offset_alignment,
        memory_alignment: 1,
        block_size: 4096,
        block_device: false,
        identity: FileIdentity { device: 1, number: 1 },
        writable: true,
    };
    let file = tempfile::tempfile().expect("a temporary file");
    OpenFile { file, info, memory_backed: false, buffered: false, no_zero_range: AtomicBool::new(false) }
}

fn begun(kind: Kind, parts: &[usize], file: &OpenFile) -> Slot {
    let parts = parts.iter().map(|len| Part::Owned(filled(*len))).collect();
    let mut slot = Slot::idle();
    slot.begin(Token(1), Operation::new(FileId(0), kind, 4096, parts), file);
    slot
}

fn filled(len: usize) -> AlignedBuf {
    let mut buffer = AlignedBuf::new(len);
    buffer.as_mut_slice().fill(7);
    buffer
}

/// (offset, bytes) of the next call, which must be a transfer.
fn span(slot: &mut Slot) -> (u64, usize) {
    let vector = |iovecs: *const libc::iovec, count: u32| -> usize {
        // SAFETY: the slot's own array of `count` entries, which it has just made.
        unsafe { std::slice::from_raw_parts(iovecs, count as usize) }.iter().map(|iovec| iovec.iov_len).sum()
    };
    match slot.next_call() {
        Call::Read { len, offset, .. } | Call::Write { len, offset, .. } => (offset, len as usize),
        Call::Readv { iovecs, count, offset } | Call::Writev { iovecs, count, offset } => {
            (offset, vector(iovecs, count))
        }
        _ => panic!("no transfer"),
    }
}

#[test]
fn short_transfers_continue_at_the_right_offset() {
    let file = file(1);
    for parts in [&[10_000][..], &[1000, 0, 4000, 5000]] {
        for kind in [Kind::Read, Kind::Write] {
            let mut slot = begun(kind, parts, &file);
            let mut moved = 0;
            for count in [1, 999, 4500, 4499] {
                assert_eq!(span(&mut slot), (4096 + moved, 10_000 - moved as usize));
                assert_eq!(slot.take_result(count, &file), Verdict::Again);
                moved += count as u64;
            }
            assert_eq!(span(&mut slot), (4096 + 9999, 1));
            assert_eq!(slot.take_result(1, &file), Verdict::Done(Ok(())));
        }
    }
}

#[test]
fn the_end_of_the_file_is_filled_with_zeros() {
    // At 1,536 bytes direct I/O could go on, so that only an empty read shows the end; at 1,600 it could not.
    for (alignment, first, more) in [(1, 1600, true), (512, 1536, true), (512, 1600, false)] {
        let file = file(alignment);
        let mut slot = begun(Kind::Read, &[1024, 1024, 512], &file);
        span(&mut slot);
        let mut verdict = slot.take_result(first, &file);
        if more {
            assert_eq!(verdict, Verdict::Again);
            span(&mut slot);
            verdict = slot.take_result(0, &file);
        }
        assert_eq!(verdict, Verdict::Done(Ok(())));
        let done = slot.finish(Ok(()));
        let bytes: Vec<u8> = done
            .parts
            .iter()
            .flat_map(|part| match part {
                Part::Owned(buffer) => buffer.as_slice().to_vec(),
                Part::Guest(_) => Vec::new(),
            })
            .collect();
        assert!(bytes[..first as usize].iter().all(|byte| *byte == 7));
        assert!(bytes[first as usize..].iter().all(|byte| *byte == 0) && bytes.len() == 2560);
    }
}

#[test]
fn a_write_without_progress_is_an_error() {
    let file = file(1);
    let mut slot = begun(Kind::Write, &[1024], &file);
    span(&mut slot);
    assert_eq!(slot.take_result(512, &file), Verdict::Again);
    span(&mut slot);
    assert_eq!(slot.take_result(0, &file), Verdict::Done(Err(Errno::EIO)));
    let mut slot = begun(Kind::Write, &[1024], &file);
    span(&mut slot);
    assert_eq!(slot.take_result(512, &file), Verdict::Again);
    span(&mut slot);
    assert_eq!(slot.take_result(-libc::ENOSPC, &file), Verdict::Done(Err(Errno::ENOSPC)));
}

#[test]
fn interruptions_are_retried_but_not_for_ever() {
    let file = file(1);
    for errno in [libc::EINTR, libc::EAGAIN] {
        let mut slot = begun(Kind::Sync, &[], &file);
        for _ in 1..RETRIES_MAX {
            assert_eq!(slot.take_result(-errno, &file), Verdict::Again);
        }
        assert_eq!(slot.take_result(-errno, &file), Verdict::Done(Err(Errno(errno))));
    }
}

#[test]
fn zeros_are_written_where_a_range_cannot_be_zeroed() {
    let file = file(1);
    let length = (9 << 20) + 5;
    let mut slot = begun(Kind::Zero { length }, &[], &file);
    assert!(matches!(slot.next_call(), Call::Fallocate { mode: libc::FALLOC_FL_ZERO_RANGE, .. }));
    assert_eq!(slot.take_result(-libc::EOPNOTSUPP, &file), Verdict::Again);
    assert!(file.no_zero_range.load(Ordering::Relaxed));
    for (done, len) in [(0, 4 << 20), (4 << 20, 4 << 20), (8 << 20, (1 << 20) + 5)] {
        assert_eq!(span(&mut slot), (4096 + done, len));
        let verdict = slot.take_result(len as i32, &file);
        assert_eq!(verdict == Verdict::Again, done + (len as u64) < length);
    }
    // Writing zeros cannot punch a hole, so the caller gets the error.
    let mut slot = begun(Kind::Punch { length: 512 }, &[], &file);
    slot.next_call();
    assert_eq!(slot.take_result(-libc::EOPNOTSUPP, &file), Verdict::Done(Err(Errno::EOPNOTSUPP)));
}
