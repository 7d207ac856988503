//! Reads of what is in the page cache, by the queue of threads.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::Advice;

use super::*;

/// Of the page cache, on most machines.
const PAGE: usize = 4096;

impl Bench {
    fn start_read(&mut self, offset: usize, length: usize) {
        let parts = Parts::from_iter([Part::Owned(AlignedBuf::new(length))]);
        self.queue.push(Token(5), Operation::new(self.file, Kind::Read, offset as u64, parts));
    }

    /// Checks the bytes of a read; returns whether it completed at once. The first reap never returns a read by the
    /// pool: it only submits it.
    fn reads_at_once(&mut self, contents: &[u8], offset: usize, length: usize) -> bool {
        self.start_read(offset, length);
        let mut done = Vec::new();
        self.queue.reap(&mut done);
        let at_once = !done.is_empty();
        let completion = done.pop().unwrap_or_else(|| self.finish(1).remove(0));
        assert_eq!((completion.token, completion.result), (Token(5), Ok(())));
        let mut expected = contents[offset..contents.len().min(offset + length)].to_vec();
        expected.resize(length, 0);
        assert!(all_bytes(&completion.parts) == expected, "{length} bytes at {offset}");
        at_once
    }

    /// Makes the page cache drop the file except these pages, as far as it follows advice.
    fn forget_all_but(&self, pages: &[usize]) {
        let file = std::fs::File::open(self.folder.path().join("image")).expect("the image");
        file.sync_all().expect("all is written");
        // No reading ahead.
        rustix::fs::fadvise(&file, 0, None, Advice::Random).expect("advice is taken");
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).expect("advice is taken");
        for page in pages {
            file.read_exact_at(&mut [0], (page * PAGE) as u64).expect("it is read");
        }
    }

    /// Whether the file system supports reads that do not wait; reports a skip if not.
    fn has_reads_without_waiting(&self) -> bool {
        let file = std::fs::File::open(self.folder.path().join("image")).expect("the image");
        let mut byte = 0_u8;
        file.read_exact_at(std::slice::from_mut(&mut byte), 0).expect("it is read");
        let iovec = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // SAFETY: the vector names one byte, which lives until the call is over.
        let known = unsafe { libc::preadv2(file.as_raw_fd(), &iovec, 1, 0, libc::RWF_NOWAIT) == 1 };
        if !known {
            skip("no reads without waiting here");
        }
        known
    }
}

fn bench(direct: bool, contents: &[u8]) -> Option<Bench> {
    on_disk().map(|folder| Bench::by(Aio::Threads, folder, direct, contents))
}

#[test]
fn hits_are_served_at_once() {
    let contents = pattern(64 * PAGE, 3);
    let Some(mut bench) = bench(false, &contents) else { return };
    if !bench.has_reads_without_waiting() {
        return;
    }
    assert!(bench.reads_at_once(&contents, 8 * PAGE, PAGE));
    assert!(bench.reads_at_once(&contents, PAGE + 100, 512), "odd places too");
    assert!(bench.reads_at_once(&contents, 0, 8 * PAGE));
    assert!(!bench.reads_at_once(&contents, 0, 9 * PAGE), "so much is better copied by the pool");
    bench.reads_at_once(&contents, 63 * PAGE, 2 * PAGE);
}

#[test]
fn misses_and_halves_are_read_whole() {
    let contents = pattern(32 * PAGE, 9);
    for there in [&[][..], &[2], &[3], &[4], &[2, 4], &[3, 4]] {
        let Some(mut bench) = bench(false, &contents) else { return };
        bench.forget_all_but(there);
        // Whether it is there by then is the disk's to say: the try has it read ahead.
        bench.reads_at_once(&contents, 2 * PAGE, 3 * PAGE);
        bench.reads_at_once(&contents, 20 * PAGE, PAGE);
        bench.reads_at_once(&contents, 31 * PAGE, 3 * PAGE);
    }
}

#[test]
fn direct_io_is_left_alone() {
    let contents = pattern(4 * PAGE, 5);
    let Some(mut bench) = bench(true, &contents) else { return };
    if bench.info.offset_alignment == 1 {
        return skip("no direct I/O here");
    }
    for _ in 0..3 {
        assert!(!bench.reads_at_once(&contents, PAGE, PAGE));
    }
}
