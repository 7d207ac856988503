//! Requests through a real socket and real rings, as a well-behaved guest sees them.

mod kit;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kit::TestServer;
use kit::disk::{MemoryDisk, Shared};
use kit::guest::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost_blk::{Request, ServeOptions};

const FEATURES: u64 = F_VERSION_1 | F_FLUSH | F_INDIRECT;

fn serve(disk: &Arc<MemoryDisk>) -> TestServer {
    TestServer::start(Arc::new(Shared(Arc::clone(disk))), ServeOptions::new(4, 256))
}

#[test]
fn every_kind_of_request() {
    for disk in [MemoryDisk::new(2048), MemoryDisk::later(2048)] {
        for features in [FEATURES, FEATURES | F_EVENT_IDX, FEATURES | F_PACKED] {
            disk.bytes.lock().unwrap().fill(0);
            every_kind(&disk, features);
        }
    }
}

fn every_kind(disk: &Arc<MemoryDisk>, features: u64) {
    let server = serve(disk);
    let mut guest = Guest::connect(&server.path, features);
    let queue = guest.add_queue(64);
    let data = pattern(8192, 7);
    guest.write(queue, 3, &data);
    assert_eq!(guest.read(queue, 3, 8192), data);
    assert_eq!(disk.bytes.lock().unwrap()[3 * 512..3 * 512 + 8192], data);
    assert_eq!(guest.read(queue, 2047, 512), [0; 512]);
    let flushed = guest.request(queue, T_FLUSH, 0, &[], 0);
    assert_eq!((flushed.status, flushed.written), (OK, 1));
    let id = guest.request(queue, T_GET_ID, 0, &[], 20);
    assert_eq!((id.status, id.written, &id.data[..]), (OK, 21, &b"serial-of-this-disk\0"[..]));
    let zeroed = guest.request(queue, T_WRITE_ZEROES, 0, &segment(3, 4, 1), 0);
    assert_eq!(zeroed.status, OK);
    assert_eq!(guest.read(queue, 3, 2048), [0; 2048]);
    assert_eq!(guest.read(queue, 7, 512), data[2048..2560]);
    let discarded = guest.request(queue, T_DISCARD, 0, &segment(7, 4, 0), 0);
    assert_eq!(discarded.status, OK);
    assert_eq!(guest.read(queue, 7, 2048), [0; 2048]);
    let empty = guest.request(queue, T_IN, 0, &[], 0);
    assert_eq!((empty.status, empty.written), (OK, 1));
    let total = server.options.metrics.total();
    assert_eq!((total.writes, total.flushes, total.discards, total.write_zeroes), (1, 1, 1, 1));
    assert_eq!((total.written_bytes, total.errors(), total.malformed, total.ring_errors), (8192, 0, 0, 0));
}

#[test]
fn requests_are_whole_logical_blocks() {
    let disk = MemoryDisk::with(64, false, |profile| {
        (profile.block_size, profile.physical_block_size) = (4096, 16384);
    });
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(64);
    let space = guest.read_config(20, 8).expect("the configuration space");
    assert_eq!(space, [0, 0x10, 0, 0, 2, 0, 4, 0], "blk_size, then the topology in logical blocks");
    let data = pattern(4096, 9);
    guest.write(queue, 8, &data);
    assert_eq!(guest.read(queue, 8, 4096), data);
    for (sector, bytes) in [(1, 4096), (8, 512), (8, 3584), (7, 512), (12, 8192)] {
        assert_eq!(guest.request(queue, T_OUT, sector, &vec![1; bytes], 0).status, IOERR, "{sector}+{bytes}");
        assert_eq!(guest.request(queue, T_IN, sector, &[], bytes as u32).status, IOERR, "{sector}+{bytes}");
    }
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for (sector, sectors) in [(9, 8), (8, 7), (8, 1)] {
            let status = guest.request(queue, kind, 0, &segment(sector, sectors, 0), 0).status;
            assert_eq!(status, IOERR, "{kind}: {sector}+{sectors}");
        }
    }
    assert_eq!(guest.read(queue, 8, 4096), data, "nothing was changed");
    assert_eq!(guest.request(queue, T_WRITE_ZEROES, 0, &segment(8, 8, 0), 0).status, OK);
    assert_eq!(guest.read(queue, 8, 4096), [0; 4096]);
}

#[test]
fn all_segments_of_a_discard() {
    for disk in [MemoryDisk::new(4096), MemoryDisk::later(4096)] {
        let server = serve(&disk);
        let mut guest = Guest::connect(&server.path, FEATURES);
        let queue = guest.add_queue(64);
        disk.bytes.lock().unwrap().fill(9);
        let segments: Vec<u8> = (0..32).flat_map(|number| segment(number * 100, 1, 0)).collect();
        for _ in 0..3 {
            assert_eq!(guest.request(queue, T_DISCARD, 0, &segments, 0).status, OK);
        }
        let zeros = disk.bytes.lock().unwrap().iter().filter(|byte| **byte == 0).count();
        assert_eq!(zeros, 32 * 512);
        // Many of them at once: more segments than the disk may have at the same time.
        let header = guest.header(T_DISCARD, 0);
        let data = guest.put(&segments);
        let mut statuses = Vec::new();
        for _ in 0..20 {
            let status = guest.put(&[UNTOUCHED]);
            let head = guest.chain(queue, &[(header, 16, 0), (data, 512, 0), (status, 1, WRITE)]);
            guest.make_available(queue, head);
            statuses.push(status);
        }
        guest.kick(queue);
        for _ in 0..20 {
            assert_eq!(guest.next_used(queue).1, 1);
        }
        assert!(statuses.iter().all(|status| guest.get(*status, 1) == [OK]));
        assert_eq!(disk.requests.lock().unwrap().len(), 23 * 32);
        let nothing = guest.request(queue, T_DISCARD, 0, &segment(5, 0, 0), 0);
        assert_eq!(nothing.status, OK);
    }
}

#[test]
fn any_framing() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(256);
    let data = pattern(1024, 3);
    for cuts in [&[16usize][..], &[1, 15], &[5, 16, 17], &[16, 528], &[3, 700, 701], &[]] {
        for indirect in [false, true] {
            // A write: header and data are one run of bytes, cut anywhere.
            let header = guest.header(T_OUT, 1);
            let mut whole = guest.get(header, 16);
            whole.extend(&data);
            let mut parts = Vec::new();
            let mut start = 0;
            for end in cuts.iter().copied().chain([whole.len()]) {
                let at = guest.put(&whole[start..end]);
                parts.push((at, (end - start) as u32, 0));
                start = end;
            }
            let status = guest.put(&[UNTOUCHED]);
            parts.push((status, 1, WRITE));
            let head =
                if indirect { guest.indirect_chain(queue, &parts) } else { guest.chain(queue, &parts) };
            disk.bytes.lock().unwrap().fill(0);
            assert_eq!(guest.run(queue, head), 1);
            assert_eq!(guest.get(status, 1), [OK]);
            assert_eq!(disk.bytes.lock().unwrap()[512..1536], data, "{cuts:?}");

            // A read: data and status are one run of bytes, cut anywhere.
            let header = guest.header(T_IN, 1);
            let target = guest.put(&[0xcc; 1025]);
            let mut parts = vec![(header, 4, 0), (header + 4, 12, 0)];
            let mut start = 0;
            for end in cuts.iter().copied().chain([1025]) {
                parts.push((target + start as u64, (end - start) as u32, WRITE));
                start = end;
            }
            let head =
                if indirect { guest.indirect_chain(queue, &parts) } else { guest.chain(queue, &parts) };
            assert_eq!(guest.run(queue, head), 1025);
            let read = guest.get(target, 1025);
            assert_eq!(read[..1024], data, "{cuts:?}");
            assert_eq!(read[1024], OK);
        }
    }
}

#[test]
fn a_buffer_across_two_regions() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(16);
    let data = pattern(4096, 1);
    guest.write(queue, 0, &data);
    let header = guest.header(T_IN, 0);
    let status = guest.put(&[UNTOUCHED]);
    let target = REGION - 1000;
    let head = guest.chain(queue, &[(header, 16, 0), (target, 4096, WRITE), (status, 1, WRITE)]);
    assert_eq!(guest.run(queue, head), 4097);
    assert_eq!(guest.get(target, 4096), data);
    assert_eq!(guest.get(status, 1), [OK]);
}

#[test]
fn direct_chains_before_an_indirect_one() {
    // Virtio 1.2, 2.7.5.3.2: ordinary descriptors may come first.
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(16);
    let header = guest.header(T_IN, 0);
    let target = guest.alloc(513);
    let table = guest.alloc(16);
    guest.descriptor(table, 0, target, 513, WRITE, 0);
    let head = guest.chain(queue, &[(header, 16, 0), (table, 16, INDIRECT)]);
    assert_eq!(guest.run(queue, head), 513);
}

#[test]
fn durability_follows_flush_and_the_writeback_byte() {
    let through = |disk: &MemoryDisk| match disk.requests.lock().unwrap().pop() {
        Some(Request::Write { write_through, .. } | Request::Discard { write_through, .. }) => write_through,
        other => panic!("{other:?}"),
    };
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, F_VERSION_1);
    let queue = guest.add_queue(16);
    guest.write(queue, 0, &[1; 512]);
    assert!(through(&disk), "FLUSH was not negotiated");
    drop(guest);

    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(16);
    guest.write(queue, 0, &[1; 512]);
    assert!(!through(&disk));
    assert_eq!(guest.read_config(32, 1), Some(vec![1]));
    let writable = VhostUserConfigFlags::WRITABLE;
    guest.frontend.set_config(32, writable, &[0]).expect("the writeback byte");
    assert_eq!(guest.read_config(32, 1), Some(vec![0]));
    assert!(matches!(disk.requests.lock().unwrap().pop(), Some(Request::Flush)), "what was cached");
    guest.write(queue, 0, &[1; 512]);
    assert!(through(&disk));
    guest.request(queue, T_DISCARD, 0, &segment(0, 8, 0), 0);
    assert!(through(&disk));
    guest.frontend.set_config(32, writable, &[1]).expect("the writeback byte");
    guest.write(queue, 0, &[1; 512]);
    assert!(!through(&disk));
    for (offset, bytes) in [(32, &[2u8][..]), (0, &[0]), (32, &[1, 1]), (59, &[0])] {
        assert!(guest.frontend.set_config(offset, writable, bytes).is_err());
    }
    guest.write(queue, 0, &[1; 512]);
}

#[test]
fn the_configuration_space() {
    let disk = MemoryDisk::new(0x4321);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    for size in [36, 57, 60, 256] {
        let space = guest.read_config(0, size).expect("in range");
        assert_eq!(space.len(), size as usize);
        assert_eq!(space[..8], 0x4321u64.to_le_bytes());
    }
    assert_eq!(guest.read_config(34, 2), Some(vec![4, 0]));
}

#[test]
fn a_read_only_disk() {
    let disk = MemoryDisk::with(64, false, |profile| profile.read_only = true);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(16);
    assert_eq!(guest.request(queue, T_OUT, 0, &[1; 512], 0).status, IOERR);
    assert_eq!(guest.request(queue, T_DISCARD, 0, &segment(0, 1, 0), 0).status, IOERR);
    assert_eq!(guest.request(queue, T_WRITE_ZEROES, 0, &segment(0, 1, 0), 0).status, IOERR);
    assert_eq!(guest.request(queue, T_FLUSH, 0, &[], 0).status, OK);
    assert_eq!(guest.read(queue, 0, 512), [0; 512]);
    assert!(disk.requests.lock().unwrap().iter().all(|done| matches!(done, Request::Read { .. })));
}

#[test]
fn many_requests_in_flight_on_many_queues() {
    let disks = || [MemoryDisk::new(4096), MemoryDisk::later(4096)];
    let kinds = [FEATURES | F_EVENT_IDX, FEATURES | F_EVENT_IDX | F_PACKED];
    for (disk, features) in kinds.into_iter().flat_map(|kind| disks().map(|disk| (disk, kind))) {
        let server = serve(&disk);
        let mut guest = Guest::connect(&server.path, features);
        for _ in 0..4 {
            guest.add_queue(64);
        }
        let mut total = 0;
        for round in 0..50u64 {
            for queue in 0..4 {
                for number in 0..16 {
                    guest.offer_write(queue, (round * 16 + number) % 4096);
                    total += 1;
                }
                guest.kick(queue);
            }
            for queue in 0..4 {
                for _ in 0..16 {
                    assert_eq!(guest.next_used(queue).1, 1);
                }
            }
        }
        assert_eq!(disk.submitted.load(Ordering::SeqCst), total);
        let counted = server.options.metrics.snapshot();
        assert!(counted.iter().all(|queue| queue.writes == total / 4 && queue.errors() == 0));
    }
}

#[test]
fn requests_that_complete_at_once_are_handed_back_in_small_batches() {
    let disk = MemoryDisk::new(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(64);
    disk.slow.store(true, Ordering::SeqCst);
    guest.write(queue, 0, &[1; 512]);
    disk.gate.close();
    for sector in 0..16 {
        guest.offer_write(queue, sector);
    }
    guest.kick(queue);
    disk.gate.open();
    for _ in 0..16 {
        guest.next_used(queue);
    }
    let portions = disk.portions.lock().unwrap().clone();
    assert!(portions.len() == 17 && portions.iter().all(|(requests, _)| *requests == 1), "{portions:?}");
    // The first two may have been taken before more were available.
    assert!(portions[2..16].iter().all(|(_, more)| *more) && !portions[16].1, "{portions:?}");
}

#[test]
fn a_disk_that_takes_its_time_begins_with_the_first() {
    let disk = MemoryDisk::later(64);
    let server = serve(&disk);
    let mut guest = Guest::connect(&server.path, FEATURES);
    let queue = guest.add_queue(64);
    disk.gate.close();
    for batch in 0..2 {
        for sector in 0..16 {
            guest.offer_write(queue, sector);
        }
        guest.kick(queue);
        disk.await_submitted(16 * (batch + 1));
    }
    disk.gate.open();
    for _ in 0..32 {
        guest.next_used(queue);
    }
    // The disk had all requests while none was done, and got them a few at a time.
    let portions = disk.portions.lock().unwrap().clone();
    assert_eq!(portions.iter().map(|(requests, _)| requests).sum::<usize>(), 32);
    assert!(portions.iter().all(|(requests, _)| *requests <= 8), "{portions:?}");
}
