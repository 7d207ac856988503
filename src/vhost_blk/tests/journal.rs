//! The disk's journal lies in the in-flight region: which sessions offer it to the disk, and when it ends.

mod kit;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_blk::ServeOptions;

const ALL: u64 = F_VERSION_1 | F_FLUSH | F_CONFIG_WCE;
/// Words of a journal.
const WORDS: usize = (1 << 20) / 8;

fn serve(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 256))
}

/// What was offered since the last call.
fn take(disk: &MemoryDisk) -> Vec<Option<(usize, u64)>> {
    std::mem::take(&mut *disk.journals.lock().unwrap())
}

#[test]
fn each_session_offers_the_journal_of_its_region_and_ends_it() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let (mut guest, region) = Guest::connect_as_cloud(&server.path, ALL, &[32, 32]);
    assert_eq!(take(&disk), [Some((WORDS, 0))]);
    guest.write(0, 1, &pattern(512, 1));
    guest.leave(&server.path);
    until("it has ended", || !disk.journals.lock().unwrap().is_empty());
    assert_eq!(take(&disk), [None]);
    guest.reconnect(&server.path, Some(&region));
    assert_eq!(take(&disk), [Some((WORDS, 1))], "the same memory");
    guest.frontend.reset_owner().expect("a reset");
    until("it has ended", || !disk.journals.lock().unwrap().is_empty());
    assert_eq!(take(&disk), [None]);
    guest.leave(&server.path);
    // A session without a region has no journal to end.
    guest.reconnect(&server.path, None);
    guest.leave(&server.path);
    assert_eq!(take(&disk), []);
}

#[test]
fn a_region_is_refused_where_the_disk_cannot_switch_its_journal() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let (mut guest, region) = Guest::connect_as_cloud(&server.path, ALL, &[32]);
    disk.refuses_journal.store(true, Ordering::SeqCst);
    let set = guest.frontend.set_inflight_fd(&region.message, region.file.as_raw_fd());
    assert!(set.is_err(), "the frontend is told");
    // The session goes on with the region that it has.
    guest.write(0, 1, &pattern(512, 1));
    assert_eq!(guest.read(0, 1, 512), pattern(512, 1));
    assert_eq!(take(&disk), [Some((WORDS, 0))]);
}
