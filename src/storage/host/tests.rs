//! The host's queue on real files: on a disk's file system with and without direct I/O, and on tmpfs.

mod cached;
mod open;
mod wait;

use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::{FLAVOURS, Flavour};
use super::{Aio, HostQueue, HostStorage, UringQueue};
use crate::error::{FileKind, StorageError};
use crate::{
    AlignedBuf, Completion, Errno, FileId, FileInfo, GuestSlice, IoQueue, Kind, OpenOptions, Operation, Part,
    Parts, Storage, Token,
};
use wait::{notifications_arrive, signals_arrive};

/// Far longer than any test takes: a wait that reaches it has lost a wake-up.
const LONG: Duration = Duration::from_secs(30);

/// A temporary image, open for writing, with a queue of this thread.
struct Bench {
    folder: tempfile::TempDir,
    storage: HostStorage,
    queue: HostQueue,
    file: FileId,
    info: FileInfo,
}

impl Bench {
    fn new(folder: tempfile::TempDir, direct: bool, contents: &[u8]) -> Self {
        Self::by(Aio::IoUring, folder, direct, contents)
    }

    fn by(aio: Aio, folder: tempfile::TempDir, direct: bool, contents: &[u8]) -> Self {
        let path = folder.path().join("image");
        std::fs::write(&path, contents).expect("an image");
        let storage = HostStorage::new().by(aio);
        let (file, info) = storage.open(&path, &options(true, direct)).expect("it opens");
        let queue = storage.queue(8).expect("a queue");
        Bench { folder, storage, queue, file, info }
    }

    fn run(&mut self, kind: Kind, offset: u64, parts: Parts) -> Completion {
        self.queue.push(Token(77), Operation::new(self.file, kind, offset, parts));
        self.queue.submit();
        let completion = self.finish(1).pop().expect("one completion");
        assert_eq!(completion.token, Token(77));
        completion
    }

    fn bare(&mut self, kind: Kind, offset: u64) -> Result<(), Errno> {
        self.run(kind, offset, Parts::new()).result
    }

    /// Waits for `count` completions.
    fn finish(&mut self, count: usize) -> Vec<Completion> {
        let (mut done, started) = (Vec::new(), Instant::now());
        while done.len() < count {
            self.queue.reap(&mut done);
            if done.len() < count {
                self.queue.wait(Some(LONG));
            }
            assert!(started.elapsed() < LONG, "{} of {count} completions", done.len());
        }
        assert_eq!((done.len(), self.queue.in_flight()), (count, 0));
        done
    }

    /// The ring, for tests of io_uring alone.
    fn ring(&mut self) -> &mut UringQueue {
        match &mut self.queue {
            HostQueue::Uring(ring) => ring,
            HostQueue::Threads(_) => panic!("this test is about io_uring"),
        }
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("image")).expect("the image can be read")
    }
}

fn options(writable: bool, direct: bool) -> OpenOptions {
    OpenOptions { writable, direct, lock_timeout: Duration::ZERO }
}

/// A temporary folder on a file system that is not in memory; `None`, with a message, if there is none.
fn on_disk() -> Option<tempfile::TempDir> {
    let places = [std::env::temp_dir(), "/var/tmp".into(), env!("CARGO_MANIFEST_DIR").into()];
    for place in places {
        let tmpfs = rustix::fs::statfs(&place).is_ok_and(|stat| stat.f_type == 0x0102_1994);
        if !tmpfs && let Ok(folder) = tempfile::tempdir_in(place) {
            return Some(folder);
        }
    }
    skip_unless_required("no file system on a disk");
    None
}

/// Reports that a test, or a part of it, is skipped. Writes past the test harness, which hides the output of passing
/// tests.
fn skip(reason: &str) {
    let thread = std::thread::current();
    // A failed write cannot be reported anywhere.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {}: {reason}", thread.name().unwrap_or("?"));
}

/// As `skip`, but fails if STRATA_REQUIRE_TOOLS=1 forbids missing tools.
pub(super) fn skip_unless_required(reason: &str) {
    let required = std::env::var_os("STRATA_REQUIRE_TOOLS").is_some_and(|value| value == "1");
    assert!(!required, "STRATA_REQUIRE_TOOLS=1, but {reason}");
    skip(reason);
}

fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("/dev/shm is there")
}

/// Runs a test on each kind of file, with each kind of queue.
fn everywhere(contents: &[u8], test: impl Fn(&mut Bench)) {
    for aio in KINDS {
        test(&mut Bench::by(aio, in_memory(), true, contents));
        for direct in [false, true] {
            if let Some(folder) = on_disk() {
                test(&mut Bench::by(aio, folder, direct, contents));
            }
        }
    }
}

/// Each kind of queue.
const KINDS: [Aio; 2] = [Aio::IoUring, Aio::Threads];

/// A queue of each kind with no file.
fn queues() -> [HostQueue; 2] {
    KINDS.map(|aio| HostStorage::new().by(aio).queue(4).expect("a queue"))
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at / 512 * 7 + at) as u8 ^ seed).collect()
}

fn owned(contents: &[u8]) -> Part {
    let mut buffer = AlignedBuf::new(contents.len());
    buffer.as_mut_slice().copy_from_slice(contents);
    Part::Owned(buffer)
}

/// Memory that the kernel writes as it would a guest's; leaked, so that `'static` holds.
fn guest(len: usize) -> GuestSlice {
    let bytes = Box::leak(Box::new(AlignedBuf::new(len))).as_mut_slice();
    bytes.fill(0xee);
    GuestSlice::from(bytes)
}

fn bytes_of(part: &Part) -> Vec<u8> {
    match part {
        Part::Owned(buffer) => buffer.as_slice().to_vec(),
        Part::Guest(slice) => {
            let mut bytes = vec![0; slice.len()];
            slice.copy_to(&mut bytes[..]);
            bytes
        }
    }
}

fn all_bytes(parts: &Parts) -> Vec<u8> {
    parts.iter().flat_map(bytes_of).collect()
}

#[test]
fn written_data_is_read_back_in_parts_of_both_kinds() {
    everywhere(&[], |bench| {
        let data = pattern(16384, 1);
        let parts = Parts::from_vec(vec![owned(&data[..4096]), owned(&[]), owned(&data[4096..])]);
        let written = bench.run(Kind::Write, 8192, parts);
        assert_eq!(written.result, Ok(()));
        assert_eq!(all_bytes(&written.parts), data);
        let parts = Parts::from_vec(vec![
            Part::Guest(guest(512)),
            Part::Owned(AlignedBuf::new(8192)),
            Part::Guest(guest(16384)),
        ]);
        let read = bench.run(Kind::Read, 4096, parts);
        assert_eq!(read.result, Ok(()));
        let expected = [&[0; 4096][..], &data, &[0; 4608]].concat();
        assert_eq!(all_bytes(&read.parts), expected);
        assert_eq!(bench.contents()[8192..], data);
    });
}

#[test]
fn reads_past_the_end_give_zeros() {
    let data = pattern(5000, 2);
    everywhere(&data, |bench| {
        assert_eq!(bench.info.length, 5000);
        for (offset, len) in [(0, 8192), (4096, 4096), (4608, 512), (8192, 4096), (1 << 40, 512)] {
            let expected: Vec<u8> =
                (offset..offset + len).map(|at| data.get(at).copied().unwrap_or(0)).collect();
            for part in [Part::Guest(guest(len)), owned(&vec![0xee; len])] {
                let read = bench.run(Kind::Read, offset as u64, Parts::from_vec(vec![part]));
                assert_eq!((read.result, all_bytes(&read.parts)), (Ok(()), expected.clone()));
            }
            let halves = Parts::from_vec(vec![Part::Guest(guest(len / 2)), owned(&vec![0xee; len / 2])]);
            // Half of 512 is not a multiple of the alignment of direct I/O.
            if len > 512 || bench.info.offset_alignment == 1 {
                let read = bench.run(Kind::Read, offset as u64, halves);
                assert_eq!((read.result, all_bytes(&read.parts)), (Ok(()), expected));
            }
        }
    });
}

#[test]
fn an_operation_may_have_more_parts_than_one_call_takes() {
    everywhere(&[], |bench| {
        let data = pattern(2500 * 512, 3);
        let parts = data.chunks(512).map(owned).collect();
        assert_eq!(bench.run(Kind::Write, 512, parts).result, Ok(()));
        assert_eq!(bench.contents()[512..], data);
        let parts = (0..2600).map(|_| Part::Guest(guest(512))).collect();
        let read = bench.run(Kind::Read, 512, parts);
        assert_eq!(read.result, Ok(()));
        let bytes = all_bytes(&read.parts);
        assert!(bytes[..data.len()] == data && bytes[data.len()..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn unaligned_direct_io_is_refused() {
    let Some(folder) = on_disk() else { return };
    let mut bench = Bench::new(folder, true, &pattern(8192, 4));
    if bench.info.offset_alignment == 1 {
        skip("no direct I/O with a fine alignment here");
        return;
    }
    let one = |part| Parts::from_vec(vec![part]);
    assert_eq!(bench.run(Kind::Read, 1, one(owned(&[0; 512]))).result, Err(Errno::EINVAL));
    assert_eq!(bench.run(Kind::Write, 0, one(owned(&[0; 511]))).result, Err(Errno::EINVAL));
    let askew = guest(1024).subslice(1, 512).expect("inside");
    if bench.info.memory_alignment > 1 {
        assert_eq!(bench.run(Kind::Write, 0, one(Part::Guest(askew))).result, Err(Errno::EINVAL));
    }
    assert_eq!(bench.contents(), pattern(8192, 4));
    assert_eq!(bench.run(Kind::Read, 512, one(owned(&[0; 512]))).result, Ok(()));
}

#[test]
fn buffered_io_takes_any_offset() {
    let Some(folder) = on_disk() else { return };
    for mut bench in [Bench::new(folder, false, &[]), Bench::new(in_memory(), true, &[])] {
        assert_eq!((bench.info.offset_alignment, bench.info.memory_alignment), (1, 1));
        let data = pattern(1001, 5);
        assert_eq!(bench.run(Kind::Write, 13, Parts::from_vec(vec![owned(&data)])).result, Ok(()));
        assert_eq!(bench.contents()[13..], data);
    }
}

#[test]
fn offsets_beyond_a_signed_64_bit_number_are_refused() {
    everywhere(&[], |bench| {
        let last = i64::MAX as u64;
        for offset in [u64::MAX, u64::MAX - 511, last - 510, last + 1] {
            for kind in [Kind::Read, Kind::Write] {
                let parts = Parts::from_vec(vec![owned(&[0; 512])]);
                assert_eq!(bench.run(kind, offset, parts).result, Err(Errno::EINVAL));
            }
            let length = 512;
            assert_eq!(bench.bare(Kind::Zero { length }, offset), Err(Errno::EINVAL));
            assert_eq!(bench.bare(Kind::Punch { length }, offset), Err(Errno::EINVAL));
        }
        assert_eq!(bench.bare(Kind::SetLength, last + 1), Err(Errno::EINVAL));
        assert_eq!(bench.bare(Kind::Punch { length: u64::MAX }, 512), Err(Errno::EINVAL));
        assert_eq!(bench.run(Kind::Write, 0, Parts::new()).result, Ok(()));
        assert_eq!(bench.contents(), []);
    });
}

#[test]
fn a_punch_frees_space_and_keeps_the_length() {
    let data = pattern(1 << 20, 6);
    everywhere(&data, |bench| {
        assert_eq!(bench.bare(Kind::Sync, 0), Ok(()));
        let before = bench.storage.allocated(bench.file).expect("the host reports it");
        assert!(before >= 1 << 20, "{before} bytes allocated");
        assert_eq!(bench.bare(Kind::Punch { length: 512 << 10 }, 256 << 10), Ok(()));
        assert_eq!(bench.bare(Kind::Sync, 0), Ok(()));
        let after = bench.storage.allocated(bench.file).expect("the host reports it");
        assert!(after + (512 << 10) <= before, "{before} bytes allocated, then {after}");
        let mut expected = data.clone();
        expected[256 << 10..768 << 10].fill(0);
        assert!(bench.contents() == expected);
        // Past the end it changes nothing, and so not the length.
        assert_eq!(bench.bare(Kind::Punch { length: 4096 }, 2 << 20), Ok(()));
        assert_eq!(bench.storage.length(bench.file).expect("the host reports it"), 1 << 20);
    });
}

#[test]
fn zeroing_keeps_space_and_extends_the_file() {
    // A length that takes more than one call where zeros are written.
    let data = pattern(6 << 20, 7);
    for by_writing in [false, true] {
        everywhere(&data, |bench| {
            let open = bench.storage.file(bench.file);
            open.no_zero_range.store(by_writing, Ordering::Relaxed);
            assert_eq!(bench.bare(Kind::Zero { length: (5 << 20) + 512 }, 512), Ok(()));
            let mut expected = data.clone();
            expected[512..(5 << 20) + 1024].fill(0);
            assert!(bench.contents() == expected);
            assert_eq!(bench.bare(Kind::Zero { length: 8192 }, (6 << 20) - 4096), Ok(()));
            assert_eq!(bench.bare(Kind::Sync, 0), Ok(()));
            expected[(6 << 20) - 4096..].fill(0);
            expected.resize((6 << 20) + 4096, 0);
            assert!(bench.contents() == expected);
            assert!(bench.storage.allocated(bench.file).expect("the host reports it") >= 6 << 20);
        });
    }
}

/// It may wait for the file system, and the queue's thread must not.
#[test]
fn a_new_length_is_set_by_the_pool() {
    let Some(folder) = on_disk() else { return };
    let mut bench = Bench::by(Aio::Threads, folder, false, &pattern(4096, 8));
    bench.queue.push(Token(1), Operation::bare(bench.file, Kind::SetLength, 8192));
    assert_eq!(bench.contents().len(), 4096, "nothing happens before it is submitted");
    assert_eq!(bench.finish(1)[0].result, Ok(()));
    assert_eq!(bench.contents().len(), 8192);
}

#[test]
fn allocating_and_setting_the_length() {
    everywhere(&pattern(4096, 8), |bench| {
        assert_eq!(bench.bare(Kind::Allocate { length: 1 << 20 }, 0), Ok(()));
        assert_eq!(bench.storage.length(bench.file).expect("the host reports it"), 1 << 20);
        assert!(bench.storage.allocated(bench.file).expect("the host reports it") >= 1 << 20);
        assert_eq!(bench.contents()[..4096], pattern(4096, 8));
        for truncate in [true, false] {
            if let HostQueue::Uring(ring) = &mut bench.queue {
                ring.set_truncate_ability(truncate);
            }
            assert_eq!(bench.bare(Kind::SetLength, 1000), Ok(()));
            assert_eq!(bench.contents(), pattern(4096, 8)[..1000]);
            assert_eq!(bench.bare(Kind::SetLength, 5000), Ok(()));
            assert_eq!(bench.storage.length(bench.file).expect("the host reports it"), 5000);
            assert!(bench.contents()[1000..].iter().all(|byte| *byte == 0));
        }
        // An operation of length 0 succeeds.
        assert_eq!(bench.bare(Kind::Zero { length: 0 }, 0), Ok(()));
    });
}

#[test]
fn a_reader_cannot_write() {
    everywhere(&pattern(4096, 9), |bench| {
        let path = bench.folder.path().join("other");
        std::fs::write(&path, [1; 4096]).expect("a file");
        let (file, info) = bench.storage.open(&path, &options(false, true)).expect("it opens");
        assert!(!info.writable);
        let parts = Parts::from_vec(vec![owned(&[0; 512])]);
        bench.queue.push(Token(1), Operation::new(file, Kind::Write, 0, parts));
        assert_eq!(bench.finish(1)[0].result, Err(Errno(libc::EBADF)));
    });
}

#[test]
fn more_operations_than_depth_are_all_done() {
    let data = pattern(400 * 4096, 10);
    everywhere(&data, |bench| {
        for at in 0..400 {
            let parts = Parts::from_vec(vec![Part::Owned(AlignedBuf::new(4096))]);
            let operation = Operation::new(bench.file, Kind::Read, at * 4096, parts);
            bench.queue.push(Token(at), operation);
        }
        assert_eq!(bench.queue.in_flight(), 400);
        bench.queue.submit();
        // Reaping alone must carry the backlog on.
        let (mut done, started) = (Vec::new(), Instant::now());
        while done.len() < 400 {
            bench.queue.reap(&mut done);
            assert!(started.elapsed() < LONG, "{} of 400 operations", done.len());
        }
        done.sort_by_key(|completion| completion.token.0);
        for (at, completion) in done.iter().enumerate() {
            assert_eq!((completion.token, completion.result), (Token(at as u64), Ok(())));
            assert!(all_bytes(&completion.parts) == data[at * 4096..][..4096]);
        }
        assert_eq!(bench.queue.in_flight(), 0);
    });
}

#[test]
fn large_writes_to_memory_may_be_offloaded() {
    let mut bench = Bench::new(in_memory(), true, &[]);
    let offloaded = |file, at: u64, length: usize| {
        let parts = Parts::from_vec(vec![owned(&vec![at as u8 + 1; length])]);
        Operation { offload: true, ..Operation::new(file, Kind::Write, at << 16, parts) }
    };
    let mut done = Vec::new();
    bench.queue.push(Token(0), offloaded(bench.file, 0, 4096));
    bench.queue.reap(&mut done);
    assert_eq!(done.len(), 1, "a small one is done at once");
    // More than are given away at a time: the rest is done here.
    let count = 100;
    for at in 0..count {
        bench.queue.push(Token(at), offloaded(bench.file, at, 1 << 16));
    }
    done.clear();
    bench.queue.reap(&mut done);
    let here = done.len();
    assert!(here > 0 && here < count as usize, "{here} were done here");
    bench.queue.submit();
    done.extend(bench.finish(count as usize - here));
    assert!(done.iter().all(|completion| completion.result == Ok(())));
    let contents = bench.contents();
    assert_eq!(contents.len(), (count as usize) << 16);
    for (at, cluster) in contents.chunks(1 << 16).enumerate() {
        assert!(cluster.iter().all(|byte| *byte == at as u8 + 1), "cluster {at}");
    }
}

#[test]
fn every_flavour_of_ring_works() {
    let Some(folder) = on_disk() else { return };
    let mut bench = Bench::new(folder, true, &pattern(1 << 20, 11));
    for flavour in FLAVOURS {
        for timed_wait in [true, false] {
            let ring =
                UringQueue::with_flavours(bench.storage.files.clone(), 4, &[flavour]).expect("it is known");
            bench.queue = HostQueue::Uring(Box::new(ring));
            // Without the timed wait only kernels before 5.11 are alike, which have the plain flavour alone.
            if flavour == Flavour::Plain {
                bench.ring().set_timed_wait_ability(timed_wait);
            }
            let started = Instant::now();
            bench.queue.wait(Some(Duration::from_millis(30)));
            assert!(started.elapsed() < LONG);
            for at in 0..64 {
                let parts = Parts::from_vec(vec![Part::Owned(AlignedBuf::new(8192))]);
                let operation = Operation::new(bench.file, Kind::Read, at * 4096, parts);
                bench.queue.push(Token(at), operation);
            }
            for completion in bench.finish(64) {
                let at = completion.token.0 as usize * 4096;
                assert!(all_bytes(&completion.parts) == pattern(1 << 20, 11)[at..at + 8192]);
            }
            signals_arrive(&mut bench.queue, EFD_NONBLOCK, false, 20);
            signals_arrive(&mut bench.queue, EFD_NONBLOCK, true, 20);
            notifications_arrive(&mut bench.queue, 200);
        }
    }
}
#[test]
fn dropping_a_queue_waits_for_io_in_flight() {
    for aio in KINDS {
        drop_with_io_in_flight(aio);
    }
}

fn drop_with_io_in_flight(aio: Aio) {
    let Some(folder) = on_disk() else { return };
    let data = pattern(32 << 20, 12);
    let path = folder.path().join("image");
    std::fs::write(&path, &data).expect("an image");
    let storage = HostStorage::new().by(aio);
    let (file, _) = storage.open(&path, &options(true, true)).expect("it opens");
    let mut queue = storage.queue(32).expect("a queue");
    queue.watch(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let slices: Vec<GuestSlice> = (0..32).map(|_| guest(1 << 20)).collect();
    for (at, slice) in (0..).zip(&slices) {
        let parts = Parts::from_vec(vec![Part::Guest(*slice)]);
        queue.push(Token(at), Operation::new(file, Kind::Read, at << 20, parts));
    }
    // These exceed the depth and never start.
    for at in 32..64 {
        let parts = Parts::from_vec(vec![owned(&[0; 4096])]);
        queue.push(Token(at), Operation::new(file, Kind::Write, 0, parts));
    }
    queue.submit();
    drop(queue);
    for (at, slice) in slices.iter().enumerate() {
        assert!(bytes_of(&Part::Guest(*slice)) == data[at << 20..][..1 << 20]);
    }
    assert!(std::fs::read(&path).expect("it can be read") == data);
}

#[test]
fn a_queue_uses_files_opened_later_and_outlives_the_storage() {
    let mut bench = Bench::new(in_memory(), true, &[1; 512]);
    let path = bench.folder.path().join("later");
    std::fs::write(&path, [2; 512]).expect("a file");
    let (later, _) = bench.storage.open(&path, &options(false, true)).expect("it opens");
    assert_eq!((bench.file, later), (FileId(0), FileId(1)));
    bench.storage = HostStorage::new();
    for (file, byte) in [(later, 2), (bench.file, 1)] {
        let parts = Parts::from_vec(vec![owned(&[0; 512])]);
        bench.queue.push(Token(0), Operation::new(file, Kind::Read, 0, parts));
        assert_eq!(all_bytes(&bench.finish(1)[0].parts), [byte; 512]);
    }
}
