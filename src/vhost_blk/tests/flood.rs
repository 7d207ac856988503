//! Lines of the log that a guest can cause as often as it likes: their number is bounded. Alone in its program, because
//! it reads the log of the whole process.

mod kit;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use kit::log;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost_blk::ServeOptions;

#[test]
fn a_guest_cannot_fill_the_log() {
    const ROUNDS: u8 = 60;
    log::keep();
    let disk = MemoryDisk::new(64);
    let server = TestServer::start(Arc::new(Shared(Arc::clone(&disk))), ServeOptions::new(4, 128));
    let mut guest = Guest::connect(&server.path, F_VERSION_1 | F_FLUSH | F_CONFIG_WCE);
    let queues = [guest.add_queue(16), guest.add_queue(16)];
    let mut set = |value: u8| guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[value]);
    for _ in 0..ROUNDS {
        set(0).expect("the cache is off");
        set(1).expect("the cache is on");
    }
    assert_eq!(log::with("queue started").len(), queues.len(), "not at each change of the cache");
    disk.broken.store(true, Ordering::SeqCst);
    for _ in 0..ROUNDS {
        set(0).expect_err("nothing can be flushed");
        set(1).expect("the cache is on");
        set(2).expect_err("no value of this byte");
    }
    for (line, most) in [("refused: ", 16), ("the flush of a stopping queue failed", 16)] {
        let lines = log::with(line).len();
        assert!((1..=most).contains(&lines), "{lines} lines: {line}");
    }
}
