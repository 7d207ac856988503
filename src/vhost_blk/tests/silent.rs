//! Descriptors of files whose server never answers: no message, no stop and no next session waits for them.

mod kit;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::memfd;
use kit::host::{Mount, skipped};
use kit::raw::*;
use rustix::event::{PollFd, PollFlags, Timespec};
use vhost_blk::ServeOptions;

const PAGE: u64 = 4096;
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;

/// A file system with one file, `memory`, whose server answers until it is silenced.
struct Silent {
    mount: Option<Mount>,
    device: Arc<File>,
    silent: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Silent {
    fn start() -> Option<Self> {
        let device = Arc::new(File::options().read(true).write(true).open("/dev/fuse").ok()?);
        let mount = Mount::fuse(&device)?;
        let silent = Arc::new(AtomicBool::new(false));
        let (its_device, its_silent) = (Arc::clone(&device), Arc::clone(&silent));
        let thread = std::thread::spawn(move || {
            while !its_silent.load(Ordering::SeqCst) {
                let mut fds = [PollFd::new(&its_device, PollFlags::IN)];
                let wait = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
                if rustix::event::poll(&mut fds, Some(&wait)).is_ok_and(|ready| ready > 0) {
                    answer(&its_device);
                }
            }
        });
        Some(Silent { mount: Some(mount), device, silent, thread: Some(thread) })
    }

    /// Opens `count` descriptors of the file, and then silences the server.
    fn files(&mut self, count: usize) -> Vec<File> {
        let path = self.mount.as_ref().expect("until it is dropped").path().join("memory");
        let open = || File::options().read(true).write(true).open(&path).expect("the server answers");
        let files = (0..count).map(|_| open()).collect();
        self.silence();
        files
    }

    fn silence(&mut self) {
        self.silent.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it does not panic");
        }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.silence();
        drop(self.mount.take());
        // Closing the last descriptor of /dev/fuse ends every request that waits.
        assert_eq!(Arc::strong_count(&self.device), 1);
    }
}

fn answer(mut device: &File) {
    let mut request = vec![0; 1 << 17];
    let Ok(length) = device.read(&mut request) else { return };
    let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().expect("four bytes"));
    assert!(length >= 40, "a whole header");
    let body: Result<Vec<u8>, i32> = match word(4) {
        // Version 7.31; the smallest possible limits.
        INIT => Ok(words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        LOOKUP => Ok([words(&[2, 0, 1, 0, 1000, 0, 0, 0, 0, 0]), attributes(2, 0o100_644)].concat()),
        GETATTR if word(16) == 1 => Ok([words(&[0, 0, 0, 0]), attributes(1, 0o40_755)].concat()),
        GETATTR => Ok([words(&[0, 0, 0, 0]), attributes(2, 0o100_644)].concat()),
        OPEN => Ok(words(&[1, 0, 0, 0])),
        _ => Err(-libc::ENOSYS),
    };
    let (error, body) = body.map_or_else(|error| (error, Vec::new()), |body| (0, body));
    let mut reply = Vec::new();
    reply.extend((16 + body.len() as u32).to_ne_bytes());
    reply.extend(error.to_ne_bytes());
    reply.extend(&request[8..16]);
    reply.extend(body);
    let _ = device.write(&reply);
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn attributes(inode: u32, mode: u32) -> Vec<u8> {
    let size = 64 * PAGE as u32;
    let wide = [inode, 0, size, 0, size / 512, 0, 0, 0, 0, 0, 0, 0];
    [words(&wide), words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
}

#[test]
fn a_file_whose_server_is_silent_holds_nobody() {
    let server = TestServer::start(Arc::new(Shared(MemoryDisk::new(64))), ServeOptions::new(4, 128));
    let Some(mut silent) = Silent::start() else {
        return skipped("it needs /dev/fuse and the right to mount");
    };
    let files = silent.files(8);
    let fds = raw_fds(&files);
    let memory = memfd(PAGE);
    let mut raw = Raw::negotiated(&server.path);
    let refused = |reply: Reply| reply.number().is_some_and(|answer| answer != 0);
    let queue = 0u64.to_ne_bytes();
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        assert!(refused(raw.ask(request, &queue, &fds[..1])), "message {request}");
    }
    assert!(refused(raw.ask(ADD_MEM_REG, &single_region([0, PAGE, 0, 0]), &fds[..1])));
    let two = [memory.as_raw_fd(), fds[0]];
    assert!(refused(raw.ask(SET_MEM_TABLE, &table(&[[0, PAGE, 0, 0], [PAGE, PAGE, PAGE, 0]]), &two)));
    assert!(raw.lives());
    // In a message that takes no descriptors: the session ends, and they are closed all the same.
    assert_eq!(raw.ask(SET_VRING_NUM, &state(0, 16), &fds), Reply::Closed);
    assert!(Raw::negotiated(&server.path).lives());
    // Descriptors whose last holder is the session, in a message that is never completed.
    let mut raw = Raw::negotiated(&server.path);
    raw.send(SET_VRING_CALL, 1, 8, &[], &fds);
    drop(raw);
    assert!(Raw::negotiated(&server.path).lives());
    server.finish().expect("it ends well");
    // The descriptors go only now, with the server silent; their close would wait as well.
    drop(silent);
    drop(files);
}
